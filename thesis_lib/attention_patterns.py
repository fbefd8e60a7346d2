"""What a ViT's mixers look at: their maps layer by layer, rollout, and how far, how broadly and how alike heads look.

A map (B, h, N, N) holds the weights with which output tokens (rows) average input tokens, prefix tokens first. Negative
weights, which the approximations have, count by their size.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from thesis_lib.classification import Images
from thesis_lib.classifier import ViTForImageClassification
from thesis_lib.mixing import mixing_matrix
from thesis_lib.statistics import bootstrap_mean


@torch.no_grad()
def maps_by_layer(model: ViTForImageClassification, images: Tensor) -> list[Tensor]:
    """Return each layer's map (B, h, N, N) for images in [0, 1].

    The mixer's own attention map where it has one, else its effective mixing matrix, found by probing.
    """
    seen: list[Tensor] = []
    mixers = [block.attn for block in model.eval().vit.blocks]
    hooks = [mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for mixer in mixers]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = [(mixer, x, mixer.attention_map(x)) for mixer, x in zip(mixers, seen, strict=True)]
    return [(mixing_matrix(mixer, x) if maps is None else maps).float() for mixer, x, maps in found]


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Follow the residual stream through all layers: the product of (mean over heads + identity) / 2, (B, N, N).

    Rows sum to 1 (Abnar and Zuidema 2020, section 3).
    """
    total = None
    for layer in maps:
        mixed = _rows_of_one(layer).nanmean(1)
        step = (mixed + torch.eye(mixed.shape[-1], device=mixed.device)) / 2
        total = step if total is None else step @ total
    return total


def mean_distance(maps: Tensor, grid: tuple[int, int], prefix_tokens: int = 1) -> Tensor:
    """Average the distance, in patches, between a patch and the patches it looks at: (B, h).

    (Dosovitskiy et al. 2021, appendix D.7.) A head that is switched off gives NaN.
    """
    rows, columns = (torch.arange(side, device=maps.device, dtype=torch.float32) for side in grid)
    place = torch.cartesian_prod(rows, columns)  # (P, 2)
    among = _rows_of_one(maps[:, :, prefix_tokens:, prefix_tokens:])
    return (among * torch.cdist(place, place)).sum(-1).mean(-1)


def entropy(maps: Tensor) -> Tensor:
    """Average the entropy of the rows as a share of ln N, the largest there is: (B, h); NaN for a head switched off."""
    return torch.special.entr(_rows_of_one(maps)).sum(-1).mean(-1) / np.log(maps.shape[-1])


def head_similarity(maps: Tensor) -> Tensor:
    """Average the cosine similarity of the maps of two heads over all pairs: (B,); NaN for a single head."""
    flat = torch.nn.functional.normalize(maps.flatten(2), dim=-1)  # (B, h, N N)
    heads = flat.shape[1]
    return ((flat @ flat.mT).sum((1, 2)) - heads) / (heads * (heads - 1) or torch.nan)


def _rows_of_one(maps: Tensor) -> Tensor:
    weights = maps.abs()
    return weights / weights.sum(-1, keepdim=True)  # 0 / 0 is NaN: a head that is switched off


def pattern_rows(model: ViTForImageClassification, images: Images, *, count: int = 64, **protocol: Any) -> list[dict]:
    """Measure the three patterns of each layer over the first `count` images: rows with n and 95 % intervals."""
    x = images[np.arange(min(count, len(images)))][0].float() / 255
    grid, rows = model.vit.patch_embed.grid_size, []
    for layer, maps in enumerate(maps_by_layer(model.cpu(), x), start=1):
        found = {"attention_distance": (mean_distance(maps, grid).nanmean(1), "patch")}
        found["attention_entropy"] = entropy(maps).nanmean(1), "1"
        if maps.shape[1] > 1:
            found["head_similarity"] = head_similarity(maps), "1"
        for metric, (values, unit) in found.items():
            row = {"metric": metric, "unit": unit, "layer": layer} | vars(bootstrap_mean(values.numpy()))
            rows.append(row | protocol)
    return rows


def map_table(model: ViTForImageClassification, images: Images, which: Sequence[int], **protocol: Any) -> pd.DataFrame:
    """Tabulate where the class token looks, one line an image, layer and head; layer 0 is the rollout, head 0 the mean.

    Columns: image, label (its name), picture (PNG bytes), layer, head, weights (a list over the patches).
    """
    pixels, labels = images[np.asarray(which)]
    maps = maps_by_layer(model.cpu(), pixels.float() / 255)
    views = {(0, 0): rollout(maps)}
    for layer, heads in enumerate(maps, start=1):
        views[layer, 0] = heads.mean(1)
        views |= {(layer, head): one for head, one in enumerate(heads.unbind(1), start=1)} if heads.shape[1] > 1 else {}
    lines = []
    for i, image in enumerate(which):
        about = {"image": int(image), "label": images.classes[labels[i]], "picture": png(pixels[i])} | protocol
        for (layer, head), view in views.items():
            lines.append(about | {"layer": layer, "head": head, "weights": view[i, 0, 1:].tolist()})
    return pd.DataFrame(lines)


def png(pixels: Tensor) -> bytes:
    """Encode one image (3, S, S) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
