"""Records of the original scripts, turned into records here.

Two forms: {ts, tag, model, params, eval, mtbench, instruct, reddit?} with a baseline and a post side each, which may
be null; and {timestamp, model, method, tag, stages, config} of a run in stages, whose figures were never measured.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from commands import parse_strictly
from records import HERE, flatten, load_records, record_problem

from llm_alignment.files import InputError, SkippedRows, append_record, read_rows
from llm_alignment.runs import new_record as empty_record

IMPORTED = "imported_runs.jsonl"
OLD_KEYS = {"ts", "timestamp", "tag", "model", "params", "eval", "mtbench", "instruct", "reddit", "stages", "config"}
RENAMED = {"lora.targets": "target_modules"}
# section and key of an old record -> evaluation and key of a record here, on the scales of the published runs
FIGURES = {
    "eval acc": ("tatqa", "em_like"), "mtbench avg_score": ("mtbench", "avg_logged"),
    "instruct avg_score": ("instruct", "keyword_avg"), "instruct success_rate": ("instruct", "keyword_success"),
    "reddit avg_score": ("reddit", "avg_logged"),
}  # fmt: skip
MT_FIGURES = FIGURES | {  # the multi-task script's instructions are those of Finance-Instruct
    "instruct avg_score": ("finance_instruct", "avg_logged"),
    "instruct success_rate": ("finance_instruct", "success_logged"),
}
RANGES = {"acc": (0, 1), "avg_score": (1, 10), "success_rate": (0, 100)}


def import_records(path: Path) -> tuple[int, int]:
    """Appends the records of `path` to imported_runs.jsonl; how many, and how many were there already. Raises
    InputError when the file holds none."""
    if not path.is_file():
        raise InputError(f"--import {path}: no such file; name a JSONL file of the original scripts")
    skipped, found = SkippedRows(), []
    for place, old in read_rows(path, skipped):
        try:
            record = convert(old, place)
            problem = record_problem(record)
        except InputError as error:
            problem = str(error)
        if problem:
            skipped.add(place, problem)
        else:
            found.append(record)
    if not found:
        none = f"--import {path}: no record of the original scripts ({'; '.join(skipped.places) or 'it is empty'})"
        raise InputError(f"{none}; those have the keys ts, params and eval, or timestamp, stages and config")
    skipped.report(f"lines of {path}")
    target = HERE / IMPORTED
    known = [(record["ts"], record["argv"]) for record in (load_records(target) if target.is_file() else [])]
    there = len(known)
    for record in found:
        if (record["ts"], record["argv"]) not in known:
            append_record(target, record)
            known.append((record["ts"], record["argv"]))
    return len(known) - there, len(found) - len(known) + there


def convert(old: dict, place: str) -> dict:
    """A record here, from one of either form. Raises InputError when it is neither, or when its flags do not parse."""
    try:
        if old.keys() >= {"stages", "config"}:  # its figures were constants
            record = new_record(old, place, "dpo_train_mt_v2.py", old["config"])
            return record | {"measured": False, "stages": old["stages"]}
        if "params" in old and old.keys() & {"eval", "mtbench", "instruct", "reddit"}:
            return convert_run(old, place)
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(f"another form than that of the original scripts: {type(error).__name__} {error}") from error
    raise InputError("not a record of the original scripts")


def convert_run(old: dict, place: str) -> dict:
    """The form with a baseline and a post side."""
    is_mt = "reddit" in old or old["params"].get("reddit") is not None
    values = {RENAMED.get(key, key): value for key, value in flatten(old["params"]).items() if value is not None}
    if "use_4bit" in values:
        values["no_4bit"] = not values.pop("use_4bit")
    sides: dict[str, dict] = {"baseline": {}, "post": {}}
    for place_of, (evaluation, name) in (MT_FIGURES if is_mt else FIGURES).items():
        section, key = place_of.split()
        for side, measured in sides.items():
            part = (old.get(section) or {}).get(side) or {}
            if (value := part.get(key)) is not None:
                low, high = RANGES[key]
                if not low <= value <= high:
                    raise InputError(f"{section} {side} {key} {value} is not within {low}..{high}")
                measured.setdefault(evaluation, {"n": part.get("n")})[name] = 100 * value if key == "acc" else value
    record = new_record(old, place, "dpo_train_mt.py" if is_mt else "dpo_train.py", values)
    return record | {"baseline": sides["baseline"], "final": sides["post"]}


def new_record(old: dict, place: str, script: str, values: dict[str, Any]) -> dict:
    """A record without figures. What its script's parser does not know of `values` is kept as a note."""
    parser = importlib.import_module(Path(script).stem).build_parser()
    values = {"model": old.get("model"), **values, "exp_tag": old.get("tag") or values.get("exp_tag")}
    argv, unknown = flags(parser, values)
    unknown += [f"{key} {value}" for key, value in old.items() if key not in OLD_KEYS]
    record = empty_record(vars(parse_strictly(parser, argv)), argv, script)
    record |= {"ts": str(old.get("ts") or old["timestamp"]), "git": None, "versions": {}}
    record |= {"status": "completed", "imported": place}
    return record | ({"note": f"what {script} has no flag for: {', '.join(unknown)}"} if unknown else {})


def flags(parser: argparse.ArgumentParser, values: dict[str, Any]) -> tuple[list[str], list[str]]:
    """`values` as the parser's flags, and as "key value" what it has no flag for. A null is left out."""
    actions = {action.option_strings[0]: action for action in parser._actions if action.option_strings}
    argv, unknown = [], []
    for key, value in values.items():
        names = (f"--{name}" for name in (key, key.replace(".", "_"), key.rpartition(".")[2]))
        flag = next((name for name in names if name in actions), None)
        if value is None:
            continue
        if flag is None:
            unknown.append(f"{key} {value}")
        elif value is True:
            argv.append(flag)
        elif value is False:
            argv += [flag.replace("--", "--no-", 1)] * isinstance(actions[flag], argparse.BooleanOptionalAction)
        else:
            argv += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return argv, unknown
