"""The DPO trainer that reads each prompt once, and the rewards of held-out pairs."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.anchored_loss import fused_nll_kl
from llm_alignment.batches import depends_on_batch, sort_by_length, token_counts
from llm_alignment.evaluation import Evaluation, measure, pair_rows, plot_curves, report, save_answers
from llm_alignment.files import InputError, ResultFile, differing, digest, file_sha256
from llm_alignment.flags import (
    add_lora_flags,
    add_model_flags,
    add_run_flags,
    add_training_flags,
    not_negative,
    positive,
    ratio,
)
from llm_alignment.generation import fit_prompt, in_batches
from llm_alignment.models import (
    adapter_config,
    adapter_kept_in_float32,
    adapter_off,
    check_head,
    evaluating,
    inner_model,
    load_adapter,
    load_model,
    main_process,
    new_adapter,
    on_main_process,
    processes,
)
from llm_alignment.prefixes import GroupedOrder, add_prefix_sharing, groups_of, no_sharing_reason, shared_lengths
from llm_alignment.reference import PAIRS_AT_ONCE, add_reference
from llm_alignment.runs import begin, check_writable, timed
from llm_alignment.stats import in_per_cent, mcnemar, paired_delta
from llm_alignment.training import (
    FLAGS_THAT_DO_NOT_AFFECT_TRAINING,
    log_memory_plan,
    optimiser_steps,
    run_training,
    save_adapter,
    training_arguments,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOTrainer


log = logging.getLogger("llm_alignment")


# TRL's losses that need the policy and its reference alone, and those that read --label_smoothing.
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def add_dpo_flags(parser: argparse.ArgumentParser, *, in_stages: bool = False) -> None:
    """What every DPO script takes; a script sets its own defaults with `parser.set_defaults`.

    A script that trains `in_stages` has some of them for each stage, and begins with a fresh adapter.
    """
    on_off = argparse.BooleanOptionalAction
    add_model_flags(parser)
    add_lora_flags(parser, in_stages=in_stages)
    add_training_flags(parser, in_stages=in_stages)
    add_run_flags(parser, exp_log="experiments/dpo_experiments.jsonl")
    parser.add_argument("--output_dir", help="folder of the run (default: %(default)s)")

    add = parser.add_argument_group(
        "DPO", "dropout is off, as in TRL: policy and reference agree at the first step"
    ).add_argument
    add(
        "--loss_type",
        default="sigmoid",
        metavar="NAME[,NAME...]",
        help=f"TRL's losses, their weighted sum if there are several: {', '.join(LOSS_TYPES)} (default: %(default)s)",
    )
    add(
        "--loss_weights",
        default="",
        metavar="W[,W...]",
        help="a number for each of --loss_type; without it each counts 1",
    )
    add(
        "--label_smoothing",
        type=ratio,
        default=0.0,
        help=f"share of pairs taken to be labelled the wrong way, for {', '.join(SMOOTHED)} (default: %(default)s)",
    )
    add(
        "--max_prompt_length",
        type=positive(int),
        default=2048,
        help="tokens a prompt is cut to (default: %(default)s)",
    )
    add(
        "--max_length",
        type=positive(int),
        default=3072,
        help="tokens of prompt and answer together (default: %(default)s)",
    )
    add("--use_chat_template", action="store_true", help="wrap prompts in it (plain text, as published)")
    add("--no_prefix_sharing", action="store_true", help="read a pair's prompt once for each answer")
    add(
        "--group_by_table",
        action=on_off,
        default=False,
        help="train on pairs whose prompts begin alike (one table, one system prompt) one after the other and read "
        "what they share once; it changes which pairs meet in an optimiser step",
    )
    add("--limit_pairs", type=not_negative(int), default=0, help="a sample of N pairs; 0 = all (default: %(default)s)")
    if not in_stages:
        add("--beta", type=positive(float), default=0.03, help="pull towards the reference (default: %(default)s)")
        add("--no_train", action="store_true", help="only evaluate")
        add("--load_adapter", default="", metavar="DIR", help="start from this adapter")
        add("--adapter_trainable", action="store_true", help="continue its training; it is the reference too")

    add = parser.add_argument_group("measuring").add_argument
    add("--eval_baseline", action=on_off, default=True, help="measure before training too")
    add("--do_mtbench", action=on_off, default=True, help="MT-Bench")
    add("--mtbench_file", default="mt_bench_ru.json", help="questions, fetched when missing (default: %(default)s)")
    add("--mtbench_limit", type=not_negative(int), default=50, help="a sample of N; 0 = all (default: %(default)s)")
    add("--mtbench_max_tokens", type=positive(int), default=256, help="new tokens a turn (default: %(default)s)")
    add("--do_instruct", action=on_off, default=True, help="instruction following")
    add("--instruct_limit", type=not_negative(int), default=25, help="instructions (default: %(default)s)")
    add("--instruct_max_tokens", type=positive(int), default=512, help="new tokens (default: %(default)s)")
    parser.set_defaults(batch=2, grad_acc=16)
    if not in_stages:
        parser.set_defaults(learning_rate=5e-6)


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    check_common_flags(args)
    if args.adapter_trainable and not args.load_adapter:
        raise InputError("--adapter_trainable needs --load_adapter DIR: which adapter is to be trained on")
    if args.load_adapter and not args.adapter_trainable and not args.no_train:
        raise InputError("--load_adapter: add --adapter_trainable to train it on, or --no_train to only measure it")
    if args.no_train and not args.load_adapter and not args.eval_baseline:
        raise InputError("--no_train without --load_adapter measures the base alone: leave out --no-eval_baseline")
    if args.load_adapter:
        take_adapter_settings(args)
    if args.adapter_trainable and Path(args.load_adapter).resolve() == Path(args.output_dir).resolve():
        raise InputError(
            f"--load_adapter {args.load_adapter} is --output_dir too, and would be overwritten; name another"
        )


def starting_adapter(args: argparse.Namespace) -> dict[str, str]:
    """For the fingerprint of the data: a run that is resumed must begin with the same adapter, its reference too."""
    if not args.load_adapter:
        return {}
    return {"adapter": file_sha256(Path(args.load_adapter) / "adapter_model.safetensors")}


def take_adapter_settings(args: argparse.Namespace) -> None:
    """Puts rank, alpha and layers of the adapter that --load_adapter names into `args`, and says where they differ.

    They are what is trained and recorded, whatever --lora_r and the like say. Raises InputError when its
    adapter_config.json cannot be read, and for an adapter of the head.
    """
    config = adapter_config(args.load_adapter)
    layers = config.get("target_modules")
    lists = (value for value in (layers, config.get("modules_to_save")) if isinstance(value, list))
    trained = [layer for value in lists for layer in value]
    if any(str(layer).split(".")[-1] == "lm_head" for layer in trained):
        raise InputError(
            f"--load_adapter {args.load_adapter}: it changes the head (lm_head), which the losses here take from the "
            "base; name another adapter"
        )
    own = {
        "lora_r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": ",".join(sorted(map(str, layers))) if isinstance(layers, list) else None,  # else a pattern
    }
    asked = {**vars(args), "target_modules": ",".join(sorted(args.target_modules.split(",")))}
    other = {name: value for name, value in own.items() if value and value != asked[name]}
    if other:
        log.info("%s: its own settings count: %s", args.load_adapter, differing(asked, {**asked, **other}))
        vars(args).update(other)


def check_common_flags(args: argparse.Namespace) -> None:
    """`check_flags` for the flags that a script in stages has too."""
    if args.max_prompt_length >= args.max_length:
        raise InputError(
            f"--max_prompt_length {args.max_prompt_length} leaves no room for an answer within --max_length "
            f"{args.max_length}; raise --max_length"
        )
    if args.eval_save_json:
        check_writable(Path(args.eval_save_json), "--eval_save_json")
    if args.eval_save_json and not args.do_eval:
        raise InputError(
            f"--eval_save_json {args.eval_save_json}: there are no TAT-QA rows to write without --do_eval"
        )
    losses(args)
    if args.group_by_table and (args.batch == 1 or args.no_prefix_sharing):
        raise InputError(
            "--group_by_table shares what the pairs of a micro-batch have in common: give --batch 2 or more, without "
            "--no_prefix_sharing"
        )


def losses(args: argparse.Namespace) -> tuple[list[str], list[float] | None]:
    """TRL's `loss_type` and `loss_weights`, as the flags ask for them. Raises InputError for those that do not fit."""
    names = [name.strip() for name in args.loss_type.split(",")]
    unknown = [name for name in names if name not in LOSS_TYPES]
    if unknown:
        raise InputError(
            f"--loss_type {args.loss_type}: {unknown[0] or 'an empty name'} is unknown or needs another model; "
            f"choose from {', '.join(LOSS_TYPES)}"
        )
    try:
        weights = [float(weight) for weight in args.loss_weights.split(",")] if args.loss_weights else None
    except ValueError as error:
        raise InputError(f"--loss_weights {args.loss_weights}: {error}; give numbers, as in 1,0.2") from error
    if weights and (len(weights) != len(names) or not all(map(math.isfinite, weights)) or not any(weights)):
        raise InputError(
            f"--loss_weights {args.loss_weights}: {len(names)} finite numbers are needed, one for each of --loss_type "
            f"{args.loss_type}, and not all of them 0"
        )
    if args.label_smoothing and not set(names) & set(SMOOTHED):
        raise InputError(
            f"--label_smoothing {args.label_smoothing}: --loss_type {args.loss_type} does not use it; only "
            f"{', '.join(SMOOTHED)} do"
        )
    if "exo_pair" in names and not args.label_smoothing:
        raise InputError("--loss_type exo_pair needs --label_smoothing above 0; its paper recommends 0.001")
    if "robust" in names and args.label_smoothing >= 0.5:
        raise InputError(f"--label_smoothing {args.label_smoothing}: --loss_type robust needs a share below 0.5")
    return names, weights


def neutral_flags(args: argparse.Namespace) -> set[str]:
    """Flags that do not change which adapter comes out."""
    measuring = {name for name in vars(args) if name.startswith(("eval_", "do_", "mtbench_", "instruct_"))}
    return FLAGS_THAT_DO_NOT_AFFECT_TRAINING | measuring | {"reward_model"}


def fit_pairs(
    pairs: list[dict], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, mark: str
) -> list[dict[str, str]]:
    """The pairs as the trainer reads them, prompts rendered and cut; says how many were cut.

    TRL cuts the answers at --max_length.
    """
    rows, cut_prompts, cut_answers = [], 0, 0
    for pair in pairs:
        prompt, _, is_cut = fit_prompt(pair["prompt"], tokenizer, args, mark)
        gap = "" if args.use_chat_template else " "
        row = {"prompt": prompt, "chosen": gap + pair["chosen"], "rejected": gap + pair["rejected"]}
        longest = max(len(tokenizer(prompt + row[side])["input_ids"]) for side in ("chosen", "rejected"))
        cut_prompts += is_cut
        cut_answers += longest + 1 > args.max_length  # TRL adds the end token
        rows.append(row)
    log.info(
        "%d pairs: %d prompts cut to --max_prompt_length, %d answers cut at --max_length",
        len(rows), cut_prompts, cut_answers,
    )  # fmt: skip
    return rows


def fit_chats(pairs: list[dict], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[dict[str, str]]:
    """`fit_pairs` through the chat template; a prompt that is too long loses its beginning."""
    chat = argparse.Namespace(**{**vars(args), "use_chat_template": True})
    return fit_pairs(pairs, tokenizer, chat, mark="\0")


def build_trainer(
    args: argparse.Namespace, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> DPOTrainer:
    """TRL's DPOTrainer over a model that reads each prompt once.

    A base model gets a fresh adapter, and the reference is the base without it. A model with an adapter continues
    with that one, and the reference is a frozen copy of it. Dropout is off, as in TRL, so that the two agree at
    the first step. `rows` are those of `fit_pairs`.
    """
    import datasets
    from peft import PeftModel
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    loss_types, loss_weights = losses(args)
    set_seed(args.seed)
    is_fresh = not isinstance(model, PeftModel)
    if is_fresh:
        model = new_adapter(model, args)
    config = DPOConfig(
        **training_arguments(args, weight_decay=0.0, warmup_ratio=0.05, logging_steps=5, longest=args.max_length),
        beta=args.beta,
        max_length=args.max_length,
        loss_type=loss_types,
        loss_weights=loss_weights,
        label_smoothing=args.label_smoothing,
    )

    class LengthSortedTrainer(DPOTrainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            if args.group_by_table or depends_on_batch(loss_types):  # the order says what meets in a micro-batch
                return loader
            return sort_by_length(
                loader, self.args, token_counts(self.train_dataset, "prompt_ids", "chosen_ids", "rejected_ids")
            )

    with adapter_kept_in_float32(model):
        trainer = LengthSortedTrainer(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
    if is_fresh:
        model.delete_adapter("ref")  # TRL copies every adapter; without the copy it switches the adapter off
    if args.group_by_table:
        order_by_table(trainer)
    reason = no_sharing_reason(model.get_base_model())
    if reason and not args.no_prefix_sharing:
        log.warning("every prompt is read once for each answer: %s", reason)
    add_prefix_sharing(model.get_base_model(), sharing=not reason and not args.no_prefix_sharing)
    return trainer


def order_by_table(trainer: DPOTrainer) -> None:
    """Makes the trainer take pairs whose prompts begin alike one after the other; says how many are alone."""
    groups = groups_of(trainer.train_dataset["prompt_ids"])
    alone = sum(len(group) == 1 for group in groups)
    log.info(
        "--group_by_table: %d groups of pairs whose prompts begin alike, %d single pairs", len(groups) - alone, alone
    )
    order = GroupedOrder(groups, trainer.args.seed)
    trainer._get_train_sampler = lambda dataset=None: order


def train(args: argparse.Namespace, trainer: DPOTrainer, checkpoint: Path | None, folder: Path) -> None:
    """Trains and writes the adapter, the model card and the loss and reward plots into `folder`."""
    add_reference(args, trainer, folder)
    run_training(trainer, checkpoint)
    save_adapter(trainer, folder)
    if main_process():
        rewards = {"reward margin": ["rewards/margins"], "reward accuracy": ["rewards/accuracies"]}
        plot_curves(trainer.state.log_history, {"loss": ["loss"]}, folder / "loss.png")
        plot_curves(trainer.state.log_history, rewards, folder / "rewards.png")


def reward_pairs(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    *,
    path: Path,
    fingerprint: dict,
    beta: float,
    max_length: int,
    use_cache: bool = False,
    renew: bool = False,
) -> list[dict]:
    """DPO's implicit rewards of both answers of every pair: beta * log(p(answer) / p_base(answer)), as TRL logs them.

    Returns and writes to `path` (a ResultFile) a row per pair: {"question_id", "cluster", "chosen", "rejected",
    "chosen_reward", "rejected_reward"}. The base is the model with its adapter off, also for a run that continues the
    training of an adapter; its own rewards are 0 by definition. `pairs` are the rows of `fit_pairs` with a
    "question_id" and a "cluster". `renew`, `use_cache`: see ResultFile. All processes call this: they share the pairs,
    the main one writes, and each gets the rows.
    Source: section 4 of Rafailov et al., https://arxiv.org/abs/2305.18290.
    """
    from tqdm import tqdm

    is_base = fingerprint["adapter"] == "none"
    fingerprint = {**fingerprint, "pairs": digest(pairs), "beta": beta, "max_length": max_length}
    results = ResultFile(path, fingerprint, renew=renew, use_cache=use_cache) if main_process() else None
    missing = on_main_process(lambda: results.missing(pairs) if results else [])

    def read(batch: list[int]) -> Iterator[tuple[int, list[float]]]:
        """(place, rewards of the chosen and the rejected answer) of every pair of a batch, by index in `missing`."""
        for place, index in enumerate(batch):
            policy = answer_log_probs(model, tokenizer, missing[index], max_length)
            with adapter_off(model):
                base = answer_log_probs(model, tokenizer, missing[index], max_length)
            yield place, [beta * (now - then) for now, then in zip(policy, base, strict=True)]

    order = range(len(missing))
    rewards = ((index, (0.0, 0.0)) for index in order) if is_base else in_batches([*order], 1, read, split=True)
    with evaluating(model):
        for index, (chosen, rejected) in tqdm(rewards, path.stem, len(missing), unit="pair", disable=results is None):
            if results:
                kept = {key: missing[index][key] for key in ("question_id", "cluster", "chosen", "rejected")}
                results.append({**kept, "chosen_reward": chosen, "rejected_reward": rejected})
    if results:
        results.finish()
    return on_main_process(lambda: results.rows_of(pairs) if results else [])


def answer_log_probs(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, pair: dict, max_length: int
) -> list[float]:
    """Log-probabilities, in nats, of the chosen and the rejected answer; the prompt is read once.

    An answer is what TRL trains on: it begins where the tokens part from the prompt's, has the end token, and is cut
    at `max_length` tokens of prompt and answer.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import DynamicCache
    from trl.data_utils import common_prefix_length

    prompt = tokenizer(pair["prompt"])["input_ids"]
    texts = [pair["prompt"] + pair[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    start = min(common_prefix_length(prompt, row) for row in rows)
    cut = [torch.tensor(row[:max_length], device=model.device) for row in rows]
    ids = pad_sequence(cut, batch_first=True)
    cache = DynamicCache()
    base = inner_model(model)
    with torch.no_grad():
        base.base_model(ids[:1, : start - 1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        hidden = base.base_model(ids[:, start - 1 :], past_key_values=cache).last_hidden_state[:, :-1]
        # summed in float32: rounded to bf16, the logits of two answers that are about as likely tell little
        weight = base.get_output_embeddings().weight
        return [
            -fused_nll_kl(states[: len(row) - start], weight, row[start:], num_items=1)[1].item()
            for states, row in zip(hidden, cut, strict=True)
        ]


def summarise_rewards(rows: list[dict]) -> dict:
    """{"accuracy": per cent of pairs whose chosen answer has the higher reward, a tie one half, "margin", "n"}."""
    return {
        "accuracy": 100 * statistics.fmean(map(_reward_accuracy, rows)),
        "margin": statistics.fmean(map(_reward_margin, rows)),
        "n": len(rows),
    }


def compare_rewards(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Differences in reward accuracy, in percentage points, by the exact McNemar test, and in the reward margin.

    Pairs of one cluster are resampled and sign-flipped together; a row without one is its own.
    """
    pairs = pair_rows(before, after)
    clusters = [row.get("cluster", row["question_id"]) for _, row in pairs]
    accuracies, margins = (
        [[measure(row) for row in rows] for rows in zip(*pairs, strict=True)]
        for measure in (_reward_accuracy, _reward_margin)
    )
    return {
        "reward_accuracy": in_per_cent(mcnemar(*accuracies, clusters=clusters)),
        "reward_margin": paired_delta(*margins, clusters=clusters),
    }


def _reward_margin(row: dict) -> float:
    return row["chosen_reward"] - row["rejected_reward"]


def _reward_accuracy(row: dict) -> float:
    margin = _reward_margin(row)
    return 0.5 if margin == 0 else float(margin > 0)  # before training policy and base are one, and every pair ties


def reward_evaluation(args: argparse.Namespace, pairs: list[dict], rows: list[dict]) -> Evaluation:
    """The rewards of held-out pairs; `rows` are those that `fit_pairs` made of `pairs`, which name their "cluster"."""
    rows = [
        {**row, "question_id": pair["uid"], "cluster": pair["cluster"]} for row, pair in zip(rows, pairs, strict=True)
    ]
    answer = functools.partial(reward_pairs, pairs=rows, beta=args.beta, max_length=args.max_length)

    def tokens(tokenizer: PreTrainedTokenizerBase) -> int:
        texts = [row["prompt"] + row["chosen"] + row["rejected"] for row in rows]
        return 2 * sum(map(len, tokenizer(texts)["input_ids"]))  # with the adapter and without

    return Evaluation(
        "held_out",
        len(rows),
        answer,
        lambda rows: {"held_out": summarise_rewards(rows)},
        compare_rewards,
        split=True,
        tokens=tokens,
    )


def align(
    args: argparse.Namespace,
    record: dict,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    evaluations: list[Evaluation],
    data: dict,
    checkpoint: Path | None,
) -> None:
    """Baseline, DPO on the `rows` of `fit_pairs`, final, report. With --no_train, the loaded adapter against the base.

    An adapter that is trained on is its own baseline.
    """
    model = load_model(args)
    check_head(model, f"--model {args.model}")
    if args.load_adapter:
        model = load_adapter(model, args.load_adapter, trainable=args.adapter_trainable)
    trainer = None if args.no_train else build_trainer(args, model, tokenizer, rows)
    if trainer is not None:
        model = trainer.model
    folder = begin(record, data)
    before = after = {}
    goes_on = trainer is not None and args.adapter_trainable
    if args.eval_baseline:
        with timed(record, "baseline"):
            before = measure(args, model, tokenizer, evaluations, folder, "baseline", with_adapter=goes_on)
    if trainer is not None:
        with timed(record, "train"):
            train(args, trainer, checkpoint, folder)
        record["kept_step"] = trainer.state.global_step
    if trainer is not None or args.load_adapter:
        with timed(record, "final"):
            after = measure(args, model, tokenizer, evaluations, folder, "final", with_adapter=True)
    if main_process():
        report(record, folder, evaluations, before, after)
        save_answers(args, before, after)


def print_plan(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, rows: list[dict], evaluations: list[Evaluation]
) -> None:
    """What a run would do: one pair as the model reads it, pairs, steps, tokens, memory, evaluations."""
    trained = 0.0
    if rows:
        first, end = rows[0], tokenizer.eos_token
        log.info("the first pair as the model reads it:\n%s", first["prompt"])
        log.info("chosen: %s%s\nrejected: %s%s", first["chosen"], end, first["rejected"], end)
        trained = log_training_plan(args, tokenizer, rows)
    asked = 0
    for evaluation in evaluations:
        tokens = evaluation.tokens(tokenizer)
        log.info(
            "%s: %d questions before and after, at most %.1f k tokens each time",
            evaluation.name, evaluation.size, tokens / 1e3,
        )  # fmt: skip
        asked += 2 * tokens
    if asked:
        share = 100 * asked / (asked + trained)
        log.info("evaluation: at most %.2f M tokens, %.0f %% of all that go through the model", asked / 1e6, share)


def log_training_plan(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> float:
    """Logs pairs, steps, passes, tokens and memory; returns the tokens that go through the model in training.

    A backward pass of a frozen base costs a forward pass, so it counts as one.
    """
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
    lengths = [min(args.max_length, len(ids) + 1) for ids in tokenizer(texts)["input_ids"]]
    both = [a + b for a, b in zip(lengths[: len(rows)], lengths[len(rows) :], strict=True)]
    order = list(range(len(rows)))
    random.Random(args.seed).shuffle(order)
    if args.group_by_table:
        order = list(GroupedOrder(groups_of(prompts), args.seed))
    read = padded = 0
    for start in range(0, len(order), args.batch):
        batch = order[start : start + args.batch]
        padded += 2 * len(batch) * max(lengths[side + index] for side in (0, len(rows)) for index in batch)
        read += sum(both[index] - len(prompts[index]) for index in batch)
        read -= sum(shared for _, shared in shared_lengths([prompts[index] for index in batch]))
    if args.no_prefix_sharing:
        read = padded
    steps = optimiser_steps(args, len(rows))
    passes = steps * args.grad_acc * processes()
    epochs = steps * args.batch * args.grad_acc * processes() / len(rows)
    log.info("pairs: %d, %.0f tokens each with the prompt read for each answer", len(rows), statistics.fmean(both))
    log.info(
        "steps: %d of %d pairs each; %d forward and backward passes; the reference: %d forward passes, once per base "
        "and data",
        steps, args.batch * args.grad_acc * processes(), passes, math.ceil(len(rows) / PAIRS_AT_ONCE),
    )  # fmt: skip
    log.info(
        "tokens a step: %.0f of the pairs, %.0f padded as TRL reads them, %.0f read here",
        *(total * epochs / steps for total in (sum(both), padded, read)),
    )
    once = [pair - (0 if args.no_prefix_sharing else len(prompt)) for pair, prompt in zip(both, prompts, strict=True)]
    log_memory_plan(args, max(once))
    return read * (2 * epochs + 1)  # once more for the reference
