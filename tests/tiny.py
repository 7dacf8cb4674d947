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


class Poor(nn.Module):
    """A network of three random top filters: its features tell `tiles` apart poorly, and better after a few steps.

    Maps at the stem, 3 x 16 x 16, are smaller than the pictures, so they are stored.
    """

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 3, 9, stride=2, padding=4), nn.ReLU())
            self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
            self.head = nn.Linear(3, 5)
            with torch.no_grad():
                self.stem[0].weight.zero_()
                self.stem[0].bias.zero_()
                for channel in range(3):
                    self.stem[0].weight[channel, channel, 4:6, 4:6] = 1 / 4
                self.block[0].weight.normal_(0, 0.03)
                self.block[0].bias.zero_()
        self.eval()

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Keeping(nn.Module):
    """Adds what it derives from a weight, and keeps that while in evaluation, as LeViT keeps its attention biases."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.kept = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x):
        if self.training:
            return x + 0.1 * self.weight
        if "bias" not in self.kept:
            self.kept["bias"] = 0.1 * self.weight
        return x + self.kept["bias"]


EXAMPLE = torch.zeros(2, 3, 32, 32)


def stripes(kind, rng, size=(40, 48)):
    """Class 0, 1, 2: rows, columns, diagonals of random period and phase. Pixel by pixel all classes have one mean."""
    y, x = np.mgrid[: size[0], : size[1]]
    along = (y, x, (x + y) / 1.4)[kind]
    wave = np.sign(np.sin(along * 2 * np.pi / rng.uniform(5, 14) + rng.uniform(0, 2 * np.pi)))
    grey = 127 + 90 * wave + rng.normal(0, 12, size)
    return np.clip(np.stack([grey, 0.9 * grey, 0.8 * grey], 2), 0, 255).astype(np.uint8)


def tiles(kind, rng, size=(32, 32)):
    """Class 0, 1, 2: rows, columns, diagonals in noise; every tile of 8 x 8 has a phase of its own."""
    y, x = np.mgrid[: size[0], : size[1]]
    phase = rng.uniform(0, 2 * np.pi, 200)[(y // 8) * 10 + x // 8]
    along = (y, x, (x + y) / 1.4)[kind]
    grey = 127 + 60 * np.sin(along * 2 * np.pi / 4 + phase) + rng.normal(0, 40, size)
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
