"""Repeat a logged experiment, or a run of your own, as it was or with some flags changed.

    poetry run python experiments/rerun.py --list
    poetry run python experiments/rerun.py S4 --print
    poetry run python experiments/rerun.py S4 --kl_coef 0.05 --output_dir qwen3_1p7b_s4_kl005

RUN is the id of a published run (logged_runs.jsonl), the tag of a record (the newest record that has it) or FILE:LINE
of a record file. Every `--flag value` after it replaces that flag in the command, or is added to it. The command is
printed on one line that PowerShell and bash both read as the same arguments. Then this Python runs it, in the current
folder, and the exit code is the script's.
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from llm_alignment.files import InputError, SkippedRows, read_objects

HERE = Path(__file__).resolve().parent
LOGGED_RUNS = HERE / "logged_runs.jsonl"
LOGGED_KEYS = {"id", "script", "model", "command", "title", "source", "figures", "measured"}
RECORD_KEYS = {
    "ts", "tag", "script", "argv", "args", "git", "device", "data", "baseline", "final", "delta", "runtime_s", "kept_step",
    "status", "output_dir",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rerun.py",
        usage="rerun.py [--list] RUN [--print] [--flag value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id, tag, or FILE:LINE of a record file")
    parser.add_argument("--list", action="store_true", help="show the runs that can be repeated")
    parser.add_argument("--print", action="store_true", dest="print_only", help="print the command, do not run it")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Finding a run
# ---------------------------------------------------------------------------------------------------------------------


def record_files() -> list[Path]:
    """The record files that the scripts write by default: every JSONL file of this folder but the published runs."""
    return sorted(path for path in HERE.glob("*.jsonl") if path != LOGGED_RUNS)


def load_records(path: Path) -> list[dict]:
    """The runs of a record file, each with its `place` ("sft_experiments.jsonl:3") added.

    Lines torn by a crash and lines that are no record are skipped with a warning.
    """
    skipped = SkippedRows()
    records = []
    for place, row in read_objects(path, skipped):
        if row.keys() >= RECORD_KEYS or row.keys() >= LOGGED_KEYS:
            records.append({**row, "place": place})
        else:
            skipped.add(place, "not a run record")
    skipped.report(f"lines of {path}")
    return records


def find_run(name: str, files: list[Path] | None = None) -> dict:
    """The published run, or the record (of `files`, by default `record_files()`), that `name` stands for.

    Raises InputError when there is none.
    """
    file, _, line = name.rpartition(":")
    if file and line.isdigit():
        path = next((path for path in (Path(file), HERE / file) if path.is_file()), None)
        if path is None:
            raise InputError(f"{name}: there is no file {file}; give the path of a record file and a line number")
        for record in load_records(path):
            if record["place"].endswith(f":{line}"):
                return record
        raise InputError(f"{name}: no record on line {line}; `rerun.py --list` shows the lines that hold one")
    for run in load_records(LOGGED_RUNS):
        if run["id"] == name:
            return run
    files = record_files() if files is None else files
    tagged = [record for path in files for record in load_records(path) if record["tag"] == name]
    if tagged:
        return max(reversed(tagged), key=lambda record: record["ts"])
    raise InputError(f"no run is called {name!r}; `rerun.py --list` shows ids and tags, FILE:LINE names any record")


# ---------------------------------------------------------------------------------------------------------------------
# Its command
# ---------------------------------------------------------------------------------------------------------------------


def run_arguments(run: dict) -> list[str]:
    """What follows the script's name on the run's command line; InputError when its command was not logged."""
    if "argv" in run:
        return run["argv"]
    if run["command"] is None:
        known = ", ".join(f"{key} {value}" for key, value in flatten(run["params"]).items())
        raise InputError(f"{run['id']}: its command was not logged; known of it: model {run['model']}, {known}")
    words = shlex.split(run["command"])
    return words[words.index(run["script"]) + 1 :]


def flatten(values: dict, prefix: str = "") -> dict:
    """{"stage1": {"beta": 0.01}} as {"stage1.beta": 0.01}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def flag_groups(arguments: list[str]) -> list[list[str]]:
    """Each `--flag` with the values that follow it."""
    groups: list[list[str]] = []
    for word in arguments:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise InputError(f"unexpected {word!r}: changes are written --flag value, after the run's name")
    return groups


def flag_name(group: list[str]) -> str:
    """`--kl_coef` for ["--kl_coef", "0.02"] and ["--kl_coef=0.02"]; `--do_eval` for ["--no-do_eval"] too."""
    return group[0].split("=")[0].replace("--no-", "--", 1)


def apply_changes(arguments: list[str], changes: list[str]) -> list[str]:
    """`arguments` with every flag of `changes` put in the place of the same flag, or at the end."""
    groups = flag_groups(arguments)
    for change in flag_groups(changes):
        places = [i for i, group in enumerate(groups) if flag_name(group) == flag_name(change)]
        if places:
            groups[places[0]] = change
            groups = [group for i, group in enumerate(groups) if i not in places[1:]]
        else:
            groups.append(change)
    return [word for group in groups for word in group]


def quote(word: str) -> str:
    """`word` written so that PowerShell and bash both read it as this one argument.

    Bare when neither shell gives any of its characters a meaning (PowerShell splits at commas and at `-x.y`); else in
    single quotes, which are literal in both; else in double quotes, where both would expand `$` and a backtick.
    PowerShell takes typographic quotes for quotes. Windows PowerShell 5.1 drops an empty argument, so an empty value
    is never written as a word of its own (see `join_empty`).
    """
    if re.fullmatch(r"(?!-[A-Za-z?])[A-Za-z0-9_./:=+-]+", word):
        return word
    if "\n" not in word and "\r" not in word:
        if not re.search("['\u2018\u2019\u201a\u201b]", word):
            return f"'{word}'"
        if not re.search('["\u201c\u201d\u201e$`!]|\\\\$|\\\\\\\\', word):
            return f'"{word}"'
    raise InputError(f"{word!r} cannot be written in one way for PowerShell and bash; put it into a file or rename it")


def join_empty(arguments: list[str]) -> list[str]:
    """["--load_adapter", ""] as ["--load_adapter="]."""
    joined: list[str] = []
    for word in arguments:
        if word == "" and joined:
            joined[-1] += "="
        else:
            joined.append(word)
    return joined


def command_line(script: str, arguments: list[str]) -> str:
    return " ".join(["poetry run python", script, *map(quote, arguments)])


# ---------------------------------------------------------------------------------------------------------------------
# Showing and running
# ---------------------------------------------------------------------------------------------------------------------


def print_list() -> None:
    runs = load_records(LOGGED_RUNS)
    width = max(len(run["id"]) for run in runs)
    print("Published runs:")
    for run in runs:
        note = "" if run["command"] else "  [command not logged]"
        print(f"  {run['id']:<{width}}  {run['script']:<18}  {run['title']}{note}")
    for path in record_files():
        print(f"Records in {path.name}:")
        for record in load_records(path):
            print(
                f"  {record['place']}  {record['tag'] or '-'}  {record['script']}  {record['status']}  {record['ts']}"
            )


def execute(script: str, arguments: list[str]) -> int:
    """Run a script of the project with this Python; its exit code, or 128 + the signal that ended it."""
    process = subprocess.Popen([sys.executable, str(HERE.parent / script), *arguments])
    # Ctrl-C reaches the script too, which saves a checkpoint and its record: wait for it
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args, changes = parser.parse_known_args(argv)
    try:
        if args.list:
            print_list()
            return 0
        if args.run is None:
            parser.error("name a run, or ask for --list")
        run = find_run(args.run)
        arguments = join_empty(apply_changes(run_arguments(run), changes))
        print(command_line(run["script"], arguments), flush=True)
        return 0 if args.print_only else execute(run["script"], arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
