"""MT-Bench: two-turn questions answered by a chat model and scored by a reward model.

The training scripts measure with these functions before and after training. The command line scores any model or
adapter later:

    poetry run python mtbench_eval.py --model Qwen/Qwen3-1.7B --adapter OUTPUT_DIR --output_dir DIR

Every turn is answered with the chat template and the whole conversation so far, greedily, in batches. Every question
is one JSONL line, written as soon as it exists, so the same command continues an evaluation that was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

from llm_alignment import flags
from llm_alignment.checks import SAMPLE_SEED, read_questions
from llm_alignment.encoder import own_tokens
from llm_alignment.evaluation import Evaluation, measure, pair_rows, print_table, report, table_rows
from llm_alignment.files import InputError, SkippedRows, differing, log, read_jsonl, write_json
from llm_alignment.flags import add_group, fill, not_negative
from llm_alignment.hub import adapter_files_sha256, hub_files
from llm_alignment.preferences import read_pairs
from llm_alignment.processes import main_process
from llm_alignment.prompts import PromptStyle, render
from llm_alignment.results import ResultFile, read_results
from llm_alignment.retention import RetentionSettings, retention_evaluations
from llm_alignment.runs import begin, recorded_run, timed
from llm_alignment.scores import compare_scored, scored_evaluation, summarise_scored

# Where the two MT-Bench sets live on the hub: (repository, its kind, file). The English one is FastChat's own file.
MT_BENCH = {
    "mt_bench_ru.json": ("t-tech/ru-mt-bench", "dataset", "raw/question.jsonl"),
    "mt_bench_en.json": ("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl"),
}


def load_questions(
    source: str, *, language: str = "ru", limit: int = 0, seed: int = SAMPLE_SEED, flag: str = "--questions"
) -> list[dict]:
    """Reads questions: [{"question_id", "category", "turns": [str, ...]}, ...] in the file's order. `source` is a
    JSONL file, a JSON list, or "auto": mt_bench_ru.json or mt_bench_en.json in the working folder, fetched from the
    hub when it is not there. A row holds `turns`, or one turn in `prompt`, `question` or `text`. `limit` > 0 takes a
    sample by `seed` that does not depend on the order of the file. Raises InputError as `read_questions`, and naming
    `flag` when the hub cannot be reached."""
    path = Path(f"mt_bench_{language}.json" if source == "auto" else source)
    if str(path) in MT_BENCH and not path.exists():
        repository, kind, name = MT_BENCH[str(path)]
        fetched = hub_files(repository, flag, [name], kind=kind) / name
        write_json(path, [json.loads(line) for _, line in read_jsonl(fetched)])
        log.info("%s: the questions of %s, fetched", path, repository)
    return sample_questions([question for _, question in read_questions(path, as_question)], limit, seed)


def sample_questions(questions: list[dict], limit: int, seed: int = SAMPLE_SEED) -> list[dict]:
    """`limit` of the questions by `seed`, in their order and whatever that is; all of them when `limit` is 0."""
    if not 0 < limit < len(questions):
        return questions
    by_id = sorted(questions, key=lambda question: str(question["question_id"]))
    sampled = {question["question_id"] for question in random.Random(seed).sample(by_id, limit)}
    return [question for question in questions if question["question_id"] in sampled]


def as_question(row: dict, number: int) -> dict:
    """{"question_id", "category", "turns"} of a row; `number` is the id where none is."""
    turns = next((row[key] for key in ("turns", "prompt", "question", "text") if key in row), None)
    question_id = row.get("question_id", number)
    if isinstance(question_id, float) and question_id.is_integer():  # how a table with gaps stores whole numbers
        question_id = int(question_id)
    turns = [turns] if isinstance(turns, str) else turns
    return {"question_id": question_id, "category": str(row.get("category", "general")), "turns": turns}


def mtbench_evaluations(args: argparse.Namespace, *asked: list[dict]) -> list[Evaluation]:
    """MT-Bench with each of these lists of questions, scored by one reward model."""
    from llm_alignment.generation import Decoding
    from llm_alignment.rewards import load_reward_model

    reward_model = load_reward_model(args.reward_model, args.eval_batch_size, args.trust_remote_code, args.dry_run)
    decoding = Decoding(
        max_new_tokens=args.mtbench_max_tokens, temperature=args.mtbench_temperature, seed=args.seed,
        backend=args.mtbench_backend, thinking=args.thinking, batch_size=args.eval_batch_size,
    )  # fmt: skip
    return [scored_evaluation("mtbench", questions, decoding, reward_model) for questions in asked]


QUESTIONS = str(flags.DEMO_DIR / "mt_bench_ru.jsonl")
DEMO = flags.DEMO | {"questions": QUESTIONS, "output_dir": "demo_mtbench", "mtbench_max_tokens": 32}


# fmt: off
def build_parser() -> flags.Parser:
    parser = flags.Parser("mtbench_eval.py", __doc__, "demo model adapter questions language mtbench_questions_limit "
        "mtbench_max_tokens compare output_dir no_4bit reward_model dry_run")
    flags.add_model_flags(parser)
    flags.add_run_flags(parser, "experiments/mtbench_evaluations.jsonl", trains=False)
    add = add_group(parser, "what to measure", trains=False)
    add("--adapter", default="", help="output folder of a training run; without it the base model")
    add("--questions", "--mtbench_file", default="auto", help="JSONL or JSON file; auto fetches MT-Bench")
    add("--language", choices=["ru", "en"], default="ru", help="which set auto fetches")
    add("--adapter_scale", type=not_negative(float), default=1.0, help="strength of --adapter; 0 is the base")
    add("--check_judge", default="", metavar="PAIRS",
        help="measure instead how often the reward model agrees with these preference pairs")
    add("--compare", default="", help="per-question file of an earlier evaluation to compare with")
    add("--mtbench_limit", "--mtbench_questions_limit", "--limit", dest="mtbench_questions_limit", metavar="N",
        type=not_negative(int), default=0, help="ask a sample of this many; 0 = all")
    flags.add_mtbench_flags(add)
    # the same command continues the evaluation
    parser.set_defaults(output_dir="mtbench_results", resume_from_checkpoint=None)
    return parser


# fmt: on
def earlier_rows(path: str, mtbench: Evaluation) -> list[dict]:
    """The rows for the questions of `mtbench` in the file that --compare names; warns when it had other settings.
    Raises InputError when it is another kind of file, answers none of the questions with these turns, or was scored by
    another reward model."""
    skipped = SkippedRows()
    fingerprint, stored = read_results(Path(path), skipped)
    needed = ("rewards", "scores", "scores_logged", "answer_tokens", "finished")
    is_whole = bool(stored) and all(isinstance(fingerprint.get(name), dict) for name in ("reward_model", "generation"))
    for row in stored.values():
        columns: list[Any] = [row.get(name) for name in ("turns", *needed)]
        is_whole &= all(isinstance(values, list) and len(values) == len(columns[0]) > 0 for values in columns)
        is_whole = is_whole and all(isinstance(x, int | float) and math.isfinite(x) for x in sum(columns[1:], []))
    if not is_whole:
        raise InputError(f"--compare {path}: no per-question results; name an mtbench_*.jsonl of an output folder")
    skipped.report(f"damaged lines of {path}")
    turns = {question["question_id"]: question["turns"] for question in mtbench.items}
    rows = [row for key, row in stored.items() if key in turns]
    other = [row["question_id"] for row in rows if row["turns"] != turns[row["question_id"]]]
    if not rows or other:
        what = f"asked other turns under question_id {other[0]}" if other else "answered none of these questions"
        raise InputError(f"--compare {path} {what}; compare evaluations of one question set")
    judge, settings = (differing(fingerprint[name], mtbench.settings[name]) for name in ("reward_model", "generation"))
    if judge:
        raise InputError(f"--compare {path} was scored by another reward model ({judge}); score it by this one")
    if settings:
        log.warning("--compare %s had other settings (%s): part of the difference comes from that", path, settings)
    return rows


def main(argv: list[str] | None = None) -> dict:
    """Runs the evaluation that `argv` asks for and returns its record."""
    args = flags.parse_arguments(build_parser(), argv, DEMO)
    return recorded_run(run_judge if args.check_judge else run, args, argv, "mtbench_eval.py")


def run_judge(args: argparse.Namespace, record: dict) -> None:
    """How often the reward model agrees with the pairs of --check_judge."""
    from llm_alignment.devices import prepared_device
    from llm_alignment.rewards import check_judge, judge_lines, load_reward_model

    ignored = next((name for name in ("adapter", "compare") if getattr(args, name)), None)
    flags.refuse((ignored, f"--check_judge scores the answers of its pairs: leave out --{ignored}"))
    prepared_device("auto", args.gpu_memory_share)  # a reward model is read in float32
    judge = load_reward_model(args.reward_model, args.eval_batch_size, args.trust_remote_code, args.dry_run)
    pairs = read_pairs(args.check_judge, "--check_judge", thinking=args.thinking, own=own_tokens(judge.tokenizer))
    if args.dry_run:
        log.info("%d pairs for the judge", len(pairs))
        return
    record["final"]["judge"] = check_judge(pairs, judge.score)
    log.info("%s", "\n".join(judge_lines(record["final"]["judge"])))


def run(args: argparse.Namespace, record: dict) -> None:
    """Answer, score, summarise, compare. Everything that can be wrong with the input is found before it writes."""
    from llm_alignment import adapters, models

    questions = load_questions(
        args.questions, language=args.language, limit=args.mtbench_questions_limit, seed=args.mtbench_questions_seed
    )
    retention = fill(RetentionSettings, args)
    kept = retention.questions()
    base = models.resolve_base(fill(models.BaseFlags, args))
    tokenizer = models.load_tokenizer(base)
    adapters.check_model(base, tokenizer, adapter=args.adapter, scale=args.adapter_scale)
    [mtbench] = mtbench_evaluations(args, questions)
    evaluations = [mtbench, *retention_evaluations(kept, retention)]
    earlier = earlier_rows(args.compare, mtbench) if args.compare else []
    if args.dry_run:
        turns = sum(len(question["turns"]) for question in questions)
        log.info("%d questions, %d answers of up to %d tokens each", len(questions), turns, args.mtbench_max_tokens)
        text = render(questions[0]["turns"][0], tokenizer, fill(PromptStyle, args))
        log.info("question %s as the model reads it:\n%s", questions[0]["question_id"], text)
        return
    with timed(record, "load"):
        model = models.load_model(base)
        models.check_logits(model, base.what)
        if args.adapter:
            model = adapters.load_adapter(model, args.adapter)
    with adapters.scaled(model, args.adapter_scale):
        adapter = adapters.adapter_sha256(model)
        fingerprint = {**models.base_fingerprint(base, thinking=args.thinking), "adapter": adapter}
        if args.adapter_scale != 1:
            fingerprint["adapter_scale"] = args.adapter_scale
        for each in evaluations if main_process() else []:  # another's folder is refused before anything in it changes
            ResultFile(Path(args.output_dir) / f"{each.name}.jsonl", {**fingerprint, **each.settings})
        data = {"questions": args.questions, "n": len(questions), "sha256": mtbench.settings["questions"]}
        if args.adapter:  # by it campaigns and means over seeds tell runs apart
            data["adapter"] = adapter_files_sha256(args.adapter)
        folder = begin(record, data, base)
        how: Any = {"with_adapter": bool(args.adapter), "use_cache": not args.no_baseline_cache}
        with timed(record, "final"):
            rows = measure(model, tokenizer, evaluations, (folder, ""), fingerprint=fingerprint, **how)
    if main_process():
        report_results(record, folder, evaluations, rows, earlier)


def report_results(
    record: dict, folder: Path, evaluations: list[Evaluation], rows: dict[str, list[dict]], earlier: list[dict]
) -> None:
    """The table of what was measured, MT-Bench against the `earlier` rows of --compare where there are any."""
    answered = rows["mtbench"]
    title = f"{record['args']['model']} {record['args']['adapter']}".strip() + f", {len(answered)} questions"
    both = []
    if earlier:
        both = [new for _, new in pair_rows(earlier, answered)]
        on_both = summarise_scored("mtbench", both)
        record["baseline"] |= summarise_scored("mtbench", earlier)
        record["final"]["mtbench_compared"] = on_both["mtbench"]
        record["delta"] |= compare_scored("mtbench", earlier, both)
        if len(both) < len(answered):
            title += f"; baseline and differences on the {len(both)} that both answered"
    report(record, folder, evaluations, {}, rows, title=title)
    if 0 < len(both) < len(answered):
        rows_of_both = table_rows(record["baseline"], on_both, record["delta"], "full")
        print_table(f"The {len(both)} questions that both answered", rows_of_both)


if __name__ == "__main__":
    main()
