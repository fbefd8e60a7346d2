"""GPUs, without torch in this process: which there are, whether torch has a device, and one run at a time on each."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock


def query(field: str) -> list[str]:
    """Return a field of every NVIDIA GPU of the machine as nvidia-smi names it (index, name); none: an empty list."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip().splitlines()
        )
    except (OSError, subprocess.SubprocessError):
        return []


def visible() -> list[str]:
    """Return the GPUs this process may use, by index or identifier."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        devices = [device.strip() for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [device for device in devices if device not in ("", "-1")]
    return query("index")


def absent(device: str) -> str | None:
    """Return why torch cannot use a device, None where it can; asked in a process that holds no memory there."""
    if device == "cpu":
        return None
    code = "import sys, torch; torch.empty(0, device=sys.argv[1])"
    asked = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True)
    lines = asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"]
    return lines[-1] if asked.returncode else None


def own(device: str) -> str:
    """Name this process's own GPU, where torchrun started several on a machine and the device is "cuda"."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank else device


@contextlib.contextmanager
def one() -> Iterator[str | None]:
    """Hold one of the visible GPUs alone, and show no other to this process; wait until one is free.

    Yields None, changing nothing, where there is no GPU, where Slurm gave a single one, or where torchrun chooses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    devices = [] if "LOCAL_RANK" in os.environ else visible()
    if not devices or (job and len(devices) == 1):
        yield None
        return
    # Of another allocation, index 0 is another GPU; their folder may be one.
    prefix = Path(tempfile.gettempdir()) / "-".join(["thesis_lib", str(os.getuid()), *([job] if job else []), "gpu"])
    locks = {device: filelock.FileLock(f"{prefix}-{device}.lock") for device in devices}
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    while not (held := next((device for device, lock in locks.items() if _acquired(lock)), None)):
        time.sleep(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = held
    try:
        yield held
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        os.environ.update({} if before is None else {"CUDA_VISIBLE_DEVICES": before})
        locks[held].release()


def _acquired(lock: filelock.BaseFileLock) -> bool:
    try:
        return bool(lock.acquire(timeout=0))
    except filelock.Timeout:
        return False
