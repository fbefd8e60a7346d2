"""What `training.fit` runs on: one process's share of an epoch under Accelerate, its devices and its random states."""

import math
import os
import pickle
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, find_batch_size, send_to_device
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from thesis_lib.checkpoint import Checkpoint, load_weights, weights
from thesis_lib.processes import side_by_side


class _Objective(nn.Module):
    """Model and loss as one module: all that the loss does with the model is in autocast and gradient averaging."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


class Trainer:
    """What lasts from epoch to epoch: model, optimizer, averaged weights, log rows, and the best weights so far."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        grad_clip: float | None,
        ema_decay: float | None,
        run: Checkpoint | None,
        bar: tqdm,
    ) -> None:
        self.accelerator, self.model, self.grad_clip, self.run, self.bar = accelerator, model, grad_clip, run, bar
        self.objective, self.optimizer = accelerator.prepare(_Objective(model, loss), optimizer)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.average = None if ema_decay is None else ModelEmaV3(model, decay=ema_decay)
        self.judged = model if self.average is None else self.average.module
        self.rows: list[dict] = []
        self.best: tuple[int, float] | None = None  # epoch, value
        self.best_weights: dict[str, Tensor] | None = None

    def restore(self, state: Mapping) -> None:
        """Go back to the end of the epoch that a checkpoint was written after."""
        stored = state["weights"]
        self.rows, self.best, self.best_weights = state["rows"], state["best"], stored.get("best")
        if "last" not in stored:  # what `finish` left is all that there will be
            self.run = None
            return
        load_weights(self.model, stored["last"])
        if self.average is not None:
            load_weights(self.average.module, stored["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def train(self, epoch: int, batches: Iterable[tuple[int, Any]], rates: Sequence[float]) -> dict:
        """Run one epoch of (index, batch); give its log row."""
        accelerator, optimizer = self.accelerator, self.optimizer
        patience = 1 if accelerator.device.type == "cpu" else 50  # reading a loss from a GPU waits for all its work
        total, images, unread = 0.0, 0, []
        self.model.train()
        start = time.perf_counter()
        for (index, batch), rate in zip(batches, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            # From memory that is not pinned a copy to Apple's GPU that is not waited for can read what is there later.
            early = accelerator.device.type == "cuda"
            value = self.objective(send_to_device(batch, accelerator.device, non_blocking=early))
            unread.append((index, value.detach(), find_batch_size(batch)))
            if len(unread) == patience:
                total, images = self._read(epoch, unread, total, images)
            optimizer.zero_grad()
            accelerator.backward(value)
            if self.grad_clip is not None:
                accelerator.clip_grad_norm_(self.trained, self.grad_clip)
            optimizer.step()
            if self.average is not None:
                self.average.update(self.model)
        if unread:
            total, images = self._read(epoch, unread, total, images)
        if accelerator.num_processes > 1:
            sums = torch.tensor([total, images], dtype=torch.float64, device=accelerator.device)
            total, images = accelerator.reduce(sums, "sum").tolist()
        if not all(p.isfinite().all() for p in self.trained):
            raise RuntimeError(f"the weights are not finite after epoch {epoch}; {self._last_good()}")
        seconds = time.perf_counter() - start
        row = {"epoch": epoch, "loss": total / images, "lr": rates[-1]}
        return row | {"seconds": seconds, "images_per_s": images / seconds}

    def _read(self, epoch: int, unread: list, total: float, images: int) -> tuple[float, int]:
        """Add the waiting losses, weighted by images, to the sums."""
        for index, value, size in unread:
            if not math.isfinite(value := float(value)):
                where = f"in epoch {epoch}, batch {index} (the first is 0)"
                raise RuntimeError(f"the loss is {value} {where}; {self._last_good()}")
            total, images = total + value * size, images + size
        self.bar.update(len(unread))
        self.bar.set_postfix(epoch=epoch, loss=f"{total / images:.4f}", refresh=False)
        unread.clear()
        return total, images

    def _last_good(self) -> str:
        if self.run is None or not self.rows:
            return "no checkpoint was written"
        return f"the last good checkpoint, of epoch {len(self.rows)}, is {self.run.folder}"

    def evaluate(self, evaluate: Callable, epoch: int, select: str | None) -> dict[str, float]:
        """Evaluate on the main process; give every process what was measured."""
        self.judged.eval()
        values = [None]
        if self.accelerator.is_main_process:
            with torch.no_grad(), self.accelerator.autocast():
                values = [dict(evaluate(self.judged, epoch))]
        (found,) = broadcast_object_list(values)
        if select is not None and select not in found:
            raise ValueError(
                f"evaluate gives {', '.join(found)}, not {select!r}: set `select` to one of them, or to None"
            )
        return {name: float(value) for name, value in found.items() if value is not None}

    def close_epoch(self, row: dict, select: str | None) -> None:
        """Take the row into the log, keep the best weights, write the checkpoint."""
        self.rows.append(row)
        if row.get(select, -math.inf) > (-math.inf if self.best is None else self.best[1]):  # a NaN is never the best
            self.best, self.best_weights = (row["epoch"], row[select]), weights(self.judged)
        if self.run is not None and self.accelerator.is_main_process:
            stored = {"last": weights(self.model)}
            if self.average is not None:
                stored["average"] = weights(self.average.module)
            if self.best_weights is not None:
                stored["best"] = self.best_weights
            scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            state = {"epoch": row["epoch"], "rows": self.rows, "best": self.best}
            self.run.save({**state, "optimizer": self.optimizer.state_dict(), "scaler": scaler}, stored)
        self.accelerator.wait_for_everyone()

    def finish(self, *, final: bool) -> None:
        """Put the best weights into the model; the last where no epoch was judged.

        final: the run cannot go on, and its checkpoint keeps these weights and the log alone: a quarter of its bytes.
        """
        chosen = weights(self.judged) if self.best_weights is None else self.best_weights
        if final and self.run is not None and self.accelerator.is_main_process:
            self.run.save({"epoch": len(self.rows), "rows": self.rows, "best": self.best}, {"best": chosen})
        self.accelerator.wait_for_everyone()
        load_weights(self.model, chosen)


def share(batches: Iterable, rank: int, world: int) -> Iterator[tuple[int, Any]]:
    """Yield (index, batch) for one process of `world`: every world-th batch, equally many for each."""
    own = range(rank, len(batches) // world * world, world)
    if isinstance(batches, Sequence):
        yield from ((index, batches[index]) for index in own)
    else:
        yield from zip(own, islice(batches, rank, None, world), strict=False)


def accelerator_on(device: str | None, mixed_precision: str) -> Accelerator:
    """Make an Accelerator for this device, whatever one the process had before.

    Raises ValueError for a device that is not there, or one GPU by its number under torchrun, which gives each process
    its own.
    """
    _forget()
    wanted = torch.device(device or "cpu")
    if wanted.type == "cuda" and wanted.index is not None:
        if "WORLD_SIZE" in os.environ:
            raise ValueError(f"device {device!r}: torchrun gives every process a GPU of its own, so say 'cuda'")
        torch.cuda.set_device(wanted)  # which is the one that Accelerate takes
    # Without cpu=True Accelerate ignores torchrun on a machine without a GPU: each process would train on its own.
    # Processes wait for the slowest, which may be hours behind, or for what the main one writes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=_on_cpu(device), mixed_precision=mixed_precision, kwargs_handlers=[patience])
    if device is not None and accelerator.device.type != torch.device(device).type:
        raise ValueError(f"device {device!r} was asked for, but there is only {accelerator.device.type!r}")
    return accelerator


def free(accelerator: Accelerator) -> None:
    """Let go of what the accelerator prepared, and of its settings."""
    if accelerator.device.type != "cpu":  # its garbage collection takes longer than a small run's epoch
        accelerator.free_memory()
    _forget()


def _forget() -> None:
    # Accelerate keeps the first Accelerator's device and precision as long as the process lives; a notebook fits often.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _on_cpu(device: str | None) -> bool:
    return not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"


def train_each(train: Callable[[Any], Any], runs: Sequence, *, device: str | None = None) -> list:
    """Call a module's function of each run, which it can pickle; give what it returns, in order.

    On a CPU the runs go side by side, each in a process with one of our threads: a small model makes more of one core
    than of a share in two. On a GPU, under torchrun and with a single thread they follow one another in this process.
    """
    workers = min(torch.get_num_threads(), len(runs))
    if workers < 2 or not _on_cpu(device) or "WORLD_SIZE" in os.environ:
        return [train(run) for run in runs]
    packed = map(pickle.dumps, runs)  # whole: tensors would travel through /dev/shm, which may be small
    found = side_by_side(partial(_on_one_thread, train), packed, workers=workers, total=len(runs), label="runs")
    return [pickle.loads(outcome) for outcome in found]


def _on_one_thread(train: Callable[[Any], Any], packed: bytes) -> bytes:
    torch.set_num_threads(1)
    return pickle.dumps(train(pickle.loads(packed)))


def make_seed(*parts: int) -> int:
    """Mix several numbers into one 32-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def make_generator(seed: int, epoch: int) -> torch.Generator:
    """Make the generator of an epoch's data, the same in every process."""
    return torch.Generator().manual_seed(make_seed(seed, epoch, 0))


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the global random states as they were, so that what follows does not depend on how many epochs ran."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
