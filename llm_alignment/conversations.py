"""The messages of a data row, in the formats in which they are usually stored, and SFT rows as conversations."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from llm_alignment.leaks import normalise_text

# Fields without which the text of a message, or of the row around it, means something else.
NEEDED = {"tool_calls", "function_call", "tool_call_id", "tools", "functions", "refusal", "history", "input"}
NEEDED |= {"image", "images", "audio", "audios", "video", "videos", "documents"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TRAINED = ("weight", "train")  # 0 or false: not to be trained on
ROLES = {"system": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
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


def is_given(value: Any) -> bool:
    """Whether a field says something: null and what is empty count as absent."""
    return value is not None and value not in ("", [], {})


def refuse_needed(fields: dict, what: str, read: Collection[str] = ()) -> None:
    """Raises ValueError, naming `what`, where a message or a row has a field that changes what its text means."""
    if NEEDED.isdisjoint(fields):  # nearly always, and every message is asked
        return
    given = {name for name, value in fields.items() if is_given(value) and value is not False}
    if needed := sorted(NEEDED & given - set(read)):
        raise ValueError(f"{what} has {' and '.join(needed)}")


def check_texts(row: dict, needed: Collection[str], others: Collection[str] = ()) -> None:
    """Raises ValueError unless the columns `needed` are texts that are not empty, and `others`, where given, texts."""
    if missing := [column for column in needed if column not in row]:
        raise ValueError(f"missing columns: {', '.join(missing)}")
    for column in (*needed, *others):
        if not isinstance(row.get(column, ""), str):
            raise ValueError(f"{column} is not text")
        if column in needed and not row[column].strip():
            raise ValueError(f"empty {column}")


def unread_fields(rows: Iterable[dict], read: Collection[str]) -> Counter[str]:
    """In how many rows each field stands that nothing reads: columns beside `read`, and message fields of these."""
    unread: Counter[str] = Counter()
    for row in rows:
        fields = {name for name, value in row.items() if name not in read and is_given(value)}
        for column in read:
            for message in message_list(row.get(column)) or []:
                known = {"role", "content", *(THOUGHTS if message["role"] == "assistant" else ())}
                fields |= {f"{column}.{name}" for name in message.keys() - known if is_given(message[name])}
        unread.update(fields)
    return unread


def message_list(value: Any) -> list[dict] | None:
    """The messages [{"role", "content", ...}, ...] of a column, also of a JSON text, of {"role": [...], "content":
    [...]}, as Arrow stores a sequence of structs, and of ShareGPT's {"from", "value"}; None when it holds none."""
    fields = {"role"}
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        fields = {"role", "content"}  # else it is an answer in JSON
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, dict) and len({len(column) for column in value.values() if isinstance(column, list)}) == 1:
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        value = [dict(zip(columns, message, strict=True)) for message in zip(*columns.values(), strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    names = {"from": "role", "value": "content"}
    messages = [{names.get(name, name): field for name, field in message.items()} for message in value]
    return messages if all(fields <= message.keys() for message in messages) else None


def read_messages(value: Any, role: str, name: str) -> list[dict]:
    """The `message_list` of a column with roles by `ROLES`; a text is one message of `role`, where there is one.
    Raises ValueError, which names the column by `name`, for what holds no messages, and for an unknown role."""
    messages = message_list(value)
    if messages is None and role and isinstance(value, str):
        return [{"role": role, "content": value}]
    if messages is None:
        raise ValueError(f"{name} is neither a text nor a list of turns" if role else f"{name} holds no turns")
    for message in messages:
        known = ROLES.get(str(message["role"]).lower())
        if known is None:
            raise ValueError(f"{name} has a turn of unknown role {message['role']!r}")
        message["role"] = known
    return messages


def message_text(message: dict) -> str:
    """The text of a message, which is a text or parts [{"type": "text", "text": ...}]; an assistant's thoughts in a
    field of their own stand in a <think> block before it. Raises ValueError with the reason when the content is not
    text, or when a field changes what it means."""
    refuse_needed(message, "a turn")
    text, thoughts = message.get("content"), [message[name] for name in THOUGHTS if message.get(name)]
    if isinstance(text, list) and text and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        parts = [part.get("text") for part in text]
        text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(text, str):
        raise ValueError("a turn whose content is not text")
    if not thoughts or message["role"] != "assistant":
        return text
    if len(thoughts) > 1 or not isinstance(thoughts[0], str) or "<think>" in text:
        raise ValueError("a turn whose thoughts are given twice or are not text")
    return f"<think>\n{thoughts[0].strip()}\n</think>\n\n{text.strip()}"


def is_trained(message: dict) -> bool:
    """Whether a message may be trained on: not with a weight of 0."""
    return all(message.get(name) is None or bool(message[name]) for name in TRAINED)


def read_conversation(row: dict) -> tuple[str, Turns]:
    """The format of a row, named by its columns, and its turns: system, user and assistant, an answer at the end.
    Raises ValueError with the reason when it cannot be trained on."""
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
        raise ValueError(next((f"no {name}" for name in LISTS if name in row), None) or f"columns {', '.join(row)}")
    if is_given(row.get("system")):
        system = read_turns(row["system"], "system", "system")
        if turns[0][0] == "system" and [turns.pop(0)] != system:
            raise ValueError("two system texts that differ")
        turns[:0] = system
    if turns[-1][0] != "assistant":
        raise ValueError("no answer at the end")
    return kind, turns


def read_turns(value: Any, role: str, name: str) -> Turns:
    """The turns of a list of messages; a text is one turn of `role`. `name` is the column's, for the errors."""
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


def prompt_of(turns: Turns) -> Turns:
    """The turns up to the first answer to a user; all turns when no user is answered."""
    roles = [role for role, _ in turns]
    return turns[: roles.index("assistant", roles.index("user"))] if "user" in roles else turns


def prompt_form(turns: Turns) -> str:
    """The prompt of a conversation in one form: equal ones stand on one side of the split."""
    return "\0".join(f"{role} {normalise_text(text) or text}" for role, text in prompt_of(turns))
