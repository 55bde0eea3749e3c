"""The SFT data: which rows are used, on which side, and the tokens that are trained on."""

import gzip
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DEMO, chat, write_rows
from transformers import AutoTokenizer

from llm_alignment import files, twix
from llm_alignment.encoder import ChatEncoder
from llm_alignment.files import InputError
from llm_alignment.leaks import LeakFinder


def demo_encoder(thinking=False, assistant_only=False, template=None):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.bos_token = tokenizer.eos_token  # some templates write one
    return ChatEncoder(tokenizer, thinking=thinking, assistant_only=assistant_only)


@pytest.fixture
def load(tmp_path):
    """load(rows, **choice): Selection and the reader of `load_data` on a file of these rows."""

    def load(rows, encoder=None, **choice):
        path = rows if isinstance(rows, Path) else write_rows(tmp_path / "rows.jsonl", rows)
        return twix.load_data(twix.RowChoice(str(path), **{"subset": "both", "val_split": 0.1} | choice), encoder)

    return load


MANY = [chat(f"question {n % 150}", f"answer {n}", "reasoning" if n % 10 == 0 else "general") for n in range(600)]


def texts(examples, side):
    """The rows of a side in their order, as JSON of their messages."""
    return [json.dumps(messages) for messages in examples(side)["messages"]]


@pytest.mark.parametrize("ratio, mix, seed, split", [(1.0, None, 42, 0.1), (0.3, None, 1, 0.2), (0.4, 0.2, 7, 0.05)])
def test_what_is_chosen(load, ratio, mix, seed, split):
    """No prompt is on both sides; counts are what is read; the order of the file changes nothing but the order."""
    choice = dict(sample_ratio=ratio, mix_reasoning_ratio=mix, sample_seed=seed, val_split=split)
    selection, examples = load(MANY, **choice)
    chosen = {side: texts(examples, side) for side in twix.SIDES}
    subsets = {json.dumps(row["messages"]): row["subset"] for row in MANY}
    for side, rows in chosen.items():
        assert rows == [text for text in subsets if text in set(rows)], "in the order of reading"
        counts = Counter((subsets[row], side) for row in rows)
        assert counts == {key: count for key, count in selection.counts.items() if key[1] == side}
    assert sum(selection.counts.values()) == round(ratio * 600)
    prompts = {side: {json.loads(row)[0]["content"] for row in rows} for side, rows in chosen.items()}
    assert not prompts["train"] & prompts["validation"]
    assert len(prompts["validation"]) == round(split * len(set.union(*prompts.values())))
    again, shuffled = load(random.Random(0).sample(MANY, 600), **choice)
    assert again.sha256 == selection.sha256
    assert {side: sorted(texts(shuffled, side)) for side in chosen} == {side: sorted(chosen[side]) for side in chosen}


def test_samples_are_nested_and_a_seed_draws_others(load):
    def rows(**choice):
        _, examples = load(MANY, **choice)
        return {text for side in twix.SIDES for text in texts(examples, side)}

    assert len(rows(sample_ratio=0.1)) == 60 and rows(sample_ratio=0.1) < rows(sample_ratio=0.25)
    assert rows(sample_ratio=0.1) != rows(sample_ratio=0.1, sample_seed=1)


def test_the_rows_of_earlier_versions_are_chosen(load):
    """The fingerprint of version 0.2.0, so that its runs can be resumed."""
    selection, _ = load(MANY, sample_ratio=0.25, mix_reasoning_ratio=0.2)
    assert selection.sha256[:16] == "d46a4e2e5c2e73dd"


FEW = [chat(f"q{n}", "a", "reasoning") for n in range(90)] + [chat(f"p{n}", "a") for n in range(10)]


@pytest.mark.parametrize(
    "rows, ratio, mix, used, reached",
    [
        (MANY, 0.25, 0.2, (120, 30), "20.0"),
        (MANY, 0.5, 0.4, (240, 60), "20.0"),  # only 60 of the 120 asked for are there
        (FEW, 1.0, 0.2, (10, 2), "16.7"),  # the share holds, with fewer rows
        (FEW, 1.0, 0.95, (10, 90), "90.0"),
    ],
)
def test_the_reasoning_share_is_what_was_asked_for_or_is_said(load, logged, rows, ratio, mix, used, reached):
    selection, _ = load(rows, sample_ratio=ratio, mix_reasoning_ratio=mix)
    counts = Counter()
    for (subset, _), count in selection.counts.items():
        counts[subset] += count
    assert (counts["general"], counts["reasoning"]) == used and f"reached {reached} %" in logged.text


BAD_ROWS = [
    (b'{"subset": "general"}', "columns subset"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8"),
    (b"{not json", "not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "q"}]}', "no answer at the end"),
    (json.dumps(chat("q", "a", subset=["general"])).encode(), "the subset is not text"),
]


@pytest.mark.parametrize("line, reason", BAD_ROWS)
def test_rows_that_cannot_be_used_are_named(line, reason, load, tmp_path, logged):
    good = [json.dumps(chat(f"q{n}", "line\u2028separator", subset=None)).encode() for n in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*good[:2], line, *good[2:]]) + b"\n")
    selection, _ = load(path, subset="general")  # a subset that is null is general
    assert selection.rows("train") + selection.rows("validation") == 4
    assert f"skipped 1 rows: rows.jsonl:3 ({reason}" in logged.text


def test_all_turns_and_text_parts_are_kept(load):
    rows = [chat([{"type": "text", "text": "q"}, {"type": "text", "text": str(n)}], "a", system="s") for n in range(3)]
    rows[0]["messages"] += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}]
    _, examples = load(rows)
    found = [json.loads(text) for side in twix.SIDES for text in texts(examples, side)]
    assert sorted(row[1]["content"] for row in found) == ["q0", "q1", "q2"]
    assert sorted(map(len, found)) == [3, 3, 5]


@pytest.mark.parametrize("prompt", ["Сколько будет пять и шесть?", "Ёлка и café\u0301", "Σίσυφος is 12 km away"])
def test_prompts_in_another_form_are_on_one_side(prompt, load):
    """Unicode's forms, blanks, case and punctuation; where all forms are different words nothing changes."""
    forms = [unicodedata.normalize(form, prompt) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    forms += [prompt.upper(), prompt.lower(), f"  {prompt}!", prompt.replace(" ", "\n"), prompt.replace(" ", "\u00a0")]
    rows = [chat(f"{form} {n}", f"a{n}") for n in range(40) for form in forms]
    _, examples = load(rows, val_split=0.3)
    train, validation = (
        {messages[0]["content"].split()[-1].strip("!") for messages in examples(side)["messages"]}
        for side in twix.SIDES
    )
    assert not train & validation and len(validation) == 12


def test_a_system_prompt_joins_rows_that_have_none_and_changes_no_choice(load):
    rows = [chat(f"q{n}", "a", system="own" if n % 3 == 0 else None) for n in range(30)]
    plain, _ = load(rows)
    selection, examples = load(rows, system_prompt="Кратко.")
    assert selection.sha256 == plain.sha256
    found = Counter(json.loads(text)[0]["content"] for side in twix.SIDES for text in texts(examples, side))
    assert found == {"own": 10, "Кратко.": 20}
    with pytest.raises(InputError, match="the chat template refuses it: no system role"):
        load([chat(f"q{n}", "a") for n in range(3)], demo_encoder(template=STRICT), system_prompt="Кратко.")


@pytest.mark.parametrize("count, held_out", [(20, 2), (299, 30), (300, 30), (1000, 30), (5000, 50)])
def test_without_a_share_enough_prompts_are_held_out(count, held_out, load):
    selection, _ = load([chat(f"q{n}", "a") for n in range(count)], val_split=None)
    assert selection.rows("validation") == held_out and selection.rows("train") == count - held_out


def test_duplicates_are_drawn_as_often_as_reported(load):
    rows = [chat("the same", "answer")] * 300 + [chat(f"q{n}", "a") for n in range(100)]
    for seed in range(4):
        selection, examples = load(rows, sample_ratio=0.25, sample_seed=seed)
        used = {side: len(examples(side)) for side in twix.SIDES}
        assert sum(used.values()) == 100 and used == {side: selection.rows(side) for side in used}


def test_an_assistant_who_speaks_first_belongs_to_the_prompt(load):
    rows = [chat(f"q{n}", "a") for n in range(40)]
    for row in rows:
        row["messages"].insert(0, {"role": "assistant", "content": "Hello!"})
    greeting, question, answer = ("assistant", "Hi!"), ("user", "q"), ("assistant", "a")
    assert twix.prompt_of([greeting, question, answer]) == [greeting, question]
    assert twix.prompt_of([("system", "s"), answer]) == [("system", "s"), answer]
    selection, _ = load(rows, val_split=0.25)
    assert selection.rows("train") == 30 and selection.rows("validation") == 10


STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_rows_of_other_subsets_and_those_that_the_template_refuses_are_counted(load, logged):
    rows = [chat(f"q{n}", "a") for n in range(3)] + [chat("q", "a", system="s"), chat("q", "a", system="t")]
    rows[4]["messages"][0]["role"] = "user"
    selection, _ = load(rows + [chat("q", "a", "code")] * 4, demo_encoder(template=STRICT))
    assert sum(selection.counts.values()) == 3 and "rows of other subsets, not used: 4 code" in logged.text
    assert "rows.jsonl:4 (the chat template refuses it: no system role)" in logged.text
    assert "rows.jsonl:5 (the chat template refuses it: roles must alternate)" in logged.text


def test_every_row_is_read_and_hashed_once(load, monkeypatch):
    opened, hashed = [], []
    read_jsonl, unit_hash = files.read_jsonl, twix.unit_hash
    monkeypatch.setattr(files, "read_jsonl", lambda path: opened.append(path) or read_jsonl(path))
    monkeypatch.setattr(twix, "unit_hash", lambda *parts: hashed.append(parts) or unit_hash(*parts))
    monkeypatch.setattr(twix, "ROWS_AT_ONCE", 7)
    _, examples = load(MANY)
    assert len(opened) == 1 and len(hashed) == 3 * len(MANY)
    assert sum(len(examples(side)) for side in twix.SIDES) == len(MANY)


def test_rows_that_cannot_be_read_do_not_shift_those_that_are_used(load, tmp_path):
    """In every format the rows are those that were selected, in the order of reading."""
    rows = [chat(f"q{n}", "a") for n in range(60)]
    whole, damaged = [json.dumps(row) for row in rows], ["{not json", "7", "", '{"messages": []}', *"[]"]
    broken = [line for n, row in enumerate(whole) for line in (damaged[n % 6], row)]
    write_rows(tmp_path / "rows.jsonl", broken)
    (tmp_path / "rows.json").write_text(json.dumps([item for row in rows for item in (7, row, {"messages": []})]))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress((tmp_path / "rows.json").read_bytes()))
    with_nulls = [row for row in rows for row in ({"messages": None}, row)]
    pq.write_table(pa.Table.from_pylist(with_nulls), tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    for name, part in ("a", broken[:50]), ("b", broken[50:]):
        write_rows(tmp_path / "folder" / f"{name}.jsonl", part)
    found = set()
    for path in (*tmp_path.glob("rows.*"), tmp_path / "folder"):
        selection, examples = load(path, sample_ratio=0.5, val_split=0.2)
        numbers = [[int(json.loads(text)[0]["content"][1:]) for text in texts(examples, side)] for side in twix.SIDES]
        assert list(map(len, numbers)) == [24, 6] and numbers == [sorted(part) for part in numbers]
        found.add((selection.sha256, json.dumps(numbers)))
    assert len(found) == 1


def test_nothing_is_left_behind(load, tmp_path):
    """The rows and their tokens lie in the temporary folder of `datasets`, which it removes when the process ends."""
    from datasets.fingerprint import get_temporary_cache_files_directory

    _, examples = load(MANY)
    tokens = twix.tokenise(examples("train"), demo_encoder(), 1)
    for rows in (examples("train"), examples("validation"), tokens):
        assert all(file["filename"].startswith(get_temporary_cache_files_directory()) for file in rows.cache_files)


@pytest.mark.parametrize("form", ["{}", "Ответь кратко: {} Спасибо.", "ОТВЕТЬ: СКОЛЬКО БУДЕТ -- ПЯТЬ и шесть"])
@pytest.mark.parametrize("place", range(4))
def test_rows_that_hold_a_question_of_an_evaluation_are_left_out(tmp_path, place, form, logged):
    question = "Сколько будет пять и шесть?"
    leaks = [chat(f"question {n} {'x' * n}", "answer") for n in range(20)]
    for leak in leaks:  # in the first or in a later turn, the user's or the assistant's
        leak["messages"] += [{"role": role, "content": "more"} for role in ("user", "assistant")]
        leak["messages"][place]["content"] += " " + form.format(question)
    choice = twix.RowChoice(str(write_rows(tmp_path / "rows.jsonl", [*MANY[:100], *leaks])), "both", val_split=0.2)
    selection, examples = twix.load_data(choice, None, LeakFinder({"question": [question]}))
    assert sum(selection.counts.values()) == 100 and "20 of 120 left out" in logged.text
    assert not [text for side in twix.SIDES for text in texts(examples, side) if "шесть" in text.lower()]
    assert selection.sha256 != twix.load_data(choice)[0].sha256


def test_thoughts_that_are_left_out_are_told(load, logged):
    load([chat(f"q{n}", "<think>\nhm\n</think>\n\na") for n in range(4)], demo_encoder())
    assert "thoughts of 4 rows: left out; --thinking trains on them" in logged.text


def test_a_target_beyond_the_length_is_none():
    rows = datasets.Dataset.from_dict({"labels": [[-100, -100, -100, 5], [-100, -100, 5, 5], [5, -100, -100, 5]]})
    assert twix.with_answers(rows, "train", 3)["labels"][:] == [[-100, -100, 5, 5]]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_rows_that_become_tokens_when_they_are_read_are_the_same(load, assistant_only, logged):
    encoder = demo_encoder(assistant_only=assistant_only)
    rows = [chat(f"вопрос {n} " * (n % 7), f"ответ {n}") for n in range(1, 40)]
    _, examples = load(rows)
    kept, lazy = (twix.tokenise(examples("train"), encoder, 1, longest=24, lazily=flag) for flag in (False, True))
    assert list(kept) == list(lazy) and max(map(len, kept["input_ids"])) == 24
    assert twix.row_lengths(kept) == [len(row["input_ids"]) for row in lazy]
    assert twix.row_lengths(lazy) == [sum(len(m["content"]) for m in r["messages"]) for r in examples("train")]
    assert set(lazy.column_names).isdisjoint({"input_ids", "labels"}), "no tokens are kept"
    if assistant_only:
        kept, lazy = (twix.with_answers(part, "training", 24) for part in (kept, lazy))
        assert list(kept) == list(lazy) and 0 < len(kept) < len(examples("train")) and "left out" in logged.text
        with pytest.raises(InputError, match="--max_seq_length 2;"):
            twix.with_answers(lazy, "training", 2)


def test_an_empty_subset_is_none(load):
    selection, _ = load([chat(f"q{n}", "a", "") for n in range(4)])
    assert {subset for subset, _ in selection.counts} == {"general"}


def test_data_that_cannot_be_used_is_named_with_what_can(load, tmp_path):
    with pytest.raises(InputError, match=r"rows.jsonl: 1 prompts left by --sample_ratio 1.0; .* add rows"):
        load([chat("q", f"a{n}") for n in range(9)])
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\na,b\n", encoding="utf-8")
    with pytest.raises(InputError, match="JSON Lines, JSON lists and Parquet"):
        load(table)
