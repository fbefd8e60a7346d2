"""The five questions of the image classification study, answered in prose from the rows of one run."""

import pandas as pd

from thesis_lib.items.classification import against, scores
from thesis_lib.latex import interval, percentage, significant
from thesis_lib.summary import label, ordered

LINEAR = ("linformer", "performer", "nystrom")  # the study's linear mixers, which the hybrid is compared with
NEAR = 0.05  # of the best accuracy: what still counts as viable on a small device


def answers(rows: pd.DataFrame, images: pd.DataFrame) -> str:
    """Answer the study's five questions in Markdown, from the rows of one run and the first data set in it."""
    main = scores(rows)
    main = main[main["dataset"] == main["dataset"].iloc[0]].set_index("mixer")
    dataset, chance = (
        main["dataset"].iloc[0],
        1 / images.loc[images["dataset"] == main["dataset"].iloc[0], "label"].nunique(),
    )
    run = rows[(rows["stage"] == "run") & (rows["dataset"] == dataset)]
    cost = run.groupby(["metric", "mixer"])["value"].mean()
    large = rows[(rows["stage"] == "scaling") & rows["value"].notna()]
    look = (
        rows[(rows["stage"] == "patterns") & (rows["dataset"] == dataset)].groupby(["metric", "mixer"])["value"].mean()
    )
    return "\n\n".join(
        [_trade_off(main, cost, chance), _scalability(large), _looks(look), _hybrid(main, images), _small(main, cost)]
    )


def _percent(row: pd.Series) -> str:
    return f"{percentage(row['value'])} % {interval(row['low'], row['high'], scale=100)}"


def _trade_off(main: pd.DataFrame, cost: pd.Series, chance: float) -> str:
    best, worst = main["value"].astype(float).idxmax(), main["value"].astype(float).idxmin()
    fast = cost["training_throughput"].idxmax()
    speed, work = (significant(cost[m][fast] / cost[m]["mha"], 2) for m in ("training_throughput", "macs"))
    return (
        f"**1 · Trade-off.** Best is {label(best)} with {_percent(main.loc[best])}, worst {label(worst)} with "
        f"{_percent(main.loc[worst])}, n = {int(main['n'].iloc[0])}; chance is {100 * chance:.0f} %, so every mixer is "
        f"at least {100 * (main['low'].astype(float).min() - chance):.0f} points above it. {label(fast)} trains "
        f"fastest, at {speed} times MHA's images a second, with {work} of its multiply-adds."
    )


def _scalability(large: pd.DataFrame) -> str:
    table = large.pivot_table(index="tokens", columns=["metric", "mixer"], values="value")
    first, last = table.iloc[0], table.iloc[-1]
    growth = (last["latency"] / first["latency"]).dropna().sort_values()
    saved = (last["latency"] / last["latency", "mha"]).dropna().sort_values()
    cheaper = [label(m) for m in ordered(saved.index) if m != "mha" and first["latency", m] < first["latency", "mha"]]
    return (
        f"**2 · Scalability.** From {int(table.index[0])} to {int(table.index[-1])} patches latency grows "
        f"{significant(growth['mha'], 2)}-fold for MHA and {significant(growth.iloc[0], 2)}-fold for "
        f"{label(growth.index[0])}. At {int(table.index[-1])} patches {label(saved.index[0])} takes "
        f"{significant(saved.iloc[0], 2)} of MHA's time; at {int(table.index[0])} faster than MHA: "
        f"{', '.join(cheaper) or 'none'}."
    )


def _looks(look: pd.Series) -> str:
    value = {(metric, mixer): significant(number, 2) for (metric, mixer), number in look.items()}
    near, far = look["attention_distance"].idxmin(), look["attention_distance"].idxmax()
    sharp, alike = look["attention_entropy"].idxmin(), look["head_similarity"].idxmax()
    return (
        f"**3 · Patterns.** {label(near)} looks least far ({value['attention_distance', near]} patches on average), "
        f"{label(far)} farthest ({value['attention_distance', far]}). The sharpest rows are {label(sharp)}'s "
        f"({value['attention_entropy', sharp]} of the largest entropy), the most alike heads {label(alike)}'s (cosine "
        f"{value['head_similarity', alike]}). MHA: {value['attention_distance', 'mha']}, "
        f"{value['attention_entropy', 'mha']} and {value['head_similarity', 'mha']}."
    )


def _hybrid(main: pd.DataFrame, images: pd.DataFrame) -> str:
    linear = [mixer for mixer in LINEAR if mixer in main.index]
    if "hybrid" not in main.index or not linear:
        return "**4 · Hybrid.** Not asked: the hybrid or all linear mixers were left out of this run."
    parts = []
    for mixer in linear:
        pair = against(images, main["dataset"].iloc[0], "hybrid", mixer)
        verdict = "undecided" if pair.low <= 0 <= pair.high else "better" if pair.low > 0 else "worse"
        ends = interval(pair.low, pair.high, scale=100)
        gap = f"{100 * pair.difference:+.1f}".replace("-", "\N{MINUS SIGN}")
        parts.append(f"{verdict} against {label(mixer)} ({gap} points {ends})")
    return f"**4 · Does the hybrid beat the linear ones?** On the same images: {'; '.join(parts)}."


def _small(main: pd.DataFrame, cost: pd.Series) -> str:
    top = main["value"].astype(float)
    viable = [mixer for mixer in main.index if top[mixer] >= top.max() - NEAR]
    chosen = min(viable, key=lambda mixer: cost["latency"][mixer])
    needs = ("latency", "peak_memory", "weights_size")
    own, theirs = ([significant(cost[need][mixer]) for need in needs] for mixer in (chosen, "mha"))
    return (
        f"**5 · On a small device.** Of those within {100 * NEAR:.0f} points of the best, {label(chosen)} answers "
        "soonest: {} ms an image, {} MiB beyond its weights, a file of {} MB".format(*own)
        + " (MHA: {} ms, {} MiB, {} MB).".format(*theirs)
    )
