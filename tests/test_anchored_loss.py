"""The fused loss against the plain formula, and which positions the KL acts on."""

import argparse
import dataclasses

import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_alignment.anchored_loss import AnchorSettings, fused_nll_kl
from llm_alignment.devices import rows_at_once
from llm_alignment.sft import tail_mask


def plain(hidden, weight, labels, ref_hidden, kl_mask, kl_coef, num_items, kl_direction="reverse", sft_loss="nll"):
    """The definition: full logits, log_softmax, autograd."""
    targets = labels != -100
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    picked = log_p[torch.arange(len(labels)), labels.clamp(min=0)]
    if sft_loss == "dft":
        picked = picked * picked.exp().detach()
    nll = -(picked * targets).sum() / (max(1, int(targets.sum())) if num_items is None else num_items)
    kl = hidden.new_zeros(())
    if ref_hidden is not None:
        rows = targets & (torch.ones_like(targets) if kl_mask is None else kl_mask)
        log_r = torch.log_softmax(ref_hidden @ weight.T, -1)
        terms = log_p.exp() * (log_p - log_r) if kl_direction == "reverse" else log_r.exp() * (log_r - log_p)
        per_row = terms.sum(-1)
        kl = (per_row * rows).sum() / max(1, int(rows.sum()))
    return nll + kl_coef * kl, nll, kl


def case(seed, rows, width, vocabulary, ignored, in_kl, dtype):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype)
    ref_hidden = hidden + 0.5 * torch.randn(rows, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    kl_mask = torch.rand(rows, generator=generator) < in_kl
    return hidden, weight, labels, ref_hidden, kl_mask


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 23), width=st.integers(1, 9), vocabulary=st.integers(2, 40),
    ignored=st.sampled_from([0.0, 0.3, 1.0]), in_kl=st.sampled_from([0.0, 0.5, 1.0, None]),
    with_reference=st.booleans(), kl_coef=st.sampled_from([0.0, 0.02, 1.5]), num_items=st.sampled_from([None, 7]),
    rows_per_chunk=st.integers(1, 30), upstream=st.sampled_from([1.0, -2.5]),
    dtype=st.sampled_from([torch.float64, torch.float32]), kl_direction=st.sampled_from(["reverse", "forward"]),
    sft_loss=st.sampled_from(["nll", "dft"]),
)  # fmt: skip
def test_fused_equals_the_plain_formula(
    seed, rows, width, vocabulary, ignored, in_kl, with_reference, kl_coef, num_items, rows_per_chunk, upstream, dtype,
    kl_direction, sft_loss,
):  # fmt: skip
    hidden, weight, labels, ref_hidden, kl_mask = case(seed, rows, width, vocabulary, ignored, in_kl or 0.0, dtype)
    kl_mask = None if in_kl is None else kl_mask
    ref_hidden = ref_hidden if with_reference else None
    fused_in = hidden.clone().requires_grad_()
    got = fused_nll_kl(
        fused_in, weight, labels, ref_hidden, kl_mask,
        kl_coef=kl_coef, num_items=num_items, rows_per_chunk=rows_per_chunk, kl_direction=kl_direction,
        sft_loss=sft_loss,
    )  # fmt: skip
    (got[0] * upstream).backward()
    exact_in = hidden.double().requires_grad_()
    exact_reference = None if ref_hidden is None else ref_hidden.double()
    want = plain(
        exact_in, weight.double(), labels, exact_reference, kl_mask, kl_coef, num_items, kl_direction, sft_loss
    )
    (want[0] * upstream).backward()

    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for a, b in zip(got, want, strict=True):
        assert abs(a.item() - b.item()) <= tolerance * max(1.0, abs(b.item()))
    assert (fused_in.grad - exact_in.grad).norm() <= tolerance * max(exact_in.grad.norm(), 1.0)


LOSSES = [(direction, sft_loss) for direction in ("reverse", "forward") for sft_loss in ("nll", "dft")]


@pytest.mark.parametrize("anchored", [0.6, 1])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction, anchored):
    """Of NLL and KL, on a share of the rows and on one. The weights of DFT have no gradient to compare."""
    hidden, weight, labels, ref_hidden, kl_mask = case(0, 7, 4, 11, 0.3, 0.6, torch.float64)
    if anchored == 1:
        kl_mask = torch.arange(7) == (labels != -100).int().argmax()
    hidden.requires_grad_()

    def loss(h):
        return fused_nll_kl(
            h, weight, labels, ref_hidden, kl_mask, kl_coef=0.7, kl_direction=direction, rows_per_chunk=2
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden,), rtol=1e-7, atol=1e-9)


def test_hand_worked():
    """Two words; the student says (3/4, 1/4), the reference (1/2, 1/2); the label is the second word."""
    log = torch.log(torch.tensor(3.0, dtype=torch.float64)).item()
    hidden, weight = torch.tensor([[log]], dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    inputs = hidden, weight, torch.tensor([1]), torch.zeros_like(hidden)
    ln2, ln3, ln4 = (torch.log(torch.tensor(float(n))).item() for n in (2, 3, 4))
    loss, nll, kl = fused_nll_kl(*inputs)
    assert loss.item() == nll.item(), "there is no anchor where none is asked for"
    assert nll.item() == pytest.approx(ln4) and kl.item() == pytest.approx(0.75 * ln3 - ln2)
    loss, nll, kl = fused_nll_kl(*inputs, kl_coef=2.0, kl_direction="forward", sft_loss="dft")
    assert nll.item() == pytest.approx(0.25 * ln4) and kl.item() == pytest.approx(ln2 - 0.5 * ln3)
    assert loss.item() == pytest.approx(0.25 * ln4 + 2 * (ln2 - 0.5 * ln3))


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1])
    loss, nll, kl = fused_nll_kl(hidden, weight, labels, -hidden.detach(), kl_coef=1.0)
    loss.backward()
    assert nll.item() == pytest.approx(300) and kl.item() == pytest.approx(600)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction, sft_loss", LOSSES)
@pytest.mark.parametrize("states", ["float32", "half"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_head_under_mixed_precision(half, states, direction, sft_loss, device):
    """Against float64 with the same rounded inputs. Hidden states come in float32 (autocast) or in the half type."""
    inputs = case(1, 40, 16, 500, 0.2, 0.5, torch.float32)
    hidden, weight, labels, ref_hidden, kl_mask = (x.to(device) for x in inputs)
    weight = (weight / 4).to(half)
    if states == "half":
        hidden, ref_hidden = hidden.to(half), ref_hidden.to(half)
    results = []
    for double in (True, False):
        inputs = [hidden, weight, ref_hidden]
        head_in, head, head_reference = (x.double() for x in inputs) if double else inputs
        head_in = head_in.clone().requires_grad_()
        loss, _, _ = fused_nll_kl(
            head_in, head, labels, head_reference, kl_mask,
            kl_coef=0.5, num_items=4000, kl_direction=direction, sft_loss=sft_loss,
        )  # fmt: skip
        loss.backward()
        results.append((loss.item(), head_in.grad.double()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-2)
    assert (results[1][1] - results[0][1]).norm() < 2e-2 * results[0][1].norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_weak_anchor_is_not_rounded_away(half, direction, device):
    """Folded into the product of the NLL, c / a * (log p/r - KL) of 1e-3 would be less than half a step of bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 64, generator=generator).to(device) / 4
    ref_hidden = hidden + 0.01 * torch.randn(64, 64, generator=generator).to(device)
    weight = torch.randn(9000, 64, generator=generator).to(device, half)  # more than the KL takes at once
    labels = torch.randint(9000, (64,), generator=generator).to(device)

    def gradient(head, kl_coef):
        states = hidden.clone().requires_grad_()
        fused_nll_kl(states, head, labels, ref_hidden, kl_coef=kl_coef, kl_direction=direction)[0].backward()
        return states.grad

    pulls = [gradient(head, 0.02) - gradient(head, 0.0) for head in (weight.float(), weight)]
    cosine = torch.nn.functional.cosine_similarity(*(pull.flatten() for pull in pulls), dim=0)
    assert cosine > 0.95


def test_what_cannot_be_computed_is_refused():
    hidden, weight, labels = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="freeze"):
        fused_nll_kl(hidden, weight.clone().requires_grad_(), labels)
    for unknown in ({"kl_direction": "backward"}, {"sft_loss": "mse"}):
        with pytest.raises(ValueError, match="unknown"):
            fused_nll_kl(hidden, weight, labels, **unknown)


def test_rows_at_once_depend_on_the_card_alone(monkeypatch):
    device = torch.device("cuda")
    for gigabytes, rows in ((80, 1024), (24, 1024), (16, 256)):
        card = argparse.Namespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert rows_at_once(151_936, device) == rows and rows_at_once(151_936, torch.device("cpu")) == 256


def test_the_known_gradient_leaves_the_loss_exact():
    """The loss with a gradient is the loss without one to the bit, also where hidden states are large in float16."""
    hidden = (1000 * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))).half()
    weight, labels = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).half() / 50, torch.arange(8)
    plain_loss = fused_nll_kl(hidden, weight, labels)[0]
    states = hidden.clone().requires_grad_()
    loss = fused_nll_kl(states, weight, labels)[0]
    loss.backward()
    assert loss.item() == plain_loss.item() and states.grad.isfinite().all() and states.grad.dtype == torch.float16


def test_tail_is_each_examples_own():
    # two padded rows of 5 and 3 targets
    targets = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    row = torch.tensor([[0] * 5, [1] * 5])
    assert tail_mask(targets, row, 2).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]
    assert tail_mask(targets, row, 0).equal(targets)
    assert tail_mask(targets, row, 9).equal(targets)
    # one packed row of examples of 3, 1 and 2 targets, the first target of each next example being none
    targets = torch.tensor([[1, 1, 1, 0, 1, 0, 1, 1]]).bool()
    example = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    assert tail_mask(targets, example, 2).int().tolist() == [[0, 1, 1, 0, 1, 0, 1, 1]]


def test_kl_schedule():
    anchor = AnchorSettings(kl_coef=0.03, kl_start_step=200, kl_warmup_steps=300)
    assert [anchor.coefficient(step) for step in (0, 199, 200)] == [0, 0, 0]
    assert anchor.coefficient(350) == pytest.approx(0.015)
    assert anchor.coefficient(500) == anchor.coefficient(9999) == 0.03
    assert dataclasses.replace(anchor, kl_warmup_steps=0).coefficient(201) == 0.03


def test_shares_of_a_run_become_steps():
    anchor = AnchorSettings(kl_start_step=0.1, kl_warmup_steps=0.25).over(44)
    assert (anchor.kl_start_step, anchor.kl_warmup_steps) == (4, 11)
    anchor = AnchorSettings(kl_start_step=1, kl_warmup_steps=0.5).over(44)
    assert (anchor.kl_start_step, anchor.kl_warmup_steps) == (1, 22)
    assert AnchorSettings().over(44) == AnchorSettings()
