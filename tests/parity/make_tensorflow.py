"""Write the TensorFlow fixtures: checkpoints of three generations, SavedModels and frozen graphs, with their outputs.

Run with the real framework in an environment of its own (`pip install tensorflow-cpu tf-keras`):

    python tests/parity/make_tensorflow.py tests/parity/files

Each archive `tensorflow_NAME.zip` holds what TensorFlow wrote (a SavedModel is 10 times smaller so), and
`tensorflow_NAME.npz` an input and the outputs of several layers, pictures with their channels last as TensorFlow has
them.
"""

from __future__ import annotations

import os

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "TF_ENABLE_ONEDNN_OPTS": "0"}

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

v1 = tf.compat.v1
STAMP = (2020, 1, 1, 0, 0, 0)


def pack(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = zipfile.ZipInfo(str(path.relative_to(folder)), STAMP)
            archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


def save(out: Path, name: str, folder: Path | None, **arrays: np.ndarray) -> None:
    if folder is not None:
        pack(folder, out / f"tensorflow_{name}.zip")
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
    x = layers.MaxPooling2D(2, padding="same", name="largest")(x)
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
    pack(folder, out / "tensorflow_frozen.zip")  # the same network: its outputs are those of keras3

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
    pack(folder, out / "tensorflow_constants.zip")  # the same network: its outputs are those of saver


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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
