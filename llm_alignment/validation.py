"""The validation loss before and after training, on the same rows, and how it is compared."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llm_alignment.anchored_loss import fused_nll_kl
from llm_alignment.evaluation import Evaluation, pair_rows, values_of
from llm_alignment.files import digest
from llm_alignment.models import inner_model
from llm_alignment.stats import paired_delta

MOST = 700.0  # nats: the perplexity of a run that diverged is beyond a float


@contextlib.contextmanager
def without_head(model: PeftModel) -> Iterator[None]:
    """Inside, the model returns its last hidden states, (batch, positions, H), instead of logits."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    base.set_output_embeddings(torch.nn.Identity())
    try:
        yield
    finally:
        base.set_output_embeddings(head)


def read_validation(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, items: list[dict], *, collator: Callable
) -> Iterator[dict]:
    """Yields {"question_id", "nll": summed over the row's targets, in nats, "tokens": their number}."""
    inner = inner_model(model)
    weight = inner.get_output_embeddings().weight
    batch = {name: tensor.to(model.device) for name, tensor in collator([item["row"] for item in items]).items()}
    labels = batch.pop("labels")[:, 1:]
    is_cuda = model.device.type == "cuda"
    with torch.no_grad(), without_head(model), torch.autocast(model.device.type, model.dtype, enabled=is_cuda):
        hidden = inner(**batch, use_cache=False).logits[:, :-1]
    for item, row_hidden, row_labels in zip(items, hidden, labels, strict=True):
        nll = fused_nll_kl(row_hidden, weight, row_labels, num_items=1)[1].item()
        yield {"question_id": item["question_id"], "nll": nll, "tokens": int((row_labels != -100).sum())}


def validation_evaluation(name: str, rows: Dataset, collator: Callable, batch_size: int) -> Evaluation:
    """The validation loss of prepared rows: "validation" = those compared, "validation_full" = all, after training."""
    return Evaluation(
        name=name, items=[{"question_id": number, "row": row} for number, row in enumerate(rows)],
        read=functools.partial(read_validation, collator=collator), rows_at_once=lambda model: batch_size,
        settings={"rows": digest(rows[:]), "batch": batch_size}, compare=compare_validation,
        order=lambda item: -len(item["row"]["input_ids"]),  # little padding
        summarise=summarise_full_validation if name == "validation_full" else summarise_validation,
        tokens=lambda tokenizer: sum(map(len, rows["input_ids"])),
    )  # fmt: skip


def summarise_validation(rows: list[dict]) -> dict:
    """Loss in nats a token and perplexity, token-weighted, and the mean of row means as the published runs."""
    loss = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    row_mean = sum(row["nll"] / row["tokens"] for row in rows) / len(rows)
    return {"val_loss": loss, "val_loss_row_mean": row_mean, "ppl": math.exp(min(loss, MOST))}


def summarise_full_validation(rows: list[dict]) -> dict:
    return {"val_loss_full": summarise_validation(rows)["val_loss"], "val_rows_full": len(rows)}


def compare_validation(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Paired differences of the token-weighted validation loss, its exponential, the perplexity, and row means."""
    pairs = pair_rows(before, after)
    mean_tokens = sum(row["tokens"] for _, row in pairs) / len(pairs)
    delta = paired_delta(*values_of(pairs, lambda row: row["nll"] / mean_tokens))
    row_mean = paired_delta(*values_of(pairs, lambda row: row["nll"] / row["tokens"]))
    return {"val_loss": delta, "val_loss_row_mean": row_mean, "ppl": perplexity_delta(pairs, delta)}


def perplexity_delta(pairs: list[tuple[dict, dict]], delta: dict) -> dict:
    """The difference of the perplexities of (before, after) rows; `delta` is that of the validation loss. The
    perplexity before is itself an estimate, which moves the difference. So the interval is that of the jackknife's
    pseudo-values, one a row (Tukey 1958, Bias and confidence in not quite large samples, Ann. Math. Stat. 29, 614). p
    is the loss's: both differences have one sign. So an end stays on the side of 0 on which the loss has it."""
    tokens = np.array([row["tokens"] for _, row in pairs], np.float64)
    nll = np.array(values_of(pairs, lambda row: row["nll"]))
    losses = nll.sum(1) / tokens.sum()
    scale = min(losses.max(), MOST)
    left_out = (nll.sum(1, keepdims=True) - nll) / np.maximum(tokens.sum() - tokens, 1)
    mean, others = (np.diff(np.exp(np.minimum(part, MOST) - scale), axis=0)[0] for part in (losses, left_out))
    own = paired_delta([0.0] * len(pairs), (len(pairs) * mean - (len(pairs) - 1) * others).tolist())
    first, ends = min(losses[0], MOST), {"mean": float(mean) * math.exp(scale), "low": None, "high": None}
    for key, side in (("low", 1), ("high", -1)):
        if delta[key] is not None:  # as if the perplexity before were known, or further out on the same side of 0
            known = math.exp(min(losses[0] + delta[key], MOST) - scale) - math.exp(first - scale)
            found = (known, known if own[key] is None else own[key])
            furthest = min(side * end for end in found if (side * end > 0) == (side * known > 0))
            ends[key] = side * furthest * math.exp(scale)
    return {**delta, **ends}
