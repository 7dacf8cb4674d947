"""Fill a network with the weights of a file, and say what came of every parameter.

Tensors find their places by name or by shape and order (see `matching`), and come in the layout of the layer (see
`kernels`). Nothing is written into the network until everything is known to fit.

Knows modules and checkpoints, nothing of graphs or cuts.
"""

from __future__ import annotations

import copy
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import nn

from regraft.architecture import with_pictures
from regraft.errors import BackboneError, ReaderError
from regraft.kernels import Places, converted, flattened, with_input_channels, with_positions
from regraft.matching import COUNTER, Match, Offer, nearest, offers
from regraft.matching import match as matched
from regraft.operations import build
from regraft.printable import printable
from regraft.readers import Checkpoint, Layout, checkpoint_of, read_checkpoint

CHANNELS_LAST = ("keras", "flax")
LOADED = ("loaded", "renamed", "transposed")
SHOWN = 12


@dataclass(frozen=True)
class Row:
    """What came of one parameter or buffer, or of a tensor of the file that nothing took (`unexpected`).

    status: `loaded`, `renamed` (under another name), `transposed` (from another layout or size), `skipped by pattern`,
    `missing` or `shape mismatch`.
    """

    parameter: str
    status: str
    source: str
    detail: str = ""


@dataclass(frozen=True)
class Coverage:
    """The outcome for a whole network.

    by: `name`, or `order` where no name fitted and shapes in order did. chosen: names that had to be loaded.
    """

    path: str
    format: str
    by: str
    rows: tuple[Row, ...]
    chosen: frozenset[str]

    @property
    def loaded(self) -> frozenset[str]:
        """Parameters and buffers that hold what the file had."""
        return frozenset(row.parameter for row in self.rows if row.status in LOADED)

    @property
    def fresh(self) -> frozenset[str]:
        """Parameters and buffers that are as the network was made."""
        return frozenset(row.parameter for row in self.rows if row.parameter) - self.loaded

    @property
    def share(self) -> float:
        """Loaded share of what had to be loaded."""
        return len(self.chosen & self.loaded) / len(self.chosen) if self.chosen else 1.0

    def below(self, path: str) -> Coverage:
        """The same of a network that hangs at `path` in another one."""
        rows = tuple(replace(row, parameter=row.parameter and f"{path}.{row.parameter}") for row in self.rows)
        return replace(self, rows=rows, chosen=frozenset(f"{path}.{name}" for name in self.chosen))

    def to_json(self) -> dict[str, Any]:
        """Counts by status and the names of what was not loaded."""
        counts = Counter(row.status for row in self.rows)
        return {"by": self.by, "share": self.share, "counts": dict(counts), "fresh": sorted(self.fresh)}

    def __str__(self) -> str:
        counts = Counter(row.status for row in self.rows)
        listed = ", ".join(f"{n} {status}" for status, n in counts.most_common())
        lines = [f"{self.path} ({self.format}), matched by {self.by}: {listed}"]
        others = [row for row in self.rows if row.status not in LOADED]
        for row in others[:SHOWN]:
            lines.append(f"  {row.status:18} {row.parameter or row.source}{row.detail and ': ' + row.detail}")
        if len(others) > SHOWN:
            lines.append(f"  and {len(others) - SHOWN} more")
        return "\n".join(map(printable, lines))


def restore(
    module: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint,
    *,
    match: str | None = None,
    rename: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    example: torch.Tensor | None = None,
    flatten: Mapping[str, tuple[int, int, int]] | None = None,
    adapt: bool = False,
    min_coverage: float = 1.0,
    quiet: bool = False,
) -> Coverage:
    """Fill `module` in place with the weights of `source`, print the coverage and return it.

    source: a file of any framework (see `read_checkpoint`), a dict of arrays by name, or what was read of a file.
    match: regular expression of the parameters wanted, compared from the start of the new network's name with whole
        path parts: `hidden[123]` takes `hidden1.weight`, not `hidden10.weight`.
    rename: from path parts of the file's names to parts of the network's (`{"dense_1": "hidden1"}`), applied first.
    layout: how the file lays out kernels, instead of what its format says.
    example: a batch of pictures (n, channels, height, width) that the network takes: frameworks with channels last
        count what a dense layer reads in another order, which a run of a copy tells. Without it usual sizes are tried,
        and if none works, a square map is taken for granted.
    flatten: the (channels, height, width) that dense layers read, by path, instead of what such a run tells.
    adapt: fit the first kernel to another number of input channels, and position embeddings to another number of
        tokens.
    min_coverage: least share of the parameters wanted (without `match`: all but the last layer) that must be loaded.

    Raises ReaderError, with nothing changed, when less is loaded, and always when nothing is.
    """
    if layout is not None and layout not in get_args(Layout):
        raise ReaderError(f"The layout must be one of {', '.join(get_args(Layout))}; found {layout!r}.")
    if not 0 <= min_coverage <= 1:
        raise ReaderError(f"The least coverage must be a share from 0 to 1; found {min_coverage}.")
    checkpoint = source if isinstance(source, Checkpoint) else _checkpoint(source)
    offered = offers(checkpoint, rename or {})
    turned = _turned(checkpoint)
    told = layout or checkpoint.layout
    seen = _seen(module, told in CHANNELS_LAST or bool(turned), example)
    places = {**seen.places, **{path: Places(lengths) for path, lengths in (flatten or {}).items()}}
    fit = _Fit(module, module.state_dict(), told, places, adapt, turned)
    last = frozenset(name for name in fit.state if name.rpartition(".")[0] == seen.last)
    wanted = _wanted(fit, match)
    taken = matched(checkpoint.path, offered, wanted, fit, last)
    chosen = frozenset(wanted) if match else frozenset(wanted) - last
    coverage = Coverage(checkpoint.path, checkpoint.format, taken.by, _rows(fit, offered, wanted, taken), chosen)
    _check(coverage, fit, offered, min_coverage)
    _refuse_two_values(checkpoint.path, fit, taken)
    with torch.no_grad():
        for name, tensor in taken.fitting.items():
            fit.state[name].copy_(tensor)
    if not quiet:
        print(coverage, file=sys.stderr)
    return coverage


def _refuse_two_values(path: str, fit: _Fit, taken: Match) -> None:
    """Raise where tied parameters of the network would take tensors that differ."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in taken.fitting.items():
        other = first.setdefault(_memory(fit.state[name]), name)
        if other != name and not torch.equal(taken.fitting[other], tensor):
            raise ReaderError(
                f"{other} and {name} are one parameter of the network, and {path} has two values for them: choose one "
                "with --match."
            )


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern matches the name from its start up to the end of one of its parts."""
    parts = name.split(".")
    return any(re.fullmatch(pattern, ".".join(parts[:i])) for i in range(1, len(parts) + 1))


@dataclass(frozen=True)
class _Fit:
    """How tensors of a file become those of a module. turned: dense weights by their identity, see `_turned`."""

    module: nn.Module
    state: Mapping[str, torch.Tensor]
    layout: Layout
    places: Mapping[str, Places | None]
    adapt: bool
    turned: Mapping[int, Places]

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor as the parameter `name` wants it, None where its shape or kind does not fit."""
        target = self.state[name]
        path, _, own = name.rpartition(".")
        if target.is_floating_point() and not tensor.is_floating_point():
            return None
        owner = self.module.get_submodule(path)
        places = self.places.get(path)
        turned = self.turned.get(id(tensor))
        counts = turned is not None or self.layout in CHANNELS_LAST
        if counts and path in self.places and places is None and own == "weight":
            raise ReaderError(
                f"The order in which {path} reads the map before it must be known to take weights that were counted "
                f"with channels last, and no run told it: give example= or flatten={{{path!r}: (channels, height, "
                "width)}."
            )
        if turned is not None and places is not None and own == "weight" and isinstance(owner, nn.Linear):
            if turned.lengths != places.lengths:
                return None
            tensor = places.of(turned, tensor)
        found = converted(tensor, owner, own, self.layout, places)
        if found is not None and found.shape != target.shape and _is_line(found) and _is_line(target):
            found = found.reshape(target.shape) if found.numel() == target.numel() else found
        if found is not None and found.shape != target.shape and self.adapt:
            found = _adapted(found, target, owner is self.first and own == "weight")
        return found if found is not None and found.shape == target.shape else None

    @property
    def first(self) -> nn.Module | None:
        """The convolution that reads the pictures: the first one, if it is not grouped."""
        found = next((layer for layer in self.module.modules() if isinstance(layer, nn.Conv2d)), None)
        return found if found is not None and found.groups == 1 else None


@dataclass(frozen=True)
class _Seen:
    """What the network does with its layers.

    places: what dense layers read of a map, None where that cannot be told; last: path of the classifier, the last
    dense layer or convolution.
    """

    places: Mapping[str, Places | None]
    last: str


def _turned(checkpoint: Checkpoint) -> dict[int, Places]:
    """What dense layers of the file's own network read of a map that it turned before it flattened it, by weight.

    Frameworks with channels last count such a map in their own order, also where all else is said in torch's.
    """
    if checkpoint.operations is None:
        return {}
    steps = checkpoint.operations.steps
    if not any("permute" in (step.kind, step.options.get("function")) for step in steps):
        return {}
    network = build(checkpoint.operations, checkpoint.tensors)
    stated = checkpoint.input_shape
    try:
        run, shape = with_pictures(network, stated if stated and len(stated) == 3 and all(stated) else None)
    except BackboneError:
        return {}
    read = {f"{path}.weight": places for path, places in flattened(network, run, shape).items() if places}
    return {id(checkpoint.tensors[name]): places for name, places in read.items() if name in checkpoint.tensors}


def _seen(module: nn.Module, counts: bool, example: torch.Tensor | None) -> _Seen:
    """From a run of a copy where the order of a flattened map counts or an example is given, else from its layers."""
    layers = [(path, m) for path, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    dense = [path for path, m in layers if isinstance(m, nn.Linear)]
    registered = (dense or [path for path, _ in layers] or [""])[-1]
    if example is None and not counts:
        return _Seen({}, registered)
    copied = copy.deepcopy(module).eval()
    called: list[str] = []
    hooks = [
        copied.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
        for path, _ in layers
    ]
    try:
        run, shape = with_pictures(copied, tuple(example.shape[1:]) if example is not None else None)
    except BackboneError:
        return _Seen(_supposed(module) if counts else {}, registered)
    finally:
        for hook in hooks:
            hook.remove()
    return _Seen(flattened(copied, run, shape) if counts else {}, (called or [registered])[-1])


def _supposed(module: nn.Module) -> dict[str, Places | None]:
    """The first dense layer after convolutions: a square map counted as torch does, None where none is square."""
    channels = 0
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            channels = layer.out_channels
        elif isinstance(layer, nn.Linear) and channels:
            side = math.isqrt(layer.in_features // channels)
            square = side * side * channels == layer.in_features
            return {path: Places((channels, side, side)) if square else None}
    return {}


def _adapted(found: torch.Tensor, target: torch.Tensor, reads_pictures: bool) -> torch.Tensor | None:
    if (
        reads_pictures
        and found.dim() == 4
        and (found.shape[0], *found.shape[2:]) == (target.shape[0], *target.shape[2:])
    ):
        return with_input_channels(found, target.shape[1])
    if found.dim() == target.dim() == 3 and found.shape[0] == 1 and found.shape[2] == target.shape[2]:
        return with_positions(found, target.shape[1])
    return None


def _is_line(tensor: torch.Tensor) -> bool:
    """Whether at most one axis is longer than 1, so that no order could be lost."""
    return sum(size > 1 for size in tensor.shape) <= 1


def _checkpoint(source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any]) -> Checkpoint:
    if isinstance(source, str | os.PathLike):
        return read_checkpoint(os.fspath(source))
    return checkpoint_of(source)


def _wanted(fit: _Fit, match: str | None) -> list[str]:
    names = [name for name in fit.state if not name.endswith(COUNTER)]
    if match is None:
        return names
    try:
        wanted = [name for name in names if matches(match, name)]
    except re.error as e:
        raise ReaderError(f"The pattern of --match must be a regular expression; {match!r} is not: {e}.") from e
    if not wanted:
        raise ReaderError(
            "The pattern of --match must match a parameter of the new network from the start of its name, whole path "
            f"parts at a time; {match!r} matches none; nearest: {nearest(match, names)}."
        )
    return wanted


def _rows(fit: _Fit, offered: Sequence[Offer], wanted: Sequence[str], taken: Match) -> tuple[Row, ...]:
    by_source = {offer.name: offer for offer in offered}
    kept = set(wanted)
    rows = []
    loaded = {_memory(fit.state[name]): name for name in taken.fitting}
    for name, target in fit.state.items():
        if name.endswith(COUNTER):
            continue
        source = taken.sources.get(name, "")
        if name not in kept:
            rows.append(Row(name, "skipped by pattern", ""))
        elif name in taken.fitting:
            offer = by_source[source]
            found = taken.fitting[name]
            moved = found is not offer.tensor and not torch.equal(found, offer.tensor)
            status = "transposed" if moved else "loaded" if ".".join(offer.parts) == name else "renamed"
            rows.append(Row(name, status, source))
        elif source:
            read = f" read as {fit.layout}" if fit.layout != "torch" else ""
            theirs = by_source[source].tensor
            whole = " of whole numbers" if target.is_floating_point() and not theirs.is_floating_point() else ""
            shapes = f"{source} is {tuple(theirs.shape)}{whole}{read}, wanted {tuple(target.shape)}"
            rows.append(Row(name, "shape mismatch", source, shapes))
        elif _memory(target) in loaded:
            rows.append(Row(name, "loaded", taken.sources[loaded[_memory(target)]], "the same memory"))
        else:
            rows.append(Row(name, "missing", ""))
    used = set(taken.sources.values())
    return (*rows, *(Row("", "unexpected", offer.name) for offer in offered if offer.name not in used))


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """The same for tied weights alone."""
    return tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride()


def _check(coverage: Coverage, fit: _Fit, offered: Sequence[Offer], least: float) -> None:
    names = [".".join(offer.parts) for offer in offered]
    lost = sorted(coverage.chosen - coverage.loaded, key=list(fit.state).index)
    if not coverage.loaded:
        first = next(iter(lost or fit.state), None)
        if first is None:
            raise ReaderError("A network must have weights to take any; this one has none.")
        absent = f"{first} is not in it"
        reason = next((row.detail for row in coverage.rows if row.status == "shape mismatch"), absent)
        raise ReaderError(
            f"Something of {coverage.path} must fit the network, and nothing does: {reason}; nearest names there: "
            f"{nearest(first, names)}; give another --arch, or --rename OLD=NEW."
        )
    if coverage.share < least:
        row = next(row for row in coverage.rows if row.parameter == lost[0])
        what = row.detail or f"nearest names there: {nearest(lost[0], names)}"
        stored = {offer.name: offer.tensor for offer in offered}
        adaptable = (
            row.source and not fit.adapt and replace(fit, adapt=True)(row.parameter, stored[row.source]) is not None
        )
        raise ReaderError(
            f"{coverage.path} must hold {least:.0%} of the parameters wanted, and holds {coverage.share:.0%}: "
            f"{len(lost)} are not loaded, the first {lost[0]} ({row.status}; {what}); "
            f"{'fit it with --adapt' if adaptable else 'rename'}, choose with --match, or allow less with "
            "--min-coverage."
        )
