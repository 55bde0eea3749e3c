"""The run folder, the record, exit codes, signals, the console."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from llm_alignment import runs
from llm_alignment.files import InputError, read_records
from llm_alignment.runs import NotFiniteError, recorded_run

# A script that needs no model: it prints, then does what the test asks.
SCRIPT = """
import argparse, os, pathlib, signal, sys, time
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
    """Exit code, what stderr shows and the record (None without one) of a run that ends by `error`."""
    with pytest.raises(SystemExit) as stop, recorded_run(args, [], "script.py") as record:
        record["device"] = {} if begun else None
        raise error
    log = Path(args.exp_log)
    return stop.value.code, capsys.readouterr().err, read_records(log)[-1] if log.exists() else None


# ---------------------------------------------------------------------------------------------------------------------
# ends


def test_every_end_has_its_code_and_its_line(tmp_path, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "adapter.safetensors")
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = full
    for error, code, message, status in [
        (InputError("--dataset x: no rows"), 2, "--dataset x: no rows", "failed"),
        (NotFiniteError("the loss is nan at step 3"), 1, "the loss is nan at step 3", "failed"),
        (full, 1, "adapter.safetensors: No space left on device", "failed"),
        (wrapped, 1, "No space left on device", "failed"),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] unexpected pos 64"),
            1,
            "cannot be written",
            "failed",
        ),
        (OSError(errno.EROFS, "Read-only file system", "x"), 1, "Read-only", "failed"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "metrics.json"), 1, "metrics.json: Is a dir", "failed"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "xx...: the name is too long", "failed"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "torch cannot be imported", "failed"),
    ]:
        found, shown, record = failed(arguments(tmp_path), error, capsys)
        assert (found, record["status"]) == (code, status) and message in shown and message in record["reason"]
        assert shown.startswith("error: ") and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 68719476736 bytes."),
        "torch",
    ],
    ids=str,
)
def test_memory_that_is_full_says_what_to_lower(tmp_path, capsys, error):
    if error == "torch":
        import torch

        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
    sizes = {"batch": 8, "grad_acc": 16, "max_seq_length": 1024, "gradient_checkpointing": "off", "eval_batch_size": 0}
    code, shown, record = failed(arguments(tmp_path, **sizes), error, capsys)
    assert code == 1 and shown.startswith("error: out of memory at --batch 8 --max_seq_length 1024 ")
    assert shown.count("\n") == 1 and record["status"] == "failed" and "--batch 8" in record["reason"]
    for flag in ("--gradient_checkpointing on", "--grad_acc", "--max_seq_length", "--eval_batch_size"):
        assert flag in shown
    _, shown, _ = failed(arguments(tmp_path, eval_batch_size=32), error, capsys)
    assert "--batch" not in shown and "lower --eval_batch_size" in shown


def test_memory_that_torch_cannot_have_is_told(tmp_path, capsys):
    import torch

    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    code, shown, _ = failed(arguments(tmp_path), error.value, capsys)
    assert code == 1 and shown.startswith("error: out of memory") and shown.count("\n") == 1


def test_bad_input_before_the_run_leaves_nothing(tmp_path, capsys):
    args = arguments(tmp_path, output_dir=str(tmp_path / "new" / "out"), exp_log=str(tmp_path / "logs" / "log.jsonl"))
    code, shown, record = failed(args, InputError("no"), capsys, begun=False)
    assert code == 2 and record is None and list(tmp_path.iterdir()) == []
    with recorded_run(argparse.Namespace(**vars(args) | {"dry_run": True}), [], "script.py"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_nobody_expects_keeps_its_traceback_and_its_record(tmp_path):
    with pytest.raises(ZeroDivisionError), recorded_run(arguments(tmp_path), [], "script.py"):
        1 / 0  # noqa: B018
    [record] = read_records(tmp_path / "log.jsonl")
    assert record["status"] == "failed" and record["reason"] == "ZeroDivisionError: division by zero"
    keys = (
        "ts tag script argv args git versions device data baseline final delta runtime_s kept_step status output_dir"
    )
    assert set(keys.split()) | {"reason"} == set(record) and record["runtime_s"]["total"] >= 0


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

    with pytest.raises(runs.Interrupted, match="SIGTERM"), runs.signals_go_to(runs.interrupt):
        Freed()
        time.sleep(60)


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


def test_what_cannot_be_written_is_found_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "ts": 3}\n', encoding="utf-8")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\xff\0")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "target")
    for change, message in [
        ({"output_dir": str(tmp_path / "file")}, "is a file"),
        ({"output_dir": str(tmp_path / "file" / "out")}, "cannot be written"),
        ({"output_dir": str(tmp_path / ("x" * 300))}, "cannot be written"),
        ({"output_dir": str(tmp_path / "nowhere")}, "a link to nowhere"),
        ({"output_dir": "/proc/nothing/out"}, "cannot be written"),
        ({"exp_log": str(tmp_path)}, "is a folder"),
        ({"exp_log": str(tmp_path / "file" / "log.jsonl")}, "cannot be written"),
        ({"exp_log": str(tmp_path / ("x" * 300))}, "cannot be written"),
        ({"exp_log": str(tmp_path / ("ж" * 125))}, "too long"),
        ({"exp_log": str(tmp_path / "nowhere")}, "a link to nowhere"),
        ({"exp_log": str(tmp_path / "rows.jsonl")}, "without run records"),
        ({"exp_log": str(tmp_path / "rows.parquet")}, "without run records"),
        ({"exp_tag": "half \ud800"}, "not valid Unicode"),
    ]:
        if "/proc" in str(change) and not Path("/proc").is_dir():
            continue
        with pytest.raises(SystemExit) as stop, recorded_run(arguments(tmp_path, **change), [], "script.py"):
            pytest.fail(f"began with {change}")
        shown = capsys.readouterr().err
        [flag] = change
        assert stop.value.code == 2 and shown.startswith(f"error: --{flag} ") and message in shown, change
        assert shown.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "nowhere", "rows.jsonl", "rows.parquet"}


@pytest.mark.parametrize("place", ["file", "file/cache", "/proc/nothing"])
def test_a_cache_that_cannot_be_written_is_found_at_once(tmp_path, capsys, monkeypatch, place):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / place))
    args = arguments(tmp_path, no_baseline_cache=False)
    code, shown, record = failed(args, AssertionError("began"), capsys, begun=False)
    assert code == 2 and "LLM_ALIGNMENT_CACHE" in shown and shown.count("\n") == 1 and record is None
    with recorded_run(arguments(tmp_path), [], "script.py"):  # with --no_baseline_cache
        pass
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "new"))
    with recorded_run(args, [], "script.py"):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"script": "dpo_train.py"}', "holds another run (dpo_train.py)"),
        ("{", "run.json is damaged"),
        ('{"args": {}}', "run.json is damaged"),
    ],
)
def test_the_folder_of_another_script_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(text, encoding="utf-8")
    code, shown, _ = failed(arguments(tmp_path), AssertionError("began"), capsys)
    assert code == 2 and message in shown and shown.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    (tmp_path / "out" / "run.json").unlink()
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    code, shown, _ = failed(arguments(tmp_path), AssertionError("began"), capsys)
    assert code == 2 and "holds a model" in shown
    (tmp_path / "out" / "run.json").write_text('{"script": "script.py"}', encoding="utf-8")
    with recorded_run(arguments(tmp_path), [], "script.py"):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_found_at_once(tmp_path, capsys):
    tmp_path.chmod(0o555)
    code, shown, _ = failed(arguments(tmp_path), AssertionError("began"), capsys)
    assert code == 2 and "cannot be written" in shown


def test_a_record_that_cannot_be_appended_is_kept(tmp_path, capsys, monkeypatch):
    def full(path: Path, record: dict) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "append_record", full)
    with pytest.raises(SystemExit) as stop, recorded_run(arguments(tmp_path), [], "script.py") as record:
        (tmp_path / "out" / "metrics.json").write_text("{}", encoding="utf-8")
    shown = capsys.readouterr().err
    assert stop.value.code == 1 and "record.json" in shown and shown.count("\n") == 1
    assert json.loads((tmp_path / "out" / "record.json").read_text("utf-8")) == record
    monkeypatch.setattr(runs, "write_json", full)
    with pytest.raises(SystemExit), recorded_run(arguments(tmp_path), [], "script.py"):
        pass
    assert json.loads(capsys.readouterr().out)["status"] == "completed"


# ---------------------------------------------------------------------------------------------------------------------
# the console


@pytest.mark.parametrize("ending", [" | head -1", " >&-", " 2>&-", " >&- 2>&- <&-"])
def test_a_console_that_goes_away_does_not_end_the_run(tmp_path, ending):
    body = "\n    ".join([
        "for number in range(2000): print(number, flush=True)",
        "os.write(1, b'from C code\\\\n')",
        "print('x', file=sys.stderr, flush=True)",
        "(pathlib.Path(args.output_dir) / 'a.json').write_text('whole')",
    ])
    process = start(tmp_path, body)
    process.communicate()
    command = f"'{sys.executable}' '{tmp_path / 'script.py'}' '{tmp_path / 'two'}' '{tmp_path / 'log.jsonl'}'{ending}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert [record["status"] for record in read_records(tmp_path / "log.jsonl")] == ["completed"] * 2
    assert (tmp_path / "two" / "a.json").read_bytes() == b"whole" and b"Traceback" not in done.stderr


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


def test_the_log_of_a_run_goes_to_its_file(tmp_path, capsys):
    args = arguments(tmp_path, resume_from_checkpoint=None, dtype="auto")
    with pytest.raises(ZeroDivisionError), recorded_run(args, ["--flag"], "script.py") as record:
        runs.log.info("before the folder")
        Path(args.output_dir, "train_log.jsonl.4711.tmp").write_text("of a killed run", encoding="utf-8")
        Path(args.output_dir, "my.tmp").write_text("of the user", encoding="utf-8")
        folder = runs.begin(record, {"sha256": "0"})
        runs.log.info("после")
        run = json.loads((folder / "run.json").read_text("utf-8"))
        1 / 0  # noqa: B018
    assert run["argv"] == ["--flag"] and run["data"] == {"sha256": "0"} and run["device"]["processes"] == 1
    assert {"args", "versions", "git", "ts", "script"} <= set(run)
    assert [path.name for path in folder.glob("*.tmp")] == ["my.tmp"]
    text = (folder / "run.log").read_text("utf-8")
    assert "before the folder" in text and "после" in text and "ZeroDivisionError" in text
    assert "ZeroDivisionError" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# packages


def broken_package(folder: Path, name: str, text: str) -> dict[str, str]:
    (folder / "site" / name).mkdir(parents=True)
    (folder / "site" / name / "__init__.py").write_text(text, encoding="utf-8")
    return {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(
    "text", ["raise OSError('libcudart.so.13: cannot open shared object file')", "import nothing_of_this_name"]
)
def test_a_torch_that_cannot_be_imported_is_one_line(tmp_path, text):
    environment = broken_package(tmp_path, "torch", text)
    process = start(tmp_path, "import torch", env=environment)
    _, shown = process.communicate()
    assert process.returncode == 2 and shown.startswith("error: ") and shown.count("\n") == 1, shown
    assert "cannot be imported" in shown and "install" in shown


def test_a_package_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    def missing(*names: str) -> None:
        raise importlib.metadata.PackageNotFoundError("trl")

    monkeypatch.setattr(runs, "versions", missing)
    with pytest.raises(SystemExit) as stop, recorded_run(arguments(tmp_path), [], "script.py"):
        pytest.fail("began")
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and "trl cannot be imported" in shown and shown.count("\n") == 1


def test_bitsandbytes_without_its_library_is_one_line(tmp_path, capsys):
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary

    def call() -> None:
        ErrorHandlerMockBNBNativeLibrary("libbitsandbytes_cpu.so: cannot open shared object file").cdequantize()

    with pytest.raises(SystemExit) as stop, recorded_run(arguments(tmp_path), [], "script.py"):
        call()
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and "--no_4bit" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("version, message", [((3, 10, 4), "3.10"), ((3, 14, 0), "3.14")])
def test_another_python_is_one_line(version, message):
    code = f"import sys; sys.version_info = {version}; import llm_alignment"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
