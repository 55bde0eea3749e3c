"""The rules of the house (CONTRIBUTING.md): where code may live, what may import what, how long it may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ("sft_train", "dpo_train", "dpo_train_mt", "dpo_train_mt_v2")
PACKAGE = sorted((ROOT / "llm_alignment").glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py")) + sorted((ROOT / "experiments" / "benchmarks").glob("*.py"))
CODE = [*(ROOT / f"{name}.py" for name in (*SCRIPTS, "mtbench_eval")), *PACKAGE, *EXPERIMENTS]
BOTTOM = {"files", "flags", "stats"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 600, 60, 8
EXCEPTIONS = {"fused_nll_kl"}  # a formula with ten parameters


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, inside functions too: "llm_alignment.files", "mtbench_eval", ..."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken_arrows(name: str, tree: ast.AST) -> list[str]:
    """What a file imports although the arrows point the other way; `name` is "sft_train" or "llm_alignment.files"."""
    forbidden = {*SCRIPTS} - {name}
    if name.startswith("llm_alignment"):
        forbidden |= {"mtbench_eval"}
    if name.removeprefix("llm_alignment.") in BOTTOM:
        forbidden |= {f"llm_alignment.{path.stem}" for path in PACKAGE} - {f"llm_alignment.{stem}" for stem in BOTTOM}
    forbidden |= {
        "llm_alignment.tatqa": {"llm_alignment.dpo"},
        "llm_alignment.dpo": {"llm_alignment.tatqa"},
        "mtbench_eval": {"llm_alignment.dpo", "llm_alignment.tatqa"},
    }.get(name, set())
    return sorted(set(imported(tree)) & forbidden)


@pytest.mark.parametrize("path", CODE[:5] + PACKAGE, ids=name_of)
def test_arrows_point_down(path):
    """Script -> mtbench_eval -> llm_alignment; files, flags and stats at the bottom."""
    name = path.stem if path.parent == ROOT else f"llm_alignment.{path.stem}"
    assert not broken_arrows(name, tree_of(path))


def test_there_is_no_circle_in_the_package():
    arrows = {
        f"llm_alignment.{path.stem}": {name for name in imported(tree_of(path)) if name.startswith("llm_alignment.")}
        for path in PACKAGE
    }

    def visit(name: str, seen: tuple[str, ...]) -> None:
        assert name not in seen, " -> ".join([*seen, name])
        for other in arrows.get(name, ()):
            visit(other, (*seen, name))

    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_file_is_too_long(path):
    lines = path.read_text("utf-8").count("\n")
    assert lines <= (499 if path.stem == "mtbench_eval" else MOST_LINES), f"{lines} lines: two nouns?"


def too_long_functions(tree: ast.Module) -> list[str]:
    """Functions above the limit, their docstrings not counted; parsers are tables of data."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not (node.name == "build_parser" or node.name.endswith("_flags")):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{node.name}: {lines} lines")
    return found


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_function_is_too_long(path):
    assert not too_long_functions(tree_of(path))


def functions_of(tree: ast.AST) -> Iterator[tuple[str, list[ast.arg]]]:
    """Name and parameters, without self and cls, of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield node.name, [each for each in every if each.arg not in {"self", "cls"}]


def too_many_parameters(tree: ast.AST) -> list[str]:
    return [name for name, every in functions_of(tree) if len(every) > MOST_PARAMETERS and name not in EXCEPTIONS]


def namespaces(tree: ast.AST) -> list[str]:
    """Where a namespace is built, which would be a fake of the command line's."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [f"line {call.lineno}" for call in calls if ast.unparse(call.func).endswith("Namespace")]


def takers_of_args(tree: ast.AST) -> list[str]:
    """The functions that take the command line's namespace."""
    return [
        name
        for name, every in functions_of(tree)
        if any("Namespace" in ast.unparse(each.annotation) for each in every if each.annotation)
    ]


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_function_has_too_many_parameters(path):
    assert not too_many_parameters(tree_of(path))


def test_args_stop_at_the_door():
    takers = [f"{path.stem}.{name}" for path in PACKAGE for name in takers_of_args(tree_of(path))]
    assert len(takers) <= 8, takers
    assert not {path.stem: found for path in CODE if (found := namespaces(tree_of(path)))}


def test_the_rules_find_what_breaks_them():
    assert broken_arrows("sft_train", ast.parse("def f():\n    from dpo_train import main")) == ["dpo_train"]
    for name in ("llm_alignment.tatqa", "mtbench_eval"):
        assert broken_arrows(name, ast.parse("from llm_alignment import dpo")) == ["llm_alignment.dpo"]
    assert broken_arrows("llm_alignment.stats", ast.parse("import llm_alignment.models")) == ["llm_alignment.models"]
    assert broken_arrows("llm_alignment.models", ast.parse("import mtbench_eval")) == ["mtbench_eval"]
    nine = ", ".join(f"p{number}" for number in range(9))
    assert too_many_parameters(ast.parse(f"def f({nine}): ...\ndef g(self, {nine[4:]}): ...")) == ["f"]
    assert namespaces(ast.parse("import argparse\nargs = argparse.Namespace(a=1)")) == ["line 2"]
    assert takers_of_args(ast.parse("def f(a: argparse.Namespace | None): ...\ndef g(args: int): ...")) == ["f"]
    body = "".join(f"    x{number} = 0\n" for number in range(60))
    assert too_long_functions(ast.parse(f'def f():\n    """Says."""\n{body}')) == ["f: 61 lines"]
