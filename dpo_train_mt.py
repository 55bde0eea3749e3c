"""DPO on several finance tasks: Reddit replies, Finance-Instruct and general preference pairs, alone or mixed.

    L = -log sigmoid(beta * (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

Reddit: the best comment of a post against a worse one. Finance-Instruct: the reference answer against the base model's
own answer. General: any set of preference pairs. What the evaluations ask is held out before pairs are built; whatever
contains it is dropped and counted. TAT-QA, MT-Bench, Finance-Instruct instructions and Reddit replies are measured
before and after.

    poetry run python dpo_train_mt.py --use_hybrid --hybrid_ratio 0.5 --beta 0.0175 --finance_instruct_pairs 1800

The pairs are conversations and go through the chat template, as their evaluations do; --use_chat_template is about
TAT-QA's prompts.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from llm_alignment import flags
from llm_alignment.encoder import own_tokens
from llm_alignment.evaluation import Evaluation
from llm_alignment.files import InputError, log, sample, write_rows
from llm_alignment.hub import adapter_files_sha256
from llm_alignment.processes import main_process
from llm_alignment.prompts import PromptStyle
from llm_alignment.runs import recorded_run, timed
from mtbench_eval import load_questions, sample_questions

if TYPE_CHECKING:
    from llm_alignment.training import Setup


# fmt: off
def build_parser() -> flags.Parser:
    """The command line. Defaults are those of the published runs where they had one."""
    parser = flags.Parser("dpo_train_mt.py", __doc__, "demo model output_dir use_hybrid use_3way_hybrid hybrid_ratio "
        "beta epochs batch grad_acc learning_rate lora_r dry_run resume_from_checkpoint")
    flags.add_dpo_flags(parser)
    flags.add_tatqa_flags(parser)
    flags.add_data_flags(parser)
    add = flags.add_group(parser, "mix; without one Reddit alone", trains=True)
    add("--use_hybrid", action="store_true", help="Reddit and Finance-Instruct, by --hybrid_ratio")
    add("--use_3way_hybrid", action="store_true", help="Reddit, Finance-Instruct and general pairs, by three ratios")
    add("--reddit_ratio", type=flags.ratio, default=0.4, help="share of Reddit in the three-way mix")
    add("--finance_ratio", type=flags.ratio, default=0.3, help="share of Finance-Instruct in it")
    add("--general_ratio", type=flags.ratio, default=0.3, help="share of general pairs in it")
    add("--general_pairs", type=flags.positive(int), default=3000, help="at most N general pairs")
    parser.set_defaults(output_dir="qwen3_reddit_finance_dpo", batch=1, grad_acc=64)
    return parser


# fmt: on
def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; a mix adds its name to the output folder, as in the published runs."""
    given = build_parser().parse_args(argv)
    suffix = "_3way_hybrid" if given.use_3way_hybrid else "_hybrid" if given.use_hybrid else ""
    args = flags.parse_arguments(build_parser(), argv, {**flags.FINANCE_DEMO, "output_dir": f"demo_dpo_mt{suffix}"})
    if suffix and args.output_dir == given.output_dir:  # the user's or the default; the demo's own has it already
        args.output_dir = f"{Path(args.output_dir)}{suffix}"  # a shell completes a folder's name to one with a slash
    return args


def asked_shares(args: argparse.Namespace) -> dict[str, Fraction]:
    """The share of each source in the training pairs. Raises InputError for mixes that make no sense."""
    if args.use_hybrid and args.use_3way_hybrid:
        raise InputError("--use_hybrid and --use_3way_hybrid: one mix at a time; leave out one of them")
    if args.use_3way_hybrid:
        shares = {name: Fraction(str(getattr(args, f"{name}_ratio"))) for name in ("reddit", "finance", "general")}
        total = float(sum(shares.values()))
        if abs(total - 1) > 1e-6:
            raise InputError(f"--reddit_ratio, --finance_ratio and --general_ratio sum to {total:g}; make it 1")
        return shares
    reddit = Fraction(str(args.hybrid_ratio))
    return {"reddit": reddit, "finance": 1 - reddit} if args.use_hybrid else {"reddit": Fraction(1)}


def warn_of_unused_flags(args: argparse.Namespace, argv: list[str]) -> None:
    """Names the flags in `argv` that this mix does not read: without --use_hybrid a ratio changes nothing."""
    mixes = ["--use_hybrid", "--use_3way_hybrid"]
    of_any = ("--mix_policy", "--finance_instruct_pairs", "--finance_temperature")
    of_three = ("--reddit_ratio", "--finance_ratio", "--general_ratio", "--general_pairs", "--general_dataset")
    read_by = {"--hybrid_ratio": mixes[:1], **dict.fromkeys(of_any, mixes), **dict.fromkeys(of_three, mixes[1:])}
    read_by["--tatqa_split"] = []  # TAT-QA is measured here, on --eval_split
    for flag, readers in read_by.items():
        if flags.is_given(argv, flag) and not any(getattr(args, mix[2:]) for mix in readers):
            reason = f"is read with {' or '.join(readers)} alone" if readers else "trains nothing in this script"
            log.warning("%s %s: it is not used", flag, reason)


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    return recorded_run(run, parse(argv), argv, "dpo_train_mt.py")


def run(args: argparse.Namespace, record: dict) -> None:
    """Checks the flags, reads and mixes the sources, and runs DPO on the pairs."""
    from llm_alignment import dpo, training
    from llm_alignment.dpo_run import RunFlags, run_dpo

    shares = asked_shares(args)
    warn_of_unused_flags(args, record["argv"])
    flags.check_dpo_flags(args)
    neutral = flags.neutral_flags(build_parser(), "asked", "reddit", "finance", "general")
    setup = training.set_up(args, record, neutral, longest=args.max_length)
    setup.check_folder()
    pairs, evaluations, data = pairs_and_evaluations(args, record, setup, shares)
    chat = flags.fill(PromptStyle, args, use_chat_template=True, system=args.system_prompt)
    rows = dpo.fit_pairs(pairs, setup.tokenizer, chat, args.max_length)
    if not args.dry_run:  # which generates no answers to Finance-Instruct
        setup.check_folder(data)
    try:
        run_dpo(record, setup, rows, evaluations, data, flags.fill(RunFlags, args))
    finally:  # after a missed gate too
        if main_process() and (setup.folder / "metrics.json").exists():
            write_rows(setup.folder / "train_pairs.jsonl", pairs)


def pairs_and_evaluations(
    args: argparse.Namespace, record: dict, setup: Setup, shares: dict[str, Fraction]
) -> tuple[list[dict], list[Evaluation], dict]:
    """(training pairs, what is measured, fingerprint of the data)."""
    from llm_alignment import dpo_run, finance

    sources = set() if args.no_train else set(shares)
    mtbench = load_questions(args.mtbench_file, flag="--mtbench_file") if args.do_mtbench else []
    measuring, settings = flags.fill(dpo_run.MeasuringSettings, args), flags.fill(finance.DataSettings, args)
    data = finance.load_data(settings, sources, *measuring.forbidden(mtbench), own_tokens(setup.tokenizer))
    asked = {"mtbench": sample_questions(mtbench, args.mtbench_limit), **data.questions}
    evaluations = dpo_run.dpo_evaluations(setup.tokenizer, measuring, asked)

    def answered(instructions: list[dict], wanted: int) -> list[dict]:
        with timed(record, "finance answers"):
            return finance.finance_pairs(setup, instructions, wanted, settings)

    limits = {"finance": args.finance_instruct_pairs, "general": args.general_pairs}
    pairs = finance.mixed_pairs(data, shares, limits, args.mix_policy, answered) if sources else []
    pairs = sample(pairs, args.limit_pairs or len(pairs), args.seed)
    fingerprint = finance.data_fingerprint(data, pairs)
    if args.load_adapter:  # a resumed run must begin with the same adapter, its reference too
        fingerprint["adapter"] = adapter_files_sha256(args.load_adapter)
    return pairs, evaluations, fingerprint


if __name__ == "__main__":
    main()
