"""The folded row against plain forward passes of every prompt and answer, and the order of grouped pairs."""

import copy
import functools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from llm_alignment import batches, prefixes


@functools.cache
def small_models():
    """Two copies of a random Qwen3 of two layers: one with TRL's fused head alone, one that also shares prefixes."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="sdpa",
    )  # fmt: skip
    plain = Qwen3ForCausalLM(config)
    for parameter in plain.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)  # so that attention is far from even
    shared = copy.deepcopy(plain)
    add_fused_lm_head(plain, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    prefixes.add_prefix_sharing(shared)
    return plain, shared


def trl_batch(prompts, answers):
    """TRL's batch of a fused forward: the chosen rows, then the rejected ones, padded on the right."""
    rows = [prompt + answer[side] for side in (0, 1) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    for row, prompt in zip(labels, [*prompts, *prompts], strict=True):
        row[: len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_equal_to_plain(prompts, answers):
    batch = trl_batch(prompts, answers)
    torch.manual_seed(1)
    weights = torch.randn(batch["labels"].shape)[:, 1:]  # so that every log-probability has a gradient of its own
    results = []
    for model in small_models():
        model.zero_grad()
        output = model(**batch, fused_lm_head=True)
        (output.log_probs * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if "lm_head" not in name}
        results.append((output, gradients))
    (expected, expected_gradients), (output, gradients) = results
    for name in ("log_probs", "entropy", "mean_logits"):
        assert torch.allclose(output[name], expected[name], rtol=1e-4, atol=1e-5), name
    assert torch.equal(output["is_top1"], expected["is_top1"] & (batch["labels"][:, 1:] != -100))
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


TOKENS = st.integers(1, 4)  # few, so that prompts share beginnings by chance too


@st.composite
def prefix_trees(draw):
    """Prompts that branch off one another at random places, and two answers for each."""
    prompts = [draw(st.lists(TOKENS, min_size=1, max_size=12))]
    for _ in range(draw(st.integers(0, 4))):
        parent = draw(st.sampled_from(prompts))
        cut = draw(st.integers(0, len(parent)))
        prompts.append(parent[:cut] + draw(st.lists(TOKENS, min_size=0 if cut else 1, max_size=8)))
    answer = st.lists(TOKENS, min_size=1, max_size=5)
    return prompts, [(draw(answer), draw(answer)) for _ in prompts]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(prefix_trees(), st.sampled_from([0, 3]))
def test_random_trees_equal_plain_forward_passes(tree, most_unseen):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prefixes.MOST_UNSEEN, "cpu", most_unseen)  # 0: block by block
        assert_equal_to_plain(*tree)


@pytest.mark.parametrize("most_unseen", [0, 99])
@pytest.mark.parametrize("pairs", [1, 2, 5, 8])
def test_pairs_of_one_table(pairs, most_unseen, monkeypatch):
    monkeypatch.setitem(prefixes.MOST_UNSEEN, "cpu", most_unseen)
    table = [1 + number % 7 for number in range(40)]
    prompts = [table + [8 + pair % 3, *range(9, 9 + pair)] for pair in range(pairs)]
    answers = [([20 + pair, *range(pair), 31], [31]) for pair in range(pairs)]  # 31 alone: an empty answer's end token
    assert_equal_to_plain(prompts, answers)


def test_a_pair_without_a_prompt_predicts_all_but_the_first_token():
    assert_equal_to_plain([[], [1, 2, 3]], [([4, 5], [6, 7, 8]), ([4], [5])])


def test_the_row_holds_what_is_shared_once(monkeypatch):
    monkeypatch.setitem(prefixes.MOST_UNSEEN, "cpu", 3)
    batch = trl_batch([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 3]], [([7, 7], [8, 8, 8]), ([7, 7, 7], [8])])
    fold = prefixes.fold_pairs(**batch, dtype=torch.float32)
    assert fold.input_ids.tolist() == [[1, 1, 1, 1, 2, 2, 7, 7, 8, 8, 8, 3, 7, 7, 7, 8]]
    assert fold.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 4, 5, 6, 7, 5]]
    assert [block.queries for block in fold.blocks] == [6, 5, 5] and sum(fold.segments) == 16
    assert fold.blocks[0].mask is None and fold.blocks[2].mask.shape == (1, 1, 5, 9)
    assert fold.predictors.tolist() == [5, 6, 11, 12, 13, 5, 8, 9, 11]
    seen = [[place for place, score in enumerate(row) if score == 0] for row in fold.mask[0, 0].tolist()]
    assert seen[6:11] == [[*range(7)], [*range(8)], [*range(6), 8], [*range(6), 8, 9], [*range(6), 8, 9, 10]]
    assert seen[5] == [*range(6)] and seen[15] == [0, 1, 2, 3, 11, 15]
    assert "fold" not in prefixes.folded_inputs(fold) and "fold" in prefixes.folded_inputs(fold._replace(mask=None))


def test_one_call_where_it_is_little_more_arithmetic():
    """Two questions on one table; not where nothing is shared, nor where long rests of their own follow."""

    def mask(*prompts):
        return prefixes.fold_pairs(**trl_batch(prompts, [([7], [8])] * len(prompts)), dtype=torch.bfloat16).mask

    assert mask([1] * 20 + [2], [1] * 20 + [3]).dtype == torch.bfloat16
    assert mask([1] * 20, [2] * 20) is None and mask([1] * 20) is None
    assert mask(*([1] * 10 + [pair] * 30 for pair in range(2, 10))) is None


def test_masks_stay_small():
    """A short common beginning is read again: with it the mask of the rest would be nearly (T, T)."""
    assert list(batches.shared_lengths([[1, 2, *[3] * 98], [1, 2, *[4] * 98]])) == [(0, 0), (1, 0)]
    assert list(batches.shared_lengths([[1] * 50 + [3] * 50, [1] * 50 + [2] * 50])) == [(1, 0), (0, 50)]


def test_other_models_keep_their_attention():
    _, shared = small_models()
    other = Qwen3ForCausalLM(copy.deepcopy(shared.config))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert shared.config._attn_implementation == "prefix_sdpa"
    other.set_attn_implementation("sdpa")
    assert shared.config._attn_implementation == "prefix_sdpa"


def test_steps_back_with_a_reason():
    names = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
    size = dict.fromkeys(names, 8) | dict(num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1)
    model = Qwen3ForCausalLM(Qwen3Config(**size))
    assert prefixes.no_sharing_reason(model) is None and prefixes.no_packing_reason(model) is None
    model._is_stateful = True
    assert "carry a state" in prefixes.no_packing_reason(model)
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in prefixes.no_sharing_reason(model)
    windowed = Qwen3Config(**size, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert "full attention" in prefixes.no_sharing_reason(Qwen3ForCausalLM(windowed))


@pytest.mark.parametrize(
    "kinds, can_share, can_pack",
    [
        (["full_attention"], True, True),
        (["full_attention", "sliding_attention"], False, True),
        (["chunked_attention"], False, True),
        (["full_attention", "sliding_attention", "chunked_attention"], False, True),
        (["full_attention", "linear_attention"], False, False),
    ],
)
def test_layers_tell_what_can_be_shared_and_packed(kinds, can_share, can_pack):
    model = Qwen3ForCausalLM(copy.deepcopy(small_models()[0].config))
    model.set_attn_implementation("sdpa")
    model.config.layer_types = kinds
    assert (prefixes.no_sharing_reason(model) is None) is can_share
    assert (prefixes.no_packing_reason(model) is None) is can_pack


def test_groups_share_half_of_their_prompt():
    one, two = [1] * 10, [2] * 10
    prompts = [one + [5], two + [5], one + [6, 6], [9, 9, 9], two + [7], one[:4] + [3] * 9]
    groups = batches.groups_of(prompts)
    assert sorted(sorted(group) for group in groups) == [[0, 2], [1, 4], [3], [5]]
    order = batches.GroupedOrder(groups, seed=1)
    first = list(order)
    assert sorted(first) == list(range(6)) and len(order) == 6 and list(order) == first
    assert abs(first.index(0) - first.index(2)) == 1 and abs(first.index(1) - first.index(4)) == 1
    orders = set()
    for epoch in range(8):
        order.set_epoch(epoch)
        orders.add(tuple(order))
    assert len(orders) > 1 and first in map(list, orders)
    alone = [batches.GroupedOrder([list(range(30))], seed) for seed in (1, 2)]  # all under one system prompt
    assert list(alone[0]) != list(alone[1]) and list(range(30)) not in map(list, alone)
    tables = [batches.GroupedOrder([[n] for n in range(30)], seed) for seed in (1, 2)]
    assert list(tables[0]) != list(tables[1]) and list(range(30)) not in map(list, tables)


@pytest.mark.parametrize("rest", [4, 150])
def test_sharing_across_pairs_keeps_fewer_bytes(monkeypatch, rest):
    """What the backward pass needs, masks included, against each prompt read once and against TRL's rows."""
    plain, shared = small_models()
    table = [1 + number % 7 for number in range(200)]
    prompts = [table + [8 + (pair + number) % 20 for number in range(rest)] for pair in range(6)]
    batch = trl_batch(prompts, [([20 + pair, 31], [31]) for pair in range(6)])

    def kept_bytes(model):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch, fused_lm_head=True)
        return sum(size for size, _ in kept.values())

    tree = kept_bytes(shared)
    monkeypatch.setattr(batches, "SHARED_PART", 2.0)
    assert tree < kept_bytes(shared) < kept_bytes(plain)


@pytest.mark.parametrize(
    "kernel, is_kept", [("works", True), ("wrong", False), ("inexact", False), ("no compiler", False)]
)
def test_trls_kernel_is_tried_before_it_is_needed(monkeypatch, logged, kernel, is_kept):
    """On a machine with Triton; the tiles stand in for the kernel that works."""

    def wrong(*args, **kwargs):
        chunked_logprob._forward_tile(*args, **kwargs)
        args[3].add_(1 if kernel == "wrong" else 0.01)  # running_max

    class Launched:
        def __init__(self, tile):
            self.tile = tile

        def __getitem__(self, grid):
            return self.tile

    forward = wrong if kernel in {"wrong", "inexact"} else chunked_logprob._forward_tile
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    monkeypatch.setattr(chunked_logprob, "_use_triton", lambda device: chunked_logprob._TRITON_AVAILABLE)
    monkeypatch.setattr(chunked_logprob, "triton", types.SimpleNamespace(cdiv=lambda a, b: -(-a // b)), raising=False)
    if kernel != "no compiler":  # else there is a function that cannot be launched
        monkeypatch.setattr(chunked_logprob, "_forward_kernel", Launched(forward))
        monkeypatch.setattr(chunked_logprob, "_backward_kernel", Launched(chunked_logprob._backward_tile))
    prefixes.settle_head(torch.device("cpu"))
    assert chunked_logprob._TRITON_AVAILABLE is is_kept and len(logged.records) == (not is_kept)
