"""Write what the experiments showed: tables, logs and plots from the published runs and from your own records.

    poetry run python experiments/report.py
    poetry run python experiments/report.py --run RUN
    poetry run python experiments/report.py --compare RUN_A RUN_B
    poetry run python experiments/report.py --power RUN --detect 0.3

The first writes RESULTS.md, the four Markdown logs and plots/*.png into experiments/report/, which git ignores, from
logged_runs.jsonl and every record file of this folder (and `--exp_log FILE ...`). `--mine` leaves the published runs
out; `--publish` rewrites the published files. The second prints a run's table again. The third compares two runs on
the questions that both answered, prints the table and writes one HTML page with both answers side by side. The fourth
says how small a difference N questions can detect, and how many a difference of 0.3 needs. A run is named by its tag,
by FILE:LINE of a record file, or by its output folder.

The same records and output folders give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from commands import exit_code
from compare import compare, print_power, slug
from noise import REPEATED, Spread, mark_noise
from plots import plot_categories, plot_curves, plot_metric, plot_noise, plot_seeds, plot_trade_off, plot_types
from records import DEMO, HERE, PUBLISHED, REPORT, Run, find_run, load_runs, record_files
from seeds import merge_seeds
from summary import summary
from tables import DPO, LOGS, MULTI_TASK, SFT, experiment_log, results

from llm_alignment.evaluation import print_table, table_rows
from llm_alignment.files import InputError, write_atomic
from llm_alignment.flags import positive
from llm_alignment.model_files import read_json
from llm_alignment.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--exp_log", nargs="+", type=Path, default=[], metavar="FILE", help="more record files")
    parser.add_argument("--output_dir", type=Path, help="where the files go (default: experiments/report)")
    parser.add_argument("--mine", action="store_true", help="leave out the published runs")
    parser.add_argument("--detect", type=positive(float), metavar="D", help="with --power: a difference to be found")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--publish", action="store_true", help="rewrite the published files of this folder")
    task.add_argument("--run", metavar="RUN", help="print the table of a finished run")
    task.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs: tags, FILE:LINE or output folders")
    task.add_argument(
        "--power",
        nargs="+",
        metavar="RUN",
        help="what N questions can detect, by the spread of one run or between two",
    )
    return parser


def draw_all(runs: list[Run], spreads: list[Spread]) -> dict[str, tuple[str, Figure | None]]:
    """{file name: (caption, figure, or None when no run has anything to draw)}.

    The demo's miniature changes by whole points where the real models change by tenths: it has plots of its own.
    """
    figures: dict[str, tuple[str, Figure | None]] = {}
    for prefix, remark, shown in (
        ("", "", [run for run in runs if run.model != DEMO and run.name not in REPEATED]),
        ("demo_", " (demo)", [run for run in runs if run.model == DEMO]),
    ):
        for group in (SFT, DPO, MULTI_TASK):
            members = group.of(shown)
            for metric in group.metrics:
                measure = PUBLISHED[metric][0].removesuffix(" avg").removesuffix(", %")
                caption = f"{group.title}: {measure} before and after{remark}"
                figures[f"{prefix}{group.name}_{metric}.png"] = (caption, plot_metric(caption, metric, members))
            caption = f"{group.title}: training curves of the new runs{remark}"
            singles = [single for run in members for single in run.members or [run] if not single.is_logged]
            figures[f"{prefix}{group.name}_curves.png"] = (caption, plot_curves(caption, singles))
        for name, caption, draw in (
            ("sft_trade_off", f"SFT: validation loss against MT-Bench{remark}", plot_trade_off),
            ("tatqa_types", f"TAT-QA by answer type{remark}", plot_types),
            ("seeds", f"Differences over seeds{remark}", plot_seeds),
        ):
            figures[f"{prefix}{name}.png"] = (caption, draw(caption, shown))
    figures["noise.png"] = ("Noise of the published baselines", plot_noise(spreads))
    for run in (run for run in runs if not run.is_logged):
        name = new_name(f"categories_{slug(run.name)}", figures)
        figures[name] = (f"MT-Bench by category: {run.label}", plot_categories(run))
    return figures


def new_name(stem: str, taken: Collection[str]) -> str:
    """STEM.png, or STEM_2.png ... where another run's name gave that file name; Windows takes a and A for one."""
    lower = {name.lower() for name in taken}
    numbered = (f"{stem}.png" if number == 1 else f"{stem}_{number}.png" for number in itertools.count(1))
    return next(name for name in numbered if name.lower() not in lower)


def write_report(files: list[Path], output_dir: Path, *, mine: bool = False) -> list[Path]:
    """Writes RESULTS.md, the logs and the plots from the published runs and the records in `files`; their paths."""
    runs = merge_seeds(load_runs(files, mine=mine))
    spreads = mark_noise(runs)
    (output_dir / "plots").mkdir(parents=True, exist_ok=True)
    written, captions = [], {}
    for name, (caption, figure) in draw_all(runs, spreads).items():
        if figure is not None:
            save_figure(figure, output_dir / "plots" / name)
            written.append(output_dir / "plots" / name)
            captions[f"plots/{name}"] = caption
    texts = {"RESULTS.md": results(runs, spreads, captions, summary(runs, spreads))}
    texts |= {name: experiment_log(name, runs) for name in LOGS}
    for name, text in texts.items():
        if text:
            write_atomic(output_dir / name, text)
            written.append(output_dir / name)
    return written


def print_run(name: str, files: list[Path]) -> None:
    """The table of a finished run, from the metrics.json of its folder."""
    folder = Path(name) if Path(name).is_dir() else Path(find_run(name, files).get("output_dir", name))
    path = folder / "metrics.json"
    if not path.is_file():
        raise InputError(f"--run {name}: there is no {path}; name the output folder of a finished run")
    metrics = read_json(path, f"--run {name}")
    print_table(str(folder), table_rows(*(metrics.get(key, {}) for key in ("baseline", "final", "delta"))))


def run(args: argparse.Namespace) -> None:
    files = list(dict.fromkeys([*record_files(), *(path.resolve() for path in args.exp_log)]))
    for path in args.exp_log:
        if not path.is_file():
            raise InputError(f"--exp_log {path}: no such file; name a record file")
    output_dir = args.output_dir or (HERE if args.publish else HERE / REPORT)
    if args.detect and not args.power:
        raise InputError("--detect goes with --power RUN; name a run")
    if args.run:
        print_run(args.run, files)
    elif args.compare:
        print(f"wrote {compare(args.compare, files, output_dir)}")
    elif args.power:
        print_power(args.power, files, args.detect)
    else:
        for path in write_report(files, output_dir, mine=args.mine):
            print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
