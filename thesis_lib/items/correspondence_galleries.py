"""Figures of single pairs: matched points, similarity and components, and which categories fail."""

import io

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from thesis_lib import plots

PALETTE = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #882255 #117733 #FFFFFF".split()


def _picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _bare(ax: Axes, image: np.ndarray, title: str = "", *, extent: tuple[int, int] | None = None) -> None:
    box = None if extent is None else (-0.5, extent[0] - 0.5, extent[1] - 0.5, -0.5)
    ax.imshow(image, extent=box, interpolation="nearest" if extent else "lanczos")
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, fontsize=7.5, loc="center")


def matches(pictures: pd.DataFrame) -> Figure:
    """Draw, a pair a row, the source's key-points and each model's matches; lines lead to the truth."""
    models, pairs = list(dict.fromkeys(pictures["model"])), list(dict.fromkeys(pictures["pair"]))
    side = plots.TEXTWIDTH / (1 + len(models))
    shape = (len(pairs), 1 + len(models))
    figure, axes = plt.subplots(*shape, figsize=(plots.TEXTWIDTH, (side + 0.12) * len(pairs)), squeeze=False)
    for line, place in zip(axes, pairs, strict=True):
        part = pictures[pictures["pair"] == place]
        first = part.iloc[0]
        source, target = _picture(first["source"]), _picture(first["target"])
        _bare(line[0], source, f"source: {first['category']}")
        own = part[part["model"] == models[0]]
        tints = [PALETTE[i % len(PALETTE)] for i in range(len(own))]
        line[0].scatter(own["source_x"], own["source_y"], c=tints, s=16, edgecolors="black", linewidths=0.6)
        for ax, model in zip(line[1:], models, strict=True):
            found = part[part["model"] == model]
            good = found["distance"] <= 0.1 * found["box"]
            _bare(ax, target, f"{model}\n{good.sum()} of {len(found)}")
            for tint, row in zip(tints, found.itertuples(), strict=True):
                ax.plot([row.x, row.true_x], [row.y, row.true_y], color=tint, linewidth=0.8)
            marks = {"s": 16, "edgecolors": "black", "linewidths": 0.6, "clip_on": False}
            ax.scatter(found["x"], found["y"], c=tints, **marks)
            ax.set(xlim=(-0.5, target.shape[1] - 0.5), ylim=(target.shape[0] - 0.5, -0.5))
    return figure


def features(pictures: pd.DataFrame) -> Figure:
    """Draw, a pair a row, the source's first point, its similarity over the target, and both images' components."""
    firsts = pictures[pictures["heat"].notna()]
    side = plots.TEXTWIDTH / 4
    figure, axes = plt.subplots(len(firsts), 4, figsize=(plots.TEXTWIDTH, (side + 0.1) * len(firsts)), squeeze=False)
    for number, (line, row) in enumerate(zip(axes, firsts.itertuples(), strict=True)):
        source, target = _picture(row.source), _picture(row.target)
        heads = ("source", "similarity", "components of source", "of target") if number == 0 else ("",) * 4
        _bare(line[0], source, heads[0])
        line[0].scatter([row.source_x], [row.source_y], c=PALETTE[0], s=22, edgecolors="black", linewidths=0.6)
        heat = np.frombuffer(row.heat, np.float16).reshape(row.heat_shape).astype(float)
        _bare(line[1], target, heads[1])
        line[1].imshow(heat, cmap="inferno", alpha=0.65)
        line[1].plot([row.true_x], [row.true_y], "o", markerfacecolor="none", markeredgecolor="#00E5FF", markersize=6)
        for ax, head, name, picture in ((line[2], heads[2], "source", source), (line[3], heads[3], "target", target)):
            shape = getattr(row, f"{name}_components_shape")
            values = np.frombuffer(getattr(row, f"{name}_components"), np.float16).reshape(shape).astype(float)
            _bare(ax, values.transpose(1, 2, 0), head, extent=(picture.shape[1], picture.shape[0]))
    return figure


def failures(points: pd.DataFrame, models: list[str], alpha: float) -> Figure:
    """Draw the share of missed key-points by category, worst first, for each model."""
    part = points[(points["dataset"] == "SPair-71k") & (points["split"] == "test") & points["model"].isin(models)]
    data = part.assign(missed=100.0 * (part["distance"] > alpha * part["box"]))
    order = data.groupby("category")["missed"].mean().sort_values(ascending=False).index
    height = 0.7 + 0.13 * len(order) * len(models)
    figure, ax = plt.subplots(figsize=(0.8 * plots.TEXTWIDTH, min(height, 8.0)))
    style = {"palette": "colorblind", "errorbar": None, "width": 0.75}
    sns.barplot(data, x="missed", y="category", hue="model", order=order, hue_order=models, ax=ax, **style)
    count = len(data) // len(models)
    ax.set(xlabel=f"key-points farther than {alpha:g} of the box (%), {count} in all", ylabel="", xlim=(0, 100))
    ax.grid(axis="y", visible=False)
    ax.legend(title="", loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, columnspacing=1.2)
    return figure
