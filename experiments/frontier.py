"""What a finished run would have learned and lost with its adapter at other strengths: one training, many trade-offs.

    poetry run python experiments/frontier.py RUN_FOLDER
    poetry run python experiments/frontier.py RUN_FOLDER --scales 0 0.5 1 --gates "mtbench=-0.3,retention=-5"

The adapter is scaled (WiSE-FT, https://arxiv.org/abs/2109.01903) and the model measured with the settings of the run.
Scale 0 is the run's baseline and 1 its final measurement; their files are used where they are there. The rows of scale
0.25 are kept in NAME_scale_0.25.jsonl: the same command resumes after a stop. RUN_FOLDER gets frontier.jsonl, a line
for each scale, and frontier.png. With gates (the run's own unless --gates names others) the largest scale that passes
all is named, for export.py --scale and mtbench_eval.py --adapter_scale. Start it where the run was started.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import logged_exit_code
from finished import FinishedRun, finished_run

from llm_alignment import evaluation
from llm_alignment.adapters import LoraSettings, check_model, scaled
from llm_alignment.endings import MissedGateError
from llm_alignment.evaluation import METRICS, Evaluation, TableRow
from llm_alignment.files import write_rows
from llm_alignment.flags import not_negative
from llm_alignment.models import base_fingerprint
from llm_alignment.parser import Parser
from llm_alignment.plots import SERIES, new_figure, save_figure
from llm_alignment.retention import with_own_drift
from llm_alignment.runs import held_alone
from llm_alignment.training import Setup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("llm_alignment")

LEARNED = ("val_loss", "reward_accuracy", "tatqa_em", "finance_instruct", "reddit")  # the first that is measured
LOST = ("retention", "own_drift", "mtbench")


def build_parser() -> Parser:
    parser = Parser("experiments/frontier.py", __doc__)
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN_FOLDER", help="output folder of a training run that ended")
    add("--scales", type=not_negative(float), nargs="+", default=[0, 0.25, 0.5, 0.75, 1, 1.25],
        help="strengths of the adapter: 0 is the base, 1 the run")  # fmt: skip
    add("--gates", default=None, metavar="METRIC=DIFFERENCE[,...]",
        help="least acceptable differences from the base; without it those of the run")  # fmt: skip
    return parser


def evaluations_of(run: FinishedRun) -> list[Evaluation]:
    """What the run measured before and after training, built as its script builds it."""
    args, script = run.args, run.script
    # no adapter is made from it, and its folder holds no run that would be in the way
    setup = Setup(run.base, run.tokenizer, LoraSettings(1, 1, 0, ""), run.folder / "frontier", None, {})
    if script.__name__ == "sft_train":
        return script.task_of(args, setup).compared
    if script.__name__ == "dpo_train":
        return script.pairs_and_evaluations(args, setup)[1]
    return script.pairs_and_evaluations(args, {}, setup, {})[1]  # of no source or stage, so without training pairs


def measured(run: FinishedRun, evaluations: list[Evaluation], scales: list[float]) -> dict[float, dict]:
    """The rows of every scale, by evaluation; those of 0 and 1 are the run's own where it has them."""
    is_base = not (getattr(run.args, "load_adapter", "") and run.args.adapter_trainable)  # else it began with another
    last = max(run.folder.glob("stage?"), default=run.folder)
    own = {0.0: (run.folder, "baseline" if is_base else "scale_0"), 1.0: (last, "final")}
    fingerprint, use_cache = base_fingerprint(run.base, thinking=run.args.thinking), not run.args.no_baseline_cache
    model, rows = run.load(), {}
    for scale in sorted({0, *scales}):
        place = own.get(scale, (run.folder, f"scale_{scale:g}"))
        known = fingerprint if scale in own else {**fingerprint, "adapter_scale": scale}
        log.info("scale %g", scale)
        with scaled(model, scale):
            rows[scale] = evaluation.measure(
                model, run.tokenizer, evaluations, place, fingerprint=known, with_adapter=scale != 0,
                use_cache=use_cache,
            )  # fmt: skip
        if scale == 0:
            evaluations[:] = with_own_drift(evaluations, rows[0], run.tokenizer, thinking=run.args.thinking)
    return rows


def line_of(scale: float, evaluations: list[Evaluation], base: dict, rows: dict) -> dict[str, Any]:
    """{"scale", "baseline", "final", "delta", "gates"} of a scale: the last four as in the record of a run."""
    line: dict[str, Any] = {"scale": scale, "baseline": {}, "final": {}, "delta": {}, "gates": {}}
    for asked in evaluations:
        before, after = base[asked.name], rows[asked.name]
        line["baseline"] |= asked.summarise(before)
        line["final"] |= asked.summarise(after)
        line["delta"] |= asked.compare(before, after)
        if asked.name in evaluation.ANSWERED:
            evaluation.add_health(line, asked.name, before, after)
    return line


def largest(lines: list[dict]) -> float | None:
    """The largest scale that passes every gate; None where none does. The base, scale 0, is not judged."""
    passing = [line["scale"] for line in lines if {gate["verdict"] for gate in line["gates"].values()} == {"passed"}]
    return max(passing, default=None)


def plot_frontier(title: str, lines: list[dict], chosen: float | None) -> Figure | None:
    """What was learned against what was lost, differences from the base with intervals; a panel for each loss."""
    learned = next((name for name in LEARNED if name in lines[0]["delta"]), None)
    lost = [name for name in LOST if name in lines[0]["delta"]]
    if learned is None or not lost:
        return None
    figure, axes = new_figure(6 * len(lost), 5, len(lost))
    for axis, name in zip(axes, lost, strict=True):
        points = [[line["delta"][key] for key in (learned, name)] for line in lines]
        axis.plot(*zip(*((x["mean"], y["mean"]) for x, y in points), strict=True), color=SERIES[0], linewidth=1)
        for line, (x, y) in zip(lines, points, strict=True):
            colour = SERIES[1] if line["scale"] == chosen else SERIES[0]
            wide, high = map(error_bars, (x, y))
            axis.errorbar(x["mean"], y["mean"], yerr=high, xerr=wide, fmt="o", color=colour, alpha=0.8)
            axis.annotate(f"{line['scale']:g}", (x["mean"], y["mean"]), xytext=(6, 6), textcoords="offset points")
        axis.set(xlabel=f"learned: {METRICS[learned].title}", ylabel=METRICS[name].title)
        if METRICS[learned].lower_is_better:
            axis.invert_xaxis()  # what is learned grows to the right
        if METRICS[name].lower_is_better:
            axis.invert_yaxis()  # what is lost lies below
    figure.suptitle(f"{title}: differences from the base by the adapter's scale")
    return figure


def error_bars(delta: dict) -> list[list[float]] | None:
    """The interval of a difference as matplotlib takes it."""
    low, mean, high = (delta[key] for key in ("low", "mean", "high"))
    return None if low is None else [[max(0, mean - low)], [max(0, high - mean)]]


def frontier(args: argparse.Namespace) -> None:
    """Measures every scale; writes frontier.jsonl and frontier.png; prints the table and the scale to take."""
    run = finished_run(args.run_folder)
    for scale in args.scales:
        check_model(run.base, run.tokenizer, adapter=str(run.folder), scale=scale)
    evaluations = evaluations_of(run)
    gates = evaluation.asked_gates(run.args.gates if args.gates is None else args.gates, evaluations)
    with held_alone(run.folder / "run.lock", f"{run.folder}: another run is working in this folder; wait for its end"):
        rows = measured(run, evaluations, args.scales)
        lines = [line_of(scale, evaluations, rows[0], rows[scale]) for scale in rows]
        for line in lines[1:] if gates else []:
            log.info("gates at scale %g:", line["scale"])
            with contextlib.suppress(MissedGateError):
                evaluation.judge_gates(line, gates)
        chosen = largest(lines)
        write_rows(run.folder / "frontier.jsonl", lines)
        save_figure(plot_frontier(run.folder.name, lines, chosen), run.folder / "frontier.png")
    table = []
    for name, metric in METRICS.items():
        for line in lines[1:] if name in {*LEARNED, *LOST} & {*evaluation.metrics_of(evaluations)} else []:
            before, after = map(metric.read, (line["baseline"], line["final"]))
            title, delta = f"{metric.title}, {line['scale']:g}", line["delta"].get(name)
            table.append(TableRow(title, before, after, delta, metric.lower_is_better))
    evaluation.print_table(f"{run.folder}, by the scale of its adapter", table, ("base", "scaled"))
    if chosen is not None:
        log.info("the largest scale that passes the gates: %g (export.py --scale %g)", chosen, chosen)
    elif gates:
        log.warning("no scale passes the gates")


def main(argv: list[str] | None = None) -> int:
    return logged_exit_code(lambda: frontier(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
