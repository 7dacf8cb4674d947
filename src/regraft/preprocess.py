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
import torch.nn.functional as F

from regraft.errors import BackboneError

Resize = Literal["shortest", "longest", "stretch"]
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
LONGEST_RATIO = 16
"""Pictures longer than 16:1 are cut to their middle 16:1 first: the centre crop keeps less, and memory stays flat."""


@dataclass(frozen=True)
class PreprocessSpec:
    """How pixels become the input of one network.

    size: height and width that the network takes, in pixels.
    resize_to: height and width aimed at before the centre crop; which edge rules, `resize` says: `shortest` and
        `longest` keep the shape of the picture, `stretch` does not.
    fill: grey level or RGB of the border where the resized picture is smaller than `size`.
    channels: 1 (ITU-R 601 luma) or 3 (a grey picture is repeated).
    mean, std: per channel, of values in [0, 1].
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

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise BackboneError(
                f"The interpolation of a preprocess spec must be one of {', '.join(INTERPOLATIONS)}; "
                f"found {self.interpolation!r}."
            )
        if self.channels not in (1, 3) or len(self.mean) != self.channels or len(self.std) != self.channels:
            raise BackboneError(
                f"A preprocess spec must have 1 or 3 channels with one mean and one deviation each; found "
                f"{self.channels} channels, {len(self.mean)} means, {len(self.std)} deviations."
            )

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values, for `spec_from_json`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def spec_from_json(value: dict[str, Any]) -> PreprocessSpec:
    """The inverse of `PreprocessSpec.to_json`; TypeError on unknown or missing fields."""
    return PreprocessSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def plain_spec(height: int, width: int, channels: int) -> PreprocessSpec:
    """Stretched to height x width, values in [0, 1], nothing subtracted: for networks that state no facts."""
    return PreprocessSpec(
        size=(height, width),
        resize_to=(height, width),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        channels=channels,
        resize="stretch",
        fill=(0,) * channels,
    )


def fit_to_size(pixels: np.ndarray, spec: PreprocessSpec) -> torch.Tensor:
    """One picture, uint8 (H, W, 1 or 3), resized and centre-cropped to uint8 (channels, *spec.size).

    Equal to timm's evaluation transform (torchvision's Resize and CenterCrop on a PIL image) within 1 grey level.
    """
    x = torch.from_numpy(np.ascontiguousarray(_without_extreme_shape(pixels)))
    # The channel axis stays innermost in memory: torch has its fast uint8 resize for that layout.
    x = x.permute(2, 0, 1).unsqueeze(0)
    if spec.channels == 1 and x.shape[1] == 3:
        x = _luma(x)
    height, width = _resized(x.shape[2], x.shape[3], spec)
    if (height, width) != tuple(x.shape[2:]):
        x = _interpolate(x, height, width, spec)
    x = _centre_crop(x, spec)[0]
    return x.expand(spec.channels, -1, -1).contiguous()


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


def _interpolate(x: torch.Tensor, height: int, width: int, spec: PreprocessSpec) -> torch.Tensor:
    if spec.interpolation == "nearest":
        return F.interpolate(x, size=(height, width), mode="nearest-exact")
    return F.interpolate(
        x, size=(height, width), mode=spec.interpolation, antialias=spec.antialias, align_corners=False
    )


def _centre_crop(x: torch.Tensor, spec: PreprocessSpec) -> torch.Tensor:
    height, width = spec.size
    missing_rows, missing_columns = max(0, height - x.shape[2]), max(0, width - x.shape[3])
    if missing_rows or missing_columns:
        fill = torch.tensor(spec.fill[: x.shape[1]], dtype=x.dtype).view(1, -1, 1, 1)
        framed = fill.expand(1, x.shape[1], x.shape[2] + missing_rows, x.shape[3] + missing_columns).clone()
        top, left = missing_rows // 2, missing_columns // 2
        framed[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
        x = framed
    top, left = round((x.shape[2] - height) / 2), round((x.shape[3] - width) / 2)
    return x[:, :, top : top + height, left : left + width]


def _luma(x: torch.Tensor) -> torch.Tensor:
    # PIL's integer form of ITU-R 601, so that a colour file and its grey copy meet in the same grey levels.
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(1, 3, 1, 1)
    return ((x.to(torch.int32) * weights).sum(1, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


def _without_extreme_shape(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    limit = LONGEST_RATIO * min(height, width)
    if max(height, width) <= limit:
        return pixels
    top, left = max(0, height - limit) // 2, max(0, width - limit) // 2
    return pixels[top : top + min(height, limit), left : left + min(width, limit)]
