"""Switches of CUDA, tried on a CPU: each is set, does what it says to the call that follows, and is taken back."""

import sys
import types

import pytest
import torch
from conftest import DEMO
from toys import make_model, toy_base

from llm_alignment import devices, models, processes
from llm_alignment.files import InputError


@pytest.mark.parametrize(
    "capability, dtype, is_grouped, platform, free, share, limit",
    [
        ((7, 5), torch.bfloat16, False, "linux", 60, None, 1.0),
        ((8, 0), torch.bfloat16, True, "win32", 99, None, 0.95),
        ((8, 0), torch.bfloat16, True, "win32", 80, None, 0.8),
        ((9, 0), torch.float32, False, "win32", 80, 0.5, 0.5),
    ],
)
def test_attention_and_memory_of_a_card(monkeypatch, capability, dtype, is_grouped, platform, free, share, limit):
    """cuDNN's attention is off everywhere; only where the flash kernel runs does a call ask for grouped heads."""
    from transformers.integrations import sdpa_attention

    limits, grouped = [], []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ids = torch.arange(12).view(2, 6)
    expected = make_model().to(dtype)(ids).logits
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)  # put back at the end
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", platform)
            devices.prepare_cuda(torch.device("cuda", 0), share)
        assert limits == [limit] and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

    def watched(query, key, *rest, **options):
        grouped.append(options.get("enable_gqa", False))
        return sdpa(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    output = make_model().to(dtype)(ids)
    make_model().to(dtype)(ids[:, :1], past_key_values=output.past_key_values)  # a decoding step
    assert torch.allclose(output.logits, expected, atol=1e-5 if dtype == torch.float32 else 0.02)
    assert len(grouped) == 4 and set(grouped) == {is_grouped}


def test_several_gpus_on_windows_are_refused_before_they_are_set_up(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="NCCL"):
        processes.all_processes()


def test_tf32_is_on_inside_alone():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with pytest.raises(RuntimeError), devices.tf32(True):
        with devices.tf32(False):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32" and torch.backends.mkldnn.matmul.fp32_precision == "none"
        raise RuntimeError
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types_are_exact_in_tf32(half):
    """TF32 keeps float32's exponent and 10 bits behind the point."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half).float()
    low_bits = values[values.isfinite()].view(torch.int32) & 0x1FFF
    normal = values[values.isfinite()].abs() >= torch.finfo(torch.float32).tiny
    assert not low_bits[normal].any()


@pytest.mark.parametrize(
    "driver, cuda, words", [("550.54.14", "13.0", ("550.54.14", "580")), ("580.65", "13.0", ("580.65", "restart")),
                            ("570.1", "12.8", ("restart",)), ("580.65", None, ("built for CPU",))],
)  # fmt: skip
def test_a_card_that_is_not_used_is_named(monkeypatch, tmp_path, driver, cuda, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.unused_card() is None  # no nvidia-smi
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, {driver}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    line = devices.unused_card()
    assert all(word in line for word in ("RTX 4090", *words)) and "\n" not in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.unused_card() is None, "it is hidden on purpose"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_prepares_its_card_or_says_why_it_has_none(monkeypatch, logged, device):
    prepared = []
    monkeypatch.setattr(devices, "device_and_dtype", lambda choice: (torch.device(device), torch.float32))
    monkeypatch.setattr(devices, "prepare_cuda", lambda *asked: prepared.append(asked))
    monkeypatch.setattr(devices, "unused_card", lambda: "it is not used")
    toy_base(gpu_memory_share=0.5)
    expected = ([], ["it is not used"]) if device == "cpu" else ([(torch.device("cuda"), 0.5)], [])
    assert (prepared, logged.messages) == expected


def test_free_memory_keeps_to_the_share(monkeypatch):
    for name, value in (("memory_reserved", 30), ("memory_allocated", 20), ("mem_get_info", (50, 100))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for share, free in ((1.0, 60), (0.5, 30)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda share=share: share)
        assert devices.free_memory() == (free, 100 * share)


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel that knows Qwen3 and notes what it was asked for; `liger.mlp` becomes its MLP."""
    from transformers.models.qwen3 import modeling_qwen3

    fake = types.ModuleType("liger_kernel.transformers.monkey_patch")

    def patch(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        fake.asked = {name for name, is_on in locals().items() if is_on is True}
        modeling_qwen3.Qwen3MLP = fake.mlp

    fake.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": patch}
    fake.plain = fake.mlp = modeling_qwen3.Qwen3MLP
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", modeling_qwen3.Qwen3MLP)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    devices.apply_liger.cache_clear()
    yield fake
    devices.apply_liger.cache_clear()


def test_liger_is_taken_where_it_computes_the_same(liger):
    class Fused(liger.plain):
        pass

    liger.mlp = Fused
    assert devices.apply_liger("qwen3", torch.device("cpu"))
    assert liger.asked == {"rope", "rms_norm", "swiglu"}, "no loss of its own, no model that is loaded already"
    assert type(make_model().model.layers[0].mlp) is Fused


@pytest.mark.parametrize("fault", ["other", "raises"])
def test_liger_gives_way_with_one_line(liger, fault, logged):
    class Broken(liger.plain):
        def forward(self, x):
            if fault == "raises":
                raise RuntimeError("no C compiler\nmore")
            return 1.1 * super().forward(x)

    liger.mlp = Broken
    assert not devices.apply_liger("qwen3", torch.device("cpu"))
    assert type(make_model().model.layers[0].mlp) is liger.plain
    assert not any(devices.apply_liger("llama", torch.device("cpu")) for _ in range(2))
    assert not models.resolve_base(models.BaseFlags(str(DEMO / "model"), liger=True)).liger  # nor in the fingerprint
    assert len(logged.records) == 2 and "more" not in logged.text, "one line for each reason"


def test_liger_asked_for_and_not_installed(monkeypatch):
    devices.apply_liger.cache_clear()
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(InputError, match="fast"):  # before a model is loaded, in a dry run too
        models.resolve_base(models.BaseFlags(str(DEMO / "model"), liger=True))
