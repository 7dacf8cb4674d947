"""record.json: what a run was asked, what it did, and what came of it.

A run is a directory. Its record is written when it begins (`"status": "running"`, with the options), every few seconds
with the time that was spent, and again, whole and with its digest, when it is finished. Knows one JSON file and what
else may lie beside it, nothing of what the values mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.budget import Budget
from regraft.errors import RunError
from regraft.files import TEMPORARY_PREFIX, digest_json, stale_temporaries, write_json

RECORD_FILE = "record.json"
EVERY = 2.0
"""Seconds between two notes of the time that was spent."""


def read_record(folder: Path, advice: str = "choose another --out") -> dict[str, Any] | None:
    """The record of the run in `folder`, None where none was begun.

    advice: what to try instead. Raises RunError where the record cannot be read or is not as it was written, or where
    the folder holds something else.
    """
    path = folder / RECORD_FILE
    try:
        data = path.read_bytes()
    except OSError as e:
        _check_free(folder, e, advice)
        return None
    try:
        record: dict[str, Any] = json.loads(data)
        record["status"], record["options"].items()
        whole = "digest" not in record or record["digest"] == _digest(record)  # earlier versions wrote none
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        why = f"cannot be read ({type(e).__name__})"
        raise RunError(f"{path} must be the record of a run, and {why}: {advice}, or remove {folder}.") from e
    if not whole:
        raise RunError(
            f"{path} must be as it was written; it was changed or damaged: restore it, {advice}, or remove {folder}."
        )
    return record


def refuse_inside(folder: Path, data: str) -> None:
    """Raise RunError for a run inside the data: it would be found among the classes the next time."""
    if os.path.isdir(data) and folder.resolve().is_relative_to(Path(data).resolve()):
        raise RunError(f"{folder} must not lie inside the data, {data}: choose another --out.")


def refuse_other_options(
    folder: Path, record: dict[str, Any], options: dict[str, Any], but: Collection[str] = ()
) -> None:
    """Raise RunError, which names the differences, unless the run in `folder` was asked the same `but` for these."""
    before = record["options"]
    asked = [k for k in {**options, **before} if k not in but]
    changed = [f"{k} was {before.get(k)!r} and is {options.get(k)!r}" for k in asked if before.get(k) != options.get(k)]
    if changed:
        raise RunError(f"{folder} holds a run with other options ({'; '.join(changed)}): choose another --out.")


@contextmanager
def spending(folder: Path, options: dict[str, Any], budget: Budget) -> Iterator[None]:
    """While inside, the record says what was spent: a run that is killed goes on with the time that is left.

    Raises RunError where the record cannot be written at the beginning; later ones are only missed.
    """
    ended = threading.Event()

    def write() -> None:
        write_record(folder, {"status": "running", "options": options, "spent": budget.elapsed()})

    def tick() -> None:
        while not ended.wait(EVERY):
            with contextlib.suppress(RunError):
                write()

    write()
    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    except BaseException:
        ended.set()
        clock.join()
        with contextlib.suppress(RunError):
            write()
        raise
    finally:
        ended.set()
        clock.join()


def write_record(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the record whole, or leave the old one; what killed writers left beside it is removed.

    Returns what was written: the record, with its digest if it is of a finished run.
    Raises RunError where the folder cannot be written to.
    """
    if record["status"] == "finished":
        record = {**record, "digest": _digest(record)}
    try:
        write_json(folder / RECORD_FILE, record)
    except OSError as e:
        raise RunError(f"{folder} must be a folder that can be written to ({e.strerror}): choose another --out.") from e
    for left in stale_temporaries(folder):
        with contextlib.suppress(OSError):
            left.unlink()
    return record


def _digest(record: dict[str, Any]) -> str:
    return digest_json({name: value for name, value in record.items() if name != "digest"})


def _check_free(folder: Path, refusal: OSError, advice: str) -> None:
    """Raise unless the folder is absent, or empty but for what a killed writer left."""
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(TEMPORARY_PREFIX)]
    except FileNotFoundError:
        return
    except OSError as e:
        raise RunError(f"{folder} must be a folder that can be read ({e.strerror}): {advice}.") from e
    if RECORD_FILE in names:
        raise RunError(f"{folder / RECORD_FILE} must be readable ({refusal.strerror}): {advice}.") from refusal
    if names:
        raise RunError(f"{folder} must be new, empty or a run; it holds other files: {advice}.")
