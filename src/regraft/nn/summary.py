"""What a network is made of: for each layer its output, its parameters, whether they are trained, and its mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

NOT_COUNTED = "num_batches_tracked"


@dataclass(frozen=True)
class LayerFacts:
    """One layer of its own: outputs, one shape each, without the batch; trainable, frozen: counts of parameters.

    buffers: counts of other numbers it carries, such as running means; uses: how often it was called.
    """

    path: str
    kind: str
    outputs: tuple[tuple[int, ...], ...]
    trainable: int
    frozen: int
    buffers: int
    training: bool
    uses: int

    @property
    def parameters(self) -> int:
        """All numbers, with buffers."""
        return self.trainable + self.frozen + self.buffers


@dataclass(frozen=True)
class Summary:
    """Facts of all layers in the order in which they are called; numbers shared by layers are counted once.

    `non_trainable` counts frozen parameters and buffers, as Keras does: the running statistics of batch norm are among
    them, its counter of batches is not.
    """

    layers: tuple[LayerFacts, ...]

    @property
    def total(self) -> int:
        """Trainable and not."""
        return self.trainable + self.non_trainable

    @property
    def trainable(self) -> int:
        """Parameters that a training step changes."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def non_trainable(self) -> int:
        """Frozen parameters and buffers."""
        return sum(layer.frozen + layer.buffers for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "kind", "output", "trainable", "not", "mode")
        rows = [
            (
                layer.path,
                layer.kind,
                " ".join("x".join(map(str, s)) or "1" for s in layer.outputs) if layer.uses else "not called",
                f"{layer.trainable:,}",
                f"{layer.frozen + layer.buffers:,}",
                ("train" if layer.training else "eval") + (f" {layer.uses} uses" if layer.uses > 1 else ""),
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(c.rjust(w) if 2 < i < 5 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in (head, *rows)
        ]
        totals = f"{self.total:,} in all, {self.trainable:,} trainable, {self.non_trainable:,} not (frozen, buffers)"
        return "\n".join([*(line.rstrip() for line in lines), totals])


def summary(module: nn.Module, input_shape: Sequence[int]) -> Summary:
    """Facts of every layer that holds numbers of its own or has no layers inside, from one run on zeros.

    input_shape: without the batch. The module stays as it is, but that lazy layers take their shapes: the run is in
    evaluation mode, without gradients.

        >>> print(summary(regraft.nn.mlp([784, 300, 100, 10], norm="batch"), (784,)))
    """
    outputs: dict[nn.Module, list[tuple[int, ...]]] = {}
    uses: dict[nn.Module, int] = {}
    order: list[nn.Module] = []

    def begin(layer: nn.Module, inputs: object) -> None:
        if layer not in uses:
            order.append(layer)
        uses[layer] = uses.get(layer, 0) + 1

    def note(layer: nn.Module, inputs: object, output: object) -> None:
        outputs[layer] = [tuple(t.shape[1:]) for t in _tensors(output)]

    named = {layer: path for path, layer in module.named_modules()}
    shown = [layer for layer in named if not list(layer.children()) or _own(layer)]
    modes = {layer: layer.training for layer in named}
    hooks = [layer.register_forward_pre_hook(begin) for layer in shown]
    hooks += [layer.register_forward_hook(note) for layer in shown]
    example = torch.zeros(2, *input_shape)
    first = next(module.parameters(), None)
    try:
        with torch.no_grad():
            module.eval()(example if first is None else example.to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in modes.items():
            layer.training = mode
    counted: set[int] = set()
    facts = []
    for layer in [*order, *(layer for layer in shown if layer not in uses)]:
        own = {name: t for name, t in _own(layer).items() if id(t) not in counted}
        counted.update(map(id, own.values()))
        trained = [t.numel() for t in own.values() if isinstance(t, nn.Parameter) and t.requires_grad]
        frozen = [t.numel() for t in own.values() if isinstance(t, nn.Parameter) and not t.requires_grad]
        buffers = [t.numel() for t in own.values() if not isinstance(t, nn.Parameter)]
        shapes = tuple(outputs.get(layer, ()))
        numbers = (sum(trained), sum(frozen), sum(buffers))
        facts.append(LayerFacts(named[layer], type(layer).__name__, shapes, *numbers, modes[layer], uses.get(layer, 0)))
    return Summary(tuple(facts))


def _own(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the layer itself, without those of layers inside."""
    own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    return {name: t for name, t in own.items() if name != NOT_COUNTED}


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [t for one in value for t in _tensors(one)]
    return []
