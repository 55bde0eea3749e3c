"""What is decided about a CUDA device: kernels, precision, the memory of a step, and why a card is not used."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator

import torch
import transformers
from peft import PeftModel
from transformers.integrations import sdpa_attention

from llm_alignment.files import InputError, log
from llm_alignment.processes import device_and_dtype

GIB = 2**30
MAY_GROUP_HEADS = sdpa_attention.use_gqa_in_sdpa  # transformers' own rule

# CUDA's major version -> the oldest driver that runs it (CUDA Toolkit release notes, table of minimum drivers)
OLDEST_DRIVER = {12: 525, 13: 580}


def prepared_device(choice: str, memory_share: float | None) -> tuple[torch.device, torch.dtype]:
    """`device_and_dtype` of --dtype, prepared for the whole process; warns of a card that cannot be used."""
    device, dtype = device_and_dtype(choice)
    if device.type == "cuda":
        prepare_cuda(device, memory_share)
    elif line := unused_card():
        log.warning("%s", line)
    return device, dtype


def prepare_cuda(device: torch.device, memory_share: float | None = None) -> None:
    """Settings of a CUDA device for the whole process, before anything is put on it. `memory_share`: the part of its
    memory, 0 to 1, that the process may take. None: all of it; on Windows what is free, at most 0.95: its driver moves
    what does not fit into host memory, where all is 10 to 50 times slower and no batch is halved."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper and Blackwell it plans again, for 1 s, for every shape
    if sys.platform == "win32":
        free, total = torch.cuda.mem_get_info(device)
        memory_share = memory_share or min(0.95, free / total)
    torch.cuda.set_per_process_memory_fraction(memory_share or 1.0, device)
    # Only the flash kernel takes grouped heads. Where it does not run, on older cards and in float32, they are left to
    # the math kernel, which keeps all probabilities; so keys and values are expanded to the query's heads there.
    has_flash = torch.cuda.get_device_capability(device) >= (8, 0)
    sdpa_attention.use_gqa_in_sdpa = lambda mask, key, value: (
        has_flash and key.dtype != torch.float32 and MAY_GROUP_HEADS(mask, key, value)
    )


def free_memory() -> tuple[int, int]:
    """(free, total) bytes that this process may take on its CUDA device; what torch keeps for reuse is free."""
    free, total = torch.cuda.mem_get_info()
    limit = int(torch.cuda.get_per_process_memory_fraction() * total)
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(free + unused, limit - torch.cuda.memory_allocated()), limit


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """How many rows `fused_nll_kl` should take at once: 1,024 where their logits are a small part of a GPU, else 256;
    not by what is free, so that a run that is resumed sums in the same order."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return 1024 if 16 * 2 * 1024 * vocabulary * 4 <= total else 256


@contextlib.contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    """Inside, CUDA's products of float32 tensors round their inputs to TF32 (10 bits, as float16), or they do not. In
    training in a half type they are of values of that type, exact in TF32, and of gradients."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if is_on else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def unused_card() -> str | None:
    """Why torch does not use the NVIDIA card of this machine, and what to do; None without a card, or when it does."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, driver = found.stdout.partition("\n")[0].rpartition(", ")
    if not (cuda := torch.version.cuda):
        reason = "this torch is built for CPU; install its CUDA build (README, Install)"
    elif int(driver.split(".")[0]) < (needed := OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)):
        reason = f"its driver {driver} is too old for CUDA {cuda}; install driver {needed} or newer"
    else:
        reason = f"torch finds no CUDA device with driver {driver}; restart the computer, or install the driver again"
    return f"{name} is not used: {reason}"


@functools.cache
def apply_liger(model_type: str, device: torch.device) -> bool:
    """Makes transformers build models of this kind with Liger's fused norms, RoPE and SwiGLU; whether it did. To be
    called before a model is loaded. The losses stay the ones here. A kind that Liger does not know is left as it is,
    with one line, and so is one whose small model does not compute what it did before, or fails to, on `device`.
    Raises InputError where liger-kernel is not installed. Source: arXiv 2410.10989."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise InputError(f'--liger: it cannot be imported ({error}); pip install -e ".[fast]"') from error
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if patch is None:
        log.warning("--liger: Liger does not know models of type %s; continuing without it", model_type)
        return False
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=1, vocab_size=64, pad_token_id=0, **sizes)

    def step() -> torch.Tensor:
        """Logits and a gradient of a small model, flat."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).to(device)
        logits = model(torch.arange(8, device=device)[None]).logits
        logits.square().sum().backward()
        return torch.cat([logits.detach().flatten(), model.get_input_embeddings().weight.grad.flatten()])

    expected, module = step(), vars(sys.modules[transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__])
    before = dict(module)
    wanted = dict(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    try:
        patch(**{name: is_on for name, is_on in wanted.items() if name in inspect.signature(patch).parameters})
        is_same = torch.allclose(step(), expected, rtol=1e-3, atol=1e-4)
        problem = None if is_same else "they compute something else"
    except Exception as error:  # a compiler that is missing or fails raises anything
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
    if problem:
        module.update(before)
        log.warning("--liger: its kernels do not work here (%s); continuing without them", problem)
    return problem is None


def memory_estimate(
    model: PeftModel, *, tokens: int, width: int, in_4bit: bool, dropout: bool, scored: int = 0, chunk: int = 256
) -> dict[str, int]:
    """Bytes that training takes, by part, for micro-batches of `tokens` tokens; off by a factor of 1.5 at most.

    "weights"; "adapter" with its gradient and Adam's two moments; "activations", what the layers keep for the backward
    pass; "checkpointed", the same with gradient checkpointing; "logits" of the LM head's chunks; "context" of CUDA.

    `model` has its adapter and may be on torch's meta device. `width`: bytes of a number in the type of the weights.
    `scored`: answer tokens of a DPO micro-batch, which TRL's head reads; 0 is the anchored SFT loss, which reads
    `chunk` rows at a time.
    """
    base = model.get_base_model()
    config = base.config.get_text_config()
    embeddings = {base.get_input_embeddings().weight, base.get_output_embeddings().weight}
    embedding_size = sum(parameter.numel() for parameter in embeddings)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapter_size = sum(p.numel() for _, p in trained)
    rest = model.num_parameters() - embedding_size - adapter_size
    layers, hidden, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    # Per token and layer. The base is frozen, so its linear layers keep nothing; norms keep their input in float32.
    layer = 4 * (2 * hidden + query + key)
    layer += width * (2 * query + 2 * query + 3 * config.intermediate_size)  # attention with its output; gated MLP
    # An adapter keeps its input in float32, with dropout the mask too.
    inputs = sum(p.shape[1] for name, p in trained if "lora_A" in name) / layers
    layer += inputs * (5 if dropout else 4 * (width != 4))
    if scored:  # TRL's tile in float32, with its temporaries where there is no Triton; a part of the head in float32
        tile = 4 * min(scored, 4096) * min(vocabulary, 32_768)
        tiles = 1 if transformers.utils.is_triton_available() else 6
        logits = tiles * tile + 4 * hidden * (min(vocabulary, 32_768) + 3 * scored)
    else:  # logits of both distributions in float32; for the products of a half type a copy of each in that type
        logits = 2 * chunk * vocabulary * (4 + (width if width < 4 else 0)) + tokens * hidden * (width + 4)
    return {
        "weights": round(embedding_size * width + rest * (0.53 if in_4bit else width)),  # 4 bits and their scales
        "adapter": 16 * adapter_size,
        "activations": round(tokens * layers * layer),
        "checkpointed": round(tokens * (layers * hidden * width + layer)),
        "logits": logits,
        "context": round(0.7 * GIB),  # of the driver and the libraries' kernels: 0.5 to 0.8
    }
