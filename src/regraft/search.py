"""Which cut to reuse: a rule over paired out-of-fold results, and how far its own answer can be trusted.

The rule. Take the best mean score among the probes on the network. Those whose paired difference from it covers 0 are
its equals; of these, the least out-of-fold log-loss wins (it tells apart what hits cannot). Against the raw input the
winner must be better beyond the noise; otherwise transfer does not help and the input is kept.

The score stated for the winner is not its own, which is flattered by having won: for every fold the rule is applied to
the other folds alone, and the probe it picks there is scored on the fold (nested cross-validation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.heads import INPUT
from regraft.probe import Bench, Task, Trial, next_start, probe_cut, probe_several
from regraft.scores import Interval, bootstrap_interval, paired_difference

SEVERAL = 4
STEP = 2


@dataclass(frozen=True)
class Choice:
    """What the rule picked and why.

    score: what the whole procedure scores on pictures it has not seen, from nested folds.
    gain: paired difference of the best probe on the network over the raw input; helps: its interval lies above 0.
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

    def add(trial: Trial) -> Trial:
        trials.append(trial)
        progress(trial)
        return trial

    add(probe_cut(bench, task, INPUT, 0))
    last: Trial | None = None
    for name, depth in cuts:
        last = add(probe_cut(bench, task, name, depth, *([next_start(last)] if last else [])))
    singles = sorted((t for t in trials if t.name != INPUT), key=lambda t: t.log_loss)
    depth_of = dict(cuts)
    for names in _several(singles):
        best_first = [t.name for t in singles if t.name in names]
        depth, start = max(depth_of[name] for name in names), next_start(singles[0])
        for root in (False, True):
            add(probe_several(bench, task, names, best_first, depth, root=root, start=start))
    return tuple(trials)


def choose(trials: Sequence[Trial], task: Task) -> Choice:
    """Apply the rule to all folds, and nested to the others of each fold for the score that is stated."""
    everything = np.ones(task.folds.shape, dtype=bool)
    picked, best, gain = _rule(trials, task.groups, everything)
    nested = np.zeros(task.folds.shape)
    for r, assignment in enumerate(task.folds):
        for f in np.unique(assignment):
            others = np.zeros_like(everything)
            others[r] = assignment != f
            winner, _, _ = _rule(trials, task.groups, others)
            nested[r, assignment == f] = winner.fold_hits[r, assignment == f]
    score = bootstrap_interval(nested.mean(0), task.groups)
    helps = picked.name != INPUT
    if helps:
        reason = f"transfer helps: {best.name} is {_points(gain)} better than the raw input"
        if picked is not best:
            reason += f"; {picked.name} is as good within the noise and has the least log-loss"
    else:
        reason = (
            f"transfer does not help here: {best.name} is {_points(gain)} better than the raw input, within the noise"
        )
    return Choice(picked, best, score, gain, helps, reason)


def curve_interval(trial: Trial, task: Task) -> Interval:
    """The mean out-of-fold score of one trial with its 95 % interval."""
    return bootstrap_interval(trial.hits, task.groups)


def _rule(trials: Sequence[Trial], groups: np.ndarray, where: np.ndarray) -> tuple[Trial, Trial, Interval]:
    """The trial picked, the best mean, and its gain over the input, seen only at `where`, bool (repeats, n)."""
    seen = where.any(0)
    weight = where[:, seen] / where[:, seen].sum(0)
    hits = [(t.fold_hits[:, seen] * weight).sum(0) for t in trials]
    losses = [float((t.losses[:, seen] * weight).sum(0).mean()) for t in trials]
    at_input = next(i for i, t in enumerate(trials) if t.name == INPUT)
    network = [i for i in range(len(trials)) if i != at_input]
    best = max(network, key=lambda i: (hits[i].mean(), -losses[i]))
    equals = [i for i in network if paired_difference(hits[best], hits[i], groups[seen]).low <= 0 or i == best]
    picked = min(equals, key=lambda i: losses[i])
    gain = paired_difference(hits[best], hits[at_input], groups[seen])
    return trials[picked if gain.low > 0 else at_input], trials[best], gain


def _several(best_first: Sequence[Trial]) -> list[list[str]]:
    """Cuts for the heads on several: the best few by log-loss, and every second one down from the deepest."""
    by_depth = sorted(best_first, key=lambda t: t.depth)
    best = sorted(best_first[:SEVERAL], key=lambda t: t.depth)
    groups = {tuple(t.name for t in group) for group in (best, by_depth[::-1][::STEP][::-1])}
    return [list(group) for group in sorted(groups, key=len) if len(group) > 1]


def _points(gain: Interval) -> str:
    return f"{100 * gain.score:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
