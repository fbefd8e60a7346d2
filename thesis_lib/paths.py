"""Every path of the project, from the place of this file: the same from a notebook, a script, or another directory.

The environment variable THESIS_DATA relocates what runs fill (raw data, caches, results) and THESIS_FIGURES what the
figures notebook fills. What is committed (weights, measured rows) stays with the checkout.
`write_whole` is how a file gets to its path.
"""

import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "profiles"
WEIGHTS = ROOT / "data" / "weights"
MEASURED = ROOT / "data" / "measured"

DATA = Path(os.environ.get("THESIS_DATA") or ROOT / "data").expanduser().resolve()
RAW = DATA / "raw"
CACHE = DATA / "cache"
RESULTS = DATA / "results"
FIGURES = Path(os.environ.get("THESIS_FIGURES") or ROOT / "figures").expanduser().resolve()


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file and put it in place: whatever fails, whoever else writes, `path` is whole."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # one a process: under torchrun every rank may save
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
