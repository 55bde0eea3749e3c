"""Tables of runs in Markdown: RESULTS.md and the four logs."""

from __future__ import annotations

import re
from collections.abc import Callable

from commands import shown_command
from noise import Spread
from records import PUBLISHED, Run, flatten, get_nested

from llm_alignment.evaluation import TableRow, table_rows, verdict
from llm_alignment.stats import holm


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


def p_value(p: float | None) -> str:
    return "< 0.0001" if p is not None and p < 0.0001 else number(p)


def inert(text: str) -> str:
    """A text on one line that Markdown shows as it is: no HTML, no link, no code."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split())))
    return re.sub(r"([\[`])", r"\\\1", text)


def code_block(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(inert(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])


def before_after(run: Run, metric: str) -> str:
    """ "1.4698 -> 1.2672", or the difference where that is all that was logged, and what must be known of it."""
    remarks = []
    if metric in run.after:
        text = f"{number(run.before.get(metric))} -> {number(run.after[metric])}"
    elif metric in run.before:
        text = f"{number(run.before[metric])} -> -"
    elif metric in run.changes:
        text = signed(run.changes[metric])
        remarks.append("only the difference")
    else:
        return "-"
    if metric in run.in_noise:
        remarks.append("within noise")
    if not run.measured:
        remarks.append("not measured")
    return f"{text} ({', '.join(remarks)})" if remarks else text


def param(run: Run, key: str) -> str:
    return number(run.params.get(key))


def runtime(run: Run) -> str:
    """In the unit that was logged; a record's in minutes."""
    if not run.is_logged:
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
    if not run.is_logged:
        before, after = (get_nested(run.source[phase], ("mtbench", "n")) for phase in ("baseline", "final"))
    else:
        before, after = run.facts.get("mtbench_questions", (None, None))
    text = number(after) if before in {None, after} else f"{number(before)} -> {number(after)}"
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


PAIR_SOURCES = ("tatqa_pairs", "reddit", "finance", "general")  # where a record's `data` counts pairs


def pairs(run: Run) -> str:
    """How many pairs a DPO run was trained on, by source where there are several."""
    if not run.is_logged:
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
    return [(PUBLISHED[metric][0], lambda run, metric=metric: before_after(run, metric)) for metric in metrics]


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
    *metric_columns("drift"),
    ("Runtime", runtime),
]
DPO_COLUMNS: Columns = [
    *RUN_COLUMNS,
    *param_columns(beta="Beta", learning_rate="LR", epochs="Epochs"),
    LORA_COLUMN,
    *metric_columns("tatqa", "mtbench", "instruct", "instruct_success", "checks", "drift"),
    ("Pairs", pairs),
    ("Runtime", runtime),
]
MT_COLUMNS: Columns = [
    *RUN_COLUMNS,
    ("Pairs from", mix),
    *param_columns(beta="Beta", learning_rate="LR"),
    ("Pairs", pairs),
    *metric_columns("tatqa", "mtbench", "finance_instruct", "finance_success", "success", "reddit", "drift"),
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
        parts += [f"### {inert(model)}", markdown_table([title for title, _ in columns], rows)]
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


def delta_rows(run: Run) -> list[TableRow]:
    """The lines of every difference of a record, TAT-QA's answer types among them."""
    rows, title = [], ""
    for row in table_rows(run.source["baseline"], run.source["final"], run.delta):
        is_part = row.title.startswith("  ")
        title = title if is_part else row.title
        if row.delta and row.delta["mean"] is not None:
            rows.append(row._replace(title=f"{title}: {row.title.strip()}") if is_part else row)
    return rows


def delta_cells(row: TableRow, *, stays: bool = False) -> list[str]:
    """Difference, interval, p (* where it stays below 0.05 after Holm's correction), items changed, reading."""
    delta = row.delta
    reading = verdict(delta, lower_is_better=row.lower_is_better) or ("-" if delta["p"] is None else "changed")
    return [
        signed(delta["mean"]),
        "none" if delta["low"] is None else f"{signed(delta['low'])} to {signed(delta['high'])}",
        p_value(delta["p"]) + "*" * stays,
        f"{number(delta['changed'])} of {number(delta['n'])}",
        reading,
    ]


def deltas_table(runs: list[Run]) -> str:
    """Every difference of the records with its interval and p; with several seeds, their standard deviation too."""
    lines = [(run, row) for run in runs for row in delta_rows(run)]
    if not lines:
        return ""
    tested = [row.delta["p"] for _, row in lines if row.delta["p"] is not None]
    corrected = iter(holm(tested))
    rows, marked = [], 0
    for run, row in lines:
        stays = row.delta["p"] is not None and next(corrected) < 0.05
        marked += stays
        difference, *others = delta_cells(row, stays=stays)
        figures = f"{number(row.before)} -> {number(row.after)}"
        rows.append([run.name, row.title, figures, difference, number(row.delta.get("sd")), *others])
    header = [
        "Run",
        "Metric",
        "Before -> after",
        "Difference",
        "SD over seeds",
        "95 % interval",
        "p",
        "Changed",
        "Reading",
    ]
    if not any(run.members for run in runs):
        header, *rows = [cells[:4] + cells[5:] for cells in (header, *rows)]
    count = f"{len(tested)} p values; {marked} (*) stay below 0.05 after Holm's correction."
    return f"{markdown_table(header, rows)}\n\n{count}"


GENERATED = "<!-- Generated by experiments/report.py from the JSONL files: change those, never this file. -->"

HOW_TO_READ = """\
Every cell with an arrow is *before -> after*. **Origin** tells the published runs (*logged*) from records of these
scripts (*new*) and from records of the original scripts (*imported*). How the published runs were measured is under
*Notes*.

What the columns hold, for published and new runs:

- **Val loss**, **PPL**: the mean of the rows' means and its exponential, as published. The loss per token of the new
  runs is under *Differences*.
- **MT-Bench avg**, **Finance-Instruct avg**, **Reddit avg**: reward-model scores on the published scale (`avg_logged`
  of a new record). That scale is not monotone in the reward. Prompts, sampling, reward model and token limits differ
  from those of the published runs, so compare differences, not levels.
- **TAT-QA, %**: the metric of the published runs (`em_like`). The official metric of the new runs is under
  *Differences*.
- **Instruction avg**, **Instruction success**: keyword rules over 25 tasks of the published runs. New runs do not have
  them. What a program can check in new runs is another measure on 25 other tasks: **Instruction checks passed**. Their
  reward-model score is under *Differences*.
- **Finance-Instruct success**: the share of answers that score 7 or more, on the published scale for published runs
  and on the 1-10 scale for new ones, so in two columns.
- **Drift**: KL(base || tuned) on held-out rows, after training. It is 0 before.

The headline of a new run is its 1-10 score, listed with 95 % intervals and p under *Differences*. The published runs
logged no answers by question: their differences have no interval. *(within noise)* marks a published change that lies
within twice the spread of two measurements of one base: see *Noise of the published baselines*.

*logged, no figures*: planned, never reported. ***logged, not measured*: not a result.** The published progressive
script returned eight constants instead of evaluating; they are kept here so that nobody takes them for one.

Runs that differ in the seed alone are one row: means over the seeds, their standard deviation, and an interval that
holds both other questions and other seeds."""


def is_sft(run: Run) -> bool:
    return run.script == "sft_train.py"


def is_dpo(run: Run) -> bool:
    return run.script == "dpo_train.py"


def is_mt(run: Run) -> bool:
    return run.script in ("dpo_train_mt.py", "dpo_train_mt_v2.py")


def is_evaluation(run: Run) -> bool:
    return run.script == "mtbench_eval.py"


def noise_table(spreads: list[Spread]) -> str:
    """The spread of each protocol's baselines, and the published changes it makes doubtful."""
    rows = []
    for spread in spreads:
        changed = [run for run in spread.runs if spread.metric in run.changes]
        doubtful = [run.name for run in changed if spread.metric in run.in_noise]
        rows.append([
            spread.title,
            ", ".join(map(number, spread.baselines)),
            f"{spread.of_baselines:.2f}",
            f"{spread.of_differences:.2f}",
            f"{len(doubtful)} of {len(changed)}" + (f": {', '.join(doubtful)}" if doubtful else ""),
        ])
    return markdown_table(
        ["Protocol", "Baselines of one base", "SD", "SD of a difference", "Changes within twice that"], rows
    )


def origins_table(runs: list[Run]) -> str:
    """Where and when every record was made: a miniature on a CPU must not be taken for the real model."""
    rows = []
    singles = [single for run in runs for single in run.members or [run]]
    for run in singles:
        device = run.source["device"] or {}
        shown = " ".join(str(device[key]) for key in ("name", "dtype") if key in device)
        seed = number(run.params.get("seed"))
        rows.append([
            run.name,
            run.model,
            shown or "-",
            seed,
            number(run.source["git"]),
            run.source["ts"],
            runtime(run),
        ])
    return markdown_table(["Run", "Model", "Device", "Seed", "Commit", "Time", "Runtime"], rows) if rows else ""


NOISE = """\
The same base was logged again and again under the same protocol. With s the standard deviation of its baselines, two
measurements differ by sqrt(2) * s (standard deviation) with nothing changed. A published change within twice that
cannot be distinguished from no change."""


def notes(runs: list[Run]) -> str:
    """How the published runs were measured, and what else was noted about a run."""
    settings: dict[str, list[str]] = {}
    for run in runs:
        if run.source.get("settings"):
            settings.setdefault(run.source["settings"], []).append(run.name)
    lines = [f"- How {', '.join(names)} were measured: {text}." for text, names in settings.items()]
    lines += [f"- **{run.label}**: {run.source['note']}." for run in runs if run.source.get("note")]
    lines += [f"- **{run.name}** ({run.origin}): {run.source['reason']}" for run in runs if run.source.get("reason")]
    return "\n".join(f"- {inert(line[2:])}" for line in lines)


def results(runs: list[Run], spreads: list[Spread], plots: dict[str, str]) -> str:
    """RESULTS.md. `plots`: {file name below this folder: caption}."""
    parts = ["# Results", GENERATED, HOW_TO_READ]
    for title, belongs, columns in (
        ("SFT on T-Wix", is_sft, SFT_COLUMNS),
        ("DPO on TAT-QA", is_dpo, DPO_COLUMNS),
        ("Multi-task and progressive DPO", is_mt, MT_COLUMNS),
    ):
        parts += [f"## {title}", runs_tables([run for run in runs if belongs(run)], columns)]
    parts += ["## TAT-QA by answer type, %", types_table(runs)]
    if spreads:
        parts += ["## Noise of the published baselines", NOISE, noise_table(spreads)]
    evaluations = [run for run in runs if is_evaluation(run)]
    if evaluations:
        parts += ["## MT-Bench of a model alone", runs_tables(evaluations, EVALUATION_COLUMNS)]
    new = [run for run in runs if not run.is_logged]
    if new:
        parts += ["## Differences of the new runs", deltas_table(new)]
        parts += ["## Where the new runs were made", origins_table(new)]
    parts += ["## Notes", notes(runs), "## Plots"]
    parts += [f"{inert(caption)}\n\n![{inert(caption)}]({name})" for name, caption in plots.items()]
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
        for single in run.members or [run]:
            parts += log_section(single)
    return "\n\n".join(part for part in parts if part) + "\n"


def log_section(run: Run) -> list[str]:
    """A run's heading, command, parameters, figures and notes."""
    source = run.source
    title = f"{run.name}: {source['title']}" if run.is_logged else run.name
    parts = [
        f"## {inert(title)}",
        inert(f"Origin: {run.origin}; {source['source' if run.is_logged else 'place']}. Model: {run.model}."),
    ]
    if not run.measured:
        parts.append("**Not measured: these figures are not a result.**")
    command = source["command"] if run.is_logged else shown_command(run.script, source["argv"])
    parts.append(code_block(command) if command else "The command was not logged.")
    if "command_is" in source:
        parts.append(f"The command is {source['command_is']}.")
    if source.get("aliases"):
        parts.append(f"Also called {', '.join(source['aliases'])}.")
    if source.get("settings"):
        parts.append(f"How it was measured: {source['settings']}.")
    if "params" in source:
        known = [[key, number(value)] for key, value in flatten(source["params"]).items()]
        parts.append(markdown_table(["Known parameter", "Value"], known))
    parts.append(figures_table(run))
    if not run.is_logged:
        parts.append(deltas_table([run]))
        device = (source["device"] or {}).get("name", "not known")
        seed = number(source["args"].get("seed"))
        parts.append(inert(f"{source['ts']}; commit {number(source['git'])}; device {device}; seed {seed}."))
    note = source.get("note") or source.get("reason")
    return [*parts, f"Note: {inert(note)}."] if note else parts


def figures_table(run: Run) -> str:
    rows = [[PUBLISHED[metric][0], before_after(run, metric)] for metric in PUBLISHED]
    rows = [row for row in rows if row[1] != "-"]
    rows += [[f"TAT-QA {kind}, %", "{} -> {}".format(*map(number, pair))] for kind, pair in run.types.items()]
    rows += [[key, fact(value)] for key, value in flatten(run.facts).items()]
    return markdown_table(["Figure", "Value"], rows) if rows else ""


def fact(value: object) -> str:
    return " -> ".join(map(number, value)) if isinstance(value, list) else number(value)
