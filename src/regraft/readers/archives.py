"""Zip archives of weights, with their directory held against the file before an entry is opened.

Refused are entries that lie over each other or twice under one name, and such as grow out of all proportion.
Nothing is ever extracted to the disk. Knows zip, nothing of what the entries mean.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from regraft.errors import ReaderError

MAGIC = b"PK\x03\x04"
ENTRIES = 200_000
GROWTH = 100
SLACK = 1 << 20


@contextlib.contextmanager
def open_archive(file: BinaryIO, origin: str, *, compressed: bool = False) -> Iterator[zipfile.ZipFile]:
    """The archive in `file`; entries may be packed only where `compressed` says so.

    Raises ReaderError naming `origin` for anything that is not a whole and honest archive, also while entries are
    being read: their checksums are compared with their bytes.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            _check(archive, size, origin, compressed)
            yield archive
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, UnicodeError) as e:
        raise ReaderError(f"{origin} must be a whole zip archive; it is damaged ({e}): fetch it again.") from e
    except RuntimeError as e:
        if "password" not in str(e):
            raise
        raise ReaderError(f"{origin} must be an open archive; it is encrypted: save it without a password.") from e


def _check(archive: zipfile.ZipFile, size: int, origin: str, compressed: bool) -> None:
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    if len(names) != len(entries):
        raise ReaderError(f"Every entry of {origin} must have a name of its own; {len(entries) - len(names)} have not.")
    if len(entries) > ENTRIES:
        raise ReaderError(f"{origin} must have at most {ENTRIES:,} entries; it has {len(entries):,}.")
    packed = sum(entry.compress_size for entry in entries)
    if packed > size:
        raise ReaderError(f"{origin} must hold what its directory lists: {packed:,} bytes in a file of {size:,}.")
    if not compressed and any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
        raise ReaderError(f"The entries of {origin} must be stored as they are; some are compressed.")
    whole = sum(entry.file_size for entry in entries)
    if whole > GROWTH * packed + SLACK:
        raise ReaderError(f"{origin} must not grow when it is read; its {packed:,} bytes would become {whole:,}.")
