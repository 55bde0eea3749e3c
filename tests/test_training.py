"""Checkpoints, resume, signals: runs of sft_train.py on the demo's files that end early and go on."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import unittest.mock

import pytest
import safetensors.torch
import torch
import transformers
from conftest import DEMO, ROOT, run_error, torchrun
from toys import peak_bytes, toy_run

import dpo_train
import sft_train
from llm_alignment import files, models, sft, training

EARLY_STOP = [
    "--early_stop_patience", "1", "--eval_steps", "2", "--mtbench_questions_limit", "2", "--mtbench_max_tokens", "4",
    "--mtbench_ru", str(DEMO / "mt_bench_ru.jsonl"), "--reward_model", str(DEMO / "reward_model"),
]  # fmt: skip


@pytest.fixture(scope="module")
def flags(dataset):
    """flags(folder, *more): a run of 8 steps, 1.5 epochs of 5 steps, the last of an epoch of one micro-batch."""

    def of_run(folder, *more):
        return [
            "--demo", "--output_dir", str(folder), "--exp_log", str(folder.parent / "log.jsonl"),
            "--dataset", str(dataset), "--sample_ratio", "1", "--val_split", "0.1", "--epochs", "1.5", "--batch", "2",
            "--grad_acc", "2", "--max_seq_length", "48", "--learning_rate", "1e-3", "--kl_coef", "0.2",
            "--kl_start_step", "2", "--kl_warmup_steps", "4", "--lora_dropout", "0.1", "--kl_log_interval", "2",
            "--save_steps", "2", "--mtbench_ru", "none", "--no_4bit", "--skip_baseline_eval",
            "--target_modules", "q_proj,v_proj", *more,
        ]  # fmt: skip

    return of_run


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert sft_train.main(flags(folder))["kept_step"] == 8
    return folder


def adapter(folder):
    return files.file_sha256(folder / "adapter_model.safetensors")


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.log"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def start(argv):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    return subprocess.Popen([sys.executable, str(ROOT / "sft_train.py"), *argv], **pipes)


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def signal_in(monkeypatch, micro_batch, signum):
    """The process gets `signum` while it computes its micro-batch number `micro_batch`, from 1."""
    training_step, count = transformers.Trainer.training_step, 0

    def step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == micro_batch:
            os.kill(os.getpid(), signum)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", step)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.slow
@pytest.mark.parametrize(
    "micro_batch, saved", [(1, 0), (3, 1), (4, 1), (10, 5), (11, 5)], ids=["first", "middle", "last", "epoch", "2nd"]
)
def test_a_signal_ends_the_micro_batch_and_the_resumed_run_is_the_same(
    micro_batch, saved, flags, whole, tmp_path, monkeypatch, capsys
):
    """A step takes 2 micro-batches, the fifth one, so number 10 is the first of the second epoch."""
    folder = tmp_path / "run"
    signal_in(monkeypatch, micro_batch, signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        sft_train.main(flags(folder))
    assert stop.value.code == 143
    assert "SIGTERM: finishing this micro-batch" in capsys.readouterr().out
    (record,) = files.read_records(tmp_path / "log.jsonl")
    assert record["status"] == "interrupted" and record["reason"] == "SIGTERM"
    assert training.checkpoint_problem(folder / f"checkpoint-{saved}") is None
    assert not (folder / f"checkpoint-{saved + 1}").exists()
    monkeypatch.undo()
    sft_train.main(flags(folder, "--resume_from_checkpoint", "auto"))
    assert f"checkpoint-{saved}" in capsys.readouterr().out and adapter(folder) == adapter(whole)
    assert (folder / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


def test_a_checkpoint_that_exists_is_not_saved_again(flags, tmp_path, monkeypatch, hangup):
    saved, save = [], transformers.Trainer._save_checkpoint

    def noted(self, *rest):
        saved.append(self.state.global_step)
        save(self, *rest)

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", noted)
    signal_in(monkeypatch, 5, signal.SIGHUP)  # the first micro-batch of step 3, after the checkpoint of step 2
    with pytest.raises(SystemExit) as stop:
        sft_train.main(flags(tmp_path / "run"))
    assert stop.value.code == 129 and saved == [2]


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_is_recorded(flags, whole, tmp_path):
    folder = tmp_path / "run"
    process = start(flags(folder))
    wait_for(folder / "checkpoint-2" / "complete.json", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    (record,) = files.read_records(tmp_path / "log.jsonl")
    assert record["status"] == "interrupted" and record["reason"] == "Ctrl-C"
    assert not (folder / "adapter_model.safetensors").exists()
    sft_train.main(flags(folder, "--resume_from_checkpoint", "auto"))
    assert adapter(folder) == adapter(whole)


@pytest.mark.parametrize(("pause", "checkpoints"), [(0, ["checkpoint-1"]), (1.1, [])], ids=["at once", "later"])
def test_a_second_signal_stops_at_once_unless_it_is_the_first_one_passed_on(
    pause, checkpoints, flags, tmp_path, monkeypatch
):
    training_step = transformers.Trainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", step)
    with pytest.raises(SystemExit) as stop:
        sft_train.main(flags(tmp_path / "run"))
    assert stop.value.code == 143
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == checkpoints


# ---------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.slow
def test_killed_while_it_saves_a_checkpoint_and_resumed(flags, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    process = start(flags(folder))
    wait_for(folder / "checkpoint-4", process)  # the folder is there, its files are being written
    process.kill()
    process.wait()
    assert not (folder / "adapter_model.safetensors").exists()
    record = sft_train.main(flags(folder, "--resume_from_checkpoint", "auto"))
    assert record["status"] == "completed" and adapter(folder) == adapter(whole)
    assert "resuming from" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [[], ["--streaming", "--epochs", "1"], [*EARLY_STOP, "--early_stop_patience", "9"]],
    ids=["plain", "stream", "early"],
)
@pytest.mark.slow
def test_a_finished_run_that_is_resumed_changes_nothing(more, flags, whole, tmp_path, capsys):
    """With a fractional number of epochs and with a stream, the Trainer alone would take one more step each time."""
    folder = tmp_path / "run" if more else whole
    if more:
        sft_train.main(flags(folder, *more))
    before = contents(folder)
    for _ in range(2):
        sft_train.main(flags(folder, *more, "--resume_from_checkpoint", "auto"))
    assert "no further step is taken" in capsys.readouterr().out
    after = contents(folder)
    assert [name for name in before | after if before.get(name) != after.get(name)] == []


@pytest.mark.slow
def test_a_resumed_run_saves_and_logs_as_its_own_flags_say(flags, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-8")
    more = ["--save_steps", "1", "--kl_log_interval", "1", "--resume_from_checkpoint", "auto"]
    sft_train.main(flags(folder, *more))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-7", "checkpoint-8"}
    assert 7 in {entry["step"] for entry in files.read_records(folder / "train_log.jsonl")}
    assert adapter(folder) == adapter(whole)


def test_damaged_checkpoints_are_named_and_skipped(flags, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in folder.glob("adapter*"):
        path.unlink()
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-8 - Copy")  # what Windows names a copy
    for damaged in (folder / "checkpoint-8" / "optimizer.pt", folder / "checkpoint-6" / "complete.json"):
        damaged.write_bytes(damaged.read_bytes()[:-100])
    sft_train.main(flags(folder, "--resume_from_checkpoint", "auto"))
    printed = capsys.readouterr().out
    assert "checkpoint-8: optimizer.pt is damaged" in printed and "checkpoint-6: complete.json is damaged" in printed
    assert "starting from the first step" in printed and adapter(folder) == adapter(whole)


@pytest.mark.parametrize("manifest", ["[]", "null", "{}", "[" * 100_000])
def test_a_manifest_that_names_no_files_is_damaged(manifest, tmp_path):
    (tmp_path / "complete.json").write_text(manifest, encoding="utf-8")
    assert training.checkpoint_problem(tmp_path) == "complete.json is damaged"


def test_a_checkpoint_that_was_copied_from_another_run_is_named(whole, tmp_path):
    shutil.copytree(whole / "checkpoint-8", tmp_path / "checkpoint-8")
    assert training.checkpoint_problem(tmp_path / "checkpoint-8") is None  # alone it can be used
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    assert training.checkpoint_problem(tmp_path / "checkpoint-8") == "it is of another run"
    assert training.checkpoint_problem(whole / "checkpoint-8") is None


def test_the_layers_in_the_adapter_config_have_one_order(whole):
    """PEFT keeps them in a set, which every process writes in another order."""
    layers = json.loads((whole / "adapter_config.json").read_text("utf-8"))["target_modules"]
    assert len(layers) > 1 and layers == sorted(layers)


@pytest.mark.slow
def test_a_run_that_stopped_early_is_not_trained_on(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "early_stop_reason", lambda _, scores, *rest: "enough" if len(scores) == 2 else None)
    record = sft_train.main(flags(tmp_path / "run", *EARLY_STOP))
    for path in [*(tmp_path / "run").glob("adapter_*"), tmp_path / "run" / "mtbench_final.jsonl"]:
        path.unlink()  # as if killed after the stop
    resumed = sft_train.main(flags(tmp_path / "run", *EARLY_STOP, "--resume_from_checkpoint", "auto"))
    assert "early stop at step 4: enough" in capsys.readouterr().out
    assert resumed["kept_step"] == record["kept_step"] <= 4 and resumed["final"] == record["final"]
    assert not (tmp_path / "run" / "checkpoint-6").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Another run: refused before anything is written


def test_a_resume_with_other_flags_names_them(flags, whole, capsys):
    before = contents(whole)
    other = ["--resume_from_checkpoint", "auto", "--learning_rate", "2e-3", "--lora_r", "4"]
    error = run_error(capsys, sft_train.main, *flags(whole, *other))
    assert "--learning_rate: 0.001 -> 0.002" in error and "--lora_r: 8 -> 4" in error and "kl_coef" not in error
    assert "holds another run" in run_error(capsys, sft_train.main, *flags(whole))
    assert contents(whole) == before


def test_a_resume_on_other_data_names_what_differs(flags, dataset, whole, capsys):
    before, text = contents(whole), dataset.read_text("utf-8")
    for changed, named in (
        (text.replace("а", "о"), "data sha256: "),
        ("".join(text.splitlines(keepends=True)[:15]), "'general_train': 18"),
    ):
        dataset.write_text(changed, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            sft_train.main(flags(whole, "--resume_from_checkpoint", "auto"))
        dataset.write_text(text, encoding="utf-8")
        error = capsys.readouterr().err.splitlines()[-1]  # after the bar of the validation rows
        assert stop.value.code == 2 and error.startswith("error: ") and named in error and "learning_rate" not in error
    assert contents(whole) == before


def test_a_resume_on_another_base_is_refused(flags, whole, monkeypatch, capsys):
    before = contents(whole)
    monkeypatch.setattr(models, "files_sha256", lambda _: "other weights")
    error = run_error(capsys, sft_train.main, *flags(whole, "--resume_from_checkpoint", "auto"))
    assert "weights, tokenizer or config of --model: " in error and "-> other weights" in error
    assert contents(whole) == before


def test_a_resume_by_another_number_of_processes_is_refused(flags, whole, monkeypatch, capsys):
    monkeypatch.setattr(training, "processes", lambda: 2)
    error = run_error(capsys, sft_train.main, *flags(whole, "--resume_from_checkpoint", "auto"))
    assert "processes: 1 -> 2" in error


@pytest.mark.parametrize("text", ["", "{", "[]", '{"args": 3}', '{"args": {}}', "[" * 100_000])
def test_a_damaged_run_file_is_named(text, flags, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "run.json").write_text(text, encoding="utf-8")
    before = contents(folder)
    error = run_error(capsys, sft_train.main, *flags(folder, "--resume_from_checkpoint", "auto"))
    assert "run.json is damaged" in error and contents(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        sft_train.main(flags(folder, "--learning_rate", "1e9", "--save_steps", "1", "--warmup_ratio", "0"))
    assert stop.value.code == 1
    assert re.search(r"error: (the loss is|a gradient is not finite).* at step \d+", capsys.readouterr().err)
    (record,) = files.read_records(tmp_path / "log.jsonl")
    assert record["status"] == "failed" and "step" in record["reason"]
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints and all(training.checkpoint_problem(path) is None for path in checkpoints)


def test_fp16_steps_that_are_skipped_without_end_stop_the_run(sft_trainer):
    trainer, control = sft_trainer(), transformers.TrainerControl()
    keeper = training.RunKeeper(trainer, None)
    keeper.on_train_begin(trainer.args, trainer.state, control)
    for skipped in [True] * 19 + [False] + [True] * 19:  # a whole step between: the count begins again
        trainer.accelerator = types.SimpleNamespace(optimizer_step_was_skipped=skipped)
        keeper.on_step_end(trainer.args, trainer.state, control)
    with pytest.raises(training.NotFiniteError, match="20 steps in a row"):
        keeper.on_step_end(trainer.args, trainer.state, control)


TWO_PROCESSES = """
import sys, time
sys.path.insert(0, {root!r})
import torch, transformers
import sft_train
from llm_alignment import sft
save, step, steps = transformers.Trainer._save_rng_state, sft.fused_nll_kl, 0
def late(self, folder):
    time.sleep(2 * self.args.process_index)
    save(self, folder)
def poisoned(*args, **kwargs):
    global steps
    steps += torch.is_grad_enabled()
    loss, *rest = step(*args, **kwargs)
    return (loss * (float("nan") if steps == 6 and torch.distributed.get_rank() == 1 else 1), *rest)
transformers.Trainer._save_rng_state = late
sft.fused_nll_kl = poisoned
sft_train.main({argv!r})
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_wait_for_each_other_s_files(flags, tmp_path):
    """Process 1 writes its part of a checkpoint late, and its loss of micro-batch 6, the first of step 4, is NaN."""
    folder, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), argv=flags(folder)), encoding="utf-8")
    done = subprocess.run(
        torchrun(script),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    reason = "the loss is nan at step 4 in process 1"
    assert done.returncode == 1 and done.stderr.count(f"error: {reason}") == 2, done.stderr[-3000:]
    (record,) = files.read_records(tmp_path / "log.jsonl")
    assert record["status"] == "failed" and record["reason"] == reason
    manifest = json.loads((folder / "checkpoint-2" / "complete.json").read_text("utf-8"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest.keys()
    assert training.checkpoint_problem(folder / "checkpoint-2") is None
    (folder / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"rng")
    assert training.checkpoint_problem(folder / "checkpoint-2") == "rng_state_1.pth is damaged"


@pytest.mark.parametrize("half, precision", [("bf16", "tf32"), ("fp16", "tf32"), ("", "ieee")])
def test_products_of_float32_are_rounded_in_half_precision_alone(half, precision):
    matmul, trainer, seen = torch.backends.cuda.matmul, unittest.mock.Mock(), []
    trainer.args.bf16, trainer.args.fp16, before = half == "bf16", half == "fp16", matmul.fp32_precision
    trainer.train = lambda **_: seen.append(matmul.fp32_precision)
    training.run_training(trainer, None)
    assert seen == [precision] and matmul.fp32_precision == before


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    "text, choice",
    [("", "auto"), ("--gradient_checkpointing", "on"), ("--no-gradient_checkpointing", "off")]
    + [(f"--gradient_checkpointing {choice}", choice) for choice in ("auto", "on", "off")],
)
def test_the_gradient_checkpointing_flag(text, choice):
    for script in (sft_train, dpo_train):
        assert script.build_parser().parse_args(text.split()).gradient_checkpointing == choice


@pytest.mark.parametrize(
    "more, others, is_on", [(1, [], False), (-1, [], True), (1, [False], False), (1, [True], True)]
)
def test_auto_checkpointing_where_training_does_not_fit(monkeypatch, more, others, is_on):
    """1.15 times the estimate and 1 GiB, `more` or less, are free here; where one process is full, all do it."""
    setup, settings, _ = toy_run("run", batch=1)
    settings = dataclasses.replace(settings, longest=1000)

    def uses(choice: str) -> bool:
        asked = dataclasses.replace(settings, gradient_checkpointing=choice)
        return training.uses_checkpointing(asked, setup.base, setup.lora)

    assert not uses("auto")  # on CPU
    needed = training.memory_of(settings, setup.base, setup.lora)
    free = 1.15 * (needed["adapter"] + needed["activations"] + needed["logits"]) + 2**30 + more
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training, "memory_of", lambda *_: needed)
    monkeypatch.setattr(training, "free_memory", lambda: (free, 10 * free))
    monkeypatch.setattr(training, "gathered", lambda items: [*items, *others])
    assert uses("auto") is is_on and uses("on") and not uses("off")


def measured_step(sft_trainer, model, batch, tokens, checkpointing):
    """(trainer, a function that computes a micro-batch forward and backward, the estimate of what that takes)."""
    more = ["--model", model, "--batch", str(batch), "--max_seq_length", str(tokens), "--kl_coef", "0"]
    more += ["--gradient_checkpointing", checkpointing]
    trainer = sft_trainer(*more)
    if checkpointing == "on":
        trainer.model.gradient_checkpointing_enable()
    ids = torch.randint(trainer.model.config.vocab_size, (batch, tokens), device=trainer.args.device)
    trainer.get_batch_samples(iter([]), 0, "cpu")

    def step():
        with trainer.accelerator.autocast():
            trainer.training_step(trainer.model, {"input_ids": ids, "labels": ids.clone()}, ids.numel())

    setup, settings, _ = toy_run(
        "run", model=model, batch=batch, lora_r=8, target_modules="all-linear", lora_dropout=0
    )
    needed = training.memory_of(dataclasses.replace(settings, longest=tokens), setup.base, setup.lora)
    kept = needed["checkpointed" if checkpointing == "on" else "activations"]
    return trainer, step, kept + needed["logits"] + needed["adapter"] / 4  # of which the gradients are a quarter


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("hidden, layers, batch, tokens", [(256, 6, 4, 192), (512, 3, 2, 256), (128, 12, 1, 512)])
def test_the_memory_estimate_against_measured_peaks(
    hidden, layers, batch, tokens, checkpointing, sft_trainer, sized_model
):
    """A step of the fused loss, in float32 on CPU: all that it makes, in bytes of tensors, to a factor of 1.5."""
    model = sized_model(
        hidden_size=hidden, intermediate_size=3 * hidden, num_attention_heads=hidden // 64, head_dim=64,
        num_hidden_layers=layers, num_key_value_heads=2,
    )  # fmt: skip
    trainer, step, estimate = measured_step(sft_trainer, model, batch, tokens, checkpointing)
    peak = peak_bytes(step, trainer.model.parameters())
    assert peak / 1.5 < estimate < peak * 1.5


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_the_memory_estimate_on_a_gpu(checkpointing, sft_trainer, sized_model, figure):
    """A step of 2 x 512 tokens in the 1.7B model's shape, in the GPU's half type."""
    model = sized_model(
        hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        num_hidden_layers=28, vocab_size=151_936,
    )  # fmt: skip
    trainer, step, estimate = measured_step(sft_trainer, model, 2, 512, checkpointing)
    step()  # what the libraries keep for themselves is there after the first one
    trainer.model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    figure("peak", peak / 2**30, "GiB")
    figure("estimate over peak", estimate / peak)
    assert peak / 1.5 < estimate < peak * 1.5


def test_the_state_of_the_optimizer_of_a_gpu_is_found_whole(tmp_path, monkeypatch):
    """The class that trains there; it steps on a CPU too."""
    from bitsandbytes.optim import PagedAdamW32bit

    weight = torch.nn.Parameter(torch.ones(4, 8))
    optimizer = PagedAdamW32bit([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for tensor, problem in ((weight.detach(), None), (torch.ones(8, 4), "other tensors")):
        safetensors.torch.save_file({"w": tensor}, tmp_path / "adapter_model.safetensors")
        found = training.state_problem(tmp_path)
        assert found is None if problem is None else problem in found


def test_the_longest_pair_decides_the_memory_that_is_planned():
    """A prompt is read once with both answers, else twice; answers are cut at --max_length with their prompt."""
    names = ("beta", "loss_type", "loss_weights", "label_smoothing", "no_prefix_sharing", "group_by_table")
    dpo = training.DpoSettings(max_length=100, **dict.fromkeys(names))
    settings = training.TrainingSettings(**{
        field.name: None for field in dataclasses.fields(training.TrainingSettings)
    })
    for pairs, shared, apart, answer in (
        ([(10, 20, 30), (40, 5, 5)], 60, 90, 30),
        ([(90, 50, 5), (1, 2, 3)], 105, 200, 10),
        ([(120, 5, 5)], 120, 240, 0),
    ):
        found = [dpo.sized(settings, pairs, is_shared=is_shared) for is_shared in (True, False)]
        assert [(each.longest, each.longest_answer) for each in found] == [(shared, answer), (apart, answer)]


@pytest.mark.gpu(cpu=True)
@pytest.mark.slow
@pytest.mark.parametrize("dtype, pages", [("fp32", False), ("auto", False), ("auto", True)])
def test_a_run_on_a_gpu_that_is_resumed_ends_as_the_whole_one(
    dtype, pages, flags, sized_model, tmp_path, monkeypatch, figure
):
    """With the optimizer's state, in pages from 100,000 elements of a tensor on, and the GPU's random state. Its sums
    may differ in the last bits."""
    from bitsandbytes import functional

    more, paged, get_paged = ["--dtype", dtype], [], functional.get_paged
    if pages:
        sizes = dict(hidden_size=2048, num_hidden_layers=1, intermediate_size=512, num_attention_heads=16)
        more += ["--model", sized_model(**sizes, num_key_value_heads=8, head_dim=128), "--lora_r", "64"]
    monkeypatch.setattr(
        functional, "get_paged", lambda *shape, **more: [paged.append(shape), get_paged(*shape, **more)][1]
    )
    whole, folder = tmp_path / "whole", tmp_path / "run"
    sft_train.main(flags(whole, *more))
    with monkeypatch.context() as patch:
        signal_in(patch, 10, signal.SIGTERM)
        with pytest.raises(SystemExit):
            sft_train.main(flags(folder, *more))
    sft_train.main(flags(folder, *more, "--resume_from_checkpoint", "auto"))
    assert "resuming from" in (folder / "run.log").read_text("utf-8")
    ours, expected = (safetensors.torch.load_file(path / "adapter_model.safetensors") for path in (folder, whole))
    difference = sum((ours[name] - tensor).norm() ** 2 for name, tensor in expected.items()) ** 0.5
    norm = sum(tensor.norm() ** 2 for tensor in expected.values()) ** 0.5
    figure("distance over norm", (difference / norm).item())
    figure("paged tensors", len(paged))
    assert difference <= 0.02 * norm and bool(paged) == (pages and torch.cuda.is_available())
