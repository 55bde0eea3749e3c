"""Write what the experiments showed: tables, logs and plots from the published runs and from your own records.

    poetry run python experiments/report.py
    poetry run python experiments/report.py --compare RUN_A RUN_B
    poetry run python experiments/report.py --power RUN

The first writes RESULTS.md, the four Markdown logs and plots/*.png from logged_runs.jsonl and from every record file of
this folder (and `--exp_log FILE ...`). The second compares two runs on the questions that both answered, prints the
table and writes one HTML page with both answers side by side. The third says how small a difference N questions can
detect. A run is named by its tag, by FILE:LINE of a record file, or by its output folder.

The same records and output folders give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rerun import HERE, LOGGED_RUNS, command_line, find_run, flatten, load_records, record_files, run_arguments

from llm_alignment import tatqa
from llm_alignment.evaluation import print_table
from llm_alignment.files import InputError, SkippedRows, read_records, read_results, write_atomic
from mtbench_eval import compare_rows, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--exp_log", nargs="+", type=Path, default=[], metavar="FILE", help="more record files")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where the files go (default: experiments)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs: tags, FILE:LINE or output folders")
    task.add_argument(
        "--power",
        nargs="+",
        metavar="RUN",
        help="what N questions can detect, by the spread of one run or between two",
    )
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Runs: the published ones and records, brought to one shape
# ---------------------------------------------------------------------------------------------------------------------

# metric -> (its title, where a record's `baseline` and `final` hold it on the published scale)
METRICS = {
    "val_loss": ("Val loss", ("val_loss",)),
    "ppl": ("PPL", ("ppl",)),
    "mtbench": ("MT-Bench avg", ("mtbench", "avg_logged")),
    "tatqa": ("TAT-QA, %", ("tatqa", "em_like")),
    "instruct": ("Instruction avg", ("instruct", "avg_logged")),
    "instruct_success": ("Instruction success, %", ("instruct", "success_rate")),
    "finance_instruct": ("Finance-Instruct avg", ("finance_instruct", "avg_logged")),
    "reddit": ("Reddit avg", ("reddit", "avg_logged")),
}
PAIR_SOURCES = ("tatqa_pairs", "reddit", "finance", "general")  # where a record's `data` counts pairs
SCORED = ("mtbench", "instruct", "finance_instruct", "reddit")  # by the reward model, so on two scales

# where a published run's figures hold a metric: as [before, after], or as the difference alone
LOGGED_PAIRS = {"mtbench_avg": "mtbench", "instruct_avg": "instruct"} | {key: key for key in METRICS}
LOGGED_CHANGES = {"tatqa_delta_pp": "tatqa", "mtbench_delta": "mtbench", "instruct_delta": "instruct"}
DEMO = "demo miniature"


@dataclasses.dataclass
class Run:
    """A published run or a record. Figures are on the published scale; `delta` has the 1-10 scale and intervals."""

    name: str
    origin: str  # "logged", "logged, no figures", "logged, not measured", "new", "new, failed", ...
    script: str
    model: str
    params: dict
    before: dict[str, float]
    after: dict[str, float]
    changes: dict[str, float]  # metric -> after - before, also where only the difference was logged
    types: dict[str, tuple[float, float]]  # TAT-QA answer type -> (before, after), per cent
    facts: dict[str, object]  # what else was logged
    source: dict  # the published run or the record itself

    @property
    def is_new(self) -> bool:
        return self.origin.startswith("new")

    @property
    def measured(self) -> bool:
        return self.origin != "logged, not measured"

    @property
    def label(self) -> str:
        """Its name on a plot, with what must not be overlooked."""
        if not self.measured:
            return f"{self.name} (not measured)"
        return f"{self.name} (demo)" if self.model == DEMO else self.name


def from_logged(entry: dict) -> Run:
    """A line of logged_runs.jsonl. Parameters are the flags that its command gives, in the command's own words."""
    figures = entry["figures"] or {}
    pairs = {LOGGED_PAIRS[key]: value for key, value in figures.items() if key in LOGGED_PAIRS}
    changes = {metric: after - before for metric, (before, after) in pairs.items()}
    changes |= {LOGGED_CHANGES[key]: value for key, value in figures.items() if key in LOGGED_CHANGES}
    if entry["measured"]:
        origin = "logged"
    else:
        origin = "logged, not measured" if figures else "logged, no figures"
    return Run(
        name=entry["id"],
        origin=origin,
        script=entry["script"],
        model=entry["model"],
        params=flatten(entry.get("params", {})) | (command_params(run_arguments(entry)) if entry["command"] else {}),
        before={metric: before for metric, (before, _) in pairs.items()},
        after={metric: after for metric, (_, after) in pairs.items()},
        changes=changes,
        types={kind: tuple(pair) for kind, pair in figures.get("tatqa_by_type", {}).items()},
        facts={key: value for key, value in figures.items() if key not in LOGGED_PAIRS | LOGGED_CHANGES},
        source=entry,
    )


def command_params(arguments: list[str]) -> dict[str, str]:
    """{"kl_coef": "0.02", "use_hybrid": "on"} of ["--kl_coef", "0.02", "--use_hybrid"]."""
    params = {}
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if word.startswith("--"):
            params[word[2:]] = "on" if following.startswith("--") else following
    return params


def from_record(record: dict) -> Run:
    """A run record. A run that stopped early keeps what it had measured by then."""
    args = record["args"]
    before = published_figures(record["baseline"])
    after = published_figures(record["final"])
    by_type = [measured.get("tatqa", {}).get("by_type", {}) for measured in (record["baseline"], record["final"])]
    facts = {"kept_step": record["kept_step"]} if record["kept_step"] is not None else {}
    if "total" in record["runtime_s"]:
        facts["runtime_s"] = record["runtime_s"]["total"]
    return Run(
        name=record["tag"] or record["place"],
        origin="new" if record["status"] == "completed" else f"new, {record['status']}",
        script=record["script"],
        model=DEMO if args["demo"] else args["model"],
        params=args,
        before=before,
        after=after,
        changes={metric: after[metric] - before[metric] for metric in METRICS if metric in before and metric in after},
        types={
            kind: (by_type[0][kind]["em_like"], by_type[1][kind]["em_like"])
            for kind in by_type[0]
            if kind in by_type[1]
        },
        facts=facts,
        source=record,
    )


def published_figures(measured: dict) -> dict[str, float]:
    """A record's `baseline` or `final` as {metric: figure on the published scale}."""
    figures = {metric: dig(measured, keys) for metric, (_, keys) in METRICS.items() if keys[0] in measured}
    if "finance_instruct" in measured:  # the multi-task runs' instructions are those of Finance-Instruct
        figures["instruct_success"] = measured["finance_instruct"]["success_rate"]
    return figures


def dig(values: dict, keys: tuple[str, ...]) -> float:
    for key in keys:
        values = values[key]
    return values


def load_runs(files: list[Path]) -> list[Run]:
    """The published runs, then the records of `files`; a name that is taken gets the record's place added."""
    runs = [from_logged(entry) for entry in load_records(LOGGED_RUNS)]
    for path in files:
        for record in load_records(path):
            run = from_record(record)
            if any(run.name == other.name for other in runs):
                run.name = f"{run.name} ({record['place']})"
            runs.append(run)
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def number(value: object) -> str:
    """Up to four decimals, as the published logs have them; texts as they are; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if 0 < abs(value) < 0.001:
        return f"{value:.3g}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def signed(value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{number(abs(value))}"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else number(p)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])


def before_after(run: Run, metric: str) -> str:
    """ "1.4698 -> 1.2672", or the difference where that is all that was logged."""
    if metric in run.after:
        text = f"{number(run.before.get(metric))} -> {number(run.after[metric])}"
    elif metric in run.before:
        text = f"{number(run.before[metric])} -> -"
    elif metric in run.changes:
        text = f"{signed(run.changes[metric])} (only the difference)"
    else:
        return "-"
    return text if run.measured else f"{text} (not measured)"


def param(run: Run, key: str) -> str:
    return number(run.params.get(key))


def runtime(run: Run) -> str:
    """In the unit that was logged; a new run's in minutes."""
    if run.is_new:
        return f"{run.facts['runtime_s'] / 60:.1f} min" if "runtime_s" in run.facts else "-"
    units = {
        "runtime_min": "min",
        "runtime_h": "h",
        "runtime_s": "s",
        "train_runtime_s": "s (training)",
    }
    return next((f"{number(run.facts[key])} {unit}" for key, unit in units.items() if key in run.facts), "-")


def questions(run: Run) -> str:
    """How many MT-Bench questions the average is over."""
    if run.is_new:
        return number(run.source["baseline"].get("mtbench", {}).get("n"))
    before, after = run.facts.get("mtbench_questions", (None, None))
    text = number(before) if before == after else f"{before} -> {after}"
    if "mtbench_full80_final" in run.facts:
        text += f" (final on all 80: {number(run.facts['mtbench_full80_final'])})"
    return text


def mix(run: Run) -> str:
    """Where the pairs of a multi-task run come from."""
    if run.params.get("use_3way_hybrid"):
        return "Reddit + Finance-Instruct + general"
    if run.params.get("use_hybrid"):
        return "Reddit + Finance-Instruct"
    return "stages" if run.script == "dpo_train_mt_v2.py" else "Reddit"


def pairs(run: Run) -> str:
    """How many pairs a DPO run was trained on, by source where there are several."""
    if run.is_new:
        rows = (run.source["data"] or {}).get("rows", {})
        counts = {key.removesuffix("_pairs"): number(rows[key]) for key in PAIR_SOURCES if key in rows}
        texts = [f"{name} {n}" for name, n in counts.items()] if len(counts) > 1 else [*counts.values()]
        return " + ".join(texts) or "-"
    if "stage1.pairs" in run.params:
        return " + ".join(number(value) for key, value in run.params.items() if key.endswith(".pairs"))
    return number(run.facts.get("pairs"))


# a table: its columns as (title, cell of a run)
Columns = list[tuple[str, Callable[[Run], str]]]


def metric_columns(*metrics: str) -> Columns:
    return [(METRICS[metric][0], lambda run, metric=metric: before_after(run, metric)) for metric in metrics]


def param_columns(**titles: str) -> Columns:
    return [(title, lambda run, key=key: param(run, key)) for key, title in titles.items()]


RUN_COLUMNS: Columns = [("Run", lambda run: run.name), ("Origin", lambda run: run.origin)]
LORA_COLUMN = ("LoRA r / alpha", lambda run: f"{param(run, 'lora_r')} / {param(run, 'lora_alpha')}")
SFT_COLUMNS: Columns = [
    *RUN_COLUMNS,
    *param_columns(
        subset="Subset",
        sample_ratio="Sample",
        kl_coef="KL coef",
        kl_start_step="KL start",
        kl_warmup_steps="KL warmup",
        kl_limit_seq="KL tail",
    ),
    *metric_columns("val_loss", "ppl", "mtbench"),
    ("Questions", questions),
    ("Runtime", runtime),
]
DPO_COLUMNS: Columns = [
    *RUN_COLUMNS,
    *param_columns(beta="Beta", learning_rate="LR", epochs="Epochs"),
    LORA_COLUMN,
    *metric_columns("tatqa", "mtbench", "instruct", "instruct_success"),
    ("Pairs", pairs),
    ("Runtime", runtime),
]
MT_COLUMNS: Columns = [
    *RUN_COLUMNS,
    ("Pairs from", mix),
    *param_columns(beta="Beta", learning_rate="LR"),
    ("Pairs", pairs),
    *metric_columns("tatqa", "mtbench", "finance_instruct", "instruct_success", "reddit"),
    ("Runtime", runtime),
]

EVALUATION_COLUMNS: Columns = [
    *RUN_COLUMNS,
    *param_columns(adapter="Adapter", questions="Questions from"),
    ("Questions", lambda run: number(run.source["final"].get("mtbench", {}).get("n"))),
    ("Score, 1-10", lambda run: number(run.source["final"].get("mtbench", {}).get("avg"))),
    ("Published scale", lambda run: number(run.after.get("mtbench"))),
]


def runs_tables(runs: list[Run], columns: Columns) -> str:
    """A table for each base model."""
    parts = []
    for model in dict.fromkeys(run.model for run in runs):
        rows = [[cell(run) for _, cell in columns] for run in runs if run.model == model]
        parts += [f"### {model}", markdown_table([title for title, _ in columns], rows)]
    return "\n\n".join(parts)


def types_table(runs: list[Run]) -> str:
    """TAT-QA by answer type; for one published run only the differences were logged."""
    kinds = ["arithmetic", "count", "multi-span", "span"]
    rows = []
    for run in runs:
        logged_changes = run.facts.get("tatqa_by_type_delta_pp", {})
        if run.types:
            cells = ["{} -> {}".format(*map(number, run.types[kind])) if kind in run.types else "-" for kind in kinds]
        elif logged_changes:
            cells = [f"{signed(logged_changes[kind])} (only the difference)" for kind in kinds]
        else:
            continue
        rows.append([run.name, run.origin, *cells])
    return markdown_table(["Run", "Origin", *kinds], rows) if rows else ""


# key in a record's `delta` -> (title, where `baseline` and `final` hold the figure)
DELTAS = {
    "val_loss": ("validation loss", ("val_loss",)),
    "ppl": ("perplexity", ("ppl",)),
    "tatqa": ("TAT-QA, as published, %", ("tatqa", "em_like")),
    "tatqa_em": ("TAT-QA, official EM, %", ("tatqa", "em")),
    "tatqa_f1": ("TAT-QA, official F1, %", ("tatqa", "f1")),
    "reward_accuracy": ("held-out pairs, reward accuracy, %", ("held_out", "accuracy")),
    "reward_margin": ("held-out pairs, reward margin", ("held_out", "margin")),
    "mtbench": ("MT-Bench, 1-10", ("mtbench", "avg")),
    "mtbench_raw": ("MT-Bench, raw reward", ("mtbench", "raw_mean")),
    "instruct": ("instruction following, 1-10", ("instruct", "avg")),
    "instruct_raw": ("instruction following, raw reward", ("instruct", "raw_mean")),
    "finance_instruct": ("Finance-Instruct, 1-10", ("finance_instruct", "avg")),
    "finance_instruct_raw": ("Finance-Instruct, raw reward", ("finance_instruct", "raw_mean")),
    "reddit": ("Reddit, 1-10", ("reddit", "avg")),
    "reddit_raw": ("Reddit, raw reward", ("reddit", "raw_mean")),
}


def delta_cells(delta: dict) -> list[str]:
    return [
        signed(delta["mean"]),
        "none" if delta["low"] is None else f"{signed(delta['low'])} to {signed(delta['high'])}",
        p_value(delta["p"]),
        number(delta["n"]),
        "changed" if delta["p"] <= 0.05 else "no detectable change",
    ]


def deltas_table(runs: list[Run]) -> str:
    """Every difference of the new runs with its interval and p."""
    rows = []
    for run in runs:
        for key, delta in run.source["delta"].items():
            title, keys = DELTAS[key]
            before, after = (dig(run.source[phase], keys[:1]) for phase in ("baseline", "final"))
            parts = [(title, before, after, delta)]
            for kind, of_kind in delta.get("by_type", {}).items():
                parts.append((f"{title}: {kind}", before["by_type"][kind], after["by_type"][kind], of_kind))
            for name, old, new, change in parts:
                if change["n"]:
                    figures = [number(dig(measured, keys[1:])) for measured in (old, new)]
                    rows.append([run.name, name, " -> ".join(figures), *delta_cells(change)])
    header = ["Run", "Metric", "Before -> after", "Difference", "95 % interval", "p", "n", "Reading"]
    return markdown_table(header, rows) if rows else ""


GENERATED = "<!-- Generated by experiments/report.py from the JSONL files: change those, never this file. -->"

HOW_TO_READ = """\
Every cell with an arrow is *before -> after*. **Origin** tells the published runs (*logged*) from runs recorded by these
scripts (*new*). MT-Bench, instruction, Finance-Instruct and Reddit averages in these tables are on the scale of the
published runs (`avg_logged` of a new record), so that old and new stand side by side; that scale is not monotone in the
reward, and reward model, questions and token limits may differ, so compare differences rather than levels. The
headline of a new run is its 1-10 score, listed with 95 % intervals and p under *Differences*. The published runs logged
no per-question answers: their differences have no interval.

*logged, no figures*: planned, never reported. ***logged, not measured*: not a result.** The published progressive script
returned eight constants instead of evaluating; they are kept here so that nobody takes them for one."""


def is_sft(run: Run) -> bool:
    return run.script == "sft_train.py"


def is_dpo(run: Run) -> bool:
    return run.script == "dpo_train.py"


def is_mt(run: Run) -> bool:
    return run.script in ("dpo_train_mt.py", "dpo_train_mt_v2.py")


def is_evaluation(run: Run) -> bool:
    return run.script == "mtbench_eval.py"


def results(runs: list[Run], plots: dict[str, str]) -> str:
    """RESULTS.md. `plots`: {file name below this folder: caption}."""
    parts = ["# Results", GENERATED, HOW_TO_READ]
    parts += ["## SFT on T-Wix", runs_tables([run for run in runs if is_sft(run)], SFT_COLUMNS)]
    parts += ["## DPO on TAT-QA", runs_tables([run for run in runs if is_dpo(run)], DPO_COLUMNS)]
    parts += ["## Multi-task and progressive DPO", runs_tables([run for run in runs if is_mt(run)], MT_COLUMNS)]
    parts += ["## TAT-QA by answer type, %", types_table(runs)]
    evaluations = [run for run in runs if is_evaluation(run)]
    if evaluations:
        parts += ["## MT-Bench of a model alone", runs_tables(evaluations, EVALUATION_COLUMNS)]
    new = [run for run in runs if run.is_new]
    if new:
        parts += ["## Differences of the new runs", deltas_table(new)]
    notes = [f"- **{run.label}**: {run.source['note']}." for run in runs if run.source.get("note")]
    notes += [f"- **{run.name}** ({run.origin}): {run.source['reason']}" for run in new if "reason" in run.source]
    parts += ["## Notes", "\n".join(notes), "## Plots"]
    parts += [f"{caption}\n\n![{caption}]({name})" for name, caption in plots.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


LOGS: dict[str, tuple[str, Callable[[Run], bool], Columns]] = {
    "sft_experiments_qwen3_1_7b.md": (
        "SFT experiments, Qwen3-1.7B",
        lambda run: is_sft(run) and "Qwen3-1.7B" in run.model,
        SFT_COLUMNS,
    ),
    "sft_experiments_qwen3_8b.md": (
        "SFT experiments, Qwen3-8B",
        lambda run: is_sft(run) and "Qwen3-8B" in run.model,
        SFT_COLUMNS,
    ),
    "dpo_experiments.md": ("DPO experiments on TAT-QA", is_dpo, DPO_COLUMNS),
    "dpo_experiments_mt.md": ("Multi-task and progressive DPO experiments", is_mt, MT_COLUMNS),
}


def experiment_log(title: str, runs: list[Run], columns: Columns) -> str:
    """One Markdown log: the table, then each run with its command and everything that was logged of it."""
    parts = [f"# {title}", GENERATED, HOW_TO_READ, runs_tables(runs, columns)]
    for run in runs:
        parts += log_section(run)
    return "\n\n".join(part for part in parts if part) + "\n"


def log_section(run: Run) -> list[str]:
    source = run.source
    title = run.name if run.is_new else f"{run.name}: {source['title']}"
    parts = [
        f"## {title}",
        f"Origin: {run.origin}; {source['place' if run.is_new else 'source']}. Model: {run.model}.",
    ]
    if not run.measured:
        parts.append("**Not measured: these figures are not a result.**")
    if run.is_new:
        parts.append(f"```text\n{command_line(run.script, source['argv'])}\n```")
    else:
        parts.append(f"```text\n{source['command']}\n```" if source["command"] else "The command was not logged.")
        if "command_is" in source:
            parts.append(f"The command is {source['command_is']}.")
        if "params" in source:
            known = [[key, number(value)] for key, value in flatten(source["params"]).items()]
            parts.append(markdown_table(["Known parameter", "Value"], known))
    rows = [[METRICS[metric][0], before_after(run, metric)] for metric in METRICS]
    rows = [row for row in rows if row[1] != "-"]
    rows += [[f"TAT-QA {kind}, %", "{} -> {}".format(*map(number, pair))] for kind, pair in run.types.items()]
    rows += [[key, fact(value)] for key, value in flatten(run.facts).items()]
    if rows:
        parts.append(markdown_table(["Figure", "Value"], rows))
    if run.is_new:
        parts.append(deltas_table([run]))
        device = source["device"]["name"] if source["device"] else "not reached"
        parts.append(f"{source['ts']}; commit {source['git']}; device {device}; seed {source['args']['seed']}.")
    note = source.get("note") or source.get("reason")
    return [*parts, f"Note: {note}."] if note else parts


def fact(value: object) -> str:
    return " -> ".join(map(number, value)) if isinstance(value, list) else number(value)


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------

COLOURS = {"logged": "#4477aa", "new": "#cc6633", "not measured": "#999999"}


def colour(run: Run) -> str:
    return COLOURS["new" if run.is_new else "logged" if run.measured else "not measured"]


def new_figure(width: float, height: float, columns: int, *, sharey: bool = False) -> tuple[Figure, list]:
    """A figure of `width` x `height` inches in letters that read at that size, and its axes, side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=sharey)
    figure.get_layout_engine().set(wspace=0.04)
    return figure, list(axes.flat)


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG, without the date or version that would make the same figure another file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, image.getvalue())


def draw_pairs(axis, runs: list[Run], pairs: list[tuple[float, float] | None]) -> None:
    """One line a run: a ring before, a dot after, both with their values."""
    for row, (run, pair) in enumerate(zip(runs, pairs, strict=True)):
        if pair is None:
            continue
        before, after = pair
        axis.plot([before, after], [row, row], color=colour(run), linewidth=2.5, zorder=1)
        axis.scatter([before], [row], s=70, facecolor="white", edgecolor=colour(run), linewidth=2, zorder=2)
        axis.scatter([after], [row], s=70, color=colour(run), zorder=3)
        left, right = sorted([(before, "before"), (after, "after")])
        for (value, _), align, offset in ((left, "right", -8), (right, "left", 8)):
            axis.annotate(
                number(round(value, 2)), (value, row), (offset, 0), textcoords="offset points", ha=align, va="center"
            )
    axis.margins(x=0.22)
    name_rows(axis, runs)


def draw_changes(axis, runs: list[Run], changes: list[tuple[float, float, float] | None]) -> None:
    """One line a run: the difference and, where low and high differ from it, the 95 % interval."""
    axis.axvline(0, color="#444444", linewidth=1)
    for row, (run, change) in enumerate(zip(runs, changes, strict=True)):
        if change is None:
            continue
        mean, low, high = change
        axis.plot([low, high], [row, row], color=colour(run), linewidth=3, solid_capstyle="butt")
        axis.scatter([mean], [row], s=60, color=colour(run), zorder=2)
        axis.annotate(signed(round(mean, 2)), (mean, row), (0, 8), textcoords="offset points", ha="center")
    axis.margins(x=0.15)
    name_rows(axis, runs)


def name_rows(axis, runs: list[Run]) -> None:
    axis.set_yticks(range(len(runs)), [run.label for run in runs])
    axis.set_ylim(len(runs) - 0.4, -0.7)
    axis.grid(axis="x", color="#dddddd")
    axis.set_axisbelow(True)


def colour_key(figure: Figure, runs: list[Run]) -> None:
    """Says what the ring, the dot and the colours in use stand for."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D(
            [], [], marker="o", markersize=8, linestyle="", markerfacecolor="white", color="#444444", label="before"
        ),
        Line2D([], [], marker="o", markersize=8, linestyle="", color="#444444", label="after / difference"),
    ]
    used = {colour(run) for run in runs}
    marks += [Line2D([], [], color=c, linewidth=5, label=name) for name, c in COLOURS.items() if c in used]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)


def plot_metric(title: str, metric: str, runs: list[Run]) -> Figure | None:
    """Before and after by run, the difference beside it, and the 1-10 score's difference of the new runs."""
    runs = [run for run in runs if metric in run.changes]
    if not runs:
        return None
    intervals = [run.source["delta"].get(metric) if run.is_new else None for run in runs]
    changes: list[tuple[float, float, float] | None] = [(run.changes[metric],) * 3 for run in runs]
    panels = 2
    if metric in SCORED:
        panels += any(intervals)
    else:
        changes = [interval_of(delta) or change for delta, change in zip(intervals, changes, strict=True)]
    figure, axes = new_figure(4.2 + 3.4 * panels, 1.8 + 0.55 * len(runs), panels, sharey=True)
    draw_pairs(
        axes[0], runs, [(run.before[metric], run.after[metric]) if metric in run.after else None for run in runs]
    )
    draw_changes(axes[1], runs, changes)
    on_scale = ",\npublished scale" if metric in SCORED else ""
    axes[0].set_title(f"{METRICS[metric][0]}{on_scale}")
    axes[1].set_title(f"Difference{on_scale}" + (", 95 % interval" if metric not in SCORED and any(intervals) else ""))
    if panels == 3:
        draw_changes(axes[2], runs, [interval_of(delta) for delta in intervals])
        axes[2].set_title("Difference, 1-10 scale,\n95 % interval (new runs)")
    figure.suptitle(title, fontsize=15)
    colour_key(figure, runs)
    return figure


def interval_of(delta: dict | None) -> tuple[float, float, float] | None:
    return (delta["mean"], delta["low"], delta["high"]) if delta else None


def plot_types(runs: list[Run]) -> Figure | None:
    """TAT-QA before and after by answer type, one panel a type."""
    runs = [run for run in runs if run.types]
    if not runs:
        return None
    kinds = ["arithmetic", "count", "multi-span", "span"]
    figure, axes = new_figure(16, 1.8 + 0.6 * len(runs), len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        draw_pairs(axis, runs, [run.types.get(kind) for run in runs])
        axis.set_title(f"{kind}, %")
    figure.suptitle("TAT-QA by answer type", fontsize=15)
    colour_key(figure, runs)
    return figure


def plot_trade_off(runs: list[Run]) -> Figure | None:
    """What SFT gained (validation loss) against what it did to MT-Bench; the new runs also on the 1-10 scale."""
    runs = [run for run in runs if "val_loss" in run.changes and "mtbench" in run.changes]
    if not runs:
        return None
    scored = [run for run in runs if run.is_new and "mtbench" in run.source["delta"]]
    figure, axes = new_figure(16 if scored else 11, 7.5, 2 if scored else 1)
    # the demo's miniature changes by whole points of loss: beside it the real models would be one spot
    points = [(run, run.changes["mtbench"], None) for run in runs if run.model != DEMO]
    draw_trade_off(axes[0], points, "MT-Bench difference, published scale")
    if scored:
        points = [(run, (d := run.source["delta"]["mtbench"])["mean"], (d["low"], d["high"])) for run in scored]
        draw_trade_off(axes[1], points, "MT-Bench difference, 1-10 scale, 95 % interval (new runs)")
    figure.suptitle("SFT: what the new data gained against what MT-Bench lost", fontsize=15)
    return figure


def draw_trade_off(axis, points: list[tuple[Run, float, tuple[float, float] | None]], label: str) -> None:
    axis.axhline(0, color="#444444", linewidth=1)
    labels: dict[tuple[float, float], list[str]] = {}  # a run and its exact repetition are one point
    for run, change, interval in points:
        gain = run.changes["val_loss"]
        if interval:
            axis.plot([gain, gain], interval, color=colour(run), linewidth=2)
        axis.scatter([gain], [change], s=80, color=colour(run), zorder=2)
        labels.setdefault((gain, change), []).append(run.label)
    axis.margins(x=0.2, y=0.12)
    axis.autoscale_view()
    taken: list[tuple[float, float]] = []
    for place, names in sorted(labels.items(), key=lambda item: item[0][1]):
        x, y = axis.transData.transform(place)
        rise = 6
        while any(abs(x - other_x) < 110 and abs(y + rise - other_y) < 18 for other_x, other_y in taken):
            rise += 6
        taken.append((x, y + rise))
        axis.annotate(", ".join(names), place, (9, rise), textcoords="offset pixels")
    axis.set_xlabel("validation loss difference (further left is better)")
    axis.set_ylabel(label)
    axis.grid(color="#dddddd")
    axis.set_axisbelow(True)


def plot_categories(run: Run) -> Figure | None:
    """MT-Bench by category before and after, as a radar and as bars, on the 1-10 scale."""
    before, after = (run.source[phase].get("mtbench", {}).get("by_category") for phase in ("baseline", "final"))
    if not (before and after and before.keys() == after.keys()):
        return None
    names = list(after)
    figure, (left, bars) = new_figure(15, 6.5, 2)
    left.remove()
    radar = figure.add_subplot(1, 2, 1, polar=True)
    angles = [2 * math.pi * place / len(names) for place in range(len(names))]
    for shift, label, scores, shade in ((-0.2, "before", before, "#bbbbbb"), (0.2, "after", after, COLOURS["new"])):
        values = [scores[name] for name in names]
        radar.plot([*angles, angles[0]], [*values, values[0]], color=shade, linewidth=2.5, label=label)
        drawn = bars.bar([place + shift for place in range(len(names))], values, 0.4, color=shade, label=label)
        bars.bar_label(drawn, fmt="%.1f", fontsize=10)
    radar.set_xticks(angles, names)
    radar.set_ylim(1, 10)
    radar.tick_params(axis="x", pad=14)
    bars.set_xticks(range(len(names)), names, rotation=30, ha="right")
    bars.set_ylim(1, 10)
    bars.set_ylabel("score, 1-10")
    figure.suptitle(f"MT-Bench by category: {run.label}", fontsize=15)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


CURVES = {"loss": "loss", "nll": "NLL", "kl": "KL to the base", "rewards/margins": "reward margin"}


def plot_curves(title: str, runs: list[Run]) -> Figure | None:
    """Training curves from the train_log.jsonl of the runs' output folders, as far as they still hold those runs."""
    logs = {}
    for run in runs:
        log_file, run_file = (Path(run.source["output_dir"]) / name for name in ("train_log.jsonl", "run.json"))
        if log_file.is_file() and json.loads(run_file.read_text("utf-8"))["ts"] == run.source["ts"]:
            logs[run.label] = read_records(log_file)
    keys = [key for key in CURVES if any(key in line for lines in logs.values() for line in lines)]
    if not keys:
        return None
    figure, axes = new_figure(max(9, 6.5 * len(keys)), 6, len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for label, lines in logs.items():
            points = [line for line in lines if key in line]
            steps, values = [line["step"] for line in points], [line[key] for line in points]
            axis.plot(steps, values, marker="o", markersize=4, label=label)
        axis.set_title(CURVES[key])
        axis.set_xlabel("optimiser step")
        axis.grid(color="#dddddd")
    figure.suptitle(title, fontsize=15)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Comparing two runs
# ---------------------------------------------------------------------------------------------------------------------

EVALUATIONS = {
    "mtbench": "MT-Bench",
    "tatqa": "TAT-QA",
    "instruct": "Instruction following",
    "finance_instruct": "Finance-Instruct",
    "reddit": "Reddit",
}


def answer_files(name: str, files: list[Path]) -> dict[str, Path]:
    """{evaluation: its per-question file} of a run given by tag, FILE:LINE, output folder or one such file."""
    path = Path(name)
    if path.is_file():
        keys = [key for key in EVALUATIONS if f"{path.stem}_".startswith(f"{key}_")]
        if not keys:
            raise InputError(
                f"{path}: not a file of answers; those are called mtbench_final.jsonl, tatqa_final.jsonl, ..."
            )
        return {keys[0]: path}
    if not path.is_dir():
        run = find_run(name, files)
        if "output_dir" not in run:
            raise InputError(
                f"{name}: a published run; its answers were not kept, so it cannot be compared by question"
            )
        path = Path(run["output_dir"])
    found = {}
    for key in EVALUATIONS:
        for file in (path / f"{key}_final.jsonl", path / f"{key}.jsonl"):  # a training run's, mtbench_eval.py's
            if file.is_file():
                found[key] = file
    if not found:
        raise InputError(f"{path}: no *_final.jsonl with answers here; name the output folder of a finished run")
    return found


def load_answers(path: Path) -> tuple[dict, dict[str, dict]]:
    """The fingerprint of a per-question file, and its rows by question id."""
    skipped = SkippedRows()
    fingerprint, rows = read_results(path, skipped)
    skipped.report(f"damaged lines of {path}")
    return flatten(fingerprint), {str(row["question_id"]): row for row in rows}


def compare(a: str, b: str, files: list[Path], output_dir: Path) -> Path:
    """Prints the differences of B against A over the questions both answered, and writes the page; its path."""
    of_a, of_b = answer_files(a, files), answer_files(b, files)
    shared = [key for key in of_a if key in of_b]
    if not shared:
        raise InputError(f"{a} has {', '.join(of_a)}, {b} has {', '.join(of_b)}: no evaluation in common to compare")
    sections = []
    for key in shared:
        (settings_a, rows_a), (settings_b, rows_b) = load_answers(of_a[key]), load_answers(of_b[key])
        ids = [question for question in rows_a if question in rows_b]
        if not ids:
            raise InputError(
                f"{of_a[key]} and {of_b[key]} have no question in common; compare runs on the same questions"
            )
        unlike = [
            f"{name}: {settings_a.get(name)} / {settings_b.get(name)}"
            for name in sorted(settings_a.keys() | settings_b.keys())
            if name not in ("model", "weights", "adapter", "questions")
            and settings_a.get(name) != settings_b.get(name)
        ]
        if unlike:
            print(
                f"warning: {EVALUATIONS[key]} was measured under other settings: {'; '.join(unlike)}", file=sys.stderr
            )
        pairs = [(rows_a[question], rows_b[question]) for question in ids]
        table = comparison_table(key, pairs)
        print_table(f"{EVALUATIONS[key]}: {a} (baseline) against {b} (final), {len(ids)} shared questions", table)
        sections.append(html_section(key, pairs, table, unlike))
    page = PAGE.format(
        title=html.escape(f"{a} against {b}"), a=html.escape(a), b=html.escape(b), body="".join(sections)
    )
    path = output_dir / f"compare_{slug(a)}_{slug(b)}.html"
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page)
    return path


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[-60:]


def comparison_table(key: str, pairs: list[tuple[dict, dict]]) -> list[tuple[str, float, float, dict]]:
    """Rows for `print_table`: (metric, mean of A, mean of B, difference with interval and p)."""
    rows_a, rows_b = [a for a, _ in pairs], [b for _, b in pairs]
    if key == "tatqa":
        summaries = [tatqa.summarise_tatqa(rows) for rows in (rows_a, rows_b)]
        deltas = tatqa.compare_tatqa(rows_a, rows_b)
        lines = (
            ("as published, %", "em_like", "tatqa"),
            ("official EM, %", "em", "tatqa_em"),
            ("official F1, %", "f1", "tatqa_f1"),
        )
    else:
        summaries = [summarise(rows) for rows in (rows_a, rows_b)]
        deltas = compare_rows(rows_a, rows_b)
        lines = (("score, 1-10", "avg", "score"), ("raw reward", "raw_mean", "raw"))
    return [(title, *(summary[field] for summary in summaries), deltas[delta]) for title, field, delta in lines]


def question_score(key: str, row: dict) -> float:
    """1-10, the mean over the turns; for TAT-QA 100 or 0, so that means are per cent."""
    return 100.0 * row["em_like"] if key == "tatqa" else statistics.fmean(row["scores"])


def html_section(key: str, pairs: list[tuple[dict, dict]], table: list[tuple], unlike: list[str]) -> str:
    """One evaluation of the page: its table, then every question, the ones that changed most first and open."""
    lines = []
    for metric, a_mean, b_mean, delta in table:
        cells = [number(a_mean), number(b_mean), *delta_cells(delta)]
        lines.append(f"<tr><th>{metric}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    warning = f"<p class=warning>Measured under other settings: {html.escape('; '.join(unlike))}</p>" if unlike else ""
    shown = [(html_question(key, a), html_question(key, b)) for a, b in pairs]
    shown.sort(key=lambda pair: -abs(pair[1].score - pair[0].score))
    changed = sum(a.score != b.score for a, b in shown)
    articles = "".join(
        question_html(a, b, is_open=place < 10 and a.score != b.score) for place, (a, b) in enumerate(shown)
    )
    return (
        f"<h2>{html.escape(EVALUATIONS[key])}</h2>{warning}<div class=scroll><table><tr><th></th><th>A</th><th>B</th>"
        f"<th>Difference</th><th>95 % interval</th><th>p</th><th>n</th><th></th></tr>{''.join(lines)}</table></div>"
        f"<p>{changed} of {len(shown)} questions changed their score; the largest changes come first.</p>{articles}"
    )


@dataclasses.dataclass
class Shown:
    """One question as the page shows it."""

    title: str
    turns: list[str]
    answers: list[str]
    marks: list[str]  # what each answer got, in words
    score: float


def html_question(key: str, row: dict) -> Shown:
    if key == "tatqa":
        verdict = f"{'right' if row['em_like'] else 'wrong'}, EM {number(row['em'])}, F1 {number(row['f1'])}"
        gold = "; ".join(row["gold"]) if isinstance(row["gold"], list) else row["gold"]
        title = f"{row['answer_type']}, gold answer {gold} {row['scale']}"
        return Shown(title, [row["question"]], [row["answer"]], [verdict], question_score(key, row))
    marks = [
        f"{number(round(score, 2))} (raw {number(round(raw, 2))})"
        for score, raw in zip(row["scores"], row["rewards"], strict=True)
    ]
    return Shown(
        f"{row['question_id']}: {row['category']}", row["turns"], row["answers"], marks, question_score(key, row)
    )


def question_html(a: Shown, b: Shown, *, is_open: bool) -> str:
    turns = "".join(
        f"<p class=question>{html.escape(turn)}</p><div class=pair>"
        f"<section><h3>A: {html.escape(mark_a)}</h3><pre>{html.escape(answer_a)}</pre></section>"
        f"<section><h3>B: {html.escape(mark_b)}</h3><pre>{html.escape(answer_b)}</pre></section></div>"
        for turn, answer_a, mark_a, answer_b, mark_b in zip(
            a.turns, a.answers, a.marks, b.answers, b.marks, strict=True
        )
    )
    change = f"{number(round(a.score, 2))} -> {number(round(b.score, 2))} ({signed(round(b.score - a.score, 2))})"
    return (
        f"<details{' open' if is_open else ''}><summary><b>{html.escape(a.title)}</b> "
        f"<span>{html.escape(change)}</span></summary>{turns}</details>"
    )


# The policy forbids every request: the page is what this file holds. Braces are doubled for str.format.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 16px; color: #1a1a1a; background: #fff; }}
h1 {{ font-size: 24px; }}
h1, h2, p, summary {{ overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 4px 12px; border-bottom: 1px solid #ccc; text-align: left; white-space: nowrap; }}
details {{ border: 1px solid #ccc; border-radius: 6px; margin: 12px 0; padding: 8px 12px; }}
summary {{ cursor: pointer; }}
summary span {{ color: #555; }}
.question {{ white-space: pre-wrap; background: #f1f3f5; border-radius: 4px; padding: 8px; }}
.pair {{ display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px; }}
.pair section {{ border-left: 4px solid #4477aa; padding-left: 10px; }}
.pair section + section {{ border-color: #cc6633; }}
h3 {{ font-size: 14px; margin: 0; color: #555; }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 0; }}
.warning {{ background: #fff3cd; border-radius: 4px; padding: 8px; }}
@media (max-width: 700px) {{ .pair {{ grid-template-columns: minmax(0, 1fr); }} th, td {{ padding: 4px; font-size: 14px; white-space: normal; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>A is {a}; B is {b}. A difference is B minus A over the questions that both answered; the interval is a paired
bootstrap's. An interval that holds 0 is no detectable change.</p>
{body}
</body>
</html>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Power
# ---------------------------------------------------------------------------------------------------------------------


def detectable(spread: float, questions: int) -> float:
    """The smallest true difference that a two-sided 5 % test on `questions` pairs finds in 80 % of runs.

    `spread` is the standard deviation of the per-question differences; the normal approximation,
    (z(0.975) + z(0.80)) * spread / sqrt(questions).
    """
    normal = statistics.NormalDist()
    return (normal.inv_cdf(0.975) + normal.inv_cdf(0.80)) * spread / questions**0.5


def print_power(names: list[str], files: list[Path]) -> None:
    """For each evaluation of a run (its answers before and after), or of two runs: what N questions can detect."""
    finals = [answer_files(name, files) for name in names]
    for key, after_path in finals[-1].items():
        before_path = after_path.with_name(f"{key}_baseline.jsonl") if len(names) == 1 else finals[0].get(key)
        if before_path is None or not before_path.is_file():
            raise InputError(f"{names[-1]}: {EVALUATIONS[key]} has nothing to compare with; name a second run")
        before, after = load_answers(before_path)[1], load_answers(after_path)[1]
        shared = [(before[question], after[question]) for question in before if question in after]
        differences = [question_score(key, new) - question_score(key, old) for old, new in shared]
        if len(differences) < 2:
            raise InputError(
                f"{after_path}: {len(differences)} questions shared with {before_path}; two are the least"
            )
        spread = statistics.stdev(differences)
        if spread == 0:
            raise InputError(
                f"{after_path}: every question changed alike, which says nothing of others; name another run"
            )
        unit = "percentage points" if key == "tatqa" else "points on the 1-10 scale"
        print(
            f"{EVALUATIONS[key]}: {len(differences)} questions, mean difference {signed(statistics.fmean(differences))}, "
            f"standard deviation of the per-question difference {number(spread)}"
        )
        for n in sorted({16, 32, 50, 80, 160, 320, len(differences)}):
            print(f"  n = {n:>4}: detects a difference of {detectable(spread, n):.2f} {unit} in 8 of 10 runs")


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


def write_report(files: list[Path], output_dir: Path) -> list[Path]:
    """Writes RESULTS.md, the logs and the plots from the published runs and the records in `files`; their paths."""
    runs = load_runs(files)
    figures: dict[str, tuple[str, Figure | None]] = {}
    for name, title, group, metrics in (
        ("sft", "SFT on T-Wix", is_sft, ("val_loss", "mtbench")),
        ("dpo", "DPO on TAT-QA", is_dpo, ("tatqa", "mtbench", "instruct")),
        ("mt", "Multi-task and progressive DPO", is_mt, ("tatqa", "mtbench", "finance_instruct", "reddit")),
    ):
        members = [run for run in runs if group(run)]
        for metric in metrics:
            caption = f"{title}: {METRICS[metric][0].removesuffix(' avg').removesuffix(', %')} before and after"
            figures[f"{name}_{metric}.png"] = (caption, plot_metric(caption, metric, members))
        caption = f"{title}: training curves of the new runs"
        figures[f"{name}_curves.png"] = (caption, plot_curves(caption, [run for run in members if run.is_new]))
    figures["sft_trade_off.png"] = (
        "SFT: validation loss against MT-Bench",
        plot_trade_off([r for r in runs if is_sft(r)]),
    )
    figures["tatqa_types.png"] = ("TAT-QA by answer type", plot_types(runs))
    for run in (run for run in runs if run.is_new):
        figures[f"categories_{slug(run.name)}.png"] = (f"MT-Bench by category: {run.label}", plot_categories(run))
    written = []
    captions = {}
    for name, (caption, figure) in figures.items():
        if figure is not None:
            save_figure(figure, output_dir / "plots" / name)
            written.append(output_dir / "plots" / name)
            captions[f"plots/{name}"] = caption
    texts = {"RESULTS.md": results(runs, captions)}
    texts |= {
        name: experiment_log(title, [run for run in runs if belongs(run)], columns)
        for name, (title, belongs, columns) in LOGS.items()
    }
    for name, text in texts.items():
        write_atomic(output_dir / name, text)
        written.append(output_dir / name)
    return written


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    files = list(dict.fromkeys([*record_files(), *(path.resolve() for path in args.exp_log)]))
    try:
        if args.compare:
            print(f"wrote {compare(*args.compare, files, args.output_dir)}")
        elif args.power:
            print_power(args.power, files)
        else:
            for path in write_report(files, args.output_dir):
                print(f"wrote {path}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
