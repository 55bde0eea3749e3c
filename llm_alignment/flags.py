"""argparse types, the flag groups that scripts share, and the demo's defaults."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def fill(kind: type[T], args: argparse.Namespace, **more: Any) -> T:
    """The dataclass `kind`, its fields filled by the flags of their names, or by `more`.

    The only bridge from the command line to plain values. A field without a flag needs a value in `more` or a default.
    """
    names = {field.name for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(args).items() if name in names} | more)


def ratio(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0..1")
    return value


def dropout(text: str) -> float:
    """argparse type: a share of what is dropped, which leaves something to train on."""
    value = ratio(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 drops everything, so that nothing is trained")
    return value


def in_32_bits(value: float) -> float:
    """The number itself. Raises ArgumentTypeError for one that is not finite, or larger than what counts here."""
    if not abs(value) < 2**31:
        raise argparse.ArgumentTypeError(f"not a finite number below {2**31}")
    return value


def positive_ratio(text: str) -> float:
    """argparse type: a number above 0, up to 1."""
    value = ratio(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def positive(kind: type) -> Callable[[str], Any]:
    """argparse type: an int or float above 0."""

    def parse(text: str) -> Any:
        value = in_32_bits(kind(text))
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(kind: type) -> Callable[[str], Any]:
    """argparse type: an int or float of 0 or more."""

    def parse(text: str) -> Any:
        value = in_32_bits(kind(text))
        if value < 0:
            raise argparse.ArgumentTypeError(f"{text} is below 0")
        return value

    parse.__name__ = f"{kind.__name__} of 0 or more"
    return parse


def temperature(text: str) -> float:
    """argparse type: 0, which is greedy, or a temperature by which logits can be divided."""
    value = not_negative(float)(text)
    if 0 < value < 1e-6:
        raise argparse.ArgumentTypeError(f"{text} is too near to 0; give 0 for greedy answers, or 1e-6 or more")
    return value


def positive_temperature(text: str) -> float:
    """argparse type: a temperature of sampling."""
    return temperature(str(positive(float)(text)))


def seed(text: str) -> int:
    """argparse type: a whole number that numpy takes as a seed too, 0 .. 2**32 - 1."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not within 0..{2**32 - 1}")
    return value


def tracker(text: str) -> str:
    """argparse type: a tracker of the training that is installed, or "none"; others are left to the choices."""
    if text in TRACKERS and importlib.util.find_spec(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is not installed; python -m pip install {text}")
    return text


TRACKERS = ("trackio", "tensorboard", "wandb")


def new_parser(script: str, docstring: str) -> argparse.ArgumentParser:
    """A parser whose errors stay short and that takes no abbreviated flags, which would hide a misspelt one."""
    return argparse.ArgumentParser(
        prog=f"python {script}",
        usage=f"python {script} [--flag value ...]   (--help lists the flags)",
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="Qwen/Qwen3-1.7B", help="hub id or local folder (default: %(default)s)")
    add("--model_revision", default=None, help="branch, tag or commit on the hub (default: the main branch)")
    add("--no_4bit", action="store_true", help="load the base in full precision, not in 4 bits")
    add("--quant_type", choices=["nf4", "fp4"], default="nf4", help="4-bit format (default: %(default)s)")
    add(
        "--dtype",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="type of the weights and of computing; auto: bf16 where the GPU has it, else fp16, fp32 on CPU "
        "(default: %(default)s)",
    )
    add("--trust_remote_code", action="store_true", help="run code that a model's repository ships")
    add(
        "--thinking",
        action="store_true",
        help="Qwen3 may think before it answers: prompts end without the empty <think></think> block, and thoughts in "
        "the data are trained on (without it every answer follows an empty block, and thoughts are left out)",
    )


def add_lora_flags(parser: argparse.ArgumentParser, *, in_stages: bool = False) -> None:
    """The adapter's flags; a script that trains `in_stages` has rank and alpha of its own for each stage."""
    add = parser.add_argument_group("LoRA").add_argument
    if not in_stages:
        add("--lora_r", type=positive(int), default=8, help="rank (default: %(default)s)")
        add("--lora_alpha", type=positive(int), default=16, help="scale is alpha / rank (default: %(default)s)")
    add("--lora_dropout", type=dropout, default=0.05, help="dropout before the adapter (default: %(default)s)")
    add(
        "--target_modules",
        default="q_proj,v_proj",
        help="comma-separated layers that get an adapter, or all-linear (default: %(default)s)",
    )


def add_training_flags(parser: argparse.ArgumentParser, *, in_stages: bool = False) -> None:
    """What every training script trains with; each script sets its own defaults with `parser.set_defaults`.

    A script that trains `in_stages` has epochs and learning rate of its own for each stage, and takes no checkpoint
    by its path: the stages know theirs.
    """
    add = parser.add_argument_group("training").add_argument
    if not in_stages:
        add(
            "--epochs",
            type=positive(float),
            default=1.0,
            help="passes over the data, 0.5 is fine (default: %(default)s)",
        )
        add("--learning_rate", type=positive(float), help="peak of the cosine (default: %(default)s)")
    add("--batch", type=positive(int), help="examples per device and forward pass (default: %(default)s)")
    add("--grad_acc", type=positive(int), default=16, help="passes per optimiser step (default: %(default)s)")
    add(
        "--gradient_checkpointing",
        nargs="?",
        choices=["auto", "on", "off"],
        const="on",
        default="auto",
        help="recompute activations to save memory; auto: only where the GPU would otherwise have less than a quarter "
        "of its memory free (default: %(default)s)",
    )
    add(
        "--no-gradient_checkpointing",
        dest="gradient_checkpointing",
        action="store_const",
        const="off",
        help="the same as --gradient_checkpointing off",
    )
    add("--save_steps", type=positive(int), default=50, help="steps between checkpoints (default: %(default)s)")
    add(
        "--resume_from_checkpoint",
        choices=["auto"] if in_stages else None,
        metavar="auto" if in_stages else "auto|PATH",
        default=None,
        help="continue from a checkpoint; auto takes the newest complete one of --output_dir (default: start again)",
    )


def add_run_flags(parser: argparse.ArgumentParser, exp_log: str, *, trains: bool = True) -> None:
    """Flags of every run; --report_to is there for a script that trains."""
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=seed, default=42, help="seed of everything random (default: %(default)s)")
    add("--dry_run", action="store_true", help="check data, model files and adapter, print the plan, and exit")
    add("--demo", action="store_true", help="a miniature of the experiment: CPU, minutes, no downloads")
    if trains:
        add(
            "--report_to",
            type=tracker,
            choices=["none", *TRACKERS],
            default="none",
            help="tracker of the training (default: %(default)s)",
        )
    add("--exp_log", default=exp_log, help="JSONL file that gets the run's record (default: %(default)s)")
    add("--exp_tag", default="", help="a name for the run in that file, for rerun.py and report.py")
    add = add_scoring_flags(parser)
    add(
        "--no_baseline_cache",
        action="store_true",
        help="compute the baseline and the reference of DPO again instead of taking them from the cache",
    )


def add_scoring_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """The reward model and its batches; returns the function that adds more flags to their group."""
    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--eval_batch_size",
        type=not_negative(int),
        default=0,
        help="answers in one batch, and rewards; 0 = by free memory (default: %(default)s)",
    )
    add(
        "--reward_model",
        default="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        help="hub id or folder of a sequence classifier with one label (default: %(default)s)",
    )
    return add


def add_mtbench_flags(add: Callable[..., argparse.Action]) -> None:
    """How the questions of MT-Bench are sampled and answered; `add` adds a flag to the script's own group."""
    add("--mtbench_questions_seed", type=seed, default=42, help="seed of the samples (default: %(default)s)")
    add(
        "--mtbench_temperature",
        type=temperature,
        default=0.0,
        help="0 answers greedily (default: %(default)s)",
    )
    add("--mtbench_max_tokens", type=positive(int), default=1024, help="new tokens a turn (default: %(default)s)")
    add(
        "--mtbench_backend",
        choices=["simple", "auto"],
        default="simple",
        help="auto: continuous batching on a GPU (default: %(default)s)",
    )


DEMO_DIR = Path(__file__).resolve().parents[1] / "experiments" / "demo"

DPO_DEMO = dict(
    model=str(DEMO_DIR / "model"),
    reward_model=str(DEMO_DIR / "reward_model"),
    tatqa_dir=str(DEMO_DIR / "tatqa"),
    mtbench_file=str(DEMO_DIR / "mt_bench_en.jsonl"),
    output_dir="demo_dpo",
    limit_pairs=480,
    beta=0.5,
    batch=4,
    grad_acc=2,
    learning_rate=1e-3,
    eval_limit=200,
    eval_max_new_tokens=16,
    eval_pairs=200,
    mtbench_max_tokens=32,
    instruct_max_tokens=32,
)
FINANCE_DEMO = {
    **{name: value for name, value in DPO_DEMO.items() if name != "eval_pairs"},  # a flag of dpo_train.py alone
    "reddit_dataset": str(DEMO_DIR / "reddit.jsonl"),
    "finance_dataset": str(DEMO_DIR / "finance_instruct.jsonl"),
    "general_dataset": str(DEMO_DIR / "orca_pairs.jsonl"),
    "reddit_sample_rate": 1.0,
    "finance_instruct_pairs": 120,
    "general_pairs": 120,
    "instruct_limit": 40,
    "instruct_max_tokens": 48,
    "reddit_limit": 40,
    "reddit_max_tokens": 48,
    "limit_pairs": 0,
}


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None, demo: dict[str, Any]
) -> argparse.Namespace:
    """Parses `argv`, or the command line; with --demo flags that the user did not give take their values from `demo`.

    A demo's output folder is the first free one of NAME_1, NAME_2, ..., so that the demo can be run again; one that
    goes on, from a checkpoint or a stage, takes the last one. A text that is empty, as of a shell variable that is not
    set, is an error: as a path it would be the working folder.
    """
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == "" and parser.get_default(name) != "":
            parser.error(f"argument --{name}: it is empty; give a value or leave the flag out")
    if args.demo:
        number = 1
        while Path(f"{demo['output_dir']}_{number}").exists():
            number += 1
        later_stage = getattr(args, "resume_from_stage", None) or getattr(args, "stage", 0) > 1
        if (args.resume_from_checkpoint or later_stage) and number > 1:
            number -= 1
        parser.set_defaults(**{**demo, "output_dir": f"{demo['output_dir']}_{number}"})
        args = parser.parse_args(argv)
    return args
