"""Processes and devices, the 4-bit base, its tokenizer, LoRA adapters, fingerprints."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.files import InputError, hub_errors

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def adapter_off(model: PreTrainedModel | PeftModel) -> contextlib.AbstractContextManager[None]:
    """A context in which the model answers as its base does."""
    from peft import PeftModel

    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


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
