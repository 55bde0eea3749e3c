"""What is decided about a CUDA device: its kernels, its precision, its memory, and why a card is not used."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_alignment.files import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("llm_alignment")

# CUDA's major version -> the oldest driver that runs it (CUDA Toolkit release notes, table of minimum drivers)
OLDEST_DRIVER = {12: 525, 13: 580}


def prepare_cuda(device: torch.device, memory_share: float | None = None) -> None:
    """Settings of a CUDA device that hold for the whole process; to be called before anything is put on it.

    `memory_share`: the part of its memory, 0 to 1, that the process may take. None: all of it, and 0.95 on Windows,
    whose driver moves what does not fit into host memory: all is 10 to 50 times slower, and no batch is halved.
    """
    import torch
    from transformers.integrations import sdpa_attention

    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper and Blackwell it plans again, for 1 s, for every shape
    memory_share = memory_share or (0.95 if sys.platform == "win32" else 1.0)
    torch.cuda.set_per_process_memory_fraction(memory_share, device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        # Keys and values are expanded to the query's heads, or at one query the heads are packed: grouped ones are
        # left to the math kernel there, which keeps all probabilities.
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False


def free_memory() -> tuple[int, int]:
    """(free, total) bytes that this process may take on its CUDA device; what torch keeps for reuse is free."""
    import torch

    free, total = torch.cuda.mem_get_info()
    limit = int(torch.cuda.get_per_process_memory_fraction() * total)
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(free + unused, limit - torch.cuda.memory_allocated()), limit


@contextlib.contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    """Inside, CUDA's products of float32 tensors round their inputs to TF32 (10 bits, as float16), or they do not.

    In training in a half type they are of values of that type, exact in TF32, and of gradients.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if is_on else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def unused_card() -> str | None:
    """Why torch does not use the NVIDIA card of this machine, and what to do; None without a card, or when it does."""
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, driver = found.stdout.partition("\n")[0].rpartition(", ")
    cuda = torch.version.cuda
    needed = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0) if cuda else 0
    if not cuda:
        reason = "this torch is built for CPU; install its CUDA build (README, Install)"
    elif int(driver.split(".")[0]) < needed:
        reason = f"its driver {driver} is too old for CUDA {cuda}; install driver {needed} or newer"
    else:
        reason = f"torch finds no CUDA device with driver {driver}; restart the computer, or install the driver again"
    return f"{name} is not used: {reason}"


@functools.cache
def apply_liger(model_type: str, device: torch.device) -> bool:
    """Makes transformers build models of this kind with Liger's fused norms, RoPE and SwiGLU; whether it did.

    To be called before a model is loaded. The losses stay the ones here. A kind that Liger does not know is left as it
    is, with one line, and so is one whose small model does not compute what it did before, or fails to, on `device`.
    Raises InputError where liger-kernel is not installed. Source: arXiv 2410.10989.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise InputError(f'--liger: it cannot be imported ({error}); pip install -e ".[fast]"') from error
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if patch is None:
        log.warning("--liger: Liger does not know models of type %s; continuing without it", model_type)
        return False
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    config = AutoConfig.for_model(model_type, num_hidden_layers=1, vocab_size=64, pad_token_id=0, **sizes)

    def small_model() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).to(device)

    def step(model: PreTrainedModel) -> torch.Tensor:
        """Its logits and a gradient, flat."""
        logits = model(torch.arange(8, device=device)[None]).logits
        logits.square().sum().backward()
        return torch.cat([logits.detach().flatten(), model.get_input_embeddings().weight.grad.flatten()])

    model = small_model()
    expected, module = step(model), vars(sys.modules[type(model).__module__])
    before = dict(module)
    wanted = dict(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    try:
        patch(**{name: is_on for name, is_on in wanted.items() if name in inspect.signature(patch).parameters})
        is_same = torch.allclose(step(small_model()), expected, rtol=1e-3, atol=1e-4)
        problem = None if is_same else "they compute something else"
    except Exception as error:  # a compiler that is missing or fails raises anything
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
    if problem:
        module.update(before)
        log.warning("--liger: its kernels do not work here (%s); continuing without them", problem)
    return problem is None
