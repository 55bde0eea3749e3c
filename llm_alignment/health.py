"""The health of answers, from their texts: loops, foreign letters, another language, cut ones, repeated words."""

from __future__ import annotations

import functools
import itertools
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from llm_alignment.stats import in_per_cent, mcnemar

HEALTH = ("loops", "foreign_letters", "other_script", "unfinished")

# Code, addresses, formulas and names of files are written in Latin letters in every language.
NO_LANGUAGE = re.compile(r"(?s)```.*?(```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+|\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+")
ITEM = re.compile(r"^\s*(\d+[.)]|[-*•#>]+)\s+", re.MULTILINE)  # the number of a list's item
MIXED_WORD = re.compile(r"[a-z][а-яё]|[а-яё][a-z]")
GLOSS = re.compile(r"\([^()]*\)")  # a name as its own language writes it
GREEK_WORD = re.compile(r"[\u0370-\u03ff]{3}")  # fewer are symbols: pi, delta t
# The scripts that a question names by a language or, for code, a kind of program: stems in English and Russian.
NAMED = {
    "latin": r"english|french|german|spanish|italian|latin|английск|французск|немецк|испанск|итальянск|латын|латин"
    r"|python|java|c\+\+|html|css|sql|json|\bкод(а|ом|е)?\b|скрипт|функци|напиш\w+ программ|bash",
    "cyrillic": r"russian|cyrillic|ukrain|bulgar|serbian|русск|кириллиц|украинск|болгарск|сербск",
    "cjk": r"chinese|japanese|mandarin|kanji|китайск|японск|иероглиф",
    "hiragana": r"japanese|hiragana|японск",
    "katakana": r"japanese|katakana|японск",
    "hangul": r"korean|корейск",
    "greek": r"greek|греческ",
    "arabic": r"arabic|persian|urdu|арабск|персидск",
    "hebrew": r"hebrew|yiddish|иврит|еврейск",
    "devanagari": r"hindi|sanskrit|хинди|санскрит",
    "thai": r"\bthai|тайск",
    "georgian": r"georgian|грузинск",
    "armenian": r"armenian|армянск",
}


@functools.cache
def script_of(letter: str) -> str:
    """The script of a letter, as Unicode's name of it begins: "latin", "cyrillic", "cjk"; "" for other characters."""
    if not letter.isalpha() or unicodedata.category(letter) == "Lm":
        return ""
    return unicodedata.name(letter, "").split(" ")[0].split("-")[0].lower()


def scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has, in its compatibility form (full-width and mathematical letters)."""
    return Counter(filter(None, map(script_of, unicodedata.normalize("NFKC", text))))


def main_script(text: str) -> str:
    """The script of most letters of a text; "" without letters."""
    return max(scripts(text).items(), key=lambda item: item[1], default=("", 0))[0]


def judge_answer(question: Sequence[str], answer: str, finished: bool | None = None, *, expected: str = "") -> dict:
    """What is wrong with the form of one answer: {"loops", "foreign_letters", "other_script", "unfinished"}.
    `question`: the turns up to the answer, the last one asks. `finished`: whether it ended by itself; None where that
    is not known. `expected`: a text in the language of the right answer, such as a reference.

    - loops: a passage of words is repeated until the end (see `ends_in_a_loop`);
    - foreign_letters: of a script that neither the question nor `expected` has or names. Code does not count, nor what
      stands in brackets, nor single Greek letters; Latin letters do within a word of Cyrillic ones alone;
    - other_script: most of its letters, code left out, are of a script in which the question asks nothing."""
    text, asked = NO_LANGUAGE.sub(" ", answer), "\n".join(question)
    named = {script for script, names in NAMED.items() if re.search(names, asked, re.IGNORECASE)}
    right = set(scripts(expected))
    symbols = {"latin"} if GREEK_WORD.search(text) else {"latin", "greek"}
    foreign = scripts(GLOSS.sub(" ", text)).keys() - scripts(asked).keys() - right - named - symbols
    is_mixed = bool(MIXED_WORD.search(text)) and not MIXED_WORD.search(asked + expected)
    return {
        "loops": ends_in_a_loop(answer, finished),
        "foreign_letters": bool(foreign) or is_mixed,
        "other_script": is_other_script(text, asked_scripts(question) | named | right, has_reference=bool(right)),
        "unfinished": None if finished is None else not finished,
    }


def is_other_script(text: str, allowed: set[str], *, has_reference: bool) -> bool:
    """Whether most of a text is of a script that is not allowed. Without a reference eight letters, a third of all,
    are enough, and words with a capital letter, such as names, do not count; with one two letters, two thirds."""
    words = re.findall(r"[^\W\d_]+", text)
    letters: Counter[str] = Counter()
    for word in words:
        letters[script_of(word[0])] += len(word) if has_reference or not word[0].isupper() else 0
    [(script, count)] = letters.most_common(1) or [("", 0)]
    least, thirds = (2, 2) if has_reference else (8, 1)
    enough = count >= least and 3 * count >= thirds * sum(map(len, words))
    return bool(allowed) and enough and script not in allowed


def asked_scripts(question: Sequence[str]) -> set[str]:
    """The scripts in which an answer may be written: that of the last turn with letters, and those of four words in a
    row. Russian questions hold English terms, so a first Cyrillic word, or two anywhere, make a question Russian."""
    texts = [NO_LANGUAGE.sub(" ", turn) for turn in question]
    last = next((text for text in reversed(texts) if scripts(text)), "")
    is_russian = re.match(r"[^\w]*[а-яё]|(.*?\b[а-яё]{2,}\b){2}", last, re.IGNORECASE | re.DOTALL)
    found = {"cyrillic" if is_russian else main_script(last)}
    for text in texts:
        runs = itertools.groupby(map(main_script, text.split()))
        found |= {script for script, words in runs if len(list(words)) >= 4}
    return found - {""}


def ends_in_a_loop(answer: str, finished: bool | None = None) -> bool:
    """Whether an answer repeats a passage of words until its end. Where the token limit cut it, three times and twelve
    words are enough, or twice a passage of 20 words: the last copy, which is cut, counts in part. One that ended by
    itself may close with a refrain or a list of equal lines: four times and 24 words, not all of them numbers. The
    numbers of a list's items do not count; in a cut answer, nor do others between passages of six words ("Step 7:
    ..."), repeated four times. A passage of up to ten letters alone ("aaaa", "hahaha") is repeated 25 times."""
    text = ITEM.sub(" ", answer.casefold())
    words = re.findall(r"[^\W_]+", text)
    if finished is False:  # the last word may be cut
        without_numbers = [word for word in words if not word.isdecimal()]
        runs, others = (repeated_at_the_end(each[:-1]) for each in (words, without_numbers))
        is_loop = any(length >= max(3 * size, 12) or length >= 2 * size >= 40 for size, length in runs)
        is_loop = is_loop or any(length >= 4 * size >= 24 for size, length in others)
    else:
        sizes = [size for size, length in repeated_at_the_end(words) if length >= max(4 * size, 24)]
        is_loop = any(not all(map(str.isdecimal, words[-size:])) for size in sizes)
    end = "".join(text.split())[-250:]
    letters = any(length >= 25 * size for size, length in repeated_at_the_end(end) if size <= 10)
    return is_loop or (letters and (finished is False or end[-1].isalpha()))


def repeated_at_the_end(items: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(size, length) for every size: the last `length` items repeat every `size` items. By the Z function of the
    reversed sequence (Gusfield 1997, Algorithms on Strings, chapter 1)."""
    last = items[::-1]
    equal, left, right = [0] * len(last), 0, 0
    for start in range(1, len(last)):
        length = min(right - start, equal[start - left]) if start < right else 0
        while start + length < len(last) and last[length] == last[start + length]:
            length += 1
        if start + length > right:
            left, right = start, start + length
        equal[start] = length
        yield start, start + length


def row_health(row: dict) -> list[dict]:
    """`judge_answer` of every answer of a result row, and "distinct_bigrams", the share of its pairs of words in a row
    that differ; None with fewer than two words. A row has {"turns", "answers", "finished"}, the last two with an entry
    for each turn, or as TAT-QA's {"question", "answer"}; `reference`, a text or one a turn, is what is expected."""
    turns = row.get("turns") or [row["question"]]
    answers = row.get("answers", [row.get("answer")])
    finished = row.get("finished", [None] * len(answers))
    reference = row.get("reference")
    references = dict(enumerate(reference if isinstance(reference, list) else [reference] * len(answers)))
    health = []
    for place, (answer, is_finished) in enumerate(zip(answers, finished, strict=True)):
        judged = judge_answer(turns[: place + 1], answer, is_finished, expected=str(references.get(place) or ""))
        words = re.findall(r"[^\W_]+", answer.casefold())
        pairs = list(itertools.pairwise(words))
        health.append({**judged, "distinct_bigrams": len(set(pairs)) / len(pairs) if pairs else None})
    return health


def summarise_health(rows: list[dict]) -> dict[str, float]:
    """Shares of the answers of result rows in per cent, and "distinct_bigrams", the mean of the answers' own; "n":
    answers. What no answer tells, as `unfinished` where rows have no "finished", is left out."""
    answers = [answer for row in rows for answer in row_health(row)]
    names = (*HEALTH, "distinct_bigrams")
    known = {name: [answer[name] for answer in answers if answer[name] is not None] for name in names}
    shares = {name: 100 * statistics.fmean(values) for name, values in known.items() if values}
    return {**shares, "n": len(answers)}


def compare_health(pairs: list[tuple[dict, dict]]) -> dict[str, dict]:
    """Differences in shares, in percentage points, over (before, after) rows; a question's answers are a cluster."""
    answers = [
        (number, old, new)
        for number, (before, after) in enumerate(pairs)
        for old, new in zip(row_health(before), row_health(after), strict=True)
    ]
    deltas = {}
    for name in HEALTH:
        known = [(n, old[name], new[name]) for n, old, new in answers if None not in (old[name], new[name])]
        if known:
            clusters, *sides = zip(*known, strict=True)
            deltas[name] = in_per_cent(mcnemar(*sides, clusters=clusters if len(set(clusters)) < len(known) else None))
    return deltas
