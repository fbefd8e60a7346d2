"""What a model costs on a machine: latency, throughput, peak memory, beside what closed_form.py says it should.

`python -m thesis_lib.efficiency --backbone demo --mixer pool --image-size 128 --batch 1 8` measures one configuration.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop on stderr otherwise

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn
from torch.profiler import ProfilerActivity, profile

from thesis_lib import attention, backbone
from thesis_lib.closed_form import activated_macs, count_macs, model_cost

UNITS = {
    "macs": "MAC",
    "macs_counted": "MAC",
    "macs_activated": "MAC",
    "elementwise": "1",
    "params": "1",
    "latency": "ms",
    "throughput": "image/s",
    "peak_memory": "MiB",
}
KEYS = ["backbone", "mixer", "image_size", "tokens", "dtype", "device", "batch", "metric"]


def time_forward(
    model: nn.Module, x: torch.Tensor, *, runs: int = 50, warmup: int = 10, seconds: float = 10.0
) -> np.ndarray:
    """Time forward passes one by one by the wall clock, seconds; on a GPU each is waited for, so launches count.

    Stops after `runs`, or once `seconds` have gone by and three are done. Warm-up passes, of which there may be fewer
    where they outlast `seconds`, are not timed.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if x.is_cuda else lambda: None
    times: list[float] = []
    with torch.inference_mode():
        end = time.perf_counter() + seconds
        while warmup and time.perf_counter() < end:
            model(x)
            wait()
            warmup -= 1
        end = time.perf_counter() + seconds
        while len(times) < runs and (len(times) < 3 or time.perf_counter() < end):
            start = time.perf_counter()
            model(x)
            wait()
            times.append(time.perf_counter() - start)
    return np.array(times)


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


def latency(model: nn.Module, x: torch.Tensor, **timing) -> dict:
    """Measure the time of one forward pass, ms; `timing` as in `time_forward`."""
    return median_row("latency", 1e3 * time_forward(model, x, **timing))


def throughput(model: nn.Module, x: torch.Tensor, **timing) -> dict:
    """Measure images per second at the batch of `x`; `timing` as in `time_forward`."""
    return median_row("throughput", len(x) / time_forward(model, x, **timing))


def peak_memory(model: nn.Module, x: torch.Tensor) -> tuple[dict, str | None]:
    """Measure the most bytes a forward pass holds beyond weights and input, MiB, and name the attention kernel it ran.

    A GPU's caching allocator knows its own peak. On a CPU every allocation and release that torch makes is recorded and
    summed in order of time: exact to the byte and repeatable, but without the scratch of oneDNN and MKL.
    The kernel is "flash", "efficient", "cudnn", "math" or None where the model never calls SDPA.
    """
    with torch.inference_mode():
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            model(x)
            held = torch.cuda.max_memory_allocated(x.device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            model(x)
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    if not x.is_cuda:
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        held = int(np.cumsum(changes, dtype=np.int64).max(initial=0))
    called = " ".join(event.name() for event in events if "_scaled_dot_product_" in event.name())
    kernel = next((name for name in ("flash", "efficient", "cudnn", "math") if name in called), None)
    return {"metric": "peak_memory", "value": held / 2**20, "unit": "MiB", "n": 1}, kernel


def refusal(error: Exception) -> str | None:
    """Return the note for an error that is a finding (out of memory, no kernel for a number format), else None."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return "out of memory"
    return text if "not implemented for" in text else None


def missing(metrics: Iterable[str], note: str) -> list[dict]:
    """Make the rows of metrics that could not be measured: null values and a note that says why."""
    return [{"metric": metric, "value": None, "unit": UNITS[metric], "n": 0, "note": note} for metric in metrics]


def measure(
    name: str,
    mixer: str = "mha",
    image_size: int | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    dtype: str = "float32",
    device: str = "cpu",
    runs: int = 50,
    warmup: int = 10,
    seconds: float = 10.0,
    threads: int | None = None,
    layers: Sequence[int] | None = None,
    options: dict | None = None,
    seed: int = 0,
) -> list[dict]:
    """Measure one configuration with random weights: its costs, then time and memory at each batch size.

    A grid that is not served, and what this machine cannot do (see `refusal`), become rows without a value and with a
    note; larger batches are then skipped.
    Raises ValueError for an unknown backbone, mixer or dtype.
    """
    attention.get(mixer)
    with torch.device("meta"):
        backbone.create(name, pretrained=False)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    common = {
        "backbone": name,
        "mixer": mixer,
        "image_size": image_size,
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "note": None,
    }
    try:
        model = backbone.create(name, mixer, layers=layers, pretrained=False, img_size=image_size, **(options or {}))
    except ValueError as error:  # the names are right, so it is a grid that the patches or the mixer do not serve
        return [common | row for row in missing(UNITS, str(error))]
    size = model.patch_embed.img_size
    common |= {"image_size": size[0], "tokens": model.patch_embed.num_patches + model.num_prefix_tokens}
    cost, counted = model_cost(model), count_macs(model, torch.rand(1, 3, *size))
    values = {"macs": cost.macs, "macs_counted": counted, "macs_activated": activated_macs(model)}
    values |= {"elementwise": cost.elementwise, "params": cost.params}
    rows = [{"metric": metric, "value": value, "unit": UNITS[metric], "n": 1} for metric, value in values.items()]
    for batch in sorted(batch_sizes):
        timed = {"batch": batch}
        try:
            model = model.to(device, kind)
            x = torch.rand(batch, 3, *size).to(device, kind)
            memory, timed["sdpa"] = peak_memory(model, x)
            times = time_forward(model, x, runs=runs, warmup=warmup, seconds=seconds)
        except Exception as error:
            if not (note := refusal(error)):
                raise
            metrics = ("latency", "throughput", "peak_memory") if batch == 1 else ("throughput", "peak_memory")
            rows += [timed | row for row in missing(metrics, note)]
            break
        found = [median_row("latency", 1e3 * times)] if batch == 1 else []
        rows += [timed | row for row in (*found, median_row("throughput", batch / times), memory)]
    return [common | row for row in rows]


def measure_apart(name: str, mixer: str, image_size: int | None = None, **settings) -> list[dict]:
    """Run `measure` in a process of its own, so that no configuration inherits another's caches, arenas or threads.

    The processes are forked from a server that has imported torch and done nothing else: a start costs milliseconds.
    A process that dies (the kernel's out-of-memory killer, say) leaves rows with a note.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, name, mixer, image_size, **settings).result()
    except BrokenProcessPool:
        common = {
            "backbone": name,
            "mixer": mixer,
            "image_size": image_size,
            **{key: settings[key] for key in ("dtype", "device") if key in settings},
        }
        return [common | row for row in missing(UNITS, "the process died: most likely out of memory")]


def rotated(items: Sequence, rounds: int) -> list[list]:
    """Return one order of the items for each round, starting one later every time, so that none always runs first."""
    return [[items[(start + i) % len(items)] for i in range(len(items))] for start in range(rounds)]


def pool_rounds(rows: Iterable[dict]) -> pd.DataFrame:
    """Merge the rounds of each configuration: samples are pooled and described anew, the rest is kept once."""
    merged: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row.get(column) for column in KEYS)
        kept = merged.setdefault(key, row)
        if kept is not row and "samples" in row:
            merged[key] = row | median_row(row["metric"], [*kept.get("samples", []), *row["samples"]])
    return pd.DataFrame(merged.values()).drop(columns="samples", errors="ignore")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one configuration in this process and print its rows as JSON, or write them to --output."""
    parser = argparse.ArgumentParser(prog="python -m thesis_lib.efficiency", description=main.__doc__)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--mixer", default="mha")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of one series of runs")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, nargs="+", help="layers that get the mixer (default: all)")
    parser.add_argument("--options", type=json.loads, default={}, help='mixer options as JSON, {"ratio": 2}')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="file to write; default: print")
    settings = vars(parser.parse_args(arguments))
    output = settings.pop("output")
    rows = measure(settings.pop("backbone"), batch_sizes=settings.pop("batch"), **settings)
    text = json.dumps([{key: value for key, value in row.items() if key != "samples"} for row in rows], indent=1)
    if output:
        with open(output, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
