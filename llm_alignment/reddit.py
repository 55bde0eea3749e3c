"""Reddit's posts: rows of one post and one comment, evaluation questions, preference pairs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict

from llm_alignment.encoder import NO_TOKENS, text_problem
from llm_alignment.files import digest
from llm_alignment.hub import read_usable
from llm_alignment.messages import check_texts
from llm_alignment.texts import cut_at_word


@dataclasses.dataclass(frozen=True)
class RedditSettings:
    """Which posts are used, and how pairs are made of their comments: the flags of that name."""

    reddit_min_post_chars: int = 120
    reddit_max_post_chars: int = 2000
    reddit_min_comment_chars: int = 40
    reddit_score_margin: float = 0.10
    reddit_length_tol: float = 0.6
    reddit_max_pairs_per_post: int = 1

    def post_text(self, row: dict) -> str:
        """Title and text of a post, cut at a word; "" for one that is too short."""
        text = f"{row['title'].strip()}\n\n{row.get('selftext', '').strip()}".strip()
        text = cut_at_word(text, self.reddit_max_post_chars)
        return text if len(text) >= self.reddit_min_post_chars else ""


def read_comments(source: str, own: re.Pattern[str] = NO_TOKENS) -> list[dict]:
    """The usable rows of `source` (--reddit_dataset), one for each comment; an id that is a number becomes a text."""
    read = functools.partial(read_comment, own=own)
    return read_usable(source, "--reddit_dataset", read, "id, title, body, comment_normalized_score")


def read_comment(row: dict, own: re.Pattern[str] = NO_TOKENS) -> dict:
    """A row of one post and one comment. Raises ValueError with the reason when it cannot be used."""
    if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
        row = {**row, "id": str(row["id"])}
    check_texts(row, ("id", "title", "body"), ("selftext",))
    if problem := text_problem([("user", row.get(name, "")) for name in ("title", "selftext", "body")], own):
        raise ValueError(problem)
    score = row.get("comment_normalized_score")
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        raise ValueError(f"comment_normalized_score {score!r} is not a number")
    return row


def reddit_pairs(rows: list[dict], settings: RedditSettings) -> list[dict[str, str]]:
    """Preference pairs of the posts with at least two comments, sorted by uid; the order of `rows` does not matter.

    chosen is the comment with the best `comment_normalized_score`. rejected are the lowest siblings, at most
    `reddit_max_pairs_per_post`, that lie `reddit_score_margin` or more below it and differ from its length by at most
    `reddit_length_tol` of it; without any, the lowest sibling. A post whose comments are equal in text or in score
    gives no pair.
    """
    posts: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["comment_normalized_score"], row["body"], row["title"])):
        if len(row["body"].strip()) >= settings.reddit_min_comment_chars:
            posts[row["id"]].append(row)
    pairs: list[dict[str, str]] = []
    for post_id, comments in sorted(posts.items()):
        *siblings, best = comments
        prompt, chosen, score = settings.post_text(best), best["body"].strip(), best["comment_normalized_score"]
        worse = [row for row in siblings if row["comment_normalized_score"] < score and row["body"].strip() != chosen]
        near = [
            row
            for row in worse
            if score - row["comment_normalized_score"] >= settings.reddit_score_margin
            and abs(len(row["body"].strip()) - len(chosen)) <= settings.reddit_length_tol * len(chosen)
        ]
        rejected = near[: settings.reddit_max_pairs_per_post] or [row for row in worse if row is siblings[0]]
        for number, row in enumerate(rejected if prompt else ()):
            uid = f"reddit:{post_id}:{number}"
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": row["body"].strip(), "uid": uid})
    return pairs


def hold_out_posts(rows: list[dict], limit: int, settings: RedditSettings) -> tuple[list[dict], list[dict]]:
    """`limit` posts as evaluation questions, chosen by a hash of their id, and the rows of all other posts.

    The choice depends on nothing else, so runs with other seeds ask the same. A question keeps the subreddit, the
    title and, as `reference`, the comment with the best score.
    """
    posts: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: (-row["comment_normalized_score"], row["title"], row["body"])):
        if text := settings.post_text(row):
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
