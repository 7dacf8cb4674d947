"""Memory is kept while training, given back after, also when training fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import SOURCES
from regraft.allocator import memory_kept

PROGRAM = """
import resource, torch
from regraft.allocator import memory_kept

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps():
    before = faults()
    for _ in range(20):
        torch.ones(16_000_000).add_(1)  # 64 MB, more than the highest threshold that glibc chooses itself
    return faults() - before

def small():
    before = faults()
    for _ in range(20):
        torch.ones(4_000_000).add_(1)  # 16 MB: glibc learns by itself to keep so much
    return faults() - before

small()
learned = small()
steps()
mapped = steps()
with memory_kept():
    steps()
    kept = steps()
small()
print(mapped, kept, learned, small())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_inside_the_same_memory_is_used_again():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCES), "PATH": "/usr/bin:/bin"},
    )
    mapped, kept, learned, after = map(int, done.stdout.split())
    assert kept < mapped / 10
    assert after <= learned + 100


def test_an_error_inside_goes_on():
    with pytest.raises(ZeroDivisionError), memory_kept():
        raise ZeroDivisionError
