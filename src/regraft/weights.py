"""Fill a network with the weights of a file, by name or by shape and order, and say what came of every parameter.

Names are compared part by part after the usual differences between frameworks are evened out (`kernel` is `weight`,
`gamma` is `weight`, `moving_mean` is `running_mean`; prefixes such as `module.`). Nothing is written into the network
until everything is known to fit.

Knows modules and checkpoints, nothing of graphs or cuts. Not covered: weights that one framework splits and another
joins (attention projections), except where a rename says how.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.architecture import with_pictures
from regraft.errors import BackboneError, ReaderError
from regraft.kernels import Places, converted, flattened, with_input_channels, with_positions
from regraft.readers import Checkpoint, Layout, read_checkpoint

LEAVES = {
    **dict.fromkeys(("kernel", "gamma", "scale", "embeddings", "embedding", "depthwise_kernel", "alpha"), "weight"),
    **dict.fromkeys(("W", "w", "weights"), "weight"),
    **dict.fromkeys(("beta", "b", "biases"), "bias"),
    **dict.fromkeys(("moving_mean", "mean"), "running_mean"),
    **dict.fromkeys(("moving_variance", "var"), "running_var"),
}
"""What other frameworks call the tensors of a layer."""
COLLECTIONS = ("params", "batch_stats")
PREFIXES = ("module", "model", "backbone", "encoder", "net", "network", "_orig_mod", "student", "teacher", "base_model")
CHANNELS_LAST = ("keras", "flax")
LOADED = ("loaded", "renamed", "transposed")
COUNTER = "num_batches_tracked"
NAMED = 3
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
        return len(self.chosen & self.loaded) / max(1, len(self.chosen))

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
        return "\n".join(lines)


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
    checkpoint = _checkpoint(source)
    offered = _renamed(checkpoint, rename or {})
    kind = layout or checkpoint.layout
    places = {path: Places(lengths) for path, lengths in (flatten or {}).items()}
    fit = _Fit(module, module.state_dict(), kind, {**_places(module, kind, example), **places}, adapt)
    wanted = _wanted(fit, match)
    taken, by = _by_name(fit, offered, wanted), "name"
    if not taken.fitting and (in_order := _by_order(fit, offered, wanted)):
        taken, by = in_order, "order"
    coverage = _coverage(checkpoint, fit, offered, wanted, taken, by, match)
    _check(coverage, fit, offered, taken, min_coverage)
    with torch.no_grad():
        for name, tensor in taken.fitting.items():
            fit.state[name].copy_(tensor)
    if not quiet:
        print(coverage, file=sys.stderr)
    return coverage


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern matches the name from its start up to the end of one of its parts."""
    parts = name.split(".")
    return any(re.fullmatch(pattern, ".".join(parts[:i])) for i in range(1, len(parts) + 1))


Offered = dict[tuple[str, ...], tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Taken:
    """For names of the network: what the file calls them, and the tensors that fit."""

    sources: Mapping[str, str]
    fitting: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Fit:
    """How tensors of a file become those of a module."""

    module: nn.Module
    state: Mapping[str, torch.Tensor]
    layout: Layout
    places: Mapping[str, Places | None]
    adapt: bool

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor as the parameter `name` wants it, None where its shape or kind does not fit."""
        target = self.state[name]
        path, _, own = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if target.is_floating_point() and not tensor.is_floating_point():
            return None
        places = self.places.get(path)
        if path in self.places and places is None and own == "weight":
            raise ReaderError(
                f"The order in which {path} reads the map before it must be known to take weights of layout "
                f"{self.layout}, and no run told it: give example= or flatten={{{path!r}: (channels, height, width)}}."
            )
        found = converted(tensor, owner, own, self.layout, places)
        if found.shape != target.shape and _squeezed(found) == _squeezed(target):
            found = found.reshape(target.shape)
        if found.shape != target.shape and self.adapt:
            found = _adapted(found, target)
        return found if found.shape == target.shape else None


def _places(module: nn.Module, layout: Layout, example: torch.Tensor | None) -> dict[str, Places | None]:
    """For dense layers that read a flattened map: its places; None where they cannot be told."""
    if layout not in CHANNELS_LAST:
        return {}
    copied = copy.deepcopy(module).eval()
    try:
        run, shape = with_pictures(copied, tuple(example.shape[1:]) if example is not None else None)
    except BackboneError:
        return _supposed(module)
    return flattened(copied, run, shape)


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


def _adapted(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    same = found.dim() == target.dim()
    if same and found.dim() == 4 and (found.shape[0], *found.shape[2:]) == (target.shape[0], *target.shape[2:]):
        return with_input_channels(found, target.shape[1])
    if same and found.dim() == 3 and found.shape[0] == 1 and found.shape[2] == target.shape[2]:
        resampled = with_positions(found, target.shape[1])
        return found if resampled is None else resampled
    return found


def _squeezed(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size != 1)


def _checkpoint(source: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        tensors = {str(k): torch.as_tensor(np.asarray(v)) if not torch.is_tensor(v) else v for k, v in source.items()}
        return Checkpoint("the given arrays", "arrays", tensors)
    return read_checkpoint(os.fspath(source))


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a source name in the network's words, without collection names and output numbers."""
    parts = [part for part in re.split(r"[./]", re.sub(r":\d+$", "", name)) if part]
    if len(parts) > 1 and parts[0] in COLLECTIONS:
        parts = parts[1:]
    return (*parts[:-1], LEAVES.get(parts[-1], parts[-1])) if parts else ("",)


def _renamed(checkpoint: Checkpoint, rename: Mapping[str, str]) -> Offered:
    """The tensors by name as the network would say it, after renaming, with the name that the file has."""
    offered: Offered = {}
    used: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        parts = _parts(name)
        if parts[-1] == COUNTER:
            continue
        for old, new in rename.items():
            old_parts = tuple(part for part in re.split(r"[./]", old) if part)
            for i in range(len(parts) - len(old_parts) + 1):
                if parts[i : i + len(old_parts)] == old_parts:
                    parts = (*parts[:i], *(p for p in re.split(r"[./]", new) if p), *parts[i + len(old_parts) :])
                    used.add(old)
                    break
        if parts in offered:
            both = f"{offered[parts][0]} and {name} both become {'.'.join(parts)}"
            raise ReaderError(f"Names in {checkpoint.path} must stay apart; {both}.")
        offered[parts] = (name, tensor)
    for old in rename.keys() - used:
        near = difflib.get_close_matches(
            old, {p for name in checkpoint.tensors for p in re.split(r"[./]", name)}, NAMED
        )
        raise ReaderError(
            f"A name to rename must be in {checkpoint.path}; {old!r} is not; nearest: {', '.join(near) or 'none'}."
        )
    return offered


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
            f"parts at a time; {match!r} matches none; nearest: {_nearest(match, names)}."
        )
    return wanted


def _by_name(fit: _Fit, offered: Offered, wanted: Sequence[str]) -> _Taken:
    """What is taken by name, with the repair of prefixes that makes most tensors fit."""
    best = _Taken({}, {})
    for strip in _prefixes(offered):
        shortened = {parts[len(strip) :] if parts[: len(strip)] == strip else parts: v for parts, v in offered.items()}
        for add in _prefixes([tuple(name.split(".")) for name in wanted]):
            sources, fitting = {}, {}
            for name in wanted:
                parts = tuple(name.split("."))
                found = shortened.get(parts[len(add) :] if parts[: len(add)] == add else parts)
                if found:
                    sources[name] = found[0]
                    tensor = fit(name, found[1])
                    if tensor is not None:
                        fitting[name] = tensor
            if (len(fitting), len(sources)) > (len(best.fitting), len(best.sources)):
                best = _Taken(sources, fitting)
    return best


def _prefixes(names: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Parts in front of names that may be left out, shortest first: usual ones, and those that all names share."""
    listed = list(names)
    found: dict[tuple[str, ...], None] = {(): None}
    for depth in (1, 2, 3):
        heads = Counter(parts[:depth] for parts in listed if len(parts) > depth)
        for head, count in heads.items():
            if count == len(listed) or (head[-1] in PREFIXES and head[:-1] in found):
                found[head] = None
    return list(found)


def _by_order(fit: _Fit, offered: Offered, wanted: Sequence[str]) -> _Taken | None:
    """All tensors in order, or those of the one network in the file that fits where it holds several."""
    networks: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in offered.values():
        networks.setdefault(re.split(r"[./]", name)[0], []).append((name, tensor))
    found = [_in_order(fit, tensors, wanted) for tensors in (list(offered.values()), *networks.values())]
    fitting = [taken for taken in found if taken]
    return fitting[0] if fitting and all(taken == fitting[0] for taken in fitting) else None


def _in_order(fit: _Fit, tensors: Sequence[tuple[str, torch.Tensor]], wanted: Sequence[str]) -> _Taken | None:
    """Tensors in order, if there are as many as wanted and each fits its place, the last layer perhaps not."""
    if len(tensors) != len(wanted):
        return None
    last = _last_layer(fit)
    sources, fitting = {}, {}
    for name, (source, tensor) in zip(wanted, tensors, strict=True):
        found = fit(name, tensor)
        if found is None and name not in last:
            return None
        sources[name] = source
        if found is not None:
            fitting[name] = found
    return _Taken(sources, fitting) if fitting else None


def _last_layer(fit: _Fit) -> frozenset[str]:
    """Names of the tensors of the last dense layer or convolution: the classifier of the source task."""
    layers = [path for path, layer in fit.module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return frozenset(name for name in fit.state if layers and name.rpartition(".")[0] == layers[-1])


def _coverage(
    checkpoint: Checkpoint,
    fit: _Fit,
    offered: Offered,
    wanted: Sequence[str],
    taken: _Taken,
    by: str,
    match: str | None,
) -> Coverage:
    kept = set(wanted)
    rows = []
    for name, target in fit.state.items():
        if name.endswith(COUNTER):
            continue
        source = taken.sources.get(name, "")
        if name not in kept:
            rows.append(Row(name, "skipped by pattern", ""))
        elif name in taken.fitting:
            stored = checkpoint.tensors[source]
            moved = taken.fitting[name].shape != stored.shape or not torch.equal(taken.fitting[name], stored)
            status = "transposed" if moved else "loaded" if ".".join(_parts(source)) == name else "renamed"
            rows.append(Row(name, status, source))
        elif source:
            read = f" read as {fit.layout}" if fit.layout != "torch" else ""
            shapes = f"{source} is {tuple(checkpoint.tensors[source].shape)}{read}, wanted {tuple(target.shape)}"
            rows.append(Row(name, "shape mismatch", source, shapes))
        else:
            rows.append(Row(name, "missing", ""))
    used = set(taken.sources.values())
    rows += [Row("", "unexpected", source) for source, _ in offered.values() if source not in used]
    chosen = kept if match else kept - _last_layer(fit)
    return Coverage(checkpoint.path, checkpoint.format, by, tuple(rows), frozenset(chosen))


def _check(coverage: Coverage, fit: _Fit, offered: Offered, taken: _Taken, least: float) -> None:
    names = [".".join(parts) for parts in offered]
    lost = sorted(coverage.chosen - coverage.loaded, key=list(fit.state).index)
    if not coverage.loaded:
        first = lost[0] if lost else next(iter(fit.state))
        absent = f"{first} is not in it"
        reason = next((row.detail for row in coverage.rows if row.status == "shape mismatch"), absent)
        raise ReaderError(
            f"Something of {coverage.path} must fit the network, and nothing does: {reason}; nearest names there: "
            f"{_nearest(first, names)}; give another --arch, or --rename OLD=NEW."
        )
    if coverage.share < least:
        row = next(row for row in coverage.rows if row.parameter == lost[0])
        what = row.detail or f"nearest names there: {_nearest(lost[0], names)}"
        raise ReaderError(
            f"{coverage.path} must hold {least:.0%} of the parameters wanted, and holds {coverage.share:.0%}: "
            f"{len(lost)} are not loaded, the first {lost[0]} ({row.status}; {what}); rename, choose with --match, or "
            "allow less with --min-coverage."
        )


def _nearest(name: str, names: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(names), NAMED, cutoff=0.0)) or "none"
