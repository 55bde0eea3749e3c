"""Multi-task DPO: arguments and whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import logged_commands, read_rows, run_error, write_rows

import dpo_train_mt
import dpo_train_mt_v2
from dpo_train_mt import main, parse, warn_of_unused_flags

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def test_logged_commands_parse_as_they_stand():
    commands = logged_commands("dpo_train_mt.py")
    assert len(commands) == 8
    parsed = {name: parse(argv) for name, argv in commands.items()}
    assert parsed["reddit_only"].output_dir == "qwen3_reddit_finance_dpo"
    assert parsed["hybrid_2way"].output_dir == "qwen3_reddit_finance_dpo_hybrid"
    assert parsed["hybrid_3way"].output_dir == "qwen3_reddit_finance_dpo_3way_hybrid"
    assert parsed["hybrid_balanced"].hybrid_ratio == 0.5


def test_demo_fills_only_what_was_not_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse(["--demo", "--use_hybrid", "--reddit_limit", "7"])
    assert (args.output_dir, args.reddit_limit) == ("demo_dpo_mt_hybrid_1", 7)
    (tmp_path / args.output_dir).mkdir()
    assert parse(["--demo", "--use_hybrid"]).output_dir == "demo_dpo_mt_hybrid_2"
    for folder in ("mine", "mine/"):
        assert parse(["--demo", "--use_hybrid", "--output_dir", folder]).output_dir == "mine_hybrid"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_hybrid", "--use_3way_hybrid"], "one mix at a time"),
        (["--use_3way_hybrid", "--reddit_ratio", "0.5"], "sum to 1.1"),
        (["--use_hybrid", "--reddit_sample_rate", "0.001"], "--reddit_sample_rate 0.001: nothing is left to train on"),
        (["--instruct_limit", "0"], "--instruct_limit 0: nothing is left to ask about"),
        (["--use_hybrid", "--hybrid_ratio", "1.5"], "1.5 is not within [0, 1]"),
    ],
)
def test_impossible_mixes(flags, message, tmp_path, capsys):
    argv = ["--demo", "--output_dir", str(tmp_path / "run"), "--exp_log", str(tmp_path / "log.jsonl"), *flags]
    assert message in run_error(capsys, main, *argv)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_the_mix_does_not_read_are_named(logged):
    argv = ["--hybrid_ratio", "0.5", "--general_pairs=3", "--tatqa_split", "test", "--reddit_limit", "7"]
    warn_of_unused_flags(parse(argv), argv)
    assert [line.split()[0] for line in logged.messages] == ["--hybrid_ratio", "--general_pairs", "--tatqa_split"]
    logged.clear()
    argv = ["--use_hybrid", "--hybrid_ratio", "0.5"]
    warn_of_unused_flags(parse(argv), argv)
    assert not logged.messages


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


SMALL = [
    "--no_4bit", "--limit_pairs", "24", "--eval_limit", "12", "--mtbench_limit", "4", "--instruct_limit", "6",
    "--reddit_limit", "6", "--instruct_max_tokens", "12", "--reddit_max_tokens", "12", "--mtbench_max_tokens", "12",
    "--retention_limit", "4", "--retention_max_tokens", "4",
]  # fmt: skip


@pytest.mark.slow
def test_a_three_way_run_from_start_to_finish(tmp_path, capsys, cache):
    argv = ["--demo", "--use_3way_hybrid", "--output_dir", str(tmp_path / "run"), *SMALL]
    argv += ["--exp_log", str(tmp_path / "log.jsonl"), "--mix_policy", "exact"]
    argv += ["--finance_instruct_pairs", "12", "--general_pairs", "40"]
    argv += ["--eval_save_json", str(tmp_path / "tatqa.jsonl")]
    record = main(argv)
    folder = tmp_path / "run_3way_hybrid"
    assert record["status"] == "completed" and record["output_dir"] == str(folder)
    for name in ("tatqa", "mtbench", "finance_instruct", "reddit"):
        assert record["baseline"][name]["n"] == record["final"][name]["n"] == record["delta"][name]["n"] > 0
        assert (folder / f"{name}_baseline.jsonl").exists() and (folder / f"{name}_final.jsonl").exists()
    pairs = read_rows(folder / "train_pairs.jsonl")
    assert len(pairs) == 24 and {pair["uid"].split(":")[0] for pair in pairs} == {"reddit", "finance", "general"}
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["r"] == 8
    for stage in ("baseline", "post"):
        saved = (tmp_path / f"tatqa_{stage}.jsonl").read_text("utf-8").splitlines()
        assert len(saved) == 12 and json.loads(saved[0])["context"]
    for name, kept in {"reddit": {"title", "subreddit", "reference"}, "finance_instruct": {"reference"}}.items():
        rows = read_rows(folder / f"{name}_final.jsonl")[1:]
        assert len(rows) == 6 and all(kept <= row.keys() for row in rows)
    out = capsys.readouterr().out
    assert "asked 40-30-30, reached 40-30-30: 16 reddit, 12 finance, 12 general" in out
    for title in ("TAT-QA", "MT-Bench", "Finance-Instruct", "Reddit replies"):
        assert title in out

    error = run_error(capsys, main, *argv)
    assert "holds another run" in error
    error = run_error(capsys, main, *argv, "--resume_from_checkpoint", "auto", "--instruct_limit", "7")
    assert "instruct_limit: 6 -> 7" in error


@pytest.mark.parametrize("script, mix", [(dpo_train_mt, ["--use_3way_hybrid"]), (dpo_train_mt_v2, [])])
def test_texts_that_spell_the_templates_tokens_are_named_for_every_source(script, mix, tmp_path, capsys):
    argv, said = ["--demo", *mix, "--dry_run", "--output_dir", str(tmp_path / "run"), *SMALL], "of <|im_end|> so"
    for source, field in (("reddit", "body"), ("finance", "assistant"), ("general", "chosen")):
        rows = read_rows(Path(parse(["--demo"]).__dict__[f"{source}_dataset"]))
        write_rows(tmp_path / f"{source}.jsonl", [{**rows[0], field: said}, *rows])
        argv += [f"--{source}_dataset", str(tmp_path / f"{source}.jsonl")]
    script.main(argv)
    found = capsys.readouterr().out
    for source in ("reddit", "finance", "general"):
        assert f"{source}.jsonl:1 (a turn contains the chat template's own '<|im_end|>')" in found


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    main(["--demo", "--use_hybrid", "--dry_run", "--output_dir", str(tmp_path / "run"), *SMALL])
    out = capsys.readouterr().out
    assert "mix (fill): asked 70-30" in out and "steps: 3 of 8 pairs" in out and "reddit: 6 questions" in out
    assert list(tmp_path.iterdir()) == []
