"""The trainer against TRL's own: loss, metrics and gradients; the loss flags; rewards of held-out pairs."""

import copy
import dataclasses
import inspect
import json
import math
import random
import re
import statistics

import pytest
from toys import rows_of, save_experts, toy_run

import dpo_train
from llm_alignment import adapters, dpo, models, plans, prefixes
from llm_alignment.files import InputError
from llm_alignment.finance import read_instruction
from llm_alignment.flags import LOSS_TYPES, check_dpo_flags
from llm_alignment.preferences import general_pair
from llm_alignment.prompts import PromptStyle, encode
from llm_alignment.training import training_arguments

# ---------------------------------------------------------------------------------------------------------------------
# The trainer against TRL's own


def demo_trainer(run, rows, adapter=None):
    """The trainer of a `toy_run` over the demo model; with `adapter` it goes on."""
    setup, settings, dpo_settings = run
    return dpo.build_trainer(loaded(setup, adapter), setup, rows, settings, dpo_settings)


def trls_trainer(run, rows, adapter=None):
    """The same by TRL alone."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    setup, settings, dpo_settings = run
    return DPOTrainer(
        model=loaded(setup, adapter),
        args=DPOConfig(**training_arguments(settings, setup.base, setup.lora), beta=dpo_settings.beta),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=setup.tokenizer,
        peft_config=None if adapter else setup.lora.config,
    )


def loaded(setup, adapter):
    import torch

    torch.manual_seed(0)
    model = models.load_model(setup.base)
    return adapters.load_adapter(model, adapter, trainable=True) if adapter else model


def move(model, shift):
    """Moves the policy off its reference."""
    import torch

    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += shift * torch.randn_like(parameter)


def loss_and_gradients(trainer, shift=0.0):
    """Loss, adapter gradients and TRL's metrics on the first pairs, after a `move`."""
    if shift:
        move(trainer.model, shift)
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
    rng, words = random.Random(3), ["net", "sales", "12", "percent", "of", "dividends"]

    def text(low, high):
        return "".join(f" {rng.choice(words)}" for _ in range(rng.randint(low, high)))

    return [{"prompt": "Q:" + text(3, 40), "chosen": text(1, 9), "rejected": text(1, 9)} for _ in range(12)]


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    setup, *_ = toy_run(folder)
    model = adapters.new_adapter(models.load_model(setup.base), setup.lora)
    move(model, 0.05)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shift", [0, 0.05])
@pytest.mark.parametrize("continued", [False, True])
def test_equals_trl(rows, saved_adapter, tmp_path, continued, shift):
    adapter, flags = saved_adapter if continued else None, dict(batch=4, beta=0.3)
    expected = loss_and_gradients(trls_trainer(toy_run(tmp_path, **flags), rows, adapter), shift)
    if not shift:
        assert expected[0] == pytest.approx(math.log(2), abs=1e-4)
    else:
        assert abs(expected[0] - math.log(2)) > 1e-2  # the comparison is not one of zeros
    for apart in (False, True):
        trainer = demo_trainer(toy_run(tmp_path, no_prefix_sharing=apart, **flags), rows, adapter)
        assert_same_step(loss_and_gradients(trainer, shift), expected)


def test_a_mixture_of_experts_equals_trl(rows, tmp_path, logged):
    """With its router's loss, which is a quarter of the whole here."""
    run = toy_run(tmp_path, model=save_experts(tmp_path / "experts"), batch=4, beta=0.3)
    ours, trls = (loss_and_gradients(build(run, rows), 0.05) for build in (demo_trainer, trls_trainer))
    assert_same_step(ours, trls)
    assert trls[2]["aux_loss"] > 0.5 and "every prompt is read once for each answer: the loss of its" in logged.text


def test_prefix_sharing_puts_the_prompt_through_once(rows, tmp_path):
    for apart in (False, True):
        trainer = demo_trainer(toy_run(tmp_path, batch=4, no_prefix_sharing=apart), rows)
        seen = []
        trainer.model.get_base_model().model.layers[0].register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0].shape)
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, batch)
        read_alone = batch["attention_mask"].sum().item()
        of_prompts = (batch["attention_mask"] - batch["completion_mask"]).sum().item() // 2
        if apart:
            assert all(shape[0] == 8 for shape in seen)
        else:  # one row without padding, every prompt at most once
            assert all(shape[0] == 1 and shape[1] <= read_alone - of_prompts for shape in seen)
        trainer._track_num_input_tokens(batch)
        assert trainer.state.num_input_tokens_seen == read_alone - of_prompts


@pytest.mark.parametrize("pairs_a_table", [1, 3, 8])
def test_grouped_pairs_equal_trl(demo_tokenizer, tmp_path, pairs_a_table):
    """Pairs on one table in a micro-batch: unequal lengths, prompts cut, both answers empty but for the end token."""
    pairs = []
    for number in range(8):
        table = number // pairs_a_table
        text = f"Table {table}: " + "net sales 12 percent of dividends " * (5 + table)
        question = "\n\nQuestion: " + "what net sales? " * (number % 4 + 1) + "Answer:"
        pairs.append({"prompt": text + question, "chosen": "12" * (number + 1), "rejected": "percent of sales"})
    style = PromptStyle(use_chat_template=False, max_prompt_length=60)
    rows = dpo.fit_pairs(pairs, demo_tokenizer, style, 3072, "\n\nQuestion:")
    rows[2] |= {"chosen": "", "rejected": ""}
    rows[3] |= {"chosen": ""}
    run = toy_run(tmp_path, batch=8, beta=0.3, group_by_table=True)
    results = [loss_and_gradients(build(run, rows), 0.05) for build in (demo_trainer, trls_trainer)]
    assert_same_step(*results)


@pytest.fixture(scope="module")
def three_trainers(rows, tmp_path_factory):
    """TRL's own, with and without shared prefixes, moved off the reference by the same step."""
    shared, apart = (
        toy_run(tmp_path_factory.mktemp("losses"), batch=4, beta=0.3, no_prefix_sharing=apart)
        for apart in (False, True)
    )
    trainers = [trls_trainer(shared, rows), demo_trainer(shared, rows), demo_trainer(apart, rows)]
    for trainer in trainers:
        move(trainer.model, 0.02)
    return trainers


@pytest.mark.parametrize("names", [*([name] for name in LOSS_TYPES), ["sigmoid", "sft"], ["aot", "ipo"]], ids=",".join)
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
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(LOSS_TYPES)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--loss_type sigmoid,kto", "kto is unknown"),
        ("--loss_type sigmoid,", "an empty name"),
        ("--loss_type sigmoid,sft --loss_weights 1", "2 finite numbers"),
        ("--loss_weights 1,x", "'x'"),
        ("--loss_weights nan", "1 finite numbers"),
        ("--loss_weights 0", "not all of them 0"),
        ("--label_smoothing 0.1", "--loss_type sigmoid does not use it"),
        ("--loss_type exo_pair", "--label_smoothing"),
        ("--loss_type robust --label_smoothing 0.5", "below 0.5"),
        ("--group_by_table --batch 1", "--batch 2 or more"),
        ("--group_by_table --no_prefix_sharing", "--no_prefix_sharing"),
        ("--no_train --no-eval_baseline", "--no-eval_baseline"),
        ("--load_adapter a --adapter_trainable --output_dir a", "--load_adapter a is --output_dir too"),
    ],
)
def test_flags_that_do_not_fit(flags, words):
    with pytest.raises(InputError) as error:
        check_dpo_flags(dpo_train.build_parser().parse_args(flags.split()))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_loaded_adapter_keeps_its_own_settings(tmp_path, logged):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = adapters.LoraSettings(lora_r=32, lora_alpha=16, lora_dropout=0.05, target_modules="q_proj,v_proj")
    own = adapters.saved_settings(str(tmp_path), asked)
    assert own == adapters.LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.05, target_modules="q_proj,v_proj")
    assert "lora_r: 32 -> 4, lora_alpha: 16 -> 8" in logged.text


def test_the_memory_plan_counts_a_shared_prompt_once(tmp_path, demo_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(plans, "log_memory_plan", lambda settings, base, lora: seen.append(settings.longest))
    row = {"prompt": "Where does the Volga end?", "chosen": " in the sea", "rejected": " in a lake"}
    for apart in (False, True):
        setup, settings, dpo_settings = toy_run(tmp_path, no_prefix_sharing=apart)
        plans.print_dpo_plan(setup, [row], [], settings, dpo_settings)
    assert seen[1] - seen[0] == len(demo_tokenizer(row["prompt"])["input_ids"])


def test_a_plan_of_fewer_pairs_than_a_step_takes(tmp_path, logged):
    setup, settings, dpo_settings = toy_run(tmp_path, batch=2, grad_acc=16)
    row = {"prompt": "Where does the Volga end?", "chosen": " in the sea", "rejected": " in a lake"}
    plans.print_dpo_plan(setup, [row] * 5, [], settings, dpo_settings)
    assert "steps: 1 of 5 pairs each; 3 forward and backward passes" in logged.text
    one = len(setup.tokenizer(row["prompt"] + row["chosen"])["input_ids"]) + 1
    other = len(setup.tokenizer(row["prompt"] + row["rejected"])["input_ids"]) + 1
    assert f"tokens a step: {5 * (one + other)} of the pairs" in logged.text


def test_the_head_s_kernel_is_tried_for_a_plan_and_for_training(tmp_path, monkeypatch):
    tried = []
    for module in (plans, prefixes):
        monkeypatch.setattr(module, "settle_head", lambda device, module=module: tried.append((module, device)))
    setup, *settings = toy_run(tmp_path)
    plans.print_dpo_plan(setup, [], [], *settings)
    prefixes.add_prefix_sharing(models.load_model(setup.base))
    assert tried == [(plans, setup.base.device), (prefixes, setup.base.device)]


def test_weighted_losses_reach_trl(rows, tmp_path):
    run = toy_run(tmp_path, loss_type="robust, sft", loss_weights="1,0.2", label_smoothing=0.1)
    trainer = demo_trainer(run, rows)
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
def test_one_bos_at_most(tmp_path, chat):
    setup, *settings = toy_run(tmp_path)
    tokenizer = two_bos(setup.tokenizer, chat)
    pairs = [{"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}]
    rows = dpo.fit_pairs(pairs, tokenizer, PromptStyle(use_chat_template=chat), 3072)
    trainer = demo_trainer((dataclasses.replace(setup, tokenizer=tokenizer), *settings), rows)
    ids = trainer.train_dataset[0]["prompt_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids == encode(rows[0]["prompt"], tokenizer)  # what the evaluation shows the model


@pytest.mark.parametrize(
    "pair",
    [
        general_pair({"system": "Own.", "prompt": "Hi", "chosen": "Good", "rejected": "Bad"}),
        general_pair({side: [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"},
                             {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}),
        read_instruction({"system": "Own.", "user": "Hi", "assistant": "Good"}) | {"rejected": "Bad"},
    ],
)  # fmt: skip
def test_the_system_prompt_goes_to_pairs_that_have_none(pair, demo_tokenizer):
    plain = general_pair({"prompt": "Hi", "chosen": "Good", "rejected": "Bad"})
    rows = dpo.fit_pairs([pair, plain], demo_tokenizer, PromptStyle(system="Be brief."), 3072)
    assert [("Be brief." in row["prompt"], "Own." in row["prompt"]) for row in rows] == [(False, True), (True, False)]


@pytest.mark.parametrize("room", [2, 300])  # for the answer to the longest prompt, so the first cuts answers
def test_held_out_rewards_are_those_of_training(demo_tokenizer, rows, tmp_path, room):
    import torch

    length = room + max(len(demo_tokenizer(row["prompt"])["input_ids"]) for row in rows)
    trainer = demo_trainer(toy_run(tmp_path, batch=1, beta=0.3, max_length=length), rows)
    loss_and_gradients(trainer, shift=0.05)
    trainer.model.eval()
    expected = []
    for batch in trainer.get_train_dataloader():
        with torch.no_grad():
            trainer.compute_loss(trainer.model, batch)
        expected += [trainer._metrics["eval"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
    pairs = [{"uid": str(number), "cluster": "one"} for number in range(len(rows))]
    task = dpo.reward_evaluation(pairs, rows, 0.3, length)
    measured = rows_of(task, trainer.model, demo_tokenizer, tmp_path / "rewards.jsonl")
    rewards = [row[f"{side}_reward"] for row in measured for side in ("chosen", "rejected")]
    assert sorted(rewards) == pytest.approx(sorted(expected), rel=1e-4, abs=1e-5)  # the loader shuffles
    assert max(map(abs, rewards)) > 0.1
    for row in rows_of(task, None, None, tmp_path / "base.jsonl", fingerprint={"adapter": "none"}):
        assert row["chosen_reward"] == row["rejected_reward"] == 0, "the base is its own reference"


def test_reward_accuracy_by_hand():
    def rows(*rewards):
        return [
            {
                "question_id": n,
                "chosen": "a" * n,
                "rejected": "b",
                "chosen_reward": chosen,
                "rejected_reward": rejected,
            }
            for n, (chosen, rejected) in enumerate(rewards)
        ]

    before, after = rows((0, 0), (0, 0), (0, 0), (0, 0)), rows((1, 0), (-1, -3), (0, 0.5), (2, 0))
    nothing = {"chosen_log_prob": 0, "margin_by_length": None}  # equal margins have no correlation
    assert dpo.summarise_rewards(before, 0.5) == {"accuracy": 50, "margin": 0, "n": 4, **nothing}
    found = dpo.summarise_rewards(after, 0.5)
    assert (found["accuracy"], found["margin"], found["chosen_log_prob"]) == (75, 1.125, 2 * 0.5)
    margins, longer = [1, 2, -0.5, 2], [-1, 0, 1, 2]
    assert found["margin_by_length"] == pytest.approx(statistics.correlation(margins, longer))
    deltas = dpo.compare_rewards(before, after, beta=0.5)
    assert deltas["chosen_log_prob"]["mean"] == 1.0
    assert deltas["reward_accuracy"]["mean"] == 25 and deltas["reward_margin"]["mean"] == 1.125
    assert deltas["reward_accuracy"]["p"] == pytest.approx(10 / 16)  # 3 of 4 coins, both sides


def assert_half_precision_equals_trl(rows, folder, figure=lambda *_: None):
    """Loss and gradients in bf16 within its noise; a head summed in bf16, as TRL's, is most of it."""
    flags = dict(batch=4, beta=0.3, dtype="bf16")
    loss, gradients, _ = loss_and_gradients(trls_trainer(toy_run(folder, **flags), rows), 0.05)
    for apart in (False, True):
        trainer = demo_trainer(toy_run(folder, no_prefix_sharing=apart, **flags), rows)
        ours, our_gradients, _ = loss_and_gradients(trainer, 0.05)
        assert ours == pytest.approx(loss, abs=0.02)
        difference = sum((our_gradients[name] - gradient).float().norm() ** 2 for name, gradient in gradients.items())
        norm = sum(gradient.float().norm() ** 2 for gradient in gradients.values())
        figure(f"distance over norm, {'each read' if apart else 'shared'}", ((difference / norm) ** 0.5).item())
        assert difference <= 0.1**2 * norm


@pytest.mark.slow
def test_half_precision_equals_trl(rows, tmp_path):
    assert_half_precision_equals_trl(rows, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
def test_half_precision_on_a_gpu(rows, tmp_path, figure):
    assert_half_precision_equals_trl(rows, tmp_path, figure)


@pytest.mark.gpu(cpu=True)
def test_4bit_training_with_checkpointing_lowers_the_loss(rows, tmp_path, figure):
    flags = dict(no_4bit=False, gradient_checkpointing="on", grad_acc=1, epochs=10, learning_rate=1e-3)
    trainer = demo_trainer(toy_run(tmp_path, batch=4, beta=0.3, **flags), rows)
    dpo.add_reference(trainer, tmp_path, fingerprint={}, use_cache=False)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figure("first loss", losses[0])
    figure("last loss", losses[-1])
    assert losses[0] < 0.75 and losses[-1] < losses[0] - 0.05


@pytest.mark.gpu
def test_shared_prompts_take_less_memory(tmp_path, figure):
    import torch

    long_rows = [{"prompt": "Q:" + " net sales" * 150, "chosen": f" {n}", "rejected": " 12"} for n in range(8)]
    cuda, peaks = torch.cuda, {}
    for apart in (False, True):
        trainer = demo_trainer(toy_run(tmp_path, batch=8, no_prefix_sharing=apart), long_rows)
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        loss_and_gradients(trainer, 0.05)
        peaks[apart] = cuda.max_memory_allocated() - before
    figure("memory, shared over each read", peaks[False] / peaks[True])
    assert peaks[False] < 0.5 * peaks[True]


def test_pairs_that_are_equal_after_the_cut_are_told(demo_tokenizer, logged):
    pair = {"prompt": "Q", "chosen": "net sales " * 60 + "yes", "rejected": "net sales " * 60 + "no", "uid": "1"}
    for max_length, is_told in ((40, True), (400, False)):
        dpo.fit_pairs([pair], demo_tokenizer, PromptStyle(), max_length)
        assert any("1 pairs have equal answers after the cut" in line for line in logged.messages) == is_told
        logged.clear()
    dpo.fit_pairs([{**pair, "rejected": pair["chosen"]}], demo_tokenizer, PromptStyle(), 400)  # as in a dry run
    assert "equal answers" not in logged.text
