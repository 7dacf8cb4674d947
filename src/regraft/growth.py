"""The learning curve: what the whole choice scores with fewer labels, and what more of them would bring.

Each size is a stratified draw of whole groups; the choice among all cuts is made anew on it, and its nested score is
the one stated. The error is taken to fall as a power of the number of labels (Hestness et al. 2017).
Knows probes and the rule that chooses; nothing of fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from regraft.probe import Bench, Task
from regraft.scores import Interval
from regraft.search import choose, run_trials
from regraft.splits import fold_assignments

PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0)
FEWEST = 4
"""Pictures of a class that a draw keeps at least."""


@dataclass(frozen=True)
class Size:
    """What the choice scores on so many labels, and what it is."""

    labels: int
    score: Interval
    recommended: str
    transfer_helps: bool


@dataclass(frozen=True)
class Growth:
    """Score against number of labels. twice: expected score with twice the labels, None where too little is known."""

    sizes: tuple[Size, ...]
    twice: float | None

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON values."""
        return {
            "sizes": [{**asdict(size), **asdict(size.score)} for size in self.sizes],
            "with_twice_the_labels": self.twice,
        }


def grow_labels(
    bench: Bench, task: Task, cuts: Sequence[tuple[str, int]], seed: int, tell: Callable[[int, int], None]
) -> Growth:
    """The score at an eighth, a quarter, a half and all of the labels, as far as every class keeps enough of them."""
    found: list[Size] = []
    for done, part in enumerate(PARTS):
        tell(done, len(PARTS))
        rows = draw(task, part, seed)
        if found and len(rows) <= found[-1].labels:
            continue
        labels, groups = task.labels[rows], task.groups[rows]
        folds = task.folds if part == 1 else fold_assignments(labels, groups, seed=seed)
        fewer = Task(labels, groups, folds, task.classes)
        seen = replace(bench, chosen=bench.chosen[rows], products={})
        choice = choose(run_trials(seen, fewer, cuts), fewer)
        found.append(Size(len(rows), choice.score, choice.trial.name, choice.helps))
    return Growth(tuple(found), _extrapolated(found))


def draw(task: Task, part: float, seed: int) -> np.ndarray:
    """Indices of a stratified part of the examples, whole groups, sorted; a larger part holds the smaller ones."""
    if part == 1:
        return np.arange(len(task.labels))
    order = np.random.default_rng(seed).permutation(np.unique(task.groups))
    rank = np.empty(task.groups.max() + 1, np.int64)
    rank[order] = np.arange(len(order))
    kept = np.zeros(len(task.labels), bool)
    for label in np.unique(task.labels):
        members = np.flatnonzero(task.labels == label)
        members = members[np.argsort(rank[task.groups[members]], kind="stable")]
        wanted = min(len(members), max(FEWEST, round(part * len(members))))
        kept[members[:wanted]] = True
        firsts = np.unique(task.groups[members], return_index=True)[1]
        kept[members[np.sort(firsts)[:2]]] = True  # two groups, so that each can be judged by the other
    return np.flatnonzero(np.isin(task.groups, task.groups[kept]))


def _extrapolated(sizes: Sequence[Size]) -> float | None:
    """The score with twice the labels, on a line through the logarithms of errors and sizes; never below the last."""
    errors = [max(1 - size.score.score, 1e-4) for size in sizes]
    if len(sizes) < 3:
        return None
    slope, at = np.polyfit(np.log([size.labels for size in sizes]), np.log(errors), 1)
    expected = 1 - float(np.exp(at + slope * np.log(2 * sizes[-1].labels)))
    return max(expected, sizes[-1].score.score)
