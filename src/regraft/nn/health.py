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
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish)
SQUASHERS = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign)
SMOOTH = (nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, Swish)
ACTIVATIONS = (*RECTIFIERS, *SQUASHERS, *SMOOTH)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
APART = 1e3
"""Gradients of the first and the last layers whose sizes differ by this factor vanish or explode on the way."""
GROWN = 1e3
"""A signal that is so many times larger or smaller at the end than at the start explodes or fades."""
TOO_FAR = 1.0
"""A step that moves weights by more than their own size is too large."""
MANY = 0.4
"""Share of units of a layer that are dead or saturated, from which on the layer is ill."""
ENOUGH = 32
"""Fewer examples do not tell a dead unit from one that was not needed."""
END = 0.02
"""A squashing activation within this share of its range from an end is saturated."""


@dataclass(frozen=True)
class LayerHealth:
    """Figures of one layer over the last batches; None where they do not apply.

    mean, spread: of its outputs; dead, saturated: shares of its units and values, 0..1.
    gradient, weight: root mean squares of its weights' gradient and of its weights, which count for no less than
    1 / sqrt(fan_in), as they might begin; update: root mean square of a step's change over that of the weights.
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
    """What was seen of one layer, the last batches only.

    asleep: for each of its calls in a batch, for each unit, the examples in a row that did not wake it.
    """

    path: str
    kind: str
    moments: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    saturated: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    gradients: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    updates: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    examples: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    asleep: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    calls: int = 0
    before: torch.Tensor | None = None


class Watch:
    """Watches a module through hooks, which change nothing; `health()` says what was seen (see `watch`)."""

    def __init__(self, module: nn.Module, *, in_evaluation: bool = False) -> None:
        self._module = module
        self._in_evaluation = in_evaluation
        self._batches = 0
        self._seen: dict[nn.Module, _Seen] = {}
        self._order: list[nn.Module] = []
        self._followed: set[nn.Module] = set()
        self._hooks: list[Any] = [module.register_forward_pre_hook(self._begin)]
        for path, layer in module.named_modules():
            if isinstance(layer, (*WEIGHTED, *ACTIVATIONS)):
                self._seen[layer] = _Seen(path, type(layer).__name__)
                self._hooks.append(layer.register_forward_hook(self._forward))

    def __deepcopy__(self, memo: object) -> Watch:
        return self  # a copy of the module is not watched: its layers are none of these

    def __reduce__(self) -> tuple[type[_Unwatched], tuple[()]]:
        return _Unwatched, ()

    def health(self) -> Health:
        """Figures over the last training batches, and illnesses. Raises ValueError when no batch was seen."""
        if not self._batches:
            raise ValueError("A watched network must have run in training mode; no batch was seen.")
        self._note_updates()
        layers = tuple(_figures(self._seen[layer], layer) for layer in self._order)
        normed = any(isinstance(m, NORMS) for m in self._module.modules())
        return Health(layers, tuple(_illnesses(layers, normed=normed)), self._batches)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _watches(self) -> bool:
        return self._module.training or self._in_evaluation

    def _begin(self, module: nn.Module, inputs: object) -> None:
        if module is not self._module or not self._watches():
            return
        self._batches += 1
        self._note_updates()
        for layer, seen in self._seen.items():
            seen.calls = 0
            weight: Any = layer.weight if isinstance(layer, WEIGHTED) else None
            if layer not in self._followed and _is_trained(weight):
                self._followed.add(layer)
                self._hooks.append(weight.register_hook(lambda g, seen=seen: seen.gradients.append(_rms(g))))

    def _note_updates(self) -> None:
        with torch.no_grad():
            for layer, seen in self._seen.items():
                if not isinstance(layer, WEIGHTED) or not _is_trained(layer.weight):
                    continue
                weight = layer.weight.detach()
                if seen.before is not None and not torch.equal(seen.before, weight):
                    seen.updates.append(_rms(weight - seen.before) / max(_rms(seen.before), 1e-12))
                seen.before = weight.clone()

    def _forward(self, layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if layer not in self._seen or not self._watches() or not output.numel():
            return
        if layer not in self._order:
            self._order.append(layer)
        seen = self._seen[layer]
        with torch.no_grad():
            x = output.detach().float()
            seen.moments.append((float(x.mean()), float(x.std(correction=0))))
            if isinstance(layer, RECTIFIERS) and x.dim() > 1:
                self._note_sleep(seen, x)
            elif isinstance(layer, SQUASHERS) and not isinstance(layer, nn.ReLU6):  # which is a Hardtanh to torch
                low, high = _range(layer)
                margin = END * (high - low)
                seen.saturated.append(float(((x < low + margin) | (x > high - margin)).float().mean()))
        seen.calls += 1

    def _note_sleep(self, seen: _Seen, x: torch.Tensor) -> None:
        """Units lie on axis 1 of maps, on the last one of rows and tokens."""
        maps = x.dim() > 3 or (x.dim() == 3 and any(isinstance(m, nn.Conv1d) for m in self._seen))
        awake = ((x != 0) & x.isfinite()).movedim(1 if maps else -1, 0).flatten(1).any(1)
        key = (seen.calls, len(awake))
        before = seen.asleep.get(key, torch.zeros_like(awake, dtype=torch.int64))
        seen.asleep[key] = torch.where(awake, 0, before + len(x))
        if not seen.calls:
            seen.examples.append(len(x))


class _Unwatched:
    """What is left of a watch in a module that was pickled: hooks that do nothing."""

    def _begin(self, *_: object) -> None: ...

    def _forward(self, *_: object) -> None: ...


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


def _is_trained(weight: Any) -> bool:
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    return isinstance(weight, nn.Parameter) and not lazy and weight.is_leaf and weight.requires_grad


def _range(layer: nn.Module) -> tuple[float, float]:
    if isinstance(layer, nn.Hardtanh):
        return float(layer.min_val), float(layer.max_val)
    return (0.0, 1.0) if isinstance(layer, nn.Sigmoid | nn.Hardsigmoid) else (-1.0, 1.0)


def _figures(seen: _Seen, layer: nn.Module) -> LayerHealth:
    means, spreads = zip(*seen.moments, strict=True)
    examples = sum(seen.examples)
    long = max(ENOUGH, examples // 2)  # half of the window: units that died while it was watched count
    dead = [float((units >= long).float().mean()) for units in seen.asleep.values()]
    weight = None
    if isinstance(layer, WEIGHTED):
        weight = max(_rms(layer.weight), layer.weight[0].numel() ** -0.5)
    return LayerHealth(
        seen.path,
        seen.kind,
        _middle(means),
        _middle(spreads),
        max(dead) if dead and examples >= ENOUGH else None,
        _middle(seen.saturated) if seen.saturated else None,
        _middle(seen.gradients) if seen.gradients else None,
        weight,
        _middle(seen.updates) if seen.updates else None,
    )


def _middle(values: Sequence[float]) -> float:
    """The median; what is not finite counts as the largest."""
    ordered = sorted(values, key=lambda v: v if math.isfinite(v) else math.inf)
    return ordered[len(ordered) // 2]


def _illnesses(layers: Sequence[LayerHealth], *, normed: bool) -> Iterator[Illness]:
    """normed: whether norms stand between layers, so that sizes of outputs do not tell how a signal grows."""
    trained = [layer for layer in layers if layer.gradient is not None]
    yield from _exploding(layers, trained, normed)
    yield from _vanishing(trained, normed)
    dead = [layer for layer in layers if (layer.dead or 0) >= MANY]
    if dead:
        worst = max(dead, key=lambda layer: layer.dead or 0)
        yield Illness(
            "dying units",
            tuple(layer.path for layer in dead),
            f"{worst.dead:.0%} of the units of {worst.path} were 0 for every example",
            ("a lower learning rate", "leaky ReLU or ELU", "He initialisation", "batch norm before the activation"),
        )
    ends = [layer for layer in layers[:-1] if (layer.saturated or 0) >= MANY]  # at the output the ends are the answers
    if ends:
        worst = max(ends, key=lambda layer: layer.saturated or 0)
        yield Illness(
            "saturation",
            tuple(layer.path for layer in ends),
            f"{worst.saturated:.0%} of the values of {worst.path} lie at the ends of its range",
            ("Glorot initialisation", "ReLU or one of its relatives", "batch norm", "standardised inputs"),
        )


def _exploding(layers: Sequence[LayerHealth], trained: Sequence[LayerHealth], normed: bool) -> Iterator[Illness]:
    cures = ("gradient clipping by norm", "a lower learning rate", "the initialiser of the activation", "batch norm")
    wild = [x for x in layers if not all(map(math.isfinite, (x.mean, x.spread, x.gradient or 0.0)))]
    if wild:
        yield Illness("exploding gradients", tuple(x.path for x in wild), "values are not finite", cures)
        return
    far = [x for x in trained if (x.update or 0) > TOO_FAR]
    if far:
        worst = max(far, key=lambda x: x.update or 0)
        said = f"a step changes the weights of {worst.path} by {worst.update:.3g} times their size"
        yield Illness("exploding gradients", tuple(x.path for x in far), said, cures)
        return
    first, last = _ends(trained)
    if first > APART * last > 0:
        said = f"gradients are {first / last:.3g} times larger in the first layers than in the last"
        yield Illness("exploding gradients", (trained[0].path,), said, cures)
    elif not normed and len(trained) > 1 and trained[-1].spread > GROWN * trained[0].spread > 0:
        times = trained[-1].spread / trained[0].spread
        said = f"outputs are {times:.3g} times larger in {trained[-1].path} than in {trained[0].path}"
        yield Illness("exploding gradients", (trained[-1].path,), said, cures)


def _vanishing(trained: Sequence[LayerHealth], normed: bool) -> Iterator[Illness]:
    """Gradients that fade towards the input, as shares of the weights; or a signal that fades towards the output.

    Thirds are compared, for single layers beside a skip connection may well stand still while the rest learns.
    """
    cures = ("ReLU or a relative", "its initialiser (He, or LeCun for SELU)", "batch norm", "skip connections")
    first, last = _ends(trained)
    if len(trained) < 3 or not math.isfinite(first + last):
        return
    if first * APART < last:
        faint = tuple(layer.path for layer in trained if _share(layer) * APART < last)
        said = "gradients are 0 in the first layers"
        if first:
            said = f"gradients are {last / first:.3g} times fainter in the first layers than in the last"
        yield Illness("vanishing gradients", faint, said, cures)
    elif not normed and trained[-2].spread * GROWN < trained[0].spread:
        said = f"outputs are the same for everything in {trained[-2].path}"
        if trained[-2].spread:
            times = trained[0].spread / trained[-2].spread
            said = f"outputs are {times:.3g} times smaller in {trained[-2].path} than in {trained[0].path}"
        yield Illness("vanishing gradients", (trained[-2].path,), said, cures)


def _share(layer: LayerHealth) -> float:
    """The gradient as a share of the weights."""
    return (layer.gradient or 0.0) / (layer.weight or 1.0)


def _ends(trained: Sequence[LayerHealth]) -> tuple[float, float]:
    """Median shares of the first and of the last third of the layers."""
    third = max(1, len(trained) // 3)
    shares = [_share(layer) for layer in trained]
    return (_middle(shares[:third]), _middle(shares[-third:])) if shares else (0.0, 0.0)
