"""Trials of the feature store that need processes of their own, and figures about them.

Imported by the tests of the store, and run by them as `python store_trials.py COMMAND ...` in child processes: a
writer that is killed must not be the test. Every row follows from its id, so that anybody can tell a wrong one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import StoreError
from regraft.files import TEMPORARY_PREFIX, digest, write_atomic
from regraft.store import (
    FeatureKey,
    FeatureStore,
    extraction_lock,
    iterate_features,
    open_store,
    prune,
    read_features,
    stored_ids,
    verify,
    write_features,
)

KEY = FeatureKey({"weights": "w", "cut": "layer3"})
DIM = 48
SHARD = 16
REFUSED = 3  # exit code of a command that ended with the one sentence of a StoreError


def rows_of(ids: Sequence[str], dim: int = DIM, dtype: str = "float16") -> np.ndarray:
    """The one right row of each id: whole numbers up to 2038, exact in float16."""
    starts = np.array([zlib.crc32(name.encode()) for name in ids]).reshape(len(ids), 1)
    return ((starts + np.arange(dim) * 31) % 2039).astype(dtype)


def names(n: int) -> list[str]:
    return [f"picture-{i:05d}" for i in range(n)]


def fill(store: FeatureStore, ids: Sequence[str], *, key: FeatureKey = KEY, shard: int = SHARD, dim: int = DIM) -> int:
    """Write the ids that are missing, in shards; the number written."""
    have = stored_ids(store, key)
    missing = [name for name in ids if name not in have]
    for i in range(0, len(missing), shard):
        write_features(store, key, missing[i : i + shard], rows_of(missing[i : i + shard], dim))
    return len(missing)


def content_digest(store: FeatureStore, ids: Sequence[str], key: FeatureKey = KEY) -> str:
    """Digest of the ids and rows that are there, in the order asked for."""
    read = read_features(store, key, ids)
    return digest(*(name.encode() for name in read.ids), read.rows.tobytes())


def wrong_rows(store: FeatureStore, ids: Sequence[str]) -> int:
    read = read_features(store, KEY, ids)
    return int((read.rows != rows_of(read.ids)).any(axis=1).sum()) if read.ids else 0


def records(store: FeatureStore, key: FeatureKey = KEY) -> list[Path]:
    return sorted(store.folder(key).glob("*.rec"))


def temporaries(root: Path) -> list[Path]:
    return sorted(root.rglob(f"{TEMPORARY_PREFIX}*"))


def flip_and_read(store: FeatureStore, keys: Sequence[FeatureKey], ids: Sequence[str], trials: int, seed: int) -> int:
    """Damage one bit or byte of a random file, `trials` times, each time from the sound store; how often it was found.

    Found means: the read names the file, gives no row of it, gives all other rows right, and the file is out of the
    way; for key.json, that `verify` names it.
    """
    rng = random.Random(seed)
    files = {path: path.read_bytes() for path in sorted((store.root / "features").rglob("*")) if path.is_file()}
    key_of = {store.folder(key): key for key in keys}
    found = 0
    for _ in range(trials):
        path = rng.choice(list(files))
        data = bytearray(files[path])
        data[rng.randrange(len(data))] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        path.write_bytes(data)
        if path.name == "key.json":
            found += verify(store).damaged == (path,)
        else:
            read = read_features(store, key_of[path.parent], ids)
            right = not read.ids or np.array_equal(
                read.rows, rows_of(read.ids, read.rows.shape[1], read.rows.dtype.name)
            )
            found += read.damaged == (path,) and len(read.missing) == SHARD and right and not path.exists()
        path.write_bytes(files[path])
    assert all(read_features(store, key, ids).missing == () for key in keys)
    return found


@dataclass(frozen=True)
class DiskLog:
    """What a writer told the disk, in order: ("data", inode, bytes) by fsync of a file, ("entry", path, inode, bytes)
    by rename or mkdir (inode None), ("sync", folder) by fsync of a folder, ("done", ids) when the call returned."""

    root: Path
    events: list[tuple[Any, ...]]


@contextlib.contextmanager
def logged_disk(root: Path) -> Iterator[DiskLog]:
    """Log the system calls by which this process makes files last."""
    log = DiskLog(root, [])
    real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir")}

    def fsync(fd: int) -> None:
        path, inode = Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_ino
        log.events.append(("sync", path) if path.is_dir() else ("data", inode, path.read_bytes()))
        real["fsync"](fd)

    def replace(old: Path, new: Path) -> None:
        log.events.append(("entry", Path(new), os.stat(old).st_ino, Path(old).read_bytes()))
        real["replace"](old, new)

    def mkdir(path: Path, mode: int = 0o777) -> None:
        real["mkdir"](path, mode)
        log.events.append(("entry", Path(path), None, b""))

    try:
        os.fsync, os.replace, os.mkdir = fsync, replace, mkdir
        yield log
    finally:
        os.fsync, os.replace, os.mkdir = real["fsync"], real["replace"], real["mkdir"]


def logged_fill(root: Path, ids: Sequence[str]) -> DiskLog:
    """Write the ids in shards, each acknowledged in the log."""
    root.mkdir()
    with logged_disk(root) as log:
        store = open_store(root / "store")
        for i in range(0, len(ids), SHARD):
            fill(store, ids[i : i + SHARD])
            log.events.append(("done", ids[i : i + SHARD]))
    return log


def after_power_loss(log: DiskLog, root: Path, rng: random.Random) -> set[str]:
    """Make at `root` what a disk may hold when the power fails at a random moment; the ids whose writing was done.

    What was not synced may be there or not, each folder entry by itself, and a file that was not may hold anything.
    """
    events = log.events[: rng.randrange(len(log.events) + 1)]
    synced = [(i, e[1]) for i, e in enumerate(events) if e[0] == "sync"]
    whole = {e[1]: e[2] for e in events if e[0] == "data"}
    gone: set[Path] = set()
    root.mkdir()
    for i, event in enumerate(events):
        if event[0] != "entry":
            continue
        _, path, inode, data = event
        lasting = any(j > i and folder == path.parent for j, folder in synced)
        if gone & {path, *path.parents} or not (lasting or rng.random() < 0.5):
            gone.add(path)
        elif inode is None:
            (root / path.relative_to(log.root)).mkdir()
        else:
            torn = rng.choice([b"", data[: rng.randrange(len(data) + 1)], b"\0" * len(data)])
            (root / path.relative_to(log.root)).write_bytes(whole.get(inode, torn))
    return {name for e in events if e[0] == "done" for name in e[1]}


def lose_power(log: DiskLog, folder: Path, ids: Sequence[str], trials: int, seed: int) -> dict[str, int]:
    """Restart from `trials` states of the disk after a power loss: ids lost though done, wrong rows, damaged files."""
    folder.mkdir()
    rng, counts = random.Random(seed), {"trials": 0, "lost": 0, "wrong": 0, "damaged": 0, "rows": 0}
    for i in range(trials):
        done = after_power_loss(log, folder / str(i), rng)
        store = open_store(folder / str(i) / "store")
        read = read_features(store, KEY, ids)
        counts["trials"] += 1
        counts["rows"] += len(read.ids)
        counts["lost"] += len(done - set(read.ids))
        counts["wrong"] += int(bool(read.ids) and not np.array_equal(read.rows, rows_of(read.ids)))
        counts["damaged"] += len(read.damaged)
        shutil.rmtree(folder / str(i))
    return counts


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, size: str) -> Iterator[bool]:
    """A small file system of its own at `folder`, where this process may mount one; says whether it is there."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(command, capture_output=True).returncode == 0:
            try:
                yield True
            finally:
                subprocess.run(["umount", "-l", str(folder)], check=True)
            return
    yield False


# --- commands, each in a process of its own ---


def command_fill(root: str, first: int, last: int, shard: int, flock: str) -> None:
    """Write what is missing, without a lock; with flock "off", file locks let everybody in."""
    if flock == "off":
        fcntl.flock = lambda fd, operation: None
    fill(open_store(Path(root)), names(last)[first:], shard=shard)


def command_extract(root: str, n: int, flock: str) -> None:
    """What an extraction does: under the lock, compute what is missing. Prints how many pictures that were."""
    if flock == "off":
        fcntl.flock = lambda fd, operation: None
    store = open_store(Path(root))
    with extraction_lock(store, KEY.digest):
        print(fill(store, names(n)))


def command_hang(path: str) -> None:
    """Stop in the middle of writing a file until a line arrives."""

    def chunks() -> Iterator[bytes]:
        yield b"begun, "
        print("writing", flush=True)
        sys.stdin.readline()
        yield b"done"

    write_atomic(Path(path), chunks())


def command_kill(root: str, kills: int, seed: int, pictures: int) -> None:
    """Kill writers at random moments and look at the store after each; prints the figures as JSON."""
    rng, ids = random.Random(seed), names(pictures)
    counts = {"kills": 0, "finished": 0, "damaged": 0, "wrong": 0, "lost": 0, "temporaries": 0, "rounds": 0}
    store = open_store(Path(root) / "round-0")
    had: frozenset[str] = frozenset()
    while counts["kills"] < kills:
        child = os.fork()
        if child == 0:
            fill(store, ids)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        counts["kills" if os.WIFSIGNALED(status) else "finished"] += 1
        counts["temporaries"] += len(temporaries(store.root))
        counts["damaged"] += len(verify(store).damaged)
        counts["wrong"] += wrong_rows(store, ids)
        have = stored_ids(store, KEY)
        counts["lost"] += len(had - have)
        had = have
        if len(have) == pictures:
            counts["rounds"] += 1
            store, had = open_store(Path(root) / f"round-{counts['rounds']}"), frozenset()
    fill(store, ids)
    prune(store)
    print(json.dumps({**counts, "left": len(temporaries(store.root)), "digest": content_digest(store, ids)}))


def command_stream(root: str, pictures: int, dim: int) -> None:
    """Write and read back, in another order, more than should be in memory. Prints seconds and the peak memory."""
    store, ids = open_store(Path(root)), names(pictures)
    begun = time.perf_counter()
    for i in range(0, pictures, 256):
        write_features(store, KEY, ids[i : i + 256], rows_of(ids[i : i + 256], dim))
    written = time.perf_counter()
    random.Random(0).shuffle(ids)
    right = sum(np.array_equal(b.rows[:, :9], rows_of(b.ids, 9)) for b in iterate_features(store, KEY, ids))
    seconds = {"write": written - begun, "read": time.perf_counter() - written}
    # Not ru_maxrss, which a process inherits from the one that started it.
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps({**seconds, "right": right, "peak": peak}))


COMMANDS = {
    "fill": command_fill,
    "extract": command_extract,
    "hang": command_hang,
    "kill": command_kill,
    "stream": command_stream,
}


def start(command: str, *arguments: object, under: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A child process that runs a command of this file, with pipes; `under` goes before it."""
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [*under, sys.executable, __file__, command, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> str:
    """What the child printed; it must have ended well."""
    out, _ = child.communicate(timeout=300)
    assert child.returncode == 0, f"child ended with {child.returncode}"
    return out


if __name__ == "__main__":
    try:
        COMMANDS[sys.argv[1]](*(int(a) if a.isdecimal() else a for a in sys.argv[2:]))
    except StoreError as e:
        print(e)
        sys.exit(REFUSED)
