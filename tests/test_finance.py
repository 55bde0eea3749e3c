"""Finance data: Reddit and Finance-Instruct pairs, mixes, the base model's own answers."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT, finance_args, finance_data, read_rows, run_error, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import setup_of, toy_model

from dpo_train_mt import main, parse
from llm_alignment import conversations, finance, generation, reddit
from llm_alignment.files import InputError
from llm_alignment.finance import mix_counts
from llm_alignment.flags import fill
from llm_alignment.hub import read_usable
from llm_alignment.reddit import RedditSettings, reddit_pairs


def comment(post: str, body: str, score: object, **others) -> dict:
    """A row with the nine columns of the Reddit set."""
    return {
        "id": post, "title": f"Title of {post}", "selftext": f"The story of {post}. " * 10, "z_score": 0.1,
        "normalized_score": 0.5, "subreddit": "investing", "body": body, "comment_normalized_score": score,
        "combined_score": 0.7, **others,
    }  # fmt: skip


def str_rows(path: Path, rows: list[dict]) -> str:
    return str(write_rows(path, rows))


# ---------------------------------------------------------------------------------------------------------------------
# Reddit


posts = st.lists(
    st.tuples(
        st.sampled_from(["p1", "p2", "p3"]),
        st.text(alphabet="ab ", max_size=30).map(lambda text: f"x{text}y"),
        st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0]),
    ),
    max_size=12,
)


@given(posts, st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.25]), st.sampled_from([0.0, 0.3, 0.6, 2.0]))
@settings(max_examples=300, deadline=None)
def test_reddit_pairs_of_random_posts(comments, most, margin, tolerance):
    rows = [comment(*entry) for entry in comments]
    options = RedditSettings(120, 2000, 4, margin, tolerance, most)
    pairs = reddit_pairs(rows, options)
    assert pairs == reddit_pairs(rows[::-1], options)
    by_post = defaultdict(list)
    for pair in pairs:
        by_post[pair["uid"].split(":")[1]].append(pair)
    for post, its_pairs in by_post.items():
        kept = [(text, score) for its_post, text, score in comments if its_post == post and len(text) >= 4]
        best, lowest = max(score for _, score in kept), min(score for _, score in kept)
        assert len(its_pairs) <= most and len({pair["uid"] for pair in its_pairs}) == len(its_pairs)
        for pair in its_pairs:
            chosen, rejected = pair["chosen"], pair["rejected"]
            assert chosen != rejected and (chosen, best) in kept
            scores = [score for text, score in kept if text == rejected]
            is_near = abs(len(rejected) - len(chosen)) <= tolerance * len(chosen)
            assert any((is_near and round(best - score, 9) >= margin) or score == lowest for score in scores)
            assert min(scores) < best
    for post in {post for post, _, _ in comments} - set(by_post):
        kept = {(text, score) for its_post, text, score in comments if its_post == post and len(text) >= 4}
        # no pair: one comment, no better one, or a lowest one that says the same as the best
        texts_of_best = {text for text, score in kept if score == max(s for _, s in kept)}
        assert len({s for _, s in kept}) < 2 or texts_of_best & {t for t, s in kept if s == min(s for _, s in kept)}


def test_a_comment_that_lies_exactly_the_margin_lower_is_rejected():
    rows = [
        {
            "id": "p",
            "title": "Which fund?",
            "selftext": "x" * 200,
            "body": letter * length,
            "comment_normalized_score": s,
        }
        for letter, length, s in (("a", 100, 0.9), ("b", 100, 0.8), ("c", 900, 0.7))
    ]
    [pair] = reddit_pairs(rows, RedditSettings(reddit_score_margin=0.1))
    assert pair["rejected"] == "b" * 100


def test_reddit_pairs_by_hand():
    best, near, far = "the best comment of them all " * 3, "a worse comment of such length " * 3, "a rude one " * 40
    rows = [comment("p", far, 0.0), comment("p", best, 0.9), comment("p", near, 0.5), comment("q", best, 0.9)]
    [pair] = reddit_pairs(rows, RedditSettings())
    assert (pair["chosen"], pair["rejected"]) == (best.strip(), near.strip())
    assert pair["prompt"].startswith("Title of p\n\nThe story of p.")
    [pair] = reddit_pairs(rows, RedditSettings(reddit_score_margin=0.6))
    assert pair["rejected"] == far.strip()  # none is near enough, so the lowest
    assert reddit_pairs(rows, RedditSettings(reddit_min_post_chars=10_000)) == []
    [pair] = reddit_pairs(rows, RedditSettings(reddit_min_post_chars=0, reddit_max_post_chars=60))
    assert pair["prompt"] == ("Title of p\n\n" + "The story of p. " * 10)[:59].strip()


def test_reddit_rows_that_cannot_be_used(tmp_path, capsys, logged):
    usable = [comment("p", "good " * 20, 0.9), comment("p", "bad " * 20, 0.1)]
    broken = [
        comment("q", "x" * 50, None), comment("q", "x" * 50, "0.5"), comment("q", "x" * 50, float("nan")),
        comment("q", None, 0.5), comment("", "x" * 50, 0.5), {"id": "r", "title": "t"}, usable[0],
    ]  # fmt: skip
    path = str_rows(tmp_path / "reddit.jsonl", usable + broken)
    assert read_usable(path, "--reddit_dataset", reddit.read_comment, reddit.COLUMNS) == usable
    assert "skipped 7 rows" in logged.text and "reddit.jsonl:3 (comment_normalized_score None" in logged.text

    base = ["--demo", "--output_dir", str(tmp_path / "run"), "--exp_log", str(tmp_path / "log.jsonl")]
    missing = [{key: row[key] for key in row if key != "comment_normalized_score"} for row in usable]
    for name, rows in (("missing", missing), ("null", broken[:3])):
        error = run_error(capsys, main, *base, "--reddit_dataset", str_rows(tmp_path / f"{name}.jsonl", rows))
        assert f"{name}.jsonl:1 (comment_normalized_score None is not a number" in error
    lonely = [comment(f"p{number}", "good " * 20, 0.5) for number in range(9)]
    error = run_error(
        capsys, main, *base, "--reddit_limit", "2", "--reddit_dataset", str_rows(tmp_path / "lonely.jsonl", lonely)
    )
    assert "--reddit_dataset" in error and "nothing is left" in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "log.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mixes


@pytest.mark.parametrize(
    ("available", "shares", "taken"),
    [  # the published runs
        ({"reddit": 22585}, {"reddit": "1"}, [22585]),
        ({"reddit": 22585, "finance": 2000}, {"reddit": "0.7", "finance": "0.3"}, [15809, 2000]),
        (
            {"reddit": 22585, "finance": 2000, "general": 3000},
            {"reddit": "0.4", "finance": "0.3", "general": "0.3"},
            [9034, 2000, 3000],
        ),
        ({"reddit": 22585, "finance": 1500}, {"reddit": "0.6", "finance": "0.4"}, [13551, 1500]),
        ({"reddit": 15057, "finance": 1800}, {"reddit": "0.5", "finance": "0.5"}, [7528, 1800]),
    ],
)
def test_fill_takes_what_the_published_runs_took(available, shares, taken):
    shares = {source: Fraction(share) for source, share in shares.items()}
    assert list(mix_counts(available, shares, "fill").values()) == taken


def test_fill_and_exact_say_what_they_reach(logged):
    reddit = [{"uid": f"reddit:{number}"} for number in range(15057)]
    instructions = [{"uid": f"finance:{number}"} for number in range(2500)]
    data = finance.TrainingData(items={"reddit": reddit, "finance": instructions})
    shares = {"reddit": Fraction("0.5"), "finance": Fraction("0.5")}
    for policy in ("fill", "exact"):
        pairs = finance.mixed_pairs(
            data, shares, {"finance": 1800}, policy, lambda instructions, wanted: instructions[:wanted]
        )
        counts = Counter(pair["uid"].split(":")[0] for pair in pairs)
        assert counts == {"reddit": 7528 if policy == "fill" else 1800, "finance": 1800}
    lines = logged.messages
    assert "asked 50-50, reached 81-19: 7528 reddit, 1800 finance" in lines[0]
    assert "asked 50-50, reached 50-50: 1800 reddit, 1800 finance" in lines[1]


@given(
    st.lists(st.integers(1, 3000), min_size=3, max_size=3),
    st.tuples(st.integers(1, 98), st.integers(1, 98)).filter(lambda pair: sum(pair) < 100),
)
def test_exact_reaches_the_shares_to_one_pair(available, percents):
    sources = ("reddit", "finance", "general")
    percents = [*percents, 100 - sum(percents)]
    shares = {source: Fraction(percent, 100) for source, percent in zip(sources, percents, strict=True)}
    available = dict(zip(sources, available, strict=True))
    try:
        counts = mix_counts(available, shares, "exact")
    except InputError:
        assert min(available[source] / shares[source] for source in sources) * max(shares.values()) < 1
        return
    assert all(counts[source] <= available[source] for source in sources)
    total = min(available[source] / shares[source] for source in sources)
    assert all(abs(counts[source] - shares[source] * total) < 1 for source in sources)
    assert any(counts[source] == available[source] for source in sources)  # no more would fit


def test_when_the_base_leaves_too_few_pairs_exact_takes_fewer_of_all():
    items = {source: [{"uid": f"{source}:{n}"} for n in range(50)] for source in ("reddit", "finance")}
    data = finance.TrainingData(items=items)
    shares = {"reddit": Fraction("0.5"), "finance": Fraction("0.5")}
    pairs = finance.mixed_pairs(data, shares, {}, "exact", lambda instructions, wanted: instructions[:30])
    assert Counter(pair["uid"].split(":")[0] for pair in pairs) == {"reddit": 30, "finance": 30}


def test_the_mix_names_what_there_is(logged):
    items = {
        source: [{"uid": f"{source}:{n}"} for n in range(count)] for source, count in (("reddit", 5), ("finance", 22))
    }
    shares = {"reddit": Fraction("0.5"), "finance": Fraction("0.5")}
    data = finance.TrainingData(items=items)
    finance.mixed_pairs(data, shares, {}, "exact", lambda instructions, wanted: instructions[:wanted])
    assert "5 reddit, 5 finance of 5 reddit, 22 finance" in logged.text


def test_an_empty_mix_is_an_error():
    with pytest.raises(InputError, match="the mix is empty"):
        mix_counts({"reddit": 1, "finance": 1}, {"reddit": Fraction(1, 2), "finance": Fraction(1, 2)}, "fill")


def test_reddit_ids_that_are_numbers(tmp_path):
    rows = [comment(7, "good " * 20, 0.9), comment(7, "bad " * 20, 0.1), comment(True, "x" * 50, 0.5)]
    args = finance_args(tmp_path, "--reddit_dataset", str_rows(tmp_path / "reddit.jsonl", rows))
    read = read_usable(args.reddit_dataset, "--reddit_dataset", reddit.read_comment, reddit.COLUMNS)
    assert [row["id"] for row in read] == ["7", "7"]
    with pytest.raises(ValueError, match="id is not text"):
        reddit.read_comment(rows[2])


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def test_what_is_asked_and_trained_on_does_not_depend_on_the_order_of_rows(tmp_path):
    def load(seed: int, shuffle: int) -> finance.TrainingData:
        args = finance_args(tmp_path, "--seed", str(seed))
        for name in ("reddit", "finance", "general"):
            path = Path(getattr(args, f"{name}_dataset"))
            rows = read_rows(path)
            random.Random(shuffle).shuffle(rows)
            setattr(args, f"{name}_dataset", str_rows(tmp_path / f"{name}.jsonl", rows))
        return finance_data(args, {"reddit", "finance", "general"})

    first, again, other = load(1, 1), load(1, 2), load(2, 1)
    assert first == again
    assert first.questions == other.questions
    assert first.items["reddit"] != other.items["reddit"]
    assert {pair["uid"] for pair in first.items["reddit"]} == {pair["uid"] for pair in other.items["reddit"]}


def test_an_instruction_in_two_forms_is_one_and_texts_decide_the_fingerprint(tmp_path):
    args, found = finance_args(tmp_path, "--no-do_instruct"), []
    users = ["What is a bond?", "WHAT  is a bond", "And a share?"]
    rows = [{"system": "", "user": user, "assistant": f"answer {n}"} for n, user in enumerate(users)]
    for step in (1, -1):
        args.finance_dataset = str_rows(tmp_path / "finance.jsonl", rows[::step])
        found.append(finance_data(args, {"finance"}).items["finance"])
    assert len(found[0]) == 2 and found[0] == found[1]
    pairs = [{"prompt": "q", "chosen": "a", "rejected": text, "uid": "general:1"} for text in "bc"]
    one, other = (finance.data_fingerprint(finance.TrainingData(), [pair]) for pair in pairs)
    assert one["rows"] == other["rows"] and one["sha256"] != other["sha256"]


@pytest.mark.parametrize("field", sorted(conversations.NEEDED))
def test_a_field_that_changes_what_an_instruction_means_is_not_lost(field):
    row = {"user": "u", "assistant": "a"}
    with pytest.raises(ValueError, match=f"the row has {field}"):
        finance.read_instruction({**row, field: "more"})
    assert finance.read_instruction({**row, field: ""})["chosen"] == "a"


# ---------------------------------------------------------------------------------------------------------------------
# The base model's own answers


def answered(args, instructions: list[dict], wanted: int) -> list[dict]:
    """The pairs of the base's own answers, as dpo_train_mt.py asks for them."""
    return finance.finance_pairs(setup_of(vars(args)), instructions, wanted, fill(finance.DataSettings, args))


GENERATE_AND_DIE = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import finance_data
from test_finance import answered, parse
from llm_alignment import results
append, written = results.ResultFile.append, []
def append_and_die(self, *rows):
    for row in rows:
        append(self, row)
        written.append(row)
        if len(written) == 7:
            os._exit(9)
results.ResultFile.append = append_and_die
args = parse({argv!r})
answered(args, finance_data(args, {{"finance"}}).items["finance"], 24)
"""


@pytest.mark.slow
def test_a_killed_generation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    argv = ["--demo", "--no_4bit", "--instruct_max_tokens", "12", "--output_dir", str(tmp_path / "run")]
    argv += ["--eval_batch_size", "4"]
    args = parse(argv)
    instructions = finance_data(args, {"finance"}).items["finance"]
    generate, asked = generation.generate, []

    def counting(model, tokenizer, conversations, decoding, **shown):
        asked.extend(conversation[0]["content"] for conversation in conversations)
        return generate(model, tokenizer, conversations, decoding, **shown)

    monkeypatch.setattr(generation, "generate", counting)
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "whole"))
    whole = answered(args, instructions, 24)
    assert len(whole) == 24 and len(asked) == len(set(asked))
    assert all(pair["rejected"] not in {"", pair["chosen"]} for pair in whole)

    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "killed"))
    shutil.rmtree(tmp_path / "run")
    script = GENERATE_AND_DIE.format(root=str(ROOT), tests=str(ROOT / "tests"), argv=argv)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    before = [row["prompt"] for row in read_rows(tmp_path / "run" / "finance_answers.jsonl")[1:]]
    assert len(before) == 7
    first_time, asked[:] = list(asked), []
    assert answered(args, instructions, 24) == whole
    # what was stored is not asked again, but for the batch that the kill came into
    assert set(asked) | set(before) == set(first_time) and len(set(asked) & set(before)) == 7 % 4

    asked.clear()  # another run on this base, with fewer pairs and another beta
    args.beta, args.output_dir = 0.5, str(tmp_path / "other")
    assert answered(args, instructions, 10) == whole[:10] and asked == []


def fake_generate(monkeypatch, answer_of):
    """The base answers `answer_of(prompt)`, a (text, finished); returns the batches of prompts that were asked."""
    batches = []

    def generate(model, tokenizer, conversations, decoding, **shown):
        batches.append([conversation[0]["content"] for conversation in conversations])
        for index, prompt in reversed(list(enumerate(batches[-1]))):  # in an order of its own
            text, finished = answer_of(prompt)
            yield generation.Answer(index, text, 3, finished, 8)

    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(finance, "load_model", lambda base: toy_model())
    return batches


def numbered(size: int) -> list[dict]:
    return [{"prompt": f"Q{n}", "user": f"Q{n}", "chosen": f"A{n}", "uid": f"finance:{n}"} for n in range(size)]


def test_answers_that_are_empty_cut_or_equal_are_not_used(tmp_path, monkeypatch, logged):
    """Every second answer can be used; the others are in turn empty, cut, equal, and thinking that never ended."""
    bad = [("", True), ("cut", False), ("A{}", True), ("<think>still", True)]

    def answer_of(prompt):
        number = int(prompt[1:])
        text, finished = ("good", True) if number % 2 else bad[number // 2 % 4]
        return text.format(number), finished

    batches = fake_generate(monkeypatch, answer_of)
    args = finance_args(tmp_path, "--no_baseline_cache")
    pairs = answered(args, numbered(40), 10)
    assert [pair["prompt"] for pair in pairs] == [f"Q{n}" for n in range(1, 20, 2)]
    assert all(pair["rejected"] == "good" and pair["uid"].startswith("finance:") for pair in pairs)
    assert sum(map(len, batches)) == 20 and "instead of 10" not in logged.text
    pairs = answered(args, numbered(40), 12)
    assert [pair["prompt"] for pair in pairs] == [f"Q{n}" for n in range(1, 24, 2)]
    # the others were stored; a batch that lacks an answer is generated as a whole
    assert sum(map(len, batches)) == 26 and len(read_rows(tmp_path / "run" / "finance_answers.jsonl")) == 1 + 24


def test_generation_ends_after_twice_the_wanted_number(tmp_path, monkeypatch, logged):
    batches = fake_generate(monkeypatch, lambda prompt: ("cut", prompt == "Q3"))
    args = finance_args(tmp_path, "--no_baseline_cache")
    pairs = answered(args, numbered(500), 10)
    assert [pair["prompt"] for pair in pairs] == ["Q3"] and sum(map(len, batches)) == 20
    assert "1 Finance-Instruct pairs instead of 10" in logged.text and "1 pairs; 19 not used" in logged.text


def test_sampled_answers_do_not_depend_on_a_kill(tmp_path, monkeypatch):
    """At --finance_temperature 0.8 a text depends on its batch, so the batches stay the same after a restart."""
    batches = fake_generate(monkeypatch, lambda prompt: (f"{prompt} in a batch from {batches[-1][0]}", True))
    args = finance_args(tmp_path, "--finance_temperature", "0.8")
    whole = answered(args, numbered(200), 40)
    assert len(whole) == 40 and max(map(len, batches)) == finance.SAMPLED_AT_ONCE
    stored = tmp_path / "run" / "finance_answers.jsonl"
    lines = stored.read_text("utf-8").splitlines(keepends=True)
    stored.write_text("".join(lines[:8]), encoding="utf-8")
    assert answered(args, numbered(200), 40) == whole
    assert sorted(stored.read_text("utf-8").splitlines()) == sorted("".join(lines).splitlines())
    assert json.loads(lines[0])["fingerprint"]["generation"]["temperature"] == 0.8


def test_texts_that_spell_the_template_s_tokens_are_no_pairs_of_any_source():
    own, bad = re.compile(r"<\|im_end\|>"), "It is<|im_end|> so."
    row = {"id": "1", "title": "t", "selftext": "s", "body": "b", "comment_normalized_score": 0.5}
    for name in ("title", "selftext", "body"):
        with pytest.raises(ValueError, match="im_end"):
            reddit.read_comment({**row, name: bad}, own)
    for name in ("user", "assistant", "system"):
        with pytest.raises(ValueError, match="im_end"):
            finance.read_instruction({"system": "s", "user": "u", "assistant": "a", name: bad}, own=own)
    thought = {"user": "u", "assistant": "<think>hm</think>Yes."}
    assert finance.read_instruction(thought)["chosen"] == "Yes."
    assert finance.read_instruction(thought, thinking=True)["chosen"] == thought["assistant"]
