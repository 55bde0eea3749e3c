"""Prompts: rendered by the chat template, fitted to a length; answers without their thoughts."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from llm_alignment.batches import common_length
from llm_alignment.files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How prompts are written."""

    use_chat_template: bool = True  # False: a prompt that is a text is read as it is
    thinking: bool = False
    max_prompt_length: int = 2048  # tokens
    system: str = ""  # the system turn of conversations that have none

    @property
    def gap(self) -> str:
        """What stands between prompt and answer."""
        return "" if self.use_chat_template else " "


def strip_thinking(text: str) -> str:
    """The answer without its <think>...</think> block; empty when a block never closes."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    return "" if "<think>" in text else text.strip()


def render(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> str:
    """The prompt as the model reads it: as it is, or as the user's turn of the chat template; turns as they are."""
    if isinstance(prompt, str) and not style.use_chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if style.system:
        turns = [{"role": "system", "content": style.system}, *turns]
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": style.thinking}
    try:
        return tokenizer.apply_chat_template(turns, **how)
    except TemplateError as error:
        if style.system:
            raise InputError(f"--system_prompt: the chat template refuses it ({error}); leave it out") from error
        raise


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a text as `render` gives it, alone or with its answer. The one way from text to tokens. A
    tokenizer that ends every text with a token of its own does not here: a prompt ends where the model is to write.
    One that begins every text so does once, also where the template has written it."""
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    begins = bos is not None and ids[:1] != [bos] and tokenizer("")["input_ids"][:1] == [bos]
    return [bos, *ids] if begins else ids


def pair_tokens(row: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"} of a rendered {"prompt", "chosen", "rejected"}, as TRL cuts them.
    An answer begins where its tokens part from the prompt's, and ends with one end of turn."""
    end, prompt = tokenizer.eos_token, encode(row["prompt"], tokenizer)
    pairs = (row["prompt"] + row[side].removesuffix(end) + end for side in ("chosen", "rejected"))
    chosen, rejected = (encode(text, tokenizer) for text in pairs)
    start = common_length([prompt, chosen, rejected])
    return {"prompt_ids": prompt[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}


def fit_prompt(
    prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, style: PromptStyle, mark: str = ""
) -> tuple[str, list[int], bool]:
    """The prompt as the model reads it, cut to `style.max_prompt_length` tokens; these; whether it was cut. What
    stands before the last `mark` loses its end, so the question stays; a prompt without a mark loses its beginning, a
    list of turns its oldest ones. Raises InputError when the question alone is too long."""
    if isinstance(prompt, list):
        for first in range(0, len(prompt), 2):  # what is left begins with a user's turn
            text = render(prompt[first:], tokenizer, style)
            tokens = encode(text, tokenizer)
            if len(tokens) <= style.max_prompt_length:
                return text, tokens, first > 0
        chat = dataclasses.replace(style, use_chat_template=True)
        return *fit_prompt(prompt[-1]["content"], tokenizer, chat, mark)[:2], True
    place = prompt.rfind(mark) if mark else -1
    kept, tail = (prompt[:place], prompt[place:]) if place >= 0 else (prompt, "")
    while True:
        text = render(kept + tail, tokenizer, style)
        tokens = encode(text, tokenizer)
        excess = len(tokens) - style.max_prompt_length
        if excess <= 0:
            return text, tokens, kept + tail != prompt
        if not kept:
            short = f"{excess} tokens short of the question {tail.strip()[:60]!r} alone"
            raise InputError(f"--max_prompt_length {style.max_prompt_length} is {short}; raise it")
        kept = without_tokens(kept, excess, tokenizer, at_end=place >= 0)


def without_tokens(text: str, count: int, tokenizer: PreTrainedTokenizerBase, *, at_end: bool) -> str:
    """The text without `count` > 0 of its tokens, at its end or at its beginning; "" when it has no more."""
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if count >= len(places):
        return ""
    return text[: places[-count][0]] if at_end else text[places[count - 1][1] :]


def cut_at_word(text: str, max_chars: int) -> str:
    """The first words of a text, at most `max_chars` characters; a first word that is longer is cut within."""
    if len(text) <= max_chars:
        return text
    words = text[: max_chars + 1].rsplit(None, 1)[0]
    return words if len(words) <= max_chars else text[:max_chars]
