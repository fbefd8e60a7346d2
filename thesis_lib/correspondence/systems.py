"""The published systems by name: which model, size, layers and time steps; and whether the weights are here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from thesis_lib import backbone as backbones
from thesis_lib import perceptual
from thesis_lib.attention import suggest
from thesis_lib.correspondence.diffusion import DiffusionFeatures, load_diffusion
from thesis_lib.correspondence.features import PixelFeatures, ViTFeatures
from thesis_lib.correspondence.hyperfeatures import Hyperfeatures, channels_of

DIFFUSION = {"SD 1.4": "CompVis/stable-diffusion-v1-4", "SD 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
DIFFUSION |= {"SD 2.1": "stabilityai/stable-diffusion-2-1", "SDXL": "stabilityai/stable-diffusion-xl-base-1.0"}
DIFFUSION |= {"SDXL-Turbo": "stabilityai/sdxl-turbo"}
DINOV2, DINOV2_REG = "vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m"
HYPER_STEPS = tuple(range(0, 1000, 98))  # 11 of the 50 inversion steps, evenly
HYPER_LAYERS = (1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15)  # every residual layer of the up-blocks


@dataclass(frozen=True)
class Part:
    """One source of features. kind: "vit", "metric" (a folder that perceptual.save wrote), "pixels", "diffusion"."""

    kind: str
    model: str
    key: str
    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """Sources and how they are put together. method: "features", or "hyper", "prompts" on top of one diffusion part."""

    parts: tuple[Part, ...]
    source: str = ""
    co_pca: tuple[int | None, ...] | None = None
    weights: tuple[float, ...] | None = None
    method: str = "features"


def _vit(model: str, layer: int, size: int, source: str, **options: Any) -> System:
    return System((Part("vit", model, str(layer), size, {"layers": [layer]} | options),), source)


def _diffusion(model: str, layer: int, step: int | str, size: int, **options: Any) -> Part:
    steps = {"steps": [step]} if isinstance(step, int) else {"average": True}
    return Part("diffusion", DIFFUSION[model], f"{layer}@{step}", size, {"layers": [layer]} | steps | options)


_TURBO = _diffusion("SDXL-Turbo", 1, "mean", 980, steps=[51, 101, 151, 201])
_REG = Part("vit", DINOV2_REG, "11", 434, {"layers": [11]})
_SD_LAYERS = tuple(_diffusion("SD 1.5", layer, 100, 960, layers=[3, 7, 11]) for layer in (3, 7, 11))

SYSTEMS: dict[str, System] = {
    "position": System((Part("pixels", "position", "position"),)),
    "colour": System((Part("pixels", "colour", "colour"),)),
    "DINO ViT-S/8": _vit("vit_small_patch8_224.dino", 9, 224, "Caron et al. 2021"),
    "DINO ViT-S/8 keys": System(
        (Part("vit", "vit_small_patch8_224.dino", "9.key", 224, {"layers": [9], "facets": ["key"]}),),
        "Amir et al. 2022",
    ),
    "DINOv2 ViT-B/14": _vit(DINOV2, 11, 840, "Oquab et al. 2023"),
    "CLIP ViT-L/14": _vit("vit_large_patch14_clip_quickgelu_336.openai", 11, 336, "Radford et al. 2021"),
    "MAE ViT-L/16": _vit("vit_large_patch16_224.mae", 23, 224, "He et al. 2022"),
    "SD 1.5": System((_diffusion("SD 1.5", 5, 201, 768),), "Rombach et al. 2022"),
    "DIFT (SD 2.1)": System((_diffusion("SD 2.1", 8, 261, 768, ensemble=8),), "Tang et al. 2023"),
    "SDXL": System((_diffusion("SDXL", 1, 101, 768),), "Podell et al. 2023"),
    "SDXL-Turbo": System((_diffusion("SDXL-Turbo", 1, 101, 768),), "Sauer et al. 2023"),
    "Hyperfeatures (SD 1.5)": System(
        (_diffusion("SD 1.5", 1, 0, 512, layers=HYPER_LAYERS, steps=HYPER_STEPS, noise="invert"),),
        "Luo et al. 2023",
        method="hyper",
    ),
    "Prompt optimisation (SD 1.4)": System(
        (_diffusion("SD 1.4", 8, 141, 512),), "Hedlin et al. 2023", method="prompts"
    ),
    "SD + DINO": System(
        (*_SD_LAYERS, Part("vit", DINOV2, "11", 840, {"layers": [11]})),
        "Zhang et al. 2023",
        co_pca=(256, 256, 256, None),
        weights=(3**-0.5, 3**-0.5, 3**-0.5, 1.0),
    ),
    "SDXL-Turbo + DINOv2": System((_TURBO, _REG), "Fundel et al. 2025: the teacher"),
}


def get(name: str) -> System:
    """Look a system up; ValueError names the near ones."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}{suggest(name, SYSTEMS)}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def is_present(part: Part, weights: Mapping[str, str | Path] | None = None) -> bool:
    """Say whether a part's weights are on this machine: in a file or folder named for its model, or in the hub's cache.

    Nothing is asked of the network.
    """
    if part.kind == "pixels" or part.model == "demo" or part.model in (weights or {}):
        return True
    if part.kind == "metric":
        return (Path(part.model) / "metric.json").is_file()
    if part.kind == "diffusion":
        return isinstance(try_to_load_from_cache(part.model, "model_index.json"), str)
    config = timm.get_pretrained_cfg(part.model)
    files = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
    if config and config.hf_hub_id and any(isinstance(try_to_load_from_cache(config.hf_hub_id, f), str) for f in files):
        return True
    url = config.url if config else None
    return bool(url) and (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]).is_file()


def build(
    part: Part, *, device: str = "cpu", weights: Mapping[str, str | Path] | None = None, dtype: str = "float32"
) -> nn.Module:
    """Build a part's extractor, frozen, in eval mode, on a device.

    weights: a weight file (timm) or folder (diffusers) by model name, where they are not in the hub's cache.
    Raises FileNotFoundError for weights that are not present: nothing is fetched here.
    """
    if not is_present(part, weights):
        raise FileNotFoundError(
            f"the weights of {part.model} are not present: fetch them once (by timm.create_model with "
            "pretrained=True, or huggingface-cli download), or name their file or folder in `weights`"
        )
    options, local = dict(part.options), (weights or {}).get(part.model)
    if part.kind == "pixels":
        return PixelFeatures(part.model, size=part.size).to(device)
    if part.kind == "diffusion":
        source = str(local or part.model)
        return load_diffusion(source, device=device, dtype=dtype, size=part.size, **options)
    if part.kind == "metric":
        backbone = perceptual.load(part.model)[0].backbone
    else:
        mixer = {name: options.pop(name) for name in ("mixer", "pretrained") if name in options}
        mixer |= options.pop("mixer_options", {})
        backbone = backbones.create(part.model, img_size=part.size, **{"pretrained": local or True} | mixer)
    return ViTFeatures(backbone.requires_grad_(False).eval(), **options).to(device)


def hyperfeatures(extractor: DiffusionFeatures, aggregator: str | Path | None = None) -> Hyperfeatures:
    """Put Hyperfeatures' aggregator on a diffusion part; without a file of its weights it is yet to be trained."""
    device = next(extractor.parameters()).device
    model = Hyperfeatures(extractor, channels_of(extractor)).to(device)
    if aggregator is not None:
        model.load(aggregator)
    return model


def missing(names: Sequence[str], weights: Mapping[str, str | Path] | None = None) -> dict[str, str]:
    """Name the systems that cannot be run here, each with its first absent model."""
    found = {}
    for name in names:
        absent = [part.model for part in get(name).parts if not is_present(part, weights)]
        if get(name).method == "hyper" and not absent and "hyperfeatures" not in (weights or {}):
            absent = ["hyperfeatures"]
        if absent:
            found[name] = absent[0]
    return found
