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
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment.dpo import build_trainer, check_common_flags, fit_chats, print_plan, train
from llm_alignment.endings import MissedGateError
from llm_alignment.evaluation import (
    METRICS,
    Evaluation,
    TableRow,
    measure,
    print_table,
    report,
    save_answers,
    stored_rows,
)
from llm_alignment.files import (
    InputError,
    digest,
    file_sha256,
    remove_left_over,
    replace,
    sample,
    write_atomic,
    write_json,
)
from llm_alignment.finance import (
    TrainingData,
    data_fingerprint,
    finance_pairs,
    finance_questions,
    load_data,
    mixed_pairs,
    two_way_shares,
)
from llm_alignment.flags import (
    FINANCE_DEMO,
    ON_OFF,
    Parser,
    add_data_flags,
    add_dpo_flags,
    add_group,
    add_tatqa_flags,
    neutral_flags,
    parse_arguments,
    positive,
)
from llm_alignment.models import (
    check_head,
    check_model,
    load_model,
    load_tokenizer,
    main_process,
    new_adapter,
    on_main_process,
)
from llm_alignment.runs import begin, recorded_run, timed
from llm_alignment.training import (
    check_output_folder,
    check_same_run,
    checkpoint_problem,
    newest_complete,
    write_manifest,
)
from mtbench_eval import all_mtbench_questions, dpo_evaluations

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("llm_alignment")

# ---------------------------------------------------------------------------------------------------------------------
# Arguments

DEMO = {
    **{name: FINANCE_DEMO[name] for name in FINANCE_DEMO.keys() - {"beta", "learning_rate", "general_pairs"}},
    "output_dir": "demo_progressive",
    "force_continue": True,
    "stage1_epochs": 1.0,
    "stage1_beta": 0.1,
    "stage1_learning_rate": 1e-3,
    "stage1_general_pairs": 400,
    "stage2_epochs": 1.0,
    "stage2_beta": 0.1,
    "stage2_learning_rate": 1e-3,
    "stage3_beta": 0.1,
    "stage3_learning_rate": 5e-4,
}
SOURCES = {1: {"general"}, 2: {"finance"}, 3: {"reddit", "finance"}}
# The smallest change of each domain with which a stage passes: points of the 1-10 scale, for TAT-QA percentage points
# (-1.0 is -0.01 as a share of the questions).
GATES = {
    1: {"mtbench": 0.01},
    2: {"finance_instruct": 0.05, "mtbench": -0.02},
    3: {"tatqa": -1.0, "mtbench": -0.01, "finance_instruct": -0.01, "reddit": -0.01},
}


# fmt: off
def build_parser() -> Parser:
    """The command line. Defaults are those of the published runs where they had one."""
    shown = (
        "demo model output_dir stage resume_from_stage force_continue batch grad_acc stage1_learning_rate "
        "stage2_learning_rate stage3_learning_rate stage3_lora_r dry_run resume_from_checkpoint"
    )
    parser = Parser("dpo_train_mt_v2.py", __doc__, shown)
    add_dpo_flags(parser, in_stages=True)
    add_tatqa_flags(parser, only_measured=True)
    add_data_flags(parser)
    add = add_group(parser, "stages", trains=False)
    add("--progressive", action="store_true", help="train in stages, which this script always does")
    add("--stage", type=int, choices=[0, 1, 2, 3], default=0, help="run this stage alone; 0 = all")
    add("--resume_from_stage", type=int, choices=[1, 2, 3], help="run this and the later stages again from scratch")
    add("--force_continue", action=ON_OFF, default=False, help="continue after a missed gate")
    published = {1: (0.25, 0.01, 2e-6, 8, 16), 2: (0.75, 0.018, 3.5e-6, 12, 24), 3: (1.0, 0.025, 4e-6, 16, 32)}
    for stage, (epochs, beta, learning_rate, lora_r, lora_alpha) in published.items():
        # a stage's run.json has them without the prefix, and there they count
        add = add_group(parser, f"stage {stage}: {' and '.join(sorted(SOURCES[stage]))} pairs", trains=False)
        add(f"--stage{stage}_epochs", type=positive(float), default=epochs, help="passes over its pairs")
        add(f"--stage{stage}_beta", type=positive(float), default=beta,
            help="pull towards the stage before; lower it if the stage changes too little")
        add(f"--stage{stage}_learning_rate", type=positive(float), default=learning_rate,
            help="raise it if the stage changes too little, lower it if another domain falls")
        add(f"--stage{stage}_lora_r", type=positive(int), default=lora_r,
            help="size of the adapter, not below the stage before")
        add(f"--stage{stage}_lora_alpha", type=positive(int), default=lora_alpha, help="its scale is alpha / rank")
        if stage == 1:
            add("--stage1_general_pairs", type=positive(int), default=800, help="most pairs")
    parser.set_defaults(
        output_dir="qwen3_progressive_dpo", exp_log="experiments/dpo_experiments_3stage.jsonl", batch=1, grad_acc=64,
        finance_instruct_pairs=1600, hybrid_ratio=0.6, reddit_sample_rate=0.25, eval_limit=250, instruct_limit=50,
    )
    return parser


# fmt: on
def check_stage_flags(args: argparse.Namespace, stages: list[int]) -> None:
    """Raises InputError for flags that do not go together."""
    check_common_flags(args)
    if args.stage and args.resume_from_stage:
        raise InputError(
            "--stage and --resume_from_stage: the one runs a stage alone, the other all from it; give one"
        )
    if not args.stage1_lora_r <= args.stage2_lora_r <= args.stage3_lora_r:
        raise InputError("--stage1_lora_r, --stage2_lora_r, --stage3_lora_r: an adapter can only grow")
    judged = {name for stage in stages for name in GATES[stage]}
    is_on = {
        "do_mtbench": args.do_mtbench or "mtbench" not in judged,
        "do_instruct": args.do_instruct or "finance_instruct" not in judged,
        "do_eval": args.do_eval or "tatqa" not in judged,
        "do_reddit": args.do_reddit or "reddit" not in judged,
        "eval_baseline": args.eval_baseline or 1 not in stages,
    }
    missing = [flag for flag, on in is_on.items() if not on]
    if missing and not args.force_continue:
        raise InputError(f"--no-{missing[0]}: the gates are judged by it; leave it on, or add --force_continue")


def stage_arguments(args: argparse.Namespace, stage: int) -> argparse.Namespace:
    """What a stage is trained with, under the names that the other scripts use."""
    prefix = f"stage{stage}_"
    own = {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}
    return argparse.Namespace(**{**vars(args), **own, "output_dir": str(stage_folder(args, stage))})


def unused_flags(stage: int, *counted: str) -> set[str]:
    """The flags that do not change the adapter of this stage; those of sources that it does not train on neither."""
    return neutral_flags(build_parser(), "asked", *SOURCES[stage], *counted)


def stage_folder(args: argparse.Namespace, stage: int) -> Path:
    return Path(args.output_dir) / f"stage{stage}"


# ---------------------------------------------------------------------------------------------------------------------
# Stages


ADAPTER = "adapter_model.safetensors"


def stage_fingerprint(args: argparse.Namespace, stage: int, pairs: list[dict]) -> dict:
    """What a stage is trained on: its pairs, and the adapter of the stage before, which must have ended."""
    previous = Path(args.output_dir).with_name(f"stage{stage - 1}") / ADAPTER
    adapter = file_sha256(previous) if stage > 1 else None
    return {"pairs": len(pairs), "sha256": digest(pairs), "previous_adapter": adapter}


def check_stage_folders(by_stage: dict[int, argparse.Namespace]) -> None:
    """Raises InputError when the folder of a stage holds another run, or one that was trained from an older stage."""
    for stage, args in by_stage.items():
        check_output_folder(args, unused_flags(stage))
        if stage > min(by_stage) and Path(args.output_dir).exists():
            raise InputError(f"{args.output_dir}: {other_stage(stage)}")


def other_stage(stage: int) -> str:
    return (
        f"stage {stage} was trained from another stage {stage - 1} than the one that is here; --resume_from_stage "
        f"{stage - 1} runs both again from scratch, --resume_from_stage {stage} this one"
    )


def remove_folder(folder: Path) -> None:
    """Removes a folder; after a kill it is there as a whole or not at all."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def finished_stage(args: argparse.Namespace, stage: int) -> dict:
    """The record of a stage that ended earlier.

    Raises InputError when it did not end, when a file of it is damaged, when it had other flags, or when it missed its
    gate and --force_continue is not given.
    """
    folder = stage_folder(args, stage)
    problem = checkpoint_problem(folder)
    if problem:
        raise InputError(
            f"{folder}: stage {stage} cannot be built on, {problem}; --resume_from_stage {stage} runs it again from "
            "scratch"
        )
    check_same_run(folder, stage_arguments(args, stage), unused_flags(stage, "measured"))
    built_on = json.loads((folder / "run.json").read_text("utf-8"))["data"].get("previous_adapter")
    if stage > 1 and built_on != file_sha256(folder.with_name(f"stage{stage - 1}") / ADAPTER):
        raise InputError(f"{folder}: {other_stage(stage)}")
    record = json.loads((folder / "stage.json").read_text("utf-8"))
    if record["gate"] and not args.force_continue:
        raise InputError(f"{folder}: stage {stage} missed its gate ({record['gate']}); --force_continue continues")
    return record


def grown_adapter(model: PreTrainedModel, previous: Path, args: argparse.Namespace) -> PeftModel:
    """An adapter of the rank and alpha in `args` over the base `model` that computes what the one in `previous` does.

    With A (r, in), B (out, r) and s = alpha / r: A' is A followed by freshly initialised rows, and B' is B * s / s'
    followed by columns of zeros, so s' B' A' = s B A.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import set_seed

    set_seed(args.seed)
    model = new_adapter(model, args)
    config = json.loads((previous / "adapter_config.json").read_text("utf-8"))
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    state = get_peft_model_state_dict(model)
    for name, tensor in load_file(previous / "adapter_model.safetensors").items():
        if ".lora_A." in name:
            state[name][:rank] = tensor
        else:
            state[name][:, :rank] = tensor * (scale / (args.lora_alpha / args.lora_r))
    set_peft_model_state_dict(model, state)
    return model


def missed_gate(stage: int, delta: dict[str, dict], evaluations: list[Evaluation]) -> str:
    """By how much a stage misses its gate; "" when it passes."""
    missed = []
    for evaluation in evaluations:
        key = evaluation.name
        least = GATES[stage].get(key)
        if least is not None and key in delta and delta[key]["mean"] < least:
            mean = delta[key]["mean"]
            missed.append(
                f"{METRICS[key].title} {mean:+.3f} where {least:+.2f} is the least, {least - mean:.3f} short"
            )
    return "; ".join(missed)


def run_stage(
    args: argparse.Namespace,
    stage: int,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    evaluations: list[Evaluation],
    checkpoint: Path | None,
    device: dict,
) -> dict:
    """Trains a stage in its folder, measures it against the stage before, or the base, and returns its record.

    `args` are those of `stage_arguments`; `device` is the record's and goes to the stage's run.json. The manifest is
    written last, so that later stages can rely on the folder.
    """
    folder = Path(args.output_dir)
    previous = folder.with_name(f"stage{stage - 1}")
    log.info("stage %d: %d pairs, rank %d, beta %g", stage, len(pairs), args.lora_r, args.beta)
    rows = fit_chats(pairs, tokenizer, args)
    model = load_model(args)
    check_head(model, f"--model {args.model}")
    if stage > 1:
        model = grown_adapter(model, previous, args)
    trainer = build_trainer(args, model, tokenizer, rows)
    if main_process():
        folder.mkdir(exist_ok=True)
        remove_left_over(folder)
        if not (folder / "run.json").exists():
            data = stage_fingerprint(args, stage, pairs)
            write_json(folder / "run.json", {"args": vars(args), "device": device, "data": data})
    entry: dict = {"stage": stage, "pairs": len(pairs), "baseline": {}, "final": {}, "delta": {}, "runtime_s": {}}

    def measure_to(where: Path, name: str, *, with_adapter: bool) -> None:
        with timed(entry, name):
            measure(args, trainer.model, tokenizer, evaluations, where, name, with_adapter=with_adapter)

    if stage == 1 and args.eval_baseline:
        measure_to(folder.parent, "baseline", with_adapter=False)
    with timed(entry, "train"):
        train(args, trainer, checkpoint, folder)
    measure_to(folder, "final", with_adapter=True)
    entry["kept_step"] = trainer.state.global_step
    if main_process():
        before = stored_rows(*((previous, "final") if stage > 1 else (folder.parent, "baseline")), evaluations)
        report(entry, folder, evaluations, before, stored_rows(folder, "final", evaluations))
        entry["gate"] = missed_gate(stage, entry["delta"], evaluations)
        write_json(folder / "stage.json", entry)
        write_manifest(folder)
    return on_main_process(lambda: entry)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2), a missed gate in SystemExit(1)."""
    args = parse_arguments(build_parser(), argv, DEMO)
    with recorded_run(args, argv, "dpo_train_mt_v2.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Stage after stage. What can be wrong with the input is found before anything is written."""
    stages = stages_to_run(args)
    check_stage_flags(args, stages)
    record["stages"] = [finished_stage(args, stage) for stage in range(1, stages[0])]
    by_stage = {stage: stage_arguments(args, stage) for stage in stages}
    # With both flags, a run that did stages again was interrupted, and that one is resumed.
    from_scratch = bool(args.resume_from_stage) and not args.resume_from_checkpoint
    if not from_scratch:
        check_stage_folders(by_stage)
    tokenizer = load_tokenizer(args)
    mtbench = all_mtbench_questions(args)
    data = load_data(args, set().union(*(SOURCES[stage] for stage in stages)), mtbench)
    check_model(by_stage[stages[0]], tokenizer)
    evaluations = dpo_evaluations(args, tokenizer, mtbench, finance_questions(args, data))
    pairs = stage_pairs(args, record, tokenizer, data, stages)
    if args.dry_run:
        for stage in stages:
            log.info("stage %d: %s pairs", stage, " and ".join(sorted(SOURCES[stage])))
            print_plan(by_stage[stage], tokenizer, fit_chats(pairs[stage], tokenizer, by_stage[stage]), evaluations)
        return
    first, checkpoint = by_stage[stages[0]], None
    if not from_scratch:
        check_output_folder(first, unused_flags(stages[0]), stage_fingerprint(first, stages[0], pairs[stages[0]]))
        checkpoint = newest_complete(first)
    folder = begin(record, data_fingerprint(data, [pair for stage in stages for pair in pairs[stage]]))
    if from_scratch and main_process():
        for stage in reversed(stages):  # a kill in between leaves no stage whose basis is gone
            remove_folder(stage_folder(args, stage))
    for stage in stages:
        if args.resume_from_checkpoint and checkpoint_problem(stage_folder(args, stage)) is None:
            entry = finished_stage(args, stage)
        else:
            entry = run_stage(
                by_stage[stage],
                stage,
                tokenizer,
                pairs[stage],
                evaluations,
                checkpoint if stage == stages[0] else None,
                record["device"],
            )
        record["stages"].append(entry)
        record["runtime_s"][f"stage{stage}"] = sum(entry["runtime_s"].values())
        record["kept_step"] = entry["kept_step"]
        if stage == stages[-1] and main_process():
            finish(args, record, folder, stage_folder(args, stage), evaluations)
        check_gate(args, entry)


def check_gate(args: argparse.Namespace, entry: dict) -> None:
    """Raises MissedGateError when a stage missed its gate, unless --force_continue is given."""
    if not entry["gate"]:
        return
    message = f"stage {entry['stage']} missed its gate: {entry['gate']}"
    if args.force_continue:
        log.warning("%s; going on because of --force_continue", message)
        return
    if entry["stage"] < 3:
        message += f"; --resume_from_stage {entry['stage'] + 1} --force_continue continues"
    raise MissedGateError(message)


def stages_to_run(args: argparse.Namespace) -> list[int]:
    """The stages that the flags ask for; with --resume_from_checkpoint auto, those that have not ended."""
    if args.stage:
        return [args.stage]
    first = args.resume_from_stage or 1
    if args.resume_from_checkpoint:
        while first < 3 and checkpoint_problem(stage_folder(args, first)) is None:
            first += 1
    return list(range(first, 4))


def stage_pairs(
    args: argparse.Namespace,
    record: dict,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    stages: list[int],
) -> dict[int, list[dict]]:
    """The training pairs of each stage; the base answers the Finance-Instruct prompts once, for both their stages."""
    finance: list[dict] = []
    if any("finance" in SOURCES[stage] for stage in stages):
        wanted = args.finance_instruct_pairs
        finance = finance_pairs(args, record, tokenizer, data.items["finance"], wanted)
    mix = two_way_shares(args)
    pairs: dict[int, list[dict]] = {}
    for stage in stages:
        if stage == 1:
            pairs[stage] = data.items["general"][: args.stage1_general_pairs]
        elif stage == 2:
            pairs[stage] = finance
        else:
            pairs[stage] = mixed_pairs(
                data, mix, {"finance": len(finance)}, args.mix_policy, lambda _, wanted: finance[:wanted]
            )
        pairs[stage] = sample(pairs[stage], args.limit_pairs or len(pairs[stage]), args.seed)
        if not pairs[stage]:
            raise InputError(
                f"stage {stage}: no training pair is left; name a larger data set, or raise --instruct_max_tokens if "
                "the base's answers were cut"
            )
    return pairs


def finish(args: argparse.Namespace, record: dict, folder: Path, last: Path, evaluations: list[Evaluation]) -> None:
    """Copies the last adapter into the run's folder; reports it against the base, and every domain by stage."""
    for path in [*last.glob("adapter_*"), *last.glob("*token*"), *last.glob("chat_template*"), last / "README.md"]:
        write_atomic(folder / path.name, path.read_bytes())
    before, after = (stored_rows(*where, evaluations) for where in ((folder, "baseline"), (last, "final")))
    report(record, folder, evaluations, before, after)
    save_answers(args, before, after)
    table = []
    for evaluation in evaluations:
        metric, key = METRICS[evaluation.name], evaluation.name
        for entry in record["stages"]:
            before_stage, after_stage = metric.read(entry["baseline"]), metric.read(entry["final"])
            title, delta = f"{entry['stage']}: {metric.title}", entry["delta"].get(key)
            table.append(TableRow(title, before_stage, after_stage, delta, metric.lower_is_better))
    print_table(f"{folder}, by stage, each against the one before", table)


if __name__ == "__main__":
    main()
