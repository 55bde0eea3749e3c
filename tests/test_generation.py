"""Answers: batches, finished rows, sampling, out of memory, continuous batching, thinking."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, read_rows, torchrun
from toys import CHATML, WORDS, chats, make_tokenizer, plain_answers, save_reward_model, toy_base

from llm_alignment import generation, models
from llm_alignment.adapters import LoraSettings, new_adapter
from llm_alignment.generation import Decoding
from llm_alignment.prefixes import add_prefix_sharing
from llm_alignment.prompts import strip_thinking


def texts(model, tokenizer, conversations, max_new_tokens: int = 24, **decoding) -> list[str]:
    """The texts of `generate`, in the order of the conversations."""
    answers = generation.generate(model, tokenizer, conversations, Decoding(max_new_tokens, **decoding))
    return [answer.text for answer in sorted(answers)]


def test_greedy_answers_do_not_depend_on_the_batch(model, tokenizer):
    conversations = chats(13)
    expected = plain_answers(model, tokenizer, conversations, [2], 24)
    assert len({tuple(answer) for answer in expected}) > 5, "the random model must say different things"
    expected_texts = [tokenizer.decode([t for t in answer if t > 3]).strip() for answer in expected]
    for batch_size in (1, 4, 13, 0):
        assert texts(model, tokenizer, conversations, max_new_tokens=24, batch_size=batch_size) == expected_texts


def test_finished_rows_leave_the_batch(model, tokenizer, monkeypatch):
    conversations = chats(8)
    longest = plain_answers(model, tokenizer, conversations, [], 40)
    # any of these ends an answer, so that answers end at different places and some run to the limit
    eos = sorted({longest[0][5], longest[3][20], longest[5][30]})
    plain_config = generation.generation_config

    def with_ends(*arguments):
        config = plain_config(*arguments)
        config.eos_token_id = [*eos, 2]
        return config

    monkeypatch.setattr(generation, "generation_config", with_ends)
    expected = plain_answers(model, tokenizer, conversations, [*eos, 2], 40)
    batches, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *_, **kw: batches.append(len(kw["input_ids"])) or forward(**kw))
    found = generation.generate(model, tokenizer, conversations, Decoding(40, batch_size=8))
    answers = {answer.index: (answer.tokens, answer.finished) for answer in found}
    ends = [[*eos, 2].count(answer[-1]) > 0 for answer in expected]
    assert 1 < sum(ends) and len({len(answer) for answer in expected}) > 2
    assert answers == {i: (len(a) - end, end) for i, (a, end) in enumerate(zip(expected, ends, strict=True))}
    assert batches[0] == 8 and batches == sorted(batches, reverse=True) and batches[-1] < 8


def test_the_shipped_generation_settings_do_not_leak(model, tokenizer, monkeypatch):
    from transformers import GenerationConfig

    conversations = chats(4)
    plain = texts(model, tokenizer, conversations, max_new_tokens=12)
    sampling = dict(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.5)
    shipped = GenerationConfig(**sampling, max_length=20, no_repeat_ngram_size=1, eos_token_id=[2, 0], pad_token_id=0)
    monkeypatch.setattr(model, "generation_config", shipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(model, tokenizer, conversations, max_new_tokens=12) == plain
    assert shipped.temperature == 0.6


@pytest.mark.parametrize("pad, number", [("<s>", 3), (None, 2)])
def test_sampling_is_from_all_tokens_and_pads_with_the_tokenizer_s_own(model, pad, number):
    """Or, where it has none, with the end of an answer."""
    config = generation.generation_config(make_tokenizer(pad_token=pad), Decoding(6, temperature=1.0))
    assert (config.top_k, config.pad_token_id, config.eos_token_id) == (0, number, [2])


def test_sampling_is_seeded_and_leaves_the_random_state_alone(model, tokenizer):
    conversations = chats(6)
    sample = dict(max_new_tokens=12, temperature=1.0, top_p=0.9, batch_size=3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model.train()
    first = texts(model, tokenizer, conversations, seed=1, **sample)
    assert model.training and torch.rand(1) == expected
    model.eval()
    assert texts(model, tokenizer, conversations, seed=1, **sample) == first
    assert texts(model, tokenizer, conversations, seed=2, **sample) != first


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED in cublasCreate")],
)
def test_out_of_memory_halves_the_batch(error, model, tokenizer, monkeypatch):
    conversations = chats(7)
    expected = texts(model, tokenizer, conversations, max_new_tokens=6)
    real = model.generate
    sizes = []

    def small_gpu(ids, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise error
        return real(ids, **kwargs)

    monkeypatch.setattr(model, "generate", small_gpu)
    assert texts(model, tokenizer, conversations, max_new_tokens=6, batch_size=7) == expected
    assert sizes[:3] == [7, 3, 1] and max(sizes[2:]) <= 2
    monkeypatch.setattr(model, "generate", lambda ids, **_: small_gpu(ids.expand(3, -1)))
    with pytest.raises(type(error)):
        texts(model, tokenizer, conversations[:1], max_new_tokens=6)


def test_out_of_memory_after_some_rows_have_ended_gives_every_answer_once(model, tokenizer, monkeypatch):
    conversations = chats(12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, *range(100, 250)])  # answers of different lengths
    answers = texts(model, tokenizer, conversations, max_new_tokens=30)
    real, taken, errors = model.generate, [], [torch.cuda.OutOfMemoryError("CUDA out of memory")]

    def full_at_the_second_call(ids, **kwargs):
        if taken and errors:
            raise errors.pop()
        return real(ids, **kwargs)

    monkeypatch.setattr(model, "generate", full_at_the_second_call)
    for answer in generation.generate(model, tokenizer, conversations, Decoding(30, batch_size=12)):
        taken.append((answer.index, answer.text))
    assert not errors and sorted(taken) == list(enumerate(answers))


def test_continuous_batching_that_fails_its_check_is_not_used(monkeypatch, logged):
    fake = types.SimpleNamespace(device=torch.device("cuda"), is_loaded_in_4bit=True)
    settings = generation.GenerationConfig()

    def failing(*_):
        raise RuntimeError("continuous batching lost answers (no kernel)")

    monkeypatch.setattr(generation, "batched_answers", lambda *_: [(0, [1])])
    monkeypatch.setattr(generation, "continuous_answers", failing)
    assert not generation.can_run_continuously(fake, [[1]], settings) and "no kernel" in logged.text
    monkeypatch.setattr(generation, "continuous_answers", lambda *_: [(0, [1])])
    assert generation.can_run_continuously(fake, [[1]], settings)


@pytest.mark.parametrize("heads", [2, [2, 2]])
def test_rows_fit_into_what_is_free_where_layers_differ_too(monkeypatch, heads):
    fake = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    monkeypatch.setattr(generation, "get_head_shapes", lambda _: (heads, 8))
    fake.config = types.SimpleNamespace(
        get_text_config=lambda: types.SimpleNamespace(num_hidden_layers=2, vocab_size=5)
    )
    row = 2 * 2 * 2 * 8 * 2 * 100 + 12 * 5
    monkeypatch.setattr(generation, "free_memory", lambda: (2 * 20 * row, 10**12))
    assert generation.free_batch_size(fake, 100) == 16


@pytest.mark.slow
def test_continuous_batching_gives_the_same_tokens(model, tokenizer, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import ContinuousBatchingConfig, GenerationConfig

    conversations = chats(5)
    prompts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    settings = GenerationConfig(do_sample=False, eos_token_id=[2], pad_token_id=0, return_dict_in_generate=True)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    small, inner = ContinuousBatchingConfig(num_blocks=16), adapted.get_base_model()
    # by default the cache takes most of the memory that is free
    limited = functools.partial(inner.generate_batch, continuous_batching_config=small)
    monkeypatch.setattr(inner, "generate_batch", limited)
    answers = dict(generation.continuous_answers(adapted, prompts, settings, 10))
    assert list(answers.values()) == plain_answers(model, tokenizer, conversations, [2], 10)


def test_a_limit_beyond_half_of_the_context_is_lowered_and_said(model, tokenizer, monkeypatch, logged):
    monkeypatch.setattr(model.config, "max_position_embeddings", 40)
    (answer,) = generation.generate(model, tokenizer, chats(1), Decoding(30))
    assert answer.tokens <= 20 and "answers get 20 new tokens, not 30" in logged.text


def test_a_prompt_beyond_the_context_loses_its_beginning(model, tokenizer):
    long = [{"role": "user", "content": " ".join(WORDS * 60)}]
    ids = tokenizer.apply_chat_template(long, add_generation_prompt=True, return_dict=False)
    assert len(ids) > 512
    with torch.no_grad():
        first = int(model(torch.tensor([ids[-(512 - 8) :]])).logits[0, -1].argmax())
    (answer,) = generation.generate(model, tokenizer, [long], Decoding(8))
    assert answer.text.startswith(tokenizer.decode([first]).strip()) or first <= 3
    assert answer.tokens <= 8


@pytest.mark.parametrize(
    "text, stripped",
    [
        ("Paris", "Paris"),
        ("<think>\nhm\n</think>\n\nParis", "Paris"),
        ("<think></think>Paris<think>a\nb</think>.", "Paris."),
        ("<think>never closed, Paris", ""),
        ("<think>a</think>Paris <think>again", ""),
    ],
)
def test_thinking_is_removed(text, stripped):
    assert strip_thinking(text) == stripped


def test_a_block_that_the_template_opens_is_seen(model, tokenizer):
    opening = make_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    (text,) = texts(model, opening, chats(1), max_new_tokens=4)
    assert text.startswith("<think>") and strip_thinking(text) == ""


def test_prompts_are_read_outside_of_the_trainer_s_autocast(model):
    """After training a PeftModel's forward runs in it; the baseline was read before."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained = get_peft_model(copy.deepcopy(model).to(torch.bfloat16), adapter)
    prompts = [list(range(5, 30)), [*range(5, 20), 3, 4]]
    before = generation.read_group(trained, prompts, 0)
    trained.forward = torch.autocast("cpu", torch.bfloat16)(trained.forward)
    after = generation.read_group(trained, prompts, 0)
    for one, other in zip(before, after, strict=True):
        assert all(map(torch.equal, (keys for keys, _ in one), (keys for keys, _ in other)))


def test_a_model_whose_forward_folds_pairs_answers_as_before(model, tokenizer):
    """TAT-QA is answered after the DPO trainer has changed the model's forward."""
    folded = copy.deepcopy(model)
    add_prefix_sharing(folded)
    groups = [[list(range(5, 30)), [*range(5, 20), 3, 4]]]
    settings = generation.generation_config(tokenizer, Decoding(6))
    answers = [generation.generate_grouped(of, groups, settings, 6) for of in (model, folded)]
    assert answers[0] == answers[1] and all(len(tokens) > 0 for tokens in answers[0])


# Run by two processes or by one: MT-Bench answers and TAT-QA answers of toy models, with what each process got.
SPLIT = """
import json, os, pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
from toys import make_model, make_tokenizer, rows_of, sentences
from llm_alignment import processes, rewards, scores, tatqa
from llm_alignment.generation import Decoding
from llm_alignment.prompts import PromptStyle
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
texts, tokenizer = sentences(26, seed=2), make_tokenizer()
questions = [dict(question_id=n, category="a", turns=texts[2 * n : 2 * n + 2]) for n in range(13)]
tables = [dict(question_id=f"{{n}}-{{k}}", context=n, question="q", answer_type="span", scale="", answer=["the"],
               prompt=f"{{n}} ask {{k}}",
               tokens=tokenizer(texts[n] + " ask " + texts[k]).input_ids) for n in range(7) for k in range(3)]
judge = rewards.load_reward_model({reward!r})
tasks = [scores.scored_evaluation("mtbench", questions, Decoding(6, batch_size=3), judge),
         tatqa.tatqa_evaluation(tables, Decoding(5, batch_size=6), PromptStyle())]
got = [rows_of(task, make_model(), tokenizer, folder / f"{{task.name}}.jsonl") for task in tasks]
(folder / f"rank{{os.environ.get('RANK', '0')}}.json").write_text(json.dumps(got))
"""


def run_split(folder: Path, reward_folder: str, n_processes: int) -> list:
    """What every process got from `SPLIT`."""
    script = folder.with_suffix(".py")
    values = {"root": str(ROOT), "tests": str(ROOT / "tests"), "reward": reward_folder}
    script.write_text(SPLIT.format(**values), encoding="utf-8")
    alone = [sys.executable, str(script), str(folder)]
    command = torchrun(script, str(folder), processes=n_processes) if n_processes > 1 else alone
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, timeout=300)
    return [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(n_processes)]


@pytest.mark.slow
def test_two_processes_share_the_questions_and_go_on_as_one_does(tmp_path, tokenizer):
    reward_folder = save_reward_model(tmp_path / "reward", tokenizer)
    [[rows, graded]] = run_split(tmp_path / "one", reward_folder, 1)
    (tmp_path / "two").mkdir()  # as if stopped in the middle of the first evaluation
    lines = (tmp_path / "one" / "mtbench.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "two" / "mtbench.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    lines = (tmp_path / "one" / "tatqa.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "two" / "tatqa.jsonl").write_text(
        "".join(lines[:-1]), encoding="utf-8"
    )  # one process has nothing left
    first, second = run_split(tmp_path / "two", reward_folder, 2)
    assert first == second, "every process gets the rows"
    assert [row["answers"] for row in first[0]] == [row["answers"] for row in rows]
    for alone, shared in zip(rows, first[0], strict=True):
        assert shared["rewards"] == pytest.approx(alone["rewards"], abs=1e-4)
    assert first[1] == graded
    for name in ("mtbench", "tatqa"):
        lines = [(tmp_path / which / f"{name}.jsonl").read_text("utf-8").splitlines() for which in ("one", "two")]
        assert len(lines[0]) == len(lines[1]) == len(set(lines[1])), "one file, every question once"


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU


def demo_chats() -> list[list[dict]]:
    rows = read_rows(DEMO / "mt_bench_ru.jsonl")[:24]
    return [[{"role": "user", "content": row["turns"][0]}] for row in rows]


@pytest.mark.gpu(cpu=True)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_gpu_batched_answers_are_those_of_one_by_one(dtype, figure):
    base = toy_base(dtype=dtype)
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    conversations = demo_chats()
    alone = texts(model, tokenizer, conversations, max_new_tokens=24, batch_size=1)
    batched = texts(model, tokenizer, conversations, max_new_tokens=24)
    same = sum(a == b for a, b in zip(alone, batched, strict=True))
    figure("equal answers of 24", same)
    assert same == 24 if dtype == "fp32" else same >= 20, "half types may part at near ties"


@pytest.mark.gpu
@pytest.mark.parametrize("four_bits", [False, True])
def test_gpu_continuous_batching_is_simple_or_is_not_used(four_bits, logged, figure):
    base = toy_base(no_4bit=not four_bits)
    tokenizer = models.load_tokenizer(base)
    model = new_adapter(models.load_model(base), LoraSettings(8, 16, 0.05, "q_proj,v_proj"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    conversations = demo_chats()
    simple = texts(model, tokenizer, conversations, max_new_tokens=24)
    auto = texts(model, tokenizer, conversations, max_new_tokens=24, backend="auto")
    same = sum(a == b for a, b in zip(simple, auto, strict=True))
    figure("equal answers of 24", same)
    figure("given up", int("simple batches" in logged.text))
    assert same >= 20 or (four_bits and "simple batches" in logged.text)


@pytest.mark.gpu
def test_gpu_out_of_memory_halves_the_batch(demo_base, demo_tokenizer, logged):
    model, tokenizer = models.load_model(demo_base), demo_tokenizer
    conversations = demo_chats()
    expected = texts(model, tokenizer, conversations, max_new_tokens=24, batch_size=2)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 24 * 2**20) / total)
        answers = texts(model, tokenizer, conversations, max_new_tokens=24, batch_size=24)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in logged.text
    assert sum(a == b for a, b in zip(answers, expected, strict=True)) >= 20
