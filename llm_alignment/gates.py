"""Gates: the least acceptable differences of a run's metrics, and whether its intervals say that they hold."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterable

from llm_alignment.files import InputError
from llm_alignment.flags import number

ENOUGH_ITEMS = 40  # with fewer, an interval of skewed differences is too narrow to judge by
REACH = 1.96 + 1.28  # standard errors between mean and gate that decide in 90 % of repeats: an estimate may be wrong


def parse_gates(text: str) -> dict[str, float]:
    """ "mtbench=-0.3,val_loss=-0.05" as the least acceptable difference of each metric. Raises InputError."""
    gates: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, limit = map(str.strip, part.partition("="))
        if not name or name in gates:
            raise InputError(f"--gates {part}: name each metric once, as in mtbench=-0.3")
        try:
            gates[name] = number(float, -(2**31), ends="()")(limit)
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(f"--gates {part}: {limit!r} is not a number; write {name}=-0.3 or the like") from None
    return gates


def check_gates(gates: Iterable[str], metrics: Collection[str], measured: Collection[str]) -> None:
    """Raises InputError for a gate that `metrics` does not name, or that the run does not measure."""
    for name in gates:
        if name not in measured:
            what = "this run does not measure it" if name in metrics else "there is no such metric"
            raise InputError(f"--gates {name}: {what}; choose from {', '.join(measured) or 'nothing: switch it on'}")


def judge(delta: dict, limit: float, *, lower_is_better: bool = False) -> dict:
    """What the 95 % interval of a difference (as returned by `stats.paired_delta`) says of the gate `limit`.

    A difference is acceptable from the limit upwards, or downwards where lower is better. Returns {"limit", "verdict",
    "mean", "low", "high", "n", "questions"}. Verdict: "passed" (the whole interval is acceptable), "missed" (none of
    it is) or "undecided"; that too without an interval or with fewer than 40 items. "questions": how many would decide
    an undecided gate, if the difference stays what it is; None where that cannot be told.
    """
    mean, low, high, n = (delta[key] for key in ("mean", "low", "high", "n"))
    gate = {"limit": limit, "verdict": "undecided", "mean": mean, "low": low, "high": high, "n": n, "questions": None}
    if low is None:
        return {**gate, "questions": ENOUGH_ITEMS if n < ENOUGH_ITEMS else None}
    sign = -1 if lower_is_better else 1
    worst, best = sorted((sign * low, sign * high))
    if n >= ENOUGH_ITEMS and (worst >= sign * limit or best < sign * limit):
        return {**gate, "verdict": "passed" if worst >= sign * limit else "missed"}
    half = mean - low if mean >= limit else high - mean  # the side that reaches over the gate
    return {**gate, "questions": questions_that_decide(half / 1.96 * math.sqrt(n), abs(mean - limit))}


def describe(name: str, gate: dict, *, lower_is_better: bool = False) -> str:
    """One line on what `judge` returned."""
    side = "at most" if lower_is_better else "at least"
    found = "" if gate["mean"] is None else f" {gate['mean']:+.3g}"
    found += " without an interval" if gate["low"] is None else f" [{gate['low']:+.3g}, {gate['high']:+.3g}]"
    line = f"gate {name} {side} {gate['limit']:+g}: {gate['verdict']},{found} on {gate['n']}"
    if gate["verdict"] != "undecided":
        return line
    if gate["questions"] is None:
        return f"{line}; how many questions would decide cannot be told"
    few = f"too few, at least {ENOUGH_ITEMS} are needed; " if gate["n"] < ENOUGH_ITEMS else ""
    return f"{line}; {few}about {gate['questions']:,} questions would decide"


def questions_needed(limit: float, deltas: Iterable[dict], *, expected: float = 0.0) -> int | None:
    """How many questions a gate needs where a difference of `expected` is, by earlier differences of the metric
    (`stats.paired_delta`): the root mean square of their items' standard deviations, as their intervals show them, so
    that clusters count. None without an earlier interval, or where the expected difference is the gate itself."""
    known = [delta for delta in deltas if delta["low"] is not None]
    spreads = [(delta["high"] - delta["low"]) / (2 * 1.96) * math.sqrt(delta["n"]) for delta in known]
    if not spreads:
        return None
    return questions_that_decide(math.hypot(*spreads) / math.sqrt(len(spreads)), abs(expected - limit))


def questions_that_decide(spread: float, distance: float) -> int | None:
    """After how many items a mean `distance` from its gate decides; `spread` is the items' standard deviation."""
    return max(ENOUGH_ITEMS, math.ceil((REACH * spread / distance) ** 2)) if distance else None
