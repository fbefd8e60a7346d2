"""What a machine can do a second, measured on the spot with plain operations: the ceilings of cost_model.py.

Products, convolutions, softmax attention, elementwise operations and copies are timed at a few sizes each. On a CPU a
few others run before every timed call and write about as much memory as a layer does, and no less than a small model
reads between two uses of one weight: in a loop of its own an operation finds its code and memory in the nearest cache
and takes half as long, or a third. On a GPU calls queue up, as they do there. Rates are interpolated over the
logarithms of the sizes, for a small product reaches a fraction of a large one's rate and a copy in cache many times
that of one outside it. No model is among them.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn

from thesis_lib.yardstick import around

UNITS = {"mm": "MAC/s", "bmm": "MAC/s", "attention": "MAC/s", "convolution": "MAC/s", "depthwise": "MAC/s"}
ELEMENTS = (2**9, 2**13, 2**16, 2**18, 2**20, 2**22)
MORE_ELEMENTS = (2**24, 2**27)  # on a GPU, whose cache holds what lies below
WIDTH = 128  # of the rows that elementwise operations run over
MODEL_BYTES = 2**22  # of a small model's weights, more than a core's own cache holds


@dataclass(frozen=True)
class Curve:
    """The rate of one operation, work a second, over its sizes, and what a call of it costs with nothing to do, s.

    axes: one increasing tuple of sizes a dimension, none for what only has an overhead; rates: an array over their
    grid. Beyond the grid the rate of its edge holds.
    """

    overhead: float
    axes: tuple[tuple[int, ...], ...] = ()
    rates: np.ndarray | None = None

    def rate(self, sizes: Sequence[int]) -> float:
        """Interpolate log rate linearly over log sizes."""
        where = [
            min(max(math.log(size), math.log(axis[0])), math.log(axis[-1]))
            for size, axis in zip(sizes, self.axes, strict=True)
        ]
        grid = tuple(np.log(axis) for axis in self.axes)
        return float(np.exp(RegularGridInterpolator(grid, np.log(self.rates))(where)[0]))


@dataclass(frozen=True)
class Ceilings:
    """The curves of one device, number format and thread count, at moments when the yardstick takes so many seconds."""

    device: str
    dtype: str
    threads: int
    curves: dict[str, Curve]
    yardstick: float

    def at(self, yardstick: float) -> "Ceilings":
        """Return them at other moments: all takes as many times longer as the yardstick, seconds, does."""
        slower, curves = yardstick / self.yardstick, {}
        for family, curve in self.curves.items():
            rates = None if curve.rates is None else curve.rates / slower
            curves[family] = Curve(curve.overhead * slower, curve.axes, rates)
        return replace(self, curves=curves, yardstick=yardstick)

    def bandwidth(self, count: int) -> float:
        """Return the bytes a second that a copy reads and writes when it moves `count` bytes in all."""
        size = 2 * getattr(torch, self.dtype).itemsize
        return size * self.curves["copy"].rate([max(count // size, 1)])

    def matmul(self) -> float:
        """Return the highest rate of a matrix product, multiply-adds a second, the call's overhead included.

        A curve's own rates leave it out: of a product hardly longer than its overhead they say nothing.
        """
        curve = self.curves["mm"]
        work = functools.reduce(np.multiply.outer, [np.asarray(axis, float) for axis in curve.axes])
        return float((work / (curve.overhead + work / curve.rates)).max())

    def rows(self) -> list[dict]:
        """Return all of it as result rows: `overhead` in us, and `rate` at each grid point, its sizes in a column."""
        common = {"device": self.device, "dtype": self.dtype, "threads": self.threads, "n": 1}
        common |= {"yardstick": 1e3 * self.yardstick}  # ms
        rows = []
        for family, curve in self.curves.items():
            own = common | {"family": family}
            rows.append(own | {"metric": "overhead", "value": 1e6 * curve.overhead, "unit": "us"})
            for place in np.ndindex(*(len(axis) for axis in curve.axes)) if curve.axes else ():
                sizes = " ".join(str(axis[i]) for axis, i in zip(curve.axes, place, strict=True))
                value = {"value": float(curve.rates[place]), "unit": UNITS.get(family, "element/s")}
                rows.append(own | {"metric": "rate", "sizes": sizes} | value)
        return rows


def measure(
    *, device: str = "cpu", dtype: str = "float32", threads: int | None = None, seconds: float = 0.01
) -> Ceilings:
    """Measure every curve; `seconds` is spent on each of about 200 points, more where one call takes longer.

    The yardstick is timed around every few calls, and a point is the median of their ratios, times what the yardstick
    took in the median of all: what else runs on the machine slows both.
    """
    if threads:
        torch.set_num_threads(threads)
    number, limit = getattr(torch, dtype), 2**27 if device == "cpu" else 2**37
    make = lambda *shape: torch.rand(*shape, device=device).to(number)
    between, families, beside = _others(make) if device == "cpu" else None, _families(make, device), []
    timed = functools.partial(_in_yardsticks, budget=seconds, device=device, beside=beside)
    spent: dict[str, float] = {}  # what a call costs with nothing to do, and below what a point takes, in yardsticks
    points: dict[str, list[tuple[float, int]]] = {}
    with torch.inference_mode():
        for family, (axes, build) in families.items():
            call, _ = build(*(min(axis[0], 16) for axis in axes))
            spent[family], points[family] = timed(call, between), []
            for sizes in itertools.product(*axes):
                own = sizes
                while family in UNITS and math.prod(own) > limit and own[0] > 256:  # the rate is level there
                    own = (own[0] // 2, *own[1:])
                call, work = build(*own)
                points[family].append((timed(call, _with_cold_caches(between, call()) if between else None), work))
        x, module = make(8, 8), nn.Identity()
        # These come several in a row, in a network, too.
        spent["view"] = timed(lambda: [x.transpose(0, 1) for _ in range(4)], between) / 4
        spent["module"] = timed(lambda: [module(x) for _ in range(4)], between) / 4
    level = float(np.median(beside))
    curves = {family: Curve(level * spent[family]) for family in ("view", "module")}
    for family, (axes, _) in families.items():
        overhead = spent[family]
        rates = np.array([work / max(whole - overhead, 0.05 * whole) / level for whole, work in points[family]])
        curves[family] = Curve(level * overhead, axes, rates.reshape([len(axis) for axis in axes]))
    return Ceilings(device, dtype, torch.get_num_threads(), curves, level)


def best(parts: Sequence[Ceilings]) -> Ceilings:
    """Take the shortest times of several measurements of one device, format and thread count, point by point.

    They are what each is when the yardstick takes as long as in the quickest measurement.
    """
    curves, least = {}, min(part.yardstick for part in parts)
    parts = [part.at(least) for part in parts]
    for family, curve in parts[0].curves.items():
        same = [part.curves[family] for part in parts]
        rates = None if curve.rates is None else np.max([other.rates for other in same], axis=0)
        curves[family] = Curve(min(other.overhead for other in same), curve.axes, rates)
    return replace(parts[0], curves=curves)


def _in_yardsticks(
    call: Callable[[], object], between: Callable[[], object] | None, *, budget: float, device: str, beside: list[float]
) -> float:
    """Median time of one call, as a multiple of the yardstick's around it, which is added to `beside`, seconds.

    A time is the median of calls that each follow `between`, or on a GPU (None) that of a block of calls, queued.
    """
    once = functools.partial(_alone, call, between) if between else functools.partial(_block, call)
    once(1)
    calls = max(1, math.ceil(0.1 * budget / max(_elapsed(lambda: once(1)), 1e-6)))
    ratios, end = [], time.perf_counter() + budget
    while len(ratios) < 5 or time.perf_counter() < end:
        spent, took = around(lambda: once(calls), device)
        ratios.append(spent / took)
        beside.append(took)
    return float(np.median(ratios))


def _elapsed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _alone(call: Callable[[], object], between: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(calls):
        between()
        times.append(_elapsed(call))
    return float(np.median(times))


def _block(call: Callable[[], object], calls: int) -> float:
    def queued() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return _elapsed(queued) / calls


def _others(make: Callable[..., Tensor]) -> Callable[[], object]:
    """Return a few small operations in a row: what precedes an operation in a network is not itself."""
    x, weight, back, gain = make(64, 128), make(512, 128), make(128, 512), make(128)

    def between() -> Tensor:
        y = F.linear(F.gelu(F.linear(x, weight)), back) + x
        y = F.layer_norm(y, (128,), gain).t().contiguous().softmax(-1)
        return torch.bmm(y.view(4, 32, 64), y.view(4, 32, 64).mT).sum(-1).exp()

    return between


def _with_cold_caches(between: Callable[[], object], result: Tensor) -> Callable[[], object]:
    """Return what precedes a call of this result in a network: `between`, and writes that push it out of the cache."""
    elements = max(8 * result.numel(), MODEL_BYTES // result.element_size())  # what a layer writes, all weights
    rest = torch.zeros(min(elements, 2**24), dtype=result.dtype)

    def layer() -> None:
        between()
        rest.add_(1)

    return layer


def _families(make: Callable[..., Tensor], device: str) -> dict[str, tuple[tuple, Callable]]:
    """The plain operations: axes of sizes, and a builder that takes one size an axis and returns (call, work)."""

    def mm(m: int, n: int, k: int) -> tuple:
        x, weight, bias = make(m, k), make(n, k), make(n)
        return lambda: F.linear(x, weight, bias), m * n * k

    def bmm(m: int, n: int, k: int) -> tuple:
        x, y = make(8, m, k), make(8, k, n)
        return lambda: torch.bmm(x, y), 8 * m * n * k

    def attention(n: int, m: int, d: int) -> tuple:
        q, k, v = make(1, 8, n, d), make(1, 8, m, d), make(1, 8, m, d)
        return lambda: F.scaled_dot_product_attention(q, k, v), 16 * n * m * d

    def convolution(positions: int, taps: int, n: int) -> tuple:
        patch, side = max(1, math.isqrt(taps // 3)), math.isqrt(positions)
        x, weight = make(1, 3, side * patch, side * patch), make(n, 3, patch, patch)
        return lambda: F.conv2d(x, weight, stride=patch), side**2 * n * weight[0].numel()

    def depthwise(elements: int, taps: int) -> tuple:
        side, kernel = max(1, math.isqrt(elements // WIDTH)), math.isqrt(taps)
        x, weight = make(1, WIDTH, side, side), make(WIDTH, 1, kernel, kernel)
        return lambda: F.conv2d(x, weight, padding=kernel // 2, groups=WIDTH), x.numel() * taps

    def pool(elements: int) -> tuple:  # elements read: nine an output
        side = max(1, math.isqrt(elements // WIDTH // 9))
        x = make(1, WIDTH, side, side).contiguous(memory_format=torch.channels_last)  # as tokens lie in memory
        return lambda: F.avg_pool2d(x, 3, 1, 1), 9 * x.numel()

    def transpose(elements: int) -> tuple:
        x = make(1, max(1, elements // WIDTH), 4, WIDTH // 4).transpose(1, 2)  # heads (B, h, N, d_h) of tokens
        return lambda: x.contiguous(), x.numel()

    def rows(function: Callable[[Tensor], Tensor]) -> Callable:
        def build(elements: int) -> tuple:
            x = make(max(1, elements // WIDTH), WIDTH)
            return lambda: function(x), x.numel()

        return build

    gain, shift = make(WIDTH), make(WIDTH)
    elementwise = {
        "add": lambda x: x + x,
        "gelu": F.gelu,
        "exp": torch.exp,
        "softmax": lambda x: torch.softmax(x, -1),
        "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), gain, shift),
        "sum": lambda x: x.sum(-1),
        "copy": lambda x: x.clone(),
    }
    products = {
        "mm": (((16, 64, 256, 1024, 4096), (64, 128, 512, 2048), (64, 128, 512, 2048)), mm),
        "bmm": (((8, 32, 128, 512), (8, 32, 128, 512), (8, 32, 128, 512)), bmm),
        "attention": (((16, 64, 256, 1024), (4, 16, 64, 256, 1024), (32, 64)), attention),
        "convolution": (((64, 1024), (192, 768), (128, 384)), convolution),
        "depthwise": (((WIDTH * 64, WIDTH * 1024), (9, 25)), depthwise),
    }
    singles = {"pool": pool, "transpose": transpose} | {name: rows(f) for name, f in elementwise.items()}
    elements = ELEMENTS + (() if device == "cpu" else MORE_ELEMENTS)
    return products | {name: ((elements,), build) for name, build in singles.items()}
