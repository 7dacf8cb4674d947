"""ONNX files that are damaged, hostile or beyond what can be followed give one sentence that names them."""

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from regraft.errors import ReaderError
from regraft.readers.onnx.file import read_onnx
from test_reader_onnx import FILES, KERNEL, cases, conv, save

SECRET = "the words of somebody else"


def refused(path, match, **options):
    """The sentence with which a file is refused; it is one line and names the file."""
    with pytest.raises(ReaderError, match=match) as caught:
        read_onnx(path, **options)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert SECRET not in sentence
    return sentence


def changed(path, change):
    """The model at `path` after `change`."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def external(folder, location, *, offset=None, length=None, shape=KERNEL.shape):
    """A model whose weights lie at `location`."""

    def change(model):
        tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))

    folder.mkdir(exist_ok=True)
    return changed(save(folder / "m.onnx", [conv()]), change)


# ---- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "tensorflow", "sklearn"])
def test_a_file_that_is_cut_short_anywhere_is_refused(name, tmp_path):
    data = (FILES / f"onnx_{name}.onnx").read_bytes()
    places = [0, 1, 5, 30, *range(len(data) // 12, len(data), len(data) // 12), len(data) - 30, len(data) - 1]
    for place in places:
        path = tmp_path / "m.onnx"
        path.write_bytes(data[:place])
        refused(path, "must")


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04" + b"\0" * 99, b"\x89HDF\r\n\x1a\n", b"\x80\x02}q\x00.", b"\0" * 500, b"{}"]
)
def test_a_file_of_another_kind_is_refused(data, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    refused(path, "must be a whole ONNX file")


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path, tmp_path / "pipe.onnx", Path("/dev/zero")):
        refused(path, "plain file")
    refused(tmp_path / "absent.onnx", "No such file")


def test_bytes_that_are_changed_one_by_one_never_lead_to_a_traceback(tmp_path):
    random, path, outcomes = np.random.RandomState(0), tmp_path / "m.onnx", []
    for name in ("attention", "class_token", "last_gate_by_shape", "weights_int8", "transposed_cropped", "pad_axes"):
        for _ in range(60):
            broken = bytearray(cases()[name][0])
            for place in random.randint(len(broken), size=random.randint(1, 4)):
                broken[place] = random.choice([0, 1, 127, 128, 255, random.randint(256)])
            path.write_bytes(broken)
            outcomes.append(outcome(path))
    assert outcomes.count("read") > 20
    assert outcomes.count("refused") > 200


def outcome(path):
    with contextlib.suppress(ReaderError):
        read_onnx(path)
        return "read"
    return "refused"


def test_a_shape_that_its_bytes_do_not_fill_is_refused_before_anything_is_made(tmp_path):
    path = save(tmp_path / "m.onnx", [conv()], w=KERNEL)
    for dims in ([4, 3, 3, 4], [2**40, 3, 3, 3], [2**62, 2**62, 3, 3], [4, 3, 3], [0, 3, 3, 3], [-4, 3, -3, 3]):

        def change(model, dims=dims):
            model.graph.initializer[0].dims[:] = dims

        refused(changed(path, change), "must (agree|not be negative)")


def test_numbers_in_typed_fields_are_counted_too(tmp_path):
    path = save(tmp_path / "m.onnx", [conv()])

    def change(model):
        model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=KERNEL.shape, float_data=[0.5] * 107)

    refused(changed(path, change), "must agree")


def test_text_and_sparse_tensors_are_refused_where_weights_are_needed(tmp_path):
    path = save(tmp_path / "m.onnx", [conv()])

    def change(model):
        model.graph.initializer.add(name="w", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])

    refused(changed(path, change), "plain numbers")


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("ConstantOfShape", ["big"], ["k"])],
        [helper.make_node("Expand", ["one", "big"], ["k"])],
        [helper.make_node("Tile", ["one", "big"], ["k"])],
        [helper.make_node("Range", ["zero", "far", "step"], ["k"])],
        [helper.make_node("Gather", ["one", "b"], ["a"]), helper.make_node("Gather", ["a", "b"], ["k"])],
        [helper.make_node("Concat", ["c"] * 400, ["k"], axis=0)],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_constants_that_would_fill_the_memory_are_refused_before_they_are_made(nodes, tmp_path):
    add = helper.make_node("Add", ["a", "k"], ["y"])
    big = {"big": np.array([1 << 20, 1 << 20, 1, 1]), "one": np.ones((1, 1, 1, 1), np.float32)}
    lots = {"c": np.zeros((1 << 10, 1 << 10), np.float32)}
    numbers = {"zero": np.int64(0), "far": np.int64(1 << 50), "step": np.int64(1), "b": np.zeros((99, 9999), np.int64)}
    first = [] if nodes[0].op_type == "Gather" else [conv(output="a")]
    path = save(
        tmp_path / "m.onnx", [*first, *nodes, *([add] if first else [conv("k")])], w=KERNEL, **big, **lots, **numbers
    )
    start = time.monotonic()
    refused(path, "far larger than the file")
    assert time.monotonic() - start < 10


def test_sizes_inside_the_network_that_no_memory_holds_are_never_allocated(tmp_path):
    nodes = [
        conv(output="a"),
        helper.make_node("Resize", ["a", "", "s"], ["b"], mode="linear", coordinate_transformation_mode="asymmetric"),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, w=KERNEL, s=np.array([1, 1, 1e6, 1e6], np.float32))
    refused(path, "pixels a side")


# ---- weights beside the file ------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with a file of somebody else, of the size that the model asks for."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "w.bin").write_bytes((SECRET * 99).encode()[: KERNEL.nbytes])
    return folder


@pytest.mark.parametrize(
    "location",
    [
        "../elsewhere/w.bin",
        "parts/../../elsewhere/w.bin",
        "/dev/zero",
        "./../elsewhere/w.bin",
        "..",
        "",
        ".",
        "a\\..\\b",
    ],
)
def test_weights_outside_the_folder_are_not_read(location, elsewhere, tmp_path):
    path = external(tmp_path / "model", location)
    (tmp_path / "model" / "parts").mkdir()
    refused(path, "must lie in")


def test_the_absolute_path_of_a_file_in_the_very_folder_is_not_read(tmp_path):
    (tmp_path / "w.bin").write_bytes(KERNEL.tobytes())
    refused(external(tmp_path, str(tmp_path / "w.bin")), "must lie in its own folder")


@pytest.mark.parametrize("kind", ["symbolic", "hard", "folder", "pipe", "directory"])
def test_weights_behind_a_link_or_in_a_device_are_not_read(kind, elsewhere, tmp_path):
    folder = tmp_path / "model"
    path = external(folder, "parts/w.bin")
    if kind == "folder":
        (folder / "parts").symlink_to(elsewhere)
    else:
        (folder / "parts").mkdir()
        place = folder / "parts" / "w.bin"
        makers = {"symbolic": place.symlink_to, "hard": place.hardlink_to}
        if kind in makers:
            makers[kind](elsewhere / "w.bin")
        else:
            os.mkfifo(place) if kind == "pipe" else place.mkdir()
    refused(path, "must lie in (a plain file|plain files)")


def test_a_folder_that_becomes_a_link_while_the_file_is_read_does_not_lead_out(elsewhere, tmp_path, monkeypatch):
    path = external(tmp_path / "model", "parts/w.bin")
    parts = tmp_path / "model" / "parts"
    parts.mkdir()
    (parts / "w.bin").write_bytes(KERNEL.tobytes())
    opened = os.open

    def swapped(name, flags, mode=0o777, *, dir_fd=None):
        descriptor = opened(name, flags, mode, dir_fd=dir_fd)
        if name == "parts":
            parts.rename(tmp_path / "model" / "old")
            parts.symlink_to(elsewhere)
        return descriptor

    monkeypatch.setattr(os, "open", swapped)
    assert read_onnx(path).tensors["conv.weight"].numpy().tobytes() == KERNEL.tobytes()


def test_weights_that_are_missing_are_named(tmp_path):
    assert "'w.bin'" in refused(external(tmp_path, "w.bin"), "not beside it")


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, KERNEL.nbytes - 1),
        ({"offset": 4}, KERNEL.nbytes),
        ({"offset": -4}, KERNEL.nbytes),
        ({"offset": "x"}, KERNEL.nbytes),
        ({"length": 8}, KERNEL.nbytes),
        ({"length": 2**50, "shape": [2**48]}, KERNEL.nbytes),
        ({"shape": [2**40, 3, 3, 3]}, KERNEL.nbytes),
    ],
)
def test_a_place_that_the_file_beside_does_not_have_is_refused(options, size, tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(size))
    refused(external(tmp_path, "w.bin", **options), "must agree")


def test_weights_that_are_asked_for_again_and_again_are_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(4 << 20))
    nodes = [conv(output="a0"), *(helper.make_node("Add", [f"a{i}", f"k{i}"], [f"a{i + 1}"]) for i in range(60))]
    path = save(tmp_path / "m.onnx", nodes, outputs=["a60"], w=KERNEL)

    def change(model):
        for i in range(60):
            tensor = model.graph.initializer.add(name=f"k{i}", data_type=TensorProto.FLOAT, dims=[1 << 20, 1, 1])
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="w.bin")

    refused(changed(path, change), "far larger than the file|can follow")


# ---- what cannot be followed ------------------------------------------------------------------------------------


def node(op, *inputs, domain="", **attributes):
    return helper.make_node(op, inputs or ["a"], ["y"], name="the step", domain=domain, **attributes)


@pytest.mark.parametrize(
    ("last", "match"),
    [
        (node("Hardmax"), "'the step' .Hardmax.*not among the operators"),
        (node("FusedConv", "a", "w", domain="com.microsoft"), "belongs to 'com.microsoft'"),
        (node("system", domain="os"), "belongs to 'os'"),
        (node("QuantizeLinear", "a", "s", "z"), "rounds what depends on the picture"),
        (node("DynamicQuantizeLinear"), "rounds what depends on the picture"),
        (node("Cast", to=TensorProto.INT64), "rounding to whole numbers"),
        (node("Conv", "a", "a"), "input 1 must be a constant"),
        (node("Conv", "a", "w"), "channel"),
        (node("Conv", "a", "w", kernel_shape=[5, 5]), "as stated"),
        (node("MaxPool", kernel_shape=[2, 2], strides=[0, 0]), "1 or more"),
        (node("MaxPool", kernel_shape=[99, 99]), "the step"),
        (node("AveragePool", kernel_shape=[3, 3], pads=[1, 0, 0, 0]), "leaves out padding"),
        (node("ConvTranspose", "a", "w", pads=[0, 0, -1, 0]), "padding"),
        (node("LRN", size=4), "an even number"),
        (node("LeakyRelu", alpha=float("nan")), "JSON"),
        (node("Reshape", "a", "s9"), "does not fit"),
        (node("Transpose", perm=[0, 1, 1, 2]), "an order of axes"),
        (node("Gather", "a", "i", axis=1), "places of shape"),
        (node("Squeeze", "a", "i"), "left out|range"),
        (node("Resize", "a", "", "up", mode="cubic", coordinate_transformation_mode="asymmetric"), "cubic"),
        (node("If", "a"), "which way it goes"),
        (node("BatchNormalization", "a", "k", "k", "k", "k"), "9 factors for 4 channels"),
        (node("Relu", "nothing"), "used before it is made"),
        (node("Loop", "", "", "a"), "not among the operators"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_a_step_that_cannot_be_followed_is_named(last, match, tmp_path):
    extra = {
        "s": np.float32(1),
        "z": np.uint8(0),
        "i": np.array([7]),
        "s9": np.array([0, 7, -1]),
        "k": np.ones(9, np.float32),
    }
    up = {"up": np.array([1, 1, 2, 2], np.float32)}
    domains = [last.domain] if last.domain else []
    refused(save(tmp_path / "m.onnx", [conv(output="a"), last], w=KERNEL, domains=domains, **extra, **up), match)


@pytest.mark.parametrize("opset", [6, 99])
def test_versions_of_the_operators_that_are_not_known_are_refused(opset, tmp_path):
    refused(save(tmp_path / "m.onnx", [conv()], w=KERNEL, opset=opset), f"of version {opset}")


def test_a_network_needs_one_picture_and_one_output(tmp_path):
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", 4, 6, 6])
    nodes = [conv(output="a"), helper.make_node("Add", ["a", "other"], ["y"])]
    assert "'other'" in refused(save(tmp_path / "two.onnx", nodes, inputs=[other], w=KERNEL), "takes 'x'")
    nodes = [conv(output="a"), helper.make_node("Relu", ["a"], ["y"])]
    path = save(tmp_path / "both.onnx", nodes, outputs=("y", "a"), w=KERNEL)
    refused(path, "gives 'y', 'a'")
    refused(path, "gives 'y', 'a'", output="nothing of the kind")


def test_a_network_that_holds_nothing_or_ignores_the_picture_is_refused(tmp_path):
    refused(save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])]), "holds none")
    constant = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(KERNEL))
    refused(save(tmp_path / "m.onnx", [constant]), "must depend on its input")


def test_a_shape_of_a_fixed_batch_that_cannot_be_opened_says_how_to_export(tmp_path):
    nodes = [
        conv(output="a"),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0, 2, 3]),
        helper.make_node("Reshape", ["b", "s"], ["c"]),
        helper.make_node("Gemm", ["c", "d"], ["y"]),
    ]
    constants = {"w": KERNEL, "s": np.array([4, 36]), "d": np.ones((36, 2), np.float32)}
    path = save(tmp_path / "m.onnx", nodes, x=(1, 3, 8, 8), **constants)
    refused(path, r"batch of 1, so export it with an open batch \(dynamic_axes or dynamic_shapes\)")


def test_a_layer_of_constants_alone_is_refused_for_that(tmp_path):
    inner = helper.make_node("Conv", ["k", "w"], ["v"])
    nodes = [inner, conv(output="a"), helper.make_node("Add", ["a", "v"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, x=(1, 3, 8, 8), w=KERNEL, k=np.ones((1, 3, 8, 8), "f"))
    refused(path, r"\(it works on constants alone, .*\): export the network for inference")


def test_weights_that_are_normalised_by_another_number_of_factors_are_refused(tmp_path):
    norm = helper.make_node("BatchNormalization", ["w", *"smmm"], ["v"])
    path = save(tmp_path / "m.onnx", [norm, conv("v")], w=KERNEL, s=np.ones(3, "f"), m=np.ones(4, "f"))
    refused(path, "normalisation of shape")


def test_an_output_that_mixes_the_pictures_of_a_batch_is_refused(tmp_path):
    nodes = [conv(output="a"), helper.make_node("Reshape", ["a", "s"], ["y"])]
    refused(save(tmp_path / "m.onnx", nodes, w=KERNEL, s=np.array([1, -1])), "a row for every picture")


@pytest.mark.parametrize(
    "mixing",
    [
        helper.make_node("ReduceMean", ["a"], ["b"], axes=[0, 2]),
        helper.make_node("Softmax", ["a"], ["b"], axis=0),
        helper.make_node("Slice", ["a", "zero", "one", "zero"], ["b"]),
        helper.make_node("Gather", ["a", "zero"], ["b"], axis=0),
        helper.make_node("Concat", ["a", "a"], ["b"], axis=0),
        helper.make_node("Split", ["a"], ["b"], axis=0),
    ],
    ids=lambda node: node.op_type,
)
def test_a_step_that_mixes_the_pictures_of_a_batch_is_refused(mixing, tmp_path):
    nodes = [conv(output="a"), mixing, helper.make_node("Add", ["a", "b"], ["y"])]
    refused(save(tmp_path / "m.onnx", nodes, w=KERNEL, zero=np.array([0]), one=np.array([1])), "the batch")


@pytest.mark.parametrize("x", [["n", None, 8, 8], ["n"], ["n", 2, 3, 4, 5], None])
def test_an_input_must_say_what_it_is(x, tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Add", ["a", "k"], ["y"])]
    refused(save(tmp_path / "m.onnx", nodes, x=x, k=np.ones(1, np.float32)), "declared shape")


def test_whole_numbers_are_no_pictures_unless_they_are_made_floating(tmp_path):
    for nodes, fits in (([conv()], False), ([node("Cast", "x", to=1), conv()], True)):
        nodes = (
            [helper.make_node("Cast", ["x"], ["f"], to=1), helper.make_node("Conv", ["f", "w"], ["y"])]
            if fits
            else nodes
        )
        path = save(tmp_path / "m.onnx", nodes, w=KERNEL)

        def change(model):
            model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8

        changed(path, change)
        if fits:
            assert [step.kind for step in read_onnx(path).operations.steps] == ["Conv2d"]
        else:
            refused(path, "array of floating numbers")


def test_functions_that_call_each_other_for_ever_or_explode_are_refused(tmp_path):
    def function(name, *calls):
        nodes = [helper.make_node(call, ["a"], ["b"], domain="own") for call in calls]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        return helper.make_function("own", name, ["a"], ["b"], nodes, opsets)

    circle = [function("f0", "f1"), function("f1", "f0")]
    tower = [*(function(f"f{i}", *[f"f{i + 1}"] * 10) for i in range(40)), function("f40", "end")]
    twins = [function("f0", "end"), function("f0", "end")]
    for functions in (circle, tower, twins):
        path = save(tmp_path / "m.onnx", [conv(output="a"), node("f0", domain="own")], w=KERNEL, domains=["own"])

        def change(model, functions=functions):
            model.functions.extend(functions)

        refused(changed(path, change), "functions of")


def test_names_that_are_no_text_are_refused(tmp_path):
    path = save(tmp_path / "m.onnx", [conv()], w=KERNEL)
    path.write_bytes(path.read_bytes().replace(b"conv", b"\xff\xfenv"))
    refused(path, "must be text")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "m.onnx", [conv()], w=KERNEL)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ReaderError, match=r"needs the package onnx: run `pip install regraft\[onnx\]`"):
        read_onnx(path)
