"""What torch.export writes: the same outputs, names and cuts as the module, and nothing pickled is run."""

from __future__ import annotations

import io
import json
import random
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import pickle_gadgets as pg
from regraft.cut import split
from regraft.errors import ReaderError
from regraft.graph import trace
from regraft.operations import build
from regraft.readers import read_checkpoint
from regraft.readers.exported.program import read_exported_program

GADGETS = sorted(pg.gadgets(Path("/nowhere/canary"), Path(tempfile.mkdtemp()) / "unused.py"))
FREE = ({0: torch.export.Dim("pictures", min=1, max=64)},)


class Small(nn.Module):
    """Strided, depthwise and even kernels, batch norm, a skip, pooling, flatten before dense."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.2)
        self.logits = nn.Linear(6 * 9, 4)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.pool(x + self.block(x))
        return torch.softmax(self.logits(self.drop(x.flatten(1))), -1)


class Attention(nn.Module):
    """Tokens, one more of them that all pictures share, attention with pictures along the second axis, layer norm."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 17, 12))
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])[:, 0]


class Of(nn.Module):
    """A network of one function, and the tensors that it uses."""

    def __init__(self, function, **own):
        super().__init__()
        self.function = function
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def drawn(module, seed=0):
    """The module with weights and statistics that are nowhere 0 or 1, as it is used."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif buffer.is_floating_point():
                buffer.normal_()
    return module.eval()


def exported(path, module, shape=(2, 3, 14, 14), shapes=None, *, decomposed=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (torch.randn(shape),), dynamic_shapes=shapes)
        torch.export.save(program.run_decompositions() if decomposed else program, path)
    return path


def old_kind(path):
    """The file as torch wrote it before 2.9: the graph, and pickled state dicts."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        graph = archive.read(f"{root}/models/model.json")
        state = read_raw(archive, f"{root}/data/weights/")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    constants = io.BytesIO()
    torch.save({}, constants)
    path = path.with_suffix(".old.pt2")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", graph)
        archive.writestr("serialized_state_dict.pt", buffer.getvalue())
        archive.writestr("serialized_constants.pt", constants.getvalue())
        archive.writestr("serialized_example_inputs.pt", b"")
    return path


def read_raw(archive, folder):
    listed = json.loads(archive.read(f"{folder}model_weights_config.json"))["config"]
    kinds = {7: torch.float32, 5: torch.int64}
    state = {}
    for name, about in listed.items():
        raw = bytearray(archive.read(folder + about["path_name"]))
        shape = [size["as_int"] for size in about["tensor_meta"]["sizes"]]
        state[name] = torch.frombuffer(raw, dtype=kinds[about["tensor_meta"]["dtype"]]).reshape(shape)
    return state


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small network, exported for any number of pictures, and the file."""
    module = drawn(Small())
    path = exported(tmp_path_factory.mktemp("small") / "small.pt2", module, shapes=FREE)
    old_kind(path)
    return module, path


def assert_same(path, module, size=14, tolerance=0.0):
    """The network in the file gives what the module gives, for numbers of pictures it was not exported for."""
    found = read_exported_program(path)
    network = build(found.operations, found.tensors)
    for count in (1, 3, 5):
        x = torch.randn(count, 3, size, size)
        with torch.no_grad():
            assert (network(x) - module(x)).abs().max() <= tolerance
    return found, network


def test_the_network_gives_what_the_module_gives_under_its_names(small):
    module, path = small
    found, network = assert_same(path, module)
    assert read_checkpoint(path).tensors.keys() == found.tensors.keys()
    assert (found.layout, found.input_shape) == ("torch", (3, 14, 14))
    assert set(found.passed_over) == {"norm.num_batches_tracked", "block.1.num_batches_tracked"}
    assert network.state_dict().keys() == module.state_dict().keys()
    assert isinstance(network.get_submodule("block.1"), nn.BatchNorm2d)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("shapes", [None, FREE], ids=["two pictures", "free"])
def test_a_network_exported_in_any_way_gives_the_same_for_any_number_of_pictures(tmp_path, shapes, decomposed):
    module = drawn(Small())
    assert_same(exported(tmp_path / "a.pt2", module, shapes=shapes, decomposed=decomposed), module, tolerance=1e-6)


@pytest.mark.parametrize("shapes", [None, FREE], ids=["two pictures", "free"])
def test_attention_with_pictures_along_the_second_axis_gives_the_same(tmp_path, shapes):
    module = drawn(Attention())
    assert_same(exported(tmp_path / "a.pt2", module, (2, 3, 16, 16), shapes), module, 16, 1e-6)


def test_a_network_exported_for_one_picture_takes_many(tmp_path):
    module = drawn(Small())
    assert_same(exported(tmp_path / "a.pt2", module, (1, 3, 14, 14)), module)


def test_pictures_of_another_size_never_become_more_pictures(tmp_path):
    module = Of(lambda m, x: x.reshape(-1, 3, 14 * 14).mean(2)).eval()
    found = read_exported_program(exported(tmp_path / "a.pt2", module))
    network = build(found.operations, found.tensors)
    with pytest.raises(RuntimeError, match="shape"):
        network(torch.randn(1, 3, 28, 28))


def test_files_that_older_versions_of_torch_wrote_are_read(small):
    module, path = small
    assert_same(path.with_suffix(".old.pt2"), module)


def test_weights_in_one_pickled_file_are_read_with_weights_only(small, tmp_path):
    module, path = small
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        state = read_raw(archive, f"{root}/data/weights/")
        kept = {name: archive.read(name) for name in archive.namelist() if "/weights/" not in name}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        for name, data in {**kept, f"{root}/data/weights/model.pt": buffer.getvalue()}.items():
            archive.writestr(name, data)
    assert_same(tmp_path / "a.pt2", module)


def test_upper_of_lower_is_the_network_at_every_cut(small):
    _, path = small
    found = read_exported_program(path)
    network = build(found.operations, found.tensors)
    x = torch.randn(3, 3, 14, 14)
    traced = trace(network, x)
    assert len(traced.cuts) >= 6
    for cut in traced.cuts:
        lower, upper = split(traced, cut.name)
        assert torch.equal(upper(lower(x)), network(x))


def test_one_step_of_training_changes_the_parameters_and_lowers_the_loss(small):
    _, path = small
    found = read_exported_program(path)
    network = build(found.operations, found.tensors)
    x, labels = torch.randn(8, 3, 14, 14), torch.arange(8) % 4
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    losses = []
    step = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        loss = -network(x).log()[torch.arange(8), labels].mean()
        losses.append(loss.item())
        step.zero_grad()
        loss.backward()
        step.step()
    assert losses[1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())


def shifted(m, x):
    return (
        (x - torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)).permute(1, 0, 2, 3).flatten(2).transpose(0, 1).flatten(1)
    )


def pieces(m, x):
    a, b = x.split([1, 2], 1)
    c, d = x.chunk(2, 2)
    e, f, g = x.unbind(1)
    joined = torch.cat([a * 2 - 1, 3 - b, (c - d).amax((2, 3), keepdim=True).expand(-1, -1, 14, 14)], 1)
    return joined[:, 1:, ::2, -3:].mean((2, 3)) + (e + f / 2 - g).unsqueeze(1).squeeze(1)[:, 0, :5]


def numbers(m, x):
    y = torch.nn.functional.pad(x, (1, 2, 0, 1), value=0.5).abs().clamp(0.1, 2).sqrt().pow(2)
    y = torch.minimum(torch.maximum(y, y.exp().log()), -y.neg()) * y.rsqrt()
    return torch.matmul(y, y.transpose(2, 3)).sum((2, 3))


def written(m, x):
    y = x * 1
    y += 1
    y.relu_()
    return y.flatten(1)


def resized(m, x):
    up = nn.functional.interpolate
    y = up(x, scale_factor=2) + up(x, size=(28, 28), mode="bilinear") + up(x, scale_factor=2.0, mode="bicubic")
    y = y + up(x, size=28, mode="nearest-exact") + up(x, scale_factor=2, mode="bilinear", align_corners=True)
    return up(up(y, scale_factor=(0.5, 0.25), mode="bilinear"), size=(5, 9), mode="bicubic", align_corners=True)


def summed(m, x):
    a, b = torch.stack([x, x * 2], 2), torch.stack([x, -x], -1)
    c = torch.einsum("bchw, bdhw -> bcd", x, x) + torch.einsum("bchw,dc->bd", x, m.w)[:, None]
    var, mean = torch.var_mean(x, (2, 3), correction=0)
    var = torch.addcmul(m.w[0], var, mean[:, :1].expand_as(var))
    numbers = [x.norm(dim=1).mean(2), torch.linalg.vector_norm(x, 1, (2, 3)), x.var((1, 2)), var, mean, c.flatten(1)]
    return torch.cat([*numbers, a.mean((3, 4)).flatten(1), b.mean((2, 3)).flatten(1)], 1)


LAYERS = {
    "sums and stacks": lambda: Of(summed, w=nn.Parameter(torch.randn(3, 3))),
    "activations": lambda: nn.Sequential(
        *(nn.SELU(), nn.ELU(0.5), nn.Hardtanh(-2, 2), nn.Tanh(), nn.GELU("tanh"), nn.GELU()),
        *(nn.SiLU(), nn.Sigmoid(), nn.Hardswish(), nn.Hardsigmoid(), nn.LogSoftmax(1), nn.Flatten()),
    ),
    "convolutions": lambda: nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.GroupNorm(2, 4), nn.AvgPool2d(2)),
        *(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(2)),
        *(nn.Conv1d(6, 2, 3), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5, affine=False)),
    ),
    "the last pooling to one number": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    "a constant and pictures along other axes": lambda: Of(shifted),
    "pieces": lambda: Of(pieces),
    "arithmetic": lambda: Of(numbers),
    "writing in place": lambda: Of(written),
    "a table read by stored places": lambda: Of(
        lambda m, x: x.mean((2, 3)) + m.table[m.place.view(-1)].view(2, 3)[0],
        table=nn.Parameter(torch.randn(5, 1)),
        place=nn.Buffer(torch.tensor([[4, 0, 2], [1, 1, 3]])),
    ),
    "what stays whole": lambda: nn.Sequential(
        nn.PReLU(3), nn.Mish(), nn.Softplus(), Of(lambda m, x: x.roll((1, 2), (2, 3))), nn.Flatten()
    ),
    "a bare product": lambda: Of(
        lambda m, x: x.mean((2, 3)) @ m.w + m.b, w=nn.Parameter(torch.randn(3, 5)), b=nn.Buffer(torch.randn(5))
    ),
    "layers named like what a module has": lambda: Of(
        lambda m, x: m.train_(m.input(m.operations(x.mean((2, 3))))),
        operations=nn.Linear(3, 5),
        input=nn.Linear(5, 4),
        train_=nn.Linear(4, 2),
    ),
}


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_operations_of_the_list_give_what_torch_gives(tmp_path, kind, decomposed):
    torch.manual_seed(0)
    module = LAYERS[kind]()
    module = drawn(module) if kind != "a table read by stored places" else module.eval()
    path = exported(tmp_path / "a.pt2", module, decomposed=decomposed)
    if decomposed and kind == "what stays whole":
        assert "not on its list" in pg.refuses(read_exported_program, path, ReaderError)
    else:
        assert_same(path, module, tolerance=2e-5)


@pytest.mark.parametrize("shapes", [None, FREE], ids=["two pictures", "free"])
def test_pictures_of_another_size_are_those_of_torch(tmp_path, shapes):
    module = Of(resized).eval()
    assert_same(exported(tmp_path / "a.pt2", module, shapes=shapes), module, tolerance=1e-5)


@pytest.mark.parametrize("shapes", [None, FREE], ids=["two pictures", "free"])
def test_norms_of_single_pictures_and_shuffled_pixels_are_those_of_torch(tmp_path, shapes):
    norms = (nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.InstanceNorm2d(8))
    module = drawn(nn.Sequential(nn.Conv2d(3, 8, 3), *norms, nn.PixelShuffle(2), nn.PixelUnshuffle(3), nn.Flatten()))
    _, network = assert_same(exported(tmp_path / "a.pt2", module, shapes=shapes), module, tolerance=1e-5)
    assert isinstance(network.get_submodule("1"), nn.GroupNorm)


def test_constants_are_not_trained_and_parameters_are(tmp_path):
    module = LAYERS["a bare product"]().eval()
    found, network = assert_same(exported(tmp_path / "a.pt2", module), module)
    assert [name for name, _ in network.named_parameters()] == ["w"]
    assert [name for name, _ in network.named_buffers()] == ["b"]


def test_sizes_of_pictures_that_were_left_free_stay_free(tmp_path):
    shapes = ({**FREE[0], 2: torch.export.Dim("h", min=8, max=64), 3: torch.export.Dim("w", min=8, max=64)},)
    module = drawn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    path = exported(tmp_path / "a.pt2", module, shapes=shapes)
    found, _ = assert_same(path, module, 20)
    assert found.input_shape is None


def seen_after_writing(m, x):
    x = x * 2
    first = x[:, 0]
    x.add_(1)
    return first.flatten(1)


REFUSED = {
    "training mode": (lambda: Small().train(), "model.eval()"),
    "batch norm in training mode alone": (
        lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
        "eval()",
    ),
    "one layer twice": (lambda: Of(lambda m, x: m.c(m.c(x)), c=nn.Conv2d(3, 3, 1)), "shares c.weight"),
    "an unknown operation": (lambda: Of(lambda m, x: torch.cumsum(x, 1)), "cumsum"),
    "the mean of a batch": (lambda: Of(lambda m, x: x - x.mean(0)), "across the pictures"),
    "pictures mixed": (lambda: Of(lambda m, x: x.reshape(3, -1)), "across the pictures"),
    "the first picture": (lambda: Of(lambda m, x: x[0]), "across the pictures"),
    "softmax over a batch": (lambda: Of(lambda m, x: x.softmax(0)), "across the pictures"),
    "a row for every picture": (
        lambda: Of(lambda m, x: x.mean((2, 3)) + m.w, w=nn.Parameter(torch.ones(2, 3))),
        "every picture",
    ),
    "products of all pictures": (lambda: Of(lambda m, x: torch.einsum("bchw,dchw->bd", x, x)), "across the pictures"),
    "several outputs": (lambda: Of(lambda m, x: (x + 1, x * 2)), "2 outputs"),
    "an old view of what was written": (lambda: Of(seen_after_writing), "views"),
    "weights that are computed": (
        lambda: Of(lambda m, x: nn.functional.conv2d(x, m.k * 2), k=nn.Parameter(torch.ones(2, 3, 1, 1))),
        "stored kernels",
    ),
    "pictures along the last axis": (lambda: Of(lambda m, x: x.permute(1, 2, 3, 0)), "one row for every picture"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_followed_is_refused_by_its_name(tmp_path, kind):
    make, word = REFUSED[kind]
    module = make()
    path = exported(tmp_path / "a.pt2", module if "training" in kind else module.eval())
    assert word in pg.refuses(read_exported_program, path, ReaderError)


def test_axes_that_one_picture_hides_are_refused_with_the_way_out(tmp_path):
    path = exported(tmp_path / "a.pt2", drawn(Attention()), (1, 3, 16, 16))
    assert "export for two" in pg.refuses(read_exported_program, path, ReaderError)


def test_half_precision_is_read_as_float32(tmp_path):
    module = drawn(Small())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = Small().bfloat16().eval()
        half.load_state_dict(module.state_dict())
        program = torch.export.export(half, (torch.randn(2, 3, 14, 14).bfloat16(),))
        torch.export.save(program, tmp_path / "a.pt2")
    _, network = assert_same(tmp_path / "a.pt2", half.float())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("gadget", GADGETS)
def test_no_gadget_runs_in_an_exported_program(tmp_path, small, gadget):
    canary = tmp_path / "canary"
    call = pg.pickled(pg.gadgets(canary, tmp_path / "script.py")[gadget])
    path = tmp_path / "a.pt2"
    path.write_bytes(pg.with_pickled_weight(small[1].read_bytes(), call))
    assert "code" in pg.refuses(read_exported_program, path, ReaderError)
    with zipfile.ZipFile(small[1].with_suffix(".old.pt2")) as old, zipfile.ZipFile(path, "w") as archive:
        for name in old.namelist():
            archive.writestr(name, pg.torch_zip(call) if name.endswith("state_dict.pt") else old.read(name))
    assert "code" in pg.refuses(read_exported_program, path, ReaderError)
    path.write_bytes(pg.exported_with(small[1].read_bytes(), {"data/sample_inputs/model.pt": pg.torch_zip(call)}))
    assert_same(path, small[0])
    assert not canary.exists()


def test_a_file_cut_short_anywhere_is_refused(small, tmp_path):
    whole = small[1].read_bytes()
    for kept in [*range(0, len(whole), len(whole) // 60), len(whole) - 1]:
        (tmp_path / "a.pt2").write_bytes(whole[:kept])
        pg.refuses(read_exported_program, tmp_path / "a.pt2", ReaderError)


def test_other_files_are_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt2")
    assert "torch.export" in pg.refuses(read_exported_program, tmp_path / "a.pt2", ReaderError)
    (tmp_path / "a.pt2").write_bytes(b"\x80\x02}.")
    pg.refuses(read_exported_program, tmp_path / "a.pt2", ReaderError)
    pg.refuses(read_exported_program, tmp_path / "missing.pt2", ReaderError)


def changed(path, small, entry, change):
    """The file with a JSON entry as `change` leaves it."""
    source = small[1].read_bytes()
    with zipfile.ZipFile(io.BytesIO(source)) as archive:
        name = next(n for n in archive.namelist() if n.endswith(entry))
        value = json.loads(archive.read(name))
    change(value)
    path.write_bytes(pg.exported_with(source, {name.partition("/")[2]: json.dumps(value).encode()}))
    return path


HUGE = {"as_int": 1 << 40}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sizes", [HUGE] * 4),
        ("sizes", [{"as_int": -6}] * 4),
        ("sizes", []),
        ("sizes", [{"as_expr": {"expr_str": "__import__('os')"}}] * 4),
        ("strides", [HUGE] * 4),
        ("strides", [{"as_int": 0}] * 4),
        ("storage_offset", HUGE),
        ("storage_offset", {"as_int": -4}),
        ("dtype", 0),
        ("layout", 1),
    ],
)
def test_tensors_that_claim_other_bytes_than_their_own_are_refused(tmp_path, small, key, value):
    def change(listed):
        about = listed["config"]["stem.weight"]["tensor_meta"]
        about[key] = value
        if key == "strides" and value[0] == {"as_int": 0}:
            about["sizes"] = [{"as_int": 100}] * 4

    path = changed(tmp_path / "a.pt2", small, "_weights_config.json", change)
    pg.refuses(read_exported_program, path, ReaderError)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "missing"])
def test_tensors_that_lie_elsewhere_are_refused(tmp_path, small, name):
    def change(listed):
        listed["config"]["stem.weight"]["path_name"] = name

    path = changed(tmp_path / "a.pt2", small, "_weights_config.json", change)
    assert "archive" in pg.refuses(read_exported_program, path, ReaderError)


def test_a_graph_changed_at_random_is_read_or_refused_in_a_sentence(tmp_path, small):
    draw, refused = random.Random(0), 0

    def change(value):
        for _ in range(2):
            at = value["graph_module"]
            while True:
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                key = draw.choice(keys)
                if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.93:
                    at = at[key]
                    continue
                at[key] = draw.choice([None, -1, 1 << 70, "x", [], {}, [1], {"as_int": 3}, True, 0.5])
                break

    for _ in range(80):
        path = changed(tmp_path / "a.pt2", small, "models/model.json", change)
        try:
            read_exported_program(path)
        except ReaderError:
            refused += 1
    assert refused > 15
