"""Runs that differ in the seed alone, as one: mean, standard deviation over seeds, and an interval.

Each of K seeds gives a mean difference d_k over the same n questions, with a 95 % interval over questions. The mean
of the d_k has two sources of error: other seeds, with variance var(d_k) / K, and other questions, with the variance q
that the single intervals say, (width / 2 / 1.96) squared, averaged over the seeds; more seeds do not lower it, since
all ask the same questions. The interval is mean +/- t * sqrt(var(d_k) / K + q); t has the degrees of freedom of Welch
and Satterthwaite, from K - 1 and n - 1 (n clusters where questions share a context). What a question does at one seed
alone is counted in both parts, so the interval is rather too wide than too narrow.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from records import Run, from_record

# flags that change where a run goes and how fast it is, not what it learns or how it is measured
NO_SETTINGS = {
    "seed", "output_dir", "exp_tag", "exp_log", "resume_from_checkpoint", "report_to", "num_proc", "no_baseline_cache",
    "eval_batch_size", "eval_save_json", "save_steps", "table", "time",
}  # fmt: skip


def merge_seeds(runs: list[Run]) -> list[Run]:
    """`runs`, in which completed records that differ in the seed alone are one run with these as `members`. A seed
    that was run twice counts once, by its newest record."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = f"alone {len(groups)}"
        if run.origin == "new" and isinstance(run.params.get("seed"), int):
            settings = {name: value for name, value in run.params.items() if name not in NO_SETTINGS}
            stood_on = run.source.get("base"), (run.source.get("data") or {}).get("adapter")  # not its name alone
            key = json.dumps([run.script, settings, stood_on], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    merged = []
    for members in groups.values():
        newest = {run.params.get("seed"): run for run in sorted(members, key=lambda run: run.source.get("ts", ""))}
        merged += [merge(list(newest.values()))] if len(newest) > 1 else members
    return merged


def merge(members: list[Run]) -> Run:
    """One run that stands for completed runs of several seeds; its record holds means and combined differences."""
    members = sorted(members, key=lambda run: run.params["seed"])
    records = [run.source for run in members]
    keys = [key for key in members[0].delta if all(key in member.delta for member in members)]
    means = {key: average([record[key] for record in records]) for key in ("baseline", "final", "runtime_s")}
    delta = {key: combine([member.delta[key] for member in members]) for key in keys}
    run = from_record(records[0] | means | {"delta": delta, "kept_step": None})
    run.name, run.origin = f"{common_name(members)}, {len(members)} seeds", f"new, {len(members)} seeds"
    run.members = members
    return run


def common_name(members: list[Run]) -> str:
    """What the names have in common: "S4" of "S4-seed1" and "S4-seed2"; else the first name."""
    stems = {run.name.rpartition("seed")[0].rstrip("-_ ") for run in members}
    return stems.pop() if len(stems) == 1 and "" not in stems else members[0].name


def average(values: list[Any]) -> Any:
    """Numbers averaged, key by key of those that all have; what is not a number in all of them is the first one's."""
    first = values[0]
    if all(isinstance(value, dict) for value in values):
        return {key: average([value[key] for value in values]) for key in first if all(key in v for v in values)}
    if all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [average(list(of_place)) for of_place in zip(*values, strict=True)]
    differ = any(value != first for value in values) and all(type(value) in {int, float} for value in values)
    return statistics.fmean(values) if differ else first


def combine(deltas: list[dict]) -> dict:
    """The differences of several seeds as one: mean, sd over seeds, and low, high, p as the module's text says.
    Without an interval in one of them there is none here (None)."""
    from scipy import stats

    first, means = deltas[0], [delta["mean"] for delta in deltas]
    combined: dict = {"n": first["n"], "seeds": len(deltas), **dict.fromkeys(("mean", "sd", "low", "high", "p"))}
    combined |= {"changed": max(delta["changed"] for delta in deltas), "clusters": first["clusters"]}
    combined["changed_clusters"] = max((delta["changed_clusters"] or 0 for delta in deltas), default=0)
    if None in means:
        return combined
    mean, sd = statistics.fmean(means), statistics.stdev(means)
    combined |= {"mean": mean, "sd": sd}
    kinds = [delta.get("by_type", {}) for delta in deltas]
    if kinds[0]:
        shared = [kind for kind in kinds[0] if all(kind in of_seed for of_seed in kinds)]
        combined["by_type"] = {kind: combine([of_seed[kind] for of_seed in kinds]) for kind in shared}
    if any(delta["low"] is None for delta in deltas):
        return combined
    of_seeds = sd**2 / len(means)
    of_questions = statistics.fmean(((delta["high"] - delta["low"]) / 2 / 1.96) ** 2 for delta in deltas)
    variance = of_seeds + of_questions
    if variance == 0:
        return combined | {"low": mean, "high": mean, "p": 1.0 if mean == 0 else 0.0}
    degrees = len(means) - 1, max(1, (first["clusters"] or first["n"]) - 1)
    freedom = variance**2 / (of_seeds**2 / degrees[0] + of_questions**2 / degrees[1])
    half = float(stats.t.ppf(0.975, freedom)) * variance**0.5
    p = 2 * float(stats.t.sf(abs(mean) / variance**0.5, freedom))
    return combined | {"low": mean - half, "high": mean + half, "p": p}
