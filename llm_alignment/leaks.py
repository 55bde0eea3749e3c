"""The search for training items that contain what an evaluation asks, and the form in which texts are compared."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llm_alignment.batches import common_length

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("llm_alignment")

WORD = re.compile(r"[^\W_]+")
# what may stand within a word and is not part of it: soft hyphens, marks of width 0, a stress mark on a letter
WITHIN_WORDS = re.compile("[\u00ad\u0300-\u036f\u200b-\u200f\u2060-\u2064\ufeff]")
IN_A_ROW = 13  # words, as GPT-3's authors searched (Brown et al. 2020, arXiv 2005.14165, appendix C)
SHORT, LONG = 3, 5  # least and most words of an anchor
EDGE = "\uffff"  # a word; stands before, between and after texts
ITEMS_AT_ONCE = 100  # more would not fit into the processor's cache
ODD = 1  # a code, see `letter_codes`
FACTORS = (0x85EBCA6B, 0x27D4EB2F, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # odd numbers of 32 bits


def normalise_text(text: str) -> str:
    """The words of a text in one form with single spaces: two copies that differ only in form become equal. Unicode's
    compatibility form and case folding; the Russian letter yo as ye; without blanks, punctuation, symbols, soft
    hyphens and stress marks. Every comparison of prompts (splits, duplicates, leaks) is one of this form."""
    return " ".join(WORD.findall(WITHIN_WORDS.sub("", fold(text))))


def fold(text: str) -> str:
    """A text in Unicode's compatibility form with its case folded and the Russian letter yo as ye."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("ё", "е")


class LeakFinder:
    """Finds the evaluations' texts in others, whatever their form (see `normalise_text`).

    `whole`: texts by kind ("MT-Bench question") that count where all their words follow each other; a text of one or
    two words only where it is a whole turn. `passages`: those that count where 13 words in a row do, most of them of
    three letters or more: what programs share (for i in range(1, m + 1): for j in range(1, n)) is not a passage.

    Every run of words that counts has an anchor, a few words in a row. numpy hashes all words in a row of many items
    at once, in a quarter of the time that it takes to read and hash them (experiments/benchmarks/bench_leaks.py), and
    only items that seem to hold an anchor are compared word by word."""

    def __init__(self, whole: dict[str, list[str]], passages: dict[str, list[str]] | None = None) -> None:
        import numpy as np

        known: dict[tuple[tuple[str, ...], int], str] = {}  # (words, how many in a row count) -> kind
        texts = [(kind, text, 0) for kind, texts in whole.items() for text in texts]
        texts += [(kind, text, IN_A_ROW) for kind, texts in (passages or {}).items() for text in texts]
        for kind, text, least in texts:
            words = tuple(normalise_text(text).split())
            if 0 < len(words) < SHORT:
                words = (EDGE, *words, EDGE)
            if 0 < (need := least or len(words)) <= len(words):
                known.setdefault((words, need), kind)
        self.known = [(words, need, kind) for (words, need), kind in known.items()]
        self.anchors = self._anchors()
        self.keys: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by words of an anchor: sorted; what may be one
        for size in {len(anchor) for anchor in self.anchors}:
            anchors = itertools.chain.from_iterable(anchor for anchor in self.anchors if len(anchor) == size)
            keys = np.unique(in_a_row_keys(word_keys(f" {' '.join(anchors)} ")[0], size)[::size])
            may_be_key = np.zeros(2**17, bool)
            may_be_key[keys >> 15] = True
            self.keys[size] = keys, may_be_key

    def _anchors(self) -> dict[tuple[str, ...], set[tuple[int, int]]]:
        """{words: {(number in `known`, place in its words), ...}}, the rarest words of every run that counts."""
        sizes = [min(need, LONG) for _, need, _ in self.known]
        found = [list(in_a_row(words, size)) for (words, _, _), size in zip(self.known, sizes, strict=True)]
        frequency = Counter(itertools.chain.from_iterable(map(set, found)))
        anchors: dict[tuple[str, ...], set[tuple[int, int]]] = defaultdict(set)
        for number, ((words, need, _), groups) in enumerate(zip(self.known, found, strict=True)):
            ranks = [(frequency[group], -sum(map(len, group)), group) for group in groups]
            for start in range(len(words) - need + 1):
                if need != IN_A_ROW or sum(len(word) >= 3 for word in words[start : start + need]) > need / 2:
                    place = min(range(start, start + need - sizes[number] + 1), key=ranks.__getitem__)
                    anchors[groups[place]].add((number, place))
        return dict(anchors)

    def find(self, *texts: str) -> str | None:
        """The kind of a known text that stands in one of `texts`, as the turns of a dialogue are; or None."""
        words = f" {EDGE} ".join(["", *map(normalise_text, texts), ""]).split()
        for place, group in itertools.chain(*(enumerate(in_a_row(words, size)) for size in self.keys)):
            for number, its_place in self.anchors.get(group, ()):
                known, need, kind = self.known[number]
                before = common_length([words[:place][::-1], known[:its_place][::-1]])
                if before + common_length([words[place:], known[its_place:]]) >= need:
                    return kind
        return None

    def find_all(self, items: Iterable[list[str]]) -> Iterator[str | None]:
        """`find` of every item, which is a list of texts; many at once, which is much faster."""
        import numpy as np

        items = iter(items)
        while batch := list(itertools.islice(items, ITEMS_AT_ONCE)):
            joined = [f" {EDGE} ".join(["", *(text.replace(EDGE, " ") for text in texts), ""]) for texts in batch]
            words, starts, odd = word_keys("".join(joined))
            places = [odd]
            for size, (known, may_be_key) in self.keys.items():
                keys = in_a_row_keys(words, size)
                found = np.flatnonzero(may_be_key.take((keys >> 15).astype(np.intp), mode="clip"))
                is_known = known.take(np.searchsorted(known, keys[found]), mode="clip") == keys[found]
                places.append(starts[found[is_known]])
            ends = np.cumsum([len(text) for text in joined])
            near = set(np.searchsorted(ends, np.concatenate(places), side="right").tolist())
            yield from (self.find(*texts) if number in near else None for number, texts in enumerate(batch))


def in_a_row(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """Every `size` words in a row."""
    return zip(*(words[start:] for start in range(size)), strict=False)


def word_keys(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A hash, uint32, of every word; where the words begin; where characters are ODD. `text` begins and ends with a
    blank. A word is known by its first and last two letters and its length."""
    import numpy as np

    numbers = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = letter_codes().take(numbers.astype(np.intp), mode="clip")  # faster by far than letter_codes()[numbers]
    is_letter = codes != 0
    edges = np.flatnonzero(is_letter[1:] != is_letter[:-1]) + 1
    first, end = edges[::2], edges[1::2]
    letters = codes[first], codes[first + 1], codes[end - 2], codes[end - 1]
    return mixed([*letters, (end - first).astype(np.uint32)]), first, np.flatnonzero(codes == ODD)


def in_a_row_keys(words: np.ndarray, size: int) -> np.ndarray:
    """A hash, uint32, of every `size` words in a row, from the hashes of the words."""
    return mixed([words[start : max(0, len(words) - size + 1 + start)] for start in range(size)])


def mixed(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One hash of several."""
    import numpy as np

    return functools.reduce(np.add, (part * np.uint32(factor) for part, factor in zip(parts, FACTORS, strict=False)))


@functools.cache
def letter_codes() -> np.ndarray:
    """A code, uint8, by a character's number in Unicode; characters of one normal form have one. 0: it ends a word;
    ODD: it changes the letters beside it or stands for several (combining marks, ligatures), so `find` must see it."""
    import numpy as np

    random = np.random.default_rng(0).integers(2, 256, sys.maxunicode + 1, np.uint8)
    codes = random.copy()  # behind the first 2**17 there are ideographs alone
    chars = [chr(number) for number in range(2**17)]
    chars[ord("\n")] = " "
    for number, (char, form) in enumerate(zip(chars, fold("\n".join(chars)).split("\n"), strict=True)):
        if unicodedata.combining(char) or WITHIN_WORDS.match(char) or (len(form) > 1 and WORD.search(form)):
            codes[number] = ODD
        else:
            codes[number] = random[ord(form)] if WORD.match(form) else 0
    codes[ord(EDGE)] = random[ord(EDGE)]
    return codes


def item_texts(item: dict) -> list[str]:
    """The texts of a row of messages, or of a pair: its prompt's turns and its answers."""
    if "messages" in item:
        return [message["content"] for message in item["messages"]]
    prompt = item["prompt"]
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return [*turns, *(item[side] for side in ("chosen", "rejected") if side in item)]


def forbidden_texts(asked: dict[str, list[dict]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What LeakFinder takes of questions by kind: whole first turns, and passages of all turns and references."""
    whole = {kind: [question["turns"][0] for question in questions] for kind, questions in asked.items()}
    passages: dict[str, list[str]] = {kind: [] for kind in asked}
    for kind, question in [(kind, question) for kind, questions in asked.items() for question in questions]:
        references = question.get("reference", [])
        texts = [*question["turns"], *(references if isinstance(references, list) else [references])]
        passages[kind] += [text for text in texts if isinstance(text, str)]
    return whole, passages


def have_leaks(items: Iterable[dict], finder: LeakFinder, source: str, counts: dict[str, int]) -> list[bool]:
    """Which items contain a text of an evaluation; they are counted in `counts` and reported by kind."""
    leaks = list(finder.find_all(map(item_texts, items)))
    kinds = Counter(filter(None, leaks))
    found = counts[f"{source}_leaks"] = kinds.total()
    named = "".join(f", {count} {kind}s" for kind, count in sorted(kinds.items()))
    log.info("%s: %d of %d left out: they contain an evaluation question%s", source, found, len(leaks), named)
    return [leak is not None for leak in leaks]


def without_leaks(items: list[dict], finder: LeakFinder, source: str, counts: dict[str, int]) -> list[dict]:
    """The items that contain no text of an evaluation, see `have_leaks`."""
    return [item for item, leaks in zip(items, have_leaks(items, finder, source, counts), strict=True) if not leaks]
