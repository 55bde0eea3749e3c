"""Reference log-probabilities: computed once, reused, the same numbers as a reference in every step."""

import json
import math

import pytest
from conftest import read_rows
from toys import toy_run

import dpo_train
from llm_alignment import adapters, batches, dpo, models, reference
from llm_alignment.prompts import PromptStyle
from llm_alignment.results import baseline_cache

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def reference_passes(monkeypatch):
    """Counts the forward passes of the reference, in a step or before it."""
    from trl.trainer import dpo_trainer

    passes, use_adapter = [], dpo_trainer.use_adapter
    monkeypatch.setattr(
        dpo_trainer, "use_adapter", lambda *args, **kwargs: [passes.append(1), use_adapter(*args, **kwargs)][1]
    )
    return passes


TRAIN_ALONE = """--demo --no_4bit --limit_pairs 20 --batch 2 --grad_acc 2 --eval_pairs 0 --no-do_eval --no-do_mtbench
    --no-do_instruct --exp_log log.jsonl""".split()


def adapter_of(folder):
    from safetensors.torch import load_file

    return load_file(f"{folder}/adapter_model.safetensors")


def difference(one, other):
    """The norm of the difference of two adapters over the norm of the first."""
    apart, whole = (
        math.hypot(*(float(tensor.norm()) for tensor in tensors))
        for tensors in ([one[name] - other[name] for name in one], one.values())
    )
    return apart / whole


@pytest.mark.slow
def test_the_reference_is_read_once(reference_passes, monkeypatch, capsys, tmp_path):
    record = dpo_train.main([*TRAIN_ALONE, "--output_dir", "first", "--epochs", "2"])
    assert record["kept_step"] == 10 and len(reference_passes) == math.ceil(20 / batches.PAIRS_AT_ONCE)
    log = read_rows(tmp_path / "first" / "train_log.jsonl")
    assert "rewards/margins" in log[0]

    # another beta on the same base and pairs: nothing is computed again
    reference_passes.clear()
    capsys.readouterr()
    dpo_train.main([*TRAIN_ALONE, "--output_dir", "second", "--epochs", "2", "--beta", "0.4", "--lora_r", "4"])
    assert not reference_passes
    assert "reference.jsonl: 20 rows taken from the baseline cache" in capsys.readouterr().out

    # computed again: the same numbers, so the same adapter
    dpo_train.main([*TRAIN_ALONE, "--output_dir", "third", "--epochs", "2", "--no_baseline_cache"])
    assert len(reference_passes) == 3
    whole = adapter_of("first")
    assert difference(whole, adapter_of("third")) == 0

    # a reference in every step, as TRL's, comes to the same
    monkeypatch.setattr(dpo, "add_reference", lambda *args, **options: None)
    dpo_train.main([*TRAIN_ALONE, "--output_dir", "fourth", "--epochs", "2"])
    assert len(reference_passes) > 20
    assert difference(whole, adapter_of("fourth")) < 2e-6


TEXTS = ["net sales", "12 percent", "of dividends", "sales of 12", "percent"] * 4
PAIRS = [{"prompt": f"Q: {text} {n}", "chosen": text, "rejected": f"{n}"} for n, text in enumerate(TEXTS)]


def trainer_with_reference(folder, adapter="", pairs=PAIRS, base="demo", **flags):
    setup, *settings = toy_run(folder, **flags)
    model = models.load_model(setup.base)
    if adapter:
        model = adapters.load_adapter(model, adapter, trainable=True)
    rows = dpo.fit_pairs(pairs, setup.tokenizer, PromptStyle(use_chat_template=False), 3072)
    trainer = dpo.build_trainer(model, setup, rows, *settings)
    reference.add_reference(trainer, folder, fingerprint={"model": base}, use_cache=True)
    return trainer


def values(trainer):
    return [trainer.train_dataset[f"ref_{side}_logps"][:] for side in ("chosen", "rejected")]


def test_killed_while_the_reference_is_computed(tmp_path, reference_passes, monkeypatch):
    whole = values(trainer_with_reference(tmp_path / "whole"))
    passes = len(reference_passes)
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "other"))
    lines = (tmp_path / "whole" / "reference.jsonl").read_bytes().split(b"\n")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "reference.jsonl").write_bytes(b"\n".join(lines[:11]) + b"\n" + lines[11][:9])
    assert values(trainer_with_reference(tmp_path / "killed")) == whole
    assert passes < len(reference_passes) < 2 * passes


@pytest.mark.parametrize("other", [{"base": "other"}, {"max_length": 500}, {"no_prefix_sharing": True}], ids=str)
def test_what_the_reference_depends_on_reads_it_again(other, tmp_path, reference_passes):
    trainer_with_reference(tmp_path / "first")
    trainer_with_reference(tmp_path / "other", **other)
    assert len(reference_passes) == 2 * math.ceil(20 / batches.PAIRS_AT_ONCE)


def test_pairs_in_another_order_have_their_own_reference(tmp_path):
    whole, turned = (values(trainer_with_reference(tmp_path / str(step), pairs=PAIRS[::step])) for step in (1, -1))
    assert [side[::-1] for side in turned] == whole and whole[0][0] != whole[0][-1]


def test_a_damaged_cache_is_computed_again(tmp_path, logged):
    whole = values(trainer_with_reference(tmp_path / "whole"))
    cached = baseline_cache(read_rows(tmp_path / "whole" / "reference.jsonl")[0]["fingerprint"])
    cached.write_bytes(b"\0damaged" + cached.read_bytes()[:50])
    assert values(trainer_with_reference(tmp_path / "again")) == whole
    assert "damaged" in logged.text


def test_the_reference_of_an_adapter_is_that_adapter(tmp_path):
    import torch

    first = trainer_with_reference(tmp_path / "first")
    torch.manual_seed(2)
    for parameter in filter(lambda parameter: parameter.requires_grad, first.model.parameters()):
        parameter.data = 0.05 * torch.randn_like(parameter)
    first.model.save_pretrained(tmp_path / "adapter")
    on = trainer_with_reference(tmp_path / "on", adapter=str(tmp_path / "adapter"))
    assert values(on)[0] != pytest.approx(values(first)[0], rel=1e-3)
    assert list(on.model.peft_config) == ["default"]
    loss = on.compute_loss(on.model, next(iter(on.get_train_dataloader())))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)

    # the same tensors at another scale are another policy
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}), "utf-8")
    scaled = trainer_with_reference(tmp_path / "scaled", adapter=str(tmp_path / "adapter"))
    assert values(scaled)[0] != pytest.approx(values(on)[0], rel=1e-3)
