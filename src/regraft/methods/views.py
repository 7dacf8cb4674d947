"""Pictures varied at random, a whole batch at once, drawn anew at every step from torch's generator.

Unlike `regraft.augment`, whose views are drawn once because what a frozen network makes of them is stored: here all
layers train and nothing is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

VIEWS = ("crop", "flip", "light", "erase", "noise")
AREA = 0.5
LIGHT = 0.8
GREY = 0.2
ERASED = (0.2, 0.4)
NOISE = 0.1


def varied(x: torch.Tensor, names: frozenset[str]) -> torch.Tensor:
    """Pictures in [0, 1], float32 (n, channels, height, width), each varied by what `names` lists.

    crop: a part of at least half of the area, sides up to 1.3:1 out of shape, stretched to the whole; flip: left and
    right, for half of them; light: brightness and contrast within 80 %, the channels' shares within 40 %, and grey for
    a fifth of coloured pictures; erase: a rectangle, whose sides are 20 to 40 % of the picture's, becomes its mean;
    noise: Gaussian, of deviation 0.1.
    """
    if "crop" in names or "flip" in names:
        x = _placed(x, crop="crop" in names, flip="flip" in names)
    if "light" in names:
        x = _lit(x)
    if "erase" in names:
        x = _erased(x)
    return (x + NOISE * torch.randn_like(x)).clamp(0, 1) if "noise" in names else x


def turned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square pictures by no, one, two and three quarters, (4 n, ...), and by how many, int64 (4 n,)."""
    everything = torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])
    return everything, torch.arange(4, device=x.device).repeat_interleave(len(x))


def _placed(x: torch.Tensor, *, crop: bool, flip: bool) -> torch.Tensor:
    n = len(x)
    width = height = torch.ones(n, device=x.device)
    if crop:
        area, shape = _uniform(n, AREA, 1, x), _uniform(n, -0.26, 0.26, x).exp()
        width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=x.device)
    theta[:, 0, 0] = width * (torch.randint(0, 2, (n,), device=x.device) * 2 - 1 if flip else 1)
    theta[:, 1, 1] = height
    theta[:, 0, 2], theta[:, 1, 2] = _uniform(n, -1, 1, x) * (1 - width), _uniform(n, -1, 1, x) * (1 - height)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _lit(x: torch.Tensor) -> torch.Tensor:
    n, channels = x.shape[:2]
    if channels > 1:
        grey = (torch.rand(n, 1, 1, 1, device=x.device) < GREY).float()
        x = torch.lerp(
            x * _uniform((n, channels, 1, 1), 1 - LIGHT / 2, 1 + LIGHT / 2, x), x.mean(1, keepdim=True), grey
        )
    middle = x.mean((1, 2, 3), keepdim=True)
    steeper, brighter = (_uniform((n, 1, 1, 1), 1 - LIGHT, 1 + LIGHT, x) for _ in range(2))
    return ((x - middle) * steeper + middle * brighter).clamp(0, 1)


def _erased(x: torch.Tensor) -> torch.Tensor:
    n, _, height, width = x.shape
    inside = torch.ones(n, 1, height, width, dtype=torch.bool, device=x.device)
    for axis, size in ((2, height), (3, width)):
        share = _uniform(n, *ERASED, x)
        start = _uniform(n, 0, 1, x) * (1 - share)
        at = ((torch.arange(size, device=x.device) + 0.5) / size).view(1, -1)
        line = (at >= start[:, None]) & (at < (start + share)[:, None])
        inside &= line.view(n, 1, size, 1) if axis == 2 else line.view(n, 1, 1, size)
    return torch.where(inside, x.mean((2, 3), keepdim=True), x)


def _uniform(shape: int | tuple[int, ...], low: float, high: float, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, device=like.device).uniform_(low, high)
