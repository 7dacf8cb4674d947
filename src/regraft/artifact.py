"""The saved model: everything that turns a picture file into probabilities, without pickle and without the training.

    model.safetensors   the frozen layers' tensors, under the names of the original network, head.weight, head.bias, and
                        what was trained above a cut, under `tuned.`
    model.json          labels, preprocess spec, backbone, cut, head, numerics, licence, digests, versions; written last

Every byte of both is covered by a digest. Knows nothing of how the head was found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from PIL import Image
from torch import nn

from regraft.ahead import in_order
from regraft.architecture import is_user_function
from regraft.backbone import CUSTOM, MODEL, Backbone, Source, load_backbone, rebuild
from regraft.cut import lower_at
from regraft.data import Example, Raw, open_picture, pixel_digest, read
from regraft.errors import ArtifactError, PictureError
from regraft.frozen import FrozenLower, as_grid, as_map, freeze_lower, values_at_cuts
from regraft.graph import find_cut
from regraft.heads import INPUT, Head, View
from regraft.numerics import Numerics, pick_numerics
from regraft.operations import operations_from_json
from regraft.preprocess import PreprocessSpec, fit_to_size, input_spec, spec_from_json
from regraft.sealed import read_manifest, read_tensors, write_sealed
from regraft.tuned import PICTURE, Plot, Tuned, grow, plot_from_json, run_tuned

DECODERS = 2


@dataclass(frozen=True)
class Prediction:
    """Probabilities of one picture, most likely first: (label, probability)."""

    path: str
    ranked: tuple[tuple[str, float], ...]

    @property
    def label(self) -> str:
        """The most likely label."""
        return self.ranked[0][0]

    @property
    def probability(self) -> float:
        """The probability of the most likely label."""
        return self.ranked[0][1]


@dataclass(frozen=True)
class Answer:
    """What the model says to one picture, and which picture that was.

    probabilities: float32 (classes,); id: digest of the bytes; pixels: digest of what was decoded, if asked for.
    """

    probabilities: npt.NDArray[np.float32]
    id: str
    pixels: str


@dataclass(frozen=True)
class _Prepared:
    """A picture ready for the network and at 32 x 32, uint8 (C, H, W), where the model sees it so; its digests."""

    large: torch.Tensor
    small: torch.Tensor | None
    id: str
    digest: str


@dataclass(frozen=True)
class TransferModel:
    """Reused layers, head, labels and preparation.

    frozen: None where nothing frozen is read. tuned: a part of the network that was trained on, whose logits are added
    to the head's. preprocess: of the network, or of the picture at 32 x 32 where no network is read.
    small: how the picture at 32 x 32 is prepared, where it is read beside a network.
    """

    head: Head
    labels: tuple[str, ...]
    frozen: FrozenLower | None
    source: Source | None
    preprocess: PreprocessSpec
    numerics: Numerics
    tuned: Tuned | None = None
    small: PreprocessSpec | None = None

    @property
    def cut(self) -> str:
        """The cut below which everything is frozen: the deepest that the head reads, `input` where nothing is."""
        if self.tuned is not None:
            return self.tuned.plot.cut if self.tuned.plot.takes == "map" else INPUT
        return self.head.cuts[-1]

    def predict(self, inputs: Iterable[Any]) -> list[Prediction]:
        """Labels with probabilities for paths, bytes of picture files, uint8 arrays (H, W[, 1, 3, 4]) or PIL images.

        Raises PictureError for what is not a picture.

            >>> model.predict(["cat.jpg"])[0].label
            'cat'
        """
        if _is_one(inputs):
            raise PictureError("predict takes a list of pictures, and was given one: write predict([picture]).")
        items = list(inputs)
        out = []
        for i, (item, answer) in enumerate(zip(items, self.answers(items), strict=True)):
            if isinstance(answer, PictureError):
                raise answer
            out.append(self.ranked(_name(item, i), answer))
        return out

    def ranked(self, path: str, answer: Answer) -> Prediction:
        """An answer as labels with their probabilities, most likely first; of equal ones the first label wins."""
        order = np.argsort(-answer.probabilities, kind="stable")
        return Prediction(path, tuple((self.labels[i], float(answer.probabilities[i])) for i in order))

    def answers(self, items: Iterable[Any], *, marked: bool = False) -> Iterator[Answer | PictureError]:
        """An answer to each item in turn, or the error that says why there is none; memory stays flat.

        items: as for `predict`, or examples of a data set; marked: say the digest of the pixels too.
        """
        with ThreadPoolExecutor(DECODERS) as pool:
            prepared = in_order(pool, lambda pair: self._prepare(*pair, marked), enumerate(items))
            yield from _batched(self, (outcome for _, outcome in prepared))

    def _prepare(self, i: int, item: Any, marked: bool) -> _Prepared | PictureError:
        try:
            raw = _opened(item, i)
            picture = raw.decode()
            large = fit_to_size(picture.pixels, self.preprocess)
            small = fit_to_size(picture.pixels, self.small) if self.small else None
            return _Prepared(large, small, raw.id, pixel_digest(picture) if marked else "")
        except PictureError as e:
            return e

    def run(self, prepared: torch.Tensor, small: torch.Tensor | None = None) -> np.ndarray:
        """Probabilities float32 (n, classes) of prepared pictures, uint8 (n, C, H, W), n at most the fixed batch."""
        reduced = prepared if small is None else small
        rows = {INPUT: reduced.reshape(len(reduced), -1).numpy().astype(np.float32)}
        maps = torch.empty(0)
        if self.frozen is not None:
            values = values_at_cuts(self.frozen, prepared)
            for cut, value, parts in zip(self.frozen.cuts, values, self.frozen.parts, strict=True):
                if cut.name in self.head.cuts:
                    rows[cut.name] = as_grid(value, cut, parts).reshape(len(prepared), -1)
                if self.tuned is not None and cut.name == self.tuned.plot.cut:
                    maps = torch.from_numpy(as_map(value, cut)).float()
        logits = self.head.logits(rows)
        if self.tuned is not None:
            seen = {"map": maps, "picture": prepared, "input": reduced}[self.tuned.plot.takes]
            logits = logits + run_tuned(self.tuned.module, seen.to(self.numerics.device))
        return torch.softmax(logits, 1).numpy()


def assemble(
    backbone: Backbone, head: Head, labels: Sequence[str], numerics: Numerics, tuned: Tuned | None = None
) -> TransferModel:
    """A model from the frozen part of a backbone, a head fitted on its features, and a part that was trained on."""
    cuts = _frozen_cuts(backbone, head, tuned)
    reduced = _small_spec(head, tuned)
    if not cuts and (tuned is None or tuned.plot.takes == "input"):
        assert reduced is not None
        return TransferModel(head, tuple(labels), None, None, reduced, numerics, tuned)
    frozen = freeze_lower(backbone.trace, cuts, backbone.preprocess, numerics) if cuts else None
    return TransferModel(head, tuple(labels), frozen, backbone.source, backbone.preprocess, numerics, tuned, reduced)


def _frozen_cuts(backbone: Backbone, head: Head, tuned: Tuned | None) -> list[str]:
    """The cuts below which everything stays frozen, shallowest first."""
    names = {name for name in head.cuts if name != INPUT}
    if tuned is not None and tuned.plot.takes == "map":
        names.add(tuned.plot.cut)
    return sorted(names, key=lambda name: find_cut(backbone.trace, name).depth)


def _small_spec(head: Head, tuned: Tuned | None) -> PreprocessSpec | None:
    if INPUT in head.cuts:
        return input_spec(1 if head.views[0].grey else 3)
    return input_spec(tuned.plot.channels) if tuned is not None and tuned.plot.takes == "input" else None


def save_model(model: TransferModel, backbone: Backbone, folder: Path, facts: dict[str, Any]) -> None:
    """Write model.safetensors, then model.json, into `folder`; `facts` are kept as the model's provenance.

    An older model.json goes first, so that a save that is killed midway leaves no model rather than a mixed one.
    """
    tensors = {"head.weight": model.head.weight, "head.bias": model.head.bias}
    if model.source is not None:
        # A network that is described beside its weights is built from them alone, so they are kept whole.
        described = backbone.operations or backbone.config
        lower = backbone.module if described else _lower(backbone, _names(model.frozen))
        tensors |= {f"lower.{name}": tensor for name, tensor in lower.state_dict().items()}
    if model.tuned is not None:
        tensors |= {f"tuned.{name}": tensor for name, tensor in model.tuned.module.state_dict().items()}
    manifest = {
        "labels": list(model.labels),
        "cut": model.cut,
        "head": {"cuts": list(model.head.cuts), "views": [view.to_json() for view in model.head.views]},
        "tuned": model.tuned.to_json() if model.tuned else None,
        "preprocess": model.preprocess.to_json(),
        "small": model.small.to_json() if model.small else None,
        "backbone": model.source.to_json() if model.source else None,
        "operations": backbone.operations.to_json() if model.source and backbone.operations else None,
        "config": backbone.config if model.source else None,
        "licence": model.source.licence if model.source else None,
        "numerics": model.numerics.to_json(),
        "facts": facts,
    }
    write_sealed(folder, MODEL, tensors, manifest)


def load_model(
    folder: str | os.PathLike[str], *, backbone: nn.Module | None = None, device: str = "auto"
) -> TransferModel:
    """A saved model, ready to predict, in a process that never trained.

    backbone: the module, where the model was fitted on one given in Python (it is copied).
    Raises ArtifactError when a file is missing, was changed by a single bit, or belongs to another model.
    """
    return load_with_network(folder, backbone=backbone, device=device)[0]


def load_with_network(
    folder: str | os.PathLike[str], *, backbone: nn.Module | None = None, device: str = "auto"
) -> tuple[TransferModel, Backbone | None]:
    """As `load_model`, with the network whose lower layers it reuses, before folding; None for none."""
    place = Path(folder)
    manifest = read_manifest(place, MODEL)
    try:
        tensors = read_tensors(place, MODEL, manifest)
        numerics = pick_numerics(device, manifest["numerics"]["precision"])
        views = tuple(View(**view) for view in manifest["head"]["views"])
        head = Head(views, tensors.pop("head.weight"), tensors.pop("head.bias"))
        spec = spec_from_json(manifest["preprocess"])
        labels = tuple(manifest["labels"])
        plot = plot_from_json(manifest["tuned"], len(labels)) if manifest.get("tuned") else None
        share = manifest["tuned"]["share"] if plot else 0.0
        small = spec_from_json(manifest["small"]) if manifest.get("small") else None
        trained = {name.removeprefix("tuned."): tensors.pop(name) for name in list(tensors) if _is_tuned(name)}
        _refuse_disagreement(place, head, labels, alone=plot is None)
        if manifest["backbone"] is None:
            tuned = _filled(plot, None, trained, share, numerics, place) if plot else None
            return TransferModel(head, labels, None, None, spec, numerics, tuned), None
        source = Source(**manifest["backbone"])
        told = manifest.get("operations")
        operations = operations_from_json(told) if told else None
        config = manifest.get("config")
    except (KeyError, TypeError, safetensors.SafetensorError) as e:
        raise ArtifactError(
            f"{place / MODEL.manifest} must describe a regraft model of format {MODEL.format}: {e!r}."
        ) from e
    tensors = {name.removeprefix("lower."): tensor for name, tensor in tensors.items()}
    if operations or config:
        network = rebuild(source, spec, operations=operations, config=config, tensors=tensors)
    else:
        network = _rebuilt(source, spec, backbone)
        cuts = [name for name in {*head.cuts, plot.cut if plot else INPUT} if name not in (INPUT, PICTURE)]
        _load_lower(network, cuts, tensors, place)
    filled = _filled(plot, network, trained, share, numerics, place) if plot else None
    names = _frozen_cuts(network, head, filled)
    frozen = freeze_lower(network.trace, names, spec, numerics) if names else None
    return TransferModel(head, labels, frozen, source, spec, numerics, filled, small), network


def _is_tuned(name: str) -> bool:
    return name.startswith("tuned.")


def _filled(
    plot: Plot,
    network: Backbone | None,
    tensors: dict[str, torch.Tensor],
    share: float,
    numerics: Numerics,
    place: Path,
) -> Tuned:
    """The trained part with its saved tensors; all of them must be there, and no other."""
    module = grow(plot, network)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as e:
        raise ArtifactError(
            f"{place / MODEL.weights} must hold the layers that were trained above {plot.cut}; it does not: fit it "
            "anew."
        ) from e
    return Tuned(plot, module.requires_grad_(False).to(numerics.device), share)


def _names(frozen: FrozenLower | None) -> list[str]:
    return [cut.name for cut in frozen.cuts] if frozen else []


def _lower(backbone: Backbone, cuts: Sequence[str]) -> nn.Module:
    """Everything below the deepest of these cuts, nothing where there are none."""
    return lower_at(backbone.trace, list(cuts)) if cuts else nn.Module()


def _refuse_disagreement(place: Path, head: Head, labels: Sequence[str], *, alone: bool) -> None:
    """Raise ArtifactError unless what the head sees, its weights and the labels go together.

    alone: no trained part answers beside the head, so that the head must see something.
    """
    seen, shape = sum(view.dim for view in head.views), tuple(head.weight.shape)
    if (alone and not head.views) or shape != (len(labels), seen) or head.bias.shape != (len(labels),):
        raise ArtifactError(
            f"The head in {place} must have a row for each of its {len(labels)} labels and a column for each of the "
            f"{seen} numbers that it sees; it is {shape}: fit it anew."
        )


def _rebuilt(source: Source, spec: PreprocessSpec, module: nn.Module | None) -> Backbone:
    if module is not None and (source.architecture == CUSTOM or is_user_function(source.architecture)):
        return load_backbone(module, example=torch.zeros(2, spec.channels, *spec.size), preprocess=spec)
    return rebuild(source, spec)


def _load_lower(backbone: Backbone, cuts: Sequence[str], tensors: dict[str, torch.Tensor], place: Path) -> None:
    """Fill the layers below the deepest cut; every tensor there must be in the file, and no other."""
    lower = _lower(backbone, cuts)
    ours = {name: tuple(tensor.shape) for name, tensor in lower.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        listed = ", ".join(f"{n} {theirs.get(n, 'absent')} instead of {ours.get(n, 'absent')}" for n in differing[:3])
        raise ArtifactError(
            f"{place / MODEL.weights} must hold the layers of {backbone.source.architecture} up to "
            f"{' and '.join(cuts)}; {len(differing)} tensors differ ({listed}): give the network that it was fitted on."
        )
    lower.load_state_dict(tensors)


def _batched(model: TransferModel, prepared: Iterable[_Prepared | PictureError]) -> Iterator[Answer | PictureError]:
    """Answers in the order of what was prepared, computed a full batch at a time."""
    waiting: list[_Prepared | PictureError] = []

    def results() -> Iterator[Answer | PictureError]:
        good = [p for p in waiting if isinstance(p, _Prepared)]
        small = [p.small for p in good if p.small is not None]
        large = [p.large for p in good]
        rows = iter(model.run(torch.stack(large), torch.stack(small) if small else None) if good else ())
        for p in waiting:
            yield Answer(next(rows), p.id, p.digest) if isinstance(p, _Prepared) else p
        waiting.clear()

    ready = 0
    for item in prepared:
        waiting.append(item)
        ready += isinstance(item, _Prepared)
        if ready in (0, model.numerics.batch):
            yield from results()
            ready = 0
    yield from results()


def _is_one(inputs: Any) -> bool:
    """Whether this is a picture where a list of pictures was asked for; its letters or rows would be taken for them."""
    if isinstance(inputs, np.ndarray):
        return inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[2] in (1, 3, 4))
    return isinstance(inputs, str | bytes | os.PathLike | Image.Image)


def _name(item: Any, i: int) -> str:
    return str(os.fspath(item)) if isinstance(item, str | os.PathLike) else f"inputs[{i}]"


def _opened(item: Any, i: int) -> Raw:
    return read(item) if isinstance(item, Example) else open_picture(item, where=_name(item, i))
