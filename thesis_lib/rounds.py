"""Rounds of one measurement on a shared machine: which of them can be compared, and what they say together."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

import pandas as pd

from thesis_lib.timing import median_row
from thesis_lib.yardstick import DISTURBED, common

KEYS = ["backbone", "mixer", "image_size", "tokens", "dtype", "device", "mode", "sdpa_pinned", "batch", "metric"]
LIKE_ROUNDS = 2  # of each series, that can be compared: one alone may be a disturbed one unnoticed


def usual_yardsticks(rows: Iterable[dict]) -> dict[tuple, float]:
    """Return what the yardstick takes beside the rounds that are compared, ms, by device and number of threads.

    It is chosen (`yardstick.common`) so that most series have LIKE_ROUNDS of them.
    """
    beside: dict[tuple, list[list[float]]] = {}
    for rounds in _merged(found for found in rows if "yardstick" in found):
        where = rounds[0].get("device"), rounds[0].get("threads")
        beside.setdefault(where, []).append([found["yardstick"] for found in rounds])
    return {where: common(series, LIKE_ROUNDS) for where, series in beside.items()}


def like_rounds(rows: Iterable[dict], usual: dict[tuple, float]) -> float:
    """Count the rounds that can be compared, in the series that has fewest; inf where nothing is timed."""
    merged = _merged(found for found in rows if "samples" in found)
    return min((sum(_like(found, usual) for found in rounds) for rounds in merged), default=math.inf)


def pool_rounds(rows: Iterable[dict], usual: dict[tuple, float] | None = None) -> pd.DataFrame:
    """Merge the rounds of each configuration: samples are pooled and described anew, the rest is kept once.

    What else runs on a machine makes it slower, for seconds or for an hour. Left out are rounds beside which the
    yardstick (`timing.time_beside`) was not as quick as beside most (`usual_yardsticks`), and those whose own median
    differs from that of the middle one, of two the quicker, by more than DISTURBED: a machine may change between a
    series and its yardstick. `disturbed` counts them among the `rounds`. Where no round is like most, those nearest the
    middle one stand, and all are counted. `yardstick`: what it took beside those that stand, ms, the median. The
    samples stay in a column of lists. usual: what the yardstick should have taken, by device and threads, where other
    rows say it.
    """
    rows = list(rows)
    usual = usual_yardsticks(rows) | (usual or {})
    return pd.DataFrame([_pooled(rounds, usual) for rounds in _merged(rows)])


def _merged(rows: Iterable[dict]) -> list[list[dict]]:
    merged: dict[tuple, list[dict]] = {}
    for found in rows:
        merged.setdefault(tuple(found.get(column) for column in KEYS), []).append(found)
    return list(merged.values())


def _like(found: dict, usual: dict[tuple, float]) -> bool:
    if "yardstick" not in found:
        return True
    least = usual[found.get("device"), found.get("threads")]
    return least <= found["yardstick"] <= DISTURBED * least


def _pooled(rounds: Sequence[dict], usual: dict[tuple, float]) -> dict:
    told = {key: value for found in reversed(rounds) for key, value in found.items()}  # by the first that says it
    told.pop("yardstick", None)
    timed = [found for found in rounds if "samples" in found]
    if not timed:
        return told
    like = [found for found in timed if _like(found, usual)]
    standing = like or timed
    cost = [1 / found["value"] if found["metric"] == "throughput" else found["value"] for found in standing]
    middle = statistics.median_low(cost)
    near = [middle / DISTURBED <= own <= DISTURBED * middle for own in cost]
    kept = list(itertools.compress(standing, near))
    pooled = median_row(kept[0]["metric"], [sample for found in kept for sample in found["samples"]])
    told |= {"rounds": len(timed), "disturbed": len(timed) - len(kept) if like else len(timed)}
    if beside := [found["yardstick"] for found in kept if "yardstick" in found]:
        told["yardstick"] = statistics.median(beside)
    return told | pooled | {"note": timed[-1].get("note")}
