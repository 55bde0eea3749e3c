"""What a DPO script measures, and one DPO run on one list of pairs: load, measure, train, measure, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_alignment import adapters, dpo, models, plans, tatqa, training
from llm_alignment.card import write_card
from llm_alignment.drift import reference_drift
from llm_alignment.evaluation import Evaluation, Rows, asked_gates, judge_gates, measure, report, save_answers
from llm_alignment.generation import Decoding
from llm_alignment.leaks import forbidden_texts
from llm_alignment.processes import main_process
from llm_alignment.prompts import PromptStyle
from llm_alignment.retention import RetentionSettings, retention_evaluations, with_own_drift
from llm_alignment.rewards import load_reward_model
from llm_alignment.runs import begin, timed
from llm_alignment.scores import scored_evaluation
from llm_alignment.training import DpoSettings, Setup, TrainingSettings


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """How the pairs are trained on, and the flags of that name."""

    training: TrainingSettings
    dpo: DpoSettings
    exp_log: str
    dry_run: bool
    no_train: bool
    load_adapter: str
    adapter_trainable: bool
    eval_baseline: bool
    no_baseline_cache: bool
    eval_save_json: str
    gates: str
    time: bool
    thinking: bool


def run_dpo(
    record: dict, setup: Setup, rows: list[dict], evaluations: list[Evaluation], data: dict, flags: RunFlags
) -> None:
    """Runs it, or prints its plan. `rows` are the pairs of `fit_pairs`, `data` their fingerprint.

    What can be wrong with the input is found before anything is written.
    """
    is_continued = flags.adapter_trainable and not flags.no_train  # such an adapter is its own baseline
    gates = asked_gates(flags.gates, evaluations, own_drift=not is_continued)
    if flags.dry_run:
        plans.print_dpo_plan(setup, rows, evaluations, flags.training, flags.dpo)
        plans.log_gates(gates, Path(flags.exp_log), setup.base.name)
    if flags.dry_run and (flags.no_train or not flags.time):
        return
    checkpoint = training.newest_complete(setup.folder, setup.resume)
    model = models.load_model(setup.base)
    models.check_head(model, setup.base.what)
    if flags.load_adapter:
        model = adapters.load_adapter(model, flags.load_adapter, trainable=flags.adapter_trainable)
    trainer = None if flags.no_train else dpo.build_trainer(model, setup, rows, flags.training, flags.dpo)
    if flags.dry_run and trainer:
        steps = training.optimiser_steps(flags.training, len(rows))
        plans.log_times(trainer, steps, [(evaluation, 2) for evaluation in evaluations])
        return
    folder = begin(record, data, setup.base)
    fingerprint = models.base_fingerprint(setup.base, thinking=flags.thinking)
    of_base: dict[str, Any] = {"fingerprint": fingerprint, "use_cache": not flags.no_baseline_cache}
    measured: Any = functools.partial(measure, trainer.model if trainer else model, setup.tokenizer, **of_base)
    done = {"baseline": flags.eval_baseline, "train": trainer, "final": trainer or flags.load_adapter}
    phase = functools.partial(timed, record, phases=[name for name, is_done in done.items() if is_done])
    before, after = Rows(), Rows()
    if flags.eval_baseline:
        with phase("baseline"):
            before = measured(evaluations, (folder, "baseline"), with_adapter=is_continued)
        if not is_continued:
            evaluations = with_own_drift(evaluations, before, setup.tokenizer, thinking=flags.thinking)
    if trainer:
        with phase("train"):
            dpo.train(trainer, checkpoint, folder, **of_base)
        record["kept_step"] = trainer.state.global_step
    if trainer or flags.load_adapter:
        with phase("final"):
            after = measured(evaluations, (folder, "final"), with_adapter=True)
    if main_process():
        report(record, folder, evaluations, before, after)
        save_answers(flags.eval_save_json, before, after)
        if trainer:
            write_card(folder)
        judge_gates(record, gates)


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
    """`held_out`, TAT-QA from a file, what is `asked`, {name in EVALUATIONS: questions}, the drift on the reference
    answers of these, retention."""
    evaluations, style = [*held_out], settings.style
    decoding = functools.partial(Decoding, seed=settings.seed, batch_size=settings.eval_batch_size)
    if settings.tatqa_file:
        path, content = settings.tatqa_file, settings.content
        questions = tatqa.evaluation_questions(path, tokenizer, style, content, settings.eval_limit)
        how = decoding(settings.eval_max_new_tokens, settings.eval_temperature, settings.eval_top_p)
        evaluations.append(tatqa.tatqa_evaluation(questions, how, style))
    tokens = {"mtbench": settings.mtbench_max_tokens, "reddit": settings.reddit_max_tokens}
    reward_model = functools.cache(load_reward_model)
    flags = settings.reward_model, settings.eval_batch_size, settings.trust_remote_code, settings.dry_run
    for name, questions in asked.items():
        how = decoding(tokens.get(name, settings.instruct_max_tokens), thinking=style.thinking)
        if questions:
            evaluations.append(scored_evaluation(name, questions, how, reward_model(*flags)))
    evaluations += reference_drift(tokenizer, evaluations, style, settings.max_length)
    return evaluations + retention_evaluations(settings.retention.questions(), settings.retention)
