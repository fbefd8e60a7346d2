"""Tables, figures and numbers of the studies beside the main one, from result rows alone, without torch."""

import importlib
from types import ModuleType

from thesis_lib import paths

STUDIES = {  # by the result that shows that the study has run
    "03_efficiency_analysis.predictions": "efficiency",
    "05_attention_transfer": "attention_transfer",
    "06_adaptive_tokens": "adaptive_tokens",
    "07_image_classification": "classification",
    "08_semantic_correspondence": "correspondence",
    "10_proposed_model": "proposed",
}


def studies(profile: str) -> list[ModuleType]:
    """Import the modules of those studies whose notebook has run, in the notebooks' order.

    Each has CAPTIONS (by file stem) and make(profile), which returns tables and figures by file stem, and numbers by
    LaTeX macro.
    """
    ran = [name for result, name in STUDIES.items() if (paths.RESULTS / profile / f"{result}.parquet").is_file()]
    return [importlib.import_module(f"{__name__}.{name}") for name in ran]
