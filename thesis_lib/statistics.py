"""Intervals and paired tests over items scored one by one.

Every interval is a percentile bootstrap that resamples whole items (Efron and Tibshirani 1993, chapter 13), so that
scores of several models on one item stay together. All functions are deterministic for a given seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

BLOCK = 4_000_000  # counts held at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Paired:
    """Mean difference a - b with its interval, the exact p-value, and how often a beat b and b beat a."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    wins: int
    losses: int


def bootstrap_mean(values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean with its percentile bootstrap interval.

    values: (n,), one score an item. A single item or equal items give low = high = value.
    Raises ValueError for no items, NaN or infinite ones.
    """
    (values,) = _items(values)
    value, low, high = _interval(values, level, resamples, seed)
    return Interval(value, low, high, len(values))


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Paired:
    """Compare two models scored on the same items: mean(a - b), bootstrapped over items, and an exact test.

    The p-value is the two-sided exact McNemar test (McNemar 1947): a binomial test on the items where one wins; with
    scores between 0 and 1 it is the sign test. Where neither ever wins it is 1.
    Raises ValueError for different lengths, no items, NaN or infinite ones.
    """
    a, b = _items(a, b)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    difference, low, high = _interval(a - b, level, resamples, seed)
    p_value = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return Paired(difference, low, high, float(p_value), len(a), wins, losses)


def recovered_share(
    full: ArrayLike,
    degraded: ArrayLike,
    recovered: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return mean(recovered - degraded) / mean(full - degraded), bootstrapped over the same items.

    1 means that all of the lost score came back, 0 none, negative values that it fell further. Where the interval of
    the loss itself reaches zero there is no resolved loss to recover: value, low and high are NaN.
    Raises ValueError for different lengths, no items, NaN or infinite ones.
    """
    full, degraded, recovered = _items(full, degraded, recovered)
    loss, gain = resampled_means(np.stack([full - degraded, recovered - degraded], axis=1), resamples, seed).T
    if quantiles(loss, level)[0] <= 0:
        return Interval(np.nan, np.nan, np.nan, len(full))
    # A resample without loss stands for an unbounded share; there are fewer of them than one tail holds, so both ends
    # of the interval stay finite.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(loss > 0, gain / loss, np.copysign(np.inf, gain))
    low, high = quantiles(share, level)
    return Interval(float((recovered - degraded).mean() / (full - degraded).mean()), low, high, len(full))


def _items(*columns: ArrayLike) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(c, dtype=np.float64) for c in columns]
    if any(a.ndim != 1 or a.shape != arrays[0].shape for a in arrays):
        raise ValueError(f"Scores must be vectors over the same items, got shapes {[a.shape for a in arrays]}.")
    if arrays[0].size == 0:
        raise ValueError("There are no items to average.")
    wrong = sum(int((~np.isfinite(a)).sum()) for a in arrays)
    if wrong:
        raise ValueError(f"{wrong} of {sum(a.size for a in arrays)} scores are NaN or infinite.")
    return arrays


def _interval(values: NDArray[np.float64], level: float, resamples: int, seed: int) -> tuple[float, float, float]:
    if np.ptp(values) == 0:
        return (float(values[0]),) * 3
    return float(values.mean()), *quantiles(resampled_means(values[:, None], resamples, seed)[:, 0], level)


def resampled_means(items: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Draw the means of n items taken with replacement: (n, k) -> (resamples, k).

    Equal rows are drawn together: how often each distinct row occurs in a resample is multinomial, which is the same
    distribution as drawing indices, and hundreds of times faster for 2AFC scores.
    Raises ValueError for fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1.")
    rows, counts = np.unique(items, axis=0, return_counts=True)  # (m, k), (m,)
    rng = np.random.default_rng(seed)
    sizes = np.diff(np.append(np.arange(0, resamples, max(1, BLOCK // len(rows))), resamples))
    drawn = [rng.multinomial(len(items), counts / len(items), size=size) @ rows for size in sizes]
    return np.concatenate(drawn) / len(items)


def quantiles(samples: NDArray[np.float64], level: float) -> Sequence[float]:
    """Return the two ends of the central `level` of samples; ValueError for a level outside (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")
    tail = (1 - level) / 2
    return np.quantile(samples, [tail, 1 - tail], method="inverted_cdf").tolist()
