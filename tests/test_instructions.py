"""The instructions and the checks of their answers."""

from llm_alignment import instructions

GOOD_ANSWERS = [
    "1. Cook at home\n2. Cancel subscriptions\n3. Walk\n4. Insulate\n5. Compare prices",
    "Wednesday\nThursday\nFriday\nSaturday\nSunday\nMonday\nTuesday",
    "red, yellow, blue",
    "Advantages\n- time\n- quiet\n- comfort\n\nDisadvantages\n- isolation\n- cost\n- distraction",
    '```json\n{"name": "Ada", "age": 36, "city": "London"}\n```',
    '["Paris", "Rome", "Oslo", "Bern"]',
    "| Asset | Risk |\n| --- | --- |\n| Cash | low |\n| Bonds | medium |\n| Shares | high |",
    "[gain; earnings]",
    "Japan: yen\nPoland: zloty\nBrazil: real",
    "Inflation is a rise in the general level of prices. It lowers what money buys.",
    "Compound interest is interest that is paid on earlier interest too, so that savings grow faster and faster.",
    " ".join(["Autumn"] + ["leaf"] * 69),
    "Waves fold into foam\na gull writes upon the wind\nsalt on every stone",
    "Yes.",
    "After the storm the ship reached the harbour.",
    "A bank keeps savings and grants credit.",
    "A share is ownership of a company, a bond is a loan to it. Which would you choose?",
    "In short, losses of one holding are offset by gains of another.",
    "Dear Sir or Madam,\nplease send me a new card.\nKind regards",
    "Cash is king. Cash is king. Cash is king.",
    "3, 7, 19, 42, 88",
    "apple, cherry, mango, pear",
    "10 9 8 7 6 5 4 3 2 1",
    "36",
    "$55",
]


def test_every_check_tells_a_good_answer_from_a_poor_one():
    assert len(instructions.INSTRUCTIONS) == len(GOOD_ANSWERS) == 25
    poor = "I am not sure. It depends, doesn't it? Money comes and goes! See 1 or 2."
    for (_, instruction, checks), good in zip(instructions.INSTRUCTIONS, GOOD_ANSWERS, strict=True):
        assert all(check(good) for check in checks), instruction
        assert not all(check(poor) for check in checks), instruction
        assert not all(check("") for check in checks), instruction
