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
    "campaign", "chat", "commands", "compare", "export", "frontier", "mine_pairs", "noise",
    "old_records", "plots", "records", "rerun", "report", "seeds", "tables",
)  # fmt: skip
(
    campaign, chat, commands, compare, export, frontier, mine_pairs, noise,
    old_records, plots, records, rerun, report, seeds, tables,
) = map(importlib.import_module, MODULES)  # fmt: skip


def summary(avg: float, avg_logged: float, raw: float) -> dict:
    categories = {"writing": avg - 0.5, "math": avg + 0.25, "roleplay": avg + 0.25}
    return {
        "avg": avg,
        "avg_logged": avg_logged,
        "raw_mean": raw,
        "by_turn": [avg + 0.1, avg - 0.1],
        "by_category": categories,
        "n": 12,
        "answer_tokens": 51.5,
        "unfinished": 0.0,
    }


def delta(mean: float, low: float, high: float, p: float, n: int = 12) -> dict:
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "p": p,
        "n": n,
        "changed": n,
        "clusters": None,
        "changed_clusters": None,
    }


def make_record(tag: str, script: str = "sft_train.py", **changes) -> dict:
    record = {
        "ts": "2025-01-02T03:04:05Z",
        "tag": tag,
        "script": script,
        "argv": ["--demo", "--exp_tag", tag],
        "args": {
            "demo": False,
            "model": "Qwen/Qwen3-1.7B",
            "subset": "both",
            "sample_ratio": 0.25,
            "kl_coef": 0.03,
            "kl_start_step": 200,
            "kl_warmup_steps": 300,
            "kl_limit_seq": 128,
            "seed": 42,
        },
        "git": "0123456789ab",
        "versions": {"torch": "2.13.0"},
        "device": {"name": "cpu", "dtype": "float32", "processes": 1, "threads": 2},
        "data": {"rows": {"tatqa_pairs": 1234, "skipped": 0}},
        "baseline": {
            "val_loss": 1.61,
            "val_loss_row_mean": 1.50123456,
            "ppl": 5.0028,
            "mtbench": summary(5.5, 2.0625, 0.25),
        },
        "final": {
            "val_loss": 1.36,
            "val_loss_row_mean": 1.2504321,
            "ppl": 3.896,
            "mtbench": summary(5.75, 2.375, 0.4),
        },
        "delta": {
            "val_loss": delta(-0.25, -0.3, -0.2, 0.0002),
            "val_loss_row_mean": delta(-0.25080246, -0.3, -0.2, 0.0002),
            "mtbench": delta(0.25, -0.125, 0.625, 0.21),
            "mtbench_raw": delta(0.15, 0.0625, 0.3, 0.03),
        },
        "runtime_s": {"baseline": 10.0, "train": 60.0, "final": 10.0, "total": 84.0},
        "kept_step": None,
        "status": "completed",
        "output_dir": f"no_such_folder_{tag}",
    }
    return record | changes


TATQA_TYPES = {"span": {"em_like": 50.0, "em": 45.0, "f1": 52.0, "n": 10}}


def make_dpo_record(tag: str) -> dict:
    return make_record(
        tag,
        "dpo_train.py",
        baseline={
            "tatqa": {"em_like": 40.0, "em": 30.0, "f1": 41.5, "by_type": TATQA_TYPES, "n": 20},
            "mtbench": summary(5.5, 2.0625, 0.25),
            "instruct": summary(6.0, 6.25, 1.0) | {"success_rate": 36.0, "check_rate": 61.0},
        },
        final={
            "tatqa": {
                "em_like": 55.0,
                "em": 35.0,
                "f1": 47.5,
                "by_type": {"span": TATQA_TYPES["span"] | {"em_like": 62.5}},
                "n": 20,
            },
            "mtbench": summary(5.75, 2.375, 0.4),
            "instruct": summary(6.5, 6.375, 1.25) | {"success_rate": 44.0, "check_rate": 63.0},
        },
        delta={"tatqa": delta(15.0, 5.0, 25.0, 0.00001, 20), "instruct": delta(0.5, 0.25, 0.75, 0.01, 25)},
    )


def write_log(path: Path, *records: dict) -> Path:
    for record in records:
        files.append_record(path, record)
    return path
