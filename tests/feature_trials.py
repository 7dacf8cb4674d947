"""Extractions that need processes of their own, on the tiny network and generated pictures.

Imported by the tests of the features, and run by them as `python feature_trials.py COMMAND ...` in child processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from regraft import features
from regraft.backbone import Backbone, load_backbone
from regraft.data import load_data
from regraft.features import FeatureTable, extract, feature_keys
from regraft.files import digest
from regraft.frozen import freeze_lower
from regraft.numerics import Numerics
from regraft.store import FeatureStore, open_store, stored_ids, verify
from store_trials import temporaries
from tiny import EXAMPLE, TinyNet

torch.set_num_threads(1)
CUTS = ("stem.0", "stage1", "stage3", "mean")
NUMERICS = Numerics("cpu", "float32", 8, "test")


def tiny() -> Backbone:
    return load_backbone(TinyNet(), example=EXAMPLE)


def extracted(
    data: Path | str, store: FeatureStore, *, backbone: Backbone | None = None, cuts: Sequence[str] = CUTS
) -> FeatureTable:
    return extract(load_data(data), backbone or tiny(), cuts, store, NUMERICS)


def values(table: FeatureTable, cut: str) -> np.ndarray:
    """All rows of a cut."""
    return np.concatenate(list(table.rows(cut)()))


def table_digest(table: FeatureTable) -> str:
    """Digest of the ids, of the pixels' digests and of every row at every cut."""
    rows = (values(table, cut).tobytes() for cut in sorted(table.shapes))
    return digest(*(i.encode() for i in (*table.ids, *table.pixels)), *rows)


def assert_equal_tables(a: FeatureTable, b: FeatureTable) -> None:
    """The same pictures with the same rows, bit for bit."""
    assert (a.ids, a.pixels, a.shapes) == (b.ids, b.pixels, b.shapes)
    for cut in a.shapes:
        assert values(a, cut).tobytes() == values(b, cut).tobytes()


def complete(store: FeatureStore, backbone: Backbone) -> frozenset[str]:
    """The pictures of which the store has the rows of every key."""
    frozen = freeze_lower(backbone.trace, CUTS, backbone.preprocess, NUMERICS)
    keys = feature_keys(frozen, backbone.source.weights).values()
    return frozenset.intersection(*(stored_ids(store, key) for key in keys))


# --- commands, each in a process of its own ---


def command_extract(data: str, root: str, flock: str) -> None:
    """Extract, once a line arrives; prints the digest and the forward passes. With flock "off" locks let all in."""
    if flock == "off":
        fcntl.flock = lambda fd, operation: None
    backbone = tiny()
    print("ready", flush=True)
    sys.stdin.readline()
    table = extracted(data, open_store(Path(root)), backbone=backbone)
    print(json.dumps({"digest": table_digest(table), "passes": table.forward_passes}))


def command_kill(data: str, root: str, kills: int, seed: int, shard_rows: int) -> None:
    """Kill extractions at random moments and look at the store after each; prints the figures as JSON."""
    features.SHARD_ROWS = shard_rows
    rng, backbone = random.Random(seed), tiny()
    whole = table_digest(extracted(data, open_store(Path(root) / "whole"), backbone=backbone))
    begun = time.perf_counter()
    extracted(data, open_store(Path(root) / "timed"), backbone=backbone)
    longest = time.perf_counter() - begun
    counts = {
        "kills": 0,
        "finished": 0,
        "halfway": 0,
        "temporaries": 0,
        "damaged": 0,
        "lost": 0,
        "wrong": 0,
        "extra": 0,
    }
    place, had, pictures = Path(root) / "killed", frozenset[str](), len(load_data(data).examples)
    while counts["kills"] < kills:
        store = open_store(place)
        child = os.fork()
        if child == 0:
            extracted(data, store, backbone=backbone)
            os._exit(0)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        counts["kills" if os.WIFSIGNALED(status) else "finished"] += 1
        counts["temporaries"] += len(temporaries(place))
        counts["damaged"] += len(verify(store).damaged)
        have = complete(store, backbone)
        counts["lost"] += len(had - have)
        counts["halfway"] += 0 < len(have) < pictures
        had = have
        if len(have) == pictures or rng.random() < 0.3:  # see what a run afterwards makes of it, and begin anew
            table = extracted(data, store, backbone=backbone)
            counts["wrong"] += table_digest(table) != whole
            counts["extra"] += table.forward_passes - (pictures - len(have))
            shutil.rmtree(place)
            had = frozenset()
    print(json.dumps({**counts, "seconds": longest}))


COMMANDS = {"extract": command_extract, "kill": command_kill}


def start(command: str, *arguments: object) -> subprocess.Popen[str]:
    """A child process that runs a command of this file, with pipes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [sys.executable, __file__, command, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )


if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*(int(a) if a.isdecimal() else a for a in sys.argv[2:]))
