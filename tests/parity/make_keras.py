"""Writes small files of Keras with the real Keras, and what it computes for them, into archives in tests/parity/files.

Run it three times, from anywhere, in environments of their own:

    pip install "tensorflow-cpu==2.15.1"             python make_keras.py
    pip install "keras==3.15.1" tensorflow-cpu jax   KERAS_BACKEND=tensorflow python make_keras.py
                                                     KERAS_BACKEND=jax python make_keras.py channels_first

Keras 2 and 3 each write a trained network with every turn that a graph can take, a network with a frozen model inside
in their other formats, and an archive of single layers: description, weights, one input, the output. The input of a
network is in the `.npz` beside it, with outputs of some layers.
"""

import json
import os
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np

warnings.filterwarnings("ignore")
L = keras.layers
FILES = Path(tempfile.mkdtemp())
VERSION = int(keras.__version__.split(".")[0])
RANDOM = np.random.RandomState(0)


def network():
    """Strided `same` convolution on an odd size, a skip, a model inside, pooling, flatten before dense."""
    x = picture = keras.Input((15, 15, 3), name="input")
    x = L.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="stem/conv" if VERSION == 2 else "stem")(x)
    x = L.BatchNormalization(name="float")(x)
    x = skip = L.LeakyReLU(name="leaky")(x)
    x = L.DepthwiseConv2D((2, 3), padding="same", name="depthwise")(x)
    x = L.SeparableConv2D(4, 2, padding="same", activation="relu", name="separable")(x)
    x = L.Add(name="add")([skip, x])
    x = keras.Sequential([L.Conv2D(5, 2, name="conv"), L.PReLU(shared_axes=[1, 2], name="slopes")], name="inner")(x)
    x = L.MaxPooling2D(2, 2, "same", name="pool")(x)
    x = L.Flatten(name="flat")(x)
    return keras.Model(picture, L.Dense(3, activation="softmax", name="head")(x), name="net")


def frozen_inside(channels_first=False):
    """A frozen model under a new head, as transfer learning makes it."""
    shape, axis = ((3, 7, 6), 1) if channels_first else ((7, 6, 3), -1)
    convolution = L.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="conv")
    base = keras.Sequential([keras.Input(shape), convolution, L.BatchNormalization(axis=axis, name="bn")], name="base")
    base.trainable = False
    x = picture = keras.Input(shape, name="picture")
    x = L.Flatten(name="flat")(base(x, training=False))
    return keras.Model(picture, L.Dense(2, name="head")(x), name="transfer")


def operations():
    """Bare operations on tensors and numbers, and preprocessing as Keras' own networks have it."""
    x = picture = keras.Input((6, 5, 3), name="picture")
    x = keras.applications.resnet50.preprocess_input(x * 255.0)
    x = keras.applications.densenet.preprocess_input(x / 200.0 - 0.25)
    y = L.Conv2D(3, 3, padding="same", name="conv")(x)
    x = (1.0 - x) + y * 0.5 - x * y
    return keras.Model(picture, L.Dense(2, name="head")(L.GlobalAveragePooling2D(name="mean")(-x)), name="net")


def tokens():
    """Attention over the places of a picture."""
    x = picture = keras.Input((6, 4, 3), name="picture")
    x = L.Reshape((6, 4), name="rows")(L.Conv2D(4, (1, 4), name="conv")(x))
    y = L.LayerNormalization(name="norm")(x)
    x = L.Add(name="add")([x, L.MultiHeadAttention(2, 3, value_dim=5, name="attention")(y, y)])
    y = L.MultiHeadAttention(2, 2, use_bias=False, name="reads")(query=L.Dense(3, name="dense")(x), value=x, key=y)
    return keras.Model(picture, L.GlobalAveragePooling1D(name="mean")(y), name="net")


def perturb(model):
    """Weights and statistics of which no two are alike."""
    for variable in model.weights:
        value = np.asarray(variable)
        leaf = (getattr(variable, "path", None) or variable.name).rpartition("/")[2].partition(":")[0]
        if leaf == "count" or not np.issubdtype(value.dtype, np.floating):
            continue
        positive = leaf in ("gamma", "moving_variance", "variance")
        variable.assign(abs(coarse(value.shape)) + 0.5 if positive else coarse(value.shape) / 2)


def coarse(shape):
    """Numbers of few digits, which take little room when packed."""
    return (np.round(RANDOM.normal(size=shape) * 32) / 32).astype("float32")


def outputs(model, x, names=()):
    """The input and the output as arrays, with outputs of the layers `names`."""
    found = {name: model.get_layer(name).output for name in names}
    several = keras.Model(model.input, [*found.values(), model.output])
    values = several.predict(x, verbose=0)
    values = values if isinstance(values, list) else [values]
    return {"input": x, **dict(zip([*found, "output"], values))}  # noqa: B905


def write_networks():
    """keras3.keras (or keras2.h5) of the large network, and the small one in the other formats."""
    model = network()
    perturb(model)
    x = coarse((3, 15, 15, 3))
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    model.fit(x, np.array([0, 1, 2]), epochs=3, verbose=0)
    if VERSION == 3:
        model.save(FILES / "keras3.keras")
    else:
        model.save(FILES / "keras2.h5", include_optimizer=False)
    names = ("leaky", "depthwise", "add", "pool")
    np.savez(FILES / f"keras{VERSION}.npz", **outputs(model, x, names))

    model = operations()
    perturb(model)
    model.save(FILES / f"keras{VERSION}_operations.h5")
    np.savez(FILES / f"keras{VERSION}_operations.npz", **outputs(model, coarse((2, 6, 5, 3))))

    model = tokens()
    perturb(model)
    model.save(FILES / f"keras{VERSION}_tokens.h5")
    model.save(FILES / f"keras{VERSION}_tokens.keras")
    np.savez(FILES / f"keras{VERSION}_tokens.npz", **outputs(model, coarse((2, 6, 4, 3))))

    model = frozen_inside()
    perturb(model)
    x = coarse((2, 7, 6, 3))
    if VERSION == 3:
        model.save(FILES / "keras3_frozen.h5")
    else:
        model.save(FILES / "keras2_frozen.h5")
        model.save_weights(FILES / "keras2_frozen_weights.h5")
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    model.fit(x, np.zeros((2, 2)), verbose=0, epochs=0)
    if VERSION == 3:
        model.optimizer.build(model.trainable_variables)
        model.save_weights(FILES / "keras3_frozen.weights.h5")
    else:
        model.save(FILES / "keras2_frozen.keras")
    weights = {w.name if VERSION == 2 else w.path: np.asarray(w) for w in model.weights}
    named = {f"weight:{name}": value for name, value in weights.items()}
    np.savez(FILES / f"keras{VERSION}_frozen.npz", **outputs(model, x), **named)


def write_channels_first():
    """The small network with the channels before height and width."""
    keras.config.set_image_data_format("channels_first")
    model = frozen_inside(channels_first=True)
    perturb(model)
    x = coarse((2, 3, 7, 6))
    model.save(FILES / "keras3_first.keras")
    np.savez(FILES / "keras3_first.npz", **outputs(model, x))


def single_layers():
    """Name -> (layers one after the other, shape of the input)."""
    picture = (7, 6, 2)
    cases = {
        "conv": [L.Conv2D(3, (3, 2), activation="relu")],
        "conv same even": [L.Conv2D(3, (2, 4), padding="same")],
        "conv same strided": [L.Conv2D(3, 3, strides=2, padding="same", activation="tanh")],
        "conv same strided 1": [L.Conv2D(3, 1, strides=2, padding="same")],
        "conv dilated": [L.Conv2D(3, 3, dilation_rate=(2, 1), padding="same")],
        "depthwise": [L.DepthwiseConv2D(3, depth_multiplier=2, activation="elu")],
        "depthwise same strided": [L.DepthwiseConv2D((2, 3), strides=2, padding="same", use_bias=False)],
        "separable": [L.SeparableConv2D(3, 3, strides=2, padding="same", depth_multiplier=2, activation="selu")],
        "transposed": [L.Conv2DTranspose(3, 3)],
        "transposed strided": [L.Conv2DTranspose(3, (4, 3), strides=2, activation="relu")],
        "transposed sparse": [L.Conv2DTranspose(3, 1, strides=2)],
        "transposed same": [L.Conv2DTranspose(3, 3, strides=2, padding="same")],
        "transposed same even": [L.Conv2DTranspose(3, (4, 2), strides=2, padding="same")],
        "transposed same sparse": [L.Conv2DTranspose(3, 2, strides=3, padding="same")],
        "transposed padded": [L.Conv2DTranspose(3, 3, strides=2, padding="same", output_padding=1)],
        "dense on a picture": [L.Dense(3, activation="softmax")],
        "dense on a picture, then conv": [L.Dense(3), L.Conv2D(2, 3)],
        "batch norm without scale": [L.BatchNormalization(scale=False, epsilon=0.01)],
        "batch norm without centre": [L.BatchNormalization(center=False)],
        "layer norm": [L.LayerNormalization()],
        "layer norm over all": [L.LayerNormalization(axis=[1, 2, 3], epsilon=1e-2)],
        "layer norm, then conv": [L.LayerNormalization(center=False), L.Conv2D(2, 3)],
        "relu with all": [L.ReLU(max_value=1.0, negative_slope=0.1, threshold=0.3)],
        "relu from a threshold": [L.ReLU(threshold=0.5)],
        "relu up to 6": [L.ReLU(6.0)],
        "leaky relu": [L.LeakyReLU(0.15)],
        "prelu": [L.PReLU()],
        "prelu by channel": [L.PReLU(shared_axes=[1, 2])],
        "prelu on a vector": [L.Flatten(), L.PReLU()],
        "elu": [L.ELU(0.7)],
        "softmax over rows": [L.Softmax(axis=1)],
        "layer as activation": [L.Conv2D(3, 3, activation=L.LeakyReLU(0.25))],
        "drops": [L.Dropout(0.5), L.SpatialDropout2D(0.5), L.GaussianNoise(1.0), L.GaussianDropout(0.3)],
        "max pool": [L.MaxPooling2D((2, 3))],
        "max pool same": [L.MaxPooling2D(3, 2, padding="same")],
        "average pool": [L.AveragePooling2D(3, 2)],
        "average pool same": [L.AveragePooling2D((3, 2), (2, 1), padding="same")],
        "global average": [L.GlobalAveragePooling2D()],
        "global average, kept": [L.GlobalAveragePooling2D(keepdims=True), L.Conv2D(2, 1)],
        "global max": [L.GlobalMaxPooling2D()],
        "flatten": [L.Flatten(), L.Dense(3)],
        "reshape": [L.Reshape((14, 3, -1)), L.Conv2D(2, 2)],
        "reshape to a vector": [L.Reshape((-1,))],
        "permute": [L.Permute((3, 1, 2))],
        "permute, then conv": [L.Permute((2, 1, 3)), L.Conv2D(2, (3, 2))],
        "zero padding": [L.ZeroPadding2D(((1, 2), (0, 3)))],
        "cropping": [L.Cropping2D(((1, 2), (0, 3)))],
        "up sampling": [L.UpSampling2D(2)],
        "up sampling unequal": [L.UpSampling2D((2, 3), interpolation="bilinear")],
        "rescaling": [L.Rescaling(1 / 127.5, offset=-1)],
        "rescaling by channel": [L.Rescaling([0.5, 2.0], offset=[1.0, -1.0])],
        "normalization": [L.Normalization()],
        "normalization given": [L.Normalization(mean=[0.1, 0.2], variance=[2.0, 3.0])],
        "normalization over nothing": [L.Normalization(axis=None)],
        "normalization inverse": [L.Normalization(mean=[0.1, 0.2], variance=[2.0, 3.0], invert=True)],
        "resizing": [L.Resizing(5, 9)],
        "resizing to the nearest": [L.Resizing(5, 9, interpolation="nearest")],
        "normalization over all": [L.Normalization(axis=(1, 2, 3))],
        "unit normalization": [L.UnitNormalization(), L.Conv2D(2, 3)],
        "unit normalization over rows and columns": [L.UnitNormalization(axis=(1, 2))],
        "centre crop": [L.CenterCrop(4, 3)],
        "augmentation": [L.RandomFlip(), L.RandomRotation(0.2), L.RandomZoom(0.2), L.RandomContrast(0.2)],
    }
    if VERSION == 3:
        cases["group norm"] = [L.GroupNormalization(2)]
        cases["conv in groups"] = [L.Conv2D(4, 3, groups=2)]
        cases["identity"] = [L.Identity()]
    else:
        cases["thresholded relu"] = [L.ThresholdedReLU(0.4)]
    names = ["linear", "relu", "elu", "selu", "gelu", "softplus", "softsign", "swish", "mish", "tanh", "sigmoid"]
    names += ["hard_sigmoid", "exponential", "softmax"]
    if VERSION == 3:
        names += ["relu6", "leaky_relu", "celu", "hard_silu", "hard_tanh", "hard_shrink", "soft_shrink", "tanh_shrink"]
        names += ["log_sigmoid", "log_softmax", "sparse_sigmoid", "sparse_plus", "squareplus"]
    cases |= {f"activation {name}": [L.Activation(name)] for name in names}
    shapes = dict.fromkeys(cases, picture)
    cases["grey without channels"] = [L.Flatten(), L.Dense(3)]
    cases["vector"] = [L.Dense(3), L.BatchNormalization(), L.LayerNormalization(), L.Activation("relu")]
    return {name: (layers, shapes.get(name, (5, 4) if "grey" in name else (6,))) for name, layers in cases.items()}


def joins():
    """Name -> a model that joins tensors."""
    found = {}
    for kind in ("Add", "Multiply", "Average", "Maximum", "Minimum", "Subtract", "Concatenate"):
        x = keras.Input((5, 4, 2))
        parts = [L.Conv2D(3, 2)(x), L.Conv2D(3, 2)(x), L.Conv2D(3, 2)(x)]
        found[kind] = keras.Model(x, getattr(L, kind)()(parts[: 2 if kind == "Subtract" else 3]))
    x = keras.Input((5, 4, 2))
    found["rows side by side"] = keras.Model(x, L.Concatenate(axis=1)([x, L.Dense(2)(x)]))
    x = keras.Input((5, 4, 2))
    gate = L.Dense(2, activation="sigmoid")(L.GlobalAveragePooling2D()(x))
    found["squeeze and excite"] = keras.Model(x, L.Multiply()([x, gate]))
    x = keras.Input((5, 4, 2))
    relu = L.ReLU()
    found["a layer twice"] = keras.Model(x, L.Concatenate()([relu(x), relu(L.Conv2D(2, 1)(x))]))
    x = keras.Input((5, 4, 2))
    y = L.Conv2D(2, 1)(x)
    found["arithmetic"] = keras.Model(x, (2.0 - x) * 3.0 / 4.0 + (y - 0.5) * x - y / (x * x + 1.0))
    for name, function in functions().items():
        x = keras.Input((5, 4, 2))
        found[name] = keras.Model(x, function(x, L.Conv2D(2, 1)(x)))
    from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

    x = keras.Input((5, 4, 2))
    found["a layer of Keras' own network"] = keras.Model(x, CustomScaleLayer(0.25)([x, L.Conv2D(2, 1)(x)]))
    return found


def functions():
    """Name -> a function of two pictures, of what Keras calls on tensors without a layer."""
    if VERSION == 3:
        ops = keras.ops
        mean, concat = ops.mean, ops.concatenate
        found = {
            "function hard silu": lambda x, y: ops.hard_silu(x),
            "function leaky relu": lambda x, y: ops.leaky_relu(x, 0.3),
            "function stack": lambda x, y: ops.stack([x[..., 1], y[..., 0]], axis=-1),
        }
    else:
        import tensorflow as tf

        ops, mean, concat = tf, tf.reduce_mean, tf.concat
        found = {"function leaky relu": lambda x, y: tf.nn.leaky_relu(x, 0.3)}
    nn = ops if VERSION == 3 else ops.nn
    found["function leaky relu as it is"] = lambda x, y: nn.leaky_relu(x)
    for name in ("relu", "relu6", "silu", "gelu", "softmax", "sigmoid", "tanh"):
        found[f"function {name}"] = lambda x, y, name=name: getattr(nn, name)(x)
    return found | {
        "function mean": lambda x, y: mean(x, axis=(1, 2)),
        "function mean of channels": lambda x, y: mean(x, axis=-1, keepdims=True) * y,
        "function mean of rows": lambda x, y: mean(x, axis=1),
        "function concat": lambda x, y: concat([x, y], axis=1),
        "function maximum": lambda x, y: ops.maximum(ops.minimum(x, y), -0.25),
        "function reshape": lambda x, y: L.Dense(2)(ops.reshape(x, (-1, 10, 4))),
        "function power": lambda x, y: x**2 - 1.0 / (y**2 + 2.0),
        "function negative": lambda x, y: -x,
        "constants": lambda x, y: (x - np.array([0.5, 2.0], "float32")) / np.array([0.5, 2.0], "float32"),
        "pieces": lambda x, y: x[:, 1:, ::2, ::-1],
        "a row": lambda x, y: x[:, 2, 1:],
    }


def write_layers():
    """keras2_layers.npz or keras3_layers.npz: descriptions as JSON, and all numbers one after the other."""
    models = {}
    for name, (layers, shape) in single_layers().items():
        x = picture = keras.Input(shape)
        for layer in layers:
            x = layer(x)
        models[name] = keras.Model(picture, x)
    models |= joins()
    described, numbers = {}, []
    inputs = {}
    for name, model in models.items():
        perturb(model)
        for layer in model.layers:
            if hasattr(layer, "finalize_state"):
                layer.finalize_state()
        shape = model.input_shape[1:]
        x = inputs.setdefault(shape, coarse((1, *shape)))
        y = model.predict(x, verbose=0)
        text = json.dumps(keras.saving.serialize_keras_object(model)) if VERSION == 3 else model.to_json()
        weights = [
            [layer.name, np.asarray(w)] for layer in model.layers for w in layer.weights if "StateVar" not in w.name
        ]
        described[name] = {
            "model": json.loads(text),
            "input": list(shape),
            "output": list(y.shape),
            "weights": [[layer, list(value.shape)] for layer, value in weights],
        }
        numbers += [value.ravel() for _, value in weights] + [y.ravel()]
    named = {"input " + " ".join(map(str, shape)): x for shape, x in inputs.items()}
    joined = np.concatenate(numbers).astype("float32")
    np.savez(FILES / f"keras{VERSION}_layers.npz", described=json.dumps(described), numbers=joined, **named)


def pack(name):
    """What was written, in one archive: HDF5 is mostly empty space."""
    place = Path(__file__).parent / "files" / name
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(FILES.iterdir()):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    if "channels_first" in sys.argv:
        write_channels_first()
        pack("keras3_first.zip")
    else:
        write_networks()
        write_layers()
        pack(f"keras{VERSION}.zip")
