"""Work in other processes: measurements each in a fresh one, rendering and small trainings side by side.

They are forked from a server that has imported what we have of this package and done nothing else, so a start costs
milliseconds; where there is no such server (Windows), each imports by itself. No caches, arenas or threads are shared.
"""

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

# glibc gives large freed buffers back to the kernel and asks for them again, zeroed page by page: 5 to 8 % of a
# training step on a CPU, and a quarter of a forward pass on a virtual machine. In bytes; as its environment variables,
# and as `mallopt` knows M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
KEPT = 2**30
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(KEPT))
MALLOPT = (-3, -1)


def keep_memory() -> None:
    """Keep freed memory for the next tensors, in this process and those that it starts, where the C library is glibc.

    For a command to call, not a library: other processes may want that memory.
    """
    os.environ.update(KEEP_MEMORY)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            for parameter in MALLOPT:
                mallopt(parameter, KEPT)


def apart(function: Callable, *args: Any, **settings: Any) -> Any:
    """Call a function of a module in a process of its own.

    Raises BrokenProcessPool where the process dies.
    """
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(function, *args, **settings).result()


def side_by_side(
    function: Callable,
    items: Iterable,
    *,
    workers: int | None = None,
    chunksize: int = 1,
    label: str | None = None,
    total: int | None = None,
) -> Iterator:
    """Yield a module's function of each item, in order, computed in `workers` processes (None: one a core).

    label: of a progress bar. Interrupted, or after an error in one, the processes are stopped.
    Raises what the function raises, and BrokenProcessPool where a process dies.
    """
    others = set(multiprocessing.active_children())  # the caller's own
    with ProcessPoolExecutor(workers, mp_context=_context()) as pool:
        try:
            results = pool.map(function, items, chunksize=chunksize)
            yield from tqdm(results, total=total, desc=label, disable=label is None)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running = set(multiprocessing.active_children()) - others
            for process in running:
                process.terminate()
            for process in running:
                process.join()
            raise


def held(path: Path, waiting: str) -> AbstractContextManager:
    """Hold a file lock against other processes until the context ends; where one has it, say `waiting` and wait."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        tqdm.write(waiting)
        return lock.acquire()


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.partition(".")[0] == __package__])
    return context
