"""One thing measured before and after training: rows, table, plots."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.files import SkippedRows, read_results, write_atomic, write_json, write_rows
from llm_alignment.models import adapter_off, adapter_sha256, model_fingerprint, on_main_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("llm_alignment")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One thing measured before and after training; `name` is its key in the record and the stem of its files.

    `answer(model, tokenizer, path=, fingerprint=, use_cache=, renew=)` gives a row per question,
    `compare(before, after)` the record's deltas by key. `lines` are those of the table: (title, value of a summary, key of the delta or None).
    """

    name: str
    size: int
    answer: Callable[..., list[dict]]
    summarise: Callable[[list[dict]], dict]
    compare: Callable[[list[dict], list[dict]], dict[str, dict]]
    lines: list[tuple[str, Callable[[dict], float], str | None]]


def measure(
    args: argparse.Namespace,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluations: list[Evaluation],
    folder: Path,
    stage: str,
    *,
    with_adapter: bool,
) -> dict[str, list[dict]]:
    """The rows of every evaluation by name, kept in NAME_STAGE.jsonl; without the adapter it is the base that answers.

    Baselines are shared with other runs by the cache. Under several processes the main one answers.
    """
    with contextlib.nullcontext() if with_adapter else adapter_off(model):
        adapter = adapter_sha256(model) if with_adapter else "none"
        fingerprint = model_fingerprint(args, adapter)
        return on_main_process(
            lambda: {
                evaluation.name: evaluation.answer(
                    model,
                    tokenizer,
                    path=folder / f"{evaluation.name}_{stage}.jsonl",
                    fingerprint=fingerprint,
                    use_cache=stage == "baseline" and not args.no_baseline_cache,
                    renew=True,
                )
                for evaluation in evaluations
            }
        )


def stored_rows(folder: Path, name: str, evaluations: list[Evaluation]) -> dict[str, list[dict]]:
    """The rows that a measurement left in `folder`, by evaluation, sorted by id."""
    rows = {}
    for evaluation in evaluations:
        path = folder / f"{evaluation.name}_{name}.jsonl"
        if path.exists():
            skipped = SkippedRows()
            _, stored = read_results(path, skipped)
            skipped.report(f"damaged lines of {path}")
            rows[evaluation.name] = sorted(stored, key=lambda row: str(row["question_id"]))
    return rows


def report(
    record: dict,
    folder: Path,
    evaluations: list[Evaluation],
    before: dict[str, list[dict]],
    after: dict[str, list[dict]],
) -> None:
    """Fills the record's baseline, final and delta; writes metrics.json and the plots; prints the table."""
    baseline, final, delta = record["baseline"], record["final"], record["delta"]
    table = []
    for evaluation in evaluations:
        name = evaluation.name
        if name in before:
            baseline[name] = evaluation.summarise(before[name])
        if name in after:
            final[name] = evaluation.summarise(after[name])
        if name in before and name in after:
            delta |= evaluation.compare(before[name], after[name])
            if "by_category" in final[name]:
                plot_categories(baseline[name], final[name], folder / f"{name}.png")
        for title, value, key in evaluation.lines:
            values = [value(summaries[name]) if name in summaries else None for summaries in (baseline, final)]
            table.append((title, *values, delta.get(key)))
            for kind in (delta.get(key) or {}).get("by_type", {}):
                values = [value(summaries[name]["by_type"][kind]) for summaries in (baseline, final)]
                table.append((f"  {kind}", *values, delta[key]["by_type"][kind]))
    write_json(folder / "metrics.json", {"baseline": baseline, "final": final, "delta": delta})
    print_table(str(folder), table)
    log.info("seconds: %s", ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in record["runtime_s"].items()))


def save_answers(args: argparse.Namespace, answers: dict[str, list[dict]]) -> None:
    """Writes TAT-QA's rows, as --eval_save_json X.jsonl asks: X_baseline.jsonl and, after training, X_post.jsonl."""
    path = Path(args.eval_save_json)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stage, name in (("baseline", "baseline"), ("final", "post")):
        if answers[stage]:
            write_rows(path.with_name(f"{path.stem}_{name}.jsonl"), answers[stage])


def print_table(title: str, rows: list[tuple[str, float | None, float | None, dict | None]]) -> None:
    """Prints (metric, baseline, final, delta) rows; `delta` as from `paired_delta`. Plain ASCII, at most 120 columns."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:#.4g}".rstrip(".")

    rules = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one line under the heading
    table = Table(title=title, title_style="", title_justify="left", box=rules, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("baseline", "final", "difference [95 % interval]", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric, baseline, final, delta in rows:
        cells = [metric, number(baseline), number(final)]
        if delta and delta["n"]:
            cells.append(f"{delta['mean']:+#.4g} [{number(delta['low'])}, {number(delta['high'])}]")
            cells.append(f"{delta['p']:.2g}")
            cells.append("" if delta["p"] <= 0.05 else "no detectable change")
        table.add_row(*cells)
    Console(width=120, color_system=None, legacy_windows=False, markup=False, highlight=False).print(table)


def plot_categories(before_summary: dict | None, after_summary: dict, path: Path) -> None:
    """Draws the 1-10 score by category, before (if it was measured) and after, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    categories = sorted(after_summary["by_category"])
    figure, axes = pyplot.subplots(figsize=(max(6, 1.1 * len(categories) + 2), 4), layout="constrained")
    summaries = {"before": before_summary, "after": after_summary} if before_summary else {"after": after_summary}
    for shift, (label, summary) in zip((-0.2, 0.2), summaries.items(), strict=False):
        heights = [summary["by_category"].get(category, 0) for category in categories]
        bars = axes.bar([place + shift for place in range(len(categories))], heights, 0.4, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(categories)), categories)
    axes.set_ylim(1, 10.5)
    axes.set_ylabel("reward-model score, 1-10")
    axes.set_title(", ".join(f"{label} {summary['avg']:.2f}" for label, summary in summaries.items()))
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    pyplot.close(figure)
    write_atomic(path, picture.getvalue())


def plot_curves(history: list[dict], panels: dict[str, list[str]], path: Path) -> None:
    """A PNG with one panel per title over the training steps; `history` is the trainer's log, `panels` its keys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=key)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG under a temporary name and renames it; without metadata, so that equal plots are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
