"""The instruments: time, memory, energy and what a pass spends its time on, of any model on a CPU or a GPU."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop on stderr otherwise

import numpy as np
import torch
from scipy import stats
from torch import Tensor, autograd, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from thesis_lib.cost_model import kind
from thesis_lib.yardstick import around

T = TypeVar("T")
UNITS = {
    "macs": "MAC",
    "macs_counted": "MAC",
    "macs_activated": "MAC",
    "macs_cls": "MAC",
    "elementwise": "1",
    "bytes": "B",
    "launches": "1",
    "params": "1",
    "latency": "ms",
    "latency_cls": "ms",
    "throughput": "image/s",
    "peak_memory": "MiB",
    "training_step": "ms",
    "training_memory": "MiB",
    "energy": "J",
    "compile_time": "s",
    "share_matmul": "1",
    "share_elementwise": "1",
    "share_copy": "1",
    "share_launches": "1",
    "kernels": "1",
}
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
REFUSED = ("not implemented for", "No available kernel", "No viable backend", "torch.compile refused")
REFUSED += ("cuDNN", "No valid execution plans")


def time_forward(model: Callable[[Tensor], object], x: Tensor, **timing) -> np.ndarray:
    """Time forward passes one by one, seconds: by the wall clock, on a GPU by events around a pass waited for.

    The GPU is idle when a pass starts, so the host's launches count there, too. timing: it stops after `runs` (50), or
    once `seconds` (10) have gone by and three are done; `warmup` passes (10) before, of which there may be fewer where
    they outlast `seconds`, are not timed.
    """
    return np.array(_passes(lambda: _once(model, x), **timing))


def time_beside(model: Callable[[Tensor], object], x: Tensor, **timing) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Time forward passes as `time_forward` does, and the yardstick around each of them: {"beside": ms}."""
    found = _passes(lambda: around(lambda: _once(model, x), x.device), **timing)
    times, beside = np.array(found).T
    return times, {"beside": (1e3 * beside).tolist()}


def _passes(once: Callable[[], T], *, runs: int = 50, warmup: int = 10, seconds: float = 10.0) -> list[T]:
    found: list[T] = []
    with torch.inference_mode():
        end = time.perf_counter() + seconds
        while warmup and time.perf_counter() < end:
            once()
            warmup -= 1
        end = time.perf_counter() + seconds
        while len(found) < runs and (len(found) < 3 or time.perf_counter() < end):
            found.append(once())
    return found


def _once(model: Callable[[Tensor], object], x: Tensor) -> float:
    return _by_events(model, x) if x.is_cuda else _by_clock(model, x)


def _by_clock(model: Callable[[Tensor], object], x: Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def _by_events(model: Callable[[Tensor], object], x: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(x.device)
    start.record()
    model(x)
    end.record()
    torch.cuda.synchronize(x.device)
    return start.elapsed_time(end) / 1e3


def median_row(metric: str, samples: Sequence[float] | np.ndarray) -> dict:
    """Describe samples by median, its 95 % percentile-bootstrap interval, p5 and p95; the samples stay in the row."""
    samples = np.asarray(samples, dtype=float)
    low = high = np.median(samples)
    if len(samples) > 1 and np.ptp(samples) > 0:
        low, high = stats.bootstrap(
            (samples,), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    p5, p95 = np.percentile(samples, [5, 95])
    return {
        "metric": metric,
        "value": float(np.median(samples)),
        "unit": UNITS[metric],
        "low": float(low),
        "high": float(high),
        "p5": float(p5),
        "p95": float(p95),
        "n": len(samples),
        "samples": samples.tolist(),
    }


def row(metric: str, value: float, n: int = 1) -> dict:
    """Make a row of one number, in the metric's unit."""
    return {"metric": metric, "value": value, "unit": UNITS[metric], "n": n}


def latency(model: nn.Module, x: Tensor, **timing) -> dict:
    """Measure the time of one forward pass, ms; `timing` as in `time_forward`."""
    return median_row("latency", 1e3 * time_forward(model, x, **timing))


def throughput(model: nn.Module, x: Tensor, **timing) -> dict:
    """Measure images per second at the batch of `x`; `timing` as in `time_forward`."""
    return median_row("throughput", len(x) / time_forward(model, x, **timing))


def peak_memory(model: Callable[[Tensor], object], x: Tensor) -> tuple[dict, str | None]:
    """Measure the most bytes a forward pass holds beyond weights and input, MiB, and name the attention kernel it ran.

    A GPU's caching allocator knows its own peak. On a CPU every allocation and release that torch makes is recorded and
    summed in order of time: exact to the byte and repeatable, but without the scratch of oneDNN and MKL.
    The kernel is "flash", "efficient", "cudnn", "math" or None where the model never calls SDPA.
    """
    with torch.inference_mode():
        if x.is_cuda:
            model(x)  # the first pass of a process takes workspaces that stay
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            model(x)
            held = torch.cuda.max_memory_allocated(x.device) - before
        with autograd.profiler.profile(profile_memory=True) as record:  # makes no tables, which take longer than a pass
            model(x)
    events = sorted(record.kineto_results.events(), key=lambda event: event.start_ns())
    if not x.is_cuda:
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        held = int(np.cumsum(changes, dtype=np.int64).max(initial=0))
    called = " ".join(event.name() for event in events if "_scaled_dot_product_" in event.name())
    kernel = next((name for name in BACKENDS if name != "math" and name in called), None)
    return row("peak_memory", held / 2**20), kernel or ("math" if "math" in called else None)


def time_split(model: Callable[[Tensor], object], x: Tensor, *, passes: int = 3) -> list[dict]:
    """Profile passes: the share of their operators' time in products, elementwise operations, copies and launches.

    On a CPU launches are views, wrappers and allocations, for an operator's own overhead cannot be told from its work;
    on a GPU time is that of kernels, and `kernels` says how many of them a pass starts.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * x.is_cuda
    with torch.inference_mode():
        model(x)
        with profile(activities=activities, acc_events=True) as record:
            for _ in range(passes):
                model(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
    spent = dict.fromkeys(("matmul", "elementwise", "copy", "launches"), 0.0)
    for event in record.key_averages():
        if event.key.startswith("aten::"):
            own = event.self_device_time_total if x.is_cuda else event.self_cpu_time_total
            spent[kind(event.key.removeprefix("aten::"))] += own
    whole = sum(spent.values())
    rows = [row(f"share_{name}", value / whole, passes) for name, value in spent.items() if whole]
    if x.is_cuda:
        device = torch.autograd.DeviceType.CUDA
        rows.append(row("kernels", sum(event.device_type == device for event in record.events()) / passes, passes))
    return rows


def training_rows(model: nn.Module, x: Tensor, **timing) -> list[dict]:
    """Measure one training step (forward, backward, AdamW) at the batch of `x`: ms, and MiB beyond weights and states.

    The loss is the mean square of the embedding, for what it is does not matter to its cost. The model is changed.
    """
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(x: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():  # the instruments work under inference mode
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()

    times, beside = time_beside(step, x, **timing)
    optimizer.zero_grad()  # what is freed under the profiler must have been allocated under it
    held = peak_memory(step, x)[0]
    optimizer.zero_grad()
    return [median_row("training_step", 1e3 * times) | beside, held | {"metric": "training_memory"}]


def energy(model: Callable[[Tensor], object], x: Tensor, *, seconds: float = 2.0) -> list[dict]:
    """Measure the energy of the whole GPU an image, J, over passes of `seconds`; no row without NVML or its counter."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(x.device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        before = read()
    except (RuntimeError, AttributeError, pynvml.NVMLError):
        return []
    passes, end = 0, time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end:
            model(x)
            torch.cuda.synchronize(x.device)
            passes += 1
    return [row("energy", (read() - before) / (passes * len(x)), passes)]


def compiled(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], object], dict]:
    """Compile a model for the shape of `x`, and return it with the seconds of its first pass as a row.

    Raises RuntimeError where torch.compile refuses; memory that is out stays that error.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers to outlive this process
    torch.compiler.reset()
    function, start = torch.compile(model, dynamic=False), time.perf_counter()
    try:
        with torch.inference_mode():
            function(x)
    except Exception as error:
        if refusal(error):
            raise
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RuntimeError(f"torch.compile refused: {first}") from error
    return function, row("compile_time", time.perf_counter() - start)


@contextlib.contextmanager
def pinned(backend: str | None) -> Iterator[None]:
    """Allow one kernel of softmax attention only, by its name in BACKENDS; None allows all."""
    with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
        yield


def refusal(error: Exception) -> str | None:
    """Return the note for an error that is a finding (out of memory, no kernel for what is asked), else None."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return "out of memory"
    return text if any(part in text for part in REFUSED) else None


def missing(metrics: Iterable[str], note: str) -> list[dict]:
    """Make the rows of metrics that could not be measured: null values and a note that says why."""
    return [{"metric": metric, "value": None, "unit": UNITS[metric], "n": 0, "note": note} for metric in metrics]
