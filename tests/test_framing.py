"""Framings: pictures are shown whole or larger only where the data says that it helps, and the model carries it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import regraft
import tiny
from regraft import framing
from regraft.artifact import load_model
from regraft.backbone import load_backbone, reframed
from regraft.budget import budget_from
from regraft.costs import picture_seconds
from regraft.data import Dataset, Example, load_data
from regraft.depth_curve import curve_of
from regraft.errors import DataError, RunError, TraceError
from regraft.framing import Framed, frame, framings
from regraft.numerics import Numerics
from regraft.preprocess import PreprocessSpec, plain_spec
from regraft.report import render
from regraft.store import open_store

CROPPED = PreprocessSpec((64, 64), (128, 128), (0.5,) * 3, (0.25,) * 3)
NUMERICS = Numerics("cpu", "float32", 16, "test")
EACH = 20
N = 3 * EACH


def bordered(kind, rng):
    """Fine stripes whose direction is the class, but for noise in the middle, which is all that the crop shows.

    At 32 x 32, where a head sees the raw input, they drown in the noise.
    """
    y, x = np.mgrid[:128, :128]
    along = (y, x, (x + y) / 1.4)[kind]
    grey = 127 + 90 * np.sin(along * 2 * np.pi / rng.uniform(6, 7) + rng.uniform(0, 2 * np.pi))
    grey[30:98, 30:98] = rng.integers(60, 190, (68, 68))
    return np.repeat(np.clip(grey + rng.normal(0, 140, grey.shape), 0, 255).astype(np.uint8)[..., None], 3, 2)


def centred(kind, rng):
    """Such stripes, and none at the border, which the crop does not show."""
    return np.roll(bordered(kind, rng), (64, 64), (0, 1))


def network(module=None, spec=CROPPED):
    return load_backbone(module or tiny.TinyNet(), example=torch.zeros(2, 3, *spec.size), preprocess=spec)


@pytest.fixture
def small(monkeypatch):
    """Networks for 64 x 64 are shown 80 x 80 too."""
    monkeypatch.setattr(framing, "SMALLEST", 64)
    monkeypatch.setattr(framing, "STEP", 16)


def written(root, draw=bordered, each=EACH):
    return tiny.write_pictures(root, draw=draw, each=each)


def framed(data, tmp_path, backbone=None, budget="9trials", spent=0.0, seed=0):
    options = {"device": "cpu", "seed": seed, "strict": False, "allow_empty_class": False, "tested": None}
    look = partial(curve_of, store=open_store(tmp_path / "store"), say=lambda *_: None, **options)
    backbone, notes = backbone or network(), tmp_path / "notes.json"
    asked = budget_from(budget, spent=spent)
    return frame(load_data(data), backbone, look, asked, NUMERICS, seed=seed, tested=0, notes=notes)


# ---- what is worth trying ----------------------------------------------------------------------------------------


def test_a_centre_crop_is_tried_whole_and_larger():
    stated = PreprocessSpec((224, 224), (256, 256), (0.5,) * 3, (0.5,) * 3)
    (whole, first), (larger, second) = framings(stated)
    assert (whole.name, larger.name) == ("whole pictures", "larger pictures")
    assert first == replace(stated, resize="longest", resize_to=(224, 224))
    assert second == replace(first, size=(288, 288), resize_to=(288, 288))


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (plain_spec(224, 224, 3), [(288, 288)]),
        (plain_spec(28, 28, 1), []),
        (plain_spec(299, 299, 3), [(384, 384)]),
        (plain_spec(128, 160, 3), [(160, 192)]),
        (replace(plain_spec(224, 224, 3), resize="longest"), [(288, 288)]),
        (replace(plain_spec(224, 224, 3), resize_to=(248, 248)), [(224, 224), (288, 288)]),
        (replace(plain_spec(64, 64, 3), resize="shortest"), [(64, 64)]),
    ],
)
def test_what_shows_all_of_a_picture_is_tried_larger_alone_and_small_networks_are_not(spec, sizes):
    found = framings(spec)
    assert [tried.size for _, tried in found] == sizes
    assert all(tried.resize_to == tried.size for _, tried in found)


# ---- what comes of it --------------------------------------------------------------------------------------------


def test_pictures_whose_border_tells_the_class_are_shown_whole_and_the_saved_model_does_so(tmp_path, small):
    data = written(tmp_path / "data")
    run = regraft.fit(data, network(), out=tmp_path / "run", budget="1trials", augment=[])
    said = run.record["framing"]
    assert (said["chosen"], said["size"], said["pictures"]) == ("whole pictures", [64, 64], N)
    assert [tried["status"] for tried in said["tried"]] == ["finished", "finished"]
    assert said["tried"][0]["gain"][1] > 0
    model = load_model(tmp_path / "run", backbone=tiny.TinyNet())
    assert model.preprocess == framings(CROPPED)[0][1]
    paths = sorted((tmp_path / "data").rglob("*.png"))
    assert np.mean([p.label == path.parent.name for p, path in zip(model.predict(paths), paths, strict=True)]) > 0.95
    assert run.record["chosen"]["score"]["score"] > 0.9
    assert run.record["forward_passes"] >= 3 * N
    json.dumps(run.record, allow_nan=False)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Whole pictures" in page
    assert "not better than whole pictures beyond the noise" in page
    unasked = {"chosen": "as stated", "size": [64, 64], "pictures": 0, "tried": []}
    unasked["tried"] = [{**tried, "status": "skipped", "reason": "late", "gain": None} for tried in said["tried"]]
    assert "Judged on" in page
    assert "Judged on" not in render({**run.record, "framing": unasked}, lambda where: None)
    again = regraft.fit(data, network(), out=tmp_path / "again", budget="1trials", augment=[])
    assert again.record["forward_passes"] == 0
    assert again.record["framing"]["chosen"] == "whole pictures"


def test_what_wins_nothing_leaves_the_stated_preparation(tmp_path, small):
    found = framed(written(tmp_path / "data", centred), tmp_path)
    assert found.winner is None
    assert found.backbone.preprocess == CROPPED
    assert found.to_json()["chosen"] == "as stated"
    assert [a.status for a in found.attempts] == ["finished", "finished"]
    assert found.curve.choice.score.score > 0.9


def test_the_stated_score_and_the_passes_are_those_of_all_framings(tmp_path, small):
    found = framed(written(tmp_path / "data"), tmp_path)
    assert found.winner == "whole pictures"
    assert (found.curve.table.forward_passes, found.forward_passes) == (N, 2 * N)
    assert found.curve.choice.score.score <= found.attempts[0].hits.mean() + 1e-9
    assert framed(tmp_path / "data", tmp_path).forward_passes == 0


@pytest.mark.parametrize("options", [{"budget": "0trials"}, {"framing": False}], ids=["no trials", "not wanted"])
def test_a_user_can_keep_the_stated_preparation(tmp_path, options):
    given = {"budget": "1trials", "augment": [], **options}
    run = regraft.fit(written(tmp_path / "data", centred), network(), out=tmp_path / "run", **given)
    assert run.model.preprocess == CROPPED
    assert run.record["framing"]["chosen"] == "as stated"
    assert run.record["framing"]["tried"] == []


def test_a_run_is_not_another_that_was_asked_without_framing(tmp_path):
    data = written(tmp_path / "data", centred, each=8)
    for first, then in ((True, False), (False, True)):
        out = tmp_path / str(first)
        regraft.fit(data, network(), out=out, framing=first)
        with pytest.raises(RunError, match="framing was"):
            regraft.fit(data, network(), out=out, framing=then)


def test_too_few_pictures_are_not_asked(tmp_path):
    backbone = network()
    assert framed(written(tmp_path / "data", each=8), tmp_path, backbone) == Framed(backbone)


class Fixed(nn.Module):
    """A network that takes pictures of 64 x 64 alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.Linear(8 * 32 * 32, 5)

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)).flatten(1))


def test_a_network_that_takes_its_own_size_alone_is_shown_whole_pictures_and_no_larger_ones(tmp_path, small):
    with pytest.raises(TraceError):
        reframed(network(Fixed()), framings(CROPPED)[1][1])
    found = framed(written(tmp_path / "data"), tmp_path, network(Fixed()))
    assert found.winner == "whole pictures"
    assert [a.status for a in found.attempts] == ["finished", "failed"]
    assert found.attempts[1].reason.startswith("the network takes no pictures of ")


def test_a_network_shown_larger_pictures_gives_what_it_gives_there():
    large = replace(CROPPED, size=(48, 48), resize_to=(48, 48))
    module = tiny.TinyNet().eval()
    found, x = reframed(network(module), large), torch.rand(2, 3, 48, 48)
    lower, upper = regraft.cut_at(found, "stage2")
    assert torch.equal(upper(lower(x)), module(x))
    assert next(cut for cut in found.cuts if cut.name == "stage2").shape == (8, 24, 24)
    assert [cut.name for cut in found.cuts] == [cut.name for cut in network().cuts]


def test_of_a_rare_class_whole_groups_are_drawn_for_every_fold():
    labels = [0] * 900 + [1] * 24
    groups = [""] * 900 + [f"g{i // 3}" for i in range(24)]
    examples = [Example(str(i), k, "train", g) for i, (k, g) in enumerate(zip(labels, groups, strict=True))]
    drawn = framing._drawn(Dataset("", ("a", "b"), tuple(examples)), 0).examples
    rare = [e.group for e in drawn if e.label == 1]
    assert len(rare) == len([g for g in groups if g in set(rare)])
    assert len(set(rare)) >= 5


def test_of_many_pictures_that_cannot_be_judged_the_reason_is_told(tmp_path, small, monkeypatch):
    monkeypatch.setattr(framing, "MOST", 45)

    def refused(*args, **options):
        raise DataError("There must be more.")

    dataset = load_data(written(tmp_path / "data"))
    budget = budget_from("9trials")
    found = frame(dataset, network(), refused, budget, NUMERICS, seed=0, tested=0, notes=tmp_path / "notes.json")
    assert [(a.status, a.reason) for a in found.attempts] == [("failed", "There must be more")] * 2
    assert found.curve is None


def test_curves_of_other_pictures_are_not_compared(tmp_path, small):
    one = framed(written(tmp_path / "one"), tmp_path).curve
    other = framed(written(tmp_path / "other", each=EACH + 1), tmp_path).curve
    assert framing._comparable(one, one) is one
    with pytest.raises(DataError, match="the same pictures"):
        framing._comparable(other, one)


def test_of_many_pictures_some_are_asked_and_their_features_are_kept(tmp_path, small, monkeypatch):
    monkeypatch.setattr(framing, "MOST", 45)
    data = written(tmp_path / "data")
    run = regraft.fit(
        data, network(), out=tmp_path / "run", budget="1trials", augment=[], store=open_store(tmp_path / "s")
    )
    assert (run.record["framing"]["chosen"], run.record["framing"]["pictures"]) == ("whole pictures", 45)
    assert run.record["data"]["used"] == N
    assert run.record["curve"]["forward_passes"] == N - 45
    assert run.model.preprocess == framings(CROPPED)[0][1]


# ---- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "status"), {"110s": "finished", "90s": "skipped", "0s": "skipped"}.items())
def test_a_framing_may_take_a_share_of_the_time_that_is_left(tmp_path, small, monkeypatch, budget, status):
    monkeypatch.setattr(framing, "picture_seconds", lambda backbone, examples, numerics: 0.1)
    data = load_data(written(tmp_path / "data"))
    ended, reason = framing._in_time(network(), data, NUMERICS, 400, budget_from(budget))  # 40 s
    assert ended == status
    assert bool(reason) == (status == "skipped")


def test_of_many_pictures_none_are_asked_where_not_even_the_stated_framing_is_in_time(tmp_path, small, monkeypatch):
    monkeypatch.setattr(framing, "MOST", 45)
    monkeypatch.setattr(framing, "picture_seconds", lambda backbone, examples, numerics: 1.0)
    found = framed(written(tmp_path / "data"), tmp_path, budget="100s")
    assert (found.curve, found.forward_passes) == (None, 0)
    assert [a.status for a in found.attempts] == ["skipped"] * 2
    assert found.attempts[0].reason.startswith("all pictures so would take about 60 s of the ")


def test_a_picture_is_timed_at_the_size_of_its_framing(tmp_path):
    dataset = load_data(written(tmp_path / "data"))
    wide = replace(CROPPED, size=(512, 512), resize_to=(512, 512))
    near, far = (picture_seconds(b, dataset.examples, NUMERICS) for b in (network(), reframed(network(), wide)))
    assert 0 < near < far


def test_without_time_nothing_is_asked_and_a_resumed_run_judges_what_it_had_judged(tmp_path, small):
    data = written(tmp_path / "data")
    assert framed(data, tmp_path, budget="0s").attempts == ()
    fresh = framed(data, tmp_path, budget="9000s")
    assert fresh.winner == "whole pictures"
    resumed = framed(data, tmp_path, budget="1s", spent=60.0)
    assert resumed.winner == "whole pictures"
    assert [a.status for a in resumed.attempts] == ["finished", "finished"]
    ended = {"whole pictures": ["skipped", "it would take long"], "larger pictures": ["finished", ""]}
    (tmp_path / "notes.json").write_text(json.dumps(ended))
    other = framed(data, tmp_path, budget="1s", spent=60.0)
    assert {a.candidate.name: [a.status, a.reason] for a in other.attempts} == ended
    assert other.winner == "larger pictures"
    (tmp_path / "notes.json").unlink()
    killed = framed(data, tmp_path, budget="1s", spent=60.0)
    assert [(a.status, a.reason) for a in killed.attempts] == [("skipped", "no time was left")] * 2
