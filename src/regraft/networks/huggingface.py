"""Networks of Hugging Face transformers: from the hub, its local cache, or a folder with the same files.

A folder holds `config.json`, `model.safetensors` (or `pytorch_model.bin`) and `preprocessor_config.json`. The module is
the class of transformers itself with a forward that takes one tensor and returns one, so parameters and cuts keep the
names that transformers gives them (`vit.layers.3`). Only model types of a written list are built, by code that is
installed: code that a repository brings along is never run, and pickles are read as tensors alone.

Not covered: networks that read text as well, quantised weights, adapters, and attention kernels from the hub.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.errors import BackboneError, first_line
from regraft.networks.hf_processor import spec_of_processor
from regraft.networks.torchvision_ops import declare_missing_operators
from regraft.preprocess import PreprocessSpec

PREFIX = "hf/"
HUB_SECONDS = 3.0
"""A hub that does not answer for so long is taken for unreachable."""
MODEL_TYPES = (
    *("beit", "bit", "clip_vision_model", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2"),
    *("dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "efficientnet", "focalnet", "hgnet_v2", "ijepa"),
    *("levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer", "pvt", "pvt_v2", "regnet"),
    *("resnet", "segformer", "siglip_vision_model", "swiftformer", "swin", "swinv2", "vit", "vit_msn"),
)
"""The model types that are built; each has been followed and cut."""
CLASSIFIERS = ("ForImageClassification", "ForImageClassificationWithTeacher")
LARGEST_NUMBER = 100_000
"""No layer of an image network is wider, none has more blocks or more classes."""
DESCRIPTIONS = ("config.json", "preprocessor_config.json", "processor_config.json", "README.md")
SAFE = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")
"""Names of files of weights: whole, or an index and its shards."""
PRETRAINING_NOISE = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""DINOv3 shakes its positions in training mode; a part that is frozen or tuned on few examples must not."""
NOT_PART_OF_IT = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
)


@dataclass(frozen=True)
class Stated:
    """What came with the weights. processor: values of the image processor, None where there are none."""

    where: str
    processor: Mapping[str, Any] | None
    licence: str | None


class _Pictures:
    """Stands in front of a class of transformers: one tensor in, one tensor out."""

    stated: Stated | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, h, w) to logits (n, classes), or pooled features (n, c), or tokens (n, tokens, c)."""
        output = super().forward(pixel_values=x, return_dict=True)  # type: ignore[misc]
        if "logits" in output:
            return output["logits"]  # type: ignore[no-any-return]
        if "pooler_output" in output:
            return output["pooler_output"].flatten(1)  # type: ignore[no-any-return]
        return output["last_hidden_state"]  # type: ignore[no-any-return]


def create(name_or_folder: str, *, pretrained: bool, seed: int = 0) -> nn.Module:
    """The network `hf/ORG/NAME`, or that of a folder, in evaluation mode; random weights unless `pretrained`.

    A network with a classifier returns its logits, another one pooled features or else its last values. Raises
    BackboneError when transformers is missing, the files cannot be had, the model type is not on the list, or the
    weights are not those of the network.
    """
    transformers = _transformers()
    folder = _folder(name_or_folder, pretrained)
    values = _read_json(folder / "config.json")
    kind, config = _class_and_config(transformers, values, str(folder / "config.json"))
    stated = Stated(str(folder), _processor(folder), _licence(folder))
    if pretrained:
        module = _with_weights(kind, config, folder)
    else:
        module = _with_random_weights(kind, config, True, seed, str(folder / "config.json"))
    return _taking_pictures(module, stated)


def preprocess_of(module: nn.Module) -> PreprocessSpec:
    """What the network's own image processor does in evaluation; BackboneError where the network states none."""
    stated: Stated | None = getattr(module, "stated", None)
    if stated is None or stated.processor is None:
        raise BackboneError(
            "A network of Hugging Face needs preprocessor_config.json, which says how its pictures are prepared; "
            f"{stated.where if stated else 'this network'} has none: add it, or give preprocess= in Python."
        )
    return spec_of_processor(stated.processor, stated.where)


def licence_of(module: nn.Module) -> str | None:
    """The licence that the model card (README.md) states, None where it states none."""
    stated: Stated | None = getattr(module, "stated", None)
    return stated.licence if stated else None


def config_of(module: nn.Module) -> dict[str, Any]:
    """Everything but the weights that it takes to build the network again, as JSON values.

    `transformers` is the version that gave the parameters their names; another one may give them others.
    """
    network: Any = module
    values = json.loads(json.dumps(network.config.to_dict()))
    return {
        "transformers": str(_transformers().__version__),
        "class": type(module).__name__,
        "pooler": getattr(module, "pooler", None) is not None,
        "config": {key: value for key, value in values.items() if key not in NOT_PART_OF_IT},
    }


def create_from_config(config: Mapping[str, Any], *, seed: int = 0, at_most: int | None = None) -> nn.Module:
    """The network that `config_of` described, with random weights, in evaluation mode.

    at_most: how many numbers its state dict may hold (as many as there are in the file of
    weights, say), so that memory is not taken on the word of a description. Raises BackboneError for values that are
    not of that form, for model types that are not on the list, and for larger networks.
    """
    where = "The description of the network"
    values = config.get("config")
    if not isinstance(values, dict) or not isinstance(config.get("class"), str):
        raise BackboneError(f"A network of Hugging Face is described by class and config; found {sorted(config)}.")
    kind, made = _class_and_config(_transformers(), {**values, "architectures": [config["class"]]}, where)
    if kind.__name__ != config["class"]:
        raise BackboneError(f"The class in {where} must be {kind.__name__}; found {config['class']!r}.")
    if at_most is not None:
        with torch.device("meta"):
            held = _with_random_weights(kind, made, bool(config.get("pooler")), seed, where)
        found = sum(tensor.numel() for tensor in held.state_dict().values())
        if found > at_most:
            raise BackboneError(f"{where} asks for {found:,} numbers; at most {at_most:,} may be in its weights.")
    return _taking_pictures(_with_random_weights(kind, made, bool(config.get("pooler")), seed, where), None)


# ---- which network ------------------------------------------------------------------------------------------------


def _class_and_config(transformers: Any, values: Mapping[str, Any], where: str) -> tuple[type[nn.Module], Any]:
    """The class of transformers that the values of a config.json name, and its configuration."""
    model_type = values.get("model_type")
    if _holds(values, "auto_map"):
        raise BackboneError(f"A network must be one that transformers itself can build; {where} brings its own code.")
    if _holds(values, "quantization_config"):
        raise BackboneError(f"Weights must be plain numbers; {where} says that they are quantised: take the original.")
    if _largest(values) > LARGEST_NUMBER:
        raise BackboneError(f"Sizes in {where} must be at most {LARGEST_NUMBER:,}; found {_largest(values):,}.")
    if model_type not in MODEL_TYPES:
        raise BackboneError(
            f"The model type in {where} must be an image network that regraft knows; found {model_type!r}: "
            f"choose one of {', '.join(MODEL_TYPES)}."
        )
    kept = {key: value for key, value in values.items() if key not in NOT_PART_OF_IT}
    if model_type == "dinov3_vit":
        kept |= dict.fromkeys(PRETRAINING_NOISE)
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(kept)
        named = str((values.get("architectures") or [""])[0])
        kind: Any = getattr(transformers, named, None) if named.endswith(CLASSIFIERS) else None
        if getattr(kind, "config_class", None) is not type(config):
            kind = transformers.MODEL_MAPPING[type(config)]
    except Exception as e:  # its checks of configurations raise classes of their own
        raise _no_network(where, e) from e
    return kind, config


def _holds(values: object, key: str) -> bool:
    """Whether a key occurs anywhere in JSON values."""
    if isinstance(values, Mapping):
        return key in values or any(_holds(value, key) for value in values.values())
    return isinstance(values, list) and any(_holds(value, key) for value in values)


def _largest(values: object) -> int:
    """The largest whole number anywhere in JSON values."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list):
        return max(map(_largest, values), default=0)
    return values if isinstance(values, int) else 0


def _with_random_weights(kind: Any, config: Any, pooler: bool, seed: int, where: str) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            module: nn.Module = kind(config).float()
    except Exception as e:  # whatever values do not fit together
        raise _no_network(where, e) from e
    return module if pooler else _without_pooler(module)


def _with_weights(kind: Any, config: Any, folder: Path) -> nn.Module:
    safe = _weights(folder, SAFE)
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            module, report = kind.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                use_safetensors=safe,
                weights_only=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as e:  # of unpicklers, of safetensors, of transformers
        raise BackboneError(
            f"The weights in {folder} must be whole and those of {kind.__name__}; {first_line(e, kind=True)}: "
            "download them again."
        ) from e
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = (
            tensor.data.clone()
        )  # the file is mapped into memory at odd addresses, where kernels round otherwise
    missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    if missing and all(name.startswith("pooler.") for name in missing):
        return _without_pooler(module)
    if missing or report["error_msgs"]:
        raise BackboneError(
            f"The weights in {folder} must hold every tensor of {kind.__name__}; {len(missing)} are missing or of "
            f"another shape ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): choose another folder."
        )
    return module  # type: ignore[no-any-return]


def _without_pooler(module: nn.Module) -> nn.Module:
    """A network whose pooling was never trained returns what came before it."""
    if getattr(module, "pooler", None) is not None:
        module.pooler = None  # type: ignore[assignment]
    return module


def _taking_pictures(module: nn.Module, stated: Stated | None) -> nn.Module:
    """The same module as a class whose forward takes one tensor; where it came from is no part of it."""
    network: Any = module
    for part in network.modules():
        if "name_or_path" in vars(part):
            part.name_or_path = part.config._name_or_path = ""
    kind = type(module)
    network.__class__ = type(kind.__name__, (_Pictures, kind), {"__module__": kind.__module__})
    network.stated = stated
    return module.eval()


# ---- its files ----------------------------------------------------------------------------------------------------


def _folder(name_or_folder: str, pretrained: bool) -> Path:
    """Where the files are; those of the hub are fetched unless they are in its cache."""
    if name_or_folder.startswith(PREFIX):
        return _from_hub(name_or_folder.removeprefix(PREFIX), pretrained)
    folder = Path(name_or_folder)
    if (folder / "config.json").is_file() and (not pretrained or _weights(folder, SAFE) or _weights(folder, PICKLED)):
        return folder
    raise BackboneError(
        f"A network of Hugging Face is hf/ORG/NAME or a folder with config.json and {SAFE[0]} or {PICKLED[0]}; "
        f"{name_or_folder!r} is neither."
    )


def _from_hub(repository: str, pretrained: bool) -> Path:
    from huggingface_hub import constants, get_session, snapshot_download

    def fetched(**options: Any) -> Path | None:
        for weights in (SAFE, PICKLED) if pretrained else ((),):
            patterns = [*DESCRIPTIONS, *weights]
            folder = Path(snapshot_download(repository, allow_patterns=patterns, **options))
            if (folder / "config.json").is_file() and (not pretrained or _weights(folder, weights)):
                return folder
        return None

    with contextlib.suppress(Exception):  # it is not in the cache
        if folder := fetched(local_files_only=True):
            return folder
    reason = f"it holds no config.json with {SAFE[0]} or {PICKLED[0]}"
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        if folder := fetched():
            return folder
    except Exception as e:  # hub clients raise dozens of classes: connection, cache, HTTP, name and file errors
        reason = type(e).__name__
    raise BackboneError(
        f"The network {repository} is neither in the local cache of Hugging Face ({constants.HF_HUB_CACHE}) nor to be "
        f"had from {constants.ENDPOINT} ({reason}): connect once, or give a folder with its files."
    )


def _weights(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether the file of weights is there, or its index with all shards."""
    whole, index, _ = names
    if (folder / whole).is_file() or not (folder / index).is_file():
        return (folder / whole).is_file()
    shards = _read_json(folder / index).get("weight_map")
    return isinstance(shards, dict) and all((folder / str(shard)).is_file() for shard in shards.values())


def _processor(folder: Path) -> Mapping[str, Any] | None:
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            values = _read_json(folder / name)
            return values.get(key) if key else values
    return None


def _licence(folder: Path) -> str | None:
    """`license:` in the head of the model card."""
    with contextlib.suppress(OSError):
        text = (folder / "README.md").read_text("utf-8", errors="replace")
        head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", head.group(1), re.MULTILINE) if head else None
        return found.group(1) if found else None
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BackboneError(f"{path} must be a JSON file; {first_line(e, kind=True)}: download it again.") from e
    if not isinstance(values, dict):
        raise BackboneError(f"{path} must hold a JSON object; found {type(values).__name__}: download it again.")
    return values


# ---- transformers -------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    declare_missing_operators()
    try:
        import transformers
    except ModuleNotFoundError as e:
        raise BackboneError(
            "Networks of Hugging Face need the package transformers: run `pip install regraft[hf]`."
        ) from e
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and reports: what is wrong with weights is said in an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _no_network(where: str, error: Exception) -> BackboneError:
    return BackboneError(
        f"{where} must describe a network that transformers can build; {first_line(error, kind=True)}."
    )
