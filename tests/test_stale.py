"""Features are reused exactly while everything that shaped them is the same: each change alone computes them anew."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from feature_trials import CUTS, NUMERICS, tiny, values
from regraft import features, frozen
from regraft.backbone import Backbone, load_backbone
from regraft.data import Dataset, load_data
from regraft.features import FeatureTable, extract, feature_keys
from regraft.frozen import freeze_lower
from regraft.heads import INPUT
from regraft.numerics import Numerics
from regraft.preprocess import PreprocessSpec, plain_spec
from regraft.store import FeatureStore, open_store
from tiny import EXAMPLE, TinyNet, write_pictures

SPEC = PreprocessSpec(
    size=(32, 32), resize_to=(36, 36), mean=(0.5,) * 3, std=(0.25,) * 3, resize="shortest", interpolation="bicubic"
)
OTHER_SPEC: dict[str, Any] = {
    "size": (24, 32),
    "resize_to": (40, 40),
    "mean": (0.5, 0.5, 0.4),
    "std": (0.25, 0.25, 0.3),
    "resize": "stretch",
    "interpolation": "bilinear",
    "fill": (1, 0, 0),
    "reducing_gap": 2.0,
}
"""Another value for every field of the preprocessing that can change alone."""
OTHER_NUMERICS: dict[str, Any] = {
    "device": "cuda",
    "precision": "bfloat16",
    "batch": 4,
    "kernels": "other",
    "layout": "contiguous",
    "emulated": True,
}


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return load_data(write_pictures(tmp_path / "pictures", each=3))


@pytest.fixture
def kept(tmp_path: Path) -> FeatureStore:
    return open_store(tmp_path / "kept")


def network(module: torch.nn.Module | None = None, spec: PreprocessSpec = SPEC) -> Backbone:
    return load_backbone(module or TinyNet(), example=EXAMPLE, preprocess=spec)


def run(
    data: Dataset,
    kept: FeatureStore,
    backbone: Backbone | None = None,
    *,
    cuts: Sequence[str] = CUTS,
    numerics: Numerics = NUMERICS,
) -> FeatureTable:
    return extract(data, backbone or network(), cuts, kept, numerics)


def keys(spec: PreprocessSpec = SPEC, numerics: Numerics = NUMERICS) -> dict[str, str]:
    """The digest of each key of the tiny network, whatever this machine can run."""
    found = network(spec=spec)
    lower = replace(freeze_lower(found.trace, CUTS, spec, NUMERICS), numerics=numerics)
    return {name: key.digest for name, key in feature_keys(lower, found.source.weights).items()}


# --- misses ---


def test_one_weight_changed_by_its_last_bit_computes_all_anew(data: Dataset, kept: FeatureStore) -> None:
    run(data, kept)
    module = TinyNet()
    with torch.no_grad():
        weight = module.stage2[1].conv2.weight.view(-1)
        weight[7] = torch.nextafter(weight[7], torch.tensor(9.0))
    assert run(data, kept, network(module)).forward_passes == 9
    assert run(data, kept).forward_passes == 0  # and the old features are still there


def test_one_running_statistic_changed_computes_all_anew(data: Dataset, kept: FeatureStore) -> None:
    run(data, kept)
    module = TinyNet()
    module.stage1.bn1.running_var[0] *= 1.5
    assert run(data, kept, network(module)).forward_passes == 9


@pytest.mark.parametrize("changed", OTHER_SPEC)
def test_preprocessing_changed_in_one_fact_computes_all_anew(changed: str, data: Dataset, kept: FeatureStore) -> None:
    before = run(data, kept)
    after = run(data, kept, network(spec=replace(SPEC, **{changed: OTHER_SPEC[changed]})))
    assert after.forward_passes == 9
    assert run(data, kept).forward_passes == 0
    if changed not in ("fill", "reducing_gap"):  # these do nothing to pictures as small as ours
        assert (values(before, "stage1") != values(after, "stage1")).any()


def test_every_fact_of_the_preprocessing_is_in_the_keys_of_the_cuts() -> None:
    alone = {f.name for f in fields(PreprocessSpec)} - {"channels", "antialias"}
    assert alone == set(OTHER_SPEC)  # a fact that is added to the spec is added here
    before = keys()
    for name, value in OTHER_SPEC.items():
        after = keys(spec=replace(SPEC, **{name: value}))
        assert all(after[cut] != before[cut] for cut in CUTS)
        assert after[INPUT] == before[INPUT]
    grey = PreprocessSpec((32, 32), (36, 36), (0.5,), (0.25,), channels=1, fill=(0,))
    assert grey.to_json()["channels"] == 1
    assert SPEC.to_json().keys() == {f.name for f in fields(PreprocessSpec)}


def test_every_fact_of_the_numerics_is_in_the_keys_of_the_cuts() -> None:
    assert {f.name for f in fields(Numerics)} == set(OTHER_NUMERICS)
    before = keys()
    for name, value in OTHER_NUMERICS.items():
        after = keys(numerics=replace(NUMERICS, **{name: value}))
        assert all(after[cut] != before[cut] for cut in CUTS)


@pytest.mark.parametrize("changed", ["precision", "batch", "kernels", "emulated"])
def test_numerics_changed_in_one_fact_compute_all_anew(changed: str, data: Dataset, kept: FeatureStore) -> None:
    run(data, kept)
    other = replace(NUMERICS, **{changed: OTHER_NUMERICS[changed]})
    assert run(data, kept, numerics=other).forward_passes == 9
    assert run(data, kept, numerics=other).forward_passes == 0
    assert run(data, kept).forward_passes == 0


def test_another_cut_is_computed_and_shares_nothing(data: Dataset, kept: FeatureStore) -> None:
    run(data, kept, cuts=["stage1"])
    assert run(data, kept, cuts=["stage2"]).forward_passes == 9
    assert run(data, kept, cuts=["stage1", "stage2"]).forward_passes == 0
    digests = keys()
    assert len(set(digests.values())) == len(digests)


def test_cut_between_a_layer_and_its_norm_has_other_features_above_it(data: Dataset, kept: FeatureStore) -> None:
    """There the norm cannot be folded, which moves the last bits of all that follows."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Flatten(1),
    )
    backbone = network(module)
    run(data, kept, backbone, cuts=["2", "3"])
    assert run(data, kept, backbone, cuts=["0"]).forward_passes == 9
    assert run(data, kept, backbone, cuts=["0", "2"]).forward_passes == 9
    assert run(data, kept, backbone, cuts=["2"]).forward_passes == 0


def test_another_number_of_cells_computes_all_anew(
    data: Dataset, kept: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, kept, cuts=["stage1"])
    monkeypatch.setattr(frozen, "MAX_STORED", 100)
    table = run(data, kept, cuts=["stage1"])
    assert (table.forward_passes, table.shapes["stage1"]) == (9, (4, 8))


def test_another_way_of_preparing_computes_all_anew(
    data: Dataset, kept: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, kept)
    before = keys()
    monkeypatch.setattr(features, "PREPARATION", features.PREPARATION + 1)
    assert run(data, kept).forward_passes == 9
    assert not set(before.values()) & set(keys().values())


def test_another_format_of_the_store_computes_all_anew(
    data: Dataset, kept: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, kept)
    monkeypatch.setattr("regraft.store.folder.FORMAT_VERSION", 2)
    assert run(data, kept).forward_passes == 9


def test_one_changed_pixel_computes_one_picture_anew(tmp_path: Path, kept: FeatureStore) -> None:
    folder = write_pictures(tmp_path / "pictures", each=3)
    run(load_data(folder), kept)
    write_pictures(tmp_path / "others", each=3, seed=5)
    shutil.copy(tmp_path / "others" / "bee" / "1.png", folder / "bee" / "1.png")
    assert run(load_data(folder), kept).forward_passes == 1


# --- hits ---


def test_store_that_was_moved_is_a_hit(data: Dataset, kept: FeatureStore, tmp_path: Path) -> None:
    before = run(data, kept)
    kept.root.rename(tmp_path / "elsewhere")
    after = run(data, open_store(tmp_path / "elsewhere"))
    assert after.forward_passes == 0
    assert (values(after, "stage3") == values(before, "stage3")).all()


def test_data_that_were_moved_copied_or_sorted_into_other_classes_are_a_hit(
    data: Dataset, kept: FeatureStore, tmp_path: Path
) -> None:
    run(data, kept)
    (tmp_path / "pictures").rename(tmp_path / "moved")
    assert run(load_data(tmp_path / "moved"), kept).forward_passes == 0
    for i, path in enumerate(sorted((tmp_path / "moved").rglob("*.png"))):
        place = tmp_path / "sorted" / "train" / f"class {i % 2}" / f"{i}.PNG"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    assert run(load_data(tmp_path / "sorted"), kept).forward_passes == 0


def test_same_network_built_again_in_another_mode_is_a_hit(data: Dataset, kept: FeatureStore) -> None:
    run(data, kept)
    assert run(data, kept, network(TinyNet().train().requires_grad_(False))).forward_passes == 0


def test_fewer_cuts_in_another_order_are_a_hit(data: Dataset, kept: FeatureStore) -> None:
    run(data, kept)
    assert run(data, kept, cuts=[CUTS[2], CUTS[0]]).forward_passes == 0


def test_stated_preprocessing_equal_to_the_assumed_one_is_a_hit(data: Dataset, kept: FeatureStore) -> None:
    run(data, kept, tiny())
    assert run(data, kept, network(spec=plain_spec(32, 32, 3))).forward_passes == 0
