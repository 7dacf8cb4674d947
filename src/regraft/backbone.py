"""A backbone: a pretrained network, its cuts, its preprocessing and where it came from."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from regraft.cut import split
from regraft.errors import BackboneError
from regraft.files import digest
from regraft.graph import Cut, Trace, trace
from regraft.networks import timm_networks
from regraft.networks.embedded import EMBEDDED
from regraft.preprocess import PreprocessSpec, plain_spec

SCRATCH = "scratch"


@dataclass(frozen=True)
class Source:
    """Where a backbone came from.

    spec: what was asked for; architecture: a timm name, or `custom` for a module given in Python.
    weights: digest of every tensor and of the graph; pretrained: False for random weights.
    """

    spec: str
    architecture: str
    weights: str
    pretrained: bool
    licence: str | None

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode with the places where it can be cut.

    module: regraft's own copy; trace: its graph and cuts; preprocess: how pictures become its input.
    """

    module: nn.Module
    trace: Trace
    preprocess: PreprocessSpec
    source: Source

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All cuts in order of depth."""
        return self.trace.cuts

    @property
    def shown(self) -> tuple[Cut, ...]:
        """The 10-25 cuts that a curve is drawn over."""
        return tuple(cut for cut in self.trace.cuts if cut.shown)


def load_backbone(
    spec: str | nn.Module | Backbone = "default",
    *,
    example: torch.Tensor | None = None,
    preprocess: PreprocessSpec | None = None,
    seed: int = 0,
) -> Backbone:
    """The backbone that `spec` names, with its weights and the preprocessing it was trained with.

    spec: `default` (EfficientNet-Lite0, ImageNet, no download), `scratch` (the same network with random weights drawn
        from `seed`), a timm name (`resnet50.a1_in1k`), or any `nn.Module` together with `example`, a batch of the
        input it takes, (n, channels, height, width). The module is copied: the caller's stays as it is.
    preprocess: instead of what the network states; modules that state nothing get their input stretched to the
        example's size with values in [0, 1].

    Raises BackboneError when there is no such network or no weights, TraceError when it cannot be followed.
    """
    if isinstance(spec, Backbone):
        return spec
    if isinstance(spec, nn.Module):
        return _from_module(spec, example, preprocess)
    name = EMBEDDED if spec in ("default", SCRATCH) else spec
    pretrained = spec != SCRATCH
    module = timm_networks.create(name, pretrained=pretrained, seed=seed)
    stated = preprocess or timm_networks.preprocess_of(module)
    licence = timm_networks.licence_of(module, name) if pretrained else None
    return _assemble(module, _blank(stated), stated, Source(spec, name, "", pretrained, licence))


def cut_at(backbone: Backbone, name: str) -> tuple[nn.Module, nn.Module]:
    """The part of a backbone below the cut called `name`, and the part above it: `upper(lower(x)) == module(x)`.

    Both hold the parameters of `backbone.module` itself and start in its mode. Raises CutError, which names the
    nearest cuts, where there is none of that name.

        >>> lower, upper = cut_at(load_backbone(), "blocks.3")
    """
    return split(backbone.trace, name)


def rebuild(source: Source, preprocess: PreprocessSpec) -> Backbone:
    """The network of a saved model with random weights, for its own to be loaded into.

    Raises BackboneError for a module that was given in Python: only its owner can build it again.
    """
    if source.architecture == "custom":
        raise BackboneError(
            "This model was fitted on a module given in Python: load it with regraft.load_model(path, backbone=module)."
        )
    module = timm_networks.create(source.architecture, pretrained=False)
    return _assemble(module, _blank(preprocess), preprocess, source)


def weights_digest(module: nn.Module, code: str) -> str:
    """Content hash of every parameter and buffer by name, of the plain settings of every layer, and of `code`.

    Buffers that are not saved count as well, and so do settings that a layer does not print.
    """
    parts: list[bytes | memoryview] = [code.encode()]
    for path, layer in module.named_modules():
        settings = {k: v for k, v in vars(layer).items() if k != "training" and _is_plain(v)}
        parts.append(f"{path} {type(layer).__qualname__} {sorted(settings.items())}".encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest(*parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _from_module(module: nn.Module, example: torch.Tensor | None, preprocess: PreprocessSpec | None) -> Backbone:
    if example is None or example.dim() != 4 or example.shape[1] not in (1, 3):
        found = "none" if example is None else tuple(example.shape)
        raise BackboneError(
            "A module given in Python needs example=, a batch of pictures it takes, (n, 1 or 3, height, width); "
            f"found {found}."
        )
    _, channels, height, width = example.shape
    copied = copy.deepcopy(module).eval()
    spec = preprocess or plain_spec(height, width, channels)
    return _assemble(copied, example.detach().clone(), spec, Source("module", "custom", "", True, None))


def _assemble(module: nn.Module, example: torch.Tensor, preprocess: PreprocessSpec, source: Source) -> Backbone:
    traced = trace(module, example)
    weights = weights_digest(module, f"{traced.graph.python_code('self').src}\n{module}")
    return Backbone(module, traced, preprocess, replace(source, weights=source.weights or weights))


def _blank(spec: PreprocessSpec) -> torch.Tensor:
    return torch.zeros(2, spec.channels, *spec.size)
