"""Whole SFT+KL optimiser steps on real rows of different lengths: what padding costs, and what sorting saves.

    python experiments/benchmarks/bench_sft_lengths.py --data twix.jsonl --tokenizer QWEN3_FOLDER
    python experiments/benchmarks/bench_sft_lengths.py --tokens 1024

A random Qwen3 in the 1.7B model's proportion of backbone to head (hidden 256, 6 layers, vocabulary 4,096); lengths by
the tokenizer, ids folded below the vocabulary. Steps of batch x grad_acc rows, as in the recipes, over the same rows
and adapter, interleaved in one process; medians over the rounds, and ratios to the first:
    sorted           this trainer: micro-batches sorted by length within a step
    unsorted         the same in the seed's order
    TRL              TRL's SFTTrainer as it ships, without a KL
    published        the published runs' way: a second full model, full logits of both, unsorted
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
from collections.abc import Callable

from harness import ROOT, SHAPES, device_name, in_turns, sft_trainer, time_ratio

DEMO = ROOT / "experiments" / "demo"
OTHERS = ("unsorted", "TRL", "published")  # than sorted, which the others are compared with


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = " (default: %(default)s)"
    parser.add_argument("--data", default=str(DEMO / "twix.jsonl"), help="rows of {messages, subset}" + default)
    parser.add_argument("--tokenizer", default=str(DEMO / "model"), help="folder of a Qwen3 tokenizer" + default)
    parser.add_argument("--tokens", type=int, default=512, help="length that rows are cut to" + default)
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch" + default)
    parser.add_argument("--grad_acc", type=int, default=16, help="micro-batches of a step" + default)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each variant" + default)
    parser.add_argument("--tail", type=int, default=128, help="last tokens that the KL acts on" + default)
    parser.add_argument("--without", nargs="+", default=[], choices=OTHERS, help="variants to leave out")
    return parser


class Bench:
    """One adapter on one random model, its rows, and a step of each variant."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
        from trl import SFTTrainer

        from llm_alignment.anchored_loss import AnchorSettings
        from llm_alignment.encoder import ChatEncoder
        from llm_alignment.processes import device_and_dtype
        from llm_alignment.twix import RowChoice, load_data, tokenise

        torch.manual_seed(0)
        self.device, self.dtype = device_and_dtype("auto")
        self.without = options.without
        config = Qwen3Config(tie_word_embeddings=True, max_position_embeddings=4096, **SHAPES["even"])
        Qwen3ForCausalLM(config).to(self.dtype).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        encoder = ChatEncoder(tokenizer, thinking=False, assistant_only=False)
        _, examples = load_data(RowChoice(options.data, subset="both"), encoder)
        rows = tokenise(examples("train"), encoder, 1, longest=options.tokens)
        rows = rows.map(lambda row: {name: [token % 4090 for token in row[name]] for name in ("input_ids", "labels")})
        tokenizer.pad_token_id = 4095
        self.anchor = AnchorSettings(kl_coef=0.03, kl_warmup_steps=1, kl_limit_seq=options.tail)
        self.grad_acc, sizes = options.grad_acc, {"batch": options.batch, "tokens": options.tokens}
        self.ours = sft_trainer(folder, tokenizer, rows, grad_acc=self.grad_acc, anchor=self.anchor, **sizes)
        self.model = self.ours.model.train()
        self.second = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).to(self.device)
        self.stock = SFTTrainer(model=self.model, args=self.ours.args, train_dataset=rows, processing_class=tokenizer)
        # the Trainer makes the accelerator's loaders when it trains; the steps here take batches from their own
        self.loaders = {
            "sorted": self.ours.get_train_dataloader(),
            "unsorted": SFTTrainer.get_train_dataloader(self.ours),
        }
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0)

    def batches(self, order: str, step: int) -> list[dict]:
        """The micro-batches of an optimiser step."""
        start = step * self.grad_acc
        self.loaders[order].set_epoch(0)
        return list(itertools.islice(self.loaders[order], start, start + self.grad_acc))

    def step(self, trainer, batches: list[dict]) -> None:
        """A step of this project's trainer or of TRL's."""
        trainer.state.global_step = 10
        batches, items = trainer.get_batch_samples(iter(batches), len(batches), self.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(self.model, batch, items)

    def step_published(self, batches: list[dict]) -> None:
        import torch

        for batch in batches:
            labels = batch["labels"][:, 1:].to(self.device)
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
            with torch.no_grad():
                reference = self.second(**inputs, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            log_p, log_r = (torch.log_softmax(x[:, -self.anchor.kl_limit_seq :], -1) for x in (logits, reference))
            loss = loss + self.anchor.kl_coef * (log_p.exp() * (log_p - log_r)).sum(-1).mean()
            (loss / len(batches)).backward()

    def variants(self) -> dict[str, tuple[str, Callable[[list[dict]], None]]]:
        """{name: (order of the rows, step)} of those to measure."""
        every = {
            "sorted": ("sorted", lambda batches: self.step(self.ours, batches)),
            "unsorted": ("unsorted", lambda batches: self.step(self.ours, batches)),
            "TRL": ("unsorted", lambda batches: self.step(self.stock, batches)),
            "published": ("unsorted", self.step_published),
        }
        return {name: variant for name, variant in every.items() if name not in self.without}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    options = build_parser().parse_args(argv)
    bench = Bench(options, tempfile.mkdtemp())
    variants = bench.variants()
    orders = dict.fromkeys(order for order, _ in variants.values())
    batches = {order: [bench.batches(order, number) for number in range(options.rounds + 1)] for order in orders}

    def step(order: str, run: Callable[[list[dict]], None], number: int) -> None:
        run(batches[order][number])
        bench.optimizer.step()
        bench.optimizer.zero_grad()

    steps = {name: functools.partial(step, order, run) for name, (order, run) in variants.items()}
    samples = in_turns(steps, options.rounds)
    print(
        f"{options.batch} x {options.grad_acc} rows of up to {options.tokens} tokens, {bench.dtype}, {device_name()}"
    )
    print(f"{'':10}{'time / sorted':>14}{'padded / real tokens':>22}")
    result = {}
    for name, (order, _) in variants.items():
        ids = [batch for of_step in batches[order][1:] for batch in of_step]
        padding = sum(b["input_ids"].numel() for b in ids) / sum(int(b["attention_mask"].sum()) for b in ids)
        result[name] = {"time": time_ratio(samples[name], samples["sorted"]), "padding": padding}
        print(f"{name:10}{result[name]['time']:14.2f}{padding:22.2f}")
    return result


if __name__ == "__main__":
    main()
