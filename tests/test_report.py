"""The report says what the records say: tables, plots, two runs compared, power."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_rows, write_rows
from run_records import (
    EXPERIMENTS,
    delta,
    make_dpo_record,
    make_record,
    plots,
    records,
    report,
    tables,
    write_log,
)

from llm_alignment import evaluation

LOGGED = {run["id"]: run for run in records.load_records(records.LOGGED_RUNS)}


def markdown_tables(markdown: str) -> list[list[dict[str, str]]]:
    """Every Markdown table as rows {header: cell}; asserts that each row has as many cells as the header."""
    found, lines = [], markdown.split("\n")
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|( --- \|)+", line):
            split = lambda text: [cell.strip() for cell in re.split(r"(?<!\\)\|", text.strip("|"))]  # noqa: E731
            header, rows = split(lines[i - 1]), []
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                cells = split(row)
                assert len(cells) == len(header), row
                rows.append(dict(zip(header, cells, strict=True)))
            assert rows, lines[i - 1]
            found.append(rows)
    return found


def row_of(markdown: str, name: str, column: str) -> str:
    rows = (row for rows in markdown_tables(markdown) for row in rows if row.get("Run") == name and column in row)
    return next(rows)[column]


def differences(markdown: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of the table of differences by run and metric."""
    rows = (row for rows in markdown_tables(markdown) for row in rows if "95 % interval" in row)
    return {(row["Run"], row["Metric"]): row for row in rows}


def figures_in(cell: str) -> list[float]:
    return [float(text) for text in re.findall(r"[-+]?\d+\.?\d*(?:e-?\d+)?", cell)]


@pytest.fixture(scope="module")
def logged_report(tmp_path_factory) -> Path:
    """The report on what is committed: the published runs and the recorded ones."""
    folder = tmp_path_factory.mktemp("report")
    report.write_report([EXPERIMENTS / "recorded_runs.jsonl"], folder)
    return folder


def test_the_committed_report_is_what_the_committed_records_give(logged_report):
    for path in logged_report.rglob("*.*"):
        if path.suffix == ".md":
            committed = (EXPERIMENTS / path.name).read_text(encoding="utf-8")
            assert path.read_text(encoding="utf-8") == committed, f"run experiments/report.py: {path.name}"
        else:
            assert (EXPERIMENTS / "plots" / path.name).exists()


def test_the_first_lines_hold_the_figures_of_the_records(logged_report):
    text = (logged_report / "RESULTS.md").read_text("utf-8")
    top = text.partition("\n## ")[0].split("\n- ")
    runs = records.merge_seeds(records.load_runs([records.RECORDED_RUNS]))
    p_values = [row.delta["p"] for run in runs if not run.is_logged for row in tables.delta_rows(run)]
    p_values = [p for p in p_values if p is not None]
    assert any(figures_in(line)[:2] == [len(p_values), sum(p < 0.05 for p in p_values)] for line in top)
    drift = next(run for run in runs if run.name == "gemma-270m-kl0.1-lr2e-3").delta["drift"]
    recipes = markdown_tables(top[0])[0]  # real models first, each without anchor and replay first
    row = next(row for row in recipes if row["Records"] == "gemma-270m-kl0.1-lr2e-3")
    assert row["Anchor, replay"] == "KL 0.1"
    assert figures_in(row["drift, KL from the base"]) == pytest.approx(
        [drift[key] for key in ("mean", "low", "high")], rel=5e-3
    )
    assert [row["Anchor, replay"] for row in recipes][:2] == ["none", "KL 0.1"]
    assert len(top) < 16 and any("GPU" in line for line in top)


def test_every_logged_figure_is_in_the_tables_as_it_was_logged(logged_report):
    text = (logged_report / "RESULTS.md").read_text(encoding="utf-8")
    changes = {"tatqa_delta_pp": "tatqa", "mtbench_delta": "mtbench", "instruct_delta": "instruct"}
    finals = {"val_loss_final": "val_loss", "ppl_final": "ppl", "mtbench_avg_final": "mtbench"}
    metrics = {key: key for key in records.PUBLISHED} | {"mtbench_avg": "mtbench", "instruct_avg": "instruct"}
    checked = 0
    for name, run in LOGGED.items():
        for key, value in (run["figures"] or {}).items():
            metric = (metrics | changes | finals).get(key)
            if run["script"] == "dpo_train_mt.py" and key == "instruct_success":
                metric = "finance_success"  # these runs' instructions are Finance-Instruct's
            if metric or key == "pairs":
                cell = row_of(text, name, "Pairs" if key == "pairs" else records.PUBLISHED[metric].title)
                assert figures_in(cell.replace("- -> ", "")) == (value if isinstance(value, list) else [value])
                checked += 1
            elif key == "tatqa_by_type":
                for kind, pair in value.items():
                    assert figures_in(row_of(text, name, kind)) == pair
        if run["figures"] and not run["measured"]:
            assert "not measured" in row_of(text, name, "Origin")
            assert "not measured" in row_of(text, name, "TAT-QA, %")
    assert checked > 70
    assert "2.7721" in row_of(text, "S3", "Questions")


def test_every_published_run_is_one_row_and_its_settings_are_noted(logged_report):
    text = (logged_report / "RESULTS.md").read_text(encoding="utf-8")
    sections = text.split("## TAT-QA by answer type")[0]
    rows = [row for rows in markdown_tables(sections) for row in rows]
    names = [row["Run"] for row in rows if row.get("Origin", "").startswith("logged")]
    assert sorted(names) == sorted(LOGGED) and len(names) == 36
    notes = text.split("## Notes")[1]
    for name, run in LOGGED.items():
        if "settings" in run:
            line = next(line for line in notes.split("\n") if run["settings"] in line)
            assert re.search(rf"\b{re.escape(name)}\b", line)


def test_no_column_holds_two_measures_of_instruction_following():
    runs = tables.DPO.of(records.load_runs([]))
    mine = records.from_record(make_dpo_record("mine") | {"place": "log.jsonl:1"})
    text = tables.runs_tables([*runs, mine], tables.DPO.columns)
    for column in records.PUBLISHED["instruct"].title, records.PUBLISHED["instruct_success"].title:
        assert "published runs only" in column
        assert row_of(text, "mine", column) == "-" and row_of(text, "beta_003_lora_16_32", column) != "-"
    checks = records.PUBLISHED["checks"].title
    assert row_of(text, "mine", checks) == "61.00 -> 63.00" and row_of(text, "beta_003_lora_16_32", checks) == "-"


def test_the_logs_hold_every_logged_command_and_figure(logged_report):
    text = "".join((logged_report / name).read_text(encoding="utf-8") for name in tables.LOGS)
    for name, run in LOGGED.items():
        section = text.split(f"\n## {name}: ")[1].split("\n## ")[0]
        assert run["command"] is None or f"\n{run['command']}\n" in section
        for value in records.flatten(run["figures"] or {}).values():
            shown = figures_in(section)
            figures = value if isinstance(value, list) else [value]
            assert all(figure in shown for figure in figures if figure is not None)
        assert run.get("note", "") in section and run.get("settings", "") in section
        assert ("Not measured" in section) == (bool(run["figures"]) and not run["measured"])


def test_new_runs_stand_beside_the_logged_ones_and_are_told_apart(tmp_path):
    failed = make_record("S4", status="failed", reason="the loss is nan", final={}, delta={})
    log = write_log(tmp_path / "log.jsonl", make_record("a|b"), failed, make_dpo_record("mine"))
    runs = records.load_runs([log])
    text = tables.results(runs, [], {})
    assert row_of(text, "a\\|b", "Origin") == "new" and row_of(text, "S1", "Origin") == "logged"
    assert row_of(text, "a\\|b", "Val loss") == "1.501 -> 1.250"
    assert row_of(text, "a\\|b", "MT-Bench avg") == "2.062 -> 2.375"  # the published scale
    assert row_of(text, "S4", "Val loss") == "1.4698 -> 1.2672"  # the published run keeps its name
    assert row_of(text, "S4 (log.jsonl:2)", "Origin") == "new, failed"
    assert row_of(text, "S4 (log.jsonl:2)", "Val loss") == "1.501 -> -"
    assert "the loss is nan" in text
    assert row_of(text, "mine", "TAT-QA, %") == "40.00 -> 55.00" and row_of(text, "mine", "span") == "50.00 -> 62.50"
    changes = differences(text)
    score = changes["a\\|b", "MT-Bench, 1-10"]
    assert score["Before -> after"] == "5.500 -> 5.750" and score["Difference"] == "+0.2500"
    assert score["95 % interval"] == "\\[-0.1250, 0.6250]" and score["p"] == "0.21"
    # a p of 0.03 among these does not pass Holm's correction: what the table says of it differs
    alone, kept = changes["a\\|b", "MT-Bench, raw reward"], changes["mine", "TAT-QA, published metric, %"]
    assert alone["p"] == "0.03" and kept["p"] == "1e-05*" and alone["Reading"] != kept["Reading"]
    log_text = tables.experiment_log("sft_experiments_qwen3_1_7b.md", runs)
    assert "poetry run python sft_train.py --demo --exp_tag 'a|b'" in log_text and markdown_tables(log_text)


@pytest.mark.slow
def test_the_same_records_give_the_same_files_and_no_plot_is_blank(tmp_path):
    from matplotlib import image

    runs = [make_record("one"), make_dpo_record("two"), make_record("three", "dpo_train_mt.py")]
    for run in runs:
        run["output_dir"] = str(tmp_path / run["tag"])
        (tmp_path / run["tag"]).mkdir()
        steps = ({"step": n, "loss": 2 - n / 10, "nll": 1.9 - n / 10, "kl": n / 50} for n in range(1, 9))
        write_rows(tmp_path / run["tag"] / "train_log.jsonl", list(steps))
        (tmp_path / run["tag"] / "run.json").write_text(json.dumps({"ts": run["ts"]}), encoding="utf-8")
    log = write_log(tmp_path / "log.jsonl", *runs)
    first, second = (report.write_report([log], tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    pictures = {path.name: image.imread(path) for path in first if path.suffix == ".png"}
    wanted = "sft_val_loss sft_mtbench sft_curves sft_trade_off dpo_tatqa tatqa_types mt_reddit"
    assert {f"{name}.png" for name in wanted.split()} <= pictures.keys()
    for name, pixels in pictures.items():
        assert pixels.shape[0] > 300 and pixels.shape[1] > 800, name
        ink = (pixels[..., :3].min(axis=-1) < 0.9).mean()
        assert 0.005 < ink < 0.5, f"{name}: {ink:.3f} of the pixels are not white"
        assert (pixels[[0, -1], :, :3] > 0.99).all(), f"{name} is cut off"
    (tmp_path / "one" / "run.json").unlink()
    run = records.from_record(runs[0] | {"place": "log.jsonl:1"})
    assert plots.plot_curves("curves", [run]) is None


# ---------------------------------------------------------------------------------------------------------------------
# Noise of the published baselines; several seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_the_noise_is_that_of_the_logged_baselines_and_marks_what_lies_within_twice_it(logged_report):
    runs = {run.name: run for run in records.load_runs([])}
    spreads = {spread.title: spread for spread in tables.mark_noise(list(runs.values()))}
    assert len(spreads) == 6 and not any("MT-Bench EN" in title for title in spreads)  # four equal greedy figures
    russian = spreads["MT-Bench RU, Qwen3-1.7B, 50 questions"]
    assert sorted(russian.baselines) == [1.4, 1.48, 1.63, 1.72, 1.76]
    assert russian.of_baselines == pytest.approx(0.1543, abs=1e-4)
    assert russian.of_differences == pytest.approx(0.2183, abs=1e-4)
    assert russian.interval() == pytest.approx((0.13, 0.63), abs=0.005)
    assert "dpo-quickstart" not in {run.name for run in russian.runs}  # it repeats another run's figures
    assert "mtbench" in runs["beta_002_lora_32_64"].in_noise  # +0.39 of 2 * 0.218
    assert sorted(spreads["TAT-QA, Qwen3-1.7B, 1668 questions"].baselines) == [42.6, 42.7, 43.0, 43.5, 43.5]
    assert sorted(spreads["TAT-QA, Qwen3-1.7B, 250 questions"].baselines) == [40.4, 40.8, 42.4, 43.2, 43.6]
    assert not any("tatqa" in runs[name].in_noise for name in ("beta_003_lora_16_32", "beta_002_2epochs"))
    assert "tatqa" in runs["hybrid_2way"].in_noise and "progressive_2stage" in runs
    assert not runs["progressive_2stage"].in_noise
    text = (logged_report / "RESULTS.md").read_text(encoding="utf-8")
    assert "within noise" in row_of(text, "beta_002_lora_32_64", "MT-Bench avg")
    assert "within noise" not in row_of(text, "beta_002_lora_32_64", "TAT-QA, %")


def seed_record(seed: int, shift: float) -> dict:
    record = make_record(f"mine-seed{seed}", ts=f"2025-01-0{seed}T00:00:00Z", output_dir=f"no_folder_{seed}")
    record["args"] = record["args"] | {"seed": seed, "output_dir": f"no_folder_{seed}", "exp_tag": f"mine-seed{seed}"}
    record["delta"]["mtbench"] = delta(0.25 + shift, 0.05 + shift, 0.45 + shift, 0.02, 40)
    return record


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path):
    other = seed_record(3, 0.0)
    other["args"]["kl_coef"] = 0.5
    old = seed_record(1, 9.0) | {"ts": "2024-01-01T00:00:00Z"}  # the newest record of a seed counts
    log = write_log(tmp_path / "log.jsonl", old, seed_record(1, -0.1), seed_record(2, 0.1), other)
    runs = records.merge_seeds(records.load_runs([log]))
    mine = [run for run in runs if not run.is_logged]
    assert [run.name for run in mine] == ["mine, 2 seeds", "mine-seed3"]
    combined = mine[0].delta["mtbench"]
    # by hand: sd of 0.15 and 0.35 is 0.1414, of_seeds 0.01; each interval is 0.4 wide: of_questions (0.2 / 1.96) ** 2
    assert combined["mean"] == pytest.approx(0.25) and combined["sd"] == pytest.approx(0.02**0.5)
    variance = 0.01 + (0.2 / 1.96) ** 2
    freedom = variance**2 / (0.01**2 / 1 + (0.2 / 1.96) ** 4 / 39)
    from scipy import stats

    assert combined["high"] - combined["mean"] == pytest.approx(stats.t.ppf(0.975, freedom) * variance**0.5)
    text = tables.results(runs, [], {})
    assert row_of(text, "mine, 2 seeds", "Origin") == "new, 2 seeds"
    changes = differences(text)
    assert changes["mine, 2 seeds", "MT-Bench, 1-10"]["SD over seeds"] == "0.1414"
    assert changes["mine-seed3", "MT-Bench, 1-10"]["SD over seeds"] == "-"
    log_text = tables.experiment_log("sft_experiments_qwen3_1_7b.md", runs)
    assert "\n## mine-seed1 (log.jsonl:2)\n" in log_text and "\n## mine-seed2\n" in log_text
    assert plots.plot_seeds("seeds", runs) is not None


@pytest.mark.parametrize("change", [{"base": "b"}, {"data": {"adapter": "b"}}])
def test_another_base_or_adapter_of_the_same_name_is_another_row(change, tmp_path):
    stood_on = {"base": "a", "data": {"adapter": "a"}}
    rows = [seed_record(1, 0.0) | stood_on, seed_record(2, 0.1) | stood_on, seed_record(3, 0.2) | stood_on | change]
    runs = records.merge_seeds(records.load_runs([write_log(tmp_path / "log.jsonl", *rows)]))
    assert [run.name for run in runs if not run.is_logged] == ["mine, 2 seeds", "mine-seed3"]


def test_a_difference_that_one_seed_does_not_have_is_no_row(tmp_path):
    """Where no answer changed its length there is no difference at equal length."""
    nothing = dict.fromkeys(("mean", "low", "high", "p")) | {"changed": 0}
    members = [seed_record(1, 0.0), seed_record(2, 0.1)]
    for record, equal_length in zip(members, (nothing, {}), strict=True):
        record["delta"]["mtbench_equal_length"] = delta(0.1, -0.1, 0.3, 0.4) | equal_length
    runs = records.merge_seeds(records.load_runs([write_log(tmp_path / "log.jsonl", *members)]))
    text = tables.results(runs, [], {})
    assert "mine, 2 seeds | MT-Bench, 1-10" in text and "at equal length" not in text.partition("## Differences")[2]


@pytest.mark.parametrize(
    ("count", "seed_sd", "question_sd", "both_sd"), [(2, 0.3, 1.0, 1.0), (3, 0.0, 1.0, 2.0), (5, 0.5, 0.5, 1.0)]
)
def test_the_interval_over_seeds_and_questions_covers(count, seed_sd, question_sd, both_sd):
    """Differences of 40 questions at each seed: effects of the seed, of the question, and of both together."""
    import numpy

    rng, covered, repeats = numpy.random.default_rng(1), 0, 600
    for _ in range(repeats):
        rows = 0.4 + rng.normal(0, seed_sd, (count, 1)) + rng.normal(0, question_sd, 40)
        rows = rows + rng.normal(0, both_sd, (count, 40))
        reach = 1.96 * rows.std(axis=1, ddof=1) / 40**0.5
        of_seeds = [
            delta(m, m - r, m + r, 0.5, 40) for m, r in zip(rows.mean(axis=1).tolist(), reach.tolist(), strict=True)
        ]
        combined = records.combine(of_seeds)
        covered += combined["low"] <= 0.4 <= combined["high"]
    assert covered / repeats >= 0.93


def test_names_are_texts_and_stay_within_their_frame(tmp_path):
    hostile = "<img src=x onerror=alert(1)>&lt;b&gt; [x](javascript:y) ``` end"
    long = "a_very_long_name_of_a_run_that_nobody_would_want_to_read_in_a_plot_" * 3
    untagged = make_record("", output_dir="/somewhere/of/mine/my_folder")
    for record, kl_coef in ((untagged, 1.0), (hostile_record := make_record(hostile), 2.0)):
        record["args"] = record["args"] | {"kl_coef": kl_coef}
    log = write_log(tmp_path / "log.jsonl", hostile_record, untagged, make_record(long, reason="a <b>bold</b> reason"))
    runs = records.load_runs([log])
    assert [run.name for run in runs if not run.is_logged] == [hostile, "my_folder", long]
    for text in (
        tables.results(runs, [], {"plots/x.png": hostile}),
        tables.experiment_log("sft_experiments_qwen3_1_7b.md", runs),
    ):
        outside = re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.DOTALL)
        assert "<img" not in outside and "<b>" not in outside and "\n[x]" not in outside
        assert "my_folder" in outside and markdown_tables(text)
    new = [run for run in runs if not run.is_logged]
    for figure in (plots.plot_metric("title", "val_loss", new), plots.plot_trade_off("title", new)):
        labels_within(figure)


def labels_within(figure) -> None:
    """Asserts that every text of the figure lies within it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()
    frame = figure.bbox
    for text in figure.findobj(Text):
        if re.search("[a-z]", text.get_text()) and text.get_visible():  # ticks beyond the axis are not drawn
            low, high = frame.min - 1, frame.max + 1
            box = text.get_window_extent()
            assert (low <= box.min).all() and (box.max <= high).all(), text.get_text()


FINGERPRINT = {"model": "tiny", "adapter": "none", "max_new_tokens": 64}


def write_answers(path: Path, scores: dict[str, float], *, answer: str, **settings) -> None:
    lines = [
        {
            "question_id": name, "category": "writing", "turns": [f"Question {name}?", "And then?"],
            "answers": [f"{answer} first {name}", f"{answer} second {name}"], "rewards": [score - 5, score - 4],
            "scores": [score] * 2, "scores_logged": [score] * 2, "answer_tokens": [3, 3], "finished": [True, True],
        }
        for name, score in scores.items()
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [{"fingerprint": FINGERPRINT | settings}, *lines])


def write_held_out(path: Path, margins: dict[str, float], **settings: float) -> None:
    pair = {"chosen": "the good one", "rejected": "the bad one", "rejected_reward": 0.0}
    lines = [{"question_id": name, **pair, "chosen_reward": margin} for name, margin in margins.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [{"fingerprint": FINGERPRINT | settings}, *lines])


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def compared(folder: Path, *argv: str | Path) -> Page:
    """The page of a comparison, which is written into the folder."""
    assert report.main(["--compare", *map(str, argv), "--output_dir", str(folder)]) == 0
    return Page(next(folder.glob("compare_*.html")).read_text(encoding="utf-8"))


def retention_folders(folder: Path, *, without: str = "") -> list[Path]:
    """Two runs with 12 and 4 of 12 retention answers right; the rows lack the key `without`."""
    folders = [folder / "a", folder / "b"]
    for run, right in zip(folders, (12, 4), strict=True):
        path = run / "retention_final.jsonl"
        write_answers(path, {str(n): 5.0 for n in range(12)}, answer="same")
        first, *lines = read_rows(path)
        rows = [row | {"right": n < right, "checks": [n < right]} for n, row in enumerate(lines)]
        write_rows(path, [first, *({key: row[key] for key in row if key != without} for row in rows)])
    return folders


def test_own_questions_without_a_category_are_compared(tmp_path, capsys):
    folders = retention_folders(tmp_path, without="category")
    assert "8 of 12 questions" in compared(tmp_path, *folders).text
    assert "damaged" not in capsys.readouterr().out


def test_retention_is_compared_and_has_power_in_percentage_points(tmp_path, capsys):
    folders = retention_folders(tmp_path)
    page = compared(tmp_path, *folders)
    assert "100.0" in (printed := capsys.readouterr().out) and "33.33" in printed and "-66.67" in printed
    assert "100.00 -> 0.00 (-100.00)" in page.text and "8 of 12 questions" in page.text
    assert report.main(["--power", *map(str, folders)]) == 0 and "percentage points" in capsys.readouterr().out


def test_held_out_pairs_are_compared_and_have_power(tmp_path, capsys):
    for name, margin in (("a/held_out_baseline", 0), ("a/held_out_final", -4.5), ("b/held_out_final", 1)):
        write_held_out(tmp_path / f"{name}.jsonl", {str(n): n * bool(margin) + margin for n in range(12)})
    page = compared(tmp_path, tmp_path / "a", tmp_path / "b")
    printed = capsys.readouterr().out
    assert "held-out pairs, accuracy" in printed and "12 shared questions" in printed
    assert "the good one" in page.text and "reward 12" in page.text
    assert report.main(["--power", str(tmp_path / "a")]) == 0
    assert "of reward margin in 8 of 10 runs" in capsys.readouterr().out


def test_held_out_pairs_of_two_betas_are_compared_in_one_unit(tmp_path, capsys):
    """A reward is beta times a log-ratio, here the same in both runs."""
    for name, beta in (("a", 0.02), ("b", 0.1)):
        margins = {str(n): beta * (n - 4) for n in range(12)}
        write_held_out(tmp_path / name / "held_out_final.jsonl", margins, beta=beta)
    compared(tmp_path, tmp_path / "a", tmp_path / "b")
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith("held-out pairs, chosen log"))
    assert line.split()[4:6] == ["1.500", "1.500"], line


def test_the_baseline_of_a_run_in_stages_is_above_its_stages(tmp_path, capsys):
    write_held_out(tmp_path / "run" / "held_out_baseline.jsonl", {str(n): 0.0 for n in range(12)})
    write_held_out(tmp_path / "run" / "stage3" / "held_out_final.jsonl", {str(n): n for n in range(12)})
    assert report.main(["--power", str(tmp_path / "run")]) == 0
    assert "of reward margin in 8 of 10 runs" in capsys.readouterr().out


def test_two_runs_are_compared_over_shared_questions_and_the_page_shows_both_answers(tmp_path, capsys):
    a, b = tmp_path / "run_a", tmp_path / "run_b"
    hostile = "<script>alert('x')</script><img src=http://example.com/x.png>"
    write_answers(a / "mtbench_final.jsonl", {"1": 5.0, "2": 5.0, "3": 5.0, "only a": 1.0}, answer="old")
    write_answers(b / "mtbench_final.jsonl", {"3": 9.0, "2": 5.0, "1": 4.0}, answer=hostile, max_new_tokens=8)
    log = write_log(tmp_path / "log.jsonl", record := make_record("tagged", output_dir=str(b)))
    other = record | {"args": record["args"] | {"subset": "general"}}
    (a / "run.json").write_text(json.dumps(other), encoding="utf-8")
    page = compared(tmp_path, *(argv := [a, "tagged", "--exp_log", log]))
    captured = capsys.readouterr()
    assert "max_new_tokens: 64 -> 8" in captured.err
    assert "3 shared questions" in captured.out and "run_a" in captured.out.split("difference [")[0]
    assert "subset: general -> both" in captured.out
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "subset: general -> both" in page.text
    assert "old second 1" in page.text and f"{hostile} second 1" in page.text and "only a" not in page.text
    places = [page.text.index(f"{name}: writing") for name in ("3", "1", "2")]
    assert places == sorted(places), "the question that changed most comes first"
    assert "5.00 -> 9.00 (+4.00)" in page.text and "2 of 3 questions" in page.text
    # an evaluation on other questions is left out; the others are compared
    for folder, name in ((a, "1"), (b, "2")):
        write_held_out(folder / "held_out_final.jsonl", {name: 0.5})
    compared(tmp_path, *argv)
    assert "held-out pairs: no question in common, not compared" in capsys.readouterr().err


def test_the_table_of_a_run_is_printed_again_and_mine_are_told_from_the_published(tmp_path, capsys):
    log = write_log(tmp_path / "log.jsonl", record := make_record("tagged", output_dir=str(tmp_path)))
    assert report.main(["--run", "tagged", "--exp_log", str(log)]) == 2
    metrics = {key: record[key] for key in ("baseline", "final", "delta")}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    capsys.readouterr()
    for name in ("tagged", str(tmp_path)):
        assert report.main(["--run", name, "--exp_log", str(log)]) == 0
        out = capsys.readouterr().out
        assert "+0.2500 [-0.1250, 0.6250]" in out and out.startswith("learned: ") and "published scale" not in out
    evaluation.print_results(str(tmp_path), metrics, "headline")
    assert capsys.readouterr().out == out  # as the run itself
    assert report.main(["--run", str(tmp_path), "--table", "full"]) == 0
    assert "published scale" in capsys.readouterr().out
    assert report.main(["--mine", "--table", "full"]) == 2 and "--table goes with" in capsys.readouterr().err
    for wrong in (None, {"val_loss": 5}, {"val_loss": {"mean": 1.0}}):
        (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "delta": wrong}), encoding="utf-8")
        assert report.main(["--run", str(tmp_path)]) == 2 and "metrics.json is damaged" in capsys.readouterr().err
    assert report.main(["--run", "", "--output_dir", str(tmp_path / "report")]) == 2  # not the whole report
    mine = records.load_runs([log, records.RECORDED_RUNS, records.LOGGED_RUNS], mine=True)
    assert [run.name for run in mine] == ["tagged"] and tables.results(mine, [], {})


def test_a_run_in_stages_is_compared_by_its_last_stage(tmp_path, capsys):
    for stage, score in ((1, 2.0), (3, 7.0)):
        path = tmp_path / "staged" / f"stage{stage}" / "mtbench_final.jsonl"
        write_answers(path, {"1": score, "2": score}, answer="text")
    write_answers(tmp_path / "other" / "mtbench_final.jsonl", {"1": 7.0, "2": 8.0}, answer="text")
    page = compared(tmp_path, tmp_path / "staged", tmp_path / "other")
    assert "7.00 -> 8.00 (+1.00)" in page.text and "2.00 ->" not in page.text


@pytest.mark.parametrize(
    ("names", "word"),
    [(["S4", "S3"], "published"), (["empty", "empty"], "_final.jsonl"), (["a", "b"], "no question in common")],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(names, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_answers(tmp_path / "a" / "mtbench_final.jsonl", {"1": 5.0}, answer="")
    write_answers(tmp_path / "b" / "mtbench_final.jsonl", {"2": 5.0}, answer="")
    assert report.main(["--compare", *names, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error


def test_power_is_what_simulated_runs_detect():
    import numpy
    from scipy import stats

    spread, questions = 1.5, 80
    differences = numpy.random.default_rng(0).normal(report.detectable(spread, questions), spread, (4000, questions))
    found = (stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05).mean()
    assert found == pytest.approx(0.80, abs=0.03)


def test_power_is_printed_for_the_spread_of_a_run(tmp_path, capsys):
    before = {str(i): 5.0 for i in range(40)}
    write_answers(tmp_path / "mtbench_baseline.jsonl", before, answer="")
    write_answers(tmp_path / "mtbench_final.jsonl", {name: 4.0 + 2.0 * (int(name) % 2) for name in before}, answer="")
    assert report.main(["--power", *[str(tmp_path)] * 3]) == 2
    assert report.main(["--power", str(tmp_path)]) == 0
    lines = {int(n): float(x) for n, x in re.findall(r"n = +(\d+): .*? of (\d+\.\d+)", capsys.readouterr().out)}
    spread = (40 / 39) ** 0.5
    assert lines[80] == pytest.approx(2.8016 * spread / 80**0.5, abs=0.006) and {32, 40, 160} <= lines.keys()
    assert report.main(["--power", str(tmp_path), "--detect", "0.3"]) == 0
    assert f"n = {math.ceil((2.8016 * spread / 0.3) ** 2)}\n" in capsys.readouterr().out
    assert report.main(["--detect", "0.3"]) == 2


def test_power_pairs_only_questions_of_the_same_text(tmp_path, capsys):
    """MT-Bench's Russian and English questions have the same numbers."""
    for name, language in (("a", "ru"), ("b", "en")):
        write_answers(tmp_path / name / "mtbench_final.jsonl", {"1": 5.0, "2": 6.0}, answer="")
        path = tmp_path / name / "mtbench_final.jsonl"
        write_rows(path, [row | {"turns": [language]} for row in read_rows(path)])
    assert report.main(["--power", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "0 questions shared" in capsys.readouterr().err


@pytest.mark.slow
def test_any_tag_can_be_drawn_and_every_run_has_its_own_picture(tmp_path):
    tags = ["a/b", "a b", "A b", "cost $x_{ and $y", "<b>|`[/]", "я" * 300, "_hidden"]
    log = write_log(tmp_path / "log.jsonl", *[make_record(tag) for tag in tags])
    written = report.write_report([log, records.LOGGED_RUNS], tmp_path)
    assert sum(path.name.startswith("categories_") for path in written) == len(tags)
    assert len({path.name.lower() for path in written}) == len(written)


@pytest.mark.slow
def test_what_the_owner_s_check_measured_is_a_table(tmp_path, monkeypatch):
    """One of its tests, on the CPU: its figure goes into the file, and from there into RESULTS.md."""
    path = tmp_path / "check.json"
    switches = {"LLM_ALIGNMENT_GPU_TESTS": "cpu", "LLM_ALIGNMENT_GPU_CHECK": str(path), "CUDA_VISIBLE_DEVICES": ""}
    command = "-m pytest -q -m gpu -n 0 tests/test_gpu.py -k reward_scores"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=os.environ | switches, check=True)
    monkeypatch.setattr(tables, "GPU_CHECK", path)
    report.write_report([], tmp_path)
    section = (tmp_path / "RESULTS.md").read_text("utf-8").partition("## Checked on a GPU")[2]
    (row, *_) = markdown_tables(section)[0]
    assert section.strip().startswith("card cpu,") and "torch 2." in section
    assert row["Outcome"] == "passed" and row["Figure"] == "largest difference" and float(row["Value"]) < 1e-3
