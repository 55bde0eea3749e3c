"""The SFT data: which rows are used, on which side, and the tokens that are trained on."""

import argparse
import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DEMO, chat, write_rows

import sft_train
from llm_alignment import files, models, twix
from llm_alignment.files import InputError


def demo_encoder(thinking=False, assistant_only=False, template=None):
    args = sft_train.build_parser().parse_args(["--model", str(DEMO / "model")])
    tokenizer = models.load_tokenizer(args)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.bos_token = tokenizer.eos_token  # some templates write one
    return twix.ChatEncoder(tokenizer, thinking=thinking, assistant_only=assistant_only)


def select(rows, **changes):
    arguments = dict(
        dataset="rows", subset="both", sample_ratio=1.0, sample_seed=42, val_split=0.1, mix_reasoning_ratio=None
    )
    args = argparse.Namespace(**(arguments | changes))
    return twix.select_rows(lambda skipped: ((f"row {n}", row) for n, row in enumerate(rows)), args)


MANY = [chat(f"question {n % 150}", f"answer {n}", "reasoning" if n % 10 == 0 else "general") for n in range(600)]


def sides(selection, rows=MANY):
    return {json.dumps(row): selection.used.get(number, (None, None))[1] for number, row in enumerate(rows)}


def test_no_prompt_is_on_both_sides():
    chosen = sides(select(MANY))
    prompts = {
        side: {json.loads(row)["messages"][0]["content"] for row in chosen if chosen[row] == side}
        for side in ("train", "validation")
    }
    assert not prompts["train"] & prompts["validation"]
    assert len(prompts["validation"]) == 15  # 10 % of the 150 prompts


def test_the_sample_does_not_depend_on_order_and_samples_are_nested():
    small, large = select(MANY, sample_ratio=0.1), select(MANY, sample_ratio=0.25)
    assert small.rows("train") + small.rows("validation") == 60
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert (
        sides(select(shuffled, sample_ratio=0.1), shuffled) == sides(small)
        and select(shuffled).sha256 == select(MANY).sha256
    )
    inside = {row for row, side in sides(small).items() if side}
    assert inside < {row for row, side in sides(large).items() if side}
    assert sides(select(MANY, sample_ratio=0.1, sample_seed=1)) != sides(small)


def test_the_counts_are_the_rows_that_are_used():
    selection = select(MANY, sample_ratio=0.3)
    used = [(row["subset"], side) for row, side in zip(MANY, sides(selection).values(), strict=True) if side]
    assert {key: used.count(key) for key in set(used)} == dict(selection.counts)


def test_the_reasoning_share_is_what_was_asked_for(logged):
    selection = select(MANY, sample_ratio=0.25, mix_reasoning_ratio=0.2)
    reasoning = sum(count for (subset, _), count in selection.counts.items() if subset == "reasoning")
    assert reasoning == 30 and sum(selection.counts.values()) == 150
    selection = select(MANY, sample_ratio=0.5, mix_reasoning_ratio=0.4)  # only 60 of the 120 asked for are there
    assert "reached 20.0 %" in logged.text and "too few reasoning rows (60)" in logged.text
    assert sum(selection.counts.values()) == 300


def test_rows_that_cannot_be_used_are_named(tmp_path, logged):
    good = [json.dumps(chat(f"q{n}", "line\u2028separator")).encode() for n in range(3)]
    bad = [
        b'{"subset": "general"}',
        b'{"messages": [{"role": "tool", "content": "x"}], "subset": "general"}',
        json.dumps(chat("q", "  ")).encode(),
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"{not json",
        json.dumps({"messages": [{"role": "user", "content": "no answer"}]}).encode(),
        b'{"messages": [{"role": ["user"], "content": "x"}], "subset": "general"}',
        json.dumps(chat("q", "a", subset=["general"])).encode(),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(good + bad) + b"\n")
    args = sft_train.build_parser().parse_args(["--dataset", str(path), "--sample_ratio", "1"])
    selection, examples = twix.load_data(args)
    assert selection.rows("train") + selection.rows("validation") == 3
    text = logged.text
    assert "skipped 8 rows" in text and "; ..." in text
    assert "rows.jsonl:4 (no messages)" in text and "rows.jsonl:5 (unknown role 'tool')" in text
    assert "rows.jsonl:6 (empty assistant turn)" in text and "rows.jsonl:7 (not UTF-8)" in text
    assert "rows.jsonl:8 (not valid JSON)" in text


def test_all_turns_are_kept_and_thinking_is_off(tmp_path):
    rows = [chat(f"q{n}", "a", system="Be brief.") for n in range(3)]
    rows[0]["messages"] += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    args = sft_train.build_parser().parse_args(["--dataset", str(path), "--sample_ratio", "1"])
    encoder = demo_encoder()
    _, examples = twix.load_data(args, encoder)
    found = {len(example["messages"]): example for side in ("train", "validation") for example in examples(side)}
    assert found[5]["messages"] == rows[0]["messages"]
    text = encoder.text(twix.turns_of(found[3]))
    assert "assistant\n<think>\n\n</think>\n\na<|im_end|>" in text and "system\nBe brief.<|im_end|>" in text


def test_streaming_reads_the_rows_that_loading_reads(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", MANY)
    common = ["--dataset", str(path), "--subset", "both", "--mix_reasoning_ratio", "0.2", "--sample_ratio", "0.25"]

    def rows(*more):
        args = sft_train.build_parser().parse_args([*common, *more])
        selection, examples = twix.load_data(args)
        rows = examples.stored("train")["train"]
        if args.streaming:
            rows = twix.training_stream(args, selection, examples)
        return [json.dumps(row["messages"]) for row in rows]

    loaded, streamed = rows(), rows("--streaming")
    assert sorted(loaded) == sorted(streamed) and loaded != streamed


def loaded(path, *more):
    args = sft_train.build_parser().parse_args(["--dataset", str(path), "--sample_ratio", "1", *more])
    return twix.load_data(args)


def test_duplicates_are_drawn_as_often_as_reported(tmp_path):
    rows = [chat("the same", "answer")] * 300 + [chat(f"q{n}", "a") for n in range(100)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for seed in range(4):
        selection, examples = loaded(path, "--sample_ratio", "0.25", "--sample_seed", str(seed))
        used = {side: len(list(examples(side))) for side in ("train", "validation")}
        assert sum(used.values()) == 100 and used == {side: selection.rows(side) for side in used}


def test_an_assistant_who_speaks_first_belongs_to_the_prompt(tmp_path):
    rows = [chat(f"q{n}", "a") for n in range(40)]
    for row in rows:
        row["messages"].insert(0, {"role": "assistant", "content": "Hello!"})
    assert twix.prompt_of(twix.turns_of(rows[0])) == [("assistant", "Hello!"), ("user", "q0")]
    assert twix.prompt_of([("system", "s"), ("assistant", "a")]) == [("system", "s"), ("assistant", "a")]
    selection, _ = loaded(write_rows(tmp_path / "rows.jsonl", rows), "--val_split", "0.25")
    assert selection.rows("train") == 30 and selection.rows("validation") == 10


def test_text_parts_are_joined_and_other_parts_named(tmp_path, logged):
    rows = [chat([{"type": "text", "text": "q"}, {"type": "text", "text": str(n)}], "a") for n in range(3)]
    rows += [chat([{"type": "image", "url": "x"}], "a"), chat(7, "a"), chat([], "a"), chat({}, "a")]
    _, examples = loaded(write_rows(tmp_path / "rows.jsonl", rows))
    prompts = {example["messages"][0]["content"] for side in ("train", "validation") for example in examples(side)}
    assert prompts == {"q0", "q1", "q2"}
    assert "rows.jsonl:4 (the content of the user turn is list, not text or text parts)" in logged.text
    assert "rows.jsonl:5 (the content of the user turn is int" in logged.text and "6 (empty user turn)" in logged.text


def test_a_null_subset_is_general(tmp_path):
    rows = [{**chat(f"q{n}", "a"), "subset": None} for n in range(4)]
    selection, _ = loaded(write_rows(tmp_path / "rows.jsonl", rows))
    assert {subset for subset, _ in selection.counts} == {"general"} and len(selection.used) == 4


STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_rows_that_the_template_refuses_are_counted(tmp_path, logged):
    rows = [chat(f"q{n}", "a") for n in range(3)] + [chat("q", "a", system="s"), chat("q", "a", system="t")]
    rows[4]["messages"][0]["role"] = "user"
    args = sft_train.build_parser().parse_args([
        "--dataset",
        str(write_rows(tmp_path / "rows.jsonl", rows)),
        "--sample_ratio",
        "1",
    ])
    selection, _ = twix.load_data(args, demo_encoder(template=STRICT))
    assert len(selection.used) == 3
    assert "rows.jsonl:4 (the chat template refuses it: no system role)" in logged.text
    assert "rows.jsonl:5 (the chat template refuses it: roles must alternate)" in logged.text


def test_too_few_rows_of_a_subset_are_said(logged):
    rows = [chat(f"q{n}", "a", "reasoning") for n in range(90)] + [chat(f"p{n}", "a") for n in range(10)]
    selection = select(rows, mix_reasoning_ratio=0.2)  # the share holds, with fewer rows
    assert Counter(subset for subset, _ in selection.used.values()) == {"general": 10, "reasoning": 2}
    assert "too few general rows (10)" in logged.text and "asked for 20.0 %, reached 16.7 %" in logged.text
    logged.clear()
    selection = select(rows, mix_reasoning_ratio=0.95)
    assert len(selection.used) == 100 and "too few reasoning rows (90)" in logged.text
    assert "asked for 95.0 %, reached 90.0 %" in logged.text


def test_rows_of_other_subsets_are_counted(logged):
    rows = [chat(f"q{n}", "a", subset) for n in range(4) for subset in ("general", "reasoning", "code")]
    assert len(select(rows).used) == 8 and "rows of other subsets, not used: 4 code" in logged.text


def test_a_hub_data_set_stays_one(tmp_path, monkeypatch):
    """Its rows are selected by number, not copied."""
    import datasets

    rows = [chat(f"q{n}", "a") for n in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    from_file = {"data_files": str(path), "split": "train", "cache_dir": str(tmp_path)}
    monkeypatch.setattr(twix, "hub_dataset", lambda *_, **__: datasets.load_dataset("json", **from_file))
    selection, examples = loaded("owner/name")
    stored = examples.stored("train", "validation")
    assert stored["train"].cache_files and len(stored["train"]) == selection.rows("train")
    for side in stored:
        assert [twix.turns_of(row) for row in stored[side]] == [twix.turns_of(row) for row in examples(side)]
    assert selection.used == loaded(path)[0].used


def test_rows_are_read_once_to_select_and_once_to_load(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", MANY)
    calls = []
    read = files.read_objects
    monkeypatch.setattr(files, "read_objects", lambda *args: calls.append(args) or read(*args))
    monkeypatch.setattr(twix, "ROWS_AT_ONCE", 7)
    hashed = []
    unit_hash = twix.unit_hash
    monkeypatch.setattr(twix, "unit_hash", lambda *parts: hashed.append(parts) or unit_hash(*parts))
    _, examples = loaded(path, "--subset", "both")
    stored = examples.stored("train", "validation")
    assert len(calls) == 2 and len(hashed) == 2 * len(MANY)
    assert len(stored["train"]) + len(stored["validation"]) == len(MANY)
    assert [row["messages"] for row in stored["train"]] == [row["messages"] for row in examples("train")]


def test_rows_that_cannot_be_read_do_not_shift_those_that_are_used(tmp_path):
    """In every format the rows that are loaded are those that were selected, in the order of reading."""
    rows = [chat(f"q{n}", "a") for n in range(60)]
    whole, damaged = [json.dumps(row) for row in rows], ["{not json", "7", "", '{"messages": []}', *"[]"]
    broken = [line for n, row in enumerate(whole) for line in (damaged[n % 6], row)]
    write_rows(tmp_path / "rows.jsonl", broken)
    (tmp_path / "rows.json").write_text(json.dumps([item for row in rows for item in (7, row, {"messages": []})]))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress((tmp_path / "rows.json").read_bytes()))
    pq.write_table(
        pa.Table.from_pylist([row for row in rows for row in ({"messages": None}, row)]), tmp_path / "rows.parquet"
    )
    (tmp_path / "folder").mkdir()
    for name, part in ("a", broken[:50]), ("b", broken[50:]):
        write_rows(tmp_path / "folder" / f"{name}.jsonl", part)
    found = set()
    for path in (*tmp_path.glob("rows.*"), tmp_path / "folder"):
        selection, examples = loaded(path, "--sample_ratio", "0.5", "--val_split", "0.2")
        stored = examples.stored("train", "validation")
        assert {side: len(stored[side]) for side in stored} == {"train": 24, "validation": 6}
        for side in stored:
            assert list(stored[side]) == list(examples(side))
        numbers = [[int(row["messages"][0]["content"][1:]) for row in stored[side]] for side in stored]
        assert numbers == [sorted(part) for part in numbers]
        found.add((selection.sha256, json.dumps(numbers)))
    assert len(found) == 1


def test_a_file_that_changes_between_the_two_reads_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [chat(f"q{n}", "a") for n in range(6)])
    _, examples = loaded(path)
    write_rows(path, [chat(f"q{n}", "a") for n in range(3)])
    with pytest.raises(InputError, match="changed while they were read"):
        examples.stored("train", "validation")


def test_rows_that_are_not_used_are_parsed_once(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", MANY)
    parsed = []
    monkeypatch.setattr(files, "parse_json", lambda text: parsed.append(text) or json.loads(text))
    _, examples = loaded(path, "--subset", "both", "--sample_ratio", "0.25")
    examples.stored("train", "validation")
    assert len(parsed) == len(MANY) + 150


# ---------------------------------------------------------------------------------------------------------------------
# The text that is trained on

TALK = [
    ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "<think>\nhm\n</think>\n\nD"), ("user", "E"),
    ("assistant", "F"),
]  # fmt: skip
# as Qwen3's: the last answer gets a block, thoughts of earlier answers go
QWEN3_LIKE = (DEMO / "model" / "chat_template.jinja").read_text("utf-8")
OLDER_QWEN3_LIKE = QWEN3_LIKE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
EMPTY = "<think>\n\n</think>\n\n"


def row_of(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("template", [QWEN3_LIKE, OLDER_QWEN3_LIKE])
def test_every_answer_begins_as_evaluation_lets_it_begin(template):
    """The generation prompt of turn k, with and without thinking, stands before answer k in the training text."""
    for thinking, block in ((False, EMPTY), (True, "")):
        encoder = demo_encoder(thinking, template=template)
        text = encoder.text(TALK)
        opening = "<|im_start|>assistant\n" + block
        assert text == "".join(
            f"<|im_start|>user\n{question}<|im_end|>\n{opening}{answer}<|im_end|>\n"
            for question, answer in ("AB", "CD", "EF")
        )
        for turn in (1, 3, 5):
            prompt = encoder.render(TALK[:turn], add_generation_prompt=True)
            assert prompt.endswith(opening) and text.split(opening)[(turn + 1) // 2][0] == TALK[turn][1][-1]


def test_thoughts_stay_with_thinking_alone():
    talk = [("user", "A"), ("assistant", "<think>\nhm\n</think>\n\nB")]
    assert demo_encoder(True).text(talk).endswith("assistant\n<think>\nhm\n</think>\n\nB<|im_end|>\n")
    assert demo_encoder(False).text(talk).endswith(f"assistant\n{EMPTY}B<|im_end|>\n")
    unfinished = [("user", "A"), ("assistant", "<think>\nhm")]
    assert (
        "no text outside" in demo_encoder(False).refusal(unfinished) and demo_encoder(True).refusal(unfinished) is None
    )


@pytest.mark.parametrize("template", [QWEN3_LIKE, OLDER_QWEN3_LIKE, STRICT])
@pytest.mark.parametrize("thinking", [False, True])
def test_assistant_only_trains_on_answers_and_their_end(template, thinking):
    encoder = demo_encoder(thinking, assistant_only=True, template=template)
    shown = encoder.marked(row_of([("user", "да"), ("assistant", "нет"), ("user", "да"), ("assistant", "нет")]), 999)
    block = EMPTY if template != STRICT and not thinking else ""
    turn = f"<|im_start|>user\nда<|im_end|>\n<|im_start|>assistant\n{block}[[нет<|im_end|>]]\n"
    assert shown == turn * 2
    whole = demo_encoder(thinking, template=template)(row_of(TALK[:2]))
    assert whole["labels"] == whole["input_ids"]


def test_a_template_without_turns_has_no_assistant_only_loss():
    with pytest.raises(InputError, match="its chat template fails on a conversation of two turns .*no"):
        demo_encoder(template="{{ raise_exception('no') }}")
    with pytest.raises(InputError, match="--assistant_only_loss"):
        demo_encoder(assistant_only=True, template="{% for m in messages %}{{ m.content }}{% endfor %}")


def test_a_turn_with_the_templates_own_marker_is_refused():
    assert "own '<|im_start|>assistant'" in demo_encoder().refusal([
        ("user", "<|im_start|>assistant\nA"),
        ("assistant", "B"),
    ])


def test_the_real_templates():
    """TRL's copies of the chat templates: Qwen3's and others', where the answers can be told from the rest."""
    trl = pytest.importorskip("trl")
    for name in ("qwen3", "qwen3_instruct_2507", "qwen2_5", "qwen3_5_think", "llama3", "gemma", "phi3"):
        template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
        encoder = demo_encoder(assistant_only=True, template=template)
        text = encoder.text([("user", "AAA"), ("assistant", "BBB"), ("user", "CCC"), ("assistant", "DDD")])
        answers = [text[start:end] for start, end in encoder.answer_spans(text)]
        assert [answer[:3] for answer in answers] == ["BBB", "DDD"], name
        assert all(answer[3:] == encoder.end for answer in answers), name
        if name in {"qwen3", "qwen3_5_think"}:
            assert text.count(EMPTY) == 2, name


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_a_pass_of_a_sized_stream_has_its_length_also_when_rows_are_left_out():
    import datasets

    def read():
        for length in (3, 1, 2, 5, 4):
            yield {"input_ids": [length] * length}

    stream = datasets.IterableDataset.from_generator(read).filter(lambda row: len(row["input_ids"]) != 5)
    sized = twix.sized_stream(stream, 5, batch=1, step=2)
    assert len(sized) == 5
    assert [len(row["input_ids"]) for row in sized] == [3, 1, 4, 2, 3]
