"""Texts: one form to compare them in, the scripts of their letters, their first words."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter

WORD = re.compile(r"[^\W_]+")
# what may stand within a word and is not part of it: soft hyphens, marks of width 0, a stress mark on a letter
WITHIN_WORDS = re.compile("[\u00ad\u0300-\u036f\u200b-\u200f\u2060-\u2064\ufeff]")


def normalise_text(text: str) -> str:
    """The words of a text in one form with single spaces: two copies that differ only in form become equal.

    Unicode's compatibility form and case folding; the Russian letter yo as ye; without blanks, punctuation, symbols,
    soft hyphens and stress marks. Every comparison of prompts (splits, duplicates, leaks) is one of this form.
    """
    return " ".join(WORD.findall(WITHIN_WORDS.sub("", fold(text))))


def fold(text: str) -> str:
    """A text in Unicode's compatibility form with its case folded and the Russian letter yo as ye."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("ё", "е")


@functools.cache
def script_of(letter: str) -> str:
    """The script of a letter, as Unicode's name of it begins: "latin", "cyrillic", "cjk"; "" for other characters."""
    if not letter.isalpha() or unicodedata.category(letter) == "Lm":
        return ""
    return unicodedata.name(letter, "").split(" ")[0].split("-")[0].lower()


def scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has, in its compatibility form (full-width and mathematical letters)."""
    counts: Counter[str] = Counter()
    for letter, count in Counter(unicodedata.normalize("NFKC", text)).items():
        counts[script_of(letter)] += count
    counts.pop("", None)
    return counts


def main_script(text: str) -> str:
    """The script of most letters of a text; "" without letters."""
    return max(scripts(text).items(), key=lambda item: item[1], default=("", 0))[0]


def cut_at_word(text: str, max_chars: int) -> str:
    """The first words of a text, at most `max_chars` characters; a first word that is longer is cut within."""
    if len(text) <= max_chars:
        return text
    words = text[: max_chars + 1].rsplit(None, 1)[0]
    return words if len(words) <= max_chars else text[:max_chars]
