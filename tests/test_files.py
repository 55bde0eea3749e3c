"""Rows in: readers; atomic writes; hashes."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from conftest import write_rows

from llm_alignment import files
from llm_alignment.files import InputError, SkippedRows
from llm_alignment.hub import open_dataset

# ---------------------------------------------------------------------------------------------------------------------
# reading

ROWS = [{"text": "один\u2028два", "n": 1}, {"text": "two", "n": None}, {"text": "\U0001f98a", "n": 2.5}]
KEPT = [{"text": "один\u2028два", "n": 1}, {"text": "two"}, {"text": "\U0001f98a", "n": 2.5}]


def read(path: Path) -> tuple[list[dict], SkippedRows]:
    skipped = SkippedRows()
    return [row for _, row in files.read_rows(path, skipped)], skipped


def packed(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def test_every_format_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = write_rows(tmp_path / "a.jsonl", ROWS)
    listed = tmp_path / "b.json"
    listed.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    parquet = tmp_path / "c.PARQUET"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    empty = tmp_path / "none.json"
    empty.write_text("[]\n", encoding="utf-8")
    assert read(empty)[0] == []
    for path in (lines, listed, parquet, packed(lines), packed(listed), packed(parquet)):
        rows, skipped = read(path)
        assert rows == KEPT and skipped.count == 0, path
    unnamed = tmp_path / "gzip-without-its-name.jsonl"
    unnamed.write_bytes(packed(lines).read_bytes())
    assert read(unnamed)[0] == KEPT


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"text": "\\ud83e"}', "invalid Unicode"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a', "not valid JSON"),
        (b"7", "not a JSON object"),
        (b"\0\0\0", "not valid JSON"),
    ],
)
def test_a_malformed_line_is_skipped_and_named(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": {"b": [2]}}\n')
    rows, skipped = read(path)
    assert rows == [{"a": 1}, {"a": {"b": [2]}}]
    assert skipped.count == 1 and skipped.places[0].startswith("rows.jsonl:2 (") and reason in skipped.places[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    device = "a pipe or a device"
    for path, told in ((tmp_path / "pipe", device), (Path(os.devnull), device), (tmp_path / "folder", "a folder")):
        with pytest.raises(InputError, match=told):
            list(files.read_jsonl(path))


def test_the_first_five_places_are_named(tmp_path, logged):
    rows, skipped = read(write_rows(tmp_path / "rows.jsonl", [{"a": 1}, *["torn"] * 7]))
    skipped.report("rows")
    assert skipped.count == 7 and len(skipped.places) == 5 and "skipped 7 rows" in logged.text


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400, "-" + "9" * 5000])
def test_a_number_beyond_a_float_is_infinite(tmp_path, number):
    for name, content in (("a.jsonl", f'{{"n": {number}}}'), ("a.json", f'[{{"n": {number}}}]')):
        (tmp_path / name).write_text(content, encoding="utf-8")
        [row] = read(tmp_path / name)[0]
        assert math.isinf(row["n"])


def archive(kind: str) -> bytes:
    """An archive of a file of rows."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows").mkdir()
        (Path(folder) / "rows" / "a.jsonl").write_text('{"a": 1}\n' * 9, encoding="utf-8")
        return Path(shutil.make_archive(str(Path(folder) / "packed"), kind, Path(folder) / "rows")).read_bytes()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'[{"a": 1},\n{"a"', "line 2 column 5"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "line 1 column 11"),
        ("a.json", b'[{"a": 1}] {"a": 2}', "line 1 column 11"),
        ("a.json", b'[{"a": "\xff"}]', "not valid JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(os.urandom(5000))[:-900], "gzip"),
        ("a.parquet", b"PAR1 and nothing", "Parquet"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n'), r"an archive \(xz\)"),
        ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n'), r"an archive \(bzip2\)"),
        ("a.jsonl", archive("tar"), r"an archive \(tar\)"),
        ("a.tar", archive("tar"), r"an archive \(tar\)"),
        ("a.tar.gz", archive("gztar"), r"an archive \(tar\)"),
        ("a.zip", archive("zip"), r"an archive \(zip\)"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(9), r"an archive \(zstd\)"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(9), r"an archive \(7z\)"),
    ],
)
def test_a_file_that_is_no_data_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    "name, is_read",
    [(f"{name}.jsonl", False) for name in
     "val valid validation test tests dev eval heldout held-out holdout my_val val_2 rows.test Val DEV-set valset "
     "testset validate тест тестовая валидация проверка_2 отложенные 验证".split()]
    + [(f"{split}/part.jsonl", False) for split in ("val", "test", "validation-00000-of-00002")]
    + [(f"{name}.jsonl", True) for name in
       "train rows latest value contest validated device interval протест".split()],
)  # fmt: skip
def test_other_splits_of_a_folder_are_not_read(tmp_path, name, is_read, logged):
    write_rows(tmp_path / "data.jsonl", [{"n": 1}])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_rows(tmp_path / name, [{"n": 2}])
    rows, _ = read(tmp_path)
    assert ([row["n"] for row in rows].count(2) == 1) == is_read and (Path(name).name in logged.text) != is_read


def test_a_folder_names_what_it_does_not_read(tmp_path, logged):
    folder = tmp_path / "data"
    (folder / "validation").mkdir(parents=True)
    (folder / ".cache").mkdir()
    write_rows(folder / "a.jsonl", [{"n": 1}])
    packed(write_rows(folder / "b.jsonl", [{"n": 2}]))
    (folder / "b.jsonl").unlink()
    write_rows(folder / "C.JSONL", [{"n": 3}])
    write_rows(folder / "latest.json", [{"n": 4}])  # "test" is no word of it
    for name in ("test-00000-of-00001.jsonl", "a_dev.json", "validation/v.jsonl", ".cache/x.jsonl", "README.md"):
        write_rows(folder / name, [{"n": 9}])
    write_rows(folder / "dataset_info.json", ["{"])
    for _ in range(2):
        rows = open_dataset(str(folder), "--dataset", SkippedRows())
        assert sorted(row["n"] for _, row in rows) == [1, 2, 3, 4]
    for name in ("test-00000-of-00001.jsonl", "a_dev.json", "v.jsonl", "README.md", "dataset_info.json"):
        assert name in logged.text
    assert "4 files read, 5 not read" in logged.text and ".cache" not in logged.text
    (folder / "lost.parquet").symlink_to("nowhere")
    with pytest.raises(InputError, match="lost.parquet: no such file"):
        list(open_dataset(str(folder), "--dataset", SkippedRows()))
    with pytest.raises(InputError, match="data.README.md"):
        (tmp_path / "empty" / "data").mkdir(parents=True)
        (tmp_path / "empty" / "data" / "README.md").write_text("", encoding="utf-8")
        list(open_dataset(str(tmp_path / "empty"), "--dataset", SkippedRows()))


# ---------------------------------------------------------------------------------------------------------------------
# writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="metrics.json"):
        files.write_json(path, {"a": 2})
    rows = write_rows(tmp_path / "rows.jsonl", [{"question_id": 1}])
    with pytest.raises(OSError, match="rows.jsonl"):
        files.append_lines(rows, [{"question_id": 2}])
    assert json.loads(path.read_text("utf-8")) == {"a": 1} and rows.read_text("utf-8") == '{"question_id": 1}\n'
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.json", "rows.jsonl"}


def test_a_file_that_another_program_holds_is_tried_again(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a", encoding="utf-8")
    replace, failures = os.replace, [PermissionError(13, "held")] * 3

    def held(source, target):
        if failures:
            raise failures.pop()
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", held)
    monkeypatch.setattr(files, "WINDOWS", True)
    files.replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text("utf-8") == "a" and not failures


# ---------------------------------------------------------------------------------------------------------------------
# hashes


def test_one_hash_for_texts_and_values():
    assert files.digest("a", "b") == hashlib.sha256(b"a\0b").hexdigest()
    assert files.digest(42, "uid") == hashlib.sha256(b"42\0uid").hexdigest(), "the order that published seeds chose"
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1}) != files.digest({"a": 2, "b": 1})
    assert files.digest("\ud83e") != files.digest("")
    a, b = ("a" * 64, "b" * 64)
    assert files.differing({"x": a, "y": [a], "z": 1}, {"x": b, "y": [b], "z": 1}) == (
        f"x: {a[:12]}... -> {b[:12]}..., y: ['{a[:12]}...'] -> ['{b[:12]}...']"
    )


@pytest.mark.skipif(os.name == "nt", reason="st_ctime is the time of creation")
def test_a_file_changed_behind_its_time_is_hashed_again(tmp_path, monkeypatch):
    """One byte, with the size and the time of modification put back; long enough ago for a hash to be kept."""
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    now = time.time_ns() + 10**10
    monkeypatch.setattr(files.time, "time_ns", lambda: now)
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    before = path.stat()
    first = files.kept_sha256(path)
    assert len([*(tmp_path / "cache" / "files").iterdir()]) == 1
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of files has steps
        path.write_bytes(b"b")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert files.kept_sha256(path) == files.file_sha256(path) != first


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\0", bytes(64), b"a" * 63])
def test_a_damaged_hash_in_the_cache_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    monkeypatch.setattr(files.time, "time_ns", lambda: 2**63)
    files.kept_sha256(path)
    (kept,) = (tmp_path / "cache" / "files").iterdir()
    kept.write_bytes(damage)
    assert files.kept_sha256(path) == files.file_sha256(path) == kept.read_text("ascii")


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    os.utime(path, (1, 1))
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(path / "below a file"))
    monkeypatch.setattr(files.time, "time_ns", lambda: 2**63)
    assert files.kept_sha256(path) == files.file_sha256(path)


@pytest.mark.parametrize("age, is_changed, is_kept", [(3, False, True), (1, False, False), (3, True, False)])
def test_a_hash_is_kept_of_a_file_that_rests(tmp_path, monkeypatch, age, is_changed, is_kept):
    """Not of one that was written `age` seconds ago, or that changes while it is read."""
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    now = path.stat().st_ctime_ns + age * 10**9
    monkeypatch.setattr(files.time, "time_ns", lambda: now)
    monkeypatch.setattr(files, "file_sha256", lambda path: str(is_changed and path.write_bytes(b"other")))
    files.kept_sha256(path)
    assert (tmp_path / "cache" / "files").exists() == is_kept


def append_many(path: Path, writer: int, count: int) -> None:
    for number in range(count):
        files.append_record(path, {"writer": writer, "number": number, "text": "длинная строка " * 40})


def test_eight_processes_append_whole_lines_to_one_log(tmp_path):
    path, count = tmp_path / "log.jsonl", 60
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(path, writer, count)) for writer in range(8)]
    for step in ("start", "join"):
        for process in processes:
            getattr(process, step)()
    lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    seen = sorted((row["writer"], row["number"]) for row in map(json.loads, lines))
    assert seen == [(writer, number) for writer in range(8) for number in range(count)]
