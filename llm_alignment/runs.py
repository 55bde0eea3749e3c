"""The run folder, the run record, exit codes, logging."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import itertools
import json
import logging
import logging.handlers
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llm_alignment.files import (
    InputError,
    append_record,
    cache_folder,
    causes,
    is_out_of_memory,
    parse_json,
    remove_left_over,
    to_bytes,
    write_json,
)
from llm_alignment.processes import all_processes, main_process, named_device, processes, versions

if TYPE_CHECKING:
    from llm_alignment.models import Base

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
    """Inside, Ctrl-C, SIGTERM and SIGHUP call `handler(signum, frame)`; what `nohup` ignores stays ignored.

    Python handles signals in the main thread alone, so in another one nothing changes. An Interrupted that is raised
    where Python drops errors, as in a `__del__`, comes again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stopping.append(signal.SIGHUP)
    previous, previous_hook = {signum: signal.signal(signum, handler) for signum in stopping}, sys.unraisablehook

    # of the two, os.kill wakes a main thread that waits; on Windows it would end the process
    send = signal.raise_signal if os.name == "nt" else functools.partial(os.kill, os.getpid())

    def come_again(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Interrupted):
            threading.Timer(0.1, send, [dropped.exc_value.signum]).start()
        else:
            previous_hook(dropped)

    sys.unraisablehook = come_again
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        for signum, previous_handler in previous.items():
            signal.signal(signum, previous_handler)


def interrupt(signum: int, frame: Any) -> None:
    """A handler for `signals_go_to`: the signal ends what runs, and is known by the error."""
    raise Interrupted(signum)


@contextlib.contextmanager
def recorded_run(args: argparse.Namespace, argv: list[str] | None, script: str) -> Iterator[dict]:
    """Wraps a run: yields its record, logs to console and run.log, and turns every end into an exit code and a record.

    `ending` has the table of exit codes. Bad input that is found before `begin` and a dry run leave no record and no
    file. The script calls `begin(record)` once its input is checked; `record["runtime_s"]` gets its total here. Ctrl-C
    exits with 130 on the command line, where `argv` is None; a caller of `main(argv)`, such as pytest, gets the
    KeyboardInterrupt.
    """
    started = time.time()
    with console_and_log():
        record: dict = {}
        keeps_record = main_process() and not args.dry_run
        try:
            check_texts(args)
            record |= new_record(args, sys.argv[1:] if argv is None else argv, script, started)
            with signals_go_to(interrupt), run_folder(args, script):
                yield record
            record["status"] = "completed"
        except BaseException as error:
            code, reason, line = ending(error, args)
            record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if not isinstance(error, SystemExit):  # there the script has given its reason
                record["reason"] = reason
            if code is None:  # the interpreter prints it on the console
                log_to_file("".join(traceback.format_exception(error)))
            elif line:
                log_to_file(line)
            if keeps_record and (code != 2 or record.get("device") is not None):
                line += finish(record, args, started)
            if line:
                print(line, file=sys.stderr)
            if code is None or (code == 128 + signal.SIGINT and argv is not None):
                raise
            raise SystemExit(code) from error
        if keeps_record:
            problem = finish(record, args, started)
            if problem:
                print(f"error: the run is complete{problem}", file=sys.stderr)
                raise SystemExit(1)
            log.info("record appended to %s", args.exp_log)


def ending(error: BaseException, args: argparse.Namespace) -> tuple[int | None, str, str]:
    """(exit code, reason for the record, line for the console) of a run that ends by `error`.

    Bad input, also a name that is too long: 2. Packages that cannot be imported: 2. A loss that is not finite, a full
    disk, memory that is full: 1. Signals: 128 + their number. The code is None for any other error, which goes on to
    its traceback.
    """
    go_on = f"the same command goes on in {args.output_dir}, training with --resume_from_checkpoint auto"
    if isinstance(error, InputError):
        return 2, str(error), f"error: {error}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        reason = f"{str(error.filename)[:60]}...: the name is too long; give a shorter one"
        return 2, reason, f"error: {reason}"
    if isinstance(error, NotFiniteError):
        advice = f"the last checkpoint in {args.output_dir} is whole: lower --learning_rate and rerun"
        return 1, str(error), f"error: {error}; {advice}"
    if isinstance(error, KeyboardInterrupt):
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        return 128 + signum, signal_name(signum), f"interrupted: {go_on}"
    if isinstance(error, SystemExit):
        return None, "", ""
    if is_out_of_memory(error):
        used, advice = memory_use(args)
        reason = f"out of memory{used} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        return 1, reason, f"error: out of memory{used}; {advice}"
    if reason := disk_problem(error):
        return 1, reason, f"error: {reason}; free space or give write access, then {go_on}"
    if reason := import_problem(error):
        return 2, reason, f"error: {reason}"
    return None, f"{type(error).__name__}: {error}", ""


def memory_use(args: argparse.Namespace) -> tuple[str, str]:
    """The flags that decide how much memory a run takes, as " at --batch 8 ...", and what to do when that is gone."""
    flags = vars(args)
    sizes = ("batch", "max_seq_length", "max_length", "gradient_checkpointing", "eval_batch_size")
    used = "".join(f" --{name} {flags[name]}" for name in sizes if name in flags)
    advice = "in an evaluation give a lower --eval_batch_size (0: by free memory)"
    if "batch" in flags:
        length = "--max_seq_length" if "max_seq_length" in flags else "--max_length"
        advice = (
            "in training add --gradient_checkpointing on and --resume_from_checkpoint auto, or start in another "
            f"--output_dir with half of --batch and twice --grad_acc, or with a lower {length}; {advice}"
        )
    if flags.get("no_4bit"):
        advice += "; without --no_4bit the base takes a quarter of it"
    return f" at{used}" if used else "", advice


def import_problem(error: BaseException) -> str:
    """Which package cannot be imported or used, why, and what helps; "" when `error` has another cause."""
    for cause in reversed(causes(error)):
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        reason = str(cause).strip().split("\n")[0]
        if any(frame.f_globals.get("__name__") == "bitsandbytes.cextension" for frame in frames):
            return (
                "bitsandbytes has no native library for this machine; install it again (pip install --force-reinstall "
                "bitsandbytes), or add --no_4bit to train without it"
            )
        modules = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
        imported = [module for module in modules if module != "__main__"]
        if imported or isinstance(cause, ImportError):
            package = (getattr(cause, "name", None) or (imported or ["a package"])[-1]).partition(".")[0]
            return f"{package} cannot be imported ({reason}); install it again: pip install -e . or poetry install"
    return ""


DISK_ERRORS = {
    "EACCES", "EDQUOT", "EFBIG", "EIO", "EISDIR", "ENAMETOOLONG", "ENOSPC", "ENOTDIR", "EPERM", "EROFS", "ESTALE",
}  # fmt: skip
FULL_DISK = re.compile(
    r"No space left on device|os error (?:5|27|28|30|122)\b|quota exceeded|PytorchStreamWriter|inline_container", re.I
)


def disk_problem(error: BaseException) -> str:
    """What the disk refused; "" when `error` has another cause. Libraries wrap the system's error or only quote it."""
    for cause in causes(error):
        if isinstance(cause, OSError) and errno.errorcode.get(cause.errno or 0) in DISK_ERRORS:
            return f"{cause.filename}: {cause.strerror}" if cause.filename else str(cause.strerror)
        if FULL_DISK.search(str(cause)):
            return f"a file cannot be written ({str(cause).strip().splitlines()[0]})"
    return ""


def new_record(args: argparse.Namespace, argv: list[str], script: str, started: float) -> dict:
    """The record of a run that begins; its keys are those of every line of --exp_log."""
    return {
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


def finish(record: dict, args: argparse.Namespace, started: float) -> str:
    """Adds the total runtime and appends the record to --exp_log. Returns what went wrong there, "" when nothing did.

    A record that cannot be appended is kept in the output folder, or else printed.
    """
    record["runtime_s"]["total"] = round(time.time() - started, 1)
    try:
        append_record(Path(args.exp_log), record)
    except OSError as error:
        problem = f"; its record could not be appended to {args.exp_log} ({error.strerror})"
    else:
        return ""
    try:
        write_json(Path(args.output_dir) / "record.json", record)
    except OSError:
        print(json.dumps(record, ensure_ascii=False))
        return f"{problem} and is printed on stdout"
    return f"{problem} and is in {Path(args.output_dir) / 'record.json'}"


class Console:
    """A stream to print on that outlives its reader: after `| head -1`, or closed, it takes text and drops it.

    `problem` is why text was lost where somebody waits for it, such as in a file on a full disk; else "".
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.problem = stream, ""

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self.stream.flush())

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # a pipe without a reader; a closed stream
            self.problem = disk_problem(error)
            nowhere = open(os.devnull, "w", encoding="utf-8")
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), self.stream.fileno())  # what C code prints, and the rest of the buffer
            self.stream = nowhere

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_console() -> Iterator[Console]:
    """Inside, printing never ends the run, also to a console that is closed or whose reader has gone; gives stdout."""
    first_free = os.open(os.devnull, os.O_RDWR)
    while first_free < 3:  # a closed stdin, stdout or stderr: no file of the run may get its number
        first_free = os.open(os.devnull, os.O_RDWR)
    os.close(first_free)
    print_unknown_letters_as_question_marks()
    streams = sys.stdout, sys.stderr
    consoles = [Console(stream or open(os.devnull, "w", encoding="utf-8")) for stream in streams]
    sys.stdout, sys.stderr = consoles
    try:
        yield consoles[0]
    finally:
        for console in consoles:
            console.flush()
        sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def console_and_log() -> Iterator[None]:
    """As `lasting_console`; the project's log goes to stdout and to memory until run.log is open."""
    # What libraries say to one another: their deprecations, and bitsandbytes missing an optional CPU kernel.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    raise_exceptions, logging.raiseExceptions = logging.raiseExceptions, False  # a log on a full disk is no traceback
    with lasting_console():
        held = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        log.handlers = [logging.StreamHandler(sys.stdout), held] if main_process() else [logging.NullHandler()]
        log.setLevel(logging.INFO)
        log.propagate = False
        if "WORLD_SIZE" not in os.environ:  # one process drives one device; transformers would use all that it sees
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        try:
            yield
        finally:
            for handler in log.handlers:
                handler.close()
            log.handlers = []
            logging.raiseExceptions = raise_exceptions


def print_unknown_letters_as_question_marks() -> None:
    """A Windows console, or a file that its output goes to, may not know every Russian letter."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def log_to_file(text: str) -> None:
    """Writes to run.log alone."""
    for handler in log.handlers[1:]:
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))


@contextlib.contextmanager
def run_folder(args: argparse.Namespace, script: str) -> Iterator[None]:
    """Makes and locks the output folder, and looks whether --exp_log and the cache can be written; a run that leaves
    no file removes it.

    Raises InputError when another run works in the folder, when it holds the run of another script, or when folder,
    log or cache cannot be written. The lock of a process that died is free.
    """
    if processes() > 1:
        all_processes().wait_for_everyone()  # the demo's folder is the first free one: all have looked by now
    if not main_process():
        yield
        return
    folder = Path(args.output_dir)
    check_log(Path(args.exp_log))
    if not args.no_baseline_cache:
        advice = "name another folder by LLM_ALIGNMENT_CACHE, or add --no_baseline_cache"
        check_writable(cache_folder() / "baselines" / "rows.jsonl", "cache", advice)
    with contextlib.ExitStack() as stack:
        try:
            if folder.is_file():
                raise InputError(f"--output_dir {folder} is a file; name a folder")
            refusal = "another run is working in this folder; wait for its end or name another folder"
            stack.enter_context(held_alone(folder / "run.lock", f"--output_dir {folder}: {refusal}"))
        except OSError as error:
            reason = "a link to nowhere" if os.path.islink(folder) and not os.path.exists(folder) else error.strerror
            raise InputError(f"--output_dir {folder}: cannot be written ({reason}); name another folder") from error
        check_script(folder, script)
        yield


@contextlib.contextmanager
def held_alone(path: Path, refusal: str) -> Iterator[None]:
    """Inside, this process alone holds the lock file `path`, whose folder is made; at the end the file is removed, and
    the folders that were made and stayed empty.

    The lock of a process that died is free. Raises InputError with the text `refusal` while another process holds it.
    """
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
        if lock.is_locked:
            with contextlib.suppress(OSError):
                if os.name != "nt":  # while it is held, so that nobody else loses a lock taken since
                    path.unlink()
            lock.release()
            with contextlib.suppress(OSError):
                if os.name == "nt":  # which does not delete what is open
                    path.unlink()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def check_script(folder: Path, script: str) -> None:
    """Raises InputError when `folder` holds the run of another script, a model or an adapter, which a run would
    overwrite or mix with its own files."""
    path = folder / "run.json"
    if not path.exists():
        for name in ("config.json", "adapter_config.json"):
            if (folder / name).exists():
                raise InputError(f"--output_dir {folder} holds a model or an adapter ({name}); name another folder")
        return
    try:
        other = parse_json(path.read_bytes())["script"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged_run(path) from error
    if other != script:
        raise InputError(f"--output_dir {folder} holds another run ({other}); name another folder")


def damaged_run(path: Path) -> InputError:
    return InputError(
        f"{path} is damaged, so the run cannot be checked: put it back, or start again in another --output_dir"
    )


def check_texts(args: argparse.Namespace) -> None:
    """Raises InputError for a flag's text that UTF-8 cannot spell: the line of the record would not be readable."""
    for name, value in vars(args).items():
        try:
            to_bytes(str(value)).decode("utf-8")
        except UnicodeError as error:
            raise InputError(f"--{name} {ascii(value)}: not valid Unicode text; give another name") from error


RECORD_KEYS = ({"ts", "script"}, {"ts", "params"}, {"timestamp", "stages"})  # the last two: of the original scripts


def check_log(path: Path) -> None:
    """Raises InputError when --exp_log cannot be written, or is a file that holds something other than records."""
    check_writable(path, "--exp_log")
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        for line in itertools.islice(file, 100):  # a crash may have cut off some
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict) and any(row.keys() >= keys for keys in RECORD_KEYS):
                    return
    raise InputError(
        f"--exp_log {path} is a file without run records, which the record would damage; name another file"
    )


def check_writable(path: Path, flag: str, advice: str = "name another file") -> None:
    """Raises InputError when the file that `flag` names cannot be written; touches nothing."""
    try:
        if path.is_dir():
            raise InputError(f"{flag} {path} is a folder; name a file")
        if path.is_fifo():
            raise InputError(f"{flag} {path} is a pipe; name a file")
        if path.is_symlink() and not path.exists():
            raise InputError(f"{flag} {path} is a link to nowhere; name another file")
        name_limit = 255 - len(b".4194304.tmp")
        if len(os.fsencode(path.name)) > name_limit:
            raise InputError(f"{flag} {path.name[:40]}...: the name is too long; name another file")
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        if existing == path:
            path.open("ab").close()
        else:  # tried, because root has the right to write in /proc and cannot
            tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror}); {advice}") from error


def begin(record: dict, data: dict, base: Base, commits: dict[str, str | None]) -> Path:
    """Creates the output folder and writes run.json and run.log. `data` is the fingerprint of the data, `commits` are those of
    what the hub gave, by flag.

    A resumed run keeps the run.json that it was started with.
    """
    import torch

    name, dtype = named_device(base.device, base.dtype)
    record["device"] = {
        "name": name,
        "dtype": dtype,
        "processes": processes(),
        "threads": torch.get_num_threads(),
    }
    record["data"], record["commits"] = data, commits
    folder = Path(record["output_dir"])
    all_processes().wait_for_everyone()  # all have looked at the folder before it changes
    if main_process():
        folder.mkdir(parents=True, exist_ok=True)
        remove_left_over(folder)
        keys = ("ts", "tag", "script", "argv", "args", "git", "versions", "device", "data", "commits")
        if not (record["args"].get("resume_from_checkpoint") and (folder / "run.json").exists()):
            write_json(folder / "run.json", {key: record[key] for key in keys})
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8", errors="surrogateescape")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        console, held = log.handlers
        assert isinstance(held, logging.handlers.MemoryHandler)
        held.setTarget(handler)
        held.flush()
        log.handlers = [console, handler]
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
