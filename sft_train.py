"""Teach a Qwen3 model Russian by SFT on T-Wix with LoRA, and hold it near its base by a KL anchor.

    L = NLL + c(t) * KL(p_student || p_reference)

The reference is the same model with its adapter switched off, so there is no second model. The loss and its gradient
are computed over chunks of rows, so full-size logits never exist. The model is measured before and after: validation
loss and perplexity on the same rows, and MT-Bench answers scored by a reward model, each difference with its interval.

    poetry run python sft_train.py --output_dir qwen3_sft --subset both --mix_reasoning_ratio 0.2
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.anchored_loss import fused_nll_kl, kl_coefficient, rows_at_once, tail_mask
from llm_alignment.batches import padded_tokens, sort_by_length, token_counts
from llm_alignment.drift import drift_evaluation
from llm_alignment.evaluation import Evaluation, measure, plot_curves, report
from llm_alignment.files import InputError, write_atomic
from llm_alignment.flags import (
    DEMO_DIR,
    add_lora_flags,
    add_model_flags,
    add_mtbench_flags,
    add_run_flags,
    add_training_flags,
    new_parser,
    not_negative,
    parse_arguments,
    positive,
    ratio,
    seed,
)
from llm_alignment.models import (
    adapter_kept_in_float32,
    check_head,
    check_model,
    load_model,
    load_tokenizer,
    main_process,
    new_adapter,
    processes,
)
from llm_alignment.rewards import RewardModel, load_reward_model
from llm_alignment.runs import begin, recorded_run, timed
from llm_alignment.scores import summarise
from llm_alignment.training import (
    FLAGS_THAT_DO_NOT_AFFECT_TRAINING,
    check_output_folder,
    log_memory_plan,
    newest_complete,
    optimiser_steps,
    run_training,
    save_adapter,
    training_arguments,
)
from llm_alignment.twix import (
    LARGE_DATA,
    ChatEncoder,
    Examples,
    Selection,
    load_data,
    sized_stream,
    tokenise,
    training_stream,
)
from llm_alignment.validation import summarise_validation, validation_evaluation, without_head
from mtbench_eval import conversation_tokens, load_questions, sample_questions, scored_evaluation

# torch and its family take ten seconds to import, so functions import them: --help and a wrong flag answer at once.
if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

log = logging.getLogger("llm_alignment")

# ---------------------------------------------------------------------------------------------------------------------
# Arguments

DEMO = dict(
    model=str(DEMO_DIR / "model"),
    reward_model=str(DEMO_DIR / "reward_model"),
    dataset=str(DEMO_DIR / "twix.jsonl"),
    mtbench_ru=str(DEMO_DIR / "mt_bench_ru.jsonl"),
    output_dir="demo_sft",
    # enough to forget without the anchor: rerun with --kl_coef 0 and compare
    batch=16,
    grad_acc=1,
    sample_ratio=1.0,
    epochs=0.8,
    val_split=0.03,
    max_seq_length=256,
    learning_rate=5e-3,
    warmup_ratio=0.05,
    lora_dropout=0.0,
    target_modules="all-linear",
    kl_coef=0.5,
    kl_warmup_steps=0,
    kl_log_interval=5,
    mtbench_max_tokens=24,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Defaults are those of the published runs where they had one."""
    parser = new_parser("sft_train.py", __doc__)
    add_model_flags(parser)
    add_lora_flags(parser)
    add_training_flags(parser)
    add_run_flags(parser, exp_log="experiments/sft_experiments.jsonl")
    parser.add_argument(
        "--output_dir", default="qwen3_twix_lora_sft_ru", help="folder of the run (default: %(default)s)"
    )

    default = " (default: %(default)s)"
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="t-tech/T-Wix", help="hub id, file or folder of {messages, subset} rows" + default)
    add("--subset", choices=["general", "reasoning", "both"], default="general",
        help="which rows; one without a subset is general" + default)
    add("--val_split", type=ratio, default=0.01,
        help="share of the prompts held out for validation, at least one" + default)
    add("--streaming", action="store_true", help="read rows as they are needed, never all in memory")
    add("--max_seq_length", type=positive(int), default=1024, help="tokens that an example is cut to" + default)
    add("--packing", action="store_true", help="fill sequences with several examples; none sees another")
    add("--num_proc", type=positive(int), default=4, help="processes that tokenise large data" + default)
    add("--sample_ratio", type=ratio, default=0.25, help="share of the rows to use, by hash" + default)
    add("--sample_seed", type=seed, default=42, help="seed of the sample and of the validation split" + default)
    add("--mix_reasoning_ratio", type=ratio, default=None,
        help="share of reasoning rows with --subset both (default: as they are in the data)")
    add("--assistant_only_loss", action="store_true",
        help="train on the answers and their end of turn alone (without it: on the whole text)")

    add = parser.add_argument_group("loss").add_argument
    add("--sft_loss", choices=["nll", "dft"], default="nll",
        help="dft weights each token's NLL by its probability; with forward KL this is ASFT" + default)
    add("--kl_coef", type=not_negative(float), default=0.02,
        help="weight of the KL anchor; 0 switches it off" + default)
    add("--kl_start_step", type=not_negative(int), default=0, help="step at which the anchor starts" + default)
    add("--kl_warmup_steps", type=not_negative(int), default=300,
        help="steps until the anchor has its full weight" + default)
    add("--kl_limit_seq", type=not_negative(int), default=0,
        help="the anchor acts on the last N target tokens of each example; 0 = all" + default)
    add("--kl_direction", choices=["reverse", "forward"], default="reverse",
        help="reverse: KL(student || reference); forward: KL(reference || student)" + default)
    add("--kl_log_interval", type=positive(int), default=50, help="steps between log lines" + default)

    add = parser.add_argument_group("MT-Bench and validation").add_argument
    add("--mtbench_ru", default="auto", metavar="auto|none|PATH", help="question file; auto downloads it" + default)
    add("--mtbench_questions_limit", type=not_negative(int), default=0,
        help="a sample of N questions before and after training; 0 = all" + default)
    add_mtbench_flags(add)
    add("--mtbench_midtrain_questions", type=not_negative(int), default=0,
        help="a sample of N of these for early stopping; 0 = all of them" + default)
    add(
        "--early_stop_patience",
        type=positive(int),
        default=None,
        help="evaluate every --eval_steps, keep the best checkpoint by MT-Bench, and stop after N evaluations without "
        "a gain of 0.05 (default: off)",
    )
    add("--eval_steps", type=positive(int), default=200, help="steps between those evaluations" + default)
    add("--baseline_eval_samples", type=positive(int), default=60,
        help="validation rows that are compared before and after" + default)
    add("--skip_baseline_eval", action="store_true", help="measure only after training")
    parser.add_argument("--warmup_ratio", type=ratio, default=0.1,
        help="share of the steps in which the learning rate rises" + default)
    # fmt: on
    parser.set_defaults(batch=8, grad_acc=16, learning_rate=1e-5)
    return parser


def neutral_flags(args: argparse.Namespace) -> set[str]:
    """Flags that do not change which adapter comes out; with early stopping, MT-Bench decides, so its flags do."""
    measuring = {"baseline_eval_samples"}
    if args.early_stop_patience is None:
        measuring |= {name for name in vars(args) if name.startswith("mtbench_")}
        measuring |= {"reward_model", "eval_steps", "skip_baseline_eval"}
    return FLAGS_THAT_DO_NOT_AFFECT_TRAINING | measuring | {"kl_log_interval"}


# ---------------------------------------------------------------------------------------------------------------------
# Training


class AnchoredTraining:
    """What is different here from TRL's SFTTrainer, which it is mixed into: micro-batches sorted by length, the fused
    loss, and evaluations during training that decide by MT-Bench."""

    flags: argparse.Namespace
    state: Any  # the Trainer's
    evaluate_step: Callable[[int], dict[str, float]]  # {"loss", "mtbench"} of the adapter at a step
    baseline_score: float | None = None  # MT-Bench of the base on the questions of these evaluations
    nll_since_log = kl_since_log = 0.0
    steps_since_log = 0

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.flags.streaming or self.flags.packing:  # a stream is sorted already; packed rows are full
            return loader
        return sort_by_length(loader, self.args, token_counts(self.train_dataset, "input_ids"))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Also marks the KL positions of the step's batches, so that its KL is the mean over all of them."""
        import torch

        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.kl_coef = kl_coefficient(self.flags, self.state.global_step)
        if self.kl_coef:
            for batch in batches:
                targets = batch["labels"][:, 1:] != -100
                if "position_ids" in batch:  # packed: a position of 0 begins the next example
                    example = (batch["position_ids"][:, 1:] == 0).long().cumsum(1)
                else:
                    example = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
                batch["kl_mask"] = tail_mask(targets, example, self.flags.kl_limit_seq)
            marked = sum(batch["kl_mask"].sum() for batch in batches)
            self.kl_items = self.accelerator.gather(marked.to(self.accelerator.device)).sum()
        self.steps_since_log += 1
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        import torch

        labels, kl_mask = inputs.pop("labels")[:, 1:].flatten(), inputs.pop("kl_mask", None)
        inputs.pop(
            "attention_mask", None
        )  # causal attention does not see padding on the right; no mask, no slow kernel
        peft_model = self.accelerator.unwrap_model(model)
        ref_hidden, kl_coef = None, 0.0
        with without_head(peft_model):
            hidden = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
            if kl_mask is not None:
                kl_mask = kl_mask.flatten()
                kl_coef = self.kl_coef * kl_mask.sum() / self.kl_items
                with torch.no_grad(), peft_model.disable_adapter():
                    ref_hidden = peft_model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss, nll, kl = fused_nll_kl(
            hidden,
            peft_model.get_output_embeddings().weight,
            labels,
            ref_hidden,
            kl_mask,
            kl_coef=kl_coef,
            kl_direction=self.flags.kl_direction,
            sft_loss=self.flags.sft_loss,
            num_items=num_items_in_batch,
            rows_per_chunk=rows_at_once(peft_model.config.get_text_config().vocab_size, hidden.device),
        )
        self.nll_since_log += nll.item()
        if kl_mask is not None:
            self.kl_since_log += (kl * kl_mask.sum() / self.kl_items).item()
        # num_items counts the targets of all processes, whose gradients DDP averages
        return loss * self.accelerator.num_processes

    def log(self, logs, start_time=None):
        import torch

        if "loss" in logs:
            sums = torch.tensor([[self.nll_since_log, self.kl_since_log]], device=self.accelerator.device)
            nll, kl = (self.accelerator.gather(sums).sum(0) / self.steps_since_log).tolist()
            logs |= {"nll": nll, "kl": kl, "kl_coef": self.kl_coef}
            self.nll_since_log = self.kl_since_log = self.steps_since_log = 0
        super().log(logs, start_time)

    def evaluate(self, *_, **__):
        """What early stopping runs every --eval_steps; the Trainer keeps the checkpoint with the best MT-Bench."""
        metrics = {f"eval_{name}": value for name, value in self.evaluate_step(self.state.global_step).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save = True
        self.control.should_training_stop |= self.has_stopped_early()
        return metrics

    def has_stopped_early(self) -> bool:
        scores = [entry["eval_mtbench"] for entry in self.state.log_history if "eval_mtbench" in entry]
        reason = early_stop_reason(self.baseline_score, scores, self.flags.early_stop_patience) if scores else None
        if reason:
            log.info("early stop at step %d: %s", self.state.global_step, reason)
        return reason is not None


def build_trainer(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset,
    rows: int,
) -> SFTTrainer:
    """The trainer, with a fresh adapter on `model`. The data sets hold "input_ids" and "labels".

    `rows`: how many there are to train on, which a stream does not know. Raises InputError when no row of one side
    keeps an answer within --max_seq_length.
    """
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    class KLAnchoredTrainer(AnchoredTraining, SFTTrainer):
        flags = args

    class EvaluateLastStep(TrainerCallback):
        def on_step_end(self, trainer_args, state, control, **kwargs):
            control.should_evaluate |= state.global_step == state.max_steps

    early = args.early_stop_patience is not None
    set_seed(args.seed)
    model = new_adapter(model, args)
    common = training_arguments(
        args,
        weight_decay=0.01,
        warmup_ratio=args.warmup_ratio,
        logging_steps=args.kl_log_interval,
        longest=args.max_seq_length,
    )
    config = SFTConfig(
        **common,
        max_steps=optimiser_steps(args, rows) if args.streaming else -1,
        max_length=args.max_seq_length,
        packing=args.packing,
        eval_packing=False,
        dataset_num_proc=args.num_proc if rows > LARGE_DATA else None,
        eval_strategy="steps" if early else "no",
        eval_steps=args.eval_steps if early else None,
        metric_for_best_model="mtbench" if early else None,
        greater_is_better=True if early else None,
    )
    with adapter_kept_in_float32(model):
        trainer = KLAnchoredTrainer(
            model=model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[EvaluateLastStep()] if early else [],
        )
    for name, dataset in (("training", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        # TRL leaves out rows without a target token; of a single token there is none to predict
        if args.max_seq_length == 1 or next(iter(dataset), None) is None:
            folder = Path(args.output_dir)
            if main_process() and not any(folder.iterdir()):
                folder.rmdir()  # the trainer has made it
            raise no_answers(name, args.max_seq_length)
    if args.streaming:
        step = args.batch * args.grad_acc * processes()
        trainer.train_dataset = sized_stream(trainer.train_dataset, rows, batch=args.batch, step=step)
    return trainer


def no_answers(side: str, longest: int) -> InputError:
    return InputError(f"no {side} row has an answer within --max_seq_length {longest}; raise it")


def early_stop_reason(baseline: float | None, scores: list[float], patience: int) -> str | None:
    """Why to stop after these MT-Bench scores (1-10), or None: a fall of more than 0.30 below the baseline, or
    `patience` consecutive evaluations without a gain of 0.05 over the last one that gained."""
    if baseline is not None and scores[-1] < baseline - 0.30:
        return f"MT-Bench {scores[-1]:.3f} is more than 0.30 below the baseline {baseline:.3f}"
    best, without_gain = -math.inf, 0
    for score in scores:
        gained = score - best >= 0.05
        best, without_gain = (score, 0) if gained else (best, without_gain + 1)
    return f"{patience} evaluations without a gain of 0.05" if without_gain >= patience else None


# ---------------------------------------------------------------------------------------------------------------------
# The plan of --dry_run


def print_plan(
    args: argparse.Namespace, selection: Selection, examples: Examples, encoder: ChatEncoder, questions: list[dict]
) -> None:
    """What a run would do: rows by source, one as the model reads it, steps, tokens, passes, memory, evaluations."""
    for (subset, side), count in sorted(selection.counts.items()):
        log.info("%-10s %-10s %9d rows", subset, side, count)
    sample = list(itertools.islice(examples("train"), 1000))
    log.info("a row as the model reads it, trained on in [[ ]]:\n%s", encoder.marked(sample[0], args.max_seq_length))
    lengths = [len(encoder(row)["input_ids"]) for row in sample]
    kept = [min(length, args.max_seq_length) for length in lengths]
    mean = sum(kept) / len(kept)
    cut = sum(length > args.max_seq_length for length in lengths) / len(lengths)
    per_step, rows = args.batch * args.grad_acc * processes(), selection.rows("train")
    steps = optimiser_steps(args, math.ceil(rows * mean / args.max_seq_length) if args.packing else rows)
    log.info("steps: %d of %d sequences each", steps, per_step)
    log.info("tokens: about %.0f a row, %.2f M an epoch; %.0f %% of rows are cut", mean, mean * rows / 1e6, 100 * cut)
    per_row = args.max_seq_length if args.packing else padded_tokens(kept, args.batch, per_step) / len(kept)
    real = per_row if args.packing else mean
    tokens = real * per_step, per_row * per_step, per_row / real
    log.info("a step: about %.0f tokens, %.0f with padding (%.2f to 1)", *tokens)
    anchored = sum(kl_coefficient(args, step) > 0 for step in range(steps))
    micro = steps * args.grad_acc
    log.info(
        "passes: %d forward and %d backward of %d sequences, %d forward of the reference",
        micro, micro, args.batch * processes(), anchored * args.grad_acc,
    )  # fmt: skip
    log_memory_plan(args, args.max_seq_length)
    during = math.ceil(steps / args.eval_steps) if args.early_stop_patience else 0
    before = "" if args.skip_baseline_eval else "before training, "
    log.info("MT-Bench: %d questions %safter it, and %d times during it", len(questions), before, during)
    midtrain = min(1, (args.mtbench_midtrain_questions or len(questions)) / max(1, len(questions)))
    rounds = 1 + (not args.skip_baseline_eval)
    asked = (rounds + during * midtrain) * conversation_tokens(questions, args.mtbench_max_tokens, encoder.tokenizer)
    held_out = selection.rows("validation")
    compared = min(args.baseline_eval_samples, held_out)  # their loss each time; at the end their drift, by two passes
    asked += ((rounds + during + 2) * compared + held_out) * mean
    trained = (2 * steps + anchored) * per_step * per_row  # a backward pass of a frozen base costs a forward pass
    share = 100 * asked / (asked + trained)
    log.info("evaluation: at most %.2f M tokens, %.0f %% of all that go through the model", asked / 1e6, share)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    args = parse_arguments(build_parser(), argv, DEMO)
    with recorded_run(args, argv, "sft_train.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, measure, train, measure again. Everything that can be wrong with the input is found before it writes."""
    check_flags(args)
    check_output_folder(args, neutral_flags(args))
    tokenizer = load_tokenizer(args)
    encoder = ChatEncoder(tokenizer, thinking=args.thinking, assistant_only=args.assistant_only_loss)
    selection, examples = load_data(args, encoder)
    counts = {f"{subset}_{side}": count for (subset, side), count in sorted(selection.counts.items())}
    data = {"source": args.dataset, "rows": counts, "sha256": selection.sha256}
    check_output_folder(args, neutral_flags(args), data)
    checkpoint = newest_complete(args)
    questions = mtbench_questions(args)
    midtrain = sample_questions(questions, args.mtbench_midtrain_questions, args.mtbench_questions_seed)
    check_model(args, tokenizer)
    if args.dry_run:
        if questions:
            load_reward_model(args)
        print_plan(args, selection, examples, encoder, questions)
        return
    rows = tokenised_rows(args, selection, examples, encoder)
    model = load_model(args)
    check_head(model, f"--model {args.model}")
    reward_model = load_reward_model(args) if questions and main_process() else None
    trainer = build_trainer(args, model, tokenizer, rows["train"], rows["validation"], selection.rows("train"))
    evaluations = all_evaluations(args, trainer, questions, midtrain, reward_model)
    folder = begin(record, data)
    log.info("data: %s", ", ".join(f"{count} {name} rows" for name, count in counts.items()))

    before = {}
    if not args.skip_baseline_eval:
        with timed(record, "baseline"):
            before = measure(
                args, trainer.model, tokenizer, evaluations["compared"], folder, "baseline", with_adapter=False
            )
        asked = {question["question_id"] for question in midtrain}
        same = [row for row in before.get("mtbench", []) if row["question_id"] in asked]
        trainer.baseline_score = summarise(same)["avg"] if same else None
    with timed(record, "train"):
        record["kept_step"] = train(args, trainer, checkpoint, evaluations["midtrain"], folder)
    save_adapter(trainer, folder)
    reuse_step_rows(folder, record["kept_step"], evaluations)
    with timed(record, "final"):
        after = measure(args, trainer.model, tokenizer, evaluations["final"], folder, "final", with_adapter=True)
    if main_process():
        history, final = trainer.state.log_history, record["final"]
        plot_curves(history, {"loss": ["loss", "nll", "eval_loss"]}, folder / "loss.png")
        plot_curves(history, {"KL": ["kl"], "KL coefficient": ["kl_coef"]}, folder / "kl.png")
        title = f"{record['output_dir']}, step {record['kept_step']}"
        report(record, folder, evaluations["final"], before, after, title=title)
        log.info("validation loss on all %d held-out rows: %.4f", final["val_rows_full"], final["val_loss_full"])


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together; warns of those that then do less."""
    if args.packing and args.streaming:
        raise InputError("--packing cannot count its sequences in a stream; leave out --streaming or --packing")
    if args.early_stop_patience is not None and args.mtbench_ru == "none":
        raise InputError("--early_stop_patience decides by MT-Bench: leave out --mtbench_ru none or the patience")
    if args.early_stop_patience is None and args.mtbench_midtrain_questions:
        log.warning("--mtbench_midtrain_questions is not used without --early_stop_patience")
    if args.early_stop_patience is not None and args.skip_baseline_eval:
        log.warning("--skip_baseline_eval: early stopping has no baseline, so it does not see a fall below it")


def mtbench_questions(args: argparse.Namespace) -> list[dict]:
    """The questions asked before and after training; [] with --mtbench_ru none."""
    if args.mtbench_ru == "none":
        return []
    return load_questions(
        args.mtbench_ru, limit=args.mtbench_questions_limit, seed=args.mtbench_questions_seed, flag="--mtbench_ru"
    )


def tokenised_rows(
    args: argparse.Namespace, selection: Selection, examples: Examples, encoder: ChatEncoder
) -> dict[str, Dataset | IterableDataset]:
    """The rows of both sides as tokens; with --streaming those to train on are read as they are needed."""
    if args.streaming:
        rows = {**examples.stored("validation"), "train": training_stream(args, selection, examples)}
    else:
        rows = examples.stored("train", "validation")
    tokens = {side: tokenise(rows[side], encoder, args.num_proc) for side in rows}
    if args.assistant_only_loss and not args.streaming:
        tokens["train"] = with_answers(tokens["train"], args.max_seq_length)
    return tokens


def with_answers(rows: Dataset, longest: int) -> Dataset:
    """The training rows with a target within `longest` tokens; says how many have none, which TRL would pack too."""
    kept = rows.filter(lambda labels: any(label != -100 for label in labels[1:longest]), input_columns="labels")
    if not len(kept):
        raise no_answers("training", longest)
    if left_out := len(rows) - len(kept):
        log.warning("%d of %d training rows have no answer within --max_seq_length: left out", left_out, len(rows))
    return kept


def all_evaluations(
    args: argparse.Namespace,
    trainer: SFTTrainer,
    questions: list[dict],
    midtrain: list[dict],
    reward_model: RewardModel | None,
) -> dict[str, list[Evaluation]]:
    """What is measured: "compared" before and after, "final" after, "midtrain" at the steps of early stopping."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(trainer.processing_class.pad_token_id)
    rows = trainer.eval_dataset
    first = rows.select(range(min(args.baseline_eval_samples, len(rows))))
    validation = validation_evaluation("validation", first, collator, args.batch)
    full = validation_evaluation("validation_full", rows, collator, args.batch)
    drift_rows = [
        {"question_id": number, "cluster": number, "input_ids": row["input_ids"], "labels": row["labels"]}
        for number, row in enumerate(first)
    ]
    settings = dict(
        max_new_tokens=args.mtbench_max_tokens, temperature=args.mtbench_temperature, backend=args.mtbench_backend
    )
    mtbench, at_steps = (
        [scored_evaluation(args, "mtbench", asked, reward_model, **settings)] if asked else []
        for asked in (questions, midtrain)
    )
    compared = [validation, drift_evaluation(drift_rows), *mtbench]
    return {"compared": compared, "final": [*compared, full], "midtrain": [validation, *at_steps]}


def train(
    args: argparse.Namespace,
    trainer: SFTTrainer,
    checkpoint: Path | None,
    midtrain: list[Evaluation],
    folder: Path,
) -> int:
    """Trains, or continues from `checkpoint`; returns the step that is kept: the last, or the best by MT-Bench."""
    from transformers import TrainerState

    def evaluate_step(step: int) -> dict[str, float]:
        rows = measure(
            args, trainer.model, trainer.processing_class, midtrain, folder, f"step_{step}", with_adapter=True
        )
        loss, score = summarise_validation(rows["validation"])["val_loss"], summarise(rows["mtbench"])["avg"]
        return {"loss": loss, "mtbench": score}

    trainer.evaluate_step = evaluate_step
    if checkpoint and args.early_stop_patience is not None:
        trainer.state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
    if not trainer.has_stopped_early():
        run_training(trainer, checkpoint)
    best = trainer.state.best_model_checkpoint
    if best is None:
        return trainer.state.global_step
    moved = folder / Path(best).name  # the state names the folder as it was called then
    trainer._load_from_checkpoint(str(moved if moved.is_dir() else best))
    log.info("kept the adapter of step %d, the best by MT-Bench", trainer.state.best_global_step)
    return trainer.state.best_global_step


def reuse_step_rows(folder: Path, step: int, evaluations: dict[str, list[Evaluation]]) -> None:
    """The kept adapter was measured at its step: takes those MT-Bench answers for the end when all were asked."""
    sizes = [{e.name: e.size for e in evaluations[stage]}.get("mtbench") for stage in ("midtrain", "final")]
    source, target = folder / f"mtbench_step_{step}.jsonl", folder / "mtbench_final.jsonl"
    if main_process() and sizes[0] == sizes[1] and source.exists() and not target.exists():
        write_atomic(target, source.read_bytes())


if __name__ == "__main__":
    main()
