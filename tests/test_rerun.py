"""Logged runs are found and repeated as they were; campaigns; records of the original scripts."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_records import EXPERIMENTS, commands, make_record, records, rerun, write_log

from llm_alignment import files

LOGGED = {run["id"]: run for run in records.load_records(records.LOGGED_RUNS)}
COMMANDS = {name: run["command"] for name, run in LOGGED.items() if run["command"]}


def powershell_words(line: str) -> list[str]:
    """The arguments that PowerShell gives a program for `line` (about_Parsing, about_Quoting_Rules).

    Raises ValueError where PowerShell would expand, pipe, or otherwise not take the characters as they are.
    """
    single, double = "'\u2018\u2019\u201a\u201b", '"\u201c\u201d\u201e'
    words, i = [], 0
    while i < len(line):
        if line[i] in " \t":
            i += 1
            continue
        start, word = i, ""
        while i < len(line) and line[i] not in " \t":
            c = line[i]
            if c in single or c in double:
                quotes, at_start, i = (single if c in single else double), i == start, i + 1
                while line[i] not in quotes or line[i + 1 : i + 2] in (*quotes,):
                    if quotes is double and line[i] in "$`":
                        raise ValueError(f"{line[i]} is expanded within double quotes")
                    i += 2 if line[i] in quotes else 1
                    word += line[i - 1]
                i += 1
                if at_start:  # a string at the start of an argument is all of it
                    break
            elif c in ";|&<>(){}$`" or (i == start and c in "@#~\u2013\u2014\u2015"):
                raise ValueError(f"{c} has a meaning of its own")
            elif c == ",":
                break
            else:
                word += c
                i += 1
        bare = line[start:i]
        words += re.split(r"(?=\.)|(?<=:)", bare, maxsplit=1) if re.match(r"-[A-Za-z_?]+[.:]", bare) else [word]
        if line[i : i + 1] == ",":  # an array: its items become arguments of their own
            i += 1
    return words


def test_the_powershell_rules_of_this_test_split_what_powershell_splits():
    assert powershell_words("a 'b c' \"d e\" 'it''s' x=1") == ["a", "b c", "d e", "it's", "x=1"]
    assert powershell_words("--target_modules q_proj,v_proj") == ["--target_modules", "q_proj", "v_proj"]
    assert powershell_words("'a'b") == ["a", "b"]
    assert powershell_words("-x.y") == ["-x", ".y"]
    for line in ('"$home"', "a;b", "a`b", "(a)", "@a"):
        with pytest.raises(ValueError):
            powershell_words(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_logged_command_is_printed_to_the_letter_and_both_shells_read_it_alike(name, capsys):
    assert rerun.main([name, "--print"]) == 0
    printed = capsys.readouterr().out
    assert printed == COMMANDS[name] + "\n"
    assert powershell_words(printed.strip()) == shlex.split(printed) == COMMANDS[name].split(" ")


@given(st.lists(st.text(max_size=12) | st.text(alphabet="a1 '\"$`!\\,;-.:#@~%\u2019\u201c\u2014", max_size=8)))
def test_any_argument_reads_the_same_in_both_shells_or_is_refused(words):
    try:
        line = commands.command_line("sft_train.py", words)
    except files.InputError:
        return
    assert "\n" not in line
    assert shlex.split(line)[4:] == words
    assert powershell_words(line)[4:] == words


@pytest.mark.parametrize(
    "word", ["it's", "C:\\new folder", "q_proj,v_proj", "C:\\O'Brien\\runs", 'say "hi"', "100%", "$x", "", "ответ"]
)
def test_ordinary_arguments_can_be_written_for_both_shells(word):
    line = commands.command_line("sft_train.py", [word])
    assert shlex.split(line)[4:] == powershell_words(line)[4:] == [word]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--kl_coef", "0.05"], "--a 1 --kl_coef 0.05 --do_eval"),
        (["--kl_coef=0.05"], "--a 1 --kl_coef=0.05 --do_eval"),
        (["--no-do_eval"], "--a 1 --kl_coef 0.02 --no-do_eval"),
        (["--seed", "-1", "--dry_run"], "--a 1 --kl_coef 0.02 --do_eval --seed -1 --dry_run"),
    ],
)
def test_changes_replace_a_flag_in_its_place_or_are_added(changes, expected):
    assert " ".join(commands.apply_changes(["--a", "1", "--kl_coef", "0.02", "--do_eval"], changes)) == expected


def test_an_empty_value_is_not_a_word_of_its_own():
    """Windows PowerShell 5.1 would drop it, and the next flag would become the value."""
    assert commands.join_empty(["--load_adapter", "", "--seed", "1"]) == ["--load_adapter=", "--seed", "1"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_logged_command_is_accepted_by_its_script(name):
    script = importlib.import_module(LOGGED[name]["script"].removesuffix(".py"))
    script.build_parser().parse_args(records.run_arguments(LOGGED[name]))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["progressive_2stage"], ["not logged", "stage1.beta 0.01", "Qwen/Qwen3-1.7B", "progressive_2stage_1"]),
        (["S9"], ["S9", "--list"]),
        (["nowhere.jsonl:3"], ["nowhere.jsonl"]),
        (["logged_runs.jsonl:4000"], ["4000"]),
        (["S4", "0.05"], ["0.05", "--flag value"]),
    ],
)
def test_what_cannot_be_rerun_is_one_line_and_exit_code_2(argv, words, capsys):
    assert rerun.main([*argv, "--print"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words)


@pytest.fixture
def laboratory(tmp_path, monkeypatch) -> Path:
    """A project folder with an empty experiments/ folder that rerun.py and report.py take for theirs."""
    (tmp_path / "experiments").mkdir()
    for module in (records, rerun):
        monkeypatch.setattr(module, "HERE", tmp_path / "experiments")
    return tmp_path


@pytest.mark.parametrize("name", [name for name, run in LOGGED.items() for _ in run.get("aliases", [])])
def test_a_published_run_is_found_by_its_aliases(name):
    for alias in LOGGED[name]["aliases"]:
        assert records.find_run(alias)["id"] == name


def test_a_record_is_found_by_its_output_folder_and_without_a_tag_called_by_it(laboratory, capsys):
    folder = laboratory / "runs" / "my run"
    record = make_record("", output_dir=str(folder), argv=["--seed", "2"])
    write_log(laboratory / "experiments" / "sft_experiments.jsonl", record)
    for name in ("my run", str(folder)):
        assert rerun.main([name, "--print"]) == 0
        assert capsys.readouterr().out == "poetry run python sft_train.py --seed 2\n"
    rerun.main(["--list"])
    assert "  my run  " in capsys.readouterr().out


def test_a_record_is_found_by_tag_and_by_line_and_the_newest_tag_counts(laboratory, capsys):
    log = write_log(
        laboratory / "experiments" / "sft_experiments.jsonl",
        make_record("twice", ts="2025-01-02T00:00:00Z", argv=["--seed", "2"]),
        make_record("twice", ts="2025-01-01T00:00:00Z", argv=["--seed", "1"]),
    )
    for name in ("twice", "sft_experiments.jsonl:1", f"{log}:1"):
        assert rerun.main([name, "--print"]) == 0
        assert capsys.readouterr().out == "poetry run python sft_train.py --seed 2\n"
    assert rerun.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "sft_experiments.jsonl:2" in listed and "twice" in listed and "S4" in listed


def test_a_rerun_uses_this_python_and_gives_back_the_exit_code(laboratory, capfd):
    script = "import sys; print(sys.executable, sys.argv[1:]); sys.exit(7)"
    (laboratory / "sft_train.py").write_text(script, encoding="utf-8")
    write_log(
        laboratory / "experiments" / "sft_experiments.jsonl", make_record("mine", argv=["--a", "x y", "--b", "1"])
    )
    assert rerun.main(["mine", "--b", "2"]) == 7
    printed, ran = capfd.readouterr().out.strip().split("\n")
    assert printed == "poetry run python sft_train.py --a 'x y' --b 2"
    assert ran == f"{sys.executable} ['--a', 'x y', '--b', '2']"


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_lets_the_script_save_and_gives_back_130(laboratory):
    (laboratory / "sft_train.py").write_text(
        "import pathlib, sys, time\n"
        "try:\n    print('ready', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.6); pathlib.Path(__file__).with_name('saved').touch(); sys.exit(130)\n",
        encoding="utf-8",
    )
    log = write_log(laboratory / "log.jsonl", make_record("mine"))
    code = f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import pathlib, records, rerun\n"
    code += f"records.HERE = rerun.HERE = pathlib.Path({str(laboratory / 'experiments')!r}); sys.exit(rerun.main([{f'{log}:1'!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )  # fmt: skip
    while "ready" not in process.stdout.readline():
        pass
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (laboratory / "saved").exists()


def test_a_line_torn_by_a_crash_is_skipped_with_a_warning_and_the_rest_is_used(tmp_path, logged):
    log = write_log(tmp_path / "log.jsonl", make_record("one"))
    with log.open("ab") as file:
        file.write(json.dumps(make_record("torn")).encode()[:200])
    write_log(log, make_record("two"))
    runs = [run.name for run in records.load_runs([log]) if not run.is_logged]
    assert runs == ["one", "two"]
    assert "log.jsonl:2" in logged.text
    assert records.find_run(f"{log}:3")["tag"] == "two"


def test_nothing_heavy_is_imported_before_the_arguments_are_parsed():
    code = "import sys, rerun, report; print(*{'torch', 'numpy', 'scipy', 'matplotlib', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXPERIMENTS, check=True)
    assert run.stdout.strip() == ""
