"""MT-Bench: two-turn questions answered by a chat model and scored by a reward model.

The training scripts measure with these functions before and after training. The command line scores any model or
adapter later:

    poetry run python mtbench_eval.py --model Qwen/Qwen3-1.7B --adapter OUTPUT_DIR --output_dir DIR

Every turn is answered with the chat template and the whole conversation so far, greedily, in batches. Every question
is one JSONL line, written as soon as it exists, so the same command continues an evaluation that was stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.drift import reference_drift
from llm_alignment.evaluation import Evaluation, pair_rows, print_table, report, table_rows
from llm_alignment.files import (
    InputError,
    ResultFile,
    SkippedRows,
    differing,
    digest,
    read_jsonl,
    read_results,
    read_rows,
    write_json,
)
from llm_alignment.flags import (
    DEMO_DIR,
    Parser,
    add_group,
    add_model_flags,
    add_mtbench_flags,
    add_run_flags,
    not_negative,
    parse_arguments,
)
from llm_alignment.generation import MAX_BATCH_SIZE, generate, render, strip_thinking
from llm_alignment.hub import hub_files
from llm_alignment.models import (
    adapter_sha256,
    check_logits,
    check_model,
    load_adapter,
    load_model,
    load_tokenizer,
    main_process,
    model_fingerprint,
    on_main_process,
    processes,
)
from llm_alignment.rewards import RewardModel, load_reward_model, to_logged_scale, to_score
from llm_alignment.runs import begin, recorded_run, timed
from llm_alignment.scores import compare_scored, summarise, summarise_scored
from llm_alignment.tatqa import tatqa_evaluation

# torch and its family take ten seconds to import, so functions import them: --help and a wrong flag answer at once.
if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("llm_alignment")

# ---------------------------------------------------------------------------------------------------------------------
# Questions

# Where the two MT-Bench sets live on the hub: (repository, its kind, file). The English one is FastChat's own file.
MT_BENCH = {
    "ru": ("t-tech/ru-mt-bench", "dataset", "raw/question.jsonl"),
    "en": ("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl"),
}


def load_questions(
    source: str, *, language: str = "ru", limit: int = 0, seed: int = 42, flag: str = "--questions"
) -> list[dict]:
    """Reads questions: [{"question_id", "category", "turns": [str, ...]}, ...] in the file's order.

    `source` is a JSONL file, a JSON list, or "auto": mt_bench_ru.json or mt_bench_en.json in the working folder,
    fetched from the hub when it is not there. A row holds `turns`, or one turn in `prompt`, `question` or `text`.
    `limit` > 0 takes a sample by `seed` that does not depend on the order of the file. Raises InputError naming file
    and line for a file that is empty, damaged, or has a row without turns or with a duplicate id, and naming `flag`
    when the hub cannot be reached.
    """
    path = Path(f"mt_bench_{language}.json" if source == "auto" else source)
    for known in MT_BENCH:
        if str(path) == f"mt_bench_{known}.json" and not path.exists():
            fetch_questions(known, path, flag)
    skipped, questions = SkippedRows(), []
    first_places: dict[int | str, str] = {}
    for number, (place, row) in enumerate(read_rows(path, skipped), 1):
        question = as_question(row, number, f"{path}, {place}")
        question_id = question["question_id"]
        if question_id in first_places:
            raise InputError(
                f"{path}, {place}: duplicate question_id {question_id} (first at {first_places[question_id]}); give "
                "every question an id of its own"
            )
        first_places[question_id] = place
        questions.append(question)
    if skipped.count:
        raise InputError(f"{path}: {skipped.places[0]}; repair the file or fetch it again")
    if not questions:
        raise InputError(f"{path}: no questions in this file; fetch it again or name another")
    return sample_questions(questions, limit, seed)


def sample_questions(questions: list[dict], limit: int, seed: int) -> list[dict]:
    """`limit` of the questions by `seed`, in their order and whatever that is; all of them when `limit` is 0."""
    if not 0 < limit < len(questions):
        return questions
    by_id = sorted(questions, key=lambda question: str(question["question_id"]))
    sampled = {question["question_id"] for question in random.Random(seed).sample(by_id, limit)}
    return [question for question in questions if question["question_id"] in sampled]


def as_question(row: dict, number: int, place: str) -> dict:
    """{"question_id", "category", "turns"} of a row. A null column counts as absent; `number` is the id where none is.

    Raises InputError naming `place` for a row without turns or with an id that is neither a number nor a text.
    """
    row = {key: value for key, value in row.items() if value is not None}
    turns = next((row[key] for key in ("turns", "prompt", "question", "text") if key in row), None)
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise InputError(f"{place}: no turns; give every question a list of texts named turns")
    question_id = row.get("question_id", number)
    if isinstance(question_id, float) and question_id.is_integer():  # how a table with gaps stores whole numbers
        question_id = int(question_id)
    if not isinstance(question_id, int | str):
        raise InputError(f"{place}: question_id {json.dumps(question_id)}; make it a whole number or a text")
    return {"question_id": question_id, "category": str(row.get("category", "general")), "turns": turns}


def fetch_questions(language: str, path: Path, flag: str) -> None:
    """Downloads an MT-Bench set and writes it to `path` as a JSON list."""
    repository, kind, name = MT_BENCH[language]
    fetched = hub_files(repository, flag, [name], kind=kind) / name
    write_json(path, [json.loads(line) for _, line in read_jsonl(fetched)])
    log.info("%s: the questions of %s, fetched", path, repository)


# ---------------------------------------------------------------------------------------------------------------------
# Answers and scores


def evaluation_fingerprint(
    model_settings: dict, questions: list[dict], reward_model: RewardModel, **generation_settings: Any
) -> dict:
    """What the results of `score_questions` depend on; `model_settings` as from `model_fingerprint`."""
    if generation_settings["temperature"] == 0:
        generation_settings.pop("seed")  # so that greedy baselines are reused by runs of other seeds
    return {
        **model_settings,
        "questions": digest(questions),
        "reward_model": reward_model.fingerprint,
        "generation": generation_settings,
    }


def score_questions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: RewardModel | None,
    questions: list[dict],
    *,
    path: Path,
    fingerprint: dict,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 0,
    backend: str = "simple",
    thinking: bool = False,
    seed: int = 42,
    use_cache: bool = False,
    renew: bool = False,
) -> list[dict]:
    """Answers every turn of every question, scores each answer with its history, and returns a row per question.

    A row: {"question_id", "category", "turns", "answers", "rewards", "scores", "scores_logged", "answer_tokens",
    "finished", "batch_sizes"}, the last seven with one entry per turn. Questions are processed in chunks; the rows of
    a chunk are written to `path` (a ResultFile) as soon as they exist, and a restart continues with the first
    incomplete chunk.
    `fingerprint` describes the model; questions, reward model and generation settings are added to it.
    `use_cache` takes a greedy result from the user's cache folder and puts it there. `renew`: see ResultFile.
    """
    from tqdm import tqdm

    settings = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, backend=backend, thinking=thinking, seed=seed
    )
    results: ResultFile | None = None
    if reward_model:
        fingerprint = evaluation_fingerprint(fingerprint, questions, reward_model, **settings)
        results = ResultFile(path, fingerprint, renew=renew, use_cache=use_cache and temperature == 0)
    unanswered = on_main_process(lambda: results.missing(questions) if results else [])
    missing = {question["question_id"] for question in unanswered}

    size = (batch_size or MAX_BATCH_SIZE[model.device.type]) * processes()
    order = sorted(questions, key=lambda question: sum(map(len, question["turns"])))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    total = sum(len(question["turns"]) for question in questions)
    progress = tqdm(total=total, desc=path.stem, unit="answer", disable=not (missing and results))
    with progress:
        for chunk in chunks:
            if any(question["question_id"] in missing for question in chunk):
                # the whole chunk, so that an interrupted evaluation sees the batches of an uninterrupted one
                rows = answer_and_score(
                    model, tokenizer, reward_model, chunk, progress, batch_size=batch_size, **settings
                )
                for row in rows:
                    if results and row["question_id"] in missing:
                        results.append(row)
            else:
                progress.update(sum(len(question["turns"]) for question in chunk))
    if results:
        results.finish()
    return on_main_process(lambda: results.rows_of(questions) if results else [])


def answer_and_score(model, tokenizer, reward_model, questions, progress, **settings) -> list[dict]:
    """The rows of a chunk: turn after turn, each with the conversation so far, then the rewards, if they can be."""
    per_turn = ("answers", "rewards", "scores", "scores_logged", "answer_tokens", "finished", "batch_sizes")
    rows = [{**question, **{key: [] for key in per_turn}} for question in questions]
    conversations: list[list[dict]] = [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        asked = [index for index, question in enumerate(questions) if turn < len(question["turns"])]
        for index in asked:
            conversations[index].append({"role": "user", "content": questions[index]["turns"][turn]})

        for answer in generate(model, tokenizer, [conversations[index] for index in asked], split=True, **settings):
            row = rows[asked[answer.index]]
            row["answers"].append(strip_thinking(answer.text))
            row["answer_tokens"].append(answer.tokens)
            row["finished"].append(answer.finished)
            row["batch_sizes"].append(answer.batch_size)
            progress.update()
        for index in asked:
            conversations[index].append({"role": "assistant", "content": rows[index]["answers"][turn]})
        if reward_model is None:
            continue
        rewards = reward_model.score([conversations[index] for index in asked])
        for index, reward in zip(asked, rewards, strict=True):
            rows[index]["rewards"].append(reward)
            rows[index]["scores"].append(to_score(reward))
            rows[index]["scores_logged"].append(to_logged_scale(reward))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


def scored_evaluation(
    args: argparse.Namespace, name: str, questions: list[dict], reward_model: RewardModel | None, **generation: Any
) -> Evaluation:
    """Questions answered by the chat template and scored; `generation`: max_new_tokens, temperature, backend."""
    answer = functools.partial(
        score_questions,
        reward_model=reward_model,
        questions=questions,
        batch_size=args.eval_batch_size,
        thinking=args.thinking,
        seed=args.seed,
        **generation,
    )
    summarise_rows, compare = functools.partial(summarise_scored, name), functools.partial(compare_scored, name)
    references = [
        (row["question_id"], [{"role": "user", "content": row["turns"][0]}], row["reference"], row["question_id"])
        for row in questions
        if "reference" in row
    ]
    tokens = functools.partial(conversation_tokens, questions, generation["max_new_tokens"])
    return Evaluation(name, len(questions), answer, summarise_rows, compare, references, split=True, tokens=tokens)


def conversation_tokens(questions: list[dict], max_new_tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that go through the model at most: a turn reads all before it once more. Without the template's own."""
    total = 0
    for question in questions:
        conversation = 0
        for ids in tokenizer(question["turns"])["input_ids"]:
            conversation += len(ids) + max_new_tokens
            total += conversation
    return total


def dpo_evaluations(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    mtbench: list[dict],
    asked: dict[str, tuple[list[dict], int]],
    *held_out: Evaluation,
) -> list[Evaluation]:
    """What a DPO script measures: `held_out`, TAT-QA, MT-Bench, what is `asked`, drift on their reference answers.

    `mtbench`: all its questions, of which --mtbench_limit are asked. `asked`: {name in EVALUATIONS: (questions, tokens
    of an answer)}, which the reward model scores; it is loaded in the main process.
    """
    evaluations = [*held_out]
    if args.do_eval:
        evaluations.append(tatqa_evaluation(args, tokenizer))
    if mtbench:
        questions = sample_questions(mtbench, args.mtbench_limit, args.seed)
        asked = {"mtbench": (questions, args.mtbench_max_tokens), **asked}
    reward_model = load_reward_model(args) if asked and main_process() else None
    for name, (questions, max_new_tokens) in asked.items():
        evaluations.append(scored_evaluation(args, name, questions, reward_model, max_new_tokens=max_new_tokens))
    return evaluations + reference_drift(args, tokenizer, evaluations)


def all_mtbench_questions(args: argparse.Namespace) -> list[dict]:
    """The questions of --mtbench_file, none of which may be trained on; [] with --no-do_mtbench."""
    return load_questions(args.mtbench_file, flag="--mtbench_file") if args.do_mtbench else []


# ---------------------------------------------------------------------------------------------------------------------
# The command line

DEMO = {
    "model": str(DEMO_DIR / "model"),
    "reward_model": str(DEMO_DIR / "reward_model"),
    "questions": str(DEMO_DIR / "mt_bench_ru.jsonl"),
    "output_dir": "demo_mtbench",
    "mtbench_max_tokens": 32,
}


# fmt: off
def build_parser() -> Parser:
    shown = (
        "demo model adapter questions language mtbench_questions_limit mtbench_max_tokens compare output_dir "
        "no_4bit reward_model dry_run"
    )
    parser = Parser("mtbench_eval.py", __doc__, shown)
    add_model_flags(parser)
    add_run_flags(parser, "experiments/mtbench_evaluations.jsonl", trains=False)
    add = add_group(parser, "what to measure", trains=False)
    add("--adapter", default="", help="output folder of a training run; without it the base model")
    add("--questions", "--mtbench_file", default="auto", help="JSONL or JSON file; auto fetches MT-Bench")
    add("--language", choices=["ru", "en"], default="ru", help="which set auto fetches")
    add("--compare", default="", help="per-question file of an earlier evaluation to compare with")
    add("--mtbench_limit", "--mtbench_questions_limit", "--limit", dest="mtbench_questions_limit", default=0,
        type=not_negative(int), metavar="N",
        help="ask a sample of this many; 0 = all")
    add_mtbench_flags(add)
    # the same command continues the evaluation
    parser.set_defaults(output_dir="mtbench_results", resume_from_checkpoint=None)
    return parser


# fmt: on
def earlier_results(path: str, questions: list[dict]) -> tuple[dict, list[dict]]:
    """The fingerprint of the MT-Bench file that --compare names, and its rows for `questions`.

    Raises InputError when it is another kind of file or answers none of the questions with these turns.
    """
    skipped = SkippedRows()
    fingerprint, rows = read_results(Path(path), skipped)
    needed = ("rewards", "scores", "scores_logged", "answer_tokens", "finished")
    is_whole = all(isinstance(fingerprint.get(name), dict) for name in ("reward_model", "generation"))
    for row in rows:
        columns: list[Any] = [row.get(name) for name in ("turns", *needed)]
        is_whole &= all(isinstance(values, list) and len(values) == len(columns[0]) > 0 for values in columns)
        is_whole = is_whole and all(isinstance(x, int | float) and math.isfinite(x) for x in sum(columns[1:], []))
    if not rows or not is_whole:
        raise InputError(f"--compare {path}: no per-question results; name an mtbench_*.jsonl of an output folder")
    skipped.report(f"damaged lines of {path}")
    turns = {question["question_id"]: question["turns"] for question in questions}
    rows = [row for row in rows if row["question_id"] in turns]
    other = [row["question_id"] for row in rows if row["turns"] != turns[row["question_id"]]]
    if not rows or other:
        what = f"asked other turns under question_id {other[0]}" if other else "answered none of these questions"
        raise InputError(f"--compare {path} {what}; compare evaluations of one question set")
    return fingerprint, rows


def check_settings(args: argparse.Namespace, earlier: dict, now: dict) -> None:
    """Warns when the answers to compare with had other settings. Raises InputError for another reward model."""
    if earlier["reward_model"] != now["reward_model"]:
        other = differing(earlier["reward_model"], now["reward_model"])
        raise InputError(
            f"--compare {args.compare} was scored by another reward model ({other}); score it by this one"
        )
    if earlier["generation"] != now["generation"]:
        other = differing(earlier["generation"], now["generation"])
        log.warning(
            "--compare %s had other settings (%s): part of the difference comes from that", args.compare, other
        )


def print_plan(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, questions: list[dict]) -> None:
    """What the evaluation would do, and its first question as the model will read it."""
    turns = sum(len(question["turns"]) for question in questions)
    log.info("%d questions, %d answers of up to %d tokens each", len(questions), turns, args.mtbench_max_tokens)
    first = [{"role": "user", "content": questions[0]["turns"][0]}]
    text = render(first, tokenizer, args)
    log.info("question %s as the model reads it:\n%s", questions[0]["question_id"], text)


def main(argv: list[str] | None = None) -> dict:
    """Runs the evaluation that `argv` asks for and returns its record."""
    args = parse_arguments(build_parser(), argv, DEMO)
    with recorded_run(args, argv, "mtbench_eval.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Answer, score, summarise, compare. Everything that can be wrong with the input is found before it writes."""
    questions = load_questions(
        args.questions, language=args.language, limit=args.mtbench_questions_limit, seed=args.mtbench_questions_seed
    )
    earlier_fingerprint, earlier = earlier_results(args.compare, questions) if args.compare else ({}, [])
    tokenizer = load_tokenizer(args)
    check_model(args, tokenizer, adapter=args.adapter)
    reward_model = load_reward_model(args)
    settings = dict(
        max_new_tokens=args.mtbench_max_tokens, temperature=args.mtbench_temperature, backend=args.mtbench_backend
    )
    fingerprint = evaluation_fingerprint(
        {}, questions, reward_model, **settings, thinking=args.thinking, seed=args.seed
    )
    if earlier:
        check_settings(args, earlier_fingerprint, fingerprint)
    if args.dry_run:
        print_plan(args, tokenizer, questions)
        return
    with timed(record, "load"):
        model = load_model(args)
        check_logits(model, f"--model {args.model}")
        if args.adapter:
            model = load_adapter(model, args.adapter)
    scorer = reward_model if main_process() else None
    evaluation = scored_evaluation(args, "mtbench", questions, scorer, **settings)
    model_settings = model_fingerprint(args, adapter_sha256(model))
    path = Path(args.output_dir) / "mtbench.jsonl"
    if main_process():
        # refuses the folder of another evaluation before anything in it changes
        ResultFile(path, {**model_settings, **fingerprint})
    folder = begin(record, {"questions": args.questions, "n": len(questions), "sha256": fingerprint["questions"]})
    with timed(record, "final"):
        rows = evaluation.answer(
            model,
            tokenizer,
            path=path,
            fingerprint=model_settings,
            use_cache=not (args.adapter or args.no_baseline_cache),
        )
    if not main_process():
        return
    title = f"{args.model} {args.adapter}".strip() + f", {len(rows)} questions"
    both = []
    if earlier:
        both = [new for _, new in pair_rows(earlier, rows)]
        record["baseline"] |= summarise_scored("mtbench", earlier)
        record["final"]["mtbench_compared"] = summarise(both)
        record["delta"] |= compare_scored("mtbench", earlier, both)
        if len(both) < len(rows):
            title += f"; baseline and differences on the {len(both)} that both answered"
    report(record, folder, [evaluation], {}, {"mtbench": rows}, title=title, details=True)
    if 0 < len(both) < len(rows):
        on_both = table_rows(record["baseline"], summarise_scored("mtbench", both), record["delta"], details=True)
        print_table(f"The {len(both)} questions that both answered", on_both)


if __name__ == "__main__":
    main()
