"""The thesis's figures, made from result rows alone, without torch.

Every function takes `data` first and the rest by keyword, draws into `ax` where one is given and returns it. A mixer
has one colour and one marker everywhere, told apart by colour-blind readers (palette after Okabe and Ito, 2008, and
Paul Tol, 2021); error bars are 95 % intervals.
"""

import io
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from thesis_lib.placement import apart, label_ends, label_line, label_points
from thesis_lib.summary import MIXERS, STAGES, costs, label, one_protocol, ordered, reference_stage, scores, setting

TEXTWIDTH = 5.9  # inches; figures are included at their natural size, so that their type is the size it says
COLOURS = dict(
    zip(
        MIXERS,
        "#000000 #0072B2 #D55E00 #56B4E9 #882255 #332288 #CC79A7 #E69F00 #009E73 #999933 #7F7F7F".split(),
        strict=True,
    )
)
MARKERS = dict(zip(MIXERS, "os^v<hP*D>p", strict=True))
CHOSEN, QUIET, RING = "#0072B2", "#8C8C8C", "#F0C000"


def set_theme() -> None:
    """Set the thesis's type sizes, line widths and embedded TrueType fonts for all figures of this session."""
    sns.set_theme("paper", "ticks")
    small = {"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.title_fontsize": 8}
    sizes = {"font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9, "lines.linewidth": 1.2, "lines.markersize": 5}
    mpl.rcParams.update(small | sizes)
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
            "figure.constrained_layout.use": True,
            "figure.dpi": 120,
            "savefig.dpi": 200,
            "pdf.fonttype": 42,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
        }
    )


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with the endings .pdf and .png, the same bytes for the same figure, and return both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(".pdf"), path.with_suffix(".png")]
    figure.savefig(files[0], metadata={"CreationDate": None})
    figure.set_layout_engine("none")  # what the first drawing laid out stays where it is
    figure.savefig(files[1])
    return files


def colour(mixer: str) -> str:
    """Return the mixer's one colour."""
    return COLOURS.get(mixer, "#333333")


def accuracy_against_cost(
    data: pd.DataFrame, *, cost: str = "macs", split: str = "test", names: bool = True, ax: Axes | None = None
) -> Axes:
    """Draw accuracy over cost, a mixer's stages joined by a line; `data` holds the rows of notebooks 02, 03 and 04.

    Mixers whose costs agree within a thirtieth of the range are set side by side. names: write them beside the points.
    """
    ax = ax or plt.subplots(figsize=(0.6 * TEXTWIDTH, 2.9))[1]
    main = scores(data, split=split)
    price = costs(data, cost, **setting(main), embedding=True).set_index("mixer")["value"]
    scale, unit = _unit(cost, price.max())
    x = apart((price / scale)[[name for name in price.index if name in set(main["mixer"])]])
    main = main[main["mixer"].isin(x.index)]
    for mixer, rows in main.groupby("mixer", sort=False):
        y = 100 * rows["value"]
        ax.plot([x[mixer]] * len(y), y, color=colour(mixer), linewidth=0.8, alpha=0.5, zorder=2)
        for row in rows.itertuples():
            ends = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
            ax.errorbar(
                [x[mixer]],
                [100 * row.value],
                ends,
                fmt="none",
                ecolor=colour(mixer),
                elinewidth=0.9,
                capsize=1.5,
                zorder=3,
            )
            ax.plot([x[mixer]], [100 * row.value], **_marker(mixer, row.stage))
    if cost == "latency" and x.max() > 8 * x.min():
        ax.set_xscale("log")
    ax.axhline(50, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xlabel(unit)
    ax.set_ylabel("2AFC (%)")
    ax.margins(x=0.16, y=0.08)
    spans = [(x[row.mixer], 100 * row.low, 100 * row.high) for row in main.itertuples()]
    label_line(ax, "chance", 50, QUIET, spans=spans)
    if names:
        least, best = (100 * getattr(main.groupby("mixer")["value"], end)() for end in ("min", "max"))
        spans += [(x[mixer], least[mixer], best[mixer]) for mixer in x.index]
        label_points(ax, [(label(m), x[m], best[m], colour(m)) for m in x.index], spans=spans)
    return ax


def stage_legend(stages: Iterable[str], *, on: Axes | Figure, **settings) -> None:
    """Explain how full a marker is."""
    stages = [stage for stage in STAGES if stage in set(stages)]
    keys = [Line2D([], [], label=STAGES[stage], **_marker("", stage) | {"marker": "o"}) for stage in stages]
    on.legend(handles=keys, ncols=len(keys), handletextpad=0.2, **settings)


def _marker(mixer: str, stage: str) -> dict:
    """Hollow before tuning, half full under the teacher's LoRA, full after LoRA, full in a ring after distillation."""
    tint = colour(mixer)
    style = {"marker": MARKERS.get(mixer, "h"), "color": tint, "linestyle": "none", "markeredgewidth": 1.0, "zorder": 4}
    fills = {
        "zero-shot": {"markerfacecolor": "white"},
        "teacher-lora": {"fillstyle": "left", "markerfacecoloralt": "white"},
        "distilled": {"markeredgecolor": RING, "markeredgewidth": 1.5, "markersize": 7},
    }
    return style | fills.get(stage, {})


def _unit(metric: str, largest: float) -> tuple[float, str]:
    if metric in ("macs", "params"):
        name = "multiply-adds an image" if metric == "macs" else "parameters"
        return (1e9, f"billion {name}") if largest >= 1e9 else (1e6, f"million {name}")
    return 1.0, {"latency": "latency of one image (ms)", "throughput": "images per second"}.get(
        metric, f"{metric} (MiB)"
    )


def distillation_curve(data: pd.DataFrame, *, metric: str = "2afc", ax: Axes | None = None) -> Axes:
    """Draw one metric of every student over the epochs; a ring marks the epoch kept, the one best by 2AFC on val.

    A dashed line is the tuned MHA's own 2AFC on val, where the rows hold it.
    Raises ValueError if no epoch has the metric.
    """
    data = data.reindex(columns=data.columns.union(["epoch"]))
    rows = data[data["epoch"].notna() & (data["stage"] == "distilled")]
    curves = rows[rows["metric"] == metric].astype({"value": float, "low": float, "high": float}).sort_values("epoch")
    if curves.empty:
        raise ValueError(f"no {metric!r} by epoch: run notebook 04_distillation first")
    ax = ax or plt.subplots(figsize=(TEXTWIDTH / 2, 2.4))[1]
    scale = 100 if metric == "2afc" else 1
    val = rows[(rows["metric"] == "2afc") & (rows["split"] == "val")].reset_index(drop=True)
    kept = val.loc[val.groupby("mixer")["value"].idxmax()].set_index("mixer")["epoch"]
    splits, ends = sorted(curves["split"].unique()), []
    for mixer, split in product(ordered(curves["mixer"]), splits):
        curve = curves[(curves["mixer"] == mixer) & (curves["split"] == split)]
        if curve.empty:
            continue
        x, y, low, high = curve["epoch"], *(scale * curve[name] for name in ("value", "low", "high"))
        ax.plot(x, y, color=colour(mixer), linestyle=(0, (4, 2)) if split == "train" and len(splits) > 1 else "-")
        ax.fill_between(x, low, high, where=low.notna(), color=colour(mixer), alpha=0.15, linewidth=0)
        ring = curve["epoch"] == kept.get(mixer)
        ax.plot(x[ring], y[ring], "o", color=colour(mixer), markerfacecolor="white", markersize=6, zorder=5)
        text = label(mixer) + (f", {split}" if len(splits) > 1 else "")
        ends.append((text, x.iloc[-1], y.iloc[-1], colour(mixer)))
    own = data[(data["mixer"] == "mha") & (data["split"] == "val") & data["epoch"].isna()]
    own = own[own["metric"] == metric]
    own = own[own["stage"] == reference_stage(own["stage"], "lora")].head(1)
    for value, stage in own[["value", "stage"]].itertuples(index=False):
        ax.axhline(scale * value, color=colour("mha"), linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        at = (0, scale * value)
        ax.annotate(f"MHA, {STAGES[stage]}", at, (3, 2), ("axes fraction", "data"), "offset points", fontsize=7)
    ax.set_xlabel("epoch")
    ax.set_ylabel(
        {"2afc": "2AFC on val (%)", "loss": "loss, 1 − cosine", "cosine": "cosine to the teacher"}.get(metric, metric)
    )
    ax.margins(y=0.12)
    ax.set_xlim(0, curves["epoch"].max() * (1.3 if len(splits) > 1 else 1.18))
    ax.xaxis.get_major_locator().set_params(integer=True)
    label_ends(ax, ends)
    return ax


def recovered_share(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the share of the lost accuracy that each stage recovers; `data` is what `summary.recovered` returns."""
    ax = _forest(data[data["value"].notna()], ax)
    ax.axvline(100, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xlabel("share of the lost accuracy recovered (%)")
    return ax


def paired_differences(data: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw every mixer's accuracy minus MHA's on the same triplets; `data` is what `summary.paired` returns."""
    ax = _forest(data.rename(columns={"difference": "value"}), ax)
    ax.set_xlabel("2AFC minus MHA's on the same triplets (points)")
    return ax


def _forest(rows: pd.DataFrame, ax: Axes | None) -> Axes:
    """Shares with intervals along x, one line of points a mixer, its stages beneath each other."""
    mixers, stages = ordered(rows["mixer"]), [stage for stage in STAGES if stage in set(rows["stage"])]
    ax = ax or plt.subplots(figsize=(0.8 * TEXTWIDTH, 0.75 + (0.12 + 0.09 * len(stages)) * len(mixers)))[1]
    for row in rows.itertuples():
        own = [stage for stage in stages if stage in set(rows.loc[rows["mixer"] == row.mixer, "stage"])]
        y = mixers.index(row.mixer) + 0.75 / len(stages) * (own.index(row.stage) - (len(own) - 1) / 2)
        ends = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
        ax.errorbar(
            [100 * row.value], [y], xerr=ends, fmt="none", ecolor=colour(row.mixer), elinewidth=0.9, capsize=1.5
        )
        ax.plot([100 * row.value], [y], **_marker(row.mixer, row.stage))
    ax.axvline(0, color=QUIET, linewidth=0.8, zorder=1)
    ax.set_yticks(range(len(mixers)), [label(mixer) for mixer in mixers])
    for tick, mixer in zip(ax.get_yticklabels(), mixers, strict=True):
        tick.set_color(colour(mixer))
    ax.set_ylim(len(mixers) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    if stages:
        stage_legend(stages, on=ax, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, columnspacing=1.2)
    return ax


def latency_against_tokens(
    data: pd.DataFrame, *, backbone: str, metric: str = "latency", ax: Axes | None = None
) -> Axes:
    """Draw the time of one image over the token count, both axes logarithmic; names stand at the lines' ends."""
    ax = ax or plt.subplots(figsize=(0.8 * TEXTWIDTH, 3.0))[1]
    rows = one_protocol(data[(data["metric"] == metric) & (data["backbone"] == backbone) & data["value"].notna()])
    if rows.empty:
        raise ValueError(f"no {metric!r} of {backbone!r} was measured: run notebook 03_efficiency_analysis first")
    rows = (
        rows[rows["batch"] == rows["batch"].min()]
        .astype({"value": float, "low": float, "high": float})
        .sort_values("tokens")
    )
    for mixer in ordered(rows["mixer"]):
        line = rows[rows["mixer"] == mixer]
        ax.fill_between(line["tokens"], line["low"], line["high"], color=colour(mixer), alpha=0.18, linewidth=0)
        ax.plot(
            line["tokens"],
            line["value"],
            color=colour(mixer),
            marker=MARKERS.get(mixer, "h"),
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = sorted(rows["tokens"].unique())
    ax.set_xticks(ticks, [f"{int(n)}" for n in ticks])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
    ax.set_xlabel("tokens")
    ax.set_ylabel({"latency": "latency of one image (ms)", "peak_memory": "peak memory (MiB)"}.get(metric, metric))
    low, high = np.log(ax.get_xlim())
    ax.set_xlim(right=np.exp(high + 0.16 * (high - low)))
    ends = rows.groupby("mixer", sort=False).tail(1)
    label_ends(ax, [(label(row.mixer), row.tokens, row.value, colour(row.mixer)) for row in ends.itertuples()])
    return ax


def triplet_gallery(data: pd.DataFrame, *, columns: int = 2) -> Figure:
    """Draw triplets as left, reference, right; the picture judged closer is framed, with its votes.

    `data` holds the encoded pictures (PNG bytes) in columns ref, left and right, right_vote (the share of votes for
    right) and votes (how many judges answered).
    """
    rows = -(-len(data) // columns)
    side = (TEXTWIDTH - 0.25 * (columns - 1)) / (3 * columns)
    figure = plt.figure(figsize=(TEXTWIDTH, rows * (side + 0.2)))
    parts = figure.subfigures(rows, columns, squeeze=False, wspace=0.04)
    for part, triplet in zip(parts.flat, data.itertuples(), strict=False):
        share = {"left": 1 - triplet.right_vote, "ref": 0, "right": triplet.right_vote}
        for ax, (name, votes) in zip(part.subplots(1, 3), share.items(), strict=True):
            chosen = votes > 0.5
            ax.imshow(Image.open(io.BytesIO(getattr(triplet, name))).convert("RGB"), interpolation="lanczos")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            for spine in ax.spines.values():
                spine.set(visible=chosen, color=CHOSEN, linewidth=2.4)
            text = "reference" if name == "ref" else f"{round(votes * triplet.votes)} of {triplet.votes}"
            weight, tint = ("bold", CHOSEN) if chosen else ("normal", QUIET)
            ax.set_xlabel(text, fontsize=7.5, labelpad=2.5, color=tint, fontweight=weight)
    return figure
