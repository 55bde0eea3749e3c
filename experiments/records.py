"""The runs: published ones and records of your own, found by name and brought to one shape."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from pathlib import Path
from typing import Any

from commands import flag_groups

from llm_alignment.evaluation import METRICS, Metric
from llm_alignment.files import InputError, SkippedRows, read_objects
from llm_alignment.model_files import read_json

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


def record_files() -> list[Path]:
    """The record files that the scripts write by default."""
    return sorted(path for path in HERE.glob("*.jsonl") if path.name != LOGGED_RUNS.name)


def load_records(path: Path) -> list[dict]:
    """The runs of a record file, each with its `place` ("sft_experiments.jsonl:3") added. Lines that a crash cut off
    and lines that are not records are skipped with a warning."""
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
        if path := next((path for path in (Path(file), HERE / file) if path.is_file()), None):
            record = next((record for record in load_records(path) if record["place"].endswith(f":{line}")), None)
            if record is None:
                raise InputError(f"{name}: no record on line {line}; `rerun.py --list` shows the lines that hold one")
            return record
        if file.endswith(".jsonl"):  # else a tag may have a colon
            raise InputError(f"{name}: there is no file {file}; give the path of a record file and a line number")
    for run in load_records(LOGGED_RUNS):
        if name in {run["id"], *run.get("aliases", [])}:
            return run
    records = [record for path in (record_files() if files is None else files) for record in load_records(path)]
    found = [record for record in records if record.get("tag") == name]
    if not found and (Path(name) / "run.json").is_file():
        return run_of_folder(Path(name))
    folder = Path(name).resolve()
    found = found or [record for record in records if Path(record["output_dir"]).resolve() == folder]
    found = found or [record for record in records if record_name(record) == name]
    if not found:
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
        if not self.measured:
            return f"{self.name} (not measured)"
        return f"{self.name} (demo)" if self.model == DEMO else self.name

    @property
    def delta(self) -> dict[str, dict]:
        """Differences by the record's keys, without those of a version that did not count what changed."""

        def counts(delta: dict) -> bool:
            return all(part.keys() >= DELTA_KEYS for part in (delta, *delta.get("by_type", {}).values()))

        return {key: delta for key, delta in self.source.get("delta", {}).items() if counts(delta)}


def from_logged(entry: dict) -> Run:
    """A line of logged_runs.jsonl. Parameters are the flags that its command gives, in the command's own words."""
    figures = dict(entry["figures"] or {})
    if entry["script"] == "dpo_train_mt.py" and "instruct_success" in figures:
        figures["finance_success"] = figures.pop("instruct_success")  # its instructions are Finance-Instruct's
    origin = "logged" if entry["measured"] else "logged, not measured" if figures else "logged, no figures"

    def taken(names: dict[str, str]) -> dict[str, Any]:
        return {metric: figures.pop(key) for key, metric in names.items() if key in figures}

    pairs, finals, changes = map(taken, (LOGGED_PAIRS, LOGGED_FINALS, LOGGED_CHANGES))
    before = {metric: pair[0] for metric, pair in pairs.items()}
    after = {metric: pair[1] for metric, pair in pairs.items()}
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
    before, after = map(published_figures, sides)
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


def published_figures(measured: dict) -> dict[str, float]:
    """A record's `baseline` or `final` as {column of the published tables: figure}."""
    figures = {name: value for name, metric in PUBLISHED.items() if (value := metric.read(measured)) is not None}
    return figures | ({"ppl": math.exp(min(figures["val_loss"], 700))} if "val_loss" in figures else {})


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
