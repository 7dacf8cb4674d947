"""A checkpoint of a foreign framework, part of it, through the command line to a model that predicts alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SOURCES
from regraft.artifact import assemble, load_model, save_model
from regraft.backbone import load_backbone
from regraft.errors import BackboneError, ReaderError
from regraft.heads import Head, View
from regraft.numerics import pick_numerics
from regraft.readers import READERS, is_file_spec, read_checkpoint
from tensorflow_files import unpack

FILES = Path(__file__).parent / "parity" / "files"
NETWORKS = """
from collections import OrderedDict
from torch import nn

def mlp():
    layers = OrderedDict()
    for i in range(1, 6):
        layers[f"hidden{i}"], layers[f"act{i}"] = nn.Linear(64 if i == 1 else 8, 8), nn.ELU()
    return nn.Sequential(OrderedDict(**layers, outputs=nn.Linear(8, 10)))

def wrong():
    return nn.Sequential(OrderedDict(first=nn.Linear(64, 9), second=nn.Linear(9, 2)))

def broken():
    raise RuntimeError("no licence")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a TensorFlow 1 checkpoint (Adam's slots beside the weights), a module of networks, and pictures."""
    unpack(FILES / "tensorflow_adam.tar.xz", tmp_path)
    (tmp_path / "nets.py").write_text(NETWORKS)
    rng = np.random.default_rng(0)
    for split, each in (("train", 12), ("test", 4)):
        for kind in range(3):
            folder = tmp_path / "data" / split / "abc"[kind]
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 90, (8, 8))
                pixels[2 * kind : 2 * kind + 3] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def regraft(place: Path, *words: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "REGRAFT_CACHE": str(place / "store"), "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "regraft", *words]
    return subprocess.run(command, env=environment, cwd=where or place, capture_output=True, text=True, check=False)


def test_three_hidden_layers_of_a_tensorflow_checkpoint_are_reused_and_the_model_predicts_alone(place: Path) -> None:
    words = ["--backbone", "model.ckpt-20", "--arch", "nets:mlp", "--match", "hidden[123]"]
    done = regraft(place, "fit", "data", *words, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert "3 transposed, 3 loaded" in done.stderr
    record = json.loads(done.stdout)
    restored = record["curve"]["restored"]
    assert restored["share"] == 1
    assert {name.split(".")[-2] for name in restored["fresh"]} == {"hidden4", "hidden5", "outputs"}
    assert record["curve"]["ends"].endswith("above it network.hidden4.weight was not loaded")
    assert all("hidden4" not in point["name"] and "act4" not in point["name"] for point in record["curve"]["cuts"])
    assert record["curve"]["cuts"][-1]["name"] == "network.act3"
    (place / "nets.py").unlink()
    predicted = regraft(
        place, "predict", str(place / "run"), str(place / "data" / "test" / "a"), "--json", where=Path("/")
    )
    assert predicted.returncode == 0, predicted.stderr
    assert len(json.loads(predicted.stdout)["predictions"]) == 4


def test_features_are_those_of_the_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    backbone = load_backbone("model.ckpt-20", arch="nets:mlp", match="hidden[123]")
    x = torch.rand(2, 1, 8, 8)
    state = backbone.module.state_dict()
    h = x.flatten(1)
    for i in (1, 2, 3):
        h = torch.nn.functional.elu(h @ state[f"network.hidden{i}.weight"].T + state[f"network.hidden{i}.bias"])
    from regraft.cut import lower_at

    (found,) = lower_at(backbone.trace, ["network.act3"])(x)
    assert torch.allclose(found, h, atol=1e-6)
    stored = read_checkpoint("model.ckpt-20").tensors
    assert torch.equal(stored["hidden2/kernel"].T, state["network.hidden2.weight"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arch", "nets:wrong"], "nothing does"),
        (["--arch", "nets:nothing"], "must be importable"),
        (["--arch", "nets:broken"], "RuntimeError: no licence"),
        (["--arch", "nets:mlp", "--match", "hiden"], "matches none; nearest: hidden"),
        (["--arch", "nets:mlp", "--match", "hidden[345]"], "next to the input must be loaded"),
        (["--arch", "nets:mlp", "--rename", "hiden1=x"], "'hiden1' is not; nearest: hidden1"),
        ([], "holds weights only"),
        (["--arch", "resnet18"], "nothing does"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(place: Path, words: list[str], says: str) -> None:
    done = regraft(place, "inspect", "model.ckpt-20", *words)
    assert done.returncode == 1
    assert says in done.stderr.strip()
    assert "\n" not in done.stderr.strip()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ending", sorted(READERS))
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"hello, I am no file of weights at all" * 9, "must"),
    ],
    ids=["nothing", "pointer", "page", "words"],
)
def test_a_file_of_another_kind_gets_one_sentence_that_names_it(
    tmp_path: Path, ending: str, content: bytes, says: str
) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(ReaderError, match=says) as caught:
        read_checkpoint(path)
    sentence = str(caught.value)
    assert path.name in sentence
    assert "\n" not in sentence


def test_a_folder_with_the_name_of_a_network_is_not_taken_for_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert not is_file_spec("resnet18")
    assert is_file_spec("./resnet18/") == is_file_spec(str(tmp_path / "resnet18"))
    with pytest.raises(ReaderError, match="must be a SavedModel, a TensorFlow checkpoint or a Hugging Face model"):
        load_backbone(str(tmp_path / "resnet18"))


def test_names_take_no_options_of_files() -> None:
    with pytest.raises(BackboneError, match="Only a file of weights takes"):
        load_backbone("default", match="blocks")
    with pytest.raises(ReaderError, match="must exist; there is no missing.onnx"):
        load_backbone("missing.onnx")
    with pytest.raises(BackboneError, match="makes a network without weights"):
        load_backbone("nets:mlp")


def test_a_model_on_a_folder_of_hugging_face_predicts_when_the_folder_is_gone(place: Path) -> None:
    import transformers

    folder = place / "vit"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = load_backbone(str(folder))
    view = View("vit.layers.0", 2, 16, whole=False)
    torch.manual_seed(0)
    head = Head((view,), torch.randn(3, 16), torch.zeros(3))
    model = assemble(backbone, head, "abc", pick_numerics("cpu"))
    (place / "run").mkdir()
    save_model(model, backbone, place / "run", {})
    shutil.rmtree(folder)
    pictures = sorted((place / "data" / "test" / "a").iterdir())
    assert load_model(place / "run").predict(pictures) == model.predict(pictures)
