"""What a module keeps in its attributes, so that running its code can be undone.

Covered are attributes and what is put into dictionaries, lists and sets that they hold (caches, mostly). Not covered:
containers inside containers, and what is kept outside the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Kept:
    """The attributes of a module by name, and the contents of those that are containers, one list each."""

    attributes: dict[str, Any]
    contents: dict[str, list[Any]]


def kept(module: nn.Module) -> Kept:
    """What the module keeps now."""
    containers = {name: value for name, value in vars(module).items() if type(value) in (dict, list, set)}
    return Kept(dict(vars(module)), {name: _parts(value) for name, value in containers.items()})


def changed(before: Kept, module: nn.Module) -> bool:
    """Whether the module keeps something else by now; things are compared by identity."""
    after = kept(module)
    pairs = [(before.attributes[name], after.attributes.get(name)) for name in before.attributes]
    if before.attributes.keys() != after.attributes.keys() or any(a is not b for a, b in pairs):
        return True
    return any(
        len(parts) != len(after.contents[name])
        or any(a is not b for a, b in zip(parts, after.contents[name], strict=True))
        for name, parts in before.contents.items()
    )


def put_back(before: Kept, module: nn.Module) -> None:
    """Make the module keep what it kept before."""
    if not changed(before, module):
        return
    vars(module).clear()
    vars(module).update(before.attributes)
    for name, parts in before.contents.items():
        container = before.attributes[name]
        container.clear()
        if isinstance(container, dict):
            container.update(zip(parts[::2], parts[1::2], strict=True))
        elif isinstance(container, set):
            container.update(parts)
        else:
            container.extend(parts)


def _parts(container: Any) -> list[Any]:
    """Keys and values in turn, or the elements."""
    if isinstance(container, dict):
        return [part for pair in container.items() for part in pair]
    return list(container)
