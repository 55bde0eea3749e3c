"""The SFT trainer: the fused loss with its anchor, micro-batches of like length, early stopping."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState, set_seed
from trl import SFTConfig, SFTTrainer

from llm_alignment.adapters import adapter_kept_in_float32, new_adapter
from llm_alignment.anchored_loss import AnchorSettings, fused_nll_kl
from llm_alignment.batches import sort_by_length
from llm_alignment.devices import rows_at_once, tf32
from llm_alignment.files import InputError, log
from llm_alignment.models import without_router_logits
from llm_alignment.prefixes import anchor_problem, packing_problem
from llm_alignment.processes import on_main_process
from llm_alignment.training import Setup, TrainingSettings, checkpoint_problem, run_training, training_arguments
from llm_alignment.twix import LARGE_DATA, row_lengths
from llm_alignment.validation import without_head


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The adapter is measured every `steps`; with `patience` the best one by `metric` is kept."""

    patience: int | None
    steps: int
    metric: str  # "mtbench", "val_loss" or "retention"
    evaluate: Callable[[PeftModel, int], dict[str, float]]  # the metrics of the adapter at a step, by name
    baseline: Callable[[], float | None]  # the base's, on the same questions, once it was measured

    def reason(self, history: list[dict]) -> str | None:
        """Why to stop, or None, by the trainer's log."""
        key = f"eval_{self.metric}"
        scores = [entry[key] for entry in history if key in entry]
        if self.patience is None or not scores:
            return None
        return early_stop_reason(self.baseline(), scores, self.patience, self.metric)


# metric -> (title, least gain, largest fall below the baseline, -1 where lower is better)
RULES = {
    "mtbench": ("MT-Bench", 0.05, 0.30, 1),
    "val_loss": ("validation loss", 0.005, 0.05, -1),
    "retention": ("retention", 1.0, 5.0, 1),
}


def early_stop_reason(baseline: float | None, scores: list[float], patience: int, metric: str) -> str | None:
    """Why to stop, or None: the last score is `fall` worse than the baseline, or `patience` in a row are no gain."""
    title, gain, fall, sign = RULES[metric]
    if baseline is not None and sign * (scores[-1] - baseline) < -fall:
        return f"{title} {scores[-1]:.3f} is more than {fall:.2f} worse than the baseline {baseline:.3f}"
    best, without_gain = -math.inf, 0
    for score in scores:
        gained = sign * score - best >= gain
        best, without_gain = (sign * score, 0) if gained else (best, without_gain + 1)
    return f"{patience} evaluations without a gain of {gain:g} in {title}" if without_gain >= patience else None


def tail_mask(is_target: torch.Tensor, example: torch.Tensor, limit: int) -> torch.Tensor:
    """The last `limit` targets of each example; 0 means all of them. is_target: (batch, positions) bool. example: of
    that shape, int64, the number of a position's example, rising along each row and from row to row."""
    if limit == 0:
        return is_target
    lengths = example.flatten().unique_consecutive(return_counts=True)[1].tolist()
    parts = is_target.flatten().split(lengths)  # one example each
    return torch.cat([part & (part.flip(0).cumsum(0).flip(0) <= limit) for part in parts]).view_as(is_target)


class AnchoredTrainer(SFTTrainer):
    """TRL's trainer with micro-batches sorted by length, the fused loss, and measurements for early stopping."""

    def __init__(self, *, anchor: AnchorSettings, early: EarlyStopping | None, **arguments):
        self.anchor, self.early = anchor, early
        self.nll_since_log = self.kl_since_log = 0.0
        self.steps_since_log = self.anchored_since_log = 0
        super().__init__(**arguments)
        if anchor.kl_on == "replay":  # TRL's collator drops columns that it does not know
            collate: Callable = self.data_collator  # type: ignore[has-type]
            self.data_collator = lambda rows: dict(
                collate(rows), replay=torch.tensor([row.get("replay", False) for row in rows])
            )

    def create_model_card(self, *_, **__) -> None:
        """Of no checkpoint: `write_card` writes one when the run was measured."""

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.args.packing or self.aux_loss_enabled:  # packed rows are full; a router's loss is one of a batch
            return loader
        return sort_by_length(loader, self.args, row_lengths(self.train_dataset))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Also marks the KL positions of the step's batches, so that its KL is the mean over all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.kl_coef = self.anchor.over(self.state.max_steps).coefficient(self.state.global_step)
        anchored = [batch.pop("replay", None) for batch in batches]
        if self.kl_coef:
            for batch, is_replay in zip(batches, anchored, strict=True):
                targets = batch["labels"][:, 1:] != -100
                targets = targets if is_replay is None else targets & is_replay[:, None]
                if "position_ids" in batch:  # packed: a position of 0 begins the next example
                    example = (batch["position_ids"][:, 1:] == 0).long().cumsum(1)
                else:
                    example = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
                batch["kl_mask"] = tail_mask(targets, example, self.anchor.kl_limit_seq)
            marked = sum(batch["kl_mask"].sum() for batch in batches)
            # a step may have no replay row
            self.kl_items = self.accelerator.gather(marked.to(self.accelerator.device)).sum().clamp(min=1)
            self.anchored_since_log += 1
        self.steps_since_log += 1
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, kl_mask = inputs.pop("labels")[:, 1:].flatten(), inputs.pop("kl_mask", None)
        if not self.aux_loss_enabled:  # causal attention does not see padding on the right; no mask, no slow kernel
            inputs.pop("attention_mask", None)
        peft_model = self.accelerator.unwrap_model(model)
        ref_hidden, kl_coef = None, 0.0
        with_router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with without_head(peft_model):
            output = model(**inputs, **with_router, use_cache=False)
            hidden = output.logits[:, :-1].flatten(0, 1)
            if kl_mask is not None:
                kl_mask = kl_mask.flatten()
                marked = kl_mask.sum()
                kl_coef = self.kl_coef * marked / self.kl_items
                with torch.no_grad(), peft_model.disable_adapter():
                    ref_hidden = peft_model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss, nll, kl = fused_nll_kl(
            hidden, peft_model.get_output_embeddings().weight, labels, ref_hidden, kl_mask, kl_coef=kl_coef,
            kl_direction=self.anchor.kl_direction, sft_loss=self.anchor.sft_loss, num_items=num_items_in_batch,
            rows_per_chunk=rows_at_once(peft_model.config.get_text_config().vocab_size, hidden.device),
        )  # fmt: skip
        self.nll_since_log += nll.item()
        if kl_mask is not None:
            self.kl_since_log += (kl * marked / self.kl_items).item()
        loss = loss * self.accelerator.num_processes  # num_items counts the targets of all, DDP averages gradients
        if self.aux_loss_enabled:  # of a mixture of experts, as in TRL: a mean of the micro-batches
            loss = loss + self.router_aux_loss_coef * output.aux_loss / self.current_gradient_accumulation_steps
        return loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            sums = torch.tensor([[self.nll_since_log, self.kl_since_log]], device=self.accelerator.device)
            nll, kl = self.accelerator.gather(sums).sum(0).tolist()
            logs |= {"nll": nll / self.steps_since_log, "kl_coef": self.kl_coef}
            if self.anchored_since_log:
                logs["kl"] = kl / self.anchored_since_log
            self.nll_since_log = self.kl_since_log = self.steps_since_log = self.anchored_since_log = 0
        super().log(logs, start_time)

    def evaluate(self, *_, **__):
        """What runs every --eval_steps; with early stopping the Trainer keeps the best checkpoint."""
        with tf32(False):  # as before training and after it
            measured = self.early.evaluate(self.model, self.state.global_step)
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save |= self.early.patience is not None
        if reason := self.early.reason(self.state.log_history):
            log.info("early stop at step %d: %s", self.state.global_step, reason)
            self.control.should_training_stop = True
        return metrics


@dataclasses.dataclass(frozen=True)
class SftSettings:
    """The flags of that name."""

    max_seq_length: int
    packing: bool
    num_proc: int
    kl_asked: bool = False  # the user gave --kl_coef


def build_trainer(
    model: PreTrainedModel,
    setup: Setup,
    rows: dict[str, Dataset],
    settings: TrainingSettings,
    *,
    sft: SftSettings,
    anchor: AnchorSettings,
    early: EarlyStopping | None = None,
) -> AnchoredTrainer:
    """The trainer, a fresh adapter on `model`. `rows`: "train", "validation", of "input_ids" and "labels", cut."""
    if sft.packing and (problem := packing_problem(model)):
        raise InputError(f"--packing: {problem}; leave it out")
    set_seed(settings.seed)
    model = new_adapter(model, setup.lora)
    if anchor.kl_coef and (problem := anchor_problem(model)):
        if sft.kl_asked:
            raise InputError(f"--kl_coef {anchor.kl_coef}: {problem}; give 0 or name another model")
        log.warning("no KL anchor: %s", problem)
        anchor = dataclasses.replace(anchor, kl_coef=0.0)
    arguments = training_arguments(settings, setup.base, setup.lora)
    if early:
        arguments |= {"eval_strategy": "steps", "eval_steps": early.steps}
        if early.patience:
            arguments |= {"metric_for_best_model": early.metric, "greater_is_better": early.metric != "val_loss"}
    config = SFTConfig(
        **arguments, max_length=sft.max_seq_length, packing=sft.packing, eval_packing=False,
        dataset_num_proc=sft.num_proc if len(rows["train"]) > LARGE_DATA else None,
        dataset_kwargs={"skip_prepare_dataset": not sft.packing},  # the rows are cut and have targets
        remove_unused_columns=False,  # those of --streaming become tokens when they are read
    )  # fmt: skip
    data = {"train_dataset": rows["train"], "eval_dataset": rows["validation"], "processing_class": setup.tokenizer}
    with adapter_kept_in_float32(model):
        trainer = AnchoredTrainer(anchor=anchor, early=early, model=model, args=config, **data)
    without_router_logits(trainer.model.get_base_model())
    return trainer


def train(trainer: AnchoredTrainer, checkpoint: Path | None, folder: Path) -> int:
    """Trains, or continues from `checkpoint`; returns the step that is kept: the last, or the best of several."""
    reason = None
    if checkpoint and trainer.early:
        trainer.state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
        reason = trainer.early.reason(trainer.state.log_history)
    if reason:
        log.info("training had stopped early at step %d: %s", trainer.state.global_step, reason)
    else:
        run_training(trainer, checkpoint)
    best = trainer.state.best_model_checkpoint
    if best is None:
        return trainer.state.global_step
    moved = folder / Path(best).name  # the state names the folder as it was called then
    kept = moved if moved.is_dir() else Path(best)
    if problem := on_main_process(lambda: checkpoint_problem(kept)):
        raise InputError(f"{kept}, the best checkpoint: {problem}; put it back or name another --output_dir")
    trainer._load_from_checkpoint(str(kept))
    log.info("kept the adapter of step %d, the best one", trainer.state.best_global_step)
    return trainer.state.best_global_step
