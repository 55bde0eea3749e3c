"""Finance-Instruct pairs, and the mixes of pairs."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.files import InputError, ResultFile, digest, sample
from llm_alignment.flags import not_negative, positive, ratio, temperature
from llm_alignment.generation import generate, strip_thinking
from llm_alignment.hub import read_usable
from llm_alignment.leaks import LeakFinder, asked_passages, without_leaks
from llm_alignment.messages import refuse_needed
from llm_alignment.models import load_model, model_fingerprint, on_main_process
from llm_alignment.preferences import GENERAL_COLUMNS, merge_system_prompt, read_pairs
from llm_alignment.reddit import hold_out_posts, leak_snippet, read_comments, reddit_pairs
from llm_alignment.runs import timed
from llm_alignment.tatqa import question_texts, tatqa_file
from llm_alignment.texts import normalise_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("llm_alignment")


# Flags that do not change which adapter comes out. The other evaluation flags do: what is asked is not trained on.
MEASURING_FLAGS = {
    "reward_model", "eval_baseline", "eval_save_json", "eval_limit", "eval_max_new_tokens", "eval_temperature",
    "eval_top_p", "mtbench_limit", "mtbench_max_tokens", "reddit_max_tokens",
}  # fmt: skip


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The data sets, how pairs are made of them, and how their evaluations are made."""
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("Reddit").add_argument
    add("--reddit_dataset", default="winddude/reddit_finance_43_250k", help="hub id, file or folder (%(default)s)")
    add("--reddit_min_post_chars", type=not_negative(int), default=120, help="shortest post to use (%(default)s)")
    add("--reddit_min_comment_chars", type=not_negative(int), default=40, help="shortest comment (%(default)s)")
    add("--reddit_max_post_chars", type=positive(int), default=2000, help="posts are cut here (%(default)s)")
    add(
        "--reddit_score_margin",
        type=not_negative(float),
        default=0.10,
        help="the rejected comment scores lower than the chosen one by this or more (%(default)s)",
    )
    add(
        "--reddit_length_tol",
        type=not_negative(float),
        default=0.6,
        help="and its length differs by at most this share of the chosen length (%(default)s)",
    )
    add("--reddit_max_pairs_per_post", type=positive(int), default=1, help="pairs of one post (%(default)s)")
    add("--reddit_sample_rate", type=ratio, default=0.3, help="share of the pairs to use (%(default)s)")
    add = parser.add_argument_group("Finance-Instruct and general pairs").add_argument
    add(
        "--finance_dataset",
        default="Josephgflowers/Finance-Instruct-500k",
        help="hub id, file or folder (%(default)s)",
    )
    add("--finance_instruct_pairs", type=positive(int), default=2000, help="most pairs of it (%(default)s)")
    add(
        "--finance_temperature",
        type=temperature,
        default=0.0,
        help="temperature of the base's own answers, which are rejected; the published runs used 0.8 (%(default)s)",
    )
    add(
        "--general_dataset",
        default="Intel/orca_dpo_pairs",
        help=f"hub id, file or folder (%(default)s) with the columns {GENERAL_COLUMNS}",
    )
    add("--hybrid_ratio", type=ratio, default=0.7, help="share of Reddit in a mix of two (%(default)s)")
    add(
        "--mix_policy",
        choices=["fill", "exact"],
        default="fill",
        help="fill takes what is there when a source has too few, exact keeps the shares and takes less (%(default)s)",
    )
    add = parser.add_argument_group("evaluation on Reddit").add_argument
    add("--do_reddit", action=on_off, default=True, help="replies to held-out posts (%(default)s)")
    add("--reddit_limit", type=positive(int), default=100, help="posts (%(default)s)")
    add("--reddit_max_tokens", type=positive(int), default=256, help="new tokens of a reply (%(default)s)")
    parser.set_defaults(max_prompt_length=1536, max_length=2560, mtbench_file="mt_bench_en.json")


def two_way_shares(args: argparse.Namespace) -> dict[str, Fraction]:
    reddit = Fraction(str(args.hybrid_ratio))
    return {"reddit": reddit, "finance": 1 - reddit}


def read_instructions(source: str) -> list[dict[str, str]]:
    """The usable rows of `source` (--finance_dataset) as instructions {"prompt", "chosen", "uid", "user"}.

    `prompt` is the user's text after the system text, `chosen` the reference answer, `user` the user's text alone.
    """
    rows = read_usable(source, "--finance_dataset", finance_problem, "user, assistant and perhaps system")
    instructions = []
    for row in rows:
        prompt, chosen = merge_system_prompt(row.get("system"), row["user"]), row["assistant"].strip()
        uid = f"finance:{digest(prompt, chosen)[:16]}"
        instructions.append({"prompt": prompt, "chosen": chosen, "uid": uid, "user": row["user"]})
    return instructions


def finance_problem(row: dict) -> str | None:
    """The reason why an instruction cannot be used; None when it can."""
    for column in ("user", "assistant", "system"):
        if column not in row and column != "system":
            return f"missing columns: {column}"
        if not isinstance(row.get(column, ""), str):
            return f"{column} is no text"
    for column in ("user", "assistant"):
        if not row[column].strip():
            return f"empty {column}"
    try:
        refuse_needed(row, "the row")
    except ValueError as error:
        return str(error)
    return None


def hold_out_instructions(instructions: list[dict], limit: int) -> tuple[list[dict], list[dict]]:
    """`limit` instructions as evaluation questions, chosen by a hash of their text, and the other instructions.

    A question keeps the user's text as `instruction` and the answer as `reference`. Instructions of less than four
    words are not chosen: too many texts would contain them.
    """
    by_text: dict[str, dict] = {}
    for instruction in sorted(instructions, key=lambda instruction: instruction["uid"]):
        text = normalise_text(instruction["user"])
        if text.count(" ") >= 3:
            by_text.setdefault(text, instruction)
    chosen = [by_text[text] for text in sorted(by_text, key=lambda text: digest("evaluation", text))[:limit]]
    questions = [
        {
            "question_id": instruction["uid"],
            "category": "finance",
            "turns": [instruction["prompt"]],
            "instruction": instruction["user"],
            "reference": instruction["chosen"],
        }
        for instruction in chosen
    ]
    taken = {instruction["uid"] for instruction in chosen}
    return questions, [instruction for instruction in instructions if instruction["uid"] not in taken]


def distinct(instructions: list[dict]) -> list[dict]:
    """Each instruction once; which of several answers stays does not depend on their order."""
    by_uid = sorted(instructions, key=lambda instruction: instruction["uid"])
    return list({normalise_text(instruction["user"]): instruction for instruction in by_uid}.values())


def finance_pairs(
    args: argparse.Namespace, record: dict, tokenizer: PreTrainedTokenizerBase, instructions: list[dict], wanted: int
) -> list[dict[str, str]]:
    """`wanted` pairs, or as many as there are: the reference answer chosen, the base model's own answer rejected.

    Under several processes the main one generates. A dry run uses the reference instead of the base's answer.
    """
    if args.dry_run:
        log.info("dry run: reference answers stand for the base's own answers, which a run generates first")
        return [{**instruction, "rejected": instruction["chosen"]} for instruction in instructions[:wanted]]
    with timed(record, "finance answers"):
        return on_main_process(lambda: answered_by_base(args, tokenizer, instructions, wanted))


def answered_by_base(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, instructions: list[dict], wanted: int
) -> list[dict[str, str]]:
    """Pairs of the first `wanted` instructions whose answer by the base can be used as rejected.

    An answer that is empty, that the token limit cut, or that equals the reference is not used. At most 2 * `wanted`
    instructions are answered. Answers are stored one by one in the output folder, so that a restart continues; greedy
    ones are put into the baseline cache at the end, where later runs on this base find them.
    """
    path = Path(args.output_dir) / "finance_answers.jsonl"
    settings = {"max_new_tokens": args.instruct_max_tokens, "temperature": args.finance_temperature, "seed": args.seed}
    fingerprint = {**model_fingerprint(args, "none"), "answers": "one user turn", "generation": settings}
    is_greedy = args.finance_temperature == 0
    results = ResultFile(path, fingerprint, renew=True, use_cache=is_greedy and not args.no_baseline_cache)
    candidates = [{**instruction, "question_id": instruction["uid"]} for instruction in instructions[: 2 * wanted]]
    model, position = None, 0
    pairs: list[dict[str, str]] = []
    while len(pairs) < wanted and position < len(candidates):
        # Samples depend on the batch. So a batch of samples is small, and a restart generates it again as a whole.
        size = wanted - len(pairs) if is_greedy else SAMPLED_AT_ONCE
        batch = candidates[position : position + size]
        position += len(batch)
        missing = results.missing(batch)
        log.info("the base's answers: %d in %s, %d to generate", len(batch) - len(missing), path, len(missing))
        if missing:
            model = model or load_model(args)
            store_answers(args, model, tokenizer, missing if is_greedy else batch, results, settings)
        for instruction, row in zip(batch, results.rows_of(batch), strict=True):
            if row["finished"] and row["answer"] not in {"", instruction["chosen"]} and len(pairs) < wanted:
                kept = {key: instruction[key] for key in ("prompt", "chosen", "uid", "user")}
                pairs.append({**kept, "rejected": row["answer"]})
    results.finish()
    unused = position - len(pairs)
    log.info("the base's answers: %d pairs; %d answers not used (empty, cut, or equal)", len(pairs), unused)
    if len(pairs) < wanted:
        log.warning(
            "%d Finance-Instruct pairs instead of %d: of %d instructions answered, the base's other answers were "
            "empty, cut by --instruct_max_tokens or equal to the reference",
            len(pairs), wanted, position,
        )  # fmt: skip
    return pairs


SAMPLED_AT_ONCE = 32


def store_answers(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: list[dict],
    results: ResultFile,
    settings: dict[str, Any],
) -> None:
    """Answers instructions and appends a row {"question_id", "prompt", "answer", "answer_tokens", "finished"} each."""
    stored = {row["question_id"] for row in results.rows}
    for answer in generate(
        model,
        tokenizer,
        [[{"role": "user", "content": instruction["prompt"]}] for instruction in instructions],
        batch_size=args.eval_batch_size,
        thinking=args.thinking,
        description="the base's answers",
        **settings,
    ):
        kept = {key: instructions[answer.index][key] for key in ("question_id", "prompt")}
        if kept["question_id"] not in stored:
            text = strip_thinking(answer.text)
            results.append({**kept, "answer": text, "answer_tokens": answer.tokens, "finished": answer.finished})


def mix_counts(available: dict[str, int], shares: dict[str, Fraction], policy: str) -> dict[str, int]:
    """How many pairs of each source to take.

    "fill": each source gives its share of as many pairs as Reddit has, or all it has when that is less, as in the
    published runs. "exact": as many as keep the shares to one pair. Raises InputError when nothing is taken.
    """
    if policy == "fill":
        total = Fraction(available["reddit"])
    else:
        total = min(available[source] / share for source, share in shares.items() if share)
    counts = {source: min(available[source], math.floor(share * total)) for source, share in shares.items()}
    if not any(counts.values()):
        raise InputError(
            f"the mix is empty: {format_counts(available)} pairs, asked {format_shares(shares)}; change the ratios"
        )
    return counts


def format_shares(parts: dict[str, Any]) -> str:
    """Shares as "81-19"."""
    total = sum(parts.values())
    return "-".join(f"{float(100 * part / total):.0f}" for part in parts.values())


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {source}" for source, count in counts.items())


def mixed_pairs(
    data: TrainingData,
    shares: dict[str, Fraction],
    limits: dict[str, int],
    policy: str,
    make_finance_pairs: Callable[[list[dict], int], list[dict]],
) -> list[dict]:
    """The training pairs of a mix; logs which shares were asked for and which are reached.

    `limits` are upper bounds by source. Only as many finance pairs are made as the mix takes.
    """
    items = {source: data.items[source] for source in shares}
    available = {source: min(len(items[source]), limits.get(source, len(items[source]))) for source in shares}
    counts = mix_counts(available, shares, policy)
    if counts.get("finance"):
        items["finance"] = make_finance_pairs(items["finance"], counts["finance"])
        available["finance"] = len(items["finance"])
        if available["finance"] < counts["finance"]:
            counts = mix_counts(available, shares, policy)
    log.info("mix (%s): asked %s, reached %s: %s of %s", policy, format_shares(shares), format_shares(counts),
             format_counts(counts), format_counts(available))  # fmt: skip
    return [pair for source in shares for pair in items[source][: counts[source]]]


@dataclasses.dataclass
class TrainingData:
    """What can be trained on, and what the evaluations ask instead.

    `items` by source, in an order that the seed gives: "reddit" and "general" are pairs, "finance" are instructions
    {"prompt", "chosen", "uid", "user"}, whose rejected answer is generated later. `questions` by evaluation ("reddit",
    "finance_instruct"), as `score_questions` takes them. `counts` goes into the record.
    """

    items: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    questions: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


def load_data(args: argparse.Namespace, sources: set[str], mtbench_questions: list[dict]) -> TrainingData:
    """Reads the data of `sources` ("reddit", "finance", "general") and of the evaluations that the flags ask for.

    What the evaluations ask, `mtbench_questions` included, is held out and not trained on. Raises InputError when a
    source or an evaluation has nothing left.
    """
    data = TrainingData()
    forbidden = {"MT-Bench question": [question["turns"][0] for question in mtbench_questions]}
    if args.do_eval:
        forbidden["TAT-QA question"] = question_texts(tatqa_file(args, args.eval_split))
    comments = read_comments(args.reddit_dataset) if args.do_reddit or "reddit" in sources else []
    instructions = read_instructions(args.finance_dataset) if args.do_instruct or "finance" in sources else []
    if args.do_reddit:
        data.questions["reddit"], comments = hold_out_posts(
            comments,
            args.reddit_limit,
            min_chars=args.reddit_min_post_chars,
            max_chars=args.reddit_max_post_chars,
        )
        forbidden["evaluation post"] = [leak_snippet(question["turns"][0]) for question in data.questions["reddit"]]
    if args.do_instruct:
        data.questions["finance_instruct"], instructions = hold_out_instructions(instructions, args.instruct_limit)
        asked = data.questions["finance_instruct"]
        forbidden["evaluation instruction"] = [question["instruction"] for question in asked]
    finder = LeakFinder(forbidden, {"MT-Bench question": asked_passages(mtbench_questions)})
    fill_items(args, data, sources, comments, instructions, finder)
    check_nothing_is_empty(args, data)
    return data


def fill_items(
    args: argparse.Namespace,
    data: TrainingData,
    sources: set[str],
    comments: list[dict],
    instructions: list[dict],
    finder: LeakFinder,
) -> None:
    """Puts the items of `sources` that hold no leak into `data`, in an order that the seed gives."""
    if "reddit" in sources:
        pairs = reddit_pairs(
            comments,
            min_post_chars=args.reddit_min_post_chars,
            min_comment_chars=args.reddit_min_comment_chars,
            max_post_chars=args.reddit_max_post_chars,
            score_margin=args.reddit_score_margin,
            length_tol=args.reddit_length_tol,
            max_pairs_per_post=args.reddit_max_pairs_per_post,
        )
        pairs = without_leaks(pairs, finder, "reddit", data.counts)
        size = math.floor(Fraction(str(args.reddit_sample_rate)) * len(pairs))
        data.items["reddit"] = sample(pairs, size, args.seed)
        log.info("reddit: %d pairs, sampled to %d", len(pairs), size)
    if "finance" in sources:
        clean = distinct(without_leaks(instructions, finder, "finance", data.counts))
        data.items["finance"] = sample(clean, len(clean), args.seed)
    if "general" in sources:
        pairs = read_pairs(args.general_dataset, "--general_dataset", thinking=args.thinking)
        pairs = without_leaks(pairs, finder, "general", data.counts)
        data.items["general"] = sample(pairs, len(pairs), args.seed)


def check_nothing_is_empty(args: argparse.Namespace, data: TrainingData) -> None:
    """Raises InputError when a source has no item or an evaluation no question."""
    flags = {
        "reddit": f"--reddit_dataset {args.reddit_dataset}, --reddit_sample_rate {args.reddit_sample_rate}",
        "finance": f"--finance_dataset {args.finance_dataset}",
        "finance_instruct": f"--finance_dataset {args.finance_dataset}, --instruct_limit {args.instruct_limit}",
        "general": f"--general_dataset {args.general_dataset}",
    }
    for what, found in (("train on", data.items), ("ask about", data.questions)):
        for name, items in found.items():
            if not items:
                raise InputError(
                    f"{flags[name]}: nothing is left to {what}; name a larger set or give a larger number"
                )


def data_fingerprint(data: TrainingData, pairs: list[dict]) -> dict:
    """What the record says of the training pairs."""
    sources = Counter(pair["uid"].partition(":")[0] for pair in pairs)
    texts = [[pair[key] for key in ("prompt", "chosen", "rejected")] for pair in pairs]
    return {"rows": {**sources, **data.counts}, "sha256": digest(texts)}


def finance_questions(args: argparse.Namespace, data: TrainingData) -> dict[str, tuple[list[dict], int]]:
    """What the reward model scores besides MT-Bench: {name: (questions, tokens of an answer)}."""
    tokens = {"finance_instruct": args.instruct_max_tokens, "reddit": args.reddit_max_tokens}
    return {name: (data.questions[name], tokens[name]) for name in tokens if name in data.questions}
