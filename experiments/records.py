"""The runs: published ones and records of your own, found by name and brought to one shape; their commands.

Those of the original scripts have two forms, and are turned into records here: {ts, tag, model, params, eval, mtbench,
instruct, reddit?} with a baseline and a post side each, which may be null; and {timestamp, model, method, tag, stages,
config} of a run in stages, whose figures were never measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import re
import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_alignment.endings import console_and_log, disk_problem, interrupt, lasting_console, signals_go_to
from llm_alignment.evaluation import METRICS, Metric
from llm_alignment.files import InputError, SkippedRows, append_record, read_json, read_objects, read_rows
from llm_alignment.flags import Parser, refuse
from llm_alignment.runs import new_record as empty_record

HERE = Path(__file__).resolve().parent
REPORT = "report"  # folder below this one for what report.py and campaigns write; git ignores it
LOGGED_RUNS = HERE / "logged_runs.jsonl"
RECORDED_RUNS = HERE / "recorded_runs.jsonl"  # of this project, published with it
SCRIPTS = {"sft_train.py", "dpo_train.py", "dpo_train_mt.py", "dpo_train_mt_v2.py", "mtbench_eval.py"}
LOGGED_KEYS = {"id", "script", "model", "command", "title", "source", "figures", "measured"}
REPORTED: set[tuple[Path, int]] = set()  # the files whose damaged lines were named, and how many these were
# what is read of a record without asking whether it is there
KINDS: dict[str, Any] = dict.fromkeys(("ts", "script", "status", "output_dir"), str) | {"argv": list}
KINDS |= dict.fromkeys(("args", "baseline", "final", "delta", "runtime_s"), dict) | {"tag": str | None}
KINDS |= dict.fromkeys(("data", "device", "commits"), dict | None)
DELTA_KEYS = {"mean", "low", "high", "p", "n", "changed", "clusters", "changed_clusters"}
SUCCESS, SUCCESS_LOGGED = METRICS["finance_instruct_success"].keys, ("finance_instruct", "success_logged")
# The columns of the published tables, by where a record's `baseline` and `final` hold them. All are measured as the
# published runs did; the last ones only new runs have. PPL is the exponential of the val loss.
PUBLISHED = {
    "val_loss": Metric("Val loss", METRICS["val_loss_row_mean"].keys),
    "ppl": Metric("PPL"),
    "mtbench": Metric("MT-Bench avg", METRICS["mtbench_published"].keys),
    "tatqa": Metric("TAT-QA, %", METRICS["tatqa"].keys),
    "instruct": Metric("Instruction avg (rules, published runs only)", ("instruct", "keyword_avg")),
    "instruct_success": Metric("Instruction success, % (rules, published runs only)", ("instruct", "keyword_success")),
    "finance_instruct": Metric("Finance-Instruct avg", METRICS["finance_instruct_published"].keys),
    "finance_success": Metric("Finance-Instruct success, % (published runs only)", SUCCESS_LOGGED),
    "reddit": Metric("Reddit avg", METRICS["reddit_published"].keys),
    "checks": Metric("Instruction checks passed, % (new runs only)", METRICS["instruct_checks"].keys),
    "success": Metric("Finance-Instruct 7 or more on 1-10, % (new runs only)", SUCCESS),
    "drift": Metric("Drift (KL from the base)", METRICS["drift"].keys),
}
SCORED = ("mtbench", "finance_instruct", "reddit")  # by the reward model: two scales

# where a published run's figures hold a metric: as [before, after], as the final alone, or as the difference alone
LOGGED_PAIRS = {"mtbench_avg": "mtbench", "instruct_avg": "instruct"} | {key: key for key in PUBLISHED}
LOGGED_FINALS = {"val_loss_final": "val_loss", "ppl_final": "ppl", "mtbench_avg_final": "mtbench"}
LOGGED_CHANGES = {"tatqa_delta_pp": "tatqa", "mtbench_delta": "mtbench", "instruct_delta": "instruct"}
DEMO = "demo miniature"

IMPORTED = "imported_runs.jsonl"
OLD_KEYS = {"ts", "timestamp", "tag", "model", "params", "eval", "mtbench", "instruct", "reddit", "stages", "config"}
RENAMED = {"lora.targets": "target_modules"}
# section and key of an old record -> evaluation and key of a record here, on the scales of the published runs
FIGURES = {
    ("eval", "acc"): ("tatqa", "em_like"), ("mtbench", "avg_score"): ("mtbench", "avg_logged"),
    ("instruct", "avg_score"): ("instruct", "keyword_avg"), ("reddit", "avg_score"): ("reddit", "avg_logged"),
    ("instruct", "success_rate"): ("instruct", "keyword_success"),
}  # fmt: skip
MT_FIGURES = FIGURES | {  # the multi-task script's instructions are those of Finance-Instruct
    ("instruct", "avg_score"): ("finance_instruct", "avg_logged"),
    ("instruct", "success_rate"): ("finance_instruct", "success_logged"),
}
RANGES = {"acc": (0, 1), "avg_score": (1, 10), "success_rate": (0, 100)}
# flags that change where a run goes and how fast it is, not what it learns or how it is measured
NO_SETTINGS = {
    "seed", "output_dir", "exp_tag", "exp_log", "resume_from_checkpoint", "report_to", "num_proc", "no_baseline_cache",
    "eval_batch_size", "eval_save_json", "save_steps", "table", "time",
}  # fmt: skip


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
    """`arguments` in which every flag of `changes` replaces the same flag, or is added at the end; as `join_empty`."""
    groups = flag_groups(arguments) | flag_groups(changes)
    return join_empty([word for group in groups.values() for word in group])


def same_command(arguments: list[str], others: list[str]) -> bool:
    """Whether two command lines ask for the same run: the order of flags and resuming do not matter."""
    both = (flag_groups([*words, "--resume_from_checkpoint"]) for words in (arguments, others))
    first, second = ({flag: group[0].split("=", 1) + group[1:] for flag, group in groups.items()} for groups in both)
    return first == second


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
        joined.append(word if word or not joined else f"{joined.pop()}=")
    return joined


def exit_code(run: Callable[[], int | None], *, logs: bool = False) -> int:
    """What `run()` gives; after one line 2 for bad input, 1 for what the disk refuses, 128 + the signal that stops it.
    A reader that has seen enough, as `head -1`, does not end it. `logs`: as the scripts, in a program with models."""
    run = console_and_log()(run) if logs else run
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
            if not (reason := disk_problem(error) or (str(error) if isinstance(error, OSError) else "")):
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
    parser.error = lambda message: refuse((True, message))  # type: ignore[method-assign, assignment, return-value]
    if {"--help", "--help_all", "--version"} & {*arguments}:
        raise InputError("--help is not part of a run's command")
    return parser.parse_args(arguments)


def parser_of(script: str) -> Parser:
    return importlib.import_module(Path(script).stem).build_parser()


def record_files() -> list[Path]:
    """The record files that the scripts write by default."""
    return sorted(path for path in HERE.glob("*.jsonl") if path.name != LOGGED_RUNS.name)


def load_records(path: Path) -> list[dict]:
    """The runs of a record file, each with its `place` ("x.jsonl:3"); skips lines that are none with a warning."""
    skipped, records = SkippedRows(), []
    for place, row in read_objects(path, skipped):
        published = row.keys() >= LOGGED_KEYS and path.resolve() == LOGGED_RUNS
        if problem := None if published else record_problem(row):
            skipped.add(place, problem)
        else:
            records.append({**row, "place": place})
    if (path, skipped.count) not in REPORTED:  # a campaign reads its records again after every run
        REPORTED.add((path, skipped.count))
        skipped.report(f"lines of {path}")
    return records


def record_problem(row: dict) -> str | None:
    """Why an object is not a record that can be shown, such as one that somebody edited, or None."""
    if wrong := next((key for key, kind in KINDS.items() if not isinstance(row.get(key), kind)), None):
        return f"not a run record: its {wrong} is missing or of another kind"
    if row["script"] not in SCRIPTS or not all(isinstance(word, str) for word in row["argv"]):
        return "not a command of this project"
    try:
        deltas = [part for delta in row["delta"].values() for part in (delta, *delta.get("by_type", {}).values())]
        figures = [metric.read(row[side]) for metric in METRICS.values() for side in ("baseline", "final")]
        figures += [delta[key] for delta in deltas for key in DELTA_KEYS & delta.keys()]
        from_record(row)
        finite = all(math.isfinite(value or 0) for value in [*figures, *row["runtime_s"].values()])
    except (AttributeError, KeyError, TypeError) as error:
        return f"its figures cannot be read ({type(error).__name__}: {error})"
    return None if finite else "a figure is not finite"


def record_name(record: dict) -> str:
    """What a record is called: its tag, or the name of its output folder."""
    return record.get("tag") or re.split(r"[\\/]", record["output_dir"].rstrip("\\/"))[-1]


def find_run(name: str, files: list[Path] | None = None) -> dict:
    """The published run, or the newest record (of `files`, by default `record_files()`), that `name` stands for.
    `name` is FILE:LINE, a published id or one of its aliases, a tag, or an output folder, whose run.json will do
    wherever it was started. Raises InputError when there is no such run."""
    if not name:
        raise InputError("the name of a run is empty; `rerun.py --list` shows ids and tags")
    file, _, line = name.rpartition(":")
    if file and line.isdigit():
        for path in (path for path in (Path(file), HERE / file) if path.is_file()):
            if found := [record for record in load_records(path) if record["place"].endswith(f":{line}")]:
                return found[0]
            raise InputError(f"{name}: no record on line {line}; `rerun.py --list` shows the lines that hold one")
        if file.endswith(".jsonl"):  # else a tag may have a colon
            raise InputError(f"{name}: there is no file {file}; give the path of a record file and a line number")
    if published := [run for run in load_records(LOGGED_RUNS) if name in {run["id"], *run.get("aliases", [])}]:
        return published[0]
    records = [record for path in (record_files() if files is None else files) for record in load_records(path)]
    found, folder = [record for record in records if record.get("tag") == name], Path(name)
    if not found and (folder / "run.json").is_file():
        return run_of_folder(folder)
    found = found or [record for record in records if Path(record["output_dir"]).resolve() == folder.resolve()]
    if not (found := found or [record for record in records if record_name(record) == name]):
        how = "FILE:LINE names any record, and a change is written --flag value after the runs"
        raise InputError(f"no run is called {name!r}; `rerun.py --list` shows ids and tags, {how}")
    return max(reversed(found), key=lambda record: record["ts"])


def run_of_folder(folder: Path) -> dict:
    """What run.json in an output folder says: a record without figures. Raises InputError when it is damaged."""
    run = read_json(folder / "run.json", f"run {folder}")
    if run.get("script") not in SCRIPTS or not isinstance(run.get("argv"), list) or "args" not in run:
        raise InputError(f"{folder}: its run.json names no command; name the run by its tag or by FILE:LINE")
    return {**run, "output_dir": str(folder)}


def run_arguments(run: dict) -> list[str]:
    """What follows the script's name on the run's command line; InputError when its command was not logged."""
    if "argv" in run:
        return run["argv"]
    if run["command"] is None:
        known = ", ".join(f"{key} {value}" for key, value in flatten(run["params"]).items())
        note = f"; {run['note']}" if "note" in run else ""
        raise InputError(f"{run['id']}: its command was not logged; known of it: model {run['model']}, {known}{note}")
    words = shlex.split(run["command"])
    return words[words.index(run["script"]) + 1 :]


def flatten(values: dict, prefix: str = "") -> dict:
    """{"stage1": {"beta": 0.01}} as {"stage1.beta": 0.01}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@dataclasses.dataclass
class Run:
    """A published run or a record. Figures are on the published scale; `delta` has the 1-10 scale and intervals."""

    name: str
    origin: str  # "logged", "logged, no figures", "logged, not measured", "new", "new, failed", "imported", ...
    script: str
    model: str
    params: dict
    before: dict[str, float]
    after: dict[str, float]
    changes: dict[str, float]  # metric -> after - before, also where only the difference was logged
    types: dict[str, tuple[float, float]]  # TAT-QA answer type -> (before, after), per cent
    facts: dict[str, Any]  # what else was logged
    source: dict  # the published run or the record itself
    members: list[Run] = dataclasses.field(default_factory=list)  # of a row that stands for several seeds
    in_noise: set[str] = dataclasses.field(default_factory=set)  # metrics whose change is within twice the noise

    @property
    def is_logged(self) -> bool:
        return self.origin.startswith("logged")

    @property
    def measured(self) -> bool:
        return not self.origin.endswith("not measured")

    @property
    def label(self) -> str:
        """Its name on a plot, with what must not be overlooked."""
        return self.name + (" (demo)" * (self.model == DEMO) if self.measured else " (not measured)")

    @property
    def delta(self) -> dict[str, dict]:
        """Differences by the record's keys, without those of a version that did not count what changed."""
        deltas = self.source.get("delta", {})
        parts = {key: (delta, *delta.get("by_type", {}).values()) for key, delta in deltas.items()}
        return {key: deltas[key] for key in deltas if all(part.keys() >= DELTA_KEYS for part in parts[key])}


def from_logged(entry: dict) -> Run:
    """A line of logged_runs.jsonl. Parameters are the flags that its command gives, in the command's own words."""
    figures = dict(entry["figures"] or {})
    if entry["script"] == "dpo_train_mt.py" and "instruct_success" in figures:
        figures["finance_success"] = figures.pop("instruct_success")  # its instructions are Finance-Instruct's
    origin = "logged" if entry["measured"] else "logged, not measured" if figures else "logged, no figures"
    pairs, finals, changes = (
        {metric: figures.pop(key) for key, metric in names.items() if key in figures}
        for names in (LOGGED_PAIRS, LOGGED_FINALS, LOGGED_CHANGES)
    )
    before, after = ({metric: pair[side] for metric, pair in pairs.items()} for side in (0, 1))
    changes = {metric: after[metric] - before[metric] for metric in pairs} | changes
    groups = flag_groups(run_arguments(entry) if entry["command"] else [])
    given = {flag[2:]: " ".join(words[1:]) or "on" for flag, words in groups.items()}
    params = flatten(entry.get("params", {})) | given
    types = {kind: tuple(pair) for kind, pair in figures.get("tatqa_by_type", {}).items()}
    name, script, model = entry["id"], entry["script"], entry["model"]
    return Run(name, origin, script, model, params, before, after | finals, changes, types, figures, entry)


def from_record(record: dict) -> Run:
    """A run record. A run that stopped early keeps what it had measured by then."""
    args, sides = record["args"], (record["baseline"], record["final"])
    before, after = (
        {name: value for name, metric in PUBLISHED.items() if (value := metric.read(side)) is not None}
        for side in sides
    )
    for figures in (before, after):
        figures |= {"ppl": math.exp(min(figures["val_loss"], 700))} if "val_loss" in figures else {}
    changes = {metric: after[metric] - before[metric] for metric in PUBLISHED if metric in before.keys() & after}
    old, new = ((side.get("tatqa") or {}).get("by_type") or {} for side in sides)
    known = [kind for kind in old if "em_like" in old[kind].keys() & new.get(kind, {}).keys()]
    types = {kind: (old[kind]["em_like"], new[kind]["em_like"]) for kind in known}
    facts = {"kept_step": record.get("kept_step"), "runtime_s": record["runtime_s"].get("total")}
    facts = {name: fact for name, fact in facts.items() if fact is not None}
    origin = "imported" if "imported" in record else "new"
    if record.get("measured") is False:
        origin += ", not measured"
    elif record["status"] != "completed":
        origin += f", {record['status']}"
    name, model = record_name(record), DEMO if args.get("demo") else args["model"]
    return Run(name, origin, record["script"], model, args, before, after, changes, types, facts, record)


def singles(runs: list[Run]) -> list[Run]:
    """`runs` with each seed's run in place of the one that stands for several seeds."""
    return [single for run in runs for single in run.members or [run]]


def load_runs(files: list[Path], *, mine: bool = False) -> list[Run]:
    """The published runs, then the records of `files`; a name that is taken gets the record's place added. With `mine`
    without the published runs and the records that are published with the project."""
    runs = [] if mine else [from_logged(entry) for entry in load_records(LOGGED_RUNS)]
    left_out = {LOGGED_RUNS, RECORDED_RUNS} if mine else {LOGGED_RUNS}
    for record in (record for path in files if path.resolve() not in left_out for record in load_records(path)):
        run = from_record(record)
        if any(run.name == other.name for other in runs):
            run.name = f"{run.name} ({record['place']})"
        runs.append(run)
    return runs


def merge_seeds(runs: list[Run]) -> list[Run]:
    """`runs`, in which completed records that differ in the seed alone are one, the newest of each seed `members`."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = f"alone {len(groups)}"
        if run.origin == "new" and isinstance(run.params.get("seed"), int):
            settings = {name: value for name, value in run.params.items() if name not in NO_SETTINGS}
            stood_on = run.source.get("base"), (run.source.get("data") or {}).get("adapter")  # not its name alone
            key = json.dumps([run.script, settings, stood_on], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    merged = []
    for members in groups.values():
        newest = {run.params.get("seed"): run for run in sorted(members, key=lambda run: run.source.get("ts", ""))}
        merged += [merge(list(newest.values()))] if len(newest) > 1 else members
    return merged


def merge(members: list[Run]) -> Run:
    """One run that stands for completed runs of several seeds; its record holds means and combined differences. It is
    called "S4, 2 seeds" of "S4-seed1" and others."""
    members = sorted(members, key=lambda run: run.params["seed"])
    records = [run.source for run in members]
    keys = [key for key in members[0].delta if all(key in member.delta for member in members)]
    means = {key: average([record[key] for record in records]) for key in ("baseline", "final", "runtime_s")}
    delta = {key: combine([member.delta[key] for member in members]) for key in keys}
    run = from_record(records[0] | means | {"delta": delta, "kept_step": None})
    name = re.sub(r"[-_ ]seed[-_ ]?\d+| \(.*:\d+\)$", "", members[0].name)  # nor the place, of a name that is taken
    run.name, run.origin, run.members = f"{name}, {len(members)} seeds", f"new, {len(members)} seeds", members
    return run


def average(values: list[Any]) -> Any:
    """Numbers averaged, key by key of those that all have; what is not a number in all of them is the first one's."""
    first = values[0]
    if all(isinstance(value, dict) for value in values):
        return {key: average([value[key] for value in values]) for key in first if all(key in v for v in values)}
    if all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [average(list(of_place)) for of_place in zip(*values, strict=True)]
    differ = any(value != first for value in values) and all(type(value) in {int, float} for value in values)
    return statistics.fmean(values) if differ else first


def combine(deltas: list[dict]) -> dict:
    """The differences of K seeds over the same n questions as one. Their mean has two sources of error: other seeds,
    with variance var / K, and other questions, with the mean variance that the single intervals say, (width / 2 /
    1.96) squared; more seeds do not lower that, since all ask the same questions. The interval is mean +/- t * sqrt
    (sum of both); t has the degrees of freedom of Welch and Satterthwaite, from K - 1 and n - 1 (n clusters where
    questions share a context). What a question does at one seed alone is counted twice, so the interval is rather too
    wide than too narrow; None where one of them has none."""
    from scipy import stats

    first, means = deltas[0], [delta["mean"] for delta in deltas]
    combined: dict = {"n": first["n"], "seeds": len(deltas), **dict.fromkeys(("mean", "sd", "low", "high", "p"))}
    combined |= {"changed": max(delta["changed"] for delta in deltas), "clusters": first["clusters"]}
    combined["changed_clusters"] = max(delta["changed_clusters"] or 0 for delta in deltas)
    if None in means:
        return combined
    mean, sd = statistics.fmean(means), statistics.stdev(means)
    combined |= {"mean": mean, "sd": sd}
    first_kinds, *others = kinds = [delta.get("by_type", {}) for delta in deltas]
    if shared := [kind for kind in first_kinds if all(kind in of_seed for of_seed in others)]:
        combined["by_type"] = {kind: combine([of_seed[kind] for of_seed in kinds]) for kind in shared}
    if any(delta["low"] is None for delta in deltas):
        return combined
    of_seeds = sd**2 / len(means)
    of_questions = statistics.fmean(((delta["high"] - delta["low"]) / 2 / 1.96) ** 2 for delta in deltas)
    variance = of_seeds + of_questions
    if variance == 0:
        return combined | {"low": mean, "high": mean, "p": 1.0 if mean == 0 else 0.0}
    questions = max(1, (first["clusters"] or first["n"]) - 1)
    freedom = variance**2 / (of_seeds**2 / (len(means) - 1) + of_questions**2 / questions)
    half = float(stats.t.ppf(0.975, freedom)) * variance**0.5
    p = 2 * float(stats.t.sf(abs(mean) / variance**0.5, freedom))
    return combined | {"low": mean - half, "high": mean + half, "p": p}


def import_records(path: Path) -> tuple[int, int]:
    """Appends the records of `path` to imported_runs.jsonl; how many, and how many were there. InputError for none."""
    if not path.is_file():
        raise InputError(f"--import {path}: no such file; name a JSONL file of the original scripts")
    skipped, found = SkippedRows(), []
    for place, old in read_rows(path, skipped):
        try:
            record = convert(old, place)
            if problem := record_problem(record):
                raise InputError(problem)
            found.append(record)
        except InputError as error:
            skipped.add(place, str(error))
    if not found:
        none = f"--import {path}: no record of the original scripts ({'; '.join(skipped.places) or 'it is empty'})"
        raise InputError(f"{none}; those have the keys ts, params and eval, or timestamp, stages and config")
    skipped.report(f"lines of {path}")
    target, new = HERE / IMPORTED, 0
    known = [(record["ts"], record["argv"]) for record in (load_records(target) if target.is_file() else [])]
    for record in found:
        if (key := (record["ts"], record["argv"])) not in known:
            append_record(target, record)
            known.append(key)
            new += 1
    return new, len(found) - new


def convert(old: dict, place: str) -> dict:
    """A record here, from one of either form. Raises InputError when it is neither, or when its flags do not parse."""
    try:
        if old.keys() >= {"stages", "config"}:  # its figures were constants
            unmeasured = {"measured": False, "stages": old["stages"]}
            return new_record(old, place, "dpo_train_mt_v2.py", old["config"]) | unmeasured
        if "params" not in old or not old.keys() & {"eval", "mtbench", "instruct", "reddit"}:
            raise InputError("not a record of the original scripts")
        is_mt = "reddit" in old or old["params"].get("reddit") is not None
        values = {RENAMED.get(key, key): value for key, value in flatten(old["params"]).items() if value is not None}
        if "use_4bit" in values:
            values["no_4bit"] = not values.pop("use_4bit")
        sides: dict[str, dict] = {"baseline": {}, "post": {}}
        for (section, key), (evaluation, name) in (MT_FIGURES if is_mt else FIGURES).items():
            for side, measured in sides.items():
                part = (old.get(section) or {}).get(side) or {}
                value, (low, high) = part.get(key), RANGES[key]
                if value is not None:
                    if not low <= value <= high:
                        raise InputError(f"{section} {side} {key} {value} is not within {low}..{high}")
                    value = 100 * value if key == "acc" else value
                    measured.setdefault(evaluation, {"n": part.get("n")})[name] = value
        record = new_record(old, place, "dpo_train_mt.py" if is_mt else "dpo_train.py", values)
        return record | {"baseline": sides["baseline"], "final": sides["post"]}
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(f"another form than that of the original scripts: {type(error).__name__} {error}") from error


def new_record(old: dict, place: str, script: str, values: dict[str, Any]) -> dict:
    """A record without figures. What its script has no flag for of `values` is kept as a note; a null is left out."""
    parser = parser_of(script)
    actions = {action.option_strings[0]: action for action in parser._actions if action.option_strings}
    argv, unknown = [], []
    values = {"model": old.get("model"), **values, "exp_tag": old.get("tag") or values.get("exp_tag")}
    for key, value in ((key, value) for key, value in values.items() if value is not None):
        names = (f"--{name}" for name in (key, key.replace(".", "_"), key.rpartition(".")[2]))
        flag = next((name for name in names if name in actions), None)
        if flag is None:
            unknown.append(f"{key} {value}")
        elif value is True:
            argv.append(flag)
        elif value is False:
            argv += [flag.replace("--", "--no-", 1)] * isinstance(actions[flag], argparse.BooleanOptionalAction)
        else:
            argv += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    unknown += [f"{key} {value}" for key, value in old.items() if key not in OLD_KEYS]
    record = empty_record(vars(parse_strictly(parser, argv)), argv, script)
    record |= {"ts": str(old.get("ts") or old["timestamp"]), "git": None, "versions": {}}
    record |= {"status": "completed", "imported": place}
    return record | ({"note": f"what {script} has no flag for: {', '.join(unknown)}"} if unknown else {})
