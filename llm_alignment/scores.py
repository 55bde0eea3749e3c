"""What answers that the reward model scored add up to: a summary, and the differences between two measurements."""

from __future__ import annotations

import statistics

from llm_alignment.evaluation import pair_rows
from llm_alignment.files import InputError
from llm_alignment.instructions import check_rate, checks_passed
from llm_alignment.stats import equal_length_delta, in_per_cent, mcnemar, paired_delta


def summarise(rows: list[dict]) -> dict:
    """Averages over questions (a question counts as the mean of its turns), overall, per turn and per category.

    `answer_tokens` is the mean length of an answer, `unfinished` the share of answers cut by the token limit,
    `batch_sizes` the numbers of answers that were to be generated at once.
    """
    mean = statistics.fmean
    categories = sorted({row["category"] for row in rows})
    turns = range(max(len(row["turns"]) for row in rows))
    return {
        "avg": mean(mean(row["scores"]) for row in rows),
        "avg_logged": mean(mean(row["scores_logged"]) for row in rows),
        "raw_mean": mean(mean(row["rewards"]) for row in rows),
        "by_turn": [mean(row["scores"][turn] for row in rows if turn < len(row["turns"])) for turn in turns],
        "by_category": {
            category: mean(mean(row["scores"]) for row in rows if row["category"] == category)
            for category in categories
        },
        "n": len(rows),
        "answer_tokens": mean(tokens for row in rows for tokens in row["answer_tokens"]),
        "unfinished": mean(not finished for row in rows for finished in row["finished"]),
        # older files do not have them
        "batch_sizes": sorted({size for row in rows for size in row.get("batch_sizes", [])}),
    }


def compare_rows(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Paired differences over the questions on both sides; a question counts as the mean of its turns.

    {"score": 1-10, "raw": raw reward, "length": new tokens of an answer, "equal_length": the difference in score that
    is left at equal length}. Raises InputError when no question is on both sides, or other turns under one id.
    """
    pairs = pair_rows(before, after)
    if any(old["turns"] != new["turns"] for old, new in pairs):
        raise InputError("the two evaluations asked different questions; compare files of one question set")
    mean = statistics.fmean
    sides = {
        name: [[mean(row[key]) for row in side] for side in zip(*pairs, strict=True)]
        for name, key in (("score", "scores"), ("raw", "rewards"), ("length", "answer_tokens"))
    }
    change, longer = ([new - old for old, new in zip(*sides[name], strict=True)] for name in ("score", "length"))
    deltas = {name: paired_delta(*values) for name, values in sides.items()}
    return {**deltas, "equal_length": equal_length_delta(change, longer)}


def compare_scored(name: str, before: list[dict], after: list[dict]) -> dict[str, dict]:
    """`compare_rows` by the names of METRICS, with the differences in success and in checks passed, in points."""
    deltas = compare_rows(before, after)
    named = {f"{name}_{key}": deltas[key] for key in ("equal_length", "raw", "length")}
    sides = list(zip(*pair_rows(before, after), strict=True))
    if name in ("instruct", "finance_instruct"):
        named[f"{name}_success"] = in_per_cent(mcnemar(*([row["scores"][0] >= 7 for row in side] for side in sides)))
    if name == "instruct":
        passed = [[check for row in side for check in checks_passed(row)] for side in sides]
        instruction = [row["question_id"] for row in sides[0] for _ in checks_passed(row)]
        named[f"{name}_checks"] = in_per_cent(mcnemar(*passed, clusters=instruction))
    return {name: deltas["score"], **named}


def summarise_scored(name: str, rows: list[dict]) -> dict[str, dict]:
    """{name: `summarise`}; for instructions with the shares, in per cent, of scores of 7 or more and checks passed."""
    summary = summarise(rows)
    if name in ("instruct", "finance_instruct"):
        summary["success_rate"] = 100 * statistics.fmean(row["scores"][0] >= 7 for row in rows)
    if name == "instruct":
        summary["check_rate"] = check_rate(rows)
    return {name: summary}
