"""How much two published runs differ with nothing changed, from the baselines of one base under one protocol.

The published runs logged no per-question answers, so their differences have no interval. What they did log is the
same base measured again and again. With s the standard deviation of those baselines, a difference of two
measurements has the standard deviation sqrt(2) * s with nothing changed. A change within twice that is marked. From
so few baselines s itself is uncertain: its interval is that of a normal sample (chi-squared).

Greedy answers give the same figure again and again, which says nothing of the noise: a spread needs three baselines
that differ. A run whose figures the README repeats counts once.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

from records import Run

FEWEST = 3  # different baselines that a spread is computed from
REPEATED = {"dpo-quickstart": "beta_002_lora_16_32"}  # a published run -> the one whose figures it repeats
MEASURES = {  # title, the flag that says how many questions are asked, and how many it is without it
    "mtbench": ("MT-Bench", "mtbench_limit", 50),
    "tatqa": ("TAT-QA", "eval_limit", 250),
    "finance_instruct": ("Finance-Instruct", "instruct_limit", 50),
    "reddit": ("Reddit", "reddit_limit", 100),
}


@dataclasses.dataclass
class Spread:
    """Baselines of one base under one protocol, and the runs measured that way."""

    metric: str
    title: str
    runs: list[Run]  # those with a baseline or a difference
    baselines: list[float]

    @property
    def of_baselines(self) -> float:
        return statistics.stdev(self.baselines)

    @property
    def of_differences(self) -> float:
        return 2**0.5 * self.of_baselines

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `of_differences`."""
        low, high = sd_interval(len(self.baselines))
        return self.of_differences * low, self.of_differences * high


def sd_interval(n: int) -> tuple[float, float]:
    """The 95 % interval of a standard deviation of `n` values of a normal distribution, as its multiples."""
    from scipy.stats import chi2

    low, high = (float(((n - 1) / chi2.ppf(q, n - 1)) ** 0.5) for q in (0.975, 0.025))
    return low, high


def questions_asked(run: Run, metric: str) -> str:
    """How many questions a published figure is over: as logged, else by the command, else as its log's other runs. For
    a multi-task command without --eval_limit that is 250: its figures are multiples of 0.4, as the others' are."""
    if metric == "mtbench" and run.script == "sft_train.py":
        before, after = run.facts.get("mtbench_questions") or [None, None]
        limit = run.params.get("mtbench_questions_limit", "0")
        return str(before or after or ("80" if limit == "0" else limit))
    _, flag, usual = MEASURES[metric]
    logged = run.facts.get("eval_n") if metric == "tatqa" else None
    return str(logged or run.params.get(flag) or usual)


def mark_noise(runs: list[Run]) -> list[Spread]:
    """A spread for each measure, base and protocol of which the record holds three baselines that differ. Runs share a
    protocol when the record says in the same words how they were measured (`settings`), on as many questions. Where it
    does not say that, nothing is computed. Every published change within twice its spread is noted in its run's
    `in_noise`."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.is_logged and run.measured and run.source.get("settings") and run.name not in REPEATED:
            for metric in (metric for metric in MEASURES if metric in run.before or metric in run.changes):
                key = (metric, run.model, run.script, run.source["settings"], questions_asked(run, metric))
                groups.setdefault(key, []).append(run)
    spreads = []
    for (metric, model, script, _, asked), members in groups.items():
        baselines = [run.before[metric] for run in members if metric in run.before]
        if len(set(baselines)) >= FEWEST:
            language = {"dpo_train_mt.py": " EN"}.get(script, " RU") if metric == "mtbench" else ""
            title = f"{MEASURES[metric][0]}{language}, {model.rpartition('/')[2]}, {asked} questions"
            spreads.append(Spread(metric, title, members, baselines))
    for spread in spreads:
        for run in spread.runs:
            if abs(run.changes.get(spread.metric, math.inf)) <= 2 * spread.of_differences:
                run.in_noise.add(spread.metric)
    return spreads
