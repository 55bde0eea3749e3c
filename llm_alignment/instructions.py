"""The 25 instructions of this project, in data/instructions.jsonl, and how many of their checks answers pass.

The share of checks passed is what can be compared with the published instruction scores, which are keyword rules over
25 other instructions. The reward model's score of the same answers is a measure of its own.
"""

from __future__ import annotations

import functools

from llm_alignment.checks import DATA, passed, read_questions
from llm_alignment.questions import sampled


@functools.cache
def instructions() -> dict[int, dict]:
    """The rows of the file by question_id."""
    return {row["question_id"]: row for row in read_questions(DATA / "instructions.jsonl")}


def instruct_questions(limit: int) -> list[dict]:
    """The instructions as `score_questions` takes them; `limit` > 0 takes a sample."""
    rows = sampled(list(instructions().values()), limit)
    return [{key: row[key] for key in ("question_id", "category", "turns")} for row in rows]


def checks_passed(row: dict) -> list[bool]:
    """For each check of the row's instruction, whether the answer passes it."""
    return passed(instructions()[row["question_id"]], row["answers"][0])
