"""Sets beside the triplets, drawn by the synthetic world: unlabelled scenes, and a folder for each sister study's.

The latter are in the published layouts.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from thesis_lib.attention.base import suggest
from thesis_lib.datasets.synthetic import write_scenes
from thesis_lib.datasets.synthetic_cifar10 import write_cifar10, write_imagenet100
from thesis_lib.datasets.synthetic_correspondence import write_spair
from thesis_lib.datasets.synthetic_willow_cub import write_cub, write_willow

WRITERS: dict[str, Callable[..., Path]] = {
    "scenes": lambda root, counts, seed, workers: write_scenes(root, **counts, seed=seed, workers=workers),
    "cifar10": lambda root, counts, seed, workers: write_cifar10(root, counts, seed=seed),
    "imagenet100_pairs": lambda root, counts, seed, workers: write_imagenet100(root, counts, seed=seed),
    "spair71k": lambda root, counts, seed, workers: write_spair(root, counts, seed=seed, workers=workers),
    "pf_willow": lambda root, counts, seed, workers: write_willow(root, **counts, seed=seed, workers=workers),
    "cub200": lambda root, counts, seed, workers: write_cub(root, **counts, seed=seed, workers=workers),
}


def write(
    root: str | Path, sets: Mapping[str, Mapping[str, Any]], *, seed: int = 0, workers: int | None = None
) -> list[Path]:
    """Write each named set below `root` unless it is there already, and return their folders.

    sets: by name, what its writer is to draw: pictures or pairs by split for cifar10, imagenet100_pairs and spair71k;
    {"pairs": ..., "images": ...} for pf_willow, {"images": ...} for cub200 (images for each kind) and for scenes.
    Raises ValueError for an unknown name, and what the writers raise.
    """
    for name in sets:
        if name not in WRITERS:
            raise ValueError(f"no study has a set {name!r}{suggest(name, WRITERS)}; known: {', '.join(WRITERS)}")
    return [WRITERS[name](Path(root) / name, counts, seed=seed, workers=workers) for name, counts in sets.items()]
