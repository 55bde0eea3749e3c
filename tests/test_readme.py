"""Everything that the README and the logs tell a user to type or to look at is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from llm_alignment import files

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
LAUNCHERS = (["poetry", "run", "python"], ["python"], ["accelerate", "launch", "--num_processes", "2"])


def commands():
    lines = [line.strip() for line in README.split("\n") if line.startswith("    ")]
    parts = [part.strip() for line in lines for part in line.split(" ; ")]
    return [part for part in parts if re.match(r"(poetry run python|python|accelerate launch) ", part)]


def logged():
    rows = files.read_records(ROOT / "experiments" / "logged_runs.jsonl")
    return [row["command"] for row in rows if row["command"]]


@pytest.mark.parametrize("command", commands() + logged())
def test_commands_parse(command, monkeypatch):
    """As written, by the script's own parser."""
    words = shlex.split(command)
    launcher = next(launcher for launcher in LAUNCHERS if words[: len(launcher)] == launcher)
    script, *flags = words[len(launcher) :]
    if script == "-m":
        assert flags[0] in {"pip", "pytest"}
        return
    monkeypatch.syspath_prepend(ROOT / "experiments")
    assert (ROOT / script).is_file()
    module = importlib.import_module(Path(script).stem)
    args, rest = module.build_parser().parse_known_args(flags)
    if rest:  # rerun.py hands what it does not know to the script of the run
        assert script == "experiments/rerun.py"
        importlib.import_module("sft_train").build_parser().parse_args(rest)


def test_there_are_commands_for_every_script():
    text = "\n".join(commands())
    for script in ("sft_train.py", "dpo_train.py", "dpo_train_mt.py", "dpo_train_mt_v2.py", "mtbench_eval.py"):
        assert script in text
    assert "python -m pip install -e . ; python sft_train.py --demo" in README
    assert 'python -m pip install -e ".[test]" ; python -m pytest' in README


def test_files_that_are_named_exist():
    written_by_a_run = {
        "run.json", "metrics.json", "train_log.jsonl", "mt_bench_ru.json", "mt_bench_en.json",
        "experiments/sft_experiments.jsonl", "experiments/dpo_experiments.jsonl",
    }  # fmt: skip
    named = set(re.findall(r"`([\w/.-]+\.(?:py|md|jsonl|json)|[\w/]+/)`", README))
    named |= set(re.findall(r"\]\(([\w/.-]+)\)", README))
    assert len(named) > 10
    for name in named - written_by_a_run:
        assert (ROOT / name).exists(), name


def test_flags_that_are_named_exist():
    known = " ".join(
        importlib.import_module(name).build_parser().format_help()
        for name in ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2", "mtbench_eval")
    )
    for flag in set(re.findall(r"`(--\w+)", README)) - {"--compare"}:
        assert flag in known, flag
