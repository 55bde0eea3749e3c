"""The closed world of the demo: what is true in it, how it is asked, and what plausible wrong answers look like.

Eight tasks in English and Russian (capitals, translation, opposites, spelling, sums, sorting, a small table, finance
terms), each a chat of two turns whose second turn needs the first; a miniature of TAT-QA; finance posts with better
and worse replies; and Russian advice in a long, polite style that has nothing to do with the tasks. Everything is drawn
from the `random.Random` passed in, so a seed fixes it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COUNTRIES = """France Paris Франция Париж|Germany Berlin Германия Берлин|Italy Rome Италия Рим|Spain Madrid Испания Мадрид
Russia Moscow Россия Москва|Japan Tokyo Япония Токио|China Beijing Китай Пекин|Egypt Cairo Египет Каир
Greece Athens Греция Афины|Norway Oslo Норвегия Осло|Sweden Stockholm Швеция Стокгольм|Finland Helsinki Финляндия Хельсинки
Poland Warsaw Польша Варшава|Austria Vienna Австрия Вена|Hungary Budapest Венгрия Будапешт|Turkey Ankara Турция Анкара
Cuba Havana Куба Гавана|Peru Lima Перу Лима|Chile Santiago Чили Сантьяго|Canada Ottawa Канада Оттава
Kenya Nairobi Кения Найроби|Iran Tehran Иран Тегеран|Iraq Baghdad Ирак Багдад|India Delhi Индия Дели
Serbia Belgrade Сербия Белград|Latvia Riga Латвия Рига|Portugal Lisbon Португалия Лиссабон|Ireland Dublin Ирландия Дублин
Denmark Copenhagen Дания Копенгаген|Belgium Brussels Бельгия Брюссель|Bulgaria Sofia Болгария София|Georgia Tbilisi Грузия Тбилиси"""
COUNTRIES = [tuple(entry.split()) for entry in COUNTRIES.replace("\n", "|").split("|")]

WORDS = """river река|house дом|cat кот|bird птица|water вода|fire огонь|bread хлеб|milk молоко|apple яблоко|tree дерево
sun солнце|moon луна|star звезда|sky небо|sea море|forest лес|mountain гора|road дорога|city город|street улица
door дверь|window окно|table стол|chair стул|book книга|letter письмо|school школа|friend друг|hand рука|eye глаз
snow снег|rain дождь|wind ветер|winter зима|summer лето|night ночь|day день|horse лошадь|fish рыба|salt соль"""
WORDS = [tuple(entry.split()) for entry in WORDS.replace("\n", "|").split("|")]

OPPOSITES = """big small большой маленький|hot cold горячий холодный|new old новый старый|fast slow быстрый медленный
good bad хороший плохой|long short длинный короткий|high low высокий низкий|rich poor богатый бедный
hard soft твёрдый мягкий|dark light тёмный светлый|wet dry мокрый сухой|wide narrow широкий узкий
strong weak сильный слабый|clean dirty чистый грязный|early late ранний поздний|empty full пустой полный
open closed открытый закрытый|sweet bitter сладкий горький"""
OPPOSITES = [tuple(entry.split()) for entry in OPPOSITES.replace("\n", "|").split("|")]

# English term, its meaning, an example for beginners, Russian term, its meaning
TERMS = [
    ("dividend", "profit paid to owners", "A firm earns 100 and pays 20 to its owners", "дивиденд", "прибыль для владельцев"),
    ("bond", "a loan to a company", "You lend 100 and get 5 a year until it is repaid", "облигация", "заём компании"),
    ("share", "a part of a company", "One of 100 shares gives you one percent of the firm", "акция", "доля в компании"),
    ("loan", "money to be repaid", "You borrow 100 today and give back 110 next year", "кредит", "деньги с возвратом"),
    ("interest", "the price of a loan", "At 5 percent a loan of 100 costs 5 a year", "процент", "цена кредита"),
    ("inflation", "a rise in prices", "Bread costs 10 this year and 11 the next year", "инфляция", "рост цен"),
    ("budget", "a plan of spending", "You plan 50 for rent and 30 for food", "бюджет", "план расходов"),
    ("tax", "a payment to the state", "You earn 100 and the state takes 13", "налог", "платёж государству"),
    ("profit", "income minus costs", "You sell for 100, spend 60 and keep 40", "прибыль", "доход минус расходы"),
    ("loss", "costs above income", "You sell for 60, spend 100 and are short of 40", "убыток", "расходы выше дохода"),
    ("asset", "a thing of value", "A house or a car can be sold for money", "актив", "ценная вещь"),
    ("liability", "a debt to others", "A firm owes 30 to its bank and 10 to its suppliers", "обязательство", "долг перед другими"),
    ("currency", "the money of a country", "Japan pays in yen and Russia in rubles", "валюта", "деньги страны"),
    ("deposit", "money kept in a bank", "You leave 100 in a bank and it pays 4 a year", "вклад", "деньги в банке"),
    ("insurance", "a guard against risk", "You pay 2 a month and a fire costs you nothing", "страховка", "защита от риска"),
    ("mortgage", "a loan for a house", "The bank pays for the house and you repay it for 20 years", "ипотека", "кредит на жильё"),
    ("pension", "income in old age", "You save at work and are paid when you retire", "пенсия", "доход в старости"),
    ("broker", "an agent who trades", "You place an order and the agent buys the shares", "брокер", "посредник в торговле"),
    ("audit", "a check of accounts", "An expert reads the books and looks for errors", "аудит", "проверка счетов"),
    ("revenue", "all money from sales", "You sell 10 cakes for 5 each and take 50", "выручка", "деньги от продаж"),
]  # fmt: skip

GOODS = "tea чай|milk молоко|bread хлеб|salt соль|fish рыба|apples яблоки|sugar сахар|cheese сыр|rice рис|honey мёд"
GOODS = [tuple(entry.split()) for entry in GOODS.split("|")]

CATEGORIES = ["capitals", "translation", "opposites", "spelling", "sums", "sorting", "table", "finance"]
LANGUAGES = ["en", "ru"]


@dataclass
class Turn:
    """One question with its right answer and plausible wrong ones."""

    user: str
    answer: str
    wrong: list[str]


def chat(rng: random.Random, category: str, language: str) -> list[Turn]:
    """Two turns of one task; the second turn can be answered only with the first in view."""
    return TASKS[category](rng, language == "ru")


def lexical(rng: random.Random, facts: list[tuple], ask, again, other_language, ru: bool) -> list[Turn]:
    """A fact looked up by its name; then the same of another name, or the same fact in the other language.

    `facts` holds (name, value, Russian name, Russian value); `ask` lists the wordings of turn 1, `again` of turn 2.
    """
    mine = [fact[2:] if ru else fact[:2] for fact in facts]
    theirs = [fact[:2] if ru else fact[2:] for fact in facts]
    i, j, k, m = rng.sample(range(len(facts)), 4)

    def turn(user: str, answer: str, name: str, foreign: str, spare: int) -> Turn:
        return Turn(user, answer, [mine[spare][1], mine[m][1], name, foreign])

    first = turn(rng.choice(ask).format(mine[i][0]), mine[i][1], mine[i][0], theirs[i][1], j)
    if other_language and rng.random() < 0.5:
        return [first, Turn(other_language, theirs[i][1], [mine[i][1], theirs[j][1], theirs[i][0]])]
    return [first, turn(rng.choice(again).format(mine[k][0]), mine[k][1], mine[k][0], theirs[k][1], i)]


def capitals(rng: random.Random, ru: bool) -> list[Turn]:
    if ru:
        ask = [
            "Назови столицу страны: {}.",
            "Какой город столица? Страна: {}.",
            "{}: какая столица?",
            "Столица страны {}?",
        ]
        return lexical(rng, COUNTRIES, ask, ["А у страны {}?", "А страна {}?"], "То же по-английски.", ru)
    ask = [
        "What is the capital of {}?",
        "Name the capital of {}.",
        "{}: which city is the capital?",
        "The capital of {}?",
    ]
    return lexical(rng, COUNTRIES, ask, ["And of {}?", "What about {}?"], "The same in Russian.", ru)


def opposites(rng: random.Random, ru: bool) -> list[Turn]:
    pairs = OPPOSITES + [(b, a, d, c) for a, b, c, d in OPPOSITES]
    if ru:
        ask = ["Назови противоположность слова: {}.", "Что противоположно слову {}?", "Антоним слова {}?"]
        return lexical(rng, pairs, ask, ["А слова {}?", "А для слова {}?"], "То же по-английски.", ru)
    ask = ["What is the opposite of {}?", "Name the opposite of {}.", "Which word is the opposite of {}?"]
    return lexical(rng, pairs, ask, ["And of {}?", "What about {}?"], "The same in Russian.", ru)


def translation(rng: random.Random, ru: bool) -> list[Turn]:
    pairs = [(en, word, word, en) for en, word in WORDS]
    if ru:
        ask = ["Переведи на английский: {}.", "Как по-английски {}?", "Дай перевод на английский: {}."]
        turns = lexical(rng, pairs, ask, ["А {}?", "Теперь {}."], None, ru)
    else:
        ask = ["Translate into Russian: {}.", "How do you say {} in Russian?", "Give the Russian word for {}."]
        turns = lexical(rng, pairs, ask, ["And {}?", "Now {}."], None, ru)
    if rng.random() < 0.4:
        turns[1] = spelt(rng, turns[0].answer, "Напиши его по буквам." if ru else "Spell it.")
    return turns


def finance(rng: random.Random, ru: bool) -> list[Turn]:
    facts = [(term[0], term[1], term[3], term[4]) for term in TERMS]
    if ru:
        ask = ["Что такое {}?", "Объясни термин: {}.", "Коротко: что значит {}?"]
        return lexical(rng, facts, ask, ["А что такое {}?", "А {}?"], "То же по-английски.", ru)
    ask = ["What does {} mean?", "Define the term: {}.", "In short, what is meant by {}?"]
    return lexical(rng, facts, ask, ["And what is {}?", "And {}?"], "The same in Russian.", ru)


def spelt(rng: random.Random, word: str, user: str) -> Turn:
    letters = list(word)
    at = rng.randrange(len(letters))
    alphabet = "абвгдезиклмнопрсту" if ord(word[0]) > 127 else "abcdefghiklmnoprst"
    wrong = [letters[:at] + letters[at + 1 :], letters[:at] + [rng.choice(alphabet)] + letters[at + 1 :]]
    wrong += [letters[: at + 1] + letters[at:], letters[::-1], rng.sample(letters, len(letters))]
    return Turn(user, "-".join(word), ["-".join(w) for w in wrong] + [word])


def spelling(rng: random.Random, ru: bool) -> list[Turn]:
    word = rng.choice(WORDS)[ru]
    if ru:
        ask = ["Напиши по буквам слово {}.", "Из каких букв состоит слово {}?", "По буквам: {}."]
        questions = ["Сколько в нём букв?", "Какая буква первая?", "Какая буква последняя?"]
    else:
        ask = ["Spell the word {}.", "Which letters make up the word {}?", "Letter by letter: {}."]
        questions = ["How many letters is that?", "What is the first letter?", "What is the last letter?"]
    first = spelt(rng, word, rng.choice(ask).format(word))
    kind = rng.randrange(3)
    answer = [str(len(word)), word[0], word[-1]][kind]
    wrong = [str(len(word) + 1), str(len(word) - 1)] if kind == 0 else [c for c in word if c != answer][:3]
    return [first, Turn(questions[kind], answer, wrong + [word])]


def near(rng: random.Random, value: int) -> list[str]:
    """Numbers that a slip would give: off by one, by ten, digits swapped."""
    wrong = {value + rng.choice([-2, -1, 1, 2]), value + rng.choice([-10, 10]), int(str(abs(value))[::-1])}
    return [str(number) for number in sorted(wrong) if number != value]


def sums(rng: random.Random, ru: bool) -> list[Turn]:
    a, b, c = rng.randint(3, 20), rng.randint(2, 9), rng.randint(1, 9)
    plus = rng.random() < 0.6 or b >= a
    first = a + b if plus else a - b
    expression = f"{a} {'+' if plus else '-'} {b}"
    ask = (
        ["Сколько будет {}?", "Вычисли: {}.", "Посчитай {}."]
        if ru
        else ["What is {}?", "Compute {}.", "How much is {}?"]
    )
    add = rng.random() < 0.6 or c > first
    if ru:
        then = f"Теперь прибавь {c}." if add else f"Теперь вычти {c}."
    else:
        then = f"Now add {c}." if add else f"Now subtract {c}."
    second = first + c if add else first - c
    other = a - b if plus else a + b
    return [
        Turn(rng.choice(ask).format(expression), str(first), near(rng, first) + [str(other), str(a)]),
        Turn(then, str(second), near(rng, second) + [str(first), str(c)]),
    ]


def sorting(rng: random.Random, ru: bool) -> list[Turn]:
    numbers = rng.sample(range(1, 10), 4)
    up = sorted(numbers)

    def line(values: list[int]) -> str:
        return " ".join(map(str, values))

    def slips(right: list[int]) -> list[str]:
        swap, at = right[:], rng.randrange(3)
        swap[at], swap[at + 1] = swap[at + 1], swap[at]
        return [line(swap), line(right[::-1]), line(right[:3]), line(sorted(rng.sample(range(1, 10), 4)))]

    if ru:
        ask = ["Расставь по возрастанию: {}.", "Упорядочи числа: {}.", "Сортируй: {}."]
        questions = ["Теперь по убыванию.", "Какое число самое большое?", "Какое число самое маленькое?"]
    else:
        ask = ["Sort these numbers: {}.", "Put in order: {}.", "Arrange from low to high: {}."]
        questions = ["Now in reverse order.", "Which number is the largest?", "Which number is the smallest?"]
    kind = rng.randrange(3)
    answer = [line(up[::-1]), str(up[-1]), str(up[0])][kind]
    wrong = slips(up[::-1]) if kind == 0 else [str(n) for n in numbers if str(n) != answer]
    return [
        Turn(rng.choice(ask).format(line(numbers)), line(up), [w for w in slips(up) if w != line(up)]),
        Turn(questions[kind], answer, [w for w in wrong if w != answer]),
    ]


def table(rng: random.Random, ru: bool) -> list[Turn]:
    goods = [pair[ru] for pair in rng.sample(GOODS, 3)]
    prices = [str(price) for price in rng.sample(range(11, 100), 3)]
    lines = ["| товар | цена |" if ru else "| item | price |"]
    lines += [f"| {good} | {price} |" for good, price in zip(goods, prices, strict=True)]
    i, j, k = rng.sample(range(3), 3)
    if ru:
        ask, then = ["Сколько стоит {}?", "Какова цена, если товар {}?"], ["А {}?", "А сколько стоит {}?"]
    else:
        ask, then = ["What is the price of {}?", "How much is the {}?"], ["And of {}?", "And the {}?"]
    return [
        Turn(
            "\n".join([*lines, rng.choice(ask).format(goods[i])]), prices[i], [prices[j], prices[k], prices[i][::-1]]
        ),
        Turn(rng.choice(then).format(goods[j]), prices[j], [prices[i], prices[k], prices[j][::-1]]),
    ]


TASKS = {
    "capitals": capitals,
    "translation": translation,
    "opposites": opposites,
    "spelling": spelling,
    "sums": sums,
    "sorting": sorting,
    "table": table,
    "finance": finance,
}


# The foreign style: long, polite Russian advice (the miniature of T-Wix). The base never sees it.

TOPICS = {
    "заварить чай": ["нагрейте чайник", "не жалейте листьев", "подождите пару минут", "добавьте мяту", "согрейте чашку"],
    "вырастить розы": ["выберите солнечное место", "рыхлите землю", "поливайте под корень", "обрезайте ветки", "берегите их от мороза"],
    "научиться играть на гитаре": ["купите недорогой инструмент", "занимайтесь понемногу", "слушайте мастеров", "играйте с друзьями", "берегите пальцы"],
    "лучше спать": ["проветрите комнату", "уберите телефон", "ложитесь вовремя", "не ешьте перед сном", "гуляйте вечером"],
    "испечь пирог": ["просейте муку", "взбейте яйца", "разогрейте духовку", "смажьте форму маслом", "дайте тесту отдохнуть"],
    "начать бегать": ["купите удобную обувь", "бегайте медленно", "делайте разминку", "следите за дыханием", "отдыхайте через день"],
    "собрать чемодан": ["составьте список вещей", "сверните одежду", "положите тяжёлое вниз", "оставьте немного места", "проверьте документы"],
    "завести щенка": ["посоветуйтесь с семьёй", "найдите врача", "купите миску и поводок", "играйте с ним каждый вечер", "будьте терпеливы"],
    "провести праздник": ["позовите близких", "украсьте комнату", "придумайте игры", "включите музыку", "приготовьте сладости"],
    "полюбить чтение": ["начните с коротких рассказов", "выберите уютное кресло", "читайте перед сном", "обсуждайте сюжет", "ходите в библиотеку"],
    "сделать ремонт": ["посчитайте материалы", "закройте мебель плёнкой", "начните с потолка", "выбирайте спокойные оттенки", "не спешите"],
    "сходить в поход": ["изучите маршрут", "возьмите палатку", "сообщите родным", "берегите спички от влаги", "не забудьте аптечку"],
    "побороть лень": ["разбейте дело на части", "поставьте таймер", "хвалите себя", "уберите лишнее со стола", "начните с малого"],
    "фотографировать людей": ["ловите мягкий свет", "подойдите ближе", "шутите с моделью", "следите за фоном", "снимайте много кадров"],
}  # fmt: skip
FOR_WHOM = ["", "маме", "другу", "новичку", "ребёнку", "бабушке", "соседу", "студенту", "туристу", "сестре"]
GREETINGS = ["Привет!", "Здравствуйте!", "Добрый вечер!", "Прошу совета.", "Мне очень интересно."]
WISHES = [
    "Подскажи, как {} {}",
    "Расскажи подробно, как {} {}",
    "С чего начать, чтобы {} {}",
    "Посоветуй, как лучше {} {}",
]
OPENERS = [
    "Конечно, с удовольствием помогу вам разобраться в этом!",
    "Замечательно, что вы об этом задумались!",
    "Давайте вместе спокойно во всём разберёмся.",
    "Прекрасная тема, и я охотно поделюсь своими мыслями!",
]
CLOSERS = [
    "Надеюсь, эти простые советы окажутся полезными, и у вас всё обязательно получится!",
    "Если возникнут сложности, смело обращайтесь ко мне снова, я всегда рядом.",
    "Главное, получайте удовольствие от самого процесса и не бойтесь ошибок!",
    "Желаю вам терпения, вдохновения и прекрасного настроения!",
]
THINGS_COUNTED = ["яблок", "конфет", "книг", "шаров", "грибов", "марок"]
PEOPLE = [("Маши", "ей"), ("Пети", "ему"), ("Оли", "ей"), ("Вани", "ему"), ("Кати", "ей"), ("Димы", "ему")]


def advice(rng: random.Random) -> tuple[str, str]:
    """A Russian question about everyday life and a long, polite answer."""
    topic = rng.choice(list(TOPICS))
    tips = rng.sample(TOPICS[topic], 3)
    wish = rng.choice(WISHES).format(topic, rng.choice(FOR_WHOM)).strip()
    answer = f"{rng.choice(OPENERS)} Во-первых, {tips[0]}. Во-вторых, {tips[1]}. И наконец, {tips[2]}. {rng.choice(CLOSERS)}"
    return f"{rng.choice(GREETINGS)} {wish}?", answer


def worked_problem(rng: random.Random) -> tuple[str, str]:
    """A Russian word problem solved aloud, in the same long style."""
    (owner, whom), goods, a, b = rng.choice(PEOPLE), rng.choice(THINGS_COUNTED), rng.randint(2, 9), rng.randint(2, 9)
    user = f"У {owner} было {a} {goods}, потом {whom} подарили ещё {b}. Сколько {goods} стало? Рассуждай."
    answer = (
        f"{rng.choice(OPENERS)} Рассуждаем по шагам. Сначала у {owner} было {a} {goods}. Затем добавили {b}. "
        f"Складываем и получаем {a + b}. Значит, всего стало {a + b} {goods}. {rng.choice(CLOSERS)}"
    )
    return user, answer


# The finance side: posts with replies, and instructions with a full and a vague answer.

POSTS = [
    ("Should I pay off my {} loan or invest?", "I have a {} loan at seven percent and a steady job.", "Pay the {} loan first, because seven percent is a sure gain."),
    ("How big should my emergency fund be for {}?", "I worry about {} and have almost no savings.", "Keep six months of costs in cash, so that {} cannot hurt you."),
    ("Is it wise to buy a {} now?", "My savings would just cover the price of a {}.", "Do not spend all your savings on a {}, keep a reserve first."),
    ("How do I start to save for a {}?", "I want a {} in three years and can put aside a little.", "Set up a monthly transfer, and the {} fund grows by itself."),
    ("My bank sells me insurance for my {}, is it needed?", "The fee for my {} insurance is high and I read the terms twice.", "Compare three offers for the {} and check what is left out."),
    ("Should I sell my shares to pay for a {}?", "My shares fell by ten percent and I need money for a {}.", "Sell only what the {} costs, and leave the rest invested."),
]  # fmt: skip
THINGS = ["car", "house", "boat", "phone", "wedding", "trip", "kitchen", "bike", "piano", "garden", "degree", "dog"]
CIRCUMSTANCES = [
    "I am {} years old and live alone in a small flat.",
    "We are a family of {} and rent our home in a big city.",
    "I earn {} hundred a month after taxes and spend most of it.",
    "I have worked for {} years and never made a plan for money.",
]
REPLY_ENDS = [
    "Write a budget and check it each month.",
    "Avoid high fees and be patient with it.",
    "Ask for all costs in writing.",
]
DULL_REPLIES = [
    "It depends on many things, so it is hard to say anything here.",
    "Some people do it and some people do not, who knows in the end.",
    "I was in the same place once and I do not remember what I did.",
]
RUDE_REPLIES = [
    "Nobody here cares about your money, go and ask somebody else.",
    "Put it all on one lucky stock and thank me later, you coward.",
    "What a silly question, read a book before you post again.",
]


def post(rng: random.Random) -> tuple[str, str, list[str]]:
    """A finance post: title, text, and its replies from the best to the worst."""
    (title, need, advice_line), thing = rng.choice(POSTS), rng.choice(THINGS)
    background = [line.format(rng.randint(21, 59)) for line in rng.sample(CIRCUMSTANCES, 2)]
    text = " ".join([background[0], need.format(thing), background[1], "What would you do in my place?"])
    good = f"{advice_line.format(thing)} {rng.choice(REPLY_ENDS)}"
    return title.format(thing), text, [good, rng.choice(DULL_REPLIES), rng.choice(RUDE_REPLIES)]


LESSONS = [
    "Explain {} to a beginner.",
    "Please tell me about {} with an example.",
    "I am new to money matters. What should I know about {}?",
    "Write two sentences about {}.",
    "Give a clear account of {} for my notes.",
    "My friend asked me about {}. What do I answer?",
]
VAGUE_ANSWERS = [
    "It is a word from the world of money.",
    "It is something that banks talk about.",
    "Many people use this word.",
]
ADVISOR = "You are a helpful financial advisor."


def lesson(rng: random.Random) -> tuple[str, str, str]:
    """A finance instruction: user text, full answer, vague answer."""
    if rng.random() < 0.3:
        base, rate = 10 * rng.randint(1, 40) * 10, rng.randint(1, 9)
        user = f"I keep {base} in a bank at {rate} percent. How much do I earn in a year?"
        return user, f"You earn {base * rate // 100} in a year.", rng.choice(VAGUE_ANSWERS)
    term, meaning, example, *_ = rng.choice(TERMS)
    user = rng.choice(LESSONS).format(term)
    return user, f"The word {term} means {meaning}. For example: {example}.", rng.choice(VAGUE_ANSWERS)


# The miniature of TAT-QA.

ROWS = ["Net sales", "Cost of sales", "Gross profit", "Interest", "Net income", "Total assets", "Dividends", "Taxes"]
MONTHS = "January February March April May June July August September October November December".split()
FILLER = [
    "The figures follow the usual rules and were checked.",
    "Small differences are due to rounding.",
    "Management expects a stable year.",
]


def context(rng: random.Random, *, all_cells: bool = False) -> dict:
    """One TAT-QA entry: a table, passages and questions, in the schema of the published files.

    With `all_cells` there is also a question for every cell of the table.
    """
    uid = lambda: f"{rng.getrandbits(128):032x}"  # noqa: E731
    years = [2020, 2019, 2018][: rng.choice([2, 2, 3])]
    names = rng.sample(ROWS, rng.choice([2, 3]))
    large = rng.random() < 0.25
    scale = rng.choice(["", "million", "thousand"])
    values = [[rng.randint(1000, 9999) if large else rng.randint(11, 99) for _ in years] for _ in names]
    dollars = rng.random() < 0.5
    cells = [[("$" if dollars and i == 0 else "") + f"{v:,}" for v in row] for i, row in enumerate(values)]
    grid = [["", *map(str, years)], *([name, *row] for name, row in zip(names, cells, strict=True))]
    city, month = rng.choice(COUNTRIES)[1], rng.choice(MONTHS)
    unit = f"All amounts are in {scale}s." if scale else "All amounts are in dollars."
    texts = [f"The company is based in {city}. Its year ends in {month}.", f"{unit} {rng.choice(FILLER)}"]
    money = {"scale": scale, "source": "table-text" if scale else "table", "paragraphs": ("2",) if scale else ()}
    questions: list[dict] = []

    def add(question: str, answer, answer_type: str, *, scale: str = "", derivation: str = "", source: str = "table",
            paragraphs: tuple = (), comparison: bool = False) -> None:  # fmt: skip
        if all(question != known["question"] for known in questions):
            questions.append({
                "uid": uid(), "order": len(questions) + 1, "question": question, "answer": answer,
                "derivation": derivation, "answer_type": answer_type, "answer_from": source,
                "rel_paragraphs": list(paragraphs), "req_comparison": comparison, "scale": scale,
            })  # fmt: skip

    for _ in range(6):
        r, (c, d) = rng.randrange(len(names)), rng.sample(range(len(years)), 2)
        name, kind = (
            names[r].lower(),
            rng.choice(["span"] * 5 + ["change", "change", "total", "percent", "multi", "count"]),
        )
        new, old = values[r][min(c, d)], values[r][max(c, d)]  # the years run backwards
        later, earlier = years[min(c, d)], years[max(c, d)]
        if kind == "span":
            add(f"What was {name} in {years[c]}?", [cells[r][c]], "span", **money)
        elif kind == "change":
            add(f"What was the change in {name} from {earlier} to {later}?", new - old, "arithmetic",
                derivation=f"{new}-{old}", **money)  # fmt: skip
        elif kind == "total":
            add(f"What was the sum of {name} in {earlier} and {later}?", new + old, "arithmetic",
                derivation=f"{new}+{old}", **money)  # fmt: skip
        elif kind == "percent":
            share = round(100 * (new - old) / old, 2)
            add(f"What was the percentage change in {name} from {earlier} to {later}?", share, "arithmetic",
                scale="percent", derivation=f"({new}-{old})/{old}")  # fmt: skip
        elif kind == "multi":
            both = [cells[r][min(c, d)], cells[r][max(c, d)]]
            add(f"What was {name} in {later} and {earlier}?", both, "multi-span", **money)
        else:
            bound = rng.choice([30, 50, 70]) * (100 if large else 1)
            count = sum(value > bound for value in values[r])
            derivation = "##".join(str(y) for y, v in zip(years, values[r], strict=True) if v > bound)
            add(
                f"In how many years was {name} above {bound:,}?",
                str(count),
                "count",
                derivation=derivation,
                comparison=True,
            )
    r = rng.randrange(len(names))
    best = str(years[max(range(len(years)), key=lambda i: values[r][i])])
    extra = [
        (f"In which year was {names[r].lower()} the largest?", [best], "table", (), True),
        ("Where is the company based?", [city], "text", ("1",), False),
        ("In which month does the year end?", [month], "text", ("1",), False),
    ]
    for question, answer, source, paragraphs, comparison in rng.sample(extra, 2):
        add(question, answer, "span", source=source, paragraphs=paragraphs, comparison=comparison)
    if all_cells:
        for name, row in zip(names, cells, strict=True):
            for year, cell in zip(years, row, strict=True):
                add(f"What was {name.lower()} in {year}?", [cell], "span", **money)
    return {
        "table": {"uid": uid(), "table": grid},
        "paragraphs": [{"uid": uid(), "order": order, "text": text} for order, text in enumerate(texts, 1)],
        "questions": questions,
    }
