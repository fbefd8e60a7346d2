"""See where tokens halt: the depth of every patch as a table of pictures, and a slider over eps or beta."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from thesis_lib.adaptive_tokens import AdaptiveViT, Halting
from thesis_lib.adaptive_training import normalised
from thesis_lib.attention.base import suggest
from thesis_lib.explorer import SIDE, picture_tag

RANGES = {"beta": (-40.0, 10.0, 0.25), "eps": (0.01, 0.99, 0.01)}  # lowest, highest, step of the slider


@torch.no_grad()
def halting_table(
    model: AdaptiveViT, pixels: Any, labels: Sequence[int], classes: Sequence[str], indices: Sequence[int]
) -> pd.DataFrame:
    """Look at single images: one row each, for `items.adaptive_tokens` to draw.

    Columns: index, picture (PNG bytes), true and predicted (class names), depth (blocks each patch passed, row by row),
    rows and columns of the grid, cls_depth, layers. ValueError for an index outside the set.
    """
    outside = [int(i) for i in indices if not 0 <= i < len(pixels)]
    if outside:
        raise ValueError(f"image indices {outside} are outside the set, which has images 0 to {len(pixels) - 1}")
    device = next(model.parameters()).device
    images = pixels[list(indices)]  # (n, 3, S, S) uint8
    trace = model.eval().run(normalised(model, images.to(device)))
    predicted = model.classify(trace.features).argmax(-1).tolist()
    rows, columns = model.patch_embed.grid_size
    depth = trace.depth[:, model.vit.num_prefix_tokens :].tolist()
    return pd.DataFrame(
        {
            "index": list(indices),
            "picture": [_png(image) for image in images],
            "true": [classes[labels[i]] for i in indices],
            "predicted": [classes[label] for label in predicted],
            "depth": depth,
            "rows": rows,
            "columns": columns,
            "cls_depth": trace.depth[:, 0].tolist(),
            "layers": len(model.vit.blocks),
        }
    )


def halting_slider(
    model: AdaptiveViT,
    pixels: Any,
    *,
    labels: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    constant: str = "beta",
) -> widgets.VBox:
    """Make controls that show one image's token depths while `beta` or `eps` moves; the model itself stays as it is.

    pixels: uint8 images (n, 3, S, S). labels and classes add the true and the predicted name. Raises ValueError for
    another constant.
    """
    if constant not in RANGES:
        raise ValueError(f"there is no slider for {constant!r}{suggest(constant, RANGES)}; known: {', '.join(RANGES)}")
    low, high, step = RANGES[constant]
    trained = getattr(model.halting, constant)
    image = widgets.BoundedIntText(value=0, min=0, max=len(pixels) - 1, description="Image")
    value = widgets.FloatSlider(
        value=trained,
        min=min(low, trained),
        max=max(high, trained),
        step=step,
        description=constant,
        continuous_update=False,
    )
    shown = widgets.HTML()
    shown.add_class("halting-explorer")

    def show(_: object = None) -> None:
        names = (labels, classes) if labels is not None and classes is not None else None
        shown.value = _page(model, pixels[image.value], replace(model.halting, **{constant: value.value}), names, image)

    for control in (image, value):
        control.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([image, value]), shown])


@torch.no_grad()
def _page(model: AdaptiveViT, pixels: Tensor, halting: Halting, names: tuple | None, image: Any) -> str:
    """The picture, its depths and what they cost, as HTML."""
    kept, device = model.halting, next(model.parameters()).device
    try:
        model.halting = halting
        trace = model.eval().run(normalised(model, pixels[None].to(device)))
    finally:
        model.halting = kept
    layers = len(model.vit.blocks)
    depth = trace.depth[0, model.vit.num_prefix_tokens :].reshape(model.patch_embed.grid_size)  # (rows, columns)
    picture = Image.open(io.BytesIO(_png(pixels)))
    share = 100 * float(trace.tokens.float().mean()) / trace.alive.shape[2]
    text = f"{share:.0f} % of the tokens computed; the class token halts in layer {int(trace.depth[0, 0])} of {layers}"
    title = "the image"
    if names is not None:
        labels, classes = names
        guess = classes[int(model.classify(trace.features).argmax())]
        title = f"{classes[labels[image.value]]}, taken for {guess}"
    tags = [picture_tag(picture.resize((SIDE, SIDE)), title)]
    tags.append(picture_tag(depth_overlay(picture, depth.cpu().numpy(), layers), "token depth"))
    return f"{''.join(tags)}<div>{text}</div>"


def depth_overlay(picture: Image.Image, depth: np.ndarray, layers: int) -> Image.Image:
    """Lay depths (rows, columns) over a grey picture, patch by patch, from dark (first layer) to bright (last)."""
    heat = mpl.colormaps["inferno"](depth / layers)[..., :3]  # (rows, columns, 3)
    heat = Image.fromarray((255 * heat).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB").resize((SIDE, SIDE)), heat, 0.55)


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())).save(buffer, "PNG")
    return buffer.getvalue()
