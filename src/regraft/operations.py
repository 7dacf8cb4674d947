"""A network as a list of operations: plain JSON and named tensors, which graphs of other frameworks are read into.

An operation is one of a written list: a layer of torch with its options, or a function of a few tensors. Nothing in
the list runs code that a file brings along, and nothing is allocated on the word of a file: layers are made without
storage and take the tensors that were read, when their shapes are right. Pictures are (batch, channels, height,
width) as in torch.

Knows torch alone. Not covered: loops, branches on values, more than one output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from regraft.errors import ReaderError

INPUT = "input"
TENSORS = ("parameter", "buffer")
"""A tensor of the network that no layer owns; `options`: {"shape": [...], "dtype": "float32"}."""


class SamePadding(nn.Module):
    """x (n, c, h, w) padded so that a window gives ceil(size / stride) outputs, as TensorFlow's SAME does.

    Where an odd number of pixels is missing, the odd one comes after, or before. kernel, stride, dilation: (height,
    width).
    """

    def __init__(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int] = (1, 1),
        value: float = 0.0,
        before: bool = False,
    ) -> None:
        super().__init__()
        self.before = before
        self.kernel, self.stride, self.dilation, self.value = tuple(kernel), tuple(stride), tuple(dilation), value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The padded x."""
        pads: list[int] = []
        for axis in (1, 0):  # torch pads the last axis first
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = (-(-size // stride) - 1) * stride + (self.kernel[axis] - 1) * self.dilation[axis] + 1
            missing = max(0, reach - size)
            pads += sorted((missing // 2, missing - missing // 2), reverse=self.before)
        range_of = torch.finfo(x.dtype)  # the lowest float32, which marks a pool's padding, is none of bfloat16
        return F.pad(x, pads, value=min(max(self.value, range_of.min), range_of.max))


class AverageSame(SamePadding):
    """Average pooling with such padding, where the padding does not count."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The averages, (n, c, ceil(h / stride), ceil(w / stride))."""
        padded, seen = super().forward(x), super().forward(torch.ones_like(x[:, :1]))
        return F.avg_pool2d(padded, self.kernel, self.stride) / F.avg_pool2d(seen, self.kernel, self.stride)


class Named(nn.Module):
    """One of FUNCTIONS as a layer, so that its result can be found by the name of its step, as a place to cut."""

    def __init__(self, function: str, **options: Any) -> None:
        super().__init__()
        self.function, self.options = FUNCTIONS[function], options

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The function of the inputs."""
        return self.function(*inputs, **self.options)


LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, AverageSame, SamePadding, Named),
        *(nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding, nn.Flatten, nn.Identity, nn.Upsample),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.Dropout, nn.Dropout2d),
        *(nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6),
        *(nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softmax, nn.LogSoftmax, nn.Softplus, nn.Tanh),
        *(nn.CELU, nn.Hardshrink, nn.LogSigmoid, nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold),
    )
}
"""Layers by the name of their class; `options` are their keyword arguments."""


def affine(x: torch.Tensor, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """x * scale + shift, by numbers."""
    return x * scale + shift


def concat(*tensors: torch.Tensor, dim: int) -> torch.Tensor:
    """Tensors side by side along dim."""
    return torch.cat(tensors, dim)


def slice_along(x: torch.Tensor, dim: int, start: int | None, stop: int | None, step: int = 1) -> torch.Tensor:
    """x[..., start:stop:step, ...] along dim."""
    piece = slice(start, stop, step)
    return x[(slice(None),) * dim + (piece,)] if dim >= 0 else x[(..., piece) + (slice(None),) * (-dim - 1)]


def reshape(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """x in another shape; 0 keeps the size of that axis, -1 is what is left."""
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def pad(x: torch.Tensor, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> torch.Tensor:
    """F.pad: pads are (left, right, top, bottom, ...), the last axis first."""
    return F.pad(x, list(pads), mode, value) if mode == "constant" else F.pad(x, list(pads), mode)


def mean(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """Mean over the axes dim."""
    return x.mean(tuple(dim), keepdim=keepdim)


def amax(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """Largest value over the axes dim."""
    return x.amax(tuple(dim), keepdim=keepdim)


def amin(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """Least value over the axes dim."""
    return x.amin(tuple(dim), keepdim=keepdim)


def total(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """Sum over the axes dim."""
    return x.sum(tuple(dim), keepdim=keepdim)


def expand(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """x repeated along axes of length 1; -1 keeps an axis."""
    return x.expand(*shape)


def expand_batch(x: torch.Tensor, like: torch.Tensor, rank: int) -> torch.Tensor:
    """x (1, ...) of that rank, once for every row of `like`."""
    return x.expand(like.shape[0], *[-1] * (rank - 1))


def take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """The places along dim that index (int64, one axis) names, in its order."""
    return x.index_select(dim, index)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None,
) -> torch.Tensor:
    """softmax(query keyᵀ scale + mask) value over the last two axes; scale None is 1 / sqrt(width)."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def einsum(*tensors: torch.Tensor, equation: str) -> torch.Tensor:
    """A sum of products, as the equation names their axes."""
    return torch.einsum(equation, *tensors)


def permute(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Axes in another order."""
    return x.permute(*dims)


def upsample(x: torch.Tensor, scale: Sequence[float], mode: str) -> torch.Tensor:
    """F.interpolate of (n, c, h, w) by a factor for the height and one for the width."""
    return F.interpolate(x, scale_factor=tuple(scale), mode=mode)


def local_response_norm(x: torch.Tensor, size: int, alpha: float, beta: float, k: float) -> torch.Tensor:
    """Normalisation over neighbouring channels (Krizhevsky et al. 2012)."""
    return F.local_response_norm(x, size, alpha, beta, k)


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "abs": torch.abs,
    "add": operator.add,
    "affine": affine,
    "amax": amax,
    "amin": amin,
    "attention": attention,
    "clamp": torch.clamp,
    "concat": concat,
    "div": operator.truediv,
    "einsum": einsum,
    "erf": torch.erf,
    "exp": torch.exp,
    "expand": expand,
    "expand_batch": expand_batch,
    "flip": torch.flip,
    "local_response_norm": local_response_norm,
    "log": torch.log,
    "matmul": torch.matmul,
    "maximum": torch.maximum,
    "mean": mean,
    "minimum": torch.minimum,
    "mul": operator.mul,
    "neg": torch.neg,
    "pad": pad,
    "permute": permute,
    "pixel_shuffle": F.pixel_shuffle,
    "pixel_unshuffle": F.pixel_unshuffle,
    "pow": torch.pow,
    "reshape": reshape,
    "roll": torch.roll,
    "rsqrt": torch.rsqrt,
    "select": torch.select,
    "slice": slice_along,
    "sqrt": torch.sqrt,
    "squeeze": torch.squeeze,
    "sub": operator.sub,
    "sum": total,
    "take": take,
    "tile": torch.tile,
    "transpose": torch.transpose,
    "unsqueeze": torch.unsqueeze,
    "upsample": upsample,
    "var": torch.var,
    "vector_norm": torch.linalg.vector_norm,
    "where": torch.where,
}
"""Functions of the tensors in `inputs`, then of `options` by keyword."""


@dataclass(frozen=True)
class Operation:
    """One step: name (dots make nested modules), kind (a layer, a function, a tensor), what goes in, options."""

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operations:
    """A network: steps in an order in which they can run, `input` first of all, and the name of the last one."""

    steps: tuple[Operation, ...]
    output: str

    def to_json(self) -> dict[str, Any]:
        """The list as JSON values, for `operations_from_json`."""
        return asdict(self)


def operations_from_json(value: Mapping[str, Any]) -> Operations:
    """The inverse of `Operations.to_json`; KeyError or TypeError where it is no such list."""
    steps = [Operation(str(s["name"]), str(s["kind"]), tuple(s["inputs"]), dict(s["options"])) for s in value["steps"]]
    return Operations(tuple(steps), str(value["output"]))


class Network(nn.Module):
    """The steps as a module; layers and tensors hang at the paths that the names of their steps give."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        known = {INPUT}
        for step in operations.steps:
            if step.name in known or not known.issuperset(step.inputs):
                raise ReaderError(
                    f"Every step must have a name of its own and come after its inputs; {step.name!r} does not."
                )
            _add(self, step)
            known.add(step.name)
        if operations.output not in known:
            raise ReaderError(f"The output of a network must be one of its steps; {operations.output!r} is none.")
        self.operations = operations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the steps on x, (batch, channels, height, width)."""
        values = {INPUT: x}
        for step in self.operations.steps:
            inputs = [values[name] for name in step.inputs]
            if step.kind in FUNCTIONS:
                values[step.name] = FUNCTIONS[step.kind](*inputs, **step.options)
            elif step.kind in TENSORS:
                values[step.name] = _at(self, step.name)
            else:
                values[step.name] = _at(self, step.name)(*inputs)
        return values[self.operations.output]


def build(operations: Operations, tensors: Mapping[str, torch.Tensor] | None = None) -> Network:
    """The network as an ordinary module in evaluation mode; its `state_dict` is named after the steps.

    tensors: its state, by name (`STEP.weight`; a tensor that no layer owns by the name of its step); None leaves the
    parameters as they happen to be. Raises ReaderError for a step that is not of the list or cannot be made, and for
    tensors that are missing, too many or of another shape.
    """
    with torch.device("meta"):
        network = Network(operations)
    _fill(network, tensors)
    return network.eval()


def _add(root: nn.Module, step: Operation) -> None:
    if step.kind in FUNCTIONS:
        return
    if step.kind not in LAYERS and step.kind not in TENSORS:
        raise ReaderError(f"An operation must be one that regraft knows; {step.name!r} is {step.kind!r}.")
    path, _, own = step.name.rpartition(".")
    try:
        holder = _at(root, path, make=True)
        if step.kind in LAYERS:
            holder.add_module(own, LAYERS[step.kind](**step.options))
            return
        value = torch.empty(step.options["shape"], dtype=getattr(torch, step.options.get("dtype", "float32")))
        if step.kind == "parameter":
            holder.register_parameter(own, nn.Parameter(value))
        else:
            holder.register_buffer(own, value)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as e:
        raise ReaderError(f"The step {step.name!r} must be a {step.kind} that can be made: {e}.") from e


def _at(root: nn.Module, path: str, *, make: bool = False) -> Any:
    """The module or tensor at a dotted path; `make` adds plain modules on the way."""
    found = root
    for part in path.split(".") if path else ():
        if make and part not in found._modules:
            found.add_module(part, nn.Module())
        found = getattr(found, part)
    return found


def _fill(module: nn.Module, tensors: Mapping[str, torch.Tensor] | None) -> None:
    """Take `tensors` as the state, after the shapes were compared, so that no more is allocated than was read."""
    state = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    if tensors is None:
        module.to_empty(device="cpu")
        return
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in (state.keys() - counters) | found.keys() if state.get(name) != found.get(name))
    if wrong:
        listed = ", ".join(f"{n} {found.get(n, 'absent')} instead of {state.get(n, 'absent')}" for n in wrong[:3])
        raise ReaderError(f"The tensors of a network must be those of its steps; {len(wrong)} differ: {listed}.")
    filled = {name: torch.zeros((), dtype=torch.long) for name in counters}
    module.load_state_dict({**filled, **tensors}, assign=True)
