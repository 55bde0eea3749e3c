"""Gates: what is read, what an interval says of one, how many questions decide."""

import math

import numpy as np
import pytest

from llm_alignment import files, stats
from llm_alignment.evaluation import (
    ENOUGH_ITEMS,
    Evaluation,
    asked_gates,
    describe,
    judge,
    parse_gates,
    questions_needed,
)
from llm_alignment.files import InputError


def delta(mean, low, high, n=80) -> dict:
    return {"mean": mean, "low": low, "high": high, "p": 0.5, "n": n, "changed": n, "clusters": None}


def test_gates_are_read():
    assert parse_gates("mtbench=-0.3, retention=-5,val_loss = -0.05,") == {
        "mtbench": -0.3, "retention": -5.0, "val_loss": -0.05,
    }  # fmt: skip
    assert parse_gates("") == {}


@pytest.mark.parametrize("text", ["mtbench", "=1", "mtbench=", "mtbench=much", "a=1,a=2", "a=nan", "a=inf", "a=1=2"])
def test_gates_that_cannot_be_read_are_one_line(text):
    with pytest.raises(InputError) as error:
        parse_gates(text)
    assert "\n" not in str(error.value)


def test_a_gate_on_what_is_not_measured():
    mtbench = [Evaluation(name="mtbench", items=[], read=lambda *_: [])]
    assert asked_gates("mtbench=0,", mtbench) == {"mtbench": 0.0}
    messages = []
    for name in ("reddit", "c"):
        with pytest.raises(files.InputError) as error:
            asked_gates(f"mtbench=0,{name}=0", mtbench)
        messages.append(str(error.value).replace(f" {name}:", ""))
    assert messages[0] != messages[1] and not any("\n" in message for message in messages)


INTERVALS = [  # the gate itself is acceptable
    (-0.2, 0.4, "passed", "missed"), (-0.3, 0.4, "passed", "undecided"), (-0.5, 0.4, "undecided", "undecided"),
    (-0.5, -0.3, "undecided", "passed"), (-0.5, -0.4, "missed", "passed"),
]  # fmt: skip


@pytest.mark.parametrize(("low", "high", "higher", "lower"), INTERVALS)
def test_the_whole_interval_decides(low, high, higher, lower):
    """The same difference, by the gate -0.3: at least that where higher is better, at most that where lower is."""
    found = delta((low + high) / 2, low, high)
    for lower_is_better, verdict in ((False, higher), (True, lower)):
        gate = judge(found, -0.3, lower_is_better=lower_is_better)
        assert (gate["verdict"], gate["limit"], gate["n"], gate["low"]) == (verdict, -0.3, 80, low)
        assert (gate["questions"] is None) == (verdict != "undecided")
        words = describe("score", gate, lower_is_better=lower_is_better)
        assert verdict in words and ("at most" if lower_is_better else "at least") in words and "\n" not in words


def test_too_few_items_or_no_interval_are_undecided():
    few = judge(delta(0.5, 0.4, 0.6, n=39), -0.3)
    assert few["verdict"] == "undecided" and few["questions"] == ENOUGH_ITEMS == 40
    assert judge(delta(0.5, 0.4, 0.6, n=40), -0.3)["verdict"] == "passed"
    assert judge(delta(0.5, None, None, n=3), -0.3)["questions"] == 40
    unchanged = judge(stats.mcnemar([1] * 240, [1] * 240), -0.05)
    assert (unchanged["verdict"], unchanged["questions"]) == ("undecided", None)
    assert judge(stats.paired_delta([], []), 0)["verdict"] == "undecided"
    for gate in (few, unchanged, judge(stats.paired_delta([], []), 0)):
        assert "undecided" in describe("score", gate)


def test_the_number_of_questions_by_hand():
    """Two sides: the one that reaches over the gate counts. 3.24 standard errors away, 90 % of repeats decide."""
    gate = judge(delta(0.0, -0.49, 0.2, n=100), -0.3)
    assert gate["questions"] == math.ceil(100 * (0.49 / 1.96 * 3.24 / 0.3) ** 2)
    assert judge(delta(-0.4, -0.5, 0.09, n=100), -0.3)["questions"] == math.ceil(100 * (0.25 * 3.24 / 0.1) ** 2)
    assert judge(delta(-0.3, -0.5, 0.1), -0.3)["questions"] is None
    earlier = [delta(1.0, 0.02, 1.98, n=100), delta(0.0, -0.98, 0.98, n=49), delta(0, None, None)]  # sd 5 and 3.5
    assert questions_needed(-0.5, earlier) == math.ceil((3.24 / 0.5) ** 2 * (5**2 + 3.5**2) / 2)
    assert questions_needed(-0.5, earlier, expected=0.5) == math.ceil(3.24**2 * (5**2 + 3.5**2) / 2)
    assert questions_needed(-50, earlier) == 40
    assert questions_needed(0.0, earlier) is questions_needed(-0.5, [delta(0, None, None)]) is None


def test_that_many_questions_decide():
    rng = np.random.default_rng(1)
    gate = judge(stats.paired_delta([0.0] * 80, rng.normal(0, 1, 80).tolist()), -0.25)
    assert gate["verdict"] == "undecided"
    n = gate["questions"]
    again = [stats.paired_delta([0.0] * n, rng.normal(gate["mean"], 1, n).tolist()) for _ in range(20)]
    assert sum(judge(each, -0.25)["verdict"] == "passed" for each in again) >= 15  # 18 expected
