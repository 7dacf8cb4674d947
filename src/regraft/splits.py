"""Folds: stratified by class, seeded, never parting examples that belong together.

What belongs together comes as whole numbers: equal bytes, equal pixels and the user's groups, merged by `together`.
Knows labels and groups as numbers, nothing of pictures.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.errors import DataError, RunError

FOLDS = 5
REPEATS = 3
ENOUGH_FOR_ONE_REPEAT = 5000
"""From this many examples on one repeat is made: more would only average the noise of the split."""
TRIES = 20
LARGEST_SEED = 2**32 - 1
"""Every generator that is seeded here takes whole numbers from 0 to this."""


def check_seed(seed: Any) -> int:
    """The seed as an int, whatever whole number it is; raises RunError for one that a generator would refuse."""
    try:
        whole = operator.index(seed)
    except TypeError:
        whole = -1
    if not 0 <= whole <= LARGEST_SEED:
        raise RunError(f"A seed must be a whole number from 0 to {LARGEST_SEED}; found {seed}.")
    return whole


def together(*keys: Sequence[str]) -> np.ndarray:
    """One number per example, equal for examples that share any key (transitively); empty keys join nothing."""
    n = len(keys[0])
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in keys:
        first: dict[str, int] = {}
        for i, key in enumerate(column):
            if key:
                parent[root(i)] = root(first.setdefault(key, i))
    return np.array([root(i) for i in range(n)], dtype=np.int64)


def fold_assignments(
    labels: np.ndarray, groups: np.ndarray, *, seed: int, names: Sequence[str] | None = None
) -> np.ndarray:
    """Which fold each example is held out in: int64 (repeats, n), 5 folds x 3 repeats.

    labels, groups: int64 (n,). Fewer folds when the smallest class has fewer groups than 5, so that each of its
    groups is held out once; every class is always among what the other folds hold.
    Raises DataError, with the class as in `names`, when a class has a single group: no fold could both train on it
    and test it.
    """
    fewest, smallest = min((len(np.unique(groups[labels == c])), int(c)) for c in np.unique(labels))
    if fewest < 2:
        name = repr(names[smallest]) if names else f"number {smallest}"
        pictures = int((labels == smallest).sum())
        found = "has 1" if pictures == 1 else f"has {pictures} in one group"
        raise DataError(
            f"Every class needs at least 2 different pictures or groups to be judged by; class {name} {found}: add "
            "pictures, or leave the class out."
        )
    folds = min(FOLDS, fewest)
    repeats = 1 if len(labels) >= ENOUGH_FOR_ONE_REPEAT else REPEATS
    return np.stack([_one(labels, groups, folds, seed + r) for r in range(repeats)])


def _one(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """One assignment; groups that span classes can put a whole class into one fold, and then others are tried."""
    whole = np.unique(groups, return_inverse=True)[1]
    alone = len(labels) == whole.max() + 1
    for attempt in range(TRIES):
        rng = np.random.default_rng([seed, attempt])
        assignment = _dealt(labels, folds, rng) if alone else _packed(labels, whole, folds, rng)
        if all(len(np.unique(assignment[labels == c])) > 1 for c in np.unique(labels)):
            return assignment
    # Each group its own fold: no class is in one fold alone, for each has two groups.
    return whole.astype(np.int64)


def _dealt(labels: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Each class shuffled and dealt out like cards; the next class goes on at the fold where the last one stopped."""
    out = np.empty(len(labels), dtype=np.int64)
    dealt = 0
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        out[members] = (dealt + np.arange(len(members))) % folds
        dealt += len(members)
    return out


def _packed(labels: np.ndarray, whole: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Whole groups, large ones first, each into the fold where it keeps the classes most even.

    With h(f, c) examples of class c in fold f, t(c) in all, the spread to keep small is the sum of (h(f, c) / t(c))^2.
    A group of g(c) examples adds 2 h(f, c) g(c) / t(c)^2 to it and a part that is the same in every fold: it goes where
    that is least, and of equal folds to the smallest.
    """
    counts = np.zeros((whole.max() + 1, labels.max() + 1))
    np.add.at(counts, (whole, labels), 1)
    weighted = counts / np.maximum(counts.sum(0), 1) ** 2
    held = np.zeros((folds, counts.shape[1]))
    fold_of = np.empty(len(counts), dtype=np.int64)
    shuffled = rng.permutation(len(counts))
    for group in shuffled[np.argsort(-(counts * weighted)[shuffled].sum(1), kind="stable")]:
        added = held @ weighted[group]
        equals = np.flatnonzero(np.isclose(added, added.min(), rtol=1e-9))
        fold_of[group] = equals[held[equals].sum(1).argmin()]
        held[fold_of[group]] += counts[group]
    assignment: np.ndarray = fold_of[whole]
    return assignment
