"""How often intervals hold the truth, excluded losses are there, and gates decide as they say.

    python experiments/benchmarks/check_coverage.py
    python experiments/benchmarks/check_coverage.py --samples 200 --items 60 --only gates

Samples are drawn where the truth is known. First tables, of the 95 % interval: shares of samples in which it holds the
truth, in which the truth is below it (a gate at the true difference is passed) and above it, and in which "a loss
above X is excluded" is printed and is wrong. Last table: gates one and two standard errors below the truth: how many
are undecided, and in which share of these a new sample with as many questions as `judge` asks for decides.

Where the true difference is 0 and skewed ("clusters of 6"), the interval errs as the sign-flip test does, whose
verdict it follows. A difference that the test calls clear is printed without an excluded loss.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from llm_alignment import stats  # noqa: E402
from llm_alignment.evaluation import judge  # noqa: E402
from llm_alignment.validation import compare_validation  # noqa: E402

QUESTIONS = 6  # of a cluster


def rare(rng: np.random.Generator, n: int, noise: float) -> np.ndarray:
    return rng.normal(0, noise, n) - 6 * (rng.random(n) < 0.05)


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """`n` clusters of 6 items whose differences share a skewed part, one item after the other."""
    return (1 - rng.exponential(1, (n, 1)) + rng.normal(0, 1, (n, QUESTIONS))).ravel()


def right_or_wrong(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.select([(draw := rng.random(n)) < 0.15, draw < 0.25], [-1.0, 1.0], 0.0)


CLUSTERS = "clusters of 6"
# kind of differences -> how n units of it are drawn, and their true mean
KINDS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda rng, n: rng.normal(0, 1, n), 0.0),
    "t, 2 degrees": (lambda rng, n: rng.standard_t(2, n), 0.0),
    "lognormal, long tail of losses": (lambda rng, n: -rng.lognormal(0, 1, n), -math.exp(0.5)),
    "lognormal, long tail of gains": (lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5)),
    "1 in 20 loses 6, noise 0": (functools.partial(rare, noise=0.0), -0.3),
    "1 in 20 loses 6, noise 0.5": (functools.partial(rare, noise=0.5), -0.3),
    "1 in 20 loses 6, noise 1": (functools.partial(rare, noise=1.0), -0.3),
    CLUSTERS: (clustered, 0.0),
    "right or wrong": (right_or_wrong, -0.05),
}
# rows of a validation -> mean loss before in nats, its standard deviation over rows, mean change
VALIDATIONS = {"as published": (1.8, 0.5, -0.35), "much is learned": (9.8, 0.8, -5.0), "nothing is": (2.5, 0.7, 0.0)}
TABLES = ("intervals", "perplexity", "gates")
MOST_QUESTIONS = 2_000  # a gate that asks for more is tried with so many: fewer than asked for


def perplexity_deltas(kind: str, n: int, samples: int) -> tuple[Iterator[dict], float]:
    """The difference of the perplexity in each sample of n rows, and the true one."""
    level, spread, change = VALIDATIONS[kind]

    def rows(losses: np.ndarray, tokens: np.ndarray) -> list[dict]:
        sums = zip((losses * tokens).tolist(), tokens.tolist(), strict=True)
        return [{"question_id": row, "nll": nll, "tokens": count} for row, (nll, count) in enumerate(sums)]

    def deltas() -> Iterator[dict]:
        for sample in range(samples):
            rng = np.random.default_rng([n, sample])
            tokens, before = np.ceil(rng.lognormal(5, 0.5, n)), rng.normal(level, spread, n)
            after = before + rng.normal(change, 0.15, n)
            yield compare_validation(rows(before, tokens), rows(after, tokens))["ppl"]

    return deltas(), math.exp(level + change) - math.exp(level)


def deltas_of(kind: str, n: int, samples: int, *, seed: int = 0) -> Iterator[dict]:
    """The difference of each sample, as the runs compute it."""
    draw, _ = KINDS[kind]
    clusters = np.repeat(np.arange(n), QUESTIONS).tolist() if kind == CLUSTERS else None
    for sample in range(samples):
        differences = draw(np.random.default_rng([seed, n, sample]), n)
        yield stats.paired_delta([0.0] * len(differences), differences.tolist(), clusters=clusters)


def line(*cells: object) -> None:
    print(*(f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells), sep=" | ", flush=True)


def print_coverage(kind: str, n: int, deltas: Iterable[dict], truth: float, *, lower_is_better: bool = False) -> None:
    """A line of the first table."""
    known = [delta for delta in deltas if delta["low"] is not None]
    below = float(np.mean([truth < delta["low"] for delta in known]))
    above = float(np.mean([truth > delta["high"] for delta in known]))
    excluded = [stats.excluded(delta, lower_is_better=lower_is_better) for delta in known]
    true_loss = truth if lower_is_better else -truth
    wrong = float(np.mean([loss is not None and loss < true_loss for loss in excluded]))
    line(kind, n, len(known), 1 - below - above, below, above, wrong)


def print_gates(kind: str, n: int, samples: int) -> None:
    """A line of the last table."""
    _, truth = KINDS[kind]
    deltas = list(deltas_of(kind, n, samples))
    error, cells = float(np.std([delta["mean"] for delta in deltas])), []
    for distance in (1, 2):
        limit, verdicts = truth - distance * error, []
        for sample, delta in enumerate(deltas):
            gate = judge(delta, limit)
            if gate["verdict"] == "undecided" and gate["questions"]:
                units = math.ceil(min(gate["questions"], MOST_QUESTIONS) * n / delta["n"])
                again = next(deltas_of(kind, units, 1, seed=sample + 1))
                verdicts.append(judge(again, limit)["verdict"] != "undecided")
        cells += [len(verdicts), float(np.mean(verdicts))]
    line(kind, n, samples, *cells)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="samples of each line (default: %(default)s)")
    parser.add_argument("--items", type=int, nargs="+", default=[80, 240], help="units of a sample (default: 80 240)")
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=TABLES, help="tables (default: all)")
    parser.add_argument("--resamples", type=int, default=1999, help="of an interval; runs take 9,999 (default: 1999)")
    options = parser.parse_args(argv)
    stats.RESAMPLES = options.resamples
    if "intervals" in options.only:
        line("differences", "units", "with an interval", "truth held", "truth below", "above", "excluded wrongly")
        for kind, (_, truth) in KINDS.items():
            for n in options.items:
                print_coverage(kind, n, deltas_of(kind, n, options.samples), truth)
    if "perplexity" in options.only:
        line("perplexity", "rows", "with an interval", "truth held", "truth below", "above", "excluded wrongly")
        for kind in VALIDATIONS:
            for n in options.items:
                deltas, truth = perplexity_deltas(kind, n, options.samples)
                print_coverage(kind, n, deltas, truth, lower_is_better=True)
    if "gates" in options.only:
        line("gates", "units", "samples", "undecided at 1 error", "then decided", "at 2 errors", "then decided")
        for kind in KINDS:
            print_gates(kind, options.items[0], options.samples // 10)


if __name__ == "__main__":
    main()
