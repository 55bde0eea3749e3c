"""The model card says what was measured, and the hub takes its head."""

from __future__ import annotations

import pytest
import yaml
from conftest import write_rows

from llm_alignment.card import write_card
from llm_alignment.files import write_json


@pytest.fixture
def run_folder(tmp_path):
    """A finished run's files that the card is made of: two of three answers changed, loss from 2 to 1.5."""
    folder = tmp_path / "run"
    folder.mkdir()
    args = {"model": "Qwen/Qwen3-1.7B", "thinking": False}
    data = {"source": "t-tech/T-Wix", "rows": {"general_train": 90}}
    run = {"script": "sft_train.py", "argv": ["--kl_coef", "0"], "args": args, "data": data}
    write_json(folder / "run.json", {**run, "commits": {"model": "abc123"}})
    delta = {"n": 3, "mean": -0.5, "low": -0.6, "high": -0.4, "p": 0.001, "changed": 3, "clusters": None}
    sides = {"baseline": {"val_loss": 2.0}, "final": {"val_loss": 1.5}}
    write_json(folder / "metrics.json", {**sides, "delta": {"val_loss": delta}})
    for stage, answers in (("baseline", ["same", "old 1", "old 2"]), ("final", ["same", "new\n1", "new 2"])):
        rows = [{"question_id": n, "turns": [f"Q{n}"], "answers": [text]} for n, text in enumerate(answers)]
        write_rows(folder / f"mtbench_{stage}.jsonl", [{"fingerprint": {}}, *rows])
    return folder


def card_of(folder):
    _, head, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_base_commit_figures_and_changed_answers_are_in_the_card(run_folder, tmp_path):
    write_card(run_folder)
    head, text = card_of(run_folder)
    assert (
        head.items() >= {"base_model": "Qwen/Qwen3-1.7B", "datasets": ["t-tech/T-Wix"], "library_name": "peft"}.items()
    )
    assert 'revision="abc123"' in text and "python sft_train.py --kl_coef 0" in text
    assert "| 2.000 | 1.500 | -0.5000 | [-0.6000, -0.4000] |" in text
    assert "> old 1\n" in text and "> new\n> 1\n" in text and "> new 2\n" in text and "> same" not in text
    assert "loss.png" not in text  # there is none in the folder
    merged = tmp_path / "merged"
    merged.mkdir()
    write_card(run_folder, merged, 0.5)
    head, text = card_of(merged)
    assert head["library_name"] == "transformers" and "0.5 of its strength" in text and "PeftModel" not in text


def test_what_is_no_name_of_the_hub_stays_out_of_the_head(run_folder, tmp_path):
    """The hub refuses a card whose base_model or datasets are folders of a machine; the text has their names."""
    path = run_folder / "run.json"
    text = path.read_text("utf-8").replace("Qwen/Qwen3-1.7B", str(tmp_path)).replace("t-tech/T-Wix", "/data/x.jsonl")
    path.write_text(text.replace('"abc123"', "null"), encoding="utf-8")
    write_card(run_folder)
    head, text = card_of(run_folder)
    assert not {"base_model", "datasets"} & head.keys() and str(tmp_path) not in text
    assert f"of {tmp_path.name} (a local folder), trained by SFT" in text and "Data: x.jsonl (" in text


def test_a_link_to_a_model_is_called_as_the_user_called_it(run_folder, tmp_path):
    path, link = run_folder / "run.json", tmp_path / "my-model"
    link.symlink_to(run_folder)
    path.write_text(path.read_text("utf-8").replace("Qwen/Qwen3-1.7B", str(link)), encoding="utf-8")
    write_card(run_folder)
    assert "A LoRA adapter of my-model (a local folder)" in card_of(run_folder)[1]
