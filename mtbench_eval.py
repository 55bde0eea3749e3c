"""Measure a chat model: MT-Bench answers scored by a reward model, paired statistics, and the record of every run.

The four training scripts import what measures and records from here; on its own this file scores any model or adapter:

    poetry run python mtbench_eval.py --model Qwen/Qwen3-1.7B --adapter OUTPUT_DIR --questions mt_bench_ru.json \
        --output_dir DIR

Two turns are answered with the chat template, greedily, in batches; every conversation is scored by a reward model;
every question is one JSONL line written as soon as it exists, so that a killed evaluation goes on where it stopped.
Two parts: FOUNDATION (files, flags, models, checkpoints, run records) and MEASURING (questions, generation, reward,
statistics, tables, plots, command line).
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import logging.handlers
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch and its family take ten seconds to import, so functions import them: --help and a wrong flag answer at once.
if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from matplotlib.figure import Figure
    from peft import LoraConfig, PeftModel
    from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

log = logging.getLogger("llm_alignment")

# ---------------------------------------------------------------------------------------------------------------------
# FOUNDATION: errors and files


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where (file, line or row), what to do. Exit code 2."""


class NotFiniteError(Exception):
    """The loss or a gradient is not finite; training stops with exit code 1 and the last checkpoint stays."""


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


# ---------------------------------------------------------------------------------------------------------------------
# FOUNDATION: flags


def ratio(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0..1")
    return value


def positive(kind: type) -> Callable[[str], Any]:
    """argparse type: an int or float above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0 or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(kind: type) -> Callable[[str], Any]:
    """argparse type: an int or float of 0 or more."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= 0 or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is below 0")
        return value

    parse.__name__ = f"{kind.__name__} of 0 or more"
    return parse


def new_parser(script: str, docstring: str) -> argparse.ArgumentParser:
    """A parser whose errors stay short and that takes no abbreviated flags, which would hide a misspelt one."""
    return argparse.ArgumentParser(
        prog=f"python {script}",
        usage=f"python {script} [--flag value ...]   (--help lists the flags)",
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="Qwen/Qwen3-1.7B", help="hub id or local folder (default: %(default)s)")
    group.add_argument("--model_revision", default=None, help="branch, tag or commit on the hub (default: main)")
    group.add_argument("--no_4bit", action="store_true", help="load the base in full precision, not in 4 bits")
    group.add_argument("--quant_type", choices=["nf4", "fp4"], default="nf4", help="4-bit format (default: nf4)")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that the model's repository ships")
    group.add_argument("--thinking", action="store_true", help="leave Qwen3's thinking on, in training and evaluation")


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_r", type=positive(int), default=8, help="rank (default: 8)")
    group.add_argument("--lora_alpha", type=positive(int), default=16, help="scale is alpha / rank (default: 16)")
    group.add_argument("--lora_dropout", type=ratio, default=0.05, help="dropout before the adapter (default: 0.05)")
    group.add_argument(
        "--target_modules",
        default="q_proj,v_proj",
        help="comma-separated layers that get an adapter, or all-linear (default: q_proj,v_proj)",
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """What every training script trains with; each script sets its own defaults with `parser.set_defaults`."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive(float), default=1.0, help="passes over the data, 0.5 is fine")
    group.add_argument(
        "--batch", type=positive(int), help="examples per device and forward pass (default: %(default)s)"
    )
    group.add_argument("--grad_acc", type=positive(int), default=16, help="passes per optimiser step (default: 16)")
    group.add_argument("--learning_rate", type=positive(float), help="peak of the cosine (default: %(default)s)")
    group.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="recompute activations to save memory (default: on with a GPU, off without)",
    )
    group.add_argument("--save_steps", type=positive(int), default=50, help="steps between checkpoints (default: 50)")
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="auto|PATH",
        default=None,
        help="go on from a checkpoint; auto takes the newest complete one in --output_dir (default: start anew)",
    )


def add_run_flags(parser: argparse.ArgumentParser, exp_log: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=not_negative(int), default=42, help="seed of everything random (default: 42)")
    group.add_argument("--dry_run", action="store_true", help="load and check the data, print the plan, and exit")
    group.add_argument("--demo", action="store_true", help="a miniature of the experiment: CPU, minutes, no downloads")
    group.add_argument("--report_to", choices=["none", "trackio", "tensorboard", "wandb"], default="none")
    group.add_argument(
        "--exp_log", default=exp_log, help="JSONL file that gets the run's record (default: %(default)s)"
    )
    group.add_argument("--exp_tag", default="", help="a name for the run in that file, for rerun.py and report.py")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_batch_size", type=not_negative(int), default=0, help="0 (default) = by free memory")
    group.add_argument(
        "--reward_model",
        default="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        help="hub id or folder of a sequence classifier with one label (default: %(default)s)",
    )
    group.add_argument("--no_baseline_cache", action="store_true", help="answer the baseline anew, not from the cache")


DEMO_DIR = Path(__file__).resolve().parent / "experiments" / "demo"


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str], demo: dict[str, Any]) -> argparse.Namespace:
    """Parses `argv`; with --demo the flags that the user did not give take their values from `demo`.

    A demo's output folder is the first free one of NAME_1, NAME_2, ..., so that the demo can be run again.
    """
    args = parser.parse_args(argv)
    if args.demo:
        number = 1
        while Path(f"{demo['output_dir']}_{number}").exists():
            number += 1
        if args.resume_from_checkpoint and number > 1:
            number -= 1
        parser.set_defaults(**{**demo, "output_dir": f"{demo['output_dir']}_{number}"})
        args = parser.parse_args(argv)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# FOUNDATION: models


def main_process() -> bool:
    """True in the one process that writes files and prints, under `accelerate launch` too."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes, one to a device, share the work under `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """This process's device, and bf16 where the GPU has it, else fp16, else fp32 on CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def matmul_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (m, k) @ b (k, n) with `a` in the type of `b`; half types are summed, and returned, in float32."""
    import torch

    a = a.to(b.dtype)
    if b.dtype not in {torch.float16, torch.bfloat16}:
        return torch.mm(a, b, out=out)
    if b.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def fetch_model(name: str, revision: str | None, flag: str) -> Path:
    """The folder of a model: `name` itself when it is one, else the hub's snapshot in the local cache.

    Raises InputError when it is neither, when the hub cannot be reached, or when the folder holds no config.json.
    """
    folder = Path(name)
    if not folder.exists():
        if name.count("/") != 1 or name.startswith((".", "~", "/")):
            raise InputError(f"{flag} {name}: no such folder, and not a hub id of the form owner/name")
        import huggingface_hub

        with hub_errors(name, flag):
            kinds = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=kinds))
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {name}: no config.json in this folder; name the folder of a model")
    return folder


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a pad token. Raises InputError when it has no chat template."""
    from transformers import AutoTokenizer

    folder = fetch_model(args.model, args.model_revision, "--model")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    if tokenizer.chat_template is None:
        raise InputError(f"--model {args.model}: its tokenizer has no chat template; name a chat model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(args: argparse.Namespace) -> PreTrainedModel:
    """The base model on this process's device: 4-bit with double quantisation unless --no_4bit.

    Raises InputError when the folder holds no weights.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = fetch_model(args.model, args.model_revision, "--model")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"--model {args.model}: no .safetensors weights in this folder; name the folder of a model")
    device, dtype = device_and_dtype()
    quantization = None
    if not args.no_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device},
        trust_remote_code=args.trust_remote_code,
    )
    model.name_or_path = model.config._name_or_path = args.model  # what adapter_config.json will call the base
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # CPUs with AVX512-BF16: the first evaluation would repack the weights for a kernel without a backward
            module.support_avx512bf16_for_cpu = False
    return model


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> PeftModel:
    """Puts a saved LoRA adapter on `model`. Raises InputError for a damaged adapter or one of another base."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (Path(folder) / "adapter_config.json").is_file():
        raise InputError(f"{folder}: no adapter_config.json in this folder; name the output folder of a training run")
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except json.JSONDecodeError as error:
        raise InputError(f"{folder}: adapter_config.json is no JSON ({error}); train or copy it again") from error
    except (RuntimeError, ValueError) as error:  # sizes or layers that this base does not have
        base = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
        reason = str(error).strip().split("\n")[-1].strip()
        raise InputError(f"{folder}: an adapter of {base} does not fit {model.name_or_path} ({reason})") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: the adapter cannot be read ({error}); train or copy it again") from error


def adapter_sha256(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 of the active adapter's tensors as safetensors; "none" for a model without an adapter."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save

    if not isinstance(model, PeftModel):
        return "none"
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return hashlib.sha256(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})).hexdigest()


def model_fingerprint(args: argparse.Namespace, adapter: str) -> dict:
    """What a model's answers depend on besides the generation settings. `adapter`: its SHA-256, or "none".

    The base is known by its hub commit, or for a local folder by the sizes and both ends of its weight files.
    """
    folder = fetch_model(args.model, args.model_revision, "--model")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(str(size).encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    device, dtype = device_and_dtype()
    return {
        "model": args.model,
        "weights": digest.hexdigest(),
        "quantization": "none" if args.no_4bit else args.quant_type,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "adapter": adapter,
        "thinking": args.thinking,
        "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
    }


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


# ---------------------------------------------------------------------------------------------------------------------
# FOUNDATION: training, checkpoints and the way back to them


def training_arguments(
    args: argparse.Namespace, *, weight_decay: float, warmup_ratio: float, logging_steps: int
) -> dict:
    """The keyword arguments that SFTConfig and DPOConfig share here."""
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to}: it is not installed; python -m pip install {args.report_to}")
    device, dtype = device_and_dtype()
    checkpointing = device.type == "cuda" if args.gradient_checkpointing is None else args.gradient_checkpointing
    import torch

    return dict(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.grad_acc,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_ratio,  # below 1: a share of the steps
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        optim="paged_adamw_32bit" if device.type == "cuda" else "adamw_torch",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=checkpointing,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        report_to=args.report_to,
        run_name=args.exp_tag or Path(args.output_dir).name,
        disable_tqdm=not main_process(),
        ddp_timeout=int(LONGEST_WAIT.total_seconds()),
    )


def optimiser_steps(args: argparse.Namespace, rows: int) -> int:
    """Optimiser steps over `rows` examples, as the Trainer counts them."""
    return math.ceil(args.epochs * math.ceil(math.ceil(rows / (args.batch * processes())) / args.grad_acc))


def log_memory_plan(args: argparse.Namespace, tokens: int) -> None:
    """Says about how much memory training takes, with `tokens` the longest example; the weights are not loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        fetch_model(args.model, args.model_revision, "--model"), trust_remote_code=args.trust_remote_code
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    width = device_and_dtype()[1].itemsize
    embeddings = sum(p.numel() for p in {model.get_input_embeddings().weight, model.get_output_embeddings().weight})
    linear = model.num_parameters() - embeddings
    weights = embeddings * width + linear * (width if args.no_4bit else 0.53)  # 4 bits and the scales of 64 values
    kept_layers = config.num_hidden_layers * (1 if args.gradient_checkpointing is not False else 16)
    activations = args.batch * tokens * config.hidden_size * width * kept_layers
    logits = 2 * 128 * config.vocab_size * 4
    log.info("memory: about %.1f GiB of weights, %.1f GiB of activations and logits", weights / 2**30, (activations + logits) / 2**30)  # fmt: skip


def new_adapter(model: PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    """Puts the fresh LoRA adapter on `model` that the flags ask for. Raises InputError for layers it does not have."""
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora_config(args))
    except ValueError as error:
        raise InputError(f"--target_modules {args.target_modules}: {str(error).splitlines()[0]}") from error


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """The LoRA adapter that the flags ask for."""
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if args.target_modules == "all-linear" else args.target_modules.split(","),
        task_type="CAUSAL_LM",
    )


@contextlib.contextmanager
def adapter_kept_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """TRL rounds the adapter of a quantised model to bf16, where steps of 1e-5 vanish: put the float32 values back."""
    import torch

    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(torch.float32)


LONGEST_WAIT = datetime.timedelta(days=1)  # of processes for one that generates or evaluates


def all_processes() -> PartialState:
    """accelerate's state, made with `LONGEST_WAIT` also where it is needed before the trainer, which would make it."""
    from accelerate import PartialState

    return PartialState(timeout=LONGEST_WAIT)


def on_main_process(compute: Callable[[], Any]) -> Any:
    """Runs `compute` in the main process alone; every process gets its result."""
    from accelerate.utils import broadcast_object_list

    all_processes()
    return broadcast_object_list([compute() if main_process() else None])[0]


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Writes adapter, tokenizer and model card into `folder`, file by file under a temporary name that is renamed."""
    trainer.save_model(str(folder / "saving"))
    if main_process():
        for path in (folder / "saving").iterdir():
            os.replace(path, folder / path.name)
        (folder / "saving").rmdir()
    trainer.create_model_card(model_name=folder.name)


def run_training(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains, from `checkpoint` if given, with complete checkpoints, a log on disk, and a stop that is never silent.

    Ctrl-C ends the step in hand, saves a checkpoint and raises KeyboardInterrupt; a second one stops at once. A loss
    or gradient that is not finite raises NotFiniteError before the optimiser steps.
    """
    import torch
    from transformers import TrainerCallback

    folder = Path(trainer.args.output_dir)
    interrupted = False

    class RunKeeper(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not args.fp16:  # with fp16 the gradient scaler skips such steps and lowers its scale
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                if not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
                    raise NotFiniteError(f"a gradient is not finite at step {state.global_step + 1}")

        def on_step_end(self, args, state, control, **kwargs):
            if interrupted:
                control.should_save = control.should_training_stop = True

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                seal_checkpoint(folder / f"checkpoint-{state.global_step}")

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs and not math.isfinite(logs["loss"]):
                raise NotFiniteError(f"the loss is {logs['loss']} at step {state.global_step}")
            if state.is_world_process_zero:
                lines = [json.dumps(entry) + "\n" for entry in state.log_history]
                write_atomic(folder / "train_log.jsonl", "".join(lines))

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        log.warning("Ctrl-C: finishing this step, then saving a checkpoint; press it again to stop at once")

    trainer.add_callback(RunKeeper())
    former = signal.signal(signal.SIGINT, interrupt)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        signal.signal(signal.SIGINT, former)
    if interrupted:
        raise KeyboardInterrupt


MANIFEST = "complete.json"


def seal_checkpoint(folder: Path) -> None:
    """Writes the manifest, last of all: name and SHA-256 of every file. A checkpoint without it is not complete."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(folder / MANIFEST, {path.name: file_sha256(path) for path in files})


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None when every file is what its manifest says."""
    if not (folder / MANIFEST).is_file():
        return "it was not finished"
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_sha256(folder / name) != digest:
            return f"{name} is damaged"
    return None


def find_checkpoint(args: argparse.Namespace, neutral: set[str]) -> Path | None:
    """The checkpoint to go on from, or None to start anew; says which, and names the ones passed over.

    Raises InputError when --output_dir holds another run and none is to be resumed, when a training flag differs from
    the interrupted run's (`neutral` flags do not change the training), or when the checkpoint named is not complete.
    """
    folder = Path(args.output_dir)
    if not args.resume_from_checkpoint:
        if (folder / "run.json").exists() or any(folder.glob("checkpoint-*")):
            raise InputError(
                f"--output_dir {folder} holds another run; name another folder, or go on with that run by "
                "--resume_from_checkpoint auto"
            )
        return None
    if args.resume_from_checkpoint == "auto":
        steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
        candidates = sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))
    else:
        candidates = [Path(args.resume_from_checkpoint)]
        problem = checkpoint_problem(candidates[0])
        if problem:
            raise InputError(
                f"--resume_from_checkpoint {candidates[0]}: {problem}; use auto to take the newest whole one"
            )
    run_file = (candidates[0].parent if candidates else folder) / "run.json"
    if run_file.exists():
        before = {
            key: value for key, value in json.loads(run_file.read_text("utf-8"))["args"].items() if key not in neutral
        }
        now = {key: value for key, value in json.loads(json.dumps(vars(args))).items() if key not in neutral}
        if before != now:
            raise InputError(f"{run_file.parent}: the interrupted run had other flags ({differing(before, now)})")
    for candidate in candidates:
        problem = checkpoint_problem(candidate)
        if problem is None:
            log.info("resuming from %s", candidate)
            return candidate
        log.warning("passed over %s: %s", candidate, problem)
    log.info("no complete checkpoint in %s: starting from the first step", folder)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# FOUNDATION: the run and its record

# Flags that never change what is trained; a script adds its own evaluation flags where they do not either.
NEUTRAL_FLAGS = {
    "output_dir", "resume_from_checkpoint", "exp_log", "exp_tag", "report_to", "dry_run", "save_steps",
    "eval_batch_size", "no_baseline_cache", "num_proc",
}  # fmt: skip


@contextlib.contextmanager
def recorded_run(args: argparse.Namespace, argv: list[str], script: str) -> Iterator[dict]:
    """Wraps a run: yields its record, logs to console and run.log, and turns every end into an exit code and a record.

    Bad input (InputError): one line on stderr, exit code 2, no record, nothing written. A loss that is not finite: exit
    code 1. Ctrl-C: 130. Any other exception goes on to its traceback after the record is written as failed. The
    script calls `begin(record)` once its input is checked; `record["runtime_s"]` gets its total here.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Windows console may not know every Russian letter
    # What libraries say to one another: their deprecations, and bitsandbytes missing an optional CPU kernel.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    console = logging.StreamHandler(sys.stdout)
    held = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)  # until run.log has a folder
    log.handlers = [console, held] if main_process() else []
    log.setLevel(logging.INFO)
    log.propagate = False
    if "WORLD_SIZE" not in os.environ:  # one process drives one device, and transformers would use all that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    started = time.time()
    record = {
        "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "tag": args.exp_tag,
        "script": script,
        "argv": argv,
        "args": vars(args),
        "git": git_commit(),
        "versions": {"python": sys.version.split()[0]}
        | versions("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"),
        "device": None,
        "data": None,
        "baseline": {},
        "final": {},
        "delta": {},
        "runtime_s": {},
        "kept_step": None,
        "status": "failed",
        "output_dir": args.output_dir,
    }
    try:
        try:
            if Path(args.output_dir).is_file():
                raise InputError(f"--output_dir {args.output_dir} is a file; name a folder")
            if Path(args.exp_log).is_dir():
                raise InputError(f"--exp_log {args.exp_log} is a folder; name a file")
            yield record
            record["status"] = "completed"
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except NotFiniteError as error:
            record["reason"] = str(error)
            message = f"{error}; the last checkpoint in {args.output_dir} is whole: lower --learning_rate and rerun"
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt as error:
            record |= {"status": "interrupted", "reason": "Ctrl-C"}
            print(
                "interrupted: the same command goes on, training with --resume_from_checkpoint auto", file=sys.stderr
            )
            raise SystemExit(130) from error
        except Exception as error:
            record["reason"] = f"{type(error).__name__}: {error}"
            log.removeHandler(console)  # the interpreter prints the traceback there; run.log gets it too
            log.error("%s", traceback.format_exc())
            raise
    except BaseException as error:
        bad_input = isinstance(error.__cause__, InputError)
        if main_process() and not bad_input and not args.dry_run:
            finish(record, args, started)
        raise
    else:
        if main_process() and not args.dry_run:
            finish(record, args, started)
            log.info("record appended to %s", args.exp_log)
    finally:
        for handler in log.handlers:
            handler.close()
        log.handlers = []


def finish(record: dict, args: argparse.Namespace, started: float) -> None:
    """Adds the total runtime and appends the record to --exp_log."""
    record["runtime_s"]["total"] = round(time.time() - started, 1)
    append_record(Path(args.exp_log), record)


def begin(record: dict, data: dict) -> Path:
    """Creates the output folder and writes run.json and run.log. `data` is the fingerprint of the data."""
    device, dtype = device_and_dtype()
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record["device"] = {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": processes(),
        "threads": torch.get_num_threads(),
    }
    record["data"] = data
    folder = Path(record["output_dir"])
    if main_process():
        folder.mkdir(parents=True, exist_ok=True)
        keys = ("ts", "tag", "script", "argv", "args", "git", "versions", "device", "data")
        write_json(folder / "run.json", {key: record[key] for key in keys})
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        held = log.handlers[1]
        held.setTarget(handler)
        held.flush()
        log.handlers[1] = handler
    return folder


@contextlib.contextmanager
def timed(record: dict, phase: str) -> Iterator[None]:
    """Adds the seconds of a phase to the record's `runtime_s`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        record["runtime_s"][phase] = round(record["runtime_s"].get(phase, 0) + time.perf_counter() - start, 1)


def plot_curves(history: list[dict], panels: dict[str, list[str]], path: Path) -> None:
    """A PNG with one panel per title over the training steps; `history` is the trainer's log, `panels` its keys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=key)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG under a temporary name and renames it; without metadata, so that equal plots are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def git_commit() -> str | None:
    """The project's commit, with "-dirty" when the tree has changes; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is not a checkout
        return None


# ---------------------------------------------------------------------------------------------------------------------
# MEASURING: questions

# Where the two MT-Bench sets live on the hub: (repository, its kind, file). The English one is FastChat's own file.
MT_BENCH = {
    "ru": ("t-tech/ru-mt-bench", "dataset", "raw/question.jsonl"),
    "en": ("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl"),
}


def load_questions(
    source: str, *, language: str = "ru", limit: int = 0, seed: int = 42, flag: str = "--questions"
) -> list[dict]:
    """Reads questions: [{"question_id", "category", "turns": [str, ...]}, ...] in the file's order.

    `source` is a JSONL file, a JSON list, or "auto": mt_bench_ru.json or mt_bench_en.json in the working folder,
    fetched from the hub when it is not there. A row holds `turns`, or one turn in `prompt`, `question` or `text`.
    `limit` > 0 takes a sample by `seed` that does not depend on the order of the file. Raises InputError naming file
    and line for a file that is empty, damaged, or has a row without turns or an id that came before, and naming
    `flag` when the hub cannot be reached.
    """
    path = Path(f"mt_bench_{language}.json" if source == "auto" else source)
    for known in MT_BENCH:
        if str(path) == f"mt_bench_{known}.json" and not path.exists():
            fetch_questions(known, path, flag)
    skipped, questions, seen = SkippedRows(), [], {}
    for number, (place, row) in enumerate(read_rows(path, skipped), 1):
        turns = next((row[key] for key in ("turns", "prompt", "question", "text") if key in row), None)
        turns = [turns] if isinstance(turns, str) else turns
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise InputError(f"{path}, {place}: no turns; give every question a list of texts named turns")
        question_id = row.get("question_id", number)
        if question_id in seen:
            raise InputError(
                f"{path}, {place}: question_id {question_id} stands at {seen[question_id]} too; rename one"
            )
        seen[question_id] = place
        questions.append({"question_id": question_id, "category": str(row.get("category", "general")), "turns": turns})
    if skipped.count:
        raise InputError(f"{path}: {skipped.places[0]}; repair the file or fetch it again")
    if not questions:
        raise InputError(f"{path}: no questions in this file; fetch it again or name another")
    if 0 < limit < len(questions):
        by_id = sorted(questions, key=lambda question: str(question["question_id"]))
        chosen = {question["question_id"] for question in random.Random(seed).sample(by_id, limit)}
        questions = [question for question in questions if question["question_id"] in chosen]
    return questions


def fetch_questions(language: str, path: Path, flag: str) -> None:
    """Downloads an MT-Bench set and writes it to `path` as a JSON list."""
    import huggingface_hub

    repository, kind, name = MT_BENCH[language]
    with hub_errors(repository, flag):
        # asked once and briefly: the download itself would retry an unreachable hub for half a minute
        huggingface_hub.HfApi().repo_info(repository, repo_type=kind, timeout=10)
        fetched = huggingface_hub.hf_hub_download(repository, name, repo_type=kind)
    write_json(path, [json.loads(line) for _, line in read_jsonl(Path(fetched))])
    log.info("%s: the questions of %s, fetched", path, repository)


# ---------------------------------------------------------------------------------------------------------------------
# MEASURING: answers


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 0,
    backend: str = "simple",
    thinking: bool = False,
    seed: int = 42,
    description: str = "",
    on_answer: Callable[[int, str, int, bool], Any] | None = None,
) -> list[str]:
    """Answers conversations of {role, content} turns that end with the user's; returns one text for each, in order.

    Temperature 0 is greedy and in float32 does not depend on `batch_size` (0: by free memory); above 0, sampling is
    seeded. The settings a model ships with, such as Qwen3's temperature of 0.6, play no part. `backend` "simple" is
    `model.generate` on batches of like length that finished rows leave; "auto" is transformers' continuous batching
    on CUDA and simple elsewhere. An answer gets at most half of the model's context, and a prompt that leaves less
    room than its answer needs loses its beginning. A block of thinking is part of the text: see `strip_thinking`.
    `on_answer(index, text, new tokens, whether it ended by itself)` is called as each answer is ready; with a
    `description` a progress bar is shown. Leaves torch's random state and the model's mode as they were.
    """
    import torch
    from tqdm import tqdm

    if not conversations:
        return []
    device, context = model.device, model.config.get_text_config().max_position_embeddings
    max_new_tokens = min(max_new_tokens, context // 2)
    prompts = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_dict=False, enable_thinking=thinking
    )
    cut = sum(len(prompt) > context - max_new_tokens for prompt in prompts)
    if cut:
        log.warning("%d prompts lost their beginning: the model's context is %d tokens", cut, context)
        prompts = [prompt[-(context - max_new_tokens) :] for prompt in prompts]
    settings = decoding_settings(model, tokenizer, temperature=temperature, top_p=top_p)
    eos = settings.eos_token_id
    # Tags of thinking are special tokens in some tokenizers, and they must be seen to be removed.
    hidden = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in {"<think>", "</think>"}
    }
    texts: list[str | None] = [None] * len(prompts)
    progress = tqdm(total=len(prompts), desc=description, unit="answer", disable=not description)

    def take(index: int, tokens: list[int]) -> None:
        end = next((n for n, token in enumerate(tokens) if token in eos), None)
        shown = [token for token in tokens[:end] if token not in hidden]
        opened = tokenizer.decode(prompts[index][-16:]).rstrip().endswith("<think>")  # by the template itself
        texts[index] = ("<think>" if opened else "") + tokenizer.decode(shown).strip()
        progress.update()
        if on_answer:
            on_answer(index, texts[index], len(tokens[:end]), end is not None)

    def run(batch: list[int]) -> None:
        batch = [index for index in batch if texts[index] is None]  # memory may run out after a part has answered
        if not batch:
            return
        chosen = [prompts[index] for index in batch]
        torch.manual_seed(seed ^ zlib.crc32(str(chosen).encode()))
        batched_answers(model, chosen, settings, max_new_tokens, lambda row, tokens: take(batch[row], tokens))

    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), progress:
            if backend == "auto" and device.type == "cuda":
                torch.manual_seed(seed)
                continuous_answers(model, prompts, settings, max_new_tokens, take)
            else:
                order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
                longest = len(prompts[order[-1]]) + max_new_tokens
                in_batches(order, batch_size or free_batch_size(model, longest), run)
    finally:
        model.train(was_training)
    return texts


def decoding_settings(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, temperature: float, top_p: float
) -> GenerationConfig:
    """Greedy at temperature 0, else sampling; every setting is written out, so none of the model's own is taken."""
    from transformers import GenerationConfig

    own_eos = model.generation_config.eos_token_id
    eos = sorted({*(own_eos if isinstance(own_eos, list) else [own_eos]), tokenizer.eos_token_id} - {None})
    return GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_p=top_p if temperature else 1.0,
        top_k=0 if temperature else 50,  # 50 is transformers' "not set": any other value warns when greedy
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        eos_token_id=eos,
        pad_token_id=eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=True,
        return_dict_in_generate=True,
    )


def batched_answers(
    model: PreTrainedModel | PeftModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    max_new_tokens: int,
    take: Callable[[int, list[int]], None],
    *,
    cache: DynamicCache | None = None,
    line_break: torch.Tensor | None = None,
) -> None:
    """Generates from left-padded token lists; `take(row, new tokens)` gets each answer, its end token included.

    `model.generate` pauses whenever a quarter of its rows has ended: they leave, and the others go on from their
    part of the key-value cache. `cache` may hold the prompts, left-padded, but for their last tokens. With
    `line_break`, a bool for each token id, an answer also ends with its first line that is not empty.
    """
    import torch

    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[settings.pad_token_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    eos = torch.tensor(settings.eos_token_id, device=device)
    rows = list(range(len(prompts)))
    while rows:
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        ends = torch.full((len(rows),), width + max_new_tokens, device=device)

        def pause(input_ids, scores, ended=ended, ends=ends, **_):
            ending = torch.isin(input_ids[:, -1], eos)
            if line_break is not None:
                breaks = line_break[input_ids[:, width:]]
                ending |= breaks[:, -1] & ~breaks.all(dim=1)
            ends[ending & ~ended] = input_ids.shape[1]
            ended |= ending
            return torch.full_like(ended, bool(ended.sum() * 4 >= len(ended)))

        settings.max_new_tokens = width + max_new_tokens - ids.shape[1]
        output = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=settings,
            stopping_criteria=[pause],
        )
        ids, cache = output.sequences, output.past_key_values
        if ids.shape[1] == width + max_new_tokens:
            ended[:] = True
        for place in ended.nonzero().flatten().tolist():
            take(rows[place], ids[place, width : ends[place]].tolist())
        going = (~ended).nonzero().flatten()
        rows = [rows[place] for place in going.tolist()]
        if rows:
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[going]
            ids = ids[going]
            cache.batch_select_indices(going)


def continuous_answers(model, prompts, settings, max_new_tokens: int, take: Callable[[int, list[int]], None]) -> None:
    """As `batched_answers`, by transformers' continuous batching: a row that ends makes room for the next prompt."""
    settings.max_new_tokens = max_new_tokens
    outputs = list(model.generate_batch(prompts, generation_config=settings).values())
    if len(outputs) < len(prompts) or any(output.error for output in outputs):
        raise RuntimeError("continuous batching lost answers; take --mtbench_backend simple")
    for row, output in enumerate(outputs):
        take(row, output.generated_tokens)


def in_batches(order: list[int], size: int, run: Callable[[list[int]], None]) -> None:
    """Calls `run` on slices of `order`. When the GPU runs out of memory the slice is halved and tried again."""
    import torch

    start = 0
    while start < len(order):
        batch = order[start : start + size]
        try:
            run(batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
        else:
            start += len(batch)
            continue
        torch.cuda.empty_cache()  # only here, where the error no longer holds on to the tensors
        log.warning("out of memory: going on with batches of %d", size)


# Rows answered together when nobody says how many. On CPU more rows save no time, they only pad each other.
MOST_ROWS = {"cuda": 64, "cpu": 32}


def free_batch_size(model: PreTrainedModel | PeftModel, tokens: int) -> int:
    """How many rows of `tokens` fit into the GPU's free memory, at most 64; on CPU 32."""
    import torch
    from transformers.configuration_utils import get_head_shapes

    most = MOST_ROWS[model.device.type]
    if model.device.type == "cpu":
        return most
    config = model.config.get_text_config()
    heads, head_size = get_head_shapes(config)
    row = 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize * tokens + 12 * config.vocab_size
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, min(most, int(free / 2 / row)))  # half stays free for activations and for copying the cache


def strip_thinking(text: str) -> str:
    """The answer without its <think>...</think> block; empty when a block never closes."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    return "" if "<think>" in text else text.strip()


# ---------------------------------------------------------------------------------------------------------------------
# MEASURING: rewards


class RewardModel:
    """A sequence classifier with one label that scores conversations ending with the assistant's answer.

    Follows the cards of Skywork-Reward-V2: the reward model's own chat template, one BOS, the raw logit. bf16 on CUDA,
    float32 on CPU; `device` None takes the GPU when there is one. Raises InputError when `name` is no such model.
    """

    def __init__(self, name: str, *, device: torch.device | str | None = None, batch_size: int = 0) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = fetch_model(name, None, "--reward_model")
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise InputError(f"--reward_model {name}: no .safetensors weights in this folder; name a reward model")
        device = torch.device(device) if device else device_and_dtype()[0]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, output_loading_info=True
        )
        if self.model.config.num_labels != 1 or loading["missing_keys"] or self.tokenizer.chat_template is None:
            raise InputError(f"--reward_model {name}: not a chat sequence classifier with one label; name another")
        self.model.to(device).eval()
        self.batch_size = batch_size or 16
        config = self.model.config.get_text_config()
        self.max_length = min(config.max_position_embeddings, self.tokenizer.model_max_length)
        self.default_system = default_system_turn(self.tokenizer)
        self.fingerprint = {"name": name, "weights": [file_sha256(path)[:16] for path in weights]}

    def score(self, conversations: list[list[dict]]) -> list[float]:
        """Raw rewards. A long conversation loses the beginning of its oldest turns, never any of its answer."""
        import torch

        inputs = [self.encode(conversation) for conversation in conversations]
        rewards = [0.0] * len(inputs)
        # Padding goes by this id alone, so a tokenizer without a pad token gets one that no conversation holds.
        used = {token for ids in inputs for token in ids}
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = next(token for token in range(self.model.config.get_text_config().vocab_size) if token not in used)
        self.model.config.get_text_config().pad_token_id = pad

        def run(batch: list[int]) -> None:
            width = max(len(inputs[index]) for index in batch)
            ids = [inputs[index] + [pad] * (width - len(inputs[index])) for index in batch]
            mask = [[1] * len(inputs[index]) + [0] * (width - len(inputs[index])) for index in batch]
            tensors = torch.tensor([ids, mask], device=self.model.device)
            with torch.no_grad():
                logits = self.model(input_ids=tensors[0], attention_mask=tensors[1], use_cache=False).logits
            for index, reward in zip(batch, logits[:, 0].tolist(), strict=True):
                rewards[index] = reward

        in_batches(sorted(range(len(inputs)), key=lambda index: len(inputs[index])), self.batch_size, run)
        return rewards

    def encode(self, conversation: list[dict]) -> list[int]:
        """Token ids of a conversation, no longer than the model's context."""
        turns = [dict(turn) for turn in conversation]
        while True:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self.tokenizer(text.replace(self.default_system, "", 1)).input_ids
            while ids[:2] == [self.tokenizer.bos_token_id] * 2:  # one from the template, one from the tokenizer
                ids = ids[1:]
            excess = len(ids) - self.max_length
            if excess <= 0:
                return ids
            oldest = next((turn for turn in turns[:-1] if turn["content"]), None)
            if oldest is None:
                raise InputError(
                    f"an answer of {len(ids)} tokens is longer than the reward model's {self.max_length}; "
                    "lower --mtbench_max_tokens or name another --reward_model"
                )
            offsets = self.tokenizer(
                oldest["content"], add_special_tokens=False, return_offsets_mapping=True
            ).offset_mapping
            oldest["content"] = oldest["content"][offsets[excess - 1][1] :] if excess < len(offsets) else ""


def default_system_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The system turn that a chat template adds on its own, as Qwen2.5's does; "" when it adds none."""
    from jinja2 import TemplateError

    def render(*contents: str) -> str:
        turns = [{"role": "user", "content": content} for content in contents]
        return tokenizer.apply_chat_template(turns, tokenize=False)

    try:
        head, tail = render("QUESTION").split("QUESTION")
        header = render("QUESTION", "SECOND").split("QUESTION")[1].split("SECOND")[0].removeprefix(tail)
    except TemplateError:  # templates that insist on alternating roles: none of them adds a system turn
        return ""
    return head.removesuffix(header).removeprefix(tokenizer.bos_token or "")


def to_score(reward: float) -> float:
    """A raw reward on the 1-10 scale, monotone: 1 + 9 * sigmoid(reward / 5)."""
    return 5.5 + 4.5 * math.tanh(reward / 10)  # the same, without overflow


def to_logged_scale(reward: float) -> float:
    """A raw reward on the 1-10 scale of the published tables. Not monotone: 1.00 gives 10, 1.01 gives 2.82."""
    if reward < 0:
        share = (reward + 5) / 10
    elif reward <= 1:
        share = reward
    else:
        share = reward / 5
    return min(10.0, max(1.0, 1 + 9 * share))


# ---------------------------------------------------------------------------------------------------------------------
# MEASURING: evaluation


def evaluation_fingerprint(
    model_settings: dict, questions: list[dict], reward_model: RewardModel, **generation_settings: Any
) -> dict:
    """What the results of `score_questions` depend on; `model_settings` as from `model_fingerprint`."""
    digest = hashlib.sha256(json.dumps(questions, ensure_ascii=False).encode("utf-8")).hexdigest()
    return {
        **model_settings,
        "questions": digest,
        "reward_model": reward_model.fingerprint,
        "generation": generation_settings,
    }


def score_questions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: RewardModel,
    questions: list[dict],
    *,
    path: Path,
    fingerprint: dict,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 0,
    backend: str = "simple",
    thinking: bool = False,
    seed: int = 42,
    use_cache: bool = False,
    renew: bool = False,
) -> list[dict]:
    """Answers every turn of every question, scores each answer with its history, and returns a row per question.

    A row: {"question_id", "category", "turns", "answers", "rewards", "scores", "scores_logged", "answer_tokens",
    "finished"}, the last six with one entry per turn. Questions are worked off in waves; the rows of a wave are
    written to `path` (a ResultFile) as soon as they exist, and a restart goes on with the first wave that is not
    complete. `fingerprint` describes the model; questions, reward model and generation settings are added to it.
    `use_cache` takes a greedy result from the user's cache folder and puts it there. `renew`: see ResultFile.
    """
    from tqdm import tqdm

    settings = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, backend=backend, thinking=thinking, seed=seed
    )
    fingerprint = evaluation_fingerprint(fingerprint, questions, reward_model, **settings)
    results = ResultFile(path, fingerprint, renew=renew)
    done = {row["question_id"] for row in results.rows}
    cached = baseline_cache(fingerprint)
    use_cache = use_cache and temperature == 0
    if use_cache and cached.exists() and len(done) < len(questions):
        for row in ResultFile(cached, fingerprint).rows:
            if row["question_id"] not in done:
                results.append(row)
        done = {row["question_id"] for row in results.rows}
        log.info("%s: taken from the baseline cache (%s); --no_baseline_cache answers anew", path.name, cached)

    size = batch_size or MOST_ROWS[model.device.type]
    order = sorted(questions, key=lambda question: sum(map(len, question["turns"])))
    waves = [order[start : start + size] for start in range(0, len(order), size)]
    total = sum(len(question["turns"]) for question in questions)
    progress = tqdm(total=total, desc=path.stem, unit="answer", disable=len(done) == len(questions))
    with progress:
        for wave in waves:
            missing = [question for question in wave if question["question_id"] not in done]
            if missing:
                # the whole wave, so that an interrupted evaluation sees the batches of an uninterrupted one
                rows = answer_and_score(
                    model, tokenizer, reward_model, wave, progress, batch_size=batch_size, **settings
                )
                for row in rows:
                    if row["question_id"] not in done:
                        results.append(row)
            else:
                progress.update(sum(len(question["turns"]) for question in wave))
    if use_cache and not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, path.read_bytes())
    return results.rows_of(questions)


def answer_and_score(model, tokenizer, reward_model, questions, progress, **settings) -> list[dict]:
    """The rows of one wave: turn after turn, each with the whole conversation so far, then the rewards."""
    per_turn = ("answers", "rewards", "scores", "scores_logged", "answer_tokens", "finished")
    rows = [{**question, **{key: [] for key in per_turn}} for question in questions]
    conversations: list[list[dict]] = [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        asked = [index for index, question in enumerate(questions) if turn < len(question["turns"])]
        for index in asked:
            conversations[index].append({"role": "user", "content": questions[index]["turns"][turn]})

        def keep(place: int, text: str, tokens: int, finished: bool, asked: list[int] = asked) -> None:
            row = rows[asked[place]]
            row["answers"].append(strip_thinking(text))
            row["answer_tokens"].append(tokens)
            row["finished"].append(finished)
            progress.update()

        generate(model, tokenizer, [conversations[index] for index in asked], on_answer=keep, **settings)
        for index in asked:
            conversations[index].append({"role": "assistant", "content": rows[index]["answers"][turn]})
        rewards = reward_model.score([conversations[index] for index in asked])
        for index, reward in zip(asked, rewards, strict=True):
            rows[index]["rewards"].append(reward)
            rows[index]["scores"].append(to_score(reward))
            rows[index]["scores_logged"].append(to_logged_scale(reward))
    return rows


def baseline_cache(fingerprint: dict) -> Path:
    """Where the results of this fingerprint are kept for later runs. LLM_ALIGNMENT_CACHE names another folder."""
    import platformdirs

    folder = Path(os.environ.get("LLM_ALIGNMENT_CACHE") or platformdirs.user_cache_dir("llm-alignment"))
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return folder / "baselines" / f"{digest[:32]}.jsonl"


def summarise(rows: list[dict]) -> dict:
    """Averages over questions (a question counts as the mean of its turns), overall, per turn and per category.

    `answer_tokens` is the mean length of an answer, `unfinished` the share of answers cut by the token limit.
    """
    mean = statistics.fmean
    categories = sorted({row["category"] for row in rows})
    turns = range(max(len(row["turns"]) for row in rows))
    return {
        "avg": mean(mean(row["scores"]) for row in rows),
        "avg_logged": mean(mean(row["scores_logged"]) for row in rows),
        "raw_mean": mean(mean(row["rewards"]) for row in rows),
        "by_turn": [mean(row["scores"][turn] for row in rows if turn < len(row["turns"])) for turn in turns],
        "by_category": {
            category: mean(mean(row["scores"]) for row in rows if row["category"] == category)
            for category in categories
        },
        "n": len(rows),
        "answer_tokens": mean(tokens for row in rows for tokens in row["answer_tokens"]),
        "unfinished": mean(not finished for row in rows for finished in row["finished"]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# MEASURING: statistics


def paired_delta(before: list[float], after: list[float], *, seed: int = 42) -> dict:
    """Mean of after - before over the same items, its 95 % bootstrap interval and a permutation p.

    scipy's BCa bootstrap with 9,999 resamples, and its paired permutation test (exact up to 13 items), both seeded.
    Where all differences are the same the interval is that one value. Without items everything but n is None.
    """
    import numpy as np
    from scipy import stats

    differences = np.subtract(after, before, dtype=np.float64)
    if not len(differences):
        return {"mean": None, "low": None, "high": None, "p": None, "n": 0}
    low, high = interval(differences, seed)
    p = 1.0
    if len(differences) > 1:
        test = stats.permutation_test(
            (np.asarray(after, np.float64), np.asarray(before, np.float64)),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=np.random.default_rng(seed),
        )
        p = float(test.pvalue)
    return {"mean": float(differences.mean()), "low": low, "high": high, "p": p, "n": len(differences)}


def mcnemar(before: list[float], after: list[float], *, seed: int = 42) -> dict:
    """The difference in the share of right answers, its 95 % bootstrap interval, and the exact McNemar p.

    An answer is right (1 or True), wrong (0 or False) or neither (0.5).
    """
    import numpy as np
    from scipy import stats

    differences = np.subtract(after, before, dtype=np.float64)
    if not len(differences):
        return {"mean": None, "low": None, "high": None, "p": None, "n": 0}
    low, high = interval(differences, seed)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"mean": float(differences.mean()), "low": low, "high": high, "p": p, "n": len(differences)}


def interval(differences: Any, seed: int) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean of `differences`, a float array (n,)."""
    import numpy as np
    from scipy import stats

    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():  # the bootstrap of a constant is not defined
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap((differences,), np.mean, n_resamples=9999, rng=np.random.default_rng(seed))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def compare_rows(before_rows: list[dict], after_rows: list[dict]) -> dict:
    """Paired differences over the questions that both hold: {"score": paired_delta, "raw": paired_delta}.

    Raises InputError when they hold no question in common, or other turns under one id.
    """
    before = {row["question_id"]: row for row in before_rows}
    pairs = [(before[row["question_id"]], row) for row in after_rows if row["question_id"] in before]
    if not pairs or any(old["turns"] != new["turns"] for old, new in pairs):
        raise InputError("the two evaluations asked different questions; compare files of one question set")
    mean = statistics.fmean
    return {
        name: paired_delta([mean(old[key]) for old, _ in pairs], [mean(new[key]) for _, new in pairs])
        for name, key in (("score", "scores"), ("raw", "rewards"))
    }


# ---------------------------------------------------------------------------------------------------------------------
# MEASURING: tables and plots


def print_table(title: str, rows: list[tuple[str, float | None, float | None, dict | None]]) -> None:
    """Prints (metric, baseline, final, delta) rows; `delta` as from `paired_delta`. Plain ASCII, at most 120 columns."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:#.4g}".rstrip(".")

    rules = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one line under the heading
    table = Table(title=title, title_style="", title_justify="left", box=rules, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("baseline", "final", "difference [95 % interval]", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric, baseline, final, delta in rows:
        cells = [metric, number(baseline), number(final)]
        if delta and delta["n"]:
            cells.append(f"{delta['mean']:+#.4g} [{number(delta['low'])}, {number(delta['high'])}]")
            cells.append(f"{delta['p']:.2g}")
            cells.append("no detectable change" if delta["low"] <= 0 <= delta["high"] else "")
        table.add_row(*cells)
    Console(width=120, color_system=None, legacy_windows=False, markup=False, highlight=False).print(table)


def plot_categories(before_summary: dict | None, after_summary: dict, path: Path) -> None:
    """Draws the 1-10 score by category, before (if it was measured) and after, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    categories = sorted(after_summary["by_category"])
    figure, axes = pyplot.subplots(figsize=(max(6, 1.1 * len(categories) + 2), 4), layout="constrained")
    summaries = {"before": before_summary, "after": after_summary} if before_summary else {"after": after_summary}
    for shift, (label, summary) in zip((-0.2, 0.2), summaries.items(), strict=False):
        heights = [summary["by_category"].get(category, 0) for category in categories]
        bars = axes.bar([place + shift for place in range(len(categories))], heights, 0.4, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(categories)), categories)
    axes.set_ylim(1, 10.5)
    axes.set_ylabel("reward-model score, 1-10")
    axes.set_title(", ".join(f"{label} {summary['avg']:.2f}" for label, summary in summaries.items()))
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    pyplot.close(figure)
    write_atomic(path, picture.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# MEASURING: the command line

DEMO = {
    "model": str(DEMO_DIR / "model"),
    "reward_model": str(DEMO_DIR / "reward_model"),
    "questions": str(DEMO_DIR / "mt_bench_ru.jsonl"),
    "output_dir": "demo_mtbench",
    "mtbench_max_tokens": 32,
}


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("mtbench_eval.py", __doc__)
    add_model_flags(parser)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--adapter", default="", help="output folder of a training run (default: the base model)")
    group.add_argument("--questions", default="auto", help="JSONL or JSON file; auto fetches MT-Bench (default: auto)")
    group.add_argument("--language", choices=["ru", "en"], default="ru", help="which set auto fetches (default: ru)")
    group.add_argument("--compare", default="", help="per-question file of an earlier evaluation to compare with")
    group.add_argument("--output_dir", default="mtbench_results", help="folder of the results (default: %(default)s)")
    group.add_argument(
        "--mtbench_questions_limit",
        "--limit",
        type=not_negative(int),
        default=0,
        help="ask a sample of this many (default: 0 = all)",
    )
    group.add_argument("--mtbench_questions_seed", type=int, default=42, help="seed of that sample (default: 42)")
    group.add_argument(
        "--mtbench_temperature", type=not_negative(float), default=0.0, help="0 (default) answers greedily"
    )
    group.add_argument(
        "--mtbench_max_tokens", type=positive(int), default=1024, help="longest answer in tokens (default: 1024)"
    )
    group.add_argument(
        "--mtbench_backend",
        choices=["simple", "auto"],
        default="simple",
        help="auto uses continuous batching on CUDA (default: simple)",
    )
    add_run_flags(parser, "experiments/mtbench_evaluations.jsonl")
    parser.set_defaults(resume_from_checkpoint=None)  # the same command simply goes on
    return parser


def read_results(path: str) -> tuple[dict, list[dict]]:
    """The fingerprint and the rows of a per-question file. Raises InputError when it holds none."""
    skipped = SkippedRows()
    header, *rows = [row for _, row in read_rows(Path(path), skipped)] or [{}]
    if "fingerprint" not in header or not rows or not all("rewards" in row for row in rows):
        raise InputError(f"--compare {path}: no per-question results; name an mtbench_*.jsonl of an output folder")
    skipped.report(f"broken lines of {path}")
    return header["fingerprint"], rows


def main(argv: list[str] | None = None) -> dict:
    """Runs the evaluation that `argv` asks for and returns its record."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(build_parser(), argv, DEMO)
    with recorded_run(args, argv, "mtbench_eval.py") as record:
        questions = load_questions(
            args.questions,
            language=args.language,
            limit=args.mtbench_questions_limit,
            seed=args.mtbench_questions_seed,
        )
        measured, earlier = read_results(args.compare) if args.compare else ({}, [])
        tokenizer = load_tokenizer(args)
        if args.dry_run:
            turns = sum(len(question["turns"]) for question in questions)
            limit = args.mtbench_max_tokens
            log.info("%d questions, %d answers of up to %d tokens each", len(questions), turns, limit)
            return record
        with timed(record, "load"):
            model = load_model(args)
            if args.adapter:
                model = load_adapter(model, args.adapter)
            reward_model = RewardModel(args.reward_model, batch_size=args.eval_batch_size)
        settings = dict(
            max_new_tokens=args.mtbench_max_tokens,
            temperature=args.mtbench_temperature,
            backend=args.mtbench_backend,
            thinking=args.thinking,
            seed=args.seed,
        )
        model_settings = model_fingerprint(args, adapter_sha256(model))
        path = Path(args.output_dir) / "mtbench.jsonl"
        fingerprint = evaluation_fingerprint(model_settings, questions, reward_model, **settings)
        if earlier and measured["reward_model"] != fingerprint["reward_model"]:
            other = differing(measured["reward_model"], fingerprint["reward_model"])
            raise InputError(
                f"--compare {args.compare} was scored by another reward model ({other}); score it by this one"
            )
        if earlier and measured["generation"] != fingerprint["generation"]:
            other = differing(measured["generation"], fingerprint["generation"])
            log.warning(
                "--compare %s was answered otherwise (%s): part of the difference comes from that", args.compare, other
            )
        ResultFile(path, fingerprint)  # refuses the folder of another evaluation before anything in it changes
        folder = begin(record, {"questions": args.questions, "n": len(questions), "sha256": fingerprint["questions"]})
        with timed(record, "final"):
            rows = score_questions(
                model,
                tokenizer,
                reward_model,
                questions,
                path=path,
                fingerprint=model_settings,
                batch_size=args.eval_batch_size,
                use_cache=not (args.adapter or args.no_baseline_cache),
                **settings,
            )
        final = record["final"]["mtbench"] = summarise(rows)
        baseline, delta = {}, {}
        if earlier:
            delta = compare_rows(earlier, rows)
            shared = {row["question_id"] for row in earlier} & {row["question_id"] for row in rows}
            earlier, rows = ([row for row in side if row["question_id"] in shared] for side in (earlier, rows))
            log.info("compared on the %d questions that both answered", len(rows))
            final, baseline = summarise(rows), summarise(earlier)
            record["baseline"]["mtbench"], record["final"]["mtbench"] = baseline, final
            record["delta"] = {"mtbench": delta["score"], "mtbench_raw": delta["raw"]}
            plot_categories(baseline, final, folder / "mtbench_categories.png")
        write_json(folder / "metrics.json", {key: record[key] for key in ("baseline", "final", "delta")})
        table = [
            ("MT-Bench, 1-10", baseline.get("avg"), final["avg"], delta.get("score")),
            ("raw reward", baseline.get("raw_mean"), final["raw_mean"], delta.get("raw")),
            ("MT-Bench, logged scale", baseline.get("avg_logged"), final["avg_logged"], None),
        ]
        for number, score in enumerate(final["by_turn"]):
            before = baseline["by_turn"][number] if baseline else None
            table.append((f"turn {number + 1}", before, score, None))
        for category, score in final["by_category"].items():
            table.append((category, baseline.get("by_category", {}).get(category), score, None))
        for name, key in (("tokens an answer", "answer_tokens"), ("share unfinished", "unfinished")):
            table.append((name, baseline.get(key), final[key], None))
        print_table(f"{args.model} {args.adapter}, {len(rows)} questions", table)
    return record


if __name__ == "__main__":
    main()
