"""Write the TensorFlow fixtures: checkpoints of three generations, SavedModels and frozen graphs, with their outputs.

Run with the real framework in an environment of its own (`pip install tensorflow-cpu tf-keras`):

    python tests/parity/make_tensorflow.py tests/parity/files

Each archive `tensorflow_NAME.tar.xz` holds what TensorFlow wrote (a SavedModel is 10 times smaller so), and
`tensorflow_NAME.npz` an input and the outputs of several layers, pictures with their channels last as TensorFlow has
them.
"""

from __future__ import annotations

import os

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "TF_ENABLE_ONEDNN_OPTS": "0"}

import io
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

v1 = tf.compat.v1


def pack(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size = path.stat().st_size
            archive.addfile(info, io.BytesIO(path.read_bytes()))


def save(out: Path, name: str, folder: Path | None, **arrays: np.ndarray) -> None:
    if folder is not None:
        pack(folder, out / f"tensorflow_{name}.tar.xz")
        shutil.rmtree(folder)
    np.savez_compressed(out / f"tensorflow_{name}.npz", **arrays)


# ---- TensorFlow 1: a dense network of five hidden layers -----------------------------------------------------------


def dense_network(x, units=8, hidden=5):
    for i in range(1, hidden + 1):
        with v1.variable_scope(f"hidden{i}"):
            before = int(x.shape[1])
            kernel = v1.get_variable("kernel", [before, units], initializer=v1.random_normal_initializer(0, 0.3))
            bias = v1.get_variable("bias", [units], initializer=v1.random_normal_initializer(0, 0.1))
            x = tf.nn.elu(tf.matmul(x, kernel) + bias, name="activation")
    with v1.variable_scope("outputs"):
        kernel = v1.get_variable("kernel", [units, 5], initializer=v1.random_normal_initializer(0, 0.3))
        bias = v1.get_variable("bias", [5], initializer=v1.zeros_initializer())
        return tf.add(tf.matmul(x, kernel), bias, name="logits")


def tensorflow_1(out: Path, work: Path, name: str, optimizer, prefix: str, average: bool, version: int = 2) -> None:
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(1)
        step = v1.train.get_or_create_global_step()
        x = v1.placeholder(tf.float32, [None, 64], name="X")
        y = v1.placeholder(tf.int32, [None], name="y")
        logits = dense_network(x)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
        train = optimizer().minimize(loss, global_step=step)
        if average:
            train = tf.group(train, v1.train.ExponentialMovingAverage(0.9).apply(v1.trainable_variables()))
        random = np.random.RandomState(0)
        pictures, labels = random.rand(40, 64).astype("f"), random.randint(0, 5, 40)
        with v1.Session() as session:
            first = v1.trainable_variables()
            session.run(v1.variables_initializer(first))
            session.run(v1.variables_initializer([v for v in v1.global_variables() if v not in first]))
            for _ in range(20):
                session.run(train, {x: pictures, y: labels})
            kind = {1: v1.train.SaverDef.V1, 2: v1.train.SaverDef.V2}[version]
            saver = v1.train.Saver(write_version=kind, sharded=False)
            folder = work / name
            folder.mkdir()
            saver.save(session, f"{folder}/{prefix}", global_step=step if prefix else None, write_meta_graph=False)
            names = ["hidden3/activation", "logits"]
            values = session.run(["hidden3/activation:0", "outputs/logits:0"], {x: pictures[:4]})
    save(out, name, folder, input=pictures[:4], **dict(zip(names, values, strict=True)))


# ---- TensorFlow 2: a convolutional network -------------------------------------------------------------------------


def large_network(k):
    """k: Keras 3 or Keras 2. Branches, a gate, padding, resizing, normalisation of both kinds."""
    layers = k.layers
    x = inputs = k.Input((13, 13, 3), name="pictures")
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling")(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem")(x)
    x = layers.BatchNormalization(name="stem_norm")(x)
    x = left = layers.LeakyReLU(negative_slope=0.1, name="leaky")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.ReLU(6.0, name="capped")(x)
    x = layers.Conv2D(8, 2, padding="same", use_bias=False, name="even")(x)
    x = layers.BatchNormalization(name="even_norm", scale=False)(x)
    x = layers.Add(name="sum")([x, left])
    gate = layers.GlobalAveragePooling2D(name="squeeze")(x)
    gate = layers.Reshape((1, 1, 8), name="spread")(gate)
    gate = layers.Conv2D(4, 1, activation="swish", name="reduce")(gate)
    gate = layers.Conv2D(8, 1, activation="sigmoid", name="gate")(gate)
    x = layers.Multiply(name="excite")([x, gate])
    largest = layers.MaxPooling2D(3, strides=2, padding="same", name="largest")(x)
    average = layers.AveragePooling2D(3, strides=2, padding="same", name="average")(x)
    x = layers.Concatenate(name="both")([largest, average])
    x = layers.ZeroPadding2D(((0, 1), (1, 0)), name="rim")(x)
    x = layers.Conv2D(4, 3, strides=2, name="last")(x)
    x = layers.UpSampling2D(2, interpolation="bilinear", name="larger")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(6, activation="gelu", name="hidden")(x)
    x = layers.Dropout(0.3, name="drop")(x)
    x = layers.LayerNormalization(name="layer_norm")(x)
    x = layers.Dense(5, activation="softmax", name="classes")(x)
    return k.Model(inputs, x, name="network")


def small_network(k):
    """What every framework's fixture has, and no more."""
    layers = k.layers
    x = inputs = k.Input((13, 13, 3), name="pictures")
    x = layers.Conv2D(6, 4, strides=2, padding="same", use_bias=False, name="stem")(x)
    x = layers.BatchNormalization(name="stem_norm")(x)
    x = layers.LeakyReLU(name="leaky", **({"negative_slope": 0.1} if k is keras else {"alpha": 0.1}))(x)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    x = layers.MaxPooling2D(4, strides=4, padding="same", name="largest")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(5, activation="softmax", name="classes")(x)
    return k.Model(inputs, x, name="network")


WATCHED = ("leaky", "sum", "excite", "both", "last", "flat", "depthwise", "hidden", "layer_norm", "classes")


def trained(k, network):
    """The network after a few steps, with weights and statistics that are nowhere symmetric."""
    k.utils.set_random_seed(3)
    model = network(k)
    random = np.random.RandomState(1)
    pictures = random.randint(0, 256, (16, 13, 13, 3)).astype("f") / (1 if network is large_network else 256)
    labels = random.randint(0, 5, 16)
    optimizer = keras.optimizers.Adam(0.01) if k is keras else tf_keras.optimizers.legacy.Adam(0.01)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(pictures, labels, epochs=3, batch_size=8, verbose=0)
    for layer in model.layers:
        if "norm" in layer.name:
            layer.set_weights([w + random.uniform(0.05, 0.6, w.shape).astype("f") for w in layer.get_weights()])
    watched = [layer.name for layer in model.layers if layer.name in WATCHED]
    watch = k.Model(model.inputs, [model.get_layer(name).output for name in watched])
    values = [np.asarray(v) for v in watch.predict(pictures[:2], verbose=0)]
    return model, {"input": pictures[:2], **dict(zip(watched, values, strict=True))}


def tensorflow_2(out: Path, work: Path) -> None:
    model, arrays = trained(keras, large_network)
    model.export(work / "keras3", verbose=False)
    save(out, "keras3", work / "keras3", **arrays)
    function = tf.function(lambda x: model(x, training=False)).get_concrete_function(
        tf.TensorSpec((None, 13, 13, 3), tf.float32, name="pictures")
    )
    frozen = convert_variables_to_constants_v2(function)
    folder = work / "frozen"
    folder.mkdir()
    (folder / "frozen.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString(deterministic=True))
    pack(folder, out / "tensorflow_frozen.tar.xz")  # the same network: its outputs are those of keras3

    model, arrays = trained(keras, small_network)
    tf.saved_model.save(model, str(work / "module"))
    save(out, "module", work / "module", **arrays)
    counter = tf.Variable(7, name="step")
    tf.train.Checkpoint(model=model, optimizer=model.optimizer, step=counter).save(str(work / "objects" / "model"))
    save(out, "objects", work / "objects", **{v.path: np.asarray(v) for v in model.variables})

    model, arrays = trained(tf_keras, small_network)
    model.save_weights(str(work / "weights" / "model"), save_format="tf")
    save(out, "weights", work / "weights", **{v.name.removesuffix(":0"): v.numpy() for v in model.variables})
    model.compile()
    model.save(work / "keras2", save_format="tf")
    save(out, "keras2", work / "keras2", **arrays)


# ---- TensorFlow 1: convolutions with the channels second or last ----------------------------------------------------


def first_generation(out: Path, work: Path) -> None:
    """A SavedModel and a frozen graph of TensorFlow 1, with reference variables and shape arithmetic."""
    graph = tf.Graph()
    with graph.as_default():
        v1.disable_resource_variables()
        v1.set_random_seed(5)
        x = v1.placeholder(tf.float32, [None, 11, 11, 3], name="images")
        normal = v1.random_normal_initializer(0, 0.3)
        with v1.variable_scope("conv1"):
            kernel = v1.get_variable("weights", [5, 5, 3, 6], initializer=normal)
            bias = v1.get_variable("biases", [6], initializer=normal)
            h = tf.nn.relu(v1.nn.conv2d(x, kernel, strides=[1, 2, 2, 1], padding="SAME") + bias, name="relu")
        h = tf.nn.local_response_normalization(h, depth_radius=2, bias=1.0, alpha=0.3, beta=0.75, name="norm1")
        with v1.variable_scope("norm2"):
            shapes = {"beta": 0.1, "gamma": 1.2, "moving_mean": -0.2, "moving_variance": 0.8}
            beta, gamma, mean, variance = (
                v1.get_variable(n, [6], initializer=v1.random_uniform_initializer(v, v + 0.5))
                for n, v in shapes.items()
            )
            h = tf.nn.batch_normalization(h, mean, variance, beta, gamma, 1e-3, name="batchnorm")
        h = v1.nn.max_pool(h, [1, 2, 2, 1], [1, 2, 2, 1], "SAME", name="pool")
        a, b = tf.split(h, 2, axis=3, name="halves")
        h = tf.concat([b, a * 2.0], axis=3, name="swapped")
        h = tf.transpose(h, [0, 3, 1, 2], name="second")
        shape = tf.shape(h)
        h = tf.reshape(h, [shape[0], tf.reduce_prod(shape[1:])], name="flat")
        with v1.variable_scope("logits"):
            kernel = v1.get_variable("weights", [54, 5], initializer=normal)
            bias = v1.get_variable("biases", [5], initializer=normal)
            logits = v1.nn.xw_plus_b(h, kernel, bias, name="logits")
        output = tf.nn.softmax(logits, name="probabilities")
        names = ["conv1/relu", "norm1", "norm2/batchnorm/add_1", "swapped", "logits/logits", "probabilities"]
        pictures = np.random.RandomState(2).randint(0, 256, (2, 11, 11, 3)).astype("f") / 256
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            values = session.run([f"{name}:0" for name in names], {x: pictures})
            v1.saved_model.simple_save(session, str(work / "saver"), {"images": x}, {"probabilities": output})
            definition = v1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), ["probabilities"])
    arrays = {"input": pictures, **{n.replace("/", "."): v for n, v in zip(names, values, strict=True)}}
    save(out, "saver", work / "saver", **arrays)
    folder = work / "constants"
    folder.mkdir()
    (folder / "constants.pb").write_bytes(definition.SerializeToString(deterministic=True))
    pack(folder, out / "tensorflow_constants.tar.xz")  # the same network: its outputs are those of saver


# ---- single operations ----------------------------------------------------------------------------------------------


def weight(*shape: int) -> tf.Tensor:
    return tf.constant(np.random.RandomState(sum(shape)).normal(size=shape).astype("f"))


def attention(x):
    return tf.nn.softmax(tf.matmul(x @ weight(4, 3), x @ weight(4, 3), transpose_b=True) / 2.6) @ x


def windows(x):
    parts = tf.reshape(x, [tf.shape(x)[0], 2, 3, 2, 3, 4])
    return tf.reshape(tf.transpose(parts, [0, 1, 3, 2, 4, 5]), [-1, 4, 36])


def layer_norm(x):
    mean, variance = tf.nn.moments(x, [2], keepdims=True)
    return tf.nn.batch_normalization(x, mean, variance, weight(4), weight(4) + 1.0, 1e-3)


def functions(x):
    """Each of them smooth where it is used."""
    a = tf.exp(x) + tf.sqrt(tf.abs(x) + 1.0) + tf.math.rsqrt(x * x + 0.5) + tf.square(x) - tf.pow(x, 2.0)
    b = tf.maximum(x, 0.1) + tf.minimum(x, 0.2) + tf.math.log(x * x + 1.0) + tf.math.squared_difference(x, 1.0)
    c = tf.math.reciprocal(x * x + 1.0) + tf.math.erf(x) + tf.math.erfc(x) + tf.clip_by_value(x, -0.5, 0.4)
    return a + b + c + tf.add_n([x, x, x]) - x / 3.0 - tf.negative(x) + 1.0 - x


def activations(x):
    a = tf.nn.elu(x) + tf.nn.selu(x) + tf.nn.softplus(x) + tf.nn.softsign(x) + tf.nn.leaky_relu(x)
    return a + tf.tanh(x) + tf.sigmoid(x) + tf.nn.log_softmax(x) + tf.nn.relu(x) + tf.nn.silu(x, 2.0)


def enlarged(kernel, stride, padding, sizes):
    """A transposed convolution to that height and width."""
    return lambda x: (
        tf.nn.conv2d_transpose(x, weight(*kernel, 3, 4), [tf.shape(x)[0], *sizes, 3], stride, padding) + 1.0
    )


def enlarged_twice(x):
    size = tf.shape(x)
    return tf.nn.conv2d_transpose(x, weight(3, 3, 2, 4), [size[0], size[1] * 2, size[2] * 2, 2], 2, "SAME")


def within_blocks(x):
    x = tf.space_to_batch_nd(x, [2, 3], [[1, 3], [2, 1]])
    return tf.batch_to_space(tf.nn.conv2d(x, weight(2, 2, 4, 3), 1, "VALID"), [2, 3], [[1, 1], [0, 1]]) + weight(3)


def training_or_not(x):
    """A normalisation as programs of TensorFlow 1 have it, where it is said when they run whether they train."""
    training = v1.placeholder_with_default(False, ())

    def norm(train):
        statistics = (None, None) if train else (weight(4), weight(4) ** 2)
        return lambda: v1.nn.fused_batch_norm(x, weight(4), weight(4), *statistics, is_training=train)[0]

    return tf.cond(training, norm(True), lambda: tf.cond(tf.logical_not(training), norm(False), norm(True))) * 2.0


def dropout_of_nothing(x):
    keep = v1.placeholder_with_default(1.0, ())
    drawn = tf.random.uniform(tf.shape(x), seed=1)
    x = tf.where(drawn >= 1.0 - keep, x / keep, 0.0) @ weight(8, 3)
    return x / keep * tf.floor(keep + tf.random.uniform(tf.shape(x), seed=2))


PICTURE, ROW, TOKENS = (6, 6, 4), (8,), (5, 4)
OPERATIONS = {
    "explicit padding": (PICTURE, lambda x: tf.nn.conv2d(x, weight(3, 3, 4, 2), 2, [[0, 0], [1, 2], [0, 1], [0, 0]])),
    "even padding": (PICTURE, lambda x: tf.nn.conv2d(x, weight(3, 3, 4, 2), 1, [[0, 0], [1, 1], [1, 1], [0, 0]])),
    "dilated": (PICTURE, lambda x: tf.nn.conv2d(x, weight(3, 3, 4, 2), 1, "SAME", dilations=2)),
    "grouped": (PICTURE, lambda x: tf.nn.conv2d(x, weight(3, 3, 2, 6), 1, "VALID")),
    "strides of two lengths": (PICTURE, lambda x: tf.nn.conv2d(x, weight(5, 5, 4, 2), [1, 2, 1, 1], "SAME")),
    "used twice": (PICTURE, lambda x: (lambda y: tf.nn.relu(y + weight(2)) + y)(x @ weight(4, 2))),
    "convolution of rows": (TOKENS, lambda x: tf.nn.conv1d(x, weight(4, 4, 3), 2, "SAME")),
    "overlapping averages": (PICTURE, lambda x: tf.nn.avg_pool2d(x, [2, 3], [2, 1], "SAME")),
    "largest valid": (PICTURE, lambda x: tf.nn.max_pool2d(x, 3, 2, "VALID")),
    "planes": (PICTURE, lambda x: x * weight(1, 6, 6, 1) + weight(6, 4)),
    "scaled": (PICTURE, lambda x: tf.nn.relu(tf.nn.relu(x) * weight(4) + weight(4))),
    "norm without factor": (
        PICTURE,
        lambda x: tf.nn.batch_normalization(x, weight(4), weight(4) ** 2, weight(4), None, 0.1),
    ),
    "norm without shift": (
        PICTURE,
        lambda x: tf.nn.batch_normalization(x, weight(4), weight(4) ** 2, None, weight(4), 0.1),
    ),
    "norm of rows": (ROW, lambda x: tf.nn.batch_normalization(x, weight(8), weight(8) ** 2, weight(8), weight(8), 0.1)),
    "layer norm": (TOKENS, layer_norm),
    "attention": (TOKENS, attention),
    "windows": (PICTURE, windows),
    "product of axes": (PICTURE, lambda x: tf.tensordot(x, weight(4, 3), [[3], [0]])),
    "turned product": (ROW, lambda x: tf.matmul(x, weight(5, 8), transpose_b=True) + weight(5)),
    "largest of all": (
        PICTURE,
        lambda x: tf.reduce_max(x, [1, 2], keepdims=True) * x + tf.reduce_min(x, 3, keepdims=True),
    ),
    "sum of a column": (PICTURE, lambda x: tf.reduce_sum(x, 2)),
    "turned": (PICTURE, lambda x: tf.nn.relu(tf.transpose(x, [0, 2, 1, 3]))),
    "there and back": (PICTURE, lambda x: tf.transpose(tf.transpose(x, [0, 3, 1, 2]) * 2.0, [0, 2, 3, 1])),
    "squeezed": ((1, 1, 4), lambda x: tf.squeeze(x, [1, 2]) * 2.0),
    "spread": (ROW, lambda x: tf.expand_dims(tf.expand_dims(x, 1), 1) * weight(1, 2, 2, 8)),
    "rim": (
        PICTURE,
        lambda x: tf.pad(tf.pad(x, [[0, 0], [1, 2], [0, 3], [0, 1]]), [[0, 0]] * 3 + [[1, 0]], constant_values=-2.0),
    ),
    "mirror": (PICTURE, lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3], [0, 0]], "REFLECT")),
    "parts": (PICTURE, lambda x: (lambda a: tf.concat([a[2], a[0] * 2.0, a[1]], -1))(tf.split(x, [1, -1, 2], -1))),
    "planes apart": (PICTURE, lambda x: (lambda a: tf.stack([a[3], a[1] + a[2]], 1))(tf.unstack(x, axis=-1))),
    "slice": (
        PICTURE,
        lambda x: tf.slice(x, [0, 1, 0, 1], [-1, 3, 6, 2]) + tf.slice(x, [0] * 4, [tf.shape(x)[0], 3, 6, 2]),
    ),
    "steps": (PICTURE, lambda x: x[:, 1:, ::2, -1][..., tf.newaxis] + x[:, :5, tf.newaxis, 3, ..., 1:2]),
    "half": (PICTURE, lambda x: x[:, : tf.shape(x)[1] // 2, 1:-1] * tf.cast(tf.size(x) // tf.shape(x)[0], tf.float32)),
    "backwards": (PICTURE, lambda x: x[..., ::-1] * weight(4)),
    "larger": (PICTURE, lambda x: tf.image.resize(x, tf.shape(x)[1:3] * 2)),
    "odd size": (PICTURE, lambda x: tf.image.resize(x, [7, 9])),
    "nearest": (
        PICTURE,
        lambda x: (
            tf.image.resize(x, [12, 12], "nearest") + tf.image.resize(tf.image.resize(x, [7, 9], "nearest"), [12, 12])
        ),
    ),
    "old sizes": (
        PICTURE,
        lambda x: v1.image.resize_bilinear(x, [9, 11]) + v1.image.resize_bilinear(x, [9, 11], align_corners=True),
    ),
    "repeated": ((1, 1, 4), lambda x: tf.tile(x, [1, 3, 2, 1]) + tf.broadcast_to(x, [tf.shape(x)[0], 3, 2, 4])),
    "picked": (PICTURE, lambda x: tf.gather(x, [2, 0, 3], axis=-1) + tf.expand_dims(tf.gather(x, 1, axis=3), 3)),
    "counted": (TOKENS, lambda x: x + tf.zeros([tf.shape(x)[0], 4])[:, tf.newaxis] + tf.cast(tf.range(4), tf.float32)),
    "chosen": (TOKENS, lambda x: tf.where(tf.constant([True, False, True, True]), x, 0.5)),
    "doubles": (ROW, lambda x: tf.cast(tf.cast(x, tf.float64) * 2.0, tf.float32)),
    "functions": (ROW, functions),
    "activations": (ROW, activations),
    "gelu by error function": (ROW, lambda x: 0.5 * x * (1.0 + tf.math.erf(x / np.float32(np.sqrt(2.0))))),
    "gelu by tangent": (ROW, lambda x: tf.nn.gelu(x, True)),
    "transposed": (PICTURE, enlarged((4, 4), 2, "SAME", (12, 12))),
    "transposed to odd sizes": (PICTURE, enlarged((3, 2), 2, "SAME", (11, 12))),
    "transposed valid": (PICTURE, enlarged((3, 2), 3, "VALID", (18, 19))),
    "transposed with gaps": (PICTURE, enlarged((1, 2), 3, "SAME", (16, 18))),
    "within blocks": (PICTURE, within_blocks),
    "dilated depthwise": (
        PICTURE,
        lambda x: tf.nn.depthwise_conv2d(x, weight(3, 3, 4, 2), [1] * 4, "SAME", None, [2, 2]),
    ),
    "depth and space": (PICTURE, lambda x: tf.nn.space_to_depth(tf.nn.depth_to_space(x, 2) * 2.0, 3) + 1.0),
    "einsum dense": (TOKENS, lambda x: tf.einsum("...x,xy->...y", x, weight(4, 3)) + weight(3)),
    "einsum heads": (TOKENS, lambda x: tf.einsum("dhc,btc->bhtd", weight(2, 3, 4), x)),
    "einsum joined": (PICTURE, lambda x: tf.einsum("bijc,jcd->bid", x, weight(6, 4, 2))),
    "einsum attention": (
        PICTURE,
        lambda x: tf.einsum("bnts,bsnh->btnh", tf.nn.softmax(tf.einsum("btnh,bsnh->bnts", x * 0.3, x)), x),
    ),
    "einsum by head": (PICTURE, lambda x: tf.einsum("bthc,hcd->bthd", x, weight(6, 4, 3))),
    "training or not": (PICTURE, training_or_not),
    "dropout of nothing": (ROW, dropout_of_nothing),
    "mean of open sizes": (
        (None, None, 4),
        lambda x: tf.reduce_mean(tf.nn.conv2d(x, weight(3, 3, 4, 2), 2, "SAME"), [1, 2]),
    ),
    "larger at open sizes": ((None, None, 4), enlarged_twice),
}


def operations(out: Path, work: Path) -> None:
    """Each operation as a frozen graph, with an input and the output beside it."""
    folder = work / "operations"
    folder.mkdir()
    random = np.random.RandomState(4)
    for name, (shape, function) in OPERATIONS.items():
        traced = tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec((None, *shape), tf.float32))
        frozen = convert_variables_to_constants_v2(traced)
        x = random.normal(size=(2, *(size or 6 for size in shape))).astype("f").round(2)
        definition = frozen.graph.as_graph_def()
        for node in definition.node:
            node.attr.pop("_output_shapes", None)
        (folder / f"{name}.pb").write_bytes(definition.SerializeToString(deterministic=True))
        np.save(folder / f"{name}.in.npy", x)
        np.save(folder / f"{name}.out.npy", traced(tf.constant(x)).numpy())
    pack(folder, out / "tensorflow_operations.tar.xz")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        first_generation(out, Path(work))
        adam = lambda: v1.train.AdamOptimizer(0.01)  # noqa: E731
        momentum = lambda: v1.train.MomentumOptimizer(0.01, 0.9)  # noqa: E731
        tensorflow_1(out, Path(work), "adam", adam, "model.ckpt", average=True)
        tensorflow_1(out, Path(work), "empty", momentum, "", average=False)
        tensorflow_1(out, Path(work), "old", momentum, "model.ckpt", average=False, version=1)
        tensorflow_2(out, Path(work))
        operations(out, Path(work))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
