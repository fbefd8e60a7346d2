"""A fixed piece of work timed beside what is measured: what else runs on a machine slows both.

Of times that so differ by half and more the ratio to the yardstick's hardly does.
"""

import functools
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

T = TypeVar("T")


def around(run: Callable[[], T], device: torch.device | str, repeats: int = 3) -> tuple[T, float]:
    """Run something, and return what it returns and what the yardstick took around it, seconds.

    It is timed right before and right after, `repeats` times each, and the mean counts: what interrupts a run is in its
    time, too.
    """
    before = _times(device, repeats)
    found = run()
    return found, float(np.mean(before + _times(device, repeats)))


def _times(device: torch.device | str, count: int) -> list[float]:
    matrix, times = _matrix(str(device)), []
    wait = functools.partial(torch.cuda.synchronize, device) if matrix.is_cuda else lambda: None
    for _ in range(count):
        wait()
        start = time.perf_counter()
        F.gelu(matrix @ matrix)
        wait()
        times.append(time.perf_counter() - start)
    return times


@functools.cache
def _matrix(device: str) -> torch.Tensor:
    side = 2048 if device.startswith("cuda") else 256  # a GPU's time must not be that of the call
    return torch.full((side, side), 1 / side, device=device)
