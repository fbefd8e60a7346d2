"""Tables, figures and numbers of the attention transfer study, from the rows of notebook 05 alone."""

import io
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from thesis_lib import results
from thesis_lib.latex import INTERVAL, Table, interval, macro, p_text, percentage, significant
from thesis_lib.placement import label_line
from thesis_lib.plots import CHOSEN, QUIET, TEXTWIDTH
from thesis_lib.statistics import paired_difference, recovered_share
from thesis_lib.summary import label, ordered

NOTEBOOK = "05_attention_transfer"
CAPTIONS = {
    "attention_transfer": "Attention transfer: a student that copies, or learns, a pretrained teacher's attention, "
    "between training from scratch and fine-tuning the teacher itself.",
    "attention_transfer_mixers": "Attention distilled from an MHA teacher into efficient mixers, each on its own keys: "
    "classification from scratch.",
    "attention_transfer_2afc": "Attention distillation beside embedding distillation: 2AFC on the test triplets.",
    "attention_transfer_published": "Attention transfer as published, ViT-L/16 on ImageNet-1k; not measured here.",
    "attention_transfer_parts": "Accuracy against the number of transferred layers, from the first, and of heads; "
    "bars: 95\\,\\% intervals over images.",
    "attention_transfer_maps": "Where the class token looks in the last layer, mean over heads; each map by its own "
    "maximum.",
}
RUNS = {
    "scratch": "Scratch",
    "finetuned": "Fine-tuned teacher",
    "copy": "Attention copy",
    "distill": "Attention distillation",
    "ensemble-logits": "Ensemble, mean logits",
    "ensemble-probabilities": "Ensemble, mean probabilities",
    "teacher": "Teacher",
}
OBJECTIVES = {"zero-shot": "Zero-shot", "embedding": "Embedding", "attention": "Attention", "both": "Both"}
PUBLISHED = pd.DataFrame(
    [
        ("Scratch", 83.0),
        ("Fine-tuned MAE teacher", 85.7),
        ("Attention copy", 85.1),
        ("Attention distillation", 85.7),
        ("Ensemble of distilled student and fine-tuned teacher", 86.3),
        ("Distillation of features instead of attention", 81.3),
    ],
    columns=["Run", "Top-1 (%)"],
)


def make(profile: str) -> tuple[dict[str, Table], dict[str, Figure], dict[str, str]]:
    """Make the study's tables and figures by file stem, and its numbers by LaTeX macro."""
    rows, images = (results.read(name, profile=profile) for name in (NOTEBOOK, f"{NOTEBOOK}.images"))
    triplets, maps = (results.read(f"{NOTEBOOK}.{part}", profile=profile) for part in ("triplets", "maps"))
    tables = {
        "attention_transfer": transfer(rows, images),
        "attention_transfer_mixers": mixers(rows),
        "attention_transfer_2afc": two_afc(rows),
        "attention_transfer_published": published(),
    }
    figures = {"attention_transfer_parts": transferred(rows), "attention_transfer_maps": side_by_side(maps)}
    return tables, figures, numbers(rows, images, triplets)


def accuracies(rows: pd.DataFrame, part: str, metric: str = "accuracy") -> pd.DataFrame:
    """Return the test rows of a part of the study; ValueError if there are none."""
    found = rows[(rows["metric"] == metric) & (rows["part"] == part) & (rows["split"] == "test")]
    if found.empty:
        raise ValueError(
            f"no row of part {part!r} has metric {metric!r} on split 'test': run notebook {NOTEBOOK} first"
        )
    return found.reset_index(drop=True)


def against_scratch(images: pd.DataFrame) -> pd.DataFrame:
    """Compare each run with scratch on the same test images: difference, low, high, p_value by stage."""
    right = images.pivot(index="id", columns="stage", values="correct").astype(float)
    tests = {
        stage: vars(paired_difference(right[stage].to_numpy(), right["scratch"].to_numpy()))
        for stage in dict.fromkeys(images["stage"])
        if stage != "scratch"
    }
    return pd.DataFrame(tests).T


def transfer(rows: pd.DataFrame, images: pd.DataFrame) -> Table:
    """The main comparison: accuracy, the paired difference to scratch, seconds of training and trained parameters."""
    main = accuracies(rows, "main")
    tests, about = against_scratch(images), rows[rows["part"] == "main"].set_index(["metric", "stage"])["value"]
    controls = rows[(rows["part"] == "controls") & (rows["metric"] == "accuracy")]
    both = pd.concat([main, controls], ignore_index=True)
    frame = pd.DataFrame(
        {
            "Run": [RUNS.get(stage, f"Copy, {stage}") for stage in both["stage"]],
            "Top-1 (%)": (100 * both["value"].astype(float)).round(1),
            INTERVAL: [interval(*ends, scale=100) for ends in both[["low", "high"]].to_numpy(dtype=float)],
            "Points": [round(100 * tests["difference"].get(stage, np.nan), 1) for stage in both["stage"]],
            "p": [p_text(tests["p_value"][stage]) if stage in tests.index else "" for stage in both["stage"]],
        }
    )
    for metric, name, scale in (("params", "Params (M)", 1e-6), ("seconds", "Time (s)", 1.0)):
        values = [about.get((metric, stage), np.nan) for stage in both["stage"]]
        frame[name] = [float(significant(scale * value)) if np.isfinite(value) else np.nan for value in values]
    first = main.iloc[0]
    note = (
        f"{first['backbone']} at {int(first['image_size'])} px, n = {int(first['n'])} test images, 95 % bootstrap CI. "
        "Points: minus scratch on the same images; p: exact McNemar test, not corrected. Params: of the student, as "
        "trained. A copying student needs its teacher at inference, an ensemble needs both."
    )
    digits = {"Top-1 (%)": 1, "Points": 1, "Params (M)": None, "Time (s)": None}
    return Table(frame, digits, {"Top-1 (%)": "max"}, note)


def mixers(rows: pd.DataFrame) -> Table:
    """Classification by each mixer from scratch, without and with the teacher's attention, and what gap remains."""
    main = accuracies(rows, "mixers")
    gaps = rows[(rows["part"] == "mixers") & (rows["metric"] == "attention_gap")]
    gaps = gaps.set_index(["mixer", "stage"])["value"]
    names = ordered(main["mixer"])
    frame = pd.DataFrame({("", "Mixer"): [label(name) for name in names]})
    for stage in ("scratch", "distill"):
        part = main[main["stage"] == stage].set_index("mixer").loc[names]
        frame[RUNS[stage], "%"] = (100 * part["value"].astype(float)).round(1).to_numpy()
        frame[RUNS[stage], INTERVAL] = [
            interval(*ends, scale=100) for ends in part[["low", "high"]].to_numpy(dtype=float)
        ]
        frame[RUNS[stage], "gap"] = [float(significant(gaps[name, stage])) for name in names]
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    first = main.iloc[0]
    note = (
        f"{first['backbone']} teacher at {int(first['image_size'])} px, n = {int(first['n'])} test images, 95 % "
        "bootstrap CI. Gap: divergence from the teacher's map on the mixer's own keys, nats a row, validation images."
    )
    percent = {(RUNS[stage], "%"): 1 for stage in ("scratch", "distill")}
    gap = {(RUNS[stage], "gap"): None for stage in ("scratch", "distill")}
    return Table(frame, percent | gap, dict.fromkeys(percent, "max") | dict.fromkeys(gap, "min"), note)


def two_afc(rows: pd.DataFrame) -> Table:
    """2AFC of each mixer by what it was taught: nothing, the teacher's embeddings, its attention, or both."""
    main = accuracies(rows, "perceptual", "2afc")
    names, stages = ordered(main["mixer"]), [stage for stage in OBJECTIVES if stage in set(main["stage"])]
    frame = pd.DataFrame({("", "Mixer"): [label(name) for name in names]})
    for stage in stages:
        part = main[main["stage"] == stage].set_index("mixer").loc[names]
        frame[OBJECTIVES[stage], "%"] = (100 * part["value"].astype(float)).round(1).to_numpy()
        frame[OBJECTIVES[stage], INTERVAL] = [
            interval(*ends, scale=100) for ends in part[["low", "high"]].to_numpy(dtype=float)
        ]
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    first = main.iloc[0]
    note = (
        f"{first['backbone']} at {int(first['image_size'])} px, n = {int(first['n'])} test triplets, 95 % bootstrap "
        "CI; the same images, steps and trained parameters for each objective."
    )
    percent = {(OBJECTIVES[stage], "%"): 1 for stage in stages}
    return Table(frame, percent, dict.fromkeys(percent, "max"), note)


def published() -> Table:
    """What the paper reports; none of it was measured here."""
    note = "ViT-L/16, ImageNet-1k, arXiv 2411.09702, as summaries of the paper quote it; not measured here."
    return Table(PUBLISHED, {"Top-1 (%)": 1}, {}, note, data=False)


def transferred(rows: pd.DataFrame) -> Figure:
    """Draw accuracy over the number of transferred layers and of heads, with intervals; fine-tuning for comparison."""
    sweeps = {"layers": "transferred layers, from the first", "heads": "transferred heads, in all layers"}
    figure, axes = plt.subplots(1, 2, figsize=(TEXTWIDTH, 2.3), sharey=True)
    for ax, (what, text) in zip(axes, sweeps.items(), strict=True):
        line = accuracies(rows, f"sweep-{what}").sort_values("transferred")
        x, y, low, high = (line[name].astype(float) for name in ("transferred", "value", "low", "high"))
        ax.errorbar(x, 100 * y, [100 * (y - low), 100 * (high - y)], fmt="o-", color=CHOSEN, capsize=2)
        main = accuracies(rows, "main").set_index("stage")["value"]
        names = ["finetuned", *(["scratch"] if what == "heads" else [])]
        for name in names:
            ax.axhline(100 * main[name], color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        ax.set_xlabel(text)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(x=0.08, y=0.12)
        for name in names:
            label_line(ax, RUNS[name], 100 * main[name], QUIET, spans=zip(x, 100 * low, 100 * high, strict=True))
    axes[0].set_ylabel(f"top-1 (%), n = {int(accuracies(rows, 'main')['n'].iloc[0])}")
    return figure


def side_by_side(maps: pd.DataFrame, *, layer: int = -1, runs: Sequence[str] | None = None) -> Figure:
    """Draw each image beside the class token's attention in one layer of the teacher and of its students.

    `maps` holds a row an image, run and layer: png (bytes) and map (row-major, a square grid); each map is scaled to
    its own largest weight.
    """
    runs = list(runs or dict.fromkeys(maps["run"]))
    layer = sorted(maps["layer"].unique())[layer]
    pictures = maps.drop_duplicates("image").set_index("image")["png"]
    side = TEXTWIDTH / (len(runs) + 1)
    figure, axes = plt.subplots(
        len(pictures), len(runs) + 1, figsize=(TEXTWIDTH, len(pictures) * side + 0.35), squeeze=False
    )
    found = maps[maps["layer"] == layer].set_index(["image", "run"])["map"]
    for line, (image, png) in zip(axes, pictures.items(), strict=True):
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        line[0].imshow(picture)
        for ax, run in zip(line[1:], runs, strict=True):
            weights = np.asarray(found[image, run], dtype=float)
            grid = weights.reshape(round(len(weights) ** 0.5), -1) / weights.max()
            ax.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=255)
            ax.imshow(grid, cmap="inferno", alpha=0.7, vmin=0, extent=(-0.5, len(picture) - 0.5) * 2, origin="upper")
    for ax, text in zip(axes[0], ["image", *(RUNS.get(run, run) for run in runs)], strict=True):
        ax.set_title(textwrap.fill(text, 13), fontsize=8, loc="center")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure


def numbers(rows: pd.DataFrame, images: pd.DataFrame, triplets: pd.DataFrame) -> dict[str, str]:
    """Return what the prose quotes: accuracies and 2AFC in per cent with intervals, points over scratch, counts."""
    main, found = accuracies(rows, "main"), {}
    found["AttentionTransferN"] = str(int(main["n"].iloc[0]))
    found["AttentionTransferTriplets"] = str(triplets["id"].nunique())
    parts = [("main", "accuracy"), ("mixers", "accuracy"), ("perceptual", "2afc")]
    for part, metric in parts:
        for row in accuracies(rows, part, metric).itertuples():
            words = ("attention", row.stage) if part == "main" else ("attention", row.mixer, row.stage, metric)
            name = macro(*words)
            found |= {name: percentage(row.value), f"{name}Interval": interval(row.low, row.high, scale=100)}
    for stage, difference in against_scratch(images)["difference"].items():
        points = f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")
        found[macro("attention", stage, "points")] = points
    right = images.pivot(index="id", columns="stage", values="correct").astype(float)
    for stage in ("copy", "distill"):
        name = macro("attention", stage, "share")
        share = recovered_share(right["finetuned"], right["scratch"], right[stage])
        if pd.notna(share.value):
            ends = interval(share.low, share.high, digits=0, scale=100)
            found |= {name: f"{100 * share.value:.0f}", f"{name}Interval": ends}
    return found
