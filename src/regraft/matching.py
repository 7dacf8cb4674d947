"""Which tensor of a file belongs to which of a network: by name, or else by shape and order.

Names are compared part by part, as they stand and after the usual differences between frameworks are evened out
(`kernel` is `weight`, `gamma` is `weight`, `moving_mean` is `running_mean`; prefixes such as `module.`). What could be
meant in two ways is refused.

Knows names and whether a tensor fits a place, nothing of layouts or of modules. Not covered: weights that one framework
splits and another joins (attention projections), except where a rename says how.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from regraft.errors import ReaderError
from regraft.readers import Checkpoint

LEAVES = {
    **dict.fromkeys(("kernel", "gamma", "scale", "embeddings", "embedding", "depthwise_kernel", "alpha"), "weight"),
    **dict.fromkeys(("W", "w", "weights"), "weight"),
    **dict.fromkeys(("beta", "b", "biases", "offset"), "bias"),
    **dict.fromkeys(("moving_mean", "mean"), "running_mean"),
    **dict.fromkeys(("moving_variance", "var"), "running_var"),
}
"""What other frameworks call the tensors of a layer."""
KNOWN_LEAVES = frozenset(LEAVES.values())
COLLECTIONS = ("params", "batch_stats")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile and others put in between, anywhere in a name."""
PREFIXES = ("module", "model", "backbone", "encoder", "net", "network", "student", "teacher", "base_model")
PREFERRED = (("teacher", "student"), ("encoder_q", "encoder_k"), ("online", "target"), ("online", "momentum"))
"""Of two networks that fit equally well, the one that is meant to be used on: DINO, MoCo, BYOL."""
COUNTER = "num_batches_tracked"
NAMED = 3

Parts = tuple[str, ...]
Fits = Callable[[str, torch.Tensor], torch.Tensor | None]
"""The tensor as the parameter of this name wants it, None where it does not fit."""


@dataclass(frozen=True)
class Offer:
    """A tensor of a file, the file's name for it, the parts of that after renaming, and those in torch's words."""

    name: str
    raw: Parts
    parts: Parts
    tensor: torch.Tensor


@dataclass(frozen=True)
class Match:
    """For names of the network: what the file calls them, and the tensors that fit; by: `name` or `order`."""

    sources: Mapping[str, str]
    fitting: Mapping[str, torch.Tensor]
    by: str = "name"


def offers(checkpoint: Checkpoint, rename: Mapping[str, str]) -> tuple[Offer, ...]:
    """The tensors of a file after renaming, without counters of batches.

    rename: from path parts of the file's names to parts of the network's, each applied to the file's own names, the
    longest first. Raises ReaderError for a part that no name has, and for names that become the same.
    """
    split = {name: _split(name) for name in checkpoint.tensors}
    wanted = sorted(((_split(old), _split(new), old) for old, new in rename.items()), key=lambda r: -len(r[0]))
    found: dict[Parts, Offer] = {}
    used: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        if split[name] and split[name][-1] == COUNTER:
            continue
        raw = _renamed(split[name], wanted, used)
        if raw in found:
            both = f"{found[raw].name} and {name} both become {'.'.join(raw)}"
            raise ReaderError(f"Names in {checkpoint.path} must stay apart; {both}.")
        found[raw] = Offer(name, raw, _in_words_of_torch(raw), tensor)
    for old in rename.keys() - used:
        parts = {part for one in split.values() for part in one}
        raise ReaderError(
            f"A name to rename must be in {checkpoint.path}; {old!r} is not; nearest: {nearest(old, parts)}."
        )
    return tuple(found.values())


def match(origin: str, offered: Sequence[Offer], wanted: Sequence[str], fits: Fits, last: frozenset[str]) -> Match:
    """What is taken for each wanted name: by name where anything fits so, else by order.

    last: names of the classifier, whose shape may differ. Raises ReaderError where two parts of the file fit equally.
    """
    by_name = _by_name(origin, offered, wanted, fits)
    if by_name.fitting:
        return by_name
    return _by_order(offered, wanted, fits, last) or by_name


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like this one, for a sentence."""
    return ", ".join(difflib.get_close_matches(name, list(names), NAMED, cutoff=0.0)) or "none"


def _split(name: str) -> Parts:
    return tuple(p for p in re.split(r"[./]", re.sub(r":\d+$", "", name)) if p and p not in WRAPPERS)


def _in_words_of_torch(raw: Parts) -> Parts:
    parts = raw[1:] if len(raw) > 1 and raw[0] in COLLECTIONS else raw
    return (*parts[:-1], LEAVES.get(parts[-1], parts[-1])) if parts else ()


def _renamed(parts: Parts, wanted: Sequence[tuple[Parts, Parts, str]], used: set[str]) -> Parts:
    """The parts with every run of them that is renamed replaced; what came of one rename is not renamed again."""
    out: list[str] = []
    at = 0
    while at < len(parts):
        for old, new, spelt in wanted:
            if old and parts[at : at + len(old)] == old:
                out.extend(new)
                at += len(old)
                used.add(spelt)
                break
        else:
            out.append(parts[at])
            at += 1
    return tuple(out)


# --- by name ---


def _by_name(origin: str, offered: Sequence[Offer], wanted: Sequence[str], fits: Fits) -> Match:
    """What is taken by name, with the repair of prefixes that makes most tensors fit; none where it is as good."""
    tried: list[tuple[Parts, Match]] = []
    names = [tuple(name.split(".")) for name in wanted]
    for strip in _prefixes([offer.raw for offer in offered], names):
        table = _Table(origin, offered, strip)
        tried += [(strip, table.match(wanted, add, fits)) for add in _prefixes(names, [])]
    most = max(_worth(found) for _, found in tried)
    best = [(strip, found) for strip, found in tried if _worth(found) == most]
    strip, chosen = best[0]
    if not strip or not chosen.fitting:
        return chosen
    for other, found in best[1:]:
        if found.sources != chosen.sources and not _equal(found, chosen):
            if _preferred(other, strip):
                strip, chosen = other, found
            elif not _preferred(strip, other):
                both = f"{'.'.join(strip)} and those under {'.'.join(other)}"
                raise ReaderError(
                    f"The weights in {origin} must fit in one way; those under {both} both do: choose with "
                    f"--rename {'.'.join(strip)}=."
                )
    return chosen


def _worth(found: Match) -> tuple[int, int]:
    return len(found.fitting), len(found.sources)


def _equal(a: Match, b: Match) -> bool:
    return a.fitting.keys() == b.fitting.keys() and all(torch.equal(t, b.fitting[n]) for n, t in a.fitting.items())


def _preferred(one: Parts, other: Parts) -> bool:
    """Whether the first prefix is meant to be used rather than the other, as a word of it says."""
    return any(
        any(word in part for part in one) and any(less in part for part in other) and not any(less in p for p in one)
        for word, less in PREFERRED
    )


class _Table:
    """The tensors of a file by name, a prefix taken off: the name as it stands, and in torch's words."""

    def __init__(self, origin: str, offered: Sequence[Offer], strip: Parts) -> None:
        self._origin = origin
        self._raw: dict[Parts, Offer] = {}
        self._words: dict[Parts, list[Offer]] = {}
        inside = [offer for offer in offered if offer.raw[: len(strip)] == strip]
        outside = [offer for offer in offered if strip and offer.raw[: len(strip)] != strip]
        for offer in inside:
            rest = offer.raw[len(strip) :]
            self._raw[rest] = offer
            self._words.setdefault(_in_words_of_torch(rest), []).append(offer)
        for offer in outside:  # what stands beside the network gives way to what is inside it
            if offer.raw not in self._raw and offer.parts not in self._words:
                self._raw[offer.raw] = offer
                self._words[offer.parts] = [offer]

    def match(self, wanted: Sequence[str], add: Parts, fits: Fits) -> Match:
        """What there is for each name, `add` taken off it where it has it."""
        sources, fitting = {}, {}
        for name in wanted:
            parts = tuple(name.split("."))
            offer = self._offer(parts[len(add) :] if parts[: len(add)] == add else parts)
            if offer is None:
                continue
            sources[name] = offer.name
            tensor = fits(name, offer.tensor)
            if tensor is not None:
                fitting[name] = tensor
        return Match(sources, fitting)

    def _offer(self, parts: Parts) -> Offer | None:
        if parts in self._raw:
            return self._raw[parts]
        same = self._words.get(parts) or self._words.get(_in_words_of_torch(parts)) or []
        if len(same) > 1:
            both = f"{same[0].name} and {same[1].name} both become {'.'.join(parts)}"
            raise ReaderError(f"Names in {self._origin} must stay apart; {both}: use --rename OLD=NEW.")
        return same[0] if same else None


def _prefixes(names: Sequence[Parts], others: Sequence[Parts]) -> list[Parts]:
    """Parts in front of names that may be left out: none, usual ones, those that all names share, and those in front of
    one of the first of the other names.
    """
    found: dict[Parts, None] = {(): None}
    for depth in (1, 2, 3):
        heads = Counter(parts[:depth] for parts in names if len(parts) > depth)
        for head, count in heads.items():
            if count == len(names) or (head[-1] in (*PREFIXES, *COLLECTIONS) and head[:-1] in found):
                found[head] = None
    for parts in names:
        for other in others[:NAMED]:
            if len(parts) > len(other) and (
                parts[-len(other) :] == other or _in_words_of_torch(parts)[-len(other) :] == other
            ):
                found[parts[: -len(other)]] = None
    return list(found)


# --- by order ---


def _by_order(offered: Sequence[Offer], wanted: Sequence[str], fits: Fits, last: frozenset[str]) -> Match | None:
    """All tensors in order, or those of the one network in the file that fits where it holds several."""
    networks: dict[str, list[Offer]] = {}
    for offer in offered:
        networks.setdefault(offer.raw[0] if offer.raw else "", []).append(offer)
    found = [_in_order(some, wanted, fits, last) for some in (list(offered), *networks.values())]
    fitting = [taken for taken in found if taken]
    return fitting[0] if fitting and all(taken.sources == fitting[0].sources for taken in fitting) else None


def _in_order(offered: Sequence[Offer], wanted: Sequence[str], fits: Fits, last: frozenset[str]) -> Match | None:
    """Each tensor to its place, if there are as many as wanted and each fits, those of the last layer perhaps not."""
    if len(offered) != len(wanted):
        return None
    pairs = _paired(offered, wanted)
    sources, fitting = {}, {}
    for name, offer in pairs or ():
        found = fits(name, offer.tensor)
        if found is None and name not in last:
            return None
        sources[name] = offer.name
        if found is not None:
            fitting[name] = found
    return Match(sources, fitting, "order") if fitting else None


def _paired(offered: Sequence[Offer], wanted: Sequence[str]) -> list[tuple[str, Offer]] | None:
    """Names with tensors: layer by layer where the file names what each tensor of a layer is, else one by one."""
    if not all(len(offer.parts) > 1 and offer.parts[-1] in KNOWN_LEAVES for offer in offered):
        return list(zip(wanted, offered, strict=True))
    theirs: dict[Parts, dict[str, Offer]] = {}
    for offer in offered:
        theirs.setdefault(offer.parts[:-1], {})[offer.parts[-1]] = offer
    ours: dict[str, dict[str, str]] = {}
    for name in wanted:
        path, _, leaf = name.rpartition(".")
        ours.setdefault(path, {})[leaf] = name
    layers = list(theirs)
    if [offer.name for offer in offered] == sorted(offer.name for offer in offered):
        layers.sort(key=_natural)
        if not _numbered_alike(layers, theirs):
            return None
    if [set(theirs[layer]) for layer in layers] != [set(leaves) for leaves in ours.values()]:
        return None
    places = zip(layers, ours.values(), strict=True)
    return [(name, theirs[layer][leaf]) for layer, leaves in places for leaf, name in leaves.items()]


def _natural(layer: Parts) -> tuple[tuple[int, int | str], ...]:
    """A key under which numbers in names count as numbers."""
    pieces = [piece for part in layer for piece in re.split(r"(\d+)", part) if piece]
    return tuple((0, int(piece)) if piece.isdigit() else (1, piece) for piece in pieces)


def _numbered_alike(layers: Sequence[Parts], theirs: Mapping[Parts, Mapping[str, Offer]]) -> bool:
    """Whether layers of equal shapes differ in numbers alone: the order of names then is that of the network."""
    seen: dict[object, str] = {}
    for layer in layers:
        shapes = tuple(sorted((leaf, tuple(offer.tensor.shape)) for leaf, offer in theirs[layer].items()))
        pattern = re.sub(r"\d+", "#", ".".join(layer))
        if seen.setdefault(shapes, pattern) != pattern:
            return False
    return True
