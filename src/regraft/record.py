"""record.json: what a run was asked, what it did, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.errors import RunError
from regraft.files import write_json

RECORD_FILE = "record.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in `folder`, None where none was begun; RunError where it cannot be read."""
    path = folder / RECORD_FILE
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} must be empty, new, or a run of regraft; it holds other files: choose another --out.")
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        record["status"], record["options"]
    except (ValueError, KeyError, TypeError) as e:
        raise RunError(f"{path} must be a record of regraft; it cannot be read ({e}): choose another --out.") from e
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record whole, or leave the old one."""
    write_json(folder / RECORD_FILE, record)
