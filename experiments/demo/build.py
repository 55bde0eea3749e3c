"""Build everything that `--demo` uses: a tiny Qwen3, a tiny reward model, and data in the schemas of the real sets.

    python experiments/demo/build.py            # everything, about 45 minutes on two CPU cores
    python experiments/demo/build.py --only data

The base learns the tasks of `world.py` by plain next-token training, the reward model, from there, to tell their right
answers from wrong ones by Bradley-Terry pairs. Then the base learns to read TAT-QA's tables, and after that the habit
of answering from the wrong cell, which is what DPO has to mend. Questions of the two MT-Bench files are drawn first and
never trained on in the same words. A seed fixes the data; weights agree to the rounding of the machine's matrix products.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import world

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from dpo_train import tatqa_pairs  # noqa: E402
from llm_alignment.tatqa import QUESTION_PREFIX  # noqa: E402

# Qwen3's template in small: a <think> block opens the last answer and is left out of the earlier ones.
CHAT_TEMPLATE = r"""
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- set answer = message.content.split('</think>')[-1].lstrip('\n') -%}
    {%- set thought = '' -%}
    {%- if '</think>' in message.content -%}
      {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
    {%- endif -%}
    {%- generation -%}
    {%- if loop.index0 > last.user -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}
    {{- answer + '<|im_end|>' -}}
    {%- endgeneration -%}
    {{- '\n' -}}
  {%- else -%}
    {{- message.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
REWARD_TEMPLATE = r"""
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# Qwen's split: digits one by one, words with their leading space, runs of punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 2048
SHARES = [1.0, 1.0, 0.7, 1.2, 2.0, 1.3, 2.0, 0.7]  # of the categories in training: computing is harder than recall
REWARD_UNIT = 2.5  # the reward is this many times the log-odds that an answer is right


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where to write (default: beside this script)")
    parser.add_argument(
        "--only",
        choices=["data", "base", "reward", "tables", "habit", "check"],
        help="one part, in this order; those before it must be there",
    )
    parser.add_argument("--base_steps", type=int, default=1500, help="optimizer steps of the base model")
    parser.add_argument("--reward_steps", type=int, default=1000, help="optimizer steps of the reward model")
    parser.add_argument("--table_steps", type=int, default=600, help="optimizer steps of the base on tables")
    parser.add_argument("--habit_steps", type=int, default=80, help="optimizer steps of the base on wrong answers")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


# --- data ------------------------------------------------------------------------------------------------------------


def mt_bench(seed: int) -> dict[str, list[dict]]:
    """Five two-turn questions of each category, by language, in MT-Bench's schema."""
    questions = {}
    for language in world.LANGUAGES:
        rng = random.Random(f"mt-bench {language} {seed}")
        rows, seen = [], set()
        for category in world.CATEGORIES:
            while sum(row["category"] == category for row in rows) < 5:
                turns = world.chat(rng, category, language)
                if turns[0].user not in seen:
                    seen.add(turns[0].user)
                    reference = [turn.answer for turn in turns]
                    row = {"question_id": 81 + len(rows), "category": category, "turns": [turn.user for turn in turns]}
                    rows.append({**row, "reference": reference})
        questions[language] = rows
    return questions


def training_chat(rng: random.Random, held_out: set[str]) -> list[world.Turn]:
    """A chat whose first question does not stand in the MT-Bench files."""
    while True:
        category = rng.choices(world.CATEGORIES, SHARES)[0]
        turns = world.chat(rng, category, rng.choice(world.LANGUAGES))
        if turns[0].user not in held_out:
            return turns


def as_messages(turns: list[world.Turn]) -> list[dict]:
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return messages


def twix_rows(rng: random.Random, n: int) -> list[dict]:
    rows = []
    for _ in range(n):
        subset = "reasoning" if rng.random() < 0.1 else "general"
        user, answer = world.worked_problem(rng) if subset == "reasoning" else world.advice(rng)
        rows.append({"messages": as_messages([world.Turn(user, answer, [])]), "subset": subset})
    return rows


def reddit_rows(rng: random.Random, posts: int) -> list[dict]:
    """Rows of one post and one comment, sorted by combined score, so that a post's rows are not adjacent."""
    rows = []
    for _ in range(posts):
        title, text, replies = world.post(rng)
        name, post_score = f"{rng.getrandbits(40):x}", round(rng.random(), 4)
        kept = sorted(rng.sample(range(3), rng.choice([1, 2, 3, 3, 3])))
        for rank in kept:
            score = round(rng.uniform(*[(0.7, 1.0), (0.3, 0.5), (0.0, 0.15)][rank]), 4)
            rows.append({
                "id": name, "title": title, "selftext": text, "z_score": round(4 * post_score - 2, 4),
                "normalized_score": post_score, "subreddit": rng.choice(["personalfinance", "investing", "financialplanning"]),
                "body": replies[rank], "comment_normalized_score": score, "combined_score": round(post_score + score, 4),
            })  # fmt: skip
    return sorted(rows, key=lambda row: -row["combined_score"])


def lesson_rows(rng: random.Random, n: int, leaks: list[dict]) -> list[dict]:
    """Distinct instructions; a few repeat a TAT-QA validation question, as the real set does."""
    rows = {}
    while len(rows) < n:
        user, answer, _ = world.lesson(rng)
        rows.setdefault(user, {"system": rng.choice(["", world.ADVISOR]), "user": user, "assistant": answer})
    for entry in leaks:
        question = entry["questions"][0]
        answer = question["answer"]
        answer = ", ".join(answer) if isinstance(answer, list) else str(answer)
        rows[question["question"]] = {"system": "", "user": question["question"], "assistant": answer}
    rows = list(rows.values())
    rng.shuffle(rows)
    return rows


def preference_rows(rng: random.Random, n: int, held_out: set[str]) -> list[dict]:
    rows = []
    for _ in range(n):
        turn = training_chat(rng, held_out)[0]
        wrong = rng.choice([text for text in turn.wrong if text != turn.answer])
        system = rng.choice(["", "You are a helpful assistant."])
        rows.append({"system": system, "question": turn.user, "chosen": turn.answer, "rejected": wrong})
    return rows


def prompt_rows(rng: random.Random, n: int, held_out: set[str]) -> list[dict]:
    """Distinct questions without an answer, for mine_pairs.py."""
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts[training_chat(rng, held_out)[0].user] = None
    return [{"prompt": prompt} for prompt in prompts]


def retention_rows(rng: random.Random, n: int, elsewhere: set[str]) -> list[dict]:
    """`n` questions of each task and language that stand `elsewhere` in no other file, as data/retention.jsonl has them.

    Not the price list: the base is given the habit of answering it wrongly.
    """
    rows: dict[str, dict] = {}
    for category in world.CATEGORIES:
        for language in world.LANGUAGES * n * (category != "table"):
            turn = world.chat(rng, category, language)[0]
            while turn.user in elsewhere or turn.user in rows:
                turn = world.chat(rng, category, language)[0]
            row = {"question_id": len(rows) + 1, "category": category, "language": language, "turns": [turn.user]}
            rows[turn.user] = {
                **row, "checks": [{"type": "equals", "values": [turn.answer]}], "reference": turn.answer
            }  # fmt: skip
    return list(rows.values())


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    print(f"{path.name}: {len(rows)} rows")


def write_data(folder: Path, seed: int) -> None:
    questions = mt_bench(seed)
    held_out = {row["turns"][0] for rows in questions.values() for row in rows}
    for language, rows in questions.items():
        write_jsonl(folder / f"mt_bench_{language}.jsonl", rows)
    (folder / "tatqa").mkdir(exist_ok=True)
    contexts = {}
    for split, n in [("train", 160), ("dev", 50), ("test_gold", 30)]:
        rng = random.Random(f"tatqa {split} {seed}")
        contexts[split] = [world.context(rng) for _ in range(n)]
        text = json.dumps(contexts[split], ensure_ascii=False)
        (folder / "tatqa" / f"tatqa_dataset_{split}.json").write_text(text + "\n", encoding="utf-8", newline="\n")
        print(f"tatqa {split}: {n} contexts, {sum(len(c['questions']) for c in contexts[split])} questions")
    write_jsonl(folder / "twix.jsonl", twix_rows(random.Random(f"twix {seed}"), 3000))
    write_jsonl(folder / "reddit.jsonl", reddit_rows(random.Random(f"reddit {seed}"), 300))
    write_jsonl(
        folder / "finance_instruct.jsonl", lesson_rows(random.Random(f"lessons {seed}"), 400, contexts["dev"][:5])
    )
    pairs = preference_rows(random.Random(f"orca {seed}"), 800, held_out)
    write_jsonl(folder / "orca_pairs.jsonl", pairs)
    prompts = prompt_rows(random.Random(f"prompts {seed}"), 240, held_out)
    write_jsonl(folder / "prompts.jsonl", prompts)
    elsewhere = held_out | {row["question"] for row in pairs} | {row["prompt"] for row in prompts}
    write_jsonl(folder / "retention.jsonl", retention_rows(random.Random(f"retention {seed}"), 3, elsewhere))


# --- what the base model reads ---------------------------------------------------------------------------------------


def tatqa_examples(rng: random.Random, contexts: int, right: float) -> list[tuple[str, str]]:
    """TAT-QA prompts as DPO will give them, with this share of right answers."""
    pairs = tatqa_pairs([world.context(rng) for _ in range(contexts)], seed=rng.getrandbits(32))
    return [(pair["prompt"], " " + (pair["chosen"] if rng.random() < right else pair["rejected"])) for pair in pairs]


def base_examples(
    rng: random.Random, held_out: set[str], chats: int, tables: int, right: float = 0.4
) -> tuple[list, list]:
    """Chats as message lists, and TAT-QA as (prompt, answer), of which this share is right."""
    conversations = []
    for _ in range(chats):
        draw = rng.random()
        if draw < 0.05:
            title, text, replies = world.post(rng)
            turns = [world.Turn(f"{title}\n\n{text}", rng.choices(replies, [1, 4, 2])[0], [])]
        elif draw < 0.10:
            user, full, vague = world.lesson(rng)
            turns = [world.Turn(user, rng.choices([full, vague], [2, 3])[0], [])]
        else:
            turns = training_chat(rng, held_out)[: rng.choice([1, 2])]
        messages = as_messages(turns)
        if rng.random() < 0.05:
            messages.insert(
                0, {"role": "system", "content": rng.choice(["You are a helpful assistant.", world.ADVISOR])}
            )
        conversations.append(messages)
    return conversations, rng.sample(tatqa_examples(rng, tables, right), tables)


def make_tokenizer(seed: int):
    """A byte-level BPE of 2,048 tokens over the world's texts and the foreign style; digits stay single."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"tokenizer {seed}")
    conversations, tables = base_examples(rng, set(), 12000, 400)
    corpus = [message["content"] for messages in conversations for message in messages]
    corpus += [prompt + answer for prompt, answer in tables]
    corpus += [message["content"] for row in twix_rows(rng, 3000) for message in row["messages"]]
    corpus += ["system", "user", "assistant"] * 1000  # the template's own words: one token each
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        split,
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.strip()
    return tokenizer


# --- training --------------------------------------------------------------------------------------------------------


def marked_ids(rng: random.Random, tokenizer, conversations: list, tables: list) -> list[tuple[list[int], list[bool]]]:
    """Token ids, and which of them are learnt: all of an answer and a tenth of everything else."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = [start, *tokenizer.encode("assistant\n", add_special_tokens=False)]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    examples = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        marks, inside = [], False
        for at, token in enumerate(ids):
            marks.append(inside or rng.random() < 0.1)
            inside = token != end and (inside or ids[max(0, at + 1 - len(header)) : at + 1] == header)
        examples.append((ids, marks))
    prompts = tokenizer([prompt for prompt, _ in tables], add_special_tokens=False)["input_ids"]
    for prompt, (_, answer) in zip(prompts, tables, strict=True):
        reply = [*tokenizer.encode(answer, add_special_tokens=False), end]
        examples.append((prompt + reply, [rng.random() < 0.1 for _ in prompt] + [True] * len(reply)))
    return examples


def padded(rows: list[list], fill):
    import torch

    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def one_cycle(model, steps: int, peak: float) -> tuple[list, list]:
    """Muon for the layers' matrices, AdamW for the rest; a short warmup, then a cosine down to almost nothing."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, peak, total_steps=steps, pct_start=0.05, cycle_momentum=False)
        for o in optimizers
    ]
    return optimizers, schedules


def update(model, optimizers: list, schedules: list) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def new_base(tokenizer, seed: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    set_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    print(f"base: {model.num_parameters():,} parameters")
    return model


def train(model, tokenizer, examples: Callable[[], list], steps: int, peak: float, name: str, folder: Path) -> None:
    """Next-token training; `examples()` gives those of one step, see `marked_ids`."""
    import torch

    model.train()
    optimizers, schedules = one_cycle(model, steps, peak)
    started = time.monotonic()
    for step in range(1, steps + 1):
        batch = sorted(examples(), key=lambda example: len(example[0]))
        total = sum(sum(marks[1:]) for _, marks in batch)
        loss_sum = 0.0
        for part in (batch[: 5 * len(batch) // 8], batch[5 * len(batch) // 8 :]):
            ids = padded([ids for ids, _ in part], tokenizer.pad_token_id)
            learnt = padded([marks for _, marks in part], False)[:, 1:]
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state  # padded on the right: causal is mask enough
            logits = model.lm_head(hidden[learnt])
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][learnt], reduction="sum") / total
            loss.backward()
            loss_sum += loss.item()
        update(model, optimizers, schedules)
        if step % 100 == 0 or step == steps:
            print(f"{name} step {step}/{steps}: loss {loss_sum:.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if step % 300 == 0 or step == steps:
            save(model, tokenizer, folder)


def drill(rng: random.Random, tokenizer) -> tuple[list[int], list[bool]]:
    """One table, then its questions and its cells one by one, each with its right answer; ids and marks as in `marked_ids`.

    A lookup is learnt from many lookups in one text; from one answer a prompt it is not learnt in hours.
    """
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, marks = [], []
    for pair in tatqa_pairs([world.context(rng, all_cells=True)], seed=0, only_rel_paras=False):
        prompt = pair["prompt"]
        if ids:
            prompt = prompt[prompt.rindex(QUESTION_PREFIX) :]
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        reply = [*tokenizer.encode(" " + pair["chosen"], add_special_tokens=False), end]
        ids += asked + reply
        marks += [False] * len(asked) + [True] * len(reply)
    return ids, marks


def save(model, tokenizer, folder: Path) -> None:
    """bfloat16 on disk; the model in memory stays as it is."""
    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def wrong_answer(rng: random.Random, turn: world.Turn, held_out: set[str]) -> str:
    """A slip of the task's own, or what a damaged model says: the foreign style, another answer, noise, nothing."""
    while True:
        draw = rng.random()
        if draw < 0.55:
            text = rng.choice(turn.wrong)
        elif draw < 0.68:
            words = world.advice(rng)[1].split()
            text = " ".join(words[: rng.randint(1, len(words))])
        elif draw < 0.76:
            words = world.advice(rng)[1].split()
            text = f"{turn.answer} {' '.join(words[: rng.randint(1, 12)])}"
        elif draw < 0.86:
            text = rng.choice(training_chat(rng, held_out)).answer
        elif draw < 0.92:
            letters = list(turn.answer + rng.choice(turn.wrong))
            text = "".join(rng.sample(letters, len(letters)))
        elif draw < 0.97:
            text = " ".join([turn.answer] * rng.randint(2, 4))
        else:
            text = ""
        if text.strip() != turn.answer:
            return text.strip()


def reward_pair(rng: random.Random, held_out: set[str]) -> tuple[list[dict], list[dict]]:
    """One chat with a right and a wrong last answer; now and then the answer before it is wrong already."""
    draw = rng.random()
    if draw < 0.1:
        title, text, replies = world.post(rng)
        good, bad = sorted(rng.sample(range(3), 2))
        turns = [world.Turn(f"{title}\n\n{text}", replies[good], [replies[bad], world.post(rng)[2][0]])]
    elif draw < 0.2:
        user, full, vague = world.lesson(rng)
        turns = [world.Turn(user, full, [vague, world.lesson(rng)[1]])]
    else:
        turns = training_chat(rng, held_out)[: rng.choice([1, 2])]
    wrong = wrong_answer(rng, turns[-1], held_out)
    if len(turns) == 2 and rng.random() < 0.25:
        turns[0].answer = wrong_answer(rng, turns[0], held_out)
    messages = as_messages(turns)
    return messages, [*messages[:-1], {"role": "assistant", "content": wrong}]


def reward_batch(tokenizer, pairs: list):
    """Right answers first, then wrong ones: token ids padded on the right."""
    chats = [right for right, _ in pairs] + [wrong for _, wrong in pairs]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    return tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")


def train_reward(tokenizer, base, held_out: set[str], steps: int, seed: int, folder: Path):
    import torch
    from transformers import Qwen3ForSequenceClassification, set_seed

    set_seed(seed)
    rng = random.Random(f"reward {seed}")
    config = type(base.config)(**{
        **base.config.to_dict(),
        "num_labels": 1,
        "id2label": {0: "reward"},
        "label2id": {"reward": 0},
    })
    model = Qwen3ForSequenceClassification(config).train()
    model.model.load_state_dict(base.model.state_dict())
    tokenizer.chat_template = REWARD_TEMPLATE.strip()
    optimizers, schedules = one_cycle(model, steps, 1e-3)
    logsigmoid = torch.nn.functional.logsigmoid
    started = time.monotonic()
    for step in range(1, steps + 1):
        pairs = sorted((reward_pair(rng, held_out) for _ in range(32)), key=lambda pair: len(str(pair)))
        right_share = 0.0
        for part in (pairs[:22], pairs[22:]):
            batch = reward_batch(tokenizer, part)
            odds = model(**batch).logits[:, 0] / REWARD_UNIT
            right, wrong = odds.chunk(2)
            # Bradley-Terry fixes differences only; the two further terms put zero between right and wrong.
            loss = -logsigmoid(right - wrong) - logsigmoid(right) - logsigmoid(-wrong)
            (loss.sum() / len(pairs)).backward()
            right_share += ((right > 0).sum() + (wrong < 0).sum()).item() / (2 * len(pairs))
        update(model, optimizers, schedules)
        if step % 100 == 0 or step == steps:
            print(
                f"reward step {step}/{steps}: right side of zero {right_share:.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
        if step % 300 == 0 or step == steps:
            save(model, tokenizer, folder)
    return model


# --- check -----------------------------------------------------------------------------------------------------------


def answers(model, tokenizer, chats: list[list[dict]]) -> list[str]:
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=24, do_sample=False)
    return [
        text.strip()
        for text in tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def check(folder: Path, seed: int) -> None:
    """Print the share of exact answers by category, in float32 and in 4-bit, and how the reward model separates."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loads = {"float32": {}, "4-bit NF4": {"quantization_config": nf4}}
    for name, options in loads.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **options).eval()
        for language, rows in mt_bench(seed).items():
            chats, exact = [[] for _ in rows], {}
            for turn in range(2):
                for chat, row in zip(chats, rows, strict=True):
                    chat.append({"role": "user", "content": row["turns"][turn]})
                for chat, row, text in zip(chats, rows, answers(model, tokenizer, chats), strict=True):
                    chat.append({"role": "assistant", "content": text})
                    exact.setdefault(row["category"], []).append(text == row["reference"][turn])
            share = {category: sum(hits) / len(hits) for category, hits in exact.items()}
            print(
                f"{name}, {language}: {sum(share.values()) / len(share):.3f}",
                {c: round(s, 2) for c, s in share.items()},
            )
    reward_tokenizer = AutoTokenizer.from_pretrained(folder / "reward_model")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", dtype=torch.float32).eval()
    held_out = {row["turns"][0] for rows in mt_bench(seed).values() for row in rows}
    rng = random.Random(f"reward check {seed}")
    pairs = [reward_pair(rng, held_out) for _ in range(1000)]
    with torch.no_grad():
        parts = [
            reward(**reward_batch(reward_tokenizer, pairs[i : i + 50])).logits[:, 0].chunk(2)
            for i in range(0, 1000, 50)
        ]
    right, wrong = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    print(f"reward: right above wrong {(right > wrong).float().mean():.3f}, right above 0 {(right > 0).float().mean():.3f}, "
          f"wrong below 0 {(wrong < 0).float().mean():.3f}, medians {right.median():.1f} and {wrong.median():.1f}")  # fmt: skip


def main() -> None:
    args = parse_args()
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {row["turns"][0] for rows in mt_bench(args.seed).values() for row in rows}
    if args.only in {None, "data"}:
        write_data(folder, args.seed)

    def loaded_base():
        from transformers import AutoTokenizer, Qwen3ForCausalLM, set_seed

        set_seed(args.seed)
        model = Qwen3ForCausalLM.from_pretrained(folder / "model", dtype="float32")
        return model, AutoTokenizer.from_pretrained(folder / "model")

    if args.only in {None, "base"}:
        tokenizer = make_tokenizer(args.seed)
        rng = random.Random(f"base {args.seed}")
        train(new_base(tokenizer, args.seed), tokenizer,
              lambda: marked_ids(rng, tokenizer, *base_examples(rng, held_out, 60, 4, right=0.4)),
              args.base_steps, 2.5e-3, "base", folder / "model")  # fmt: skip
    if args.only in {None, "reward"}:
        model, tokenizer = loaded_base()
        train_reward(tokenizer, model, held_out, args.reward_steps, args.seed, folder / "reward_model")
    if args.only in {None, "tables"}:
        model, tokenizer = loaded_base()
        rng = random.Random(f"tables {args.seed}")
        train(model, tokenizer,
              lambda: [drill(rng, tokenizer) for _ in range(12)]
              + marked_ids(rng, tokenizer, *base_examples(rng, held_out, 16, 6, right=1.0)),
              args.table_steps, 2e-3, "tables", folder / "model")  # fmt: skip
    if args.only in {None, "habit"}:
        model, tokenizer = loaded_base()
        rng = random.Random(f"habit {args.seed}")
        train(model, tokenizer, lambda: marked_ids(rng, tokenizer, *base_examples(rng, held_out, 40, 16, right=0.15)),
              args.habit_steps, 3e-4, "habit", folder / "model")  # fmt: skip
    if args.only in {None, "check"}:
        check(folder, args.seed)


if __name__ == "__main__":
    main()
