"""The trainer against TRL's own: loss, metrics and gradients; the loss flags; rewards of held-out pairs."""

import copy
import inspect
import json
import math
import random
import re

import pytest

import dpo_train
from llm_alignment import dpo, models, training
from llm_alignment.files import InputError
from llm_alignment.reference import add_reference

# ---------------------------------------------------------------------------------------------------------------------
# The trainer against TRL's own


def demo_trainer(args, tokenizer, rows, build, adapter=None):
    """A trainer over the demo model, by TRL alone (`build` None) or by `build_trainer`; with `adapter` it goes on."""
    import datasets
    import torch
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    model = models.load_model(args)
    if adapter:
        model = models.load_adapter(model, adapter, trainable=True)
    if build:
        return build(args, model, tokenizer, rows)
    config = DPOConfig(
        **training.training_arguments(args, weight_decay=0.0, warmup_ratio=0.05, logging_steps=5, longest=99),
        beta=args.beta,
    )
    return DPOTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if adapter else models.lora_config(args),
    )


def move(trainer, shift):
    """Moves the policy off its reference."""
    import torch

    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += shift * torch.randn_like(parameter)


def loss_and_gradients(trainer, shift=0.0):
    """Loss, adapter gradients and TRL's metrics on the first pairs, after a `move`."""
    if shift:
        move(trainer, shift)
    trainer.model.zero_grad()
    trainer.model.train()
    first = trainer.train_dataset.select(range(trainer.args.per_device_train_batch_size))  # the loaders' orders differ
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(first.to_list())))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, metrics


def assert_same_step(result, expected):
    loss, gradients, metrics = result
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert metrics == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in expected[2].items()}


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(3)

    def text(low, high):
        return "".join(
            f" {rng.choice(['net', 'sales', '12', 'percent', 'of', 'dividends'])}"
            for _ in range(rng.randint(low, high))
        )

    return [{"prompt": "Q:" + text(3, 40), "chosen": text(1, 9), "rejected": text(1, 9)} for _ in range(12)]


@pytest.fixture(scope="module")
def saved_adapter(demo_args, demo_tokenizer, rows, tmp_path_factory):
    import torch
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(7)
    model = get_peft_model(models.load_model(demo_args), models.lora_config(demo_args))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shift", [0, 0.05])
@pytest.mark.parametrize("continued", [False, True])
def test_equals_trl(demo_args, demo_tokenizer, rows, saved_adapter, tmp_path, continued, shift):
    args = copy.copy(demo_args)
    args.batch, args.beta, args.output_dir = 4, 0.3, str(tmp_path)
    adapter = saved_adapter if continued else None
    expected = loss_and_gradients(demo_trainer(args, demo_tokenizer, rows, None, adapter), shift)
    if not shift:
        assert expected[0] == pytest.approx(math.log(2), abs=1e-4)
    else:
        assert abs(expected[0] - math.log(2)) > 1e-2  # the comparison is not one of zeros
    for args.no_prefix_sharing in (False, True):
        trainer = demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer, adapter)
        assert_same_step(loss_and_gradients(trainer, shift), expected)


def test_prefix_sharing_puts_the_prompt_through_once(demo_args, demo_tokenizer, rows, tmp_path):
    args = copy.copy(demo_args)
    args.batch, args.output_dir = 4, str(tmp_path)
    for args.no_prefix_sharing in (False, True):
        trainer = demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer)
        base = trainer.model.get_base_model()
        seen = []
        base.model.layers[0].register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0].shape)
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, batch)
        read_alone = batch["attention_mask"].sum().item()
        of_prompts = (batch["attention_mask"] - batch["completion_mask"]).sum().item() // 2
        if args.no_prefix_sharing:
            assert all(shape[0] == 8 for shape in seen)
        else:  # one row without padding, every prompt at most once
            assert all(shape[0] == 1 and shape[1] <= read_alone - of_prompts for shape in seen)


@pytest.mark.parametrize("pairs_a_table", [1, 3, 8])
def test_grouped_pairs_equal_trl(demo_args, demo_tokenizer, tmp_path, pairs_a_table):
    """Pairs on one table in a micro-batch: unequal lengths, prompts cut, both answers empty but for the end token."""
    args = copy.copy(demo_args)
    args.batch, args.beta, args.output_dir, args.group_by_table = 8, 0.3, str(tmp_path), True
    args.max_prompt_length = 60
    pairs = []
    for number in range(8):
        table = number // pairs_a_table
        text = f"Table {table}: " + "net sales 12 percent of dividends " * (5 + table)
        question = "\n\nQuestion: " + "what net sales? " * (number % 4 + 1) + "Answer:"
        pairs.append({"prompt": text + question, "chosen": "12" * (number + 1), "rejected": "percent of sales"})
    rows = dpo.fit_pairs(pairs, demo_tokenizer, args, "\n\nQuestion:")
    rows[2] |= {"chosen": "", "rejected": ""}
    rows[3] |= {"chosen": ""}
    expected = loss_and_gradients(demo_trainer(args, demo_tokenizer, rows, None), 0.05)
    trainer = demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer)
    assert_same_step(loss_and_gradients(trainer, 0.05), expected)


@pytest.fixture(scope="module")
def three_trainers(demo_args, demo_tokenizer, rows, tmp_path_factory):
    """TRL's own, with and without shared prefixes, moved off the reference by the same step."""
    args = copy.copy(demo_args)
    args.batch, args.beta, args.output_dir = 4, 0.3, str(tmp_path_factory.mktemp("losses"))
    trainers = [demo_trainer(args, demo_tokenizer, rows, None)]
    for args.no_prefix_sharing in (False, True):
        trainers.append(demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer))
    for trainer in trainers:
        move(trainer, 0.02)
    return trainers


@pytest.mark.parametrize("names", [*([name] for name in dpo.LOSS_TYPES), ["sigmoid", "sft"]], ids=",".join)
def test_every_loss_equals_trl(three_trainers, names):
    results = []
    for trainer in three_trainers:
        trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = names, [1.0, 0.3][: len(names)], 0.1
        results.append(loss_and_gradients(trainer))
    for result in results[1:]:
        assert_same_step(result, results[0])


def test_the_list_of_losses_is_trls():
    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(dpo.LOSS_TYPES)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--loss_type", "sigmoid,kto"], "kto is unknown or needs another model"),
        (["--loss_type", "sigmoid,"], "an empty name"),
        (["--loss_type", "sigmoid,sft", "--loss_weights", "1"], "2 finite numbers"),
        (["--loss_weights", "1,x"], "'x'"),
        (["--loss_weights", "nan"], "1 finite numbers"),
        (["--loss_weights", "0"], "not all of them 0"),
        (["--label_smoothing", "0.1"], "does not use it"),
        (["--loss_type", "exo_pair"], "--label_smoothing"),
        (["--loss_type", "robust", "--label_smoothing", "0.5"], "below 0.5"),
        (["--group_by_table", "--batch", "1"], "--batch 2 or more"),
        (["--group_by_table", "--no_prefix_sharing"], "--no_prefix_sharing"),
        (["--no_train", "--no-eval_baseline"], "--no-eval_baseline"),
    ],
)
def test_flags_that_do_not_fit(flags, words):
    with pytest.raises(InputError) as error:
        dpo.check_flags(dpo_train.build_parser().parse_args(flags))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_loaded_adapter_keeps_its_own_settings(tmp_path, logged):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    argv = ["--load_adapter", str(tmp_path), "--adapter_trainable", "--lora_r", "32"]
    args = dpo_train.build_parser().parse_args(argv)
    dpo.check_flags(args)
    assert (args.lora_r, args.lora_alpha, args.target_modules) == (4, 8, "q_proj,v_proj")
    assert "lora_r: 32 -> 4, lora_alpha: 16 -> 8" in logged.text


def test_the_memory_plan_counts_a_shared_prompt_once(demo_args, demo_tokenizer, monkeypatch):
    args, seen = copy.copy(demo_args), []
    monkeypatch.setattr(dpo, "log_memory_plan", lambda args, tokens: seen.append(tokens))
    row = {"prompt": "Where does the Volga end?", "chosen": " in the sea", "rejected": " in a lake"}
    for args.no_prefix_sharing in (False, True):
        dpo.log_training_plan(args, demo_tokenizer, [row])
    assert seen[1] - seen[0] == len(demo_tokenizer(row["prompt"])["input_ids"])


def test_weighted_losses_reach_trl(demo_args, demo_tokenizer, rows, tmp_path):
    args = copy.copy(demo_args)
    args.output_dir, args.loss_type, args.loss_weights = str(tmp_path), "robust, sft", "1,0.2"
    args.label_smoothing = 0.1
    dpo.check_flags(args)
    trainer = demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer)
    assert trainer.loss_types == ["robust", "sft"] and trainer.loss_weights == [1.0, 0.2]
    assert trainer.label_smoothing == 0.1


def two_bos(tokenizer, chat):
    """A tokenizer that begins every text with a BOS token, as Llama's, and with `chat` a template that does too."""
    from tokenizers.processors import TemplateProcessing

    bos = "<|endoftext|>"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    if chat:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("chat", [False, True])
def test_one_bos_at_most(demo_args, demo_tokenizer, tmp_path, chat):
    args = copy.copy(demo_args)
    args.output_dir, args.use_chat_template = str(tmp_path), chat
    demo_tokenizer = two_bos(demo_tokenizer, chat)
    rows = dpo.fit_pairs([{"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}], demo_tokenizer, args, "\0")
    ids = demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer).train_dataset[0]["prompt_ids"]
    assert ids.count(demo_tokenizer.bos_token_id) == 1 and ids[0] == demo_tokenizer.bos_token_id
    assert ids == demo_tokenizer(rows[0]["prompt"])["input_ids"]  # what the evaluation shows the model


@pytest.mark.parametrize("room", [2, 300])  # for the answer to the longest prompt, so the first cuts answers
def test_held_out_rewards_are_those_of_training(demo_args, demo_tokenizer, rows, tmp_path, room):
    import torch

    args = copy.copy(demo_args)
    args.batch, args.beta, args.output_dir = 1, 0.3, str(tmp_path)
    args.max_length = room + max(len(demo_tokenizer(row["prompt"])["input_ids"]) for row in rows)
    trainer = demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer)
    loss_and_gradients(trainer, shift=0.05)
    trainer.model.eval()
    expected = []
    for batch in trainer.get_train_dataloader():
        with torch.no_grad():
            trainer.compute_loss(trainer.model, batch)
        expected += [trainer._metrics["eval"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
    pairs = [{**row, "question_id": str(number), "cluster": "one"} for number, row in enumerate(rows)]
    measured = dpo.reward_pairs(
        trainer.model,
        demo_tokenizer,
        pairs,
        path=tmp_path / "rewards.jsonl",
        fingerprint={"adapter": "trained"},
        beta=args.beta,
        max_length=args.max_length,
    )
    rewards = [row[f"{side}_reward"] for row in measured for side in ("chosen", "rejected")]
    assert sorted(rewards) == pytest.approx(sorted(expected), rel=1e-4, abs=1e-5)  # the loader shuffles
    assert max(map(abs, rewards)) > 0.1
    settings = dict(beta=args.beta, max_length=args.max_length, path=tmp_path / "base.jsonl")
    for row in dpo.reward_pairs(trainer.model, demo_tokenizer, pairs, fingerprint={"adapter": "none"}, **settings):
        assert row["chosen_reward"] == row["rejected_reward"] == 0, "the base is its own reference"


def test_reward_accuracy_by_hand():
    def rows(*rewards):
        return [
            {"question_id": n, "chosen_reward": chosen, "rejected_reward": rejected}
            for n, (chosen, rejected) in enumerate(rewards)
        ]

    before, after = rows((0, 0), (0, 0), (0, 0), (0, 0)), rows((1, 0), (-1, -3), (0, 0.5), (2, 0))
    assert dpo.summarise_rewards(before) == {"accuracy": 50, "margin": 0, "n": 4}
    assert dpo.summarise_rewards(after) == {"accuracy": 75, "margin": 1.125, "n": 4}
    deltas = dpo.compare_rewards(before, after)
    assert deltas["reward_accuracy"]["mean"] == 25 and deltas["reward_margin"]["mean"] == 1.125
    assert deltas["reward_accuracy"]["p"] == pytest.approx(10 / 16)  # 3 of 4 coins, both sides


def assert_half_precision_equals_trl(demo_args, tokenizer, rows, folder):
    """Loss and gradients in bf16 within its noise; a head summed in bf16, as TRL's, is most of it."""
    args = copy.copy(demo_args)
    args.batch, args.beta, args.output_dir, args.dtype = 4, 0.3, str(folder), "bf16"
    loss, gradients, _ = loss_and_gradients(demo_trainer(args, tokenizer, rows, None), 0.05)
    for args.no_prefix_sharing in (False, True):
        trainer = demo_trainer(args, tokenizer, rows, dpo.build_trainer)
        ours, our_gradients, _ = loss_and_gradients(trainer, 0.05)
        assert ours == pytest.approx(loss, abs=0.02)
        difference = sum((our_gradients[name] - gradient).float().norm() ** 2 for name, gradient in gradients.items())
        assert difference <= 0.1**2 * sum(gradient.float().norm() ** 2 for gradient in gradients.values())


@pytest.mark.slow
def test_half_precision_equals_trl(demo_args, demo_tokenizer, rows, tmp_path):
    assert_half_precision_equals_trl(demo_args, demo_tokenizer, rows, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
def test_half_precision_on_a_gpu(demo_args, demo_tokenizer, rows, tmp_path):
    assert_half_precision_equals_trl(demo_args, demo_tokenizer, rows, tmp_path)


@pytest.mark.gpu
def test_4bit_training_with_checkpointing_lowers_the_loss(demo_args, demo_tokenizer, rows, tmp_path):
    args = copy.copy(demo_args)
    args.no_4bit, args.gradient_checkpointing, args.output_dir = False, "on", str(tmp_path)
    args.batch, args.grad_acc, args.epochs, args.learning_rate, args.beta = 4, 1, 10, 1e-3, 0.3
    trainer = demo_trainer(args, demo_tokenizer, rows, dpo.build_trainer)
    add_reference(args, trainer, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] < 0.75 and losses[-1] < losses[0] - 0.05


@pytest.mark.gpu
def test_shared_prompts_take_less_memory(demo_args, demo_tokenizer, tmp_path):
    import torch

    args = copy.copy(demo_args)
    args.batch, args.output_dir = 8, str(tmp_path)
    long_rows = [{"prompt": "Q:" + " net sales" * 150, "chosen": f" {n}", "rejected": " 12"} for n in range(8)]
    cuda, peaks = torch.cuda, {}
    for args.no_prefix_sharing in (False, True):
        trainer = demo_trainer(args, demo_tokenizer, long_rows, dpo.build_trainer)
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        loss_and_gradients(trainer, 0.05)
        peaks[args.no_prefix_sharing] = cuda.max_memory_allocated() - before
    assert peaks[False] < 0.5 * peaks[True]
