"""The ladder above the probe: what is tried within a budget, and what is kept of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import grounds
import regraft
import tiny
from regraft import final_fit, ladder, maps
from regraft.artifact import assemble
from regraft.attempts import recalled, remember
from regraft.augment import Augment
from regraft.backbone import load_backbone
from regraft.budget import budget_from
from regraft.candidates import Candidate, shortened
from regraft.ladder import candidates_for, climb, network_probe
from regraft.probe import fit_head
from regraft.scores import Interval
from regraft.store import open_store

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
    data = tiny.write_pictures(tmp_path / "data", draw=tiny.tiles, each=20)
    run = regraft.fit(data, Stubborn(), example=tiny.EXAMPLE, out=tmp_path / "run", budget="1trials")
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


def test_another_runs_winner_that_cannot_even_be_timed_here_does_not_end_the_climb(ground, monkeypatch):
    made_known(ground, dict.fromkeys(NAMES, 1.0))

    def refused(*_):
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(ladder, "fold_seconds", refused)
    found = climbed(ground, "60s")
    assert found.winner is None
    assert [(a.status, a.reason) for a in found.attempts] == [("failed", "no memory")] * len(NAMES)


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
