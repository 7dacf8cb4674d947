"""The health of a saved model's network on pictures: what flows through the reused layers, and what would flow back.

One pass forward and one back in evaluation mode, nothing is trained: the answers of the saved head, brought to unit
size, say what each layer would be told. Knows the saved model and labelled pictures; the figures and illnesses are
those of `nn.health`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from regraft.artifact import TransferModel
from regraft.backbone import Backbone
from regraft.cut import lower_at
from regraft.data import Dataset, read
from regraft.errors import BackboneError, DataError, PictureError, first_line
from regraft.frozen import pooled
from regraft.graph import find_cut
from regraft.nn import Health, watch
from regraft.preprocess import fit_to_size, normalise
from regraft.tuned import renew

PICTURES = 32
BATCH = 16


def examine(model: TransferModel, backbone: Backbone | None, dataset: Dataset, *, seed: int = 0) -> Health:
    """Figures of the reused and the trained layers on up to 32 pictures drawn from `seed`, float32.

    backbone: None where the model reuses none of its layers. Raises DataError where no picture of a class that the
    model knows can be read, BackboneError where torch finds no way back through the network.
    """
    whole = _Whole(model, backbone).eval().requires_grad_(True)
    renew(whole)
    with watch(whole.lower if whole.lower and not model.tuned else whole, in_evaluation=True) as watched:
        for pixels, small, labels in _batches(model, dataset, seed):
            try:
                _there_and_back(whole, pixels, small, labels)
            except RuntimeError as e:
                raise BackboneError(
                    f"Gradients must find their way back through the network to be judged; torch says: {first_line(e)}."
                ) from e
            whole.zero_grad(set_to_none=True)
            renew(whole)
        return watched.health()


def _there_and_back(whole: _Whole, pixels: torch.Tensor, small: torch.Tensor, labels: torch.Tensor) -> None:
    logits = whole(pixels, small)
    centred = logits - logits.mean(1, keepdim=True)
    # Of unit size: a head that is sure of its own pictures would tell the layers nothing.
    F.cross_entropy(centred / centred.detach().square().mean().sqrt().clamp(min=1e-12), labels).backward()  # type: ignore[no-untyped-call]


class _Whole(nn.Module):
    """All layers of a saved model, unfolded, with gradients: pictures uint8 (n, c, h, w) to logits."""

    def __init__(self, model: TransferModel, backbone: Backbone | None) -> None:
        super().__init__()
        self.model = [model]  # not among the layers to watch
        names = [cut.name for cut in model.frozen.cuts] if model.frozen else []
        self.cuts = [find_cut(backbone.trace, name) for name in names] if backbone else []
        self.lower = lower_at(backbone.trace, names) if backbone and names else None
        self.tuned = copy.deepcopy(model.tuned.module).cpu() if model.tuned else None

    def forward(self, pixels: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        model = self.model[0]
        values = self.lower(normalise(pixels, model.preprocess)) if self.lower else ()
        at = {cut.name: (value, cut) for cut, value in zip(self.cuts, values, strict=True)}
        logits = model.head.bias.repeat(len(pixels), 1)
        seen = [view.seen(pooled(*at[view.cut], view.parts)) for view in model.head.views if view.cut in at]
        if seen:  # of a head that sees the raw input too, only its say on the network's cuts is followed
            logits = logits + torch.cat(seen, 1) @ model.head.weight[:, -sum(s.shape[1] for s in seen) :].T
        if self.tuned is not None and model.tuned is not None:
            plot = model.tuned.plot
            inputs = at[plot.cut][0] if plot.takes == "map" else pixels if plot.takes == "picture" else small
            logits = logits + self.tuned(inputs)
        return logits


def _batches(
    model: TransferModel, dataset: Dataset, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Pictures uint8 (n, c, h, w) as the network and as a small one takes them, and labels int64 (n,)."""
    known = {name: i for i, name in enumerate(model.labels)}
    examples = [e for e in dataset.examples if dataset.labels[e.label] in known]
    random.Random(seed).shuffle(examples)
    found = 0
    for at in range(0, min(PICTURES, len(examples)), BATCH):
        rows, reduced, labels = [], [], []
        for example in examples[at : at + BATCH]:
            try:
                pixels = read(example).decode().pixels
            except PictureError:
                continue
            rows.append(fit_to_size(pixels, model.preprocess))
            reduced.append(fit_to_size(pixels, model.small or model.preprocess))
            labels.append(known[dataset.labels[example.label]])
        found += len(rows)
        if rows:
            yield torch.stack(rows), torch.stack(reduced), torch.tensor(labels)
    if not found:
        raise DataError("Pictures of classes that the model knows must be there; none of them could be read.")
