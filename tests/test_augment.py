"""Views of a picture: drawn from its digest and their number alone, of any shape, and only as was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from regraft.augment import Augment, augment_from, augmented
from regraft.errors import DataError

ID, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
ALL = Augment(crop=True, flip=True, light=True)
SHAPES = [(40, 60, 3), (60, 40, 3), (33, 33, 1), (1, 50, 3), (50, 1, 1), (1, 1, 3), (2, 3, 1)]


def picture(shape=(40, 60, 3), seed=0):
    return np.random.default_rng(seed).integers(40, 200, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_view_0_is_the_picture_and_others_are_pictures_of_no_more_pixels(shape):
    pixels = picture(shape)
    before = pixels.copy()
    assert np.array_equal(augmented(pixels, ID, 0, ALL), pixels)
    for view in range(1, 20):
        found = augmented(pixels, ID, view, ALL)
        assert found.dtype == np.uint8
        assert found.shape[2] == shape[2]
        assert all(1 <= now <= was for now, was in zip(found.shape[:2], shape[:2], strict=True))
        assert found.flags.c_contiguous
    assert np.array_equal(pixels, before)


def test_the_same_digest_and_view_are_always_drawn_alike():
    for view in range(1, 6):
        one, two = (augmented(picture(), ID, view, ALL) for _ in range(2))
        assert np.array_equal(one, two)


def test_another_view_or_another_digest_is_drawn_otherwise():
    drawn = [augmented(picture(), id_, view, ALL).tobytes() for id_ in (ID, OTHER) for view in range(1, 9)]
    assert len(set(drawn)) == 16


def test_nothing_is_changed_that_was_not_asked_for():
    pixels = picture()
    for view in range(8):
        for only in (Augment(), Augment(mix=True, noise=True)):
            assert np.array_equal(augmented(pixels, ID, view, only), pixels)


def test_a_crop_is_a_part_of_the_picture_of_at_least_60_percent_and_little_out_of_shape():
    height, width = 200, 300
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([y % 256, x % 256, x // 256], 2).astype(np.uint8)
    shapes = set()
    for view in range(1, 200):
        part = augmented(pixels, ID, view, Augment(crop=True))
        rows, columns = part.shape[:2]
        top, left = int(part[0, 0, 0]), int(part[0, 0, 1]) + 256 * int(part[0, 0, 2])
        assert np.array_equal(part, pixels[top : top + rows, left : left + columns])
        assert rows * columns > 0.59 * height * width
        assert 1 / 1.21 < (rows / height) / (columns / width) < 1.21
        shapes.add((rows, columns, top, left))
    assert len(shapes) > 150


def test_only_a_flip_that_was_asked_for_mirrors_and_half_of_the_views_are_mirrored():
    pixels = picture()
    mirrored = [
        np.array_equal(augmented(pixels, ID, view, Augment(flip=True)), pixels[:, ::-1]) for view in range(1, 201)
    ]
    kept = [np.array_equal(augmented(pixels, ID, view, Augment(flip=True)), pixels) for view in range(1, 201)]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130


def test_a_crop_or_light_alone_never_mirrors():
    ramp = np.repeat(np.linspace(60, 180, 64).astype(np.uint8)[None, :, None], 20, 0)
    for view in range(1, 40):
        for only in (Augment(crop=True), Augment(light=True)):
            row = augmented(ramp, ID, view, only)[0, :, 0].astype(int)
            assert (np.diff(row) >= 0).all()


def test_light_moves_brightness_and_contrast_by_a_fifth_at_most():
    pixels = picture(seed=3)
    for view in range(1, 60):
        found = augmented(pixels, ID, view, Augment(light=True)).astype(float)
        assert 0.79 < found.mean() / pixels.mean() < 1.21
        assert 0.75 < found.std() / pixels.std() < 1.25
    white = np.full((4, 4, 3), 255, np.uint8)
    assert augmented(white, ID, 1, Augment(light=True)).min() >= 200


def test_what_changes_pixels_is_what_stored_features_are_named_by():
    assert Augment(crop=True, mix=True).to_json() == Augment(crop=True, noise=True).to_json()
    assert Augment(crop=True).to_json() != Augment(crop=True, flip=True).to_json()


def test_augmentation_is_had_by_names():
    assert augment_from([]) == Augment()
    assert augment_from(["crop", "mix", "crop"]) == Augment(crop=True, mix=True)
    assert augment_from(iter(["flip", "light", "noise"])) == Augment(flip=True, light=True, noise=True)


REFUSED = {
    "function": lambda pixels: pixels,
    "name": "rotate",
    "case": "Flip",
    "number": 3,
    "none": None,
    "list": ["crop"],
}


@pytest.mark.parametrize("name", REFUSED.values(), ids=REFUSED.keys())
def test_functions_and_unknown_names_are_refused_in_one_sentence(name):
    with pytest.raises(DataError, match="must be drawn once for each view, to be stored: crop, flip, light") as caught:
        augment_from(["crop", name])
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
