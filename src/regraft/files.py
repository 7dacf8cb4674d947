"""Files that are whole or absent, and digests of what is in them.

Knows bytes and paths, nothing of networks or pictures. A file being written carries a temporary name that says
who writes it, so that what a killed writer leaves can be told from the work of a living one. Not covered: network
file systems that lose a rename.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regraft.errors import RegraftError

TEMPORARY_PREFIX = ".writing-"
# A temporary file of another machine, container or boot is given up when nothing was written to it for this long.
FOREIGN_SECONDS = 3600.0


def digest(*parts: bytes | memoryview) -> str:
    """Content hash of the parts, as 32 hex characters (BLAKE2b, 16 bytes); parts cannot run into each other."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII (so any file name survives), no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest_json(value: Any) -> str:
    """Content hash of a JSON value, the same for equal values."""
    return digest(canonical_json(value))


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write the chunks to `path` so that a reader sees the old file or the whole new one, whatever happens.

    Temporary name in the same folder, fsync, rename, fsync of the folder (PostgreSQL's durable_rename).
    Raises RegraftError naming the space needed and free when the disk is full; the temporary file is then gone.
    """
    _make_folder(path.parent)
    writer = f"{_place()}-{os.getpid()}-{_start_of(os.getpid())}"
    temporary = path.parent / f"{TEMPORARY_PREFIX}{writer}-{uuid.uuid4().hex[:12]}"
    needed = 0
    try:
        with open(temporary, "xb") as f:
            for chunk in chunks:
                needed += len(chunk)
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise RegraftError(
                f"Writing {path} needs at least {needed:,} bytes, and {free:,} are free at {path.parent}: "
                "make room there or choose another place."
            ) from e
        if isinstance(e, OSError) and e.filename is None:
            e.filename = os.fspath(path)  # of what is open the system does not say it
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document, readable by people, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomic(path, [text.encode("ascii"), b"\n"])


def stale_temporaries(folder: Path) -> tuple[Path, ...]:
    """The temporary files in `folder` (not below) that no living process can still be writing.

    Of a writer that ran in this boot of this machine (and this container) it is known whether it lives; another's
    file counts as stale when its time stamp is more than FOREIGN_SECONDS from now, in either direction.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.startswith(TEMPORARY_PREFIX))
    except FileNotFoundError:
        return ()
    return tuple(folder / name for name in names if _is_stale(folder / name))


def _is_stale(path: Path) -> bool:
    place, _, writer = path.name.removeprefix(TEMPORARY_PREFIX).partition("-")
    pid, _, rest = writer.partition("-")
    if place == _place() and pid.isdecimal():
        return not _lives(int(pid), rest.partition("-")[0])
    try:
        return abs(time.time() - path.stat().st_mtime) > FOREIGN_SECONDS
    except FileNotFoundError:
        return False


def _lives(pid: int, start: str) -> bool:
    """Whether the process `pid` that began at `start` still runs: the number alone may have gone to another one."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives and belongs to somebody else
    seen = _start_of(pid)
    return not seen or not start or seen == start


@functools.cache
def _place() -> str:
    """Where process numbers mean the same: this boot of this machine, seen from this container."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii"))
        facts.append(os.readlink("/proc/self/ns/pid"))
    return digest_json(facts)[:8]


def _start_of(pid: int) -> str:
    """Clock ticks from boot to the start of the process, "dead" for one that was killed and not yet reaped,
    nothing where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return "dead" if fields[0] in "ZX" else fields[19]


def _make_folder(folder: Path) -> None:
    """Make the folder and those above it, each entry on the disk before anything is put below it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
