"""What is measured before and after training: the one runner of rows, the table, plots, gates."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_alignment import flags
from llm_alignment.endings import NotFiniteError, to_run_log
from llm_alignment.files import InputError, SkippedRows, log, write_json, write_rows
from llm_alignment.health import HEALTH, compare_health, summarise_health
from llm_alignment.plots import plot_categories, save_figure
from llm_alignment.processes import main_process, on_main_process, shared_rounds
from llm_alignment.results import ResultFile, baseline_cache, read_results
from llm_alignment.stats import ENOUGH, excluded, holm, too_few_changed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = dict[str, list[dict]]  # of evaluations, by name

# Evaluations with a file of rows (NAME_baseline.jsonl, NAME_final.jsonl): name -> title
EVALUATIONS = {
    "validation": "validation",
    "validation_full": "whole validation split",
    "drift": "drift",
    "retention": "retention",
    "own_drift": "drift on the base's own answers",
    "tatqa": "TAT-QA",
    "held_out": "held-out pairs",
    "mtbench": "MT-Bench",
    "instruct": "instructions",
    "finance_instruct": "Finance-Instruct",
    "reddit": "Reddit replies",
}
ANSWERED = ("tatqa", "retention", "mtbench", "instruct", "finance_instruct", "reddit")  # in texts, so they have health
WHEN = {"_baseline": ", before training", "_final": ", after training"}
SCORED = ("mtbench", "instruct", "finance_instruct", "reddit")  # by the reward model

ENOUGH_ITEMS = 40  # with fewer, an interval of skewed differences is too narrow to judge by
REACH = 1.96 + 1.28  # standard errors between mean and gate that decide in 90 % of repeats: an estimate may be wrong


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure: a record's `baseline` and `final` hold it at `keys` (without them there is a difference alone), its
    `delta` under the metric's name. The title ends with the unit where it has one."""

    title: str
    keys: tuple[str, ...] = ()
    lower_is_better: bool = False
    of: str = ""  # the evaluation, where the first key does not name it
    has_delta: bool = True  # False: only the figures themselves are reported

    def read(self, summaries: dict) -> float | None:
        """The figure in a record's `baseline` or `final`; None where it was not measured."""
        start: Any = summaries if self.keys else None
        return functools.reduce(lambda value, key: (value or {}).get(key), self.keys, start)


SCORES = {  # of an evaluation that the reward model scores: suffix of the metric's name -> title, key, which ones
    "": ("1-10", "avg", SCORED),
    "_equal_length": ("at equal length", "", SCORED),
    "_raw": ("raw reward", "raw_mean", SCORED),
    "_published": ("published scale", "avg_logged", SCORED),
    "_success": ("7 or more, %", "success_rate", ("instruct", "finance_instruct")),
    "_checks": ("checks passed, %", "check_rate", ("instruct",)),
    "_length": ("answer tokens", "answer_tokens", SCORED),
}
# Every metric that a run can report, in the order of the tables. A metric named like its evaluation is the main one.
METRICS = {
    "val_loss": Metric("validation loss", ("val_loss",), True, "validation"),
    "val_loss_row_mean": Metric("validation loss, mean of rows", ("val_loss_row_mean",), True, "validation"),
    "ppl": Metric("perplexity", ("ppl",), True, "validation"),
    "drift": Metric("drift, KL from the base", ("drift",), lower_is_better=True),
    "retention": Metric("retention, % right", ("retention", "right")),
    "own_drift": Metric("drift on the base's own answers", ("own_drift",), lower_is_better=True),
    "tatqa": Metric("TAT-QA, published metric, %", ("tatqa", "em_like")),
    "tatqa_em": Metric("TAT-QA, official EM, %", ("tatqa", "em")),
    "tatqa_f1": Metric("TAT-QA, official F1, %", ("tatqa", "f1")),
    "reward_accuracy": Metric("held-out pairs, accuracy, %", ("held_out", "accuracy")),
    "reward_margin": Metric("held-out pairs, reward margin", ("held_out", "margin")),
    "chosen_log_prob": Metric("held-out pairs, chosen log-prob.", ("held_out", "chosen_log_prob")),
    "margin_by_length": Metric(
        "held-out pairs, margin by length, r", ("held_out", "margin_by_length"), has_delta=False
    ),
}
for name, (suffix, (title, key, names)) in itertools.product(SCORED, SCORES.items()):
    if name in names:
        keys, has_delta = (name, key) if key else (), suffix != "_published"
        METRICS[name + suffix] = Metric(f"{EVALUATIONS[name]}, {title}", keys, of=name, has_delta=has_delta)
for name, kind in itertools.product(ANSWERED, HEALTH):
    title = f"{EVALUATIONS[name]}, {kind.replace('_', ' ')}, %"
    METRICS[f"{name}_{kind}"] = Metric(title, ("health", name, kind), True, name)
HEADLINE = {
    "val_loss", "ppl", "drift", "retention", "own_drift", "tatqa", "tatqa_em", "reward_accuracy", "reward_margin",
    "chosen_log_prob", "margin_by_length", "mtbench", "instruct", "instruct_checks", "finance_instruct", "reddit",
}  # fmt: skip
SIGNS = {"drift", "own_drift", "chosen_log_prob"}  # of what may be lost, and not a loss themselves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, and how: `measure` does the rest (files, cache, processes, resuming after a kill). `items`
    have a "question_id" each. `read(model, tokenizer, items)` gives the row of each item of a batch, and `grade(rows)`
    in the main process what is stored of them. `summarise(rows)` is what the record's `baseline` and `final` get,
    `compare(before, after)` what its `delta` gets: a difference for each name of METRICS."""

    name: str  # a key of EVALUATIONS for what is reported, and the stem of its files
    items: Sequence[dict]
    read: Callable[[Any, Any, list[dict]], Iterable[dict]]
    grade: Callable[[list[dict]], list[dict]] = list
    settings: dict = dataclasses.field(default_factory=dict)  # what the rows depend on besides the model
    # Batches are the same in every run and read as a whole: a resumed evaluation has the bits of an uninterrupted one.
    unit: str = "question_id"  # neighbouring items with one value of this key are read together
    order: Callable[[dict], Any] = lambda item: 0  # a unit's place, by its first item
    rows_at_once: Callable[[PreTrainedModel], int] = lambda model: 1
    of_base: Callable[[dict], dict] | None = None  # an item's row of the base where it is known without the model
    is_cached: bool = True  # rows of the base are kept for later runs; not those that are sampled
    summarise: Callable[[list[dict]], dict] = lambda rows: {}
    compare: Callable[[list[dict], list[dict]], dict[str, dict]] = lambda before, after: {}
    # items with a reference answer: (question_id, prompt as the model reads it or as turns, answer, its context)
    references: Sequence[tuple[str | int, str | list[dict], str, str | int]] = ()
    tokens: Callable[[PreTrainedTokenizerBase], int] = lambda tokenizer: 0  # that go through a trained model, at most


def pair_rows(before: Iterable[dict], after: Iterable[dict]) -> list[tuple[dict, dict]]:
    """The rows of both sides by question_id, in the order of `after`; an id on one side alone is left out. Raises
    InputError when no id is on both sides."""
    by_id = {row["question_id"]: row for row in before}
    pairs = [(by_id[row["question_id"]], row) for row in after if row["question_id"] in by_id]
    if not pairs:
        raise InputError("the two evaluations have no question in common; compare files of one question set")
    return pairs


def values_of(pairs: list[tuple[dict, dict]], value: Callable[[dict], Any]) -> tuple[list, list]:
    """A figure of the rows before and of the rows after, in the order of `pairs`."""
    return [value(old) for old, _ in pairs], [value(new) for _, new in pairs]


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluations: list[Evaluation],
    place: tuple[Path, str],
    *,
    fingerprint: dict,
    with_adapter: bool,
    use_cache: bool = False,
    measured_as: str = "",
) -> Rows:
    """The rows of every evaluation by name; every process gets them. Without the adapter the base answers. `place`: a
    folder and a stage; the rows are kept in folder/NAME_STAGE.jsonl, or, without a stage, NAME.jsonl, which must not
    hold another evaluation. `fingerprint`: of the base. With `use_cache` rows of the base are shared with other runs.
    `measured_as`: an earlier stage; its rows of evaluations that are the same, by the same adapter, are taken."""
    from llm_alignment.adapters import adapter_off, adapter_sha256

    folder, stage = place
    rows = {}
    with contextlib.nullcontext() if with_adapter else adapter_off(model):
        whole = {**fingerprint, "adapter": adapter_sha256(model) if with_adapter else "none"}
        for each in evaluations:
            path, earlier = (folder / f"{each.name}{'_' * bool(at)}{at}.jsonl" for at in (stage, measured_as))
            cache = earlier if measured_as and earlier.exists() else None
            if use_cache and each.is_cached and not with_adapter:
                cache = baseline_cache({**whole, **each.settings})
            how: Any = {"fingerprint": whole, "cache": cache, "renew": bool(stage)}
            rows[each.name] = read_items(each, lambda: model, tokenizer, path, **how)
    return rows


def read_items(
    evaluation: Evaluation,
    get_model: Callable[[], PreTrainedModel | PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    fingerprint: dict,
    cache: Path | None = None,
    renew: bool = True,
) -> list[dict]:
    """The rows of an evaluation's items, kept in `path` and taken from `cache` (see ResultFile); what is missing is
    read, by `get_model()`. All processes call this: they share the batches, the main one writes."""
    import torch
    from tqdm import tqdm

    from llm_alignment.models import evaluating

    fingerprint = {**fingerprint, **evaluation.settings}
    results = ResultFile(path, fingerprint, renew=renew, cache=cache) if main_process() else None
    unread = on_main_process(lambda: results.missing(evaluation.items) if results else [])
    if unread and evaluation.of_base and fingerprint["adapter"] == "none":
        if results:
            results.append(*map(evaluation.of_base, unread))
    elif unread:
        model, missing = get_model(), {item["question_id"] for item in unread}
        title = EVALUATIONS.get(evaluation.name, path.stem) + WHEN.get(path.stem.removeprefix(evaluation.name), "")
        groups = itertools.groupby(evaluation.items, key=lambda item: item[evaluation.unit])
        units = sorted(([*group] for _, group in groups), key=lambda unit: evaluation.order(unit[0]))
        at_once = max(1, math.ceil(evaluation.rows_at_once(model) / max(map(len, units))))

        def read(batch: list[list[dict]]) -> Iterator[tuple[int, list[dict]]]:
            items = [*itertools.chain(*batch)]
            is_read = any(item["question_id"] in missing for item in items)
            rows = iter(evaluation.read(model, tokenizer, items) if is_read else ())
            for place, unit in enumerate(batch):
                yield place, list(itertools.islice(rows, len(unit)))

        bar = tqdm(total=len(evaluation.items), desc=title, unit="question", disable=not main_process())
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), bar, evaluating(model):
            for number, found in enumerate(shared_rounds(units, at_once, read)):
                rows = list(itertools.chain(*(rows for _, rows in found)))
                if results and rows:
                    results.append(*(row for row in evaluation.grade(rows) if row["question_id"] in missing))
                bar.update(sum(len(unit) for unit, _ in found))
                if number == 0 and (minutes := bar.format_dict["elapsed"] / 60 * bar.total / max(1, bar.n)) > 1:
                    log.info("%s takes about %.0f min", title, minutes)
    if results:
        results.finish()
    return on_main_process(lambda: results and [results.rows[item["question_id"]] for item in evaluation.items])


def stored_rows(folder: Path, stage: str, evaluations: list[Evaluation]) -> Rows:
    """The rows that a measurement left in `folder`, by evaluation."""
    rows = {}
    for each in evaluations:
        path, skipped = folder / f"{each.name}_{stage}.jsonl", SkippedRows()
        if path.exists():
            by_id = read_results(path, skipped)[1]
            skipped.report(f"damaged lines of {path}")
            # in the order of `measure`
            rows[each.name] = [by_id[item["question_id"]] for item in each.items if item["question_id"] in by_id]
    return rows


def metrics_of(evaluations: list[Evaluation], *, own_drift: bool = True) -> list[str]:
    """The names of METRICS of which these evaluations give a difference; with `own_drift` also that, if they ask what
    it is measured on."""
    names = {evaluation.name for evaluation in evaluations}
    names |= {"own_drift"} if own_drift and "retention" in names else set()
    return [key for key, metric in METRICS.items() if metric.has_delta and (metric.of or metric.keys[0]) in names]


def report(
    record: dict, folder: Path, evaluations: list[Evaluation], before: Rows, after: Rows, *, title: str = ""
) -> None:
    """Fills the record's baseline, final and delta; writes metrics.json and the plots; prints the table: whole, with a
    line for every turn and category, unless --table asks for the headline. `before` and `after`: by `measure`."""
    metrics = {side: record[side] for side in ("baseline", "final", "delta")}
    for evaluation in evaluations:
        name = evaluation.name
        add_figures(record, evaluation, before, after)
        if name in SCORED and name in after:
            figure = plot_categories(EVALUATIONS[name], *(metrics[side].get(name) for side in metrics))
            save_figure(figure, folder / f"{name}.png")
    if not all(math.isfinite(value) for value in record["final"].values() if isinstance(value, float)):
        raise NotFiniteError("what was measured after training is not finite")
    write_json(folder / "metrics.json", metrics)
    print_results(title or str(folder), metrics, record.get("args", {}).get("table", "full"))
    log.info("seconds: %s", ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in record["runtime_s"].items()))


def add_figures(record: dict, evaluation: Evaluation, before: Rows, after: Rows) -> None:
    """Puts what an evaluation says, and the health of its answers, into the record's baseline, final and delta."""
    name, is_answered = evaluation.name, evaluation.name in ANSWERED
    for side, rows in (("baseline", before), ("final", after)):
        record[side] |= evaluation.summarise(rows[name]) if name in rows else {}
        if is_answered and name in rows:
            record[side].setdefault("health", {})[name] = summarise_health(rows[name])
    if name in before and name in after:
        record["delta"] |= evaluation.compare(before[name], after[name])
        deltas = compare_health(pair_rows(before[name], after[name])) if is_answered else {}
        record["delta"] |= {f"{name}_{kind}": delta for kind, delta in deltas.items()}


class TableRow(NamedTuple):
    """A line of the table: the figures before and after (None = not measured) and a delta of `paired_delta`."""

    title: str
    before: float | None
    after: float | None
    delta: dict | None = None
    lower_is_better: bool = False


def in_short(delta: dict[str, dict]) -> list[str]:
    """What was learned, what was lost and what cannot be told, by the tests of the headline metrics; [] where none was
    compared."""
    found: dict[str, list[str]] = {"learned": [], "lost": [], "cannot be told": []}
    for name, metric in METRICS.items():
        change = delta.get(name)
        if name not in HEADLINE - SIGNS or not change or change["mean"] is None:
            continue
        is_gain = (change["mean"] > 0) != metric.lower_is_better
        told = change["p"] is not None and change["p"] <= 0.05
        kind = ("learned" if is_gain else "lost") if told else "cannot be told"
        found[kind].append(f"{metric.title} {number(change['mean'], '+')}" if told else metric.title)
    return [f"{kind}: {'; '.join(items) or 'nothing'}" for kind, items in found.items() if any(found.values())]


def table_rows(baseline: dict, final: dict, delta: dict, table: str = "") -> list[TableRow]:
    """The lines of every metric that was measured, with those of its answer types. `table`: "full" adds turns,
    categories and kinds of retention; "headline" has the most important metrics alone, and bad health of answers."""
    rows = []
    for name, metric in METRICS.items():
        figures, change = (metric.read(baseline), metric.read(final)), delta.get(name)
        if metric.keys[:1] == ("health",):
            is_shown = any(figures)  # there is something bad
        else:
            is_shown = (name in delta or figures != (None, None)) and (table != "headline" or name in HEADLINE)
        if not is_shown:
            continue
        rows.append(TableRow(metric.title, *figures, change, metric.lower_is_better))
        parts = change or {}
        rows += [TableRow(f"  {side}", None, parts[side]) for side in ("lost", "gained") if side in parts]
        by_type, deltas = Metric("", (*metric.keys[:-1], "by_type")), parts.get("by_type", {})
        kinds: Any = by_type.read(final) or by_type.read(baseline) or {}
        for kind in kinds if table == "full" or name != "retention" else {}:
            figure = Metric(f"  {kind}", (metric.keys[0], "by_type", kind, metric.keys[-1]))
            rows.append(TableRow(figure.title, figure.read(baseline), figure.read(final), deltas.get(kind)))
        if table == "full" and name in SCORED and name in final:
            old = {"by_turn": [], "by_category": {}} | baseline.get(name, {})
            turns = itertools.zip_longest(old["by_turn"][: len(final[name]["by_turn"])], final[name]["by_turn"])
            rows += [TableRow(f"  turn {number}", *scores) for number, scores in enumerate(turns, 1)]
            for category, score in final[name]["by_category"].items():
                rows.append(TableRow(f"  {category}", old["by_category"].get(category), score))
    return rows


def verdict(delta: dict, *, lower_is_better: bool = False) -> str:
    """What the test says of a difference, in words: "" when it is clear (p of 0.05 or less)."""
    if not delta["n"] or delta["p"] is None or delta["p"] <= 0.05:
        return ""
    if too_few_changed(delta):
        # where the items that changed would be enough
        clusters = f"in {delta['changed_clusters']} of {delta['clusters']} clusters: " * (delta["changed"] >= ENOUGH)
        return clusters + "too few to tell"
    bound, kind = excluded(delta, lower_is_better=lower_is_better), "rise" if lower_is_better else "loss"
    return "no detectable change" + (f"; a {kind} above {bound:.2g} is excluded" if bound is not None else "")


def number(value: object, sign: str = "") -> str:
    """A figure in four significant digits; a text or whole number as it is; "-" for None. `sign`: "+" signs all."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if abs(value) >= 1000:
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.2g}" if 0 < abs(value) < 0.001 else f"{value:{sign}#.4g}".rstrip(".")


def table_texts(rows: list[TableRow]) -> tuple[list[list[str]], str]:
    """The cells of each line (title, before, after; where there is a difference also difference, interval, p, items
    that changed, verdict), and what is to be said of all p values: those that stay below 0.05 after Holm's correction
    for all lines are marked *. An interval without width from too few changes would say too much and is left out."""
    p_values = [row.delta["p"] for row in rows if row.delta and row.delta["p"] is not None]
    stay = [p < 0.05 for p in holm(p_values)]
    texts, stays = [], iter(stay)
    for row in rows:
        cells, delta = [row.title, number(row.before), number(row.after)], row.delta
        if delta and delta["mean"] is not None:
            low, high, p = delta["low"], delta["high"], delta["p"]
            unknown = low is None or (low == high and too_few_changed(delta))
            cells += [
                number(delta["mean"], "+"),
                "none" if unknown else f"[{number(low)}, {number(high)}]",
                "-" if p is None else f"{p:.2g}{'*' if next(stays) else ' '}",
                f"{delta.get('changed', '-')}/{delta['n']}",
                verdict(delta, lower_is_better=row.lower_is_better),
            ]
        texts.append(cells)
    note = f"{len(stay)} p values; {sum(stay)} (*) stay below 0.05 after Holm's correction"
    return texts, note if stay else ""


def print_table(
    title: str, rows: list[TableRow], sides: Sequence[str] = ("baseline", "final"), above: Sequence[str] = ()
) -> None:
    """Prints what stands `above`, and the lines of `table_texts` under the names of the two sides, in a run to run.log
    too; as wide as the terminal, 80 to 120 columns, in plain ASCII."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Column, Table

    width = max(80, min(120, shutil.get_terminal_size((120, 24)).columns))
    fill = functools.partial(textwrap.fill, width=width, subsequent_indent="    ", break_on_hyphens=False)
    is_wide = width >= 110  # else without the items that changed and the verdict
    rules = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one line under the heading
    numbers = (*sides, "difference [95 % interval]", "p", *["changed"] * is_wide)
    columns = [Column(name, justify="right", no_wrap=True, overflow="fold") for name in numbers]
    columns = [Column(no_wrap=is_wide, overflow="fold"), *columns, *[Column(overflow="fold")] * is_wide]
    table = Table(*columns, box=rules, show_edge=False, padding=(0, 1, 0, 0))
    texts, note = table_texts(rows)
    for cells in texts:
        table.add_row(*[*cells[:3], " ".join(cells[3:5]), *cells[5:]][: len(table.columns)])
    console = Console(width=width, color_system=None, legacy_windows=False, markup=False, emoji=False, highlight=False)
    with console.capture() as printed:
        console.print("\n".join([*map(fill, above), title]), soft_wrap=True)
        console.print(table)
    unclear = [] if is_wide else [cells for cells in texts if any(cells[7:])]
    verdicts = (fill(f"{cells[0].strip()}: {cells[6]} changed, {cells[7]}") for cells in unclear)
    text = "\n".join([printed.get().rstrip(), *verdicts, note]).rstrip()
    print(text)
    to_run_log(text)


def print_results(title: str, metrics: dict[str, dict], table: str) -> None:
    """Prints what was learned and lost, then the table; `metrics`: a record's baseline, final and delta."""
    baseline, final, delta = (metrics.get(key, {}) for key in ("baseline", "final", "delta"))
    print_table(title, table_rows(baseline, final, delta, table), above=in_short(delta))


def save_answers(file: str, before: Rows, after: Rows) -> None:
    """Writes TAT-QA's rows of `measure` where --eval_save_json X.jsonl asks: to X_baseline.jsonl and X_post.jsonl."""
    path = Path(file)
    for name, rows in (("baseline", before), ("post", after)):
        if file and "tatqa" in rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path.with_name(f"{path.stem}_{name}.jsonl"), rows["tatqa"])


def parse_gates(text: str) -> dict[str, float]:
    """ "mtbench=-0.3,val_loss=-0.05" as the least acceptable difference of each metric. Raises InputError."""
    gates: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, limit = map(str.strip, part.partition("="))
        if not name or name in gates:
            raise InputError(f"--gates {part}: name each metric once, as in mtbench=-0.3")
        if name not in METRICS:
            known = ", ".join(known for known in METRICS if known in HEADLINE and METRICS[known].has_delta)
            raise InputError(f"--gates {name}: there is no such metric; choose from {known}")
        try:
            gates[name] = flags.number(float, -(2**31), ends="()")(limit)
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(f"--gates {part}: {limit!r} is not a number; write {name}=-0.3 or the like") from None
    return gates


def asked_gates(text: str, evaluations: list[Evaluation], *, own_drift: bool = True) -> dict[str, float]:
    """--gates as differences by metric. Raises InputError for one that these evaluations do not measure; `own_drift`:
    whether the drift on the base's own answers will be."""
    gates, measured = parse_gates(text), metrics_of(evaluations, own_drift=own_drift)
    if unknown := next((name for name in gates if name not in measured), None):
        raise InputError(f"--gates {unknown}: not measured in this run; choose from {', '.join(measured) or 'none'}")
    return gates


def judge_gates(record: dict, gates: dict[str, float]) -> None:
    """Fills the record's "gates" and prints a line for each."""
    judged = record["gates"]
    for name, limit in gates.items():
        if name in record["delta"]:
            lower_is_better = METRICS[name].lower_is_better
            judged[name] = judge(record["delta"][name], limit, lower_is_better=lower_is_better)
            log.info("%s", describe(name, judged[name], lower_is_better=lower_is_better))
        else:
            log.warning("gate %s: undecided, it was not measured before and after", name)


def missed_gates(record: dict) -> list[str]:
    """The metrics whose gates the run of a record missed."""
    return [name for name, gate in (record.get("gates") or {}).items() if gate["verdict"] == "missed"]


def judge(delta: dict, limit: float, *, lower_is_better: bool = False) -> dict:
    """What the 95 % interval of a difference (as returned by `stats.paired_delta`) says of the gate `limit`. A
    difference is acceptable from the limit upwards, or downwards where lower is better. Returns {"limit", "verdict",
    "mean", "low", "high", "n", "questions"}. Verdict: "passed" (the whole interval is acceptable), "missed" (none of
    it is) or "undecided"; that too without an interval or with fewer than 40 items. "questions": how many would decide
    an undecided gate, if the difference stays what it is; None where that cannot be told."""
    mean, low, high, n = (delta[key] for key in ("mean", "low", "high", "n"))
    gate = {"limit": limit, "verdict": "undecided", "mean": mean, "low": low, "high": high, "n": n, "questions": None}
    if low is None:
        return {**gate, "questions": ENOUGH_ITEMS if n < ENOUGH_ITEMS else None}
    sign = -1 if lower_is_better else 1
    worst, best = sorted((sign * low, sign * high))
    if n >= ENOUGH_ITEMS and (worst >= sign * limit or best < sign * limit):
        return {**gate, "verdict": "passed" if worst >= sign * limit else "missed"}
    half = mean - low if mean >= limit else high - mean  # the side that reaches over the gate
    return {**gate, "questions": questions_that_decide(half / 1.96 * math.sqrt(n), abs(mean - limit))}


def describe(name: str, gate: dict, *, lower_is_better: bool = False) -> str:
    """One line on what `judge` returned."""
    side = "at most" if lower_is_better else "at least"
    found = "" if gate["mean"] is None else f" {gate['mean']:+.3g}"
    found += " without an interval" if gate["low"] is None else f" [{gate['low']:+.3g}, {gate['high']:+.3g}]"
    line = f"gate {name} {side} {gate['limit']:+g}: {gate['verdict']},{found} on {gate['n']}"
    if gate["verdict"] != "undecided":
        return line
    if gate["questions"] is None:
        return f"{line}; how many questions would decide cannot be told"
    few = f"too few, at least {ENOUGH_ITEMS} are needed; " if gate["n"] < ENOUGH_ITEMS else ""
    return f"{line}; {few}about {gate['questions']:,} questions would decide"


def questions_needed(limit: float, deltas: Iterable[dict], *, expected: float = 0.0) -> int | None:
    """How many questions a gate needs where a difference of `expected` is, by earlier differences of the metric
    (`stats.paired_delta`): the root mean square of their items' standard deviations, as their intervals show them, so
    that clusters count. None without an earlier interval, or where the expected difference is the gate itself."""
    known = [delta for delta in deltas if delta["low"] is not None]
    spreads = [(delta["high"] - delta["low"]) / (2 * 1.96) * math.sqrt(delta["n"]) for delta in known]
    if not spreads:
        return None
    return questions_that_decide(math.hypot(*spreads) / math.sqrt(len(spreads)), abs(expected - limit))


def questions_that_decide(spread: float, distance: float) -> int | None:
    """After how many items a mean `distance` from its gate decides; `spread` is the items' standard deviation."""
    return max(ENOUGH_ITEMS, math.ceil((REACH * spread / distance) ** 2)) if distance else None
