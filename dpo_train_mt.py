"""DPO on several finance tasks: Reddit replies, Finance-Instruct and general preference pairs, alone or mixed.

    L = -log sigmoid(beta * (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

Reddit: the best comment of a post against a worse sibling. Finance-Instruct: the reference answer against the answer
that the base model itself gives. General: any set of preference pairs. What the evaluation asks is set aside before a
pair is built, and whatever contains it is dropped and counted. TAT-QA, MT-Bench, Finance-Instruct instructions and
Reddit replies are measured before and after.

    poetry run python dpo_train_mt.py --use_hybrid --hybrid_ratio 0.5 --beta 0.0175 --finance_instruct_pairs 1800

The pairs are conversations and go through the chat template, as their evaluations do; --use_chat_template is about
TAT-QA's prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import re
import statistics
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpo_train
import mtbench_eval
from dpo_train import Evaluation
from mtbench_eval import InputError, ResultFile, SkippedRows, log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------------------------
# Arguments

DEMO = {
    **dpo_train.DEMO,
    "reddit_dataset": str(mtbench_eval.DEMO_DIR / "reddit.jsonl"),
    "finance_dataset": str(mtbench_eval.DEMO_DIR / "finance_instruct.jsonl"),
    "general_dataset": str(mtbench_eval.DEMO_DIR / "orca_pairs.jsonl"),
    "reddit_sample_rate": 1.0,
    "finance_instruct_pairs": 120,
    "general_pairs": 120,
    "instruct_limit": 40,
    "instruct_max_tokens": 48,
    "reddit_limit": 40,
    "reddit_max_tokens": 48,
    "limit_pairs": 0,
}
# Flags that do not change which adapter comes out. The other evaluation flags do: what is asked is not trained on.
MEASURING_FLAGS = {
    "reward_model", "eval_baseline", "eval_save_json", "eval_limit", "eval_max_new_tokens", "eval_temperature",
    "eval_top_p", "mtbench_limit", "mtbench_max_tokens", "reddit_max_tokens",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line. Defaults are those of the published runs where they had one."""
    ratio = mtbench_eval.ratio
    parser = mtbench_eval.new_parser("dpo_train_mt.py", __doc__)
    dpo_train.add_dpo_flags(parser)
    add_data_flags(parser)
    group = parser.add_argument_group("mix (default: Reddit alone)")
    group.add_argument("--use_hybrid", action="store_true", help="Reddit and Finance-Instruct, by --hybrid_ratio")
    group.add_argument("--use_3way_hybrid", action="store_true", help="and general pairs, by the three ratios")
    group.add_argument("--reddit_ratio", type=ratio, default=0.4, help="share of Reddit in the three-way mix (0.4)")
    group.add_argument("--finance_ratio", type=ratio, default=0.3, help="share of Finance-Instruct in it (0.3)")
    group.add_argument("--general_ratio", type=ratio, default=0.3, help="share of general pairs in it (0.3)")
    group.add_argument("--general_pairs", type=mtbench_eval.positive(int), default=3000, help="at most (3000)")
    parser.set_defaults(output_dir="qwen3_reddit_finance_dpo", batch=1, grad_acc=64, hybrid_ratio=0.7)
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The data sets, how pairs are made of them, and how their evaluations are made."""
    ratio, positive, not_negative = mtbench_eval.ratio, mtbench_eval.positive, mtbench_eval.not_negative
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


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; a mix adds its name to the output folder, as in the published runs."""
    given = build_parser().parse_args(argv)
    suffix = "_3way_hybrid" if given.use_3way_hybrid else "_hybrid" if given.use_hybrid else ""
    args = mtbench_eval.parse_arguments(build_parser(), argv, {**DEMO, "output_dir": f"demo_dpo_mt{suffix}"})
    if args.output_dir == given.output_dir:  # not the demo's own folder
        args.output_dir += suffix
    return args


def asked_shares(args: argparse.Namespace) -> dict[str, Fraction]:
    """The share of each source in the training pairs. Raises InputError for mixes that cannot be."""
    if args.use_hybrid and args.use_3way_hybrid:
        raise InputError("--use_hybrid and --use_3way_hybrid: one mix at a time; leave out one of them")
    if args.use_3way_hybrid:
        shares = {
            source: Fraction(str(getattr(args, f"{source}_ratio"))) for source in ("reddit", "finance", "general")
        }
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise InputError(
                f"--reddit_ratio, --finance_ratio and --general_ratio sum to {float(sum(shares.values())):g}; make it 1"
            )
        return shares
    if args.use_hybrid:
        return two_way_shares(args)
    return {"reddit": Fraction(1)}


def two_way_shares(args: argparse.Namespace) -> dict[str, Fraction]:
    reddit = Fraction(str(args.hybrid_ratio))
    return {"reddit": reddit, "finance": 1 - reddit}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_usable(source: str, flag: str, problem: Callable[[dict], str | None], needs: str) -> list[dict]:
    """The rows in which `problem` finds none, each once; the others are counted and reported.

    Raises InputError naming the flag, and what the rows need, when no row is left.
    """
    skipped, usable, seen = SkippedRows(), [], set()
    for place, row in mtbench_eval.open_dataset(source, flag)(skipped):
        reason = problem(row)
        key = None if reason else rank(*(str(row[column]) for column in sorted(row)))
        if key in seen:
            reason = "the same row stands before it"
        if reason:
            skipped.add(place, reason)
        else:
            seen.add(key)
            usable.append(row)
    if not usable:
        places = "; ".join(skipped.places) or "it is empty"
        raise InputError(f"{flag} {source}: no usable row ({places}); it needs the columns {needs}")
    skipped.report(f"rows of {source}")
    return usable


def rank(*parts: object) -> bytes:
    """A hash to sort by: a random order that depends on the items and not on where they stand."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()


REDDIT_COLUMNS = ("id", "title", "selftext", "subreddit", "body", "comment_normalized_score")


def reddit_problem(row: dict) -> str | None:
    """Why a row of one post and one comment cannot be used; None when it can."""
    missing = [column for column in REDDIT_COLUMNS if column not in row]
    if missing:
        return f"missing columns: {', '.join(missing)}"
    for column in ("id", "title", "body"):
        if not isinstance(row[column], str) or not row[column].strip():
            return f"empty {column}"
    if not isinstance(row["selftext"], str | None):
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
    if not isinstance(row.get("system"), str | None):
        return "system is no text"
    return None


def folded(system: str | None, user: str) -> str:
    """One user turn with the system turn's text before it: the evaluations have no system turn either."""
    return f"{system.strip()}\n\n{user.strip()}" if system and system.strip() else user.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: {"prompt", "chosen", "rejected", "uid"}, all of them texts


def post_text(row: dict, max_chars: int) -> str:
    """Title and text of a post, cut at a word to `max_chars` characters."""
    text = f"{row['title'].strip()}\n\n{(row['selftext'] or '').strip()}".strip()
    return text if len(text) <= max_chars else text[: max_chars + 1].rsplit(None, 1)[0]


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


GENERAL_COLUMNS = (
    "question, chosen, rejected and perhaps system (as Intel/orca_dpo_pairs); prompt, chosen, rejected; or chosen and "
    "rejected, two dialogues that begin alike (as Anthropic/hh-rlhf)"
)


def general_problem(row: dict) -> str | None:
    """Why a row is no preference pair; None when it is one."""
    has_prompt = "question" in row or "prompt" in row
    if not {"chosen", "rejected"} <= row.keys() or not (has_prompt or is_dialogue(row["chosen"])):
        return f"columns {', '.join(row)}"
    for column in row.keys() & {"system", "question", "prompt", "chosen", "rejected"}:
        if not isinstance(row[column], str | None) and not is_dialogue(row[column]):
            return f"{column} is neither a text nor a list of turns"
    prompt, chosen, rejected = general_texts(row)
    if not (prompt and chosen and rejected):
        return "an empty text, or dialogues that do not begin alike"
    return "equal answers" if chosen == rejected else None


def is_dialogue(value: object) -> bool:
    """True for hh-rlhf's "Human: ... Assistant: ..." and for a list of {role, content} turns."""
    if isinstance(value, list):
        are_turns = all(isinstance(turn, dict) and turn.keys() >= {"role", "content"} for turn in value)
        return bool(value) and are_turns and all(isinstance(turn["content"], str) for turn in value)
    return isinstance(value, str) and ANSWER_MARK in value


ANSWER_MARK = "\n\nAssistant:"


def general_texts(row: dict) -> tuple[str, str, str]:
    """prompt, chosen, rejected of a row; the prompt of a longer dialogue is its transcript."""
    if "question" in row or "prompt" in row:
        answers = [
            row[side][-1]["content"] if isinstance(row[side], list) else row[side] or ""
            for side in ("chosen", "rejected")
        ]
        prompt = folded(row.get("system"), transcript(row["question"] if "question" in row else row["prompt"]))
    else:
        beginnings, _, answers = zip(
            *(transcript(row[side]).rpartition(ANSWER_MARK) for side in ("chosen", "rejected")), strict=True
        )
        prompt = beginnings[0] if beginnings[0] == beginnings[1] else ""
    if ANSWER_MARK not in prompt:
        prompt = prompt.removeprefix("Human:")  # a single question needs no name of who asks
    return prompt.strip(), answers[0].strip(), answers[1].strip()


def transcript(value: str | list[dict] | None) -> str:
    """A text as it is; turns as hh-rlhf writes them."""
    if isinstance(value, list):
        speakers = {"user": "Human", "assistant": "Assistant"}
        value = "\n\n".join(f"{speakers.get(turn['role'], 'System')}: {turn['content']}" for turn in value)
    return (value or "").strip()


def general_pairs(rows: list[dict]) -> list[dict[str, str]]:
    """Preference pairs of usable rows, sorted by uid."""
    pairs = {}
    for row in rows:
        prompt, chosen, rejected = general_texts(row)
        uid = f"general:{rank(prompt, chosen, rejected).hex()[:16]}"
        pairs[uid] = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "uid": uid}
    return [pairs[uid] for uid in sorted(pairs)]


# ---------------------------------------------------------------------------------------------------------------------
# What is set aside for the evaluations, and what would leak it


def plain(text: str) -> str:
    """The words of a text in lower case with single spaces: what is left when two copies differ in form alone."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def leak_finder(forbidden: dict[str, list[str]]) -> Callable[[str], str | None]:
    """Returns `find(text)`: the kind of a forbidden text whose words stand in `text` one after the other, or None.

    A forbidden text is looked for only where its rarest word occurs, so half a million rows take about a minute.
    """
    kinds = {plain(text): kind for kind, texts in forbidden.items() for text in texts}
    kinds.pop("", None)
    frequency = Counter(word for text in kinds for word in set(text.split()))
    by_word = defaultdict(list)
    for text in kinds:
        by_word[min(text.split(), key=lambda word: (frequency[word], word))].append(text)

    def find(text: str) -> str | None:
        text = plain(text)
        for word in sorted(by_word.keys() & set(text.split())):
            for known in by_word[word]:
                if f" {known} " in f" {text} ":
                    return kinds[known]
        return None

    return find


def set_posts_aside(rows: list[dict], limit: int, *, min_chars: int, max_chars: int) -> tuple[list[dict], list[dict]]:
    """`limit` posts as questions, chosen by a hash of their id, and the rows of all other posts.

    The choice depends on nothing else, so that runs with other seeds are asked the same.
    """
    posts = {}
    for row in sorted(rows, key=lambda row: (row["title"], row["selftext"] or "", str(row["subreddit"]))):
        text = post_text(row, max_chars)
        if len(text) >= min_chars:
            question = {"question_id": row["id"], "category": str(row["subreddit"]), "turns": [text]}
            posts.setdefault(row["id"], question)
    chosen = sorted(posts, key=lambda post_id: rank("evaluation", post_id))[:limit]
    return [posts[post_id] for post_id in chosen], [row for row in rows if row["id"] not in set(chosen)]


def recognisable(post: str) -> str:
    """What gives a post away under another title or with another end: its first forty words, or all of a short one."""
    words = post.partition("\n\n")[2].split()[:40]
    return " ".join(words) if len(words) >= 20 else post


def set_lessons_aside(lessons: list[dict], limit: int) -> tuple[list[dict], list[dict]]:
    """`limit` instructions as questions, chosen by a hash of their text, and the others.

    Shorter ones than four words are not chosen: too many texts would contain them.
    """
    by_text = {}
    for lesson in sorted(lessons, key=lambda lesson: lesson["uid"]):
        text = plain(lesson["user"])
        if text.count(" ") >= 3:
            by_text.setdefault(text, lesson)
    chosen = [by_text[text] for text in sorted(by_text, key=lambda text: rank("evaluation", text))[:limit]]
    questions = [
        {"question_id": lesson["uid"], "category": "finance", "turns": [lesson["prompt"]], "user": lesson["user"]}
        for lesson in chosen
    ]
    taken = {lesson["uid"] for lesson in chosen}
    return questions, [lesson for lesson in lessons if lesson["uid"] not in taken]


def without_leaks(items: list[dict], find_leak: Callable[[str], str | None], source: str, counts: dict) -> list[dict]:
    """The items that contain nothing the evaluations ask; the others are counted and reported by kind."""
    leaks, clean = Counter(), []
    for item in items:
        leak = find_leak("\n".join(item[key] for key in ("prompt", "chosen", "rejected") if key in item))
        if leak:
            leaks[leak] += 1
        else:
            clean.append(item)
    counts[f"{source}_leaks"] = leaks.total()
    log.info("%s: %d of %d left out because the evaluations ask what they contain%s", source, leaks.total(), len(items),
             "".join(f", {count} {kind}s" for kind, count in sorted(leaks.items())))  # fmt: skip
    return clean


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


def load_material(args: argparse.Namespace, sources: set[str]) -> Material:
    """Reads the data of `sources` ("reddit", "finance", "general") and of the evaluations that the flags ask for.

    Raises InputError when one of them gives nothing.
    """
    material = Material()
    forbidden: dict[str, list[str]] = {}
    if args.do_eval:
        contexts = dpo_train.read_tatqa(dpo_train.tatqa_file(args, args.eval_split), SkippedRows())
        forbidden["TAT-QA question"] = [question["question"] for c in contexts for question in c["questions"]]
    if args.do_mtbench:
        forbidden["MT-Bench question"] = [
            q["turns"][0] for q in mtbench_eval.load_questions(args.mtbench_file, flag="--mtbench_file")
        ]

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
        rows = read_usable(args.general_dataset, "--general_dataset", general_problem, GENERAL_COLUMNS)
        pairs = without_leaks(general_pairs(rows), find_leak, "general", material.counts)
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


def sample(items: list[dict], size: int, seed: int) -> list[dict]:
    """The first `size` items in an order of the seed's that does not depend on how they stand."""
    return sorted(items, key=lambda item: rank(seed, item["uid"]))[:size]


# ---------------------------------------------------------------------------------------------------------------------
# Finance-Instruct: the base model's own answers


def finance_lesson(row: dict) -> dict[str, str]:
    prompt, chosen = folded(row.get("system"), row["user"]), row["assistant"].strip()
    return {
        "prompt": prompt,
        "chosen": chosen,
        "uid": f"finance:{rank(prompt, chosen).hex()[:16]}",
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
    with mtbench_eval.timed(record, "finance answers"):
        return mtbench_eval.on_main_process(lambda: answered_by_base(args, tokenizer, lessons, wanted))


def answered_by_base(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, lessons: list[dict], wanted: int
) -> list[dict[str, str]]:
    """The first `wanted` lessons that the base answers otherwise than the reference, its answer as rejected.

    Answers are stored one by one as they come, by prompt, in the cache of baselines (with --no_baseline_cache in the
    output folder): a restart, and later runs on this base, take them from there.
    """
    from filelock import FileLock

    settings = {"max_new_tokens": args.instruct_max_tokens, "temperature": 0.0, "seed": args.seed}
    fingerprint = {**mtbench_eval.model_fingerprint(args, "none"), "answers": "one user turn", "generation": settings}
    path = mtbench_eval.baseline_cache(fingerprint)
    if args.no_baseline_cache:
        path = Path(args.output_dir) / "finance_answers.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    model, pairs, position = None, [], 0
    with FileLock(f"{path}.lock"):
        results = ResultFile(path, fingerprint)
        answers = {row["prompt"]: row["answer"] for row in results.rows}

        def keep(prompt: str, text: str, tokens: int, finished: bool) -> None:
            answers[prompt] = mtbench_eval.strip_thinking(text)
            row = {"prompt": prompt, "answer": answers[prompt], "answer_tokens": tokens, "finished": finished}
            results.append(row)

        while len(pairs) < wanted and position < len(lessons):
            batch = lessons[position : position + wanted - len(pairs)]
            position += len(batch)
            missing = [lesson["prompt"] for lesson in batch if lesson["prompt"] not in answers]
            log.info("the base's answers: %d in %s, %d to generate", len(batch) - len(missing), path, len(missing))
            if missing:
                model = model or mtbench_eval.load_model(args)
                mtbench_eval.generate(
                    model,
                    tokenizer,
                    [[{"role": "user", "content": prompt}] for prompt in missing],
                    batch_size=args.eval_batch_size,
                    thinking=args.thinking,
                    description="the base's answers",
                    on_answer=lambda index, *answer, missing=missing: keep(missing[index], *answer),
                    **settings,
                )
            for lesson in batch:
                if answers[lesson["prompt"]] not in {"", lesson["chosen"]}:
                    pairs.append({**lesson, "rejected": answers[lesson["prompt"]]})
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# The mix


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


# ---------------------------------------------------------------------------------------------------------------------
# The run


def load_evaluations(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, material: Material
) -> list[Evaluation]:
    """The four evaluations, as far as the flags ask for them."""
    is_scored = args.do_mtbench or args.do_instruct or args.do_reddit
    needs_reward = is_scored and not args.dry_run and mtbench_eval.main_process()
    reward_model = mtbench_eval.RewardModel(args.reward_model) if needs_reward else None
    evaluations = dpo_train.common_evaluations(args, tokenizer, reward_model)
    if args.do_instruct:
        title, questions, tokens = "Finance-Instruct", material.finance_questions, args.instruct_max_tokens
        finance = dpo_train.scored_evaluation(
            args, "finance_instruct", title, questions, reward_model, tokens, summarise_finance
        )
        finance.lines.append((f"{title}, score of 7 or more, %", lambda s: s["success_rate"], None))
        evaluations.append(finance)
    if args.do_reddit:
        questions, tokens = material.reddit_questions, args.reddit_max_tokens
        evaluations.append(
            dpo_train.scored_evaluation(args, "reddit", "Reddit replies", questions, reward_model, tokens)
        )
    return evaluations


def summarise_finance(rows: list[dict]) -> dict:
    """`summarise` with the share of answers that score 7 or more, in per cent."""
    success_rate = 100 * statistics.fmean(row["scores"][0] >= 7 for row in rows)
    return {**mtbench_eval.summarise(rows), "success_rate": success_rate}


def fit_chats(pairs: list[dict], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[dict[str, str]]:
    """The pairs as the trainer reads them, through the chat template; a prompt that is too long loses its beginning."""
    chat = argparse.Namespace(**{**vars(args), "use_chat_template": True})
    return dpo_train.fit_pairs(pairs, tokenizer, chat, mark="\0")


def stored_rows(folder: Path, name: str, evaluations: list[Evaluation]) -> dict[str, list[dict]]:
    """The rows that a measurement left in `folder`, by evaluation, sorted by id."""
    rows = {}
    for evaluation in evaluations:
        path = folder / f"{evaluation.name}_{name}.jsonl"
        if path.exists():
            stored = [json.loads(line) for _, line in mtbench_eval.read_jsonl(path)][1:]
            rows[evaluation.name] = sorted(stored, key=lambda row: str(row["question_id"]))
    return rows


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    with mtbench_eval.recorded_run(args, argv, "dpo_train_mt.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, mix, measure, train, measure again. What can be wrong with the input is found before it writes."""
    shares = asked_shares(args)
    dpo_train.check_flags(args)
    checkpoint = mtbench_eval.find_checkpoint(args, mtbench_eval.NEUTRAL_FLAGS | MEASURING_FLAGS)
    tokenizer = mtbench_eval.load_tokenizer(args)
    material = load_material(args, set() if args.no_train else set(shares))
    evaluations = load_evaluations(args, tokenizer, material)

    pairs = []
    if not args.no_train:
        limits = {"finance": args.finance_instruct_pairs, "general": args.general_pairs}
        make_finance_pairs = functools.partial(finance_pairs, args, record, tokenizer)
        pairs = mixed_pairs(material, shares, limits, args.mix_policy, make_finance_pairs)
        pairs = sample(pairs, args.limit_pairs or len(pairs), args.seed)
    rows = fit_chats(pairs, tokenizer, args)
    if args.dry_run:
        dpo_train.print_plan(args, tokenizer, rows, evaluations)
        return
    dpo_train.align(args, record, tokenizer, rows, evaluations, data_fingerprint(material, pairs), checkpoint)
    if mtbench_eval.main_process():
        folder = Path(args.output_dir)
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
        mtbench_eval.write_atomic(folder / "train_pairs.jsonl", "".join(lines))
        if args.eval_save_json:
            stages = ("baseline", "final")
            answers = {stage: stored_rows(folder, stage, evaluations).get("tatqa", []) for stage in stages}
            dpo_train.save_answers(args, answers)


def data_fingerprint(material: Material, pairs: list[dict]) -> dict:
    """What the record says of the training pairs."""
    sources = Counter(pair["uid"].partition(":")[0] for pair in pairs)
    text = json.dumps([[pair[key] for key in ("prompt", "chosen", "rejected")] for pair in pairs])
    return {"rows": {**sources, **material.counts}, "sha256": hashlib.sha256(text.encode()).hexdigest()}


if __name__ == "__main__":
    main()
