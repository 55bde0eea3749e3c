"""What a run would do, as --dry_run prints it."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import statistics

from llm_alignment.dpo import DpoSettings
from llm_alignment.evaluation import Evaluation
from llm_alignment.prefixes import GroupedOrder, groups_of, shared_lengths
from llm_alignment.processes import processes
from llm_alignment.reference import PAIRS_AT_ONCE
from llm_alignment.training import Setup, TrainingSettings, log_memory_plan, optimiser_steps

log = logging.getLogger("llm_alignment")


def print_dpo_plan(
    setup: Setup, rows: list[dict], evaluations: list[Evaluation], settings: TrainingSettings, dpo: DpoSettings
) -> None:
    """One pair of the `rows` of `fit_pairs` as the model reads it, pairs, steps, tokens, memory, evaluations."""
    trained = 0.0
    if rows:
        first, end = rows[0], setup.tokenizer.eos_token
        log.info("the first pair as the model reads it:\n%s", first["prompt"])
        log.info("chosen: %s%s\nrejected: %s%s", first["chosen"], end, first["rejected"], end)
        trained = log_dpo_training(setup, rows, settings, dpo)
    asked = 0
    for evaluation in evaluations:
        tokens = evaluation.tokens(setup.tokenizer)
        log.info(
            "%s: %d questions before and after, at most %.1f k tokens each time",
            evaluation.name, len(evaluation.items), tokens / 1e3,
        )  # fmt: skip
        asked += 2 * tokens
    if asked:
        log_evaluation_share(asked, trained)


def log_evaluation_share(asked: float, trained: float) -> None:
    """Logs the tokens of all evaluations, and their share of those that go through the model."""
    share = 100 * asked / (asked + trained)
    log.info("evaluation: at most %.2f M tokens, %.0f %% of all that go through the model", asked / 1e6, share)


def log_dpo_training(setup: Setup, rows: list[dict], settings: TrainingSettings, dpo: DpoSettings) -> float:
    """Logs pairs, steps, passes, tokens and memory; returns the tokens that go through the model in training.

    A backward pass of a frozen base costs a forward pass, so it counts as one.
    """
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
    steps = optimiser_steps(settings, len(rows))
    passes = steps * settings.grad_acc * processes()
    epochs = steps * settings.step / len(rows)
    log.info("pairs: %d, %.0f tokens each with the prompt read for each answer", len(rows), statistics.fmean(both))
    log.info(
        "steps: %d of %d pairs each; %d forward and backward passes; the reference: %d forward passes, once per base "
        "and data",
        steps, settings.step, passes, math.ceil(len(rows) / PAIRS_AT_ONCE),
    )  # fmt: skip
    log.info(
        "tokens a step: %.0f of the pairs, %.0f padded as TRL reads them, %.0f read here",
        *(total * epochs / steps for total in (sum(both), padded, read)),
    )
    once = [pair - (0 if dpo.no_prefix_sharing else len(prompt)) for pair, prompt in zip(both, prompts, strict=True)]
    log_memory_plan(dataclasses.replace(settings, longest=max(once)), setup.base, setup.lora)
    return read * (2 * epochs + 1)  # once more for the reference
