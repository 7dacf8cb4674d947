"""A backbone: a pretrained network, its cuts, its preprocessing and where it came from; in memory, and as a folder."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from regraft.architecture import (
    architecture,
    from_config,
    is_network_folder,
    is_user_function,
    stated_or_found,
    with_pictures,
)
from regraft.cut import lower_at, split
from regraft.described import as_operations
from regraft.errors import ArtifactError, BackboneError, CutError, ReaderError
from regraft.files import digest
from regraft.graph import Cut, Trace, find_cut, trace
from regraft.networks.embedded import EMBEDDED
from regraft.operations import Operations, build, operations_from_json
from regraft.preprocess import PreprocessSpec, plain_spec, spec_from_json
from regraft.readers import Checkpoint, Layout, is_file_spec, read_checkpoint
from regraft.sealed import Kind, read_manifest, read_tensors, write_sealed
from regraft.weights import Coverage, restore

SCRATCH = "scratch"
CUSTOM = "custom"
DESCRIBED = "operations"
FOLDER = Kind("backbone", 1, "backbone.json", "backbone.safetensors", "regraft pretrain", "pretrain")
MODEL = Kind("model", 1, "model.json", "model.safetensors", "regraft fit", "fit")


class WeightOptions(TypedDict, total=False):
    """How a file of weights becomes a backbone: the keyword arguments of `load_backbone` that say it."""

    arch: str | None
    match: str | None
    rename: Mapping[str, str] | None
    layout: Layout | None
    adapt: bool
    min_coverage: float


@dataclass(frozen=True)
class Source:
    """Where a backbone came from.

    spec: what was asked for; architecture: a name that `architecture` knows, `operations` for a network that a file
        describes, or `custom` for a module given in Python.
    weights: digest of every tensor and of the graph; pretrained: False for random weights.
    """

    spec: str
    architecture: str
    weights: str
    pretrained: bool
    licence: str | None

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode with the places where it can be cut.

    module: regraft's own copy; trace: its graph and cuts; preprocess: how pictures become its input.
    operations: the network as a file describes it, or config: as its library does; a saved model carries either.
    coverage: what was loaded from a file of weights, where one was.
    trained: the cut up to which regraft itself trained it before, where it did; classes_of: digests of the pictures
    whose classes it learned then.
    """

    module: nn.Module
    trace: Trace
    preprocess: PreprocessSpec
    source: Source
    operations: Operations | None = field(default=None, repr=False)
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    coverage: Coverage | None = field(default=None, repr=False)
    trained: str | None = None
    classes_of: frozenset[str] = field(default=frozenset(), repr=False)
    cuts: tuple[Cut, ...] = ()
    """All cuts in order of depth, none above a layer that was not loaded."""

    @property
    def shown(self) -> tuple[Cut, ...]:
        """The 10-25 cuts that a curve is drawn over."""
        return tuple(cut for cut in self.cuts if cut.shown)

    @property
    def ends(self) -> str | None:
        """Why there are no cuts further up, where weights are missing there."""
        if self.trained and len(self.cuts) < len(self.trace.cuts):
            return f"the curve ends at {self.cuts[-1].name}: what lies above was not trained or kept"
        if not self.coverage or len(self.cuts) == len(self.trace.cuts):
            return None
        fresh = next(name for name in self.module.state_dict() if name in self.coverage.fresh)
        return f"the curve ends at {self.cuts[-1].name}: above it {fresh} was not loaded"


def load_backbone(
    spec: str | os.PathLike[str] | nn.Module | Backbone = "default",
    *,
    example: torch.Tensor | None = None,
    preprocess: PreprocessSpec | None = None,
    seed: int = 0,
    pretrained: bool = True,
    arch: str | None = None,
    match: str | None = None,
    rename: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    adapt: bool = False,
    min_coverage: float = 1.0,
) -> Backbone:
    """The backbone that `spec` names, with its weights and the preprocessing it was trained with.

    spec: `default` (EfficientNet-Lite0, ImageNet, no download), `scratch` (the same network with random weights drawn
        from `seed`), a timm name (`resnet50.a1_in1k`), `torchvision/NAME`, `hf/ORG/NAME` or a local folder of that
        layout, a folder made by `regraft pretrain` or `regraft fit`, a file of any framework (see `read_checkpoint`),
        or any `nn.Module` together with `example`, a batch of the input it takes, (n, channels, height, width). The
        module is copied: the caller's stays as it is.
    pretrained: False for random weights, drawn from `seed`, for a network by name or a function of yours.
    preprocess: instead of what the network states; networks that state nothing get their input stretched to their
        size with values in [0, 1], or in 0..255 where a file's network scales those itself.
    arch: the network that a file of weights belongs to: a name as above or `package.module:function`.
    match, rename, layout, adapt, min_coverage: as in `restore`.

    Raises BackboneError when there is no such network or no weights, ReaderError for a file that does not fit,
    TraceError when the network cannot be followed, CutError when there is no place to cut it.
    """
    if isinstance(spec, Backbone):
        return spec
    if isinstance(spec, nn.Module):
        return _from_module(spec, example, preprocess)
    spec = os.fspath(spec)
    if is_backbone_folder(spec) and not arch:
        if not pretrained:
            raise BackboneError(f"A network with random weights must be one by name; {spec} is a pretrained folder.")
        return _from_folder(spec)
    if pretrained and spec not in ("default", SCRATCH) and (arch or is_file_spec(spec)) and not is_network_folder(spec):
        options = {"match": match, "rename": rename, "layout": layout, "adapt": adapt, "min_coverage": min_coverage}
        return _from_file(spec, arch, preprocess, seed, options)
    if arch or match or rename or layout or adapt:
        raise BackboneError(f"Only a file of weights takes --arch, --match, --rename, --layout; {spec!r} is a name.")
    if is_user_function(spec) and pretrained:
        raise BackboneError(f"A function of yours makes a network without weights; give a file, and --arch {spec}.")
    name = EMBEDDED if spec in ("default", SCRATCH) else spec
    pretrained = pretrained and spec != SCRATCH
    if is_user_function(spec):
        module, shape = with_pictures(architecture(spec, pretrained=False, seed=seed).module)
        return described_backbone(module, stated_or_found(preprocess, module, shape), spec)
    made = architecture(name, pretrained=pretrained, seed=seed, preprocess=preprocess)
    if made.preprocess is None:
        raise BackboneError(f"A network by name must state its preprocessing; {name} does not: give preprocess=.")
    source = Source(spec, name, "", pretrained, made.licence)
    return _assemble(made.module, _blank(made.preprocess), made.preprocess, source, config=made.config)


def is_backbone_folder(spec: str) -> bool:
    """Whether this is a folder that holds a backbone, as `save_backbone` writes it, or a model, as `fit` saves it."""
    return any((Path(spec) / kind.manifest).exists() for kind in (FOLDER, MODEL))


def described_backbone(module: nn.Module, preprocess: PreprocessSpec, spec: str) -> Backbone:
    """A backbone of a module that is said as a list of operations, so that it can be saved without its code.

    Raises BackboneError where that cannot be said.
    """
    said = as_operations(module.eval(), _blank(preprocess))
    if said is None:
        raise BackboneError(f"A network that is kept must be one that a list of operations can say; {spec} is not.")
    return _assemble(said, _blank(preprocess), preprocess, Source(spec, DESCRIBED, "", False, None), said.operations)


def savable(backbone: Backbone) -> Backbone:
    """The backbone, said as a list of operations where nothing else could build it again. Raises BackboneError."""
    source = backbone.source
    by_name = source.architecture not in (CUSTOM, DESCRIBED) and not is_user_function(source.architecture)
    if by_name or backbone.operations:
        return backbone
    return described_backbone(backbone.module, backbone.preprocess, source.spec)


def save_backbone(backbone: Backbone, folder: Path, cut: str, facts: Mapping[str, Any]) -> Backbone:
    """Write a network that was trained in place up to `cut` as backbone.safetensors and backbone.json; what it now is.

    facts: JSON values about how it was trained; `classes_of`, where it is among them, as in `Backbone`.
    """
    source = replace(backbone.source, spec=str(folder), weights="", pretrained=True)
    manifest = {
        "backbone": source.to_json(),
        "preprocess": backbone.preprocess.to_json(),
        "operations": backbone.operations.to_json() if backbone.operations else None,
        "config": backbone.config,
        "trained": cut,
        "licence": source.licence,
        "facts": facts,
    }
    write_sealed(folder, FOLDER, backbone.module.state_dict(), manifest)
    return _from_folder(str(folder))


def cut_at(backbone: Backbone, name: str) -> tuple[nn.Module, nn.Module]:
    """The part of a backbone below the cut called `name`, and the part above it: `upper(lower(x)) == module(x)`.

    Both hold the parameters of `backbone.module` itself and start in its mode. Raises CutError, which names the
    nearest cuts, where there is none of that name.

        >>> lower, upper = cut_at(load_backbone(), "blocks.3")
    """
    return split(backbone.trace, name)


def reframed(backbone: Backbone, preprocess: PreprocessSpec) -> Backbone:
    """The same network for pictures prepared otherwise. Raises TraceError where it does not take their size."""
    if preprocess.size == backbone.preprocess.size:
        return replace(backbone, preprocess=preprocess)
    traced, known = trace(backbone.module, _blank(preprocess)), {cut.name for cut in backbone.cuts}
    cuts = tuple(cut for cut in traced.cuts if cut.name in known)
    return replace(backbone, trace=traced, preprocess=preprocess, cuts=cuts)


def rebuild(
    source: Source,
    preprocess: PreprocessSpec,
    *,
    operations: Operations | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Backbone:
    """The network of a saved model with random weights, for its own to be loaded into.

    operations or config, tensors: of a network that the model describes itself, which then holds all its weights.
    Raises BackboneError for a module that was given in Python: only its owner can build it again.
    """
    module = _network(source, operations, config, tensors)
    return _assemble(module, _blank(preprocess), preprocess, source, operations, config=config)


def weights_digest(module: nn.Module, code: str) -> str:
    """Content hash of every parameter and buffer by name, of the plain settings of every layer, and of `code`.

    Buffers that are not saved count as well, and so do settings that a layer does not print.
    """
    parts: list[bytes | memoryview] = [code.encode()]
    for path, layer in module.named_modules():
        settings = {k: v for k, v in vars(layer).items() if k != "training" and _is_plain(v)}
        parts.append(f"{path} {type(layer).__qualname__} {sorted(settings.items())}".encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest(*parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _from_module(module: nn.Module, example: torch.Tensor | None, preprocess: PreprocessSpec | None) -> Backbone:
    if example is None or example.dim() != 4 or example.shape[1] not in (1, 3):
        found = "none" if example is None else tuple(example.shape)
        raise BackboneError(
            "A module given in Python needs example=, a batch of pictures it takes, (n, 1 or 3, height, width); "
            f"found {found}."
        )
    _, channels, height, width = example.shape
    copied = copy.deepcopy(module).eval()
    spec = preprocess or plain_spec(height, width, channels)
    return _assemble(copied, example.detach().clone(), spec, Source("module", CUSTOM, "", True, None))


def _from_file(
    spec: str, arch: str | None, preprocess: PreprocessSpec | None, seed: int, options: Mapping[str, Any]
) -> Backbone:
    checkpoint = read_checkpoint(spec)
    if arch:
        return _from_weights(spec, checkpoint, arch, preprocess, seed, options)
    if checkpoint.operations is None:
        raise ReaderError(
            f"{spec} holds weights only ({checkpoint.format}, {len(checkpoint.tensors)} tensors): name their network "
            "with --arch, a timm name, torchvision/NAME or package.module:function."
        )
    if options["match"] or options["rename"] or options["layout"]:
        raise ReaderError(f"{spec} brings its own network: --match, --rename and --layout need --arch.")
    network = build(checkpoint.operations, checkpoint.tensors)
    module, shape = with_pictures(network, _picture_shape(checkpoint.input_shape))
    final = stated_or_found(preprocess, module, shape)
    operations = checkpoint.operations if module is network else None
    return _assemble(module, _blank(final), final, Source(spec, DESCRIBED, "", True, None), operations)


def _from_folder(spec: str) -> Backbone:
    """The backbone that `save_backbone` wrote, or that of a saved model; its cuts end where it was trained."""
    place = Path(spec)
    kind = FOLDER if (place / FOLDER.manifest).exists() else MODEL
    manifest = read_manifest(place, kind)
    try:
        tensors = read_tensors(place, kind, manifest)
        if manifest["backbone"] is None:
            raise BackboneError(f"A model that is a backbone must reuse a network's layers; {spec} reads pixels alone.")
        source = replace(Source(**manifest["backbone"]), spec=spec, weights="")
        preprocess = spec_from_json(manifest["preprocess"])
        operations = operations_from_json(manifest["operations"]) if manifest["operations"] else None
        config = manifest["config"]
        learned = kind is FOLDER or _trained_above(manifest)
        classes_of = frozenset(manifest["facts"].get("classes_of", ()) if learned else ())
        tensors, ends = (tensors, [str(manifest["trained"])]) if kind is FOLDER else _of_model(tensors, manifest)
    except (KeyError, TypeError) as e:
        raise ArtifactError(f"{place / kind.manifest} must describe a {kind.word} of regraft: {e!r}.") from e
    module = _network(source, operations, config, tensors)
    if not (operations or config):
        module.load_state_dict(tensors, strict=kind is FOLDER)
    found = _assemble(module, _blank(preprocess), preprocess, source, operations, config=config)
    trained = max(ends, key=lambda name: find_cut(found.trace, name).depth)
    below = set(split(found.trace, trained)[0].state_dict())
    if not below <= tensors.keys():
        raise ArtifactError(f"{place / kind.weights} must hold all layers up to {trained}; it does not: fit it anew.")
    cuts = _reusable(found.trace, frozenset(set(module.state_dict()) - below))
    return replace(found, trained=trained, classes_of=classes_of, cuts=cuts)


def _network(
    source: Source,
    operations: Operations | None,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
) -> nn.Module:
    """The network of a file that regraft wrote; with random weights where the file does not describe it."""
    if source.architecture == CUSTOM:
        raise BackboneError(
            "This model was fitted on a module given in Python: load it with regraft.load_model(path, backbone=module)."
        )
    if operations:
        return build(operations, tensors)
    if config:
        return from_config(config, tensors or {})
    if is_user_function(source.architecture):
        raise BackboneError(
            f"This model was fitted on {source.architecture}, code that a saved model may not start by itself: load it "
            "with regraft.load_model(path, backbone=module)."
        )
    return architecture(source.architecture, pretrained=False).module


def _of_model(
    tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The network's tensors in a saved model, the trained ones over the frozen, and the cuts up to which they reach."""
    ends = [name for name in manifest["head"]["cuts"] if name != "input"]
    known = {name.removeprefix("lower."): t for name, t in tensors.items() if name.startswith("lower.")}
    if _trained_above(manifest):
        ends = [manifest["tuned"]["views"][-1]["cut"]]
        known |= {name.removeprefix("tuned.body."): t for name, t in tensors.items() if name.startswith("tuned.body.")}
    return known, ends


def _trained_above(manifest: Mapping[str, Any]) -> bool:
    """Whether a saved model trained layers of its network, and not a small one beside it."""
    return bool(manifest["tuned"]) and manifest["tuned"]["cut"] != "input"


def _picture_shape(known: tuple[int | None, ...] | None) -> tuple[int, int, int] | None:
    """(channels, height, width) of what a network takes, None where it is not known or no picture."""
    sizes = tuple(size for size in known or () if size is not None)
    if len(sizes) != len(known or ()) or len(sizes) not in (2, 3):
        return None
    return (1, *sizes) if len(sizes) == 2 else sizes  # type: ignore[return-value]


def _from_weights(
    spec: str,
    checkpoint: Checkpoint,
    arch: str,
    preprocess: PreprocessSpec | None,
    seed: int,
    options: Mapping[str, Any],
) -> Backbone:
    arch = EMBEDDED if arch in ("default", SCRATCH) else arch
    made = architecture(arch, pretrained=False, seed=seed, preprocess=preprocess)
    stated = made.preprocess
    module, shape = with_pictures(made.module, (stated.channels, *stated.size) if stated else None)
    coverage = restore(made.module, checkpoint, example=torch.zeros(2, *shape), quiet=True, **options)
    final = stated_or_found(stated, module, shape)
    if module is not made.module:
        coverage = coverage.below("network")
    said = as_operations(module, _blank(final)) if is_user_function(arch) else None
    operations = said.operations if said else None
    source = Source(spec, arch, "", True, None)
    found = _assemble(said or module, _blank(final), final, source, operations, config=made.config, coverage=coverage)
    print(coverage, file=sys.stderr)
    return found


def _assemble(
    module: nn.Module,
    example: torch.Tensor,
    preprocess: PreprocessSpec,
    source: Source,
    operations: Operations | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    coverage: Coverage | None = None,
) -> Backbone:
    _refuse_unsound(module, source.spec)
    traced = trace(module, example)
    weights = weights_digest(module, f"{traced.graph.python_code('self').src}\n{module}")
    cuts = _reusable(traced, coverage.fresh) if coverage else traced.cuts
    if not any(cut.shown for cut in cuts):
        raise CutError(
            f"A network must have a place between its layers where a single tensor is alive; {source.spec} has none: "
            "choose one of several layers that does not run in branches all the way."
        )
    named = replace(source, weights=source.weights or weights)
    return Backbone(module, traced, preprocess, named, operations, config, coverage, cuts=cuts)


def _refuse_unsound(module: nn.Module, spec: str) -> None:
    """Raise BackboneError, which names it, where a parameter is not finite or has no shape yet."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise BackboneError(
                f"Weights must have their shapes; {name} of {spec} has none yet: run it on a batch once."
            )
        if not bool(torch.isfinite(parameter).all()):
            raise BackboneError(f"Weights must be finite; {name} of {spec} holds NaN or infinity: load others.")


def _reusable(traced: Trace, fresh: frozenset[str]) -> tuple[Cut, ...]:
    """The cuts below which everything was loaded. Raises ReaderError where a layer not loaded leaves none."""
    below = 0
    while below < len(traced.cuts):
        lower = lower_at(traced, [traced.cuts[below].name])
        if not fresh.isdisjoint(lower.state_dict()):
            break
        below += 1
    used = [cut for cut in traced.cuts[:below] if len(lower_at(traced, [cut.name]).state_dict())]
    first = next((name for name in traced.module.state_dict() if name in fresh), None)
    if not used and first:
        raise ReaderError(
            f"The layers next to the input must be loaded, for others stand on them; {first} was not: widen --match."
        )
    return traced.cuts[:below]


def _blank(spec: PreprocessSpec) -> torch.Tensor:
    return torch.zeros(2, spec.channels, *spec.size)
