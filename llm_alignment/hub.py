"""What comes from the hub: files, data sets, and one line when they cannot be had."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llm_alignment import files
from llm_alignment.files import InputError, SkippedRows, digest

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

# Flag -> commit of what the hub gave for it in this run; goes into run.json and the record.
COMMITS: dict[str, str] = {}


def check_hub_id(source: str, flag: str) -> None:
    """Raises InputError unless `source`, which is no local path, can be "owner/name" or "owner/name@revision"."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with contextlib.suppress(HFValidationError):
        validate_repo_id(name := source.partition("@")[0])
        if "/" in name and files.data_suffix(Path(name)) not in files.DATA_SUFFIXES:
            return
    raise InputError(f"{flag} {source}: no such file or folder, and not a hub id of the form owner/name")


def hub_files(
    source: str, flag: str, patterns: list[str], *, kind: str = "model", revision: str | None = None
) -> Path:
    """The folder of those files of a hub repository that match `patterns`; what is not in the cache is downloaded.

    `source`: "owner/name" or "owner/name@revision"; `kind`: model, dataset or space. Raises InputError that names
    `flag`, within 30 s, when the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    check_hub_id(source, flag)
    source, _, asked = source.partition("@")
    revision = revision or asked or None
    with hub_errors(source, flag, kind):
        folder = Path(snapshot_download(source, repo_type=kind, revision=revision, allow_patterns=patterns))
    COMMITS[flag.removeprefix("--")] = folder.name
    absent = [pattern for pattern in patterns if "*" not in pattern and not (folder / pattern).is_file()]
    if absent:
        raise InputError(f"{flag} {source}: the repository has no {absent[0]}; give {flag} a local path")
    return folder


def commit_of(folder: Path | None) -> str | None:
    """The commit of a folder that `hub_files` gave; None for any other."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def open_dataset(source: str, flag: str, skipped: SkippedRows) -> Iterator[tuple[str, dict]]:
    """(place, row) of a local path or of the training split of a hub data set, without columns that are null; rows
    that cannot be read go to `skipped`.

    Raises InputError, within 30 s, when `source` is neither a local path nor on the hub; it names `flag`.
    """
    if Path(source).exists():
        yield from files.read_rows(Path(source), skipped)
        return
    dataset = hub_dataset(source, flag)
    with hub_errors(source, flag, "dataset"):
        for number, row in enumerate(dataset, 1):
            yield f"{source}: row {number}", files.without_nulls(row)


def hub_dataset(source: str, flag: str) -> datasets.Dataset:
    """The training split of a hub data set, "owner/name" or "owner/name@revision", on the disk; else an InputError."""
    import datasets
    import huggingface_hub

    check_hub_id(source, flag)
    rows = None
    source, _, asked = source.partition("@")
    try:
        with hub_errors(source, flag, "dataset"):
            revision = asked or None  # without the hub: what the cache has
            if not asked and not huggingface_hub.constants.HF_HUB_OFFLINE:
                # asked once and briefly: load_dataset itself would retry an unreachable hub for half a minute
                revision = huggingface_hub.HfApi().dataset_info(source, timeout=10).sha
            rows = datasets.load_dataset(source, split="train", revision=revision)
            if revision:
                COMMITS[flag.removeprefix("--")] = revision
    except InputError:
        for file in rows.cache_files if rows else []:  # made of a damaged download
            shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
        raise
    return rows


def read_usable(source: str, flag: str, read: Callable[[dict], T], needs: str) -> list[T]:
    """What `read` makes of each row, equal rows once. Rows for which it raises ValueError are counted and reported.

    Raises InputError naming the flag, and what the rows need, when no row is left.
    """
    skipped, usable, seen = SkippedRows(), [], set()
    for place, row in open_dataset(source, flag, skipped):
        try:
            found, key = read(row), digest(row)
            if key in seen:
                raise ValueError("the same row came before")
        except ValueError as error:
            skipped.add(place, str(error))
        else:
            seen.add(key)
            usable.append(found)
    if not usable:
        places = "; ".join(skipped.places) or "it is empty"
        raise InputError(f"{flag} {source}: no usable row ({places}); it needs the columns {needs}")
    skipped.report(f"rows of {source}")
    return usable


@contextlib.contextmanager
def hub_errors(source: str, flag: str, kind: str = "model") -> Iterator[None]:
    """Around what downloads: turns what goes wrong into an InputError that names `flag`."""
    started, error = time.time(), None
    try:
        yield
    except Exception as raised:
        error = raised
    if reason := damaged_download(source, kind, started) or (error and hub_problem(error)):
        raise InputError(f"{flag} {source}: {reason}, or give {flag} a local path") from error
    if error:
        raise error


def hub_problem(error: BaseException) -> str:
    """What the hub or the network did and what to do, without an end; "" for an error of another kind."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    chain = files.causes(error)
    responses = [getattr(cause, "response", None) for cause in chain]
    statuses = [response.status_code for response in responses if response is not None]
    if statuses:
        advice = "start again later" if statuses[0] >= 500 else "check the name and the access rights (HF_TOKEN)"
        return f"the hub answers {statuses[0]}; {advice}"
    if any("Consistency check" in str(cause) or "peer closed" in str(cause) for cause in chain):
        return "the download broke off; start again, and it resumes"
    if any(isinstance(cause, OSError) and cause.filename is not None for cause in chain):
        return ""  # the disk
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return "not on this disk, and HF_HUB_OFFLINE is set; unset it"
    if any(isinstance(cause, HTTPError) for cause in chain) or isinstance(error, OSError):
        return "not on this disk and the hub cannot be reached; connect"
    if isinstance(error, DatasetsError | ValueError):
        reason = str(chain[-1]).strip().split("\n")[0]
        return f"cannot be used ({reason}); check the name and its files"
    return ""


def damaged_download(source: str, kind: str, started: float) -> str:
    """Deletes downloads since `started` whose content is not what their name in the cache, the ETag, says; and says
    so. The ETag is the SHA-256 of a large file and git's SHA-1 of a small one."""
    from huggingface_hub import constants, file_download

    cache = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=source, repo_type=kind)
    damaged = ""
    for path in cache.glob("blobs/*"):
        if len(path.name) not in (40, 64) or path.stat().st_mtime < started - 2:
            continue
        with path.open("rb") as file:
            hashed = hashlib.sha256() if len(path.name) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
            while piece := file.read(2**20):
                hashed.update(piece)
        if hashed.hexdigest() != path.name:
            path.unlink()
            damaged = "the hub sent another file than its ETag says; start again, and it is fetched again"
    return damaged
