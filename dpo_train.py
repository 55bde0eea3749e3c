"""DPO on TAT-QA: questions on financial tables, answered rightly (chosen) and plausibly wrong (rejected).

    L = -log sigmoid(beta * (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

The reference is the same 4-bit base with the adapter switched off. Chosen and rejected share the prompt, so each pair
goes through the model as one sequence: prompt, chosen answer, rejected answer, with the answers hidden from each
other; only the answers go through the LM head. TAT-QA, MT-Bench, instruction following and, with --eval_pairs, the
rewards of held-out pairs are measured before and after.

    poetry run python dpo_train.py --model Qwen/Qwen3-1.7B --output_dir qwen3_tatqa_dpo_base --beta 0.02 --epochs 1
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.dpo import (
    add_dpo_flags,
    align,
    check_flags,
    fit_pairs,
    neutral_flags,
    print_plan,
    reward_evaluation,
)
from llm_alignment.evaluation import save_answers, stored_rows
from llm_alignment.files import InputError, SkippedRows, file_sha256
from llm_alignment.flags import DPO_DEMO, new_parser, not_negative, parse_arguments
from llm_alignment.instructions import instruct_questions
from llm_alignment.models import load_tokenizer, main_process
from llm_alignment.runs import recorded_run
from llm_alignment.tatqa import (
    QUESTION_PREFIX,
    SCALES,
    is_number,
    normalise,
    prompt_options,
    read_tatqa,
    tatqa_em_f1,
    tatqa_evaluation,
    tatqa_file,
    tatqa_parse,
    tatqa_prompt,
)
from llm_alignment.training import check_output_folder, newest_complete
from mtbench_eval import mtbench_questions, scored_evaluations

# torch and its family take ten seconds to import, so functions import them: --help and a wrong flag answer at once.
if TYPE_CHECKING:
    pass

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def build_parser() -> argparse.ArgumentParser:
    """The command line. Defaults are those of the published runs where they had one."""
    parser = new_parser("dpo_train.py", __doc__)
    add_dpo_flags(parser)
    parser.add_argument(
        "--eval_pairs",
        type=not_negative(int),
        default=0,
        help="pairs of --eval_split, none of them trained on, whose reward accuracy is measured; 0 (default) = none",
    )
    parser.set_defaults(output_dir="qwen3_tatqa_dpo_base")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# TAT-QA: pairs


def tatqa_pairs(
    contexts: list[dict], *, seed: int, skipped: SkippedRows | None = None, **prompt_options
) -> list[dict[str, str]]:
    """One preference pair {prompt, chosen, rejected, uid} for each question, sorted by uid.

    chosen is gold with its scale; rejected is the first plausible wrong answer that the official metric does not take
    for gold. A pair depends on its own context, its uid and the seed alone. Questions that give none go to `skipped`;
    `prompt_options` are those of `tatqa_prompt`.
    """
    pairs = []
    for context in contexts:
        for question in context["questions"]:
            chosen = _answer_text(_gold_parts(question), question["scale"])
            wrong = _wrong_answers(context, question, random.Random(f"{seed}:{question['uid']}"))
            texts = (_answer_text(parts, scale) for parts, scale in wrong)
            rejected = next((text for text in texts if not tatqa_em_f1(question, *tatqa_parse(text))[0]), None)
            if rejected is None:
                if skipped is not None:
                    skipped.add(f"question {question['uid']}", "the table gives no wrong answer")
                continue
            prompt = tatqa_prompt(context, question, **prompt_options)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "uid": question["uid"]})
    return sorted(pairs, key=lambda pair: pair["uid"])


def _gold_parts(question: dict) -> list[str]:
    if question["answer_type"] in ("arithmetic", "count"):
        return [f"{question['answer']}"]
    return [part.strip() for part in question["answer"] if part.strip()]


def _answer_text(parts: list[str], scale: str) -> str:
    return f"{'; '.join(parts)} {scale}".strip()


def _wrong_answers(context: dict, question: dict, rng: random.Random) -> Iterator[tuple[list[str], str]]:
    """Yields plausible wrong (answer parts, scale), the most plausible first."""
    parts, scale = _gold_parts(question), question["scale"]
    if question["answer_type"] == "count":
        gold = int(parts[0])
        yield from (([str(count)], "") for count in rng.sample([gold - 1, gold + 1], 2) if count >= 0)
    elif question["answer_type"] == "arithmetic":
        gold, decimals = float(parts[0]), len(parts[0].partition(".")[2])
        error = gold * (1 + rng.choice((-1, 1)) * rng.uniform(0.10, 0.35))
        operands = re.findall(r"\d[\d,]*(?:\.\d+)?", str(question.get("derivation") or "")) or _cells_near(
            context, parts[0], rng
        )
        choices = [
            ([rng.choice(operands)] if operands else parts, scale),
            ([f"{-gold:.{decimals}f}"], scale),
            (parts, rng.choice([other for other in SCALES if other != scale])),
            ([f"{error:.{decimals}f}"], scale),
        ]
        yield from rng.sample(choices, len(choices))
        yield [f"{gold + 1:.{decimals}f}"], scale  # a gold of 0 has no sign, no scale and no share to get wrong
    elif question["answer_type"] == "span":
        yield from (([cell], scale) for cell in _cells_near(context, parts[0], rng))
    else:
        position = rng.randrange(len(parts))
        foreign = next((cell for cell in _cells_near(context, parts[position], rng) if cell not in parts), None)
        choices = [[*parts[:position], *parts[position + 1 :]]] if len(parts) > 1 else []
        if foreign is not None:
            choices.append([*parts[:position], foreign, *parts[position + 1 :]])
        yield from ((choice, scale) for choice in rng.sample(choices, len(choices)))


def _cells_near(context: dict, text: str, rng: random.Random) -> list[str]:
    """The table's other cells: first those of the text's row or column, among them first those that look like it."""
    target = normalise(text)
    cells = [
        (row, column, cell.strip(), normalise(cell.strip()))
        for row, line in enumerate(context["table"]["table"])
        for column, cell in enumerate(line)
    ]
    own = [(row, column) for row, column, _, normalised in cells if normalised == target]
    others = [cell for cell in cells if cell[3] not in ("", target)]
    rng.shuffle(others)

    def distance(cell: tuple[int, int, str, str]) -> tuple[bool, bool, bool]:
        is_near = any(cell[0] == row or cell[1] == column for row, column in own)
        has_shape = re.sub(r"\d", "0", cell[2]) == re.sub(r"\d", "0", text)  # a year for a year
        return not is_near, is_number(cell[2]) != is_number(text), not has_shape

    return [cell[2] for cell in sorted(others, key=distance)]


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(build_parser(), argv, DPO_DEMO)
    with recorded_run(args, argv, "dpo_train.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, measure, train, measure again. Everything that can be wrong with the input is found before it writes."""
    check_flags(args)
    check_output_folder(args, neutral_flags(args))
    tokenizer = load_tokenizer(args)
    pairs, data = [], {"source": args.tatqa_dir or "next-tat/TAT-QA"}
    if not args.no_train:
        pairs, data = load_pairs(args, args.tatqa_split, args.limit_pairs)
    check_output_folder(args, neutral_flags(args), data)
    checkpoint = newest_complete(args)
    evaluations = []
    if args.eval_pairs:
        trained_on = {pair["uid"] for pair in pairs}
        held_out, _ = load_pairs(args, args.eval_split, args.eval_pairs, without=trained_on)
        evaluations.append(reward_evaluation(args, held_out, fit_pairs(held_out, tokenizer, args, QUESTION_PREFIX)))
    if args.do_eval:
        evaluations.append(tatqa_evaluation(args, tokenizer))
    asked = {}
    if args.do_mtbench:
        asked["mtbench"] = mtbench_questions(args), args.mtbench_max_tokens
    if args.do_instruct:
        asked["instruct"] = instruct_questions(args.instruct_limit, args.seed), args.instruct_max_tokens
    evaluations += scored_evaluations(args, asked)
    rows = fit_pairs(pairs, tokenizer, args, QUESTION_PREFIX)
    if args.dry_run:
        print_plan(args, tokenizer, rows, evaluations)
        return
    align(args, record, tokenizer, rows, evaluations, data, checkpoint)
    if args.eval_save_json and main_process():
        folder, stages = Path(args.output_dir), ("baseline", "final")
        answers = {stage: stored_rows(folder, stage, evaluations).get("tatqa", []) for stage in stages}
        save_answers(args, answers)


def load_pairs(
    args: argparse.Namespace, split: str, limit: int, without: Collection[str] = ()
) -> tuple[list[dict], dict]:
    """The TAT-QA pairs of a split but those of the uids in `without`, and the fingerprint of what they are made from.

    `limit` > 0 takes a sample by --seed.
    """
    path = tatqa_file(args, split)
    skipped = SkippedRows()
    pairs = tatqa_pairs(read_tatqa(path, skipped), seed=args.seed, skipped=skipped, **prompt_options(args))
    skipped.report(f"TAT-QA {split} questions for pairs")
    pairs = [pair for pair in pairs if pair["uid"] not in without]
    if not pairs:
        reasons = "; ".join(skipped.places) or "all of them are trained on"
        raise InputError(f"{path}: no pairs left ({reasons}); name another --tatqa_split or --eval_split")
    if 0 < limit < len(pairs):
        pairs = random.Random(args.seed).sample(pairs, limit)
    return pairs, {
        "source": args.tatqa_dir or "next-tat/TAT-QA",
        "rows": {"tatqa_pairs": len(pairs), "skipped": skipped.count},
        "sha256": file_sha256(path),
    }


if __name__ == "__main__":
    main()
