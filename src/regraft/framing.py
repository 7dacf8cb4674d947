"""How pictures are shown to the network: as it was tested, whole, or larger too; asked of the data.

Most networks state the centre crop of the benchmark they were tested on, which cuts away what lies at the border, and a
size at which they see things smaller than in training (Touvron et al. 2019, "Fixing the train-test resolution
discrepancy"). Each framing has a curve of its own on the same folds, of at most `MOST` pictures; one that shows more
takes the place of a simpler one only beyond the noise.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from regraft.attempts import Attempt, Status
from regraft.backbone import Backbone, reframed
from regraft.budget import Budget
from regraft.candidates import LITTLE, Candidate
from regraft.data import Dataset, subset
from regraft.depth_curve import Curve
from regraft.errors import RegraftError
from regraft.files import write_atomic
from regraft.heads import INPUT
from regraft.ladder import first_line
from regraft.preprocess import PreprocessSpec
from regraft.probe import Trial
from regraft.scores import paired_difference
from regraft.winner import decide

MOST = 1000
"""So many pictures show which framing is better, where there are more."""
LARGER = 9 / 7
"""224 becomes 288: EfficientNet-Lite0 gains hardly more from 384 (`bench/framing.py`)."""
STEP = 32
SMALLEST = 96
"""Networks for smaller pictures are not shown larger ones: their sizes are the data's own."""
SHARE = 0.5
"""Of the time left, what preparing and answering all pictures in a framing may take."""


class Look(Protocol):
    """The curve of a network on a data set, with the options of the run: see `curve_of`."""

    def __call__(self, dataset: Dataset, backbone: Backbone, **options: Any) -> Curve: ...


@dataclass(frozen=True)
class Framed:
    """What came of the framings.

    backbone: the network with the preparation that was chosen; curve: its curve, where all pictures were asked, with
    the score of the choice among framings. attempts: what was tried beside the stated preparation; winner: its name, or
    None. asked: pictures; forward_passes: those pushed through the network for what was not chosen.
    """

    backbone: Backbone
    curve: Curve | None = None
    attempts: tuple[Attempt, ...] = ()
    winner: str | None = None
    asked: int = 0
    forward_passes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The framings as JSON values; scores and gains are those of the nested procedure of each."""
        said = ("name", "does", "status", "reason", "score", "log_loss", "gain", "log_loss_gain", "seconds")
        return {
            "chosen": self.winner or "as stated",
            "size": list(self.backbone.preprocess.size),
            "pictures": self.asked,
            "tried": [{name: value for name, value in a.to_json().items() if name in said} for a in self.attempts],
        }


def framings(spec: PreprocessSpec) -> list[tuple[Candidate, PreprocessSpec]]:
    """What is worth trying instead of the stated preparation, in the order of what it costs."""
    out = []
    fits = all(to <= side for to, side in zip(spec.resize_to, spec.size, strict=True))
    shown = spec.resize == "stretch" or (spec.resize == "longest" and fits)
    whole = spec if shown else replace(spec, resize="longest", resize_to=spec.size)
    if not shown:
        does = "all of a picture at the stated size, with a border where its shape is another"
        out.append((_candidate("whole pictures", does), whole))
    size = (_larger(spec.size[0]), _larger(spec.size[1]))
    if min(spec.size) >= SMALLEST and size != spec.size:
        does = f"all of a picture at {size[0]} x {size[1]} pixels instead of {spec.size[0]} x {spec.size[1]}"
        out.append((_candidate("larger pictures", does), replace(whole, size=size, resize_to=size)))
    return out


def frame(
    dataset: Dataset, backbone: Backbone, look: Look, budget: Budget, *, seed: int, tested: int, notes: Path
) -> Framed:
    """Try the framings and take the simplest that nothing beats beyond the noise.

    tested: pictures that the saved model will answer; notes: a file of the run that says what was judged, for a run
    that is resumed judges the same, whatever time is left. Raises what `look` raises, where all pictures are asked.
    """
    named, learned = framings(backbone.preprocess), subset(dataset, "train", "validation")
    n = len(learned.examples)
    late = budget.left() <= 0 and not budget.spent
    if not named or budget.trials == 0 or late or n < LITTLE:
        return Framed(backbone)
    asked = dataset if n <= MOST else _drawn(learned, seed)
    options = {} if n <= MOST else {"strict": False, "tested": None, "allow_empty_class": True}
    try:
        first = look(asked, backbone, **options)
    except RegraftError:
        if n <= MOST:
            raise
        return Framed(backbone)  # the curve of all pictures says what is wrong with them
    before = _judged_before(notes, budget)
    curves: dict[str, Curve] = {}
    attempts = []
    for candidate, spec in named:
        started = time.monotonic()
        area = math.prod(spec.size) / math.prod(backbone.preprocess.size)
        ended: tuple[Status, str] = ("finished", "")
        if before is None:
            ended = _in_time(first, area * (n + tested), budget, "skipped")
        elif candidate.name not in before:
            ended = ("skipped", "not tried before the interruption")
        if ended[0] == "finished":
            try:
                found = look(asked, reframed(backbone, spec), **options)
                curves[candidate.name] = found
                if before is None and n > MOST:
                    ended = _in_time(found, n + tested, budget, "stopped")
            except (RegraftError, RuntimeError, MemoryError) as e:
                ended = ("failed", first_line(e))
        attempts.append(_attempt(candidate, ended, first, curves.get(candidate.name), time.monotonic() - started))
    write_atomic(notes, [json.dumps([a.candidate.name for a in attempts if a.status == "finished"]).encode()])
    winner, score, _ = decide(first.task, _nested(first), first.choice.score, attempts)
    name = winner.candidate.name if winner else None
    chosen = curves[name] if name else first
    passes = sum(curve.table.forward_passes for curve in (first, *curves.values()))
    count = len(first.task.labels)
    if n > MOST:
        return Framed(chosen.backbone, None, tuple(attempts), name, count, passes)
    judged = replace(chosen, choice=replace(chosen.choice, score=score))
    return Framed(chosen.backbone, judged, tuple(attempts), name, count, passes - chosen.table.forward_passes)


def _candidate(name: str, does: str) -> Candidate:
    return Candidate(name, does, INPUT, INPUT, epochs=0, views=1)


def _larger(side: int) -> int:
    return max(side, round(side * LARGER / STEP) * STEP)


def _drawn(learned: Dataset, seed: int) -> Dataset:
    """`MOST` pictures of all classes, as many of each as its share, at least two."""
    rng, n = np.random.default_rng(seed), len(learned.examples)
    labels = np.array([example.label for example in learned.examples])
    rows: list[int] = []
    for label in range(len(learned.labels)):
        own = np.flatnonzero(labels == label)
        rows += rng.permutation(own)[: max(2, round(MOST * len(own) / n))].tolist()
    return replace(learned, examples=tuple(learned.examples[i] for i in sorted(rows)))


def _in_time(seen: Curve, pictures: float, budget: Budget, otherwise: Status) -> tuple[Status, str]:
    """Whether so many pictures are expected to pass as those of a curve did, in the share of the time left."""
    left, passes = budget.left(), seen.table.forward_passes
    if left <= 0:
        return otherwise, "no time was left"
    needed = pictures * seen.seconds["features"] / passes if passes else 0.0
    if needed <= SHARE * left:
        return "finished", ""
    return otherwise, f"all pictures so would take about {needed:.0f} s of the {left:.0f} s left"


def _attempt(
    candidate: Candidate, ended: tuple[Status, str], first: Curve, found: Curve | None, seconds: float
) -> Attempt:
    """What came of a framing, by the nested procedure on its curve, against that of the stated preparation."""
    if found is None:
        return Attempt(candidate, *ended, seconds=seconds)
    ours, theirs, groups = found.choice, first.choice, first.task.groups
    return Attempt(
        candidate,
        *ended,
        folds=tuple(np.unique(first.task.folds[0]).tolist()),
        seen=np.ones(len(groups), bool),
        hits=ours.own_hits,
        losses=ours.own_losses,
        gain=paired_difference(ours.own_hits, theirs.own_hits, groups),
        sharper=paired_difference(theirs.own_losses, ours.own_losses, groups),
        seconds=seconds,
    )


def _nested(found: Curve) -> Trial:
    """The whole procedure on a curve as if it were one probe."""
    choice = found.choice
    return replace(choice.trial, fold_hits=choice.own_hits[None], losses=choice.own_losses[None])


def _judged_before(notes: Path, budget: Budget) -> list[str] | None:
    """The framings that a resumed run had judged; None where it is not resumed, or had not come so far."""
    if not budget.spent:
        return None
    try:
        judged: list[str] = json.loads(notes.read_text())
    except (OSError, ValueError):
        return None
    return judged
