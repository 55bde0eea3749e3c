"""Trainer arguments, callbacks, checkpoints, resume."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.files import InputError, differing, file_sha256, write_atomic, write_json
from llm_alignment.models import LONGEST_WAIT, device_and_dtype, fetch_model, main_process, processes
from llm_alignment.runs import NotFiniteError

if TYPE_CHECKING:
    from transformers import Trainer


log = logging.getLogger("llm_alignment")


def training_arguments(
    args: argparse.Namespace, *, weight_decay: float, warmup_ratio: float, logging_steps: int
) -> dict:
    """The keyword arguments that SFTConfig and DPOConfig share here."""
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to}: it is not installed; python -m pip install {args.report_to}")
    device, dtype = device_and_dtype()
    checkpointing = device.type == "cuda" if args.gradient_checkpointing is None else args.gradient_checkpointing
    import torch

    return dict(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.grad_acc,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_ratio,  # below 1: a share of the steps
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        optim="paged_adamw_32bit" if device.type == "cuda" else "adamw_torch",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=checkpointing,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        report_to=args.report_to,
        run_name=args.exp_tag or Path(args.output_dir).name,
        disable_tqdm=not main_process(),
        ddp_timeout=int(LONGEST_WAIT.total_seconds()),
    )


def optimiser_steps(args: argparse.Namespace, rows: int) -> int:
    """Optimiser steps over `rows` examples, as the Trainer counts them."""
    return math.ceil(args.epochs * math.ceil(math.ceil(rows / (args.batch * processes())) / args.grad_acc))


def log_memory_plan(args: argparse.Namespace, tokens: int) -> None:
    """Says about how much memory training takes, with `tokens` the longest example; the weights are not loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        fetch_model(args.model, args.model_revision, "--model"), trust_remote_code=args.trust_remote_code
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    width = device_and_dtype()[1].itemsize
    embeddings = sum(p.numel() for p in {model.get_input_embeddings().weight, model.get_output_embeddings().weight})
    linear = model.num_parameters() - embeddings
    weights = embeddings * width + linear * (width if args.no_4bit else 0.53)  # 4 bits and the scales of 64 values
    kept_layers = config.num_hidden_layers * (1 if args.gradient_checkpointing is not False else 16)
    activations = args.batch * tokens * config.hidden_size * width * kept_layers
    logits = 2 * 128 * config.vocab_size * 4
    log.info("memory: about %.1f GiB of weights, %.1f GiB of activations and logits", weights / 2**30, (activations + logits) / 2**30)  # fmt: skip


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Writes adapter, tokenizer and model card into `folder`, file by file under a temporary name that is renamed."""
    trainer.save_model(str(folder / "saving"))
    if main_process():
        for path in (folder / "saving").iterdir():
            os.replace(path, folder / path.name)
        (folder / "saving").rmdir()
    trainer.create_model_card(model_name=folder.name)


def run_training(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains, from `checkpoint` if given, with complete checkpoints, a log on disk, and a stop that is never silent.

    Ctrl-C ends the step in hand, saves a checkpoint and raises KeyboardInterrupt; a second one stops at once. A loss
    or gradient that is not finite raises NotFiniteError before the optimiser steps.
    """
    import torch
    from transformers import TrainerCallback

    folder = Path(trainer.args.output_dir)
    interrupted = False

    class RunKeeper(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not args.fp16:  # with fp16 the gradient scaler skips such steps and lowers its scale
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                if not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
                    raise NotFiniteError(f"a gradient is not finite at step {state.global_step + 1}")

        def on_step_end(self, args, state, control, **kwargs):
            if interrupted:
                control.should_save = control.should_training_stop = True

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                seal_checkpoint(folder / f"checkpoint-{state.global_step}")

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs and not math.isfinite(logs["loss"]):
                raise NotFiniteError(f"the loss is {logs['loss']} at step {state.global_step}")
            if state.is_world_process_zero:
                lines = [json.dumps(entry) + "\n" for entry in state.log_history]
                write_atomic(folder / "train_log.jsonl", "".join(lines))

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        log.warning("Ctrl-C: finishing this step, then saving a checkpoint; press it again to stop at once")

    trainer.add_callback(RunKeeper())
    former = signal.signal(signal.SIGINT, interrupt)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        signal.signal(signal.SIGINT, former)
    if interrupted:
        raise KeyboardInterrupt


MANIFEST = "complete.json"


def seal_checkpoint(folder: Path) -> None:
    """Writes the manifest, last of all: name and SHA-256 of every file. A checkpoint without it is not complete."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(folder / MANIFEST, {path.name: file_sha256(path) for path in files})


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None when every file is what its manifest says."""
    if not (folder / MANIFEST).is_file():
        return "it was not finished"
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_sha256(folder / name) != digest:
            return f"{name} is damaged"
    return None


def find_checkpoint(args: argparse.Namespace, neutral: set[str]) -> Path | None:
    """The checkpoint to go on from, or None to start anew; says which, and names the ones passed over.

    Raises InputError when --output_dir holds another run and none is to be resumed, when a training flag differs from
    the interrupted run's (`neutral` flags do not change the training), or when the checkpoint named is not complete.
    """
    folder = Path(args.output_dir)
    if not args.resume_from_checkpoint:
        if (folder / "run.json").exists() or any(folder.glob("checkpoint-*")):
            raise InputError(
                f"--output_dir {folder} holds another run; name another folder, or go on with that run by "
                "--resume_from_checkpoint auto"
            )
        return None
    if args.resume_from_checkpoint == "auto":
        steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
        candidates = sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))
    else:
        candidates = [Path(args.resume_from_checkpoint)]
        problem = checkpoint_problem(candidates[0])
        if problem:
            raise InputError(
                f"--resume_from_checkpoint {candidates[0]}: {problem}; use auto to take the newest whole one"
            )
    run_file = (candidates[0].parent if candidates else folder) / "run.json"
    if run_file.exists():
        before = {
            key: value for key, value in json.loads(run_file.read_text("utf-8"))["args"].items() if key not in neutral
        }
        now = {key: value for key, value in json.loads(json.dumps(vars(args))).items() if key not in neutral}
        if before != now:
            raise InputError(f"{run_file.parent}: the interrupted run had other flags ({differing(before, now)})")
    for candidate in candidates:
        problem = checkpoint_problem(candidate)
        if problem is None:
            log.info("resuming from %s", candidate)
            return candidate
        log.warning("passed over %s: %s", candidate, problem)
    log.info("no complete checkpoint in %s: starting from the first step", folder)
    return None


# Flags that never change what is trained; a script adds its own evaluation flags where they do not either.
NEUTRAL_FLAGS = {
    "output_dir", "resume_from_checkpoint", "exp_log", "exp_tag", "report_to", "dry_run", "save_steps",
    "eval_batch_size", "no_baseline_cache", "num_proc",
}  # fmt: skip
