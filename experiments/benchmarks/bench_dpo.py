"""A DPO training step: TRL's DPOTrainer as it ships, and dpo_train.py's, without and with the prompt read once.

    python experiments/benchmarks/bench_dpo.py                (hidden 512, 8 layers, vocabulary 151,936, float32)
    python experiments/benchmarks/bench_dpo.py --shape 1.7b   (Qwen3-1.7B's shape with random weights, bfloat16, CUDA)

One process, the same batch and adapter, steps interleaved, medians; the ratios are the result. Peak memory is what a
step allocates on top of what it found: on CPU by torch's profiler, on CUDA by the caching allocator.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPES = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 64,
    },
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "head_dim": 128,
    },
}
DEFAULTS = {
    "small": {"prompt": 600, "answer": 8, "pairs": 2, "rounds": 3},
    "1.7b": {"prompt": 700, "answer": 6, "pairs": 8, "rounds": 7},
}
# name: (prefix sharing, None for TRL's trainer untouched; gradient checkpointing, None for dpo_train.py's default)
VARIANTS = {
    "TRL 1.16": (None, True),
    "TRL 1.16, activations kept": (None, False),
    "--no_prefix_sharing": (False, None),
    "shared prefix": (True, None),
}


def build_trainer(args: argparse.Namespace, sharing: bool | None, checkpointing: bool | None):
    """A DPOTrainer over a random model; with `sharing` None it is TRL's, untouched."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import DPOConfig, DPOTrainer

    from dpo_train import add_prefix_sharing

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(1000)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=151_936, num_key_value_heads=8, **SHAPES[args.shape])
    model = Qwen3ForCausalLM(config).to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    rng = random.Random(0)

    def text(n_tokens: int) -> str:
        return " ".join(f"w{rng.randrange(1000)}" for _ in range(n_tokens))

    # TRL adds the end token to each answer
    lengths = {"prompt": args.prompt, "chosen": args.answer - 1, "rejected": args.answer - 1}
    rows = [{key: f" {text(length)}" for key, length in lengths.items()} for _ in range(args.pairs)]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.pairs,
        gradient_checkpointing=args.device == "cuda" if checkpointing is None else checkpointing,
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        max_length=args.prompt + args.answer,
        report_to="none",
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    if sharing is not None:
        add_prefix_sharing(trainer.model.get_base_model(), sharing=sharing)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what train() sets before its first step
    return trainer


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


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, help="tokens of an answer")
    parser.add_argument("--pairs", type=int, help="pairs in a step")
    parser.add_argument("--rounds", type=int, help="timed steps of each variant")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    import torch

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    trainers = {name: build_trainer(args, *settings) for name, settings in VARIANTS.items()}
    batch = next(iter(trainers["TRL 1.16"].get_train_dataloader()))
    losses, times, memory = {}, {name: [] for name in trainers}, {}
    for name, trainer in trainers.items():  # the first step warms up and measures memory
        memory[name] = peak_memory(
            lambda trainer=trainer, name=name: losses.update({name: step(trainer, batch)}), args.device
        )
    for _ in range(args.rounds):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            step(trainer, batch)
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    print(f"{args.shape} shape, {args.pairs} pairs, prompt {args.prompt}, answers {args.answer}, {args.device}")
    for name in trainers:
        print(
            f"{name:27} step {seconds['TRL 1.16'] / seconds[name]:6.2f}x as fast as TRL, "
            f"peak extra memory {memory[name] / memory['TRL 1.16']:5.2f} of TRL's, loss {losses[name]:.6f}"
        )
    ratios = {
        "speed_up": seconds["TRL 1.16"] / seconds["shared prefix"],
        "sharing_alone": seconds["--no_prefix_sharing"] / seconds["shared prefix"],
        "memory": memory["shared prefix"] / memory["TRL 1.16"],
    }
    print(f"prefix sharing alone: {ratios['sharing_alone']:.2f}x over --no_prefix_sharing")
    return ratios


if __name__ == "__main__":
    main()
