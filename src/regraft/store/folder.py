"""The feature store as folders: what a key is, which keys there are, how large, and how they are written and evicted.

Knows the layout of the folders and the errors of the disk, nothing of what is inside a shard. Time stamps decide
only which key is evicted first, so wrong clocks cost work at most.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import platformdirs

from regraft.errors import RegraftError, StoreError
from regraft.files import TEMPORARY_PREFIX, canonical_json, digest_json, stale_temporaries, write_atomic
from regraft.store.shard import FORMAT_VERSION

MAX_BYTES = 20_000_000_000
_WRITE_TRIES = 20


class StoreReadOnlyError(StoreError):
    """The store cannot be written to by this user: what it holds can be read, new rows must stay in memory."""


class StoreFullError(StoreError):
    """The disk has no room, or the keys in use would exceed the cap of the store."""


@dataclass(frozen=True)
class FeatureKey:
    """Everything that shaped a picture's features except the picture: JSON facts, compared and hashed by their digest.

    The facts are copied; equal facts in another order are the same key. Raises StoreError for values JSON cannot hold.
    """

    facts: Mapping[str, Any] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        try:
            facts = json.loads(canonical_json(dict(self.facts)))
        except (TypeError, ValueError) as e:
            raise StoreError(f"The facts of a feature key must be JSON values with finite numbers: {e}.") from e
        object.__setattr__(self, "facts", facts)
        object.__setattr__(self, "digest", _key_digest(FORMAT_VERSION, facts))


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features and the most bytes it may hold.

    `in_use` collects the digests of the keys written or read through this object, which it will not evict.
    """

    root: Path
    max_bytes: int = MAX_BYTES
    in_use: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def folder(self, key: FeatureKey) -> Path:
        """Where the shards of the key lie."""
        return self.root / "features" / key.digest


@dataclass(frozen=True)
class KeyFolder:
    """The folder of a key, the bytes of all its files, and when it was last written or read (seconds since 1970)."""

    path: Path
    bytes: int
    last_used: float


def open_store(root: Path | None = None, *, max_bytes: int | None = None) -> FeatureStore:
    """The store at `root`, or at $REGRAFT_CACHE, or in the user's cache folder; nothing is made before the first write.

    `max_bytes` caps what the store holds: the argument, else $REGRAFT_CACHE_BYTES, else 20 GB.
    """
    place = root or os.environ.get("REGRAFT_CACHE") or platformdirs.user_cache_path("regraft")
    path = Path(place).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise StoreError(
            f"The feature store must be a folder, and {path} is a file: set REGRAFT_CACHE to another place."
        )
    cap = str(max_bytes if max_bytes is not None else os.environ.get("REGRAFT_CACHE_BYTES") or MAX_BYTES)
    if not cap.isdecimal() or int(cap) == 0:
        raise StoreError(f"The cap of the feature store must be a positive number of bytes, and is {cap!r}.")
    return FeatureStore(path, int(cap))


def write_facts(store: FeatureStore, key: FeatureKey) -> None:
    """Say in key.json what the folder of the key holds, unless it says so already; the store is right without it."""
    path = store.folder(key) / "key.json"
    text = _key_file(FORMAT_VERSION, key.facts)
    if _read_or_nothing(path) != text:
        write_file(path, [text])


def read_facts(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Format and facts, if key.json is there and is, byte for byte, what the name of the folder stands for."""
    text = _read_or_nothing(folder / "key.json")
    try:
        document = json.loads(text or b"")
        version, facts = document["format"], document["facts"]
        sound = _key_digest(version, facts) == folder.name and _key_file(version, facts) == text
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (version, facts) if sound else None


def file_paths(folder: Path, ending: str = "") -> list[Path]:
    """The files with this ending, none that is still being written, by name: everybody finds the same order."""
    entries = _scan(folder)
    names = [
        e.name for e in entries if e.name.endswith(ending) and not e.name.startswith(TEMPORARY_PREFIX) and e.is_file()
    ]
    return [folder / name for name in sorted(names)]


def key_folders(store: FeatureStore) -> list[KeyFolder]:
    """All keys, whatever their format, least recently used first; the name settles a tie."""
    found = []
    for entry in _scan(store.root / "features"):
        with contextlib.suppress(FileNotFoundError):  # evicted by another process meanwhile
            if entry.is_dir(follow_symlinks=False):
                path = Path(entry.path)
                found.append(KeyFolder(path, _bytes_in(path), path.stat().st_mtime))
    return sorted(found, key=lambda f: (f.last_used, f.path.name))


def touch(folder: Path, when: float | None = None) -> None:
    """Note that a key was used, now or at `when`; where that cannot be noted it does not matter."""
    with contextlib.suppress(OSError):
        os.utime(folder, None if when is None else (when, when))


def make_room(store: FeatureStore, need: int) -> None:
    """Evict what was set aside, then the least recently used keys that are not in use, until `need` bytes fit the cap.

    Raises StoreFullError if they cannot.
    """
    folders = key_folders(store)
    total = need + sum(f.bytes for f in folders) + _bytes_in(store.root / "quarantine")
    if total > store.max_bytes:
        total -= empty_quarantine(store)[1]
    for folder in folders:
        if total > store.max_bytes and folder.path.name not in store.in_use:
            evict(folder.path)
            total -= folder.bytes
    if total > store.max_bytes:
        raise StoreFullError(
            f"The feature store at {store.root} may hold {store.max_bytes:,} bytes, and the features in use need at "
            f"least {total:,}: raise REGRAFT_CACHE_BYTES, or reuse fewer cuts or a smaller grid."
        )


def evict(folder: Path) -> int:
    """Remove a key, but never the file that a living process is writing into it; returns the bytes freed.

    Every step leaves a key that is right, with fewer pictures, so dying on the way does no harm.
    """
    freed = remove_files([*stale_temporaries(folder), *file_paths(folder)])
    with contextlib.suppress(OSError):  # somebody is writing there
        folder.rmdir()
    return freed


def empty_quarantine(store: FeatureStore) -> tuple[int, int]:
    """Remove what was set aside: number of files, bytes."""
    paths = file_paths(store.root / "quarantine")
    return len(paths), remove_files(paths)


def set_aside(store: FeatureStore, path: Path) -> None:
    """Move a damaged file out of the way; where that is not allowed it stays, and goes on counting as missing."""
    aside = store.root / "quarantine"
    with contextlib.suppress(OSError):
        aside.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside / f"{path.parent.name}-{path.name}")


def remove_files(paths: Iterable[Path]) -> int:
    """Remove files, of which some may be gone already; returns the bytes freed."""
    freed = 0
    for path in paths:
        try:
            size = path.lstat().st_size
            path.unlink()
            freed += size
        except FileNotFoundError:
            continue
        except OSError as e:
            _refused(path, e)
    return freed


def write_file(path: Path, parts: Sequence[bytes]) -> None:
    """Write a file of the store, whole or not at all; on return it is on the disk. Raises StoreError."""
    for _ in range(_WRITE_TRIES):
        try:
            return write_atomic(path, parts)
        except FileNotFoundError:
            continue  # another process has just evicted the folder
        except RegraftError as e:
            raise StoreFullError(str(e)) from e
        except OSError as e:
            _refused(path, e)
    raise StoreError(
        f"{path.parent} must be a folder that stays while it is written to; it cannot be made, or something removes it "
        "again and again: set REGRAFT_CACHE to another place."
    )


def _key_digest(version: int, facts: Mapping[str, Any]) -> str:
    return digest_json([version, facts])


def _key_file(version: int, facts: Mapping[str, Any]) -> bytes:
    return json.dumps({"format": version, "facts": facts}, indent=1, sort_keys=True).encode("ascii") + b"\n"


def _read_or_nothing(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise StoreError(
            f"The feature store must be readable, and {folder} is not ({e.strerror}): make it readable, or set "
            "REGRAFT_CACHE to another place."
        ) from e


def _bytes_in(folder: Path) -> int:
    total = 0
    for entry in _scan(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat(follow_symlinks=False).st_size
    return total


def _refused(path: Path, e: OSError) -> NoReturn:
    if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        raise StoreReadOnlyError(
            f"The feature store at {path.parent} cannot be written to ({e.strerror}): set REGRAFT_CACHE to a folder "
            "of your own to keep new features."
        ) from e
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StoreFullError(f"There is no room to write {path}: make room there or set REGRAFT_CACHE.") from e
    raise StoreError(f"Writing {path} must work, and failed: {e.strerror}; try another disk with REGRAFT_CACHE.") from e
