"""A row of an SFT data set as a conversation, in the formats in which such rows are usually stored."""

from __future__ import annotations

from typing import Any

from llm_alignment.messages import check_texts, is_given, is_trained, message_text, read_messages, refuse_needed

Turns = list[tuple[str, str]]  # (role, content)

SHAPES = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}; {"conversations": '
    '[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}; {"prompt": ..., "completion": ...}; '
    '{"instruction": ..., "input": ..., "output": ...}'
)
LISTS = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("instruction", "output"))  # question and answer
FORMATS = (*LISTS, *map(", ".join, PAIRS))
COLUMNS = {kind: ("subset", "system", *kind.split(", ")) for kind in FORMATS}  # those that are read of each format
COLUMNS[FORMATS[-1]] += ("input",)


def read_conversation(row: dict) -> tuple[str, Turns]:
    """The format of a row, named by its columns, and its turns: system, user and assistant, an answer at the end.

    Raises ValueError with the reason when it cannot be trained on.
    """
    name = next((name for name in LISTS if is_given(row.get(name))), None)
    pair = next((pair for pair in PAIRS if all(is_given(row.get(name)) for name in pair)), None)
    refuse_needed(row, "the row", () if pair == PAIRS[0] and not name else ("input",))
    if name:
        kind, turns = name, read_turns(row[name], "", name)
    elif pair:
        kind, (asked, answered) = ", ".join(pair), pair
        turns = read_turns(row[asked], "user", asked)
        if pair == PAIRS[1] and is_given(row.get("input")):
            check_texts(row, (asked, "input"))
            turns[-1] = ("user", f"{turns[-1][1]}\n\n{row['input']}")
        turns += read_turns(row[answered], "assistant", answered)
    else:
        empty = next((f"no {name}" for name in LISTS if name in row), None)
        raise ValueError(empty or f"columns {', '.join(row)}")
    if is_given(row.get("system")):
        system = read_turns(row["system"], "system", "system")
        if turns[0][0] == "system" and [turns.pop(0)] != system:
            raise ValueError("two system texts that differ")
        turns[:0] = system
    if turns[-1][0] != "assistant":
        raise ValueError("no answer at the end")
    return kind, turns


def plain_turns(value: Any) -> Turns | None:
    """The short way for messages that are nothing but role and text, as nearly all are; None for others."""
    turns = []
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            return None
        role, text = message["role"], message["content"]
        if role not in ("system", "user", "assistant") or not isinstance(text, str) or not text.strip():
            return None
        turns.append((role, text))
    return turns


def read_turns(value: Any, role: str, name: str) -> Turns:
    """The turns of a list of messages; a text is one turn of `role`. `name` is the column's, for the errors."""
    if plain := plain_turns(value):
        return plain
    turns = []
    for message in read_messages(value, role, name):
        role = message["role"]
        text = message_text(message) if len(message) > 2 or is_given(message.get("content")) else ""
        if not text.strip():
            raise ValueError(f"empty {role} turn")
        if role == "assistant" and not is_trained(message):
            raise ValueError("an answer with a weight of 0")
        turns.append((role, text))
    return turns
