import torch

from thesis_lib import yardstick as module
from thesis_lib.yardstick import around


def test_around_is_the_mean_of_what_the_yardstick_takes_right_before_and_right_after(monkeypatch):
    happened = []

    def timed(device, count):
        happened.append((device, count))
        return [1.0] * count if len(happened) == 1 else [2.0, 2.0, 5.0]

    monkeypatch.setattr(module, "_times", timed)
    assert around(lambda: happened.append("run") or 7, "cpu") == (7, 2.0)
    assert happened == [("cpu", 3), "run", ("cpu", 3)]


def test_the_yardstick_is_seconds_of_a_small_product():
    for device in ("cpu", torch.device("cpu")):
        found, took = around(lambda: "found", device, repeats=1)
        assert found == "found" and 1e-6 < took < 1
