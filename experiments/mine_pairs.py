"""Sample answers of a model, score them with the reward model, and write preference pairs: best against worst.

    poetry run python experiments/mine_pairs.py --model M --adapter DIR --prompts prompts.jsonl --output pairs.jsonl
    poetry run python dpo_train.py --model M --pairs pairs.jsonl --load_adapter DIR --adapter_trainable
    poetry run python experiments/mine_pairs.py --demo

PROMPTS is a JSONL, JSON or Parquet file of rows with `prompt` (a text or a list of {role, content} turns),
`question` or `messages` (whose last answer is not used). A prompt that contains what an evaluation asks is left out
and counted: the questions of --questions and --tatqa_dir, and the 25 instructions. Each prompt is answered --samples
times; answers that are empty or cut by the token limit are not used. A pair is {prompt, chosen, rejected, margin,
chosen_reward, rejected_reward, uid}; prompts whose best and worst answer are not more than --min_margin apart give
none and are counted.

Answers and rewards of every prompt are kept in OUTPUT.samples.jsonl as they come: the same command resumes after a
stop, and another --min_margin samples nothing again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import logged_exit_code, shown_command

from llm_alignment.adapters import adapter_sha256, load_adapter
from llm_alignment.evaluation import Evaluation, read_items
from llm_alignment.files import InputError, digest, write_rows
from llm_alignment.flags import (
    DEMO_DIR,
    add_model_flags,
    add_scoring_flags,
    fill,
    not_negative,
    positive,
    positive_ratio,
    positive_temperature,
    seed,
)
from llm_alignment.generation import Decoding, generate
from llm_alignment.hub import read_usable
from llm_alignment.instructions import instruct_questions
from llm_alignment.leaks import LeakFinder, without_leaks
from llm_alignment.messages import refuse_needed
from llm_alignment.models import BaseFlags, base_fingerprint, load_model, load_tokenizer, resolve_base
from llm_alignment.parser import Parser
from llm_alignment.preferences import merge_system_prompt, read_turns
from llm_alignment.prompts import strip_thinking
from llm_alignment.results import ResultFile
from llm_alignment.rewards import RewardModel
from llm_alignment.runs import check_writable, held_alone
from llm_alignment.tatqa import question_texts, tatqa_file
from mtbench_eval import load_questions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("llm_alignment")

PROMPTS_AT_ONCE = 32  # they are answered and kept together, so that a restart answers the others as before
DEMO = {
    "model": str(DEMO_DIR / "model"),
    "reward_model": str(DEMO_DIR / "reward_model"),
    "prompts": str(DEMO_DIR / "prompts.jsonl"),
    "output": "demo_pairs.jsonl",
    "questions": [str(DEMO_DIR / "mt_bench_ru.jsonl"), str(DEMO_DIR / "mt_bench_en.jsonl")],
    "tatqa_dir": str(DEMO_DIR / "tatqa"),
    "max_new_tokens": 32,
}


def build_parser() -> Parser:
    parser = Parser("experiments/mine_pairs.py", __doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("pairs").add_argument
    add("--adapter", default="", help="output folder of a training run (default: the base model)")
    add("--prompts", default="", metavar="FILE", help="prompts to answer")
    add("--samples", type=positive(int), default=4, help="answers to a prompt (default: %(default)s)")
    add("--output", default="pairs.jsonl", metavar="FILE", help="pairs (default: %(default)s)")
    add("--temperature", type=positive_temperature, default=0.8, help="of the sampled answers (default: %(default)s)")
    add("--top_p", type=positive_ratio, default=0.95, help="of the sampled answers (default: %(default)s)")
    add("--max_new_tokens", type=positive(int), default=512, help="longest answer (default: %(default)s)")
    add(
        "--min_margin", type=not_negative(float), default=0.0, help="least difference of the raw rewards (%(default)s)"
    )
    add(
        "--questions",
        nargs="+",
        default=["mt_bench_ru.json", "mt_bench_en.json"],
        metavar="FILE",
        help="evaluation questions that no prompt may contain (default: %(default)s, fetched where missing)",
    )
    add("--tatqa_dir", default="", help="TAT-QA files whose validation questions no prompt may contain")
    add("--seed", type=seed, default=42, help="seed of sampling (default: %(default)s)")
    add("--demo", action="store_true", help="a miniature: CPU, a minute, no downloads")
    add_scoring_flags(parser)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    if not args.prompts:
        raise InputError("--prompts is missing; name a file of prompts")
    if args.samples < 2:
        raise InputError(f"--samples {args.samples}: a pair needs two answers; give 2 or more")
    return args


def read_prompts(args: argparse.Namespace) -> list[dict]:
    """The prompts [{"question_id", "prompt": turns}], each once, without those that an evaluation asks."""
    rows = read_usable(args.prompts, "--prompts", prompt_turns, "prompt, question or messages")
    prompts = {}
    for turns in rows:
        key = digest(turns)[:16]
        prompts[key] = {"question_id": key, "prompt": turns}
    if len(prompts) < len(rows):
        twice = len(rows) - len(prompts)
        log.info("%s: %d prompts occur more than once; each is used once", args.prompts, twice)
    counts: dict[str, int] = {}
    clean = without_leaks(list(prompts.values()), LeakFinder(asked_texts(args)), "prompts", counts)
    if not clean:
        raise InputError(f"--prompts {args.prompts}: the evaluations ask every one of them; name other prompts")
    return clean


def prompt_turns(row: dict) -> list[dict[str, str]]:
    """The turns of a prompt, from a user's to a user's; a system text stands before the first question.

    Raises ValueError with the reason when the row holds none.
    """
    value = next((row[key] for key in ("prompt", "question", "messages") if row.get(key)), None)
    refuse_needed(row, "the row", ("prompt", "question", "messages"))
    turns = read_turns(value, "user", "the prompt")
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    turns = [turn for turn in turns if turn["role"] != "system"]
    roles = [turn["role"] for turn in turns]
    if not turns:
        raise ValueError("no prompt")
    if roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ValueError("user and assistant do not take turns")
    if not all(turn["content"] for turn in turns):
        raise ValueError("an empty turn")
    return [{"role": "user", "content": merge_system_prompt(system, turns[0]["content"])}, *turns[1:]]


def asked_texts(args: argparse.Namespace) -> dict[str, list[str]]:
    """What the evaluations ask, by kind."""
    texts = {"instruction": [question["turns"][0] for question in instruct_questions(0, args.seed)]}
    texts["MT-Bench question"] = [
        question["turns"][0] for path in args.questions for question in load_questions(path, flag="--questions")
    ]
    if args.tatqa_dir:
        texts["TAT-QA question"] = question_texts(tatqa_file(args.tatqa_dir, "validation"))
    return texts


def sample_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[dict],
    *,
    decodings: list[Decoding],
) -> list[dict]:
    """The rows {"question_id", "prompt", "answers", "finished"} of prompts; an answer for each of `decodings`."""
    rows = [{**item, "answers": [], "finished": []} for item in items]
    chats = [item["prompt"] for item in items]
    for number, decoding in enumerate(decodings, 1):
        for answer in generate(model, tokenizer, chats, decoding, description=f"sample {number}"):
            rows[answer.index]["answers"].append(strip_thinking(answer.text))
            rows[answer.index]["finished"].append(answer.finished)
    return rows


def score_samples(rows: list[dict], *, reward_model: RewardModel) -> list[dict]:
    """The rows with "rewards"."""
    flat = [[*row["prompt"], {"role": "assistant", "content": text}] for row in rows for text in row["answers"]]
    rewards = iter(reward_model.score(flat))
    return [{**row, "rewards": [next(rewards) for _ in row["answers"]]} for row in rows]


def is_sample(row: dict, samples: int) -> bool:
    """Whether a row that was read has what `sample_answers` puts there."""
    kinds: dict[str, Any] = {"answers": str, "rewards": int | float, "finished": bool}
    return digest(row.get("prompt"))[:16] == row["question_id"] and all(
        isinstance(row.get(key), list)
        and len(row[key]) == samples
        and all(isinstance(item, kind) and (kind is str or math.isfinite(item)) for item in row[key])
        for key, kind in kinds.items()
    )


def best_against_worst(rows: list[dict], min_margin: float) -> tuple[list[dict], int]:
    """The pairs of the sampled rows, and how many prompts gave none."""
    pairs = []
    for row in rows:
        usable = [
            (reward, text)
            for text, reward, finished in zip(row["answers"], row["rewards"], row["finished"], strict=True)
            if text and finished
        ]
        if not usable:
            continue
        (low, rejected), (high, chosen) = min(usable), max(usable)
        if high - low > min_margin and chosen != rejected:
            prompt = row["prompt"] if len(row["prompt"]) > 1 else row["prompt"][0]["content"]
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": high - low}
            uid = f"mined:{row['question_id']}"
            pairs.append({**pair, "chosen_reward": high, "rejected_reward": low, "uid": uid})
    return pairs, len(rows) - len(pairs)


def output_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """Where the pairs and the samples go. Raises InputError when they cannot, or when they are what is read."""
    files = Path(args.output), Path(f"{args.output}.samples.jsonl")
    inputs = {Path(name).resolve(): name for name in (args.prompts, *args.questions)}
    for path in files:
        check_writable(path, "--output")
        if path.resolve() in inputs:
            raise InputError(f"--output {args.output}: it would replace {inputs[path.resolve()]}; name another file")
    return files


def mine(args: argparse.Namespace) -> None:
    """Prompts in, pairs out."""
    pairs_file, samples_file = output_files(args)
    prompts = read_prompts(args)
    refusal = f"--output {pairs_file}: another start is writing it; wait for its end or name another file"
    with held_alone(Path(f"{pairs_file}.lock"), refusal):
        write_pairs(args, prompts, pairs_file, samples_file)


def write_pairs(args: argparse.Namespace, prompts: list[dict], pairs_file: Path, samples_file: Path) -> None:
    """Samples what is not in `samples_file` yet, and writes the pairs."""
    base = resolve_base(fill(BaseFlags, args))
    tokenizer, model = load_tokenizer(base), load_model(base)
    if args.adapter:
        model = load_adapter(model, args.adapter)
    own_code = args.trust_remote_code
    reward_model = RewardModel(args.reward_model, batch_size=args.eval_batch_size, trust_remote_code=own_code)
    shared = fill(Decoding, args, batch_size=args.eval_batch_size)
    decodings = [dataclasses.replace(shared, seed=args.seed + 1009 * number) for number in range(args.samples)]
    evaluation = Evaluation(
        name="samples",
        items=prompts,
        read=functools.partial(sample_answers, decodings=decodings),
        grade=functools.partial(score_samples, reward_model=reward_model),
        settings={
            "reward_model": reward_model.fingerprint,
            "sampling": {
                key: getattr(args, key) for key in ("samples", "temperature", "top_p", "max_new_tokens", "seed")
            },
        },
        rows_at_once=lambda model: PROMPTS_AT_ONCE,
    )
    fingerprint = {**base_fingerprint(base, thinking=args.thinking), "adapter": adapter_sha256(model)}
    for row in ResultFile(samples_file, {**fingerprint, **evaluation.settings}).rows:
        if not is_sample(row, args.samples):
            raise InputError(
                f"{samples_file}: the row of question_id {row['question_id']} is damaged; delete its line, and the "
                "prompt is sampled again"
            )
    rows = read_items(evaluation, lambda: model, tokenizer, samples_file, fingerprint=fingerprint, renew=False)
    pairs, without_margin = best_against_worst(rows, args.min_margin)
    if not pairs:
        raise InputError(
            f"--prompts {args.prompts}: no prompt has two finished answers more than {args.min_margin} apart; raise "
            "--samples, --temperature or --max_new_tokens"
        )
    write_rows(pairs_file, pairs)
    margin = statistics.median(pair["margin"] for pair in pairs)
    log.info("%d prompts gave a pair, %d gave none; median margin %.2f", len(pairs), without_margin, margin)
    flags = ["--model", args.model, "--pairs", args.output]
    flags += ["--load_adapter", args.adapter, "--adapter_trainable"] if args.adapter else []
    log.info("wrote %s; train on it: %s", args.output, shown_command("dpo_train.py", flags))


def main(argv: list[str] | None = None) -> int:
    return logged_exit_code(lambda: mine(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
