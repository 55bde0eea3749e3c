"""Batched answers against one prompt at a time, on both turns of a set of MT-Bench questions.

    python experiments/benchmarks/bench_generation.py --model DIR --questions question.jsonl --language en

"One prompt at a time" is `model.generate` on each conversation alone, as the published runs did. Both ways work
through the questions wave by wave, taking turns in going first, in one process; only their ratio is reported. Where
their texts differ, the two tokens at the first difference are compared in log-probability: in float32 a difference is
a near tie. `--random_qwen3` measures a random Qwen3 of the true 1.7B shape in place of a model, for GPUs.
"""

from __future__ import annotations

import argparse
import time

from harness import SHAPES, device_name

from llm_alignment.flags import positive
from llm_alignment.generation import Decoding, free_batch_size, generate
from llm_alignment.processes import device_and_dtype
from mtbench_eval import load_questions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a chat model; with --random_qwen3 its tokenizer")
    parser.add_argument("--questions", required=True, help="question file, or auto")
    parser.add_argument("--language", choices=["ru", "en"], default="en")
    parser.add_argument("--limit", type=int, default=0, help="number of questions (default: 0 = all)")
    parser.add_argument("--max_new_tokens", type=positive(int), default=64)
    parser.add_argument("--batch_size", type=int, default=0, help="0 (default) = as the evaluation chooses")
    parser.add_argument("--wave", type=positive(int), default=80, help="questions before the ways take turns")
    parser.add_argument("--backend", choices=["simple", "auto"], default="simple")
    parser.add_argument("--random_qwen3", action="store_true", help="random weights of the 1.7B shape")
    parser.add_argument("--rounds", type=positive(int), default=1, help="whole measurements; the median counts")
    return parser


def load(args: argparse.Namespace):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    device, dtype = device_and_dtype()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not args.random_qwen3:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval(), tokenizer
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES["1.7b"],
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), tokenizer


def one_at_a_time(model, tokenizer, conversations: list[list[dict]], max_new_tokens: int) -> list[str]:
    texts = []
    for conversation in conversations:
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, enable_thinking=False, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


def first_difference(model, tokenizer, conversation: list[dict], one: str, other: str) -> float:
    """Distance in log-probability of the two tokens where two answers to a conversation part."""
    import torch

    prompt = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    end = [tokenizer.eos_token_id]
    left, right = (tokenizer(text, add_special_tokens=False).input_ids + end for text in (one, other))
    at = next(n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + left[:at]], device=model.device)).logits[0, -1]
    chances = logits.float().log_softmax(-1)
    return abs(float(chances[left[at]] - chances[right[at]]))


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import statistics

    model, tokenizer = load(args)
    questions = load_questions(args.questions, language=args.language, limit=args.limit)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, backend=args.backend)
    ways = {
        "alone": lambda chats: one_at_a_time(model, tokenizer, chats, args.max_new_tokens),
        "batched": lambda chats: [answer.text for answer in sorted(generate(model, tokenizer, chats, decoding))],
    }
    warm_up = [[{"role": "user", "content": questions[0]["turns"][0]}]] * 2
    for way in ways.values():
        way(warm_up)

    ratios, distances, same, total = [], [], 0, 0
    for _ in range(args.rounds):
        seconds = dict.fromkeys(ways, 0.0)
        for start in range(0, len(questions), args.wave):
            wave = questions[start : start + args.wave]
            chats: list[list[dict]] = [[] for _ in wave]
            for turn in range(len(wave[0]["turns"])):
                for chat, question in zip(chats, wave, strict=True):
                    chat.append({"role": "user", "content": question["turns"][turn]})
                texts = {}
                names = sorted(ways, reverse=(start // args.wave + turn) % 2 == 1)
                for name in names:
                    begun = time.perf_counter()
                    texts[name] = ways[name](chats)
                    seconds[name] += time.perf_counter() - begun
                for chat, alone, batched in zip(chats, texts["alone"], texts["batched"], strict=True):
                    total += 1
                    same += alone == batched
                    if alone != batched:
                        distances.append(first_difference(model, tokenizer, chat, alone, batched))
                    chat.append({"role": "assistant", "content": alone})  # one history, so that turns stay comparable
        ratios.append(seconds["alone"] / seconds["batched"])
    dtype = str(model.dtype).removeprefix("torch.")
    batch = args.batch_size or free_batch_size(model, args.max_new_tokens)
    print(f"{len(questions)} questions, {args.max_new_tokens} tokens, {dtype}, {device_name()}")
    print(f"batched ({args.backend}, up to {batch} rows) is {statistics.median(ratios):.2f}x as fast as one at a time")
    print(f"same text: {same} of {total} turns")
    if distances:
        print(f"where texts part, the two tokens lie within {max(distances):.1e} in log-probability")


if __name__ == "__main__":
    main()
