"""Models: what would not load as it should is found, by name and before anything runs; types of weights; adapters."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from toys import CHATML, make_model, make_tokenizer, save_reward_model, tiny_config

from llm_alignment import files, flags, generation, models, rewards


def arguments(folder: Path | str, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flags.add_model_flags(parser)
    flags.add_lora_flags(parser)
    return parser.parse_args(["--model", str(folder), "--no_4bit", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(tie_word_embeddings=False).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


def error_of(act: Callable[[], object]) -> str:
    """The one line of the InputError that `act` raises."""
    with pytest.raises(files.InputError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3554214752\n"


def cut(name: str, keep: float = 0.6) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return damage


def in_shards(folder: Path) -> None:
    """Leaves the first of two shards with their index."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def without(*names: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if name not in names}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_codes(folder: Path) -> None:
    """Weights of a layer are whole numbers of 8 bits."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "weights are an LFS pointer": (lambda f: (f / "model.safetensors").write_text(LFS), ["model.safetensors", "LFS"]),
    "tokenizer is an LFS pointer": (lambda f: (f / "tokenizer.json").write_text(LFS), ["tokenizer.json", "LFS"]),
    "weights are cut off": (cut("model.safetensors"), ["model.safetensors", "cut off"]),
    "a header is cut off": (cut("model.safetensors", 0.001), ["model.safetensors", "cut off"]),
    "the tokenizer is cut off": (cut("tokenizer.json"), ["tokenizer.json", "JSON"]),
    "the config is cut off": (cut("config.json"), ["config.json", "JSON"]),
    "the config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
    "a shard is missing": (in_shards, ["model-00002-of-00002.safetensors is missing"]),
    "no index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        ["model.safetensors.index.json"],
    ),
    "the config is too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), ["config.json", "deeply"]),
    "the index is no index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        ["model.safetensors.index.json", "names no files"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no .safetensors"]),
    "stored in fp8": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "fp8"}),
        ["stored in fp8"],
    ),
    "stored by GPTQ": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ["stored in gptq"],
    ),
    "an unknown type": (lambda f: change_json(f / "config.json", model_type="qwen99"), ["qwen99"]),
    "no head": (without("lm_head.weight"), ["lm_head.weight", "not in its weights"]),
    "half a layer": (
        without("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ["model.layers.1.mlp.down_proj.weight and 1 more"],
    ),
    "other sizes": (lambda f: change_json(f / "config.json", intermediate_size=128), ["cannot be loaded"]),
    "a small embedding": (
        lambda f: make_model(tie_word_embeddings=False, vocab_size=250).save_pretrained(f),
        ["the tokenizer has", "the model 250"],
    ),
    "no context": (lambda f: change_json(f / "config.json", max_position_embeddings=0), ["max_position_embeddings 0"]),
    "an end that is a text": (lambda f: change_json(f / "config.json", eos_token_id="</s>"), ["eos_token_id '</s>'"]),
    "an end of answers that is a text": (
        lambda f: change_json(f / "generation_config.json", eos_token_id=[0, "</s>"]),
        ["generation_config.json has eos_token_id"],
    ),
    "a size that is a text": (
        lambda f: change_json(f / "config.json", hidden_size="large"),
        ["config", "hidden_size"],
    ),
    "no heads": (lambda f: change_json(f / "config.json", num_attention_heads=0), ["cannot be"]),
    "an unknown activation": (lambda f: change_json(f / "config.json", hidden_act="tanhh"), ["tanhh"]),
    "a template that is no text": (
        lambda f: (
            (f / "chat_template.jinja").unlink(missing_ok=True),
            change_json(f / "tokenizer_config.json", chat_template=5),
        ),
        ["template"],
    ),
    "quantised without a word of it": (with_codes, ["q_proj.weight is stored as I8"]),
    "a template that is broken": (
        lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no chats here') }}"),
        ["chat template", "no chats here"],
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_model_that_is_not_whole_is_told_without_reading_its_weights(copied, damage, message):
    damage(copied)
    args = arguments(copied)
    error = error_of(lambda: models.check_model(args, models.load_tokenizer(args)))
    assert error.startswith(f"--model {copied}: ") and all(part in error for part in message), error


def test_a_whole_model_passes_also_in_shards(copied):
    args = arguments(copied)
    models.check_model(args, models.load_tokenizer(args))
    make_model(tie_word_embeddings=False).save_pretrained(copied / "two", max_shard_size="50KB")
    (copied / "model.safetensors").unlink()
    for path in (copied / "two").iterdir():
        path.rename(copied / path.name)
    assert (copied / "model.safetensors.index.json").exists()
    models.check_model(args, models.load_tokenizer(args))
    models.load_model(args)


def test_weights_that_are_not_finite_are_told(copied):
    model = make_model(tie_word_embeddings=False)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(copied)
    args = arguments(copied)
    for args.no_4bit in (True, False):  # in 4 bits the value would be another one, and finite
        assert "model.layers.0.mlp.up_proj.weight holds values" in error_of(lambda: models.load_model(args))


def test_code_of_a_repository_needs_its_flag_and_nobody_is_asked(copied, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    (copied / "code.py").write_text("raise SystemExit('it ran')\n")
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    auto["AutoModelForSequenceClassification"] = "code.Model"
    change_json(copied / "config.json", model_type="of_its_own", auto_map=auto)
    args = arguments(copied)
    assert "--trust_remote_code" in error_of(lambda: models.load_model(args))
    assert "--trust_remote_code" in error_of(lambda: rewards.RewardModel(str(copied)))


def test_a_reward_model_that_is_not_whole_is_told(tmp_path):
    whole = save_reward_model(tmp_path / "whole", make_tokenizer())
    for name, (damage, message) in DAMAGES.items():
        if name in {"no head", "half a layer", "a small embedding", "an end of answers that is a text"}:
            continue
        folder = shutil.copytree(whole, tmp_path / name)
        damage(folder)
        error = error_of(lambda folder=folder: rewards.RewardModel(str(folder), device="meta"))
        assert error.startswith(f"--reward_model {folder}: "), error
        assert name == "other sizes" or all(part in error for part in message), error
    model = rewards.RewardModel(whole).model
    model.score.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "not finite")
    make_tokenizer().save_pretrained(tmp_path / "not finite")
    assert "score.weight holds values" in error_of(lambda: rewards.RewardModel(str(tmp_path / "not finite")))


# ---------------------------------------------------------------------------------------------------------------------
# adapters


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """An adapter of the toy model whose tensors are not zero."""
    torch.manual_seed(3)
    model = models.new_adapter(models.load_model(arguments(folder)), arguments(folder))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_tensors(adapter: Path, change: Callable[[dict], dict]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")


def with_nan(tensors: dict) -> dict:
    first = next(iter(tensors))
    return {**tensors, first: tensors[first] * float("nan")}


def with_layer_9(tensors: dict) -> dict:
    return tensors | {name.replace("layers.1", "layers.9"): tensor.clone() for name, tensor in tensors.items()}


ADAPTERS = {
    "other names": (
        lambda f: change_tensors(f, lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()}),
        ["none of its tensors"],
    ),
    "half of the layers": (
        lambda f: change_tensors(f, lambda t: {k: v for k, v in t.items() if "layers.0" in k}),
        ["lacks 4 of 8 tensors", "layers.1"],
    ),
    "more layers": (lambda f: change_tensors(f, with_layer_9), ["holds 4 tensors", "layers.9"]),
    "not finite": (lambda f: change_tensors(f, with_nan), ["not finite"]),
    "other sizes": (
        lambda f: change_tensors(f, lambda t: {k: v[:, :4].contiguous() if "B" in k else v for k, v in t.items()}),
        ["does not fit"],
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors is missing"]),
    "an LFS pointer": (lambda f: (f / "adapter_model.safetensors").write_text(LFS), ["LFS"]),
    "weights cut off": (cut("adapter_model.safetensors"), ["cut off"]),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ["no adapter_config.json"]),
    "a config cut off": (cut("adapter_config.json"), ["adapter_config.json", "JSON"]),
    "no type": (lambda f: change_json(f / "adapter_config.json", peft_type=None), ["peft_type"]),
    "an unknown type": (lambda f: change_json(f / "adapter_config.json", peft_type="LORAX"), ["peft_type", "LORAX"]),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), ["adapter_config.json", "object"]),
    "a scale that is no number": (
        lambda f: change_json(f / "adapter_config.json", lora_alpha=float("nan")),
        ["lora_alpha nan"],
    ),
    "a scale of 0": (lambda f: change_json(f / "adapter_config.json", lora_alpha=0), ["lora_alpha 0"]),
    "a rank that is a text": (lambda f: change_json(f / "adapter_config.json", r="8"), ["does not fit"]),
    "an unknown bias": (lambda f: change_json(f / "adapter_config.json", bias="some"), ["does not fit"]),
    "layers by a broken pattern": (
        lambda f: change_json(f / "adapter_config.json", target_modules="("),
        ["does not fit"],
    ),
    "layers that are not there": (
        lambda f: change_json(f / "adapter_config.json", target_modules=["query"]),
        ["does not fit"],
    ),
}


@pytest.mark.parametrize("damage, message", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_does_not_fit_is_told_before_and_when_it_is_loaded(folder, adapter, damage, message):
    damage(adapter)
    args = arguments(folder)
    before = error_of(lambda: models.check_model(args, models.load_tokenizer(args), adapter=str(adapter)))
    loaded = error_of(lambda: models.load_adapter(models.load_model(args), str(adapter)))
    assert before == loaded
    assert before.startswith(f"adapter {adapter}") and all(part in before for part in message), before


def test_logits_that_are_not_finite_are_told(folder, adapter):
    """Greedy answers of such a model are one token again and again, and get a score."""
    change_tensors(adapter, lambda tensors: {name: tensor * 1e30 for name, tensor in tensors.items()})
    model = models.load_model(arguments(folder))
    models.check_logits(model, "--model toy")
    assert "logits are not finite" in error_of(lambda: models.load_adapter(model, str(adapter)))


def test_a_folder_has_no_revision(folder):
    args = arguments(folder, "--model_revision", "v2")
    assert "--model_revision v2" in error_of(lambda: models.load_tokenizer(args))


def test_an_adapter_that_fits_is_loaded_as_it_is(folder, adapter, logged):
    from safetensors.torch import load_file

    args = arguments(folder)
    change_json(adapter / "adapter_config.json", of_a_later_peft=True)
    models.check_model(args, models.load_tokenizer(args), adapter=str(adapter))
    model = models.load_adapter(models.load_model(args), str(adapter), trainable=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in weights.items():
        name = name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
        assert torch.equal(model.state_dict()[name], tensor)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert logged.text.count("does not know these settings of it: of_a_later_peft") == 1
    assert "was trained on" not in logged.text
    change_json(adapter / "adapter_config.json", base_model_name_or_path="Qwen/Another")
    models.load_adapter(models.load_model(args), str(adapter))
    assert f"was trained on Qwen/Another, not on {folder}" in logged.text


@pytest.mark.parametrize(
    "layers, message",
    [
        ("q_proj,v_porj", "no layer 'v_porj'"),
        ("q_proj,lm_head", "lm_head, cannot be trained"),
        ("q_proj,,v_proj", "no layer ''"),
        ("proj", "no layer 'proj'"),
    ],
)
def test_target_modules_that_are_not_there_are_told(folder, layers, message):
    args = arguments(folder, "--target_modules", layers)
    error = error_of(lambda: models.check_model(args, models.load_tokenizer(args)))
    assert error.startswith(f"--target_modules {layers}: ") and message in error
    assert error == error_of(lambda: models.new_adapter(models.load_model(args), args))


def test_target_modules_may_have_blanks(folder):
    def trained(layers: str) -> set[str]:
        args = arguments(folder, "--target_modules", layers)
        model = models.new_adapter(models.load_model(args), args)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained("q_proj, v_proj ") == trained("q_proj,v_proj") and len(trained("q_proj,v_proj")) == 8
    assert len(trained("all-linear")) == 28


# ---------------------------------------------------------------------------------------------------------------------
# the head


@pytest.mark.parametrize("which", ["plain", "capped", "scaled", "biased"])
def test_a_head_that_is_not_plain_is_told(which):
    model = make_model()
    if which == "capped":
        from transformers import Gemma2Config, Gemma2ForCausalLM

        sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
        config = {name: getattr(tiny_config(), name) for name in sizes | {"num_key_value_heads", "vocab_size"}}
        model = Gemma2ForCausalLM(Gemma2Config(**config)).eval()
    elif which == "scaled":
        model = make_scaled(model)
    elif which == "biased":
        head = torch.nn.Linear(32, 400)
        head.weight = model.get_output_embeddings().weight
        model.set_output_embeddings(head)
    with contextlib.nullcontext() if which == "plain" else pytest.raises(files.InputError, match="capped, scaled"):
        models.check_head(model, "--model toy")
        models.check_head(model.to(torch.bfloat16), "--model toy")


def make_scaled(model):
    """Logits divided after the head, as in Granite."""
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits / 1.5
        return output

    model.forward = forward
    return model


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer, types, memory


def test_an_answer_ends_where_the_template_ends_a_turn(copied, logged):
    args = arguments(copied)
    turns = [{"role": "user", "content": "ask"}]
    as_chat = models.load_tokenizer(args)
    assert as_chat.eos_token == "<|im_end|>" and not logged.records
    change_json(copied / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=None)
    for name in ("config.json", "generation_config.json"):
        change_json(copied / name, eos_token_id=0)
    as_base = models.load_tokenizer(args)
    assert (as_base.eos_token, as_base.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<|im_end|>" in logged.text
    settings = generation.decoding_settings(models.load_model(args), as_base, temperature=0.0, top_p=1.0)
    assert settings.eos_token_id == [0, 2]
    assert as_base.apply_chat_template(turns) == as_chat.apply_chat_template(turns)


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "<s>"), "<s>"),
        (CHATML.replace("<|im_end|>", " <|endoftext|>"), "<|endoftext|>"),
        (CHATML.replace("<|im_end|>", ""), None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(template, end):
    assert models.end_of_turn(make_tokenizer(template), "--model toy") == end


@pytest.mark.parametrize(
    "template", ["{{ '' }}", "Hello", "{% for turn in messages[:1] %}{{ turn.content }}{% endfor %}"]
)
def test_a_template_that_leaves_out_a_turn_is_told(template):
    assert "leaves out" in error_of(lambda: models.end_of_turn(make_tokenizer(template), "--model toy"))


@pytest.mark.slow
def test_every_type_works_on_cpu_in_4_bits_too(folder):
    tokenizer = make_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in ("ask the model", "the Ob and Lake Baikal")]
    for choice, dtype in (("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        for four_bits in (False, True):
            args = arguments(folder, "--dtype", choice)
            args.no_4bit = not four_bits
            model = models.load_model(args)
            assert str(model.dtype) == f"torch.{dtype}"
            assert models.model_fingerprint(args, "none")["dtype"] == dtype
            answers = sorted(generation.generate(model, tokenizer, chats, max_new_tokens=4))
            assert [answer.index for answer in answers] == [0, 1]


def test_the_fingerprint_follows_weights_template_and_type(copied):
    args = arguments(copied)
    prints = [
        models.model_fingerprint(args, "none"),
        models.model_fingerprint(arguments(copied, "--dtype", "bf16"), "none"),
    ]
    (copied / "chat_template.jinja").write_text(CHATML + " ", encoding="utf-8")
    prints.append(models.model_fingerprint(args, "none"))
    without("lm_head.weight")(copied)
    prints.append(models.model_fingerprint(args, "none"))
    assert len({json.dumps(value) for value in prints}) == 4


def test_a_former_model_is_freed_before_the_next_is_loaded(folder, monkeypatch):
    args = arguments(folder)
    previous = models.load_model(args)
    previous.held_by = {"the model": previous}  # a cycle, as trainers and patched methods make them
    alive = weakref.ref(previous)
    del previous
    gc.disable()
    try:
        seen = []
        monkeypatch.setattr(models, "from_pretrained", lambda *_, **__: seen.append(alive()) or make_model())
        models.load_model(args)
    finally:
        gc.enable()
    assert seen == [None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_products_of_half_types_are_summed_in_float32(half, device):
    """As the loss has them: float32 states, the head transposed, into a part of a buffer."""
    states, weight = (torch.rand(n, 4096, generator=torch.Generator().manual_seed(n)).to(device) for n in (5, 7))
    weight, buffer = weight.to(half), torch.empty(9, 7, device=device)
    product = models.matmul_float32(states, weight.T, out=buffer[:5])
    assert product.dtype == torch.float32 and product.data_ptr() == buffer.data_ptr()
    exact = states.to(half).double() @ weight.double().T
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=0)  # rounded to bf16: 4e-3
