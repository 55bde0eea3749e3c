"""Retention: what could the base do that the tuned model cannot? Questions with checks, drift on its own answers."""

from __future__ import annotations

import dataclasses
import operator
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.checks import DATA, passed, read_checked, sampled
from llm_alignment.evaluation import Evaluation, Rows, pair_rows, values_of
from llm_alignment.files import digest
from llm_alignment.prompts import PromptStyle, render
from llm_alignment.scores import answered_evaluation, conversation
from llm_alignment.stats import in_per_cent, mcnemar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class RetentionSettings:
    """The flags of that name."""

    do_retention: bool
    retention_file: str
    retention_limit: int
    retention_max_tokens: int
    eval_batch_size: int
    thinking: bool

    def questions(self) -> list[dict]:
        """All questions of the file, none of which may be trained on; [] with --no-do_retention."""
        file = DATA / "retention.jsonl" if self.retention_file == "auto" else Path(self.retention_file)
        return read_checked(file) if self.do_retention else []


def retention_evaluations(questions: list[dict], settings: RetentionSettings) -> list[Evaluation]:
    """The share of the questions, or of --retention_limit of them, with all checks passed; [] without questions."""
    from llm_alignment.generation import Decoding

    if not questions:
        return []
    questions = sampled(questions, settings.retention_limit)
    by_id = {row["question_id"]: row for row in questions}

    def graded(rows: list[dict]) -> list[dict]:
        """With "checks": for each check whether the last answer passes it, and "right": whether all do."""
        checks = [passed(by_id[row["question_id"]], row["answers"][-1]) for row in rows]
        return [{**row, "checks": found, "right": all(found)} for row, found in zip(rows, checks, strict=True)]

    kept = ("question_id", "category", "language", "turns", "reference")
    decoding = Decoding(settings.retention_max_tokens, thinking=settings.thinking, batch_size=settings.eval_batch_size)
    return [answered_evaluation(
        "retention", questions, decoding, grade=graded, summarise=summarise_retention, compare=compare_retention,
        items=[{key: row[key] for key in kept if key in row} for row in questions],
        settings={"questions": digest(questions), "generation": decoding.settings("max_new_tokens", "thinking")},
    )]  # fmt: skip


def summarise_retention(rows: list[dict]) -> dict:
    """{"retention": {"right": per cent of the questions, "n", "by_type": {category or language: {"right"}}}}."""

    def share(rows: list[dict]) -> dict:
        return {"right": 100 * statistics.fmean(row["right"] for row in rows)}

    return {"retention": {**share(rows), "n": len(rows), "by_type": by_kind(rows, rows, share)}}


def by_kind(
    rows: list[dict], items: list, figure: Callable[[list], dict], keys: Sequence[str] = ("language", "category")
) -> dict[str, dict]:
    """{kind: `figure` of the items whose rows have it at one of `keys`}: the kinds at the first key come first."""
    both = list(zip(rows, items, strict=True))
    kinds = [kind for key in keys for kind in sorted({row[key] for row in rows if row.get(key)})]
    return {kind: figure([item for row, item in both if kind in map(row.get, keys)]) for kind in kinds}


def compare_retention(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """The difference in points by the exact McNemar test, also by language and category, with "lost" and "gained".
    Lost: right before and wrong after (arXiv 2510.17776 calls it 1->0); gained: the other way round."""

    def difference(pairs: list[tuple[dict, dict]]) -> dict:
        sides = values_of(pairs, operator.itemgetter("right"))
        changes = [*zip(*sides, strict=True)]
        lost, gained = changes.count((True, False)), changes.count((False, True))
        return {**in_per_cent(mcnemar(*sides)), "lost": lost, "gained": gained}

    pairs = pair_rows(before, after)
    by_type = by_kind([new for _, new in pairs], pairs, difference)
    return {"retention": {**difference(pairs), "by_type": by_type}}


def with_own_drift(
    evaluations: list[Evaluation], before: Rows, tokenizer: PreTrainedTokenizerBase, *, thinking: bool
) -> list[Evaluation]:
    """The evaluations with the drift on the base's own greedy answers to the retention questions, and its rows of the
    base in `before`, the rows of the base; nothing is added where these have no such answers. Forward
    KL(p_base || p_tuned) over the tokens of each last answer, unless it is empty, and its end of turn."""
    from llm_alignment.drift import drift_evaluation, reference_row

    style, items = PromptStyle(thinking=thinking), []
    for row in before.get("retention", []):
        prompt = render(conversation(row, len(row["turns"]) - 1), tokenizer, style)
        end = tokenizer.eos_token if row["finished"][-1] else ""
        encoded = reference_row(tokenizer, prompt, row["answers"][-1] + end, 10**6)
        if row["answers"][-1] and encoded:
            items.append({"question_id": row["question_id"], "cluster": row["question_id"], **encoded})
    if not items:
        return evaluations
    own_drift = drift_evaluation(items, "own_drift")
    before["own_drift"] = [*map(own_drift.of_base, items)]  # type: ignore[arg-type]  # it has one
    return [*evaluations, own_drift]
