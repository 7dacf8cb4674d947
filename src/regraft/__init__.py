"""Reuse the right number of layers of a pretrained network on your own few examples.

run = regraft.fit("photos/", out="run/")
run.model.predict(["cat.jpg"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from regraft.__version__ import __version__

if TYPE_CHECKING:
    from regraft.artifact import Prediction, TransferModel, load_model
    from regraft.backbone import Backbone, cut_at, load_backbone
    from regraft.data import Dataset, load_data
    from regraft.depth_curve import Curve
    from regraft.errors import RegraftError
    from regraft.params import freeze, parameter_groups
    from regraft.pretraining import Pretrained, pretrain
    from regraft.recipe import Run, compare, curve, evaluate, fit
    from regraft.weights import Coverage, restore

_HOME = {
    "Backbone": "backbone",
    "Coverage": "weights",
    "Curve": "depth_curve",
    "Dataset": "data",
    "Prediction": "artifact",
    "Pretrained": "pretraining",
    "RegraftError": "errors",
    "Run": "recipe",
    "TransferModel": "artifact",
    "compare": "recipe",
    "curve": "recipe",
    "cut_at": "backbone",
    "evaluate": "recipe",
    "fit": "recipe",
    "freeze": "params",
    "load_backbone": "backbone",
    "load_data": "data",
    "load_model": "artifact",
    "parameter_groups": "params",
    "pretrain": "pretraining",
    "restore": "weights",
}

__all__ = [
    "Backbone",
    "Coverage",
    "Curve",
    "Dataset",
    "Prediction",
    "Pretrained",
    "RegraftError",
    "Run",
    "TransferModel",
    "__version__",
    "compare",
    "curve",
    "cut_at",
    "evaluate",
    "fit",
    "freeze",
    "load_backbone",
    "load_data",
    "load_model",
    "parameter_groups",
    "pretrain",
    "restore",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: it is loaded with the first name that needs it.
    if name in _HOME:
        return getattr(importlib.import_module(f"regraft.{_HOME[name]}"), name)
    if name == "nn":
        return importlib.import_module("regraft.nn")
    raise AttributeError(f"module 'regraft' has no attribute {name!r}")
