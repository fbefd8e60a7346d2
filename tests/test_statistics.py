"""Intervals and paired tests against closed forms, scipy and simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from thesis_lib.statistics import Interval, bootstrap_mean, paired_difference, recovered_share


def accuracy(n, p, seed=0):
    return (np.random.default_rng(seed).random(n) < p).astype(float)


def test_bootstrap_interval_equals_scipys_on_continuous_scores():
    values = np.random.default_rng(1).gamma(2.0, size=60)
    ours = bootstrap_mean(values, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01) and ours.high == pytest.approx(theirs.high, abs=0.01)
    assert ours.n == 60


def test_bootstrap_interval_of_an_accuracy_is_the_binomials():
    values = np.repeat([1.0, 0.0], [1642, 182])  # 90 % of NIGHTS' 1,824 test triplets
    low, high = scipy.stats.binom(1824, 1642 / 1824).ppf([0.025, 0.975]) / 1824
    interval = bootstrap_mean(values)
    assert interval.low == pytest.approx(low, abs=1.5 / 1824) and interval.high == pytest.approx(high, abs=1.5 / 1824)
    wide = bootstrap_mean(values, level=0.99)
    assert wide.low < interval.low < interval.high < wide.high


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    intervals = [bootstrap_mean(rng.random(80) < 0.8, resamples=500, seed=i) for i in range(400)]
    covered = np.mean([i.low <= 0.8 <= i.high for i in intervals])
    assert 0.90 <= covered <= 0.98


def test_bootstrap_is_deterministic_and_follows_its_seed():
    values = accuracy(300, 0.7)
    assert bootstrap_mean(values) == bootstrap_mean(values[::-1])  # the order of the items is no information
    assert bootstrap_mean(values, seed=1, resamples=99) != bootstrap_mean(values, seed=2, resamples=99)


@pytest.mark.parametrize("values", [[0.1], [0.1] * 7])
def test_bootstrap_of_equal_items_has_no_width(values):
    assert bootstrap_mean(values) == Interval(0.1, 0.1, 0.1, len(values))


def test_bootstrap_of_many_distinct_items_is_drawn_in_blocks():
    values = np.linspace(0, 1, 5001)
    interval = bootstrap_mean(values, resamples=1000)
    half = 1.96 * values.std() / math.sqrt(5001)
    assert interval.high - interval.value == pytest.approx(half, rel=0.15)
    assert interval.value - interval.low == pytest.approx(half, rel=0.15)


def test_paired_difference_is_mcnemars_exact_test():
    a = np.array([1.0] * 60 + [1.0] * 14 + [0.0] * 4 + [0.0] * 22)
    b = np.array([1.0] * 60 + [0.0] * 14 + [1.0] * 4 + [0.0] * 22)
    paired = paired_difference(a, b)
    assert (paired.wins, paired.losses, paired.n) == (14, 4, 100)
    assert paired.difference == pytest.approx(0.10)
    exact = 2 * sum(math.comb(18, k) for k in range(5)) / 2**18
    assert paired.p_value == pytest.approx(exact)
    assert 0 < paired.low < 0.1 < paired.high < 0.2
    mirrored = paired_difference(b, a)
    assert mirrored.p_value == pytest.approx(exact) and mirrored.difference == pytest.approx(-0.10)


def test_pairing_resolves_what_separate_intervals_cannot():
    a = accuracy(1000, 0.85)
    b = a.copy()
    b[np.flatnonzero(a)[:12]] = 0
    paired, left, right = paired_difference(a, b), bootstrap_mean(a), bootstrap_mean(b)
    assert left.low < right.high  # the two intervals overlap
    assert paired.low > 0 and paired.p_value < 0.001


def test_paired_difference_without_discordant_items_is_no_evidence():
    a = accuracy(50, 0.8)
    paired = paired_difference(a, a)
    assert (paired.difference, paired.low, paired.high, paired.p_value) == (0, 0, 0, 1)


def test_ties_scored_one_half_count_in_the_difference_and_the_test():
    paired = paired_difference([1, 1, 0.5, 0], [0.5, 1, 1, 0.5])
    assert (paired.wins, paired.losses) == (1, 2) and paired.difference == pytest.approx(-0.125)


def test_recovered_share_is_the_ratio_of_means_with_a_paired_interval():
    full = accuracy(2000, 0.95)
    degraded, recovered = full.copy(), full.copy()
    degraded[np.flatnonzero(full)[:600]] = 0
    recovered[np.flatnonzero(full)[:150]] = 0
    share = recovered_share(full, degraded, recovered)
    assert share.value == pytest.approx(0.75)
    assert share.low == pytest.approx(0.75 - 1.96 * math.sqrt(0.75 * 0.25 / 600), abs=0.01)  # 450 of 600 lost items
    assert share.high == pytest.approx(0.75 + 1.96 * math.sqrt(0.75 * 0.25 / 600), abs=0.01)


def test_recovered_share_of_everything_and_nothing():
    full, degraded = accuracy(500, 0.95), accuracy(500, 0.6, seed=1)
    everything, nothing = recovered_share(full, degraded, full), recovered_share(full, degraded, degraded)
    assert (everything.value, everything.low, everything.high) == (1, 1, 1)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


@pytest.mark.parametrize("lost", [0, 2, -60])
def test_recovered_share_of_an_unresolved_or_negative_loss_is_nan(lost):
    full = np.repeat([1.0, 0.0], [400, 100])
    degraded = np.repeat([1.0, 0.0], [400 - lost, 100 + lost])
    share = recovered_share(full, degraded, full)
    assert math.isnan(share.value) and math.isnan(share.low) and math.isnan(share.high) and share.n == 500


def test_recovered_share_of_a_barely_resolved_loss_is_finite():
    full = np.ones(100)
    degraded = full.copy()
    degraded[:4] = 0  # some 1.7 % of the resamples show no loss
    recovered = full.copy()
    recovered[50:53] = 0
    share = recovered_share(full, degraded, recovered)
    assert share.value == pytest.approx(0.25)
    assert np.isfinite([share.low, share.high]).all() and share.low < 0.25 < share.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "no items"),
        (lambda: bootstrap_mean([0.0, math.nan, math.nan]), "2 of 3 scores are NaN"),
        (lambda: bootstrap_mean([0.0, math.inf]), "1 of 2 scores are NaN or infinite"),
        (lambda: bootstrap_mean([0.0, 1.0], resamples=0), "resamples=0 must be at least 1"),
        (lambda: bootstrap_mean(np.ones((3, 2))), "vectors"),
        (lambda: bootstrap_mean([0.0, 1.0], level=95), "level=95"),
        (lambda: paired_difference([1, 0], [1, 0, 1]), r"\(2,\), \(3,\)"),
        (lambda: recovered_share([1, 1], [0, 0], [1]), "same items"),
    ],
)
def test_bad_scores_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
