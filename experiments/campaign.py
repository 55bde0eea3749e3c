"""A campaign: several runs one after the other, over a grid and several seeds; started again, it continues."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from commands import apply_changes, flag_groups, join_empty, parse_strictly, same_command, shown_command
from records import HERE, REPORT, find_run, from_record, load_records, record_files, run_arguments
from seeds import merge_seeds
from tables import deltas_table, document, headline_table, markdown_table, terminal_table

from llm_alignment import flags
from llm_alignment.endings import signals_go_to
from llm_alignment.files import InputError, write_atomic
from llm_alignment.hub import commit_of
from llm_alignment.model_files import adapter_files_sha256, files_sha256
from llm_alignment.parser import Parser


@dataclasses.dataclass
class PlannedRun:
    """One run of a campaign: its script, the words after it, and where its files and its record go."""

    name: str
    script: str
    arguments: list[str]
    output_dir: Path
    exp_log: Path
    model: str = ""
    adapter: str = ""  # --load_adapter, or --adapter of mtbench_eval.py

    def stands_on(self, record: dict) -> bool:
        """Whether the record's run had the model and the adapter that are in these folders now."""
        base, adapter = record.get("base"), (record.get("data") or {}).get("adapter")
        model = Path(self.model)
        is_base = base is None or not model.is_dir() or base == (commit_of(model) or files_sha256(model))
        return is_base and (adapter is None or not self.adapter or adapter == adapter_files_sha256(self.adapter))

    def record(self) -> dict | None:
        """The newest record of this very command on this base; resuming and the order of flags do not matter."""
        files = dict.fromkeys([*record_files(), *([self.exp_log.resolve()] if self.exp_log.is_file() else [])])
        records = (record for path in files for record in load_records(path) if record["script"] == self.script)
        same = [record for record in records if same_command(record.get("argv", []), self.arguments)]
        found = [record for record in same if self.stands_on(record)]
        return max(reversed(found), key=lambda record: record["ts"], default=None)

    def completed(self) -> bool:
        return (self.record() or {}).get("status") == "completed"

    def resuming(self) -> list[str]:
        """The arguments, with --resume_from_checkpoint auto where an earlier start has left something."""
        if self.output_dir.exists() and self.script != "mtbench_eval.py":  # there the same command simply resumes
            return apply_changes(self.arguments, ["--resume_from_checkpoint", "auto"])
        return self.arguments


def plan_runs(names: list[str], seeds: list[int], changes: list[str], grid: dict[str, list[str]]) -> list[PlannedRun]:
    """The runs of `names` with `changes`, each in every cell of the grid at every seed (at its own without `seeds`).
    `grid`: {"kl_coef": ["0", "0.03"]}. A run with a grid or seeds goes to OUTPUT_DIR_kl_coef0.03_seed1 and is tagged
    TAG-kl_coef0.03-seed1. Raises InputError for a run that is not known, a value that is given twice, a flag that is
    given in two ways, and two runs with one output folder."""
    axes = grid | ({"seed": [str(seed) for seed in seeds]} if seeds else {})
    changed = {flag[2:] for flag in flag_groups(changes)} | (grid.keys() & {"seed"} if seeds else set())
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
        arguments = changed_arguments(run, changes)
        for cell in itertools.product(*axes.values()):
            new = plan_run(name, run["script"], arguments, dict(zip(axes, cell, strict=True)))
            other = planned.setdefault(new.output_dir.resolve(), new)
            if other is not new:
                both = f"{other.name} and {new.name} share the output folder {new.output_dir}"
                raise InputError(f"{both}; run them one by one, each with an --output_dir")
    return list(planned.values())


def changed_arguments(run: dict, changes: list[str]) -> list[str]:
    """What follows the script's name on the run's command line, with the changes; those of --config files win too."""
    return apply_changes(run_arguments(run), parser_of(run["script"]).expand(changes))


def parser_of(script: str) -> Parser:
    return importlib.import_module(Path(script).stem).build_parser()


def plan_run(name: str, script: str, arguments: list[str], cell: dict[str, str]) -> PlannedRun:
    """One run as it will be started, with the flags of `cell`. Raises InputError for a command that does not parse."""
    arguments = apply_changes(arguments, [word for flag, value in cell.items() for word in (f"--{flag}", value)])
    try:
        parser = parser_of(script)
        arguments = parser.expand(arguments)  # as the run's record has them
        args = parse_strictly(parser, arguments)
    except InputError as error:
        raise InputError(f"{name}: {script} refuses its command ({error}); change it or leave it out") from error
    folder = args.output_dir
    if args.demo and "--output_dir" not in flag_groups(arguments):
        folder = f"demo_{re.sub('^demo[-_]', '', in_file_name(name))}"
        arguments = apply_changes(arguments, ["--output_dir", folder])
    if cell:
        parts = [flag + in_file_name(value) for flag, value in cell.items()]
        folder, tag = (re.sub(r"[-_]seed\d+$", "", text) for text in (str(Path(folder)), args.exp_tag or name))
        folder, tag = "_".join([folder, *parts]), "-".join([tag, *parts])
        name = " ".join([name, *(f"{flag} {value}" for flag, value in cell.items())])
        arguments = apply_changes(arguments, ["--output_dir", folder, "--exp_tag", tag])
    if getattr(args, "use_3way_hybrid", False):  # dpo_train_mt.py adds these to the name
        folder = f"{Path(folder)}_3way_hybrid"
    elif getattr(args, "use_hybrid", False):
        folder = f"{Path(folder)}_hybrid"
    model = flags.DEMO["model"] if args.demo and "--model" not in flag_groups(arguments) else args.model
    adapter = getattr(args, "load_adapter", "") or getattr(args, "adapter", "")
    return PlannedRun(name, script, join_empty(arguments), Path(folder), Path(args.exp_log), model, adapter)


def in_file_name(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z._-]+", "_", text)


def execute(script: str, arguments: list[str]) -> tuple[int, int]:
    """Runs a script of the project with this Python; its exit code, or 128 + the signal that ended it. The second
    number is the signal that this program got meanwhile, 0 for none."""
    process = subprocess.Popen([sys.executable, str(HERE.parent / script), *arguments])
    received = 0

    def hand_on(signum: int, frame: object) -> None:
        nonlocal received
        received = signum
        if signum == signal.SIGTERM:  # others reach the script too, which saves a checkpoint and its record
            process.terminate()

    with signals_go_to(hand_on):
        code = process.wait()
    return (code if code >= 0 else 128 - code), received


def run_campaign(title: str, runs: list[PlannedRun]) -> int:
    """Runs what is not completed, continues after failures, prints the results and saves them under the title. The
    exit code is 0 when all are completed, 130 or 143 when it was stopped, else 1."""
    stopped = 0
    for place, run in enumerate(runs, 1):
        at, record = f"[{place}/{len(runs)}] {run.name}", run.record()
        if record and record["status"] == "completed":
            print(f"{at}: completed {record['ts']} ({record['place']})", flush=True)
            continue
        arguments = run.resuming()
        print(f"{at}: {shown_command(run.script, arguments)}", flush=True)
        code, received = execute(run.script, arguments)
        if received or code in {130, 143}:  # Windows has another exit code for Ctrl-C
            stopped = 128 + received if received else code
            print(f"stopped at {run.name}; the same command resumes there", flush=True)
            break
        if code:
            print(f"{run.name} ended with exit code {code}; continuing with the next run", flush=True)
    print_results(title, runs)
    if left := [run.name for run in runs if not run.completed()]:
        print(f"not completed: {', '.join(left)}; the same command tries them again", file=sys.stderr)
    return stopped or int(bool(left))


def print_results(title: str, runs: list[PlannedRun]) -> None:
    """The status of every run, then a row for each run or cell of the grid; several seeds of one are one row. Both are
    saved as Markdown too, with every difference."""
    found = [(run, run.record()) for run in runs]
    rows = [[run.name, record["status"] if record else "no record", str(run.output_dir)] for run, record in found]
    merged = merge_seeds([from_record(record) for _, record in found if record])
    tables = [(["Run", "Status", "Output folder"], rows), *filter(None, [headline_table(merged)])]
    for table in tables:
        print(f"\n{terminal_table(*table)}", flush=True)
    path = HERE / REPORT / f"campaign_{in_file_name(title)[:80]}.md"
    path.parent.mkdir(exist_ok=True)
    parts = [f"# {title}", *(markdown_table(*table) for table in tables), deltas_table(merged)]
    write_atomic(path, document(parts))
    print(f"wrote {path}", flush=True)


def print_plan(runs: list[PlannedRun]) -> int:
    """Prints the dry run of every run that is not completed, and the sum; 0, or 1 when a dry run failed."""
    counts, steps = dict.fromkeys(("completed", "to resume", "to start", "not possible"), 0), 0
    for run in runs:
        if run.completed():
            counts["completed"] += 1
            print(f"{run.name}: completed", flush=True)
            continue
        arguments = apply_changes(run.resuming(), ["--dry_run"])
        print(f"{run.name}: {shown_command(run.script, arguments)}", flush=True)
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
