"""What a DPO script measures: held-out pairs, TAT-QA, questions that the reward model scores, drift."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment import finance
from llm_alignment.drift import reference_drift
from llm_alignment.evaluation import Evaluation
from llm_alignment.flags import fill
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
    """How a DPO script measures: the flags of that name."""

    eval_limit: int
    eval_max_new_tokens: int
    eval_temperature: float
    eval_top_p: float
    eval_batch_size: int
    max_length: int
    seed: int
    reward_model: str
    trust_remote_code: bool
    dry_run: bool


def dpo_evaluations(
    tokenizer: PreTrainedTokenizerBase,
    settings: MeasuringSettings,
    style: PromptStyle,
    *,
    tatqa: tuple[Path, PromptContent] | None,
    asked: dict[str, tuple[list[dict], int]],
    held_out: Sequence[Evaluation] = (),
) -> list[Evaluation]:
    """`held_out`, TAT-QA from a file, what is `asked`, and the drift on the reference answers of these.

    `asked`: {name in EVALUATIONS: (questions, new tokens of an answer)}.
    """
    evaluations = [*held_out]
    if tatqa:
        file, content = tatqa
        questions = evaluation_questions(
            file, tokenizer, style, content, limit=settings.eval_limit, seed=settings.seed
        )
        decoding = Decoding(
            max_new_tokens=settings.eval_max_new_tokens,
            temperature=settings.eval_temperature,
            top_p=settings.eval_top_p,
            seed=settings.seed,
            batch_size=settings.eval_batch_size,
        )
        evaluations.append(tatqa_evaluation(questions, decoding, style))
    asked = {name: (questions, tokens) for name, (questions, tokens) in asked.items() if questions}
    if asked:
        reward_model = load_reward_model(
            settings.reward_model,
            settings.eval_batch_size,
            trust_remote_code=settings.trust_remote_code,
            on_meta=settings.dry_run,
        )
    for name, (questions, max_new_tokens) in asked.items():
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            seed=settings.seed,
            thinking=style.thinking,
            batch_size=settings.eval_batch_size,
        )
        evaluations.append(scored_evaluation(name, questions, decoding, reward_model))
    return evaluations + reference_drift(tokenizer, evaluations, style, settings.max_length)


def data_and_evaluations(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, sources: set[str], mtbench: list[list[dict]]
) -> tuple[finance.TrainingData, list[Evaluation]]:
    """The rows of the finance scripts' `sources` without what is asked, and what is measured.

    `mtbench`: all the questions, none of which may be trained on, and those that are asked.
    """
    tatqa = (tatqa_file(args.tatqa_dir, args.eval_split), fill(PromptContent, args)) if args.do_eval else None
    all_questions, asked = mtbench
    retention = fill(RetentionSettings, args)
    kept = retention.questions()
    data = finance.load_data(
        fill(finance.DataSettings, args),
        sources,
        {
            "MT-Bench question": [question["turns"][0] for question in all_questions],
            "retention question": [row["turns"][-1] for row in kept],
            "TAT-QA question": question_texts(tatqa[0]) if tatqa else [],
        },
        {"MT-Bench question": asked_passages(all_questions)},
    )
    evaluations = dpo_evaluations(
        tokenizer,
        fill(MeasuringSettings, args),
        fill(PromptStyle, args),
        tatqa=tatqa,
        asked={
            "mtbench": (asked, args.mtbench_max_tokens),
            "finance_instruct": (data.questions.get("finance_instruct", []), args.instruct_max_tokens),
            "reddit": (data.questions.get("reddit", []), args.reddit_max_tokens),
        },
    )
    return data, evaluations + retention_evaluations(kept, retention)
