"""The 25 instructions of this project and the checks that a program can decide.

The share of checks passed is what can be compared with the published instruction scores, which are keyword rules over
25 other instructions. The reward model's score of the same answers is a measure of its own.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable
from typing import Any

from llm_alignment.files import parse_json


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$)", text.strip()))


def _items(text: str) -> list[str]:
    """The items of a numbered or bulleted list."""
    return [line for line in _lines(text) if re.match(r"(\d+[.)]|[-*+•])\s", line)]


def _json(text: str) -> Any:
    try:
        return parse_json(re.sub(r"^```(json)?|```$", "", text.strip()))
    except ValueError:
        return None


# (category, instruction, checks): a check is a function of the answer's text
INSTRUCTIONS: list[tuple[str, str, list[Callable[[str], bool]]]] = [
    (
        "lists",
        "List exactly five ways in which a household can spend less, as a numbered list.",
        [lambda t: len(_items(t)) == 5, lambda t: _in_order(t, "1", "2", "3", "4", "5")],
    ),
    (
        "lists",
        "Write the days of the week, one a line, starting with Wednesday. Write nothing else.",
        [
            lambda t: len(_lines(t)) == 7,
            lambda t: _in_order(t, "Wednesday", "Thursday", "Sunday", "Monday", "Tuesday"),
        ],
    ),
    (
        "lists",
        "Name exactly three primary colours, separated by commas, and write nothing else.",
        [lambda t: t.count(",") == 2, lambda t: len(_words(t)) == 3],
    ),
    (
        "lists",
        "Give three advantages and three disadvantages of working from home as bullet points, under the headings "
        "Advantages and Disadvantages.",
        [lambda t: _in_order(t, "Advantages", "Disadvantages"), lambda t: len(_items(t)) == 6],
    ),
    (
        "formats",
        "Describe an invented person as a JSON object with exactly the keys name, age and city. Output only the JSON.",
        [
            lambda t: isinstance(_json(t), dict),
            lambda t: isinstance(_json(t), dict) and set(_json(t)) == {"name", "age", "city"},
        ],
    ),
    (
        "formats",
        "Give four European capitals as a JSON array of strings. Output only the JSON.",
        [
            lambda t: isinstance(_json(t), list) and len(_json(t)) == 4,
            lambda t: isinstance(_json(t), list) and all(isinstance(item, str) for item in _json(t)),
        ],
    ),
    (
        "formats",
        "Write a Markdown table with the columns Asset and Risk and three rows below the header.",
        [
            lambda t: sum(line.startswith("|") for line in _lines(t)) == 5,
            lambda t: bool(re.search(r"\|\s*Asset\s*\|\s*Risk\s*\|", t)),
        ],
    ),
    (
        "formats",
        "Write two synonyms of profit in square brackets, separated by a semicolon, like [one; two], and nothing "
        "else.",
        [lambda t: bool(re.fullmatch(r"\[[^;\[\]]+;[^;\[\]]+\]", t.strip()))],
    ),
    (
        "formats",
        "Write the currencies of Japan, Poland and Brazil, one a line, in the form country: currency.",
        [lambda t: sum(":" in line for line in _lines(t)) == 3, lambda t: _in_order(t, "yen", "zloty", "real")],
    ),
    (
        "length",
        "Explain in exactly two sentences what inflation is.",
        [lambda t: _sentences(t) == 2, lambda t: "price" in t.lower()],
    ),
    (
        "length",
        "Describe compound interest in at most 40 words.",
        [lambda t: 5 <= len(_words(t)) <= 40, lambda t: "interest" in t.lower()],
    ),
    (
        "length",
        "Describe your favourite season in 60 to 90 words.",
        [
            lambda t: 60 <= len(_words(t)) <= 90,
            lambda t: any(season in t.lower() for season in ("spring", "summer", "autumn", "fall", "winter")),
        ],
    ),
    (
        "length",
        "Write a haiku about the sea: three lines and nothing else.",
        [lambda t: len(_lines(t)) == 3, lambda t: 6 <= len(_words(t)) <= 17],
    ),
    (
        "length",
        "Is 17 a prime number? Answer with yes or no and nothing else.",
        [lambda t: t.strip().lower().rstrip(".") == "yes"],
    ),
    (
        "words",
        "Write one sentence about a voyage that contains the words storm and harbour.",
        [lambda t: "storm" in t.lower() and "harbour" in t.lower(), lambda t: _sentences(t) == 1],
    ),
    (
        "words",
        "Describe a bank in one sentence without using the word money.",
        [lambda t: "money" not in t.lower(), lambda t: _sentences(t) == 1],
    ),
    (
        "words",
        "Explain the difference between a share and a bond, use the words ownership and loan, and end with a "
        "question.",
        [lambda t: "ownership" in t.lower() and "loan" in t.lower(), lambda t: t.strip().endswith("?")],
    ),
    (
        "words",
        "Begin your answer with the words In short, and say in at most 30 words why diversification lowers risk.",
        [lambda t: t.strip().startswith("In short"), lambda t: len(_words(t)) <= 30],
    ),
    (
        "words",
        "Write a short formal letter that asks a bank for a new card. It starts with Dear and its last line is "
        "Kind regards.",
        [lambda t: t.strip().startswith("Dear"), lambda t: " ".join(_lines(t)[-1:]).startswith("Kind regards")],
    ),
    (
        "words",
        "Write the sentence Cash is king. exactly three times and nothing else.",
        [lambda t: t.count("Cash is king.") == 3, lambda t: len(_words(t)) == 9],
    ),
    (
        "order",
        "Sort these numbers from the smallest to the largest, separated by commas: 42, 7, 19, 3, 88.",
        [lambda t: _numbers(t)[-5:] == [3, 7, 19, 42, 88]],
    ),
    (
        "order",
        "Sort these words alphabetically: pear, apple, mango, cherry.",
        [lambda t: _in_order(t, "apple", "cherry", "mango", "pear")],
    ),
    (
        "order",
        "Count from 10 down to 1, with spaces between the numbers, and write nothing else.",
        [lambda t: t.split() == [str(number) for number in range(10, 0, -1)]],
    ),
    (
        "arithmetic",
        "What is 15 percent of 240? Answer with the number alone.",
        [lambda t: t.strip().rstrip(".") == "36"],
    ),
    (
        "arithmetic",
        "A share costs 50 dollars and rises by 10 percent. What does it cost now? Write only the price in dollars.",
        [lambda t: _numbers(t) == [55] or "55.00" in t, lambda t: len(_words(t)) <= 2],
    ),
]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _in_order(text: str, *parts: str) -> bool:
    places = [text.lower().find(part.lower()) for part in parts]
    return -1 not in places and places == sorted(places)


def instruct_questions(limit: int, seed: int) -> list[dict]:
    """The instructions as `score_questions` takes them; `limit` > 0 takes a sample by `seed`."""
    numbers = list(range(len(INSTRUCTIONS)))
    if 0 < limit < len(INSTRUCTIONS):
        numbers = sorted(random.Random(seed).sample(range(len(INSTRUCTIONS)), limit))
    return [
        {"question_id": number + 1, "category": INSTRUCTIONS[number][0], "turns": [INSTRUCTIONS[number][1]]}
        for number in numbers
    ]


def checks_passed(row: dict) -> list[bool]:
    """For each check of the row's instruction, whether the answer passes it."""
    return [check(row["answers"][0]) for check in INSTRUCTIONS[row["question_id"] - 1][2]]


def check_rate(rows: list[dict]) -> float:
    """The share of checks that the answers of `rows` pass, in per cent."""
    return 100 * statistics.fmean(passed for row in rows for passed in checks_passed(row))
