"""Writes small ONNX files with the programs that people use, and what ONNX Runtime computes for them, into files/.

Run it once for each program, from anywhere, in environments of their own:

    pip install "onnx==1.23.2" "onnxruntime==1.31.1"                            python make_onnx.py operators
    ... "torch==2.13.0" "onnxscript==0.7.2"                                     python make_onnx.py torch
    ... "tensorflow-cpu==2.21.0" "keras==3.15.1" "tf2onnx==1.17.0"              python make_onnx.py tensorflow
    ... "scikit-learn==1.9.1" "skl2onnx==1.20.0"                                python make_onnx.py sklearn

`operators` writes one archive of graphs of one or a few steps: the files one after the other, the outputs likewise,
and an index with the length of the file and the shapes of input and output of each; the input is `rand` from seed 1.
The others write trained networks, and archives of inputs and of what some of their layers give. Inputs and outputs of
pictures are kept channels first, whatever the file takes.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx_run import rand, run

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.filterwarnings("ignore")
FILES = Path(__file__).parent / "files"
KEPT = "pkg.torch.onnx.name_scopes"


def operators():
    from onnx_cases import all_cases

    cases = all_cases()
    index = {name: (len(data), list(x.shape), list(y.shape)) for name, (data, x, y) in cases.items()}
    np.savez_compressed(
        FILES / "onnx_operators.npz",
        index=np.frombuffer(json.dumps(index).encode(), np.uint8),
        files=np.frombuffer(b"".join(data for data, _, _ in cases.values()), np.uint8),
        outputs=np.concatenate([y.reshape(-1) for _, _, y in cases.values()]),
    )


def written(name, x, values, *, last=False):
    """Strip the file of what is of this machine, and keep input, output and the named values beside it."""
    path = FILES / f"{name}.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key == KEPT]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)
        node.doc_string = ""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for value in [*model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(v) for v in values.values())
    wanted = [model.graph.output[0].name, *values.values()]
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    feed = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else x
    feeds = [feed[i : i + 1] for i in range(len(feed))] if fixed else [feed]
    runs = [run(model.SerializeToString(), f, wanted) for f in feeds]
    found = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
    np.savez_compressed(path.with_suffix(".npz"), x=x, output=found[0], **dict(zip(values, found[1:], strict=True)))


# ---- torch ------------------------------------------------------------------------------------------------------


def torch_networks():
    """A convolutional network by the older exporter, layers kept apart; a small transformer by the newer one."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.from_numpy(rand(3, 3, 17, 15))
    network = trained(convolutional(), x).eval()
    open_batch = {"input_names": ["picture"], "dynamic_axes": {"picture": {0: "n"}}}
    kept_apart = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    torch.onnx.export(
        network, (x,), FILES / "onnx_torch.onnx", dynamo=False, opset_version=14, **open_batch, **kept_apart
    )
    values = {
        "stem.bn": "/stem/bn/BatchNormalization_output_0",
        "blocks.1.depth": "/blocks/blocks.1/depth/Conv_output_0",
    }
    written("onnx_torch", x.numpy(), values)
    x = torch.from_numpy(rand(3, 3, 16, 16))
    network = trained(transformer(), x).eval()
    torch.onnx.export(network, (x[:1],), FILES / "onnx_torch_tokens.onnx", dynamo=True, external_data=False)
    written("onnx_torch_tokens", x.numpy(), {"blocks.0.softmax": "softmax", "blocks.1.norm2": "layer_norm_3"})


def trained(network, x):
    import torch
    from torch import nn

    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), torch.arange(len(x))).backward()
        optimizer.step()
    return network


def convolutional():
    from collections import OrderedDict

    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.bn, self.act, self.point = nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, width, 1)
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())

        def forward(self, x):
            y = self.point(self.act(self.bn(self.depth(x))))
            return x + y * self.gate(y)

    stem = OrderedDict(conv=nn.Conv2d(3, 8, 4, 2, 1, bias=False), bn=nn.BatchNorm2d(8), act=nn.LeakyReLU(0.1))
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(stem),
            blocks=nn.Sequential(Block(8), Block(8)),
            pool=nn.MaxPool2d(3, 2, ceil_mode=True),
            flat=nn.Flatten(),
            head=nn.Linear(8 * 4 * 3, 3),
        )
    )


def transformer():
    import torch
    from torch import nn

    class Tokens(nn.Module):
        def __init__(self, width=12):
            super().__init__()
            self.patches = nn.Conv2d(3, width, 4, 4)
            self.cls_token = nn.Parameter(torch.randn(1, 1, width))
            self.pos_embed = nn.Parameter(torch.randn(1, 17, width))
            self.blocks = nn.ModuleList(Block(width) for _ in range(2))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.norm2, self.wide, self.act = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU()
            self.back = nn.Linear(2 * width, width)

        def forward(self, x):
            n, tokens, width = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, 3, width // 3).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
            x = x + self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))
            return x + self.back(self.act(self.wide(self.norm2(x))))

    return Tokens()


# ---- tensorflow -------------------------------------------------------------------------------------------------


def tensorflow_network():
    """A network for channels-last pictures, each convolution of which comes between two transposes."""
    import keras
    import tensorflow as tf
    import tf2onnx

    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = picture = keras.Input((17, 15, 3), name="picture")
    x = layers.Conv2D(8, 4, strides=2, padding="same", use_bias=False, name="stem_conv")(x)
    x = skip = layers.LeakyReLU(name="stem_act")(layers.BatchNormalization(name="stem_bn")(x))
    x = layers.DepthwiseConv2D(3, padding="same", name="depth")(x)
    x = layers.BatchNormalization(name="depth_bn")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="gate_mean")(x)
    gate = layers.Conv2D(8, 1, activation="sigmoid", name="gate_conv")(gate)
    x = layers.Add(name="join")([skip, layers.Multiply(name="gate")([x, gate])])
    x = layers.MaxPooling2D(3, 2, "same", name="most")(x)
    x = layers.Conv2D(6, 3, activation="relu6", name="last_conv")(layers.ZeroPadding2D(((0, 1), (1, 0)))(x))
    x = layers.AveragePooling2D(2, 2, "same", name="mean")(x)
    x = layers.Dense(3, activation="softmax", name="head")(layers.Flatten(name="flat")(x))
    network = keras.Model(picture, x, name="net")
    network.compile("sgd", "sparse_categorical_crossentropy")
    x = rand(3, 17, 15, 3)
    network.fit(x, np.arange(3), epochs=8, verbose=0)
    taken = [tf.TensorSpec((None, 17, 15, 3), tf.float32, name="picture")]
    path = FILES / "onnx_tensorflow.onnx"
    tf2onnx.convert.from_function(tf.function(network), taken, opset=13, output_path=str(path))
    values = {"net_1.join_1.Add": "net_1/join_1/Add:0", "net_1.most_1.MaxPool2d": "net_1/most_1/MaxPool2d:0"}
    written("onnx_tensorflow", x.transpose(0, 3, 1, 2), values, last=True)


# ---- scikit-learn -----------------------------------------------------------------------------------------------


def sklearn_network():
    from skl2onnx import to_onnx
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = rand(40, 6)
    labels = (x[:, 0] > 0.1).astype(int) + (x[:, 1] > 0.3)
    network = make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=60, random_state=0)).fit(
        x * [1, 2, 3, 1, 1, 1] + 2, labels
    )
    x = x[:5] + 2
    path = FILES / "onnx_sklearn.onnx"
    path.write_bytes(to_onnx(network, x[:1], target_opset=15).SerializeToString())
    np.savez_compressed(path.with_suffix(".npz"), x=x, output=network.predict_proba(x).astype(np.float32))


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    programs = {"operators": operators, "torch": torch_networks, "tensorflow": tensorflow_network}
    {**programs, "sklearn": sklearn_network}[sys.argv[1]]()
