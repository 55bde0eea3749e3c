"""Preference pairs of a model's own answers: sampled once, best against worst, nothing that an evaluation asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import DEMO, read_rows, write_rows
from run_records import mine_pairs

from llm_alignment import files, generation, preferences, runs


def mine(folder: Path, prompts: Path, *argv: str) -> int:
    flags = ["--demo", "--prompts", str(prompts), "--output", str(folder / "pairs.jsonl"), "--max_new_tokens", "12"]
    return mine_pairs.main([*flags, *argv])


@pytest.mark.slow
def test_a_stop_and_a_restart_sample_no_prompt_twice_and_give_the_same_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(mine_pairs, "PROMPTS_AT_ONCE", 4)
    prompts = write_rows(tmp_path / "prompts.jsonl", read_rows(DEMO / "prompts.jsonl")[:12])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    assert mine(whole, prompts) == 0
    generate, calls = generation.generate, []

    def stopping(model, tokenizer, chats, *settings, **more):
        calls.append(len(chats))
        if len(calls) == 7:  # in the second chunk of four samples
            raise KeyboardInterrupt
        return generate(model, tokenizer, chats, *settings, **more)

    monkeypatch.setattr(generation, "generate", stopping)
    assert mine(stopped, prompts) == 130
    assert len(read_rows(stopped / "pairs.jsonl.samples.jsonl")) == 1 + 4 and not (stopped / "pairs.jsonl").exists()
    assert mine(stopped, prompts) == 0
    assert len(calls) == 7 + 8  # the first chunk is not sampled again
    rows = read_rows(stopped / "pairs.jsonl.samples.jsonl")[1:]
    assert len({row["question_id"] for row in rows}) == len(rows) == 12
    assert (stopped / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    pairs = read_rows(whole / "pairs.jsonl")
    for pair in pairs:
        row = next(row for row in rows if row["prompt"][0]["content"] == pair["prompt"])
        assert {pair["chosen"], pair["rejected"]} <= set(row["answers"])
        assert pair["margin"] == pair["chosen_reward"] - pair["rejected_reward"] > 0
    assert len(preferences.read_pairs(str(whole / "pairs.jsonl"), "--pairs")) == len(pairs) > 0
    shutil.copytree(DEMO / "reward_model", tmp_path / "other")
    (tmp_path / "other" / "vocab.txt").write_text("of another reward model", encoding="utf-8")
    assert mine(whole, prompts, "--reward_model", str(tmp_path / "other")) == 2  # its scores are not mixed with these


@pytest.mark.parametrize(
    "change",
    [{"prompt": None}, {"rewards": None}, {"rewards": [1.0]}, {"rewards": [1.0, float("nan")]}, {"answers": "ab"}],
)
def test_a_kept_row_that_somebody_edited_is_known(change):
    prompt = [{"role": "user", "content": "Q"}]
    row = {"question_id": files.digest(prompt)[:16], "prompt": prompt, "answers": ["a", "b"], "rewards": [1.0, 2]}
    row |= {"finished": [True, False]}
    assert mine_pairs.is_sample(row, 2) and not mine_pairs.is_sample(row | change, 2)


def test_best_against_worst_of_finished_answers():
    row = {"question_id": "a", "prompt": [{"role": "user", "content": "Q"}], "answers": ["good", "bad", "", "cut"]}
    row |= {"rewards": [2.0, -1.0, -9.0, 9.0], "finished": [True, True, True, False]}
    same = row | {"question_id": "b", "answers": ["one", "one", "one", "one"]}
    pairs, without = mine_pairs.best_against_worst([row, same, row | {"finished": [False] * 4}], 0.0)
    assert without == 2 and len(pairs) == 1
    assert pairs[0]["chosen"] == "good" and pairs[0]["rejected"] == "bad" and pairs[0]["margin"] == 3.0
    assert pairs[0]["prompt"] == "Q"
    assert mine_pairs.best_against_worst([row], 3.0) == ([], 1)


def test_prompts_of_evaluations_are_left_out_and_counted(tmp_path, logged):
    asked = json.loads((DEMO / "mt_bench_en.jsonl").read_text("utf-8").splitlines()[0])["turns"][0]
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"prompt": asked}, {"question": f"Please: {asked}"}, {"prompt": "Something else entirely?"}]
    rows += [
        {"messages": [*dialogue, {"role": "user", "content": "And now?"}, dialogue[1]]},
        {"prompt": 3},
        {"prompt": ""},
    ]
    args = mine_pairs.parse(["--demo", "--prompts", str(write_rows(tmp_path / "p.jsonl", rows))])
    prompts = mine_pairs.read_prompts(args)
    assert [preferences.transcript(prompt["prompt"]) for prompt in prompts] == [
        "Something else entirely?",
        "Human: Hi\n\nAssistant: Hello\n\nHuman: And now?",
    ]
    assert "2 of 4 left out" in logged.text


def test_the_demo_has_prompts_that_no_evaluation_asks():
    assert 230 < len(mine_pairs.read_prompts(mine_pairs.parse(["--demo"]))) <= 240


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x01\n", b'{"text": "x"}\n'])
def test_prompts_that_are_empty_or_no_text_are_one_line_and_exit_code_2(content, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert mine(tmp_path, path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "prompts.jsonl" in error
    assert {file.name for file in tmp_path.iterdir()} <= {"prompts.jsonl"}


def test_a_prompt_ends_with_a_question_and_says_a_system_text_once():
    dialogue = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("system", "Be brief.")]
    turns = [{"role": role, "content": text} for role, text in dialogue]
    for row in ({"messages": turns}, {"messages": turns, "system": "Be brief."}):
        assert mine_pairs.prompt_turns(row) == [{"role": "user", "content": "Be brief.\n\nOne?"}]


def test_pairs_never_replace_what_is_read_and_one_start_at_a_time_writes_them(tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Q"}])
    before = prompts.read_bytes()
    assert mine_pairs.main(["--demo", "--prompts", str(prompts), "--output", str(prompts)]) == 2
    assert "would replace" in capsys.readouterr().err and prompts.read_bytes() == before
    with runs.held_alone(tmp_path / "pairs.jsonl.lock", ""):
        assert mine(tmp_path, prompts) == 2
    assert "another start is writing it" in capsys.readouterr().err
    assert mine_pairs.main(["--demo", "--output", str(prompts / "new" / "pairs.jsonl")]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("argv", ["temperature 0", "top_p 0", "seed -1", f"seed {2**32}", "samples 1"])
def test_settings_that_cannot_sample_are_refused(argv, capsys):
    argv = f"--{argv}".split()
    with pytest.raises(SystemExit) as error:
        mine_pairs.main(["--demo", *argv])
    assert error.value.code == 2 and argv[0] in capsys.readouterr().err
