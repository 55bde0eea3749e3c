"""What a DPO script measures: held-out pairs, TAT-QA, questions that the reward model scores, drift, retention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment import tatqa
from llm_alignment.drift import reference_drift
from llm_alignment.evaluation import Evaluation
from llm_alignment.generation import Decoding
from llm_alignment.leaks import forbidden_texts
from llm_alignment.prompts import PromptStyle
from llm_alignment.retention import RetentionSettings, retention_evaluations
from llm_alignment.rewards import load_reward_model
from llm_alignment.scores import scored_evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class MeasuringSettings:
    """What a DPO script measures, and how: the flags of that name."""

    style: PromptStyle
    content: tatqa.PromptContent
    retention: RetentionSettings
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
    def tatqa_file(self) -> Path | None:
        """The file of TAT-QA's questions; None when they are not asked."""
        return tatqa.tatqa_file(self.tatqa_dir, self.eval_split) if self.do_eval else None

    def forbidden(self, mtbench: list[dict]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """What may not be trained on, as LeakFinder takes it; `mtbench`: all the questions of MT-Bench."""
        kept = self.retention.questions()
        whole, passages = forbidden_texts({"MT-Bench question": mtbench, "retention question": kept})
        whole["TAT-QA question"] = tatqa.question_texts(self.tatqa_file) if self.tatqa_file else []
        return whole, passages


def dpo_evaluations(
    tokenizer: PreTrainedTokenizerBase,
    settings: MeasuringSettings,
    asked: dict[str, list[dict]],
    held_out: Sequence[Evaluation] = (),
) -> list[Evaluation]:
    """`held_out`, TAT-QA from a file, what is `asked`, the drift on the reference answers of these, retention.

    `asked`: {name in EVALUATIONS: questions}.
    """
    evaluations, style = [*held_out], settings.style
    decoding = functools.partial(Decoding, seed=settings.seed, batch_size=settings.eval_batch_size)
    if settings.tatqa_file:
        questions = tatqa.evaluation_questions(
            settings.tatqa_file, tokenizer, style, settings.content, limit=settings.eval_limit
        )
        how = decoding(settings.eval_max_new_tokens, settings.eval_temperature, settings.eval_top_p)
        evaluations.append(tatqa.tatqa_evaluation(questions, how, style))
    asked = {name: questions for name, questions in asked.items() if questions}
    if asked:
        reward_model = load_reward_model(
            settings.reward_model,
            settings.eval_batch_size,
            trust_remote_code=settings.trust_remote_code,
            on_meta=settings.dry_run,
        )
    tokens = {"mtbench": settings.mtbench_max_tokens, "reddit": settings.reddit_max_tokens}
    for name, questions in asked.items():
        how = decoding(tokens.get(name, settings.instruct_max_tokens), thinking=style.thinking)
        evaluations.append(scored_evaluation(name, questions, how, reward_model))
    evaluations += reference_drift(tokenizer, evaluations, style, settings.max_length)
    return evaluations + retention_evaluations(settings.retention.questions(), settings.retention)
