"""Progressive DPO: growing the adapter, building on the stage before, gates, going on after a crash."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from conftest import ROOT, logged_commands, read_rows, run_error
from run_records import chat, records
from toys import toy_run

import dpo_train_mt
import dpo_train_mt_v2
from dpo_train_mt_v2 import build_parser, main, stage_of
from llm_alignment import adapters, dpo, files, finance, flags, hub, models, preferences, training
from llm_alignment.card import write_card
from llm_alignment.endings import MissedGateError
from llm_alignment.prompts import PromptStyle

SMALL = [
    "--demo", "--no_4bit", "--eval_limit", "8", "--mtbench_limit", "3", "--instruct_limit", "4", "--reddit_limit", "4",
    "--eval_max_new_tokens", "6", "--instruct_max_tokens", "12", "--reddit_max_tokens", "8",
    "--mtbench_max_tokens", "8", "--limit_pairs", "16", "--finance_instruct_pairs", "16", "--batch", "2",
    "--grad_acc", "2", "--save_steps", "2", "--retention_limit", "4", "--retention_max_tokens", "4",
]  # fmt: skip


def arguments(folder: Path, *argv: str) -> list[str]:
    return [*SMALL, "--output_dir", str(folder), "--exp_log", str(folder.parent / "log.jsonl"), *argv]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """An uninterrupted run of all stages: (its folder, its record, the bases alive after each stage's load, how often
    the base was looked up)."""
    folder, bases, alive, looked_up = tmp_path_factory.mktemp("whole") / "run", [], [], []
    load, fetch = models.load_model, models.fetch_model

    def counting_load(base, **options):
        model = load(base, **options)
        bases.append(weakref.ref(model))
        alive.append(sum(base() is not None for base in bases))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", counting_load)
        patch.setattr(models, "fetch_model", lambda *of: [looked_up.append(of), fetch(*of)][1])
        record = main(arguments(folder))
    return folder, record, alive, len(looked_up)


def stopped_after(whole, stage: int, folder: Path) -> Path:
    """A run that has done the stages up to `stage`."""
    shutil.copytree(whole[0], folder)
    for later in range(stage + 1, 4):
        shutil.rmtree(folder / f"stage{later}")
    return folder


def set_gate(folder: Path, gate: str) -> None:
    """Makes a finished stage one that missed its gate, or with "" one that passed."""
    stage = json.loads((folder / "stage.json").read_text("utf-8"))
    files.write_json(folder / "stage.json", {**stage, "gate": gate})
    training.write_manifest(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def test_logged_command_parses_with_the_published_defaults():
    commands = logged_commands("dpo_train_mt_v2.py")
    assert len(commands) == 4
    args = {name: build_parser().parse_args(argv) for name, argv in commands.items()}["progressive-quickstart"]
    assert args.output_dir == "qwen3_3stage_progressive_experiment"
    stages = [stage_of(args, number).args for number in (1, 2, 3)]
    assert [(stage["lora_r"], stage["lora_alpha"]) for stage in stages] == [(8, 16), (12, 24), (16, 32)]
    assert [stage["beta"] for stage in stages] == [0.01, 0.018, 0.025]
    assert [stage["learning_rate"] for stage in stages] == [2e-6, 3.5e-6, 4e-6]
    assert [stage["epochs"] for stage in stages] == [0.25, 0.75, 1.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", "2", "--resume_from_stage", "2"], "give one"),
        (["--stage2_lora_r", "4"], "can only grow"),
        (["--no-do_mtbench", "--no-force_continue"], "--no-do_mtbench: the gates are judged by it"),
        (["--resume_from_stage", "2"], "stage 1 cannot be built on, it was not finished"),
        (["--stage", "3"], "stage 1 cannot be built on, it was not finished"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
    assert message in run_error(capsys, main, *arguments(tmp_path / "run", *flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    ["--lora_r 8", "--lora_alpha 8", "--epochs 1", "--beta 0.1", "--learning_rate 1e-5", "--no_train",
     "--load_adapter x", "--adapter_trainable", "--eval_pairs 5", "--general_pairs 5", "--resume_from_checkpoint x",
     "--tatqa_split train"],
)  # fmt: skip
def test_flags_that_it_does_not_take_are_not_in_its_parser(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(flags.split())
    assert stop.value.code == 2
    name = flags.split()[0]
    assert f"unrecognized arguments: {name}" in (error := capsys.readouterr().err) or "invalid choice: 'x'" in error
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert name not in known or name == "--resume_from_checkpoint"


def test_the_demo_fills_only_flags_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = flags.parse_arguments(build_parser(), ["--demo"], dpo_train_mt_v2.DEMO)
    assert vars(demo).keys() == vars(build_parser().parse_args([])).keys()
    demo, plain = dpo_train_mt.parse(["--demo"]), dpo_train_mt.parse([])
    assert vars(demo).keys() == vars(plain).keys()


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def test_a_grown_adapter_computes_what_the_smaller_one_did(tmp_path):
    """In float64, where sums in another order do not blur the comparison."""
    import torch

    setup, *_ = toy_run(tmp_path, lora_r=8, lora_alpha=16)
    model = adapters.new_adapter(models.load_model(setup.base), setup.lora)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    ids = torch.arange(40).reshape(2, 20)
    before = model.double().eval()(ids).logits
    with model.disable_adapter():
        assert (before - model(ids).logits).abs().max() > 0.1
    for rank, alpha in [(12, 24), (16, 8), (8, 16)]:
        lora = dataclasses.replace(setup.lora, lora_r=rank, lora_alpha=alpha)
        grown = adapters.grown_adapter(models.load_model(setup.base), tmp_path, lora, seed=42)
        assert grown.peft_config["default"].r == rank
        assert (grown.double().eval()(ids).logits - before).abs().max() < 1e-12 * before.abs().max()
        fresh = [p[8:] for name, p in grown.named_parameters() if "lora_A" in name and rank > 8]
        assert all((row != 0).any() for row in fresh)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_begins_as_the_policy_that_the_last_one_ended_with(whole, stage):
    """The answers' log-probabilities are the same in float32, and the reference is that policy: the loss is ln 2."""
    import torch

    folder, *_ = whole
    args = stage_of(dpo_train_mt_v2_args(folder), stage).args
    setup, settings, dpo_settings = toy_run(**{"folder": folder, **args})
    lines = (flags.DEMO_DIR / "orca_pairs.jsonl").read_text("utf-8").split("\n")[:4]
    pairs = [preferences.general_pair(json.loads(line)) for line in lines]
    rows = dpo.fit_pairs(pairs, setup.tokenizer, PromptStyle(), dpo_settings.max_length)
    previous = folder / f"stage{stage - 1}"

    def first_step(model) -> tuple[float, torch.Tensor]:
        trainer = dpo.build_trainer(model, setup, rows, settings, dpo_settings)
        batch = next(iter(trainer.get_train_dataloader()))
        inputs = {name: tensor for name, tensor in batch.items() if torch.is_tensor(tensor)}
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with torch.no_grad():
            output = trainer.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
                fused_lm_head=True,
            )  # fmt: skip
        return loss, output.log_probs

    base = setup.base
    _, ended = first_step(adapters.load_adapter(models.load_model(base), str(previous), trainable=True))
    loss, begins = first_step(adapters.grown_adapter(models.load_model(base), previous, setup.lora, settings.seed))
    assert (begins - ended).abs().mean() < 1e-6
    # a product with 12 columns adds up in another order than one with 8: last places of logits of 20 and more
    assert torch.allclose(begins, ended, rtol=1e-6, atol=1e-5)
    assert abs(loss - math.log(2)) < 1e-4
    _, of_base = first_step(models.load_model(base))
    assert (begins - of_base).abs().max() > 1e-4  # the stages before did change the policy


def dpo_train_mt_v2_args(folder: Path):
    return flags.parse_arguments(build_parser(), arguments(folder), dpo_train_mt_v2.DEMO)


@pytest.mark.slow
def test_the_record_holds_every_domain_at_every_stage(whole, capsys):
    folder, record, *_ = whole
    assert record["status"] == "completed" and [entry["stage"] for entry in record["stages"]] == [1, 2, 3]
    names = {"tatqa", "mtbench", "finance_instruct", "reddit", "drift", "retention", "own_drift"}
    for entry in record["stages"]:
        assert set(entry["baseline"]) == set(entry["final"]) == names | {"health"} and names <= set(entry["delta"])
    for before, after in zip(record["stages"][:-1], record["stages"][1:], strict=True):
        assert after["baseline"] == before["final"]
    assert record["baseline"] == record["stages"][0]["baseline"]
    assert record["final"] == record["stages"][-1]["final"]
    lines = read_rows(folder.parent / "log.jsonl")
    assert [line["stages"] for line in lines] == [json.loads(json.dumps(record["stages"]))]
    assert records.record_problem(lines[0]) is None


@pytest.mark.slow
def test_a_stage_is_a_run_for_the_tools(whole, tmp_path):
    """chat.py, report.py --compare and export.py read its run.json, and export.py writes a card of it."""
    folder, *_ = whole
    assert records.run_of_folder(folder / "stage1")["script"] == "dpo_train_mt_v2.py"
    assert chat.finished_run(folder / "stage2").args.lora_r == 12
    write_card(folder / "stage2", tmp_path)
    assert "pairs" in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_a_stage_frees_its_model_before_the_next_one_loads_and_the_base_is_looked_up_once(whole):
    assert whole[2:] == ([1, 1, 1], 1)


@pytest.mark.slow
def test_the_final_adapter_is_a_plain_one_of_rank_16(whole):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, *_ = whole
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["r"] == 16
    bases = [AutoModelForCausalLM.from_pretrained(flags.DEMO_DIR / "model") for _ in range(2)]
    last, of_stage = map(PeftModel.from_pretrained, bases, (folder, folder / "stage3"))
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(last.eval()(ids).logits, of_stage.eval()(ids).logits)
    assert list(last.peft_config) == ["default"] and not (folder / "ref").exists()


DIE_IN_STAGE_2 = """
import os, sys
sys.path.insert(0, {root!r})
import dpo_train_mt_v2
from llm_alignment import training
write_manifest = training.write_manifest
def write_and_die(folder, *more):
    write_manifest(folder, *more)
    if folder.parent.name == "stage2":
        os._exit(9)
training.write_manifest = write_and_die
dpo_train_mt_v2.main({argv!r})
"""


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory):
    """The folder of a run that was killed in its second stage, after a checkpoint."""
    folder = stopped_after(whole, 1, tmp_path_factory.mktemp("killed") / "run")
    argv = arguments(folder, "--resume_from_stage", "2")
    dead = subprocess.run([sys.executable, "-c", DIE_IN_STAGE_2.format(root=str(ROOT), argv=argv)], check=False)
    assert dead.returncode == 9
    assert (folder / "stage2" / "checkpoint-2").exists() and not (folder / "stage2" / "complete.json").exists()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, is_resumed",
    [
        (["--resume_from_stage", "2"], False),
        (["--resume_from_checkpoint", "auto"], True),
        (["--resume_from_stage", "2", "--resume_from_checkpoint", "auto"], True),
    ],
)
def test_killed_in_stage_2_it_ends_with_the_same_adapter(way, is_resumed, whole, killed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    record = main(arguments(folder, *way))
    assert ("resuming from" in capsys.readouterr().out) is is_resumed
    assert [entry["stage"] for entry in record["stages"]] == [1, 2, 3]
    for name in ("adapter_model.safetensors", "stage2/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes()
    assert record["final"] == whole[1]["final"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_baseline_that_was_damaged_after_the_first_stage_is_measured_again(damage, whole, killed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    path = folder / "reddit_baseline.jsonl"
    text = path.read_bytes()
    path.unlink() if damage == "lost" else path.write_bytes(text[:-20])
    record = main(arguments(folder, "--resume_from_checkpoint", "auto"))
    assert sorted(path.read_bytes().splitlines()) == sorted(text.splitlines())
    assert record["baseline"] == whole[1]["baseline"] and record["delta"] == whole[1]["delta"]


@pytest.mark.slow
def test_other_pairs_or_another_base_are_another_stage(killed, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    write = finance.finance_pairs
    with monkeypatch.context() as patch:
        patch.setattr(finance, "finance_pairs", lambda *of: [{**pair, "chosen": "!"} for pair in write(*of)])
        with pytest.raises(SystemExit) as stop:
            main(arguments(folder, "--resume_from_checkpoint", "auto"))
    assert stop.value.code == 2 and "data sha256: " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(models, "files_sha256", lambda _: "other weights")
    error = run_error(capsys, main, *arguments(folder, "--resume_from_stage", "2"))
    assert "weights, tokenizer or config of --model: " in error and "-> other weights" in error


@pytest.mark.slow
def test_a_missed_gate_ends_the_run_unless_forced(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dpo_train_mt_v2.GATES, 2, {"mtbench": 9.5})
    folder = stopped_after(whole, 1, tmp_path / "run")
    set_gate(folder / "stage1", "")
    with pytest.raises(SystemExit) as stop:
        main(arguments(folder, "--resume_from_stage", "2", "--no-force_continue"))
    assert stop.value.code == 1
    error = capsys.readouterr().err
    gain = json.loads((folder / "stage2" / "stage.json").read_text("utf-8"))["delta"]["mtbench"]["mean"]
    assert f"{9.5 - gain:.3f} short" in error and not (folder / "stage3").exists()
    [record] = read_rows(tmp_path / "log.jsonl")
    assert record["status"] == "failed" and "missed its gate" in record["reason"]


@pytest.mark.slow
def test_a_stage_that_cannot_be_built_on(whole, tmp_path, capsys):
    folder = stopped_after(whole, 1, tmp_path / "run")
    adapter = folder / "stage1" / "adapter_model.safetensors"
    kept = adapter.read_bytes()
    adapter.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    error = run_error(capsys, main, *arguments(folder, "--resume_from_stage", "2"))
    assert (
        "adapter_model.safetensors is damaged" in error and "--resume_from_stage 1 runs it again from scratch" in error
    )
    adapter.write_bytes(kept)
    error = run_error(capsys, main, *arguments(folder, "--resume_from_stage", "2", "--seed", "7"))
    assert "seed: 42 -> 7" in error
    error = run_error(capsys, main, *arguments(folder, "--resume_from_stage", "3"))
    assert "stage 2 cannot be built on, it was not finished" in error
    error = run_error(capsys, main, *arguments(folder))
    assert "holds another run" in error
    set_gate(folder / "stage1", "MT-Bench -1")
    error = run_error(capsys, main, *arguments(folder, "--resume_from_stage", "2", "--no-force_continue"))
    assert "stage 1 missed its gate (MT-Bench -1)" in error


@pytest.mark.slow
def test_a_stage_that_was_trained_from_another_one(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    run_file = folder / "stage2" / "run.json"
    info = json.loads(run_file.read_text("utf-8"))
    adapter = hub.adapter_files_sha256(folder / "stage1")
    assert info["data"]["previous_adapter"] == adapter
    files.write_json(run_file, {**info, "data": {**info["data"], "previous_adapter": "another"}})
    training.write_manifest(folder / "stage2")
    error = run_error(capsys, main, *arguments(folder, "--resume_from_stage", "3"))
    assert "stage 2 was trained from another stage 1" in error and "--resume_from_stage 1" in error
    shutil.rmtree(folder / "stage2")  # somebody wants stage 2 again, and stage 3 was trained from the old one
    error = run_error(capsys, main, *arguments(folder, "--resume_from_checkpoint", "auto"))
    assert "stage 3 was trained from another stage 2" in error and "--resume_from_stage 2" in error


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    record = main(arguments(folder, "--resume_from_checkpoint", "auto"))
    assert record["final"] == whole[1]["final"] and [entry["stage"] for entry in record["stages"]] == [1, 2, 3]
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missed_gate_says_what_to_do(stage):
    with pytest.raises(MissedGateError) as stop:
        dpo_train_mt_v2.check_gate({"stage": stage, "gate": "MT-Bench -1"}, force_continue=False)
    assert "MT-Bench -1" in str(stop.value)
    assert ("--resume_from_stage 3 --force_continue" in str(stop.value)) is (stage == 2)
    dpo_train_mt_v2.check_gate({"stage": stage, "gate": "MT-Bench -1"}, force_continue=True)
    dpo_train_mt_v2.check_gate({"stage": stage, "gate": ""}, force_continue=False)


def test_a_dry_run_prints_every_stage(tmp_path, capsys):
    main(arguments(tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert all(f"stage {stage}: " in out for stage in (1, 2, 3)) and out.count("steps: 4 of 4 pairs") == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_stage_takes_no_more_gpu_memory_than_the_one_before(tmp_path, cache, monkeypatch, figure):
    import torch

    memory, load = [], models.load_model

    def measured_load(base, **options):
        before = torch.cuda.memory_allocated()
        model = load(base, **options)
        memory.append((before, torch.cuda.memory_allocated()))
        return model

    monkeypatch.setattr(models, "load_model", measured_load)
    main(arguments(tmp_path / "run", "--force_continue"))
    (before, first), (_, second), (_, third) = memory
    figure("third stage above the second", (third - second) / 2**20, "MiB")
    assert third - second < (first - before) / 2, "in the second one the libraries' own memory is there already"
