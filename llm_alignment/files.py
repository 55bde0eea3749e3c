"""Rows in, results out: JSONL, JSON and Parquet readers, atomic writes, records under a lock, hashes."""

import codecs
import contextlib
import gzip
import hashlib
import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("llm_alignment")

WINDOWS = os.name == "nt"
DATA_SUFFIXES = {".jsonl", ".json", ".parquet"}
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what `datasets` writes
NOT_TRAINING = re.compile(
    r"(?<![^\W\d_])(test(s|ing)?|val(id(at(e|ion))?)?|dev(el(opment)?)?|eval(s|uation)?|h[oe]ld[-_ ]?out|"
    r"тест\w*|валид\w*|провер\w*|отложен\w*|验证|测试)([-_ ]?set)?(?![^\W\d_])"
)
ARCHIVES = {b"PK\x03\x04": "zip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by how a file begins
ARCHIVES |= {b"BZh": "bzip2", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
# Made once, not for every row. A number beyond a float becomes infinite: counting with it would break later.
DECODER = json.JSONDecoder(parse_int=lambda text: int(text) if len(text) < 300 else math.inf)
TOO_DEEP = "nested too deeply"


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where (file, line or row), what to do. Exit code 2."""


def causes(error: BaseException) -> list[BaseException]:
    """The error and what it came from, the first cause last."""
    chain = [error]
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    return chain


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, numpy or the system could not give the memory that was asked for, on the GPU or on the CPU."""
    said = re.compile(r"out of memory|not enough memory|(can't|cannot|unable to) allocate|ALLOC_FAILED", re.I)
    return any(
        isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError | OSError) and said.search(str(cause)))
        for cause in causes(error)
    )


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
    """Yields (line number from 1, line) of the lines that are not blank, split on the newline byte alone: the breaks
    U+2028 and U+0085 are legal inside a JSON string. Raises InputError as `open_data` does."""
    with open_data(path) as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def read_objects(path: Path, skipped: SkippedRows) -> Iterator[tuple[str, dict]]:
    """Yields ("file:line", object) from a JSONL file as they were written; lines that hold none go to `skipped`."""
    for number, line in read_jsonl(path):
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")  # Windows tools begin a file with a byte order mark
            row = parse_json(text)
            problem = object_problem(row, text)
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except ValueError as error:
            problem = TOO_DEEP if str(error) == TOO_DEEP else "not valid JSON"
        if problem:
            skipped.add(f"{path.name}:{number}", problem)
        else:
            yield f"{path.name}:{number}", row


def read_rows(path: Path, skipped: SkippedRows) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) from a JSONL, JSON or Parquet file, packed by gzip or not, or from a folder of them. `place`
    is "file:line" or "file: row n" (both from 1). Columns that are null are left out. Rows that are not JSON objects
    in UTF-8 go to `skipped`. Raises InputError when the file is missing, unreadable or of another format."""
    for file in data_files(path):
        if data_suffix(file) == ".parquet":
            rows = read_parquet(file)
        else:
            with open_data(file) as opened:
                is_list = opened.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            rows = read_json_list(file, skipped) if is_list else read_objects(file, skipped)
        yield from ((place, without_nulls(row)) for place, row in rows)


def without_nulls(row: dict) -> dict:
    """The row with its null columns left out: Arrow has no other way to say that a column is absent."""
    return {key: value for key, value in row.items() if value is not None} if None in row.values() else row


def data_suffix(path: Path) -> str:
    """The suffix that tells the format: of "A.JSONL.gz" it is ".jsonl"."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder, sorted; warns of those that are not read: other formats, what
    the `datasets` library writes about a data set, and test or validation splits, by the name of the file or of a
    folder within. Raises InputError when nothing is left."""
    if not path.is_dir():
        return [path]
    files, left_out = [], []
    for file in sorted(p for p in path.rglob("*") if not p.is_dir()):  # a link to nowhere is an error when it is read
        name = file.relative_to(path)
        if any(part.startswith(".") for part in name.parts):  # caches and git's own files
            continue
        if data_suffix(file) not in DATA_SUFFIXES or file.name in NOT_DATA:
            left_out.append(str(name))
        elif NOT_TRAINING.search(str(name).lower()):
            left_out.append(f"{name} (not a training split)")
        else:
            files.append(file)
    named = ", ".join(left_out[:10]) + f" and {len(left_out) - 10} more" * (len(left_out) > 10)
    if not files:
        raise InputError(f"{path}: no .jsonl, .json or .parquet file in it ({named or 'it is empty'}); name a file")
    if left_out:
        log.warning("%s: %d files read, %d not read: %s", path, len(files), len(left_out), named)
    return files


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[IO[bytes]]:
    """Opens a data file for reading bytes, through gzip when it is packed. Raises InputError when it is not data."""
    try:
        if path.exists() and not path.is_file():  # it would be waited for, or never end
            raise InputError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or a device'}; name a file")
        with path.open("rb") as raw:
            head = raw.read(64)
        if head.startswith(b"version https://git-lfs.github.com/spec/"):
            raise InputError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull` there or fetch it again")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{path}: UTF-16 text; save it as UTF-8 (in PowerShell: Set-Content -Encoding utf8)")
        opened: Any = gzip.open(path) if head.startswith(b"\x1f\x8b") else path.open("rb")
        with opened as file:
            beginning = file.peek(512)
            kind = next((kind for mark, kind in ARCHIVES.items() if beginning.startswith(mark)), "")
            if kind or beginning[257:262] == b"ustar":
                raise InputError(f"{path}: an archive ({kind or 'tar'}), not rows; unpack it and name a file of it")
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error}); fetch it again") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file or folder; check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ("file: row n", row)."""
    import pyarrow.parquet

    with open_data(path) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{path.name}: row {number}", row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{path}: not a readable Parquet file ({reason}); fetch it again") from error


def read_json_list(path: Path, skipped: SkippedRows) -> Iterator[tuple[str, dict]]:
    """Yields ("file: row n", object) of a file that is one JSON list."""
    with open_data(path) as file:
        data = file.read()
    try:
        rows = parse_json(data)
    except ValueError as error:  # also when it is not UTF-8
        raise InputError(f"{path}: not valid JSON ({error}); repair the file or fetch it again") from error
    for number, row in enumerate(rows, 1):
        if problem := object_problem(row):
            skipped.add(f"{path.name}: row {number}", problem)
        else:
            yield f"{path.name}: row {number}", row


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError when it is not JSON, also for bytes that are not UTF-8."""
    text = (text if isinstance(text, str) else text.decode("utf-8-sig")).strip(" \t\r\n")
    try:
        value, end = DECODER.raw_decode(text)  # `decode` looks for the blanks by a regular expression, twice a row
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def object_problem(row: Any, source: str | None = None) -> str | None:
    """Why a JSON value is not a row, or None: not an object, or one that cannot be written again: an escape can spell
    an unpaired surrogate, which UTF-8 cannot, and nesting that the parser just bore may be too much later. Writing is
    as slow as parsing, so it is tried only where `source`, the text that was read, allows one of them."""
    if not isinstance(row, dict):
        return "not a JSON object"
    if source is None or "\\ud" in source or "\\uD" in source or source.count("[") + source.count("{") > 100:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return "invalid Unicode (unpaired surrogate)"
        except RecursionError:
            return TOO_DEEP
    return None


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes to a name beside `path` and renames that, so that nobody reads half a file; a failed write removes it."""
    # containers that share a cache may have one process number
    temporary = path.with_name(f"{path.name}.{os.getpid()}{time.time_ns()}.tmp")
    try:
        with temporary.open("wb") as file:
            # what Python could not decode of a path, in a locale without UTF-8, becomes its own bytes again
            file.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # before the name, so that a power cut leaves the old file or the new one
        replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk names none
        raise


def remove_left_over(folder: Path, before: float = math.inf) -> None:
    """Removes what a killed `write_atomic` left in a folder `before` a time(): long ago, where others write too."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            if re.search(r"\.\d+\.tmp$", path.name) and path.stat().st_mtime < before:
                path.unlink()


def replace(source: Path, target: Path) -> None:
    """`os.replace`, retried for a second: on Windows it fails while another program holds the file."""
    for retries in range(20, -1, -1):
        try:
            os.replace(source, target)
            break
        except PermissionError:
            if not WINDOWS or not retries:
                raise
            time.sleep(0.05)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file of a model. Raises InputError that names the file when it holds none."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise unreadable(path, what, f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{what}: {path.name} is not a JSON object; fetch it again")
    return value


def unreadable(path: Path, what: str, reason: str) -> InputError:
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            reason = "it is a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    return InputError(f"{what}: {path.name} cannot be read: {reason}; fetch it again")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a JSONL file."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_lines(path: Path, rows: list[dict]) -> None:
    """Appends rows as JSON lines and flushes them to the disk; starts a new line first if a crash left half a line. A
    write that fails (a full disk) leaves the file as it was."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogateescape")
    with path.open("a+b", buffering=0) as file:  # unbuffered, so that what failed is not written again at the end
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(path)
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
    """Reads the run records of a log. Damaged lines are skipped with a warning."""
    skipped = SkippedRows()
    records = [row for _, row in read_objects(path, skipped)]
    skipped.report(f"damaged lines of {path}")
    return records


def differing(before: dict, now: dict) -> str:
    """Names what differs between two dicts, as "key: before -> now, ..."; of a hash the beginning."""
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    text = ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_sha256(path: Path) -> str:
    """`file_sha256`, kept in the cache folder by path, size and times of change. A file that changed a moment ago is
    read again the next time: it could change once more within the clock's step."""

    def state() -> tuple[int, int, int]:  # not the time of access, which the reading changes
        status = path.stat()
        return status.st_size, status.st_mtime_ns, max(status.st_mtime_ns, status.st_ctime_ns)

    before = state()
    known = cache_folder() / "files" / digest(str(path.resolve()), *before)[:32]
    if known.is_file() and re.fullmatch("[0-9a-f]{64}", found := known.read_text("ascii", "replace")):
        return found
    sha256 = file_sha256(path)
    if time.time_ns() - before[-1] > 2 * 10**9 and before == state():
        with contextlib.suppress(OSError):  # where the cache cannot be written, the file is read every time
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(known, sha256)
    return sha256


def digest(*parts: object) -> str:
    """SHA-256, in hex, of texts and, as sorted JSON, other values. The one hash for identities and seeded orders."""
    texts = (part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=str) for part in parts)
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def cache_folder() -> Path:
    """The user's cache folder of this project. LLM_ALIGNMENT_CACHE names another."""
    import platformdirs

    return Path(os.environ.get("LLM_ALIGNMENT_CACHE") or platformdirs.user_cache_dir("llm-alignment"))


def sample(items: list[dict], size: int, seed: int) -> list[dict]:
    """The first `size` items in an order of the seed's that does not depend on how they stand."""
    return sorted(items, key=lambda item: digest(seed, item["uid"]))[:size]
