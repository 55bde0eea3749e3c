"""How a run ends: exit codes, signals, the console."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_runs import arguments, failed, start

from llm_alignment import endings
from llm_alignment.files import InputError, read_records
from llm_alignment.runs import recorded_run

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


def test_a_rare_error_before_run_log_keeps_its_traceback_on_the_console(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        recorded_run(lambda *_: 1 / 0, arguments(tmp_path), [], "script.py")
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
        state = Path(args.output_dir) / "optimizer.pt"
        with pytest.raises(SystemExit) as stop:
            recorded_run(lambda *_: torch.save(torch.zeros(2**20), state), args, [], "script.py")
        shown = capsys.readouterr().err
        assert stop.value.code == 1 and shown.count("\n") == 1 and f"{args.output_dir} is full" in shown, shown
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)


def test_ctrl_c_reaches_a_caller_of_main(tmp_path):
    """So that pytest, which calls main(argv) in its own process, stops."""
    with pytest.raises(KeyboardInterrupt):
        recorded_run(lambda *_: signal.raise_signal(signal.SIGINT), arguments(tmp_path), [], "script.py")
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
