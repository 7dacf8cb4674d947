"""Writes files/arrays_*: a network trained with Flax, and one as Theano's users kept it, with inputs and outputs.

Needs flax, jax, numpy and scipy in an environment of their own (written with flax 0.12.8, jax 0.10.2, scipy 1.17.1):

    python tests/parity/make_arrays.py
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from flax.training import train_state
from scipy.signal import convolve2d

FILES = Path(__file__).parent / "files"


class Small(nn.Module):
    """A strided SAME convolution with an even kernel on an odd size, depthwise, batch norm, pooling, dense."""

    @nn.compact
    def __call__(self, x, train=False):
        """The logits, and what some layers gave."""
        seen = {}
        x = seen["first"] = nn.Conv(6, (4, 4), strides=2, padding="SAME", name="first")(x)
        x = nn.leaky_relu(nn.BatchNorm(use_running_average=not train, name="norm")(x), 0.2)
        x = seen["depthwise"] = nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="depthwise")(x)
        x = seen["pooled"] = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="logits")(x), seen


class State(train_state.TrainState):
    """As examples of Flax keep it, the statistics beside the parameters."""

    batch_stats: dict


def trained():
    """The state after a few steps on random pictures."""
    pictures = jax.random.normal(jax.random.key(0), (32, 15, 15, 3)) * 2 + 0.5
    labels = jnp.argmax(pictures.mean((1, 2)), -1)
    model = Small()
    first = model.init(jax.random.key(1), pictures, train=True)
    state = State.create(
        apply_fn=model.apply, params=first["params"], tx=optax.adam(0.01), batch_stats=first["batch_stats"]
    )

    def loss(params, stats):
        variables = {"params": params, "batch_stats": stats}
        (logits, _), new = model.apply(variables, pictures, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    for _ in range(20):
        (_, new), slopes = jax.value_and_grad(loss, has_aux=True)(state.params, state.batch_stats)
        state = state.apply_gradients(grads=slopes, batch_stats=new["batch_stats"])
    return model, state


def write_flax():
    """The state as bytes, the same in small chunks and in bfloat16, and what the network gives."""
    model, state = trained()
    (FILES / "arrays_flax.msgpack").write_bytes(serialization.to_bytes(state))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    (FILES / "arrays_flax_bfloat16.msgpack").write_bytes(serialization.to_bytes(half))
    whole, serialization.MAX_CHUNK_SIZE = serialization.MAX_CHUNK_SIZE, 400
    (FILES / "arrays_flax_chunks.msgpack").write_bytes(serialization.to_bytes(variables))
    serialization.MAX_CHUNK_SIZE = whole
    x = jax.random.normal(jax.random.key(2), (4, 15, 15, 3))
    logits, seen = model.apply(variables, x)
    outputs = {name: np.asarray(value) for name, value in seen.items()}
    np.savez_compressed(FILES / "arrays_flax_io.npz", x=np.asarray(x), logits=np.asarray(logits), **outputs)


def write_theano():
    """Parameters as `numpy.savez(FILE, *lasagne.layers.get_all_param_values(net))` kept them, of true convolutions."""
    draw = np.random.default_rng(3)
    kernel, bias = draw.normal(size=(5, 3, 3, 3)).astype("f4"), draw.normal(size=5).astype("f4")
    dense, last = draw.normal(size=(5 * 6 * 6, 4)).astype("f4"), draw.normal(size=4).astype("f4")
    x = draw.normal(size=(2, 3, 8, 8)).astype("f4")
    grids = np.stack(
        [[sum(convolve2d(c, k, "valid") for c, k in zip(picture, out, strict=True)) for out in kernel] for picture in x]
    )
    grids = np.maximum(grids + bias[:, None, None], 0)
    np.savez(FILES / "arrays_theano.npz", kernel, bias, dense, last)
    logits = grids.reshape(2, -1) @ dense + last
    np.savez(FILES / "arrays_theano_io.npz", x=x, grids=grids.astype("f4"), logits=logits.astype("f4"))


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    write_flax()
    write_theano()
