"""Keras files give the networks and numbers that Keras saw in them, and bad ones give one sentence.

The files were written by real Keras (tests/parity/make_keras.py); Keras itself is not needed here.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from regraft.cut import split
from regraft.errors import ReaderError
from regraft.graph import trace
from regraft.operations import build, operations_from_json
from regraft.readers.keras.file import read_keras
from regraft.readers.keras.graph import read_model
from regraft.readers.keras.layers import network, roles

FILES = Path(__file__).parent / "parity" / "files"
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The folder of the files that Keras wrote; tests copy what they change."""
    folder = tmp_path_factory.mktemp("keras")
    for name in ("keras2.zip", "keras3.zip", "keras3_first.zip"):
        with zipfile.ZipFile(FILES / name) as archive:
            archive.extractall(folder)
    return folder


@functools.cache
def layers(version):
    """Descriptions of models of a few layers, with their numbers: name -> (description, weights, input, output)."""
    with zipfile.ZipFile(FILES / f"keras{version}.zip") as archive:
        stored = np.load(io.BytesIO(archive.read(f"keras{version}_layers.npz")))
        numbers, at, found = stored["numbers"], 0, {}
        for name, one in json.loads(str(stored["described"])).items():
            arrays = []
            for shape in [*(shape for _, shape in one["weights"]), one["output"]]:
                size = int(np.prod(shape))
                arrays.append(numbers[at : at + size].reshape(shape))
                at += size
            weights = [(layer, value) for (layer, _), value in zip(one["weights"], arrays, strict=False)]
            found[name] = (one["model"], weights, stored["input " + " ".join(map(str, one["input"]))], arrays[-1])
    return found


CASES = [(version, name) for version in (2, 3) for name in layers(version)]


def pictures(x):
    """Keras' numbers as torch has them: pictures with the channels in front."""
    if x.ndim == 3:
        return torch.from_numpy(x)[:, None]
    return torch.from_numpy(x).movedim(-1, 1).contiguous() if x.ndim == 4 else torch.from_numpy(x)


def built(checkpoint, output=None):
    """The network of a checkpoint, or the part of it up to the step `output`."""
    operations = dataclasses.replace(checkpoint.operations, output=output or checkpoint.operations.output)
    return build(operations, checkpoint.tensors)


# ---- the same numbers as Keras ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "name"), CASES, ids=[f"keras {v}: {n}" for v, n in CASES])
def test_a_layer_gives_what_it_gives_in_keras(version, name):
    described, stored, x, y = layers(version)[name]
    model = read_model(described)
    weights = {}
    for layer in model.layers:
        own = [value for owner, value in stored if owner == layer.name]
        weights[(layer.name,)] = {role.names[0]: value for role, value in zip(roles(layer), own, strict=True)}
    operations, tensors, _ = network(model, weights, version=version)
    operations = operations_from_json(json.loads(json.dumps(operations.to_json(), allow_nan=False)))
    expected = torch.from_numpy(y) if y.ndim == 3 else pictures(y)
    with torch.no_grad():
        torch.testing.assert_close(build(operations, tensors)(pictures(x)), expected, **CLOSE)


@pytest.mark.parametrize("name", ["keras2.h5", "keras3.keras"])
def test_a_trained_network_gives_what_it_gives_in_keras_at_every_layer(files, name):
    checkpoint = read_keras(files / name)
    known = np.load(files / f"{name.split('.')[0]}.npz")
    assert checkpoint.input_shape == (3, 15, 15)
    x = pictures(known["input"])
    for layer in ("leaky", "depthwise", "add", "pool", "output"):
        step = None if layer == "output" else layer
        torch.testing.assert_close(built(checkpoint, step)(x).detach(), pictures(known[layer]), **CLOSE)


@pytest.mark.parametrize("name", ["keras2_frozen.h5", "keras2_frozen.keras", "keras3_frozen.h5", "keras3_first.keras"])
def test_a_frozen_network_inside_another_gets_its_own_weights(files, name):
    checkpoint = read_keras(files / name)
    known = np.load(files / f"{name.partition('.')[0]}.npz")
    x = torch.from_numpy(known["input"]) if "first" in name else pictures(known["input"])
    assert checkpoint.input_shape == (3, 7, 6) == tuple(x.shape[1:])
    assert {"base.conv.weight", "base.bn.running_var", "head.bias"} <= checkpoint.tensors.keys()
    torch.testing.assert_close(built(checkpoint)(x).detach(), torch.from_numpy(known["output"]), **CLOSE)


@pytest.mark.parametrize("version", [2, 3])
def test_operations_without_a_layer_are_read_from_hdf5(files, version):
    checkpoint = read_keras(files / f"keras{version}_operations.h5")
    known = np.load(files / f"keras{version}_operations.npz")
    output = torch.from_numpy(known["output"])
    with torch.no_grad():
        torch.testing.assert_close(built(checkpoint)(pictures(known["input"])), output, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("end", ["h5", "keras"])
@pytest.mark.parametrize("version", [2, 3])
def test_attention_gives_what_it_gives_in_keras(files, version, end):
    checkpoint = read_keras(files / f"keras{version}_tokens.{end}")
    known = np.load(files / f"keras{version}_tokens.npz")
    assert {"attention.query.weight", "attention.output.bias", "reads.key.weight"} <= checkpoint.tensors.keys()
    output = torch.from_numpy(known["output"])
    torch.testing.assert_close(built(checkpoint)(pictures(known["input"])).detach(), output, **CLOSE)


def changed_in_hdf5(files, tmp_path, change):
    """keras2_operations.h5 with another description."""
    place = shutil.copy(files / "keras2_operations.h5", tmp_path / "changed.h5")
    with h5py.File(place, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        change({layer["name"]: layer for layer in config["config"]["layers"]})
        file.attrs["model_config"] = json.dumps(config)
    return place


def _function(name):
    def change(layers):
        next(one for one in layers.values() if one["class_name"] == "TFOpLambda")["config"]["function"] = name

    return change


def _slice_of_examples(layers):
    for one in layers.values():
        if one["class_name"] == "SlicingOpLambda":
            one["inbound_nodes"][0][3] = {"slice_spec": [{"start": 1, "stop": None, "step": None}]}


def _called(value):
    def change(layers):
        next(one for one in layers.values() if one["class_name"] == "TFOpLambda")["inbound_nodes"][0][3]["y"] = value

    return change


OF_TENSORFLOW = {
    "a file": (_function("io.write_file"), "is a TFOpLambda"),
    "a function by another path": (_function("os.system"), "is a TFOpLambda"),
    "no name": (_function(["math.add"]), "is a TFOpLambda"),
    "a slice in the wrong class": (_function("__operators__.getitem"), "is a TFOpLambda"),
    "examples left out": (_slice_of_examples, "every example"),
    "a number that is none": (_called(float("nan")), "not the output of a layer"),
    "a number that no tensor holds": (_called(10**400), "not the output of a layer"),
    "an object": (_called({"class_name": "Lambda"}), "not the output of a layer"),
    "nothing": (_called(None), "found 1"),
    "an empty list": (_called([]), "not the output of a layer"),
    "too many numbers": (_called([1.0] * 5), "must fit"),
}


@pytest.mark.parametrize(("change", "words"), OF_TENSORFLOW.values(), ids=list(OF_TENSORFLOW))
def test_functions_of_tensorflow_beside_the_plain_ones_are_refused(files, tmp_path, change, words):
    with pytest.raises(ReaderError, match=words) as refused:
        read_keras(changed_in_hdf5(files, tmp_path, change))
    assert "\n" not in str(refused.value)


def test_steps_are_named_after_the_layers_as_attributes_can_be(files):
    checkpoint = read_keras(files / "keras2.h5")
    assert {"stem.conv.weight", "float_.running_mean", "inner.conv.bias"} <= checkpoint.tensors.keys()
    assert checkpoint.layout == "torch"
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.tensors.values())


def test_the_state_of_the_optimizer_is_passed_over(files):
    over = read_keras(files / "keras3_frozen.weights.h5").passed_over
    assert over
    assert all(name.startswith("optimizer/") for name in over)


def test_kernels_of_theano_are_turned(files, tmp_path):
    place = shutil.copy(files / "keras2_frozen.h5", tmp_path / "theano.h5")
    plain = read_keras(place).tensors["base.conv.weight"]
    with h5py.File(place, "r+") as file:
        file.attrs["backend"] = file["model_weights"].attrs["backend"] = "theano"
    assert torch.equal(read_keras(place).tensors["base.conv.weight"], plain.flip(2, 3))


# ---- cutting and training what was read -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keras2.h5", "keras3.keras"])
def test_both_parts_of_a_network_that_was_read_are_the_whole_at_every_cut(files, name):
    module = built(read_keras(files / name))
    x = torch.randn(2, 3, 15, 15)
    traced = trace(module, x)
    assert {"leaky", "add", "inner.slopes", "pool"} <= {cut.name for cut in traced.cuts}
    for cut in traced.cuts:
        lower, upper = split(traced, cut.name)
        assert torch.equal(upper(lower(x)), module(x))


def test_one_step_of_training_lowers_the_loss_of_a_network_that_was_read(files):
    module = built(read_keras(files / "keras3.keras")).train()
    x, y = torch.randn(6, 3, 15, 15), torch.tensor([0, 1, 2, 0, 1, 2])
    before = {name: value.clone() for name, value in module.named_parameters()}

    def loss():
        return torch.nn.functional.nll_loss(module(x).log(), y)

    first = loss()
    first.backward()
    torch.optim.SGD(module.parameters(), 1e-3).step()
    assert loss() < first
    assert all(not torch.equal(value, before[name]) for name, value in module.named_parameters())


# ---- weights alone ----------------------------------------------------------------------------------------------

NAMES = [
    *("base/conv/kernel", "base/conv/bias", "base/bn/gamma", "base/bn/beta", "base/bn/moving_mean"),
    *("base/bn/moving_variance", "head/kernel", "head/bias"),
]


@pytest.mark.parametrize("name", ["keras2_frozen_weights.h5", "keras3_frozen.weights.h5"])
def test_weights_alone_are_named_after_layers_and_roles(files, name):
    checkpoint = read_keras(files / name)
    known = np.load(files / f"{name[:6]}_frozen.npz")
    numbers = {key.removeprefix("weight:").partition(":")[0]: known[key] for key in known if key.startswith("weight:")}
    assert checkpoint.operations is None
    assert checkpoint.layout == "keras"
    assert list(checkpoint.tensors) == NAMES
    for given, tensor in checkpoint.tensors.items():
        expected = next(value for key, value in numbers.items() if key.endswith(given.removeprefix("base/")))
        assert np.array_equal(tensor.numpy(), expected)


def test_a_model_without_its_description_gives_its_weights(files, tmp_path):
    place = shutil.copy(files / "keras3_frozen.h5", tmp_path / "bare.h5")
    with h5py.File(place, "r+") as file:
        del file.attrs["model_config"]
    checkpoint = read_keras(place)
    assert checkpoint.operations is None
    assert list(checkpoint.tensors) == NAMES


def test_a_long_list_of_layers_is_read_from_its_parts(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names0"], file.attrs["layer_names1"] = [b"one", b"two"], [b"three"]
        for i, layer in enumerate(("three", "two", "one")):
            file.create_group(layer).attrs["weight_names"] = [f"{layer}_1/kernel:0".encode()]
            file[f"{layer}/{layer}_1/kernel:0"] = np.full((2, 3), i, ">f4")
    tensors = read_keras(tmp_path / "w.h5").tensors
    assert {name: value[0, 0].item() for name, value in tensors.items()} == {
        "one/kernel": 2,
        "two/kernel": 1,
        "three/kernel": 0,
    }
    assert list(tensors) == ["one/kernel", "two/kernel", "three/kernel"]


def test_the_names_of_keras_1_are_given_in_todays_words(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = [b"block1_conv1", b"bn"]
        stored = {"block1_conv1": ("W_1:0", "b_1:0"), "bn": ("gamma", "beta", "running_mean", "running_std")}
        for layer, leaves in stored.items():
            names = [f"{layer}_{leaf}" for leaf in leaves]
            file.create_group(layer).attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                file[layer][name] = np.ones(2)
    leaves = ("gamma", "beta", "moving_mean", "moving_variance")
    assert list(read_keras(tmp_path / "w.h5").tensors) == [
        *("block1_conv1/kernel", "block1_conv1/bias"),
        *(f"bn/{leaf}" for leaf in leaves),
    ]


def test_packed_weights_are_unpacked(files, tmp_path):
    plain = read_keras(files / "keras3_frozen.weights.h5").tensors
    with h5py.File(files / "keras3_frozen.weights.h5") as old, h5py.File(tmp_path / "packed.h5", "w") as new:
        for group in ("layers/sequential/layers/conv2d/vars", "layers/dense/vars"):
            for i in "01":
                chunk = tuple(max(1, size - 1) for size in old[group][i].shape)
                options = {"compression": "gzip", "shuffle": i == "0", "chunks": chunk}
                new.create_dataset(f"{group}/{i}", data=old[group][i][()], **options)
    packed = read_keras(tmp_path / "packed.h5").tensors
    assert torch.equal(packed["dense/kernel"], plain["head/kernel"])
    assert torch.equal(packed["sequential/conv2d/kernel"], plain["base/conv/kernel"])


# ---- networks that are not rebuilt ------------------------------------------------------------------------------


def changed(files, tmp_path, change):
    """keras3.keras with another description."""
    with zipfile.ZipFile(files / "keras3.keras") as old, zipfile.ZipFile(tmp_path / "changed.keras", "w") as new:
        config = json.loads(old.read("config.json"))
        change(config, {layer["config"]["name"]: layer for layer in config["config"]["layers"]})
        for name in old.namelist():
            new.writestr(name, json.dumps(config) if name == "config.json" else old.read(name))
    return tmp_path / "changed.keras"


def _lambda(config, layer):
    layer["leaky"].update(class_name="Lambda", config={"name": "leaky", "function": ["4wEAAAAAAA", None, None]})


def _tf_op(config, layer):
    layer["leaky"].update(class_name="TFOpLambda", config={"name": "leaky", "function": "io.write_file"})


def _module(config, layer):
    layer["leaky"].update(module="os", class_name="system", config={"name": "leaky"})


def _package(config, layer):
    layer["leaky"].update(registered_name="my_package>LeakyReLU")


def _unknown(config, layer):
    layer["leaky"].update(class_name="LSTM")


def _option(config, layer):
    layer["leaky"]["config"]["twist"] = 3


def _activation(config, layer):
    layer["stem"]["config"]["activation"] = {"module": "os", "class_name": "function", "config": "relu"}


def _activation_name(config, layer):
    layer["stem"]["config"]["activation"] = "sparsemax"


def _subclass(config, layer):
    config.update(class_name="MyModel", module=None, registered_name=None)


def _loop(config, layer):
    layer["stem"]["inbound_nodes"] = layer["pool"]["inbound_nodes"]


def _unnamed(config, layer):
    del layer["leaky"]["config"]["name"], layer["leaky"]["name"]


def _same_name(config, layer):
    layer["leaky"]["name"] = "add"


def _nobody(config, layer):
    layer["leaky"]["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "nobody"


def _outputs(config, layer):
    config["config"]["output_layers"] = [["head", 0, 0], ["pool", 0, 0]]


def _training(config, layer):
    layer["leaky"]["inbound_nodes"][0]["kwargs"]["training"] = True


def _filters(config, layer):
    layer["stem"]["config"]["filters"] = 10**9


def _text(config, layer):
    layer["stem"]["config"]["strides"] = "two"


def _slope(config, layer):
    layer["leaky"]["config"]["negative_slope"] = [1, 2]


def _padding(config, layer):
    layer["stem"]["config"]["padding"] = "causal"


def _twice(config, layer):
    layer["depthwise"]["inbound_nodes"] *= 2
    layer["add"]["inbound_nodes"][0]["args"][0][0]["config"]["keras_history"] = ["depthwise", 1, 0]


def _misfit(config, layer):
    layer["input"]["config"]["batch_shape"] = [None, 15, 15, 4]


def _tiny(config, layer):
    layer["input"]["config"]["batch_shape"] = [None, 1, 1, 3]


def _no_shape(config, layer):
    layer["input"]["config"]["batch_shape"] = None


def _not_finite(config, layer):
    layer["leaky"]["config"]["negative_slope"] = float("nan")


def _biased(config, layer):
    layer["stem"]["config"]["use_bias"] = True


def _list(config, layer):
    config["config"]["layers"][2] = 3


def _deep(config, layer):
    for _ in range(30):
        layer["inner"]["config"]["layers"] = [{**layer["inner"], "config": dict(layer["inner"]["config"])}]


REFUSED = {
    _lambda: "'leaky' is a Lambda",
    _tf_op: "'leaky' is a TFOpLambda",
    _module: "'leaky' is os.system",
    _package: "'leaky' is my_package>LeakyReLU",
    _unknown: r"'leaky' \(LSTM\)",
    _option: "'twist'",
    _activation: "'stem'.*activation",
    _activation_name: "'sparsemax'",
    _subclass: "MyModel",
    _loop: "loop",
    _unnamed: "name",
    _same_name: "name of its own",
    _nobody: "'nobody'",
    _outputs: "one output",
    _training: "training=True",
    _filters: r"'stem'.*\(3, 3, any, 1000000000\)",
    _text: "'stem'.*strides",
    _slope: "'leaky'.*negative_slope",
    _padding: "'stem'.*padding",
    _twice: "'depthwise' is used more than once",
    _misfit: "'stem'",
    _tiny: "'inner.conv'",
    _no_shape: "input",
    _not_finite: "'leaky'.*negative_slope",
    _biased: "'stem' must have 2 weights",
    _list: "layer",
    _deep: "deep",
}


@pytest.mark.parametrize(("change", "words"), REFUSED.items(), ids=[change.__name__[1:] for change in REFUSED])
def test_a_description_that_is_not_understood_is_refused_in_one_sentence(files, tmp_path, change, words):
    with pytest.raises(ReaderError, match=words) as refused:
        read_keras(changed(files, tmp_path, change))
    assert "changed.keras" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_code_in_a_description_does_not_run(files, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    (tmp_path / "payload.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)

    def payload(config, layer):
        layer["leaky"].update(module="payload", class_name="run", registered_name="payload>run")

    with pytest.raises(ReaderError, match="payload.run"):
        read_keras(changed(files, tmp_path, payload))
    assert not canary.exists()
    assert "payload" not in sys.modules


def test_a_size_that_is_left_open_is_not_invented(files, tmp_path):
    def leave_open(config, layer):
        layer["input"]["config"]["batch_shape"] = [None, None, None, 3]

    checkpoint = read_keras(changed(files, tmp_path, leave_open))
    known = np.load(files / "keras3.npz")
    assert checkpoint.input_shape is None
    output = built(checkpoint)(pictures(known["input"])).detach()
    torch.testing.assert_close(output, pictures(known["output"]), **CLOSE)


def test_weights_of_another_role_are_refused(files, tmp_path):
    place = shutil.copy(files / "keras2_frozen.h5", tmp_path / "roles.h5")
    with h5py.File(place, "r+") as file:
        group = file["model_weights/base"]
        group.attrs["weight_names"] = group.attrs["weight_names"][::-1]
    with pytest.raises(ReaderError, match="'base.conv' must have a kernel"):
        read_keras(place)


# ---- damaged and hostile files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keras2.h5", "keras3.keras", "keras3_frozen.weights.h5"])
@pytest.mark.parametrize("kept", [0, 5, 100, 1000, 0.5, 0.9, -1])
def test_a_file_that_ends_early_is_refused(files, tmp_path, name, kept):
    content = (files / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
    with pytest.raises(ReaderError, match=name):
        read_keras(tmp_path / name)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"GIF89a" * 20)
    with pytest.raises(ReaderError, match="GIF89a"):
        read_keras(tmp_path / "x.h5")


def test_hdf5_of_another_program_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["spectrum"] = np.zeros(3)
    with pytest.raises(ReaderError, match="another program"):
        read_keras(tmp_path / "x.h5")


@pytest.mark.parametrize("name", ["keras2_frozen.h5", "keras2_frozen.keras"])
def test_a_flipped_byte_gives_a_network_or_one_sentence(files, tmp_path, name):
    content = (files / name).read_bytes()
    places = np.random.RandomState(0).randint(0, len(content), 60)
    for at in places:
        (tmp_path / name).write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        with contextlib.suppress(ReaderError):  # some bytes say nothing: then the file reads; nothing else may come
            read_keras(tmp_path / name)


def _soft_link(file, folder):
    file["layers/dense/vars/1"] = h5py.SoftLink("/layers/dense/vars/0")


def _external_link(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["x"] = np.ones(3)
    file["layers/dense/vars/1"] = h5py.ExternalLink("secret.h5", "/x")


def _virtual(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["x"] = np.ones(3)
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "x", (3,))
    file.create_virtual_dataset("layers/dense/vars/1", layout)


def _external_storage(file, folder):
    (folder / "secret").write_bytes(bytes(24))
    file.create_dataset("layers/dense/vars/1", (3,), "f8", external=[(str(folder / "secret"), 0, 24)])


def _filter(file, folder):
    file.create_dataset("layers/dense/vars/1", data=np.ones(3), compression="lzf")


def _objects(file, folder):
    file.create_dataset("layers/dense/vars/1", data=["a"], dtype=h5py.string_dtype())


def _compound(file, folder):
    file["layers/dense/vars/1"] = np.zeros(3, [("a", "f4"), ("b", "f4")])


def _references(file, folder):
    file.create_dataset("layers/dense/vars/1", data=[file.ref], dtype=h5py.ref_dtype)


def _type(file, folder):
    file["layers/dense/vars/1"] = np.dtype("f4")


def _huge(file, folder):
    file.create_dataset("layers/dense/vars/1", (10**6, 10**6), "f4")


def _huge_chunks(file, folder):
    file.create_dataset("layers/dense/vars/1", (10**6, 10**6), "f4", chunks=(1, 16))[0] = 1


def _huge_chunk(file, folder):
    options = {"maxshape": (None,), "chunks": (5 * 10**8,), "compression": "gzip"}
    file.create_dataset("layers/dense/vars/1", (1,), "f4", **options)


def _bomb(file, folder):
    data = np.zeros(10**7, "f4")
    file.create_dataset("layers/dense/vars/1", data=data, compression="gzip", chunks=data.shape)


def _overfull_chunk(file, folder):
    import zlib

    made = file.create_dataset("layers/dense/vars/1", (16,), "f4", compression="gzip", chunks=(16,))
    made.id.write_direct_chunk((0,), zlib.compress(bytes(10**6)))


def _loop_of_groups(file, folder):
    file["layers/dense/layers"] = file["layers"]


def _two_names(file, folder):
    file["layers/dense/vars/1"] = file["layers/dense/vars/0"]


HOSTILE = {
    _soft_link: "SoftLink",
    _external_link: "ExternalLink",
    _virtual: "other files",
    _external_storage: "other files",
    _filter: "filter",
    _objects: "not numbers",
    _compound: "not numbers",
    _references: "not numbers",
    _type: "Datatype",
    _huge: "declares 4,000,000,000,000 bytes",
    _huge_chunks: "declares 4,000,000,000,000 bytes",
    _huge_chunk: "declares 2,000,000,000 bytes",
    _bomb: "declares 40,000,000 bytes",
    _overfull_chunk: "does not unpack to 64 bytes",
    _loop_of_groups: "another name",
    _two_names: "another name",
}


@pytest.mark.parametrize(("trap", "words"), HOSTILE.items(), ids=[trap.__name__[1:] for trap in HOSTILE])
def test_entries_of_hdf5_that_are_not_plain_arrays_of_the_file_are_refused(tmp_path, trap, words):
    place = tmp_path / "trap.weights.h5"
    with h5py.File(place, "w") as file:
        file["layers/dense/vars/0"] = np.ones((2, 3), np.float32)
        trap(file, tmp_path)
    with pytest.raises(ReaderError, match=words) as refused:
        read_keras(place)
    assert "trap.weights.h5" in str(refused.value)


def in_the_new_format(place, target):
    """The same content as HDF5 writes it since version 1.10."""
    with h5py.File(place) as old, h5py.File(target, "w", libver="latest") as new:
        new.attrs.update(old.attrs)
        for name in old:
            old.copy(name, new)
    return target


def test_the_new_format_of_hdf5_holds_the_same(files, tmp_path):
    plain = read_keras(files / "keras2_frozen.h5")
    new = read_keras(in_the_new_format(files / "keras2_frozen.h5", tmp_path / "new.h5"))
    assert new.operations == plain.operations
    assert all(torch.equal(new.tensors[name], value) for name, value in plain.tensors.items())


@pytest.mark.parametrize("new", [False, True], ids=["old format", "new format"])
def test_a_text_longer_than_the_file_is_refused_before_room_is_made(files, tmp_path, new):
    place = tmp_path / "long.h5"
    (in_the_new_format if new else shutil.copy)(files / "keras2_frozen.h5", place)
    content = place.read_bytes()
    with h5py.File(place) as file:
        text = file.attrs["model_config"].encode()
    heap = content.index(b"GCOL")
    said = len(text).to_bytes(4, "little") + heap.to_bytes(8, "little")
    assert content.count(said) == 1
    place.write_bytes(content.replace(said, b"\xf0\xff\xff\xff" + said[4:]))
    reason = "checksum" if new else "declares 4,294,967,280 bytes"
    with pytest.raises(ReaderError, match=reason):
        read_keras(place)


def test_a_heap_of_texts_without_an_end_is_refused(files, tmp_path):
    content = bytearray((files / "keras2_frozen.h5").read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 64] = bytes(48)
    (tmp_path / "endless.h5").write_bytes(content)
    with pytest.raises(ReaderError, match="heap of texts"):
        read_keras(tmp_path / "endless.h5")


def archive(files, tmp_path, spoil):
    """keras3.keras written again, spoilt on the way."""
    with zipfile.ZipFile(files / "keras3.keras") as old, zipfile.ZipFile(tmp_path / "spoilt.keras", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        spoil(new)
    return tmp_path / "spoilt.keras"


def _entry(name, mode=0o100644, content=b"x"):
    def spoil(new):
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        new.writestr(entry, content)

    return spoil


def _zeros(new):
    new.writestr("assets/zeros", bytes(10**8), zipfile.ZIP_DEFLATED)


SPOILT = {
    "up": (_entry("../evil"), "leads out"),
    "up inside": (_entry("assets/../../evil"), "leads out"),
    "absolute": (_entry("/etc/evil"), "leads out"),
    "drive": (_entry("C:evil"), "leads out"),
    "link": (_entry("assets/a", 0o120777, b"/etc/passwd"), "is a link"),
    "device": (_entry("assets/a", 0o020644), "is a link"),
    "other case": (_entry("CONFIG.json"), "name of its own"),
    "grows": (_zeros, "grow"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=list(SPOILT))
def test_archives_with_hostile_entries_are_refused(files, tmp_path, spoil, words):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ReaderError, match=words):
        read_keras(archive(files, tmp_path, spoil))
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "spoilt.keras"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_an_entry_twice_is_refused(files, tmp_path):
    with pytest.raises(ReaderError, match="name of its own"):
        read_keras(archive(files, tmp_path, _entry("config.json", content=b"{}")))


def test_an_archive_without_weights_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as new:
        new.writestr("config.json", "{}")
    with pytest.raises(ReaderError, match="model.weights.h5"):
        read_keras(tmp_path / "x.keras")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\xff", "null", '{"class_name": 3}', '{"class_name": "Model"}']
)
def test_a_description_that_is_no_model_is_refused(files, tmp_path, text):
    with zipfile.ZipFile(files / "keras3.keras") as old, zipfile.ZipFile(tmp_path / "x.keras", "w") as new:
        new.writestr("model.weights.h5", old.read("model.weights.h5"))
        new.writestr("config.json", text.encode("latin-1"))
    with pytest.raises(ReaderError, match="x.keras"):
        read_keras(tmp_path / "x.keras")


def test_a_missing_h5py_is_named_with_what_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ReaderError, match=r"pip install regraft\[keras\]"):
        read_keras(files / "keras2.h5")
