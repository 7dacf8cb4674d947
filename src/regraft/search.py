"""Which cut to reuse: a rule over paired out-of-fold results, and how far its own answer can be trusted.

The rule. Take the best mean score among the probes on the network. Those whose paired difference from it covers 0 are
its equals; of these, the least out-of-fold log-loss wins (it tells apart what hits cannot).

The score stated for the winner is not its own, which is flattered by having won: for every fold the rule is applied to
the other folds alone, and the probe it picks there is scored on the fold (nested cross-validation). Its interval is
widened for what a bootstrap of overlapping heads does not see. The score itself must be
better than the raw input's beyond the noise; otherwise transfer does not help and the input is kept. (Among 20 cuts
that know nothing the best beat such an input "beyond the noise" in 26 to 35 % of draws, the nested score in 5 to 22 %.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from regraft.heads import INPUT
from regraft.probe import Bench, Task, Trial, next_start, probe_cut, probe_several
from regraft.scores import Interval, bootstrap_interval, paired_difference, widened

SEVERAL = 4
STEP = 2
WORKERS = 2


@dataclass(frozen=True)
class Choice:
    """What the rule picked and why.

    score: what the whole procedure scores on pictures it has not seen, from nested folds.
    gain: paired difference of that score, on the network, over the raw input's; helps: its interval lies above 0.
    best: the trial on the network with the best mean, which the chosen one equals within the noise.
    """

    trial: Trial
    best: Trial
    score: Interval
    gain: Interval
    helps: bool
    reason: str


def run_trials(
    bench: Bench, task: Task, cuts: Sequence[tuple[str, int]], progress: Callable[[Trial], None] = lambda trial: None
) -> tuple[Trial, ...]:
    """A trial for the raw input, one for every cut (name, depth), and heads on several cuts, plain and as roots."""
    trials: list[Trial] = []
    with _side_by_side() as pool:

        def add(jobs: Iterable[Callable[[], Trial]]) -> None:
            for future in [pool.submit(job) for job in jobs]:
                trials.append(future.result())
                progress(trials[-1])

        places = [(INPUT, 0), *cuts]
        add([partial(probe_cut, bench, task, name, depth) for name, depth in places])
        singles = sorted((t for t in trials if t.name != INPUT), key=lambda t: t.log_loss)
        depth_of = dict(cuts)
        joint = [
            (names, [t.name for t in singles if t.name in names], max(depth_of[name] for name in names))
            for names in _several(singles)
        ]
        add(
            partial(probe_several, bench, task, *where, root=root, start=next_start(singles[0]))
            for where in joint
            for root in (False, True)
        )
    return tuple(trials)


@contextmanager
def _side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Two workers that share the cores: many middling solves gain more from that than from threads inside each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // WORKERS))
    try:
        with ThreadPoolExecutor(WORKERS if threads > 1 else 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def choose(trials: Sequence[Trial], task: Task) -> Choice:
    """Apply the rule to all folds, and nested to the others of each fold for the score and the gain that are stated."""
    raw = next(t for t in trials if t.name == INPUT)
    network = [t for t in trials if t is not raw]
    everything = np.ones(task.folds.shape, dtype=bool)
    picked, best = _rule(network, task.groups, everything)
    nested = np.zeros(task.folds.shape)
    for r, assignment in enumerate(task.folds):
        for f in np.unique(assignment):
            others = np.zeros_like(everything)
            others[r] = assignment != f
            winner, _ = _rule(network, task.groups, others)
            nested[r, assignment == f] = winner.fold_hits[r, assignment == f]
    hits = nested.mean(0)
    gain = paired_difference(hits, raw.hits, task.groups)
    helps = gain.low > 0
    if helps:
        reason = f"transfer helps: {_points(gain)} over the raw input"
        if picked is not best:
            reason += f"; {picked.name} is as good as {best.name} within the noise and has the least log-loss"
    else:
        reason = f"transfer does not help here: {_points(gain)} over the raw input, within the noise or below it"
    folds = int(task.folds.max()) + 1
    score = widened(bootstrap_interval(hits if helps else raw.hits, task.groups), 1 / folds)
    return Choice(picked if helps else raw, best, score, gain, helps, reason)


def curve_interval(trial: Trial, task: Task) -> Interval:
    """The mean out-of-fold score of one trial with its 95 % interval."""
    return bootstrap_interval(trial.hits, task.groups)


def _rule(trials: Sequence[Trial], groups: np.ndarray, where: np.ndarray) -> tuple[Trial, Trial]:
    """The trial picked and the one of the best mean, seen only at `where`, bool (repeats, n)."""
    seen = where.any(0)
    weight = where[:, seen] / where[:, seen].sum(0)
    hits = [(t.fold_hits[:, seen] * weight).sum(0) for t in trials]
    losses = [float((t.losses[:, seen] * weight).sum(0).mean()) for t in trials]
    best = max(range(len(trials)), key=lambda i: (hits[i].mean(), -losses[i]))
    differences = [paired_difference(hits[best], h, groups[seen]) for h in hits]
    equals = [i for i, difference in enumerate(differences) if difference.low <= 0]
    return trials[min(equals, key=lambda i: losses[i])], trials[best]


def _several(best_first: Sequence[Trial]) -> list[list[str]]:
    """Cuts for the heads on several: the best few by log-loss, and every second one down from the deepest."""
    by_depth = sorted(best_first, key=lambda t: t.depth)
    best = sorted(best_first[:SEVERAL], key=lambda t: t.depth)
    groups = {tuple(t.name for t in group) for group in (best, by_depth[::-1][::STEP][::-1])}
    return [list(group) for group in sorted(groups, key=len) if len(group) > 1]


def _points(gain: Interval) -> str:
    return f"{100 * gain.score:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
