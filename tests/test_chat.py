"""Base and tuned model side by side, one base in memory."""

from __future__ import annotations

import types

import pytest
from run_records import chat
from toys import make_model

from llm_alignment import generation
from llm_alignment.adapters import LoraSettings, new_adapter


@pytest.fixture
def asked(monkeypatch, tokenizer):
    """asked(argv, system): the exit code, and of every call of `generate` its turns, its adapter and its settings.

    Every answer is "base" or "tuned".
    """

    model = new_adapter(make_model(), LoraSettings(4, 8, 0.0, "q_proj,v_proj")).eval()
    layer = next(
        module for module in model.modules() if hasattr(module, "lora_B") and hasattr(module, "disable_adapters")
    )
    calls = []

    def answers(model, tokenizer, conversations, decoding):
        calls.append(([turn["content"] for turn in conversations[0]], not layer.disable_adapters, decoding))
        yield types.SimpleNamespace(text="base" if layer.disable_adapters else "tuned")

    def ask(argv, system=""):
        args = types.SimpleNamespace(system_prompt=system, thinking=False)
        run = types.SimpleNamespace(args=args, tokenizer=tokenizer, load=lambda: model)
        monkeypatch.setattr(chat, "finished_run", lambda folder: run)
        monkeypatch.setattr(generation, "generate", answers)
        return chat.main(argv), calls

    return ask


def test_each_goes_on_from_its_own_answers(asked, monkeypatch, capsys):
    lines = iter(["one", "two", "", "three", "/quit", "four"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, calls = asked(["run"], system="be brief")
    assert code == 0
    assert [(turns, is_tuned) for turns, is_tuned, _ in calls] == [
        (["be brief", "one"], False), (["be brief", "one"], True),
        (["be brief", "one", "base", "two"], False), (["be brief", "one", "tuned", "two"], True),
        (["be brief", "three"], False), (["be brief", "three"], True),
    ]  # fmt: skip
    assert all(decoding.temperature == 0 and not decoding.thinking for *_, decoding in calls)


def test_prompts_of_a_file_are_answered_by_both_and_it_ends(asked, tmp_path, capsys):
    path = tmp_path / "P.TXT"
    path.write_text("first\n\nse\x0ccond\n", encoding="utf-8")
    code, calls = asked(["run", "--prompts", str(path)])
    assert code == 0 and [(turns, tuned) for turns, tuned, _ in calls] == [
        (["first"], False), (["first"], True), (["se\x0ccond"], False), (["se\x0ccond"], True),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert out.isascii() and out.count("tuned") == 4 and out.index("first") < out.index("cond")


def test_a_system_text_beside_a_prompt_is_asked_too(asked, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Hi", "system": "Be brief."}\n', encoding="utf-8")
    assert [turns for turns, *_ in asked(["run", "--prompts", str(path)])[1]] == [["Be brief.\n\nHi"]] * 2


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_file_without_prompts_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text(content, encoding="utf-8")
    assert chat.main(["run", "--prompts", str(path)]) == 2
    assert chat.main(["run", "--prompts", str(tmp_path / "none.txt")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
