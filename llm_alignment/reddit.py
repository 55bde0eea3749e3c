"""Reddit posts and comments: their rows, the posts that are asked, preference pairs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

from llm_alignment.conversations import check_texts
from llm_alignment.encoder import NO_TOKENS, text_problem
from llm_alignment.files import digest
from llm_alignment.prompts import cut_at_word

COLUMNS = "id, title, body, comment_normalized_score"


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


def read_comment(row: dict, own: re.Pattern[str] = NO_TOKENS) -> dict:
    """A row of a post and a comment, an id that is a number made a text. ValueError says why it cannot be used."""
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
    `reddit_max_pairs_per_post`, that lie `reddit_score_margin` or more below it, up to rounding, and differ from its
    length by at most `reddit_length_tol` of it; else the lowest sibling. Equal texts or scores give no pair."""
    posts: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["comment_normalized_score"], row["body"], row["title"])):
        if len(row["body"].strip()) >= settings.reddit_min_comment_chars:
            posts[row["id"]].append(row)
    pairs: list[dict[str, str]] = []
    for post_id, comments in sorted(posts.items()):
        *siblings, best = comments
        prompt, chosen, score = settings.post_text(best), best["body"].strip(), best["comment_normalized_score"]
        worse = [row for row in siblings if row["comment_normalized_score"] < score and row["body"].strip() != chosen]
        far = (row for row in worse if score - row["comment_normalized_score"] >= settings.reddit_score_margin - 1e-9)
        most = settings.reddit_length_tol * len(chosen)
        near = [row for row in far if abs(len(row["body"].strip()) - len(chosen)) <= most]
        rejected = near[: settings.reddit_max_pairs_per_post] or [row for row in worse if row is siblings[0]]
        for number, row in enumerate(rejected if prompt else ()):
            uid = f"reddit:{post_id}:{number}"
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": row["body"].strip(), "uid": uid})
    return pairs


def hold_out_posts(rows: list[dict], limit: int, settings: RedditSettings) -> tuple[list[dict], list[dict]]:
    """`limit` posts as evaluation questions with subreddit, title and, as `reference`, the best comment, chosen by a
    hash of their id alone, so that runs with other seeds ask the same; and the rows of all other posts."""
    posts: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: (-row["comment_normalized_score"], row["title"], row["body"])):
        if text := settings.post_text(row):
            subreddit = str(row.get("subreddit", ""))
            kept = {"title": row["title"], "subreddit": subreddit, "reference": row["body"].strip()}
            posts.setdefault(row["id"], {"question_id": row["id"], "category": subreddit, "turns": [text], **kept})
    chosen = sorted(posts, key=lambda post_id: digest("evaluation", post_id))[:limit]
    return [posts[post_id] for post_id in chosen], [row for row in rows if row["id"] not in set(chosen)]


def leak_snippet(post: str) -> str:
    """The part of a post that is found with another title or end: its first forty words; all of a short post."""
    words = post.partition("\n\n")[2].split()[:40]
    return " ".join(words) if len(words) >= 20 else post
