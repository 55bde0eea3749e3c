"""What is held out for the evaluations, and the search for training items that contain it."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable

from llm_alignment.files import digest
from llm_alignment.preferences import post_text, transcript

log = logging.getLogger("llm_alignment")


def normalise_text(text: str) -> str:
    """The words of a text in lower case with single spaces: two copies that differ only in form become equal."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def leak_finder(forbidden: dict[str, list[str]]) -> Callable[[str], str | None]:
    """Returns `find(text)`: the kind of the forbidden text whose words follow each other in `text`, or None.

    `forbidden`: texts by kind. A forbidden text is searched only where its rarest word occurs, so half a million rows
    take about a minute.
    """
    kinds = {normalise_text(text): kind for kind, texts in forbidden.items() for text in texts}
    kinds.pop("", None)
    frequency = Counter(word for text in kinds for word in set(text.split()))
    by_word: dict[str, list[str]] = defaultdict(list)
    for text in kinds:
        by_word[min(text.split(), key=lambda word: (frequency[word], word))].append(text)

    def find(text: str) -> str | None:
        text = normalise_text(text)
        for word in sorted(by_word.keys() & set(text.split())):
            for known in by_word[word]:
                if f" {known} " in f" {text} ":
                    return kinds[known]
        return None

    return find


def hold_out_posts(rows: list[dict], limit: int, *, min_chars: int, max_chars: int) -> tuple[list[dict], list[dict]]:
    """`limit` posts as evaluation questions, chosen by a hash of their id, and the rows of all other posts.

    The choice depends on nothing else, so runs with other seeds ask the same. A question keeps the subreddit, the
    title and, as `reference`, the comment with the best score.
    """
    posts: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: (-row["comment_normalized_score"], row["title"], row["body"])):
        text = post_text(row, max_chars)
        if len(text) >= min_chars:
            subreddit = str(row.get("subreddit", ""))
            question = {"question_id": row["id"], "category": subreddit, "turns": [text]}
            kept = {"title": row["title"], "subreddit": subreddit, "reference": row["body"].strip()}
            posts.setdefault(row["id"], question | kept)
    chosen = sorted(posts, key=lambda post_id: digest("evaluation", post_id))[:limit]
    return [posts[post_id] for post_id in chosen], [row for row in rows if row["id"] not in set(chosen)]


def leak_snippet(post: str) -> str:
    """The part of a post to search for: its first forty words without the title, or all of a short post.

    It is found under another title or with another end.
    """
    words = post.partition("\n\n")[2].split()[:40]
    return " ".join(words) if len(words) >= 20 else post


def hold_out_instructions(instructions: list[dict], limit: int) -> tuple[list[dict], list[dict]]:
    """`limit` instructions as evaluation questions, chosen by a hash of their text, and the other instructions.

    A question keeps the user's text as `instruction` and the answer as `reference`. Instructions of less than four
    words are not chosen: too many texts would contain them.
    """
    by_text: dict[str, dict] = {}
    for instruction in sorted(instructions, key=lambda instruction: instruction["uid"]):
        text = normalise_text(instruction["user"])
        if text.count(" ") >= 3:
            by_text.setdefault(text, instruction)
    chosen = [by_text[text] for text in sorted(by_text, key=lambda text: digest("evaluation", text))[:limit]]
    questions = [
        {
            "question_id": instruction["uid"],
            "category": "finance",
            "turns": [instruction["prompt"]],
            "instruction": instruction["user"],
            "reference": instruction["chosen"],
        }
        for instruction in chosen
    ]
    taken = {instruction["uid"] for instruction in chosen}
    return questions, [instruction for instruction in instructions if instruction["uid"] not in taken]


def without_leaks(items: list[dict], find_leak: Callable[[str], str | None], source: str, counts: dict) -> list[dict]:
    """The items that contain no text of an evaluation; the others are counted in `counts` and reported by kind."""
    leaks: Counter[str] = Counter()
    clean = []
    for item in items:
        answers = [item[side] for side in ("chosen", "rejected") if side in item]
        leak = find_leak("\n".join([transcript(item["prompt"]), *answers]))
        if leak:
            leaks[leak] += 1
        else:
            clean.append(item)
    counts[f"{source}_leaks"] = leaks.total()
    kinds = "".join(f", {count} {kind}s" for kind, count in sorted(leaks.items()))
    log.info(
        "%s: %d of %d left out because they contain an evaluation question%s", source, leaks.total(), len(items), kinds
    )
    return clean
