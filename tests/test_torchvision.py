"""Networks of torchvision: their cuts, weights from the cache alone, preparation of pictures, refusals."""

from __future__ import annotations

import copy
import functools
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from regraft.backbone import load_backbone, rebuild
from regraft.errors import BackboneError
from regraft.graph import Trace, trace
from regraft.networks.torchvision_networks import create, licence_of, preprocess_of
from regraft.preprocess import fit_to_size, normalise
from whole_and_parts import assert_a_step_trains, assert_parts_are_the_whole, blocks_and_cuts, some

QUICK = (
    ("resnet18", 64, ["BasicBlock"], 8),
    ("mobilenet_v3_small", 64, ["InvertedResidual"], 11),
    ("swin_t", 64, ["SwinTransformerBlock"], 12),
    ("regnet_y_400mf", 64, ["ResBottleneckBlock"], 16),
    ("googlenet", 64, ["Inception"], 9),
)
SLOW = (
    ("convnext_tiny", 64, ["CNBlock"], 18),
    ("vit_b_16", 224, ["EncoderBlock"], 12),
    ("efficientnet_b0", 64, ["MBConv"], 16),
    ("densenet121", 64, ["_DenseBlock", "_Transition"], 7),
    ("inception_v3", 96, [f"Inception{letter}" for letter in "ABCDE"], 11),
    ("maxvit_t", 224, ["MaxVitLayer"], 11),
    ("shufflenet_v2_x0_5", 64, ["InvertedResidual"], 16),
)


@functools.cache
def traced(name: str, side: int) -> Trace:
    return trace(create(f"torchvision/{name}", pretrained=False), torch.zeros(1, 3, side, side))


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and an empty cache of torch, whose folder of weights this is."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def stored(folder: Path, file: str, module: nn.Module) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), folder / file)
    return folder / file


# ---- cuts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side", "kinds", "count"), QUICK, ids=[name for name, *_ in QUICK])
def test_a_network_falls_apart_after_every_block(name: str, side: int, kinds: list[str], count: int) -> None:
    network = traced(name, side)
    blocks, cuts = blocks_and_cuts(network, kinds)
    assert (len(blocks), cuts) == (count, blocks)
    assert_parts_are_the_whole(network, side, some(network, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "kinds", "count"), QUICK + SLOW, ids=[name for name, *_ in QUICK + SLOW])
def test_every_network_falls_apart_after_every_block(name: str, side: int, kinds: list[str], count: int) -> None:
    network = traced(name, side)
    blocks, cuts = blocks_and_cuts(network, kinds)
    print(f"{name:20s} cuts {len(network.cuts):4d}   shown {len(some(network, 99)):3d}   blocks {len(cuts):3d}")
    assert (len(blocks), cuts) == (count, blocks)
    assert_parts_are_the_whole(network, side, some(network, 6 if side < 224 else 2))


def test_a_part_can_be_trained() -> None:
    assert_a_step_trains(traced("resnet18", 64), 64, "layer3")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out(name: str) -> None:
    module = create(f"torchvision/{name}", pretrained=False).train()
    assert isinstance(module(torch.randn(2, 3, 96, 96)), torch.Tensor)
    assert not any(path.lower().startswith("aux") for path in module.state_dict())


# ---- weights ------------------------------------------------------------------------------------------------------


def test_random_weights_come_from_the_seed_and_leave_the_state_of_the_caller() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (create("torchvision/squeezenet1_1", pretrained=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    weights = [next(m.parameters()) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not first.training


def test_weights_in_the_cache_are_loaded_without_asking_the_network(unreachable: Path) -> None:
    donor = create("torchvision/resnet18", pretrained=False, seed=7)
    stored(unreachable, "resnet18-f37072fd.pth", donor)
    loaded = create("torchvision/resnet18", pretrained=True)
    assert all(
        torch.equal(a, b) for a, b in zip(donor.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_a_network_in_the_cache_becomes_a_backbone_with_what_torchvision_states(unreachable: Path) -> None:
    stored(unreachable, "resnet18-f37072fd.pth", create("torchvision/resnet18", pretrained=False, seed=7))
    found = load_backbone("torchvision/resnet18")
    assert (found.preprocess.size, found.preprocess.resize_to) == ((224, 224), (256, 256))
    assert found.source.pretrained
    again = rebuild(found.source, found.preprocess)
    assert again.module.state_dict().keys() == found.module.state_dict().keys()


def test_weights_with_auxiliary_classifiers_fit_the_network_without(unreachable: Path) -> None:
    donor = create("torchvision/googlenet", pretrained=False, seed=7)
    with_aux = copy.deepcopy(donor)
    with_aux.aux1, with_aux.aux2 = nn.Linear(2, 2), nn.Linear(2, 2)
    stored(unreachable, "googlenet-1378be20.pth", with_aux)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(create("torchvision/googlenet", pretrained=True)(x), donor.eval()(x))


def test_the_old_names_of_densenet_are_understood(unreachable: Path) -> None:
    donor = create("torchvision/densenet121", pretrained=False, seed=7)
    old = {}
    for name, tensor in donor.state_dict().items():
        for part in ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2"):
            name = name.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in name else name
        old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    unreachable.mkdir(parents=True)
    torch.save(old, unreachable / "densenet121-a639ec97.pth")
    loaded = create("torchvision/densenet121", pretrained=True)
    assert all(
        torch.equal(a, b) for a, b in zip(donor.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_weights_neither_in_the_cache_nor_to_be_downloaded_are_missed_in_one_sentence(unreachable: Path) -> None:
    with pytest.raises(BackboneError) as caught:
        create("torchvision/resnet18", pretrained=True)
    sentence = str(caught.value)
    assert str(unreachable / "resnet18-f37072fd.pth") in sentence
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in sentence
    assert "\n" not in sentence


class Canary:
    """Makes a file when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_of_weights_is_not_run(unreachable: Path, tmp_path: Path) -> None:
    unreachable.mkdir(parents=True)
    torch.save({"conv1.weight": Canary(tmp_path / "canary")}, unreachable / "resnet18-f37072fd.pth")
    with pytest.raises(BackboneError, match="must be whole and those of resnet18"):
        create("torchvision/resnet18", pretrained=True)
    assert not (tmp_path / "canary").exists()
    torch.load(unreachable / "resnet18-f37072fd.pth", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_weights_of_another_network_are_refused(unreachable: Path) -> None:
    stored(unreachable, "resnet18-f37072fd.pth", create("torchvision/squeezenet1_1", pretrained=False))
    with pytest.raises(BackboneError, match="must be whole and those of resnet18"):
        create("torchvision/resnet18", pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet19", "must be one of torchvision.models; found 'resnet19'; nearest: .*resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "must be one of torchvision.models"),
        ("torchvision/resnet50.V3", "no weights called 'V3'; there are: IMAGENET1K_V1, IMAGENET1K_V2"),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(name: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        create(name, pretrained=True)


# ---- preparation and licence --------------------------------------------------------------------------------------


def test_pictures_are_prepared_as_torchvision_does(unreachable: Path) -> None:
    from torchvision.models import ResNet18_Weights

    stored(unreachable, "resnet18-f37072fd.pth", create("torchvision/resnet18", pretrained=False))
    spec = preprocess_of(create("torchvision/resnet18", pretrained=True))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 410, 3)).astype(np.uint8)
    ours = normalise(fit_to_size(pixels, spec)[None], spec)
    theirs = ResNet18_Weights.DEFAULT.transforms()(Image.fromarray(pixels))[None]
    assert ours.shape == (1, 3, 224, 224)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_named_weights_bring_their_own_preparation(unreachable: Path) -> None:
    donor = create("torchvision/resnet50", pretrained=False)
    stored(unreachable, "resnet50-11ad3fa6.pth", donor)
    stored(unreachable, "resnet50-0676ba61.pth", donor)
    aims = [
        preprocess_of(create(f"torchvision/resnet50{tag}", pretrained=True)).resize_to for tag in ("", ".IMAGENET1K_V1")
    ]
    assert aims == [(232, 232), (256, 256)]


def test_weights_from_elsewhere_get_the_usual_preparation() -> None:
    spec = preprocess_of(create("torchvision/resnet50", pretrained=False))
    assert (spec.size, spec.resize_to, spec.mean) == ((224, 224), (256, 256), (0.485, 0.456, 0.406))
    assert preprocess_of(create("torchvision/inception_v3", pretrained=False)).size == (299, 299)


def test_a_transformer_is_built_for_the_size_of_its_weights() -> None:
    module = create("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1", pretrained=False)
    assert preprocess_of(module).size == (384, 384) == (module.image_size, module.image_size)
    assert "SWAG" in (licence_of(module) or "")
    assert licence_of(create("torchvision/squeezenet1_1", pretrained=False)) is None
