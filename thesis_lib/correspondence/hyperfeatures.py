"""Diffusion Hyperfeatures (Luo et al., NeurIPS 2023): all layers and time steps of a U-Net, mixed into one map."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thesis_lib import paths
from thesis_lib.checkpoint import digest


class Bottleneck(nn.Module):
    """A residual bottleneck that brings a layer's channels to a common width."""

    def __init__(self, channels: int, dim: int, groups: int = 32) -> None:
        super().__init__()
        inner = dim // 4
        norms = [nn.GroupNorm(min(groups, width // 2), width) for width in (inner, inner, dim, dim)]
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), norms[0], nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False), norms[1], nn.ReLU(),
            nn.Conv2d(inner, dim, 1, bias=False), norms[2],
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(channels, dim, 1, bias=False), norms[3])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Hyperfeatures(nn.Module):
    """An extractor that mixes another one's maps: a bottleneck a layer, a learnt softmax weight a layer and step.

    channels: of each layer, by its number. grid: side of the resulting map, (B, dim, grid, grid), under key "hyper".
    """

    keys = ["hyper"]

    def __init__(self, extractor: nn.Module, channels: dict[int, int], *, dim: int = 384, grid: int = 64) -> None:
        super().__init__()
        self.extractor, self.size, self.grid = extractor, extractor.size, grid
        self.reads_categories = getattr(extractor, "reads_categories", False)
        self.inputs = list(extractor.keys)
        layers = [_layer(key) for key in self.inputs]
        self.bottlenecks = nn.ModuleDict(
            {str(layer): Bottleneck(channels[layer], dim) for layer in sorted(set(layers))}
        )
        self.mixing = nn.Parameter(torch.ones(len(self.inputs)))
        self.logit_scale = nn.Parameter(torch.tensor(0.07).reciprocal().log())
        self.eval()

    def aggregator(self) -> dict[str, Tensor]:
        """Return the weights that training makes: bottlenecks, mixing, logit_scale."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("extractor.")}

    def describe(self) -> dict[str, Any]:
        mixed = {"kind": "hyperfeatures", "grid": self.grid, "aggregator": digest(self.aggregator().items())}
        return mixed | {"of": self.extractor.describe(), "size": self.size}

    def forward(self, x: Tensor, categories: Sequence[str] | None = None) -> dict[str, Tensor]:
        maps = self.extractor(x, categories)
        weights, mixed = self.mixing.softmax(0), 0
        for weight, key in zip(weights, self.inputs, strict=True):
            value = self.bottlenecks[str(_layer(key))](maps[key].float())
            mixed = mixed + weight * F.interpolate(value, (self.grid, self.grid), mode="bilinear", align_corners=False)
        return {"hyper": mixed}

    def save(self, path: str | Path) -> None:
        state = {name: value.contiguous() for name, value in self.aggregator().items()}
        paths.write_whole(path, partial(save_file, state))

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote; ValueError if it is of other layers, steps or widths."""
        found, own = load_file(path), self.aggregator()
        if wrong := [name for name in own if name not in found or found[name].shape != own[name].shape]:
            raise ValueError(f"{path} is an aggregator of other layers, steps or widths: {', '.join(wrong[:3])} differ")
        self.load_state_dict(found, strict=False)


def _layer(key: str) -> int:
    return int(key.split("@")[0].split(".")[0])


def channels_of(extractor: nn.Module) -> dict[int, int]:
    """Return the width of each layer of an extractor, from one blank image."""
    parameter = next(extractor.parameters())
    with torch.no_grad():
        maps = extractor(parameter.new_zeros(1, 3, extractor.size, extractor.size), None)
    return {_layer(key): value.shape[1] for key, value in maps.items()}
