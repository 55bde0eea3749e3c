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


def plain(text: str) -> str:
    """The words of a text in lower case with single spaces: what is left when two copies differ in form alone."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def leak_finder(forbidden: dict[str, list[str]]) -> Callable[[str], str | None]:
    """Returns `find(text)`: the kind of a forbidden text whose words stand in `text` one after the other, or None.

    A forbidden text is looked for only where its rarest word occurs, so half a million rows take about a minute.
    """
    kinds = {plain(text): kind for kind, texts in forbidden.items() for text in texts}
    kinds.pop("", None)
    frequency = Counter(word for text in kinds for word in set(text.split()))
    by_word = defaultdict(list)
    for text in kinds:
        by_word[min(text.split(), key=lambda word: (frequency[word], word))].append(text)

    def find(text: str) -> str | None:
        text = plain(text)
        for word in sorted(by_word.keys() & set(text.split())):
            for known in by_word[word]:
                if f" {known} " in f" {text} ":
                    return kinds[known]
        return None

    return find


def set_posts_aside(rows: list[dict], limit: int, *, min_chars: int, max_chars: int) -> tuple[list[dict], list[dict]]:
    """`limit` posts as questions, chosen by a hash of their id, and the rows of all other posts.

    The choice depends on nothing else, so that runs with other seeds are asked the same.
    """
    posts = {}
    for row in sorted(rows, key=lambda row: (row["title"], row.get("selftext", ""), str(row.get("subreddit", "")))):
        text = post_text(row, max_chars)
        if len(text) >= min_chars:
            question = {"question_id": row["id"], "category": str(row.get("subreddit", "")), "turns": [text]}
            posts.setdefault(row["id"], question)
    chosen = sorted(posts, key=lambda post_id: digest("evaluation", post_id))[:limit]
    return [posts[post_id] for post_id in chosen], [row for row in rows if row["id"] not in set(chosen)]


def recognisable(post: str) -> str:
    """What gives a post away under another title or with another end: its first forty words, or all of a short one."""
    words = post.partition("\n\n")[2].split()[:40]
    return " ".join(words) if len(words) >= 20 else post


def set_lessons_aside(lessons: list[dict], limit: int) -> tuple[list[dict], list[dict]]:
    """`limit` instructions as questions, chosen by a hash of their text, and the others.

    Shorter ones than four words are not chosen: too many texts would contain them.
    """
    by_text = {}
    for lesson in sorted(lessons, key=lambda lesson: lesson["uid"]):
        text = plain(lesson["user"])
        if text.count(" ") >= 3:
            by_text.setdefault(text, lesson)
    chosen = [by_text[text] for text in sorted(by_text, key=lambda text: digest("evaluation", text))[:limit]]
    questions = [
        {"question_id": lesson["uid"], "category": "finance", "turns": [lesson["prompt"]], "user": lesson["user"]}
        for lesson in chosen
    ]
    taken = {lesson["uid"] for lesson in chosen}
    return questions, [lesson for lesson in lessons if lesson["uid"] not in taken]


def without_leaks(items: list[dict], find_leak: Callable[[str], str | None], source: str, counts: dict) -> list[dict]:
    """The items that contain nothing the evaluations ask; the others are counted and reported by kind."""
    leaks, clean = Counter(), []
    for item in items:
        answers = [item[side] for side in ("chosen", "rejected") if side in item]
        leak = find_leak("\n".join([transcript(item["prompt"]), *answers]))
        if leak:
            leaks[leak] += 1
        else:
            clean.append(item)
    counts[f"{source}_leaks"] = leaks.total()
    log.info("%s: %d of %d left out because the evaluations ask what they contain%s", source, leaks.total(), len(items),
             "".join(f", {count} {kind}s" for kind, count in sorted(leaks.items())))  # fmt: skip
    return clean
