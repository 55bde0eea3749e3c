"""Everything that the README, the guides and the logs tell a user to type or to look at is there."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from llm_alignment import files
from llm_alignment.devices import GIB, memory_estimate
from llm_alignment.evaluation import EVALUATIONS, METRICS, print_table, table_rows

README = (ROOT / "README.md").read_text("utf-8")
GUIDES = README + "".join(
    (ROOT / name).read_text("utf-8") for name in ("CONTRIBUTING.md", "experiments/METHODS.md", "experiments/SPEED.md")
)
SCRIPTS = ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2", "mtbench_eval")
TOOLS = ("report", "rerun", "export", "mine_pairs", "frontier", "chat")
LAUNCHED = r"((poetry|uv) run [^|]*?(python|torchrun|accelerate launch)|python) "


def commands() -> list[str]:
    """The command lines of the README's indented blocks."""
    lines = [line.strip() for line in README.split("\n") if line.startswith("    ")]
    parts = [part.strip() for line in lines for part in line.split(" ; ")]
    return [part for part in parts if re.match(LAUNCHED, part)]


def logged() -> list[str]:
    rows = files.read_records(ROOT / "experiments" / "logged_runs.jsonl")
    return [row["command"] for row in rows if row["command"]]


@pytest.mark.parametrize("command", commands() + logged())
def test_commands_parse(command, monkeypatch):
    """As written, by the script's own parser."""
    words = shlex.split(command)
    start = next(place for place, word in enumerate(words) if word in {"-m", "-c"} or word.endswith(".py"))
    script, *flags = words[start:]
    if script == "-c":
        compile(flags[0], command, "exec")
        return
    if script == "-m":
        assert flags[0] in {"pip", "pytest"}
        return
    monkeypatch.syspath_prepend(ROOT / "experiments")
    assert (ROOT / script).is_file()
    module = importlib.import_module(Path(script).stem)
    args, rest = module.build_parser().parse_known_args(flags)
    if rest:  # rerun.py takes the names of runs, and hands what it does not know to the script of the run
        assert script == "experiments/rerun.py"
        changes = list(itertools.dropwhile(lambda word: not word.startswith("--"), rest))
        importlib.import_module("sft_train").build_parser().parse_args(changes)


def test_a_value_with_a_comma_stands_in_quotes():
    """PowerShell makes two arguments of `--gates a=1,b=2`."""
    for path in (
        path for kind in ("*.md", "*.py", "experiments/*.md", "experiments/*.py") for path in ROOT.glob(kind)
    ):
        text = path.read_text("utf-8")
        shown = re.findall(r"^ *(?:poetry run )?python .*", text, re.MULTILINE)
        shown += re.findall(r"`(--[^`]*)`", text) if path.suffix == ".md" else []
        for command in shown:
            bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", command)
            assert not re.search(r"--\S+[ =]\S*\w,\w", bare), f"{path.name}: {command}"


def test_there_are_commands_for_every_script():
    text = "\n".join(commands())
    for script in SCRIPTS:
        assert f"{script}.py" in text
    for line in ("uv run python sft_train.py --demo", "uv run --extra test python -m pytest", "poetry install"):
        assert f"    {line}\n" in README


def test_files_that_are_named_exist():
    written_by_a_run = {
        "run.json", "metrics.json", "train_log.jsonl", "mt_bench_ru.json", "mt_bench_en.json",
        "experiments/sft_experiments.jsonl", "experiments/dpo_experiments.jsonl", "experiments/report/",
    }  # fmt: skip
    named = set(re.findall(r"`([\w/.-]+\.(?:py|md|jsonl|json)|[\w/]+/)`", README))
    named |= set(re.findall(r"\]\(([\w/.-]+)", README))
    assert len(named) > 10
    for name in named - written_by_a_run:
        assert (ROOT / name).exists(), name


def test_flags_that_are_named_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    known = " ".join(importlib.import_module(name).build_parser().format_help() for name in (*SCRIPTS, *TOOLS))
    named = {flag for text in re.findall(r"`([^`\n]+)`", GUIDES) for flag in re.findall(r"(?<![\w-])--\w+", text)}
    assert len(named) > 30
    for flag in named - {
        "--no",
        "--extra",
        "--data",
        "--shape",
        "--growth",
    }:  # the prefix of a switch; flags of benchmarks
        assert re.search(rf"{flag}\b", known), flag


def recorded() -> dict[str, dict]:
    """The records of runs of this code by tag."""
    paths = [ROOT / "experiments" / "recorded_runs.jsonl", ROOT / "experiments" / "demo" / "runs.jsonl"]
    return {row["tag"]: row for path in paths if path.exists() for row in files.read_records(path)}


def test_published_records_name_no_folder_of_one_machine():
    """A recorded run is repeated from a clone, wherever that lies."""
    for tag, row in recorded().items():
        paths = [text for text in (*row["args"].values(), *row["argv"]) if isinstance(text, str)]
        assert not [text for text in paths if Path(text).is_absolute()], tag


DOCS = ("README.md", "experiments/METHODS.md", "experiments/demo/README.md")
FIGURE = r"^\| `([\w.-]+)` \| ([^|]+) \| ([+-][\d.]+) \[([-\d.]+), ([-\d.]+)\] \|"


@pytest.mark.parametrize("name", DOCS)
def test_figures_are_those_of_the_record_that_they_name(name):
    """Rows | `TAG` | measure | difference [low, high] |, to the digits that are written."""
    names, found = {metric.title: key for key, metric in METRICS.items()}, 0
    for tag, title, *written in re.findall(FIGURE, (ROOT / name).read_text("utf-8"), re.MULTILINE):
        delta = recorded()[tag]["delta"][names[title]]
        for text, key in zip(written, ("mean", "low", "high"), strict=True):
            assert float(text) == round(delta[key], len(text.partition(".")[2])), (tag, title, key)
        found += 1
    assert found >= 2


def test_the_noise_and_the_warning_are_those_of_the_results():
    results = (ROOT / "experiments" / "RESULTS.md").read_text("utf-8")
    assert "1.76, 1.48, 1.63, 1.72, 1.4 | 0.15 | 0.22 \\[0.13, 0.63]" in results
    assert (
        "1.76, 1.48, 1.63, 1.72 and 1.40" in README
        and "0.22 (standard deviation; 95 % interval 0.13 to 0.63" in README
    )
    warning = "**No recipe has run on a GPU or on Qwen3-1.7B with this code yet.**"
    assert (warning in results) == (warning in README)


def test_the_demo_table_is_the_one_that_its_record_gives(capsys, monkeypatch):
    """The README shows some rows of the table of `readme-sft`, letter for letter."""
    record = recorded()["readme-sft"]
    monkeypatch.setenv("COLUMNS", "120")
    print_table("", table_rows(record["baseline"], record["final"], record["delta"], "headline"))
    given = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    shown = README.split("Four of its rows:")[1].split("```")[1].strip("\n").splitlines()
    assert len(shown) == 6 and set(shown) - {shown[1]} <= given  # the rule under the heading is as wide as the console
    lost = [recorded()[tag]["delta"]["retention"]["lost"] for tag in ("readme-sft-nokl", "readme-sft")]
    assert f"loses {lost[0]} of the 42 answers" in README and f"with it {lost[1]} (records" in README


SHAPES = {
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
}
DPO_ROWS = {  # rank, tokens of the longest prompt
    "DPO on TAT-QA": (16, 768),
    "multi-task and progressive DPO": (8, 1536),
}


def memory_cells(size: str, rank: int, tokens: int, **how: int) -> list[str]:
    """The two figures of a row of README's memory table."""
    shape = {**SHAPES[size], "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**shape, tie_word_embeddings=size == "1.7B"), dtype=torch.bfloat16
        )
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    needed = memory_estimate(model, tokens=tokens, width=2, in_4bit=True, dropout=True, **how)
    rest = sum(needed[part] for part in ("weights", "adapter", "logits", "context"))
    return [f"{(rest + needed[part]) / GIB:.1f}" for part in ("checkpointed", "activations")]


def test_the_memory_table_is_the_estimate(monkeypatch):
    """Of the rows with q and v; those of DPO are for Linux, where Triton computes TRL's loss."""
    rows = re.findall(
        r"^\| SFT, ([\d.]+B),[^|]* `--batch (\d+)`, (\d+) tokens \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE
    )
    assert len(rows) == 3
    for size, batch, tokens, *written in rows:
        assert memory_cells(size, 8, int(batch) * int(tokens), chunk=1024) == written
    for title, (rank, prompt) in DPO_ROWS.items():
        cells = {}
        for is_there in (True, False):
            monkeypatch.setattr("transformers.utils.is_triton_available", lambda is_there=is_there: is_there)
            cells[is_there] = memory_cells("1.7B", rank, 2560, scored=2 * (2560 - prompt))
        assert re.search(rf"^\| {title}, 1.7B, .* \| {cells[True][0]} \| {cells[True][1]} \|$", README, re.MULTILINE)
        assert f"{float(cells[False][0]) - float(cells[True][0]):.1f}" in README.split("no Triton, ")[1].split("\n")[0]


def test_every_table_of_ratios_names_the_benchmark_that_prints_it():
    sections = (ROOT / "experiments" / "SPEED.md").read_text("utf-8").split("\n## ")[1:]
    assert len(sections) > 4
    for section in sections:
        benchmarks = re.findall(r"python (experiments/benchmarks/\w+\.py)", section)
        assert benchmarks and all((ROOT / path).is_file() for path in benchmarks), section[:60]


def test_what_is_shared_is_adapter_tokenizer_and_card():
    """Of a run's folder: neither its rows, which hold training data, nor what its checkpoints are made of."""
    from huggingface_hub.utils import filter_repo_objects

    words = shlex.split(next(line for line in README.splitlines() if line.startswith("hf upload ")))
    patterns = [pattern for flag, pattern in itertools.pairwise(words) if flag == "--include"]
    shared = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    shared |= {"chat_template.jinja", "README.md", "loss.png"}
    kept = {f"{name}_{stage}.jsonl" for name in EVALUATIONS for stage in ("baseline", "final", "step_5")}
    kept |= {"run.json", "run.log", "metrics.json", "train_log.jsonl", "replay.jsonl", "training_args.bin", "kl.png"}
    kept |= {f"checkpoint-5/{name}" for name in (*shared, "optimizer.pt", "trainer_state.json")}
    assert {*filter_repo_objects(sorted(shared | kept), allow_patterns=patterns)} == shared
