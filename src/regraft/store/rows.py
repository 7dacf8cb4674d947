"""Rows in and out of the feature store.

Knows ids and rows of numbers. A row that is not there, damaged or just evicted is missing, never an error and never
wrong. Not covered: computing what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regraft.errors import StoreError
from regraft.files import digest_json, stale_temporaries
from regraft.store.folder import (
    FeatureKey,
    FeatureStore,
    file_paths,
    make_room,
    remove_files,
    set_aside,
    touch,
    write_facts,
    write_file,
)
from regraft.store.shard import DTYPES, DamagedError, Shard, encode_shard, fill_rows, read_header

SHARD_ROWS = 512


@dataclass(frozen=True)
class FeatureRows:
    """What was read: `rows` (len(ids), dim) of the ids found, in the order asked for; the others are `missing`.

    `damaged` names the files that failed their check during this reading, where they were found.
    """

    ids: tuple[str, ...]
    rows: np.ndarray
    missing: tuple[str, ...]
    damaged: tuple[Path, ...]


@dataclass(frozen=True)
class _Index:
    """The sound shards of a key, where each id is (shard, row), and the paths of the shards that were set aside."""

    shards: tuple[Shard, ...]
    where: Mapping[str, tuple[int, int]]
    damaged: tuple[Path, ...]


def stored_ids(store: FeatureStore, key: FeatureKey) -> frozenset[str]:
    """Ids of the pictures whose rows are there. Only headers are read and checked; damaged shards are set aside."""
    return frozenset(_index(store, key).where)


def write_features(store: FeatureStore, key: FeatureKey, ids: Sequence[str], rows: np.ndarray) -> None:
    """Keep `rows` (len(ids), dim), float16 or float32, one for each id; on return they are on the disk.

    One file for each SHARD_ROWS rows: pass some hundred at a time. When the cap would be exceeded, the keys least
    recently used are evicted first; keys used through this store object stay, and rows that do not fit beside them
    are refused. Raises StoreError for rows that are not finite, StoreReadOnlyError where nothing may be written,
    StoreFullError for a full disk or cap; shards written before an error stay.
    """
    rows = _checked_rows(ids, rows)
    store.in_use.add(key.digest)
    with contextlib.suppress(OSError, StoreError):  # what a killed writer left may belong to another user
        remove_files(stale_temporaries(store.folder(key)))
    for i in range(0, len(ids), SHARD_ROWS):
        name, parts = encode_shard(key.digest, ids[i : i + SHARD_ROWS], rows[i : i + SHARD_ROWS])
        make_room(store, sum(map(len, parts)))
        write_facts(store, key)
        write_file(store.folder(key) / name, parts)


def read_features(store: FeatureStore, key: FeatureKey, ids: Sequence[str]) -> FeatureRows:
    """The rows of `ids`, all in memory at once.

    A damaged shard is set aside and none of its ids are found; those of a shard that another process evicts meanwhile
    are missing too. With no row found, `rows` is (0, 0).
    """
    index = _index(store, key)
    return _read(store, index, ids, damaged=index.damaged)


def iterate_features(
    store: FeatureStore, key: FeatureKey, ids: Sequence[str], *, block_rows: int = 1024
) -> Iterator[FeatureRows]:
    """The rows of `ids` in their order, `block_rows` at a time, whatever the order in which they were written.

    Only one block is in memory. Damage found on the way counts from that block on: rows already given were sound.
    """
    index = _index(store, key)
    for i in range(0, len(ids), block_rows):
        yield _read(store, index, ids[i : i + block_rows], damaged=index.damaged if i == 0 else ())


def read_shards(folder: Path) -> tuple[list[Shard], list[Path]]:
    """The headers of the sound shards of a key, and the paths of the damaged ones."""
    shards, damaged = [], []
    for path in file_paths(folder, ".rec"):
        try:
            shards.append(read_header(path))
        except FileNotFoundError:
            continue  # evicted by another process meanwhile
        except DamagedError:
            damaged.append(path)
    return shards, damaged


@contextlib.contextmanager
def extraction_lock(store: FeatureStore, name: str) -> Iterator[None]:
    """Let one process of this machine at a time work on `name`; the others wait, then find its rows in the store.

    It saves work and nothing else: where files cannot be locked (read-only folders, some network file systems) it
    lets everybody in. The system frees the lock of a process that dies.
    """
    fd = _lock(store.root / "locks" / f"{digest_json(name)}.lock")
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _checked_rows(ids: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The rows as they are laid down: little-endian, one after the other."""
    if rows.ndim != 2 or len(rows) != len(ids) or rows.shape[1] == 0 or rows.dtype.name not in DTYPES:
        raise StoreError(
            f"Features must be float16 or float32 of shape ({len(ids)}, values per picture), one row for each id, "
            f"and are {rows.dtype} of shape {rows.shape}."
        )
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        named = ", ".join(ids[i] for i in np.flatnonzero(bad)[:3])
        raise StoreError(
            f"Features must be finite, and {bad.sum()} of {len(ids)} pictures have NaN or infinite ones ({named}): "
            "check the weights, or compute in float32."
        )
    return np.ascontiguousarray(rows, dtype=DTYPES[rows.dtype.name])


def _index(store: FeatureStore, key: FeatureKey) -> _Index:
    """Read the headers of the key; this counts as using it. Damaged shards are set aside."""
    folder = store.folder(key)
    shards, damaged = read_shards(folder)
    for path in damaged:
        set_aside(store, path)
    kinds = sorted({(s.dim, s.dtype) for s in shards})
    if len(kinds) > 1:
        raise StoreError(
            f"All rows of a key must be alike, and {folder} holds rows of {kinds}: the facts of this key leave "
            "something out; name it there, and remove that folder."
        )
    store.in_use.add(key.digest)
    touch(folder)
    where: dict[str, tuple[int, int]] = {}
    for s, shard in enumerate(shards):
        for r, name in enumerate(shard.ids):
            where.setdefault(name, (s, r))
    return _Index(tuple(shards), where, tuple(damaged))


def _read(store: FeatureStore, index: _Index, ids: Sequence[str], *, damaged: tuple[Path, ...]) -> FeatureRows:
    found = [name for name in ids if name in index.where]
    dtype, dim = (DTYPES[index.shards[0].dtype], index.shards[0].dim) if found else (DTYPES["float32"], 0)
    rows = np.empty((len(found), dim), dtype)
    wanted: dict[int, list[tuple[int, int]]] = {}  # shard -> (place in rows, row of the shard)
    for p, name in enumerate(found):
        s, r = index.where[name]
        wanted.setdefault(s, []).append((p, r))
    keep = np.ones(len(found), bool)
    for s, pairs in wanted.items():
        try:
            fill_rows(rows.view(np.uint8), index.shards[s], pairs)
        except (FileNotFoundError, DamagedError) as e:
            keep[[p for p, _ in pairs]] = False
            if isinstance(e, DamagedError):
                damaged += (index.shards[s].path,)
                set_aside(store, index.shards[s].path)
    if not keep.all():
        rows, found = rows[keep], [name for name, kept in zip(found, keep, strict=True) if kept]
    got = set(found)
    return FeatureRows(tuple(found), rows, tuple(name for name in ids if name not in got), damaged)


def _lock(path: Path) -> int | None:
    """Wait for the lock; the descriptor that holds it, or nothing where there are no locks."""
    fd = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException as e:
        if fd is not None:
            os.close(fd)
        if not isinstance(e, OSError):
            raise  # Ctrl-C while waiting
        return None
    return fd
