"""Pixels as the network was trained to see them: one spec, read from the network's own facts, stored with the model.

Two steps. `fit_to_size` resizes and crops one picture to uint8, exactly as the original evaluation transform does;
`normalise` turns a batch of those into the floats that the network takes. Knows arrays and tensors, not files.
Not covered: augmentation (training only) and inputs that are not pictures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from regraft.errors import BackboneError

Resize = Literal["shortest", "longest", "stretch"]
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
LONGEST_RATIO = 16
"""Where the shortest edge rules, pictures longer than 16:1 are cut to their middle 16:1 first: the centre crop keeps
less, and memory stays flat."""


@dataclass(frozen=True)
class PreprocessSpec:
    """How pixels become the input of one network.

    size: height and width that the network takes, in pixels.
    resize_to: height and width aimed at before the centre crop; which edge rules, `resize` says: `shortest` and
        `longest` keep the shape of the picture, `stretch` does not.
    fill: grey level or RGB of the border where the resized picture is smaller than `size`.
    channels: 1 (ITU-R 601 luma) or 3 (a grey picture is repeated).
    mean, std: per channel, of values in [0, 1].
    antialias: always True: Pillow's filters widen when they shrink, as the networks saw in training.
    reducing_gap: Pillow's: large pictures are first shrunk by a whole factor, at least this far above the aim; quicker
        and not exact. None is exact.
    """

    size: tuple[int, int]
    resize_to: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    resize: Resize = "shortest"
    interpolation: str = "bicubic"
    antialias: bool = True
    fill: tuple[int, ...] = (0, 0, 0)
    reducing_gap: float | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS or not self.antialias:
            raise BackboneError(
                f"The interpolation of a preprocess spec must be one of {', '.join(FILTERS)}, with antialias; found "
                f"{self.interpolation!r}, antialias {self.antialias}."
            )
        lengths = (len(self.mean), len(self.std), len(self.fill))
        if self.channels not in (1, 3) or set(lengths) != {self.channels}:
            raise BackboneError(
                "A preprocess spec must have 1 or 3 channels with one mean, deviation and fill each; found "
                f"{self.channels} channels, {lengths[0]} means, {lengths[1]} deviations, {lengths[2]} fills."
            )

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values, for `spec_from_json`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def spec_from_json(value: dict[str, Any]) -> PreprocessSpec:
    """The inverse of `PreprocessSpec.to_json`; TypeError on unknown or missing fields."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return PreprocessSpec(**fields)


def plain_spec(height: int, width: int, channels: int, *, reducing_gap: float | None = None) -> PreprocessSpec:
    """Stretched to height x width, values in [0, 1], nothing subtracted: for networks that state no facts."""
    return PreprocessSpec(
        size=(height, width),
        resize_to=(height, width),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        channels=channels,
        resize="stretch",
        fill=(0,) * channels,
        reducing_gap=reducing_gap,
    )


def input_spec(channels: int) -> PreprocessSpec:
    """The preparation of depth 0 of every curve: 32 x 32 without keeping the shape, grey (1) or colour (3)."""
    return plain_spec(32, 32, channels, reducing_gap=3.0)


def fit_to_size(pixels: np.ndarray, spec: PreprocessSpec) -> torch.Tensor:
    """One picture, uint8 (H, W, 1 or 3), resized and centre-cropped to uint8 (channels, *spec.size).

    Equal to timm's evaluation transform (torchvision's Resize and CenterCrop on a PIL image): the same arithmetic.
    """
    if spec.resize == "shortest":
        pixels = _without_extreme_shape(pixels)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if spec.channels == 1 and picture.mode == "RGB":
        picture = picture.convert("L")  # ITU-R 601
    height, width = _resized(picture.height, picture.width, spec)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), FILTERS[spec.interpolation], reducing_gap=spec.reducing_gap)
    x = torch.from_numpy(np.array(picture)).reshape(height, width, -1).permute(2, 0, 1)
    return _centre_crop(x.expand(spec.channels, -1, -1), spec).contiguous()


def normalise(batch: torch.Tensor, spec: PreprocessSpec) -> torch.Tensor:
    """A batch uint8 (N, C, H, W) as float32: (x / 255 - mean) / std, as torchvision's ToTensor and Normalize."""
    mean = torch.tensor(spec.mean, device=batch.device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=batch.device).view(1, -1, 1, 1)
    return batch.to(torch.float32).div_(255).sub_(mean).div_(std)


def _resized(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    to_height, to_width = spec.resize_to
    if spec.resize == "stretch":
        return to_height, to_width
    if spec.resize == "shortest" and to_height == to_width:  # torchvision's Resize(int) rounds down
        if height <= width:
            return to_height, int(to_height * width / height)
        return int(to_width * height / width), to_width
    ratios = (height / to_height, width / to_width)
    ratio = min(ratios) if spec.resize == "shortest" else max(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _centre_crop(x: torch.Tensor, spec: PreprocessSpec) -> torch.Tensor:
    height, width = spec.size
    rows, columns = max(x.shape[1], height), max(x.shape[2], width)
    if (rows, columns) != tuple(x.shape[1:]):
        framed = torch.tensor(spec.fill, dtype=x.dtype).view(-1, 1, 1).repeat(1, rows, columns)
        top, left = (rows - x.shape[1]) // 2, (columns - x.shape[2]) // 2
        framed[:, top : top + x.shape[1], left : left + x.shape[2]] = x
        x = framed
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return x[:, top : top + height, left : left + width]


def _without_extreme_shape(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    limit = LONGEST_RATIO * min(height, width)
    if max(height, width) <= limit:
        return pixels
    top, left = max(0, height - limit) // 2, max(0, width - limit) // 2
    return pixels[top : top + min(height, limit), left : left + min(width, limit)]
