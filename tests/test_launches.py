"""A budget of launches: operators that one layer dispatches on a CPU, views not counted.

On a GPU each of them starts a kernel or more, and small batches wait for these starts and not for the arithmetic.
A change may lower a ceiling here and not raise it.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_alignment import prefixes
from llm_alignment.anchored_loss import fused_nll_kl

NO_LAUNCH = {"empty", "empty_like", "_unsafe_view"}


class Operators(TorchDispatchMode):
    """Counts what is dispatched inside, by name; what only looks at memory in another way starts nothing."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.overloadpacket.__name__ not in NO_LAUNCH:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@functools.cache
def adapted(layers):
    """A model in bf16 with a float32 adapter, as in training on a GPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, dtype=torch.bfloat16,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]))
    prefixes.add_prefix_sharing(model.get_base_model())
    return model


@functools.cache
def operators(layers):
    """{part of training or decoding: the names of its operators} for a model of so many layers."""
    model, ids, found = adapted(layers), torch.arange(24).view(2, 12), {}
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :3] = 0
    with torch.autocast("cpu", torch.bfloat16):
        with Operators() as found["forward"]:
            logits = model.train()(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        with Operators() as found["backward"]:
            logits.sum().backward()
        with torch.no_grad(), model.disable_adapter(), Operators() as found["reference"]:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    with torch.no_grad():
        cache = model.eval()(input_ids=ids, attention_mask=mask[:, :12], use_cache=True).past_key_values
        with Operators() as found["decoding"]:
            model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    return {part: counted.names for part, counted in found.items()}


CEILINGS = {"forward": 76, "backward": 110, "reference": 54, "decoding": 71}


@pytest.mark.parametrize("part", CEILINGS)
def test_operators_of_a_layer(part):
    three, two = (operators(layers)[part] for layers in (3, 2))
    assert len(three) - len(two) <= CEILINGS[part]


@pytest.mark.parametrize(
    "most_unseen, calls, ceiling, rest", [(0, 9, 119, 142), (prefixes.MOST_UNSEEN["cuda"], 1, 78, 180)]
)
def test_operators_of_a_fold(most_unseen, calls, ceiling, rest, monkeypatch):
    """Of a layer that reads eight pairs of one table, block by block and in one call, forward; of all but layers."""
    monkeypatch.setitem(prefixes.MOST_UNSEEN, "cpu", most_unseen)
    rows = [[*range(40), 40 + pair % 8, 50 + side] for side in (0, 1) for pair in range(8)]
    ids = torch.tensor(rows)
    labels = ids.masked_fill(torch.arange(42) < 41, -100)
    names = []
    for layers in (3, 2):
        model = adapted(layers).train()
        with torch.autocast("cpu", torch.bfloat16), Operators() as counted:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
        names.append(counted.names)
    assert sum("attention" in name for name in names[0]) - sum("attention" in name for name in names[1]) == calls
    assert len(names[0]) - len(names[1]) <= ceiling
    assert 3 * len(names[1]) - 2 * len(names[0]) <= rest


@pytest.mark.parametrize("direction, ceiling", [("reverse", 124), ("forward", 128)])
def test_operators_of_the_fused_loss(direction, ceiling):
    """Of a chunk without the anchor and one with it."""
    torch.manual_seed(0)
    states = torch.randn(3, 8, 16)
    hidden, ref_hidden, weight = states[0].requires_grad_(), states[1], states[2].bfloat16()
    labels, in_kl = torch.arange(8), torch.arange(8) < 4
    with Operators() as counted:
        fused_nll_kl(hidden, weight, labels, ref_hidden, in_kl, kl_coef=0.5, kl_direction=direction, rows_per_chunk=4)
    assert len(counted.names) <= ceiling


def test_sft_reads_padding_without_a_mask(sft_trainer, monkeypatch):
    """The states of a padded batch are those that the mask gave, to the bit, and attention gets none."""
    trainer, masks = sft_trainer("--kl_coef", "0.5"), []
    batch = next(batch for batch in trainer.get_train_dataloader() if not batch["attention_mask"].all())
    model, is_real = trainer.model.eval(), batch["attention_mask"].bool()
    with torch.no_grad():
        states = [
            model.get_base_model().base_model(batch["input_ids"], mask).last_hidden_state[is_real]
            for mask in (batch["attention_mask"], None)
        ]
    assert states[0].equal(states[1])
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors, attn_mask=None, **options):
        masks.append(attn_mask)
        return attention(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    trainer.state.global_step = 9  # where the anchor is at work
    batches, items = trainer.get_batch_samples(iter([batch]), 1, "cpu")
    trainer.compute_loss(model, dict(batches[0]), num_items_in_batch=items)
    assert masks == [None] * len(masks) and len(masks) == 2 * model.config.num_hidden_layers


def test_held_out_answers_are_read_without_full_logits():
    """Their log-probabilities are those of the full logits, and no tensor has more than 256 rows of the vocabulary."""
    from toys import make_model

    from llm_alignment import dpo, prompts

    class Words:
        eos_token, bos_token_id = " end", None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [sum(map(ord, word)) % 8192 for word in text.split()]}

    class Largest(Operators):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.names += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            return result

    model = make_model(vocab_size=8192, max_position_embeddings=2048).requires_grad_(False)
    answers = [" ".join(f"{side}{number}" for number in range(length)) for side, length in (("a", 900), ("b", 700))]
    pair = {"prompt": "what is it ", "chosen": answers[0], "rejected": answers[1]}
    with Largest() as largest:
        found = dpo.answer_log_probs(model, prompts.pair_tokens(pair, Words()), 800)
    expected = []
    for side in ("chosen", "rejected"):
        ids = torch.tensor(Words()(pair["prompt"] + pair[side] + Words.eos_token)["input_ids"][:800])
        log_probs = model(ids[None]).logits[0].double().log_softmax(-1)
        expected.append(log_probs[torch.arange(2, len(ids) - 1), ids[3:]].sum().item())
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(largest.names) <= 256 * 8192
