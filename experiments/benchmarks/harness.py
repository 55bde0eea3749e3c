"""What the benchmarks share: the project on the path, shapes of random models, steps taken in turns, peak memory."""

from __future__ import annotations

import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHAPES: dict[str, dict[str, int]] = {
    "even": dict(  # the proportion of backbone to head that Qwen3-1.7B has
        vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=768,
    ),
    "small": dict(
        vocab_size=151_936, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, intermediate_size=1536,
    ),
    "wide": dict(
        vocab_size=151_936, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        head_dim=64, intermediate_size=1536,
    ),
    "1.7b": dict(
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=6144,
    ),
}  # fmt: skip


class PeakMemory:
    """Bytes of the peak inside the block above what was held before it: GPU memory, or resident memory on Linux."""

    def __enter__(self) -> PeakMemory:
        import torch

        gc.collect()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if self.cuda or sys.platform == "linux":
            peak = torch.cuda.max_memory_allocated() if self.cuda else self.resident("VmHWM")
            self.extra = peak - self.before
        else:
            self.extra = 0

    @staticmethod
    def resident(key: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.findall(rf"{key}:\s+(\d+)", status)[0])


class Sample(NamedTuple):
    """One run of a variant: its seconds, the bytes it took at most, what it returned."""

    seconds: float
    memory: int
    result: Any


def in_turns(
    variants: Mapping[str, Callable[[int], object]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[Sample]]:
    """Every variant in every round, in turns: `variant(number of the round)`. The warm-up rounds do not count."""
    import torch

    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    for number in range(rounds + warm_up):
        for name, run in variants.items():
            with PeakMemory() as memory:
                start = time.perf_counter()
                result = run(number)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            if number >= warm_up:
                samples[name].append(Sample(seconds, memory.extra, result))
    return samples


def time_ratio(samples: Sequence[Sample], to: Sequence[Sample]) -> float:
    """The median over the rounds of how long one variant took for each second of another."""
    return statistics.median(one.seconds / other.seconds for one, other in zip(samples, to, strict=True))


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def sft_trainer(
    folder: str,
    tokenizer: Any,
    rows: Any,
    *,
    batch: int,
    grad_acc: int,
    tokens: int,
    anchor: Any,
    four_bit: bool = False,
) -> Any:
    """This project's SFT trainer over the model in `folder` and rows of token ids, with a fresh adapter on q and v."""
    from llm_alignment import models, sft, training
    from llm_alignment.adapters import LoraSettings

    base = models.resolve_base(models.BaseFlags(folder, no_4bit=not four_bit))
    lora, output = LoraSettings(8, 16, 0.0, "q_proj,v_proj"), Path(folder) / "out"
    setup = training.Setup(base, tokenizer, lora, output, None, {})
    settings = training.TrainingSettings(
        output_dir=str(output), epochs=1.0, batch=batch, grad_acc=grad_acc, max_steps=0, learning_rate=1e-4,
        save_steps=1000, seed=42, report_to="none", exp_tag="", gradient_checkpointing="auto", longest=tokens,
    )  # fmt: skip
    both, sizes = {"train": rows, "validation": rows}, sft.SftSettings(tokens, False, 1)
    return sft.build_trainer(models.load_model(base), setup, both, settings, sft=sizes, anchor=anchor)
