"""The health of a saved model's network on pictures: what flows through the reused layers, and what would flow back.

One pass forward and one back in evaluation mode, nothing is trained: the answers of the saved head, brought to unit
size, say what each layer would be told. Knows the saved model and labelled pictures; the figures and illnesses are
those of `nn.health`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from regraft.artifact import TransferModel
from regraft.backbone import Backbone
from regraft.cut import lower_at
from regraft.data import Dataset, read
from regraft.errors import DataError, PictureError
from regraft.frozen import parts_of, pooled
from regraft.graph import find_cut
from regraft.nn import Health, watch
from regraft.preprocess import fit_to_size, normalise

PICTURES = 32
BATCH = 16


def examine(model: TransferModel, backbone: Backbone, dataset: Dataset, *, seed: int = 0) -> Health:
    """Figures of the layers below the cut on up to 32 pictures drawn from `seed`, float32.

    Raises DataError where no picture of a class that the model knows can be read.
    """
    cuts = [find_cut(backbone.trace, name) for name in model.head.cuts]
    lower = lower_at(backbone.trace, [cut.name for cut in cuts]).eval().requires_grad_(True)
    with watch(lower, in_evaluation=True) as watched:
        for pixels, labels in _batches(model, dataset, seed):
            values = lower(normalise(pixels, model.preprocess))
            seen = [
                view.seen(pooled(value, cut, parts_of(cut)))
                for view, value, cut in zip(model.head.views, values, cuts, strict=True)
            ]
            logits = torch.cat(seen, 1) @ model.head.weight.T + model.head.bias
            centred = logits - logits.mean(1, keepdim=True)
            # Of unit size: a head that is sure of its own pictures would tell the layers nothing.
            F.cross_entropy(centred / centred.detach().square().mean().sqrt().clamp(min=1e-12), labels).backward()  # type: ignore[no-untyped-call]
            lower.zero_grad(set_to_none=True)
        return watched.health()


def _batches(model: TransferModel, dataset: Dataset, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Prepared pictures uint8 (n, c, h, w) and their labels int64 (n,), unreadable ones left out."""
    known = {name: i for i, name in enumerate(model.labels)}
    examples = [e for e in dataset.examples if dataset.labels[e.label] in known]
    random.Random(seed).shuffle(examples)
    found = 0
    for at in range(0, min(PICTURES, len(examples)), BATCH):
        rows, labels = [], []
        for example in examples[at : at + BATCH]:
            try:
                rows.append(fit_to_size(read(example).decode().pixels, model.preprocess))
            except PictureError:
                continue
            labels.append(known[dataset.labels[example.label]])
        found += len(rows)
        if rows:
            yield torch.stack(rows), torch.tensor(labels)
    if not found:
        raise DataError("Pictures of classes that the model knows must be there; none of them could be read.")
