"""The validation loss before and after training."""

import math
import statistics

import pytest

from llm_alignment import validation


def rows_of(*rows: tuple[int, float, int]) -> list[dict]:
    return [{"question_id": n, "nll": nll, "tokens": tokens} for n, nll, tokens in rows]


def test_validation_loss_by_hand():
    before, after = rows_of((0, 2.0, 1), (1, 3.0, 3)), rows_of((1, 1.5, 3), (0, 1.0, 1), (2, 9.0, 1))
    summary = validation.summarise_validation(before)
    assert summary["val_loss"] == pytest.approx(5 / 4) and summary["ppl"] == pytest.approx(math.exp(5 / 4))
    assert summary["val_loss_row_mean"] == pytest.approx((2 + 1) / 2)
    assert validation.summarise_full_validation(after)["val_rows_full"] == 3
    deltas = validation.compare_validation(before, after)  # by id, over the rows on both sides
    assert deltas["val_loss"]["n"] == 2 and deltas["val_loss"]["mean"] == pytest.approx((2.5 - 5) / 4)
    assert deltas["val_loss_row_mean"]["mean"] == pytest.approx((-1 - 0.5) / 2)
    assert deltas["ppl"]["mean"] == pytest.approx(math.exp(2.5 / 4) - math.exp(5 / 4))
    assert deltas["ppl"]["low"] is None, "two rows are too few for an interval"


def test_a_run_that_diverged_has_a_perplexity_too():
    rows = rows_of(*((n, 2.0, 1) for n in range(8)))
    diverged = [{**row, "nll": 5000.0 + row["question_id"]} for row in rows]
    assert validation.summarise_validation(diverged)["ppl"] > 1e300
    for before, after in ((rows, diverged), (diverged, rows)):
        deltas = validation.compare_validation(before, after)
        assert abs(deltas["ppl"]["mean"]) > 1e300 and math.isfinite(deltas["ppl"]["high"])


@pytest.mark.parametrize("n", [8, 60])
def test_the_perplexity_before_is_an_estimate_too(n):
    """All rows lose 90 % of their loss: what is not known is the perplexity before, e to the mean of other rows."""
    rows = rows_of(*((row, 50.0 * (1 + row % 2), 10) for row in range(n)))
    delta = validation.compare_validation(rows, [{**row, "nll": row["nll"] / 10} for row in rows])["ppl"]
    assert delta["mean"] == pytest.approx(math.exp(0.75) - math.exp(7.5)) and delta["p"] < 0.05
    error = statistics.stdev(row["nll"] / 10 for row in rows) / math.sqrt(n) * math.exp(7.5)  # of e**x: dx * e**x
    reach = (delta["high"] - delta["low"]) / 2
    assert delta["low"] < delta["mean"] < delta["high"] < 0
    assert n == 8 or 1.9 * error < reach < 2.6 * error, "with 8 rows it is clipped at 0"


def test_the_perplexity_agrees_with_the_loss():
    rows = rows_of(*((row, 20.0 + 3 * (row % 5), 10) for row in range(40)))
    for shift, changed in ((0.0, False), (0.6, True), (-0.6, True)):
        after = [{**row, "nll": row["nll"] + shift + (-1) ** row["question_id"]} for row in rows]
        deltas = validation.compare_validation(rows, after)
        assert deltas["ppl"]["p"] == deltas["val_loss"]["p"] and (deltas["ppl"]["p"] <= 0.05) == changed
        for end in ("low", "high", "mean"):
            assert (deltas["ppl"][end] > 0) == (deltas["val_loss"][end] > 0)
