"""The textbook's experiment in examples/: its split, its figures, and one quick run, on made-up pictures."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "book_ab.py"


@pytest.fixture(scope="module")
def book_ab():
    spec = importlib.util.spec_from_file_location("book_ab", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["book_ab"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["book_ab"]


@pytest.fixture
def fashion(tmp_path):
    """A folder of idx files, half of them packed: 1,500 and 100 pictures with a bar for every class."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for kind, count in (("train", 1500), ("t10k", 100)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = chance.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 + 2 * label : 5 + 2 * label, 4:24] += 120
        pictures = struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes()
        (folder / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pictures, 1))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return folder


def test_the_split_keeps_the_two_classes_of_b_from_a(book_ab, fashion):
    train, test = book_ab.read_fashion(fashion)
    book = book_ab.split_of_the_book(train, test)
    assert len(book.a.labels) == 1200
    assert set(book.a.labels.tolist()) == set(range(8))
    assert len(book.b.labels) == 300
    assert len(book.test.labels) == 20
    assert set(book.b.labels.tolist()) == set(book.test.labels.tolist()) == {0, 1}
    both = np.flatnonzero(np.isin(train.labels, [0, 2]))
    assert (book_ab.drawn(book, "first_200", 3).images == train.images[both[:200]]).all()


def test_random_draws_are_named_by_their_seed_and_hold_200_different_pictures(book_ab, fashion):
    book = book_ab.split_of_the_book(*book_ab.read_fashion(fashion))
    drawn = [book_ab.drawn(book, "random_200", seed).images for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert len(np.unique(drawn[0].reshape(200, -1), axis=0)) == 200


def test_pictures_after_the_books_55000_are_not_learned_from(book_ab):
    images, labels = np.zeros((56_000, 28, 28), np.uint8), np.zeros(56_000, np.int64)
    images[55_000:] = 1
    labels[::2] = 1
    train = book_ab.Labelled(images, labels)
    book = book_ab.split_of_the_book(train, train)
    assert len(book.a.labels) + len(book.b.labels) == 55_000
    assert not book.a.images.any()
    assert not book.b.images.any()


def test_without_the_data_it_says_in_one_sentence_what_to_install(book_ab, tmp_path, capsys):
    assert book_ab.main(["--data", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "apt-get install dataset-fashion-mnist" in said
    assert said.count("\n") == 1


def test_reuse_freezes_first_and_leaves_the_source_as_it_was(book_ab, fashion):
    book = book_ab.split_of_the_book(*book_ab.read_fashion(fashion))
    few = book_ab.drawn(book, "first_200", 0)
    for source, reuse in ((book_ab.book_mlp(8, 0), book_ab.book_reuse), (book_ab.small_cnn(8, 0), book_ab.cnn_reuse)):
        before = {name: value.clone() for name, value in source.state_dict().items()}
        net = reuse(source, few, 5, 0)
        assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
        assert not torch.equal(
            net[1].weight if hasattr(net[1], "weight") else net[0][0].weight, next(iter(before.values()))
        )


def test_logistic_regression_is_that_of_scikit_learn(book_ab, fashion):
    linear_model = pytest.importorskip("sklearn.linear_model")
    book = book_ab.split_of_the_book(*book_ab.read_fashion(fashion))
    few = book_ab.drawn(book, "first_200", 0)
    ours = book_ab.logistic_regression(few)[1]
    theirs = linear_model.LogisticRegression(max_iter=2000, tol=1e-8).fit(few.images.reshape(200, -1) / 255, few.labels)
    assert np.allclose(ours.weight.detach().numpy(), theirs.coef_, atol=2e-3)


def test_moved_pictures_keep_their_size_and_are_filled_with_black(book_ab):
    white = torch.full((64, 1, 28, 28), 5.0)
    moved = book_ab.varied(white, torch.Generator().manual_seed(0))
    black = -book_ab.GREY.mean[0] / book_ab.GREY.std[0]
    assert moved.shape == white.shape
    assert torch.equal(moved.unique(), torch.tensor([black, 5.0]))
    assert (moved[:, :, 2:-2, 2:-2] == 5).all()


def test_agreement_with_earlier_runs_is_two_standard_errors_of_the_difference(book_ab):
    near = book_ab.against_measured("book_scratch", {"mean": 91.0, "n": 10})
    assert near == {"published": 91.85, "measured": 91.6, "allowed": 0.84, "agrees": True}
    assert not book_ab.against_measured("book_scratch", {"mean": 90.7, "n": 10})["agrees"]


def test_a_quick_run_prints_an_entry_for_each_method_and_goes_on_from_its_folder(book_ab, fashion, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--data", str(fashion), "--quick", "--json", "--out", str(out)]
    assert book_ab.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["regraft"]["first_200"]["n"] == found["regraft"]["random_200"]["n"] == 1
    assert found.keys() >= book_ab.METHODS.keys()
    assert found["regraft"]["first_200"]["mean"] > 90  # a bar in one of two places
    assert found["depth"]["cnn, first_200"]["recommended"]
    assert "near against far" in found["left_out"][0]
    assert (out / "book.svg").read_text().count("<circle") == 2 * len(book_ab.METHODS) - 1
    kept = (out / "quick-0.json").stat().st_mtime_ns
    assert book_ab.main(command) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (out / "quick-0.json").stat().st_mtime_ns == kept
