"""Classification on another task than the one at hand: its labels are given, or come for free.

rotation: a picture is turned by no, one, two or three quarters, and the network must say by how many (Gidaris et al.
2018). labels: any labelled data set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from regraft.errors import TrainingError
from regraft.methods.encoder import Encoder, dim_of, features
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.methods.views import turned, varied
from regraft.nn import initialize_
from regraft.training import Plan

SHOWN = 8
SMOOTHING = 0.1


def rotation(encoder: Encoder, task: Task) -> Method:
    """Each picture in all four turns; by how many quarters was it turned?"""
    height, width = encoder.preprocess.size
    if height != width:
        raise TrainingError(
            f"Pictures must be square to be turned; they are {height} x {width}: choose another method."
        )
    output = _output(dim_of(encoder), 4)

    def loss(batch: Batch) -> torch.Tensor:
        seen, quarters = turned(varied(batch.pictures, task.views - {"flip"}))
        return F.cross_entropy(output(features(encoder, seen)).float(), quarters)

    def show(batch: Batch) -> list[Panel]:
        seen, quarters = turned(batch.pictures[:SHOWN])
        said = output(features(encoder, seen)).argmax(1)
        words = tuple(f"{90 * int(q)} degrees, said {90 * int(s)}" for q, s in zip(quarters, said, strict=True))
        return [Panel("turned pictures, and what the network says", tuple((x,) for x in seen), words)]

    return Method((Part("encoder", encoder.module), Part("output", output)), loss, show, batch=64, plan=Plan(0, 2e-3))


def labels(encoder: Encoder, task: Task) -> Method:
    """The classes of the data."""
    output = _output(dim_of(encoder), task.classes)

    def loss(batch: Batch) -> torch.Tensor:
        said = output(features(encoder, varied(batch.pictures, task.views))).float()
        return F.cross_entropy(said, batch.labels, label_smoothing=SMOOTHING)

    def show(batch: Batch) -> list[Panel]:
        x = batch.pictures[:SHOWN]
        said = output(features(encoder, x)).argmax(1)
        words = tuple(f"class {int(y)}, said {int(s)}" for y, s in zip(batch.labels, said, strict=False))
        return [Panel("pictures, and what the network says", tuple((picture,) for picture in x), words)]

    return Method((Part("encoder", encoder.module), Part("output", output)), loss, show, plan=Plan(0, 2e-3))


def _output(inputs: int, classes: int) -> nn.Module:
    output = nn.Linear(inputs, classes)
    initialize_(output, "linear")
    return output
