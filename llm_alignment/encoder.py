"""A conversation as the tokens that are trained on, by the tokenizer's own chat template."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import jinja2

from llm_alignment.conversations import Turns
from llm_alignment.files import InputError, log
from llm_alignment.prompts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)  # an answer begins with it, or has none
EMPTY_BLOCK = re.compile(r"<think>\s*</think>\s*")
# A text whose place in a rendered conversation is looked for, with what a template may change: case, blanks, signs.
STAND_IN = "tuRN  &\n\n<\"{}'>teXT"
STAND_INS = re.compile(re.escape(STAND_IN).replace(r"\{\}", r"(\d+)"))
NO_TOKENS = re.compile(r"\Z.")  # finds nothing
PADDING = "\n \n"
STRIPPED = ("", "\n", None)  # what a template may take from a text's ends: nothing, newlines, all blanks


@dataclass(frozen=True)
class Layout:
    """What a chat template makes of turns with these roles: `between[0]`, turn `order[0]`, `between[1]`, ..."""

    order: list[int]
    between: list[str]  # one more than turns
    stripped: list[tuple[str | None, str | None]]  # what the left and the right end of each turn lose


class ChatEncoder:
    """Turns conversations into tokens and labels as the tokenizer's chat template writes them.

    The template is looked at with stand-ins for the texts; a row's texts then take their places. So they are trained
    on as the row has them, whatever the template does to texts that hold tags, and where each stands is known. Without
    `thinking` every answer begins as it does in evaluation, where the template's generation prompt may end with an
    empty <think></think> block, and thoughts in the data are left out. With `thinking` all thoughts stay, those of
    earlier answers too, and an answer without one has no block. With `assistant_only` the labels are the answers and
    their end of turn alone: what the generation prompt supplies is not a target.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool, assistant_only: bool) -> None:
        self.tokenizer, self.thinking, self.assistant_only = tokenizer, thinking, assistant_only
        self.layouts: dict[tuple[str, ...], Layout | str] = {}  # by the order of roles; a text: why there is none
        self.first = encode("", tokenizer)  # what begins every text, once
        question, answer = ("user", "QUESTION"), ("assistant", "<think>\nTHOUGHT\n</think>\n\nANSWER")
        name = tokenizer.name_or_path
        try:
            asked = self.render([question])
            prompt = self.render([question], add_generation_prompt=True)
            thought = re.search(r"(<think>\s*)THOUGHT(\s*</think>\s*)ANSWER", self.render([question, answer]))
            twice = self._layout(("user", "assistant") * 2)
        except (jinja2.TemplateError, ValueError) as error:
            what = f"its chat template fails on a conversation of two turns ({error})"
            raise InputError(f"--model {name}: {what}; name a chat model") from error
        opening = prompt.removeprefix(commonprefix([asked, prompt]))
        self.header = opening.partition("<think>")[0]  # what begins every assistant turn
        self.supplied = opening.removeprefix(self.header)  # what the generation prompt adds
        self.block = thought.groups() if thought else ("<think>\n", "\n</think>\n\n")  # around a thought
        after = twice.between[2], twice.between[4]
        self.end = commonprefix(after).rstrip()  # what ends every answer, where no token does
        self.own = own_tokens(tokenizer, "".join([prompt, *twice.between]), self.header.strip())
        ends = all(map(self._end, after))
        if not ends or not self.own.search(after[1]):
            why = "ends an answer with no token, so training does not teach the model to stop"
            log.warning("--model %s: its chat template %s; name another, or add the token", name, why)
        begins = self.header and all(self.header in before for before in twice.between[1:4:2])
        if assistant_only and not (begins and ends and tokenizer.is_fast):
            what = f"the chat template of {name} does not mark where an answer begins and ends"
            raise InputError(f"--assistant_only_loss: {what}; leave the flag out")

    def render(self, turns: Turns, **options: Any) -> str:
        """A conversation as the template writes it."""
        messages = [{"role": role, "content": content} for role, content in turns]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=self.thinking, **options)

    def _layout(self, roles: tuple[str, ...]) -> Layout:
        """Raises ValueError when the template does not show each text once and as it is, blanks around it apart."""
        shown = []
        for padding in ("", PADDING):
            texts = [padding + STAND_IN.format(place) + padding for place in range(len(roles))]
            shown.append(STAND_INS.split(self.render(list(zip(roles, texts, strict=True)))))
        order = list(map(int, shown[0][1::2]))
        if sorted(order) != list(range(len(roles))) or shown[0][1::2] != shown[1][1::2]:
            raise ValueError("it leaves out a turn, writes one twice or changes its text")
        between, ends = shown[0][::2], []
        for plain, padded in zip(between, shown[1][::2], strict=True):
            for right, left in itertools.product(STRIPPED, repeat=2):
                if padded == PADDING.rstrip(right) + plain + PADDING.lstrip(left):
                    break  # (before the first turn and after the last there is no padding, as if it were stripped)
            else:
                raise ValueError("it changes the text of a turn")
            ends.append((right, left))
        return Layout(order, between, [(ends[n][1], ends[n + 1][0]) for n in range(len(order))])

    def _opening(self, before: str) -> tuple[str, str]:
        """What stands before an answer: what the generation prompt gives, and what the answer itself begins with."""
        before = EMPTY_BLOCK.sub("", before)
        if not self.header or self.header not in before:
            return before, ""
        opening, header, rest = before.rpartition(self.header)
        return opening + header + self.supplied, rest.removeprefix(self.supplied)

    def _end(self, after: str) -> str:
        """The end of turn in what stands after an answer."""
        token = self.own.match(after, len(after) - len(after.lstrip()))
        return after[: token.end()] if token else self.end if after.startswith(self.end) else ""

    def layout(self, turns: Turns) -> Layout | str:
        """Of a conversation; a text says why the template cannot write it. It is asked once an order of roles."""
        roles = tuple(role for role, _ in turns)
        if roles not in self.layouts:
            try:
                self.layouts[roles] = self._layout(roles)
            except (jinja2.TemplateError, ValueError) as error:
                self.layouts[roles] = f"the chat template refuses it: {error}"
        return self.layouts[roles]

    def refusal(self, turns: Turns) -> str | None:
        """Why a conversation cannot be trained on as the row has it; None when it can."""
        layout = self.layout(turns)
        return layout if isinstance(layout, str) else text_problem(turns, self.own)

    def answer(self, content: str) -> str:
        """An answer as it is trained on, after what the generation prompt supplies."""
        thought, answer = split_thought(content)
        thought = thought if self.thinking else ""
        before, after = self.block
        if self.supplied.count("<think>") > self.supplied.count("</think>"):  # the prompt ends within a thought
            return thought + after + answer.lstrip()
        if thought:
            return before + thought + after + answer
        return answer.lstrip() if self.supplied else answer

    def write(self, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as it is trained on, and where its answers stand with their ends of turn. Raises
        ValueError when the template refuses the conversation."""
        layout = self.layout(turns)
        if isinstance(layout, str):
            raise ValueError(layout)
        text, spans, between = "", [], layout.between
        parts = zip(layout.order, between, between[1:], layout.stripped, strict=False)
        for place, before, after, (left, right) in parts:
            role, content = turns[place]
            content = content.lstrip(left).rstrip(right)
            if role == "assistant":
                before, beginning = self._opening(before)
                content = beginning + self.answer(content)
                start = len(text) + len(before)
                spans.append((start, start + len(content) + len(self._end(after))))
            text += before + content
        return text + layout.between[-1], spans

    def __call__(self, row: dict) -> dict[str, list[int]]:
        """{"input_ids", "labels"} of a row {messages: [{role, content}]}; -100 is not a target."""
        text, spans = self.write([(message["role"], message["content"]) for message in row["messages"]])
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.assistant_only)
        ids = encoded["input_ids"]
        first = [] if ids[:1] == self.first else self.first
        if not self.assistant_only:
            return {"input_ids": first + ids, "labels": first + ids}
        labels = [
            token if any(start <= begin < last <= end for start, end in spans) else -100
            for token, (begin, last) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return {"input_ids": first + ids, "labels": [-100] * len(first) + labels}

    def marked(self, row: dict, max_length: int) -> str:
        """A row as the model reads it, cut to `max_length` tokens; what is trained on stands in [[ ]]."""
        encoded = self(row)
        tokens = list(zip(encoded["input_ids"], encoded["labels"], strict=True))[:max_length]
        shown = ""
        for trained, part in itertools.groupby(tokens, key=lambda token: token[1] != -100):
            text = self.tokenizer.decode([token for token, _ in part])
            shown += f"[[{text}]]" if trained else text
        return shown


def own_tokens(tokenizer: PreTrainedTokenizerBase, written: str = "", header: str = "") -> re.Pattern[str]:
    """Finds the tokens that a text must not spell: the special ones, and those that the template has `written`."""
    if not written:
        turns = [{"role": role, "content": "TEXT"} for role in ("user", "assistant")]
        written = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in written}
    tokens |= {tag for tag in ("<think>", "</think>") if tag in written}
    if re.search(r"\W", header):
        tokens.add(header)
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or NO_TOKENS.pattern)


def text_problem(turns: Turns, own: re.Pattern[str]) -> str | None:
    """Why texts would not be read as they are written: they spell what is the template's `own`; None if they would."""
    for role, text in turns:
        thought = ""
        if role == "assistant":
            thought, text = split_thought(text)
            if not text.strip() or text.lstrip().startswith("<think>"):
                return "an answer has no text outside its <think> block"
            if "<think>" in text or "</think>" in text or "<think>" in thought:
                return "an answer has a <think> tag within its text"
        if found := own.search(thought) or own.search(text):
            return f"a turn contains the chat template's own {found[0]!r}"
    return None


def split_thought(content: str) -> tuple[str, str]:
    """The thought in the <think></think> block that an answer begins with, "" without one, and the answer."""
    found = THOUGHT.match(content)
    return (found[1].strip("\n") if found[1].strip() else "", content[found.end() :]) if found else ("", content)
