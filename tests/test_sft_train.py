"""sft_train.py from end to end on the demo's files: data, runs, bad input, and runs that are killed and go on."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, chat, logged_commands, read_rows, run_error, torchrun, write_rows
from run_records import records
from toys import setup_of

import sft_train
from llm_alignment import files, models, plans, sft
from llm_alignment.anchored_loss import AnchorSettings
from llm_alignment.encoder import ChatEncoder
from llm_alignment.files import SkippedRows
from llm_alignment.flags import fill
from llm_alignment.leaks import LeakFinder
from llm_alignment.replay import given_dialogues
from llm_alignment.training import TrainingSettings

TWIX = [row for _, row in files.read_rows(DEMO / "twix.jsonl", SkippedRows())]
FOLDER = tempfile.TemporaryDirectory()
DISTINCT = {str(row["messages"][0]): row for row in TWIX if row["subset"] == "general"}
DATASET = write_rows(Path(FOLDER.name) / "twix.jsonl", list(DISTINCT.values())[:130])  # 128 to train on, 2 held out


def flags(folder, *more):
    """A small run on some of the demo's rows: 16 steps, no MT-Bench, full precision."""
    return [
        "--demo", "--output_dir", str(folder), "--exp_log", str(folder.parent / "log.jsonl"),
        "--dataset", str(DATASET),
        "--sample_ratio", "1", "--val_split", "0.0154",
        "--epochs", "1", "--batch", "4", "--grad_acc", "2", "--max_seq_length", "48", "--learning_rate", "1e-3",
        "--kl_coef", "0.2", "--kl_start_step", "2", "--kl_warmup_steps", "4", "--kl_limit_seq", "16",
        "--kl_log_interval", "4", "--save_steps", "4", "--mtbench_ru", "none", "--no_4bit", "--skip_baseline_eval",
        "--target_modules", "q_proj,v_proj", *more,
    ]  # fmt: skip


def check_same_adapters(*folders):
    import safetensors.torch

    a, b = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in folders)
    for name in a:
        assert (a[name] - b[name]).norm() < 1e-4 * a[name].norm(), name


def adapter(folder):
    return files.file_sha256(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return sft_train.main(flags(folder)), folder


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_measures_trains_and_leaves_everything(tmp_path, capsys):
    """4-bit base, KL, MT-Bench with both turns, early stopping: what a user gets."""
    folder = tmp_path / "run"
    argv = flags(folder, "--mtbench_ru", str(DEMO / "mt_bench_ru.jsonl"), "--mtbench_questions_limit", "5")
    argv += ["--mtbench_max_tokens", "12", "--early_stop_patience", "3", "--eval_steps", "6", "--exp_tag", "whole"]
    argv = [flag for flag in argv if flag not in {"--no_4bit", "--skip_baseline_eval"}]
    record = sft_train.main(argv)
    printed = capsys.readouterr().out
    for name in (
        "adapter_model.safetensors adapter_config.json README.md run.json train_log.jsonl metrics.json run.log "
        "loss.png kl.png mtbench.png mtbench_baseline.jsonl mtbench_final.jsonl"
    ).split():
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"].endswith("model")
    logged = files.read_records(tmp_path / "log.jsonl")
    assert logged == [json.loads(json.dumps(record))] and record["status"] == "completed"
    assert records.record_problem(logged[0]) is None  # so that campaign and report take it
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert metrics == {key: json.loads(json.dumps(record[key])) for key in ("baseline", "final", "delta")}
    assert metrics["delta"]["val_loss"]["mean"] == pytest.approx(
        metrics["final"]["val_loss"] - metrics["baseline"]["val_loss"]
    )
    assert metrics["final"]["val_loss"] < metrics["baseline"]["val_loss"]
    assert metrics["delta"]["mtbench"]["n"] == 5
    for word in ("validation loss", "perplexity", "MT-Bench", "95 % interval", "held-out rows", ", baseline "):
        assert word in printed, word
    history = read_rows(folder / "train_log.jsonl")
    scores = {entry["step"]: entry["eval_mtbench"] for entry in history if "eval_mtbench" in entry}
    assert list(scores) == [6, 12, 16]  # every --eval_steps and after the last step
    assert record["kept_step"] == max(scores, key=scores.get)
    assert metrics["final"]["mtbench"]["avg"] == scores[record["kept_step"]]
    steps = [entry for entry in history if "kl_coef" in entry]
    assert [entry["kl_coef"] for entry in steps] == pytest.approx([0, 0.05, 0.2, 0.2, 0.2])  # the first, every fourth
    assert steps[-1]["kl"] > 0 and steps[-1]["loss"] == pytest.approx(
        steps[-1]["nll"] + 0.2 * steps[-1]["kl"], rel=1e-4
    )


def test_the_validation_loss_is_measured_at_steps_and_changes_nothing(whole_run, tmp_path, capsys):
    """Also without early stopping; the phases are named with their number."""
    sft_train.main(flags(tmp_path / "run", "--eval_steps", "6"))
    assert adapter(tmp_path / "run") == adapter(whole_run[1])
    history = read_rows(tmp_path / "run" / "train_log.jsonl")
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert list(losses) == [6, 12, 16] and losses[16] < losses[6]
    printed, bars = capsys.readouterr()
    assert re.search(r"training: .*loss=\d", bars) and "whole validation split, after training: " in bars
    assert "Loading weights" not in bars
    assert "phase 1 of 2: training" in printed and "phase 2 of 2: measuring after" in printed


def test_time_says_how_long_a_run_takes_and_leaves_nothing(tmp_path, capsys):
    argv = flags(tmp_path / "run", "--dry_run", "--time", "--kl_on", "replay", "--replay_ratio", "0.1")
    sft_train.main(argv)
    assert "minutes of training" in capsys.readouterr().out and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="2"):
        sft_train.main([flag for flag in argv if flag != "--dry_run"])


@pytest.mark.slow
def test_early_stopping_asks_a_sample_and_the_end_asks_all(tmp_path, monkeypatch):
    """2 of 6 questions at the steps; the score is compared with the base's on the same 2."""
    folder, compared = tmp_path / "run", []
    monkeypatch.setattr(sft, "early_stop_reason", lambda baseline, *_: compared.append(baseline))
    argv = flags(folder, "--mtbench_ru", str(DEMO / "mt_bench_ru.jsonl"), "--mtbench_questions_limit", "6")
    argv += ["--mtbench_midtrain_questions", "2", "--early_stop_patience", "3", "--eval_steps", "8"]
    argv += ["--mtbench_max_tokens", "8"]
    record = sft_train.main([flag for flag in argv if flag != "--skip_baseline_eval"])
    rows = {
        name: read_answers(folder / f"mtbench_{name}.jsonl") for name in ("baseline", "step_8", "step_16", "final")
    }
    assert {name: len(rows[name]) for name in rows} == {"baseline": 6, "step_8": 2, "step_16": 2, "final": 6}
    assert rows["step_8"].keys() == rows["step_16"].keys() < rows["baseline"].keys() == rows["final"].keys()
    assert "ignoring an earlier measurement" not in (folder / "run.log").read_text("utf-8")
    same = [sum(rows["baseline"][key]["scores"]) / len(rows["baseline"][key]["scores"]) for key in rows["step_8"]]
    assert compared and all(score == pytest.approx(sum(same) / 2) for score in compared)
    assert record["final"]["mtbench"]["n"] == record["delta"]["mtbench"]["n"] == 6


def read_answers(path):
    """The rows of a file of answers by question."""
    return {row["question_id"]: row for _, row in files.read_rows(path, SkippedRows()) if "question_id" in row}


def test_the_anchor_starts_from_no_divergence(whole_run):
    """The reference is the base: before the first KL step moves the adapter far, the KL is near 0, and it grows."""
    _, folder = whole_run
    history = read_rows(folder / "train_log.jsonl")
    kl = [entry["kl"] for entry in history if entry.get("kl_coef")]
    assert 0 < kl[0] < kl[-1]


def test_the_adapter_loads_with_peft_alone(whole_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    record, folder = whole_run
    base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="float32")
    model = PeftModel.from_pretrained(base, folder)
    moved = [p for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == 2 * base.config.num_hidden_layers and moved[0].dtype.is_floating_point
    assert record["kept_step"] == 16


@pytest.mark.slow
def test_accumulation_does_not_change_the_step(tmp_path):
    """4 x 2 examples and 8 x 1 examples a step are one and the same step, with the KL on."""
    other, one = tmp_path / "other", tmp_path / "one"
    sft_train.main(flags(other, "--batch", "8", "--grad_acc", "1", "--lora_dropout", "0"))
    sft_train.main(flags(one, "--lora_dropout", "0"))
    check_same_adapters(other, one)


def test_packed_examples_do_not_see_one_another(tmp_path):
    """The NLL and KL of packed examples are those of the same examples alone."""
    import datasets
    import torch

    argv = f"--model {DEMO}/model --no_4bit --batch 2 --kl_warmup_steps 0 --kl_limit_seq 5 --max_seq_length 64"
    args = sft_train.build_parser().parse_args([*argv.split(), "--output_dir", str(tmp_path), "--lora_dropout", "0"])
    setup = setup_of(vars(args))
    encoder = ChatEncoder(setup.tokenizer, thinking=False, assistant_only=False)
    rows = datasets.Dataset.from_list([encoder(chat(f"Привет, {n}", "ответ " * (n + 3))) for n in range(9)])
    settings = fill(TrainingSettings, args, longest=64)
    losses = []
    for packing in (True, False):
        trainer = sft.build_trainer(
            models.load_model(setup.base), setup, {"train": rows, "validation": rows}, settings,
            sft=sft.SftSettings(64, packing, 1), anchor=fill(AnchorSettings, args),
        )  # fmt: skip
        torch.manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        trainer.state.global_step = 1  # the coefficient is 0 at step 0
        batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 99, "cpu")
        # an example's first token has no target; packed, the token that begins the next example has none either
        assert items == sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        parts = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).item() for batch in batches]
        losses.append((sum(parts), trainer.kl_since_log, int(items), int(trainer.kl_items)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][3] == 9 * 5


@pytest.mark.slow
def test_shares_of_the_anchor_are_of_the_packed_steps(tmp_path, capsys):
    """Packing makes few sequences of many rows; the plan and the anchor count those."""
    argv = flags(tmp_path / "run", "--packing", "--max_seq_length", "256", "--batch", "4", "--grad_acc", "1")
    argv += ["--kl_start_step", "0.1", "--kl_warmup_steps", "0.3", "--kl_log_interval", "1", "--no-do_retention"]
    steps = sft_train.main(argv)["kept_step"]
    entries = files.read_records(tmp_path / "run" / "train_log.jsonl")
    weights = {entry["step"]: entry["kl_coef"] for entry in entries if "kl_coef" in entry}
    assert 4 < steps < 20 and weights[1] == 0 and weights[steps] == 0.2
    planned = int(re.search(r"few optimiser steps \((\d+)\)", capsys.readouterr().out)[1])
    assert abs(planned - steps) <= 2


@pytest.mark.parametrize("marks", [[False, False], [True, False]])
def test_an_anchor_on_replay_rows_where_a_step_has_none(marks, sft_trainer):
    import torch

    trainer = sft_trainer("--kl_warmup_steps", "0", "--kl_limit_seq", "5")
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
    trainer.anchor, trainer.state.global_step = dataclasses.replace(trainer.anchor, kl_on="replay"), 1
    (batch,), items = trainer.get_batch_samples(iter([batch | {"replay": torch.tensor(marks)}]), 1, "cpu")
    assert batch["kl_mask"].sum(dim=1).tolist() == [5 * mark for mark in marks]
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).item()
    assert loss == pytest.approx(trainer.nll_since_log) and trainer.kl_since_log == pytest.approx(0, abs=1e-6)


def test_what_is_asked_is_not_trained_on(tmp_path, capsys):
    asked = DEMO / "mt_bench_ru.jsonl"
    questions = [row["turns"][0] for row in read_rows(asked)[:3]] + [
        read_rows(DEMO / "retention.jsonl")[0]["turns"][0]
    ]
    path = write_rows(tmp_path / "rows.jsonl", [*list(DISTINCT.values())[:20], *(chat(q, "да") for q in questions)])
    sft_train.main(flags(tmp_path / "run", "--dry_run", "--mtbench_ru", str(asked), "--dataset", str(path)))
    assert "4 of 24 left out" in (out := capsys.readouterr().out)
    assert "3 MT-Bench questions" in out and "1 retention question" in out


@pytest.mark.parametrize("packing", [[], ["--packing"]])
def test_a_plan_of_fewer_rows_than_a_step_takes(tmp_path, capsys, packing):
    many = ["--batch", "8", "--grad_acc", "999", "--epochs", "1", "--kl_start_step", "0", "--kl_warmup_steps", "0"]
    sft_train.main(flags(tmp_path / "run", "--dry_run", "--no-do_retention", *many, *packing))
    printed = capsys.readouterr().out
    steps, sequences = re.search(r"steps: (\d+) of (\d+) sequences", printed).groups()
    passes = math.ceil(int(sequences) / 8)
    assert steps == "1" and 8 < int(sequences) < 300
    assert f"passes: {passes} forward and {passes} backward of 8 sequences, 0 forward of the reference" in printed


def test_a_run_of_any_length_is_planned_at_once(logged):
    sft_train.warn_of_small_runs(2**60, 99, AnchorSettings(kl_start_step=2**61), 0.1)
    assert "the KL anchor reaches 0 of its weight" in logged.text


@pytest.mark.parametrize("coefficient", ["0", "0.1"])
def test_a_plan_of_any_length_is_printed_at_once(tmp_path, capsys, coefficient):
    sft_train.main(
        flags(tmp_path / "run", "--dry_run", "--no-do_retention", "--epochs", "1e9", "--kl_coef", coefficient)
    )
    forward, reference = re.search(
        r"passes: (\d+) forward .* (\d+) forward of the ref", capsys.readouterr().out
    ).groups()
    assert int(forward) > 10**9 and int(reference) == (int(forward) - 2 * 3 if float(coefficient) else 0)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    plan = flags(tmp_path / "run", "--dry_run", "--no-do_retention")
    record = sft_train.main(plan)
    printed = capsys.readouterr().out
    for words in (
        "general    train", "validation", "steps: 16 of 8 sequences", "tokens:", "with padding", "memory:",
        "a row as the model reads it", "[[<|im_start|>user",
        "passes: 32 forward and 32 backward of 4 sequences, 26 forward of the reference",
        # 10 rows of 48 tokens: 2 with their loss, twice, two passes of drift, the split with its loss; trained 45 of 8
        "evaluation: at most 0.00 M tokens, 3 % of all",
    ):  # fmt: skip
        assert words in printed, words
    assert record["status"] == "completed"
    plan.remove("--skip_baseline_eval")
    plan += ["--mtbench_ru", str(DEMO / "mt_bench_ru.jsonl"), "--mtbench_questions_limit", "5"]
    sft_train.main([*plan, "--mtbench_midtrain_questions", "3", "--early_stop_patience", "1", "--eval_steps", "6"])
    printed = capsys.readouterr().out
    for words in ("drift: 2 questions, 1 x", "mtbench: 5 questions, 2 x", "mtbench: 3 questions, 3 x"):
        assert words in printed, words
    assert not (tmp_path / "run").exists() and not (tmp_path / "log.jsonl").exists()


@pytest.mark.slow
def test_half_precision_is_measured_in_one_way_before_and_after_training(tmp_path):
    """A step of nearly nothing, so that the model stays what it was. Training itself runs in autocast."""
    argv = flags(tmp_path / "run", "--dtype", "bf16", "--learning_rate", "1e-30", "--epochs", "0.1")
    record = sft_train.main([flag for flag in argv if flag != "--skip_baseline_eval"])
    assert record["kept_step"] == 2 and record["final"]["val_loss"] == record["baseline"]["val_loss"]
    assert record["final"]["drift"] == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    more = ["--grad_acc", "1", "--lora_dropout", "0", "--kl_log_interval", "1"]
    launch = torchrun(ROOT / "sft_train.py", *flags(both, *more))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sft_train.main(flags(one, "--lora_dropout", "0", "--kl_log_interval", "1"))
    check_same_adapters(both, one)
    curves = [read_rows(f / "train_log.jsonl") for f in (both, one)]
    assert len(curves[0]) == len(curves[1]) == 18  # each step, the validation loss and the end
    for x, y in zip(*curves, strict=True):
        for key in {"loss", "nll", "kl"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-7), key
    assert len(files.read_records(tmp_path / "log.jsonl")) == 2  # one record a run, not one a process


@pytest.mark.slow
def test_a_stream_has_epochs_and_partial_steps_like_loaded_rows(tmp_path):
    """18 rows, 8 a step: the third step of each pass has 2 rows and does not go on into the next pass."""
    rows = write_rows(tmp_path / "rows.jsonl", list(DISTINCT.values())[:19])
    more = f"--dataset {rows} --val_split 0.01 --epochs 2.5 --kl_log_interval 1 --save_steps 2".split()
    logs = {}
    for name in ("streamed", "loaded"):
        folder = tmp_path / name
        still = ["--learning_rate", "1e-12", "--kl_coef", "0", "--streaming"]
        record = sft_train.main(flags(folder, *more, *(still if name == "streamed" else still[:-1])))
        assert record["kept_step"] == 8  # of 3 + 3 + 2
        log = read_rows(folder / "train_log.jsonl")
        logs[name] = [entry["nll"] for entry in log if "nll" in entry]
    assert max(logs["streamed"]) < 1.3 * min(logs["streamed"])  # a step that accumulated two would have twice the loss
    assert sum(logs["streamed"][:3]) == pytest.approx(sum(logs["loaded"][:3]), rel=0.1)
    assert logs["streamed"][0] != logs["streamed"][3]  # the next pass has another order


@pytest.mark.slow
def test_a_stream_resumes_in_its_second_pass(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", list(DISTINCT.values())[:19])
    more = ["--dataset", str(rows), "--val_split", "0.01", "--epochs", "2.5", "--save_steps", "5", "--streaming"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    sft_train.main(flags(whole, *more))
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "adapter_model.safetensors").unlink()
    sft_train.main(flags(folder, *more, "--resume_from_checkpoint", "auto"))
    assert adapter(folder) == adapter(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written


@pytest.fixture
def bad_files(tmp_path):
    """The folder of the files that BAD names."""
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "broken.jsonl").write_bytes(b'{"messages": 3}\n{oops\n')
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "truncated.json").write_bytes(b'[{"question_id": 1, "turns": ["a"')
    write_rows(tmp_path / "no_turns.jsonl", [{"question_id": 1, "category": "x"}])
    write_rows(tmp_path / "few.jsonl", [chat(f"q{n}", "a") for n in range(3)])
    (tmp_path / "hollow").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / "model" / name, tmp_path / "hollow")
    return tmp_path


ANSWERS_BEYOND = "--assistant_only_loss --max_seq_length 2"
BAD = {
    "no such dataset": ("--dataset {}/nowhere.jsonl", "nowhere.jsonl"),
    "an empty dataset": ("--dataset {}/empty.jsonl", "no usable row"),
    "no usable row": ("--dataset {}/broken.jsonl",
                      "broken.jsonl:1 (messages holds no turns); broken.jsonl:2 (not valid JSON)"),
    "a broken Parquet file": ("--dataset {}/rows.parquet", "not a readable Parquet file"),
    "a subset without rows": ("--subset reasoning --dataset {}/few.jsonl", "'general': 3"),
    "a ratio above 1": ("--sample_ratio 1.5", "not within [0, 1]"),
    "a negative ratio": ("--mix_reasoning_ratio -0.1", "not within [0, 1]"),
    "a mix of one subset": ("--subset general --mix_reasoning_ratio 0.2", "--subset both"),
    "layers that the model lacks": ("--target_modules nope", "--target_modules nope"),
    "answers beyond the length": (ANSWERS_BEYOND, "row has an answer within --max_seq_length 2"),
    "packed answers beyond it": (f"{ANSWERS_BEYOND} --packing", "row has an answer within --max_seq_length 2"),
    "a stream of answers beyond it": (f"{ANSWERS_BEYOND} --streaming", "row has an answer within --max_seq_length 2"),
    "a length of one token": ("--max_seq_length 1", "row has an answer within --max_seq_length 1"),
    "a sample of nothing": ("--sample_ratio 0", "0 prompts left"),
    "an empty question file": ("--mtbench_ru {}/empty.jsonl", "no questions"),
    "a truncated question file": ("--mtbench_ru {}/truncated.json", "truncated.json"),
    "questions without turns": ("--mtbench_ru {}/no_turns.jsonl", "no_turns.jsonl:1"),
    "a model without weights": ("--model {}/hollow", "no file named model.safetensors"),
    "no such model": ("--model {}/nowhere", "--model"),
    "no such reward model": (f"--reward_model {{}}/nowhere --mtbench_ru {DEMO}/mt_bench_ru.jsonl", "--reward_model"),
    "early stopping without MT-Bench": ("--early_stop_patience 2", "--early_stop_patience"),
    "an anchor on no replay rows": ("--kl_on replay", "--replay_ratio"),
    "replay rows without a share": ("--replay {}/few.jsonl", "add --replay_ratio"),
    "replay rows that are none": ("--replay {}/broken.jsonl --replay_ratio 0.1 --dry_run", "broken.jsonl:1"),
    "own replay rows in thinking mode": ("--thinking --replay_ratio 0.1", "--replay FILE"),
    "gates without a baseline": ("--gates val_loss=-0.1 --dry_run", "--gates"),
    "packing a stream": ("--packing --streaming --dry_run", "--packing"),
    "a checkpoint that is none": ("--resume_from_checkpoint {}", "it was not finished"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(changes, expected, bad_files, capsys):
    with pytest.raises(SystemExit) as stop:
        sft_train.main(flags(bad_files / "run", *changes.format(bad_files).split()))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().split("\n") if "error:" in line]
    assert len(lines) == 1 and expected in lines[0]
    assert not (bad_files / "run").exists() and not (bad_files / "log.jsonl").exists()


@pytest.mark.parametrize("asked", [["--packing"], ["--kl_coef", "0.2"], []], ids=" ".join)
def test_what_the_loaded_model_cannot_do(asked, tmp_path, monkeypatch, capsys):
    """An error where the user asked for it; the anchor, which is there unasked too, is left out with a line."""
    trainers, look = [], "packing_problem" if asked == ["--packing"] else "anchor_problem"
    monkeypatch.setattr(sft, look, lambda model: "it cannot")
    monkeypatch.setattr(plans, "log_times", lambda trainer, *_: trainers.append(trainer))
    argv = flags(tmp_path / "run", "--dry_run", "--time")
    place = argv.index("--kl_coef")
    argv[place : place + 2] = asked
    if asked:
        with pytest.raises(SystemExit, match="2"):
            sft_train.main(argv)
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {' '.join(asked)}: it cannot")
    else:
        sft_train.main(argv)
        assert "no KL anchor: it cannot" in capsys.readouterr().out and trainers[0].anchor.kl_coef == 0


def test_what_the_config_says_that_a_model_cannot_do_is_told_without_its_weights(tmp_path, capsys):
    folder = shutil.copytree(DEMO / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kinds = ["linear_attention"] * config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": kinds}), encoding="utf-8")
    error = run_error(
        capsys, sft_train.main, *flags(tmp_path / "run", "--model", str(folder), "--packing", "--dry_run")
    )
    assert "--packing: the model has layers that carry a state" in error


def test_replay_rows_of_a_file_are_planned_and_a_resume_with_others_is_refused(bad_files, capsys):
    argv = flags(bad_files / "run", "--replay", str(bad_files / "few.jsonl"), "--replay_ratio", "0.5")
    argv += ["--no-do_retention", "--kl_coef", "0"]
    sft_train.main([*argv, "--dry_run"])
    assert "steps: 32 of 8 sequences" in capsys.readouterr().out
    sft_train.main([*argv, "--max_steps", "1"])
    write_rows(bad_files / "few.jsonl", [chat(f"q{n}", "b") for n in range(3)])
    with pytest.raises(SystemExit) as stop:
        sft_train.main([*argv, "--max_steps", "1", "--resume_from_checkpoint", "auto"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "data replay: " in error and "sha256" not in error


def test_replay_rows_on_a_held_out_prompt_are_not_used(demo_tokenizer, tmp_path):
    """Whatever their form, their answer and their system turn."""
    rows = [chat("Say 1.", "1"), chat("SAY  1!", "one"), chat("Say 2.", "2")]
    rows.append({"messages": [{"role": "system", "content": "Be brief."}, *chat("Say 1.", "1")["messages"]]})
    path = write_rows(tmp_path / "replay.jsonl", rows)
    encoder = ChatEncoder(demo_tokenizer, thinking=False, assistant_only=False)
    given = given_dialogues(str(path), encoder, LeakFinder({}), [chat("say 1", "other")["messages"]])
    assert given == [rows[2]["messages"]]


def test_a_folder_that_holds_another_run_is_left_alone(whole_run, capsys):
    _, folder = whole_run
    with pytest.raises(SystemExit) as stop:
        sft_train.main(flags(folder))
    assert stop.value.code == 2 and "holds another run" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_logged_commands_parse():
    for argv in logged_commands("sft_train.py").values():
        args = sft_train.build_parser().parse_args(argv)
        assert args.output_dir.startswith("qwen3_") and args.no_4bit is False


def stops(metric, baseline, scores, patience=2):
    return sft.early_stop_reason(baseline, scores, patience, metric)


def test_early_stopping_rule():
    assert stops("mtbench", 5.0, [4.9]) is None
    assert stops("mtbench", 5.0, [4.69]).startswith("MT-Bench 4.690 is more than 0.30")
    assert stops("mtbench", None, [1.0], 1) is None
    assert stops("mtbench", 5.0, [5.0, 5.04, 5.02]).startswith("2 evaluations without a gain of 0.05")
    assert stops("mtbench", 5.0, [5.0, 5.04, 5.08]) is None  # small gains add up
    assert stops("mtbench", 5.0, [5.0, 4.8, 5.1, 5.0]) is None
    assert stops("val_loss", 2.0, [2.0, 1.9, 1.8]) is None and stops("val_loss", 2.0, [2.06]).startswith("validation")
    assert stops("val_loss", 2.0, [1.8, 1.81, 1.8]).startswith("2 evaluations without a gain of 0.005")
    assert stops("retention", 80.0, [75.5]) is None and stops("retention", 80.0, [74.9]).startswith("retention 74.900")


# ---------------------------------------------------------------------------------------------------------------------
# What the demo is there to show


@pytest.mark.slow
def test_the_anchor_holds_what_sft_alone_forgets(tmp_path, monkeypatch):
    """Half of the demo's steps at one seed; experiments/demo/README.md has the whole of it at three."""
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    falls, gains, drifts = {}, {}, {}
    for kl_coef in ("0", "0.5"):
        argv = ["--demo", "--kl_coef", kl_coef, "--epochs", "0.4", "--seed", "1", "--no-do_retention"]
        argv += ["--mtbench_questions_limit", "24", "--output_dir", str(tmp_path / kl_coef)]
        record = sft_train.main([*argv, "--exp_log", str(tmp_path / "log.jsonl")])
        falls[kl_coef] = record["baseline"]["mtbench"]["avg"] - record["final"]["mtbench"]["avg"]
        gains[kl_coef] = record["baseline"]["val_loss"] - record["final"]["val_loss"]
        drifts[kl_coef] = record["final"]["drift"]
        assert record["baseline"]["mtbench"]["avg"] > 7  # the base answers most of it rightly
    assert falls["0"] > 1
    assert 0 < drifts["0.5"] < drifts["0"]
    assert falls["0.5"] <= falls["0"] / 2
    assert gains["0.5"] >= gains["0"] / 2
