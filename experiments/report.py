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
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import records
import tables
from plots import plot_categories, plot_curves, plot_metric, plot_noise, plot_seeds, plot_trade_off, plot_types
from records import DEMO, HERE, PUBLISHED, REPORT, Run, exit_code, find_run, load_runs, record_files, singles
from tables import DPO, LOGS, MULTI_TASK, SFT, Group, delta_rows, document, experiment_log, recipes_table, results

from llm_alignment import retention, tatqa
from llm_alignment.evaluation import EVALUATIONS, number, print_results, print_table, table_rows, table_texts
from llm_alignment.files import InputError, SkippedRows, differing, read_json, write_atomic
from llm_alignment.flags import Parser, positive, refuse
from llm_alignment.plots import save_figure
from llm_alignment.results import read_results
from llm_alignment.scores import compare_scored, summarise_scored
from llm_alignment.stats import holm

# the evaluations whose rows hold answers
COMPARED = ("mtbench", "retention", "tatqa", "held_out", "instruct", "finance_instruct", "reddit")
REWARDS = ("chosen_reward", "rejected_reward")  # of a row of held-out pairs
UNITS = {"tatqa": "percentage points", "retention": "percentage points", "held_out": "of reward margin"}


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
    add_task("--power", nargs="+", metavar="RUN", help="what N questions can detect, by one run or between two")
    return parser


def logged_lines(logged: list[Run], spreads: list[tables.Spread]) -> Iterator[str]:
    """What was published, and what of the changes by DPO is larger than the noise of its protocol."""
    planned, invented = map([run.origin for run in logged].count, ("logged, no figures", "logged, not measured"))
    figures = f"{len(logged) - planned - invented} with figures, {planned} only planned, {invented} with constants"
    yield f"{len(logged)} published runs: {figures} instead of measurements. They logged no answers, so no interval."

    def changed(group: Group, metric: str) -> tuple[list[Run], str]:
        found = [run for run in group.of(logged) if metric in run.changes and run.measured]
        values = [run.changes[metric] for run in found]
        return found, f"{min(values):+.2f} to {max(values):+.2f}"

    (learned, losses), (asked, span) = changed(SFT, "val_loss"), changed(SFT, "mtbench")
    fell = f"it fell in {sum(run.changes['mtbench'] < 0 for run in asked)} of {len(asked)}"
    loss = f"Published SFT: the validation loss changed by {losses} nats per token in {len(learned)} runs"
    yield f"{loss}, MT-Bench by {span} on the published scale; {fell}."
    judged = {(run.name, spread.metric) for spread in spreads for run in spread.runs}
    for group in (DPO, MULTI_TASK):
        parts = []
        for metric, title in (("tatqa", "TAT-QA"), ("mtbench", "MT-Bench")):
            found, span = changed(group, metric)
            known = [run for run in found if (run.name, metric) in judged]
            clear = sum(metric not in run.in_noise for run in known)
            beyond = f"{clear} of {len(known)} beyond twice the noise" if known else "its noise is not known"
            parts.append(f"{title} {span} ({beyond})")
        yield f"Published {group.title}: {', '.join(parts)}."


def new_lines(new: list[Run], *, published: bool) -> Iterator[str]:
    """On which models this code has run, what that leaves open, how many p values stay, how sure an SD is."""
    real = sorted({run.model.rpartition("/")[2] for run in new if run.model != DEMO})
    demo = sum(run.model == DEMO for run in singles(new))
    yield f"Runs of this code: {demo} on the demo's miniature, and on {', '.join(real) or 'no real model'}."
    on_gpu = any("cpu" not in str((run.source.get("device") or {}).get("name", "cpu")) for run in new)
    if published and not (on_gpu and any("Qwen3-1.7B" in name for name in real)):
        yield "**No recipe has run on a GPU or on Qwen3-1.7B with this code yet.**"
    if demo:
        other = "Its base was trained for it, its rates and its anchor are many times those of the recipes"
        yield f"The demo shows that the code works. {other}: it says nothing about what a recipe gives."
    p_values = [row.delta["p"] for run in new for row in delta_rows(run) if row.delta and row.delta["p"] is not None]
    if p_values:
        below, kept = sum(p < 0.05 for p in p_values), sum(p < 0.05 for p in holm(p_values))
        yield f"Of {len(p_values)} p values {below} are below 0.05, and {kept} after Holm's correction."
    if seeds := min((len(run.members) for run in new if run.members), default=0):
        true = "the true one lies between {:.2f} and {:.1f} times it (95 %)".format(*tables.sd_interval(seeds))
        yield f"A standard deviation over {seeds} seeds is uncertain: {true}."


def draw_all(runs: list[Run], spreads: list[tables.Spread]) -> dict[str, tuple[str, Any]]:
    """{file name: (caption, figure)}. The demo's miniature has its own, as it changes by points, not by tenths."""
    figures: dict[str, tuple[str, Any]] = {}

    def draw(name: str, caption: str, plot: Callable[..., Any], *of: Any) -> None:
        if of[-1] and (figure := plot(caption, *of)):
            figures[f"plots/{name}.png"] = caption, figure

    for prefix, remark, shown in (
        ("", "", [run for run in runs if run.model != DEMO and run.name not in tables.REPEATED]),
        ("demo_", " (demo)", [run for run in runs if run.model == DEMO]),
    ):
        for group in (SFT, DPO, MULTI_TASK):
            name, members = prefix + group.name, group.of(shown)
            for metric in group.metrics.split():
                measure = PUBLISHED[metric].title.removesuffix(" avg").removesuffix(", %")
                caption = f"{group.title}: {measure} before and after{remark}"
                changed = [run for run in members if metric in run.changes]
                draw(f"{name}_{metric}", caption, plot_metric, metric, changed)
            new = [run for run in singles(members) if not run.is_logged]
            draw(f"{name}_curves", f"{group.title}: training curves of the new runs{remark}", plot_curves, new)
        draw(f"{prefix}sft_trade_off", f"SFT: validation loss against MT-Bench{remark}", plot_trade_off, shown)
        draw(f"{prefix}tatqa_types", f"TAT-QA by answer type{remark}", plot_types, [run for run in shown if run.types])
        draw(f"{prefix}seeds", f"Differences over seeds{remark}", plot_seeds, shown)
    draw("noise", "Noise of the published baselines", plot_noise, spreads)
    for run in (run for run in runs if not run.is_logged):
        if figure := plot_categories(run):
            taken = {name.lower() for name in figures}  # Windows takes a and A for one
            ends = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
            name = next(n for end in ends if (n := f"plots/categories_{slug(run.name)}{end}.png").lower() not in taken)
            figures[name] = f"MT-Bench by category: {run.label}", figure
    return figures


def write_report(files: list[Path], output_dir: Path, *, mine: bool = False) -> list[Path]:
    """Writes RESULTS.md, the logs and the plots from the published runs and the records in `files`; their paths."""
    runs = records.merge_seeds(load_runs(files, mine=mine))
    spreads = tables.mark_noise(runs)
    figures = draw_all(runs, spreads)
    (output_dir / "plots").mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in figures.items():
        save_figure(figure, output_dir / name)
    logged, new = ([run for run in runs if run.is_logged == is_logged] for is_logged in (True, False))
    lines = [*(logged_lines(logged, spreads) if logged else []), *new_lines(new, published=bool(logged))]
    in_short = document([recipes_table(new), "\n".join(f"- {line}" for line in lines)]).rstrip()
    texts = {"RESULTS.md": results(runs, spreads, {name: text for name, (text, _) in figures.items()}, in_short)}
    texts |= {name: text for name in LOGS if (text := experiment_log(name, runs))}
    for name, text in texts.items():
        write_atomic(output_dir / name, text)
    return [output_dir / name for name in (*figures, *texts)]


def settings_of(name: str, files: list[Path]) -> dict:
    """The flags of a run given as for `answer_files`; {} where they are not known."""
    path = Path(name).parent if Path(name).is_file() else Path(name)
    has_run = (path / "run.json").is_file()
    run = records.run_of_folder(path) if has_run else {} if path.is_dir() else find_run(name, files)
    return {key: value for key, value in run.get("args", {}).items() if key not in records.NO_SETTINGS - {"seed"}}


def answer_files(name: str, files: list[Path]) -> dict[str, Path]:
    """{evaluation: its per-question file} of a run given by tag, FILE:LINE, output folder or one such file."""
    path = Path(name)
    if path.is_file():
        if keys := [key for key in COMPARED if f"{path.stem}_".startswith(f"{key}_")]:
            return {keys[0]: path}
        raise InputError(f"{path}: not a file of answers; name one such as mtbench_final.jsonl")
    if not path.is_dir():
        run = find_run(name, files)
        if "output_dir" not in run:
            raise InputError(f"{name}: a published run; its answers were not kept, so nothing can be compared")
        path = Path(run["output_dir"])
    found = {
        key: folder / name
        for folder in (path, *sorted(path.glob("stage[123]")))  # of a run in stages the last one's answers
        for key in COMPARED
        for name in (f"{key}_final.jsonl", f"{key}.jsonl")  # a training run's, mtbench_eval.py's
        if (folder / name).is_file()
    }
    if not found:
        raise InputError(f"{path}: no *_final.jsonl with answers here; name the output folder of a finished run")
    return found


def load_answers(key: str, path: Path) -> tuple[dict, list[dict]]:
    """The settings and the rows of a per-question file; a row that lacks something counts as damaged."""
    skipped = SkippedRows()
    fingerprint, stored = read_results(path, skipped)
    rows = []
    for row in stored.values():
        try:
            view(key, row)
            readers(key)[0]([row])
            json.dumps(row, allow_nan=False)
            rows.append(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            skipped.add(f"question_id {row['question_id']}", f"{type(error).__name__}: {error}")
    skipped.report(f"damaged lines of {path}")
    measured_on = ("model", "weights", "adapter", "questions", "pairs")
    return {key: value for key, value in records.flatten(fingerprint).items() if key not in measured_on}, rows


def compare(names: list[str], files: list[Path], output_dir: Path) -> Path:
    """Prints the differences of B against A over the questions both answered, and writes the page; its path."""
    import jinja2

    a, b = names
    of_a, of_b = answer_files(a, files), answer_files(b, files)
    if not (shared := [key for key in of_a if key in of_b]):
        raise InputError(f"{a} has {', '.join(of_a)}, {b} has {', '.join(of_b)}: no evaluation in common to compare")
    of_both = settings_of(a, files), settings_of(b, files)
    flags = (differing(*of_both) or "none") if all(of_both) else "not known, there is no run.json"
    print(f"flags that differ, {a} -> {b}: {flags}")
    compared = {key: compare_evaluation(key, of_a[key], of_b[key]) for key in shared}
    if not (sections := [*filter(None, compared.values())]):
        raise InputError(f"{a} and {b} have no question in common; compare runs on the same questions")
    for key, section in compared.items():
        if not section:
            print(f"warning: {EVALUATIONS[key]}: no question in common, not compared", file=sys.stderr)
            continue
        if section["unlike"]:
            print(f"warning: {key} was measured under other settings: {section['unlike']}", file=sys.stderr)
        title = f"{section['title']}: {a} -> {b}, {len(section['questions'])} shared questions"
        print_table(title, section["deltas"], sides=[name.rstrip("/\\")[-12:] for name in names])
    template = jinja2.Template((HERE / "compare.html.jinja").read_text("utf-8"), autoescape=True)
    path = output_dir / f"compare_{slug(a)}_{slug(b)}.html"
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, template.render(a=a, b=b, flags=flags, sections=sections))
    return path


def slug(name: str) -> str:
    """A name as part of a file name: at most 80 bytes, of which two fit into the 255 that a disk allows."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[-60:].encode("utf-8")[-80:].decode("utf-8", "ignore")


def compare_evaluation(key: str, path_a: Path, path_b: Path) -> dict | None:
    """One evaluation of the page, the questions with the largest changes first; None without a shared question."""
    (settings_a, rows_a), (settings_b, rows_b) = (load_answers(key, path) for path in (path_a, path_b))
    if {"beta"} <= settings_a.keys() & settings_b.keys():  # a reward is beta times a log-ratio: in units of B's
        factor = settings_b["beta"] / settings_a["beta"]
        rows_a = [{**row, **{side: factor * row[side] for side in REWARDS}} for row in rows_a]
    if not (pairs := shared_questions(rows_a, rows_b)):
        return None
    sides = [[*side] for side in zip(*pairs, strict=True)]
    summarise, compare_sides = readers(key, settings_b.get("beta", 1.0))
    before, after = map(summarise, sides)
    deltas = table_rows(before, after, compare_sides(*sides))
    questions = []
    for row_a, row_b in pairs:
        (title, old, turns_a), (_, new, turns_b) = view(key, row_a), view(key, row_b)
        turns = list(zip(turns_a, turns_b, strict=True))
        questions.append({"title": title, "before": old, "after": new, "change": new - old, "turns": turns})
    return {
        "title": EVALUATIONS[key],
        "unlike": differing(settings_a, settings_b),
        "deltas": deltas,
        "table": [tables.with_reading(cells) for cells in table_texts(deltas)[0] if len(cells) > 3],
        "questions": sorted(questions, key=lambda question: -abs(question["change"])),
    }


def shared_questions(rows_a: list[dict], rows_b: list[dict]) -> list[tuple[dict, dict]]:
    """The two rows of every question in common, by texts too: MT-Bench has the same numbers in both languages."""
    by_id = {row["question_id"]: row for row in rows_a}
    pairs = [(by_id[row["question_id"]], row) for row in rows_b if row["question_id"] in by_id]
    return [(a, b) for a, b in pairs if a.get("turns") == b.get("turns")]


def readers(key: str, beta: float = 1.0) -> tuple[Callable[[list[dict]], dict], Callable[..., dict]]:
    """The functions that summarise and compare rows, as those of the `Evaluation`; `beta`: of held-out pairs."""
    if key == "tatqa":
        return lambda rows: {key: tatqa.summarise_tatqa(rows)}, tatqa.compare_tatqa
    if key == "retention":
        return retention.summarise_retention, retention.compare_retention
    if key == "held_out":
        from llm_alignment import dpo  # torch and TRL with it

        return lambda rows: {key: dpo.summarise_rewards(rows, beta)}, partial(dpo.compare_rewards, beta=beta)
    return partial(summarise_scored, key), partial(compare_scored, key)


def view(key: str, row: dict) -> tuple[str, float, list[tuple[str, str, str]]]:
    """Title, score, and (question, answer, what it got in words) of every turn; a pair's answers stand as two turns.
    The score is 1-10, the mean over the turns; 100 or 0 of what is right or wrong; of a pair its reward margin."""
    if key == "tatqa":
        gold = "; ".join(map(str, row["gold"])) if isinstance(row["gold"], list) else row["gold"]
        title = f"{row['answer_type']}, gold answer {gold} {row['scale']}"
        mark = f"{'right' if row['em_like'] else 'wrong'}, EM {row['em']:.2f}, F1 {row['f1']:.2f}"
        return title, 100.0 * row["em_like"], [(row["question"], row["answer"], mark)]
    if key == "held_out":
        turns = [(side, row[side], f"reward {row[f'{side}_reward']:.2f}") for side in ("chosen", "rejected")]
        return f"pair {row['question_id']}", row["chosen_reward"] - row["rejected_reward"], turns
    if key == "retention":
        score, marks = 100.0 * row["right"], [""] * (len(row["turns"]) - 1) + ["right" if row["right"] else "wrong"]
    else:
        pairs = zip(row["scores"], row["rewards"], strict=True)
        score, marks = statistics.fmean(row["scores"]), [f"{score:.2f} (raw {reward:.2f})" for score, reward in pairs]
    turns = list(zip(row["turns"], row["answers"], marks, strict=True))
    return f"{row['question_id']}: {row.get('category', 'question')}", score, turns


def detectable(spread: float, questions: int) -> float:
    """The smallest true difference that a two-sided 5 % test on `questions` pairs finds in 80 % of runs, by the normal
    approximation. `spread`: the standard deviation of the per-question differences."""
    quantile = statistics.NormalDist().inv_cdf
    return (quantile(0.975) + quantile(0.80)) * spread / questions**0.5


def print_power(names: list[str], files: list[Path], difference: float | None = None) -> None:
    """For each evaluation of one run, before and after, or of two: what N questions detect; how many `difference`."""
    finals = [answer_files(name, files) for name in names]
    for key, after_path in finals[-1].items():
        own = [folder / f"{key}_baseline.jsonl" for folder in after_path.parents[:2]]  # of a run in stages above them
        found = [path for path in (own if len(names) == 1 else [finals[0].get(key)]) if path and path.is_file()]
        if not (before_path := next(iter(found), None)):
            raise InputError(f"{names[-1]}: {EVALUATIONS[key]} has nothing to compare with; name a second run")
        before, after = (load_answers(key, path)[1] for path in (before_path, after_path))
        differences = [view(key, new)[1] - view(key, old)[1] for old, new in shared_questions(before, after)]
        if (n := len(differences)) < 2:
            raise InputError(f"{after_path}: {n} questions shared with {before_path}; needs at least 2")
        if not (spread := statistics.stdev(differences)):
            print(f"{EVALUATIONS[key]}: all {n} questions changed alike, which says nothing about others")
            continue
        unit = UNITS.get(key, "points on the 1-10 scale")
        mean, deviation = number(statistics.fmean(differences), "+"), number(spread)
        print(f"{EVALUATIONS[key]}: {n} questions, mean difference {mean}, standard deviation by question {deviation}")
        for size in sorted({16, 32, 50, 80, 160, 320, n}):
            print(f"  n = {size:>4}: detects a difference of {detectable(spread, size):.2f} {unit} in 8 of 10 runs")
        if difference:
            needed = max(2, math.ceil((detectable(spread, 1) / difference) ** 2))
            print(f"  a difference of {difference:g} {unit} needs n = {needed}")


def run(args: argparse.Namespace) -> None:
    if missing := [path for path in args.exp_log if not path.is_file()]:
        raise InputError(f"--exp_log {missing[0]}: no such file; name a record file")
    refuse(
        (args.detect and not args.power, "--detect goes with --power RUN; name a run"),
        (len(args.power or []) > 2, f"--power {' '.join(args.power or [])}: give one run, or two to compare"),
        (args.table and args.run is None, "--table goes with --run RUN; name a run"),
    )
    files = list(dict.fromkeys([*record_files(), *(path.resolve() for path in args.exp_log)]))
    output_dir = args.output_dir or (HERE if args.publish else HERE / REPORT)
    if (name := args.run) is not None:  # empty, as of a shell variable that is not set, is an error
        folder = Path(name) if Path(name).is_dir() else Path(find_run(name, files).get("output_dir", name))
        path = folder / "metrics.json"
        if not path.is_file():
            raise InputError(f"--run {name}: there is no {path}; name the output folder of a finished run")
        metrics = read_json(path, f"--run {name}")
        try:
            print_results(str(folder), metrics, args.table or "headline")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"--run {name}: {path} is damaged ({type(error).__name__}: {error})") from error
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
