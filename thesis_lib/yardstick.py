"""A fixed piece of work timed beside what is measured: what else runs on a machine slows both, for seconds on end."""

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

DISTURBED = 1.2  # times what is usual: a series of passes, or the yardstick beside it
PATIENCE = 10.0  # seconds that a process waits for quiet moments: what disturbs comes and goes within some

_waited = 0.0  # by this process


def yardstick(device: torch.device | str) -> float:
    """Time the piece of work, seconds: where it takes longer than at quiet moments, so does whatever is beside it."""
    cuda = torch.device(device).type == "cuda"
    side = 2048 if cuda else 256  # a GPU's time must not be that of the call
    matrix = torch.full((side, side), 1 / side, device=device)
    times = []
    for _ in range(18):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        F.gelu(matrix @ matrix)
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[3:]))


def quiet(yardsticks: Iterable[float]) -> float:
    """Return what the yardstick takes at quiet moments, of all that it took.

    A tenth is quicker still: the seconds for which a cool processor runs faster than it goes on are no measure.
    """
    return float(np.quantile(list(yardsticks), 0.1, method="lower"))


def common(series: Iterable[Sequence[float]], rounds: int) -> float:
    """Return the time of the yardstick beside which most series have rounds: it, or up to DISTURBED times as much.

    A shared machine has quick minutes and slow ones, and times can be compared where they are of like ones. series:
    what the yardstick took beside each of their rounds, of which `rounds` count at most. Of equals the quickest.
    """
    series = [np.sort(np.asarray(each, float)) for each in series]
    times, counts = np.unique(np.concatenate(series)), 0
    for each in series:
        like = np.searchsorted(each, DISTURBED * times, side="right") - np.searchsorted(each, times)
        counts = counts + np.minimum(like, rounds)
    return float(times[np.argmax(counts)])


def at_a_quiet_moment(device: torch.device | str, usual: float | None) -> float:
    """Wait until the yardstick takes no longer than at quiet moments; return what it took, seconds.

    A process waits for PATIENCE in all. usual: what it takes at quiet moments, seconds; None: not known, nothing waits.
    """
    global _waited
    took, start = yardstick(device), time.perf_counter()
    while usual and took > DISTURBED * usual and _waited + time.perf_counter() - start < PATIENCE:
        took = yardstick(device)
    _waited += time.perf_counter() - start
    return took
