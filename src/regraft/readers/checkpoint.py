"""What a file of weights holds, whatever framework wrote it: named tensors, and the graph where the file has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from regraft.operations import Operations

Layout = Literal["torch", "keras", "theano", "flax"]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one file under the names that it gives them.

    format: what the file is, in words for a person (`Keras 2 HDF5`, `TensorFlow checkpoint`).
    tensors: as stored, on the CPU. layout: the convention their axes follow. For `torch`, kernels are OIHW and dense
    weights (out, in); `keras` and `flax` HWIO and (in, out); `theano` OIHW with kernels flipped, and (in, out).
    passed_over: names in the file that are never weights (optimizer slots, moving averages of weights, step counters).
    operations: the network as the file describes it, None where it holds weights only; then `tensors` are its state
    in torch's own layout, and `input_shape` is what it takes, (channels, height, width), as far as it is known.
    """

    path: str
    format: str
    tensors: dict[str, torch.Tensor] = field(repr=False)
    layout: Layout = "torch"
    passed_over: tuple[str, ...] = ()
    operations: Operations | None = None
    input_shape: tuple[int, ...] | None = None
