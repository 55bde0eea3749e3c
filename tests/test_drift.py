"""Drift from the base: the plain formula, a fresh adapter, reference answers, a restart."""

import json

import pytest
import torch
from toys import rows_of

from llm_alignment import adapters, drift, models
from llm_alignment.evaluation import Evaluation
from llm_alignment.prompts import PromptStyle


@pytest.fixture(scope="module")
def model(demo_base):
    torch.manual_seed(0)
    lora = adapters.LoraSettings(lora_r=8, lora_alpha=16, lora_dropout=0.05, target_modules="q_proj,v_proj")
    return adapters.new_adapter(models.load_model(demo_base), lora).eval()


@pytest.fixture
def tuned(model):
    """The model with an adapter that does something; the fresh one is put back."""
    weights = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    yield model
    with torch.no_grad():
        for weight in weights:
            weight.zero_()


IDS = [5, 9, 30, 12, 7, 44, 45]
ROWS = [
    {"question_id": 0, "cluster": "a", "input_ids": IDS, "labels": [-100] * 3 + IDS[3:]},
    {"question_id": 1, "cluster": "b", "input_ids": [6, 8, 31], "labels": [-100, -100, 31]},
]


def plain_drift(model, input_ids, labels) -> tuple[float, int]:
    ids = torch.tensor([input_ids])
    with torch.no_grad():
        tuned = model(ids).logits[0].double().log_softmax(-1)
        with model.disable_adapter():
            base = model(ids).logits[0].double().log_softmax(-1)
    places = [place for place in range(len(labels) - 1) if labels[place + 1] != -100]
    kl = (base.exp() * (base - tuned)).sum(-1)
    return sum(kl[place].item() for place in places), len(places)


def test_drift_is_the_plain_formula_and_nothing_of_a_fresh_adapter(model, request):
    for row in ROWS:
        kl, tokens = drift.row_drift(model, row)
        assert abs(kl / tokens) < 1e-6
    tuned = request.getfixturevalue("tuned")
    for row in ROWS:
        kl, tokens = drift.row_drift(tuned, row)
        expected, count = plain_drift(tuned, row["input_ids"], row["labels"])
        assert tokens == count and kl == pytest.approx(expected, rel=1e-4) and kl > 0.01
    assert drift.row_drift(tuned, {"input_ids": [5, 6], "labels": [-100, -100]}) == (0.0, 0)


def test_rows_summary_difference_and_restart(tuned, demo_tokenizer, tmp_path):
    task = drift.drift_evaluation(ROWS)
    before, after = (
        rows_of(task, tuned, demo_tokenizer, tmp_path / f"{adapter}.jsonl", fingerprint={"adapter": adapter})
        for adapter in ("none", "abc")
    )
    assert task.summarise(before) == {"drift": 0.0}
    sums = [plain_drift(tuned, row["input_ids"], row["labels"]) for row in ROWS]
    total = sum(kl for kl, _ in sums) / 5
    assert task.summarise(after)["drift"] == pytest.approx(total, rel=1e-4)
    delta = task.compare(before, after)["drift"]
    assert delta["mean"] == pytest.approx(total, rel=1e-4) and delta["n"] == 2
    whole = (tmp_path / "abc.jsonl").read_bytes()
    (tmp_path / "abc.jsonl").write_bytes(whole[:-9])
    rows_of(task, tuned, demo_tokenizer, tmp_path / "abc.jsonl", fingerprint={"adapter": "abc"})
    assert (tmp_path / "abc.jsonl").read_bytes() == whole and not tuned.training


def test_drift_is_measured_on_reference_answers(demo_tokenizer, logged):
    turns = [{"role": "user", "content": "What is a bond?"}]
    references = {
        "tatqa": [("q1", "Table. Question: How much? Answer:", " 12", "t1")],
        "mtbench": [],
        "finance_instruct": [("f1", turns, "A loan.", "f1")],
    }
    tasks = [Evaluation(name=name, items=[], read=list, references=answers) for name, answers in references.items()]
    (task,) = drift.reference_drift(demo_tokenizer, tasks, PromptStyle(), 3072)
    assert [row["question_id"] for row in task.items] == ["tatqa q1", "finance_instruct f1"]
    assert json.dumps(task.items)  # plain numbers
    shown = [demo_tokenizer.decode(row["input_ids"]) for row in task.items]
    assert shown[0].endswith("Answer: 12") and shown[1].endswith("A loan.") and "What is a bond?" in shown[1]
    targets = [[label for label in row["labels"] if label != -100] for row in task.items]
    assert [demo_tokenizer.decode(ids).strip() for ids in targets] == ["12", "A loan."]
    assert drift.reference_drift(demo_tokenizer, tasks[1:2], PromptStyle(), 3072) == []
    assert "drift is not measured" in logged.text
