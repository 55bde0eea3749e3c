"""The reward model, the two 1-10 scales, and how far it agrees with known preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from llm_alignment import prompts
from llm_alignment.devices import tf32
from llm_alignment.files import InputError
from llm_alignment.health import main_script
from llm_alignment.hub import check_files, commit_of, fetch_model, files_sha256
from llm_alignment.models import check_vocabulary, end_of_turn, from_pretrained, read_tokenizer
from llm_alignment.processes import device_and_dtype, halved_when_full, main_process


class RewardModel:
    """A sequence classifier with one label that scores conversations ending with the assistant's answer.

    Follows the cards of Skywork-Reward-V2: the reward model's own chat template, one BOS, the raw logit. Always in
    float32: bf16 moves scores by up to 0.1 and makes ties. `device` None takes the GPU when there is one; the model is
    on it while it scores, and in host memory else. Code of its repository runs only with `trust_remote_code`. Raises
    InputError when `name` is not such a model."""

    def __init__(self, name: str, *, device: str | None = None, batch_size: int = 0, trust_remote_code: bool = False):
        what = f"--reward_model {name}"
        self.device = torch.device(device) if device else device_and_dtype()[0]
        folder = fetch_model(name, None, "--reward_model")
        check_files(folder, what)
        self.tokenizer = read_tokenizer(folder, what, trust_remote_code=trust_remote_code)
        end_of_turn(self.tokenizer, what)  # a template that fails is told here, not after the first answers
        self.model = from_pretrained(
            AutoModelForSequenceClassification, folder, what,
            advice="name a chat sequence classifier with one label", dtype=torch.float32,
            device_map="meta" if self.device.type == "meta" else "cpu", trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if self.model.config.num_labels != 1:
            raise InputError(f"{what}: {self.model.config.num_labels} labels; name a classifier with one label")
        check_vocabulary(self.tokenizer, self.model, what)
        self.model.eval()
        self.batch_size = batch_size or 16
        self.config = self.model.config.get_text_config()
        self.max_length = min(self.config.max_position_embeddings, self.tokenizer.model_max_length)
        self.default_system = default_system_turn(self.tokenizer)
        named = name if Path(name).exists() else name.partition("@")[0]  # its commit is that of the weights
        self.fingerprint = {"name": named, "weights": commit_of(folder) or files_sha256(folder), "dtype": "float32"}

    def score(self, conversations: list[list[dict]]) -> list[float]:
        """Raw rewards. A long conversation loses the beginning of its oldest turns, never any of its answer."""
        inputs = [self.encode(conversation) for conversation in conversations]
        # The model reads the last token that is not this one, so it must stand in no conversation: a tokenizer may pad
        # with the token that ends a turn.
        used = {token for ids in inputs for token in ids}
        pad = self.config.pad_token_id = next(token for token in range(self.config.vocab_size) if token not in used)

        def score_batch(batch: list[int]) -> Iterator[tuple[int, float]]:
            width = max(len(inputs[index]) for index in batch)
            rows = [inputs[index] + [pad] * (width - len(inputs[index])) for index in batch]
            ids = torch.tensor(rows, device=self.model.device)
            logits = self.model(input_ids=ids, attention_mask=(ids != pad).long(), use_cache=False).logits
            return enumerate(logits[:, 0].tolist())

        order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
        try:
            self.model.to(self.device)
            with torch.no_grad(), tf32(False):
                rewards = dict(halved_when_full(order, self.batch_size, score_batch))
        finally:
            self.model.to("cpu")
            torch.cuda.empty_cache()
        if not all(map(math.isfinite, rewards.values())):
            raise InputError(f"--reward_model {self.fingerprint['name']}: a reward is not finite; name another model")
        return [rewards[index] for index in range(len(inputs))]

    def encode(self, conversation: list[dict]) -> list[int]:
        """Token ids of a conversation, no longer than the model's context."""
        turns = [dict(turn) for turn in conversation]
        while True:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = prompts.encode(text.replace(self.default_system, "", 1), self.tokenizer)
            excess = len(ids) - self.max_length
            if excess <= 0:
                return ids
            oldest = next((turn for turn in turns[:-1] if turn["content"]), None)
            if oldest is None:
                raise InputError(
                    f"an answer of {len(ids)} tokens is longer than the reward model's {self.max_length}; "
                    "lower --mtbench_max_tokens or name another --reward_model"
                )
            oldest["content"] = prompts.without_tokens(oldest["content"], excess, self.tokenizer, at_end=False)


def load_reward_model(name: str, batch_size: int = 0, own_code: bool = False, on_meta: bool = False) -> RewardModel:
    """The reward model; without weights, on torch's meta device, in all processes but the main one and `on_meta`.
    `own_code`: whether code of its repository may run."""
    device = None if main_process() and not on_meta else "meta"
    return RewardModel(name, device=device, batch_size=batch_size, trust_remote_code=own_code)


def default_system_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The system turn that a chat template adds by itself; "" when it adds none. Qwen2.5's template renders the user
    turn Q as "<|im_start|>system\\nYou are Qwen, ...<|im_end|>\\n" followed by "<|im_start|>user\\nQ<|im_end|>\\n";
    the result is the first of the two. A second user turn shows what stands before every user turn; the rest of what
    stands before the first one is the system turn."""
    question, second = ({"role": "user", "content": text} for text in ("QUESTION", "SECOND"))
    try:
        one, two = (tokenizer.apply_chat_template(turns, tokenize=False) for turns in ([question], [question, second]))
    except TemplateError:  # templates that insist on alternating roles: none of them adds a system turn
        return ""
    header = two.removeprefix(one).partition("SECOND")[0]
    return one.partition("QUESTION")[0].removesuffix(header).removeprefix(tokenizer.bos_token or "")


def to_score(reward: float) -> float:
    """A raw reward on the 1-10 scale, monotone: 1 + 9 * sigmoid(reward / 5)."""
    return 5.5 + 4.5 * math.tanh(reward / 10)  # the same, without overflow


def to_logged_scale(reward: float) -> float:
    """A raw reward on the 1-10 scale of the published tables. Not monotone: 1.00 gives 10, 1.01 gives 2.82."""
    share = (reward + 5) / 10 if reward < 0 else reward if reward <= 1 else reward / 5
    return min(10.0, max(1.0, 1 + 9 * share))


LIKE_LENGTH = 0.1  # answers whose lengths differ by this share of the longer one or less are of like length
TITLES = {
    "all": "all pairs",
    "longer": "chosen is longer",
    "like": "of like length (10 %)",
    "shorter": "chosen is shorter",
    "two_scripts": "answers in two scripts",
}


def check_judge(pairs: list[dict], score: Callable[[list[list[dict]]], list[float]]) -> dict:
    """How far rewards agree with the known preferences of `pairs` (see `preferences`), and with length; `score` is
    `RewardModel.score`, of each answer after its prompt. Returns

    - "groups": {name: {"n", "ties", "agree", "share", "low", "high"}}: pairs, those of equal rewards, of the others
      those with the higher reward for chosen, also in per cent with the exact 95 % interval (Clopper and Pearson
      1934); None without such pairs. By name: "all"; the prompt's script; "longer", "like", "shorter", which chosen is
      beside rejected (a judge of length agrees with all and none); "two_scripts" where the answers' scripts differ.
    - "longer_preferred", "longer_chosen": in per cent of the pairs of unequal lengths and rewards, how often the
      longer answer has the higher reward, and how often it is the chosen one.
    - "length_explains": r squared, in per cent, of the differences in reward and in the logarithm of length, through
      the origin, as it must not matter which answer comes first; None without any."""
    conversations = []
    for pair in pairs:
        prompt = pair["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        conversations += [[*turns, {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")]
    rewards = iter(score(conversations))
    groups: dict[str, list[float]] = {name: [] for name in TITLES}
    both: list[tuple[float, float]] = []  # of each pair the differences in reward and in the logarithm of length
    for pair, turns in zip(pairs, conversations[::2], strict=True):
        chosen, rejected = (max(1, len(pair[side])) for side in ("chosen", "rejected"))
        is_like = abs(chosen - rejected) <= LIKE_LENGTH * max(chosen, rejected)
        names = ["all", main_script(turns[-2]["content"]) or "no letters"]
        names += ["like" if is_like else "longer" if chosen > rejected else "shorter"]
        names += ["two_scripts"] * (main_script(pair["chosen"]) != main_script(pair["rejected"]))
        difference = next(rewards) - next(rewards)
        for name in names:
            groups.setdefault(name, []).append(difference)
        both.append((difference, math.log(chosen / rejected)))
    told = [(d, x) for d, x in both if d and x]
    squares = sum(d * d for d, _ in both) * sum(x * x for _, x in both)
    product = sum(d * x for d, x in both)
    order = [*TITLES, *sorted(groups.keys() - TITLES.keys())]
    return {
        "groups": {name: agreement(groups[name]) for name in order if groups[name]},
        "longer_preferred": 100 * sum(d * x > 0 for d, x in told) / len(told) if told else None,
        "longer_chosen": 100 * sum(x > 0 for _, x in told) / len(told) if told else None,
        "length_explains": 100 * product**2 / squares if squares else None,
    }


def agreement(differences: list[float]) -> dict:
    """A group of `check_judge`, of its reward differences."""
    from scipy.stats import binomtest

    told, agree = sum(d != 0 for d in differences), sum(d > 0 for d in differences)
    result = {"n": len(differences), "ties": len(differences) - told, "agree": agree}
    if not told:
        return {**result, "share": None, "low": None, "high": None}
    test = binomtest(agree, told)
    interval = test.proportion_ci(0.95, method="exact")
    return {**result, "share": 100 * test.statistic, "low": 100 * interval.low, "high": 100 * interval.high}


def judge_lines(report: dict) -> list[str]:
    """A report as lines to print."""
    width = max(len(TITLES.get(name, name)) for name in report["groups"])
    lines = [f"{'the judge agrees with':{width}}  share [95 % interval]        pairs  equal rewards"]
    for name, group in report["groups"].items():
        told = "-" if group["share"] is None else f"{group['share']:5.1f} % [{group['low']:.1f}, {group['high']:.1f}]"
        lines.append(f"{TITLES.get(name, name):{width}}  {told:22}  {group['n']:9}  {group['ties']:13}")
    preferred, chosen, explained = (report[key] for key in ("longer_preferred", "longer_chosen", "length_explains"))
    if preferred is not None:
        lines.append(f"the longer answer has the higher reward in {preferred:.1f} % and is chosen in {chosen:.1f} %")
    if explained is not None:
        lines.append(f"length explains {explained:.1f} % of the reward differences (r squared)")
    return lines
