"""Multi-task DPO: reading, pairs, leaks, mixes, the base model's own answers, whole runs."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shlex
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train_mt import main, parse
from llm_alignment import files, finance, generation, models, tatqa
from llm_alignment.files import InputError
from llm_alignment.finance import mix_counts, reddit_pairs
from llm_alignment.flags import DEMO_DIR
from llm_alignment.leaks import leak_finder, plain
from mtbench_eval import load_questions

ROOT = Path(__file__).resolve().parents[1]
LOGGED = ROOT / "experiments" / "logged_runs.jsonl"
log = logging.getLogger("llm_alignment")


def load_material(args, sources):
    return finance.load_material(args, sources, load_questions(args.mtbench_file))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def comment(post: str, body: str, score: object, **others) -> dict:
    """A row with the nine columns of the Reddit set."""
    return {
        "id": post, "title": f"Title of {post}", "selftext": f"The story of {post}. " * 10, "z_score": 0.1,
        "normalized_score": 0.5, "subreddit": "investing", "body": body, "comment_normalized_score": score,
        "combined_score": 0.7, **others,
    }  # fmt: skip


def demo_args(tmp_path: Path, *argv: str) -> argparse.Namespace:
    return parse(["--demo", "--output_dir", str(tmp_path / "run"), "--exp_log", str(tmp_path / "log.jsonl"), *argv])


def run_error(capsys, *argv: str, main=main) -> str:
    """The one line that a run with bad input ends in."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def test_logged_commands_parse_as_they_stand():
    commands = [json.loads(line) for line in LOGGED.read_text("utf-8").split("\n") if line]
    commands = {run["id"]: shlex.split(run["command"])[4:] for run in commands if run["script"] == "dpo_train_mt.py"}
    assert len(commands) == 5
    parsed = {name: parse(argv) for name, argv in commands.items()}
    assert parsed["reddit_only"].output_dir == "qwen3_reddit_finance_dpo"
    assert parsed["hybrid_2way"].output_dir == "qwen3_reddit_finance_dpo_hybrid"
    assert parsed["hybrid_3way"].output_dir == "qwen3_reddit_finance_dpo_3way_hybrid"
    assert parsed["hybrid_balanced"].hybrid_ratio == 0.5


def test_demo_fills_only_what_was_not_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse(["--demo", "--use_hybrid", "--reddit_limit", "7"])
    assert (args.output_dir, args.reddit_limit) == ("demo_dpo_mt_hybrid_1", 7)
    (tmp_path / args.output_dir).mkdir()
    assert parse(["--demo", "--use_hybrid"]).output_dir == "demo_dpo_mt_hybrid_2"
    assert parse(["--demo", "--use_hybrid", "--output_dir", "mine"]).output_dir == "mine_hybrid"


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
    options = dict(min_comment_chars=4, score_margin=margin, length_tol=tolerance, max_pairs_per_post=most)
    pairs = reddit_pairs(rows, **options)
    assert pairs == reddit_pairs(rows[::-1], **options)
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
            assert any((is_near and best - score >= margin) or score == lowest for score in scores)
            assert min(scores) < best
    for post in {post for post, _, _ in comments} - set(by_post):
        kept = {(text, score) for its_post, text, score in comments if its_post == post and len(text) >= 4}
        # no pair: one comment, no better one, or a lowest one that says the same as the best
        texts_of_best = {text for text, score in kept if score == max(s for _, s in kept)}
        assert len({s for _, s in kept}) < 2 or texts_of_best & {t for t, s in kept if s == min(s for _, s in kept)}


def test_reddit_pairs_by_hand():
    best, near, far = "the best comment of them all " * 3, "a worse comment of such length " * 3, "a rude one " * 40
    rows = [comment("p", far, 0.0), comment("p", best, 0.9), comment("p", near, 0.5), comment("q", best, 0.9)]
    [pair] = reddit_pairs(rows)
    assert (pair["chosen"], pair["rejected"]) == (best.strip(), near.strip())
    assert pair["prompt"].startswith("Title of p\n\nThe story of p.")
    [pair] = reddit_pairs(rows, score_margin=0.6)
    assert pair["rejected"] == far.strip()  # none is near enough, so the lowest
    assert reddit_pairs(rows, min_post_chars=10_000) == []
    [pair] = reddit_pairs(rows, min_post_chars=0, max_post_chars=60)
    assert pair["prompt"] == ("Title of p\n\n" + "The story of p. " * 10)[:59].strip()


def test_reddit_rows_that_cannot_be_used(tmp_path, capsys):
    usable = [comment("p", "good " * 20, 0.9), comment("p", "bad " * 20, 0.1)]
    broken = [
        comment("q", "x" * 50, None), comment("q", "x" * 50, "0.5"), comment("q", "x" * 50, float("nan")),
        comment("q", None, 0.5), comment("", "x" * 50, 0.5), {"id": "r", "title": "t"}, usable[0],
    ]  # fmt: skip
    path = write_rows(tmp_path / "reddit.jsonl", usable + broken)
    skipped_lines = []
    log.addHandler(handler := ListHandler(skipped_lines))
    rows = files.read_usable(path, "--reddit_dataset", finance.reddit_problem, "columns")
    log.removeHandler(handler)
    assert rows == usable
    assert (
        "skipped 7 rows" in skipped_lines[0]
        and "reddit.jsonl:3 (missing columns: comment_normalized_score" in skipped_lines[0]
    )

    base = ["--demo", "--output_dir", str(tmp_path / "run"), "--exp_log", str(tmp_path / "log.jsonl")]
    missing = [{key: row[key] for key in row if key != "comment_normalized_score"} for row in usable]
    error = run_error(capsys, *base, "--reddit_dataset", write_rows(tmp_path / "missing.jsonl", missing))
    assert "missing.jsonl:1 (missing columns: comment_normalized_score" in error
    error = run_error(capsys, *base, "--reddit_dataset", write_rows(tmp_path / "null.jsonl", broken[:3]))
    assert "not a number" in error
    lonely = [comment(f"p{number}", "good " * 20, 0.5) for number in range(9)]
    error = run_error(
        capsys, *base, "--reddit_limit", "2", "--reddit_dataset", write_rows(tmp_path / "lonely.jsonl", lonely)
    )
    assert "--reddit_dataset" in error and "nothing is left" in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "log.jsonl").exists()


class ListHandler(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record) -> None:
        self.lines.append(record.getMessage())


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


def test_fill_and_exact_say_what_they_reach():
    reddit = [{"uid": f"reddit:{number}"} for number in range(15057)]
    instructions = [{"uid": f"finance:{number}"} for number in range(2500)]
    material = finance.Material(reddit=reddit, finance=instructions)
    shares = {"reddit": Fraction("0.5"), "finance": Fraction("0.5")}
    lines = []
    log.addHandler(handler := ListHandler(lines))
    log.setLevel("INFO")
    for policy in ("fill", "exact"):
        pairs = finance.mixed_pairs(
            material, shares, {"finance": 1800}, policy, lambda lessons, wanted: lessons[:wanted]
        )
        counts = Counter(pair["uid"].split(":")[0] for pair in pairs)
        assert counts == {"reddit": 7528 if policy == "fill" else 1800, "finance": 1800}
    log.removeHandler(handler)
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
    material = finance.Material(
        reddit=[{"uid": f"reddit:{n}"} for n in range(50)], finance=[{"uid": f"finance:{n}"} for n in range(50)]
    )
    shares = {"reddit": Fraction("0.5"), "finance": Fraction("0.5")}
    pairs = finance.mixed_pairs(material, shares, {}, "exact", lambda lessons, wanted: lessons[:30])
    assert Counter(pair["uid"].split(":")[0] for pair in pairs) == {"reddit": 30, "finance": 30}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_hybrid", "--use_3way_hybrid"], "one mix at a time"),
        (["--use_3way_hybrid", "--reddit_ratio", "0.5"], "sum to 1.1"),
        (["--use_hybrid", "--reddit_sample_rate", "0.001"], "nothing is left"),
        (["--use_hybrid", "--hybrid_ratio", "1.5"], None),
    ],
)
def test_impossible_mixes(flags, message, tmp_path, capsys):
    argv = ["--demo", "--output_dir", str(tmp_path / "run"), "--exp_log", str(tmp_path / "log.jsonl"), *flags]
    if message is None:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    else:
        assert message in run_error(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_mix_is_an_error():
    with pytest.raises(InputError, match="the mix is empty"):
        mix_counts({"reddit": 1, "finance": 1}, {"reddit": Fraction(1, 2), "finance": Fraction(1, 2)}, "fill")


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


def test_leaks_are_found_whatever_their_form():
    find = leak_finder({"TAT-QA question": ["What was the total in 2019?"], "evaluation post": ["Help me, please"]})
    assert find("Read this. WHAT  was the\u00a0total\nin 2019") == "TAT-QA question"
    assert find("**help me**, please!") == "evaluation post"
    assert find("What was the total in 2018?") is None and find("") is None
    assert find("whathelp me pleased") is None


def planted(tmp_path: Path) -> tuple[argparse.Namespace, dict[str, int]]:
    """The demo's data with leaks planted into each set; how many each got."""
    instructions, general = DEMO_DIR / "finance_instruct.jsonl", DEMO_DIR / "orca_pairs.jsonl"
    args = demo_args(tmp_path)
    clean = load_material(args, {"reddit", "finance", "general"})
    contexts = json.loads((DEMO_DIR / "tatqa" / "tatqa_dataset_dev.json").read_text("utf-8"))
    asked = [contexts[0]["questions"][0]["question"], contexts[-1]["questions"][-1]["question"]]
    post, lesson = clean.reddit_questions[3]["turns"][0], clean.finance_questions[5]["turns"][0]
    rows = [json.loads(line) for line in instructions.read_text("utf-8").split("\n") if line]
    leaks = [
        {"system": "", "user": f"As a table shows: {asked[0].upper()}", "assistant": "nine"},
        {"system": "", "user": "Do the exercise of the book.", "assistant": f"It asks: {asked[1]}"},
        {"system": "", "user": f"{lesson}\n\nAnswer in short.", "assistant": "That is short."},
        {"system": "", "user": f"A friend wrote: {post}", "assistant": "I see."},
    ]
    args.finance_dataset = write_rows(tmp_path / "finance.jsonl", rows + leaks)
    rows = [json.loads(line) for line in general.read_text("utf-8").split("\n") if line]
    leak = {"system": "", "question": f"{lesson} And {asked[0]}", "chosen": "yes", "rejected": "no"}
    args.general_dataset = write_rows(tmp_path / "general.jsonl", [*rows, leak])
    rows = [json.loads(line) for line in (DEMO_DIR / "reddit.jsonl").read_text("utf-8").split("\n") if line]
    title, _, text = post.partition("\n\n")
    copies = [
        {**rows[0], "id": "copy", "title": f"Again: {title}", "selftext": text.replace(" ", "  "), "body": body,
         "comment_normalized_score": score}
        for body, score in [("a good reply to the post, and a long one", 0.9), ("a bad reply to this post " * 2, 0.1)]
    ]  # fmt: skip
    args.reddit_dataset = write_rows(tmp_path / "reddit.jsonl", rows + copies)
    counts = {name: clean.counts[name] for name in ("finance_leaks", "general_leaks", "reddit_leaks")}
    return args, {name: counts[name] + {"finance_leaks": 4}.get(name, 1) for name in counts}


def test_nothing_that_is_asked_is_trained_on(tmp_path):
    args, expected = planted(tmp_path)
    lines = []
    log.addHandler(handler := ListHandler(lines))
    log.setLevel("INFO")
    material = load_material(args, {"reddit", "finance", "general"})
    log.removeHandler(handler)
    assert {name: material.counts[name] for name in expected} == expected
    assert any(f"finance: {expected['finance_leaks']} of" in line and "TAT-QA question" in line for line in lines)

    # the slow way, over every text
    contexts = json.loads(tatqa.tatqa_file(args, "validation").read_text("utf-8"))
    asked = {plain(question["question"]) for context in contexts for question in context["questions"]}
    asked |= {plain(question["turns"][0]) for question in material.reddit_questions}
    lessons = [json.loads(line) for line in Path(args.finance_dataset).read_text("utf-8").split("\n") if line]
    prompts = {question["turns"][0] for question in material.finance_questions}
    asked |= {plain(row["user"]) for row in lessons if finance.finance_lesson(row)["prompt"] in prompts}
    pairs = [*material.reddit, *material.finance, *material.general]
    texts = " | ".join(
        plain(" ".join(pair.get(key, "") for key in ("prompt", "chosen", "rejected"))) for pair in pairs
    )
    assert len(pairs) > 100 and len(asked) > 100
    assert not [question for question in asked if f" {question} " in f" {texts} "]


def test_what_is_asked_and_trained_on_does_not_depend_on_the_order_of_rows(tmp_path):
    def load(seed: int, shuffle: int) -> finance.Material:
        args = demo_args(tmp_path, "--seed", str(seed))
        for name in ("reddit", "finance", "general"):
            path = Path(getattr(args, f"{name}_dataset"))
            rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
            random.Random(shuffle).shuffle(rows)
            setattr(args, f"{name}_dataset", write_rows(tmp_path / f"{name}.jsonl", rows))
        return load_material(args, {"reddit", "finance", "general"})

    first, again, other = load(1, 1), load(1, 2), load(2, 1)
    assert first == again
    assert first.reddit_questions == other.reddit_questions and first.finance_questions == other.finance_questions
    assert first.reddit != other.reddit and {pair["uid"] for pair in first.reddit} == {
        pair["uid"] for pair in other.reddit
    }


# ---------------------------------------------------------------------------------------------------------------------
# The base model's own answers, and whole runs


GENERATE_AND_DIE = """
import os, sys
sys.path.insert(0, {root!r})
import dpo_train_mt
from llm_alignment import files, finance, models
from mtbench_eval import load_questions
append, written = files.ResultFile.append, []
def append_and_die(self, row):
    append(self, row)
    written.append(row)
    if len(written) == 7:
        os._exit(9)
files.ResultFile.append = append_and_die
args = dpo_train_mt.parse({argv!r})
lessons = finance.load_material(args, {{"finance"}}, load_questions(args.mtbench_file)).finance
finance.answered_by_base(args, models.load_tokenizer(args), lessons, 24)
"""


def test_a_killed_generation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    argv = ["--demo", "--no_4bit", "--instruct_max_tokens", "12", "--output_dir", str(tmp_path / "run")]
    args = parse(argv)
    lessons = load_material(args, {"finance"}).finance
    tokenizer = models.load_tokenizer(args)
    generate, asked = generation.generate, []

    def counting(model, tokenizer, conversations, **settings):
        asked.extend(conversation[0]["content"] for conversation in conversations)
        return generate(model, tokenizer, conversations, **settings)

    monkeypatch.setattr(finance, "generate", counting)
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "whole"))
    whole = finance.answered_by_base(args, tokenizer, lessons, 24)
    assert len(whole) == 24 and len(asked) == len(set(asked))
    assert all(pair["rejected"] not in {"", pair["chosen"]} for pair in whole)

    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "killed"))
    shutil.rmtree(tmp_path / "run")
    killed = subprocess.run([sys.executable, "-c", GENERATE_AND_DIE.format(root=str(ROOT), argv=argv)], check=False)
    assert killed.returncode == 9
    stored = tmp_path / "run" / "finance_answers.jsonl"
    before = [json.loads(line)["prompt"] for line in stored.read_text("utf-8").split("\n")[1:] if line]
    assert len(before) == 7
    first_time, asked[:] = list(asked), []
    assert finance.answered_by_base(args, tokenizer, lessons, 24) == whole
    assert sorted(asked + before) == sorted(first_time)

    asked.clear()  # another run on this base, with fewer pairs and another beta
    args.beta, args.output_dir = 0.5, str(tmp_path / "other")
    assert finance.answered_by_base(args, tokenizer, lessons, 10) == whole[:10] and asked == []


SMALL = [
    "--no_4bit", "--limit_pairs", "24", "--eval_limit", "12", "--mtbench_limit", "4", "--instruct_limit", "6",
    "--reddit_limit", "6", "--instruct_max_tokens", "12", "--reddit_max_tokens", "12", "--mtbench_max_tokens", "12",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_three_way_run_from_start_to_finish(tmp_path, capsys, cache):
    argv = ["--demo", "--use_3way_hybrid", "--output_dir", str(tmp_path / "run"), *SMALL]
    argv += ["--exp_log", str(tmp_path / "log.jsonl"), "--mix_policy", "exact"]
    argv += [
        "--finance_instruct_pairs",
        "12",
        "--general_pairs",
        "40",
        "--eval_save_json",
        str(tmp_path / "tatqa.json"),
    ]
    record = main(argv)
    folder = tmp_path / "run_3way_hybrid"
    assert record["status"] == "completed" and record["output_dir"] == str(folder)
    for name in ("tatqa", "mtbench", "finance_instruct", "reddit"):
        assert record["baseline"][name]["n"] == record["final"][name]["n"] == record["delta"][name]["n"] > 0
        assert (folder / f"{name}_baseline.jsonl").exists() and (folder / f"{name}_final.jsonl").exists()
    pairs = [json.loads(line) for line in (folder / "train_pairs.jsonl").read_text("utf-8").split("\n") if line]
    assert len(pairs) == 24 and {pair["uid"].split(":")[0] for pair in pairs} == {"reddit", "finance", "general"}
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["r"] == 8
    saved = json.loads((tmp_path / "tatqa.json").read_text("utf-8"))
    assert len(saved["baseline"]) == len(saved["final"]) == 12
    out = capsys.readouterr().out
    assert "asked 40-30-30, reached 40-30-30: 16 reddit, 12 finance, 12 general" in out
    for title in ("TAT-QA", "MT-Bench", "Finance-Instruct", "Reddit replies"):
        assert title in out

    error = run_error(capsys, *argv)
    assert "holds another run" in error
    error = run_error(capsys, *argv, "--resume_from_checkpoint", "auto", "--instruct_limit", "7")
    assert "instruct_limit: 6 -> 7" in error


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    main(["--demo", "--use_hybrid", "--dry_run", "--output_dir", str(tmp_path / "run"), *SMALL])
    out = capsys.readouterr().out
    assert "mix (fill): asked 70-30" in out and "steps: 3 of 8 pairs" in out and "reddit: 6 questions" in out
    assert list(tmp_path.iterdir()) == []
