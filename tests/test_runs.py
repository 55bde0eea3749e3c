"""The run folder, its lock, the run record."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from llm_alignment import files, runs
from llm_alignment.files import InputError, read_records
from llm_alignment.runs import recorded_run

# A script that needs no model: it prints, then does what the test asks.
SCRIPT = """
import argparse, os, pathlib, sys, time
from llm_alignment.runs import recorded_run, log
args = argparse.Namespace(
    output_dir=sys.argv[1], exp_log=sys.argv[2], exp_tag="", dry_run=False, no_baseline_cache=True
)
def run(args, record):
    record["device"] = {{}}
    log.info("строка журнала")
    print("строка", flush=True)
    {body}
    print("end", flush=True)
recorded_run(run, args, None, "script.py")
"""


def arguments(folder: Path, **changes) -> argparse.Namespace:
    values = {"output_dir": str(folder / "out"), "exp_log": str(folder / "log.jsonl"), "exp_tag": "t"}
    return argparse.Namespace(**{**values, "dry_run": False, "no_baseline_cache": True, **changes})


def nothing(args: argparse.Namespace, record: dict) -> None:
    """A run that does nothing."""


def start(folder: Path, body: str, *words: str, **options) -> subprocess.Popen:
    (folder / "script.py").write_text(SCRIPT.format(body=body), encoding="utf-8")
    command = [sys.executable, str(folder / "script.py"), *(words or (str(folder / "out"), str(folder / "log.jsonl")))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=environment, encoding="utf-8", **pipes)


def failed(args: argparse.Namespace, error: BaseException, capsys, *, begun: bool = True) -> tuple[int, str, dict]:
    """Exit code, the one line on stderr and the record (None without one) of a run that ends by `error`."""

    def run(args: argparse.Namespace, record: dict) -> None:
        record["device"] = {} if begun else None
        raise error

    with pytest.raises(SystemExit) as stop:
        recorded_run(run, args, [], "script.py")
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    written = stop.value.code == 1 or begun  # else --exp_log may be anything
    return stop.value.code, shown, read_records(Path(args.exp_log))[-1] if written else None


def test_a_run_that_misses_a_gate_is_complete_and_ends_with_1(tmp_path, capsys):
    args = arguments(tmp_path)

    def run(args: argparse.Namespace, record: dict) -> None:
        record["gates"] = {"retention": {"verdict": "missed"}, "mtbench": {"verdict": "undecided"}}

    with pytest.raises(SystemExit) as stop:
        recorded_run(run, args, [], "script.py")
    shown = capsys.readouterr().err
    assert stop.value.code == 1 and "retention" in shown and "mtbench" not in shown and shown.count("\n") == 1
    assert read_records(Path(args.exp_log))[-1]["status"] == "completed"


def test_bad_input_before_the_run_leaves_nothing(tmp_path, capsys):
    args = arguments(tmp_path, output_dir=str(tmp_path / "new" / "out"), exp_log=str(tmp_path / "logs" / "log.jsonl"))
    code, shown, record = failed(args, InputError("no"), capsys, begun=False)
    assert code == 2 and record is None and list(tmp_path.iterdir()) == []
    recorded_run(nothing, argparse.Namespace(**vars(args) | {"dry_run": True}), [], "script.py")
    assert list(tmp_path.iterdir()) == []


def test_a_rare_error_is_one_line_and_its_traceback_is_in_run_log(tmp_path, capsys):
    base = SimpleNamespace(device_name="cpu", dtype_name="float32", identity="of the base")
    args = arguments(tmp_path, resume_from_checkpoint=None, dtype="auto")
    commits = {"model": "0" * 40}
    folder = Path(args.output_dir)

    def run(args: argparse.Namespace, record: dict) -> None:
        runs.log.info("before the folder")
        runs.COMMITS.update(commits)
        Path(args.output_dir, "train_log.jsonl.4711.tmp").write_text("of a killed run", encoding="utf-8")
        Path(args.output_dir, "my.tmp").write_text("of the user", encoding="utf-8")
        assert runs.begin(record, {"sha256": "0"}, base) == folder
        with runs.timed(record, "train"):
            runs.log.info("после")
        raise ZeroDivisionError("first line\nsecond line")

    with pytest.raises(SystemExit) as stop:
        recorded_run(run, args, ["--flag"], "script.py")
    out, shown = capsys.readouterr()
    assert stop.value.code == 1 and "ZeroDivisionError: first line;" in shown and str(folder / "run.log") in shown
    assert shown.count("\n") == 1 and "Traceback" not in out
    text = (folder / "run.log").read_text("utf-8")
    assert "before the folder" in text and "после" in text and "Traceback" in text and "second line" in text
    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert (run["argv"], run["data"], run["commits"]) == (["--flag"], {"sha256": "0"}, commits)
    assert {"args", "versions", "git", "ts", "script"} <= set(run) and run["device"]["processes"] == 1
    assert [path.name for path in folder.glob("*.tmp")] == ["my.tmp"]
    [record] = read_records(tmp_path / "log.jsonl")
    keys = "ts tag script argv args git versions device data baseline final delta runtime_s gates kept_step status"
    assert set(record) == {*(keys + " output_dir reason commits base").split()}
    assert (record["status"], record["commits"]) == ("failed", commits)
    seconds = record["runtime_s"]
    assert list(seconds) == ["load", "train", "other", "total"]
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"], abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# folders and logs


def test_a_second_run_in_one_folder_is_refused(tmp_path, capsys):
    process = start(tmp_path, "time.sleep(60)")
    try:
        while process.stdout.readline() != "строка\n":
            assert process.poll() is None
        with pytest.raises(SystemExit) as stop:
            recorded_run(lambda *_: pytest.fail("the second run began"), arguments(tmp_path), [], "script.py")
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and "another run is working in this folder" in shown and shown.count("\n") == 1
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "out" / "run.lock").exists()
    metrics = tmp_path / "out" / "metrics.json"
    recorded_run(lambda *_: metrics.touch(), arguments(tmp_path), [], "script.py")  # what a dead run held is free
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]


UNWRITABLE = [
    ("output_dir", "file"), ("output_dir", "file/out"), ("output_dir", "x" * 300), ("output_dir", "nowhere"),
    ("output_dir", "/proc/nothing/out"), ("exp_log", ""), ("exp_log", "file/log.jsonl"), ("exp_log", "x" * 300),
    ("exp_log", "ж" * 125), ("exp_log", "nowhere"), ("exp_log", "rows.jsonl"), ("exp_log", "rows.parquet"),
    ("exp_tag", "half \ud800"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "name"), UNWRITABLE)
def test_what_cannot_be_written_is_found_at_once(tmp_path, capsys, flag, name):
    if name.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "ts": 3}\n', encoding="utf-8")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\xff\0")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "target")
    before = set(tmp_path.iterdir())
    args = arguments(tmp_path, **{flag: name if flag == "exp_tag" else str(tmp_path / name)})
    code, shown, _ = failed(args, AssertionError("began"), capsys, begun=False)
    assert code == 2 and name.partition(" ")[0] in shown and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["file", "file/cache", "/proc/nothing"])
def test_a_cache_that_cannot_be_written_is_found_at_once(tmp_path, capsys, monkeypatch, place):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / place))
    args = arguments(tmp_path, no_baseline_cache=False)
    code, shown, record = failed(args, AssertionError("began"), capsys, begun=False)
    assert code == 2 and "LLM_ALIGNMENT_CACHE" in shown and record is None
    recorded_run(nothing, arguments(tmp_path), [], "script.py")  # with --no_baseline_cache
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "new"))
    recorded_run(nothing, args, [], "script.py")
    assert not (tmp_path / "new").exists()


FOREIGN = [
    ("run.json", '{"script": "dpo_train.py"}', "dpo_train.py"), ("run.json", "{", "run.json is damaged"),
    ("run.json", '{"args": {}}', "run.json is damaged"), ("config.json", "{}", "config.json"),
    ("adapter_config.json", "{}", "adapter_config.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "named"), FOREIGN)
def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys, name, text, named):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text, encoding="utf-8")
    code, shown, _ = failed(arguments(tmp_path), AssertionError("began"), capsys, begun=False)
    assert code == 2 and named in shown and [path.name for path in (tmp_path / "out").iterdir()] == [name]
    (tmp_path / "out" / "run.json").write_text('{"script": "script.py"}', encoding="utf-8")
    recorded_run(nothing, arguments(tmp_path), [], "script.py")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_found_at_once(tmp_path, capsys):
    tmp_path.chmod(0o555)
    code, shown, _ = failed(arguments(tmp_path), AssertionError("began"), capsys)
    assert code == 2 and "cannot be written" in shown


def test_a_record_that_cannot_be_appended_is_printed(tmp_path, capsys, monkeypatch):
    def full(path: Path, record: dict) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs.files, "append_record", full)
    kept = []
    with pytest.raises(SystemExit) as stop:
        recorded_run(lambda args, record: kept.append(record), arguments(tmp_path), [], "script.py")
    [record] = kept
    out, shown = capsys.readouterr()
    assert stop.value.code == 1 and str(tmp_path / "log.jsonl") in shown and shown.count("\n") == 1
    assert json.loads(out[out.index("{") :]) == record and record["status"] == "completed"


def test_a_log_whose_only_record_was_cut_is_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    recorded_run(nothing, arguments(tmp_path), [], "script.py")
    log.write_bytes(log.read_bytes()[:-50])
    recorded_run(nothing, arguments(tmp_path), [], "script.py")
    (record,) = files.read_records(log)
    assert record["status"] == "completed"


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process there")
def test_a_signal_while_the_record_is_written_waits(tmp_path, monkeypatch):
    append = files.append_record

    def signalled(*of):
        os.kill(os.getpid(), signal.SIGTERM)
        append(*of)

    monkeypatch.setattr(files, "append_record", signalled)
    recorded_run(nothing, arguments(tmp_path), [], "script.py")
    assert [record["status"] for record in files.read_records(tmp_path / "log.jsonl")] == ["completed"]
