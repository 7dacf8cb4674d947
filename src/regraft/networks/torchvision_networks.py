"""Classification networks of torchvision by name: `torchvision/resnet50`, `torchvision/resnet50.IMAGENET1K_V2`.

Weights come from the cache of torch.hub (`$TORCH_HOME/hub/checkpoints`) or are downloaded there, and are read as
tensors alone. The module depends on the name, not on whether weights are asked for, so a saved model finds its own.

Not covered: networks for detection, segmentation, video or quantised numbers, and auxiliary classifiers (GoogLeNet,
Inception), which serve training from scratch and are left out.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from regraft.errors import BackboneError
from regraft.networks.torchvision_ops import declare_missing_operators
from regraft.preprocess import PreprocessSpec

PREFIX = "torchvision/"
SERVER_SECONDS = 3.0
"""A server that does not answer for so long is taken for unreachable."""
FIRST = "IMAGENET1K_V1"
"""The weights whose preparation of pictures (mostly 256 and 224 pixels) stands for those that come from elsewhere."""
WITH_AUXILIARY = {"googlenet": r"aux[12]\.", "inception_v3": r"AuxLogits\."}
"""Networks with auxiliary classifiers, and how the names of their tensors begin."""
OLD_NAMES = (r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2")
"""The weights of DenseNet have one dot more than the network."""


def create(name: str, *, pretrained: bool, seed: int = 0) -> nn.Module:
    """The torchvision network `name` in evaluation mode, with its weights, or seeded random ones unless `pretrained`.

    name: `torchvision/NAME` or `NAME`, with `.TAG` for weights other than torchvision's default ones. Raises
    BackboneError when torchvision has no such network, or its weights are neither in the cache nor to be downloaded.
    """
    models = _models()
    architecture, weights = _found(models, name)
    meta = weights.meta
    options: dict[str, Any] = {"num_classes": len(meta["categories"])}
    if architecture.startswith("vit_"):
        options["image_size"] = meta["min_size"][0]
    if architecture.startswith("maxvit"):
        options["input_size"] = meta["min_size"]
    if architecture in WITH_AUXILIARY:
        options |= {"aux_logits": False, "transform_input": True, "init_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = models.get_model(architecture, weights=None, **options)
    if pretrained:
        _fill(module, architecture, weights)
    if not pretrained and not {"image_size", "input_size"} & options.keys():
        weights = models.get_model_weights(architecture).__members__.get(FIRST, weights)
    network: Any = module
    network.stated = weights
    return module.eval()


def preprocess_of(module: nn.Module) -> PreprocessSpec:
    """The evaluation preprocessing that torchvision states for the weights; for random ones, for the first weights."""
    network: Any = module
    transform = network.stated.transforms()
    (aim,), (size,) = transform.resize_size, transform.crop_size
    return PreprocessSpec(
        size=(size, size),
        resize_to=(aim, aim),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
    )


def licence_of(module: nn.Module) -> str | None:
    """The licence of the weights where torchvision states one; most carry that of their data, which it does not."""
    network: Any = module
    stated = network.stated.meta.get("license")
    return str(stated) if stated else None


def _found(models: Any, name: str) -> tuple[str, Any]:
    """The architecture and the weights that a name means."""
    architecture, _, tag = name.removeprefix(PREFIX).partition(".")
    known = models.list_models(module=models)
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise BackboneError(f"A torchvision network must be one of torchvision.models; found {architecture!r}{hint}.")
    every = models.get_model_weights(architecture)
    if tag and tag not in every.__members__:
        raise BackboneError(
            f"The network {architecture} has no weights called {tag!r}; there are: {', '.join(every.__members__)}."
        )
    return architecture, every[tag] if tag else every.DEFAULT


def _fill(module: nn.Module, architecture: str, weights: Any) -> None:
    """Load the weights from the cache, after downloading them if need be."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(weights.url).path)
    if not path.is_file():
        _download(weights.url, path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        pattern, new = OLD_NAMES
        left_out = re.compile(WITH_AUXILIARY.get(architecture, "$^"))
        module.load_state_dict({re.sub(pattern, new, k): v for k, v in stored.items() if not left_out.match(k)})
    except Exception as e:  # unpicklers raise anything on a damaged file
        raise BackboneError(
            f"The weights in {path} must be whole and those of {architecture} ({type(e).__name__}): delete the file, "
            "and it is downloaded again."
        ) from e


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SERVER_SECONDS):
            path.parent.mkdir(parents=True, exist_ok=True)
        digits = re.search(r"-([a-f0-9]{8,})\.", path.name)
        torch.hub.download_url_to_file(url, str(path), digits and digits[1], progress=sys.stderr.isatty())
    except Exception as e:  # connection, HTTP, disk and hash errors
        raise BackboneError(
            f"The weights of {url} are neither in the local cache of torch ({path}) nor could they be downloaded "
            f"({type(e).__name__}): connect once, or use the default backbone, which needs no download."
        ) from e


def _models() -> Any:
    declare_missing_operators()
    from torchvision import models

    return models
