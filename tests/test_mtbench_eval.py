"""What measures: questions, answers, rewards, scales, evaluation that survives kill -9, statistics, command line."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import mtbench_eval as me
from llm_alignment import evaluation, files, generation, rewards

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
)  # Qwen2.5's template in short: it adds a system turn of its own
WORDS = (
    "ask the model what it knows about rivers and it will tell of the Volga the Neva the Ob and Lake Baikal".split()
)


def make_tokenizer(template: str = CHATML, pad_token: str | None = "<|endoftext|>", bos_token: str | None = None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=pad_token,
        bos_token=bos_token,
        chat_template=template,
    )


def tiny_config(**changes):
    from transformers import Qwen3Config

    sizes = dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.5,  # wide enough for the random model to say different things
    )
    return Qwen3Config(**sizes | changes)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(tiny_config()).eval()


def save_reward_model(folder: Path, tokenizer, **changes) -> str:
    from transformers import Qwen3ForSequenceClassification

    torch.manual_seed(1)
    config = tiny_config(**dict(num_labels=1, initializer_range=0.2) | changes)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, tokenizer):
    return save_reward_model(tmp_path_factory.mktemp("reward"), tokenizer)


@pytest.fixture(scope="module")
def reward_model(reward_folder):
    return rewards.RewardModel(reward_folder)


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(n)]


def chats(n: int) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in sentences(n)]


def plain_answers(model, tokenizer, conversations, eos: list[int], max_new_tokens: int) -> list[list[int]]:
    """Greedy token ids, one conversation at a time, without transformers' generate and without a cache."""
    answers = []
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        new: list[int] = []
        while len(new) < max_new_tokens and (not new or new[-1] not in eos):
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        answers.append(new)
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# questions


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_questions_of_every_shape(tmp_path):
    rows = [
        {"question_id": 7, "category": "math", "turns": ["a\u2028b", "c"]},
        {"question_id": 8, "prompt": "p"},
        {"question_id": 9, "question": "q"},
        {"text": "t"},
    ]
    lines = me.load_questions(str(write_lines(tmp_path / "q.jsonl", *rows)))
    assert [q["turns"] for q in lines] == [["a\u2028b", "c"], ["p"], ["q"], ["t"]]
    assert [q["question_id"] for q in lines] == [7, 8, 9, 4]
    assert lines[0]["category"] == "math"
    listed = tmp_path / "q.json"
    listed.write_text(json.dumps(rows), encoding="utf-8")
    assert me.load_questions(str(listed)) == lines


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "no questions"),
        ('[{"question_id": 1, "turns": ["a"]}, {"quest', "not valid JSON"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 2, "tur', "q.jsonl:2"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 2, "turns": []}\n', "q.jsonl:2: no turns"),
        ('{"question_id": 1, "turns": ["a", " "]}\n', "q.jsonl:1: no turns"),
        ('{"question_id": 1, "answer": "a"}\n', "q.jsonl:1: no turns"),
        ('{"question_id": 1, "turns": ["a"]}\n\n{"question_id": 1, "turns": ["b"]}\n', "q.jsonl:3: question_id 1"),
    ],
)
def test_a_bad_question_file_is_named_with_its_line(tmp_path, content, told):
    path = tmp_path / "q.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(files.InputError) as error:
        me.load_questions(str(path))
    assert told in str(error.value) and "q.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_the_limit_is_a_seeded_sample_in_file_order(tmp_path):
    rows = [{"question_id": n, "turns": [str(n)]} for n in range(40)]
    first = me.load_questions(str(write_lines(tmp_path / "a.jsonl", *rows)), limit=10, seed=3)
    ids = [q["question_id"] for q in first]
    assert len(ids) == 10 and ids == sorted(ids) and ids != list(range(10))
    shuffled = me.load_questions(str(write_lines(tmp_path / "b.jsonl", *rows[::-1])), limit=10, seed=3)
    assert {q["question_id"] for q in shuffled} == set(ids)
    other = me.load_questions(str(tmp_path / "a.jsonl"), limit=10, seed=4)
    assert other != first


def test_an_unreachable_hub_is_told_at_once(tmp_path, monkeypatch):
    from huggingface_hub.errors import HTTPError

    def unreachable(*args, **kw):
        raise HTTPError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(files.InputError, match="--mtbench_file"):
        me.load_questions("auto", flag="--mtbench_file")
    assert not list(tmp_path.iterdir())


def test_auto_fetches_once_and_writes_the_working_folder(tmp_path, monkeypatch):
    hub = write_lines(
        tmp_path / "question.jsonl", {"question_id": 81, "category": "writing", "turns": ["Эссе", "Ещё"]}
    )
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kw: asked.append((args, kw)) or str(hub))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *args, **kw: None)
    monkeypatch.chdir(tmp_path)
    fetched = me.load_questions("auto", language="ru")
    assert fetched[0]["turns"] == ["Эссе", "Ещё"]
    assert asked == [(("t-tech/ru-mt-bench", "raw/question.jsonl"), {"repo_type": "dataset"})]
    assert me.load_questions("mt_bench_ru.json") == fetched and len(asked) == 1
    me.load_questions("mt_bench_en.json")
    assert asked[1][0] == ("lmsys/mt-bench", "data/mt_bench/question.jsonl")
    with pytest.raises(files.InputError):
        me.load_questions("elsewhere.json")


# ---------------------------------------------------------------------------------------------------------------------
# answers


def test_greedy_answers_do_not_depend_on_the_batch(model, tokenizer):
    conversations = chats(13)
    expected = plain_answers(model, tokenizer, conversations, [2], 24)
    assert len({tuple(answer) for answer in expected}) > 5, "the random model must say different things"
    texts = [tokenizer.decode([t for t in answer if t > 3]).strip() for answer in expected]
    for batch_size in (1, 4, 13, 0):
        assert generation.generate(model, tokenizer, conversations, max_new_tokens=24, batch_size=batch_size) == texts


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
    generation.generate(
        model,
        tokenizer,
        conversations,
        max_new_tokens=40,
        batch_size=8,
        on_answer=lambda index, text, tokens, finished: answers.update({index: (tokens, finished)}),
    )
    ends = [[*eos, 2].count(answer[-1]) > 0 for answer in expected]
    assert 1 < sum(ends) and len({len(answer) for answer in expected}) > 2
    assert answers == {i: (len(a) - end, end) for i, (a, end) in enumerate(zip(expected, ends, strict=True))}
    assert batches[0] == 8 and batches == sorted(batches, reverse=True) and batches[-1] < 8


def test_the_shipped_generation_settings_do_not_leak(model, tokenizer, monkeypatch):
    from transformers import GenerationConfig

    conversations = chats(4)
    plain = generation.generate(model, tokenizer, conversations, max_new_tokens=12)
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
        assert generation.generate(model, tokenizer, conversations, max_new_tokens=12) == plain
    assert shipped.temperature == 0.6


def test_sampling_is_seeded_and_leaves_the_random_state_alone(model, tokenizer):
    conversations = chats(6)
    sample = dict(max_new_tokens=12, temperature=1.0, top_p=0.9, batch_size=3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model.train()
    first = generation.generate(model, tokenizer, conversations, seed=1, **sample)
    assert model.training and torch.rand(1) == expected
    model.eval()
    assert generation.generate(model, tokenizer, conversations, seed=1, **sample) == first
    assert generation.generate(model, tokenizer, conversations, seed=2, **sample) != first


def test_out_of_memory_halves_the_batch(model, tokenizer, monkeypatch):
    conversations = chats(7)
    expected = generation.generate(model, tokenizer, conversations, max_new_tokens=6)
    real = model.generate
    sizes = []

    def small_gpu(ids, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(ids, **kwargs)

    monkeypatch.setattr(model, "generate", small_gpu)
    assert generation.generate(model, tokenizer, conversations, max_new_tokens=6, batch_size=7) == expected
    assert sizes[:3] == [7, 3, 1] and max(sizes[2:]) <= 2
    monkeypatch.setattr(
        model, "generate", lambda ids, **kw: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full"))
    )
    with pytest.raises(torch.cuda.OutOfMemoryError):
        generation.generate(model, tokenizer, conversations, max_new_tokens=6)


def test_out_of_memory_after_some_rows_have_ended_gives_every_answer_once(model, tokenizer, monkeypatch):
    conversations = chats(12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, *range(100, 250)])  # answers of different lengths
    answers = generation.generate(model, tokenizer, conversations, max_new_tokens=30)
    real, taken = model.generate, []

    def full_at_the_second_call(ids, **kwargs):
        if taken and full_at_the_second_call.left:
            full_at_the_second_call.left -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(ids, **kwargs)

    full_at_the_second_call.left = 1
    monkeypatch.setattr(model, "generate", full_at_the_second_call)
    again = generation.generate(
        model,
        tokenizer,
        conversations,
        max_new_tokens=30,
        batch_size=12,
        on_answer=lambda index, *_: taken.append(index),
    )
    assert full_at_the_second_call.left == 0 and again == answers
    assert sorted(taken) == list(range(12))


def test_continuous_batching_gives_the_same_tokens(model, tokenizer):
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    conversations = chats(5)
    prompts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    settings = GenerationConfig(do_sample=False, eos_token_id=[2], pad_token_id=0, return_dict_in_generate=True)
    answers: dict[int, list[int]] = {}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    generation.continuous_answers(adapted, prompts, settings, 10, lambda row, tokens: answers.update({row: tokens}))
    assert list(answers.values()) == plain_answers(model, tokenizer, conversations, [2], 10)


def test_a_prompt_beyond_the_context_loses_its_beginning(model, tokenizer, caplog):
    long = [{"role": "user", "content": " ".join(WORDS * 60)}]
    ids = tokenizer.apply_chat_template(long, add_generation_prompt=True, return_dict=False)
    assert len(ids) > 512
    with torch.no_grad():
        first = int(model(torch.tensor([ids[-(512 - 8) :]])).logits[0, -1].argmax())
    seen = []
    generation.generate(
        model, tokenizer, [long], max_new_tokens=8, on_answer=lambda i, text, n, done: seen.append((text, n))
    )
    assert seen[0][0].startswith(tokenizer.decode([first]).strip()) or first <= 3
    assert seen[0][1] <= 8


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
    (text,) = generation.generate(model, opening, chats(1), max_new_tokens=4)
    assert text.startswith("<think>") and generation.strip_thinking(text) == ""


# ---------------------------------------------------------------------------------------------------------------------
# rewards and scales


def dialogues(n: int) -> list[list[dict]]:
    texts = sentences(4 * n, seed=1)
    turns = [{"role": role, "content": ""} for role in ("user", "assistant", "user", "assistant")]
    return [
        [{**turn, "content": text} for turn, text in zip(turns, texts[4 * i :], strict=False)][: 2 + 2 * (i % 2)]
        for i in range(n)
    ]


def test_rewards_equal_the_model_alone_and_do_not_depend_on_the_batch(reward_folder, reward_model, tokenizer):
    conversations = dialogues(9)
    alone = []
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(conversation, return_dict=False, return_tensors="pt")
        with torch.no_grad():
            alone.append(reward_model.model(ids).logits.item())
    assert max(alone) - min(alone) > 0.1
    for batch_size in (1, 4, 9):
        scores = rewards.RewardModel(reward_folder, batch_size=batch_size).score(conversations)
        assert scores == pytest.approx(alone, abs=1e-4)


def test_a_reward_model_without_pad_token(tmp_path, reward_model):
    bare = make_tokenizer(CHATML.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}"), pad_token=None)
    name = save_reward_model(tmp_path, bare)
    conversations = dialogues(6)
    batched = rewards.RewardModel(name, batch_size=6).score(conversations)
    single = [rewards.RewardModel(name, batch_size=1).score([conversation])[0] for conversation in conversations]
    assert batched == pytest.approx(single, abs=1e-4)
    # the answer ends with the end-of-text token, which must be read and not be taken for padding
    model = rewards.RewardModel(name)
    ids = model.encode(conversations[0])
    assert ids[-1] == 2
    with torch.no_grad():
        hidden = model.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert batched[0] == pytest.approx(model.model.score(hidden).item(), abs=1e-4)


def test_no_system_turn_and_one_bos(tmp_path, reward_model):
    with_system = rewards.RewardModel(save_reward_model(tmp_path / "a", make_tokenizer(QWEN25)))
    conversation = dialogues(2)[1]
    assert with_system.encode(conversation) == reward_model.encode(conversation)
    tokenizer = make_tokenizer("{{ bos_token }}" + QWEN25, bos_token="<s>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    ids = rewards.RewardModel(save_reward_model(tmp_path / "b", tokenizer)).encode(conversation)
    assert ids == [3, *reward_model.encode(conversation)]


def test_long_conversations_are_cut_at_the_front_of_the_oldest_turn(tmp_path, tokenizer):
    model = rewards.RewardModel(save_reward_model(tmp_path, tokenizer, max_position_embeddings=64))
    answer = " ".join(WORDS[:8])
    turns = [
        {"role": "user", "content": " ".join(WORDS * 4)},
        {"role": "assistant", "content": "the Volga and the Neva"},
        {"role": "user", "content": "and the Ob"},
        {"role": "assistant", "content": answer},
    ]
    text = tokenizer.decode(model.encode(turns))
    assert len(model.encode(turns)) <= 64
    assert text.endswith(f"assistant\n{answer}<|im_end|>\n")
    kept = text.split("user\n")[1].split("<|im_end|>")[0]
    assert kept and turns[0]["content"].endswith(kept) and "the Volga and the Neva" in text and "and the Ob" in text
    turns[1]["content"] = " ".join(WORDS * 4)
    text = tokenizer.decode(model.encode(turns))
    assert len(model.encode(turns)) <= 64 and text.startswith("<|im_start|>user\n<|im_end|>")
    assert text.endswith(f"assistant\n{answer}<|im_end|>\n") and "and the Ob" in text
    turns[3]["content"] = " ".join(WORDS * 4)
    with pytest.raises(files.InputError, match="answer"):
        model.encode(turns)
    assert turns[0]["content"] == " ".join(WORDS * 4), "the caller's turns stay as they are"


def test_a_first_character_of_several_tokens_is_cut_too(tmp_path, tokenizer):
    small = rewards.RewardModel(save_reward_model(tmp_path / "small", tokenizer, max_position_embeddings=64))
    for words in range(20, 30):
        question = {"role": "user", "content": "\U0001f98a " + " ".join((WORDS * 3)[:words])}
        answer = {"role": "assistant", "content": "the Ob"}
        assert len(small.encode([question, answer])) <= 64


def test_what_is_no_reward_model(tmp_path, tokenizer, model):
    with pytest.raises(files.InputError, match="one label"):
        rewards.RewardModel(save_reward_model(tmp_path / "two", tokenizer, num_labels=2))
    model.save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(files.InputError, match="one label"):
        rewards.RewardModel(str(tmp_path / "causal"))
    with pytest.raises(files.InputError, match="--reward_model"):
        rewards.RewardModel(str(tmp_path / "nowhere"))


def test_scales():
    corners = {-5: 1, -9: 1, -2.5: 3.25, -1e-9: 5.5, 0: 1, 0.5: 5.5, 1: 10, 1.01: 2.818, 2.5: 5.5, 5: 10, 8: 10}
    for reward, score in corners.items():
        assert rewards.to_logged_scale(reward) == pytest.approx(score, abs=1e-6), reward
    assert rewards.to_score(0) == 5.5
    assert rewards.to_score(5) == pytest.approx(1 + 9 / (1 + math.exp(-1)))
    assert rewards.to_score(-1e6) == pytest.approx(1) and rewards.to_score(1e6) == pytest.approx(10)
    scores = [rewards.to_score(r / 10) for r in range(-300, 300)]
    assert all(a < b for a, b in itertools.pairwise(scores))


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


@pytest.fixture
def questions():
    texts = sentences(15, seed=2)
    return [
        {"question_id": n, "category": "ab"[n % 2], "turns": [texts[n]] if n == 4 else [texts[n], texts[n + 5]]}
        for n in range(9)
    ]


@pytest.fixture
def evaluate(model, tokenizer, reward_model, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))

    def run(path="results.jsonl", *, fingerprint="m", questions=questions, **changes):
        return me.score_questions(
            model,
            tokenizer,
            reward_model,
            questions,
            path=tmp_path / path,
            fingerprint={"model": fingerprint},
            **dict(max_new_tokens=10, batch_size=4) | changes,
        )

    return run


def test_two_turns_with_their_history(evaluate, model, tokenizer, reward_model, questions):
    rows = evaluate()
    assert [row["question_id"] for row in rows] == list(range(9))
    for row in rows:
        conversation: list[dict] = []
        for turn, (asked, answer) in enumerate(zip(row["turns"], row["answers"], strict=True)):
            conversation.append({"role": "user", "content": asked})
            assert (
                generation.strip_thinking(generation.generate(model, tokenizer, [conversation], max_new_tokens=10)[0])
                == answer
            )
            conversation.append({"role": "assistant", "content": answer})
            assert reward_model.score([conversation])[0] == pytest.approx(row["rewards"][turn], abs=1e-4)
        assert row["scores"] == [rewards.to_score(r) for r in row["rewards"]]
        assert row["scores_logged"] == [rewards.to_logged_scale(r) for r in row["rewards"]]
        assert len(row["finished"]) == len(row["answer_tokens"]) == len(row["turns"])
    summary = me.summarise(rows)
    assert summary["n"] == 9 and set(summary["by_category"]) == {"a", "b"} and len(summary["by_turn"]) == 2
    per_question = [sum(row["scores"]) / len(row["scores"]) for row in rows]
    assert summary["avg"] == pytest.approx(sum(per_question) / 9)
    assert summary["by_turn"][1] == pytest.approx(sum(row["scores"][1] for row in rows if row["question_id"] != 4) / 8)


def test_an_interrupted_evaluation_goes_on_to_the_same_rows(evaluate, tmp_path, reward_model, monkeypatch):
    whole = evaluate("whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().split(b"\n")
    for kept in (1, 3, 6, 9):  # the fingerprint, part of the first wave, ..., and a torn line
        path = tmp_path / f"cut{kept}.jsonl"
        path.write_bytes(b"\n".join(lines[:kept]) + b"\n" + lines[kept][:17])
        assert evaluate(path.name) == whole
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    monkeypatch.setattr(me, "generate", None)
    assert evaluate("whole.jsonl") == whole, "a finished evaluation asks nothing again"


def test_another_fingerprint_is_refused_by_name(evaluate, questions, tmp_path):
    evaluate()
    content = (tmp_path / "results.jsonl").read_bytes()
    for change, key in (
        ({"fingerprint": "other"}, "model"),
        ({"max_new_tokens": 11}, "generation"),
        ({"questions": questions[1:]}, "questions"),
    ):
        with pytest.raises(files.InputError, match=key):
            evaluate(**change)
    assert (tmp_path / "results.jsonl").read_bytes() == content


def test_a_resumed_run_measures_anew_and_keeps_what_it_had(evaluate, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    evaluate(path=path)
    former = path.read_bytes()
    with pytest.raises(files.InputError, match="adapter"):
        evaluate(path=path, fingerprint={"model": "m", "adapter": "other"})
    assert path.read_bytes() == former
    evaluate(path=path, fingerprint={"model": "m", "adapter": "other"}, renew=True)
    assert path.with_name("rows.jsonl.old").read_bytes() == former
    assert path.read_bytes().count(b"\n") == former.count(b"\n") and b"other" in path.read_bytes()


def test_the_baseline_cache(evaluate, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="llm_alignment")
    monkeypatch.setattr(logging.getLogger("llm_alignment"), "propagate", True)
    first = evaluate("one.jsonl", use_cache=True)
    assert "baseline cache" not in caplog.text
    generate = generation.generate
    monkeypatch.setattr(me, "generate", None)
    assert evaluate("two.jsonl", use_cache=True) == first
    assert "taken from the baseline cache" in caplog.text
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    with pytest.raises(TypeError):
        evaluate("three.jsonl", use_cache=False)
    with pytest.raises(TypeError):
        evaluate("four.jsonl", use_cache=True, fingerprint="other")
    monkeypatch.setattr(me, "generate", generate)
    evaluate("five.jsonl", use_cache=True, temperature=1.0)
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1, "samples are not kept"


def test_an_answer_that_only_thinks_scores_as_empty(evaluate, questions, reward_model, monkeypatch):
    def thinker(model, tokenizer, conversations, *, on_answer, **_):
        for index in range(len(conversations)):
            on_answer(index, "<think>and so on", 10, False)

    monkeypatch.setattr(me, "generate", thinker)
    row = evaluate(questions=questions[:1])[0]
    asked = {"role": "user", "content": questions[0]["turns"][0]}
    empty = reward_model.score([[asked, {"role": "assistant", "content": ""}]])[0]
    assert row["answers"][0] == "" and row["rewards"][0] == pytest.approx(empty, abs=1e-4)
    assert me.summarise([row])["unfinished"] == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def test_compare_rows_pairs_by_question():
    def row(number, score, turns=("q",)):
        return {"question_id": number, "turns": list(turns), "scores": [score], "rewards": [score - 5]}

    before = [row(1, 2.0), row(2, 3.0), row(3, 9.0)]
    after = [row(2, 4.0), row(1, 5.0)]
    deltas = me.compare_rows(before, after)
    assert deltas["score"]["mean"] == pytest.approx(2.0) and deltas["score"]["n"] == 2
    assert deltas["raw"]["mean"] == pytest.approx(2.0)
    with pytest.raises(files.InputError):
        me.compare_rows(before, [row(7, 1.0)])
    with pytest.raises(files.InputError):
        me.compare_rows(before, [row(1, 1.0, turns=["another"])])


def test_the_table_is_plain_and_says_when_nothing_can_be_seen(capsys):
    clear = {"mean": 0.81234, "low": 0.5, "high": 1.1, "p": 0.0002, "n": 80}
    unclear = {"mean": -0.01, "low": -0.2, "high": 0.15, "p": 0.71, "n": 80}
    evaluation.print_table(
        "Результат", [("MT-Bench", 4.12345, 4.93579, clear), ("ppl", 3.5, 3.49, unclear), ("n", None, 2, None)]
    )
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.split("\n") if line.split()}
    assert "4.123" in lines["MT-Bench"] and "4.936" in lines["MT-Bench"]
    assert "+0.8123 [0.5000, 1.100]" in lines["MT-Bench"] and "0.0002" in lines["MT-Bench"]
    assert "no detectable change" not in lines["MT-Bench"]
    assert "no detectable change" in lines["ppl"] and "0.71" in lines["ppl"]
    assert max(map(len, out.split("\n"))) <= 120
    assert all(ord(letter) < 128 for letter in out.replace("Результат", ""))


# ---------------------------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture(scope="module")
def cli_folder(tmp_path_factory, model, tokenizer, reward_folder):
    folder = tmp_path_factory.mktemp("cli")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = sentences(80, seed=3)
    rows = [{"question_id": n, "category": "ab"[n % 2], "turns": texts[2 * n : 2 * n + 2]} for n in range(40)]
    write_lines(folder / "questions.jsonl", *rows)
    return folder


def flags(folder: Path, reward_folder: str, output: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder / "model"), "--no_4bit", "--reward_model", reward_folder),
        *("--questions", str(folder / "questions.jsonl"), "--output_dir", str(output)),
        *("--exp_log", str(output.parent / "log.jsonl"), "--mtbench_max_tokens", "12", *more),
    ]


def test_the_command_line(cli_folder, reward_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    first = me.main(flags(cli_folder, reward_folder, tmp_path / "one", "--limit", "6"))
    assert first["status"] == "completed" and first["final"]["mtbench"]["n"] == 6 and first["delta"] == {}
    earlier = str(tmp_path / "one" / "mtbench.jsonl")
    second = me.main(
        flags(cli_folder, reward_folder, tmp_path / "two", "--limit", "6", "--mtbench_max_tokens", "4")
        + ["--compare", earlier, "--eval_batch_size", "3", "--exp_tag", "short"]
    )
    assert second["delta"]["mtbench"]["n"] == 6 and second["tag"] == "short"
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        "mtbench.jsonl",
        "metrics.json",
        "mtbench_categories.png",
        "run.json",
        "run.log",
    }
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text("utf-8"))
    assert metrics["final"]["mtbench"] == second["final"]["mtbench"]
    assert metrics["delta"]["mtbench"]["mean"] == pytest.approx(
        second["final"]["mtbench"]["avg"] - first["final"]["mtbench"]["avg"]
    )
    assert [record["tag"] for record in files.read_records(tmp_path / "log.jsonl")] == ["", "short"]
    assert "MT-Bench, 1-10" in capsys.readouterr().out
    # the folder of another evaluation is refused and stays as it was
    before = {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    with pytest.raises(SystemExit) as stop:
        me.main(flags(cli_folder, reward_folder, tmp_path / "two", "--limit", "7"))
    assert stop.value.code == 2 and "questions" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "two").iterdir()} == before


def test_bad_input_is_one_line_and_exit_code_2(cli_folder, reward_folder, tmp_path, capsys):
    good = flags(cli_folder, reward_folder, tmp_path / "out")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text('{"peft_type": "LO', encoding="utf-8")
    for change in (
        ["--questions", str(tmp_path / "missing.jsonl")],
        ["--model", str(cli_folder)],
        ["--reward_model", str(cli_folder / "model")],
        ["--adapter", str(cli_folder)],
        ["--adapter", str(damaged)],
        ["--output_dir", str(cli_folder / "questions.jsonl")],
        ["--exp_log", str(cli_folder)],
        ["--compare", str(cli_folder / "questions.jsonl")],
    ):
        with pytest.raises(SystemExit) as stop:
            me.main(good + change)
        told = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
        assert stop.value.code == 2 and len(told) == 1, change
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_over_the_questions_that_both_answered(cli_folder, reward_folder, tmp_path, tokenizer, capsys):
    me.main(flags(cli_folder, reward_folder, tmp_path / "few", "--limit", "6"))
    earlier = ["--compare", str(tmp_path / "few" / "mtbench.jsonl")]
    record = me.main(flags(cli_folder, reward_folder, tmp_path / "many", "--mtbench_max_tokens", "4", *earlier))
    assert "compared on the 6 questions" in (out := capsys.readouterr().out) and "max_new_tokens: 12 -> 4" in out
    means = [record[stage]["mtbench"]["avg"] for stage in ("baseline", "final")]
    assert record["final"]["mtbench"]["n"] == 6
    assert record["delta"]["mtbench"]["mean"] == pytest.approx(means[1] - means[0])
    other = save_reward_model(tmp_path / "other", tokenizer, initializer_range=0.3)
    with pytest.raises(SystemExit) as stop:
        me.main(flags(cli_folder, other, tmp_path / "third", *earlier))
    assert stop.value.code == 2 and "another reward model" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_error_and_half_a_character_is(tmp_path):
    rows = [{"question_id": 1, "turns": ["a"]}, {"question_id": 2, "turns": ["\u0444"]}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "bom.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    for name in ("bom.jsonl", "bom.json"):
        assert [question["turns"] for question in me.load_questions(str(tmp_path / name))] == [["a"], ["\u0444"]]
    write_lines(tmp_path / "half.jsonl", {"text": "whole"})
    with (tmp_path / "half.jsonl").open("ab") as file:
        file.write(b'{"text": "\\ud83e\\udd8a"}\n{"text": "\\ud83e"}\n')
    skipped = files.SkippedRows()
    assert [row["text"] for _, row in files.read_rows(tmp_path / "half.jsonl", skipped)] == ["whole", "\U0001f98a"]
    assert skipped.places == ["half.jsonl:3 (a text with half a character)"]


def test_a_dry_run_asks_nothing(cli_folder, reward_folder, tmp_path, capsys):
    me.main(flags(cli_folder, reward_folder, tmp_path / "out", "--dry_run"))
    assert "40 questions, 80 answers" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--mtbench_max_tokns", "3"], 2)])
def test_help_and_a_misspelt_flag_answer_at_once(arguments, code):
    # what takes seconds is the import of torch and its family; a bound in seconds would fail on a busy machine
    script = f"""
import sys, mtbench_eval
try:
    mtbench_eval.main({arguments!r})
except SystemExit as stop:
    slow = {{"torch", "transformers", "numpy", "scipy", "rich", "matplotlib", "huggingface_hub"}} & set(sys.modules)
    sys.exit("imports " + ", ".join(slow) if slow else stop.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, text=True, encoding="utf-8")
    assert done.returncode == code, done.stderr
    assert ("--mtbench_max_tokens" if code == 0 else "--mtbench_max_tokns") in done.stdout + done.stderr


def test_kill_9_loses_and_repeats_no_question(cli_folder, reward_folder, tmp_path):
    def start(output: Path) -> subprocess.Popen:
        command = flags(cli_folder, reward_folder, output, "--no_baseline_cache", "--eval_batch_size", "2")
        return subprocess.Popen(
            [sys.executable, str(ROOT / "mtbench_eval.py"), *command],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def size(path: Path) -> int:
        return path.stat().st_size if path.exists() else 0

    assert start(tmp_path / "whole").wait(timeout=120) == 0
    whole = (tmp_path / "whole" / "mtbench.jsonl").read_bytes()
    killed = tmp_path / "killed" / "mtbench.jsonl"
    for share in (0.25, 0.6):
        process = start(tmp_path / "killed")
        while size(killed) < share * len(whole):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert 0 < size(killed) < len(whole)
    assert start(tmp_path / "killed").wait(timeout=120) == 0
    assert killed.read_bytes() == whole
    ids = [json.loads(line)["question_id"] for line in whole.split(b"\n")[1:] if line]
    assert sorted(ids) == list(range(40))
