"""A DPO training step on TAT-QA pairs: TRL's DPOTrainer as it ships, and dpo_train.py's ways to share prompts.

    python experiments/benchmarks/bench_dpo.py                 (4.5 backbone parameters to one of the head, as in 1.7B)
    python experiments/benchmarks/bench_dpo.py --shape wide    (hidden 512, 8 layers, vocabulary 151,936)
    python experiments/benchmarks/bench_dpo.py --shape 1.7b    (Qwen3-1.7B's shape, bfloat16, needs CUDA)
    python experiments/benchmarks/bench_dpo.py --growth        (time and memory by prompt length and pairs a table)

All weights are random. One process, the same micro-batches and adapter for all, steps interleaved, medians; the ratios
are the result. On CPU TRL puts every token through the LM head, on CUDA the answers' tokens alone, as the variant "its
head as on CUDA" does on a CPU; TRL's kernels on CUDA are not in it. Every variant is measured on pairs grouped by
table and on pairs in random order. Peak memory is what a step allocates on top of what it found: on CPU by torch's
profiler, on CUDA by the caching allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness import SHAPES, in_turns

from llm_alignment import batches, prefixes
from llm_alignment.files import SkippedRows
from llm_alignment.flags import DEMO_DIR


class Variant(NamedTuple):
    """`sharing`: None for TRL's trainer untouched, "no", "pair" (each prompt once) or "tree" (also across pairs).

    `answers_alone`: where TRL has no Triton, as on CPU, it puts every token through the LM head; on CUDA it puts the
    answers' tokens alone through it. This makes it do so on CPU too.
    """

    sharing: str | None
    cached_reference: bool = False
    checkpointing: bool | None = None  # None: dpo_train.py's default
    answers_alone: bool = False


VARIANTS = {
    "TRL 1.16": Variant(None, checkpointing=True),
    "TRL 1.16, activations kept": Variant(None, checkpointing=False),
    "TRL 1.16, its head as on CUDA": Variant(None, checkpointing=True, answers_alone=True),
    "--no_prefix_sharing": Variant("no"),
    "each prompt once": Variant("pair"),
    "each prompt once, reference cached": Variant("pair", cached_reference=True),
    "shared beginnings": Variant("tree"),
    "shared beginnings, reference cached": Variant("tree", cached_reference=True),
}
PER_PAIR, FASTEST = "each prompt once", "shared beginnings, reference cached"
AS_ON_CUDA = "TRL 1.16, its head as on CUDA"


def tatqa_rows(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """TAT-QA's training pairs as tokens below the vocabulary: {"prompt_ids", "chosen_ids", "rejected_ids"}."""
    from transformers import AutoTokenizer

    from dpo_train import tatqa_pairs
    from llm_alignment.tatqa import read_tatqa

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    contexts = read_tatqa(Path(args.tatqa_dir) / "tatqa_dataset_train.json", SkippedRows())
    vocabulary = SHAPES[args.shape]["vocab_size"]

    def ids(text: str) -> list[int]:
        return [token % vocabulary for token in tokenizer(text)["input_ids"]]

    rows = []
    for pair in tatqa_pairs(contexts, seed=42):
        answers = {f"{side}_ids": ids(f" {pair[side]}{tokenizer.eos_token}") for side in ("chosen", "rejected")}
        rows.append({"prompt_ids": ids(pair["prompt"]), **answers})
    return rows


def made_rows(prompt: int, pairs: int, pairs_a_table: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Random pairs with prompts of `prompt` tokens, four fifths of which are those of a table, and answers of 8."""
    rng = random.Random(0)

    def ids(n_tokens: int) -> list[int]:
        return [rng.randrange(1, vocabulary) for _ in range(n_tokens)]

    rows, table = [], []
    for number in range(pairs):
        if number % pairs_a_table == 0:
            table = ids(prompt * 4 // 5)
        rows.append({"prompt_ids": table + ids(prompt - len(table)), "chosen_ids": ids(8), "rejected_ids": ids(8)})
    return rows


def build_trainer(args: argparse.Namespace, rows: list[dict], variant: Variant) -> Any:
    """A DPOTrainer over a random model and the tokens of `rows`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import DPOConfig, DPOTrainer

    class TokenTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it holds tokens already

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1})), pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[args.shape])
    model = Qwen3ForCausalLM(config).to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    on_cuda = args.device == "cuda"
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.pairs,
        gradient_checkpointing=on_cuda if variant.checkpointing is None else variant.checkpointing,
        bf16=on_cuda,
        use_cpu=not on_cuda,
        max_length=None,
        report_to="none",
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = TokenTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    if variant.sharing:
        prefixes.add_prefix_sharing(trainer.model.get_base_model(), sharing=variant.sharing != "no")
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what train() sets before its first step
    return trainer


@contextlib.contextmanager
def as_variant(trainer: Any, variant: Variant, batch: dict) -> Iterator[dict]:
    """The micro-batch as the variant gets it, with the reference's log-probabilities where these are cached."""
    import trl.trainer.utils

    part, use_triton = batches.SHARED_PART, trl.trainer.utils._use_triton
    if variant.answers_alone:
        trl.trainer.utils._use_triton = lambda device: True  # what this module asks before it picks the tokens
    batches.SHARED_PART = part if variant.sharing == "tree" else 2.0  # no beginning is twice its prompt
    trainer.precompute_ref_logps = variant.cached_reference
    yield dict(batch) if variant.cached_reference else {k: v for k, v in batch.items() if not k.startswith("ref_")}
    batches.SHARED_PART, trl.trainer.utils._use_triton = part, use_triton


def micro_batches(trainer: Any, rows: list[dict], size: int) -> list[dict]:
    """TRL's batches of `size` rows in their order, with the reference's log-probabilities."""
    batches = []
    for start in range(0, len(rows), size):
        batch = trainer.data_collator(rows[start : start + size])
        batch = {name: tensor.to(trainer.model.device) for name, tensor in batch.items()}
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        batches.append({**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected})
    return batches


def step(trainer, batch: dict) -> float:
    """One whole training step: reference, policy, backward, optimiser. Returns the loss."""
    trainer.model.train()
    loss = trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.item()


def peak_memory(run, device: str) -> int:
    """The most bytes allocated at one time by `run()`, above what was there before."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


class Measured(NamedTuple):
    """Medians over the rounds: seconds of a micro-batch; bytes; the first loss."""

    seconds: float
    memory: int
    loss: float


def measure(args: argparse.Namespace, rows: list[dict], names: list[str]) -> dict[str, Measured]:
    """Every variant on the same micro-batches, interleaved; the first one warms up and measures memory."""
    trainers = {name: build_trainer(args, rows, VARIANTS[name]) for name in names}
    batches = micro_batches(trainers[names[-1]], rows, args.pairs)
    losses: dict[str, float] = {}
    memory: dict[str, int] = {}
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    for name, trainer in trainers.items():
        with as_variant(trainer, VARIANTS[name], largest) as batch:
            memory[name] = peak_memory(
                lambda trainer=trainer, name=name, batch=batch: losses.update({name: step(trainer, batch)}),
                args.device,
            )

    def all_batches(name: str, number: int) -> None:
        for micro_batch in batches:
            with as_variant(trainers[name], VARIANTS[name], micro_batch) as batch:
                step(trainers[name], batch)

    samples = in_turns({name: functools.partial(all_batches, name) for name in names}, args.rounds, warm_up=0)
    seconds = {name: statistics.median(sample.seconds for sample in samples[name]) for name in names}
    return {name: Measured(seconds[name] / len(batches), memory[name], losses[name]) for name in names}


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Prints every variant on grouped and on random micro-batches; returns the main ratios of the grouped ones."""
    rows = tatqa_rows(args)
    count = args.pairs * args.batches
    grouped = [rows[index] for index in batches.GroupedOrder(batches.groups_of([r["prompt_ids"] for r in rows]), 0)]
    shuffled = random.Random(0).sample(rows, len(rows))
    ratios: dict[str, float] = {}
    for order, chosen in (("grouped by table", grouped[:count]), ("random order", shuffled[:count])):
        measured = measure(args, chosen, list(VARIANTS))
        lengths = [len(row["prompt_ids"]) for row in chosen]
        mean = statistics.fmean(lengths)
        print(
            f"\n{args.shape} shape, {args.device}, {args.batches} x {args.pairs} pairs, {order}, prompts of {mean:.0f}"
        )
        trl, on_cuda, pair = measured["TRL 1.16"], measured[AS_ON_CUDA], measured[PER_PAIR]
        for name, result in measured.items():
            print(
                f"{name:36} {trl.seconds / result.seconds:6.2f}x TRL's speed, "
                f"{on_cuda.seconds / result.seconds:5.2f}x with its head as on CUDA, "
                f"{pair.seconds / result.seconds:5.2f}x each prompt once; peak memory "
                f"{result.memory / trl.memory:5.2f} of TRL's, {result.memory / pair.memory:5.2f} of each prompt once; "
                f"loss {result.loss:.6f}"
            )
        best = measured[FASTEST]
        ratios |= {
            f"{order}: speed over TRL": trl.seconds / best.seconds,
            f"{order}: speed over TRL, its head as on CUDA": on_cuda.seconds / best.seconds,
            f"{order}: speed over each prompt once": pair.seconds / best.seconds,
            f"{order}: memory over each prompt once": best.memory / pair.memory,
        }
    return ratios


def growth(args: argparse.Namespace) -> dict[str, list[Measured]]:
    """Prints, and with --plot draws, time and memory by prompt length and by pairs a table."""
    vocabulary, names = SHAPES[args.shape]["vocab_size"], [PER_PAIR, FASTEST]
    points: dict[str, list[tuple[int, dict[str, Measured]]]] = {}
    for title, settings in {
        "tokens of a prompt, 4 pairs a table": [(tokens, 4, tokens) for tokens in (256, 512, 1024, 2048)],
        "pairs a table, prompts of 1,024 tokens": [(1024, pairs, pairs) for pairs in (1, 2, 4, 8)],
    }.items():
        print(f"\n{args.shape} shape, {args.device}, micro-batches of {args.pairs} pairs; {title}")
        for tokens, pairs_a_table, value in settings:
            rows = made_rows(tokens, args.pairs * args.batches, pairs_a_table, vocabulary)
            measured = measure(args, rows, names)
            points.setdefault(title, []).append((value, measured))
            first = points[title][0][1]
            for name in names:
                print(
                    f"{value:6} {name:36} time {measured[name].seconds / first[PER_PAIR].seconds:6.2f}, peak memory "
                    f"{measured[name].memory / first[PER_PAIR].memory:6.2f} of the first line's"
                )
    if args.plot:
        draw(points, names, Path(args.plot))
    return {title: [measured[FASTEST] for _, measured in rows] for title, rows in points.items()}


def draw(points: dict, names: list[str], path: Path) -> None:
    """One panel for time and one for memory under each title, relative to the first point of `names[0]`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    for column, (title, rows) in enumerate(points.items()):
        for line, field in enumerate(("seconds", "memory")):
            axes = figure.add_subplot(2, 2, 2 * line + column + 1)
            first = getattr(rows[0][1][names[0]], field)
            for name in names:
                axes.plot([x for x, _ in rows], [getattr(m[name], field) / first for _, m in rows], "o-", label=name)
            axes.set(title=title, ylabel=f"{field} of a step, relative", xscale="log")
            axes.set_xticks([x for x, _ in rows], [str(x) for x, _ in rows])
            axes.set_xticks([], minor=True)
            axes.set_ylim(0)
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="even", help="(default: %(default)s)")
    parser.add_argument("--tatqa_dir", default=str(DEMO_DIR / "tatqa"), help="folder of TAT-QA (default: the demo's)")
    parser.add_argument("--tokenizer", default=str(DEMO_DIR / "model"), help="its folder (default: the demo's)")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a micro-batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="micro-batches of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each variant (default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="measure the growth instead")
    parser.add_argument("--plot", default="", metavar="FILE.png", help="draw the growth")
    args = parser.parse_args(argv)
    import torch

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return growth(args) if args.growth else compare(args)


if __name__ == "__main__":
    main()
