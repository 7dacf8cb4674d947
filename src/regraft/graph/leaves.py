"""What is kept in one piece while a network is followed, and what is said when the whole network cannot be followed.

It grows from attempt to attempt: a submodule that stops one is in one piece in the next.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.errors import TraceError

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ADVICE = (
    "move that part into a submodule of its own, or name its class in leaf_modules; regraft then treats it as one piece"
)


@dataclass
class Leaves:
    """What is kept in one piece; it grows from attempt to attempt, so following ends."""

    kinds: set[type[nn.Module]]
    functions: set[Callable[..., Any]]
    exact_kinds: set[type[nn.Module]] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)

    def add(self, root: nn.Module, stop: Stopped) -> None:
        """Keep the modules that stopped the attempt in one piece.

        Where another one of the class did so before, the whole class: the others would stop it too, one by one.
        """
        if "" in stop.paths:
            raise TraceError(_sentence(root, stop)) from stop.__cause__
        kinds = {type(root.get_submodule(path)) for path in self.paths}
        again = {kind for path in stop.paths if (kind := type(root.get_submodule(path))) in kinds}
        self.exact_kinds |= {kind for kind in again if kind is not type(root) and kind not in _CONTAINERS}
        self.paths |= set(stop.paths)

    def holds(self, module: nn.Module, path: str) -> bool:
        return (
            path in self.paths
            or type(module) in self.exact_kinds
            or isinstance(module, tuple(self.kinds))
            or bool(module._forward_hooks or module._forward_pre_hooks)
        )


class Stopped(Exception):
    """The modules at `paths` ("" for the outermost) cannot be followed."""

    def __init__(self, paths: Collection[str], reason: str) -> None:
        super().__init__(reason)
        self.paths = paths
        self.reason = reason


def timm_leaves() -> tuple[list[type[nn.Module]], list[Callable[..., Any]]]:
    """The classes and functions that timm declares as untraceable; nothing where no timm layer can be in the network.

    A network made of timm's layers has imported them, so looking is enough and nothing is imported here.
    """
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return [], []
    return layers.get_notrace_modules(), layers.get_notrace_functions()


def _sentence(root: nn.Module, stop: Stopped) -> str:
    """What stopped at the outermost module, at which line of the user's code, and what to do."""
    where = f"{type(root).__name__}.forward"
    if stop.__cause__ is not None:
        frames = traceback.extract_tb(stop.__cause__.__traceback__)
        own = [f for f in frames if not f.filename.startswith((_TORCH, _HERE, "<"))]
        where += f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    reason = stop.reason.strip().rstrip(".").splitlines()[0]
    return f"A network must be one fixed sequence of operations; {where} cannot be followed: {reason}: {_ADVICE}."
