"""Preference pairs from any file: formats, turn lists, checks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

from llm_alignment.conversations import is_trained, message_text, read_messages, refuse_needed, unread_fields
from llm_alignment.encoder import NO_TOKENS, split_thought, text_problem
from llm_alignment.files import digest, log
from llm_alignment.hub import read_usable
from llm_alignment.leaks import normalise_text

GENERAL_COLUMNS = (
    "question, chosen, rejected and optionally system (as Intel/orca_dpo_pairs); prompt, chosen, rejected; or chosen "
    "and rejected, two dialogues that differ in their last answer (as Anthropic/hh-rlhf)"
)
COLUMNS = ("system", "question", "prompt", "chosen", "rejected")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))


def read_pairs(source: str, flag: str, *, thinking: bool = False, own: re.Pattern[str] = NO_TOKENS) -> list[dict]:
    """The preference pairs (see `general_pair`) of a JSONL, JSON or Parquet file, a folder of them or a hub data set,
    less rows that cannot be used. Raises InputError, which names `flag`, for a source without a row that can be."""
    read = read_usable(source, flag, lambda row: (row, general_pair(row, thinking=thinking, own=own)), GENERAL_COLUMNS)
    if unread := unread_fields((row for row, _ in read), COLUMNS):
        named = ", ".join(f"{field} ({count} rows)" for field, count in sorted(unread.items()))
        log.info("%s: not read: %s", source, named)
    pairs = distinct_pairs(pair for _, pair in read)
    if len(pairs) < len(read):
        log.info("%s: %d pairs occur again in another form; each is used once", source, len(read) - len(pairs))
    return pairs


def distinct_pairs(pairs: Iterable[dict]) -> list[dict]:
    """The pairs sorted by uid; each once, whatever the form of its prompt (see `normalise_text`)."""
    once: dict[tuple[str, str, str], dict] = {}
    for _, pair in sorted({pair["uid"]: pair for pair in pairs}.items()):
        prompt = normalise_text(text := transcript(pair["prompt"])) or text  # a text may be symbols alone
        once.setdefault((prompt, pair["chosen"], pair["rejected"]), pair)
    return list(once.values())


def general_pair(row: dict, *, thinking: bool = False, own: re.Pattern[str] = NO_TOKENS) -> dict:
    """The pair {"prompt", "chosen", "rejected", "uid"} of a row, with "own_system" where it has a system text. Raises
    ValueError with the reason when it is none. The prompt is all before the last answer, the same on both sides: of a
    single question its text after the system text, of a longer dialogue a list of {role, content} turns, from a user's
    to a user's. A column that is null or empty counts as absent. Without `thinking` answers lose their thoughts, as
    the prompt ends after an empty <think></think> block then. No text may spell a token of the template (`own`)."""
    for side in ("chosen", "rejected"):
        if row.get(side) in (None, "", []):
            raise ValueError(f"{side} is empty" if side in row else f"columns {', '.join(row)}")
    refuse_needed(row, "the row", COLUMNS)
    if row.get("question") and row.get("prompt") and row["question"] != row["prompt"]:
        raise ValueError("question and prompt differ")
    for better, worse in SCORES:
        high, low = row.get(better), row.get(worse)
        if isinstance(high, int | float) and isinstance(low, int | float) and high < low:
            raise ValueError(f"{better} is lower than {worse}")
    prompt = read_turns(row.get("question") or row.get("prompt"), "user", "the prompt")
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:  # hh-rlhf's way to end a prompt
        prompt.pop()
    if not isinstance(row.get("system"), str | None):
        raise ValueError("system is not text")
    prompt[:0] = [{"role": "system", "content": row["system"].strip()}] if row.get("system") else []
    sides = [read_turns(row[side], "assistant", side) for side in ("chosen", "rejected")]
    chosen, rejected = (join_turns(prompt, turns) for turns in sides)
    for turns in () if thinking else (chosen, rejected):
        turns[1::2] = [{**turn, "content": split_thought(turn["content"])[1].strip()} for turn in turns[1::2]]
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before the last turn")
    if chosen == rejected:
        raise ValueError("equal answers")
    if problem := text_problem([(turn["role"], turn["content"]) for turn in (*chosen, rejected[-1])], own):
        raise ValueError(problem)
    turns, answers = chosen[:-1], {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    uid = f"general:{digest(transcript(turns), *answers.values())[:16]}"
    own_system = {"own_system": True} if any(t[:1] and t[0]["role"] == "system" for t in (prompt, *sides)) else {}
    return {"prompt": turns if len(turns) > 1 else turns[0]["content"], **answers, "uid": uid, **own_system}


def read_turns(value: Any, role: str, name: str) -> list[dict[str, str]]:
    """Turns {role, content} of a list of turns or an hh-rlhf dialogue; another text is one turn of `role`. Raises
    ValueError, which names the value by `name`, for a role that is unknown and for what is not text."""
    if value is None:
        return []
    if isinstance(value, str) and re.match(r"\s*Human:", value) and (role == "user" or "\n\nAssistant:" in value):
        _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value.strip())
        value = [{"role": who, "content": text} for who, text in zip(parts[::2], parts[1::2], strict=True)]
    messages = read_messages(value, role, name)
    if role == "assistant" and not is_trained(messages[-1]):
        raise ValueError(f"{name} has a weight of 0")
    return [{"role": message["role"], "content": message_text(message).strip()} for message in messages]


def join_turns(prompt: list[dict[str, str]], side: list[dict[str, str]]) -> list[dict[str, str]]:
    """One dialogue of the prompt and one side, which may repeat the prompt; the system text joins the first question.
    Raises ValueError unless user and assistant take turns, from the user's first to the assistant's last."""
    systems = [list(itertools.takewhile(lambda turn: turn["role"] == "system", turns)) for turns in (prompt, side)]
    prompt, side = prompt[len(systems[0]) :], side[len(systems[1]) :]
    if side[: len(prompt)] == prompt:
        turns = side
    elif side and side[0]["role"] == "assistant":
        turns = prompt + side
    else:
        raise ValueError("the turns do not begin with the prompt")
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("the last turn is not the assistant's")
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("no prompt" if len(turns) == 1 else "user and assistant do not take turns")
    if not all(turn["content"] for turn in turns):
        raise ValueError("an empty turn")
    system = dict.fromkeys(turn["content"] for turn in [*systems[0], *systems[1]])
    return [{"role": "user", "content": merge_system_prompt("\n\n".join(system), turns[0]["content"])}, *turns[1:]]


def transcript(prompt: str | list[dict[str, str]]) -> str:
    """The text of a pair's prompt: a single question as it is, a longer dialogue as hh-rlhf writes it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    speakers = {"user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{speakers[turn['role']]}: {turn['content']}" for turn in prompt)


def merge_system_prompt(system: str | None, user: str) -> str:
    """One user turn with the system turn's text before it: the evaluations have no system turn either."""
    return f"{system.strip()}\n\n{user.strip()}" if system and system.strip() else user.strip()
