"""Labelled pictures as they lie: folders of class folders, `.npz` files, arrays.

Finds pictures and their labels without decoding a pixel. Opening happens once, in `open_picture`: the bytes that were
hashed are the bytes that are decoded. Not covered: tables, COCO, VOC, hub data sets.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from regraft.errors import DataError, PictureError, first_line
from regraft.files import digest, digest_json
from regraft.folders import SPLIT_FOLDERS, LeftOut, Split, find_in_folders, listed, pictures_below
from regraft.pictures import Picture, decode, from_array
from regraft.printable import printable

__all__ = [
    "Dataset",
    "Example",
    "LeftOut",
    "Raw",
    "Split",
    "from_arrays",
    "identity",
    "load_data",
    "load_unlabelled",
    "open_picture",
    "pixel_digest",
    "printable",
    "read",
    "subset",
    "with_groups",
]

FORMS = "a folder of class folders (with or without train/, val/, test/) or a .npz file with `images` and `labels`"
OTHER_FORMS = (
    ({"JPEGImages", "Annotations"}, "a Pascal VOC folder"),
    ({"dataset_dict.json"}, "a Hugging Face data set"),
    ({"dataset_info.json", "state.json"}, "a Hugging Face data set"),
    ({"annotations", "images"}, "a COCO folder"),
    ({"annotations", "train2017"}, "a COCO folder"),
)
"""Names that lie in the root of a folder of another form."""
PLAIN_MODES = ("L", "RGB", "RGBA")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


@dataclass(frozen=True)
class Example:
    """One labelled picture that was found and not yet read.

    where: its path inside the data set, or `images[17]`; label: index into the data set's labels.
    group: pictures of one group share a split and a fold; empty if each stands alone.
    array: the samples, or a PIL image, where there is no `path`.
    inside: its path inside its class folder, which groups are searched in.
    """

    where: str
    label: int
    split: Split
    group: str = ""
    path: Path | None = None
    array: Any = None
    inside: str = ""


@dataclass(frozen=True)
class Dataset:
    """Examples with their labels' names in code-point order, and what was passed over on the way."""

    source: str
    labels: tuple[str, ...]
    examples: tuple[Example, ...]
    ignored: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Raw:
    """What one picture holds, read once: its content digest and the means to decode it."""

    id: str
    where: str
    data: bytes | None
    array: np.ndarray | None

    def decode(self) -> Picture:
        """The pixels; raises PictureError naming the picture."""
        if self.data is not None:
            return decode(self.data, where=printable(self.where))
        assert self.array is not None
        return from_array(self.array, where=printable(self.where))


def load_data(
    source: str | os.PathLike[str] | Dataset | tuple[Any, Any],
    *,
    group: str | None = None,
    allow_empty_class: bool = False,
    to_learn: bool = True,
) -> Dataset:
    """Find the labelled pictures of `source`: a folder, a `.npz` file, or a pair (images, labels) of arrays.

    group: a regular expression, searched in each path inside its class folder; pictures with the same first bracket
        belong together.
    to_learn: False for pictures that are only to be judged, of which one class is enough.
    Raises DataError when there is nothing to learn from: no pictures, fewer than two classes, an empty class folder
    (unless `allow_empty_class`), or a form that is not read.

        >>> load_data("photos/", group=r"([^/]+)-[0-9]+").labels
        ('cat', 'dog')
    """
    if isinstance(source, Dataset):
        found = source
    elif isinstance(source, str | os.PathLike) and os.fspath(source):
        found = _from_path(Path(source))
    elif isinstance(source, tuple) and len(source) == 2 and all(hasattr(part, "__len__") for part in source):
        found = from_arrays(*source)
    else:
        raise DataError(
            f"Data must be a folder, a .npz file or a pair (images, labels) of arrays or lists; found {_kind(source)}."
        )
    if to_learn:
        _check_classes(found, allow_empty_class)
    return with_groups(found, group) if group is not None else found


def _kind(value: Any) -> str:
    """What was given instead of data, in a word or two."""
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in value)}"
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


UNLABELLED = ("picture",)


def load_unlabelled(source: str | os.PathLike[str] | Dataset | tuple[Any, Any] | Any) -> Dataset:
    """The pictures of `source` without their labels: any folder, a `.npz` file with `images`, arrays, or a data set.

    Pictures of a folder are found at any depth; what lies in its test/ is left alone.
    Raises DataError where there are none.
    """
    if isinstance(source, tuple):
        source = source[0]
    if isinstance(source, Dataset):
        found = [replace(e, label=0, group="") for e in source.examples if e.split != "test"]
        dataset = Dataset(source.source, UNLABELLED, tuple(found), source.ignored)
    elif isinstance(source, str | os.PathLike):
        dataset = _unlabelled_at(Path(source))
    else:
        dataset = replace(from_arrays(source, [0] * len(source)), labels=UNLABELLED)
    if not dataset.examples:
        raise DataError(f"There must be pictures to learn from; there are none in {printable(dataset.source)}.")
    return dataset


def from_arrays(
    images: Sequence[Any] | np.ndarray, labels: Sequence[Any] | np.ndarray, source: str = "arrays"
) -> Dataset:
    """A data set from pictures (n, H, W), (n, H, W, 1, 3 or 4) or a list of arrays or PIL images, and n labels.

    Text labels are ordered by code point, whole numbers by value. Raises DataError for other labels.
    """
    if len(images) != len(labels):
        raise DataError(f"images and labels must be equally many; found {len(images)} and {len(labels)} in {source}.")
    plain = labels.tolist() if hasattr(labels, "tolist") else labels
    values = [v.item() if isinstance(v, np.generic) else v for v in plain]
    kinds = {str if isinstance(v, str) else int if isinstance(v, int) else type(v) for v in values}
    if len(kinds) > 1 or not kinds <= {str, int}:
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"Labels must be all text or all whole numbers; found {found} in {source}.")
    names = sorted(set(values))
    index = {v: i for i, v in enumerate(names)}
    examples = tuple(
        Example(f"images[{i}]", index[value], "train", array=image, inside=f"images[{i}]")
        for i, (image, value) in enumerate(zip(images, values, strict=True))
    )
    return Dataset(source, tuple(str(v) for v in names), examples)


def with_groups(dataset: Dataset, pattern: str) -> Dataset:
    """The same data set, its examples grouped by the first bracket of `pattern`; DataError if that cannot be.

    An example that the pattern does not match stands alone.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise DataError(f"--group must be a regular expression; {pattern!r} is not one: {e}.") from e
    if compiled.groups < 1:
        raise DataError(f"--group must have a bracket that names the group, as in '([^/]+)-'; found {pattern!r}.")
    matches = [compiled.search(example.inside) for example in dataset.examples]
    if dataset.examples and not any(matches):
        first = printable(dataset.examples[0].inside)
        raise DataError(f"--group must match some path inside a class folder; {pattern!r} matches none, {first} say.")
    groups = [(match.group(1) or "") if match else "" for match in matches]
    return replace(dataset, examples=tuple(replace(e, group=g) for e, g in zip(dataset.examples, groups, strict=True)))


def read(example: Example) -> Raw:
    """Open an example, once; raises PictureError when that cannot be done."""
    return open_picture(example.path if example.path is not None else example.array, where=example.where)


def open_picture(item: Any, *, where: str) -> Raw:
    """Open a picture, once: a path, the bytes of a file, an array (H, W[, 1, 3, 4]) or a PIL image.

    Raises PictureError naming `where` for a file that cannot be read.
    """
    if isinstance(item, str | os.PathLike):
        try:
            item = Path(item).read_bytes()
        except (OSError, MemoryError, ValueError) as e:  # ValueError: a zero byte in the path
            reason = getattr(e, "strerror", None) or str(e) or "it does not fit into memory"
            raise PictureError(f"{printable(where)} cannot be read: {reason}.") from e
    if isinstance(item, bytes | bytearray | memoryview):
        data = bytes(item)
        return Raw(digest(data), where, data, None)
    try:
        array = np.ascontiguousarray(_samples(item))
    except Exception as e:  # an image of PIL that is read only now, or ragged lists
        raise PictureError(f"{printable(where)} cannot be read: {first_line(e)}.") from e
    if array.dtype.hasobject:
        raise PictureError(f"{printable(where)} must be a path, the bytes of a file or an array of numbers.")
    header = f"{array.dtype.str}{array.shape}".encode()
    return Raw(digest(header, array.reshape(-1).view(np.uint8).data), where, None, array)


def pixel_digest(picture: Picture) -> str:
    """Hash of the pixels: equal for equal pictures in unequal files, and for grey kept as RGB.

    A checksum of all pixels and a content hash of some: no defence against forgery, and four times as fast.
    """
    pixels = picture.pixels
    if all((some[..., :1] == some).all() for some in (pixels[::64], pixels)):  # most colour shows in the first few
        pixels = pixels[..., :1]
    every = np.ascontiguousarray(pixels).reshape(-1).data
    facts = [*pixels.shape, zlib.crc32(every)]
    return digest(str(facts).encode(), np.ascontiguousarray(pixels[::8, ::8]).reshape(-1).data)


def identity(dataset: Dataset, known: Mapping[str, str]) -> str:
    """Digest of every picture's bytes, label, split and group, wherever the data lie.

    known: content digests by place, of pictures that need not be read again.
    """

    def id_of(example: Example) -> str:
        try:
            return known.get(example.where) or read(example).id
        except PictureError:
            return "unreadable"

    return digest_json(sorted([id_of(e), dataset.labels[e.label], e.split, e.group] for e in dataset.examples))


def subset(dataset: Dataset, *splits: Split) -> Dataset:
    """The examples of these splits, labels unchanged."""
    return replace(dataset, examples=tuple(e for e in dataset.examples if e.split in splits))


def _from_path(path: Path) -> Dataset:
    if path.is_dir():
        return _from_folder(path)
    place = printable(str(path))
    if not path.exists():
        raise DataError(f"The data must exist; nothing is at {place}.")
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    raise DataError(f"The data must be {FORMS}; found {place}.")


def _from_folder(root: Path) -> Dataset:
    place = printable(str(root))
    names = {entry.name for entry in listed(root)}
    for marks, form in OTHER_FORMS:
        if marks <= names:
            raise DataError(f"The data must be {FORMS}; {place} looks like {form}.")
    pictures, labels, passed = find_in_folders(root)
    if not labels:
        raise DataError(f"The data must be {FORMS}; {place} has no class folders.")
    index = {name: i for i, name in enumerate(labels)}
    examples = tuple(Example(f.where, index[f.class_name], f.split, path=f.path, inside=f.inside) for f in pictures)
    return Dataset(str(root), tuple(labels), examples, tuple(passed))


def _unlabelled_at(path: Path) -> Dataset:
    place = printable(str(path))
    if path.suffix.lower() == ".npz" and path.is_file():
        found, names = _arrays_of(path, "images")
        if "images" not in found or found["images"].ndim < 3:
            raise DataError(f"{place} must hold `images`, (n, H, W[, 1, 3, 4]); found {names}.")
        made = from_arrays(found["images"], [0] * len(found["images"]), place)
        return replace(made, labels=UNLABELLED)
    if not path.is_dir():
        raise DataError(f"The data must be a folder of pictures or a .npz file with `images`; found {place}.")
    paths, passed = pictures_below(path)
    inside = [(p, p.relative_to(path)) for p in paths]
    examples = tuple(
        Example(str(own), 0, "train", path=p)
        for p, own in inside
        if len(own.parts) == 1 or SPLIT_FOLDERS.get(own.parts[0].casefold()) != "test"
    )
    return Dataset(str(path), UNLABELLED, examples, tuple(passed))


def _arrays_of(path: Path, *wanted: str) -> tuple[dict[str, np.ndarray], str]:
    """Those of the wanted arrays that a `.npz` file holds, and the names of all."""
    try:
        if not zipfile.is_zipfile(path):  # np.load takes it for pickled objects, and says how to load them
            raise ValueError("it is no whole zip archive")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {n: stored[n] for n in wanted if n in stored.files}, ", ".join(stored.files) or "nothing"
    except Exception as e:  # np.load lets the errors of zip, zlib and its own header parser through
        raise DataError(
            f"{printable(str(path))} must be a .npz file of plain arrays, and cannot be read: {first_line(e)}."
        ) from e


def _from_npz(path: Path) -> Dataset:
    place = printable(str(path))
    found, names = _arrays_of(path, "images", "labels")
    if len(found) < 2:
        raise DataError(f"{place} must hold `images` and `labels`; found {names}.")
    if found["images"].ndim < 3 or found["labels"].ndim != 1:
        shapes = f"{found['images'].shape} and {found['labels'].shape}"
        raise DataError(f"`images` must be (n, H, W[, 1, 3, 4]) and `labels` (n,) in {place}; found {shapes}.")
    return from_arrays(found["images"], found["labels"], place)


def _check_classes(dataset: Dataset, allow_empty_class: bool) -> None:
    place = printable(dataset.source)
    everywhere = Counter(e.label for e in dataset.examples)
    learned = Counter(e.label for e in dataset.examples if e.split != "test")
    for i, name in enumerate(map(printable, dataset.labels)):
        if not everywhere[i] and not allow_empty_class:
            raise DataError(
                f"Every class folder must hold pictures; {name!r} in {place} holds none: remove the folder, or pass "
                "--allow-empty-class to keep its place."
            )
        if everywhere[i] and not learned[i]:
            raise DataError(
                f"Every class must have pictures to learn from; {name!r} in {place} has them only in test/."
            )
    if len(learned) < 2:
        counts = ", ".join(f"{printable(dataset.labels[i])} ({n})" for i, n in sorted(learned.items())) or "none"
        raise DataError(f"There must be at least 2 classes with pictures; found in {place}: {counts}.")


def _samples(item: Any) -> np.ndarray:
    """An array, or the samples of a PIL image as its file would be read: upright, deep samples deep, alpha kept."""
    if not isinstance(item, Image.Image):
        return np.asarray(item)
    image = ImageOps.exif_transpose(item)
    if image.mode in DEEP_MODES:
        return _deep_samples(np.asarray(image))
    if image.mode in PLAIN_MODES and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    hidden = "transparency" in image.info or image.mode in ("PA", "LA", "La", "RGBa")
    return np.asarray(image.convert("RGBA" if hidden else "RGB"))


def _deep_samples(values: np.ndarray) -> np.ndarray:
    """Samples of a deep PIL image in a range that arrays may have: PIL keeps 16 bits in 32, and floats up to 255."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "i" and low >= 0 and high <= 65535:
        return values.astype(np.uint16)
    if values.dtype.kind == "f" and low >= 0 and 1 < high <= 255:
        values = np.rint(values).astype(np.uint8)
    return values
