"""Preparing a picture gives what the network's own evaluation transform gives, from the decoded pixels on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from picture_makers import photograph
from regraft.errors import BackboneError
from regraft.networks.timm_networks import preprocess_of
from regraft.networks.torchvision_ops import declare_missing_operators
from regraft.preprocess import PreprocessSpec, fit_to_size, normalise, plain_spec, spec_from_json

declare_missing_operators()

import timm.data  # noqa: E402 - importable only now, beside a CPU build of torch

NETWORKS = [
    "tf_efficientnet_lite0.in1k",  # bicubic, mean and deviation 0.5
    "resnet18.tv_in1k",  # bilinear
    "resnet50.a1_in1k",
    "inception_v3.tv_in1k",  # 299
    "test_vit.r160_in1k",  # 160, shows 95 %
    "convnext_tiny.in12k_ft_in1k_384",  # stretched to a square
]
CHANGES: dict[str, dict[str, Any]] = {
    "288": {"input_size": (3, 288, 288), "crop_pct": 1.0, "interpolation": "bicubic"},
    "framed": {"crop_mode": "border", "crop_pct": 0.9, "interpolation": "bicubic"},
    "framed whole": {"crop_mode": "border", "crop_pct": 1.0},
    "stretched and cropped": {"crop_mode": "squash", "crop_pct": 0.9},
    "not square": {"input_size": (3, 128, 96), "interpolation": "bicubic"},
    "not square, stretched": {"input_size": (3, 96, 160), "crop_mode": "squash"},
    "not square, framed": {"input_size": (3, 96, 160), "crop_mode": "border"},
    "one channel": {"input_size": (1, 224, 224), "interpolation": "bicubic"},
    "one channel, framed": {"input_size": (1, 112, 112), "crop_mode": "border"},
}
"""What else networks state: each on top of the facts of resnet18."""
SIZES = [
    *[(480, 640), (640, 480), (375, 500), (333, 401), (500, 375), (1200, 900), (224, 224), (225, 223), (256, 300)],
    *[(100, 150), (151, 97), (64, 64), (8, 8), (7, 9), (30, 400), (400, 31), (1, 9), (1, 1)],
]
"""Height and width: landscape, portrait, square, smaller than the network takes, extreme."""


class Stated(torch.nn.Module):
    """A network of which only the stated facts count."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        self.pretrained_cfg = facts


def facts_of(case: str) -> dict[str, Any]:
    if case in NETWORKS:
        return dict(timm.get_pretrained_cfg(case).to_dict())
    changes = CHANGES[case]
    facts = {**timm.get_pretrained_cfg("resnet18.tv_in1k").to_dict(), **changes}
    channels = changes.get("input_size", (3,))[0]
    return facts if channels == 3 else {**facts, "mean": (0.45,), "std": (0.22,)}


def reference(pixels: np.ndarray, facts: dict[str, Any]) -> torch.Tensor:
    """timm's evaluation transform on the same pixels, before normalisation: uint8 (C, H, W)."""
    config = timm.data.resolve_data_config({}, pretrained_cfg=facts)
    transform = timm.data.create_transform(**config, is_training=False, normalize=False)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return transform(image.convert("L" if config["input_size"][0] == 1 else "RGB"))


def prepared(pixels: np.ndarray, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture as we prepare it and as timm does, for the network of that name or with those changes."""
    facts = facts_of(case)
    spec = preprocess_of(Stated(facts))
    found = fit_to_size(pixels, spec)
    assert found.shape == (spec.channels, *spec.size)
    return found, reference(pixels, facts)


def coloured(height: int, width: int) -> np.ndarray:
    return photograph(height, width).reshape(height, width, 3)


def grey(height: int, width: int) -> np.ndarray:
    return photograph(height, width, 1).reshape(height, width, 1)


# --- as the network's own transform ---


@pytest.mark.parametrize("case", [*NETWORKS, *CHANGES])
def test_pictures_of_any_size_are_exactly_those_of_the_evaluation_transform(case: str) -> None:
    for size in SIZES:
        found, expected = prepared(coloured(*size), case)
        assert torch.equal(found, expected), size


@pytest.mark.parametrize("case", ["resnet18.tv_in1k", "framed", "stretched and cropped", "one channel, framed"])
@pytest.mark.parametrize("size", [(90, 120), (300, 260), (8, 8)])
def test_grey_pictures_are_exactly_those_of_the_evaluation_transform(case: str, size: tuple[int, int]) -> None:
    found, expected = prepared(grey(*size), case)
    assert torch.equal(found, expected)


def test_normalised_values_are_those_of_the_evaluation_transform() -> None:
    facts = facts_of("resnet18.tv_in1k")
    spec = preprocess_of(Stated(facts))
    config = timm.data.resolve_data_config({}, pretrained_cfg=facts)
    pixels = coloured(224, 224)
    expected = timm.data.create_transform(**{**config, "crop_pct": 1.0}, is_training=False)(Image.fromarray(pixels))
    found = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None], spec)
    assert found.dtype == torch.float32
    assert torch.allclose(found[0], expected, atol=1e-6)


# --- grey and colour ---


def test_grey_picture_looks_the_same_to_a_colour_network_as_its_copy_in_three_channels() -> None:
    for spec in (preprocess_of(Stated(facts_of("framed"))), preprocess_of(Stated(facts_of("resnet18.tv_in1k")))):
        one = fit_to_size(grey(90, 140), spec)
        assert torch.equal(one, fit_to_size(grey(90, 140).repeat(3, 2), spec))
        assert one.shape[0] == 3


def test_grey_picture_in_three_channels_keeps_its_levels_in_a_one_channel_network() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    found = fit_to_size(levels.repeat(3, 2), plain_spec(16, 16, 1))
    assert torch.equal(found, torch.from_numpy(levels).permute(2, 0, 1))


def test_colours_become_their_luma_in_a_one_channel_network() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 1] = 200
    assert fit_to_size(pixels, plain_spec(4, 4, 1)).unique().tolist() == [round(0.587 * 200)]


# --- extreme shapes ---


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 20_000), (1, 1)])
@pytest.mark.parametrize("case", ["resnet18.tv_in1k", "framed", "stretched and cropped"])
def test_extreme_shapes_come_out_in_the_size_of_the_network(size: tuple[int, int], case: str) -> None:
    spec = preprocess_of(Stated(facts_of(case)))
    pixels = np.full((*size, 3), 90, np.uint8)
    found = fit_to_size(pixels, spec)
    assert found.shape == (3, *spec.size)
    assert 90 in found
    if spec.resize != "longest":
        assert found.unique().tolist() == [90]


def test_stretching_an_extreme_shape_keeps_both_its_ends() -> None:
    pixels = np.zeros((2, 20_000, 1), np.uint8)
    pixels[:, :5_000], pixels[:, -5_000:] = 50, 200
    found = fit_to_size(pixels, plain_spec(8, 8, 1))[0, 0]
    assert found[[0, 1, 3, 4, 6, 7]].tolist() == pytest.approx([50, 50, 0, 0, 200, 200], abs=20)


def test_centre_of_an_extreme_shape_is_what_is_kept_where_the_shortest_edge_rules() -> None:
    pixels = np.zeros((10, 4_000, 1), np.uint8)
    pixels[:, 1_990:2_010] = 255
    found = fit_to_size(pixels, preprocess_of(Stated(facts_of("resnet18.tv_in1k"))))
    assert float(found.float().mean()) > 240


EXTREME = """
import re, sys
from pathlib import Path
import numpy as np
from regraft.preprocess import PreprocessSpec, fit_to_size
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
spec = PreprocessSpec((224, 224), (256, 256), (0.5,) * 3, (0.5,) * 3, resize=sys.argv[1])
fit_to_size(np.zeros((500, 500, 3), np.uint8), spec)
before = peak()
for shape in ((1, 20_000, 3), (20_000, 1, 3), (1, 65_000, 1)):
    fit_to_size(np.zeros(shape, np.uint8), spec)
print(peak() - before)
"""


@pytest.mark.parametrize("rule", ["shortest", "longest", "stretch"])
def test_extreme_shapes_need_no_more_memory_than_others(rule: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", EXTREME, rule], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 30_000_000


# --- the spec ---


@pytest.mark.parametrize("case", [*NETWORKS, *CHANGES])
def test_spec_comes_back_from_its_json(case: str) -> None:
    spec = preprocess_of(Stated(facts_of(case)))
    assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_with_an_unknown_or_missing_field_is_refused() -> None:
    value = plain_spec(8, 8, 3).to_json()
    with pytest.raises(TypeError):
        spec_from_json({**value, "gamma": 2.2})
    with pytest.raises(TypeError):
        spec_from_json({k: v for k, v in value.items() if k != "mean"})


@pytest.mark.parametrize(
    "wrong", [{"interpolation": "lanczos"}, {"channels": 4}, {"mean": (0.5,)}, {"std": (0.5,)}, {"fill": (0,)}]
)
def test_spec_that_cannot_be_followed_is_refused_with_a_sentence(wrong: dict[str, Any]) -> None:
    facts = {"size": (8, 8), "resize_to": (8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(BackboneError, match=r"must .*; found "):
        PreprocessSpec(**{**facts, **wrong})


def test_plain_spec_stretches_and_leaves_the_levels_as_they_are() -> None:
    spec = plain_spec(3, 5, 3)
    pixels = coloured(3, 5)
    assert np.array_equal(fit_to_size(pixels, spec).permute(1, 2, 0).numpy(), pixels)
    assert float(normalise(torch.full((1, 3, 3, 5), 255, dtype=torch.uint8), spec).max()) == 1.0
