"""The validation loss before and after training."""

import math

import pytest

from llm_alignment import validation


def test_validation_loss_by_hand():
    before = [{"question_id": n, "nll": nll, "tokens": tokens} for n, nll, tokens in ((0, 2.0, 1), (1, 3.0, 3))]
    after = [
        {"question_id": n, "nll": nll, "tokens": tokens} for n, nll, tokens in ((1, 1.5, 3), (0, 1.0, 1), (2, 9.0, 1))
    ]
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
    rows = [{"question_id": n, "nll": 2.0, "tokens": 1} for n in range(8)]
    diverged = [{**row, "nll": 5000.0 + row["question_id"]} for row in rows]
    assert validation.summarise_validation(diverged)["ppl"] > 1e300
    for before, after in ((rows, diverged), (diverged, rows)):
        deltas = validation.compare_validation(before, after)
        assert abs(deltas["ppl"]["mean"]) > 1e300 and math.isfinite(deltas["ppl"]["high"])
