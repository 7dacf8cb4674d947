"""safetensors, one file or shards with an index (`model.safetensors.index.json`).

The header is held against the format and against the length of the file before a tensor is made: names given once,
known kinds, shapes that fill their bytes, bytes that follow each other from the first to the last without overlap, gap
or rest. Shards must lie beside their index. Format: https://github.com/huggingface/safetensors. Not covered: kinds of
number that torch has not.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.state_dict import set_apart
from regraft.readers.torch_file import read_opened

FORMAT = "safetensors"
HEADER_MOST = 100_000_000
"""Bytes; the limit of the format."""
KINDS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the header: where its bytes lie, counted from the end of the header."""

    name: str
    kind: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: Path) -> Checkpoint:
    """The tensors of a safetensors file, or of all shards that an index names.

    An index of `.bin` shards is read as well. Raises ReaderError for a header that is not as the format wants it, and
    for shards that are not plain files beside the index or do not hold what it says.
    """
    try:
        if path.suffix.lower() == ".json":
            return _read_shards(path)
        with open(path, "rb") as file:
            tensors, passed = set_apart(_read(file, str(path)))
    except OSError as e:
        raise ReaderError(f"A safetensors file must be readable; {path} is not ({e.strerror or e}).") from e
    return Checkpoint(str(path), FORMAT, tensors, passed_over=passed)


def _read(file: BinaryIO, origin: str) -> dict[str, torch.Tensor]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
    if not 2 <= length <= min(HEADER_MOST, size - 8):
        raise ReaderError(
            f"{origin} must be a whole safetensors file; its header would be {length:,} bytes in a file of {size:,}."
        )
    entries = _entries(_parse(file.read(length), origin), origin)
    _check_places(entries, size - 8 - length, origin)
    return {entry.name: _tensor(file, entry, origin) for entry in entries}


def _parse(text: bytes, origin: str) -> dict[str, Any]:
    """The JSON object in the text, each name once, no numbers beyond JSON."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ReaderError(f"{origin} must begin with a JSON header; it cannot be read ({printable(str(e))}).") from e
    if not isinstance(value, dict):
        raise ReaderError(f"{origin} must begin with a JSON object; found a {type(value).__name__}.")
    return value


def _entries(header: dict[str, Any], origin: str) -> list[_Entry]:
    """The tensors in the order of their bytes."""
    header = dict(header)
    said = header.pop("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()):
        raise ReaderError(f"The __metadata__ of {origin} must be strings by name.")
    return sorted((_entry(n, v, origin) for n, v in header.items()), key=lambda entry: (entry.begin, entry.end))


def _entry(name: str, value: Any, origin: str) -> _Entry:
    where = f"The tensor {printable(name[:80])!r} of {origin}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ReaderError(f"{where} must have a dtype, a shape and data_offsets, and nothing else.")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise ReaderError(f"{where} must be one of {', '.join(KINDS)}; it is {printable(str(kind)[:40])}.")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ReaderError(f"{where} must have a shape and two offsets that are whole numbers from 0 on.")
    needed = math.prod(shape) * KINDS[kind].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ReaderError(f"{where} must fill its bytes: it needs {needed:,} and has {offsets[1] - offsets[0]:,}.")
    return _Entry(name, KINDS[kind], tuple(shape), *offsets)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_places(entries: Iterable[_Entry], size: int, origin: str) -> None:
    reached = 0
    for entry in entries:
        if entry.begin != reached:
            what = "leaves a gap before" if entry.begin > reached else "overlaps"
            raise ReaderError(f"The tensors of {origin} must follow each other; the header {what} {entry.name[:80]!r}.")
        reached = entry.end
    if reached != size:
        raise ReaderError(f"The tensors of {origin} must end with the file: at byte {size:,}, not {reached:,}.")


def _tensor(file: BinaryIO, entry: _Entry, origin: str) -> torch.Tensor:
    """The next tensor; the file stands where its bytes begin."""
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    if raw.numel() and file.readinto(raw.numpy()) != raw.numel():  # type: ignore[attr-defined]
        raise ReaderError(f"{origin} must stay as it is while it is read; it became shorter: try again.")
    if entry.kind == torch.bool:
        return (raw != 0).reshape(entry.shape)
    return raw.view(entry.kind).reshape(entry.shape)


def _read_shards(index: Path) -> Checkpoint:
    listed = _weight_map(index)
    tensors: dict[str, torch.Tensor] = {}
    form = FORMAT
    for name in dict.fromkeys(listed.values()):
        shard = index.parent / name
        with _open_beside(index, name) as file:
            if name.lower().endswith(".bin"):
                read = read_opened(file, str(shard))
                found, form = read.tensors, read.format
            else:
                found = _read(file, str(shard))
        wrong = sorted(found.keys() ^ {n for n, place in listed.items() if place == name})
        if wrong:
            raise ReaderError(f"{shard} must hold the tensors that {index} lists for it; {wrong[0][:80]!r} differs.")
        tensors |= found
    kept, passed = set_apart(tensors)
    return Checkpoint(str(index), f"{form} in shards", kept, passed_over=passed)


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > HEADER_MOST:
        raise ReaderError(f"An index of shards must be at most {HEADER_MOST:,} bytes; {index} is longer.")
    listed = _parse(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise ReaderError(f"{index} must be an index of shards, with a weight_map from tensors to files; it has none.")
    return listed


def _open_beside(index: Path, name: str) -> BinaryIO:
    """A shard, opened only as a plain file of this name in the folder of the index, not through any link."""
    where = f"The shard {printable(name[:80])!r} in {index}"
    plain = name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")
    if not plain or not name.lower().endswith((".safetensors", ".bin")):
        raise ReaderError(f"{where} must be the name of a .safetensors or .bin file in the same folder.")
    try:
        fd = os.open(index.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise ReaderError(
            f"{where} must be a plain file beside the index, no link; {e.strerror}: copy it there."
        ) from e
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
        os.close(fd)
        raise ReaderError(f"{where} must be a plain file with no other name (no hard link): copy it there.")
    return os.fdopen(fd, "rb")
