"""Options that several commands share, with their help."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import click

from regraft.terminal import guarded

SPEC_HELP = (
    "default (EfficientNet-Lite0, ImageNet, no download), scratch (the same network with random weights, frozen), "
    "a timm name such as resnet50.a1_in1k, torchvision/NAME, hf/ORG/NAME, or a file: .pt .pth .pt2 .safetensors .keras "
    ".h5 .onnx .pb .npz .npy .msgpack, a TensorFlow checkpoint prefix, a SavedModel or Hugging Face folder, or a "
    "folder that regraft pretrain or fit made."
)
GROUP_HELP = (
    "Regular expression; pictures with the same first bracket, searched in the path inside the class folder, "
    "are never parted."
)
ARCH_HELP = (
    "The network that a file of weights belongs to: a timm name, torchvision/NAME, or package.module:function of yours."
)
MATCH_HELP = "Take only the parameters whose names in the new network match, whole path parts from the start."
RENAME_HELP = "A name part of the file and what it is called in the network; may be repeated."
LAYOUT_HELP = "How the file lays out kernels, instead of what its format says."
METHOD_HELP = (
    "autoencoder, denoising, masked, gan, rbm, contrastive, rotation: no labels; pairs: same or different, by class or "
    "--group; labels: another labelled task."
)
ARCH_TO_PRETRAIN_HELP = (
    "small (convolutional, for small pictures, the default), dense-500-250 (dense layers of these widths), a timm "
    "name, torchvision/NAME or package.module:function, with random weights."
)
VIEWS_HELP = "Any of crop, flip, light, erase, noise, or none. Default: all; for pairs and labels crop, flip, erase."
COVERAGE_HELP = "Least share of the parameters wanted that must be loaded."
ON_BAD_HELP = "What unreadable pictures mean: exit code 1 after all others are done, or nothing but a line each."
DEVICES = click.Choice(["auto", "cpu", "cuda"])


def _debug(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    context.obj = value
    return value


def shared(after_stop: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every command has: one-sentence errors, --json, --debug."""
    debug = {"is_flag": True, "expose_value": False, "callback": _debug, "help": "Show the traceback of an error."}

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option("--debug", **debug)(guarded(after_stop)(command))  # type: ignore[arg-type]
        return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(
            command
        )

    return wrap


def learning(command: Callable[..., None]) -> Callable[..., None]:
    """The options of the commands that learn."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Name the files that were passed over."),
        click.option("--allow-empty-class", is_flag=True, help="Keep the place of a class folder without pictures."),
        click.option("--strict", is_flag=True, help="Stop when a picture would be left out, or learned and tested."),
        click.option("--device", type=DEVICES, default="auto", show_default=True),
        click.option("--seed", default=0, show_default=True, help="Seed of the folds, and of `scratch`."),
        click.option("--group", metavar="REGEX", help=GROUP_HELP),
    ):
        command = option(command)
    return command


BUDGET_HELP = "Wall time of the whole run (90s, 5m, 2h), or how many candidates are tried beyond probes (20trials)."
AUGMENT_HELP = (
    "What training pictures are varied by: crop, flip, light; mix and noise of features; none. Default: crop, mix, and "
    "flip where mirrored pictures are answered as well."
)
FRAMING_HELP = "Also try pictures whole, and larger than the network states (default: yes)."
CLIP_HELP = "Gradient clipping: norm:LIMIT or value:LIMIT."


def tuning(command: Callable[..., None]) -> Callable[..., None]:
    """The options of fine-tuning."""
    for option in (
        click.option("--clip", "clipping", metavar="BY:LIMIT", default="norm:1", callback=_clipping, help=CLIP_HELP),
        click.option("--balanced", is_flag=True, help="In fine-tuning give every class the same say."),
        click.option("--augment", metavar="NAMES", callback=names_given, help=AUGMENT_HELP),
        click.option("--framing/--no-framing", default=True, help=FRAMING_HELP),
        click.option("--budget", default="10m", show_default=True, metavar="TIME|TRIALS", help=BUDGET_HELP),
    ):
        command = option(command)
    return command


def names_given(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    names = [name for name in (value or "").split(",") if name]
    if "none" in names and len(names) > 1:
        raise click.BadParameter(f"{value!r} names none beside others")
    return None if value is None else [name for name in names if name != "none"]


def _clipping(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, float]:
    by, _, limit = value.partition(":")
    with contextlib.suppress(ValueError):
        if by in ("norm", "value") and 0 < float(limit) < math.inf:
            return by, float(limit)
    raise click.BadParameter(f"{value!r} is not norm:LIMIT or value:LIMIT with a limit above 0")


WEIGHT_OPTIONS = ("arch", "match", "rename", "layout", "adapt", "min_coverage")


def weights(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how a file of weights fills a network."""
    for option in (
        click.option("--min-coverage", type=click.FloatRange(0, 1), default=1.0, help=COVERAGE_HELP),
        click.option("--adapt", is_flag=True, help="Fit the first kernel and position embeddings to another input."),
        click.option("--layout", type=click.Choice(["torch", "keras", "theano", "flax"]), help=LAYOUT_HELP),
        click.option("--rename", metavar="OLD=NEW", multiple=True, callback=_pairs, help=RENAME_HELP),
        click.option("--match", metavar="REGEX", help=MATCH_HELP),
        click.option("--arch", metavar="NAME", help=ARCH_HELP),
    ):
        command = option(command)
    return command


def _pairs(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    pairs = [tuple(one.partition("=")) for one in value]
    for one, (old, equals, _) in zip(value, pairs, strict=True):
        if not old or not equals:
            raise click.BadParameter(f"{one!r} is not of the form OLD=NEW")
    return {old: new for old, _, new in pairs}


def on_bad_option(command: Callable[..., None]) -> Callable[..., None]:
    choices = click.Choice(["fail", "skip"])
    return click.option("--on-bad", type=choices, default="fail", show_default=True, help=ON_BAD_HELP)(command)
