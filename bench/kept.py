"""Rows that a bench appends beside itself, one for each finished run: it can be stopped at any time and goes on."""

from __future__ import annotations

import json
from pathlib import Path

Row = dict[str, object]


def rows(name: str, key: tuple[str, ...]) -> dict[tuple[object, ...], Row]:
    """The rows of NAME.jsonl by the values that tell runs apart; the last of equal runs counts."""
    file = _file(name)
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {tuple(row[k] for k in key): row for row in found}


def append(name: str, row: Row) -> None:
    """One finished run."""
    with _file(name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _file(name: str) -> Path:
    return Path(__file__).parent / f"{name}.jsonl"
