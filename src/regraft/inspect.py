"""What a network is made of, as JSON values."""

from __future__ import annotations

from typing import Any

from regraft.backbone import Backbone


def describe(backbone: Backbone) -> dict[str, Any]:
    """Parameters in all and trainable, preprocessing, and for each cut its shape and the parameters below it."""
    module = backbone.module
    order = {name: i for i, name in enumerate(n for n, _ in module.named_modules())}
    sizes = [(order[name.rpartition(".")[0]], p.numel()) for name, p in module.named_parameters()]
    cuts = []
    for cut in backbone.cuts:
        reached = max((order[path] for path in (cut.name, *cut.aliases) if path in order), default=None)
        inside = [n for path in (cut.name, *cut.aliases) if path in order for n in _last(order, path)]
        last = max(inside, default=reached)
        cuts.append(
            {
                "name": cut.name,
                "aliases": list(cut.aliases),
                "depth": cut.depth,
                "shape": list(cut.shape),
                "layout": cut.layout,
                "shown": cut.shown,
                "parameters": sum(n for at, n in sizes if last is not None and at <= last),
            }
        )
    parameters = list(module.parameters())
    return {
        **backbone.source.to_json(),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "preprocess": backbone.preprocess.to_json(),
        "cuts": cuts,
    }


def _last(order: dict[str, int], path: str) -> list[int]:
    return [i for name, i in order.items() if name == path or name.startswith(path + ".")]
