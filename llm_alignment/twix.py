"""The SFT data: which rows are used, on which side of the validation split, and the tokens that are trained on."""

import contextlib
import hashlib
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from datasets.fingerprint import get_temporary_cache_files_directory

from llm_alignment import conversations
from llm_alignment.batches import token_counts
from llm_alignment.conversations import Turns, prompt_form, prompt_of, read_conversation, unread_fields
from llm_alignment.encoder import ChatEncoder, split_thought
from llm_alignment.files import InputError, SkippedRows, digest, log
from llm_alignment.hub import open_dataset
from llm_alignment.leaks import LeakFinder, have_leaks

SIDES = ("train", "validation")
ROWS_AT_ONCE = 1000  # as Python objects rows take several times the memory
LARGE_DATA = 20_000  # rows from which several processes tokenise: each takes 10 s to start


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same rows are drawn whatever their order."""
    hashed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64


@dataclass(frozen=True)
class RowChoice:
    """Which rows of a data set are used; the fields are the flags of these names."""

    dataset: str  # hub id, file or folder
    subset: str = "general"
    sample_ratio: float = 1.0
    sample_seed: int = 42
    mix_reasoning_ratio: float | None = None
    val_split: float | None = None  # of the prompts; None: a tenth of less than 300, at least 30 of more
    system_prompt: str = ""  # of rows that have none


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
        return np.sort(np.concatenate([numbers for key, numbers in self.numbers.items() if key[1] == side]))


def select_rows(found: dict[str, np.ndarray], choice: RowChoice) -> Selection:
    """The sample, the reasoning mix and the validation split of the rows found of each subset (see `store_rows`). A
    row is drawn when its hash is among the lowest of its subset, and validates when its prompt's hash is among the
    lowest. So a sample of 0.10 is a part of the sample of 0.25, the order of the file does not matter, and a prompt is
    on one side with all of its answers and forms. Raises InputError when fewer than two prompts are left."""
    take = rows_to_take(choice, {subset: len(rows) for subset, rows in found.items()})
    # lexsort: by the last column, the row's hash, then by the prompt's, then by number
    drawn = {subset: rows[np.lexsort(rows.T[1:])[: take[subset]]] for subset, rows in found.items()}
    forms, _, prompts, _ = np.concatenate(list(drawn.values())).T
    forms, form = np.unique(forms, return_inverse=True)
    lowest = np.ones(len(forms))
    np.minimum.at(lowest, form, prompts)
    different = np.unique(lowest)
    count = len(different)
    if count < 2:
        mix = "" if choice.mix_reasoning_ratio is None else f" and --mix_reasoning_ratio {choice.mix_reasoning_ratio}"
        left = f"{count} prompts left by --sample_ratio {choice.sample_ratio}{mix}; at least 2 are needed"
        raise InputError(f"--dataset {choice.dataset}: {left}, so add rows with other prompts")
    share = choice.val_split
    if share is None:
        share = 0.1 if count < 300 else max(30 / count, 0.01)
        log.info("%.1f %% of the %d prompts are held out for validation; --val_split chooses", 100 * share, count)
    last_held_out = different[min(max(1, round(share * count)), count - 1) - 1]
    is_held_out = lowest[form] <= last_held_out
    numbers: dict[tuple[str, str], np.ndarray] = {}
    sha256 = hashlib.sha256(b"{")  # of {subset: [[the row's hash, its prompt's hash], ...]} as JSON, piece by piece
    for place, (subset, rows) in enumerate(drawn.items()):
        held_out, is_held_out = np.split(is_held_out, [len(rows)])
        its_numbers = rows[:, 1].astype(np.int64)
        numbers |= {(subset, "train"): its_numbers[~held_out], (subset, "validation"): its_numbers[held_out]}
        sha256.update(f"{', ' if place else ''}{json.dumps(subset)}: [".encode())
        for number, (prompt, row) in enumerate(zip(*rows.T[2:], strict=True)):
            sha256.update(f"{', ' if number else ''}[{float(row)!r}, {float(prompt)!r}]".encode())
        sha256.update(b"]")
    sha256.update(b"}")
    return Selection(numbers, sha256.hexdigest())


def rows_to_take(choice: RowChoice, found: dict[str, int]) -> dict[str, int]:
    """How many rows of each subset --sample_ratio and --mix_reasoning_ratio ask for; says the share reached."""
    mix = choice.mix_reasoning_ratio
    if mix is None:
        return {subset: round(choice.sample_ratio * count) for subset, count in found.items()}
    total = round(choice.sample_ratio * sum(found.values()))
    reasoning = min(asked := round(mix * total), found["reasoning"])
    if reasoning < asked:
        log.warning("too few reasoning rows (%d): general rows fill the rest", reasoning)
    general = min(asked := total - reasoning, found["general"])
    if general < asked:
        log.warning("too few general rows (%d): fewer reasoning rows are used too", general)
        reasoning = round(general * mix / (1 - mix))
    reached = reasoning / max(1, general + reasoning)
    log.info("reasoning rows: asked for %.1f %%, reached %.1f %%", 100 * mix, 100 * reached)
    return {"general": general, "reasoning": reasoning}


def load_data(
    choice: RowChoice, encoder: ChatEncoder | None = None, finder: LeakFinder | None = None
) -> tuple[Selection, Callable[[str], datasets.Dataset]]:
    """Reads the data set once and chooses; `rows("train")` and `rows("validation")` are then the rows of a side. They
    have the columns "messages" and "length", in characters, and lie in files that go when the process ends. Rows that
    `encoder` refuses, and chosen ones in which `finder` finds a text of an evaluation, are left out, counted and
    named. Raises InputError when no row of the subset can be used."""
    if choice.mix_reasoning_ratio is not None and choice.subset != "both":
        raise InputError(f"--mix_reasoning_ratio mixes two subsets and --subset is {choice.subset}; add --subset both")
    folder = Path(tempfile.mkdtemp(dir=get_temporary_cache_files_directory()))
    every = folder / "rows.arrow"
    found = store_rows(choice, encoder, every)
    selection = select_rows(found, choice)
    if finder:
        selection = without_questions(selection, datasets.Dataset.from_file(str(every)), finder)
    for side in SIDES:
        copy_rows(every, selection.of(side), folder / f"{side}.arrow")
    with contextlib.suppress(PermissionError):  # Windows keeps a file that was mapped; it goes with the folder
        every.unlink()
    used, usable = sum(selection.counts.values()), sum(map(len, found.values()))
    log.info("%d of %d usable rows are used (--sample_ratio %g)", used, usable, choice.sample_ratio)
    return selection, lambda side: datasets.Dataset.from_file(str(folder / f"{side}.arrow"))


def without_questions(selection: Selection, rows: datasets.Dataset, finder: LeakFinder) -> Selection:
    """The selection without the rows that hold what an evaluation asks."""
    chosen = np.concatenate([selection.of(side) for side in SIDES])
    leaks = chosen[have_leaks(rows.select(chosen), finder, "rows", {})]
    if not len(leaks):
        return selection
    numbers = {key: these[~np.isin(these, leaks)] for key, these in selection.numbers.items()}
    clean = Selection(numbers, digest(selection.sha256, leaks.tolist()))
    for side in SIDES:
        if not clean.rows(side):
            raise InputError(f"--dataset: every {side} row holds a question of an evaluation; change --val_split")
    return clean


def store_rows(choice: RowChoice, encoder: ChatEncoder | None, path: Path) -> dict[str, np.ndarray]:
    """Writes the usable rows of the wanted subsets to an Arrow file. By subset, (rows, 4) in float64: the hash of the
    prompt in its normal form, the row's number as in Selection, the hashes of the prompt and of the row."""
    wanted = {"general", "reasoning"} if choice.subset == "both" else {choice.subset}
    found = {subset: array("d") for subset in sorted(wanted)}  # as Python objects they would take 8 times the memory
    seed, waiting = choice.sample_seed, list[Turns]()
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, row_batch([]).schema) as stream:
        for number, (subset, turns, written) in enumerate(usable_rows(choice, wanted, encoder)):
            prompt, form = prompt_of(turns), unit_hash(prompt_form(turns))
            # as JSON, of which every text is written once: json.dumps takes several times as long
            as_json = [f'["{role}", {encode_basestring(text)}]' for role, text in turns]
            of_prompt = unit_hash(f'[{seed}, "prompt", [{", ".join(as_json[: len(prompt)])}]]')
            found[subset].extend([form, number, of_prompt, unit_hash(f"[{seed}, [{', '.join(as_json)}]]")])
            waiting.append(written)
            if len(waiting) == ROWS_AT_ONCE:
                stream.write_batch(row_batch(waiting))
                waiting.clear()
        stream.write_batch(row_batch(waiting))
    return {subset: np.asarray(hashes).reshape(-1, 4) for subset, hashes in found.items()}


def row_batch(rows: list[Turns]) -> pyarrow.RecordBatch:
    """The columns "messages" and "length", in characters, of conversations."""
    message = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.large_string()})
    schema = pyarrow.schema({"messages": pyarrow.list_(message), "length": pyarrow.int64()})
    messages = [[{"role": role, "content": text} for role, text in turns] for turns in rows]
    lengths = [sum(len(text) for _, text in turns) for turns in rows]
    return pyarrow.RecordBatch.from_pydict({"messages": messages, "length": lengths}, schema)


def usable_rows(
    choice: RowChoice, wanted: set[str], encoder: ChatEncoder | None
) -> Iterator[tuple[str, Turns, Turns]]:
    """The subset, the turns, and the turns with --system_prompt, of the rows that can be trained on; says at the end
    what else there was. Raises InputError when there is none."""
    others, kinds, unread = Counter[str](), Counter[str](), Counter[str]()
    skipped, thoughts = SkippedRows(), 0
    for place, row in open_dataset(choice.dataset, "--dataset", skipped):
        try:
            kind, turns = read_conversation(row)
            subset = "general" if row.get("subset") in (None, "") else row["subset"]
            if not isinstance(subset, str):
                raise ValueError("the subset is not text")
            if subset not in wanted:
                others[subset] += 1
                continue
            has_own = not choice.system_prompt or turns[0][0] == "system"
            written = turns if has_own else [("system", choice.system_prompt), *turns]
            if encoder and (refusal := encoder.refusal(written)):
                raise ValueError(refusal)
        except ValueError as error:
            skipped.add(place, str(error))
            continue
        kinds[kind] += 1
        thoughts += any(role == "assistant" and split_thought(text)[0] for role, text in turns)
        messages = row.get(kind)
        if not row.keys() <= {kind, "subset"} or type(messages) is not list or any(len(m) > 2 for m in messages):
            unread.update(unread_fields([row], conversations.COLUMNS[kind]))
        yield subset, turns, written
    skipped.report("rows")
    if others:
        log.info("rows of other subsets, not used: %s", ", ".join(f"{n} {subset}" for subset, n in others.items()))
    if not kinds:
        seen = f"; it has {dict(others)}" if others else ""
        places = f" ({'; '.join(skipped.places)})" if skipped.places else ""
        is_read = "(columns " not in places and "JSON)" not in places
        shapes = "" if is_read else f"; accepted are JSON Lines, JSON lists and Parquet of {conversations.SHAPES}"
        what = f"no usable row of subset {choice.subset}{seen}{places}"
        raise InputError(f"--dataset {choice.dataset}: {what}; choose others{shapes}")
    log.info("rows read as: %s", counted(kinds))
    if unread:
        log.info("not read: %s", counted(unread))
    if thoughts and encoder:
        what = "trained on" if encoder.thinking else "left out; --thinking trains on them"
        log.info("thoughts of %d rows: %s", thoughts, what)


def counted(kinds: Counter) -> str:
    """What rows have, and how many have it."""
    return "; ".join(f"{kind} ({count} rows)" for kind, count in sorted(kinds.items()))


def copy_rows(source: Path, numbers: np.ndarray, target: Path) -> None:
    """Copies the rows of these numbers, sorted, to a file of their own: no other stays in memory or on the disk."""
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
    """`rows` as "input_ids" and "labels", cut to `longest` tokens; large data in `num_proc` processes. `lazily`: they
    are tokenised whenever they are read, and no tokens are kept."""

    def encode(batch: dict[str, list]) -> dict[str, list[list[int]]]:
        encoded = [encoder({"messages": messages}) for messages in batch["messages"]]
        kept = {"replay": batch["replay"]} if "replay" in batch else {}
        return {name: [row[name][:longest] for row in encoded] for name in ("input_ids", "labels")} | kept

    if lazily:
        return rows.with_transform(encode)
    tokens = datasets.List(datasets.Value("int32"))
    is_replay = {"replay": datasets.Value("bool")} if "replay" in rows.column_names else {}
    return rows.map(
        encode, batched=True, remove_columns=rows.column_names,
        features=datasets.Features({"input_ids": tokens, "labels": tokens} | is_replay),
        num_proc=num_proc if len(rows) > LARGE_DATA else None, desc="tokenising",
    )  # fmt: skip


def with_answers(rows: datasets.Dataset, side: str, longest: int) -> datasets.Dataset:
    """The tokenised rows with a target within `longest` tokens; the log says how many have none. Raises InputError
    when all have none. A row's first token is never a target."""
    side = {"train": "training"}.get(side, side)
    kept = rows.filter(lambda row: any(label != -100 for label in row["labels"][1:longest]), desc="with an answer")
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
