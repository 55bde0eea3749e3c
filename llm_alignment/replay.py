"""Replay: dialogues of before among the training rows, which the base wrote itself or the user gives.

Sources: arXiv 2602.20162 and 2605.26097; that a chat model writes its own questions after the opening of a user's
turn: Magpie, arXiv 2406.08464.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.conversations import prompt_form, read_conversation
from llm_alignment.evaluation import Evaluation, read_items
from llm_alignment.files import InputError, SkippedRows, log
from llm_alignment.health import ends_in_a_loop
from llm_alignment.hub import open_dataset
from llm_alignment.leaks import LeakFinder, normalise_text
from llm_alignment.results import baseline_cache
from llm_alignment.scores import answer_questions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_alignment.encoder import ChatEncoder

MOST = 1000  # different dialogues that the base writes; more rows repeat them
TRIES = 8  # for each dialogue that is asked for: a chat model ends about one of three well
TOKENS = 512  # of a question, and of an answer
AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class ReplaySettings:
    """The flags of these names."""

    replay_ratio: float  # share of the training rows
    replay: str  # "self", or a file of rows
    seed: int
    eval_batch_size: int
    no_baseline_cache: bool

    def wanted(self, rows: int) -> int:
        """How many replay rows stand beside `rows` others."""
        return math.ceil(self.replay_ratio / (1 - self.replay_ratio) * rows - 1e-9)


def given_dialogues(
    file: str, encoder: ChatEncoder, finder: LeakFinder, held_out: Iterable[list[dict]]
) -> list[list[dict]]:
    """The conversations of --replay FILE, rows as in --dataset, but those on a prompt of the `held_out` ones. Raises
    InputError when none can be used."""

    def form(turns: list[tuple[str, str]]) -> str:
        return prompt_form([turn for turn in turns if turn[0] != "system"])

    skipped, found = SkippedRows(), []
    prompts = {form([(turn["role"], turn["content"]) for turn in messages]) for messages in held_out}
    for place, row in open_dataset(file, "--replay", skipped):
        try:
            turns = read_conversation(row)[1]
            is_held_out = "held out for validation" * (form(turns) in prompts)
            if reason := encoder.refusal(turns) or finder.find(*(text for _, text in turns)) or is_held_out:
                raise ValueError(reason)
        except ValueError as error:
            skipped.add(place, str(error))
        else:
            found.append([{"role": role, "content": text} for role, text in turns])
    if not found:
        why = "; ".join(skipped.places) or "it is empty"
        raise InputError(f"--replay {file}: no usable row ({why}); name another")
    skipped.report("rows of --replay")
    return found


def own_dialogues(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    finder: LeakFinder,
    wanted: int,
    folder: Path,
    *,
    fingerprint: dict,
    settings: ReplaySettings,
) -> list[list[dict]]:
    """`wanted` conversations of one question and answer, or as many as it finds, that the base `model` writes. It
    continues the template's opening of a user's turn (temperature 1, top_p 0.9) and answers greedily. What does not
    end within 512 tokens, loops, repeats another question or holds an evaluation's is dropped. Every try is kept in
    `folder`/replay.jsonl and in the cache by base and seed: a restart continues, another run tries nothing again."""
    what, path = {"replay": {"seed": settings.seed, "tokens": TOKENS}}, folder / "replay.jsonl"
    cache = None if settings.no_baseline_cache else baseline_cache({**fingerprint, **what})
    read = functools.partial(write_dialogues, settings=settings)
    tries = Evaluation(name="replay", items=[], read=read, settings=what, rows_at_once=lambda model: AT_ONCE)
    kept, tried = dict[str, list[dict]](), 0
    while len(kept) < wanted and tried < TRIES * wanted:
        items = [{"question_id": number} for number in range(tried, tried + AT_ONCE)]
        evaluation, tried = dataclasses.replace(tries, items=items), tried + AT_ONCE
        rows = read_items(evaluation, lambda: model, encoder.tokenizer, path, fingerprint=fingerprint, cache=cache)
        for row in rows:
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            is_whole = row["finished"] and all(text.strip() for _, text in turns) and not ends_in_a_loop(row["answer"])
            if is_whole and not (encoder.refusal(turns) or finder.find(row["question"], row["answer"])):
                kept.setdefault(normalise_text(row["question"]), [{"role": r, "content": text} for r, text in turns])
    if not kept:
        why = "they do not end, loop or hold an evaluation's question"
        none = f"none of {tried} dialogues that the base wrote can be used ({why})"
        raise InputError(f"--replay self: {none}; give rows by --replay FILE")
    log.info("replay: %d of %d dialogues that the base wrote can be used", len(kept), tried)
    return list(kept.values())[:wanted]


def write_dialogues(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict], *, settings: ReplaySettings
) -> Iterator[dict]:
    """Yields {"question_id", "question", "answer", "finished"} of each try; an unfinished question has no answer."""
    import torch

    from llm_alignment.generation import Decoding, batched_answers, generation_config, read_answer

    opening = tokenizer.apply_chat_template([{"role": "user", "content": "QUESTION"}], tokenize=False)
    prompt = tokenizer(opening.partition("QUESTION")[0], add_special_tokens=False)["input_ids"]
    sampling = generation_config(tokenizer, Decoding(TOKENS, temperature=1.0, top_p=0.9))
    torch.manual_seed(settings.seed ^ zlib.crc32(str(items[0]["question_id"]).encode()))
    questions = {}
    for place, tokens in batched_answers(model, [prompt] * len(items), sampling, TOKENS):
        text, _, finished = read_answer(tokens, sampling, tokenizer, prompt)
        questions[place] = text if finished else ""
    asked = [{"place": place, "turns": [text]} for place, text in sorted(questions.items()) if text]
    decoding = Decoding(TOKENS, batch_size=settings.eval_batch_size)
    rows = answer_questions(model, tokenizer, asked, decoding=decoding) if asked else []
    answers = {row["place"]: {"answer": row["answers"][0], "finished": row["finished"][0]} for row in rows}
    for place, item in enumerate(items):
        yield {**item, "question": questions[place], **answers.get(place, {"answer": "", "finished": False})}


def replay_rows(
    rows: datasets.Dataset,
    settings: ReplaySettings,
    given: list[list[dict]],
    write: Callable[[int], list[list[dict]]],
) -> datasets.Dataset:
    """The training rows ("messages", "length") with their replay rows, and a column "replay" that tells them apart.
    Dialogues are taken in turn: the `given` ones of a file, or those that `write(wanted)` gives of --replay self."""
    import datasets

    wanted = settings.wanted(len(rows))
    dialogues = given or write(min(wanted, MOST))
    taken = [dialogues[number % len(dialogues)] for number in range(wanted)]
    lengths = [sum(len(message["content"]) for message in messages) for messages in taken]
    added = datasets.Dataset.from_dict({"messages": taken, "length": lengths}, features=rows.features)
    log.info("replay: %d of %d training rows, %d of them different; one of them:\n%s",
             wanted, wanted + len(rows), min(wanted, len(dialogues)), taken[0])  # fmt: skip
    return datasets.concatenate_datasets([rows, added]).add_column("replay", [False] * len(rows) + [True] * wanted)
