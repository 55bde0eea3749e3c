"""Adapters: what would not fit is found by name and before anything runs; the layers of a fresh one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_models import LFS, base_of, changed, cut, error_of, written

from llm_alignment import adapters, models
from llm_alignment.adapters import LoraSettings


def lora(layers: str = "q_proj,v_proj") -> LoraSettings:
    return LoraSettings(lora_r=8, lora_alpha=16, lora_dropout=0.05, target_modules=layers)


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """An adapter of the toy model whose tensors are not zero."""
    torch.manual_seed(3)
    model = adapters.new_adapter(models.load_model(base_of(folder)), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def tensors(change: Callable[[str, torch.Tensor], dict]) -> Callable[[Path], object]:
    """A damage: every tensor becomes those that `change` gives for it, by name."""
    from safetensors.torch import load_file, save_file

    def damage(folder: Path) -> None:
        path, result = folder / "adapter_model.safetensors", {}
        for name, tensor in load_file(path).items():
            result |= {key: value.clone().contiguous() for key, value in change(name, tensor).items()}
        save_file(result, path)

    return damage


def config(**changes: object) -> Callable[[Path], object]:
    return changed("adapter_config.json", **changes)


ADAPTERS = {
    "other names": (tensors(lambda k, v: {k.replace("layers", "blocks"): v}), ["has other tensors (8 of 8", "blocks"]),
    "half of the layers": (
        tensors(lambda k, v: {k: v} if "layers.0" in k else {}),
        ["lacks tensors (4 of 8", "layers.1"],
    ),
    "more layers": (
        tensors(lambda k, v: {k: v, k.replace("layers.1", "layers.9"): v}),
        ["has other tensors (4 of 8", "layers.9"],
    ),
    "not finite": (tensors(lambda k, v: {k: v * float("nan")}), ["not finite"]),
    "other sizes": (tensors(lambda k, v: {k: v[:, :4] if "B" in k else v}), ["does not fit"]),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors is missing"]),
    "an LFS pointer": (written("adapter_model.safetensors", LFS), ["LFS"]),
    "weights cut off": (cut("adapter_model.safetensors"), ["cut off"]),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ["no adapter_config.json"]),
    "a config cut off": (cut("adapter_config.json"), ["adapter_config.json", "JSON"]),
    "no type": (config(peft_type=None), ["peft_type"]),
    "an unknown type": (config(peft_type="LORAX"), ["peft_type", "LORAX"]),
    "a base that is no name": (config(base_model_name_or_path=["a"]), ["base_model_name_or_path"]),
    "a list": (written("adapter_config.json", "[1]"), ["adapter_config.json", "object"]),
    "a scale that is no number": (config(lora_alpha=float("nan")), ["lora_alpha nan"]),
    "a scale of 0": (config(lora_alpha=0), ["lora_alpha 0"]),
    "a rank that is a text": (config(r="8"), ["does not fit"]),
    "an unknown bias": (config(bias="some"), ["bias"]),
    "layers by a broken pattern": (config(target_modules="("), ["does not fit"]),
    "layers that are not there": (config(target_modules=["query"]), ["does not fit"]),
}


@pytest.mark.parametrize("damage, message", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_does_not_fit_is_told_before_and_when_it_is_loaded(folder, adapter, damage, message):
    damage(adapter)
    base = base_of(folder)
    before = error_of(lambda: adapters.check_model(base, models.load_tokenizer(base), adapter=str(adapter)))
    loaded = error_of(lambda: adapters.load_adapter(models.load_model(base), str(adapter)))
    assert before == loaded
    assert before.startswith(f"adapter {adapter}") and all(part in before for part in message), before


def test_logits_that_are_not_finite_are_told(folder, adapter):
    """Greedy answers of such a model are one token again and again, and get a score."""
    tensors(lambda name, tensor: {name: tensor * 1e30})(adapter)
    model = models.load_model(base_of(folder))
    models.check_logits(model, "--model toy")
    assert "logits are not finite" in error_of(lambda: adapters.load_adapter(model, str(adapter)))


def test_an_adapter_that_fits_is_loaded_as_it_is(folder, adapter, logged):
    from safetensors.torch import load_file

    base = base_of(folder)
    config(of_a_later_peft=True)(adapter)
    adapters.check_model(base, models.load_tokenizer(base), adapter=str(adapter))
    model = adapters.load_adapter(models.load_model(base), str(adapter), trainable=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in weights.items():
        name = name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
        assert torch.equal(model.state_dict()[name], tensor)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert logged.text.count("does not know these settings of it: of_a_later_peft") == 1
    assert "was trained on" not in logged.text
    config(base_model_name_or_path="Qwen/Another")(adapter)
    adapters.load_adapter(models.load_model(base), str(adapter))
    assert f"was trained on Qwen/Another, not on {folder}" in logged.text


@pytest.mark.parametrize(
    "layers, message",
    [
        ("q_proj,v_porj", "no layer 'v_porj'"),
        ("q_proj,lm_head", "changes the embedding or the head"),
        ("q_proj,,v_proj", "no layer ''"),
        ("proj", "no layer 'proj'"),
    ],
)
def test_target_modules_that_are_not_there_are_told(folder, layers, message):
    base = base_of(folder)
    error = error_of(lambda: adapters.check_model(base, models.load_tokenizer(base), lora=lora(layers)))
    assert error.startswith(f"--target_modules {layers}: ") and message in error
    assert error == error_of(lambda: adapters.new_adapter(models.load_model(base), lora(layers)))


def test_target_modules_may_have_blanks(folder):
    def trained(layers: str) -> set[str]:
        model = adapters.new_adapter(models.load_model(base_of(folder)), lora(layers))
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained("q_proj, v_proj ") == trained("q_proj,v_proj") and len(trained("q_proj,v_proj")) == 8
    assert len(trained("all-linear")) == 28
