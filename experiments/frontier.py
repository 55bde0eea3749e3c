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
import dataclasses
import functools
import importlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from records import exit_code

from llm_alignment import evaluation
from llm_alignment.evaluation import METRICS, Evaluation, TableRow, asked_gates, judge_gates
from llm_alignment.files import InputError, log, parse_json, write_rows
from llm_alignment.flags import Parser, fill, not_negative
from llm_alignment.plots import SERIES, new_figure, save_figure
from llm_alignment.retention import with_own_drift
from llm_alignment.runs import held_alone

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from llm_alignment.models import Base

LEARNED = ("val_loss", "reward_accuracy", "tatqa_em", "finance_instruct", "reddit")  # the first that is measured
LOST = ("retention", "own_drift", "mtbench")
TRAINED = ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2")


class FinishedRun(NamedTuple):
    folder: Path
    script: ModuleType
    args: argparse.Namespace  # the run's own, data at its commits; flags newer than the run have their defaults
    base: Base  # at the commit of the run
    tokenizer: PreTrainedTokenizerBase

    def load(self) -> PeftModel:
        """Base and adapter."""
        from llm_alignment import adapters, models

        return adapters.load_adapter(models.load_model(self.base), str(self.folder))


def finished_run(folder: Path) -> FinishedRun:
    """The run in `folder`. Raises InputError unless it was trained and measured to its end, and its files fit."""
    from llm_alignment import adapters, models

    try:
        run = parse_json((folder / "run.json").read_bytes())
        name, flags, commits = run["script"].removesuffix(".py"), run["args"], run.get("commits") or {}
        if name not in TRAINED or not parse_json((folder / "metrics.json").read_bytes())["final"]:
            raise ValueError("nothing was measured after training")
        script = importlib.import_module(name)
        data = {flag: f"{flags[flag].partition('@')[0]}@{commits[flag]}" for flag in commits if "dataset" in flag}
        parser = script.build_parser()
        parser.set_defaults(**flags | data | {"report_to": "none"})  # a tracker may not be installed here
        args = parser.parse_args([])
        revision = commits.get("model") or args.model_revision
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{Path(error.filename).name} is not there" if isinstance(error, FileNotFoundError) else repr(error)
        advice = "name the output folder of a training run that ended, or end it by --resume_from_checkpoint auto"
        raise InputError(f"{folder}: no finished run ({reason}); {advice}") from error
    base = models.resolve_base(dataclasses.replace(fill(models.BaseFlags, args), model_revision=revision))
    if run.get("base", base.identity) != base.identity:
        raise InputError(f"{folder}: {base.what} is not the base that the run had; put that back")
    tokenizer = models.load_tokenizer(base)
    adapters.check_model(base, tokenizer, adapter=str(folder))
    return FinishedRun(folder, script, args, base, tokenizer)


def build_parser() -> Parser:
    parser = Parser("experiments/frontier.py", __doc__)
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN_FOLDER", help="output folder of a training run that ended")
    add("--scales", type=not_negative(float), nargs="+", default=[0, 0.25, 0.5, 0.75, 1, 1.25],
        help="strengths of the adapter: 0 is the base, 1 the run")  # fmt: skip
    add("--gates", metavar="METRIC=DIFFERENCE[,...]", help="least acceptable differences; without it the run's own")
    return parser


def measured(run: FinishedRun, evaluations: list[Evaluation], scales: list[float]) -> dict[float, dict]:
    """The rows of every scale, by evaluation; those of 0 and 1 are the run's own where it has them."""
    from llm_alignment import adapters, models

    is_base = not (getattr(run.args, "load_adapter", "") and run.args.adapter_trainable)  # else it began with another
    last = max(run.folder.glob("stage?"), default=run.folder)
    own = {0.0: (run.folder, "baseline" if is_base else "scale_0"), 1.0: (last, "final")}
    fingerprint, model, rows = models.base_fingerprint(run.base, thinking=run.args.thinking), run.load(), {}
    measure = functools.partial(evaluation.measure, model, run.tokenizer, use_cache=not run.args.no_baseline_cache)
    for scale in sorted({0, *scales}):
        place = own.get(scale, (run.folder, f"scale_{scale:g}"))
        known = fingerprint if scale in own else {**fingerprint, "adapter_scale": scale}
        log.info("scale %g", scale)
        with adapters.scaled(model, scale):
            rows[scale] = measure(evaluations, place, fingerprint=known, with_adapter=scale != 0)
        if scale == 0:
            evaluations[:] = with_own_drift(evaluations, rows[0], run.tokenizer, thinking=run.args.thinking)
    return rows


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
            wide, high = (
                None if d["low"] is None else [[max(0, d["mean"] - d["low"])], [max(0, d["high"] - d["mean"])]]
                for d in (x, y)
            )
            axis.errorbar(x["mean"], y["mean"], yerr=high, xerr=wide, fmt="o", color=colour, alpha=0.8)
            axis.annotate(f"{line['scale']:g}", (x["mean"], y["mean"]), xytext=(6, 6), textcoords="offset points")
        axis.set(xlabel=f"learned: {METRICS[learned].title}", ylabel=METRICS[name].title)
        if METRICS[learned].lower_is_better:
            axis.invert_xaxis()  # what is learned grows to the right
        if METRICS[name].lower_is_better:
            axis.invert_yaxis()  # what is lost lies below
    figure.suptitle(f"{title}: differences from the base by the adapter's scale")
    return figure


def frontier(args: argparse.Namespace) -> None:
    """Measures every scale; writes frontier.jsonl and frontier.png; prints the table and the scale to take."""
    from llm_alignment import adapters, training

    run = finished_run(args.run_folder)
    for scale in args.scales:
        adapters.check_model(run.base, run.tokenizer, adapter=str(run.folder), scale=scale)
    # what the run measured; no adapter is made from it, and its folder holds no run that would be in the way
    lora = adapters.LoraSettings(1, 1, 0, "")
    setup = training.Setup(run.base, run.tokenizer, lora, run.folder / "frontier", None, {})
    if (script := run.script).__name__ == "sft_train":
        evaluations = script.task_of(run.args, setup).compared
    else:  # those of several sources or stages: of none, so without training pairs
        given: tuple = (setup,) if script.__name__ == "dpo_train" else ({}, setup, {})
        _, evaluations, *_ = script.pairs_and_evaluations(run.args, *given)
    gates = asked_gates(run.args.gates if args.gates is None else args.gates, evaluations)
    with held_alone(run.folder / "run.lock", f"{run.folder}: another run is working in this folder; wait for its end"):
        rows = measured(run, evaluations, args.scales)
        # of each scale, from "baseline" on as in the record of a run
        lines: list[dict] = [{"scale": at, "baseline": {}, "final": {}, "delta": {}, "gates": {}} for at in rows]
        for line, asked in itertools.product(lines, evaluations):
            evaluation.add_figures(line, asked, rows[0], rows[line["scale"]])
        for line in lines[1:] if gates else []:
            log.info("gates at scale %g:", line["scale"])
            judge_gates(line, gates)
        chosen = largest(lines)
        write_rows(run.folder / "frontier.jsonl", lines)
        save_figure(plot_frontier(run.folder.name, lines, chosen), run.folder / "frontier.png")
    table, shown = [], [name for name in evaluation.metrics_of(evaluations) if name in LEARNED + LOST]
    for name, line in itertools.product(shown, lines[1:]):
        metric, title = METRICS[name], f"{METRICS[name].title}, {line['scale']:g}"
        before, after = map(metric.read, (line["baseline"], line["final"]))
        table.append(TableRow(title, before, after, line["delta"].get(name), metric.lower_is_better))
    evaluation.print_table(f"{run.folder}, by the scale of its adapter", table, ("base", "scaled"))
    if chosen is not None:
        log.info("the largest scale that passes the gates: %g (export.py --scale %g)", chosen, chosen)
    elif gates:
        log.warning("no scale passes the gates")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: frontier(build_parser().parse_args(argv)), logs=True)


if __name__ == "__main__":
    raise SystemExit(main())
