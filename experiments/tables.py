"""Tables of runs in Markdown: RESULTS.md and the four logs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from commands import shown_command
from noise import REPEATED, Spread
from records import DEMO, HERE, PUBLISHED, Run, flatten, singles
from seeds import NO_SETTINGS

from llm_alignment.evaluation import METRICS, TableRow, number, table_rows, table_texts
from llm_alignment.model_files import read_json

GPU_CHECK = HERE / "benchmarks" / "gpu_check.json"  # of `pytest -m gpu`


def text(value: object) -> str:
    """A setting, or a published figure, as it was logged; "-" for None."""
    return "-" if value is None else str(value)


def arrow(run: Run, values: Iterable[object]) -> str:
    """Published figures as they were logged, measured ones in four digits."""
    return " -> ".join((text if run.is_logged else number)(value) for value in values)


def inert(text: str) -> str:
    """A text on one line that Markdown shows as it is: no HTML, no link, no code."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split())))
    return re.sub(r"([\[`])", r"\\\1", text)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(inert(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)]) if rows else ""


def document(parts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"


def before_after(run: Run, metric: str) -> str:
    """ "1.4698 -> 1.2672", or the difference where that is all that was logged, and what must be known of it."""
    if metric in run.before.keys() | run.after.keys():
        cell, remarks = arrow(run, (run.before.get(metric), run.after.get(metric))), []
    elif metric in run.changes:
        cell, remarks = f"{run.changes[metric]:+}", ["only the difference"]
    else:
        return "-"
    remarks += ["within noise"] * (metric in run.in_noise) + ["not measured"] * (not run.measured)
    return f"{cell} ({', '.join(remarks)})" if remarks else cell


def runtime(run: Run) -> str:
    """In the unit that was logged; a record's in minutes."""
    if not run.is_logged:
        return f"{run.facts['runtime_s'] / 60:.1f} min" if "runtime_s" in run.facts else "-"
    units = {"runtime_min": "min", "runtime_h": "h", "runtime_s": "s", "train_runtime_s": "s (training)"}
    return next((f"{run.facts[key]} {unit}" for key, unit in units.items() if key in run.facts), "-")


def questions(run: Run) -> str:
    """How many MT-Bench questions the average is over."""
    before, after = run.facts.get("mtbench_questions", (None, None))
    if not run.is_logged:
        before, after = ((run.source[side].get("mtbench") or {}).get("n") for side in ("baseline", "final"))
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
    if run.is_logged:
        of_stages = [text(value) for key, value in run.params.items() if key.endswith(".pairs")]
        return " + ".join(of_stages) or text(run.facts.get("pairs"))
    rows = (run.source.get("data") or {}).get("rows") or {}
    counts = [(key.removesuffix("_pairs"), rows[key]) for key in PAIR_SOURCES if key in rows]
    return " + ".join(f"{name} {n}" if len(counts) > 1 else text(n) for name, n in counts) or "-"


def param(run: Run, key: str) -> str:
    return text(run.params.get(key))


PARAMS = {
    "subset": "Subset", "sample_ratio": "Sample", "kl_coef": "KL coef", "kl_start_step": "KL start",
    "kl_warmup_steps": "KL warmup", "kl_limit_seq": "KL tail", "beta": "Beta", "learning_rate": "LR",
    "epochs": "Epochs", "adapter": "Adapter", "questions": "Questions from",
}  # fmt: skip
COLUMNS: dict[str, tuple[str, Callable[[Run], str]]] = {  # title, cell of a run
    **{name: (metric.title, partial(before_after, metric=name)) for name, metric in PUBLISHED.items()},
    **{flag: (title, partial(param, key=flag)) for flag, title in PARAMS.items()},
    "name": ("Run", lambda run: run.name),
    "origin": ("Origin", lambda run: run.origin),
    "lora": ("LoRA r / alpha", lambda run: f"{param(run, 'lora_r')} / {param(run, 'lora_alpha')}"),
    "asked": ("Questions", questions),
    "pairs": ("Pairs", pairs),
    "mix": ("Pairs from", mix),
    "runtime": ("Runtime", runtime),
    "score": ("Score, 1-10", lambda run: number(METRICS["mtbench"].read(run.source["final"]))),
    "published": ("Published scale", lambda run: number(run.after.get("mtbench"))),
}


def runs_tables(runs: list[Run], names: str) -> str:
    """A table for each base model, of the COLUMNS that are named."""
    parts, columns = [], [COLUMNS[name] for name in f"name origin {names}".split()]
    for model in dict.fromkeys(run.model for run in runs):
        rows = [[cell(run) for _, cell in columns] for run in runs if run.model == model]
        parts += [f"### {inert(model)}", markdown_table([title for title, _ in columns], rows)]
    return "\n\n".join(parts)


def types_table(runs: list[Run]) -> str:
    """TAT-QA by answer type; for one published run only the differences were logged."""
    kinds, rows = ["arithmetic", "count", "multi-span", "span"], []
    for run in runs:
        logged_changes = run.facts.get("tatqa_by_type_delta_pp", {})
        if run.types:
            rows.append([run.name, run.origin, *(arrow(run, run.types.get(kind, (None,))) for kind in kinds)])
        elif logged_changes:
            cells = [f"{logged_changes[kind]:+} (only the difference)" for kind in kinds]
            rows.append([run.name, run.origin, *cells])
    return markdown_table(["Run", "Origin", *kinds], rows)


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
    return f"{markdown_table(header, rows)}\n\n{note}." if rows else ""


# of each evaluation the main metric
HEADLINES = (
    "val_loss", "retention", "drift", "own_drift", "tatqa_em", "reward_accuracy", "mtbench", "instruct",
    "finance_instruct", "reddit",
)  # fmt: skip


def headline_table(runs: list[Run]) -> tuple[list[str], list[list[str]]] | None:
    """(header, rows): a row a run with the main differences and their intervals; * where Holm's correction keeps p.
    None when no run has a difference."""
    keys = [key for key in HEADLINES if any(key in run.delta for run in runs)]
    rows = [TableRow(METRICS[key].title, None, None, run.delta.get(key)) for run in runs for key in keys]
    cells = [f"{c[3]}{'*' * ('*' in c[5])} {c[4]}" if len(c) > 3 else "-" for c in table_texts(rows)[0]]
    rows_of = [[run.name, *cells[len(keys) * n : len(keys) * (n + 1)]] for n, run in enumerate(runs)]
    return (["Run", *(METRICS[key].title for key in keys)], rows_of) if keys else None


def terminal_table(header: list[str], rows: list[list[str]]) -> str:
    """As plain ASCII of at most the terminal's width, 120 columns where there is none."""
    import shutil

    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Column, Table

    columns = [Column(title, overflow="fold", no_wrap=place == 0) for place, title in enumerate(header)]
    table = Table(*columns, box=ASCII2, show_edge=False)
    for row in rows:
        table.add_row(*row)
    width = shutil.get_terminal_size((120, 24)).columns
    console = Console(width=width, color_system=None, legacy_windows=False, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


HOW_TO_READ = (HERE / "how_to_read.md").read_text("utf-8").strip()
GENERATED = "<!-- Generated by experiments/report.py from the JSONL files: change those, never this file. -->"


class Group(NamedTuple):
    """Runs of one kind: their scripts, the metrics that are drawn, the columns of their table."""

    name: str
    title: str
    scripts: str
    metrics: str
    columns: str

    def of(self, runs: list[Run]) -> list[Run]:
        return [run for run in runs if run.script in self.scripts.split()]


SFT = Group(
    "sft", "SFT on T-Wix", "sft_train.py", "val_loss mtbench",
    "subset sample_ratio kl_coef kl_start_step kl_warmup_steps kl_limit_seq val_loss ppl mtbench asked drift runtime",
)  # fmt: skip
DPO = Group(
    "dpo", "DPO on TAT-QA", "dpo_train.py", "tatqa mtbench instruct",
    "beta learning_rate epochs lora tatqa mtbench instruct instruct_success checks drift pairs runtime",
)  # fmt: skip
MULTI_TASK = Group(
    "mt", "Multi-task and progressive DPO", "dpo_train_mt.py dpo_train_mt_v2.py",
    "tatqa mtbench finance_instruct reddit",
    "mix beta learning_rate pairs tatqa mtbench finance_instruct finance_success success reddit drift runtime",
)  # fmt: skip
ALONE = "adapter questions asked score published"
EVALUATIONS = Group("mtbench", "MT-Bench of a model alone", "mtbench_eval.py", "", ALONE)
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
    for run in singles(runs):
        device = run.source.get("device") or {}
        shown = " ".join(str(device[key]) for key in ("name", "dtype") if key in device)
        place = [shown or "-", param(run, "seed"), text(run.source.get("git")), run.source["ts"]]
        rows.append([run.name, run.model, *place, runtime(run)])
    return markdown_table(["Run", "Model", "Device", "Seed", "Commit", "Time", "Runtime"], rows)


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
    new = [run for run in runs if not run.is_logged]
    sections = [(group.title, runs_tables(group.of(runs), group.columns)) for group in (SFT, DPO, MULTI_TASK)]
    sections += [
        ("TAT-QA by answer type, %", types_table(runs)),
        ("Noise of the published baselines", f"{NOISE}\n\n{noise_table(spreads)}" if spreads else ""),
        (EVALUATIONS.title, runs_tables(EVALUATIONS.of(runs), EVALUATIONS.columns)),
        ("Differences of the new runs", deltas_table(new)),
        ("Where the new runs were made", origins_table(new)),
        ("Checked on a GPU", gpu_check(read_json(GPU_CHECK, "the owner's check")) if GPU_CHECK.is_file() else ""),
        ("Notes", notes(runs)),
        ("Plots", "\n\n".join(f"{inert(text)}\n\n![{inert(text)}]({name})" for name, text in plots.items())),
    ]
    top = ["# Results", GENERATED, in_short, "## How to read the tables", HOW_TO_READ]
    return document([*top, *(f"## {title}\n\n{text}" for title, text in sections if text)])


KEPT_BY = {"kl_coef", "kl_direction", "kl_on", "kl_start_step", "kl_warmup_steps", "replay_ratio", "replay"}


def recipes_table(new: list[Run]) -> str:
    """What was tried on real models by SFT and by DPO on TAT-QA: what it learned and what it lost, with intervals. Of
    the demo, runs without anchor and replay, with those that differ from them in these alone."""
    kept = ("retention", "own_drift", "drift", "mtbench")
    groups: dict[str, list[Run]] = {}
    done = [run for run in SFT.of(new) + DPO.of(new) if run.delta]
    for run in sorted(done, key=lambda run: run.model == DEMO):
        same = {key: value for key, value in run.params.items() if key not in KEPT_BY | NO_SETTINGS}
        groups.setdefault(json.dumps([run.model, run.script, same], sort_keys=True, default=str), []).append(run)
    rows = []
    for runs in groups.values():
        if runs[0].model == DEMO and (len(runs) == 1 or "none" not in map(way_of, runs)):
            continue
        learned = "val_loss" if SFT.of(runs) else "tatqa_em"  # a group is of one script
        for run in sorted(runs, key=lambda run: [run.params.get(flag) or 0 for flag in ("kl_coef", "replay_ratio")]):
            recipe = ", ".join(param(run, flag) for flag in ("learning_rate", "target_modules", "lora_r"))
            cells = [f"{METRICS[learned].title} {change_of(run, learned)}", *(change_of(run, name) for name in kept)]
            seconds = run.source.get("runtime_s", {}).get("train")
            cells.append(f"{seconds / 60:.1f}" if seconds else "-")
            rows.append([run.model.rpartition("/")[2], recipe, way_of(run), run.name, *cells])
    header = ["Model", "Rate, layers, rank", "Anchor, replay", "Records", "Learned"]
    return markdown_table([*header, *(METRICS[name].title for name in kept), "Training, min"], rows)


def change_of(run: Run, name: str) -> str:
    """The difference of a metric with its interval; "-" without one."""
    delta = run.delta.get(name, {})
    return "-" if delta.get("low") is None else "{mean:+.3g} [{low:.3g}, {high:.3g}]".format(**delta)


def way_of(run: Run) -> str:
    """How a run of SFT keeps what was there, in words."""
    params = run.params
    ways = []
    if params.get("kl_coef"):
        ways = [f"KL {params['kl_coef']:g}" + " forward" * (params.get("kl_direction") == "forward")]
        ways[0] += " on replay rows" * (params.get("kl_on") == "replay")
    ways += [f"replay {100 * params['replay_ratio']:g} %"] if params.get("replay_ratio") else []
    return ", ".join(ways) or "none"


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
    for run in singles(runs):
        parts += log_section(run)
    return document(parts)


SAID = {
    "command_is": "The command is {}.", "aliases": "Also called {}.", "settings": "How it was measured: {}.",
}  # fmt: skip


def log_section(run: Run) -> list[str]:
    """A run's heading, command, parameters, figures and notes."""
    source = run.source
    title = f"{run.name}: {source['title']}" if run.is_logged else run.name
    place = source["source" if run.is_logged else "place"]
    parts = [f"## {inert(title)}", inert(f"Origin: {run.origin}; {place}. Model: {run.model}.")]
    if not run.measured:
        parts.append("**Not measured: these figures are not a result.**")
    command = source["command"] if run.is_logged else shown_command(run.script, source["argv"])
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", command or "")), 0)
    parts.append(f"{fence}text\n{command}\n{fence}" if command else "The command was not logged.")
    said = {**source, "aliases": ", ".join(source.get("aliases", []))}
    parts += [line.format(said[key]) for key, line in SAID.items() if said.get(key)]
    known = [[key, text(value)] for key, value in flatten(source.get("params", {})).items()]
    figures = [[metric.title, cell] for name, metric in PUBLISHED.items() if (cell := before_after(run, name)) != "-"]
    figures += [[f"TAT-QA {kind}, %", arrow(run, pair)] for kind, pair in run.types.items()]
    for key, value in flatten(run.facts).items():
        figures.append([key, arrow(run, value if isinstance(value, list) else [value])])
    parts += [markdown_table(["Known parameter", "Value"], known), markdown_table(["Figure", "Value"], figures)]
    if not run.is_logged:
        device = (source.get("device") or {}).get("name", "not known")
        made = f"{source['ts']}; commit {text(source['git'])}; device {device}; seed {param(run, 'seed')}."
        parts += [deltas_table([run]), inert(made)]
    note = source.get("note") or source.get("reason")
    return [*parts, f"Note: {inert(note)}."] if note else parts
