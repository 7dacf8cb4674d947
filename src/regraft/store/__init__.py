"""The feature store: what frozen layers make of each picture, computed once and kept on disk.

    ROOT/features/KEY/key.json    the facts that shaped the features, whose digest KEY is
    ROOT/features/KEY/NAME.rec    a shard: some hundred pictures, never changed; NAME is the digest of its bytes
    ROOT/quarantine/              damaged files, set aside until the next prune
    ROOT/locks/                   one empty file for each name that was locked

Shards are written aside and renamed, two writers of the same rows make the same file, and no file lists the others:
any number of processes may read, write and evict at once, and no lock is needed for a right answer. Every byte is
checked before it is used; what fails the check, or is gone, counts as missing and is computed again.

    shard    one file: its bytes and their checks
    folder   the store as folders: keys, sizes, eviction, errors
    rows     write, read, iterate, lock
    upkeep   list, verify, prune

Knows ids and rows of numbers, nothing of networks or pictures. Not covered: somebody who forges shards on purpose;
systems without POSIX renames; two processes whose keys together exceed the cap, which evict each other's.
"""

from regraft.store.folder import FeatureKey, FeatureStore, StoreFullError, StoreReadOnlyError, open_store
from regraft.store.rows import (
    FeatureRows,
    extraction_lock,
    iterate_features,
    read_features,
    stored_ids,
    write_features,
)
from regraft.store.upkeep import Entry, Pruned, Verification, list_entries, prune, verify

__all__ = [
    "Entry",
    "FeatureKey",
    "FeatureRows",
    "FeatureStore",
    "Pruned",
    "StoreFullError",
    "StoreReadOnlyError",
    "Verification",
    "extraction_lock",
    "iterate_features",
    "list_entries",
    "open_store",
    "prune",
    "read_features",
    "stored_ids",
    "verify",
    "write_features",
]
