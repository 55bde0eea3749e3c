"""Progressive DPO: general pairs, then Finance-Instruct, then Reddit with Finance-Instruct.

    L = -log sigmoid(beta * (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

Each stage continues from the policy that the previous one ended with, and that policy is its reference. The adapter's
rank grows (8, 12, 16): the new dimensions have no effect at first, so the larger adapter computes exactly what the
smaller one did. All four domains are measured after every stage and compared with the stage before. A stage that
misses its gate ends the run. (The published progressive figures were constants, the same at every stage, and not
measurements.)

    poetry run python dpo_train_mt_v2.py --progressive --output_dir qwen3_3stage_progressive_experiment
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment import evaluation, files, flags
from llm_alignment.card import write_card
from llm_alignment.encoder import own_tokens
from llm_alignment.endings import MissedGateError
from llm_alignment.evaluation import METRICS, Evaluation, asked_gates, judge_gates
from llm_alignment.files import InputError, log
from llm_alignment.flags import Parser, add_group, fill, neutral_flags
from llm_alignment.hub import adapter_files_sha256
from llm_alignment.processes import main_process, on_main_process
from llm_alignment.prompts import PromptStyle
from llm_alignment.results import read_results
from llm_alignment.retention import with_own_drift
from llm_alignment.runs import begin, recorded_run, timed
from mtbench_eval import load_questions, sample_questions

if TYPE_CHECKING:
    from llm_alignment.training import Setup

OWN = {  # what a stage has of its own: type, the values of the published runs, help
    "epochs": (float, (0.25, 0.75, 1.0), "passes over its pairs"),
    "beta": (float, (0.01, 0.018, 0.025), "pull towards the stage before; lower it if the stage changes too little"),
    "learning_rate": (float, (2e-6, 3.5e-6, 4e-6), "raise it if the stage changes too little, lower it if another "
                      "domain falls"),
    "lora_r": (int, (8, 12, 16), "size of the adapter, not below the stage before"),
    "lora_alpha": (int, (16, 24, 32), "strength of the adapter; its scale is alpha / rank"),
}  # fmt: skip
DEMO = {name: value for name, value in flags.FINANCE_DEMO.items() if name not in {*OWN, "general_pairs"}} | dict(
    output_dir="demo_progressive", force_continue=True, stage1_general_pairs=400, stage1_epochs=1.0, stage2_epochs=1.0,
    stage1_beta=0.1, stage2_beta=0.1, stage3_beta=0.1, stage1_learning_rate=1e-3, stage2_learning_rate=1e-3,
    stage3_learning_rate=5e-4,
)  # fmt: skip
SOURCES = {1: {"general"}, 2: {"finance"}, 3: {"reddit", "finance"}}
# The smallest change of each domain with which a stage passes: points of the 1-10 scale, for TAT-QA percentage points
# (-1.0 is -0.01 as a share of the questions).
GATES = {
    1: {"mtbench": 0.01},
    2: {"mtbench": -0.02, "finance_instruct": 0.05},
    3: {"tatqa": -1.0, "mtbench": -0.01, "finance_instruct": -0.01, "reddit": -0.01},
}


# fmt: off
def build_parser() -> Parser:
    """The command line. Defaults are those of the published runs where they had one."""
    parser = Parser("dpo_train_mt_v2.py", __doc__, "demo model output_dir stage resume_from_stage force_continue "
        "batch grad_acc stage1_learning_rate stage2_learning_rate stage3_learning_rate stage3_lora_r dry_run "
        "resume_from_checkpoint")
    flags.add_dpo_flags(parser, in_stages=True)
    flags.add_tatqa_flags(parser, only_measured=True)
    flags.add_data_flags(parser)
    add = add_group(parser, "stages", trains=False)
    add("--progressive", action="store_true", help="train in stages, which this script always does")
    add("--stage", type=int, choices=[0, 1, 2, 3], default=0, help="run this stage alone; 0 = all")
    add("--resume_from_stage", type=int, choices=[1, 2, 3], help="run this and the later stages again from scratch")
    add("--force_continue", action=flags.ON_OFF, default=False, help="continue after a missed gate")
    for stage, sources in SOURCES.items():
        # a stage's run.json has them without the prefix, and there they count
        add = add_group(parser, f"stage {stage}: {' and '.join(sorted(sources))} pairs", trains=False)
        for name, (kind, published, text) in OWN.items():
            add(f"--stage{stage}_{name}", type=flags.positive(kind), default=published[stage - 1], help=text)
        if stage == 1:
            add("--stage1_general_pairs", type=flags.positive(int), default=800, help="most pairs")
    parser.set_defaults(
        output_dir="qwen3_progressive_dpo", exp_log="experiments/dpo_experiments_3stage.jsonl", batch=1, grad_acc=64,
        finance_instruct_pairs=1600, hybrid_ratio=0.6, reddit_sample_rate=0.25, eval_limit=250, instruct_limit=50,
    )
    return parser


# fmt: on
def check_stage_flags(args: argparse.Namespace, stages: list[int]) -> None:
    """Raises InputError for flags that do not go together."""
    flags.check_dpo_flags(args, in_stages=True)
    if args.stage and args.resume_from_stage:
        raise InputError("--stage runs one stage alone, --resume_from_stage all from one on; give one of them")
    if not args.stage1_lora_r <= args.stage2_lora_r <= args.stage3_lora_r:
        raise InputError("--stage1_lora_r, --stage2_lora_r, --stage3_lora_r: an adapter can only grow")
    flag_of = {"mtbench": "do_mtbench", "finance_instruct": "do_instruct", "tatqa": "do_eval", "reddit": "do_reddit"}
    judged = {name for stage in stages for name in GATES[stage]}
    needed = [flag for name, flag in flag_of.items() if name in judged] + ["eval_baseline"] * (1 in stages)
    missing = [flag for flag in needed if not getattr(args, flag)]
    if missing and not args.force_continue:
        raise InputError(f"--no-{missing[0]}: the gates are judged by it; leave it on, or add --force_continue")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, and what it is trained with."""

    number: int
    folder: Path
    before: Path  # the folder of the stage before
    args: dict[str, Any]  # under the names that the other scripts use
    flags: dict[str, Any]  # those of them that its adapter depends on
    judged: dict[str, Any]  # those that its adapter or its measurement depends on


def stage_of(args: argparse.Namespace, number: int) -> Stage:
    """The stage of this number as the flags ask for it."""
    folder, before = (Path(args.output_dir) / f"stage{place}" for place in (number, number - 1))
    own = {name: getattr(args, f"stage{number}_{name}") for name in OWN}
    values = {**vars(args), **own, "output_dir": str(folder)}

    def counted(*words: str) -> dict[str, Any]:
        neutral = neutral_flags(build_parser(), *words, *SOURCES[number])
        return {name: value for name, value in values.items() if name not in neutral or name in OWN}

    return Stage(number, folder, before, values, counted("asked"), counted("asked", "measured"))


def stage_fingerprint(stage: Stage, pairs: list[dict]) -> dict:
    """What a stage is trained on: its pairs, and the adapter of the stage before, which must have ended."""
    adapter = adapter_files_sha256(stage.before) if stage.number > 1 else None
    return {"pairs": len(pairs), "sha256": files.digest(pairs), "previous_adapter": adapter}


def other_stage(stage: Stage) -> InputError:
    here, last = stage.number, stage.number - 1
    return InputError(
        f"{stage.folder}: stage {here} was trained from another stage {last} than the one that is here; "
        f"--resume_from_stage {last} runs both again from scratch, --resume_from_stage {here} this one"
    )


def remove_folder(folder: Path) -> None:
    """Removes a folder; after a kill it is there as a whole or not at all."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        files.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def finished_stage(stage: Stage, setup: Setup, *, force_continue: bool) -> dict:
    """The record of a stage that ended earlier. Raises InputError when it did not end, when a file of it is damaged,
    when it had other flags, or when it missed its gate, unless `force_continue`."""
    from llm_alignment.training import check_same_run, checkpoint_problem

    folder, number = stage.folder, stage.number
    if problem := checkpoint_problem(folder):
        again = f"--resume_from_stage {number} runs it again from scratch"
        raise InputError(f"{folder}: stage {number} cannot be built on, {problem}; {again}")
    check_same_run(folder, stage.judged, setup.base)
    built_on = json.loads((folder / "run.json").read_text("utf-8"))["data"].get("previous_adapter")
    if number > 1 and built_on != adapter_files_sha256(stage.before):
        raise other_stage(stage)
    record = json.loads((folder / "stage.json").read_text("utf-8"))
    if record["gate"] and not force_continue:
        raise InputError(f"{folder}: stage {number} missed its gate ({record['gate']}); --force_continue continues")
    return record


def check_measured_alike(folder: Path, evaluations: list[Evaluation]) -> None:
    """Raises InputError when the stage in `folder` was measured on other questions or settings than these."""
    for task in evaluations:
        path = folder / f"{task.name}_final.jsonl"
        now = json.loads(json.dumps(task.settings))
        measured = read_results(path, files.SkippedRows())[0] if path.exists() else now
        if other := files.differing({name: measured.get(name) for name in now}, now):
            what = f"other {METRICS[task.name].title} questions or settings ({other}), so it cannot be compared"
            raise InputError(f"{folder}: it was measured on {what}; measure both in the same way")


def run_stage(
    stage: Stage, setup: Setup, rows: list[dict], evaluations: list[Evaluation], checkpoint: Path | None, about: dict
) -> dict:
    """Trains a stage in its folder, measures it against the stage before, or the base, and returns its record: with
    "gate", by how much it misses its gate, "" when it passes. `setup` is the stage's own, `rows` its pairs of
    `fit_pairs`; `about` goes into its run.json. The manifest is written last, so that later stages can rely on it."""
    from llm_alignment import adapters, dpo, models, training

    folder, settings = stage.folder, fill(training.TrainingSettings, stage.args)
    dpo_settings = fill(dpo.DpoSettings, stage.args)
    log.info("stage %d: %d pairs, rank %d, beta %g", stage.number, len(rows), setup.lora.lora_r, dpo_settings.beta)
    model = models.load_model(setup.base)
    models.check_head(model, setup.base.what)
    if stage.number > 1:
        model = adapters.grown_adapter(model, stage.before, setup.lora, settings.seed)
    trainer = dpo.build_trainer(model, setup, rows, settings, dpo_settings)
    if main_process():
        folder.mkdir(exist_ok=True)
        files.remove_left_over(folder)
        if not (folder / "run.json").exists():
            files.write_json(folder / "run.json", {"args": stage.args, **about})
    entry: dict = {"stage": stage.number, "pairs": len(rows)}
    entry |= {key: {} for key in ("baseline", "final", "delta", "runtime_s")}
    fingerprint = models.base_fingerprint(setup.base, thinking=stage.args["thinking"])
    of_base: dict[str, Any] = {"fingerprint": fingerprint, "use_cache": not stage.args["no_baseline_cache"]}
    measured: Any = functools.partial(evaluation.measure, trainer.model, setup.tokenizer, **of_base)
    if stage.args["eval_baseline"]:  # what a later stage finds is not read again
        with timed(entry, "baseline"):
            measured(evaluations, (folder.parent, "baseline"), with_adapter=False)
    before = on_main_process(lambda: evaluation.stored_rows(folder.parent, "baseline", evaluations))
    evaluations = with_own_drift(evaluations, before, setup.tokenizer, thinking=stage.args["thinking"])
    with timed(entry, "train"):
        dpo.train(trainer, checkpoint, folder, **of_base)
    with timed(entry, "final"):
        after = measured(evaluations, (folder, "final"), with_adapter=True)
    entry["kept_step"] = trainer.state.global_step
    if main_process():
        before = evaluation.stored_rows(stage.before, "final", evaluations) if stage.number > 1 else before
        evaluation.report({**entry, "args": stage.args}, folder, evaluations, before, after)
        entry["gate"] = "; ".join(
            f"{METRICS[name].title} {mean:+.3f} where {least:+.2f} is the least, {least - mean:.3f} short"
            for name, least in GATES[stage.number].items()
            if (mean := entry["delta"].get(name, {"mean": least})["mean"]) < least
        )
        files.write_json(folder / "stage.json", entry)
        training.write_manifest(folder)
    return on_main_process(lambda: entry)


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2), a missed gate in SystemExit(1)."""
    return recorded_run(run, flags.parse_arguments(build_parser(), argv, DEMO), argv, "dpo_train_mt_v2.py")


def run(args: argparse.Namespace, record: dict) -> None:
    """Stage after stage. What can be wrong with the input is found before anything is written."""
    from llm_alignment import adapters, dpo, plans, training

    stages = [stage_of(args, number) for number in stages_to_run(args)]
    check_stage_flags(args, [stage.number for stage in stages])
    first = stages[0]
    setup = training.set_up(args, record, set(), longest=args.max_length, lora=fill(adapters.LoraSettings, first.args))
    done = functools.partial(finished_stage, setup=setup, force_continue=args.force_continue)
    record["stages"] = [done(stage_of(args, number)) for number in range(1, first.number)]
    # With both flags, a run that did stages again was interrupted, and that one is resumed.
    from_scratch = bool(args.resume_from_stage) and not args.resume_from_checkpoint
    setups = {}
    for stage in stages:
        lora = fill(adapters.LoraSettings, stage.args)
        setups[stage.number] = dataclasses.replace(setup, lora=lora, folder=stage.folder, flags=stage.flags)
        if not from_scratch:
            setups[stage.number].check_folder()
            if stage is not first and stage.folder.exists():
                raise other_stage(stage)
    pairs, evaluations, data = pairs_and_evaluations(args, record, setup, stages)
    gates = asked_gates(args.gates, evaluations)
    check_measured_alike(first.before, evaluations)
    chat = fill(PromptStyle, args, use_chat_template=True, system=args.system_prompt)
    fit = functools.partial(dpo.fit_pairs, tokenizer=setup.tokenizer, style=chat, max_length=args.max_length)
    if args.dry_run:
        plans.log_gates(gates, Path(args.exp_log), args.model)
        for stage in stages:
            log.info("stage %d: %s pairs", stage.number, " and ".join(sorted(SOURCES[stage.number])))
            rows, settings = fit(pairs[stage.number]), fill(training.TrainingSettings, stage.args)
            plans.print_dpo_plan(setups[stage.number], rows, evaluations, settings, fill(dpo.DpoSettings, stage.args))
        return
    checkpoint = None
    if not from_scratch:
        setups[first.number].check_folder(stage_fingerprint(first, pairs[first.number]))
        checkpoint = training.newest_complete(first.folder, setup.resume)
    begin(record, data, setup.base)
    if from_scratch and main_process():
        for stage in reversed(stages):  # a kill in between leaves no stage whose basis is gone
            remove_folder(stage.folder)
    for stage in stages:
        if args.resume_from_checkpoint and training.checkpoint_problem(stage.folder) is None:
            entry = done(stage)
        else:
            about = {key: record[key] for key in ("script", "argv", "device", "base", "commits")}
            about["data"] = stage_fingerprint(stage, pairs[stage.number])
            entry = run_stage(stage, setups[stage.number], fit(pairs[stage.number]), evaluations, checkpoint, about)
        checkpoint = None
        record["stages"].append(entry)
        record["runtime_s"][f"stage{stage.number}"] = sum(entry["runtime_s"].values())
        record["kept_step"] = entry["kept_step"]
        if stage is stages[-1] and main_process():
            finish(record, setups[stage.number], evaluations)
            judge_gates(record, gates)
        check_gate(entry, force_continue=args.force_continue)


def check_gate(entry: dict, *, force_continue: bool) -> None:
    """Raises MissedGateError when a stage missed its gate, unless `force_continue`."""
    stage, gate = entry["stage"], entry["gate"]
    if gate and force_continue:
        log.warning("stage %d missed its gate: %s; continuing because of --force_continue", stage, gate)
    elif gate:
        advice = f"; --resume_from_stage {stage + 1} --force_continue continues" if stage < 3 else ""
        raise MissedGateError(f"stage {stage} missed its gate: {gate}{advice}")


def stages_to_run(args: argparse.Namespace) -> list[int]:
    """The stages that the flags ask for; with --resume_from_checkpoint auto, those that have not ended."""
    from llm_alignment.training import checkpoint_problem

    if args.stage:
        return [args.stage]
    first = args.resume_from_stage or 1
    if args.resume_from_checkpoint:
        while first < 3 and checkpoint_problem(Path(args.output_dir) / f"stage{first}") is None:
            first += 1
    return list(range(first, 4))


def pairs_and_evaluations(
    args: argparse.Namespace, record: dict, setup: Setup, stages: list[Stage]
) -> tuple[dict[int, list[dict]], list[Evaluation], dict]:
    """(training pairs by stage, what is measured, fingerprint of the data)."""
    from llm_alignment import dpo_run, finance

    sources = set().union(*(SOURCES[stage.number] for stage in stages))
    mtbench = load_questions(args.mtbench_file, flag="--mtbench_file") if args.do_mtbench else []
    measuring, settings = fill(dpo_run.MeasuringSettings, args), fill(finance.DataSettings, args)
    data = finance.load_data(settings, sources, *measuring.forbidden(mtbench), own_tokens(setup.tokenizer))
    asked = {"mtbench": sample_questions(mtbench, args.mtbench_limit), **data.questions}
    evaluations = dpo_run.dpo_evaluations(setup.tokenizer, measuring, asked)
    answered: list[dict] = []  # the base answers the Finance-Instruct prompts once, for both their stages
    if "finance" in sources:
        with timed(record, "finance answers"):
            answered = finance.finance_pairs(setup, data.items["finance"], args.finance_instruct_pairs, settings)
    reddit = Fraction(str(args.hybrid_ratio))
    shares, limits = {"reddit": reddit, "finance": 1 - reddit}, {"finance": len(answered)}
    pairs: dict[int, list[dict]] = {}
    for number in [stage.number for stage in stages]:
        found = data.items["general"][: args.stage1_general_pairs] if number == 1 else answered
        if number == 3:
            found = finance.mixed_pairs(data, shares, limits, args.mix_policy, lambda _, most: answered[:most])
        pairs[number] = files.sample(found, args.limit_pairs or len(found), args.seed)
        if not found:
            advice = "name a larger data set, or raise --instruct_max_tokens if the base's answers were cut"
            raise InputError(f"stage {number}: no training pair is left; {advice}")
    return pairs, evaluations, finance.data_fingerprint(data, [pair for each in pairs.values() for pair in each])


def finish(record: dict, setup: Setup, evaluations: list[Evaluation]) -> None:
    """Copies the adapter of `setup`, the last stage's, into the run's folder; reports it against the base, and every
    domain by stage."""
    last, folder = setup.folder, setup.folder.parent
    for path in [*last.glob("adapter_*"), *last.glob("*token*"), *last.glob("chat_template*")]:
        files.write_atomic(folder / path.name, path.read_bytes())
    before = evaluation.stored_rows(folder, "baseline", evaluations)
    evaluations = with_own_drift(evaluations, before, setup.tokenizer, thinking=record["args"]["thinking"])
    after = evaluation.stored_rows(last, "final", evaluations)
    evaluation.report(record, folder, evaluations, before, after)
    evaluation.save_answers(record["args"]["eval_save_json"], before, after)
    write_card(folder)
    table = []
    for task, entry in itertools.product(evaluations, record["stages"]):
        metric, title = METRICS[task.name], f"{entry['stage']}: {METRICS[task.name].title}"
        figures = metric.read(entry["baseline"]), metric.read(entry["final"]), entry["delta"].get(task.name)
        table.append(evaluation.TableRow(title, *figures, metric.lower_is_better))
    evaluation.print_table(f"{folder}, by stage, each against the one before", table)


if __name__ == "__main__":
    main()
