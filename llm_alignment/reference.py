"""Log-probabilities of the reference policy, computed once per base and data and kept for later runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.files import ResultFile, digest
from llm_alignment.generation import in_batches
from llm_alignment.models import adapter_sha256, main_process, model_fingerprint, on_main_process

if TYPE_CHECKING:
    from trl import DPOTrainer

# Fixed, so that the numbers do not depend on --batch: another run finds the same ones.
PAIRS_AT_ONCE = 8


def add_reference(args: argparse.Namespace, trainer: DPOTrainer, folder: Path) -> None:
    """Gives every pair of the trainer the log-probabilities of both answers under the reference policy.

    To be called before the first step. They become TRL's columns "ref_chosen_logps" and "ref_rejected_logps", so that
    no step runs the reference. The reference is the base, or, for an adapter that is trained on, that adapter as it is
    now, TRL's copy "ref". The values are kept in `folder`/reference.jsonl and in the baseline cache, by base, adapter
    and the pairs' tokens. All processes share the work; the main one writes.
    """
    trainer.train_dataset = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    rows = trainer.train_dataset.to_list()
    questions = [{"question_id": digest(row)[:32]} for row in rows]
    goes_on = "ref" in trainer.model.peft_config
    fingerprint = {
        **model_fingerprint(args, adapter_sha256(trainer.model) if goes_on else "none"),
        "reference_of": digest(questions),
        "max_length": args.max_length,
        "prefix_sharing": not args.no_prefix_sharing,
    }
    if goes_on:
        fingerprint["scaling"] = digest({name: trainer.model.peft_config["ref"].to_dict()[name] for name in SCALING})

    path, use_cache = folder / "reference.jsonl", not args.no_baseline_cache
    results = ResultFile(path, fingerprint, renew=True, use_cache=use_cache) if main_process() else None
    unread = on_main_process(lambda: results.missing(questions) if results else [])
    missing = {question["question_id"] for question in unread}
    for index, log_probs in in_batches_of_like_prompts(trainer, rows, questions, missing):
        question = questions[index]
        if question["question_id"] in missing:
            missing.remove(question["question_id"])
            if results:
                results.append({**question, "chosen": log_probs[0], "rejected": log_probs[1]})
    if results:
        results.finish()
    references = on_main_process(lambda: results.rows_of(questions) if results else [])
    for side in ("chosen", "rejected"):
        values = [row[side] for row in references]
        trainer.train_dataset = trainer.train_dataset.add_column(f"ref_{side}_logps", values)
    trainer.precompute_ref_logps = True
    if goes_on:
        trainer.model.delete_adapter("ref")


# What an adapter's effect depends on besides its tensors.
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def in_batches_of_like_prompts(
    trainer: DPOTrainer, rows: list[dict], questions: list[dict], missing: set[str]
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yields (index of a row, reference log-probabilities in nats of its chosen and rejected answer).

    Prompts that begin alike are read together. A batch without a `missing` question is left out; the others are the
    same ones in every run, so that a restart finds the same numbers to the bit. All processes take them in turn.
    """
    from tqdm import tqdm

    progress = tqdm(total=len(rows), desc="reference", unit="pair", disable=not (missing and main_process()))

    def run(batch: list[int]) -> Iterator[tuple[int, tuple[float, float]]]:
        progress.update(len(batch))
        if not missing.intersection(questions[index]["question_id"] for index in batch):
            yield from enumerate([(0.0, 0.0)] * len(batch))
            return
        inputs = trainer.data_collator([rows[index] for index in batch])
        inputs = {name: tensor.to(trainer.model.device) for name, tensor in inputs.items()}
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
        yield from enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True))

    order = sorted(range(len(rows)), key=lambda index: rows[index]["prompt_ids"])
    with progress:
        yield from in_batches(order, PAIRS_AT_ONCE, run, split=True)
