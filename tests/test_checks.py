"""Checks of answers: what a fair reader accepts passes, and near misses do not."""

import json
from collections import Counter

import pytest
from conftest import DEMO

from llm_alignment.checks import DATA, TYPES, check_problem, passed, read_checked
from llm_alignment.files import InputError


def check(kind: str, **keys) -> dict:
    return {"type": kind, **keys}


PARIS = check("contains", values=["Paris"])
TWELVE = check("number", values=[12, "twelve", "двенадцать"], units=["euro", "€"])
HALF = check("number", values=[1250.5])
QUOTED = check("equals", values=["The night train"], case=True)
OBJECT = check("json_keys", values={"city": "Rome", "year": 1999})
SORTED = check("items", values=["ant", "bee", "cat"])

# check, question, accepted, refused
CASES = [
    (check("equals", values=["Paris"]), "", ["paris.", '"Paris"', "**Paris**", "Answer: Paris", "```\nParis\n```"],
     ["Paris or Rome", "not Paris", "Париж", "Paris, France", "Paris is it", "Pariss", ""]),
    (QUOTED, "", ["The night train.", "«The night train»", "Copied:\nThe night  train"],
     ["the night train", "The night", "The night train leaves", "A The night train"]),
    (check("equals", values=["телёнок"]), "", ["Теленок", "Телёнок."], ["calf", "телёнок и корова"]),
    (PARIS, "",
     ["It is Paris.", "PARIS", "Paris, not London", "'Paris'", "**Paris** is the capital", "not Rome but Paris"],
     ["It is not Paris.", "Paris is not the capital.", "It isn't Paris", "Paris or London", "London or Paris",
      "Parisian", "Париж", "Paris isn't it", "Не Paris"]),
    (check("contains", values=["storm", "sea"], all=True), "", ["A storm at sea"],
     ["A storm", "the sea", "stormy seas"]),
    (check("contains", values=["21:10", "9:10 pm"]), "", ["At 21:10.", "9:10 PM"],
     ["21:1", "1:21:10", "21:105", "9:10 am"]),
    (check("contains", values=["07.11.2023"]), "", ["07.11.2023", "Дата: 07.11.2023."],
     ["7.11.2023", "07.11.20231", "107.11.2023"]),
    (check("contains", values=["ICE"], case=True), "", ["ICE", "It is ICE."], ["ice", "Ice", "DICE"]),
    (TWELVE, "3 pens at 2 euros, a book for 6",
     ["12", "12 euros", "€12", "She pays 12€ for 3 pens.", "twelve", "Двенадцать.", "3 * 2 + 6 = 12", "12.0",
      "**12**", "$12$", "1. First: 12", "12 for the 3 pens and the book at 6"],
     ["12 dollars", "$12", "120", "1.12", "112", "12.5", "-12", "13", "3 * 2 + 6 = 13", "not 12", "12 or 13",
      "12, so 11", "twelve steps give 13", "", "3", "thirteen", "12%", "at 12:30"]),
    (check("number", values=[8]), "", ["8. It has 8 legs", "8.", "8.\nThat is all"], ["1. 7\n2. 9", "9\n8. nothing"]),
    (check("number", values=[70], units=[]), "20 percent of 350", ["70", "It is 70."], ["70%", "70 percent", "70 kg"]),
    (HALF, "", ["1,250.5", "1250,5", "1 250,5", "It is 1250.50."], ["1250", "12505", "1,250", "1250.55", "1.250.5"]),
    (check("number", values=[-4]), "2 - 9 + 3", ["-4", "−4", "2 - 9 + 3 = -4"], ["4", "2-4", "- 5"]),
    (check("number", values=[250]), "125", ["250", "125 * 2 = 250"], ["125", "2500", "2,500", "1 250"]),
    (check("number", values=[71]), "Which is larger, 17 or 71?", ["71", "71 is larger than 17"], ["17", "neither"]),
    (check("regex", values=[r"\A\W*yes\W*\Z"], case=True), "", ["yes", " yes."], ["Yes", "yes it is", "да"]),
    (check("regex", values=["feather", "wing"]), "", ["Its Feathers", "wings"], ["legs"]),
    (check("regex", values=["money"], **{"not": True}), "", ["It keeps savings."], ["It keeps Money."]),
    (check("words", count=5), "", ["Rain fell all night long.", "Дождь идёт уже третий день"],
     ["Rain fell all night", "a b c d e f"]),
    (check("words", count=[2, 3]), "", ["one two", "don't you see"], ["one", "a b c d"]),
    (check("lines", count=2), "", ["a\nb", "a\n\n b \n"], ["a b", "a\nb\nc", ""]),
    (check("lines", count=2, matching="^- "), "", ["- a\n- b", "List:\n- a\n- b"], ["- a\nb", "-a\n-b"]),
    (check("items", count=3), "", ["1. a\n2. b\n3. c", "- a\n* b\n• c", "Here:\n1) a\n2) b\n3) c"],
     ["a\nb\nc", "1. a\n2. b", "1.a\n2.b\n3.c"]),
    (SORTED, "",
     ["ant, bee, cat", "1. Ant\n2. Bee\n3. Cat", "ant bee cat", "Sorted: ant; bee; cat.", "ant, bee and cat",
      "- ant\n- bee\n- cat"],
     ["ant, cat, bee", "ant, bee", "ant, bee, cat, dog", "ant, bee, cats", "ant, bee, cat, cat",
      "кот, пчела, муравей"]),
    (check("sentences", count=2), "", ["One. Two!", "It costs 2.5 euros. Yes?"],
     ["One.", "One. Two. Three.", "No end"]),
    (check("json_keys", values=["a", "b"]), "", ['{"a": 1, "b": 2}', '```json\n{"b": null, "a": []}\n```'],
     ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '["a", "b"]', "{'a': 1, 'b': 2}", 'Here: {"a": 1, "b": 2}',
      '{"a": 1, "b": 2']),
    (check("json_keys", values=["a"], more=True), "", ['{"a": 1, "c": 2}'], ['{"c": 2}', "a"]),
    (OBJECT, "", ['{"year": 1999, "city": "Rome"}', '{"city": "rome", "year": 1999}'],
     ['{"city": "Rome", "year": 1998}', '{"city": "Rome", "year": "1999"}', '{"city": "Rome"}',
      '{"city": "Paris", "year": 1999}']),
    (check("json_keys", values={'on': True}), "", ['{"on": true}'], ['{"on": 1}', '{"on": "true"}', '{"on": false}']),
    (check("json_list", count=[2, 3]), "", ["[1, 2]", '["a", "b", "c"]'], ["[1]", "1, 2", '{"a": 1, "b": 2}']),
    (check("json_list", values=[1, 3, 5]), "", ["[1,3,5]", "```\n[1, 3, 5]\n```"],
     ["[1, 5, 3]", "[1, 3]", "[1, 3, 5, 7]", '["1", "3", "5"]']),
    (check("json_list", of="string"), "", ['["a"]'], ['["a", 1]', '"a"']),
    (check("in_order", values=["yen", "real"]), "", ["Japan: yen\nBrazil: Real"], ["real, yen", "yen", ""]),
    (check("script", values=["latin"]), "", ["Hello", "12 words"], ["Привет", "12", "Hello, друг"]),
    (check("script", values=["cyrillic", "latin"]), "", ["Hello, друг"], ["你好", "γειά"]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "asked", "accepted", "refused"), CASES, ids=[rule["type"] for rule, *_ in CASES])
def test_what_a_fair_reader_accepts_passes_and_near_misses_do_not(rule, asked, accepted, refused):
    assert check_problem(rule) is None
    question = {"turns": [asked], "checks": [rule]}
    opposite = {"turns": [asked], "checks": [{**rule, "not": not rule.get("not", False)}]}
    assert [answer for answer in accepted if passed(question, answer) != [True]] == []
    assert [answer for answer in refused if passed(question, answer) != [False]] == []
    assert all(passed(question, answer) != passed(opposite, answer) for answer in accepted + refused)


def test_every_type_has_near_misses():
    assert {rule["type"] for rule, *_ in CASES} == set(TYPES) and len(TYPES) == 12


GOOD = {"question_id": 1, "turns": ["Why?"], "checks": [PARIS]}
BAD = {
    "unknown type": {"checks": [check("similar", values=["a"])]},
    "no type": {"checks": [{"values": ["a"]}]},
    "no values": {"checks": [check("equals")]},
    "empty values": {"checks": [check("contains", values=[])]},
    "values no list": {"checks": [check("contains", values="Paris")]},
    "values no texts": {"checks": [check("equals", values=[5])]},
    "value not a number": {"checks": [check("number", values=[float("nan")])]},
    "value null": {"checks": [check("number", values=[None])]},
    "no count": {"checks": [check("words")]},
    "count no number": {"checks": [check("lines", count="3")]},
    "count of three": {"checks": [check("words", count=[1, 2, 3])]},
    "count true": {"checks": [check("items", count=True)]},
    "bad pattern": {"checks": [check("regex", values=["("])]},
    "bad matching": {"checks": [check("lines", count=1, matching="[")]},
    "least above most": {"checks": [check("words", count=[5, 2])]},
    "type no text": {"checks": [check(["equals"], values=["a"])]},
    "not no bool": {"checks": [check("equals", values=["a"], **{"not": "yes"})]},
    "units no list": {"checks": [check("number", values=[1], units="kg")]},
    "unknown script": {"checks": [check("script", values=["cyrilic"])]},
    "bad of": {"checks": [check("json_list", of="date")]},
    "unknown key": {"checks": [check("equals", values=["a"], value=["b"])]},
    "no checks": {"checks": []},
    "checks absent": {"checks": None},
    "check no object": {"checks": ["Paris"]},
    "no turns": {"turns": []},
    "blank turn": {"turns": [" "]},
    "no id": {"question_id": None},
    "true for an id": {"question_id": True},
    "a list of categories": {"category": ["math"]},
    "a number for a language": {"language": 1},
    "duplicate id": {"question_id": 7},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_row_that_cannot_be_decided_is_one_line_with_its_place(bad, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{**GOOD, "question_id": 7}, {**GOOD, **bad}]), "utf-8")
    with pytest.raises(InputError) as error:
        read_checked(path)
    assert "mine.jsonl:2" in str(error.value) and "\n" not in str(error.value)


QUESTIONS = read_checked(DATA / "retention.jsonl")


def test_the_retention_questions_are_as_described():
    counts = Counter((question["category"], question["language"]) for question in QUESTIONS)
    assert len(QUESTIONS) == 240 and len(counts) == 16 and set(counts.values()) == {15}
    assert len({question["turns"][0] for question in QUESTIONS}) == 240
    categories = {category for category, _ in counts}
    assert categories == {"arithmetic", "word_problems", "facts", "language", "copying", "formats", "reading", "code"}


@pytest.mark.parametrize("path", [DATA / "retention.jsonl", DATA / "instructions.jsonl", DEMO / "retention.jsonl"])
def test_references_pass_their_own_checks_and_hardly_ever_others(path):
    questions = read_checked(path)
    assert [question["turns"][0] for question in questions if not all(passed(question, question["reference"]))] == []
    others = [
        (question["turns"][0], other["reference"])
        for question in questions
        for other in questions
        if question["category"] == other["category"] and question["reference"] != other["reference"]
        if all(passed(question, other["reference"]))
    ]
    assert len(others) <= len(questions) / 8, others
    for poor in ("", "I am not sure.", "Не знаю.", "1", "yes"):
        assert sum(all(passed(question, poor)) for question in questions) <= 4
