"""The frame of before and after: metrics, rows by id, the table and its words, plots."""

import json

import pytest

from llm_alignment import evaluation, files, stats
from llm_alignment.evaluation import METRICS, Evaluation, TableRow, print_table, verdict


def delta(mean, low, high, p, n=80, changed=60, clusters=None, changed_clusters=None) -> dict:
    ends = {"mean": mean, "low": low, "high": high, "p": p}
    return {**ends, "n": n, "changed": changed, "clusters": clusters, "changed_clusters": changed_clusters}


def test_the_table_is_plain_and_says_when_nothing_can_be_seen(capsys):
    clear, unclear = delta(0.81234, 0.5, 1.1, 0.0002), delta(-0.01, -0.2, 0.15, 0.71)
    rows = [("MT-Bench", 4.12345, 4.93579, clear), ("ppl", 3.5, 3.49, unclear), ("n", None, 2, None)]
    print_table("Результат", [TableRow(*row) for row in rows])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.split("\n") if line.split()}
    assert "4.123" in lines["MT-Bench"] and "4.936" in lines["MT-Bench"]
    assert "+0.8123 [0.5000, 1.100]" in lines["MT-Bench"] and "0.0002" in lines["MT-Bench"]
    assert "60/80" in lines["MT-Bench"]
    assert "no detectable change" not in lines["MT-Bench"]
    assert "no detectable change" in lines["ppl"] and "0.71" in lines["ppl"]
    assert max(map(len, out.split("\n"))) <= 120
    assert all(ord(letter) < 128 for letter in out.replace("Результат", ""))


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
    assert verdict(delta(0.04, 0.0, 0.19, 0.25, n=40, changed=3)) == "3 of 40 changed: too few to tell"
    in_tables = delta(0.04, 0.0, 0.19, 0.25, n=40, changed=12, clusters=8, changed_clusters=3)
    assert verdict(in_tables) == "12 of 40 changed, in 3 of 8 clusters: too few to tell"
    assert verdict(delta(2.0, None, None, 1.0, n=1, changed=1)) == "1 of 1 changed: too few to tell"
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


def test_numbers_are_short(capsys):
    print_table("t", [TableRow("m", 17300.4, 2.8051e-05, delta(-17300.4, -18000.0, 0.00012345, 0.02))])
    words = " ".join(capsys.readouterr().out.split())
    assert "17300 2.8e-05 -17300 [-18000, 0.00012]" in words


def test_rows_are_paired_by_id():
    before, after = [{"question_id": n, "x": n} for n in (1, 2, 3)], [{"question_id": n, "x": -n} for n in (3, 1, 4)]
    assert evaluation.pair_rows(before, after) == [(before[2], after[0]), (before[0], after[1])]
    with pytest.raises(files.InputError):
        evaluation.pair_rows(before, [{"question_id": "1"}])


def test_the_report_fills_record_metrics_and_table(tmp_path, capsys):
    def compare(before, after):
        pairs = evaluation.pair_rows(before, after)
        return {"tatqa": stats.paired_delta(*([row["x"] for row in side] for side in zip(*pairs, strict=True)))}

    def summarise(rows):
        return {"tatqa": {"em_like": sum(row["x"] for row in rows) / len(rows)}}

    task = Evaluation("tatqa", 8, None, summarise, compare)
    rows = [[{"question_id": n, "x": n + shift} for n in range(8)] for shift in (0, 2)]
    record = {"baseline": {}, "final": {"drift": 0.25}, "delta": {}, "runtime_s": {"train": 3}}
    evaluation.report(record, tmp_path, [task], {"tatqa": rows[0]}, {"tatqa": rows[1][::-1]})
    assert record["baseline"] == {"tatqa": {"em_like": 3.5}} and record["final"]["tatqa"] == {"em_like": 5.5}
    assert record["delta"]["tatqa"]["mean"] == 2 and record["delta"]["tatqa"]["n"] == 8
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics == {key: record[key] for key in ("baseline", "final", "delta")}
    out = capsys.readouterr().out
    assert METRICS["tatqa"].title in out and METRICS["drift"].title in out and "perplexity" not in out


def test_turns_and_categories_get_a_line_each():
    summary = {"avg": 5.0, "by_turn": [6.0, 4.0], "by_category": {"math": 5.0}}
    rows = evaluation.table_rows({}, {"mtbench": summary}, {}, details=True)
    assert [(row.title, row.before, row.after) for row in rows] == [
        ("MT-Bench, 1-10", None, 5.0),
        ("  turn 1", None, 6.0),
        ("  turn 2", None, 4.0),
        ("  math", None, 5.0),
    ]
