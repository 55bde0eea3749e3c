"""Flags: types, and defaults that the help texts state as they are."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

from llm_alignment import flags

SCRIPTS = ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2", "mtbench_eval")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_states_the_defaults_that_there_are(script):
    """Those of the script, which are set after the shared groups were added."""
    parser = importlib.import_module(script).build_parser()
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help and "%(default)" not in action.help.replace(" (default: %(default)s)", ""), action.dest
    assert f"folder of the run (default: {parser.get_default('output_dir')})" in text
    assert "seed of everything random (default: 42)" in text and "(default: None)" not in text


# what a resumed run may change (neutral) and may not (counted), where the words of `counted_by` count
NEUTRAL = [
    ("sft_train", (), "exp_tag num_proc kl_log_interval mtbench_ru reward_model eval_steps", "seed kl_coef dataset"),
    ("sft_train", ("measured",), "exp_tag baseline_eval_samples", "mtbench_ru mtbench_max_tokens reward_model"),
    ("dpo_train", (), "do_eval eval_split mtbench_file instruct_limit eval_pairs reward_model", "beta pairs seed"),
    ("dpo_train_mt", ("asked", "reddit", "finance", "general"), "eval_limit mtbench_limit reddit_max_tokens dry_run",
     "do_eval eval_split mtbench_file instruct_limit instruct_max_tokens do_reddit reddit_limit reddit_score_margin"),
    ("dpo_train_mt_v2", ("asked", "general"), "stage force_continue stage1_beta reddit_score_margin hybrid_ratio",
     "general_dataset reddit_dataset reddit_min_post_chars do_reddit lora_dropout"),
    ("dpo_train_mt_v2", ("asked", "finance", "measured"), "general_dataset mix_policy eval_batch_size",
     "finance_temperature finance_dataset eval_limit mtbench_max_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "counted_by", "neutral", "counted"), NEUTRAL)
def test_the_group_of_a_flag_says_whether_it_changes_what_is_trained(script, counted_by, neutral, counted):
    parser = importlib.import_module(script).build_parser()
    found = flags.neutral_flags(parser, *counted_by)
    assert found >= set(neutral.split()) and not found & set(counted.split())
    assert set(counted.split()) <= vars(parser.parse_args([])).keys()


def test_every_flag_says_whether_it_changes_what_is_trained():
    words = {True, False, "measured", "asked", "reddit", "finance", "general"}
    for script in SCRIPTS:
        for action in importlib.import_module(script).build_parser()._actions:
            assert action.dest == "help" or action.trains in words, f"{script}: --{action.dest}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_misspelt_flags_answer_at_once(script):
    """Without torch and its family, whose import takes seconds; a bound in seconds would fail on a busy machine."""
    program = f"""
import sys, {script}
for argument, code in (("--help", 0), ("--modle", 2), ("--quant", 2)):
    try:
        {script}.main([argument])
    except SystemExit as stop:
        assert stop.code == code
    else:
        raise AssertionError(argument)
slow = {{"torch", "transformers", "numpy", "scipy", "rich", "matplotlib", "huggingface_hub"}} & set(sys.modules)
sys.exit("imports " + ", ".join(slow) if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--model_revision" in done.stdout and "--modle" in done.stderr and "--quant" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_type_of_the_weights_is_a_flag_of_every_script(script):
    parser = importlib.import_module(script).build_parser()
    assert parser.parse_args([]).dtype == "auto"
    assert parser.parse_args(["--dtype", "bf16"]).dtype == "bf16"
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "int8"])


@dataclasses.dataclass(frozen=True)
class Sampling:
    temperature: float
    seed: int
    top_p: float = 1.0


def test_fill_takes_fields_from_flags_and_from_more():
    args = argparse.Namespace(temperature=0.5, top_p=0.9, batch=8)
    assert flags.fill(Sampling, args, seed=3) == Sampling(0.5, 3, 0.9)
    assert flags.fill(Sampling, argparse.Namespace(seed=1), temperature=0.0) == Sampling(0.0, 1)
    with pytest.raises(TypeError, match="seed"):
        flags.fill(Sampling, args)


def test_types_of_numbers():
    assert flags.ratio("0.5") == 0.5 and flags.positive(int)("3") == 3 and flags.not_negative(float)("0") == 0
    for parse, text in (
        (flags.ratio, "1.5"),
        (flags.ratio, "nan"),
        (flags.dropout, "1"),
        (flags.positive(int), "0"),
        (flags.positive(float), "inf"),
        (flags.not_negative(float), "-1"),
        (flags.temperature, "1e-320"),
        (flags.positive_temperature, "0"),
        (flags.positive_temperature, "1e-9"),
        (flags.positive(int), "9" * 400),
        (flags.not_negative(int), "2147483648"),
        (flags.not_negative(float), "nan"),
        (flags.positive(float), "1e10"),
        (flags.ratio, "9" * 400),
        (flags.seed, "9" * 400),
        (flags.seed, "4294967296"),
        (flags.seed, "-1"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_a_tracker_that_is_not_installed_is_told_with_the_flags(monkeypatch, capsys):
    parser = importlib.import_module("dpo_train").build_parser()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, message in (("wandb", "python -m pip install wandb"), ("mlflow", "invalid choice")):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--report_to", name])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert parser.parse_args(["--report_to", "none"]).report_to == "none"


def test_an_empty_text_is_told(capsys):
    parser = importlib.import_module("mtbench_eval").build_parser()
    for flag in ("--output_dir", "--model", "--questions", "--model_revision"):
        with pytest.raises(SystemExit) as stop:
            flags.parse_arguments(parser, [flag, ""], {})
        assert stop.value.code == 2 and f"{flag}: it is empty" in capsys.readouterr().err
    assert flags.parse_arguments(parser, ["--adapter", ""], {}).adapter == ""


def test_a_demo_takes_the_first_free_folder_and_what_the_user_gave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = importlib.import_module("sft_train").build_parser()
    demo = {"output_dir": "demo", "batch": 16, "epochs": 0.8}
    first = flags.parse_arguments(parser, ["--demo", "--batch", "3"], demo)
    assert (first.output_dir, first.batch, first.epochs) == ("demo_1", 3, 0.8)
    (tmp_path / "demo_1").mkdir()
    assert flags.parse_arguments(parser, ["--demo"], demo).output_dir == "demo_2"
    assert flags.parse_arguments(parser, ["--demo", "--resume_from_checkpoint", "auto"], demo).output_dir == "demo_1"
    stages = importlib.import_module("dpo_train_mt_v2").build_parser
    folders = [
        flags.parse_arguments(stages(), ["--demo", *more], {"output_dir": "demo"}).output_dir
        for more in ([], ["--stage", "1"], ["--stage", "2"], ["--resume_from_stage", "3"])
    ]
    assert folders == ["demo_2", "demo_2", "demo_1", "demo_1"]
    untouched = importlib.import_module("sft_train").build_parser()
    assert flags.parse_arguments(untouched, [], demo).batch == 8
