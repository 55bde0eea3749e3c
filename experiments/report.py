"""Write what the experiments showed: tables, logs and plots from the published runs and from your own records.

    poetry run python experiments/report.py
    poetry run python experiments/report.py --compare RUN_A RUN_B
    poetry run python experiments/report.py --power RUN

The first writes RESULTS.md, the four Markdown logs and plots/*.png from logged_runs.jsonl and from every record file
of this folder (and `--exp_log FILE ...`). The second compares two runs on the questions that both answered, prints
the table and writes one HTML page with both answers side by side. The third says how small a difference N questions
can detect. A run is named by its tag, by FILE:LINE of a record file, or by its output folder.

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
from noise import Spread, mark_noise
from plots import plot_categories, plot_curves, plot_metric, plot_noise, plot_seeds, plot_trade_off, plot_types
from records import DEMO, HERE, PUBLISHED, Run, load_runs, record_files
from seeds import merge_seeds
from tables import DPO, LOGS, MULTI_TASK, SFT, experiment_log, results

from llm_alignment.files import InputError, write_atomic
from llm_alignment.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--exp_log", nargs="+", type=Path, default=[], metavar="FILE", help="more record files")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where the files go (default: %(default)s)")
    task = parser.add_mutually_exclusive_group()
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
        ("", "", [run for run in runs if run.model != DEMO]),
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


def write_report(files: list[Path], output_dir: Path) -> list[Path]:
    """Writes RESULTS.md, the logs and the plots from the published runs and the records in `files`; their paths."""
    runs = merge_seeds(load_runs(files))
    spreads = mark_noise(runs)
    (output_dir / "plots").mkdir(parents=True, exist_ok=True)
    written, captions = [], {}
    for name, (caption, figure) in draw_all(runs, spreads).items():
        if figure is not None:
            save_figure(figure, output_dir / "plots" / name)
            written.append(output_dir / "plots" / name)
            captions[f"plots/{name}"] = caption
    texts = {"RESULTS.md": results(runs, spreads, captions)}
    texts |= {name: experiment_log(name, runs) for name in LOGS}
    for name, text in texts.items():
        write_atomic(output_dir / name, text)
        written.append(output_dir / name)
    return written


def run(args: argparse.Namespace) -> None:
    files = list(dict.fromkeys([*record_files(), *(path.resolve() for path in args.exp_log)]))
    for path in args.exp_log:
        if not path.is_file():
            raise InputError(f"--exp_log {path}: no such file; name a record file")
    if args.compare:
        print(f"wrote {compare(args.compare, files, args.output_dir)}")
    elif args.power:
        print_power(args.power, files)
    else:
        for path in write_report(files, args.output_dir):
            print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
