"""The saved model: loads anywhere, predicts the same bits, and no changed byte passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import regraft
import tiny
from conftest import SOURCES
from regraft import files
from regraft.artifact import MODEL, assemble, load_model, save_model
from regraft.backbone import load_backbone
from regraft.errors import ArtifactError, BackboneError, PictureError
from regraft.features import INPUT_SPEC
from regraft.heads import INPUT, Head, View
from regraft.numerics import pick_numerics
from regraft.preprocess import fit_to_size
from regraft.store import open_store

FLIPS = 2000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit of the tiny network: (run, folder of its pictures, the network)."""
    place = tmp_path_factory.mktemp("fitted")
    data, module = tiny.write_pictures(place / "pictures"), tiny.TinyNet()
    store = open_store(place / "store")
    return regraft.fit(data, module, example=tiny.EXAMPLE, out=place / "run", store=store), data, module


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A fit where transfer does not help: the saved model is a head on the raw input."""
    place = tmp_path_factory.mktemp("plain")
    data = tiny.write_pictures(place / "pictures", draw=tiny.colours)
    store = open_store(place / "store")
    return regraft.fit(data, tiny.TinyNet(), example=tiny.EXAMPLE, out=place / "run", store=store), data


def rows(model, items):
    return np.stack([answer.probabilities for answer in model.answers(items)])


# ---- what is saved -----------------------------------------------------------------------------------------------


def test_a_run_holds_these_files_and_no_pickle(run):
    folder = run[0].folder
    assert sorted(p.name for p in folder.iterdir()) == [MODEL.manifest, MODEL.weights, "record.json", "report.html"]
    manifest = json.loads((folder / MODEL.manifest).read_bytes())
    assert {"labels", "preprocess", "backbone", "cut", "head", "licence", "numerics", "weights", "digest"} <= set(
        manifest
    )
    assert manifest["labels"] == list(tiny.CLASSES)
    assert manifest["numerics"]["kernels"].startswith("torch")
    assert b"pickle" not in (folder / MODEL.weights).read_bytes()[:4096]


def test_the_network_of_the_user_is_left_as_it_was(tmp_path, tiny_images):
    module = tiny.TinyNet()
    module.train()
    module.stage1.eval()
    module.stem.requires_grad_(False)
    tensors = {name: t.clone() for name, t in module.state_dict().items()}
    facts = [(m.training, [p.requires_grad for p in m.parameters()]) for m in module.modules()]
    regraft.fit(tiny_images, module, example=tiny.EXAMPLE, out=tmp_path / "run")
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in module.modules()] == facts
    assert all(torch.equal(t, tensors[name]) for name, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_a_loaded_model_gives_the_bits_of_the_fitted_one(run):
    fitted, data, module = run
    loaded = load_model(fitted.folder, backbone=module)
    items = sorted(data.rglob("*.png"))
    assert np.array_equal(rows(loaded, items), rows(fitted.model, items))
    assert loaded.labels == fitted.model.labels
    assert loaded.cut == fitted.model.cut == fitted.record["chosen"]["cuts"][-1]


def test_the_saved_weights_count_not_those_of_the_module_that_is_given(run):
    fitted, data, _ = run
    loaded = load_model(fitted.folder, backbone=tiny.TinyNet(seed=5))
    items = sorted(data.rglob("*.png"))
    assert np.array_equal(rows(loaded, items), rows(fitted.model, items))


PREDICT = """
import sys, torch
torch.set_num_threads(1)
import regraft, tiny
model = regraft.load_model(sys.argv[1], backbone=tiny.TinyNet())
for p in model.predict(sys.argv[2:]):
    print(p.label, *(v.hex() for _, v in p.ranked))
fitting = {"probe", "ridge", "search", "features", "recipe", "params"}
assert not fitting & {name.removeprefix("regraft.") for name in sys.modules}, sys.modules
assert "sklearn" not in sys.modules
"""


def test_a_process_that_never_trained_gives_the_same_bits_without_the_code_that_fits(run):
    fitted, data, _ = run
    items = sorted(map(str, data.rglob("*.png")))[::5]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES), str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, fitted.folder, *items],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = [" ".join([p.label, *(v.hex() for _, v in p.ranked)]) for p in fitted.model.predict(items)]
    assert done.stdout.splitlines() == here


# ---- the same picture, the same bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_position_and_threads_change_no_bit_of_a_prediction(run, threads):
    fitted, data, _ = run
    items = sorted(data.rglob("*.png"))
    alone = np.concatenate([rows(fitted.model, [item]) for item in items])
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(rows(fitted.model, items), alone)
        for start in range(1, 9):
            assert np.array_equal(rows(fitted.model, items[start:]), alone[start:])
        assert np.array_equal(rows(fitted.model, items[::-1]), alone[::-1])
    finally:
        torch.set_num_threads(1)


def test_paths_bytes_arrays_and_pil_images_give_the_same_prediction(run):
    fitted, data, _ = run
    path = next(data.rglob("*.png"))
    with Image.open(path) as image:
        image.load()
    inputs = [str(path), path, path.read_bytes(), np.asarray(image), image]
    found = fitted.model.predict(inputs)
    assert len({p.ranked for p in found}) == 1
    assert [p.path for p in found] == [str(path), str(path), "inputs[2]", "inputs[3]", "inputs[4]"]
    assert sum(v for _, v in found[0].ranked) == pytest.approx(1)
    assert [v for _, v in found[0].ranked] == sorted((v for _, v in found[0].ranked), reverse=True)


def test_one_picture_in_place_of_a_list_is_refused(run):
    picture = np.zeros((8, 8, 3), np.uint8)
    for one in ("cat.png", Path("cat.png"), b"bytes", picture, picture[..., 0], Image.fromarray(picture)):
        with pytest.raises(PictureError, match="takes a list"):
            run[0].model.predict(one)
    assert len(run[0].model.predict(np.stack([picture, picture]))) == 2


def test_what_is_no_picture_is_named_and_the_others_are_answered(run):
    fitted, data, _ = run
    good = next(data.rglob("*.png"))
    answers = list(fitted.model.answers([b"", good, "no/such.png", *[b"x"] * 20, good]))
    assert [isinstance(a, PictureError) for a in answers] == [True, False, True, *[True] * 20, False]
    assert str(answers[0]).startswith("inputs[0] ")
    assert str(answers[2]).startswith("no/such.png cannot be read")
    with pytest.raises(PictureError, match="no/such.png"):
        fitted.model.predict([good, "no/such.png"])


# ---- the head on the raw input -----------------------------------------------------------------------------------


def test_a_head_on_the_raw_input_needs_no_network(plain_run):
    fitted, data = plain_run
    assert not fitted.record["curve"]["transfer_helps"]
    assert fitted.model.cut == "input"
    loaded = load_model(fitted.folder)
    assert loaded.source is None
    items = sorted(data.rglob("*.png"))
    assert np.array_equal(rows(loaded, items), rows(fitted.model, items))
    assert [p.label for p in loaded.predict(items)] == [item.parent.name for item in items]


def test_a_grey_model_takes_the_grey_of_colour_pictures(tmp_path):
    def bands(kind, rng):
        pixels = rng.integers(0, 60, (40, 48, 1)).astype(np.uint8)
        pixels[13 * kind : 13 * kind + 13] += 120
        return np.repeat(pixels, 3, 2)

    data = tiny.write_pictures(tmp_path / "pictures", draw=bands, grey=True)
    fitted = regraft.fit(data, tiny.TinyNet(), example=tiny.EXAMPLE, out=tmp_path / "run")
    assert fitted.record["data"]["grey"]
    model = load_model(fitted.folder)
    assert model.preprocess.channels == 1
    path = data / "bee" / "0.png"
    with Image.open(path) as image:
        grey = np.asarray(image)
    colour = np.stack([grey] * 3, 2)
    assert len({p.ranked for p in model.predict([path, grey, colour])}) == 1
    tinted = np.stack([grey, grey // 2, grey // 4], 2)
    luma = np.asarray(Image.fromarray(tinted).convert("L"))
    assert model.predict([tinted])[0].ranked == model.predict([luma])[0].ranked


# ---- damage ------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(run, tmp_path):
    folder = shutil.copytree(run[0].folder, tmp_path / "run")
    rng = np.random.default_rng(0)
    contents = {name: (folder / name).read_bytes() for name in (MODEL.manifest, MODEL.weights)}
    for i in range(FLIPS):
        name = (MODEL.manifest, MODEL.weights)[i % 2]
        place, flip = int(rng.integers(len(contents[name]))), 1 << int(rng.integers(8))
        with (folder / name).open("r+b") as f:
            f.seek(place)
            f.write(bytes([contents[name][place] ^ flip]))
            f.flush()
            with pytest.raises(ArtifactError, match=name):
                load_model(folder)
            f.seek(place)
            f.write(contents[name][place : place + 1])
    assert load_model(folder, backbone=run[2]).labels == tiny.CLASSES


@pytest.mark.parametrize("name", [MODEL.manifest, MODEL.weights])
def test_a_file_cut_short_or_gone_is_named(run, tmp_path, name):
    folder = shutil.copytree(run[0].folder, tmp_path / "run")
    data = (folder / name).read_bytes()
    for length in (*range(0, len(data), len(data) // 20), len(data) - 1):
        (folder / name).write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=name):
            load_model(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_model(folder)


def test_a_manifest_that_is_other_json_is_refused(tmp_path):
    for text in (b"[]", b"{}", b'{"digest": 1}', b"[" * 100_000, b"\xff", b"null"):
        (tmp_path / MODEL.manifest).write_bytes(text)
        with pytest.raises(ArtifactError, match="must be as it was written"):
            load_model(tmp_path)


@pytest.mark.parametrize("name", [MODEL.manifest, MODEL.weights])
def test_a_file_of_another_model_is_refused(run, plain_run, tmp_path, name):
    folder = shutil.copytree(run[0].folder, tmp_path / "run")
    shutil.copy(plain_run[0].folder / name, folder / name)
    with pytest.raises(ArtifactError, match="belongs to another model"):
        load_model(folder)


def test_a_save_that_is_killed_leaves_no_model_rather_than_a_mixed_one(run, plain_run, tmp_path, monkeypatch):
    fitted, _, module = run
    backbone = regraft.load_backbone(module, example=tiny.EXAMPLE)
    fitted_before = shutil.copytree(plain_run[0].folder, tmp_path / "run")
    replaced = os.replace

    class Killed(BaseException):
        """Stands for the end of the process."""

    def killed_at_the_manifest(source, target):
        if Path(target).name == MODEL.manifest:
            raise Killed
        replaced(source, target)

    monkeypatch.setattr(files.os, "replace", killed_at_the_manifest)
    with pytest.raises(Killed):
        save_model(fitted.model, backbone, fitted_before, {})
    with pytest.raises(ArtifactError, match="must hold a finished model"):
        load_model(fitted_before)


def test_a_model_on_a_given_module_says_what_it_needs(run):
    with pytest.raises(BackboneError, match="backbone=module"):
        load_model(run[0].folder)

    class Other(tiny.TinyNet):
        def __init__(self):
            super().__init__()
            self.stem[0] = nn.Conv2d(3, 8, 3, padding=1)

    with pytest.raises(ArtifactError, match=r"stem.*\(8, 3, 5, 5\) instead of \(8, 3, 3, 3\)"):
        load_model(run[0].folder, backbone=Other())


def test_models_of_equal_parts_are_equal_files(run, tmp_path):
    fitted, _, module = run
    backbone = regraft.load_backbone(module, example=tiny.EXAMPLE)
    for name in ("one", "two"):
        save_model(replace(fitted.model), backbone, tmp_path / name, {"seed": 1})
    for name in (MODEL.manifest, MODEL.weights):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---- other machines ----------------------------------------------------------------------------------------------


def test_a_processor_with_fewer_instructions_gives_the_same_labels_and_probabilities_within_a_hundredth(run):
    fitted, data, _ = run
    items = sorted(map(str, data.rglob("*.png")))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCES), str(Path(__file__).parent)]),
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, fitted.folder, *items],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line, here in zip(done.stdout.splitlines(), fitted.model.predict(items), strict=True):
        label, *values = line.split()
        assert label == here.label
        assert np.allclose([float.fromhex(v) for v in values], [v for _, v in here.ranked], atol=0.01)


def test_a_model_on_the_raw_input_prepares_pictures_as_its_features_were_prepared() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3)).astype(np.uint8)
    head = Head((View(INPUT, 1, 3072, True),), torch.zeros(2, 3072), torch.zeros(2))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    backbone = load_backbone(network, example=torch.zeros(2, 3, 8, 8))
    model = assemble(backbone, head, ("a", "b"), pick_numerics("cpu"))
    assert torch.equal(fit_to_size(pixels, model.preprocess), fit_to_size(pixels, INPUT_SPEC))
