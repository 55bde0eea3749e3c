"""Merge a trained adapter into its base, check the result, and write a folder that other programs load.

    poetry run python experiments/export.py RUN_FOLDER --merged DIR
    poetry run python experiments/export.py RUN_FOLDER --merged DIR --dtype fp32

The base is the one that adapter_config.json of the run names; --model gives another place for it. It is loaded in bf16
or fp32, never in 4 bits, since merged 4-bit weights would be rounded a second time. Then the folder is loaded as any
program would load it, and must answer a few prompts as base plus adapter does: the mean KL divergence of the
next-token distributions stays below 0.05 nats in bf16 and 0.0001 in fp32, else nothing is left behind (exit code 2).

transformers, vLLM, llama.cpp's converter and Ollama (by its Modelfile) read DIR. After a run without --thinking its
chat template leaves thinking off unless it is asked for.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import exit_code

from llm_alignment.card import write_card
from llm_alignment.files import InputError, SkippedRows, log, parse_json, replace
from llm_alignment.flags import Parser, fill, not_negative, positive
from llm_alignment.results import read_results
from llm_alignment.runs import check_writable, held_alone

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from llm_alignment.models import Base

NO_THINKING = "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}"
LARGEST_KL = {"bf16": 0.05, "fp32": 1e-4}  # mean over the answers' tokens, in nats
CHATS = [[{"role": "user", "content": prompt}] for prompt in (
    "What is the capital of France?", "Explain in two sentences what a bond is.", "Write a short poem about the sea.",
    "Add 17 and 25.", "Назови столицу страны: Япония.", "Объясни простыми словами, что такое инфляция.",
    "Составь список из трёх полезных привычек.", "Переведи на английский: дом стоит у реки.",
)]  # fmt: skip


def build_parser() -> Parser:
    parser = Parser("experiments/export.py", __doc__)
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN_FOLDER", help="output folder of a training run")
    add("--merged", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    add("--dtype", choices=["bf16", "fp32"], default="bf16", help="number type of the weights")
    add("--scale", type=not_negative(float), default=1.0, help="strength of the adapter: 0 is the base, 1 the run")
    add("--model", default="", help="the base, if it is not where the adapter says (hub id or folder)")
    add("--model_revision", help="branch, tag or commit on the hub, if it is not the run's")
    add("--trust_remote_code", action="store_true", help="run code that the model's repository ships")
    add("--max_new_tokens", type=positive(int), default=32, help="tokens of an answer of the check")
    return parser


def saved_run(folder: Path) -> dict:
    """What run.json says; {} for an adapter that no script here trained."""
    return parse_json((folder / "run.json").read_bytes()) if (folder / "run.json").is_file() else {}


def checked_base(args: argparse.Namespace) -> Base:
    """The base of the adapter, from --model if it is given. Raises InputError when the run measured on another one."""
    from llm_alignment import adapters, models

    folder = args.run_folder
    try:
        name, run = adapters.adapter_config(str(folder))["base_model_name_or_path"], saved_run(folder)
        trained_on, commit = run["args"]["model"] if run else name, (run.get("commits") or {}).get("model")
        if not isinstance(name, str):
            raise TypeError(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its files name no base ({error!r}); train or copy it again") from error
    if trained_on != name:
        raise InputError(f"{folder}: adapter_config.json names {name}, but run.json {trained_on}; copy it again")
    revision = args.model_revision or (None if args.model else commit)
    given = {"model": args.model or name, "model_revision": revision, "no_4bit": True}
    base = models.resolve_base(fill(models.BaseFlags, args, **given))
    known = models.base_fingerprint(base, thinking=False)["weights"]
    for path in sorted(folder.glob("*_final.jsonl")):
        measured, _ = read_results(path, SkippedRows())
        weights = measured.get("weights") or known
        if weights != known and len(weights) == len(known):  # a commit of the hub says nothing of a folder's hash
            of_run = f"of {folder}, whose {path.name} was measured on other weights ({measured.get('model')})"
            raise InputError(f"{base.what}: not the base {of_run}; name that base")
    return base


def export(args: argparse.Namespace) -> None:
    """Merges under a temporary name and renames the folder to --merged; what goes wrong leaves nothing behind."""
    if os.path.lexists(args.merged):
        raise InputError(f"--merged {args.merged} exists; name a new folder")
    check_writable(args.merged, "--merged")
    folder, base = args.run_folder, checked_base(args)
    if (folder / "metrics.json").is_file():
        with tempfile.TemporaryDirectory() as trial:  # else a damaged file would end the export after the merge
            try:
                write_card(folder, Path(trial))
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
                damaged = f"{folder}: run.json or metrics.json is damaged ({error!r}), so the card"
                raise InputError(f"{damaged} cannot be written; put it back") from error
    temporary, lock = (Path(f"{args.merged}.{end}") for end in ("unfinished", "lock"))
    if temporary.exists() and not lock.exists():  # an export that was killed leaves both
        raise InputError(f"--merged {args.merged}: {temporary} is in the way; move it or name another folder")
    refusal = f"--merged {args.merged}: another export is writing it; wait for its end or name another folder"
    with held_alone(lock, refusal):
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        try:
            merge(args, base, temporary)
            replace(temporary, args.merged)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    log.info("wrote %s", args.merged)


def merge(args: argparse.Namespace, base: Base, folder: Path) -> None:
    """Writes the merged model to `folder` and checks it. Raises InputError when it is not base plus adapter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_alignment import generation, models
    from llm_alignment.adapters import adapter_off, load_adapter, scaled

    def answers_of(model: Any, tokenizer: Any) -> list[str]:
        decoding = generation.Decoding(max_new_tokens=args.max_new_tokens)
        return [answer.text for answer in sorted(generation.generate(model, tokenizer, CHATS, decoding))]

    tokenizer = models.load_tokenizer(base)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    model: PeftModel = load_adapter(models.load_model(base).to(dtype), str(args.run_folder)).eval()
    with scaled(model, args.scale):
        answers = answers_of(model, tokenizer)
        wanted = log_probs(model, tokenizer, answers)
        with adapter_off(model):
            adapter_effect = mean_kl(wanted, log_probs(model, tokenizer, answers))
        write_merged(model, tokenizer, folder)
    describe(args.run_folder, tokenizer, folder, args.scale)
    del model
    gc.collect()
    # as any program loads it
    code: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    saved = AutoTokenizer.from_pretrained(folder, **code)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto", **code).eval()
    difference, texts = mean_kl(wanted, log_probs(merged, tokenizer, answers)), answers_of(merged, saved)
    same = sum(new == old for new, old in zip(texts, answers, strict=True))
    found = f"{same} answers are the same text; mean KL to base plus adapter {difference:.2g} nats"
    log.info("check on %d prompts: %s, to the base %.2g", len(CHATS), found, adapter_effect)
    if not difference <= LARGEST_KL[args.dtype]:
        advice = "take --dtype fp32" if args.dtype == "bf16" else "use the base with the adapter instead"
        limit = f"the limit in {args.dtype} is {LARGEST_KL[args.dtype]}"
        raise InputError(f"the merged model is {difference:.2g} nats from base plus adapter, {limit}: {advice}")
    if difference > adapter_effect / 2 > 0:
        log.warning("rounding to %s changes the model about as much as the adapter does; use --dtype fp32", args.dtype)
    del merged
    gc.collect()  # Windows does not rename a folder whose weights are still mapped into memory


def write_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the merged model, its tokenizer, and its generation settings, which stop at the end of a turn."""
    try:
        merged = model.merge_and_unload(safe_merge=True)  # safe: a weight that is not finite is an error
    except ValueError as error:
        raise InputError(f"the merged weights are not finite ({error}); nothing was written: train again") from error
    settings = merged.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = sorted({*ends, tokenizer.eos_token_id} - {None})
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    if not settings.do_sample:  # then these have no effect, and transformers refuses to write them
        settings.temperature = settings.top_p = settings.top_k = settings.min_p = settings.typical_p = None
    folder.mkdir()
    try:
        merged.save_pretrained(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the base's generation_config.json cannot be written again ({reason}); repair it") from error
    tokenizer.save_pretrained(folder)


def describe(run_folder: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, scale: float) -> None:
    """Writes into the merged `folder` the chat template that serves what was trained, a Modelfile and the card."""
    thinking = saved_run(run_folder).get("args", {}).get("thinking", True)
    if not thinking and "enable_thinking" in tokenizer.chat_template:
        tokenizer.chat_template = NO_THINKING + tokenizer.chat_template
        tokenizer.save_pretrained(folder)
    if text := modelfile(tokenizer, thinking=thinking):
        (folder / "Modelfile").write_text(text, "utf-8")
    else:
        log.info("no Modelfile for Ollama: this chat template cannot be put into its language")
    if (run_folder / "metrics.json").is_file():
        write_card(run_folder, folder, scale)


def modelfile(tokenizer: PreTrainedTokenizerBase, *, thinking: bool) -> str:
    """The folder for Ollama (https://github.com/ollama/ollama/blob/main/docs/modelfile.md): template, greedy answers,
    end of a turn. "" for a chat template that cannot be put so: one that refuses a system turn, or joins turns."""

    def rendered(*roles: str, prompt: bool = True) -> str:
        turns = [{"role": role, "content": "{{ .Content }}"} for role in roles]
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking
        ).removeprefix(tokenizer.bos_token or "")  # Ollama writes it

    try:
        system = rendered("system", prompt=False)
        user = rendered("system", "user", prompt=False).removeprefix(system)
        default = rendered("user", prompt=False).removesuffix(user)  # a system turn that the template adds
        assistant = rendered("user", "assistant", "user", prompt=False).removeprefix(default + user).removesuffix(user)
        beginning = rendered("user").removeprefix(default + user)
        is_whole = rendered("user", "assistant", "user") == default + user + assistant + user + beginning
        is_whole &= rendered("system", "user") == system + user + beginning
    except Exception:  # a template may raise anything
        is_whole = False
    if not is_whole:
        return ""
    parts = {"system": system, "user": user, "assistant": assistant}
    turns = "".join(f'{{{{ if eq .Role "{role}" }}}}{text}{{{{ end }}}}' for role, text in parts.items())
    default = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if default else ""
    template = f"{default}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{beginning}"
    return f'FROM .\nTEMPLATE """{template}"""\nPARAMETER temperature 0\nPARAMETER stop "{tokenizer.eos_token}"\n'


def log_probs(model: Any, tokenizer: PreTrainedTokenizerBase, answers: list[str]) -> list[torch.Tensor]:
    """Where a token of an answer to CHATS is due, or its end, the log-probabilities: (tokens, vocabulary), float32."""
    import torch

    found = []
    prompts = tokenizer.apply_chat_template(
        CHATS, add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(logits.float().log_softmax(dim=-1).cpu())
    return found


def mean_kl(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """KL(wanted || found) in nats, the mean over all answer tokens."""
    import torch

    kl = [(p.exp() * (p - q)).sum(dim=-1) for p, q in zip(wanted, found, strict=True)]
    return float(torch.cat(kl).mean())


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: export(build_parser().parse_args(argv)), logs=True)


if __name__ == "__main__":
    raise SystemExit(main())
