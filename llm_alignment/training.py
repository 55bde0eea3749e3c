"""Trainer arguments, callbacks, checkpoints, resume."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import safe_globals

from llm_alignment import files
from llm_alignment.adapters import LoraSettings, check_model, new_adapter, saved_settings
from llm_alignment.devices import GIB, free_memory, memory_estimate, rows_at_once, tf32
from llm_alignment.encoder import own_tokens
from llm_alignment.endings import Interrupted, NotFiniteError, signal_name, signals_go_to
from llm_alignment.evaluation import parse_gates
from llm_alignment.files import InputError, log
from llm_alignment.flags import fill
from llm_alignment.models import Base, BaseFlags, load_tokenizer, one_line, resolve_base
from llm_alignment.processes import DDP_TIMEOUT, gathered, main_process, processes
from llm_alignment.runs import check_writable, damaged_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What a trainer is told; most fields are flags of that name."""

    output_dir: str
    epochs: float
    max_steps: int  # 0: after the epochs
    batch: int  # examples per device and forward pass
    grad_acc: int
    learning_rate: float
    save_steps: int
    seed: int
    report_to: str
    exp_tag: str
    gradient_checkpointing: str
    longest: int = 0  # tokens of the longest example; DPO's own settings know theirs
    longest_answer: int = 0  # of DPO: tokens of the longest answer, which go through the head
    weight_decay: float = 0.0
    warmup_ratio: float = 0.05
    logging_steps: int = 5

    @property
    def step(self) -> int:
        """Examples of an optimiser step, in all processes."""
        return self.batch * self.grad_acc * processes()


@dataclasses.dataclass(frozen=True)
class DpoSettings:
    """The flags of that name."""

    beta: float
    loss_type: str
    loss_weights: str
    label_smoothing: float
    max_length: int  # tokens of prompt and answer
    no_prefix_sharing: bool
    group_by_table: bool

    def sized(self, settings: TrainingSettings, pairs: Iterable[tuple[int, ...]], is_shared: bool) -> TrainingSettings:
        """The settings with the sizes of the longest of the `pairs`, as the plan of the memory needs them: a prompt
        with both answers where it is read once, else two rows as long as the longer one. `pairs`: tokens of prompt,
        chosen and rejected answer."""
        longest = longest_answer = 0
        for prompt, *answers in pairs:
            cut = [max(0, min(answer, self.max_length - prompt)) for answer in answers]
            longest = max(longest, prompt + sum(cut) if is_shared else 2 * (prompt + max(cut)))
            longest_answer = max(longest_answer, *cut)
        return dataclasses.replace(settings, longest=longest, longest_answer=longest_answer)


def training_arguments(settings: TrainingSettings, base: Base, lora: LoraSettings) -> dict:
    """The keyword arguments that SFTConfig and DPOConfig share here."""
    is_cpu = base.device.type == "cpu"
    if base.dtype == torch.float16 and is_cpu:
        log.warning("--dtype fp16 on CPU: gradients are not scaled there, and small ones become 0; use it for tests")
    same = ("output_dir", "learning_rate", "weight_decay", "logging_steps", "save_steps", "seed", "report_to")
    return {name: getattr(settings, name) for name in same} | dict(
        num_train_epochs=settings.epochs, max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch, gradient_accumulation_steps=settings.grad_acc,
        lr_scheduler_type="cosine", max_grad_norm=1.0, optim="adamw_torch" if is_cpu else "paged_adamw_32bit",
        warmup_steps=min(settings.warmup_ratio, math.nextafter(1, 0)),  # below 1 a share of the steps; 1 would be one
        bf16=base.dtype == torch.bfloat16, fp16=base.dtype == torch.float16 and not is_cpu, use_cpu=is_cpu,
        gradient_checkpointing=uses_checkpointing(settings, base, lora),
        logging_first_step=True, logging_nan_inf_filter=False, save_total_limit=2, disable_tqdm=not main_process(),
        run_name=settings.exp_tag or Path(settings.output_dir).name,
        ddp_timeout=int(DDP_TIMEOUT.total_seconds()), ddp_find_unused_parameters=False,
        include_num_input_tokens_seen="non_padding",  # for the tokens per second in the log
    )  # fmt: skip


def optimiser_steps(settings: TrainingSettings, rows: int) -> int:
    """Optimiser steps over `rows` examples, as the Trainer counts them."""
    passes = math.ceil(rows / (settings.batch * processes()))
    return settings.max_steps or math.ceil(settings.epochs * math.ceil(passes / settings.grad_acc))


def memory_of(settings: TrainingSettings, base: Base, lora: LoraSettings) -> dict[str, int]:
    """`memory_estimate` for micro-batches of the longest examples; those of DPO by `DpoSettings.sized`."""
    config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=base.trust_remote_code)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=base.trust_remote_code)
        model = new_adapter(model, lora)
    sizes = {"tokens": settings.batch * settings.longest, "scored": 2 * settings.batch * settings.longest_answer}
    sizes |= {"width": base.dtype.itemsize, "chunk": rows_at_once(config.get_text_config().vocab_size, base.device)}
    return memory_estimate(model, in_4bit=base.quantization != "none", dropout=bool(lora.lora_dropout), **sizes)


def uses_checkpointing(settings: TrainingSettings, base: Base, lora: LoraSettings) -> bool:
    """--gradient_checkpointing; auto: off on CPU, and where training fits without it in every process."""
    if settings.gradient_checkpointing != "auto":
        return settings.gradient_checkpointing == "on"
    if not torch.cuda.is_available():
        return False
    free, needed = free_memory()[0], memory_of(settings, base, lora)  # of which the weights are loaded already
    is_full = 1.15 * sum(needed[part] for part in ("adapter", "activations", "logits")) + GIB > free
    is_on = any(gathered([is_full]))  # ranks that decide differently wait for each other forever
    log.info("gradient checkpointing %s: %.1f GiB are free", "on" if is_on else "off", free / GIB)
    return is_on


def log_memory_plan(settings: TrainingSettings, base: Base, lora: LoraSettings) -> None:
    """Logs the `memory_estimate` of a micro-batch of the longest examples."""
    needed = {part: size / GIB for part, size in memory_of(settings, base, lora).items()}
    common = needed["weights"] + needed["adapter"] + needed["logits"] + needed["context"]
    log.info("device: %s, %s", base.device_name, base.dtype_name)
    parts = ", ".join(f"{part} {size:.2f}" for part, size in needed.items())
    with_and_without = (common + needed[part] for part in ("checkpointed", "activations"))
    message = "memory: about %.2f GiB with gradient checkpointing, %.2f GiB without (%s); --gradient_checkpointing %s"
    log.info(message, *with_and_without, parts, settings.gradient_checkpointing)


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Writes adapter and tokenizer into `folder`, file by file under a temporary name that is renamed."""
    for config in trainer.model.peft_config.values():
        if isinstance(config.target_modules, set):  # which is written in another order by every process
            config.target_modules = sorted(config.target_modules)
    trainer.save_model(str(folder / "saving"))
    if main_process():
        (folder / "saving" / "README.md").unlink(missing_ok=True)  # PEFT's card; `write_card` writes ours
        for path in (folder / "saving").iterdir():
            files.replace(path, folder / path.name)
        (folder / "saving").rmdir()


def run_training(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains, from `checkpoint` if given, to the last step, with whole checkpoints and a log on disk. Ctrl-C, SIGTERM
    and SIGHUP finish the micro-batch, save a checkpoint of the last whole step and raise Interrupted; a second signal,
    a second or more later, stops at once. A loss or gradient that is not finite anywhere raises NotFiniteError in all
    processes at the same step."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps:  # the Trainer itself would take one more step
            log.info("training had ended at step %d; no further step is taken", state.global_step)
            history = Path(trainer.args.output_dir) / "train_log.jsonl"
            if history.exists():  # it has what was logged after that checkpoint too
                state.log_history = files.read_records(history)
            trainer.state = state
            trainer._load_from_checkpoint(str(checkpoint))
            return
    keeper = RunKeeper(trainer, checkpoint)
    trainer.add_callback(keeper)
    with signals_go_to(keeper.on_signal), tf32(trainer.args.bf16 or trainer.args.fp16):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if keeper.signal:  # it came after the last micro-batch
        raise Interrupted(keeper.signal)


class RunKeeper(TrainerCallback):
    """Ends micro-batches in all processes together, saves when a signal came, marks checkpoints, writes the log, gives
    transformers' own bar a name and the loss."""

    def __init__(self, trainer: Trainer, checkpoint: Path | None):
        self.trainer, self.checkpoint = trainer, checkpoint
        self.signal, self.signal_time = 0, 0.0  # the first one that came
        self.in_steps = False  # False while the trainer loads or evaluates, which a signal stops at once
        self.saved_step = None  # of the newest checkpoint in the run's folder
        self.skipped_steps = 0
        self.last_step = None  # random state and tokens seen at the end of the last whole step
        if bar := trainer.pop_callback(ProgressCallback):  # in the main process alone
            trainer.add_callback(bar)  # before this one: it is there when this one names it
        self.bar = bar

    def on_signal(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.signal and now - self.signal_time < 1:
            return  # Slurm and systemd signal every process of a job, and a launcher passes its own signal on
        if self.signal or not self.in_steps:
            raise Interrupted(signum)
        self.signal, self.signal_time = signum, now
        log.warning("%s: finishing this micro-batch, then saving; a second signal stops at once", signal_name(signum))

    def on_train_begin(self, args, state, control, **kwargs):
        if self.checkpoint is not None:
            state.compute_steps(args, state.max_steps)  # of logs and checkpoints: these flags may change
            self.trainer._load_rng_state(str(self.checkpoint))
            if self.checkpoint.resolve().parent == Path(args.output_dir).resolve():
                self.saved_step = state.global_step
        self.last_step = random_state(), state.num_input_tokens_seen
        self.first_step, self.started = state.global_step, time.monotonic()
        if bar := getattr(self.bar, "training_bar", None):
            bar.set_description("training")
        if state.max_steps == 1 and args.get_warmup_steps(1):
            advice = "lower --batch or raise --epochs"
            log.warning("the only step is a warmup step of rate 0: nothing is trained; %s", advice)

    def on_step_begin(self, args, state, control, **kwargs):
        self.in_steps = True

    def on_substep_end(self, args, state, control, **kwargs):
        """After every micro-batch but a step's last one. All processes meet here, so that they stop together."""
        mine = torch.stack([self.trainer._tr_loss.float(), torch.tensor(float(self.signal), device=args.device)])
        losses, signals = self.trainer.accelerator.gather(mine[None]).T.tolist()
        for rank, loss in enumerate(losses):
            if not math.isfinite(loss):
                where = f" in process {rank}" if len(losses) > 1 else ""
                raise NotFiniteError(f"the loss is {loss} at step {state.global_step + 1}{where}")
        if any(signals):
            if state.global_step != self.saved_step:
                generators, state.num_input_tokens_seen = self.last_step
                for put_back, of_step in generators:
                    put_back(of_step)
                self.trainer._save_checkpoint(self.trainer.model, None)
                self.on_save(args, state, control)
            raise Interrupted(int(max(signals)))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.on_substep_end(args, state, control)
        if not args.fp16:  # with fp16 the gradient scaler skips such steps and lowers its scale
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
                raise NotFiniteError(f"a gradient is not finite at step {state.global_step + 1}")

    def on_step_end(self, args, state, control, **kwargs):
        self.skipped_steps = self.skipped_steps + 1 if self.trainer.accelerator.optimizer_step_was_skipped else 0
        if (count := self.skipped_steps) == MAX_SKIPPED_STEPS:
            raise NotFiniteError(f"a gradient is not finite in fp16, {count} steps in a row up to {state.global_step}")
        self.last_step = random_state(), state.num_input_tokens_seen
        self.in_steps = not control.should_evaluate
        if state.global_step - self.first_step == 10 and state.is_world_process_zero:
            steps, seconds = state.max_steps - self.first_step, (time.monotonic() - self.started) / 10
            log.info("training takes about %.1f min for %d steps", seconds * steps / 60, steps)

    def on_evaluate(self, args, state, control, **kwargs):
        self.last_step = random_state(), state.num_input_tokens_seen
        self.in_steps = True

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()  # every process has written its own files
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}", RUN)
        self.saved_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.bar:
            self.bar.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")
        if state.is_world_process_zero:
            files.write_rows(Path(args.output_dir) / "train_log.jsonl", state.log_history)


def random_state() -> list[tuple[Any, Any]]:
    """The random generators of training: what sets each, and its state now."""
    devices = [torch, torch.cuda] if torch.cuda.is_available() else [torch]
    of_torch = [(each.set_rng_state, each.get_rng_state()) for each in devices]
    return [(random.setstate, random.getstate()), (numpy.random.set_state, numpy.random.get_state()), *of_torch]


MAX_SKIPPED_STEPS = 20  # in a row, with fp16, before the run stops
MANIFEST = "complete.json"
RUN = "../run.json"  # of the run that saved the checkpoint


def write_manifest(folder: Path, *others: str) -> None:
    """Marks a checkpoint complete: writes name and SHA-256 of every file, and of `others` if there, last of all."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST) + list(others)
    paths = {name: folder / name for name in names if (folder / name).is_file()}
    files.write_json(folder / MANIFEST, {name: files.file_sha256(path) for name, path in paths.items()})


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None when every file is what its manifest says."""
    if not (folder / MANIFEST).is_file():
        return "it was not finished"
    try:
        digests = files.parse_json((folder / MANIFEST).read_bytes())
    except ValueError:
        digests = None
    if not isinstance(digests, dict) or not digests:
        return f"{MANIFEST} is damaged"
    saved_by = digests.pop(RUN, None)
    if saved_by and (folder / RUN).is_file() and files.file_sha256(folder / RUN) != saved_by:
        return "it is of another run"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if files.file_sha256(folder / name) != digest:
            return f"{name} is damaged"
    return None


def state_problem(folder: Path) -> str | None:
    """Why the files of a complete checkpoint cannot be loaded; None when they can. No code of pickled objects runs."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    moments = "state1" if torch.cuda.is_available() else "exp_avg"  # of bitsandbytes' AdamW, and of torch's
    within = Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY  # where bitsandbytes keeps its moments
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        try:
            with safe_globals():
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive, or objects: anything
            return f"{path.name} cannot be loaded ({one_line(error)})"
        if path.name == "optimizer.pt":
            try:
                sizes = sorted(each.get(within, each)[moments].shape for each in state["state"].values())
            except (KeyError, TypeError, AttributeError):
                return f"{path.name} is the state of another optimiser"
            if sizes != sorted(tensor.shape for tensor in load_file(folder / "adapter_model.safetensors").values()):
                return f"{path.name} is the state of an optimiser of other tensors"
    return None


def newest_complete(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from, None to start from the first step; names it, and the ones skipped. Raises
    InputError when the one that `resume` (--resume_from_checkpoint) names is not complete."""
    if resume is None:
        return None
    by_step = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    newest_first = sorted(filter(str.isdecimal, by_step), key=int, reverse=True)
    for path in [by_step[step] for step in newest_first] if resume == "auto" else [Path(resume)]:
        problem = (checkpoint_problem(path) or state_problem(path)) if path.is_dir() else "no such folder"
        if problem is None:
            log.info("resuming from %s", path)
            return path
        if resume != "auto":
            raise InputError(f"--resume_from_checkpoint {resume}: {problem}; use auto to take the newest complete one")
        log.warning("skipped %s: %s", path, problem)
    log.info("no complete checkpoint in %s: starting from the first step", folder)
    return None


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run stands on: base, tokenizer, the adapter's settings, and its folder, with the run to be resumed."""

    base: Base
    tokenizer: PreTrainedTokenizerBase
    lora: LoraSettings
    folder: Path
    resume: str | None  # --resume_from_checkpoint
    flags: dict[str, Any]  # the values of those that change what is trained

    def check_folder(self, data: dict | None = None) -> None:
        """Raises InputError when the folder holds another run: without `resume` any, with it one that `check_same_run`
        finds to be another. To be called before anything is written, and again with the data's fingerprint."""
        if self.resume is None:
            if (self.folder / "run.json").exists() or any(self.folder.glob("checkpoint-*")):
                advice = "name another folder, or --resume_from_checkpoint auto"
                raise InputError(f"--output_dir {self.folder} holds another run; {advice}")
            return
        for folder in sorted({self.folder, self.folder if self.resume == "auto" else Path(self.resume).parent}):
            if (folder / "run.json").exists():
                check_same_run(folder, self.flags, self.base, data)
            elif any(folder.glob("checkpoint-*")):
                log.warning("no run.json in %s: the flags and data of its checkpoints cannot be checked", folder)


def set_up(
    args: argparse.Namespace, record: dict, neutral: set[str], *, longest: int, lora: LoraSettings | None = None
) -> Setup:
    """Looks up the base, checks its files, the adapter, whose settings go into the record, and --eval_save_json.
    `neutral`: flags that do not change what is trained; `longest`: tokens of the longest example; `lora`: of a script
    without such flags."""
    parse_gates(args.gates)  # before anything is generated; whether they are measured is known later
    if getattr(args, "eval_save_json", ""):
        check_writable(Path(args.eval_save_json), "--eval_save_json")
    base, lora = resolve_base(fill(BaseFlags, args)), lora or fill(LoraSettings, args)
    if adapter := getattr(args, "load_adapter", ""):
        lora = saved_settings(adapter, lora)
        record["args"] = {**record["args"], **dataclasses.asdict(lora)}
    flags = {name: value for name, value in record["args"].items() if name not in neutral}
    tokenizer = load_tokenizer(base)
    if args.system_prompt and (found := own_tokens(tokenizer).search(args.system_prompt)):
        raise InputError(f"--system_prompt: it contains the chat template's own {found[0]!r}; leave that out")
    ways = {name: getattr(args, name, False) for name in ("packing", "group_by_table")}
    check_model(base, tokenizer, lora=lora, adapter=adapter, longest=longest, **ways)
    return Setup(base, tokenizer, lora, Path(args.output_dir), args.resume_from_checkpoint, flags)


def check_same_run(folder: Path, flags: dict[str, Any], base: Base, data: dict | None = None) -> None:
    """Raises InputError that lists the differences between the run in `folder` (its run.json) and this one: in
    `flags`, those that change what is trained, number of processes, base, its type, and `data`, if given."""
    path, device = folder / "run.json", {"processes": processes(), "dtype": base.dtype_name}
    now = {"args": flags, "device": device, "data": data, "base": base.identity}
    try:
        stored = files.parse_json(path.read_bytes())
        before, after = (
            {f"--{name}": value for name, value in run["args"].items() if name in flags}
            | {name: run["device"][name] for name in ("processes", "dtype")}
            | ({"weights, tokenizer or config of --model": run["base"]} if "base" in stored else {})  # older ones: no
            | ({f"data {name}": value for name, value in run["data"].items()} if data is not None else {})
            for run in (stored, json.loads(json.dumps(now)))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged_run(path) from error
    # a flag that is newer than the stored run was at its default there
    after = {name: value for name, value in after.items() if name in before or not name.startswith("--")}
    if before != after:
        other = f"the run to resume had another base, other flags or data ({files.differing(before, after)})"
        raise InputError(f"{folder}: {other}; repeat the command of its run.json, or name another --output_dir")
