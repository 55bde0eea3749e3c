"""Reddit and Finance-Instruct pairs, and their mixes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from llm_alignment.encoder import NO_TOKENS, split_thought, text_problem
from llm_alignment.evaluation import Evaluation, read_items
from llm_alignment.files import InputError, digest, sample
from llm_alignment.generation import MAX_BATCH_SIZE, Decoding, generate
from llm_alignment.hub import read_usable
from llm_alignment.leaks import LeakFinder, without_leaks
from llm_alignment.messages import check_texts, refuse_needed
from llm_alignment.models import base_fingerprint, load_model
from llm_alignment.preferences import merge_system_prompt, read_pairs
from llm_alignment.prompts import strip_thinking
from llm_alignment.reddit import RedditSettings, hold_out_posts, leak_snippet, read_comments, reddit_pairs
from llm_alignment.results import baseline_cache
from llm_alignment.texts import normalise_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_alignment.training import Setup

log = logging.getLogger("llm_alignment")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The flags of the data, by name: where it is, which of it is trained on and which is asked."""

    reddit: RedditSettings
    reddit_dataset: str
    reddit_sample_rate: float
    finance_dataset: str
    general_dataset: str
    do_reddit: bool
    reddit_limit: int
    do_instruct: bool
    instruct_limit: int
    thinking: bool
    seed: int


def read_instructions(
    source: str, *, thinking: bool = False, own: re.Pattern[str] = NO_TOKENS
) -> list[dict[str, str]]:
    """The usable rows of --finance_dataset, as `read_instruction` gives them."""
    read = functools.partial(read_instruction, thinking=thinking, own=own)
    return read_usable(source, "--finance_dataset", read, "user, assistant and optionally system")


def read_instruction(row: dict, *, thinking: bool = False, own: re.Pattern[str] = NO_TOKENS) -> dict[str, str]:
    """{"prompt": the user's text after the system text, "chosen": the reference answer, "uid", "user": the user's text
    alone}. Raises ValueError with the reason when the row cannot be used."""
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

    Instructions of less than four words are not chosen: too many texts would contain them.
    """
    by_text: dict[str, dict] = {}
    for instruction in sorted(instructions, key=lambda instruction: instruction["uid"]):
        text = normalise_text(instruction["user"])
        if text.count(" ") >= 3:
            by_text.setdefault(text, instruction)
    chosen = [by_text[text] for text in sorted(by_text, key=lambda text: digest("evaluation", text))[:limit]]
    questions = [
        {"question_id": each["uid"], "category": "finance", "turns": [each["prompt"]], "instruction": each["user"],
         "reference": each["chosen"]}
        for each in chosen
    ]  # fmt: skip
    taken = {instruction["uid"] for instruction in chosen}
    return questions, [instruction for instruction in instructions if instruction["uid"] not in taken]


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """How the base answers Finance-Instruct: the flags of that name."""

    instruct_max_tokens: int
    finance_temperature: float
    seed: int
    thinking: bool
    eval_batch_size: int
    no_baseline_cache: bool
    dry_run: bool


def finance_pairs(
    setup: Setup, instructions: list[dict], wanted: int, answers: AnswerSettings
) -> list[dict[str, str]]:
    """Pairs of the first `wanted` instructions, or as many as there are, whose answer by the base can be rejected.

    The reference answer is chosen, the base's own answer rejected. An answer that is empty, that the token limit cut,
    or that equals the reference is not used; at most 2 * `wanted` instructions are answered. Answers are stored as
    they come in finance_answers.jsonl, so that a restart continues; greedy ones are put into the baseline
    cache, where later runs on this base find them. A dry run uses the reference instead. All processes call this.
    """
    if answers.dry_run:
        log.info("dry run: reference answers stand for the base's own answers, which a run generates first")
        return [{**instruction, "rejected": instruction["chosen"]} for instruction in instructions[:wanted]]
    decoding = Decoding(
        max_new_tokens=answers.instruct_max_tokens, temperature=answers.finance_temperature, seed=answers.seed,
        thinking=answers.thinking, batch_size=answers.eval_batch_size,
    )  # fmt: skip
    get_model = functools.cache(functools.partial(load_model, setup.base))
    fingerprint = {**base_fingerprint(setup.base, thinking=decoding.thinking), "adapter": "none"}
    settings = {"answers": "one user turn", "generation": decoding.settings("max_new_tokens", "temperature", "seed")}
    is_greedy = decoding.temperature == 0
    cache = baseline_cache({**fingerprint, **settings}) if is_greedy and not answers.no_baseline_cache else None
    position = 0
    pairs: list[dict[str, str]] = []
    while len(pairs) < wanted and position < min(2 * wanted, len(instructions)):
        # Samples depend on the batch. So a batch of samples is small, and a restart generates it again as a whole.
        size = wanted - len(pairs) if is_greedy else SAMPLED_AT_ONCE
        batch = instructions[position : min(position + size, 2 * wanted)]
        position += len(batch)
        evaluation = Evaluation(
            name="finance_answers",
            items=[{"question_id": instruction["uid"], "prompt": instruction["prompt"]} for instruction in batch],
            read=functools.partial(answer_instructions, decoding=decoding),
            settings=settings,
            order=lambda item: len(item["prompt"]),
            rows_at_once=lambda model: decoding.batch_size or MAX_BATCH_SIZE[model.device.type],
        )
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


SAMPLED_AT_ONCE = 32


def answer_instructions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict], *, decoding: Decoding
) -> list[dict]:
    """The rows {"question_id", "prompt", "answer", "answer_tokens", "finished"}."""
    conversations = [[{"role": "user", "content": item["prompt"]}] for item in items]
    answers = sorted(generate(model, tokenizer, conversations, decoding), key=lambda answer: answer.index)
    return [
        {**item, "answer": strip_thinking(a.text), "answer_tokens": a.tokens, "finished": a.finished}
        for item, a in zip(items, answers, strict=True)
    ]


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
    """As "81-19"."""
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


def load_data(
    settings: DataSettings, sources: set[str], asked: dict[str, list[str]], passages: dict[str, list[str]],
    own: re.Pattern[str],
) -> TrainingData:  # fmt: skip
    """Reads the data of `sources` ("reddit", "finance", "general") and of the evaluations that the flags ask for.

    What the evaluations ask is held out and not trained on: their own questions, and `asked` and `passages`, which are
    LeakFinder's; `own` finds the chat template's tokens, which no text may spell. Raises InputError when a
    source or an evaluation has nothing left.
    """
    data, forbidden = TrainingData(), dict(asked)
    thinking, comments, instructions = settings.thinking, [], []
    if settings.do_reddit or "reddit" in sources:
        comments = read_comments(settings.reddit_dataset, own)
    if settings.do_instruct or "finance" in sources:
        instructions = read_instructions(settings.finance_dataset, thinking=thinking, own=own)
    if settings.do_instruct:
        questions, instructions = hold_out_instructions(instructions, settings.instruct_limit)
        data.questions["finance_instruct"] = questions
        forbidden["evaluation instruction"] = [question["instruction"] for question in questions]
    if settings.do_reddit:
        posts, comments = hold_out_posts(comments, settings.reddit_limit, settings.reddit)
        data.questions["reddit"] = posts
        forbidden["evaluation post"] = [leak_snippet(post["turns"][0]) for post in posts]
    finder = LeakFinder(forbidden, passages)
    found: dict[str, list[dict]] = {}
    if "reddit" in sources:
        found["reddit"] = reddit_pairs(comments, settings.reddit)
    if "finance" in sources:
        found["finance"] = instructions
    if "general" in sources:
        found["general"] = read_pairs(settings.general_dataset, "--general_dataset", thinking=thinking, own=own)
    for source, items in found.items():
        items = without_leaks(items, finder, source, data.counts)
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
