"""Where the raw input is the answer of the curve, the network's probe may stand beside it: one head on both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import grounds
import tiny
from regraft.artifact import assemble, load_model, save_model
from regraft.augment import Augment
from regraft.budget import budget_from
from regraft.final_fit import _both_probes
from regraft.heads import INPUT
from regraft.ladder import climb, network_probe
from regraft.probe import fit_head
from regraft.scores import Interval

STATED = Interval(0.5, 0.4, 0.6)


@pytest.fixture
def ground(tmp_path):
    return grounds.ground_of(tiny.write_pictures(tmp_path / "data", each=30, draw=tiny.tiles), tiny.TinyNet())


def climbed(ground, probe, budget="1s"):
    return climb(ground, probe, STATED, budget_from(budget, spent=9.0), Augment())


def test_it_is_judged_without_training_and_wins_where_the_network_is_better(ground):
    found = climbed(ground, ground.trials[INPUT])
    attempt = found.attempts[0]
    assert attempt.candidate.name == "both probes"
    assert attempt.status == "finished"
    assert attempt.trained_on == "stored features"
    assert attempt.folds == tuple(range(5))
    assert found.winner is attempt
    assert found.forward_passes == 0
    assert attempt.hits.mean() > ground.trials[INPUT].fold_hits[0].mean()


def test_it_is_not_there_where_the_curve_chose_the_network(ground):
    found = climbed(ground, network_probe(ground))
    assert "both probes" not in [attempt.candidate.name for attempt in found.attempts]


def test_the_saved_head_sums_what_was_judged(ground, tmp_path):
    found = climbed(ground, ground.trials[INPUT])
    assert found.winner.share == 0.5
    heads = [fit_head(ground.bench, ground.task, t) for t in (ground.trials[INPUT], network_probe(ground))]
    probed = assemble(ground.backbone, heads[0], tiny.CLASSES, ground.numerics)
    model = _both_probes(ground, found, probed)
    (tmp_path / "run").mkdir()
    save_model(model, ground.backbone, tmp_path / "run", {})
    loaded = load_model(tmp_path / "run", backbone=ground.backbone.module)
    table = ground.bench.table
    rows = {name: np.concatenate([*table.rows(name)()])[:3].astype(np.float32) for name in table.shapes}
    first, second = (head.logits(rows) for head in heads)
    won = found.winner
    expected = torch.softmax(won.whole * (0.5 * first + 0.5 * won.own * second), 1)
    answers = loaded.predict([table.examples[i].path for i in range(3)])
    said = torch.tensor([[dict(a.ranked)[label] for label in tiny.CLASSES] for a in answers])
    torch.testing.assert_close(said, expected, atol=2e-3, rtol=0)
    assert loaded.cut == network_probe(ground).views[-1].cut
    assert INPUT in loaded.head.cuts


def test_a_fine_tuned_part_is_saved_beside_the_probe_and_says_the_same_when_loaded(ground, tmp_path):
    from regraft.final_fit import grown
    from regraft.recipe import silent

    probe = network_probe(ground)
    found = climb(ground, probe, STATED, budget_from("3trials"), Augment(crop=True))
    won = next(a for a in found.attempts if a.candidate.name == "top layers")
    won = replace(won, share=0.5, epochs=max(1, won.epochs))
    probed = assemble(ground.backbone, fit_head(ground.bench, ground.task, probe), tiny.CLASSES, ground.numerics)
    model, _ = grown(ground, replace(found, winner=won), STATED, probed, tmp_path / "checkpoints", silent)
    assert model.tuned is not None
    assert model.tuned.plot.takes == "map"
    (tmp_path / "run").mkdir()
    save_model(model, ground.backbone, tmp_path / "run", {})
    loaded = load_model(tmp_path / "run", backbone=ground.backbone.module)
    pictures = [example.path for example in ground.bench.table.examples[:20]]
    together = [p.ranked for p in loaded.predict(pictures)]
    assert [p.ranked for p in model.predict(pictures)] == together
    assert [loaded.predict([picture])[0].ranked for picture in pictures] == together
    assert loaded.cut == won.candidate.cut
    assert together != [p.ranked for p in probed.predict(pictures)]
