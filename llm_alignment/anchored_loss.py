"""The anchored SFT loss: NLL (or DFT) plus a KL divergence to the reference, without full-size logits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fused_nll_kl(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ref_hidden: torch.Tensor | None = None,
    kl_mask: torch.Tensor | None = None, *, kl_coef: torch.Tensor | float = 0.0, kl_direction: str = "reverse",
    sft_loss: str = "nll", num_items: torch.Tensor | int | None = None, rows_per_chunk: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The SFT term plus kl_coef * KL between student and reference, from hidden states, without full-size logits.

    Logits are formed for `rows_per_chunk` rows at a time, once each, and the gradient to `hidden` is computed from
    them, so that backward only scales it. The SFT term is a sum over target rows / `num_items`; the KL is its mean
    over the KL rows.

    Args:
        hidden: (rows, H) the student's last hidden states, any float type.
        weight: (V, H) the LM head, frozen, of both. The matrix products take its type; with a half type everything
            else is computed in float32.
        labels: (rows,) int64 next tokens, already shifted; -100 is not a target.
        ref_hidden: (rows, H) the reference's last hidden states; None leaves the KL out (it is 0).
        kl_mask: (rows,) bool, the targets that the KL acts on. None: all of them.
        kl_direction: "reverse" (3) or "forward" (4).
        sft_loss: "nll" (1) or "dft" (2), arXiv 2508.05629; "dft" with "forward" is ASFT (arXiv 2509.23753).
        num_items: the divisor of the SFT term; None means the number of target rows.

    Returns (loss, nll, kl), scalars; only `loss` = nll + kl_coef * kl has a gradient, `nll` is the SFT term. Raises
    ValueError when `weight` requires a gradient, which is not computed, or for a name that is unknown.

    p_s and p_r are the two distributions of a row, K is the number of KL rows, sg is without gradient:
        (1) NLL         -log p_s[label]                   (2) DFT         -sg(p_s[label]) * log p_s[label]
        (3) reverse KL  sum p_s * (log p_s - log p_r)     (4) forward KL  sum p_r * (log p_r - log p_s)
    The gradient to the row's logits, with a = 1/num_items, for (2) p_s[label]/num_items, is the sum of
        (5) (1), (2)  a * (p_s - onehot(label))
        (6) (3)       kl_coef/K * p_s * (log p_s - log p_r - KL)
        (7) (4)       kl_coef/K * (p_s - p_r)
    """
    import torch

    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("fused_nll_kl computes no gradient for the LM head: freeze it")
    if kl_direction not in {"reverse", "forward"} or sft_loss not in {"nll", "dft"}:
        raise ValueError(f"unknown kl_direction {kl_direction!r} or sft_loss {sft_loss!r}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    targets = labels != -100
    kl_rows = targets if kl_mask is None else targets & kl_mask
    if ref_hidden is None:
        kl_rows = torch.zeros_like(targets)
    num_items = torch.as_tensor(targets.sum() if num_items is None else num_items, device=hidden.device)
    share = 1 / num_items.clamp(min=1).to(dtype)
    c = kl_coef / kl_rows.sum().clamp(min=1).to(dtype)
    nll, kl = torch.zeros((2,), dtype=dtype, device=hidden.device)
    gradient = torch.zeros_like(hidden, dtype=dtype) if torch.is_grad_enabled() and hidden.requires_grad else None
    # Used again for every chunk: the system hands out pages of this size slower than they are computed on.
    shape = 1 if ref_hidden is None else 2, min(rows_per_chunk, len(labels)), len(weight)
    buffers = hidden.new_empty(shape, dtype=dtype)

    with torch.no_grad():
        parts = [mask.nonzero().squeeze(1).split(rows_per_chunk) for mask in (targets & ~kl_rows, kl_rows)]
        for rows in filter(len, parts[0] + parts[1]):
            z = shifted_logits(hidden[rows], weight, buffers[0])
            z_label = z.gather(1, labels[rows, None])
            kl_gradient = None
            if ref_hidden is not None and kl_rows[rows[0]]:
                ref_z = shifted_logits(ref_hidden[rows], weight, buffers[1])
                kl_chunk = reverse_kl_chunk if kl_direction == "reverse" else forward_kl_chunk
                row_kl, exp, total, kl_gradient, scale = kl_chunk(z, ref_z)
                kl += row_kl.sum()
            else:
                exp = z.exp_()
                total = exp.sum(1, keepdim=True)
            row_nll = total.log() - z_label  # (1)
            row_weight = (-row_nll).exp() if sft_loss == "dft" else torch.ones_like(row_nll)  # (2)
            nll += (row_weight * row_nll).sum()
            if gradient is not None:
                a = share * row_weight
                if kl_gradient is not None and weight.dtype == dtype:  # both in one product
                    product = matmul_float32(kl_gradient.mul_(c / scale).addcmul_(exp, a / total), weight)
                else:  # in a half type the factors come after the products, for its range, and the KL has one of its
                    # own: added to a number near 1 it would be rounded away
                    product = matmul_float32(exp, weight) * (a / total)
                    if kl_gradient is not None:
                        product = product + matmul_float32(kl_gradient, weight) * (c / scale)
                gradient[rows] = product - a * weight[labels[rows]]  # (5) and (6) or (7), times the head
    nll, kl = nll * share, kl / kl_rows.sum().clamp(min=1)
    loss = nll + kl_coef * kl
    if gradient is not None:  # adds 0, with the gradient that is known already
        known = (hidden * gradient).sum()
        loss = loss + (known - known.detach())
    return loss, nll, kl


def matmul_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (m, k) @ b (k, n) with `a` in the type of `b`; half types are summed, and returned, in float32."""
    import torch

    a = a.to(b.dtype)
    if b.dtype not in {torch.float16, torch.bfloat16}:
        return torch.mm(a, b, out=out)
    if b.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def shifted_logits(hidden: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Logits (rows, V) less each row's largest, in the memory of `buffer`: exp of them is at most 1."""
    z = matmul_float32(hidden, weight.T, out=buffer[: len(hidden)])
    return z.sub_(z.amax(1, keepdim=True))


def reverse_kl_chunk(z: torch.Tensor, ref_z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """KL(p_student || p_reference) of each row and its gradient: (3) and (6). z, ref_z: (rows, V) of `shifted_logits`,
    overwritten. Returns kl (rows, 1), exp and total, p_s = exp / total, `gradient` and `scale`, (6) its quotient."""
    import torch

    ref_total = sum(part.exp().sum(1, keepdim=True) for part in ref_z.split(8192, dim=1))
    log_ratio = ref_z.neg_().add_(z)  # log p_s - log p_r, up to a constant of the row
    exp = z.exp_()
    total = exp.sum(1, keepdim=True)
    mean = torch.einsum("rv,rv->r", exp, log_ratio)[:, None] / total
    kl = mean - total.log() + ref_total.log()  # (3)
    return kl, exp, total, log_ratio.sub_(mean).mul_(exp), total  # (6); the constant drops out


def forward_kl_chunk(z: torch.Tensor, ref_z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(4) and (7): as `reverse_kl_chunk` with KL(p_reference || p_student); `gradient` / `scale` is p_s - p_r."""
    import torch

    cross = torch.zeros_like(z[:, :1])  # sum over the vocabulary of exp(ref_z) * (ref_z - z), in parts to save memory
    for part, ref_part in zip(z.split(8192, dim=1), ref_z.split(8192, dim=1), strict=True):
        difference = ref_part - part
        cross = cross + torch.einsum("rv,rv->r", ref_part.exp_(), difference)[:, None]
    ref_exp, ref_total = ref_z, ref_z.sum(1, keepdim=True)
    exp = z.exp_()
    total = exp.sum(1, keepdim=True)
    kl = cross / ref_total - ref_total.log() + total.log()  # (4)
    scale = torch.minimum(total, ref_total)  # keeps both parts at most 1, the range of half types
    return kl, exp, total, ref_exp.mul_(-scale / ref_total).addcmul_(exp, scale / total), scale  # (7)


@dataclasses.dataclass(frozen=True)
class AnchorSettings:
    """The flags of that name."""

    sft_loss: str = "nll"
    kl_coef: float = 0.02
    kl_start_step: float = 0  # below 1 a share of the run's steps
    kl_warmup_steps: float = 300
    kl_limit_seq: int = 0
    kl_direction: str = "reverse"
    kl_on: str = "all"  # or "replay": replay rows alone

    def over(self, steps: int) -> AnchorSettings:
        """The settings of a run of so many steps: shares become steps."""
        shares = {name: getattr(self, name) for name in ("kl_start_step", "kl_warmup_steps")}
        return dataclasses.replace(self, **{name: round(share * steps) for name, share in shares.items() if share < 1})

    def coefficient(self, step: int) -> float:
        """c(t): 0 before `kl_start_step`, then a linear rise to `kl_coef` over `kl_warmup_steps`."""
        if step < self.kl_start_step:
            return 0.0
        return self.kl_coef * min(1.0, (step - self.kl_start_step) / max(1, self.kl_warmup_steps))
