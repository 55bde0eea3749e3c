"""Summaries and differences of answers that the reward model scored."""

import pytest

from llm_alignment import files, scores


def test_compare_rows_pairs_by_question():
    def row(number, score, turns=("q",)):
        scores = {"scores": [score], "rewards": [score - 5], "answer_tokens": [10 * number]}
        return {"question_id": number, "turns": list(turns), **scores}

    before = [row(1, 2.0), row(2, 3.0), row(3, 9.0)]
    after = [row(2, 4.0), row(1, 5.0)]
    deltas = scores.compare_rows(before, after)
    assert deltas["score"]["mean"] == pytest.approx(2.0) and deltas["score"]["n"] == 2
    assert deltas["raw"]["mean"] == pytest.approx(2.0)
    assert deltas["length"]["mean"] == 0 and deltas["equal_length"]["mean"] == pytest.approx(2.0)
    with pytest.raises(files.InputError):
        scores.compare_rows(before, [row(7, 1.0)])
    with pytest.raises(files.InputError):
        scores.compare_rows(before, [row(1, 1.0, turns=["another"])])


def rows(*answers: tuple[float, int, str]) -> list[dict]:
    """Rows of one turn from (score, tokens, answer)."""
    return [
        {
            **{"question_id": n + 1, "category": "a", "turns": ["q"], "answers": [answer], "scores": [score]},
            **{"scores_logged": [score], "rewards": [score - 5], "answer_tokens": [tokens], "finished": [True]},
        }
        for n, (score, tokens, answer) in enumerate(answers)
    ]


def test_instructions_have_success_and_checks():
    before, after = (
        rows((6.0, 5, "x"), (8.0, 5, "x"), (5.0, 5, "x")),
        rows((7.0, 5, "x"), (8.0, 9, "x"), (9.0, 7, "x")),
    )
    summary = scores.summarise_scored("finance_instruct", before)["finance_instruct"]
    assert summary["success_rate"] == pytest.approx(100 / 3) and "check_rate" not in summary
    assert "success_rate" not in scores.summarise_scored("mtbench", before)["mtbench"]
    deltas = scores.compare_scored("finance_instruct", before, after[::-1])
    assert deltas["finance_instruct_success"]["mean"] == pytest.approx(200 / 3)
    assert deltas["finance_instruct_success"]["p"] == 0.5 and "finance_instruct_checks" not in deltas
    assert deltas["finance_instruct_length"]["mean"] == pytest.approx(2)
    deltas = scores.compare_scored("instruct", before, after)
    assert deltas["instruct_checks"]["mean"] == 0 and deltas["instruct_success"]["n"] == 3
