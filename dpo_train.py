"""DPO on TAT-QA: questions on financial tables, answered rightly (chosen) and plausibly wrong (rejected).

    L = -log sigmoid(beta * (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

The reference is the same 4-bit base with the adapter switched off. Chosen and rejected share the prompt, so each pair
goes through the model as one sequence: prompt, chosen answer, rejected answer, with the answers hidden from each
other; only the answers go through the LM head. TAT-QA, MT-Bench, instruction following and, with --eval_pairs, the
rewards of held-out pairs are measured before and after.

    poetry run python dpo_train.py --model Qwen/Qwen3-1.7B --output_dir qwen3_tatqa_dpo_base --beta 0.02 --epochs 1
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import statistics
import string
import sys
import types
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mtbench_eval
from mtbench_eval import InputError, ResultFile, SkippedRows, log

# torch and its family take ten seconds to import, so functions import them: --help and a wrong flag answer at once.
if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOTrainer

# ---------------------------------------------------------------------------------------------------------------------
# Arguments

DEMO = dict(
    model=str(mtbench_eval.DEMO_DIR / "model"),
    reward_model=str(mtbench_eval.DEMO_DIR / "reward_model"),
    tatqa_dir=str(mtbench_eval.DEMO_DIR / "tatqa"),
    mtbench_file=str(mtbench_eval.DEMO_DIR / "mt_bench_en.jsonl"),
    output_dir="demo_dpo",
    limit_pairs=480,
    beta=0.5,
    batch=4,
    grad_acc=2,
    learning_rate=1e-3,
    eval_limit=200,
    eval_max_new_tokens=16,
    eval_pairs=200,
    mtbench_max_tokens=32,
    instruct_max_tokens=32,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Defaults are those of the published runs where they had one."""
    parser = mtbench_eval.new_parser("dpo_train.py", __doc__)
    add_dpo_flags(parser)
    parser.add_argument(
        "--eval_pairs",
        type=mtbench_eval.not_negative(int),
        default=0,
        help="pairs of --eval_split, none of them trained on, whose reward accuracy is measured; 0 (default) = none",
    )
    parser.set_defaults(output_dir="qwen3_tatqa_dpo_base")
    return parser


def add_dpo_flags(parser: argparse.ArgumentParser) -> None:
    """What every DPO script takes; a script sets its own defaults with `parser.set_defaults`."""
    ratio, positive, not_negative = mtbench_eval.ratio, mtbench_eval.positive, mtbench_eval.not_negative
    on_off = argparse.BooleanOptionalAction
    mtbench_eval.add_model_flags(parser)
    mtbench_eval.add_lora_flags(parser)
    mtbench_eval.add_training_flags(parser)
    mtbench_eval.add_run_flags(parser, exp_log="experiments/dpo_experiments.jsonl")
    parser.add_argument("--output_dir", help="folder of the run (default: %(default)s)")

    group = parser.add_argument_group("DPO", "dropout is off, as in TRL: policy and reference agree at the first step")
    group.add_argument("--beta", type=positive(float), default=0.03, help="pull towards the reference (0.03)")
    group.add_argument("--max_prompt_length", type=positive(int), default=2048, help="tokens a prompt is cut to")
    group.add_argument("--max_length", type=positive(int), default=3072, help="tokens of prompt and answer together")
    group.add_argument(
        "--use_chat_template", action="store_true", help="wrap prompts in it (plain text, as published)"
    )
    group.add_argument("--no_prefix_sharing", action="store_true", help="read a pair's prompt once for each answer")
    group.add_argument("--no_train", action="store_true", help="only evaluate")
    group.add_argument(
        "--limit_pairs", type=not_negative(int), default=0, help="a sample of N pairs; 0 (default) = all"
    )
    group.add_argument("--load_adapter", default="", metavar="DIR", help="start from this adapter")
    group.add_argument("--adapter_trainable", action="store_true", help="go on training it; it is the reference too")

    group = parser.add_argument_group("TAT-QA")
    group.add_argument("--tatqa_dir", default="", metavar="PATH", help="folder of its JSON files (default: the hub)")
    group.add_argument("--tatqa_split", choices=list(TATQA_FILES), default="train", help="split to train on (train)")
    group.add_argument("--tatqa_table_rows", type=positive(int), default=20, help="rows of a table to show (20)")
    group.add_argument("--tatqa_table_cols", type=positive(int), default=8, help="columns of a table to show (8)")
    group.add_argument(
        "--tatqa_para_chars", type=not_negative(int), default=1200, help="characters of passages (1200)"
    )
    group.add_argument(
        "--tatqa_only_rel_paras", action=on_off, default=True, help="only passages a question refers to"
    )

    group = parser.add_argument_group("measuring")
    group.add_argument("--do_eval", action=on_off, default=True, help="TAT-QA")
    group.add_argument("--eval_baseline", action=on_off, default=True, help="measure before training too")
    group.add_argument("--eval_split", choices=list(TATQA_FILES), default="validation", help="(validation)")
    group.add_argument("--eval_limit", type=not_negative(int), default=1000, help="TAT-QA questions; 0 = all (1000)")
    group.add_argument("--eval_max_new_tokens", type=positive(int), default=64, help="tokens of an answer (64)")
    group.add_argument("--eval_temperature", type=not_negative(float), default=0.0, help="0 (default) = greedy")
    group.add_argument("--eval_top_p", type=ratio, default=1.0)
    group.add_argument("--eval_save_json", default="", metavar="FILE", help="also write TAT-QA's answers to this file")
    group.add_argument("--do_mtbench", action=on_off, default=True, help="MT-Bench")
    group.add_argument("--mtbench_file", default="mt_bench_ru.json", help="questions, fetched when missing")
    group.add_argument("--mtbench_limit", type=not_negative(int), default=50, help="a sample of N; 0 = all (50)")
    group.add_argument("--mtbench_max_tokens", type=positive(int), default=256, help="new tokens a turn (256)")
    group.add_argument("--do_instruct", action=on_off, default=True, help="instruction following")
    group.add_argument("--instruct_limit", type=not_negative(int), default=25, help="instructions (25)")
    group.add_argument("--instruct_max_tokens", type=positive(int), default=512, help="new tokens (512)")
    parser.set_defaults(batch=2, grad_acc=16, learning_rate=5e-6)


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    if args.max_prompt_length >= args.max_length:
        raise InputError(
            f"--max_prompt_length {args.max_prompt_length} leaves no room for an answer within --max_length "
            f"{args.max_length}; raise --max_length"
        )
    if args.eval_save_json and Path(args.eval_save_json).is_dir():
        raise InputError(f"--eval_save_json {args.eval_save_json} is a folder; name a file")
    if args.adapter_trainable and not args.load_adapter:
        raise InputError("--adapter_trainable needs --load_adapter DIR: which adapter is to be trained on")
    if args.load_adapter and not args.adapter_trainable and not args.no_train:
        raise InputError("--load_adapter: add --adapter_trainable to train it on, or --no_train to only measure it")


def neutral_flags(args: argparse.Namespace) -> set[str]:
    """Flags that do not change which adapter comes out."""
    measuring = {name for name in vars(args) if name.startswith(("eval_", "do_", "mtbench_", "instruct_"))}
    return mtbench_eval.NEUTRAL_FLAGS | measuring | {"reward_model"}


def prompt_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that shape a TAT-QA prompt, as `tatqa_prompt` takes them."""
    names = ("table_rows", "table_cols", "para_chars", "only_rel_paras")
    return {name: getattr(args, f"tatqa_{name}") for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# TAT-QA: reading


TATQA_FILES = {
    "train": "tatqa_dataset_train.json",
    "validation": "tatqa_dataset_dev.json",
    "test": "tatqa_dataset_test_gold.json",
}
ANSWER_TYPES = ("span", "multi-span", "arithmetic", "count")
SCALES = {"": 1, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000, "percent": 0.01}


def tatqa_file(args: argparse.Namespace, split: str) -> Path:
    """The JSON file of a split: in --tatqa_dir, else fetched from the hub."""
    if args.tatqa_dir:
        return Path(args.tatqa_dir) / TATQA_FILES[split]
    import huggingface_hub

    with mtbench_eval.hub_errors("next-tat/TAT-QA", "--tatqa_dir"):
        return Path(huggingface_hub.hf_hub_download("next-tat/TAT-QA", TATQA_FILES[split], repo_type="dataset"))


def read_tatqa(path: Path, skipped: SkippedRows) -> list[dict]:
    """Reads a TAT-QA file: a list of contexts {"table", "paragraphs", "questions"}.

    Read with the json module, because `answer` mixes lists, strings and numbers. Questions that cannot be used go to
    `skipped`. Raises InputError, with the place, when the file is missing, truncated or of another shape, or when no
    question is left.
    """
    try:
        contexts = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --tatqa_dir takes the folder that holds {path.name}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(contexts, list):
        raise InputError(f"{path}: not a list of contexts; fetch the TAT-QA file of that name again")
    found = 0
    for number, context in enumerate(contexts, 1):
        try:
            cells = [cell for row in context["table"]["table"] for cell in row]
            texts = [passage["text"] for passage in context["paragraphs"]]
            texts += [question[key] for question in context["questions"] for key in ("uid", "question")]
            orders = [str(passage["order"]) for passage in context["paragraphs"]]
            is_whole = all(isinstance(text, str) for text in cells + texts) and all(map(str.isdigit, orders))
        except (TypeError, KeyError):
            is_whole = False
        if not is_whole:
            raise InputError(f"{path}: context {number} is not a table of strings, passages and questions as TAT-QA's")
        usable = []
        for question in context["questions"]:
            problem = question_problem(context, question)
            if problem:
                skipped.add(f"{path.name}: context {number}, question {question['uid']}", problem)
            else:
                usable.append(question)
        context["questions"] = usable
        found += len(usable)
    if not found:
        raise InputError(f"{path}: no usable question ({'; '.join(skipped.places) or 'the file is empty'})")
    return contexts


def question_problem(context: dict, question: dict) -> str | None:
    """Says why a question cannot be used, or returns None."""
    kind, answer = question.get("answer_type"), question.get("answer")
    if kind not in ANSWER_TYPES:
        return f"answer type {kind!r} is not one of {', '.join(ANSWER_TYPES)}"
    if question.get("scale") not in list(SCALES):
        return f"scale {question.get('scale')!r} is not one of {', '.join(filter(None, SCALES))} or empty"
    if not any(cell.strip() for row in context["table"]["table"] for cell in row):
        return "the table is empty"
    if answer is None or answer in ("", []):
        return "no answer"
    if kind in ("span", "multi-span"):
        if not isinstance(answer, list) or not all(isinstance(part, str) for part in answer):
            return "the answer is not a list of strings"
        if not any(part.strip() for part in answer):
            return "no answer"
    elif not re.fullmatch(r"-?\d+" if kind == "count" else r"-?\d+(\.\d+)?(e[-+]?\d+)?", str(answer)):
        return f"the answer {answer!r} is not a number"
    return None


def tatqa_prompt(
    context: dict,
    question: dict,
    *,
    table_rows: int = 20,
    table_cols: int = 8,
    para_chars: int = 1200,
    only_rel_paras: bool = True,
) -> str:
    """The prompt: role, the table in Markdown, passages, the question, "Answer:".

    What the questions of one context share comes first, so that an evaluation can read it once. Of the passages, in
    their order, the first `para_chars` characters are kept, cut at a word; with `only_rel_paras` only of those that
    the question refers to.
    """
    rows = [
        "| " + " | ".join(cell.replace("|", "/").strip() for cell in row[:table_cols]) + " |"
        for row in context["table"]["table"][:table_rows]
    ]
    rows.insert(1, "|" + " --- |" * min(len(context["table"]["table"][0]), table_cols))
    relevant = question.get("rel_paragraphs") or []
    passages = "\n".join(
        passage["text"].strip()
        for passage in sorted(context["paragraphs"], key=lambda passage: int(passage["order"]))
        if not only_rel_paras or str(passage["order"]) in relevant
    )
    if len(passages) > para_chars:
        passages = passages[: para_chars + 1].rsplit(None, 1)[0]
    text = f"\n\nText:\n{passages}" if passages else ""
    return (
        "You are a financial analyst. Answer the question from the table and the text with the answer alone, followed "
        'by its scale (thousand, million, billion or percent) if it has one; separate several answers with ";".\n\n'
        f"Table:\n{chr(10).join(rows)}{text}{QUESTION_MARK} {question['question'].strip()}\nAnswer:"
    )


QUESTION_MARK = "\n\nQuestion:"  # truncation keeps a prompt from here on

# ---------------------------------------------------------------------------------------------------------------------
# TAT-QA: metrics


def tatqa_em_f1(question: dict, prediction: str | list[str], scale: str) -> tuple[float, float]:
    """The official exact match and F1 of one prediction, both 0..1.

    Source: tatqa_metric.py of https://github.com/NExTplusplus/TAT-QA, whose oddities are kept ("(1,234)" is positive
    because of its comma), so that figures compare with published ones.
    """
    import numpy as np

    gold = question["answer"]
    if question["answer_type"] in ("arithmetic", "count"):
        gold = [str(int(gold) if question["answer_type"] == "count" else gold)]
    if not prediction or not gold:
        return 0.0, 0.0
    parts = prediction if isinstance(prediction, list) else [prediction]
    forms = [_answer_string(parts, scale)]
    if len(parts) == 1 and not scale and "%" not in parts[0]:
        value = _to_number(parts[0])
        if value is not None:  # a share may be given bare: 0.2342 for 23.42 percent
            forms.append(f"{value:.4f}")
    gold_tokens = _normalise(_answer_string(gold, question["scale"])).split()
    best = (0.0, 0.0)
    for form in forms:
        tokens = _normalise(form).split()
        em = float(tokens == gold_tokens)
        best = max(best, (em, float(np.round(_bag_f1(set(tokens), set(gold_tokens)), 2))))
    em, f1 = best
    return em, em if question["answer_type"] in ("arithmetic", "count") else f1


def _answer_string(parts: list[str], scale: str) -> str:
    """One string for an answer: numbers by their value times the scale, other parts followed by the scale's name."""
    strings = []
    for part in sorted(map(str, parts)):
        value = _to_number(part)
        if value is None:
            strings.append(f"{part} {scale}" if scale else part)
        elif "%" in part:
            strings.append(f"{value:.4f}")
        else:
            strings.append(f"{round(value, 2) * SCALES[scale]:.4f}")
    return " ".join(strings)


def _is_number(text: str) -> bool:
    words = _bare(text).split()
    try:
        is_nan = math.isnan(float(words[0]))
    except (ValueError, IndexError):
        return False
    return not is_nan and (len(words) == 1 or _scale_value(words[1]) != 1)


def _to_number(text: str) -> float | None:
    """The value of a text that is a number, else None: "(1.5)" is -1.5, "12%" is 0.12, "1.5 million" is 1500000."""
    first = re.search(r"([+-]?\d+(?:\.\d+)?)|[+-]?\.\d+", _bare(text))
    if not _is_number(text) or not first or first[1] is None:
        return None
    value = float(first[1]) if "." in first[1] else int(first[1])
    unit = re.search(r"[\d.]+\s?[a-zA-Z]+", text)
    value *= _scale_value(unit[0]) if unit else 1
    value *= -1 if re.search(r"\([\d.\s]+\)", text) else 1
    value *= 0.01 if re.search(r"[\d.\s]+%", text) else 1
    return round(value, 4)


def _bare(text: str) -> str:
    return "".join(char for char in text if char not in "'\"\\$€£¥%(),[]")


def _scale_value(text: str) -> float:
    """The factor of the scale word that the text holds; 1 without one."""
    values = {"hundred": 100, **SCALES}
    return next((value for word, value in values.items() if word and word in text.lower()), 1)


def _normalise(text: str) -> str:
    tokens = []
    for token in text.lower().split(" "):
        if not _is_number(token):
            token = "".join(char for char in token if char not in string.punctuation)
        if _is_number(token):
            token = str(_to_number(token))
        tokens += re.sub(r"\b(a|an|the)\b", " ", token).split()
    return " ".join(tokens)


def _bag_f1(predicted: set[str], gold: set[str]) -> float:
    common = len(predicted & gold)
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def tatqa_em_like(question: dict, text: str) -> bool:
    """The metric of the published runs.

    Arithmetic and count: the first number in the text is within max(0.5, 5 % of |gold|) of gold. Otherwise a gold
    span, normalised, is contained in the normalised text.
    """
    if question["answer_type"] in ("arithmetic", "count"):
        first = re.search(r"(\()?(?<![\w.])([-\u2212]?)\s?[$€£¥]?\s?(\d[\d,]*(?:\.\d+)?|\.\d+)", text)
        if not first:
            return False
        value, gold = float(first[3].replace(",", "")), float(question["answer"])
        value *= -1 if first[2] or first[1] else 1
        return abs(value - gold) <= max(0.5, 0.05 * abs(gold))
    normalised = _normalise(text)
    return any(span in normalised for span in map(_normalise, question["answer"]) if span)


def tatqa_parse(text: str) -> tuple[list[str], str]:
    """A model's text as (answer parts, scale): its first line, parts separated by ";", a scale word at the end."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    line = re.sub(r"^\s*(the )?answer( is)?\s*:?\s+", "", line, flags=re.IGNORECASE).strip()
    if _is_number(line.removesuffix(".")):
        line = line.removesuffix(".")
    parts = [part.strip() for part in line.split(";") if part.strip()]
    scale_at_end = re.compile(r"\s+(thousand|million|billion|percent)$", re.IGNORECASE)
    scaled = [part for part in parts if scale_at_end.search(part)]
    if not parts or scaled != parts[-1:]:  # several parts that each carry a scale keep their own
        return parts, ""
    scale = scale_at_end.search(parts[-1])[1].lower()
    return [*parts[:-1], scale_at_end.sub("", parts[-1])], scale


# ---------------------------------------------------------------------------------------------------------------------
# TAT-QA: pairs


def tatqa_pairs(
    contexts: list[dict], *, seed: int, skipped: SkippedRows | None = None, **prompt_options
) -> list[dict[str, str]]:
    """One preference pair {prompt, chosen, rejected, uid} for each question, sorted by uid.

    chosen is gold with its scale; rejected is the first plausible wrong answer that the official metric does not take
    for gold. A pair depends on its own context, its uid and the seed alone. Questions that give none go to `skipped`;
    `prompt_options` are those of `tatqa_prompt`.
    """
    pairs = []
    for context in contexts:
        for question in context["questions"]:
            chosen = _answer_text(_gold_parts(question), question["scale"])
            wrong = _wrong_answers(context, question, random.Random(f"{seed}:{question['uid']}"))
            texts = (_answer_text(parts, scale) for parts, scale in wrong)
            rejected = next((text for text in texts if not tatqa_em_f1(question, *tatqa_parse(text))[0]), None)
            if rejected is None:
                if skipped is not None:
                    skipped.add(f"question {question['uid']}", "the table gives no wrong answer")
                continue
            prompt = tatqa_prompt(context, question, **prompt_options)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "uid": question["uid"]})
    return sorted(pairs, key=lambda pair: pair["uid"])


def _gold_parts(question: dict) -> list[str]:
    if question["answer_type"] in ("arithmetic", "count"):
        return [f"{question['answer']}"]
    return [part.strip() for part in question["answer"] if part.strip()]


def _answer_text(parts: list[str], scale: str) -> str:
    return f"{'; '.join(parts)} {scale}".strip()


def _wrong_answers(context: dict, question: dict, rng: random.Random) -> Iterator[tuple[list[str], str]]:
    """Yields plausible wrong (answer parts, scale), the most plausible first."""
    parts, scale = _gold_parts(question), question["scale"]
    if question["answer_type"] == "count":
        gold = int(parts[0])
        yield from (([str(count)], "") for count in rng.sample([gold - 1, gold + 1], 2) if count >= 0)
    elif question["answer_type"] == "arithmetic":
        gold, decimals = float(parts[0]), len(parts[0].partition(".")[2])
        error = gold * (1 + rng.choice((-1, 1)) * rng.uniform(0.10, 0.35))
        operands = re.findall(r"\d[\d,]*(?:\.\d+)?", str(question.get("derivation") or "")) or _cells_near(
            context, parts[0], rng
        )
        choices = [
            ([rng.choice(operands)] if operands else parts, scale),
            ([f"{-gold:.{decimals}f}"], scale),
            (parts, rng.choice([other for other in SCALES if other != scale])),
            ([f"{error:.{decimals}f}"], scale),
        ]
        yield from rng.sample(choices, len(choices))
        yield [f"{gold + 1:.{decimals}f}"], scale  # a gold of 0 has no sign, no scale and no share to get wrong
    elif question["answer_type"] == "span":
        yield from (([cell], scale) for cell in _cells_near(context, parts[0], rng))
    else:
        position = rng.randrange(len(parts))
        foreign = next((cell for cell in _cells_near(context, parts[position], rng) if cell not in parts), None)
        choices = [[*parts[:position], *parts[position + 1 :]]] if len(parts) > 1 else []
        if foreign is not None:
            choices.append([*parts[:position], foreign, *parts[position + 1 :]])
        yield from ((choice, scale) for choice in rng.sample(choices, len(choices)))


def _cells_near(context: dict, text: str, rng: random.Random) -> list[str]:
    """The table's other cells: first those of the text's row or column, among them first those that look like it."""
    target = _normalise(text)
    cells = [
        (row, column, cell.strip(), _normalise(cell.strip()))
        for row, line in enumerate(context["table"]["table"])
        for column, cell in enumerate(line)
    ]
    own = [(row, column) for row, column, _, normalised in cells if normalised == target]
    others = [cell for cell in cells if cell[3] not in ("", target)]
    rng.shuffle(others)

    def distance(cell: tuple[int, int, str, str]) -> tuple[bool, bool, bool]:
        is_near = any(cell[0] == row or cell[1] == column for row, column in own)
        has_shape = re.sub(r"\d", "0", cell[2]) == re.sub(r"\d", "0", text)  # a year for a year
        return not is_near, _is_number(cell[2]) != _is_number(text), not has_shape

    return [cell[2] for cell in sorted(others, key=distance)]


# ---------------------------------------------------------------------------------------------------------------------
# The trainer: TRL's DPOTrainer over a model that reads each prompt once


def add_prefix_sharing(model: PreTrainedModel, *, sharing: bool = True) -> None:
    """Makes the fused forward of `trl.trainer.utils.add_fused_lm_head` read each pair's prompt once.

    The batch is TRL's: (2 B, L), the B chosen rows and then the B rejected ones, padded on the right, with labels of
    -100 outside the answers. The outputs keep TRL's meaning and shape (2 B, L - 1), so its loss and metrics stay as
    they are. Inside, a pair is one row: prompt, chosen answer, rejected answer, the second answer's positions starting
    after the prompt again and its attention closed to the first one. Only the hidden states that predict an answer
    token go through the LM head; without `sharing` that alone is done.
    """
    import torch
    from transformers import AttentionInterface

    fused_forward = model.forward
    AttentionInterface.register("sdpa", prefix_attention)  # every other call goes on as before

    # generate() checks its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if not fused_lm_head:
            return fused_forward(*args, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        is_target = labels[:, 1:] != -100
        if sharing:
            batch, rows = fold_pairs(input_ids, attention_mask, labels)
        else:
            batch = {"input_ids": input_ids, "attention_mask": attention_mask}
            columns = torch.arange(labels.shape[1] - 1, device=labels.device)
            rows = (torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1] + columns)[is_target]

        def keep_rows(module, inputs, output):
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[rows][None]

        with self.base_model.register_forward_hook(keep_rows):
            output = fused_forward(fused_lm_head=True, shift_labels=labels[:, 1:][is_target][None], **batch, **kwargs)
        for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
            output[name] = output[name].new_zeros(is_target.shape).masked_scatter(is_target, output[name])
        return output

    model.forward = types.MethodType(forward, model)


def fold_pairs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """Folds B pairs into B rows: the prompt, padded to the longest, then both answers one after the other.

    Returns the backbone's arguments (input_ids and position_ids (B, T), `prefix_length` P of the prompts, and which of
    the T keys each of the T - P answer queries sees, attention_mask (B, 1, T - P, T)) and, for every label that is not
    -100, in the order of the unfolded rows, the index into the (B * T) hidden states of the one that predicts it.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device, n_pairs = input_ids.device, len(input_ids) // 2
    starts = (labels != -100).int().argmax(dim=1)[:n_pairs]
    ends = attention_mask.sum(dim=1).tolist()
    width = int(starts.max())
    order = torch.arange(input_ids.shape[1], device=device)
    answers, positions, sides, chosen_rows, rejected_rows = [], [], [], [], []
    for pair, start in enumerate(starts.tolist()):
        chosen, rejected = slice(start, ends[pair]), slice(start, ends[n_pairs + pair])
        answers.append(torch.cat([input_ids[pair, chosen], input_ids[n_pairs + pair, rejected]]))
        positions.append(torch.cat([order[chosen], order[rejected]]))
        sides.append(torch.cat([torch.zeros_like(order[chosen]), torch.ones_like(order[rejected])]))
        # the prompt's last token predicts the first of either answer, and the last of an answer nothing
        places = torch.arange(width, width + len(answers[-1]), device=device)
        split = ends[pair] - start
        chosen_rows.append(torch.cat([order[start - 1 : start], places[: split - 1]]))
        rejected_rows.append(torch.cat([order[start - 1 : start], places[split:-1]]))
    side = pad_sequence(sides, batch_first=True, padding_value=2)
    sees_answer = (side[:, None, :] == side[:, :, None]).tril()
    sees_prompt = (order[:width] < starts[:, None])[:, None, :].expand(-1, side.shape[1], -1)
    prompts = input_ids[:n_pairs, :width].masked_fill(order[:width] >= starts[:, None], 0)
    length = width + side.shape[1]
    rows = [row + (index % n_pairs) * length for index, row in enumerate(chosen_rows + rejected_rows)]
    batch = {
        "input_ids": torch.cat([prompts, pad_sequence(answers, batch_first=True)], dim=1),
        "position_ids": torch.cat(
            [order[:width].expand(n_pairs, -1), pad_sequence(positions, batch_first=True)], dim=1
        ),
        "attention_mask": torch.cat([sees_prompt, sees_answer], dim=2)[:, None],
        "prefix_length": width,
    }
    return batch, torch.cat(rows)


def prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prefix_length: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" attention; with a `prefix_length` the mask is that of `fold_pairs`.

    The prompt is plain causal attention, which needs no mask and so gets torch's fastest kernel.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prefix_length is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    of_prompt = [tensor[:, :, :prefix_length] for tensor in (query, key, value)]
    prompt, _ = sdpa_attention_forward(module, *of_prompt, None, **kwargs)
    answers, _ = sdpa_attention_forward(module, query[:, :, prefix_length:], key, value, attention_mask, **kwargs)
    return torch.cat([prompt, answers], dim=1), None


def no_sharing_reason(model: PreTrainedModel) -> str | None:
    """Why this model's attention cannot keep the two answers apart, or None when it can."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"the attention backend is {config._attn_implementation}, not sdpa"
    fields = config.to_dict()
    if fields.get("sliding_window") or set(fields.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        return "the model has layers without full attention"
    return None


def render(prompt: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> str:
    """The prompt as the model reads it: as it is, or as the user's turn of the chat template."""
    if not args.use_chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=args.thinking
    )


def fit_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, mark: str = QUESTION_MARK
) -> tuple[str, bool]:
    """The rendered prompt within --max_prompt_length tokens, and whether it was cut.

    What stands before the last `mark` loses its end, so the question stays; a prompt without a mark loses its
    beginning. Raises InputError when the question alone is too long.
    """
    head, found, question = prompt.rpartition(mark)
    kept, tail = (head, found + question) if found else (prompt, "")
    while True:
        text = render(kept + tail, tokenizer, args)
        excess = len(tokenizer(text)["input_ids"]) - args.max_prompt_length
        if excess <= 0:
            return text, kept + tail != prompt
        if not kept:
            raise InputError(
                f"--max_prompt_length {args.max_prompt_length} is {excess} tokens short of the question "
                f"{tail.strip()[:60]!r} alone; raise it"
            )
        places = tokenizer(kept, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if excess >= len(places):
            kept = ""
        else:
            kept = kept[: places[-excess][0]] if found else kept[places[excess - 1][1] :]


def fit_pairs(
    pairs: list[dict], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, mark: str = QUESTION_MARK
) -> list[dict[str, str]]:
    """The pairs as the trainer reads them, prompts rendered and cut; says how many were cut.

    TRL cuts the answers at --max_length.
    """
    rows, cut_prompts, cut_answers = [], 0, 0
    for pair in pairs:
        prompt, is_cut = fit_prompt(pair["prompt"], tokenizer, args, mark)
        gap = "" if args.use_chat_template else " "
        row = {"prompt": prompt, "chosen": gap + pair["chosen"], "rejected": gap + pair["rejected"]}
        longest = max(len(tokenizer(prompt + row[side])["input_ids"]) for side in ("chosen", "rejected"))
        cut_prompts += is_cut
        cut_answers += longest + 1 > args.max_length  # TRL adds the end token
        rows.append(row)
    log.info(
        "%d pairs: %d prompts cut to --max_prompt_length, %d answers cut at --max_length",
        len(rows), cut_prompts, cut_answers,
    )  # fmt: skip
    return rows


def build_trainer(
    args: argparse.Namespace, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> DPOTrainer:
    """TRL's DPOTrainer over a model that reads each prompt once.

    A base model gets a fresh adapter, and the reference is the base without it. A model with an adapter goes on
    training that one, and the reference is a frozen copy of it. Dropout is off, as in TRL, so that the two agree at
    the first step. `rows` are those of `fit_pairs`.
    """
    import datasets
    from peft import PeftModel
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    set_seed(args.seed)
    is_fresh = not isinstance(model, PeftModel)
    if is_fresh:
        model = mtbench_eval.new_adapter(model, args)
    config = DPOConfig(
        **mtbench_eval.training_arguments(args, weight_decay=0.0, warmup_ratio=0.05, logging_steps=5),
        beta=args.beta,
        max_length=args.max_length,
    )
    with mtbench_eval.adapter_kept_in_float32(model):
        trainer = DPOTrainer(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
    if is_fresh:
        model.delete_adapter("ref")  # TRL copies every adapter; without the copy it switches the adapter off
    reason = no_sharing_reason(model.get_base_model())
    if reason and not args.no_prefix_sharing:
        log.warning("every prompt is read once for each answer: %s", reason)
    add_prefix_sharing(model.get_base_model(), sharing=not reason and not args.no_prefix_sharing)
    return trainer


def train(trainer: DPOTrainer, checkpoint: Path | None, folder: Path) -> None:
    """Trains and writes the adapter, the model card and the loss and reward plots into `folder`."""
    mtbench_eval.run_training(trainer, checkpoint)
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    mtbench_eval.save_adapter(trainer, folder)
    if mtbench_eval.main_process():
        rewards = {"reward margin": ["rewards/margins"], "reward accuracy": ["rewards/accuracies"]}
        mtbench_eval.plot_curves(trainer.state.log_history, {"loss": ["loss"]}, folder / "loss.png")
        mtbench_eval.plot_curves(trainer.state.log_history, rewards, folder / "rewards.png")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: TAT-QA


def tatqa_questions(contexts: list[dict], *, limit: int, seed: int, **prompt_options) -> list[dict]:
    """The evaluation questions [{"question_id", "question", "answer_type", "scale", "gold", "prompt"}, ...].

    With `limit` > 0 they come from whole contexts in an order by `seed` that does not depend on the file's.
    """
    contexts = sorted(
        (context for context in contexts if context["questions"]), key=lambda c: c["questions"][0]["uid"]
    )
    questions = [
        {
            "question_id": question["uid"],
            "question": question["question"],
            "answer_type": question["answer_type"],
            "scale": question["scale"],
            "gold": question["answer"],
            "context": context["questions"][0]["uid"],
            "prompt": tatqa_prompt(context, question, **prompt_options),
        }
        for context in random.Random(seed).sample(contexts, len(contexts))
        for question in context["questions"]
    ]
    return questions[: limit or None]


def answer_tatqa(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    *,
    path: Path,
    fingerprint: dict,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 0,
    seed: int = 42,
    one_line: bool = True,
    share_prefix: bool = True,
    use_cache: bool = False,
    renew: bool = False,
) -> list[dict]:
    """Answers and grades TAT-QA questions, reading what those on one context share once; returns a row per question.

    A row: {"question_id", "answer_type", "question", "gold", "answer", "em_like", "em", "f1", "prefilled"}, written to
    `path` (a ResultFile) as soon as it exists; a restart goes on with the questions that are missing. `questions` are
    those of `tatqa_questions` with fitted prompts. With `one_line` an answer ends with its first line. `prefilled` is
    the row's share of the prompt tokens that its batch put through the model. `use_cache` takes a greedy result from
    the user's cache folder and puts it there. `renew`: see ResultFile.
    """
    import torch
    from tqdm import tqdm

    settings = mtbench_eval.decoding_settings(model, tokenizer, temperature=temperature, top_p=top_p)
    asked = zlib.crc32(json.dumps(questions, ensure_ascii=False).encode("utf-8"))
    generation = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, one_line=one_line
    )
    fingerprint = {**fingerprint, "questions": asked, "generation": generation}
    cached = mtbench_eval.baseline_cache(fingerprint)
    use_cache = use_cache and temperature == 0
    if use_cache and cached.exists() and not path.exists():
        mtbench_eval.write_atomic(path, cached.read_bytes())
        log.info("%s: taken from the baseline cache (%s); --no_baseline_cache answers anew", path.name, cached)
    results = ResultFile(path, fingerprint, renew=renew)
    done = {row["question_id"] for row in results.rows}
    missing = [question for question in questions if question["question_id"] not in done]

    line_break = line_break_tokens(model, tokenizer) if one_line and missing else None

    def tokens_of(group: list[dict]) -> list[list[int]]:
        return [tokens[question["question_id"]] for question in group]

    def run(batch: list[list[dict]]) -> None:
        chosen = [question for group in batch for question in group]
        prompts = list(map(tokens_of, batch))
        torch.manual_seed(seed ^ zlib.crc32(chosen[0]["question_id"].encode()))
        answers, prefilled = complete(model, prompts, settings, max_new_tokens, line_break, share_prefix=share_prefix)
        for question, answer in zip(chosen, answers, strict=True):
            text = mtbench_eval.strip_thinking(tokenizer.decode(answer, skip_special_tokens=True))
            gold = {"answer": question["gold"], "answer_type": question["answer_type"], "scale": question["scale"]}
            em, f1 = tatqa_em_f1(gold, *tatqa_parse(text))
            graded = {"answer": text, "em_like": tatqa_em_like(gold, text), "em": em, "f1": f1}
            kept = {key: question[key] for key in ("question_id", "answer_type", "question", "gold", "scale")}
            results.append({**kept, **graded, "prefilled": prefilled / len(chosen)})
            progress.update()

    tokens = {question["question_id"]: tokenizer(question["prompt"])["input_ids"] for question in missing}
    by_context = itertools.groupby(missing, key=lambda question: question["context"])
    groups = sorted(([*group] for _, group in by_context), key=lambda group: len(tokens[group[0]["question_id"]]))
    contexts_at_once = groups_at_once(model, list(map(tokens_of, groups)), max_new_tokens, batch_size)
    was_training = model.training
    model.eval()
    progress = tqdm(total=len(questions), initial=len(done), desc=path.stem, unit="answer", disable=not missing)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), progress:
        mtbench_eval.in_batches(groups, contexts_at_once, run)
    model.train(was_training)
    if use_cache and not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        mtbench_eval.write_atomic(cached, path.read_bytes())
    return results.rows_of(questions)


def groups_at_once(
    model: PreTrainedModel | PeftModel, groups: list[list[list[int]]], max_new_tokens: int, batch_size: int = 0
) -> int:
    """How many groups of token lists `complete` takes at once: enough for `batch_size` rows; 0 = by free memory."""
    longest = max((len(prompt) for group in groups for prompt in group), default=0) + max_new_tokens
    rows = batch_size or mtbench_eval.free_batch_size(model, longest)
    return math.ceil(rows / max(map(len, groups), default=1))


def line_break_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A bool for every token id of the model: whether its text holds a line break."""
    import torch

    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    line_break = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool, device=model.device)
    line_break[[token for token, piece in enumerate(pieces) if "\n" in piece]] = True
    return line_break


def complete(
    model: PreTrainedModel | PeftModel,
    groups: list[list[list[int]]],
    settings: GenerationConfig,
    max_new_tokens: int,
    line_break: torch.Tensor | None = None,
    *,
    share_prefix: bool = True,
) -> tuple[list[list[int]], int]:
    """Continues the token lists of all groups in one batch; what a group begins with in common is read once.

    Returns the new tokens of each, its end token included, and how many prompt tokens went through the model. With
    `line_break` (see `line_break_tokens`) an answer also ends with its first line that is not empty.
    """
    prompts = [prompt for group in groups for prompt in group]
    if share_prefix:
        cache, prefilled = read_prompts(model, groups, settings.pad_token_id)
        prefilled += len(prompts)
    else:
        cache, prefilled = None, len(prompts) * max(map(len, prompts))
    answers = [[]] * len(prompts)
    mtbench_eval.batched_answers(
        model, prompts, settings, max_new_tokens, answers.__setitem__, cache=cache, line_break=line_break
    )
    return answers, prefilled


def read_prompts(
    model: PreTrainedModel | PeftModel, groups: list[list[list[int]]], pad_token_id: int, rows_at_once: int = 4
) -> tuple[DynamicCache, int]:
    """The key-value cache of prompts of two tokens or more, without their last, padded on the left; and the tokens read.

    A group's common beginning is read once, as one row. What follows it is read for a few prompts of like length at
    once, padded on the right, where causal attention needs no mask: the lengths differ much, by the passages.
    """
    import torch
    from transformers import DynamicCache

    def read(tokens: list[list[int]], cache: DynamicCache) -> int:
        ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
        if ids.numel():
            with torch.no_grad():
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return ids.numel()

    n_tokens, rows = 0, []  # a row: (keys, values) of each layer, (heads, tokens, head size)
    for prompts in groups:
        columns = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
        shared = min(sum(1 for _ in columns), min(map(len, prompts)) - 1)  # generate() needs a token of each
        prefix = DynamicCache()
        n_tokens += read([prompts[0][:shared]], prefix)
        first_row = len(rows)
        rows += [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), rows_at_once):
            some = order[start : start + rows_at_once]
            rests = [prompts[index][shared:-1] for index in some]
            longest = max(map(len, rests))
            cache = DynamicCache([
                [states.expand(len(some), -1, -1, -1) for states in (la.keys, la.values)] for la in prefix.layers
            ])
            n_tokens += read([rest + [pad_token_id] * (longest - len(rest)) for rest in rests], cache)
            for place, index in enumerate(some):
                end = len(prompts[index]) - 1
                rows[first_row + index] = [(la.keys[place, :, :end], la.values[place, :, :end]) for la in cache.layers]

    width = max(keys.shape[1] for (keys, _), *_ in rows)

    def left_padded(states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(s, (0, 0, width - s.shape[1], 0)) for s in states])

    layers = [[left_padded(states) for states in zip(*layer, strict=True)] for layer in zip(*rows, strict=True)]
    return DynamicCache(layers), n_tokens


def summarise_tatqa(rows: list[dict]) -> dict:
    """Both metrics in per cent, overall and by answer type: {"em_like", "em", "f1", "n", "by_type": {type: ...}}."""

    def shares(rows: list[dict]) -> dict:
        means = {key: 100 * statistics.fmean(row[key] for row in rows) for key in ("em_like", "em", "f1")}
        return {**means, "n": len(rows)}

    kinds = sorted({row["answer_type"] for row in rows})
    by_type = {kind: shares([row for row in rows if row["answer_type"] == kind]) for kind in kinds}
    return {**shares(rows), "by_type": by_type}


def compare_tatqa(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Differences in percentage points: exact McNemar tests for the two exact metrics, also by answer type."""

    def difference(key: str, kind: str | None = None) -> dict:
        test = mtbench_eval.paired_delta if key == "f1" else mtbench_eval.mcnemar
        pairs = [pair for pair in zip(before, after, strict=True) if kind in (None, pair[0]["answer_type"])]
        return in_per_cent(test([old[key] for old, _ in pairs], [new[key] for _, new in pairs]))

    kinds = sorted({row["answer_type"] for row in after})
    deltas = {"tatqa": "em_like", "tatqa_em": "em", "tatqa_f1": "f1"}
    return {
        name: {**difference(key), "by_type": {kind: difference(key, kind) for kind in kinds}}
        for name, key in deltas.items()
    }


def in_per_cent(delta: dict) -> dict:
    return {**delta, **{key: 100 * delta[key] for key in ("mean", "low", "high")}}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: the rewards of held-out pairs


def reward_pairs(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    *,
    path: Path,
    fingerprint: dict,
    beta: float,
    max_length: int,
    use_cache: bool = False,
    renew: bool = False,
) -> list[dict]:
    """DPO's implicit rewards of both answers of every pair: beta * log(p(answer) / p_base(answer)), as TRL logs them.

    Returns and writes to `path` (a ResultFile) a row per pair: {"question_id", "chosen", "rejected", "chosen_reward",
    "rejected_reward"}. The base is the model with its adapter off, also for a run that trains an adapter on. `pairs`
    are the rows of `fit_pairs` with a "question_id". `renew`: see ResultFile. There is nothing to cache (`use_cache`).
    Source: section 4 of Rafailov et al., https://arxiv.org/abs/2305.18290.
    """
    from tqdm import tqdm

    asked = zlib.crc32(json.dumps(pairs, ensure_ascii=False).encode("utf-8"))
    results = ResultFile(path, {**fingerprint, "pairs": asked, "beta": beta, "max_length": max_length}, renew=renew)
    done = {row["question_id"] for row in results.rows}
    was_training = model.training
    model.eval()
    for pair in tqdm([pair for pair in pairs if pair["question_id"] not in done], desc=path.stem, unit="pair"):
        policy = answer_log_probs(model, tokenizer, pair, max_length)
        with adapter_off(model):
            base = answer_log_probs(model, tokenizer, pair, max_length)
        chosen, rejected = (beta * (now - then) for now, then in zip(policy, base, strict=True))
        kept = {key: pair[key] for key in ("question_id", "chosen", "rejected")}
        results.append({**kept, "chosen_reward": chosen, "rejected_reward": rejected})
    model.train(was_training)
    return results.rows_of(pairs)


def answer_log_probs(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, pair: dict, max_length: int
) -> list[float]:
    """Log-probabilities, in nats, of the chosen and the rejected answer; the prompt is read once.

    An answer is what TRL trains on: it begins where the tokens part from the prompt's, has the end token, and is cut
    at `max_length` tokens of prompt and answer.
    """
    import torch
    from peft import PeftModel
    from torch.nn.utils.rnn import pad_sequence
    from transformers import DynamicCache
    from trl.data_utils import common_prefix_length

    prompt = tokenizer(pair["prompt"])["input_ids"]
    texts = [pair["prompt"] + pair[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    start = min(common_prefix_length(prompt, row) for row in rows)
    ids = pad_sequence([torch.tensor(row[:max_length], device=model.device) for row in rows], batch_first=True)
    cache = DynamicCache()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        base.base_model(ids[:1, : start - 1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        hidden = base.base_model(ids[:, start - 1 :], past_key_values=cache).last_hidden_state[:, :-1]
        # in float32: rounded to bf16, the logits of two answers that are about as likely tell little
        logits = mtbench_eval.matmul_float32(hidden.flatten(0, 1), base.get_output_embeddings().weight.T)
    log_probs = logits.log_softmax(dim=-1).unflatten(0, hidden.shape[:2]).gather(2, ids[:, start:, None])[..., 0]
    lengths = [min(len(row), max_length) - start for row in rows]
    return [log_probs[row, :length].sum().item() for row, length in enumerate(lengths)]


def summarise_rewards(rows: list[dict]) -> dict:
    """{"accuracy": pairs whose chosen answer has the higher reward, in per cent, a tie being one half, "margin", "n"}."""
    return {
        "accuracy": 100 * statistics.fmean(map(_reward_accuracy, rows)),
        "margin": statistics.fmean(map(_reward_margin, rows)),
        "n": len(rows),
    }


def compare_rewards(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Differences in reward accuracy, in percentage points, by the exact McNemar test, and in the reward margin."""
    accuracies, margins = (
        [list(map(measure, rows)) for rows in (before, after)] for measure in (_reward_accuracy, _reward_margin)
    )
    return {
        "reward_accuracy": in_per_cent(mtbench_eval.mcnemar(*accuracies)),
        "reward_margin": mtbench_eval.paired_delta(*margins),
    }


def _reward_margin(row: dict) -> float:
    return row["chosen_reward"] - row["rejected_reward"]


def _reward_accuracy(row: dict) -> float:
    margin = _reward_margin(row)
    return 0.5 if margin == 0 else float(margin > 0)  # before training policy and base are one, and every pair ties


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: instruction following


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$)", text.strip()))


def _items(text: str) -> list[str]:
    """The items of a numbered or bulleted list."""
    return [line for line in _lines(text) if re.match(r"(\d+[.)]|[-*+•])\s", line)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _json(text: str) -> Any:
    try:
        return json.loads(re.sub(r"^```(json)?|```$", "", text.strip()))
    except ValueError:
        return None


def _in_order(text: str, *parts: str) -> bool:
    places = [text.lower().find(part.lower()) for part in parts]
    return -1 not in places and places == sorted(places)


# (category, instruction, checks): a check is a function of the answer's text
INSTRUCTIONS: list[tuple[str, str, list[Callable[[str], bool]]]] = [
    (
        "lists",
        "List exactly five ways in which a household can spend less, as a numbered list.",
        [lambda t: len(_items(t)) == 5, lambda t: _in_order(t, "1", "2", "3", "4", "5")],
    ),
    (
        "lists",
        "Write the days of the week, one a line, starting with Wednesday. Write nothing else.",
        [
            lambda t: len(_lines(t)) == 7,
            lambda t: _in_order(t, "Wednesday", "Thursday", "Sunday", "Monday", "Tuesday"),
        ],
    ),
    (
        "lists",
        "Name exactly three primary colours, separated by commas, and write nothing else.",
        [lambda t: t.count(",") == 2, lambda t: len(_words(t)) == 3],
    ),
    (
        "lists",
        "Give three advantages and three disadvantages of working from home as bullet points, under the headings "
        "Advantages and Disadvantages.",
        [lambda t: _in_order(t, "Advantages", "Disadvantages"), lambda t: len(_items(t)) == 6],
    ),
    (
        "formats",
        "Describe an invented person as a JSON object with exactly the keys name, age and city. Output only the JSON.",
        [
            lambda t: isinstance(_json(t), dict),
            lambda t: isinstance(_json(t), dict) and set(_json(t)) == {"name", "age", "city"},
        ],
    ),
    (
        "formats",
        "Give four European capitals as a JSON array of strings. Output only the JSON.",
        [
            lambda t: isinstance(_json(t), list) and len(_json(t)) == 4,
            lambda t: isinstance(_json(t), list) and all(isinstance(item, str) for item in _json(t)),
        ],
    ),
    (
        "formats",
        "Write a Markdown table with the columns Asset and Risk and three rows below the header.",
        [
            lambda t: sum(line.startswith("|") for line in _lines(t)) == 5,
            lambda t: bool(re.search(r"\|\s*Asset\s*\|\s*Risk\s*\|", t)),
        ],
    ),
    (
        "formats",
        "Write two synonyms of profit in square brackets, separated by a semicolon, like [one; two], and nothing else.",
        [lambda t: bool(re.fullmatch(r"\[[^;\[\]]+;[^;\[\]]+\]", t.strip()))],
    ),
    (
        "formats",
        "Write the currencies of Japan, Poland and Brazil, one a line, in the form country: currency.",
        [lambda t: sum(":" in line for line in _lines(t)) == 3, lambda t: _in_order(t, "yen", "zloty", "real")],
    ),
    (
        "length",
        "Explain in exactly two sentences what inflation is.",
        [lambda t: _sentences(t) == 2, lambda t: "price" in t.lower()],
    ),
    (
        "length",
        "Describe compound interest in at most 40 words.",
        [lambda t: 5 <= len(_words(t)) <= 40, lambda t: "interest" in t.lower()],
    ),
    (
        "length",
        "Describe your favourite season in 60 to 90 words.",
        [
            lambda t: 60 <= len(_words(t)) <= 90,
            lambda t: any(season in t.lower() for season in ("spring", "summer", "autumn", "fall", "winter")),
        ],
    ),
    (
        "length",
        "Write a haiku about the sea: three lines and nothing else.",
        [lambda t: len(_lines(t)) == 3, lambda t: 6 <= len(_words(t)) <= 17],
    ),
    (
        "length",
        "Is 17 a prime number? Answer with yes or no and nothing else.",
        [lambda t: t.strip().lower().rstrip(".") == "yes"],
    ),
    (
        "words",
        "Write one sentence about a voyage that contains the words storm and harbour.",
        [lambda t: "storm" in t.lower() and "harbour" in t.lower(), lambda t: _sentences(t) == 1],
    ),
    (
        "words",
        "Describe a bank in one sentence without using the word money.",
        [lambda t: "money" not in t.lower(), lambda t: _sentences(t) == 1],
    ),
    (
        "words",
        "Explain the difference between a share and a bond, use the words ownership and loan, and end with a question.",
        [lambda t: "ownership" in t.lower() and "loan" in t.lower(), lambda t: t.strip().endswith("?")],
    ),
    (
        "words",
        "Begin your answer with the words In short, and say in at most 30 words why diversification lowers risk.",
        [lambda t: t.strip().startswith("In short"), lambda t: len(_words(t)) <= 30],
    ),
    (
        "words",
        "Write a short formal letter that asks a bank for a new card. It starts with Dear and its last line is "
        "Kind regards.",
        [lambda t: t.strip().startswith("Dear"), lambda t: " ".join(_lines(t)[-1:]).startswith("Kind regards")],
    ),
    (
        "words",
        "Write the sentence Cash is king. exactly three times and nothing else.",
        [lambda t: t.count("Cash is king.") == 3, lambda t: len(_words(t)) == 9],
    ),
    (
        "order",
        "Sort these numbers from the smallest to the largest, separated by commas: 42, 7, 19, 3, 88.",
        [lambda t: _numbers(t)[-5:] == [3, 7, 19, 42, 88]],
    ),
    (
        "order",
        "Sort these words alphabetically: pear, apple, mango, cherry.",
        [lambda t: _in_order(t, "apple", "cherry", "mango", "pear")],
    ),
    (
        "order",
        "Count from 10 down to 1, with spaces between the numbers, and write nothing else.",
        [lambda t: t.split() == [str(number) for number in range(10, 0, -1)]],
    ),
    (
        "arithmetic",
        "What is 15 percent of 240? Answer with the number alone.",
        [lambda t: t.strip().rstrip(".") == "36"],
    ),
    (
        "arithmetic",
        "A share costs 50 dollars and rises by 10 percent. What does it cost now? Write only the price in dollars.",
        [lambda t: _numbers(t) == [55] or "55.00" in t, lambda t: len(_words(t)) <= 2],
    ),
]


def instruct_questions(limit: int, seed: int) -> list[dict]:
    """The instructions as `score_questions` takes them; `limit` > 0 takes a sample by `seed`."""
    numbers = range(len(INSTRUCTIONS))
    if 0 < limit < len(INSTRUCTIONS):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    return [
        {"question_id": number + 1, "category": INSTRUCTIONS[number][0], "turns": [INSTRUCTIONS[number][1]]}
        for number in numbers
    ]


def summarise_instruct(rows: list[dict]) -> dict:
    """`summarise` with the share of answers that score 7 or more and the share of checks passed, in per cent."""
    passed = [check(row["answers"][0]) for row in rows for check in INSTRUCTIONS[row["question_id"] - 1][2]]
    return {
        **mtbench_eval.summarise(rows),
        "success_rate": 100 * statistics.fmean(row["scores"][0] >= 7 for row in rows),
        "check_rate": 100 * statistics.fmean(passed),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: before and after


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One thing measured before and after training; `name` is its key in the record and the stem of its files.

    `answer(model, tokenizer, path=, fingerprint=, use_cache=, renew=)` gives a row per question,
    `compare(before, after)` the record's deltas by key. `lines` are those of the table: (title, value of a summary, key of the delta or None).
    """

    name: str
    size: int
    answer: Callable[..., list[dict]]
    summarise: Callable[[list[dict]], dict]
    compare: Callable[[list[dict], list[dict]], dict[str, dict]]
    lines: list[tuple[str, Callable[[dict], float], str | None]]


def tatqa_evaluation(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, questions: list[dict]
) -> Evaluation:
    """TAT-QA by both metrics; `questions` are those of `tatqa_questions`, prompts not yet fitted."""
    fitted = [{**question, "prompt": fit_prompt(question["prompt"], tokenizer, args)[0]} for question in questions]
    answer = functools.partial(
        answer_tatqa,
        questions=fitted,
        max_new_tokens=args.eval_max_new_tokens,
        temperature=args.eval_temperature,
        top_p=args.eval_top_p,
        batch_size=args.eval_batch_size,
        seed=args.seed,
        one_line=not args.use_chat_template,
    )
    lines = [
        ("TAT-QA, as published, %", lambda s: s["em_like"], "tatqa"),
        ("TAT-QA, official EM, %", lambda s: s["em"], "tatqa_em"),
        ("TAT-QA, official F1, %", lambda s: s["f1"], "tatqa_f1"),
    ]
    return Evaluation("tatqa", len(fitted), answer, summarise_tatqa, compare_tatqa, lines)


def reward_evaluation(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, pairs: list[dict]) -> Evaluation:
    """The rewards of held-out pairs; `pairs` are those of `tatqa_pairs`."""
    rows = [
        {**row, "question_id": pair["uid"]} for row, pair in zip(fit_pairs(pairs, tokenizer, args), pairs, strict=True)
    ]
    answer = functools.partial(reward_pairs, pairs=rows, beta=args.beta, max_length=args.max_length)
    lines = [
        ("held-out pairs, reward accuracy, %", lambda s: s["accuracy"], "reward_accuracy"),
        ("held-out pairs, reward margin", lambda s: s["margin"], "reward_margin"),
    ]
    return Evaluation("held_out", len(rows), answer, summarise_rewards, compare_rewards, lines)


def scored_evaluation(
    args: argparse.Namespace,
    name: str,
    title: str,
    questions: list[dict],
    reward_model: mtbench_eval.RewardModel | None,
    max_new_tokens: int,
    summarise: Callable[[list[dict]], dict] = mtbench_eval.summarise,
) -> Evaluation:
    """Questions answered by the chat template and scored by the reward model."""
    answer = functools.partial(
        mtbench_eval.score_questions,
        reward_model=reward_model,
        questions=questions,
        max_new_tokens=max_new_tokens,
        batch_size=args.eval_batch_size,
        thinking=args.thinking,
        seed=args.seed,
    )

    def compare(before: list[dict], after: list[dict]) -> dict[str, dict]:
        deltas = mtbench_eval.compare_rows(before, after)
        return {name: deltas["score"], f"{name}_raw": deltas["raw"]}

    lines = [
        (f"{title}, 1-10", lambda s: s["avg"], name),
        (f"{title}, raw reward", lambda s: s["raw_mean"], f"{name}_raw"),
        (f"{title}, published scale", lambda s: s["avg_logged"], None),
    ]
    return Evaluation(name, len(questions), answer, summarise, compare, lines)


def common_evaluations(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, reward_model: mtbench_eval.RewardModel | None
) -> list[Evaluation]:
    """TAT-QA and MT-Bench as the flags ask for them."""
    evaluations = []
    if args.do_eval:
        skipped = SkippedRows()
        contexts = read_tatqa(tatqa_file(args, args.eval_split), skipped)
        skipped.report("TAT-QA evaluation questions")
        questions = tatqa_questions(contexts, limit=args.eval_limit, seed=args.seed, **prompt_options(args))
        evaluations.append(tatqa_evaluation(args, tokenizer, questions))
    if args.do_mtbench:
        questions = mtbench_eval.load_questions(
            args.mtbench_file, limit=args.mtbench_limit, seed=args.seed, flag="--mtbench_file"
        )
        tokens = args.mtbench_max_tokens
        evaluations.append(scored_evaluation(args, "mtbench", "MT-Bench", questions, reward_model, tokens))
    return evaluations


def measure(
    args: argparse.Namespace,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluations: list[Evaluation],
    folder: Path,
    stage: str,
    *,
    with_adapter: bool,
) -> dict[str, list[dict]]:
    """The rows of every evaluation by name, kept in NAME_STAGE.jsonl; without the adapter it is the base that answers.

    Baselines are shared with other runs by the cache. Under several processes the main one answers.
    """
    with contextlib.nullcontext() if with_adapter else adapter_off(model):
        adapter = mtbench_eval.adapter_sha256(model) if with_adapter else "none"
        fingerprint = mtbench_eval.model_fingerprint(args, adapter)
        return mtbench_eval.on_main_process(
            lambda: {
                evaluation.name: evaluation.answer(
                    model,
                    tokenizer,
                    path=folder / f"{evaluation.name}_{stage}.jsonl",
                    fingerprint=fingerprint,
                    use_cache=stage == "baseline" and not args.no_baseline_cache,
                    renew=True,
                )
                for evaluation in evaluations
            }
        )


def adapter_off(model: PreTrainedModel | PeftModel) -> contextlib.AbstractContextManager[None]:
    """A context in which the model answers as its base does."""
    from peft import PeftModel

    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


def report(
    record: dict,
    folder: Path,
    evaluations: list[Evaluation],
    before: dict[str, list[dict]],
    after: dict[str, list[dict]],
) -> None:
    """Fills the record's baseline, final and delta; writes metrics.json and the plots; prints the table."""
    baseline, final, delta = record["baseline"], record["final"], record["delta"]
    table = []
    for evaluation in evaluations:
        name = evaluation.name
        if name in before:
            baseline[name] = evaluation.summarise(before[name])
        if name in after:
            final[name] = evaluation.summarise(after[name])
        if name in before and name in after:
            delta |= evaluation.compare(before[name], after[name])
            if "by_category" in final[name]:
                mtbench_eval.plot_categories(baseline[name], final[name], folder / f"{name}.png")
        for title, value, key in evaluation.lines:
            values = [value(summaries[name]) if name in summaries else None for summaries in (baseline, final)]
            table.append((title, *values, delta.get(key)))
            for kind in (delta.get(key) or {}).get("by_type", {}):
                values = [value(summaries[name]["by_type"][kind]) for summaries in (baseline, final)]
                table.append((f"  {kind}", *values, delta[key]["by_type"][kind]))
    mtbench_eval.write_json(folder / "metrics.json", {"baseline": baseline, "final": final, "delta": delta})
    mtbench_eval.print_table(str(folder), table)
    log.info("seconds: %s", ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in record["runtime_s"].items()))


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    """Runs the script; returns the run record. Bad input ends in SystemExit(2) after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    args = mtbench_eval.parse_arguments(build_parser(), argv, DEMO)
    with mtbench_eval.recorded_run(args, argv, "dpo_train.py") as record:
        run(args, record)
    return record


def run(args: argparse.Namespace, record: dict) -> None:
    """Load, measure, train, measure again. Everything that can be wrong with the input is found before it writes."""
    check_flags(args)
    checkpoint = mtbench_eval.find_checkpoint(args, neutral_flags(args))
    tokenizer = mtbench_eval.load_tokenizer(args)
    pairs, data = [], {"source": args.tatqa_dir or "next-tat/TAT-QA"}
    if not args.no_train:
        pairs, data = load_pairs(args, args.tatqa_split, args.limit_pairs)
    needs_reward = (args.do_mtbench or args.do_instruct) and not args.dry_run and mtbench_eval.main_process()
    reward_model = mtbench_eval.RewardModel(args.reward_model) if needs_reward else None
    evaluations = common_evaluations(args, tokenizer, reward_model)
    if args.eval_pairs:
        trained_on = {pair["uid"] for pair in pairs}
        held_out, _ = load_pairs(args, args.eval_split, args.eval_pairs, without=trained_on)
        evaluations.insert(0, reward_evaluation(args, tokenizer, held_out))
    if args.do_instruct:
        title, questions = "instructions", instruct_questions(args.instruct_limit, args.seed)
        tokens = args.instruct_max_tokens
        instruct = scored_evaluation(args, "instruct", title, questions, reward_model, tokens, summarise_instruct)
        instruct.lines.append(("instructions, score of 7 or more, %", lambda s: s["success_rate"], None))
        instruct.lines.append(("instructions, checks passed, %", lambda s: s["check_rate"], None))
        evaluations.append(instruct)
    rows = fit_pairs(pairs, tokenizer, args)
    if args.dry_run:
        print_plan(args, tokenizer, rows, evaluations)
        return
    align(args, record, tokenizer, rows, evaluations, data, checkpoint)
    if args.eval_save_json and mtbench_eval.main_process():
        stages = {stage: Path(args.output_dir) / f"tatqa_{stage}.jsonl" for stage in ("baseline", "final")}
        answers = {
            stage: [json.loads(line) for _, line in mtbench_eval.read_jsonl(path)][1:]
            for stage, path in stages.items()
            if path.exists()
        }
        save_answers(args, answers)


def save_answers(args: argparse.Namespace, answers: dict[str, list[dict]]) -> None:
    """Writes --eval_save_json: TAT-QA's rows by stage."""
    path = Path(args.eval_save_json)
    path.parent.mkdir(parents=True, exist_ok=True)
    mtbench_eval.write_json(path, answers)


def load_pairs(
    args: argparse.Namespace, split: str, limit: int, without: Collection[str] = ()
) -> tuple[list[dict], dict]:
    """The TAT-QA pairs of a split but those of the uids in `without`, and the fingerprint of what they are made from.

    `limit` > 0 takes a sample by --seed.
    """
    path = tatqa_file(args, split)
    skipped = SkippedRows()
    pairs = tatqa_pairs(read_tatqa(path, skipped), seed=args.seed, skipped=skipped, **prompt_options(args))
    skipped.report(f"TAT-QA {split} questions for pairs")
    pairs = [pair for pair in pairs if pair["uid"] not in without]
    if not pairs:
        reasons = "; ".join(skipped.places) or "all of them are trained on"
        raise InputError(f"{path}: no pairs left ({reasons}); name another --tatqa_split or --eval_split")
    if 0 < limit < len(pairs):
        pairs = random.Random(args.seed).sample(pairs, limit)
    return pairs, {
        "source": args.tatqa_dir or "next-tat/TAT-QA",
        "rows": {"tatqa_pairs": len(pairs), "skipped": skipped.count},
        "sha256": mtbench_eval.file_sha256(path),
    }


def align(
    args: argparse.Namespace,
    record: dict,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    evaluations: list[Evaluation],
    data: dict,
    checkpoint: Path | None,
) -> None:
    """Baseline, DPO on the `rows` of `fit_pairs`, final, report. With --no_train, the loaded adapter against the base.

    An adapter that is trained on is its own baseline.
    """
    model = mtbench_eval.load_model(args)
    if args.load_adapter:
        model = mtbench_eval.load_adapter(model, args.load_adapter, trainable=args.adapter_trainable)
    trainer = None if args.no_train else build_trainer(args, model, tokenizer, rows)
    if trainer is not None:
        model = trainer.model
        trainer.accelerator.wait_for_everyone()  # all have looked for a checkpoint before the folder changes
    folder = mtbench_eval.begin(record, data)
    before = after = {}
    if args.eval_baseline:
        with mtbench_eval.timed(record, "baseline"):
            before = measure(
                args, model, tokenizer, evaluations, folder, "baseline", with_adapter=args.adapter_trainable
            )
    if trainer is not None:
        with mtbench_eval.timed(record, "train"):
            train(trainer, checkpoint, folder)
        record["kept_step"] = trainer.state.global_step
    if trainer is not None or args.load_adapter:
        with mtbench_eval.timed(record, "final"):
            after = measure(args, model, tokenizer, evaluations, folder, "final", with_adapter=True)
    if mtbench_eval.main_process():
        report(record, folder, evaluations, before, after)


def print_plan(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, rows: list[dict], evaluations: list[Evaluation]
) -> None:
    """What a run would do: pairs, steps, tokens, memory, evaluations."""
    lengths = [len(tokenizer(row["prompt"] + row["chosen"] + row["rejected"])["input_ids"]) for row in rows]
    if rows:
        log.info("pairs: %d of %.0f tokens, prompt read once (%.2f M tokens an epoch)", len(rows), statistics.fmean(lengths), sum(lengths) / 1e6)  # fmt: skip
        log.info(
            "steps: %d of %d pairs each", mtbench_eval.optimiser_steps(args, len(rows)), args.batch * args.grad_acc
        )
        mtbench_eval.log_memory_plan(args, max(lengths))
    for evaluation in evaluations:
        log.info("%s: %d questions before and after", evaluation.name, evaluation.size)


if __name__ == "__main__":
    main()
