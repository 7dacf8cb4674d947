"""Steps of a network while a Keras model is turned into them, and which way round each value lies.

Keras counts axes as its model has them, mostly (batch, height, width, channels); here a picture lies as torch has it,
(batch, channels, height, width). A `Value` remembers whether its last axis in Keras was moved to place 1, so that
axes that a layer names are found again, and steps that turn axes are written only where they must be.

Knows operations, not layers of Keras.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.errors import ReaderError
from regraft.operations import FUNCTIONS, INPUT, LAYERS, Operation

Array = np.ndarray[Any, Any]
TAKEN = frozenset(dir(nn.Module())) | {"operations"}


@dataclass(frozen=True)
class Value:
    """What a step makes: its number of axes with the batch, and whether Keras' last axis lies at place 1."""

    step: str
    rank: int
    moved: bool = False

    def axis(self, keras: int) -> int:
        """Where an axis that Keras counts lies here. Raises IndexError for one that there is not."""
        axis = range(self.rank)[keras]
        if not self.moved or axis == 0:
            return axis
        return 1 if axis == self.rank - 1 else axis + 1

    def without(self, keras: Sequence[int]) -> Value:
        """What is left when axes that Keras counts go away."""
        gone = {range(self.rank)[axis] for axis in keras}
        rank = self.rank - len(gone)
        return Value(self.step, rank, self.moved and self.rank - 1 not in gone and rank > 2)


class Steps:
    """The steps so far and their tensors; every name is given once and can be an attribute of a module.

    shape: of the input for one example, as torch has it. Where it is known, each step is tried at once on shapes alone
    (torch's `meta` device), so that one that does not fit is found by its name.
    """

    def __init__(self, shape: Sequence[int] | None) -> None:
        self.operations: list[Operation] = []
        self._seen = {} if shape is None else {INPUT: torch.empty((2, *shape), device="meta")}
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: set[str] = {INPUT}
        self._holders: set[str] = set()

    def add(
        self, wanted: str, kind: str, *inputs: Value, tensors: Mapping[str, Array | None] | None = None, **options: Any
    ) -> Value:
        """A step on `inputs`, with its tensors by their name in the layer; the value is like the first input."""
        name = self.name(wanted)
        if kind in FUNCTIONS:
            kind, options = "Named", {"function": kind, **options}
        self._append(Operation(name, kind, tuple(x.step for x in inputs), options))
        for own, value in (tensors or {}).items():
            if value is not None:
                self.tensors[f"{name}.{own}"] = tensor(value)
        return replace(inputs[0], step=name)

    def sizes(self, x: Value) -> tuple[int, ...] | None:
        """The sizes of a value for two examples, as it lies here; None where those of the input are left open."""
        return tuple(self._seen[x.step].shape) if x.step in self._seen else None

    def constant(self, wanted: str, value: Array, like: Value, kind: str = "buffer") -> Value:
        """A tensor of the network that is spread over `like` as Keras would: by its last axes, without the batch."""
        value = value.reshape((1,) * (like.rank - value.ndim) + value.shape)
        if like.moved:
            value = np.moveaxis(value, -1, 1)
        name = self.name(wanted)
        self._append(Operation(name, kind, (), {"shape": list(value.shape), "dtype": "float32"}))
        self.tensors[name] = tensor(value)
        return replace(like, step=name)

    def turned(self, wanted: str, x: Value, axes: Sequence[int], *, order_alone: bool = False) -> Value:
        """The value with Keras' axes in the order `axes`, lying as Keras counts them.

        order_alone: it is enough that the numbers follow each other like that, as before a reshape.
        """
        dims = [x.axis(axis) for axis in axes]
        if order_alone and x.step in self._seen:
            sizes = self._seen[x.step].shape
            longer = [axis for axis in dims if sizes[axis] != 1]
            dims = list(range(x.rank)) if longer == sorted(longer) else dims
        if dims == list(range(x.rank)):
            return replace(x, moved=False)
        return replace(self.add(wanted, "permute", x, dims=dims), moved=False)

    def plain(self, wanted: str, x: Value) -> Value:
        """The value lying as Keras counts its axes."""
        return self.turned(f"{wanted}_last", x, range(x.rank))

    def moved(self, wanted: str, x: Value) -> Value:
        """The value with Keras' last axis at place 1."""
        if x.moved or x.rank < 3:
            return x
        dims = [0, x.rank - 1, *range(1, x.rank - 1)]
        return replace(self.add(f"{wanted}_first", "permute", x, dims=dims), moved=True)

    def name(self, wanted: str) -> str:
        """`wanted` as the path of a module that nothing else has or lies below."""
        path = ".".join(_part(part) for part in re.split(r"[/.]", wanted))
        while self._names.intersection(_above(path)):
            path = path.replace(".", "_", 1)
        while path in self._names or path in self._holders:
            path += "_"
        self._names.add(path)
        self._holders.update(_above(path))
        return path

    def _append(self, step: Operation) -> None:
        self.operations.append(step)
        if not all(name in self._seen for name in step.inputs):
            return
        try:
            with torch.device("meta"), torch.no_grad():
                if step.kind in LAYERS:
                    made = LAYERS[step.kind](**step.options).eval()
                    self._seen[step.name] = made(*(self._seen[name] for name in step.inputs))
                else:
                    self._seen[step.name] = torch.empty(step.options["shape"])
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, OverflowError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0].rstrip(".")
            raise ReaderError(f"the step {step.name!r} must fit what it is called on; it does not: {reason}") from e


def tensor(value: Array) -> torch.Tensor:
    """The numbers as float32, in memory of their own."""
    return torch.from_numpy(np.array(value, np.float32, order="C", copy=True))


def _part(part: str) -> str:
    clean = re.sub(r"\W", "_", part) or "_"
    return f"{clean}_" if clean in TAKEN else clean


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


@dataclass(frozen=True)
class Use:
    """A layer of Keras where it is used: the path its steps get, its class, options and weights.

    version: of the Keras that wrote the file, 2 or 3; turned: kernels are those of Theano, which turns them round.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    weights: Mapping[str, Array]
    version: int
    turned: bool = False

    def refused(self, reason: str) -> ReaderError:
        """The error of a layer that is not rebuilt."""
        return ReaderError(f"layer {self.name!r} ({self.kind}) {reason}")

    def number(self, key: str, default: float | None = None) -> float | None:
        """An option that is a number, also in the wrappings that Keras gives to numbers of numpy."""
        found = unwrapped(self.config.get(key))
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise self.refused(f"must have a number as {key}; found {found!r:.60}")
        return float(found)

    def whole(self, key: str, default: int) -> int:
        """An option that is a whole number of at least 1."""
        return self._whole(key, self.config.get(key, default))

    def pair(self, key: str, default: Any = (1, 1)) -> tuple[int, int]:
        """An option for the height and the width."""
        found = self.config.get(key)
        found = default if found is None else found
        if isinstance(found, int):
            found = (found, found)
        if not isinstance(found, list | tuple) or len(found) != 2:
            raise self.refused(f"must have two numbers as {key}; found {found!r:.60}")
        return self._whole(key, found[0]), self._whole(key, found[1])

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """An option that is one of a few words."""
        found = self.config.get(key)
        found = default if found is None else found
        if found not in choices:
            raise self.refused(f"must have {' or '.join(choices)} as {key}; found {found!r:.60}")
        return str(found)

    def weight(self, role: str, *shape: int | None) -> Array:
        """The numbers of one weight; None stands for a size that the options do not tell."""
        found = self.weights[role]
        if found.ndim != len(shape) or any(a not in (None, b) for a, b in zip(shape, found.shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.refused(f"must have a {role} of shape ({wanted}); the file has {found.shape}")
        return found

    def placed(self, to: Steps, x: Value) -> Value:
        """A picture lying with its channels at place 1, wherever the layer expects them."""
        if x.rank != 4:
            raise self.refused(f"must be called on pictures; found {x.rank - 1} axes beside the batch")
        first = self.choice("data_format", ("channels_last", "channels_first"), "channels_last") == "channels_first"
        return to.plain(self.name, x) if first else to.moved(self.name, x)

    def _whole(self, key: str, found: Any) -> int:
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise self.refused(f"must have whole numbers as {key}; found {found!r:.60}")
        return found


def unwrapped(value: Any) -> Any:
    """A number or list out of what Keras wraps numbers of numpy in."""
    while isinstance(value, Mapping):
        inner = value.get("config", value)
        value = inner.get("value") if isinstance(inner, Mapping) else inner
    return value
