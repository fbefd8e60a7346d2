"""Tables, figures and numbers of the image classification study, from the rows of notebook 07 alone."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from thesis_lib import results
from thesis_lib.items.classification_galleries import attention_gallery, head_gallery, sample_gallery
from thesis_lib.latex import INTERVAL, Table, interval, macro, p_text, percentage, significant
from thesis_lib.placement import label_points
from thesis_lib.plots import MARKERS, TEXTWIDTH, colour
from thesis_lib.statistics import Paired, paired_difference
from thesis_lib.summary import label, ordered

NOTEBOOK = "07_image_classification"
CAPTIONS = {
    "classification_accuracy": "Image classification from scratch: test accuracy with 95 \\% intervals over images, "
    "and the paired difference to MHA on the same images.",
    "classification_costs": "What each classifier costs to train and to use.",
    "classification_samples": "Pictures of the data sets, one a class, of ten classes at most.",
    "classification_curves": "Loss on the training images and top-1 on validation images over the epochs.",
    "classification_accuracy_against_cost": "Test accuracy against multiply-adds and latency, with 95 \\% intervals.",
    "classification_scaling": "One image as it grows: multiply-adds in closed form of every mixer, latency and memory "
    "of those that were trained. Lines that coincide lie upon each other (MoH on MHA, Identity on Pool).",
    "classification_attention": "Where the class token looks, by layer (mean over heads), and through all layers; each "
    "map by its own maximum.",
    "classification_heads": "Where the class token looks in each head of MHA: the first picture of the maps by layer.",
    "classification_patterns": "How far and how broadly tokens look, and how alike heads are, by layer.",
}
SHOWN = {  # metric: heading, unit, scale
    "params": ("Params", "k", 1e-3),
    "macs": ("MAC", "M", 1e-6),
    "training_memory": ("Training", "MiB", 1.0),
    "training_throughput": ("Training", "images/s", 1.0),
    "latency": ("Latency (ms)", "median", 1.0),
}


def make(profile: str) -> tuple[dict[str, Table], dict[str, Figure], dict[str, str]]:
    """Make the study's tables and figures by file stem, and its numbers by LaTeX macro."""
    rows, images = (results.read(name, profile=profile) for name in (NOTEBOOK, f"{NOTEBOOK}.images"))
    maps, samples = (results.read(f"{NOTEBOOK}.{part}", profile=profile) for part in ("maps", "samples"))
    tables = {"classification_accuracy": accuracy(rows, images), "classification_costs": costs(rows)}
    figures = {
        "classification_samples": sample_gallery(samples),
        "classification_curves": curves(rows),
        "classification_accuracy_against_cost": accuracy_against_cost(rows),
        "classification_scaling": scaling(rows),
        "classification_attention": attention_gallery(maps),
        "classification_heads": head_gallery(maps, "mha"),
        "classification_patterns": patterns(rows),
    }
    return tables, figures, numbers(rows)


def scores(rows: pd.DataFrame, metric: str = "top1") -> pd.DataFrame:
    """Return the test score of each data set and mixer over its runs, in display order; ValueError if there is none."""
    found = rows[(rows["metric"] == metric) & (rows["split"] == "test") & (rows["stage"] == "mean")]
    if found.empty:
        raise ValueError(f"no row has metric {metric!r} on split 'test': run notebook {NOTEBOOK} first")
    mixers, sets = ordered(found["mixer"]), list(dict.fromkeys(found["dataset"]))
    place = found["dataset"].map(sets.index) * len(mixers) + found["mixer"].map(mixers.index)
    return found.iloc[np.argsort(place.to_numpy(), kind="stable")].reset_index(drop=True)


def against(images: pd.DataFrame, dataset: str, mixer: str, other: str = "mha") -> Paired:
    """Compare two mixers' top-1 on the same test images, averaged over the runs; ValueError if one was left out."""
    own = images[images["dataset"] == dataset].groupby(["mixer", "image"])["top1"].mean()
    if absent := sorted({mixer, other} - set(own.index.unique("mixer"))):
        raise ValueError(
            f"no run of {', '.join(absent)} on {dataset} to compare with: add it to `mixers` of notebook 07"
        )
    return paired_difference(own[mixer].to_numpy(), own[other].to_numpy())


def accuracy(rows: pd.DataFrame, images: pd.DataFrame) -> Table:
    """Top-1, top-5 and macro F1 of every mixer, and its top-1 minus MHA's on the same images."""
    main = scores(rows)
    frame = pd.DataFrame({("", "Data set"): main["dataset"], ("", "Mixer"): main["mixer"].map(label)})
    for metric, name in (("top1", "Top-1"), ("top5", "Top-5"), ("macro_f1", "F1")):
        part = scores(rows, metric)
        frame[name, "%"] = (100 * part["value"].astype(float)).round(1)
        if metric == "top1":
            frame[name, INTERVAL] = [interval(*ends, scale=100) for ends in part[["low", "high"]].to_numpy(float)]
            frame[name, "runs"] = [_range(rows, d, m) for d, m in zip(main["dataset"], main["mixer"], strict=True)]
    pairs = [None if m == "mha" else against(images, d, m) for d, m in zip(main["dataset"], main["mixer"], strict=True)]
    frame["Against MHA", "pts"] = [math.nan if pair is None else round(100 * pair.difference, 1) for pair in pairs]
    frame["Against MHA", "p"] = ["" if pair is None else p_text(pair.p_value) for pair in pairs]
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    best = dict.fromkeys([("Top-1", "%"), ("Top-5", "%"), ("F1", "%")], "max")
    counts = ", ".join(f"{d} n = {int(part['n'].max())}" for d, part in main.groupby("dataset", sort=False))
    runs = ", ".join(f"{int(part['runs'].max())} on {d}" for d, part in main.groupby("dataset", sort=False))
    note = (
        f"Test images: {counts}; means over runs ({runs}), bootstrap CI over images. F1: mean of the classes'. p: "
        "exact sign test on the images, not corrected for their number. Neither CI nor p knows of other seeds: the "
        "runs' least and best stand beside."
    )
    return Table(frame, dict.fromkeys([*best, ("Against MHA", "pts")], 1), best, note, ("", "Data set"))


def _range(rows: pd.DataFrame, dataset: str, mixer: str) -> str:
    own = rows[(rows["stage"] == "run") & (rows["metric"] == "top1") & rows["epoch"].isna()]
    values = 100 * own[(own["dataset"] == dataset) & (own["mixer"] == mixer)]["value"]
    return f"{values.min():.1f}–{values.max():.1f}" if len(values) > 1 else ""


def costs(rows: pd.DataFrame) -> Table:
    """Parameters, operations, file, training and inference of every mixer, means over the runs."""
    main, measured = scores(rows), rows[rows["stage"] == "run"]
    value = measured.groupby(["dataset", "mixer", "metric"])["value"].mean()
    frame = pd.DataFrame({("", "Data set"): main["dataset"], ("", "Mixer"): main["mixer"].map(label)})
    keys = list(zip(main["dataset"], main["mixer"], strict=True))
    for metric, (heading, unit, scale) in SHOWN.items():
        frame[heading, unit] = [float(significant(scale * value[(*key, metric)])) for key in keys]
    late = measured[measured["metric"] == "latency"].groupby(["dataset", "mixer"])[["mean", "std"]].mean()
    frame["Latency (ms)", "mean ± std"] = [
        f"{significant(late.loc[key, 'mean'])} ± {significant(late.loc[key, 'std'], 2)}" for key in keys
    ]
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    numeric = [(heading, unit) for heading, unit, _ in SHOWN.values()]
    best = {column: "max" if column[1] == "images/s" else "min" for column in numeric}
    first = measured[measured["metric"] == "training_memory"].iloc[0]
    note = (
        f"On {first['device']}. Latency: one image; training memory: the most held beyond weights and images in a step "
        f"of AdamW at batch {int(first['batch'])}. 1 MAC is one multiply-add; softmax and norms are not counted."
    )
    return Table(frame, dict.fromkeys(numeric), best, note, ("", "Data set"), data=False)


def numbers(rows: pd.DataFrame) -> dict[str, str]:
    """Top-1 with its interval, and n, of every data set and mixer, by macro name."""
    found = {}
    for row in scores(rows).itertuples():
        words = ("classification", row.dataset, row.mixer)
        found[macro(*words)] = f"{percentage(row.value)} %"
        found[macro(*words, "interval")] = interval(row.low, row.high, scale=100)
        found[macro("classification", row.dataset, "n")] = f"{int(row.n)}"
    return found


def curves(rows: pd.DataFrame) -> Figure:
    """Draw training loss and validation top-1 over the epochs, means over the runs, one row of panels a data set."""
    rows = rows[rows["epoch"].notna()]
    sets = list(dict.fromkeys(rows["dataset"]))
    figure, axes = plt.subplots(len(sets), 2, figsize=(TEXTWIDTH, 0.5 + 1.75 * len(sets)), squeeze=False)
    for pair, name in zip(axes, sets, strict=True):
        part = rows[rows["dataset"] == name]
        for ax, metric, split, text in zip(
            pair, ("loss", "top1"), ("train", "val"), ("training loss", "val top-1 (%)"), strict=True
        ):
            chosen = part[(part["metric"] == metric) & (part["split"] == split)]
            _lines(ax, chosen.assign(value=chosen["value"] * (100 if metric == "top1" else 1)), "epoch")
            ax.set(xlabel="epoch", ylabel=text, title=name)
            ax.xaxis.get_major_locator().set_params(integer=True)
    return _with_legend(figure, rows["mixer"])


def accuracy_against_cost(rows: pd.DataFrame, dataset: str | None = None) -> Figure:
    """Draw test top-1 with its interval over MACs and over latency, for one data set (the first)."""
    main = scores(rows)
    main = main[main["dataset"] == (dataset or main["dataset"].iloc[0])]
    price = rows[(rows["stage"] == "run") & (rows["dataset"] == main["dataset"].iloc[0])]
    price = price.groupby(["metric", "mixer"])["value"].mean()
    figure, axes = plt.subplots(1, 2, figsize=(TEXTWIDTH, 2.5), sharey=True)
    for ax, metric, scale in zip(axes, ("macs", "latency"), (1e-6, 1.0), strict=True):
        points, spans = [], []
        for row in main.itertuples():
            x, y = scale * price[metric, row.mixer], 100 * row.value
            ends = [[y - 100 * row.low], [100 * row.high - y]]
            style = {"color": colour(row.mixer), "marker": MARKERS.get(row.mixer, "h"), "capsize": 1.5}
            ax.errorbar([x], [y], ends, elinewidth=0.9, **style)
            points.append((label(row.mixer), x, y, colour(row.mixer)))
            spans.append((x, 100 * row.low, 100 * row.high))
        ax.set_xlabel("million multiply-adds an image" if metric == "macs" else "latency of one image (ms)")
        ax.margins(x=0.2, y=0.15)
        label_points(ax, points, spans=spans)
    axes[0].set_ylabel(f"top-1 on {main['dataset'].iloc[0]} (%)")
    return figure


def scaling(rows: pd.DataFrame) -> Figure:
    """Draw MACs, latency and memory of one image over its number of patches, logarithmic."""
    rows = rows[(rows["stage"] == "scaling") & rows["value"].notna()]
    figure, axes = plt.subplots(1, 3, figsize=(TEXTWIDTH, 2.7))
    names = {"macs": "million multiply-adds", "latency": "latency (ms)", "peak_memory": "memory (MiB)"}
    for ax, (metric, text) in zip(axes, names.items(), strict=True):
        part = rows[rows["metric"] == metric]
        _lines(ax, part.assign(value=part["value"] * (1e-6 if metric == "macs" else 1)), "tokens")
        ax.set(xscale="log", yscale="log", xlabel="patches", title=text)
        ticks = sorted(rows["tokens"].unique())
        ax.set_xticks(ticks, [f"{int(n)}" for n in ticks])
        ax.yaxis.set_major_locator(LogLocator())
        ax.minorticks_off()
    return _with_legend(figure, rows["mixer"])


def patterns(rows: pd.DataFrame, dataset: str | None = None) -> Figure:
    """Draw mean attention distance, entropy and head similarity over the layers, for one data set (the first)."""
    rows = rows[rows["stage"] == "patterns"]
    rows = rows[rows["dataset"] == (dataset or rows["dataset"].iloc[0])]
    figure, axes = plt.subplots(1, 3, figsize=(TEXTWIDTH, 2.4))
    names = {
        "attention_distance": "distance (patches)",
        "attention_entropy": "entropy / ln N",
        "head_similarity": "similarity of heads",
    }
    for ax, (metric, text) in zip(axes, names.items(), strict=True):
        _lines(ax, rows[rows["metric"] == metric], "layer")
        ax.set(xlabel="layer", title=text)
        ax.xaxis.get_major_locator().set_params(integer=True)
    return _with_legend(figure, rows["mixer"])


def _lines(ax: Axes, data: pd.DataFrame, x: str) -> None:
    """Draw `value` over `x`, one line a mixer, means where there are several rows."""
    for mixer in ordered(data["mixer"]):
        line = data[data["mixer"] == mixer].groupby(x)["value"].mean()
        style = {"marker": MARKERS.get(mixer, "h"), "markersize": 3.5, "markeredgecolor": "white"}
        ax.plot(line.index, line.to_numpy(float), color=colour(mixer), markeredgewidth=0.4, **style)


def _with_legend(figure: Figure, mixers: pd.Series) -> Figure:
    names = ordered(mixers)
    keys = [
        plt.Line2D([], [], color=colour(m), marker=MARKERS.get(m, "h"), markersize=4, label=label(m)) for m in names
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(names), 6), columnspacing=1.4)
    return figure
