"""Care of the feature store: what it holds, whether it is sound, and removing what is old.

Knows keys and files. Safe beside processes that read and write: they find the ids of removed shards missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.files import stale_temporaries
from regraft.store.folder import (
    FeatureStore,
    KeyFolder,
    empty_quarantine,
    evict,
    file_paths,
    key_folders,
    read_facts,
    remove_files,
    set_aside,
    touch,
)
from regraft.store.rows import read_shards
from regraft.store.shard import FORMAT_VERSION, DamagedError, check_shard


@dataclass(frozen=True)
class Entry:
    """One key of the store. `facts` is None when key.json is lost or damaged; `bytes` counts every file of the key.

    `pictures`, `dim` and `dtype` are 0, 0 and "" where nothing sound is found in the format of this version.
    `last_used` is in seconds since 1970.
    """

    digest: str
    facts: Mapping[str, Any] | None
    pictures: int
    dim: int
    dtype: str
    bytes: int
    last_used: float


@dataclass(frozen=True)
class Verification:
    """Outcome of reading every file: how many were checked, rows in sound shards, damaged files (where they were)."""

    checked: int
    rows: int
    damaged: tuple[Path, ...]


@dataclass(frozen=True)
class Pruned:
    """What was removed: digests of keys, files left by killed writers, number of damaged files, bytes in all."""

    keys: tuple[str, ...]
    temporaries: tuple[Path, ...]
    damaged: int
    bytes: int


def list_entries(store: FeatureStore) -> list[Entry]:
    """All keys, least recently used first. Reads headers and sets nothing aside; damaged shards do not count."""
    return [_entry(folder) for folder in key_folders(store)]


def verify(store: FeatureStore) -> Verification:
    """Read every byte of every key and set aside what is not as it was written; other formats are left alone."""
    checked, rows, damaged = 0, 0, []
    for folder in key_folders(store):
        facts = read_facts(folder.path)
        if facts and facts[0] != FORMAT_VERSION:
            continue
        if facts is None:
            damaged += file_paths(folder.path, "key.json")
        checked += len(file_paths(folder.path, "key.json"))
        for path in file_paths(folder.path, ".rec"):
            try:
                rows += len(check_shard(path).ids)
            except FileNotFoundError:
                continue  # evicted by another process meanwhile
            except DamagedError:
                damaged.append(path)
            checked += 1
    for path in damaged:
        set_aside(store, path)
    return Verification(checked, rows, tuple(damaged))


def prune(store: FeatureStore, *, max_bytes: int | None = None, older_than: float | None = None) -> Pruned:
    """Remove the keys not used for `older_than` seconds, then the least recently used until `max_bytes` are left.

    Always removes what killed writers left, never the file of a living one, and what was set aside. Raises
    StoreReadOnlyError where nothing may be removed.
    """
    damaged, freed = empty_quarantine(store)
    temporaries: list[Path] = []
    for folder in key_folders(store):
        stale = stale_temporaries(folder.path)
        if stale:
            freed += remove_files(stale)
            touch(folder.path, folder.last_used)  # tidying up is not using
            temporaries += stale
    folders = key_folders(store)
    total, now, keys = sum(f.bytes for f in folders), time.time(), []
    for folder in folders:
        old = older_than is not None and now - folder.last_used > older_than
        if old or (max_bytes is not None and total > max_bytes):
            freed += evict(folder.path)
            total -= folder.bytes
            keys.append(folder.path.name)
    return Pruned(tuple(keys), tuple(temporaries), damaged, freed)


def _entry(folder: KeyFolder) -> Entry:
    known = read_facts(folder.path)
    facts = known[1] if known else None
    shards, _ = read_shards(folder.path)
    pictures = len({name for shard in shards for name in shard.ids})
    dim, dtype = (shards[0].dim, shards[0].dtype) if shards else (0, "")
    return Entry(folder.path.name, facts, pictures, dim, dtype, folder.bytes, folder.last_used)
