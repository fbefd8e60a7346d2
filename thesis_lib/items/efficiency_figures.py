"""The figures of the efficiency study: predicted against measured time, time by term, crossing points."""

from collections.abc import Callable, Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from thesis_lib.plots import MARKERS, QUIET, TEXTWIDTH, colour
from thesis_lib.summary import label, ordered

TERMS = {"matmul": "products", "elementwise": "elementwise", "copy": "copies", "launches": "launches"}
TINTS = dict(zip(TERMS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
STAGES = {"analytic": "multiply-adds", "predicted": "predicted time", "measured": "measured time"}
SHAPES = dict(zip(STAGES, "|Do", strict=True))


def by_mixer(crossed: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    """Yield the crossings of each (backbone, mixer), in display order, of the backbones that were timed."""
    timed = crossed.loc[crossed["stage"] == "measured", "backbone"].unique()
    for name in timed:
        part = crossed[crossed["backbone"] == name]
        for mixer in ordered(part["mixer"]):
            yield (name, mixer), part[part["mixer"] == mixer]


def predicted_against_measured(predicted: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw predicted over measured times, a colour a mixer, full at batch 1; grey: within 20 %."""
    ax = ax or plt.subplots(figsize=(0.8 * TEXTWIDTH, 3.3))[1]
    both = predicted[predicted["measured"].notna()].astype({"value": float, "measured": float})
    ends = np.array([both[["value", "measured"]].min().min() / 1.3, both[["value", "measured"]].max().max() * 1.3])
    ax.fill_between(ends, 0.8 * ends, 1.2 * ends, color="#EEEEEE", linewidth=0, zorder=0)
    ax.plot(ends, ends, color=QUIET, linewidth=0.8, zorder=1)
    for mixer in ordered(both["mixer"]):
        own = both[both["mixer"] == mixer]
        for one, face in ((True, colour(mixer)), (False, "white")):
            part = own[(own["batch"] == 1) == one]
            style = {"markerfacecolor": face, "markersize": 5, "markeredgewidth": 0.9, "zorder": 3}
            ax.plot(part["measured"], part["value"], MARKERS.get(mixer, "h"), color=colour(mixer), **style)
    _log(ax.set_xscale, ax.xaxis)
    _log(ax.set_yscale, ax.yaxis)
    ax.set(xlim=ends, ylim=ends, xlabel="measured time of a pass (ms)", ylabel="predicted (ms)")
    keys = [
        Line2D([], [], color=colour(m), marker=MARKERS.get(m, "h"), linestyle="none", label=label(m))
        for m in ordered(both["mixer"])
    ]
    keys.append(
        Line2D([], [], color=QUIET, marker="o", markerfacecolor="white", linestyle="none", label="larger batch")
    )
    ax.legend(handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5), handletextpad=0.2)
    return ax


def _log(set_scale: Callable[[str], None], axis: Axis) -> None:
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value / 1000:g}k"))
    axis.set_minor_locator(LogLocator(subs=()))


def terms(predicted: pd.DataFrame) -> Figure:
    """Draw each mixer's predicted time by term, and the measured one, over MHA's measured: fewest and most tokens."""
    both = predicted[(predicted["batch"] == 1) & predicted["measured"].notna()]
    both = both[(both["backbone"] == both["backbone"].iloc[0]) & (both["dtype"] == both["dtype"].iloc[0])]
    sizes = sorted({both["tokens"].min(), both["tokens"].max()})
    mixers = ordered(both["mixer"])
    height = 0.7 + 0.24 * len(mixers)
    figure, axes = plt.subplots(1, len(sizes), figsize=(TEXTWIDTH, height), sharey=True, squeeze=False)
    for ax, tokens in zip(axes[0], sizes, strict=True):
        part = both[both["tokens"] == tokens].set_index("mixer")
        shown, left = [m for m in mixers if m in part.index], 0.0
        y = [mixers.index(m) for m in shown]
        for term, name in TERMS.items():
            width = (part[term] / part.loc["mha", "measured"])[shown].to_numpy(float)
            ax.barh(y, width, 0.7, left=left, color=TINTS[term], label=name)
            left = left + width
        measured = (part["measured"] / part.loc["mha", "measured"])[shown].to_numpy(float)
        ax.plot(measured, y, "o", color="black", markersize=3.5, label="measured", zorder=4)
        ax.axvline(1, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        ax.set(title=f"{int(tokens)} tokens", xlabel="time over MHA's measured")
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(mixers)), [label(m) for m in mixers])
    axes[0, 0].invert_yaxis()
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=5, columnspacing=1.2, handlelength=1.2)
    return figure


def crossing_points(crossed: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw N* of every mixer of the first backbone, three ways; an arrow points beyond the largest size tried."""
    keys = list(by_mixer(crossed))
    name = keys[0][0][0]
    keys = [(mixer, part) for (backbone, mixer), part in keys if backbone == name]
    ax = ax or plt.subplots(figsize=(TEXTWIDTH, 0.9 + 0.26 * len(keys)))[1]
    for y, (mixer, part) in enumerate(keys):
        for row in part.drop_duplicates("stage").itertuples():  # of the first number format
            at = y + 0.24 * (list(STAGES).index(row.stage) - 1)
            style = {"color": colour(mixer), "marker": SHAPES[row.stage], "markersize": 6, "linestyle": "none"}
            beyond = 1.15 * float(row.largest)
            if pd.isna(row.value):
                if row.stage == "measured" and pd.notna(row.low):  # in some of the samples it is seen
                    ax.plot([row.low, beyond], [at, at], color=colour(mixer), linewidth=1)
                ax.plot([beyond], [at], **style | {"marker": ">", "markerfacecolor": "white", "markersize": 4})
                continue
            ends = [row.value if pd.isna(row.low) else row.low, beyond if pd.isna(row.high) else row.high]
            if row.stage == "measured":
                ax.plot(ends, [at, at], color=colour(mixer), linewidth=1)
                if pd.isna(row.high):
                    ax.plot([beyond], [at], color=colour(mixer), marker=">", markersize=3)
            ax.plot([row.value], [at], **style)
            if row.stage != "analytic" and row.value <= row.smallest:  # already there
                text = {"textcoords": "offset points", "fontsize": 7, "ha": "right", "va": "center"}
                ax.annotate("≤", (row.value, at), (-4, 0), **text)
    ax.set_yticks(range(len(keys)), [label(mixer) for mixer, _ in keys])
    ax.set_ylim(len(keys) - 0.4, -0.6)
    _log(ax.set_xscale, ax.xaxis)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"tokens from which it costs less than MHA ({name})")
    marks = [
        Line2D([], [], color="black", marker=SHAPES[stage], linestyle="none", label=text)
        for stage, text in STAGES.items()
    ]
    marks.append(
        Line2D([], [], color="black", marker=">", markerfacecolor="white", linestyle="none", label="none seen")
    )
    ax.legend(handles=marks, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1.2, handletextpad=0.2)
    return ax
