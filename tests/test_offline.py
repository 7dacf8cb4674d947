"""Nothing needs the network: every command runs with it cut off, and none so much as tries it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import click
import pytest

import tiny
from conftest import SOURCES
from regraft.cli import main

CUT_OFF = """
import os, socket

def refused(self, address, *_):
    if self.family == socket.AF_UNIX:
        return connect(self, address)
    tried(address)

def tried(*what):
    with open(os.environ["TRIED"], "a") as f:
        print(what, file=f)
    raise OSError(101, "Network is unreachable")

connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refused
socket.getaddrinfo = socket.gethostbyname = tried
"""

RUN_ALL = """
import json, os, sys
import torch
torch.set_num_threads(1)
from regraft.cli import main
for words in json.loads(sys.argv[1]):
    print(">", *words, flush=True)
    main(words, standalone_mode=False)
"""


@pytest.fixture
def cut_off(tmp_path):
    """The environment of a process without a network, and the file that tells of every attempt."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CUT_OFF)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(SOURCES)]),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "TRIED": str(tmp_path / "tried"),
    }
    return environment, tmp_path / "tried"


def leaves(group=main, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name)


def test_every_command_runs_without_a_network_and_tries_none(cut_off, tmp_path):
    environment, tried = cut_off
    data, run = str(tiny.write_pictures(tmp_path / "data", each=3)), str(tmp_path / "run")
    words = [
        ["fit", data, "--out", run],
        ["curve", data, "--backbone", "default", "--backbone", "scratch"],
        ["pretrain", data, "--method", "contrastive", "--epochs", "1", "--out", str(tmp_path / "mine")],
        ["predict", run, data],
        ["evaluate", run, data],
        ["doctor", run],
        ["inspect"],
        ["cache", "list"],
        ["cache", "verify"],
        ["cache", "prune", "--max-bytes", "0"],
    ]
    assert {tuple(w[: 1 + (w[0] == "cache")]) for w in words} == set(leaves()), "every command must be listed here"
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(words)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reuse up to") == 3
    assert not tried.exists(), tried.read_text()


def test_weights_that_are_not_here_get_one_sentence_at_once(cut_off):
    environment, tried = cut_off
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "regraft", "inspect", "resnet18.a1_in1k"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert time.monotonic() - started < 30, "the client of the hub would try for a minute"
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("The weights of resnet18.a1_in1k are neither in the local cache of timm (")
    assert environment["HF_HOME"] in done.stderr
    assert "nor could the hub be reached" in done.stderr
    assert done.stderr.count("\n") == 1
    assert tried.exists()
