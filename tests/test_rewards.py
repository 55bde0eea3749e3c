"""The reward model and the two scales."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from toys import CHATML, QWEN25, WORDS, dialogues, make_tokenizer, rows_of, save_reward_model, toy_model

from llm_alignment import files, rewards
from llm_alignment.devices import tf32
from llm_alignment.generation import Decoding
from llm_alignment.scores import scored_evaluation


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


END_LAST = CHATML.replace("<|im_end|>\n{% endfor %}", "<|endoftext|>{% endfor %}")  # token 0, and nothing after it


@pytest.mark.parametrize("template", [CHATML, END_LAST], ids=["newline", "end_last"])
@pytest.mark.parametrize("special", ["$A", "<s> $A", "$A <|endoftext|>", "<s> $A <|endoftext|>"])
@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "<|im_end|>"])
def test_the_last_token_of_the_conversation_is_read(tmp_path, template, special, pad):
    """Whatever the tokenizer pads with, on which side, and adds: the reward of one row as a model card reads it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(template, pad_token=pad, bos_token="<s>")
    tokenizer.padding_side = "left"
    added = [("<s>", 3), ("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=special, special_tokens=added)
    model = rewards.RewardModel(save_reward_model(tmp_path, tokenizer, pad_token_id=None), batch_size=6)
    conversations = dialogues(6)
    conversations[0][-1]["content"] = ""
    expected = []
    for conversation in conversations:
        ids = [3] * ("<s>" in special) + tokenizer.apply_chat_template(conversation, return_dict=False)
        assert model.encode(conversation) == ids
        with torch.no_grad():
            hidden = model.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            expected.append(model.model.score(hidden).item())
    assert model.score(conversations) == pytest.approx(expected, abs=1e-5)


def test_it_is_on_its_device_only_while_it_scores(reward_folder, monkeypatch):
    model = rewards.RewardModel(reward_folder, device="cuda")  # which no weight is put on before
    assert model.model.device.type == "cpu"
    places = []
    monkeypatch.setattr(model.model, "to", lambda device: places.append(str(device)))
    model.model.register_forward_pre_hook(lambda *_: places.append(torch.backends.cuda.matmul.fp32_precision))
    expected = rewards.RewardModel(reward_folder, device="cpu").score(dialogues(1))
    with tf32(True):
        assert model.score(dialogues(1)) == expected and places == ["cuda", "ieee", "cpu"]
    monkeypatch.setattr(model, "encode", lambda conversation: [10**9])
    with pytest.raises(IndexError):
        model.score(dialogues(1))
    assert places[-1] == "cpu", "it leaves the device when scoring fails too"


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
    contents = [" ".join(WORDS * 4), "the Volga and the Neva", "and the Ob", answer]
    turns = [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=True)
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


def test_another_reward_model_in_the_same_folder_scores_anew(tmp_path, tokenizer):
    question = {"question_id": 1, "category": "a", "turns": ["the Ob"]}
    answered = {**question, "answers": ["the Neva"], "answer_tokens": [2], "finished": [True], "batch_sizes": [1]}
    rows = []
    for spread in (0.2, 0.3):
        model = rewards.RewardModel(save_reward_model(tmp_path / "reward", tokenizer, initializer_range=spread))
        evaluation = scored_evaluation("mtbench", [question], Decoding(2), model)
        evaluation = dataclasses.replace(evaluation, read=lambda *_: [answered])
        rows += rows_of(evaluation, toy_model(), tokenizer, tmp_path / "rows.jsonl", renew=True)
    assert rows[0]["answers"] == rows[1]["answers"] and rows[0]["rewards"] != rows[1]["rewards"]


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
