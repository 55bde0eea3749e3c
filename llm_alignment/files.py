"""Rows in, results out: JSONL, JSON and Parquet readers, hub data sets, atomic writes, results that survive a kill."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("llm_alignment")


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where (file, line or row), what to do. Exit code 2."""


class SkippedRows:
    """Rows that cannot be used: how many, and where the first five stand."""

    def __init__(self) -> None:
        self.count = 0
        self.places: list[str] = []

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.places) < 5:
            self.places.append(f"{place} ({reason})")

    def report(self, what: str) -> None:
        """Logs one line when anything was skipped."""
        if self.count:
            log.warning("skipped %d %s: %s%s", self.count, what, "; ".join(self.places), "; ..." * (self.count > 5))


def read_jsonl(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of the lines that are not blank, split on the newline byte alone.

    `str.splitlines` would also break on U+2028 and U+0085, which are legal inside a JSON string.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def read_rows(path: Path, skipped: SkippedRows) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) from a JSONL, JSON or Parquet file or from a folder of them.

    `place` is "file:line" or "file: row n" (both from 1). Lines that are not JSON objects in UTF-8 go to `skipped`.
    Raises InputError when the file is missing, unreadable or of another format.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in {".jsonl", ".json", ".parquet"})
        if not files:
            raise InputError(f"{path}: no .jsonl, .json or .parquet file in this folder; name another")
        for file in files:
            yield from read_rows(file, skipped)
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder; check the path")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches()
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{path.name}: row {number}", row
        except pyarrow.ArrowException as error:
            raise InputError(f"{path}: not a readable Parquet file ({error}); fetch it again") from error
        return
    with path.open("rb") as file:
        is_list = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if is_list:
        content = path.read_bytes()
        try:
            rows = json.loads(content)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
            raise InputError(f"{path}: not valid JSON ({error}); repair the file or fetch it again") from error
        has_escapes = b"\\ud" in content.lower()
        for number, row in enumerate(rows, 1):
            place = f"{path.name}: row {number}"
            problem = object_problem(row, has_escapes)
            if problem:
                skipped.add(place, problem)
            else:
                yield place, row
        return
    for number, line in read_jsonl(path):
        place = f"{path.name}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))  # Windows tools begin a file with a byte order mark
        except UnicodeDecodeError:
            skipped.add(place, "not UTF-8")
        except ValueError:
            skipped.add(place, "not valid JSON")
        else:
            problem = object_problem(row, has_escapes=b"\\ud" in line.lower())
            if problem:
                skipped.add(place, problem)
            else:
                yield place, row


def object_problem(row: Any, has_escapes: bool) -> str | None:
    """Why a JSON value is no row, or None: no object, or a text with a lone surrogate, which UTF-8 cannot spell.

    JSON can, by an escape; `has_escapes` says whether there may be one, for the search takes as long as the parsing.
    """
    if not isinstance(row, dict):
        return "not a JSON object"
    try:
        if has_escapes:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "a text with half a character"
    return None


def open_dataset(source: str, flag: str, *, split: str = "train", streaming: bool = False) -> Callable[..., Iterator]:
    """Returns `rows(skipped) -> Iterator[(place, row)]`, callable repeatedly, over a local path or a hub data set.

    Raises InputError, within 30 s, when `source` is no local path and cannot be had from the hub; it names `flag`.
    """
    if Path(source).exists():
        return lambda skipped: read_rows(Path(source), skipped)
    looks_local = source.count("/") != 1 or Path(source).suffix in {".jsonl", ".json", ".parquet"}
    if looks_local:
        raise InputError(f"{flag} {source}: no such file or folder, and not a hub id of the form owner/name")
    import datasets
    import huggingface_hub

    with hub_errors(source, flag):
        # asked once and briefly: load_dataset itself would retry an unreachable hub for half a minute
        revision = huggingface_hub.HfApi().dataset_info(source, timeout=10).sha
        rows = datasets.load_dataset(source, split=split, revision=revision, streaming=streaming)
    return lambda skipped: ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))


@contextlib.contextmanager
def hub_errors(source: str, flag: str) -> Iterator[None]:
    """Turns a hub that cannot be reached, or that does not know `source`, into an InputError that names `flag`."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise InputError(
            f"{flag} {source}: the hub answers {error.response.status_code}; check the name and the access rights, "
            f"or give {flag} a local path"
        ) from error
    except (HTTPError, OSError) as error:  # no connection, offline mode, or not in the cache
        raise InputError(
            f"{flag} {source}: not on this disk and the hub cannot be reached; connect, or give {flag} a local path"
        ) from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes to a temporary name beside `path` and renames it, so that nobody ever reads half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())  # before the name, so that a power cut leaves the old file or the new one
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def append_line(path: Path, row: dict) -> None:
    """Appends one JSON line and flushes it to the disk; a torn last line of a crash keeps to itself."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def append_record(path: Path, record: dict) -> None:
    """Appends one run record as a JSON line, under a file lock so that runs side by side can share a log."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        append_line(path, record)


def read_records(path: Path) -> list[dict]:
    """Reads the run records of a log. A line torn by a crash is skipped with a warning."""
    skipped = SkippedRows()
    records = [row for _, row in read_rows(path, skipped)]
    skipped.report(f"broken lines of {path}")
    return records


class ResultFile:
    """One JSON line per evaluated item, written as soon as it exists, so that a killed evaluation goes on.

    The first line is {"fingerprint": {...}}: what the results depend on. Opening a file cuts a torn last line and
    keeps the whole ones in `rows`. When the stored fingerprint is not this one, raises InputError naming the keys that
    differ; with `renew` the file becomes NAME.former and a new one is begun: a resumed run measures its own adapter,
    which on a GPU is not the interrupted one to the bit, with the flags that it has now.
    """

    def __init__(self, path: Path, fingerprint: dict, *, renew: bool = False) -> None:
        self.path = path
        self.rows: list[dict] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        header, *rows = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line] or [None]
        if header and header["fingerprint"] != fingerprint:
            other = differing(header["fingerprint"], fingerprint)
            if not renew:
                raise InputError(
                    f"{path} holds results of another evaluation ({other}); name another --output_dir or delete the "
                    "file"
                )
            log.warning("%s.former: results of another evaluation (%s), measured anew", path, other)
            os.replace(path, f"{path}.former")
            header = None
        if header is None:
            write_atomic(path, json.dumps({"fingerprint": fingerprint}, ensure_ascii=False) + "\n")
            return
        if whole != content:
            write_atomic(path, whole)
        self.rows = rows

    def append(self, row: dict) -> None:
        append_line(self.path, row)
        self.rows.append(row)

    def rows_of(self, questions: list[dict]) -> list[dict]:
        """The rows of these questions, in their order."""
        by_id = {row["question_id"]: row for row in self.rows}
        return [by_id[question["question_id"]] for question in questions]


def differing(before: dict, now: dict) -> str:
    """Names what differs between two dicts, as "key: before -> now, ..."."""
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def baseline_cache(fingerprint: dict) -> Path:
    """Where the results of this fingerprint are kept for later runs. LLM_ALIGNMENT_CACHE names another folder."""
    import platformdirs

    folder = Path(os.environ.get("LLM_ALIGNMENT_CACHE") or platformdirs.user_cache_dir("llm-alignment"))
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return folder / "baselines" / f"{digest[:32]}.jsonl"


def rank(*parts: object) -> bytes:
    """A hash to sort by: a random order that depends on the items and not on where they stand."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()


def sample(items: list[dict], size: int, seed: int) -> list[dict]:
    """The first `size` items in an order of the seed's that does not depend on how they stand."""
    return sorted(items, key=lambda item: rank(seed, item["uid"]))[:size]


def read_usable(source: str, flag: str, problem: Callable[[dict], str | None], needs: str) -> list[dict]:
    """The rows in which `problem` finds none, each once; the others are counted and reported.

    Raises InputError naming the flag, and what the rows need, when no row is left.
    """
    skipped, usable, seen = SkippedRows(), [], set()
    for place, row in open_dataset(source, flag)(skipped):
        reason = problem(row)
        key = None if reason else rank(*(str(row[column]) for column in sorted(row)))
        if key in seen:
            reason = "the same row stands before it"
        if reason:
            skipped.add(place, reason)
        else:
            seen.add(key)
            usable.append(row)
    if not usable:
        places = "; ".join(skipped.places) or "it is empty"
        raise InputError(f"{flag} {source}: no usable row ({places}); it needs the columns {needs}")
    skipped.report(f"rows of {source}")
    return usable
