"""The 25 instructions and the share of their checks."""

from llm_alignment import checks

POOR = ["", "I am not sure. It depends, doesn't it? Money comes and goes! See 1 or 2."]


def test_every_instruction_tells_its_reference_from_a_poor_answer():
    rows = checks.instructions()
    assert sorted(rows) == list(range(1, 26))
    for number, row in rows.items():
        for answer, right in [(row["reference"], True), *((poor, False) for poor in POOR)]:
            assert all(checks.checks_passed({"question_id": number, "answers": [answer]})) is right


def test_a_limit_takes_a_sample_by_seed_and_the_rate_counts_checks():
    sample = checks.instruct_questions(5)
    assert sample == checks.instruct_questions(5)
    assert all(row.keys() == {"question_id", "category", "turns"} for row in sample)
    assert len(checks.instruct_questions(0)) == len(checks.instruct_questions(99)) == 25
    rows = [{"question_id": 1, "answers": ["1. a\n2. b\n3. c\n4. d"]}, {"question_id": 14, "answers": ["Yes."]}]
    assert [check for row in rows for check in checks.checks_passed(row)] == [False, False, True]
