"""DPO: the trainer that reads each prompt once, the rewards of held-out pairs."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer

from llm_alignment import batches, evaluation, models, training
from llm_alignment.adapters import adapter_kept_in_float32, adapter_off, new_adapter
from llm_alignment.anchored_loss import fused_nll_kl
from llm_alignment.batches import GroupedOrder, groups_of, sort_by_length, token_counts
from llm_alignment.files import InputError, digest, log
from llm_alignment.flags import losses
from llm_alignment.plots import save_curves
from llm_alignment.prefixes import add_prefix_sharing, cache_problem, sharing_problem
from llm_alignment.processes import main_process
from llm_alignment.prompts import PromptStyle, fit_prompt, pair_tokens
from llm_alignment.reference import add_reference
from llm_alignment.stats import in_per_cent, mcnemar, paired_delta
from llm_alignment.training import DpoSettings, Setup, TrainingSettings


def fit_pairs(
    pairs: list[dict], tokenizer: PreTrainedTokenizerBase, style: PromptStyle, max_length: int, mark: str = ""
) -> list[dict[str, str]]:
    """The pairs as the trainer reads them, prompts rendered and cut (see `fit_prompt`); says how many were cut. TRL
    cuts the answers at `max_length` tokens of prompt and answer."""
    rows, cut_prompts, cut_answers, equal = [], 0, 0, 0
    for pair in pairs:
        its_style = dataclasses.replace(style, system="") if "own_system" in pair else style
        prompt, _, is_cut = fit_prompt(pair["prompt"], tokenizer, its_style, mark)
        row = {"prompt": prompt, "chosen": style.gap + pair["chosen"], "rejected": style.gap + pair["rejected"]}
        tokens = pair_tokens(row, tokenizer)
        room, answers = max(0, max_length - len(tokens["prompt_ids"])), (tokens["chosen_ids"], tokens["rejected_ids"])
        cut_prompts += is_cut
        cut_answers += max(map(len, answers)) > room
        equal += answers[0] != answers[1] and answers[0][:room] == answers[1][:room]  # those of a dry run may be equal
        rows.append(row)
    message = "%d pairs: %d prompts cut to --max_prompt_length, %d answers cut at --max_length"
    log.info(message, len(rows), cut_prompts, cut_answers)
    if equal:
        log.warning("%d pairs have equal answers after the cut at --max_length and teach nothing; raise it", equal)
    if rows:
        chosen, rejected = (statistics.fmean(len(pair[side]) for pair in pairs) for side in ("chosen", "rejected"))
        log.info("answers: %.0f characters chosen, %.0f rejected, on average", chosen, rejected)
    return rows


class SharedPromptTrainer(DPOTrainer):
    """TRL's trainer with micro-batches of like length, or, `by_table`, of pairs whose prompts begin alike."""

    def __init__(self, *, by_table: bool, is_shared: bool, **arguments):
        self.is_shared = is_shared  # each prompt is read once, where the model allows it
        self.order: GroupedOrder | None = None
        super().__init__(**arguments)
        if by_table:
            groups = groups_of(self.train_dataset["prompt_ids"])
            alone = sum(len(group) == 1 for group in groups)
            message = "--group_by_table: %d groups of pairs whose prompts begin alike, %d single pairs"
            log.info(message, len(groups) - alone, alone)
            self.order = GroupedOrder(groups, self.args.seed)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # `build_trainer` has made tokens of it

    def _track_num_input_tokens(self, inputs):
        """A prompt counts once: of the rejected rows, the second half, only the answers do."""
        read = inputs["attention_mask"].clone()
        read[len(read) // 2 :] *= inputs["completion_mask"][len(read) // 2 :]
        super()._track_num_input_tokens({**inputs, "attention_mask": read})

    def create_model_card(self, *_, **__) -> None:
        """Of no checkpoint: `write_card` writes one when the run was measured."""

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.order:  # it says what meets in a micro-batch
            loader.set_sampler(self.order)  # and hears of the epoch so, in every process and after a resume
            return loader
        if not batches.LOSSES_OVER_BATCHES.isdisjoint(self.args.loss_type) or self.aux_loss_enabled:  # a router's loss
            return loader
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        return sort_by_length(loader, self.args, token_counts(self.train_dataset, *columns))


def build_trainer(
    model: PreTrainedModel | PeftModel, setup: Setup, rows: list[dict], settings: TrainingSettings, dpo: DpoSettings
) -> SharedPromptTrainer:
    """The trainer of the `rows` of `fit_pairs`, over a model that reads each prompt once. A base model gets a fresh
    adapter, and the reference is the base without it. A model with an adapter continues with that one, and the
    reference is a frozen copy of it. Dropout is off, as in TRL, so that the two agree at the first step."""
    problem = sharing_problem(model)
    if problem and dpo.group_by_table:
        raise InputError(f"--group_by_table: {problem}; leave it out")
    if problem and not dpo.no_prefix_sharing:
        log.warning("every prompt is read once for each answer: %s", problem)
    is_shared = not problem and not dpo.no_prefix_sharing
    loss_types, loss_weights = losses(dpo.loss_type, dpo.loss_weights)
    set_seed(settings.seed)
    is_fresh = not isinstance(model, PeftModel)
    if is_fresh:
        model = new_adapter(model, setup.lora)
    pairs = datasets.Dataset.from_list(rows)
    pairs = pairs.map(functools.partial(pair_tokens, tokenizer=setup.tokenizer), desc="tokenising")
    lengths = zip(*(token_counts(pairs, side) for side in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
    arguments = training.training_arguments(dpo.sized(settings, lengths, is_shared=is_shared), setup.base, setup.lora)
    arguments |= {name: getattr(dpo, name) for name in ("beta", "max_length", "label_smoothing")}
    config = DPOConfig(**arguments, loss_type=loss_types, loss_weights=loss_weights)
    how = {"args": config, "processing_class": setup.tokenizer, "train_dataset": pairs}
    with adapter_kept_in_float32(model):
        trainer = SharedPromptTrainer(by_table=dpo.group_by_table, is_shared=is_shared, model=model, **how)
    if is_fresh:
        model.delete_adapter("ref")  # TRL copies every adapter; without the copy it switches the adapter off
    add_prefix_sharing(model.get_base_model(), sharing=is_shared)
    return trainer


def train(
    trainer: SharedPromptTrainer, checkpoint: Path | None, folder: Path, *, fingerprint: dict, use_cache: bool
) -> None:
    """The reference's log-probabilities, then training, then adapter and plots into `folder`. `fingerprint`: of the
    base; with `use_cache` the reference is shared with other runs."""
    add_reference(trainer, folder, fingerprint=fingerprint, use_cache=use_cache)
    training.run_training(trainer, checkpoint)
    training.save_adapter(trainer, folder)
    if main_process():
        save_curves(trainer.state.log_history, folder)


def reward_evaluation(pairs: list[dict], rows: list[dict], beta: float, max_length: int) -> evaluation.Evaluation:
    """The rewards of held-out pairs; `rows` are those that `fit_pairs` made of `pairs`, which name their "cluster"."""
    names = [{"question_id": pair["uid"], "cluster": pair["cluster"]} for pair in pairs]
    items = [row | its_names for row, its_names in zip(rows, names, strict=True)]
    return evaluation.Evaluation(
        name="held_out", items=items, read=functools.partial(read_rewards, beta=beta, max_length=max_length),
        settings={"pairs": digest(items), "beta": beta, "max_length": max_length},
        of_base=lambda pair: reward_row(pair, 0.0, 0.0), compare=functools.partial(compare_rewards, beta=beta),
        summarise=lambda rows: {"held_out": summarise_rewards(rows, beta)},
        # with the adapter and without
        tokens=lambda tokenizer: 2 * sum(len(ids) for item in items for ids in pair_tokens(item, tokenizer).values()),
    )  # fmt: skip


def read_rewards(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: list[dict], *, beta: float, max_length: int
) -> Iterator[dict]:
    """Yields the rows of pairs (see `reward_row`): DPO's implicit rewards, beta * log(p(answer) / p_base(answer)). The
    base is the model with its adapter off, also for a run that continues the training of an adapter; its own rewards
    are 0 by definition. Source: section 4 of Rafailov et al., https://arxiv.org/abs/2305.18290."""
    for pair in pairs:
        tokens = pair_tokens(pair, tokenizer)
        policy = answer_log_probs(model, tokens, max_length)
        with adapter_off(model):
            base = answer_log_probs(model, tokens, max_length)
        yield reward_row(pair, *(beta * (now - then) for now, then in zip(policy, base, strict=True)))


def reward_row(pair: dict, chosen: float, rejected: float) -> dict:
    """{"question_id", "cluster", "chosen", "rejected", "chosen_reward", "rejected_reward"}."""
    kept = {key: pair[key] for key in ("question_id", "cluster", "chosen", "rejected")}
    return {**kept, "chosen_reward": chosen, "rejected_reward": rejected}


def answer_log_probs(model: PreTrainedModel | PeftModel, tokens: dict[str, list[int]], max_length: int) -> list[float]:
    """Log-probabilities, in nats, of both answers of `pair_tokens`, cut at `max_length` tokens of prompt and answer.
    The prompt is read once."""
    prompt, *answers = tokens.values()
    start = len(prompt)
    cut = [torch.tensor([*prompt, *answer][:max_length], device=model.device) for answer in answers]
    ids, cache, base = pad_sequence(cut, batch_first=True), DynamicCache(), models.inner_model(model)
    with torch.no_grad():
        if cache_problem(model):
            hidden = base.base_model(ids, use_cache=False).last_hidden_state[:, start - 1 : -1]
        else:
            base.base_model(ids[:1, : start - 1], past_key_values=cache)
            cache.batch_repeat_interleave(2)
            hidden = base.base_model(ids[:, start - 1 :], past_key_values=cache).last_hidden_state[:, :-1]
        # summed in float32: rounded to bf16, the logits of two answers that are about as likely tell little
        weight = base.get_output_embeddings().weight
        return [
            -fused_nll_kl(states[: len(row) - start], weight, row[start:], num_items=1)[1].item()
            for states, row in zip(hidden, cut, strict=True)
        ]


def summarise_rewards(rows: list[dict], beta: float) -> dict:
    """{"accuracy": per cent of pairs whose chosen answer has the higher reward, a tie one half, "margin",
    "chosen_log_prob": how far the chosen answer's log-probability is from the base's, in nats (it often falls while
    the margin rises), "margin_by_length": correlation of the margin with how much longer the chosen text is, "n"}."""
    margins, longer = [*map(_reward_margin, rows)], [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    varies = len(set(margins)) > 1 and len(set(longer)) > 1
    return {
        "accuracy": 100 * statistics.fmean(map(_reward_accuracy, rows)),
        "margin": statistics.fmean(margins),
        "chosen_log_prob": statistics.fmean(row["chosen_reward"] for row in rows) / beta,
        "margin_by_length": statistics.correlation(margins, longer) if varies else None,
        "n": len(rows),
    }


def compare_rewards(before: list[dict], after: list[dict], *, beta: float) -> dict[str, dict]:
    """Differences in reward accuracy, in percentage points, by the exact McNemar test, in the reward margin, and in
    the log-probability of the chosen answer. Pairs of one cluster are resampled and sign-flipped together; a row
    without one is its own."""
    pairs = evaluation.pair_rows(before, after)
    clusters = [row.get("cluster", row["question_id"]) for _, row in pairs]
    accuracies, margins, chosen = (
        evaluation.values_of(pairs, measured)
        for measured in (_reward_accuracy, _reward_margin, lambda row: row["chosen_reward"] / beta)
    )
    return {
        "reward_accuracy": in_per_cent(mcnemar(*accuracies, clusters=clusters)),
        "reward_margin": paired_delta(*margins, clusters=clusters),
        "chosen_log_prob": paired_delta(*chosen, clusters=clusters),
    }


def _reward_margin(row: dict) -> float:
    return row["chosen_reward"] - row["rejected_reward"]


def _reward_accuracy(row: dict) -> float:
    margin = _reward_margin(row)
    return 0.5 if margin == 0 else float(margin > 0)  # before training policy and base are one, and every pair ties
