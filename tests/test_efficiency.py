"""Measures that measure what they say."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from torch import nn

from thesis_lib import backbone, efficiency

TINY = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)


def tiny(mixer="mha", layers=None, img_size=32, **changes):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=img_size, **(TINY | changes)).eval()
    return backbone.swap(model, mixer, layers=layers)


class Sleeper(nn.Module):
    """A model that takes 2 ms an image and holds 1 MiB an image at its peak."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(2**20)), 0

    def forward(self, x):
        self.calls += 1
        torch.empty(len(x) * 2**17).fill_(1.0)  # half a MiB an image, released at once
        time.sleep(0.002 * len(x))
        return torch.empty(len(x) * 2**18)


def test_timing_and_its_statistics():
    model, x = Sleeper(), torch.randn(4, 3, 8, 8)
    row = efficiency.latency(model, x, runs=7, warmup=3)
    assert model.calls == 10 and row["n"] == 7
    assert 8 <= row["p5"] <= row["low"] <= row["value"] <= row["high"] <= row["p95"] < 60
    assert efficiency.throughput(model, x, runs=5, warmup=0)["value"] <= 500
    assert len(efficiency.time_forward(model, x, runs=1000, warmup=9, seconds=0.0)) == 3


def test_interval_of_the_median_narrows_and_survives_one_sample():
    noise = np.random.default_rng(0).normal(10, 1, 400)
    few, many = efficiency.median_row("latency", noise[:20]), efficiency.median_row("latency", noise)
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert many["low"] < 10 < many["high"]
    assert efficiency.median_row("latency", [3.0])["low"] == 3.0


def test_peak_memory_counts_activations_only():
    one, kernel = efficiency.peak_memory(Sleeper(), torch.randn(1, 3, 8, 8))
    four, _ = efficiency.peak_memory(Sleeper(), torch.randn(4, 3, 8, 8))
    assert (one["value"], four["value"], kernel) == (1.0, 4.0, None)  # not the 4 MiB of weights, not the released 0.5
    x = torch.randn(2, 3, 64, 64)
    held, kernel = efficiency.peak_memory(tiny("mha", img_size=64), x)
    assert kernel == "flash"
    assert held["value"] == pytest.approx(2 * 65 * 48 * 4 * 12 / 2**20, rel=0.2)  # x, its sum, 4d before and after GELU
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert efficiency.peak_memory(tiny("mha", img_size=64), x)[1] == "math"


def test_measure_gives_every_row_of_the_protocol():
    rows = efficiency.measure("demo", "pool", 32, batch_sizes=[2, 1], runs=2, warmup=1)
    found = {(row["metric"], row.get("batch")) for row in rows}
    assert found == {
        ("macs", None),
        ("macs_counted", None),
        ("macs_activated", None),
        ("elementwise", None),
        ("params", None),
        ("latency", 1),
        *((metric, batch) for metric in ("throughput", "peak_memory") for batch in (1, 2)),
    }
    assert {row["tokens"] for row in rows} == {17} and {row["threads"] for row in rows} == {torch.get_num_threads()}
    memory = {row["batch"]: row["value"] for row in rows if row["metric"] == "peak_memory"}
    assert memory[2] == pytest.approx(2 * memory[1], rel=0.1)


def test_what_cannot_be_measured_is_a_row_with_a_note(monkeypatch):
    rows = efficiency.measure("demo", "mha", 60)  # 8 does not divide 60
    assert {row["metric"] for row in rows} == set(efficiency.UNITS)
    assert all(row["value"] is None and "60" in row["note"] for row in rows)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(efficiency, "time_forward", full)
    rows = efficiency.measure("demo", "mha", 32, batch_sizes=[1, 2])
    assert [(row["metric"], row["note"]) for row in rows if row["value"] is None] == [
        (metric, "out of memory") for metric in ("latency", "throughput", "peak_memory")
    ]

    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(efficiency, "time_forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        efficiency.measure("demo", "mha", 32)


@pytest.mark.parametrize("wrong", [{"mixer": "pol"}, {"name": "vit_smal_patch16_224"}, {"dtype": "float31"}], ids=str)
def test_misspelt_names_are_errors_not_rows(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        efficiency.measure(**({"name": "demo"} | wrong))


def test_rounds_rotate_and_pool():
    assert ["".join(order) for order in efficiency.rotated("abc", 4)] == ["abc", "bca", "cab", "abc"]
    common = {"backbone": "demo", "mixer": "mha", "image_size": 64, "tokens": 65, "dtype": "float32", "device": "cpu"}
    rounds = [common | {"batch": 1} | efficiency.median_row("latency", times) for times in ([1, 2], [3, 4, 5])]
    rounds += 2 * [common | {"metric": "macs", "value": 7, "unit": "MAC", "n": 1}]
    table = efficiency.pool_rounds(rounds).set_index("metric")
    assert (table.value["latency"], table.n["latency"], table.value["macs"], len(table)) == (3.0, 5, 7, 2)


def test_one_configuration_from_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "thesis_lib.efficiency",
        "--mixer",
        "mha",
        "--image-size",
        "32",
        "--runs",
        "2",
        "--warmup",
        "1",
        "--threads",
        "1",
        "--layers",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = json.loads(done.stdout)
    assert {row["metric"] for row in rows} == set(efficiency.UNITS)
    assert all(row["threads"] == 1 and "samples" not in row for row in rows)
    assert done.stderr == ""


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_its_own_and_one_that_dies(monkeypatch):
    rows = efficiency.measure_apart("demo", "mha", 32, batch_sizes=[1], runs=2, warmup=0)
    assert {row["metric"] for row in rows} == set(efficiency.UNITS) and all(row["value"] for row in rows)
    monkeypatch.setattr(efficiency, "measure", die)
    rows = efficiency.measure_apart("demo", "mha", 32, dtype="float32")
    assert {row["metric"] for row in rows} == set(efficiency.UNITS)
    assert all(row["value"] is None and "died" in row["note"] and row["dtype"] == "float32" for row in rows)
