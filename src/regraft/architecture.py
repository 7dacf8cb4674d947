"""Networks by name: what a name stands for, with its own preprocessing where the name's library states one.

    resnet50.a1_in1k        timm
    torchvision/resnet50    torchvision
    hf/ORG/NAME             transformers, also the path of a local folder of that layout
    package.module:name     a function or class of the user that takes nothing and gives a module

Knows which library a name belongs to, nothing of weights in files. Not covered: user functions with arguments.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.errors import BackboneError, first_line
from regraft.networks.torchvision_ops import declare_missing_operators
from regraft.preprocess import PreprocessSpec, plain_spec

SIZES = (
    224,
    28,
    32,
    64,
    96,
    128,
    48,
    40,
    56,
    72,
    80,
    100,
    112,
    150,
    160,
    192,
    196,
    200,
    240,
    256,
    288,
    299,
    384,
    512,
    24,
    36,
    60,
    20,
    16,
    12,
)
"""Heights and widths that a network of unknown input is tried with."""


@dataclass(frozen=True)
class Architecture:
    """A module in evaluation mode, how pictures become its input (None: not stated), and the licence of its weights.

    config: JSON values that the module is built from again, where its name stands for files that may be gone.
    """

    name: str
    module: nn.Module
    preprocess: PreprocessSpec | None
    licence: str | None = None
    config: Mapping[str, Any] | None = None


def architecture(
    name: str, *, pretrained: bool, seed: int = 0, preprocess: PreprocessSpec | None = None
) -> Architecture:
    """The network called `name`, with the weights of its library or seeded random ones.

    preprocess: instead of what the network states.
    Raises BackboneError where there is no such network or its weights cannot be had.
    """
    if is_user_function(name):
        return Architecture(name, _called(name, seed), preprocess)
    package, own = "timm_networks", name
    if name.startswith("torchvision/"):
        package, own = "torchvision_networks", name.removeprefix("torchvision/")
    elif name.startswith("hf/") or is_network_folder(name):
        package, own = "huggingface", name.removeprefix("hf/")
    library = importlib.import_module(f"regraft.networks.{package}")
    module = library.create(own, pretrained=pretrained, seed=seed)
    licence = library.licence_of(module) if pretrained else None
    config = library.config_of(module) if package == "huggingface" else None
    return Architecture(name, module, preprocess or library.preprocess_of(module), licence, config)


def from_config(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module that `Architecture.config` describes, with all its tensors.

    Raises BackboneError where it cannot be built, or not of these tensors.
    """
    library = importlib.import_module("regraft.networks.huggingface")
    module: nn.Module = library.create_from_config(config, at_most=sum(t.numel() for t in tensors.values()))
    try:
        module.load_state_dict(tensors)
    except RuntimeError as e:
        raise BackboneError(
            f"The weights must have the names that transformers gives them; version {config.get('transformers')}, "
            f"which saved them, gave others than the one here: install transformers=={config.get('transformers')}."
        ) from e
    return module


def is_network_folder(name: str) -> bool:
    """Whether this is the path of a folder that describes a network of Hugging Face."""
    return (Path(name) / "config.json").exists()


def is_user_function(name: str) -> bool:
    """Whether the name is of the form package.module:function."""
    package, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in package.split("."))


def with_pictures(module: nn.Module, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, tuple[int, int, int]]:
    """A module that takes pictures, and their (channels, height, width): the given shape, else the first that works.

    A network that begins with a dense layer gets its pictures flattened (its layers then lie under `network`).
    Raises BackboneError where no usual shape works.
    """
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    candidates = [shape] if shape else _shapes(first)
    flat = nn.Sequential()
    flat.add_module("flatten", nn.Flatten())
    flat.add_module("network", module)
    reason = "it has no convolution or dense layer"
    for channels, height, width in candidates:
        for taken in (module, flat) if isinstance(first, nn.Linear) else (module,):
            try:
                with torch.no_grad():
                    taken(torch.zeros(2, channels, height, width))
            except Exception as e:  # whatever a network raises for pictures it cannot take
                reason = first_line(e, kind=True)
            else:
                return taken.eval(), (channels, height, width)
    raise BackboneError(
        f"A network must take pictures of a usual size; none of {len(candidates)} sizes works ({reason}): in Python, "
        "give the module with example=."
    )


def stated_or_found(stated: PreprocessSpec | None, module: nn.Module, shape: tuple[int, int, int]) -> PreprocessSpec:
    """The preprocessing that is stated, else pictures stretched to the shape, with values in [0, 1].

    A network that scales its input itself gets grey levels 0..255 if those are what it scales.
    """
    channels, height, width = shape
    plain = plain_spec(height, width, channels)
    if stated or not _scales_levels(module, shape):
        return stated or plain
    return replace(plain, std=(1 / 255,) * channels)


def _scales_levels(module: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether the first layer with weights reads numbers of mean 0 and deviation 1 rather from levels than from shares.

    Two runs on noise tell; the distance is in powers of ten.
    """
    noise = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    unit, levels = (_distance(_first_read(module, noise * scale)) for scale in (1, 255))
    return levels < unit


def _first_read(module: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    read: list[torch.Tensor] = []
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].float())) for m in layers]
    try:
        with torch.no_grad():
            module(pictures)
    finally:
        for hook in hooks:
            hook.remove()
    return read[0] if read else pictures


def _distance(x: torch.Tensor) -> float:
    mean, deviation = float(x.mean().abs()), max(float(x.std()), 1e-12)
    return abs(math.log10(deviation)) + math.log10(1 + mean / deviation)


def _shapes(first: nn.Module | None) -> list[tuple[int, int, int]]:
    if isinstance(first, nn.Linear):
        squares = [(c, math.isqrt(first.in_features // c)) for c in (1, 3)]
        return [(c, side, side) for c, side in squares if c * side * side == first.in_features]
    if isinstance(first, nn.Conv2d) and first.in_channels in (1, 3):
        return [(first.in_channels, size, size) for size in SIZES]
    return []


def _called(name: str, seed: int) -> nn.Module:
    package, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` has it; a console script has not
        sys.path.insert(0, os.getcwd())
    declare_missing_operators()  # the package may import torchvision
    try:
        made = getattr(importlib.import_module(package), function)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = made()
    except Exception as e:  # whatever the user's code raises
        raise BackboneError(
            f"An architecture of the form package.module:function must be importable and take nothing; {name!r} is not "
            f"({type(e).__name__}: {e}): start where its package lies, or install what it needs."
        ) from e
    if not isinstance(module, nn.Module):
        raise BackboneError(f"The function {name} must give a torch module; it gives a {type(module).__name__}.")
    return module.eval()
