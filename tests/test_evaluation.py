"""The frame of before and after: the one runner of rows, metrics, rows by id, the table and its words, plots."""

import itertools
import json
import os
import subprocess
import tempfile
import types
from pathlib import Path

import pytest
from conftest import ROOT, torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import rows_of, toy_model

from llm_alignment import evaluation, files, processes, stats
from llm_alignment.endings import NotFiniteError
from llm_alignment.evaluation import METRICS, Evaluation, TableRow, measure, print_table, verdict
from llm_alignment.scores import compare_scored

# ---------------------------------------------------------------------------------------------------------------------
# The runner of rows


def read(model, tokenizer, items):
    """Rows that name their batch: a sampled text, and the last bits of every figure, depend on it."""
    assert not model.training
    model.batches.append([item["question_id"] for item in items])
    for item in items:
        yield {"question_id": item["question_id"], "batch": model.batches[-1]}


def task_of(contexts: list[int], at_once: int = 3, **changes) -> Evaluation:
    """Questions that are read context by context, those of high numbers first."""
    items = [{"question_id": n, "context": context} for n, context in enumerate(contexts)]
    more = dict(unit="context", order=lambda item: -item["context"], rows_at_once=lambda model: at_once)
    return Evaluation(name="tatqa", items=items, read=read, **more | changes)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_killed_evaluation_has_the_rows_and_batches_of_an_uninterrupted_one(contexts, at_once, kept, is_torn):
    task, first, second = task_of(contexts, at_once), toy_model(), toy_model()
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole.jsonl", Path(folder) / "cut.jsonl"
        rows = rows_of(task, first, None, whole)
        assert [row["question_id"] for row in rows] == list(range(len(contexts))) and first.training
        units = [[n for n, _ in unit] for _, unit in itertools.groupby(enumerate(contexts), key=lambda pair: pair[1])]
        assert all(any(set(unit) <= set(batch) for batch in first.batches) for unit in units)
        assert max(map(len, first.batches)) < at_once + max(map(len, units))
        order = [contexts[n] for batch in first.batches for n in batch]
        assert order == sorted(order, reverse=True)
        lines = whole.read_bytes().splitlines(keepends=True)
        kept = min(kept, len(contexts))
        cut.write_bytes(b"".join(lines[: 1 + kept]) + b"".join(lines[1 + kept :])[:9] * is_torn)
        assert rows_of(task, second, None, cut) == rows and cut.read_bytes() == whole.read_bytes()
        stored = {json.loads(line)["question_id"] for line in lines[1 : 1 + kept]}
        assert second.batches == [batch for batch in first.batches if set(batch) - stored]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(task, place, **options): the rows, and the batches that were read for them."""
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))

    def run(task, place, **options):
        model, (folder, stage) = toy_model(), place.split("/")
        options = {"fingerprint": {"model": "m"}, "with_adapter": True} | options
        return measure(model, None, [task], (tmp_path / folder, stage), **options)["tatqa"], model.batches

    return run


def test_what_is_known_of_the_base_is_not_read(measured):
    task = task_of([0, 1], of_base=lambda item: {**item, "is_known": True})
    rows, batches = measured(task, "run/baseline", with_adapter=False)
    assert rows == [{**item, "is_known": True} for item in task.items] and not batches
    with pytest.MonkeyPatch.context() as patch:  # a toy without PEFT's adapter
        patch.setattr("llm_alignment.adapters.adapter_sha256", lambda model: "trained")
        assert measured(task, "run/final")[1] == [[1, 0]]


def test_rows_of_the_base_are_shared_by_runs_but_sampled_ones_are_not(measured, tmp_path):
    for task, is_read, cached in ((task_of([0, 1]), 0, 1), (task_of([0, 1, 2], is_cached=False), 1, 1)):
        options = dict(use_cache=True, with_adapter=False)
        rows = [measured(task, f"{name}{is_read}/baseline", **options) for name in ("one", "two")]
        assert rows[0][0] == rows[1][0] and len(rows[0][1]) == 1 and len(rows[1][1]) == is_read
        one, two = (tmp_path / f"{name}{is_read}" / "tatqa_baseline.jsonl" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert len([*(tmp_path / "cache").rglob("*.jsonl")]) == cached
    for n, changes in enumerate([{"use_cache": False}, {"with_adapter": True}, {"fingerprint": {"model": "other"}}]):
        assert measured(task_of([0, 1]), f"{n}/baseline", **{**options, **changes})[1]


def test_rows_of_an_earlier_stage_are_taken_if_nothing_changed(measured):
    rows, _ = measured(task_of([0, 1]), "run/step_2")
    assert measured(task_of([0, 1]), "run/final", measured_as="step_2") == (rows, [])
    other = task_of([0, 1], settings={"temperature": 1})
    assert measured(other, "run/other", measured_as="step_2")[1] == [[1, 0]]
    assert measured(task_of([0, 1]), "run/later", measured_as="step_9")[1] == [[1, 0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_alignment.adapters.adapter_sha256", lambda model: "another adapter")
        assert measured(task_of([0, 1]), "run/final")[1] == [[1, 0]]
        assert measured(task_of([0, 1]), "run/another", measured_as="step_2")[1] == [[1, 0]]
    assert measured(task_of([0, 1]), "run/step_2") == (rows, [])  # an earlier stage is read, never written


@pytest.mark.parametrize("sizes, shares", [((9, 2), [["ab", "ef"], ["cd", "gh"]]), ((9, 9), [["abcd"], ["efgh"]])])
def test_processes_take_batches_of_one_size(sizes, shares, monkeypatch):
    """Of the smallest of their own sizes, or less, so that none is without a batch."""
    monkeypatch.setattr(processes, "processes", lambda: 2)
    for rank, size in enumerate(sizes):
        monkeypatch.setattr(processes, "all_processes", lambda rank=rank: types.SimpleNamespace(process_index=rank))
        monkeypatch.setattr(processes, "gathered", lambda items, size=size: sizes if items == [size] else items)
        rounds = processes.shared_rounds([*"abcdefgh"], size, enumerate)
        assert ["".join(item for item, _ in results) for results in rounds] == shares[rank]


SHARED = """
import json, os, pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_evaluation import rows_of, task_of, toy_model
folder, model = pathlib.Path(sys.argv[1]), toy_model()
rows = rows_of(task_of([0, 0, 1, 2, 2, 3, 4, 5, 5, 6]), model, None, folder / "rows.jsonl")
(folder / f"rank{{os.environ['RANK']}}.json").write_text(json.dumps([rows, model.batches]))
"""


@pytest.mark.slow
def test_two_processes_share_what_is_missing_of_one(tmp_path):
    alone, task = toy_model(), task_of([0, 0, 1, 2, 2, 3, 4, 5, 5, 6])
    rows = rows_of(task, alone, None, tmp_path / "alone.jsonl")
    lines = (tmp_path / "alone.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines[:3]))
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(root=str(ROOT), tests=str(ROOT / "tests")), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(torchrun(script, str(tmp_path)), check=True, env=environment, timeout=300)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    assert [of_rank[0] for of_rank in ranks] == [rows, rows], "every process gets the rows"
    assert all(batches for _, batches in ranks)
    assert sorted(ranks[0][1] + ranks[1][1]) == sorted(alone.batches)
    assert sorted((tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The table and the report


def delta(mean, low, high, p, n=80, changed=60, clusters=None, changed_clusters=None) -> dict:
    ends = {"mean": mean, "low": low, "high": high, "p": p}
    return {**ends, "n": n, "changed": changed, "clusters": clusters, "changed_clusters": changed_clusters}


def test_the_table_is_plain_and_says_when_nothing_can_be_seen(capsys, monkeypatch):
    clear, unclear = delta(0.81234, 0.5, 1.1, 0.0002), delta(-0.01, -0.2, 0.15, 0.71)
    rows = [("MT-Bench", 4.12345, 4.93579, clear), ("ppl", 3.5, 3.49, unclear), ("n", None, 2, None)]
    rows.append(("m", 17300.4, 2.8051e-05, delta(-17300.4, -18000.0, 0.00012345, 0.02)))
    print_table("Результат", [TableRow(*row) for row in rows])
    out = capsys.readouterr().out
    lines = {line.split()[0]: " ".join(line.split()) for line in out.split("\n") if line.split()}
    assert lines["MT-Bench"] == "MT-Bench 4.123 4.936 +0.8123 [0.5000, 1.100] 0.0002* 60/80"
    assert "no detectable change" in lines["ppl"] and "0.71" in lines["ppl"]
    assert "17300 2.8e-05 -17300 [-18000, 0.00012]" in lines["m"]
    assert max(map(len, out.split("\n"))) <= 120
    assert all(ord(letter) < 128 for letter in out.replace("Результат", ""))
    monkeypatch.setenv("COLUMNS", "80")
    print_table("narrow", [TableRow(*row) for row in rows])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any(line.startswith("ppl: 60/80 changed, no detectable") for line in lines)


def test_the_widest_table_fits_120_columns(capsys):
    long = max((metric.title for metric in METRICS.values()), key=len)
    wide = delta(-0.1234567, -0.1234567, -0.0123456, 0.00012345, n=1668, changed=1234)
    unclear = delta(-0.0023456, -0.012345, 0.0123456, 0.12, n=1668, changed=1234)
    print_table("wide", [TableRow(long, 0.12345, 0.12345, wide), TableRow("short", 0.12345, 0.12345, unclear)])
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= 120 and "..." not in out
    words = " ".join(out.split())
    assert "no detectable change; a loss above 0.012 is excluded" in words, out


def test_the_verdict_follows_the_test():
    assert verdict(delta(0.5, 0.1, 0.9, 0.01)) == ""
    assert verdict(delta(-0.1, -0.56, 0.3, 0.6)) == "no detectable change; a loss above 0.56 is excluded"
    rise = verdict(delta(-0.1, -0.56, 0.3, 0.6), lower_is_better=True)
    assert rise == "no detectable change; a rise above 0.3 is excluded"
    assert verdict(delta(0.04, 0.0, 0.19, 0.25, n=40, changed=3)) == "too few to tell"
    in_tables = delta(0.04, 0.0, 0.19, 0.25, n=40, changed=12, clusters=8, changed_clusters=3)
    assert verdict(in_tables) == "in 3 of 8 clusters: too few to tell"
    assert verdict({**in_tables, "changed": 5}) == "too few to tell"  # the items say it
    assert verdict(delta(2.0, None, None, 1.0, n=1, changed=1)) == "too few to tell"
    assert verdict(stats.paired_delta([], [])) == ""


def test_p_values_that_holm_keeps_are_marked(capsys):
    rows = [TableRow(f"m{n}", 1, 2, delta(1, 0.5, 1.5, p)) for n, p in enumerate([0.01, 0.04, 0.03, 0.005])]
    print_table("t", rows)
    out = capsys.readouterr().out
    assert "4 p values; 2 (*) stay below 0.05 after Holm's correction" in out
    assert [f"{p}*" in out for p in ("0.01", "0.04", "0.03", "0.005")] == [True, False, False, True]


def test_an_interval_without_width_from_too_few_changes_is_not_shown():
    rows = [TableRow("m", 1.0, 1.0, delta(0.0, 0.0, 0.0, 1.0, n=10, changed=0)), TableRow("n", 1.0, 2.0)]
    texts, note = evaluation.table_texts(rows)
    assert texts[0][3:6] == ["+0.000", "none", "1 "] and texts[1] == ["n", "1.000", "2.000"] and "1 p " in note


def test_rows_are_paired_by_id():
    before, after = [{"question_id": n, "x": n} for n in (1, 2, 3)], [{"question_id": n, "x": -n} for n in (3, 1, 4)]
    pairs = evaluation.pair_rows(before, after)
    assert pairs == [(before[2], after[0]), (before[0], after[1])]
    assert evaluation.values_of(pairs, lambda row: row["x"]) == ([3, 1], [-3, -1])
    with pytest.raises(files.InputError):
        evaluation.pair_rows(before, [{"question_id": "1"}])


def test_the_report_fills_record_metrics_and_table(tmp_path, capsys):
    def compare(before, after):
        sides = evaluation.values_of(evaluation.pair_rows(before, after), lambda row: row["x"])
        return {"val_loss": stats.paired_delta(*sides)}

    def summarise(rows):
        return {"val_loss": sum(row["x"] for row in rows) / len(rows)}

    task = Evaluation(name="validation", items=[], read=read, summarise=summarise, compare=compare)
    rows = [[{"question_id": n, "x": n + shift} for n in range(8)] for shift in (0, 2)]
    record = {"baseline": {}, "final": {"drift": 0.25}, "delta": {}, "runtime_s": {"train": 3}}
    evaluation.report(record, tmp_path, [task], {"validation": rows[0]}, {"validation": rows[1][::-1]})
    assert record["baseline"] == {"val_loss": 3.5} and record["final"] == {"val_loss": 5.5, "drift": 0.25}
    assert record["delta"]["val_loss"]["mean"] == 2 and record["delta"]["val_loss"]["n"] == 8
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics == {key: record[key] for key in ("baseline", "final", "delta")}
    out = capsys.readouterr().out
    assert METRICS["val_loss"].title in out and METRICS["drift"].title in out and "perplexity" not in out


@pytest.mark.parametrize("name", evaluation.SCORED)
def test_every_metric_that_a_gate_may_name_has_a_difference(name):
    row = {"question_id": 11, "category": "c", "turns": ["Q"], "answers": ["A"], "rewards": [1.0], "scores": [5.0]}
    rows = [row | {"scores_logged": [5.0], "answer_tokens": [3], "finished": [True]}]
    compared = compare_scored(name, rows, rows).keys() | {f"{name}_{kind}" for kind in evaluation.HEALTH}
    task = Evaluation(name=name, items=[], read=read)
    assert set(evaluation.metrics_of([task])) == compared
    with pytest.raises(files.InputError, match="not measured in this run"):
        evaluation.asked_gates(f"{name}_published=-0.1", [task])
    with pytest.raises(files.InputError, match="own_drift"):  # of an adapter that is trained on
        evaluation.asked_gates("own_drift=1", [Evaluation(name="retention", items=[], read=read)], own_drift=False)


def test_lost_answers_and_warning_signs_are_in_the_short_table():
    """A share that stays level can hide many lost answers, and a margin can rise while the chosen answer falls."""
    pairs = {"accuracy": 60.0, "margin": 0.1, "chosen_log_prob": -9.0, "margin_by_length": 0.8, "n": 80}
    deltas = {
        "retention": {**delta(0.0, -9.0, 9.0, 1.0), "lost": 12, "gained": 11},
        "chosen_log_prob": delta(-9.0, -10.0, -8.0, 0.0002),
        "reward_margin": delta(0.1, 0.05, 0.2, 0.0002),
    }
    rows = evaluation.table_rows({}, {"retention": {"right": 50.0}, "held_out": pairs}, deltas, "headline")
    figures = {row.title.strip(): row.after for row in rows}
    assert (figures["lost"], figures["gained"]) == (12, 11)
    assert figures["held-out pairs, chosen log-prob."] == -9.0
    assert figures["held-out pairs, margin by length, r"] == 0.8
    learned, lost, _ = evaluation.in_short(deltas)
    assert "margin" in learned and lost == "lost: nothing"  # a sign is no loss


def test_kinds_are_in_the_table_of_one_side_and_nothing_is_learned_there():
    """`mtbench_eval.py` and a run without a baseline have no difference to hold the kinds."""
    kinds = {"en": {"right": 100.0}, "ru": {"right": 0.0}}
    final = {"retention": {"right": 50.0, "by_type": kinds}, "tatqa": {"em": 10.0, "by_type": {"count": {"em": 10.0}}}}
    rows = [(row.title, row.after, row.delta) for row in evaluation.table_rows({}, final, {}, "full")]
    assert rows == [
        ("retention, % right", 50.0, None), ("  en", 100.0, None), ("  ru", 0.0, None),
        ("TAT-QA, official EM, %", 10.0, None), ("  count", 10.0, None),
    ]  # fmt: skip
    assert evaluation.in_short({}) == []


def test_the_table_is_as_long_as_the_flag_says(tmp_path, capsys):
    summary = {"avg": 5.0, "raw_mean": 1.0, "by_turn": [6.0, 4.0], "by_category": {"math": 5.0}}
    rows = evaluation.table_rows({}, {"mtbench": summary}, {}, "full")
    assert [(row.title, row.before, row.after) for row in rows] == [
        ("MT-Bench, 1-10", None, 5.0),
        ("  turn 1", None, 6.0),
        ("  turn 2", None, 4.0),
        ("  math", None, 5.0),
        ("MT-Bench, raw reward", None, 1.0),
    ]
    for table, shown in (("full", ["MT-Bench", "math", "raw"]), ("headline", ["MT-Bench"])):
        record = {
            "args": {"table": table},
            "baseline": {},
            "final": {"mtbench": summary},
            "delta": {},
            "runtime_s": {},
        }
        evaluation.report(record, tmp_path, [], {}, {})
        out = capsys.readouterr().out
        assert [word for word in ("MT-Bench", "math", "raw") if word in out] == shown


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_run_whose_figures_are_not_finite_has_failed(tmp_path, monkeypatch, figure):
    def add(record, *_):
        record["final"] |= {"val_loss": figure, "mtbench": {}}

    monkeypatch.setattr(evaluation, "add_figures", add)
    record = {side: {} for side in ("baseline", "final", "delta", "runtime_s")}
    with pytest.raises(NotFiniteError):
        evaluation.report(record, tmp_path, [types.SimpleNamespace(name="validation")], {}, {})
    assert not [*tmp_path.iterdir()]
