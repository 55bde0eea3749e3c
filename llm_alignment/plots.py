"""Plots of a run in one style: scores by category before and after, curves over the training steps."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER = "#aaaaaa", "#cc6633"
SERIES = ("#4477aa", "#cc6633", "#228833", "#aa3377", "#66ccee", "#999933")  # one for each run
STYLES = ("-", "--", ":")  # one for each key of a panel

# The panels of the training curves: label of the y axis -> {key of train_log.jsonl: its name}
LOSS = {"loss": {"loss": "training", "nll": "training, NLL alone", "eval_loss": "validation"}}
KL = {"KL to the base, nats per token": {"kl": ""}, "KL coefficient": {"kl_coef": ""}}
REWARDS = {
    "reward: beta x log-ratio to the reference": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "reward margin": {"rewards/margins": ""},
    "share of pairs ranked right": {"rewards/accuracies": ""},
}


def new_figure(width: float, height: float, columns: int, lines: int = 1, sharey: bool = False) -> tuple[Figure, list]:
    """A figure of `width` x `height` inches in letters that read at that size, and its axes, line by line."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams.update({"axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True})
    matplotlib.rcParams["text.parse_math"] = False  # the name of a run may hold a dollar sign
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=sharey)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)  # type: ignore[union-attr, call-arg]
    return figure, list(axes.flat)


def plot_categories(title: str, before: dict | None, after: dict, delta: dict | None = None) -> Figure:
    """The 1-10 score by category, before (if it was measured) and after; the means are in the title. `before` and
    `after`: {"avg", "by_category", "n"}; `delta`: as returned by `paired_delta`."""
    categories = sorted(after["by_category"])
    figure, (axis,) = new_figure(max(7, 1.3 * len(categories) + 2), 5, 1)
    sides = [(before, "before", BEFORE), (after, "after", AFTER)] if before else [(after, "after", AFTER)]
    for place, (summary, label, colour) in enumerate(sides):
        heights = [summary["by_category"].get(category, 0) for category in categories]
        places = [x + 0.4 * (place - (len(sides) - 1) / 2) for x in range(len(categories))]
        axis.bar_label(axis.bar(places, heights, 0.4, label=label, color=colour), fmt="%.1f", fontsize=10)
    axis.grid(axis="x", visible=False)
    axis.set_xticks(range(len(categories)), categories, rotation=20 if len(categories) > 6 else 0)
    axis.set(ylim=(1, 10), ylabel="reward-model score, 1-10")
    title += ": " + " -> ".join(f"{summary['avg']:.2f}" for summary, *_ in sides)
    if delta and delta["mean"] is not None:
        interval = "" if delta["low"] is None else f" [{delta['low']:.2f}, {delta['high']:.2f}]"
        title += f", {delta['mean']:+.2f}{interval}, n = {delta['n']}"
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def with_validation(log: list[dict], record: dict) -> list[dict]:
    """The log of a run with the validation loss before and after training, where its record has them."""
    last = record["kept_step"] or max((entry["step"] for entry in log), default=0)
    ends = ((0, record["baseline"]), (last, record["final"]))
    measured = [{"step": step, "eval_loss": side["val_loss"]} for step, side in ends if "val_loss" in side]
    return sorted([*log, *measured], key=lambda entry: entry["step"])


def plot_curves(title: str, logs: dict[str, list[dict]], panels: dict[str, dict[str, str]]) -> Figure | None:
    """One panel a label over the optimiser steps, of those that have data; None without any. `logs`: the lines of the
    trainer's log by the name of the run; `panels`: as LOSS."""
    logged = {key for log in logs.values() for entry in log for key in entry}
    panels = {ylabel: keys for ylabel, keys in panels.items() if logged & keys.keys()}
    if not panels:
        return None
    figure, axes = new_figure(max(8, 5.5 * len(panels)), 5, len(panels))
    for axis, (ylabel, keys) in zip(axes, panels.items(), strict=True):
        for colour, (run, log) in zip(itertools.cycle(SERIES), logs.items(), strict=False):
            for style, (key, name) in zip(STYLES, keys.items(), strict=False):
                points = [*{entry["step"]: entry[key] for entry in log if key in entry}.items()]
                if points:
                    look: dict[str, Any] = {"color": colour, "label": ", ".join(filter(None, (run, name)))}
                    # of two points, before and after, nobody knows what lies between them
                    look |= {"linestyle": style, "ms": 3} if len(points) > 2 else {"linestyle": "", "ms": 8}
                    axis.plot(*zip(*points, strict=True), marker="o", **look)
        axis.set(xlabel="optimiser step", ylabel=ylabel)
        if any(axis.get_legend_handles_labels()[1]):
            axis.legend(fontsize=9)
    figure.suptitle(title)
    return figure


def save_curves(history: list[dict], folder: Path) -> None:
    """Writes the curves of a run's log that it has: loss.png, kl.png, rewards.png."""
    for name, panels in {"loss": LOSS, "kl": KL, "rewards": REWARDS}.items():
        save_figure(plot_curves("training", {"": history}, panels), folder / f"{name}.png")


def save_figure(figure: Figure | None, path: Path) -> None:
    """Writes a PNG whole or not at all, none of None; without metadata, so that equal plots are equal files."""
    if figure is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        write_atomic(path, buffer.getvalue())
