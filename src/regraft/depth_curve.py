"""How the score depends on the number of reused layers: one network, one data set, the same folds at every cut."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from regraft.backbone import Backbone
from regraft.data import Dataset, LeftOut, printable, subset
from regraft.errors import DataError
from regraft.features import FeatureTable, extract
from regraft.frozen import agreement
from regraft.gate import Rival
from regraft.growth import Growth
from regraft.ladder import Say
from regraft.learned import consistent, marks_of, refuse_unsound, task_of
from regraft.numerics import Numerics, pick_numerics
from regraft.probe import Bench, Task, Trial, all_grey
from regraft.search import Choice, choose, curve_interval, run_trials
from regraft.store import FeatureStore

AGREEMENT_NEEDED = 0.98
"""Below this cosine with float32 at some cut, bfloat16 is given up for that network."""


@dataclass(frozen=True)
class Curve:
    """How the score depends on the number of reused layers, on the same folds at every cut."""

    backbone: Backbone
    trials: tuple[Trial, ...]
    choice: Choice
    task: Task
    table: FeatureTable
    bench: Bench
    numerics: Numerics
    agreement: float
    problems: tuple[LeftOut, ...]
    seconds: dict[str, float]
    growth: Growth | None = None

    def to_json(self) -> dict[str, Any]:
        """Points in order of depth, the recommended cut and why."""
        shown = {cut.name: cut for cut in self.backbone.cuts}
        singles = [t for t in self.trials if len(t.views) == 1]
        return {
            "backbone": self.backbone.source.to_json(),
            "cuts": [_point(t, self.task, shown) for t in singles],
            "several": [_point(t, self.task, shown) for t in self.trials if len(t.views) > 1],
            "recommended": self.choice.trial.name,
            "transfer_helps": self.choice.helps,
            "reason": self.choice.reason,
            "score": self.choice.score.score,
            "interval": [self.choice.score.low, self.choice.score.high],
            "gain": asdict(self.choice.gain),
            "log_loss_gain": asdict(self.choice.sharper),
            "forward_passes": self.table.forward_passes,
            "seconds": self.seconds,
            "restored": self.backbone.coverage and self.backbone.coverage.to_json(),
            "ends": self.backbone.ends,
            "labels": self.growth.to_json() if self.growth else None,
        }


def curve_of(
    dataset: Dataset,
    backbone: Backbone,
    store: FeatureStore,
    *,
    tested: Dataset | None,
    device: str,
    seed: int,
    strict: bool,
    allow_empty_class: bool,
    say: Say,
    started: float | None = None,
) -> Curve:
    """Features of all cuts, probes on them, and the choice.

    tested: pictures that `strict` holds against those to learn from; started: `time.perf_counter()` when the work
    began, for the seconds that are told, where it was before this call. Raises DataError where there is nothing to
    learn from, or with `strict` where a picture would be left out; others as `extract` does.
    """
    started = time.perf_counter() if started is None else started
    numerics, measured = faithful_numerics(backbone, device)
    seconds = {"prepare": time.perf_counter() - started}
    learning = subset(dataset, "train", "validation")
    names = [cut.name for cut in backbone.shown]
    at = time.perf_counter()
    if not learning.examples:
        raise DataError(f"There must be pictures to learn from; {printable(dataset.source)} has them only in test/.")
    tell = partial(say, "computing features")
    table = extract(learning, backbone, names, store, numerics, tell, allow_empty_class=allow_empty_class)
    seconds["features"] = time.perf_counter() - at
    chosen, conflicts = consistent(table, dataset.labels, allow_empty_class)
    problems = table.left_out + conflicts
    if strict:
        refuse_unsound(problems, marks_of(table, chosen), tested)
    at = time.perf_counter()
    bench = Bench(table, chosen, all_grey(table, chosen))
    task = task_of(table, chosen, len(dataset.labels), seed, names=dataset.labels)
    steps = len(names) + 5
    done: list[Trial] = []

    def solved(trial: Trial) -> None:
        done.append(trial)
        say("probing the cuts", len(done), steps)

    trials = run_trials(bench, task, [(cut.name, cut.depth) for cut in backbone.shown], solved)
    choice = choose(trials, task)
    seconds["probes"] = time.perf_counter() - at
    return Curve(backbone, trials, choice, task, table, bench, numerics, measured, problems, seconds)


def faithful_numerics(backbone: Backbone, device: str) -> tuple[Numerics, float]:
    """The machine's numerics for this network and their agreement (cosine) with float32; float32 where it is poor."""
    numerics = pick_numerics(device)
    if numerics.precision == "float32":
        return numerics, 1.0
    names = [cut.name for cut in backbone.shown]
    measured = agreement(backbone.trace, names, backbone.preprocess, numerics)
    if measured < AGREEMENT_NEEDED:
        return pick_numerics(device, "float32"), 1.0
    return numerics, measured


def warn_of_known(found: Curve, stacklevel: int) -> None:
    """Warn where the backbone learned the classes of these pictures when it was trained."""
    known = sum(found.table.ids[i] in found.backbone.classes_of for i in found.bench.chosen)
    if known:
        warnings.warn(
            f"{found.backbone.source.spec} learned the classes of {known} of these {len(found.bench.chosen)} pictures "
            "when it was trained: scores on them flatter it.",
            stacklevel=stacklevel + 1,
        )


def as_rival(found: Curve) -> Rival:
    """A backbone as the gate sees it, by the nested procedure on its curve."""
    known = sum(found.table.ids[i] in found.backbone.classes_of for i in found.bench.chosen)
    return Rival(found.backbone.source.spec, found.choice.hits, found.backbone.trained is not None, known)


def _point(trial: Trial, task: Task, cuts: dict[str, Any]) -> dict[str, Any]:
    interval = curve_interval(trial, task)
    return {
        "name": trial.name,
        "depth": trial.depth,
        "dim": sum(view.dim for view in trial.views),
        "score": interval.score,
        "low": interval.low,
        "high": interval.high,
        "log_loss": trial.log_loss,
        "strength": trial.strength,
        "whole_grid": [view.whole and view.parts > 1 for view in trial.views],
        "shape": list(cuts[trial.name].shape) if trial.name in cuts else None,
    }
