"""Answers: batches, finished rows, sampling, out of memory, continuous batching, thinking."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from toys import CHATML, WORDS, chats, make_model, make_tokenizer, plain_answers

from llm_alignment import generation


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


def texts(*args, **kwargs) -> list[str]:
    """The texts of `generate`, in the order of the conversations."""
    return [answer.text for answer in sorted(generation.generate(*args, **kwargs))]


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
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    expected = plain_answers(model, tokenizer, conversations, [*eos, 2], 40)
    batches, answers = [], {}
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kw: batches.append(len(kw["input_ids"])) or forward(*args, **kw)
    )
    for answer in generation.generate(model, tokenizer, conversations, max_new_tokens=40, batch_size=8):
        answers[answer.index] = answer.tokens, answer.finished
    ends = [[*eos, 2].count(answer[-1]) > 0 for answer in expected]
    assert 1 < sum(ends) and len({len(answer) for answer in expected}) > 2
    assert answers == {i: (len(a) - end, end) for i, (a, end) in enumerate(zip(expected, ends, strict=True))}
    assert batches[0] == 8 and batches == sorted(batches, reverse=True) and batches[-1] < 8


def test_the_shipped_generation_settings_do_not_leak(model, tokenizer, monkeypatch):
    from transformers import GenerationConfig

    conversations = chats(4)
    plain = texts(model, tokenizer, conversations, max_new_tokens=12)
    shipped = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        repetition_penalty=1.5,
        max_length=20,
        eos_token_id=[2, 0],
        pad_token_id=0,
    )
    monkeypatch.setattr(model, "generation_config", shipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(model, tokenizer, conversations, max_new_tokens=12) == plain
    assert shipped.temperature == 0.6


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


def test_out_of_memory_halves_the_batch(model, tokenizer, monkeypatch):
    conversations = chats(7)
    expected = texts(model, tokenizer, conversations, max_new_tokens=6)
    real = model.generate
    sizes = []

    def small_gpu(ids, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(ids, **kwargs)

    monkeypatch.setattr(model, "generate", small_gpu)
    assert texts(model, tokenizer, conversations, max_new_tokens=6, batch_size=7) == expected
    assert sizes[:3] == [7, 3, 1] and max(sizes[2:]) <= 2
    monkeypatch.setattr(
        model, "generate", lambda ids, **kw: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full"))
    )
    with pytest.raises(torch.cuda.OutOfMemoryError):
        texts(model, tokenizer, conversations, max_new_tokens=6)


def test_out_of_memory_after_some_rows_have_ended_gives_every_answer_once(model, tokenizer, monkeypatch):
    conversations = chats(12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, *range(100, 250)])  # answers of different lengths
    answers = texts(model, tokenizer, conversations, max_new_tokens=30)
    real, taken = model.generate, []

    def full_at_the_second_call(ids, **kwargs):
        if taken and full_at_the_second_call.left:
            full_at_the_second_call.left -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(ids, **kwargs)

    full_at_the_second_call.left = 1
    monkeypatch.setattr(model, "generate", full_at_the_second_call)
    again = {}
    for answer in generation.generate(model, tokenizer, conversations, max_new_tokens=30, batch_size=12):
        taken.append(answer.index)
        again[answer.index] = answer.text
    assert full_at_the_second_call.left == 0 and [again[index] for index in range(12)] == answers
    assert sorted(taken) == list(range(12))


def test_continuous_batching_gives_the_same_tokens(model, tokenizer):
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    conversations = chats(5)
    prompts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    settings = GenerationConfig(do_sample=False, eos_token_id=[2], pad_token_id=0, return_dict_in_generate=True)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    answers = dict(generation.continuous_answers(adapted, prompts, settings, 10))
    assert list(answers.values()) == plain_answers(model, tokenizer, conversations, [2], 10)


def test_a_prompt_beyond_the_context_loses_its_beginning(model, tokenizer, caplog):
    long = [{"role": "user", "content": " ".join(WORDS * 60)}]
    ids = tokenizer.apply_chat_template(long, add_generation_prompt=True, return_dict=False)
    assert len(ids) > 512
    with torch.no_grad():
        first = int(model(torch.tensor([ids[-(512 - 8) :]])).logits[0, -1].argmax())
    (answer,) = generation.generate(model, tokenizer, [long], max_new_tokens=8)
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
    assert generation.strip_thinking(text) == stripped


def test_a_block_that_the_template_opens_is_seen(model, tokenizer):
    opening = make_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    (text,) = texts(model, opening, chats(1), max_new_tokens=4)
    assert text.startswith("<think>") and generation.strip_thinking(text) == ""
