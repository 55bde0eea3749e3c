"""What a loaded model can do: shared beginnings, packing, repeated caches, an anchor; asked of many architectures."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llm_alignment import adapters, dpo, models, prefixes

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
# architecture: (settings, what it cannot do)
KINDS = {
    "qwen2": ({}, ""),
    "qwen3": (dict(head_dim=16), ""),
    "llama": ({}, ""),
    "stablelm": (dict(num_key_value_heads=4), "share"),
    "nemotron": ({}, "share"),
    "falcon": ({}, "share pack"),
    "opt": (dict(ffn_dim=128, word_embed_proj_dim=64), "pack anchor"),
    "gpt2": (dict(n_positions=64, n_embd=64, n_layer=2, n_head=4), "anchor"),
    "qwen3_moe": (EXPERTS, "share"),
    "qwen3_next": ({**EXPERTS, **LINEAR, "num_hidden_layers": 4}, "share pack cache"),
    "mistral": ({}, "share"),
}


def toy(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    if kind != "falcon":
        sizes |= dict(intermediate_size=128, num_key_value_heads=2, max_position_embeddings=256)
    tokens = dict(pad_token_id=0, eos_token_id=2, bos_token_id=None)
    config = CONFIG_MAPPING[kind](**{**sizes, **tokens, **KINDS[kind][0]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_row_tells_what_a_model_can_do(kind):
    model = toy(kind)
    models.check_head(model, kind)
    attention = model.config._attn_implementation
    cannot = {
        "share": prefixes.sharing_problem(model),
        "pack": prefixes.no_packing_reason(model) or prefixes.packing_problem(model),
        "cache": prefixes.cache_problem(model),
    }
    assert model.config._attn_implementation == attention
    layers = "c_attn" if kind == "gpt2" else "query_key_value" if kind == "falcon" else "q_proj,v_proj"
    adapted = adapters.new_adapter(model, adapters.LoraSettings(4, 8, 0.1, layers))
    state = torch.get_rng_state()
    cannot["anchor"] = prefixes.anchor_problem(adapted)
    assert torch.equal(torch.get_rng_state(), state)
    assert " ".join(name for name, problem in cannot.items() if problem) == KINDS[kind][1], cannot


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_in_blocks", [False, True])
def test_sharing_is_tried_in_one_call_and_block_by_block(is_in_blocks, device, monkeypatch):
    """A model that reads one of the two otherwise is told."""
    monkeypatch.setitem(prefixes.MOST_UNSEEN, "cpu", prefixes.MOST_UNSEEN[device])

    def inputs_of(fold, inputs_of=prefixes.folded_inputs):
        is_wrong = (fold.mask is None) is is_in_blocks
        return inputs_of(fold._replace(input_ids=fold.input_ids.flip(1)) if is_wrong else fold)

    monkeypatch.setattr(prefixes, "folded_inputs", inputs_of)
    assert "hidden states" in prefixes.sharing_problem(toy("qwen3"))


def test_a_model_that_shares_already_keeps_its_attention():
    model = toy("qwen3")
    prefixes.register_attention(model)
    assert not prefixes.sharing_problem(model) and model.config._attn_implementation == "prefix_sdpa"


def test_a_model_that_fails_is_named_with_its_error(monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such argument")

    monkeypatch.setattr(prefixes, "read", fail)
    assert "ValueError: no such argument" in prefixes.packing_problem(toy("qwen3"))


def test_what_one_process_finds_counts_in_all(monkeypatch):
    """But for the cache, when another one may be without a batch."""
    monkeypatch.setattr(prefixes, "gathered", lambda items: [*items, "it fails"])
    model = toy("qwen3")
    assert prefixes.sharing_problem(model) == prefixes.packing_problem(model) == "it fails"
    assert not prefixes.cache_problem(model)
    assert prefixes.anchor_problem(adapters.new_adapter(model, adapters.LoraSettings(4, 8, 0.1, "q_proj")))


def test_held_out_pairs_of_a_model_whose_cache_cannot_be_repeated():
    model = toy("qwen3_next").eval()
    tokens = {"prompt_ids": [*range(5, 45)], "chosen_ids": [50, 51, 52], "rejected_ids": [60, 61, 62, 63]}
    found = dpo.answer_log_probs(model, tokens, 99)
    for answer, log_prob in zip((tokens["chosen_ids"], tokens["rejected_ids"]), found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*tokens["prompt_ids"], *answer]]), use_cache=False).logits[0, 39:-1]
        expected = logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        assert log_prob == pytest.approx(expected, rel=1e-4)
