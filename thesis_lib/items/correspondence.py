"""Tables, figures and numbers of the correspondence study, made from the rows of notebook 08 alone, without torch.

PCK@0.1 of the box, over points, border counted, unless a table says otherwise; its interval draws pairs.
"""

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from thesis_lib import plots, results
from thesis_lib.items.correspondence_galleries import failures, features, matches
from thesis_lib.latex import INTERVAL, Table, interval, macro, percentage
from thesis_lib.placement import label_points
from thesis_lib.summary import MIXERS, label, vit_names

NOTEBOOK = "08_semantic_correspondence"
ALPHA, EVALUATOR = 0.1, "DIFT per point"
POINTS = f"PCK@{ALPHA:g} of the box over all key-points"
SPLITS = {"test": "SPair", "moved": "Moved", "layout": "Layout"}
BASELINES = ("position", "colour")  # no model
STAGES = {"zero-shot": "zero-shot", "lora": "LoRA on votes", "distilled": "distilled from one token"}

CAPTIONS = {
    "correspondence_systems": "Semantic correspondence of two baselines without a model, and of the published "
    "systems whose weights are present.",
    "correspondence_mixers": "Correspondence of the backbone with each of the mixers tried here, before and after "
    "perceptual training.",
    "correspondence_evaluators": "One set of features under every published evaluator and read-out.",
    "correspondence_training": "Students trained on true points and distilled from a combined teacher.",
    "correspondence_factors": "PCK by viewpoint, scale, truncation and occlusion.",
    "correspondence_published": "Quoted numbers on SPair-71k; they were not measured here.",
    "correspondence_layers": "PCK on the validation pairs by layer and facet, or time step.",
    "correspondence_knowledge": "Semantic over spatial knowledge; bars: 95\\,\\% intervals over pairs. Hollow: as "
    "published or swapped; with the same mark, half full: tuned by LoRA on votes, full: distilled from one token; "
    "crosses: trained for correspondence.",
    "correspondence_distances": "Distance of the match from the truth, in sides of the box: median, middle half, and "
    "whiskers from the 5th to the 95th percentile.",
    "correspondence_matches": "Key-points of the source and where each model finds them; a line leads to the truth.",
    "correspondence_features": "Similarity with the source's first point, and leading components of the foreground.",
    "correspondence_failures": "Share of missed key-points by category, for each model.",
}

PUBLISHED = pd.DataFrame(
    [
        ("DINOv2 ViT-B/14", None, 55.7),
        ("DistillDIFT", 42.7, 59.8),
        ("DINOv2 + Stable Diffusion", 48.3, 63.5),
    ],
    columns=["System", "PCK@0.05 (%)", "PCK@0.1 (%)"],
)


def scores(
    rows: pd.DataFrame, *, split: str = "test", alpha: float = ALPHA, evaluator: str = EVALUATOR
) -> pd.DataFrame:
    """Return each model's one overall row on a split of SPair-71k, in the notebook's order, indexed by model."""
    found = rows[(rows["metric"] == "pck") & (rows["dataset"] == "SPair-71k") & (rows["split"] == split)]
    found = found[(found["group"] == "all") & (found["alpha"] == alpha) & (found["evaluator"] == evaluator)]
    found = found[~found["stage"].isin(["evaluator", "sweep"])]
    if found.empty:
        raise ValueError(f"no model was scored on split {split!r} at alpha {alpha}: run notebook {NOTEBOOK}")
    return found.drop_duplicates("model").set_index("model")


def _percent(rows: pd.DataFrame, models: list[str], group: str) -> pd.DataFrame:
    part = rows.reindex(models)
    ends = part[["low", "high"]].to_numpy(float)
    value = (100 * part["value"].astype(float)).round(1)
    return pd.DataFrame({(group, "%"): value, (group, INTERVAL): [interval(*e, scale=100) for e in ends]}, index=models)


def _note(rows: pd.DataFrame, what: str, splits: list[tuple[str, str]]) -> str:
    main = scores(rows)
    text = f"{what}, {int(main['n'].iloc[0])} pairs of SPair-71k's test split ({int(main['skipped'].iloc[0])} unusable)"
    others = [f"{int(scores(rows, split=split)['n'].iloc[0])} of {name}" for split, name in splits if split != "test"]
    return ", ".join([text, *others]) + "; 95 % bootstrap CI over pairs."


def _table(parts: list[pd.DataFrame], heads: list[tuple[str, list[str]]], note: str) -> Table:
    frame = pd.concat(parts, axis=1)
    for place, (head, texts) in enumerate(heads):
        frame.insert(place, ("", head), texts)
    percent = {column: 1 for column in frame if column[1] == "%"}
    text = [column for column in frame if column[1] == INTERVAL]
    frame[text] = frame[text].fillna("")
    return Table(frame.reset_index(drop=True), percent, dict.fromkeys(percent, "max"), note)


def systems_table(rows: pd.DataFrame) -> Table:
    """Every published system: measured where its weights are present, marked where they are not."""
    named = rows[(rows["metric"] == "pck") & (rows["stage"] == "system")]
    models = list(dict.fromkeys(named["model"]))
    low, main = scores(rows, alpha=0.05), scores(rows)
    image = scores(rows, evaluator="DIFT per image")
    parts = [_percent(r, models, g) for r, g in ((low, "PCK@0.05"), (main, "PCK@0.1"), (image, "PCK@0.1 per image"))]
    absent = set(named.loc[named["value"].isna(), "model"])
    state = ["no" if model in absent else "none" if model in BASELINES else "yes" for model in models]
    what = "PCK@α: within α times the box's longer side, over all key-points, or the mean of each image's"
    note = _note(rows, what, [])
    note += " No: weights not present, and nothing is estimated." if absent else ""
    return _table(parts, [("System", models), ("Weights", state)], note)


def mixers_table(rows: pd.DataFrame) -> Table:
    """Every mixer's backbone, zero-shot and after what notebooks 02 and 04 did to it."""
    main = scores(rows)
    chosen = main[main["stage"].isin(list(STAGES)) & main["mixer"].notna()]
    order = sorted(
        chosen.index, key=lambda m: (list(MIXERS).index(chosen.loc[m, "mixer"]), _stage(chosen.loc[m, "stage"]))
    )
    heads = [("Mixer", [label(chosen.loc[m, "mixer"]) for m in order]),
             ("Stage", [STAGES[chosen.loc[m, "stage"]] for m in order])]  # fmt: skip
    splits = _splits(rows)
    return _table([_percent(scores(rows, split=s), order, n) for s, n in splits], heads, _note(rows, POINTS, splits))


def _stage(stage: str) -> int:
    return list(STAGES).index(stage)


def _splits(rows: pd.DataFrame) -> list[tuple[str, str]]:
    return [
        (split, name) for split, name in SPLITS.items() if split in set(rows.loc[rows["stage"] == "zero-shot", "split"])
    ]


def training_table(rows: pd.DataFrame) -> Table:
    """The teacher and every trained student, with the epoch that was kept."""
    main = scores(rows)
    models = [m for m in main.index if main.loc[m, "stage"] in ("teacher", "trained")]
    curve = rows[rows["metric"] == "val pck"]
    kept = []
    for model in models:
        log = curve[curve["model"] == model]
        best = "" if log.empty else f"{int(log.loc[log['value'].idxmax(), 'epoch'])} of {int(log['epoch'].max())}"
        kept.append(best)
    splits = _splits(rows)
    parts, note = [_percent(scores(rows, split=s), models, n) for s, n in splits], _note(rows, POINTS, splits)
    names = [_short(model) for model in models]
    return _table(parts, [("Model", names), ("Epoch", kept)], note + " The epoch was chosen on val.")


def evaluators_table(rows: pd.DataFrame) -> Table:
    """One model's features under each published evaluator, and each read-out under DIFT's."""
    part = rows[rows["stage"] == "evaluator"].reset_index(drop=True)
    names = {"argmax": "argmax", "soft": "soft-argmax", "window": "windowed soft-argmax", "patch": "patch centre"}
    frame = pd.DataFrame({"Evaluator": part["evaluator"], "Read-out": part["readout"].map(names)})
    frame["PCK@0.1 (%)"] = (100 * part["value"].astype(float)).round(1)
    frame[INTERVAL] = [interval(low, high, scale=100) for low, high in zip(part["low"], part["high"], strict=True)]
    return Table(
        frame, {"PCK@0.1 (%)": 1}, {}, f"The same features of {part['model'].iloc[0]}, {int(part['n'].iloc[0])} pairs."
    )


def factors_table(rows: pd.DataFrame, models: list[str]) -> Table:
    """PCK of some models at each level of what varies between a pair's pictures."""
    part = rows[rows["group"].isin(["viewpoint", "scale", "truncation", "occlusion"]) & rows["model"].isin(models)]
    wide = part.pivot_table(index=["group", "level"], columns="model", values="value", sort=False)[models]
    counts = part[part["model"] == models[0]].set_index(["group", "level"])[["n", "points"]].loc[wide.index]
    frame = wide.mul(100).round(1).reset_index()
    models = [_short(model) for model in models]
    frame.columns = ["Factor", "Level", *models]
    frame.insert(2, "Pairs", counts["n"].astype(int).to_numpy())
    frame.insert(3, "Points", counts["points"].astype(int).to_numpy())
    frame["Factor"] = frame["Factor"].str.capitalize()
    digits = dict.fromkeys(models, 1) | {"Pairs": 0, "Points": 0}
    return Table(
        frame,
        digits,
        {},
        f"PCK@{ALPHA:g} of the box (%), by levels of the pair; a difference on few pairs decides nothing.",
        group="Factor",
    )


def layers_figure(rows: pd.DataFrame) -> Figure:
    """Draw a heat map for every model that was swept."""
    part = rows[rows["stage"] == "sweep"]
    models = list(dict.fromkeys(part["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(2.9 * len(models), 2.6), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        one = part[part["model"] == model]
        wide = one.pivot_table(index="layer", columns="column", values="value", sort=False).sort_index(ascending=False)
        wide.index = wide.index.astype(int)
        sns.heatmap(100 * wide.astype(float), annot=True, fmt=".1f", cmap="viridis", ax=ax, cbar=False,
                    annot_kws={"fontsize": 7.5}, linewidths=0.5)  # fmt: skip
        ax.set(title=f"{model}: PCK@{ALPHA:g} on val (%), n = {int(one['n'].max())}", xlabel="", ylabel="layer")
        ax.tick_params(length=0, rotation=0)
        ax.grid(visible=False)
    return figure


def knowledge_figure(rows: pd.DataFrame) -> Figure:
    """Draw each model by its PCK on "layout" (where) and "moved" (what); lines lead to a mixer's trained versions."""
    where, what = (scores(rows, split=s) for s in ("layout", "moved"))
    where, what = where[where["value"].notna()], what[what["value"].notna()]
    figure, ax = plt.subplots(figsize=(0.8 * plots.TEXTWIDTH, 3.6))
    points, spans = [], []
    for model, row in what.iterrows():
        x, y, stage = 100 * where.loc[model, "value"], 100 * row["value"], row["stage"]
        tint = plots.colour(row["mixer"]) if stage in STAGES else "black" if stage != "system" else plots.QUIET
        fill = {"zero-shot": "none", "system": "none", "lora": "bottom"}.get(stage, "full")
        low, high = 100 * row["low"], 100 * row["high"]
        ax.errorbar([x], [y], [[y - low], [high - y]], fmt="none", ecolor=tint, elinewidth=0.7, alpha=0.6)
        marker = plots.MARKERS.get(row["mixer"], "o") if stage in STAGES else "X"
        half = {"fillstyle": fill, "markerfacecoloralt": "white"}
        ax.plot([x], [y], marker, color=tint, markersize=5.5, zorder=3 + (fill != "none"), **half)
        start = f"{row['mixer']}, zero-shot"
        if stage in STAGES and model != start and start in what.index:
            ends = [[100 * table.loc[m, "value"] for m in (start, model)] for table in (where, what)]
            ax.plot(*ends, color=tint, linewidth=0.8, alpha=0.6)
        else:
            points.append((_short(model), x, y, tint))
        spans.append((x, low, high))
    pairs = (int(table["n"].max()) for table in (where, what))
    heads = ("PCK on layout: where parts were (%)", "PCK on moved: what parts are (%)")
    (across, up) = (f"{head}, n = {n}" for head, n in zip(heads, pairs, strict=True))
    ax.set(xlabel=across, ylabel=up)
    ax.margins(0.12)
    label_points(ax, points, spans=spans)
    return figure


def _short(model: str) -> str:
    """Name a model as figures do: "mha, zero-shot" is MHA, "sra, lora" is SRA LoRA, timm's names are ViT-B/14."""
    mixer, _, stage = vit_names(model).replace("cross_entropy", "CE").replace("lora", "LoRA").partition(", ")
    return f"{label(mixer)}{'' if stage == 'zero-shot' else f' {stage}'}" if stage else mixer


def distances_figure(points: pd.DataFrame, models: list[str]) -> Figure:
    """Draw how far matches lie from the truth: middle half, median, and whiskers to the 5th and 95th percentile."""
    part = points[(points["dataset"] == "SPair-71k") & (points["split"] == "test")]
    shares = (part["distance"] / part["box"]).groupby(part["model"])
    figure, ax = plt.subplots(figsize=(0.85 * plots.TEXTWIDTH, 0.6 + 0.19 * len(models)))
    for y, model in enumerate(models):
        ends = shares.get_group(model).quantile([0.05, 0.25, 0.5, 0.75, 0.95]).to_numpy()
        ax.hlines(y, ends[0], ends[4], color=plots.QUIET, linewidth=0.9)
        ax.barh(y, ends[3] - ends[1], left=ends[1], height=0.6, color="#BFD7EA", edgecolor="#33566B", linewidth=0.7)
        ax.vlines(ends[2], y - 0.3, y + 0.3, color="black", linewidth=1.4)
    ax.axvline(ALPHA, color=plots.CHOSEN, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(models)), [_short(model) for model in models])
    ax.set(ylim=(len(models) - 0.4, -0.6), xlim=(0, None))
    ax.set_xlabel(f"distance from the truth, in sides of the box (dashed: {ALPHA:g})")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    return figure


def numbers(rows: pd.DataFrame) -> dict[str, str]:
    """Return the numbers of the prose: every measured model's PCK, and what the pairs were."""
    found = {}
    for split, name in _splits(rows):
        for model, row in scores(rows, split=split).iterrows():
            if pd.notna(row["value"]):
                found[macro("pck", name, *model.split())] = f"{percentage(row['value'])} %"
    return found | {macro("pck", "pairs"): str(int(scores(rows)["n"].iloc[0]))}


def make(profile: str) -> tuple[dict[str, Table], dict[str, Figure], dict[str, str]]:
    """Return the study's tables and figures by file stem, and its numbers by macro name."""
    rows = results.read(NOTEBOOK, profile=profile)
    points = results.read(f"{NOTEBOOK}.points", profile=profile)
    pictures = results.read(f"{NOTEBOOK}.gallery", profile=profile)
    main = scores(rows)
    measured = [m for m in main.index if pd.notna(main.loc[m, "value"])]
    few = list(dict.fromkeys(pictures["model"]))
    pictures, named = (frame.assign(model=frame["model"].map(_short)) for frame in (pictures, points))
    tables = {
        "correspondence_systems": systems_table(rows),
        "correspondence_mixers": mixers_table(rows),
        "correspondence_evaluators": evaluators_table(rows),
        "correspondence_training": training_table(rows),
        "correspondence_factors": factors_table(rows, few),
        "correspondence_published": Table(PUBLISHED, {"PCK@0.05 (%)": 1, "PCK@0.1 (%)": 1}, data=False, note=
            "Quoted from the comparison table of Shape-of-You (arXiv 2603.11618), under its protocol; not measured "
            "here."),
    }  # fmt: skip
    figures = {
        "correspondence_layers": layers_figure(rows),
        "correspondence_distances": distances_figure(points, measured),
        "correspondence_matches": matches(pictures),
        "correspondence_features": features(pictures),
        "correspondence_failures": failures(
            points.assign(model=points["model"].map(_short)), [_short(m) for m in few], ALPHA
        ),
    }
    if {"moved", "layout"} <= set(rows["split"]):
        figures["correspondence_knowledge"] = knowledge_figure(rows)
    return tables, figures, numbers(rows)
