"""Flags: types, and defaults that the help texts state as they are."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import sft_train
from dpo_train import PairChoice
from llm_alignment import flags
from llm_alignment.flags import neutral_flags

SCRIPTS = ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2", "mtbench_eval")


@pytest.fixture
def refused(capsys):
    """Gives the one line with which `parse` refuses these words."""

    def line(parse, *words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(words)
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and shown.count("\n") == 1
        return shown

    return line


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
    ("sft_train", ("measured", "asked"), "exp_tag num_proc",
     "mtbench_ru mtbench_max_tokens reward_model baseline_eval_samples do_retention retention_file retention_limit"),
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
    found = neutral_flags(parser, *counted_by)
    assert found >= set(neutral.split()) and not found & set(counted.split())
    assert set(counted.split()) <= vars(parser.parse_args([])).keys()


def test_every_flag_says_whether_it_changes_what_is_trained():
    words = {True, False, "measured", "asked", "reddit", "finance", "general"}
    for script in SCRIPTS:
        for group in importlib.import_module(script).build_parser()._action_groups:
            names = {action.dest for action in group._group_actions}
            assert names <= {"help"} or group.trains in words, f"{script}: {names}"


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
slow = {{"torch", "transformers", "numpy", "scipy", "rich", "matplotlib", "datasets", "yaml"}} & set(sys.modules)
sys.exit("imports " + ", ".join(slow) if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--output_dir" in done.stdout and "--modle" in done.stderr and "--quant" in done.stderr
    assert "did you mean --model?" in done.stderr and done.stderr.count("\n") == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_a_dozen_flags_and_help_all_every_one(script, capsys):
    build_parser = importlib.import_module(script).build_parser
    shown = {}
    for flag in ("--help", "--help_all", "--help-all", "--version"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([flag])
        assert stop.value.code == 0
        shown[flag] = capsys.readouterr().out
    named = {flag: set(re.findall(r"^  (--[\w-]+)", text, re.M)) for flag, text in shown.items()}
    assert {action.option_strings[0] for action in build_parser()._actions} == named["--help_all"] | {"-h"}
    assert named["--help_all"] == named["--help-all"] and 12 <= len(named["--help"]) <= 16
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", shown["--version"])


SPELLINGS = [
    (
        "sft_train",
        "--learning-rate 1e-3 --no-4bit --kl_coef=0",
        {"learning_rate": 1e-3, "no_4bit": True, "kl_coef": 0},
    ),
    ("dpo_train", "--no-do-eval --no_do_mtbench", {"do_eval": False, "do_mtbench": False}),
    ("dpo_train", "--no-gradient-checkpointing", {"gradient_checkpointing": "off"}),
    ("sft_train", "--mtbench_ru a --mtbench_questions_limit 3", {"mtbench_ru": "a", "mtbench_questions_limit": 3}),
    ("sft_train", "--mtbench_file a --mtbench_limit 3", {"mtbench_ru": "a", "mtbench_questions_limit": 3}),
    ("sft_train", "--logging_steps 7", {"kl_log_interval": 7}),
    ("dpo_train", "--logging_steps 7", {"logging_steps": 7}),
    ("sft_train", "--skip_baseline_eval", {"skip_baseline_eval": True}),
    ("sft_train", "--no-eval_baseline", {"skip_baseline_eval": True}),
    ("sft_train", "--no-eval_baseline --eval_baseline", {"skip_baseline_eval": False}),
    ("mtbench_eval", "--mtbench_file a --mtbench_limit 3", {"questions": "a", "mtbench_questions_limit": 3}),
    ("mtbench_eval", "--questions a --limit 3", {"questions": "a", "mtbench_questions_limit": 3}),
]


@pytest.mark.parametrize(("script", "words", "expected"), SPELLINGS)
def test_one_flag_has_several_spellings(script, words, expected):
    args = importlib.import_module(script).build_parser().parse_args(words.split())
    assert vars(args).items() >= expected.items()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_config_can_say_what_every_flag_says(script, tmp_path):
    """Of each flag its default, and for those that are on or off the other one, in YAML and in JSON."""
    parser = importlib.import_module(script).build_parser()
    known = parser.format_help()
    defaults = {name: value for name, value in vars(parser.parse_args([])).items() if f"--{name}" in known}
    assert defaults["dtype"] == "auto"
    values = {name: not value if isinstance(value, bool) else value for name, value in defaults.items()}
    yaml = "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())
    for name, text in (("a.yaml", yaml), ("a.json", json.dumps(values))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert vars(parser.parse_args(["--config", str(tmp_path / name)])).items() >= values.items()


def test_the_command_line_wins_over_a_config_and_the_record_gets_its_flags(tmp_path, monkeypatch):
    config, run = tmp_path / "a.yaml", tmp_path / "run.json"
    config.write_text("learning-rate: 1e-3\nseed: 7  # comment\ndo_eval: false\n", encoding="utf-8")
    run.write_text('{"script": "dpo_train.py", "argv": ["--seed", "3"], "args": {"seed": 3}}', encoding="utf-8")
    words = ["--seed", "8", "--config", str(config), f"--config={run}"]
    monkeypatch.setattr(sys, "argv", ["dpo_train.py", *words])
    args = flags.parse_arguments(importlib.import_module("dpo_train").build_parser(), None, {})
    assert (args.learning_rate, args.seed, args.do_eval) == (1e-3, 8, False) and "config" not in args
    assert sys.argv[1:] == ["--learning_rate=1e-3", "--seed=7", "--no-do_eval", "--seed", "3", "--seed", "8"]


CONFIGS = [
    ("learnin_rate: 1", "did you mean --learning_rate?"), ("target_modules: [q_proj, v_proj]", "target_modules"),
    ("lora: {r: 8}", "lora"), ("do_eval: maybe", "do_eval: maybe"), ("seed: -1", "--seed"), ("- seed", "flag: value"),
    ("a: b: c", "line 1"), (b"\xff\xfe", "utf-8"), (None, "No such file"), ("dtype: int8", "--dtype"),
    ("config: a.yaml", "unknown flag config"), ("argv: [seed: 4]", "list of texts"),
    ("argv: [--config, a.yaml]", "another file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "named"), CONFIGS)
def test_a_config_that_cannot_be_read_is_one_line(text, named, tmp_path, refused):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert named in refused(importlib.import_module("dpo_train").build_parser().parse_args, "--config", str(path))


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


REFUSED = [
    (flags.ratio, "-0.1 1.5 nan"), (flags.dropout, "1"), (flags.positive_ratio, "0"), (flags.positive(int), "0"),
    (flags.positive(float), "inf 1e10"), (flags.not_negative(float), "-1 nan"), (flags.temperature, "1e-320 -1 nan"),
    (flags.positive_temperature, "0 1e-9"), (flags.not_negative(int), "2147483648"), (flags.seed, "4294967296 -1"),
    (flags.steps_or_share, "-1 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("parse", "texts"), REFUSED)
def test_numbers_beyond_their_limits(parse, texts):
    for text in [*texts.split(), "9" * 400]:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_numbers_at_their_limits():
    assert flags.ratio("0.5") == 0.5 and flags.ratio("0") == 0 and flags.ratio("1") == flags.positive_ratio("1") == 1
    assert flags.positive(int)("3") == 3 and flags.not_negative(float)("0") == flags.temperature("0") == 0
    assert flags.steps_or_share("0.1") == 0.1 and flags.steps_or_share("3") == 3 and flags.temperature("0.7") == 0.7
    assert flags.seed("4294967295") == 2**32 - 1


def test_a_tracker_that_is_not_installed_is_told_with_the_flags(monkeypatch, refused):
    parser = importlib.import_module("dpo_train").build_parser()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, message in (("wandb", "python -m pip install wandb"), ("mlflow", "invalid choice")):
        assert message in refused(parser.parse_args, "--report_to", name)
    assert parser.parse_args(["--report_to", "none"]).report_to == "none"


def test_an_empty_text_is_told(refused):
    parser = importlib.import_module("mtbench_eval").build_parser()
    for flag in ("--output_dir", "--model", "--questions", "--model_revision"):
        assert f"{flag}: it is empty" in refused(lambda words: flags.parse_arguments(parser, words, {}), flag, "")
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
    local = [
        flags.parse_arguments(sft_train.build_parser(), [*more], demo, sft_train.of_local_data)
        for more in ([], ["--dataset", "demo_1"], ["--dataset", "demo_1", "--sample_ratio", "0.5"])
    ]
    assert [(args.sample_ratio, args.val_split) for args in local] == [(0.25, 0.01), (1.0, None), (0.5, None)]
    untouched = importlib.import_module("sft_train").build_parser()
    assert flags.parse_arguments(untouched, [], demo).batch == 8


def test_settings_within_settings_are_filled_by_their_own_flags():
    kind = dataclasses.make_dataclass("Outer", [("inner", PairChoice), ("beta", float), ("more", int, 3)])
    choice = dict(no_train=False, eval_pairs=2, limit_pairs=5, group_by_table=False, seed=7, thinking=True)
    args = argparse.Namespace(beta=0.1, **choice)
    filled = flags.fill(kind, args)
    assert filled.inner == PairChoice(**choice)
    assert (filled.beta, filled.more) == (0.1, 3)
    assert flags.fill(kind, args, inner=None).inner is None
