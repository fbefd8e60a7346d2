"""A grid of configurations: visited in rotated order, resumed after an interruption, predicted, and its crossings.

Every visit runs in a process of its own and leaves one small file, named by a fingerprint of its settings, the machine
and the code that it ran: what is finished is not measured again, what was changed is.
"""

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from tqdm.auto import tqdm

from thesis_lib import backbone, closed_form, gpu
from thesis_lib.ceilings import Ceilings
from thesis_lib.cost_model import predict, record, totals
from thesis_lib.efficiency import measure_apart, rotated
from thesis_lib.processes import side_by_side
from thesis_lib.rounds import pool_rounds

PACKAGE = Path(__file__).parent
# A change there is another measurement.
MEASURED_BY = ("efficiency", "timing", "yardstick", "backbone", "class_token", "attention/*")


def plan(
    sizes: Mapping[str, Sequence[int]],
    mixers: Sequence[str],
    *,
    rounds: int = 1,
    variants: Sequence[Mapping] = ({},),
    mixer_options: Mapping[str, Mapping] | None = None,
    **settings,
) -> list[dict]:
    """Return the visits in order, each the arguments of `efficiency.measure` and its round.

    sizes: image sizes by backbone. variants: settings told apart ({"dtype": "bfloat16"}).
    A round starts one mixer later than the one before; only the first measures what one visit is enough for.
    """
    options = mixer_options or {}
    return [
        {"name": name, "mixer": mixer, "image_size": size, "options": dict(options.get(mixer, {}))}
        | settings
        | dict(variant)
        | {"complete": number == 0, "round": number}
        for number, order in enumerate(rotated(mixers, rounds))
        for name in sizes
        for size in sizes[name]
        for variant in variants
        for mixer in order
    ]


def fingerprint(visit: Mapping) -> str:
    """Return a name for a visit's settings on this machine, with these libraries and this code."""
    text = json.dumps([dict(visit), _machine()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def run(visits: Sequence[Mapping], folder: Path, like: pd.DataFrame | None = None) -> pd.DataFrame:
    """Measure what `folder` does not hold yet, showing progress and the time left, and return all visits pooled.

    Interrupted, it has kept every finished visit; `clear` forgets them. like: rows of an earlier run, to whose moments
    the times are brought (see `rounds.pool_rounds`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    with tqdm(visits, unit="run") as progress:
        for visit in progress:
            place = folder / f"{fingerprint(visit)}.json"
            progress.set_description(f"{visit['name']} {visit['image_size']} px {visit['mixer']}")
            progress.initial += place.is_file()  # it took no time, so it tells nothing of the time left
            rows += _measured(visit, place)
    return pool_rounds(rows, None if like is None else _yardsticks(like))


def _yardsticks(rows: pd.DataFrame) -> dict[tuple, float]:
    timed = rows.reindex(columns=["device", "threads", "yardstick"]).dropna(subset="yardstick")
    return timed.groupby(["device", "threads"], dropna=False)["yardstick"].first().to_dict()


def usual_yardstick(rows: pd.DataFrame) -> float:
    """Return what the yardstick takes at the moments that the times are brought to, seconds.

    Raises ValueError where nothing was timed.
    """
    if not (times := _yardsticks(rows)):
        raise ValueError("nothing was timed: the rows' notes say why")
    (milliseconds,) = times.values()
    return milliseconds / 1e3


def _measured(visit: Mapping, place: Path) -> list[dict]:
    """Return the rows of a visit, measured now unless its file is there."""
    if not place.is_file():
        settings = {key: value for key, value in visit.items() if key != "round"}
        name, mixer, size = (settings.pop(key) for key in ("name", "mixer", "image_size"))
        temporary = place.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(measure_apart(name, mixer, size, **settings)))
        temporary.replace(place)
    return json.loads(place.read_text())


def clear(folder: Path) -> None:
    """Forget the finished visits of a grid whose rows are kept."""
    shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _machine() -> list:
    digest = hashlib.sha256()
    for pattern in MEASURED_BY:
        for path in sorted(PACKAGE.glob(f"{pattern}.py")):
            digest.update(path.read_bytes())
    return [torch.__version__, timm.__version__, os.cpu_count(), gpu.query("name"), digest.hexdigest()]


def predictions(
    sizes: Mapping[str, Sequence[int]],
    mixers: Sequence[str],
    ceilings: Ceilings,
    *,
    batch_sizes: Sequence[int] = (1,),
    mixer_options: Mapping[str, Mapping] | None = None,
) -> pd.DataFrame:
    """Predict the time of passes of every mixer at image sizes by backbone and batch sizes, from the ceilings alone.

    Rows: metric predicted, ms, with its terms, ms, and multiply-adds. A grid that is not served has no row.
    """
    wanted = [
        (name, size, mixer, (mixer_options or {}).get(mixer, {}))
        for name in sizes
        for size in sizes[name]
        for mixer in mixers
    ]
    one = functools.partial(_predicted, ceilings, batch_sizes)
    return pd.DataFrame([row for rows in side_by_side(one, wanted, chunksize=4) for row in rows])


def _predicted(ceilings: Ceilings, batch_sizes: Sequence[int], configuration: tuple) -> list[dict]:
    name, size, mixer, options = configuration
    try:
        model = backbone.create(name, mixer, pretrained=False, img_size=size, **options)
    except ValueError:
        return []
    tokens, where = model.patch_embed.num_patches + model.num_prefix_tokens, model.patch_embed.img_size
    common = {"backbone": name, "mixer": mixer, "image_size": size, "tokens": tokens, "mode": "eager", "n": 1}
    common |= {"device": ceilings.device, "dtype": ceilings.dtype, "metric": "predicted", "unit": "ms"}
    rows = []
    for batch in batch_sizes:
        operations = record(model, batch, where, dtype=ceilings.dtype)
        parts = {term: 1e3 * seconds for term, seconds in predict(operations, ceilings).items()}
        macs = totals(operations)["macs"]
        rows.append(common | parts | {"batch": batch, "macs": macs, "value": sum(parts.values())})
    return rows


def beside_measured(predicted: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Set the measured time of a pass, ms, beside each predicted one; null where there is none."""
    keys = ["backbone", "mixer", "image_size", "dtype", "device", "batch"]
    rate = rows[(rows["metric"] == "throughput") & (rows["mode"] == "eager") & rows["value"].notna()]
    rate = rate[rate["sdpa_pinned"].isna()].drop_duplicates(keys).set_index(keys)["value"].astype(float)
    measured = 1e3 / rate.rename("measured")  # of one image
    found = predicted.join(measured, on=keys)
    return found.assign(measured=found["measured"] * found["batch"])


def utilisation(rows: pd.DataFrame, ceilings: Mapping[str, Ceilings]) -> pd.DataFrame:
    """Return what each throughput means in FLOP/s (metric achieved, 2 a multiply-add) and as a share of the ceiling.

    ceilings: by dtype; the share is of the highest rate of a matrix product.
    """
    place = ["backbone", "mixer", "image_size"]
    macs = rows[rows["metric"] == "macs"].drop_duplicates(place).set_index(place)["value"].rename("macs")
    rate = rows[(rows["metric"] == "throughput") & rows["value"].notna()].join(macs, on=place)
    rate = rate[["backbone", "mixer", "image_size", "tokens", "dtype", "device", "mode", "batch", "value", "macs"]]
    achieved = 2 * rate["value"] * rate["macs"]
    highest = 2 * rate["dtype"].map({dtype: found.matmul() for dtype, found in ceilings.items()})
    rate = rate.drop(columns="macs").assign(n=1)
    shares = rate.assign(metric="ceiling_share", value=achieved / highest, unit="1")
    return pd.concat([rate.assign(metric="achieved", value=achieved, unit="FLOP/s"), shares[shares["value"].notna()]])


def crossing(tokens: Sequence[int], gains: np.ndarray) -> np.ndarray:
    """Return N* of each column of gains (sizes, columns): where time saved over MHA, as a ratio, first exceeds 1.

    Linear between sizes in log ratio over log tokens; the first size where it exceeds 1 there, inf where nowhere.
    """
    x, y = np.log(tokens), np.log(gains)
    found = np.where(y[0] > 0, x[0], np.inf)
    for i in range(1, len(x)):
        with np.errstate(divide="ignore", invalid="ignore"):
            at = x[i - 1] + (x[i] - x[i - 1]) * -y[i - 1] / (y[i] - y[i - 1])
        found = np.where(np.isinf(found) & (y[i] > 0), at, found)
    return np.exp(found)


def timed_crossings(rows: pd.DataFrame, stage: str, *, resamples: int = 1000, seed: int = 0) -> list[dict]:
    """Return a row for each mixer: the N* from which it takes less time than MHA, of one image, by backbone and dtype.

    rows: latencies over sizes, metric latency or predicted; where they hold samples, N* has a 95 % percentile interval
    over resampled medians. value is null, and the note says up to where, if there is none; an end of the interval is
    null where resamples have none.
    """
    rng, found = np.random.default_rng(seed), []
    for keys, part in rows.groupby(["backbone", "dtype", "device"], sort=False):
        medians = part.pivot_table(index="tokens", columns="mixer", values="value", sort=True, observed=True)
        samples = {(r.mixer, r.tokens): r.samples for r in part.itertuples()} if "samples" in part else {}
        common = dict(zip(("backbone", "dtype", "device"), keys, strict=True)) | {"stage": stage}
        for mixer in medians.columns.drop("mha"):
            both = medians[["mha", mixer]].dropna()
            tokens = both.index.to_numpy()
            value = crossing(tokens, (both["mha"] / both[mixer]).to_numpy()[:, None])[0]
            row = common | {"mixer": mixer} | _crossing_row(value, tokens)
            if samples:
                times = {
                    name: np.stack([_resampled(samples[name, n], resamples, rng) for n in tokens])
                    for name in ("mha", mixer)
                }
                points = np.sort(crossing(tokens, times["mha"] / times[mixer]))
                low, high = points[int(0.025 * resamples)], points[math.ceil(0.975 * resamples) - 1]
                row |= {"low": low if np.isfinite(low) else None, "high": high if np.isfinite(high) else None}
                row["share_crossing"] = float(np.isfinite(points).mean())
            found.append(row)
    return found


def _resampled(samples: Sequence[float], resamples: int, rng: np.random.Generator) -> np.ndarray:
    samples = np.asarray(samples)
    return np.median(samples[rng.integers(len(samples), size=(resamples, len(samples)))], axis=1)


def _crossing_row(value: float, tokens: Sequence[int]) -> dict:
    row = {"metric": "crossing", "unit": "token", "n": len(tokens), "smallest": tokens[0], "largest": tokens[-1]}
    if not math.isfinite(value):
        return row | {"value": None, "note": f"none up to {tokens[-1]}"}
    return row | {"value": float(value), "note": f"from {tokens[0]}, the smallest" if value <= tokens[0] else None}


def analytic_crossings(
    backbones: Iterable[str],
    mixers: Iterable[str],
    *,
    mixer_options: Mapping[str, Mapping] | None = None,
    max_side: int = 128,
) -> list[dict]:
    """Return the same rows in multiply-adds: the token count from which a layer needs fewer than MHA for good.

    Where there is none up to max_side² patches, the first count at which it needs fewer, and `until`, the last of them.
    `before`: the ranges below it in which it needs fewer, too, as text ("2–65, 101").
    """
    rows, largest = [], max_side**2 + 1
    for name in backbones:
        with torch.device("meta"):
            model = backbone.create(name, pretrained=False)
        dim, heads, prefix = model.embed_dim, model.blocks[0].attn.num_heads, model.num_prefix_tokens
        for mixer in mixers:
            if mixer == "mha":
                continue
            options = (mixer_options or {}).get(mixer, {})
            ranges = closed_form.saving_ranges(mixer, dim, heads, prefix_tokens=prefix, max_side=max_side, **options)
            row = {"metric": "crossing", "unit": "token", "n": 1, "stage": "analytic", "backbone": name, "mixer": mixer}
            first, last = ([found for found in ranges if found[1] is None] or ranges or [(None, None)])[0]
            few = [f"{a}–{b}" if a != b else str(a) for a, b in ranges if b is not None and a < first]
            row |= {"smallest": prefix + 1, "largest": largest, "until": last, "before": ", ".join(few) or None}
            rows.append(row | {"value": first, "note": None if ranges else f"none up to {largest}"})
    return rows
