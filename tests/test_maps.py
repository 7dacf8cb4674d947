"""Maps at a cut: those of the network itself, computed once for each view, from any store, and never stale."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import grounds
import tiny
from regraft import maps as maps_module
from regraft.augment import Augment, augmented
from regraft.backbone import load_backbone
from regraft.data import load_data, read
from regraft.errors import BackboneError, TrainingError
from regraft.frozen import freeze_lower, values_at_cuts
from regraft.maps import Maps, extract_maps, fit_together, map_keys, picture_views, views_stored, views_that_fit
from regraft.numerics import Numerics
from regraft.preprocess import fit_to_size, plain_spec
from regraft.store import open_store, verify

CUT = "stem"
VIEWS = 3
DRAWN = Augment(crop=True, flip=True, light=True)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny.Poor(), example=tiny.EXAMPLE)


@pytest.fixture
def data(tmp_path):
    return tiny.write_pictures(tmp_path / "data", each=7)


def listed(data):
    examples = load_data(data).examples
    return examples, [read(example).id for example in examples]


def extracted(data, backbone, *, cut=CUT, store=None, views=VIEWS, augment=DRAWN, numerics=grounds.NUMERICS, ids=None):
    examples, found = listed(data)
    return extract_maps(examples, ids or found, backbone, cut, store or open_store(), numerics, views, augment)


def expected(data, backbone, view, *, cut=CUT, augment=DRAWN):
    """Maps as one by one the network itself gives them."""
    out = []
    frozen = freeze_lower(backbone.trace, [cut], backbone.preprocess, grounds.NUMERICS)
    for example, id_ in zip(*listed(data), strict=True):
        pixels = augmented(read(example).decode().pixels, id_, view, augment)
        value = values_at_cuts(frozen, fit_to_size(pixels, backbone.preprocess)[None])[0]
        out.append(value[0].half().numpy())
    return np.stack(out)


# ---- what they are -----------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_frozen_part_for_every_view_rounded_once(data, backbone):
    maps = extracted(data, backbone)
    assert maps.values.dtype == np.float16
    assert maps.values.shape == (21, VIEWS, 3, 16, 16)
    assert maps.views == VIEWS
    for view in range(VIEWS):
        assert np.array_equal(maps.values[:, view], expected(data, backbone, view))
    assert not np.array_equal(maps.values[:, 0], maps.values[:, 1])
    assert float(np.ptp(maps.values.astype(np.float32))) > 0.1


def test_view_0_does_not_depend_on_the_augmentation(data, backbone):
    plain = extracted(data, backbone, augment=Augment())
    assert np.array_equal(plain.values[:, 0], extracted(data, backbone).values[:, 0])
    assert np.array_equal(plain.values[:, 1], plain.values[:, 0])


def test_a_batch_holds_one_view_of_each_picture(data, backbone):
    maps = extracted(data, backbone)
    rows, views = np.array([4, 0, 4, 20]), np.array([1, 0, 2, 1])
    batch = maps.batch(rows, views)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.from_numpy(maps.values[rows, views]).float())


def test_pictures_are_kept_prepared_and_undamaged(data, backbone):
    examples, ids = listed(data)
    maps = picture_views(examples, ids, backbone.preprocess, VIEWS, DRAWN)
    assert maps.values.dtype == np.uint8
    assert maps.values.shape == (21, VIEWS, 3, 32, 32)
    assert maps.forward_passes == 0
    for i, (example, id_) in enumerate(zip(examples, ids, strict=True)):
        pixels = read(example).decode().pixels
        for view in range(VIEWS):
            prepared = fit_to_size(augmented(pixels, id_, view, DRAWN), backbone.preprocess).numpy()
            assert np.array_equal(maps.values[i, view], prepared)
    assert maps.batch(np.array([1, 2]), np.array([0, 2])).dtype == torch.uint8


def test_grey_pictures_have_one_channel_where_the_network_takes_one(tmp_path):
    examples, ids = listed(tiny.write_pictures(tmp_path / "grey", grey=True, each=2))
    values = picture_views(examples, ids, plain_spec(32, 32, 1), 2, DRAWN).values
    assert values.shape == (6, 2, 1, 32, 32)


# ---- nothing twice -----------------------------------------------------------------------------------------------


def test_each_view_of_each_picture_is_pushed_through_once(data, backbone):
    first = extracted(data, backbone)
    assert first.forward_passes == 21 * VIEWS
    again = extracted(data, backbone)
    assert again.forward_passes == 0
    assert np.array_equal(first.values, again.values)
    assert extracted(data, backbone, views=2).forward_passes == 0
    more = extracted(data, backbone, views=4)
    assert more.forward_passes == 21
    assert np.array_equal(more.values[:, :VIEWS], first.values)


def test_only_new_pictures_are_pushed_through(data, backbone):
    first = extracted(data, backbone)
    rng = np.random.default_rng(9)
    for i in range(2):
        Image.fromarray(tiny.stripes(1, rng)).save(data / "bee" / f"new{i}.png")
    more = extracted(data, backbone)
    assert more.forward_passes == 2 * VIEWS
    _, ids = listed(data)
    place = {id_: i for i, id_ in enumerate(ids)}
    shutil.move(data / "bee" / "new0.png", data / "bee" / "000.png")
    (data / "bee" / "new1.png").unlink()
    moved = extracted(data, backbone)
    assert moved.forward_passes == 0
    assert np.array_equal(moved.values, more.values[[place[id_] for id_ in listed(data)[1]]])
    assert len(moved.values) == len(first.values) + 1


def test_equal_files_are_pushed_through_once(data, backbone):
    for i in range(3):
        shutil.copy(data / "ant" / "0.png", data / "ant" / f"copy{i}.png")
    maps = extracted(data, backbone)
    assert maps.forward_passes == 21 * VIEWS
    _, ids = listed(data)
    twins = [i for i, id_ in enumerate(ids) if id_ == ids[0]]
    assert len(twins) == 4
    assert all(np.array_equal(maps.values[i], maps.values[0]) for i in twins)


# ---- never stale -------------------------------------------------------------------------------------------------


def test_another_augmentation_is_computed_anew_but_for_the_picture_itself(data, backbone):
    extracted(data, backbone)
    assert extracted(data, backbone, augment=Augment(crop=True)).forward_passes == 21 * (VIEWS - 1)
    assert extracted(data, backbone, augment=Augment(crop=True, mix=True)).forward_passes == 0


def test_other_weights_cuts_preparations_and_numerics_are_computed_anew(data, backbone):
    extracted(data, backbone, views=1)
    module = tiny.Poor()
    with torch.no_grad():
        module.block[0].weight[0, 0, 0, 0] += 1e-4
    for other in (
        load_backbone(module, example=tiny.EXAMPLE),
        replace(backbone, preprocess=replace(backbone.preprocess, mean=(0.5,) * 3)),
        replace(backbone, preprocess=replace(backbone.preprocess, interpolation="bilinear")),
    ):
        assert extracted(data, other, views=1).forward_passes == 21
    assert extracted(data, backbone, cut="stem.0", views=1).forward_passes == 21
    other_kernels = Numerics("cpu", "float32", 16, "others")
    assert extracted(data, backbone, views=1, numerics=other_kernels).forward_passes == 21
    assert extracted(data, backbone, views=1).forward_passes == 0


def test_each_view_has_a_key_and_only_the_first_is_shared_between_augmentations(backbone):
    frozen = freeze_lower(backbone.trace, [CUT], backbone.preprocess, grounds.NUMERICS)
    one, other = (map_keys(frozen, "weights", 4, augment) for augment in (DRAWN, Augment(light=True)))
    assert len({key.digest for key in one}) == 4
    assert [a.digest == b.digest for a, b in zip(one, other, strict=True)] == [True, False, False, False]
    assert not {k.digest for k in map_keys(frozen, "changed", 4, DRAWN)} & {k.digest for k in one}


@pytest.mark.parametrize("kept", [True, False], ids=["maps", "pictures"])
def test_a_file_that_changed_meanwhile_is_named(data, backbone, kept):
    examples, ids = listed(data)

    def prepared():
        if kept:
            return extract_maps(examples, ids, backbone, CUT, open_store(), grounds.NUMERICS, VIEWS, DRAWN)
        return picture_views(examples, ids, backbone.preprocess, VIEWS, DRAWN)

    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(data / "bee" / "3.png")
    with pytest.raises(TrainingError, match=r"bee/3\.png changed"):
        prepared()


def test_a_map_that_is_not_finite_is_named_by_its_picture(data):
    module = tiny.Poor()
    with torch.no_grad():
        module.stem[0].weight.fill_(3e38)  # finite, and the sum of two is not
    with pytest.raises(BackboneError, match=r"The map of ant/0\.png at cut stem must be finite"):
        extracted(data, load_backbone(module, example=tiny.EXAMPLE))


# ---- what is stored and what is not ------------------------------------------------------------------------------


def test_maps_are_stored_where_they_are_no_larger_than_the_picture_whatever_is_below():
    spec = plain_spec(32, 32, 3)
    assert views_stored(10, (6, 16, 16), 0.0, spec, 4) == 4
    assert views_stored(10, (8,), 0.0, spec, 4) == 4
    assert views_stored(10, (6, 16, 17), 0.0, spec, 4) == 0
    assert views_stored(10, (6, 16, 16), 0.0, plain_spec(32, 32, 1), 4) == 0


def test_larger_maps_are_stored_where_enough_was_computed_below_them():
    spec = plain_spec(224, 224, 3)
    assert views_stored(500, (1024, 14, 14), 0.8, spec, 4) == 4  # ResNet-50 after layer3
    assert views_stored(500, (197, 384), 0.5, spec, 4) == 4  # ViT-S/16 after block 6
    assert views_stored(500, (16, 112, 112), 0.06, spec, 4) == 0  # EfficientNet-Lite0 after blocks.0


def test_where_few_views_of_maps_fit_into_memory_pictures_are_kept_instead(monkeypatch):
    spec, shape = plain_spec(224, 224, 3), (1024, 14, 14)
    view = 4 * 2 * 1024 * 14 * 14
    for views, stored in ((9, 4), (3, 3), (2, 2), (1, 0)):
        monkeypatch.setattr(maps_module, "LARGEST", views * view)
        assert views_stored(4, shape, 0.8, spec, 4) == stored
    monkeypatch.setattr(maps_module, "LARGEST", 100)
    assert views_stored(4, (8,), 0.8, spec, 4) == 1  # pictures would not fit at all


def test_maps_that_are_held_leave_room_for_so_much(monkeypatch):
    held = [Maps(np.zeros((2, 1, 10), np.uint8), 0)] * 2
    monkeypatch.setattr(maps_module, "LARGEST", 100)
    assert fit_together(held, 60)
    assert not fit_together(held, 61)


def test_as_many_views_are_held_as_fit():
    assert views_that_fit(10, (8, 16, 16), 2, 4) == 4
    assert views_that_fit(1_000_000, (8, 16, 16), 2, 4) == 1
    assert views_that_fit(10_000_000, (8, 16, 16), 2, 4) == 0
    assert views_that_fit(0, (8, 16, 16), 2, 4) == 4


def test_a_frozen_part_that_is_run_again_gives_the_batches_that_stored_maps_give(data, backbone):
    stored = extracted(data, backbone)
    frozen = freeze_lower(backbone.trace, [CUT], backbone.preprocess, grounds.NUMERICS)
    again = Maps(picture_views(*listed(data), backbone.preprocess, VIEWS, DRAWN).values, 0, frozen)
    rng = np.random.default_rng(0)
    for size in (1, 5, 16, 33):
        rows, views = rng.integers(0, 21, size), rng.integers(0, VIEWS, size)
        assert torch.equal(again.batch(rows, views), stored.batch(rows, views))
    assert sum(again.again) == 1 + 5 + 16 + 33
    assert stored.again == []


# ---- stores that fail --------------------------------------------------------------------------------------------


def records(store):
    return sorted(store.root.glob("features/*/*.rec"))


@pytest.mark.parametrize("at", [40, -1], ids=["header", "rows"])
def test_a_damaged_shard_is_computed_again(data, backbone, at):
    store = open_store()
    first = extracted(data, backbone, store=store)
    damaged = records(store)[0]
    content = bytearray(damaged.read_bytes())
    content[at] ^= 1
    damaged.write_bytes(content)
    again = extracted(data, backbone, store=store)
    assert again.forward_passes == 21
    assert np.array_equal(again.values, first.values)
    assert extracted(data, backbone, store=store).forward_passes == 0
    assert verify(store).damaged == ()


def test_a_lost_shard_is_computed_again(data, backbone):
    store = open_store()
    first = extracted(data, backbone, store=store)
    records(store)[1].unlink()
    again = extracted(data, backbone, store=store)
    assert again.forward_passes == 21
    assert np.array_equal(again.values, first.values)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC], ids=["read-only", "full"])
def test_a_store_that_takes_nothing_costs_time_and_nothing_else(data, backbone, code, monkeypatch):
    expected_values = extracted(data, backbone, store=open_store()).values

    def refused(*args):
        raise OSError(code, os.strerror(code))

    store = open_store(data.parent / "failing")
    monkeypatch.setattr(os, "fsync", refused)
    for _ in range(2):
        maps = extracted(data, backbone, store=store)
        assert maps.forward_passes == 21 * VIEWS
        assert np.array_equal(maps.values, expected_values)
    monkeypatch.undo()
    assert not records(store)


def test_a_store_with_room_for_little_costs_time_and_nothing_else(data, backbone):
    whole = extracted(data, backbone)
    store = open_store(data.parent / "small", max_bytes=2000)
    maps = extracted(data, backbone, store=store)
    assert maps.forward_passes == 21 * VIEWS
    assert np.array_equal(maps.values, whole.values)


def test_what_was_computed_before_an_interrupt_is_not_lost(data, backbone, monkeypatch):
    monkeypatch.setattr(maps_module, "WRITTEN_AT_ONCE", 6)
    examples, ids = listed(data)
    store, told = open_store(), []

    def progress(done, total):
        told.append((done, total))
        if done == 30:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        extract_maps(examples, ids, backbone, CUT, store, grounds.NUMERICS, VIEWS, DRAWN, progress)
    assert told[-1] == (30, 63)
    again = extracted(data, backbone, store=store)
    assert again.forward_passes == 33
    assert np.array_equal(again.values, extracted(data, backbone, store=open_store(data.parent / "other")).values)
