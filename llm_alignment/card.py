"""The model card of a finished run."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from llm_alignment.evaluation import SCORED, pair_rows, table_rows, table_texts
from llm_alignment.files import SkippedRows, parse_json, write_atomic
from llm_alignment.results import read_results

TEMPLATE = Path(__file__).parent / "data" / "card.md.jinja"
LONGEST = 600  # characters of an answer that is shown


def write_card(run_folder: Path, merged: Path | None = None, scale: float = 1.0) -> None:
    """Writes README.md into the folder of a run that was measured, or of the model, `merged` at `scale`: base, data,
    command, the headline figures, two answers before and after, and how to load it."""
    from jinja2 import Environment

    run, metrics = (parse_json((run_folder / name).read_bytes()) for name in ("run.json", "metrics.json"))
    args, data, folder = run["args"], run["data"], merged or run_folder
    counts = data.get("rows") or {"pairs": data["pairs"]}  # of a stage alone
    mixed = [args[f"{source}_dataset"] for source in ("reddit", "finance", "general") if source in counts]
    sources = [data["source"]] if "source" in data else mixed
    rows = table_rows(metrics["baseline"], metrics["final"], metrics["delta"], "headline")
    rows = [row for row in rows if not row.title.startswith(" ")]  # without the parts of a metric
    environment = Environment(keep_trailing_newline=True)
    environment.filters["quoted"] = lambda text: "\n> ".join(text.splitlines())
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        name=folder.name, merged=merged is not None, scale=scale, thinking=args["thinking"],
        base=shown(args["model"]), is_local=shown(args["model"]) != args["model"],
        commit=(run.get("commits") or {}).get("model"), method="SFT" if run["script"] == "sft_train.py" else "DPO",
        sources=[shown(name) for name in sources], rows=", ".join(f"{count} {kind}" for kind, count in counts.items()),
        datasets=[name for name in sources if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()],
        command=shlex.join(["python", run["script"], *run["argv"]]), has_plot=(folder / "loss.png").exists(),
        table=[(cells + ["-"] * 3)[:6] for cells in table_texts(rows)[0]], samples=changed_answers(run_folder)[:2],
    )  # fmt: skip
    write_atomic(folder / "README.md", text)


def shown(name: str) -> str:
    """A name of the hub as it is; of a file or folder its name alone, of a link the link's."""
    path = Path(name)
    return Path(os.path.abspath(path)).name if path.exists() or path.is_absolute() else name


def changed_answers(folder: Path) -> list[dict[str, str]]:
    """The first questions of a run that are answered otherwise after training, with both answers."""
    for name in (*SCORED, "retention"):
        before = folder / f"{name}_baseline.jsonl"
        after = max(folder.glob(f"stage?/{name}_final.jsonl"), default=folder / f"{name}_final.jsonl")
        if before.exists() and after.exists():
            pairs = pair_rows(*(read_results(path, SkippedRows())[1].values() for path in (before, after)))
            texts = [(new["turns"][0], old["answers"][0], new["answers"][0]) for old, new in pairs]
            changed = [[text[:LONGEST] for text in each] for each in texts if each[1] != each[2]]
            return [dict(zip(("question", "before", "after"), each, strict=True)) for each in changed]
    return []
