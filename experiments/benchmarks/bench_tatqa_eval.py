"""TAT-QA evaluation with each table's prompt read once, against the same batches that read it for every question.

    python experiments/benchmarks/bench_tatqa_eval.py --model DIR --tatqa_dir DIR

One process, the same batches both ways, each of as many tables as the evaluation takes, float32 on CPU; the ratio of
the total times is the result. The answers must be identical; the prompt tokens that went through the model are counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dpo_train  # noqa: E402
from llm_alignment import files, flags, generation, models, tatqa  # noqa: E402


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = dpo_train.build_parser()
    parser.description = __doc__
    parser.add_argument("--contexts", type=int, default=12, help="tables to answer on (12)")
    parser.set_defaults(no_4bit=True, tatqa_dir=str(flags.DEMO_DIR / "tatqa"))
    args: argparse.Namespace = parser.parse_args(argv)
    path = tatqa.tatqa_file(args, args.eval_split)
    contexts = tatqa.read_tatqa(path, files.SkippedRows())
    options = tatqa.prompt_options(args)
    questions = tatqa.tatqa_questions(contexts, limit=0, seed=args.seed, **options)
    tokenizer, model = models.load_tokenizer(args), models.load_model(args).eval()
    settings = generation.decoding_settings(model, tokenizer, temperature=0.0, top_p=1.0)
    line_break = None if args.use_chat_template else tatqa.line_break_tokens(model, tokenizer)
    groups: dict[str, list[list[int]]] = {}
    for question in questions:
        prompt, _ = generation.fit_prompt(question["prompt"], tokenizer, args)
        groups.setdefault(question["context"], []).append(tokenizer(prompt)["input_ids"])
    seconds, tokens, differing = {False: 0.0, True: 0.0}, {False: 0, True: 0}, 0
    chosen = sorted(list(groups.values())[: args.contexts], key=lambda prompts: len(prompts[0]))
    size = tatqa.groups_at_once(model, chosen, args.eval_max_new_tokens, args.eval_batch_size)
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    tatqa.complete(model, chosen[:1], settings, args.eval_max_new_tokens, line_break)  # warms up
    for number, batch in enumerate(batches):
        answers = {}
        for share in (False, True) if number % 2 else (True, False):
            start = time.perf_counter()
            answers[share], prefilled = tatqa.complete(
                model, batch, settings, args.eval_max_new_tokens, line_break, share_prefix=share
            )
            seconds[share] += time.perf_counter() - start
            tokens[share] += prefilled
        differing += sum(a != b for a, b in zip(answers[False], answers[True], strict=True))
    n_answers = sum(map(len, chosen))
    print(f"{n_answers} questions on {len(chosen)} tables, {args.model}, up to {args.eval_max_new_tokens} new tokens")
    print(f"speed: {seconds[False] / seconds[True]:.2f}x as fast with the prefix read once")
    print(f"prompt tokens through the model: {tokens[False]} without, {tokens[True]} with")
    print(f"answers that differ: {differing} of {n_answers}")
    return {"speed_up": seconds[False] / seconds[True], "tokens": tokens[False] / tokens[True], "differing": differing}


if __name__ == "__main__":
    main()
