"""LoRA adapters: new, loaded, checked, grown, switched off."""

import contextlib
import dataclasses
import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm_alignment.files import InputError, differing, digest, is_out_of_memory, log, read_json
from llm_alignment.hub import check_safetensors
from llm_alignment.models import Base, check_finite, check_logits, check_vocabulary, load_model, one_line
from llm_alignment.prefixes import no_packing_reason, no_sharing_reason

# settings of an adapter that say nothing of what it computes
NEUTRAL = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type"}
# The settings with which an adapter is low-rank matrices beside the base's layers and no more: switched off it is the
# base, and it is saved, merged and grown as a whole. Any other setting (trained biases, whole layers, single tokens,
# copied layers, tokens that switch it on) must be as LoraConfig has it by default.
PLAIN = NEUTRAL | {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "lora_bias",
    "target_parameters", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip
# How its matrices began; any other way (PiSSA, OLoRA, CorDA, LoftQ, ...) takes something out of the base's weights.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")
NAME_ITS_BASE = "name the base that it was trained on, or another adapter"
MERGE_IT = "merge it into its base and name that model, or train another adapter"


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The flags of a fresh adapter."""

    lora_r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str  # comma-separated names of layers; blanks around them are ignored

    @property
    def config(self) -> LoraConfig:
        layers = [layer.strip() for layer in self.target_modules.split(",")]
        targets = "all-linear" if layers == ["all-linear"] else layers
        sizes = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        return LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **sizes)


def check_model(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lora: LoraSettings | None = None,
    adapter: str = "",
    longest: int = 0,
    scale: float = 1.0,
    packing: bool = False,
    group_by_table: bool = False,
) -> None:
    """Raises InputError for a model, a saved adapter or a fresh one that would not load, or cannot be `scaled`. The
    model is built on torch's meta device, where loading looks at names and shapes alone. `longest`: tokens of the
    longest example, which the model's context should hold. `packing` and `group_by_table` are the flags."""
    model = load_model(base, on_meta=True)
    check_vocabulary(tokenizer, model, base.what)
    context = model.config.get_text_config().max_position_embeddings
    if longest > context:
        log.warning("examples of up to %d tokens: the model's context is %d; lower the length", longest, context)
    if packing and (reason := no_packing_reason(model)):
        raise InputError(f"--packing: {reason}; leave it out")
    if group_by_table and (reason := no_sharing_reason(model)):
        raise InputError(f"--group_by_table: {reason}; leave it out")
    if adapter:
        model = load_adapter(model, adapter)
    elif lora:
        new_adapter(model, lora)
    with scaled(model, scale):
        pass


def new_adapter(model: PreTrainedModel, lora: LoraSettings) -> PeftModel:
    """Puts a fresh LoRA adapter on `model`. Raises InputError for layers that the model does not have."""
    config, what = lora.config, f"--target_modules {lora.target_modules}"
    if config.target_modules != "all-linear":
        modules, head = {name: module for name, module in model.named_modules() if name}, model.get_output_embeddings()
        for layer in config.target_modules:
            if not any(name == layer or name.endswith(f".{layer}") for name in modules):
                linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
                known = {name.split(".")[-1] for name in linear if modules[name] is not head}
                raise InputError(f"{what}: this model has no layer {layer!r}; it has {', '.join(sorted(known))}")
    before = check_logits(model, model.name_or_path)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{what}: {one_line(error)}") from error
    check_switched_off(adapted, before, what)
    return adapted


def check_switched_off(model: PeftModel, before: torch.Tensor | None, what: str) -> None:
    """Raises InputError for an adapter on the embedding or the head, whose weights the losses take from the base; and
    unless the logits of `check_logits` with the adapter off are, to the bit, those `before` it."""
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            what += ": it changes the embedding or the head"
            raise InputError(f"{what}; name other layers, or an adapter of others")
    with model.disable_adapter():
        after = check_logits(model, what)
    if before is not None and after is not None and not torch.equal(before, after):
        raise InputError(f"{what}: switched off it leaves the base changed; {MERGE_IT}")


def adapter_config(folder: str) -> dict:
    """The adapter_config.json of a saved LoRA adapter. Raises InputError when none can be read, and for an adapter
    that changes more than it adds: off it would not leave the base, or a part would not be saved, merged or grown."""
    what, path = f"adapter {folder}", Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{what}: no adapter_config.json in this folder; name the output folder of a training run")
    config = read_json(path, what)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{what}: adapter_config.json has peft_type {config.get('peft_type')!r}; name a LoRA adapter")
    if not isinstance(base := config.get("base_model_name_or_path"), str | None):
        raise InputError(f"{what}: base_model_name_or_path {base!r} in adapter_config.json is no name; write one")
    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        is_plain = name in PLAIN or name not in defaults or not value or value == defaults[name]
        if name == "init_lora_weights":
            is_plain = value in PLAIN_BEGINNINGS
        if not is_plain:
            raise InputError(f"{what}: {name} {value!r} changes more than LoRA's matrices; {MERGE_IT}")
    return config


def saved_settings(folder: str, asked: LoraSettings) -> LoraSettings:
    """The settings of a saved adapter, which count whatever the flags ask for; says where they differ."""
    config = adapter_config(folder)
    own: dict[str, Any] = {"lora_r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    if isinstance(layers := config.get("target_modules"), list):  # else a pattern
        own["target_modules"] = ",".join(sorted(map(str, layers)))
    flags = {**dataclasses.asdict(asked), "target_modules": ",".join(sorted(asked.target_modules.split(",")))}
    if other := {name: value for name, value in own.items() if value and value != flags[name]}:
        log.info("%s: its own settings count: %s", folder, differing(flags, {**flags, **other}))
    return dataclasses.replace(asked, **other)


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> PeftModel:
    """Puts a saved LoRA adapter on `model`, which may be on torch's meta device to check that it fits. Raises
    InputError when the adapter cannot be read, holds values that are not finite, or does not fit tensor by tensor:
    PEFT itself takes what fits and leaves the rest as it was."""
    what, config, is_meta = f"adapter {folder}", adapter_config(folder), model.device.type == "meta"
    if not is_meta and (unknown := sorted(config.keys() - LoraConfig.__dataclass_fields__.keys())):
        log.warning("%s: this peft does not know these settings of it: %s", what, ", ".join(unknown))
    weights = Path(folder) / "adapter_model.safetensors"
    check_safetensors(weights, what)
    stored = load_file(weights)
    check_finite(stored.items(), what)
    alpha, base = config.get("lora_alpha"), config.get("base_model_name_or_path")
    if isinstance(alpha, int | float) and not 0 < abs(alpha) < math.inf:  # with 0 it would change nothing
        raise InputError(f"{what}: lora_alpha {alpha} in adapter_config.json is no scale; train or fetch it again")
    before = check_logits(model, model.name_or_path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is an error below, or the meta device
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except Exception as error:  # sizes or layers that it does not have; a wrong value fails anywhere in PEFT
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[-1].strip()
        raise InputError(f"{what} of {base} does not fit {model.name_or_path} ({reason}); {NAME_ITS_BASE}") from error
    check_switched_off(adapted, before, what)
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for others, problem in ((stored.keys() - wanted, "has other tensors"), (wanted - stored.keys(), "lacks tensors")):
        if others:
            problem += f" ({len(others)} of {len(wanted)}, the first is {min(others)})"
            raise InputError(f"{what} of {base} does not fit {model.name_or_path}: it {problem}; {NAME_ITS_BASE}")
    if base and Path(base).resolve() != Path(model.name_or_path).resolve() and not is_meta:
        log.warning("%s was trained on %s, not on %s: right only for equal weights", what, base, model.name_or_path)
    check_logits(adapted, what)
    return adapted


def grown_adapter(model: PreTrainedModel, previous: Path, lora: LoraSettings, seed: int) -> PeftModel:
    """A larger adapter on the base `model` that computes exactly what the saved one in `previous` does. A (r, in), B
    (out, r), s = alpha / r: A' is A and fresh rows, B' is B * s / s' and columns of zeros, so s' B' A' = s B A."""
    set_seed(seed)
    model = new_adapter(model, lora)
    config = adapter_config(str(previous))
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    state = get_peft_model_state_dict(model)
    for name, tensor in load_file(previous / "adapter_model.safetensors").items():
        if ".lora_A." in name:
            state[name][:rank] = tensor
        else:
            state[name][:, :rank] = tensor * (scale / (lora.lora_alpha / lora.lora_r))
    set_peft_model_state_dict(model, state)
    return model


def adapter_off(model: PreTrainedModel | PeftModel) -> contextlib.AbstractContextManager[None]:
    """A context in which the model answers as its base does."""
    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


@contextlib.contextmanager
def scaled(model: PreTrainedModel | PeftModel, scale: float) -> Iterator[None]:
    """Inside, the adapter adds `scale` times what it was trained to add: 0 is the base, 1 the run, to the bit. The
    weights between base and run are WiSE-FT's (https://arxiv.org/abs/2109.01903). Raises InputError for a model
    without a LoRA adapter, and for DoRA, whose scale is not linear."""
    if scale != 1 and (not isinstance(model, PeftModel) or model.active_peft_config.use_dora):
        raise InputError(f"a scale of {scale:g}: only a LoRA adapter without DoRA can be scaled; leave the scale out")
    with contextlib.nullcontext() if scale == 1 else rescale_adapter_scale(model, scale):
        yield


def adapter_sha256(model: PreTrainedModel | PeftModel) -> str:
    """One hash for the active adapter's tensors and settings; "none" for a model without an adapter."""
    if not isinstance(model, PeftModel):
        return "none"
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    of_tensors = hashlib.sha256(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    settings = {name: value for name, value in model.active_peft_config.to_dict().items() if name not in NEUTRAL}
    settings |= {name: sorted(value) for name, value in settings.items() if isinstance(value, set)}
    return digest(of_tensors.hexdigest(), settings)


@contextlib.contextmanager
def adapter_kept_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """TRL rounds the adapter of a quantised model to bf16, where steps of 1e-5 vanish: put the float32 values back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained]
    yield
    for parameter, values in zip(trained, kept, strict=True):
        parameter.data = values.to(torch.float32)
