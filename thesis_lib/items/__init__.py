"""Tables, figures and numbers of the sister studies, one module a study: made from result rows alone, without torch."""

import importlib
from types import ModuleType

from thesis_lib import paths

STUDIES = ("attention_transfer", "adaptive_tokens", "classification", "correspondence")


def studies(profile: str) -> list[ModuleType]:
    """Import the modules of those studies whose notebook has run.

    Each has NOTEBOOK, CAPTIONS (by file stem) and make(profile), which returns tables and figures by file stem, and
    numbers by LaTeX macro.
    """
    modules = [importlib.import_module(f"{__name__}.{name}") for name in STUDIES]
    return [m for m in modules if (paths.RESULTS / profile / f"{m.NOTEBOOK}.parquet").is_file()]
