"""The thesis's LaTeX tables and the numbers of its prose, made from result rows alone, in seconds, without torch.

An accuracy is shown in per cent with one decimal and its 95 % interval, a time or a memory with three significant
digits; the best value of a column is bold, and so are those that equal it at the digits shown. Quoted numbers live in a
table of their own, each with its source.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from thesis_lib.latex import INTERVAL, Table, interval, macro, p_text, percentage, significant
from thesis_lib.summary import (
    FEATURE,
    FEATURES,
    KINDS,
    NORMALIZE,
    SPLITS,
    STAGES,
    costs,
    label,
    ordered,
    paired,
    recovered,
    scores,
    setting,
)

PUBLISHED = pd.DataFrame(
    [
        ("DINO ViT-B/16, zero-shot", None, 90.2, "VisBench (n = 1824)"),
        ("DINO + CLIP + OpenCLIP ensemble, zero-shot", None, 90.8, "R-CLIP, README"),
        ("DreamSim, DINO ViT-B/16, LoRA", 95.6, 94.8, "DreamSim, README"),
        ("DreamSim, OpenCLIP ViT-B/32, LoRA", 95.6, 95.3, "DreamSim, README"),
        ("DreamSim, ensemble, LoRA", 96.9, 96.2, "DreamSim, README"),
    ],
    columns=["Model", "Val (%)", "Test (%)", "Source"],
)


def _accuracy(rows: pd.DataFrame, group: str) -> pd.DataFrame:
    """Value and interval of one share a mixer, in per cent, under the column group's name."""
    ends = rows[["low", "high"]].to_numpy(dtype=float)
    columns = {
        (group, "%"): list(100 * rows["value"].astype(float)),
        (group, INTERVAL): [interval(*e, scale=100) for e in ends],
    }
    return pd.DataFrame(columns, index=rows["mixer"]).round(1)


def _scaled(cost: pd.DataFrame, name: str) -> pd.DataFrame:
    """Operations or parameters in millions or thousands of millions, at three significant digits."""
    scale, prefix = (1e9, "G") if cost["value"].max() >= 1e9 else (1e6, "M")
    return pd.DataFrame(
        {("Cost", f"{name} ({prefix})"): [float(significant(v / scale)) for v in cost["value"]]}, index=cost["mixer"]
    )


def _by_mixer(parts: list[pd.DataFrame], head: str = "Mixer") -> pd.DataFrame:
    """Put columns of several sources side by side, the mixers' names in front, in display order."""
    frame = pd.concat(parts, axis=1)
    frame = frame.loc[ordered(frame.index)]
    text = [column for column in frame if column[1] in (INTERVAL, "Epoch")]
    frame[text] = frame[text].fillna("")
    frame.insert(0, ("", head), [label(name) for name in frame.index])
    return frame.reset_index(drop=True)


def _kinds(frame: pd.DataFrame) -> list[str]:
    """Return the kind of the mixer in each row of a `_by_mixer` frame."""
    kinds = {label(name): kind for name, kind in KINDS.items()}
    return [kinds.get(name, "other") for name in frame.iloc[:, 0]]


def _kinds_note(frame: pd.DataFrame) -> str:
    return f" Kinds, from the top: {', '.join(dict.fromkeys(_kinds(frame)))}."


def _accuracy_table(frame: pd.DataFrame, note: str, digits: Mapping | None = None, **settings) -> Table:
    percent = {column: 1 for column in frame if column[1] == "%"}
    best = dict.fromkeys(percent, "max") | dict.fromkeys(digits or {}, "min")
    return Table(frame, percent | dict(digits or {}), best, note, **settings)


def _accuracy_note(rows: pd.DataFrame) -> str:
    counts = "–".join(str(int(n)) for n in sorted({rows["n"].min(), rows["n"].max()}))
    models = ", ".join(
        f"{name} at {int(size)} px" for name, size in set(zip(rows["backbone"], rows["image_size"], strict=True))
    )
    return (
        f"2AFC on the test split (n = {counts}), 95 % bootstrap CI; {models}; embedding: {FEATURES[FEATURE]}, "
        f"{'centred and normalised' if NORMALIZE else 'as it is'}."
    )


def _shares(triplets: pd.DataFrame, stage: str, main: pd.DataFrame) -> pd.DataFrame:
    share = recovered(triplets)
    return share[(share["stage"] == stage) & share["mixer"].isin(main["mixer"])]


def _recovered_note(share: pd.DataFrame) -> str:
    reference = STAGES[share["reference"].iloc[0]]
    return f" Recovered: share of the accuracy lost by the plain swap, 100 % being MHA ({reference}); paired bootstrap."


def mixer_comparison(rows: pd.DataFrame, efficiency_rows: pd.DataFrame | None = None) -> Table:
    """Every mixer's accuracy at each stage that exists, beside what the model costs."""
    main = scores(rows)
    main = main[main["stage"] != "teacher-lora"]
    parts = [_accuracy(part, STAGES.get(stage, stage)) for stage, part in main.groupby("stage", sort=False)]
    if efficiency_rows is not None:
        macs = costs(efficiency_rows, "macs", **setting(main), embedding=True)
        parts.append(_scaled(macs[macs["mixer"].isin(main["mixer"])], "MAC"))
        spent = costs(efficiency_rows, "latency", **setting(main), embedding=True).set_index("mixer")["value"]
        parts.append(spent[spent.index.isin(main["mixer"])].to_frame(("Cost", "ms")))
    frame = _by_mixer(parts)
    digits = {column: None for column in frame if column[0] == "Cost"}
    note = _accuracy_note(main) + (" MAC, ms of one image: the last block for the class token alone." if digits else "")
    return _accuracy_table(frame, note + _kinds_note(frame), digits, parts=_kinds(frame))


def lora_tuning(rows: pd.DataFrame, triplets: pd.DataFrame) -> Table:
    """The plain swap, the teacher's LoRA on top of it, LoRA tuned with the mixer, the share of the loss regained."""
    main = scores(rows)
    main = main[main["stage"].isin(["zero-shot", "teacher-lora", "lora"])]
    parts = [_accuracy(part, STAGES[stage]) for stage, part in main.groupby("stage", sort=False)]
    share = _shares(triplets, "lora", main)
    parts += [] if share.empty else [_accuracy(share, "Recovered")]
    frame, note = _by_mixer(parts), _accuracy_note(main) + ("" if share.empty else _recovered_note(share))
    if "teacher-lora" in set(main["stage"]):
        note += " The teacher's LoRA lies in attention's projections: a mixer without any stays as it was."
    return _accuracy_table(frame, note, parts=_kinds(frame))


def distillation(rows: pd.DataFrame, triplets: pd.DataFrame) -> Table:
    """Every student before and after distillation, its best epoch on val, and the share of the lost accuracy recovered.

    `rows` are those of notebooks 02 (zero-shot) and 04 (the curve by `epoch`, and the one test row of a student).
    """
    main = scores(rows)
    after = main[main["stage"] == "distilled"]
    if after.empty:
        raise ValueError("no row of stage 'distilled' on the test split: run notebook 04_distillation first")
    before = main[(main["stage"] == "zero-shot") & main["mixer"].isin(after["mixer"])]
    share = _shares(triplets, "distilled", main)
    parts = [_accuracy(before, STAGES["zero-shot"]), _accuracy(after, STAGES["distilled"])]
    parts += [] if share.empty else [_accuracy(share, "Recovered")]
    curve = rows[(rows["metric"] == "2afc") & (rows["split"] == "val") & (rows["stage"] == "distilled")]
    curve = curve[curve["mixer"].isin(after["mixer"])].reset_index(drop=True)
    if len(curve):
        top, last = curve.loc[curve.groupby("mixer")["value"].idxmax()], curve.groupby("mixer")["epoch"].max()
        epochs = [
            f"{int(epoch)} of {int(last[mixer])}" for mixer, epoch in zip(top["mixer"], top["epoch"], strict=True)
        ]
        percent = (100 * top["value"]).round(1).tolist()
        parts.append(
            pd.DataFrame({("Best on val", "%"): percent, ("Best on val", "Epoch"): epochs}, index=top["mixer"])
        )
    note = _accuracy_note(after) + ("" if share.empty else _recovered_note(share))
    note += f" Best on val: of n = {int(curve['n'].iloc[0])} triplets." if len(curve) else ""
    return _accuracy_table(_by_mixer(parts, "Student"), note)


def efficiency(rows: pd.DataFrame, *, backbone: str, image_size: int) -> Table:
    """Every mixer's operations, parameters and measured speed, for one backbone at one image size."""
    where = {"backbone": backbone, "image_size": image_size}
    parts, measured = [], set(rows.loc[rows["value"].notna(), "metric"])
    if "macs" not in measured:
        raise ValueError("no efficiency row has a value: run notebook 03_efficiency_analysis first")
    for metric, name in (("macs", "MAC"), ("params", "Params")):
        parts.append(_scaled(costs(rows, metric, **where), name))
    for metric, name in (("latency", "Latency (ms)"), ("throughput", "Images/s"), ("peak_memory", "Memory (MiB)")):
        if metric not in measured:
            continue
        cost = costs(rows, metric, **where)
        part = {(name, f"batch {int(cost['batch'].iloc[0])}"): [float(significant(v)) for v in cost["value"]]}
        if metric == "latency":
            ends = cost[["low", "high"]].to_numpy(dtype=float)
            part[name, INTERVAL] = [interval(*pair, digits=None) for pair in ends]
        parts.append(pd.DataFrame(part, index=cost["mixer"]))
    frame, first = _by_mixer(parts), costs(rows, "macs", **where).iloc[0]
    numeric = [column for column in frame.columns[1:] if column[1] != INTERVAL]
    best = {column: "max" if column[0] == "Images/s" else "min" for column in numeric}
    note = (
        f"{backbone} at {image_size} px, {first['dtype']} on {first['device']}; medians, 95 % "
        "bootstrap CI. 1 MAC is one multiply-add; softmax, norms and pooling sums are not counted. Here every block "
        "computes all tokens; as a metric (see the mixer comparison, timed apart) the last has the class token alone."
    )
    return Table(frame, dict.fromkeys(numeric), best, note, parts=_kinds(frame), data=False)


def nights_splits(rows: pd.DataFrame) -> Table:
    """The published test numbers for every mixer and stage: all of test, its ImageNet part, the rest."""
    columns, counts = {}, {}
    for split, name in SPLITS.items():
        if ((rows["metric"] == "2afc") & (rows["split"] == split)).any():
            part = scores(rows, split=split)
            ends = part[["low", "high"]].to_numpy(dtype=float)
            keys = pd.MultiIndex.from_frame(part[["stage", "mixer"]])
            counts[name] = int(part["n"].max())
            columns[name, "%"] = pd.Series((100 * part["value"].astype(float)).round(1).to_numpy(), index=keys)
            columns[name, INTERVAL] = pd.Series([interval(*e, scale=100) for e in ends], index=keys)
    main = scores(rows)
    frame = pd.DataFrame(columns).loc[pd.MultiIndex.from_frame(main[["stage", "mixer"]])]
    frame = frame.fillna({column: "" for column in frame if column[1] == INTERVAL}).reset_index(drop=True)
    frame.insert(0, ("", "Mixer"), main["mixer"].map(label))
    frame.insert(0, ("", "Stage"), main["stage"].map(lambda stage: STAGES.get(stage, stage)))
    sizes = " " + ", ".join(f"{name}: n = {n}" for name, n in counts.items()) + "."
    return _accuracy_table(frame, _accuracy_note(main) + sizes, group=("", "Stage"))


def paired_tests(triplets: pd.DataFrame) -> Table:
    """Every mixer against MHA on the same test triplets, with Holm-corrected exact p-values."""
    tests = paired(triplets)
    frame = pd.DataFrame(
        {
            "Stage": tests["stage"].map(lambda stage: STAGES.get(stage, stage)),
            "Mixer": tests["mixer"].map(label),
            "Points": (100 * tests["difference"]).round(1) + 0.0,
            INTERVAL: [interval(*ends, scale=100) for ends in tests[["low", "high"]].to_numpy(dtype=float)],
            "Wins": tests["wins"],
            "Losses": tests["losses"],
            "p (Holm)": tests["p_holm"].map(p_text),
        }
    )
    other = tests[tests["stage"] != tests["reference"]].drop_duplicates("stage")
    against = "".join(f"; {STAGES.get(r.stage, r.stage)}: with {STAGES[r.reference]} MHA" for r in other.itertuples())
    note = (
        f"2AFC minus MHA's at the same stage{against}; the same n = {int(tests['n'].iloc[0])} test triplets, paired "
        f"bootstrap CI; exact McNemar test on wins and losses, Holm-corrected over these {len(tests)} tests."
    )
    return Table(frame, {"Points": 1, "Wins": 0, "Losses": 0}, {}, note, "Stage")


def embedding_options(rows: pd.DataFrame) -> Table:
    """DreamSim's ways to read an embedding off plain MHA; the one that every other table uses is marked."""
    rows = rows[(rows["metric"] == "2afc") & (rows["split"] == "test") & (rows["mixer"] == "mha")]
    rows = rows[(rows["stage"] == "zero-shot") & rows["feature"].notna()]
    if rows.empty:
        raise ValueError("no row of plain MHA says its `feature`: run notebook 02_attention_evaluation with mha")
    order = {name: i for i, name in enumerate(FEATURES)}
    rows = rows.sort_values(["feature", "normalize"], key=lambda keys: keys.map(order | {True: 0, False: 1}))
    rows = rows.reset_index(drop=True)
    centred = rows["normalize"].astype(bool)
    frame = pd.DataFrame(
        {
            "Embedding": rows["feature"].map(lambda name: FEATURES.get(name, name)),
            "Centred": centred.map({True: "yes", False: "no"}),
            "2AFC (%)": (100 * rows["value"].astype(float)).round(1),
            INTERVAL: [interval(*ends, scale=100) for ends in rows[["low", "high"]].to_numpy(dtype=float)],
            "Used": ((rows["feature"] == FEATURE) & (centred == NORMALIZE)).map({True: "default", False: ""}),
        }
    )
    return Table(
        frame, {"2AFC (%)": 1}, {"2AFC (%)": "max"}, f"Plain MHA, test split, n = {int(rows['n'].iloc[0])} triplets."
    )


def published() -> Table:
    """What others report on NIGHTS, each number with its source; none of it was measured here."""
    return Table(
        PUBLISHED,
        {"Val (%)": 1, "Test (%)": 1},
        {},
        "2AFC on NIGHTS as published by the sources named, on GitHub ssundaram21/dreamsim, fra31/perceptual-metrics "
        "(R-CLIP) and turhancan97/VisBench; not measured here.",
        data=False,
    )


def numbers(rows: pd.DataFrame, triplets: pd.DataFrame, efficiency_rows: pd.DataFrame | None = None) -> dict[str, str]:
    """Return what the prose quotes, by macro name: MhaZeroShot, PoolDistilledInterval, SraLoraPoints, NTest.

    Accuracies, shares and points in per cent, operations and parameters in millions, latency in ms, throughput in
    images/s.
    """
    main, found = scores(rows), {}
    found["NTest"] = str(int(main["n"].max()))
    for row in [*main.itertuples(), *recovered(triplets).itertuples()]:
        name = macro(row.mixer, row.stage, *(["recovered"] if hasattr(row, "reference") else []))
        if np.isfinite(row.value):
            found |= {name: percentage(row.value), f"{name}Interval": interval(row.low, row.high, scale=100)}
    if main["mixer"].nunique() > 1:
        for row in paired(triplets).itertuples():
            name = macro(row.mixer, row.stage)
            found |= {
                f"{name}Points": f"{100 * row.difference:+.1f}".replace("-", "\N{MINUS SIGN}"),
                f"{name}P": p_text(row.p_holm),
            }
    for metric, scale in (("macs", 1e6), ("params", 1e6), ("latency", 1), ("throughput", 1)):
        if efficiency_rows is not None and metric in set(efficiency_rows["metric"]):
            cost = costs(efficiency_rows, metric, **setting(main), embedding=True)
            found |= {macro(r.mixer, metric): significant(r.value / scale) for r in cost.itertuples()}
            if metric == "latency":
                ends = {f"{macro(r.mixer, metric)}Interval": (r.low, r.high) for r in cost.itertuples()}
                found |= {name: interval(*pair, digits=None) for name, pair in ends.items()}
    return found
