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
    from regraft.errors import RegraftError
    from regraft.params import freeze, parameter_groups
    from regraft.recipe import Curve, Run, curve, evaluate, fit
    from regraft.weights import Coverage, restore

_HOME = {
    "Backbone": "backbone",
    "Coverage": "weights",
    "Curve": "recipe",
    "Dataset": "data",
    "Prediction": "artifact",
    "RegraftError": "errors",
    "Run": "recipe",
    "TransferModel": "artifact",
    "curve": "recipe",
    "cut_at": "backbone",
    "evaluate": "recipe",
    "fit": "recipe",
    "freeze": "params",
    "load_backbone": "backbone",
    "load_data": "data",
    "load_model": "artifact",
    "parameter_groups": "params",
    "restore": "weights",
}

__all__ = [
    "Backbone",
    "Coverage",
    "Curve",
    "Dataset",
    "Prediction",
    "RegraftError",
    "Run",
    "TransferModel",
    "__version__",
    "curve",
    "cut_at",
    "evaluate",
    "fit",
    "freeze",
    "load_backbone",
    "load_data",
    "load_model",
    "parameter_groups",
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
