"""One shard of the feature store: the rows of some hundred pictures in one file that is checked whenever it is read.

    magic | length of the header | header (JSON: key, ids, dtype, dim, CRC-32 of each row) | digest of all that | rows

Rows are checked one by one, so that a few of them can be read alone. CRC-32 ran at 4.2 GB/s where this was measured,
SHA-256 at 1.8, BLAKE2b at 0.9, and reading a cached file at 1.4: checking costs less than reading. It finds every
damage within 4 neighbouring bytes of a row and misses another one once in 2^32; a full check (`check_shard`) also
compares the digest of the file with its name.

Knows one file and the key in the name of its folder. Not covered: forged files with right checksums.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from regraft.errors import StoreError
from regraft.files import canonical_json, digest

FORMAT_VERSION = 1
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}

_MAGIC = f"regraft features {FORMAT_VERSION}\n".encode("ascii")
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 16


class DamagedError(Exception):
    """A file of the store is not what was written."""


@dataclass(frozen=True)
class Shard:
    """A header that passed its check: row i belongs to `ids[i]`, lies at `start` + i rows and has CRC-32 `sums[i]`."""

    path: Path
    ids: tuple[str, ...]
    dtype: str
    dim: int
    sums: tuple[int, ...]
    start: int


def encode_shard(key_digest: str, ids: Sequence[str], rows: np.ndarray) -> tuple[str, list[bytes]]:
    """File name and bytes of the shard that holds `rows` (len(ids), dim), little-endian and contiguous."""
    header = canonical_json(
        {
            "key": key_digest,
            "ids": list(ids),
            "dtype": rows.dtype.name,
            "dim": rows.shape[1],
            "sums": [zlib.crc32(row) for row in rows],
        }
    )
    head = _MAGIC + _LENGTH.pack(len(header)) + header
    parts = [head + bytes.fromhex(digest(head)), rows.tobytes()]
    return _name_of(b"".join(parts)), parts


def read_header(path: Path) -> Shard:
    """The header of the shard, checked against its own digest, the key of its folder and the size of the file.

    Raises DamagedError, and FileNotFoundError when there is no such file (any more) or it may not be read. Nothing
    is allocated on the word of the file before that word was checked.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(len(_MAGIC) + _LENGTH.size)
            if len(head) < len(_MAGIC) + _LENGTH.size or not head.startswith(_MAGIC):
                raise DamagedError
            (length,) = _LENGTH.unpack_from(head, len(_MAGIC))
            if len(head) + length + _DIGEST_BYTES > size:
                raise DamagedError
            head += f.read(length)
            found = f.read(_DIGEST_BYTES)
    except OSError as e:
        _unreadable(path, e)
    if bytes.fromhex(digest(head)) != found:
        raise DamagedError
    return _parse_header(path, head, size)


def fill_rows(out: np.ndarray, shard: Shard, pairs: Sequence[tuple[int, int]]) -> None:
    """Read row r of the shard into row p of `out` (n, bytes of a row), uint8, for each (p, r), and check it there.

    What was checked is what is used: each row is read once, into its final place. Raises as `read_header` does.
    """
    row_bytes = out.shape[1]
    try:
        with open(shard.path, "rb", buffering=0) as f:
            for p, r, n in _runs(pairs):
                _read_exactly(f.fileno(), out[p : p + n].data.cast("B"), shard.start + r * row_bytes)
    except OSError as e:
        _unreadable(shard.path, e)
    if any(zlib.crc32(out[p]) != shard.sums[r] for p, r in pairs):
        raise DamagedError


def check_shard(path: Path) -> Shard:
    """The shard, every byte of whose file is as it was written. Raises as `read_header` does."""
    shard = read_header(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        _unreadable(path, e)
    if _name_of(data) != path.name:
        raise DamagedError
    return shard


def _name_of(data: bytes) -> str:
    return f"{digest(data)}.rec"


def _parse_header(path: Path, head: bytes, size: int) -> Shard:
    start = len(head) + _DIGEST_BYTES
    try:
        facts = json.loads(head[len(_MAGIC) + _LENGTH.size :])
        key, ids, dtype, dim, sums = (facts[name] for name in ("key", "ids", "dtype", "dim", "sums"))
        fits = start + len(ids) * dim * DTYPES[dtype].itemsize == size
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DamagedError from e
    if key != path.parent.name or not fits or len(sums) != len(ids):
        raise DamagedError
    return Shard(path, tuple(ids), dtype, dim, tuple(sums), start)


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(p, r, n) for each stretch of n pairs (p, r), (p + 1, r + 1), ...: neighbours are read in one go."""
    begin = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i] != (pairs[i - 1][0] + 1, pairs[i - 1][1] + 1):
            yield (*pairs[begin], i - begin)
            begin = i


def _read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        n = os.preadv(fd, [buffer], offset)
        if n == 0:
            raise DamagedError  # cut short since its header was read
        buffer, offset = buffer[n:], offset + n


def _unreadable(path: Path, e: OSError) -> NoReturn:
    """A lost or forbidden file is absent, one with bad sectors damaged; anything else is for the user to mend."""
    if isinstance(e, FileNotFoundError | PermissionError) or e.errno == errno.ESTALE:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from e
    if e.errno == errno.EIO:
        raise DamagedError from e
    raise StoreError(f"The feature store must be readable, and {path} is not: {e.strerror}.") from e
