"""A backbone is found by name or taken from Python, and is regraft's own from then on."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regraft.architecture import stated_or_found
from regraft.backbone import Backbone, load_backbone, rebuild, weights_digest
from regraft.errors import BackboneError, CutError, ReaderError, TraceError
from regraft.preprocess import normalise, plain_spec
from tiny import EXAMPLE, TinyNet


@pytest.fixture(scope="module")
def default() -> Backbone:
    return load_backbone()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The network is cut off; holds the addresses that were asked for nevertheless."""
    asked: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        asked.append(address)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a[0]))  # type: ignore[arg-type]
    return asked


def tiny(module: nn.Module | None = None) -> Backbone:
    return load_backbone(module or TinyNet(), example=EXAMPLE)


# --- by name ---


def test_default_has_real_weights_without_asking_the_network(offline: list[object]) -> None:
    found = load_backbone()
    assert offline == []
    assert (found.source.architecture, found.source.pretrained) == ("tf_efficientnet_lite0", True)
    assert found.source.licence == "Apache-2.0"
    assert (found.preprocess.size, found.preprocess.mean, found.preprocess.interpolation) == (
        (224, 224),
        (0.5, 0.5, 0.5),
        "bicubic",
    )
    assert 10 <= len(found.shown) <= 25
    assert not found.module.training


def drawn(what: str) -> torch.Tensor:
    """A drawing that everybody who knows ImageNet knows, float32 (1, 3, 224, 224) in -1..1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    radius = (x**2 + y**2).sqrt()

    def lines(across: torch.Tensor, width: float) -> torch.Tensor:
        return torch.remainder(across, 1) < width

    light = {
        "window screen": ~(lines(8 * x, 0.12) | lines(8 * y, 0.12)),
        "chainlink fence": ~(lines(6 * (x + y), 0.15) | lines(6 * (x - y), 0.15)),
        "maze": ~lines(6 * radius, 0.5),
        "ping-pong ball": radius < 0.3,
    }[what]
    return light.float().expand(1, 3, 224, 224) * 2 - 1


@pytest.mark.parametrize(
    ("what", "number"), [("window screen", 904), ("chainlink fence", 489), ("maze", 646), ("ping-pong ball", 722)]
)
def test_default_recognises_what_imagenet_taught_it(what: str, number: int, default: Backbone) -> None:
    with torch.no_grad():
        probabilities = torch.softmax(default.module(drawn(what)), 1)[0]
    assert int(probabilities.argmax()) == number
    assert float(probabilities.max()) > 0.2


def test_random_weights_recognise_nothing() -> None:
    scratch = load_backbone("scratch")
    with torch.no_grad():
        answers = {int(scratch.module(drawn(what)).argmax()) for what in ("window screen", "maze", "ping-pong ball")}
    assert not answers & {904, 646, 722}


def test_scratch_is_the_same_network_with_weights_drawn_from_the_seed() -> None:
    first, again, other = (load_backbone("scratch", seed=seed) for seed in (0, 0, 1))
    assert first.source.weights == again.source.weights
    assert first.source.weights != other.source.weights
    assert not first.source.pretrained
    assert first.source.licence is None
    assert [cut.name for cut in first.cuts] == [cut.name for cut in load_backbone().cuts]


def test_drawing_weights_leaves_the_random_state_of_the_caller() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_backbone("scratch", seed=9)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("wrong", "near"), [("resnet81", "resnet18"), ("tf_efficientnet_lit0", "tf_efficientnet_lite0")]
)
def test_unknown_name_is_refused_with_names_like_it(wrong: str, near: str) -> None:
    with pytest.raises(BackboneError, match=rf"found '{wrong}'; nearest: .*{near}"):
        load_backbone(wrong)


def test_name_like_no_other_is_refused_with_the_forms_there_are() -> None:
    with pytest.raises(BackboneError, match=r"must be `default`, `scratch` or a timm name; found '\?\?\?'\.$"):
        load_backbone("???")


def test_unknown_weights_of_a_known_network_are_refused_with_those_there_are() -> None:
    with pytest.raises(BackboneError, match=r"resnet18 has no weights called 'imagenet9'; there are: .*tv_in1k"):
        load_backbone("resnet18.imagenet9")


def test_weights_that_cannot_be_had_are_never_replaced_by_random_ones(
    offline: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"neither in the local cache .* nor .*default backbone"):
        load_backbone("resnet18.a1_in1k")


def test_network_that_nobody_trained_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"efficientnet_b8 has no pretrained weights"):
        load_backbone("efficientnet_b8")


def test_backbone_is_taken_as_it_is(default: Backbone) -> None:
    assert load_backbone(default) is default


# --- from Python ---


def test_module_of_the_user_is_left_exactly_as_it_was() -> None:
    module = TinyNet().train()
    module.stage1.requires_grad_(False)
    module.stage2.eval()
    module.stem[0].weight.grad = torch.ones_like(module.stem[0].weight)
    before = copy.deepcopy(module)
    found = tiny(module)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.zero_()
    found.module.train()(torch.rand(2, 3, 32, 32))
    for (name, now), (_, then) in zip(
        [*module.named_parameters(), *module.named_buffers()],
        [*before.named_parameters(), *before.named_buffers()],
        strict=True,
    ):
        assert torch.equal(now, then), name
        assert now.requires_grad == then.requires_grad
    assert torch.equal(module.stem[0].weight.grad, torch.ones_like(module.stem[0].weight))
    assert [m.training for m in module.modules()] == [m.training for m in before.modules()]
    assert [vars(m).keys() for m in module.modules()] == [vars(m).keys() for m in before.modules()]


def test_module_gives_in_evaluation_what_it_gave_the_user() -> None:
    module = TinyNet().eval()
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tiny(module).module(x), module(x))


def test_module_that_states_nothing_gets_pictures_of_the_size_of_the_example() -> None:
    found = tiny()
    assert found.preprocess == plain_spec(32, 32, 3)
    assert (found.source.architecture, found.source.licence) == ("custom", None)
    spec = plain_spec(48, 48, 3)
    assert load_backbone(TinyNet(), example=EXAMPLE, preprocess=spec).preprocess == spec


@pytest.mark.parametrize(
    ("example", "found"),
    [(None, "none"), (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"), (torch.zeros(2, 4, 32, 32), r"\(2, 4, 32, 32\)")],
)
def test_module_without_a_batch_of_pictures_is_refused(example: torch.Tensor | None, found: str) -> None:
    with pytest.raises(BackboneError, match=rf"needs example=, a batch of pictures .*; found {found}"):
        load_backbone(TinyNet(), example=example)


def test_example_that_does_not_fit_the_module_is_refused_with_its_shape() -> None:
    with pytest.raises(TraceError, match=r"\(2, 1, 32, 32\)"):
        load_backbone(TinyNet(), example=torch.zeros(2, 1, 32, 32))


def test_saved_network_of_a_user_can_only_be_built_by_the_user() -> None:
    found = tiny()
    with pytest.raises(BackboneError, match=r"load_model\(path, backbone=module\)"):
        rebuild(found.source, found.preprocess)


def test_saved_network_by_name_is_built_again_with_the_same_cuts(default: Backbone) -> None:
    again = rebuild(default.source, default.preprocess)
    assert again.source == default.source
    assert [cut.name for cut in again.cuts] == [cut.name for cut in default.cuts]
    assert again.module.state_dict().keys() == default.module.state_dict().keys()


# --- the digest of a network ---


def test_digest_is_the_same_at_every_loading(default: Backbone) -> None:
    assert load_backbone().source.weights == default.source.weights
    assert tiny().source.weights == tiny().source.weights


class Rich(nn.Module):
    """A network with every kind of fact that shapes its output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.1)
        self.register_buffer("offset", torch.zeros(4, 1, 1))
        self.register_buffer("hidden", torch.ones(4, 1, 1), persistent=False)
        self.power = Power()
        self.shift = 0.5
        torch.manual_seed(0)
        nn.init.normal_(self.stem.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x))) * self.hidden + self.offset
        return (self.power(x) + self.shift).mean((2, 3))


class Power(nn.Module):
    """A layer that cannot be followed, so that its code is not in the graph, and does not print its setting."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs() ** self.exponent if bool(x.sum() == x.sum()) else x


def nudge(values: torch.Tensor) -> None:
    with torch.no_grad():
        values.view(-1)[0] = torch.nextafter(values.view(-1)[0], torch.tensor(9.0))


CHANGES: dict[str, Callable[[Rich], object]] = {
    "one weight by its last bit": lambda m: nudge(m.stem.weight),
    "a bias": lambda m: nudge(m.stem.bias),
    "a running mean": lambda m: nudge(m.norm.running_mean),
    "a running variance": lambda m: nudge(m.norm.running_var),
    "a buffer": lambda m: nudge(m.offset),
    "a buffer that is not saved": lambda m: nudge(m.hidden),
    "the softening of a norm": lambda m: setattr(m.norm, "eps", 1e-3),
    "the slope of an activation": lambda m: setattr(m.act, "negative_slope", 0.2),
    "another activation": lambda m: setattr(m, "act", nn.ReLU()),
    "a number in forward": lambda m: setattr(m, "shift", 0.25),
    "a setting that is not printed": lambda m: setattr(m.power, "exponent", 3),
    "another padding": lambda m: setattr(m.stem, "padding_mode", "reflect"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_changes_with(change: str) -> None:
    module = Rich()
    before = load_backbone(module, example=torch.zeros(2, 3, 8, 8)).source.weights
    CHANGES[change](module)
    assert load_backbone(module, example=torch.zeros(2, 3, 8, 8)).source.weights != before


def test_digest_does_not_depend_on_mode_gradients_or_the_example() -> None:
    module = Rich()
    before = load_backbone(module, example=torch.zeros(2, 3, 8, 8)).source.weights
    module.train().requires_grad_(False)
    assert load_backbone(module, example=torch.ones(5, 3, 8, 8)).source.weights == before


def test_names_and_shapes_of_tensors_count() -> None:
    one, other = nn.Module(), nn.Module()
    one.register_buffer("a", torch.zeros(4))
    other.register_buffer("a", torch.zeros(2, 2))
    third = nn.Module()
    third.register_buffer("b", torch.zeros(4))
    assert len({weights_digest(m, "") for m in (one, other, third)}) == 3


class Scaled(nn.Module):
    """A network that prepares its input itself."""

    def __init__(self, prepare: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.prepare, self.norm, self.conv = prepare, nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(self.norm(self.prepare(x)), (1, 1, 1, 1)))


MEANS, DEVIATIONS = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.mark.parametrize(
    ("prepare", "levels"),
    [
        (lambda x: x, False),
        (lambda x: (x - MEANS) / DEVIATIONS, False),
        (lambda x: x * 2 - 1, False),
        (lambda x: x / 255, True),
        (lambda x: x / 127.5 - 1, True),
        (lambda x: x[:, [2, 1, 0]] - torch.tensor([103.9, 116.8, 123.7]).view(3, 1, 1), True),
        (lambda x: (x - 255 * MEANS) / (255 * DEVIATIONS), True),
    ],
)
def test_a_network_that_scales_its_input_gets_what_it_scales(
    prepare: Callable[[torch.Tensor], torch.Tensor], levels: bool
) -> None:
    spec = stated_or_found(None, Scaled(prepare).eval(), (3, 16, 16))
    white = normalise(torch.full((1, 3, 16, 16), 255, dtype=torch.uint8), spec)
    assert float(white.max()) == pytest.approx(255 if levels else 1)
    stated = plain_spec(9, 9, 3)
    assert stated_or_found(stated, Scaled(prepare).eval(), (3, 16, 16)) is stated


def test_norms_on_the_input_tell_by_their_statistics() -> None:
    module = Scaled(lambda x: x).eval()
    module.norm.running_mean.fill_(120.0)
    module.norm.running_var.fill_(3600.0)
    assert stated_or_found(None, module, (3, 16, 16)).std == (1 / 255,) * 3


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    module = TinyNet()
    module.stage1.conv2.weight.data[0, 0] = float("nan")
    with pytest.raises(BackboneError, match=r"stage1\.conv2\.weight of module holds NaN"):
        load_backbone(module, example=EXAMPLE)


def test_a_module_whose_shapes_are_not_known_yet_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"1\.weight of module has none yet: run it on a batch once"):
        load_backbone(nn.Sequential(nn.ReLU(), nn.LazyConv2d(4, 3)), example=EXAMPLE)


class Parallel(nn.Module):
    """Two branches from the input to the output: nowhere is a single tensor alive."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(3, 4, 3), Parallel(), nn.Identity()], ids=["layer", "branches", "nothing"]
)
def test_a_network_that_cannot_be_cut_is_refused(module: nn.Module) -> None:
    with pytest.raises(CutError, match="must have a place between its layers"):
        load_backbone(module, example=EXAMPLE)


def test_a_file_of_weights_for_a_network_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    torch.save(Parallel().state_dict(), tmp_path / "parallel.pt")
    with pytest.raises(CutError, match=r"parallel\.pt has none"):
        load_backbone(str(tmp_path / "parallel.pt"), arch=f"{__name__}:Parallel")


def test_weights_of_the_default_network_are_taken_by_its_name_and_what_was_loaded_is_said_once_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_backbone("scratch", seed=3).module.state_dict()
    torch.save(weights, tmp_path / "own.pt")
    found = load_backbone(str(tmp_path / "own.pt"), arch="default")
    assert found.source.architecture == "tf_efficientnet_lite0"
    assert "loaded" in capsys.readouterr().err
    first = next(iter(weights))
    torch.save({**weights, first: weights[first] * float("nan")}, tmp_path / "nan.pt")
    with pytest.raises(BackboneError, match="must be finite"):
        load_backbone(str(tmp_path / "nan.pt"), arch="default")
    assert capsys.readouterr().err == ""


def test_what_is_neither_file_nor_folder_holds_no_weights() -> None:
    with pytest.raises(ReaderError, match="must be a file or a folder; /dev/zero is neither"):
        load_backbone("/dev/zero", arch="resnet18")
