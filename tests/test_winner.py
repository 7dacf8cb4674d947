"""What came of a candidate beside the probe, and which of several is the answer."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import grounds
from regraft.attempts import Attempt, judged
from regraft.candidates import Candidate
from regraft.finetune import Ground
from regraft.probe import judge
from regraft.scores import Interval, paired_difference
from regraft.winner import decide
from tables import classes, task_of

STATED = Interval(0.5, 0.4, 0.6)
N = 900
TABLE = task_of(classes(N), seed=1)
FOLDS = TABLE.folds[0]


def bare():
    """A ground of labels and folds alone, and a probe that is right for 6 of 10 pictures."""
    task = replace(TABLE, folds=TABLE.folds[:1])
    scores = torch.zeros(1, N, 3)
    said = np.where(np.arange(N) % 5 < 3, task.labels, (task.labels + 1) % 3)
    scores[0, torch.arange(N), torch.from_numpy(said)] = 1.0
    return Ground(None, grounds.NUMERICS, None, task, {}), judge("probe", 1, (), 1.0, 2.0, scores, task)


GROUND, PROBE = bare()
TASK = GROUND.task


def attempt(name, right, *, status="finished", folds=(0, 1, 2, 3, 4), seed=0, confident=2.0):
    """An attempt whose answers are right for a share of the pictures of these folds."""
    rng = np.random.default_rng(seed)
    seen = np.isin(FOLDS, folds)
    hits = np.where(seen, rng.permutation(N) < right * N, 0).astype(float)
    losses = np.where(seen, np.where(hits > 0, np.exp(-confident), confident), 0)
    gain = paired_difference(hits[seen], PROBE.fold_hits[0][seen].astype(float), TASK.groups[seen])
    sharper = paired_difference(PROBE.losses[0][seen].astype(float), losses[seen], TASK.groups[seen])
    told = Candidate(name, "something", "a", "b")
    return Attempt(
        told, status, "", tuple(folds), seen, hits, losses, np.zeros((N, 3)), 1, 1.0, gain=gain, sharper=sharper
    )


def decided(*attempts):
    return decide(TASK, PROBE, STATED, attempts)


def test_with_nothing_tried_the_probe_is_the_answer_with_its_stated_score():
    assert decided() == (None, STATED, "")


def test_where_none_wins_the_probe_is_the_answer_with_its_stated_score():
    winner, score, reason = decided(attempt("a", 0.5), attempt("b", 0.55, seed=1))
    assert (winner, score) == (None, STATED)
    assert reason == "none of 2 candidates was better than the probe beyond the noise"


def test_a_winner_is_better_beyond_the_noise_and_its_reason_says_by_how_much():
    winner, score, reason = decided(attempt("a", 0.95))
    assert winner.candidate.name == "a"
    assert winner.gain.low > 0
    assert reason.startswith("a: something; +35.0 points (+")
    assert score.low < score.score <= 0.95
    assert score.score == pytest.approx(0.95)


def test_a_little_better_is_not_enough():
    close = replace(attempt("a", 0.62), losses=PROBE.losses[0].astype(float))
    assert close.gain.score > 0 > close.gain.low
    assert decided(close)[0] is None


def test_a_gain_in_log_loss_alone_wins_only_where_no_hit_is_lost():
    hits = PROBE.fold_hits[0].astype(float)
    losses = PROBE.losses[0].astype(float) - 0.1 - 0.01 * (np.arange(N) % 3)
    better = replace(attempt("a", 0.6), hits=hits, losses=losses)
    better = replace(better, gain=Interval(0, 0, 0))
    assert decided(better)[0] is better
    fewer = hits.copy()
    fewer[np.flatnonzero(hits)[0]] = 0
    assert decided(replace(better, hits=fewer))[0] is None


def test_the_simpler_one_stays_unless_the_next_is_better_than_it():
    first, second = attempt("simple", 0.9), attempt("complex", 0.905, seed=3)
    assert decided(first, second)[0] is first
    assert decided(second, first)[0] is second
    assert decided(attempt("simple", 0.75), attempt("complex", 0.98, seed=2))[0].candidate.name == "complex"


@pytest.mark.parametrize("status", ["failed", "stopped", "skipped"])
def test_what_did_not_come_to_its_end_never_wins(status):
    assert decided(attempt("a", 0.99, status=status))[0] is None
    good = attempt("b", 0.9, seed=3)
    assert decided(attempt("a", 0.99, status=status), good)[0] is good


def test_an_attempt_on_some_folds_is_compared_there_alone():
    part = attempt("part", 0.95, status="unfinished", folds=(0, 1))
    winner, score, _ = decided(part)
    assert winner is part
    assert score.score == pytest.approx(part.hits[part.seen].mean(), abs=0.05)
    width = score.high - score.low
    whole = decided(attempt("whole", 0.95))[1]
    assert width > whole.high - whole.low
    unlucky = replace(part, hits=np.zeros(N), losses=np.where(part.seen, 3.0, 0))
    assert decided(unlucky)[0] is None


def test_an_attempt_on_few_pictures_of_the_first_folds_never_wins():
    assert decided(attempt("part", 0.99, status="unfinished", folds=(0,)))[0] is None


def test_the_stated_score_is_nested_each_fold_is_answered_by_what_wins_on_the_others():
    rivals = [attempt(f"{i}", 0.72, seed=i, confident=1.2) for i in range(12)]
    winner, score, _ = decided(*rivals)
    assert winner is not None
    hits = np.zeros(N)
    for fold in range(5):
        inside = fold == FOLDS
        blind = [
            replace(
                a,
                hits=np.where(inside, 0.5, a.hits),
                losses=np.where(inside, 0, a.losses),
                seen=~inside,
                folds=tuple(f for f in range(5) if f != fold),
            )
            for a in rivals
        ]
        chosen = decide(TASK, PROBE, STATED, blind)[0]
        known = next((a for a in rivals if chosen and a.candidate == chosen.candidate), None)
        hits[inside] = known.hits[inside] if known else PROBE.fold_hits[0, inside]
    assert score.score == pytest.approx(hits.mean())


def outcomes(right, epochs=2, folds=range(5), seed=0):
    rng = np.random.default_rng(seed)
    labels = TASK.labels
    said = np.where(rng.random(N) < right, labels, (labels + 1) % 3)
    rows = (2.0 * np.eye(3)[said] + rng.normal(0, 0.2, (N, 3))).astype(np.float32)
    return {f: np.stack([rows[f == FOLDS]] * epochs) for f in folds}


def judged_on(found, status="finished"):
    return judged(GROUND, PROBE, Candidate("a", "", "a", "b"), found, (status, ""), 1.0, 0.0)


def test_an_attempt_is_judged_on_the_folds_it_has_seen():
    whole, part = judged_on(outcomes(0.9)), judged_on(outcomes(0.9, folds=(1, 3)))
    assert whole.seen.all()
    assert np.array_equal(part.seen, np.isin(FOLDS, (1, 3)))
    assert not part.hits[~part.seen].any()
    assert not part.losses[~part.seen].any()
    assert not part.logits[~part.seen].any()
    assert whole.hits.mean() > 0.75
    told = part.to_json()
    assert told["folds"] == [1, 3]
    assert told["score"] == part.hits[part.seen].mean()
    json.dumps(told, allow_nan=False)


def test_epoch_and_share_are_those_of_the_least_log_loss():
    found = {f: np.concatenate([rows[:1] * 0, rows[:1], -rows[:1]]) for f, rows in outcomes(0.97).items()}
    assert judged_on(found).epochs == 2


def test_nothing_seen_is_no_score():
    nothing = judged_on({}, "skipped")
    assert not nothing.seen.any()
    assert nothing.to_json()["score"] is None


def test_an_epoch_that_went_out_of_bounds_is_not_chosen():
    found = outcomes(0.95, epochs=3)
    for rows in found.values():
        rows[2] = np.nan
    answer = judged_on(found)
    assert answer.epochs in (1, 2)
    assert np.isfinite(answer.losses).all()
    json.dumps(answer.to_json(), allow_nan=False)
