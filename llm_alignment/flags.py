"""The command line's parser, argparse types, the flag groups that scripts share, and the demo's defaults."""

import argparse
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from llm_alignment.files import InputError

T = TypeVar("T")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """States the default of every flag that has one; fills paragraphs, and leaves indented ones as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = functools.partial(textwrap.fill, width=width, break_on_hyphens=False)
        return "\n\n".join(part if part.startswith(" ") else fill(part) for part in text.strip().split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class Parser(argparse.ArgumentParser):
    """A parser of which every error is one line, and that takes no abbreviation, which would hide a misspelt flag.
    Dashes and underscores in a flag's name are the same. --config FILE stands for the flags in a file. --help shows
    the flags that `shown` names (all where it names none), --help_all shows all."""

    def __init__(self, script: str, docstring: str | None, shown: str = "") -> None:
        prog, formatter = f"python {script}", functools.partial(Formatter, max_help_position=34)
        super().__init__(prog, f"{prog} [--flag value ...]", docstring, formatter_class=formatter, allow_abbrev=False)
        self.shown = shown.split()
        add = add_group(self, "about the flags", trains=False)
        add("--help_all", action="help", help="show every flag with its default")
        add("--config", metavar="FILE", default=argparse.SUPPRESS,
            help="YAML file of lines `flag: value`, or the run.json of a run; the command line wins")  # fmt: skip
        add("--version", action="version", help="show the version")

    @property
    def version(self) -> str:
        """What argparse prints for --version; it takes longer to look up than a parser to build."""
        return importlib.metadata.version("llm-alignment")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags, --help_all every one\n")

    def print_help(self, file: Any = None) -> None:
        for action in self._actions:
            if self.shown and action.dest not in {*self.shown, "help", "help_all", "config"}:
                action.help = argparse.SUPPRESS
        super().print_help(file)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = self.expand(sys.argv[1:] if args is None else args)
        if "--help_all" in words:
            self.shown = []
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.suggestion(unknown[0])}")
        return parsed

    def suggestion(self, flag: str) -> str:
        """The known flag that a misspelt one is most like, to be added to an error; "" when there is none."""
        near = difflib.get_close_matches(flag.partition("=")[0], self._option_string_actions, 1)
        return f"; did you mean {near[0]}?" if near else ""

    def spelt(self, flag: str) -> str:
        """The flag as this parser spells it, with whatever dashes and underscores it was written."""
        name = flag.removeprefix("--").replace("-", "_")
        spellings = (flag, f"--{name}", f"--no-{name.removeprefix('no_')}" if name.startswith("no_") else flag)
        return next((known for known in spellings if known in self._option_string_actions), flag)

    def expand(self, words: Sequence[str]) -> list[str]:
        """The words with flags as this parser spells them, those of --config files first."""
        left, given, from_files = list(words), [], []
        while left:
            flag, is_joined, value = left.pop(0).partition("=")
            if flag == "--config" and (is_joined or left):
                from_files += self.words_of(Path(value if is_joined else left.pop(0)))
            else:
                given.append((self.spelt(flag) if flag.startswith("--") else flag) + is_joined + value)
        return from_files + given

    def words_of(self, path: Path) -> list[str]:
        """The flags in a --config file, as words of a command line; YAML's 1e-5 and no are texts, as they stand."""
        import yaml

        try:
            text = path.read_text("utf-8-sig")
            content = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.BaseLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {path}: {getattr(error, 'strerror', None) or ' '.join(str(error).split())}")
        if not isinstance(content, dict):
            self.error(f"--config {path}: write one `flag: value` a line")
        if isinstance(argv := content.get("argv"), list):  # the run.json of a run
            if not all(isinstance(word, str) and not word.startswith("--config") for word in argv):
                self.error(f"--config {path}: its argv is no list of texts, or names another file")
            return self.expand(argv)
        words = []
        for name, value in content.items():
            flag, negative = self.spelt(f"--{name}"), self.spelt(f"--no-{name}")
            action = self._option_string_actions.get(flag)
            text = value if isinstance(value, str) else json.dumps(value)
            if action is None or flag == "--config":
                self.error(f"--config {path}: unknown flag {name}{self.suggestion(flag)}")
            if isinstance(value, dict | list):
                self.error(f"--config {path}: {name} has more than one value; write a list as a,b")
            if action.nargs != 0:
                words += [] if text == "null" else [f"{flag}={text}"]
            elif text not in ("true", "false"):
                self.error(f"--config {path}: {name}: {text}; write true or false")
            elif text == "true" or negative in self._option_string_actions:
                words.append(flag if text == "true" else negative)
        return words


def add_group(parser: argparse.ArgumentParser, title: str, *, trains: bool | str) -> Callable[..., argparse.Action]:
    """The function that adds flags to the group `title`; `trains`: do they change what is trained, always, never, or
    where `neutral_flags` is told this word, such as "reddit" for flags that shape Reddit's pairs alone."""
    group = parser.add_argument_group(title)
    group.trains = trains  # type: ignore[attr-defined]
    return group.add_argument


def neutral_flags(parser: argparse.ArgumentParser, *counted: str) -> set[str]:
    """The flags that a resumed run may change: those that do not change what is trained, where those of the words
    `counted` do; see `add_group`."""
    groups = [group for group in parser._action_groups if getattr(group, "trains", False) not in (True, *counted)]
    return {action.dest for group in groups for action in group._group_actions}


def fill(kind: type[T], args: argparse.Namespace | dict[str, Any], **more: Any) -> T:
    """The dataclass `kind`, its fields filled by the flags of their names, or by `more`: the only bridge from the
    command line to plain values. A dataclass in it is filled likewise; others need a flag, `more` or a default."""
    names = {field.name for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    values = args if isinstance(args, dict) else vars(args)
    kinds = {name: each for name, each in get_type_hints(kind).items() if dataclasses.is_dataclass(each)}
    filled = {name: fill(each, args) for name, each in kinds.items() if name in names - more.keys()}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names} | filled | more)


def number(kind: type, low: float, high: float = 2**31, ends: str = "[)") -> Callable[[str], Any]:
    """argparse type: an int or float between `low` and `high`, which count ("[", "]") or do not ("(", ")")."""

    def parse(text: str) -> Any:
        value = kind(text)
        is_above = value > low if ends[0] == "(" else value >= low
        if not is_above or not (value < high if ends[1] == ")" else value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not within {ends[0]}{low}, {high}{ends[1]}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive = functools.partial(number, low=0, ends="()")
not_negative = functools.partial(number, low=0)
ratio = number(float, 0, 1, "[]")
positive_ratio = number(float, 0, 1, "(]")
dropout = number(float, 0, 1)  # 1 would leave nothing to train on
positive_temperature = number(float, 1e-6)  # logits are divided by it
seed = number(int, 0, 2**32)  # as numpy takes them


def steps_or_share(text: str) -> float:
    """argparse type: a whole number of steps, or a share of the run's steps, which is below 1."""
    value = not_negative(float)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number of steps nor a share below 1")
    return int(value) if value == int(value) else value


def temperature(text: str) -> float:
    """argparse type: a temperature of sampling, or 0, which is greedy."""
    return 0.0 if float(text) == 0 else positive_temperature(text)


def tracker(text: str) -> str:
    """argparse type: a tracker of the training that is installed, or "none"; others are left to the choices."""
    if text in TRACKERS and importlib.util.find_spec(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is not installed; python -m pip install {text}")
    return text


DEMO_DIR = Path(__file__).resolve().parents[1] / "experiments" / "demo"
DEMO = {name: str(DEMO_DIR / name) for name in ("model", "reward_model")}
DEMO["retention_file"] = str(DEMO_DIR / "retention.jsonl")
DPO_DEMO = DEMO | dict(
    tatqa_dir=str(DEMO_DIR / "tatqa"), mtbench_file=str(DEMO_DIR / "mt_bench_en.jsonl"), output_dir="demo_dpo",
    limit_pairs=480, beta=0.5, batch=4, grad_acc=2, learning_rate=1e-3, eval_limit=200, eval_max_new_tokens=16,
    mtbench_max_tokens=32, instruct_max_tokens=32,
)  # fmt: skip
FINANCE_DEMO = DPO_DEMO | dict(
    reddit_dataset=str(DEMO_DIR / "reddit.jsonl"), finance_dataset=str(DEMO_DIR / "finance_instruct.jsonl"),
    general_dataset=str(DEMO_DIR / "orca_pairs.jsonl"), reddit_sample_rate=1.0, finance_instruct_pairs=120,
    general_pairs=120, instruct_limit=40, instruct_max_tokens=48, reddit_limit=40, reddit_max_tokens=48, limit_pairs=0,
)  # fmt: skip

# Groups: one line a flag. Words of `trains`: "measured" is how an answer is made and scored, "asked" is what is asked
# (some scripts keep it out of the training data); "reddit", "finance" and "general" shape the pairs of one source.

ON_OFF = argparse.BooleanOptionalAction
SPLITS = ("train", "validation", "test")
TRACKERS = ("trackio", "tensorboard", "wandb")
# TRL's losses that need the policy and its reference alone, and those that read --label_smoothing.
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")

# fmt: off


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = add_group(parser, "model", trains=True)
    add("--model", default="Qwen/Qwen3-1.7B", help="hub id or local folder")
    add("--model_revision", default=None, help="branch, tag or commit on the hub; without it the main branch")
    add("--no_4bit", action="store_true", help="load the base unquantised: faster, and 2 GiB more for a 1.7B model")
    add("--quant_type", choices=["nf4", "fp4"], default="nf4", help="4-bit format")
    add("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="number type of weights and computing; auto: bf16 where the GPU has it, else fp16; fp32 on CPU")
    add("--liger", action="store_true", help="fused kernels on a GPU, faster with less memory; pip install -e .[fast]")
    add("--trust_remote_code", action="store_true", help="run code that a model's repository ships")
    add("--thinking", action="store_true", help="Qwen3 may think before it answers, and thoughts in the data are "
        "trained on; without it every answer follows an empty <think></think> block, and thoughts are left out")


def add_training_flags(parser: argparse.ArgumentParser, exp_log: str, *, in_stages: bool = False) -> None:
    """What every training script takes; one that trains `in_stages` has rank, alpha, epochs and learning rate of its
    own for each stage, and takes no checkpoint by its path: the stages know theirs."""
    add_model_flags(parser)
    add = add_group(parser, "LoRA", trains=True)
    if not in_stages:
        add("--lora_r", type=positive(int), default=8,
            help="size of the adapter: 8-16 for style, 32-64 for new knowledge; more memory")
        add("--lora_alpha", type=positive(int), default=16, help="strength of the adapter; its scale is alpha / rank")
    add("--lora_dropout", type=dropout, default=0.05, help="dropout before the adapter; raise it for little data")
    add("--target_modules", default="q_proj,v_proj", help="layers with an adapter; all-linear learns more, takes more")
    add = add_group(parser, "training", trains=True)
    if not in_stages:
        add("--epochs", type=positive(float), default=1.0, help="passes over the data; 0.5 is fine")
        add("--learning_rate", type=positive(float),
            help="peak of the cosine; raise it if the loss hardly falls, lower it if the base is forgotten")
    add("--batch", type=positive(int), help="examples per device and forward pass; lower it when memory is full")
    add("--grad_acc", type=positive(int), default=16, help="passes per optimiser step; raise it as --batch is lowered")
    add("--max_steps", type=not_negative(int), default=0, help="end after N optimiser steps; 0 = after --epochs")
    add("--system_prompt", default="", metavar="TEXT", help="system turn of conversations that have none")
    add = add_group(parser, "time and checkpoints", trains=False)
    if not in_stages:
        add("--time", action="store_true", help="with --dry_run: two steps, a batch, and how long a run takes")
    add("--save_steps", type=positive(int), default=50, help="steps between checkpoints")
    choices = {"choices": ["auto"], "metavar": "auto"} if in_stages else {"metavar": "auto|PATH"}
    add("--resume_from_checkpoint", **choices,
        help="continue a run that was stopped; auto takes the newest complete checkpoint of --output_dir")
    add_run_flags(parser, exp_log)


def add_run_flags(parser: argparse.ArgumentParser, exp_log: str, *, trains: bool = True) -> None:
    """Flags of every run; some are there only for a script that `trains`."""
    add = add_group(parser, "run", trains=True)
    add("--seed", type=seed, default=42, help="seed of everything random")
    add("--demo", action="store_true", help="a miniature of the experiment: CPU, minutes, no downloads")
    add = add_group(parser, "output", trains=False)
    add("--output_dir", help="folder of the run")
    add("--dry_run", action="store_true", help="check data, model files and adapter, print the plan, and exit")
    add("--table", choices=["headline", "full"], default="headline", help="rows of the table at the end")
    add("--exp_log", default=exp_log, help="JSONL file that gets the run's record")
    add("--exp_tag", default="", help="a name for the run in that file, for rerun.py and report.py")
    if trains:
        add("--report_to", type=tracker, choices=["none", *TRACKERS], default="none", help="tracker of the training")
    add_scoring_flags(parser)
    add = add_group(parser, "retention", trains="asked")
    add("--do_retention", action=ON_OFF, default=True, help="measure what the tuned model can no longer do")
    add("--retention_file", default="auto", metavar="auto|PATH", help="questions with checks; auto: the project's own")
    add = add_group(parser, "how retention is measured", trains="measured")
    add("--retention_limit", type=not_negative(int), default=0, help="a sample of N questions; 0 = all")
    add("--retention_max_tokens", type=positive(int), default=64, help="new tokens of an answer")
    if trains:
        add = add_group(parser, "gates", trains=False)
        add("--gates", default="", metavar="METRIC=DIFFERENCE[,...]",
            help="least acceptable differences, as in mtbench=-0.3,retention=-5; a missed one is exit code 1")
    add = add_group(parser, "memory and speed", trains=False)
    add("--gpu_memory_share", type=positive_ratio, default=None, help="part of the GPU's memory to take; without "
        "it all; on Windows what is free, at most 0.95, since a full GPU would spill into host memory, far slower")
    add("--no_baseline_cache", action="store_true", help="compute the baseline and the reference of DPO again")
    if trains:
        add("--gradient_checkpointing", nargs="?", choices=["auto", "on", "off"], const="on", default="auto",
            help="recompute activations, slower with less memory; auto: only where training would not fit without it")
        add("--no-gradient_checkpointing", dest="gradient_checkpointing", action="store_const", const="off",
            default=argparse.SUPPRESS, help="the same as --gradient_checkpointing off")


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """The reward model and its batches."""
    add = add_group(parser, "scoring", trains="measured")
    add("--reward_model", default="Skywork/Skywork-Reward-V2-Qwen3-0.6B", help="model that scores answers: hub "
        "id or folder; it has one label")
    add = add_group(parser, "batches of the evaluation", trains=False)
    add("--eval_batch_size", type=not_negative(int), default=0, help="answers or rewards at once; 0 = by free memory")


def add_mtbench_flags(add: Callable[..., argparse.Action]) -> None:
    """How the questions of MT-Bench are sampled and answered; `add` adds a flag to the script's own group."""
    add("--mtbench_questions_seed", type=seed, default=42, help="seed of the samples")
    add("--mtbench_temperature", type=temperature, default=0.0, help="0 answers greedily")
    add("--mtbench_max_tokens", type=positive(int), default=1024, help="new tokens a turn; more if many are cut")
    add("--mtbench_backend", choices=["simple", "auto"], default="simple", help="auto: continuous batching on a GPU")


def add_dpo_flags(parser: argparse.ArgumentParser, *, in_stages: bool = False) -> None:
    """What every DPO script takes; one that trains `in_stages` has some of its own and begins with a fresh adapter."""
    add_training_flags(parser, "experiments/dpo_experiments.jsonl", in_stages=in_stages)
    add = add_group(parser, "DPO", trains=True)
    if not in_stages:
        add("--beta", type=positive(float), default=0.03,
            help="small moves further from the base, 0.01-0.1 is usual; 0.3 and more stays near it")
    add("--loss_type", default="sigmoid", metavar="NAME[,NAME...]",
        help=f"TRL's losses, their weighted sum if there are several: {', '.join(LOSS_TYPES)}")
    add("--loss_weights", default="", metavar="W[,W...]", help="a number for each of --loss_type; else each counts 1")
    add("--label_smoothing", type=ratio, default=0.0,
        help=f"share of pairs taken to be labelled the wrong way, for {', '.join(SMOOTHED)}")
    add("--max_prompt_length", type=positive(int), default=2048, help="tokens that a prompt is cut to")
    add("--max_length", type=positive(int), default=3072, help="tokens of prompt and answer together")
    add("--use_chat_template", action="store_true", help="render TAT-QA's prompts by the chat template; without it "
        "they are plain text, as published")
    add("--no_prefix_sharing", action="store_true", help="read a pair's prompt once for each answer")
    add("--group_by_table", action=ON_OFF, default=False, help="train on pairs whose prompts share a beginning (a "
        "table, a system prompt) together and read it once; it changes which pairs meet in an optimiser step")
    add("--limit_pairs", type=not_negative(int), default=0, help="a sample of N pairs; 0 = all")
    if not in_stages:
        add("--no_train", action="store_true", help="only evaluate")
        add("--load_adapter", default="", metavar="DIR", help="start from this adapter")
        add("--adapter_trainable", action="store_true", help="train it further; as loaded it is the reference")
    add = add_group(parser, "log", trains=False)
    add("--logging_steps", type=positive(int), default=5, help="steps between log lines")
    add = add_group(parser, "what is measured", trains="asked")
    add("--do_mtbench", action=ON_OFF, default=True, help="measure MT-Bench")
    add("--mtbench_file", default="mt_bench_ru.json", help="questions of MT-Bench, fetched when missing")
    add("--do_instruct", action=ON_OFF, default=True, help="measure how instructions are followed")
    add("--instruct_limit", type=not_negative(int), default=25, help="instructions to ask; 0 = all")
    add("--instruct_max_tokens", type=positive(int), default=512, help="new tokens of an instruction's answer")
    add = add_group(parser, "how it is measured", trains="measured")
    add("--eval_baseline", action=ON_OFF, default=True, help="measure before training too")
    add("--mtbench_limit", type=not_negative(int), default=50, help="a sample of N questions; 0 = all")
    add("--mtbench_max_tokens", type=positive(int), default=256, help="new tokens a turn; more if many are cut")
    parser.set_defaults(batch=2, grad_acc=16)
    if not in_stages:
        parser.set_defaults(learning_rate=5e-6)


def add_tatqa_flags(parser: argparse.ArgumentParser, *, only_measured: bool = False) -> None:
    """Where TAT-QA is read from, what its prompts look like, and how it is measured; the split that is trained on."""
    add = add_group(parser, "TAT-QA", trains=True)
    add("--tatqa_dir", default="", metavar="PATH", help="folder of its JSON files; without it fetched from the hub")
    if not only_measured:
        add("--tatqa_split", choices=SPLITS, default="train", help="split to train on")
    add("--tatqa_table_rows", type=positive(int), default=20, help="rows of a table to show")
    add("--tatqa_table_cols", type=positive(int), default=8, help="columns of a table to show")
    add("--tatqa_para_chars", type=not_negative(int), default=1200, help="characters of passages to show")
    add("--tatqa_only_rel_paras", action=ON_OFF, default=True, help="only the passages that a question refers to")
    add = add_group(parser, "what is measured on TAT-QA", trains="asked")
    with_pairs = "" if only_measured else "; with --pairs only when asked for"
    add("--do_eval", action=ON_OFF, default=True, help=f"measure TAT-QA{with_pairs}")
    add("--eval_split", choices=SPLITS, default="validation", help="split to measure on")
    add = add_group(parser, "how TAT-QA is measured", trains="measured")
    add("--eval_limit", type=not_negative(int), default=1000, help="questions to ask; 0 = all")
    add("--eval_max_new_tokens", type=positive(int), default=64, help="longest answer in tokens")
    add("--eval_temperature", type=temperature, default=0.0, help="0 = greedy")
    add("--eval_top_p", type=positive_ratio, default=1.0, help="share of probability to sample from")
    add("--eval_save_json", default="", metavar="X.jsonl", help="its rows also go to X_baseline.jsonl, X_post.jsonl")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The data sets of finance, how pairs are made of them, and how their evaluations are made."""
    add = add_group(parser, "Reddit posts", trains=True)
    add("--reddit_dataset", default="winddude/reddit_finance_43_250k", help="hub id, file or folder")
    add("--reddit_min_post_chars", type=not_negative(int), default=120, help="shortest post to use")
    add("--reddit_max_post_chars", type=positive(int), default=2000, help="characters that posts are cut to")
    add = add_group(parser, "Reddit pairs", trains="reddit")
    add("--reddit_min_comment_chars", type=not_negative(int), default=40, help="shortest comment to use")
    add("--reddit_score_margin", type=not_negative(float), default=0.10, help="least lead in score of the chosen")
    add("--reddit_length_tol", type=not_negative(float), default=0.6, help="most difference in length, as a share")
    add("--reddit_max_pairs_per_post", type=positive(int), default=1, help="pairs of one post")
    add("--reddit_sample_rate", type=ratio, default=0.3, help="share of the pairs to use")
    add("--hybrid_ratio", type=ratio, default=0.7, help="share of Reddit in a mix of two")
    add("--mix_policy", choices=["fill", "exact"], default="fill",
        help="fill takes what is there when a source has too few, exact keeps the shares and takes less")
    add = add_group(parser, "Finance-Instruct", trains=True)
    add("--finance_dataset", default="Josephgflowers/Finance-Instruct-500k", help="hub id, file or folder")
    add = add_group(parser, "Finance-Instruct pairs", trains="finance")
    add("--finance_instruct_pairs", type=positive(int), default=2000, help="at most N pairs of it")
    add("--finance_temperature", type=temperature, default=0.0, help="of the base's rejected answers (published: 0.8)")
    add = add_group(parser, "general pairs", trains="general")
    add("--general_dataset", default="Intel/orca_dpo_pairs", help="hub id, file or folder with question (or prompt), "
        "chosen, rejected and optionally system; or with chosen and rejected dialogues, as Anthropic/hh-rlhf")
    add = add_group(parser, "what is measured on Reddit", trains="asked")
    add("--do_reddit", action=ON_OFF, default=True, help="measure replies to held-out posts")
    add("--reddit_limit", type=positive(int), default=100, help="posts to reply to")
    add = add_group(parser, "how replies to Reddit are measured", trains="measured")
    add("--reddit_max_tokens", type=positive(int), default=256, help="new tokens of a reply")
    parser.set_defaults(max_prompt_length=1536, max_length=2560, mtbench_file="mt_bench_en.json")


# fmt: on


def losses(loss_type: str, loss_weights: str) -> tuple[list[str], list[float] | None]:
    """TRL's `loss_type` and `loss_weights`, as the flags ask for them. Raises InputError for those that do not fit."""
    names = [name.strip() for name in loss_type.split(",")]
    if unknown := [name or "an empty name" for name in names if name not in LOSS_TYPES]:
        choices = ", ".join(LOSS_TYPES)
        raise InputError(f"--loss_type {loss_type}: {unknown[0]} is unknown or needs another model; use {choices}")
    try:
        weights = [float(weight) for weight in loss_weights.split(",")] if loss_weights else None
    except ValueError as error:
        raise InputError(f"--loss_weights {loss_weights}: {error}; give numbers, as in 1,0.2") from error
    if weights and (len(weights) != len(names) or not all(map(math.isfinite, weights)) or not any(weights)):
        needed = f"{len(names)} finite numbers are needed, one for each of --loss_type, and not all of them 0"
        raise InputError(f"--loss_weights {loss_weights}: {needed}")
    return names, weights


def is_given(argv: list[str], *names: str) -> bool:
    """Whether the user gave one of these flags, which may have its default's value."""
    return any(word.partition("=")[0] in names for word in argv)


def refuse(*rules: tuple[object, str]) -> None:
    """Raises InputError with the text of the first rule, (condition, text), whose condition is true."""
    for is_broken, message in rules:
        if is_broken:
            raise InputError(message)


def check_dpo_flags(args: argparse.Namespace, *, in_stages: bool = False) -> None:
    """Raises InputError for flags of a DPO script that do not go together."""
    (names, _), smoothing = losses(args.loss_type, args.loss_weights), args.label_smoothing
    given = f"--label_smoothing {smoothing}: --loss_type {args.loss_type}"
    refuse(
        (smoothing and not {*names} & {*SMOOTHED}, f"{given} does not use it; only {', '.join(SMOOTHED)} do"),
        ("exo_pair" in names and not smoothing, f"{given} needs it above 0; its paper recommends 0.001"),
        ("robust" in names and smoothing >= 0.5, f"{given} needs a share below 0.5"),
        (getattr(args, "time", False) and not args.dry_run, "--time goes with --dry_run; add it"),
        (args.max_prompt_length >= args.max_length, f"--max_prompt_length {args.max_prompt_length} leaves no room for "
         f"an answer within --max_length {args.max_length}; raise --max_length"),
        (args.eval_save_json and not args.do_eval,
         f"--eval_save_json {args.eval_save_json}: without --do_eval there are no TAT-QA rows to write"),
        (args.group_by_table and (args.batch == 1 or args.no_prefix_sharing),
         "--group_by_table shares within a micro-batch: give --batch 2 or more, without --no_prefix_sharing"),
    )  # fmt: skip
    if in_stages:
        return
    adapter, trained = args.load_adapter, args.adapter_trainable
    has_sides = args.eval_baseline and (adapter or not args.no_train)
    refuse(
        (args.gates and not has_sides, "--gates: only one side is measured, so no difference; leave out the gates"),
        (trained and not adapter, "--adapter_trainable needs --load_adapter DIR: which adapter is to be trained on"),
        (adapter and not trained and not args.no_train,
         "--load_adapter: add --adapter_trainable to train it on, or --no_train to only measure it"),
        (args.no_train and not adapter and not args.eval_baseline,
         "--no_train without --load_adapter measures the base alone: leave out --no-eval_baseline"),
        (trained and Path(adapter).resolve() == Path(args.output_dir).resolve(),
         f"--load_adapter {adapter} is --output_dir too, and would be overwritten; name another"),
    )  # fmt: skip


def parse_arguments(
    parser: Parser, argv: list[str] | None, demo: dict[str, Any], further: Callable[..., dict] = lambda args: {}
) -> argparse.Namespace:
    """Parses `argv`, or the command line. `further` gives defaults by what was given, --demo those of `demo`. A demo's
    output folder is the first free one of NAME_1, NAME_2, ...; one that resumes, from a checkpoint or a stage, takes
    the last one. A text that is empty (of an unset shell variable) is an error: as a path it is the working folder."""
    words = parser.expand(sys.argv[1:] if argv is None else argv)
    if argv is None:
        sys.argv[1:] = words  # the record gets the flags and not the file, which may change
    args = parser.parse_args(words)
    for name, value in vars(args).items():
        if value == "" and parser.get_default(name) != "":
            parser.error(f"argument --{name}: it is empty; give a value or leave the flag out")
    defaults = further(args)
    if args.demo:
        folders = [f"{demo['output_dir']}_1"]
        while Path(folders[-1]).exists():
            folders.append(f"{demo['output_dir']}_{len(folders) + 1}")
        later_stage = getattr(args, "resume_from_stage", None) or getattr(args, "stage", 0) > 1
        resumes = args.resume_from_checkpoint or later_stage
        defaults |= {**demo, "output_dir": folders[-2:][0] if resumes else folders[-1]}
    parser.set_defaults(**defaults)
    return parser.parse_args(words)
