"""What tests share: places, small files, the one line of an error, the log."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "experiments" / "demo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last, so that a plain mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the test run's own. A test that needs an empty one sets LLM_ALIGNMENT_CACHE itself."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LLM_ALIGNMENT_CACHE", str(folder))
        yield folder


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """pytest's caplog, which also gets the lines of the project's logger."""
    monkeypatch.setattr(logging.getLogger("llm_alignment"), "propagate", True)
    caplog.set_level(logging.INFO, logger="llm_alignment")
    return caplog


def write_rows(path: Path, rows: list[dict | str]) -> Path:
    """Writes a JSONL file; a row that is a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run_error(capsys: pytest.CaptureFixture, main: Callable[[list[str]], object], *argv: str, code: int = 2) -> str:
    """The one line on stderr with which `main([*argv])` fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
