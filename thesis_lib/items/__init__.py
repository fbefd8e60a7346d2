"""Tables, figures and numbers of the studies beside the main one, from result rows alone, without torch."""

import importlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from thesis_lib import paths, plots
from thesis_lib.latex import SYNTHETIC, Table

STUDIES = {  # by the result that shows that the study has run
    "03_efficiency_analysis.predictions": "efficiency",
    "05_attention_transfer": "attention_transfer",
    "06_adaptive_tokens": "adaptive_tokens",
    "07_image_classification": "classification",
    "08_semantic_correspondence": "correspondence",
    "10_proposed_model": "proposed",
}


@dataclass(frozen=True)
class Written:
    """What a study gave the thesis: tables and captions by file stem, files in the order made, numbers by macro."""

    tables: dict[str, Table]
    captions: dict[str, str]
    files: list[Path]
    numbers: dict[str, str]

    @property
    def pictures(self) -> list[Path]:
        return [path for path in self.files if path.suffix == ".png"]


def studies(profile: str) -> list[str]:
    """Name the modules of those studies whose notebook has run, in the notebooks' order.

    Each has CAPTIONS (by file stem) and make(profile), which returns tables and figures by file stem, and numbers by
    LaTeX macro.
    """
    return [name for result, name in STUDIES.items() if (paths.RESULTS / profile / f"{result}.parquet").is_file()]


def write(study: str, *, profile: str, folder: Path, source: str, synthetic: bool = False) -> Written:
    """Make a study's tables and figures from its rows, in the thesis's style, and write them below `folder`.

    source: what the first line of each LaTeX file says. synthetic: whether the data are; notes and captions then say
    so. Raises what the study's `make` raises.
    """
    module = importlib.import_module(f"{__name__}.{study}")
    plots.set_theme()
    tables, figures, numbers = module.make(profile)
    place = folder / "tables"
    files = [table.write(place / f"{n}.tex", source=source, synthetic=synthetic) for n, table in tables.items()]
    for name, figure in figures.items():
        files += plots.save(figure, folder / name)
        plt.close(figure)
    captions = {name: module.CAPTIONS[name] for name in (*tables, *figures)}
    if synthetic and study != "efficiency":  # whose input is noise on any data
        captions |= {name: f"{captions[name]} {SYNTHETIC}" for name in figures}
    return Written(tables, captions, files, numbers)
