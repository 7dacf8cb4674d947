"""The frozen part of a network gives one fixed row of features per picture, whatever stands beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from regraft.backbone import Backbone, load_backbone
from regraft.errors import BackboneError
from regraft.frozen import (
    LARGEST_HALF,
    MAX_STORED,
    FrozenLower,
    NotFinite,
    agreement,
    channels_of,
    freeze_lower,
    parts_of,
    pooled,
    run_frozen,
)
from regraft.graph import Cut, trace
from regraft.numerics import Numerics, pick_numerics
from regraft.preprocess import plain_spec

FLOAT32 = Numerics("cpu", "float32", 8, "test")
BFLOAT16 = Numerics("cpu", "bfloat16", 8, "test")
EMULATED = Numerics("cpu", "bfloat16", 8, "test", emulated=True)
NETWORKS = ["default", "test_resnet", "test_vit", "test_convnext"]


@pytest.fixture(scope="module")
def backbone() -> Callable[[str], Backbone]:
    """Loads a backbone once; all but the default one have random weights."""
    known: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in known:
            known[name] = load_backbone() if name == "default" else random_network(name)
        return known[name]

    return get


def random_network(name: str) -> Backbone:
    """A timm network with seeded random weights and running statistics that are not those of its birth."""
    from regraft.networks import timm_networks

    module = timm_networks.create(name, pretrained=False)
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(layer.bias, 0, 0.1, generator=generator)
    spec = timm_networks.preprocess_of(module)
    return load_backbone(module, example=torch.zeros(2, spec.channels, *spec.size), preprocess=spec)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of torch; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pictures(n: int, size: tuple[int, int], *, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """Smooth noise with some texture, uint8 (n, channels, *size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    texture = torch.rand(n, channels, *size, generator=generator)
    return (255 * (0.8 * smooth + 0.2 * texture)).to(torch.uint8)


def frozen_of(found: Backbone, numerics: Numerics) -> FrozenLower:
    return freeze_lower(found.trace, [cut.name for cut in found.shown], found.preprocess, numerics)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    one, other = (torch.from_numpy(v).float().flatten(1) for v in (a, b))
    return float(nn.functional.cosine_similarity(one, other).min())


# --- neighbours ---


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_bit_equal_alone_in_any_batch_at_any_position_and_with_any_threads(
    name: str, precision: str, backbone: Callable[[str], Backbone], threads: Callable[[int], None]
) -> None:
    found = backbone(name)
    frozen = frozen_of(found, pick_numerics("cpu", precision))  # type: ignore[arg-type]
    batch = pictures(8, found.preprocess.size)
    threads(1)
    whole = run_frozen(frozen, batch)
    differing = 0
    for count in (1, 2, 4):
        threads(count)
        for chosen in ([5], [6, 0, 3], [7, 6, 5, 4, 3, 2, 1, 0]):
            for a, b in zip(whole, run_frozen(frozen, batch[chosen]), strict=True):
                differing += int((a[chosen] != b).any(axis=(1, 2)).sum())
    assert differing == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_picture_of_64_is_bit_equal_in_batches_of_every_size_up_to_64(
    name: str, precision: str, backbone: Callable[[str], Backbone], threads: Callable[[int], None]
) -> None:
    found = backbone(name)
    frozen = frozen_of(found, replace(pick_numerics("cpu", precision), batch=64))  # type: ignore[arg-type]
    batch = pictures(64, found.preprocess.size)
    whole = run_frozen(frozen, batch)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for count, n in ((1, 1), (2, 7), (4, 33), (2, 63), (4, 64), (1, 64)):
        threads(count)
        chosen = order[:n]
        for a, b in zip(whole, run_frozen(frozen, batch[chosen]), strict=True):
            assert np.array_equal(a[chosen.numpy()], b)


def test_more_pictures_than_the_fixed_batch_are_not_taken(backbone: Callable[[str], Backbone]) -> None:
    with pytest.raises(RuntimeError):
        run_frozen(frozen_of(backbone("test_resnet"), FLOAT32), torch.zeros(9, 3, 160, 160, dtype=torch.uint8))


# --- what the features are ---


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_pooled_values_of_the_network_itself(name: str, backbone: Callable[[str], Backbone]) -> None:
    """Folding, channels_last, padding and the way through float16 change nothing beyond rounding."""
    found = backbone(name)
    frozen = frozen_of(found, FLOAT32)
    batch = pictures(3, found.preprocess.size)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (found.preprocess.mean, found.preprocess.std))
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        found.module.get_submodule(cut.name).register_forward_hook(
            lambda layer, inputs, output, name=cut.name: seen.update({name: output.detach().clone()})
        )
        for cut in frozen.cuts
        if cut.name in dict(found.module.named_modules())
    ]
    with torch.no_grad():
        found.module((batch.float() / 255 - mean) / std)
    for hook in hooks:
        hook.remove()
    rows = dict(zip((cut.name for cut in frozen.cuts), run_frozen(frozen, batch), strict=True))
    assert len(seen) >= 4
    for cut, parts in zip(frozen.cuts, frozen.parts, strict=True):
        if cut.name in seen:
            expected = pooled(seen[cut.name], cut, parts)
            assert rows[cut.name].dtype == np.float16
            assert rows[cut.name].shape == expected.shape
            scale = float(expected.abs().max())
            assert np.abs(rows[cut.name].astype(np.float32) - expected.numpy()).max() < 1e-3 * scale


def cut_of(layout: str, shape: tuple[int, ...], *, prefix: int = 0) -> Cut:
    return Cut("a", (), 1, "a", shape, layout, prefix, True)  # type: ignore[arg-type]


def test_grid_of_a_map_with_channels_first_is_the_mean_of_each_cell() -> None:
    value = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    found = pooled(value, cut_of("NCHW", (3, 4, 6)), 4)
    cells = [value[:, :, r : r + 2, c : c + 3].mean((2, 3)) for r in (0, 2) for c in (0, 3)]
    assert torch.allclose(found, torch.stack(cells, 1))
    assert torch.allclose(pooled(value, cut_of("NCHW", (3, 4, 6)), 1)[:, 0], value.mean((2, 3)))


def test_grid_of_a_map_with_channels_last_is_that_of_the_same_map_with_channels_first() -> None:
    value = torch.randn(2, 3, 7, 7)
    first = pooled(value, cut_of("NCHW", (3, 7, 7)), 16)
    last = pooled(value.permute(0, 2, 3, 1), cut_of("NHWC", (7, 7, 3)), 16)
    assert first.shape == (2, 16, 3)
    assert torch.allclose(first, last)
    assert torch.allclose(first[:, 0], value[:, :, :2, :2].mean((2, 3)))  # of 7 rows in 4 cells the first takes two


def test_tokens_are_the_class_token_and_the_mean_of_those_that_are_places() -> None:
    value = torch.randn(2, 3 + 9, 5)
    with_class = pooled(value, cut_of("tokens", (12, 5), prefix=3), 2)
    assert torch.allclose(with_class, torch.stack([value[:, 0], value[:, 3:].mean(1)], 1))
    without = pooled(value, cut_of("tokens", (12, 5)), 1)
    assert torch.allclose(without, value.mean(1, keepdim=True))


def test_vector_is_kept_as_it_is_also_as_a_map_of_one_place() -> None:
    value = torch.randn(4, 7)
    assert torch.equal(pooled(value, cut_of("vector", (7,)), 1), value[:, None])


@pytest.mark.parametrize(
    ("layout", "shape", "prefix", "parts"),
    [
        ("NCHW", (256, 14, 14), 0, 16),
        ("NCHW", (257, 14, 14), 0, 4),
        ("NCHW", (1024, 7, 7), 0, 4),
        ("NCHW", (1025, 7, 7), 0, 1),
        ("NCHW", (5000, 7, 7), 0, 1),
        ("NHWC", (14, 14, 384), 0, 4),
        ("NHWC", (7, 7, 96), 0, 16),
        ("tokens", (197, 768), 1, 2),
        ("tokens", (201, 768), 5, 2),
        ("tokens", (196, 768), 0, 1),
        ("vector", (1280,), 0, 1),
        ("vector", (9000,), 0, 1),
    ],
)
def test_grid_is_the_largest_that_keeps_at_most_4096_values(
    layout: str, shape: tuple[int, ...], prefix: int, parts: int
) -> None:
    cut = cut_of(layout, shape, prefix=prefix)
    assert parts_of(cut) == parts
    assert parts == 1 or channels_of(cut) * parts <= MAX_STORED


# --- folding ---


@pytest.mark.parametrize("name", ["default", "test_resnet", "test_efficientnet", "resnet18"])
def test_folded_network_gives_what_the_network_gives_within_1e_5(
    name: str, backbone: Callable[[str], Backbone]
) -> None:
    from regraft.cut import lower_at

    found = backbone(name)
    cuts = [cut.name for cut in found.shown]
    frozen = freeze_lower(found.trace, cuts, found.preprocess, FLOAT32)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in frozen.module.modules()) == 0
    height, width = found.preprocess.size
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, folded = lower_at(found.trace, cuts).eval()(x), frozen.module(x)
    for a, b in zip(plain, folded, strict=True):
        assert float((a - b).abs().max()) < 1e-5 * float(a.abs().max())


def test_freezing_leaves_the_traced_network_bit_identical(backbone: Callable[[str], Backbone]) -> None:
    found = backbone("test_resnet")
    before = copy.deepcopy(found.module)
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = found.module(x)
    for numerics in (FLOAT32, BFLOAT16, EMULATED):
        run_frozen(frozen_of(found, numerics), pictures(2, (160, 160)))
    for (name, now), (_, then) in zip(
        [*found.module.named_parameters(), *found.module.named_buffers()],
        [*before.named_parameters(), *before.named_buffers()],
        strict=True,
    ):
        assert torch.equal(now, then), name
        assert now.requires_grad == then.requires_grad
        assert now.dtype == then.dtype
    assert [m.training for m in found.module.modules()] == [m.training for m in before.modules()]
    with torch.no_grad():
        assert torch.equal(found.module(x), expected)


def test_frozen_part_needs_no_gradients_and_is_silent_even_of_a_network_in_training_mode() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(1))
    traced = trace(module.train(), torch.zeros(2, 3, 8, 8))
    frozen = freeze_lower(traced, ["3"], plain_spec(8, 8, 3), FLOAT32)
    assert not any(p.requires_grad for p in frozen.module.parameters())
    assert not any(m.training for m in frozen.module.modules())
    first, second = (run_frozen(frozen, pictures(2, (8, 8))) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert module.training


def test_cut_between_a_layer_and_its_norm_keeps_the_value_before_the_norm() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1))
    for layer in (module[1], module[3]):
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    found = load_backbone(module, example=torch.zeros(2, 3, 9, 9))
    batch = pictures(2, (9, 9))
    apart = freeze_lower(found.trace, ["0", "3"], found.preprocess, FLOAT32)
    together = freeze_lower(found.trace, ["3"], found.preprocess, FLOAT32)
    with torch.no_grad():
        expected = pooled(found.module.get_submodule("0")(batch.float() / 255), apart.cuts[0], 16)
    assert np.allclose(run_frozen(apart, batch)[0], expected, atol=2e-3)
    assert np.allclose(run_frozen(apart, batch)[1], run_frozen(together, batch)[0], atol=2e-3)
    assert [cut.name for cut in apart.apart] == ["0"]
    assert together.apart == ()


# --- precision ---


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_features_point_where_float32_features_do(name: str, backbone: Callable[[str], Backbone]) -> None:
    found = backbone(name)
    batch = pictures(8, found.preprocess.size)
    exact, ours, emulated = (run_frozen(frozen_of(found, n), batch) for n in (FLOAT32, BFLOAT16, EMULATED))
    cosines = [cosine(a, b) for a, b in zip(ours, exact, strict=True)]
    between = [cosine(a, b) for a, b in zip(ours, emulated, strict=True)]
    print(f"{name}: with float32 at least {min(cosines):.4f}, with the emulation {min(between):.4f}")
    assert min(cosines) > 0.98
    assert min(between) > 0.995
    assert any((a != b).any() for a, b in zip(ours, exact, strict=True))


def test_agreement_is_the_least_cosine_and_one_for_float32(backbone: Callable[[str], Backbone]) -> None:
    found = backbone("test_resnet")
    cuts = [cut.name for cut in found.shown]
    assert agreement(found.trace, cuts, found.preprocess, FLOAT32) == pytest.approx(1, abs=1e-6)
    measured = agreement(found.trace, cuts, found.preprocess, BFLOAT16)
    assert 0.98 < measured < 1
    assert measured == agreement(found.trace, cuts, found.preprocess, BFLOAT16)


def test_attention_of_torch_itself_runs_in_bfloat16_and_emulated() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 8, 8)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    torch.manual_seed(0)
    found = load_backbone(Attending(), example=torch.zeros(2, 3, 32, 32))
    batch = pictures(4, (32, 32))
    exact, ours, emulated = (
        run_frozen(freeze_lower(found.trace, ["layer"], found.preprocess, n), batch)[0]
        for n in (FLOAT32, BFLOAT16, EMULATED)
    )
    assert cosine(ours, exact) > 0.99
    assert cosine(emulated, exact) > 0.99


# --- numbers that do not fit ---


class Broken(nn.Module):
    """A stem, and a stage that multiplies by a number and then divides by zero where the picture is black."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.stem, self.stage, self.factor = nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), factor
        nn.init.ones_(self.stem.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage(self.factor * self.stem(x))
        return (x / x).mean((2, 3))


def broken(factor: float, cuts: list[str]) -> FrozenLower:
    found = load_backbone(Broken(factor), example=torch.zeros(2, 3, 8, 8))
    return freeze_lower(found.trace, cuts, found.preprocess, FLOAT32)


def test_network_that_gives_nan_is_refused_with_the_cut_and_the_row() -> None:
    batch = torch.full((3, 3, 8, 8), 200, dtype=torch.uint8)
    batch[1] = 0
    frozen = broken(1.0, ["stage", "truediv"])
    with pytest.raises(NotFinite, match=r"at cut truediv must be finite; row 1") as caught:
        run_frozen(frozen, batch)
    assert (caught.value.cut, caught.value.row) == ("truediv", 1)
    assert isinstance(caught.value, BackboneError)
    assert np.array_equal(run_frozen(frozen, batch[::2])[1], np.ones((2, 16, 2), np.float16))


def test_padding_of_a_batch_cannot_spoil_it() -> None:
    """Rows of zeros fill up a batch; what a network makes of them is nobody's concern."""
    batch = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    assert np.isfinite(run_frozen(broken(1.0, ["truediv"]), batch)[0]).all()


def test_infinite_features_are_refused_and_large_ones_clipped_to_the_range_of_half_precision() -> None:
    batch = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert run_frozen(broken(1e6, ["stage"]), batch)[0].tolist() == [[[LARGEST_HALF] * 2] * 16]
    with pytest.raises(NotFinite, match="at cut stage must be finite; row 0"):
        run_frozen(broken(3e38, ["stage"]), batch)
