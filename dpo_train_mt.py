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
import functools
import logging
from fractions import Fraction
from pathlib import Path

from llm_alignment.dpo import align, check_flags, fit_chats, print_plan, starting_adapter
from llm_alignment.files import InputError, sample, write_rows
from llm_alignment.finance import (
    data_fingerprint,
    finance_pairs,
    finance_questions,
    load_data,
    mixed_pairs,
    two_way_shares,
)
from llm_alignment.flags import (
    FINANCE_DEMO,
    Parser,
    add_data_flags,
    add_dpo_flags,
    add_group,
    add_tatqa_flags,
    neutral_flags,
    parse_arguments,
    positive,
    ratio,
)
from llm_alignment.models import check_model, load_tokenizer, main_process
from llm_alignment.runs import recorded_run
from llm_alignment.training import check_output_folder, newest_complete
from mtbench_eval import all_mtbench_questions, dpo_evaluations

log = logging.getLogger("llm_alignment")

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


# fmt: off
def build_parser() -> Parser:
    """The command line. Defaults are those of the published runs where they had one."""
    shown = (
        "demo model output_dir use_hybrid use_3way_hybrid hybrid_ratio beta epochs batch grad_acc "
        "learning_rate lora_r dry_run resume_from_checkpoint"
    )
    parser = Parser("dpo_train_mt.py", __doc__, shown)
    add_dpo_flags(parser)
    add_tatqa_flags(parser)
    add_data_flags(parser)
    add = add_group(parser, "mix; without one Reddit alone", trains=True)
    add("--use_hybrid", action="store_true", help="Reddit and Finance-Instruct, by --hybrid_ratio")
    add("--use_3way_hybrid", action="store_true", help="Reddit, Finance-Instruct and general pairs, by three ratios")
    add("--reddit_ratio", type=ratio, default=0.4, help="share of Reddit in the three-way mix")
    add("--finance_ratio", type=ratio, default=0.3, help="share of Finance-Instruct in it")
    add("--general_ratio", type=ratio, default=0.3, help="share of general pairs in it")
    add("--general_pairs", type=positive(int), default=3000, help="most general pairs")
    parser.set_defaults(output_dir="qwen3_reddit_finance_dpo", batch=1, grad_acc=64)
    return parser


# fmt: on
def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; a mix adds its name to the output folder, as in the published runs."""
    given = build_parser().parse_args(argv)
    suffix = "_3way_hybrid" if given.use_3way_hybrid else "_hybrid" if given.use_hybrid else ""
    args = parse_arguments(build_parser(), argv, {**FINANCE_DEMO, "output_dir": f"demo_dpo_mt{suffix}"})
    if suffix and args.output_dir == given.output_dir:  # the user's or the default; the demo's own has it already
        args.output_dir = f"{Path(args.output_dir)}{suffix}"  # a shell completes a folder's name to one with a slash
    return args


def asked_shares(args: argparse.Namespace) -> dict[str, Fraction]:
    """The share of each source in the training pairs. Raises InputError for mixes that make no sense."""
    if args.use_hybrid and args.use_3way_hybrid:
        raise InputError("--use_hybrid and --use_3way_hybrid: one mix at a time; leave out one of them")
    if args.use_3way_hybrid:
        ratios = {"reddit": args.reddit_ratio, "finance": args.finance_ratio, "general": args.general_ratio}
        shares = {source: Fraction(str(share)) for source, share in ratios.items()}
        total = float(sum(shares.values()))
        if abs(total - 1) > 1e-6:
            raise InputError(f"--reddit_ratio, --finance_ratio and --general_ratio sum to {total:g}; make it 1")
        return shares
    if args.use_hybrid:
        return two_way_shares(args)
    return {"reddit": Fraction(1)}


def warn_of_unused_flags(args: argparse.Namespace, argv: list[str]) -> None:
    """Names the flags in `argv` that this mix does not read: without --use_hybrid a ratio changes nothing."""
    mixes = ["--use_hybrid", "--use_3way_hybrid"]
    read_by = {
        "--hybrid_ratio": mixes[:1],
        **dict.fromkeys(["--mix_policy", "--finance_instruct_pairs", "--finance_temperature"], mixes),
        **dict.fromkeys(
            ["--reddit_ratio", "--finance_ratio", "--general_ratio", "--general_pairs", "--general_dataset"], mixes[1:]
        ),
        "--tatqa_split": [],  # TAT-QA is measured here, on --eval_split
    }
    given = {word.partition("=")[0] for word in argv}
    for flag, readers in read_by.items():
        if flag in given and not any(getattr(args, mix[2:]) for mix in readers):
            reason = f"is read with {' or '.join(readers)} alone" if readers else "trains nothing in this script"
            log.warning("%s %s: it is not used", flag, reason)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    args = parse(argv)
    with recorded_run(args, argv, "dpo_train_mt.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, mix, measure, train, measure again. Bad input is found before anything is written."""
    shares = asked_shares(args)
    warn_of_unused_flags(args, record["argv"])
    check_flags(args)
    ignored = neutral_flags(build_parser(), "asked", "reddit", "finance", "general")
    check_output_folder(args, ignored)
    tokenizer = load_tokenizer(args)
    mtbench = all_mtbench_questions(args)
    data = load_data(args, set() if args.no_train else set(shares), mtbench)
    check_model(args, tokenizer, adapter=args.load_adapter)
    evaluations = dpo_evaluations(args, tokenizer, mtbench, finance_questions(args, data))
    pairs: list[dict] = []
    if not args.no_train:
        limits = {"finance": args.finance_instruct_pairs, "general": args.general_pairs}
        make_finance_pairs = functools.partial(finance_pairs, args, record, tokenizer)
        pairs = mixed_pairs(data, shares, limits, args.mix_policy, make_finance_pairs)
        pairs = sample(pairs, args.limit_pairs or len(pairs), args.seed)
    rows = fit_chats(pairs, tokenizer, args)
    if args.dry_run:
        print_plan(args, tokenizer, rows, evaluations)
        return
    fingerprint = data_fingerprint(data, pairs) | starting_adapter(args)
    check_output_folder(args, ignored, fingerprint)
    align(args, record, tokenizer, rows, evaluations, fingerprint, newest_complete(args))
    if main_process():
        write_rows(Path(args.output_dir) / "train_pairs.jsonl", pairs)


if __name__ == "__main__":
    main()
