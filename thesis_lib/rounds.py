"""Rounds of one measurement on a shared machine, brought to like moments and pooled."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from thesis_lib.timing import median_row

KEYS = ["backbone", "mixer", "image_size", "tokens", "dtype", "device", "mode", "sdpa_pinned", "batch", "metric"]


def usual_yardsticks(rows: Iterable[dict]) -> dict[tuple, float]:
    """Return the median of what the yardstick took beside all samples, ms, by device and number of threads."""
    beside: dict[tuple, list[float]] = {}
    for found in rows:
        beside.setdefault((found.get("device"), found.get("threads")), []).extend(found.get("beside", []))
    return {where: float(np.median(took)) for where, took in beside.items() if took}


def pool_rounds(rows: Iterable[dict], usual: dict[tuple, float] | None = None) -> pd.DataFrame:
    """Merge the rounds of each configuration: samples are pooled and described anew, the rest is kept once.

    What else runs on a machine makes it slower by half and more, for milliseconds or for an hour, and the yardstick
    beside it (`timing.time_beside`) by as much. So each sample is brought to moments at which the yardstick takes what
    it usually took (`usual_yardsticks`), by the ratio of the two: the times of one run are as if measured at once.
    `yardstick`: what it takes then, ms. The samples stay in a column of lists. usual: by device and threads, where
    other rows say it.
    """
    rows = list(rows)
    usual = usual_yardsticks(rows) | (usual or {})
    merged: dict[tuple, list[dict]] = {}
    for found in rows:
        merged.setdefault(tuple(found.get(column) for column in KEYS), []).append(found)
    return pd.DataFrame([_pooled(rounds, usual) for rounds in merged.values()])


def _pooled(rounds: Sequence[dict], usual: dict[tuple, float]) -> dict:
    told = {key: value for found in reversed(rounds) for key, value in found.items()}  # by the first that says it
    timed = [found for found in rounds if "samples" in found]
    if not timed:
        return told
    if told.pop("beside", None):
        told["yardstick"] = usual[told.get("device"), told.get("threads")]
    samples = np.concatenate([_at_usual_moments(found, told.get("yardstick")) for found in timed])
    return told | median_row(timed[0]["metric"], samples) | {"rounds": len(timed), "note": timed[-1].get("note")}


def _at_usual_moments(found: dict, usual: float | None) -> np.ndarray:
    samples = np.asarray(found["samples"], float)
    if "beside" not in found:
        return samples
    slower = np.asarray(found["beside"]) / usual
    return samples * slower if found["metric"] == "throughput" else samples / slower
