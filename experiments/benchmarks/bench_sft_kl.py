"""Time and memory of one SFT+KL training step, against the published way and against TRL, side by side.

    python experiments/benchmarks/bench_sft_kl.py
    python experiments/benchmarks/bench_sft_kl.py --shape qwen3-1.7b --batch 12 --four_bit        (a CUDA GPU)

Five steps over the same batch, weights and adapter, interleaved in one process; medians, and ratios to the first:
    ours             this project's trainer: fused NLL+KL, the reference is the adapter switched off
    ours, no KL      the same before the KL sets in
    published        the published runs' way: a second full model as reference, full logits of both
    TRL NLL+KL       TRL's fused NLL and TRL's ChunkedDivergence as reverse KL, the adapter switched off
    TRL NLL          TRL's SFTTrainer as it ships, no KL
Extra memory is the peak during a step above the loaded student, plus the second model where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

SHAPES = {
    "small": dict(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        intermediate_size=1536,
    ),
    "qwen3-1.7b": dict(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=6144,
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


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    options = build_parser().parse_args(argv)
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    import sft_train
    from llm_alignment.models import device_and_dtype, load_model

    folder = tempfile.mkdtemp()
    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    device, dtype = device_and_dtype()
    config = Qwen3Config(vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=4096, **shape)
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    flags = [
        "--model", folder, "--output_dir", f"{folder}/out", "--batch", str(options.batch), "--grad_acc", "1",
        "--kl_coef", "0.03", "--kl_warmup_steps", "1", "--kl_limit_seq", str(options.tail), "--lora_dropout", "0",
        "--learning_rate", "1e-4", "--max_seq_length", str(options.tokens),
    ]  # fmt: skip
    args = sft_train.build_parser().parse_args(flags + ([] if options.four_bit else ["--no_4bit"]))
    tokenizer = toy_tokenizer(PreTrainedTokenizerFast)
    ids = torch.randint(10, 151_000, (options.batch, options.tokens), generator=torch.Generator().manual_seed(1))
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    selection = sft_train.Selection(0, {}, 0.0, Counter({("general", "train"): options.batch}), "")

    def our_trainer():
        return sft_train.build_trainer(args, load_model(args), tokenizer, rows, rows, selection, None)

    ours = our_trainer()
    with torch.no_grad():  # an adapter that has moved, so that the KL is not 0
        for name, parameter in ours.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    stock_model = ours.model  # the same weights: only the trainers differ
    stock = SFTTrainer(model=stock_model, args=ours.args, train_dataset=rows, processing_class=tokenizer)
    second = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).requires_grad_(False)
    second_bytes = sum(p.numel() * p.element_size() for p in second.parameters())
    model = ours.model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.0
    )  # so that every way sees the same weights
    base, weight = model.get_base_model(), model.get_output_embeddings().weight
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    labels, items = ids.to(device), torch.tensor(ids[:, 1:].numel(), device=device)
    coefficient, tail = args.kl_coef, options.tail
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def step_ours(step: int) -> float:
        ours.state.global_step = step
        iterator = iter([{**batch, "labels": labels}])
        (prepared,), num_items = ours.get_batch_samples(iterator, 1, device)
        return ours.training_step(model, prepared, num_items).item()

    def step_published() -> float:
        with autocast:
            logits = model(**batch, use_cache=False).logits
            with torch.no_grad():
                reference = second(**batch, use_cache=False).logits
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
            log_p = torch.log_softmax(logits[:, -tail - 1 : -1].float(), -1)
            log_r = torch.log_softmax(reference[:, -tail - 1 : -1].float(), -1)
            loss = loss + coefficient * (log_p.exp() * (log_p - log_r)).sum(-1).mean()
        loss.backward()
        return loss.item()

    def step_trl_kl() -> float:
        hidden = []
        hook = base.model.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state))
        with autocast:
            output = model(**batch, labels=labels, num_items_in_batch=items, fused_lm_head=True)
            with torch.no_grad(), model.disable_adapter():
                base.model(**batch, use_cache=False)
            student, teacher = (h[:, -tail - 1 : -1].flatten(0, 1) for h in hidden)
            hook.remove()
            divergence, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 1.0)
            loss = output.loss + coefficient * divergence.mean()
        loss.backward()
        return loss.item()

    def step_trl() -> float:
        return stock.training_step(model, {**batch, "labels": labels}, items).item()

    ways = {
        "ours": lambda: step_ours(10),
        "ours, no KL": lambda: step_ours(0),
        "published": step_published,
        "TRL NLL+KL": step_trl_kl,
        "TRL NLL": step_trl,
    }
    seconds, peaks, losses = ({way: [] for way in ways} for _ in range(3))
    for repeat in range(options.repeats + 1):
        for way, run in ways.items():
            with PeakMemory() as memory:
                start = time.perf_counter()
                loss = run()
                optimizer.step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                elapsed = time.perf_counter() - start
            optimizer.zero_grad()
            if repeat:  # the first round warms up
                seconds[way].append(elapsed)
                peaks[way].append(memory.extra + (second_bytes if way == "published" else 0))
                losses[way].append(loss)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.shape}, {options.batch} x {options.tokens} tokens, tail {tail}, {dtype}, {name}")
    print(f"{'':14}{'time / ours':>12}{'extra memory / ours':>21}{'loss':>12}")
    result = {}
    for way in ways:
        result[way] = {
            "time": statistics.median(t / o for t, o in zip(seconds[way], seconds["ours"], strict=True)),
            "memory": statistics.median(peaks[way]) / statistics.median(peaks["ours"]),
            "loss": losses[way][0],
        }
        print(f"{way:14}{result[way]['time']:12.2f}{result[way]['memory']:21.2f}{result[way]['loss']:12.5f}")
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
