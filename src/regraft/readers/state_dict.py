"""Which of the tensors in a training checkpoint are the weights.

A checkpoint holds them plainly or under a usual name (`state_dict`, `model`, ...), beside optimizer state, moving
averages and counters. What is passed over is listed by name. Knows names alone, no file format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from regraft.errors import ReaderError

WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights"),
    *("net_state_dict", "state"),
)
NEVER = re.compile(
    r"optim|sched|scaler|(^|_)(rng|epoch|step|iteration|loss|criterion|args|config|hyper_parameters|callbacks|loops)"
    r"(_|s?$)|^(amp|metric)|best_(acc|score|metric|val)"
)
OPTIMIZERS = re.compile(r"optim|sched|scaler")
AVERAGED = re.compile(r"(^|_)(ema|shadow|swa)(_|$)")
COUNTER = "num_batches_tracked"
DEPTH = 16

Tensors = dict[str, torch.Tensor]


def weights_of(value: Any, origin: str) -> tuple[Tensors, tuple[str, ...]]:
    """The weights in what was loaded, by name, and the names of what was passed over.

    value: a mapping of tensors, or mappings and lists of such. Where several parts hold weights, the names of their
    tensors begin with the part's. A moving average counts where there are no plain weights beside it. Raises
    ReaderError naming `origin` where there is no tensor, or where it is nested beyond reason.
    """
    walk = _Walk(origin)
    if torch.is_tensor(value):
        raise ReaderError(f"{origin} must hold a state dict, tensors by name; found one tensor without a name.")
    if not walk.holds(value):
        kind = f"a {type(value).__name__}"
        if _is_optimizer(value):
            kind = "the state of an optimizer"
        elif isinstance(value, Mapping):
            kind = f"a dict of {', '.join(str(k)[:40] for k in list(value)[:5]) or 'nothing'}"
        raise ReaderError(f"{origin} must hold a state dict, tensors by name; found {kind}.")
    walk.take(value, "")
    tensors, passed = set_apart(walk.tensors)
    return tensors, (*walk.passed, *passed)


def set_apart(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors without counters of batches and without averaged twins of others, and the names of those."""
    plain = {n: t for n, t in tensors.items() if _averaged(n) is None}
    twins = {(n.replace(".", "")[-length:], t.shape) for length in _lengths(tensors) for n, t in plain.items()}
    passed = [name for name in tensors if name.rpartition(".")[2] == COUNTER]
    for name, tensor in tensors.items():
        rest = _averaged(name)
        if rest is not None and (rest, tensor.shape) in twins:
            passed.append(name)
    gone = set(passed)
    return {name: t for name, t in tensors.items() if name not in gone}, tuple(passed)


def _averaged(name: str) -> str | None:
    """What the twin of an averaged tensor ends in, dots left out; None for a name that speaks of no average."""
    parts = name.split(".")
    for i, part in enumerate(parts[:2]):
        if AVERAGED.search(part) and i + 1 < len(parts):
            return "".join(parts[i + 1 :])
    return "".join(parts).removesuffix("_ema") if name.endswith("_ema") else None


def _lengths(tensors: Mapping[str, torch.Tensor]) -> set[int]:
    return {len(rest) for name in tensors if (rest := _averaged(name))}


class _Walk:
    """Goes through what was loaded, every container once, however often it is referred to."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.known: dict[int, bool] = {}
        self.seen: set[int] = set()
        self.tensors: Tensors = {}
        self.passed: list[str] = []

    def holds(self, value: Any, depth: int = 0) -> bool:
        """Whether there is a tensor in it."""
        if torch.is_tensor(value):
            return True
        if depth > DEPTH:
            raise ReaderError(f"{self.origin} must hold a state dict; it is nested more than {DEPTH} deep.")
        if id(value) not in self.known:
            self.known[id(value)] = False  # a container within itself
            if _is_optimizer(value):
                return False
            self.known[id(value)] = any(self.holds(inner, depth + 1) for inner in _entries(value).values())
        return self.known[id(value)]

    def count(self, value: Any) -> int:
        """How many tensors are in it; each container is looked into once."""
        found, waiting, seen = 0, [value], set()
        while waiting:
            one = waiting.pop()
            if torch.is_tensor(one):
                found += 1
            elif id(one) not in seen:
                seen.add(id(one))
                waiting.extend(_entries(one).values())
        return found

    def take(self, value: Any, prefix: str) -> None:
        """Add the weights in a container under `prefix`, and the names of the rest to what is passed over."""
        if id(value) in self.seen:
            self.passed.append(prefix.rstrip("."))
            return
        self.seen.add(id(value))
        entries = _entries(value)
        parts = {k: v for k, v in entries.items() if not torch.is_tensor(v) and self.holds(v)}
        sizes = {k: self.count(v) for k, v in parts.items()}
        loose = {k for k, v in entries.items() if torch.is_tensor(v) and not (parts and NEVER.search(k))}
        chosen = _chosen(sizes)
        wrapped = len(chosen) == 1 and (chosen[0] in WRAPPERS or (not loose and _is_flat(parts[chosen[0]])))
        for key, entry in entries.items():
            if key in chosen:
                self.take(entry, prefix if wrapped else f"{prefix}{key}.")
            elif key in loose and not wrapped:
                self.add(prefix + key, entry)
            else:
                self.passed.append(prefix + key)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.tensors:
            raise ReaderError(f"Every tensor of {self.origin} must have a name of its own; {name} is there twice.")
        self.tensors[name] = tensor.detach()


def _entries(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(i): entry for i, entry in enumerate(value)}
    return {}


def _chosen(sizes: Mapping[str, int]) -> list[str]:
    """Of the parts that hold so many tensors each, those that hold the weights."""
    trained = [part for part in sizes if not NEVER.search(part)]
    trained = trained or [part for part in sizes if not OPTIMIZERS.search(part)]
    plain = [part for part in trained if not AVERAGED.search(part)] or trained
    wrapped = [part for part in plain if part in WRAPPERS]
    most = max((sizes[part] for part in plain), default=0)
    return wrapped if any(sizes[part] == most for part in wrapped) else plain


def _is_optimizer(value: Any) -> bool:
    """Whether this is what an optimizer of torch saves, whose moments have the shapes of weights."""
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _is_flat(value: Any) -> bool:
    """Whether the names in a container are those of a state dict, with the paths of layers in them."""
    return any("." in key for key in _entries(value))
