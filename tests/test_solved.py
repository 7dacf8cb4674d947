"""Solved heads come back from the store as they were, and never for other features, labels or folds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from regraft import probe, solved
from regraft.heads import INPUT
from regraft.probe import Bench, Task, Trial, fit_head
from regraft.search import run_trials
from regraft.solved import recall
from tables import bench_of, classes, pixels, task_of, telling

LABELS = classes(60)
CUTS = [("a", 1), ("b", 2)]
DEPTHS = {INPUT: 0, "a": 1, "b": 2}


def made(seed: int) -> tuple[Bench, Task]:
    rng = np.random.default_rng(seed)
    grid = telling(LABELS, 24, noise=1, seed=seed).reshape(60, 4, 6)
    values = {"a": grid, "b": telling(LABELS, 9, noise=1)[:, None], INPUT: pixels(rng.normal(0, 1, (60, 5)))}
    return bench_of(values, LABELS), task_of(LABELS)


def same(ours: Trial, theirs: Trial) -> bool:
    facts = [
        (t.name, t.depth, t.views, t.strength, t.sharpness, t.fold_hits.tobytes(), t.losses.tobytes())
        for t in (ours, theirs)
    ]
    return facts[0] == facts[1] and torch.equal(ours.scores, theirs.scores)


def test_trials_come_back_bit_by_bit_and_nothing_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, task = made(1)
    assert recall(bench, task, DEPTHS) == {}
    first = run_trials(bench, task, CUTS)
    monkeypatch.setattr(probe, "_path", lambda *a: pytest.fail("solved again"))
    again = run_trials(Bench(bench.table, bench.chosen, bench.grey), task, CUTS)
    assert [t.name for t in again] == [t.name for t in first]
    assert all(map(same, first, again))
    heads = [fit_head(bench, task, trials[-1]) for trials in (first, again)]
    assert torch.equal(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize("what", ["labels", "folds", "groups", "examples", "features", "grey"])
def test_another_task_has_trials_of_its_own(what: str) -> None:
    bench, task = made(2)
    run_trials(bench, task, CUTS)
    assert len(recall(bench, task, DEPTHS)) == 5
    if what == "examples":
        bench = Bench(bench.table, bench.chosen[::-1].copy(), bench.grey)
    elif what == "features":
        bench = made(3)[0]
    elif what == "grey":
        bench = replace(bench, grey=True)
    else:
        changed = getattr(task, what).copy()
        changed[..., 0] = changed[..., 1]
        task = replace(task, **{what: changed})
    assert recall(bench, task, DEPTHS) == {}


def test_many_scores_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solved, "KEPT_SCORES", 10)
    bench, task = made(4)
    run_trials(bench, task, CUTS)
    monkeypatch.undo()
    assert recall(bench, task, DEPTHS) == {}
