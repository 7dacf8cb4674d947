"""A tiny network and tiny generated pictures, for tests and for the programs that tests start."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

CLASSES = ("ant", "bee", "cat")


class Block(nn.Module):
    """A residual block of 8 channels."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class TinyNet(nn.Module):
    """Three stages of 8 channels for 32 x 32 RGB pictures, with seeded weights and running statistics."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU())
            self.stage1, self.stage2, self.stage3 = Block(), nn.Sequential(nn.MaxPool2d(2), Block()), Block()
            self.head = nn.Linear(8, 5)
            with torch.no_grad():
                self.train()(torch.rand(16, 3, 32, 32))

    def forward(self, x):
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(x.mean((2, 3)))


EXAMPLE = torch.zeros(2, 3, 32, 32)


def stripes(kind, rng, size=(40, 48)):
    """Class 0, 1, 2: rows, columns, diagonals of random period and phase. Pixel by pixel all classes have one mean."""
    y, x = np.mgrid[: size[0], : size[1]]
    along = (y, x, (x + y) / 1.4)[kind]
    wave = np.sign(np.sin(along * 2 * np.pi / rng.uniform(5, 14) + rng.uniform(0, 2 * np.pi)))
    grey = 127 + 90 * wave + rng.normal(0, 12, size)
    return np.clip(np.stack([grey, 0.9 * grey, 0.8 * grey], 2), 0, 255).astype(np.uint8)


def colours(kind, rng, size=(40, 48)):
    """Class 0, 1, 2: red, green, blue noise, which raw pixels tell apart as well as any network."""
    pixels = rng.integers(0, 60, (*size, 3)).astype(np.uint8)
    pixels[..., kind] += 120
    return pixels


def write_pictures(root, *, draw=stripes, each=8, classes=CLASSES, seed=0, grey=False):
    """ROOT/CLASS/0.png ... of generated pictures; returns the root."""
    rng = np.random.default_rng(seed)
    for kind, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = draw(kind % 3, rng)
            Image.fromarray(pixels.max(2) if grey else pixels).save(root / name / f"{i}.png")
    return root
