"""Rows of SFT data in every accepted format, and what they say besides the texts."""

import json

import pytest
from conftest import write_rows

from llm_alignment import twix
from llm_alignment.conversations import read_conversation
from llm_alignment.files import InputError

ASKED = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
MESSAGES = [{"role": role, "content": text} for role, text in ASKED]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
FORMS = {
    "messages": {"messages": MESSAGES},
    "a JSON text": {"messages": json.dumps(MESSAGES)},
    "columns": {"messages": {"role": [role for role, _ in ASKED], "content": [text for _, text in ASKED]}},
    "text parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
    "ShareGPT": {"conversations": [{"from": NAMES[role], "value": text} for role, text in ASKED]},
    "ShareGPT's system": {
        "system": "s", "conversations": [{"from": NAMES[role], "value": text} for role, text in ASKED[1:]],
    },
    "a prompt of messages": {"prompt": MESSAGES[:-1], "completion": "b"},
    "both of messages": {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_turns(form):
    assert read_conversation(FORMS[form])[1] == ASKED


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a", "system": "s"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"messages": [{"role": "User", "content": "q"}, {"role": "Bot", "content": "a"}]},
         [("user", "q"), ("assistant", "a")]),
        ({"messages": [MESSAGES[1], {**MESSAGES[2], "reasoning_content": "hm"}]},
         [("user", "q"), ("assistant", "<think>\nhm\n</think>\n\na")]),
    ],
)  # fmt: skip
def test_questions_and_answers(row, turns):
    assert read_conversation(row)[1] == turns


QUESTION, ANSWER = MESSAGES[1:3]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "a b"}, "columns text"),
        ({"prompt": "q"}, "columns prompt"),
        ({"instruction": "q", "output": ""}, "columns instruction, output"),
        ({"messages": []}, "no messages"),
        ({"messages": 3}, "messages holds no turns"),
        ({"messages": [7]}, "messages holds no turns"),
        ({"messages": [QUESTION, {"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "  "}]}, "empty assistant turn"),
        ({"messages": [{"role": "user", "content": {}}, ANSWER]}, "empty user turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "content is not text"),
        ({"messages": [{"role": "user", "content": 7}, ANSWER]}, "content is not text"),
        ({"messages": [QUESTION]}, "no answer at the end"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"id": 1}]}]}, "tool_calls"),
        ({"messages": [QUESTION, {**ANSWER, "content": None, "function_call": {"name": "f"}}]}, "function_call"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "weight of 0"),
        ({"messages": [QUESTION, {**ANSWER, "train": False}]}, "weight of 0"),
        ({"messages": [{**QUESTION, "images": ["x.png"]}, ANSWER]}, "images"),
        ({"messages": [QUESTION, ANSWER], "tools": [{"type": "function"}]}, "the row has tools"),
        ({"messages": [QUESTION, ANSWER], "images": ["x.png"]}, "the row has images"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "the row has history"),
        ({"prompt": "q", "input": "x", "completion": "a"}, "the row has input"),
        ({"instruction": "q", "input": [QUESTION, ANSWER], "output": "a"}, "input is not text"),
        ({"instruction": [QUESTION, ANSWER], "input": "x", "output": "a"}, "instruction is not text"),
        ({"messages": MESSAGES, "system": "t"}, "two system texts that differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_has_a_reason(row, reason):
    with pytest.raises(ValueError, match=reason.replace("[", r"\[")):
        read_conversation(row)


def test_rows_of_several_formats_are_counted_and_what_is_not_read_is_named(tmp_path, logged):
    rows = [{"messages": [QUESTION, {**ANSWER, "content": f"a{n}", "name": "x"}], "tools": []} for n in range(4)]
    rows = [{**row, "messages": [{**QUESTION, "content": f"q{n}"}, row["messages"][1]]} for n, row in enumerate(rows)]
    rows += [{"instruction": f"i{n}", "output": "a", "id": n} for n in range(1, 6)]
    selection, _ = twix.load_data(twix.RowChoice(str(write_rows(tmp_path / "rows.jsonl", rows)), val_split=0.2))
    assert sum(selection.counts.values()) == 9
    assert "instruction, output (5 rows); messages (4 rows)" in logged.text
    assert "id (5 rows); messages.name (4 rows)" in logged.text and "tools" not in logged.text


@pytest.mark.parametrize(
    "row, named",
    [
        ({"messages": [QUESTION, ANSWER], "weight": 0}, "weight"),
        ({"messages": [QUESTION, ANSWER], "input": "x"}, "input"),
        ({"messages": [QUESTION, ANSWER], "prompt": "p", "completion": "c"}, "completion (2 rows); prompt"),
        ({"messages": json.dumps([QUESTION, {**ANSWER, "name": "x"}])}, "messages.name"),
        ({"messages": [QUESTION, {**ANSWER, "name": "x"}]}, "messages.name"),
        ({"prompt": [{**QUESTION, "name": "x"}], "completion": "a"}, "prompt.name"),
        ({"instruction": "Be brief.", "prompt": "q", "completion": "a"}, "instruction"),
    ],
)
def test_no_column_of_a_short_row_is_passed_over(row, named, tmp_path, logged):
    path = write_rows(tmp_path / "rows.jsonl", [row, {"messages": MESSAGES}, row])
    twix.load_data(twix.RowChoice(str(path), val_split=0.5))
    assert f"not read: {named} (2 rows)" in logged.text


def test_rows_of_another_shape_are_an_error_that_shows_the_accepted_ones(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(InputError) as error:
        twix.load_data(twix.RowChoice(str(path)))
    for shown in ("columns text", '"messages"', '"conversations"', '"completion"', '"instruction"'):
        assert shown in str(error.value)
