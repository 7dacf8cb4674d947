"""Layers of Keras on rows of tokens, (batch, tokens, width): attention, and pooling over the tokens.

Knows one layer at a time. Not covered: masks, attention over other axes, gates.
"""

from __future__ import annotations

from collections.abc import Sequence

from regraft.readers.keras.steps import Array, Steps, Use, Value


def attention(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer MultiHeadAttention, called on the query, the value and perhaps the key, which else is the value."""
    if len(xs) not in (2, 3) or any(x.rank != 3 for x in xs):
        raise use.refused("must be called on two or three rows of tokens")
    if use.config.get("attention_axes") not in (None, 1, [1]):
        raise use.refused("must attend along the tokens: other axes are not rebuilt")
    query, value, key = xs[0], xs[1], xs[-1]
    heads, size = use.whole("num_heads", 0), use.whole("key_dim", 0)
    depth = use.whole("value_dim", size) if use.config.get("value_dim") is not None else size
    parts = [
        _heads(use, to, x, role, heads, width)
        for x, role, width in ((query, "query", size), (key, "key", size), (value, "value", depth))
    ]
    y = to.add(f"{use.name}.attention", "attention", *parts, scale=size**-0.5)
    y = to.add(f"{use.name}.tokens", "permute", y, dims=[0, 2, 1, 3])
    y = Value(to.add(f"{use.name}.joined", "reshape", y, shape=[0, 0, heads * depth]).step, 3)
    kernel = use.weight("output_kernel", heads, depth, None)
    bias = use.weight("output_bias", kernel.shape[2]) if "output_bias" in use.weights else None
    return _linear(to, y, f"{use.name}.output", kernel.reshape(heads * depth, -1), bias)


def pooling(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layers GlobalAveragePooling1D and GlobalMaxPooling1D."""
    if xs[0].rank != 3:
        raise use.refused("must be called on rows of tokens")
    first = use.choice("data_format", ("channels_last", "channels_first"), "channels_last") == "channels_first"
    axis, keep = 2 if first else 1, bool(use.config.get("keepdims"))
    y = to.add(use.name, "amax" if "Max" in use.kind else "mean", xs[0], dim=[xs[0].axis(axis)], keepdim=keep)
    return y if keep else y.without([axis])


def _heads(use: Use, to: Steps, x: Value, role: str, heads: int, width: int) -> Value:
    """x projected for every head: (batch, heads, tokens, width)."""
    name = f"{use.name}.{role}"
    kernel = use.weight(f"{role}_kernel", None, heads, width)
    bias = use.weight(f"{role}_bias", heads, width).ravel() if f"{role}_bias" in use.weights else None
    y = _linear(to, to.plain(name, x), name, kernel.reshape(kernel.shape[0], -1), bias)
    split = to.add(f"{name}_split", "reshape", y, shape=[0, 0, heads, width])
    return Value(to.add(f"{name}_heads", "permute", split, dims=[0, 2, 1, 3]).step, 4)


def _linear(to: Steps, x: Value, name: str, kernel: Array, bias: Array | None) -> Value:
    tensors = {"weight": kernel.T, "bias": bias}
    options = {"in_features": kernel.shape[0], "out_features": kernel.shape[1], "bias": bias is not None}
    return to.add(name, "Linear", x, tensors=tensors, **options)
