"""What decides an answer decides the fingerprint; an adapter that is off is the base; nothing else a model ships."""

import json
import shutil

import pytest
import torch
from conftest import DEMO
from peft import LoraConfig, get_peft_model
from toys import CHATML, make_tokenizer, toy_base
from transformers import GenerationConfig

from llm_alignment import adapters, encoder, generation, models, prompts, training
from llm_alignment.files import InputError
from llm_alignment.hub import adapter_files_sha256

pytestmark = pytest.mark.usefixtures("own_folders")


def base_of(folder) -> models.Base:
    return toy_base(model=str(folder), dtype="fp32")


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save_adapter(model, folder, **settings):
    """An adapter with random values; the model is left with it."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.8, 1])
def test_every_byte_of_a_model_decides_its_identity(folder, share):
    """One byte at this share of each file, its size and its time of change as they were."""
    (folder / "additional_chat_templates").mkdir()
    for name in ("vocab.txt", "tokenizer.model", "modeling_own.py", "additional_chat_templates/tool.jinja"):
        (folder / name).write_text("one of the other kinds", encoding="utf-8")
    known = {models.base_fingerprint(base_of(folder), thinking=False)["weights"]}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(paths) >= 8
    for path in paths:
        content = bytearray(path.read_bytes())
        content[round(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)
        known.add(models.Base("x", folder, None, torch.device("cpu"), torch.float32, "none").identity)
    assert len(known) == 1 + len(paths)
    assert models.Base("x", folder, "abc", torch.device("cpu"), torch.float32, "none").identity == "abc"


def test_a_setting_of_an_adapter_decides_its_hash(tmp_path, folder):
    saved = tmp_path / "adapter"
    save_adapter(models.load_model(base_of(folder)), saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    hashes = []
    for change in ({}, {"lora_alpha": 80}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}):
        (saved / "adapter_config.json").write_text(json.dumps(config | change))
        loaded = adapters.load_adapter(models.load_model(base_of(folder)), str(saved))
        hashes += [adapter_files_sha256(saved), adapters.adapter_sha256(loaded)]
    assert len(set(hashes)) == 8
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    assert adapters.adapter_sha256(adapters.load_adapter(models.load_model(base_of(folder)), str(saved))) == hashes[1]


@pytest.mark.parametrize(
    "settings, changes",
    [*(({name: value}, {}) for name, value in [
        ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]), ("modules_to_save", ["norm"]),
        ("trainable_token_indices", [5, 6]), ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["q_proj", "embed_tokens"]), ("layer_replication", [(0, 2), (0, 2)]),
    ]), *(({}, {name: value}) for name, value in [
        ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("init_lora_weights", "pissa_niter_4"),
        ("alora_invocation_tokens", [3]), ("peft_type", "IA3"),
    ])],
)  # fmt: skip
def test_an_adapter_that_changes_the_base_is_refused(tmp_path, folder, settings, changes):
    saved = tmp_path / "adapter"
    save_adapter(models.load_model(base_of(folder)), saved, **settings)
    config = saved / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    for on_meta in (True, False):
        with pytest.raises(InputError, match="more than LoRA|has peft_type|embedding or the head"):
            adapters.load_adapter(models.load_model(base_of(folder), on_meta=on_meta), str(saved))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_bias": True},
     {"target_modules": "all-linear"}, {"rank_pattern": {"q_proj": 2}}],
)  # fmt: skip
def test_an_adapter_that_is_off_is_the_base_to_the_bit(tmp_path, folder, settings):
    base = base_of(folder)
    saved = save_adapter(models.load_model(base), tmp_path / "adapter", **settings)
    before = models.check_logits(models.load_model(base), "")
    model = adapters.load_adapter(models.load_model(base), saved)
    with adapters.adapter_off(model):
        assert torch.equal(models.check_logits(model, ""), before)
    assert not torch.equal(models.check_logits(model, ""), before)


@pytest.mark.parametrize("place, name", [(adapters, "get_peft_model"), (adapters.PeftModel, "from_pretrained")])
def test_a_base_that_an_adapter_changes_is_told_by_its_logits(tmp_path, folder, monkeypatch, place, name):
    """Whatever the reason and however little: here loading itself moves a weight of the base by a millionth."""
    saved = save_adapter(models.load_model(base_of(folder)), tmp_path / "adapter")
    model, attach = models.load_model(base_of(folder)), getattr(place, name)

    def moved(model, *rest, **options):
        model.get_submodule("model.norm").weight.data *= 1 + 1e-6
        return attach(model, *rest, **options)

    monkeypatch.setattr(place, name, moved)
    with pytest.raises(InputError, match="off"):
        if place is adapters:
            adapters.new_adapter(model, adapters.LoraSettings(4, 8, 0.0, "q_proj"))
        else:
            adapters.load_adapter(model, saved)


SHIPPED = dict(
    suppress_tokens=[2], begin_suppress_tokens=[5], min_new_tokens=9, min_length=60, max_time=1e-9, stop_strings=["a"],
    cache_implementation="static", prompt_lookup_num_tokens=3, guidance_scale=3.0, sequence_bias=[[[5], -10.0]],
    encoder_repetition_penalty=2.0, forced_eos_token_id=7, forced_bos_token_id=7, bad_words_ids=[[5], [6]],
    exponential_decay_length_penalty=[2, 9.0], num_beams=3, num_return_sequences=2, do_sample=True, temperature=5.0,
    top_k=3, top_p=0.3, min_p=0.5, typical_p=0.3, epsilon_cutoff=0.1, eta_cutoff=0.1, repetition_penalty=4.0,
    no_repeat_ngram_size=1, max_new_tokens=2, max_length=3, eos_token_id=[7, 8, 9], pad_token_id=9, use_cache=False,
    return_dict_in_generate=False, renormalize_logits=True, token_healing=True, dola_layers="low", penalty_alpha=0.6,
    watermarking_config={"bias": 5.0}, top_h=0.3, prefill_chunk_size=2, of_tomorrow=[1],
)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_no_setting_that_a_model_ships_with(temperature):
    base = base_of(DEMO / "model")
    tokenizer, model = models.load_tokenizer(base), models.load_model(base)
    asked = [[{"role": "user", "content": text}] for text in ("Add 2 and 3.", "Привет")]
    decoding = generation.Decoding(8, temperature=temperature)
    own, answers = model.generation_config, []
    for name, value in {"nothing": None, **SHIPPED}.items():
        model.generation_config = GenerationConfig.from_dict(own.to_dict())
        setattr(model.generation_config, name, value)
        answers.append((name, sorted(generation.generate(model, tokenizer, asked, decoding))))
        assert getattr(model.generation_config, name) == value
    assert [name for name, answer in answers if answer != answers[0][1]] == []


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", None])
@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
@pytest.mark.parametrize("added", ["", "<s> $A", "$A <|im_end|>", "<s> $A <|im_end|>"])
def test_one_way_from_text_to_tokens(added, template, pad):
    """Tokenizers that begin or end each text with a token, templates with and without a beginning of their own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(template, pad, "<s>")
    if added:
        special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|im_end|>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=added, special_tokens=special)
    turns = [{"role": "user", "content": "the Volga"}]
    written = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).removeprefix("<s>")
    begins = added.startswith("<s>") or template != CHATML
    wanted = [tokenizer.bos_token_id] * begins + tokenizer(written, add_special_tokens=False)["input_ids"]
    row = {"messages": [*turns, {"role": "assistant", "content": "the Neva"}]}
    for only in (False, True):
        trained = encoder.ChatEncoder(tokenizer, thinking=False, assistant_only=only)(row)
        assert trained["input_ids"][: len(wanted)] == wanted and len(trained["labels"]) == len(trained["input_ids"])
        assert (trained["labels"][: len(wanted)] == [-100] * len(wanted)) == only
    style = prompts.PromptStyle()
    text, fitted, _ = prompts.fit_prompt("the Volga", tokenizer, style)
    end = tokenizer.eos_token_id
    assert fitted == prompts.fit_prompt(turns, tokenizer, style)[1] == wanted
    for answer in ("the Neva", "the Neva<|im_end|>"):
        pair = prompts.pair_tokens({"prompt": text, "chosen": answer, "rejected": "Lake"}, tokenizer)
        assert pair["prompt_ids"] == wanted and pair["chosen_ids"].count(end) == 1 == pair["rejected_ids"].count(end)
        assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == end
    plain = prompts.fit_prompt("the Volga", tokenizer, prompts.PromptStyle(use_chat_template=False))[1]
    assert (plain[0] == tokenizer.bos_token_id) == added.startswith("<s>") and plain[-1] != end


class Pickled:
    pass


def test_a_checkpoint_that_cannot_be_loaded_safely_is_named_and_skipped(tmp_path, folder, logged):
    model = models.load_model(base_of(folder))
    whole = tmp_path / "checkpoint-1"
    save_adapter(model, whole)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sum(parameter.sum() for parameter in parameters).backward()

    def state(kind, parameters, **options):
        optimizer = kind(parameters, lr=0.0, **options)
        optimizer.step()
        return optimizer.state_dict()

    right = state(torch.optim.AdamW, parameters)
    torch.save(right, whole / "optimizer.pt")
    torch.save({"step": 1}, whole / "scheduler.pt")
    damages = {
        "optimizer.pt": [
            state(torch.optim.SGD, parameters, momentum=0.9), state(torch.optim.SGD, parameters),
            state(torch.optim.AdamW, parameters[1:]), [1], {"state": Pickled(), "param_groups": []},
        ],
        "scheduler.pt": [Pickled()],
        "rng_state.pth": [{"python": Pickled()}],
    }  # fmt: skip
    training.write_manifest(whole)
    for number, (name, content) in enumerate((name, each) for name, all_ in damages.items() for each in all_):
        folder = tmp_path / f"checkpoint-{number + 2}"
        shutil.copytree(whole, folder)
        torch.save(content, folder / name)
        training.write_manifest(folder)
        assert training.newest_complete(tmp_path, "auto") == whole
        assert f"{folder.name}: {name}" in logged.text
        with pytest.raises(InputError, match=name):
            training.newest_complete(tmp_path, str(folder))
