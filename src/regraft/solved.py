"""Solved probes, kept in the store beside the features they were solved on: the same curve again costs no solve.

A row of the store is one trial: its strength, its sharpness, what it sees of each cut, and its out-of-fold scores.
Knows trials and how to write them as numbers. Not covered: curves of so many scores that reading them would not pay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from regraft.errors import StoreError
from regraft.files import digest, digest_json
from regraft.heads import INPUT, View
from regraft.probe import Bench, Task, Trial, judge
from regraft.ridge import STRENGTHS
from regraft.store import FeatureKey, read_features, stored_ids, write_features

SOLVES = 1
"""Raised when a probe comes out otherwise from the same features, so that no older trials pass for these."""
KEPT_SCORES = 1_000_000
"""Scores of one trial (4 MB); trials of more are not kept."""
WHOLE, ROOT, HIDDEN = 2, 4, 8


def recall(bench: Bench, task: Task, depths: Mapping[str, int]) -> dict[str, Trial]:
    """Trials by name that were solved before on these very features, labels, groups and folds."""
    if task.folds.size * task.classes > KEPT_SCORES:
        return {}
    key, store = _key(bench, task), bench.table.store
    found = read_features(store, key, sorted(stored_ids(store, key)))
    return {name: _decoded(name, row, bench, task, depths) for name, row in zip(found.ids, found.rows, strict=True)}


def remember(bench: Bench, task: Task, trials: Sequence[Trial]) -> None:
    """Keep trials for `recall`; where the store takes nothing more they are solved again next time."""
    if trials and task.folds.size * task.classes <= KEPT_SCORES:
        rows = np.stack([_encoded(trial, bench) for trial in trials])
        with contextlib.suppress(StoreError):
            write_features(bench.table.store, _key(bench, task), [t.name for t in trials], rows)


def _key(bench: Bench, task: Task) -> FeatureKey:
    table = bench.table
    seen = [np.ascontiguousarray(a, np.int64).tobytes() for a in (task.labels, task.groups, task.folds)]
    facts = {
        "kind": "probes",
        "solves": SOLVES,
        "features": {name: table.keys[name].digest for name in table.shapes},
        "examples": digest_json([table.ids[i] for i in bench.chosen]),
        "task": digest(*seen, str(task.classes).encode()),
        "grey": bench.grey,
    }
    return FeatureKey(facts)


def _encoded(trial: Trial, bench: Bench) -> np.ndarray:
    """strength's place, sharpness, for each cut what is seen of it (0: nothing), scores: float32."""
    views = {view.cut: 1 + WHOLE * view.whole + ROOT * view.root + HIDDEN * bool(view.hidden) for view in trial.views}
    head = [STRENGTHS.index(trial.strength), trial.sharpness, *(views.get(cut, 0) for cut in bench.table.shapes)]
    return np.concatenate([np.array(head, np.float32), trial.scores.numpy().reshape(-1)])


def _decoded(name: str, row: np.ndarray, bench: Bench, task: Task, depths: Mapping[str, int]) -> Trial:
    shapes = bench.table.shapes
    codes = {cut: int(code) for cut, code in zip(shapes, row[2:], strict=False) if code}
    views = tuple(_view(bench, cut, code) for cut, code in codes.items())
    scores = torch.from_numpy(row[2 + len(shapes) :].reshape(*task.folds.shape, task.classes).copy())
    depth = max(depths[cut] for cut in codes)
    return judge(name, depth, views, STRENGTHS[int(row[0])], float(row[1]), scores, task)


def _view(bench: Bench, cut: str, code: int) -> View:
    parts, channels = bench.table.shapes[cut]
    hidden = bench.views(cut)[-1].hidden if code & HIDDEN else 0
    return View(cut, parts, channels, bool(code & WHOLE), cut == INPUT and bench.grey, bool(code & ROOT), hidden)
