"""Predictions for files and folders, and judgements that say what they stand on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import regraft
import tiny
from regraft.data import Dataset, load_data
from regraft.errors import DataError, PictureError
from regraft.predict import evaluate_model, per_class, predict_paths
from regraft.recipe import evaluate
from regraft.store import open_store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of three classes whose head reads the raw input, and the folder of its pictures."""
    place = tmp_path_factory.mktemp("plain")
    data = tiny.write_pictures(place / "pictures", draw=tiny.colours)
    store = open_store(place / "store")
    return regraft.fit(data, tiny.TinyNet(), example=tiny.EXAMPLE, out=place / "run", store=store), data


@pytest.fixture
def fresh(tmp_path):
    """Twelve other pictures of the same classes."""
    return tiny.write_pictures(tmp_path / "fresh", draw=tiny.colours, each=4, seed=9)


def test_folders_are_searched_as_data_sets_are_and_paths_keep_their_order(run, fresh):
    model, _ = run[0].model, run[1]
    (fresh / "ant" / ".ipynb_checkpoints").mkdir()
    shutil.copy(fresh / "ant" / "0.png", fresh / "ant" / ".ipynb_checkpoints" / "0.png")
    (fresh / "ant" / "up").symlink_to("..")
    found, left_out = predict_paths(model, [fresh / "cat" / "1.png", fresh / "ant"])
    assert [p.path for p in found] == [str(fresh / "cat/1.png"), *(str(fresh / f"ant/{i}.png") for i in range(4))]
    assert [p.label for p in found] == ["cat", "ant", "ant", "ant", "ant"]
    assert left_out == []


def test_what_cannot_be_read_is_left_out_by_name(run, fresh):
    (fresh / "ant" / "0.png").write_bytes(b"")
    found, left_out = predict_paths(run[0].model, [fresh / "ant", fresh / "gone.png"])
    assert len(found) == 3
    assert [item.where for item in left_out] == [str(fresh / "ant/0.png"), str(fresh / "gone.png")]
    assert "cannot be read: No such file or directory" in left_out[1].reason


def test_a_folder_without_pictures_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError, match="must hold pictures"):
        predict_paths(run[0].model, [tmp_path / "empty"])


def test_an_empty_path_is_not_the_folder_where_one_is(run):
    with pytest.raises(PictureError, match="found an empty path"):
        predict_paths(run[0].model, [""])


def test_evaluation_counts_what_prediction_says(run, fresh):
    shutil.move(fresh / "ant" / "0.png", fresh / "bee" / "wrong.png")
    found = evaluate(run[0].model, fresh)
    assert found.accuracy.score == pytest.approx(11 / 12)
    assert found.accuracy.low < 11 / 12 < found.accuracy.high
    assert found.confusion.tolist() == [[3, 0, 0], [1, 4, 0], [0, 0, 4]]
    assert found.balanced_accuracy == pytest.approx((1 + 0.8 + 1) / 3)
    assert [w["where"] for w in found.worst] == ["bee/wrong.png"]
    assert found.worst[0]["predicted"] == "ant"
    json.dumps(found.to_json(), allow_nan=False)


def test_labels_are_matched_by_name_whatever_their_order_in_the_data(run, fresh):
    dataset = load_data(fresh)
    turned = Dataset(
        dataset.source,
        dataset.labels[::-1],
        tuple(type(e)(**{**vars(e), "label": 2 - e.label}) for e in dataset.examples),
    )
    assert (
        evaluate_model(run[0].model, turned).accuracy.score == evaluate_model(run[0].model, dataset).accuracy.score == 1
    )
    shutil.rmtree(fresh / "ant")
    assert evaluate(run[0].model, fresh).accuracy.score == 1


def test_a_class_that_the_model_does_not_know_is_named(run, fresh):
    (fresh / "bee").rename(fresh / "wasp")
    with pytest.raises(DataError, match="'wasp' in .* is not one of: ant, bee, cat"):
        evaluate(run[0].model, fresh)


def test_a_missing_class_has_support_zero_and_no_nan(run, fresh):
    for name in ("bee", "cat"):
        shutil.rmtree(fresh / name)
    document = evaluate(run[0].model, fresh).to_json()
    json.dumps(document, allow_nan=False)
    assert document["accuracy"] == document["balanced_accuracy"] == 1
    assert {row["label"]: row["support"] for row in document["per_class"]} == {"ant": 4, "bee": 0, "cat": 0}
    assert {row["label"]: row["recall"] for row in document["per_class"]} == {"ant": 1, "bee": None, "cat": None}


def test_an_empty_class_folder_does_not_stop_an_evaluation(run, fresh):
    shutil.rmtree(fresh / "bee")
    (fresh / "bee").mkdir()
    (fresh / "unknown").mkdir()
    assert evaluate(run[0].model, fresh).accuracy.score == 1


def test_recall_and_precision_are_stated_where_they_are_defined():
    rows = per_class(np.array([[3, 1, 0], [0, 0, 0], [1, 0, 0]]), ["a", "b", "c"])
    assert [row["recall"] for row in rows] == [0.75, None, 0]
    assert [row["precision"] for row in rows] == [0.75, 0, None]
    assert [row["support"] for row in rows] == [4, 0, 1]


def test_unreadable_pictures_are_left_out_of_an_evaluation_by_name(run, fresh):
    (fresh / "ant" / "0.png").write_bytes((fresh / "ant" / "0.png").read_bytes()[:-20])
    found = evaluate(run[0].model, fresh)
    assert [item.where for item in found.left_out] == ["ant/0.png"]
    assert found.confusion.sum() == 11
    for path in fresh.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="has none that can be read: ant/0.png"):
        evaluate(run[0].model, fresh)


def test_the_test_split_is_judged_where_there_is_one(run, tmp_path):
    tiny.write_pictures(tmp_path / "data" / "train", draw=tiny.colours, each=3)
    tiny.write_pictures(tmp_path / "data" / "test", draw=tiny.colours, each=2)
    assert evaluate(run[0].model, tmp_path / "data").confusion.sum() == 6
    shutil.rmtree(tmp_path / "data" / "train")
    assert evaluate(run[0].model, tmp_path / "data").confusion.sum() == 6


def test_pictures_of_one_group_count_together_for_the_interval(run, tmp_path):
    rng = np.random.default_rng(3)
    (tmp_path / "ant").mkdir()
    for i in range(20):  # the half called y is wrong
        Image.fromarray(tiny.colours(i % 2, rng)).save(tmp_path / "ant" / f"{'xy'[i % 2]}-{i}.png")
    alone, grouped = (evaluate(run[0].model, tmp_path, group=group).accuracy for group in (None, "^([xy])"))
    assert alone.score == grouped.score == 0.5
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
