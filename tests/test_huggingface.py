"""Networks of Hugging Face transformers: cuts, equality with the original, files, preparation of pictures, refusals."""

from __future__ import annotations

import functools
import importlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from regraft.backbone import load_backbone, weights_digest
from regraft.errors import BackboneError
from regraft.graph import Trace, trace
from regraft.networks.huggingface import MODEL_TYPES, config_of, create, create_from_config, licence_of, preprocess_of
from regraft.preprocess import PreprocessSpec, fit_to_size, normalise, plain_spec
from whole_and_parts import assert_a_step_trains, assert_parts_are_the_whole, blocks_and_cuts, pictures, some

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
HEADS = {"num_attention_heads": [1, 1, 2, 2], "image_size": 64}
WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 14}
DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
# model type: values of its configuration, size of a picture, classes of its blocks, how many there are
FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[str, ...], int]] = {
    "vit": ({**PATCHES, **DROPOUT}, 32, ("ViTLayer",), 3),
    "dinov2": ({**DINO, "image_size": 56, "drop_path_rate": 0.5}, 42, ("Dinov2Layer",), 3),
    "convnext": ({**STAGES, "drop_path_rate": 0.5}, 64, ("ConvNextLayer",), 5),
    "resnet": ({**STAGES, "embedding_size": 8}, 64, ("ResNetBottleNeckLayer",), 5),
    "swin": ({**WINDOWS, "drop_path_rate": 0.5}, 64, ("SwinLayer",), 4),
    "mobilenet_v2": ({"depth_multiplier": 0.35, "image_size": 64}, 64, ("MobileNetV2InvertedResidual",), 16),
}
OTHERS: dict[str, tuple[dict[str, Any], int, tuple[str, ...], int]] = {
    "beit": ({**PATCHES, "use_relative_position_bias": True}, 32, ("BeitLayer",), 3),
    "bit": ({**STAGES, "embedding_size": 8, "num_groups": 4}, 64, ("BitPreActivationBottleneckLayer",), 5),
    "clip_vision_model": (PATCHES, 32, ("CLIPEncoderLayer",), 3),
    "convnextv2": (STAGES, 64, ("ConvNextV2Layer",), 5),
    "cvt": ({"embed_dim": [8, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, 64, ("CvtLayer",), 6),
    "data2vec-vision": (PATCHES, 32, ("Data2VecVisionLayer",), 3),
    "deit": (PATCHES, 32, ("DeiTLayer",), 3),
    "dinov2_with_registers": ({**DINO, "image_size": 56}, 42, ("Dinov2WithRegistersLayer",), 3),
    "dinov3_convnext": (STAGES, 64, ("DINOv3ConvNextLayer",), 5),
    "dinov3_vit": (PATCHES, 32, ("DINOv3ViTLayer",), 3),
    "efficientnet": (
        {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64, "hidden_dim": 320},
        64,
        ("EfficientNetBlock",),
        10,
    ),
    "focalnet": ({"embed_dim": 8, "depths": [1, 1, 2, 1], "image_size": 64}, 64, ("FocalNetLayer",), 5),
    "hgnet_v2": ({}, 64, ("HGNetV2BasicLayer",), 6),
    "ijepa": (PATCHES, 32, ("IJepaLayer",), 3),
    "levit": (
        {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
        224,
        ("LevitResidualLayer",),
        8,
    ),
    "mobilenet_v1": ({"depth_multiplier": 0.25, "image_size": 64}, 64, ("MobileNetV1ConvLayer",), 27),
    "mobilevit": (
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "image_size": 64},
        64,
        ("MobileViTLayer", "MobileViTMobileNetLayer"),
        5,
    ),
    "mobilevitv2": (
        {"width_multiplier": 0.25, "base_attn_unit_dims": [32, 48, 64], "image_size": 64},
        64,
        ("MobileViTV2Layer", "MobileViTV2MobileNetLayer"),
        5,
    ),
    "poolformer": (STAGES, 64, ("PoolFormerLayer",), 5),
    "pvt": ({**STAGES, **HEADS}, 64, ("PvtLayer",), 5),
    "pvt_v2": ({**STAGES, **HEADS}, 64, ("PvtV2BlockLayer",), 5),
    "regnet": ({**STAGES, "embedding_size": 8, "groups_width": 8}, 64, ("RegNetXLayer", "RegNetYLayer"), 5),
    "segformer": ({**STAGES, **HEADS}, 64, ("SegformerLayer",), 5),
    "siglip_vision_model": (PATCHES, 32, ("SiglipEncoderLayer",), 3),
    "swiftformer": ({"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, 64, ("SwiftFormerEncoderBlock",), 4),
    "swinv2": (WINDOWS, 64, ("Swinv2Layer",), 4),
    "vit_msn": (PATCHES, 32, ("ViTMSNLayer",), 3),
}
CLASSES = {"id2label": {str(i): f"kind {i}" for i in range(5)}, "label2id": {f"kind {i}": i for i in range(5)}}


def original(model_type: str, seed: int = 0) -> nn.Module:
    """The network as transformers makes it, with a classifier where there is one, and with nothing that starts at 0."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **(FAMILIES | OTHERS)[model_type][0], **CLASSES)
    kind = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(
        type(config), transformers.MODEL_MAPPING[type(config)]
    )
    torch.manual_seed(seed)
    module: nn.Module = (kind[0] if isinstance(kind, tuple) else kind)(config)
    with torch.no_grad():
        for p in module.parameters():
            if bool((p == p.mean()).all()):
                p.add_(torch.randn_like(p), alpha=0.1)
        for name, b in module.named_buffers():
            if "running" in name:
                b.add_(torch.rand_like(b), alpha=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the files of a network, made when it is first asked for."""
    root = tmp_path_factory.mktemp("networks")

    @functools.cache
    def folder(model_type: str) -> Path:
        original(model_type).save_pretrained(root / model_type)  # type: ignore[operator]
        return root / model_type

    return folder


@functools.cache
def traced(folder: Path, side: int) -> Trace:
    return trace(create(str(folder), pretrained=True), torch.zeros(1, 3, side, side))


@pytest.fixture
def changed(folders: Any, tmp_path: Path) -> Any:
    """A copy of the files of a network, with some values of config.json changed and more files added."""

    def copy(model_type: str = "vit", config: dict[str, Any] | None = None, **files: str) -> Path:
        place = tmp_path / "copy"
        place.mkdir()
        for path in folders(model_type).iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        values = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(values | (config or {})))
        for name, text in files.items():
            (place / name.replace("__", ".")).write_text(text)
        return place

    return copy


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and an empty cache of the hub, which this is."""
    from huggingface_hub import constants

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# ---- the network is that of transformers, and falls apart after every block ---------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_network_gives_what_transformers_gives(model_type: str, folders: Any) -> None:
    x = pictures(FAMILIES[model_type][1])
    with torch.no_grad():
        theirs = original(model_type)(pixel_values=x).logits
        assert torch.equal(create(str(folders(model_type)), pretrained=True)(x), theirs)
    assert theirs.shape == (2, 5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_network_falls_apart_after_every_block(model_type: str, folders: Any) -> None:
    _, side, kinds, count = FAMILIES[model_type]
    network = traced(folders(model_type), side)
    blocks, cuts = blocks_and_cuts(network, kinds)
    print(f"{model_type:22s} cuts {len(network.cuts):4d}   shown {len(some(network, 99)):3d}   blocks {len(cuts):3d}")
    assert (len(blocks), cuts) == (count, blocks)
    assert_parts_are_the_whole(network, side, some(network, 3))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_step_trains_the_part_above_a_cut(model_type: str, folders: Any) -> None:
    _, side, kinds, _ = FAMILIES[model_type]
    network = traced(folders(model_type), side)
    assert_a_step_trains(network, side, blocks_and_cuts(network, kinds)[1][-2])


def test_every_model_type_has_a_network_here() -> None:
    assert sorted(FAMILIES | OTHERS) == sorted(MODEL_TYPES)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type_keeps_the_contract(model_type: str, folders: Any) -> None:
    _, side, kinds, count = (FAMILIES | OTHERS)[model_type]
    network = traced(folders(model_type), side)
    blocks, cuts = blocks_and_cuts(network, kinds)
    print(f"{model_type:22s} cuts {len(network.cuts):4d}   shown {len(some(network, 99)):3d}   blocks {len(cuts):3d}")
    assert (len(blocks), cuts) == (count, blocks)
    assert_parts_are_the_whole(network, side, some(network, 6))
    with torch.no_grad():
        theirs = original(model_type)(pixel_values=pictures(side))
        ours = create(str(folders(model_type)), pretrained=True)(pictures(side))
    assert any(
        torch.equal(ours, value.reshape(ours.shape)) for value in theirs.values() if value.numel() == ours.numel()
    )
    again = create_from_config(json.loads(json.dumps(config_of(network.module))))
    again.load_state_dict(network.module.state_dict())
    with torch.no_grad():
        assert torch.equal(again(pictures(side)), ours)


@pytest.mark.slow
def test_windows_as_large_as_the_last_map_are_cut_at_the_size_of_imagenet(tmp_path: Path) -> None:
    import transformers

    config = transformers.SwinConfig(embed_dim=8, depths=[1, 1, 2, 2], num_heads=[1, 1, 2, 2])
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path)
    network = traced(tmp_path, 224)
    blocks, cuts = blocks_and_cuts(network, ["SwinLayer"])
    assert (len(blocks), cuts) == (6, blocks)
    assert_parts_are_the_whole(network, 224, some(network, 3))


# ---- without a classifier -----------------------------------------------------------------------------------------


def saved(place: Path, module: nn.Module) -> Path:
    module.save_pretrained(place)  # type: ignore[operator]
    return place


def test_a_network_without_a_classifier_returns_pooled_features(tmp_path: Path) -> None:
    import transformers

    module = transformers.ResNetModel(transformers.ResNetConfig(**FAMILIES["resnet"][0])).eval()
    x = pictures(64)
    with torch.no_grad():
        ours = create(str(saved(tmp_path, module)), pretrained=True)(x)
        assert torch.equal(ours, module(pixel_values=x).pooler_output.flatten(1))
    assert ours.shape == (2, 32)


def test_a_network_whose_pooling_was_never_trained_returns_its_last_values(tmp_path: Path) -> None:
    import transformers

    module = transformers.ViTModel(transformers.ViTConfig(**PATCHES), add_pooling_layer=False).eval()
    x = pictures(32)
    loaded = create(str(saved(tmp_path, module)), pretrained=True)
    again = create_from_config(config_of(loaded))
    again.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(x), module(pixel_values=x).last_hidden_state)
        assert torch.equal(again(x), loaded(x))


# ---- random weights, and building again ---------------------------------------------------------------------------


def test_random_weights_come_from_the_seed_and_leave_the_state_of_the_caller(folders: Any) -> None:
    folder = str(folders("vit"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    made = [create(folder, pretrained=False, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    weights = [m.get_parameter("vit.layers.0.mlp.fc1.weight") for m in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not made[0].training


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_network_is_built_again_from_its_description(model_type: str, folders: Any) -> None:
    module = create(str(folders(model_type)), pretrained=True)
    again = create_from_config(json.loads(json.dumps(config_of(module))))
    again.load_state_dict(module.state_dict())
    x = pictures(FAMILIES[model_type][1])
    with torch.no_grad():
        assert torch.equal(again(x), module(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "must be an image network that regraft knows; found 'llama'"),
        ({"model_type": None}, "found None"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "brings its own code"),
        ({"nested": [{"auto_map": {}}]}, "brings its own code"),
        ({"hidden_act": "exec"}, "must describe a network that transformers can build; KeyError"),
        ({"hidden_size": "wide"}, "must describe a network that transformers can build"),
    ],
)
def test_a_description_of_anything_else_is_refused(change: dict[str, Any], message: str, folders: Any) -> None:
    description = config_of(create(str(folders("vit")), pretrained=False))
    with pytest.raises(BackboneError, match=message):
        create_from_config({**description, "config": {**description["config"], **change}})


def test_a_description_takes_no_more_memory_than_its_weights(folders: Any) -> None:
    module = create(str(folders("vit")), pretrained=True)
    held = sum(tensor.numel() for tensor in module.state_dict().values())
    description = config_of(module)
    assert create_from_config(description, at_most=held)(pictures(32)).shape == (2, 5)
    huge = {**description, "config": {**description["config"], "intermediate_size": 100_000, "hidden_size": 100_000}}
    with pytest.raises(BackboneError, match=f"asks for [0-9,]+ numbers; at most {held:,} may be in its weights"):
        create_from_config(huge, at_most=held)
    with pytest.raises(BackboneError, match="must be at most 100,000; found 1,000,000,000"):
        create_from_config({**huge, "config": {**huge["config"], "num_hidden_layers": 10**9}})


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, r"described by class and config; found \[\]"),
        ({"class": "PreTrainedModel", "config": {"model_type": "vit"}}, "must be ViTModel; found 'PreTrainedModel'"),
        ({"class": "SwinForImageClassification", "config": {"model_type": "vit"}}, "must be ViTModel; found 'Swin"),
    ],
)
def test_a_description_of_another_class_is_refused(description: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        create_from_config(description)


def test_where_the_files_lie_is_no_part_of_a_network(folders: Any, changed: Any) -> None:
    one, other = (create(str(folder), pretrained=True) for folder in (folders("vit"), changed()))
    assert weights_digest(one, "") == weights_digest(other, "")
    assert config_of(one) == config_of(other)


# ---- files --------------------------------------------------------------------------------------------------------


def test_code_that_a_folder_brings_along_is_never_run(changed: Any, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
    place = changed(config={"auto_map": {"AutoModelForImageClassification": "own.Own"}}, own__py=code)
    with pytest.raises(BackboneError, match=r"config\.json brings its own code"):
        create(str(place), pretrained=True)
    assert not (tmp_path / "canary").exists()


class Canary:
    """Makes a file when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_are_read_as_tensors_alone(changed: Any, tmp_path: Path) -> None:
    place = changed()
    state = create(str(place), pretrained=True).state_dict()
    (place / "model.safetensors").unlink()
    torch.save(state, place / "pytorch_model.bin")
    loaded = create(str(place), pretrained=True).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    torch.save({**state, "more": Canary(tmp_path / "canary")}, place / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="must be whole and those of ViTForImageClassification"):
        create(str(place), pretrained=True)
    assert not (tmp_path / "canary").exists()
    torch.load(place / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_safetensors_are_preferred_to_pickles(changed: Any) -> None:
    place = changed()
    (place / "pytorch_model.bin").write_bytes(b"no weights at all")
    assert create(str(place), pretrained=True)(pictures(32)).shape == (2, 5)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_weights_that_end_early_are_refused(length: int, changed: Any) -> None:
    place = changed()
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:length])
    with pytest.raises(BackboneError, match="must be whole and those of ViTForImageClassification") as caught:
        create(str(place), pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 4}, r"16 are missing or of another shape \(vit\.layers\.3\."),
        ({"intermediate_size": 96}, "must be whole and those of ViTForImageClassification"),
        ({"model_type": "convnext"}, "must hold every tensor of ConvNextModel"),
    ],
)
def test_weights_of_another_network_are_refused(config: dict[str, Any], message: str, changed: Any) -> None:
    with pytest.raises(BackboneError, match=message):
        create(str(changed(config=config)), pretrained=True)


@pytest.mark.parametrize("text", ["{", "[]", '"vit"', "\x00", "[" * 100_000])
def test_a_damaged_description_is_refused(text: str, changed: Any) -> None:
    with pytest.raises(BackboneError, match=r"config\.json must (be a JSON file|hold a JSON object)"):
        create(str(changed(config__json=text)), pretrained=True)


def test_quantised_weights_are_refused(changed: Any) -> None:
    with pytest.raises(BackboneError, match="says that they are quantised"):
        create(str(changed(config={"quantization_config": {"quant_method": "gptq"}})), pretrained=True)


def test_attention_from_elsewhere_is_not_taken(changed: Any) -> None:
    place = changed(config={"_attn_implementation": "somebody/kernel", "attn_implementation": "somebody/kernel"})
    module: Any = create(str(place), pretrained=True)
    assert module.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("name", ["nowhere", "resnet18"])
def test_what_is_neither_a_name_of_the_hub_nor_a_folder_is_refused(name: str) -> None:
    with pytest.raises(BackboneError, match=f"'{name}' is neither"):
        create(name, pretrained=True)


# ---- the hub and its cache ----------------------------------------------------------------------------------------


def test_a_network_in_the_cache_is_loaded_without_asking_the_hub(unreachable: Path, changed: Any) -> None:
    place = changed()
    cached = unreachable / "models--some--net"
    (cached / "refs").mkdir(parents=True)
    (cached / "snapshots").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    place.rename(cached / "snapshots" / ("0" * 40))
    assert create("hf/some/net", pretrained=True)(pictures(32)).shape == (2, 5)


@pytest.mark.parametrize("partial", [False, True])
def test_a_network_that_cannot_be_had_is_missed_in_one_sentence(unreachable: Path, changed: Any, partial: bool) -> None:
    if partial:
        place = changed()
        (place / "model.safetensors").unlink()
        snapshots = unreachable / "models--some--net" / "snapshots"
        snapshots.mkdir(parents=True)
        (snapshots.parent / "refs").mkdir()
        (snapshots.parent / "refs" / "main").write_text("0" * 40)
        place.rename(snapshots / ("0" * 40))
    with pytest.raises(BackboneError) as caught:
        create("hf/some/net", pretrained=True)
    sentence = str(caught.value)
    assert str(unreachable) in sentence
    assert "https://huggingface.co" in sentence
    assert "\n" not in sentence


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(folders("vit"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match=r"run `pip install regraft\[hf\]`\.$"):
        create(folder, pretrained=True)


# ---- preparation of pictures and licence --------------------------------------------------------------------------

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit.ViT", {}),
    "deit": ("deit.DeiT", {}),
    "convnext, cropped": ("convnext.ConvNext", {"size": {"shortest_edge": 224}}),
    "convnext, stretched": ("convnext.ConvNext", {"size": {"shortest_edge": 384}}),
    "dinov2": ("bit.Bit", {"size": {"shortest_edge": 256}}),
    "mobilenet_v2": ("mobilenet_v2.MobileNetV2", {}),
    "efficientnet": ("efficientnet.EfficientNet", {"resample": 0, "image_std": [0.4, 0.45, 0.5]}),
    "efficientnet, offset": ("efficientnet.EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "levit": ("levit.Levit", {}),
    "poolformer": ("poolformer.PoolFormer", {}),
    "clip": ("clip.CLIP", {}),
    "siglip": ("siglip.Siglip", {}),
    "not normalised": ("vit.ViT", {"do_normalize": False}),
    "not rescaled": ("vit.ViT", {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3}),
}


def spec_with(changed: Any, processor: dict[str, Any]) -> PreprocessSpec:
    folder = changed(preprocessor_config__json=json.dumps(processor))
    return preprocess_of(create(str(folder), pretrained=False))


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_transformers_does(name: str, changed: Any) -> None:
    kind, options = PROCESSORS[name]
    module, class_name = kind.split(".")
    home = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    theirs = getattr(home, f"{class_name}ImageProcessorPil")(**options)
    folder = changed()
    theirs.save_pretrained(folder)
    spec = preprocess_of(create(str(folder), pretrained=False))
    pixels = np.random.default_rng(0).integers(0, 256, (320, 440, 3)).astype(np.uint8)
    ours = normalise(fit_to_size(pixels, spec)[None], spec)
    expected = theirs(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "size", "aim", "resize", "interpolation"),
    [
        ({"size": 224}, 224, 224, "stretch", "bilinear"),
        ({"size": 224, "resample": 3, "feature_extractor_type": "ViTFeatureExtractor"}, 224, 224, "stretch", "bicubic"),
        (
            {"size": 224, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor"},
            224,
            256,
            "shortest",
            "",
        ),
        ({"size": 256, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"}, 224, 256, "stretch", ""),
        ({"size": [192, 160], "image_processor_type": "ViTImageProcessorFast"}, (192, 160), (192, 160), "stretch", ""),
    ],
)
def test_files_of_older_versions_are_understood(
    processor: dict[str, Any], size: Any, aim: Any, resize: str, interpolation: str, changed: Any
) -> None:
    spec = spec_with(changed, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **processor})
    assert spec.size == (size if isinstance(size, tuple) else (size, size))
    assert spec.resize_to == (aim if isinstance(aim, tuple) else (aim, aim))
    assert spec.resize == resize
    assert spec.interpolation == (interpolation or spec.interpolation)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"do_flip_channel_order": True}, "asks for do_flip_channel_order"),
        ({"do_pad": True}, "asks for do_pad"),
        ({"do_resize": False}, "asks for pictures that are not resized"),
        ({"resample": 1}, r"asks for the filter 1; known are 0 \(nearest\), 2 \(bilinear\), 3 \(bicubic\)"),
        ({"size": {"shortest_edge": 224}}, "asks for pictures that keep their own shape"),
        ({"size": {"longest_edge": 224}}, "asks for pictures that keep their own shape"),
        ({"image_mean": None}, r"must hold sizes, means and deviations as transformers writes them \(TypeError"),
        ({"image_mean": [0.5]}, r"must hold sizes, means and deviations .*1 channels instead of 3"),
        ({"size": "large"}, "must hold sizes, means and deviations"),
        ({"size": {"height": 224, "width": "x"}}, "must hold sizes, means and deviations"),
    ],
)
def test_preparations_that_a_spec_cannot_say_are_refused(processor: dict[str, Any], message: str, changed: Any) -> None:
    values = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **processor}
    with pytest.raises(BackboneError, match=message):
        spec_with(changed, values)


def test_a_mean_that_is_not_stated_is_not_guessed(changed: Any) -> None:
    with pytest.raises(BackboneError, match="asks for a mean and a deviation that it does not state"):
        spec_with(changed, {"size": 224})


def test_a_network_that_states_no_preparation_says_so(folders: Any) -> None:
    module = create(str(folders("vit")), pretrained=False)
    with pytest.raises(BackboneError, match=r"needs preprocessor_config\.json.* has none: add it, or give preprocess="):
        preprocess_of(module)
    size = module.config.image_size
    found = load_backbone(str(folders("vit")), preprocess=plain_spec(size, size, 3))
    assert found.preprocess == plain_spec(size, size, 3)


def test_the_processor_inside_a_larger_file_is_found(changed: Any) -> None:
    inner = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    folder = changed(processor_config__json=json.dumps({"image_processor": inner}))
    assert preprocess_of(create(str(folder), pretrained=False)).size == (32, 32)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\ntags: [x]\nlicense: apache-2.0\n---\n# A network", "apache-2.0"),
        ("---\nlicense: 'cc-by-nc-4.0'\n---\n", "cc-by-nc-4.0"),
        ("---\ntags: [x]\n---\nlicense: apache-2.0", None),
        ("# A network", None),
    ],
)
def test_the_licence_is_that_of_the_model_card(card: str, licence: str | None, changed: Any) -> None:
    assert licence_of(create(str(changed(README__md=card)), pretrained=False)) == licence
