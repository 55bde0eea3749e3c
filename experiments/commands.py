"""A run's command: with some flags changed, and written so that PowerShell and bash read the same arguments."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable

from llm_alignment.endings import console_and_log, disk_problem, interrupt, lasting_console, signals_go_to
from llm_alignment.files import InputError


def flag_groups(arguments: list[str]) -> dict[str, list[str]]:
    """Each flag's words by its name, the last ones of a flag that is given twice: {"--seed": ["--seed", "1"]}. The
    name is --kl_coef of --kl_coef=0.02 and --kl-coef too, and --do_eval of --no-do_eval."""
    groups: dict[str, list[str]] = {}
    flag = ""
    for word in arguments:
        if word.startswith("--"):
            flag = "--" + word.split("=")[0].replace("--no-", "--", 1)[2:].replace("-", "_")
            groups[flag] = [word]
        elif flag:
            groups[flag].append(word)
        else:
            raise InputError(f"unexpected {word!r}: changes are written --flag value, after the run's name")
    return groups


def apply_changes(arguments: list[str], changes: list[str]) -> list[str]:
    """`arguments` in which every flag of `changes` replaces the same flag, or is added at the end."""
    return [word for group in (flag_groups(arguments) | flag_groups(changes)).values() for word in group]


def same_command(arguments: list[str], others: list[str]) -> bool:
    """Whether two command lines ask for the same run: the order of flags and resuming do not matter."""

    def flags(words: list[str]) -> dict[str, list[str]]:
        groups = flag_groups([*words, "--resume_from_checkpoint"])
        return {flag: group[0].split("=", 1) + group[1:] for flag, group in groups.items()}

    return flags(arguments) == flags(others)


def quote(word: str) -> str:
    """`word` written so that PowerShell and bash both read it as this one argument: bare or in single quotes.
    PowerShell splits bare words at commas and at `-x.y`. Raises InputError for a quote of any kind (PowerShell takes
    typographic ones for quotes, version 5.1 does not escape a `"`), a new line, and a blank with a backslash at the
    end, which 5.1 damages."""
    if re.fullmatch(r"(?!-[A-Za-z?])[A-Za-z0-9_./:=+-]+", word):
        return word
    if re.search(r"""[\n\r"'\u2018-\u201f]|\s.*\\$""", word):
        raise InputError(f"{word!r} reads differently in PowerShell and bash; put it into a file or rename it")
    return f"'{word}'"


def join_empty(arguments: list[str]) -> list[str]:
    """["--load_adapter", ""] as ["--load_adapter="]."""
    joined: list[str] = []
    for word in arguments:
        if word == "" and joined:
            joined[-1] += "="
        else:
            joined.append(word)
    return joined


def logged_exit_code(run: Callable[[], None]) -> int:
    """`exit_code` of a program that loads models, so that it logs as the scripts do."""
    return exit_code(console_and_log()(run))


def exit_code(run: Callable[[], int | None]) -> int:
    """What `run()` gives; after one line 2 for bad input, 1 for what the disk refuses, 128 + the signal that stops it.
    A reader that has seen enough, as `head -1`, does not end it."""
    with lasting_console() as console:
        try:
            with signals_go_to(interrupt):
                code = run() or 0
            console.flush()
            if not console.problem:
                return code
            line, code = f"error: what was printed is not complete ({console.problem})", code or 1
        except InputError as error:
            line, code = f"error: {error}", 2
        except KeyboardInterrupt as error:
            line, code = "interrupted: start the same command again", 128 + getattr(error, "signum", signal.SIGINT)
        except Exception as error:
            reason = disk_problem(error) or (str(error) if isinstance(error, OSError) else "")
            if not reason:
                raise
            line, code = f"error: {reason}; free space, give write access or name another folder", 1
        print(line, file=sys.stderr)
        return code


def command_line(script: str, arguments: list[str]) -> str:
    """The command on one line; raises InputError where no line reads the same in PowerShell and bash."""
    return " ".join(["poetry run python", script, *map(quote, arguments)])


def shown_command(script: str, arguments: list[str]) -> str:
    """The command on one line, or, where no line reads the same in PowerShell and bash, the list of its arguments."""
    try:
        return command_line(script, join_empty(arguments))
    except InputError:
        return f"{script} {json.dumps(arguments, ensure_ascii=False)}"


def parse_strictly(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """As `parser.parse_args`, but a wrong flag is an InputError, and a --help that slipped in is one too."""

    def refuse(message: str) -> None:
        raise InputError(message)

    parser.error = refuse  # type: ignore[method-assign, assignment]
    if {"--help", "--help_all", "--version"} & {*arguments}:
        raise InputError("--help is not part of a run's command")
    return parser.parse_args(arguments)
