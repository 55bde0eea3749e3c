"""A finished run's folder: its flags, and its base and adapter loaded again."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.adapters import check_model, load_adapter
from llm_alignment.files import InputError, parse_json
from llm_alignment.flags import fill
from llm_alignment.models import Base, BaseFlags, load_model, load_tokenizer, resolve_base

if TYPE_CHECKING:
    from types import ModuleType

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

TRAINED = ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    folder: Path
    script: ModuleType
    args: argparse.Namespace  # the run's own, data at its commits; flags newer than the run have their defaults
    base: Base  # at the commit of the run
    tokenizer: PreTrainedTokenizerBase

    def load(self) -> PeftModel:
        """Base and adapter."""
        return load_adapter(load_model(self.base), str(self.folder))


def finished_run(folder: Path) -> FinishedRun:
    """The run in `folder`. Raises InputError unless it was trained and measured to its end, and its files fit."""
    try:
        run = parse_json((folder / "run.json").read_bytes())
        name, commits = run["script"].removesuffix(".py"), run.get("commits") or {}
        if name not in TRAINED or not parse_json((folder / "metrics.json").read_bytes())["final"]:
            raise ValueError("nothing was measured after training")
        script = importlib.import_module(name)
        data = {
            flag: f"{run['args'][flag].partition('@')[0]}@{commits[flag]}" for flag in commits if "dataset" in flag
        }
        parser = script.build_parser()
        parser.set_defaults(**run["args"] | data | {"report_to": "none"})  # a tracker may not be installed here
        args = parser.parse_args([])
        revision = commits.get("model") or args.model_revision
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{Path(error.filename).name} is not there" if isinstance(error, FileNotFoundError) else repr(error)
        advice = "name the output folder of a training run that ended, or end it by --resume_from_checkpoint auto"
        raise InputError(f"{folder}: no finished run ({reason}); {advice}") from error
    base = resolve_base(dataclasses.replace(fill(BaseFlags, args), model_revision=revision))
    tokenizer = load_tokenizer(base)
    check_model(base, tokenizer, adapter=str(folder))
    return FinishedRun(folder, script, args, base, tokenizer)
