"""The files of a model: fetched, whole, and with valid values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.files import InputError, digest, kept_sha256, parse_json
from llm_alignment.hub import hub_files

if TYPE_CHECKING:
    import torch


# what transformers reads of a model
KINDS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py")


def fetch_model(name: str, revision: str | None, flag: str) -> Path:
    """The folder of a model: `name` itself when it is one, else the hub's snapshot in the local cache.

    Raises InputError when it is neither, when the hub cannot be reached, when the folder holds no config.json, or for
    a revision of a folder.
    """
    folder = Path(name)
    if folder.exists() and revision:
        raise InputError(f"{flag} {name} is a folder, which has no --model_revision {revision}; leave one of them out")
    if not folder.exists():
        if name.count("/") != 1 or name.startswith((".", "~", "/")):
            raise InputError(f"{flag} {name}: no such folder, and not a hub id of the form owner/name")
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
    """Raises InputError for files of a model that cannot be loaded; reads no weights. `what`: the flag and its value.

    That is: a config that is not a JSON object, has a wrong value or names a quantisation, weights that are missing,
    cut off, or a Git LFS pointer, and a tokenizer that is not JSON.
    """
    config = read_json(folder / "config.json", what)
    stored_as = config.get("quantization_config")
    if stored_as:
        method = stored_as.get("quant_method", "a quantised form") if isinstance(stored_as, dict) else stored_as
        raise InputError(f"{what}: this model is stored in {method}; name the one that is not quantised")
    shards = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors.index.json").is_file():
        index = read_json(folder / "model.safetensors.index.json", what)
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{what}: model.safetensors.index.json names no files of weights; fetch it again")
        shards = [folder / name for name in sorted(set(names.values()))]
    elif shards and not (folder / "model.safetensors").is_file():
        raise InputError(
            f"{what}: neither model.safetensors nor model.safetensors.index.json is there; fetch it again"
        )
    if not shards:
        raise InputError(f"{what}: no .safetensors weights in this folder; name the folder of a model")
    for path in shards:
        check_safetensors(path, what)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            check_values(read_json(folder / name, what), f"{what}: {name}")


LEAST = {"max_position_embeddings": 2, "num_hidden_layers": 1, "model_max_length": 2}


def check_values(config: dict, what: str) -> None:
    """Raises InputError for a size below the `LEAST`, and for a token's id that is not a whole number."""
    for name, value in config.items():
        if value is None:
            continue
        if name in LEAST and not (isinstance(value, int | float) and value >= LEAST[name]):
            raise InputError(f"{what} has {name} {value!r}, and it must be at least {LEAST[name]}; fetch it again")
        tokens = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and not all(type(token) is int and token < 2**31 for token in tokens):
            raise InputError(f"{what} has {name} {value!r}, which is not the id of a token; fetch it again")


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file of a model. Raises InputError that names the file when it holds none."""
    content = path.read_bytes()
    try:
        value = parse_json(content)
    except ValueError as error:
        reason = LFS_POINTER if content.startswith(b"version https://git-lfs") else f"not valid JSON ({error})"
        raise InputError(f"{what}: {path.name} cannot be read: {reason}; fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{what}: {path.name} is not a JSON object; fetch it again")
    return value


LFS_POINTER = "it is a Git LFS pointer, not the file itself (git lfs pull fetches it)"


def check_safetensors(path: Path, what: str) -> None:
    """Raises InputError when a file of weights is missing, cut off, something else or quantised; reads its header
    alone."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{what}: {path.name} is missing; fetch it again")
    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118 - it is not a dict
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            reason = LFS_POINTER if file.read(23) == b"version https://git-lfs" else f"cut off or damaged ({error})"
        raise InputError(f"{what}: {path.name} cannot be read: {reason}; fetch it again") from error
    for name, kind in kinds.items():
        if kind not in {"F64", "F32", "F16", "BF16"}:  # transformers and PEFT would take the codes for the values
            raise InputError(f"{what}: {name} is stored as {kind}; name the one that is not quantised")


def stored_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a file of weights, one in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is not a dict
            yield name, file.get_tensor(name)
