"""The SFT data: which rows are used, on which side of the validation split, and the tokens that are trained on."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from llm_alignment.batches import token_counts
from llm_alignment.files import InputError, SkippedRows
from llm_alignment.hub import open_dataset
from llm_alignment.messages import content_text, without_thought
from llm_alignment.prompts import strip_thinking

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("llm_alignment")

Turns = list[tuple[str, str]]  # (role, content)
SIDES = ("train", "validation")


# ---------------------------------------------------------------------------------------------------------------------
# One row


def turns_of(row: dict) -> Turns:
    """The turns of a row of {messages: [{role, content}], subset}.

    Raises ValueError with the reason when it cannot be trained on.
    """
    messages, turns = row.get("messages"), []
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("a message is no object")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {role!r}")
        text = content_text(content)
        if text is None and content:
            raise ValueError(f"the content of the {role} turn is {type(content).__name__}, not text or text parts")
        if not text or not text.strip():
            raise ValueError(f"empty {role} turn")
        turns.append((role, text))
    if turns[-1][0] != "assistant":
        raise ValueError("no answer at the end")
    return turns


def subset_of(row: dict) -> str:
    """The row's subset; absent or null counts as general. Raises ValueError when it is not text."""
    subset = "general" if row.get("subset") is None else row["subset"]
    if not isinstance(subset, str):
        raise ValueError("the subset is no text")
    return subset


def prompt_of(turns: Turns) -> Turns:
    """The turns up to the first answer to a user; all turns when no user is answered."""
    asked = False
    for number, (role, _) in enumerate(turns):
        if role == "assistant" and asked:
            return turns[:number]
        asked = asked or role == "user"
    return turns


to_json = json.JSONEncoder(ensure_ascii=False).encode  # made once: it is asked twice a row


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone: the same rows are drawn whatever their order."""
    digest = hashlib.blake2b(to_json(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


# ---------------------------------------------------------------------------------------------------------------------
# Which rows


@dataclass(frozen=True)
class RowChoice:
    """Which rows of a data set are used; the fields are the flags of these names."""

    dataset: str  # hub id, file or folder
    subset: str = "general"
    sample_ratio: float = 1.0
    sample_seed: int = 42
    mix_reasoning_ratio: float | None = None
    val_split: float = 0.01


@dataclass(frozen=True)
class Selection:
    """The rows that are used, by their number among the usable rows in the order of reading, from 0."""

    numbers: dict[tuple[str, str], np.ndarray]  # (subset, "train" | "validation") -> numbers
    sha256: str  # of the rows' hashes, sorted: the fingerprint of the data

    @property
    def counts(self) -> Counter:
        """(subset, side) -> rows."""
        return Counter({key: len(numbers) for key, numbers in self.numbers.items() if len(numbers)})

    def rows(self, side: str) -> int:
        return sum(count for (_, its_side), count in self.counts.items() if its_side == side)

    def of(self, side: str) -> np.ndarray:
        """The numbers of a side's rows, in the order of reading."""
        import numpy as np

        return np.sort(np.concatenate([numbers for key, numbers in self.numbers.items() if key[1] == side]))


@dataclass(frozen=True)
class RowHashes:
    """What the rows of one subset are chosen by; as Python objects these would take 8 times the memory."""

    rows: array
    prompts: array
    numbers: array  # of the rows, as in Selection

    @classmethod
    def none(cls) -> RowHashes:
        return cls(array("d"), array("d"), array("q"))


def select_rows(found: dict[str, RowHashes], choice: RowChoice) -> Selection:
    """The sample, the reasoning mix and the validation split of the rows found of each subset.

    A row is drawn when its hash is among the lowest of its subset, and validates when its prompt's hash is among the
    lowest. So a sample of 0.10 is a part of the sample of 0.25, the order of the file does not matter, and a prompt is
    on one side with all of its answers. Raises InputError when fewer than two prompts are left.
    """
    import numpy as np

    take = rows_to_take(choice, {subset: len(hashes.rows) for subset, hashes in found.items()})
    drawn = {}
    for subset, hashes in found.items():
        columns = [np.asarray(column) for column in (hashes.rows, hashes.prompts, hashes.numbers)]
        order = np.lexsort(columns[::-1])[: take[subset]]  # by hash, then by the prompt's, then by number
        drawn[subset] = [column[order] for column in columns]
    prompts = np.unique(np.concatenate([prompts for _, prompts, _ in drawn.values()])).tolist()
    if len(prompts) < 2:
        mix = "" if choice.mix_reasoning_ratio is None else f" --mix_reasoning_ratio {choice.mix_reasoning_ratio}"
        raise InputError(
            f"--sample_ratio {choice.sample_ratio}{mix}: {len(prompts)} prompts left; at least 2 are needed"
        )
    last_held_out = prompts[min(max(1, round(choice.val_split * len(prompts))), len(prompts) - 1) - 1]
    numbers: dict[tuple[str, str], np.ndarray] = {}
    for subset, (_, prompt_hashes, rows) in drawn.items():
        held_out = prompt_hashes <= last_held_out
        numbers |= {(subset, "train"): rows[~held_out], (subset, "validation"): rows[held_out]}
    return Selection(numbers, data_sha256({subset: columns[:2] for subset, columns in drawn.items()}))


def data_sha256(hashes: dict[str, list[np.ndarray]]) -> str:
    """SHA-256 of {subset: [[the row's hash, its prompt's hash], ...]} as JSON, made piece by piece."""
    digest = hashlib.sha256(b"{")
    for place, (subset, (rows, prompts)) in enumerate(sorted(hashes.items())):
        digest.update(f"{', ' if place else ''}{json.dumps(subset)}: [".encode())
        for number, pair in enumerate(zip(rows, prompts, strict=True)):
            digest.update(f"{', ' if number else ''}[{float(pair[0])!r}, {float(pair[1])!r}]".encode())
        digest.update(b"]")
    digest.update(b"}")
    return digest.hexdigest()


def rows_to_take(choice: RowChoice, found: dict[str, int]) -> dict[str, int]:
    """How many rows of each subset --sample_ratio and --mix_reasoning_ratio ask for; says the share reached."""
    take = {subset: round(choice.sample_ratio * count) for subset, count in found.items()}
    if choice.mix_reasoning_ratio is not None:
        total = round(choice.sample_ratio * sum(found.values()))
        asked = {"reasoning": round(choice.mix_reasoning_ratio * total)}
        take["reasoning"] = min(asked["reasoning"], found["reasoning"])
        asked["general"] = total - take["reasoning"]
        take["general"] = min(asked["general"], found["general"])
        if take["reasoning"] < asked["reasoning"]:
            log.warning("too few reasoning rows (%d): general rows fill the rest", found["reasoning"])
        if take["general"] < asked["general"]:
            log.warning("too few general rows (%d): fewer reasoning rows are used too", found["general"])
            take["reasoning"] = round(take["general"] * choice.mix_reasoning_ratio / (1 - choice.mix_reasoning_ratio))
        reached = take["reasoning"] / max(1, sum(take.values()))
        log.info("reasoning rows: asked for %.1f %%, reached %.1f %%", 100 * choice.mix_reasoning_ratio, 100 * reached)
    return take


# ---------------------------------------------------------------------------------------------------------------------
# The text that is trained on


class ChatEncoder:
    """Turns the messages of a row into tokens and labels by the tokenizer's own chat template.

    Without `thinking` every answer begins as it does in evaluation, where the template's generation prompt ends with
    an empty <think></think> block, and thoughts in the data are left out. With `thinking` the generation prompt has no
    block, the template's own empty ones are left out, and thoughts in the data stay. With `assistant_only` the labels
    are the answers and their end of turn alone: what the generation prompt supplies is no target.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool, assistant_only: bool) -> None:
        self.tokenizer, self.thinking, self.assistant_only = tokenizer, thinking, assistant_only
        self.refusals: dict[tuple[str, ...], str | None] = {}
        question, answer = ("user", "QUESTION"), ("assistant", "ANSWER")
        try:
            asked = self.render([question])
            prompts = [
                self.render([question], add_generation_prompt=True, enable_thinking=flag) for flag in (thinking, False)
            ]
            twice = self.render([question, answer, question, answer])
        except jinja2.TemplateError as error:
            raise InputError(
                f"--model {tokenizer.name_or_path}: its chat template fails on a conversation of two turns ({error}); "
                "name a chat model"
            ) from error
        opening, without_thinking = (text.removeprefix(commonprefix([asked, text])) for text in prompts)
        self.header = opening.partition("<think>")[0]  # what begins every assistant turn
        self.supplied = opening.removeprefix(self.header)  # what the generation prompt adds to it
        self.has_block = "</think>" in without_thinking
        self.end = commonprefix(twice.split("ANSWER")[1:]).strip()  # what follows the first answer and the last
        if assistant_only and not (self.header and self.end and twice.count(self.header) == 2 and tokenizer.is_fast):
            raise InputError(
                f"--assistant_only_loss: the chat template of {tokenizer.name_or_path} does not mark where the "
                "assistant's turns begin and end; leave the flag out"
            )

    def render(self, turns: Turns, **options: Any) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, **{"enable_thinking": self.thinking, **options}
        )

    def refusal(self, turns: Turns) -> str | None:
        """Why a conversation cannot be rendered; the template is asked once for each order of roles."""
        roles = tuple(role for role, _ in turns)
        if roles not in self.refusals:
            try:
                self.render([(role, "text") for role in roles])
                self.refusals[roles] = None
            except jinja2.TemplateError as error:
                self.refusals[roles] = f"the chat template refuses it: {error}"
        if self.refusals[roles]:
            return self.refusals[roles]
        if (self.has_block or self.assistant_only) and any(self.header in content for _, content in turns):
            return f"a turn contains the chat template's own {self.header.strip()!r}"
        if self.has_block and not self.thinking:
            for role, content in turns:
                if role == "assistant" and "<think>" in content and not strip_thinking(content).strip():
                    return "an answer has no text outside its <think> block"
        return None

    def text(self, turns: Turns) -> str:
        """The whole conversation as it is trained on."""
        text = self.render(turns)
        if not self.has_block:
            return text
        start, *answers = text.split(self.header)
        if not self.thinking:
            answers = [self.supplied + without_thought(part) for part in answers]
        elif not self.supplied:
            answers = [re.sub(r"\A<think>\s*</think>\s*", "", part) for part in answers]
        return self.header.join([start, *answers])

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Where the answers stand in a text, each with its end of turn and without what the prompt supplies."""
        spans, start = [], 0
        while (start := text.find(self.header, start)) >= 0:
            start += len(self.header)
            start += len(self.supplied) if text.startswith(self.supplied, start) else 0
            end = text.index(self.end, start) + len(self.end)
            spans.append((start, end))
        return spans

    def __call__(self, row: dict) -> dict[str, list[int]]:
        """{"input_ids", "labels"} of a row; -100 is no target."""
        text = self.text(turns_of(row))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.assistant_only)
        ids = encoded["input_ids"]
        if not self.assistant_only:
            return {"input_ids": ids, "labels": ids}
        labels, spans = [-100] * len(ids), self.answer_spans(text)
        for place, (first, last) in enumerate(encoded["offset_mapping"]):
            if any(start <= first < last <= end for start, end in spans):
                labels[place] = ids[place]
        return {"input_ids": ids, "labels": labels}

    def marked(self, row: dict, max_length: int) -> str:
        """A row as the model reads it, cut to `max_length` tokens; what is trained on stands in [[ ]]."""
        encoded = self(row)
        tokens = list(zip(encoded["input_ids"], encoded["labels"], strict=True))[:max_length]
        shown = ""
        for trained, part in itertools.groupby(tokens, key=lambda token: token[1] != -100):
            text = self.tokenizer.decode([token for token, _ in part])
            shown += f"[[{text}]]" if trained else text
        return shown


# ---------------------------------------------------------------------------------------------------------------------
# Loading

ROWS_AT_ONCE = 1000  # as Python objects rows take several times the memory
LARGE_DATA = 20_000  # rows from which several processes tokenise: each takes 10 s to start


def load_data(
    choice: RowChoice, encoder: ChatEncoder | None = None
) -> tuple[Selection, Callable[[str], datasets.Dataset]]:
    """Reads the data set once and chooses; `rows("train")` and `rows("validation")` are then the rows of a side.

    They have the columns "messages" and "length", in characters, and lie in files that are removed when the process
    ends. Rows that `encoder` refuses are skipped, counted and named. Raises InputError when no row of the subset can
    be used.
    """
    import datasets
    from datasets.fingerprint import get_temporary_cache_files_directory

    if choice.mix_reasoning_ratio is not None and choice.subset != "both":
        raise InputError(f"--mix_reasoning_ratio mixes two subsets and --subset is {choice.subset}; add --subset both")
    folder = Path(tempfile.mkdtemp(dir=get_temporary_cache_files_directory()))
    every = folder / "rows.arrow"
    selection = select_rows(store_rows(choice, encoder, every), choice)
    for side in SIDES:
        copy_rows(every, selection.of(side), folder / f"{side}.arrow")
    every.unlink()
    return selection, lambda side: datasets.Dataset.from_file(str(folder / f"{side}.arrow"))


def store_rows(choice: RowChoice, encoder: ChatEncoder | None, path: Path) -> dict[str, RowHashes]:
    """Reads every row, writes the usable ones of the wanted subsets to an Arrow file, and returns their hashes."""
    import pyarrow

    wanted = {"general", "reasoning"} if choice.subset == "both" else {choice.subset}
    found = {subset: RowHashes.none() for subset in sorted(wanted)}
    others: Counter = Counter()
    skipped, waiting, count = SkippedRows(), [], 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema()) as stream:
        for place, row in open_dataset(choice.dataset, "--dataset", skipped):
            try:
                turns, subset = turns_of(row), subset_of(row)
                if subset not in wanted:
                    others[subset] += 1
                    continue
                if encoder and (refusal := encoder.refusal(turns)):
                    raise ValueError(refusal)
            except ValueError as error:
                skipped.add(place, str(error))
                continue
            hashes = found[subset]
            hashes.rows.append(unit_hash(choice.sample_seed, turns))
            hashes.prompts.append(unit_hash(choice.sample_seed, "prompt", prompt_of(turns)))
            hashes.numbers.append(count)
            count += 1
            waiting.append(turns)
            if len(waiting) == ROWS_AT_ONCE:
                stream.write_batch(record_batch(waiting))
                waiting.clear()
        stream.write_batch(record_batch(waiting))
    skipped.report("rows")
    if others:
        log.info("rows of other subsets, not used: %s", ", ".join(f"{n} {subset}" for subset, n in others.items()))
    if not count:
        seen = f"; it has {dict(others)}" if others else ""
        places = f" ({'; '.join(skipped.places)})" if skipped.places else ""
        raise InputError(
            f"--dataset {choice.dataset}: no usable row of subset {choice.subset}{seen}{places}; choose others"
        )
    return found


def schema() -> pyarrow.Schema:
    """Of the rows on the disk."""
    import pyarrow

    message = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.large_string()})
    return pyarrow.schema({"messages": pyarrow.list_(message), "length": pyarrow.int64()})


def record_batch(conversations: list[Turns]) -> pyarrow.RecordBatch:
    """Conversations as they lie on the disk, with their lengths in characters."""
    import pyarrow

    turns = [turn for conversation in conversations for turn in conversation]
    message = schema().field("messages").type.value_type
    messages = pyarrow.StructArray.from_arrays(
        [pyarrow.array([turn[place] for turn in turns], message.field(place).type) for place in range(2)],
        fields=list(message),
    )
    ends = list(itertools.accumulate(map(len, conversations), initial=0))
    lengths = [sum(len(content) for _, content in conversation) for conversation in conversations]
    return pyarrow.record_batch(
        [pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), messages), pyarrow.array(lengths)],
        schema=schema(),
    )


def copy_rows(source: Path, numbers: np.ndarray, target: Path) -> None:
    """Copies the rows of these numbers, sorted, to a file of their own, so that no other stays in memory or on the
    disk."""
    import pyarrow

    with pyarrow.OSFile(str(source)) as file, pyarrow.OSFile(str(target), "wb") as copy:
        batches, start = pyarrow.ipc.open_stream(file), 0
        with pyarrow.ipc.new_stream(copy, batches.schema) as stream:
            for batch in batches:
                first, last = numbers.searchsorted([start, start + len(batch)])
                stream.write_batch(batch.take(pyarrow.array(numbers[first:last] - start)))
                start += len(batch)


def tokenise(
    rows: datasets.Dataset, encoder: ChatEncoder, num_proc: int, *, longest: int | None = None, lazily: bool = False
) -> datasets.Dataset:
    """`rows` as "input_ids" and "labels", cut to `longest` tokens; large data in `num_proc` processes.

    `lazily`: they are tokenised whenever they are read, and no tokens are kept.
    """
    import datasets

    def encode(batch: dict[str, list]) -> dict[str, list[list[int]]]:
        encoded = [encoder({"messages": messages}) for messages in batch["messages"]]
        return {name: [row[name][:longest] for row in encoded] for name in ("input_ids", "labels")}

    if lazily:
        return rows.with_transform(encode)
    tokens = datasets.List(datasets.Value("int32"))
    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features({"input_ids": tokens, "labels": tokens}),
        num_proc=num_proc if len(rows) > LARGE_DATA else None,
        desc="tokenising",
    )


def with_answers(rows: datasets.Dataset, side: str, longest: int) -> datasets.Dataset:
    """The tokenised rows with a target within `longest` tokens; the log says how many have none.

    Raises InputError when all have none. A row's first token is never a target.
    """
    kept = rows.filter(lambda row: any(label != -100 for label in row["labels"][1:longest]))
    if not len(kept):
        raise InputError(f"no {side} row has an answer within --max_seq_length {longest}; raise it")
    if left_out := len(rows) - len(kept):
        log.warning("%d of %d %s rows have no answer within --max_seq_length: left out", left_out, len(rows), side)
    return kept


def row_lengths(rows: datasets.Dataset) -> list[int]:
    """What rows are sorted by within a step: their tokens, or their characters where no tokens are kept."""
    if "input_ids" in rows.column_names:
        return token_counts(rows, "input_ids")
    return rows.with_format("arrow")["length"][:].to_pylist()
