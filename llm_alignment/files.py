"""Rows in, results out: JSONL, JSON and Parquet readers, hub data sets, atomic writes, results that survive a kill."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("llm_alignment")

WINDOWS = os.name == "nt"


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
        except (ValueError, RecursionError):
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
    """Writes to a temporary name beside `path` and renames it, so that nobody ever reads half a file.

    A write that fails removes its temporary file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # before the name, so that a power cut leaves the old file or the new one
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path) -> None:
    """`os.replace`, retried for a second: on Windows it fails while another program holds the file."""
    for _ in range(20):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not WINDOWS:
                raise
            time.sleep(0.05)
    os.replace(source, target)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a JSONL file."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_lines(path: Path, rows: list[dict]) -> None:
    """Appends rows as JSON lines and flushes them to the disk; starts a new line first if a crash left half a line.

    A write that fails (a full disk) leaves the file as it was.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    with path.open("a+b", buffering=0) as file:  # unbuffered, so that what failed is not written again at the end
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = b"\n" + lines
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def append_record(path: Path, record: dict) -> None:
    """Appends one run record as a JSON line, under a file lock so that runs side by side can share a log."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        append_lines(path, [record])


def read_records(path: Path) -> list[dict]:
    """Reads the run records of a log. A line torn by a crash is skipped with a warning."""
    skipped = SkippedRows()
    records = [row for _, row in read_rows(path, skipped)]
    skipped.report(f"broken lines of {path}")
    return records


class ResultFile:
    """One JSON line per evaluated item, written as soon as it exists, so that a killed evaluation goes on.

    The first line is {"fingerprint": {...}}: what the results depend on. Every other line is a row with a
    "question_id". Opening a file keeps its whole rows in `rows`; damaged lines, such as the last one of a crash, are
    left out with a warning, and their questions count as missing. When the stored fingerprint is not this one, raises
    InputError naming the keys that differ; with `renew` the file becomes NAME.old and a new one is begun (a resumed run
    measures its own adapter with its own flags). Raises InputError too when the first line is damaged.

    With `use_cache` rows that are missing are taken from the baseline cache, a file of the same fingerprint in the
    user's cache folder, and `finish` puts there what it does not have. A damaged cache file is ignored with a warning.
    """

    def __init__(self, path: Path, fingerprint: dict, *, renew: bool = False, use_cache: bool = False) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.rows: list[dict] = []
        self._cached: dict[Any, dict] = {}
        self._cache = baseline_cache(fingerprint) if use_cache else None
        if self._cache and self._cache.exists():
            self._cached = self._read_cache(self._cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            skipped = SkippedRows()
            stored, self.rows = read_results(path, skipped)
            if stored == fingerprint:
                skipped.report(f"damaged lines of {path}; their questions are answered again")
                if skipped.count:
                    write_rows(path, [{"fingerprint": fingerprint}, *self.rows])
                return
            other = differing(stored, fingerprint)
            if not renew:
                raise InputError(
                    f"{path} holds results of another evaluation ({other}); name another --output_dir or delete the "
                    "file"
                )
            log.warning("%s.old: results of another evaluation (%s); measuring again", path, other)
            replace(path, Path(f"{path}.old"))
            self.rows = []
        write_rows(path, [{"fingerprint": fingerprint}])

    def _read_cache(self, cache: Path) -> dict[Any, dict]:
        """The rows of the cache file by question; none, with a warning, when it is damaged."""
        skipped = SkippedRows()
        try:
            stored, rows = read_results(cache, skipped)
        except InputError as error:
            log.warning("ignoring a damaged file of the baseline cache: %s", error)
            return {}
        if stored != self.fingerprint:
            log.warning("ignoring a file of the baseline cache: %s: %s", cache, differing(stored, self.fingerprint))
            return {}
        skipped.report(f"damaged lines of the baseline cache {cache}")
        return {row["question_id"]: row for row in rows}

    def missing(self, questions: list[dict]) -> list[dict]:
        """The questions without a row yet, in their order, after taking what the cache has of them."""
        done = {row["question_id"] for row in self.rows}
        absent = [question for question in questions if question["question_id"] not in done]
        wanted = {question["question_id"] for question in absent}
        found = [row for key, row in self._cached.items() if key in wanted]
        if found:
            append_lines(self.path, found)
            self.rows += found
            log.info(
                "%s: %d rows taken from the baseline cache (%s); --no_baseline_cache computes them again",
                self.path.name,
                len(found),
                self._cache,
            )
        return [question for question in absent if question["question_id"] not in self._cached]

    def append(self, row: dict) -> None:
        """Writes one row and flushes it to the disk."""
        append_lines(self.path, [row])
        self.rows.append(row)

    def finish(self) -> None:
        """Puts rows that the cache does not have into it. A no-op without `use_cache`."""
        new = [row for row in self.rows if row["question_id"] not in self._cached]
        if self._cache and new:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_rows(self._cache, [{"fingerprint": self.fingerprint}, *self._cached.values(), *new])
            self._cached |= {row["question_id"]: row for row in new}

    def rows_of(self, questions: list[dict]) -> list[dict]:
        """The rows of these questions, in their order."""
        by_id = {row["question_id"]: row for row in self.rows}
        return [by_id[question["question_id"]] for question in questions]


def read_results(path: Path, skipped: SkippedRows) -> tuple[dict, list[dict]]:
    """The fingerprint and the rows of a result file (see ResultFile); damaged lines go to `skipped`.

    A question that has two rows keeps the first. Raises InputError when the file or its first line cannot be read.
    """
    fingerprint, by_id = None, {}
    for place, row in read_rows(path, skipped):
        if fingerprint is None:
            if not isinstance(row.get("fingerprint"), dict) or skipped.count:
                break
            fingerprint = row["fingerprint"]
        elif isinstance(row.get("question_id"), str | int):
            by_id.setdefault(row["question_id"], row)
        else:
            skipped.add(place, "no question_id")
    if fingerprint is None:
        raise InputError(
            f"{path}:1: no fingerprint in the first line, so this is no result file or a damaged one; delete it or "
            "name another"
        )
    return fingerprint, list(by_id.values())


def differing(before: dict, now: dict) -> str:
    """Names what differs between two dicts, as "key: before -> now, ..."."""
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: object) -> str:
    """SHA-256, in hex, of texts and JSON values. The one hash for identities and for orders that a seed chooses.

    A text counts as it is, any other part as its JSON with sorted keys, so the order of keys does not matter.
    """
    texts = (part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=str) for part in parts)
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def baseline_cache(fingerprint: dict) -> Path:
    """Where the results of this fingerprint are kept for later runs. LLM_ALIGNMENT_CACHE names another folder."""
    return cache_folder() / "baselines" / f"{digest(fingerprint)[:32]}.jsonl"


def cache_folder() -> Path:
    """The user's cache folder of this project. LLM_ALIGNMENT_CACHE names another."""
    import platformdirs

    return Path(os.environ.get("LLM_ALIGNMENT_CACHE") or platformdirs.user_cache_dir("llm-alignment"))


def sample(items: list[dict], size: int, seed: int) -> list[dict]:
    """The first `size` items in an order of the seed's that does not depend on how they stand."""
    return sorted(items, key=lambda item: digest(seed, item["uid"]))[:size]


def read_usable(source: str, flag: str, problem: Callable[[dict], str | None], needs: str) -> list[dict]:
    """The rows in which `problem` finds none, each once; the others are counted and reported.

    Raises InputError naming the flag, and what the rows need, when no row is left.
    """
    skipped, usable, seen = SkippedRows(), [], set()
    for place, row in open_dataset(source, flag)(skipped):
        reason = problem(row)
        key = None if reason else digest(row)
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
