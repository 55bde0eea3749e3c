"""The hub's clients against a hub on the loopback: names instead of paths, and everything a hub can do wrong."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub as local_hub
import pytest
from conftest import ROOT, run_error

from llm_alignment import hub as hub_module
from llm_alignment.files import InputError, SkippedRows
from llm_alignment.hub import fetch_model, hub_files, open_dataset
from llm_alignment.tatqa import tatqa_file
from mtbench_eval import load_questions

FEW = {  # little to tokenise: what comes from the hub is the same
    "sft_train": ["--sample_ratio", "0.05"],
    "dpo_train": ["--limit_pairs", "8", "--eval_limit", "8"],
    "dpo_train_mt": ["--use_3way_hybrid", "--limit_pairs", "8", "--eval_limit", "8"],
    "dpo_train_mt_v2": ["--reddit_sample_rate", "0.05", "--stage1_general_pairs", "8", "--eval_limit", "8"],
    "mtbench_eval": [],
}


@pytest.fixture(scope="module")
def server() -> Iterator[local_hub.Hub]:
    with local_hub.serve() as hub:
        yield hub


@pytest.fixture
def hub(server: local_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> local_hub.Hub:
    """The local hub as this process's hub, with caches and a working folder of the test's own."""
    import datasets
    import huggingface_hub

    for kept in (server.faults, server.requests, server.heads, server.older):
        kept.clear()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module, values in {
        huggingface_hub.constants: dict(
            ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_CACHE=str(tmp_path / "hf")
        ),
        datasets.config: dict(HF_ENDPOINT=server.url, HF_DATASETS_CACHE=tmp_path / "datasets"),
    }.items():
        for name, value in {**values, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)  # between its retries
    monkeypatch.chdir(tmp_path)
    return server


def fetched(hub: local_hub.Hub) -> list[str]:
    """The contents asked for since the last look."""
    files = [line for line in hub.requests if line.startswith("GET") and ("/cdn/" in line or "/resolve/" in line)]
    hub.requests.clear()
    return files


@pytest.mark.parametrize("script", FEW)
def test_a_dry_run_takes_everything_from_the_hub_once(script, hub, capsys):
    """With the names that the script has by default."""
    main = importlib.import_module(script).main
    argv = ["--dry_run", "--no_4bit", "--exp_log", "log.jsonl", *FEW[script]]
    main(argv)
    first, shown = fetched(hub), capsys.readouterr().out
    assert any("/cdn/" in line for line in first), "large files came by a redirect"
    main(argv)
    assert fetched(hub) == []
    assert capsys.readouterr().out.count("\n") <= shown.count("\n") + 1


@pytest.mark.slow
def test_a_main_that_moves_while_a_run_lasts_changes_nothing_for_it(hub, monkeypatch):
    """It moves before the weights are first read; three stages follow, each with a model of its own."""
    from test_dpo_train_mt_v2 import SMALL

    import dpo_train_mt_v2
    from llm_alignment import models

    name, load, asked = "Qwen/Qwen3-1.7B", models.load_model, "/api/models/Qwen/Qwen3-1.7B/revision/"
    whole = hub.repositories["models", name]
    template = whole["chat_template.jinja"] + b"{# another #}"

    def load_after_the_move(*args, **options):
        if not hub.older:
            hub.move("models", name, "2" * 40, whole | {"chat_template.jinja": template})
        return load(*args, **options)

    monkeypatch.setattr(models, "load_model", load_after_the_move)
    try:
        record = dpo_train_mt_v2.main([*SMALL, "--model", name, "--output_dir", "run", "--exp_log", "log.jsonl"])
    finally:
        hub.repositories["models", name] = whole
    assert sum(asked in line for line in hub.requests) == 1 and hub.older
    assert record["commits"]["model"] == local_hub.COMMIT
    runs = [json.loads(path.read_text("utf-8")) for path in sorted(Path("run").glob("stage*/run.json"))]
    assert len(runs) == 3 and {run["base"] for run in runs} == {record["base"]} == {local_hub.COMMIT}
    results = sorted(Path("run").rglob("*_*.jsonl"))
    heads = [json.loads(path.read_text("utf-8").split("\n")[0]).get("fingerprint") for path in results]
    prints = {head["weights"] for head in heads if head and "weights" in head}
    first = models.resolve_base(models.BaseFlags(name, local_hub.COMMIT, no_4bit=True))
    expected = models.base_fingerprint(first, thinking=False)
    assert len(results) > 12 and prints == {expected["weights"]}
    assert first.folder.name == local_hub.COMMIT and (first.folder / "chat_template.jinja").read_bytes() != template


def ask(what: str) -> object:
    if what == "model":
        return hub_files("Qwen/Qwen3-1.7B", "--model", ["*.json", "*.safetensors"])
    if what == "file":
        return hub_files("t-tech/ru-mt-bench", "--questions", ["raw/question.jsonl"], kind="dataset")
    return list(open_dataset("Intel/orca_dpo_pairs", "--general_dataset", SkippedRows()))


@pytest.mark.parametrize("what, flag", [("model", "--model"), ("file", "--questions"), ("data", "--general_dataset")])
@pytest.mark.parametrize(
    "fault, message",
    [
        *(({"/api/": code}, f"answers {code}") for code in (401, 403, 404, 500)),
        ({"/resolve/": 500}, "answers 500"),
        ({"/cdn/": "cut"}, "broke off"),
        ({"/cdn/": "other"}, "another file than its ETag says"),
    ],
)
def test_what_a_hub_does_wrong_is_one_line_and_the_next_start_goes_on(what, flag, fault, message, hub):
    hub.faults.update(fault)
    with pytest.raises(InputError) as error:
        ask(what)
    line = str(error.value)
    assert message in line and line.startswith(f"{flag} ") and f"give {flag} a local path" in line and "\n" not in line
    hub.faults.clear()
    assert ask(what)
    fetched(hub)
    assert ask(what) and fetched(hub) == []


def test_a_download_that_broke_off_goes_on_where_it_was(hub):
    hub.faults["/cdn/"] = "cut once"
    folder = hub_files("Qwen/Qwen3-1.7B", "--model", ["*.safetensors"])
    assert (folder / "model.safetensors").read_bytes() == (local_hub.DEMO / "model/model.safetensors").read_bytes()
    assert len(fetched(hub)) == 2


def test_questions_are_fetched_once_and_written_to_the_working_folder(hub):
    fetched_now = load_questions("auto", language="ru")
    rows = (local_hub.DEMO / "mt_bench_ru.jsonl").read_text("utf-8").split("\n")
    assert fetched_now[0]["turns"] == json.loads(rows[0])["turns"]
    assert "\\u" not in Path("mt_bench_ru.json").read_text("utf-8")
    assert any("/api/datasets/t-tech/ru-mt-bench/" in line for line in hub.requests) and len(fetched(hub)) == 1
    assert load_questions("mt_bench_ru.json") == fetched_now and hub.requests == []
    load_questions("mt_bench_en.json")
    assert any("/api/spaces/lmsys/mt-bench/" in line for line in hub.requests) and len(fetched(hub)) == 1
    with pytest.raises(InputError):
        load_questions("elsewhere.json")


def test_names_that_the_hub_does_not_have(hub):
    with pytest.raises(InputError, match="--model nobody/nothing: the hub answers 401"):
        hub_files("nobody/nothing", "--model", ["*.json"])
    with pytest.raises(InputError, match="--dataset nobody/nothing: the hub answers 401"):
        next(open_dataset("nobody/nothing", "--dataset", SkippedRows()))
    with pytest.raises(InputError, match="--questions t-tech/ru-mt-bench: the repository has no missing.json"):
        hub_files("t-tech/ru-mt-bench", "--questions", ["missing.json"], kind="dataset")
    with pytest.raises(InputError, match="no such file or folder, and not a hub id"):
        next(open_dataset("rows.jsonl", "--dataset", SkippedRows()))


@pytest.mark.parametrize(
    "name", ["./rows", "/rows", "~/rows", "my data/rows", "a--b/rows", "ж/rows", "a/" + "b" * 200, "@/x"]
)
def test_a_path_that_is_not_there_is_not_asked_for_on_the_hub(name, hub):
    for ask in (
        lambda: next(open_dataset(name, "--dataset", SkippedRows())),
        lambda: hub_files(name, "--model", ["*.json"]),
        lambda: fetch_model(name, None, "--model"),
        lambda: tatqa_file(name, "train"),
    ):
        with pytest.raises(InputError, match="no such file or folder, and not a hub id"):
            ask()
    assert not hub.requests


def test_a_data_set_of_another_shape(hub):
    hub.repositories["datasets", "some/lines"] = {"train.jsonl": b'{"a": 1}\n{"a": \n'}
    hub.repositories["datasets", "some/tests"] = {"test.jsonl": b'{"a": 1}\n'}
    for name, reason in (("some/lines", ""), ("some/tests", ".*train")):
        hub.blobs |= {local_hub.sha256(data): data for data in hub.repositories["datasets", name].values()}
        with pytest.raises(InputError, match=f"--dataset {name}: cannot be used {reason}"):
            next(open_dataset(name, "--dataset", SkippedRows()))


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    import huggingface_hub

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    for what in ("model", "file", "data"):
        with pytest.raises(InputError, match="cannot be reached"):
            ask(what)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    ask("model")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    assert ask("model"), "what is in the cache needs no hub"


def test_a_full_disk_is_not_the_hub(tmp_path):
    with pytest.raises(OSError, match="No space"), hub_module.hub_errors("a/b", "--model"):
        raise OSError(28, "No space left on device", "blob")


def test_a_script_ends_with_2(hub, capsys):
    hub.faults["/api/"] = 401
    main = importlib.import_module("sft_train").main
    assert "the hub answers 401" in run_error(capsys, main, "--dry_run", "--exp_log", "log.jsonl")
    assert not list(Path().glob("*.jsonl"))


def test_every_recipe_is_known_by_its_id():
    known = local_hub.commands()
    assert {"readme-1", "S4", "dpo-quickstart", "progressive-quickstart"} <= set(known)
    for command in known.values():
        words = local_hub.words_of(command)
        assert words[0] == sys.executable and any(Path(word).is_file() for word in words[1:])
        own = {word for word in words if word.endswith(".jsonl") and not word.startswith("experiments/")}
        assert own <= local_hub.OWN_FILES.keys(), command


@pytest.mark.slow
def test_a_recipe_of_the_readme_runs_to_its_end(tmp_path):
    """To the letter, with the hub's names, in a process of its own; all of them: python tests/hub.py all."""
    command = [sys.executable, str(ROOT / "tests" / "hub.py"), "sft-quickstart", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    shown = (tmp_path / "sft-quickstart.txt").read_text("utf-8")
    assert done.returncode == 0, shown[-2000:]
    assert (tmp_path / "sft-quickstart" / "mt_bench_ru.json").exists() and "MT-Bench" in shown


def test_no_run_is_reported_to_the_hub():
    """TRL's report comes from a thread whose look-up of the host can end the process in a segmentation fault."""
    shown = "import sft_train, huggingface_hub.constants as hub; print(hub.HF_HUB_DISABLE_TELEMETRY)"
    unset = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    assert subprocess.check_output([sys.executable, "-c", shown], cwd=ROOT, env=unset, text=True).strip() == "True"
