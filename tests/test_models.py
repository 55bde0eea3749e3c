"""Models: what would not load as it should is found, by name and before anything runs; types of weights."""

from __future__ import annotations

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
from toys import CHATML, make_model, make_tokenizer, save_reward_model, tiny_config, toy_base

from llm_alignment import adapters, anchored_loss, files, generation, models, rewards
from llm_alignment.generation import Decoding


def base_of(folder: Path, **flags: object) -> models.Base:
    return toy_base(model=str(folder), **flags)


def check(folder: Path) -> None:
    """What a run looks at before it loads weights."""
    base = base_of(folder)
    adapters.check_model(base, models.load_tokenizer(base))


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


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def changed(name: str, **changes: object) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / name, **changes)


def moved(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def in_shards(folder: Path) -> None:
    """Leaves the first of two shards with their index."""
    moved("model-00001-of-00002.safetensors")(folder)
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    written("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}))(folder)


def with_tensors(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    from safetensors.torch import load_file, save_file

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return damage


def without(*names: str) -> Callable[[Path], object]:
    return with_tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names})


def as_codes(tensors: dict) -> dict:
    """Weights of some layers are whole numbers of 8 bits."""
    return {name: tensor.to(torch.int8) if "q_proj" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["default", "rag"])
def test_of_several_templates_the_default_one_is_used(copied, name):
    """Listed in tokenizer_config.json, as older releases have them."""
    template = models.load_tokenizer(base_of(copied)).chat_template
    no_text_as_template(copied)
    listed = [{"name": each, "template": template} for each in (name, "tool_use")]
    change_json(copied / "tokenizer_config.json", chat_template=listed)
    if name == "default":
        assert models.load_tokenizer(base_of(copied)).chat_template == template
    else:
        assert "no chat template" in error_of(lambda: models.load_tokenizer(base_of(copied)))


def test_a_template_that_writes_the_date_is_warned_of(copied, logged):
    path = copied / "chat_template.jinja"
    models.load_tokenizer(base_of(copied))
    assert "date" not in logged.text
    path.write_text("{{ strftime_now('%d %b %Y') }}" + path.read_text("utf-8"), encoding="utf-8")
    models.load_tokenizer(base_of(copied))
    assert "writes today's date" in logged.text


@pytest.mark.parametrize("prompt, is_told", [("<|im_start|>assistant\n", False), ("<|im_start|>", True), ("", True)])
def test_a_prompt_that_does_not_begin_the_answer_is_warned_of(copied, logged, prompt, is_told):
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    prompt = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    (copied / "chat_template.jinja").write_text(turns + prompt, encoding="utf-8")
    models.load_tokenizer(base_of(copied))
    assert ("does not end a prompt with" in logged.text) is is_told


def test_the_template_s_tokens_are_tokens_whatever_the_tokenizer_ships_with(copied):
    plain = models.load_tokenizer(base_of(copied))("<|im_start|>user")["input_ids"]
    change_json(copied / "tokenizer_config.json", split_special_tokens=True)
    assert models.load_tokenizer(base_of(copied))("<|im_start|>user")["input_ids"] == plain


def no_text_as_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_json(folder / "tokenizer_config.json", chat_template=5)


WEIGHTS, INDEX, UP_DOWN = "model.safetensors", "model.safetensors.index.json", "model.layers.1.mlp.{}_proj.weight"
DAMAGES = {
    "weights are an LFS pointer": (written(WEIGHTS, LFS), [WEIGHTS, "LFS"]),
    "tokenizer is an LFS pointer": (written("tokenizer.json", LFS), ["tokenizer.json", "LFS"]),
    "weights are cut off": (cut(WEIGHTS), [WEIGHTS, "cut off"]),
    "a header is cut off": (cut(WEIGHTS, 0.001), [WEIGHTS, "cut off"]),
    "the tokenizer is cut off": (cut("tokenizer.json"), ["tokenizer.json", "JSON"]),
    "the config is cut off": (cut("config.json"), ["config.json", "JSON"]),
    "the config is a list": (written("config.json", "[]"), ["config.json", "object"]),
    "a shard is missing": (in_shards, ["No such file", "model-00002-of-00002.safetensors"]),
    "no index": (moved("model-00001-of-00002.safetensors"), ["no file named model.safetensors"]),
    "the config is too deep": (written("config.json", "[" * 100_000), ["config.json", "deeply"]),
    "the index is cut off": (written(INDEX, '{"weight_map"'), [INDEX, "JSON"]),
    "no weights but a pickle": (moved("pytorch_model.bin"), ["no file named model.safetensors"]),
    "stored in fp8": (changed("config.json", quantization_config={"quant_method": "fp8"}), ["stored in fp8"]),
    "stored by GPTQ": (changed("config.json", quantization_config={"quant_method": "gptq"}), ["stored in gptq"]),
    "an unknown type": (changed("config.json", model_type="qwen99"), ["qwen99"]),
    "no head": (without("lm_head.weight"), ["lack 1 tensors", "lm_head.weight"]),
    "half a layer": (without(*map(UP_DOWN.format, ("up", "down"))), ["lack 2 tensors", UP_DOWN.format("down")]),
    "other sizes": (changed("config.json", intermediate_size=128), ["cannot be loaded"]),
    "a small embedding": (
        lambda f: make_model(tie_word_embeddings=False, vocab_size=250).save_pretrained(f),
        ["the tokenizer has", "the model 250"],
    ),
    "no context": (changed("config.json", max_position_embeddings=0), ["max_position_embeddings 0"]),
    "no layers": (changed("config.json", num_hidden_layers=0, layer_types=[]), ["num_hidden_layers 0"]),
    "an end that is a text": (changed("config.json", eos_token_id="</s>"), ["eos_token_id '</s>'"]),
    "an end of answers that is a text": (
        changed("generation_config.json", eos_token_id=[0, "</s>"]),
        ["generation_config.json has eos_token_id"],
    ),
    "a size that is a text": (changed("config.json", hidden_size="large"), ["config", "hidden_size"]),
    "no heads": (changed("config.json", num_attention_heads=0), ["cannot be"]),
    "an unknown activation": (changed("config.json", hidden_act="tanhh"), ["tanhh"]),
    "a template that is no text": (no_text_as_template, ["template"]),
    "quantised without a word of it": (with_tensors(as_codes), ["q_proj.weight is stored as I8"]),
    "a template that is broken": (
        written("chat_template.jinja", "{{ raise_exception('no chats here') }}"),
        ["chat template", "no chats here"],
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_model_that_is_not_whole_is_told_without_reading_its_weights(copied, damage, message):
    damage(copied)
    error = error_of(lambda: check(copied))
    assert error.startswith(f"--model {copied}: ") and all(part in error for part in message), error


def test_a_whole_model_passes_also_in_shards(copied):
    check(copied)
    make_model(tie_word_embeddings=False).save_pretrained(copied / "two", max_shard_size="50KB")
    (copied / "model.safetensors").unlink()
    for path in (copied / "two").iterdir():
        path.rename(copied / path.name)
    assert (copied / "model.safetensors.index.json").exists()
    check(copied)
    models.load_model(base_of(copied))


def test_weights_that_are_not_finite_are_told(copied):
    model = make_model(tie_word_embeddings=False)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(copied)
    for no_4bit in (True, False):  # in 4 bits the value would be another one, and finite
        base = base_of(copied, no_4bit=no_4bit)
        assert "up_proj.weight holds values" in error_of(lambda base=base: models.load_model(base))


def test_code_of_a_repository_needs_its_flag_and_nobody_is_asked(copied, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    (copied / "code.py").write_text("raise SystemExit('it ran')\n")
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    auto["AutoModelForSequenceClassification"] = "code.Model"
    change_json(copied / "config.json", model_type="of_its_own", auto_map=auto)
    base = base_of(copied)
    assert "--trust_remote_code" in error_of(lambda: models.load_model(base))
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


def test_a_folder_has_no_revision(folder):
    assert "--model_revision v2" in error_of(lambda: base_of(folder, model_revision="v2"))


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
    base = base_of(copied)
    turns = [{"role": "user", "content": "ask"}]
    as_chat = models.load_tokenizer(base)
    assert as_chat.eos_token == "<|im_end|>" and not logged.records
    change_json(copied / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=None)
    for name in ("config.json", "generation_config.json"):
        change_json(copied / name, eos_token_id=0)
    as_base = models.load_tokenizer(base)
    assert (as_base.eos_token, as_base.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<|im_end|>" in logged.text
    settings = generation.generation_config(as_base, Decoding(4))
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
            base = base_of(folder, dtype=choice, no_4bit=not four_bits)
            model = models.load_model(base)
            assert str(model.dtype) == f"torch.{dtype}"
            assert models.base_fingerprint(base, thinking=False)["dtype"] == dtype
            answers = sorted(generation.generate(model, tokenizer, chats, Decoding(4)))
            assert [answer.index for answer in answers] == [0, 1]


def test_the_fingerprint_follows_weights_template_and_type(copied):
    base = base_of(copied)
    prints = [models.base_fingerprint(each, thinking=False) for each in (base, base_of(copied, dtype="bf16"))]
    (copied / "chat_template.jinja").write_text(CHATML + " ", encoding="utf-8")
    prints.append(models.base_fingerprint(base_of(copied), thinking=False))
    without("lm_head.weight")(copied)
    prints.append(models.base_fingerprint(base_of(copied), thinking=False))
    assert len({json.dumps(value) for value in prints}) == 4


def test_a_former_model_is_freed_before_the_next_is_loaded(folder, monkeypatch):
    base = base_of(folder)
    previous = models.load_model(base)
    previous.held_by = {"the model": previous}  # a cycle, as trainers and patched methods make them
    alive = weakref.ref(previous)
    del previous
    gc.disable()
    try:
        seen = []
        monkeypatch.setattr(models, "from_pretrained", lambda *_, **__: seen.append(alive()) or make_model())
        models.load_model(base)
    finally:
        gc.enable()
    assert seen == [None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_products_of_half_types_are_summed_in_float32(half, device):
    """As the loss has them: float32 states, the head transposed, into a part of a buffer."""
    states, weight = (torch.rand(n, 4096, generator=torch.Generator().manual_seed(n)).to(device) for n in (5, 7))
    weight, buffer = weight.to(half), torch.empty(9, 7, device=device)
    product = anchored_loss.matmul_float32(states, weight.T, out=buffer[:5])
    assert product.dtype == torch.float32 and product.data_ptr() == buffer.data_ptr()
    exact = states.to(half).double() @ weight.double().T
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=0)  # rounded to bf16: 4e-3
