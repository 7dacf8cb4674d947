"""The ladder above the probe: what is tried within a budget, what may win, and whole jobs that end with a winner."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import grounds
import regraft
import tiny
from regraft import final_fit, ladder, maps
from regraft.artifact import assemble, load_model
from regraft.attempts import Attempt, judged, recalled, remember
from regraft.augment import Augment
from regraft.backbone import load_backbone
from regraft.budget import budget_from
from regraft.candidates import Candidate, shortened
from regraft.errors import ArtifactError
from regraft.finetune import Ground
from regraft.ladder import candidates_for, climb, network_probe
from regraft.probe import fit_head, judge
from regraft.scores import Interval, paired_difference
from regraft.store import open_store
from regraft.winner import decide
from tables import classes, task_of

DRAWN = Augment(crop=True, mix=True)
STATED = Interval(0.5, 0.4, 0.6)
NAMES = ("scratch", "top layers", "layers dropped")
TOP = 1
EACH = 15


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny.Poor(), example=tiny.EXAMPLE)


@pytest.fixture
def ground(tmp_path, backbone):
    return grounds.ground_of(tiny.write_pictures(tmp_path / "data", draw=tiny.tiles, each=EACH, seed=1), backbone)


def best_of(ground):
    return network_probe(ground)


def folds_of(ground):
    return range(int(ground.task.folds.max()) + 1)


def told(ground, right, seed, epochs=2):
    """Logits by fold of an answer that is right for this share of the pictures."""
    task, rng = ground.task, np.random.default_rng(seed)
    hit = rng.random(len(task.labels)) < right
    said = np.where(hit, task.labels, (task.labels + 1) % task.classes)
    rows = 3.0 * np.eye(task.classes, dtype=np.float32)[said] + rng.normal(0, 0.1, (len(said), task.classes))
    return {f: np.stack([rows[task.folds[0] == f].astype(np.float32)] * epochs) for f in folds_of(ground)}


def made_known(ground, shares, slower=lambda fold: 1.0, folds=None):
    """Keep outcomes for every candidate, so that a climb has nothing to train; `shares` are right answers by name."""
    found = candidates_for(ground, DRAWN)
    for i, candidate in enumerate(found):
        if candidate.name in shares:
            for fold, rows in told(ground, shares[candidate.name], i).items():
                if folds is None or fold in folds:
                    remember(ground, candidate, fold, rows, slower(fold))
    return found


def climbed(ground, budget="3trials", **options):
    return climb(ground, best_of(ground), STATED, budget_from(budget), DRAWN, **options)


def facts(attempt):
    arrays = [a.tobytes() for a in (attempt.seen, attempt.hits, attempt.losses, attempt.logits)]
    return {**attempt.to_json(), "seconds": None}, arrays


# ---- the budget --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "tried"), {0: [], 1: [1], 2: [0, 1], 3: [0, 1, 2], 20: [0, 1, 2]}.items())
def test_a_budget_in_trials_tries_so_many_and_names_the_others(ground, budget, tried):
    made_known(ground, dict.fromkeys(NAMES, 0.9))
    found = climbed(ground, f"{budget}trials")
    assert tuple(a.candidate.name for a in found.attempts) == NAMES
    assert [i for i, a in enumerate(found.attempts) if a.seen.any()] == tried
    for i, attempt in enumerate(found.attempts):
        assert (attempt.status == "skipped") == (i not in tried)
        if i not in tried:
            assert attempt.reason == f"the budget of {budget} trials was spent"
    assert (found.winner is None) == (budget == 0)
    assert found.forward_passes == 0


def test_without_time_nothing_is_tried_and_the_probe_is_the_answer(ground):
    found = climbed(ground, "0s")
    assert {a.status for a in found.attempts} == {"skipped"}
    assert all("s left" in a.reason for a in found.attempts)
    assert (found.winner, found.score) == (None, STATED)


def test_what_time_is_to_be_left_for_is_left(ground):
    assert {a.status for a in climbed(ground, "1h", reserve=3600).attempts} == {"skipped"}


def test_a_candidate_that_stays_behind_the_probe_on_the_first_folds_is_stopped_there(ground):
    made_known(ground, {"scratch": 0.0, "top layers": 0.95, "layers dropped": 0.9})
    found = {a.candidate.name: a for a in climbed(ground).attempts}
    assert (found["scratch"].status, found["scratch"].folds) == ("stopped", (0, 1))
    assert "behind the probe" in found["scratch"].reason
    assert (found["top layers"].status, found["top layers"].folds) == ("finished", (0, 1, 2, 3, 4))
    assert (found["layers dropped"].status, found["layers dropped"].folds) == ("stopped", (0, 1))
    assert "lesser half" in found["layers dropped"].reason


def test_candidates_are_told_in_the_order_in_which_they_are_tried(ground):
    made_known(ground, dict.fromkeys(NAMES, 0.9))
    said = []
    climbed(ground, say=lambda *what: said.append(what))
    assert [what for what, _, _ in said][:3] == ["trying top layers", "trying scratch", "trying layers dropped"]


# ---- training ----------------------------------------------------------------------------------------------------


def test_a_climb_trains_what_it_tries_and_a_second_one_trains_nothing(ground):
    first = climbed(ground, "1trials")
    tried = first.attempts[TOP]
    assert tried.status in ("finished", "stopped")
    assert tried.seconds > 0
    assert first.forward_passes == 3 * EACH * tried.candidate.views
    again = climbed(ground, "1trials")
    assert again.forward_passes == 0
    assert [a.seconds for a in again.attempts] == [0, 0, 0]
    assert [facts(a) for a in again.attempts] == [facts(a) for a in first.attempts]
    assert (again.score, again.reason) == (first.score, first.reason)


def test_a_climb_leaves_the_random_state_and_the_threads_as_they_were(ground):
    torch.set_num_threads(2)
    try:
        torch.manual_seed(4)
        state = torch.get_rng_state()
        climbed(ground, "1trials")
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_two_threads_come_to_what_one_comes_to(ground):
    one = climbed(ground, "1trials")
    other = replace(ground, bench=replace(ground.bench, table=replace(ground.bench.table, store=elsewhere())))
    torch.set_num_threads(2)
    try:
        two = climbed(other, "1trials")
    finally:
        torch.set_num_threads(1)
    for mine, theirs in zip(one.attempts, two.attempts, strict=True):
        assert (mine.folds, mine.epochs, mine.share) == (theirs.folds, theirs.epochs, theirs.share)
        np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-2)


def elsewhere():
    return open_store(Path(os.environ["REGRAFT_CACHE"] + "-other"))


def way_of(ground):
    return ladder._Way(ground, best_of(ground), budget_from("9trials"), 0.0, lambda *what: None)


def test_a_candidate_that_diverges_is_tried_slower_and_then_marked_with_its_batch(ground):
    rung = ladder._Rung(Candidate("wild", "", "stem.0", "mean", lr=1e12, views=1))
    ladder._advance(way_of(ground), rung, [0, 1], (), 0)
    status, reason = rung.ended
    assert status == "failed"
    assert "epoch" in reason
    assert "batch" in reason
    assert reason.endswith("It was tried again at a tenth of the rate.")


def test_outcomes_keep_the_slower_rate_of_any_fold_whenever_they_are_read(ground):
    made_known(ground, dict.fromkeys(NAMES, 0.95), slower=lambda fold: 0.1 if fold == 1 else 1.0)
    found = climbed(ground)
    through = [a for a in found.attempts if len(a.folds) == 5]
    assert through
    assert all(a.slower == 0.1 for a in through)


def test_a_climb_whose_candidates_all_fail_ends_with_the_probe(ground, monkeypatch):
    wild = Candidate("wild", "", "stem.0", "mean", lr=1e12, views=1)
    monkeypatch.setattr(ladder, "candidates_for", lambda ground, augment: (wild,))
    found = climbed(ground)
    assert found.winner is None
    assert found.attempts[0].status == "failed"
    assert "batch" in found.attempts[0].reason


def test_a_candidate_whose_pictures_do_not_fit_into_memory_does_not_end_the_climb(ground, monkeypatch):
    made_known(ground, {"scratch": 0.95, "layers dropped": 0.9})
    monkeypatch.setattr(maps, "LARGEST", 1000)
    found = {a.candidate.name: a for a in climbed(ground).attempts}
    assert found["top layers"].status == "failed"
    assert "memory" in found["top layers"].reason
    assert found["scratch"].folds


def test_how_many_views_a_candidate_has_does_not_depend_on_what_else_is_in_memory(ground, monkeypatch):
    """So a run that is resumed, and holds less, trains on the same."""
    top, scratch = candidates_for(ground, DRAWN)[TOP], candidates_for(ground, DRAWN)[0]
    alone = {candidate.name: ladder._views_of(ground, candidate) for candidate in (top, scratch)}
    largest = max(size for _, size in alone.values())
    monkeypatch.setattr(maps, "LARGEST", largest)
    way, views = way_of(ground), {}
    for candidate in (top, scratch):
        ladder._train(way, ladder._Rung(replace(candidate, epochs=1)), [0])
        views[candidate.name] = list(way.maps.values())[-1].views
        assert sum(held.values.nbytes for held in way.maps.values()) <= largest
    assert views == {name: count for name, (count, _) in alone.items()}
    assert len(way.maps) == 1


class Stubborn(tiny.Poor):
    """A network that answers, and that autograd cannot go back through."""

    def forward(self, x):
        gate = torch.sigmoid(self.block(self.stem(x)))
        gate.mul_(2)
        return self.head(gate.mean((2, 3)))


def test_a_network_that_cannot_be_trained_leaves_the_probe(tmp_path):
    run = regraft.fit(hard(tmp_path / "data"), Stubborn(), example=tiny.EXAMPLE, out=tmp_path / "run", budget="1trials")
    found = {a["name"]: a for a in run.record["ladder"]["attempts"]}
    assert found["top layers"]["status"] == "failed"
    assert "inplace operation" in found["top layers"]["reason"]
    assert "\n" not in found["top layers"]["reason"]
    assert run.record["ladder"]["winner"] is None


def test_a_winner_that_cannot_be_trained_on_all_pictures_leaves_the_probe(ground, monkeypatch, tmp_path):
    made_known(ground, {"scratch": 0.95})
    found = climbed(ground, "2trials")
    assert found.winner
    head = fit_head(ground.bench, ground.task, best_of(ground))
    probed = assemble(ground.backbone, head, tiny.CLASSES, ground.numerics)

    def refused(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nException raised from here")

    monkeypatch.setattr(final_fit, "fit_all", refused)
    model, ended = final_fit.grown(ground, found, STATED, probed, tmp_path, lambda *what: None)
    assert model is probed
    assert (ended.winner, ended.score) == (None, STATED)
    assert ended.reason.endswith("failed on all pictures: DefaultCPUAllocator: can't allocate memory")


def test_a_candidate_ends_early_enough_for_the_final_fit_of_the_best_so_far(ground):
    way = replace(way_of(ground), budget=budget_from("1h"), after=3601.0)
    rung = ladder._Rung(candidates_for(ground, DRAWN)[TOP])
    with pytest.raises(ladder.Halted):
        ladder._train(way, rung, [0])


def costing(monkeypatch, epoch):
    """Every epoch of a fold takes so many seconds, maps take none."""
    monkeypatch.setattr(ladder, "fold_seconds", lambda ground, candidate: epoch * candidate.epochs)
    monkeypatch.setattr(ladder, "map_seconds", lambda ground, candidate: 1e-9)
    monkeypatch.setattr(ladder, "workers", lambda ground: 2)


@pytest.mark.parametrize(
    ("seconds", "later", "epochs"),
    [(2400, 0, 10), (2200, 0, 5), (1100, 0, 2), (400, 0, None), (2400, 3, 5), (4600, 3, 10)],
)
def test_a_candidate_is_tried_in_as_many_epochs_as_the_time_allows(ground, monkeypatch, seconds, later, epochs):
    # 100 s, with the final fit on all pictures 2.1 times that, with the other folds 4.1 times, and a tenth to spare
    costing(monkeypatch, 100.0)
    way = replace(way_of(ground), budget=budget_from(f"{seconds}s"))
    rung = ladder._Rung(candidates_for(ground, DRAWN)[TOP])
    assert ladder._settled(way, rung, [0, 1], (), later) == ([] if epochs is None else [0, 1])
    assert rung.candidate.epochs == (epochs or 10)
    assert (rung.ended is None) == (epochs is not None)
    if epochs is None:
        assert rung.ended[0] == "skipped"
        assert rung.ended[1].startswith("even in 2 epochs it and what must follow would take about ")
    else:
        assert rung.fold == 100 * epochs


@pytest.mark.parametrize(
    ("right", "later", "epochs"),
    [(0.3, 0, 10), (1.0, 0, None), (0.3, 3, None)],
    ids=["what does not win", "what wins", "what may win on the other folds"],
)
def test_time_is_left_for_the_best_so_far_where_it_may_be_the_answer(ground, monkeypatch, right, later, epochs):
    costing(monkeypatch, 100.0)
    top, other = candidates_for(ground, DRAWN)[TOP], candidates_for(ground, DRAWN)[0]
    first = ladder._Rung(other, outcomes=told(ground, right, 0))  # its final fit takes three times as long
    rung = ladder._Rung(top)
    way = replace(way_of(ground), budget=budget_from("2400s"))
    assert ladder._settled(way, rung, [0, 1], [first, rung], later) == ([0, 1] if epochs else [])
    assert rung.candidate.epochs == 10
    assert (rung.ended is None) == (epochs is not None)


@pytest.mark.parametrize(
    ("budget", "spent", "length", "missing"),
    [("9000s", 0, 0, [0, 1]), ("0s", 0, 1, []), ("9000s", 100, 1, []), ("9trials", 100, 0, [0, 1])],
    ids=["there is time", "no time", "resumed", "resumed, as without interruption"],
)
def test_a_shorter_length_that_is_known_is_taken_where_time_or_a_kill_asks_for_it(
    ground, monkeypatch, budget, spent, length, missing
):
    costing(monkeypatch, 100.0)
    whole = candidates_for(ground, DRAWN)[TOP]
    lengths = (whole, *shortened(whole, len(ground.task.labels)))
    for fold, rows in told(ground, 0.9, 0, epochs=lengths[1].epochs).items():
        remember(ground, lengths[1], fold, rows, 1.0)
    rung = ladder._Rung(whole)
    way = replace(way_of(ground), budget=budget_from(budget, spent=spent))
    assert ladder._settled(way, rung, [0, 1], (), 3) == missing
    assert rung.candidate == lengths[length]
    assert rung.ended is None
    if not missing:
        assert ladder._settled(way, rung, [2, 3, 4], (), 0) == []
        assert sorted(rung.outcomes) == [0, 1, 2, 3, 4]


def test_another_runs_winner_that_cannot_be_trained_in_time_is_not_the_answer(ground, monkeypatch):
    costing(monkeypatch, 100.0)
    made_known(ground, {"top layers": 1.0})
    found = climbed(ground, "60s")
    assert found.winner is None
    known = found.attempts[TOP]
    assert known.status == "stopped"
    assert known.reason.startswith("known from another run, and training it on all pictures would take about ")
    again = climb(ground, best_of(ground), STATED, budget_from("60s", spent=59.0), DRAWN)
    assert again.winner.candidate.name == "top layers"


@pytest.mark.parametrize(
    ("seconds", "sure", "folds"),
    [(3500, 30, [2, 3, 4]), (2400, 30, [2, 3]), (2400, 40, []), (1100, 30, []), (0, 30, [])],
)
def test_a_candidate_stays_at_its_length_and_is_judged_on_as_many_folds_as_the_time_allows(
    ground, monkeypatch, seconds, sure, folds
):
    costing(monkeypatch, 100.0)
    monkeypatch.setattr(ladder, "SURE", sure)
    whole = candidates_for(ground, DRAWN)[TOP]
    rung = ladder._Rung(whole, outcomes=dict(list(told(ground, 0.9, 0).items())[:2]))
    way = replace(way_of(ground), budget=budget_from(f"{seconds}s"))
    assert ladder._settled(way, rung, [2, 3, 4], (), 0) == folds
    assert rung.candidate == whole
    assert (rung.ended is None) == (folds == [2, 3, 4])
    if rung.ended:
        assert rung.ended[0] == "unfinished"


def test_a_candidate_known_but_for_a_few_folds_has_none_twice(ground, monkeypatch):
    costing(monkeypatch, 100.0)
    whole = candidates_for(ground, DRAWN)[TOP]
    known = told(ground, 0.9, 0)
    remember(ground, whole, 2, known[2], 1.0)
    rung = ladder._Rung(whole, outcomes={fold: known[fold] for fold in (0, 1)})
    way = replace(way_of(ground), budget=budget_from("1100s"))
    assert ladder._settled(way, rung, [2, 3, 4], (), 0) == []
    assert sorted(rung.outcomes) == [0, 1, 2]


def test_answering_the_test_pictures_is_part_of_what_a_candidate_takes(ground):
    rung = ladder._Rung(candidates_for(ground, DRAWN)[TOP], fold=10.0)
    alone = ladder._final(way_of(ground), rung)
    assert 10 < alone < 13
    each = ladder._final(replace(way_of(ground), tested=1000), rung) - alone
    assert each == pytest.approx(1000 * 0.4 * 10 / (rung.candidate.epochs * 36))


@pytest.mark.parametrize("what", ["candidate", "labels", "folds", "seed", "balanced", "weights", "numerics"])
def test_outcomes_are_never_those_of_another_task(ground, what):
    candidate = candidates_for(ground, DRAWN)[TOP]
    for fold, rows in told(ground, 0.9, 0).items():
        remember(ground, candidate, fold, rows, 1.0)
    known = recalled(ground, candidate, list(folds_of(ground)))
    assert sorted(known) == list(folds_of(ground))
    assert all(np.array_equal(rows, told(ground, 0.9, 0)[fold]) for fold, (rows, _) in known.items())
    task = ground.task
    if what == "candidate":
        candidate = replace(candidate, lr=candidate.lr * 2)
    elif what == "labels":
        ground = replace(ground, task=replace(task, labels=np.roll(task.labels, 1)))
    elif what == "folds":
        ground = replace(ground, task=replace(task, folds=(task.folds + 1) % 5))
    elif what == "seed":
        ground = replace(ground, seed=1)
    elif what == "balanced":
        ground = replace(ground, balanced=True)
    elif what == "weights":
        source = replace(ground.backbone.source, weights="others")
        ground = replace(ground, backbone=replace(ground.backbone, source=source))
    else:
        ground = replace(ground, numerics=replace(ground.numerics, kernels="others"))
    assert recalled(ground, candidate, list(folds_of(ground))) == {}


# ---- judging -----------------------------------------------------------------------------------------------------

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


# ---- the whole job -----------------------------------------------------------------------------------------------


def fit(data, out, **options):
    options = {"budget": "2trials", **options}
    return regraft.fit(data, tiny.Poor(), example=tiny.EXAMPLE, out=out, **options)


def hard(root, each=20):
    return tiny.write_pictures(root, draw=tiny.tiles, each=each)


def probabilities(model, pictures):
    return [dict(p.ranked) for p in model.predict(pictures)]


@pytest.fixture(scope="module")
def won(tmp_path_factory):
    """A run whose fine-tuned candidate won, its pictures and its store."""
    place = tmp_path_factory.mktemp("won")
    hard(place / "data" / "train")
    tiny.write_pictures(place / "data" / "test", draw=tiny.tiles, each=6, seed=1)
    store = open_store(place / "store")
    return fit(place / "data", place / "run", store=store), place / "data", store


def test_pictures_that_need_fine_tuning_get_it_and_the_record_says_what_was_tried(won):
    run, _, _ = won
    found = run.record["ladder"]
    status = {a["name"]: a["status"] for a in found["attempts"]}
    assert status["scratch"] == "finished"
    assert found["winner"] == run.record["chosen"]["name"] == "scratch"
    assert found["reason"].startswith("scratch: a small network from random weights")
    assert run.record["chosen"]["score"]["score"] > found["probe"]["score"]


def test_a_record_in_memory_is_the_one_on_the_disk(won):
    run, _, _ = won
    assert json.loads((run.folder / "record.json").read_bytes()) == run.record


def test_a_picture_has_the_same_probabilities_whatever_stands_beside_it(won):
    run, data, _ = won
    paths = sorted((data / "test").rglob("*.png"))
    together = probabilities(run.model, paths)
    assert [probabilities(run.model, [path])[0] for path in paths] == together
    assert probabilities(run.model, paths[::-1])[::-1] == together
    assert len({max(p, key=p.get) for p in together}) > 1


LOADED = """
import json, sys
import torch
torch.set_num_threads(1)
import tiny
from regraft.artifact import load_model
model = load_model(sys.argv[1], backbone=tiny.Poor())
print(json.dumps([dict(model.predict(sys.argv[2:])[-1].ranked), dict(model.predict(sys.argv[-1:])[0].ranked)]))
"""


def test_a_winner_loads_in_a_fresh_process_and_answers_as_it_did_in_memory(won):
    run, data, _ = won
    paths = sorted((data / "test").rglob("*.png"))[:5]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADED, str(run.folder), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = probabilities(run.model, paths)[-1]
    assert json.loads(done.stdout) == [expected, expected]


def test_a_finished_run_with_a_winner_is_given_back_and_a_new_one_computes_no_pass(won, tmp_path):
    run, data, store = won
    again = fit(data, run.folder, store=store)
    assert again.record["forward_passes"] == 0
    assert again.record["ladder"] == json.loads((run.folder / "record.json").read_bytes())["ladder"]
    anew = fit(data, tmp_path / "anew", store=store)
    assert anew.record["forward_passes"] == 0
    for name in ("model.safetensors", "model.json"):
        assert (anew.folder / name).read_bytes() == (run.folder / name).read_bytes()
    paths = sorted((data / "test").rglob("*.png"))
    assert probabilities(again.model, paths) == probabilities(run.model, paths) == probabilities(anew.model, paths)


def test_a_run_whose_time_is_over_when_it_is_resumed_ends_with_the_best_that_it_had_tried(won, tmp_path):
    _, data, store = won
    first = fit(data, tmp_path / "run", budget="9h", store=store)
    assert first.record["ladder"]["winner"] == "scratch"
    for left in [path for path in first.folder.iterdir() if path.name != "record.json"]:
        left.unlink()
    record = {"status": "running", "options": first.record["options"], "spent": 9 * 3600 + 1.0}
    (first.folder / "record.json").write_text(json.dumps(record))
    again = fit(data, first.folder, budget="9h", store=store)
    assert again.record["ladder"]["winner"] == "scratch"
    assert again.record["forward_passes"] == 0


def test_checkpoints_that_a_kill_left_in_a_finished_run_are_removed(won):
    run, data, store = won
    left = run.folder / "checkpoints" / "epoch-00001-00.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"left")
    fit(data, run.folder, store=store)
    assert not left.parent.exists()


@pytest.mark.slow
def test_a_new_store_comes_to_the_same_model(won, tmp_path):
    run, data, _ = won
    anew = fit(data, tmp_path / "anew", store=open_store(tmp_path / "new"))
    assert anew.record["forward_passes"] == run.record["forward_passes"] > 60
    assert (anew.folder / "model.safetensors").read_bytes() == (run.folder / "model.safetensors").read_bytes()


def test_a_damaged_trained_part_is_refused(won, tmp_path):
    run, _, _ = won
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_model(tmp_path, backbone=tiny.Poor())


def test_no_trials_stop_at_the_curve(tmp_path):
    run = fit(hard(tmp_path / "data"), tmp_path / "run", budget="0trials")
    assert {a["status"] for a in run.record["ladder"]["attempts"]} == {"skipped"}
    assert run.record["ladder"]["winner"] is None
    assert run.record["chosen"]["name"] == run.record["curve"]["recommended"]
    assert run.record["forward_passes"] == 60
    assert run.model.tuned is None


@pytest.mark.slow
def test_three_trials_are_tried_in_order_and_the_whole_repeats(tmp_path):
    data = hard(tmp_path / "data")
    run = fit(data, tmp_path / "run", budget="3trials")
    assert "skipped" not in [a["status"] for a in run.record["ladder"]["attempts"]]
    anew = fit(data, tmp_path / "anew", budget="3trials")
    assert anew.record["forward_passes"] == 0
    assert (anew.folder / "model.safetensors").read_bytes() == (run.folder / "model.safetensors").read_bytes()
    torch.set_num_threads(2)  # folds side by side, a thread each; the final fit, which has both, sums in another order
    try:
        aside = fit(data, tmp_path / "aside", budget="3trials", store=open_store(tmp_path / "another"))
    finally:
        torch.set_num_threads(1)
    assert aside.record["forward_passes"] > 0
    for key in ("winner", "reason"):
        assert aside.record["ladder"][key] == run.record["ladder"][key]
    gains = [[(a["name"], a["gain"], a["epochs"]) for a in r.record["ladder"]["attempts"]] for r in (run, aside)]
    assert gains[0] == gains[1]


# ---- kills -------------------------------------------------------------------------------------------------------


def command_kill(place, kills, seed, budget):
    """Kill fits at random moments, the same run again each time, to its end; prints what came of it as JSON."""
    rng, data = random.Random(seed), place / "data"
    for name in ("cold", "whole"):
        begun = time.perf_counter()
        whole = (
            fit(data, place / name, store=open_store(place / "stores" / name), budget=budget).folder
            / "model.safetensors"
        )
        longest = time.perf_counter() - begun
    counts = {"kills": 0, "finished": 0, "other": 0, "left": 0, "checkpoints": 0}
    run = 0
    while counts["kills"] < kills:
        out, store = place / f"run{run}", place / "stores" / f"{run}"
        child = os.fork()
        if child == 0:
            fit(data, out, store=open_store(store), budget=budget)
            os._exit(0)
        end = time.perf_counter() + rng.uniform(0.05, 0.95) * longest
        in_the_final_fit = rng.random() < 0.4
        while time.perf_counter() < end + in_the_final_fit * longest:
            if in_the_final_fit and list(out.glob("checkpoints/*/epoch-*")):
                break
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        counts["kills" if os.WIFSIGNALED(status) else "finished"] += 1
        counts["checkpoints"] += bool(list(out.glob("checkpoints/*/epoch-*")))
        if not os.WIFSIGNALED(status) or rng.random() < 0.4 or counts["kills"] == kills:
            done = fit(data, out, store=open_store(store), budget=budget)
            counts["other"] += (done.folder / "model.safetensors").read_bytes() != whole.read_bytes()
            counts["left"] += (done.folder / "checkpoints").exists()
            run += 1
    print(json.dumps(counts))


def killed(tmp_path, kills, seed, budget):
    hard(tmp_path / "data")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path), str(kills), str(seed), budget]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(counts)
    return counts


def test_a_run_killed_3_times_ends_with_the_same_model(tmp_path):
    counts = killed(tmp_path, 3, 2, "1trials")
    assert (counts["other"], counts["left"]) == (0, 0)


@pytest.mark.slow
def test_a_run_killed_20_times_ends_with_the_same_model(tmp_path):
    counts = killed(tmp_path, 20, 1, "2trials")
    assert counts["checkpoints"] > 0  # some were hit in the final fit
    assert (counts["other"], counts["left"]) == (0, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_kill(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
