"""Result files: rows that survive a kill, and the baselines that later runs reuse."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from llm_alignment import files
from llm_alignment.files import InputError, SkippedRows, append_lines, cache_folder, differing, digest, log, write_rows


class ResultFile:
    """One JSON line per evaluated item, written as soon as it exists, so that a killed evaluation resumes. The first
    line is {"fingerprint": {...}}: what the results depend on. Every other line is a row with a "question_id". Opening
    a file keeps its whole rows in `rows`; damaged lines are left out with a warning, and their questions count as
    missing. When the stored fingerprint is another, raises InputError naming the keys that differ; with `renew` the
    file becomes NAME.old and a new one is begun (a resumed run measures its own adapter with its own flags). Raises
    InputError too when the first line is damaged. Rows that are missing are taken from `cache`, a file of the same
    fingerprint, and `finish` puts there what it does not have, unless it is a file of this run, of an earlier stage. A
    damaged one is ignored with a warning."""

    def __init__(self, path: Path, fingerprint: dict, *, renew: bool = False, cache: Path | None = None) -> None:
        self.path, self.fingerprint, self._cache = path, fingerprint, cache
        self._is_of_run = cache is not None and cache.parent == path.parent
        self._cached = self._read_cache(cache) if cache and cache.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            skipped = SkippedRows()
            stored, self.rows = read_results(path, skipped)
            if stored == fingerprint:
                skipped.report(f"damaged lines of {path}; their questions are answered again")
                if skipped.count:
                    write_rows(path, [{"fingerprint": fingerprint}, *self.rows.values()])
                return
            other = f"results of another evaluation ({differing(stored, fingerprint)})"
            if not renew:
                raise InputError(f"{path} holds {other}; write to another place or delete the file")
            log.warning("%s.old: %s; measuring again", path, other)
            files.replace(path, Path(f"{path}.old"))
        self.rows = {}
        write_rows(path, [{"fingerprint": fingerprint}])

    def _read_cache(self, cache: Path) -> dict[str | int, dict]:
        """The rows of the cache file by question; none, with a warning, when it is damaged, and none when it is of an
        earlier stage that measured something else, such as a sample of the questions."""
        skipped = SkippedRows()
        try:
            stored, rows = read_results(cache, skipped)
            if stored != self.fingerprint:
                if self._is_of_run:
                    return {}
                raise InputError(f"{cache}: results of another evaluation ({differing(stored, self.fingerprint)})")
        except InputError as error:
            log.warning("ignoring an earlier measurement: %s", error)
            return {}
        skipped.report(f"damaged lines of {cache}")
        return rows

    def missing(self, questions: Sequence[dict]) -> list[dict]:
        """The questions without a row yet, in their order, after taking what the cache has of them."""
        wanted = {question["question_id"] for question in questions} - self.rows.keys()
        found = [row for key, row in self._cached.items() if key in wanted]
        if found:
            self.append(*found)
            told = "%s" if self._is_of_run else "the baseline cache (%s); --no_baseline_cache computes them again"
            log.info("%s: %d rows taken from " + told, self.path.name, len(found), self._cache)
        return [question for question in questions if question["question_id"] not in self.rows]

    def append(self, *rows: dict) -> None:
        """Writes the rows and flushes them to the disk."""
        append_lines(self.path, list(rows))
        self.rows |= {row["question_id"]: row for row in rows}

    def finish(self) -> None:
        """Puts rows that the cache does not have into it."""
        new = {key: row for key, row in self.rows.items() if key not in self._cached}
        if self._cache and new and not self._is_of_run:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            files.remove_left_over(self._cache.parent, before=time.time() - 24 * 3600)
            write_rows(self._cache, [{"fingerprint": self.fingerprint}, *self._cached.values(), *new.values()])
            self._cached |= new


def read_results(path: Path, skipped: SkippedRows) -> tuple[dict, dict[str | int, dict]]:
    """The fingerprint and the rows, by question_id, of a result file; damaged lines go to `skipped`. A question that
    has two rows keeps the first. Raises InputError when the file or its first line cannot be read."""
    rows = files.read_objects(path, skipped)
    _, first = next(rows, ("", {}))
    if not isinstance(first.get("fingerprint"), dict) or skipped.count:
        raise InputError(f"{path}:1: no fingerprint, so this is no result file, or damaged; delete or name another")
    by_id: dict[str | int, dict] = {}
    for place, row in rows:
        if isinstance(row.get("question_id"), str | int):
            by_id.setdefault(row["question_id"], row)
        else:
            skipped.add(place, "no question_id")
    return first["fingerprint"], by_id


def baseline_cache(fingerprint: dict) -> Path:
    """Where the results of this fingerprint are kept for later runs. LLM_ALIGNMENT_CACHE names another folder."""
    return cache_folder() / "baselines" / f"{digest(fingerprint)[:32]}.jsonl"
