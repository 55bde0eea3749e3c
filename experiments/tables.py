"""Tables of runs in Markdown: RESULTS.md and the four logs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

from commands import shown_command
from noise import REPEATED, Spread
from records import HERE, PUBLISHED, Run, flatten, get_nested

from llm_alignment.evaluation import METRICS, TableRow, number, table_rows, table_texts
from llm_alignment.model_files import read_json

GPU_CHECK = HERE / "benchmarks" / "gpu_check.json"  # of `pytest -m gpu`


def text(value: object) -> str:
    """A setting, or a published figure, as it was logged; "-" for None."""
    return "-" if value is None else str(value)


def figure(run: Run, value: object) -> str:
    """A published figure as it was logged, a measured one in four digits."""
    return text(value) if run.is_logged else number(value)


def arrow(run: Run, values: Iterable[object]) -> str:
    return " -> ".join(figure(run, value) for value in values)


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
        cell = arrow(run, (run.before.get(metric), run.after[metric]))
    elif metric in run.before:
        cell = f"{figure(run, run.before[metric])} -> -"
    elif metric in run.changes:
        cell = f"{run.changes[metric]:+}"
        remarks.append("only the difference")
    else:
        return "-"
    if metric in run.in_noise:
        remarks.append("within noise")
    if not run.measured:
        remarks.append("not measured")
    return f"{cell} ({', '.join(remarks)})" if remarks else cell


def param(run: Run, key: str) -> str:
    return text(run.params.get(key))


def runtime(run: Run) -> str:
    """In the unit that was logged; a record's in minutes."""
    if not run.is_logged:
        return f"{run.facts['runtime_s'] / 60:.1f} min" if "runtime_s" in run.facts else "-"
    units = {"runtime_min": "min", "runtime_h": "h", "runtime_s": "s", "train_runtime_s": "s (training)"}
    return next((f"{run.facts[key]} {unit}" for key, unit in units.items() if key in run.facts), "-")


def questions(run: Run) -> str:
    """How many MT-Bench questions the average is over."""
    if not run.is_logged:
        before, after = (get_nested(run.source[phase], ("mtbench", "n")) for phase in ("baseline", "final"))
    else:
        before, after = run.facts.get("mtbench_questions", (None, None))
    cell = text(after) if before in {None, after} else f"{text(before)} -> {text(after)}"
    if "mtbench_full80_final" in run.facts:
        cell += f" (final on all 80: {run.facts['mtbench_full80_final']})"
    return cell


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
        rows = get_nested(run.source, ("data", "rows")) or {}
        counts = {key.removesuffix("_pairs"): text(rows[key]) for key in PAIR_SOURCES if key in rows}
        texts = [f"{name} {n}" for name, n in counts.items()] if len(counts) > 1 else [*counts.values()]
        return " + ".join(texts) or "-"
    if "stage1.pairs" in run.params:
        return " + ".join(text(value) for key, value in run.params.items() if key.endswith(".pairs"))
    return text(run.facts.get("pairs"))


# a table: its columns as (title, cell of a run)
Columns = list[tuple[str, Callable[[Run], str]]]


def metric_columns(*metrics: str) -> Columns:
    return [(PUBLISHED[metric][0], functools.partial(before_after, metric=metric)) for metric in metrics]


def param_columns(**titles: str) -> Columns:
    return [(title, functools.partial(param, key=key)) for key, title in titles.items()]


RUN_COLUMNS: Columns = [("Run", lambda run: run.name), ("Origin", lambda run: run.origin)]
LORA_COLUMN = ("LoRA r / alpha", lambda run: f"{param(run, 'lora_r')} / {param(run, 'lora_alpha')}")
SFT_COLUMNS: Columns = [
    *RUN_COLUMNS,
    *param_columns(subset="Subset", sample_ratio="Sample", kl_coef="KL coef", kl_start_step="KL start"),
    *param_columns(kl_warmup_steps="KL warmup", kl_limit_seq="KL tail"),
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
    ("Questions", lambda run: text(run.source["final"].get("mtbench", {}).get("n"))),
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
            cells = [arrow(run, run.types.get(kind, (None,))) for kind in kinds]
        elif logged_changes:
            cells = [f"{logged_changes[kind]:+} (only the difference)" for kind in kinds]
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


def with_reading(cells: list[str]) -> list[str]:
    """A line of `table_texts` whose verdict also says whether a clear change stays clear after Holm's correction."""
    *others, p, changed, verdict = cells
    found = "changed" if "*" in p else "-" if p == "-" else "changed before Holm's correction alone"
    return [*others, p.strip(), changed, verdict or found]


def deltas_table(runs: list[Run]) -> str:
    """Every difference of the records with its interval and p; with several seeds, their standard deviation too."""
    lines = [(run, row) for run in runs for row in delta_rows(run)]
    if not lines:
        return ""
    texts, note = table_texts([row for _, row in lines])
    header = ["Run", "Metric", "Before -> after", "Difference"]
    header += ["SD over seeds", "95 % interval", "p", "Changed", "Reading"]
    rows = []
    for (run, row), cells in zip(lines, texts, strict=True):
        title, before, after, difference, *others = with_reading(cells)
        spread = number((row.delta or {}).get("sd"))
        rows.append([run.name, title, f"{before} -> {after}", difference, spread, *others])
    if not any(run.members for run in runs):
        header, *rows = [cells[:4] + cells[5:] for cells in (header, *rows)]
    return f"{markdown_table(header, rows)}\n\n{note}."


# of each evaluation the main metric
HEADLINES = (
    "val_loss", "retention", "drift", "own_drift", "tatqa_em", "reward_accuracy", "mtbench", "instruct",
    "finance_instruct", "reddit",
)  # fmt: skip


def headline_table(runs: list[Run]) -> tuple[list[str], list[list[str]]] | None:
    """(header, rows): a row a run with the main differences and their intervals; * where Holm's correction keeps p.

    None when no run has a difference.
    """
    keys = [key for key in HEADLINES if any(key in run.delta for run in runs)]
    rows = [TableRow(METRICS[key].title, None, None, run.delta.get(key)) for run in runs for key in keys]
    texts, _ = table_texts(rows)
    cells = [f"{c[3]}{'*' * ('*' in c[5])} {c[4]}" if len(c) > 3 else "-" for c in texts]
    rows_of = [[run.name, *cells[len(keys) * n : len(keys) * (n + 1)]] for n, run in enumerate(runs)]
    return (["Run", *(METRICS[key].title for key in keys)], rows_of) if keys else None


def terminal_table(header: list[str], rows: list[list[str]]) -> str:
    """As plain ASCII of at most the terminal's width, 120 columns where there is none."""
    import shutil

    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Table

    table = Table(box=ASCII2, show_edge=False)
    for place, column in enumerate(header):
        table.add_column(column, overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    width = shutil.get_terminal_size((120, 24)).columns
    console = Console(width=width, color_system=None, legacy_windows=False, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


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
within twice the spread of two measurements of one base: see *Noise of the published baselines*. *Reading* says
"changed" where p stays below 0.05 after Holm's correction for all p values of the table.

*logged, no figures*: planned, never reported. ***logged, not measured*: not a result.** The published progressive
script returned eight constants instead of evaluating; they are kept here so that nobody takes them for one.

Runs that differ in the seed alone are one row: means over the seeds, their standard deviation, and an interval that
holds both other questions and other seeds."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one kind: the scripts, the columns of their table, the metrics that are drawn."""

    name: str
    title: str
    scripts: tuple[str, ...]
    columns: Columns
    metrics: tuple[str, ...] = ()

    def of(self, runs: list[Run]) -> list[Run]:
        return [run for run in runs if run.script in self.scripts]


SFT = Group("sft", "SFT on T-Wix", ("sft_train.py",), SFT_COLUMNS, ("val_loss", "mtbench"))
DPO = Group("dpo", "DPO on TAT-QA", ("dpo_train.py",), DPO_COLUMNS, ("tatqa", "mtbench", "instruct"))
MT_SCRIPTS, MT_METRICS = ("dpo_train_mt.py", "dpo_train_mt_v2.py"), ("tatqa", "mtbench", "finance_instruct", "reddit")
MULTI_TASK = Group("mt", "Multi-task and progressive DPO", MT_SCRIPTS, MT_COLUMNS, MT_METRICS)
EVALUATIONS = Group("mtbench", "MT-Bench of a model alone", ("mtbench_eval.py",), EVALUATION_COLUMNS)
LOGS = {  # file -> title, group, what a run's model is called
    "sft_experiments_qwen3_1_7b.md": ("SFT experiments, Qwen3-1.7B", SFT, "Qwen3-1.7B"),
    "sft_experiments_qwen3_8b.md": ("SFT experiments, Qwen3-8B", SFT, "Qwen3-8B"),
    "dpo_experiments.md": ("DPO experiments on TAT-QA", DPO, ""),
    "dpo_experiments_mt.md": ("Multi-task and progressive DPO experiments", MULTI_TASK, ""),
}


def noise_table(spreads: list[Spread]) -> str:
    """The spread of each protocol's baselines, and the published changes it makes doubtful."""
    rows = []
    for spread in spreads:
        changed = [run for run in spread.runs if spread.metric in run.changes]
        doubtful = [run.name for run in changed if spread.metric in run.in_noise]
        rows.append([
            spread.title,
            ", ".join(map(str, spread.baselines)),
            f"{spread.of_baselines:.2f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(spread.of_differences, *spread.interval()),
            f"{len(doubtful)} of {len(changed)}" + (f": {', '.join(doubtful)}" if doubtful else ""),
        ])
    header = ["Protocol", "Baselines of one base", "SD", "SD of a difference [95 %]", "Changes within twice that"]
    return markdown_table(header, rows)


def origins_table(runs: list[Run]) -> str:
    """Where and when every record was made: a miniature on a CPU must not be taken for the real model."""
    rows = []
    singles = [single for run in runs for single in run.members or [run]]
    for run in singles:
        device = run.source.get("device") or {}
        shown = " ".join(str(device[key]) for key in ("name", "dtype") if key in device)
        seed = text(run.params.get("seed"))
        place = [shown or "-", seed, text(run.source.get("git")), run.source["ts"]]
        rows.append([run.name, run.model, *place, runtime(run)])
    return markdown_table(["Run", "Model", "Device", "Seed", "Commit", "Time", "Runtime"], rows) if rows else ""


NOISE = """\
The same base was logged again and again under the same protocol. With s the standard deviation of its baselines, two
measurements differ by sqrt(2) * s (standard deviation) with nothing changed. A published change within twice that
cannot be distinguished from no change. The interval of that figure is wide, as the baselines are few. MT-Bench EN is
not here: four of its five baselines are one and the same greedy figure, which says nothing of the noise, and the
fifth is far from it."""


def notes(runs: list[Run]) -> str:
    """How the published runs were measured, and what else was noted about a run."""
    settings: dict[str, list[str]] = {}
    for run in runs:
        if run.source.get("settings"):
            settings.setdefault(run.source["settings"], []).append(run.name)
    lines = [f"- How {', '.join(names)} were measured: {text}." for text, names in settings.items()]
    names = {run.name for run in runs}
    lines += [f"- **{a}** repeats the figures of {b}; they count once." for a, b in REPEATED.items() if a in names]
    lines += [f"- **{run.label}**: {run.source['note']}." for run in runs if run.source.get("note")]
    lines += [f"- **{run.name}** ({run.origin}): {run.source['reason']}" for run in runs if run.source.get("reason")]
    return "\n".join(f"- {inert(line[2:])}" for line in lines)


def results(runs: list[Run], spreads: list[Spread], plots: dict[str, str], in_short: str = "") -> str:
    """RESULTS.md. `plots`: {file name below this folder: caption}; `in_short`: what stands at the top."""
    parts = ["# Results", GENERATED, in_short, "## How to read the tables", HOW_TO_READ]
    for group in (SFT, DPO, MULTI_TASK):
        if group.of(runs):
            parts += [f"## {group.title}", runs_tables(group.of(runs), group.columns)]
    if types := types_table(runs):
        parts += ["## TAT-QA by answer type, %", types]
    if spreads:
        parts += ["## Noise of the published baselines", NOISE, noise_table(spreads)]
    if EVALUATIONS.of(runs):
        parts += [f"## {EVALUATIONS.title}", runs_tables(EVALUATIONS.of(runs), EVALUATIONS.columns)]
    new = [run for run in runs if not run.is_logged]
    if new:
        parts += ["## Differences of the new runs", deltas_table(new)]
        parts += ["## Where the new runs were made", origins_table(new)]
    if GPU_CHECK.is_file():
        parts += ["## Checked on a GPU", gpu_check(read_json(GPU_CHECK, "the owner's check"))]
    if remarks := notes(runs):
        parts += ["## Notes", remarks]
    parts += ["## Plots"] * bool(plots)
    parts += [f"{inert(caption)}\n\n![{inert(caption)}]({name})" for name, caption in plots.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def gpu_check(check: dict) -> str:
    """What `pytest -m gpu` found on a card: its outcome and its figures, test by test."""
    shown = ("card", "memory_gib", "capability", "driver", "cuda", "git", "ts")
    about = {name: check[name] for name in shown if name in check} | check["versions"]
    rows = [
        [name.partition("::")[2], test["outcome"], number(test["seconds"]), what, number(value), unit]
        for name, test in check["tests"].items()
        for what, (value, unit) in (test["figures"] or {"-": (None, "")}).items()
    ]
    lines = ", ".join(f"{name} {text(value)}" for name, value in about.items())
    return f"{inert(lines)}.\n\n" + markdown_table(["Test", "Outcome", "Seconds", "Figure", "Value", "Unit"], rows)


def experiment_log(name: str, runs: list[Run]) -> str:
    """One file of LOGS: the table, then each run with its command and all that was logged; "" without a run."""
    title, group, model = LOGS[name]
    runs = [run for run in group.of(runs) if model in run.model]
    if not runs:
        return ""
    parts = [f"# {title}", GENERATED, HOW_TO_READ, runs_tables(runs, group.columns)]
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
        known = [[key, text(value)] for key, value in flatten(source["params"]).items()]
        parts.append(markdown_table(["Known parameter", "Value"], known))
    parts.append(figures_table(run))
    if not run.is_logged:
        parts.append(deltas_table([run]))
        device = (source.get("device") or {}).get("name", "not known")
        seed = text(source["args"].get("seed"))
        parts.append(inert(f"{source['ts']}; commit {text(source['git'])}; device {device}; seed {seed}."))
    note = source.get("note") or source.get("reason")
    return [*parts, f"Note: {inert(note)}."] if note else parts


def figures_table(run: Run) -> str:
    rows = [[PUBLISHED[metric][0], before_after(run, metric)] for metric in PUBLISHED]
    rows = [row for row in rows if row[1] != "-"]
    rows += [[f"TAT-QA {kind}, %", arrow(run, pair)] for kind, pair in run.types.items()]
    facts = flatten(run.facts).items()
    rows += [[key, arrow(run, value if isinstance(value, list) else [value])] for key, value in facts]
    return markdown_table(["Figure", "Value"], rows) if rows else ""
