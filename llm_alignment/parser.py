"""The command line's parser, and which flags change what is trained."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """States the default of every flag that has one; fills paragraphs, and leaves indented ones as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = functools.partial(textwrap.fill, width=width, break_on_hyphens=False)
        parts = text.strip().split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else fill(part) for part in parts)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class Parser(argparse.ArgumentParser):
    """A parser of which every error is one line, and that takes no abbreviation, which would hide a misspelt flag.

    Dashes and underscores in a flag's name are the same. --config FILE stands for the flags in a file. --help shows
    the flags that `shown` names (all where it names none), --help_all shows all.
    """

    def __init__(self, script: str, docstring: str | None, shown: str = "") -> None:
        prog, formatter = f"python {script}", functools.partial(Formatter, max_help_position=34)
        super().__init__(prog, f"{prog} [--flag value ...]", docstring, formatter_class=formatter, allow_abbrev=False)
        self.shown = shown.split()
        add = add_group(self, "about the flags", trains=False)
        add("--help_all", action="help", help="show every flag with its default")
        add("--config", metavar="FILE", default=argparse.SUPPRESS,
            help="YAML file of lines `flag: value`, or the run.json of a run; the command line wins")  # fmt: skip
        add("--version", nargs=0, action=Version, default=argparse.SUPPRESS, help="show the version")

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
        """The flags in a --config file, as words of a command line."""
        content, words = self.read_config(path), []
        if isinstance(argv := content.get("argv"), list):  # the run.json of a run
            if not all(isinstance(word, str) and not word.startswith("--config") for word in argv):
                self.error(f"--config {path}: its argv is no list of texts, or names another file")
            return self.expand(argv)
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

    def read_config(self, path: Path) -> dict[str, Any]:
        """The content of a --config file; YAML's scalars as they are written: 1e-5 and no are texts."""
        import yaml

        try:
            text = path.read_text("utf-8-sig")
            content = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.BaseLoader)
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}")
        except (ValueError, yaml.YAMLError) as error:
            self.error(f"--config {path}: {' '.join(str(error).split())}")
        if not isinstance(content, dict):
            self.error(f"--config {path}: write one `flag: value` a line")
        return content


class Version(argparse.Action):
    """Prints the version of the installed project, which takes longer to look up than a parser to build."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(version("llm-alignment"))
        parser.exit()


def add_group(parser: argparse.ArgumentParser, title: str, *, trains: bool | str) -> Callable[..., argparse.Action]:
    """The function that adds flags to the group `title`; `trains`: do they change what is trained, always, never, or
    where `neutral_flags` is told this word, such as "reddit" for flags that shape Reddit's pairs alone."""
    group = parser.add_argument_group(title)

    def add(*names: str, **settings: Any) -> argparse.Action:
        action = group.add_argument(*names, **settings)
        action.trains = trains  # type: ignore[attr-defined]
        return action

    return add


def neutral_flags(parser: argparse.ArgumentParser, *counted: str) -> set[str]:
    """The flags whose values a resumed run may change: they do not change what is trained, where those of the words
    `counted` do; see `add_group`."""
    return {action.dest for action in parser._actions if getattr(action, "trains", False) not in (True, *counted)}
