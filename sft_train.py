"""Teach a Qwen3 model Russian by SFT on T-Wix with LoRA, and hold it near its base by a KL anchor.

    L = NLL + c(t) * KL(p_student || p_reference)

The reference is the same model with its adapter switched off, so there is no second model; the loss and its gradient are
computed over chunks of rows, so full-size logits never exist. The model is measured before and after: validation loss
and perplexity on the same rows, and MT-Bench answers scored by a reward model, each difference with its interval.

    poetry run python sft_train.py --model Qwen/Qwen3-1.7B --output_dir qwen3_sft --subset both --mix_reasoning_ratio 0.2
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.anchored_loss import fused_nll_kl, kl_coefficient, tail_mask
from llm_alignment.drift import drift_evaluation
from llm_alignment.evaluation import Evaluation, measure, pair_rows, plot_curves, report

# torch and its family take ten seconds to import, so functions import them: --help and a wrong flag answer at once.
from llm_alignment.files import InputError, ResultFile, digest
from llm_alignment.flags import (
    DEMO_DIR,
    add_lora_flags,
    add_model_flags,
    add_run_flags,
    add_training_flags,
    new_parser,
    not_negative,
    parse_arguments,
    positive,
    ratio,
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
from llm_alignment.rewards import load_reward_model
from llm_alignment.runs import begin, recorded_run, timed
from llm_alignment.stats import paired_delta
from llm_alignment.training import (
    FLAGS_THAT_DO_NOT_AFFECT_TRAINING,
    check_output_folder,
    log_memory_plan,
    newest_complete,
    optimiser_steps,
    run_training,
    save_adapter,
    sort_by_length,
    token_counts,
    training_arguments,
)
from llm_alignment.twix import ChatEncoder, Examples, Selection, load_data, sized_stream, tokenise, training_stream
from mtbench_eval import load_questions, scored_evaluation, summarise

if TYPE_CHECKING:
    from peft import PeftModel
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

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="t-tech/T-Wix", help="hub id, file or folder of {messages, subset} rows")
    group.add_argument("--subset", choices=["general", "reasoning", "both"], default="general")
    group.add_argument("--val_split", type=ratio, default=0.01, help="share of prompts held out (0.01; at least one)")
    group.add_argument("--streaming", action="store_true", help="read rows as they are needed, never all in memory")
    group.add_argument("--max_seq_length", type=positive(int), default=1024, help="tokens an example is cut to (1024)")
    group.add_argument(
        "--packing", action="store_true", help="fill sequences with several examples, none sees another"
    )
    group.add_argument("--num_proc", type=positive(int), default=4, help="tokenising processes for large data (4)")
    group.add_argument("--sample_ratio", type=ratio, default=0.25, help="share of the rows to use, by hash (0.25)")
    group.add_argument("--sample_seed", type=int, default=42, help="seed of the sample and the validation split (42)")
    group.add_argument(
        "--mix_reasoning_ratio",
        type=ratio,
        default=None,
        help="share of reasoning rows with --subset both (as they come)",
    )
    group.add_argument("--assistant_only_loss", action="store_true", help="loss on the assistant's turns alone")

    group = parser.add_argument_group("KL anchor")
    group.add_argument(
        "--kl_coef", type=not_negative(float), default=0.02, help="its weight; 0 switches it off (0.02)"
    )
    group.add_argument("--kl_start_step", type=not_negative(int), default=0, help="step at which it sets in (0)")
    group.add_argument("--kl_warmup_steps", type=not_negative(int), default=300, help="steps to full weight (300)")
    group.add_argument(
        "--kl_limit_seq",
        type=not_negative(int),
        default=0,
        help="last target tokens of an example it acts on; 0 = all",
    )
    group.add_argument(
        "--kl_direction",
        choices=["reverse", "forward"],
        default="reverse",
        help="reverse: KL(student || reference); forward: KL(reference || student) (default: %(default)s)",
    )
    group.add_argument(
        "--sft_loss",
        choices=["nll", "dft"],
        default="nll",
        help="dft weights each token's NLL by its probability; with forward KL this is ASFT (default: %(default)s)",
    )
    group.add_argument("--kl_log_interval", type=positive(int), default=50, help="steps between log lines (50)")

    group = parser.add_argument_group("measuring")
    group.add_argument("--mtbench_ru", default="auto", metavar="auto|none|PATH", help="question file; auto fetches it")
    group.add_argument(
        "--mtbench_backend", choices=["simple", "auto"], default="simple", help="auto: continuous batching"
    )
    group.add_argument("--mtbench_questions_limit", type=not_negative(int), default=0, help="a sample of N; 0 = all")
    group.add_argument("--mtbench_questions_seed", type=int, default=42, help="seed of that sample (42)")
    group.add_argument("--mtbench_temperature", type=not_negative(float), default=0.0, help="0 (default) = greedy")
    group.add_argument("--mtbench_max_tokens", type=positive(int), default=1024, help="new tokens a turn (1024)")
    group.add_argument(
        "--early_stop_patience",
        type=positive(int),
        default=None,
        help="measure every --eval_steps, keep the best, stop after N evaluations without a gain (off)",
    )
    group.add_argument("--eval_steps", type=positive(int), default=200, help="steps between those evaluations (200)")
    group.add_argument("--baseline_eval_samples", type=positive(int), default=60, help="validation rows compared (60)")
    group.add_argument("--skip_baseline_eval", action="store_true", help="measure only after training")
    parser.add_argument("--warmup_ratio", type=ratio, default=0.1, help="share of the steps with a rising rate (0.1)")
    parser.set_defaults(batch=8, grad_acc=16, learning_rate=1e-5)
    return parser


def neutral_flags(args: argparse.Namespace) -> set[str]:
    """Flags that do not change which adapter comes out; with early stopping, MT-Bench decides, so its flags do."""
    measuring = {"skip_baseline_eval", "baseline_eval_samples"}
    if args.early_stop_patience is None:
        measuring |= {"reward_model", "eval_steps"} | {name for name in vars(args) if name.startswith("mtbench_")}
    return FLAGS_THAT_DO_NOT_AFFECT_TRAINING | measuring | {"kl_log_interval"}


# ---------------------------------------------------------------------------------------------------------------------
# Training


@contextlib.contextmanager
def without_head(model: PeftModel) -> Iterator[None]:
    """Inside, the model returns its last hidden states, (batch, positions, H), in the place of logits."""
    import torch

    base = model.get_base_model()
    head = base.get_output_embeddings()
    base.set_output_embeddings(torch.nn.Identity())
    try:
        yield
    finally:
        base.set_output_embeddings(head)


def build_trainer(args, model, tokenizer, train_dataset, eval_dataset, rows, measure) -> SFTTrainer:
    """TRL's SFTTrainer with the fused loss, on data sets with "input_ids" and "labels".

    `rows`: how many there are to train on, which a stream does not know. `measure(step) -> dict` gives what evaluation
    at a step returns.
    """
    import torch
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    class KLAnchoredTrainer(SFTTrainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            if args.streaming or args.packing:  # a stream has no lengths beforehand; packed rows are full
                return loader
            return sort_by_length(loader, self.args, token_counts(self.train_dataset, "input_ids"))

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            """Also marks the KL positions of the step's batches, so that its KL is the mean over all of them."""
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            self.kl_coef = kl_coefficient(args, self.state.global_step)
            if self.kl_coef:
                for batch in batches:
                    targets = batch["labels"][:, 1:] != -100
                    if "position_ids" in batch:  # packed: a position of 0 begins the next example
                        example = (batch["position_ids"][:, 1:] == 0).long().cumsum(1)
                    else:
                        example = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
                    batch["kl_mask"] = tail_mask(targets, example, args.kl_limit_seq)
                marked = sum(batch["kl_mask"].sum() for batch in batches)
                self.kl_items = self.accelerator.gather(marked.to(self.accelerator.device)).sum()
            self.steps_since_log += 1
            return batches, num_items

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, kl_mask = inputs.pop("labels")[:, 1:].flatten(), inputs.pop("kl_mask", None)
            peft_model = self.accelerator.unwrap_model(model)
            hidden, ref_hidden, kl_coef = None, None, 0.0
            with without_head(peft_model):
                hidden = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
                if kl_mask is not None:
                    kl_mask = kl_mask.flatten()
                    kl_coef = self.kl_coef * kl_mask.sum() / self.kl_items
                    with torch.no_grad(), peft_model.disable_adapter():
                        ref_hidden = peft_model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
            weight = peft_model.get_output_embeddings().weight
            loss, nll, kl = fused_nll_kl(
                hidden,
                weight,
                labels,
                ref_hidden,
                kl_mask,
                kl_coef=kl_coef,
                kl_direction=args.kl_direction,
                sft_loss=args.sft_loss,
                num_items=num_items_in_batch,
            )
            self.nll_since_log += nll.item()
            if kl_mask is not None:
                self.kl_since_log += (kl * kl_mask.sum() / self.kl_items).item()
            # num_items counts the targets of all processes, whose gradients DDP averages
            return loss * self.accelerator.num_processes

        def evaluate(self, *_, **__):
            """What early stopping runs every --eval_steps; the Trainer keeps the checkpoint with the best MT-Bench."""
            metrics = {f"eval_{name}": value for name, value in measure(self.state.global_step).items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self.control.should_save = True
            self.control.should_training_stop |= self.has_stopped_early()
            return metrics

        def has_stopped_early(self) -> bool:
            scores = [entry["eval_mtbench"] for entry in self.state.log_history if "eval_mtbench" in entry]
            reason = early_stop_reason(self.baseline_score, scores, args.early_stop_patience) if scores else None
            if reason:
                log.info("early stop at step %d: %s", self.state.global_step, reason)
            return reason is not None

        def log(self, logs, start_time=None):
            if "loss" in logs:
                sums = torch.tensor([[self.nll_since_log, self.kl_since_log]], device=self.accelerator.device)
                nll, kl = (self.accelerator.gather(sums).sum(0) / self.steps_since_log).tolist()
                logs |= {"nll": nll, "kl": kl, "kl_coef": self.kl_coef}
                self.nll_since_log = self.kl_since_log = self.steps_since_log = 0
            super().log(logs, start_time)

    class EvaluateLastStep(TrainerCallback):
        def on_step_end(self, trainer_args, state, control, **kwargs):
            control.should_evaluate |= state.global_step == state.max_steps

    early = args.early_stop_patience is not None
    set_seed(args.seed)
    model = new_adapter(model, args)
    config = SFTConfig(
        **training_arguments(
            args,
            weight_decay=0.01,
            warmup_ratio=args.warmup_ratio,
            logging_steps=args.kl_log_interval,
            longest=args.max_seq_length,
        ),
        max_steps=optimiser_steps(args, rows) if args.streaming else -1,
        max_length=args.max_seq_length,
        packing=args.packing,
        eval_packing=False,
        dataset_num_proc=args.num_proc if rows > 20_000 else None,  # a worker takes 10 s to start
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
        # TRL leaves out rows without a target token, and says so
        if next(iter(dataset), None) is None:
            folder = Path(args.output_dir)
            if main_process() and not any(folder.iterdir()):
                folder.rmdir()  # the trainer has made it
            raise InputError(f"no {name} row has an answer within --max_seq_length {args.max_seq_length}; raise it")
    if args.streaming:
        trainer.train_dataset = sized_stream(
            trainer.train_dataset, rows, batch=args.batch, step=args.batch * args.grad_acc * processes()
        )
    trainer.nll_since_log = trainer.kl_since_log = trainer.steps_since_log = 0
    trainer.baseline_score = None
    return trainer


def early_stop_reason(baseline: float | None, scores: list[float], patience: int) -> str | None:
    """Why to stop after these MT-Bench scores (1-10), or None: a fall of more than 0.30 below the baseline, or
    `patience` evaluations on end without a gain of 0.05 over the last one that gained."""
    if baseline is not None and scores[-1] < baseline - 0.30:
        return f"MT-Bench {scores[-1]:.3f} is more than 0.30 below the baseline {baseline:.3f}"
    best, without_gain = -math.inf, 0
    for score in scores:
        gained = score - best >= 0.05
        best, without_gain = (score, 0) if gained else (best, without_gain + 1)
    return f"{patience} evaluations without a gain of 0.05" if without_gain >= patience else None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def validation_nll(model: PeftModel, rows, collator, batch_size: int) -> tuple[list[float], list[int]]:
    """NLL summed over each row's targets, in nats, and their number. `rows`: a prepared `datasets.Dataset`."""
    import torch

    was_training = model.training
    model.eval()
    weight = model.get_base_model().get_output_embeddings().weight
    lengths = token_counts(rows, "input_ids")
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])  # little padding
    sums, tokens = [0.0] * len(rows), [0] * len(rows)
    place = iter(order)
    for batch in torch.utils.data.DataLoader(rows.select(order), batch_size=batch_size, collate_fn=collator):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with (
            torch.no_grad(),
            without_head(model),
            torch.autocast(model.device.type, model.dtype, enabled=model.device.type == "cuda"),
        ):
            hidden = model(**batch, use_cache=False).logits[:, :-1]
        for row_hidden, row_labels in zip(hidden, labels, strict=True):
            row = next(place)
            sums[row] = fused_nll_kl(row_hidden, weight, row_labels, num_items=1)[1].item()
            tokens[row] = int((row_labels != -100).sum())
    model.train(was_training)
    return sums, tokens


def validation_evaluation(name: str, rows, collator, batch_size: int) -> Evaluation:
    """The validation loss of prepared rows (a `datasets.Dataset`): "validation" = those that are compared,
    "validation_full" = all of them, measured after training alone."""
    questions = [{"question_id": number} for number in range(len(rows))]

    def answer(model, tokenizer, *, path: Path, fingerprint: dict, use_cache: bool, renew: bool) -> list[dict]:
        fingerprint = {**fingerprint, "rows": digest(rows[:]), "batch": batch_size}
        results = ResultFile(path, fingerprint, renew=renew, use_cache=use_cache)
        missing = results.missing(questions)
        if missing:  # all rows again, so that a restart has the batches, and the bits, of the first try
            sums, tokens = validation_nll(model, rows, collator, batch_size)
            numbers = [question["question_id"] for question in missing]
            results.append(*({"question_id": n, "nll": sums[n], "tokens": tokens[n]} for n in numbers))
        results.finish()
        return results.rows_of(questions)

    summarise_rows = summarise_full_validation if name == "validation_full" else summarise_validation
    return Evaluation(name, len(rows), answer, summarise_rows, compare_validation)


def summarise_validation(rows: list[dict]) -> dict:
    """Loss in nats a token and perplexity, token-weighted, and the mean of row means that the published runs logged."""
    loss = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    row_mean = sum(row["nll"] / row["tokens"] for row in rows) / len(rows)
    return {"val_loss": loss, "val_loss_row_mean": row_mean, "ppl": math.exp(loss)}


def summarise_full_validation(rows: list[dict]) -> dict:
    return {"val_loss_full": summarise_validation(rows)["val_loss"], "val_rows_full": len(rows)}


def compare_validation(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Paired differences of the token-weighted validation loss, of the perplexity, its exponential, and of row means."""
    pairs = pair_rows(before, after)
    mean_tokens = sum(row["tokens"] for _, row in pairs) / len(pairs)
    sides = [[row["nll"] / mean_tokens for row in side] for side in zip(*pairs, strict=True)]
    row_means = [[row["nll"] / row["tokens"] for row in side] for side in zip(*pairs, strict=True)]
    delta, perplexity = paired_delta(*sides), math.exp(sum(sides[0]) / len(pairs))
    ends = {
        key: None if delta[key] is None else perplexity * math.expm1(delta[key]) for key in ("mean", "low", "high")
    }
    return {"val_loss": delta, "val_loss_row_mean": paired_delta(*row_means), "ppl": {**delta, **ends}}


def print_plan(args, selection: Selection, examples: Examples, encoder: ChatEncoder, questions: list[dict]) -> None:
    """What a run would do: rows by source, one of them as the model reads it, steps, tokens, memory, evaluations."""
    for (subset, side), count in sorted(selection.counts.items()):
        log.info("%-10s %-10s %9d rows", subset, side, count)
    sample = list(itertools.islice(examples("train"), 200))
    log.info("a row as the model reads it, trained on in [[ ]]:\n%s", encoder.marked(sample[0], args.max_seq_length))
    lengths = [len(encoder(row)["input_ids"]) for row in sample]
    mean = sum(min(length, args.max_seq_length) for length in lengths) / len(lengths)
    cut = sum(length > args.max_seq_length for length in lengths) / len(lengths)
    sequences = math.ceil(selection.rows("train") * (mean / args.max_seq_length if args.packing else 1))
    steps = optimiser_steps(args, sequences)
    log.info("steps: %d of %d sequences each", steps, args.batch * args.grad_acc * processes())
    log.info("tokens: about %.0f a row, %.2f M an epoch; %.0f %% of rows are cut", mean, mean * selection.rows("train") / 1e6, 100 * cut)  # fmt: skip
    log_memory_plan(args, args.max_seq_length)
    during = steps // args.eval_steps if args.early_stop_patience else 0
    log.info("MT-Bench: %d questions before, after, and %d times during training", len(questions), during)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(build_parser(), argv, DEMO)
    with recorded_run(args, argv, "sft_train.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, measure, train, measure again. Everything that can be wrong with the input is found before it writes."""
    check_output_folder(args, neutral_flags(args))
    tokenizer = load_tokenizer(args)
    encoder = ChatEncoder(tokenizer, thinking=args.thinking, assistant_only=args.assistant_only_loss)
    selection, examples = load_data(args, encoder)
    counts = {f"{subset}_{side}": count for (subset, side), count in sorted(selection.counts.items())}
    data = {"source": args.dataset, "rows": counts, "sha256": selection.sha256}
    check_output_folder(args, neutral_flags(args), data)
    checkpoint = newest_complete(args)
    questions = []
    if args.mtbench_ru != "none":
        questions = load_questions(
            args.mtbench_ru,
            language="ru",
            limit=args.mtbench_questions_limit,
            seed=args.mtbench_questions_seed,
            flag="--mtbench_ru",
        )
    elif args.early_stop_patience is not None:
        raise InputError("--early_stop_patience decides by MT-Bench: leave out --mtbench_ru none or the patience")
    check_model(args, tokenizer)
    if args.dry_run:
        if questions:
            load_reward_model(args)
        print_plan(args, selection, examples, encoder, questions)
        return
    if args.streaming:
        rows = {**examples.stored("validation"), "train": training_stream(args, selection, examples)}
    else:
        rows = examples.stored("train", "validation")
    rows = {side: tokenise(rows[side], encoder, args.num_proc) for side in rows}
    from transformers import TrainerState
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = load_model(args)
    check_head(model, f"--model {args.model}")
    reward_model = load_reward_model(args) if questions and main_process() else None

    def measure_step(step: int) -> dict:
        """Validation loss and MT-Bench of the adapter as it is at a training step."""
        rows = measure(args, model, tokenizer, evaluations, folder, f"step_{step}", with_adapter=True)
        loss, score = summarise_validation(rows["validation"])["val_loss"], summarise(rows["mtbench"])["avg"]
        return {"loss": loss, "mtbench": score}

    trainer = build_trainer(
        args, model, tokenizer, rows["train"], rows["validation"], selection.rows("train"), measure_step
    )
    model, collator = trainer.model, DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    compared = trainer.eval_dataset.select(range(min(args.baseline_eval_samples, len(trainer.eval_dataset))))
    drift_rows = [
        {"question_id": number, "cluster": number, "input_ids": row["input_ids"], "labels": row["labels"]}
        for number, row in enumerate(compared)
    ]
    evaluations = [validation_evaluation("validation", compared, collator, args.batch), drift_evaluation(drift_rows)]
    if questions:
        settings = dict(
            max_new_tokens=args.mtbench_max_tokens, temperature=args.mtbench_temperature, backend=args.mtbench_backend
        )
        evaluations.append(scored_evaluation(args, "mtbench", questions, reward_model, **settings))
    folder = begin(record, data)
    log.info("data: %s", ", ".join(f"{count} {name} rows" for name, count in counts.items()))

    before = {}
    if not args.skip_baseline_eval:
        with timed(record, "baseline"):
            before = measure(args, model, tokenizer, evaluations, folder, "baseline", with_adapter=False)
        trainer.baseline_score = summarise(before["mtbench"])["avg"] if questions else None

    with timed(record, "train"):
        if checkpoint and args.early_stop_patience is not None:
            trainer.state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
        if not trainer.has_stopped_early():
            run_training(trainer, checkpoint)
    record["kept_step"] = trainer.state.global_step
    best = trainer.state.best_model_checkpoint
    if best is not None:
        trainer._load_from_checkpoint(best)
        record["kept_step"] = trainer.state.best_global_step
        log.info("kept the adapter of step %d, the best by MT-Bench", record["kept_step"])
    save_adapter(trainer, folder)

    step_file = folder / f"mtbench_step_{record['kept_step']}.jsonl"
    if main_process() and step_file.exists() and not (folder / "mtbench_final.jsonl").exists():
        shutil.copyfile(step_file, folder / "mtbench_final.jsonl")  # the kept adapter is measured already
    evaluations.append(validation_evaluation("validation_full", trainer.eval_dataset, collator, args.batch))
    with timed(record, "final"):
        after = measure(args, model, tokenizer, evaluations, folder, "final", with_adapter=True)
    if main_process():
        history, final = trainer.state.log_history, record["final"]
        plot_curves(history, {"loss": ["loss", "nll", "eval_loss"]}, folder / "loss.png")
        plot_curves(history, {"KL": ["kl"], "KL coefficient": ["kl_coef"]}, folder / "kl.png")
        title = f"{record['output_dir']}, step {record['kept_step']}"
        report(record, folder, evaluations, before, after, title=title)
        log.info("validation loss on all %d held-out rows: %.4f", final["val_rows_full"], final["val_loss_full"])


if __name__ == "__main__":
    main()
