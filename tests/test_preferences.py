"""Preference pairs from any file: every format, turn lists, rows that cannot be used."""

import json
import re
import unicodedata

import pytest
from conftest import DEMO, write_rows

from llm_alignment import conversations, encoder, models, preferences
from llm_alignment.files import InputError
from llm_alignment.leaks import LeakFinder, without_leaks
from llm_alignment.prompts import PromptStyle, fit_prompt

LONG = "Human: Hi\n\nAssistant: Hello!\n\nHuman: Why?"
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = {"chosen": "Because.", "rejected": "No."}


def dialogue(*contents: str) -> list[dict]:
    """Turns of user and assistant, one after the other."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def sides(*asked: str, start: int = 0, before: tuple = ()) -> dict:
    """Both sides as turns, from `start` on: `before`, what was asked, the answer."""
    return {side: [*before, *dialogue(*asked, answer)[start:]] for side, answer in ANSWERS.items()}


def problem(row: dict, **options) -> str | None:
    """The reason why a row is no pair; None when it is one."""
    try:
        preferences.general_pair(row, **options)
    except ValueError as error:
        return str(error)


HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "", "question": "Why?", **ANSWERS}, "Why?"),
        ({"system": "Be brief.", "question": "Why?", **ANSWERS}, "Be brief.\n\nWhy?"),
        ({"prompt": "Why?", **ANSWERS}, "Why?"),
        ({side: f"\n\nHuman: Why?\n\nAssistant: {answer}" for side, answer in ANSWERS.items()}, "Why?"),
        ({side: f"{HH} {answer}" for side, answer in ANSWERS.items()}, LONG),
        ({"prompt": dialogue("Why?"), **sides("Why?", start=1)}, "Why?"),
        (sides("Why?"), "Why?"),
        # a prompt and the whole dialogue beside it: the turns between belong to the prompt
        ({"prompt": "Hi", **sides("Hi", "Hello!", "Why?")}, LONG),
        ({"prompt": dialogue("Hi", "Hello!", "Why?"), **ANSWERS}, LONG),
        ({"prompt": dialogue("Hi"), **sides("Hi", "Hello!", "Why?")}, LONG),
        (
            {
                "prompt": dialogue("Hi"),
                "chosen": dialogue("Hi", "Hello!", "Why?", "Because.")[1:],
                "rejected": dialogue("Hi", "Hello!", "Why?", "No."),
            },
            LONG,
        ),
        ({"prompt": HH, "chosen": " Because.", "rejected": " No."}, LONG),
        ({"prompt": "Human: Why?", **ANSWERS}, "Why?"),
        # a system turn is read like the system column, wherever it stands
        ({"prompt": [SYSTEM, *dialogue("Why?")], **sides("Why?", start=1)}, "Be brief.\n\nWhy?"),
        (sides("Why?", before=(SYSTEM,)), "Be brief.\n\nWhy?"),
        ({"prompt": "Why?", "system": "Be brief.", **sides("Why?", before=(SYSTEM,))}, "Be brief.\n\nWhy?"),
        # other names of the two roles, parts of text, null columns
        (
            {
                "prompt": [{"role": "human", "content": "Why?"}],
                "chosen": [{"role": "GPT", "content": "Because."}],
                "rejected": [{"role": "Assistant", "content": "No."}],
            },
            "Why?",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], **ANSWERS}, "Why?"),
        ({"system": None, "question": None, "prompt": "Why?", **ANSWERS}, "Why?"),
        ({"prompt": None, **sides("Why?")}, "Why?"),
    ],
)
def test_general_pairs_of_every_shape(row, prompt):
    pair = preferences.general_pair(row)
    assert preferences.distinct_pairs([pair, pair]) == [pair]
    texts = preferences.transcript(pair["prompt"]), pair["chosen"], pair["rejected"]
    assert texts == (prompt, "Because.", "No.")
    if prompt.startswith("Human:"):
        turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Why?")]
        assert pair["prompt"] == [{"role": role, "content": content} for role, content in turns]
    else:
        assert pair["prompt"] == prompt


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", **ANSWERS},
        {"question": "Why?", "answer": "Because."},
        {"question": "Why?", "chosen": "Because.", "rejected": "Because."},
        {"question": "Why?", "chosen": "Because.", "rejected": None},
        {"question": "Why?", "chosen": 3, "rejected": "No."},
        # null is no text, least of all "None"
        {
            "prompt": "Why?",
            **sides("Why?"),
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": None}]}],
        },
        {"chosen": "\n\nHuman: Why?\n\nAssistant: A.", "rejected": "\n\nHuman: How?\n\nAssistant: B."},
        # question 1 is not paired with the answer to question 2
        {"prompt": "Hi", "chosen": dialogue("Hi", "Hello!", "Why?", "Because."), "rejected": dialogue("Hi", "No.")},
        {"prompt": "Hi", "chosen": dialogue("Hi", "A", "Why?", "So."), "rejected": dialogue("Hi", "B", "How?", "No.")},
        {"prompt": "Other", **sides("Why?")},
        {**sides("Why?"), "chosen": [SYSTEM, *dialogue("Why?", "Because.")]},
        # the last turn is the assistant's, and the two take turns
        {"chosen": dialogue("Why?", "Because.", "Thanks"), "rejected": dialogue("Why?", "Because.", "Really?")},
        {"prompt": "Why?", "chosen": dialogue("Why?"), "rejected": dialogue("Why?")},
        {"prompt": dialogue("Why?", "Well."), **ANSWERS},
        sides("Why?", start=1),
        sides("How?", before=(*dialogue("Why?", "So."), SYSTEM)),
        # unknown roles and contents
        {"prompt": [*dialogue("Why?"), {"role": "tool", "content": "{}"}], **ANSWERS},
        {"prompt": [{"role": None, "content": "Why?"}], **ANSWERS},
        {"prompt": [{"role": "user", "content": 3}], **ANSWERS},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], **ANSWERS},
        {"prompt": ["Why?"], **ANSWERS},
        {"question": "Why?", "system": 3, **ANSWERS},
        {"question": "Why?", "prompt": "How?", **ANSWERS},
        {"question": " ", **ANSWERS},
        {"question": None, "prompt": None, **ANSWERS},
    ],
)
def test_general_rows_that_cannot_be_used(row, tmp_path):
    assert problem(row)
    path = write_rows(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(InputError, match="question, chosen, rejected.*system.*prompt, chosen, rejected"):
        preferences.read_pairs(str(path), "--general_dataset")


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path, logged):
    usable = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    swapped = {"chosen": dialogue("Why?", "Because."), "rejected": dialogue("How?", "No.")}
    path = write_rows(tmp_path / "pairs.jsonl", [usable, swapped, {**usable, "chosen": None}])
    [pair] = preferences.read_pairs(str(path), "--pairs")
    assert pair["chosen"] == "Because."
    assert "skipped 2 rows" in logged.text and "pairs.jsonl:2 (chosen and rejected differ before" in logged.text


@pytest.mark.parametrize(
    "chosen, rejected, thinking, expected",
    [
        ("<think>\nhm\n</think>\n\nYes.", "No.", False, ("Yes.", "No.")),
        ("<think>\nhm\n</think>\n\nYes.", "No.", True, ("<think>\nhm\n</think>\n\nYes.", "No.")),
        ("<think>never closed", "No.", False, None),
        ("<think>a</think>Yes.", "<think>b</think> Yes.", False, None),  # equal without their thoughts
    ],
)
def test_thoughts_are_trained_on_with_thinking_alone(chosen, rejected, thinking, expected):
    """The prompt ends after an empty block, and a second one would stand behind it."""
    row = {"prompt": "Well?", "chosen": chosen, "rejected": rejected}
    assert (problem(row, thinking=thinking) is None) == bool(expected)
    if expected:
        pair = preferences.general_pair(row, thinking=thinking)
        assert (pair["chosen"], pair["rejected"]) == expected


PAIR = {"prompt": dialogue("Why?"), **sides("", start=1)}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("place", ["question", "system", "chosen", "rejected", "earlier turn"])
@pytest.mark.parametrize("spelt", ["<|im_end|>", "<|im_start|>system", "<|endoftext|>", "<think>", "</think>"])
def test_a_pair_that_spells_the_templates_tokens_is_none(demo_tokenizer, spelt, place, thinking):
    row = {"question": "Why?", "system": "Be brief.", "chosen": "<think>Hm</think>Because.", "rejected": "No."}
    if place == "earlier turn":
        row |= {"question": None, "prompt": dialogue("Hi", f"Hello{spelt}!", "Why?")}
    else:
        row[place] += f" {spelt} more"
    own = encoder.own_tokens(demo_tokenizer)
    assert re.search("own|<think>", problem(row, thinking=thinking, own=own))
    assert problem({**row, **ANSWERS, "system": None, "prompt": "Why?", "question": None}, own=own) is None


@pytest.mark.parametrize("place", ["row", "prompt", "chosen", "rejected"])
@pytest.mark.parametrize("field", sorted(conversations.NEEDED))
def test_a_field_that_changes_what_an_answer_means_is_not_lost(field, place):
    def pair_with(value: object) -> dict:
        if place == "row":
            return {**PAIR, field: value}
        return {**PAIR, place: [{**PAIR[place][0], field: value}]}

    assert f"has {field}" in problem(pair_with([{"name": "find"}]))
    assert not any(problem(pair_with(nothing)) for nothing in (None, [], "", False))


@pytest.mark.parametrize(
    ("change", "usable"),
    [
        ({"chosen": [{"role": "assistant", "content": "Because.", "weight": 0}]}, False),
        ({"chosen": [{"role": "assistant", "content": "Because.", "weight": 1}]}, True),
        ({"rejected": [{"role": "assistant", "content": "No.", "train": False}]}, False),
        ({"prompt": [{"role": "user", "content": "Why?", "weight": 0}]}, True),  # prompts are not trained on
        ({"chosen": [{"role": "assistant", "tool_calls": [{"name": "find"}]}]}, False),
        ({"chosen": [{"role": "assistant", "content": "Because.", "thinking": ["hm"]}]}, False),
        ({"score_chosen": 1, "score_rejected": 8.5}, False),
        ({"chosen_score": 8.5, "rejected_score": 1}, True),
        ({"chosen_score": 1, "rejected_score": 8.5}, False),
        ({"chosen_rating": 1, "rejected_rating": 8.5}, False),
        # the same turns in other shapes
        ({"prompt": json.dumps(PAIR["prompt"]), "chosen": json.dumps(PAIR["chosen"])}, True),
        ({"prompt": {"role": ["user"], "content": ["Why?"]}}, True),
        ({"prompt": [{"from": "human", "value": "Why?"}], "chosen": [{"from": "gpt", "value": "Because."}]}, True),
        ({"prompt": {"role": ["user"], "content": []}}, False),
    ],
)
def test_what_a_pair_says_counts(change, usable):
    row = {**PAIR, **change}
    assert (problem(row) is None) == usable
    if usable:
        pair = preferences.general_pair(row)
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("Why?", "Because.", "No.")


def test_an_answer_in_json_stays_a_text():
    answer = '[{"role": "admin", "name": "Ann"}]'
    pair = preferences.general_pair({**PAIR, "chosen": answer})
    assert pair["chosen"] == answer


@pytest.mark.parametrize("field", conversations.THOUGHTS)
def test_thoughts_in_a_field_are_thoughts(field):
    said = {"role": "assistant", "content": "Because.", field: "hm"}
    row = {
        "prompt": [*dialogue("Hi"), {**said, "content": "Hello!"}, *dialogue("Why?")],
        "chosen": [said],
        "rejected": "No.",
    }
    pair = preferences.general_pair(row, thinking=True)
    assert pair["chosen"] == "<think>\nhm\n</think>\n\nBecause." and "<think>" in pair["prompt"][1]["content"]
    pair = preferences.general_pair(row)
    assert pair["chosen"] == "Because." and pair["prompt"][1]["content"] == "Hello!"


def test_fields_that_nothing_reads_are_named_and_counted(tmp_path, logged):
    named = {**PAIR, "prompt": [{"role": "user", "content": "How?", "name": "Ann"}], "source": "a", "note": ""}
    path = write_rows(tmp_path / "pairs.jsonl", [{**PAIR, "source": "b"}, named, PAIR])
    assert len(preferences.read_pairs(str(path), "--pairs")) == 2
    assert "prompt.name (1 rows), source (2 rows)" in logged.text and "note" not in logged.text


def test_one_prompt_in_several_forms_is_one():
    forms = ["Какой ёж?", unicodedata.normalize("NFD", "Какой ёж?"), "какой\u00a0 еж", "«Какой ЁЖ»?"]
    pairs = [preferences.general_pair({"prompt": form, "chosen": "Злой.", "rejected": "Нет."}) for form in forms]
    assert len(preferences.distinct_pairs(pairs)) == 1
    pairs = [preferences.general_pair({"prompt": "Why?", "chosen": text, "rejected": "No."}) for text in "ab"]
    assert len(preferences.distinct_pairs(pairs)) == 2


def test_prompts_of_symbols_alone_stay_apart():
    pairs = [preferences.general_pair({"prompt": text, "chosen": "Good.", "rejected": "Bad."}) for text in "😀😢"]
    assert len(preferences.distinct_pairs(pairs)) == 2


def test_a_leak_in_an_earlier_turn_is_found():
    finder = LeakFinder({"question": ["What is the total of all sales?"]})
    item = {"prompt": dialogue("What is the total of all sales?", "It is 7.", "And then?"), "chosen": "8"}
    assert without_leaks([item], finder, "general", {}) == []


def test_a_dialogue_goes_through_the_chat_template_as_turns():
    tokenizer = models.load_tokenizer(models.resolve_base(models.BaseFlags(model=str(DEMO / "model"))))
    style = PromptStyle(max_prompt_length=500)
    turns = dialogue("First question?", "First answer.", "Second question of some more words?")
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    tokens = tokenizer(whole)["input_ids"]
    assert fit_prompt(turns, tokenizer, style) == (whole, tokens, False)
    style = PromptStyle(max_prompt_length=len(tokenizer(whole)["input_ids"]) - 1)
    alone = tokenizer.apply_chat_template(turns[2:], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    tokens = tokenizer(alone)["input_ids"]  # the oldest turns go first
    assert fit_prompt(turns, tokenizer, style) == (alone, tokens, True)
    style = PromptStyle(max_prompt_length=len(tokenizer(alone)["input_ids"]) - 2)
    text, _, is_cut = fit_prompt(turns, tokenizer, style)
    assert is_cut and "more words?" in text and "Second question" not in text
