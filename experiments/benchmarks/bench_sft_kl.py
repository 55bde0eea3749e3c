"""Time and memory of one SFT+KL training step, against the published way, TRL and LLaMA-Factory's anchored SFT.

    python experiments/benchmarks/bench_sft_kl.py
    python experiments/benchmarks/bench_sft_kl.py --shape even --batch 8         (4.5 backbone parameters to one of the
    head) python experiments/benchmarks/bench_sft_kl.py --shape 1.7b --batch 12 --four_bit        (a CUDA GPU)

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
import copy
import gc
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPES = {
    "small": dict(
        vocab_size=151_936, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, intermediate_size=1536,
    ),
    "even": dict(  # the proportion of backbone to head that Qwen3-1.7B has
        vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=768,
    ),
    "1.7b": dict(
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=6144,
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--tail", type=int, default=128, help="last tokens of an example that the KL acts on")
    parser.add_argument("--four_bit", action="store_true", help="NF4 base")
    parser.add_argument("--repeats", type=int, default=7)
    return parser


class PeakMemory:
    """Bytes of the peak inside the block above what was held before it: GPU memory, or resident memory on Linux."""

    def __enter__(self) -> PeakMemory:
        import torch

        gc.collect()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self.extra = (torch.cuda.max_memory_allocated() if self.cuda else self.resident("VmHWM")) - self.before

    @staticmethod
    def resident(key: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", status).group(1))


class Bench:
    """The models, trainers and the batch that all steps share."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        import datasets
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
        from trl import SFTTrainer

        import sft_train
        from llm_alignment.models import device_and_dtype, load_model

        shape = SHAPES[options.shape]
        torch.manual_seed(0)
        self.device, self.dtype = device_and_dtype("auto")
        config = Qwen3Config(tie_word_embeddings=True, max_position_embeddings=4096, **shape)
        Qwen3ForCausalLM(config).to(self.dtype).save_pretrained(folder)
        flags = [
            "--model", folder, "--output_dir", f"{folder}/out", "--batch", str(options.batch), "--grad_acc", "1",
            "--kl_coef", "0.03", "--kl_warmup_steps", "1", "--kl_limit_seq", str(options.tail), "--lora_dropout", "0",
            "--learning_rate", "1e-4", "--max_seq_length", str(options.tokens),
        ]  # fmt: skip
        self.args = sft_train.build_parser().parse_args(flags + ([] if options.four_bit else ["--no_4bit"]))
        self.asft_args = copy.copy(self.args)
        self.asft_args.kl_limit_seq, self.asft_args.sft_loss, self.asft_args.kl_direction = 0, "dft", "forward"
        tokenizer = toy_tokenizer(PreTrainedTokenizerFast)
        size = (options.batch, options.tokens)
        ids = torch.randint(10, shape["vocab_size"], size, generator=torch.Generator().manual_seed(1))
        rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        self.ours = sft_train.build_trainer(self.args, load_model(self.args), tokenizer, rows, rows, options.batch)
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

    def step_ours(self, step: int, args: argparse.Namespace) -> float:
        self.ours.state.global_step, self.ours.flags = step, args
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
            loss = loss + self.args.kl_coef * (log_p.exp() * (log_p - log_r)).sum(-1).mean()
        loss.backward()
        return loss.item()

    def step_llama_factory(self) -> float:
        import torch

        with self.autocast:
            logits, reference = (x[:, :-1].float() for x in self.both_logits())
            log_p, log_r = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
            picked = log_p.gather(-1, self.labels[:, 1:, None])
            loss = -(picked.exp().detach() * picked).mean()
            loss = loss + self.args.kl_coef * (log_r.exp() * (log_r - log_p)).sum(-1).mean()
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
            loss = output.loss + self.args.kl_coef * divergence.mean()
        loss.backward()
        return loss.item()

    def step_trl(self) -> float:
        return self.stock.training_step(self.model, {**self.batch, "labels": self.labels}, self.items).item()

    def variants(self) -> dict[str, Callable[[], float]]:
        return {
            "ours": lambda: self.step_ours(10, self.args),
            "ours, no KL": lambda: self.step_ours(0, self.args),
            "published": self.step_published,
            "TRL NLL+KL": self.step_trl_kl,
            "TRL NLL": self.step_trl,
            "ours, ASFT": lambda: self.step_ours(10, self.asft_args),
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
    seconds, peaks, losses = ({name: [] for name in variants} for _ in range(3))
    for repeat in range(options.repeats + 1):
        for name, run in variants.items():
            with PeakMemory() as memory:
                start = time.perf_counter()
                loss = run()
                optimizer.step()
                if bench.device.type == "cuda":
                    torch.cuda.synchronize()
                elapsed = time.perf_counter() - start
            optimizer.zero_grad()
            if repeat:  # the first round warms up
                seconds[name].append(elapsed)
                peaks[name].append(memory.extra + (second_bytes if name in {"published", "LLaMA-Factory"} else 0))
                losses[name].append(loss)

    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.shape}, {options.batch} x {options.tokens} tokens, tail {options.tail}, {bench.dtype}, {device}")
    print(f"{'':14}{'time / ours':>12}{'extra memory / ours':>21}{'loss':>12}")
    result = {}
    for name in variants:
        result[name] = {
            "time": statistics.median(t / o for t, o in zip(seconds[name], seconds["ours"], strict=True)),
            "memory": statistics.median(peaks[name]) / max(1, statistics.median(peaks["ours"])),
            "loss": losses[name][0],
        }
        print(f"{name:14}{result[name]['time']:12.2f}{result[name]['memory']:21.2f}{result[name]['loss']:12.5f}")
    asft = [statistics.median(seconds[name]) for name in ("LLaMA-Factory", "ours, ASFT")]
    print(f"LLaMA-Factory's anchored SFT takes {asft[0] / asft[1]:.2f} times the time of ours with the same loss")
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
