"""ONNX files give the networks and numbers that ONNX Runtime saw in them.

The files were written by PyTorch, TensorFlow and scikit-learn, and step by step (tests/parity/make_onnx.py); none of
them, nor ONNX Runtime, is needed here.
"""

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from regraft.graph import trace
from regraft.operations import Operations, build, operations_from_json
from regraft.readers import read_checkpoint
from regraft.readers.onnx.file import read_onnx
from small_networks import assert_every_cut_is_exact

FILES = Path(__file__).parent / "parity" / "files"
CLOSE = {"rtol": 0, "atol": 1e-4}
NETWORKS = ("torch", "torch_tokens", "tensorflow", "sklearn")


@functools.cache
def cases():
    """By name: the bytes of a file, the shape of its input, its output."""
    stored = np.load(FILES / "onnx_operators.npz")
    files, outputs, found = bytes(stored["files"]), stored["outputs"], {}
    at = number = 0
    for name, (length, shape, output) in json.loads(bytes(stored["index"])).items():
        count = int(np.prod(output))
        found[name] = (files[at : at + length], shape, outputs[number : number + count].reshape(output))
        at, number = at + length, number + count
    return found


def read_case(name, folder):
    path = folder / f"{name}.onnx"
    path.write_bytes(cases()[name][0])
    return read_onnx(path)


def kinds(found):
    return [step.kind for step in found.operations.steps]


@functools.cache
def network(name):
    """What was read of a fixture, as a network, and the arrays beside it."""
    found = read_onnx(FILES / f"onnx_{name}.onnx")
    return found, build(found.operations, found.tensors), dict(np.load(FILES / f"onnx_{name}.npz"))


def save(path, nodes, *, x=("n", 3, 8, 8), opset=17, outputs=("y",), inputs=(), domains=(), **constants):
    """A model of nodes from `x` to `y`."""
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), *inputs]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values, ends, tensors), opset_imports=opsets), path)
    return path


def conv(name="w", output="y"):
    return helper.make_node("Conv", ["x", name], [output], name="conv")


KERNEL = np.arange(108, dtype=np.float32).reshape(4, 3, 3, 3) / 100


# ---- the same numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases())
def test_every_operator_gives_what_onnx_runtime_gives(name, tmp_path):
    _, shape, output = cases()[name]
    x = (np.random.RandomState(1).randn(*shape) * 0.5 + 0.1).astype(np.float32)
    found = read_case(name, tmp_path)
    with torch.no_grad():
        y = build(found.operations, found.tensors)(torch.from_numpy(x))
    np.testing.assert_allclose(y.numpy(), output, **CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_whole_network_gives_what_onnx_runtime_gives_in_every_layer(name):
    found, module, stored = network(name)
    x = torch.from_numpy(stored["x"])
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), stored["output"], **CLOSE)
    names = [step.name for step in found.operations.steps]
    for layer in stored.keys() - {"x", "output"}:
        steps = found.operations.steps[: names.index(layer) + 1]
        made = {step.name for step in steps}
        tensors = {t: v for t, v in found.tensors.items() if t in made or t.rpartition(".")[0] in made}
        with torch.no_grad():
            part = build(Operations(steps, layer), tensors)(x)
        np.testing.assert_allclose(part.numpy(), stored[layer], **CLOSE, err_msg=layer)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_steps_survive_json(name):
    found, module, stored = network(name)
    again = operations_from_json(json.loads(json.dumps(found.operations.to_json(), allow_nan=False)))
    x = torch.from_numpy(stored["x"])
    assert torch.equal(build(again, found.tensors)(x), module(x))


@pytest.mark.parametrize("name", NETWORKS[:3])
def test_every_cut_of_a_network_that_was_read_is_exact(name):
    _, module, stored = network(name)
    x = torch.from_numpy(stored["x"])
    followed = trace(module, x[:1])
    assert len(followed.cuts) >= 7
    assert_every_cut_is_exact(followed, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_was_read_can_be_trained(name):
    found, _, stored = network(name)
    module = build(found.operations, {key: value.clone() for key, value in found.tensors.items()})
    x, labels = torch.from_numpy(stored["x"]), torch.arange(len(stored["x"])) % 3
    before = [p.detach().clone() for p in module.parameters()]
    losses = []
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(module(x), labels)
        losses.append(loss.item())
        module.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.01 * parameter.grad
    assert losses[1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


# ---- names and layers -------------------------------------------------------------------------------------------


def test_layers_are_called_as_the_exporter_called_them():
    found, module, _ = network("torch")
    assert {"stem.conv.weight", "stem.bn.running_var", "blocks.1.depth.weight", "head.bias"} <= found.tensors.keys()
    assert type(module.get_submodule("blocks.0.bn")) is torch.nn.BatchNorm2d
    assert module.get_submodule("stem.bn").eps == 1e-5
    assert type(module.get_submodule("blocks.0.act.Mul")) is torch.nn.SiLU
    _, module, _ = network("torch_tokens")
    assert type(module.get_submodule("blocks.1.norm2")) is torch.nn.LayerNorm
    assert type(module.get_submodule("blocks.1.proj.linear")) is torch.nn.Linear
    assert "tf2onnx" in network("tensorflow")[0].format


def test_the_tensors_are_the_state_of_the_network_and_say_what_is_trained():
    for name in NETWORKS:
        found, module, _ = network(name)
        state = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
        assert state == found.tensors.keys()
        assert all(t.dtype in (torch.float32, torch.int64) for t in found.tensors.values())
    tokens = dict(network("torch_tokens")[1].named_parameters())
    assert "pos_embed" in tokens
    assert {"head.weight", "patches.bias"} <= tokens.keys()


def test_a_channels_last_graph_keeps_no_permute_but_the_one_before_the_dense_layer():
    found, _, _ = network("tensorflow")
    assert found.input_shape == (3, 17, 15)
    assert kinds(found).count("permute") == 1
    assert kinds(found)[kinds(found).index("permute") + 1 :][:2] == ["Flatten", "Linear"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last_pair", ["Conv2d", "ReLU", "Conv2d"]),
        ("last_gate_by_shape", ["Conv2d", "AdaptiveAvgPool2d", "Sigmoid", "mul"]),
        ("last_joined", ["Conv2d", "concat", "MaxPool2d"]),
        ("last_padded", ["Conv2d", "pad", "Conv2d"]),
        ("last_and_first", ["Conv2d", "Conv2d", "add"]),
        ("last_grown", ["Conv2d", "Upsample"]),
        ("last_map", ["Conv2d", "ReLU"]),
        ("one_grown", ["Conv2d", "Upsample"]),
        ("depth_to_space_crd", ["Conv2d", "pixel_shuffle"]),
        ("cast_like", ["Conv2d"]),
        ("weights_normalised_1", ["Conv2d"]),
        ("transpose_pair", ["Conv2d"]),
        ("conv_bias_added", ["Conv2d"]),
        ("matmul_added", ["Linear"]),
        ("max_behind", ["Conv2d", "MaxPool2d"]),
        ("conv_same_upper_1", ["SamePadding", "Conv2d"]),
        ("hard_swish_by_parts", ["Conv2d", "Hardswish"]),
        ("clip_six", ["Conv2d", "ReLU6"]),
        ("identity", ["Conv2d"]),
        ("cast", ["Conv2d"]),
    ],
)
def test_steps_are_no_more_than_the_network_needs(name, expected, tmp_path):
    assert kinds(read_case(name, tmp_path)) == expected


def test_weights_that_two_layers_share_in_the_file_are_two_tensors(tmp_path):
    first, second = read_case("weights_twice", tmp_path).tensors.values()
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_a_mean_taken_off_the_picture_is_not_trained_and_a_class_token_is(tmp_path):
    shifted = read_case("shifted_picture", tmp_path)
    assert kinds(shifted)[:4] == ["buffer", "sub", "buffer", "div"]
    token = read_case("class_token", tmp_path)
    assert {s.name: s.kind for s in token.operations.steps if s.kind in ("parameter", "buffer")} == {
        "token": "parameter",
        "place": "parameter",
    }
    masked = read_case("masked", tmp_path)
    assert [s.kind for s in masked.operations.steps if s.name == "mask"] == ["buffer"]


def test_names_that_would_not_do_as_modules_are_changed(tmp_path):
    names = [
        "input",
        "add/train.float",
        "../x\\y",
        "",
        "é:0",
        "a" * 500,
        "/".join("b" * 60),
        "add",
        "add/w",
        "operations",
    ]
    nodes = [helper.make_node("Conv", ["x", "w0"], ["v0"], name="a.b/weight")]
    for number, name in enumerate(names):
        nodes.append(helper.make_node("Add", [f"v{number}", f"k{number}"], [f"v{number + 1}"], name=name))
        nodes.append(helper.make_node("Relu", [f"v{number + 1}"], [f"r{number + 1}"], name=name))
        nodes[-2].input[0] = f"r{number}" if number else "v0"
    constants = {f"k{number}": np.full((4, 1, 1), 0.5, np.float32) for number in range(len(names))}
    path = save(tmp_path / "m.onnx", nodes, outputs=[f"r{len(names)}"], w0=KERNEL, **constants)
    found = read_onnx(path)
    module = build(found.operations, found.tensors)
    assert len({step.name for step in found.operations.steps}) == len(found.operations.steps)
    assert torch.isfinite(module(torch.zeros(2, 3, 8, 8))).all()
    assert max(len(part) for step in found.operations.steps for part in step.name.split(".")) < 90
    assert_every_cut_is_exact(trace(module, torch.zeros(1, 3, 8, 8)), torch.randn(2, 3, 8, 8))


# ---- inputs, outputs, forms of files ----------------------------------------------------------------------------


def test_a_picture_of_any_size_goes_in_where_the_file_leaves_it_open(tmp_path):
    nodes = [
        conv(output="a"),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["y"]),
    ]
    found = read_onnx(save(tmp_path / "m.onnx", nodes, x=("n", None, "h", "w"), w=KERNEL))
    assert found.input_shape is None
    module = build(found.operations, found.tensors)
    assert module(torch.zeros(2, 3, 9, 11)).shape == module(torch.zeros(2, 3, 30, 20)).shape == (2, 4)


def test_weights_may_lie_in_a_file_of_the_same_folder(tmp_path):
    save(tmp_path / "whole.onnx", [conv()], w=KERNEL)
    model = onnx.load(tmp_path / "whole.onnx")
    (tmp_path / "parts").mkdir()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="parts/w.bin", size_threshold=0)
    assert (tmp_path / "parts" / "w.bin").stat().st_size >= KERNEL.nbytes
    assert (tmp_path / "m.onnx").stat().st_size < KERNEL.nbytes
    assert torch.equal(read_onnx(tmp_path / "m.onnx").tensors["conv.weight"], torch.from_numpy(KERNEL))


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_weights_of_other_precisions_become_float32(kind, tmp_path):
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), KERNEL.shape, np.round(KERNEL * 64).ravel() / 64)
    path = save(tmp_path / "m.onnx", [conv()])
    model = onnx.load(path)
    model.graph.initializer.append(tensor)
    onnx.save(model, path)
    assert torch.equal(read_onnx(path).tensors["conv.weight"], torch.from_numpy(np.round(KERNEL * 64) / 64))


def test_functions_of_the_file_are_put_in_where_they_are_called(tmp_path):
    inner = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Relu", ["a"], ["c"]), helper.make_node("Neg", ["c"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    path = save(
        tmp_path / "m.onnx", [conv(output="a"), helper.make_node("Twice", ["a"], ["y"], domain="own")], w=KERNEL
    )
    model = onnx.load(path)
    model.functions.append(inner)
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, path)
    assert kinds(read_onnx(path)) == ["Conv2d", "ReLU", "neg"]


def test_a_branch_that_does_not_depend_on_the_picture_is_taken_when_the_file_is_read(tmp_path):
    def graph(op):
        value = helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["a"], [f"{op}_out"])], op, [], [value])

    choice = helper.make_node("If", ["c"], ["y"], then_branch=graph("Relu"), else_branch=graph("Neg"))
    for wanted, kind in ((True, "ReLU"), (False, "neg")):
        path = save(tmp_path / "m.onnx", [conv(output="a"), choice], w=KERNEL, c=np.array(wanted))
        assert kinds(read_onnx(path)) == ["Conv2d", kind]


def test_the_one_output_of_several_that_is_meant_can_be_said(tmp_path):
    nodes = [conv(output="a"), helper.make_node("Relu", ["a"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, outputs=("y", "a"), w=KERNEL)
    assert kinds(read_onnx(path, output="a")) == ["Conv2d"]
    assert kinds(read_onnx(path, output="y")) == ["Conv2d", "ReLU"]


def test_labels_beside_the_probabilities_are_passed_over():
    found, _, _ = network("sklearn")
    assert kinds(found)[-1] == "Softmax"
    assert found.input_shape == (6,)
    assert "classes" in found.passed_over


def test_a_file_is_read_by_its_ending():
    assert read_checkpoint(FILES / "onnx_torch.onnx").operations is not None


# ---- resizing ---------------------------------------------------------------------------------------------------


def resized(folder, scale, x, **options):
    """What a resizing of height and width gives of pictures that a convolution passes on as they are."""
    nodes = [conv(output="a"), helper.make_node("Resize", ["a", "", "s"], ["y"], **options)]
    same = np.eye(3, dtype=np.float32)[:, :, None, None]
    path = save(folder / "m.onnx", nodes, x=("n", *x.shape[1:]), w=same, s=np.array([1, 1, scale, scale], np.float32))
    found = read_onnx(path)
    return build(found.operations, found.tensors)(x)


@pytest.mark.parametrize(("scale", "side"), [(0.65, 13), (0.7, 14), (1.3, 26), (1 / 3, 6)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_scales_that_float32_only_comes_near_give_the_sizes_and_places_of_runtimes(scale, side, mode, tmp_path):
    x = torch.arange(400, dtype=torch.float32).reshape(1, 1, 20, 20).expand(2, 3, 20, 20)
    rule = {"nearest": "asymmetric", "linear": "half_pixel"}[mode]
    nearest = {"nearest_mode": "floor"} if mode == "nearest" else {}
    y = resized(tmp_path, scale, x, mode=mode, coordinate_transformation_mode=rule, **nearest)
    assert y.shape == (2, 3, side, side)
    options = {"mode": "nearest"} if mode == "nearest" else {"mode": "bilinear", "align_corners": False}
    theirs = torch.nn.functional.interpolate(x, scale_factor=scale, recompute_scale_factor=False, **options)
    torch.testing.assert_close(y, theirs, rtol=0, atol=1e-3)


def test_one_pixel_that_is_left_is_the_corner_where_the_rule_of_pytorch_says_so(tmp_path):
    x = torch.arange(16, dtype=torch.float32).reshape(1, 1, 4, 4).expand(2, 3, 4, 4)
    y = resized(tmp_path, 0.25, x, mode="linear", coordinate_transformation_mode="pytorch_half_pixel")
    assert y.shape == (2, 3, 1, 1)
    assert y.unique().tolist() == [0.0]
