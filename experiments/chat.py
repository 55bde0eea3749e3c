"""Talk with a base and the model that a run made of it, side by side.

    poetry run python experiments/chat.py RUN_FOLDER
    poetry run python experiments/chat.py RUN_FOLDER --prompts prompts.txt

One model is in memory: the base answers with the adapter off, the tuned model with it on, both greedily, by the run's
template and thinking. Each continues from its own answers. An empty line begins a new conversation; /quit or the end
of the input ends. --prompts FILE prints both answers to each prompt and ends: a .txt file with a prompt a line, or
rows with prompt, question or messages as JSONL, JSON or Parquet.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from commands import logged_exit_code
from finished import FinishedRun, finished_run
from mine_pairs import prompt_turns

from llm_alignment.adapters import adapter_off, scaled
from llm_alignment.files import InputError
from llm_alignment.flags import not_negative, positive
from llm_alignment.generation import Decoding, generate
from llm_alignment.hub import read_usable
from llm_alignment.parser import Parser

if TYPE_CHECKING:
    from peft import PeftModel

Chats = tuple[list[dict], list[dict]]  # the base's and the tuned model's turns


def build_parser() -> Parser:
    parser = Parser("experiments/chat.py", __doc__)
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN_FOLDER", help="output folder of a training run that ended")
    add("--prompts", default="", metavar="FILE", help="answer these and end; without it you are asked")
    add("--max_new_tokens", type=positive(int), default=512, help="longest answer in tokens")
    add("--adapter_scale", type=not_negative(float), default=1.0,
        help="strength of the adapter: 0 is the base, 1 the run")  # fmt: skip
    return parser


def read_prompts(file: str) -> list[list[dict]]:
    """The prompts of a file as turns. Raises InputError when it has none."""
    if not file.endswith(".txt"):
        return read_usable(file, "--prompts", prompt_turns, "prompt or messages")
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"--prompts {file}: {error}; name a text file in UTF-8") from error
    if not any(map(str.strip, lines)):
        raise InputError(f"--prompts {file}: no prompt in it; write one a line")
    return [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]


def typed_prompts() -> Iterator[str]:
    """What the user types, line by line."""
    with contextlib.suppress(EOFError):
        while (line := input("> ").strip()) != "/quit":
            yield line


def answer_both(run: FinishedRun, model: PeftModel, chats: Chats, decoding: Decoding) -> tuple[str, str]:
    """The base's answer to its turns and the tuned model's to its own."""

    def answer(chat: list[dict]) -> str:
        system = run.args.system_prompt
        turns = [{"role": "system", "content": system}, *chat] if system else chat
        return next(generate(model, run.tokenizer, [turns], decoding)).text

    with adapter_off(model):
        base = answer(chats[0])
    return base, answer(chats[1])


def show(base: str, tuned: str) -> None:
    """Prints two answers side by side, in plain ASCII lines."""
    from rich.box import ASCII
    from rich.console import Console
    from rich.table import Table

    table = Table(box=ASCII, expand=True)
    for title in ("base", "tuned"):
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(base, tuned)
    Console(color_system=None, legacy_windows=False, markup=False, highlight=False).print(table)


def chat(args: argparse.Namespace) -> None:
    """Answers the prompts of the file, or those that are typed."""
    asked = read_prompts(args.prompts) if args.prompts else None
    run = finished_run(args.run_folder)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, thinking=run.args.thinking)
    model = run.load()
    with scaled(model, args.adapter_scale):
        for turns in asked or ():
            print(f"> {turns[-1]['content']}")
            show(*answer_both(run, model, (turns, turns), decoding))
        if asked is not None:
            return
        chats: Chats = ([], [])
        for line in typed_prompts():
            if not line:
                chats = ([], [])
                print("a new conversation")
                continue
            for turns in chats:
                turns.append({"role": "user", "content": line})
            answers = answer_both(run, model, chats, decoding)
            show(*answers)
            for turns, text in zip(chats, answers, strict=True):
                turns.append({"role": "assistant", "content": text})


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return logged_exit_code(lambda: chat(args))


if __name__ == "__main__":
    sys.exit(main())
