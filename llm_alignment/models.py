"""Processes and devices, the 4-bit base, its tokenizer, LoRA adapters, fingerprints."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.files import InputError, digest, file_sha256, is_out_of_memory
from llm_alignment.model_files import check_files, check_safetensors, fetch_model, read_json, stored_tensors

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("llm_alignment")

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # --dtype -> torch's name


def main_process() -> bool:
    """True in the one process that writes files and prints, under `accelerate launch` too."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes, one to a device, share the work under `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_and_dtype(choice: str = "auto") -> tuple[torch.device, torch.dtype]:
    """This process's device and the type of the base's weights; `choice` is --dtype.

    auto: bf16 where the GPU has it, else fp16; fp32 on CPU. Raises InputError for bf16 on a GPU without it, and for
    several GPUs on Windows, where torch has no NCCL.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu"), getattr(torch, DTYPES.get(choice, "float32"))
    if processes() > 1 and sys.platform == "win32":
        raise InputError(
            "several GPUs need NCCL, which torch does not have on Windows (it has gloo, for CPU): start one process, "
            "without accelerate launch, or use WSL"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if choice == "bf16" and not has_bf16:
        raise InputError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; take --dtype fp16")
    return device, getattr(torch, DTYPES.get(choice) or ("bfloat16" if has_bf16 else "float16"))


def named_device(choice: str) -> tuple[str, str]:
    """The name of this process's device ("cpu", or the GPU's) and of the type of the weights; logs both."""
    import torch

    device, dtype = device_and_dtype(choice)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    type_name = str(dtype).removeprefix("torch.")
    log.info("device: %s, %s", name, type_name)
    return name, type_name


def matmul_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (m, k) @ b (k, n) with `a` in the type of `b`; half types are summed, and returned, in float32."""
    import torch

    a = a.to(b.dtype)
    if b.dtype not in {torch.float16, torch.bfloat16}:
        return torch.mm(a, b, out=out)
    if b.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def read_tokenizer(folder: Path, what: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Raises InputError when it is damaged or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust tokenizers raise plain Exceptions
        raise InputError(
            f"{what}: its tokenizer or config cannot be read ({one_line(error)}); fetch it again"
        ) from error
    if tokenizer.chat_template is None:
        raise InputError(f"{what}: its tokenizer has no chat template; name a chat model")
    return tokenizer


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a pad token, and with the template's end of turn as its `eos_token`.

    Raises InputError when its files or those of the model cannot be read, or when it has no chat template.
    """
    what = f"--model {args.model}"
    folder = fetch_model(args.model, args.model_revision, "--model")
    check_files(folder, what)
    tokenizer = read_tokenizer(folder, what, trust_remote_code=args.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    end = end_of_turn(tokenizer, what)
    if end and end != tokenizer.eos_token:  # as in Qwen3-Base: what is trained and generated ends as a turn does
        log.warning("an answer ends with %s, the template's end of a turn, not with %s", end, tokenizer.eos_token)
        tokenizer.eos_token = end
    return tokenizer


def end_of_turn(tokenizer: PreTrainedTokenizerBase, what: str) -> str | None:
    """The token with which the chat template ends an assistant's turn; None when it ends with plain text.

    Raises InputError when the template cannot render a question and its answer, or leaves one of them out.
    """
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template may raise anything, or be no text
        reason = one_line(error)
        raise InputError(f"{what}: its chat template cannot render a question and an answer ({reason})") from error
    if "QUESTION" not in text or "ANSWER" not in text:
        raise InputError(f"{what}: its chat template leaves out the question or the answer; name a chat model")
    rest = text.rpartition("ANSWER")[2].lstrip()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return max((token for token in added if rest.startswith(token)), key=len, default=None)


def from_pretrained(
    auto_class: Any, folder: Path, what: str, *, advice: str = "fetch it again or name another model", **options: Any
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, whose failures become an InputError: also weights that do not fill the model, and
    values that are not finite.

    `what` is the flag and its value, and `advice` what to do, for the message.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # its load report is the error below
    has_bar = transformers_logging.is_progress_bar_enabled()
    if options.get("device_map") == "meta":  # no weights are read
        transformers_logging.disable_progress_bar()
    try:
        model, loading = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # a config with a wrong value fails anywhere in transformers
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{what}: this model needs code of its repository; --trust_remote_code runs it, if you trust it"
            ) from error
        raise InputError(f"{what}: it cannot be loaded ({one_line(error)}); {advice}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
    missing = sorted(loading["missing_keys"])
    if missing:
        count = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{what}: {missing[0]}{count} not in its weights; {advice}")
    unused = sorted(loading["unexpected_keys"])
    if unused:
        log.warning("%s: %d tensors of its weights are not used, the first is %s", what, len(unused), unused[0])
    if model.device.type != "meta":
        check_finite(model.named_parameters(), what)
    return model


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, what: str) -> None:
    """Raises InputError when the tokenizer has a token that the embedding has not."""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise InputError(
            f"{what}: the tokenizer has {tokens} tokens, the model {rows}; take the tokenizer of the model"
        )


def check_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, *, adapter: str = "") -> None:
    """Raises InputError for a model, adapter or --target_modules that would not load; reads no weights of the base.

    The model is built on torch's meta device, where loading looks at names and shapes alone. With `adapter`, a folder,
    that adapter is checked; else the layers that get a fresh one, where the flags ask for it.
    """
    model = load_model(args, on_meta=True)
    check_vocabulary(tokenizer, model, f"--model {args.model}")
    context = model.config.get_text_config().max_position_embeddings
    for name in ("max_seq_length", "max_length"):
        if vars(args).get(name, 0) > context:
            log.warning("--%s %d: the model's context is %d tokens; lower it", name, vars(args)[name], context)
    if adapter:
        load_adapter(model, adapter)
    elif hasattr(args, "target_modules"):
        new_adapter(model, args)


def load_model(args: argparse.Namespace, *, on_meta: bool = False) -> PreTrainedModel:
    """The base model on this process's device: 4-bit with double quantisation unless --no_4bit.

    A previous model that only reference cycles keep alive is freed first. `on_meta` gives a model without weights.
    Raises InputError when its files do not make a whole model.
    """
    import gc

    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    what = f"--model {args.model}"
    folder = fetch_model(args.model, args.model_revision, "--model")
    check_files(folder, what)
    device, dtype = device_and_dtype(args.dtype)
    quantization = None
    if not args.no_4bit and not on_meta:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    gc.collect()  # a previous model may be held by reference cycles alone; both would need memory at once
    model = from_pretrained(
        AutoModelForCausalLM,
        folder,
        what,
        dtype=dtype,
        quantization_config=quantization,
        device_map="meta" if on_meta else {"": device},
        trust_remote_code=args.trust_remote_code,
    )
    model.name_or_path = model.config._name_or_path = args.model  # what adapter_config.json will call the base
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # CPUs with AVX512-BF16: the first evaluation would repack the weights for a kernel without a backward
            module.support_avx512bf16_for_cpu = False
    if quantization:  # 4 bits have no code for a value that is not finite: it becomes another one
        for path in sorted(folder.glob("*.safetensors")):
            check_finite(stored_tensors(path), what)
    return model


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raises InputError when a tensor of floats, one of (name, tensor), holds a value that is not finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{what}: {name} holds values that are not finite; train or fetch it again")


def check_logits(model: PreTrainedModel | PeftModel, what: str) -> None:
    """Raises InputError when the logits are not finite: their answers would be one token again and again."""
    import torch

    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=model.device)[None]
    with torch.no_grad(), evaluating(model):
        if not model(input_ids=ids, use_cache=False).logits.isfinite().all():
            raise InputError(f"{what}: its logits are not finite; take another --dtype or fetch the model again")


def check_head(model: PreTrainedModel, what: str) -> None:
    """Raises InputError unless the logits are the last hidden states times the head, with nothing before or after.

    The fused losses compute them so. Models that cap, scale or bias their logits (Gemma 2, Cohere, Phi) would train
    and measure something else. The head's own output is compared, so that rounding does not matter.
    """
    import torch

    check_logits(model, what)
    head, seen = model.get_output_embeddings(), {}

    def keep(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen["hidden"], seen["logits"] = inputs[0], output

    ids = torch.arange(min(8, head.weight.shape[0]), device=model.device)[None]
    with torch.no_grad(), head.register_forward_hook(keep):
        logits = model(ids, use_cache=False).logits
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
    is_plain = getattr(head, "bias", None) is None and torch.equal(logits, seen["logits"].to(logits.dtype))
    if not is_plain or not torch.allclose(hidden, seen["hidden"], rtol=1e-3, atol=1e-3):
        raise InputError(
            f"{what}: its logits are not hidden states times its head (they are capped, scaled or biased), and the "
            "losses here need that; name another model"
        )


def adapter_config(folder: str) -> dict:
    """The adapter_config.json of a saved adapter. Raises InputError when there is none that can be read."""
    what, path = f"adapter {folder}", Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{what}: no adapter_config.json in this folder; name the output folder of a training run")
    return read_json(path, what)


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> PeftModel:
    """Puts a saved LoRA adapter on `model`, which may be on torch's meta device to check that it fits.

    Raises InputError when the adapter cannot be read, holds values that are not finite, or does not fit tensor by
    tensor: PEFT itself takes what fits and leaves the rest as it was.
    """
    import warnings

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel

    what, config = f"adapter {folder}", adapter_config(folder)
    if config.get("peft_type") not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise InputError(f"{what}: adapter_config.json names no known peft_type ({config.get('peft_type')!r})")
    unknown = sorted(config.keys() - PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]].__dataclass_fields__.keys())
    if unknown and model.device.type != "meta":
        log.warning("%s: this peft does not know these settings of it: %s", what, ", ".join(unknown))
    weights = Path(folder) / "adapter_model.safetensors"
    check_safetensors(weights, what)
    check_finite(stored_tensors(weights), what)
    alpha = config.get("lora_alpha")
    if isinstance(alpha, int | float) and not 0 < abs(alpha) < math.inf:  # with 0 it would change nothing
        raise InputError(f"{what}: lora_alpha {alpha} in adapter_config.json is no scale; train or fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is an error below, or the meta device
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except Exception as error:  # sizes or layers that it does not have; a wrong value fails anywhere in PEFT
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[-1].strip()
        base = config.get("base_model_name_or_path")
        raise InputError(f"{what} of {base} does not fit {model.name_or_path} ({reason})") from error
    base = config.get("base_model_name_or_path")
    check_adapter_fits(adapted, weights, f"{what} of {base}")
    if base and Path(base).resolve() != Path(model.name_or_path).resolve() and model.device.type != "meta":
        log.warning("%s was trained on %s, not on %s: right only for equal weights", what, base, model.name_or_path)
    if model.device.type != "meta":
        check_logits(adapted, what)
    return adapted


def check_adapter_fits(model: PeftModel, weights: Path, what: str) -> None:
    """Raises InputError unless the file holds every tensor of the model's adapter and no others."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(weights, "pt") as file:
        stored = set(file.keys())
    foreign = sorted(stored - wanted - {f"base_model.model.{name}" for name in model.get_base_model().state_dict()})
    absent = sorted(wanted - stored)
    base = model.get_base_model().name_or_path
    if foreign and len(foreign) == len(stored):
        raise InputError(f"{what}: none of its tensors belongs to {base} (the first is {foreign[0]})")
    if foreign:
        raise InputError(f"{what} holds {len(foreign)} tensors that {base} has not (the first is {foreign[0]})")
    if absent:
        raise InputError(f"{what} lacks {len(absent)} of {len(wanted)} tensors for {base} (the first is {absent[0]})")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, without dropout; then in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def adapter_off(model: PreTrainedModel | PeftModel) -> contextlib.AbstractContextManager[None]:
    """A context in which the model answers as its base does."""
    from peft import PeftModel

    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


def inner_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model that a PeftModel holds, its adapter at work; any other model as it is.

    What measures goes through it: once a trainer has prepared a PeftModel, the forward pass of that one alone runs in
    accelerate's autocast, so in half precision a baseline would be measured in another way than what follows.
    """
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_sha256(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 of the active adapter's tensors as safetensors; "none" for a model without an adapter."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save

    if not isinstance(model, PeftModel):
        return "none"
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    return hashlib.sha256(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})).hexdigest()


def model_fingerprint(args: argparse.Namespace, adapter: str) -> dict:
    """What a model's answers depend on besides the generation settings. `adapter`: its SHA-256, or "none".

    The weights are known by the sizes and both ends of their files, the tokenizer and its template by their files.
    """
    folder = fetch_model(args.model, args.model_revision, "--model")
    weights = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            weights.update(str(size).encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            weights.update(file.read())
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    device, dtype = device_and_dtype(args.dtype)
    return {
        "model": args.model,
        "weights": weights.hexdigest(),
        "tokenizer": digest({name: file_sha256(folder / name) for name in names if (folder / name).is_file()}),
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

    config, what = lora_config(args), f"--target_modules {args.target_modules}"
    if config.target_modules != "all-linear":
        names = {name for name, _ in model.named_modules() if name}
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        for layer in config.target_modules:
            if not any(name == layer or name.endswith(f".{layer}") for name in names):
                raise InputError(
                    f"{what}: this model has no layer {layer!r}; it has {', '.join(linear_layers(model))}"
                )
            if head.split(".")[-1] == layer.split(".")[-1]:
                raise InputError(f"{what}: the head, {layer}, cannot be trained here; leave it out")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{what}: {one_line(error)}") from error


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names, such as q_proj, of the linear layers within the blocks of a model."""
    import torch

    return sorted({
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    })


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """The LoRA adapter that the flags ask for; blanks around the names in --target_modules are ignored."""
    from peft import LoraConfig

    layers = [layer.strip() for layer in args.target_modules.split(",")]
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if layers == ["all-linear"] else layers,
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


DDP_TIMEOUT = datetime.timedelta(days=1)  # of processes for one that generates or evaluates


def all_processes() -> PartialState:
    """accelerate's state, made with `DDP_TIMEOUT` also where it is needed before the trainer, which would make it."""
    import torch
    from accelerate import PartialState

    # without a GPU it has to be told, or every process believes that it is alone
    return PartialState(cpu=not torch.cuda.is_available(), timeout=DDP_TIMEOUT)


def gathered(items: list) -> list:
    """The lists of all processes as one, in the order of their ranks; every process gets it."""
    from accelerate.utils import gather_object

    all_processes()
    return gather_object(items)


def on_main_process(compute: Callable[[], Any]) -> Any:
    """Runs `compute` in the main process alone; every process gets its result."""
    from accelerate.utils import broadcast_object_list

    all_processes()
    return broadcast_object_list([compute() if main_process() else None])[0]
