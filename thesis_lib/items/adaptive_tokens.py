"""Tables, figures and numbers of the adaptive-token study, from the rows of notebook 06 alone."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from thesis_lib import results
from thesis_lib.latex import INTERVAL, Table, interval, macro, percentage, significant
from thesis_lib.placement import label_ends
from thesis_lib.plots import QUIET, TEXTWIDTH, colour
from thesis_lib.summary import STAGES, costs, label, ordered

NOTEBOOK = "06_adaptive_tokens"
CAPTIONS = {
    "adaptive_tokens": "A plain ViT, and ViTs whose tokens halt: test accuracy with 95 \\% intervals over images, "
    "tokens used, multiply-adds executed, measured time.",
    "adaptive_engines": "One adaptive model in three forms, timed in turn.",
    "adaptive_metric": "Adaptive tokens as a perceptual metric, beside token merging and the mixers.",
    "adaptive_images": "Where tokens halt. From left: image with true and predicted class; blocks each patch passed; "
    "the same over the image; patches that never halted; the image they show.",
    "adaptive_speedup": "Speed-up of removing tokens against the share of tokens computed, measured (median and middle "
    "half of the rounds) and ideal (ratio of multiply-adds).",
    "adaptive_layers": "Tokens that each layer computes, mean over the test images, for the metric over those of the "
    "triplets.",
}
MODELS = {"baseline": "ViT", "adaptive": "A-ViT", "finetuned": "Tuned"}
ENGINES = {"dense": "dense ViT", "masked": "masked", "removing": "removing tokens"}
TINTS = {"baseline": "#000000", "adaptive": "#D55E00", "finetuned": "#0072B2", "dense": "#0072B2", "masked": "#D55E00"}
NAMES = {"tome": "Token merging", "adaptive": "Adaptive tokens"}


def make(profile: str) -> tuple[dict[str, Table], dict[str, Figure], dict[str, str]]:
    """Make the study's tables and figures by file stem, and its numbers by LaTeX macro."""
    rows, images = (results.read(name, profile=profile) for name in (NOTEBOOK, f"{NOTEBOOK}.images"))
    tables = {"adaptive_tokens": models(rows), "adaptive_engines": engines(rows)}
    tables["adaptive_metric"] = metrics(pd.concat([rows, _mixers(profile)], ignore_index=True))
    figures = {
        "adaptive_images": gallery(images),
        "adaptive_speedup": speedup(rows).figure,
        "adaptive_layers": layers(rows).figure,
    }
    return tables, figures, numbers(rows)


def _mixers(profile: str) -> pd.DataFrame:
    """The rows of the mixers' own notebooks, as far as these have run."""
    parts = []
    for pattern in ("02_attention_evaluation-*", "03_efficiency_analysis", "04_distillation-*"):
        try:
            parts.append(results.read(pattern, profile=profile))
        except FileNotFoundError:
            continue
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _of(rows: pd.DataFrame, metric: str, **columns: object) -> pd.DataFrame:
    """The rows of a metric with these values; ValueError if there is none."""
    found = rows[rows["metric"] == metric]
    for name, value in columns.items():
        found = found[found[name] == value]
    if found.empty:
        raise ValueError(f"no {metric!r} with {columns} among the rows: run notebook {NOTEBOOK} first")
    return found


def _one(rows: pd.DataFrame, metric: str, **columns: object) -> pd.Series:
    return _of(rows, metric, **columns).iloc[0]


def models(rows: pd.DataFrame) -> Table:
    """The plain ViT and the adaptive ones: accuracies, token use, cost and time at the largest batch."""
    times = _of(rows, "batch_time", stage="classifier")
    batch, records = int(times["batch"].max()), []
    for model, name in MODELS.items():
        record: dict[tuple[str, str], object] = {("", "Model"): name}
        for metric, head in (("accuracy", "Accuracy"), ("accuracy_macro", "Macro accuracy"), ("f1_macro", "Macro F1")):
            row = _one(rows, metric, model=model, split="test")
            record |= {(head, "%"): 100 * row["value"], (head, INTERVAL): interval(row["low"], row["high"], scale=100)}
        record["Tokens", "%"] = 100 * _one(rows, "tokens", model=model, split="test")["value"]
        record["Tokens", "depth"] = _one(rows, "depth", model=model, split="test")["value"]
        record["Cost", "MMAC"] = _one(rows, "macs_executed", model=model, split="test")["value"] / 1e6
        engine = "dense" if model == "baseline" else "removing"
        own = times[times["engine"] == engine]
        own = own if model == "baseline" else own[own["model"] == model]
        record["Cost", "ms"] = own.loc[own["batch"] == batch, "value"].iloc[0] / batch
        records.append(record)
    first = _one(rows, "accuracy", model="baseline", split="test")
    note = (
        f"{first['backbone']} at {int(first['image_size'])} px, n = {int(first['n'])} test images, 95 % bootstrap CI. "
        f"Depth: blocks a token passes. MMAC and ms an image, at batch {batch} on {first['device']}, timed in turn; "
        "adaptive models remove tokens. Tuned: an A-ViT that starts from the trained ViT's weights."
    )
    digits = {("Tokens", "%"): 1, ("Tokens", "depth"): 2, ("Cost", "MMAC"): None, ("Cost", "ms"): None}
    frame = pd.DataFrame(records)
    percent = {column: 1 for column in frame if column[1] == "%"}
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    return Table(frame, percent | digits, {column: "max" for column in percent if column[0] != "Tokens"}, note)


def engines(rows: pd.DataFrame, model: str = "finetuned") -> Table:
    """Dense, masked and removing form of one model at every batch size."""
    times, records = _of(rows, "batch_time", stage="classifier", model=model), []
    for batch, part in times.groupby("batch"):
        value = part.set_index("engine")["value"]
        for engine, name in ENGINES.items():
            records.append(
                {
                    "Batch": str(int(batch)),
                    "Form": name,
                    "ms a batch": value[engine],
                    "images/s": 1e3 * batch / value[engine],
                    "× dense": value["dense"] / value[engine],
                    "× masked": value["masked"] / value[engine],
                }
            )
    share = 100 * _one(rows, "tokens", model=model, split="test")["value"]
    first = times.iloc[0]
    note = (
        f"{MODELS[model]}, {first['backbone']} at {int(first['image_size'])} px on {first['device']}, "
        f"{int(first['threads'])} thread{'s' if first['threads'] > 1 else ''}, {share:.0f} % of tokens; medians of "
        f"{int(times['n'].min())} rounds in turn."
    )
    return Table(pd.DataFrame(records), dict.fromkeys(list(records[0])[2:], None), note=note, group="Batch", data=False)


def metrics(rows: pd.DataFrame) -> Table:
    """2AFC, multiply-adds and time of the adaptive metric, of token merging, and of each mixer at its last stage."""
    scored = rows[(rows["metric"] == "2afc") & (rows["split"] == "test") & rows["mixer"].notna()]
    for column, default in (("feature", "cls"), ("normalize", True)):
        if column in scored:
            scored = scored[scored[column].isna() | (scored[column] == default)]
    times = _of(rows, "batch_time", stage="metric")
    batch = int(times["batch"].max())
    spent = times[times["batch"] == batch].set_index("mixer")["value"] / batch
    where = {"backbone": times["backbone"].iloc[0], "image_size": times["image_size"].iloc[0]}
    macs = costs(rows, "macs", **where, embedding=True).set_index("mixer")
    stages, records = [stage for stage in STAGES if stage != "teacher-lora"], []
    for mixer in [name for name in ordered(scored["mixer"]) if name in spent.index]:
        own = scored[(scored["mixer"] == mixer) & scored["stage"].isin(stages)]
        if own.empty:
            continue
        row = own.loc[own["stage"].map(stages.index).idxmax()]
        records.append(
            {
                ("", "Model"): NAMES.get(mixer, label(mixer)),
                ("", "Stage"): STAGES[row["stage"]],
                ("2AFC", "%"): 100 * row["value"],
                ("2AFC", INTERVAL): interval(row["low"], row["high"], scale=100),
                ("Cost", "MMAC"): macs["value"].get(mixer, np.nan) / 1e6,
                ("Cost", "ms"): spent[mixer],
            }
        )
    if not records:
        raise ValueError(f"no metric was both scored and timed: run notebook {NOTEBOOK} first")
    frame = pd.DataFrame(records)
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    note = (
        f"2AFC on the test split (n = {int(scored['n'].max())}), 95 % bootstrap CI, at the last stage each was brought "
        f"to. MMAC and ms an image, ms at batch {batch}, timed in turn; the mixers' last block computes the class "
        "token alone. Token merging joins patches of the tuned MHA in every block, without training."
    )
    digits = {("2AFC", "%"): 1, ("Cost", "MMAC"): None, ("Cost", "ms"): None}
    best = {("2AFC", "%"): "max", ("Cost", "MMAC"): "min", ("Cost", "ms"): "min"}
    return Table(frame, digits, best, note)


def speedup(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the speed-up of removing tokens over the dense and the masked form against the share of tokens kept."""
    ax = ax or plt.subplots(figsize=(0.7 * TEXTWIDTH, 2.7))[1]
    found, ends = _of(rows, "speedup").sort_values("share", ascending=False), []
    for engine, style in (("ideal", "--"), ("dense", "-"), ("masked", "-")):
        line, tint = found[found["engine"] == engine], TINTS.get(engine, QUIET)
        x = 100 * line["share"]
        if engine != "ideal":
            ax.fill_between(x, line["low"].astype(float), line["high"].astype(float), color=tint, alpha=0.15, lw=0)
        ax.plot(x, line["value"], style, color=tint, marker="" if engine == "ideal" else "o", markersize=4)
        ends.append(("ideal" if engine == "ideal" else f"over {ENGINES[engine]}", x.iloc[-1], line["value"].iloc[-1]))
    ax.axhline(1, color=QUIET, linewidth=0.8, zorder=1)
    ax.set_xlabel("tokens computed (%)")
    ax.set_ylabel(f"speed-up at batch {int(found['batch'].max())}")
    low, high = ax.get_xlim()
    ax.set_xticks([tick for tick in ax.get_xticks() if low <= tick <= high])
    ax.set_xlim(high, low - 0.4 * (high - low))  # fewer tokens to the right
    label_ends(ax, [(*end, tint) for end, tint in zip(ends, (QUIET, TINTS["dense"], TINTS["masked"]), strict=True)])
    return ax


def layers(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many tokens each layer computes, one line a model."""
    ax = ax or plt.subplots(figsize=(0.6 * TEXTWIDTH, 2.4))[1]
    found, ends = _of(rows, "tokens_layer").sort_values("layer"), []
    for model in [name for name in [*MODELS, "metric"] if name in set(found["model"])]:
        line, tint = found[found["model"] == model], TINTS.get(model, colour("moh"))
        ax.plot(line["layer"], 100 * line["value"], color=tint, marker="o", markersize=4)
        ends.append((MODELS.get(model, "Metric"), line["layer"].iloc[-1], 100 * line["value"].iloc[-1], tint))
    ax.set(xlabel="layer", ylabel="tokens computed (%)", ylim=(0, 104))
    last = int(found["layer"].max())
    ax.set_xticks(range(1, last + 1))
    ax.set_xlim(0.8, last + 0.45 * last)
    label_ends(ax, ends)
    return ax


def gallery(images: pd.DataFrame) -> Figure:
    """Draw one row an image: the image, token depths, these over it, the patches that never halted, what they show."""
    side = (TEXTWIDTH - 1.1) / 5  # names on the left and the colour bar take an inch
    figure, axes = plt.subplots(len(images), 5, figsize=(TEXTWIDTH, len(images) * (side + 0.06) + 0.3), squeeze=False)
    heads = ("image", "token depth", "over the image", "never halted", "what they show")
    for line, row in zip(axes, images.itertuples(), strict=True):
        picture = np.asarray(Image.open(io.BytesIO(row.picture)).convert("RGB"))
        depth = np.asarray(row.depth).reshape(row.rows, row.columns)
        patch = (picture.shape[0] // row.rows, picture.shape[1] // row.columns)
        large = np.kron(depth, np.ones(patch, int))[..., None]  # (S, S, 1)
        kept = np.broadcast_to(large == row.layers, picture.shape)
        line[0].imshow(picture)
        shown = line[1].imshow(depth, cmap="inferno", vmin=0, vmax=row.layers)
        line[2].imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
        line[2].imshow(large[..., 0], cmap="inferno", vmin=0, vmax=row.layers, alpha=0.55)
        line[3].imshow(kept[..., 0], cmap="gray", vmin=0, vmax=1)
        line[4].imshow(np.where(kept, picture, 235).astype(np.uint8))
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            for spine in ax.spines.values():
                spine.set(visible=True, color="#C0C0C0", linewidth=0.5)
        right = row.true == row.predicted
        line[0].set_ylabel(f"{row.true}\n{'✓' if right else '✗'} {row.predicted}", fontsize=6.5)
        line[0].yaxis.label.set_color("#00795A" if right else "#B83A1B")
    for ax, head in zip(axes[0], heads, strict=True):
        ax.set_title(head, fontsize=8, loc="center")
    bar = figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, aspect=40, label="blocks passed")
    bar.ax.tick_params(labelsize=7)
    return figure


def numbers(rows: pd.DataFrame) -> dict[str, str]:
    """Name the numbers of the prose: token use, accuracies, speed-ups at the trained model's own token use, 2AFC."""
    found = {}
    for model in MODELS:
        found[macro("adaptive", model, "accuracy")] = percentage(_one(rows, "accuracy", model=model)["value"])
        found[macro("adaptive", model, "tokens")] = f"{100 * _one(rows, 'tokens', model=model)['value']:.0f}"
    times = _of(rows, "batch_time", stage="classifier", model="finetuned")
    times = times[times["batch"] == times["batch"].max()].set_index("engine")["value"]
    for engine in ("dense", "masked"):
        found[macro("adaptive", "speedup", engine)] = significant(times[engine] / times["removing"])
    score = _one(rows, "2afc", mixer="adaptive", split="test")
    ends = interval(score["low"], score["high"], scale=100)
    found[macro("adaptive", "2afc")] = f"{percentage(score['value'])} {ends}"
    found[macro("adaptive", "metric", "tokens")] = f"{100 * _one(rows, 'tokens', model='metric')['value']:.0f}"
    return found
