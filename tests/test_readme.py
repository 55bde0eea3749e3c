"""Everything that the README, the guides and the logs tell a user to type or to look at is there."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from llm_alignment import files

README = (ROOT / "README.md").read_text("utf-8")
GUIDES = README + "".join((ROOT / name).read_text("utf-8") for name in ("CONTRIBUTING.md", "experiments/METHODS.md"))
SCRIPTS = ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2", "mtbench_eval")
LAUNCHERS = (
    ["poetry", "run", "python"],
    ["poetry", "run", "torchrun", "--nproc_per_node", "2"],
    ["python"],
    ["poetry", "run", "accelerate", "launch", "--num_processes", "2"],
)


def commands() -> list[str]:
    """The command lines of the README's indented blocks."""
    lines = [line.strip() for line in README.split("\n") if line.startswith("    ")]
    parts = [part.strip() for line in lines for part in line.split(" ; ")]
    return [part for part in parts if re.match(r"(poetry run (python|torchrun|accelerate launch)|python) ", part)]


def logged() -> list[str]:
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
    if rest:  # rerun.py takes the names of runs, and hands what it does not know to the script of the run
        assert script == "experiments/rerun.py"
        changes = list(itertools.dropwhile(lambda word: not word.startswith("--"), rest))
        importlib.import_module("sft_train").build_parser().parse_args(changes)


def test_there_are_commands_for_every_script():
    text = "\n".join(commands())
    for script in SCRIPTS:
        assert f"{script}.py" in text
    assert "    poetry install\n" in README and "poetry run python sft_train.py --demo" in README
    assert '    python -m pip install -e ".[test]"\n    python -m pytest\n' in README


def test_files_that_are_named_exist():
    written_by_a_run = {
        "run.json", "metrics.json", "train_log.jsonl", "mt_bench_ru.json", "mt_bench_en.json",
        "experiments/sft_experiments.jsonl", "experiments/dpo_experiments.jsonl",
    }  # fmt: skip
    named = set(re.findall(r"`([\w/.-]+\.(?:py|md|jsonl|json)|[\w/]+/)`", README))
    named |= set(re.findall(r"\]\(([\w/.-]+)", README))
    assert len(named) > 10
    for name in named - written_by_a_run:
        assert (ROOT / name).exists(), name


def test_flags_that_are_named_exist():
    known = " ".join(importlib.import_module(name).build_parser().format_help() for name in SCRIPTS)
    named = {flag for text in re.findall(r"`([^`\n]+)`", GUIDES) for flag in re.findall(r"(?<![\w-])--\w+", text)}
    assert len(named) > 30
    elsewhere = {
        "--publish",
        "--compare",
        "--detect",
        "--extra",
        "--grid",
        "--mine",
        "--same_data",
        "--seeds",
        "--plan",
        "--merged",
        "--power",
        "--import",
        "--list",
        "--no",
        "--run",
    }
    for flag in named - elsewhere:
        assert re.search(rf"{flag}\b", known), flag
