"""The laboratory: logged runs can be found and repeated as they were, and the report says what the records say."""

from __future__ import annotations

import html.parser
import importlib
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_alignment import files

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
rerun = importlib.import_module("rerun")
report = importlib.import_module("report")

LOGGED = {run["id"]: run for run in rerun.load_records(rerun.LOGGED_RUNS)}
COMMANDS = {name: run["command"] for name, run in LOGGED.items() if run["command"]}


# ---------------------------------------------------------------------------------------------------------------------
# Records, written by hand in the form that the scripts write
# ---------------------------------------------------------------------------------------------------------------------


def summary(avg: float, avg_logged: float, raw: float) -> dict:
    categories = {"writing": avg - 0.5, "math": avg + 0.25, "roleplay": avg + 0.25}
    return {
        "avg": avg,
        "avg_logged": avg_logged,
        "raw_mean": raw,
        "by_turn": [avg + 0.1, avg - 0.1],
        "by_category": categories,
        "n": 12,
        "answer_tokens": 51.5,
        "unfinished": 0.0,
    }


def delta(mean: float, low: float, high: float, p: float, n: int = 12) -> dict:
    return {"mean": mean, "low": low, "high": high, "p": p, "n": n}


def make_record(tag: str, script: str = "sft_train.py", **changes) -> dict:
    record = {
        "ts": "2025-01-02T03:04:05Z",
        "tag": tag,
        "script": script,
        "argv": ["--demo", "--exp_tag", tag],
        "args": {
            "demo": False,
            "model": "Qwen/Qwen3-1.7B",
            "subset": "both",
            "sample_ratio": 0.25,
            "kl_coef": 0.03,
            "kl_start_step": 200,
            "kl_warmup_steps": 300,
            "kl_limit_seq": 128,
            "seed": 42,
        },
        "git": "0123456789ab",
        "versions": {"torch": "2.13.0"},
        "device": {"name": "cpu", "dtype": "float32", "processes": 1, "threads": 2},
        "data": {"rows": {"tatqa_pairs": 1234, "skipped": 0}},
        "baseline": {"val_loss": 1.50123456, "ppl": 4.48721, "mtbench": summary(5.5, 2.0625, 0.25)},
        "final": {"val_loss": 1.2504321, "ppl": 3.4918, "mtbench": summary(5.75, 2.375, 0.4)},
        "delta": {
            "val_loss": delta(-0.25080246, -0.3, -0.2, 0.0002),
            "mtbench": delta(0.25, -0.125, 0.625, 0.21),
            "mtbench_raw": delta(0.15, 0.0625, 0.3, 0.03),
        },
        "runtime_s": {"baseline": 10.0, "train": 60.0, "final": 10.0, "total": 84.0},
        "kept_step": None,
        "status": "completed",
        "output_dir": f"no_such_folder_{tag}",
    }
    return record | changes


TATQA_TYPES = {"span": {"em_like": 50.0, "em": 45.0, "f1": 52.0, "n": 10}}


def make_dpo_record(tag: str) -> dict:
    return make_record(
        tag,
        "dpo_train.py",
        baseline={
            "tatqa": {"em_like": 40.0, "em": 30.0, "f1": 41.5, "by_type": TATQA_TYPES, "n": 20},
            "mtbench": summary(5.5, 2.0625, 0.25),
            "instruct": summary(6.0, 6.25, 1.0) | {"success_rate": 36.0, "check_rate": 61.0},
        },
        final={
            "tatqa": {
                "em_like": 55.0,
                "em": 35.0,
                "f1": 47.5,
                "by_type": {"span": TATQA_TYPES["span"] | {"em_like": 62.5}},
                "n": 20,
            },
            "mtbench": summary(5.75, 2.375, 0.4),
            "instruct": summary(6.5, 6.375, 1.25) | {"success_rate": 44.0, "check_rate": 63.0},
        },
        delta={"tatqa": delta(15.0, 5.0, 25.0, 0.00001, 20), "instruct": delta(0.5, 0.25, 0.75, 0.01, 25)},
    )


def write_log(path: Path, *records: dict) -> Path:
    for record in records:
        files.append_record(path, record)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# rerun.py: the command
# ---------------------------------------------------------------------------------------------------------------------


def powershell_words(line: str) -> list[str]:
    """The arguments that PowerShell gives a program for `line` (about_Parsing, about_Quoting_Rules).

    Raises ValueError where PowerShell would expand, pipe, or otherwise not take the characters as they are.
    """
    single, double = "'\u2018\u2019\u201a\u201b", '"\u201c\u201d\u201e'
    words, i = [], 0
    while i < len(line):
        if line[i] in " \t":
            i += 1
            continue
        start, word = i, ""
        while i < len(line) and line[i] not in " \t":
            c = line[i]
            if c in single or c in double:
                quotes, at_start, i = (single if c in single else double), i == start, i + 1
                while line[i] not in quotes or line[i + 1 : i + 2] in (*quotes,):
                    if quotes is double and line[i] in "$`":
                        raise ValueError(f"{line[i]} is expanded within double quotes")
                    i += 2 if line[i] in quotes else 1
                    word += line[i - 1]
                i += 1
                if at_start:  # a string at the start of an argument is all of it
                    break
            elif c in ";|&<>(){}$`" or (i == start and c in "@#~\u2013\u2014\u2015"):
                raise ValueError(f"{c} has a meaning of its own")
            elif c == ",":
                break
            else:
                word += c
                i += 1
        bare = line[start:i]
        words += re.split(r"(?=\.)|(?<=:)", bare, maxsplit=1) if re.match(r"-[A-Za-z_?]+[.:]", bare) else [word]
        if line[i : i + 1] == ",":  # an array: its items become arguments of their own
            i += 1
    return words


def test_the_powershell_rules_of_this_test_split_what_powershell_splits():
    assert powershell_words("a 'b c' \"d e\" 'it''s' x=1") == ["a", "b c", "d e", "it's", "x=1"]
    assert powershell_words("--target_modules q_proj,v_proj") == ["--target_modules", "q_proj", "v_proj"]
    assert powershell_words("'a'b") == ["a", "b"]
    assert powershell_words("-x.y") == ["-x", ".y"]
    for line in ('"$home"', "a;b", "a`b", "(a)", "@a"):
        with pytest.raises(ValueError):
            powershell_words(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_logged_command_is_printed_to_the_letter_and_both_shells_read_it_alike(name, capsys):
    assert rerun.main([name, "--print"]) == 0
    printed = capsys.readouterr().out
    assert printed == COMMANDS[name] + "\n"
    assert powershell_words(printed.strip()) == shlex.split(printed) == COMMANDS[name].split(" ")


@given(st.lists(st.text(max_size=12) | st.text(alphabet="a1 '\"$`!\\,;-.:#@~%\u2019\u201c\u2014", max_size=8)))
def test_any_argument_reads_the_same_in_both_shells_or_is_refused(words):
    try:
        line = rerun.command_line("sft_train.py", words)
    except files.InputError:
        return
    assert "\n" not in line
    assert shlex.split(line)[4:] == words
    assert powershell_words(line)[4:] == words


@pytest.mark.parametrize(
    "word", ["it's", "C:\\new folder", "q_proj,v_proj", "C:\\O'Brien\\runs", 'say "hi"', "100%", "$x", "", "ответ"]
)
def test_ordinary_arguments_can_be_written_for_both_shells(word):
    line = rerun.command_line("sft_train.py", [word])
    assert shlex.split(line)[4:] == powershell_words(line)[4:] == [word]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--kl_coef", "0.05"], "--a 1 --kl_coef 0.05 --do_eval"),
        (["--kl_coef=0.05"], "--a 1 --kl_coef=0.05 --do_eval"),
        (["--no-do_eval"], "--a 1 --kl_coef 0.02 --no-do_eval"),
        (["--seed", "-1", "--dry_run"], "--a 1 --kl_coef 0.02 --do_eval --seed -1 --dry_run"),
    ],
)
def test_changes_replace_a_flag_in_its_place_or_are_added(changes, expected):
    assert " ".join(rerun.apply_changes(["--a", "1", "--kl_coef", "0.02", "--do_eval"], changes)) == expected


def test_an_empty_value_is_not_a_word_of_its_own():
    """Windows PowerShell 5.1 would drop it, and the next flag would become the value."""
    assert rerun.join_empty(["--load_adapter", "", "--seed", "1"]) == ["--load_adapter=", "--seed", "1"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_logged_command_is_accepted_by_its_script(name):
    script = pytest.importorskip(LOGGED[name]["script"].removesuffix(".py"))
    script.build_parser().parse_args(rerun.run_arguments(LOGGED[name]))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["Exp3-8B"], ["not logged", "kl_coef 0.02", "Qwen/Qwen3-8B"]),
        (["S9"], ["S9", "--list"]),
        (["nowhere.jsonl:3"], ["nowhere.jsonl"]),
        (["logged_runs.jsonl:4000"], ["4000"]),
        (["S4", "0.05"], ["0.05", "--flag value"]),
    ],
)
def test_what_cannot_be_rerun_is_one_line_and_exit_code_2(argv, words, capsys):
    assert rerun.main([*argv, "--print"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words)


# ---------------------------------------------------------------------------------------------------------------------
# rerun.py: records, and running
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def laboratory(tmp_path, monkeypatch) -> Path:
    """A project folder with an empty experiments/ folder that rerun.py and report.py take for theirs."""
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(rerun, "HERE", tmp_path / "experiments")
    return tmp_path


def test_a_record_is_found_by_tag_and_by_line_and_the_newest_tag_counts(laboratory, capsys):
    log = write_log(
        laboratory / "experiments" / "sft_experiments.jsonl",
        make_record("twice", ts="2025-01-02T00:00:00Z", argv=["--seed", "2"]),
        make_record("twice", ts="2025-01-01T00:00:00Z", argv=["--seed", "1"]),
    )
    for name in ("twice", "sft_experiments.jsonl:1", f"{log}:1"):
        assert rerun.main([name, "--print"]) == 0
        assert capsys.readouterr().out == "poetry run python sft_train.py --seed 2\n"
    assert rerun.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "sft_experiments.jsonl:2" in listed and "twice" in listed and "S4" in listed


def test_a_rerun_uses_this_python_and_gives_back_the_exit_code(laboratory, capfd):
    script = "import sys; print(sys.executable, sys.argv[1:]); sys.exit(7)"
    (laboratory / "sft_train.py").write_text(script, encoding="utf-8")
    write_log(
        laboratory / "experiments" / "sft_experiments.jsonl", make_record("mine", argv=["--a", "x y", "--b", "1"])
    )
    assert rerun.main(["mine", "--b", "2"]) == 7
    printed, ran = capfd.readouterr().out.strip().split("\n")
    assert printed == "poetry run python sft_train.py --a 'x y' --b 2"
    assert ran == f"{sys.executable} ['--a', 'x y', '--b', '2']"


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_lets_the_script_save_and_gives_back_130(laboratory):
    (laboratory / "sft_train.py").write_text(
        "import pathlib, sys, time\n"
        "try:\n    print('ready', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.6); pathlib.Path(__file__).with_name('saved').touch(); sys.exit(130)\n",
        encoding="utf-8",
    )
    log = write_log(laboratory / "log.jsonl", make_record("mine"))
    code = f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import pathlib, rerun\n"
    code += f"rerun.HERE = pathlib.Path({str(laboratory / 'experiments')!r}); sys.exit(rerun.main([{f'{log}:1'!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )  # fmt: skip
    while "ready" not in process.stdout.readline():
        pass
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (laboratory / "saved").exists()


def append_many(path: Path, writer: int, count: int) -> None:
    for number in range(count):
        files.append_record(path, {"writer": writer, "number": number, "text": "длинная строка " * 40})


def test_eight_processes_append_whole_lines_to_one_log(tmp_path):
    path, count = tmp_path / "log.jsonl", 60
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(path, writer, count)) for writer in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    seen = sorted((row["writer"], row["number"]) for row in map(json.loads, lines))
    assert seen == [(writer, number) for writer in range(8) for number in range(count)]


def test_a_line_torn_by_a_crash_is_skipped_with_a_warning_and_the_rest_is_used(tmp_path, caplog):
    log = write_log(tmp_path / "log.jsonl", make_record("one"))
    with log.open("ab") as file:
        file.write(json.dumps(make_record("torn")).encode()[:200])
    write_log(log, make_record("two"))
    logging.getLogger("llm_alignment").propagate = True
    runs = [run.name for run in report.load_runs([log]) if run.is_new]
    assert runs == ["one", "two"]
    assert "log.jsonl:2" in caplog.text
    assert rerun.find_run(f"{log}:3")["tag"] == "two"


# ---------------------------------------------------------------------------------------------------------------------
# report.py: tables and plots
# ---------------------------------------------------------------------------------------------------------------------


def tables(markdown: str) -> list[list[dict[str, str]]]:
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
    cells = [row[column] for rows in tables(markdown) for row in rows if row.get("Run") == name and column in row]
    assert cells, f"no {column} of {name}"
    return cells[0]


def figures_in(cell: str) -> list[float]:
    return [float(text) for text in re.findall(r"[-+]?\d+\.?\d*(?:e-?\d+)?", cell)]


@pytest.fixture(scope="module")
def logged_report(tmp_path_factory) -> Path:
    """The report on the published runs alone."""
    folder = tmp_path_factory.mktemp("report")
    report.write_report([], folder)
    return folder


def test_the_committed_report_is_what_the_committed_records_give(logged_report):
    for path in logged_report.rglob("*.*"):
        if path.suffix == ".md":
            committed = (EXPERIMENTS / path.name).read_text(encoding="utf-8")
            assert path.read_text(encoding="utf-8") == committed, f"run experiments/report.py: {path.name}"
        else:
            assert (EXPERIMENTS / "plots" / path.name).exists()


def test_every_logged_figure_is_in_the_tables_as_it_was_logged(logged_report):
    text = (logged_report / "RESULTS.md").read_text(encoding="utf-8")
    columns = {
        "val_loss": "Val loss",
        "ppl": "PPL",
        "mtbench_avg": "MT-Bench avg",
        "tatqa": "TAT-QA, %",
        "instruct_avg": "Instruction avg",
        "instruct_success": "Instruction success, %",
        "finance_instruct": "Finance-Instruct avg",
        "reddit": "Reddit avg",
        "tatqa_delta_pp": "TAT-QA, %",
        "mtbench_delta": "MT-Bench avg",
        "instruct_delta": "Instruction avg",
        "pairs": "Pairs",
    }
    checked = 0
    for name, run in LOGGED.items():
        for key, value in (run["figures"] or {}).items():
            if key in columns:
                assert figures_in(row_of(text, name, columns[key])) == (value if isinstance(value, list) else [value])
                checked += 1
            elif key == "tatqa_by_type":
                for kind, pair in value.items():
                    assert figures_in(row_of(text, name, kind)) == pair
        if run["figures"] and not run["measured"]:
            assert "not measured" in row_of(text, name, "Origin")
            assert "not measured" in row_of(text, name, "TAT-QA, %")
    assert checked > 70
    assert "2.7721" in row_of(text, "S3", "Questions")


def test_the_logs_hold_every_logged_command_and_figure(logged_report):
    text = "".join((logged_report / name).read_text(encoding="utf-8") for name in report.LOGS)
    for name, run in LOGGED.items():
        section = text.split(f"\n## {name}: ")[1].split("\n## ")[0]
        assert run["command"] is None or f"\n{run['command']}\n" in section
        for value in rerun.flatten(run["figures"] or {}).values():
            shown = figures_in(section)
            assert all(figure in shown for figure in (value if isinstance(value, list) else [value]))
        assert run.get("note", "") in section
        assert ("Not measured" in section) == (bool(run["figures"]) and not run["measured"])


def test_new_runs_stand_beside_the_logged_ones_and_are_told_apart(tmp_path):
    log = write_log(
        tmp_path / "log.jsonl",
        make_record("a|b"),
        make_record("S4", status="failed", reason="the loss is nan", final={}, delta={}),
        make_dpo_record("mine"),
    )
    runs = report.load_runs([log])
    text = report.results(runs, {})
    assert row_of(text, "a\\|b", "Origin") == "new" and row_of(text, "S1", "Origin") == "logged"
    assert row_of(text, "a\\|b", "Val loss") == "1.5012 -> 1.2504"
    assert row_of(text, "a\\|b", "MT-Bench avg") == "2.0625 -> 2.375"  # the published scale
    assert row_of(text, "S4", "Val loss") == "1.4698 -> 1.2672"  # the published run keeps its name
    assert row_of(text, "S4 (log.jsonl:2)", "Origin") == "new, failed"
    assert row_of(text, "S4 (log.jsonl:2)", "Val loss") == "1.5012 -> -"
    assert "the loss is nan" in text
    assert row_of(text, "mine", "TAT-QA, %") == "40 -> 55" and row_of(text, "mine", "span") == "50 -> 62.5"
    changes = {(row["Run"], row["Metric"]): row for rows in tables(text) for row in rows if "95 % interval" in row}
    score = changes["a\\|b", "MT-Bench, 1-10"]
    assert score["Before -> after"] == "5.5 -> 5.75" and score["Difference"] == "+0.25"
    assert score["95 % interval"] == "-0.125 to +0.625" and score["p"] == "0.21"
    assert score["Reading"] == "no detectable change"
    assert changes["mine", "TAT-QA, as published, %"]["p"] == "< 0.0001"
    log_text = report.experiment_log("SFT", [run for run in runs if report.is_sft(run)], report.SFT_COLUMNS)
    assert "poetry run python sft_train.py --demo --exp_tag 'a|b'" in log_text and tables(log_text)


def test_the_same_records_give_the_same_files_and_no_plot_is_blank(tmp_path):
    from matplotlib import image

    runs = [make_record("one"), make_dpo_record("two"), make_record("three", "dpo_train_mt.py")]
    for run in runs:
        run["output_dir"] = str(tmp_path / run["tag"])
        (tmp_path / run["tag"]).mkdir()
        lines = [
            {"step": step, "loss": 2 - step / 10, "nll": 1.9 - step / 10, "kl": step / 50} for step in range(1, 9)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / run["tag"] / "train_log.jsonl").write_text(text, encoding="utf-8")
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


# ---------------------------------------------------------------------------------------------------------------------
# report.py: comparing, power
# ---------------------------------------------------------------------------------------------------------------------

FINGERPRINT = {"model": "tiny", "adapter": "none", "max_new_tokens": 64}


def write_answers(path: Path, scores: dict[str, float], *, answer: str, **settings) -> None:
    lines = [{"fingerprint": FINGERPRINT | settings}]
    for name, score in scores.items():
        lines.append({
            "question_id": name,
            "category": "writing",
            "turns": [f"Question {name}?", "And then?"],
            "answers": [f"{answer} first {name}", f"{answer} second {name}"],
            "rewards": [score - 5, score - 4],
            "scores": [score, score],
            "scores_logged": [score, score],
            "answer_tokens": [3, 3],
            "finished": [True, True],
        })
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


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


def test_two_runs_are_compared_over_shared_questions_and_the_page_shows_both_answers(tmp_path, capsys):
    a, b = tmp_path / "run_a", tmp_path / "run_b"
    hostile = "<script>alert('x')</script><img src=http://example.com/x.png>"
    write_answers(a / "mtbench_final.jsonl", {"1": 5.0, "2": 5.0, "3": 5.0, "only a": 1.0}, answer="old")
    write_answers(b / "mtbench_final.jsonl", {"3": 9.0, "2": 5.0, "1": 4.0}, answer=hostile, max_new_tokens=8)
    log = write_log(tmp_path / "log.jsonl", make_record("tagged", output_dir=str(b)))
    argv = ["--compare", str(a), "tagged", "--exp_log", str(log), "--output_dir", str(tmp_path)]
    assert report.main(argv) == 0
    captured = capsys.readouterr()
    assert "max_new_tokens: 64 / 8" in captured.err
    assert "3 shared questions" in captured.out
    path = next(tmp_path.glob("compare_*_tagged.html"))
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "old second 1" in page.text and f"{hostile} second 1" in page.text and "only a" not in page.text
    places = [page.text.index(f"{name}: writing") for name in ("3", "1", "2")]
    assert places == sorted(places), "the question that changed most comes first"
    assert "5 -> 9 (+4)" in page.text and "2 of 3 questions" in page.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["S4", "S3"], ["S4", "published"]),
        (["empty", "empty"], ["_final.jsonl"]),
        (["a", "b"], ["no question in common"]),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(names, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_answers(tmp_path / "a" / "mtbench_final.jsonl", {"1": 5.0}, answer="")
    write_answers(tmp_path / "b" / "mtbench_final.jsonl", {"2": 5.0}, answer="")
    assert report.main(["--compare", *names, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


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
    assert report.main(["--power", str(tmp_path)]) == 0
    lines = {int(n): float(x) for n, x in re.findall(r"n = +(\d+): .*? of (\d+\.\d+)", capsys.readouterr().out)}
    spread = (40 / 39) ** 0.5
    assert lines[80] == pytest.approx(2.8016 * spread / 80**0.5, abs=0.006) and {32, 40, 160} <= lines.keys()


def test_nothing_heavy_is_imported_before_the_arguments_are_parsed():
    code = "import sys, rerun, report; print(*{'torch', 'numpy', 'scipy', 'matplotlib', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXPERIMENTS, check=True)
    assert run.stdout.strip() == ""
