"""The learning curve: draws that hold whole groups and every class, and what twice the labels would bring."""

from __future__ import annotations

import json

import numpy as np
import pytest

import grounds
import tiny
from conftest import regraft as command
from regraft.growth import FEWEST, Growth, draw, grow_labels
from regraft.probe import Task
from regraft.scores import Interval


def task(labels, groups):
    labels, groups = np.array(labels), np.array(groups)
    return Task(labels, groups, np.zeros((1, len(labels)), np.int64), int(labels.max()) + 1)


def test_a_part_keeps_every_class_in_its_share_and_larger_parts_hold_smaller_ones():
    labels = [0] * 80 + [1] * 40
    parts = [set(draw(task(labels, range(120)), part, seed=1)) for part in (1 / 8, 1 / 4, 1 / 2, 1.0)]
    counts = [np.bincount(np.array(labels)[sorted(part)]).tolist() for part in parts]
    assert counts == [[10, 5], [20, 10], [40, 20], [80, 40]]
    assert all(small <= large for small, large in zip(parts, parts[1:], strict=False))
    assert set(draw(task(labels, range(120)), 1 / 8, seed=2)) != parts[0]


def test_a_part_never_parts_a_group_and_keeps_a_few_of_a_small_class():
    labels, groups = [0] * 60 + [1] * 6, [i // 3 for i in range(60)] + [100 + i for i in range(6)]
    rows = draw(task(labels, groups), 1 / 8, seed=0)
    chosen = set(rows.tolist())
    for group in np.unique(groups):
        members = {i for i, g in enumerate(groups) if g == group}
        assert members <= chosen or not members & chosen
    assert sum(labels[i] == 1 for i in rows) == FEWEST


def test_scores_are_given_for_growing_sizes_and_the_last_is_that_of_all_labels(tmp_path):
    ground = grounds.ground_of(tiny.write_pictures(tmp_path / "data", each=32), tiny.TinyNet())
    cuts = [(cut.name, cut.depth) for cut in ground.backbone.shown]
    told = []
    found = grow_labels(ground.bench, ground.task, cuts, 0, lambda done, total: told.append((done, total)))
    assert [size.labels for size in found.sizes] == [12, 24, 48, 96]
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert found.sizes[-1].score.score > found.sizes[0].score.score - 0.1
    assert found.twice >= found.sizes[-1].score.score
    assert json.loads(json.dumps(found.to_json()))["sizes"][-1]["labels"] == 96


def test_too_few_sizes_say_nothing_of_more_labels(tmp_path):
    ground = grounds.ground_of(tiny.write_pictures(tmp_path / "data", each=6), tiny.TinyNet())
    cuts = [(cut.name, cut.depth) for cut in ground.backbone.shown]
    found = grow_labels(ground.bench, ground.task, cuts, 0, lambda *_: None)
    assert [size.labels for size in found.sizes] == [12, 18]
    assert found.twice is None


def test_an_error_that_halves_with_every_doubling_is_expected_to_go_on_so():
    from regraft.growth import Size, _extrapolated

    sizes = [Size(n, Interval(1 - 8 / n, 0, 1), "cut", True) for n in (20, 40, 80, 160)]
    assert _extrapolated(sizes) == pytest.approx(1 - 8 / 320)
    assert Growth(tuple(sizes), None).to_json()["with_twice_the_labels"] is None


def test_the_command_prints_the_curve_of_labels(real_run, tmp_path):
    _, data, _ = real_run
    done = command("curve", data, "--labels", "--json", cache=tmp_path.parent / "store")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["labels"]["sizes"][-1]["labels"] == 30
    assert document["labels"]["sizes"][-1]["score"] == pytest.approx(document["score"])
