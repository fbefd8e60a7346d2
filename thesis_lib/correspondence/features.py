"""Dense features of images: from any timm ViT with any mixer, from pixels, from where a pixel is; and combinations.

An extractor is a module that maps images (B, 3, S, S) in [0, 1] and their categories to {key: (B, C, h, w)}; its
`size` is S, `describe()` says in plain JSON all that its features depend on. Keys name layer and facet or time step.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from thesis_lib import backbone as backbones
from thesis_lib.attention import suggest
from thesis_lib.attention.soft import without_autocast
from thesis_lib.checkpoint import digest
from thesis_lib.datasets.missing import choose
from thesis_lib.datasets.pixels import read_rgb
from thesis_lib.perceptual import DTYPES

FACETS = ("token", "query", "key", "value")
GEOMETRIES = ("squash", "pad")


def read_image(path: Path, size: int, geometry: str = "squash") -> Tensor:
    """Decode an image to (3, size, size) uint8: squashed to the square (bicubic), or padded to one (Lanczos, centred).

    `to_frame` and `from_frame` map points along.
    """
    image = read_rgb(path.read_bytes(), path)
    if choose(geometry, GEOMETRIES, "geometry") == "squash":
        square = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        scale, (left, top) = _padding(image.size, size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        square = Image.new("RGB", (size, size))
        square.paste(image.resize((width, height), Image.Resampling.LANCZOS), (round(left), round(top)))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def to_frame(points: Tensor, image_size: Sequence[int], size: int) -> Tensor:
    """Map points (P, 2) of an image to its padded square."""
    scale, offset = _padding(image_size, size)
    return points * scale + points.new_tensor(offset)


def from_frame(points: Tensor, image_size: Sequence[int], size: int) -> Tensor:
    """Map points (P, 2) of a padded square back to its image; those of the padding fall outside."""
    scale, offset = _padding(image_size, size)
    return (points - points.new_tensor(offset)) / scale


def _padding(image_size: Sequence[int], size: int) -> tuple[float, tuple[int, int]]:
    width, height = (int(side) for side in image_size)
    scale = size / max(width, height)
    return scale, ((size - round(width * scale)) // 2, (size - round(height * scale)) // 2)


class ViTFeatures(nn.Module):
    """Tokens, queries, keys or values of chosen blocks of a timm ViT as maps; keys such as "5" and "5.key".

    layers: blocks, negative ones from the end. norm: pass tokens through the final norm. Images are normalised with the
    model's own mean and standard deviation. Raises ValueError for a facet that a block's mixer does not have.
    """

    def __init__(
        self, backbone: nn.Module, layers: Sequence[int] = (-1,), facets: Sequence[str] = ("token",), norm: bool = False
    ) -> None:
        super().__init__()
        depth = len(backbone.blocks)
        if wrong := [layer for layer in layers if not -depth <= layer < depth]:
            raise ValueError(f"layers {wrong} are not among the model's {depth} blocks")
        if wrong := [facet for facet in facets if facet not in FACETS]:
            raise ValueError(f"unknown facet {wrong[0]!r}{suggest(wrong[0], FACETS)}; known: {', '.join(FACETS)}")
        self.backbone, self.facets, self.norm = backbone, tuple(facets), norm
        self.layers = sorted({layer % depth for layer in layers})
        for layer in self.layers:
            for facet in self.facets:
                _projection(backbone.blocks[layer].attn, facet)  # a mixer without it is reported now
        height, width = backbone.patch_embed.img_size
        if height != width:
            raise ValueError(f"features are taken from square images, not {height}x{width}")
        self.size = height
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbones.normalization(backbone))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.train(backbone.training)

    @property
    def keys(self) -> list[str]:
        return [key_of(layer, facet) for layer in self.layers for facet in self.facets]

    def describe(self) -> dict[str, Any]:
        weights = digest(self.backbone.state_dict().items())
        about = {"kind": "vit", "recipe": getattr(self.backbone, "recipe", None), "weights": weights}
        return about | {"layers": self.layers, "facets": self.facets, "norm": self.norm, "size": self.size}

    def forward(self, x: Tensor, categories: Sequence[str] | None = None) -> dict[str, Tensor]:
        seen: dict[int, Tensor] = {}
        hooks = [
            self.backbone.blocks[layer].attn.register_forward_pre_hook(
                lambda _, inputs, layer=layer: seen.__setitem__(layer, inputs[0])
            )
            for layer in self.layers
            if self.facets != ("token",)
        ]
        options = {"norm": self.norm, "stop_early": not self.norm, "intermediates_only": True}
        try:
            tokens = self.backbone.forward_intermediates((x - self.mean) / self.std, indices=self.layers, **options)
        finally:
            for hook in hooks:
                hook.remove()
        maps = {}
        for layer, token in zip(self.layers, tokens, strict=True):
            for facet in self.facets:
                maps[key_of(layer, facet)] = token if facet == "token" else self._facet(layer, facet, seen, token)
        return maps

    def _facet(self, layer: int, facet: str, seen: Mapping[int, Tensor], token: Tensor) -> Tensor:
        linear, part = _projection(self.backbone.blocks[layer].attn, facet)
        values = linear(seen[layer])[:, self.backbone.num_prefix_tokens :].mT  # (B, D or 3D, h*w)
        values = values if part is None else values.chunk(3, dim=1)[part]
        return values.unflatten(2, token.shape[2:])


def key_of(layer: int, facet: str = "token") -> str:
    return f"{layer}" if facet == "token" else f"{layer}.{facet}"


def _projection(mixer: nn.Module, facet: str) -> tuple[nn.Module | None, int | None]:
    """Return the layer that makes a facet of every token, and which third of its output it is."""
    if facet == "token":
        return None, None
    part = FACETS.index(facet) - 1
    for name, third in (("qkv", part), (facet[0], None)):
        layer = getattr(mixer, name, None)
        if hasattr(layer, "in_features"):
            return layer, third
    raise ValueError(f"the mixer {getattr(mixer, 'name', type(mixer).__name__)!r} makes no {facet} of every token")


class PixelFeatures(nn.Module):
    """What needs no model: "colour", the mean colour of each cell, or "position", where the cell is.

    A cell's position is a vector of cosines and sines whose inner products fall with the distance: the best match of a
    point is the point itself, in every image.
    """

    KINDS = ("colour", "position")

    def __init__(self, kind: str, grid: int = 16, size: int = 64) -> None:
        super().__init__()
        self.kind, self.grid, self.size = choose(kind, self.KINDS, "pixel feature"), grid, size
        self.keys = [kind]
        self.eval()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "grid": self.grid, "size": self.size}

    def forward(self, x: Tensor, categories: Sequence[str] | None = None) -> dict[str, Tensor]:
        if self.kind == "colour":
            return {"colour": F.adaptive_avg_pool2d(x, self.grid) - 0.5}
        at = (torch.arange(self.grid, device=x.device) + 0.5) / self.grid
        waves = at[None] * torch.pi * torch.arange(1, 9, device=x.device)[:, None]  # (8, g)
        code = torch.cat([waves.cos(), waves.sin()])  # (16, g)
        rows, columns = code[:, :, None].expand(-1, -1, self.grid), code[:, None, :].expand(-1, self.grid, -1)
        return {"position": torch.cat([rows, columns])[None].repeat(len(x), 1, 1, 1)}


@torch.inference_mode()
def extract(
    extractor: nn.Module, images: Tensor, categories: Sequence[str] | None = None, *, dtype: str = "float32"
) -> dict[str, Tensor]:
    """Return the features of uint8 images (B, 3, S, S) on the extractor's device, without gradients, as float16.

    dtype: float32, or bfloat16, float16 by autocast. Raises RuntimeError for an extractor in training mode or
    features that float16 cannot hold, ValueError for images of another size or an unknown dtype.
    """
    if any(module.training for module in extractor.modules()):
        raise RuntimeError("the extractor is in training mode, its features would be random: call eval() first")
    if images.shape[1:] != (3, extractor.size, extractor.size) or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (B, 3, {extractor.size}, {extractor.size}), got {tuple(images.shape)}")
    device = next((tensor.device for tensor in [*extractor.parameters(), *extractor.buffers()]), torch.device("cpu"))
    precision = DTYPES[choose(dtype, DTYPES, "dtype")]
    with torch.autocast(device.type, precision, enabled=dtype != "float32"):
        maps = extractor(images.to(device).float() / 255, categories)
    halves = {key: value.half().cpu() for key, value in maps.items()}
    if wrong := [key for key, value in halves.items() if not value.isfinite().all()]:
        raise RuntimeError(f"features {', '.join(wrong)} are not finite in float16: extract them with dtype float32")
    return halves


def combine(maps: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Put maps (C_i, h_i, w_i) of several sources side by side, on the largest grid, each normalised at every cell.

    weights scale the sources (Zhang et al. 2023); equal by default. A single map comes back as it is.
    """
    if len(maps) == 1:
        return maps[0]
    grid = max((m.shape[1:] for m in maps), key=lambda shape: shape[0] * shape[1])
    weights = [1.0] * len(maps) if weights is None else weights
    parts = []
    for m, weight in zip(maps, weights, strict=True):
        if m.shape[1:] != grid:
            m = F.interpolate(m[None], grid, mode="bilinear", align_corners=False)[0]
        parts.append(weight * F.normalize(m, dim=0))
    return torch.cat(parts)


def co_pca(source: Tensor, target: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Project two maps (C, h, w) onto the leading principal components of both together (Zhang et al. 2023)."""
    cells = torch.cat([source.flatten(1), target.flatten(1)], dim=1).mT  # (n, C)
    with without_autocast(cells):
        centred = cells - cells.mean(0)
        _, axes = torch.linalg.eigh(centred.mT @ centred)  # ascending
        projected = centred @ axes[:, -min(dims, axes.shape[1]) :]  # (n, dims)
    first, second = projected.split([source[0].numel(), target[0].numel()])
    return first.mT.unflatten(1, source.shape[1:]), second.mT.unflatten(1, target.shape[1:])


def principal(maps: Tensor, dims: int) -> Tensor:
    """Return the leading principal components of maps (B, C, h, w) over all their cells: (B, dims, h, w)."""
    cells = maps.movedim(1, -1)  # (B, h, w, C)
    with without_autocast(maps):  # a GPU has no decomposition in half precision
        centred = cells - cells.flatten(0, 2).mean(0)
        flat = centred.flatten(0, 2)
        _, axes = torch.linalg.eigh(flat.mT @ flat)
        return (centred @ axes[:, -dims:].flip(1)).movedim(-1, 1)


def foreground(maps: Tensor) -> Tensor:
    """Say which cells of maps (B, C, h, w) show the things, bool (B, h, w): one side of the first principal component.

    It is the side that is rarer along the pictures' borders, since a component has no sign of its own.
    """
    score = principal(F.normalize(maps.float(), dim=1), 1)[:, 0]  # (B, h, w)
    side = score > 0
    border = torch.ones_like(side[0])
    border[1:-1, 1:-1] = False
    return side if side[:, border].float().mean() < side[:, ~border].float().mean() else ~side


def fingerprint(extractor: nn.Module, **settings: Any) -> str:
    """Return the extractor's description and the settings as canonical JSON."""
    return json.dumps(extractor.describe() | settings, sort_keys=True, default=str)
