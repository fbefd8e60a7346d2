"""Every path of the project, from the place of this file: the same from a notebook, a script, or another directory.

The environment variable THESIS_DATA relocates what runs fill (raw data, caches, results) and THESIS_FIGURES what the
figures notebook fills. What is committed (weights, measured rows) stays with the checkout.
"""

import os
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
