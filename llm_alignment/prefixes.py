"""What the pairs of a micro-batch begin with is read once: the folded row and its attention. And what a loaded model
can do without another number coming out, asked by a few short rows: share, pack, repeat its cache, anchor."""

from __future__ import annotations

import functools
import itertools
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_alignment.batches import shared_lengths
from llm_alignment.files import is_out_of_memory, log
from llm_alignment.models import evaluating, inner_model, one_line
from llm_alignment.processes import gathered

HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's DPO loss and metrics read


class Block(NamedTuple):
    """One attention call: the next `queries` tokens of the row, over its segments `keys`, one after the other."""

    queries: int
    keys: list[int]  # while the row is built: the places in it
    mask: torch.Tensor | None  # added to the scores (queries, keys); None: causal attention, by torch's fastest kernel


class Fold(NamedTuple):
    """All pairs of a micro-batch as one row of T tokens without padding.

    Two pairs whose prompts begin with the same tokens t; the first continues with a, the second with b. C and R are
    the chosen and the rejected answers. Positions restart after the parent:

        token      t t t t a a C C R R R b C C C R
        position   0 1 2 3 4 5 6 7 6 7 8 4 5 6 7 5
        block      |prompt---| |answers| |rest---|
        sees       t a         t a       t          and itself: an answer never sees the other one

    `segments` are lengths that cut the row wherever places that are seen together begin or end.
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

    The batch is TRL's: (2 B, L), the chosen rows, then the rejected ones, padded on the right, labels -100 outside the
    answers; the outputs are (2 B, L - 1), as TRL's. Only hidden states that predict an answer token go through the LM
    head; without `sharing` that alone is done. It sums in float32: in bf16 rewards of like answers are mostly noise.
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
    # a mask of four dimensions is taken as it is; with blocks it is not read, so that none of (T, T) is made
    mask = torch.empty(1, 1, 1, 1, device=fold.input_ids.device) if fold.mask is None else fold.mask
    by_block = {"fold": fold} if fold.mask is None else {}
    return {"input_ids": fold.input_ids, "position_ids": fold.position_ids, "attention_mask": mask} | by_block


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
        by_kernel, problem = None, one_line(error)
    chunked_logprob._TRITON_AVAILABLE = False
    is_right = by_kernel is not None and torch.allclose(by_kernel, run(), rtol=1e-4, atol=1e-4)
    chunked_logprob._TRITON_AVAILABLE = is_right
    if not is_right:
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
    reads: list[Block] = []
    path: list[int] = []  # where in the row the tokens of the prompt before are

    def append(part: list[int], position: int) -> tuple[int, int]:
        tokens.extend(part)
        positions.extend(range(position, position + len(part)))
        return len(tokens) - len(part), len(tokens)

    order = list(shared_lengths(prompts))
    for pair, shared in order:
        prompt, sides = prompts[pair], (pair, n_pairs + pair)
        begin, end = append(prompt[shared:], shared)
        path = [*path[:shared], *range(begin, end)]
        if prompt and not shared:
            reads.append(Block(len(prompt), path, None))
            begin = end
        answers = [append(rows[side][len(prompt) :], len(prompt)) for side in sides]
        for side, (first, after) in zip(sides, answers, strict=True):
            # the prompt's last token predicts the first of either answer, and the last of an answer nothing
            predictors[side] = [*path[-1:], *range(first, after - 1)]
        queries, (chosen, rejected) = len(tokens) - begin, (after - first for first, after in answers)
        places = [*path, *range(end, len(tokens))]
        hidden = torch.ones(queries, len(places), dtype=torch.bool, device=device).triu(len(places) - queries + 1)
        hidden[queries - rejected :, len(prompt) : len(prompt) + chosen] = True  # the chosen answer, from the rejected
        mask = torch.zeros(1, 1, *hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        reads.append(Block(queries, places, mask))
    steps = (step for _, places, _ in reads for step in itertools.pairwise([-2, *places, -2]))
    cuts = sorted({cut for a, b in steps if b != a + 1 for cut in (a + 1, b)} - {-2, -1})  # where places begin or end
    segment = {cut: number for number, cut in enumerate(cuts)}
    segments = [b - a for a, b in itertools.pairwise(cuts)]
    blocks = [read._replace(keys=[segment[at] for at in read.keys if at in segment]) for read in reads]
    seen = sum(queries * len(places) for queries, places, _ in reads)
    whole = None
    if any(shared for _, shared in order) and len(tokens) ** 2 <= MOST_UNSEEN[device.type] * seen:
        whole = torch.full((1, 1, len(tokens), len(tokens)), float("-inf"), dtype=dtype, device=device)
        parts = whole[0, 0].split([read.queries for read in reads])
        for part, read in zip(parts, reads, strict=True):
            causal = torch.full((read.queries,) * 2, float("-inf"), dtype=dtype, device=device).triu(1)
            part[:, read.keys] = causal if read.mask is None else read.mask
    as_tensor = functools.partial(torch.tensor, device=device)
    return Fold(as_tensor([tokens]), as_tensor([positions]), segments, blocks, whole, as_tensor(sum(predictors, [])))


def prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    fold: Fold | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" attention, with a `fold` block by block. query (1, heads, T, size), key and value (1, key
    heads, T, size) -> (1, T, heads, size)."""
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


Ways = Callable[[PreTrainedModel], list[torch.Tensor]]  # the same hidden states, computed in two ways


def rows_of(model: PreTrainedModel, *lengths: int) -> list[list[int]]:
    """Rows of tokens, of these lengths; no two begin alike."""
    size = model.get_input_embeddings().weight.shape[0]
    return [[(7 * number + 13 * place + 3) % size for place in range(n)] for number, n in enumerate(lengths)]


def read(model: PreTrainedModel, rows: list[list[int]], **inputs: Any) -> torch.Tensor:
    """The last hidden states (rows, tokens, H) of rows of one length."""
    ids = torch.tensor(rows, device=model.device)
    return model.base_model(ids, **{"use_cache": False, **inputs}).last_hidden_state


def problem_of(model: PreTrainedModel | PeftModel, both_ways: Ways, *, alone: bool = False) -> str:
    """Why the second of `both_ways` to the same hidden states cannot stand for the first; "" when they differ by
    rounding: by the square root of the type's precision, relative to their norm. One answer for all processes, which
    ask together, unless `alone`."""
    inner = inner_model(model)
    try:
        with torch.no_grad(), evaluating(model):
            plain, other = (states.float() for states in both_ways(inner))
        distance = ((other - plain).norm() / plain.norm()).item()
        is_near = distance < torch.finfo(inner.dtype).eps ** 0.5
        problem = "" if is_near else f"the hidden states of this model would differ by {distance:.2g} of their norm"
    except Exception as error:  # a model whose code does not know of it fails anywhere
        if is_out_of_memory(error):
            raise
        problem = f"this model fails at it ({type(error).__name__}: {one_line(error)[:80]})"
    return problem if alone else next(filter(None, gathered([problem])), "")


def sharing_problem(model: PreTrainedModel | PeftModel) -> str:
    """Why what pairs begin with cannot be read once by this model; "" when it can."""
    inner = inner_model(model)
    if reason := no_sharing_reason(inner):
        return reason
    start, first, second, *answers = rows_of(inner, 60, 6, 4, 5, 7, 5, 7)  # which make rows of one length

    def both_ways(inner: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
        ids = torch.tensor([*map(operator.add, prompts * 2, answers)], device=inner.device)
        starts = torch.tensor([[len(prompt)] for prompt in prompts * 2], device=inner.device)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=inner.device) < starts, -100)
        plain = read(inner, ids.tolist())[:, :-1][labels[:, 1:] != -100]
        fold, own = fold_pairs(ids, torch.ones_like(ids), labels, inner.dtype), inner.config._attn_implementation
        register_attention(inner)
        try:
            folded = inner.base_model(**folded_inputs(fold), use_cache=False).last_hidden_state[0, fold.predictors]
        finally:
            inner.set_attn_implementation(own)
        return [plain, folded]

    ways = ([start + first, start + second], [first, second])  # in one call, and block by block
    problems = (problem_of(model, functools.partial(both_ways, prompts=prompts)) for prompts in ways)
    return next(filter(None, problems), "")


def packing_problem(model: PreTrainedModel | PeftModel) -> str:
    """Why examples cannot stand in one row of this model, none seeing another; "" when they can."""

    def both_ways(inner: PreTrainedModel) -> list[torch.Tensor]:
        first, second = rows_of(inner, 9, 12)
        places = torch.tensor([[*range(9), *range(12)]], device=inner.device)
        return [read(inner, [second]), read(inner, [first + second], position_ids=places)[:, 9:]]

    return problem_of(model, both_ways)


CACHE_PROBLEMS: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()  # asked once a model


def cache_problem(model: PreTrainedModel | PeftModel) -> str:
    """Why a beginning cannot be read once and its keys and values repeated; "" when they can. Every process asks for
    itself, in the middle of an evaluation: another one may be without a batch."""
    inner = inner_model(model)

    def both_ways(inner: PreTrainedModel) -> list[torch.Tensor]:
        start, *rests = rows_of(inner, 10, 4, 4)
        cache = DynamicCache()
        read(inner, [start], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        plain = read(inner, [start + rest for rest in rests])[:, 10:]
        return [plain, read(inner, rests, past_key_values=cache, use_cache=True)]

    if inner not in CACHE_PROBLEMS:
        CACHE_PROBLEMS[inner] = problem_of(model, both_ways, alone=True)
    return CACHE_PROBLEMS[inner]


def anchor_problem(model: PeftModel) -> str:
    """Why the KL of a fresh adapter is not 0 in training mode, where the base may have dropout; "" when it is 0."""

    def both_ways(inner: PreTrainedModel) -> list[torch.Tensor]:
        rows = rows_of(inner, 12)
        with torch.random.fork_rng([inner.device] if inner.device.type == "cuda" else []):
            inner.train()
            student = read(inner, rows)
            with model.disable_adapter():
                return [read(inner, rows), student]

    return "the base has dropout of its own, so the KL does not begin at 0" if problem_of(model, both_ways) else ""
