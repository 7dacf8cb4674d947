"""Linear probes on every cut: the same folds for all, strength and view chosen inside the folds.

The answer to the old question how many layers to reuse is read off their out-of-fold scores (see `search`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from regraft.features import FeatureTable
from regraft.heads import INPUT, Head, View
from regraft.ridge import (
    DUAL_ROWS,
    START,
    STRENGTHS,
    Path,
    Rows,
    Standard,
    cross_validate,
    cross_validate_gram,
    dual_is_cheaper,
    fit,
    gram,
    standardise,
)
from regraft.scores import fit_sharpness

KEPT_ROWS = 2000
"""Up to this many pictures the inner products of each view (16 MB then) are kept."""
HELD_VALUES = 16_000_000
"""Up to this many values (64 MB) a view is held in memory while it is solved."""
HIDDEN = 2048
"""Units of the random hidden layer that the raw input may be seen through; twice as many for more pictures."""
WIDEST = 5000
"""The most features a head on several cuts sees where there are too many pictures for the dual."""


@dataclass(frozen=True)
class Task:
    """What all probes share: labels int64 (n,), groups int64 (n,), folds int64 (repeats, n), class count."""

    labels: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    classes: int

    @property
    def targets(self) -> torch.Tensor:
        """One-hot labels, float32 (n, classes)."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels), self.classes).float()


@dataclass(frozen=True)
class Trial:
    """A head on one or several cuts and what came of it out of fold.

    depth: of the deepest cut; hits: 0..1 per example, mean over repeats; fold_hits: bool (repeats, n).
    losses: -log p(label) per repeat and example; sharpness: what scores are multiplied by before softmax.
    views, strength: those with the least squared error over all folds, for the final fit.
    """

    name: str
    depth: int
    views: tuple[View, ...]
    strength: float
    sharpness: float
    fold_hits: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    scores: torch.Tensor = field(repr=False)

    @property
    def hits(self) -> np.ndarray:
        """Mean over repeats, float64 (n,)."""
        means: np.ndarray = self.fold_hits.mean(0)
        return means

    @property
    def log_loss(self) -> float:
        """Mean out-of-fold log-loss, nats."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class Bench:
    """Features of the examples to learn from: a table and the rows chosen from it, all grey or not.

    products: inner products of views, kept for the heads on several cuts while there are few pictures.
    """

    table: FeatureTable
    chosen: np.ndarray
    grey: bool
    products: dict[View, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def views(self, cut: str) -> tuple[View, ...]:
        """The views that a head on this cut is tried with."""
        parts, channels = self.table.shapes[cut]
        if cut == INPUT:  # pixels, and a hidden layer that knows nothing: depth without learning is no transfer
            pixels = View(cut, parts, channels, True, self.grey)
            return (pixels, replace(pixels, hidden=HIDDEN if len(self.chosen) <= KEPT_ROWS else 2 * HIDDEN))
        if parts <= 2:  # a vector, or class token and mean: each says what the other does not
            return (View(cut, parts, channels, True),)
        return (View(cut, parts, channels, False), View(cut, parts, channels, True))

    def rows(self, views: Sequence[View]) -> Rows:
        """What a head sees, in blocks, the views side by side."""
        sources = [self.table.rows(view.cut, self.chosen) for view in views]

        def blocks() -> Iterator[np.ndarray]:
            for together in zip(*(source() for source in sources), strict=True):
                yield _joined([view.of(rows) for view, rows in zip(views, together, strict=True)])

        return blocks


def all_grey(table: FeatureTable, chosen: np.ndarray) -> bool:
    """Whether every chosen picture has three equal channels."""
    for block in table.rows(INPUT, chosen)():
        planes = block.reshape(len(block), 3, -1)
        if (planes[:, 0] != planes[:, 1]).any() or (planes[:, 0] != planes[:, 2]).any():
            return False
    return True


def probe_cut(bench: Bench, task: Task, cut: str, depth: int, start: int = START) -> Trial:
    """The probe on one cut: each view along the strengths; the pair is chosen anew for every fold without it."""
    views = [(view,) for view in bench.views(cut)]
    return _trial(cut, depth, task, [(seen, _path(bench, task, seen, start)) for seen in views])


def probe_several(
    bench: Bench, task: Task, cuts: Sequence[str], best_first: Sequence[str], depth: int, *, root: bool, start: int
) -> Trial:
    """One head on several cuts, each with the same say: the standardised features side by side.

    Every cut is seen as its whole grid while the dual is solved; else as means, and the best as their grids while
    there is room.
    """
    views = {cut: bench.views(cut)[0] for cut in cuts}
    for cut in best_first:
        whole = bench.views(cut)[-1]
        room = WIDEST - sum(view.dim for view in views.values()) + views[cut].dim
        if len(task.labels) <= DUAL_ROWS or whole.dim <= room:
            views[cut] = whole
    seen = tuple(replace(view, root=root) for view in views.values())
    return _trial(joint_name(cuts, root), depth, task, [(seen, _path(bench, task, seen, start))])


def joint_name(cuts: Sequence[str], root: bool) -> str:
    """What the head on several cuts is called."""
    return "+".join(cuts) + (" (roots)" if root else "")


def judge(
    name: str,
    depth: int,
    views: tuple[View, ...],
    strength: float,
    sharpness: float,
    scores: torch.Tensor,
    task: Task,
) -> Trial:
    """The trial of a head with these out-of-fold scores, float32 (repeats, n, classes)."""
    labels = torch.from_numpy(task.labels)
    log_p = torch.log_softmax(scores * sharpness, -1)
    losses = -log_p.gather(-1, labels.expand(len(scores), -1).unsqueeze(-1))[..., 0]
    hits = (scores.argmax(-1) == labels).numpy()
    return Trial(name, depth, views, strength, sharpness, hits, losses.numpy(), scores)


def narrowed(bench: Bench, task: Task, rows: np.ndarray) -> tuple[Bench, Task]:
    """The same with only these examples, int64 (m,)."""
    fewer = replace(bench, chosen=bench.chosen[rows], products={})
    return fewer, Task(task.labels[rows], task.groups[rows], task.folds[:, rows], task.classes)


def fit_head(bench: Bench, task: Task, trial: Trial) -> Head:
    """The head of a trial on all its examples, calibrated by the sharpness found out of fold."""
    rows = bench.rows(trial.views)
    weight, bias = fit(rows, _standard(bench, trial.views), task.targets, trial.strength)
    return Head(trial.views, weight * trial.sharpness, bias * trial.sharpness)


def next_start(trial: Trial) -> int:
    """Where to begin on the strengths for a neighbouring cut."""
    return STRENGTHS.index(trial.strength)


def _path(bench: Bench, task: Task, views: tuple[View, ...], start: int) -> Path:
    folds = torch.from_numpy(task.folds)
    if len(task.labels) <= KEPT_ROWS and dual_is_cheaper(len(task.labels), sum(view.dim for view in views), folds):
        mean = torch.stack([_products(bench, view) for view in views]).mean(0)
        return cross_validate_gram(mean, task.targets, folds, start)
    if len(views) == 1:
        rows = _held(bench, views[0])
        return cross_validate(rows, standardise(rows), task.targets, folds, start)
    return cross_validate(bench.rows(views), _standard(bench, views), task.targets, folds, start)


def _products(bench: Bench, view: View) -> torch.Tensor:
    if view not in bench.products:
        rows = _held(bench, view)
        bench.products[view] = gram(rows, standardise(rows))
    return bench.products[view]


def _held(bench: Bench, view: View) -> Rows:
    """What a head sees of one view, computed once where there is room, for it is read several times."""
    rows = bench.rows((view,))
    if len(bench.chosen) * view.dim > HELD_VALUES:
        return rows
    blocks = [np.asarray(block, dtype=np.float32) for block in rows()]
    return lambda: iter(blocks)


def _standard(bench: Bench, views: tuple[View, ...]) -> Standard:
    each = [standardise(bench.rows((view,))) for view in views]
    share = len(each) ** -0.5
    return Standard(torch.cat([s.centre for s in each]), torch.cat([s.scale * share for s in each]))


def _trial(name: str, depth: int, task: Task, tried: Sequence[tuple[tuple[View, ...], Path]]) -> Trial:
    settings = [(views, s, scores) for views, path in tried for s, scores in path.scores.items()]
    targets, labels = task.targets, torch.from_numpy(task.labels)
    errors = torch.stack([(scores - targets).square().sum(-1) for _, _, scores in settings])
    best = int(errors.sum((1, 2)).argmin())
    scores = _cross_fitted([scores for _, _, scores in settings], errors, torch.from_numpy(task.folds))
    sharpness = fit_sharpness(scores.flatten(0, 1), labels.repeat(len(scores)))
    return judge(name, depth, settings[best][0], settings[best][1], sharpness, scores, task)


def _cross_fitted(scores: list[torch.Tensor], errors: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """For every fold the scores of the setting with the least squared error on the other folds of that repeat."""
    out = torch.empty_like(scores[0])
    for r, assignment in enumerate(folds):
        total = errors[:, r].sum(1)
        for f in assignment.unique():
            inside = assignment == f
            chosen = int((total - errors[:, r, inside].sum(1)).argmin())
            out[r, inside] = scores[chosen][r, inside]
    return out


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([p.astype(np.float32) for p in parts], 1)
