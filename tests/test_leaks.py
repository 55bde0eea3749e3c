"""What the evaluations ask is held out, and what contains it is found."""

from __future__ import annotations

import argparse
import json
import unicodedata
from pathlib import Path

import pytest
from conftest import DEMO, chat, finance_args, finance_data, read_rows, write_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.benchmarks import bench_leaks
from llm_alignment import finance, replay, tatqa
from llm_alignment.encoder import ChatEncoder
from llm_alignment.leaks import LeakFinder, forbidden_texts, normalise_text


def test_leaks_are_found_whatever_their_form():
    asked = {"TAT-QA question": ["What was the total in 2019?"], "evaluation post": ["Help me, please"]}
    find = LeakFinder(asked).find
    assert find("Read this. WHAT  was the\u00a0total\nin 2019") == "TAT-QA question"
    assert find("Hi", "**help me**, please!") == "evaluation post"
    assert find("What was the total in 2018?") is None and find("") is None and find() is None
    assert find("whathelp me pleased") is None
    assert find("What was the total", "in 2019?") is None  # in two turns
    find = LeakFinder({"question": ["Кто ты?"]}).find  # one or two words stand in too many texts
    assert find("Кто ты") == "question" and find("Скажи, кто ты?") is None


PASSAGE = "Семь старых рыбаков каждое утро выходили в холодное море и возвращались только поздно вечером домой с рыбой"
CODE = "for i in range(1, m + 1): for j in range(1, n + 1): if a[i] == b[j]: c[i][j] = 1"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (PASSAGE, True),
        (" ".join(PASSAGE.split()[2:15]), True),
        (" ".join(PASSAGE.split()[2:14]), False),
        (f"Вот: {' '.join(PASSAGE.split()[-13:])} и мёдом.", True),
        (PASSAGE.replace("море", "озеро"), False),  # no 13 in a row are left
        (unicodedata.normalize("NFD", PASSAGE.upper()), True),
        (PASSAGE.replace("рыбаков", "ры\u00adба\u0301ков").replace(" ", " — "), True),
        (CODE, False),  # what every program of this kind says
    ],
)
def test_thirteen_words_in_a_row_are_a_leak(text, found):
    asked = {"question": [{"turns": ["Переведи: " + PASSAGE], "reference": CODE}]}
    finder = LeakFinder({}, forbidden_texts(asked)[1])
    assert (finder.find("Привет", text) is not None) == found
    assert list(finder.find_all([["Да"], ["Привет", text]])) == [None, "question" if found else None]


WORDS = ["б", "ба", "еж", "ёж", "Ёж,", "й", "и\u0306", "ﬁn", "№", "x_y", "😀", "1", "–", "\uffff"]
pieces = st.lists(st.sampled_from(WORDS), max_size=9)


@pytest.mark.parametrize("form", ["Ещё два: «Й» — x_1!", "ЕЩЕ  два\nи\u0306 X 1", "е\u0301ще два\u200b й x-1"])
def test_one_normal_form(form):
    assert normalise_text(form) == "еще два й x 1"


@example(["б が ба"], [["б か\u3099 ба"]])  # a mark that changes the letter before it
@given(st.lists(pieces.map(" ".join), max_size=4), st.lists(st.lists(pieces.map(" ".join), max_size=3), max_size=4))
@settings(max_examples=300, deadline=None)
def test_the_fast_search_finds_what_the_slow_one_does(known, items):
    finder = LeakFinder({"question": known})

    def contains(item: list[str]) -> bool:
        words = [normalise_text(text).split() for text in item]
        asked = [normalise_text(text).split() for text in known]
        return any(
            (one == text if len(one) < 3 else f" {' '.join(one)} " in f" {' '.join(text)} ")
            for one in filter(None, asked)
            for text in words
        )

    expected = list(map(contains, items))
    assert [leak is not None for leak in finder.find_all(items)] == expected
    assert [finder.find(*item) is not None for item in items] == expected


def test_the_benchmark_of_the_search_finds_the_planted_copies():
    result = bench_leaks.main(["--rows", "2000", "--copies", "80"])
    assert result["found"] == 1 and result["wrongly"] == 0


def with_leaks(tmp_path: Path) -> tuple[argparse.Namespace, dict[str, int]]:
    """The demo's data with leaks planted into each set; how many each got."""
    instructions, general = DEMO / "finance_instruct.jsonl", DEMO / "orca_pairs.jsonl"
    args = finance_args(tmp_path)
    clean = finance_data(args, {"reddit", "finance", "general"})
    contexts = json.loads((DEMO / "tatqa" / "tatqa_dataset_dev.json").read_text("utf-8"))
    asked = [contexts[0]["questions"][0]["question"], contexts[-1]["questions"][-1]["question"]]
    post, instruction = clean.questions["reddit"][3]["turns"][0], clean.questions["finance_instruct"][5]["turns"][0]
    rows = read_rows(instructions)
    leaks = [
        {"system": "", "user": f"As a table shows: {asked[0].upper()}", "assistant": "nine"},
        {"system": "", "user": "Do the exercise of the book.", "assistant": f"It asks: {asked[1]}"},
        {"system": "", "user": f"{instruction}\n\nAnswer in short.", "assistant": "That is short."},
        {"system": "", "user": f"A friend wrote: {post}", "assistant": "I see."},
    ]
    args.finance_dataset = str(write_rows(tmp_path / "finance.jsonl", rows + leaks))
    rows = read_rows(general)
    leak = {"system": "", "question": f"{instruction} And {asked[0]}", "chosen": "yes", "rejected": "no"}
    args.general_dataset = str(write_rows(tmp_path / "general.jsonl", [*rows, leak]))
    rows = read_rows(DEMO / "reddit.jsonl")
    title, _, text = post.partition("\n\n")
    copies = [
        {**rows[0], "id": "copy", "title": f"Again: {title}", "selftext": text.replace(" ", "  "), "body": body,
         "comment_normalized_score": score}
        for body, score in [("a good reply to the post, and a long one", 0.9), ("a bad reply to this post " * 2, 0.1)]
    ]  # fmt: skip
    args.reddit_dataset = str(write_rows(tmp_path / "reddit.jsonl", rows + copies))
    counts = {name: clean.counts[name] for name in ("finance_leaks", "general_leaks", "reddit_leaks")}
    return args, {name: counts[name] + {"finance_leaks": 4}.get(name, 1) for name in counts}


def test_passages_of_every_evaluation_are_forbidden_in_whatever_turn_or_reference_they_stand():
    other = " ".join(reversed(PASSAGE.split()))
    asked = {
        "a": [{"turns": ["what is the first turn", "Переведи: " + PASSAGE], "reference": ""}],
        "b": [{"turns": ["another question"], "reference": other}],
    }
    finder = LeakFinder(*forbidden_texts(asked))
    texts = (f"So: {PASSAGE}", f"So: {other}", "Say what is the first turn.", "Переведи:")
    assert [finder.find(text) for text in texts] == ["a", "b", "a", None]


def test_nothing_that_is_asked_is_trained_on(tmp_path, logged):
    args, expected = with_leaks(tmp_path)
    data = finance_data(args, {"reddit", "finance", "general"})
    lines = logged.messages
    assert {name: data.counts[name] for name in expected} == expected
    assert any(f"finance: {expected['finance_leaks']} of" in line and "TAT-QA question" in line for line in lines)

    # the slow way, over every text
    contexts = json.loads(tatqa.tatqa_file(args.tatqa_dir, "validation").read_text("utf-8"))
    asked = {normalise_text(question["question"]) for context in contexts for question in context["questions"]}
    asked |= {normalise_text(question["turns"][0]) for question in data.questions["reddit"]}
    prompts = {question["turns"][0] for question in data.questions["finance_instruct"]}
    instructions = list(map(finance.read_instruction, read_rows(args.finance_dataset)))
    asked |= {normalise_text(row["user"]) for row in instructions if row["prompt"] in prompts}
    pairs = [pair for items in data.items.values() for pair in items]
    sides = ("prompt", "chosen", "rejected")
    texts = " | ".join(normalise_text(" ".join(pair.get(side, "") for side in sides)) for pair in pairs)
    assert len(pairs) > 100 and len(asked) > 100
    assert not [question for question in asked if f" {question} " in f" {texts} "]


def test_nothing_that_is_asked_is_replayed(tmp_path, monkeypatch, capsys, demo_tokenizer):
    import sft_train

    asked = read_rows(DEMO / "mt_bench_ru.jsonl")[0]["turns"][0]
    write_rows(tmp_path / "replay.jsonl", [chat(text, "yes") for text in (asked, "And you?")])
    argv = ["--demo", "--replay", str(tmp_path / "replay.jsonl"), "--replay_ratio", "0.1", "--dry_run"]
    sft_train.main([*argv, "--output_dir", str(tmp_path / "run")])
    assert "replay.jsonl:1 (MT-Bench question" in capsys.readouterr().out
    rows = [{"question": text, "answer": "yes", "finished": True} for text in (asked, "And you?")]
    monkeypatch.setattr(replay, "read_items", lambda *args, **options: rows)
    encoder = ChatEncoder(demo_tokenizer, thinking=False, assistant_only=False)
    settings = replay.ReplaySettings(0.1, "self", 1, 0, no_baseline_cache=True)
    how = {"fingerprint": {}, "settings": settings}
    kept = replay.own_dialogues(None, encoder, LeakFinder({"question": [asked]}), 1, tmp_path, **how)
    assert [turns[0]["content"] for turns in kept] == ["And you?"]


def test_evaluation_questions_keep_what_a_reader_needs(tmp_path):
    args = finance_args(tmp_path)
    data = finance_data(args, set())
    rows = read_rows(args.reddit_dataset)
    for question in data.questions["reddit"]:
        post = [row for row in rows if row["id"] == question["question_id"]]
        best = max(post, key=lambda row: row["comment_normalized_score"])
        assert question["reference"] == best["body"].strip()
        assert (question["title"], question["subreddit"]) == (best["title"], best["subreddit"])
    instructions = map(finance.read_instruction, read_rows(args.finance_dataset))
    references = {row["uid"]: row["chosen"] for row in instructions}
    for question in data.questions["finance_instruct"]:
        assert question["reference"] == references[question["question_id"]] and question["instruction"]
