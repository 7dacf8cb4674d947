"""Which attempt is the answer: the simplest that nothing beats beyond the noise, and what the whole procedure scores.

Knows attempts and the probe's answers; nothing of training, maps or time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regraft.attempts import Attempt
from regraft.probe import Task, Trial
from regraft.scores import Interval, bootstrap_interval, paired_difference, widened

FIRST_FOLDS = 2
SURE = 300
"""A candidate that was judged on the first folds alone can win where they hold so many pictures."""


def decide(
    task: Task, probe: Trial, stated: Interval, attempts: Sequence[Attempt]
) -> tuple[Attempt | None, Interval, str]:
    """The winner, the score of this whole procedure on new pictures, and why.

    The score is nested: the pictures of every fold are answered by the winner on the other folds.
    """
    folds, groups = task.folds[0], task.groups
    judged = eligible(attempts, 0)
    winner = answer_of(probe, judged, groups, np.ones(len(folds), bool))
    if winner is None:
        tried = sum(bool(a.seen.any()) for a in attempts)
        return None, stated, f"none of {tried} candidates was better than the probe beyond the noise" if tried else ""
    hits = np.zeros(len(folds))
    for fold in np.unique(folds[winner.seen]):
        inside = folds == fold
        answer = answer_of(probe, judged, groups, ~inside)
        usable = answer is not None and bool(answer.seen[inside].all())
        hits[inside] = answer.hits[inside] if usable and answer else probe.fold_hits[0, inside]
    count = len(np.unique(folds))
    score = widened(bootstrap_interval(hits[winner.seen], groups[winner.seen]), 1 / count)
    gain = winner.gain
    assert gain is not None
    reason = (
        f"{winner.candidate.name}: {winner.candidate.does}; {100 * gain.score:+.1f} points "
        f"({100 * gain.low:+.1f} to {100 * gain.high:+.1f}) over the probe"
    )
    return winner, score, reason


def eligible(attempts: Sequence[Attempt], folds: int) -> list[Attempt]:
    """The attempts that may win if they see no more than they have; all of them see so many folds in the end."""
    judged = [a for a in attempts if a.status in ("finished", "unfinished")]
    return [a for a in judged if _sure(a) or (a.status == "finished" and len(a.folds) >= folds)]


def _sure(attempt: Attempt) -> bool:
    """Whether an unfinished attempt has seen enough; of one fold, epochs and share were chosen on what they judge."""
    return len(attempt.folds) >= FIRST_FOLDS and int(attempt.seen.sum()) >= SURE


def answer_of(probe: Trial, attempts: Sequence[Attempt], groups: np.ndarray, where: np.ndarray) -> Attempt | None:
    """The answer after all candidates had their turn, seen only at `where`; None for the probe."""
    best: Attempt | None = None
    hits, losses, known = probe.fold_hits[0].astype(np.float64), probe.losses[0].astype(np.float64), where
    for attempt in attempts:
        both = attempt.seen & known & where
        if len(np.unique(groups[both])) < 2:
            continue
        gain = paired_difference(attempt.hits[both], hits[both], groups[both])
        sharper = paired_difference(losses[both], attempt.losses[both], groups[both])
        if gain.low > 0 or (sharper.low > 0 and gain.score >= 0):
            best, hits, losses, known = attempt, attempt.hits, attempt.losses, attempt.seen
    return best
