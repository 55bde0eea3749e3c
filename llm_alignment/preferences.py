"""Preference pairs from any file: formats, turn lists, checks."""

from __future__ import annotations

from llm_alignment.files import digest

GENERAL_COLUMNS = (
    "question, chosen, rejected and perhaps system (as Intel/orca_dpo_pairs); prompt, chosen, rejected; or chosen and "
    "rejected, two dialogues that begin alike (as Anthropic/hh-rlhf)"
)


def general_problem(row: dict) -> str | None:
    """Why a row is no preference pair; None when it is one."""
    has_prompt = "question" in row or "prompt" in row
    if not {"chosen", "rejected"} <= row.keys() or not (has_prompt or is_dialogue(row["chosen"])):
        return f"columns {', '.join(row)}"
    for column in row.keys() & {"system", "question", "prompt", "chosen", "rejected"}:
        if not isinstance(row[column], str | None) and not is_dialogue(row[column]):
            return f"{column} is neither a text nor a list of turns"
    prompt, chosen, rejected = general_texts(row)
    if not (prompt and chosen and rejected):
        return "an empty text, or dialogues that do not begin alike"
    return "equal answers" if chosen == rejected else None


def is_dialogue(value: object) -> bool:
    """True for hh-rlhf's "Human: ... Assistant: ..." and for a list of {role, content} turns."""
    if isinstance(value, list):
        are_turns = all(isinstance(turn, dict) and turn.keys() >= {"role", "content"} for turn in value)
        return bool(value) and are_turns and all(isinstance(turn["content"], str) for turn in value)
    return isinstance(value, str) and ANSWER_MARK in value


ANSWER_MARK = "\n\nAssistant:"


def general_texts(row: dict) -> tuple[str, str, str]:
    """prompt, chosen, rejected of a row; the prompt of a longer dialogue is its transcript."""
    if "question" in row or "prompt" in row:
        answers = [
            row[side][-1]["content"] if isinstance(row[side], list) else row[side] or ""
            for side in ("chosen", "rejected")
        ]
        prompt = folded(row.get("system"), transcript(row["question"] if "question" in row else row["prompt"]))
    else:
        beginnings, _, answers = zip(
            *(transcript(row[side]).rpartition(ANSWER_MARK) for side in ("chosen", "rejected")), strict=True
        )
        prompt = beginnings[0] if beginnings[0] == beginnings[1] else ""
    if ANSWER_MARK not in prompt:
        prompt = prompt.removeprefix("Human:")  # a single question needs no name of who asks
    return prompt.strip(), answers[0].strip(), answers[1].strip()


def transcript(value: str | list[dict] | None) -> str:
    """A text as it is; turns as hh-rlhf writes them."""
    if isinstance(value, list):
        speakers = {"user": "Human", "assistant": "Assistant"}
        value = "\n\n".join(f"{speakers.get(turn['role'], 'System')}: {turn['content']}" for turn in value)
    return (value or "").strip()


def general_pairs(rows: list[dict]) -> list[dict[str, str]]:
    """Preference pairs of usable rows, sorted by uid."""
    pairs = {}
    for row in rows:
        prompt, chosen, rejected = general_texts(row)
        uid = f"general:{digest(prompt, chosen, rejected)[:16]}"
        pairs[uid] = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "uid": uid}
    return [pairs[uid] for uid in sorted(pairs)]


def folded(system: str | None, user: str) -> str:
    """One user turn with the system turn's text before it: the evaluations have no system turn either."""
    return f"{system.strip()}\n\n{user.strip()}" if system and system.strip() else user.strip()


def post_text(row: dict, max_chars: int) -> str:
    """Title and text of a post, cut at a word to `max_chars` characters."""
    text = f"{row['title'].strip()}\n\n{(row['selftext'] or '').strip()}".strip()
    return text if len(text) <= max_chars else text[: max_chars + 1].rsplit(None, 1)[0]
