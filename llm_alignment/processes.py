"""Device and number type, ranks, what processes share, batches that shrink when memory is full."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from llm_alignment.files import InputError, is_out_of_memory, log

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState


Item = TypeVar("Item")
Result = TypeVar("Result")
Run = Callable[[list[Item]], Iterator[tuple[int, Result]]]  # (place in the batch, result) of each item

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # --dtype -> torch's name
DDP_TIMEOUT = datetime.timedelta(days=1)  # of processes for one that generates or evaluates


def main_process() -> bool:
    """True in the one process that writes files and prints, under `accelerate launch` too."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes, one to a device, share the work under `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_and_dtype(choice: str = "auto") -> tuple[torch.device, torch.dtype]:
    """This process's device and the type of the base's weights; `choice` is --dtype: auto is bf16 where the GPU has
    it, else fp16, and fp32 on CPU. Raises InputError for bf16 on a GPU without it."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu"), getattr(torch, DTYPES.get(choice, "float32"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if choice == "bf16" and not has_bf16:
        raise InputError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; use another --dtype")
    return device, getattr(torch, DTYPES.get(choice) or ("bfloat16" if has_bf16 else "float16"))


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def all_processes() -> PartialState:
    """accelerate's state, made with `DDP_TIMEOUT` also where it is needed before the trainer, which would make it.
    Raises InputError for several GPUs on Windows."""
    import torch
    from accelerate import PartialState

    if processes() > 1 and sys.platform == "win32" and torch.cuda.is_available():
        raise InputError("several GPUs need NCCL, which Windows lacks: leave out accelerate launch, or use WSL")
    # without a GPU it has to be told, or every process believes that it is alone
    return PartialState(cpu=not torch.cuda.is_available(), timeout=DDP_TIMEOUT)


def gathered(items: list) -> list:
    """The lists of all processes as one, in the order of their ranks; every process gets it."""
    from accelerate.utils import gather_object

    all_processes()
    return gather_object(items)


def on_main_process(compute: Callable[[], Any]) -> Any:
    """Runs `compute` in the main process alone; every process gets its result."""
    from accelerate.utils import broadcast_object_list

    all_processes()
    return broadcast_object_list([compute() if main_process() else None])[0]


def shared_rounds(items: list[Item], size: int, run: Run[Item, Result]) -> Iterator[list[tuple[Item, Result]]]:
    """Yields (item, result) of all `items` in lists, one a round; `run(batch)` yields (place in the batch, result).
    All processes call this with the same items. In a round each takes the next batch, of the smallest of their sizes
    or less, so that none stays without, and gets every result."""
    n_processes, rank = processes(), all_processes().process_index
    if n_processes > 1 and items:
        size = min(*gathered([size]), math.ceil(len(items) / n_processes))
    for start in range(0, len(items), size * n_processes):
        first = start + size * rank
        results = list(halved_when_full(items[first : first + size], size, run))
        yield gathered(results) if n_processes > 1 else results


def halved_when_full(items: list[Item], size: int, run: Run[Item, Result]) -> Iterator[tuple[Item, Result]]:
    """Yields (item, result) of all `items`, as `run` yields (place in the batch, result) for `size` of them at a time.
    When the GPU runs out of memory, batches of half the size follow, from the items that have no result yet."""
    import torch

    waiting = list(items)
    while waiting:
        batch, is_full = waiting[:size], False
        left = dict(enumerate(batch))
        try:
            for place, result in run(batch):
                yield left.pop(place), result
        except RuntimeError as error:  # a library of CUDA that finds no memory raises one that is not torch's own
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            is_full = True
        waiting = [*left.values(), *waiting[size:]]
        if is_full:
            size = len(batch) // 2
            torch.cuda.empty_cache()  # only here, where the error no longer holds on to the tensors
            log.warning("out of memory: continuing with batches of %d", size)
