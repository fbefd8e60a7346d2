"""The recorder against closed forms and graphs counted by hand; predictions that add up; ceilings in their units."""

import itertools
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from thesis_lib import attention, backbone, ceilings, class_token, closed_form, cost_model
from thesis_lib.ceilings import Ceilings, Curve

TINY = dict(patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)


def tiny(mixer="mha", img_size=32, **changes):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=img_size, **(TINY | changes)).eval()
    return backbone.swap(model, mixer)


def flat(rate=1e9, overhead=1e-6, **others):
    """Ceilings that do not depend on sizes: one rate and one overhead for all families, but for those given."""
    axes = dict.fromkeys(("mm", "bmm", "attention", "convolution"), ((1, 2),) * 3) | {"depthwise": ((1, 2),) * 2}
    single = ("add", "gelu", "exp", "softmax", "layer_norm", "sum", "copy", "transpose", "pool")
    axes |= dict.fromkeys(single, ((1, 2),))
    curves = {
        name: Curve(overhead, axis, np.full([2] * len(axis), float(others.get(name, rate))))
        for name, axis in axes.items()
    }
    return Ceilings("cpu", "float32", 1, curves | {"view": Curve(overhead), "module": Curve(overhead)}, 1.0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mixer", attention.MIXERS)
def test_recorded_products_equal_the_closed_form(mixer, fused):
    for batch, size in ((1, (32, 32)), (2, (64, 32))):
        model = tiny(mixer, size)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        operations = cost_model.record(model, batch, size, fused=fused)
        assert cost_model.totals(operations)["macs"] == batch * closed_form.model_cost(model).macs
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_recorded_products_of_what_a_metric_runs():
    model = tiny()

    class Metric(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = model

        def forward(self, x):
            return class_token.last_class_token(self.vit, x)

    assert cost_model.totals(cost_model.record(Metric(), 1, (32, 32)))["macs"] == class_token.model_cost(model).macs


class Graph(nn.Module):
    """A graph whose operations one can count: flatten (a view), linear, GELU, a transposed copy, a product."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x):  # (B, 3, 2, 2)
        x = F.gelu(self.linear(x.flatten(1)))  # (B, 5)
        return x.mT.contiguous() @ x  # (5, 5)


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_bytes_launches_and_macs_of_a_graph_counted_by_hand(dtype, width):
    found = [op for op in cost_model.record(Graph(), 7, (2, 2), dtype=dtype) if op.launches]
    assert [op.name for op in found] == ["addmm", "gelu", "clone", "mm"]
    assert [op.macs for op in found] == [7 * 12 * 5, 0, 0, 5 * 7 * 5]
    numbers = [7 * 12 + 12 * 5 + 5 + 7 * 5, 2 * 7 * 5, 2 * 7 * 5, 7 * 5 + 7 * 5 + 5 * 5]
    assert [op.bytes for op in found] == [width * count for count in numbers]
    assert [op.kind for op in found] == ["matmul", "elementwise", "copy", "matmul"]
    assert found[0].sizes == (7, 5, 12) and found[2].family == "transpose" and found[1].elementwise == 5 * 35
    whole = cost_model.record(Graph(), 7, (2, 2), dtype=dtype)
    assert cost_model.totals(whole)["launches"] == 4 and whole.count(cost_model.MODULE) == 2  # the graph, its layer


class Attend(nn.Module):
    def forward(self, x):  # (B, 3, n, d) as heads
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


def test_fused_attention_is_one_kernel_and_its_output_needs_no_copy():
    (op,) = [op for op in cost_model.record(Attend(), 2, (10, 8)) if op.launches]
    assert (op.name, op.sizes, op.macs) == ("attention", (10, 10, 8), 2 * 3 * 2 * 10 * 10 * 8)
    assert op.bytes == 4 * 4 * 2 * 3 * 10 * 8  # q, k, v and the output; the map is never in memory
    parts = [op for op in cost_model.record(Attend(), 2, (10, 8), fused=False) if op.launches]
    assert sum(op.macs for op in parts) == op.macs and any(part.family == "softmax" for part in parts)
    assert sum(part.bytes for part in parts) > 2 * op.bytes - 1


def test_bytes_repeated_by_a_stride_of_zero_are_read_once():
    class Expand(nn.Module):
        def forward(self, x):
            return x[:, :1].expand(-1, 3, -1, -1) + x

    (op,) = [op for op in cost_model.record(Expand(), 1, (4, 4)) if op.launches]
    assert op.bytes == 4 * (16 + 48 + 48)


def test_kinds_of_operations():
    named = {
        "addmm": "matmul",
        "mkldnn_convolution": "matmul",
        "gelu": "elementwise",
        "native_layer_norm": "elementwise",
    }
    named |= {
        "_scaled_dot_product_flash_attention_for_cpu": "matmul",
        "copy_": "copy",
        "cat": "copy",
        "mean": "elementwise",
        "softmax": "launches",
    }
    named |= {
        "transpose": "launches",
        "linear": "launches",
        "empty_strided": "launches",
        "no_such_operation": "elementwise",
    }
    assert {name: cost_model.kind(name) for name in named} == named


def test_predictions_add_up_and_grow_with_the_work():
    operations = cost_model.record(tiny(), 1, (32, 32))
    found = cost_model.predict(operations, flat())
    halves = [cost_model.predict(part, flat()) for part in (operations[:40], operations[40:])]
    assert set(found) == set(cost_model.TERMS) and all(value > 0 for value in found.values())
    assert all(found[term] == pytest.approx(sum(half[term] for half in halves)) for term in found)
    assert found["launches"] == pytest.approx(1e-6 * len(operations))
    times = [
        sum(cost_model.predict(cost_model.record(tiny(img_size=size), batch, (size, size)), flat()).values())
        for batch, size in ((1, 32), (2, 32), (2, 64), (4, 64))
    ]
    assert times == sorted(times) and times[-1] > 2 * times[-2] * 0.9


def test_each_operation_is_bound_by_compute_or_memory():
    operation = cost_model.Operation("mm", "mm", "matmul", (1, 1, 1), work=1000, bytes=800)
    compute, memory = (cost_model.predict([operation], flat(1e3, copy=copy))["matmul"] for copy in (1e9, 10))
    assert compute == pytest.approx(1.0)
    assert memory == pytest.approx(800 / (8 * 10))  # a copy of 10 elements a second reads and writes 80 bytes
    faster = cost_model.predict([operation], flat(2e3, copy=1e9))["matmul"]
    assert faster == pytest.approx(compute / 2)


def test_a_curve_interpolates_in_logarithms_and_holds_at_its_ends():
    curve = Curve(0.0, ((1, 100), (1, 10)), np.array([[1.0, 10.0], [100.0, 1000.0]]))
    assert curve.rate((10, 1)) == pytest.approx(10.0) and curve.rate((100, 10)) == pytest.approx(1000.0)
    assert curve.rate((1, math.sqrt(10))) == pytest.approx(math.sqrt(10))
    assert curve.rate((10**6, 10**6)) == pytest.approx(1000.0) and curve.rate((1, 1)) == pytest.approx(1.0)


def test_ceilings_are_measured_in_their_units_for_every_family(monkeypatch):
    calls, plain = [], ceilings._families

    def few(make, device):
        corners = lambda axes: tuple((axis[0], axis[1]) for axis in axes)
        return {name: (corners(axes), build) for name, (axes, build) in plain(make, device).items()}

    def clock(call, between, *, budget, device, beside):
        call()
        calls.append(device)
        beside.append(1.0)
        return 1e-3 if len(calls) % 3 else 1e-5

    monkeypatch.setattr(ceilings, "_families", few)
    monkeypatch.setattr(ceilings, "_in_yardsticks", clock)
    found = ceilings.measure()
    recorded = {op.family for mixer in attention.MIXERS for op in cost_model.record(tiny(mixer), 1, (32, 32))}
    assert recorded <= set(found.curves) and found.matmul() > 0
    call, work = plain(torch.rand, "cpu")["mm"][1](3, 4, 5)
    assert call().shape == (3, 4) and work == 60
    grown = plain(torch.rand, "cuda")["add"][0][0]
    assert grown[:-2] == plain(torch.rand, "cpu")["add"][0][0] and grown[-1] == 2**27  # past a GPU's cache
    call, work = plain(torch.rand, "cpu")["attention"][1](3, 4, 32)
    assert call().shape == (1, 8, 3, 32) and work == 8 * 2 * 3 * 4 * 32
    rows = found.rows()
    assert {row["unit"] for row in rows} == {"us", "MAC/s", "element/s"}
    assert {row["family"] for row in rows if row["unit"] == "MAC/s"} == set(ceilings.UNITS)
    assert all(row["value"] > 0 for row in rows if row["metric"] == "rate")


def test_what_slows_a_call_and_the_yardstick_alike_changes_no_ceiling(monkeypatch):
    """The machine is up to five times slower in turn; of a call 2 ms, of the yardstick 1 ms are its own."""
    slow, beside = itertools.cycle([1.0, 5.0, 2.0]), []
    now = [1.0]

    def around(run, device):
        now[0] = next(slow)
        return run(), 1e-3 * now[0]

    monkeypatch.setattr(ceilings, "around", around)
    monkeypatch.setattr(ceilings, "_elapsed", lambda run: run() or 2e-3 * now[0])
    order = []
    timing = {"budget": 0.0, "device": "cpu", "beside": beside}
    found = ceilings._in_yardsticks(lambda: order.append("call"), lambda: order.append("between"), **timing)
    assert found == pytest.approx(2.0) and beside == [1e-3, 5e-3, 2e-3, 1e-3, 5e-3]
    assert order[0::2] == ["between"] * (len(order) // 2) and order[1::2] == ["call"] * (len(order) // 2)


class Written(TorchDispatchMode):
    """Counts the bytes of results."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.bytes += out.nbytes
        return out


@pytest.mark.parametrize(
    ("result", "expected"), [((8, 8), 2**22), ((2**11, 2**10), 8 * 2**23), ((2**13, 2**12), 2**26)]
)
def test_what_precedes_a_timed_call_leaves_the_caches_cold(result, expected):
    layer = ceilings._with_cold_caches(lambda: None, torch.empty(result))
    with Written() as written:
        layer()
    assert written.bytes == expected


def test_of_several_ceilings_each_point_is_the_least_disturbed():
    fast, slow = flat(rate=2e9, overhead=3e-6), flat(rate=1e9, overhead=1e-6)
    both = ceilings.best([fast, slow])
    assert both.curves["mm"].overhead == 1e-6 and both.curves["view"].rates is None
    assert both.curves["mm"].rate((2, 2, 2)) == pytest.approx(2e9)
    assert (both.device, both.dtype, both.threads) == (fast.device, fast.dtype, fast.threads)


def test_ceilings_of_a_slow_hour_are_those_of_a_quick_one_once_brought_there():
    quick = flat(rate=2e9, overhead=1e-6)
    slow = quick.at(1.6)
    assert slow.yardstick == 1.6 and slow.curves["add"].overhead == pytest.approx(1.6e-6)
    assert slow.curves["mm"].rate((2, 2, 2)) == pytest.approx(1.25e9) and slow.curves["view"].rates is None
    assert sum(cost_model.predict(cost_model.record(tiny("sra"), 1, (32, 32)), slow).values()) == pytest.approx(
        1.6 * sum(cost_model.predict(cost_model.record(tiny("sra"), 1, (32, 32)), quick).values())
    )
    both = ceilings.best([slow, quick])
    assert both.yardstick == 1.0 and both.curves["mm"].rate((2, 2, 2)) == pytest.approx(2e9)
    assert both.curves["add"].overhead == pytest.approx(1e-6)
    assert {row["yardstick"] for row in slow.rows()} == {1600.0}


def test_the_matrix_rate_counts_the_overhead_of_the_call():
    """A product as short as its overhead has any net rate: here 8 multiply-adds in no time beside the call."""
    rates = np.array([1e15, 1e6]).reshape(2, 1, 1)
    curve = ceilings.Curve(1e-3, ((2, 2000), (2,), (2,)), rates)
    found = ceilings.Ceilings("cpu", "float32", 1, {"mm": curve}, 1.0).matmul()
    assert found == pytest.approx(8000 / (1e-3 + 8000 / 1e6))
