"""TAT-QA: both metrics, the reading of answers, files and prompts, and answering table by table."""

import json

import pytest
from conftest import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import context, question, rows_of

from llm_alignment import generation, models, prefixes, stats, tatqa
from llm_alignment.batches import common_length
from llm_alignment.files import InputError, SkippedRows
from llm_alignment.generation import Decoding
from llm_alignment.prompts import PromptStyle
from llm_alignment.tatqa import PromptContent, tatqa_em_f1, tatqa_em_like, tatqa_parse, tatqa_prompt

# ---------------------------------------------------------------------------------------------------------------------
# The official metric, each rule worked by hand


@pytest.mark.parametrize(
    "gold, prediction, scale, expected",
    [
        # an empty prediction scores 0, 0
        (question(), "", "", (0, 0)),
        (question(), [], "", (0, 0)),
        # a number: its value rounded to two decimals times its scale
        (question("arithmetic", 172, "million"), "172", "million", (1, 1)),
        (question("arithmetic", 172, "million"), "172,000,000", "", (1, 1)),
        (question("arithmetic", 172, "million"), "172", "thousand", (0, 0)),
        (question("arithmetic", 2.934, ""), "2.93", "", (1, 1)),
        (question("arithmetic", 1.234, "thousand"), "1230", "", (1, 1)),
        # percent: 26.82 percent is 0.2682, written as a share, with "%" or with its scale
        (question("arithmetic", 26.82, "percent"), "0.2682", "", (1, 1)),
        (question("arithmetic", 26.82, "percent"), "26.82%", "", (1, 1)),
        (question("arithmetic", 26.82, "percent"), "26.82%", "million", (1, 1)),
        (question("arithmetic", 26.82, "percent"), "26.82", "percent", (1, 1)),
        (question("arithmetic", 26.82, "percent"), "26.82", "", (0, 0)),
        # the bare form is for a single number without scale alone
        (question("arithmetic", 26.82, "percent"), ["0.2682", "1"], "", (0, 0)),
        # signs and parentheses: a bare parenthesised number is negative, one with a comma is not
        (question("arithmetic", -59.9, ""), "(59.9)", "", (1, 1)),
        (question("arithmetic", -1234, ""), "(1,234)", "", (0, 0)),
        (question("arithmetic", 1234, ""), "(1,234)", "", (1, 1)),
        # characters dropped from numbers; a scale word of its own
        (question("span", ("$1,496.5",), "million"), "1496.5", "million", (1, 1)),
        (question("span", ("$1.5 million",)), "1500000", "", (1, 1)),
        (question("span", ("1.5 million",)), "\u20ac1.5", "million", (1, 1)),
        # a second word that is no scale word: not a number
        (question("span", ("5 apples",)), "5 apples", "", (1, 1)),
        (question("span", ("5 apples",)), "5", "", (0, 0)),  # "5.0" is not the word "5"
        # texts get the scale's name
        (question("span", ("Net sales",), "percent"), "net sales", "percent", (1, 1)),
        (question("span", ("Net sales",), "percent"), "net sales", "", (0, 0.8)),
        # normalisation: case, punctuation, articles, spaces
        (question("span", ("The modified, retrospective method",)), "modified  retrospective Method.", "", (1, 1)),
        # bag-of-words F1 rounded to two decimals
        (question("span", ("lower cost of sales",)), "cost of materials", "", (0, 0.57)),
        # several spans: sorted, so their order does not matter
        (question("multi-span", ("2019", "2018")), ["2018", "2019"], "", (1, 1)),
        (question("multi-span", ("2019", "2018")), ["2018"], "", (0, 0.67)),
        (question("multi-span", ("73,260", "57,768"), "thousand"), ["57,768", "73,260"], "thousand", (1, 1)),
        (question("span", ("2 hundred",)), "200", "", (1, 1)),
        (question("span", ("Net sales",)), "the", "", (0, 0)),  # no word is left of the prediction
        # count and arithmetic, whose F1 equals their EM
        (question("arithmetic", 172, ""), ["172", "5"], "", (0, 0)),
        (question("count", "3"), "3", "", (1, 1)),
        (question("count", "3"), "3 items", "", (0, 0)),
    ],
)
def test_official_metric(gold, prediction, scale, expected):
    assert tatqa_em_f1(gold, prediction, scale) == expected


# ---------------------------------------------------------------------------------------------------------------------
# The metric of the published runs


@pytest.mark.parametrize(
    "gold, text, expected",
    [
        (question("arithmetic", 100.0), "It rose by 104.9 million", True),
        (question("arithmetic", 100.0), "105.1", False),
        (question("arithmetic", 2.0), "2.5", True),
        (question("arithmetic", 2.0), "2.6", False),
        (question("arithmetic", -59.9), "-59.9", True),
        (question("arithmetic", 59.9), "+59.9", True),
        (question("arithmetic", -59.9), "59.9", False),
        (question("arithmetic", -59.9), "(59.9)", False),  # it knows no parentheses,
        (question("arithmetic", -59.9), "\u221259.9", False),  # no other minus,
        (question("arithmetic", -59.9), "- 59.9", False),  # and a sign stands directly before the digits
        (question("arithmetic", 1496.5), "$1,496.5 then 3", True),
        (question("arithmetic", 1496.5), "1,4,9,6.5", True),
        (question("arithmetic", 3), "first 7, then 3", False),
        (question("arithmetic", 3), "no number", False),
        (question("arithmetic", 4), "Q4 was the best", True),  # inside a word too
        (question("arithmetic", 5), ".5", True),  # the first run of digits is 5, and a decimal part follows it
        (question("arithmetic", "1,200"), "1200.", True),  # gold is read the same way
        (question("count", "3"), "3", True),
        (question("count", "3"), "13 of them", True),  # a count is right when it is contained
        (question("count", 3), "2.6", False),
        (question("span", ("the Net sales",)), "These are the net  sales, mostly.", True),
        (question("span", ("the Net sales",)), "These are net sales, mostly.", False),  # articles stay
        (question("span", ("$1,496.5",)), "$1,496.5.", True),  # commas and currency signs go, full stops stay
        (question("span", ("1,496.5",)), "1496.5 million", True),
        (question("span", ("long-term",)), "LONG-TERM debt", True),
        (question("span", ("long-term",)), "long term debt", False),
        (question("span", ("net sales",)), "costs", False),
        (question("multi-span", ("2019", "2018")), "2018", True),
        (question("multi-span", ("2019", "")), "anything", False),
    ],
)
def test_metric_of_the_published_runs(gold, text, expected):
    assert tatqa_em_like(gold, text) is expected


def em_like_by_the_words(kind, answer, text):
    """The rule again, character by character."""

    def number(text):
        text = text.replace(",", "")
        start = next((place for place, char in enumerate(text) if char.isdecimal()), None)
        if start is None:
            return None
        end = start
        while end < len(text) and text[end].isdecimal():
            end += 1
        if text[end : end + 1] == "." and text[end + 1 : end + 2].isdecimal():
            end += 1
            while end < len(text) and text[end].isdecimal():
                end += 1
        sign = -1 if start and text[start - 1] == "-" else 1
        return sign * float(text[start:end])

    def words(text):
        return "".join(char for char in " ".join(text.lower().split()) if char.isalnum() or char in "_ .-")

    if kind == "arithmetic":
        value, gold = number(text), number(str(answer))
        return value is not None and abs(value - gold) <= max(0.5, 0.05 * abs(gold))
    parts = [str(answer)] if kind == "count" else answer
    return any(words(part) in words(text) for part in parts if words(part))


answer_texts = st.text(alphabet="0123456789.,+-() $%\u00a0\tabAN\u00e9\u2212_;", max_size=14)
numbers = st.one_of(st.integers(-3000, 3000), st.decimals(-300, 300, places=2).map(float)).map(str)


@given(st.sampled_from(["arithmetic", "count", "span", "multi-span"]), st.data())
@settings(max_examples=400, deadline=None)
def test_metric_of_the_published_runs_equals_a_second_implementation(kind, data):
    if kind in {"arithmetic", "count"}:
        answer = data.draw(numbers)
        near = st.floats(0.9, 1.1).map(lambda factor: f"{float(answer) * factor:,.2f}")
        text = data.draw(st.one_of(answer_texts, near, st.tuples(answer_texts, near).map("".join)))
    else:
        answer = data.draw(st.lists(answer_texts, min_size=1, max_size=3))
        around = st.tuples(answer_texts, st.sampled_from([*answer, *map(str.upper, answer)]), answer_texts)
        text = data.draw(st.one_of(answer_texts, around.map("".join)))
    assert tatqa_em_like(question(kind, answer), text) is em_like_by_the_words(kind, answer, text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("172 million", (["172"], "million")),
        ("172 Million", (["172"], "million")),
        ("\nAnswer: 26.82 percent\nQuestion: next?", (["26.82"], "percent")),
        ("73,260; 57,768 thousand", (["73,260", "57,768"], "thousand")),
        ("5 million; 6 million", (["5 million", "6 million"], "")),
        ("The answer is 12%.", (["12%"], "")),
        ("net sales.", (["net sales."], "")),
        ("", ([], "")),
    ],
)
def test_parse(text, expected):
    assert tatqa_parse(text) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Reading and prompts


@pytest.mark.parametrize(
    "content, words",
    [
        ('[{"table": ', ["not valid JSON", "line 1"]),
        ("{}", ["not a list"]),
        ('[{"table": {"table": [[1]]}, "paragraphs": [], "questions": []}]', ["context 1"]),
        ('[{"paragraphs": []}]', ["context 1"]),
        ("[" * 100_000, ["nested too deeply"]),
        (json.dumps([context({**question(), "question": "\ud800?"})]), ["context 1", "unpaired surrogate"]),
        ("version https://git-lfs.github.com/spec/v1", ["Git LFS pointer"]),
        ("[]", ["no usable question"]),
        (json.dumps([context(question(answer=None))]), ["context 1, question q1", "None is not a list of texts"]),
        (json.dumps([context(question("essay"))]), ["question q1", "'essay'"]),
        (json.dumps([{**context(question()), "table": {"table": [["", " "]]}}]), ["the table is empty"]),
        (json.dumps([context(question("count", "many"))]), ["'many' is not a number"]),
        (json.dumps([context(question("count", "9" * 5000))]), ["99 is not a number"]),
        (json.dumps([context({**question(), "question": " "})]), ["no question"]),
        (json.dumps([context({**question(), "rel_paragraphs": 3})]), ["context 1"]),
        (json.dumps([{**context(question()), "paragraphs": [{"order": "9" * 5000, "text": "a"}]}]), ["context 1"]),
        (json.dumps([{**context(question()), "table": {"table": "ab"}}]), ["context 1"]),
        (json.dumps([context(question(scale="dozen"))]), ["'dozen'"]),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, content, words):
    path = tmp_path / "tatqa_dataset_train.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        tatqa.read_tatqa(path, SkippedRows())
    assert all(word in str(error.value) for word in [str(path), *words])
    assert "\n" not in str(error.value)


def test_bad_questions_are_left_out_and_counted(tmp_path):
    path = tmp_path / "tatqa_dataset_dev.json"
    path.write_text(json.dumps([context(question(answer=[], uid="bad"), question(uid="good"))]), encoding="utf-8")
    skipped = SkippedRows()
    (kept,) = tatqa.read_tatqa(path, skipped)
    assert [q["uid"] for q in kept["questions"]] == ["good"]
    assert skipped.count == 1 and "question bad" in skipped.places[0]
    path.write_text(json.dumps([context(question(uid="one")), context(question(uid="one"))]), encoding="utf-8")
    _, second = tatqa.read_tatqa(path, skipped)
    assert not second["questions"] and "another question has its uid" in skipped.places[1]


@pytest.mark.parametrize("text", ["9" * 400, "9" * 305 + " billion", "-" + "9" * 400 + "%", "1" * 300])
def test_an_answer_of_endless_digits_is_a_wrong_number(text):
    for kind in ("arithmetic", "span"):
        asked = question(kind, "3" if kind == "arithmetic" else ["3"])
        for parts, scale in (tatqa.tatqa_parse(text), ([text], "billion")):
            assert tatqa.tatqa_em_f1(asked, parts, scale) == (0, 0)


def test_prompt_shows_table_and_passages_within_the_limits():
    gold = question(rel_paragraphs=["1"])
    text = tatqa_prompt(context(gold), gold)
    assert "|  | 2019 | 2018 |\n| --- | --- | --- |\n| Sales | $1,496.5 | (59.9) |" in text
    assert "First passage" in text and "Second" not in text and text.endswith("Question: What?\nAnswer:")
    small = PromptContent(tatqa_table_rows=2, tatqa_table_cols=2, tatqa_para_chars=15, tatqa_only_rel_paras=False)
    text = tatqa_prompt(context(gold), gold, small)
    assert "| Sales | $1,496.5 |\n\n" in text and "Costs" not in text
    assert "Text:\nFirst passage\n" in text  # in order, cut at a word
    assert "Text:\nFir\n" in tatqa_prompt(context(gold), gold, PromptContent(tatqa_para_chars=3))
    assert "Text:" not in tatqa_prompt(context(gold), gold, PromptContent(tatqa_para_chars=0))
    piped = context(gold)
    piped["table"]["table"][1][0] = "Sales | net"
    assert "| Sales / net | $1,496.5 |" in tatqa_prompt(piped, gold)
    both = PromptContent(tatqa_only_rel_paras=False)
    assert "\nSecond" in tatqa_prompt(context(gold), gold, both).partition("Text:\nFirst")[2]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


PLAIN = PromptStyle(use_chat_template=False)


@pytest.fixture(scope="module")
def questions(demo_tokenizer, tmp_path_factory):
    path, how = DEMO / "tatqa" / "tatqa_dataset_dev.json", (demo_tokenizer, PLAIN, PromptContent(), 20)
    chosen = tatqa.evaluation_questions(path, *how)
    reversed_path = tmp_path_factory.mktemp("tatqa") / path.name
    reversed_path.write_text(json.dumps(json.loads(path.read_text("utf-8"))[::-1]), "utf-8")
    assert tatqa.evaluation_questions(reversed_path, *how) == chosen
    return chosen


@pytest.fixture(scope="module")
def model(demo_base):
    return models.load_model(demo_base).eval()


def prompt_tokens_read(model, run):
    """The result of `run()`, and how many prompt tokens went through the model (more than one in a row)."""
    read = []

    def count(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        read.append(ids.numel() if ids.shape[1] > 1 else 0)

    with model.register_forward_pre_hook(count, with_kwargs=True):
        return run(), sum(read)


@pytest.mark.slow
def test_reading_a_table_once_changes_no_answer(model, demo_tokenizer, questions, tmp_path, monkeypatch):
    answers, read = {}, {}
    for share in (True, False):
        monkeypatch.setattr(prefixes, "cache_problem", lambda _, share=share: "" if share else "asked so")
        for one_line in (True, False):
            task = tatqa.tatqa_evaluation(questions, Decoding(12), PromptStyle(use_chat_template=not one_line))
            path = tmp_path / f"{share}_{one_line}.jsonl"
            rows, read[share] = prompt_tokens_read(
                model, lambda task=task, path=path: rows_of(task, model, demo_tokenizer, path)
            )
            assert [row["question_id"] for row in rows] == [question["question_id"] for question in questions]
            answers[share, one_line] = [row["answer"] for row in rows]
    assert answers[True, True] == answers[False, True] and answers[True, False] == answers[False, False]
    assert all("\n" not in answer for answer in answers[True, True])
    assert read[True] < 0.7 * read[False]


def test_a_row_holds_what_a_reader_needs(model, demo_tokenizer, questions):
    rows = tatqa.answer_questions(model, demo_tokenizer, questions[:2], decoding=Decoding(6), one_line=True)
    for row, asked in zip(rows, questions, strict=False):
        assert set(row) == {
            "question_id", "context", "question", "answer_type", "scale", "gold", "answer", "em_like", "em", "f1",
            "batch_size",
        }  # fmt: skip
        assert row["gold"] == asked["answer"] and row["context"] == asked["context"]
        assert row["em_like"] is tatqa_em_like(asked, row["answer"])
        assert (row["em"], row["f1"]) == tatqa_em_f1(asked, *tatqa_parse(row["answer"]))


@pytest.mark.parametrize("opens", [True, False])
def test_a_thought_is_no_answer(demo_tokenizer, questions, monkeypatch, model, opens):
    """Templates of thinking models may open the block themselves: what the model writes then closes it alone."""
    text = "It is 5.\n</think>\n\n7" if opens else "<think>It is 5.\n</think>\n\n7"
    tokens = demo_tokenizer(text)["input_ids"] + [demo_tokenizer.eos_token_id]
    monkeypatch.setattr(
        generation, "generate_grouped", lambda model, groups, *_, **__: [tokens for g in groups for _ in g]
    )
    prompt = demo_tokenizer("Answer:<think>\n" if opens else "Answer:")["input_ids"]
    asked = [{**questions[0], "tokens": prompt}]
    rows = tatqa.answer_questions(model, demo_tokenizer, asked, decoding=Decoding(64), one_line=False)
    assert [row["answer"] for row in rows] == ["7"]


def test_groups_of_one_prompt_or_without_a_common_beginning(model, demo_tokenizer):
    settings = generation.generation_config(demo_tokenizer, Decoding(8))
    texts = [
        ["What is 3 + 4?"],
        ["Name the capital of France.", "Spell the word house."],
        ["Now add 5.", "Now add 5."],
    ]
    groups = [[demo_tokenizer(text)["input_ids"] for text in group] for group in texts]
    assert [common_length(group) for group in groups] == [len(groups[0][0]), 0, len(groups[2][0])]
    expected, read_alone = prompt_tokens_read(
        model, lambda: generation.generate_grouped(model, groups, settings, 8, share_prefix=False)
    )
    answers, read = prompt_tokens_read(model, lambda: generation.generate_grouped(model, groups, settings, 8))
    assert answers == expected and len(answers) == 1 + 2 + 2
    assert read < read_alone


def test_an_evaluation_goes_on_where_it_stopped(model, demo_tokenizer, questions, tmp_path):
    task = tatqa.tatqa_evaluation(questions, Decoding(8), PLAIN)
    whole = rows_of(task, model, demo_tokenizer, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().split(b"\n")
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"\n".join(lines[:9]) + b"\n" + lines[9][:20])  # killed in the middle of a context and of a line
    assert rows_of(task, model, demo_tokenizer, cut) == whole
    assert sorted(cut.read_bytes().split(b"\n")) == sorted(lines)
    with pytest.raises(InputError, match="max_new_tokens"):
        rows_of(tatqa.tatqa_evaluation(questions, Decoding(9), PLAIN), model, demo_tokenizer, cut)


def test_summary_and_comparison_by_answer_type():
    def row(kind, like, em, f1):
        return {"answer_type": kind, "em_like": like, "em": em, "f1": f1, "batch_size": 4}

    before = [row("span", True, 1.0, 1.0), row("span", False, 0.0, 0.5), row("count", False, 0.0, 0.0)]
    after = [row("span", True, 1.0, 1.0), row("span", True, 1.0, 1.0), row("count", True, 0.0, 0.0)]
    before, after = ([{"question_id": n, **row} for n, row in enumerate(rows)] for rows in (before, after))
    summary = tatqa.summarise_tatqa(before)
    assert summary["em_like"] == pytest.approx(100 / 3) and summary["f1"] == pytest.approx(50)
    assert summary["batch_sizes"] == [4]
    assert summary["by_type"]["span"] == {"em_like": 50, "em": 50, "f1": 75, "n": 2}
    deltas = tatqa.compare_tatqa(before, after[::-1])  # rows are paired by id
    assert deltas["tatqa"]["mean"] == pytest.approx(200 / 3)
    assert deltas["tatqa"]["p"] == 0.5  # two changed, both gained: exact McNemar
    assert deltas["tatqa_em"]["by_type"]["span"]["mean"] == pytest.approx(50)
    assert deltas["tatqa_em"]["by_type"]["count"]["n"] == 1
    assert deltas["tatqa_f1"]["mean"] == pytest.approx(50 / 3)


def test_f1_is_tested_by_how_much_it_changed_and_not_by_how_often():
    f1s = [0.0] * 5 + [1.0], [0.1] * 5 + [0.0]
    before, after = (
        [{"question_id": n, "answer_type": "span", "em_like": False, "em": 0.0, "f1": f1} for n, f1 in enumerate(side)]
        for side in f1s
    )
    p = tatqa.compare_tatqa(before, after)["tatqa_f1"]["p"]
    assert p == stats.paired_delta(*f1s)["p"] != stats.mcnemar(*f1s)["p"]


def test_what_decides_an_answer_is_in_the_fingerprint_and_sampled_answers_are_not_shared(questions):
    tasks = [
        tatqa.tatqa_evaluation(asked, decoding, style)
        for asked, decoding, style in (
            (questions, Decoding(12), PLAIN),
            (questions[:-1], Decoding(12), PLAIN),
            (questions, Decoding(12), PromptStyle()),
            *(
                (questions, Decoding(12, **change), PLAIN)
                for change in ({"temperature": 0.5}, {"top_p": 0.5}, {"seed": 1})
            ),
            (questions, Decoding(13), PLAIN),
        )
    ]
    assert len({json.dumps(task.settings, sort_keys=True) for task in tasks}) == len(tasks) == 7
    assert [task.is_cached for task in tasks] == [True, True, True, False, True, True, True]
    one, *_ = tasks[0].references
    assert (
        one[0] == questions[0]["question_id"]
        and one[1] == questions[0]["prompt"]
        and one[3] == questions[0]["context"]
    )


def test_a_prompt_that_is_cut_keeps_its_question(demo_tokenizer):
    path, style = (
        DEMO / "tatqa" / "tatqa_dataset_dev.json",
        PromptStyle(use_chat_template=False, max_prompt_length=120),
    )
    for asked in tatqa.evaluation_questions(path, demo_tokenizer, style, PromptContent(), 20):
        assert len(asked["tokens"]) <= 120 and asked["question"].strip() in asked["prompt"]


def test_questions_on_one_table_are_one_cluster():
    def rows(right):
        row = {"answer_type": "span", "em": right, "f1": right, "em_like": bool(right)}
        return [{**row, "question_id": f"q{n}", "context": f"table {n // 4}"} for n in range(8)]

    deltas = tatqa.compare_tatqa(rows(0.0), rows(1.0))
    for name in ("tatqa", "tatqa_em", "tatqa_f1"):
        assert deltas[name]["clusters"] == 2 and deltas[name]["n"] == 8
        assert deltas[name]["p"] == 0.5  # two tables gained; eight questions on their own would give 2 / 2**8
        assert deltas[name]["by_type"]["span"]["clusters"] == 2


def test_a_plan_counts_a_table_once():
    rest = {"question_id": "q", "answer_type": "count", "answer": 1, "scale": "", "context": "t", "prompt": ""}
    questions = [{**rest, "tokens": list(text)} for text in ("a table, first", "another", "a table, second one")]
    expected = len("a table, first" + "second one" + "another") - len("a") + 3 * 5
    assert tatqa.tatqa_evaluation(questions, Decoding(5), PLAIN).tokens(None) == expected
