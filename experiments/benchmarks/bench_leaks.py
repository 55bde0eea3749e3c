"""The search for the evaluations' questions in training rows: what it finds, and its time against reading the rows.

    python experiments/benchmarks/bench_leaks.py --dataset ROWS.jsonl --questions mt_bench_ru.json mt_bench_en.json

Copies and near copies of questions are put among the rows (in capitals, decomposed, with other blanks and marks,
within other words, with another beginning or end); how many of them and how many other rows are found is counted.
Then the rows are read and hashed, as a run does before training, and searched, in turn in one process, five times; the
ratio of the medians of the CPU times is the result, for a search of all rows and of those that --sample_ratio draws.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_alignment.files import SkippedRows, digest, read_rows  # noqa: E402
from llm_alignment.flags import DEMO_DIR  # noqa: E402
from llm_alignment.leaks import IN_A_ROW, LeakFinder, forbidden_texts, item_texts, normalise_text  # noqa: E402


def near_copy(question: str, number: int, others: list[str]) -> str:
    """A question in one of eight other forms; in two of them a long one loses half of its words."""
    words, other = question.split(), others[number % len(others)]
    half = max(len(words) // 2, 2 * IN_A_ROW)
    forms = (
        question.upper(),
        unicodedata.normalize("NFD", question),
        "  \n".join(words),
        f"{other}\n\n{question}\n\n{other}",
        f"**{question.strip('.?!')}**",
        "\u00a0".join(f"{word[:3]}\u00ad{word[3:]}" for word in words),
        f"{other} {' '.join(words[:half])} {other}",
        f"{other} {' '.join(words[-half:])}",
    )
    return forms[number % len(forms)]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints and returns the share of copies that is found, the number of other rows, and the ratio of the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=DEMO_DIR / "twix.jsonl")
    parser.add_argument("--questions", type=Path, nargs="+", default=[DEMO_DIR / "mt_bench_ru.jsonl"])
    parser.add_argument("--rows", type=int, default=100_000, help="the rows are repeated until there are so many")
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--sample_ratio", type=float, default=0.25)
    args = parser.parse_args(argv)
    questions = [row for path in args.questions for _, row in read_rows(path, SkippedRows())]
    asked = [question["turns"][0] for question in questions]
    turns = [{"turns": question["turns"]} for question in questions]  # as a run reads MT-Bench: without references
    finder = LeakFinder(*forbidden_texts({"question": turns}))

    def rows() -> list[dict]:
        return [row for _, row in read_rows(args.dataset, SkippedRows())]

    items = list(itertools.islice(itertools.cycle(map(item_texts, rows())), args.rows))
    answers = [texts[-1][:200] for texts in items[:1000]]
    places = random.Random(0).sample(range(args.rows), args.copies)
    for number, place in enumerate(places):
        items[place] = [near_copy(asked[number % len(asked)], number, answers), "Yes."]
    found = {place for place, kind in enumerate(finder.find_all(items)) if kind}
    result = {"found": len(found & set(places)) / args.copies, "wrongly": len(found - set(places))}
    print(
        f"found: {100 * result['found']:.1f} % of {args.copies} copies, {result['wrongly']} of {args.rows} other rows"
    )

    seconds: dict[str, list[float]] = {"read": [], "search": []}
    for _ in range(5):
        start = time.process_time()
        read = rows()
        for row in read:
            digest(row["messages"]), digest(normalise_text(row["messages"][0]["content"]))
        seconds["read"].append(time.process_time() - start)
        start = time.process_time()
        list(finder.find_all(map(item_texts, read)))
        seconds["search"].append(time.process_time() - start)
    ratio = statistics.median(seconds["search"]) / statistics.median(seconds["read"])
    result |= {"ratio": ratio, "ratio_drawn": args.sample_ratio * ratio}
    print(f"search / reading and hashing: {ratio:.3f}, of the rows drawn alone {result['ratio_drawn']:.3f}")
    return result


if __name__ == "__main__":
    main()
