"""A merged model answers as base plus adapter does, or nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import toys
from conftest import DEMO
from run_records import export

from llm_alignment import runs


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """An output folder with a LoRA adapter of the demo's base, far enough from it to be told apart."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.slow
def test_the_folder_loads_with_plain_transformers_and_answers_as_base_plus_adapter(run_folder, dtype, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert export.main([str(run_folder), "--merged", str(tmp_path / "merged"), "--dtype", dtype]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert merged.generation_config.eos_token_id == [tokenizer.eos_token_id]
    if dtype == "bf16":
        return
    base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run_folder)
    questions = (DEMO / "mt_bench_en.jsonl").read_text("utf-8").splitlines()[:20]
    for line in questions:
        chat = [{"role": "user", "content": json.loads(line)["turns"][0]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new, old = (model.generate(**ids, max_new_tokens=12, do_sample=False) for model in (merged, adapted))
        assert new.tolist() == old.tolist()


def test_a_merge_that_answers_otherwise_leaves_nothing_behind(run_folder, tmp_path, monkeypatch, capsys):
    def damaged(model, tokenizer, folder):
        merged = model.merge_and_unload()
        merged.model.layers[0].self_attn.q_proj.weight.data.mul_(-1)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(export, "write_merged", damaged)
    assert export.main([str(run_folder), "--merged", str(tmp_path / "merged"), "--dtype", "fp32"]) == 2
    error = capsys.readouterr().err
    assert "error: the merged model is" in error and not list(tmp_path.iterdir())

    def stopped(model, tokenizer, folder):
        damaged(model, tokenizer, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_merged", stopped)
    assert export.main([str(run_folder), "--merged", str(tmp_path / "merged"), "--dtype", "fp32"]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_in_the_way_stays_and_one_export_at_a_time_writes_a_folder(run_folder, tmp_path, capsys):
    own = tmp_path / "new" / "merged.unfinished"
    own.mkdir(parents=True)
    (own / "mine.txt").touch()
    argv = [str(run_folder), "--merged", str(tmp_path / "new" / "merged")]
    assert export.main(argv) == 2
    assert "in the way" in capsys.readouterr().err and (own / "mine.txt").exists()
    argv = [str(run_folder), "--merged", str(tmp_path / "other")]
    with runs.held_alone(tmp_path / "other.lock", ""):
        assert export.main(argv) == 2
    assert "another export is writing it" in capsys.readouterr().err
    assert export.main([str(run_folder), "--merged", str(own / "mine.txt" / "m")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_sigterm_leaves_nothing_behind(run_folder, tmp_path, monkeypatch):
    def stopped(model, tokenizer, folder):
        folder.mkdir()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(export, "write_merged", stopped)
    assert export.main([str(run_folder), "--merged", str(tmp_path / "new" / "merged")]) == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sampling_settings_of_a_base_that_does_not_sample_are_no_obstacle(run_folder, tmp_path):
    shutil.copytree(DEMO / "model", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}', encoding="utf-8")
    argv = [str(run_folder), "--merged", str(tmp_path / "merged"), "--dtype", "fp32", "--max_new_tokens", "4"]
    assert export.main([*argv, "--model", str(tmp_path / "base")]) == 0
    assert "temperature" not in json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))


def other_base(folder: Path) -> str:
    """The demo's base with other weights."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.flip(tensor, [0]) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def test_what_cannot_be_exported_is_one_line_and_exit_code_2(run_folder, tmp_path, capsys):
    measured = tmp_path / "measured"
    shutil.copytree(run_folder, measured)
    header = {"fingerprint": {"model": "tiny", "weights": "0" * 64}}
    (measured / "mtbench_final.jsonl").write_text(json.dumps(header) + "\n", encoding="utf-8")
    (tmp_path / "there").mkdir()
    renamed = tmp_path / "renamed"
    shutil.copytree(run_folder, renamed)
    (renamed / "run.json").write_text(json.dumps({"args": {"model": "another/base"}}), encoding="utf-8")
    damaged = tmp_path / "damaged"
    shutil.copytree(renamed, damaged)
    (damaged / "run.json").write_text("{", encoding="utf-8")
    cut = shutil.copytree(run_folder, tmp_path / "cut")
    (cut / "metrics.json").write_text('{"final": ', encoding="utf-8")
    for argv, words in (
        ([str(tmp_path / "there"), "--merged", str(tmp_path / "m")], ["there", "adapter_config.json"]),
        ([str(damaged), "--merged", str(tmp_path / "m")], ["damaged", "name no base"]),
        ([str(cut), "--merged", str(tmp_path / "m")], ["cut", "metrics.json is damaged"]),
        ([str(run_folder), "--merged", str(tmp_path / "there")], ["--merged", "exists"]),
        ([str(run_folder), "--merged", str(tmp_path / "m"), "--model", "/nowhere"], ["--model", "/nowhere"]),
        (
            [str(measured), "--merged", str(tmp_path / "m"), "--model", other_base(tmp_path / "other")],
            ["not the base"],
        ),
        ([str(renamed), "--merged", str(tmp_path / "m")], ["adapter_config.json", "another/base", "run.json"]),
    ):
        assert export.main(argv) == 2, argv
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and all(word in error for word in words), error
    assert not (tmp_path / "m").exists()


def test_a_local_copy_of_a_base_from_the_hub_is_taken(run_folder, tmp_path):
    """The run knows a commit; a folder has a hash, which says nothing against it."""
    measured = shutil.copytree(run_folder, tmp_path / "measured")
    header = {"fingerprint": {"model": "tiny", "weights": "0" * 40}}
    (measured / "mtbench_final.jsonl").write_text(json.dumps(header) + "\n", encoding="utf-8")
    argv = [str(measured), "--merged", str(tmp_path / "m"), "--model", str(DEMO / "model")]
    export.checked_base(export.build_parser().parse_args(argv))


def in_ollama(modelfile: str, turns: list[dict]) -> str:
    """What Ollama makes of a Modelfile's template: as far as these templates go, Go's template language by hand."""
    template = modelfile.partition('"""')[2].partition('"""')[0]
    before, loop = template.split("{{ range .Messages }}")
    default = before.removeprefix("{{ if not .System }}").removesuffix("{{ end }}")
    loop, beginning = loop.rsplit("{{ end }}", 1)
    parts = dict(re.findall(r'{{ if eq .Role "(\w+)" }}(.*?){{ end }}', loop, re.DOTALL))
    text = "".join(parts[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in turns)
    return ("" if turns[0]["role"] == "system" else default) + text + beginning


@pytest.mark.parametrize("template", [toys.CHATML, toys.QWEN25, None], ids=["chatml", "qwen2.5", "qwen3"])
def test_ollama_reads_conversations_as_the_chat_template_writes_them(template, demo_tokenizer):
    tokenizer = toys.make_tokenizer(template) if template else demo_tokenizer
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    turns = [{"role": role, "content": f"text {n}"} for n, role in enumerate(roles)]
    text = export.modelfile(tokenizer, thinking=False)
    for chat in (turns, turns[1:], turns[1:2]):
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert in_ollama(text, chat) == wanted
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in text


def test_a_template_that_ollama_cannot_have_gives_no_modelfile():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + toys.CHATML
    assert export.modelfile(toys.make_tokenizer(refusing), thinking=False) == ""


@pytest.mark.parametrize("thinking", [False, True])
def test_the_merged_template_serves_the_mode_that_was_trained(thinking, demo_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    run, merged = tmp_path / "run", tmp_path / "merged"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"args": {"thinking": thinking}}), encoding="utf-8")
    demo_tokenizer.save_pretrained(merged)
    export.describe(run, AutoTokenizer.from_pretrained(merged), merged, 1.0)
    chat, served = [{"role": "user", "content": "x"}], AutoTokenizer.from_pretrained(merged)

    def text(tokenizer, **options):
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)

    assert text(served) == text(demo_tokenizer, enable_thinking=thinking)
    for asked in (False, True):
        assert text(served, enable_thinking=asked) == text(demo_tokenizer, enable_thinking=asked)
