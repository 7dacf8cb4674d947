"""Fixtures for all tests: a store of their own, one thread, tiny pictures and a tiny network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from regraft.networks.torchvision_ops import declare_missing_operators

torch.set_num_threads(1)
# Shells start background jobs with interrupts ignored, and every process started from there inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
declare_missing_operators()

SOURCES = Path(__file__).parent.parent / "src"


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """The folder of the feature store, new for every test: no test sees the user's."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def tiny_backbone():
    """A network of 3 stages and 8 channels for 32 x 32 pictures."""
    return tiny.TinyNet()


@pytest.fixture
def tiny_images(tmp_path):
    """A folder of 24 pictures in 3 classes that the tiny network tells apart and raw pixels do not."""
    return tiny.write_pictures(tmp_path / "pictures")


@pytest.fixture(scope="session")
def real_run(tmp_path_factory):
    """A fit on the default backbone by the command line in a process of its own: (run, its pictures, the process)."""
    place = tmp_path_factory.mktemp("real")
    data = place / "pictures"
    tiny.write_pictures(data / "train", each=10)
    tiny.write_pictures(data / "test", each=4, seed=1)
    done = regraft("fit", data, "--out", place / "run", "--json", cache=place / "store")
    assert done.returncode == 0, done.stderr
    return place / "run", data, done


def regraft(*args, cache, before=(), **options):
    """Run the command line in a process of its own; `before` are the words of a program that starts it."""
    environment = {**os.environ, "REGRAFT_CACHE": str(cache), "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-m", "regraft", *map(str, args)]
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment, **options}
    return subprocess.run(command, check=False, **options)
