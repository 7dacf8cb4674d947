"""Files that are whole or absent, and digests of what is in them.

Knows bytes and paths, nothing of networks or pictures. Not covered: network file systems that lose a rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regraft.errors import RegraftError

TEMPORARY_PREFIX = ".writing-"


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
    written = 0
    try:
        with open(temporary, "xb") as f:
            for chunk in chunks:
                f.write(chunk)
                written += len(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise RegraftError(
                f"Writing {path} needs more than {written:,} bytes, and {free:,} are free at {path.parent}: "
                "make room there or choose another place."
            ) from e
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document, readable by people, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomic(path, [text.encode("ascii"), b"\n"])


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
