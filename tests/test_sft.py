"""The SFT trainer against TRL's own, where the loss is not that of the targets alone."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from toys import chats, save_experts, toy_base

from llm_alignment import generation, models, sft, training
from llm_alignment.files import InputError


def test_a_mixture_of_experts_has_its_routers_loss_as_in_trl(sft_trainer, tmp_path):
    from trl import SFTConfig, SFTTrainer

    folder = save_experts(tmp_path / "experts")
    ours = sft_trainer("--model", folder, "--kl_coef", "0", "--target_modules", "q_proj")
    trls = SFTTrainer(
        model=models.load_model(toy_base(model=folder)),
        args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
        peft_config=ours.model.active_peft_config,
    )
    results = []
    for trainer in (ours, trls):
        torch.manual_seed(1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.05)
        batch = trainer.data_collator([
            {name: values[: 60 - 15 * number] for name, values in trainer.train_dataset[number].items()}
            for number in range(4)  # of different lengths: the router's loss does not count the padding
        ])
        trainer.kl_coef, trainer.current_gradient_accumulation_steps = 0.0, 3
        targets = (batch["labels"][:, 1:] != -100).sum()
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=targets)
        loss.backward()
        gradients = [each.grad.flatten() for each in trainer.model.parameters() if each.requires_grad]
        results.append((loss.item(), torch.cat(gradients)))
    answers = list(generation.generate(ours.model, ours.processing_class, chats(2), generation.Decoding(3)))
    assert len(answers) == 2  # TRL's trainer asks for the router's logits in the config, which would fail here
    (loss, gradient), (expected, its_gradient) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - its_gradient).norm() < 1e-5 * its_gradient.norm()


def test_the_kl_in_the_log_is_the_mean_over_the_anchored_steps(sft_trainer):
    """Of which there is none without an anchor, or before it starts."""
    trainer = sft_trainer("--kl_warmup_steps", "0")
    anchor, batch = trainer.anchor, trainer.data_collator([trainer.train_dataset[0]])
    for changes, kl in (({"kl_coef": 0.0}, None), ({"kl_start_step": 9}, None), ({"kl_start_step": 2}, 0.5)):
        trainer.anchor = dataclasses.replace(anchor, **changes)
        for trainer.state.global_step in range(5):
            trainer.get_batch_samples(iter([dict(batch)]), 1, "cpu")
        trainer.kl_since_log = 1.0
        trainer.log({"loss": 1.0})
        assert trainer.state.log_history[-1].get("kl") == kl


def test_a_model_that_ships_with_its_routers_logits_on_answers(tmp_path):
    base = toy_base(model=save_experts(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"output_router_logits": True}), "utf-8")
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    assert len(list(generation.generate(model, tokenizer, chats(2), generation.Decoding(3)))) == 2


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_best_checkpoint_is_not_kept(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(sft, "run_training", lambda *_: None)
    best = tmp_path / "checkpoint-2"
    best.mkdir()
    (best / "adapter_model.safetensors").write_bytes(b"weights")
    training.write_manifest(best)
    loaded = []
    state = SimpleNamespace(best_model_checkpoint=str(best), best_global_step=2)
    trainer = SimpleNamespace(early=None, state=state, _load_from_checkpoint=loaded.append)
    assert sft.train(trainer, None, tmp_path) == 2 and loaded == [str(best)]
    (best / "adapter_model.safetensors").write_bytes(b"weigh")
    if damage == "missing":
        (best / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="checkpoint-2, the best checkpoint: adapter_model.safetensors is"):
        sft.train(trainer, None, tmp_path)
    assert len(loaded) == 1
