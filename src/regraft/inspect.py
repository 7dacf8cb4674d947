"""What a network is made of, as JSON values."""

from __future__ import annotations

from typing import Any

from regraft.backbone import Backbone
from regraft.cut import lower_at
from regraft.nn import summary


def describe(backbone: Backbone) -> dict[str, Any]:
    """Parameters in all, trainable and frozen; preprocessing; facts of each layer; of each cut the parameters below."""
    spec = backbone.preprocess
    cuts = [
        {
            "name": cut.name,
            "aliases": list(cut.aliases),
            "depth": cut.depth,
            "shape": list(cut.shape),
            "layout": cut.layout,
            "shown": cut.shown,
            "parameters": sum(p.numel() for p in lower_at(backbone.trace, [cut.name]).parameters()),
        }
        for cut in backbone.cuts
    ]
    parameters = sum(p.numel() for p in backbone.module.parameters())
    trainable = sum(p.numel() for p in backbone.module.parameters() if p.requires_grad)
    return {
        **backbone.source.to_json(),
        "parameters": parameters,
        "trainable": trainable,
        "frozen": parameters - trainable,
        "preprocess": backbone.preprocess.to_json(),
        "restored": backbone.coverage and backbone.coverage.to_json(),
        "ends": backbone.ends,
        "layers": [vars(layer) for layer in summary(backbone.module, (spec.channels, *spec.size)).layers],
        "cuts": cuts,
    }
