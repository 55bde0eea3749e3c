"""Result files: rows that survive a kill, and the baselines that later runs reuse."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llm_alignment.files import InputError
from llm_alignment.results import ResultFile, baseline_cache

MODEL = {"model": "m", "adapter": "none"}


def questions(n: int) -> list[dict]:
    return [{"question_id": number, "text": f"вопрос {number}"} for number in range(n)]


def answer_all(
    path: Path, asked: list[dict], fingerprint: dict = MODEL, *, use_cache: bool = False, renew: bool = False
) -> tuple[list[dict], list]:
    """Answers the questions as an evaluation does; the rows, and the ids of the questions that were asked."""
    cache = baseline_cache(fingerprint) if use_cache else None
    results, new = ResultFile(path, fingerprint, renew=renew, cache=cache), []
    for question in results.missing(asked):
        new.append(question["question_id"])
        results.append({"question_id": question["question_id"], "answer": question["text"].upper()})
    results.finish()
    return [results.rows[question["question_id"]] for question in asked], new


def test_a_result_file_goes_on_after_any_cut(tmp_path):
    asked = questions(4)
    rows, new = answer_all(tmp_path / "whole.jsonl", asked)
    assert new == [0, 1, 2, 3] and [row["answer"] for row in rows] == [q["text"].upper() for q in asked]
    whole = (tmp_path / "whole.jsonl").read_bytes()
    header = whole.index(b"\n") + 1
    for size in range(header, len(whole), 7):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:size])
        assert answer_all(path, asked)[0] == rows
        assert path.read_bytes() == whole
    assert answer_all(tmp_path / "whole.jsonl", asked)[1] == []


@pytest.mark.parametrize(
    "damage", [b"\0" * 20, b'{"question_id": 1, "ans', b"[1, 2]", b'{"answer": "x"}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_line_is_answered_again(tmp_path, logged, damage):
    path, asked = tmp_path / "results.jsonl", questions(3)
    rows, _ = answer_all(path, asked)
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage
    path.write_bytes(b"\n".join(lines))
    again, new = answer_all(path, asked)
    assert again == rows and new == [1]
    assert "results.jsonl:3" in logged.text and "answered again" in logged.text
    assert len(path.read_bytes().strip().split(b"\n")) == 4
    assert answer_all(path, asked)[1] == []


@pytest.mark.parametrize("header", [b"\0\0\0", b'{"fingerprint": ', b'{"question_id": 1}', b"[1]"])
def test_a_damaged_first_line_is_one_line(tmp_path, header):
    path = tmp_path / "results.jsonl"
    answer_all(path, questions(2))
    path.write_bytes(b"\n".join([header, *path.read_bytes().split(b"\n")[1:]]))
    content = path.read_bytes()
    for renew in (False, True):
        with pytest.raises(InputError, match="results.jsonl") as error:
            ResultFile(path, MODEL, renew=renew)
        assert "\n" not in str(error.value) and path.read_bytes() == content
    path.write_bytes(b"")  # a crash right after the file was made
    assert answer_all(path, questions(2))[1] == [0, 1]


def test_another_evaluation_is_refused_or_kept_beside(tmp_path):
    path = tmp_path / "results.jsonl"
    answer_all(path, questions(2))
    content = path.read_bytes()
    with pytest.raises(InputError, match="adapter: none -> other"):
        answer_all(path, questions(2), {**MODEL, "adapter": "other"})
    assert path.read_bytes() == content
    assert answer_all(path, questions(2), {**MODEL, "adapter": "other"}, renew=True)[1] == [0, 1]
    assert (tmp_path / "results.jsonl.old").read_bytes() == content and b"other" in path.read_bytes()


@pytest.mark.usefixtures("own_folders")
def test_the_cache_gives_what_is_missing(tmp_path, logged):
    rows, _ = answer_all(tmp_path / "a.jsonl", questions(3), use_cache=True)
    assert "baseline cache" not in logged.text
    assert answer_all(tmp_path / "b.jsonl", questions(3), use_cache=True) == (rows, [])
    assert "3 rows taken from the baseline cache" in logged.text
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    half = (tmp_path / "a.jsonl").read_bytes().split(b"\n")[:2]
    (tmp_path / "half.jsonl").write_bytes(b"\n".join(half) + b"\n")
    assert answer_all(tmp_path / "half.jsonl", questions(3), use_cache=True) == (rows, [])
    assert answer_all(tmp_path / "c.jsonl", questions(5), use_cache=True)[1] == [3, 4], "and is filled up"
    assert answer_all(tmp_path / "d.jsonl", questions(5), use_cache=True)[1] == []
    assert answer_all(tmp_path / "e.jsonl", questions(3))[1] == [0, 1, 2]
    [cached] = (tmp_path / "cache").rglob("*.jsonl")
    lines = cached.read_bytes().split(b"\n")
    cached.write_bytes(b"\n".join([*lines[:2], b"\0", *lines[3:]]))
    assert answer_all(tmp_path / "damaged.jsonl", questions(5), use_cache=True)[1] == [1]
    assert answer_all(tmp_path / "mended.jsonl", questions(5), use_cache=True)[1] == []
    assert answer_all(tmp_path / "f.jsonl", questions(3), {**MODEL, "seed": 1}, use_cache=True)[1] == [0, 1, 2]


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("damage", [b"", b"\0\0\n", b'{"fingerprint": {"model": "another"}}\n{"question_id": 0}\n'])
def test_a_damaged_cache_is_ignored_with_a_warning(tmp_path, logged, damage):
    answer_all(tmp_path / "a.jsonl", questions(2), use_cache=True)
    [cached] = (tmp_path / "cache").rglob("*.jsonl")
    content = cached.read_bytes()
    cached.write_bytes(damage)
    assert answer_all(tmp_path / "b.jsonl", questions(2), use_cache=True)[1] == [0, 1]
    assert "ignoring" in logged.text and cached.name in logged.text
    assert cached.read_bytes() == content, "and mended"


@pytest.mark.usefixtures("own_folders")
def test_what_killed_runs_left_in_the_cache_goes_after_a_day(tmp_path):
    folder = tmp_path / "cache" / "baselines"
    folder.mkdir(parents=True)
    for name in ("old.jsonl.17.tmp", "new.jsonl.17.tmp", "own.tmp"):
        (folder / name).touch()
    for name in ("old.jsonl.17.tmp", "own.tmp"):
        os.utime(folder / name, (0, time.time() - 25 * 3600))
    answer_all(tmp_path / "a.jsonl", questions(2), use_cache=True)
    assert {path.name for path in folder.glob("*.tmp")} == {"new.jsonl.17.tmp", "own.tmp"}
