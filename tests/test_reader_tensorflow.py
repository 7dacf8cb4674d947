"""TensorFlow files read without TensorFlow: what comes out agrees with what TensorFlow computed, and bad files are
refused in one sentence. The files in `parity/files` were written by `parity/make_tensorflow.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tensorflow_files as files
from regraft.cut import split
from regraft.errors import ReaderError
from regraft.graph import trace
from regraft.operations import Operations, build
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.protobuf_wire import Message
from regraft.readers.tensorflow import crc32c as crc
from regraft.readers.tensorflow.checkpoint import read_tensorflow_checkpoint
from regraft.readers.tensorflow.graph import read_tensorflow_graph

FILES = Path(__file__).parent / "parity" / "files"
LAYERS = [f"{part}/{kind}" for part in ("outputs", *(f"hidden{i}" for i in range(1, 6))) for kind in ("bias", "kernel")]
NETWORKS = {
    "keras3": ("keras3", "keras3"),
    "module": ("module", "module"),
    "keras2": ("keras2", "keras2"),
    "saver": ("saver", "saver"),
    "frozen": ("frozen/frozen.pb", "keras3"),
    "constants": ("constants/constants.pb", "saver"),
}
"""Of each network, where it lies and which outputs are its own."""

every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """What TensorFlow wrote, one folder for each archive."""
    place = tmp_path_factory.mktemp("tensorflow")
    for path in FILES.glob("tensorflow_*.tar.xz"):
        files.unpack(path, place / path.name.removeprefix("tensorflow_").removesuffix(".tar.xz"))
    return place


@pytest.fixture(scope="module")
def networks(unpacked):
    return {name: read_tensorflow_graph(unpacked / path) for name, (path, _) in NETWORKS.items()}


def outputs(name: str) -> dict[str, np.ndarray]:
    with np.load(FILES / f"tensorflow_{name}.npz") as stored:
        return dict(stored)


def second(value: np.ndarray) -> torch.Tensor:
    """Pictures with their channels second; all else as it is."""
    found = torch.from_numpy(value)
    return found.permute(0, 3, 1, 2).contiguous() if found.dim() == 4 else found


def module(found: Checkpoint) -> nn.Module:
    assert found.operations is not None
    return build(found.operations, found.tensors)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def dense(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {}
    for i in range(1, 6):
        x = nn.functional.elu(x @ tensors[f"hidden{i}/kernel"] + tensors[f"hidden{i}/bias"])
        values[f"hidden{i}/activation"] = x
    return {**values, "logits": x @ tensors["outputs/kernel"] + tensors["outputs/bias"]}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("adam", "adam/model.ckpt-20"),
        ("adam", "adam/model.ckpt-20.index"),
        ("adam", "adam/model.ckpt-20.data-00000-of-00001"),
        ("adam", "adam/checkpoint"),
        ("adam", "adam"),
        ("empty", "empty"),
        ("empty", "empty/.index"),
        ("empty", "empty/.data-00000-of-00001"),
        ("old", "old/model.ckpt-20"),
        ("old", "old"),
    ],
)
def test_a_checkpoint_of_tensorflow_1_gives_the_layers_that_were_trained(unpacked, name, path):
    found = read_tensorflow_checkpoint(unpacked / path)
    assert sorted(found.tensors) == sorted(LAYERS)
    assert (found.layout, found.operations) == ("keras", None)
    stored = outputs(name)
    values = dense(found.tensors, torch.from_numpy(stored["input"]))
    for layer in ("hidden3/activation", "logits"):
        torch.testing.assert_close(values[layer], torch.from_numpy(stored[layer]), atol=1e-5, rtol=0)


def test_what_training_keeps_beside_the_weights_is_passed_over_by_name(unpacked):
    passed = set(read_tensorflow_checkpoint(unpacked / "adam").passed_over)
    slots = {f"{layer}/{slot}" for layer in LAYERS for slot in ("Adam", "Adam_1", "ExponentialMovingAverage")}
    assert passed == {*slots, "beta1_power", "beta2_power", "global_step"}
    passed = set(read_tensorflow_checkpoint(unpacked / "empty").passed_over)
    assert passed == {*(f"{layer}/Momentum" for layer in LAYERS), "global_step"}


def test_an_optimizer_that_lists_the_weights_it_trains_does_not_hide_them(unpacked):
    found = read_tensorflow_checkpoint(unpacked / "objects")
    stored = {name: value for name, value in outputs("objects").items() if "seed" not in name}
    assert found.tensors.keys() == stored.keys()
    assert all(np.array_equal(found.tensors[name].numpy(), value) for name, value in stored.items())
    assert {"step/.ATTRIBUTES/VARIABLE_VALUE", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"} < set(found.passed_over)
    assert not any("_trainable_variables" in name for name in found.passed_over)


def test_weights_of_keras_2_have_their_full_names_and_no_slots(unpacked):
    found = read_tensorflow_checkpoint(unpacked / "weights")
    stored = outputs("weights")
    assert found.tensors.keys() == stored.keys()
    assert all(np.array_equal(found.tensors[name].numpy(), value) for name, value in stored.items())
    assert sum(".OPTIMIZER_SLOT" in name for name in found.passed_over) == 14


def test_names_that_only_look_like_slots_are_kept(tmp_path):
    data = np.arange(2, dtype="<f4").tobytes()
    names = ("wheel/momentum", "tower/Adam", "dense/kernel", "dense/kernel/momentum")
    files.write_checkpoint(tmp_path / "m", {n: files.entry(1, [2], 8 * i, data) for i, n in enumerate(names)}, data * 4)
    found = read_tensorflow_checkpoint(tmp_path / "m")
    assert sorted(found.tensors) == ["dense/kernel", "tower/Adam", "wheel/momentum"]
    assert found.passed_over == ("dense/kernel/momentum",)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        *((1, torch.float32), (2, torch.float64), (19, torch.float16), (14, torch.bfloat16)),
        *((3, torch.int32), (9, torch.int64), (4, torch.uint8), (10, torch.bool)),
    ],
)
def test_tensors_keep_the_type_in_which_they_are_stored(tmp_path, number, dtype):
    value = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=dtype)
    data = value.view(torch.uint8).numpy().tobytes() if dtype != torch.bool else value.numpy().tobytes()
    files.write_checkpoint(tmp_path / "m", {"w": files.entry(number, [2, 3], 0, data)}, data)
    found = read_tensorflow_checkpoint(tmp_path / "m").tensors["w"]
    assert found.dtype == dtype
    assert torch.equal(found, value)


def test_tensors_lie_in_several_shards(tmp_path):
    first, other = np.ones(3, "<f4").tobytes(), np.zeros(3, "<f4").tobytes()
    entries = {"a": files.entry(1, [3], 0, first), "b": files.entry(1, [3], 0, first, shard=1)}
    files.write_checkpoint(tmp_path / "m", entries, first, shards=2)
    assert torch.equal(read_tensorflow_checkpoint(tmp_path / "m").tensors["b"], torch.ones(3))
    (tmp_path / "m.data-00001-of-00002").write_bytes(other)
    with pytest.raises(ReaderError, match=r"m\.data-00001-of-00002 must hold 'b'.*checksum"):
        read_tensorflow_checkpoint(tmp_path / "m")
    (tmp_path / "m.data-00001-of-00002").unlink()
    with pytest.raises(ReaderError, match=r"m\.data-00001-of-00002 is missing"):
        read_tensorflow_checkpoint(tmp_path / "m")


WEIGHTS = np.arange(6, dtype="<f4").tobytes()
HOSTILE = {
    "behind its shard": ({"offset": 8}, "as long as its index says"),
    "in front of its shard": ({"offset": -8}, "as long as its index says"),
    "of another size": ({"sizes": [1 << 40]}, "it has shape"),
    "of more axes than there are": ({"sizes": [1] * 4000}, "a tensor of the shape"),
    "without end": ({"size": 1 << 60}, "as long as its index says"),
    "in a shard that is none": ({"shard": 7}, "into shard 7"),
    "of an unknown type": ({"dtype": 1, "crc": 5}, "checksum"),
    "in slices": ({"slices": 2}, "stored in slices"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_tensor_that_does_not_lie_where_the_index_says_is_refused(tmp_path, case):
    change, reason = HOSTILE[case]
    options = {"dtype": 1, "sizes": [6], "offset": 0, **change}
    entry = files.entry(options.pop("dtype"), options.pop("sizes"), options.pop("offset"), WEIGHTS, **options)
    files.write_checkpoint(tmp_path / "m", {"w": entry}, WEIGHTS)
    with pytest.raises(ReaderError, match=reason):
        read_tensorflow_checkpoint(tmp_path / "m")


def test_an_index_that_names_the_same_bytes_again_and_again_is_refused(tmp_path):
    entries = {f"w{i}": files.entry(1, [6], 0, WEIGHTS) for i in range(1000)}
    files.write_checkpoint(tmp_path / "m", entries, WEIGHTS)
    with pytest.raises(ReaderError, match="more bytes than its shards have"):
        read_tensorflow_checkpoint(tmp_path / "m")


def test_a_compressed_index_is_refused_in_one_sentence(tmp_path):
    files.write_checkpoint(tmp_path / "m", {"w": files.entry(1, [6], 0, WEIGHTS)}, WEIGHTS, kind=1)
    with pytest.raises(ReaderError, match=r"m\.index.*compressed"):
        read_tensorflow_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "name", ["adam/model.ckpt-20.index", "adam/model.ckpt-20.data-00000-of-00001", "old/model.ckpt-20"]
)
def test_a_checkpoint_cut_off_or_changed_anywhere_is_refused(unpacked, tmp_path, name):
    whole = (unpacked / name).read_bytes()
    for other in (unpacked / name).parent.iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    target = tmp_path / Path(name).name
    shuffled = random.Random(0)
    for end in [0, 1, 47, 48, len(whole) // 2, len(whole) - 49, len(whole) - 1]:
        target.write_bytes(whole[:end])
        with pytest.raises(ReaderError, match=r"model\.ckpt-20"):
            read_tensorflow_checkpoint(target)
    good = read_tensorflow_checkpoint(unpacked / name).tensors
    refused = 0
    for _ in range(40):
        place = shuffled.randrange(len(whole) - 48)
        target.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << shuffled.randrange(8)]) + whole[place + 1 :])
        try:
            found = read_tensorflow_checkpoint(target).tensors
            assert all(torch.equal(found[key], good[key]) for key in good)  # it was a byte of an optimizer
        except ReaderError:
            refused += 1
    assert refused >= 5


def test_the_text_file_is_believed_about_its_own_folder_only(unpacked, tmp_path):
    for path in (unpacked / "adam").glob("model.ckpt*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/gone/for/ever/model.ckpt-20"\n')
    assert sorted(read_tensorflow_checkpoint(tmp_path).tensors) == sorted(LAYERS)
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{unpacked}/empty/"\n')
    with pytest.raises(ReaderError, match="index"):
        read_tensorflow_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "../adam/model.ckpt-20"\n')
    with pytest.raises(ReaderError, match="in its own folder"):
        read_tensorflow_checkpoint(tmp_path)


def test_a_folder_of_several_checkpoints_asks_which_one(tmp_path):
    for name in ("first", "second"):
        files.write_checkpoint(tmp_path / name, {"w": files.entry(1, [6], 0, WEIGHTS)}, WEIGHTS)
    with pytest.raises(ReaderError, match="first, second"):
        read_tensorflow_checkpoint(tmp_path)
    with pytest.raises(ReaderError, match=r"there is no .*third\.index"):
        read_tensorflow_checkpoint(tmp_path / "third")


def test_what_is_no_plain_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "m.index")
    with pytest.raises(ReaderError, match="no"):
        read_tensorflow_checkpoint(tmp_path / "m")
    os.mkfifo(tmp_path / "frozen.pb")
    with pytest.raises(ReaderError, match="plain file"):
        read_tensorflow_graph(tmp_path / "frozen.pb")


# ---- networks -------------------------------------------------------------------------------------------------------


@every_network
def test_a_network_gives_what_tensorflow_gave_at_every_layer(networks, name):
    found = networks[name]
    stored = outputs(NETWORKS[name][1])
    x = second(stored.pop("input"))
    assert found.input_shape == tuple(x.shape[1:])
    assert len(stored) >= 4
    for layer, value in stored.items():
        torch.testing.assert_close(lower_part(found, layer)(x), second(value), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(module(found)(x), second(value), atol=1e-4, rtol=1e-5)


def lower_part(found: Checkpoint, layer: str) -> nn.Module:
    """The network up to the last step of a layer, whose name Keras 3 puts a number behind when it exports."""
    steps = found.operations.steps
    own = [s.name for s in steps if f".{layer}." in f".{s.name}." or f".{layer}_1." in f".{s.name}."]
    used = steps[: [s.name for s in steps].index(own[-1]) + 1]
    names = {step.name for step in used}
    tensors = {n: t for n, t in found.tensors.items() if n in names or n.rpartition(".")[0] in names}
    return build(Operations(used, own[-1]), tensors)


@every_network
def test_a_network_falls_in_two_at_every_cut_and_learns(networks, name):
    network = module(networks[name])
    x = second(outputs(NETWORKS[name][1])["input"])
    found = trace(network, x)
    assert len(found.cuts) >= 6
    with torch.no_grad():
        y = network(x)
        for cut in found.cuts:
            lower, upper = split(found, cut.name)
            assert torch.equal(upper(lower(x)), y), cut.name
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    losses = []
    for _ in range(2):
        loss = -torch.log(network(x)[:, 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in network.named_parameters())


def test_every_operation_gives_what_tensorflow_gave(unpacked):
    places = sorted((unpacked / "operations").glob("*.pb"))
    assert len(places) >= 40
    wrong = {}
    for place in places:
        x, y = (second(np.load(place.with_suffix(f".{end}.npy"))) for end in ("in", "out"))
        with torch.no_grad():
            found = module(read_tensorflow_graph(place))(x)
        if found.shape != y.shape or not torch.allclose(found, y, atol=1e-5, rtol=1e-5):
            wrong[place.stem] = (found.shape, y.shape, found - y if found.shape == y.shape else None)
    assert not wrong


@pytest.mark.parametrize(
    ("name", "norms"), [("keras3", 2), ("frozen", 2), ("keras2", 1), ("saver", 1), ("constants", 1)]
)
def test_normalisation_spelled_out_as_arithmetic_becomes_a_layer_again(networks, name, norms):
    found = [m for m in module(networks[name]).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(found) == norms
    assert all(m.eps == pytest.approx(1e-3) for m in found)
    assert all(float(m.running_var.min()) > 0.05 and float(m.running_mean.abs().max()) > 0.05 for m in found)


def test_activations_spelled_out_become_layers_and_biases_belong_to_theirs(networks):
    kinds = [step.kind for step in networks["keras3"].operations.steps]
    assert (kinds.count("SiLU"), kinds.count("GELU")) == (1, 1)
    linear = [m for m in module(networks["keras3"]).modules() if isinstance(m, nn.Linear)]
    assert [m.bias is not None for m in linear] == [True, True]


def test_steps_are_called_as_tensorflow_calls_them(networks):
    names = [step.name for step in networks["keras2"].operations.steps]
    assert "network.stem.Conv2D" in names
    assert "network.classes.Softmax" in names
    parameters = dict(module(networks["keras3"]).named_parameters())
    assert "layer_norm.gamma_1" in parameters


def test_the_batch_is_left_open(networks):
    for name in NETWORKS:
        network = module(networks[name])
        x = second(outputs(NETWORKS[name][1])["input"])
        with torch.no_grad():
            one, many = network(x[:1]), network(x.repeat(4, 1, 1, 1))
        torch.testing.assert_close(many[:1], one, atol=1e-6, rtol=0)
        assert many.shape[0] == 4 * len(x)


def test_what_a_saved_model_stores_but_does_not_serve_is_passed_over(networks):
    found = networks["keras3"]
    assert (found.format, found.layout) == ("TensorFlow SavedModel", "torch")
    assert "_CHECKPOINTABLE_OBJECT_GRAPH" in found.passed_over
    assert all(t.dtype == torch.float32 for t in found.tensors.values())


def test_nothing_of_onnx_is_needed(unpacked, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert read_tensorflow_graph(unpacked / "constants" / "constants.pb").tensors


# ---- networks that are refused --------------------------------------------------------------------------------------

KERNEL = files.constant("kernel", np.ones((3, 3, 3, 4), np.float32))
FLAT = files.constant("long", np.array([1, -1], np.int32))
STRIDES = files.attribute("strides", files.field(1, b"".join(files.field(3, 1) for _ in range(4))))
CONVOLUTION = files.node(
    "conv", "Conv2D", ["images", "kernel"], files.attribute("padding", files.field(2, "SAME")), STRIDES
)


def frozen(folder: Path, *nodes: bytes, functions: tuple[bytes, ...] = ()) -> Path:
    path = folder / "frozen.pb"
    path.write_bytes(files.graph([files.placeholder([-1, 8, 8, 3]), *nodes], functions))
    return path


def test_a_graph_written_by_hand_is_read(tmp_path):
    found = read_tensorflow_graph(frozen(tmp_path, KERNEL, CONVOLUTION, files.node("out", "Relu", ["conv"])))
    assert module(found)(torch.ones(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    assert module(found)(torch.ones(1, 3, 8, 8)).max().item() == 27


def test_a_graph_with_the_channels_second_is_read_as_it_is(tmp_path):
    form = files.attribute("data_format", files.field(2, "NCHW"))
    window = files.attribute("ksize", files.field(1, b"".join(files.field(3, k) for k in (1, 1, 2, 2))))
    step = files.attribute("strides", files.field(1, b"".join(files.field(3, k) for k in (1, 1, 2, 2))))
    kernel = np.random.RandomState(0).rand(3, 3, 3, 4).astype("f")
    nodes = [
        files.placeholder([-1, 3, 9, 9]),
        files.constant("kernel", kernel),
        files.constant("bias", np.arange(4, dtype=np.float32)),
        files.node(
            "conv", "Conv2D", ["images", "kernel"], form, STRIDES, files.attribute("padding", files.field(2, "VALID"))
        ),
        files.node("sum", "BiasAdd", ["conv", "bias"], form),
        files.node("pool", "MaxPool", ["sum"], form, window, step),
    ]
    path = tmp_path / "frozen.pb"
    path.write_bytes(files.graph(nodes))
    found = read_tensorflow_graph(path)
    x = torch.rand(2, 3, 9, 9)
    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    wanted = nn.functional.max_pool2d(nn.functional.conv2d(x, weight, torch.arange(4.0)), 2)
    torch.testing.assert_close(module(found)(x), wanted)
    assert found.input_shape == (3, 9, 9)


def test_a_graph_written_for_one_picture_takes_several(tmp_path):
    path = tmp_path / "frozen.pb"
    path.write_bytes(
        files.graph([files.placeholder([1, 8, 8, 3]), FLAT, files.node("y", "Reshape", ["images", "long"])])
    )
    x = torch.rand(3, 3, 8, 8)
    found = module(read_tensorflow_graph(path))(x)
    assert torch.equal(found, x.permute(0, 2, 3, 1).flatten(1))


def truth(name: str, value: bool) -> bytes:
    tensor = files.field(1, 10) + files.field(2, b"") + files.field(11, int(value))
    return files.node(
        name,
        "Const",
        (),
        files.attribute("dtype", files.field(6, 10)),
        files.attribute("value", files.field(8, tensor)),
    )


@pytest.mark.parametrize("value", [False, True])
def test_a_branch_that_a_default_decides_is_the_only_one_that_is_read(tmp_path, value):
    ways = [
        files.function("twice", [files.node("y", "Add", ["x", "x"])], "y:z:0"),
        files.function("none", [files.node("y", "Sub", ["x", "x"])], "y:z:0"),
    ]
    branches = [
        files.attribute(f"{way}_branch", files.field(10, files.field(1, name)))
        for way, name in (("then", "twice"), ("else", "none"))
    ]
    nodes = [
        *(KERNEL, CONVOLUTION, truth("false", value)),
        files.node("training", "PlaceholderWithDefault", ["false"]),
        files.node("y", "If", ["training", "conv"], *branches),
    ]
    found = read_tensorflow_graph(frozen(tmp_path, *nodes, functions=tuple(ways)))
    assert [step.kind for step in found.operations.steps] == ["Conv2d", "add" if value else "sub"]


def test_ways_that_meet_are_followed_where_a_default_decides_and_refused_where_it_does_not(tmp_path):
    def ways(decided_by: str) -> list[bytes]:
        return [
            *(KERNEL, CONVOLUTION, truth("false", False)),
            files.node("switch", "Switch", ["conv", decided_by]),
            files.node("drawn", "RandomUniform", ["switch:1"]),
            files.node("plain", "Relu", ["switch"]),
            files.node("y", "Merge", ["plain", "drawn"]),
        ]

    found = read_tensorflow_graph(frozen(tmp_path, *ways("false")))
    assert [step.kind for step in found.operations.steps] == ["Conv2d", "ReLU"]
    with pytest.raises(ReaderError, match=r"does Switch \(which way it goes depends on the picture\)"):
        read_tensorflow_graph(frozen(tmp_path, *ways("conv")))


@pytest.mark.parametrize(("rate", "kept"), [(0.0, True), (0.5, False)])
def test_a_dropout_is_read_only_where_it_keeps_everything(tmp_path, rate, kept):
    nodes = [
        *(KERNEL, CONVOLUTION, files.constant("rate", np.array(rate, np.float32))),
        files.constant("zero", np.array(0, np.float32)),
        files.node("shape", "Shape", ["conv"]),
        files.node("drawn", "RandomUniform", ["shape"]),
        files.node("mask", "GreaterEqual", ["drawn", "rate"]),
        files.node("y", "SelectV2", ["mask", "conv", "zero"]),
    ]
    path = frozen(tmp_path, *nodes)
    if kept:
        assert [step.kind for step in read_tensorflow_graph(path).operations.steps] == ["Conv2d"]
    else:
        with pytest.raises(ReaderError, match=r"'drawn' does RandomUniform \(it draws at random\)"):
            read_tensorflow_graph(path)


def test_a_step_that_others_only_wait_for_is_no_output(tmp_path):
    checked = files.node("check", "IsFinite", ["images"])
    path = frozen(tmp_path, KERNEL, CONVOLUTION, checked, files.node("y", "Relu", ["conv", "^check"]))
    assert read_tensorflow_graph(path).operations.output == "y"


def test_blocks_without_a_convolution_between_them_are_refused(tmp_path):
    blocks = [files.constant("size", np.array([2, 2], np.int32)), files.constant("sides", np.zeros((2, 2), np.int32))]
    apart = files.node("apart", "SpaceToBatchND", ["images", "size", "sides"])
    joined = files.node("joined", "BatchToSpaceND", ["sum", "size", "sides"])
    with pytest.raises(ReaderError, match=r"'sum' does Relu \(output 0 of the step 'apart' is needed"):
        read_tensorflow_graph(frozen(tmp_path, *blocks, apart, files.node("sum", "Relu", ["apart"]), joined))
    with pytest.raises(ReaderError, match=r"does BatchToSpaceND \(only a convolution may stand between blocks"):
        read_tensorflow_graph(frozen(tmp_path, *blocks, files.node("sum", "Relu", ["images"]), joined))


def test_a_mean_over_pictures_of_every_size_is_one_row_each(tmp_path):
    path = tmp_path / "frozen.pb"
    axes, mean = files.constant("axes", np.array([1, 2], np.int32)), files.node("y", "Mean", ["conv", "axes"])
    path.write_bytes(files.graph([files.placeholder([-1, -1, -1, 3]), KERNEL, CONVOLUTION, axes, mean]))
    assert module(read_tensorflow_graph(path))(torch.ones(2, 3, 4, 7)).shape == (2, 4)
    batch = files.constant("axes", np.array([0], np.int32))
    path.write_bytes(files.graph([files.placeholder([-1, -1, -1, 3]), KERNEL, CONVOLUTION, batch, mean]))
    with pytest.raises(ReaderError, match="over the pictures of the batch"):
        read_tensorflow_graph(path)


def test_a_graph_for_pictures_of_every_size_is_read_without_one(tmp_path):
    path = tmp_path / "frozen.pb"
    path.write_bytes(files.graph([files.placeholder([-1, -1, -1, 3]), KERNEL, CONVOLUTION]))
    found = read_tensorflow_graph(path)
    assert found.input_shape is None
    assert [module(found)(torch.ones(1, 3, n, 5)).shape[2] for n in (4, 7)] == [4, 7]


@pytest.mark.parametrize("sizes", [[], [-1], [-1, 8, 8, -1], [-1, 8, 0, 3], [-1, 1 << 20, 1 << 20, 3], [1, 2, 3, 4, 5]])
def test_an_input_that_is_neither_pictures_nor_rows_is_refused(tmp_path, sizes):
    path = tmp_path / "frozen.pb"
    path.write_bytes(files.graph([files.placeholder(sizes), files.node("y", "Relu", ["images"])]))
    with pytest.raises(ReaderError, match=r"The input 'images' of .* its shape is \["):
        read_tensorflow_graph(path)


def test_an_output_that_is_not_one_row_for_each_picture_is_refused(tmp_path):
    first = [files.constant(n, np.array(v, np.int32)) for n, v in (("at", [0, 0, 0, 0]), ("size", [1, 8, 8, 3]))]
    with pytest.raises(ReaderError, match="part of the batch"):
        read_tensorflow_graph(frozen(tmp_path, *first, files.node("y", "Slice", ["images", "at", "size"])))
    with pytest.raises(ReaderError, match="for every picture"):
        read_tensorflow_graph(frozen(tmp_path, files.node("y", "Shape", ["images"])))


@pytest.mark.parametrize(
    "op",
    [
        "ReadFile",
        "PyFunc",
        "EagerPyFunc",
        "DecodeJpeg",
        "StringToHashBucketFast",
        "WriteFile",
        "While",
        "If",
        "RandomUniform",
    ],
)
def test_an_operation_outside_the_list_is_refused_by_step_and_name(tmp_path, op):
    canary = tmp_path / "canary"
    token = files.attribute("token", files.field(2, f"touch {canary}"))
    path = frozen(
        tmp_path,
        KERNEL,
        CONVOLUTION,
        files.node("deep/step", op, ["conv"], token),
        files.node("y", "Relu", ["deep/step"]),
    )
    with pytest.raises(ReaderError, match=rf"frozen\.pb.*'deep/step' does {op} "):
        read_tensorflow_graph(path)
    assert not canary.exists()


def test_what_the_output_does_not_need_is_not_looked_at(tmp_path):
    aside = files.node("log", "WriteFile", ["images"])
    path = frozen(tmp_path, KERNEL, CONVOLUTION, aside)
    with pytest.raises(ReaderError, match=r"it has conv, log"):
        read_tensorflow_graph(path)
    assert read_tensorflow_graph(path, output="conv").operations.output == "conv"
    with pytest.raises(ReaderError, match=r"there is no 'other'"):
        read_tensorflow_graph(path, output="other")


def test_a_graph_that_runs_in_a_circle_is_refused(tmp_path):
    path = frozen(
        tmp_path,
        files.node("a", "Add", ["images", "b"]),
        files.node("b", "Relu", ["a"]),
        files.node("y", "Relu", ["b"]),
    )
    with pytest.raises(ReaderError, match="reads itself"):
        read_tensorflow_graph(path)


def test_functions_without_end_are_refused(tmp_path):
    itself = files.function("f", [files.call("again", "f", ["x"])], "again:output:0")
    with pytest.raises(ReaderError, match="without end"):
        read_tensorflow_graph(frozen(tmp_path, files.call("y", "f", ["images"]), functions=(itself,)))
    twice = [
        files.function(
            f"f{i}",
            [
                files.call("a", f"f{i + 1}", ["x"]),
                files.call("b", f"f{i + 1}", ["x"]),
                files.node("y", "Add", ["a:output:0", "b:output:0"]),
            ],
            "y:z:0",
        )
        for i in range(40)
    ]
    last = files.function("f40", [files.node("y", "Relu", ["x"])], "y:activations:0")
    with pytest.raises(ReaderError, match="100,000 steps"):
        read_tensorflow_graph(frozen(tmp_path, files.call("y", "f0", ["images"]), functions=(*twice, last)))


@pytest.mark.parametrize(
    ("constant", "reason"),
    [
        (files.constant("c", np.ones(1, np.float32), [1 << 40]), "far larger"),
        (files.constant("c", np.ones(1, np.float32), [1 << 20, 1 << 12]), "far larger"),
        (files.constant("c", np.ones(9, np.float32), [8]), "9 values"),
        (files.constant("c", np.ones(3, np.float32), [-3]), "shape"),
    ],
)
def test_a_constant_that_is_not_there_is_refused_before_it_is_made(tmp_path, constant, reason):
    path = frozen(tmp_path, constant, files.node("y", "Mul", ["images", "c"]))
    tracemalloc.start()
    try:
        with pytest.raises(ReaderError, match=reason):
            read_tensorflow_graph(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_numbers_computed_from_constants_are_bounded(tmp_path):
    column = files.constant("a", np.ones((60_000, 1), np.float32))
    row = files.constant("b", np.ones((1, 60_000), np.float32))
    product = files.node("ab", "Add", ["a", "b"])
    with pytest.raises(ReaderError, match="far larger"):
        read_tensorflow_graph(frozen(tmp_path, column, row, product, files.node("y", "Mul", ["images", "ab"])))
    sides = files.constant("p", np.array([[0, 0], [0, 1 << 20], [0, 1 << 20], [0, 0]], np.int32))
    with pytest.raises(ReaderError, match="a value of shape"):
        read_tensorflow_graph(frozen(tmp_path, sides, files.node("y", "Pad", ["images", "p"])))


def saved(folder: Path, inputs: dict[str, tuple[str, list[int]]], outputs: dict[str, str], nodes: list[bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "saved_model.pb").write_bytes(files.saved_model(files.graph(nodes), inputs, outputs))
    return folder


def test_several_inputs_are_refused_and_of_several_outputs_one_is_named(tmp_path):
    image = {"images": ("images:0", [-1, 8, 8, 3])}
    nodes = [files.placeholder([-1, 8, 8, 3]), KERNEL, CONVOLUTION, files.node("classes", "ArgMax", ["conv"])]
    folder = saved(tmp_path / "m", image, {"features": "conv:0", "classes": "classes:0"}, nodes)
    with pytest.raises(ReaderError, match="features, classes"):
        read_tensorflow_graph(folder)
    assert read_tensorflow_graph(folder, output="features").operations.output == "conv"
    with pytest.raises(ReaderError, match="does ArgMax"):
        read_tensorflow_graph(folder, output="classes")
    folder = saved(tmp_path / "m", {**image, "mask": ("mask:0", [-1])}, {"features": "conv:0"}, nodes)
    with pytest.raises(ReaderError, match="images, mask"):
        read_tensorflow_graph(folder)


def test_a_variable_without_a_tensor_is_refused(unpacked, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes((unpacked / "keras3" / "saved_model.pb").read_bytes())
    with pytest.raises(ReaderError, match=r"variables\.index.*is not there"):
        read_tensorflow_graph(folder)


@pytest.mark.parametrize("name", ["keras2/saved_model.pb", "constants/constants.pb"])
def test_a_graph_cut_off_or_changed_anywhere_is_refused_or_read(unpacked, tmp_path, name):
    whole = (unpacked / name).read_bytes()
    (tmp_path / "variables").mkdir()
    for path in (unpacked / name).parent.glob("variables/*"):
        (tmp_path / "variables" / path.name).write_bytes(path.read_bytes())
    target = tmp_path / Path(name).name
    for end in (0, 1, 20, len(whole) // 3, len(whole) - 1):
        target.write_bytes(whole[:end])
        with pytest.raises(ReaderError):
            read_tensorflow_graph(target)
    shuffled = random.Random(1)
    for _ in range(25):
        changed = bytearray(whole)
        for _ in range(3):
            changed[shuffled.randrange(len(whole))] = shuffled.randrange(256)
        target.write_bytes(changed)
        with contextlib.suppress(ReaderError):
            assert read_tensorflow_graph(target).tensors


# ---- bytes ----------------------------------------------------------------------------------------------------------


def test_the_checksum_is_that_of_the_standard():
    assert crc.crc32c(b"123456789") == 0xE3069283
    assert crc.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc.crc32c(b"\xff" * 32) == 0x62A8AB43
    long = random.Random(0).randbytes(2 * crc.SMALL + 12345)
    assert crc.crc32c(long) == crc._pass_bytes(0xFFFFFFFF, memoryview(long)) ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    "data",
    [
        b"\x80",
        b"\x0a\x05abc",
        b"\x0b",
        b"\x09abc",
        b"\x00\x01",
        b"\xff" * 11,
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    ],
)
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(ValueError, match="byte"):
        Message(memoryview(data)).integer(1)


def test_a_message_gives_its_fields_by_number():
    data = (
        files.field(1, -5)
        + files.field(2, "name")
        + files.field(4, files.varint(3) + files.varint(300))
        + files.field(1, 7)
    )
    message = Message(memoryview(data))
    assert (message.integer(1), message.text(2), message.integers(4), message.integer(9)) == (7, "name", [3, 300], 0)
    assert message.integers(1) == [-5, 7]
    with pytest.raises(ValueError, match="another type"):
        message.integer(2)
