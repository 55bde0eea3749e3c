"""Retention: what could the base do that the tuned model cannot? Questions with checks, drift on its own answers."""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.checks import DATA, passed, read_questions
from llm_alignment.evaluation import Evaluation, pair_rows
from llm_alignment.files import digest
from llm_alignment.prompts import PromptStyle, render
from llm_alignment.scores import answer_questions, conversation_tokens
from llm_alignment.stats import in_per_cent, mcnemar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger("llm_alignment")


@dataclasses.dataclass(frozen=True)
class RetentionSettings:
    """The flags of that name."""

    do_retention: bool
    retention_file: str
    retention_limit: int
    retention_max_tokens: int
    seed: int
    eval_batch_size: int
    thinking: bool

    def questions(self) -> list[dict]:
        """All questions of the file, none of which may be trained on; [] with --no-do_retention."""
        file = DATA / "retention.jsonl" if self.retention_file == "auto" else Path(self.retention_file)
        return read_questions(file) if self.do_retention else []


def retention_evaluations(questions: list[dict], settings: RetentionSettings) -> list[Evaluation]:
    """The share of the questions, or of --retention_limit of them, with all checks passed; [] without questions."""
    from llm_alignment.generation import MAX_BATCH_SIZE, Decoding

    if not questions:
        return []
    limit = settings.retention_limit
    if 0 < limit < len(questions):
        places = sorted(random.Random(settings.seed).sample(range(len(questions)), limit))
        questions = [questions[place] for place in places]
    decoding = Decoding(
        max_new_tokens=settings.retention_max_tokens, batch_size=settings.eval_batch_size, thinking=settings.thinking
    )
    evaluation = Evaluation(
        name="retention",
        items=[{key: row[key] for key in KEPT if key in row} for row in questions],
        read=functools.partial(answer_questions, decoding=decoding),
        grade=functools.partial(graded, {row["question_id"]: row for row in questions}),
        settings={"questions": digest(questions), "generation": decoding.settings("max_new_tokens", "thinking")},
        order=lambda question: sum(map(len, question["turns"])),
        rows_at_once=lambda model: decoding.batch_size or MAX_BATCH_SIZE[model.device.type],
        summarise=summarise_retention,
        compare=compare_retention,
        tokens=functools.partial(conversation_tokens, questions, decoding.max_new_tokens),
    )
    return [evaluation]


KEPT = ("question_id", "category", "language", "turns", "reference")


def graded(questions: dict[str | int, dict], rows: list[dict]) -> list[dict]:
    """The rows with "checks": for each check whether the last answer passes it, and "right": whether all do."""
    checks = [passed(questions[row["question_id"]], row["answers"][-1]) for row in rows]
    return [{**row, "checks": found, "right": all(found)} for row, found in zip(rows, checks, strict=True)]


def summarise_retention(rows: list[dict]) -> dict:
    """{"retention": {"right": per cent of the questions, "n", "by_type": {category or language: {"right"}}}}."""

    def share(rows: list[dict]) -> float:
        return 100 * statistics.fmean(row["right"] for row in rows)

    by_type = {kind: {"right": share([row for row in rows if kind in kinds_of(row)])} for kind in all_kinds(rows)}
    return {"retention": {"right": share(rows), "n": len(rows), "by_type": by_type}}


def kinds_of(row: dict) -> list[str]:
    """What a question is counted under besides all: its language and its category."""
    return [row[key] for key in ("language", "category") if row.get(key)]


def all_kinds(rows: list[dict]) -> list[str]:
    """The languages, then the categories."""
    return [kind for key in ("language", "category") for kind in sorted({row[key] for row in rows if row.get(key)})]


def compare_retention(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """The difference in points by the exact McNemar test, also by language and category, with "lost" and "gained".

    Lost: right before and wrong after (arXiv 2510.17776 calls it 1->0); gained: the other way round.
    """
    pairs = pair_rows(before, after)

    def difference(kind: str | None = None) -> dict:
        sides = [(old["right"], new["right"]) for old, new in pairs if kind is None or kind in kinds_of(new)]
        lost, gained = sides.count((True, False)), sides.count((False, True))
        return {**in_per_cent(mcnemar(*zip(*sides, strict=True))), "lost": lost, "gained": gained}

    kinds = all_kinds([new for _, new in pairs])
    return {"retention": {**difference(), "by_type": {kind: difference(kind) for kind in kinds}}}


def drift_on_own_answers(tokenizer: PreTrainedTokenizerBase, rows: list[dict], *, thinking: bool) -> Evaluation | None:
    """The drift on the base's own greedy answers to the retention questions, whose `rows` these are; None without any.

    Forward KL(p_base || p_tuned) over the tokens of each last answer and its end of turn: the same measure in every
    script. An answer that is empty is left out.
    """
    from llm_alignment.drift import drift_evaluation, reference_row

    style, items = PromptStyle(thinking=thinking), []
    for row in rows:
        chat = [{"role": "user", "content": row["turns"][0]}]
        for answer, question in zip(row["answers"], row["turns"][1:], strict=False):
            chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        end = tokenizer.eos_token if row["finished"][-1] else ""
        encoded = reference_row(tokenizer, render(chat, tokenizer, style), row["answers"][-1] + end, 10**6)
        if row["answers"][-1] and encoded:
            items.append({"question_id": row["question_id"], "cluster": row["question_id"], **encoded})
    return drift_evaluation(items, "own_drift") if items else None


def with_own_drift(
    evaluations: list[Evaluation], before: dict[str, list[dict]], tokenizer: PreTrainedTokenizerBase, *, thinking: bool
) -> list[Evaluation]:
    """The evaluations with the drift on the base's own answers, whose rows of the base are put into `before`.

    `before` are the rows of the base; without those of the retention questions nothing is added.
    """
    drift = drift_on_own_answers(tokenizer, before.get("retention", []), thinking=thinking)
    if drift is None or drift.of_base is None:
        return evaluations
    before["own_drift"] = [drift.of_base(item) for item in drift.items]
    return [*evaluations, drift]
