"""TAT-QA: reading, prompt, both metrics, and answering table by table."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import random
import re
import statistics
import string
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_alignment.batches import shared_lengths
from llm_alignment.checks import SAMPLE_SEED
from llm_alignment.evaluation import Evaluation, pair_rows, values_of
from llm_alignment.files import InputError, SkippedRows, digest, object_problem, open_data, parse_json
from llm_alignment.hub import hub_files
from llm_alignment.prompts import PromptStyle, cut_at_word, fit_prompt, strip_thinking
from llm_alignment.retention import by_kind
from llm_alignment.stats import in_per_cent, mcnemar, paired_delta

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_alignment.generation import Decoding

TATQA_FILES = {
    "train": "tatqa_dataset_train.json",
    "validation": "tatqa_dataset_dev.json",
    "test": "tatqa_dataset_test_gold.json",
}
ANSWER_TYPES = ("span", "multi-span", "arithmetic", "count")
NUMBERS = {"arithmetic": r"-?\d+(\.\d+)?(e[-+]?\d+)?", "count": r"-?\d+"}  # those whose answers are numbers
SCALES = {"": 1, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000, "percent": 0.01}
QUESTION_PREFIX = "\n\nQuestion:"  # truncation keeps a prompt from here on


def tatqa_file(folder: str, split: str) -> Path:
    """The JSON file of a split: in `folder` (--tatqa_dir), or from the hub; with "" the published data set."""
    name, source = TATQA_FILES[split], folder or "next-tat/TAT-QA"
    is_local = Path(source).exists() or source.count("/") != 1
    return (Path(source) if is_local else hub_files(source, "--tatqa_dir", [name], kind="dataset")) / name


def read_tatqa(path: Path, skipped: SkippedRows) -> list[dict]:
    """The contexts {"table", "paragraphs", "questions"} of a TAT-QA file. Read with the json module, because `answer`
    mixes lists, strings and numbers. Questions that cannot be used go to `skipped`. Raises InputError, with the place,
    when the file is missing, truncated or of another shape, or when no question is left."""
    with open_data(path) as file:
        try:
            contexts = parse_json(file.read())
        except ValueError as error:  # UnicodeDecodeError is one
            raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(contexts, list):
        raise InputError(f"{path}: not a list of contexts; fetch the TAT-QA file of that name again")
    uids: set[str] = set()
    for number, context in enumerate(contexts, 1):
        if problem := context_problem(context) or object_problem(context):
            raise InputError(f"{path}: context {number}: {problem}; fetch the file again")
        usable = []
        for question in context["questions"]:
            uid = question["uid"]
            if problem := "another question has its uid" if uid in uids else question_problem(context, question):
                skipped.add(f"{path.name}: context {number}, question {uid}", problem)
            else:
                usable.append(question)
                uids.add(uid)
        context["questions"] = usable
    if not uids:
        raise InputError(f"{path}: no usable question ({'; '.join(skipped.places) or 'the file is empty'})")
    return contexts


def context_problem(context: Any) -> str | None:
    """Why a value is no context; None for a table of texts, numbered passages, and questions with their uid."""
    try:
        rows, passages, questions = context["table"]["table"], context["paragraphs"], context["questions"]
        texts = [cell for row in rows for cell in row] + [passage["text"] for passage in passages]
        texts += [question[key] for question in questions for key in ("uid", "question")]
        "".join(texts)
        lists = [rows, *rows, *(question.get("rel_paragraphs") or [] for question in questions)]
        is_whole = all(isinstance(value, list) for value in lists)
        is_whole &= all(re.fullmatch(r"\d{1,9}", str(passage["order"])) is not None for passage in passages)
    except (TypeError, KeyError, AttributeError):
        is_whole = False
    return None if is_whole else "not a table of texts, numbered passages and questions as TAT-QA's"


def question_texts(path: Path) -> list[str]:
    """The questions of a TAT-QA file, which are not to be trained on where they are asked."""
    return [question["question"] for context in read_tatqa(path, SkippedRows()) for question in context["questions"]]


def question_problem(context: dict, question: dict) -> str | None:
    """The reason why a question cannot be used, or None."""
    kind, scale, answer = (question.get(key) for key in ("answer_type", "scale", "answer"))
    if not question["question"].strip():
        return "no question"
    if kind not in ANSWER_TYPES:
        return f"answer type {kind!r} is not one of {', '.join(ANSWER_TYPES)}"
    if scale not in list(SCALES):
        return f"scale {scale!r} is not one of {', '.join(filter(None, SCALES))} or empty"
    if not any(cell.strip() for row in context["table"]["table"] for cell in row):
        return "the table is empty"
    if kind in NUMBERS:
        is_number = re.fullmatch(NUMBERS[kind], str(answer)) and math.isfinite(float(str(answer)))
        return None if is_number else f"the answer {answer!r:.60} is not a number"
    if not isinstance(answer, list) or not all(isinstance(part, str) for part in answer):
        return f"the answer {answer!r:.60} is not a list of texts"
    return None if any(part.strip() for part in answer) else "no answer"


@dataclasses.dataclass(frozen=True)
class PromptContent:
    """How much of a context a prompt shows: the flags of that name."""

    tatqa_table_rows: int = 20
    tatqa_table_cols: int = 8
    tatqa_para_chars: int = 1200
    tatqa_only_rel_paras: bool = True


DEFAULT_CONTENT = PromptContent()


def tatqa_prompt(context: dict, question: dict, content: PromptContent = DEFAULT_CONTENT) -> str:
    """The prompt: role, the table in Markdown, passages, the question, "Answer:". What the questions of one context
    share comes first, so that an evaluation can read it once. Of the passages, or with `tatqa_only_rel_paras` of those
    that the question refers to, in their order, the first `tatqa_para_chars` characters are kept, cut at a word."""
    columns = content.tatqa_table_cols
    rows = [
        "| " + " | ".join(cell.replace("|", "/").strip() for cell in row[:columns]) + " |"
        for row in context["table"]["table"][: content.tatqa_table_rows]
    ]
    rows.insert(1, "|" + " --- |" * min(len(context["table"]["table"][0]), columns))
    relevant = list(map(str, question.get("rel_paragraphs") or []))
    passages = "\n".join(
        passage["text"].strip()
        for passage in sorted(context["paragraphs"], key=lambda passage: int(passage["order"]))
        if not content.tatqa_only_rel_paras or str(passage["order"]) in relevant
    )
    passages = cut_at_word(passages, content.tatqa_para_chars)
    text = f"\n\nText:\n{passages}" if passages else ""
    return (
        "You are a financial analyst. Answer the question from the table and the text with the answer alone, followed "
        'by its scale (thousand, million, billion or percent) if it has one; separate several answers with ";".\n\n'
        f"Table:\n{chr(10).join(rows)}{text}{QUESTION_PREFIX} {question['question'].strip()}\nAnswer:"
    )


def tatqa_em_f1(question: dict, prediction: str | list[str], scale: str) -> tuple[float, float]:
    """The official exact match and F1 of one prediction, both 0..1, by https://github.com/NExTplusplus/TAT-QA's
    tatqa_metric.py with its oddities ("(1,234)" is positive for its comma): they compare with published ones."""
    import numpy as np

    gold = question["answer"]
    if question["answer_type"] in NUMBERS:
        gold = [str(int(gold) if question["answer_type"] == "count" else gold)]
    if not prediction or not gold:
        return 0.0, 0.0
    parts = prediction if isinstance(prediction, list) else [prediction]
    bare = _to_number(parts[0]) if len(parts) == 1 and not scale and "%" not in parts[0] else None
    forms = [_answer_string(parts, scale), *([] if bare is None else [f"{bare:.4f}"])]  # 0.2342 for 23.42 percent
    gold_tokens = normalise(_answer_string(gold, question["scale"])).split()
    found = (normalise(form).split() for form in forms)
    em, f1 = max((float(each == gold_tokens), float(np.round(_bag_f1({*each}, {*gold_tokens}), 2))) for each in found)
    return em, em if question["answer_type"] in NUMBERS else f1


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
            strings.append(f"{round(value, 2) * _scale_value(scale):.4f}")
    return " ".join(strings)


def is_number(text: str) -> bool:
    words = _bare(text).split()
    try:
        is_real = not math.isnan(float(words[0]))
    except (ValueError, IndexError):
        return False
    return is_real and (len(words) == 1 or _scale_value(words[1]) != 1)


def _to_number(text: str) -> float | None:
    """The value of a text that is a number, else None: "(1.5)" is -1.5, "12%" is 0.12, "1.5 million" is 1500000."""
    first = re.search(r"([+-]?\d+(?:\.\d+)?)|[+-]?\.\d+", _bare(text))
    if not is_number(text) or not first or first[1] is None:
        return None
    is_long = len(first[1]) > 200  # times its scales an int would be beyond a float, which formatting refuses
    value = float(first[1]) if "." in first[1] or is_long else int(first[1])
    unit = re.search(r"[\d.]+\s?[a-zA-Z]+", text)
    value *= _scale_value(unit[0]) if unit else 1
    value *= -1 if re.search(r"\([\d.\s]+\)", text) else 1
    value *= 0.01 if re.search(r"[\d.\s]+%", text) else 1
    return round(value, 4)


def _bare(text: str) -> str:
    return "".join(char for char in text if char not in "'\"\\$€£¥%(),[]")


def _scale_value(text: str) -> float:
    """The factor of the scale word that the text holds; 1 without one."""
    return next((value for word, value in {"hundred": 100, **SCALES}.items() if word and word in text.lower()), 1)


def normalise(text: str) -> str:
    tokens = []
    for token in text.lower().split(" "):
        if not is_number(token):
            token = "".join(char for char in token if char not in string.punctuation)
        if is_number(token):
            token = str(_to_number(token))
        tokens += re.sub(r"\b(a|an|the)\b", " ", token).split()
    return " ".join(tokens)


def _bag_f1(predicted: set[str], gold: set[str]) -> float:
    precision, recall = (len(predicted & gold) / len(bag) if bag else 1.0 for bag in (predicted, gold))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def tatqa_em_like(question: dict, text: str) -> bool:
    """The metric of the published runs. Arithmetic: the first number in the text lies within max(0.5, 5 % of |gold|)
    of gold. Other types, counts too: one of the gold parts with a character that counts is contained in the text. It
    knows no parentheses, no percent sign and no scale."""
    if question["answer_type"] == "arithmetic":
        value, gold = _first_number(text), _first_number(str(question["answer"]))
        return value is not None and gold is not None and abs(value - gold) <= max(0.5, 0.05 * abs(gold))
    words, answer = _bare_words(text), question["answer"]
    parts = map(_bare_words, answer if isinstance(answer, list) else [str(answer)])
    return any(part in words for part in parts if part)


def _first_number(text: str) -> float | None:
    """The first run of digits, also inside a word, with the sign directly before it and its decimals; None without."""
    number = re.search(r"[+-]?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(number[0]) if number else None


def _bare_words(text: str) -> str:
    """Lower case, single blanks, and nothing but word characters, blanks, full stops and hyphens."""
    return re.sub(r"[^\w\s.-]", "", re.sub(r"\s+", " ", text.lower().strip()))


def tatqa_parse(text: str) -> tuple[list[str], str]:
    """A model's text as (answer parts, scale): its first line, parts separated by ";", a scale word at the end."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    line = re.sub(r"^\s*(the )?answer( is)?\s*:?\s+", "", line, flags=re.IGNORECASE).strip()
    if is_number(line.removesuffix(".")):
        line = line.removesuffix(".")
    parts = [part.strip() for part in line.split(";") if part.strip()]
    scale_at_end = re.compile(r"\s+(thousand|million|billion|percent)$", re.IGNORECASE)
    scales = [scale for part in parts for scale in scale_at_end.findall(part)]
    if len(scales) != 1 or not scale_at_end.search(parts[-1]):  # several parts that each carry a scale keep their own
        return parts, ""
    return [*parts[:-1], scale_at_end.sub("", parts[-1])], scales[0].lower()


def evaluation_questions(
    path: Path, tokenizer: PreTrainedTokenizerBase, style: PromptStyle, content: PromptContent, limit: int
) -> list[dict]:
    """The evaluation questions {"question_id", "question", "answer_type", "scale", "answer", "context", "prompt",
    "tokens"}: `answer` is gold as the file has it, `context` names the table, `prompt` is as the model reads it. With
    `limit` > 0 they come from whole contexts, in an order that does not depend on the file's."""
    skipped = SkippedRows()
    contexts = [context for context in read_tatqa(path, skipped) if context["questions"]]
    skipped.report("TAT-QA evaluation questions")
    contexts.sort(key=lambda context: context["questions"][0]["uid"])
    order = random.Random(SAMPLE_SEED).sample(contexts, len(contexts))
    questions = []
    for context, question in [(table, each) for table in order for each in table["questions"]][: limit or None]:
        prompt, tokens, _ = fit_prompt(tatqa_prompt(context, question, content), tokenizer, style, QUESTION_PREFIX)
        kept = {key: question[key] for key in ("question", "answer_type", "scale", "answer")}
        row = {"question_id": question["uid"], **kept, "context": context["questions"][0]["uid"]}
        questions.append({**row, "prompt": prompt, "tokens": tokens})
    return questions


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[dict],
    *,
    decoding: Decoding,
    one_line: bool,
) -> Iterator[dict]:
    """Yields the rows of questions as `evaluation_questions` gives them; what those on one context share is read once.
    A row: {"question_id", "context", "question", "answer_type", "scale", "gold": the reference answer, "answer": the
    model's text, "em_like", "em", "f1", "batch_size"}. With `one_line` an answer ends with its first line."""
    import torch

    from llm_alignment import generation
    from llm_alignment.prefixes import cache_problem

    settings = generation.generation_config(tokenizer, decoding)
    width = model.get_output_embeddings().weight.shape[0]
    line_break = generation.line_break_tokens(tokenizer, width) if one_line else None
    torch.manual_seed(decoding.seed ^ zlib.crc32(items[0]["question_id"].encode()))
    groups = itertools.groupby(items, operator.itemgetter("context"))
    prompts = [[question["tokens"] for question in group] for _, group in groups]
    how, is_shared = (settings, decoding.max_new_tokens, line_break), not cache_problem(model)
    answers = generation.generate_grouped(model, prompts, *how, share_prefix=is_shared)
    for question, answer in zip(items, answers, strict=True):
        text = strip_thinking(generation.read_answer(answer, settings, tokenizer, question["tokens"])[0])
        em, f1 = tatqa_em_f1(question, *tatqa_parse(text))
        row = {key: question[key] for key in ("question_id", "context", "question", "answer_type", "scale")}
        row |= {"gold": question["answer"], "answer": text, "em_like": tatqa_em_like(question, text)}
        yield {**row, "em": em, "f1": f1, "batch_size": len(items)}


def summarise_tatqa(rows: list[dict]) -> dict:
    """Both metrics in per cent, overall and by answer type: {"em_like", "em", "f1", "n", "by_type": {type: ...}}.
    "batch_sizes" are the numbers of answers that were to be generated at once."""

    def shares(rows: list[dict]) -> dict:
        means = {key: 100 * statistics.fmean(row[key] for row in rows) for key in ("em_like", "em", "f1")}
        return {**means, "n": len(rows)}

    sizes = sorted({row["batch_size"] for row in rows if "batch_size" in row})  # older files do not have it
    return {**shares(rows), "by_type": by_kind(rows, rows, shares, ["answer_type"]), "batch_sizes": sizes}


def compare_tatqa(before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Differences in percentage points, also by answer type; questions on one table are one cluster. Rows are paired
    by question_id. Rows of files from before `context` was stored count as tables of their own."""

    def difference(key: str, pairs: list[tuple[dict, dict]]) -> dict:
        test = paired_delta if key == "f1" else mcnemar
        clusters = [new.get("context", new["question_id"]) for _, new in pairs]
        return in_per_cent(test(*values_of(pairs, operator.itemgetter(key)), clusters=clusters))

    pairs, deltas = pair_rows(before, after), {}
    for name, key in (("tatqa", "em_like"), ("tatqa_em", "em"), ("tatqa_f1", "f1")):
        by_type = by_kind([new for _, new in pairs], pairs, functools.partial(difference, key), ["answer_type"])
        deltas[name] = {**difference(key, pairs), "by_type": by_type}
    return deltas


def tatqa_evaluation(questions: list[dict], decoding: Decoding, style: PromptStyle) -> Evaluation:
    """TAT-QA by both metrics; `questions` are those of `evaluation_questions`."""
    from llm_alignment.generation import free_batch_size

    prompts, new_tokens = [question["tokens"] for question in questions], decoding.max_new_tokens

    def tokens(tokenizer: PreTrainedTokenizerBase) -> int:
        shared = sum(length for _, length in shared_lengths(prompts))  # every table is read once
        return sum(map(len, prompts)) - shared + len(prompts) * new_tokens

    one_line = not style.use_chat_template
    generation = decoding.settings("max_new_tokens", "temperature", "top_p", "seed")
    return Evaluation(
        name="tatqa", items=questions, is_cached=decoding.temperature == 0, tokens=tokens,
        read=functools.partial(answer_questions, decoding=decoding, one_line=one_line),
        settings={"questions": digest(questions), "generation": {**generation, "one_line": one_line}},
        unit="context", order=lambda question: len(question["tokens"]),
        rows_at_once=lambda model: decoding.batch_size or free_batch_size(model, max(map(len, prompts)) + new_tokens),
        summarise=lambda rows: {"tatqa": summarise_tatqa(rows)}, compare=compare_tatqa,
        references=[
            (each["question_id"], each["prompt"], style.gap + answer_text(*gold_answer(each)), each["context"])
            for each in questions
        ],
    )  # fmt: skip


def gold_answer(question: dict) -> tuple[list[str], str]:
    """The parts of the gold answer, and its scale."""
    answer = [str(question["answer"])] if question["answer_type"] in NUMBERS else question["answer"]
    return [part.strip() for part in answer if part.strip()], question["scale"]


def answer_text(parts: list[str], scale: str) -> str:
    """An answer as a text, which `tatqa_parse` reads: its parts, then its scale."""
    return f"{'; '.join(parts)} {scale}".strip()
