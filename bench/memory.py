"""Memory of probing: 100,000 synthetic pictures' features at the widest cut, streamed from the store.

    python bench/memory.py [--pictures 100000] [--dim 4096]

Writes float16 rows into a temporary store, then cross-validates a head on them. Prints the peak of resident memory
above what it was before the probe.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from regraft.ridge import START, cross_validate, standardise
from regraft.splits import fold_assignments
from regraft.store import FeatureKey, iterate_features, open_store, write_features

RESULTS = Path(__file__).parent / "RESULTS.md"
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, key = open_store(Path(folder)), FeatureKey({"kind": "synthetic"})
        labels = np.arange(options.pictures) % CLASSES
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(CLASSES, options.dim)).astype(np.float32) * 0.05
        ids = [f"{i:032x}" for i in range(options.pictures)]
        for i in range(0, options.pictures, 512):
            noise = rng.standard_normal((len(ids[i : i + 512]), options.dim), dtype=np.float32)
            write_features(store, key, ids[i : i + 512], (noise + centres[labels[i : i + 512]]).astype(np.float16))
        before = peak()
        started = time.perf_counter()

        def rows():  # type: ignore[no-untyped-def]
            return (block.rows for block in iterate_features(store, key, ids, block_rows=4096))

        targets = torch.nn.functional.one_hot(torch.from_numpy(labels), CLASSES).float()
        folds = torch.from_numpy(fold_assignments(labels, np.arange(len(labels)), seed=0))
        path = cross_validate(rows, standardise(rows), targets, folds, START)
        accuracy = max(float((s[0].argmax(1).numpy() == labels).mean()) for s in path.scores.values())
        line = (
            f"\n## Memory, {datetime.date.today()}\n\n{options.pictures} x {options.dim} float16: probed in "
            f"{time.perf_counter() - started:.0f} s, peak {(peak() - before) / 1e9:.2f} GB above the "
            f"{before / 1e9:.2f} GB before it ({len(path.scores)} strengths, accuracy {accuracy:.3f})."
        )
    print(line)
    with RESULTS.open("a") as f:
        f.write(line + "\n")


def peak() -> float:
    """Peak resident memory of this process, bytes; not ru_maxrss, which a child inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
