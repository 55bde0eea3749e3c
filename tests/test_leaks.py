"""What the evaluations ask is held out, and what contains it is found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from conftest import DEMO, finance_args, finance_data, read_rows, write_rows

from llm_alignment import finance, tatqa
from llm_alignment.leaks import leak_finder, normalise_text


def test_leaks_are_found_whatever_their_form():
    find = leak_finder({"TAT-QA question": ["What was the total in 2019?"], "evaluation post": ["Help me, please"]})
    assert find("Read this. WHAT  was the\u00a0total\nin 2019") == "TAT-QA question"
    assert find("**help me**, please!") == "evaluation post"
    assert find("What was the total in 2018?") is None and find("") is None
    assert find("whathelp me pleased") is None


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


def test_nothing_that_is_asked_is_trained_on(tmp_path, logged):
    args, expected = with_leaks(tmp_path)
    data = finance_data(args, {"reddit", "finance", "general"})
    lines = logged.messages
    assert {name: data.counts[name] for name in expected} == expected
    assert any(f"finance: {expected['finance_leaks']} of" in line and "TAT-QA question" in line for line in lines)

    # the slow way, over every text
    contexts = json.loads(tatqa.tatqa_file(args, "validation").read_text("utf-8"))
    asked = {normalise_text(question["question"]) for context in contexts for question in context["questions"]}
    asked |= {normalise_text(question["turns"][0]) for question in data.questions["reddit"]}
    prompts = {question["turns"][0] for question in data.questions["finance_instruct"]}
    instructions = finance.read_instructions(args)
    asked |= {normalise_text(instruction["user"]) for instruction in instructions if instruction["prompt"] in prompts}
    pairs = [pair for items in data.items.values() for pair in items]
    texts = " | ".join(
        normalise_text(" ".join(pair.get(key, "") for key in ("prompt", "chosen", "rejected"))) for pair in pairs
    )
    assert len(pairs) > 100 and len(asked) > 100
    assert not [question for question in asked if f" {question} " in f" {texts} "]


def test_evaluation_questions_keep_what_a_reader_needs(tmp_path):
    args = finance_args(tmp_path)
    data = finance_data(args, set())
    rows = finance.read_comments(args)
    for question in data.questions["reddit"]:
        post = [row for row in rows if row["id"] == question["question_id"]]
        best = max(post, key=lambda row: row["comment_normalized_score"])
        assert question["reference"] == best["body"].strip()
        assert (question["title"], question["subreddit"]) == (best["title"], best["subreddit"])
    references = {instruction["uid"]: instruction["chosen"] for instruction in finance.read_instructions(args)}
    for question in data.questions["finance_instruct"]:
        assert question["reference"] == references[question["question_id"]] and question["instruction"]
