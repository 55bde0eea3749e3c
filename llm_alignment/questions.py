"""Files of questions: every row has turns and an id of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from llm_alignment.files import InputError, SkippedRows, read_rows

SAMPLE_SEED = 42  # of samples of questions: runs of all seeds ask the same, and share their baselines


def sampled(questions: list[dict], limit: int) -> list[dict]:
    """`limit` of the questions in their order; all of them when `limit` is 0."""
    if not 0 < limit < len(questions):
        return questions
    places = random.Random(SAMPLE_SEED).sample(range(len(questions)), limit)
    return [questions[place] for place in sorted(places)]


def read_questions(
    path: Path, as_question: Callable[[dict, int], dict] = lambda row, number: row
) -> Iterator[tuple[str, dict]]:
    """Yields (place, question) of the rows of a file; `as_question(row, number from 1)` gives what is looked at.

    A question has "turns", a list of texts, and a "question_id", a whole number or a text. Raises InputError naming
    file and line for a row without them or with the id of another, and for a file that is damaged or empty.
    """
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
