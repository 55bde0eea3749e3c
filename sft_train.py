"""Teach a Qwen3 model Russian by SFT on T-Wix with LoRA, and hold it near its base by a KL anchor.

    L = NLL + c(t) * KL(p_student || p_reference)

The reference is the same model with its adapter switched off, so there is no second model. The loss and its gradient
are computed over chunks of rows, so full-size logits never exist. The model is measured before and after: validation
loss and perplexity on the same rows, and MT-Bench answers scored by a reward model, each difference with its interval.

    poetry run python sft_train.py --output_dir qwen3_sft --subset both --mix_reasoning_ratio 0.2
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment import flags
from llm_alignment.anchored_loss import AnchorSettings, fused_nll_kl  # noqa: F401 - the loss is part of this script
from llm_alignment.card import write_card
from llm_alignment.encoder import ChatEncoder
from llm_alignment.evaluation import METRICS, Evaluation, Rows, asked_gates, judge_gates, measure, report
from llm_alignment.files import digest, log
from llm_alignment.flags import add_group, fill, not_negative, positive, ratio, seed, steps_or_share
from llm_alignment.leaks import LeakFinder, forbidden_texts
from llm_alignment.plots import save_curves, with_validation
from llm_alignment.processes import main_process
from llm_alignment.replay import ReplaySettings, given_dialogues, own_dialogues, replay_rows
from llm_alignment.retention import RetentionSettings, retention_evaluations, with_own_drift
from llm_alignment.runs import begin, recorded_run, timed
from mtbench_eval import load_questions, mtbench_evaluations, sample_questions

# torch and its family take ten seconds to import, so functions import them: --help and a wrong flag answer at once.
if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llm_alignment.sft import EarlyStopping
    from llm_alignment.training import Setup
    from llm_alignment.twix import Selection

# enough to forget without the anchor: rerun with --kl_coef 0 and compare
DEMO = flags.DEMO | dict(
    dataset=str(flags.DEMO_DIR / "twix.jsonl"), mtbench_ru=str(flags.DEMO_DIR / "mt_bench_ru.jsonl"),
    output_dir="demo_sft", batch=16, grad_acc=1, sample_ratio=1.0, epochs=0.8, val_split=0.03, max_seq_length=256,
    learning_rate=5e-3, warmup_ratio=0.05, lora_dropout=0.0, target_modules="all-linear", kl_coef=0.5,
    kl_warmup_steps=0, kl_log_interval=5, mtbench_max_tokens=24,
)  # fmt: skip


# fmt: off
def build_parser() -> flags.Parser:
    """The command line. Defaults are those of the published runs where they had one."""
    parser = flags.Parser("sft_train.py", __doc__, "demo model dataset output_dir epochs batch grad_acc learning_rate "
        "lora_r max_seq_length sample_ratio kl_coef dry_run resume_from_checkpoint")
    flags.add_training_flags(parser, "experiments/sft_experiments.jsonl")
    add = add_group(parser, "data", trains=True)
    add("--dataset", default="t-tech/T-Wix", help="hub id, file or folder of rows: messages, prompt and "
        "completion, instruction and output, or conversations")
    add("--subset", choices=["general", "reasoning", "both"], default="general",
        help="rows to use; one that names no subset is general")
    add("--val_split", type=ratio, default=0.01, help="share of the prompts held out for validation, at least one; "
        "without it, of a local --dataset, a tenth; of 300 prompts 30, of 3,000 and more one in 100")
    add("--streaming", action="store_true", help="read rows as they are needed, never all in memory")
    add("--max_seq_length", type=positive(int), default=1024, help="tokens that an example is cut to")
    add("--packing", action="store_true", help="fill sequences with several examples; none sees another")
    add("--sample_ratio", type=ratio, default=0.25, help="share of the rows to use, by hash; of a local --dataset all")
    add("--sample_seed", type=seed, default=42, help="seed of the sample and of the validation split")
    add("--mix_reasoning_ratio", type=ratio, default=None, help="share of reasoning rows, with --subset both")
    add("--assistant_only_loss", action="store_true", help="train on answers and their end of turn alone")
    add("--warmup_ratio", type=ratio, default=0.1, help="share of the steps in which the learning rate rises")
    add = add_group(parser, "loss", trains=True)
    add("--sft_loss", choices=["nll", "dft"], default="nll",
        help="dft weights each token's NLL by its probability; with forward KL this is ASFT")
    add("--kl_coef", type=not_negative(float), default=0.02, help="weight of the KL anchor, 0 = off; raise it if "
        "MT-Bench, retention or drift gets worse, lower it if the validation loss stops falling")
    add("--kl_start_step", type=steps_or_share, default=0, help="first step of the anchor; below 1 a share of all")
    add("--kl_warmup_steps", type=steps_or_share, default=300, help="steps to its full weight; below 1 a share of all")
    add("--kl_limit_seq", type=not_negative(int), default=0,
        help="the anchor acts on the last N target tokens of each example; 0 = all")
    add("--kl_direction", choices=["reverse", "forward"], default="reverse",
        help="reverse: KL(student || reference); forward: KL(reference || student)")
    add("--kl_on", choices=["all", "replay"], default="all", help="replay: the anchor acts on replay rows alone")
    add = add_group(parser, "replay", trains=True)
    add("--replay_ratio", type=ratio, default=0.0,
        help="share of training rows that are general dialogues, 0 = none; raise it if retention gets worse")
    add("--replay", default="self", metavar="self|FILE",
        help="self: the base writes them; or rows as in --dataset, which get no --system_prompt")
    add = add_group(parser, "log and speed", trains=False)
    add("--logging_steps", "--kl_log_interval", dest="kl_log_interval", type=positive(int), default=50,
        help="steps between log lines; of a short run a twentieth, unless it is given")
    add("--num_proc", type=positive(int), default=4, help="processes that tokenise large data")
    add = add_group(parser, "validation", trains="measured")
    add("--baseline_eval_samples", type=positive(int), default=60, help="rows that are compared before and after")
    add = add_group(parser, "MT-Bench", trains="measured")  # early stopping decides by these
    add("--mtbench_file", "--mtbench_ru", dest="mtbench_ru", default="auto", metavar="auto|none|PATH",
        help="question file; auto downloads it, none asks nothing")
    add("--mtbench_limit", "--mtbench_questions_limit", dest="mtbench_questions_limit", metavar="N", default=0,
        type=not_negative(int), help="a sample of N questions before and after training; 0 = all")
    flags.add_mtbench_flags(add)
    add("--mtbench_midtrain_questions", type=not_negative(int), default=0, help="asked for early stopping; 0 = all")
    add("--eval_steps", type=positive(int), default=200,
        help="steps between measurements of the validation loss, and of what early stopping decides by")
    add("--no-eval_baseline", "--skip_baseline_eval", dest="skip_baseline_eval", action="store_true",
        help="measure only after training")
    add("--eval_baseline", dest="skip_baseline_eval", action="store_false", help="measure before training too")
    add = add_group(parser, "early stopping", trains=True)
    add("--early_stop_patience", type=positive(int), default=None, help="evaluate every --eval_steps, keep the best "
        "checkpoint and stop after N evaluations without a gain; without it the run trains to its end")
    add("--early_stop_metric", choices=["mtbench", "val_loss", "retention"], default="mtbench", help="what decides")
    parser.set_defaults(output_dir="qwen3_twix_lora_sft_ru", batch=8, grad_acc=16, learning_rate=1e-5)
    return parser


# fmt: on
def of_local_data(args: argparse.Namespace) -> dict:
    """Further defaults: of a local data set all rows are used."""
    return {"sample_ratio": 1.0, "val_split": None} if not args.demo and Path(args.dataset).exists() else {}


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    return recorded_run(run, flags.parse_arguments(build_parser(), argv, DEMO, of_local_data), argv, "sft_train.py")


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, build, measure, train, measure, report. What can be wrong with the input is found before it writes."""
    from llm_alignment import models, plans, sft, training

    check_flags(args)
    # with early stopping a measurement decides which adapter is kept, so its flags count
    neutral = flags.neutral_flags(build_parser(), *(["measured", "asked"] if args.early_stop_patience else []))
    setup = training.set_up(args, record, neutral, longest=args.max_seq_length)
    setup.check_folder()
    task = task_of(args, setup)
    checkpoint = training.newest_complete(setup.folder, setup.resume)
    gates = asked_gates(args.gates, task.compared)
    own = {"weight_decay": 0.01, "longest": args.max_seq_length, "logging_steps": args.kl_log_interval}
    settings = fill(training.TrainingSettings, args, **own)
    sizes = fill(sft.SftSettings, args, kl_asked=flags.is_given(record["argv"], "--kl_coef"))
    replay = fill(ReplaySettings, args).wanted(task.selection.rows("train")) if args.replay_ratio else 0
    sequences = task.selection.rows("train") + replay
    if args.packing:
        sequences = plans.packed(sequences, task.examples("train"), task.encoder, args.max_seq_length)
    steps = training.optimiser_steps(settings, sequences)
    if not flags.is_given(record["argv"], "--logging_steps", "--kl_log_interval"):  # a twentieth of a short run
        settings = dataclasses.replace(settings, logging_steps=min(settings.logging_steps, max(1, steps // 20)))
    anchor = fill(AnchorSettings, args)
    warn_of_small_runs(steps, len(task.validation), anchor.over(steps), settings.warmup_ratio)
    if args.dry_run:
        shown, asked = (task.selection, task.examples("train"), task.encoder), rounds(args, task, steps)
        plans.print_sft_plan(setup, shown, settings, sizes, anchor.over(steps), asked, sequences, steps)
        plans.log_gates(gates, Path(args.exp_log), args.model)
        if not args.time:
            return
    model = models.load_model(setup.base)
    models.check_head(model, setup.base.what)
    fingerprint = models.base_fingerprint(setup.base, thinking=args.thinking)
    of_base: dict[str, Any] = {"fingerprint": fingerprint, "use_cache": not args.no_baseline_cache}
    rows = {"train": training_rows(args, task, model, fingerprint), "validation": task.validation}
    before: Rows = {}
    early = early_stopping(args, setup, task.midtrain, before, of_base)
    trainer = sft.build_trainer(model, setup, rows, settings, sft=sizes, anchor=anchor, early=early)
    if args.dry_run:
        plans.log_times(trainer, steps, asked)
        return
    measured: Any = functools.partial(measure, trainer.model, setup.tokenizer, **of_base)
    folder = begin(record, task.data, setup.base)
    log.info("data: %s", ", ".join(f"{count} {name} rows" for name, count in task.data["rows"].items()))
    final, first = [*task.compared, *task.final], [] if args.skip_baseline_eval else ["baseline"]
    phase = functools.partial(timed, record, phases=[*first, "train", "final"])
    if not args.skip_baseline_eval:
        with phase("baseline"):
            before |= measured(task.compared, (folder, "baseline"), with_adapter=False)
        final = with_own_drift(final, before, setup.tokenizer, thinking=args.thinking)
    with phase("train"):
        record["kept_step"] = sft.train(trainer, checkpoint, folder)
    training.save_adapter(trainer, folder)
    with phase("final"):  # what early stopping has measured at its step is taken from there
        after = measured(final, (folder, "final"), with_adapter=True, measured_as=f"step_{record['kept_step']}")
    if main_process():
        report(record, folder, final, before, after, title=f"{folder}, step {record['kept_step']}")
        log.info("validation loss on all %(val_rows_full)d held-out rows: %(val_loss_full).4f", record["final"])
        save_curves(with_validation(trainer.state.log_history, record), folder)
        write_card(folder)
        judge_gates(record, gates)


def rounds(args: argparse.Namespace, task: Task, steps: int) -> list[tuple[Evaluation, int]]:
    """What is measured, and how often in a run of these steps."""
    ends = 1 if args.skip_baseline_eval else 2
    during = math.ceil(steps / args.eval_steps)
    asked = [(each, (1 if each.of_base else ends) + during * (each in task.midtrain)) for each in task.compared]
    others = [(each, during) for each in task.midtrain if each not in task.compared]
    return asked + [(each, 1) for each in task.final] + others


def warn_of_small_runs(steps: int, held_out: int, anchor: AnchorSettings, warmup_ratio: float) -> None:
    """Names what makes a run teach, hold or measure little."""
    if steps < 20:
        log.warning("few optimiser steps (%d): lower --batch or --grad_acc, or raise --epochs", steps)
    if held_out < 30:
        log.warning("few validation rows (%d) to tell a difference by: raise --val_split or add rows", held_out)
    reached = anchor.coefficient(steps - 1)
    if reached < anchor.kl_coef / 2:
        what = f"the KL anchor reaches {reached:.2g} of its weight {anchor.kl_coef:.2g}"
        log.warning("%s: lower --kl_start_step and --kl_warmup_steps (0.1: a tenth of the steps)", what)
    if warmup_ratio == 1:
        log.warning("--warmup_ratio 1: the learning rate reaches its peak at the last step; lower it")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on, and what is measured."""

    data: dict  # the fingerprint of the data
    encoder: ChatEncoder
    finder: LeakFinder  # of rows that hold what is asked: a whole question, or 13 words in a row of its or its answer
    selection: Selection
    given: list[list[dict]]  # the dialogues of --replay FILE
    examples: Callable[[str], Dataset]  # the rows of a side
    validation: Dataset  # as tokens
    compared: list[Evaluation]  # before and after training
    final: list[Evaluation]  # after training alone
    midtrain: list[Evaluation]  # every --eval_steps; the first is the validation loss, which is measured in every run


def task_of(args: argparse.Namespace, setup: Setup) -> Task:
    """The task that the flags ask for. Raises InputError when the folder holds a run on other data."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from llm_alignment.drift import drift_evaluation
    from llm_alignment.twix import RowChoice, load_data
    from llm_alignment.validation import validation_evaluation

    sample = {"limit": args.mtbench_questions_limit, "seed": args.mtbench_questions_seed}
    questions = load_questions(args.mtbench_ru, **sample, flag="--mtbench_ru") if args.mtbench_ru != "none" else []
    settings = fill(RetentionSettings, args)
    asked = {"MT-Bench question": questions, "retention question": settings.questions()}
    finder = LeakFinder(*forbidden_texts(asked))
    encoder = ChatEncoder(setup.tokenizer, thinking=args.thinking, assistant_only=args.assistant_only_loss)
    selection, examples = load_data(fill(RowChoice, args), encoder, finder)
    counts = {f"{subset}_{side}": count for (subset, side), count in sorted(selection.counts.items())}
    held_out = examples("validation")
    given = given_dialogues(args.replay, encoder, finder, held_out["messages"]) if args.replay != "self" else []
    data = {"source": args.dataset, "rows": counts, "sha256": selection.sha256}
    data |= {"replay": digest(given)} if given else {}
    setup.check_folder(data)
    held_out = tokenised(args, held_out, encoder, "validation")
    first = held_out.select(range(min(args.baseline_eval_samples, len(held_out))))
    collator = DataCollatorForLanguageModeling(setup.tokenizer.pad_token_id)
    validation = validation_evaluation("validation", first, collator, args.batch)
    drift = drift_evaluation([{"question_id": n, "cluster": n, **row} for n, row in enumerate(first)])
    some = sample_questions(questions, args.mtbench_midtrain_questions, args.mtbench_questions_seed)
    mtbench = mtbench_evaluations(args, questions, some) if questions else []
    retention = retention_evaluations(asked["retention question"], settings)
    decide = [*mtbench[1:], *(retention if args.early_stop_metric == "retention" else [])]
    return Task(
        data, encoder, finder, selection, given, examples, held_out,
        compared=[validation, drift, *mtbench[:1], *retention],
        final=[validation_evaluation("validation_full", held_out, collator, args.batch)],
        midtrain=[validation, *decide] if args.early_stop_patience else [validation],
    )  # fmt: skip


def early_stopping(
    args: argparse.Namespace, setup: Setup, midtrain: list[Evaluation], before: Rows, of_base: dict[str, Any]
) -> EarlyStopping:
    """Measures at steps what stands in `midtrain`; `before` are the rows of the base, once they are there."""
    from llm_alignment.sft import EarlyStopping

    keys = {"loss": "val_loss", "val_loss": "val_loss"} | {e.name: e.name for e in midtrain[1:]}

    def figures(rows: Rows) -> dict[str, float]:
        summaries: dict = {}
        for evaluation in midtrain:
            asked = {item["question_id"] for item in evaluation.items}
            same = [row for row in rows.get(evaluation.name, []) if row["question_id"] in asked]
            summaries |= evaluation.summarise(same) if same else {}
        found = {name: METRICS[metric].read(summaries) for name, metric in keys.items()}
        return {name: value for name, value in found.items() if value is not None}

    def evaluate(model: PeftModel, step: int) -> dict[str, float]:
        place = setup.folder, f"step_{step}"
        return figures(measure(model, setup.tokenizer, midtrain, place, with_adapter=True, **of_base))

    metric, patience = args.early_stop_metric, args.early_stop_patience
    return EarlyStopping(patience, args.eval_steps, metric, evaluate, lambda: figures(before).get(metric))


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together; warns of those that then do less."""
    on_replay, metric = args.kl_on == "replay", args.early_stop_metric
    off = {"mtbench": args.mtbench_ru == "none", "retention": not args.do_retention, "val_loss": False}
    flags.refuse(
        (args.time and not args.dry_run, "--time goes with --dry_run; add it"),
        (args.replay != "self" and not args.replay_ratio, f"--replay {args.replay}: add --replay_ratio, its share"),
        (args.gates and args.skip_baseline_eval, "--gates: without a baseline there is no difference; leave out one"),
        (args.replay_ratio == 1, "--replay_ratio 1 leaves no row of --dataset; lower it"),
        (on_replay and not args.replay_ratio, "--kl_on replay: no replay rows; add --replay_ratio 0.05 or more"),
        (args.thinking and args.replay_ratio and args.replay == "self",
         "--thinking: --replay self writes answers without thinking; give rows by --replay FILE"),
        (on_replay and args.packing, "--kl_on replay cannot tell the rows of --packing apart; leave out one of them"),
        (args.packing and args.streaming, "--packing cannot count its sequences with --streaming; leave out one"),
        (args.early_stop_patience is not None and off[metric],
         f"--early_stop_patience decides by {metric}, which is off: add it or name another --early_stop_metric"),
    )  # fmt: skip
    for flag, default in (("mtbench_midtrain_questions", 0), ("early_stop_metric", "mtbench")):
        if args.early_stop_patience is None and getattr(args, flag) != default:
            log.warning("--%s is not used without --early_stop_patience", flag)
    if args.early_stop_patience is not None and args.skip_baseline_eval:
        log.warning("--skip_baseline_eval: early stopping has no baseline, so it does not see a fall below it")


def training_rows(args: argparse.Namespace, task: Task, model: PreTrainedModel, fingerprint: dict) -> Dataset:
    """The rows to train on as tokens, those of --replay among them, which the base `model` writes itself."""
    rows = task.examples("train")
    if args.replay_ratio and not args.dry_run:
        settings = fill(ReplaySettings, args)
        place: dict[str, Any] = {"folder": Path(args.output_dir), "fingerprint": {**fingerprint, "adapter": "none"}}
        write = functools.partial(own_dialogues, model, task.encoder, task.finder, settings=settings, **place)
        rows = replay_rows(rows, settings, task.given, write)
    return tokenised(args, rows, task.encoder, "train")


def tokenised(args: argparse.Namespace, rows: Dataset, encoder: ChatEncoder, side: str) -> Dataset:
    """The rows of a side as tokens, cut to --max_seq_length; of a stream those to train on whenever they are read."""
    from llm_alignment.twix import tokenise, with_answers

    is_packed, is_lazy = (flag and side == "train" for flag in (args.packing, args.streaming))
    longest = None if is_packed else args.max_seq_length
    rows = tokenise(rows, encoder, args.num_proc, longest=longest, lazily=is_lazy)
    has_all = not args.assistant_only_loss and args.max_seq_length > 1
    return rows if has_all else with_answers(rows, side, args.max_seq_length)


if __name__ == "__main__":
    main()
