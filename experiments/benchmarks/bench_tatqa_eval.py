"""TAT-QA evaluation with each table's prompt read once, against the same batches that read it for every question.

    python experiments/benchmarks/bench_tatqa_eval.py --model DIR --tatqa_dir DIR

One process, the same batches both ways, each of as many tables as the evaluation takes, float32 on CPU; the ratio of
the total times is the result. The answers must be identical; the prompt tokens that go through the model are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import harness  # noqa: F401  (puts the project on the path)

import dpo_train
from llm_alignment import flags, generation, models, prompts, tatqa

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints and returns the ratio of the times, the ratio of the prompt tokens, and the answers that differ."""
    parser = dpo_train.build_parser()
    parser.description = __doc__
    parser.add_argument("--contexts", type=int, default=12, help="tables to answer on (%(default)s)")
    parser.set_defaults(no_4bit=True, tatqa_dir=str(flags.DEMO_DIR / "tatqa"))
    args: argparse.Namespace = parser.parse_args(argv)
    base = models.resolve_base(flags.fill(models.BaseFlags, args))
    tokenizer, model = models.load_tokenizer(base), models.load_model(base).eval()
    style, content = flags.fill(prompts.PromptStyle, args), flags.fill(tatqa.PromptContent, args)
    path = tatqa.tatqa_file(args.tatqa_dir, args.eval_split)
    questions = tatqa.evaluation_questions(path, tokenizer, style, content, limit=0)
    by_context = [[*group] for _, group in itertools.groupby(questions, key=lambda question: question["context"])]
    groups = sorted(by_context[: args.contexts], key=lambda group: len(group[0]["tokens"]))
    decoding = generation.Decoding(max_new_tokens=args.eval_max_new_tokens, batch_size=args.eval_batch_size)
    size = tatqa.tatqa_evaluation(questions, decoding, style).rows_at_once(model) // max(map(len, groups)) or 1
    tables = [[question["tokens"] for question in group] for group in groups]
    batches = [tables[start : start + size] for start in range(0, len(tables), size)]
    settings = generation.generation_config(tokenizer, decoding)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    line_break = None if args.use_chat_template else generation.line_break_tokens(tokenizer, vocabulary)

    def answer(batch: list[list[list[int]]], share: bool) -> list[list[int]]:
        return generation.generate_grouped(
            model, batch, settings, args.eval_max_new_tokens, line_break, share_prefix=share
        )

    answer(batches[0][:1], True)  # warms up
    seconds, tokens, differing = {False: 0.0, True: 0.0}, {False: 0, True: 0}, 0
    for number, batch in enumerate(batches):
        answers = {}
        for share in (False, True) if number % 2 else (True, False):
            with prompt_counter(model) as counted:
                start = time.perf_counter()
                answers[share] = answer(batch, share)
                seconds[share] += time.perf_counter() - start
            tokens[share] += sum(counted)
        differing += sum(before != after for before, after in zip(*answers.values(), strict=True))
    n_answers = sum(map(len, groups))
    print(f"{n_answers} questions on {len(groups)} tables, {args.model}, up to {args.eval_max_new_tokens} new tokens")
    print(f"speed: {seconds[False] / seconds[True]:.2f}x as fast with the prefix read once")
    print(f"prompt tokens through the model: {tokens[False]} without, {tokens[True]} with")
    print(f"answers that differ: {differing} of {n_answers}")
    return {"speed_up": seconds[False] / seconds[True], "tokens": tokens[False] / tokens[True], "differing": differing}


@contextlib.contextmanager
def prompt_counter(model: PreTrainedModel) -> Iterator[list[int]]:
    """Collects the sizes of the inputs of more than one token: those of prompts, not of generation's steps."""
    sizes: list[int] = []

    def count(module: object, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape[1] > 1:
            sizes.append(ids.numel())

    with model.register_forward_pre_hook(count, with_kwargs=True):
        yield sizes


if __name__ == "__main__":
    main()
