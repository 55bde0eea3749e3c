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
import mtbench_eval  # noqa: E402


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = dpo_train.build_parser()
    parser.description = __doc__
    parser.add_argument("--contexts", type=int, default=12, help="tables to answer on (12)")
    parser.set_defaults(no_4bit=True, tatqa_dir=str(mtbench_eval.DEMO_DIR / "tatqa"))
    args: argparse.Namespace = parser.parse_args(argv)
    path = dpo_train.tatqa_file(args, args.eval_split)
    contexts = dpo_train.read_tatqa(path, mtbench_eval.SkippedRows())
    options = dpo_train.prompt_options(args)
    questions = dpo_train.tatqa_questions(contexts, limit=0, seed=args.seed, **options)
    tokenizer, model = mtbench_eval.load_tokenizer(args), mtbench_eval.load_model(args).eval()
    settings = mtbench_eval.decoding_settings(model, tokenizer, temperature=0.0, top_p=1.0)
    line_break = None if args.use_chat_template else dpo_train.line_break_tokens(model, tokenizer)
    groups: dict[str, list[list[int]]] = {}
    for question in questions:
        prompt, _ = dpo_train.fit_prompt(question["prompt"], tokenizer, args)
        groups.setdefault(question["context"], []).append(tokenizer(prompt)["input_ids"])
    seconds, tokens, differing = {False: 0.0, True: 0.0}, {False: 0, True: 0}, 0
    chosen = sorted(list(groups.values())[: args.contexts], key=lambda prompts: len(prompts[0]))
    size = dpo_train.groups_at_once(model, chosen, args.eval_max_new_tokens, args.eval_batch_size)
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    dpo_train.complete(model, chosen[:1], settings, args.eval_max_new_tokens, line_break)  # warms up
    for number, batch in enumerate(batches):
        answers = {}
        for share in (False, True) if number % 2 else (True, False):
            start = time.perf_counter()
            answers[share], prefilled = dpo_train.complete(
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
