"""The SFT data: which rows are used, on which side, and the tokens that are trained on."""

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


def test_the_reasoning_share_is_what_was_asked_for(load, logged):
    selection, _ = load(MANY, sample_ratio=0.25, mix_reasoning_ratio=0.2)
    subsets = Counter()
    for (subset, _), count in selection.counts.items():
        subsets[subset] += count
    assert subsets == {"reasoning": 30, "general": 120}
    selection, _ = load(MANY, sample_ratio=0.5, mix_reasoning_ratio=0.4)  # only 60 of the 120 asked for are there
    assert "reached 20.0 %" in logged.text and sum(selection.counts.values()) == 300


@pytest.mark.parametrize("mix, used, reached", [(0.2, (10, 2), "16.7"), (0.95, (10, 90), "90.0")])
def test_too_few_rows_of_a_subset_are_said(load, logged, mix, used, reached):
    rows = [chat(f"q{n}", "a", "reasoning") for n in range(90)] + [chat(f"p{n}", "a") for n in range(10)]
    selection, _ = load(rows, mix_reasoning_ratio=mix)  # the share holds, with fewer rows
    counts = [
        sum(count for (its, _), count in selection.counts.items() if its == subset)
        for subset in ("general", "reasoning")
    ]
    assert tuple(counts) == used and f"reached {reached} %" in logged.text


BAD_ROWS = [
    (b'{"subset": "general"}', "no messages"),
    (b'{"messages": [{"role": "tool", "content": "x"}]}', "unknown role 'tool'"),
    (b'{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role ['user']"),
    (json.dumps(chat("q", "  ")).encode(), "empty assistant turn"),
    (json.dumps(chat({}, "a")).encode(), "empty user turn"),
    (json.dumps(chat([{"type": "image", "url": "x"}], "a")).encode(), "the content of the user turn is list"),
    (json.dumps(chat(7, "a")).encode(), "the content of the user turn is int"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8"),
    (b"{not json", "not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "q"}]}', "no answer at the end"),
    (b'{"messages": [7]}', "a message is no object"),
    (json.dumps(chat("q", "a", subset=["general"])).encode(), "the subset is no text"),
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
    assert twix.prompt_of(twix.turns_of(rows[0])) == [("assistant", "Hello!"), ("user", "q0")]
    assert twix.prompt_of([("system", "s"), ("assistant", "a")]) == [("system", "s"), ("assistant", "a")]
    selection, _ = load(rows, val_split=0.25)
    assert selection.rows("train") == 30 and selection.rows("validation") == 10


STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_rows_that_the_template_refuses_are_counted(load, logged):
    rows = [chat(f"q{n}", "a") for n in range(3)] + [chat("q", "a", system="s"), chat("q", "a", system="t")]
    rows[4]["messages"][0]["role"] = "user"
    selection, _ = load(rows, demo_encoder(template=STRICT))
    assert sum(selection.counts.values()) == 3
    assert "rows.jsonl:4 (the chat template refuses it: no system role)" in logged.text
    assert "rows.jsonl:5 (the chat template refuses it: roles must alternate)" in logged.text


def test_rows_of_other_subsets_are_counted(load, logged):
    rows = [chat(f"q{n}", "a", subset) for n in range(4) for subset in ("general", "reasoning", "code")]
    selection, _ = load(rows)
    assert sum(selection.counts.values()) == 8 and "rows of other subsets, not used: 4 code" in logged.text


def test_every_row_is_read_and_hashed_once(load, monkeypatch):
    opened, hashed = [], []
    read_jsonl, unit_hash = files.read_jsonl, twix.unit_hash
    monkeypatch.setattr(files, "read_jsonl", lambda path: opened.append(path) or read_jsonl(path))
    monkeypatch.setattr(twix, "unit_hash", lambda *parts: hashed.append(parts) or unit_hash(*parts))
    monkeypatch.setattr(twix, "ROWS_AT_ONCE", 7)
    _, examples = load(MANY)
    assert len(opened) == 1 and len(hashed) == 2 * len(MANY)
    assert sum(len(examples(side)) for side in twix.SIDES) == len(MANY)


def test_rows_that_cannot_be_read_do_not_shift_those_that_are_used(load, tmp_path):
    """In every format the rows are those that were selected, in the order of reading."""
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
