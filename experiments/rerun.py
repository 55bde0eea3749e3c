"""Repeat logged experiments, or runs of your own, as they were or with some flags changed.

    poetry run python experiments/rerun.py --list
    poetry run python experiments/rerun.py S4 --print
    poetry run python experiments/rerun.py S4 --kl_coef 0.05 --output_dir qwen3_1p7b_s4_kl005
    poetry run python experiments/rerun.py Exp1-1.7B Exp2-1.7B --seeds 1 2 3 --plan
    poetry run python experiments/rerun.py --import old_dpo_experiments.jsonl

RUN is the id or an alias of a published run (logged_runs.jsonl), the tag of a record (the newest record that has
it), its output folder, or FILE:LINE of a record file. Every `--flag value` after the runs replaces that flag in the
command, or is added to it. The command is printed on one line that PowerShell and bash both read as the same
arguments. Then this Python runs it, in the current folder, and the exit code is the script's.

Several runs, or --seeds, make a campaign: one run after the other. A run of which a record says that it is completed
is skipped, an interrupted one is resumed, a failed one does not stop the others, and at the end the results are
printed. The same command goes on where the last one stopped. With --seeds every seed has its own output folder
(OUTPUT_DIR_seedN) and tag (TAG-seedN). --plan prints the dry run of every run and the sum, and runs nothing.

--import turns the records of the original scripts into records here (imported_runs.jsonl): they are then listed,
reported and rerun like any other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from campaign import execute, plan_runs, print_plan, run_campaign
from commands import apply_changes, command_line, exit_code, join_empty, shown_command
from old_records import IMPORTED, import_records
from records import LOGGED_RUNS, find_run, load_records, record_files, record_name, run_arguments

from llm_alignment.flags import seed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rerun.py",
        usage="rerun.py [--list] [--import FILE] RUN [RUN ...] [--print] [--plan] [--seeds N ...] [--flag value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id, alias, tag, output folder or FILE:LINE")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--list", action="store_true", help="show the runs that can be repeated")
    task.add_argument("--import", type=Path, metavar="FILE", help="take over records of the original scripts")
    task.add_argument("--print", action="store_true", dest="print_only", help="print the commands, do not run them")
    task.add_argument("--plan", action="store_true", help="print every run's dry run and the sum, run nothing")
    parser.add_argument("--seeds", nargs="+", type=seed, default=[], metavar="N", help="run each run with each seed")
    return parser


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
            status = f"imported, {record['status']}" if "imported" in record else record["status"]
            print(f"  {record['place']}  {record_name(record)}  {record['script']}  {status}  {record['ts']}")


def run_one(name: str, changes: list[str], *, print_only: bool) -> int:
    """One run as its command says; the exit code is the script's."""
    run = find_run(name)
    arguments = join_empty(apply_changes(run_arguments(run), changes))
    if print_only:
        print(command_line(run["script"], arguments))
        return 0
    print(shown_command(run["script"], arguments), flush=True)
    return execute(run["script"], arguments)[0]


def run(argv: list[str] | None) -> int:
    parser = build_parser()
    args, words = parser.parse_known_args(argv)
    first_flag = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    # a RUN after the first flag, as in --print S4, is not taken for one by argparse
    names, changes = [*args.runs, *words[:first_flag]], words[first_flag:]
    import_file = getattr(args, "import")
    if (import_file or args.list) and (names or changes or args.seeds):
        parser.error("--list and --import stand alone: no run, seed or change goes with them")
    if import_file:
        new, known = import_records(import_file)
        print(f"imported {new} records into {IMPORTED}, {known} were there already")
        return 0
    if args.list:
        print_list()
        return 0
    if not names:
        parser.error("name a run, or ask for --list")
    if len(names) == 1 and not args.seeds and not args.plan:
        return run_one(names[0], changes, print_only=args.print_only)
    runs = plan_runs(names, args.seeds, changes)
    if args.print_only:
        for planned in runs:
            print(command_line(planned.script, planned.arguments))
        return 0
    return print_plan(runs) if args.plan else run_campaign(runs)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
