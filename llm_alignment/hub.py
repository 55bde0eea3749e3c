"""What comes from the hub, in one line when it cannot be had; a model's files: whole, and with valid values."""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from llm_alignment import files
from llm_alignment.files import InputError, SkippedRows, digest, kept_sha256, read_json, unreadable

T = TypeVar("T")

# Flag -> commit of what the hub gave for it in this run; goes into run.json and the record.
COMMITS: dict[str, str] = {}
KINDS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py")  # what transformers reads of a model
LEAST = {"max_position_embeddings": 2, "num_hidden_layers": 1, "model_max_length": 2}


def hub_id(source: str, flag: str) -> tuple[str, str | None]:
    """Name and revision of "owner/name" or "owner/name@revision". Raises InputError when `source` is neither."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, _, revision = source.partition("@")
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        if "/" in name and files.data_suffix(Path(name)) not in files.DATA_SUFFIXES:
            return name, revision or None
    raise InputError(f"{flag} {source}: no such file or folder, and not a hub id of the form owner/name")


def hub_files(
    source: str, flag: str, patterns: list[str], *, kind: str = "model", revision: str | None = None
) -> Path:
    """The folder of those files of a hub repository that match `patterns`; what is not in the cache is downloaded.
    `source`: "owner/name" or "owner/name@revision"; `kind`: model, dataset or space. Raises InputError that names
    `flag`, within 30 s, when the hub does not give them."""
    from huggingface_hub import snapshot_download

    source, asked = hub_id(source, flag)
    with hub_errors(source, flag, kind):
        folder = Path(snapshot_download(source, repo_type=kind, revision=revision or asked, allow_patterns=patterns))
    COMMITS[flag.removeprefix("--")] = folder.name
    if absent := [pattern for pattern in patterns if "*" not in pattern and not (folder / pattern).is_file()]:
        raise InputError(f"{flag} {source}: the repository has no {absent[0]}; give {flag} a local path")
    return folder


def commit_of(folder: Path | None) -> str | None:
    """The commit of a folder that `hub_files` gave; None for any other."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def open_dataset(source: str, flag: str, skipped: SkippedRows) -> Iterator[tuple[str, dict]]:
    """(place, row) of a local path or of a hub data set's training split, without columns that are null; rows that
    cannot be read go to `skipped`. Raises InputError, which names `flag`, within 30 s, when `source` is neither."""
    if Path(source).exists():
        yield from files.read_rows(Path(source), skipped)
        return
    import datasets
    import huggingface_hub

    name, revision = hub_id(source, flag)
    rows = None
    try:
        with hub_errors(name, flag, "dataset"):
            if not revision and not huggingface_hub.constants.HF_HUB_OFFLINE:  # offline: what the cache has
                # asked once and briefly: load_dataset itself would retry an unreachable hub for half a minute
                revision = huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
            rows = datasets.load_dataset(name, split="train", revision=revision)
            if revision:
                COMMITS[flag.removeprefix("--")] = revision
    except InputError:
        for file in rows.cache_files if rows else []:  # made of a damaged download
            shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
        raise
    with hub_errors(source, flag, "dataset"):
        for number, row in enumerate(rows, 1):
            yield f"{source}: row {number}", files.without_nulls(row)


def read_usable(source: str, flag: str, read: Callable[[dict], T], needs: str) -> list[T]:
    """What `read` makes of each row, equal rows once. Rows for which it raises ValueError are counted and reported.
    Raises InputError naming the flag, and what the rows need, when no row is left."""
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
    if statuses := [response.status_code for response in responses if response is not None]:
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


def fetch_model(name: str, revision: str | None, flag: str) -> Path:
    """The folder of a model: `name` itself when it is one, else the hub's snapshot in the local cache. Raises
    InputError when there is none, when it holds no config.json, or for a revision of a folder."""
    folder = Path(name)
    if folder.exists() and revision:
        raise InputError(f"{flag} {name} is a folder, which has no --model_revision {revision}; leave one of them out")
    if not folder.exists():
        folder = hub_files(name, flag, list(KINDS), revision=revision)
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {name}: no config.json in this folder; name the folder of a model")
    return folder


def files_sha256(folder: Path, kinds: Sequence[str] = KINDS) -> str:
    """One hash for all files of a model, or of other `kinds`: every byte of weights, tokenizer, template, configs."""
    paths = sorted({path for kind in (*kinds, "additional_chat_templates/*") for path in folder.glob(kind)})
    return digest({path.relative_to(folder).as_posix(): kept_sha256(path) for path in paths})


def adapter_files_sha256(folder: str | Path) -> str:
    """One hash for a saved adapter: its tensors, and the settings that say what they do."""
    return files_sha256(Path(folder), ["adapter_config.json", "adapter_model.safetensors"])


def check_files(folder: Path, what: str) -> None:
    """Raises InputError for a model's files that loading it on the meta device would let pass or would not name. That
    is: JSON that is cut off or a Git LFS pointer, a wrong value, and weights that are cut off or quantised; of weights
    the headers are read alone. `what`: the flag and its value."""
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config", "model.safetensors.index"):
        if (path := folder / f"{name}.json").is_file():
            check_values(read_json(path, what), what, path.name)
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path, what)


def check_values(config: dict, what: str, file: str) -> None:
    """Raises InputError for a quantisation, a size below the `LEAST`, and an id of a token that is not one."""
    for name, value in ((name, value) for name, value in config.items() if value is not None):
        if name == "quantization_config" and value:
            method = value.get("quant_method", "a quantised form") if isinstance(value, dict) else value
            raise InputError(f"{what}: this model is stored in {method}; name the one that is not quantised")
        if name in LEAST and not (isinstance(value, int | float) and value >= LEAST[name]):
            raise InputError(f"{what}: {file} has {name} {value!r}, and not {LEAST[name]} or more; fetch it again")
        tokens = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and not all(type(token) is int and token < 2**31 for token in tokens):
            raise InputError(f"{what}: {file} has {name} {value!r}, which is not the id of a token; fetch it again")


def check_safetensors(path: Path, what: str) -> None:
    """Raises InputError when a file of weights is missing, cut off, something else or quantised."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{what}: {path.name} is missing; fetch it again")
    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118 - it is not a dict
    except (SafetensorError, OSError) as error:
        raise unreadable(path, what, f"cut off or damaged ({error})") from error
    for name, kind in kinds.items():
        if kind not in {"F64", "F32", "F16", "BF16"}:  # transformers and PEFT would take the codes for the values
            raise InputError(f"{what}: {name} is stored as {kind}; name the one that is not quantised")
