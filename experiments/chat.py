"""Talk with a base and the model that a run made of it, side by side.

    poetry run python experiments/chat.py RUN_FOLDER
    poetry run python experiments/chat.py RUN_FOLDER --prompts prompts.txt

One model is in memory: the base answers with the adapter off, the tuned model with it on, both greedily, by the run's
template and thinking, each continuing from its own answers. An empty line begins a new conversation; /quit or the end
of the input ends. --prompts FILE answers a .txt file with a prompt a line, or rows with prompt, question or messages.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from frontier import finished_run
from mine_pairs import prompt_turns
from records import exit_code

from llm_alignment.files import InputError
from llm_alignment.flags import Parser, not_negative, positive
from llm_alignment.hub import read_usable


def build_parser() -> Parser:
    parser = Parser("experiments/chat.py", __doc__)
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN_FOLDER", help="output folder of a training run that ended")
    add("--prompts", default="", metavar="FILE", help="answer these and end; without it you are asked")
    add("--max_new_tokens", type=positive(int), default=512, help="longest answer in tokens")
    add("--adapter_scale", type=not_negative(float), default=1.0, help="strength of the adapter: 0 is the base")
    return parser


def read_prompts(file: str) -> list[list[dict]]:
    """The prompts of a file as turns. Raises InputError when it has none."""
    if not file.lower().endswith(".txt"):
        return read_usable(file, "--prompts", prompt_turns, "prompt or messages")
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        raise InputError(f"--prompts {file}: {error}; name a text file in UTF-8") from error
    if not any(map(str.strip, lines)):
        raise InputError(f"--prompts {file}: no prompt in it; write one a line")
    return [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]


def chat(args: argparse.Namespace) -> None:
    """Answers the prompts of the file, or those that are typed; both answers stand side by side, in ASCII lines."""
    from rich.box import ASCII
    from rich.console import Console
    from rich.table import Column, Table

    from llm_alignment.adapters import adapter_off, scaled
    from llm_alignment.generation import Decoding, generate

    asked = read_prompts(args.prompts) if args.prompts else []
    run = finished_run(args.run_folder)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, thinking=run.args.thinking, batch_size=1)
    system = [{"role": "system", "content": run.args.system_prompt}] if run.args.system_prompt else []
    model = run.load()

    def answer_both(*chats: list[dict]) -> list[str]:
        """The base's answer to its turns and the tuned model's to its own, which are shown."""
        texts = []
        for turns, is_base in zip(chats, (True, False), strict=True):
            with adapter_off(model) if is_base else contextlib.nullcontext():
                texts.append(next(generate(model, run.tokenizer, [system + turns], decoding)).text)
        table = Table(*(Column(side, ratio=1, overflow="fold") for side in ("base", "tuned")), box=ASCII, expand=True)
        table.add_row(*texts)
        Console(color_system=None, legacy_windows=False, markup=False, highlight=False).print(table)
        return texts

    chats: tuple[list[dict], list[dict]] = ([], [])
    with scaled(model, args.adapter_scale), contextlib.suppress(EOFError):
        for turns in asked:
            print(f"> {turns[-1]['content']}")
            answer_both(turns, turns)
        for line in () if asked else iter(lambda: input("> ").strip(), "/quit"):
            if not line:
                chats = ([], [])
                print("a new conversation")
                continue
            for turns in chats:
                turns.append({"role": "user", "content": line})
            for turns, text in zip(chats, answer_both(*chats), strict=True):
                turns.append({"role": "assistant", "content": text})


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: chat(build_parser().parse_args(argv)), logs=True)


if __name__ == "__main__":
    raise SystemExit(main())
