"""Summaries and differences of answers that the reward model scored."""

import pytest

from llm_alignment import files, scores


def rows(*answers: tuple[int, float, int], turns: tuple[str, ...] = ("q",)) -> list[dict]:
    """Rows of one turn from (question_id, score, tokens)."""
    return [
        {
            **{"question_id": n, "category": "a", "turns": list(turns), "answers": ["x"], "scores": [score]},
            **{"scores_logged": [score], "rewards": [score - 5], "answer_tokens": [tokens], "finished": [True]},
        }
        for n, score, tokens in answers
    ]


def test_differences_are_paired_by_question():
    before, after = rows((1, 2.0, 10), (2, 3.0, 20), (3, 9.0, 30)), rows((2, 4.0, 20), (1, 5.0, 10))
    deltas = scores.compare_scored("mtbench", before, after)
    assert deltas["mtbench"]["mean"] == pytest.approx(2.0) and deltas["mtbench"]["n"] == 2
    assert deltas["mtbench_raw"]["mean"] == pytest.approx(2.0)
    assert deltas["mtbench_length"]["mean"] == 0 and deltas["mtbench_equal_length"]["mean"] == pytest.approx(2.0)
    for other in (rows((7, 1.0, 70)), rows((1, 1.0, 10), turns=("another",))):
        with pytest.raises(files.InputError):
            scores.compare_scored("mtbench", before, other)


def test_instructions_have_success_and_checks():
    before, after = rows((1, 6.0, 5), (2, 8.0, 5), (3, 5.0, 5)), rows((1, 7.0, 5), (2, 8.0, 9), (3, 9.0, 7))
    summary = scores.summarise_scored("finance_instruct", before)["finance_instruct"]
    assert summary["success_rate"] == pytest.approx(100 / 3) and "check_rate" not in summary
    assert "success_rate" not in scores.summarise_scored("mtbench", before)["mtbench"]
    deltas = scores.compare_scored("finance_instruct", before, after[::-1])
    assert deltas["finance_instruct_success"]["mean"] == pytest.approx(200 / 3)
    assert deltas["finance_instruct_success"]["p"] == 0.5 and "finance_instruct_checks" not in deltas
    assert deltas["finance_instruct_length"]["mean"] == pytest.approx(2)
    deltas = scores.compare_scored("instruct", before, after)
    assert deltas["instruct_checks"]["mean"] == 0 and deltas["instruct_success"]["n"] == 3
