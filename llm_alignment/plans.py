"""What a run would do, as --dry_run prints it."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from transformers import Trainer, TrainerCallback

from llm_alignment.anchored_loss import AnchorSettings
from llm_alignment.batches import PAIRS_AT_ONCE, GroupedOrder, groups_of, padded_tokens, shared_lengths
from llm_alignment.devices import tf32
from llm_alignment.encoder import ChatEncoder
from llm_alignment.evaluation import Evaluation, questions_needed
from llm_alignment.files import log, read_records
from llm_alignment.models import evaluating
from llm_alignment.prefixes import settle_head
from llm_alignment.processes import processes
from llm_alignment.sft import SftSettings
from llm_alignment.training import DpoSettings, Setup, TrainingSettings, log_memory_plan, optimiser_steps
from llm_alignment.twix import Selection


def log_evaluations(setup: Setup, rounds: list[tuple[Evaluation, int]], trained: float) -> None:
    """Logs how much each evaluation asks and how often, and the share of their tokens beside the `trained` ones."""
    asked = 0
    for evaluation, times in rounds:
        tokens, count = evaluation.tokens(setup.tokenizer), len(evaluation.items)
        asked += times * tokens
        log.info("%s: %d questions, %d x at most %.1f k tokens", evaluation.name, count, times, tokens / 1e3)
    if asked:
        share = 100 * asked / (asked + trained)
        log.info("evaluation: at most %.2f M tokens, %.0f %% of all that go through the model", asked / 1e6, share)


def print_dpo_plan(
    setup: Setup, rows: list[dict], evaluations: list[Evaluation], settings: TrainingSettings, dpo: DpoSettings
) -> None:
    """One pair of the `rows` of `fit_pairs` as the model reads it, pairs, steps, passes, tokens, memory, evaluations;
    a backward pass of a frozen base costs as much as a forward pass."""
    settle_head(setup.base.device)
    rounds = [(evaluation, 2) for evaluation in evaluations]
    if not rows:
        log_evaluations(setup, rounds, 0.0)
        return
    first, end = rows[0], setup.tokenizer.eos_token
    log.info("the first pair as the model reads it:\n%s", first["prompt"])
    log.info("chosen: %s%s\nrejected: %s%s", first["chosen"], end, first["rejected"], end)
    prompts = setup.tokenizer([row["prompt"] for row in rows])["input_ids"]
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
    lengths = [min(dpo.max_length, len(ids) + 1) for ids in setup.tokenizer(texts)["input_ids"]]
    both = [a + b for a, b in zip(lengths[: len(rows)], lengths[len(rows) :], strict=True)]
    order = list(range(len(rows)))
    random.Random(settings.seed).shuffle(order)
    if dpo.group_by_table:
        order = list(GroupedOrder(groups_of(prompts), settings.seed))
    read = padded = 0
    for start in range(0, len(order), settings.batch):
        batch = order[start : start + settings.batch]
        padded += 2 * len(batch) * max(lengths[side + index] for side in (0, len(rows)) for index in batch)
        read += sum(both[index] - len(prompts[index]) for index in batch)
        read -= sum(shared for _, shared in shared_lengths([prompts[index] for index in batch]))
    if dpo.no_prefix_sharing:
        read = padded
    steps, step = optimiser_steps(settings, len(rows)), min(settings.step, len(rows))
    passes = steps * min(settings.grad_acc * processes(), math.ceil(len(rows) / settings.batch))
    epochs = steps * step / len(rows)
    log.info("pairs: %d, %.0f tokens each with the prompt read for each answer", len(rows), statistics.fmean(both))
    log.info("steps: %d of %d pairs each; %d forward and backward passes", steps, step, passes)
    log.info("the reference: %d forward passes, once per base and data", math.ceil(len(rows) / PAIRS_AT_ONCE))
    tokens = (total * epochs / steps for total in (sum(both), padded, read))
    log.info("tokens a step: %.0f of the pairs, %.0f padded as TRL reads them, %.0f read here", *tokens)
    sides = zip(map(len, prompts), lengths[: len(rows)], lengths[len(rows) :], strict=True)
    pairs = [(prompt, chosen - prompt, rejected - prompt) for prompt, chosen, rejected in sides]
    log_memory_plan(dpo.sized(settings, pairs, is_shared=not dpo.no_prefix_sharing), setup.base, setup.lora)
    log_evaluations(setup, rounds, read * (2 * epochs + 1))  # once more for the reference


def packed(rows: int, examples: Iterable[dict], encoder: ChatEncoder, longest: int) -> int:
    """About how many sequences --packing makes of so many rows, by the lengths of the first 1,000 examples."""
    lengths = [min(len(encoder(row)["input_ids"]), longest) for row in itertools.islice(examples, 1000)]
    return math.ceil(rows * statistics.fmean(lengths) / longest)


def print_sft_plan(
    setup: Setup,
    data: tuple[Selection, Iterable[dict], ChatEncoder],
    settings: TrainingSettings,
    sft: SftSettings,
    anchor: AnchorSettings,
    rounds: list[tuple[Evaluation, int]],
    sequences: int,
    steps: int,
) -> None:
    """Rows by source, one as the model reads it, steps, tokens, passes, memory, evaluations. `data`: what is chosen,
    rows to train on, what makes tokens of them; `rounds`: what is measured, and how often; `sequences`: an epoch's,
    rows of replay among them, taken to be as long as the chosen ones."""
    selection, examples, encoder = data
    for (subset, side), count in sorted(selection.counts.items()):
        log.info("%-10s %-10s %9d rows", subset, side, count)
    sample = list(itertools.islice(examples, 1000))
    log.info("a row as the model reads it, trained on in [[ ]]:\n%s", encoder.marked(sample[0], sft.max_seq_length))
    lengths = [len(encoder(row)["input_ids"]) for row in sample]
    kept = [min(length, sft.max_seq_length) for length in lengths]
    mean, cut = statistics.fmean(kept), 100 * statistics.fmean(length > sft.max_seq_length for length in lengths)
    per_step, batch = min(settings.step, sequences), settings.batch
    per_row = sft.max_seq_length if sft.packing else padded_tokens(kept, batch, settings.step) / len(kept)
    real = per_row if sft.packing else mean
    log.info("steps: %d of %d sequences each", steps, per_step)
    log.info("tokens: about %.0f a row, %.2f M an epoch; %.0f %% of rows are cut", mean, real * sequences / 1e6, cut)
    tokens = real * per_step, per_row * per_step, per_row / real
    log.info("a step: about %.0f tokens, %.0f with padding (%.2f to 1)", *tokens)
    anchored = max(0, steps - 1 - int(anchor.kl_start_step)) if anchor.kl_coef else 0  # at its first step it is 0
    each = min(settings.grad_acc, math.ceil(sequences / batch / processes()))
    passes = steps * each, steps * each, batch * processes(), anchored * each
    log.info("passes: %d forward and %d backward of %d sequences, %d forward of the reference", *passes)
    log_memory_plan(settings, setup.base, setup.lora)
    # a backward pass of a frozen base costs a forward pass
    log_evaluations(setup, rounds, (2 * steps + anchored) * per_step * per_row)


class StepClock(TrainerCallback):
    """When each optimiser step ended, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def log_times(trainer: Trainer, steps: int, rounds: list[tuple[Evaluation, int]]) -> None:
    """Takes two steps and reads one batch of each evaluation; logs how long `steps` and all `rounds` take so."""
    args, model, tokenizer = trainer.args, trainer.model, trainer.processing_class
    trainer.add_callback(clock := StepClock())
    with tempfile.TemporaryDirectory() as args.output_dir, tf32(args.bf16 or args.fp16):
        args.max_steps, args.save_strategy, args.eval_strategy = 2, "no", "no"
        trainer.train()
    trained = (clock.ends[1] - clock.ends[0]) * steps  # the first one also sets up what the libraries keep
    measured = 0.0
    for evaluation, times in rounds:
        items, start = list(evaluation.items[: max(1, evaluation.rows_at_once(model))]), time.perf_counter()
        with evaluating(model):
            list(evaluation.read(model, tokenizer, items))
        measured += (time.perf_counter() - start) * times * len(evaluation.items) / len(items)
    log.info("time: about %.1f minutes of training, %.1f of evaluation without rewards", trained / 60, measured / 60)


def log_gates(gates: dict[str, float], exp_log: Path, model: str) -> None:
    """Logs how many questions each gate needs at the spread of the earlier records on this base."""
    records = read_records(exp_log) if gates and exp_log.exists() else []
    known = [record.get("delta") or {} for record in records if record.get("args", {}).get("model") == model]
    for name, limit in gates.items():
        needed = questions_needed(limit, [delta[name] for delta in known if name in delta])
        what = f"about {needed:,} questions" if needed else "not known yet, no earlier record on this base measured it"
        log.info("gate %s %+g: %s", name, limit, what)
