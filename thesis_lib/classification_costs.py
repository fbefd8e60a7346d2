"""What a classifier costs: operations, memory in use and in training, time, and how they grow with the image."""

import copy
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib import efficiency
from thesis_lib.adaptive_speed import interleaved, passes
from thesis_lib.classifier import ViTForImageClassification
from thesis_lib.closed_form import count_macs, model_cost
from thesis_lib.rounds import pool_rounds


def cost_rows(
    model: ViTForImageClassification, *, device: str = "cpu", batch_size: int = 64, runs: int = 30, seconds: float = 5.0
) -> list[dict]:
    """Measure what a model costs: rows of parameters, MACs in closed form and counted, file size, memory and speed.

    Memory is the most held beyond weights and images: "peak_memory" to classify one image, "training_memory" in one
    step of AdamW. Speed is the throughput at `batch_size`; `latency_rows` has that of one image.
    """
    model = copy.deepcopy(model).to(device).eval()
    shape = (model.config["num_channels"], model.config["image_size"], model.config["image_size"])
    one, many = torch.rand(1, *shape, device=device), torch.rand(batch_size, *shape, device=device)
    cost, bytes_ = model_cost(model.vit), sum(t.numel() * t.element_size() for t in model.state_dict().values())
    exact = {"params": (cost.params, "1"), "macs": (cost.macs, "MAC"), "macs_counted": (count_macs(model, one), "MAC")}
    rows = [{"metric": metric, "value": value, "unit": unit, "n": 1} for metric, (value, unit) in exact.items()]
    rows.append({"metric": "weights_size", "value": bytes_ / 1e6, "unit": "MB", "n": 1})
    rows.append(efficiency.peak_memory(model, one)[0] | {"batch": 1})
    rows.append(efficiency.throughput(model, many, runs=runs, warmup=2, seconds=seconds) | {"batch": batch_size})
    held, _ = efficiency.peak_memory(_training_step(model), many)
    rows.append(held | {"metric": "training_memory", "batch": batch_size})
    return [{key: value for key, value in row.items() if key != "samples"} for row in rows]


def latency_rows(
    models: Mapping[Hashable, ViTForImageClassification],
    *,
    device: str = "cpu",
    runs: int = 30,
    seconds: float = 5.0,
) -> dict[Hashable, dict]:
    """Time one image of each model, all in turn: {key: row}, the median with its interval, `mean` and `std` beside it.

    runs: of each model at most. seconds: for each model.
    """
    tasks = {}
    for key, model in models.items():
        side = model.config["image_size"]
        one = torch.rand(1, model.config["num_channels"], side, side, device=device)
        tasks |= passes({key: copy.deepcopy(model).to(device).eval()}, one)
    times = interleaved(tasks, rounds=runs, seconds=seconds * len(tasks), device=device)
    rows = {key: _with_spread(efficiency.median_row("latency", 1e3 * spent)) for key, spent in times.items()}
    return {key: {name: row[name] for name in row if name != "samples"} | {"batch": 1} for key, row in rows.items()}


def _with_spread(row: dict) -> dict:
    return row | {"mean": float(np.mean(row["samples"])), "std": float(np.std(row["samples"]))}


def _training_step(model: nn.Module) -> Callable[[Tensor], None]:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step(x: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():  # `peak_memory` measures under inference mode
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()
            optimizer.step()

    return step


def scaling_rows(
    config: Mapping[str, Any],
    mixers: Mapping[str, Mapping[str, Any]],
    image_sizes: Sequence[int],
    *,
    timed: Collection[str] | None = None,
    device: str = "cpu",
    rounds: int = 3,
    runs: int = 12,
    seconds: float = 0.6,
) -> list[dict]:
    """Give MACs in closed form and measure latency and memory of one image, over image sizes, with random weights.

    mixers: configuration keys by mixer; timed: those that are measured as well, None for all. Each is timed in every
    round, for its share of `runs` and `seconds`, and the rounds are brought to like moments (`rounds.pool_rounds`).
    A size that a mixer cannot serve, or that this machine has no memory for, gives rows without a value and with a
    note.
    """
    rows, running, timing = [], [], {"runs": -(-runs // rounds), "warmup": 1, "seconds": seconds / rounds}
    for size, (name, keys) in ((size, item) for size in image_sizes for item in mixers.items()):
        tokens = (size // config["patch_size"]) ** 2
        common = {"mixer": name, "image_size": size, "tokens": tokens, "stage": "scaling"}
        try:
            with torch.random.fork_rng(devices=[]):
                model = ViTForImageClassification(dict(config) | dict(keys) | {"image_size": size}).eval().to(device)
            found = [{"metric": "macs", "value": model_cost(model.vit).macs, "unit": "MAC", "n": 1}]
            if timed is None or name in timed:
                x = torch.rand(1, config["num_channels"], size, size, device=device)
                found.append(efficiency.peak_memory(model, x)[0] | {"batch": 1})
                running.append((model, x, common | {"batch": 1}))
        except (ValueError, RuntimeError, MemoryError) as error:
            note = str(error) if isinstance(error, ValueError) else efficiency.refusal(error)
            if note is None:
                raise
            found = efficiency.missing(("macs", "latency", "peak_memory"), note)
        rows += [row | common for row in found]
    return rows + _latencies(running, rounds, timing)


def _latencies(running: list[tuple[nn.Module, Tensor, dict]], rounds: int, timing: Mapping[str, Any]) -> list[dict]:
    """Time models on their images in turn: a row each, with what is said about it."""
    found = []
    for model, x, about in running * rounds:
        times, beside = efficiency.time_beside(model, x, **timing)
        found.append(efficiency.median_row("latency", 1e3 * times) | beside | about)
    rows = map(_with_spread, pool_rounds(found).to_dict("records"))
    return [{name: row[name] for name in row if name not in ("samples", "note")} for row in rows]
