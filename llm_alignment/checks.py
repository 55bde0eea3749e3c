"""Checks of an answer that a program decides, read from data: {"type": "equals", "values": ["Paris"]}.

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

import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_alignment import questions
from llm_alignment.files import InputError, parse_json

DATA = Path(__file__).parent / "data"


def read_questions(path: Path) -> list[dict]:
    """Questions with checks, as the file holds them: {"question_id", "turns": [str, ...], "checks": [...], ...}.

    Raises InputError as `questions.read_questions`, and for a row without usable checks.
    """
    return [{**row, "checks": read_checks(row, place)} for place, row in questions.read_questions(path)]


def read_checks(row: dict, place: str) -> list[dict]:
    """The checks of a row. Raises InputError naming `place` when there are none or one cannot be decided."""
    checks = row.get("checks")
    if not isinstance(checks, list) or not checks or not all(isinstance(check, dict) for check in checks):
        raise InputError(f'{place}: no checks; give the question checks such as {{"type": "equals", "values": ["5"]}}')
    for check in checks:
        kind = check.get("type")
        if not isinstance(kind, str) or kind not in TYPES:
            raise InputError(f"{place}: check type {kind!r} is not known; use one of {', '.join(TYPES)}")
        if problem := check_problem(check, TYPES[kind][1]):
            raise InputError(f"{place}: the check {kind} {problem}")
    return checks


def check_problem(check: dict, needed: tuple[str, ...]) -> str | None:
    """What makes a check undecidable, or None; `needed` are the keys of which it must have at least one."""
    kind = check["type"]
    if not any(key in check for key in needed):
        return f"has no {' and no '.join(needed)}; add it"
    if unknown := sorted(check.keys() - {"type", "not", "case", *needed, *OPTIONS.get(kind, ())}):
        return f"does not take {unknown[0]!r}; leave it out"
    count, values = check.get("count", 0), check.get("values", [""])
    limits = count if isinstance(count, list) and len(count) == 2 else [count]
    if not all(type(limit) is int and limit >= 0 for limit in limits) or limits != sorted(limits):
        return f"has the count {count!r}; make it a number or two, [least, most]"
    for key in ("not", "case", "all", "more"):
        if type(check.get(key, False)) is not bool:
            return f"has {key!r} {check[key]!r}; make it true or false"
    if kind == "json_keys" and isinstance(values, dict):
        return None
    allowed = (str, int, float) if kind in {"number", "json_list"} else (str,)
    if not isinstance(values, list) or not all(type(value) in allowed for value in values):
        return f"has values that are not a list of {'texts and numbers' if len(allowed) > 1 else 'texts'}"
    if not values and not check.get("more"):
        return "has an empty list of values; add one"
    if kind == "script" and not set(values) <= SCRIPTS:
        return f"has the values {values}; use some of {', '.join(sorted(SCRIPTS))}"
    if check.get("of", "string") not in [*JSON_TYPES]:
        return f"has `of` {check['of']!r}; use one of {', '.join(JSON_TYPES)}"
    if not isinstance(units := check.get("units", []), list) or not all(isinstance(unit, str) for unit in units):
        return f"has the units {units!r}; make it a list of texts"
    for pattern in [*(values if kind == "regex" else []), check.get("matching", "")]:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            return f"has the pattern {pattern!r}, which is not one ({error})"
    return None


def passed(question: dict, text: str) -> list[bool]:
    """For each of the question's checks, as `read_checks` returns them, whether the answer `text` passes it."""
    asked = " ".join(question["turns"])
    return [TYPES[check["type"]][0](check, text, asked) != check.get("not", False) for check in question["checks"]]


# ---------------------------------------------------------------------------------------------------------------------
# What is read from an answer

SAME = str.maketrans("ёЁ“”„«»’‘−–—\u00a0\u202f", 'еЕ"""""\'\'---  ')
FENCE = re.compile(r"```(?:\w*\n)?")
EMPHASIS = re.compile(r"(\*\*|`|\$)(?=\S)(.+?)(?<=\S)\1")  # of Markdown, and $a formula$
LEAD_IN = re.compile(r"^[^:\n]{1,80}:\s+")


def plain(text: str, check: dict) -> str:
    """One spelling of an answer: one kind of quotes, dashes and blanks, no Markdown around it, in small letters."""
    text = EMPHASIS.sub(r"\2", FENCE.sub("", text.translate(SAME)))
    text = "\n".join(line for line in (" ".join(line.split()) for line in text.split("\n")) if line)
    return text if check.get("case") else text.casefold()


def bare(text: str) -> str:
    """Without the quotes around it and the full stop at its end."""
    return text.strip(" \n\"'.")


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


BULLET = re.compile(r"(\d+[.)]|[-*+•])\s+")
DIGIT = re.compile(r"\d")
NUMBERED = re.compile(r"^\d+[.)] ", re.M)


def listed(text: str) -> list[str]:
    """The items of a list, separated by lines, commas, semicolons or the last "and", or else by blanks."""
    text = LEAD_IN.sub("", text)
    items = [bare(BULLET.sub("", item.strip(), count=1)) for item in re.split(r"[\n,;]| (?:and|и) ", text)]
    return [item for item in items if item] if len(items) > 1 else bare(text).split()


UNIT = re.compile(
    r"[-\s]?([%$€£₽]|(?:km|kg|cm|mm|ml|min|dollar|cent|euro|pound|metre|meter|kilo|gram|litre|liter|second|minute|hour|day"
    r"|week|month|year|percent|км|кг|см|мм|мл|мин|руб|коп|доллар|евро|метр|кило|грамм|литр|секунд|час|день|дня|дней|недел"
    r"|месяц|год|лет|процент)\w*|(?:m|g|l|s|h|t|м|г|л|с|ч|т)\b)"
)
CURRENCY = re.compile(r"([$€£₽]) ?\Z")


def numbers(text: str) -> Iterator[tuple[set[float], int, int]]:
    """The readings of each number of a text, no time of day, and its place; a comma may be a decimal one or not."""
    for match in re.finditer(r"(?<![\w.,])(?<!\d[:/])-?\d+(?: \d{3}(?!\d))*(?:[.,]\d+)*(?![:/]?\d)", text):
        digits = match[0].replace(" ", "")
        readings = {digits.replace(",", "."), digits.replace(",", "")}
        yield {float(reading) for reading in readings if reading.count(".") < 2}, match.start(), match.end()


DENIED_BEFORE = re.compile(r"(?:\b(?:not|never|не|or|или)|n't)(?: (?:an?|the))? [\"'(]?\Z", re.I)
DENIED_AFTER = re.compile(r"[\"')]? (?:or|или|не|not|(?:is|was|are)(?: not|n't))\b")


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


SCRIPTS = set("arabic armenian cjk cyrillic devanagari georgian greek hangul hebrew latin thai".split())
JSON_TYPES: dict[str, Any] = {"string": str, "number": (int, float)}


def json_value(text: str) -> Any:
    """The value of an answer that is JSON, in a code block or not; None where it is not."""
    try:
        return parse_json(re.sub(r"^```(json)?|```$", "", text.strip()))
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The types: each takes its check, the answer and the question


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
    if any(stands_in(value, text) for value in spelt if DIGIT.search(value) or not DIGIT.search(text)):
        return True
    for said in (NUMBERED.sub("", text), text):  # "2. so it is 8" or "8. It has eight legs"
        if found := [entry for entry in numbers(said) if not entry[0] & given]:
            readings, start, end = found[-1]
            unit = UNIT.match(said, end) or CURRENCY.search(said[:start])
            known = not unit or "units" not in check or unit[1].startswith(tuple(check["units"]))
            return bool(readings & wanted) and known and not_denied(said, start, end)
    return False


def regex(check: dict, text: str, asked: str) -> bool:
    flags = re.NOFLAG if check.get("case") else re.IGNORECASE
    return any(re.search(pattern, text, flags) for pattern in check["values"])


def words(check: dict, text: str, asked: str) -> bool:
    return in_range(len(re.findall(r"(?:[^\W\d_]|')+", text)), check["count"])


def count_lines(check: dict, text: str, asked: str) -> bool:
    found = [line for line in lines(text) if re.search(check.get("matching", ""), line)]
    return in_range(len(found), check["count"])


def items(check: dict, text: str, asked: str) -> bool:
    if "values" in check:
        return listed(plain(text, check)) == [bare(plain(value, check)) for value in check["values"]]
    return in_range(sum(BULLET.match(line) is not None for line in lines(text)), check["count"])


def sentences(check: dict, text: str, asked: str) -> bool:
    return in_range(len(re.findall(r"[.!?]+(?=\s|$)", text.strip())), check["count"])


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
    return same and ("of" not in check or all(isinstance(item, JSON_TYPES[check["of"]]) for item in value))


def in_order(check: dict, text: str, asked: str) -> bool:
    text = text if check.get("case") else text.lower()
    places = [text.find(value if check.get("case") else value.lower()) for value in check["values"]]
    return -1 not in places and places == sorted(places)


def script(check: dict, text: str, asked: str) -> bool:
    letters = [unicodedata.name(letter, "").split()[0].lower() for letter in text if letter.isalpha()]
    return bool(letters) and sum(letter in check["values"] for letter in letters) >= 0.9 * len(letters)


# what decides each type, and the keys of which it needs at least one
TYPES: dict[str, tuple[Callable[[dict, str, str], bool], tuple[str, ...]]] = {
    "equals": (equals, ("values",)),
    "contains": (contains, ("values",)),
    "number": (number, ("values",)),
    "regex": (regex, ("values",)),
    "words": (words, ("count",)),
    "lines": (count_lines, ("count",)),
    "items": (items, ("count", "values")),
    "sentences": (sentences, ("count",)),
    "json_keys": (json_keys, ("values",)),
    "json_list": (json_list, ("count", "values", "of")),
    "in_order": (in_order, ("values",)),
    "script": (script, ("values",)),
}
OPTIONS = {"contains": ["all"], "number": ["units"], "lines": ["matching"], "json_keys": ["more"]}
