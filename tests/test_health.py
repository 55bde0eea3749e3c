"""Health of answers: what is planted is found, and nothing in good answers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_alignment.health import compare_health, judge_answer, repeated_at_the_end, row_health, summarise_health

RU, EN = "Расскажи, чем полезны прогулки в лесу.", "Tell me why walks in a forest are good for you."

# Each is repeated in four ways: at once, after a beginning, cut within a word, as a numbered list.
PASSAGES = [
    "Прогулки полезны для здоровья.",
    "Прогулки полезны, потому что они полезны, и ",
    "Лес, ",
    "я не знаю, что сказать, и поэтому",
    "Walking in the woods lowers your blood pressure and it makes you feel better.",
    "the forest ",
    "Чтобы погулять в лесу, нужно одеться теплее, взять с собой воду, сказать родным, куда вы идёте, и не забыть "
    "телефон, а потом вернуться домой до темноты.\n\n",
    "print(forest[i])\n",
    "| сосна | ель | дуб |\n",
    "1, 0, ",
]
WAYS = [
    lambda passage: passage * 40,
    lambda passage: f"Свежий воздух снимает усталость. А ещё это приятно.\n{passage * 30}",
    lambda passage: (passage * 40)[: -len(passage) // 2],
    lambda passage: "".join(f"{number}. {passage.strip()}\n" for number in range(1, 40)),
]
LOOPS = [way(passage) for way, passage in itertools.product(WAYS, PASSAGES)]

SENTENCES = [
    (RU, "Прогулки {} снимают усталость и помогают уснуть."),
    (RU, "Хвойный воздух богат кислородом, {} поэтому легче дышать. Берите с собой воду."),
    (RU, "1. Движение {}\n2. Тишина\n3. Свежий воздух"),
    (EN, "Walking {} lowers stress and helps you sleep."),
    (EN, "The air is clean, and {} the silence calms you."),
]
GLITCHES = {RU: ["很好", "。因此", "건강", "צמח", "とても", "الهواء", "здоrовье", "полеzны"],
            EN: ["很好", "的", "건강", "весьма", "とても", "الهواء", "ความ", "και"]}  # fmt: skip
FOREIGN = [(question, text.format(glitch)) for question, text in SENTENCES for glitch in GLITCHES[question]]

ENGLISH = [
    "Walking in the woods lowers stress.",
    "I am sorry, but I cannot help with that request.",
    "1. Fresh air\n2. Less noise\n3. You move more than at home",
    "Sure! Here is a short list of reasons: clean air, silence, and movement.",
    "Walks are healthy, they improve your mood, and they cost nothing.",
    "**Benefits**\n\n- better sleep\n- stronger heart\n- calm mind",
    "It depends on the weather and on how long you walk.",
    "As an AI language model, I have never walked in a forest.",
    "The forest air contains phytoncides, which trees make against insects.",
    "Прогулка means a walk. A walk in the forest is good for the heart and lungs.",
]
RUSSIAN = [
    "Прогулки в лесу снимают стресс.",
    "Извините, я не могу помочь с этим запросом.",
    "1. Свежий воздух\n2. Тишина\n3. Больше движения",
    "Конечно! Вот причины: чистый воздух, тишина и движение.",
    "Это полезно, бесплатно и поднимает настроение.",
    "**Польза**\n\n- крепкий сон\n- сильное сердце",
    "Зависит от погоды и от того, сколько вы идёте.",
    "Я языковая модель и никогда не гуляла в лесу.",
    "Воздух в лесу содержит фитонциды.",
    "Forest — это лес. В лесу хорошо гулять и дышать свежим воздухом.",
]
CHINESE = [
    "在森林里散步对身体很好。",
    "森林的空气很干净，可以帮助睡眠。",
    "多走路对心脏有好处。",
    "森は体にいいです。とても静かです。",
    "숲을 걷는 것은 건강에 좋습니다.",
]
OTHER = [
    *((question, answer) for question, n in ((RU, 10), ("Что такое machine learning?", 5)) for answer in ENGLISH[:n]),
    *((question, answer) for question, n in ((EN, 10), ("Who was Pushkin?", 5)) for answer in RUSSIAN[:n]),
    *((question, answer) for question in (RU, EN) for answer in CHINESE),
]  # fmt: skip

VERSE = "Мороз и солнце; день чудесный!\nЕщё ты дремлешь, друг прелестный —\nПора, красавица, проснись."
CODE = "```python\nfor item in items:\n    print(item)\n    print(item)\n    print(item)\n    print(item)\n```"
GOOD = [
    (RU, "Прогулки снижают уровень кортизола и улучшают сон."),
    (RU, "Возьмите power bank, GPS-трекер и скачайте приложение Maps.me, чтобы работать offline."),
    (RU, "Shinrin-yoku (яп. «лесные ванны») — практика из Японии. Её изучают в Nippon Medical School."),
    (RU, "IT-специалистам полезно выходить из-за компьютера: work-life balance важен, а deadline подождёт."),
    ("Что такое machine learning?", "Machine learning (ML) — раздел AI, где модель учится на data."),
    ("Назови пять компаний США.", "1. Apple\n2. Microsoft\n3. Amazon\n4. Google\n5. Coca-Cola"),
    ("Кто написал «Властелина колец»?", "J. R. R. Tolkien, «The Lord of the Rings»."),
    ("Напиши функцию сложения на Python.", "def add(first, second):\n    return first + second"),
    ("Напиши код, который печатает список.", CODE),
    ("Напиши код, который печатает список.", f"Вот код:\n\n{CODE}\n\nОн печатает каждый элемент четыре раза."),
    ("Переведи на английский: «Я люблю лес».", "I love the forest, and the forest loves me."),
    ("Исправь ошибки: she go to school every day", "She goes to school every day because she likes it."),
    ("Переведи: The forest is quiet and dark tonight", "Сегодня ночью в лесу тихо и темно."),
    ("Translate into Russian: I like to walk in the forest.", "Мне нравится гулять в лесу."),
    ("How do you say “thank you” in Chinese?", "谢谢 (xièxie)."),
    ("Как по-японски «лес»?", "森 (もり, mori)."),
    ("Что значит слово «шинрин-ёку» 森林浴?", "森林浴 значит «купание в лесу»."),
    ("What is the area of a circle?", "A = πr², where r is the radius and π ≈ 3.14; for Δr it grows by 2πrΔr."),
    ("Чему равна сила тока?", "I = U/R. При U = 12 В и R = 4 Ом I = 3 А; сопротивление ρ зависит от t."),
    ("Реши: 2x + 3 = 7", "Перенесём: $2x = 4$, значит \\(x = 2\\). Ответ: x = 2."),
    ("Прочитай стихи Пушкина.", VERSE),
    ("Sing.", "Row, row, row your boat\nGently down the stream.\n" + "Merrily, " * 4 + "\nLife is but a dream."),
    ("Sing.", "Sun is high,\nLa la la la.\nSky is blue,\nLa la la la.\nI walk with you,\n" + "La la la la, " * 2),
    ("Сложи припев.", f"{VERSE}\n\nДень чудесный, день чудесный!\n\n{VERSE}\n\n" + "День чудесный, " * 3),
    ("Make a table.", "| a | b |\n|---|---|\n" + "| yes | yes |\n" * 2 + "| yes | no |\n" + "| yes | yes |\n" * 2),
    ("Give a 4 by 4 zero matrix.", "0 0 0 0\n" * 4),
    ("Give a 6 by 6 zero matrix.", "[" + ", ".join(["[0, 0, 0, 0, 0, 0]"] * 6) + "]"),
    ("Make a plan for 30 days.", "\n".join(f"Day {day}: run {2 + day // 5} km" for day in range(1, 31))),
    ("Таблица умножения на 7.", "\n".join(f"7 × {number} = {7 * number}" for number in range(1, 21))),
    ("Write ten tests.", "\n".join(f"assert add({n}, {n}) == {2 * n}" for n in range(1, 11))),
    ("Print a line ten times.", "Hello, world!\n" * 10),
    ("Скажи «ура» три раза.", "Ура! Ура! Ура!"),
    ("Засмейся.", "Ха-ха-ха-ха-ха!"),
    ("Yes or no?", "Yes."),
    ("Кто такой Отани?", "Сёхэй Отани (大谷 翔平) — японский бейсболист."),
    ("Назови пять фильмов.", "1. Do the Right Thing\n2. The Lord of the Rings\n3. Chi-Raq\n4. Bad Boys\n5. Heat"),
    ("```\nprint('да')\n```", "Этот код печатает слово «да»."),
    ("Столица Франции?", "Париж."),
    ("What is the capital of France?", "Paris"),
    ("Draw a box.", f"+{'-' * 40}+\n|{'box':^40}|\n+{'-' * 40}+"),
    ("Ответь смайликом.", "😀👍🏽"),
    ("Сколько будет 2 + 2?", "4"),
    ("Дай адрес сайта.", "https://example.org/path/to/the/page/about/forests"),
    (RU, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "planted"),
    [("loops", [(RU, text) for text in LOOPS]), ("foreign_letters", FOREIGN), ("other_script", OTHER)],
)
def test_planted_answers_are_found_and_good_ones_are_not(kind, planted):
    assert len(planted) == 40 and len(GOOD) > 40
    missed = [answer for question, answer in planted if not judge_answer([question], answer, finished=False)[kind]]
    assert missed == []
    wrong = [answer for question, answer in GOOD if judge_answer([question], answer, finished=True)[kind]]
    assert wrong == []


@pytest.mark.parametrize("answer", [text for _, text in FOREIGN[:3]] + [LOOPS[0]])
def test_the_kinds_do_not_mix(answer):
    """A glitch is no loop, a loop no glitch, and neither is another language."""
    found = judge_answer([RU], answer, finished=False)
    assert found["unfinished"] and not found["other_script"] and found["loops"] != found["foreign_letters"]


LONG = PASSAGES[6]


@pytest.mark.parametrize(
    ("answer", "cut", "ended"),  # a loop where the limit cut the answer, and where it ended by itself
    [
        ("Гулять полезно для здоровья. " * 30, True, True),
        ("Гулять полезно. " * 30 + VERSE, False, False),
        ((LONG * 3)[: 5 * len(LONG) // 2], True, False),
        ((LONG * 2)[: 3 * len(LONG) // 2], False, False),
        (("Гулять очень полезно для здоровья. " * 4)[:-5], True, False),
        ("".join(f"Шаг {n}: выйдите в лес и подышите воздухом. " for n in range(1, 7)), True, False),
        ("".join(f"{n}. Гуляйте чаще\n" for n in range(1, 30)), True, True),
        ("- Гуляйте\n" * 30, True, True),
    ],
)
def test_where_a_loop_begins(answer, cut, ended):
    assert [judge_answer([RU], answer, finished)["loops"] for finished in (False, True)] == [cut, ended]


@pytest.mark.parametrize(
    ("answer", "expected", "other"),
    [
        ("Paris", "Париж", True),
        ("Yes", "Да", True),
        ("Париж", "Париж", False),
        ("Это город Париж.", "Paris", False),
        ("4", "четыре", False),
        ('{"name": "Анна"}', '{"имя": "Анна"}', False),
        ('Вот: {"name": "Anna"}', '{"name": "Anna"}', False),
    ],
)
def test_a_reference_tells_the_language_of_a_short_answer(answer, expected, other):
    assert judge_answer(["Столица Франции?"], answer, expected=expected)["other_script"] == other


def test_a_later_turn_asks_in_its_own_language():
    turns = [RU, "Теперь по-английски.", "And now in your own words, please."]
    assert not judge_answer(turns[:2], ENGLISH[0])["other_script"]
    assert judge_answer([EN, turns[2]], RUSSIAN[0])["other_script"]


@given(st.lists(st.sampled_from("ab"), max_size=12))
def test_what_is_repeated_at_the_end(items):
    def length(size: int) -> int:
        n = size
        while n < len(items) and items[-n - 1] == items[-n - 1 + size]:
            n += 1
        return n

    assert list(repeated_at_the_end(items)) == [(size, length(size)) for size in range(1, len(items))]


def test_rows_of_every_evaluation_are_summarised_and_compared():
    one = {"turns": [RU, RU], "answers": [LOOPS[0], ENGLISH[0]], "finished": [False, True]}
    table = {"question": "What was the total?", "answer": "It was 7, it was 7"}
    assert summarise_health([one, table]) == pytest.approx(
        {"loops": 100 / 3, "foreign_letters": 0, "other_script": 100 / 3, "unfinished": 50, "n": 3,
         "distinct_bigrams": 100 * (4 / 159 + 1 + 3 / 5) / 3}
    )  # fmt: skip
    [short] = row_health({**table, "answer": "one"})
    assert short["distinct_bigrams"] is short["unfinished"] is None
    good = {**one, "answers": [RUSSIAN[0]] * 2, "finished": [True] * 2}
    deltas = compare_health([(one, good), (table, table)])
    assert deltas["loops"]["mean"] == pytest.approx(-100 / 3) and deltas["unfinished"]["mean"] == -50
    assert deltas["foreign_letters"]["changed"] == 0 and deltas["other_script"]["clusters"] == 2
