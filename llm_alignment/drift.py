"""Drift: how far the tuned model's next-token distributions have moved from the base's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llm_alignment.adapters import adapter_off
from llm_alignment.anchored_loss import fused_nll_kl
from llm_alignment.evaluation import Evaluation, pair_rows, values_of
from llm_alignment.files import digest
from llm_alignment.prompts import PromptStyle, encode, render
from llm_alignment.stats import paired_delta

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("llm_alignment")

REFERENCES = 100  # of each evaluation: enough for an interval, and two forward passes of each


def row_drift(model: PeftModel, input_ids: Sequence[int], labels: Sequence[int]) -> tuple[float, int]:
    """Forward KL(p_base || p_tuned) in nats, in float32 or better, summed over the target positions of one row, and
    their number. It predicts forgetting (Shenfeld et al., https://arxiv.org/abs/2509.04259).

    `input_ids` (tokens,), `labels` (tokens,) the same ids with -100 where there is no target. The base is the model
    with its adapter off."""
    base = model.get_base_model()
    ids = torch.tensor([input_ids], device=model.device)
    targets = torch.tensor(labels[1:], device=model.device)
    count = int((targets != -100).sum())
    if not count:
        return 0.0, 0
    with torch.no_grad(), torch.autocast(model.device.type, model.dtype, enabled=model.device.type == "cuda"):
        tuned = base.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
        with adapter_off(model):
            reference = base.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
    weight = base.get_output_embeddings().weight
    with torch.no_grad():
        _, _, kl = fused_nll_kl(tuned, weight, targets, reference, kl_direction="forward")
    return kl.item() * count, count


def drift_evaluation(rows: list[dict], name: str = "drift") -> Evaluation:
    """The drift, in nats a token, on `rows` of {"question_id", "cluster", "input_ids", "labels"}; the base's is 0."""
    return Evaluation(
        name=name,
        items=rows,
        read=lambda model, tokenizer, items: [
            drift_row(item, *row_drift(model, item["input_ids"], item["labels"])) for item in items
        ],
        settings={"rows": digest(rows)},
        of_base=base_row,
        is_cached=False,
        summarise=lambda rows: {name: sum(row["kl"] for row in rows) / sum(row["tokens"] for row in rows)},
        compare=lambda before, after: {name: compare_drift(before, after)},
        tokens=lambda tokenizer: 2 * sum(len(row["input_ids"]) for row in rows),  # with the adapter and without
    )


def drift_row(item: dict, kl: float, tokens: int) -> dict:
    """{"question_id", "cluster", "kl": the sum over `tokens` targets, in nats, "tokens"}."""
    return {"question_id": item["question_id"], "cluster": item["cluster"], "kl": kl, "tokens": tokens}


def base_row(item: dict) -> dict:
    return drift_row(item, 0.0, sum(label != -100 for label in item["labels"][1:]))


def compare_drift(before: list[dict], after: list[dict]) -> dict:
    """The paired difference of the token-weighted drift. A KL is never negative, so from the base p says little."""
    pairs = pair_rows(before, after)
    mean_tokens = sum(row["tokens"] for _, row in pairs) / len(pairs)
    sides = values_of(pairs, lambda row: row["kl"] / mean_tokens)
    return paired_delta(*sides, clusters=[row["cluster"] for _, row in pairs])


def reference_drift(
    tokenizer: PreTrainedTokenizerBase, evaluations: list[Evaluation], style: PromptStyle, max_length: int
) -> list[Evaluation]:
    """The drift on the reference answers of the evaluations that have them (TAT-QA, Finance-Instruct, Reddit), in a
    list; [] with a log line if none has. Of each the first 100 questions, each answer after its prompt as the
    evaluation shows it. Targets are the answer's tokens."""
    rows = []
    for evaluation in evaluations:
        for question_id, prompt, answer, cluster in evaluation.references[:REFERENCES]:
            shown = prompt if isinstance(prompt, str) else render(prompt, tokenizer, style)
            if row := reference_row(tokenizer, shown, answer, max_length):
                names = {"question_id": f"{evaluation.name} {question_id}", "cluster": f"{evaluation.name} {cluster}"}
                rows.append({**names, **row})
    if not rows:
        log.info("drift is not measured: no evaluation with reference answers is on")
        return []
    return [drift_evaluation(rows)]


def reference_row(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, max_length: int) -> dict | None:
    """{"input_ids", "labels"} of prompt and answer, cut at `max_length` tokens; None when no answer token is left."""
    start = len(encode(prompt, tokenizer))
    ids = encode(prompt + answer, tokenizer)[:max_length]
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]} if len(ids) > start else None
