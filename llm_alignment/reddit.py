"""Reddit's posts: rows of one post and one comment, evaluation questions, preference pairs."""

from __future__ import annotations

import math
from collections import defaultdict

from llm_alignment.files import digest
from llm_alignment.hub import read_usable
from llm_alignment.texts import cut_at_word

REDDIT_COLUMNS = ("id", "title", "body", "comment_normalized_score")  # selftext and subreddit may be absent


def read_comments(source: str) -> list[dict]:
    """The usable rows of `source` (--reddit_dataset), one for each comment; an id that is a number becomes a text."""
    rows = read_usable(source, "--reddit_dataset", reddit_problem, ", ".join(REDDIT_COLUMNS))
    return [{**row, "id": str(row["id"])} for row in rows]


def reddit_problem(row: dict) -> str | None:
    """The reason why a row of one post and one comment cannot be used; None when it can."""
    missing = [column for column in REDDIT_COLUMNS if column not in row]
    if missing:
        return f"missing columns: {', '.join(missing)}"
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        return "id is neither a text nor a whole number"
    for column in ("title", "body", "selftext"):
        if not isinstance(row.get(column, ""), str):
            return f"{column} is not text"
    for column in ("id", "title", "body"):
        if not str(row[column]).strip():
            return f"empty {column}"
    score = row["comment_normalized_score"]
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        return f"comment_normalized_score {score!r} is not a number"
    return None


def post_text(row: dict, max_chars: int) -> str:
    """Title and text of a post, cut at a word to `max_chars` characters."""
    return cut_at_word(f"{row['title'].strip()}\n\n{row.get('selftext', '').strip()}".strip(), max_chars)


def reddit_pairs(
    rows: list[dict],
    *,
    min_post_chars: int = 120,
    min_comment_chars: int = 40,
    max_post_chars: int = 2000,
    score_margin: float = 0.10,
    length_tol: float = 0.6,
    max_pairs_per_post: int = 1,
) -> list[dict[str, str]]:
    """Preference pairs of the posts with at least two comments, sorted by uid; the order of `rows` does not matter.

    chosen is the comment with the best `comment_normalized_score`. rejected are the lowest siblings, at most
    `max_pairs_per_post`, that lie `score_margin` or more below it and differ from its length by at most `length_tol`
    of it; without any, the lowest sibling. A post whose comments are equal in text or in score gives no pair.
    """
    posts: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["comment_normalized_score"], row["body"], row["title"])):
        if len(row["body"].strip()) >= min_comment_chars:
            posts[row["id"]].append(row)
    pairs: list[dict[str, str]] = []
    for post_id, comments in sorted(posts.items()):
        *siblings, best = comments
        prompt, chosen = post_text(best, max_post_chars), best["body"].strip()
        if not siblings or len(prompt) < min_post_chars:
            continue

        def is_worse(row: dict, margin: float = 0.0, best: dict = best, chosen: str = chosen) -> bool:
            gap = best["comment_normalized_score"] - row["comment_normalized_score"]
            return gap > 0 and gap >= margin and row["body"].strip() != chosen

        def is_as_long(row: dict, chosen: str = chosen) -> bool:
            return abs(len(row["body"].strip()) - len(chosen)) <= length_tol * len(chosen)

        near = [row for row in siblings if is_worse(row, score_margin) and is_as_long(row)]
        rejected = near[:max_pairs_per_post] or list(filter(is_worse, siblings[:1]))
        for number, row in enumerate(rejected):
            uid = f"reddit:{post_id}:{number}"
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": row["body"].strip(), "uid": uid})
    return pairs


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
