"""Keep freed memory while training: glibc's allocator asks the system for every large tensor, and gives it back.

With its defaults the activations of every step are mapped and unmapped anew, page by page. Keeping them made steps
1.0 to 1.35 times as fast on one thread of two AVX512 cores. Elsewhere than on glibc nothing is done.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20))
DEFAULTS = ((M_MMAP_MAX, 65536), (M_TRIM_THRESHOLD, 128 * 2**10), (M_TOP_PAD, 128 * 2**10))


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with the process; at the end it goes back to the system."""
    library = _glibc()
    if library is None:
        yield
        return
    for name, value in KEEP:
        library.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in DEFAULTS:
            library.mallopt(name, value)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None
