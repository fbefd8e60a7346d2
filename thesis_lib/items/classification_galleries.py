"""Pictures of the image classification study: samples of the data, and where the class token looks."""

import io
import math
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from thesis_lib.plots import TEXTWIDTH
from thesis_lib.summary import label, ordered


def sample_gallery(samples: pd.DataFrame, columns: int = 10) -> Figure:
    """Draw pictures with the names of their classes; `samples` has dataset, label and picture (PNG bytes)."""
    parts = [(name, part.head(columns)) for name, part in samples.groupby("dataset", sort=False)]
    figure, axes = plt.subplots(len(parts), columns, figsize=(TEXTWIDTH, 1.1 * len(parts)), squeeze=False)
    figure.get_layout_engine().set(hspace=0.35, w_pad=0.06)
    for row, (name, part) in zip(axes, parts, strict=True):
        for ax in row:
            ax.axis("off")
        for ax, sample in zip(row, part.itertuples(), strict=False):
            ax.imshow(Image.open(io.BytesIO(sample.picture)), interpolation="nearest")
            name_of_class = textwrap.fill(sample.label, 10, break_long_words=False)
            text = ax.text(0.5, -0.06, name_of_class, transform=ax.transAxes, ha="center", va="top", fontsize=6)
            text.set_in_layout(False)  # or the widest name would set the pictures apart
        row[0].set_title(name, fontsize=8)
    return figure


def attention_gallery(maps: pd.DataFrame, image: int | None = None) -> Figure:
    """Draw where the class token of every mixer looks in one picture: by layer, mean over heads, then the rollout."""
    maps = maps[(maps["head"] == 0) & (maps["image"] == (maps["image"].iloc[0] if image is None else image))]
    maps = maps[maps["dataset"] == maps["dataset"].iloc[0]]
    layers = [*sorted(set(maps["layer"]) - {0}), 0]
    mixers = ordered(maps["mixer"])
    titles = ["picture", *(f"layer {layer}" for layer in layers[:-1]), "rollout"]
    figure, axes = _grid(len(mixers), titles, [label(mixer) for mixer in mixers])
    for row, mixer in zip(axes, mixers, strict=True):
        own = maps[maps["mixer"] == mixer].set_index("layer")
        row[0].imshow(Image.open(io.BytesIO(own["picture"].iloc[0])), interpolation="nearest")
        for ax, layer in zip(row[1:], layers, strict=True):
            _heat(ax, own.loc[layer, "weights"])
    return figure


def head_gallery(maps: pd.DataFrame, mixer: str) -> Figure:
    """Draw where the class token of one mixer looks in one picture, a row a layer and a column a head."""
    maps = maps[(maps["mixer"] == mixer) & (maps["layer"] > 0) & (maps["head"] > 0)]
    maps = maps[(maps["image"] == maps["image"].iloc[0]) & (maps["dataset"] == maps["dataset"].iloc[0])]
    view, layers, heads = (
        maps.set_index(["layer", "head"])["weights"],
        *(sorted(set(maps[c])) for c in ("layer", "head")),
    )
    figure, axes = _grid(len(layers), [f"head {head}" for head in heads], [f"layer {layer}" for layer in layers])
    for row, layer in zip(axes, layers, strict=True):
        for ax, head in zip(row, heads, strict=True):
            _heat(ax, view[layer, head])
    return figure


def _grid(rows: int, titles: Sequence[str], names: Sequence[str]) -> tuple[Figure, np.ndarray]:
    side = min(TEXTWIDTH / (len(titles) + 0.6), 0.95)
    size = (side * (len(titles) + 0.6), side * rows + 0.25)
    figure, axes = plt.subplots(rows, len(titles), figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8, loc="center")
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name, fontsize=8)
    return figure, axes


def _heat(ax: Axes, weights: Sequence[float]) -> None:
    side = math.isqrt(len(weights))
    ax.imshow(np.reshape(weights, (side, side)), cmap="magma", vmin=0, interpolation="nearest")
