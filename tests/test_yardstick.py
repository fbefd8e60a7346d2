import torch

from thesis_lib.yardstick import quiet, yardstick


def test_the_yardstick_is_seconds_of_a_small_product():
    assert 1e-6 < yardstick("cpu") < 1 and 1e-6 < yardstick(torch.device("cpu")) < 1


def test_a_quiet_moment_is_neither_the_slow_mode_nor_a_burst():
    assert quiet([3.0]) == 3.0 and quiet([2.0, 1.0, 3.0]) == 1.0
    assert quiet([0.5] * 9 + [1.0] * 11 + [1.6] * 80) == 1.0  # a burst, quiet moments, and most of the time slow
