"""Files of questions, and checks of an answer that a program decides: {"type": "equals", "values": ["Paris"]}.

Two keys every type takes: `not` (true: the check passes where it would fail) and `case` (true: capitals matter).

equals     the answer is one of `values` and nothing else, but for a lead-in that ends in a colon
contains   one of `values` stands in it as whole words, not denied and not as one of two choices; `all`: every one does
number     its last number that the question does not give is one of `values`; a number in words counts
           where the answer has no digit; `units`: how the unit may begin, if the answer names one
regex      one of `values` (Python's syntax) is found
words      `count` of words: a number, or [least, most]; in the same way
lines      lines that are not blank; `matching`: only those in which this pattern is found
items      `count` of numbered or bulleted lines; or the answer is the list `values`, however its items are separated
sentences  `count` of sentences
json_keys  it is a JSON object with the keys `values`, or with the keys and values of the object `values`;
           `more`: others are allowed
json_list  it is a JSON list: of `count` items, of the `values`, or `of` "string" or "number"
in_order   `values` stand in it in this order, by the first place of each, as parts of words too
script     nine of ten letters are of one of the scripts `values` ("latin", "cyrillic", ...)
"""

from __future__ import annotations

import functools
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_alignment.files import InputError, SkippedRows, parse_json, read_rows

DATA = Path(__file__).parent / "data"
SAMPLE_SEED = 42  # of samples of questions: runs of all seeds ask the same, and share their baselines


def check_problem(check: dict) -> str | None:
    """What makes a check undecidable, or None."""
    kind = check.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        return f"is not known; use one of {', '.join(TYPES)}"
    known: dict[str, tuple[Any, str]] = {**TYPES[kind][1], "type": (str, ""), "not": TRUTH, "case": TRUTH}
    if not check.keys() & (needed := [key for key in known if key in ("values", "count", "of")]):
        return f"has no {' and no '.join(needed)}; add it"
    for key, value in check.items():
        if key not in known:
            return f"does not take {key!r}; leave it out"
        holds, wanted = known[key]
        try:
            if not holds(value):
                return f"has {key} {value!r}; make it {wanted}"
        except re.error as error:
            return f"has {key} {value!r} ({error}); make it {wanted}"
    return "has an empty list of values; add one" if check.get("values") == [] and not check.get("more") else None


def passed(question: dict, text: str) -> list[bool]:
    """For each of the question's checks, which have no `check_problem`, whether the answer `text` passes it."""
    asked = " ".join(question["turns"])
    return [TYPES[check["type"]][0](check, text, asked) != check.get("not", False) for check in question["checks"]]


SAME = str.maketrans("ёЁ“”„«»’‘−–—\u00a0\u202f", 'еЕ"""""\'\'---  ')
EMPHASIS = re.compile(r"(\*\*|`|\$)(?=\S)(.+?)(?<=\S)\1")  # of Markdown, and $a formula$
LEAD_IN = re.compile(r"^[^:\n]{1,80}:\s+")
BULLET = re.compile(r"(\d+[.)]|[-*+•])\s+")
UNIT = re.compile(
    r"[-\s]?([%$€£₽]|(?:km|kg|cm|mm|ml|min|dollar|cent|euro|pound|metre|meter|kilo|gram|litre|liter|second|minute|hour|day"
    r"|week|month|year|percent|км|кг|см|мм|мл|мин|руб|коп|доллар|евро|метр|кило|грамм|литр|секунд|час|день|дня|дней|недел"
    r"|месяц|год|лет|процент)\w*|(?:m|g|l|s|h|t|м|г|л|с|ч|т)\b)"
)
DENIED_BEFORE = re.compile(r"(?:\b(?:not|never|не|or|или)|n't)(?: (?:an?|the))? [\"'(]?\Z", re.I)
DENIED_AFTER = re.compile(r"[\"')]? (?:or|или|не|not|(?:is|was|are)(?: not|n't))\b")


def plain(text: str, check: dict) -> str:
    """One spelling of an answer: one kind of quotes, dashes and blanks, no Markdown around it, in small letters."""
    text = EMPHASIS.sub(r"\2", re.sub(r"```(?:\w*\n)?", "", text.translate(SAME)))
    text = "\n".join(line for line in (" ".join(line.split()) for line in text.split("\n")) if line)
    return text if check.get("case") else text.casefold()


def bare(text: str) -> str:
    """Without the quotes around it and the full stop at its end."""
    return text.strip(" \n\"'.")


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def listed(text: str) -> list[str]:
    """The items of a list, separated by lines, commas, semicolons or the last "and", or else by blanks."""
    text = LEAD_IN.sub("", text)
    items = [bare(BULLET.sub("", item.strip(), count=1)) for item in re.split(r"[\n,;]| (?:and|и) ", text)]
    return [*filter(None, items)] if len(items) > 1 else bare(text).split()


def numbers(text: str) -> Iterator[tuple[set[float], int, int]]:
    """The readings of each number of a text, no time of day, and its place; a comma may be a decimal one or not."""
    for match in re.finditer(r"(?<![\w.,])(?<!\d[:/])-?\d+(?: \d{3}(?!\d))*(?:[.,]\d+)*(?![:/]?\d)", text):
        digits = match[0].replace(" ", "")
        readings = {digits.replace(",", "."), digits.replace(",", "")}
        yield {float(reading) for reading in readings if reading.count(".") < 2}, match.start(), match.end()


def not_denied(text: str, start: int, end: int) -> bool:
    """Whether what stands at this place is meant: not "not Paris", "Paris is not" or "Paris or London"."""
    return DENIED_BEFORE.search(text[:start]) is None and DENIED_AFTER.match(text, end) is None


def stands_in(value: str, text: str) -> bool:
    """Whether `value` stands in the text as whole words and numbers, and is meant."""
    edges = r"(?<!\w)(?<!\d[.,:/-])" + re.escape(value) + r"(?!\w)(?![.,:/-]\d)"
    return any(not_denied(text, *match.span()) for match in re.finditer(edges, text))


def in_range(number: int, count: int | list[int]) -> bool:
    least, most = count if isinstance(count, list) else (count, count)
    return least <= number <= most


def json_value(text: str) -> Any:
    """The value of an answer that is JSON, in a code block or not; None where it is not."""
    try:
        return parse_json(re.sub(r"^```(json)?|```$", "", text.strip()))
    except ValueError:
        return None


def equals(check: dict, text: str, asked: str) -> bool:
    answer = plain(text, check)
    values = {bare(plain(value, check)) for value in check["values"]}
    return bare(answer) in values or bare(LEAD_IN.sub("", answer)) in values


def contains(check: dict, text: str, asked: str) -> bool:
    found = [stands_in(plain(value, check), plain(text, check)) for value in check["values"]]
    return all(found) if check.get("all") else any(found)


def number(check: dict, text: str, asked: str) -> bool:
    text = plain(text, {})
    wanted = {float(value) for value in check["values"] if not isinstance(value, str)}
    given = {reading for readings, *_ in numbers(plain(asked, {})) for reading in readings} - wanted
    spelt = [plain(value, {}) for value in check["values"] if isinstance(value, str)]
    if any(stands_in(value, text) for value in spelt if re.search(r"\d", value) or not re.search(r"\d", text)):
        return True
    for said in (re.sub(r"(?m)^\d+[.)] ", "", text), text):  # "2. so it is 8" or "8. It has eight legs"
        if found := [entry for entry in numbers(said) if not entry[0] & given]:
            readings, start, end = found[-1]
            unit = UNIT.match(said, end) or re.search(r"([$€£₽]) ?\Z", said[:start])
            known = not unit or "units" not in check or unit[1].startswith(tuple(check["units"]))
            return bool(readings & wanted) and known and not_denied(said, start, end)
    return False


def regex(check: dict, text: str, asked: str) -> bool:
    flags = re.NOFLAG if check.get("case") else re.IGNORECASE
    return any(re.search(pattern, text, flags) for pattern in check["values"])


def counted(pattern: str) -> Callable[[dict, str, str], bool]:
    return lambda check, text, asked: in_range(len(re.findall(pattern, text.strip())), check["count"])


def count_lines(check: dict, text: str, asked: str) -> bool:
    found = [line for line in lines(text) if re.search(check.get("matching", ""), line)]
    return in_range(len(found), check["count"])


def items(check: dict, text: str, asked: str) -> bool:
    if "values" in check:
        return listed(plain(text, check)) == [bare(plain(value, check)) for value in check["values"]]
    return in_range(sum(BULLET.match(line) is not None for line in lines(text)), check["count"])


def json_keys(check: dict, text: str, asked: str) -> bool:
    value, wanted = json_value(text), check["values"]
    if not isinstance(value, dict) or not value.keys() >= set(wanted):
        return False
    same = not isinstance(wanted, dict) or all(same_value(value[key], wanted[key], check) for key in wanted)
    return same and (check.get("more", False) or value.keys() == set(wanted))


def same_value(value: Any, wanted: Any, check: dict) -> bool:
    """Whether two JSON values are the same; for texts up to what `plain` takes away."""
    if isinstance(value, str) and isinstance(wanted, str):
        return plain(value, check) == plain(wanted, check)
    return type(value) is type(wanted) and value == wanted


def json_list(check: dict, text: str, asked: str) -> bool:
    value = json_value(text)
    if not isinstance(value, list) or ("count" in check and not in_range(len(value), check["count"])):
        return False
    wanted = check.get("values", value)
    same = len(value) == len(wanted) and all(same_value(*pair, check) for pair in zip(value, wanted, strict=True))
    kind: Any = {"string": str, "number": (int, float)}.get(check.get("of", ""), object)
    return same and all(isinstance(item, kind) for item in value)


def in_order(check: dict, text: str, asked: str) -> bool:
    text = text if check.get("case") else text.lower()
    places = [text.find(value if check.get("case") else value.lower()) for value in check["values"]]
    return -1 not in places and places == sorted(places)


def script(check: dict, text: str, asked: str) -> bool:
    letters = [unicodedata.name(letter, "").split()[0].lower() for letter in text if letter.isalpha()]
    return bool(letters) and sum(letter in check["values"] for letter in letters) >= 0.9 * len(letters)


def is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


def is_count(value: Any) -> bool:
    limits = value if isinstance(value, list) and len(value) == 2 else [value]
    return is_list(limits, int) and 0 <= limits[0] <= limits[-1]


# what a key may hold: a test of it, and its words
SCRIPTS = "arabic armenian cjk cyrillic devanagari georgian greek hangul hebrew latin thai".split()
TRUTH = (lambda value: type(value) is bool, "true or false")
COUNT = (is_count, "a number or two, [least, most]")
TEXTS = (lambda value: is_list(value, str), "a list of texts")
VALUES = (lambda value: is_list(value, str, int, float) and all(v == v for v in value), "a list of texts and numbers")
PATTERNS = (lambda value: is_list(value, str) and all(map(re.compile, value)), "a list of patterns")
PATTERN = (lambda value: isinstance(value, str) and bool(re.compile(value)), "a pattern")
SCRIPT = (lambda value: is_list(value, str) and {*value} <= {*SCRIPTS}, f"some of {', '.join(SCRIPTS)}")
OF = (["string", "number"].__contains__, "string or number")
OBJECT = (lambda value: isinstance(value, dict) or is_list(value, str), "a list of texts or an object")

# what decides each type, from its check, the answer and the question, and what it takes besides `not` and `case`
TYPES: dict[str, tuple[Callable[[dict, str, str], bool], dict[str, tuple[Any, str]]]] = {
    "equals": (equals, {"values": TEXTS}),
    "contains": (contains, {"values": TEXTS, "all": TRUTH}),
    "number": (number, {"values": VALUES, "units": TEXTS}),
    "regex": (regex, {"values": PATTERNS}),
    "words": (counted(r"(?:[^\W\d_]|')+"), {"count": COUNT}),
    "lines": (count_lines, {"count": COUNT, "matching": PATTERN}),
    "items": (items, {"count": COUNT, "values": TEXTS}),
    "sentences": (counted(r"[.!?]+(?=\s|$)"), {"count": COUNT}),
    "json_keys": (json_keys, {"values": OBJECT, "more": TRUTH}),
    "json_list": (json_list, {"count": COUNT, "values": VALUES, "of": OF}),
    "in_order": (in_order, {"values": TEXTS}),
    "script": (script, {"values": SCRIPT}),
}


def sampled(questions: list[dict], limit: int) -> list[dict]:
    """`limit` of the questions in their order; all of them when `limit` is 0."""
    if not 0 < limit < len(questions):
        return questions
    return [questions[place] for place in sorted(random.Random(SAMPLE_SEED).sample(range(len(questions)), limit))]


def read_questions(
    path: Path, as_question: Callable[[dict, int], dict] = lambda row, number: row
) -> Iterator[tuple[str, dict]]:
    """Yields (place, `as_question(row, number from 1)`) of the rows of a file. A question has "turns", texts, and a
    "question_id", a whole number or a text. Raises InputError naming file and line for a row without them or with
    the id of another, and for a file that is damaged or empty."""
    skipped = SkippedRows()
    places: dict[int | str, str] = {}
    for number, (place, row) in enumerate(read_rows(path, skipped), 1):
        where, question = f"{path}, {place}", as_question(row, number)
        turns, question_id = question.get("turns"), question.get("question_id")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise InputError(f"{where}: no turns; give every question a list of texts named turns")
        if not isinstance(question_id, int | str) or isinstance(question_id, bool):
            raise InputError(f"{where}: question_id {json.dumps(question_id)}; make it a whole number or a text")
        if question_id in places:
            first = f"first at {places[question_id]}"
            raise InputError(f"{where}: duplicate question_id {question_id} ({first}); give every question its own")
        places[question_id] = place
        yield where, question
    if skipped.count:
        raise InputError(f"{path}: {skipped.places[0]}; repair the file or fetch it again")
    if not places:
        raise InputError(f"{path}: no questions in this file; fetch it again or name another")


def read_checked(path: Path) -> list[dict]:
    """Questions with checks, as the file holds them: {"question_id", "turns": [str, ...], "checks": [...], ...}.
    Raises InputError as `read_questions`, for no or undecidable checks, and a category or language that is no text."""
    questions = []
    for place, row in read_questions(path):
        if other := next((key for key in ("category", "language") if not isinstance(row.get(key, ""), str)), None):
            raise InputError(f"{place}: {other} {row[other]!r}; make it a text")
        checks, example = row.get("checks"), '{"type": "equals", "values": ["5"]}'
        if not isinstance(checks, list) or not checks or not all(isinstance(check, dict) for check in checks):
            raise InputError(f"{place}: no checks; give the question checks such as {example}")
        for check in checks:
            if problem := check_problem(check):
                raise InputError(f"{place}: the check {check.get('type')} {problem}")
        questions.append(row)
    return questions


@functools.cache
def instructions() -> dict[int, dict]:
    """The rows of data/instructions.jsonl by question_id."""
    return {row["question_id"]: row for row in read_checked(DATA / "instructions.jsonl")}


def instruct_questions(limit: int) -> list[dict]:
    """The instructions without their checks; `limit` > 0 takes a sample."""
    rows = sampled(list(instructions().values()), limit)
    return [{key: row[key] for key in ("question_id", "category", "turns")} for row in rows]


def checks_passed(row: dict) -> list[bool]:
    """For each check of the row's instruction, whether the answer passes it. Their share can be compared with the
    published instruction scores, which are keyword rules over 25 other instructions."""
    return passed(instructions()[row["question_id"]], row["answers"][0])
