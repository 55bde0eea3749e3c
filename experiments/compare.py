"""Two runs question by question: differences, one HTML page with both answers, and what N questions can detect."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from records import HERE, find_run, flatten, run_of_folder
from seeds import NO_SETTINGS
from tables import with_reading

from llm_alignment import retention, tatqa
from llm_alignment.evaluation import EVALUATIONS, number, pair_rows, print_table, table_rows, table_texts
from llm_alignment.files import InputError, SkippedRows, differing, write_atomic
from llm_alignment.results import read_results
from llm_alignment.scores import compare_scored, summarise_scored

# the evaluations whose rows hold answers
COMPARED = ("mtbench", "retention", "tatqa", "held_out", "instruct", "finance_instruct", "reddit")
REWARDS = ("chosen_reward", "rejected_reward")  # of a row of held-out pairs
UNITS = {"tatqa": "percentage points", "retention": "percentage points", "held_out": "of reward margin"}


def settings_of(name: str, files: list[Path]) -> dict:
    """The flags of a run given as for `answer_files`; {} where they are not known."""
    path = Path(name).parent if Path(name).is_file() else Path(name)
    has_run = (path / "run.json").is_file()
    run = run_of_folder(path) if has_run else {} if path.is_dir() else find_run(name, files)
    return {key: value for key, value in run.get("args", {}).items() if key not in NO_SETTINGS - {"seed"}}


def answer_files(name: str, files: list[Path]) -> dict[str, Path]:
    """{evaluation: its per-question file} of a run given by tag, FILE:LINE, output folder or one such file."""
    path = Path(name)
    if path.is_file():
        keys = [key for key in COMPARED if f"{path.stem}_".startswith(f"{key}_")]
        if not keys:
            raise InputError(f"{path}: not a file of answers; name one such as mtbench_final.jsonl")
        return {keys[0]: path}
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
    for row in stored:
        try:
            view(key, row)
            readers(key)[0]([row])
            json.dumps(row, allow_nan=False)
            rows.append(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            skipped.add(f"question_id {row['question_id']}", f"{type(error).__name__}: {error}")
    skipped.report(f"damaged lines of {path}")
    measured_on = ("model", "weights", "adapter", "questions", "pairs")
    return {key: value for key, value in flatten(fingerprint).items() if key not in measured_on}, rows


def compare(names: list[str], files: list[Path], output_dir: Path) -> Path:
    """Prints the differences of B against A over the questions both answered, and writes the page; its path."""
    import jinja2

    a, b = names
    of_a, of_b = answer_files(a, files), answer_files(b, files)
    shared = [key for key in of_a if key in of_b]
    if not shared:
        raise InputError(f"{a} has {', '.join(of_a)}, {b} has {', '.join(of_b)}: no evaluation in common to compare")
    of_both = settings_of(a, files), settings_of(b, files)
    flags = (differing(*of_both) or "none") if all(of_both) else "not known, there is no run.json"
    print(f"flags that differ, {a} -> {b}: {flags}")
    compared = {key: compare_evaluation(key, of_a[key], of_b[key]) for key in shared}
    if not any(compared.values()):
        raise InputError(f"{a} and {b} have no question in common; compare runs on the same questions")
    sections = []
    for key, section in compared.items():
        if section is None:
            print(f"warning: {EVALUATIONS[key]}: no question in common, not compared", file=sys.stderr)
            continue
        if section["unlike"]:
            print(f"warning: {key} was measured under other settings: {section['unlike']}", file=sys.stderr)
        title = f"{section['title']}: {a} -> {b}, {len(section['questions'])} shared questions"
        print_table(title, section["deltas"], sides=[name.rstrip("/\\")[-12:] for name in names])
        sections.append(section)
    template = jinja2.Template((HERE / "compare.html.jinja").read_text("utf-8"), autoescape=True)
    path = output_dir / f"compare_{slug(a)}_{slug(b)}.html"
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, template.render(a=a, b=b, flags=flags, sections=sections))
    return path


def slug(name: str) -> str:
    """A name as part of a file name: at most 80 bytes, of which two fit into the 255 that a disk allows."""
    text = re.sub(r"[^\w.-]+", "_", name).strip("._")[-60:]
    return text.encode("utf-8")[-80:].decode("utf-8", "ignore")


def compare_evaluation(key: str, path_a: Path, path_b: Path) -> dict | None:
    """One evaluation of the page, the questions with the largest changes first; None without a shared question."""
    (settings_a, rows_a), (settings_b, rows_b) = load_answers(key, path_a), load_answers(key, path_b)
    if {"beta"} <= settings_a.keys() & settings_b.keys():  # a reward is beta times a log-ratio: in units of B's
        factor = settings_b["beta"] / settings_a["beta"]
        rows_a = [{**row, **{side: factor * row[side] for side in REWARDS}} for row in rows_a]
    pairs = shared_questions(rows_a, rows_b)
    if not pairs:
        return None
    sides = [[*side] for side in zip(*pairs, strict=True)]
    summarise, compare_sides = readers(key, settings_b.get("beta", 1.0))
    before, after = map(summarise, sides)
    deltas = table_rows(before, after, compare_sides(*sides))
    questions = sorted((question_view(key, a, b) for a, b in pairs), key=lambda view: -abs(view["change"]))
    return {
        "title": EVALUATIONS[key],
        "unlike": differing(settings_a, settings_b),
        "deltas": deltas,
        "table": [with_reading(cells) for cells in table_texts(deltas)[0] if len(cells) > 3],
        "questions": questions,
    }


def shared_questions(rows_a: list[dict], rows_b: list[dict]) -> list[tuple[dict, dict]]:
    """The two rows of every question in common. MT-Bench's Russian and English questions have the same numbers, so the
    texts are compared too."""
    texts = {row["question_id"]: row.get("turns") for row in rows_a}
    same = [row for row in rows_b if texts.get(row["question_id"], "unknown") == row.get("turns")]
    return pair_rows(rows_a, same) if same else []


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
    """Title, score, and (question, answer, what it got in words) of every turn. The score is 1-10, the mean over the
    turns; 100 or 0 where an answer is right or wrong; of a pair its reward margin. A pair's two answers stand as two
    turns."""
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
    return f"{row['question_id']}: {row['category']}", score, turns


def question_view(key: str, a: dict, b: dict) -> dict:
    """One question as the page shows it: {"title", "scores", "change", "turns"}."""
    (title, before, turns_a), (_, after, turns_b) = view(key, a), view(key, b)
    names = ("question", "answer_a", "mark_a", "answer_b", "mark_b")
    turns = [dict(zip(names, (*a, *b[1:]), strict=True)) for a, b in zip(turns_a, turns_b, strict=True)]
    scores = f"{before:.2f} -> {after:.2f} ({after - before:+.2f})"
    return {"title": title, "scores": scores, "change": after - before, "turns": turns}


def detectable(spread: float, questions: int) -> float:
    """The smallest true difference that a two-sided 5 % test on `questions` pairs finds in 80 % of runs. `spread` is
    the standard deviation of the per-question differences; the normal approximation, (z(0.975) + z(0.80)) * spread /
    sqrt(questions)."""
    normal = statistics.NormalDist()
    return (normal.inv_cdf(0.975) + normal.inv_cdf(0.80)) * spread / questions**0.5


def print_power(names: list[str], files: list[Path], difference: float | None = None) -> None:
    """For each evaluation of a run (its answers before and after), or of two runs: what N questions can detect. With
    `difference` also how many questions find it."""
    if len(names) > 2:
        raise InputError(f"--power {' '.join(names)}: give one run, or two to compare")
    finals = [answer_files(name, files) for name in names]
    for key, after_path in finals[-1].items():
        folders = (after_path.parent, after_path.parent.parent)  # of a run in stages the baseline is above them
        own = next((path for path in (folder / f"{key}_baseline.jsonl" for folder in folders) if path.is_file()), None)
        before_path = own if len(names) == 1 else finals[0].get(key)
        if before_path is None:
            raise InputError(f"{names[-1]}: {EVALUATIONS[key]} has nothing to compare with; name a second run")
        before, after = load_answers(key, before_path)[1], load_answers(key, after_path)[1]
        shared = shared_questions(before, after)
        differences = [view(key, new)[1] - view(key, old)[1] for old, new in shared]
        n = len(differences)
        if n < 2:
            raise InputError(f"{after_path}: {n} questions shared with {before_path}; needs at least 2")
        spread = statistics.stdev(differences)
        if spread == 0:
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
