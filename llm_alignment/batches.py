"""What shares a micro-batch: examples of like length, prompts that begin alike."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.data_loader import DataLoaderShard
    from datasets import Dataset
    from transformers import TrainingArguments


def sorted_within_steps(order: list[int], lengths: Sequence[int], *, batch: int, step: int) -> list[int]:
    """`order`, the `step` examples of each optimiser step sorted by length, longest first: micro-batches of `batch`
    have little padding. A last one that is not full keeps its examples: a mean loss weighs them more."""
    result = []
    for start in range(0, len(order), step):
        examples = order[start : start + step]
        full = len(examples) - len(examples) % batch
        result += sorted(examples[:full], key=lambda index: -lengths[index]) + examples[full:]
    return result


# TRL's DPO losses whose sum over a step changes with the pairs that share a micro-batch: "sft" is a mean over the
# answers' tokens of one, and the two others sort the log-ratios of its pairs (dpo_trainer.py, `_compute_loss`).
LOSSES_OVER_BATCHES = {"sft", "aot", "aot_unpaired"}


def padded_tokens(lengths: list[int], batch: int, step: int) -> int:
    """The tokens of examples in this order with their padding, when each step is sorted and cut into micro-batches."""
    order = sorted_within_steps(list(range(len(lengths))), lengths, batch=batch, step=step)
    batches = (order[start : start + batch] for start in range(0, len(order), batch))
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)


class LengthSortedSampler:
    """The order of `sampler`, an epoch's indices by the seed, sorted by length within each optimiser step.
    Neighbouring micro-batches go to different processes, so these get similar lengths. `multiple` is what accelerate
    fills an epoch up to, with examples from its beginning: that happens here, before the order changes."""

    def __init__(self, sampler: Any, lengths: Sequence[int], *, batch: int, step: int, multiple: int):
        self.sampler, self.lengths, self.batch, self.step, self.multiple = sampler, lengths, batch, step, multiple

    def __iter__(self) -> Iterator[int]:
        order = list(itertools.islice(itertools.cycle(list(self.sampler)), len(self)))
        return iter(sorted_within_steps(order, self.lengths, batch=self.batch, step=self.step))

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.multiple) * self.multiple

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


def sort_by_length(loader: DataLoaderShard, args: TrainingArguments, lengths: Sequence[int]) -> DataLoaderShard:
    """A Trainer's `get_train_dataloader` that sorts each optimiser step's examples by `lengths`, in tokens."""
    batch, together = args.train_batch_size, args.train_batch_size * args.world_size
    sizes = {"step": together * args.gradient_accumulation_steps, "multiple": together if args.world_size > 1 else 1}
    batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)  # under several processes: inside
    loader.set_sampler(LengthSortedSampler(batches.sampler, lengths, batch=batch, **sizes))
    return loader


def token_counts(dataset: Dataset, *columns: str) -> list[int]:
    """The number of tokens of each row of a `datasets.Dataset`, summed over its columns of token ids."""
    import pyarrow.compute

    counts: list[int] = []
    for part in dataset.select_columns(list(columns)).with_format("arrow").iter(10_000):
        sizes = [pyarrow.compute.list_value_length(part[column]).to_pylist() for column in columns]
        counts += map(sum, zip(*sizes, strict=True))
    return counts


# pairs whose reference is read together: fixed, so that the numbers do not depend on --batch and other runs find them
PAIRS_AT_ONCE = 8

# A shared beginning that is shorter than this part of the prompt is read again: the mask of the rest would take as
# much memory as it saves.
SHARED_PART = 1 / 8


def shared_lengths(prompts: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Yields (index, tokens shared with the prompt before) in sorted order, where neighbours have most in common."""
    previous: list[int] = []
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        shared = common_length([previous, prompts[index]])
        yield index, shared if shared >= SHARED_PART * len(prompts[index]) else 0
        previous = prompts[index]


def common_length(sequences: Sequence[Sequence]) -> int:
    """How many tokens all sequences begin with in common."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def groups_of(prompts: Sequence[Sequence]) -> list[list[int]]:
    """The indices of prompts (tokens or texts), grouped with the next one where they share half or more, as on TAT-QA
    the questions of one table."""
    groups: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: list(prompts[index])):
        before = prompts[groups[-1][-1]] if groups else []
        if before and 2 * common_length([before, prompts[index]]) >= min(len(before), len(prompts[index])):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class GroupedOrder:
    """A sampler: group after group; seed and epoch choose the order of the groups, and the order within each."""

    def __init__(self, groups: list[list[int]], seed: int) -> None:
        self.groups, self.seed, self.epoch = groups, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}:{self.epoch}")
        groups = rng.sample(self.groups, len(self.groups))
        # a long system prompt makes one group of all pairs, whose topics must not come one after the other
        return itertools.chain.from_iterable(rng.sample(group, len(group)) for group in groups)
