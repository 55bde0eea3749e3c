"""A judge is checked against known preferences: planted biases are seen."""

from __future__ import annotations

import random

import pytest
from scipy.stats import beta

from llm_alignment.health import main_script
from llm_alignment.rewards import check_judge, judge_lines


def planted_pairs(count: int) -> list[dict]:
    """Pairs in two languages; "good" or «хорошо» marks the chosen answer, whose length is drawn as the other's is."""
    rng, pairs = random.Random(0), []
    for number in range(count):
        words = ("Question", "good", "bad", "word ") if number % 2 else ("Вопрос", "хорошо", "плохо", "слово ")
        chosen, rejected = (f"{mark} {words[3] * rng.randint(1, 40)}".strip() for mark in words[1:3])
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        prompt = f"{words[0]} {number}?"
        prompt = [*turns, {"role": "user", "content": prompt}] if number % 3 else prompt
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def is_good(text: str) -> bool:
    return text.startswith(("good", "хорошо"))


def coin(turns: list[dict]) -> float:
    return random.Random(turns[-1]["content"] + turns[-2]["content"]).random()


def is_latin(turns: list[dict]) -> bool:
    return main_script(turns[-2]["content"]) == "latin"


JUDGES = {
    "fair": lambda turns: is_good(turns[-1]["content"]) + 0.001 * len(turns[-2]["content"]),
    "length": lambda turns: len(turns[-1]["content"]) / 10,
    "nothing": lambda turns: 1.5,
    "noise": coin,
    "russian is a coin": lambda turns: is_good(turns[-1]["content"]) if is_latin(turns) else coin(turns),
}


def report_of(name: str) -> dict:
    def score(conversations: list[list[dict]]) -> list[float]:
        assert all(turns[-1]["role"] == "assistant" and turns[-2]["role"] == "user" for turns in conversations)
        return [float(JUDGES[name](turns)) for turns in conversations]

    return check_judge(planted_pairs(400), score)


def test_a_fair_judge_agrees_everywhere():
    report = report_of("fair")
    assert {group["share"] for group in report["groups"].values()} == {100} and report["length_explains"] < 5
    assert report["groups"]["all"]["low"] == pytest.approx(100 * beta.ppf(0.025, 400, 1))
    assert [report["groups"][name]["n"] for name in ("all", "latin", "cyrillic")] == [400, 200, 200]


def test_a_judge_of_length_is_seen():
    report = report_of("length")
    groups = report["groups"]
    assert groups["longer"]["share"] == 100 and groups["shorter"]["share"] == 0
    assert report["longer_preferred"] == 100 and report["length_explains"] > 60
    assert groups["all"]["low"] < 50 < groups["all"]["high"] and 40 < report["longer_chosen"] < 60
    lengths = [(len(pair["chosen"]), len(pair["rejected"])) for pair in planted_pairs(400)]
    near = [abs(a - b) <= max(a, b) / 10 for a, b in lengths]
    assert groups["like"]["n"] == sum(near) > 20
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in planted_pairs(400)]
    other = check_judge(swapped, lambda all_turns: [JUDGES["length"](turns) for turns in all_turns])
    assert other["length_explains"] == pytest.approx(report["length_explains"])


def test_a_judge_of_nothing_and_one_of_noise_are_seen():
    nothing, noise = report_of("nothing"), report_of("noise")
    assert nothing["groups"]["all"]["ties"] == 400 and nothing["groups"]["all"]["share"] is None
    assert nothing["length_explains"] is nothing["longer_preferred"] is None
    assert noise["groups"]["all"]["low"] < 50 < noise["groups"]["all"]["high"] and noise["length_explains"] < 5


def test_a_judge_that_knows_one_language_is_seen():
    groups = report_of("russian is a coin")["groups"]
    assert groups["latin"]["share"] == 100 and groups["cyrillic"]["high"] < 70 < groups["latin"]["low"]


def test_answers_in_two_scripts_are_a_group():
    report = check_judge([{"prompt": "Вопрос?", "chosen": "Да.", "rejected": "Yes."}] * 3, lambda _: [0.0, 1.0] * 3)
    assert report["groups"]["two_scripts"] == report["groups"]["all"]


@pytest.mark.parametrize("name", JUDGES)
def test_every_figure_is_printed(name):
    report = report_of(name)
    lines = judge_lines(report)
    for line, group in zip(lines[1:], report["groups"].values(), strict=False):
        assert f" {group['n']} " in line and line.endswith(f" {group['ties']}")
        assert group["share"] is None or f"{group['share']:.1f} % [{group['low']:.1f}, {group['high']:.1f}]" in line
    assert max(map(len, lines)) < 100
