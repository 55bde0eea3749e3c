"""Logged runs are found and repeated as they were; campaigns; records of the original scripts."""

from __future__ import annotations

import functools
import json
import operator
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
from run_records import (
    EXPERIMENTS,
    make_dpo_record,
    make_record,
    records,
    report,
    rerun,
    write_log,
)

from llm_alignment import files
from llm_alignment.hub import adapter_files_sha256, files_sha256

LOGGED = {run["id"]: run for run in records.load_records(records.LOGGED_RUNS)}
COMMANDS = {name: run["command"] for name, run in LOGGED.items() if run["command"]}


# What both shells read as one argument: bare letters without a meaning, or single quotes around text without quotes.
WORD = r"""(?:[A-Za-z0-9_./:=+-]+|'[^'"\n\u2018-\u201f]*')"""


@pytest.fixture
def printed(capsys):
    """printed(ARGUMENTS): what rerun.py prints, with exit code 0."""

    def run(*argv: str) -> str:
        assert rerun.main([*argv]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_logged_command_is_printed_to_the_letter(name, printed):
    line = printed(name, "--print")
    assert line == COMMANDS[name] + "\n"
    assert re.fullmatch(f"{WORD}(?: {WORD})*", line.strip()) and shlex.split(line) == COMMANDS[name].split(" ")


@given(st.lists(st.text(max_size=12) | st.text(alphabet="a1 '\"$`!\\,;-.:#@~%\u2019\u201c\u2014", max_size=8)))
def test_any_argument_reads_the_same_in_both_shells_or_is_refused(words):
    try:
        line = records.command_line("sft_train.py", words)
    except files.InputError:
        return
    assert shlex.split(line)[4:] == words
    assert re.fullmatch(f"{WORD}(?: {WORD})*", line)


@pytest.mark.parametrize("word", ["C:\\new folder", "q_proj,v_proj", "C:\\runs\\", "100%", "$x", "", "-x.y", "ответ"])
def test_ordinary_arguments_can_be_written_for_both_shells(word):
    assert shlex.split(records.command_line("sft_train.py", [word]))[4:] == [word]


@pytest.mark.parametrize("word", ['say "hi"', "C:\\new folder\\", "it's", "it\u2019s", "two\nlines"])
def test_what_the_shells_read_differently_is_refused_and_shown_as_a_list(word, capsys):
    """PowerShell 5.1 escapes neither a double quote nor the backslash before the quote that it adds around blanks."""
    assert rerun.main(["S4", "--exp_tag", word, "--print"]) == 2
    assert repr(word) in capsys.readouterr().err
    shown = records.shown_command("sft_train.py", ["--exp_tag", word])
    assert json.loads(shown.removeprefix("sft_train.py ")) == ["--exp_tag", word]
    assert records.shown_command("sft_train.py", ["--load_adapter", "", "--seed", "1"]).endswith("= --seed 1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--kl_coef", "0.05"], "--a 1 --kl_coef 0.05 --do_eval"),
        (["--kl_coef=0.05"], "--a 1 --kl_coef=0.05 --do_eval"),
        (["--kl-coef", "0.05"], "--a 1 --kl-coef 0.05 --do_eval"),
        (["--no-do_eval"], "--a 1 --kl_coef 0.02 --no-do_eval"),
        (["--seed", "-1", "--dry_run"], "--a 1 --kl_coef 0.02 --do_eval --seed -1 --dry_run"),
    ],
)
def test_changes_replace_a_flag_in_its_place_or_are_added(changes, expected):
    assert " ".join(records.apply_changes(["--a", "1", "--kl_coef", "0.02", "--do_eval"], changes)) == expected


def test_an_empty_value_is_not_a_word_of_its_own():
    """Windows PowerShell 5.1 would drop it, and the next flag would become the value."""
    assert records.join_empty(["--load_adapter", "", "--seed", "1"]) == ["--load_adapter=", "--seed", "1"]


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
def project(tmp_path, monkeypatch) -> Path:
    """A project folder with an empty experiments/ folder that rerun.py and report.py take for theirs."""
    (tmp_path / "experiments").mkdir()
    for module in (records, rerun):
        monkeypatch.setattr(module, "HERE", tmp_path / "experiments")
    return tmp_path


@pytest.mark.parametrize("name", [name for name, run in LOGGED.items() for _ in run.get("aliases", [])])
def test_a_published_run_is_found_by_its_aliases(name):
    for alias in LOGGED[name]["aliases"]:
        assert records.find_run(alias)["id"] == name


def test_a_record_is_found_by_its_output_folder_and_without_a_tag_called_by_it(project, printed):
    folder = project / "runs" / "my run"
    record = make_record("", output_dir=str(folder), argv=["--seed", "2"])
    write_log(project / "experiments" / "sft_experiments.jsonl", record)
    for name in ("my run", str(folder)):
        assert printed(name, "--print") == "poetry run python sft_train.py --seed 2\n"
    assert "  my run  " in printed("--list")


def test_a_run_is_found_by_the_run_json_of_its_folder_wherever_it_was_started(project, capsys, monkeypatch, printed):
    folder = project / "far" / "away"
    folder.mkdir(parents=True)
    run = make_record("mine", output_dir="away", argv=["--seed", "7"])
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    monkeypatch.chdir(project)
    assert printed("far/away", "--print") == "poetry run python sft_train.py --seed 7\n"
    (folder / "run.json").write_text("{}", encoding="utf-8")
    assert rerun.main(["far/away", "--print"]) == 2
    assert "run.json" in capsys.readouterr().err


def test_a_tag_may_look_like_a_line_of_a_file(project, printed):
    write_log(project / "experiments" / "sft_experiments.jsonl", make_record("beta:2", argv=["--seed", "2"]))
    assert "--seed 2" in printed("beta:2", "--print")


def test_a_record_is_found_by_tag_and_by_line_and_the_newest_tag_counts(project, printed):
    twice = [make_record("twice", ts=f"2025-01-0{n}T00:00:00Z", argv=["--seed", str(n)]) for n in (2, 1)]
    log = write_log(project / "experiments" / "sft_experiments.jsonl", *twice)
    for name in ("twice", "sft_experiments.jsonl:1", f"{log}:1"):
        assert printed(name, "--print") == "poetry run python sft_train.py --seed 2\n"
    listed = printed("--list")
    assert "sft_experiments.jsonl:2" in listed and "twice" in listed and "S4" in listed


def test_a_console_that_does_not_know_russian_gets_question_marks(tmp_path):
    log = write_log(tmp_path / "log.jsonl", make_record("", argv=["--output_dir", "папка"]))
    command = [sys.executable, str(EXPERIMENTS / "rerun.py"), f"{log}:1", "--print"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 0 and b"--output_dir '?????'" in done.stdout


def test_a_rerun_uses_this_python_and_gives_back_the_exit_code(project, capfd):
    script = "import sys; print(sys.executable, sys.argv[1:]); sys.exit(7)"
    (project / "sft_train.py").write_text(script, encoding="utf-8")
    write_log(project / "experiments" / "sft_experiments.jsonl", make_record("mine", argv=["--a", "x y", "--b", "1"]))
    assert rerun.main(["mine", "--b", "2"]) == 7
    printed, ran = capfd.readouterr().out.strip().split("\n")
    assert printed == "poetry run python sft_train.py --a 'x y' --b 2"
    assert ran == f"{sys.executable} ['--a', 'x y', '--b', '2']"


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_lets_the_script_save_and_gives_back_130(project):
    (project / "sft_train.py").write_text(
        "import pathlib, sys, time\n"
        "try:\n    print('ready', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.6)\n    pathlib.Path(__file__).with_name('saved').touch()\n"
        "    sys.exit(130)\n",
        encoding="utf-8",
    )
    log = write_log(project / "log.jsonl", make_record("mine"))
    code = f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import pathlib, records, rerun\n"
    code += f"records.HERE = rerun.HERE = pathlib.Path({str(project / 'experiments')!r})\n"
    code += f"sys.exit(rerun.main([{f'{log}:1'!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )  # fmt: skip
    while "ready" not in process.stdout.readline():
        pass
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (project / "saved").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Campaigns
# ---------------------------------------------------------------------------------------------------------------------

# Stands for sft_train.py: appends its arguments to started.txt and a record to --exp_log. A run whose folder holds a
# file "fails" ends with exit code 1, "stops" with 143, as a run that SIGTERM has stopped.
FAKE_SCRIPT = """
import json, pathlib, sys
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
folder = pathlib.Path(value("--output_dir"))
with open(pathlib.Path(__file__).with_name("started.txt"), "a") as file:
    file.write(" ".join(words) + "\\n")
if "--dry_run" in words:
    print("steps: 12 of 128 sequences each")
    sys.exit()
folder.mkdir(exist_ok=True)
code = 1 if (folder / "fails").exists() else 143 if (folder / "stops").exists() else 0
record = json.loads(pathlib.Path(__file__).with_name("record.json").read_text())
record |= {"argv": words, "tag": value("--exp_tag") if "--exp_tag" in words else "", "output_dir": str(folder)}
record["args"]["kl_coef"] = value("--kl_coef")
record["args"]["learning_rate"] = value("--learning_rate")
record["args"]["seed"] = int(value("--seed")) if "--seed" in words else 42
record["status"] = {0: "completed", 1: "failed", 143: "interrupted"}[code]
with open(value("--exp_log"), "a") as file:
    file.write(json.dumps(record) + "\\n")
sys.exit(code)
"""


@pytest.fixture
def fake_sft(project, monkeypatch) -> Path:
    """`project` with a stand-in for sft_train.py, as the current folder."""
    (project / "sft_train.py").write_text(FAKE_SCRIPT, encoding="utf-8")
    (project / "record.json").write_text(json.dumps(make_record("")), encoding="utf-8")
    monkeypatch.chdir(project)
    return project


def started(folder: Path) -> list[str]:
    """The arguments of every start, one line each; the file is emptied."""
    lines = (folder / "started.txt").read_text(encoding="utf-8").splitlines()
    (folder / "started.txt").write_text("", encoding="utf-8")
    return lines


def test_a_campaign_runs_every_seed_once_goes_on_after_a_failure_and_where_it_was_stopped(fake_sft, capfd):
    argv = ["Exp1-1.7B", "S4", "--seeds", "1", "2", "--exp_log", "log.jsonl"]
    folders = [f"qwen3_1p7b_exp1_aggressive_seed{seed}" for seed in (1, 2)]
    folders += [f"qwen3_1p7b_s4_e2_mix20_kl003_lr1e-5_b12ga11_seed{seed}" for seed in (1, 2)]
    for folder, what in ((folders[0], "fails"), (folders[2], "stops")):
        (fake_sft / folder).mkdir()
        (fake_sft / folder / what).touch()
    assert rerun.main(argv) == 143
    first = started(fake_sft)
    assert [line.split("--output_dir ")[1].split()[0] for line in first] == folders[:3]
    assert ["--resume_from_checkpoint auto" in line for line in first] == [True, False, True]  # where a folder was
    assert "--seed 2" in first[1] and "--exp_tag Exp1-1.7B-seed2" in first[1]
    printed = capfd.readouterr()
    assert "exit code 1; continuing" in printed.out and "stopped at S4 seed 1" in printed.out
    (fake_sft / folders[0] / "fails").unlink()
    (fake_sft / folders[2] / "stops").unlink()
    assert rerun.main(argv) == 0
    again = started(fake_sft)
    assert [line.split("--output_dir ")[1].split()[0] for line in again] == [folders[0], folders[2], folders[3]]
    assert all(("--resume_from_checkpoint auto" in line) == (folders[3] not in line) for line in again)
    table = capfd.readouterr().out.partition("Status")[2]
    assert "Exp1-1.7B, 2 seeds" in table and "S4, 2 seeds" in table and table.isascii()
    assert rerun.main(argv) == 0 and started(fake_sft) == []
    assert capfd.readouterr().out.count("completed 2025-01-02") == 4


def test_a_campaign_names_the_runs_that_missed_a_gate_and_does_not_train_them_again(fake_sft, capfd):
    record = make_record("") | {"gates": {"retention": {"verdict": "missed"}}}
    (fake_sft / "record.json").write_text(json.dumps(record), encoding="utf-8")
    argv = ["Exp1-1.7B", "--seeds", "1", "2", "--exp_log", "log.jsonl"]
    assert rerun.main(argv) == 1 and len(started(fake_sft)) == 2
    assert rerun.main(argv) == 1 and started(fake_sft) == []
    assert "missed a gate: Exp1-1.7B seed 1, Exp1-1.7B seed 2" in capfd.readouterr().err


def test_a_run_on_another_model_of_the_same_name_is_not_the_completed_one(fake_sft):
    argv = ["S4", "--seeds", "1", "--exp_log", "log.jsonl", "--model", "m"]
    (fake_sft / "m").mkdir()
    (fake_sft / "m" / "config.json").write_text("{}", encoding="utf-8")
    record = make_record("") | {"base": files_sha256(fake_sft / "m")}
    (fake_sft / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert rerun.main(argv) == 0 and len(started(fake_sft)) == 1
    assert rerun.main(argv) == 0 and started(fake_sft) == []
    (fake_sft / "m" / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert rerun.main(argv) == 1 and len(started(fake_sft)) == 1  # what it records is of the old model again


@pytest.mark.parametrize("script, flags", [("dpo_train.py", "--adapter_trainable --load_adapter"),
                                           ("mtbench_eval.py", "--adapter")])  # fmt: skip
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_run_on_what_was_another_adapter_in_its_folder_is_not_completed(file, script, flags, project):
    adapter = project / "adapter"
    adapter.mkdir()
    (adapter / file).write_text("a", encoding="utf-8")
    argv = [*flags.split(), str(adapter)]
    record = make_record("mine", script) | {"argv": argv, "data": {"adapter": adapter_files_sha256(adapter)}}
    write_log(project / "experiments" / "dpo_experiments.jsonl", record)
    (planned,) = rerun.plan_runs(["mine"], [], [], {})
    assert planned.record()["status"] == "completed"
    (adapter / file).write_text("b", encoding="utf-8")
    assert not planned.record()


def test_a_model_of_the_hubs_cache_is_known_by_its_commit(project):
    model = project / "snapshots" / "0123abcd"
    model.mkdir(parents=True)
    record = make_record("mine") | {"argv": ["--model", str(model)], "base": "0123abcd"}
    write_log(project / "experiments" / "sft_experiments.jsonl", record)
    (planned,) = rerun.plan_runs(["mine"], [], [], {})
    assert planned.record()["status"] == "completed"


def test_the_flags_of_a_file_replace_those_of_the_run_too(project, printed):
    (project / "my.yaml").write_text("kl_coef: 0.5\n", encoding="utf-8")
    line = printed("S4", "--config", str(project / "my.yaml"), "--print")
    assert "--kl_coef=0.5" in line and line.count("--kl_coef") == 1
    runs = rerun.plan_runs(["S4"], [], ["--config", str(project / "my.yaml")], {"seed": ["1", "2"]})
    assert ["--kl_coef=0.5" in run.arguments for run in runs] == [True, True]


def test_a_grid_is_every_combination_with_folder_tag_and_row_of_its_own_and_continues_after_a_stop(fake_sft, capfd):
    argv = ["S4", "--grid", "kl_coef=0,0.3", "--grid", "learning_rate=1e-5,1e-4", "--seeds", "1", "2"]
    argv += ["--exp_log", "log.jsonl", "--output_dir", "g"]
    rows = [f"kl_coef{kl}-learning_rate{rate}" for kl in ("0", "0.3") for rate in ("1e-5", "1e-4")]
    cells = [f"{row.replace('-l', '_l')}_seed{seed}" for row in rows for seed in "12"]
    (fake_sft / f"g_{cells[5]}").mkdir()
    (fake_sft / f"g_{cells[5]}" / "stops").touch()
    assert rerun.main(argv) == 143
    assert [line.split("--output_dir g_")[1].split()[0] for line in started(fake_sft)] == cells[:6]
    (fake_sft / f"g_{cells[5]}" / "stops").unlink()
    assert rerun.main(argv) == 0
    tags = [cell.replace("_l", "-l").replace("_s", "-s") for cell in cells[5:]]
    assert [line.split("--exp_tag S4-")[1].split()[0] for line in started(fake_sft)] == tags
    (saved,) = (fake_sft / "experiments" / records.REPORT).glob("campaign_*.md")
    table = saved.read_text("utf-8")
    assert all(f"\n| S4-{row}, 2 seeds |" in table for row in rows) and "0.2500 \\[-0.1711, 0.6711]" in table
    words = " ".join(capfd.readouterr().out.split())
    assert words.count("S4 kl_coef 0.3 learning_rate 1e-4 seed 2") >= 2


@pytest.mark.parametrize(
    ("name", "argv", "folders"),
    [
        ("demo_sft_1", ["--demo"], ["demo_sft_1_seed1", "demo_sft_1_seed2"]),
        ("x", ["--demo"], ["demo_x_seed1", "demo_x_seed2"]),
        ("again-seed1", ["--output_dir", "o_seed1", "--exp_tag", "again-seed1"], ["o_seed1", "o_seed2"]),
    ],
)
def test_no_name_is_doubled_in_the_folder_of_a_seed(name, argv, folders, project):
    write_log(project / "experiments" / "sft_experiments.jsonl", make_record(name, argv=argv))
    planned = rerun.plan_runs([name], [1, 2], [], {})
    assert [str(run.output_dir) for run in planned] == folders


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_signal_stops_the_campaign_whatever_the_script_makes_of_it(fake_sft, capfd):
    """Windows has another exit code for Ctrl-C, and a run may just be complete when it comes."""
    stop = "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.3)\n"
    (fake_sft / "sft_train.py").write_text(stop + FAKE_SCRIPT, encoding="utf-8")
    assert rerun.main(["Exp1-1.7B", "S4", "--exp_log", "log.jsonl"]) == 130
    assert len(started(fake_sft)) == 1 and "stopped at Exp1-1.7B" in capfd.readouterr().out


def test_a_campaign_goes_on_when_its_reader_has_gone(fake_sft):
    code = f"import sys; sys.path[:0] = [{str(EXPERIMENTS)!r}, {str(EXPERIMENTS.parent)!r}]\n"
    code += "import pathlib, records, rerun\n"
    code += f"records.HERE = rerun.HERE = pathlib.Path({str(fake_sft / 'experiments')!r})\n"
    code += "sys.exit(rerun.main(['Exp1-1.7B', 'S4', '--exp_log', 'log.jsonl']))"
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run([sys.executable, "-c", code], stdout=write, check=False).returncode == 0
    os.close(write)
    assert len(started(fake_sft)) == 2


@pytest.mark.parametrize("argv", ["", "--list S4", "--import x S4", "--import x --seeds 1", "S4 S3 --same_data"])
def test_what_does_not_go_together_is_refused(argv, capsys):
    assert rerun.main(argv.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_plan_is_not_printed_as_commands_too(capsys):
    with pytest.raises(SystemExit) as error:
        rerun.main(["S4", "--print", "--plan"])
    assert error.value.code == 2 and "error: argument --plan" in capsys.readouterr().err


def test_the_plan_is_every_dry_run_and_the_sum_and_starts_nothing(fake_sft, capfd):
    argv = ["Exp1-1.7B", "S4", "--exp_log", "log.jsonl"]
    assert rerun.main([*argv, "--plan"]) == 0
    assert all("--dry_run" in line for line in started(fake_sft))
    assert "sum: 2 runs: 2 to start; 24 optimiser steps" in capfd.readouterr().out
    assert not (fake_sft / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["S4", "S9"], ["S9", "--list"]),
        (["S4", "S4"], ["S4", "output folder", "qwen3_1p7b_s4"]),
        (["reddit_only", "hybrid_2way", "hybrid_2way_optimized"], ["hybrid_2way_optimized", "_hybrid"]),
        (["S4", "--seeds", "1", "2", "1"], ["--seed 1"]),
        (["S4", "--seeds", "1", "--seed", "3"], ["--seed"]),
        (["S4", "--seeds", "1", "--grid", "seed=3,4"], ["--seed"]),
        (["S4", "--grid", "kl_coef=0,1", "--kl_coef", "3"], ["--kl_coef"]),
        (["S4", "--grid", "kl_coef=0,0"], ["--kl_coef 0"]),
        (["S4", "--grid", "kl_coeff=0,1"], ["S4", "sft_train.py", "--kl_coeff"]),
        (["S4", "--grid", "kl_coef=0,much"], ["S4", "--kl_coef", "much"]),
        (["S4", "--grid", "output_dir=a,b"], ["output_dir"]),
        (["S4", "--grid", "output-dir=a,b"], ["output_dir"]),
        (["S4", "--grid", "kl_coef=0,1", "--kl-coef", "3"], ["--kl_coef"]),
        (["S4", "progressive_2stage"], ["not logged", "progressive_2stage_1"]),
        (["S4", "S3", "--gone_flag", "3"], ["S4", "sft_train.py", "unrecognized arguments: --gone_flag"]),
    ],
)
def test_a_campaign_that_cannot_be_is_one_line_and_exit_code_2(argv, words, fake_sft, capsys):
    assert rerun.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words)
    assert not (fake_sft / "started.txt").exists()


def test_flags_with_dashes_are_planned_as_a_record_has_them():
    (planned,) = rerun.plan_runs(["S4"], [1], ["--lora-r", "4", "--no-4bit"], {})
    assert "--lora_r=4" in "=".join(planned.arguments) and "--no_4bit" in planned.arguments
    assert "--lora_r=8" not in "=".join(planned.arguments)


def test_the_same_command_is_known_in_another_order_and_with_resuming():
    same = records.same_command
    assert same(["--a", "1", "--b=2"], ["--b", "2", "--a", "1", "--resume_from_checkpoint", "auto"])
    assert same(["--load_adapter", ""], ["--load_adapter="])
    assert not same(["--a", "1"], ["--a", "2"]) and not same(["--a", "1"], ["--a", "1", "--b"])


# ---------------------------------------------------------------------------------------------------------------------
# Records of the original scripts
# ---------------------------------------------------------------------------------------------------------------------

OLD_RUN = {
    "ts": "2025-09-01T10:00:00",
    "tag": "old_beta",
    "model": "Qwen/Qwen3-1.7B",
    "params": {
        "beta": 0.02, "epochs": 1, "batch": 1, "grad_acc": 32, "learning_rate": 5e-06, "use_4bit": False,
        "use_chat_template": True, "lora": {"r": 16, "alpha": 32, "dropout": 0.1, "targets": ["q_proj", "k_proj"]},
    },
    "eval": {"baseline": {"n": 1668, "acc": 0.435}, "post": {"n": 1668, "acc": 0.489}},
    "mtbench": {"baseline": {"n": 50, "avg_score": 1.48}, "post": None},
    "instruct": {"baseline": None, "post": {"n": 25, "avg_score": 6.72, "success_rate": 40}},
}  # fmt: skip
OLD_MT_RUN = OLD_RUN | {
    "tag": "old_reddit",
    "params": OLD_RUN["params"] | {"reddit": {"min_post_chars": 99, "sample_rate": 0.2, "shuffle": 1}},
    "reddit": {"baseline": {"n": 100, "avg_score": 3.5}, "post": {"n": 100, "avg_score": 3.6}},
}
OLD_STAGES = {
    "timestamp": "2025-09-02T10:00:00",
    "model": "Qwen/Qwen3-1.7B",
    "method": "progressive_dpo",
    "tag": "old_stages",
    "stages": {"1": {"tatqa": 42.0}},
    "config": {"progressive": True, "stage1_beta": 0.011, "do_eval": False, "load_adapter": None, "gone_flag": 3},
}


def test_records_of_the_original_scripts_are_imported_listed_reported_and_rerun(project, printed):
    old = str(
        write_log(project / "old.jsonl", OLD_RUN, OLD_MT_RUN, OLD_STAGES, OLD_STAGES | {"tag": "second"}, {"x": 1})
    )
    assert "imported 4 records" in printed("--import", old)
    assert "imported 0 records" in printed("--import", old)
    listed = printed("--list")
    assert all(tag in listed for tag in ("old_beta", "old_reddit", "old_stages", "second"))
    flags = "--beta 0.02 --epochs 1 --batch 1 --grad_acc 32 --learning_rate 5e-06 --use_chat_template --lora_r 16 "
    flags += "--lora_alpha 32 --lora_dropout 0.1 --target_modules 'q_proj,k_proj' --no_4bit --exp_tag old_beta"
    line = f"poetry run python dpo_train.py --model Qwen/Qwen3-1.7B {flags}\n"
    assert printed("old_beta", "--print") == line
    line = printed("old_reddit", "--print")
    assert "dpo_train_mt.py" in line and "--reddit_min_post_chars 99 --reddit_sample_rate 0.2" in line
    line = printed("old_stages", "--print")
    assert "dpo_train_mt_v2.py" in line and "--progressive --stage1_beta 0.011 --no-do_eval" in line
    runs = {run.name: run for run in records.load_runs(records.record_files()) if not run.is_logged}
    assert runs["old_beta"].before == {"tatqa": 43.5, "mtbench": 1.48}
    assert runs["old_beta"].after == {"tatqa": pytest.approx(48.9), "instruct": 6.72, "instruct_success": 40}
    assert runs["old_reddit"].after["finance_instruct"] == 6.72 and runs["old_reddit"].before["reddit"] == 3.5
    assert "shuffle 1" in runs["old_reddit"].source["note"]
    assert not runs["old_stages"].measured and "gone_flag 3" in runs["old_stages"].source["note"]
    assert not runs["old_stages"].before


def test_nulls_of_an_old_record_are_left_out_and_a_line_that_stands_twice_is_imported_once(project, logged, printed):
    params = OLD_RUN["params"] | {"use_4bit": None, "reddit": None, "lora": None}
    rows = [OLD_RUN | {"params": params, "mtbench": {"baseline": None, "post": None}}] * 2
    rows.append(OLD_RUN | {"tag": "per cent", "eval": {"baseline": {"n": 9, "acc": 43.5}, "post": None}})
    old = write_log(project / "old.jsonl", *rows)
    assert "imported 1 records" in printed("--import", str(old))
    assert "eval baseline acc 43.5 is not within 0..1" in logged.text
    line = printed("old_beta", "--print")
    assert "dpo_train.py" in line and "4bit" not in line and "lora" not in line


@pytest.mark.parametrize("content", [None, "", "not json\n", '{"a": 1}\n', '{"params": 3, "eval": 4}\n'])
def test_a_file_without_old_records_is_one_line_and_exit_code_2(content, project, capsys):
    path = project / "old.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert rerun.main(["--import", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "old.jsonl" in error
    assert not (project / "experiments" / records.IMPORTED).exists()


def test_a_line_torn_by_a_crash_is_skipped_with_a_warning_and_the_rest_is_used(tmp_path, logged):
    log = write_log(tmp_path / "log.jsonl", make_record("one"))
    log.write_text(log.read_text("utf-8") + json.dumps(make_record("cut"))[:200], encoding="utf-8")
    write_log(log, make_record("two"))
    runs = [run.name for run in records.load_runs([log]) if not run.is_logged]
    assert runs == ["one", "two"]
    assert "log.jsonl:2" in logged.text
    assert records.find_run(f"{log}:3")["tag"] == "two"


WRONG_PARTS = [
    (["baseline", "mtbench"], [1]),
    (["baseline", "mtbench", "avg"], "high"),
    (["baseline", "tatqa", "by_type", "span"], None),
    (["final", "tatqa", "by_type"], 7),
    (["baseline", "mtbench", "avg"], float("nan")),
    (["delta", "tatqa"], None),
    (["delta", "tatqa", "low"], "x"),
    (["runtime_s", "total"], "x"),
]


def test_records_of_another_form_are_skipped_with_their_place_and_the_rest_is_reported(tmp_path, logged):
    whole, dpo = make_record("whole"), make_dpo_record("dpo")
    old = make_record("old") | {"delta": {"mtbench": {"mean": 1.0, "low": 0.5, "high": 1.5, "p": 0.01, "n": 12}}}
    odd = [
        {**whole, key: 7}
        for key in ("argv", "args", "baseline", "delta", "ts", "output_dir", "tag", "data", "device", "commits")
    ]
    odd += [whole | {"argv": [1]}, whole | {"script": "gone.py"}, whole | {"args": {}}]
    odd.append({key: value for key, value in whole.items() if key != "status"})
    for place, value in WRONG_PARTS:
        record = json.loads(json.dumps(dpo))
        functools.reduce(operator.getitem, place[:-1], record)[place[-1]] = value
        odd.append(record)
    log = write_log(tmp_path / "log.jsonl", whole, old, whole | {"tag": None, "device": {}}, *odd)
    assert [record["tag"] for record in records.load_records(log)] == ["whole", "old", None]
    assert f"skipped {len(odd)}" in logged.text and "log.jsonl:4" in logged.text
    report.write_report([log], tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert report.main(["--output_dir", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_heavy_is_imported_before_the_arguments_are_parsed():
    code = "import sys, chat, export, frontier, mine_pairs, report, rerun;"
    code += "print(*{'torch', 'transformers', 'numpy', 'scipy', 'matplotlib', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXPERIMENTS, check=True)
    assert run.stdout.strip() == ""
