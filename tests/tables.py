"""Feature tables made by hand, for the tests of the probes and of the search."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from regraft.data import Example
from regraft.features import FeatureTable
from regraft.files import digest
from regraft.probe import Bench, Task
from regraft.splits import fold_assignments
from regraft.store import FeatureKey, open_store

PLACE = tempfile.TemporaryDirectory()


def table_of(values: dict[str, np.ndarray], labels: np.ndarray) -> FeatureTable:
    """A table that holds these values, (n, parts, channels) by cut, in memory."""
    n = len(labels)
    ids = tuple(f"{i:032x}" for i in range(n))
    examples = tuple(Example(f"{i}.png", int(label), "train") for i, label in enumerate(labels))
    shapes = {cut: value.shape[1:] for cut, value in values.items()}
    held = {cut: value.reshape(n, -1).astype(np.float16) for cut, value in values.items()}
    keys = {cut: FeatureKey({"made": digest(rows.tobytes())}) for cut, rows in held.items()}
    return FeatureTable(examples, ids, ids, (), (), shapes, 0, {}, open_store(Path(PLACE.name)), keys, held)


def bench_of(values: dict[str, np.ndarray], labels: np.ndarray, *, grey: bool = False) -> Bench:
    return Bench(table_of(values, labels), np.arange(len(labels)), grey)


def task_of(labels: np.ndarray, *, groups: np.ndarray | None = None, seed: int = 0) -> Task:
    groups = np.arange(len(labels)) if groups is None else groups
    return Task(labels, groups, fold_assignments(labels, groups, seed=seed), int(labels.max()) + 1)


def classes(n: int, count: int = 3) -> np.ndarray:
    return np.arange(n) % count


def telling(labels: np.ndarray, dim: int, *, noise: float, seed: int = 0) -> np.ndarray:
    """Vectors (n, dim) that lie around a centre for each class, the centres at distances of about 2."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (int(labels.max()) + 1, dim)) * np.sqrt(2 / dim)
    return centres[labels] + rng.normal(0, noise, (len(labels), dim)) * np.sqrt(2 / dim)


def useless(n: int, dim: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, dim))


def pixels(values: np.ndarray) -> np.ndarray:
    """Values (n, m) as rows of the raw input, (n, 1, 3072), among pixels of noise."""
    noise = np.random.default_rng(9).normal(128, 20, (len(values), 3072))
    noise[:, : values.shape[1]] = 128 + 40 * values
    return noise.clip(0, 255)[:, None]
