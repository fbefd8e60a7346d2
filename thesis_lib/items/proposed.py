"""Tables, figures and numbers of the search for the proposed model, from the rows of notebook 10 alone."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from thesis_lib import results
from thesis_lib.items.proposed_figures import FORMATS, NOTEBOOK, front, name_of, of, one, sensitivity, steps
from thesis_lib.latex import INTERVAL, Table, interval, macro, p_text, percentage, significant
from thesis_lib.summary import vit_names

CAPTIONS = {
    "proposed_candidates": "The candidates: 2AFC on val, cost, and time in turn. The rule takes the fastest of the "
    "Pareto front that loses at most two points on val to the teacher.",
    "proposed_model": "The proposed model beside its teacher and the field, and its recipe at the scale of the field.",
    "proposed_published": "Quoted, not measured here: 2AFC on NIGHTS as published.",
    "proposed_sensitivity": "What one changed layer does to the tuned teacher, without training: how far the embedding "
    "moves, and what it costs in 2AFC on val.",
    "proposed_front": "Left: all plans that no other beats in predicted time and harm, and those distilled. Right: the "
    "candidates as measured (bars: 95\\,\\% intervals); the ring is the proposed model, the dashed line the least 2AFC "
    "that the rule allows.",
    "proposed_steps": "From DreamSim's ensemble to the recipe of the proposed model, one change after the other, at "
    "224 px with random weights, timed in turn; bars: 95\\,\\% intervals.",
}
# 2AFC on NIGHTS in percent (val, test), as their authors give them. Another data set than the demo's.
PUBLISHED = {
    "DreamSim, ensemble": (96.9, 96.2, "DreamSim, README"),
    "DreamSim, DINO ViT-B/16": (95.6, 94.8, "DreamSim, README"),
    "DreamSim, CLIP ViT-B/32": (94.9, 93.6, "DreamSim, README"),
    "DreamSim, OpenCLIP ViT-B/32": (95.6, 95.3, "DreamSim, README"),
    "The ensemble without tuning": (np.nan, 90.8, "R-CLIP, README"),
    "LipSim, margin 0.2": (np.nan, 88.5, "R-CLIP, README"),
}


def make(profile: str) -> tuple[dict[str, Table], dict[str, Figure], dict[str, str]]:
    """Make the study's tables and figures by file stem, and its numbers by LaTeX macro."""
    rows = results.read(NOTEBOOK, profile=profile)
    try:
        pixels = results.read("01_data_preparation", profile=profile).query("stage == 'pixels'")
    except FileNotFoundError:
        pixels = pd.DataFrame(columns=["metric", "split", "backbone"])
    tables = {
        "proposed_candidates": candidates(rows),
        "proposed_model": field(rows, pixels),
        "proposed_published": published(),
    }
    figures = {
        "proposed_sensitivity": sensitivity(rows),
        "proposed_front": front(rows),
        "proposed_steps": steps(rows).figure,
    }
    return tables, figures, numbers(rows)


def candidates(rows: pd.DataFrame) -> Table:
    """Every candidate in every number format: 2AFC on val, multiply-adds, time, and whether the rule took it."""
    own, records = of(rows, stage="candidates"), []
    times = of(own, metric="batch_time").set_index(["model", "dtype"])
    costs = own[own["metric"].isin(["macs", "params"])].pivot(
        index=["model", "dtype"], columns="metric", values="value"
    )
    taken = {(r.model, r.dtype) for r in own[own["chosen"].eq(True)].itertuples()}
    slowest = one(times.reset_index(), model="teacher", dtype="float32")["value"]
    for row in of(own, metric="2afc").itertuples():
        key = (row.model, row.dtype)
        spent = times.loc[key]
        records.append(
            {
                ("", "Candidate"): name_of(row.model),
                ("", "Format"): FORMATS[row.dtype],
                ("2AFC on val", "%"): 100 * row.value,
                ("2AFC on val", INTERVAL): interval(row.low, row.high, scale=100),
                ("Cost", "MMAC"): costs.loc[key, "macs"] / 1e6,
                ("Cost", "M params"): costs.loc[key, "params"] / 1e6,
                ("Cost", "ms"): spent["value"] / spent["batch"],
                ("Cost", "× teacher"): slowest / spent["value"],
                (" ", "Chosen"): "proposed" if key in taken else "",
            }
        )
    first = one(own, metric="batch_time")
    frame = pd.DataFrame(records)
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    formats = frame["", "Format"].unique()
    if len(formats) == 1:
        frame = frame.drop(columns=[("", "Format")])
    whose = "demo backbone" if first["backbone"] == "demo" else vit_names(first["backbone"])
    note = (
        f"{whose} at {int(first['image_size'])} px on {first['device']}, "
        f"{int(first['threads'])} threads, {', '.join(formats)}; "
        f"n = {int(one(own, metric='2afc')['n'])} val triplets, 95 % bootstrap CI. "
        f"ms an image at batch {int(first['batch'])}, timed in turn. Plans name the blocks: M MHA, S SRA, P Pool, "
        "I Identity, - dropped, / grid halved. The last block computes the class token alone, but where tokens merge."
    )
    digits = {("2AFC on val", "%"): 1} | {("Cost", name): None for name in ("MMAC", "M params", "ms", "× teacher")}
    return Table(frame, digits, {("2AFC on val", "%"): "max", ("Cost", "ms"): "min"}, note)


def field(rows: pd.DataFrame, pixels: pd.DataFrame) -> Table:
    """The proposed model, its teacher and the field on the same pictures; below, its recipe at the field's scale."""
    own, scale = of(rows, stage="own scale"), of(rows, stage="steps")
    tested = pd.concat([of(rows, stage="test"), rows[rows["stage"] == "field"]])
    tested = tested[(tested["metric"] == "2afc") & (tested["split"] == "test")]
    judged = {row.model: row for row in tested.itertuples()}
    pixels = pixels[(pixels["metric"] == "2afc") & (pixels["split"] == "test")]
    judged |= {row.backbone: row for row in pixels.itertuples()}
    last = {vit: step for vit, step in (model.split(": ") for model in scale["model"].unique() if ": " in model)}
    places = [("Own scale", own, model, name_of(model)) for model in own["model"].unique()]
    places[[place[2] for place in places].index("proposed")] = ("Own scale", own, "proposed", "Proposed")
    places += [("At 224 px", scale, f"{vit}: {step}", f"Recipe, {vit_names(vit)}") for vit, step in last.items()]
    records = []
    for group, part, model, shown in places:
        record = {("", "Scale"): group, ("", "Model"): shown}
        score = judged.get(model) if part is own else None
        known = score is not None and pd.notna(score.value)
        record["2AFC on test", "%"] = 100 * score.value if known else np.nan
        record["2AFC on test", INTERVAL] = interval(score.low, score.high, scale=100) if known else ""
        cost = part[(part["model"] == model) & part["metric"].isin(["macs", "params"])].set_index("metric")["value"]
        record["Cost", "MMAC"] = cost.get("macs", np.nan) / 1e6
        record["Cost", "M params"] = cost.get("params", np.nan) / 1e6
        for dtype in [d for d in FORMATS if d in set(own["dtype"])]:
            ratio = part[(part["model"] == model) & (part["metric"] == "speedup") & (part["dtype"] == dtype)]["value"]
            record["× ensemble", FORMATS[dtype]] = ratio.iloc[0] if len(ratio) else np.nan
        records.append(record)
    frame = pd.DataFrame(records)
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    first = one(own, metric="batch_time", model="ensemble")
    absent = rows[(rows["stage"] == "field") & rows["value"].isna()]["model"].tolist()
    note = (
        f"2AFC of n = {int(judged['proposed'].n)} test triplets, 95 % bootstrap CI. × ensemble: time of DreamSim's "
        f"three ViT-B/16 at 224 px over the model's own in the same number format, medians of {int(first['n'])} rounds "
        f"in turn at batch {int(first['batch'])} on {first['device']}, {int(first['threads'])} threads. At 224 px: the "
        "proposed recipe in a ViT of that size with random weights."
    )
    size = int(one(own, model="proposed")["image_size"])
    note += f" Own scale: the proposed model and its teacher take pictures of {size} px, all others of 224 px"
    compared = pixels["image_size"].dropna().unique() if "image_size" in pixels else ()
    note += (
        f" (distances of pixels are timed in pairs, and were scored at {int(compared[0])} px)."
        if len(compared)
        else "."
    )
    note += f" Weights not present, so no accuracy: {', '.join(name_of(name) for name in absent)}." if absent else ""
    digits = {("2AFC on test", "%"): 1} | {column: None for column in frame if column[0] in ("Cost", "× ensemble")}
    return Table(frame, digits, {}, note, group=("", "Scale"))


def published() -> Table:
    """What others report on NIGHTS: quoted, in a table of its own."""
    records = [
        {"Metric": name, "Val, %": val, "Test, %": test, "Source": source}
        for name, (val, test, source) in PUBLISHED.items()
    ]
    note = "NIGHTS, not the synthetic world: nothing here may be compared with the tables of the demo. On GitHub: "
    note += "ssundaram21/dreamsim, fra31/perceptual-metrics (R-CLIP)."
    return Table(pd.DataFrame(records), {"Val, %": 1, "Test, %": 1}, note=note, data=False)


def numbers(rows: pd.DataFrame) -> dict[str, str]:
    """Name the numbers of the prose: 2AFC, share of the teacher's, speed-ups at both scales, cost, plan."""
    scores = {m: one(rows, stage="test", metric="2afc", split="test", model=m) for m in ("proposed", "teacher")}
    share, p = (one(rows, stage="test", metric=metric) for metric in ("share_of_teacher", "p_value"))
    found = {
        macro("proposed", name): "undefined"
        if pd.isna(row["value"])
        else f"{percentage(row['value'])} {interval(row['low'], row['high'], scale=100)}"
        for name, row in (("accuracy", scores["proposed"]), ("teacher accuracy", scores["teacher"]), ("share", share))
    }
    found[macro("proposed", "triplets")] = str(int(share["n"]))
    found[macro("proposed", "p value")] = p_text(p["value"])
    plan = share["plan"].replace("/", "")
    found[macro("proposed", "plan")] = share["plan"]
    found[macro("proposed", "blocks")] = f"{len(plan) - plan.count('-')} of {len(plan)}"
    found[macro("proposed", "format")] = FORMATS[share["dtype"]]
    for dtype in [d for d in FORMATS if d in set(rows["dtype"].dropna())]:
        own = one(rows, stage="own scale", metric="speedup", model="proposed", dtype=dtype)
        found[macro("proposed", "own speedup", FORMATS[dtype])] = significant(own["value"])
        ratios = of(rows, stage="steps", metric="speedup", dtype=dtype)
        for vit in dict.fromkeys(m.split(": ")[0] for m in ratios["model"] if ": " in m):
            last = ratios[ratios["model"].str.startswith(f"{vit}: ")].iloc[-1]
            shown = {"": significant(last["value"]), "Interval": interval(last["low"], last["high"], digits=None)}
            for ending, text in shown.items():
                found[macro("proposed", "field speedup", vit_names(vit), FORMATS[dtype]) + ending] = text
                found.setdefault(macro("proposed", "speedup") + ending, text)  # of the first backbone, fp32
    for metric in ("macs", "params"):
        cost = one(rows, stage="own scale", metric=metric, model="proposed")["value"]
        found[macro("proposed", metric)] = significant(cost / 1e6)
    return found
