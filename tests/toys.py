"""Toy models: a tokenizer, a random Qwen3, a random reward model, and texts for them; a TAT-QA table; a small run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from conftest import DEMO

if TYPE_CHECKING:
    from llm_alignment.dpo import DpoSettings
    from llm_alignment.evaluation import Evaluation
    from llm_alignment.models import Base
    from llm_alignment.training import Setup, TrainingSettings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
)  # Qwen2.5's template in short: it adds a system turn of its own
WORDS = (
    "ask the model what it knows about rivers and it will tell of the Volga the Neva the Ob and Lake Baikal".split()
)


def make_tokenizer(template: str = CHATML, pad_token: str | None = "<|endoftext|>", bos_token: str | None = None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=pad_token,
        bos_token=bos_token,
        chat_template=template,
    )


def tiny_config(**changes):
    from transformers import Qwen3Config

    sizes = dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.5,  # wide enough for the random model to say different things
    )
    return Qwen3Config(**sizes | changes)


def make_model(**changes):
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(tiny_config(**changes)).eval()


def save_experts(folder: Path) -> str:
    """A random mixture of experts with the demo's tokenizer, its router's loss large enough to be seen."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(2)
    sizes = tiny_config(vocab_size=2048, initializer_range=0.1).to_dict()
    sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=0.5)
    del sizes["model_type"], sizes["architectures"]
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, tokenizer, **changes) -> str:
    from transformers import Qwen3ForSequenceClassification

    torch.manual_seed(1)
    config = tiny_config(**dict(num_labels=1, initializer_range=0.2) | changes)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(n)]


def chats(n: int) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in sentences(n)]


def plain_answers(model, tokenizer, conversations, eos: list[int], max_new_tokens: int) -> list[list[int]]:
    """Greedy token ids, one conversation at a time, without transformers' generate and without a cache."""
    answers = []
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        new: list[int] = []
        while len(new) < max_new_tokens and (not new or new[-1] not in eos):
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        answers.append(new)
    return answers


def dialogues(n: int) -> list[list[dict]]:
    texts = sentences(4 * n, seed=1)
    turns = [{"role": role, "content": ""} for role in ("user", "assistant", "user", "assistant")]
    return [
        [{**turn, "content": text} for turn, text in zip(turns, texts[4 * i :], strict=False)][: 2 + 2 * (i % 2)]
        for i in range(n)
    ]


def question(kind="span", answer=("revenue",), scale="", uid="q1", **more) -> dict:
    """A TAT-QA question; a tuple is a list of spans."""
    answer = list(answer) if isinstance(answer, tuple) else answer
    return {"uid": uid, "question": "What?", "answer_type": kind, "answer": answer, "scale": scale, **more}


def context(*questions) -> dict:
    """A TAT-QA table and passages with these questions."""
    table = [["", "2019", "2018"], ["Sales", "$1,496.5", "(59.9)"], ["Costs", "1,202.9", "1,107.7"]]
    paragraphs = [{"order": 2, "text": "Second passage."}, {"order": 1, "text": "First passage of words."}]
    return {"table": {"uid": "t", "table": table}, "paragraphs": paragraphs, "questions": list(questions)}


def toy_base(**flags) -> Base:
    """The demo's model, not quantised, as the base of a run; `flags` are those of BaseFlags."""
    from llm_alignment.models import BaseFlags, resolve_base

    return resolve_base(BaseFlags(**{"model": str(DEMO / "model"), "no_4bit": True} | flags))


def setup_of(values: dict) -> Setup:
    """What a run with these flags stands on; no earlier run is looked for."""
    from llm_alignment.adapters import LoraSettings
    from llm_alignment.flags import fill
    from llm_alignment.models import BaseFlags, load_tokenizer, resolve_base
    from llm_alignment.training import Setup

    base = resolve_base(fill(BaseFlags, values))
    return Setup(base, load_tokenizer(base), fill(LoraSettings, values), Path(values["output_dir"]), None, {})


def toy_run(folder: Path | str, **flags) -> tuple[Setup, TrainingSettings, DpoSettings]:
    """What dpo_train.py makes of these flags, on the demo's model where they name no other."""
    import dpo_train
    from llm_alignment.dpo import DpoSettings
    from llm_alignment.flags import fill
    from llm_alignment.training import TrainingSettings

    demo = {"model": str(DEMO / "model"), "no_4bit": True, "output_dir": str(folder)}
    values = {**vars(dpo_train.build_parser().parse_args([])), **demo, **flags}
    return setup_of(values), fill(TrainingSettings, values, longest=99), fill(DpoSettings, values)


def toy_model() -> torch.nn.Module:
    """A model for what reads no text: on CPU, with a list for the batches that it is given."""
    model = torch.nn.Linear(1, 1)
    model.device, model.batches = torch.device("cpu"), []
    return model


def rows_of(evaluation: Evaluation, model, tokenizer, path: Path, **options) -> list[dict]:
    """What `read_items` gives of an adapter, in a file that is not to hold another evaluation."""
    from llm_alignment.evaluation import read_items

    options = {"fingerprint": {"adapter": "trained"}, "renew": False} | options
    return read_items(evaluation, lambda: model, tokenizer, path, **options)


def peak_bytes(run, parameters):
    """The most bytes that tensors made by `run()` took at once; `parameters` are not counted."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes, top = {}, 0
    known = {parameter.untyped_storage()._cdata for parameter in parameters}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal top
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if hasattr(leaf, "untyped_storage"):
                    storage = leaf.untyped_storage()
                    if storage._cdata not in known and storage._cdata not in sizes:
                        sizes[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, sizes.pop, storage._cdata, None)
            top = max(top, sum(sizes.values()))
            return result

    with Count():
        run()
    return top
