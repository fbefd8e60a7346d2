import pytest
import torch

from thesis_lib import yardstick as module
from thesis_lib.yardstick import PATIENCE, at_a_quiet_moment, common, quiet, yardstick


def test_the_yardstick_is_seconds_of_a_small_product():
    assert 1e-6 < yardstick("cpu") < 1 and 1e-6 < yardstick(torch.device("cpu")) < 1


def test_a_quiet_moment_is_neither_the_slow_mode_nor_a_burst():
    assert quiet([3.0]) == 3.0 and quiet([2.0, 1.0, 3.0]) == 1.0
    assert quiet([0.5] * 9 + [1.0] * 11 + [1.6] * 80) == 1.0  # a burst, quiet moments, and most of the time slow


@pytest.fixture
def machine(monkeypatch):
    """A clock, and a yardstick that takes what it is given, a second each time."""
    clock = [0.0]

    def timed(taken):
        taken = iter(taken)
        monkeypatch.setattr(module, "yardstick", lambda device: clock.__setitem__(0, clock[0] + 1) or next(taken))

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module, "_waited", 0.0)
    return timed


def test_a_quiet_moment_is_waited_for_with_limited_patience(machine):
    machine([1.5, 1.9, 1.1, 1.0])
    assert at_a_quiet_moment("cpu", 1.0) == 1.1
    machine([1.5])
    assert at_a_quiet_moment("cpu", None) == 1.5  # nothing to compare with
    machine([2.0] * 30)
    assert at_a_quiet_moment("cpu", 1.0) == 2.0 and module._waited == pytest.approx(PATIENCE, abs=1)
    machine([2.0, 1.0])
    assert at_a_quiet_moment("cpu", 1.0) == 2.0  # patience is at its end


def test_times_are_compared_where_most_series_have_them():
    mostly_quick = [[0.35, 0.36, 0.6], [0.36, 0.38], [0.35, 0.6, 0.61], [0.6, 0.6]]
    assert common(mostly_quick, 2) == 0.35
    mostly_slow = [[0.6, 0.61], [0.62, 0.36], [0.6, 0.65], [0.35, 0.36, 0.6, 0.66]]
    assert common(mostly_slow, 2) == 0.6
    assert common([[1.0, 2.0], [1.0, 2.0]], 2) == 1.0  # of equals the quickest
    many = [[1.0] * 6, [2.0], [2.0], [2.0]]  # six rounds of one series count as two
    assert common(many, 2) == 2.0 and common(many, 6) == 1.0
