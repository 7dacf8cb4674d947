"""Splits and folds: stratified by class, seeded, never parting examples that belong together.

What belongs together comes as whole numbers: equal bytes, equal pixels and the user's groups, merged by `together`.
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


def fold_assignments(labels: np.ndarray, groups: np.ndarray, *, seed: int) -> np.ndarray:
    """Which fold each example is held out in: int64 (repeats, n), 5 folds x 3 repeats.

    Fewer folds when the smallest class has fewer groups than 5; with one picture a class, two folds by order.
    Raises DataError when a class has a single group, for then no fold can both train on it and test it.
    """
    fewest, smallest = min((len(np.unique(groups[labels == c])), int(c)) for c in np.unique(labels))
    if fewest < 2:
        raise DataError(
            f"Every class needs at least 2 different pictures (or groups) to be judged; class number {smallest} has "
            f"{fewest}."
        )
    folds = min(FOLDS, fewest)
    repeats = 1 if len(labels) >= ENOUGH_FOR_ONE_REPEAT else REPEATS
    return np.stack([_one(labels, groups, folds, seed + r) for r in range(repeats)])


def hold_out(labels: np.ndarray, groups: np.ndarray, *, share: float = 0.25, seed: int = 0) -> np.ndarray:
    """A stratified test split: bool (n,), True for about `share` of the examples of each class, groups kept whole."""
    folds = max(2, round(1 / share))
    return _one(labels, groups, folds, seed) == 0


def _one(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    alone = len(np.unique(groups)) == len(groups)
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    out = np.zeros(len(labels), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for f, (_, held) in enumerate(splitter.split(labels, labels, None if alone else groups)):
            out[held] = f
    return out
