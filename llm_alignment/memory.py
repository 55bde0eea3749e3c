"""The memory that a training step takes on a device, by calculation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel

GIB = 2**30


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
    from transformers.utils import is_triton_available

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
        logits = tile * (1 if is_triton_available() else 6) + 4 * hidden * (min(vocabulary, 32_768) + 3 * scored)
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
