"""What the demo is there to show: SFT on a foreign style forgets, the KL anchor holds, and DPO mends a habit."""

import pytest

import dpo_train
import sft_train


@pytest.mark.slow
def test_the_anchor_holds_what_sft_alone_forgets(tmp_path, monkeypatch):
    """Half of the demo's steps at one seed; experiments/demo/README.md has the whole of it at three."""
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    falls, gains, drifts = {}, {}, {}
    for kl_coef in ("0", "0.5"):
        argv = ["--demo", "--kl_coef", kl_coef, "--epochs", "0.4", "--seed", "1", "--mtbench_questions_limit", "24"]
        argv += ["--output_dir", str(tmp_path / kl_coef), "--exp_log", str(tmp_path / "log.jsonl")]
        record = sft_train.main(argv)
        falls[kl_coef] = record["baseline"]["mtbench"]["avg"] - record["final"]["mtbench"]["avg"]
        gains[kl_coef] = record["baseline"]["val_loss"] - record["final"]["val_loss"]
        drifts[kl_coef] = record["final"]["drift"]
        assert record["baseline"]["mtbench"]["avg"] > 7  # the base answers most of it rightly
    assert falls["0"] > 1
    assert 0 < drifts["0.5"] < drifts["0"]
    assert falls["0.5"] <= falls["0"] / 2
    assert gains["0.5"] >= gains["0"] / 2


@pytest.mark.slow
def test_dpo_mends_the_habit_of_the_wrong_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    argv = ["--demo", "--output_dir", str(tmp_path / "out"), "--exp_log", str(tmp_path / "log.jsonl")]
    record = dpo_train.main([*argv, "--no-do_mtbench", "--no-do_instruct"])
    assert record["delta"]["tatqa_em"]["mean"] > 5 and record["delta"]["tatqa_em"]["p"] < 0.01
    before, after = (record[stage]["tatqa"]["by_type"]["span"]["em"] for stage in ("baseline", "final"))
    assert before < 40 < 45 < after
