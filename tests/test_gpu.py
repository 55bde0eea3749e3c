"""The owner's check: what only a card shows. `python -m pytest -m gpu -n 0` takes about ten minutes on one.

Those marked `cpu=True` also run on a CPU with LLM_ALIGNMENT_GPU_TESTS=cpu, in smaller shapes.
"""

import contextlib
import dataclasses
import statistics
import time

import pytest
import torch
from conftest import DEMO, read_rows
from toys import WORDS, chats, peak_bytes, toy_base, toy_run

import dpo_train
import dpo_train_mt
import sft_train
from llm_alignment import adapters, dpo, generation, models, prefixes, prompts, training
from llm_alignment.rewards import RewardModel

ON_GPU = torch.cuda.is_available()
SHAPE = dict(num_hidden_layers=4, head_dim=128, hidden_size=2048, intermediate_size=6144, num_attention_heads=16)
SHAPE |= dict(num_key_value_heads=8, vocab_size=32_768)  # of Qwen3-1.7B, in part
if not ON_GPU:
    SHAPE |= dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    SHAPE |= dict(num_key_value_heads=2, vocab_size=4096)
pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(scope="module")
def base(sized_model):
    return toy_base(model=sized_model(**SHAPE))


@pytest.fixture(scope="module")
def model(base):
    return models.load_model(base).eval()


def seconds(run):
    started = time.perf_counter()
    run()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def ids_of(*shape, model):
    torch.manual_seed(0)
    return torch.randint(5, 2000, shape, device=model.device)


def left_padded(model, rows=4, length=96):
    mask = torch.ones(rows, length, dtype=torch.long, device=model.device)
    mask[0, :7] = 0
    return {"input_ids": ids_of(rows, length, model=model), "attention_mask": mask}


def pairs_of_a_table(model):
    ids = ids_of(16, 600, model=model)
    ids[:, :500] = ids[0, :500]
    labels = ids.masked_fill(torch.arange(600, device=ids.device) < 590, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "fused_lm_head": True}


@pytest.mark.gpu(cpu=True)
@pytest.mark.parametrize("call", ["training", "padded", "decoding", "blocks", "fold"])
def test_no_call_is_left_to_the_math_kernel(call, base, figure, monkeypatch):
    """It keeps all probabilities in memory; cuDNN's plans anew for every shape. Both are many times slower."""
    model = models.load_model(base)
    batch = {"input_ids": ids_of(2, 96, model=model)} if call == "training" else left_padded(model)
    if call == "decoding":
        cache = model(**batch, use_cache=True).past_key_values
        mask = torch.cat([batch["attention_mask"], batch["attention_mask"][:, -1:]], dim=1)
        batch = {"input_ids": batch["input_ids"][:, :1], "attention_mask": mask, "past_key_values": cache}
    if call in ("blocks", "fold"):
        prefixes.add_prefix_sharing(model)
        monkeypatch.setitem(prefixes.MOST_UNSEEN, model.device.type, 0 if call == "blocks" else 9)
        batch = pairs_of_a_table(model)
    with torch.no_grad(), torch.profiler.profile() as profiled:
        model(**batch)
    name = "aten::_scaled_dot_product_"
    kernels = {event.key.removeprefix(name) for event in profiled.key_averages() if event.key.startswith(name)}
    figure("attention", ", ".join(sorted(kernels)))
    assert kernels and not any("math" in kernel or "cudnn" in kernel for kernel in kernels)


@pytest.mark.gpu(cpu=True)
def test_a_new_length_costs_what_a_known_one_does(model, figure):
    """Three decoding steps at lengths that were not seen yet beside three at one that was."""
    batch = left_padded(model)
    new, known = [], []
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values

        def step():
            length = cache.get_seq_length() + 1
            mask = torch.nn.functional.pad(batch["attention_mask"], (length - 96, 0), value=1)
            model(input_ids=batch["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)

        step()
        for _ in range(3):
            new.append(seconds(step))
        for _ in range(3):
            cache.crop(-1)
            known.append(seconds(step))
    ratio = statistics.median(new) / statistics.median(known)
    figure("new length", 1000 * statistics.median(new), "ms")
    figure("new over known", ratio)
    assert ratio < 2 or not ON_GPU, "a busy CPU says nothing"


@pytest.mark.gpu(cpu=True)
def test_decoding_launches_and_speed(model, demo_tokenizer, figure):
    """Launches a token and tokens a second of eight greedy answers, by the runner that evaluations use."""
    tokens, chat = 33, [[{"role": "user", "content": " ".join(WORDS)}]] * 8
    decoding = generation.Decoding(tokens, batch_size=8)

    def answers():
        return list(generation.generate(model, demo_tokenizer, chat, decoding))

    answers()
    taken, made = seconds(answers), sum(answer.tokens for answer in answers())
    with torch.profiler.profile() as profiled:
        longest = max(answer.tokens for answer in answers())
    starts = [event for event in profiled.events() if event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]
    figure("launches of a step", len(starts) / longest)
    figure("tokens a second", made / taken)
    assert len(starts) <= longest * (150 * SHAPE["num_hidden_layers"] + 300)


# ---------------------------------------------------------------------------------------------------------------------
# Training


SFT = ["--mtbench_file", "none", "--skip_baseline_eval", "--max_seq_length", "64", "--kl_coef", "0.2"]
SFT += ["--kl_start_step", "2", "--kl_warmup_steps", "4", "--logging_steps", "1"]
PAIRS = ["--limit_pairs", "48", "--no-eval_baseline", "--mtbench_limit", "1", "--mtbench_max_tokens", "4"]
PAIRS += ["--instruct_limit", "1", "--instruct_max_tokens", "4", "--retention_limit", "1", "--eval_limit", "4"]
PAIRS += ["--eval_max_new_tokens", "4", "--logging_steps", "1"]
DEMOS = {"sft": (sft_train, SFT), "dpo": (dpo_train, [*PAIRS, "--eval_pairs", "4", "--group_by_table"])}
DEMOS["finance"] = dpo_train_mt, [*PAIRS, "--reddit_limit", "1", "--reddit_max_tokens", "4"]


@pytest.mark.gpu(cpu=True)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("sft", "bf16"), ("sft", "fp16"), ("dpo", "bf16"), ("dpo", "fp16"), ("finance", "auto")]
)
def test_a_demo_in_4_bits_lowers_the_loss(name, dtype, dataset, tmp_path, figure, monkeypatch):
    """Base in 4 bits, half types with the scaler where they need it, paged optimizer, all evaluations."""
    skipped, on_step_end = [], training.RunKeeper.on_step_end

    def counted(self, *args, **kwargs):
        skipped.append(self.trainer.accelerator.optimizer_step_was_skipped)
        on_step_end(self, *args, **kwargs)

    monkeypatch.setattr(training.RunKeeper, "on_step_end", counted)
    module, argv = DEMOS[name]
    data = ["--dataset", str(dataset), "--sample_ratio", "1", "--val_split", "0.1"] if name == "sft" else []
    common = ["--demo", "--max_steps", "16", "--batch", "4", "--grad_acc", "1", "--learning_rate", "1e-3"]
    record = module.main([*common, *argv, *data, "--dtype", dtype, "--output_dir", "run", "--exp_log", "log.jsonl"])
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "train_log.jsonl") if "loss" in row]
    first, last = (statistics.fmean(part) for part in (losses[:4], losses[-4:]))
    for what, value in (("first loss", first), ("last loss", last), ("skipped steps", sum(skipped))):
        figure(what, value)
    figure("training", record["runtime_s"]["train"], "s")
    assert last < first - 0.02 and sum(skipped) <= 4 and len(skipped) == 16


def adapter_gradients(trainer, model, batch, half):
    """The gradients of the adapter from one micro-batch, computed by `model`."""
    trainer.model = model.train()
    model.zero_grad()
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    (batch,), items = trainer.get_batch_samples(iter([batch]), 1, model.device)
    if hasattr(trainer, "kl_items"):
        trainer.kl_items = trainer.kl_items.to(model.device)
    with trainer.compute_loss_context_manager() if half else contextlib.nullcontext():
        trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.gpu(cpu=True)
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_gradients_are_those_of_a_cpu(name, checkpointing, sft_trainer, base, figure, tmp_path):
    """SFT with its anchor and DPO on pairs of one table, 4 layers of the 1.7B model in 4 bits: half type and kernels
    of the card against float32 on the CPU."""
    flags = {"model": base.name, "no_4bit": False, "gradient_checkpointing": checkpointing, "batch": 4}
    flags["lora_dropout"] = 0
    setup, settings, dpo_settings = toy_run(tmp_path / "run", **flags, beta=0.3, group_by_table=True, lora_r=8)
    if name == "sft":
        more = ["--model", base.name, "--batch", "4", "--gradient_checkpointing", checkpointing]
        trainer = sft_trainer(
            *more, "--lora_dropout", "0", "--lora_r", "8", "--target_modules", setup.lora.target_modules, no_4bit=False
        )
        trainer.state.global_step = 9  # where the anchor is at work
    else:
        table = "Table: " + "net sales 12 percent " * 40
        pairs = [{"prompt": f"{table} Q{n}:", "chosen": f" {n} percent", "rejected": " sales"} for n in range(4)]
        trainer = dpo.build_trainer(models.load_model(setup.base), setup, pairs, settings, dpo_settings)
    if checkpointing == "on":
        trainer.model.gradient_checkpointing_enable()
    on_card, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(1)
    for parameter in on_card.parameters():
        if parameter.requires_grad:  # off the base, so that the anchor has a gradient
            parameter.data += 0.02 * torch.randn_like(parameter)
    on_cpu = dataclasses.replace(setup.base, device=torch.device("cpu"), dtype=torch.float32)
    on_cpu = adapters.new_adapter(models.load_model(on_cpu), setup.lora)
    if name == "dpo":
        prefixes.add_prefix_sharing(on_cpu.get_base_model())
    on_cpu.load_state_dict({n: p.cpu() for n, p in on_card.named_parameters() if p.requires_grad}, strict=False)
    found = adapter_gradients(trainer, on_card, batch, half=True)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(lambda: adapter_gradients(trainer, on_card, batch, half=True))
    figure("tokens a second", batch["attention_mask"].sum().item() / taken)
    figure("peak", torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None, "GiB")
    expected = adapter_gradients(trainer, on_cpu, batch, half=False)
    assert found.keys() == expected.keys()
    norm = sum(gradient.norm() ** 2 for gradient in expected.values()) ** 0.5
    distance = sum((found[key] - gradient).norm() ** 2 for key, gradient in expected.items()) ** 0.5
    figure("distance over norm", (distance / norm).item())
    assert norm > 0 and distance <= (0.1 if ON_GPU else 1e-5) * norm


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.gpu(cpu=True)
def test_held_out_answers_of_1000_tokens_take_little_memory(sized_model, demo_tokenizer, figure):
    """Their full logits would take 8 bytes of each of 2,000 rows and 151,936 tokens."""
    base = toy_base(model=sized_model(**SHAPE | {"vocab_size": 151_936, "num_hidden_layers": 2}))
    model = models.load_model(base).eval().requires_grad_(False)
    pair = {"prompt": "Q:", "chosen": " net" * 1200, "rejected": " percent of sales" * 400}
    lengths = [len(demo_tokenizer(pair[side])["input_ids"]) for side in ("chosen", "rejected")]
    assert min(lengths) >= 1000

    def run():
        dpo.answer_log_probs(model, prompts.pair_tokens(pair, demo_tokenizer), 1100)

    if ON_GPU:
        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_bytes(run, model.parameters())
    full = 8 * 2000 * 151_936
    figure("peak", peak / 2**30, "GiB")
    figure("of full logits", 100 * peak / full, "%")
    assert peak < full / 3


@pytest.mark.gpu(cpu=True)
def test_reward_scores_are_those_of_a_cpu(figure):
    conversations = [[*chat, {"role": "assistant", "content": "Volga " * n}] for n, chat in enumerate(chats(12), 1)]
    ours, expected = (RewardModel(str(DEMO / "reward_model"), device=at).score(conversations) for at in (None, "cpu"))
    figure("largest difference", max(abs(a - b) for a, b in zip(ours, expected, strict=True)))
    assert ours == pytest.approx(expected, abs=1e-3) and max(expected) - min(expected) > 0.01


@pytest.mark.gpu(cpu=True)
@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_a_shared_beginning_changes_no_answer(dtype, demo_tokenizer, figure):
    """Grouped answers of the demo's model, the beginning read once and read for each; half types part at near ties."""
    model = models.load_model(toy_base(dtype=dtype)).eval()
    table = demo_tokenizer("Table: " + "net sales 12 percent " * 40)["input_ids"]
    groups = [[table + demo_tokenizer(f" {n} of {m}")["input_ids"] for n in range(4)] for m in range(3)]
    settings = generation.generation_config(demo_tokenizer, generation.Decoding(12))
    shared, alone = (
        generation.generate_grouped(model, groups, settings, 12, share_prefix=is_shared) for is_shared in (True, False)
    )
    same = [one == other for one, other in zip(shared, alone, strict=True)]
    figure("equal answers", 100 * statistics.fmean(same), "%")
    assert all(same) if dtype == "fp32" else statistics.fmean(same) >= 0.75
