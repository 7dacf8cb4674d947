"""How a network from Hugging Face wants its pictures: its `preprocessor_config.json` as a preprocess spec.

The file is read as plain JSON; no class that it names is imported. What older files leave out is filled in as the
class that they name does. Arithmetic follows the processors of transformers on Pillow images:

    resize -> centre crop -> (pixel * rescale_factor [- 1] - image_mean) / image_std

Not covered, and refused: BGR channels, padding, Lanczos and box filters, and pictures that keep their own shape. A crop
of odd excess starts half a pixel later than in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from regraft.errors import BackboneError
from regraft.preprocess import PreprocessSpec

FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's codes of those filters that a spec knows."""
BILINEAR = {"ViT", "MobileNetV1", "MobileNetV2", "DINOv3ViT", "Segformer"}
"""Processors whose filter is bilinear where the file names none; the others are bicubic."""
SQUARE = {"ViT", "DeiT", "Beit", "Pvt", "Segformer", "Siglip", "EfficientNet", "DINOv3ViT"}
"""Processors to which one number as size means a square; to the others it is the shortest edge."""
REFUSED = ("do_flip_channel_order", "do_pad", "do_thumbnail", "do_align_long_axis", "do_rotate")


def spec_of_processor(config: Mapping[str, Any], where: str) -> PreprocessSpec:
    """The spec of an image processor, from the values of its file.

    `where` names the file in errors. Raises BackboneError when the values ask for what a spec cannot say, or leave
    open how pictures are prepared.
    """
    try:
        return _spec(config, where)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as e:
        raise BackboneError(
            f"The image processor in {where} must hold sizes, means and deviations as transformers writes them "
            f"({type(e).__name__}: {e}): give preprocess= in Python instead."
        ) from e


def _spec(config: Mapping[str, Any], where: str) -> PreprocessSpec:
    kind = _kind(config)
    odd = [key for key in REFUSED if config.get(key, kind == "MobileViT" and key == "do_flip_channel_order")]
    if odd or not config.get("do_resize", True):
        raise _refusal(where, ", ".join(odd) if odd else "pictures that are not resized")
    code = config.get("resample", 2 if kind in BILINEAR else 3)
    if code not in FILTERS:
        raise _refusal(where, f"the filter {code!r}; known are {', '.join(f'{k} ({v})' for k, v in FILTERS.items())}")
    size, resize_to, resize = _sizes(config, kind, where)
    mean, std = _numbers(config, kind, where)
    return PreprocessSpec(
        size=size, resize_to=resize_to, mean=mean, std=std, resize=resize, interpolation=FILTERS[code]
    )


def _kind(config: Mapping[str, Any]) -> str:
    """The processor by its short name; the first files, which name none, are all of ViT."""
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ViT")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    return name


def _sizes(
    config: Mapping[str, Any], kind: str, where: str
) -> tuple[tuple[int, int], tuple[int, int], Literal["shortest", "stretch"]]:
    """Size that the network takes, size aimed at, and which edge rules."""
    size = _edges(config["size"], square=kind in SQUARE)
    if kind == "ConvNext":  # up to 383 pixels it crops by itself, above that it stretches
        edge = int(size["shortest_edge"])
        if edge >= 384:
            return (edge, edge), (edge, edge), "stretch"
        aim = int(edge / config.get("crop_pct", 224 / 256))
        return (edge, edge), (aim, aim), "shortest"
    crops = config.get("do_center_crop", "crop_size" in config and kind != "EfficientNet")
    crop = config.get("crop_size") if crops else None
    cropped = None if crop is None else _edges(crop, square=True)
    if "shortest_edge" in size and "longest_edge" not in size and cropped:
        edge = int(size["shortest_edge"])
        if kind == "PoolFormer" and config.get("crop_pct", 0.9):
            edge = int(edge / config.get("crop_pct", 0.9))
        aim = int(256 / 224 * edge) if kind == "Levit" else edge
        return (int(cropped["height"]), int(cropped["width"])), (aim, aim), "shortest"
    if set(size) != {"height", "width"}:
        raise _refusal(where, "pictures that keep their own shape")
    target = int(size["height"]), int(size["width"])
    return (int(cropped["height"]), int(cropped["width"])) if cropped else target, target, "stretch"


def _edges(value: object, *, square: bool) -> dict[str, int]:
    """A size in the form of today: a dictionary of edges."""
    if isinstance(value, Mapping):
        return {str(k): int(v) for k, v in value.items() if v is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        height, width = value
        return {"height": int(height), "width": int(width)}
    if not isinstance(value, int):
        raise TypeError(f"a size must be a number or edges, found {value!r}")
    return {"height": value, "width": value} if square else {"shortest_edge": value}


def _numbers(config: Mapping[str, Any], kind: str, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of values in [0, 1] that do what the processor does to values up to 255."""
    scale = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-9 else scale
    offset = 1.0 if config.get("rescale_offset", False) else 0.0
    if not config.get("do_normalize", kind != "MobileViT"):
        return (offset / scale,) * 3, (1 / scale,) * 3
    if "image_mean" not in config or "image_std" not in config:
        raise _refusal(where, "a mean and a deviation that it does not state")
    mean, std = _three(config["image_mean"]), _three(config["image_std"])
    if config.get("include_top", kind == "EfficientNet"):  # divides twice
        std = tuple(s * s for s in std)
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)


def _three(values: Any) -> tuple[float, ...]:
    found = (float(values),) * 3 if isinstance(values, int | float) else tuple(float(v) for v in values)
    if len(found) != 3:
        raise ValueError(f"{len(found)} channels instead of 3")
    return found


def _refusal(where: str, what: str) -> BackboneError:
    return BackboneError(f"The image processor in {where} asks for {what}: give preprocess= in Python instead.")
