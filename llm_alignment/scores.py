"""Questions that a chat model answers and the reward model scores: answer, score, summarise, compare."""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import TYPE_CHECKING, Any

from llm_alignment.checks import checks_passed
from llm_alignment.evaluation import Evaluation, pair_rows, values_of
from llm_alignment.files import InputError, digest
from llm_alignment.prompts import strip_thinking
from llm_alignment.stats import equal_length_delta, in_per_cent, mcnemar, paired_delta

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_alignment.generation import Decoding
    from llm_alignment.rewards import RewardModel


def answer_questions(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, items: list[dict], *, decoding: Decoding
) -> list[dict]:
    """The rows of a batch of questions, answered turn after turn, each with the whole conversation so far: a question
    with "answers", "answer_tokens", "finished" and "batch_sizes", one entry per turn."""
    from llm_alignment.generation import generate

    rows = [{**item, "answers": [], "answer_tokens": [], "finished": [], "batch_sizes": []} for item in items]
    for turn in range(max(len(row["turns"]) for row in rows)):
        asked = [row for row in rows if turn < len(row["turns"])]
        conversations = [conversation(row, turn) for row in asked]
        for answer in generate(model, tokenizer, conversations, decoding, description=f"turn {turn + 1}"):
            row = asked[answer.index]
            row["answers"].append(strip_thinking(answer.text))
            row["answer_tokens"].append(answer.tokens)
            row["finished"].append(answer.finished)
            row["batch_sizes"].append(answer.batch_size)
    return rows


def conversation(row: dict, turn: int) -> list[dict]:
    """The turns that the model reads before its answer of number `turn`, from 0: questions, and the answers so far."""
    messages = [{"role": "user", "content": row["turns"][0]}]
    for answer, question in zip(row.get("answers", []), row["turns"][1 : turn + 1], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return messages


def score_answers(rows: list[dict], *, reward_model: RewardModel) -> list[dict]:
    """The rows with "rewards", "scores" and "scores_logged", one entry per turn, each scored with its history."""
    from llm_alignment.rewards import to_logged_scale, to_score

    rows = [{**row, "rewards": []} for row in rows]
    for turn in range(max(len(row["turns"]) for row in rows)):
        asked = [row for row in rows if turn < len(row["turns"])]
        turns = [[*conversation(row, turn), {"role": "assistant", "content": row["answers"][turn]}] for row in asked]
        for row, reward in zip(asked, reward_model.score(turns), strict=True):
            row["rewards"].append(reward)
    scales = {"scores": to_score, "scores_logged": to_logged_scale}
    return [row | {name: [*map(scale, row["rewards"])] for name, scale in scales.items()} for row in rows]


def answered_evaluation(name: str, questions: list[dict], decoding: Decoding, **about: Any) -> Evaluation:
    """Questions answered by the chat template; `about`: the evaluation's other fields, its `items` among them."""
    from llm_alignment.generation import MAX_BATCH_SIZE

    return Evaluation(
        name=name, **about, read=functools.partial(answer_questions, decoding=decoding),
        order=lambda question: sum(map(len, question["turns"])),
        rows_at_once=lambda model: decoding.batch_size or MAX_BATCH_SIZE[model.device.type],
        tokens=functools.partial(conversation_tokens, questions, decoding.max_new_tokens),
    )  # fmt: skip


def scored_evaluation(name: str, questions: list[dict], decoding: Decoding, reward_model: RewardModel) -> Evaluation:
    """Questions answered by the chat template and, in the main process, scored by the reward model."""
    seed = ["seed"] if decoding.temperature else []  # without it runs of other seeds reuse greedy baselines
    asked = [row for row in questions if "reference" in row]
    settings = {
        "questions": digest(questions),
        "reward_model": reward_model.fingerprint,
        "generation": decoding.settings("max_new_tokens", "temperature", "backend", "thinking", *seed),
    }
    return answered_evaluation(
        name, questions, decoding, items=questions, settings=settings, is_cached=decoding.temperature == 0,
        grade=functools.partial(score_answers, reward_model=reward_model),
        summarise=functools.partial(summarise_scored, name), compare=functools.partial(compare_scored, name),
        references=[(row["question_id"], conversation(row, 0), row["reference"], row["question_id"]) for row in asked],
    )  # fmt: skip


def conversation_tokens(questions: list[dict], max_new_tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that go through the model at most: a turn reads all before it once more. Without the template's own."""
    lengths = ([len(ids) + max_new_tokens for ids in tokenizer(row["turns"])["input_ids"]] for row in questions)
    return sum(sum(itertools.accumulate(row)) for row in lengths)


def summarise_scored(name: str, rows: list[dict]) -> dict[str, dict]:
    """{name: averages over questions (a question counts as the mean of its turns), overall, per turn and category}.
    `answer_tokens` is the mean length of an answer, `unfinished` the share of answers cut by the token limit,
    `batch_sizes` the numbers of answers that were to be generated at once; of instructions also the shares, in per
    cent, of scores of 7 or more and of checks passed."""
    mean = statistics.fmean
    turns = range(max(len(row["turns"]) for row in rows))
    scores = [(row["category"], mean(row["scores"])) for row in rows]
    by_category = {kind: mean(score for own, score in scores if own == kind) for kind in sorted(dict(scores))}
    summary: dict = {
        "avg": mean(score for _, score in scores),
        "avg_logged": mean(mean(row["scores_logged"]) for row in rows),
        "raw_mean": mean(mean(row["rewards"]) for row in rows),
        "by_turn": [mean(row["scores"][turn] for row in rows if turn < len(row["turns"])) for turn in turns],
        "by_category": by_category,
        "n": len(rows),
        "answer_tokens": mean(tokens for row in rows for tokens in row["answer_tokens"]),
        "unfinished": mean(not finished for row in rows for finished in row["finished"]),
        # older files do not have them
        "batch_sizes": sorted({size for row in rows for size in row.get("batch_sizes", [])}),
    }
    if name in ("instruct", "finance_instruct"):
        summary["success_rate"] = 100 * mean(row["scores"][0] >= 7 for row in rows)
    if name == "instruct":
        summary["check_rate"] = 100 * mean(check for row in rows for check in checks_passed(row))
    return {name: summary}


def compare_scored(name: str, before: list[dict], after: list[dict]) -> dict[str, dict]:
    """Paired differences over the questions on both sides, by the names of METRICS: NAME (the score), NAME_raw,
    NAME_length (new tokens of an answer), NAME_equal_length (of the score, at equal length), and in percentage points
    NAME_success and NAME_checks. A question counts as the mean of its turns. Raises InputError when no question is on
    both sides, or other turns under one id."""
    pairs = pair_rows(before, after)
    if any(old["turns"] != new["turns"] for old, new in pairs):
        raise InputError("the two evaluations asked different questions; compare files of one question set")

    def figures(key: str) -> tuple[list[float], list[float]]:
        return values_of(pairs, lambda row: statistics.fmean(row[key]))

    scores, lengths = figures("scores"), figures("answer_tokens")
    change, longer = ([new - old for old, new in zip(*sides, strict=True)] for sides in (scores, lengths))
    deltas = {
        name: paired_delta(*scores),
        f"{name}_equal_length": equal_length_delta(change, longer),
        f"{name}_raw": paired_delta(*figures("rewards")),
        f"{name}_length": paired_delta(*lengths),
    }
    if name in ("instruct", "finance_instruct"):
        deltas[f"{name}_success"] = in_per_cent(mcnemar(*values_of(pairs, lambda row: row["scores"][0] >= 7)))
    if name == "instruct":
        passed = values_of(pairs, checks_passed)
        clusters = [old["question_id"] for (old, _), checks in zip(pairs, passed[0], strict=True) for _ in checks]
        sides = ([*itertools.chain(*side)] for side in passed)
        deltas[f"{name}_checks"] = in_per_cent(mcnemar(*sides, clusters=clusters))
    return deltas
