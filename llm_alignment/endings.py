"""How a run ends: exit codes, signals, the console."""

import contextlib
import errno
import io
import logging
import logging.handlers
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llm_alignment.files import InputError, causes, is_out_of_memory, log
from llm_alignment.processes import main_process

DISK_ERRORS = "EACCES EDQUOT EFBIG EIO EISDIR ENAMETOOLONG ENOSPC ENOTDIR EPERM EROFS ESTALE".split()


class NotFiniteError(Exception):
    """Loss, gradient or final figure is not finite; the run stops with exit code 1 and the last checkpoint stays."""


class MissedGateError(Exception):
    """The run is complete and its figures are worse than it was asked for; exit code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; the exit code is 128 + `signum`."""

    def __init__(self, signum: int):
        super().__init__(signal_name(signum))
        self.signum = signum


def signal_name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


@contextlib.contextmanager
def signals_go_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP call `handler(signum, frame)` in the main thread; what `nohup` ignores stays
    ignored. An Interrupted that is raised where Python drops errors, as in a `__del__`, comes again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stopping.append(signal.SIGHUP)
    previous, previous_hook = {signum: signal.signal(signum, handler) for signum in stopping}, sys.unraisablehook

    def come_again(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Interrupted):
            threading.Timer(0.1, signal.raise_signal, [dropped.exc_value.signum]).start()
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


class Ending(NamedTuple):
    """Exit code, reason for the record, what the user can do; `is_rare` when only the traceback explains it."""

    code: int
    reason: str
    advice: str = ""
    is_rare: bool = False


def ending(error: BaseException, folder: str) -> Ending:
    """How a run in `folder` ends by `error`: bad input, missing packages 2, signals 128 + their number, others 1."""
    resume = f"the same command resumes in {folder}, training with --resume_from_checkpoint auto"
    named = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    if isinstance(error, InputError | MissedGateError):
        return Ending(2 if isinstance(error, InputError) else 1, str(error))
    if isinstance(error, KeyboardInterrupt):
        signum = getattr(error, "signum", signal.SIGINT)
        return Ending(128 + signum, signal_name(signum), resume)
    if isinstance(error, NotFiniteError):
        return Ending(1, str(error), f"the last checkpoint in {folder} is whole: lower --learning_rate and rerun")
    if is_out_of_memory(error):
        advice = "in training add --gradient_checkpointing on and --resume_from_checkpoint auto, or start in another "
        advice += "--output_dir with half of --batch and twice --grad_acc; in an evaluation lower --eval_batch_size"
        return Ending(1, f"out of memory ({named})", advice)
    if reason := disk_problem(error):
        code = 2 if getattr(error, "errno", 0) == errno.ENAMETOOLONG else 1
        return Ending(code, reason, f"free space, give write access or name another place; {resume}")
    if isinstance(error, ImportError):
        return Ending(2, f"{error.name} cannot be imported ({error})", "install it again: pip install -e .")
    if Path(folder).exists() and shutil.disk_usage(folder).free < 2**20:  # libraries only quote the system's error
        return Ending(1, named, f"the disk of {folder} is full: free space; {resume}")
    return Ending(1, named, is_rare=True)


def explain(end: Ending, error: BaseException) -> str:
    """The end in one line, written to run.log too. The traceback of a rare one is there alone; before run.log is open,
    and in other processes than the main one, it goes to the console."""
    line = ("interrupted: " if end.code > 128 else "error: ") + end.reason + f"; {end.advice}" * bool(end.advice)
    text = "".join(traceback.format_exception(error)) if end.is_rare else line
    if path := to_run_log(text, logging.ERROR):
        return line + f"; its traceback is in {path}" * end.is_rare
    if end.is_rare:
        print(text, end="", file=sys.stderr)
    return line


def to_run_log(text: str, level: int = logging.INFO) -> str:
    """Writes a text to run.log alone; gives its path, "" where none is open."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, level, "", 0, text, (), None))
            return handler.baseFilename
    return ""


def disk_problem(error: BaseException) -> str:
    """What the disk refused, in the system's words; "" when `error` has another cause."""
    for cause in causes(error):
        if isinstance(cause, OSError) and errno.errorcode.get(cause.errno or 0) in DISK_ERRORS:
            return f"{cause.filename}: {cause.strerror}" if cause.filename else str(cause.strerror)
    return ""


class Console:
    """A stream to print on that outlives its reader: after `| head -1` it takes text and drops it. `problem`: why text
    was lost where somebody waits for it, such as in a file on a full disk; else ""."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.problem = stream, ""
        if isinstance(stream, io.TextIOWrapper):  # a Windows console may not know every Russian letter
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable[..., object], *values: str) -> None:
        try:
            action(*values)
        except OSError as error:
            self.problem = disk_problem(error)
            nowhere = open(os.devnull, "w", encoding="utf-8")
            os.dup2(nowhere.fileno(), self.stream.fileno())  # for the rest of the buffer, and for what C code prints
            self.stream = nowhere

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_console() -> Iterator[Console]:
    """Inside, printing never ends the run, also to a console whose reader has gone; gives stdout."""
    # without a console they are None
    out, err = (Console(stream or open(os.devnull, "w", encoding="utf-8")) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


@contextlib.contextmanager
def console_and_log() -> Iterator[None]:
    """As `lasting_console`; the project's log goes to stdout and to memory until run.log is open."""
    # What libraries say to one another: their deprecations, and bitsandbytes missing an optional CPU kernel.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    raise_exceptions, logging.raiseExceptions = logging.raiseExceptions, False  # no traceback for a full disk
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


def open_log(path: Path) -> None:
    """From here on the log goes to `path` too, with what was logged before."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="surrogateescape")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console, held = log.handlers
    assert isinstance(held, logging.handlers.MemoryHandler)
    held.setTarget(handler)
    held.flush()
    log.handlers = [console, handler]
