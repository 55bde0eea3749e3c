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
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import records
from records import HERE, REPORT, find_run, from_record, load_records, record_files, run_arguments
from tables import deltas_table, document, headline_table, markdown_table, terminal_table

from llm_alignment import flags
from llm_alignment.endings import signals_go_to
from llm_alignment.evaluation import missed_gates
from llm_alignment.files import InputError, write_atomic
from llm_alignment.hub import adapter_files_sha256, commit_of, files_sha256


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
    add("--seeds", nargs="+", type=flags.seed, default=[], metavar="N", help="run each run with each seed")
    add("--same_data", action="store_true", help="at the commits of the hub that the run's record names")
    add("--grid", action="append", default=[], type=grid, metavar="FLAG=V,V", help="a run for each value of a flag")
    return parser


def grid(text: str) -> tuple[str, list[str]]:
    """("kl_coef", ["0", "0.03"]) of "kl_coef=0,0.03"."""
    flag, _, values = text.removeprefix("--").partition("=")
    if not flag or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not FLAG=VALUE,VALUE; write kl_coef=0,0.03")
    return flag.replace("-", "_"), values.split(",")


def print_list() -> None:
    runs = load_records(records.LOGGED_RUNS)
    width = max(len(run["id"]) for run in runs)
    print("Published runs:")
    for run in runs:
        note = "  [command not logged]" * (run["command"] is None)
        print(f"  {run['id']:<{width}}  {run['script']:<18}  {run['title']}{note}")
    for path in record_files():
        print(f"Records in {path.name}:")
        for record in load_records(path):
            status = "imported, " * ("imported" in record) + record["status"]
            print(f"  {record['place']}  {from_record(record).name}  {record['script']}  {status}  {record['ts']}")


class PlannedRun(NamedTuple):
    """One run of a campaign: its script, the words after it, and where its files and its record go."""

    name: str
    script: str
    arguments: list[str]
    output_dir: Path
    exp_log: Path
    model: str = ""
    adapter: str = ""  # --load_adapter, or --adapter of mtbench_eval.py

    def record(self) -> dict | None:
        """The newest record of this command (see `same_command`) with the model and adapter in these folders now."""
        files = dict.fromkeys([*record_files(), *([self.exp_log.resolve()] if self.exp_log.is_file() else [])])
        model, found = Path(self.model), []
        for record in (record for path in files for record in load_records(path)):
            if record["script"] == self.script and records.same_command(record.get("argv", []), self.arguments):
                base, adapter = record.get("base"), (record.get("data") or {}).get("adapter")
                is_base = base is None or not model.is_dir() or base == (commit_of(model) or files_sha256(model))
                is_known = adapter is None or not self.adapter or adapter == adapter_files_sha256(self.adapter)
                found += [record] * (is_base and is_known)
        return max(reversed(found), key=lambda record: record["ts"], default=None)

    def resuming(self) -> list[str]:
        """The arguments, with --resume_from_checkpoint auto where an earlier start has left something."""
        if self.output_dir.exists() and self.script != "mtbench_eval.py":  # there the same command simply resumes
            return records.apply_changes(self.arguments, ["--resume_from_checkpoint", "auto"])
        return self.arguments


def plan_runs(names: list[str], seeds: list[int], changes: list[str], grid: dict[str, list[str]]) -> list[PlannedRun]:
    """The runs of `names` with `changes` (those of --config files too), each in every cell of the grid at every seed
    (at its own without `seeds`). `grid`: {"kl_coef": ["0", "0.03"]}. A run with a grid or seeds goes to
    OUTPUT_DIR_kl_coef0.03_seed1 and is tagged TAG-kl_coef0.03-seed1. Raises InputError for a run that is not known, a
    value that is given twice, a flag that is given in two ways, and two runs with one output folder."""
    axes = grid | ({"seed": [str(seed) for seed in seeds]} if seeds else {})
    changed = {flag[2:] for flag in records.flag_groups(changes)} | (grid.keys() & {"seed"} if seeds else set())
    for flag, values in axes.items():
        if twice := [value for value in values if values.count(value) > 1]:
            raise InputError(f"--{flag} {twice[0]} is given twice; give every value once")
        if flag in changed:
            raise InputError(f"--{flag} is given twice; name its values in one place")
        if flag in {"output_dir", "exp_tag", "exp_log"}:
            raise InputError(f"--grid {flag}: every cell gets its own folder and tag; leave it out")
    planned: dict[Path, PlannedRun] = {}
    for name in names:
        run = find_run(name)
        arguments = records.apply_changes(run_arguments(run), records.parser_of(run["script"]).expand(changes))
        for cell in itertools.product(*axes.values()):
            new = plan_run(name, run["script"], arguments, dict(zip(axes, cell, strict=True)))
            other = planned.setdefault(new.output_dir.resolve(), new)
            if other is not new:
                both = f"{other.name} and {new.name} share the output folder {new.output_dir}"
                raise InputError(f"{both}; run them one by one, each with an --output_dir")
    return list(planned.values())


def plan_run(name: str, script: str, arguments: list[str], cell: dict[str, str]) -> PlannedRun:
    """One run as it will be started, with the flags of `cell`. Raises InputError for a command that does not parse."""
    in_cell = itertools.chain.from_iterable((f"--{flag}", value) for flag, value in cell.items())
    arguments = records.apply_changes(arguments, [*in_cell])
    try:
        parser = records.parser_of(script)
        arguments = parser.expand(arguments)  # as the run's record has them
        args = records.parse_strictly(parser, arguments)
    except InputError as error:
        raise InputError(f"{name}: {script} refuses its command ({error}); change it or leave it out") from error
    known, folder = vars(args), args.output_dir
    if args.demo and "--output_dir" not in records.flag_groups(arguments):
        folder = f"demo_{re.sub('^demo[-_]', '', in_file_name(name))}"
        arguments = records.apply_changes(arguments, ["--output_dir", folder])
    if cell:
        parts = [flag + in_file_name(value) for flag, value in cell.items()]
        folder, tag = (re.sub(r"[-_]seed\d+$", "", text) for text in (str(Path(folder)), args.exp_tag or name))
        folder, tag = "_".join([folder, *parts]), "-".join([tag, *parts])
        name = " ".join([name, *(f"{flag} {value}" for flag, value in cell.items())])
        arguments = records.apply_changes(arguments, ["--output_dir", folder, "--exp_tag", tag])
    # dpo_train_mt.py adds it to the name
    mix = "_3way_hybrid" if known.get("use_3way_hybrid") else "_hybrid" if known.get("use_hybrid") else ""
    model = flags.DEMO["model"] if args.demo and "--model" not in records.flag_groups(arguments) else args.model
    adapter = known.get("load_adapter") or known.get("adapter") or ""
    return PlannedRun(name, script, arguments, Path(f"{Path(folder)}{mix}"), Path(args.exp_log), model, adapter)


def in_file_name(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z._-]+", "_", text)


def execute(script: str, arguments: list[str]) -> tuple[int, int]:
    """Runs a script; its exit code, or 128 + the signal that ended it, and the signal that this program got, or 0."""
    process = subprocess.Popen([sys.executable, str(HERE.parent / script), *arguments])
    received = [0]

    def hand_on(signum: int, frame: object) -> None:
        received.append(signum)
        if signum == signal.SIGTERM:  # others reach the script too, which saves a checkpoint and its record
            process.terminate()

    with signals_go_to(hand_on):
        code = process.wait()
    return (code if code >= 0 else 128 - code), received[-1]


def run_campaign(title: str, runs: list[PlannedRun]) -> int:
    """Runs what is not completed and continues after failures. Prints the status of every run, then a row for each run
    or cell of the grid; several seeds of one are one row. Both are saved under the title, with every difference. The
    exit code is 0 when all are completed and none missed a gate, 130 or 143 when it was stopped, else 1."""
    stopped = 0
    for place, run in enumerate(runs, 1):
        at, record = f"[{place}/{len(runs)}] {run.name}", run.record()
        if record and record["status"] == "completed":
            print(f"{at}: completed {record['ts']} ({record['place']})", flush=True)
            continue
        arguments = run.resuming()
        print(f"{at}: {records.shown_command(run.script, arguments)}", flush=True)
        code, received = execute(run.script, arguments)
        if received or code in {130, 143}:  # Windows has another exit code for Ctrl-C
            stopped = 128 + received if received else code
            print(f"stopped at {run.name}; the same command resumes there", flush=True)
            break
        if code:
            print(f"{run.name} ended with exit code {code}; continuing with the next run", flush=True)
    found = [(run, run.record()) for run in runs]
    rows = [[run.name, record["status"] if record else "no record", str(run.output_dir)] for run, record in found]
    merged = records.merge_seeds([from_record(record) for _, record in found if record])
    tables = [(["Run", "Status", "Output folder"], rows), *filter(None, [headline_table(merged)])]
    for table in tables:
        print(f"\n{terminal_table(*table)}", flush=True)
    path = HERE / REPORT / f"campaign_{in_file_name(title)[:80]}.md"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, document([f"# {title}", *(markdown_table(*table) for table in tables), deltas_table(merged)]))
    print(f"wrote {path}", flush=True)
    if left := [run.name for run, record in found if not record or record["status"] != "completed"]:
        print(f"not completed: {', '.join(left)}; the same command tries them again", file=sys.stderr)
    if missed := [run.name for run, record in found if record and missed_gates(record)]:
        print(f"missed a gate: {', '.join(missed)}", file=sys.stderr)
    return stopped or int(bool(left or missed))


def print_plan(runs: list[PlannedRun]) -> int:
    """Prints the dry run of every run that is not completed, and the sum; 0, or 1 when a dry run failed."""
    counts, steps = dict.fromkeys(("completed", "to resume", "to start", "not possible"), 0), 0
    for run in runs:
        if (run.record() or {}).get("status") == "completed":
            counts["completed"] += 1
            print(f"{run.name}: completed", flush=True)
            continue
        arguments = records.apply_changes(run.resuming(), ["--dry_run"])
        print(f"{run.name}: {records.shown_command(run.script, arguments)}", flush=True)
        command = [sys.executable, str(HERE.parent / run.script), *arguments]
        in_utf8 = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # Windows would write a pipe in the system's code page
        dry_run = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", env=in_utf8)
        print(dry_run.stdout, flush=True)
        steps += sum(int(n.replace(",", "")) for n in re.findall(r"^steps: (\d[\d,]*)", dry_run.stdout, re.MULTILINE))
        resumes = "--resume_from_checkpoint" in arguments
        counts["not possible" if dry_run.returncode else "to resume" if resumes else "to start"] += 1
    shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"sum: {len(runs)} runs: {shown}; {steps} optimiser steps", flush=True)
    return int(counts["not possible"] > 0)


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


def run(argv: list[str] | None) -> int:
    args, words = build_parser().parse_known_args(argv)
    first_flag = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    # a RUN after the first flag, as in --print S4, is not taken for one by argparse
    names, changes = [*args.runs, *words[:first_flag]], words[first_flag:]
    import_file, one = getattr(args, "import"), len(names) == 1 and not (args.seeds or args.grid or args.plan)
    asks = import_file or args.list
    flags.refuse(
        (asks and (names or changes or args.seeds or args.grid), "--list and --import take no run, seed or change"),
        (not asks and not names, "name a run, or ask for --list"),
        (args.same_data and names and not one, "--same_data goes with one run"),
        (len(dict(args.grid)) < len(args.grid), "a flag is in two --grid; name all its values in one"),
    )
    if import_file:
        new, known = records.import_records(import_file)
        print(f"imported {new} records into {records.IMPORTED}, {known} were there already")
        return 0
    if args.list:
        print_list()
        return 0
    if one:
        repeated = find_run(names[0])
        script = repeated["script"]
        changes = records.parser_of(script).expand([*(pins(repeated) if args.same_data else []), *changes])
        arguments = records.apply_changes(run_arguments(repeated), changes)
        print((records.command_line if args.print_only else records.shown_command)(script, arguments), flush=True)
        return 0 if args.print_only else execute(script, arguments)[0]
    runs = plan_runs(names, args.seeds, changes, dict(args.grid))
    if args.plan:
        return print_plan(runs)
    if not args.print_only:
        return run_campaign(" ".join([*names, *(f"{flag} {' '.join(values)}" for flag, values in args.grid)]), runs)
    for planned in runs:
        print(records.command_line(planned.script, planned.arguments))
    return 0


def main(argv: list[str] | None = None) -> int:
    return records.exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
