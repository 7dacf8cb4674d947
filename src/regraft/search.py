"""Which cut to reuse: a rule over paired out-of-fold results, and how far its own answer can be trusted.

The rule. Take the best mean score among the probes on the network. Those whose paired difference from it covers 0 are
its equals; of these, the least out-of-fold log-loss wins (it tells apart what hits cannot).

The score stated for the winner is not its own, which is flattered by having won: for every fold the rule is applied to
the other folds alone, and the probe it picks there is scored on the fold (nested cross-validation). Its interval is
widened for what a bootstrap of overlapping heads does not see.

Transfer is said to help where the score, or the log-loss at no lower score, is better than the raw input's beyond the
noise. (Among 20 cuts that know nothing the best beat such an input "beyond the noise" in 26 to 35 % of draws, the
nested score in 5 to 22 %. With 100 pictures hits alone see a gain of 8 points in half of the draws, log-loss in nine of
ten.) Where the network is ahead in one of them, and not behind, within the noise, the raw input is one more probe under
the same rule: with few pictures no gain is sure, and keeping the input there cost 7 points in 7 of 50 draws of 100.
Elsewhere transfer does not help, and the input is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from regraft.ahead import side_by_side
from regraft.heads import INPUT
from regraft.probe import Bench, Task, Trial, joint_name, next_start, probe_cut, probe_several
from regraft.scores import Interval, bootstrap_interval, paired_difference, widened
from regraft.solved import recall, remember

SEVERAL = 4
STEP = 2
WORKERS = 2


@dataclass(frozen=True)
class Choice:
    """What the rule picked and why.

    score: what the whole procedure scores on pictures it has not seen, from nested folds.
    gain: paired difference of that score, on the network, over the raw input's; sharper: by how many nats its log-loss
    is lower; helps: one of the two intervals lies above 0, and the score is not lower.
    best: the trial on the network with the best mean, which the chosen one equals within the noise.
    hits, losses: of the nested procedure on the network, float64 (n,); own_hits, own_losses: of the whole procedure,
    which may answer by the raw input.
    """

    trial: Trial
    best: Trial
    score: Interval
    gain: Interval
    sharper: Interval
    helps: bool
    reason: str
    hits: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    own_hits: np.ndarray = field(repr=False)
    own_losses: np.ndarray = field(repr=False)


def run_trials(
    bench: Bench, task: Task, cuts: Sequence[tuple[str, int]], progress: Callable[[Trial], None] = lambda trial: None
) -> tuple[Trial, ...]:
    """A trial for the raw input, one for every cut (name, depth), and heads on several cuts, plain and as roots.

    What was solved before is taken from the store.
    """
    depths = {INPUT: 0, **dict(cuts)}
    known = recall(bench, task, depths)
    trials: list[Trial] = []
    with side_by_side(WORKERS) as pool:

        def add(jobs: Mapping[str, Callable[[], Trial]]) -> None:
            tasks = [partial(known.__getitem__, name) if name in known else job for name, job in jobs.items()]
            for future in [pool.submit(task) for task in tasks]:
                trials.append(future.result())
                progress(trials[-1])

        add({name: partial(probe_cut, bench, task, name, depth) for name, depth in depths.items()})
        singles = sorted((t for t in trials if t.name != INPUT), key=lambda t: t.log_loss)
        start = next_start(singles[0])
        add(
            {
                joint_name(names, root): partial(
                    probe_several,
                    bench,
                    task,
                    names,
                    [t.name for t in singles if t.name in names],
                    max(depths[name] for name in names),
                    root=root,
                    start=start,
                )
                for names in _several(singles)
                for root in (False, True)
            }
        )
    remember(bench, task, [t for t in trials if t.name not in known])
    return tuple(trials)


def choose(trials: Sequence[Trial], task: Task) -> Choice:
    """Apply the rule to all folds, and nested to the others of each fold for the score and the gain that are stated."""
    raw = next(t for t in trials if t.name == INPUT)
    network = [t for t in trials if t is not raw]
    everything = np.ones(task.folds.shape, dtype=bool)
    picked, best = _rule(network, task.groups, everything)
    hits, losses = _nested(network, task)
    gain = paired_difference(hits, raw.hits, task.groups)
    sharper = paired_difference(raw.losses.mean(0), losses, task.groups)
    helps = gain.low > 0 or (sharper.low > 0 and gain.score >= 0)
    own = hits, losses
    if not helps:
        ahead = gain.high >= 0 and max(gain.score, sharper.score) > 0
        pool = trials if ahead else [raw]
        picked, own = _rule(pool, task.groups, everything)[0], _nested(pool, task)
    if helps:
        reason = f"transfer helps: {_points(gain)} over the raw input"
        if gain.low <= 0:
            reason += f", and a log-loss lower by {sharper.score:.2f} ({sharper.low:.2f} to {sharper.high:.2f})"
        if picked is not best:
            reason += f"; {picked.name} is as good as {best.name} within the noise and has the least log-loss"
    elif picked is raw:
        reason = f"transfer does not help here: {_points(gain)} over the raw input, within the noise or below it"
    else:
        least = f"{picked.name} has the least log-loss"
        reason = f"transfer may help: {_points(gain)} over the raw input, within the noise; {least}"
    folds = int(task.folds.max()) + 1
    score = widened(bootstrap_interval(own[0], task.groups), 1 / folds)
    return Choice(picked, best, score, gain, sharper, helps, reason, hits, losses, *own)


def _nested(trials: Sequence[Trial], task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Hits and log-losses float64 (n,) of the rule over these trials: every fold answered by its pick on the others."""
    hits, losses = np.zeros(task.folds.shape), np.zeros(task.folds.shape)
    for r, assignment in enumerate(task.folds):
        for f in np.unique(assignment):
            others = np.zeros(task.folds.shape, dtype=bool)
            others[r] = assignment != f
            winner, _ = _rule(trials, task.groups, others)
            inside = assignment == f
            hits[r, inside], losses[r, inside] = winner.fold_hits[r, inside], winner.losses[r, inside]
    return hits.mean(0), losses.mean(0)


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
