"""A fitted model as a backbone: its layers, those that were trained among them, are reused for the next task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import regraft
import tiny
from regraft.artifact import assemble, save_model
from regraft.backbone import Backbone, cut_at, load_backbone
from regraft.data import read
from regraft.errors import BackboneError
from regraft.heads import INPUT, Head, View
from regraft.networks.small import FEATURES
from regraft.numerics import Numerics
from regraft.preprocess import normalise
from regraft.tuned import PICTURE, SMALL, Plot, Tuned, grow

LABELS = ("left", "right")
NUMERICS = Numerics("cpu", "float32", 16, "test")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A network that its folder describes, as `pretrain` leaves it."""
    place = tmp_path_factory.mktemp("made")
    pictures = tiny.write_pictures(place / "pictures", each=2)
    return regraft.pretrain(pictures, method="masked", out=place / "network", arch="small", epochs=1).backbone


@pytest.fixture(scope="module")
def named() -> Backbone:
    """A network by name, whose saved models hold no layer above the deepest that they read."""
    return load_backbone("scratch")


def head_on(backbone: Backbone, cut: str) -> Head:
    found = next(c for c in backbone.cuts if c.name == cut)
    channels = found.shape[-1] if found.layout != "NCHW" else found.shape[0]
    view = View(cut, 1, channels, True)
    return Head((view,), torch.zeros(2, view.dim), torch.zeros(2))


def view_of(backbone: Backbone, cut: str) -> View:
    return head_on(backbone, cut).views[0]


def changed(backbone: Backbone, start: str, end: str, **options: object) -> Tuned:
    """A part of the network whose tensors are other than the network's, as after training."""
    plot = Plot(start, (view_of(backbone, end),), 2, **options)  # type: ignore[arg-type]
    module = grow(plot, backbone)
    with torch.no_grad():
        for parameter in module.body.parameters():
            parameter.mul_(1.5)
    return Tuned(plot, module, 0.5)


def saved(backbone: Backbone, folder: Path, head: Head, tuned: Tuned | None = None, **facts: object) -> Backbone:
    folder.mkdir()
    save_model(assemble(backbone, head, LABELS, NUMERICS, tuned), backbone, folder, facts)
    return load_backbone(folder)


def prepared(backbone: Backbone) -> torch.Tensor:
    shape = (3, backbone.preprocess.channels, *backbone.preprocess.size)
    return normalise(torch.randint(0, 256, shape, dtype=torch.uint8), backbone.preprocess)


@pytest.mark.parametrize("kind", ["described", "named"])
def test_frozen_layers_come_back_and_the_curve_ends_where_the_head_reads(kind, request, tmp_path):
    backbone = request.getfixturevalue(kind)
    cut = backbone.shown[2].name
    found = saved(backbone, tmp_path / "run", head_on(backbone, cut))
    names = [c.name for c in found.cuts]
    assert cut in names
    assert names == [c.name for c in backbone.cuts][: len(names)]
    assert backbone.shown[-1].name not in names
    assert found.ends
    assert found.ends.startswith("the curve ends at")
    x = prepared(backbone)
    with torch.no_grad():
        assert torch.equal(cut_at(found, cut)[0](x), cut_at(backbone, cut)[0](x))


@pytest.mark.parametrize("kind", ["described", "named"])
@pytest.mark.parametrize("start", ["map", PICTURE])
def test_trained_layers_take_the_place_of_the_frozen_ones(kind, start, request, tmp_path):
    backbone = request.getfixturevalue(kind)
    low, end = backbone.shown[1].name, backbone.shown[3].name
    tuned = changed(backbone, low if start == "map" else PICTURE, end)
    found = saved(backbone, tmp_path / "run", head_on(backbone, backbone.shown[-1].name), tuned)
    assert found.source.weights != backbone.source.weights
    assert found.trained == end
    x = prepared(backbone)
    with torch.no_grad():
        below = cut_at(backbone, low)[0](x)
        (expected,) = tuned.module.body(below if start == "map" else x)
        torch.testing.assert_close(cut_at(found, end)[0](x), expected, rtol=1e-4, atol=1e-4)
        if start == "map":
            assert torch.equal(cut_at(found, low)[0](x), below)


def test_a_small_network_beside_the_head_leaves_the_networks_layers_alone(described, tmp_path):
    plot = Plot(INPUT, (View(SMALL, 1, FEATURES, True),), 2)
    cut = described.shown[-1].name
    found = saved(
        described, tmp_path / "run", head_on(described, cut), Tuned(plot, grow(plot, None), 0.5), classes_of=["0"]
    )
    assert not found.classes_of
    x = prepared(described)
    with torch.no_grad():
        assert torch.equal(cut_at(found, cut)[0](x), cut_at(described, cut)[0](x))


def test_a_model_that_reads_pixels_alone_is_no_backbone(tmp_path):
    data = tiny.write_pictures(tmp_path / "pictures", draw=tiny.colours)
    regraft.fit(data, tiny.TinyNet(), example=tiny.EXAMPLE, out=tmp_path / "run", budget="0trials")
    with pytest.raises(BackboneError, match="must reuse a network's layers"):
        load_backbone(tmp_path / "run")


def test_a_model_on_a_module_of_the_user_is_no_backbone_without_it(tmp_path):
    data = tiny.write_pictures(tmp_path / "pictures")
    regraft.fit(data, tiny.TinyNet(), example=tiny.EXAMPLE, out=tmp_path / "run", budget="0trials")
    with pytest.raises(BackboneError, match="a module given in Python"):
        load_backbone(tmp_path / "run")


def test_pictures_whose_classes_a_trained_part_learned_are_told(described, tmp_path):
    data = tiny.write_pictures(tmp_path / "pictures", each=6)
    ids = regraft.curve(data, described).table.ids
    tuned = changed(described, described.shown[1].name, described.shown[-1].name)
    saved(described, tmp_path / "run", head_on(described, described.shown[-1].name), tuned, classes_of=list(ids))
    with pytest.warns(UserWarning, match=f"learned the classes of {len(ids)} of these"):
        regraft.curve(data, tmp_path / "run")


def test_a_model_on_a_fitted_backbone_needs_its_folder_no_more(described, tmp_path):
    data = tiny.write_pictures(tmp_path / "pictures", each=6)
    end = described.shown[-1].name
    found = saved(described, tmp_path / "first", head_on(described, end), changed(described, PICTURE, end))
    run = regraft.fit(data, tmp_path / "first", out=tmp_path / "second", budget="0trials")
    asked = sorted(data.rglob("*.png"))[:3]
    before = [p.ranked for p in run.model.predict(asked)]
    kept = json.loads((run.folder / "model.json").read_bytes())["backbone"]
    assert kept["weights"] == found.source.weights
    (tmp_path / "first" / "model.json").unlink()
    assert [p.ranked for p in regraft.load_model(tmp_path / "second").predict(asked)] == before


def test_fitting_keeps_the_digests_of_what_trained_layers_learned(tmp_path):
    data = tiny.write_pictures(tmp_path / "pictures", draw=tiny.tiles, each=20)
    run = regraft.fit(data, tiny.Poor(), example=tiny.EXAMPLE, out=tmp_path / "run", budget="2trials")
    learned = json.loads((run.folder / "model.json").read_bytes())["facts"]["classes_of"]
    assert run.record["ladder"]["winner"]
    assert sorted({read(example).id for example in regraft.load_data(data).examples}) == learned
