"""Mirrored pictures: whether they keep their labels is asked of the data, once."""

from __future__ import annotations

import numpy as np
import pytest

import grounds
import tiny
from regraft import flips
from regraft.flips import ASKED, flips_are_harmless


def handed(kind, rng, size=(40, 48)):
    """Class 0: rows; class 1 and 2: the two diagonals, each the mirror image of the other."""
    y, x = np.mgrid[: size[0], : size[1]]
    along = (y, (x + y) / 1.4, (x - y) / 1.4)[kind]
    grey = 127 + 90 * np.sin(along * 2 * np.pi / rng.uniform(5, 9) + rng.uniform(0, 2 * np.pi)) + rng.normal(0, 9, size)
    return np.clip(np.stack([grey] * 3, 2), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("draw", "harmless"), [(tiny.colours, True), (handed, False)])
def test_mirrored_pictures_are_allowed_only_where_they_are_answered_as_well(tmp_path, draw, harmless):
    ground = grounds.ground_of(tiny.write_pictures(tmp_path / "data", each=60, draw=draw), tiny.TinyNet())
    held = int((ground.task.folds[0] == 0).sum())
    assert flips_are_harmless(ground) == (harmless, min(held, ASKED))
    assert flips_are_harmless(ground) == (harmless, 0)


def test_few_questions_are_spread_over_all_classes(tmp_path, monkeypatch):
    """Pictures lie class by class, and those of the first keep their labels when they are mirrored."""
    ground = grounds.ground_of(tiny.write_pictures(tmp_path / "data", each=60, draw=handed), tiny.TinyNet())
    first = int(((ground.task.folds[0] == 0) & (ground.task.labels == 0)).sum())
    monkeypatch.setattr(flips, "ASKED", first)
    assert flips_are_harmless(ground) == (False, first)
