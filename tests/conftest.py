"""What tests share: places, toy and demo models, small files, the one line of an error, the log."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3ForCausalLM, Trainer

    from llm_alignment.finance import TrainingData
    from llm_alignment.models import Base
    from llm_alignment.rewards import RewardModel

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
os.environ["COLUMNS"] = "120"  # of the tables, whatever started the tests

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "experiments" / "demo"


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last, so that a plain mistake shows early. Those marked `gpu` are skipped where there is none; with
    LLM_ALIGNMENT_GPU_TESTS=cpu those marked `gpu(cpu=True)` run on the CPU."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for_gpu = [(item, marker) for item in items if (marker := item.get_closest_marker("gpu"))]
    if for_gpu:
        import torch

        on_cpu = os.environ.get("LLM_ALIGNMENT_GPU_TESTS") == "cpu"
        if not torch.cuda.is_available():
            for item, marker in for_gpu:
                if not (on_cpu and marker.kwargs.get("cpu")):
                    item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


# ---------------------------------------------------------------------------------------------------------------------
# The owner's check: what the tests marked `gpu` measured, in one file


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, float | str, str], None]:
    """figure(name, value, unit): something that the test measured, for the file of the owner's check."""
    return lambda name, value, unit="": record_property(name, [value, unit])


CHECKED: dict[str, dict] = {}  # test: {"outcome", "seconds", "figures"}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "gpu" in report.keywords and (report.when == "call" or report.failed):
        about = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
        CHECKED[report.nodeid] = about | {"figures": dict(report.user_properties)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes gpu_check.json, or the file that LLM_ALIGNMENT_GPU_CHECK names; a check on the CPU only the latter."""
    named = os.environ.get("LLM_ALIGNMENT_GPU_CHECK")
    if not CHECKED or hasattr(session.config, "workerinput"):
        return
    import torch

    if named or torch.cuda.is_available():
        from llm_alignment.files import write_json

        path = Path(named) if named else ROOT / "experiments" / "benchmarks" / "gpu_check.json"
        write_json(path, card() | {"tests": CHECKED})
        print(f"\nfigures in {path}")


def card() -> dict:
    """The card, or the CPU, with its driver, and the versions of what the check ran with."""
    import torch

    from llm_alignment.processes import versions
    from llm_alignment.runs import git_commit

    found = {"ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "git": git_commit(), "card": "cpu"}
    if torch.cuda.is_available():
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split() if shutil.which(asked[0]) else []
        about = torch.cuda.get_device_properties(0)
        found |= {"card": about.name, "memory_gib": round(about.total_memory / 2**30, 1)}
        found |= {
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "driver": " ".join(driver[:1]),
        }
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    return found | {"versions": {"python": sys.version.split()[0]} | versions(*names)}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the test run's own. A test that needs an empty one sets LLM_ALIGNMENT_CACHE itself."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LLM_ALIGNMENT_CACHE", str(folder))
        yield folder


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP does what it does in a terminal: under nohup it is ignored, and runs and child processes keep that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in `tmp_path`, with a cache folder of its own there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_ALIGNMENT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """pytest's caplog, which also gets the lines of the project's logger."""
    monkeypatch.setattr(logging.getLogger("llm_alignment"), "propagate", True)
    caplog.set_level(logging.INFO, logger="llm_alignment")
    return caplog


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from toys import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    from toys import make_model

    return make_model()


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    from toys import save_reward_model

    return save_reward_model(tmp_path_factory.mktemp("reward"), tokenizer)


@pytest.fixture(scope="module")
def reward_model(reward_folder: str) -> RewardModel:
    from llm_alignment.rewards import RewardModel

    return RewardModel(reward_folder)


@pytest.fixture(scope="module")
def demo_base() -> Base:
    """The demo's model as the base of a run, not quantised."""
    from toys import toy_base

    return toy_base()


@pytest.fixture(scope="module")
def demo_tokenizer(demo_base: Base) -> PreTrainedTokenizerBase:
    from llm_alignment.models import load_tokenizer

    return load_tokenizer(demo_base)


@pytest.fixture(scope="module")
def sized_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """sized_model(**sizes): a folder with the demo's model in other sizes, its weights random, in bf16 on a GPU."""

    @functools.cache
    def save(**sizes: int) -> str:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = shutil.copytree(DEMO / "model", tmp_path_factory.mktemp("sized") / "model")
        config = AutoConfig.from_pretrained(folder)
        config.update({**sizes, "layer_types": ["full_attention"] * sizes["num_hidden_layers"]})
        on_gpu = torch.cuda.is_available()
        with torch.device("cuda" if on_gpu else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
        model.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 rows of T-Wix to train on, of different lengths, and 2 held out."""
    from llm_alignment import files

    rows = [row for _, row in files.read_rows(DEMO / "twix.jsonl", files.SkippedRows()) if row["subset"] == "general"]
    distinct = {str(row["messages"][0]): row for row in rows}
    return write_rows(tmp_path_factory.mktemp("data") / "twix.jsonl", list(distinct.values())[:20])


@pytest.fixture(scope="module")
def sft_trainer(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """sft_trainer(*more): the trainer of a run without dropout on the demo's model, in float32."""
    from toys import setup_of

    import sft_train
    from llm_alignment import models, sft, twix
    from llm_alignment.anchored_loss import AnchorSettings
    from llm_alignment.encoder import ChatEncoder
    from llm_alignment.flags import fill, parse_arguments
    from llm_alignment.training import TrainingSettings

    def build(*more: str, no_4bit: bool = True) -> Trainer:
        folder = tmp_path_factory.mktemp("trainer")
        args = parse_arguments(
            sft_train.build_parser(),
            ["--demo", "--output_dir", str(folder), "--dataset", str(dataset), "--sample_ratio", "1"]
            + ["--no_4bit"] * no_4bit
            + ["--val_split", "0.1", "--batch", "2", "--grad_acc", "3", "--epochs", "9", "--learning_rate", "1e-3"]
            + ["--max_seq_length", "64", "--kl_coef", "0.2", "--kl_limit_seq", "9", *more],
            sft_train.DEMO,
        )
        setup = setup_of(vars(args))
        encoder = ChatEncoder(setup.tokenizer, thinking=False, assistant_only=False)
        _, examples = twix.load_data(fill(twix.RowChoice, args), encoder)
        rows = twix.tokenise(examples("train"), encoder, 1, longest=args.max_seq_length)
        settings = fill(TrainingSettings, args, weight_decay=0.01, longest=args.max_seq_length)
        return sft.build_trainer(
            models.load_model(setup.base), setup, {"train": rows, "validation": rows}, settings,
            sft=fill(sft.SftSettings, args), anchor=fill(AnchorSettings, args),
        )  # fmt: skip

    return build


def torchrun(script: Path, *argv: str, processes: int = 2) -> list[str]:
    """The command that starts a script in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, str(script), *argv]


def write_rows(path: Path, rows: list[dict | str]) -> Path:
    """Writes a JSONL file; a row that is a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_rows(path: Path | str) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line]


def logged_commands(script: str) -> dict[str, list[str]]:
    """{id: arguments} of the published runs of a script whose command was logged."""
    runs = [run for run in read_rows(ROOT / "experiments" / "logged_runs.jsonl") if run["script"] == script]
    words = {run["id"]: shlex.split(run["command"]) for run in runs if run["command"]}
    assert all(command[:4] == ["poetry", "run", "python", script] for command in words.values())
    return {name: command[4:] for name, command in words.items()}


def chat(prompt: str, answer: str, subset: str = "general", system: str | None = None) -> dict:
    """A row of an SFT data set."""
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "subset": subset}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with a head of its own, as a folder."""
    from toys import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("model")
    make_model(tie_word_embeddings=False).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def finance_args(tmp_path: Path, *argv: str) -> argparse.Namespace:
    """The arguments of dpo_train_mt.py's demo, which writes into `tmp_path`."""
    import dpo_train_mt

    folders = ["--output_dir", str(tmp_path / "run"), "--exp_log", str(tmp_path / "log.jsonl")]
    return dpo_train_mt.parse(["--demo", *folders, *argv])


def finance_data(args: argparse.Namespace, sources: set[str]) -> TrainingData:
    """What dpo_train_mt.py trains on and asks, for `sources`."""
    from llm_alignment.encoder import NO_TOKENS
    from llm_alignment.finance import DataSettings, load_data
    from llm_alignment.flags import fill
    from llm_alignment.leaks import forbidden_texts
    from llm_alignment.tatqa import question_texts, tatqa_file
    from mtbench_eval import load_questions

    asked, passages = forbidden_texts({"MT-Bench question": load_questions(args.mtbench_file)})
    asked["TAT-QA question"] = question_texts(tatqa_file(args.tatqa_dir, args.eval_split)) if args.do_eval else []
    return load_data(fill(DataSettings, args), sources, asked, passages, NO_TOKENS)


def run_error(capsys: pytest.CaptureFixture, main: Callable[[list[str]], object], *argv: str, code: int = 2) -> str:
    """The one line on stderr with which `main([*argv])` fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
