"""How pictures are shown to the network: as it was tested, whole, or larger too; asked of the data.

Most networks state the centre crop of the benchmark they were tested on, which cuts away what lies at the border, and a
size at which they see things smaller than in training (Touvron et al. 2019, "Fixing the train-test resolution
discrepancy"). Each framing has a curve of its own on the same folds, of some `MOST` pictures; one that shows more
takes the place of a simpler one only beyond the noise.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from regraft.attempts import Attempt, Status
from regraft.backbone import Backbone, reframed
from regraft.budget import Budget
from regraft.candidates import LITTLE, Candidate
from regraft.costs import picture_seconds
from regraft.data import Dataset, subset
from regraft.depth_curve import Curve
from regraft.errors import DataError, RegraftError, TraceError, first_line
from regraft.files import write_atomic
from regraft.heads import INPUT
from regraft.numerics import Numerics
from regraft.preprocess import PreprocessSpec, Resize
from regraft.probe import Trial
from regraft.scores import paired_difference
from regraft.splits import FOLDS
from regraft.winner import decide

MOST = 1000
"""About so many pictures show which framing is better, where there are more."""
LARGER = 9 / 7
"""224 becomes 288: EfficientNet-Lite0 gains hardly more from 384 (`bench/framing.py`)."""
STEP = 32
SMALLEST = 96
"""Networks for smaller pictures are not shown larger ones: their sizes are the data's own."""
SHARE = 0.4
"""Of the time left, what preparing and answering all pictures in a framing may take; probes come on top."""


class Look(Protocol):
    """The curve of a network on a data set, with the options of the run: see `curve_of`."""

    def __call__(self, dataset: Dataset, backbone: Backbone, **options: Any) -> Curve: ...


@dataclass(frozen=True)
class Framed:
    """What came of the framings.

    backbone: the network with the preparation that was chosen; curve: its curve, where all pictures were asked, with
    the score of the choice among framings. attempts: what was tried beside the stated preparation; winner: its name, or
    None. asked: pictures; forward_passes: those pushed through the network for other curves than this one.
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
    resize: Resize = "longest" if spec.resize == "shortest" else spec.resize
    whole = spec if fits and resize == spec.resize else replace(spec, resize=resize, resize_to=spec.size)
    if whole != spec:
        border = ", with a border where its shape is another" if resize == "longest" else ""
        out.append((_candidate("whole pictures", f"all of a picture at the stated size{border}"), whole))
    size = (_larger(spec.size[0]), _larger(spec.size[1]))
    if min(spec.size) >= SMALLEST and size != spec.size:
        does = f"all of a picture at {size[0]} x {size[1]} pixels instead of {spec.size[0]} x {spec.size[1]}"
        out.append((_candidate("larger pictures", does), replace(whole, size=size, resize_to=size)))
    return out


def frame(
    dataset: Dataset,
    backbone: Backbone,
    look: Look,
    budget: Budget,
    numerics: Numerics,
    *,
    seed: int,
    tested: int,
    notes: Path,
) -> Framed:
    """Try the framings and take the simplest that nothing beats beyond the noise.

    numerics: of the machine, to time a picture; tested: pictures that the saved model will answer; notes: a file of the
    run that says how each framing ended, for a run that is resumed judges the same, whatever time is left. Raises what
    `look` raises, where all pictures are asked.
    """
    named, learned = framings(backbone.preprocess), subset(dataset, "train", "validation")
    n = len(learned.examples)
    late = budget.left() <= 0 and not budget.spent
    if not named or budget.trials == 0 or late or n < LITTLE:
        return Framed(backbone)
    before = _ended_before(notes, budget)
    ended: tuple[Status, str] = ("finished", "")
    if n > MOST and not before:
        ended = _in_time(backbone, learned, numerics, n + tested, budget)
    if ended[0] != "finished":
        return Framed(backbone, attempts=tuple(Attempt(candidate, *ended) for candidate, _ in named))
    asked = dataset if n <= MOST else _drawn(learned, seed)
    lenient = {"strict": False, "tested": None, "allow_empty_class": True}
    try:
        first = look(asked, backbone, **({} if n <= MOST else lenient))
    except RegraftError as e:
        if n <= MOST:
            raise
        return Framed(backbone, attempts=tuple(Attempt(c, "failed", first_line(e)) for c, _ in named))
    curves: dict[str, Curve] = {}
    attempts = []
    for candidate, spec in named:
        started = time.monotonic()
        try:
            other = reframed(backbone, spec)
            ended = before.get(candidate.name) or _in_time(other, learned, numerics, n + tested, budget)
            if ended[0] == "finished":
                curves[candidate.name] = _comparable(look(asked, other, **lenient), first)
        except TraceError:
            ended = ("failed", f"the network takes no pictures of {spec.size[0]} x {spec.size[1]} pixels")
        except (RegraftError, RuntimeError, MemoryError) as e:
            ended = ("failed", first_line(e))
        attempts.append(_attempt(candidate, ended, first, curves.get(candidate.name), time.monotonic() - started))
    write_atomic(notes, [json.dumps({a.candidate.name: [a.status, a.reason] for a in attempts}).encode()])
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
    """About `MOST` pictures, of each class its share: whole groups, and of as many groups as there are folds."""
    rng, share = np.random.default_rng(seed), MOST / len(learned.examples)
    by_class: dict[int, dict[str | int, list[int]]] = {}
    for i, example in enumerate(learned.examples):
        by_class.setdefault(example.label, {}).setdefault(example.group or i, []).append(i)
    rows: list[int] = []
    for groups in map(list, map(dict.values, by_class.values())):
        wanted = len(rows) + share * sum(map(len, groups))
        for number, at in enumerate(rng.permutation(len(groups))):
            if number >= FOLDS and len(rows) >= wanted:
                break
            rows += groups[at]
    return replace(learned, examples=tuple(learned.examples[i] for i in sorted(rows)))


def _in_time(
    backbone: Backbone, learned: Dataset, numerics: Numerics, pictures: int, budget: Budget
) -> tuple[Status, str]:
    """Whether so many pictures are expected to pass the network in the share of the time left."""
    left = budget.left()
    if left == float("inf"):
        return "finished", ""
    if left <= 0:
        return "skipped", "no time was left"
    needed = pictures * picture_seconds(backbone, learned.examples, numerics)
    if needed <= SHARE * left:
        return "finished", ""
    return "skipped", f"all pictures so would take about {needed:.0f} s of the {left:.0f} s left"


def _comparable(found: Curve, first: Curve) -> Curve:
    """The curve, if it has the pictures of the first one. Raises DataError."""
    ours, theirs = ([c.table.ids[i] for i in c.bench.chosen] for c in (found, first))
    if ours != theirs:
        raise DataError(
            f"Every framing must have the same pictures; some of {len(theirs)} could not be read again: try it anew."
        )
    return found


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


def _ended_before(notes: Path, budget: Budget) -> dict[str, tuple[Status, str]]:
    """How the framings of a resumed run had ended; empty where it is not resumed, or had not come so far."""
    if not budget.spent:
        return {}
    try:
        return {name: (status, reason) for name, (status, reason) in json.loads(notes.read_text()).items()}
    except (OSError, ValueError):
        return {}
