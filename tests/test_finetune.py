"""Fine-tuning from a cut: what is learned from, which stages train how fast, and the same bits every time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import grounds
import tiny
from regraft import costs, finetune
from regraft.augment import Augment
from regraft.backbone import load_backbone
from regraft.candidates import BATCH, Candidate
from regraft.costs import fold_seconds, map_seconds
from regraft.finetune import (
    STORED,
    begin,
    fit_all,
    logits_of,
    stages_of,
    train_fold,
    trained_on,
    trains_in_bfloat16,
)
from regraft.ladder import maps_of
from regraft.numerics import Numerics
from regraft.probe import Task
from regraft.training import Checkpoints, Diverged, Halted, batches_of
from regraft.tuned import PICTURE, run_tuned

TUNE = Candidate("top layers", "", "stem.0", "mean", epochs=4, lr=3e-3, views=2)
DEEP = Candidate("deep", "", "stem", "mean", opens=("stage2",), epochs=3, views=1)
SCRATCH = Candidate("scratch", "", "input", "small network", statistics=True, epochs=1, views=1)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny.Poor(), example=tiny.EXAMPLE)


@pytest.fixture
def data(tmp_path):
    return tiny.write_pictures(tmp_path / "data", draw=tiny.tiles, each=14)


@pytest.fixture
def ground(data, backbone):
    return grounds.ground_of(data, backbone)


def quiet(what, done, total):
    pass


def never():
    return False


def trained(ground, candidate=TUNE, fold=0, maps=None, **options):
    return train_fold(ground, candidate, maps or maps_of(ground, candidate, quiet), fold, halt=never, **options)


def fitted(ground, candidate, folder, *, epochs=None, halt=never, facts="one"):
    return fit_all(
        ground,
        candidate,
        maps_of(ground, candidate, quiet),
        epochs or candidate.epochs,
        slower=1.0,
        halt=halt,
        checkpoints=lambda module: Checkpoints(folder, module, {"facts": facts}),
    )


def same(one, two):
    theirs = two.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


# ---- folds -------------------------------------------------------------------------------------------------------


def test_a_fold_gives_logits_of_its_pictures_after_every_epoch(ground):
    out = trained(ground, fold=2)
    assert out.shape == (4, int((ground.task.folds[0] == 2).sum()), 3)
    assert out.dtype == np.float32
    assert all(not np.array_equal(a, b) for a, b in zip(out, out[1:], strict=False))


def test_a_fold_twice_is_the_same_and_another_seed_is_not(ground):
    assert np.array_equal(trained(ground), trained(ground))
    assert not np.array_equal(trained(ground), trained(replace(ground, seed=1)))


@pytest.mark.parametrize(
    "candidate",
    [replace(TUNE, epochs=1, hidden=(64, 64)), replace(TUNE, epochs=1, fresh="stem.0"), SCRATCH],
    ids=["hidden", "fresh", "scratch"],
)
def test_folds_trained_side_by_side_are_those_trained_one_by_one(ground, candidate):
    maps = maps_of(ground, candidate, quiet)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    alone = [trained(ground, candidate, fold, maps) for fold in range(4)]
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda fold: trained(ground, candidate, fold, maps), range(4)))
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("balanced", [False, True])
def test_labels_of_the_held_out_pictures_are_not_learned_from(ground, balanced):
    ground = replace(ground, balanced=balanced)
    task = ground.task
    labels = np.where(task.folds[0] == 0, 0, task.labels)
    others = Task(labels, task.groups, task.folds, task.classes)
    assert np.array_equal(trained(ground), trained(replace(ground, task=others)))


def test_labels_of_the_other_pictures_are_learned_from(ground):
    task = ground.task
    labels = np.where(task.folds[0] == 1, 0, task.labels)
    others = Task(labels, task.groups, task.folds, task.classes)
    assert not np.array_equal(trained(ground), trained(replace(ground, task=others)))


def test_balancing_tells_only_where_classes_differ_in_size(ground, data, backbone):
    assert np.array_equal(trained(ground), trained(replace(ground, balanced=True)))
    for i in range(8):
        (data / "ant" / f"{i}.png").unlink()
    fewer = grounds.ground_of(data, backbone)
    plain, balanced = trained(fewer), trained(replace(fewer, balanced=True))
    held = fewer.task.folds[0] == 0
    assert not np.array_equal(plain, balanced)
    chance = [torch.softmax(torch.from_numpy(out[-1]), 1).mean(0)[0].item() for out in (plain, balanced)]
    assert held.any()
    assert chance[1] > chance[0]  # the small class has a larger say


def test_fine_tuning_learns_what_the_probe_does_not_see(ground):
    folds, labels = ground.task.folds[0], ground.task.labels
    candidate = replace(TUNE, epochs=12, views=4)
    maps, losses = maps_of(ground, candidate, quiet), []
    for fold in range(3):
        held = torch.from_numpy(labels[folds == fold])
        out = torch.from_numpy(trained(ground, candidate, fold, maps))
        losses.append([float(torch.nn.functional.cross_entropy(rows, held)) for rows in out])
    first, last = np.mean(losses, 0)[[0, -1]]
    assert last < 0.8 * first


def test_noise_and_mixes_are_of_maps_and_change_what_is_learned(ground):
    plain = trained(ground, replace(TUNE, augment=Augment()))
    for augment in (Augment(mix=True), Augment(noise=True)):
        assert not np.array_equal(trained(ground, replace(TUNE, augment=augment)), plain)
    picture = replace(TUNE, cut=PICTURE, epochs=1, views=1, augment=Augment())
    assert np.array_equal(trained(ground, picture), trained(ground, replace(picture, augment=Augment(mix=True))))


def test_a_slower_training_is_one_of_a_lower_rate(ground):
    assert np.array_equal(trained(ground, slower=0.5), trained(ground, replace(TUNE, lr=TUNE.lr / 2)))


def test_a_rate_that_explodes_is_named_with_its_batch(ground):
    with pytest.raises(Diverged, match=r"epoch \d+, batch \d+"):
        trained(ground, replace(TUNE, lr=1e12))


@pytest.mark.parametrize("lr", [1e20, 1e25])
def test_answers_that_are_not_finite_are_no_outcome_even_after_the_last_step(tmp_path, backbone, lr):
    few = grounds.ground_of(tiny.write_pictures(tmp_path / "few", draw=tiny.tiles, each=8), backbone)
    only = replace(TUNE, epochs=1, lr=lr)  # 19 or 20 pictures: one batch, one step
    try:
        out = trained(few, only)
    except Diverged:
        return
    assert np.isfinite(out).all()


def test_a_fold_stops_when_it_is_told_to(ground):
    with pytest.raises(Halted):
        train_fold(ground, TUNE, maps_of(ground, TUNE, quiet), 0, halt=lambda: True)


# ---- the final fit -----------------------------------------------------------------------------------------------


def test_the_final_fit_learns_from_all_and_ends_at_its_epoch(tmp_path, ground):
    whole, shorter = fitted(ground, TUNE, tmp_path / "a"), fitted(ground, TUNE, tmp_path / "b", epochs=2)
    assert not same(whole, shorter)
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())
    newest = {folder: max((tmp_path / folder).iterdir()).name[:11] for folder in ("a", "b")}
    assert newest == {"a": "epoch-00004", "b": "epoch-00002"}


def test_layers_that_keep_what_they_derived_from_their_weights_derive_it_anew_after_every_step(tmp_path, data):
    module = tiny.Poor()
    module.block.append(tiny.Keeping(3))
    ground = grounds.ground_of(data, load_backbone(module, example=tiny.EXAMPLE))
    assert np.isfinite(trained(ground)).all()
    whole, maps = fitted(ground, TUNE, tmp_path / "run"), maps_of(ground, TUNE, quiet)
    (weight,) = [t for name, t in whole.state_dict().items() if name.endswith("block.2.weight")]
    assert not torch.equal(weight, torch.ones(3, 1, 1))
    fresh = begin(ground, TUNE, np.arange(len(ground.task.labels)))
    fresh.load_state_dict(whole.state_dict())
    rows = np.arange(8)
    assert np.array_equal(logits_of(whole, maps, rows, "cpu"), logits_of(fresh, maps, rows, "cpu"))
    assert run_tuned(whole, maps.batch(rows, 0 * rows)).numpy().tolist() == logits_of(fresh, maps, rows, "cpu").tolist()


@pytest.mark.parametrize("candidate", [TUNE, replace(TUNE, opens=("mean",))], ids=["one", "stages"])
@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_final_fit_that_is_interrupted_ends_with_the_same_bits(tmp_path, ground, candidate, step):
    whole = fitted(ground, candidate, tmp_path / "whole", epochs=3)
    steps = iter(range(10**6))
    with pytest.raises(Halted):
        fitted(ground, candidate, tmp_path / "again", epochs=3, halt=lambda: next(steps) >= step)
    assert same(fitted(ground, candidate, tmp_path / "again", epochs=3), whole)


def test_a_final_fit_that_was_done_is_given_back_as_it_was(tmp_path, ground):
    whole = fitted(ground, TUNE, tmp_path / "run", epochs=2)
    assert same(fitted(ground, TUNE, tmp_path / "run", epochs=2), whole)


def test_checkpoints_of_another_fit_are_left_alone(tmp_path, ground):
    whole = fitted(ground, TUNE, tmp_path / "whole")
    fitted(ground, replace(TUNE, lr=1e-2), tmp_path / "run", facts="other")
    assert same(fitted(ground, TUNE, tmp_path / "run"), whole)


# ---- stages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def deep_ground(tmp_path):
    return grounds.ground_of(tiny.write_pictures(tmp_path / "stripes"), tiny.TinyNet())


@pytest.mark.parametrize("cut", ["stem", "stage1", "stage2.1.add_1", PICTURE, "input"])
def test_every_parameter_is_in_one_stage_and_rates_fall_from_the_top(deep_ground, cut):
    candidate = SCRATCH if cut == "input" else replace(DEEP, cut=cut, opens=())
    module = begin(deep_ground, candidate, np.arange(24))
    stages = stages_of(deep_ground, candidate, module)
    listed = [id(p) for stage in stages for p in stage.parameters]
    assert sorted(listed) == sorted(id(p) for p in module.parameters())
    assert stages[0].name == "top"
    rates = [stage.rate for stage in stages]
    assert rates[0] == (1.0 if cut == "input" else 0.1)  # an output layer that begins as a probe has little to learn
    assert rates[1] == 1.0
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert all(stage.opens == 0 for stage in stages)


def test_stages_open_from_the_top_down_and_each_trains_slower_than_the_one_above(deep_ground):
    candidate = replace(DEEP, opens=("stage2",), epochs=10)
    module = begin(deep_ground, candidate, np.arange(24))
    names = {id(p): name.split(".")[0] for name, p in module.body.named_parameters()}
    opens, rates = {}, {}
    for stage in stages_of(deep_ground, candidate, module)[1:]:
        for p in stage.parameters:
            opens.setdefault(names[id(p)], set()).add(stage.opens)
            rates.setdefault(names[id(p)], set()).add(round(stage.rate, 6))
    assert opens == {"stage3": {0}, "stage2": {3}, "stage1": {3}}
    assert min(rates["stage3"]) > max(rates["stage2"]) > max(rates["stage1"])


def test_fresh_layers_train_at_the_rate_of_the_output(deep_ground):
    candidate = replace(DEEP, opens=(), fresh="stage2")
    module = begin(deep_ground, candidate, np.arange(24))
    names = {id(p): name.split(".")[0] for name, p in module.body.named_parameters()}
    for stage in stages_of(deep_ground, candidate, module)[1:]:
        fresh = {names[id(p)] for p in stage.parameters} == {"stage3"}
        assert (stage.rate == 1.0) == fresh


def test_answers_during_training_leave_moving_norms_moving(deep_ground):
    candidate = replace(DEEP, statistics=True)
    module = begin(deep_ground, candidate, np.arange(24))
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 6
    for norm in norms:
        norm.train()
    before = [norm.running_mean.clone() for norm in norms]
    maps = maps_of(deep_ground, candidate, quiet)
    rows = np.arange(20)
    found = logits_of(module, maps, rows, "cpu")
    assert all(norm.training for norm in norms)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert np.array_equal(found, run_tuned(module.eval(), maps.batch(rows, np.zeros(20, int))).numpy())


def test_answers_during_training_stop_soon_after_they_are_told_to(ground):
    module = begin(ground, TUNE, np.arange(4))
    maps, asked = maps_of(ground, TUNE, quiet), []
    with pytest.raises(Halted):
        logits_of(module, maps, np.zeros(640, int), "cpu", lambda: len(asked.append(1) or asked) > 2)
    assert len(asked) == 3


def test_the_frozen_part_is_in_the_cost_of_a_step_where_it_is_run_again(ground, monkeypatch):
    assert trained_on(ground, TUNE) == STORED
    stored = fold_seconds(ground, TUNE)
    monkeypatch.setattr(finetune, "views_stored", lambda *facts: 0)
    monkeypatch.setattr(costs, "_frozen_seconds", lambda ground, candidate: 1000.0)
    again = fold_seconds(ground, TUNE)
    steps = TUNE.epochs * batches_of(round(len(ground.task.labels) * 0.8), BATCH)
    assert again - stored > 1000 * steps


# ---- precision and cost ------------------------------------------------------------------------------------------


def test_small_maps_train_in_bfloat16_where_the_machine_has_it_and_large_ones_do_not(deep_ground):
    half = replace(deep_ground, numerics=Numerics("cpu", "bfloat16", 8, "test"))
    assert trains_in_bfloat16(half, replace(DEEP, cut="mean"))
    for cut in ("stem", "stage2", PICTURE, "input"):
        assert not trains_in_bfloat16(half, replace(DEEP, cut=cut))
    assert not trains_in_bfloat16(deep_ground, replace(DEEP, cut="mean"))
    emulated = replace(deep_ground, numerics=Numerics("cpu", "bfloat16", 8, "test", emulated=True))
    assert not trains_in_bfloat16(emulated, replace(DEEP, cut="mean"))


@pytest.mark.parametrize("candidate", [TUNE, replace(TUNE, cut=PICTURE), SCRATCH], ids=["map", "picture", "input"])
def test_a_candidate_has_a_cost_and_finding_it_trains_nothing(ground, candidate):
    before = {name: t.clone() for name, t in ground.backbone.module.state_dict().items()}
    assert fold_seconds(ground, candidate) > 0
    assert map_seconds(ground, candidate) > 0
    assert all(torch.equal(t, before[name]) for name, t in ground.backbone.module.state_dict().items())
    assert all(p.grad is None for p in ground.backbone.module.parameters())
