"""Repeat logged experiments, or runs of your own, as they were or with some flags changed.

    poetry run python experiments/rerun.py --list
    poetry run python experiments/rerun.py S4 --print
    poetry run python experiments/rerun.py S4 --kl_coef 0.05 --output_dir qwen3_1p7b_s4_kl005
    poetry run python experiments/rerun.py Exp1-1.7B Exp2-1.7B --seeds 1 2 3 --plan
    poetry run python experiments/rerun.py S4 --grid "kl_coef=0,0.03,0.3" --grid "learning_rate=1e-5,1e-4" --seeds 1 2
    poetry run python experiments/rerun.py --import old_dpo_experiments.jsonl

RUN is the id or an alias of a published run (logged_runs.jsonl), the tag of a record (the newest that has it), its
output folder, or FILE:LINE of a record file. Every `--flag value` after the runs replaces that flag in the command, or
is added. The command is printed on one line that PowerShell and bash read as the same arguments. Then this Python runs
it in the current folder, and the exit code is the script's.

Several runs, --seeds or --grid make a campaign: one run after the other, in every combination of the grids' values at
every seed, each with its own output folder (OUTPUT_DIR_kl_coef0.03_seed1) and tag (TAG-kl_coef0.03-seed1). A run of
which a record says that it is completed is skipped, an interrupted one is resumed, a failed one does not stop the
others: the same command continues where the last one stopped. At the end the results are printed, a row for each
combination, and saved in experiments/report/. --plan prints every run's dry run and the sum, and runs nothing.

--import turns records of the original scripts into records here (imported_runs.jsonl), which are then listed, reported
and rerun like any other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from campaign import changed_arguments, execute, plan_runs, print_plan, run_campaign
from commands import command_line, exit_code, join_empty, shown_command
from old_records import IMPORTED, import_records
from records import LOGGED_RUNS, find_run, load_records, record_files, record_name

from llm_alignment.files import InputError
from llm_alignment.flags import seed


def build_parser() -> argparse.ArgumentParser:
    usage = "rerun.py [--list] [--import FILE] RUN [RUN ...] [--print] [--plan] [--seeds N ...] [--grid FLAG=V,V] "
    usage += "[--flag value ...]"
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("rerun.py", usage, __doc__, formatter_class=as_it_is, allow_abbrev=False)
    add, add_task = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("runs", nargs="*", metavar="RUN", help="id, alias, tag, output folder or FILE:LINE")
    add_task("--list", action="store_true", help="show the runs that can be repeated")
    add_task("--import", type=Path, metavar="FILE", help="take over records of the original scripts")
    add_task("--print", action="store_true", dest="print_only", help="print the commands, do not run them")
    add_task("--plan", action="store_true", help="print every run's dry run and the sum, run nothing")
    add("--seeds", nargs="+", type=seed, default=[], metavar="N", help="run each run with each seed")
    add("--same_data", action="store_true", help="at the commits of the hub that the run's record names")
    add("--grid", action="append", default=[], type=grid, metavar="FLAG=V,V",
        help="run each run with each of these values of a flag; may be given several times")  # fmt: skip
    return parser


def grid(text: str) -> tuple[str, list[str]]:
    """("kl_coef", ["0", "0.03"]) of "kl_coef=0,0.03"."""
    flag, _, values = text.removeprefix("--").partition("=")
    if not flag or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not FLAG=VALUE,VALUE; write kl_coef=0,0.03")
    return flag.replace("-", "_"), values.split(",")


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
            status = "imported, " * ("imported" in record) + record["status"]
            print(f"  {record['place']}  {record_name(record)}  {record['script']}  {status}  {record['ts']}")


def pins(run: dict) -> list[str]:
    """Flags that take the run's models and data sets at the commits that its record names."""
    if not run.get("commits"):
        raise InputError(f"--same_data: the record of {run.get('tag') or run.get('id')} names no commit of the hub")
    flags = []
    for flag, commit in run["commits"].items():
        source = run["args"].get(flag) or ("next-tat/TAT-QA" if flag == "tatqa_dir" else "")
        if flag == "model":
            flags += ["--model_revision", commit]
        elif "/" in source:
            flags += [f"--{flag}", f"{source.partition('@')[0]}@{commit}"]
    return flags


def run_one(name: str, changes: list[str], *, same_data: bool, print_only: bool) -> int:
    """One run as its command says; the exit code is the script's."""
    run = find_run(name)
    changes = [*pins(run), *changes] if same_data else changes
    arguments = join_empty(changed_arguments(run, changes))
    print((command_line if print_only else shown_command)(run["script"], arguments), flush=True)
    return 0 if print_only else execute(run["script"], arguments)[0]


def run(argv: list[str] | None) -> int:
    parser = build_parser()
    args, words = parser.parse_known_args(argv)
    first_flag = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    # a RUN after the first flag, as in --print S4, is not taken for one by argparse
    names, changes = [*args.runs, *words[:first_flag]], words[first_flag:]
    import_file, one = getattr(args, "import"), len(names) == 1 and not (args.seeds or args.grid or args.plan)
    asks = import_file or args.list
    for is_wrong, problem in (
        (asks and (names or changes or args.seeds or args.grid), "--list and --import take no run, seed or change"),
        (not asks and not names, "name a run, or ask for --list"),
        (args.same_data and names and not one, "--same_data goes with one run"),
        (len(dict(args.grid)) < len(args.grid), "a flag is in two --grid; name all its values in one"),
    ):
        if is_wrong:
            parser.error(problem)
    if import_file:
        new, known = import_records(import_file)
        print(f"imported {new} records into {IMPORTED}, {known} were there already")
        return 0
    if args.list:
        print_list()
        return 0
    if one:
        return run_one(names[0], changes, same_data=args.same_data, print_only=args.print_only)
    runs = plan_runs(names, args.seeds, changes, dict(args.grid))
    if args.plan:
        return print_plan(runs)
    if not args.print_only:
        return run_campaign(" ".join([*names, *(f"{flag} {' '.join(values)}" for flag, values in args.grid)]), runs)
    for planned in runs:
        print(command_line(planned.script, planned.arguments))
    return 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
