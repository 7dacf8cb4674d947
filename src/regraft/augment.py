"""Augmentation that can be kept: every picture is drawn anew a few times, always the same few times.

A frozen part of a network is run once for each view of a picture and its answers are stored, so what changes a picture
must be drawn from the picture's own digest and the view's number, never from the step of training. Mixing two pictures
and adding noise depend on the step: they are done on stored features instead, where they cost nothing.
Knows pixels and seeds; nothing of networks or the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from regraft.errors import DataError

PIXELS = ("crop", "flip", "light")
FEATURES = ("mix", "noise")


@dataclass(frozen=True)
class Augment:
    """What may be done to a training picture.

    crop: a part of at least 60 % of the area, sides up to 1.2:1 out of shape; flip: left and right, for half of the
    views; light: brightness and contrast within 20 %.
    mix, noise: of stored features: convex mixes of two pictures (mixup, Zhang et al. 2018), noise of a tenth of their
    deviation.
    """

    crop: bool = False
    flip: bool = False
    light: bool = False
    mix: bool = False
    noise: bool = False

    def to_json(self) -> dict[str, Any]:
        """What changes pixels, and so the features that are stored."""
        return {name: on for name, on in asdict(self).items() if name in PIXELS}


def augment_from(names: Iterable[Any]) -> Augment:
    """The augmentation of these names. Raises DataError for one that cannot be stored, such as a function."""
    listed = list(names)
    for name in listed:
        if name not in PIXELS + FEATURES:
            raise DataError(
                f"Augmentation must be drawn once for each view, to be stored: {', '.join(PIXELS)} of pixels, "
                f"{', '.join(FEATURES)} of features; {name!r} is none of them: enlarge the data set with it beforehand."
            )
    return Augment(**dict.fromkeys(listed, True))


def augmented(pixels: np.ndarray, id_: str, view: int, augment: Augment) -> np.ndarray:
    """One view of a picture, uint8 (H, W, 1 or 3) of any size. View 0 is the picture itself.

    id_: hexadecimal digest of the picture; the same digest and view are always drawn alike.
    """
    if view == 0:
        return pixels
    rng = np.random.default_rng([view, *bytes.fromhex(id_[:16])])
    if augment.crop:
        pixels = _crop(pixels, rng)
    if augment.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if augment.light:
        brighter, steeper = rng.uniform(0.8, 1.2, 2)
        middle = float(pixels.mean())
        pixels = np.clip((pixels - middle) * steeper + middle * brighter, 0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _crop(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    side, shape = rng.uniform(0.6, 1) ** 0.5, float(np.exp(rng.uniform(-0.18, 0.18)))
    rows = int(np.clip(round(height * side * shape**0.5), 1, height))
    columns = int(np.clip(round(width * side / shape**0.5), 1, width))
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    return pixels[top : top + rows, left : left + columns]
