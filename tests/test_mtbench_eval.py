"""What measures: questions, answers, rewards, scales, evaluation that survives kill -9, command line."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_error, write_rows
from toys import rows_of, save_reward_model, sentences

import mtbench_eval as me
from llm_alignment import files, generation, prompts, rewards, scores
from llm_alignment.generation import Decoding
from llm_alignment.hub import adapter_files_sha256

# ---------------------------------------------------------------------------------------------------------------------
# questions


def test_questions_of_every_shape(tmp_path):
    rows = [
        {"question_id": 7, "category": "math", "turns": ["a\u2028b", "c"]},
        {"question_id": 8, "prompt": "p"},
        {"question_id": 9, "question": "q"},
        {"text": "t"},
    ]
    lines = me.load_questions(str(write_rows(tmp_path / "q.jsonl", rows)))
    assert [q["turns"] for q in lines] == [["a\u2028b", "c"], ["p"], ["q"], ["t"]]
    assert [q["question_id"] for q in lines] == [7, 8, 9, 4]
    assert lines[0]["category"] == "math"
    listed = tmp_path / "q.json"
    listed.write_text(json.dumps(rows), encoding="utf-8")
    assert me.load_questions(str(listed)) == lines


GOOD = '{"question_id": 1, "turns": ["a"]}\n'
BAD_FILES = [
    ("", "no questions"),
    ('[{"question_id": 1, "turns": ["a"]}, {"quest', "not valid JSON"),
    (GOOD + '{"question_id": 2, "tur', "q.jsonl:2"),
    (GOOD + '{"question_id": 2, "turns": []}\n', "q.jsonl:2: no turns"),
    ('{"question_id": 1, "turns": ["a", " "]}\n', "q.jsonl:1: no turns"),
    ('{"question_id": 1, "answer": "a"}\n', "q.jsonl:1: no turns"),
    (GOOD + "\n" + GOOD, "q.jsonl:3: duplicate question_id 1 (first at q.jsonl:1)"),
    ('{"question_id": [1], "turns": ["a"]}\n', "q.jsonl:1: question_id [1]"),
    ('{"question_id": {"n": 1}, "turns": ["a"]}\n', "q.jsonl:1: question_id"),
    ('{"question_id": 1.5, "turns": ["a"]}\n', "q.jsonl:1: question_id 1.5"),
    ('{"question_id": 1, "turns": null, "prompt": null}\n', "q.jsonl:1: no turns"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_bad_question_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "q.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(files.InputError) as error:
        me.load_questions(str(path))
    assert message in str(error.value) and "q.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_column_that_is_null_counts_as_absent(tmp_path):
    rows = [
        {"question_id": None, "category": None, "turns": None, "prompt": "a"},
        {"question_id": 7.0, "category": "math", "turns": ["b"], "prompt": None},  # whole numbers of a table with gaps
    ]
    assert me.load_questions(str(write_rows(tmp_path / "q.jsonl", rows))) == [
        {"question_id": 1, "category": "general", "turns": ["a"]},
        {"question_id": 7, "category": "math", "turns": ["b"]},
    ]


def test_greedy_results_are_those_of_every_seed():
    def task(temperature, seed):
        reward_model = SimpleNamespace(fingerprint={})
        return scores.scored_evaluation("mtbench", [], Decoding(8, temperature, seed=seed), reward_model)

    assert task(0.0, 1).settings == task(0.0, 2).settings and task(0.7, 1).settings != task(0.7, 2).settings
    assert task(0.0, 1).is_cached and not task(0.7, 1).is_cached


def test_the_limit_is_a_seeded_sample_in_file_order(tmp_path):
    rows = [{"question_id": n, "turns": [str(n)]} for n in range(40)]
    first = me.load_questions(str(write_rows(tmp_path / "a.jsonl", rows)), limit=10, seed=3)
    ids = [q["question_id"] for q in first]
    assert len(ids) == 10 and ids == sorted(ids) and ids != list(range(10))
    shuffled = me.load_questions(str(write_rows(tmp_path / "b.jsonl", rows[::-1])), limit=10, seed=3)
    assert {q["question_id"] for q in shuffled} == set(ids)
    other = me.load_questions(str(tmp_path / "a.jsonl"), limit=10, seed=4)
    assert other != first


def test_an_unreachable_hub_is_told_at_once(tmp_path, monkeypatch):
    from huggingface_hub.errors import HTTPError

    def unreachable(*args, **kw):
        raise HTTPError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(files.InputError, match="--mtbench_file"):
        me.load_questions("auto", flag="--mtbench_file")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


@pytest.fixture
def questions():
    texts = sentences(15, seed=2)
    return [
        {"question_id": n, "category": "ab"[n % 2], "turns": [texts[n]] if n == 4 else [texts[n], texts[n + 5]]}
        for n in range(9)
    ]


@pytest.fixture
def evaluate(model, tokenizer, reward_model, questions, tmp_path):
    def run(path="results.jsonl", *, questions=questions, model=model, tokens=10, **options):
        decoding = Decoding(tokens, batch_size=4)
        task = scores.scored_evaluation("mtbench", questions, decoding, reward_model)
        options = {"fingerprint": {"model": "m"}} | options
        return rows_of(task, model, tokenizer, tmp_path / path, **options)

    return run


def test_two_turns_with_their_history(evaluate, model, tokenizer, reward_model):
    rows = evaluate()
    assert [row["question_id"] for row in rows] == list(range(9))
    for row in rows:
        conversation: list[dict] = []
        for turn, (asked, answer) in enumerate(zip(row["turns"], row["answers"], strict=True)):
            conversation.append({"role": "user", "content": asked})
            (alone,) = generation.generate(model, tokenizer, [conversation], Decoding(10))
            assert prompts.strip_thinking(alone.text) == answer
            conversation.append({"role": "assistant", "content": answer})
            assert reward_model.score([conversation])[0] == pytest.approx(row["rewards"][turn], abs=1e-4)
        assert row["scores"] == [rewards.to_score(r) for r in row["rewards"]]
        assert row["scores_logged"] == [rewards.to_logged_scale(r) for r in row["rewards"]]
        assert len(row["finished"]) == len(row["answer_tokens"]) == len(row["turns"])
    summary = scores.summarise_scored("mtbench", rows)["mtbench"]
    assert summary["n"] == 9 and set(summary["by_category"]) == {"a", "b"} and len(summary["by_turn"]) == 2
    per_question = [sum(row["scores"]) / len(row["scores"]) for row in rows]
    assert summary["avg"] == pytest.approx(sum(per_question) / 9)
    assert summary["by_turn"][1] == pytest.approx(sum(row["scores"][1] for row in rows if row["question_id"] != 4) / 8)


def test_an_interrupted_evaluation_goes_on_to_the_same_rows(evaluate, tmp_path):
    whole = evaluate("whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().split(b"\n")
    for kept in (1, 3, 6, 9):  # the fingerprint, part of the first batch, ..., and half a line
        path = tmp_path / f"cut{kept}.jsonl"
        path.write_bytes(b"\n".join(lines[:kept]) + b"\n" + lines[kept][:17])
        assert evaluate(path.name) == whole
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert evaluate("whole.jsonl", model=None) == whole, "a finished evaluation asks nothing again"


def test_another_fingerprint_is_refused_by_name(evaluate, questions, tmp_path):
    evaluate()
    content = (tmp_path / "results.jsonl").read_bytes()
    for change, key in (
        ({"fingerprint": {"model": "other"}}, "model"),
        ({"tokens": 11}, "generation"),
        ({"questions": questions[1:]}, "questions"),
    ):
        with pytest.raises(files.InputError, match=key):
            evaluate(**change)
    assert (tmp_path / "results.jsonl").read_bytes() == content


def test_a_resumed_run_measures_anew_and_keeps_what_it_had(evaluate, tmp_path):
    path, other = tmp_path / "rows.jsonl", {"model": "m", "adapter": "other"}
    evaluate(path)
    earlier = path.read_bytes()
    with pytest.raises(files.InputError, match="adapter"):
        evaluate(path, fingerprint=other)
    assert path.read_bytes() == earlier
    evaluate(path, fingerprint=other, renew=True)
    assert path.with_name("rows.jsonl.old").read_bytes() == earlier
    assert path.read_bytes().count(b"\n") == earlier.count(b"\n") and b"other" in path.read_bytes()


def test_an_answer_that_only_thinks_scores_as_empty(evaluate, questions, reward_model, monkeypatch):
    def thinker(model, tokenizer, conversations, *_, **__):
        for index in range(len(conversations)):
            yield generation.Answer(index, "<think>and so on", 10, False, 8)

    monkeypatch.setattr(generation, "generate", thinker)
    row = evaluate(questions=questions[:1])[0]
    asked = {"role": "user", "content": questions[0]["turns"][0]}
    empty = reward_model.score([[asked, {"role": "assistant", "content": ""}]])[0]
    assert row["answers"][0] == "" and row["rewards"][0] == pytest.approx(empty, abs=1e-4)
    assert scores.summarise_scored("mtbench", [row])["mtbench"]["unfinished"] == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture(scope="module")
def cli_folder(tmp_path_factory, model, tokenizer, reward_folder):
    folder = tmp_path_factory.mktemp("cli")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = sentences(80, seed=3)
    rows = [{"question_id": n, "category": "ab"[n % 2], "turns": texts[2 * n : 2 * n + 2]} for n in range(40)]
    write_rows(folder / "questions.jsonl", rows)
    return folder


def flags(folder: Path, reward_folder: str, output: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder / "model"), "--no_4bit", "--reward_model", reward_folder),
        *("--questions", str(folder / "questions.jsonl"), "--output_dir", str(output)),
        *("--exp_log", str(output.parent / "log.jsonl"), "--mtbench_max_tokens", "12", "--no-do_retention", *more),
    ]


def test_the_command_line(cli_folder, reward_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    first = me.main(flags(cli_folder, reward_folder, tmp_path / "one", "--limit", "6"))
    assert first["status"] == "completed" and first["final"]["mtbench"]["n"] == 6 and first["delta"] == {}
    earlier = str(tmp_path / "one" / "mtbench.jsonl")
    second = me.main(
        flags(cli_folder, reward_folder, tmp_path / "two", "--limit", "6", "--mtbench_max_tokens", "4")
        + ["--compare", earlier, "--eval_batch_size", "3", "--exp_tag", "short"]
        + ["--do_retention", "--retention_limit", "5"]
    )
    assert second["delta"]["mtbench"]["n"] == 6 and second["tag"] == "short"
    names = {"mtbench.jsonl", "retention.jsonl", "metrics.json", "mtbench.png", "run.json", "run.log"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names and second["final"]["retention"]["n"] == 5
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text("utf-8"))
    assert metrics["final"]["mtbench"] == second["final"]["mtbench"]
    assert metrics["delta"]["mtbench"]["mean"] == pytest.approx(
        second["final"]["mtbench"]["avg"] - first["final"]["mtbench"]["avg"]
    )
    assert [record["tag"] for record in files.read_records(tmp_path / "log.jsonl")] == ["", "short"]
    assert "MT-Bench, 1-10" in capsys.readouterr().out
    # the folder of another evaluation is refused and stays as it was
    before = {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    with pytest.raises(SystemExit) as stop:
        me.main(flags(cli_folder, reward_folder, tmp_path / "two", "--limit", "7"))
    assert stop.value.code == 2 and "questions" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "two").iterdir()} == before


def test_another_adapter_in_the_same_folder_is_another_evaluation(
    cli_folder, reward_folder, model, tmp_path, monkeypatch, capsys
):
    from peft import LoraConfig, get_peft_model

    def save_adapter():
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)  # other values each time
        get_peft_model(copy.deepcopy(model), lora).save_pretrained(tmp_path / "adapter")

    monkeypatch.setattr(me, "report_results", lambda *_: None)
    argv = flags(cli_folder, reward_folder, tmp_path / "out", "--limit", "1", "--adapter", str(tmp_path / "adapter"))
    save_adapter()
    record = me.main(argv)
    assert record["data"]["adapter"] == adapter_files_sha256(tmp_path / "adapter")
    save_adapter()
    assert record["data"]["adapter"] != adapter_files_sha256(tmp_path / "adapter")
    assert "holds results of another evaluation (adapter: " in run_error(capsys, me.main, *argv)


def test_the_folder_of_a_training_run_is_left_alone(cli_folder, reward_folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"script": "sft_train.py"}', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        me.main(flags(cli_folder, reward_folder, tmp_path / "run"))
    assert stop.value.code == 2 and "holds another run" in capsys.readouterr().err
    assert [path.read_text("utf-8") for path in (tmp_path / "run").iterdir()] == ['{"script": "sft_train.py"}']


def test_bad_input_is_one_line_and_exit_code_2(cli_folder, reward_folder, tmp_path, capsys):
    good = flags(cli_folder, reward_folder, tmp_path / "out")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text('{"peft_type": "LO', encoding="utf-8")
    lines = [{"fingerprint": {}}, {"question_id": 81, "rewards": [1.0]}]
    files.write_rows(tmp_path / "of_another_kind.jsonl", lines)
    columns = {name: [1.0] for name in ("rewards", "scores", "scores_logged", "answer_tokens", "finished")}
    row = {"question_id": 81, "turns": ["a"], **columns}
    for number, change in enumerate([{"scores": ["7"]}, {"scores": []}, {"rewards": None}, {"scores": [math.nan]}]):
        lines = [{"fingerprint": {"reward_model": {}, "generation": {}}}, row | change]
        files.write_rows(tmp_path / f"scores{number}.jsonl", lines)
    files.write_rows(tmp_path / "settings.jsonl", [{"fingerprint": {"reward_model": "x", "generation": {}}}, row])
    earlier = ["of_another_kind.jsonl", *(f"scores{number}.jsonl" for number in range(4)), "settings.jsonl"]
    for flag, path in (
        ("--questions", tmp_path / "missing.jsonl"), ("--model", cli_folder), ("--adapter", cli_folder),
        ("--reward_model", cli_folder / "model"), ("--adapter", damaged), ("--exp_log", cli_folder),
        ("--output_dir", cli_folder / "questions.jsonl"), ("--compare", cli_folder / "questions.jsonl"),
        *(("--compare", tmp_path / name) for name in earlier),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            me.main([*good, flag, str(path)])
        errors = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
        assert stop.value.code == 2 and len(errors) == 1, (flag, path)
    assert not (tmp_path / "out").exists()


def test_flags_of_training_are_not_taken(capsys):
    for flag in (["--report_to", "none"], ["--epochs", "1"]):
        with pytest.raises(SystemExit) as stop:
            me.main(["--demo", *flag])
        assert stop.value.code == 2 and flag[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_is_over_the_questions_that_both_answered(cli_folder, reward_folder, tmp_path, tokenizer, capsys):
    me.main(flags(cli_folder, reward_folder, tmp_path / "few", "--limit", "6"))
    earlier = ["--compare", str(tmp_path / "few" / "mtbench.jsonl")]
    record = me.main(flags(cli_folder, reward_folder, tmp_path / "many", "--mtbench_max_tokens", "4", *earlier))
    out = capsys.readouterr().out
    assert "differences on the 6 that both" in " ".join(out.split()) and "max_new_tokens: 12 -> 4" in out
    before, after = record["baseline"]["mtbench"], record["final"]["mtbench_compared"]
    assert before["n"] == after["n"] == record["delta"]["mtbench"]["n"] == 6
    assert record["delta"]["mtbench"]["mean"] == pytest.approx(after["avg"] - before["avg"])
    whole = me.main(flags(cli_folder, reward_folder, tmp_path / "whole", "--mtbench_max_tokens", "4"))
    assert record["final"]["mtbench"] == whole["final"]["mtbench"] and whole["final"]["mtbench"]["n"] == 40
    metrics = json.loads((tmp_path / "many" / "metrics.json").read_text("utf-8"))
    assert metrics["final"] == record["final"]
    other = save_reward_model(tmp_path / "other", tokenizer, initializer_range=0.3)
    for more in ([], ["--dry_run"]):
        with pytest.raises(SystemExit) as stop:
            me.main(flags(cli_folder, other, tmp_path / "third", *more, *earlier))
        assert stop.value.code == 2 and "another reward model" in capsys.readouterr().err
    me.main(flags(cli_folder, reward_folder, tmp_path / "third", "--dry_run", *earlier))
    assert "as the model reads it" in capsys.readouterr().out and not (tmp_path / "third").exists()


def test_a_byte_order_mark_is_no_error_and_half_a_character_is(tmp_path):
    rows = [{"question_id": 1, "turns": ["a"]}, {"question_id": 2, "turns": ["\u0444"]}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "bom.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    for name in ("bom.jsonl", "bom.json"):
        assert [question["turns"] for question in me.load_questions(str(tmp_path / name))] == [["a"], ["\u0444"]]
    write_rows(tmp_path / "half.jsonl", [{"text": "whole"}])
    with (tmp_path / "half.jsonl").open("ab") as file:
        file.write(b'{"text": "\\ud83e\\udd8a"}\n{"text": "\\ud83e"}\n')
    skipped = files.SkippedRows()
    assert [row["text"] for _, row in files.read_rows(tmp_path / "half.jsonl", skipped)] == ["whole", "\U0001f98a"]
    assert skipped.places == ["half.jsonl:3 (invalid Unicode (unpaired surrogate))"]


def test_a_dry_run_asks_nothing(cli_folder, reward_folder, tmp_path, capsys):
    me.main(flags(cli_folder, reward_folder, tmp_path / "out", "--dry_run"))
    assert "40 questions, 80 answers" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_judge_scores_pairs_that_it_reads_as_they_are_written(tmp_path, capsys):
    pairs = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(4)]
    path = write_rows(tmp_path / "pairs.jsonl", [*pairs[:3], pairs[3] | {"chosen": "So.<|im_end|>"}])
    argv = [
        "--demo",
        "--check_judge",
        str(path),
        "--output_dir",
        str(tmp_path / "o"),
        "--exp_log",
        str(tmp_path / "l"),
    ]
    me.main([*argv, "--dry_run"])
    out = capsys.readouterr().out
    assert "3 pairs for the judge" in out and "agrees" not in out
    assert "leave out --adapter" in run_error(capsys, me.main, *argv, "--adapter", "a")
    assert me.main(argv)["final"]["judge"]["groups"]["all"]["n"] == 3


def test_a_turn_reads_the_conversation_before_it(tokenizer):
    questions = [{"turns": ["rivers", "and lakes"]}, {"turns": ["rivers"]}]
    first, second = (len(tokenizer(text)["input_ids"]) for text in ("rivers", "and lakes"))
    expected = (first + 10) + (first + 10 + second + 10) + (first + 10)
    assert scores.conversation_tokens(questions, 10, tokenizer) == expected


@pytest.mark.slow
def test_kill_9_loses_and_repeats_no_question(cli_folder, reward_folder, tmp_path):
    def command(output: Path) -> list[str]:
        return flags(cli_folder, reward_folder, output, "--no_baseline_cache", "--eval_batch_size", "2")

    def size(path: Path) -> int:
        return path.stat().st_size if path.exists() else 0

    me.main(command(tmp_path / "whole"))
    whole = (tmp_path / "whole" / "mtbench.jsonl").read_bytes()
    killed = tmp_path / "killed" / "mtbench.jsonl"
    for share in (0.25, 0.6):
        words = [sys.executable, str(ROOT / "mtbench_eval.py"), *command(tmp_path / "killed")]
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while size(killed) < share * len(whole):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert 0 < size(killed) < len(whole)
    me.main(command(tmp_path / "killed"))
    assert killed.read_bytes() == whole
    ids = [json.loads(line)["question_id"] for line in whole.split(b"\n")[1:] if line]
    assert sorted(ids) == list(range(40))
