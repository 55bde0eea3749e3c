"""Plots of many runs: before and after, differences with intervals, curves, seeds, noise."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import PUBLISHED, SCORED, Run
from tables import HEADLINES, KINDS, Spread

from llm_alignment import plots
from llm_alignment.evaluation import METRICS
from llm_alignment.files import read_json, read_records
from llm_alignment.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"logged": "#4477aa", "new": plots.AFTER, "imported": "#228833", "not measured": "#999999"}
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind a number, so that no line strikes it through
LINE = {"arrowstyle": "-", "color": "#bbbbbb"}  # from a point to its name
RING: dict[str, Any] = {"s": 70, "facecolor": "white", "linewidth": 2}
UNITS = {"val_loss": "nats per token", "tatqa": "%"}  # the others are points
Interval = tuple[float, float, float]  # mean, low, high


def colour(run: Run) -> str:
    return COLOURS[run.origin.split(",")[0] if run.measured else "not measured"]


def wrapped(text: str, width: int = 30) -> str:
    """A label in lines of at most `width` characters, so that it stays within the frame."""
    return "\n".join(textwrap.wrap(text, width))


def digits(values: list[float]) -> int:  # decimals of all numbers of one plot
    return 1 if max(map(abs, values), default=0) >= 10 else 2


def draw_pairs(axis: Any, runs: list[Run], pairs: list[tuple[float, float] | None], unit: str) -> None:
    """One line a run: a ring before, a dot after, and both values on the side that has more room."""
    values = [value for pair in pairs if pair for value in pair] or [0.0]
    places, spread = digits(values), (max(values) - min(values)) or 1
    low, high = min(values) - spread / 2, max(values) + spread / 2
    axis.set_xlim((max(low, 0), min(high, 100)) if unit == "%" else (low, high))
    low, high = axis.get_xlim()
    for row, (run, pair) in enumerate(zip(runs, pairs, strict=True)):
        if pair:
            axis.plot(pair, [row, row], color=colour(run), linewidth=2.5, zorder=1)
            axis.scatter(pair[:1], [row], **RING, edgecolor=colour(run), zorder=2)
            axis.scatter(pair[1:], [row], s=70, color=colour(run), zorder=3)
            to_right = high - max(pair) >= min(pair) - low
            value, align, offset = (max(pair), "left", 8) if to_right else (min(pair), "right", -8)
            look = {"ha": align, "va": "center", "textcoords": "offset points", "bbox": PLAIN}
            axis.annotate(f"{pair[0]:.{places}f} -> {pair[1]:.{places}f}", (value, row), (offset, 0), **look)
    name_rows(axis, runs, unit)


def draw_changes(axis: Any, runs: list[Run], changes: Sequence[Interval | None], unit: str = "") -> None:
    """One line a run: the difference and, where low and high differ from it, the 95 % interval."""
    axis.axvline(0, color="#444444", linewidth=1)
    places = digits([change[0] for change in changes if change])
    for row, (run, change) in enumerate(zip(runs, changes, strict=True)):
        if change:
            axis.plot(change[1:], [row, row], color=colour(run), linewidth=3, solid_capstyle="butt")
            axis.scatter(change[:1], [row], s=60, color=colour(run), zorder=2)
            look = {"ha": "center", "textcoords": "offset points", "bbox": PLAIN}
            axis.annotate(f"{change[0]:+.{places}f}", (change[0], row), (0, 8), **look)
    axis.margins(x=0.15)
    name_rows(axis, runs, "percentage points" if unit == "%" else unit)


def name_rows(axis: Any, runs: list[Run], unit: str) -> None:
    axis.set_yticks(range(len(runs)), [wrapped(run.label) for run in runs])
    axis.set_ylim(len(runs) - 0.4, -0.7)
    axis.set_xlabel(unit)
    axis.grid(axis="y", visible=False)


def finish(figure: Figure, title: str, runs: list[Run]) -> Figure:
    """Adds the title, and what the ring, the dot and the colours in use stand for."""
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"marker": "o", "markersize": 8, "linestyle": "", "color": "#444444"}
    used, after = {colour(run) for run in runs}, Line2D([], [], label="after / difference", **dot)
    marks = [Line2D([], [], markerfacecolor="white", label="before", **dot), after]
    marks += [Line2D([], [], color=c, linewidth=5, label=name) for name, c in COLOURS.items() if c in used]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.suptitle(title, fontsize=15)
    return figure


def plot_metric(title: str, metric: str, runs: list[Run]) -> Figure:
    """Before and after of runs with this metric, the difference beside it, and the 1-10 score's of the new runs."""
    key, unit = "val_loss_row_mean" if metric == "val_loss" else metric, UNITS.get(metric, "points")
    intervals, is_scored = [interval_of(run.delta.get(key)) for run in runs], metric in SCORED
    has_intervals, on_scale = any(intervals), ",\npublished scale" * is_scored
    unsure: list[Interval] = [(run.changes[metric],) * 3 for run in runs]
    changes = [(not is_scored and known) or change for known, change in zip(intervals, unsure, strict=True)]
    panels = 3 if has_intervals and is_scored else 2
    figure, axes = new_figure(4.2 + 3.4 * panels, 2.2 + 0.55 * len(runs), panels, sharey=True)
    pairs = [(run.before[metric], run.after[metric]) if metric in run.after else None for run in runs]
    draw_pairs(axes[0], runs, pairs, unit)
    draw_changes(axes[1], runs, changes, unit)
    axes[0].set_title(wrapped(PUBLISHED[metric].title, 28) + on_scale)
    axes[1].set_title(f"Difference{on_scale}{', 95 % interval' * (has_intervals and not is_scored)}")
    if panels == 3:
        draw_changes(axes[2], runs, intervals, "points")
        axes[2].set_title("Difference, 1-10 scale,\n95 % interval (new runs)")
    return finish(figure, title, runs)


def interval_of(delta: dict | None) -> Interval | None:
    known: Any = delta or {}
    mean, low, high = (known.get(key) for key in ("mean", "low", "high"))
    return None if mean is None else (mean, mean, mean) if low is None else (mean, low, high)


def plot_types(title: str, runs: list[Run]) -> Figure:
    """TAT-QA before and after by answer type, one panel a type, of runs that have them."""
    figure, axes = new_figure(16, 2.2 + 0.6 * len(runs), len(KINDS), sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        draw_pairs(axis, runs, [run.types.get(kind) for run in runs], "%")
        axis.set_title(kind)
    return finish(figure, title, runs)


def plot_trade_off(title: str, runs: list[Run]) -> Figure | None:
    """What SFT gained (validation loss) against what it did to MT-Bench; the new runs also on the 1-10 scale."""
    runs = [run for run in runs if "val_loss" in run.changes and "mtbench" in run.changes]
    panels: dict[str, list[tuple[Run, Interval]]] = {}
    if any(run.is_logged for run in runs):
        panels["MT-Bench difference, published scale"] = [(run, (run.changes["mtbench"],) * 3) for run in runs]
    if scored := [(run, interval) for run in runs if (interval := interval_of(run.delta.get("mtbench")))]:
        panels["MT-Bench difference, 1-10 scale, 95 % interval"] = scored
    if not panels:
        return None
    figure, axes = new_figure(9.5 * len(panels), 7, len(panels))
    for axis, (ylabel, points) in zip(axes, panels.items(), strict=True):
        axis.axhline(0, color="#444444", linewidth=1)
        labels: dict[tuple[float, float], list[str]] = {}  # a run and its exact repetition are one point
        for run, (change, *ends) in points:
            gain = run.changes["val_loss"]
            axis.plot([gain, gain], ends, color=colour(run), linewidth=2)
            axis.scatter([gain], [change], s=80, color=colour(run), zorder=3)
            labels.setdefault((gain, change), []).append(run.label)
        axis.margins(x=0.1, y=0.12)
        (low, high), height = axis.get_ylim(), -1.0
        for place in sorted(labels, key=lambda place: place[1]):  # the names stand beside the frame
            height = max((place[1] - low) / (high - low), height + 0.08)  # no name on another one
            look = {"textcoords": "axes fraction", "va": "center", "arrowprops": LINE}
            axis.annotate(wrapped(", ".join(labels[place]), 26), place, (1.03, height), **look)
        axis.set(xlabel="validation loss difference, nats per token (further left is better)", ylabel=ylabel)
    figure.suptitle(title, fontsize=15)
    return figure


def plot_categories(run: Run) -> Figure | None:
    """MT-Bench by category before and after."""
    before, after = (run.source[phase].get("mtbench") or {} for phase in ("baseline", "final"))
    if not (before.get("by_category") and after.get("by_category")):
        return None
    return plots.plot_categories(wrapped(f"MT-Bench, {run.label}", 70), before, after, run.delta.get("mtbench"))


def plot_curves(title: str, runs: list[Run]) -> Figure | None:
    """Training curves from the train_log.jsonl of the runs' output folders, where those still hold these runs."""
    logs = {}
    for run in runs:
        log_file, run_file = (Path(run.source["output_dir"]) / name for name in ("train_log.jsonl", "run.json"))
        is_there = os.path.isfile(log_file) and os.path.isfile(run_file)  # no error for a name that is too long
        if is_there and read_json(run_file, f"run {run.name}").get("ts") == run.source["ts"]:
            logs[wrapped(run.label, 40)] = plots.with_validation(read_records(log_file), run.source)
    return plots.plot_curves(title, logs, plots.LOSS | plots.KL | plots.REWARDS)


def plot_seeds(title: str, runs: list[Run]) -> Figure | None:
    """Runs of several seeds: each seed's difference as a ring, their mean with its interval, one panel a metric."""
    runs = [run for run in runs if run.members]
    if not (keys := [key for key in HEADLINES if any(interval_of(run.delta.get(key)) for run in runs)]):
        return None
    columns, lines = min(4, len(keys)), -(-len(keys) // 4)
    figure, axes = new_figure(3 + 3.6 * columns, 1.2 + (1.4 + 0.6 * len(runs)) * lines, columns, lines, sharey=True)
    for axis, key in zip(axes, keys, strict=False):
        draw_changes(axis, runs, [interval_of(run.delta.get(key)) for run in runs])
        for row, run in enumerate(runs):
            values = [member.delta[key]["mean"] for member in run.members if key in run.delta]
            axis.scatter(values, [row + 0.2] * len(values), s=40, facecolor="white", edgecolor="#444444", zorder=3)
        axis.set_title(wrapped(METRICS[key].title, 34))
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    figure.suptitle(f"{title}: each seed (ring), mean and 95 % interval", fontsize=15)
    return figure


def plot_noise(title: str, spreads: list[Spread]) -> Figure:
    """Published changes in units of what two measurements of one base differ by; twice that is shaded."""
    figure, axes = new_figure(13, 1.8 + 0.75 * len(spreads), 2, sharey=True)
    for row, spread in enumerate(spreads):
        mean = sum(spread.baselines) / len(spread.baselines)
        values = [(value - mean) / spread.of_differences for value in spread.baselines]
        axes[0].scatter(values, [row] * len(values), **RING, edgecolor=COLOURS["logged"])
        for run in (run for run in spread.runs if spread.metric in run.changes):
            shade = COLOURS["not measured" if spread.metric in run.in_noise else "new"]
            axes[1].scatter([run.changes[spread.metric] / spread.of_differences], [row], s=70, color=shade)
    for axis in axes:
        axis.axvline(0, color="#444444", linewidth=1)
        axis.grid(axis="y", visible=False)
    axes[1].axvspan(-2, 2, color="#eeeeee", zorder=0)
    axes[0].set_title("Baselines of one base,\nminus their mean")
    axes[1].set_title("Published changes\n(grey: within twice the noise)")
    titles = [wrapped(f"{spread.title}: {spread.of_differences:.2f}") for spread in spreads]
    axes[0].set_yticks(range(len(spreads)), titles)
    axes[0].set_ylim(len(spreads) - 0.5, -0.5)
    figure.supxlabel("in standard deviations of a difference with nothing changed (the number after each name)")
    figure.suptitle(title, fontsize=15)
    return figure
