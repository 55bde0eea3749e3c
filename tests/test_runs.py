"""The run folder and its record; how a run ends: exit codes, signals, the console."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from llm_alignment import endings, runs
from llm_alignment.files import InputError, read_records
from llm_alignment.runs import recorded_run

# A script that needs no model: it prints, then does what the test asks.
SCRIPT = """
import argparse, os, pathlib, sys, time
from llm_alignment.runs import recorded_run, log
args = argparse.Namespace(
    output_dir=sys.argv[1], exp_log=sys.argv[2], exp_tag="", dry_run=False, no_baseline_cache=True
)
with recorded_run(args, None, "script.py") as record:
    record["device"] = {{}}
    log.info("строка журнала")
    print("строка", flush=True)
    {body}
    print("end", flush=True)
"""


def arguments(folder: Path, **changes) -> argparse.Namespace:
    values = {
        "output_dir": str(folder / "out"),
        "exp_log": str(folder / "log.jsonl"),
        "exp_tag": "t",
        "dry_run": False,
        "no_baseline_cache": True,
    }
    return argparse.Namespace(**values | changes)


def start(folder: Path, body: str, *words: str, **options) -> subprocess.Popen:
    (folder / "script.py").write_text(SCRIPT.format(body=body), encoding="utf-8")
    command = [sys.executable, str(folder / "script.py"), *(words or (str(folder / "out"), str(folder / "log.jsonl")))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=environment, encoding="utf-8", **pipes)


def failed(args: argparse.Namespace, error: BaseException, capsys, *, begun: bool = True) -> tuple[int, str, dict]:
    """Exit code, the one line on stderr and the record (None without one) of a run that ends by `error`."""
    with pytest.raises(SystemExit) as stop, recorded_run(args, [], "script.py") as record:
        record["device"] = {} if begun else None
        raise error
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    written = stop.value.code == 1 or begun  # else --exp_log may be anything
    return stop.value.code, shown, read_records(Path(args.exp_log))[-1] if written else None


# ---------------------------------------------------------------------------------------------------------------------
# ends


FULL = OSError(errno.ENOSPC, "No space left on device", "adapter.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (InputError("--dataset x: no rows"), 2, "--dataset x"),
        (endings.NotFiniteError("the loss is nan at step 3"), 1, "step 3"),
        (endings.MissedGateError("MT-Bench -0.4"), 1, "MT-Bench -0.4"),
        (FULL, 1, "adapter.safetensors"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "metrics.json"), 1, "metrics.json"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "xxx"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "torch"),
        (MemoryError(), 1, "--eval_batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "--gradient_checkpointing on"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nallocate"), 1, "--grad_acc"),
    ],
    ids=str,
)
def test_an_end_that_users_meet_has_its_code_and_one_line(tmp_path, capsys, error, code, named):
    found, shown, record = failed(arguments(tmp_path), error, capsys)
    assert (found, record["status"]) == (code, "failed") and named in shown and record["reason"] in shown
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = FULL
    assert failed(arguments(tmp_path), wrapped, capsys)[0] == 1


def test_memory_that_torch_cannot_have_is_told(tmp_path, capsys):
    import torch

    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    code, shown, _ = failed(arguments(tmp_path), error.value, capsys)
    assert code == 1 and "--eval_batch_size" in shown


def test_bad_input_before_the_run_leaves_nothing(tmp_path, capsys):
    args = arguments(tmp_path, output_dir=str(tmp_path / "new" / "out"), exp_log=str(tmp_path / "logs" / "log.jsonl"))
    code, shown, record = failed(args, InputError("no"), capsys, begun=False)
    assert code == 2 and record is None and list(tmp_path.iterdir()) == []
    with recorded_run(argparse.Namespace(**vars(args) | {"dry_run": True}), [], "script.py"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_rare_error_is_one_line_and_its_traceback_is_in_run_log(tmp_path, capsys):
    import torch

    base = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    args = arguments(tmp_path, resume_from_checkpoint=None, dtype="auto")
    commits = {"--model": "0" * 40, "--dataset": None}
    with pytest.raises(SystemExit) as stop, recorded_run(args, ["--flag"], "script.py") as record:
        runs.log.info("before the folder")
        Path(args.output_dir, "train_log.jsonl.4711.tmp").write_text("of a killed run", encoding="utf-8")
        Path(args.output_dir, "my.tmp").write_text("of the user", encoding="utf-8")
        folder = runs.begin(record, {"sha256": "0"}, base, commits)
        with runs.timed(record, "train"):
            runs.log.info("после")
        raise ZeroDivisionError("first line\nsecond line")
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
    keys = (
        "ts tag script argv args git versions device data baseline final delta runtime_s kept_step status output_dir"
    )
    assert set(keys.split()) | {"reason", "commits"} == set(record)
    assert (record["status"], record["commits"]) == ("failed", commits)
    seconds = record["runtime_s"]
    assert list(seconds) == ["load", "train", "other", "total"]
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"], abs=0.01)


def test_a_rare_error_before_run_log_keeps_its_traceback_on_the_console(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, recorded_run(arguments(tmp_path), [], "script.py"):
        1 / 0  # noqa: B018
    *traceback, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and traceback[0].startswith("Traceback") and line.startswith("error: ZeroDivision")
    [record] = read_records(tmp_path / "log.jsonl")
    assert record["status"] == "failed" and "division by zero" in record["reason"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_that_a_library_only_quotes_is_told(tmp_path, capsys):
    import torch

    (tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "small")]).returncode:
        pytest.skip("may not mount")
    try:
        args = arguments(tmp_path, output_dir=str(tmp_path / "small" / "out"))
        with pytest.raises(SystemExit) as stop, recorded_run(args, [], "script.py"):
            torch.save(torch.zeros(2**20), Path(args.output_dir) / "optimizer.pt")
        shown = capsys.readouterr().err
        assert stop.value.code == 1 and shown.count("\n") == 1 and f"{args.output_dir} is full" in shown, shown
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)


def test_ctrl_c_reaches_a_caller_of_main(tmp_path):
    """So that pytest, which calls main(argv) in its own process, stops."""
    with pytest.raises(KeyboardInterrupt), recorded_run(arguments(tmp_path), [], "script.py"):
        signal.raise_signal(signal.SIGINT)
    [record] = read_records(tmp_path / "log.jsonl")
    assert (record["status"], record["reason"]) == ("interrupted", "Ctrl-C")


def test_a_signal_in_code_whose_errors_python_drops_is_not_lost():
    class Freed:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(endings.Interrupted, match="SIGTERM"), endings.signals_go_to(endings.interrupt):
        Freed()
        for _ in range(600):
            time.sleep(0.1)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_in_its_code_and_a_record(tmp_path, name, code, hangup):
    process = start(tmp_path, "time.sleep(60)", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.stdout.readline() != "строка\n":
        assert process.poll() is None
    process.send_signal(getattr(signal, name))
    _, shown = process.communicate(timeout=60)
    assert process.returncode == code and shown.startswith("interrupted: ") and shown.count("\n") == 1
    [record] = read_records(tmp_path / "log.jsonl")
    assert record["status"] == "interrupted" and record["reason"] == ("Ctrl-C" if name == "SIGINT" else name)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# folders and logs


def test_a_second_run_in_one_folder_is_refused(tmp_path, capsys):
    process = start(tmp_path, "time.sleep(60)")
    try:
        while process.stdout.readline() != "строка\n":
            assert process.poll() is None
        with pytest.raises(SystemExit) as stop, recorded_run(arguments(tmp_path), [], "script.py"):
            pytest.fail("the second run began")
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and "another run is working in this folder" in shown and shown.count("\n") == 1
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "out" / "run.lock").exists()
    with recorded_run(arguments(tmp_path), [], "script.py"):  # what a dead run held is free
        (tmp_path / "out" / "metrics.json").write_text("{}", encoding="utf-8")
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
    with recorded_run(arguments(tmp_path), [], "script.py"):  # with --no_baseline_cache
        pass
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "new"))
    with recorded_run(args, [], "script.py"):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("run.json", '{"script": "dpo_train.py"}', "dpo_train.py"),
        ("run.json", "{", "run.json is damaged"),
        ("run.json", '{"args": {}}', "run.json is damaged"),
        ("config.json", "{}", "config.json"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys, name, text, named):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text, encoding="utf-8")
    code, shown, _ = failed(arguments(tmp_path), AssertionError("began"), capsys, begun=False)
    assert code == 2 and named in shown and [path.name for path in (tmp_path / "out").iterdir()] == [name]
    (tmp_path / "out" / "run.json").write_text('{"script": "script.py"}', encoding="utf-8")
    with recorded_run(arguments(tmp_path), [], "script.py"):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_found_at_once(tmp_path, capsys):
    tmp_path.chmod(0o555)
    code, shown, _ = failed(arguments(tmp_path), AssertionError("began"), capsys)
    assert code == 2 and "cannot be written" in shown


def test_a_record_that_cannot_be_appended_is_printed(tmp_path, capsys, monkeypatch):
    def full(path: Path, record: dict) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "append_record", full)
    with pytest.raises(SystemExit) as stop, recorded_run(arguments(tmp_path), [], "script.py") as record:
        pass
    out, shown = capsys.readouterr()
    assert stop.value.code == 1 and str(tmp_path / "log.jsonl") in shown and shown.count("\n") == 1
    assert json.loads(out[out.index("{") :]) == record and record["status"] == "completed"


# ---------------------------------------------------------------------------------------------------------------------
# the console


def test_a_console_that_goes_away_does_not_end_the_run(tmp_path):
    body = "\n    ".join([
        "for number in range(2000): print(number, flush=True)",
        "os.write(1, b'from C code\\n')",
        "(pathlib.Path(args.output_dir) / 'a.json').write_text('whole')",
    ])
    start(tmp_path, body).communicate()
    command = f"'{sys.executable}' '{tmp_path / 'script.py'}' '{tmp_path / 'two'}' '{tmp_path / 'log.jsonl'}'"
    words = ["bash", "-c", f"set -o pipefail; {command} | head -1"]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0 and not done.stderr
    assert [record["status"] for record in read_records(tmp_path / "log.jsonl")] == ["completed"] * 2
    assert (tmp_path / "two" / "a.json").read_bytes() == b"whole"


@pytest.mark.parametrize("utf8", ["0", "1"])
def test_a_locale_without_utf_8_keeps_a_cyrillic_path(tmp_path, utf8):
    words = str(tmp_path / "папка"), str(tmp_path / "журнал.jsonl")
    body = "files.write_json(pathlib.Path(args.output_dir) / 'a.json', args.output_dir)"
    environment = {"LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
    process = start(tmp_path, f"from llm_alignment import files; {body}", *words, env=environment)
    _, shown = process.communicate()
    assert process.returncode == 0, shown
    [record] = read_records(tmp_path / "журнал.jsonl")
    assert record["output_dir"] == words[0]
    assert json.loads((tmp_path / "папка" / "a.json").read_text("utf-8")) == words[0]


# ---------------------------------------------------------------------------------------------------------------------
# packages


def test_a_torch_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").write_text("import nothing_of_this_name", encoding="utf-8")
    process = start(tmp_path, "import torch", env={"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"})
    _, shown = process.communicate()
    assert process.returncode == 2 and shown.startswith("error: ") and shown.count("\n") == 1, shown
    assert "nothing_of_this_name" in shown


@pytest.mark.parametrize("version, message", [((3, 10, 4), "3.10"), ((3, 14, 0), "3.14")])
def test_another_python_is_one_line(version, message):
    code = f"import sys; sys.version_info = {version}; import llm_alignment"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
