"""The health of layers while a network trains: what flows forward, what flows back, and what to try when it does not.

    vanishing gradients   weights near the input get gradients far smaller than those near the output
    exploding gradients   gradients or activations grow from layer to layer, or are not finite
    dying units           ReLU units that are 0 for every example
    saturation            sigmoid and tanh at their ends, where their slope is 0

Glorot and Bengio 2010; Geron, Hands-On Machine Learning, chapter 11. Sizes are root mean squares, so that layers of any
width compare.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from regraft.nn.activations import Swish

WINDOW = 20
"""Training batches that figures are taken over."""
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Threshold, nn.Hardswish)
SQUASHERS = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign)
ACTIVATIONS = (*RECTIFIERS, *SQUASHERS, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, Swish)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
APART = 1e3
"""Gradients of layers whose sizes differ by this factor vanish or explode on the way."""
TOO_LARGE = 10.0
"""A gradient this many times the size of its weights, or a signal this many times larger than..."""
GROWN = 1e3
"""A signal that is so many times larger at the end than at the start explodes."""
MANY = 0.4
"""Share of units of a layer that are dead or saturated, from which on the layer is ill."""
END = 0.02
"""A squashing activation within this share of its range from an end is saturated."""
RANGES = {nn.Sigmoid: (0.0, 1.0), nn.Hardsigmoid: (0.0, 1.0)}


@dataclass(frozen=True)
class LayerHealth:
    """Figures of one layer over the last batches; None where they do not apply.

    mean, spread: of its outputs; dead, saturated: shares of its units and values, 0..1.
    gradient, weight: root mean squares of its weights' gradient and of its weights; update: root mean square of the
    last change of its weights over that of the weights.
    """

    path: str
    kind: str
    mean: float
    spread: float
    dead: float | None = None
    saturated: float | None = None
    gradient: float | None = None
    weight: float | None = None
    update: float | None = None


@dataclass(frozen=True)
class Illness:
    """What ails which layers, how one sees it, and what to try, the likeliest cure first."""

    name: str
    layers: tuple[str, ...]
    evidence: str
    remedies: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.layers[:3]) + (f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else "")
        return f"{self.name} in {shown}: {self.evidence}; try {'; or '.join(self.remedies)}"


@dataclass(frozen=True)
class Health:
    """Figures of all layers in the order in which they are called, and what ails them; batches: how many were seen."""

    layers: tuple[LayerHealth, ...]
    illnesses: tuple[Illness, ...]
    batches: int

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values; figures that are not finite become None."""
        layers = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(layer).items()}
            for layer in self.layers
        ]
        return {"batches": self.batches, "layers": layers, "illnesses": [vars(i) for i in self.illnesses]}

    def __str__(self) -> str:
        head = ("layer", "kind", "mean", "spread", "dead", "saturated", "gradient", "update/weight")
        rows = [
            (
                layer.path,
                layer.kind,
                f"{layer.mean:.3g}",
                f"{layer.spread:.3g}",
                "" if layer.dead is None else f"{layer.dead:.0%}",
                "" if layer.saturated is None else f"{layer.saturated:.0%}",
                "" if layer.gradient is None else f"{layer.gradient:.2g}",
                "" if layer.update is None else f"{layer.update:.2g}",
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in (head, *rows)
        ]
        said = [str(illness) for illness in self.illnesses] or ["no layer is ill"]
        return "\n".join([*(line.rstrip() for line in lines), *said])


@dataclass
class _Seen:
    """What was seen of one layer, the last batches only."""

    path: str
    kind: str
    moments: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    saturated: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    gradients: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    updates: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    asleep: torch.Tensor | None = None
    before: torch.Tensor | None = None


class Watch:
    """Watches a module through hooks, which change nothing; `health()` says what was seen (see `watch`)."""

    def __init__(self, module: nn.Module, *, in_evaluation: bool = False) -> None:
        kinds = (*WEIGHTED, *ACTIVATIONS)
        self._module = module
        self._in_evaluation = in_evaluation
        self._batches = 0
        self._seen: dict[nn.Module, _Seen] = {}
        self._order: list[nn.Module] = []
        self._hooks: list[Any] = [module.register_forward_pre_hook(self._begin)]
        for path, layer in module.named_modules():
            if isinstance(layer, kinds):
                self._seen[layer] = _Seen(path, type(layer).__name__)
                self._hooks.append(layer.register_forward_hook(self._forward))
                if isinstance(layer, WEIGHTED):
                    weight: Any = layer.weight
                    self._hooks.append(weight.register_post_accumulate_grad_hook(self._backward_of(layer)))

    def health(self) -> Health:
        """Figures over the last training batches, and illnesses. Raises ValueError when no batch was seen."""
        if not self._batches:
            raise ValueError("A watched network must have run in training mode; no batch was seen.")
        self._note_updates()
        layers = tuple(_figures(self._seen[layer], layer) for layer in self._order)
        return Health(layers, tuple(_illnesses(layers)), self._batches)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _watches(self) -> bool:
        return self._module.training or self._in_evaluation

    def _begin(self, module: nn.Module, inputs: object) -> None:
        if self._watches():
            self._batches += 1
            self._note_updates()

    def _note_updates(self) -> None:
        with torch.no_grad():
            for layer, seen in self._seen.items():
                if not isinstance(layer, WEIGHTED) or not layer.weight.requires_grad:
                    continue
                weight = layer.weight.detach()
                if seen.before is not None and not torch.equal(seen.before, weight):
                    seen.updates.append(_rms(weight - seen.before) / max(_rms(seen.before), 1e-12))
                seen.before = weight.clone()

    def _forward(self, layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if not self._watches():
            return
        if layer not in self._order:
            self._order.append(layer)
        seen = self._seen[layer]
        with torch.no_grad():
            x = output.detach().float()
            seen.moments.append((float(x.mean()), float(x.std(correction=0))))
            if isinstance(layer, RECTIFIERS):
                seen.asleep = _asleep(x, seen.asleep)
            elif isinstance(layer, SQUASHERS):  # ReLU6 is a Hardtanh to torch
                low, high = RANGES.get(type(layer), (-1.0, 1.0))
                margin = END * (high - low)
                seen.saturated.append(float(((x < low + margin) | (x > high - margin)).float().mean()))

    def _backward_of(self, layer: nn.Module) -> Any:
        def note(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._seen[layer].gradients.append(_rms(parameter.grad))

        return note


@contextmanager
def watch(module: nn.Module, *, in_evaluation: bool = False) -> Iterator[Watch]:
    """Watch a module while it trains; its results, gradients and weights stay as they would be.

    Figures are taken in training mode (or `in_evaluation` too), over the last batches, of layers with weights and of
    activations that are layers. Weights are copied once, to see how far a step moves them.

        >>> with watch(model) as watched:
        ...     train(model)
        >>> print(watched.health())
    """
    watched = Watch(module, in_evaluation=in_evaluation)
    try:
        yield watched
    finally:
        watched.close()


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())  # squares of faint gradients are 0 in float32


def _asleep(x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """For each unit (axis 1) the batches in a row in which no example woke it."""
    awake = (x > 0).transpose(0, 1).flatten(1).any(1)
    counted = torch.zeros_like(awake, dtype=torch.int32) if before is None else before
    return torch.where(awake, 0, counted + 1)


def _figures(seen: _Seen, layer: nn.Module) -> LayerHealth:
    means, spreads = zip(*seen.moments, strict=True)
    least = min(WINDOW, len(seen.moments))
    weight = _rms(layer.weight) if isinstance(layer, WEIGHTED) else None
    return LayerHealth(
        seen.path,
        seen.kind,
        _middle(means),
        _middle(spreads),
        None if seen.asleep is None else float((seen.asleep >= least).float().mean()),
        _middle(seen.saturated) if seen.saturated else None,
        _middle(seen.gradients) if seen.gradients else None,
        weight,
        _middle(seen.updates) if seen.updates else None,
    )


def _middle(values: Sequence[float]) -> float:
    """The median; not finite if any value is not."""
    ordered = sorted(values)
    odd = [v for v in ordered if not math.isfinite(v)]
    return odd[0] if odd else ordered[len(ordered) // 2]


def _illnesses(layers: Sequence[LayerHealth]) -> Iterator[Illness]:
    trained = [layer for layer in layers if layer.gradient is not None]
    yield from _exploding(layers, trained)
    yield from _vanishing(trained)
    dead = [layer for layer in layers if (layer.dead or 0) >= MANY]
    if dead:
        worst = max(dead, key=lambda layer: layer.dead or 0)
        yield Illness(
            "dying units",
            tuple(layer.path for layer in dead),
            f"{worst.dead:.0%} of the units of {worst.path} were 0 for every example",
            ("a lower learning rate", "leaky ReLU or ELU", "He initialisation", "batch norm before the activation"),
        )
    ends = [layer for layer in layers if (layer.saturated or 0) >= MANY]
    if ends:
        worst = max(ends, key=lambda layer: layer.saturated or 0)
        yield Illness(
            "saturation",
            tuple(layer.path for layer in ends),
            f"{worst.saturated:.0%} of the values of {worst.path} lie at the ends of its range",
            ("Glorot initialisation", "ReLU or one of its relatives", "batch norm", "standardised inputs"),
        )


def _exploding(layers: Sequence[LayerHealth], trained: Sequence[LayerHealth]) -> Iterator[Illness]:
    cures = ("gradient clipping by norm", "a lower learning rate", "the initialiser of the activation", "batch norm")
    wild = [layer for layer in layers if not all(math.isfinite(v) for v in (layer.mean, layer.spread))]
    wild += [layer for layer in trained if not math.isfinite(layer.gradient or 0) and layer not in wild]
    if wild:
        yield Illness("exploding gradients", tuple(x.path for x in wild), "values are not finite", cures)
        return
    large = [x for x in trained if (x.gradient or 0) > TOO_LARGE * max(x.weight or 0, 1e-12)]
    if large:
        worst = max(large, key=lambda x: (x.gradient or 0) / max(x.weight or 0, 1e-12))
        times = (worst.gradient or 0) / max(worst.weight or 0, 1e-12)
        said = f"the gradient of {worst.path} is {times:.3g} times the size of its weights"
        yield Illness("exploding gradients", tuple(x.path for x in large), said, cures)
        return
    spreads = [layer for layer in trained if layer.spread > 0]
    if len(spreads) > 1 and spreads[-1].spread > GROWN * spreads[0].spread:
        times = spreads[-1].spread / spreads[0].spread
        said = f"outputs are {times:.3g} times larger in {spreads[-1].path} than in {spreads[0].path}"
        yield Illness("exploding gradients", (spreads[-1].path,), said, cures)


def _vanishing(trained: Sequence[LayerHealth]) -> Iterator[Illness]:
    """Of all layers but the last, those whose gradient, as a share of their weights, is far below the largest; or the
    signal itself fades, and with it every gradient.
    """
    cures = (
        "ReLU or one of its relatives",
        "its initialiser (He, or LeCun for SELU)",
        "batch norm",
        "skip connections",
    )
    shares = {layer.path: (layer.gradient or 0) / max(layer.weight or 0, 1e-12) for layer in trained}
    if len(trained) < 3 or not all(map(math.isfinite, shares.values())):
        return
    top = max(shares[layer.path] for layer in trained[-2:])
    faint = [layer for layer in trained[:-1] if shares[layer.path] * APART < top]
    if faint:
        least = min(faint, key=lambda layer: shares[layer.path])
        said = f"the gradient of {least.path} is {least.gradient:.1g}, {APART:,.0f} times fainter than near the end"
        yield Illness("vanishing gradients", tuple(layer.path for layer in faint), said, cures)
        return
    first, last = trained[0], trained[-2]
    if last.spread * GROWN < first.spread:
        times = first.spread / max(last.spread, 1e-38)
        said = f"outputs are {times:.3g} times smaller in {last.path} than in {first.path}"
        yield Illness("vanishing gradients", (last.path,), said, cures)
