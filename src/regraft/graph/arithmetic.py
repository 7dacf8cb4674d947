"""How much of a network's arithmetic lies above each cut, read off the shapes that were observed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from regraft.graph.cuts import Cut, Trace
from regraft.graph.observe import Tensor


def shares_above(trace: Trace, cuts: Sequence[Cut]) -> list[float]:
    """For each cut the share, 0..1, of all multiplications with weights that are done above it.

    Counted for layers: weights times the positions of their output; products of two values are left out.
    """
    done = 0.0
    below: dict[str, float] = {}
    for node in trace.graph.nodes:
        if node.op == "call_module":
            layer = trace.module.get_submodule(str(node.target))
            weights = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
            seen = trace.sights[node.name].seen[0]
            done += weights * (_positions(seen.shape, layer) if isinstance(seen, Tensor) else 1)
        below[node.name] = done
    return [1 - below[cut.node] / max(done, 1.0) for cut in cuts]


def _positions(shape: tuple[int, ...], layer: nn.Module) -> int:
    kernels = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and len(shape) > 2
    return math.prod(shape[2:] if kernels else shape[1:-1])
