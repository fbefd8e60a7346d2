"""The percentage of correct key-points (PCK), in every variant that published evaluators use, stated exactly.

A key-point is correct if it lies within alpha times a length of where it should: of the target's box or of its image,
the longer side of either. Evaluators differ in the length, in whether the border counts, in what is averaged, and in
how a match is read off: `PRESETS` names them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from thesis_lib import statistics
from thesis_lib.attention import suggest
from thesis_lib.datasets.pairs import Pair, Pairs
from thesis_lib.statistics import Interval

BASES = ("box", "image")
AVERAGES = ("point", "image", "category")
DETAIL = 1_000  # resamples for a part of a table, of which there are hundreds
FACTORS = ("viewpoint", "scale", "truncation", "occlusion")


@dataclass(frozen=True)
class Protocol:
    """One way to count: the base of the threshold, whether its border counts, the average, and the matching's geometry.

    average: "point", over all key-points; "image", over the pairs' own shares; "category", over the categories' shares
    of points. readout as in `matching.match`; geometry "squash" or "pad" (to a square), as in `features.read_image`.
    """

    base: str = "box"
    inclusive: bool = True
    average: str = "point"
    readout: str = "argmax"
    geometry: str = "squash"

    def __post_init__(self) -> None:
        for value, known in ((self.base, BASES), (self.average, AVERAGES)):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}{suggest(value, known)}")


PRESETS = {
    "DistillDIFT box": Protocol(),
    "DistillDIFT image": Protocol(base="image"),
    "DIFT per point": Protocol(),
    "DIFT per image": Protocol(average="image"),
    "SD+DINO": Protocol(inclusive=False, average="category", readout="patch", geometry="pad"),
}


def preset(name: str) -> Protocol:
    """Look a published evaluator up by name; ValueError names the near ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown evaluator {name!r}{suggest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def point_table(
    pairs: Pairs, match: Callable[[Pair], np.ndarray], *, chosen: Iterable[int] | None = None
) -> pd.DataFrame:
    """Match every key-point: a table of one row a point with its distance in pixels and both lengths.

    match(pair): predictions (P, 2). Columns pair, category, keypoint, x, y, true_x, true_y, distance, box, image and
    the pair's factors (missing where the set has none). Raises ValueError for predictions of another shape or NaN.
    """
    rows = []
    for place in range(len(pairs)) if chosen is None else chosen:
        pair = pairs.pairs[place]
        found = np.asarray(match(pair), float)
        if found.shape != pair.target_points.shape or not np.isfinite(found).all():
            raise ValueError(f"{pair.name}: {len(pair.keypoints)} finite points were expected, got {found.shape}")
        lengths = float((pair.target_box[2:] - pair.target_box[:2]).max()), float(max(pairs.sizes[pair.target]))
        factors = [pair.factors.get(factor, np.nan) for factor in FACTORS]
        for key, at, true in zip(pair.keypoints, found, pair.target_points.astype(float), strict=True):
            rows.append((place, pair.category, key, *at, *true, np.hypot(*(at - true)), *lengths, *factors))
    columns = ["pair", "category", "keypoint", "x", "y", "true_x", "true_y", "distance", *BASES, *FACTORS]
    return pd.DataFrame(rows, columns=columns)


def correct(table: pd.DataFrame, alpha: float, protocol: Protocol) -> np.ndarray:
    """Say of each point whether it is within alpha times its length."""
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    reach = alpha * table[protocol.base].to_numpy(float)
    distance = table["distance"].to_numpy(float)
    return distance <= reach if protocol.inclusive else distance < reach


def pck(
    table: pd.DataFrame, alpha: float = 0.1, protocol: Protocol = PRESETS["DIFT per point"], *, resamples: int = 10_000
) -> Interval:
    """Return the PCK, a share, with its 95 % interval from a bootstrap over pairs; n counts pairs.

    The key-points of a pair are drawn together, because they share an image; with the average "category" pairs are
    drawn within their categories. Raises ValueError for an empty table.
    """
    if table.empty:
        raise ValueError("there is no key-point to score: every pair was skipped, or none has the property asked for")
    hit = correct(table, alpha, protocol)
    _, first, pair = np.unique(table["pair"].to_numpy(), return_index=True, return_inverse=True)
    counts = np.stack([np.bincount(pair, hit), np.bincount(pair)], axis=1).astype(float)  # (pairs, 2): hits, points
    if protocol.average == "image":
        return statistics.bootstrap_mean(counts[:, 0] / counts[:, 1], resamples=resamples)
    parts = [counts]
    if protocol.average == "category":
        category = table["category"].to_numpy()[first]
        parts = [counts[category == name] for name in np.unique(category)]
    value = float(np.mean([part[:, 0].sum() / part[:, 1].sum() for part in parts]))
    drawn = [statistics.resampled_means(part, resamples, seed) for seed, part in enumerate(parts)]
    shares = np.mean([means[:, 0] / means[:, 1] for means in drawn], axis=0)
    return Interval(value, *statistics.quantiles(shares, 0.95), len(counts))


def pck_rows(
    table: pd.DataFrame,
    *,
    alphas: Sequence[float] = (0.05, 0.1),
    evaluators: Sequence[str] = ("DIFT per point", "DIFT per image"),
    by: Sequence[str] = (),
    **protocol: object,
) -> list[dict]:
    """Return result rows of a point table: every alpha and evaluator over all of it, and its parts at alpha 0.1.

    by: "category", "keypoint" (within its category) or one of FACTORS. protocol: columns that all rows share.
    """
    rows, detail = [], 0.1 if 0.1 in alphas else alphas[-1]

    def add(part: pd.DataFrame, alpha: float, name: str, group: str, level: str, resamples: int = 10_000) -> None:
        score = vars(pck(part, alpha, preset(name), resamples=resamples))
        what = {"metric": "pck", "unit": "1", "alpha": alpha, "evaluator": name, "points": len(part)}
        rows.append(what | score | {"group": group, "level": level} | protocol)

    for alpha in alphas:
        for name in evaluators:
            add(table, alpha, name, "all", "all")
    for group in by:
        keys = ["category", "keypoint"] if group == "keypoint" else [group]
        for level, part in table.dropna(subset=keys).groupby(keys):
            text = " ".join(str(int(v) if isinstance(v, float) else v) for v in level)
            add(part, detail, evaluators[0], group, text, DETAIL)
    return rows
