"""The drift from the base: forward KL on given tokens."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llm_alignment.adapters import adapter_off
from llm_alignment.anchored_loss import fused_nll_kl
from llm_alignment.evaluation import Evaluation, pair_rows, values_of
from llm_alignment.files import digest, log
from llm_alignment.prompts import PromptStyle, encode, render
from llm_alignment.stats import paired_delta

REFERENCES = 100  # of each evaluation: enough for an interval, and two forward passes of each


def row_drift(model: PeftModel, row: dict) -> tuple[float, int]:
    """Forward KL(p_base || p_tuned) in nats, in float32 or better, summed over the target positions of one row, and
    their number. It predicts forgetting (Shenfeld et al., https://arxiv.org/abs/2509.04259). `input_ids` (tokens,),
    `labels` (tokens,) the same ids with -100 where there is no target. The base is the model with its adapter off."""
    base, device = model.get_base_model(), model.device
    ids, targets = torch.tensor([row["input_ids"]], device=device), torch.tensor(row["labels"][1:], device=device)
    count = int((targets != -100).sum())
    if not count:
        return 0.0, 0
    with torch.no_grad():
        with torch.autocast(device.type, model.dtype, enabled=device.type == "cuda"):
            tuned = base.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
            with adapter_off(model):
                reference = base.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
        _, _, kl = fused_nll_kl(tuned, base.get_output_embeddings().weight, targets, reference, kl_direction="forward")
    return kl.item() * count, count


def drift_evaluation(rows: list[dict], name: str = "drift") -> Evaluation:
    """The drift, in nats a token, on `rows` of {"question_id", "cluster", "input_ids", "labels"}; the base's is 0. A
    row: {"question_id", "cluster", "kl": the sum over `tokens` targets, in nats, "tokens"}. The difference is
    token-weighted. A KL is never negative, so from the base its p says little."""

    def of_base(item: dict) -> dict:
        tokens = sum(label != -100 for label in item["labels"][1:])
        return {"question_id": item["question_id"], "cluster": item["cluster"], "kl": 0.0, "tokens": tokens}

    def compare(before: list[dict], after: list[dict]) -> dict[str, dict]:
        pairs = pair_rows(before, after)
        mean_tokens = sum(row["tokens"] for _, row in pairs) / len(pairs)
        sides = values_of(pairs, lambda row: row["kl"] / mean_tokens)
        return {name: paired_delta(*sides, clusters=[row["cluster"] for _, row in pairs])}

    return Evaluation(
        name=name, items=rows, settings={"rows": digest(rows)}, is_cached=False, of_base=of_base, compare=compare,
        read=lambda model, tokenizer, items: [of_base(item) | {"kl": row_drift(model, item)[0]} for item in items],
        summarise=lambda rows: {name: sum(row["kl"] for row in rows) / sum(row["tokens"] for row in rows)},
        tokens=lambda tokenizer: 2 * sum(len(row["input_ids"]) for row in rows),  # with the adapter and without
    )  # fmt: skip


def reference_drift(
    tokenizer: PreTrainedTokenizerBase, evaluations: list[Evaluation], style: PromptStyle, max_length: int
) -> list[Evaluation]:
    """The drift on the tokens of the first 100 reference answers of each evaluation that has them (TAT-QA,
    Finance-Instruct, Reddit), after their prompts as it shows them, in a list; [] with a log line if none has."""
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
