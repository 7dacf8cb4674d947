"""What came of a candidate on the folds that it was trained on, and its keeping in the store.

Its answer is judged beside the probe's: the logits of both are added, with a share and at an epoch that are chosen for
each fold on the others. Knows logits and labels; nothing of networks, time or which candidate to take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from regraft.candidates import Candidate
from regraft.errors import StoreError
from regraft.files import digest, digest_json
from regraft.finetune import Ground
from regraft.probe import Trial
from regraft.scores import Interval, fit_sharpness, paired_difference
from regraft.store import FeatureKey, read_features, write_features

TUNES = 2
"""Raised when training comes out otherwise from the same maps, so that no older outcomes pass for these."""
SHARES = (0.5, 1.0)
"""Shares of the fine-tuned part in the answer that are tried; the probe has the rest."""
Status = Literal["finished", "unfinished", "stopped", "failed", "skipped"]
"""unfinished: judged on the first folds alone, for want of time; stopped: not worth more folds."""


@dataclass(frozen=True)
class Attempt:
    """What came of a candidate.

    folds: those it was judged on; seen: bool (n,), the pictures of these folds. hits, losses: float64 (n,), log-loss in
    nats; logits: float32 (n, classes), calibrated; all 0 where not seen. epochs, share: as for the final fit;
    own, whole: what the part's logits and the sum of both are multiplied by. gain, sharper: paired differences of hits
    and log-loss from the probe's. slower: factor on the learning rate that it took. alone: hits of the part without the
    probe beside it, after its last epoch. trained_on: stored maps or pictures in memory; precision: of a step.
    """

    candidate: Candidate
    status: Status
    reason: str
    folds: tuple[int, ...] = ()
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), repr=False)
    hits: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32), repr=False)
    epochs: int = 0
    share: float = 1.0
    own: float = 1.0
    whole: float = 1.0
    gain: Interval | None = None
    sharper: Interval | None = None
    slower: float = 1.0
    seconds: float = 0.0
    alone: float = 0.0
    trained_on: str = ""
    precision: str = ""

    def to_json(self) -> dict[str, Any]:
        """The attempt as JSON values, without the pictures' own figures."""
        score = float(self.hits[self.seen].mean()) if self.seen.any() else None
        return {
            **self.candidate.to_json(),
            "status": self.status,
            "reason": self.reason,
            "folds": list(self.folds),
            "score": score,
            "score_alone": self.alone if self.seen.any() else None,
            "log_loss": float(self.losses[self.seen].mean()) if self.seen.any() else None,
            "gain": [self.gain.score, self.gain.low, self.gain.high] if self.gain else None,
            "log_loss_gain": [self.sharper.score, self.sharper.low, self.sharper.high] if self.sharper else None,
            "epochs_kept": self.epochs,
            "share": self.share,
            "rate_factor": self.slower,
            "trained_on": self.trained_on,
            "precision": self.precision,
            "seconds": self.seconds,
        }


def judged(
    ground: Ground,
    probe: Trial,
    candidate: Candidate,
    outcomes: Mapping[int, np.ndarray],
    ended: tuple[Status, str],
    slower: float,
    seconds: float,
) -> Attempt:
    """What came of a candidate. outcomes: by fold, logits float32 (epochs, held out, classes)."""
    if not outcomes:
        return Attempt(candidate, *ended, slower=slower, seconds=seconds)
    folds = tuple(sorted(outcomes))
    assignment, labels = ground.task.folds[0], torch.from_numpy(ground.task.labels)
    seen = np.isin(assignment, folds)
    epochs = min(len(rows) for rows in outcomes.values())
    own = torch.zeros(epochs, len(labels), ground.task.classes)
    for fold, rows in outcomes.items():
        own[:, assignment == fold] = torch.from_numpy(rows[:epochs])
    base = probe.scores[0] * probe.sharpness
    at = torch.from_numpy(seen)
    settings, losses, sums, sharp = [], [], [], []
    # A probe alone had its turn on the curve.
    shares = SHARES[1:] if candidate.alone else SHARES if candidate.epochs else SHARES[:1]
    for epoch in range(epochs):
        sharpness = fit_sharpness(own[epoch][at], labels[at])
        for share in shares:
            both = share * sharpness * own[epoch] + (1 - share) * base
            settings.append((epoch + 1, share))
            sums.append(both)
            sharp.append(sharpness)
            losses.append(torch.nn.functional.cross_entropy(both, labels, reduction="none"))
    table = torch.stack(losses).nan_to_num(nan=torch.inf)
    logits = torch.zeros(len(labels), ground.task.classes)
    for fold in folds:
        inside = torch.from_numpy(assignment == fold)
        others = at & ~inside
        chosen = int(table[:, others if bool(others.any()) else inside].mean(1).argmin())
        logits[inside] = sums[chosen][inside]
    best = int(table[:, at].mean(1).argmin())
    whole = fit_sharpness(logits[at], labels[at])
    logits *= whole
    final = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().numpy()
    hits = (logits.argmax(1) == labels).double().numpy()
    groups = ground.task.groups[seen]
    gain = paired_difference(hits[seen], probe.fold_hits[0][seen].astype(np.float64), groups)
    sharper = paired_difference(probe.losses[0][seen].astype(np.float64), final[seen], groups)
    return Attempt(
        candidate,
        *ended,
        folds,
        seen,
        np.where(seen, hits, 0),
        np.where(seen, final, 0),
        logits.numpy(),
        *settings[best],
        sharp[best],
        whole,
        gain,
        sharper,
        slower,
        seconds,
        float((own[-1].argmax(1) == labels)[at].double().mean()),
    )


def recalled(ground: Ground, candidate: Candidate, folds: Sequence[int]) -> Mapping[int, tuple[np.ndarray, float]]:
    """Outcomes by fold, with the factor on the learning rate, of what was trained before."""
    out = {}
    for fold in folds:
        rows = np.flatnonzero(ground.task.folds[0] == fold)
        found = read_features(ground.bench.table.store, _key(ground, candidate, fold), [str(i) for i in rows])
        if not found.missing:
            logits = found.rows[:, 1:].reshape(len(rows), -1, ground.task.classes).transpose(1, 0, 2)
            out[fold] = (np.ascontiguousarray(logits, np.float32), round(float(found.rows[0, 0]), 6))
    return out


def remember(ground: Ground, candidate: Candidate, fold: int, logits: np.ndarray, slower: float) -> None:
    """Keep the outcome of a fold; where the store takes nothing more it is trained again next time."""
    rows = np.flatnonzero(ground.task.folds[0] == fold)
    flat = logits.transpose(1, 0, 2).reshape(len(rows), -1).astype(np.float32)
    with contextlib.suppress(StoreError):
        key = _key(ground, candidate, fold)
        ids = [str(i) for i in rows]
        write_features(ground.bench.table.store, key, ids, np.c_[np.full(len(rows), slower, np.float32), flat])


def _key(ground: Ground, candidate: Candidate, fold: int) -> FeatureKey:
    task, table = ground.task, ground.bench.table
    seen = [np.ascontiguousarray(a, np.int64).tobytes() for a in (task.labels, task.groups, task.folds[0])]
    facts = {
        "kind": "fold",
        "fold": fold,
        "tunes": TUNES,
        "candidate": digest_json(candidate.to_json()),
        "backbone": ground.backbone.source.weights,
        "preprocess": ground.backbone.preprocess.to_json(),
        "features": {name: table.keys[name].digest for name in table.shapes},
        "examples": digest_json([table.ids[i] for i in ground.bench.chosen]),
        "task": digest(*seen, str(task.classes).encode()),
        "how": [ground.seed, ground.balanced, ground.clipping.by, ground.clipping.limit, ground.bench.grey],
        **ground.numerics.to_json(),
    }
    return FeatureKey(facts)
