"""The contract of a cut, over many families of networks: lower and upper together are the network, bit for bit.

Weights are random, pictures are small and only some cuts of each network are tried; the slow tests try them all.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regraft.cut import lower_at, split
from regraft.errors import CutError
from regraft.graph import Cut, Trace, trace
from regraft.networks.torchvision_ops import declare_missing_operators

DROP = {"drop_rate": 0.5, "drop_path_rate": 0.5}


@dataclass(frozen=True, eq=False)
class Case:
    """A network to cut: `blocks` counts the residual or transformer blocks whose ends must be cuts.

    `other` is another size of picture that the network takes; `one_size` says that its cuts between tokens do not.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 32
    other: int | None = 64
    blocks: int = 0
    one_size: bool = False


CASES = (
    Case("resnet18", DROP, blocks=8),
    Case("resnet50", DROP, blocks=16),
    Case("tf_efficientnet_lite0", DROP, blocks=16),
    Case("efficientnet_b0", DROP, blocks=16),
    Case("densenet121", {"drop_rate": 0.5}, blocks=4),
    Case("inception_v3", {"drop_rate": 0.5}, size=80, other=112, blocks=11),
    Case("regnety_002", DROP, blocks=13),
    Case("mobilenetv2_100", DROP, blocks=17),
    Case("mobilenetv3_small_100", DROP, blocks=11),
    Case("ghostnet_100", {"drop_rate": 0.5}, blocks=16),
    Case("vgg11_bn", {"drop_rate": 0.5, "mlp_ratio": 0.01}, size=32, other=64),
    Case("repvgg_a0", {"drop_rate": 0.5}, blocks=22),
    Case("convnext_atto", DROP, blocks=12),
    Case("convnextv2_atto", DROP, blocks=12),
    Case("poolformer_s12", DROP, blocks=12),
    Case("edgenext_xx_small", DROP, blocks=12),
    Case("vit_tiny_patch16_224", {**DROP, "img_size": 64}, size=64, other=None, blocks=12),
    Case("deit_tiny_distilled_patch16_224", {**DROP, "img_size": 64}, size=64, other=None, blocks=12),
    Case("vit_small_patch14_reg4_dinov2", {**DROP, "img_size": 56, "depth": 4}, size=56, other=None, blocks=4),
    Case("cait_xxs24_224", {**DROP, "img_size": 64, "depth": 4}, size=64, other=None, blocks=4),
    Case("eva02_tiny_patch14_224", {**DROP, "img_size": 56, "depth": 4}, size=56, other=None, blocks=4),
    Case("swin_tiny_patch4_window7_224", {**DROP, "img_size": 64, "window_size": 4}, size=64, other=None, blocks=12),
    Case("coatnet_pico_rw_224", {**DROP, "img_size": 64}, size=64, other=None, blocks=12),
    Case("mixer_s32_224", {**DROP, "img_size": 64}, size=64, other=None, blocks=8),
    Case("pit_ti_224", {**DROP, "img_size": 64}, size=64, other=None, blocks=12),
    Case("pvt_v2_b0", DROP, blocks=8, one_size=True),
    Case("torchvision/resnet18", blocks=8),
    Case("torchvision/vit", size=64, other=None, blocks=3),
    Case("mlp", size=8, other=None),
    Case("skip", size=8, other=16),
)
MORE = (
    Case("xception41", DROP, blocks=13),
    Case("cspresnet50", DROP),
    Case("dla34", {"drop_rate": 0.5}),
    Case("mobilevit_xxs", DROP),
    Case("gmlp_ti16_224", {**DROP, "img_size": 64}, size=64, other=None, blocks=30),
    Case("rexnet_100", DROP, blocks=16),
    Case("fastvit_t8", DROP, blocks=12),
    Case("maxvit_rmlp_pico_rw_256", {**DROP, "img_size": 64}, size=64, other=None, blocks=8),
    Case("hrnet_w18_small", {"drop_rate": 0.5}),
    Case("levit_128s", {"drop_rate": 0.5}, size=224, other=None, blocks=9),
    Case("xcit_nano_12_p16_224", {**DROP, "img_size": 64}, size=64, other=96, blocks=14, one_size=True),
    Case("twins_svt_small", {**DROP, "img_size": 64}, size=64, other=96, blocks=18, one_size=True),
    Case("volo_d1_224", DROP, size=224, other=None, blocks=2),
)
every_network = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_network_slowly = pytest.mark.parametrize("case", CASES + MORE, ids=lambda case: case.name)


class Skip(nn.Module):
    """A skip connection, and noise that obeys the mode of the outermost module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.first(x), 0.5, self.training)
        x = x + self.norm(self.second(x))
        x += 1
        x = self.act(x)
        return self.head(F.dropout(x.mean((2, 3)), 0.5, training=self.training))


@functools.cache
def traced(case: Case) -> Trace:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = build(case)
    with torch.no_grad():
        for p in module.parameters():
            if bool((p == p.flatten()[0]).all()):  # a layer that starts at 0 would hide all below it
                p.add_(torch.randn_like(p), alpha=0.1)
    return trace(module, torch.zeros(1, 3, case.size, case.size))


def build(case: Case) -> nn.Module:
    if case.name == "skip":
        return Skip()
    if case.name == "mlp":
        hidden = [nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Dropout(0.5), nn.Linear(16, 2))
    declare_missing_operators()
    if case.name == "torchvision/resnet18":
        from torchvision import models

        return models.resnet18(weights=None, num_classes=5)
    if case.name == "torchvision/vit":
        from torchvision.models import VisionTransformer

        return VisionTransformer(64, 16, 3, 2, 32, 64, dropout=0.5, num_classes=5)
    import timm

    return timm.create_model(case.name, num_classes=5, **case.options)


def some(cuts: tuple[Cut, ...], n: int) -> list[Cut]:
    """About n shown cuts, spread over the depth, and one that is not shown."""
    shown, others = [c for c in cuts if c.shown], [c for c in cuts if not c.shown]
    return [*shown[len(shown) // (2 * n) :: max(1, len(shown) // n)][:n], *others[len(others) // 2 :][:1]]


def pictures(case: Case, batch: int, size: int | None = None) -> torch.Tensor:
    side = size or case.size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


@every_network
def test_lower_and_upper_give_what_the_network_gives(case: Case) -> None:
    check_evaluation(case, traced(case), some(traced(case).cuts, 2))


@every_network
def test_training_in_two_parts_is_training_the_network(case: Case) -> None:
    check_training(case, traced(case), some(traced(case).cuts, 1))


@every_network
def test_a_network_falls_apart_after_every_block(case: Case) -> None:
    check_counts(case, traced(case))


@pytest.mark.parametrize("case", [case for case in CASES if case.other], ids=lambda case: case.name)
def test_parts_take_pictures_of_another_size(case: Case) -> None:
    check_other_size(case, traced(case), some(traced(case).cuts, 1))


@pytest.mark.slow
@every_network_slowly
def test_every_cut_keeps_the_contract(case: Case) -> None:
    cuts = list(traced(case).cuts)
    check_counts(case, traced(case))
    check_evaluation(case, traced(case), cuts)
    check_training(case, traced(case), [c for c in cuts if c.shown or c.depth % 5 == 0])
    if case.other:
        check_other_size(case, traced(case), cuts)


def check_evaluation(case: Case, network: Trace, cuts: list[Cut]) -> None:
    whole = network.module.eval()
    stack = lower_at(network, [cut.name for cut in cuts]).eval()
    parts = [[part.eval() for part in split(network, cut.name)] for cut in cuts]
    for batch in (1, 3):
        x = pictures(case, batch)
        with torch.no_grad():
            y, values = whole(x), stack(x)
            for cut, (lower, upper), value in zip(cuts, parts, values, strict=True):
                h = lower(x)
                assert tuple(h.shape) == (batch, *cut.shape)
                assert torch.equal(value, h), cut.name
                assert torch.equal(upper(h), y), cut.name
                assert torch.equal(value, h), cut.name
                if batch == 1:
                    assert torch.equal(upper(h), y), cut.name


def check_training(case: Case, network: Trace, cuts: list[Cut]) -> None:
    """Outputs, gradients and running statistics of one step from the same random state."""
    x, start = pictures(case, 3), copy.deepcopy(network.module.state_dict())
    whole = copy.deepcopy(network.module).train()
    y, again = passed(whole, x, 1), passed(copy.deepcopy(whole), x, 2)
    assert torch.equal(y, again) == (not is_noisy(whole))
    y.square().sum().backward()
    try:
        for cut in cuts:
            lower, upper = (part.train() for part in split(network, cut.name))
            z = passed(lambda x, lower=lower, upper=upper: upper(lower(x)), x, 1)
            assert torch.equal(z, y), cut.name
            z.square().sum().backward()
            for (name, p), q in zip(network.module.named_parameters(), whole.parameters(), strict=True):
                assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), (cut.name, name)
            for (name, b), c in zip(network.module.named_buffers(), whole.buffers(), strict=True):
                assert torch.equal(b, c), (cut.name, name)
            lower.eval(), upper.eval()
            assert torch.equal(passed(upper, passed(lower, x, 1), 1), passed(upper, passed(lower, x, 2), 2)), cut.name
            network.module.zero_grad(set_to_none=True)
            network.module.load_state_dict(start)
    finally:
        network.module.load_state_dict(start)
        network.module.zero_grad(set_to_none=True)


def passed(part: Any, x: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return part(x)


def is_noisy(module: nn.Module) -> bool:
    return isinstance(module, Skip) or any(
        getattr(m, "p", 0) == 0.5 or getattr(m, "drop_prob", 0) or getattr(m, "drop_rate", 0) for m in module.modules()
    )


def check_other_size(case: Case, network: Trace, cuts: list[Cut]) -> None:
    x = pictures(case, 2, case.other)
    with torch.no_grad():
        y = network.module.eval()(x)
        for cut in cuts:
            lower, upper = (part.eval() for part in split(network, cut.name))
            if case.one_size and cut.layout != "vector" and "keeps to the picture size" in refusal(upper, lower(x)):
                continue
            assert torch.equal(upper(lower(x)), y), cut.name


def refusal(upper: nn.Module, h: torch.Tensor) -> str:
    try:
        upper(h)
    except CutError as e:
        return str(e)
    return ""


def check_counts(case: Case, network: Trace) -> None:
    names = [name for cut in network.cuts for name in (cut.name, *cut.aliases)]
    shown = [cut for cut in network.cuts if cut.shown]
    blocks = [cut for cut in network.cuts if any(is_block(network.module, name) for name in (cut.name, *cut.aliases))]
    print(f"{case.name:34s} cuts {len(network.cuts):4d}   shown {len(shown):3d}   blocks {len(blocks):3d}")
    assert len(set(names)) == len(names)
    assert [cut.depth for cut in network.cuts] == list(range(1, len(network.cuts) + 1))
    assert len(blocks) >= case.blocks
    assert min(10, len([c for c in network.cuts if not is_dropout(network.module, c)])) <= len(shown) <= 25
    if len(blocks) <= 20:
        assert all(cut.shown for cut in blocks)


def is_block(module: nn.Module, path: str) -> bool:
    """A block by the names that the authors of these networks gave."""
    kind = class_name(module, path)
    parts = ("Block", "Bottleneck", "InvertedResidual", "DepthwiseSeparableConv", "Inception", "XceptionModule")
    return any(part in kind for part in parts)


def is_dropout(module: nn.Module, cut: Cut) -> bool:
    return "drop" in (class_name(module, cut.name) or cut.name).lower()


def class_name(module: nn.Module, path: str) -> str:
    modules = dict(module.named_modules())
    return type(modules[path]).__name__ if path in modules else ""
