"""Whether a reward model agrees with known preferences, by language, and how much of its own length explains."""

from __future__ import annotations

import math
from collections.abc import Callable

from llm_alignment.texts import main_script

LIKE_LENGTH = 0.1  # answers whose lengths differ by this share of the longer one or less are of like length
TITLES = {
    "all": "all pairs",
    "longer": "chosen is longer",
    "like": "of like length (10 %)",
    "shorter": "chosen is shorter",
    "two_scripts": "answers in two scripts",
}


def check_judge(pairs: list[dict], score: Callable[[list[list[dict]]], list[float]]) -> dict:
    """`judge_report` of pairs of `preferences`; `score` is `RewardModel.score`, of each answer after its prompt."""
    conversations = []
    for pair in pairs:
        prompt = pair["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        conversations += [[*turns, {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")]
    rewards = iter(score(conversations))
    return judge_report([{**pair, "rewards": (next(rewards), next(rewards))} for pair in pairs])


def judge_report(rows: list[dict]) -> dict:
    """How far rewards agree with known preferences, and with length.

    `rows`: pairs {"prompt", "chosen", "rejected"} with "rewards", of chosen and of rejected. Returns

    - "groups": {name: {"n", "ties", "agree", "share", "low", "high"}}: pairs, those of equal rewards, of the others
      those with the higher reward for chosen, also in per cent with the exact 95 % interval (Clopper and Pearson
      1934); None without such pairs. By name: "all"; the prompt's script; "longer", "like", "shorter", which chosen is
      beside rejected (a judge of length agrees with all and none); "two_scripts" where the answers' scripts differ.
    - "longer_preferred", "longer_chosen": in per cent of the pairs of unequal lengths and rewards, how often the
      longer answer has the higher reward, and how often it is the chosen one.
    - "length_explains": r squared, in per cent, of the differences in reward and in the logarithm of length, through
      the origin, as it must not matter which answer comes first; None without any.
    """
    groups: dict[str, list[float]] = {name: [] for name in TITLES}
    lengths = []
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        chosen, rejected = (max(1, len(row[side])) for side in ("chosen", "rejected"))
        is_like = abs(chosen - rejected) <= LIKE_LENGTH * max(chosen, rejected)
        names = ["all", main_script(prompt) or "no letters"]
        names += ["like" if is_like else "longer" if chosen > rejected else "shorter"]
        names += ["two_scripts"] * (main_script(row["chosen"]) != main_script(row["rejected"]))
        for name in names:
            groups.setdefault(name, []).append(row["rewards"][0] - row["rewards"][1])
        lengths.append(math.log(chosen / rejected))
    both = list(zip(groups["all"], lengths, strict=True))
    told = [(d, x) for d, x in both if d and x]
    squares = sum(d * d for d, _ in both) * sum(x * x for x in lengths)
    product = sum(d * x for d, x in both)
    order = [*TITLES, *sorted(groups.keys() - TITLES.keys())]
    return {
        "groups": {name: agreement(groups[name]) for name in order if groups[name]},
        "longer_preferred": 100 * sum(d * x > 0 for d, x in told) / len(told) if told else None,
        "longer_chosen": 100 * sum(x > 0 for _, x in told) / len(told) if told else None,
        "length_explains": 100 * product**2 / squares if squares else None,
    }


def agreement(differences: list[float]) -> dict:
    """A group of `judge_report`, of its reward differences."""
    from scipy.stats import binomtest

    told, agree = sum(d != 0 for d in differences), sum(d > 0 for d in differences)
    result = {"n": len(differences), "ties": len(differences) - told, "agree": agree}
    if not told:
        return {**result, "share": None, "low": None, "high": None}
    test = binomtest(agree, told)
    interval = test.proportion_ci(0.95, method="exact")
    return {**result, "share": 100 * test.statistic, "low": 100 * interval.low, "high": 100 * interval.high}


def judge_lines(report: dict) -> list[str]:
    """A report as lines to print."""
    width = max(len(TITLES.get(name, name)) for name in report["groups"])
    lines = [f"{'the judge agrees with':{width}}  share [95 % interval]        pairs  equal rewards"]
    for name, group in report["groups"].items():
        told = "-" if group["share"] is None else f"{group['share']:5.1f} % [{group['low']:.1f}, {group['high']:.1f}]"
        lines.append(f"{TITLES.get(name, name):{width}}  {told:22}  {group['n']:9}  {group['ties']:13}")
    preferred, chosen, explained = (report[key] for key in ("longer_preferred", "longer_chosen", "length_explains"))
    if preferred is not None:
        lines.append(f"the longer answer has the higher reward in {preferred:.1f} % and is chosen in {chosen:.1f} %")
    if explained is not None:
        lines.append(f"length explains {explained:.1f} % of the reward differences (r squared)")
    return lines
