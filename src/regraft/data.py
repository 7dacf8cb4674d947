"""Labelled pictures as they lie: folders of class folders, `.npz` files, arrays.

Finds pictures and their labels without reading a pixel. Reading happens once, in `read`: the bytes that were hashed
are the bytes that are decoded. Not covered: tables, COCO, VOC, hub data sets.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regraft.errors import DataError, PictureError
from regraft.files import digest
from regraft.pictures import SUFFIXES, Picture, decode, from_array

Split = Literal["train", "validation", "test"]
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini", "Icon\r"}
FORMS = "a folder of class folders (with or without train/, val/, test/) or a .npz file with `images` and `labels`"


@dataclass(frozen=True)
class Example:
    """One labelled picture that was found and not yet read.

    where: its path inside the data set, or `images[17]`; label: index into the data set's labels.
    group: pictures of one group share a split and a fold; empty if each stands alone.
    """

    where: str
    label: int
    split: Split
    group: str = ""
    path: Path | None = None
    array: np.ndarray | None = None


@dataclass(frozen=True)
class LeftOut:
    """A file that was not used, and the reason in one sentence."""

    where: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Examples with their labels' names in code-point order, and what was passed over on the way."""

    source: str
    labels: tuple[str, ...]
    examples: tuple[Example, ...]
    ignored: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Raw:
    """What one example holds, read once: its content digest and the means to decode it."""

    id: str
    where: str
    data: bytes | None
    array: np.ndarray | None

    def decode(self) -> Picture:
        """The pixels; raises PictureError naming the example."""
        if self.data is not None:
            return decode(self.data, where=self.where)
        assert self.array is not None
        return from_array(self.array, where=self.where)


def load_data(
    source: str | os.PathLike[str] | Dataset | tuple[Any, Any],
    *,
    group: str | None = None,
    allow_empty_class: bool = False,
) -> Dataset:
    """Find the labelled pictures of `source`: a folder, a `.npz` file, or a pair (images, labels) of arrays.

    group: a regular expression, searched in each path inside its class folder; pictures with the same first bracket
        belong together.
    Raises DataError when there is nothing to learn from: no pictures, fewer than two classes, an empty class folder
    (unless `allow_empty_class`), or a form that is not read.
    """
    if isinstance(source, Dataset):
        found = source
    elif isinstance(source, tuple):
        found = from_arrays(*source)
    else:
        found = _from_path(Path(source), allow_empty_class)
    return with_groups(found, group) if group is not None else found


def from_arrays(images: Sequence[Any] | np.ndarray, labels: Sequence[Any] | np.ndarray, source: str = "arrays") -> Dataset:
    """A data set from pictures (n, H, W), (n, H, W, 1, 3 or 4) or a list of such arrays, and n labels.

    Text labels are ordered by code point, whole numbers by value.
    """
    if len(images) != len(labels):
        raise DataError(f"images and labels must be equally many; found {len(images)} and {len(labels)} in {source}.")
    values = [v.item() if isinstance(v, np.generic) else v for v in labels]
    if not all(isinstance(v, str | int) for v in values):
        raise DataError(f"Labels must be text or whole numbers; found {type(values[0]).__name__} in {source}.")
    names = sorted(set(values))
    index = {v: i for i, v in enumerate(names)}
    examples = tuple(
        Example(f"images[{i}]", index[value], "train", array=np.asarray(image))
        for i, (image, value) in enumerate(zip(images, values, strict=True))
    )
    return _checked(Dataset(source, tuple(str(v) for v in names), examples))


def with_groups(dataset: Dataset, pattern: str) -> Dataset:
    """The same data set, its examples grouped by the first bracket of `pattern`; DataError if that cannot be."""
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise DataError(f"--group must be a regular expression; {pattern!r} is not one: {e}.") from e
    if compiled.groups < 1:
        raise DataError(f"--group must have a bracket that names the group, as in '([^/]+)-'; found {pattern!r}.")
    grouped, hits = [], 0
    for example in dataset.examples:
        match = compiled.search(_inside_class(example, dataset))
        hits += match is not None
        grouped.append(replace(example, group=(match.group(1) or "") if match else ""))
    if not hits:
        first = dataset.examples[0].where
        raise DataError(f"--group must match some path inside a class folder; {pattern!r} matches none, {first!r} say.")
    return replace(dataset, examples=tuple(grouped))


def read(example: Example) -> Raw:
    """Open an example once; raises PictureError when the file cannot be read."""
    if example.path is None:
        assert example.array is not None
        array = np.ascontiguousarray(example.array)
        header = f"{array.dtype.str}{array.shape}".encode()
        return Raw(digest(header, memoryview(array.reshape(-1).view(np.uint8))), example.where, None, array)
    try:
        data = example.path.read_bytes()
    except OSError as e:
        raise PictureError(f"{printable(example.where)} cannot be read: {e.strerror or e}.") from e
    return Raw(digest(data), example.where, data, None)


def printable(text: str) -> str:
    """A path for the terminal: bytes that are not text, and control characters, are escaped."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in safe)


def subset(dataset: Dataset, *splits: Split) -> Dataset:
    """The examples of these splits, labels unchanged."""
    return replace(dataset, examples=tuple(e for e in dataset.examples if e.split in splits))


def _from_path(path: Path, allow_empty_class: bool) -> Dataset:
    if path.is_dir():
        return _from_folder(path, allow_empty_class)
    if path.suffix == ".npz" and path.is_file():
        return _from_npz(path)
    if not path.exists():
        raise DataError(f"The data must exist; nothing is at {printable(str(path))}.")
    raise DataError(f"The data must be {FORMS}; found {printable(path.name)}.")


def _from_npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = {"images", "labels"} - set(stored.files)
            if missing:
                raise DataError(f"{path} must hold `images` and `labels`; found {', '.join(stored.files) or 'nothing'}.")
            return from_arrays(stored["images"], stored["labels"], str(path))
    except DataError:
        raise
    except Exception as e:  # np.load lets ValueError, EOFError, zlib and tokenizer errors through
        raise DataError(f"{path} must be a .npz file of plain arrays; it cannot be read: {e}.") from e


def _from_folder(root: Path, allow_empty_class: bool) -> Dataset:
    top = sorted(d.name for d in root.iterdir() if d.is_dir() and not _junk(d.name))
    split_folders = {name: SPLIT_FOLDERS[name] for name in top if name in SPLIT_FOLDERS}
    if "train" not in split_folders or len(split_folders) != len(top):
        split_folders = {"": "train"}
    ignored: list[LeftOut] = []
    found: list[tuple[str, str, Split, Path]] = []
    classes: dict[str, set[str]] = {}
    for folder, split in split_folders.items():
        base = root / folder
        for entry in sorted(base.iterdir()):
            if _junk(entry.name):
                ignored.append(LeftOut(str(entry.relative_to(root)), "a file of the operating system"))
            elif not entry.is_dir():
                ignored.append(LeftOut(str(entry.relative_to(root)), "not inside a class folder"))
            else:
                classes.setdefault(entry.name, set()).add(split)
                pictures, passed = _pictures_below(entry, root)
                ignored += passed
                found += [(where, entry.name, split, path) for where, path in pictures]
    labels = tuple(sorted(classes))
    index = {name: i for i, name in enumerate(labels)}
    examples = tuple(Example(where, index[name], split, path=path) for where, name, split, path in found)
    dataset = Dataset(str(root), labels, examples, tuple(ignored))
    if not labels and ignored:
        raise DataError(f"The data must be {FORMS}; {printable(str(root))} has no class folders.")
    _check_classes(dataset, allow_empty_class)
    return dataset


def _pictures_below(folder: Path, root: Path) -> tuple[list[tuple[str, Path]], list[LeftOut]]:
    """All pictures below a class folder, each real file once, links followed, loops ended."""
    pictures: list[tuple[str, Path]] = []
    passed: list[LeftOut] = []
    seen: set[tuple[int, int]] = set()
    for path in _walk(folder, seen):
        where = str(path.relative_to(root))
        if _junk(path.name):
            passed.append(LeftOut(where, "a file of the operating system"))
        elif path.suffix.lower() not in SUFFIXES:
            passed.append(LeftOut(where, "its name does not end like a picture's"))
        else:
            pictures.append((where, path))
    return pictures, passed


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        try:
            status = entry.stat()
        except OSError:
            if not _junk(entry.name) and not _loops(entry):
                yield entry  # reading it will say what is wrong
            continue
        inode = (status.st_dev, status.st_ino)
        if inode in seen:
            continue
        if entry.is_dir():
            if _junk(entry.name) or _above(entry, folder):
                continue
            seen.add(inode)
            yield from _walk(entry, seen)
        else:
            seen.add(inode)
            yield entry


def _loops(entry: Path) -> bool:
    try:
        entry.stat()
    except OSError as e:
        return "symbolic links" in (e.strerror or "")
    return False


def _above(entry: Path, folder: Path) -> bool:
    real = entry.resolve()
    return folder.resolve().is_relative_to(real)


def _junk(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _check_classes(dataset: Dataset, allow_empty_class: bool) -> None:
    counts = Counter((e.label, e.split) for e in dataset.examples)
    for i, name in enumerate(dataset.labels):
        of_class = sum(n for (label, _), n in counts.items() if label == i)
        if of_class == 0 and not allow_empty_class:
            raise DataError(
                f"Every class folder must hold pictures; {printable(name)!r} in {printable(dataset.source)} holds none: "
                "remove the folder, or pass --allow-empty-class to keep its place."
            )
        if of_class and not counts[i, "train"] and not counts[i, "validation"]:
            raise DataError(f"Every class must have pictures in train/; {printable(name)!r} has them only in test/.")
    _checked(dataset)


def _checked(dataset: Dataset) -> Dataset:
    counts = Counter(e.label for e in dataset.examples)
    if len(counts) < 2:
        listed = ", ".join(f"{printable(dataset.labels[i])} ({n})" for i, n in sorted(counts.items())) or "none"
        raise DataError(f"There must be at least 2 classes with pictures; found in {printable(dataset.source)}: {listed}.")
    return dataset


def _inside_class(example: Example, dataset: Dataset) -> str:
    if example.path is None:
        return example.where
    parts = Path(example.where).parts
    name = dataset.labels[example.label]
    return "/".join(parts[parts.index(name) + 1 :])
