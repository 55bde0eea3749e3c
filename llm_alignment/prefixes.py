"""What the pairs of a micro-batch begin with is read once: the folded row and its attention."""

from __future__ import annotations

import functools
import itertools
import logging
import types
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_alignment.batches import shared_lengths

log = logging.getLogger("llm_alignment")

HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's DPO loss and metrics read


class Block(NamedTuple):
    """One attention call: the next `queries` tokens of the row, over the row's segments `keys`, one after the other.

    `mask` is added to the scores (queries, keys); None is plain causal attention, which gets torch's fastest kernel.
    """

    queries: int
    keys: list[int]
    mask: torch.Tensor | None


class Fold(NamedTuple):
    """All pairs of a micro-batch as one row of T tokens without padding.

    Two pairs whose prompts begin with the same tokens t; the first continues with a, the second with b. C and R are
    the chosen and the rejected answers. Positions restart after the parent:

        token      t t t t a a C C R R R b C C C R
        position   0 1 2 3 4 5 6 7 6 7 8 4 5 6 7 5
        block      |prompt---| |answers| |rest---|
        sees       t a         t a       t          and itself: an answer never sees the other one

    `segments` are lengths that cut the row wherever one of the paths from t to an answer begins or ends.
    `predictors` are, for every label that is not -100, in the order of the unfolded rows, the index of the hidden
    state that predicts it.
    """

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    segments: list[int]
    blocks: list[Block]
    mask: torch.Tensor | None  # (1, 1, T, T), all blocks in one call where that is little more arithmetic
    predictors: torch.Tensor  # (labels,)


# Pairs that share something are read in one call where all scores of the row are at most this many times those of the
# blocks. A block costs some twenty operators a layer: on a GPU their launches take longer than the arithmetic.
MOST_UNSEEN = {"cuda": 3.0, "cpu": 1.5}


def add_prefix_sharing(model: PreTrainedModel, *, sharing: bool = True) -> None:
    """Makes the fused forward of `trl.trainer.utils.add_fused_lm_head` read what pairs share once.

    The batch is TRL's: (2 B, L), the B chosen rows and then the B rejected ones, padded on the right, with labels of
    -100 outside the answers; the outputs keep TRL's meaning and shape (2 B, L - 1). Only the hidden states that
    predict an answer token go through the LM head; without `sharing` that alone is done. The head's product is summed
    in float32: in bf16 the rewards of two similar answers are mostly noise.
    """
    from trl.trainer.utils import add_fused_lm_head

    settle_head(model.device)
    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=HEAD_OUTPUTS)
    fused_forward = model.forward
    if sharing:
        register_attention(model)

    # generate() checks its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if not fused_lm_head:
            return fused_forward(*args, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        is_target, device = labels[:, 1:] != -100, labels.device.type
        if sharing:
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
            fold = fold_pairs(input_ids, attention_mask, labels, dtype)
            batch, rows = folded_inputs(fold), fold.predictors
        else:
            batch = {"input_ids": input_ids, "attention_mask": attention_mask}
            rows = torch.nn.functional.pad(is_target, (0, 1)).flatten().nonzero().squeeze(1)

        def keep_rows(module, inputs, output):
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, rows)[None]

        with self.base_model.register_forward_hook(keep_rows):
            output = fused_forward(fused_lm_head=True, shift_labels=labels[:, 1:][is_target][None], **batch, **kwargs)
        for name in HEAD_OUTPUTS:
            output[name] = output[name].new_zeros(is_target.shape).masked_scatter(is_target, output[name])
        return output

    model.forward = types.MethodType(forward, model)


def register_attention(model: PreTrainedModel) -> None:
    """Gives the model the attention that reads a `Fold`."""
    AttentionInterface.register("prefix_sdpa", prefix_attention)
    AttentionMaskInterface.register("prefix_sdpa", sdpa_mask)
    model.set_attn_implementation("prefix_sdpa")


def folded_inputs(fold: Fold) -> dict[str, Any]:
    """The arguments with which a model that `register_attention` has seen reads a fold."""
    batch = {"input_ids": fold.input_ids, "position_ids": fold.position_ids}
    if fold.mask is not None:
        return batch | {"attention_mask": fold.mask}
    # a mask of four dimensions is taken as it is; with blocks it is not read, so that none of (T, T) is made
    return batch | {"attention_mask": torch.empty(1, 1, 1, 1, device=fold.input_ids.device), "fold": fold}


def settle_head(device: torch.device) -> None:
    """Tries TRL's Triton kernel of the LM head, which needs a C compiler and Python's headers, on four rows. Where it
    fails, or its numbers are not those of TRL's tiles, the process takes the tiles, with one line."""
    from trl.kernels import chunked_logprob

    if not chunked_logprob._use_triton(device):
        return
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator).to(device) for rows in (4, 1500))

    def run() -> torch.Tensor:
        states, labels = hidden.clone().requires_grad_(), torch.arange(4, device=device)
        inputs = states, weight, None, labels, 1.0, 1024, None, 1.0, HEAD_OUTPUTS
        log_probs, *others = chunked_logprob.ChunkedLogProbFunction.apply(*inputs)
        (gradient,) = torch.autograd.grad(log_probs.sum(), states)
        return torch.cat([log_probs.detach(), gradient.flatten(), *(part for part in others if part is not None)])

    try:
        by_kernel, problem = run(), "it computes something else"
    except Exception as error:  # Triton and the compiler behind it raise anything
        by_kernel, problem = None, str(error).strip().partition("\n")[0] or type(error).__name__
    chunked_logprob._TRITON_AVAILABLE = False
    if by_kernel is not None and torch.allclose(by_kernel, run(), rtol=1e-4, atol=1e-4):
        chunked_logprob._TRITON_AVAILABLE = True
    else:
        log.warning("TRL's Triton kernel of the LM head does not work here (%s); its tiles are used", problem)


def fold_pairs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> Fold:
    """Folds B pairs, given as TRL's (2 B, L) batch, into one row; masks have the type `dtype` of the attention."""
    device, n_pairs = input_ids.device, len(input_ids) // 2
    rows = [row[:end] for row, end in zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)]
    starts = (labels != -100).int().argmax(dim=1)[:n_pairs].tolist()
    prompts = [rows[pair][:start] for pair, start in enumerate(starts)]
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[list[int]] = [[]] * len(rows)
    reads: list[tuple[int, list[tuple[int, int]], torch.Tensor | None]] = []  # queries, path and mask of each block
    path: list[tuple[int, int]] = []  # where in the row the tokens of the prompt before are, as (start, end) ranges

    def append(part: list[int], position: int) -> tuple[int, int]:
        """Where it is in the row."""
        tokens.extend(part)
        positions.extend(range(position, position + len(part)))
        return len(tokens) - len(part), len(tokens)

    order = list(shared_lengths(prompts))
    for pair, shared in order:
        prompt, sides = prompts[pair], (pair, n_pairs + pair)
        begin, end = append(prompt[shared:], shared)
        path = beginning(path, shared) + [(begin, end)] * (begin < end)
        if prompt and not shared:
            reads.append((len(prompt), path, None))
            begin = end
        answers = [append(rows[side][len(prompt) :], len(prompt)) for side in sides]
        for side, (first, after) in zip(sides, answers, strict=True):
            # the prompt's last token predicts the first of either answer, and the last of an answer nothing
            predictors[side] = [*(last - 1 for _, last in path[-1:]), *range(first, after - 1)]
        queries, (chosen, rejected) = len(tokens) - begin, (after - first for first, after in answers)
        mask = answers_mask(len(prompt), chosen, rejected, queries, dtype, device)
        reads.append((queries, [*path, (end, len(tokens))], mask))
    cuts = sorted({place for _, path, _ in reads for range_ in path for place in range_})
    number = {cut: index for index, cut in enumerate(cuts)}
    segments = [b - a for a, b in itertools.pairwise(cuts)]
    blocks = [
        Block(queries, [segment for a, b in path for segment in range(number[a], number[b])], mask)
        for queries, path, mask in reads
    ]
    seen = sum(block.queries * segments[segment] for block in blocks for segment in block.keys)
    in_one_call = any(shared for _, shared in order) and len(tokens) ** 2 <= MOST_UNSEEN[device.type] * seen
    return Fold(
        torch.tensor([tokens], device=device),
        torch.tensor([positions], device=device),
        segments,
        blocks,
        whole_mask(blocks, segments, dtype, device) if in_one_call else None,
        torch.tensor(sum(predictors, []), device=device),
    )


def beginning(path: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The ranges of the first `length` places of a path."""
    kept = []
    for start, end in path:
        if length > 0:
            kept.append((start, min(end, start + length)))
            length -= end - start
    return kept


def answers_mask(
    prompt: int, chosen: int, rejected: int, queries: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What the last `queries` tokens of prompt, chosen and rejected answer (their lengths) see: 0, else -inf.

    Shape (1, 1, queries, prompt + chosen + rejected). Causal, and the chosen answer is hidden from the rejected one.
    """
    length = prompt + chosen + rejected
    hidden = torch.ones(queries, length, dtype=torch.bool, device=device).triu(length - queries + 1)
    hidden[queries - rejected :, prompt : prompt + chosen] = True
    return torch.zeros(1, 1, queries, length, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def whole_mask(blocks: list[Block], segments: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The masks of all blocks as one for the whole row, (1, 1, T, T): 0, else -inf."""
    mask = torch.full((sum(segments),) * 2, float("-inf"), dtype=dtype, device=device)
    columns = torch.arange(sum(segments), device=device).split(segments)
    rows = mask.split([block.queries for block in blocks])
    for block, row in zip(blocks, rows, strict=True):
        causal = torch.full((block.queries,) * 2, float("-inf"), dtype=dtype, device=device).triu(1)
        row[:, torch.cat([columns[segment] for segment in block.keys])] = causal if block.mask is None else block.mask
    return mask[None, None]


def prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    fold: Fold | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" attention, of the folded row block by block when there is a `fold`.

    query (1, heads, T, head size), key and value (1, key heads, T, head size) -> (1, T, heads, head size).
    """
    if fold is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    keys, values = key.split(fold.segments, dim=2), value.split(fold.segments, dim=2)
    queries = query.split([block.queries for block in fold.blocks], dim=2)
    outputs = []
    for block, part in zip(fold.blocks, queries, strict=True):
        path = [torch.cat([states[segment] for segment in block.keys], dim=2) for states in (keys, values)]
        outputs.append(sdpa_attention_forward(module, part, *path, block.mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def no_sharing_reason(model: PreTrainedModel) -> str | None:
    """Why this model cannot read a beginning once, as far as its config tells; None when nothing speaks against it."""
    config = model.config.get_text_config()
    if config._attn_implementation not in {"sdpa", "prefix_sdpa"}:
        return f"the attention backend is {config._attn_implementation}, not sdpa"
    fields = config.to_dict()
    if fields.get("sliding_window") or set(fields.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        return "the model has layers without full attention"
    if fields.get("router_aux_loss_coef"):
        return "the loss of its router counts every token of both answers"
    return None


def no_packing_reason(model: PreTrainedModel) -> str | None:
    """Why examples in one row would see each other, as far as the config tells; None when nothing speaks for it."""
    kinds = set(model.config.get_text_config().to_dict().get("layer_types") or [])
    if model._is_stateful or not kinds <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return "the model has layers that carry a state from one example into the next"
    return None
