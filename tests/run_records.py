"""Records by hand, in the form that the scripts write, and the modules of experiments/ for the tests of these."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from conftest import ROOT

from llm_alignment import files

EXPERIMENTS = ROOT / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
MODULES = (
    "chat", "export", "frontier", "mine_pairs", "plots", "records", "rerun", "report", "tables",
)  # fmt: skip
(
    chat, export, frontier, mine_pairs, plots, records, rerun, report, tables,
) = map(importlib.import_module, MODULES)  # fmt: skip


def summary(avg: float, avg_logged: float, raw: float) -> dict:
    categories = {"writing": avg - 0.5, "math": avg + 0.25, "roleplay": avg + 0.25}
    parts = {"by_turn": [avg + 0.1, avg - 0.1], "by_category": categories, "answer_tokens": 51.5, "unfinished": 0.0}
    return {"avg": avg, "avg_logged": avg_logged, "raw_mean": raw, "n": 12, **parts}


def delta(mean: float, low: float, high: float, p: float, n: int = 12) -> dict:
    found = {"mean": mean, "low": low, "high": high, "p": p, "n": n}
    return found | {"changed": n, "clusters": None, "changed_clusters": None}


ARGS = {"demo": False, "model": "Qwen/Qwen3-1.7B", "subset": "both", "sample_ratio": 0.25, "seed": 42}
ARGS |= {"kl_coef": 0.03, "kl_start_step": 200, "kl_warmup_steps": 300, "kl_limit_seq": 128}
BEFORE, AFTER = summary(5.5, 2.0625, 0.25), summary(5.75, 2.375, 0.4)


def make_record(tag: str, script: str = "sft_train.py", **changes) -> dict:
    losses = ("val_loss", "val_loss_row_mean", "ppl")
    record = {
        "ts": "2025-01-02T03:04:05Z", "tag": tag, "script": script, "argv": ["--demo", "--exp_tag", tag],
        "args": dict(ARGS), "git": "0123456789ab", "versions": {"torch": "2.13.0"},
        "device": {"name": "cpu", "dtype": "float32", "processes": 1, "threads": 2},
        "data": {"rows": {"tatqa_pairs": 1234, "skipped": 0}},
        "baseline": dict(zip(losses, (1.61, 1.50123456, 5.0028), strict=True)) | {"mtbench": dict(BEFORE)},
        "final": dict(zip(losses, (1.36, 1.2504321, 3.896), strict=True)) | {"mtbench": dict(AFTER)},
        "delta": {
            "val_loss": delta(-0.25, -0.3, -0.2, 0.0002),
            "val_loss_row_mean": delta(-0.25080246, -0.3, -0.2, 0.0002),
            "mtbench": delta(0.25, -0.125, 0.625, 0.21),
            "mtbench_raw": delta(0.15, 0.0625, 0.3, 0.03),
        },
        "runtime_s": {"baseline": 10.0, "train": 60.0, "final": 10.0, "total": 84.0},
        "kept_step": None, "status": "completed", "output_dir": f"no_such_folder_{tag}",
    }  # fmt: skip
    return record | changes


def tatqa(em_like: float, em: float, f1: float, of_spans: float) -> dict:
    by_type = {"span": {"em_like": of_spans, "em": 45.0, "f1": 52.0, "n": 10}}
    return {"em_like": em_like, "em": em, "f1": f1, "by_type": by_type, "n": 20}


def make_dpo_record(tag: str) -> dict:
    asked = summary(6.0, 6.25, 1.0) | {"success_rate": 36.0, "check_rate": 61.0}
    again = summary(6.5, 6.375, 1.25) | {"success_rate": 44.0, "check_rate": 63.0}
    return make_record(
        tag,
        "dpo_train.py",
        baseline={"tatqa": tatqa(40.0, 30.0, 41.5, 50.0), "mtbench": BEFORE, "instruct": asked},
        final={"tatqa": tatqa(55.0, 35.0, 47.5, 62.5), "mtbench": AFTER, "instruct": again},
        delta={"tatqa": delta(15.0, 5.0, 25.0, 0.00001, 20), "instruct": delta(0.5, 0.25, 0.75, 0.01, 25)},
    )


def write_log(path: Path, *records: dict) -> Path:
    for record in records:
        files.append_record(path, record)
    return path
