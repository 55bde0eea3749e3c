"""A finished run at other strengths of its adapter: 0 is the base and 1 the run, to the bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import DEMO, read_rows
from run_records import frontier
from toys import make_model

import sft_train
from llm_alignment.adapters import LoraSettings, adapter_off, new_adapter, scaled
from llm_alignment.files import InputError


@pytest.fixture(scope="module")
def run_folder(dataset, tmp_path_factory):
    """The folder of an SFT run of three steps that asked a few questions."""
    folder = tmp_path_factory.mktemp("frontier") / "run"
    sft_train.main([
        "--demo", "--output_dir", str(folder), "--exp_log", str(folder.parent / "log.jsonl"),
        "--dataset", str(dataset), "--val_split", "0.1", "--batch", "2", "--grad_acc", "1", "--max_steps", "3",
        "--max_seq_length", "48", "--mtbench_ru", str(DEMO / "mt_bench_ru.jsonl"), "--mtbench_limit", "3",
        "--mtbench_max_tokens", "6", "--retention_limit", "8", "--retention_max_tokens", "6",
    ])  # fmt: skip
    return folder


def copy_of(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


def rows_of(folder, stage):
    return {path.name.removesuffix(f"_{stage}.jsonl"): read_rows(path)[1:] for path in folder.glob(f"*_{stage}.jsonl")}


def test_a_scaled_adapter_is_the_base_at_0_and_itself_at_1_to_the_bit():
    model = new_adapter(make_model(), LoraSettings(4, 8, 0.0, "q_proj,v_proj")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(20)[None]

    def logits(scale):
        with torch.no_grad(), scaled(model, scale):
            return model(ids).logits

    with torch.no_grad():
        own = model(ids).logits
        with adapter_off(model):
            base = model(ids).logits
    assert torch.equal(logits(0), base) and torch.equal(logits(1), own)
    assert not torch.equal(logits(0.5), own) and not torch.equal(logits(0.5), base)
    assert torch.equal(logits(1), own)  # what was scaled is what it was again
    model.peft_config["default"].use_dora = True
    with pytest.raises(InputError, match="DoRA"):
        logits(0.5)
    with pytest.raises(InputError, match="without"), scaled(make_model(), 0.5):
        pass


@pytest.mark.slow
def test_the_ends_are_the_runs_own_rows_and_a_stopped_frontier_goes_on(run_folder, tmp_path, capsys):
    folder = copy_of(run_folder, tmp_path)
    argv = [str(folder), "--scales", "0.5", "1", "--gates", "val_loss=9"]
    assert frontier.main(argv) == 0
    lines = {line["scale"]: line for line in read_rows(folder / "frontier.jsonl")}
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert lines.keys() == {0, 0.5, 1} and (folder / "frontier.png").exists()
    for key in ("val_loss", "retention", "mtbench", "drift"):
        assert lines[0]["final"][key] == metrics["baseline"][key] and lines[1]["final"][key] == metrics["final"][key]
    assert lines[1]["final"]["own_drift"] == metrics["final"]["own_drift"] > lines[0.5]["final"]["own_drift"] > 0
    assert lines[1]["delta"]["val_loss"] == metrics["delta"]["val_loss"]
    for path in run_folder.glob("*.jsonl"):
        assert (folder / path.name).read_bytes() == path.read_bytes()  # nothing was measured again
    half = rows_of(folder, "scale_0.5")
    # a stop in the middle of 0.5, and the rows of the run's ends gone
    for path in [
        *folder.glob("*_baseline.jsonl"),
        *folder.glob("*_final.jsonl"),
        folder / "retention_scale_0.5.jsonl",
    ]:
        path.unlink()
    cut = folder / "validation_scale_0.5.jsonl"
    cut.write_text("".join(cut.read_text("utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    assert frontier.main(argv) == 0
    assert rows_of(folder, "scale_0.5") == half
    for stage in ("baseline", "final"):
        again, own = rows_of(folder, stage), rows_of(run_folder, stage)
        assert again == {name: own[name] for name in again} and len(again) >= 4


def test_the_largest_scale_that_passes_every_gate_is_taken():
    def line(scale, *verdicts):
        return {"scale": scale, "gates": {str(n): {"verdict": verdict} for n, verdict in enumerate(verdicts)}}

    lines = [line(0), line(0.5, "passed", "passed"), line(0.75, "passed", "passed"), line(1, "passed", "undecided")]
    assert frontier.largest(lines) == 0.75
    assert frontier.largest(lines[:1]) is None and frontier.largest([line(1, "missed")]) is None


@pytest.mark.slow
def test_bad_input_is_one_line_and_writes_nothing(run_folder, tmp_path, capsys):
    folder = copy_of(run_folder, tmp_path)
    config = folder / "adapter_config.json"
    saved = config.read_text("utf-8")

    def error_of(*argv):
        before = sorted(path.name for path in folder.iterdir())
        assert frontier.main([str(folder), *argv]) == 2
        assert sorted(path.name for path in folder.iterdir()) == before
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
        return line

    assert "nonsense" in error_of("--gates", "nonsense=1")
    config.write_text(json.dumps(json.loads(saved) | {"use_dora": True}), encoding="utf-8")
    error_of("--scales", "0.5")
    config.write_text(saved, encoding="utf-8")
    run = folder / "run.json"
    saved = run.read_text("utf-8")
    run.write_text(json.dumps(json.loads(saved) | {"base": "another"}), encoding="utf-8")
    assert "is not the base that the run had" in error_of()
    run.write_text(saved, encoding="utf-8")
    (folder / "metrics.json").unlink()
    assert "metrics.json" in error_of()


def test_a_run_file_that_was_edited_is_one_line(tmp_path):
    (tmp_path / "run.json").write_text('{"script": "sft_train.py", "args": {}, "commits": ["a"]}', encoding="utf-8")
    (tmp_path / "metrics.json").write_text('{"final": {"val_loss": 1}}', encoding="utf-8")
    with pytest.raises(InputError, match="no finished run"):
        frontier.finished_run(tmp_path)
