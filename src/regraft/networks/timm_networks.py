"""Networks by timm name: the module, its weights from the package, timm's cache or the hub, and its preprocessing."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from regraft.errors import BackboneError
from regraft.networks.embedded import EMBEDDED, LICENCE, load_embedded_weights
from regraft.networks.torchvision_ops import declare_missing_operators
from regraft.preprocess import PreprocessSpec

HUB_SECONDS = 3.0
"""A hub that does not answer for so long is taken for unreachable; its client would go on trying for a minute."""


def create(name: str, *, pretrained: bool, seed: int = 0) -> nn.Module:
    """The timm network `name` in evaluation mode, with its weights or, on `pretrained=False`, seeded random ones.

    Raises BackboneError when timm has no such network, or its weights are neither in the cache nor on the hub.
    """
    timm = _timm()
    downloaded = pretrained and name != EMBEDDED
    _check_name(timm, name, downloaded)
    try:
        with torch.random.fork_rng(devices=[]), _quick_hub() if downloaded else contextlib.nullcontext():
            torch.manual_seed(seed)
            module: nn.Module = timm.create_model(name, pretrained=downloaded)
    except Exception as e:  # hub clients raise dozens of classes: connection, cache, HTTP, tag and file errors
        raise BackboneError(
            f"The weights of {name} are neither in the local cache of timm ({_cache_folder()}) nor could the hub be "
            f"reached ({type(e).__name__}): connect once, or use the default backbone, which needs no download."
        ) from e
    if pretrained and not downloaded:
        load_embedded_weights(module)
        network: Any = module
        network.pretrained_cfg = {**network.pretrained_cfg, "license": LICENCE}
    return module.eval()


def preprocess_of(module: nn.Module) -> PreprocessSpec:
    """The evaluation preprocessing that timm states for the network."""
    config = _timm().data.resolve_data_config({}, model=module)
    channels, height, width = config["input_size"]
    crop = config["crop_pct"]
    mode = config["crop_mode"]
    interpolation = config["interpolation"]
    mean = _per_channel(config["mean"], channels)
    return PreprocessSpec(
        size=(height, width),
        resize_to=(math.floor(height / crop), math.floor(width / crop)),
        mean=mean,
        std=_per_channel(config["std"], channels),
        channels=channels,
        resize={"squash": "stretch", "border": "longest"}.get(mode, "shortest"),  # type: ignore[arg-type]
        interpolation=interpolation if interpolation != "random" else "bilinear",
        fill=tuple(round(255 * v) for v in mean) if mode == "border" else (0,) * channels,
    )


def licence_of(module: nn.Module) -> str | None:
    """The licence of the weights as timm states it."""
    stated = getattr(module, "pretrained_cfg", {}).get("license")
    return str(stated) if stated else None


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    known = tuple(float(v) for v in values)
    return known if len(known) == channels else (sum(known) / len(known),) * channels


def _check_name(timm: Any, name: str, with_weights: bool) -> None:
    """Raise unless timm has such a network and, if they are asked for, such weights."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise BackboneError(f"A backbone must be `default`, `scratch` or a timm name; found {name!r}{hint}.")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if with_weights and not tags:
        raise BackboneError(f"The network {architecture} has no pretrained weights in timm: choose another.")
    if with_weights and tag and tag not in tags:
        raise BackboneError(f"The network {architecture} has no weights called {tag!r}; there are: {', '.join(tags)}.")


@contextlib.contextmanager
def _quick_hub() -> Iterator[None]:
    """Let the hub's client use its cache alone while the hub does not answer."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # of whatever HTTP library the client is built on
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _timm() -> Any:
    declare_missing_operators()
    import timm
    import timm.data

    return timm
