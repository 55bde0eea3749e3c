"""Finance-Instruct: its rows, what is asked of them, its preference pairs; mixes of these with Reddit and others."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from llm_alignment import reddit
from llm_alignment.conversations import check_texts, refuse_needed
from llm_alignment.encoder import NO_TOKENS, split_thought, text_problem
from llm_alignment.evaluation import read_items
from llm_alignment.files import InputError, digest, log, sample
from llm_alignment.generation import Decoding
from llm_alignment.hub import read_usable
from llm_alignment.leaks import LeakFinder, normalise_text, without_leaks
from llm_alignment.models import base_fingerprint, load_model
from llm_alignment.preferences import merge_system_prompt, read_pairs
from llm_alignment.results import baseline_cache
from llm_alignment.scores import answered_evaluation
from llm_alignment.training import Setup

SAMPLED_AT_ONCE = 32  # answers


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The flags of the data, by name: where it is, what is trained on and asked, how the base answers instructions."""

    reddit: reddit.RedditSettings
    reddit_dataset: str
    reddit_sample_rate: float
    finance_dataset: str
    general_dataset: str
    do_reddit: bool
    reddit_limit: int
    do_instruct: bool
    instruct_limit: int
    instruct_max_tokens: int
    finance_temperature: float
    thinking: bool
    seed: int
    eval_batch_size: int
    no_baseline_cache: bool
    dry_run: bool


def read_instruction(row: dict, *, thinking: bool = False, own: re.Pattern[str] = NO_TOKENS) -> dict[str, str]:
    """{"prompt": the user's text after the system text, "chosen": the reference answer, "uid", "user": the user's text
    alone} of a row of --finance_dataset. Raises ValueError with the reason when it cannot be used."""
    check_texts(row, ("user", "assistant"), ("system",))
    refuse_needed(row, "the row")
    prompt, chosen = merge_system_prompt(row.get("system"), row["user"]), row["assistant"].strip()
    if not thinking:
        chosen = split_thought(chosen)[1]
    if problem := text_problem([("user", prompt), ("assistant", chosen)], own):
        raise ValueError(problem)
    own_system = {"own_system": True} if prompt != row["user"].strip() else {}
    uid = f"finance:{digest(prompt, chosen)[:16]}"
    return {"prompt": prompt, "chosen": chosen, "uid": uid, "user": row["user"], **own_system}


def hold_out_instructions(instructions: list[dict], limit: int) -> tuple[list[dict], list[dict]]:
    """`limit` instructions as evaluation questions, chosen by a hash of their text, and the other instructions.
    Instructions of less than four words are not chosen: too many texts would contain them."""
    by_text: dict[str, dict] = {}
    for instruction in sorted(instructions, key=lambda instruction: instruction["uid"]):
        text, kept = normalise_text(instruction["user"]), {"category": "finance", "turns": [instruction["prompt"]]}
        kept |= {"instruction": instruction["user"], "reference": instruction["chosen"]}
        if text.count(" ") >= 3:
            by_text.setdefault(text, {"question_id": instruction["uid"], **kept})
    questions = [by_text[text] for text in sorted(by_text, key=lambda text: digest("evaluation", text))[:limit]]
    taken = {question["question_id"] for question in questions}
    return questions, [instruction for instruction in instructions if instruction["uid"] not in taken]


def finance_pairs(setup: Setup, instructions: list[dict], wanted: int, settings: DataSettings) -> list[dict[str, str]]:
    """Pairs of the first `wanted` instructions, or as many as there are, whose answer by the base can be rejected.

    The reference is chosen, the base's answer rejected, unless it is empty, cut by the token limit, or equal to the
    reference; at most 2 * `wanted` instructions are answered. finance_answers.jsonl stores answers as they come, for a
    restart; the baseline cache keeps greedy ones. A dry run uses the reference instead. All processes call this."""
    if settings.dry_run:
        log.info("dry run: reference answers stand for the base's own answers, which a run generates first")
        return [{**instruction, "rejected": instruction["chosen"]} for instruction in instructions[:wanted]]
    decoding = Decoding(
        max_new_tokens=settings.instruct_max_tokens, temperature=settings.finance_temperature, seed=settings.seed,
        thinking=settings.thinking, batch_size=settings.eval_batch_size,
    )  # fmt: skip
    get_model = functools.cache(functools.partial(load_model, setup.base))
    fingerprint = {**base_fingerprint(setup.base, thinking=decoding.thinking), "adapter": "none"}
    how = {"answers": "one user turn", "generation": decoding.settings("max_new_tokens", "temperature", "seed")}
    is_greedy = decoding.temperature == 0
    cache = baseline_cache({**fingerprint, **how}) if is_greedy and not settings.no_baseline_cache else None
    pairs, position = list[dict[str, str]](), 0
    kept = {"prompt": "turns", "answer": "answers", "answer_tokens": "answer_tokens", "finished": "finished"}

    def kept_rows(rows: list[dict]) -> list[dict]:
        return [{"question_id": row["question_id"], **{name: row[kept[name]][0] for name in kept}} for row in rows]

    while len(pairs) < wanted and position < min(2 * wanted, len(instructions)):
        # Samples depend on the batch. So a batch of samples is small, and a restart generates it again as a whole.
        size = wanted - len(pairs) if is_greedy else SAMPLED_AT_ONCE
        batch = instructions[position : min(position + size, 2 * wanted)]
        position += len(batch)
        items = [{"question_id": instruction["uid"], "turns": [instruction["prompt"]]} for instruction in batch]
        about = {"items": items, "grade": kept_rows, "settings": how}
        evaluation = answered_evaluation("finance_answers", items, decoding, **about)
        path = setup.folder / "finance_answers.jsonl"
        rows = read_items(evaluation, get_model, setup.tokenizer, path, fingerprint=fingerprint, cache=cache)
        for instruction, row in zip(batch, rows, strict=True):
            if row["finished"] and row["answer"] not in {"", instruction["chosen"]} and len(pairs) < wanted:
                pairs.append({**instruction, "rejected": row["answer"]})
    log.info("the base's answers: %d pairs; %d not used (empty, cut or equal)", len(pairs), position - len(pairs))
    if len(pairs) < wanted:
        message = "%d Finance-Instruct pairs instead of %d; raise --instruct_max_tokens if answers were cut"
        log.warning(message, len(pairs), wanted)
    return pairs


def mix_counts(available: dict[str, int], shares: dict[str, Fraction], policy: str) -> dict[str, int]:
    """How many pairs of each source to take. "fill": its share of as many pairs as Reddit has, or all it has, as the
    published runs; "exact": as many as keep the shares to one pair. Raises InputError when nothing is taken."""
    most = (available[source] / share for source, share in shares.items() if share)
    total = Fraction(available["reddit"]) if policy == "fill" else min(most)
    counts = {source: min(available[source], math.floor(share * total)) for source, share in shares.items()}
    if not any(counts.values()):
        asked = f"{format_counts(available)} pairs, asked {format_shares(shares)}"
        raise InputError(f"the mix is empty: {asked}; change the ratios")
    return counts


def format_shares(parts: dict[str, Any]) -> str:
    """As "81-19"."""
    return "-".join(f"{float(100 * part / sum(parts.values())):.0f}" for part in parts.values())


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {source}" for source, count in counts.items())


def mixed_pairs(
    data: TrainingData,
    shares: dict[str, Fraction],
    limits: dict[str, int],
    policy: str,
    make_finance_pairs: Callable[[list[dict], int], list[dict]],
) -> list[dict]:
    """The training pairs of a mix; logs which shares were asked for and which are reached. `limits` are upper bounds
    by source. Only as many finance pairs are made as the mix takes."""
    items = {source: data.items[source] for source in shares}
    available = {source: min(len(items[source]), limits.get(source, len(items[source]))) for source in shares}
    counts = mix_counts(available, shares, policy)
    if counts.get("finance"):
        items["finance"] = make_finance_pairs(items["finance"], counts["finance"])
        if len(items["finance"]) < counts["finance"]:
            available["finance"] = len(items["finance"])
            counts = mix_counts(available, shares, policy)
    log.info("mix (%s): asked %s, reached %s: %s of %s", policy, format_shares(shares), format_shares(counts),
             format_counts(counts), format_counts(available))  # fmt: skip
    return [pair for source in shares for pair in items[source][: counts[source]]]


@dataclasses.dataclass
class TrainingData:
    """What can be trained on, and what the evaluations ask instead. `items` by source, in an order that the seed
    gives: "reddit" and "general" are pairs, "finance" instructions {"prompt", "chosen", "uid", "user"} as yet.
    `questions` by evaluation ("reddit", "finance_instruct"). `counts` goes into the record."""

    items: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    questions: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


def load_data(
    settings: DataSettings,
    sources: set[str],
    asked: dict[str, list[str]],
    passages: dict[str, list[str]],
    own: re.Pattern[str],
) -> TrainingData:
    """Reads the data of `sources` ("reddit", "finance", "general") and of the evaluations that the flags ask for. What
    these ask is held out: their own questions, and LeakFinder's `asked` and `passages`; `own` finds chat template
    tokens, which no text may spell. Raises InputError when a source or an evaluation has nothing left."""
    data, forbidden, comments, instructions = TrainingData(), dict(asked), [], []
    how: dict[str, Any] = {"thinking": settings.thinking, "own": own}
    if settings.do_reddit or "reddit" in sources:
        read = functools.partial(reddit.read_comment, own=own)
        comments = read_usable(settings.reddit_dataset, "--reddit_dataset", read, reddit.COLUMNS)
    if settings.do_instruct or "finance" in sources:
        read = functools.partial(read_instruction, **how)
        needs = "user, assistant and optionally system"
        instructions = read_usable(settings.finance_dataset, "--finance_dataset", read, needs)
    if settings.do_instruct:
        data.questions["finance_instruct"], instructions = hold_out_instructions(instructions, settings.instruct_limit)
        forbidden["evaluation instruction"] = [each["instruction"] for each in data.questions["finance_instruct"]]
    if settings.do_reddit:
        data.questions["reddit"], comments = reddit.hold_out_posts(comments, settings.reddit_limit, settings.reddit)
        forbidden["evaluation post"] = [reddit.leak_snippet(post["turns"][0]) for post in data.questions["reddit"]]
    finder = LeakFinder(forbidden, passages)
    found = {
        "reddit": reddit.reddit_pairs(comments, settings.reddit) if "reddit" in sources else [],
        "finance": instructions,
    }
    if "general" in sources:
        found["general"] = read_pairs(settings.general_dataset, "--general_dataset", **how)
    for source in [source for source in found if source in sources]:
        items = without_leaks(found[source], finder, source, data.counts)
        if source == "finance":  # each once; which of several answers stays does not depend on their order
            by_uid = sorted(items, key=lambda item: item["uid"])
            items = list({normalise_text(item["user"]): item for item in by_uid}.values())
        share = Fraction(str(settings.reddit_sample_rate)) if source == "reddit" else 1
        data.items[source] = sample(items, math.floor(share * len(items)), settings.seed)
        log.info("%s: %d items, sampled to %d", source, len(items), len(data.items[source]))
    finance = f"--finance_dataset {settings.finance_dataset}"
    flags = {
        "reddit": f"--reddit_dataset {settings.reddit_dataset}, --reddit_sample_rate {settings.reddit_sample_rate}",
        "finance": finance,
        "finance_instruct": f"{finance}, --instruct_limit {settings.instruct_limit}",
        "general": f"--general_dataset {settings.general_dataset}",
    }
    for what, kinds in (("train on", data.items), ("ask about", data.questions)):
        for name in [name for name, items in kinds.items() if not items]:
            raise InputError(f"{flags[name]}: nothing is left to {what}; name a larger set or give a larger number")
    return data


def data_fingerprint(data: TrainingData, pairs: list[dict]) -> dict:
    """What the record says of the training pairs."""
    sources = Counter(pair["uid"].partition(":")[0] for pair in pairs)
    texts = [[pair[key] for key in ("prompt", "chosen", "rejected")] for pair in pairs]
    return {"rows": {**sources, **data.counts}, "sha256": digest(texts)}
