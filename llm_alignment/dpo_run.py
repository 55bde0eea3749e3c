"""One DPO run on one list of pairs: load, measure, train, measure, report."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment import adapters, dpo, models, plans, training
from llm_alignment.card import write_card
from llm_alignment.evaluation import Evaluation, asked_gates, judge_gates, measure, report, save_answers
from llm_alignment.processes import main_process
from llm_alignment.retention import with_own_drift
from llm_alignment.runs import begin, phases

if TYPE_CHECKING:
    from llm_alignment.training import Setup, TrainingSettings


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The flags of that name."""

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
    record: dict,
    setup: Setup,
    rows: list[dict],
    evaluations: list[Evaluation],
    data: dict,
    settings: TrainingSettings,
    dpo_settings: dpo.DpoSettings,
    flags: RunFlags,
) -> None:
    """Runs it, or prints its plan. `rows` are the pairs of `fit_pairs`, `data` their fingerprint.

    What can be wrong with the input is found before anything is written.
    """
    is_continued = flags.adapter_trainable and not flags.no_train  # such an adapter is its own baseline
    gates = asked_gates(flags.gates, evaluations, own_drift=not is_continued)
    if flags.dry_run:
        plans.print_dpo_plan(setup, rows, evaluations, settings, dpo_settings)
        plans.log_gates(gates, Path(flags.exp_log), setup.base.name)
    if flags.dry_run and (flags.no_train or not flags.time):
        return
    checkpoint = training.newest_complete(setup.folder, setup.resume)
    model = models.load_model(setup.base)
    models.check_head(model, setup.base.what)
    if flags.load_adapter:
        model = adapters.load_adapter(model, flags.load_adapter, trainable=flags.adapter_trainable)
    trainer = None if flags.no_train else dpo.build_trainer(model, setup, rows, settings, dpo_settings)
    if flags.dry_run and trainer:
        steps = training.optimiser_steps(settings, len(rows))
        plans.log_times(trainer, steps, [(evaluation, 2) for evaluation in evaluations])
        return
    folder = begin(record, data, setup.base)
    fingerprint, use_cache = models.base_fingerprint(setup.base, thinking=flags.thinking), not flags.no_baseline_cache
    measured = functools.partial(
        measure, trainer.model if trainer else model, setup.tokenizer, fingerprint=fingerprint, use_cache=use_cache
    )
    done = {"baseline": flags.eval_baseline, "train": trainer, "final": trainer or flags.load_adapter}
    phase = phases(record, *(name for name, is_done in done.items() if is_done))
    before: dict[str, list[dict]] = {}
    after: dict[str, list[dict]] = {}
    if flags.eval_baseline:
        with phase("baseline"):
            before = measured(evaluations, (folder, "baseline"), with_adapter=is_continued)
        if not is_continued:
            evaluations = with_own_drift(evaluations, before, setup.tokenizer, thinking=flags.thinking)
    if trainer:
        with phase("train"):
            dpo.train(trainer, checkpoint, folder, fingerprint=fingerprint, use_cache=use_cache)
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
