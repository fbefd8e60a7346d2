"""Tables, figures and numbers of the efficiency study, from the rows of notebook 03 alone."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from thesis_lib import paths, results
from thesis_lib.items.efficiency_figures import (
    STAGES,
    TERMS,
    by_mixer,
    crossing_points,
    predicted_against_measured,
    terms,
)
from thesis_lib.latex import INTERVAL, Table, macro
from thesis_lib.summary import label, ordered

NOTEBOOK = "03_efficiency_analysis"
MODES = ["efficiency_modes", *(f"efficiency_modes_{page}" for page in range(2, 12))]
CAPTIONS = {
    "cost_model": "The cost model: error of the predicted time, shares of it by term, and the term that most keeps a "
    "mixer's time above what its multiply-adds promise.",
    "crossings": "Tokens from which a mixer costs less than MHA: in multiply-adds, predicted and measured time.",
    "efficiency_protocol": "Time, spread, training and the share of the machine's matrix rate that each model reaches.",
    **dict.fromkeys(MODES, "The same models compiled, in other number formats, and with the attention kernel pinned."),
    "efficiency_hardware": "Latency, and how many times less than MHA's, on each machine that was measured.",
    "predicted_against_measured": "Time predicted from the machine's ceilings against time measured.",
    "time_terms": "Time of one image over MHA's measured one, at the fewest and the most tokens (the axes differ): "
    "predicted by term (bars) and measured (dots).",
    "crossing_points": "Tokens from which a mixer costs less than MHA; hollow arrows: not up to the largest size "
    "tried, where they stand; $\\le$: already at the smallest; bars: 95\\,\\% intervals, an arrow where one has "
    "no end.",
}
VARIANT = ("dtype", "mode", "sdpa_pinned")


def make(profile: str) -> tuple[dict[str, Table], dict[str, Figure], dict[str, str]]:
    """Make the study's tables and figures by file stem, and its numbers by LaTeX macro."""
    rows = results.read(NOTEBOOK, profile=profile)
    predicted, crossed = (results.read(f"{NOTEBOOK}.{part}", profile=profile) for part in ("predictions", "crossings"))
    tables = {"cost_model": cost_model(predicted), "crossings": crossings(crossed)}
    tables["efficiency_protocol"] = protocol(rows)
    try:
        modes = results.read(f"{NOTEBOOK}.modes", profile=profile)
        tables |= dict(zip(MODES, pages(variants(rows, modes)), strict=False))
    except FileNotFoundError:
        pass  # no variants were asked for
    machines = hardware(profile)
    if machines["hardware"].nunique() > 1:
        tables["efficiency_hardware"] = by_hardware(machines)
    figures = {
        "predicted_against_measured": predicted_against_measured(predicted).figure,
        "time_terms": terms(predicted),
        "crossing_points": crossing_points(crossed).figure,
    }
    return tables, figures, numbers(predicted, crossed)


def agreement(predicted: pd.DataFrame) -> tuple[float, float]:
    """Return the median relative error of predicted times and Spearman's rank correlation with the measured ones."""
    both = predicted[predicted["measured"].notna()].astype({"value": float, "measured": float})
    if both.empty:
        raise ValueError(f"no predicted time has a measured one beside it: run notebook {NOTEBOOK} first")
    error = (both["value"] / both["measured"] - 1).abs().median()
    return float(error), float(spearmanr(both["value"], both["measured"]).statistic)


def held_back(predicted: pd.DataFrame) -> pd.Series:
    """Return the term that most keeps each mixer above what MHA's time times its share of MHA's multiply-adds promises.

    By mixer, over all configurations: the term whose median excess, in shares of MHA's time, is largest; "" where the
    promise is kept.
    """
    where = ["backbone", "image_size", "batch", "dtype", "device"]
    rows = predicted.set_index([*where, "mixer"])[["value", "macs", *TERMS]].astype(float)
    base = rows.xs("mha", level="mixer").reindex(rows.index.droplevel("mixer"))
    base.index = rows.index
    parts = list(TERMS)
    excess = rows[parts].sub(base[parts].mul(rows["macs"] / base["macs"], axis=0)).div(base["value"], axis=0)
    middle = excess.groupby("mixer").median()
    worst = middle.idxmax(axis=1).map(TERMS)
    return worst.where((middle.max(axis=1) > 0.01) & (middle.index != "mha"), "")


def cost_model(predicted: pd.DataFrame) -> Table:
    """Every mixer's prediction error, its predicted time by term, and what holds it back."""
    parts, back = {}, held_back(predicted)
    for mixer in ordered(predicted["mixer"]):
        own = predicted[predicted["mixer"] == mixer]
        error, _ = agreement(own)
        bias = (own["value"] / own["measured"]).median() - 1
        shares = own[list(TERMS)].div(own["value"], axis=0).median()
        head = {("", "Mixer"): label(mixer), ("Error", "median %"): 100 * error, ("Error", "signed %"): 100 * bias}
        parts[mixer] = head | {("Share of time (%)", name): 100 * shares[term] for term, name in TERMS.items()}
        parts[mixer]["", "Held back by"] = back[mixer]
    frame = pd.DataFrame(parts.values())
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    error, rank = agreement(predicted)
    both = int(predicted["measured"].notna().sum())
    note = (
        f"{both} configurations on {', '.join(sorted(predicted['device'].unique()))}, to none of which the model was "
        f"fitted; all together: median error {100 * error:.0f} %, Spearman {rank:.3f}. Signed: above 0 it predicts "
        "too much. Shares are medians over configurations. Held back by: the term with the largest median excess over "
        "MHA's time scaled by multiply-adds."
    )
    return Table(frame, {column: 0 for column in frame if "%" in "".join(column)}, {}, note, data=False)


def crossings(crossed: pd.DataFrame) -> Table:
    """N* of every mixer, three ways, for each backbone that was measured at several sizes."""
    records = []
    for (name, mixer), part in by_mixer(crossed):
        record = {("", "Backbone"): name, ("", "Mixer"): label(mixer)}
        for stage, title in STAGES.items():
            own = part[part["stage"] == stage]
            record["Tokens from which it costs less than MHA", title] = _text(own.iloc[0]) if len(own) else ""
        measured = part[part["stage"] == "measured"]
        ends = [_end(measured.iloc[0], end) for end in ("low", "high")] if len(measured) else []
        record["Tokens from which it costs less than MHA", INTERVAL] = f"[{', '.join(ends)}]" if any(ends) else ""
        records.append(record)
    frame = pd.DataFrame(records)
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    about = crossed[crossed["stage"] == "measured"].iloc[0]
    note = (
        f"One image, {about['dtype']} on {about['device']}. ≤ n: already at n, the smallest size; > n: not up to n, "
        "the largest; a–b: there and not beyond b; 2–65; 442: there, and from 442 on for good. Interpolated between "
        "sizes in log N; 95 % bootstrap CI over passes."
    )
    return Table(frame, {}, {}, note, ("", "Backbone"), data=False)


def _text(row: pd.Series) -> str:
    if pd.isna(row["value"]):
        return f"> {int(row['largest'])}"
    if row["stage"] != "analytic" and row["value"] <= row["smallest"]:
        return f"≤ {int(row['smallest'])}"
    until, before = row.get("until"), row.get("before")
    text = f"{row['value']:.0f}" + (f"–{int(until)}" if pd.notna(until) else "")
    return f"{before}; {text}" if pd.notna(before) else text


def _end(row: pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return f"> {int(row['largest'])}"
    return f"≤ {int(row['smallest'])}" if row[name] <= row["smallest"] else f"{row[name]:.0f}"


def protocol(rows: pd.DataFrame) -> Table:
    """Every mixer's latency with its spread, best throughput, training step and share of the matrix rate."""
    trained = rows[(rows["metric"] == "training_step") & rows["value"].notna()]
    first = (trained if len(trained) else rows[rows["metric"] == "latency"]).iloc[0]
    for column in ("backbone", "image_size", "dtype", "device"):
        rows = rows[rows[column] == first[column]]
    rows, records = rows[rows["value"].notna()], []
    for mixer in ordered(rows["mixer"]):
        own = rows[rows["mixer"] == mixer]
        value = lambda metric, own=own: own.loc[own["metric"] == metric]
        time, rate = value("latency").iloc[0], value("throughput")
        best = rate.loc[rate["value"].astype(float).idxmax()]
        record = {("", "Mixer"): label(mixer), ("Latency (ms)", "median"): time["value"]}
        record |= {("Latency (ms)", name): time[name] for name in ("p5", "p95")}
        record |= {("Throughput", "images/s"): best["value"], ("Throughput", "batch"): int(best["batch"])}
        for metric, name in (("training_step", "ms"), ("training_memory", "MiB")):
            found = value(metric)
            record["Training step", name] = found["value"].iloc[0] if len(found) else np.nan
        reached = value("ceiling_share")
        record["Ceiling", "%"] = 100 * reached["value"].max() if len(reached) else np.nan
        records.append(record)
    frame = pd.DataFrame(records)
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    batch = f"; training at batch {int(trained['batch'].iloc[0])}" if len(trained) else ""
    note = (
        f"{first['backbone']} at {int(first['image_size'])} px, {first['dtype']} on {first['device']}{batch}. Ceiling: "
        "multiply-adds a second at the best batch, of the highest rate of a matrix product measured there."
    )
    if "yardstick" in rows and rows["yardstick"].notna().any():
        note += f" Times are those at moments when the yardstick takes {rows['yardstick'].median():.2f} ms."
    digits = {column: None for column in frame.columns[1:]} | {("Throughput", "batch"): 0, ("Ceiling", "%"): 0}
    return Table(
        frame, digits, {("Latency (ms)", "median"): "min", ("Throughput", "images/s"): "max"}, note, data=False
    )


def variants(rows: pd.DataFrame, modes: pd.DataFrame) -> Table:
    """Latency, throughput and memory of each variant beside the plain one on the same backbone and size."""
    first = modes.iloc[0]
    place = ["backbone", "image_size", "device"]
    same = (rows[place] == first[place]).all(axis=1) & rows["mixer"].isin(modes["mixer"])
    modes = modes[(modes[place] == first[place]).all(axis=1)]
    both, records = pd.concat([rows[same], modes], ignore_index=True), []
    both["variant"] = both[list(VARIANT)].apply(_variant, axis=1)
    for mixer in ordered(both["mixer"]):
        own = both[both["mixer"] == mixer]
        for variant, part in own.groupby("variant", sort=False):
            record = {"Mixer": label(mixer), "Variant": variant}
            value = lambda metric, part=part: part[(part["metric"] == metric) & part["value"].notna()]
            rates = value("throughput").astype({"value": float}).sort_values("value")
            for name, found in (("ms", value("latency")[:1]), ("images/s", rates[-1:]), ("batch", rates[-1:])):
                record[name] = found["batch" if name == "batch" else "value"].max() if len(found) else np.nan
            record["compile (s)"] = value("compile_time")["value"].max()
            kernels = part["sdpa"].dropna() if "sdpa" in part else []
            record["kernel"] = kernels.iloc[0] if len(kernels) else ""
            notes = part["note"].dropna().unique() if "note" in part else []
            record["note"] = notes[0][:40] if len(notes) else ""
            records.append(record)
    frame = pd.DataFrame(records)
    frame = frame.drop(columns=[name for name in ("compile (s)", "note") if not frame[name].replace("", np.nan).any()])
    note = (
        f"{first['backbone']} at {int(first['image_size'])} px on {first['device']}; latency at batch 1, throughput at "
        "the best batch measured, which not every variant was given the same choice of. Kernel: the softmax attention "
        "that ran. Each variant was measured apart."
    )
    numeric = {"ms": None, "images/s": None, "batch": 0, "compile (s)": None}
    digits = {name: places for name, places in numeric.items() if name in frame}
    return Table(frame, digits, {}, note, "Mixer", data=False)


def pages(table: Table, *, rows: int = 44) -> Iterator[Table]:
    """Part a table by mixers into some that fit a page."""
    mixers = table.frame["Mixer"]
    names = list(dict.fromkeys(mixers))
    step = max(1, rows // mixers.value_counts().max())
    for start in range(0, len(names), step):
        yield replace(table, frame=table.frame[mixers.isin(names[start : start + step])].reset_index(drop=True))


def _variant(row: pd.Series) -> str:
    words = [row["dtype"], row["mode"]] + [f"{row['sdpa_pinned']} pinned"] * pd.notna(row["sdpa_pinned"])
    return ", ".join(words)


def hardware(profile: str) -> pd.DataFrame:
    """Return this profile's rows and those committed under data/measured (efficiency-*.parquet), hardware named."""
    own = paths.RESULTS / profile / f"{NOTEBOOK}.parquet"
    parts = []
    for path in [own, *sorted(paths.MEASURED.glob("efficiency-*.parquet"))]:
        machine, part = results.provenance(path)["hardware"], pd.read_parquet(path)
        gpu = machine["gpu"][0] if machine["gpu"] else "GPU"
        cpu = f"{machine['cpu']}, {machine['cores']} cores"
        parts.append(part.assign(hardware=np.where(part["device"] == "cpu", cpu, gpu)))
    return pd.concat(parts, ignore_index=True)


def by_hardware(rows: pd.DataFrame) -> Table:
    """Latency of one image and its gain over MHA on each machine, where all measured the same backbone and size."""
    times = rows[(rows["metric"] == "latency") & rows["value"].notna()]
    where = ["backbone", "image_size", "dtype"]
    counts = times.groupby(where)["hardware"].nunique()
    name, size, dtype = counts.sort_values(kind="stable").index[-1]
    times = times[(times["backbone"] == name) & (times["image_size"] == size) & (times["dtype"] == dtype)]
    table = times.pivot_table(index="mixer", columns="hardware", values="value").loc[ordered(times["mixer"])]
    frame = pd.DataFrame({("", "Mixer"): [label(mixer) for mixer in table.index]})
    for machine in table:
        frame[machine, "ms"] = table[machine].to_numpy()
        frame[machine, "× MHA"] = (table.loc["mha", machine] / table[machine]).to_numpy()
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    note = f"{name} at {size} px, {dtype}, latency of one image, eager. × MHA: how many times less time than MHA there."
    return Table(frame, dict.fromkeys(frame.columns[1:]), {}, note, data=False)


def numbers(predicted: pd.DataFrame, crossed: pd.DataFrame) -> dict[str, str]:
    """Return what the prose quotes: error (per cent) and rank correlation of the cost model, each mixer's N*."""
    error, rank = agreement(predicted)
    found = {"CostModelError": f"{100 * error:.0f}", "CostModelSpearman": f"{rank:.3f}"}
    for (name, mixer), part in by_mixer(crossed):
        for stage, own in part.groupby("stage", sort=False):
            found[macro(name.split(".")[0], mixer, "crossing", stage)] = _text(own.iloc[0])  # the first number format
    return found | {"CostModelConfigurations": str(int(predicted["measured"].notna().sum()))}
