"""The first lines of RESULTS.md: what a reader should take from the tables, in figures of the records themselves."""

from __future__ import annotations

from noise import Spread
from records import DEMO, Run
from tables import DPO, MULTI_TASK, SFT, Group, delta_rows

from llm_alignment.evaluation import METRICS
from llm_alignment.stats import holm


def summary(runs: list[Run], spreads: list[Spread]) -> str:
    """A list of sentences; what has no figures yet is left out."""
    logged, new = ([run for run in runs if run.is_logged == is_logged] for is_logged in (True, False))
    planned, invented = (
        sum(run.origin == f"logged, {what}" for run in logged) for what in ("no figures", "not measured")
    )
    lines = []
    if logged:
        lines.append(
            f"{len(logged)} published runs: {len(logged) - planned - invented} with figures, {planned} only planned, "
            f"{invented} with constants instead of measurements. They logged no answers, so no interval."
        )
        lines += [*sft_line(logged), *dpo_lines(logged, spreads)]
    lines += [*new_lines(new, published=bool(logged)), *anchor_lines(new), *holm_line(new)]
    return "\n".join(f"- {line}" for line in lines)


def spanned(values: list[float], decimals: int) -> str:
    return f"{min(values):+.{decimals}f} to {max(values):+.{decimals}f}"


def changes(runs: list[Run], group: Group, metric: str) -> list[Run]:
    return [run for run in group.of(runs) if metric in run.changes and run.measured]


def sft_line(logged: list[Run]) -> list[str]:
    learned, asked = changes(logged, SFT, "val_loss"), changes(logged, SFT, "mtbench")
    losses, scores = [run.changes["val_loss"] for run in learned], [run.changes["mtbench"] for run in asked]
    return [
        f"Published SFT: the validation loss changed by {spanned(losses, 2)} nats per token in {len(learned)} runs, "
        f"MT-Bench by {spanned(scores, 2)} on the published scale; it fell in {sum(x < 0 for x in scores)} of "
        f"{len(scores)}."
    ]


def dpo_lines(logged: list[Run], spreads: list[Spread]) -> list[str]:
    """What of the published DPO changes is larger than the noise of its protocol."""
    judged = {(run.name, spread.metric) for spread in spreads for run in spread.runs}
    lines = []
    for group in (DPO, MULTI_TASK):
        parts = []
        for metric, title in (("tatqa", "TAT-QA"), ("mtbench", "MT-Bench")):
            found = changes(logged, group, metric)
            known = [run for run in found if (run.name, metric) in judged]
            clear = sum(metric not in run.in_noise for run in known)
            beyond = f"{clear} of {len(known)} beyond twice the noise" if known else "its noise is not known"
            parts.append(f"{title} {spanned([run.changes[metric] for run in found], 2)} ({beyond})")
        lines.append(f"Published {group.title}: {', '.join(parts)}.")
    return lines


def new_lines(new: list[Run], *, published: bool) -> list[str]:
    """On which models this code has run; beside the published runs also what that leaves open."""
    real = sorted({run.model.rpartition("/")[2] for run in new if run.model != DEMO})
    demo = sum(len(run.members or [run]) for run in new if run.model == DEMO)
    lines = [f"Runs of this code: {demo} on the demo's miniature, and on {', '.join(real) or 'no real model'}."]
    on_gpu = any("cpu" not in str((run.source.get("device") or {}).get("name", "cpu")) for run in new)
    if published and not (on_gpu and any("Qwen3-1.7B" in name for name in real)):
        lines.append("**No recipe has run on a GPU or on Qwen3-1.7B with this code yet.**")
    if demo:
        lines.append(
            "The demo shows that the code works. Its base was trained for it, its rates and its anchor are many times "
            "those of the recipes: it says nothing about what a recipe gives."
        )
    return lines


def anchor_lines(new: list[Run]) -> list[str]:
    """The runs with an anchor beside those that differ from them in the anchor alone."""
    lines = []
    for run in SFT.of(new):
        for other in SFT.of(new):
            same = {key for key in run.params if run.params[key] == other.params.get(key)}
            others = run.params.keys() - same - {"output_dir", "exp_tag", "seed"}
            if others == {"kl_coef"} and other.params["kl_coef"] == 0:
                parts = []
                for key in ("val_loss", "drift", "own_drift", "retention", "mtbench"):
                    pair = [side.delta.get(key) for side in (run, other)]
                    if all(delta and delta["low"] is not None for delta in pair):
                        shown = [f"{d['mean']:+.3f} [{d['low']:.3f}, {d['high']:.3f}]" for d in pair if d]
                        parts.append(f"{METRICS[key].title} {shown[0]} against {shown[1]}")
                lines.append(f"{run.name} against {other.name}, no anchor: {'; '.join(parts)}.")
    return lines


def holm_line(new: list[Run]) -> list[str]:
    p_values = [row.delta["p"] for run in new for row in delta_rows(run) if row.delta and row.delta["p"] is not None]
    below, kept = sum(p < 0.05 for p in p_values), sum(p < 0.05 for p in holm(p_values))
    seeds = [len(run.members) for run in new if run.members]
    lines = [f"Of {len(p_values)} p values {below} are below 0.05, and {kept} after Holm's correction."] * bool(
        p_values
    )
    if seeds:
        from scipy.stats import chi2

        low, high = (((min(seeds) - 1) / chi2.ppf(q, min(seeds) - 1)) ** 0.5 for q in (0.975, 0.025))
        lines.append(
            f"A standard deviation over {min(seeds)} seeds is uncertain: the true one lies between {low:.2f} and "
            f"{high:.1f} times it (95 %)."
        )
    return lines
