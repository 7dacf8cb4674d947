"""The part of a network that was trained on, above a cut, with its own head: from a tensor at the cut to logits.

Below the cut the network stays frozen (see `frozen`). The part holds copies of the layers, so the frozen network is
what it was. It always runs in evaluation but for batch norms that may move on; dropout and drop path stay silent.
Knows networks and tensors; nothing of data or of how it is trained.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from regraft.backbone import Backbone
from regraft.cut import between, lower_at, split
from regraft.frozen import pooled
from regraft.graph import Cut, find_cut
from regraft.heads import INPUT, View
from regraft.networks.small import small_network
from regraft.nn import initialize_
from regraft.preprocess import PreprocessSpec, input_spec, normalise

PICTURE = "picture"
"""Where nothing is frozen: the part takes the prepared picture itself."""
SMALL = "small network"
"""What stands for the deepest cut where the small network from scratch takes the place of the backbone's layers."""
BATCH = 16
"""Every batch is padded to this many, so that a picture's answer does not depend on its neighbours (see `numerics`)."""

_DRAWING = threading.Lock()
Takes = Literal["map", "picture", "input"]


@dataclass(frozen=True)
class Plot:
    """Which part of a network is trained on.

    cut: all up to it is frozen; PICTURE: nothing is; INPUT: the small network on the picture at 32 x 32.
    views: what the head sees of the values at cuts from there up, the deepest last; what lies above that is dropped.
    fresh: what lies above this cut began anew, all of it where it is PICTURE.
    hidden: widths of new hidden layers under the new output layer. channels: of the picture at 32 x 32.
    """

    cut: str
    views: tuple[View, ...]
    classes: int
    fresh: str = ""
    hidden: tuple[int, ...] = ()
    channels: int = 3

    @property
    def ends(self) -> list[str]:
        """The cuts that the head reads, the deepest last."""
        return [view.cut for view in self.views]

    @property
    def takes(self) -> Takes:
        """What the part is given: a stored map, a prepared picture, or the picture at 32 x 32."""
        return "picture" if self.cut == PICTURE else "input" if self.cut == INPUT else "map"


class Grown(nn.Module):
    """body: from the cut to the values that the head reads; top: new layers and the output layer."""

    def __init__(
        self, body: nn.Module, top: nn.Module, views: Sequence[View], cuts: Sequence[Cut], spec: PreprocessSpec | None
    ) -> None:
        super().__init__()
        self.body = body
        self.top = top
        self.views = tuple(views)
        self.cuts = tuple(cuts)
        self.spec = spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits float32 (n, classes) of maps float32 (n, *shape), or of pictures uint8 (n, C, H, W)."""
        if torch.is_grad_enabled():
            renew(self.body)
        seen = self.seen(x)
        with torch.autocast(x.device.type, enabled=False):
            logits: torch.Tensor = self.top(seen)
        return logits

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What the top sees, float32 (n, dim)."""
        if self.spec is not None:
            x = normalise(x, self.spec)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        values = self.body(x)
        if not self.cuts:
            whole: torch.Tensor = values.float()
            return whole
        with torch.autocast(x.device.type, enabled=False):
            cells = [pooled(v, c, view.parts) for v, c, view in zip(values, self.cuts, self.views, strict=True)]
            return torch.cat([view.seen(c) for view, c in zip(self.views, cells, strict=True)], 1)


@dataclass(frozen=True)
class Tuned:
    """A trained part. share: of its logits in the answer; the head on frozen features has the rest."""

    plot: Plot
    module: Grown
    share: float

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, for `plot_from_json`."""
        plot = self.plot
        return {
            "cut": plot.cut,
            "fresh": plot.fresh,
            "hidden": list(plot.hidden),
            "channels": plot.channels,
            "views": [view.to_json() for view in plot.views],
            "share": self.share,
        }


def plot_from_json(value: dict[str, Any], classes: int) -> Plot:
    """The inverse of `Tuned.to_json` but for the share; KeyError or TypeError where something is missing."""
    known = {name: value[name] for name in ("cut", "fresh", "channels")}
    views = tuple(View(**view) for view in value["views"])
    return Plot(views=views, classes=classes, hidden=tuple(value["hidden"]), **known)


def grow(plot: Plot, backbone: Backbone | None, *, seed: int = 0) -> Grown:
    """The part as it begins: the backbone's own layers, what is new drawn from `seed`.

    backbone: None only for the small network. Raises CutError where there is no such cut.
    """
    with _DRAWING, torch.random.fork_rng(devices=[]):  # parts are grown side by side, and share torch's generator
        torch.manual_seed(seed)
        if plot.takes == "input":
            grown = Grown(small_network(plot.channels), _top(plot), plot.views, (), input_spec(plot.channels))
        else:
            assert backbone is not None
            trace = backbone.trace
            whole = lower_at(trace, plot.ends) if plot.takes == "picture" else between(trace, plot.cut, plot.ends)
            body = copy.deepcopy(whole)
            if plot.fresh:
                above = whole if plot.fresh == PICTURE else between(trace, plot.fresh, plot.ends[-1:])
                _begin_anew(body, copy.deepcopy(above))
            cuts = [find_cut(trace, name) for name in plot.ends]
            spec = backbone.preprocess if plot.takes == "picture" else None
            grown = Grown(body, _top(plot), plot.views, cuts, spec)
    return grown.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def run_tuned(module: Grown, x: torch.Tensor) -> torch.Tensor:
    """Logits float32 (n, classes) in float32 arithmetic; a row does not depend on the others."""
    out = []
    with torch.inference_mode():
        for i in range(0, len(x), BATCH):
            rows = x[i : i + BATCH]
            full = rows.new_zeros((BATCH, *rows.shape[1:]))
            full[: len(rows)] = rows
            # The last bits of a row of a matrix product can depend on its place and on where it lies in memory.
            out += [module.top(row.clone().unsqueeze(0)).float().cpu() for row in module.seen(full)[: len(rows)]]
    return torch.cat(out)


def renew(module: nn.Module) -> None:
    """Make layers forget what they derived from their weights: LeViT keeps its attention biases while in evaluation.

    They forget where training begins; the mode of every layer stays as it is.
    """
    modes = [(layer, layer.training) for layer in module.modules()]
    module.train()
    for layer, training in modes:
        layer.training = training


def scaled(module: Grown, factor: float) -> None:
    """Multiply the part's logits by a factor, in its output layer."""
    output = module.top[-1]  # type: ignore[index]
    with torch.no_grad():
        output.weight.mul_(factor)
        output.bias.mul_(factor)


def stage_names(plot: Plot, backbone: Backbone | None, module: Grown, ends: Sequence[str]) -> list[list[str]]:
    """Names of the body's parameters between neighbouring `ends` (cuts in order of depth above plot.cut), lowest first.

    The last holds what lies above the last of them.
    """
    left = [name for name, _ in module.body.named_parameters()]
    stages = []
    for end in ends:
        assert backbone is not None
        below = {name for name, _ in split(backbone.trace, end)[0].named_parameters()}
        stages.append([name for name in left if name in below])
        left = [name for name in left if name not in below]
    return [*stages, left]


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """The batch norms in a module."""
    yield from (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def _top(plot: Plot) -> nn.Module:
    before = sum(view.dim for view in plot.views)
    layers: list[nn.Module] = []
    for width in plot.hidden:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    top = nn.Sequential(*layers, nn.Linear(before, plot.classes))
    initialize_(top)
    return top


def _begin_anew(body: nn.Module, fresh: nn.Module) -> None:
    """Give the layers of `body` that `fresh` names weights as before any training.

    Parameters of a network's own code, such as scales and position biases, have no start of their own and stay.
    """
    for layer in fresh.modules():
        reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
        if callable(reset):
            reset()
    kinds = {type(layer) for layer in fresh.modules()}
    initialize_(fresh, "sigmoid" if nn.Sigmoid in kinds and nn.ReLU not in kinds and nn.SiLU not in kinds else "relu")
    own = body.state_dict()
    body.load_state_dict({**own, **{name: t for name, t in fresh.state_dict().items() if name in own}})
