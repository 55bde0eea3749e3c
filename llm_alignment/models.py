"""The base model: resolved once a run, loaded, fingerprinted; its tokenizer."""

import dataclasses
import functools
import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llm_alignment.devices import apply_liger, prepared_device
from llm_alignment.files import InputError, is_out_of_memory, log, read_json
from llm_alignment.hub import check_files, commit_of, fetch_model, files_sha256
from llm_alignment.processes import main_process, on_main_process, versions

EXCHANGE = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]


@dataclasses.dataclass(frozen=True)
class Base:
    """The base model of a run. Everything that reads it (plan, tokenizer, every stage's model, fingerprints) takes it
    from here, so that a hub's main branch that moves while a run lasts changes nothing for that run."""

    name: str  # --model, as the user gave it
    folder: Path
    commit: str | None  # of the hub; None for a folder of the user's
    device: torch.device
    dtype: torch.dtype
    quantization: str  # "nf4", "fp4", or "none"
    trust_remote_code: bool = False
    liger: bool = False  # fused norms, RoPE and SwiGLU

    @property
    def what(self) -> str:
        """The flag and its value, for messages."""
        return f"--model {self.name}"

    @functools.cached_property
    def identity(self) -> str:
        """The commit of a hub model; of a folder one hash for every byte of weights, tokenizer, template, configs."""
        return self.commit or files_sha256(self.folder)

    @property
    def device_name(self) -> str:
        """The GPU's, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class BaseFlags:
    """The flags of that name."""

    model: str
    model_revision: str | None = None
    dtype: str = "auto"
    quant_type: str = "nf4"
    no_4bit: bool = False
    trust_remote_code: bool = False
    gpu_memory_share: float | None = None
    liger: bool = False


def resolve_base(flags: BaseFlags) -> Base:
    """Looks the base up, once a run: its folder, and of a hub model the commit that all processes then use. Raises
    InputError when it cannot be had or its files cannot be loaded."""
    name, revision = flags.model, flags.model_revision
    fetched = fetch_model(name, revision, "--model") if main_process() else None
    commit = on_main_process(lambda: commit_of(fetched))
    folder = fetched or fetch_model(name, commit or revision, "--model")
    check_files(folder, f"--model {name}")
    quantization = "none" if flags.no_4bit else flags.quant_type
    device, dtype = prepared_device(flags.dtype, flags.gpu_memory_share)
    if liger := flags.liger:
        liger = apply_liger(read_json(folder / "config.json", f"--model {name}").get("model_type", ""), device)
    return Base(name, folder, commit, device, dtype, quantization, flags.trust_remote_code, liger)


def read_tokenizer(folder: Path, what: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Raises InputError when it is damaged or has no chat template."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust tokenizers raise plain Exceptions
        reason = one_line(error)
        raise InputError(f"{what}: its tokenizer or config cannot be read ({reason}); fetch it again") from error
    tokenizer.split_special_tokens = False  # with it a template's tokens would be texts
    if isinstance(tokenizer.chat_template, dict):  # several by name, for tools or for documents
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.chat_template is None:
        raise InputError(f"{what}: its tokenizer has no chat template; name a chat model")
    return tokenizer


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's `read_tokenizer`, with a pad token, and with the template's end of turn as its `eos_token`."""
    tokenizer = read_tokenizer(base.folder, base.what, trust_remote_code=base.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    end = end_of_turn(tokenizer, base.what)
    text = rendered(tokenizer, base.what, EXCHANGE, enable_thinking=False)
    prompt = rendered(tokenizer, base.what, EXCHANGE[:1], enable_thinking=False, add_generation_prompt=True)
    opening = text.removeprefix(commonprefix([text, prompt])).partition("ANSWER")[0]
    if unsaid := re.sub(r"</?think>", "", opening).strip():
        what = f"does not end a prompt with {unsaid!r}, which begins an answer: the model must write it"
        log.warning("%s: its chat template %s", base.what, what)
    if "strftime_now" in tokenizer.chat_template:
        log.warning("%s: its chat template writes today's date, so answers change from day to day", base.what)
    if end and end != tokenizer.eos_token:  # as in Qwen3-Base: what is trained and generated ends as a turn does
        log.warning("an answer ends with %s, the template's end of a turn, not with %s", end, tokenizer.eos_token)
        tokenizer.eos_token = end
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerBase, what: str, turns: list[dict], **how: Any) -> str:
    """Turns as the chat template writes them. Raises InputError when it cannot."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **how)
    except Exception as error:  # a template may raise anything, or be no text
        reason = one_line(error)
        raise InputError(f"{what}: its chat template cannot render a question and an answer ({reason})") from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase, what: str) -> str | None:
    """The token with which the chat template ends an assistant's turn; None when it ends with plain text. Raises
    InputError when the template cannot render a question and its answer, or leaves one of them out."""
    text = rendered(tokenizer, what, EXCHANGE)
    if "QUESTION" not in text or "ANSWER" not in text:
        raise InputError(f"{what}: its chat template leaves out the question or the answer; name a chat model")
    rest = text.rpartition("ANSWER")[2].lstrip()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return max((token for token in added if rest.startswith(token)), key=len, default=None)


def from_pretrained(
    auto_class: Any, folder: Path, what: str, *, advice: str = "fetch it again or name another model", **options: Any
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, whose failures become an InputError that names `what`, the flag and its value, and
    `advice`; so do weights that do not fill the model, and values that are not finite."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # its load report is the error below
    transformers_logging.disable_progress_bar()
    try:
        model, loading = auto_class.from_pretrained(folder, output_loading_info=True, use_safetensors=True, **options)
    except Exception as error:  # a config with a wrong value fails anywhere in transformers
        if is_out_of_memory(error):
            raise
        reason = one_line(error)
        if "trust_remote_code" in str(error):
            reason, advice = "it needs code of its repository", "--trust_remote_code runs it, if you trust it"
        raise InputError(f"{what}: it cannot be loaded ({reason}); {advice}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"{what}: its weights lack {len(missing)} tensors, the first is {missing[0]}; {advice}")
    if unused := sorted(loading["unexpected_keys"]):
        log.warning("%s: %d tensors of its weights are not used, the first is %s", what, len(unused), unused[0])
    if model.device.type != "meta":
        check_finite(model.named_parameters(), what)
    return model


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, what: str) -> None:
    """Raises InputError when the tokenizer has more tokens than the embedding."""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise InputError(f"{what}: the tokenizer has {tokens} tokens, the model {rows}; use the model's own tokenizer")


def load_model(base: Base, *, on_meta: bool = False) -> PreTrainedModel:
    """The base model on this process's device, in 4 bits with double quantisation unless its quantisation is "none".
    `on_meta` gives a model without weights. Raises InputError when its files do not make a whole model."""
    from bitsandbytes.nn import Linear4bit

    how: dict[str, Any] = {"dtype": base.dtype, "trust_remote_code": base.trust_remote_code}
    in_4bit = base.quantization != "none" and not on_meta
    if in_4bit:
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": base.quantization, "bnb_4bit_compute_dtype": base.dtype}
        how["quantization_config"] = transformers.BitsAndBytesConfig(bnb_4bit_use_double_quant=True, **kind)
        how["advice"] = "fetch it again, name another model, or try --no_4bit"
    how["device_map"] = "meta" if on_meta else {"": base.device}
    gc.collect()  # a previous model may be held by reference cycles alone; both would need memory at once
    model = from_pretrained(transformers.AutoModelForCausalLM, base.folder, base.what, **how)
    without_router_logits(model)
    model.name_or_path = model.config._name_or_path = base.name  # what adapter_config.json will call the base
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # CPUs with AVX512-BF16: the first evaluation would repack the weights for a kernel without a backward
            module.support_avx512bf16_for_cpu = False
    if in_4bit:  # 4 bits have no code for a value that is not finite: it becomes another one
        for path in sorted(base.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:  # one tensor in memory at a time
                check_finite(((name, file.get_tensor(name)) for name in file.keys()), base.what)  # noqa: SIM118
    return model


def without_router_logits(model: PreTrainedModel) -> None:
    """A mixture of experts gives its router's logits only to the loss that asks for them: generation fails on them."""
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raises InputError when a tensor of floats, one of (name, tensor), holds a value that is not finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{what}: {name} holds values that are not finite; train or fetch it again")


def check_logits(model: PreTrainedModel | PeftModel, what: str) -> torch.Tensor | None:
    """The logits of a short row; None on torch's meta device. Raises InputError when they are not finite: the model's
    answers would be one token again and again."""
    if model.device.type == "meta":
        return None
    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=model.device)[None]
    with torch.no_grad(), evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits
    if not logits.isfinite().all():
        raise InputError(f"{what}: its logits are not finite; use another --dtype or fetch the model again")
    return logits


def check_head(model: PreTrainedModel, what: str) -> None:
    """Raises InputError unless the logits are the last hidden states times the head, as in the fused losses: Gemma 2,
    Cohere and Phi cap, scale or bias them. The head's own output is compared, so that rounding does not matter."""
    head = model.get_output_embeddings()
    seen: dict[str, torch.Tensor] = {}

    def see(_, inputs, named, output):  # some models, as OPT, go past their base's own forward
        seen.update(logits=output.logits, last=model.base_model(**named).last_hidden_state)

    with (
        head.register_forward_hook(lambda _, inputs, output: seen.update(hidden=inputs[0], product=output)),
        model.register_forward_hook(see, with_kwargs=True),
    ):
        check_logits(model, what)
    is_product = torch.equal(seen["logits"], seen["product"].to(seen["logits"].dtype))
    is_plain = getattr(head, "bias", None) is None and is_product
    if not is_plain or not torch.allclose(seen["last"], seen["hidden"], rtol=1e-3, atol=1e-3):
        raise InputError(f"{what}: its head's logits are capped, scaled or biased; name another model")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, without dropout; then in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def inner_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model that a PeftModel holds, its adapter at work; any other model as it is. What measures goes
    through it: a PeftModel that a trainer has prepared runs in accelerate's autocast, and a baseline does not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_fingerprint(base: Base, *, thinking: bool) -> dict:
    """What the answers of a model on this base depend on besides its adapter and the generation settings."""
    return {
        "model": base.name, "weights": base.identity, "quantization": base.quantization,
        **({"liger": True} if base.liger else {}), "dtype": base.dtype_name, "device": base.device.type,
        "thinking": thinking, "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
    }  # fmt: skip
