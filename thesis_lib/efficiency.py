"""What a model costs on a machine: latency, throughput, memory, training, beside what closed_form.py says it should.

`python -m thesis_lib.efficiency --backbone demo --mixer pool --image-size 128 --batch 1 8` measures one configuration.
The instruments are timing.py's; efficiency_grid.py drives a grid of configurations.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer

from thesis_lib import attention, backbone, class_token, cost_model
from thesis_lib.closed_form import activated_macs, count_macs, model_cost
from thesis_lib.processes import apart
from thesis_lib.timing import (
    BACKENDS,
    UNITS,
    compiled,
    energy,
    latency,
    median_row,
    missing,
    peak_memory,
    pinned,
    refusal,
    row,
    throughput,
    time_beside,
    time_forward,
    time_split,
    training_rows,
)

__all__ = ["UNITS", "latency", "measure", "measure_apart", "median_row", "missing", "peak_memory"]
__all__ += ["refusal", "rotated", "throughput", "time_forward"]

MODES = ("eager", "compiled")
UNSERVED = ("macs", "params", "latency", "throughput", "peak_memory")  # the rows of a configuration that never ran
LARGEST_BATCH, RISE = 4096, 1.03  # the search for the best batch ends there, or where twice the batch gains less


def measure(
    name: str,
    mixer: str = "mha",
    image_size: int | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    best_batch: bool = False,
    train_batch: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    mode: str = "eager",
    sdpa: str | None = None,
    complete: bool = True,
    threads: int | None = None,
    layers: Sequence[int] | None = None,
    options: dict | None = None,
    seed: int = 0,
    **timing: Any,
) -> list[dict]:
    """Measure one configuration with random weights: its costs, then time and memory at each batch size.

    best_batch: go on from the largest batch size, twice as large each time, while the throughput rises by 3 %.
    train_batch: batch of a training step, 0 for none. mode: "eager" or "compiled". sdpa: the one attention kernel that
    may run, of BACKENDS. complete: False leaves out what one visit is enough for (counts, memory, profile, training).
    timing: `runs`, `warmup` and `seconds` of `time_forward`. A grid that is not served, and
    what this machine cannot do (see `refusal`), become rows without a value and with a note; larger batches are then
    skipped.
    Raises ValueError for an unknown backbone, mixer, dtype, mode or kernel and for a device that is not here.
    """
    attention.get(mixer)
    with torch.device("meta"):
        backbone.create(name, pretrained=False)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    if mode not in MODES or sdpa not in (None, *BACKENDS):
        raise ValueError(f"mode={mode!r}, sdpa={sdpa!r}: modes are {', '.join(MODES)}, kernels {', '.join(BACKENDS)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise ValueError(f"no device {device!r} here: {error}") from error
    torch.backends.cudnn.allow_tf32 = False  # float32 means that, in convolutions as in products
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    common = {"backbone": name, "mixer": mixer, "image_size": image_size, "dtype": dtype, "device": device}
    common |= {"mode": mode, "sdpa_pinned": sdpa, "threads": torch.get_num_threads(), "seed": seed, "note": None}
    try:
        model = backbone.create(name, mixer, layers=layers, pretrained=False, img_size=image_size, **(options or {}))
    except ValueError as error:  # the names are right, so it is a grid that the patches or the mixer do not serve
        return [common | gap for gap in missing(UNSERVED, str(error))]
    size = model.patch_embed.img_size
    common |= {"image_size": size[0], "tokens": model.patch_embed.num_patches + model.num_prefix_tokens}
    rows = exact_rows(model, dtype, fused=sdpa != "math") if complete else []
    pending, best = sorted(batch_sizes), 0.0
    with pinned(sdpa):
        while pending:
            batch = pending.pop(0)
            metrics = ("latency", "throughput", "peak_memory") if batch == 1 else ("throughput", "peak_memory")
            found = _attempt(metrics, _at_batch, model, batch, kind, device, mode, complete, timing)
            rows += found
            rate = next((r["value"] for r in found if r["metric"] == "throughput"), None)
            if rate is None:
                break
            if best_batch and not pending and rate > RISE * best and 2 * batch <= LARGEST_BATCH:
                pending.append(2 * batch)
            best = max(best, rate)
        if train_batch and complete and mode == "eager":
            rows += _attempt(("training_step", "training_memory"), _train, model, train_batch, kind, device, timing)
    return [common | found for found in rows]


def exact_rows(model: VisionTransformer, dtype: str = "float32", *, fused: bool = True) -> list[dict]:
    """Return what one image costs on any machine: operations in closed form, counted and recorded, parameters.

    `macs_cls` is what a metric executes that reads the class token alone (class_token.py), where that can be had.
    """
    cost, size = model_cost(model), model.patch_embed.img_size
    recorded = cost_model.totals(cost_model.record(model, 1, size, dtype=dtype, fused=fused))
    values = {"macs": cost.macs, "macs_counted": count_macs(model, torch.rand(1, 3, *size))}
    values |= {"macs_activated": activated_macs(model), "elementwise": cost.elementwise, "params": cost.params}
    values |= {"bytes": recorded["bytes"], "launches": recorded["launches"]}
    if class_token.possible(model):
        values["macs_cls"] = class_token.model_cost(model).macs
    return [row(metric, value) for metric, value in values.items()]


def _attempt(
    metrics: Iterable[str], measuring: Callable[..., list[dict]], model: VisionTransformer, batch: int, *args: Any
) -> list[dict]:
    """Measure, or say in rows without values why that could not be."""
    try:
        return measuring(model, batch, *args)
    except Exception as error:
        if not (note := refusal(error)):
            raise
        return [{"batch": batch} | gap for gap in missing(metrics, note)]
    finally:
        torch.cuda.empty_cache()  # nothing where CUDA is not in use


def _at_batch(
    model: VisionTransformer, batch: int, kind: torch.dtype, device: str, mode: str, complete: bool, timing: dict
) -> list[dict]:
    """Measure passes at one batch size."""
    model = model.to(device, kind)
    x = torch.rand(batch, 3, *model.patch_embed.img_size).to(device, kind)
    function, rows, common = model, [], {"batch": batch}
    if mode == "compiled":
        function, first = compiled(model, x)
        rows.append(first)
    if complete:
        memory, common["sdpa"] = peak_memory(function, x)
        rows.append(memory)
    times, beside = time_beside(function, x, **timing)
    rows.append(median_row("throughput", batch / times) | beside)
    if batch == 1:
        rows.append(median_row("latency", 1e3 * times) | beside)
    if batch == 1 and mode == "eager" and class_token.applies(model):

        def alone(model: VisionTransformer, batch: int) -> list[dict]:  # a kernel may refuse its single query
            times, beside = time_beside(functools.partial(class_token.last_class_token, model), x, **timing)
            return [median_row("latency_cls", 1e3 * times) | beside]

        rows += _attempt(("latency_cls",), alone, model, batch)
    if complete:
        rows += time_split(function, x) if mode == "eager" and batch == 1 else []
        rows += energy(function, x) if x.is_cuda else []
    return [common | found for found in rows]


def _train(model: VisionTransformer, batch: int, kind: torch.dtype, device: str, timing: dict) -> list[dict]:
    x = torch.rand(batch, 3, *model.patch_embed.img_size).to(device, kind)
    return [{"batch": batch} | found for found in training_rows(model.to(device, kind), x, **timing)]


def measure_apart(name: str, mixer: str, image_size: int | None = None, **settings) -> list[dict]:
    """Run `measure` in a process of its own (see `processes.apart`).

    A process that dies (the kernel's out-of-memory killer, say) leaves rows with a note.
    """
    try:
        return apart(measure, name, mixer, image_size, **settings)
    except BrokenProcessPool:
        common = {"backbone": name, "mixer": mixer, "image_size": image_size, "mode": settings.get("mode", "eager")}
        common |= {key: settings[key] for key in ("dtype", "device") if key in settings}
        return [common | gap for gap in missing(UNSERVED, "the process died: most likely out of memory")]


def rotated(items: Sequence, rounds: int) -> list[list]:
    """Return one order of the items for each round, starting one later every time, so that none always runs first."""
    return [[items[(start + i) % len(items)] for i in range(len(items))] for start in range(rounds)]


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one configuration in this process and print its rows as JSON, or write them to --output."""
    parser = argparse.ArgumentParser(prog="python -m thesis_lib.efficiency", description=main.__doc__)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--mixer", default="mha")
    parser.add_argument("--image-size", type=_count)
    parser.add_argument("--batch", type=_count, nargs="+", default=[1], help="batch sizes")
    parser.add_argument("--best-batch", action="store_true", help="double the batch while the throughput rises")
    parser.add_argument("--train-batch", type=_count, default=0, help="batch of a training step (default: none)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", default="eager", choices=MODES)
    parser.add_argument("--sdpa", choices=BACKENDS, help="the one attention kernel that may run (default: any)")
    parser.add_argument("--runs", type=_count, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of one series of runs")
    parser.add_argument("--threads", type=_count)
    parser.add_argument("--layers", type=int, nargs="+", help="layers that get the mixer (default: all)")
    parser.add_argument("--options", type=json.loads, default={}, help='mixer options as JSON, {"ratio": 2}')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="file to write; default: print")
    settings = vars(parser.parse_args(arguments))
    try:
        if output := settings.pop("output"):
            open(output, "a").close()  # that it can be written is known before minutes are spent
        rows = measure(settings.pop("backbone"), batch_sizes=settings.pop("batch"), **settings)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    text = json.dumps(
        [{key: found[key] for key in found if key not in ("samples", "beside")} for found in rows], indent=1
    )
    Path(output).write_text(text + "\n", encoding="utf-8") if output else print(text)


if __name__ == "__main__":
    main()
