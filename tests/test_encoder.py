"""What is trained on, by templates of many kinds, compared with what the row says and what the template writes."""

import re
from pathlib import Path

import pytest
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llm_alignment.encoder import EMPTY_BLOCK, NO_TOKENS, ChatEncoder, own_tokens, text_problem
from llm_alignment.files import InputError

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": TURN + ASKS,
    "strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURN + ASKS,
    # strips the texts; a token of two line breaks follows the header
    "llama": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    # another name of the role; the system's text stands in the first question
    "gemma": "{% for m in messages %}{% if m.role == 'system' %}{% else %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ messages[0].content + '\n\n' if loop.index0 == 1 and messages[0].role == 'system' else '' }}"
    "{{ m.content.strip() }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    # as Qwen3's: the last answer gets a block, thoughts of earlier answers go
    "qwen3": (DEMO / "model" / "chat_template.jinja").read_text("utf-8"),
    # as DeepSeek R1's: thoughts always go, and the model is made to think
    "opens": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "no end": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
}
TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
TOKENS += ["<|end|>", "<|return|>"]
BLOCK = "<think>\n{}\n</think>\n\n"


def encoder(name, thinking=False, assistant_only=False):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS, "bos_token": "<|endoftext|>"})
    tokenizer.chat_template = TEMPLATES.get(name, name)
    return ChatEncoder(tokenizer, thinking=thinking, assistant_only=assistant_only)


ENCODERS = {
    (name, thinking): encoder(name, thinking, name != "no end") for name in TEMPLATES for thinking in (False, True)
}
CASES = pytest.mark.parametrize("name, thinking", ENCODERS)


def row_of(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TEXTS = st.text(alphabet="аб1 \n.<>{", min_size=1, max_size=9).filter(str.strip)
ANSWERS = st.tuples(st.one_of(st.none(), TEXTS.map(str.strip)), TEXTS.map(str.lstrip))  # (thought, answer)
TALKS = st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4)


def turns_of(talk, system=()):
    """A conversation, its answers with their thoughts."""
    turns = [("system", text) for text in system]
    for question, (thought, answer) in talk:
        turns += [("user", question), ("assistant", (BLOCK.format(thought) if thought else "") + answer)]
    return turns


@CASES
@given(talk=TALKS, has_system=st.booleans())
def test_without_thoughts_it_is_what_the_template_writes(name, thinking, talk, has_system):
    """Empty blocks apart, which stand where evaluation's prompts have them."""
    its = ENCODERS[name, thinking]
    talk = [(question, (None, answer)) for question, (_, answer) in talk]
    turns = turns_of(talk, ["Кратко."] if has_system and name != "strict" else [])
    assert its.refusal(turns) is None
    text, _ = its.write(turns)
    assert EMPTY_BLOCK.sub("", text) == EMPTY_BLOCK.sub("", its.render(turns))
    blocks = {("qwen3", False), ("opens", False), ("opens", True)}
    assert text.count("</think>") == (len(talk) if (name, thinking) in blocks else 0)


@CASES
@given(talk=TALKS)
def test_every_thought_stays_with_thinking_and_goes_without(name, thinking, talk):
    its = ENCODERS[name, thinking]
    text, spans = its.write(turns_of(talk))
    at = 0
    for (_, (thought, answer)), (start, end) in zip(talk, spans, strict=True):
        shown, end_of_turn = text[start:end], its._end(its.layouts[("user", "assistant") * len(talk)].between[-1])
        stripped = answer.strip() if name in {"llama", "gemma"} else answer
        if not name.startswith("opens"):
            kept = BLOCK.format(thought) if thought and thinking else ""
            assert shown == kept + stripped + end_of_turn
        else:  # its block begins in the prompt
            kept = (thought if thinking else None) or ""
            assert shown == f"{kept}\n</think>\n\n{stripped}{end_of_turn}" and text[:start].endswith("<think>\n")
        assert start >= at
        at = end


@CASES
@given(talk=TALKS)
def test_an_answer_begins_where_the_prompt_of_evaluation_ends(name, thinking, talk):
    its = ENCODERS[name, thinking]
    turns = turns_of(talk)
    text, spans = its.write(turns)
    for number, (start, _) in enumerate(spans):
        prompt = its.render(turns[: 2 * number + 1], add_generation_prompt=True)
        opening = its.header + its.supplied
        assert prompt.endswith(opening) and text[:start].endswith(opening)
    assert text.startswith(its.render(turns[:1], add_generation_prompt=True))


@CASES
def test_assistant_only_trains_on_answers_and_their_end(name, thinking):
    if name == "no end":
        with pytest.raises(InputError, match="--assistant_only_loss"):
            encoder(name, thinking, True)
        return
    turns = [("user", "да"), ("assistant", "нет")] * 2
    shown = ENCODERS[name, thinking].marked(row_of(turns), 999)
    marked = re.findall(r"\[\[(.*?)\]\]", shown, re.DOTALL)
    assert len(marked) == 2 and all(re.fullmatch(r"(\s*</think>\s*)?нет<[^<>]+>", text) for text in marked), shown
    whole = encoder(name, thinking)(row_of(turns))
    assert whole["labels"] == whole["input_ids"]


@CASES
@given(talk=TALKS, data=st.data())
def test_a_text_that_spells_the_templates_tokens_is_refused(name, thinking, talk, data):
    its = ENCODERS[name, thinking]
    own = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>"] + ["### assistant:"] * (name == "no end")
    tags = ["<think>", "</think>"]
    turns = turns_of([(question, (None, answer)) for question, (_, answer) in talk])
    place = data.draw(st.integers(0, len(turns) - 1))
    role, content = turns[place]
    spelt = data.draw(st.sampled_from(own + (tags if role == "assistant" or name in {"qwen3", "opens"} else [])))
    cut = data.draw(st.integers(1, len(content)))
    turns[place] = (role, content[:cut] + spelt + content[cut:])
    assert its.refusal(turns)
    assert spelt in tags or repr(spelt) in its.refusal(turns)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("answer", ["<think>\nhm", "<think>hm</think>", "<think>a</think>b</think>c", "a</think>b"])
def test_an_answer_that_is_a_thought_or_holds_a_tag_is_refused(answer, thinking):
    for name in TEMPLATES:
        assert ENCODERS[name, thinking].refusal([("user", "q"), ("assistant", answer)])
    assert "<think>" in text_problem([("assistant", answer)], NO_TOKENS)  # whatever the tokenizer has


CHANGES = (" | upper", " | e", " | title", " | urlencode", ".split() | join(' ')", ".replace('\n\n', '\n')")


@pytest.mark.parametrize(
    "template, reason",
    [
        (TEMPLATES["chatml"].replace("m.content", "m.content.lower()"), "leaves out a turn"),
        (TEMPLATES["chatml"].replace("m.content", "m.content | tojson"), "changes its text"),
        (TEMPLATES["chatml"].replace("messages %}", "messages[-2:] %}"), "leaves out a turn"),
        *((TEMPLATES["chatml"].replace("m.content", "m.content" + change), "changes its text") for change in CHANGES),
        (TEMPLATES["chatml"].replace("m.content", "m.content | center(99)"), "changes the text of a turn"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_that_does_not_show_what_the_row_says_is_an_error(template, reason):
    with pytest.raises(InputError, match=reason):
        encoder(template)


PLAIN_END = TEMPLATES["no end"].replace("m.content }}", "m.content }} [END]")


@pytest.mark.parametrize("name", [*TEMPLATES, PLAIN_END])
def test_a_template_that_teaches_no_end_is_warned_of(name, logged):
    encoder(name)
    assert ("does not teach the model to stop" in logged.text) == (name in {"no end", PLAIN_END})


def test_assistant_only_needs_to_know_where_answers_begin(monkeypatch):
    with pytest.raises(InputError, match="does not mark where an answer begins"):  # the second has no header
        encoder(TEMPLATES["chatml"].replace("<|im_start|>", "{% if loop.index0 < 3 %}<|im_start|>", 1)
                .replace("{{ m.content", "{% endif %}{{ m.content", 1), assistant_only=True)  # fmt: skip
    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(DEMO / "model")), "is_fast", False)
    with pytest.raises(InputError, match="does not mark where an answer begins"):
        encoder("chatml", assistant_only=True)


def test_a_token_that_is_partly_an_answer_is_no_target():
    """Here the header ends with a blank, which the tokenizer puts into the answer's first token."""
    template = TEMPLATES["chatml"].replace("m.role }}\n", "m.role }}: ").replace("assistant\n", "assistant: ")
    shown = encoder(template, assistant_only=True).marked(row_of([("user", "q"), ("assistant", "net sales of")]), 99)
    assert "assistant: n[[et sales of<|im_end|>]]" in shown


def test_tokens_of_the_template_are_found_in_thoughts_and_where_they_are_not_special():
    row = [("user", "q"), ("assistant", "<think>\na<|im_end|>b\n</think>\n\nc")]
    assert "'<|im_end|>'" in ENCODERS["qwen3", True].refusal(row)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.add_tokens(["[END]"])
    tokenizer.chat_template = PLAIN_END
    assert own_tokens(tokenizer).search("a [END] b") and not own_tokens(tokenizer).search("a b")


def test_roles_that_the_template_refuses():
    its = encoder("strict")
    assert "roles must alternate" in its.refusal([("system", "s"), ("user", "q"), ("assistant", "a")])
    assert its.refusal([("user", "q"), ("assistant", "a")]) is None


def test_the_real_templates():
    """TRL's copies of the chat templates: Qwen3's and others'."""
    trl = pytest.importorskip("trl")
    for name in ("qwen3", "qwen3_instruct_2507", "qwen2_5", "qwen3_5_think", "llama3", "gemma", "phi3", "gptoss"):
        template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
        turns = turns_of([("AAA", (None, "BBB")), ("CCC", (None, "DDD"))])
        text, spans = encoder(template, assistant_only=True).write(turns)
        for (start, end), answer in zip(spans, ("BBB", "DDD"), strict=True):
            assert re.fullmatch(r"<[|\w]+>", text[start:end].partition(answer)[2]), name
        assert text.count(BLOCK.format("")) == (2 if name in {"qwen3", "qwen3_5_think"} else 0), name
