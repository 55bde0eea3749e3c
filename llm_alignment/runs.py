"""The run folder, its lock, the run record."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment import files
from llm_alignment.endings import MissedGateError, console_and_log, ending, explain, interrupt, open_log, signals_go_to
from llm_alignment.evaluation import missed_gates
from llm_alignment.files import InputError, SkippedRows, log, parse_json
from llm_alignment.hub import COMMITS
from llm_alignment.processes import all_processes, gathered, main_process, processes, versions

if TYPE_CHECKING:
    from llm_alignment.models import Base

RECORD_KEYS = ({"ts", "script"}, {"ts", "params"}, {"timestamp", "stages"})  # the last two: of the original scripts
PHASES = {"baseline": "measuring before training", "train": "training", "final": "measuring after training"}
NEXT = """adapter in {run}; next: talk to it, compare it with another run, export it
    python experiments/chat.py {run}
    python experiments/report.py --compare {run} ANOTHER_RUN
    python experiments/export.py {run} --merged MERGED_FOLDER"""


def recorded_run(run: Callable[..., None], args: argparse.Namespace, argv: list[str] | None, script: str) -> dict:
    """Calls `run(args, record)`; logs to console and run.log, turns every end into an exit code (see `ending`) and a
    record, and returns that. Bad input that is found before the script calls `begin`, and a dry run, leave no record
    and no file. A caller of `main(argv)`, such as pytest, gets the KeyboardInterrupt of Ctrl-C."""
    record: dict = {}
    COMMITS.clear()  # of a run before this one in the same process
    with console_and_log():
        keeps_record = main_process() and not args.dry_run
        try:
            record |= new_record(vars(args), sys.argv[1:] if argv is None else argv, script)
            cache = None if args.no_baseline_cache else files.cache_folder()
            with signals_go_to(interrupt), run_folder(Path(args.output_dir), Path(args.exp_log), cache, script):
                run(args, record)
            record["status"] = "completed"
        except BaseException as error:
            end = ending(error, args.output_dir)
            record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            record["reason"] = end.reason
            line = explain(end, error)
            if keeps_record and (end.code != 2 or record.get("device") is not None):
                line += finish(record)
            print(line, file=sys.stderr)
            if end.code == 128 + signal.SIGINT and argv is not None:
                raise
            raise SystemExit(end.code) from error
        if keeps_record:
            if problem := finish(record):
                print(f"error: the run is complete{problem}", file=sys.stderr)
                raise SystemExit(1)
            log.info("record appended to %s", args.exp_log)
            if (Path(record["output_dir"]) / "adapter_config.json").exists():
                log.info(NEXT.format(run=shlex.quote(record["output_dir"])))
            if missed := missed_gates(record):
                why = MissedGateError(f"missed: {', '.join(missed)}; adapter, record and files are complete")
                print(explain(ending(why, args.output_dir), why), file=sys.stderr)
                raise SystemExit(1)
    return record


def new_record(flags: dict[str, Any], argv: list[str], script: str) -> dict:
    """The record of a run that begins; its keys are those of every line of --exp_log. Raises InputError for a flag's
    text that UTF-8 cannot spell: the line could not be read."""
    for name, value in flags.items():
        try:
            str(value).encode("utf-8", "surrogateescape").decode("utf-8")
        except UnicodeError as error:
            raise InputError(f"--{name} {ascii(value)}: not valid Unicode text; give another name") from error
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
    return {
        "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "tag": flags["exp_tag"],
        "script": script, "argv": argv, "args": flags, "git": git_commit(),
        "versions": {"python": sys.version.split()[0]} | versions(*packages), "device": None, "data": None,
        **{key: {} for key in ("baseline", "final", "delta", "runtime_s", "gates")},
        "kept_step": None, "status": "failed", "output_dir": flags["output_dir"],
    }  # fmt: skip


def add_untimed(record: dict, phase: str) -> float:
    """Adds to `phase` the seconds since `ts` that no phase has, so that all sum to the total, which it returns."""
    total = round(time.time() - datetime.fromisoformat(record["ts"]).timestamp(), 1)
    seconds = record["runtime_s"]
    seconds[phase] = round(seconds.get(phase, 0) + total - sum(seconds.values()), 1)
    return total


def finish(record: dict) -> str:
    """Adds the total runtime and appends the record to --exp_log, or prints it; returns what went wrong, or ""."""
    record["runtime_s"]["total"] = add_untimed(record, "other")
    path = Path(record["args"]["exp_log"])
    try:
        with signals_go_to(lambda *_: None):
            files.append_record(path, record)
    except OSError as error:
        log.error("the run's record: %s", json.dumps(record, ensure_ascii=False))
        return f"; {path} cannot be written ({error.strerror}), and the run's record is shown above"
    return ""


@contextlib.contextmanager
def run_folder(folder: Path, exp_log: Path, cache: Path | None, script: str) -> Iterator[None]:
    """Makes and locks the output folder; a run that leaves no file removes it. Raises InputError when another run
    works in it, when it holds a model, an adapter or another script's run, which would be mixed with this one's files,
    when folder, log or cache cannot be written, or the log holds something other than records."""
    if processes() > 1:
        all_processes().wait_for_everyone()  # the demo's folder is the first free one: all have looked by now
    if not main_process():
        yield
        return
    check_writable(exp_log, "--exp_log")
    if exp_log.exists() and exp_log.read_bytes()[:7] not in (b"", b'{"ts": '):  # as our own begin, cut ones too
        rows = itertools.islice(files.read_objects(exp_log, SkippedRows()), 100)  # a crash may have cut off some
        if not any(row.keys() >= keys for _, row in rows for keys in RECORD_KEYS):
            raise InputError(f"--exp_log {exp_log}: no run records, which a record would damage; name another file")
    if cache is not None:
        advice = "name another folder by LLM_ALIGNMENT_CACHE, or add --no_baseline_cache"
        check_writable(cache / "baselines" / "rows.jsonl", "cache", advice)
    check_writable(folder / "run.lock", "--output_dir", "name another folder")
    refusal = f"--output_dir {folder}: another run is working in this folder; wait for its end or name another folder"
    with held_alone(folder / "run.lock", refusal):
        path = folder / "run.json"
        if path.exists():
            try:
                other = parse_json(path.read_bytes())["script"]
            except (ValueError, KeyError, TypeError) as error:
                raise damaged_run(path) from error
        else:
            other = next((name for name in ("config.json", "adapter_config.json") if (folder / name).exists()), script)
        if other != script:
            raise InputError(f"--output_dir {folder} holds another run or a model ({other}); name another folder")
        yield


@contextlib.contextmanager
def held_alone(path: Path, refusal: str) -> Iterator[None]:
    """Inside, this process alone holds the lock file `path`, which is free when its process died; else InputError with
    the text `refusal`. At the end the file is removed, and what folders were made for it and are empty."""
    from filelock import FileLock, Timeout

    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    lock = FileLock(path, blocking=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(refusal) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            if lock.is_locked:  # so that nobody else loses a lock taken since; on Windows filelock removes it
                path.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def damaged_run(path: Path) -> InputError:
    return InputError(f"{path} is damaged, so the run cannot be checked: put it back, or name another --output_dir")


def check_writable(path: Path, flag: str, advice: str = "name another file") -> None:
    """Raises InputError when the file that `flag` names cannot be written; touches nothing."""
    try:
        existing = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if existing == path:
            path.open("r+b" if path.is_symlink() else "ab").close()  # of a link to nowhere it would make the target
        else:  # tried, with a name as long as that of the temporary file: root may write everywhere, but not in /proc
            tempfile.NamedTemporaryFile(prefix=f"{path.name}.tmp", dir=existing).close()
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror}); {advice}") from error


def begin(record: dict, data: dict, base: Base) -> Path:
    """Creates the output folder and writes run.log and, unless it is resumed, run.json; `data`: its fingerprint."""
    import torch

    device = {"name": base.device_name, "dtype": base.dtype_name}
    log.info("device: %(name)s, %(dtype)s", device)
    record["device"] = {**device, "processes": processes(), "threads": torch.get_num_threads()}
    record |= {"data": data, "commits": dict(COMMITS), "base": base.identity}
    folder = Path(record["output_dir"])
    all_processes().wait_for_everyone()  # all have looked at the folder before it changes
    if main_process():
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_left_over(folder)
        keys = ("ts", "tag", "script", "argv", "args", "git", "versions", "device", "data", "commits", "base")
        if not (record["args"].get("resume_from_checkpoint") and (folder / "run.json").exists()):
            files.write_json(folder / "run.json", {key: record[key] for key in keys if key in record})
        open_log(folder / "run.log")
    if processes() > 1:
        check_shared(folder, record["args"])
    add_untimed(record, "load")
    return folder


def check_shared(folder: Path, flags: dict[str, Any]) -> None:
    """Warns where a process, on another machine, does not see the main one's folder. Raises InputError where it would
    have to read what the main one writes there: a checkpoint or an earlier stage."""
    with tempfile.NamedTemporaryFile(dir=folder) if main_process() else contextlib.nullcontext() as file:
        [name] = gathered([Path(file.name).name] if file else [])
        apart = gathered([] if (folder / name).exists() else [all_processes().process_index])
    if not apart:
        return
    line = f"--output_dir {folder} is not shared: process {', '.join(map(str, apart))} has a folder of its own there"
    readers = [name for name in ("resume_from_checkpoint", "early_stop_patience") if flags.get(name)]
    if readers or "resume_from_stage" in flags:
        raise InputError(f"{line}; name one that all machines share{f', or leave out --{readers[0]}' * bool(readers)}")
    log.warning("%s; the run cannot be resumed", line)


@contextlib.contextmanager
def timed(record: dict, phase: str, phases: Sequence[str] = ()) -> Iterator[None]:
    """Adds the seconds of a phase to the record's `runtime_s`; logs which one it is, where all `phases` are given."""
    if phases:
        log.info("phase %d of %d: %s", phases.index(phase) + 1, len(phases), PHASES[phase])
    start = time.perf_counter()
    try:
        yield
    finally:
        record["runtime_s"][phase] = round(record["runtime_s"].get(phase, 0) + time.perf_counter() - start, 1)


def git_commit() -> str | None:
    """The project's commit, with "-dirty" when the tree has changes; None outside a git checkout."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is not a checkout
        return None
