"""DPO on TAT-QA and on own pairs: the pairs, and whole runs."""

import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, logged_commands, read_rows, run_error, torchrun, write_rows
from run_records import records
from toys import context, question, save_experts, toy_base

import dpo_train
import dpo_train_mt
from dpo_train import tatqa_pairs
from llm_alignment import adapters, dpo, models, tatqa
from llm_alignment.adapters import LoraSettings, saved_settings
from llm_alignment.encoder import NO_TOKENS
from llm_alignment.files import InputError, SkippedRows
from llm_alignment.flags import check_dpo_flags
from llm_alignment.leaks import LeakFinder, normalise_text
from llm_alignment.prompts import PromptStyle, fit_prompt
from llm_alignment.tatqa import tatqa_em_f1, tatqa_parse, tatqa_prompt

CHOICE = dpo_train.PairChoice(
    no_train=False, eval_pairs=0, limit_pairs=0, group_by_table=False, seed=7, thinking=False
)
REAL = ROOT.parent / "shared" / "data" / "tatqa"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real TAT-QA files are not here")


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize(
    "kind, answer, scale, derivation",
    [
        ("arithmetic", 172, "million", "302-130"),
        ("arithmetic", 0, "", ""),
        ("arithmetic", -12.5, "percent", "(44.1-56.7)/56.7"),
        ("count", "0", "", ""),
        ("span", ("$1,496.5",), "million", ""),
        ("span", ("Some passage of the text",), "", ""),
        ("multi-span", ("2019", "2018"), "", ""),
        ("multi-span", ("2019",), "", ""),
        ("multi-span", ("2019", "2018", ""), "", ""),
    ],
)
def test_rejected_is_wrong_and_chosen_is_right(kind, answer, scale, derivation):
    gold = question(kind, answer, scale, derivation=derivation)
    for seed in range(30):
        (pair,) = tatqa_pairs([context(gold)], seed=seed)
        assert set(pair) == {"prompt", "chosen", "rejected", "uid"}
        assert tatqa_em_f1(gold, *tatqa_parse(pair["chosen"]))[0] == 1
        assert tatqa_em_f1(gold, *tatqa_parse(pair["rejected"]))[0] == 0


def test_wrong_span_is_a_neighbour_of_the_same_look():
    rejected = {tatqa_pairs([context(question("span", ("2019",)))], seed=seed)[0]["rejected"] for seed in range(20)}
    assert rejected == {"2018"}


def test_pairs_do_not_depend_on_the_order_of_the_file():
    one = context(question(uid="a"), question("count", "2", uid="b"))
    two = context(question("arithmetic", 5.5, uid="c"), question("multi-span", ("2019", "Sales"), uid="d"))
    pairs = tatqa_pairs([one, two], seed=42)
    two["questions"].reverse()
    assert tatqa_pairs([two, one], seed=42) == pairs
    assert tatqa_pairs([two, one], seed=43) != pairs


def lonely() -> dict:
    """A context whose table has no other cell than the answer."""
    return {**context(question("span", ("Sales",))), "table": {"table": [["Sales"]]}}


def test_a_question_without_a_wrong_answer_is_counted():
    skipped = SkippedRows()
    assert tatqa_pairs([lonely()], seed=42, skipped=skipped) == []
    assert skipped.count == 1


@needs_real
@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_questions(split):
    skipped = SkippedRows()
    contexts = tatqa.read_tatqa(REAL / tatqa.TATQA_FILES[split], skipped)
    golds = {gold["uid"]: gold for context in contexts for gold in context["questions"]}
    assert len(golds) + skipped.count == {"train": 1663, "validation": 1668}[split]
    pairs = tatqa_pairs(contexts, seed=42, skipped=skipped)
    assert len(pairs) + skipped.count == {"train": 1663, "validation": 1668}[split]
    assert len(pairs) >= 0.98 * len(golds)
    for gold in golds.values():
        parts = [str(part) for part in (gold["answer"] if isinstance(gold["answer"], list) else [gold["answer"]])]
        assert tatqa_em_f1(gold, parts, gold["scale"]) == (1, 1)
    for pair in pairs:
        assert not tatqa_em_f1(golds[pair["uid"]], *tatqa_parse(pair["rejected"]))[0]
    right = [tatqa_em_f1(golds[pair["uid"]], *tatqa_parse(pair["chosen"]))[0] for pair in pairs]
    assert sum(right) >= 0.995 * len(right)  # a few spans hold the sign that separates answers
    random.Random(0).shuffle(contexts)
    assert tatqa_pairs(contexts, seed=42) == pairs


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_prompt_keeps_its_question(demo_tokenizer, chat):
    style, gold = PromptStyle(use_chat_template=chat), question(rel_paragraphs=["1", "2"])
    prompt = tatqa_prompt(context(gold), gold)
    text, tokens, is_cut = fit_prompt(prompt, demo_tokenizer, style, tatqa.QUESTION_PREFIX)
    assert not is_cut and prompt in text
    longest = len(tokens) - 40
    style = dataclasses.replace(style, max_prompt_length=longest)
    text, tokens, is_cut = fit_prompt(prompt, demo_tokenizer, style, tatqa.QUESTION_PREFIX)
    assert is_cut and "Question: What?\nAnswer:" in text and "You are a financial analyst" in text
    assert longest - 5 <= len(tokens) <= longest and tokens == demo_tokenizer(text)["input_ids"]
    style = dataclasses.replace(style, max_prompt_length=5)
    with pytest.raises(InputError, match="--max_prompt_length 5"):
        fit_prompt(prompt, demo_tokenizer, style, tatqa.QUESTION_PREFIX)


def test_a_first_character_of_several_tokens_is_cut_too(demo_tokenizer):
    prompt = "\U0001f98a what did it cost"
    whole = len(demo_tokenizer(prompt)["input_ids"])
    for longest in range(whole - 5, whole):
        text, tokens, is_cut = fit_prompt(prompt, demo_tokenizer, PromptStyle(False, max_prompt_length=longest))
        assert is_cut and len(tokens) <= longest and text.endswith("cost")


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


SMALL = """--demo --limit_pairs 12 --batch 2 --grad_acc 1 --save_steps 2 --eval_limit 8 --eval_max_new_tokens 6
    --eval_pairs 7 --mtbench_limit 2 --mtbench_max_tokens 4 --instruct_limit 2 --instruct_max_tokens 4
    --retention_limit 4 --retention_max_tokens 4""".split()


pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.mark.slow
def test_a_run_from_start_to_finish(tmp_path, capsys, monkeypatch):
    argv = [*SMALL, "--output_dir", "out", "--exp_log", "log.jsonl", "--eval_save_json", "new/answers.jsonl"]
    fetch, looked_up = models.fetch_model, []
    monkeypatch.setattr(models, "fetch_model", lambda *of: [looked_up.append(of), fetch(*of)][1])
    record = dpo_train.main(argv)
    assert len(looked_up) == 1, "a hub's main branch may move while the run lasts"
    out = tmp_path / "out"
    assert record["status"] == "completed" and record["kept_step"] == 6
    names = {"held_out", "tatqa", "mtbench", "instruct", "drift", "retention", "own_drift", "health"}
    assert record["baseline"].keys() == record["final"].keys() == names
    assert {"tatqa", "tatqa_em", "mtbench", "mtbench_raw", "instruct"} <= record["delta"].keys()
    before = {"accuracy": 50, "margin": 0, "chosen_log_prob": 0, "margin_by_length": None, "n": 7}
    assert record["baseline"]["held_out"] == before
    assert record["final"]["held_out"]["margin"] != 0
    logged = json.loads((tmp_path / "log.jsonl").read_text("utf-8"))
    assert logged.keys() == record.keys() and records.record_problem(logged) is None
    names = {"adapter_model.safetensors", "adapter_config.json", "README.md", "run.json", "train_log.jsonl"}
    names |= {"metrics.json", "loss.png", "rewards.png", "mtbench.png", "run.log", "tatqa_final.jsonl"}
    assert names <= {path.name for path in out.iterdir()}
    for name in ("baseline", "post"):
        lines = (tmp_path / "new" / f"answers_{name}.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == 8 and {"question_id", "answer", "gold", "em"} <= json.loads(lines[0]).keys()
    log = read_rows(out / "train_log.jsonl")
    assert "rewards/margins" in log[0] and log[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    printed = capsys.readouterr().out
    assert "TAT-QA, official EM" in printed and "experiments/chat.py out\n" in printed

    # the same base again: the baseline comes from the cache; then the adapter of that run is trained on, and measured
    capsys.readouterr()
    more = ["--output_dir", "more", "--exp_log", "log.jsonl", "--load_adapter", "out"]
    measured = dpo_train.main([*SMALL, *more, "--no_train"])
    assert "taken from the baseline cache" in capsys.readouterr().out
    assert measured["final"]["tatqa"] == record["final"]["tatqa"]
    more[1] = "on"
    trained_on = dpo_train.main([*SMALL, *more, "--adapter_trainable"])
    assert trained_on["baseline"]["tatqa"] == record["final"]["tatqa"]
    log = read_rows(Path("on/train_log.jsonl"))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert not (tmp_path / "on" / "ref").exists()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_adapter(tmp_path):
    argv = [*SMALL, "--exp_log", "log.jsonl", "--do_eval", "--no-do_mtbench", "--no-do_instruct"]
    dpo_train.main([*argv, "--output_dir", "whole"])
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "dpo_train.py"), *argv, "--output_dir", "killed"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (tmp_path / "killed" / "checkpoint-2" / "complete.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    dpo_train.main([*argv, "--output_dir", "killed", "--resume_from_checkpoint", "auto"])
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    # a flag that changes what is measured: measured again, the earlier answers kept
    record = dpo_train.main([*argv, "--output_dir", "killed", "--resume_from_checkpoint", "auto", "--eval_limit", "5"])
    assert record["final"]["tatqa"]["n"] == 5 and (tmp_path / "killed" / "tatqa_final.jsonl.old").exists()
    with pytest.raises(SystemExit) as error:  # a flag that changes the training
        dpo_train.main([*argv, "--output_dir", "killed", "--resume_from_checkpoint", "auto", "--beta", "0.7"])
    assert error.value.code == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tatqa_dir", "nowhere"], "nowhere"),
        (["--max_prompt_length", "512", "--max_length", "512"], "--max_length"),
        (["--target_modules", "nope"], "--target_modules nope"),
        (["--eval_save_json", "."], "--eval_save_json"),
        (["--adapter_trainable"], "--load_adapter"),
        (["--load_adapter", "other"], "--adapter_trainable"),
        (["--load_adapter", "nowhere", "--adapter_trainable", "--dry_run"], "nowhere: no adapter_config.json"),
        (["--eval_save_json", "x.jsonl", "--no-do_eval"], "--eval_save_json x.jsonl"),
        (["--gates", "tatqa=-1", "--no-eval_baseline"], "--gates"),
        (["--gates", "tatqa=-1", "--no_train"], "--gates"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--pairs", "own.jsonl", "--tatqa_split=train"], "--tatqa_split"),
        (["--pairs", "own.jsonl", "--no_train", "--load_adapter", "other", "--eval_pairs", "0"], "--eval_pairs"),
        (["--pairs", "own.jsonl"], "1 usable pairs on 1 prompts"),
        (["--pairs", "own.jsonl", "--system_prompt", "Be brief.<|im_end|>"], "--system_prompt: it contains"),
        (["--pairs", "bad.jsonl"], "no usable row"),
        (["--load_adapter", "other", "--adapter_trainable"], "does not fit"),
        (["--tatqa_dir", "broken"], "no pairs left"),
        (["--eval_split", "train", "--limit_pairs", "0"], "all of them are trained on"),
        (["--group_by_table", "--model", "experts", "--dry_run"], "--group_by_table: the loss of its router"),
        (["--group_by_table"], "--group_by_table: it cannot"),  # as the loaded model shows
    ],
)
def test_bad_input_ends_before_anything_is_written(tmp_path, capsys, monkeypatch, flags, words):
    if words.endswith("it cannot"):
        monkeypatch.setattr(dpo, "sharing_problem", lambda model: "it cannot")
    if "experts" in flags:
        save_experts(tmp_path / "experts")
    write_rows(Path("own.jsonl"), [{"prompt": "one", "chosen": "two", "rejected": "three"}])
    write_rows(Path("bad.jsonl"), [{"prompt": "one"}, "not JSON"])
    if "other" in flags:
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3Config, Qwen3ForCausalLM

        size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8)
        other = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, num_key_value_heads=1, **size))
        get_peft_model(other, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained("other")
    if "broken" in flags:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "tatqa_dataset_train.json").write_text(json.dumps([lonely()]), encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        dpo_train.main([*SMALL, "--output_dir", "out", "--exp_log", "log.jsonl", *flags])
    stderr = capsys.readouterr().err.strip().split("\n")
    assert error.value.code == 2
    assert stderr[-1].startswith("error: ") and words in stderr[-1]
    assert not (tmp_path / "out").exists() and not (tmp_path / "log.jsonl").exists()


def test_flags_of_tatqa_that_own_pairs_do_not_use_are_named(tmp_path, capsys):
    rows = [{"prompt": f"one {n}", "chosen": "two", "rejected": "three"} for n in range(4)]
    own = [
        "--pairs",
        str(write_rows(tmp_path / "own.jsonl", rows)),
        "--no-do_mtbench",
        "--no-do_instruct",
        "--dry_run",
    ]
    for more, is_named in ([], True), (["--do_eval"], False):
        dpo_train.main([*SMALL, *own, *more])
        assert ("to measure TAT-QA add --do_eval" in capsys.readouterr().out) is is_named


def test_own_prompts_of_symbols_alone_stand_on_both_sides(tmp_path):
    rows = [{"prompt": text, "chosen": "two", "rejected": "three"} for text in "😀😢"]
    path = write_rows(tmp_path / "own.jsonl", rows)
    choice = dpo_train.PairChoice(False, 1, 0, False, 1, False)
    pairs, held_out, _ = dpo_train.own_pairs(str(path), choice, LeakFinder({}), NO_TOKENS)
    assert len(pairs) == len(held_out) == 1


@pytest.mark.parametrize("split, is_seen", [("validation", False), ("train", True)])
def test_questions_that_are_trained_on_are_measured_with_a_warning(capsys, split, is_seen):
    argv = [*SMALL, "--no-do_mtbench", "--no-do_instruct", "--eval_pairs", "0", "--eval_split", split, "--dry_run"]
    dpo_train.main(argv)
    assert (f"--eval_split {split} is trained on" in capsys.readouterr().out) is is_seen


def test_an_adapter_with_a_trained_head_is_refused(tmp_path):
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="lm_head"):
        saved_settings(str(tmp_path), LoraSettings(8, 16, 0.05, "q_proj,v_proj"))


@pytest.mark.parametrize("main, less", [(dpo_train.main, "--eval_pairs=0"), (dpo_train_mt.main, "--no-do_reddit")])
def test_a_resume_with_another_adapter_is_refused(main, less, capsys):
    adapters.new_adapter(models.load_model(toy_base()), LoraSettings(8, 16, 0.0, "q_proj")).save_pretrained("adapter")
    argv = f"""--demo --no_4bit --output_dir out --exp_log log.jsonl --load_adapter adapter --no_train {less}
        --no-eval_baseline --no-do_eval --no-do_mtbench --no-do_instruct --retention_limit 1""".split()
    main(argv)
    config = Path("adapter/adapter_config.json")
    config.write_text(config.read_text("utf-8").replace('"use_rslora": false', '"use_rslora": true'), "utf-8")
    assert "(data adapter: " in run_error(capsys, main, *argv, "--resume_from_checkpoint", "auto")


@pytest.mark.slow
def test_two_processes_resume_grouped_pairs_in_the_second_epoch(tmp_path):
    """Each epoch has an order of its own, of which a resumed process must hear too."""
    argv = [*SMALL, "--group_by_table", "--limit_pairs", "16", "--grad_acc", "1", "--epochs", "2", "--save_steps", "5"]
    argv += ["--eval_pairs", "0", "--no-do_eval", "--no-do_mtbench", "--no-do_instruct", "--no-do_retention"]
    argv += ["--exp_log", "log.jsonl", "--output_dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*more: str) -> int:
        subprocess.run(torchrun(ROOT / "dpo_train.py", *argv, *more), env=environment, check=True)
        return max(int(path.name.rpartition("-")[2]) for path in Path(more[0]).glob("checkpoint-*"))

    last = run("whole")
    assert last > 5 and (Path("whole") / "checkpoint-5").exists()
    shutil.copytree("whole", "killed")
    shutil.rmtree(Path("killed") / f"checkpoint-{last}")
    (Path("killed") / "adapter_model.safetensors").unlink()
    assert run("killed", "--resume_from_checkpoint", "auto") == last
    weights = [Path(name, "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_grouped_pairs_resumed_in_the_second_epoch(tmp_path, capsys):
    argv = [*SMALL, "--group_by_table", "--epochs", "2", "--eval_pairs", "0", "--no-do_eval", "--no-do_mtbench"]
    argv += ["--no-do_instruct", "--exp_log", "log.jsonl"]
    record = dpo_train.main([*argv, "--output_dir", "whole"])
    assert record["kept_step"] == 12
    assert re.search(r"\d+ groups of pairs whose prompts begin alike, \d+ single pairs", capsys.readouterr().out)
    shutil.copytree("whole", "killed")
    shutil.rmtree(Path("killed") / "checkpoint-12")
    (tmp_path / "killed" / "adapter_model.safetensors").unlink()
    dpo_train.main([*argv, "--output_dir", "killed", "--resume_from_checkpoint", "auto"])
    assert "resuming from killed/checkpoint-10" in capsys.readouterr().out.replace("\\", "/")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def own_rows():
    """Own pairs in three formats, one with two rejected answers, one with an evaluation's question."""
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"not {n}"} for n in range(20)]
    rows.append({"prompt": "Say 3.", "chosen": "3", "rejected": "4"})
    turns = [{"role": "user", "content": "Name a day."}, {"role": "assistant", "content": "Monday"}]
    turns.append({"role": "user", "content": "Another one."})
    rows.append({
        "chosen": [*turns, {"role": "assistant", "content": "Sunday"}],
        "rejected": [*turns, {"role": "assistant", "content": "Blue"}],
    })
    asked = json.loads((DEMO / "tatqa" / "tatqa_dataset_dev.json").read_text("utf-8"))[0]["questions"][0]["question"]
    rows.append({"question": asked, "chosen": "1", "rejected": "2"})
    return rows


@pytest.mark.slow
def test_own_pairs(tmp_path, capsys):
    write_rows(tmp_path / "own.jsonl", own_rows())
    argv = [*SMALL, "--pairs", "own.jsonl", "--eval_pairs", "6", "--limit_pairs", "0", "--no-do_mtbench"]
    argv += ["--no-do_instruct", "--exp_log", "log.jsonl", "--no_4bit"]
    assert dpo_train.of_own_pairs(dpo_train.build_parser().parse_args(argv)) == {"do_eval": False}  # or asked for
    argv += ["--do_eval"]
    record = dpo_train.main([*argv, "--output_dir", "out"])
    out = capsys.readouterr().out
    assert "pairs: 1 of 23 left out" in out
    rows = record["data"]["rows"]
    assert rows["pairs_leaks"] == 1 and rows["held_out"] == 6 and 15 <= rows["pairs"] <= 16
    assert record["final"]["tatqa"]["n"] == 8 and record["final"]["held_out"]["n"] == 6
    held_out = read_rows(Path("out/held_out_final.jsonl"))[1:]
    # the choice depends on the file alone, and no prompt is on both sides
    choice = dataclasses.replace(CHOICE, eval_pairs=6)
    finder = LeakFinder({"TAT-QA question": [own_rows()[-1]["question"]]})
    pairs, others, _ = dpo_train.own_pairs("own.jsonl", choice, finder, NO_TOKENS)
    assert {pair["uid"] for pair in others} == {row["question_id"] for row in held_out}
    assert not {str(pair["prompt"]) for pair in pairs} & {str(pair["prompt"]) for pair in others}
    write_rows(tmp_path / "one.jsonl", own_rows()[:1])  # with nothing to hold out, one pair is enough
    choice = dataclasses.replace(choice, eval_pairs=0)
    pairs, *_ = dpo_train.own_pairs("one.jsonl", choice, LeakFinder({}, {}), NO_TOKENS)
    assert [pair["chosen"] for pair in pairs] == ["0"]
    # SFT or DPO before it: the adapter that is loaded is the reference at the start
    again = [*argv, "--output_dir", "on", "--load_adapter", "out", "--adapter_trainable", "--learning_rate", "1e-9"]
    dpo_train.main(again)
    log = read_rows(Path("on/train_log.jsonl"))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    shutil.copy("on/adapter_model.safetensors", "out")  # another start, and so another reference
    assert "data adapter" in run_error(capsys, dpo_train.main, *again, "--resume_from_checkpoint", "auto")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_limit_takes_whole_tables_when_their_pairs_are_read_together(seed):
    choice = dataclasses.replace(CHOICE, seed=seed, group_by_table=True, limit_pairs=40)
    of = (str(DEMO / "tatqa"), "train", "validation")
    pairs, *_ = dpo_train.table_pairs(*of, choice, tatqa.PromptContent())
    every, *_ = dpo_train.table_pairs(*of, dataclasses.replace(choice, limit_pairs=0), tatqa.PromptContent())
    taken, whole = (Counter(pair["cluster"] for pair in some) for some in (pairs, every))
    assert len(pairs) == 40 < len(every)
    assert sum(taken[table] < whole[table] for table in taken) <= 1  # the last one may be cut
    alone, *_ = dpo_train.table_pairs(*of, dataclasses.replace(choice, group_by_table=False), tatqa.PromptContent())
    assert len({pair["cluster"] for pair in alone}) > len(taken)


def test_a_limit_of_pairs_without_a_table_is_a_sample_by_the_seed():
    pairs = [{"uid": str(n), "prompt": f"{'You answer questions on a long report. ' * 4}{n}"} for n in range(50)]
    samples = [dataclasses.replace(CHOICE, seed=seed).limited(pairs, 5, in_groups=True) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def test_another_text_at_as_many_rows_is_other_data(tmp_path):
    choice, found = CHOICE, []
    shutil.copytree(DEMO / "tatqa", tmp_path / "tatqa")
    table = tmp_path / "tatqa" / "tatqa_dataset_train.json"
    for last in ("one", "two"):
        write_rows(tmp_path / "own.jsonl", [*own_rows()[:5], {"question": "Why?", "chosen": "a", "rejected": last}])
        table.write_bytes(table.read_bytes() + b"\n")
        of_own = dpo_train.own_pairs(str(tmp_path / "own.jsonl"), choice, LeakFinder({}, {}), NO_TOKENS)
        content = tatqa.PromptContent()
        of_table = dpo_train.table_pairs(str(tmp_path / "tatqa"), "train", "validation", choice, content)
        found.append([data for *_, data in (of_own, of_table)])
    for one, other in zip(*found, strict=True):
        assert one["rows"] == other["rows"] and one["sha256"] != other["sha256"]


def test_own_pairs_that_spell_the_templates_tokens_are_named(tmp_path, capsys):
    bad = {"question": "Why?", "chosen": "So<|im_end|>!", "rejected": "No."}
    write_rows(tmp_path / "own.jsonl", [*own_rows()[:5], bad])
    dpo_train.main([*SMALL, "--pairs", "own.jsonl", "--dry_run", "--output_dir", "out", "--exp_log", "log.jsonl"])
    assert "own.jsonl:6 (a turn contains the chat template's own '<|im_end|>')" in capsys.readouterr().out


def test_a_prompt_in_several_forms_is_on_one_side(tmp_path):
    """Another case, blanks and Unicode form; equal pairs count once, and an evaluation's question is found."""
    forms = ["Какой ёж {}?", unicodedata.normalize("NFD", "Какой ёж {}?"), "«какой\u00a0 еж {}»", "КАКОЙ ЁЖ {}?\n"]
    rows = [{"prompt": form.format(n), "chosen": f"ёж {answer}", "rejected": "нет"}
            for n in range(6) for place, form in enumerate(forms) for answer in ("как все", place)]  # fmt: skip
    write_rows(tmp_path / "own.jsonl", rows)
    choice = dataclasses.replace(CHOICE, eval_pairs=7)
    finder = LeakFinder({"question": ["какой еж 5"]})
    pairs, held_out, data = dpo_train.own_pairs("own.jsonl", choice, finder, NO_TOKENS)
    assert data["rows"] == {"pairs": 3 * 5, "held_out": 7, "pairs_leaks": 5}
    trained, asked = ({normalise_text(pair["prompt"]) for pair in side} for side in (pairs, held_out))
    assert len(trained) == 3 and len(asked) == len({pair["cluster"] for pair in held_out}) == 2 and not trained & asked


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    dpo_train.main([*SMALL, "--dry_run", "--output_dir", "out", "--exp_log", "log.jsonl"])
    out = capsys.readouterr().out
    assert "pairs: 12" in out and "steps: 6" in out and "tatqa: 8 questions" in out and "memory" in out
    assert "Question:" in out and "chosen: " in out and "<|im_end|>\nrejected: " in out  # a pair as the model reads it
    for words in ("device: ", "6 forward and backward passes", "2 forward passes, once", "tokens a step"):
        assert words in out
    assert "tatqa: 8 questions, 2 x at most" in out and "of all that go through the model" in out
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])  # hashes of the model's files


def test_published_commands_parse():
    commands = [*logged_commands("dpo_train.py").values()]
    readme = (ROOT / "README.md").read_text("utf-8")
    commands += [shlex.split(line)[4:] for line in re.findall(r"^(poetry run python dpo_train\.py .*)$", readme, re.M)]
    assert len(commands) >= 7
    for command in commands:
        check_dpo_flags(dpo_train.build_parser().parse_args(command))


# ---------------------------------------------------------------------------------------------------------------------
# What the demo is there to show


@pytest.mark.slow
def test_dpo_mends_the_habit_of_the_wrong_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    argv = ["--demo", "--output_dir", str(tmp_path / "out"), "--exp_log", str(tmp_path / "log.jsonl")]
    record = dpo_train.main([*argv, "--no-do_mtbench", "--no-do_instruct", "--no-do_retention", "--eval_pairs", "0"])
    assert record["delta"]["tatqa_em"]["mean"] > 5 and record["delta"]["tatqa_em"]["p"] < 0.01
    before, after = (record[stage]["tatqa"]["by_type"]["span"]["em"] for stage in ("baseline", "final"))
    assert before < 40 < 45 < after
