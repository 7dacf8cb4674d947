"""Folds that can be trusted: stratified, seeded, whole groups, every class always learned from."""

from __future__ import annotations

import numpy as np
import pytest

from regraft.errors import DataError, RunError
from regraft.splits import ENOUGH_FOR_ONE_REPEAT, FOLDS, REPEATS, check_seed, fold_assignments, together


def test_equal_keys_join_examples_transitively_and_empty_keys_join_nothing():
    found = together(["a", "b", "a", "c", "d"], ["", "x", "y", "y", ""], ["", "", "", "", ""])
    assert found[0] == found[2] == found[3]
    assert len({found[0], found[1], found[4]}) == 3


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_have_the_mixture_of_the_whole(grouped):
    labels = np.repeat([0, 1, 2], [40, 20, 60])
    groups = np.arange(120) // (4 if grouped else 1)
    for assignment in fold_assignments(labels, groups, seed=0):
        counts = np.array([np.bincount(labels[assignment == f], minlength=3) for f in range(FOLDS)])
        assert np.array_equal(counts, np.tile([8, 4, 12], (FOLDS, 1)))


def test_the_same_seed_gives_the_same_folds_and_repeats_differ():
    labels, groups = np.arange(60) % 3, np.arange(60)
    first, again, other = (fold_assignments(labels, groups, seed=s) for s in (0, 0, 7))
    assert first.shape == (REPEATS, 60)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_groups_of_all_sizes_and_mixtures_are_spread_evenly():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), rng.integers(1, 9, 200))
    labels = np.where(rng.random(len(groups)) < 0.7, groups % 4, rng.integers(0, 4, len(groups)))
    for assignment in fold_assignments(labels, groups, seed=0):
        shares = np.array([np.bincount(labels[assignment == f], minlength=4) for f in range(FOLDS)])
        assert np.abs(shares / shares.sum(0) - 1 / FOLDS).max() < 0.03


def test_many_examples_are_judged_in_one_repeat():
    labels = np.arange(ENOUGH_FOR_ONE_REPEAT) % 2
    assert fold_assignments(labels, np.arange(ENOUGH_FOR_ONE_REPEAT), seed=0).shape == (1, ENOUGH_FOR_ONE_REPEAT)


@pytest.mark.parametrize("smallest", [2, 3, 4, 5, 9])
def test_small_classes_get_as_many_folds_as_they_have_pictures(smallest):
    labels = np.repeat([0, 1], [20, smallest])
    folds = fold_assignments(labels, np.arange(len(labels)), seed=0)
    assert folds.max() + 1 == min(smallest, FOLDS)


def test_a_class_with_one_picture_or_one_group_is_refused_by_name():
    with pytest.raises(DataError, match="class 'yak' has 1: add pictures"):
        fold_assignments(np.array([0, 0, 0, 1]), np.arange(4), seed=0, names=("cat", "yak"))
    with pytest.raises(DataError, match="class number 1 has 3 in one group"):
        fold_assignments(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 2, 2, 2]), seed=0)


def test_whatever_the_groups_they_stay_whole_and_every_class_is_always_learned_from():
    rng = np.random.default_rng(1)
    judged = 0
    for seed in range(150):
        n = rng.integers(4, 14)
        labels = rng.integers(0, rng.integers(2, 5), n)
        groups = rng.integers(0, rng.integers(2, 8), n)
        if min(len(np.unique(groups[labels == c])) for c in np.unique(labels)) < 2:
            continue
        for assignment in fold_assignments(labels, groups, seed=seed):
            judged += 1
            assert all(len(np.unique(assignment[groups == g])) == 1 for g in groups)
            for fold in np.unique(assignment):
                assert set(labels[assignment != fold]) == set(labels)
    assert judged > 100


@pytest.mark.parametrize("seed", [7, np.int64(7), np.uint8(7)])
def test_a_seed_is_any_whole_number(seed):
    assert check_seed(seed) == 7
    assert type(check_seed(seed)) is int


@pytest.mark.parametrize("seed", [1.5, "1", None, -1, 2**32])
def test_what_is_no_seed_gets_one_sentence(seed):
    with pytest.raises(RunError, match=f"a whole number from 0 to 4294967295; found {seed}"):
        check_seed(seed)
