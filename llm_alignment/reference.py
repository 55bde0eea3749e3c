"""Log-probabilities of the reference policy, computed once per base and data and kept for later runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llm_alignment.adapters import adapter_sha256
from llm_alignment.batches import PAIRS_AT_ONCE
from llm_alignment.evaluation import Evaluation, read_items
from llm_alignment.files import digest
from llm_alignment.results import baseline_cache


def add_reference(trainer: Any, folder: Path, *, fingerprint: dict, use_cache: bool) -> None:
    """Gives every pair of the trainer the log-probabilities of both answers under the reference policy.

    `trainer`: a `dpo.SharedPromptTrainer`, before its first step. They become TRL's columns "ref_chosen_logps" and
    "ref_rejected_logps", so that no step runs the reference. The reference is the base, or, for an adapter that is
    trained on, that adapter as it is now, TRL's copy "ref". The values are kept in `folder`/reference.jsonl and in the
    baseline cache, by the base's `fingerprint`, the adapter and the pairs' tokens. All processes share the work.
    """
    pairs = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    items = [{"question_id": digest(row)[:32], "row": row} for row in pairs.to_list()]
    is_continued = "ref" in trainer.model.peft_config
    settings = {"max_length": trainer.args.max_length, "prefix_sharing": trainer.is_shared}
    settings["reference_of"] = digest([{"question_id": item["question_id"]} for item in items])

    def read(model: PeftModel, tokenizer: PreTrainedTokenizerBase, items: list[dict]) -> Iterator[dict]:
        """Yields {"question_id", "chosen", "rejected"}: log-probabilities of both answers, in nats."""
        inputs = trainer.data_collator([item["row"] for item in items])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        sides = (side.tolist() for side in trainer.compute_ref_log_probs(model, inputs))
        for item, chosen, rejected in zip(items, *sides, strict=True):
            yield {"question_id": item["question_id"], "chosen": chosen, "rejected": rejected}

    task = Evaluation(
        name="reference", items=items, read=read, settings=settings,
        order=lambda item: item["row"]["prompt_ids"],  # prompts that begin alike are read together
        rows_at_once=lambda model: PAIRS_AT_ONCE,
    )  # fmt: skip
    fingerprint = {**fingerprint, "adapter": adapter_sha256(trainer.model) if is_continued else "none"}
    cache = baseline_cache({**fingerprint, **settings}) if use_cache else None
    path, tokenizer = folder / "reference.jsonl", trainer.processing_class
    rows = read_items(task, lambda: trainer.model, tokenizer, path, fingerprint=fingerprint, cache=cache)
    for side in ("chosen", "rejected"):
        pairs = pairs.add_column(f"ref_{side}_logps", [row[side] for row in rows])
    trainer.train_dataset, trainer.precompute_ref_logps = pairs, True
    if is_continued:
        trainer.model.delete_adapter("ref")
