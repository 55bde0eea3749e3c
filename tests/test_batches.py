"""Micro-batches sorted by length: the same examples, gradient and adapter, less padding."""

import math
import random
import types
from collections import defaultdict

import pytest
import torch
from conftest import DEMO
from toys import save_experts, toy_run

import dpo_train
from llm_alignment import dpo, models, sft, tatqa
from llm_alignment.batches import LOSSES_OVER_BATCHES, LengthSortedSampler, sorted_within_steps
from llm_alignment.files import SkippedRows
from llm_alignment.flags import LOSS_TYPES
from llm_alignment.prompts import PromptStyle


def test_sorting_keeps_the_examples_of_each_step():
    lengths = [10, 40, 20, 30, 60, 50, 70]
    result = sorted_within_steps([5, 0, 3, 1, 4, 2, 6], lengths, batch=2, step=4)
    # the second step has 3 examples: its last micro-batch is not full and keeps example 6
    assert result == [5, 1, 3, 0, 4, 2, 6]


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    """dpo_trainer(*more): the trainer of dpo_train.py on 17 pairs of different lengths."""

    def build(**more):
        setup, settings, dpo_settings = toy_run(
            tmp_path_factory.mktemp("trainer"), batch=2, grad_acc=3, epochs=9, learning_rate=1e-3, beta=0.5, **more
        )
        contexts = tatqa.read_tatqa(DEMO / "tatqa" / "tatqa_dataset_train.json", SkippedRows())
        pairs = dpo_train.tatqa_pairs(contexts, seed=42)[:17]
        for number, pair in enumerate(pairs):
            pair["prompt"] = "note " * (7 * number % 40) + pair["prompt"]
        rows = dpo.fit_pairs(pairs, setup.tokenizer, PromptStyle(use_chat_template=False), 3072, "\n\nQuestion:")
        return dpo.build_trainer(models.load_model(setup.base), setup, rows, settings, dpo_settings)

    return build


def batches_of(trainer, epoch):
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    masked = (zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True) for batch in loader)
    return [sorted(tuple(row[mask].tolist()) for row, mask in batch) for batch in masked]


def unsorted(monkeypatch):
    for module in (sft, dpo):
        monkeypatch.setattr(module, "sort_by_length", lambda loader, *_: loader)


def test_a_step_has_the_examples_that_the_seed_gave_before(sft_trainer, monkeypatch):
    trainer = sft_trainer()
    by_length = [batches_of(trainer, epoch) for epoch in (0, 1)]
    unsorted(monkeypatch)
    before = [batches_of(trainer, epoch) for epoch in (0, 1)]
    assert before[0] != before[1] and by_length != before
    for sorted_epoch, epoch in zip(by_length, before, strict=True):
        for step in range(0, len(epoch), 3):
            a, b = (sorted(sum(batches[step : step + 3], [])) for batches in (sorted_epoch, epoch))
            assert a == b


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_micro_batches_of_a_mixture_of_experts_are_not_sorted(
    kind, sft_trainer, dpo_trainer, monkeypatch, tmp_path
):
    """Its router's loss is not a sum over examples: it looks at what meets in a micro-batch."""
    model, sft_flags = save_experts(tmp_path), ["--target_modules", "q_proj"]
    trainer = sft_trainer("--model", model, *sft_flags) if kind == "sft" else dpo_trainer(model=model)
    batches = batches_of(trainer, 0)
    unsorted(monkeypatch)
    assert batches_of(trainer, 0) == batches


@pytest.mark.parametrize("n", [4, 9, 12, 13])
def test_processes_get_neighbours_and_the_examples_that_they_had_together(n):
    """accelerate fills the last step with examples from the beginning, and so does the sampler before it sorts."""
    from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler

    lengths = [(7 * index) % 31 + 1 for index in range(n)]
    plain = SeedableRandomSampler(range(n), data_seed=7)
    by_length = LengthSortedSampler(plain, lengths, batch=2, step=8, multiple=4)
    steps = []
    for sampler in (plain, by_length):
        shards = []
        for rank in (0, 1):
            sampler.set_epoch(1)
            shards.append(list(BatchSamplerShard(torch.utils.data.BatchSampler(sampler, 2, False), 2, rank)))
        assert len(shards[0]) == len(shards[1]) == math.ceil(n / 4)
        both = [a + b for a, b in zip(*shards, strict=True)]
        steps.append([sorted(sum(both[start : start + 2], [])) for start in range(0, len(both), 2)])
    assert steps[0] == steps[1]
    for a, b in zip(*shards, strict=True):  # the longest of one process is not longer than the other's shortest
        assert min(lengths[index] for index in a) >= max(lengths[index] for index in b)


def step_gradient(trainer):
    """The adapter's gradient of the second optimiser step, in float64."""
    trainer.model.double()
    trainer.state.global_step = 1
    batches = iter(trainer.get_train_dataloader())
    trainer.get_batch_samples(batches, 3, "cpu")
    batches, items = trainer.get_batch_samples(batches, 3, "cpu")
    trainer.current_gradient_accumulation_steps = 3
    for batch in batches:
        trainer.training_step(trainer.model, batch, items)
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["sft", "sigmoid", "sft,aot"])
def trainers(request, sft_trainer, dpo_trainer, monkeypatch):
    """A trainer whose steps are sorted by length, then one whose steps are not."""

    def make():
        return sft_trainer() if request.param == "sft" else dpo_trainer(loss_type=request.param)

    def of_both_orders():
        yield make()
        unsorted(monkeypatch)
        yield make()

    return of_both_orders()


def test_a_sorted_step_has_the_same_gradient(trainers):
    gradients = []
    for trainer in trainers:
        torch.manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        gradients.append(step_gradient(trainer))
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("names", [*([name] for name in LOSS_TYPES), ["sigmoid", "sft"], ["ipo", "aot"]], ids=str)
def test_losses_that_depend_on_the_micro_batch(names):
    """TRL's own loss of six pairs of unequal lengths as three micro-batches, cut in two ways."""
    from trl import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 9, 4, 3, 9, 7]).repeat(2)
    log_probs = -torch.rand(12, 10, generator=generator) * (torch.arange(10) < lengths[:, None])
    references = log_probs.sum(1) + torch.randn(12, generator=generator)

    def step(cuts):
        """Loss of the micro-batches and its gradient to the log-probabilities."""
        states = log_probs.clone().requires_grad_()
        for cut in cuts:
            rows = torch.tensor([*cut, *(6 + pair for pair in cut)])
            mask = torch.nn.functional.pad((torch.arange(10) < lengths[rows, None]).long(), (1, 0))
            zeros = torch.zeros(len(rows), 10)
            output = types.SimpleNamespace(
                log_probs=states[rows], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
            )
            inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
            inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), references[rows].chunk(2), strict=True))
            trainer.model = lambda output=output, **_: output
            trainer.model.training = True
            DPOTrainer._compute_loss(trainer, trainer.model, inputs, False).backward()
        return states.grad

    same = types.SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value)
    trainer = types.SimpleNamespace(
        accelerator=same, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, use_weighting=False,
        f_divergence_type="reverse_kl", loss_types=names, loss_weights=[1.0] * len(names), beta=0.3, _tp_size=1,
        label_smoothing=0.1, args=types.SimpleNamespace(discopop_tau=0.05), _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
    )  # fmt: skip
    one, other = step([(0, 1), (2, 3), (4, 5)]), step([(0, 2), (1, 5), (3, 4)])
    assert one.norm() > 0.1
    distance = ((one - other).norm() / one.norm()).item()
    assert (distance > 1e-3) if LOSSES_OVER_BATCHES & {*names} else (distance < 1e-6)


@pytest.mark.slow
def test_ten_sorted_steps_end_with_the_same_adapter(trainers):
    adapters = []
    for trainer in trainers:
        trainer.args.max_steps = 10
        trainer.train()
        adapters.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, parameter in adapters[0].items():
        assert (parameter - adapters[1][name]).norm() <= 1e-5 * parameter.norm(), name


def test_padding_of_a_mix_of_lengths():
    """Lengths as in a chat set, log-normal around 180 tokens and cut at 1,024, in steps of 16 micro-batches of 8."""
    rng = random.Random(1)
    lengths = [min(1024, max(8, int(rng.lognormvariate(5.2, 0.9)))) for _ in range(4096)]
    order = rng.sample(range(4096), 4096)
    ratios = []
    for indices in (order, sorted_within_steps(order, lengths, batch=8, step=128)):
        batches = [[lengths[index] for index in indices[start : start + 8]] for start in range(0, 4096, 8)]
        ratios.append(sum(8 * max(batch) for batch in batches) / sum(lengths))
    assert ratios[0] > 2.5 and ratios[1] < 1.12
