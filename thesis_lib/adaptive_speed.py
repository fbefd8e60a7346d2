"""How much faster removing tokens is than masking them: engines timed in turn, at any share of tokens kept."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thesis_lib.adaptive_tokens import AdaptiveViT
from thesis_lib.efficiency import median_row, rotated
from thesis_lib.token_removal import TokenRemoval, dense_macs, executed_macs
from thesis_lib.yardstick import around

BESIDE = 0.1  # of a run's time goes to the yardstick before it, and as much after it
ENGINES = ("dense", "masked", "removing")


def beta_for_tokens(model: AdaptiveViT, images: Tensor, share: float, *, steps: int = 14) -> float:
    """Find by bisection the beta at which the blocks compute `share` of all tokens of normalised images (B, 3, H, W).

    Raises ValueError for a share that halting cannot reach: all tokens pass the first block, none needs more than all.
    """
    depth, halting = len(model.vit.blocks), model.halting
    if not 1 / depth < share < 1:
        raise ValueError(f"share={share} must lie between 1/{depth} (all halt in the first block) and 1")
    low, high = -40.0 - 40 * halting.gamma, 40.0 + 40 * halting.gamma
    try:
        for _ in range(steps):
            middle = (low + high) / 2
            model.halting = replace(halting, beta=middle)
            low, high = (middle, high) if tokens_kept(model, images) > share else (low, middle)
    finally:
        model.halting = halting
    return middle


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device | str,
    seconds: float = 60.0,
) -> dict:
    """Time tasks in turn, each round starting with the next one: {name: seconds of its runs, float64 (rounds,)}.

    device: where the tasks run, and the yardstick around each run (`yardstick.around`), the longer the longer the run.
    Times are brought to moments at which it takes what it took in the median of all. One run of each before does not
    count. Stops after `rounds`, or once `seconds` have gone by and three are done.
    """
    device = torch.device(device)

    def elapsed(task: Callable[[], object]) -> float:
        start = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    found = {name: [around(partial(elapsed, task), device)] for name, task in tasks.items()}
    end = time.perf_counter() + seconds
    for i, names in enumerate(rotated(list(tasks), rounds)):
        if i >= 3 and time.perf_counter() > end:
            break
        for name in names:
            spent, beside = found[name][-1]
            repeats = max(3, math.ceil(BESIDE * spent / beside))
            found[name].append(around(partial(elapsed, tasks[name]), device, repeats))
    pairs = {name: np.array(runs[1:]).reshape(-1, 2).T for name, runs in found.items()}
    usual = np.median(np.concatenate([beside for _, beside in pairs.values()]))
    return {name: spent * usual / beside for name, (spent, beside) in pairs.items()}


def tokens_kept(model: AdaptiveViT, images: Tensor) -> float:
    """Return the share of all tokens that the blocks compute for normalised images (B, 3, H, W)."""
    count = model.patch_embed.num_patches + model.vit.num_prefix_tokens
    return TokenRemoval(model).run(images).tokens.double().mean().item() / count


def passes(models: Mapping[str, Callable[[Tensor], object]], images: Tensor) -> dict[str, Callable[[], object]]:
    """Return forward passes without gradients, ready for `interleaved`; modules must be in eval mode."""
    return {name: torch.inference_mode()(partial(model, images)) for name, model in models.items()}


def engines(dense: nn.Module, model: AdaptiveViT, images: Tensor) -> dict[str, Callable[[], object]]:
    """Return the forward passes to compare: a plain ViT, and the adaptive model masked and removing tokens.

    Both models move to the images' device.
    """
    forms = (dense.to(images.device).eval(), model.to(images.device).eval(), TokenRemoval(model))
    return passes(dict(zip(ENGINES, forms, strict=True)), images)


def time_rows(times: Mapping[str, np.ndarray], *, batch: int, column: str, **protocol: Any) -> list[dict]:
    """Describe what `interleaved` gives: one row a task, metric batch_time (ms, median and 95 % interval of it).

    column: where the tasks' names go, "engine" or "mixer".
    """
    kept = ("value", "low", "high", "n")
    rows = []
    for name, seconds in times.items():
        row = median_row("latency", 1e3 * seconds)
        rows.append({key: row[key] for key in kept} | {"metric": "batch_time", "unit": "ms", column: name})
    return [row | {"batch": batch} | protocol for row in rows]


def engine_rows(
    dense: nn.Module,
    models: Mapping[str, AdaptiveViT],
    images: Tensor,
    *,
    batch_sizes: Iterable[int],
    rounds: int = 7,
    seconds: float = 60.0,
    **protocol: Any,
) -> list[dict]:
    """Time the forms of all models in turn on the first images (n, 3, H, W, normalised) at each batch size.

    The plain ViT runs once a round; its row stands beside the two of each model.
    """
    rows = []
    for batch in batch_sizes:
        if batch > len(images):
            raise ValueError(f"a batch of {batch} needs as many images; there are {len(images)}")
        tasks: dict[Any, Callable[[], object]] = {}
        for name, model in models.items():
            first, *own = engines(dense, model, images[:batch]).items()
            tasks |= dict([first]) | {(name, engine): task for engine, task in own}
        times = interleaved(tasks, rounds=rounds, seconds=seconds, device=images.device)
        for name in models:
            found = {engine: times.get((name, engine), times["dense"]) for engine in ENGINES}
            rows += time_rows(found, batch=batch, column="engine", model=name, **protocol)
    return rows


def speedup_rows(
    dense: nn.Module,
    model: AdaptiveViT,
    images: Tensor,
    *,
    shares: Sequence[float],
    rounds: int = 7,
    seconds: float = 60.0,
    **protocol: Any,
) -> list[dict]:
    """Time the engines on one batch (B, 3, H, W) with beta moved so that about these shares of tokens are kept.

    Rows: metric speedup, of the removing engine over the other two, the median over rounds of the ratio of neighbouring
    runs, with the range that holds its middle half (low, high); and over the dense model in multiply-adds (engine
    "ideal"). `share`: tokens really kept. `beta`: the one that did it.
    """
    rows, trained, limits = [], model.halting, {"rounds": rounds, "seconds": seconds, "device": images.device}
    try:
        for wanted in shares:
            model.halting = replace(trained, beta=beta_for_tokens(model.to(images.device), images, wanted))
            tokens = TokenRemoval(model).run(images).tokens
            times = interleaved(engines(dense, model, images), **limits)
            common = {"metric": "speedup", "unit": "1", "batch": len(images), "beta": model.halting.beta}
            common |= {"share": tokens_kept(model, images)} | protocol
            for name in ENGINES[:2]:
                ratio = times[name] / times["removing"]
                low, high = np.quantile(ratio, [0.25, 0.75])
                found = {"value": float(np.median(ratio)), "low": low, "high": high, "n": len(ratio)}
                rows.append(common | found | {"engine": name})
            ideal = len(images) * dense_macs(model.vit) / executed_macs(model.vit, tokens, step=1)
            rows.append(common | {"value": ideal, "n": len(images), "engine": "ideal"})
    finally:
        model.halting = trained
    return rows
