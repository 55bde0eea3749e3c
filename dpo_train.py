"""DPO on TAT-QA: questions on financial tables, answered rightly (chosen) and plausibly wrong (rejected).

    L = -log sigmoid(beta * (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

The reference is the same 4-bit base with the adapter switched off, or, with --adapter_trainable, the adapter as it was
loaded; its log-probabilities are computed once and kept for later runs. The pairs of a micro-batch go through the
model as one row in which every prompt appears once, with the answers hidden from each other; only the answers go
through the LM head. With --pairs the pairs are your own. TAT-QA, MT-Bench, instruction following and, with
--eval_pairs, the rewards of held-out pairs against the base are measured before and after.

    poetry run python dpo_train.py --model Qwen/Qwen3-1.7B --output_dir qwen3_tatqa_dpo_base --beta 0.02 --epochs 1
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment import flags, tatqa
from llm_alignment.checks import instruct_questions
from llm_alignment.encoder import own_tokens
from llm_alignment.evaluation import Evaluation
from llm_alignment.files import InputError, SkippedRows, digest, file_sha256, log
from llm_alignment.hub import adapter_files_sha256
from llm_alignment.leaks import LeakFinder, normalise_text, without_leaks
from llm_alignment.preferences import read_pairs, transcript
from llm_alignment.runs import recorded_run
from llm_alignment.tatqa import DEFAULT_CONTENT, PromptContent
from mtbench_eval import load_questions, sample_questions

if TYPE_CHECKING:
    from llm_alignment.training import Setup

PairData = tuple[list[dict], list[dict], dict]  # pairs to train on, held-out ones, the fingerprint of the data


# fmt: off
def build_parser() -> flags.Parser:
    """The command line. Defaults are those of the published runs where they had one."""
    parser = flags.Parser("dpo_train.py", __doc__, "demo model pairs tatqa_dir output_dir beta epochs batch grad_acc "
        "learning_rate lora_r limit_pairs dry_run resume_from_checkpoint")
    flags.add_dpo_flags(parser)
    flags.add_tatqa_flags(parser)
    add = flags.add_group(parser, "own pairs", trains=True)
    add("--pairs", default="", metavar="FILE",
        help="train on your own pairs, not on TAT-QA's: JSONL, JSON or Parquet with prompt, chosen, rejected, texts "
        "or lists of turns; they go through the chat template. TAT-QA is then measured only with --do_eval")
    add = flags.add_group(parser, "held-out pairs", trains="measured")
    add("--eval_pairs", type=flags.not_negative(int), default=0,
        help="pairs, none of them trained on, whose reward accuracy against the base is measured: of --eval_split, or "
        "a part of --pairs that a hash chooses; 0 = none")
    parser.set_defaults(output_dir="qwen3_tatqa_dpo_base")
    return parser


# fmt: on
def tatqa_pairs(
    contexts: list[dict], *, seed: int, skipped: SkippedRows | None = None, content: PromptContent = DEFAULT_CONTENT
) -> list[dict[str, str]]:
    """One preference pair {prompt, chosen, rejected, uid} for each question, sorted by uid; a question that gives none
    goes to `skipped`. chosen is gold with its scale; rejected is the first plausible wrong answer that the official
    metric does not take for gold. A pair depends on its own context, its uid and the seed alone."""
    pairs, skipped = [], skipped or SkippedRows()
    for context in contexts:
        for question in context["questions"]:
            wrong = _wrong_answers(context, question, random.Random(f"{seed}:{question['uid']}"))
            texts = (tatqa.answer_text(*answer) for answer in wrong)
            graded = ((text, tatqa.tatqa_em_f1(question, *tatqa.tatqa_parse(text))[0]) for text in texts)
            rejected = next((text for text, em in graded if not em), None)
            if rejected is None:
                skipped.add(f"question {question['uid']}", "the table gives no wrong answer")
                continue
            chosen = tatqa.answer_text(*tatqa.gold_answer(question))
            prompt = tatqa.tatqa_prompt(context, question, content)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "uid": question["uid"]})
    return sorted(pairs, key=lambda pair: pair["uid"])


def _wrong_answers(context: dict, question: dict, rng: random.Random) -> Iterator[tuple[list[str], str]]:
    """Yields plausible wrong (answer parts, scale), the most plausible first."""
    parts, scale = tatqa.gold_answer(question)
    if question["answer_type"] == "count":
        count = int(parts[0])
        yield from (([str(other)], "") for other in rng.sample([count - 1, count + 1], 2) if other >= 0)
    elif question["answer_type"] == "arithmetic":
        gold, decimals = float(parts[0]), len(parts[0].partition(".")[2])
        error = gold * (1 + rng.choice((-1, 1)) * rng.uniform(0.10, 0.35))
        written = re.findall(r"\d[\d,]*(?:\.\d+)?", str(question.get("derivation") or ""))
        operands = written or _cells_near(context, parts[0], rng)
        choices = [
            ([rng.choice(operands)] if operands else parts, scale),
            ([f"{-gold:.{decimals}f}"], scale),
            (parts, rng.choice([other for other in tatqa.SCALES if other != scale])),
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
    target = tatqa.normalise(text)
    cells = [
        (row, column, cell.strip(), tatqa.normalise(cell.strip()))
        for row, line in enumerate(context["table"]["table"])
        for column, cell in enumerate(line)
    ]
    own = [(row, column) for row, column, _, normalised in cells if normalised == target]
    others = [cell for cell in cells if cell[3] not in ("", target)]
    rng.shuffle(others)

    def distance(cell: tuple[int, int, str, str]) -> tuple[bool, bool, bool]:
        is_near = any(cell[0] == row or cell[1] == column for row, column in own)
        has_shape = re.sub(r"\d", "0", cell[2]) == re.sub(r"\d", "0", text)  # a year for a year
        return not is_near, tatqa.is_number(cell[2]) != tatqa.is_number(text), not has_shape

    return [cell[2] for cell in sorted(others, key=distance)]


def of_own_pairs(args: argparse.Namespace) -> dict:
    """Further defaults: with pairs of one's own TAT-QA is measured when the user asks for it."""
    return {"do_eval": False} if args.pairs else {}


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    args = flags.parse_arguments(build_parser(), argv, flags.DPO_DEMO | {"eval_pairs": 200}, of_own_pairs)
    return recorded_run(run, args, argv, "dpo_train.py")


def run(args: argparse.Namespace, record: dict) -> None:
    """Checks the flags, reads the pairs and the questions, and runs DPO on them."""
    from llm_alignment import training
    from llm_alignment.dpo_run import RunFlags, run_dpo

    flags.check_dpo_flags(args)
    if args.pairs and flags.is_given(record["argv"], "--tatqa_split"):
        raise InputError("--pairs and --tatqa_split: both name what is trained on; leave one of them out")
    if args.pairs and not args.do_eval and flags.is_given(record["argv"], "--tatqa_dir", "--eval_limit"):
        log.warning("--tatqa_dir and --eval_limit are not used with --pairs alone: to measure TAT-QA add --do_eval")
    if args.pairs and args.no_train and not args.eval_pairs:
        raise InputError(f"--pairs {args.pairs}: with --no_train it is used only by --eval_pairs N; add it")
    if args.system_prompt and not args.pairs:
        raise InputError("--system_prompt goes with --pairs: TAT-QA's prompts are the published ones; leave it out")
    setup = training.set_up(args, record, flags.neutral_flags(build_parser()), longest=args.max_length)
    setup.check_folder()
    rows, evaluations, data = pairs_and_evaluations(args, setup)
    setup.check_folder(data)
    run_dpo(record, setup, rows, evaluations, data, flags.fill(RunFlags, args))


def pairs_and_evaluations(args: argparse.Namespace, setup: Setup) -> tuple[list[dict], list[Evaluation], dict]:
    """(training pairs as the trainer reads them, what is measured, fingerprint of the data)."""
    from llm_alignment import dpo, dpo_run

    measuring, choice = flags.fill(dpo_run.MeasuringSettings, args), flags.fill(PairChoice, args)
    style, content = measuring.style, measuring.content
    mtbench = load_questions(args.mtbench_file, flag="--mtbench_file") if args.do_mtbench else []
    instructions = instruct_questions(args.instruct_limit) if args.do_instruct else []
    if args.pairs:
        mark, style = "", dataclasses.replace(style, use_chat_template=True, system=args.system_prompt)
        whole, passages = measuring.forbidden(mtbench)
        if instructions:
            whole["instruction"] = [row["turns"][0] for row in instruct_questions(0)]
        pairs, held_out, data = own_pairs(args.pairs, choice, LeakFinder(whole, passages), own_tokens(setup.tokenizer))
    else:
        mark = tatqa.QUESTION_PREFIX
        pairs, held_out, data = table_pairs(args.tatqa_dir, args.tatqa_split, args.eval_split, choice, content)
        if pairs and args.do_eval and args.eval_split == args.tatqa_split:
            message = "--eval_split %s is trained on, so TAT-QA is measured on questions that were seen; name another"
            log.warning(message, args.eval_split)
    if args.load_adapter:  # a resumed run must begin with the same adapter, its reference too
        data["adapter"] = adapter_files_sha256(args.load_adapter)
    rows, held_out_rows = (
        dpo.fit_pairs(some, setup.tokenizer, style, args.max_length, mark) for some in (pairs, held_out)
    )
    asked = {"mtbench": sample_questions(mtbench, args.mtbench_limit), "instruct": instructions}
    rewards = [dpo.reward_evaluation(held_out, held_out_rows, args.beta, args.max_length)] if held_out else []
    return rows, dpo_run.dpo_evaluations(setup.tokenizer, measuring, asked, rewards), data


@dataclasses.dataclass(frozen=True)
class PairChoice:
    """Which pairs are trained on and which are held out: the flags of that name."""

    no_train: bool
    eval_pairs: int
    limit_pairs: int
    group_by_table: bool
    seed: int
    thinking: bool

    def limited(self, pairs: list[dict], limit: int, *, in_groups: bool = False) -> list[dict]:
        """A sample of `limit` pairs by the seed; all of them when `limit` is 0. `in_groups`: all pairs of a table are
        taken before those of another one."""
        if not 0 < limit < len(pairs):
            return pairs
        rng = random.Random(self.seed)
        if not in_groups:
            return rng.sample(pairs, limit)
        tables: dict[str, list[dict]] = {}
        for pair in pairs:
            tables.setdefault(pair.get("cluster", pair["uid"]), []).append(pair)
        return [pair for table in rng.sample([*tables], len(tables)) for pair in tables[table]][:limit]


def own_pairs(source: str, choice: PairChoice, finder: LeakFinder, own: re.Pattern[str]) -> PairData:
    """Pairs to train on and held-out ones from --pairs, and the fingerprint of the data. Pairs that contain the
    question of an evaluation are left out and counted. --eval_pairs are taken prompt by prompt in the order of a hash,
    at most half of the prompts, so that no prompt is on both sides and the choice does not depend on the seed. Raises
    InputError when no prompt is left to train on, or to hold out."""
    counts: dict[str, int] = {}
    pairs = without_leaks(read_pairs(source, "--pairs", thinking=choice.thinking, own=own), finder, "pairs", counts)
    by_prompt: dict[str, list[dict]] = {}
    for pair in pairs:
        by_prompt.setdefault(normalise_text(text := transcript(pair["prompt"])) or text, []).append(pair)
    needed = 2 if choice.eval_pairs else 1
    if len(by_prompt) < needed:
        found = f"{len(pairs)} usable pairs on {len(by_prompt)} prompts, and {needed} is the least"
        raise InputError(f"--pairs {source}: {found} with --eval_pairs {choice.eval_pairs}; add pairs")
    held_out: list[dict] = []
    for prompt in sorted(by_prompt, key=lambda text: digest("held out", text))[: len(by_prompt) // 2]:
        if len(held_out) < choice.eval_pairs:
            held_out += [{**pair, "cluster": digest(prompt)[:16]} for pair in by_prompt.pop(prompt)]
    if len(held_out) < choice.eval_pairs:
        log.warning("--eval_pairs %d: half of the prompts give %d", choice.eval_pairs, len(held_out))
    held_out = held_out[: choice.eval_pairs]
    pairs = [] if choice.no_train else [pair for group in by_prompt.values() for pair in group]
    pairs = choice.limited(pairs, choice.limit_pairs, in_groups=choice.group_by_table)
    rows = {"pairs": len(pairs), "held_out": len(held_out), **counts}
    return pairs, held_out, {"source": source, "rows": rows, "sha256": digest([pair["uid"] for pair in pairs])}


def table_pairs(folder: str, split: str, eval_split: str, choice: PairChoice, content: PromptContent) -> PairData:
    """TAT-QA pairs to train on, held-out ones of `eval_split`, and the fingerprint of the data. A pair's "cluster" is
    its table. Raises InputError when no pair is left of a split."""
    pairs, held_out = list[dict](), list[dict]()
    data: dict = {"source": folder or "next-tat/TAT-QA"}

    def load(path: Path, limit: int, without: Collection[str] = (), *, in_groups: bool = False) -> tuple[list, int]:
        """A sample of the pairs of a file, see `PairChoice.limited`, and how many questions gave none."""
        skipped = SkippedRows()
        contexts = tatqa.read_tatqa(path, skipped)
        table = {question["uid"]: c["questions"][0]["uid"] for c in contexts for question in c["questions"]}
        found = tatqa_pairs(contexts, seed=choice.seed, skipped=skipped, content=content)
        skipped.report(f"questions of {path.name} for pairs")
        found = [{**pair, "cluster": table[pair["uid"]]} for pair in found if pair["uid"] not in without]
        if not found:
            reasons = "; ".join(skipped.places) or "all of them are trained on"
            raise InputError(f"{path}: no pairs left ({reasons}); name another --tatqa_split or --eval_split")
        return choice.limited(found, limit, in_groups=in_groups), skipped.count

    if not choice.no_train:
        path = tatqa.tatqa_file(folder, split)
        pairs, skipped = load(path, choice.limit_pairs, in_groups=choice.group_by_table)
        data |= {"rows": {"tatqa_pairs": len(pairs), "skipped": skipped}, "sha256": file_sha256(path)}
    if choice.eval_pairs:
        held_out, _ = load(tatqa.tatqa_file(folder, eval_split), choice.eval_pairs, {pair["uid"] for pair in pairs})
    return pairs, held_out, data


if __name__ == "__main__":
    main()
