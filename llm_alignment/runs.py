"""The run folder, the run record, exit codes, logging."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_alignment.files import InputError, append_record, write_json
from llm_alignment.models import all_processes, device_and_dtype, main_process, processes, versions

log = logging.getLogger("llm_alignment")


class NotFiniteError(Exception):
    """The loss or a gradient is not finite; training stops with exit code 1 and the last checkpoint stays."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; the exit code is 128 + `signum`."""

    def __init__(self, signum: int):
        super().__init__(signal_name(signum))
        self.signum = signum


def signal_name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


@contextlib.contextmanager
def signals_go_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP call `handler(signum, frame)`; what `nohup` ignores stays ignored."""
    stopping = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stopping.append(signal.SIGHUP)
    previous = {signum: signal.signal(signum, handler) for signum in stopping}
    try:
        yield
    finally:
        for signum, previous_handler in previous.items():
            signal.signal(signum, previous_handler)


def _interrupt(signum: int, frame: Any) -> None:
    raise Interrupted(signum)


@contextlib.contextmanager
def recorded_run(args: argparse.Namespace, argv: list[str], script: str) -> Iterator[dict]:
    """Wraps a run: yields its record, logs to console and run.log, and turns every end into an exit code and a record.

    Bad input (InputError): one line on stderr, exit code 2, no record, nothing written. A loss that is not finite: exit
    code 1. Ctrl-C: 130, SIGTERM: 143, SIGHUP: 129. Any other exception goes on to its traceback after the record is
    written as failed. The script calls `begin(record)` once its input is checked; `record["runtime_s"]` gets its total
    here.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Windows console may not know every Russian letter
    # What libraries say to one another: their deprecations, and bitsandbytes missing an optional CPU kernel.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    console = logging.StreamHandler(sys.stdout)
    held = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)  # until run.log has a folder
    log.handlers = [console, held] if main_process() else []
    log.setLevel(logging.INFO)
    log.propagate = False
    if "WORLD_SIZE" not in os.environ:  # one process drives one device, and transformers would use all that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    started = time.time()
    record = {
        "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "tag": args.exp_tag,
        "script": script,
        "argv": argv,
        "args": vars(args),
        "git": git_commit(),
        "versions": {"python": sys.version.split()[0]}
        | versions("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"),
        "device": None,
        "data": None,
        "baseline": {},
        "final": {},
        "delta": {},
        "runtime_s": {},
        "kept_step": None,
        "status": "failed",
        "output_dir": args.output_dir,
    }
    try:
        try:
            if Path(args.output_dir).is_file():
                raise InputError(f"--output_dir {args.output_dir} is a file; name a folder")
            if Path(args.exp_log).is_dir():
                raise InputError(f"--exp_log {args.exp_log} is a folder; name a file")
            with signals_go_to(_interrupt):
                yield record
            record["status"] = "completed"
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except NotFiniteError as error:
            record["reason"] = str(error)
            message = f"{error}; the last checkpoint in {args.output_dir} is whole: lower --learning_rate and rerun"
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt as error:
            signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
            record |= {"status": "interrupted", "reason": signal_name(signum)}
            print(
                "interrupted: the same command goes on, training with --resume_from_checkpoint auto", file=sys.stderr
            )
            raise SystemExit(128 + signum) from error
        except Exception as error:
            record["reason"] = f"{type(error).__name__}: {error}"
            log.removeHandler(console)  # the interpreter prints the traceback there; run.log gets it too
            log.error("%s", traceback.format_exc())
            raise
    except BaseException as error:
        bad_input = isinstance(error.__cause__, InputError)
        if main_process() and not bad_input and not args.dry_run:
            finish(record, args, started)
        raise
    else:
        if main_process() and not args.dry_run:
            finish(record, args, started)
            log.info("record appended to %s", args.exp_log)
    finally:
        for handler in log.handlers:
            handler.close()
        log.handlers = []


def finish(record: dict, args: argparse.Namespace, started: float) -> None:
    """Adds the total runtime and appends the record to --exp_log."""
    record["runtime_s"]["total"] = round(time.time() - started, 1)
    append_record(Path(args.exp_log), record)


def begin(record: dict, data: dict) -> Path:
    """Creates the output folder and writes run.json and run.log. `data` is the fingerprint of the data.

    A resumed run keeps the run.json that it was started with.
    """
    device, dtype = device_and_dtype()
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record["device"] = {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": processes(),
        "threads": torch.get_num_threads(),
    }
    record["data"] = data
    folder = Path(record["output_dir"])
    all_processes().wait_for_everyone()  # all have looked at the folder before it changes
    if main_process():
        folder.mkdir(parents=True, exist_ok=True)
        keys = ("ts", "tag", "script", "argv", "args", "git", "versions", "device", "data")
        if not (record["args"].get("resume_from_checkpoint") and (folder / "run.json").exists()):
            write_json(folder / "run.json", {key: record[key] for key in keys})
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        held = log.handlers[1]
        held.setTarget(handler)
        held.flush()
        log.handlers[1] = handler
    return folder


@contextlib.contextmanager
def timed(record: dict, phase: str) -> Iterator[None]:
    """Adds the seconds of a phase to the record's `runtime_s`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        record["runtime_s"][phase] = round(record["runtime_s"].get(phase, 0) + time.perf_counter() - start, 1)


def git_commit() -> str | None:
    """The project's commit, with "-dirty" when the tree has changes; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is not a checkout
        return None
