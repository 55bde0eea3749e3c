"""What a DPO script measures: held-out pairs, TAT-QA, questions that the reward model scores, drift."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment import finance
from llm_alignment.drift import reference_drift
from llm_alignment.evaluation import Evaluation
from llm_alignment.generation import Decoding
from llm_alignment.leaks import asked_passages
from llm_alignment.prompts import PromptStyle
from llm_alignment.retention import RetentionSettings, retention_evaluations
from llm_alignment.rewards import load_reward_model
from llm_alignment.scores import scored_evaluation
from llm_alignment.tatqa import PromptContent, evaluation_questions, question_texts, tatqa_evaluation, tatqa_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class MeasuringSettings:
    """What a DPO script measures, and how: the flags of that name."""

    do_eval: bool
    tatqa_dir: str
    eval_split: str
    eval_limit: int
    eval_max_new_tokens: int
    eval_temperature: float
    eval_top_p: float
    eval_batch_size: int
    mtbench_max_tokens: int
    instruct_max_tokens: int
    max_length: int
    seed: int
    reward_model: str
    trust_remote_code: bool
    dry_run: bool
    reddit_max_tokens: int = 0  # where Reddit posts are asked

    @functools.cached_property
    def tatqa(self) -> Path | None:
        """The file of TAT-QA's questions; None when they are not asked."""
        return tatqa_file(self.tatqa_dir, self.eval_split) if self.do_eval else None


def dpo_evaluations(
    tokenizer: PreTrainedTokenizerBase,
    settings: MeasuringSettings,
    style: PromptStyle,
    content: PromptContent,
    *,
    asked: dict[str, list[dict]],
    held_out: Sequence[Evaluation] = (),
) -> list[Evaluation]:
    """`held_out`, TAT-QA from a file, what is `asked`, and the drift on the reference answers of these.

    `content`: of TAT-QA's prompts. `asked`: {name in EVALUATIONS: questions}.
    """
    evaluations = [*held_out]
    if settings.tatqa:
        questions = evaluation_questions(
            settings.tatqa, tokenizer, style, content, limit=settings.eval_limit, seed=settings.seed
        )
        decoding = Decoding(
            max_new_tokens=settings.eval_max_new_tokens,
            temperature=settings.eval_temperature,
            top_p=settings.eval_top_p,
            seed=settings.seed,
            batch_size=settings.eval_batch_size,
        )
        evaluations.append(tatqa_evaluation(questions, decoding, style))
    max_new_tokens = {
        "mtbench": settings.mtbench_max_tokens,
        "instruct": settings.instruct_max_tokens,
        "finance_instruct": settings.instruct_max_tokens,
        "reddit": settings.reddit_max_tokens,
    }
    asked = {name: questions for name, questions in asked.items() if questions}
    if asked:
        reward_model = load_reward_model(
            settings.reward_model,
            settings.eval_batch_size,
            trust_remote_code=settings.trust_remote_code,
            on_meta=settings.dry_run,
        )
    for name, questions in asked.items():
        decoding = Decoding(
            max_new_tokens=max_new_tokens[name],
            seed=settings.seed,
            thinking=style.thinking,
            batch_size=settings.eval_batch_size,
        )
        evaluations.append(scored_evaluation(name, questions, decoding, reward_model))
    return evaluations + reference_drift(tokenizer, evaluations, style, settings.max_length)


def data_and_evaluations(
    tokenizer: PreTrainedTokenizerBase,
    sources: set[str],
    mtbench: list[list[dict]],
    *,
    data: finance.DataSettings,
    measuring: MeasuringSettings,
    style: PromptStyle,
    content: PromptContent,
    retention: RetentionSettings,
) -> tuple[finance.TrainingData, list[Evaluation]]:
    """The rows of the finance scripts' `sources` without what is asked, and what is measured.

    `mtbench`: all the questions, none of which may be trained on, and those that are asked.
    """
    all_questions, asked = mtbench
    kept = retention.questions()
    rows = finance.load_data(
        data,
        sources,
        {
            "MT-Bench question": [question["turns"][0] for question in all_questions],
            "retention question": [row["turns"][-1] for row in kept],
            "TAT-QA question": question_texts(measuring.tatqa) if measuring.tatqa else [],
        },
        {"MT-Bench question": asked_passages(all_questions)},
    )
    both = {name: rows.questions.get(name, []) for name in ("finance_instruct", "reddit")}
    evaluations = dpo_evaluations(tokenizer, measuring, style, content, asked={"mtbench": asked} | both)
    return rows, evaluations + retention_evaluations(kept, retention)
