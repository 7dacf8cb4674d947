"""Folds: stratified by class, seeded, never parting examples that belong together.

What belongs together comes as whole numbers: equal bytes, equal pixels and the user's groups, merged by `together`.
Knows labels and groups as numbers, nothing of pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from regraft.errors import DataError

FOLDS = 5
REPEATS = 3
ENOUGH_FOR_ONE_REPEAT = 5000
"""From this many examples on one repeat is made: a second moves the mean by less than a tenth of its interval."""
TRIES = 20


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
        raise DataError(
            f"Every class needs at least 2 different pictures (or groups) to be judged by; class {name} has "
            f"{pictures} in one group: add pictures, or leave the class out."
            if pictures > 1
            else f"Every class needs at least 2 different pictures to be judged by; class {name} has 1: add pictures, "
            "or leave the class out."
        )
    folds = min(FOLDS, fewest)
    repeats = 1 if len(labels) >= ENOUGH_FOR_ONE_REPEAT else REPEATS
    return np.stack([_one(labels, groups, folds, seed + r) for r in range(repeats)])


def _one(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """One assignment; groups that span classes can put a whole class into one fold, and then others are tried."""
    for attempt in range(TRIES):
        assignment = _stratified(labels, groups, folds, seed + 1000 * attempt)
        if all(len(np.unique(assignment[labels == c])) > 1 for c in np.unique(labels)):
            return assignment
    # Each group its own fold: no class is in one fold alone, for each has two groups.
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _stratified(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    alone = len(np.unique(groups)) == len(groups)
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    out = np.zeros(len(labels), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for f, (_, held) in enumerate(splitter.split(labels, labels, None if alone else groups)):
            out[held] = f
    return out
