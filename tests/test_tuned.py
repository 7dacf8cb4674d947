"""The part above a cut: it begins as the probe, answers each row alone, and is the network's own layers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import grounds
import tiny
from regraft.backbone import load_backbone
from regraft.candidates import Candidate
from regraft.cut import between, split
from regraft.errors import CutError
from regraft.finetune import begin, plot_of, start_of
from regraft.frozen import freeze_lower, values_at_cuts
from regraft.graph import shares_above, trace
from regraft.heads import INPUT, View
from regraft.maps import extract_maps, picture_views
from regraft.networks.small import FEATURES, small_network
from regraft.preprocess import normalise
from regraft.probe import Task, fit_head
from regraft.tuned import PICTURE, SMALL, Plot, Tuned, batch_norms, grow, plot_from_json, run_tuned, scaled, stage_names

SMALL_VIEWS = (View(SMALL, 1, FEATURES, True),)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny.TinyNet(), example=tiny.EXAMPLE)


@pytest.fixture
def ground(tmp_path, backbone):
    return grounds.ground_of(tiny.write_pictures(tmp_path / "data"), backbone)


def plot_to(end, parts, *, cut="stage1", **options):
    return Plot(cut, (View(end, parts, 8, True),), 3, **options)


def maps_at(backbone, cut, pixels):
    frozen = freeze_lower(backbone.trace, [cut], backbone.preprocess, grounds.NUMERICS)
    return values_at_cuts(frozen, pixels)[0].float()


def pictures(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32)).astype(np.uint8))


# ---- between -----------------------------------------------------------------------------------------------------

PAIRS = [("stem", "stage1"), ("stem.0", "mean"), ("stage1", "stage3"), ("stage1.add", "stage2.0"), ("stage2", "mean")]


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("cut", "end"), PAIRS)
def test_what_lies_between_two_cuts_goes_on_from_one_to_the_other_bit_for_bit(cut, end, train):
    module = tiny.TinyNet().train(train)
    followed = trace(module, tiny.EXAMPLE)
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        expected = split(followed, end)[0](x)
        h = split(followed, cut)[0](x)
        kept = h.clone()
        (found,) = between(followed, cut, [end])(h)
        assert torch.equal(found, expected)
    assert torch.equal(h, kept)


def test_what_lies_between_gives_the_tensors_at_several_cuts_also_at_the_first():
    followed = trace(tiny.TinyNet().eval(), tiny.EXAMPLE)
    ends, x = ["stage1", "stage1.add", "stage2", "mean"], torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        found = between(followed, "stage1.add", ends)(split(followed, "stage1.add")[0](x))
        for end, value in zip(ends, found, strict=True):
            assert torch.equal(value, split(followed, end)[0](x)), end


def test_what_lies_between_holds_the_layers_there_and_no_others(backbone):
    part = between(backbone.trace, "stage1", ["stage2"])
    own = {id(p) for p in backbone.module.stage2.parameters()}
    assert {id(p) for p in part.parameters()} == own


@pytest.mark.parametrize(
    ("cut", "ends"), [("stage2", ["stage1"]), ("mean", ["stem"]), ("stage2", ["stage3", "stage1"]), ("stage2", [])]
)
def test_a_part_that_ends_below_its_beginning_or_nowhere_is_refused(backbone, cut, ends):
    with pytest.raises(CutError, match=f"not above {cut}"):
        between(backbone.trace, cut, ends)


@pytest.mark.parametrize(("cut", "end"), [("stage2", "stage9"), ("nowhere", "stage2")])
def test_a_part_between_cuts_that_are_not_there_is_refused_by_name(backbone, cut, end):
    with pytest.raises(CutError, match="stage9|nowhere"):
        between(backbone.trace, cut, [end])


# ---- shares of the arithmetic ------------------------------------------------------------------------------------


def test_the_share_of_arithmetic_above_a_cut_falls_with_its_depth_as_counted_by_hand(backbone):
    stem, stage, later, head = 3 * 8 * 25 * 1024, 2 * 8 * 8 * 9 * 1024, 2 * 8 * 8 * 9 * 256, 8 * 5
    total = stem + stage + 2 * later + head
    found = dict(zip([c.name for c in backbone.shown], shares_above(backbone.trace, backbone.shown), strict=True))
    expected = {
        "stem": (total - stem) / total,
        "stage1": (2 * later + head) / total,
        "stage2": (later + head) / total,
        "stage3": head / total,
        "mean": head / total,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    shares = list(found.values())
    assert shares == sorted(shares, reverse=True)
    assert 0 <= shares[-1] <= shares[0] <= 1


def test_the_share_goes_from_near_all_to_nothing_in_a_deep_row_of_layers():
    layers = [nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.ReLU()) for i in range(12)]
    followed = trace(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 8, 8))
    shares = shares_above(followed, followed.cuts)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.1


# ---- as it begins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "end"),
    [("stage1", "mean"), ("stem", "stage2"), ("stage2.1.add_1", "stage3"), ("mean", "mean"), (PICTURE, "stage1")],
)
def test_a_part_begins_as_the_probe_on_the_pictures_it_learns_from(ground, cut, end):
    candidate = Candidate("any", "", cut, end)
    learned = np.flatnonzero(ground.task.folds[0] != 0)
    module = begin(ground, candidate, learned)
    task, bench, trial = ground.task, ground.bench, start_of(ground, candidate)
    known = Task(task.labels[learned], task.groups[learned], task.folds[:, learned], task.classes)
    head = fit_head(replace(bench, chosen=bench.chosen[learned], products={}), known, trial)
    table = bench.table
    expected = head.logits({name: np.concatenate(list(table.rows(name, bench.chosen)())) for name in head.cuts})
    if cut == PICTURE:
        maps = picture_views(table.examples, table.ids, ground.backbone.preprocess, 1, candidate.augment)
    else:
        maps = extract_maps(
            table.examples, table.ids, ground.backbone, cut, table.store, ground.numerics, 1, candidate.augment
        )
    rows = np.arange(len(task.labels))
    logits = run_tuned(module, maps.batch(rows, np.zeros(len(rows), int)))
    assert plot_of(ground, candidate).views == trial.views
    assert trial.views[-1].cut == end
    assert torch.equal(module.top[-1].weight, head.weight)
    assert torch.equal(module.top[-1].bias, head.bias)
    # What is left is the rounding of stored features to float16, which the head's weights enlarge; roots are softened.
    near = 0.05 if any(view.root for view in trial.views) else 0.005
    torch.testing.assert_close(logits, expected, atol=near * float(expected.abs().max()), rtol=0)
    assert float((expected - expected.mean(0)).abs().max()) > 1


@pytest.mark.parametrize("cut", ["stage1", "several", "hidden", "mean", PICTURE, INPUT])
def test_a_row_does_not_depend_on_its_neighbours(backbone, cut):
    if cut == "several":
        plot = Plot("stage1", (View("stage1", 16, 8, False), View("stage2", 1, 8, True), View("mean", 1, 8, True)), 3)
    elif cut == "hidden":
        plot = plot_to("stage3", 16, hidden=(147, 49))
    elif cut == INPUT:
        plot = Plot(INPUT, SMALL_VIEWS, 3)
    elif cut == "mean":
        plot = plot_to("mean", 1, cut="stage3")
    else:
        plot = plot_to("stage3", 16, cut=cut)
    module = grow(plot, backbone, seed=1)
    x = pictures(35)
    if plot.takes == "map":
        x = torch.cat([maps_at(backbone, plot.cut, x[i : i + 16]) for i in range(0, 35, 16)])
    together = run_tuned(module, x)
    for size in (1, 3, 17):
        assert torch.equal(torch.cat([run_tuned(module, x[i : i + size]) for i in range(0, 35, size)]), together)
    assert torch.equal(run_tuned(module, x.flip(0)).flip(0), together)


def test_a_part_of_the_picture_prepares_it_as_the_network_takes_it(backbone):
    plot = plot_to("mean", 1, cut=PICTURE)
    module = grow(plot, backbone, seed=1)
    x = pictures(4)
    with torch.no_grad():
        seen = split(backbone.trace, "mean")[0](normalise(x, backbone.preprocess))
        expected = module.top(seen)
    torch.testing.assert_close(run_tuned(module, x), expected, atol=1e-5, rtol=1e-4)


def test_what_is_new_is_drawn_from_the_seed_and_leaves_the_random_state_alone(backbone):
    for plot in (
        plot_to("stage3", 16, hidden=(7, 5)),
        plot_to("stage3", 16, fresh="stage2"),
        Plot(INPUT, SMALL_VIEWS, 3),
    ):
        state = torch.get_rng_state()
        one, two, other = (grow(plot, backbone, seed=seed).state_dict() for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(t, two[name]) for name, t in one.items())
        assert any(not torch.equal(t, other[name]) for name, t in one.items())


def test_fresh_layers_are_new_and_those_below_them_are_the_networks_own(backbone):
    plot = plot_to("stage3", 16, fresh="stage2")
    before = {name: t.clone() for name, t in backbone.module.state_dict().items()}
    body = grow(plot, backbone).body.state_dict()
    fresh = [name for name in body if name.startswith("stage3") and "num_batches" not in name]
    kept = [name for name in body if not name.startswith("stage3")]
    assert len(kept) >= 12
    assert all(torch.equal(body[name], before[name]) for name in kept)
    for name in fresh:
        if "conv" in name or name.endswith(("running_mean", "running_var")):
            assert not torch.equal(body[name], before[name]), name
    assert torch.equal(body["stage3.bn1.running_mean"], torch.zeros(8))
    assert torch.equal(body["stage3.bn1.weight"], torch.ones(8))
    assert all(torch.equal(t, before[name]) for name, t in backbone.module.state_dict().items())


def test_without_fresh_layers_all_are_the_networks_own_but_copies(backbone):
    own = backbone.module.state_dict()
    module = grow(plot_to("stage3", 16), backbone)
    assert all(torch.equal(t, own[name]) for name, t in module.body.state_dict().items())
    ours = {p.data_ptr() for p in module.parameters()}
    assert not ours & {p.data_ptr() for p in backbone.module.parameters()}
    assert not module.training


def test_hidden_layers_stand_between_the_features_and_the_output(backbone):
    module = grow(plot_to("stage3", 16, hidden=(7, 5)), backbone)
    shapes = [tuple(layer.weight.shape) for layer in module.top if isinstance(layer, nn.Linear)]
    assert shapes == [(7, 128), (5, 7), (3, 5)]
    assert run_tuned(module, maps_at(backbone, "stage1", pictures(2))).shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_network_takes_pictures_of_32_pixels_in_grey_or_colour(channels):
    plot = Plot(INPUT, SMALL_VIEWS, 4, channels=channels)
    module = grow(plot, None, seed=1)
    logits = run_tuned(module, pictures(5)[:, :channels])
    assert logits.shape == (5, 4)
    assert bool(torch.isfinite(logits).all())
    assert small_network(channels)(torch.rand(2, channels, 32, 32)).shape == (2, FEATURES)
    assert len(list(batch_norms(module))) == 6


def test_a_cut_that_is_not_there_is_refused(backbone):
    with pytest.raises(CutError, match="nowhere"):
        grow(plot_to("stage3", 16, cut="nowhere"), backbone)


def test_stages_share_out_the_parameters_between_cuts(backbone):
    plot = plot_to("mean", 1, cut="stem")
    module = grow(plot, backbone)
    stages = stage_names(plot, backbone, module, ["stage1", "stage2"])
    prefixes = [{name.split(".")[0] for name in stage} for stage in stages]
    assert prefixes == [{"stage1"}, {"stage2"}, {"stage3"}]
    assert sorted(sum(stages, [])) == sorted(name for name, _ in module.body.named_parameters())


def test_scaling_multiplies_the_answers(backbone):
    module = grow(plot_to("stage3", 16, hidden=(7,)), backbone, seed=1)
    with torch.no_grad():
        module.top[-1].bias.fill_(0.3)
    x = maps_at(backbone, "stage1", pictures(4))
    before = run_tuned(module, x)
    scaled(module, 2.5)
    torch.testing.assert_close(run_tuned(module, x), 2.5 * before)


# ---- as JSON -----------------------------------------------------------------------------------------------------

PLOTS = {
    "map": Plot("stage1", (View("stage3", 16, 8, True),), 3),
    "several": Plot("stage1", (View("stage1", 16, 8, False, root=True), View("stage3", 16, 8, True)), 3),
    "means": Plot("stage1", (View("stage3", 16, 8, False),), 3, fresh="stage2"),
    "hidden": Plot(PICTURE, (View("mean", 1, 8, True),), 3, hidden=(256, 7)),
    "small": Plot(INPUT, SMALL_VIEWS, 3, channels=1),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS.keys())
def test_a_part_comes_back_from_its_json(backbone, plot):
    told = json.loads(json.dumps(Tuned(plot, grow(plot, backbone), 0.5).to_json()))
    assert plot_from_json(told, 3) == plot
    assert told["share"] == 0.5
    for name in ("cut", "fresh", "hidden", "channels", "views"):
        with pytest.raises((KeyError, TypeError)):
            plot_from_json({key: value for key, value in told.items() if key != name}, 3)
