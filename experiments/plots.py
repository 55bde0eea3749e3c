"""Plots of runs: before and after, differences with intervals, curves, categories, seeds, noise."""

from __future__ import annotations

import math
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from noise import Spread
from records import DEMO, PUBLISHED, SCORED, Run, get_nested
from tables import number, signed

from llm_alignment.evaluation import METRICS
from llm_alignment.files import read_records
from llm_alignment.model_files import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"logged": "#4477aa", "new": "#cc6633", "imported": "#228833", "not measured": "#999999"}


def colour(run: Run) -> str:
    return COLOURS[run.origin.split(",")[0] if run.measured else "not measured"]


def wrapped(text: str, width: int = 30) -> str:
    """A label in lines of at most `width` characters, so that it stays within the frame."""
    return "\n".join(textwrap.wrap(text, width))


def new_figure(
    width: float, height: float, columns: int, lines: int = 1, *, sharey: bool = False
) -> tuple[Figure, list]:
    """A figure of `width` x `height` inches in letters that read at that size, and its axes, side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams["text.parse_math"] = False  # the name of a run may hold a dollar sign
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=sharey)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    return figure, list(axes.flat)


def draw_pairs(axis, runs: list[Run], pairs: list[tuple[float, float] | None]) -> None:
    """One line a run: a ring before, a dot after, both with their values."""
    for row, (run, pair) in enumerate(zip(runs, pairs, strict=True)):
        if pair is None:
            continue
        before, after = pair
        axis.plot([before, after], [row, row], color=colour(run), linewidth=2.5, zorder=1)
        axis.scatter([before], [row], s=70, facecolor="white", edgecolor=colour(run), linewidth=2, zorder=2)
        axis.scatter([after], [row], s=70, color=colour(run), zorder=3)
        left, right = sorted([(before, "before"), (after, "after")])
        for (value, _), align, offset in ((left, "right", -8), (right, "left", 8)):
            axis.annotate(
                number(round(value, 2)), (value, row), (offset, 0), textcoords="offset points", ha=align, va="center"
            )
    axis.margins(x=0.34)
    name_rows(axis, runs)


def draw_changes(axis, runs: list[Run], changes: list[tuple[float, float, float] | None]) -> None:
    """One line a run: the difference and, where low and high differ from it, the 95 % interval."""
    axis.axvline(0, color="#444444", linewidth=1)
    for row, (run, change) in enumerate(zip(runs, changes, strict=True)):
        if change is None:
            continue
        mean, low, high = change
        axis.plot([low, high], [row, row], color=colour(run), linewidth=3, solid_capstyle="butt")
        axis.scatter([mean], [row], s=60, color=colour(run), zorder=2)
        axis.annotate(signed(round(mean, 2)), (mean, row), (0, 8), textcoords="offset points", ha="center")
    axis.margins(x=0.15)
    name_rows(axis, runs)


def name_rows(axis, runs: list[Run]) -> None:
    axis.set_yticks(range(len(runs)), [wrapped(run.label) for run in runs])
    axis.set_ylim(len(runs) - 0.4, -0.7)
    axis.grid(axis="x", color="#dddddd")
    axis.set_axisbelow(True)


def colour_key(figure: Figure, runs: list[Run]) -> None:
    """Says what the ring, the dot and the colours in use stand for."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D(
            [], [], marker="o", markersize=8, linestyle="", markerfacecolor="white", color="#444444", label="before"
        ),
        Line2D([], [], marker="o", markersize=8, linestyle="", color="#444444", label="after / difference"),
    ]
    used = {colour(run) for run in runs}
    marks += [Line2D([], [], color=c, linewidth=5, label=name) for name, c in COLOURS.items() if c in used]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)


def plot_metric(title: str, metric: str, runs: list[Run]) -> Figure | None:
    """Before and after by run, the difference beside it, and the 1-10 score's difference of the new runs."""
    runs = [run for run in runs if metric in run.changes]
    if not runs:
        return None
    key = "val_loss_row_mean" if metric == "val_loss" else metric
    intervals = [run.delta.get(key) for run in runs]
    changes: list[tuple[float, float, float] | None] = [(run.changes[metric],) * 3 for run in runs]
    panels = 2
    if metric in SCORED:
        panels += any(intervals)
    else:
        changes = [interval_of(delta) or change for delta, change in zip(intervals, changes, strict=True)]
    figure, axes = new_figure(4.2 + 3.4 * panels, 1.8 + 0.55 * len(runs), panels, sharey=True)
    draw_pairs(
        axes[0], runs, [(run.before[metric], run.after[metric]) if metric in run.after else None for run in runs]
    )
    draw_changes(axes[1], runs, changes)
    on_scale = ",\npublished scale" if metric in SCORED else ""
    axes[0].set_title(wrapped(PUBLISHED[metric][0], 28) + on_scale)
    axes[1].set_title(f"Difference{on_scale}" + (", 95 % interval" if metric not in SCORED and any(intervals) else ""))
    if panels == 3:
        draw_changes(axes[2], runs, [interval_of(delta) for delta in intervals])
        axes[2].set_title("Difference, 1-10 scale,\n95 % interval (new runs)")
    figure.suptitle(title, fontsize=15)
    colour_key(figure, runs)
    return figure


def interval_of(delta: dict | None) -> tuple[float, float, float] | None:
    if not delta or delta["mean"] is None:
        return None
    mean, low, high = delta["mean"], delta["low"], delta["high"]
    return (mean, mean, mean) if low is None else (mean, low, high)


def plot_types(runs: list[Run]) -> Figure | None:
    """TAT-QA before and after by answer type, one panel a type."""
    runs = [run for run in runs if run.types]
    if not runs:
        return None
    kinds = ["arithmetic", "count", "multi-span", "span"]
    figure, axes = new_figure(16, 1.8 + 0.6 * len(runs), len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        draw_pairs(axis, runs, [run.types.get(kind) for run in runs])
        axis.set_title(f"{kind}, %")
    figure.suptitle("TAT-QA by answer type", fontsize=15)
    colour_key(figure, runs)
    return figure


def plot_trade_off(runs: list[Run]) -> Figure | None:
    """What SFT gained (validation loss) against what it did to MT-Bench; the new runs also on the 1-10 scale."""
    runs = [run for run in runs if "val_loss" in run.changes and "mtbench" in run.changes]
    if not runs:
        return None
    scored = [run for run in runs if interval_of(run.delta.get("mtbench"))]
    figure, axes = new_figure(16 if scored else 11, 7.5, 2 if scored else 1)
    # the demo's miniature changes by whole points of loss: beside it the real models would be one spot
    points = [(run, run.changes["mtbench"], None) for run in runs if run.model != DEMO]
    draw_trade_off(axes[0], points, "MT-Bench difference, published scale")
    if scored:
        changes = [(run, *interval_of(run.delta["mtbench"])) for run in scored]
        points = [(run, mean, (low, high)) for run, mean, low, high in changes]
        draw_trade_off(axes[1], points, "MT-Bench difference, 1-10 scale, 95 % interval (new runs)")
    figure.suptitle("SFT: what the new data gained against what MT-Bench lost", fontsize=15)
    return figure


def draw_trade_off(axis, points: list[tuple[Run, float, tuple[float, float] | None]], label: str) -> None:
    axis.axhline(0, color="#444444", linewidth=1)
    labels: dict[tuple[float, float], list[str]] = {}  # a run and its exact repetition are one point
    for run, change, interval in points:
        gain = run.changes["val_loss"]
        if interval:
            axis.plot([gain, gain], interval, color=colour(run), linewidth=2)
        axis.scatter([gain], [change], s=80, color=colour(run), zorder=2)
        labels.setdefault((gain, change), []).append(run.label)
    axis.margins(x=0.2, y=0.12)
    axis.autoscale_view()
    label_points(axis, labels)
    axis.set_xlabel("validation loss difference (further left is better)")
    axis.set_ylabel(label)
    axis.grid(color="#dddddd")
    axis.set_axisbelow(True)


def label_points(axis, labels: dict[tuple[float, float], list[str]]) -> None:
    """Writes the names beside their points: towards the middle, so inside the frame, and not on one another."""
    taken: list[tuple[float, float]] = []
    middle = sum(axis.get_xlim()) / 2
    for place, names in sorted(labels.items(), key=lambda item: item[0][1]):
        text = wrapped(", ".join(names), 26)
        x, y = axis.transData.transform(place)
        rise, height = 6, 18 * (text.count("\n") + 1)
        while any(abs(x - other_x) < 220 and -height < y + rise - other_y < 18 for other_x, other_y in taken):
            rise += 6
        taken.append((x, y + rise))
        align, shift = ("left", 9) if place[0] <= middle else ("right", -9)
        axis.annotate(text, place, (shift, rise), textcoords="offset pixels", ha=align)


def plot_categories(run: Run) -> Figure | None:
    """MT-Bench by category before and after, as a radar and as bars, on the 1-10 scale."""
    before, after = (get_nested(run.source[phase], ("mtbench", "by_category")) for phase in ("baseline", "final"))
    if not (before and after and before.keys() == after.keys()):
        return None
    names = list(after)
    figure, (left, bars) = new_figure(15, 6.5, 2)
    left.remove()
    radar = figure.add_subplot(1, 2, 1, polar=True)
    angles = [2 * math.pi * place / len(names) for place in range(len(names))]
    for shift, label, scores, shade in ((-0.2, "before", before, "#bbbbbb"), (0.2, "after", after, COLOURS["new"])):
        values = [scores[name] for name in names]
        radar.plot([*angles, angles[0]], [*values, values[0]], color=shade, linewidth=2.5, label=label)
        drawn = bars.bar([place + shift for place in range(len(names))], values, 0.4, color=shade, label=label)
        bars.bar_label(drawn, fmt="%.1f", fontsize=10)
    radar.set_xticks(angles, names)
    radar.set_ylim(1, 10)
    radar.tick_params(axis="x", pad=14)
    bars.set_xticks(range(len(names)), names, rotation=30, ha="right")
    bars.set_ylim(1, 10)
    bars.set_ylabel("score, 1-10")
    figure.suptitle(wrapped(f"MT-Bench by category: {run.label}", 90), fontsize=15)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


CURVES = {"loss": "loss", "nll": "NLL", "kl": "KL to the base", "rewards/margins": "reward margin"}


def plot_curves(title: str, runs: list[Run]) -> Figure | None:
    """Training curves from the train_log.jsonl of the runs' output folders, where those still hold these runs."""
    logs = {}
    for run in runs:
        log_file, run_file = (Path(run.source["output_dir"]) / name for name in ("train_log.jsonl", "run.json"))
        if not (os.path.isfile(log_file) and os.path.isfile(run_file)):  # no error for a name that is too long
            continue
        if read_json(run_file, f"run {run.name}").get("ts") == run.source["ts"]:
            logs[wrapped(run.label, 40)] = read_records(log_file)
    keys = [key for key in CURVES if any(key in line for lines in logs.values() for line in lines)]
    if not keys:
        return None
    figure, axes = new_figure(max(9, 6.5 * len(keys)), 6, len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for label, lines in logs.items():
            points = [line for line in lines if key in line]
            steps, values = [line["step"] for line in points], [line[key] for line in points]
            axis.plot(steps, values, marker="o", markersize=4, label=label)
        axis.set_title(CURVES[key])
        axis.set_xlabel("optimiser step")
        axis.grid(color="#dddddd")
    figure.suptitle(title, fontsize=15)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return figure


HEADLINES = ("val_loss", "tatqa_em", "reward_accuracy", "mtbench", "instruct", "finance_instruct", "reddit")


def plot_seeds(runs: list[Run]) -> Figure | None:
    """Runs of several seeds: each seed's difference as a ring, their mean with its interval, one panel a metric."""
    keys = [key for key in HEADLINES if any(interval_of(run.delta.get(key)) for run in runs)]
    if not keys:
        return None
    columns = min(4, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = new_figure(3 + 3.6 * columns, 1.2 + (1.4 + 0.6 * len(runs)) * lines, columns, lines, sharey=True)
    for axis, key in zip(axes, keys, strict=False):
        draw_changes(axis, runs, [interval_of(run.delta.get(key)) for run in runs])
        for row, run in enumerate(runs):
            values = [member.delta[key]["mean"] for member in run.members if key in run.delta]
            axis.scatter(values, [row + 0.2] * len(values), s=40, facecolor="white", edgecolor="#444444", zorder=3)
        axis.set_title(wrapped(METRICS[key].title, 26))
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    figure.suptitle("Differences over seeds: each seed (ring), mean and 95 % interval", fontsize=15)
    return figure


def plot_noise(spreads: list[Spread]) -> Figure | None:
    """Published changes in units of what two measurements of one base differ by; twice that is shaded."""
    if not spreads:
        return None
    figure, axes = new_figure(13, 1.8 + 0.75 * len(spreads), 2, sharey=True)
    for row, spread in enumerate(spreads):
        mean = sum(spread.baselines) / len(spread.baselines)
        values = [(value - mean) / spread.of_differences for value in spread.baselines]
        axes[0].scatter(values, [row] * len(values), s=70, facecolor="white", edgecolor=COLOURS["logged"], linewidth=2)
        changes = [(run, run.changes[spread.metric]) for run in spread.runs if spread.metric in run.changes]
        for run, change in changes:
            shade = COLOURS["not measured"] if spread.metric in run.in_noise else COLOURS["new"]
            axes[1].scatter([change / spread.of_differences], [row], s=70, color=shade)
    for axis in axes:
        axis.axvline(0, color="#444444", linewidth=1)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
    axes[1].axvspan(-2, 2, color="#eeeeee", zorder=0)
    axes[0].set_title("Baselines of one base,\nminus their mean")
    axes[1].set_title("Published changes\n(grey: within twice the noise)")
    titles = [wrapped(f"{spread.title}: {spread.of_differences:.2f}", 30) for spread in spreads]
    axes[0].set_yticks(range(len(spreads)), titles)
    axes[0].set_ylim(len(spreads) - 0.5, -0.5)
    figure.supxlabel("in standard deviations of a difference with nothing changed (the number after each name)")
    figure.suptitle("Noise of the published baselines", fontsize=15)
    return figure
