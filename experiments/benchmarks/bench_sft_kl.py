"""Time and memory of one SFT+KL training step, against the published way, TRL and LLaMA-Factory's anchored SFT.

    python experiments/benchmarks/bench_sft_kl.py
    python experiments/benchmarks/bench_sft_kl.py --shape even --batch 8          (the 1.7B model's share of the head)
    python experiments/benchmarks/bench_sft_kl.py --shape 1.7b --batch 12 --four_bit  (a CUDA GPU)

Steps over the same batch, weights and adapter, interleaved in one process; medians, and ratios to the first:
    ours             this project's trainer: fused NLL+KL, the reference is the adapter switched off
    ours, no KL      the same before the KL starts
    published        the published runs' way: a second full model as reference, full logits of both
    TRL NLL+KL       TRL's fused NLL and TRL's ChunkedDivergence as reverse KL, the adapter switched off
    TRL NLL          TRL's SFTTrainer as it ships, no KL
    ours, ASFT       this project's trainer with --sft_loss dft --kl_direction forward on all targets
    LLaMA-Factory    its anchored SFT as a formula: a second model, full float32 logits of both, DFT + forward KL
Extra memory is the peak during a step above the loaded student, plus the second model where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable

from harness import SHAPES, device_name, in_turns, sft_trainer, time_ratio

from llm_alignment.anchored_loss import AnchorSettings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--tail", type=int, default=128, help="last tokens of an example that the KL acts on")
    parser.add_argument("--four_bit", action="store_true", help="NF4 base")
    parser.add_argument("--repeats", type=int, default=7)
    return parser


class Bench:
    """The models, trainers and the batch that all steps share."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        import datasets
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
        from trl import SFTTrainer

        from llm_alignment.processes import device_and_dtype

        shape = SHAPES[options.shape]
        torch.manual_seed(0)
        self.device, self.dtype = device_and_dtype("auto")
        config = Qwen3Config(tie_word_embeddings=True, max_position_embeddings=4096, **shape)
        Qwen3ForCausalLM(config).to(self.dtype).save_pretrained(folder)
        self.anchor = AnchorSettings(kl_coef=0.03, kl_warmup_steps=1, kl_limit_seq=options.tail)
        self.asft = dataclasses.replace(self.anchor, kl_limit_seq=0, sft_loss="dft", kl_direction="forward")
        tokenizer = toy_tokenizer(PreTrainedTokenizerFast)
        size = (options.batch, options.tokens)
        ids = torch.randint(10, shape["vocab_size"], size, generator=torch.Generator().manual_seed(1))
        rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        self.ours = sft_trainer(
            folder, tokenizer, rows, batch=options.batch, grad_acc=1, tokens=options.tokens, anchor=self.anchor,
            four_bit=options.four_bit,
        )  # fmt: skip
        self.model = self.ours.model.train()
        with torch.no_grad():  # an adapter that has moved, so that the KL is not 0
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        # the same weights: only the trainers differ
        self.stock = SFTTrainer(model=self.model, args=self.ours.args, train_dataset=rows, processing_class=tokenizer)
        self.second = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).to(self.device)
        self.second.requires_grad_(False)
        self.batch = {"input_ids": ids.to(self.device), "attention_mask": torch.ones_like(ids).to(self.device)}
        self.labels = ids.to(self.device)
        self.items = torch.tensor(ids[:, 1:].numel(), device=self.device)
        self.tail = options.tail
        whole = self.dtype == torch.float32
        self.autocast = contextlib.nullcontext() if whole else torch.autocast(self.device.type, self.dtype)

    def step_ours(self, step: int, anchor: AnchorSettings) -> float:
        self.ours.state.global_step, self.ours.anchor = step, anchor
        iterator = iter([{**self.batch, "labels": self.labels}])
        (prepared,), num_items = self.ours.get_batch_samples(iterator, 1, self.device)
        return self.ours.training_step(self.model, prepared, num_items).item()

    def both_logits(self) -> tuple:
        import torch

        logits = self.model(**self.batch, use_cache=False).logits
        with torch.no_grad():
            return logits, self.second(**self.batch, use_cache=False).logits

    def step_published(self) -> float:
        import torch

        with self.autocast:
            logits, reference = self.both_logits()
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(flat, self.labels[:, 1:].flatten())
            log_p = torch.log_softmax(logits[:, -self.tail - 1 : -1].float(), -1)
            log_r = torch.log_softmax(reference[:, -self.tail - 1 : -1].float(), -1)
            loss = loss + self.anchor.kl_coef * (log_p.exp() * (log_p - log_r)).sum(-1).mean()
        loss.backward()
        return loss.item()

    def step_llama_factory(self) -> float:
        import torch

        with self.autocast:
            logits, reference = (x[:, :-1].float() for x in self.both_logits())
            log_p, log_r = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
            picked = log_p.gather(-1, self.labels[:, 1:, None])
            loss = -(picked.exp().detach() * picked).mean()
            loss = loss + self.anchor.kl_coef * (log_r.exp() * (log_r - log_p)).sum(-1).mean()
        loss.backward()
        return loss.item()

    def step_trl_kl(self) -> float:
        import torch
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        base, weight, hidden = self.model.get_base_model(), self.model.get_output_embeddings().weight, []
        hook = base.model.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state))
        with self.autocast:
            output = self.model(**self.batch, labels=self.labels, num_items_in_batch=self.items, fused_lm_head=True)
            with torch.no_grad(), self.model.disable_adapter():
                base.model(**self.batch, use_cache=False)
            student, teacher = (h[:, -self.tail - 1 : -1].flatten(0, 1) for h in hidden)
            hook.remove()
            divergence, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 1.0)
            loss = output.loss + self.anchor.kl_coef * divergence.mean()
        loss.backward()
        return loss.item()

    def step_trl(self) -> float:
        return self.stock.training_step(self.model, {**self.batch, "labels": self.labels}, self.items).item()

    def variants(self) -> dict[str, Callable[[], float]]:
        return {
            "ours": lambda: self.step_ours(10, self.anchor),
            "ours, no KL": lambda: self.step_ours(0, self.anchor),
            "published": self.step_published,
            "TRL NLL+KL": self.step_trl_kl,
            "TRL NLL": self.step_trl,
            "ours, ASFT": lambda: self.step_ours(10, self.asft),
            "LLaMA-Factory": self.step_llama_factory,
        }


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    options = build_parser().parse_args(argv)
    import torch

    bench = Bench(options, tempfile.mkdtemp())
    variants = bench.variants()
    second_bytes = sum(p.numel() * p.element_size() for p in bench.second.parameters())
    # a rate of 0, so that every variant sees the same weights
    optimizer = torch.optim.AdamW([p for p in bench.model.parameters() if p.requires_grad], lr=0.0)

    def whole_step(run: Callable[[], float]) -> float:
        loss = run()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    steps = {name: functools.partial(lambda run, number: whole_step(run), run) for name, run in variants.items()}
    samples = in_turns(steps, options.repeats)
    peaks = {name: statistics.median(sample.memory for sample in of_one) for name, of_one in samples.items()}
    for name in ("published", "LLaMA-Factory"):
        peaks[name] += second_bytes
    size = f"{options.batch} x {options.tokens} tokens, tail {options.tail}"
    print(f"{options.shape}, {size}, {bench.dtype}, {device_name()}")
    print(f"{'':14}{'time / ours':>12}{'extra memory / ours':>21}{'loss':>12}")
    result = {}
    for name, of_one in samples.items():
        result[name] = {
            "time": time_ratio(of_one, samples["ours"]),
            "memory": peaks[name] / max(1, peaks["ours"]),
            "loss": of_one[0].result,
        }
        print(f"{name:14}{result[name]['time']:12.2f}{result[name]['memory']:21.2f}{result[name]['loss']:12.5f}")
    asft = time_ratio(samples["LLaMA-Factory"], samples["ours, ASFT"])
    print(f"LLaMA-Factory's anchored SFT takes {asft:.2f} times the time of ours with the same loss")
    return result


def toy_tokenizer(kind: type):
    """The trainers ask for a tokenizer; the batch is token ids already."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    return kind(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="",
    )


if __name__ == "__main__":
    main()
