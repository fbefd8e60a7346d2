"""Figures of the search for the proposed model, and the names that its tables share with them. No torch here."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from thesis_lib.latex import significant
from thesis_lib.placement import label_points
from thesis_lib.plots import QUIET, RING, TEXTWIDTH, colour
from thesis_lib.summary import label, ordered, vit_names

NOTEBOOK = "10_proposed_model"
NAMES = {"teacher": "Teacher (MHA, tuned)", "ToMe": "Teacher, tokens merged", "ensemble": "DreamSim, ensemble"}
ACTIONS = {"drop": "Dropped", "halve": "Grid halved"}
STEPS = {"depth": "fewer blocks", "class token only": "last block for the class token alone"}
PLAN = "#6B4423"  # plans of several mixers have none of their colours
FORMATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def of(rows: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """The rows with these values; ValueError if there is none."""
    found = rows
    for name, value in columns.items():
        found = found[found[name] == value]
    if found.empty:
        raise ValueError(f"no rows with {columns}: run notebook {NOTEBOOK} first")
    return found


def one(rows: pd.DataFrame, **columns: object) -> pd.Series:
    """The first of them."""
    return of(rows, **columns).iloc[0]


def name_of(model: str) -> str:
    """Return the name a reader sees of a candidate or a model of the field."""
    mixer, _, distilled = model.partition("-distilled")
    return f"{label(mixer)}, all layers" if model.endswith("-distilled") else NAMES.get(model, model)


def sensitivity(rows: pd.DataFrame) -> Figure:
    """Draw what each action does in each layer: embedding distance on the left, loss of 2AFC on the right."""
    found = of(rows, stage="sensitivity")
    order = [*ordered(set(found["action"]) - set(ACTIONS)), *(a for a in ACTIONS if a in set(found["action"]))]
    figure, axes = plt.subplots(1, 2, figsize=(TEXTWIDTH, 0.65 + 0.28 * len(order)), sharey=True)
    heads = {
        "embedding_distance": (1, "1 − cosine to the teacher", "{:.2f}"),
        "2afc_loss": (100, "2AFC lost, points", "{:.0f}"),
    }
    for ax, (metric, (scale, head, form)) in zip(axes, heads.items(), strict=True):
        grid = scale * of(found, metric=metric).pivot(index="action", columns="layer", values="value").loc[order]
        top = max(float(np.nanmax(grid)), 1e-9)
        ax.pcolormesh(np.ma.masked_invalid(grid.to_numpy(float)), cmap="OrRd", vmin=0, vmax=top, edgecolors="white")
        for (y, x), value in np.ndenumerate(grid.to_numpy(float)):
            if np.isfinite(value) and grid.shape[1] <= 12:
                text = form.format(value).replace("-", "−")
                text = text.removeprefix("−") if float(text.replace("−", "-")) == 0 else text
                dark = value > 0.6 * top
                ax.text(
                    x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
                )
        ax.set_xticks(np.arange(grid.shape[1]) + 0.5, [str(int(layer) + 1) for layer in grid.columns])
        ax.set_yticks(np.arange(len(order)) + 0.5, [ACTIONS.get(action, label(action)) for action in order])
        ax.set(xlabel="block", title=f"{head} (n = {int(of(found, metric=metric)['n'].iloc[0])})")
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    axes[0].invert_yaxis()
    return figure


def front(rows: pd.DataFrame) -> Figure:
    """Draw the predicted front with the plans taken from it, and the candidates as measured with the rule's line."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXTWIDTH, 3.4), width_ratios=(0.34, 0.66))
    for stage, style in (("front", {"color": QUIET, "marker": ".", "markersize": 3, "linewidth": 0.8}),
                         ("budget", {"color": PLAN, "marker": "o", "linestyle": "none"})):  # fmt: skip
        part = of(rows, stage=stage).pivot_table(index="model", columns="metric", values="value")
        part = part.sort_values("predicted_time")
        left.plot(part["predicted_time"], part["predicted_loss"], **style)
    left.set(xlabel="predicted time (ms)", ylabel="predicted harm, sum of 1 − cosine")
    own = of(rows, stage="candidates")
    scores = of(own, metric="2afc").set_index(["model", "dtype"])
    times = of(own, metric="batch_time").set_index(["model", "dtype"])
    taken = {(r.model, r.dtype) for r in own[own["chosen"].eq(True)].itertuples()}
    points, spans, plans = [], [], set(of(rows, stage="budget")["model"])
    for key, row in scores.iterrows():
        x, y = times.loc[key, "value"] / times.loc[key, "batch"], 100 * row["value"]
        tint = colour("mha") if key[0] == "teacher" else PLAN if key[0] in plans else colour(key[0].split("-")[0])
        bars = [[y - 100 * row["low"]], [100 * row["high"] - y]]
        right.errorbar([x], [y], bars, fmt="none", ecolor=tint, elinewidth=0.8, capsize=2)
        fill = tint if key[1] == "float32" else "white"
        right.plot([x], [y], "o", color=tint, markerfacecolor=fill, zorder=4)
        if key in taken:
            right.plot([x], [y], "o", color=RING, markersize=11, markerfacecolor="none", markeredgewidth=1.8, zorder=5)
        spans.append((x, 100 * row["low"], 100 * row["high"]))
        if key[1] == "float32":
            points.append((name_of(key[0]).split(" (")[0].removeprefix("Teacher, "), x, y, tint))
    least = 100 * (scores.loc[("teacher", "float32"), "value"] - float(one(rows, stage="rule")["value"]))
    right.axhline(least, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    right.set_xscale("log")
    low, high = right.get_xlim()
    right.set_xticks([t * 10.0**e for e in range(-3, 3) for t in (1, 1.5, 2, 3, 5, 7) if low <= t * 10.0**e <= high])
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.minorticks_off()
    right.margins(x=0.2, y=0.15)
    judged = f"2AFC on val (%), n = {int(scores['n'].iloc[0])}"
    right.set(xlabel=f"measured time an image at batch {int(times['batch'].iloc[0])} (ms)", ylabel=judged)
    label_points(right, points, spans=spans)
    return figure


def steps(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many times as fast as the ensemble each step is, in every number format, downwards, with intervals."""
    found = of(rows, stage="steps", metric="speedup")
    models, formats = list(found["model"].unique()), [d for d in FORMATS if d in set(found["dtype"])]
    ax = ax or plt.subplots(figsize=(TEXTWIDTH, 0.7 + 0.2 * len(models) * len(formats)))[1]
    height = 0.8 / len(formats)
    for i, dtype in enumerate(formats):
        part = found[found["dtype"] == dtype].set_index("model")[["value", "low", "high"]].reindex(models).astype(float)
        y = np.arange(len(models)) + height * (i - (len(formats) - 1) / 2)
        ends = part.fillna({"low": part["value"], "high": part["value"]})
        bars = [part["value"] - ends["low"], ends["high"] - part["value"]]
        style = {"fmt": "o", "color": (PLAN, colour("pool"), QUIET)[i], "markersize": 4, "elinewidth": 1}
        ax.errorbar(part["value"], y, xerr=bars, **style, label=FORMATS[dtype])
        for place, value, high in zip(y, part["value"], ends["high"], strict=True):
            text = f"{significant(value, 2 if value < 100 else 3)}×"
            ax.annotate(text, (high, place), (5, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_yticks(range(len(models)), [_step(model) for model in models])
    ax.set_ylim(len(models) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.set_xlim(0.8, 1.6 * found["value"].max())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("times as fast as the ensemble in the same number format", loc="right")
    if len(formats) > 1:
        ax.legend(loc="upper right")
    return ax


def _step(model: str) -> str:
    if ": " not in model:
        return {"ensemble": "ensemble: 3 × ViT-B/16", "one branch": "one ViT-B/16"}.get(model, model)
    vit, step = model.split(": ")
    shown = vit_names(vit)
    return (
        shown if step == "whole" else f"+ {STEPS.get(step, step)}" if shown == "ViT-S/16" else f"{shown}, whole recipe"
    )
