"""Activations of Keras, by name and as layers.

Names mean what the version of Keras that wrote the file meant by them: `hard_sigmoid` is 0.2 x + 0.5 in Keras 2 and
x / 6 + 0.5 in Keras 3, both cut off at 0 and 1. Not covered: glu, sparsemax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from regraft.readers.keras.steps import Steps, Use, Value

BY_NAME: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "linear": (),
    "relu": (("ReLU", {}),),
    "relu6": (("ReLU6", {}),),
    "leaky_relu": (("LeakyReLU", {"negative_slope": 0.2}),),
    "elu": (("ELU", {}),),
    "selu": (("SELU", {}),),
    "celu": (("CELU", {}),),
    "gelu": (("GELU", {}),),
    "silu": (("SiLU", {}),),
    "swish": (("SiLU", {}),),
    "mish": (("Mish", {}),),
    "tanh": (("Tanh", {}),),
    "sigmoid": (("Sigmoid", {}),),
    "hard_sigmoid": (("Hardsigmoid", {}),),
    "hard_silu": (("Hardswish", {}),),
    "hard_swish": (("Hardswish", {}),),
    "hard_tanh": (("clamp", {"min": -1.0, "max": 1.0}),),
    "hard_shrink": (("Hardshrink", {}),),
    "soft_shrink": (("Softshrink", {}),),
    "tanh_shrink": (("Tanhshrink", {}),),
    "softplus": (("Softplus", {}),),
    "softsign": (("Softsign", {}),),
    "log_sigmoid": (("LogSigmoid", {}),),
    "exponential": (("exp", {}),),
    "sparse_sigmoid": (("affine", {"scale": 0.5, "shift": 0.5}), ("clamp", {"min": 0.0, "max": 1.0})),
}
"""Steps, one after the other."""
HARD_SIGMOID_2 = (("affine", {"scale": 0.2, "shift": 0.5}), ("clamp", {"min": 0.0, "max": 1.0}))


def activated(use: Use, to: Steps, x: Value) -> Value:
    """x after the activation that the options of a layer name, if any."""
    return _named(use, to, x, f"{use.name}_activation")


def activation(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Activation."""
    return _named(use, to, xs[0], use.name)


def relu(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer ReLU: max_value where x is above, x from threshold on, negative_slope * (x - threshold) below."""
    x, name = xs[0], use.name
    most, threshold = use.number("max_value"), use.number("threshold", 0.0)
    slope = use.number("negative_slope", 0.0)
    if most == 6 and not threshold and not slope:
        return to.add(name, "ReLU6", x)
    last = name if most is None else f"{name}_below"
    if not threshold:
        y = to.add(last, "LeakyReLU", x, negative_slope=slope) if slope else to.add(last, "ReLU", x)
    else:
        y = to.add(f"{name}_above" if slope else last, "Threshold", x, threshold=threshold, value=0.0)
    if threshold and slope:
        short = to.add(f"{name}_from", "affine", x, shift=-threshold)
        short = to.add(f"{name}_short", "clamp", short, max=0.0)
        y = to.add(last, "add", y, to.add(f"{name}_slope", "affine", short, scale=slope))
    return y if most is None else to.add(name, "clamp", y, max=most)


def leaky_relu(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer LeakyReLU; the slope is called alpha in Keras 2."""
    slope = use.number("negative_slope", use.number("alpha", 0.3))
    return to.add(use.name, "LeakyReLU", xs[0], negative_slope=slope)


def thresholded_relu(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer ThresholdedReLU of Keras 2."""
    return to.add(use.name, "Threshold", xs[0], threshold=use.number("theta", 1.0), value=0.0)


def elu(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer ELU."""
    return to.add(use.name, "ELU", xs[0], alpha=use.number("alpha", 1.0))


def softmax(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Softmax, along one axis."""
    axis = use.config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    return to.add(use.name, "Softmax", xs[0], dim=xs[0].axis(axis))


def prelu(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer PReLU: a slope for every channel, or for every place."""
    x, slopes = xs[0], use.weights["alpha"]
    channel = 0 if not x.moved and x.rank == 4 else -1
    if slopes.ndim == x.rank - 1 and slopes.size == slopes.shape[channel] and (x.moved or x.rank == 2 or channel == 0):
        return to.add(use.name, "PReLU", x, tensors={"weight": slopes.ravel()}, num_parameters=slopes.size)
    alpha = to.constant(f"{use.name}_alpha", slopes, x, "parameter")
    below = to.add(f"{use.name}_below", "mul", to.add(f"{use.name}_negative", "clamp", x, max=0.0), alpha)
    return to.add(use.name, "add", to.add(f"{use.name}_positive", "clamp", x, min=0.0), below)


AS_ACTIVATION: dict[str, Callable[[Use, Steps, Sequence[Value]], Value]] = {
    "ReLU": relu,
    "LeakyReLU": leaky_relu,
    "ThresholdedReLU": thresholded_relu,
    "ELU": elu,
    "Softmax": softmax,
}
"""Layers that another layer may name as its activation."""


def _named(use: Use, to: Steps, x: Value, wanted: str) -> Value:
    spec = use.config.get("activation")
    if isinstance(spec, Mapping):
        config = spec.get("config")
        own = str(spec.get("module") or "builtins").partition(".")[0] in ("builtins", "keras", "tf_keras")
        make = AS_ACTIVATION.get(str(spec.get("class_name")))
        if own and make and isinstance(config, Mapping):
            return make(replace(use, name=wanted, kind=str(spec["class_name"]), config=config), to, [x])
        spec = config if own and spec.get("class_name") == "function" else spec
    name = "linear" if spec is None else spec
    if name in ("softmax", "log_softmax"):
        return to.add(wanted, "Softmax" if name == "softmax" else "LogSoftmax", x, dim=x.axis(-1))
    if name == "squareplus":  # (x + sqrt(x^2 + 4)) / 2
        square = to.add(f"{wanted}_square", "mul", x, x)
        root = to.add(f"{wanted}_root", "sqrt", to.add(f"{wanted}_more", "affine", square, shift=4.0))
        return to.add(wanted, "affine", to.add(f"{wanted}_sum", "add", x, root), scale=0.5)
    if name == "sparse_plus":  # (x + 1)^2 / 4 between -1 and 1, 0 below, x above
        near = to.add(f"{wanted}_near", "clamp", to.add(f"{wanted}_more", "affine", x, shift=1.0), min=0.0, max=2.0)
        half = to.add(f"{wanted}_half", "affine", near, scale=0.5)
        far = to.add(f"{wanted}_far", "clamp", to.add(f"{wanted}_less", "affine", x, shift=-1.0), min=0.0)
        return to.add(wanted, "add", to.add(f"{wanted}_square", "mul", half, half), far)
    if not isinstance(name, str) or name not in BY_NAME:
        raise use.refused(f"has an activation that regraft does not know: {name!r:.80}")
    steps = HARD_SIGMOID_2 if name == "hard_sigmoid" and use.version < 3 else BY_NAME[name]
    for i, (kind, options) in enumerate(steps):
        x = to.add(wanted if i == len(steps) - 1 else f"{wanted}_{i}", kind, x, **options)
    return x
