"""Where names and points go in a figure, so that none covers another."""

from collections.abc import Iterable
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # under a name that a line crosses
COMPASS = ((1, 0), (-1, 0), (0, 1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7), (0, -1))


def apart(x: pd.Series) -> pd.Series:
    """Set values side by side that agree within a thirtieth of the range, around their own mean."""
    x = x.sort_values(kind="stable")
    step = (x.max() - x.min() or x.max()) / 30
    clusters = (x.diff() > step).cumsum()
    for _, cluster in x.groupby(clusters):
        if len(cluster) > 1:
            x[cluster.index] = cluster.mean() + step * (np.arange(len(cluster)) - (len(cluster) - 1) / 2)
    return x


def label_points(
    ax: Axes, points: Iterable[tuple[str, float, float, str]], *, spans: Iterable[tuple[float, float, float]] = ()
) -> None:
    """Write each (text, x, y, colour) beside its point, where it covers no other text, point, span or frame.

    `spans` are (x, low, high) of error bars. Draw everything else first: the layout decides where data lies on paper.
    A thin line leads to a point that has no room beside it, past the others where that can be.
    """
    figure, points = ax.figure, sorted(points, key=lambda point: -point[2])
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for text in ax.texts]
    data = _boxes(ax, [*spans, *((x, y, y) for _, x, y, _ in points)])
    frame = ax.get_window_extent(renderer)
    for name, x, y, tint in points:
        text = ax.annotate(
            name, (x, y), (0, 0), textcoords="offset points", color=tint, fontsize=8, va="center", bbox=PAPER
        )
        tried, place = [], ax.transData.transform((x, y))
        others = [box for box in [*texts, *data] if not box.contains(*place)]
        for radius, (dx, dy) in product((7, 11, 16, 22, 30, 40), COMPASS):
            side = ("center", "left", "right")[int(np.sign(dx))]
            text.set(position=(radius * dx, radius * dy), horizontalalignment=side)
            box = text.get_window_extent(renderer).padded(0.01 * figure.dpi)
            area = box.width * box.height
            # Text on text cannot be read; a corner of an error bar covered is no worse than a line across other data.
            covered = area - _shared(box, frame) + sum(_shared(box, other) for other in [*data, *10 * texts])
            way = place + np.linspace(0, radius * figure.dpi / 72, 20)[:, None] * np.array([dx, dy])
            if radius > 11 and any(other.contains(*at) for other in others for at in way):
                covered += area
            way = np.array([at for at in way if not box.contains(*at)])  # up to the name, not into it
            tried.append((covered, radius, text.get_position(), side, box, way))
            if covered == 0:
                break
        _, radius, position, side, box, way = min(tried, key=lambda found: found[0])
        text.set(position=position, horizontalalignment=side)
        texts.append(box)
        if radius > 11:
            line = {"arrowstyle": "-", "color": tint, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            end = (way[-1] - place) * 72 / figure.dpi
            ax.annotate("", (x, y), end, textcoords="offset points", arrowprops=line)
            data += [Bbox.from_extents(*(at - 1), *(at + 1)) for at in way]


def label_line(ax: Axes, text: str, y: float, tint: str, *, spans: Iterable[tuple[float, float, float]]) -> None:
    """Write a word beneath the horizontal line at y, as far right as it covers none of the `spans` (x, low, high)."""
    ax.figure.draw_without_rendering()
    data, renderer = _boxes(ax, spans), ax.figure.canvas.get_renderer()
    word = ax.annotate(
        text, (1, y), (0, -2), ("axes fraction", "data"), "offset points", color=tint, fontsize=7, ha="right", va="top"
    )
    covered = {}
    for right in np.linspace(1, 0.2, 41):
        word.xy = (right, y)
        box = word.get_window_extent(renderer)
        covered[right] = sum(_shared(box, other) for other in data)
    word.xy = (min(covered, key=covered.get), y)


def _boxes(ax: Axes, spans: Iterable[tuple[float, float, float]]) -> list[Bbox]:
    """Where markers and error bars (x, low, high) lie on paper."""
    half, found = 0.05 * ax.figure.dpi, []
    for x, low, high in spans:
        (left, bottom), (right, top) = ax.transData.transform([(x, low), (x, high)])
        found.append(Bbox.from_extents(left - half, bottom - half, right + half, top + half))
    return found


def _shared(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height


def label_ends(ax: Axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Write (text, x, y, colour) at the right ends of lines, moved apart vertically until none overlaps the next.

    A thin line leads from each end to its name.
    """
    ends, texts = sorted(ends, key=lambda end: end[2]), []
    for text, x, y, tint in ends:
        line = {"arrowstyle": "-", "color": tint, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        style = {"color": tint, "fontsize": 8, "va": "center", "bbox": PAPER, "arrowprops": line}
        texts.append(ax.annotate(text, (x, y), (14, 0), textcoords="offset points", **style))
    for _ in range(3):  # names above the frame make the layout lower it, which moves the ends
        ax.figure.draw_without_rendering()
        point = 72 / ax.figure.dpi
        wanted = point * np.array([ax.transData.transform(end[1:3])[1] for end in ends])
        for text, shift in zip(texts, _moved_apart(wanted, point * ax.bbox.y0) - wanted, strict=True):
            text.set_position((14, shift))


def _moved_apart(wanted: np.ndarray, bottom: float, height: float = 9.5) -> np.ndarray:
    """Move heights on paper, ascending, until each is a line of 8-point type above the one before."""
    lowest = bottom + height * (np.arange(len(wanted)) + 0.5)
    place = np.maximum(wanted, lowest)
    for _ in range(5000):  # neighbours push each other apart, half each
        overlap = np.maximum(height - np.diff(place), 0)
        if not (overlap > 0.01).any():
            break
        place[:-1] -= 0.5 * overlap
        place[1:] += 0.5 * overlap
        place = np.maximum(place, lowest)
    return place
