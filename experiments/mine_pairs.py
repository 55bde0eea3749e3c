"""Sample answers of a model, score them with the reward model, and write preference pairs: best against worst.

    poetry run python experiments/mine_pairs.py --model M --adapter DIR --prompts prompts.jsonl --output pairs.jsonl
    poetry run python dpo_train.py --model M --pairs pairs.jsonl --load_adapter DIR --adapter_trainable
    poetry run python experiments/mine_pairs.py --demo

PROMPTS is a JSONL, JSON or Parquet file of rows with `prompt` (a text or a list of {role, content} turns),
`question` or `messages` (whose last answer is not used). A prompt that contains what an evaluation asks is left out
and counted: the questions of --questions and --tatqa_dir, and the 25 instructions. Each prompt is answered --samples
times; answers that are empty or cut by the token limit are not used. A pair is {prompt, chosen, rejected, margin,
chosen_reward, rejected_reward, uid}; prompts whose best and worst answer are not more than --min_margin apart give
none and are counted. Answers and rewards are kept in OUTPUT.samples.jsonl as they come: the same command resumes
after a stop, and another --min_margin samples nothing again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import exit_code, shown_command

from llm_alignment import flags
from llm_alignment.checks import instruct_questions
from llm_alignment.conversations import refuse_needed
from llm_alignment.evaluation import Evaluation, read_items
from llm_alignment.files import InputError, digest, log, write_rows
from llm_alignment.hub import read_usable
from llm_alignment.leaks import LeakFinder, forbidden_texts, without_leaks
from llm_alignment.preferences import join_turns, read_turns
from llm_alignment.prompts import strip_thinking
from llm_alignment.results import ResultFile
from llm_alignment.runs import check_writable, held_alone
from llm_alignment.tatqa import question_texts, tatqa_file
from mtbench_eval import load_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_alignment.generation import Decoding
    from llm_alignment.rewards import RewardModel

PROMPTS_AT_ONCE = 32  # they are answered and kept together, so that a restart answers the others as before
READ = ("prompt", "question", "messages")  # the columns, of which a row needs one
DEMO = {name: str(flags.DEMO_DIR / name) for name in ("model", "reward_model")} | dict(
    prompts=str(flags.DEMO_DIR / "prompts.jsonl"), output="demo_pairs.jsonl", tatqa_dir=str(flags.DEMO_DIR / "tatqa"),
    questions=[str(flags.DEMO_DIR / f"mt_bench_{language}.jsonl") for language in ("ru", "en")], max_new_tokens=32,
)  # fmt: skip


def build_parser() -> flags.Parser:
    parser = flags.Parser("experiments/mine_pairs.py", __doc__)
    flags.add_model_flags(parser)
    add = parser.add_argument_group("pairs").add_argument
    add("--adapter", default="", help="output folder of a training run; without it the base model answers")
    add("--prompts", default="", metavar="FILE", help="prompts to answer")
    add("--samples", type=flags.number(int, 2), default=4, help="answers to a prompt; a pair needs two")
    add("--output", default="pairs.jsonl", metavar="FILE", help="pairs")
    add("--temperature", type=flags.positive_temperature, default=0.8, help="of the sampled answers")
    add("--top_p", type=flags.positive_ratio, default=0.95, help="of the sampled answers")
    add("--max_new_tokens", type=flags.positive(int), default=512, help="longest answer")
    add("--min_margin", type=flags.not_negative(float), default=0.0, help="least difference of the raw rewards")
    add("--questions", nargs="+", default=["mt_bench_ru.json", "mt_bench_en.json"], metavar="FILE",
        help="evaluation questions that no prompt may contain, fetched where missing")  # fmt: skip
    add("--tatqa_dir", default="", help="TAT-QA files whose validation questions no prompt may contain")
    add("--seed", type=flags.seed, default=42, help="seed of sampling")
    add("--demo", action="store_true", help="a miniature: CPU, a minute, no downloads")
    flags.add_scoring_flags(parser)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    if not args.prompts:
        raise InputError("--prompts is missing; name a file of prompts")
    return args


def read_prompts(args: argparse.Namespace) -> list[dict]:
    """The prompts [{"question_id", "prompt": turns}], each once, without those that an evaluation asks."""
    rows = read_usable(args.prompts, "--prompts", prompt_turns, "prompt, question or messages")
    prompts = {digest(turns)[:16]: turns for turns in rows}
    if twice := len(rows) - len(prompts):
        log.info("%s: %d prompts occur more than once; each is used once", args.prompts, twice)
    items = [{"question_id": key, "prompt": turns} for key, turns in prompts.items()]
    asked = [question for path in args.questions for question in load_questions(path, flag="--questions")]
    texts, _ = forbidden_texts({"instruction": instruct_questions(0), "MT-Bench question": asked})
    if args.tatqa_dir:
        texts["TAT-QA question"] = question_texts(tatqa_file(args.tatqa_dir, "validation"))
    if clean := without_leaks(items, LeakFinder(texts), "prompts", {}):
        return clean
    raise InputError(f"--prompts {args.prompts}: the evaluations ask every one of them; name other prompts")


def prompt_turns(row: dict) -> list[dict[str, str]]:
    """The turns of a prompt, a user's first and last, by `join_turns`. ValueError with the reason for none."""
    refuse_needed(row, "the row", READ)
    turns = read_turns(row.get("system"), "system", "system")
    turns += read_turns(next((row[key] for key in READ if row.get(key)), None), "user", "the prompt")
    turns.sort(key=lambda turn: turn["role"] != "system")
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return join_turns(turns, [{"role": "assistant", "content": "to be sampled"}])[:-1]


def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict], *, decodings: list[Decoding]
) -> list[dict]:
    """The rows {"question_id", "prompt", "answers", "finished"} of prompts; an answer for each of `decodings`."""
    from llm_alignment import generation

    rows = [{**item, "answers": [], "finished": []} for item in items]
    chats = [item["prompt"] for item in items]
    for number, decoding in enumerate(decodings, 1):
        for answer in generation.generate(model, tokenizer, chats, decoding, description=f"sample {number}"):
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
        samples = zip(row["rewards"], row["answers"], row["finished"], strict=True)
        usable = [(reward, text) for reward, text, finished in samples if text and finished]
        (low, rejected), (high, chosen) = min(usable, default=(0, "")), max(usable, default=(0, ""))
        if high - low > min_margin and chosen != rejected:
            prompt = row["prompt"] if len(row["prompt"]) > 1 else row["prompt"][0]["content"]
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": high - low}
            pairs.append(pair | {"chosen_reward": high, "rejected_reward": low, "uid": f"mined:{row['question_id']}"})
    return pairs, len(rows) - len(pairs)


def mine(args: argparse.Namespace) -> None:
    """Prompts in, pairs out. Raises InputError when a file cannot be written, or is one that is read."""
    pairs_file, samples_file = Path(args.output), Path(f"{args.output}.samples.jsonl")
    inputs = {Path(name).resolve(): name for name in (args.prompts, *args.questions)}
    for path in (pairs_file, samples_file):
        check_writable(path, "--output")
        if path.resolve() in inputs:
            raise InputError(f"--output {args.output}: it would replace {inputs[path.resolve()]}; name another file")
    prompts = read_prompts(args)
    refusal = f"--output {pairs_file}: another start is writing it; wait for its end or name another file"
    with held_alone(Path(f"{pairs_file}.lock"), refusal):
        pairs, without_margin = best_against_worst(sampled(args, prompts, samples_file), args.min_margin)
        if not pairs:
            none = f"--prompts {args.prompts}: no prompt has two finished answers more than {args.min_margin} apart"
            raise InputError(f"{none}; raise --samples, --temperature or --max_new_tokens")
        write_rows(pairs_file, pairs)
    margin = statistics.median(pair["margin"] for pair in pairs)
    log.info("%d prompts gave a pair, %d gave none; median margin %.2f", len(pairs), without_margin, margin)
    training = ["--model", args.model, "--pairs", args.output]
    training += ["--load_adapter", args.adapter, "--adapter_trainable"] if args.adapter else []
    log.info("wrote %s; train on it: %s", args.output, shown_command("dpo_train.py", training))


def sampled(args: argparse.Namespace, prompts: list[dict], path: Path) -> list[dict]:
    """The rows of the prompts with answers and rewards, kept in `path`; what is there already is not sampled again."""
    from llm_alignment import adapters, generation, models, rewards

    base = models.resolve_base(flags.fill(models.BaseFlags, args))
    tokenizer, model = models.load_tokenizer(base), models.load_model(base)
    model = adapters.load_adapter(model, args.adapter) if args.adapter else model
    reward_model = rewards.load_reward_model(args.reward_model, args.eval_batch_size, args.trust_remote_code)
    shared = flags.fill(generation.Decoding, args, batch_size=args.eval_batch_size)
    decodings = [dataclasses.replace(shared, seed=args.seed + 1009 * number) for number in range(args.samples)]
    sampling = {key: getattr(args, key) for key in ("samples", "temperature", "top_p", "max_new_tokens", "seed")}
    asked = {"reward_model": reward_model.fingerprint, "sampling": sampling}
    read = functools.partial(sample_answers, decodings=decodings)
    grade = functools.partial(score_samples, reward_model=reward_model)
    fingerprint = {**models.base_fingerprint(base, thinking=args.thinking), "adapter": adapters.adapter_sha256(model)}
    for row in ResultFile(path, fingerprint | asked).rows.values():
        if not is_sample(row, args.samples):
            raise InputError(f"{path}: the row of question_id {row['question_id']} is damaged; delete its line")
    evaluation = Evaluation(
        name="samples", items=prompts, read=read, grade=grade, settings=asked, rows_at_once=lambda _: PROMPTS_AT_ONCE
    )
    return read_items(evaluation, lambda: model, tokenizer, path, fingerprint=fingerprint, renew=False)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: mine(parse(argv)), logs=True)


if __name__ == "__main__":
    raise SystemExit(main())
