"""Write what the experiments showed: tables, logs and plots from the published runs and from your own records.

    poetry run python experiments/report.py
    poetry run python experiments/report.py --run RUN
    poetry run python experiments/report.py --compare RUN_A RUN_B
    poetry run python experiments/report.py --power RUN --detect 0.3

The first writes RESULTS.md, the four Markdown logs and plots/*.png into experiments/report/, which git ignores, from
logged_runs.jsonl and every record file of this folder (and `--exp_log FILE ...`). `--mine` leaves the published runs
out; `--publish` rewrites the published files. The second prints a run's table again. The third compares two runs on
the questions that both answered: a table, and one HTML page with both answers side by side. The fourth says how small
a difference N questions can detect, and how many a difference of 0.3 needs. A run is named by its tag, by FILE:LINE of
a record file, or by its output folder. The same records and output folders give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from commands import exit_code
from compare import compare, print_power, slug
from noise import REPEATED, Spread, mark_noise, sd_interval
from plots import plot_categories, plot_curves, plot_metric, plot_noise, plot_seeds, plot_trade_off, plot_types
from records import DEMO, HERE, PUBLISHED, REPORT, Run, find_run, load_runs, record_files, singles
from seeds import merge_seeds
from tables import DPO, LOGS, MULTI_TASK, SFT, Group, delta_rows, document, experiment_log, recipes_table, results

from llm_alignment.evaluation import print_results
from llm_alignment.files import InputError, write_atomic
from llm_alignment.flags import positive, refuse
from llm_alignment.model_files import read_json
from llm_alignment.parser import Parser
from llm_alignment.plots import save_figure
from llm_alignment.stats import holm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def build_parser() -> Parser:
    parser = Parser("experiments/report.py", __doc__)
    add, add_task = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--exp_log", nargs="+", type=Path, default=[], metavar="FILE", help="more record files")
    add("--output_dir", type=Path, help="where the files go (default: experiments/report)")
    add("--mine", action="store_true", help="leave out the published runs")
    add("--table", choices=["headline", "full"], help="with --run: rows of the table (default: headline)")
    add("--detect", type=positive(float), metavar="D", help="with --power: a difference to be found")
    add_task("--publish", action="store_true", help="rewrite the published files of this folder")
    add_task("--run", metavar="RUN", help="print the results of a finished run again")
    add_task("--compare", nargs=2, metavar=("A", "B"), help="two runs: tags, FILE:LINE or output folders")
    add_task("--power", nargs="+", metavar="RUN",
             help="what N questions can detect, by the spread of one run or between two")  # fmt: skip
    return parser


def summary(runs: list[Run], spreads: list[Spread]) -> str:
    """The beginning of RESULTS.md: the recipes that were tried, and what else a reader should take from the tables."""
    logged, new = ([run for run in runs if run.is_logged == is_logged] for is_logged in (True, False))
    lines = [*logged_lines(logged, spreads)] if logged else []
    lines += [*new_lines(new, published=bool(logged)), *holm_lines(new)]
    return document([recipes_table(new), "\n".join(f"- {line}" for line in lines)]).rstrip()


def logged_lines(logged: list[Run], spreads: list[Spread]) -> Iterator[str]:
    """What was published, and what of the changes by DPO is larger than the noise of its protocol."""
    left_out = {
        what: sum(run.origin == f"logged, {what}" for run in logged) for what in ("no figures", "not measured")
    }
    planned, invented = left_out.values()
    figures = f"{len(logged) - planned - invented} with figures, {planned} only planned, {invented} with constants"
    yield f"{len(logged)} published runs: {figures} instead of measurements. They logged no answers, so no interval."

    def changed(group: Group, metric: str) -> tuple[list[Run], list[float], str]:
        """The runs of a group with this measure, their changes, and from where to where these go."""
        found = [run for run in group.of(logged) if metric in run.changes and run.measured]
        values = [run.changes[metric] for run in found]
        return found, values, f"{min(values):+.2f} to {max(values):+.2f}"

    (learned, _, losses), (_, scores, span) = changed(SFT, "val_loss"), changed(SFT, "mtbench")
    fell = f"it fell in {sum(x < 0 for x in scores)} of {len(scores)}"
    loss = f"Published SFT: the validation loss changed by {losses} nats per token in {len(learned)} runs"
    yield f"{loss}, MT-Bench by {span} on the published scale; {fell}."
    judged = {(run.name, spread.metric) for spread in spreads for run in spread.runs}
    for group in (DPO, MULTI_TASK):
        parts = []
        for metric, title in (("tatqa", "TAT-QA"), ("mtbench", "MT-Bench")):
            found, _, span = changed(group, metric)
            known = [run for run in found if (run.name, metric) in judged]
            clear = sum(metric not in run.in_noise for run in known)
            beyond = f"{clear} of {len(known)} beyond twice the noise" if known else "its noise is not known"
            parts.append(f"{title} {span} ({beyond})")
        yield f"Published {group.title}: {', '.join(parts)}."


def new_lines(new: list[Run], *, published: bool) -> Iterator[str]:
    """On which models this code has run; beside the published runs also what that leaves open."""
    real = sorted({run.model.rpartition("/")[2] for run in new if run.model != DEMO})
    demo = sum(run.model == DEMO for run in singles(new))
    yield f"Runs of this code: {demo} on the demo's miniature, and on {', '.join(real) or 'no real model'}."
    on_gpu = any("cpu" not in str((run.source.get("device") or {}).get("name", "cpu")) for run in new)
    if published and not (on_gpu and any("Qwen3-1.7B" in name for name in real)):
        yield "**No recipe has run on a GPU or on Qwen3-1.7B with this code yet.**"
    if demo:
        yield (
            "The demo shows that the code works. Its base was trained for it, its rates and its anchor are many times "
            "those of the recipes: it says nothing about what a recipe gives."
        )


def holm_lines(new: list[Run]) -> Iterator[str]:
    """How many p values stay, and how sure a standard deviation over so few seeds is."""
    p_values = [row.delta["p"] for run in new for row in delta_rows(run) if row.delta and row.delta["p"] is not None]
    if p_values:
        below, kept = sum(p < 0.05 for p in p_values), sum(p < 0.05 for p in holm(p_values))
        yield f"Of {len(p_values)} p values {below} are below 0.05, and {kept} after Holm's correction."
    if seeds := min((len(run.members) for run in new if run.members), default=0):
        low, high = sd_interval(seeds)
        yield (
            f"A standard deviation over {seeds} seeds is uncertain: the true one lies between {low:.2f} and "
            f"{high:.1f} times it (95 %)."
        )


def draw_all(runs: list[Run], spreads: list[Spread]) -> dict[str, tuple[str, Figure]]:
    """{file name: (caption, figure)} of what there is to draw. The demo's miniature changes by whole points where the
    real models change by tenths: it has plots of its own."""
    figures: dict[str, tuple[str, Figure]] = {}

    def draw(name: str, caption: str, plot: Callable[..., Figure | None], *of: object) -> None:
        if figure := plot(caption, *of):
            figures[f"plots/{name}.png"] = caption, figure

    for prefix, remark, shown in (
        ("", "", [run for run in runs if run.model != DEMO and run.name not in REPEATED]),
        ("demo_", " (demo)", [run for run in runs if run.model == DEMO]),
    ):
        for group in (SFT, DPO, MULTI_TASK):
            name, members = prefix + group.name, group.of(shown)
            for metric in group.metrics.split():
                measure = PUBLISHED[metric].title.removesuffix(" avg").removesuffix(", %")
                caption = f"{group.title}: {measure} before and after{remark}"
                draw(f"{name}_{metric}", caption, plot_metric, metric, members)
            new = [run for run in singles(members) if not run.is_logged]
            draw(f"{name}_curves", f"{group.title}: training curves of the new runs{remark}", plot_curves, new)
        draw(f"{prefix}sft_trade_off", f"SFT: validation loss against MT-Bench{remark}", plot_trade_off, shown)
        draw(f"{prefix}tatqa_types", f"TAT-QA by answer type{remark}", plot_types, shown)
        draw(f"{prefix}seeds", f"Differences over seeds{remark}", plot_seeds, shown)
    draw("noise", "Noise of the published baselines", plot_noise, spreads)
    for run in (run for run in runs if not run.is_logged):
        taken = {name.lower() for name in figures}  # Windows takes a and A for one
        stem = f"plots/categories_{slug(run.name)}"
        names = (f"{stem}_{number}.png" if number > 1 else f"{stem}.png" for number in itertools.count(1))
        if figure := plot_categories(run):
            name = next(name for name in names if name.lower() not in taken)
            figures[name] = f"MT-Bench by category: {run.label}", figure
    return figures


def write_report(files: list[Path], output_dir: Path, *, mine: bool = False) -> list[Path]:
    """Writes RESULTS.md, the logs and the plots from the published runs and the records in `files`; their paths."""
    runs = merge_seeds(load_runs(files, mine=mine))
    spreads = mark_noise(runs)
    figures = draw_all(runs, spreads)
    (output_dir / "plots").mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in figures.items():
        save_figure(figure, output_dir / name)
    captions = {name: caption for name, (caption, _) in figures.items()}
    texts = {"RESULTS.md": results(runs, spreads, captions, summary(runs, spreads))}
    texts |= {name: text for name in LOGS if (text := experiment_log(name, runs))}
    for name, text in texts.items():
        write_atomic(output_dir / name, text)
    return [output_dir / name for name in (*figures, *texts)]


def print_run(name: str, files: list[Path], table: str) -> None:
    """What a finished run printed at its end, from the metrics.json of its folder; `table`: "headline" or "full"."""
    folder = Path(name) if Path(name).is_dir() else Path(find_run(name, files).get("output_dir", name))
    path = folder / "metrics.json"
    if not path.is_file():
        raise InputError(f"--run {name}: there is no {path}; name the output folder of a finished run")
    metrics = read_json(path, f"--run {name}")
    try:
        print_results(str(folder), metrics, table)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--run {name}: {path} is damaged ({type(error).__name__}: {error})") from error


def run(args: argparse.Namespace) -> None:
    if missing := [path for path in args.exp_log if not path.is_file()]:
        raise InputError(f"--exp_log {missing[0]}: no such file; name a record file")
    refuse(
        (args.detect and not args.power, "--detect goes with --power RUN; name a run"),
        (args.table and args.run is None, "--table goes with --run RUN; name a run"),
    )
    files = list(dict.fromkeys([*record_files(), *(path.resolve() for path in args.exp_log)]))
    output_dir = args.output_dir or (HERE if args.publish else HERE / REPORT)
    if args.run is not None:  # empty, as of a shell variable that is not set, is an error
        print_run(args.run, files, args.table or "headline")
    elif args.power:
        print_power(args.power, files, args.detect)
    else:
        written = [compare(args.compare, files, output_dir)] if args.compare else []
        for path in written or write_report(files, output_dir, mine=args.mine):
            print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
