"""Answers in batches: to conversations, and to questions that share a beginning."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import get_head_shapes

from llm_alignment.batches import common_length
from llm_alignment.devices import free_memory
from llm_alignment.models import evaluating, inner_model
from llm_alignment.processes import halved_when_full, main_process
from llm_alignment.prompts import PromptStyle, encode, render

log = logging.getLogger("llm_alignment")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 42
    backend: str = "simple"  # or "auto", see `generate`
    thinking: bool = False
    batch_size: int = 0  # 0: by free memory

    def settings(self, *names: str) -> dict[str, Any]:
        """The fields of these names, for a fingerprint."""
        return {name: getattr(self, name) for name in names}


class Answer(NamedTuple):
    """One answer of `generate`, in an order of its own: `index` is the conversation's place in the list."""

    index: int  # type: ignore[assignment]  # a tuple's method of that name is not used
    text: str  # without the end token; a block of thinking is part of it, see `strip_thinking`
    tokens: int  # new tokens, the end token not counted
    finished: bool  # False: cut at the token limit
    batch_size: int  # most answers at once in one process


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    decoding: Decoding,
    *,
    description: str = "",
) -> Iterator[Answer]:
    """Answers conversations of {role, content} turns that end with the user's; yields each answer when it is ready.

    Temperature 0 is greedy and in float32 does not depend on the batch size; above 0, sampling is seeded. The settings
    a model ships with, such as Qwen3's temperature of 0.6, are ignored. The backend "simple" is `model.generate` on
    batches of similar length that finished rows leave; "auto" is transformers' continuous batching on CUDA, where it
    can be trusted (see `can_run_continuously`), and simple elsewhere. An answer gets at most half of the model's
    context, and a prompt that leaves less room than its answer needs loses its beginning. With a `description` a
    progress bar is shown. After the last answer torch's random state and the model's mode are what they were.
    """
    if not conversations:
        return
    device, context = model.device, model.config.get_text_config().max_position_embeddings
    max_new_tokens = min(decoding.max_new_tokens, context // 2)
    if max_new_tokens < decoding.max_new_tokens:
        why = "half of the model's context; lower the limit"
        log.warning("answers get %d new tokens, not %d: %s", max_new_tokens, decoding.max_new_tokens, why)
    style = PromptStyle(thinking=decoding.thinking)
    prompts = [encode(render(turns, tokenizer, style), tokenizer) for turns in conversations]
    cut = sum(len(prompt) > context - max_new_tokens for prompt in prompts)
    if cut:
        log.warning("%d prompts lost their beginning: the model's context is %d tokens", cut, context)
        prompts = [prompt[-(context - max_new_tokens) :] for prompt in prompts]
    settings = generation_config(tokenizer, decoding)

    def answer_batch(batch: list[int]) -> Iterator[tuple[int, list[int]]]:
        batch_prompts = [prompts[index] for index in batch]
        torch.manual_seed(decoding.seed ^ zlib.crc32(str(batch_prompts).encode()))
        answers = continuous_answers if is_continuous else batched_answers
        return answers(model, batch_prompts, settings, max_new_tokens)

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    is_shown = bool(description) and main_process()
    progress = tqdm(total=len(prompts), desc=description, unit="answer", leave=False, disable=not is_shown)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), progress, evaluating(model):
        shortest = [prompts[index] for index in order[:3]]
        is_continuous = decoding.backend == "auto" and can_run_continuously(model, shortest, settings)
        size = len(order) if is_continuous else decoding.batch_size
        size = size or free_batch_size(model, len(prompts[order[-1]]) + max_new_tokens)
        for index, tokens in halved_when_full(order, size, answer_batch):
            progress.update()
            yield Answer(index, *read_answer(tokens, settings, tokenizer, prompts[index]), size)


def read_answer(
    tokens: list[int], settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, prompt: list[int]
) -> tuple[str, int, bool]:
    """Of the new tokens after a prompt: their text, how many come before an end token, whether there is one. Special
    tokens are left out, but not the tags of thinking, for `strip_thinking`; one that the template opened is added."""
    end = next((place for place, token in enumerate(tokens) if token in settings.eos_token_id), None)
    tokens = tokens[:end]
    added = tokenizer.added_tokens_decoder.items()
    hidden = {token for token, of in added if of.special and of.content not in {"<think>", "</think>"}}
    text = tokenizer.decode([token for token in tokens if token not in hidden]).strip()
    is_open = tokenizer.decode(prompt[-16:]).rstrip().endswith("<think>")
    return f"<think>{text}" if is_open else text, len(tokens), end is not None


def generation_config(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> GenerationConfig:
    """Greedy at temperature 0, else sampling. An answer ends with the template's end of turn (see `load_tokenizer`) or
    the tokenizer's own end of text."""
    own_end = tokenizer.convert_tokens_to_ids(str(tokenizer.init_kwargs.get("eos_token")))
    eos = sorted({own_end, tokenizer.eos_token_id} - {None, tokenizer.unk_token_id})
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how: dict[str, Any] = {"do_sample": decoding.temperature > 0, "use_cache": True, "return_dict_in_generate": True}
    if decoding.temperature > 0:
        how |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    return GenerationConfig(eos_token_id=eos, pad_token_id=pad, **how)


@contextlib.contextmanager
def only_these(model: PreTrainedModel | PeftModel, settings: GenerationConfig) -> Iterator[PreTrainedModel]:
    """The model to generate with, its own settings out of the way: transformers fills gaps in `settings` by them."""
    inner = inner_model(model)
    own, inner.generation_config = inner.generation_config, settings
    try:
        yield inner
    finally:
        inner.generation_config = own


def batched_answers(
    model: PreTrainedModel | PeftModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    max_new_tokens: int,
    *,
    cache: DynamicCache | None = None,
    line_break: torch.Tensor | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (row, new tokens), the end token included, as rows end. `model.generate` pauses whenever a quarter of its
    rows has ended: they leave, and the others go on from their part of the cache. `cache` may hold the prompts,
    left-padded, but for their last tokens. With `line_break` (see `line_break_tokens`) an answer also ends with its
    first line that is not empty."""
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[settings.pad_token_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    eos = torch.tensor(settings.eos_token_id, device=device)
    line_break = None if line_break is None else line_break.to(device)
    rows = list(range(len(prompts)))
    while rows:
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        ends = torch.full((len(rows),), width + max_new_tokens, device=device)

        def pause(input_ids, scores, ended=ended, ends=ends, **_):
            ending = torch.isin(input_ids[:, -1], eos)
            if line_break is not None:
                breaks = line_break[input_ids[:, width:]]
                ending |= breaks[:, -1] & ~breaks.all(dim=1)
            ends[ending & ~ended] = input_ids.shape[1]
            ended |= ending
            return torch.full_like(ended, bool(ended.sum() * 4 >= len(ended)))

        settings.max_new_tokens = width + max_new_tokens - ids.shape[1]
        with only_these(model, settings) as alone:
            output = alone.generate(
                ids, attention_mask=mask, past_key_values=cache, generation_config=settings, stopping_criteria=[pause]
            )
        ids, cache = output.sequences, output.past_key_values
        if ids.shape[1] == width + max_new_tokens:
            ended[:] = True
        for place in ended.nonzero().flatten().tolist():
            yield rows[place], ids[place, width : ends[place]].tolist()
        going = (~ended).nonzero().flatten()
        rows = [rows[place] for place in going.tolist()]
        if rows:
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[going]
            ids = ids[going]
            cache.batch_select_indices(going)


@functools.lru_cache(maxsize=1)
def line_break_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> torch.Tensor:
    """A bool for every token id of a model with a `vocabulary` of that size: whether its text holds a line break."""
    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    line_break = torch.zeros(vocabulary, dtype=torch.bool)
    line_break[[token for token, piece in enumerate(pieces) if "\n" in piece]] = True
    return line_break


def generate_grouped(
    model: PreTrainedModel | PeftModel,
    groups: list[list[list[int]]],
    settings: GenerationConfig,
    max_new_tokens: int,
    line_break: torch.Tensor | None = None,
    *,
    share_prefix: bool = True,
) -> list[list[int]]:
    """The new tokens of every token list of every group, as `batched_answers` gives them, generated in one batch. What
    the lists of a group begin with in common is read once (unless not `share_prefix`)."""
    prompts, cache = [prompt for group in groups for prompt in group], None
    if share_prefix:
        rows = [row for group in groups for row in read_group(model, group, settings.pad_token_id)]
        sides = (zip(*layer, strict=True) for layer in zip(*rows, strict=True))  # of each layer: keys, values
        stack = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        cache = DynamicCache([[stack(list(states)).transpose(1, 2) for states in layer] for layer in sides])
    by_row = dict(batched_answers(model, prompts, settings, max_new_tokens, cache=cache, line_break=line_break))
    return [by_row[row] for row in range(len(prompts))]


RESTS_AT_ONCE = 4  # the lengths differ much, by the passages, so larger batches would mostly read padding


def read_group(model: PreTrainedModel | PeftModel, prompts: list[list[int]], pad_token_id: int) -> list[list]:
    """[keys, values], (tokens, heads, head size), by prompt and layer, less the last token for `generate`. The
    common beginning is read once, the rests in small batches, padded on the right: causal attention needs no mask."""

    def read(tokens: list[list[int]], cache: DynamicCache) -> None:
        ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
        if ids.numel():
            with torch.no_grad():
                inner_model(model)(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    shared = common_length([prompt[:-1] for prompt in prompts])
    prefix = DynamicCache()
    read([prompts[0][:shared]], prefix)
    rows: dict[int, list] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), RESTS_AT_ONCE):
        batch = by_length[start : start + RESTS_AT_ONCE]
        rests = [prompts[index][shared:-1] for index in batch]
        longest = max(map(len, rests))
        cache = DynamicCache([
            [states.expand(len(batch), -1, -1, -1) for states in (layer.keys, layer.values)] for layer in prefix.layers
        ])
        read([rest + [pad_token_id] * (longest - len(rest)) for rest in rests], cache)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        for place, index in enumerate(batch):
            end = len(prompts[index]) - 1
            rows[index] = [[states[place, :, :end].transpose(0, 1) for states in layer] for layer in layers]
    return [rows[index] for index in range(len(prompts))]


def continuous_answers(
    model: PreTrainedModel | PeftModel, prompts: list[list[int]], settings: GenerationConfig, max_new_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """As `batched_answers`, by transformers' continuous batching: a row that ends makes room for the next prompt."""
    settings.max_new_tokens = max_new_tokens
    with only_these(model, settings) as alone:
        outputs = list(alone.generate_batch(prompts, generation_config=settings).values())
    lost = [output.error for output in outputs if output.error] + ["no answer"] * (len(prompts) - len(outputs))
    if lost:
        raise RuntimeError(f"continuous batching lost answers ({lost[0]}); use --mtbench_backend simple")
    for row, output in enumerate(outputs):
        yield row, output.generated_tokens


def can_run_continuously(
    model: PreTrainedModel | PeftModel, prompts: list[list[int]], settings: GenerationConfig
) -> bool:
    """Whether continuous batching can be trusted: on CUDA, with a 4-bit base after a check on a few prompts. Others
    have seen garbage with 4-bit weights there: it must give the first 32 tokens that `batched_answers` gives."""
    if model.device.type != "cuda" or not getattr(model, "is_loaded_in_4bit", False):
        return model.device.type == "cuda"
    greedy = copy.copy(settings)
    greedy.do_sample = False
    try:
        simple, continuous = (dict(way(model, prompts, greedy, 32)) for way in (batched_answers, continuous_answers))
        problem = "" if simple == continuous else "gives other answers"
    except RuntimeError as error:
        problem = f"fails ({error})"
    if problem:
        log.warning("continuous batching %s with this 4-bit base: answering in simple batches", problem)
    return not problem


# Rows answered together when nobody says how many. On CPU more rows save no time, they only pad each other.
MAX_BATCH_SIZE = {"cuda": 128, "cpu": 32}


def free_batch_size(model: PreTrainedModel | PeftModel, tokens: int) -> int:
    """How many rows of `tokens` fit into the GPU's free memory, a power of two up to 128, so that baseline and final
    answers, with a little more or less memory free, mostly get batches of one size; on CPU 32."""
    if model.device.type == "cpu":
        return MAX_BATCH_SIZE["cpu"]
    config = model.config.get_text_config()
    heads, head_size = map(torch.tensor, get_head_shapes(config))  # of all layers, or of each
    numbers = 2 * int((heads * head_size * torch.ones(config.num_hidden_layers)).sum())
    row = numbers * model.dtype.itemsize * tokens + 12 * config.vocab_size
    # half stays free for activations and for copying the cache
    rows = max(1, min(MAX_BATCH_SIZE["cuda"], int(free_memory()[0] / 2 / row)))
    size = 1 << (rows.bit_length() - 1)
    log.info("batches of %d rows of up to %d tokens, by free memory", size, tokens)
    return size
