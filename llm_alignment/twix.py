"""The SFT data: which rows are used, on which side of the validation split, and the tokens that are trained on."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from llm_alignment.batches import sorted_within_steps
from llm_alignment.files import InputError, SkippedRows
from llm_alignment.generation import strip_thinking
from llm_alignment.hub import Rows, hub_dataset, hub_rows, open_dataset
from llm_alignment.messages import content_text, without_thought
from llm_alignment.models import all_processes

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("llm_alignment")

Turns = list[tuple[str, str]]  # (role, content)


# ---------------------------------------------------------------------------------------------------------------------
# One row


def turns_of(row: dict) -> Turns:
    """The turns of a row in which `row_problem` finds nothing."""
    return [(message["role"], content_text(message["content"]) or "") for message in row["messages"]]


def row_problem(row: dict) -> str | None:
    """Why a row of {messages: [{role, content}], subset} cannot be trained on; None when it can."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        if not isinstance(message, dict):
            return "a message is no object"
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            return f"unknown role {role!r}"
        text = content_text(message.get("content"))
        if text is None and message.get("content"):
            return f"the content of the {role} turn is {type(message['content']).__name__}, not text or text parts"
        if not text or not text.strip():
            return f"empty {role} turn"
    if messages[-1]["role"] != "assistant":
        return "no answer at the end"
    if not isinstance(subset_of(row), str):
        return "the subset is no text"
    return None


def subset_of(row: dict) -> Any:
    """The row's subset; absent or null counts as general."""
    return "general" if row.get("subset") is None else row["subset"]


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


@dataclass
class Selection:
    """The rows that are used, by their number in the order of reading, from 0; rows that cannot be read count too."""

    used: dict[int, tuple[str, str]]  # row number -> (subset, "train" | "validation")
    sha256: str  # of the rows' hashes, sorted: the fingerprint of the data

    @property
    def counts(self) -> Counter:
        """(subset, side) -> rows."""
        return Counter(self.used.values())

    def rows(self, side: str) -> int:
        return sum(count for (_, its_side), count in self.counts.items() if its_side == side)


def select_rows(
    rows: Rows,
    args: argparse.Namespace,
    refusal: Callable[[Turns], str | None] = lambda turns: None,
) -> Selection:
    """Reads every row once and decides the sample, the reasoning mix and the validation split.

    A row is drawn when its hash is among the lowest of its subset, and validates when its prompt's hash is among the
    lowest. So a sample of 0.10 is a part of the sample of 0.25, the order of the file does not matter, and a prompt is
    on one side with all of its answers. `refusal(turns)` says why the chat template cannot render a row.

    Raises InputError when the data holds no usable row, none of the subset, or none to train on after the split.
    """
    import numpy as np

    if args.mix_reasoning_ratio is not None and args.subset != "both":
        raise InputError(f"--mix_reasoning_ratio mixes two subsets and --subset is {args.subset}; add --subset both")
    wanted = {"general", "reasoning"} if args.subset == "both" else {args.subset}
    # by subset: the rows' hashes, their prompts' hashes, their numbers; as Python objects they take 8 times the memory
    found = {subset: (array("d"), array("d"), array("q")) for subset in sorted(wanted)}
    others: Counter = Counter()
    skipped, refused = SkippedRows(), 0
    for read, (place, row) in enumerate(rows(skipped)):
        number = read + skipped.count - refused  # the rows that cannot be read count too
        problem = row_problem(row)
        if problem is None and subset_of(row) not in wanted:
            others[subset_of(row)] += 1
            continue
        turns = [] if problem else turns_of(row)
        problem = problem or refusal(turns)
        if problem:
            skipped.add(place, problem)
            refused += 1
        else:
            prompt = unit_hash(args.sample_seed, "prompt", prompt_of(turns))
            columns = found[subset_of(row)]
            columns[0].append(unit_hash(args.sample_seed, turns))
            columns[1].append(prompt)
            columns[2].append(number)
    skipped.report("rows")
    if others:
        log.info("rows of other subsets, not used: %s", ", ".join(f"{n} {subset}" for subset, n in others.items()))
    if not any(numbers for _, _, numbers in found.values()):
        seen = f"; it has {dict(others)}" if others else ""
        places = f" ({'; '.join(skipped.places)})" if skipped.places else ""
        raise InputError(
            f"--dataset {args.dataset}: no usable row of subset {args.subset}{seen}{places}; choose others"
        )
    take = rows_to_take(args, {subset: len(numbers) for subset, (_, _, numbers) in found.items()})
    drawn = {}
    for subset, found_columns in found.items():
        order = np.lexsort(found_columns[::-1])[: take[subset]]  # by hash, then by the prompt's, then by number
        drawn[subset] = [np.asarray(column)[order] for column in found_columns]
    prompts = np.unique(np.concatenate([prompts for _, prompts, _ in drawn.values()])).tolist()
    if len(prompts) < 2:
        mix = "" if args.mix_reasoning_ratio is None else f" --mix_reasoning_ratio {args.mix_reasoning_ratio}"
        raise InputError(
            f"--sample_ratio {args.sample_ratio}{mix}: {len(prompts)} prompts left; at least 2 are needed"
        )
    last_held_out = prompts[min(max(1, round(args.val_split * len(prompts))), len(prompts) - 1) - 1]
    used: dict[int, tuple[str, str]] = {}
    for subset, (_, hashes, numbers) in drawn.items():
        sides = (subset, "train"), (subset, "validation")
        held_out = (hashes <= last_held_out).tolist()
        used |= {number: sides[side] for number, side in zip(numbers.tolist(), held_out, strict=True)}
    return Selection(used, data_sha256({subset: columns[:2] for subset, columns in drawn.items()}))


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


def rows_to_take(args: argparse.Namespace, found: dict[str, int]) -> dict[str, int]:
    """How many rows of each subset --sample_ratio and --mix_reasoning_ratio ask for; says the share reached."""
    take = {subset: round(args.sample_ratio * count) for subset, count in found.items()}
    if args.mix_reasoning_ratio is not None:
        total = round(args.sample_ratio * sum(found.values()))
        asked = {"reasoning": round(args.mix_reasoning_ratio * total)}
        take["reasoning"] = min(asked["reasoning"], found["reasoning"])
        asked["general"] = total - take["reasoning"]
        take["general"] = min(asked["general"], found["general"])
        if take["reasoning"] < asked["reasoning"]:
            log.warning("too few reasoning rows (%d): general rows fill the rest", found["reasoning"])
        if take["general"] < asked["general"]:
            log.warning("too few general rows (%d): fewer reasoning rows are used too", found["general"])
            take["reasoning"] = round(take["general"] * args.mix_reasoning_ratio / (1 - args.mix_reasoning_ratio))
        reached = take["reasoning"] / max(1, sum(take.values()))
        log.info("reasoning rows: asked for %.1f %%, reached %.1f %%", 100 * args.mix_reasoning_ratio, 100 * reached)
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

ROWS_AT_ONCE = 1000
LARGE_DATA = 20_000  # rows from which several processes tokenise: each takes 10 s to start


class Examples:
    """The rows of a selection: `examples("train")` reads them, {"messages": [...]} each, and can be called again."""

    def __init__(
        self,
        rows: Rows,
        selection: Selection,
        hub: datasets.Dataset | datasets.IterableDataset | None,
    ) -> None:
        self.rows, self.selection, self.hub = rows, selection, hub

    def __call__(self, side: str, subset: str | None = None) -> Iterator[dict]:
        for _, example in self._read({side}, subset):
            yield example

    def _read(self, sides: Collection[str], subset: str | None = None) -> Iterator[tuple[str, dict]]:
        """(side, example) of the rows on these sides, in the order of reading; the others are not parsed."""
        used = self.selection.used
        numbers = {number for number, key in used.items() if key[1] in sides and subset in {None, key[0]}}
        wanted = (number in numbers for number in itertools.count())
        for number, placed in itertools.zip_longest(sorted(numbers), self.rows(SkippedRows(), wanted)):
            if number is None or placed is None or row_problem(placed[1]):
                raise InputError("--dataset: its rows changed while they were read; start the run again")
            messages = [{"role": role, "content": content} for role, content in turns_of(placed[1])]
            yield used[number][1], {"messages": messages}

    def stored(self, *sides: str) -> dict[str, datasets.Dataset]:
        """The rows by side, read once: those of a hub data set stay on the disk, those of a file go into memory."""
        import datasets
        import pyarrow

        if isinstance(self.hub, datasets.Dataset):
            used = self.selection.used
            return {side: self.hub.select(sorted(n for n in used if used[n][1] == side)) for side in sides}
        message = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.large_string()})
        schema = pyarrow.schema({"messages": pyarrow.list_(message)})

        def table_of(examples: list[dict]) -> pyarrow.Table:
            # Arrow's own pool keeps what a growing column had reserved: half of the rows' size
            pool = pyarrow.system_memory_pool()
            messages = [example["messages"] for example in examples]
            return pyarrow.Table.from_arrays(
                [pyarrow.array(messages, schema.field("messages").type, memory_pool=pool)], schema=schema
            )

        waiting: dict[str, list[dict]] = {side: [] for side in sides}
        tables: dict[str, list[pyarrow.Table]] = {side: [schema.empty_table()] for side in sides}
        for side, example in self._read(sides):
            waiting[side].append(example)
            if len(waiting[side]) == ROWS_AT_ONCE:  # as Python objects rows take several times the memory
                tables[side].append(table_of(waiting.pop(side)))
                waiting[side] = []
        result = {}
        for side in sides:
            table = pyarrow.concat_tables([*tables[side], table_of(waiting[side])])
            # with a fingerprint, else datasets hashes the whole table for one
            result[side] = datasets.Dataset(
                datasets.table.InMemoryTable(table), fingerprint=f"{self.selection.sha256[:16]}-{side}"
            )
        return result


def load_data(args: argparse.Namespace, encoder: ChatEncoder | None = None) -> tuple[Selection, Examples]:
    """Reads --dataset once and selects its rows; those that `encoder` refuses are skipped, counted and named."""
    if Path(args.dataset).exists():
        hub, rows = None, open_dataset(args.dataset, "--dataset")
    else:
        hub = hub_dataset(args.dataset, "--dataset", streaming=args.streaming)
        rows = hub_rows(args.dataset, "--dataset", hub)
    selection = select_rows(rows, args, encoder.refusal if encoder else lambda turns: None)
    return selection, Examples(rows, selection, hub)


def tokenise(
    rows: datasets.Dataset | datasets.IterableDataset, encoder: ChatEncoder, num_proc: int
) -> datasets.Dataset | datasets.IterableDataset:
    """`rows` with the columns "input_ids" and "labels" alone; large data in `num_proc` processes."""
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        return rows.map(encoder, remove_columns=["messages"])
    tokens = datasets.List(datasets.Value("int32"))
    with all_processes().main_process_first():
        return rows.map(
            encoder,
            remove_columns=rows.column_names,
            features=datasets.Features({"input_ids": tokens, "labels": tokens}),
            num_proc=num_proc if len(rows) > LARGE_DATA else None,
            desc="tokenising",
        )


def training_stream(args: argparse.Namespace, selection: Selection, examples: Examples) -> datasets.IterableDataset:
    """The training rows of --streaming, shuffled again for every epoch, each subset in its share."""
    import datasets

    counts = {subset: count for (subset, side), count in sorted(selection.counts.items()) if side == "train"}

    def read(subset: str) -> Iterator[dict]:
        return examples("train", subset)

    streams = [datasets.IterableDataset.from_generator(read, gen_kwargs={"subset": subset}) for subset in counts]
    # a file may hold one subset after the other: draw from both in their shares
    stream = datasets.interleave_datasets(
        streams,
        probabilities=[count / sum(counts.values()) for count in counts.values()],
        seed=args.seed,
        stopping_strategy="all_exhausted_without_replacement",
    )
    return stream.shuffle(seed=args.seed, buffer_size=10_000)


def sized_stream(
    stream: datasets.IterableDataset, rows: int, *, batch: int, step: int
) -> torch.utils.data.IterableDataset:
    """A stream whose every pass has exactly `rows` examples and says so, as the Trainer needs to end an epoch's last,
    partial step in time.

    Examples without a target, which TRL leaves out, are replaced by the first of another pass. The `step` examples of
    an optimiser step are sorted by length before they are cut into micro-batches of `batch`, as loaded rows are.
    """
    import torch

    class SizedStream(torch.utils.data.IterableDataset):
        def __len__(self) -> int:
            return rows

        def set_epoch(self, epoch: int) -> None:
            stream.set_epoch(epoch)

        def __iter__(self) -> Iterator[dict]:
            endless = itertools.chain.from_iterable(itertools.repeat(stream))
            for start in range(0, rows, step):
                group = list(itertools.islice(endless, min(step, rows - start)))
                lengths = [len(example["input_ids"]) for example in group]
                order = sorted_within_steps(list(range(len(group))), lengths, batch=batch, step=step)
                yield from (group[index] for index in order)

    return SizedStream()
