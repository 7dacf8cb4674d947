"""A network written in Python as a list of operations, so that a saved model can be opened without its code.

torch.export follows the network and its graph is read like any exported program; only what computes the same is taken.
Anything else stays a module that its owner builds again. Not covered: networks whose path depends on their input.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import torch
from torch import nn

from regraft.errors import ReaderError
from regraft.operations import Network, Operations, build
from regraft.readers.exported.program import read_opened_program


def as_operations(module: nn.Module, example: torch.Tensor) -> Network | None:
    """The module rebuilt from operations with the same tensors, None where that cannot be said or differs.

    module: in evaluation mode; of several outputs the first is taken, and layers that do not lead to it are left out.
    example: (n, ...) float32, n > 1, on which both must give equal outputs within 1e-5.
    """
    single = _giving_one(module)
    try:
        with warnings.catch_warnings(), torch.no_grad(), io.BytesIO() as file:
            warnings.simplefilter("ignore")
            pictures = torch.export.Dim("pictures")
            torch.export.save(torch.export.export(single, (example,), dynamic_shapes=({0: pictures},)), file)
            found = read_opened_program(file, "the network")
            theirs = single(example)
    except Exception:  # torch.export raises dozens of classes for what it cannot follow
        return None
    if found.operations is None:
        return None
    try:
        operations = _leading_to_output(found.operations)
        steps = {step.name for step in operations.steps}
        used = {name: t for name, t in found.tensors.items() if name in steps or name.rpartition(".")[0] in steps}
        network = build(operations, used)
    except ReaderError:
        return None
    with torch.no_grad():
        ours = network(example)
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
    return network if same and network.state_dict().keys() <= module.state_dict().keys() else None


def _leading_to_output(operations: Operations) -> Operations:
    wanted, steps = {operations.output}, []
    for step in reversed(operations.steps):
        if step.name in wanted:
            wanted.update(step.inputs)
            steps.append(step)
    return Operations(tuple(reversed(steps)), operations.output)


def _giving_one(module: nn.Module) -> nn.Module:
    """The module itself, or a copy with the same names that returns the first of its outputs."""
    single = copy.copy(module)
    forward = module.forward

    def first(x: torch.Tensor) -> Any:
        output = forward(x)
        return output[0] if isinstance(output, tuple | list) else output

    single.__dict__["forward"] = first
    return single
