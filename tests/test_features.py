"""Features of a data set: one pass feeds all cuts, nothing is computed twice, nothing wrong is ever stored."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from feature_trials import CUTS, NUMERICS, assert_equal_tables, extracted, tiny, values
from regraft import features
from regraft.backbone import Backbone, load_backbone
from regraft.data import Dataset, from_arrays, load_data, read
from regraft.errors import BackboneError, DataError
from regraft.features import INPUT_SPEC, extract
from regraft.files import digest
from regraft.frozen import freeze_lower, run_frozen
from regraft.heads import INPUT
from regraft.preprocess import fit_to_size
from regraft.store import FeatureStore, open_store
from tiny import CLASSES, EXAMPLE, TinyNet, stripes, write_pictures

OPENED: Counter[str] = Counter()
"""How often each path was opened while `opening` is on."""
opening = threading.Event()


def _count_openings(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and opening.is_set():
        OPENED[os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else str(arguments[0])] += 1


sys.addaudithook(_count_openings)  # can never be removed, so it listens only while it is told to


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 pictures in 3 classes."""
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def kept(tmp_path: Path) -> FeatureStore:
    return open_store(tmp_path / "kept")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny()


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """The sizes of all batches that go through the first layer of a counting network, see `counting`."""
    SEEN.clear()
    return SEEN


SEEN: list[int] = []


def counting() -> Backbone:
    """The tiny network, which notes every batch that its first layer is given."""
    module = TinyNet()
    module.stem[0].register_forward_hook(lambda layer, inputs, output: SEEN.append(len(output)))
    found = load_backbone(module, example=EXAMPLE)
    SEEN.clear()
    return found


def more_pictures(data: Path, n: int, *, seed: int = 77) -> None:
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(stripes(i % 3, rng)).save(data / CLASSES[i % 3] / f"more-{seed}-{i}.png")


# --- one pass, all cuts ---


def test_one_pass_a_picture_feeds_every_cut(data: Path, kept: FeatureStore, passes: list[int]) -> None:
    table = extracted(data, kept, backbone=counting())
    assert table.forward_passes == 24
    assert passes == [8, 8, 8]
    assert set(table.shapes) == {*CUTS, INPUT}
    assert [values(table, cut).shape for cut in CUTS] == [(24, 128), (24, 128), (24, 128), (24, 8)]


def test_rows_are_those_of_the_frozen_part_in_the_order_of_the_examples(
    data: Path, kept: FeatureStore, backbone: Backbone
) -> None:
    table = extracted(data, kept, backbone=backbone)
    frozen = freeze_lower(backbone.trace, CUTS, backbone.preprocess, NUMERICS)
    assert [e.where for e in table.examples] == [e.where for e in load_data(data).examples]
    for i in (0, 9, 23):
        raw = read(table.examples[i])
        assert raw.id == table.ids[i] == digest((data / table.examples[i].where).read_bytes())
        pixels = raw.decode().pixels
        rows = run_frozen(frozen, fit_to_size(pixels, backbone.preprocess)[None])
        for cut, row in zip(CUTS, rows, strict=True):
            assert np.array_equal(values(table, cut)[i], row.reshape(-1))
        assert np.array_equal(values(table, INPUT)[i], fit_to_size(pixels, INPUT_SPEC).numpy().reshape(-1))


def test_chosen_rows_come_in_the_order_asked_for(data: Path, kept: FeatureStore, backbone: Backbone) -> None:
    table = extracted(data, kept, backbone=backbone)
    chosen = np.array([20, 3, 3, 11])
    assert np.array_equal(np.concatenate(list(table.rows("mean", chosen)())), values(table, "mean")[chosen])


def test_rows_that_do_not_fit_into_memory_are_read_from_the_store(
    data: Path, kept: FeatureStore, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extracted(data, kept, backbone=backbone)
    monkeypatch.setattr(features, "HELD_BYTES", 24 * 2 * 130)
    streamed = extracted(data, kept, backbone=backbone)
    assert set(streamed.held) == {"stem.0"}
    assert_equal_tables(streamed, whole)
    assert list(streamed.rows("stage1")())[0].dtype == np.float16  # and once more


def test_arrays_are_taken_as_files_are(kept: FeatureStore, backbone: Backbone) -> None:
    rng = np.random.default_rng(0)
    images = [stripes(i % 3, rng) for i in range(9)]
    table = extract(from_arrays(images, [f"class {i % 3}" for i in range(9)]), backbone, CUTS, kept, NUMERICS)
    assert table.forward_passes == len(set(table.ids)) == 9
    again = extract(from_arrays(images, [f"class {i % 3}" for i in range(9)]), backbone, CUTS, kept, NUMERICS)
    assert again.forward_passes == 0
    assert_equal_tables(table, again)


# --- never twice ---


def test_second_extraction_makes_no_pass_and_gives_the_same_bits(
    data: Path, kept: FeatureStore, passes: list[int]
) -> None:
    network = counting()
    first = extracted(data, kept, backbone=network)
    passes.clear()
    second = extracted(data, kept, backbone=network)
    assert second.forward_passes == 0
    assert passes == []
    assert_equal_tables(first, second)


def test_cached_features_equal_those_of_a_new_store(
    data: Path, kept: FeatureStore, backbone: Backbone, tmp_path: Path
) -> None:
    extracted(data, kept, backbone=backbone)
    assert_equal_tables(
        extracted(data, kept, backbone=backbone), extracted(data, open_store(tmp_path / "new"), backbone=backbone)
    )


def test_ten_percent_more_pictures_make_exactly_those(
    data: Path, kept: FeatureStore, backbone: Backbone, tmp_path: Path
) -> None:
    extracted(data, kept, backbone=backbone)
    more_pictures(data, 3)
    table = extracted(data, kept, backbone=backbone)
    assert (table.forward_passes, len(table.ids)) == (3, 27)
    assert_equal_tables(table, extracted(data, open_store(tmp_path / "new"), backbone=backbone))


def test_removed_and_touched_and_renamed_files_make_no_pass_and_leave_no_row(
    data: Path, kept: FeatureStore, backbone: Backbone
) -> None:
    before = extracted(data, kept, backbone=backbone)
    (data / "ant" / "0.png").unlink()
    (data / "ant" / "1.png").rename(data / "ant" / "renamed.png")
    for path in data.rglob("*.png"):
        os.utime(path, (1, 1))
    after = extracted(data, kept, backbone=backbone)
    assert after.forward_passes == 0
    assert len(after.ids) == 23
    row_of = dict(zip(before.ids, values(before, "stage3"), strict=True))
    assert all(np.array_equal(row_of[i], row) for i, row in zip(after.ids, values(after, "stage3"), strict=True))


def test_copies_are_computed_once_and_have_a_row_each(data: Path, kept: FeatureStore, backbone: Backbone) -> None:
    for i in range(12):
        shutil.copy(data / "ant" / f"{i % 2}.png", data / "ant" / f"copy-{i}.png")
    table = extracted(data, kept, backbone=backbone)
    assert (table.forward_passes, len(table.ids), len(set(table.ids))) == (24, 36, 24)
    row_of: dict[str, bytes] = {}
    for i, row in zip(table.ids, values(table, "stage1"), strict=True):
        assert row_of.setdefault(i, row.tobytes()) == row.tobytes()


def test_equal_pixels_in_unequal_files_have_one_digest_of_pixels(
    data: Path, kept: FeatureStore, backbone: Backbone
) -> None:
    Image.open(data / "ant" / "0.png").save(data / "ant" / "same.bmp")
    table = extracted(data, kept, backbone=backbone)
    at = {Path(e.where).name: i for i, e in enumerate(table.examples) if "ant" in e.where}
    one, other = at["0.png"], at["same.bmp"]
    assert table.ids[one] != table.ids[other]
    assert table.pixels[one] == table.pixels[other]
    assert len(set(table.pixels)) == 24


def test_another_backbone_shares_what_does_not_depend_on_it(data: Path, kept: FeatureStore) -> None:
    def bytes_kept() -> int:
        return sum(p.stat().st_size for p in kept.root.rglob("*.rec"))

    extracted(data, kept, backbone=load_backbone(TinyNet(seed=0), example=EXAMPLE), cuts=["mean"])
    first = bytes_kept()
    table = extracted(data, kept, backbone=load_backbone(TinyNet(seed=1), example=EXAMPLE), cuts=["mean"])
    assert table.forward_passes == 24
    assert bytes_kept() - first < first / 10  # the raw input is not stored again


# --- one look at each file ---


def test_each_file_is_opened_exactly_once(data: Path, kept: FeatureStore, backbone: Backbone) -> None:
    dataset = load_data(data)
    for expected in (24, 0):
        OPENED.clear()
        opening.set()
        table = extract(dataset, backbone, CUTS, kept, NUMERICS)
        opening.clear()
        assert {OPENED[str(data / e.where)] for e in dataset.examples} == {1}
        assert table.forward_passes == expected


def test_feature_belongs_to_the_bytes_that_were_hashed_when_a_file_is_replaced_meanwhile(
    data: Path, kept: FeatureStore, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = extracted(data, open_store(tmp_path / "quiet"), backbone=backbone)
    dataset, read_bytes = load_data(data), Path.read_bytes

    def and_replace(path: Path) -> bytes:
        """What a reader sees just before somebody puts another picture there."""
        found = read_bytes(path)
        if path.suffix == ".png":
            Image.new("RGB", (40, 48)).save(path)
        return found

    monkeypatch.setattr(Path, "read_bytes", and_replace)
    table = extract(dataset, backbone, CUTS, kept, NUMERICS)
    monkeypatch.undo()
    assert_equal_tables(table, expected)
    assert digest((data / "ant" / "0.png").read_bytes()) not in table.ids


# --- pictures that cannot be used ---


def test_unreadable_pictures_are_named_and_left_out(data: Path, kept: FeatureStore, backbone: Backbone) -> None:
    (data / "ant" / "torn.png").write_bytes((data / "ant" / "0.png").read_bytes()[:-40])
    (data / "bee" / "empty.jpg").write_bytes(b"")
    (data / "cat" / "page.png").write_bytes(b"<html>not found</html>")
    table = extracted(data, kept, backbone=backbone)
    assert table.forward_passes == len(table.ids) == 24
    assert [item.where for item in table.left_out] == ["ant/torn.png", "bee/empty.jpg", "cat/page.png"]
    assert all(item.where in item.reason for item in table.left_out)
    again = extracted(data, kept, backbone=backbone)
    assert again.left_out == table.left_out
    assert_equal_tables(table, again)


def test_class_of_unreadable_pictures_is_named_with_one_of_its_own_files(
    data: Path, kept: FeatureStore, backbone: Backbone
) -> None:
    (data / "ant" / "torn.png").write_bytes(b"")
    for path in (data / "bee").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"'bee' has none: .*bee/0\.png"):
        extracted(data, kept, backbone=backbone)


class Divides(nn.Module):
    """A layer, and what it gives divided by its size: by zero where the picture is black."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(x / x.abs().sum(1, keepdim=True))


def test_feature_that_is_not_finite_is_refused_with_picture_and_cut_and_never_stored(
    data: Path, kept: FeatureStore
) -> None:
    network = load_backbone(Divides(), example=EXAMPLE)
    cuts = ["stem", "truediv"]
    Image.new("RGB", (40, 48)).save(data / "bee" / "night.png")
    with pytest.raises(BackboneError, match=r"bee/night\.png at cut truediv must be finite; .*: leave the picture out"):
        extracted(data, kept, backbone=network, cuts=cuts)
    night = digest((data / "bee" / "night.png").read_bytes())
    assert all(night.encode() not in path.read_bytes() for path in kept.root.rglob("*.rec"))
    (data / "bee" / "night.png").unlink()
    table = extracted(data, kept, backbone=network, cuts=cuts)
    assert np.isfinite(values(table, "truediv")).all()
    assert table.forward_passes <= 8  # two batches were whole before it came


# --- on the way ---


def test_interrupted_extraction_keeps_what_it_computed(data: Path, kept: FeatureStore, backbone: Backbone) -> None:
    def stop_at(done: int, total: int) -> None:
        assert total == 24
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(load_data(data), backbone, CUTS, kept, NUMERICS, stop_at)
    assert extracted(data, kept, backbone=backbone).forward_passes <= 8


def test_progress_is_told_for_every_picture_in_order(data: Path, kept: FeatureStore, backbone: Backbone) -> None:
    told: list[tuple[int, int]] = []
    extract(load_data(data), backbone, CUTS, kept, NUMERICS, lambda done, total: told.append((done, total)))
    assert told == [(i, 24) for i in range(1, 25)]


# --- nothing to learn from ---


def test_no_picture_that_can_be_read_is_an_error_even_where_classes_may_be_empty(
    data: Path, kept: FeatureStore, backbone: Backbone
) -> None:
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    dataset: Dataset = load_data(data)
    with pytest.raises(DataError, match="must have a picture that can be read"):
        extract(dataset, backbone, CUTS, kept, NUMERICS, allow_empty_class=True)
