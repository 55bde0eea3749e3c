"""Reddit and Finance-Instruct pairs, and their mixes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.files import InputError, ResultFile, SkippedRows, digest, read_usable, sample
from llm_alignment.flags import not_negative, positive, ratio
from llm_alignment.generation import generate, strip_thinking
from llm_alignment.leaks import leak_finder, plain, recognisable, set_lessons_aside, set_posts_aside, without_leaks
from llm_alignment.models import load_model, model_fingerprint, on_main_process
from llm_alignment.preferences import GENERAL_COLUMNS, merge_system_prompt, post_text, read_pairs
from llm_alignment.runs import timed
from llm_alignment.tatqa import read_tatqa, tatqa_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger("llm_alignment")


# Flags that do not change which adapter comes out. The other evaluation flags do: what is asked is not trained on.
MEASURING_FLAGS = {
    "reward_model", "eval_baseline", "eval_save_json", "eval_limit", "eval_max_new_tokens", "eval_temperature",
    "eval_top_p", "mtbench_limit", "mtbench_max_tokens", "reddit_max_tokens",
}  # fmt: skip


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The data sets, how pairs are made of them, and how their evaluations are made."""
    group = parser.add_argument_group("Reddit")
    group.add_argument(
        "--reddit_dataset", default="winddude/reddit_finance_43_250k", help="hub id, file or folder (%(default)s)"
    )
    group.add_argument("--reddit_min_post_chars", type=not_negative(int), default=120, help="shortest post (120)")
    group.add_argument("--reddit_min_comment_chars", type=not_negative(int), default=40, help="shortest comment (40)")
    group.add_argument("--reddit_max_post_chars", type=positive(int), default=2000, help="cut posts here (2000)")
    group.add_argument(
        "--reddit_score_margin", type=not_negative(float), default=0.10, help="rejected below by (0.10)"
    )
    group.add_argument("--reddit_length_tol", type=not_negative(float), default=0.6, help="and of like length (0.6)")
    group.add_argument("--reddit_max_pairs_per_post", type=positive(int), default=1, help="pairs a post gives (1)")
    group.add_argument("--reddit_sample_rate", type=ratio, default=0.3, help="share of the pairs to use (0.3)")
    group = parser.add_argument_group("Finance-Instruct and general pairs")
    group.add_argument(
        "--finance_dataset",
        default="Josephgflowers/Finance-Instruct-500k",
        help="hub id, file or folder (%(default)s)",
    )
    group.add_argument("--finance_instruct_pairs", type=positive(int), default=2000, help="at most (%(default)s)")
    group.add_argument(
        "--general_dataset", default="Intel/orca_dpo_pairs", help=f"hub id, file or folder of {GENERAL_COLUMNS}"
    )
    group.add_argument("--hybrid_ratio", type=ratio, help="share of Reddit in a mix of two (%(default)s)")
    group.add_argument(
        "--mix_policy",
        choices=["fill", "exact"],
        default="fill",
        help="fill takes what is there when a source runs short, exact keeps the shares and takes fewer (fill)",
    )
    group = parser.add_argument_group("measuring Reddit replies")
    on_off = argparse.BooleanOptionalAction
    group.add_argument("--do_reddit", action=on_off, default=True, help="replies to posts set aside")
    group.add_argument("--reddit_limit", type=positive(int), default=100, help="posts (100)")
    group.add_argument("--reddit_max_tokens", type=positive(int), default=256, help="new tokens of a reply (256)")
    parser.set_defaults(max_prompt_length=1536, max_length=2560, mtbench_file="mt_bench_en.json")


def two_way_shares(args: argparse.Namespace) -> dict[str, Fraction]:
    reddit = Fraction(str(args.hybrid_ratio))
    return {"reddit": reddit, "finance": 1 - reddit}


REDDIT_COLUMNS = ("id", "title", "body", "comment_normalized_score")  # selftext and subreddit may be absent


def reddit_problem(row: dict) -> str | None:
    """Why a row of one post and one comment cannot be used; None when it can."""
    missing = [column for column in REDDIT_COLUMNS if column not in row]
    if missing:
        return f"missing columns: {', '.join(missing)}"
    for column in ("id", "title", "body"):
        if not isinstance(row[column], str) or not row[column].strip():
            return f"empty {column}"
    if not isinstance(row.get("selftext", ""), str):
        return "selftext is no text"
    score = row["comment_normalized_score"]
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        return f"comment_normalized_score {score!r} is not a number"
    return None


def finance_problem(row: dict) -> str | None:
    """Why an instruction cannot be used; None when it can."""
    for column in ("user", "assistant"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            return f"empty {column}" if column in row else f"missing columns: {column}"
    if not isinstance(row.get("system", ""), str):
        return "system is no text"
    return None


def reddit_pairs(
    rows: list[dict],
    *,
    min_post_chars: int = 120,
    min_comment_chars: int = 40,
    max_post_chars: int = 2000,
    score_margin: float = 0.10,
    length_tol: float = 0.6,
    max_pairs_per_post: int = 1,
) -> list[dict[str, str]]:
    """Preference pairs of the posts with at least two comments, sorted by uid whatever the order of `rows`.

    chosen is the comment with the best `comment_normalized_score`. rejected are the lowest siblings, at most
    `max_pairs_per_post`, that lie `score_margin` or more below it and differ from its length by at most `length_tol`
    of it; without any, the lowest sibling. A post whose comments are equal in text or in score gives no pair.
    """
    posts = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["comment_normalized_score"], row["body"], row["title"])):
        if len(row["body"].strip()) >= min_comment_chars:
            posts[row["id"]].append(row)
    pairs = []
    for post_id, comments in sorted(posts.items()):
        *siblings, best = comments
        prompt, chosen = post_text(best, max_post_chars), best["body"].strip()
        if not siblings or len(prompt) < min_post_chars:
            continue

        def is_worse(row: dict, margin: float = 0.0, best: dict = best, chosen: str = chosen) -> bool:
            gap = best["comment_normalized_score"] - row["comment_normalized_score"]
            return gap > 0 and gap >= margin and row["body"].strip() != chosen

        def is_as_long(row: dict, chosen: str = chosen) -> bool:
            return abs(len(row["body"].strip()) - len(chosen)) <= length_tol * len(chosen)

        near = [row for row in siblings if is_worse(row, score_margin) and is_as_long(row)]
        rejected = near[:max_pairs_per_post] or list(filter(is_worse, siblings[:1]))
        for number, row in enumerate(rejected):
            uid = f"reddit:{post_id}:{number}"
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": row["body"].strip(), "uid": uid})
    return pairs


def finance_lesson(row: dict) -> dict[str, str]:
    prompt, chosen = merge_system_prompt(row.get("system"), row["user"]), row["assistant"].strip()
    return {
        "prompt": prompt,
        "chosen": chosen,
        "uid": f"finance:{digest(prompt, chosen)[:16]}",
        "user": row["user"],
    }


def distinct(lessons: list[dict]) -> list[dict]:
    """One lesson for each instruction; which of several answers stays does not depend on their order."""
    return list(
        {plain(lesson["user"]): lesson for lesson in sorted(lessons, key=lambda lesson: lesson["uid"])}.values()
    )


def finance_pairs(
    args: argparse.Namespace, record: dict, tokenizer: PreTrainedTokenizerBase, lessons: list[dict], wanted: int
) -> list[dict[str, str]]:
    """`wanted` pairs, or what the lessons give: the reference answer chosen, the base model's own answer rejected.

    Under several processes the main one generates. A dry run takes the references in the place of the answers.
    """
    if args.dry_run:
        return [{**lesson, "rejected": lesson["chosen"]} for lesson in lessons[:wanted]]
    with timed(record, "finance answers"):
        return on_main_process(lambda: answered_by_base(args, tokenizer, lessons, wanted))


def answered_by_base(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, lessons: list[dict], wanted: int
) -> list[dict[str, str]]:
    """The first `wanted` lessons that the base answers otherwise than the reference, its answer as rejected.

    Answers are stored one by one, as they come, in the output folder, so that a restart goes on; at the end they are
    put into the baseline cache, where later runs on this base find them.
    """
    settings = {"max_new_tokens": args.instruct_max_tokens, "temperature": 0.0, "seed": args.seed}
    fingerprint = {**model_fingerprint(args, "none"), "answers": "one user turn", "generation": settings}
    path = Path(args.output_dir) / "finance_answers.jsonl"
    results = ResultFile(path, fingerprint, renew=True, use_cache=not args.no_baseline_cache)
    model, pairs, position = None, [], 0
    while len(pairs) < wanted and position < len(lessons):
        batch = [
            {**lesson, "question_id": lesson["uid"]} for lesson in lessons[position : position + wanted - len(pairs)]
        ]
        position += len(batch)
        missing = results.missing(batch)
        log.info("the base's answers: %d in %s, %d to generate", len(batch) - len(missing), path, len(missing))

        if missing:
            model = model or load_model(args)
            for answer in generate(
                model,
                tokenizer,
                [[{"role": "user", "content": lesson["prompt"]}] for lesson in missing],
                batch_size=args.eval_batch_size,
                thinking=args.thinking,
                description="the base's answers",
                **settings,
            ):
                kept = {key: missing[answer.index][key] for key in ("question_id", "prompt")}
                text = strip_thinking(answer.text)
                results.append({**kept, "answer": text, "answer_tokens": answer.tokens, "finished": answer.finished})
        for lesson, row in zip(lessons[position - len(batch) : position], results.rows_of(batch), strict=True):
            if row["answer"] not in {"", lesson["chosen"]}:
                pairs.append({**lesson, "rejected": row["answer"]})
    results.finish()
    return pairs


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
        raise InputError(f"the mix is empty: {shown(available)} pairs, asked {in_parts(shares)}; change the ratios")
    return counts


def in_parts(parts: dict[str, Any]) -> str:
    """Shares as "81-19"."""
    total = sum(parts.values())
    return "-".join(f"{float(100 * part / total):.0f}" for part in parts.values())


def shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {source}" for source, count in counts.items())


def mixed_pairs(
    material: Material,
    shares: dict[str, Fraction],
    limits: dict[str, int],
    policy: str,
    make_finance_pairs: Callable[[list[dict], int], list[dict]],
) -> list[dict]:
    """The training pairs of a mix; says which shares were asked for and which are reached.

    `limits` are upper bounds by source. Finance pairs are made only as many as the mix takes.
    """
    sources = {source: getattr(material, source) for source in shares}
    available = {source: min(len(items), limits.get(source, len(items))) for source, items in sources.items()}
    counts = mix_counts(available, shares, policy)
    if counts.get("finance"):
        sources["finance"] = make_finance_pairs(sources["finance"], counts["finance"])
        available["finance"] = len(sources["finance"])
        if available["finance"] < counts["finance"]:
            counts = mix_counts(available, shares, policy)
    log.info(
        "mix (%s): asked %s, reached %s: %s of %s",
        policy,
        in_parts(shares),
        in_parts(counts),
        shown(counts),
        shown(available),
    )
    return [pair for source, items in sources.items() for pair in items[: counts[source]]]


@dataclasses.dataclass
class Material:
    """What training pairs can be made of, and what is asked about instead.

    `reddit` and `general` are pairs; `finance` are lessons {"prompt", "chosen", "uid", "user"} that still want their
    rejected answer. All are in an order of the seed's. The questions are as `score_questions` takes them; `counts`
    goes to the record.
    """

    reddit: list[dict] = dataclasses.field(default_factory=list)
    finance: list[dict] = dataclasses.field(default_factory=list)
    general: list[dict] = dataclasses.field(default_factory=list)
    reddit_questions: list[dict] = dataclasses.field(default_factory=list)
    finance_questions: list[dict] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


def load_material(args: argparse.Namespace, sources: set[str], mtbench_questions: list[dict]) -> Material:
    """Reads the data of `sources` ("reddit", "finance", "general") and of the evaluations that the flags ask for.

    What they ask, and `mtbench_questions`, is not trained on. Raises InputError when a source gives nothing.
    """
    material = Material()
    forbidden = {"MT-Bench question": [question["turns"][0] for question in mtbench_questions]}
    if args.do_eval:
        contexts = read_tatqa(tatqa_file(args, args.eval_split), SkippedRows())
        forbidden["TAT-QA question"] = [question["question"] for c in contexts for question in c["questions"]]
    comments, lessons = [], []
    chars = {"min_chars": args.reddit_min_post_chars, "max_chars": args.reddit_max_post_chars}
    if args.do_reddit or "reddit" in sources:
        columns = ", ".join(REDDIT_COLUMNS)
        comments = read_usable(args.reddit_dataset, "--reddit_dataset", reddit_problem, columns)
    if args.do_reddit:
        material.reddit_questions, comments = set_posts_aside(comments, args.reddit_limit, **chars)
        forbidden["evaluation post"] = [recognisable(question["turns"][0]) for question in material.reddit_questions]
    if args.do_instruct or "finance" in sources:
        columns = "user, assistant and perhaps system"
        rows = read_usable(args.finance_dataset, "--finance_dataset", finance_problem, columns)
        lessons = [finance_lesson(row) for row in rows]
    if args.do_instruct:
        material.finance_questions, lessons = set_lessons_aside(lessons, args.instruct_limit)
        forbidden["evaluation instruction"] = [question.pop("user") for question in material.finance_questions]
    find_leak = leak_finder(forbidden)

    if "reddit" in sources:
        names = (
            "min_comment_chars",
            "score_margin",
            "length_tol",
            "max_pairs_per_post",
            "min_post_chars",
            "max_post_chars",
        )
        options = {name: getattr(args, f"reddit_{name}") for name in names}
        pairs = without_leaks(reddit_pairs(comments, **options), find_leak, "reddit", material.counts)
        material.reddit = sample(pairs, math.floor(Fraction(str(args.reddit_sample_rate)) * len(pairs)), args.seed)
        log.info("reddit: %d pairs, sampled to %d", len(pairs), len(material.reddit))
    if "finance" in sources:
        clean = without_leaks(lessons, find_leak, "finance", material.counts)
        material.finance = sample(distinct(clean), len(clean), args.seed)
    if "general" in sources:
        pairs = read_pairs(args.general_dataset, "--general_dataset")
        pairs = without_leaks(pairs, find_leak, "general", material.counts)
        material.general = sample(pairs, len(pairs), args.seed)
    for wanted, flag, found in [
        ("reddit" in sources, f"--reddit_dataset {args.reddit_dataset}", material.reddit),
        ("finance" in sources, f"--finance_dataset {args.finance_dataset}", material.finance),
        ("general" in sources, f"--general_dataset {args.general_dataset}", material.general),
        (args.do_reddit, f"--reddit_dataset {args.reddit_dataset}", material.reddit_questions),
        (args.do_instruct, f"--finance_dataset {args.finance_dataset}", material.finance_questions),
    ]:
        if wanted and not found:
            raise InputError(f"{flag}: nothing is left to train on or to ask about; name a larger set")
    return material


def data_fingerprint(material: Material, pairs: list[dict]) -> dict:
    """What the record says of the training pairs."""
    sources = Counter(pair["uid"].partition(":")[0] for pair in pairs)
    text = json.dumps([[pair[key] for key in ("prompt", "chosen", "rejected")] for pair in pairs])
    return {"rows": {**sources, **material.counts}, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def finance_asked(args: argparse.Namespace, material: Material) -> dict[str, tuple[list[dict], int]]:
    """What the reward model scores besides MT-Bench: {name: (questions, tokens of an answer)}."""
    asked = {}
    if args.do_instruct:
        asked["finance_instruct"] = material.finance_questions, args.instruct_max_tokens
    if args.do_reddit:
        asked["reddit"] = material.reddit_questions, args.reddit_max_tokens
    return asked
