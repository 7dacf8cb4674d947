"""Pictures in class folders: found by name and place, nothing is opened.

Two layouts: ROOT/CLASS/..., and ROOT/SPLIT/CLASS/... with SPLIT one of train, val, valid, validation, test. Below a
class folder pictures may lie at any depth. What an operating system leaves about is passed over and named.
Knows names and links, nothing of what is in a file. Not covered: which classes are enough to learn from.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regraft.errors import DataError
from regraft.pictures import SUFFIXES
from regraft.printable import printable

Split = Literal["train", "validation", "test"]
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
LEFT_BY_SYSTEMS = frozenset(
    {
        "$recycle.bin",
        "@eadir",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
"""Files and folders, in lower case, that nobody put there as data; so is whatever begins with a dot."""
LEFT = "left by the operating system"
UPWARDS = "a link to a folder that it lies in"


@dataclass(frozen=True)
class LeftOut:
    """A file that was not used, and the reason in one sentence."""

    where: str
    reason: str


@dataclass(frozen=True)
class Found:
    """A picture file: its path from the root, its path inside its class folder, its class and its split."""

    where: str
    inside: str
    class_name: str
    split: Split
    path: Path


def find_in_folders(root: Path) -> tuple[list[Found], list[str], list[LeftOut]]:
    """The pictures below `root`, its classes in code-point order (the empty ones too), and what was passed over.

    Raises DataError when a folder cannot be listed, or when both layouts are mixed.
    """
    found: list[Found] = []
    classes: set[str] = set()
    passed: list[LeftOut] = []
    for folder, split in _splits(root):
        for entry in listed(folder):
            where = str(entry.relative_to(root))
            if _left_by_system(entry.name):
                passed.append(LeftOut(where, LEFT))
            elif not _is_folder(entry):
                passed.append(LeftOut(where, "not inside a class folder"))
            elif _leads_up(entry):
                passed.append(LeftOut(where, UPWARDS))
            else:
                classes.add(entry.name)
                paths, below = pictures_below(entry)
                passed += [LeftOut(str(Path(where, item.where)), item.reason) for item in below]
                for path in paths:
                    inside = path.relative_to(entry).as_posix()
                    found.append(Found(str(path.relative_to(root)), inside, entry.name, split, path))
    return found, sorted(classes), passed


def pictures_below(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """All picture files below a folder in code-point order, files before folders, and what was passed over.

    Links are followed, but never in a circle, and a file with several names is listed under its first. What cannot
    be looked at is listed if it is named like a picture, so that opening it can say why. Raises DataError when a
    folder cannot be listed.
    """
    pictures: list[Path] = []
    passed: list[LeftOut] = []
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        folders = []
        for entry in listed(waiting.pop()):
            reason = _passed_over(entry, seen)
            if reason:
                passed.append(LeftOut(str(entry.relative_to(folder)), reason))
            elif _is_folder(entry):
                folders.append(entry)
            else:
                pictures.append(entry)
        waiting += reversed(folders)
    return pictures, passed


def listed(folder: Path) -> list[Path]:
    """The entries of a folder in code-point order; raises DataError when it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as e:
        place = printable(str(folder))
        raise DataError(f"The folder {place} must be readable, and cannot be listed: {e.strerror}.") from e


def _passed_over(entry: Path, seen: set[tuple[int, int]]) -> str:
    """Why an entry of a class folder is not used; nothing for pictures and folders, which are then noted as seen."""
    status = _status(entry)
    folder = status is not None and stat.S_ISDIR(status.st_mode)
    if _left_by_system(entry.name):
        return LEFT
    if folder and _leads_up(entry):
        return UPWARDS
    if not folder and entry.suffix.lower() not in SUFFIXES:
        return "its name does not end like a picture's"
    if status is None:
        return ""
    if not folder and not stat.S_ISREG(status.st_mode):
        return "not a file with bytes to read"
    if (status.st_dev, status.st_ino) in seen:
        return "another name of what is listed already"
    seen.add((status.st_dev, status.st_ino))
    return ""


def _splits(root: Path) -> list[tuple[Path, Split]]:
    """The folders that hold class folders: those of the splits, or the root itself.

    A class may be called `train` (beside `car`); the layout is that of splits only if all folders are splits.
    Raises DataError for what would be a class and looks like a split: pictures that are to be judged must not be
    learned from unasked.
    """
    folders = [entry for entry in listed(root) if _is_folder(entry) and not _left_by_system(entry.name)]
    splits = [(f, SPLIT_FOLDERS[f.name.casefold()]) for f in folders if f.name.casefold() in SPLIT_FOLDERS]
    if splits and len(splits) == len(folders):
        return splits
    if len({split for _, split in splits}) > 1:
        other = next(f.name for f in folders if f.name.casefold() not in SPLIT_FOLDERS)
        raise DataError(
            f"Beside {splits[0][0].name}/ and {splits[1][0].name}/ there must be no other folder in "
            f"{printable(str(root))}; found {printable(other)}: move it into one of them, or away."
        )
    for folder, _ in splits:
        if _holds_class_folders(folder):
            raise DataError(
                f"Beside class folders, {folder.name}/ in {printable(str(root))} must hold pictures and be a class; it "
                "holds folders and no pictures: move the class folders into train/, or give it another name."
            )
    return [(root, "train")]


def _holds_class_folders(folder: Path) -> bool:
    """Whether a folder holds other folders and no pictures, as that of a split does."""
    entries = [entry for entry in listed(folder) if not _left_by_system(entry.name)]
    folders = [entry for entry in entries if _is_folder(entry)]
    return bool(folders) and not any(e.suffix.lower() in SUFFIXES for e in entries if e not in folders)


def _status(path: Path) -> os.stat_result | None:
    """What a path leads to; None where that cannot be told."""
    try:
        return path.stat()
    except OSError:
        return None


def _is_folder(path: Path) -> bool:
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _leads_up(entry: Path) -> bool:
    """Whether an entry is a link to the folder that it lies in, or to one above."""
    return entry.is_symlink() and entry.parent.resolve().is_relative_to(entry.resolve())


def _left_by_system(name: str) -> bool:
    return name.startswith(".") or name.casefold() in LEFT_BY_SYSTEMS
