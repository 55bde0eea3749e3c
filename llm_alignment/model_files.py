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

    Raises InputError when there is none, when it holds no config.json, or for a revision of a folder.
    """
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
    """Raises InputError for a model's files that loading it on the meta device would let pass or would not name.

    That is: JSON that is cut off or a Git LFS pointer, a wrong value, and weights that are cut off or quantised; of
    weights the headers are read alone. `what`: the flag and its value.
    """
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config", "model.safetensors.index"):
        path = folder / f"{name}.json"
        if path.is_file():
            check_values(read_json(path, what), what, path.name)
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path, what)


LEAST = {"max_position_embeddings": 2, "num_hidden_layers": 1, "model_max_length": 2}


def check_values(config: dict, what: str, file: str) -> None:
    """Raises InputError for a quantisation, a size below the `LEAST`, and an id of a token that is not one."""
    for name, value in config.items():
        if value is None:
            continue
        if name == "quantization_config" and value:
            method = value.get("quant_method", "a quantised form") if isinstance(value, dict) else value
            raise InputError(f"{what}: this model is stored in {method}; name the one that is not quantised")
        if name in LEAST and not (isinstance(value, int | float) and value >= LEAST[name]):
            raise InputError(f"{what}: {file} has {name} {value!r}, and not {LEAST[name]} or more; fetch it again")
        tokens = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and not all(type(token) is int and token < 2**31 for token in tokens):
            raise InputError(f"{what}: {file} has {name} {value!r}, which is not the id of a token; fetch it again")


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


def stored_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a file of weights, one in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is not a dict
            yield name, file.get_tensor(name)
