"""DPO on TAT-QA: questions on financial tables, answered rightly (chosen) and plausibly wrong (rejected).

    L = -log sigmoid(beta * (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

The reference is the same 4-bit base with the adapter switched off; its log-probabilities are computed once and kept
for later runs. The pairs of a micro-batch go through the model as one row in which every prompt stands once, with the
answers hidden from each other; only the answers go through the LM head. With --pairs the pairs are your own. TAT-QA,
MT-Bench, instruction following and, with --eval_pairs, the rewards of held-out pairs against the base are measured
before and after.

    poetry run python dpo_train.py --model Qwen/Qwen3-1.7B --output_dir qwen3_tatqa_dpo_base --beta 0.02 --epochs 1
"""

from __future__ import annotations

import argparse
import functools
import logging
import random
import re
from collections.abc import Collection, Iterator

from llm_alignment.dpo import (
    align,
    check_flags,
    fit_chats,
    fit_pairs,
    print_plan,
    reward_evaluation,
    starting_adapter,
)
from llm_alignment.files import InputError, SkippedRows, digest, file_sha256
from llm_alignment.flags import (
    DPO_DEMO,
    Parser,
    add_dpo_flags,
    add_group,
    add_tatqa_flags,
    neutral_flags,
    not_negative,
    parse_arguments,
)
from llm_alignment.instructions import instruct_questions
from llm_alignment.leaks import leak_finder, without_leaks
from llm_alignment.models import check_model, load_tokenizer
from llm_alignment.preferences import read_pairs, transcript
from llm_alignment.runs import recorded_run
from llm_alignment.tatqa import (
    QUESTION_PREFIX,
    SCALES,
    answer_text,
    gold_parts,
    is_number,
    normalise,
    prompt_options,
    question_texts,
    read_tatqa,
    tatqa_em_f1,
    tatqa_file,
    tatqa_parse,
    tatqa_prompt,
)
from llm_alignment.training import check_output_folder, newest_complete
from mtbench_eval import all_mtbench_questions, dpo_evaluations

log = logging.getLogger("llm_alignment")

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


# fmt: off
def build_parser() -> Parser:
    """The command line. Defaults are those of the published runs where they had one."""
    shown = (
        "demo model pairs tatqa_dir output_dir beta epochs batch grad_acc learning_rate lora_r limit_pairs "
        "dry_run resume_from_checkpoint"
    )
    parser = Parser("dpo_train.py", __doc__, shown)
    add_dpo_flags(parser)
    add_tatqa_flags(parser)
    add = add_group(parser, "own pairs", trains=True)
    add("--pairs", default="", metavar="FILE",
        help="train on your own pairs, not on TAT-QA's: JSONL, JSON or Parquet with prompt, chosen, rejected, texts "
        "or lists of turns; they go through the chat template. TAT-QA stays an evaluation")
    add = add_group(parser, "held-out pairs", trains="measured")
    add("--eval_pairs", type=not_negative(int), default=0,
        help="pairs, none of them trained on, whose reward accuracy against the base is measured: of --eval_split, or "
        "a part of --pairs that a hash chooses; 0 = none")
    parser.set_defaults(output_dir="qwen3_tatqa_dpo_base")
    return parser


# fmt: on
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
            chosen = answer_text(gold_parts(question), question["scale"])
            wrong = _wrong_answers(context, question, random.Random(f"{seed}:{question['uid']}"))
            texts = (answer_text(parts, scale) for parts, scale in wrong)
            rejected = next((text for text in texts if not tatqa_em_f1(question, *tatqa_parse(text))[0]), None)
            if rejected is None:
                if skipped is not None:
                    skipped.add(f"question {question['uid']}", "the table gives no wrong answer")
                continue
            prompt = tatqa_prompt(context, question, **prompt_options)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "uid": question["uid"]})
    return sorted(pairs, key=lambda pair: pair["uid"])


def _wrong_answers(context: dict, question: dict, rng: random.Random) -> Iterator[tuple[list[str], str]]:
    """Yields plausible wrong (answer parts, scale), the most plausible first."""
    parts, scale = gold_parts(question), question["scale"]
    if question["answer_type"] == "count":
        count = int(parts[0])
        yield from (([str(other)], "") for other in rng.sample([count - 1, count + 1], 2) if other >= 0)
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
        others = [[*parts[:position], *parts[position + 1 :]]] if len(parts) > 1 else []
        if foreign is not None:
            others.append([*parts[:position], foreign, *parts[position + 1 :]])
        yield from ((other, scale) for other in rng.sample(others, len(others)))


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
    args = parse_arguments(build_parser(), argv, DPO_DEMO)
    with recorded_run(args, argv, "dpo_train.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, measure, train, measure again. Everything that can be wrong with the input is found before it writes."""
    check_flags(args)
    check_pairs_flags(args, record["argv"])
    neutral = neutral_flags(build_parser())
    check_output_folder(args, neutral)
    tokenizer = load_tokenizer(args)
    check_model(args, tokenizer, adapter=args.load_adapter)
    mtbench = all_mtbench_questions(args)
    pairs, held_out, data = own_pairs(args, mtbench) if args.pairs else table_pairs(args)
    data |= starting_adapter(args)
    check_output_folder(args, neutral, data)
    checkpoint = newest_complete(args)
    fit = fit_chats if args.pairs else functools.partial(fit_pairs, mark=QUESTION_PREFIX)
    rewards = [reward_evaluation(args, held_out, fit(held_out, tokenizer, args))] if held_out else []
    asked = {}
    if args.do_instruct:
        asked["instruct"] = instruct_questions(args.instruct_limit, args.seed), args.instruct_max_tokens
    evaluations = dpo_evaluations(args, tokenizer, mtbench, asked, *rewards)
    rows = fit(pairs, tokenizer, args)
    if args.dry_run:
        print_plan(args, tokenizer, rows, evaluations)
        return
    align(args, record, tokenizer, rows, evaluations, data, checkpoint)


def check_pairs_flags(args: argparse.Namespace, argv: list[str]) -> None:
    """Raises InputError for flags that --pairs does not go with."""
    if not args.pairs:
        return
    if any(flag.partition("=")[0] == "--tatqa_split" for flag in argv):
        raise InputError("--pairs and --tatqa_split: both name what is trained on; leave one of them out")
    if args.no_train and not args.eval_pairs:
        raise InputError(f"--pairs {args.pairs}: with --no_train it is used by --eval_pairs N alone; add it")


def own_pairs(args: argparse.Namespace, mtbench: list[dict]) -> tuple[list[dict], list[dict], dict]:
    """Pairs to train on and held-out ones from --pairs, and the fingerprint of the data.

    Pairs that contain a question of an evaluation are left out and counted. --eval_pairs are taken prompt by prompt in
    the order of a hash, at most half of the prompts, so that no prompt is on both sides and the choice does not depend
    on the seed. Raises InputError when no prompt is left to train on, or to hold out.
    """
    counts: dict[str, int] = {}
    pairs = read_pairs(args.pairs, "--pairs", thinking=args.thinking)
    pairs = without_leaks(pairs, leak_finder(asked_texts(args, mtbench)), "pairs", counts)
    by_prompt: dict[str, list[dict]] = {}
    for pair in pairs:
        by_prompt.setdefault(transcript(pair["prompt"]), []).append(pair)
    needed = 2 if args.eval_pairs else 1
    if len(by_prompt) < needed:
        raise InputError(
            f"--pairs {args.pairs}: {len(pairs)} usable pairs on {len(by_prompt)} prompts, and {needed} is the least "
            f"with --eval_pairs {args.eval_pairs}; add pairs"
        )
    held_out: list[dict] = []
    for prompt in sorted(by_prompt, key=lambda text: digest("held out", text))[: len(by_prompt) // 2]:
        if len(held_out) < args.eval_pairs:
            held_out += [{**pair, "cluster": digest(prompt)[:16]} for pair in by_prompt.pop(prompt)]
    if len(held_out) < args.eval_pairs:
        log.warning("--eval_pairs %d: half of the prompts give %d", args.eval_pairs, len(held_out))
    pairs = [] if args.no_train else [pair for group in by_prompt.values() for pair in group]
    if 0 < args.limit_pairs < len(pairs):
        pairs = random.Random(args.seed).sample(pairs, args.limit_pairs)
    return (
        pairs,
        held_out[: args.eval_pairs],
        {
            "source": args.pairs,
            "rows": {"pairs": len(pairs), "held_out": len(held_out[: args.eval_pairs]), **counts},
            "sha256": digest([pair["uid"] for pair in pairs]),
        },
    )


def asked_texts(args: argparse.Namespace, mtbench: list[dict]) -> dict[str, list[str]]:
    """What the evaluations ask, by kind; `mtbench` are the questions of --mtbench_file."""
    texts = {}
    if args.do_eval:
        texts["TAT-QA question"] = question_texts(tatqa_file(args, args.eval_split))
    if mtbench:
        texts["MT-Bench question"] = [question["turns"][0] for question in mtbench]
    if args.do_instruct:
        texts["instruction"] = [question["turns"][0] for question in instruct_questions(0, args.seed)]
    return texts


def table_pairs(args: argparse.Namespace) -> tuple[list[dict], list[dict], dict]:
    """TAT-QA pairs to train on, held-out ones of --eval_split, and the fingerprint of the data."""
    pairs: list[dict] = []
    held_out: list[dict] = []
    data = {"source": args.tatqa_dir or "next-tat/TAT-QA"}
    if not args.no_train:
        if args.do_eval and args.eval_split == args.tatqa_split:
            log.warning(
                "--eval_split %s is trained on too, so TAT-QA is measured on questions that were seen; name another",
                args.eval_split,
            )
        pairs, data = load_pairs(args, args.tatqa_split, args.limit_pairs)
    if args.eval_pairs:
        held_out, _ = load_pairs(args, args.eval_split, args.eval_pairs, without={pair["uid"] for pair in pairs})
    return pairs, held_out, data


def load_pairs(
    args: argparse.Namespace, split: str, limit: int, without: Collection[str] = ()
) -> tuple[list[dict], dict]:
    """The TAT-QA pairs of a split but those of the uids in `without`, and the fingerprint of what they are made from.

    A pair's "cluster" is its table. `limit` > 0 takes a sample by --seed.
    """
    path = tatqa_file(args, split)
    skipped = SkippedRows()
    contexts = read_tatqa(path, skipped)
    table = {question["uid"]: c["questions"][0]["uid"] for c in contexts for question in c["questions"]}
    pairs = tatqa_pairs(contexts, seed=args.seed, skipped=skipped, **prompt_options(args))
    skipped.report(f"TAT-QA {split} questions for pairs")
    pairs = [{**pair, "cluster": table[pair["uid"]]} for pair in pairs if pair["uid"] not in without]
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
