"""What a loaded model can do without another number coming out, asked by a few short rows: share, pack, anchor."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from llm_alignment.files import is_out_of_memory
from llm_alignment.models import evaluating, inner_model, one_line
from llm_alignment.prefixes import fold_pairs, folded_inputs, no_sharing_reason, register_attention
from llm_alignment.processes import gathered


def rows_of(model: PreTrainedModel, *lengths: int) -> list[list[int]]:
    """Rows of tokens, of these lengths; no two begin alike."""
    size = model.get_input_embeddings().weight.shape[0]
    return [[(7 * number + 13 * place + 3) % size for place in range(n)] for number, n in enumerate(lengths)]


def read(model: PreTrainedModel, rows: list[list[int]], **inputs: Any) -> torch.Tensor:
    """The last hidden states (rows, tokens, H) of rows of one length."""
    ids = torch.tensor(rows, device=model.device)
    return model.base_model(ids, **{"use_cache": False, **inputs}).last_hidden_state


def problem_of(model: PreTrainedModel | PeftModel, both_ways: Callable[[PreTrainedModel], list[torch.Tensor]]) -> str:
    """Why the second of `both_ways` to the same hidden states cannot stand for the first; "" when they differ by
    rounding: by the square root of the type's precision, relative to their norm."""
    inner, problem = inner_model(model), ""
    try:
        with torch.no_grad(), evaluating(model):
            plain, other = (states.float() for states in both_ways(inner))
        distance = ((other - plain).norm() / plain.norm()).item()
        if not distance < torch.finfo(inner.dtype).eps ** 0.5:
            problem = f"the hidden states of this model would differ by {distance:.2g} of their norm"
    except Exception as error:  # a model whose code does not know of it fails anywhere
        if is_out_of_memory(error):
            raise
        problem = f"this model fails at it ({type(error).__name__}: {one_line(error)[:80]})"
    return problem


def agreed(problem: str) -> str:
    """One answer for all processes, which ask together."""
    return next(filter(None, gathered([problem])), "")


def sharing_problem(model: PreTrainedModel | PeftModel) -> str:
    """Why what pairs begin with cannot be read once by this model; "" when it can."""
    inner = inner_model(model)
    if reason := no_sharing_reason(inner):
        return reason
    # prompts and answers that make rows of one length
    start, first, second, *answers = rows_of(inner, 60, 6, 4, 5, 7, 5, 7)

    def both_ways(inner: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
        ids = torch.tensor([*map(operator.add, prompts * 2, answers)], device=inner.device)
        starts = torch.tensor([[len(prompt)] for prompt in prompts * 2], device=inner.device)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=inner.device) < starts, -100)
        plain = read(inner, ids.tolist())[:, :-1][labels[:, 1:] != -100]
        fold = fold_pairs(ids, torch.ones_like(ids), labels, inner.dtype)
        own = inner.config._attn_implementation
        register_attention(inner)
        try:
            folded = inner.base_model(**folded_inputs(fold), use_cache=False).last_hidden_state[0, fold.predictors]
        finally:
            inner.set_attn_implementation(own)
        return [plain, folded]

    for prompts in ([start + first, start + second], [first, second]):  # in one call, and block by block
        if problem := agreed(problem_of(model, functools.partial(both_ways, prompts=prompts))):
            return problem
    return ""


def packing_problem(model: PreTrainedModel | PeftModel) -> str:
    """Why examples cannot stand in one row of this model, none seeing another; "" when they can."""

    def both_ways(inner: PreTrainedModel) -> list[torch.Tensor]:
        first, second = rows_of(inner, 9, 12)
        places = torch.tensor([[*range(9), *range(12)]], device=inner.device)
        return [read(inner, [second]), read(inner, [first + second], position_ids=places)[:, 9:]]

    return agreed(problem_of(model, both_ways))


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
        CACHE_PROBLEMS[inner] = problem_of(model, both_ways)
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

    has_dropout = agreed(problem_of(model, both_ways))
    return "the base has dropout of its own, so the KL does not begin at 0" if has_dropout else ""
