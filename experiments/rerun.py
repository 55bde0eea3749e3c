"""Repeat a logged experiment, or a run of your own, as it was or with some flags changed.

    poetry run python experiments/rerun.py --list
    poetry run python experiments/rerun.py S4 --print
    poetry run python experiments/rerun.py S4 --kl_coef 0.05 --output_dir qwen3_1p7b_s4_kl005

RUN is the id or an alias of a published run (logged_runs.jsonl), the tag of a record (the newest record that has it),
its output folder, or FILE:LINE of a record file. Every `--flag value` after it replaces that flag in the command, or is added to it. The command is
printed on one line that PowerShell and bash both read as the same arguments. Then this Python runs it, in the current
folder, and the exit code is the script's.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

from commands import apply_changes, command_line, join_empty
from records import HERE, LOGGED_RUNS, find_run, load_records, record_files, record_name, run_arguments

from llm_alignment.files import InputError


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
                f"  {record['place']}  {record_name(record)}  {record['script']}  {record['status']}  {record['ts']}"
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
