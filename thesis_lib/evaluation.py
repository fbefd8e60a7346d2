"""2AFC of a metric on NIGHTS: distances per triplet, then the published numbers as result rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from thesis_lib import perceptual
from thesis_lib.datasets.missing import choose
from thesis_lib.datasets.pixels import File
from thesis_lib.statistics import bootstrap_mean


def triplet_table(dataset: Any, distances: tuple[Tensor, Tensor], rows: np.ndarray) -> pd.DataFrame:
    """Put the distances of a data set's triplets `rows` (m,) beside their votes: one line each, `score` is 2AFC."""
    d_left, d_right = (np.asarray(d, float) for d in distances)
    votes = dataset.right_vote[rows]
    return pd.DataFrame(
        {
            "id": dataset.ids[rows],
            "split": dataset.table["split"].to_numpy()[rows],
            "is_imagenet": dataset.is_imagenet[rows],
            "d_left": d_left,
            "d_right": d_right,
            "right_vote": votes,
            "score": perceptual.two_afc_scores(d_left, d_right, votes).numpy(),
        }
    )


def evaluate(
    metric: nn.Module,
    dataset: Any,
    pixels: Any,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    progress: bool = True,
) -> pd.DataFrame:
    """Score a metric on the triplets of a NIGHTS data set, each distinct image embedded once.

    pixels: the cached images of `dataset.paths`; triplets with an image that was skipped are left out.
    Raises ValueError for the pixels of other images, and where no triplet is left.
    """
    rows = _usable(dataset, pixels)
    needed, inverse = np.unique(dataset.index[rows], return_inverse=True)
    options = {"batch_size": batch_size, "device": device, "dtype": dtype, "progress": progress}
    embeddings = perceptual.embed_pixels(metric, pixels, indices=needed, **options)
    return triplet_table(dataset, perceptual.triplet_distances(embeddings, inverse.reshape(-1, 3)), rows)


def _usable(dataset: Any, pixels: Any) -> np.ndarray:
    """Return which triplets (m,) have all their images; ValueError for none, and for the pixels of other images."""
    keys = getattr(pixels, "keys", None)
    other = keys is not None and keys != [File(path).key for path in dataset.paths]
    if other or len(pixels) <= dataset.index.max():
        raise ValueError("the pixels are not those of the data set's images: cache its own `paths`, in their order")
    rows = np.flatnonzero(pixels.usable[dataset.index].all(axis=1))
    if len(rows) == 0:
        raise ValueError("every triplet has an image that was skipped: see `pixels.skipped`")
    return rows


def accuracy_rows(triplets: pd.DataFrame, **protocol: Any) -> list[dict]:
    """Return the 2AFC of each split in a triplet table, test also by is_imagenet, with n and 95 % bootstrap interval.

    protocol: the result columns that all rows share (backbone, mixer, stage, ...).
    """
    parts = {str(split): part for split, part in triplets.groupby("split", sort=False)}
    if "test" in parts:
        imagenet = parts["test"]["is_imagenet"]
        parts |= {"test_imagenet": parts["test"][imagenet], "test_no_imagenet": parts["test"][~imagenet]}
    rows = []
    for split, part in parts.items():
        if len(part):
            score = bootstrap_mean(part["score"].to_numpy())
            rows.append({"metric": "2afc", "unit": "1", "split": split} | vars(score) | protocol)
    return rows


def _histograms(images: Tensor, bins: int = 8) -> Tensor:
    """Count the colours of (B, 3, H, W) images in [0, 1] in bins**3 cells: (B, bins**3), each row sums to 1."""
    cell = (images * bins).long().clamp(max=bins - 1)
    flat = ((cell[:, 0] * bins + cell[:, 1]) * bins + cell[:, 2]).flatten(1)  # (B, H*W)
    counts = torch.zeros(len(images), bins**3, device=images.device)
    return counts.scatter_add_(1, flat, torch.ones(flat.shape, device=images.device)) / flat.shape[1]


def _minus_psnr(a: Tensor, b: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds, and only notebook 01 asks

    return -peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))


def _minus_ssim(a: Tensor, b: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure  # likewise

    return -structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")


def _histogram_distance(a: Tensor, b: Tensor) -> Tensor:
    return (_histograms(a) - _histograms(b)).abs().sum(1)


# Distances that look at pixels alone, (B, 3, H, W) twice -> (B,). DreamSim's PSNR and SSIM look at 768 px.
PIXEL_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PSNR": _minus_psnr,
    "SSIM": _minus_ssim,
    "colour histogram": _histogram_distance,
}


def evaluate_pixels(name: str, dataset: Any, pixels: Any, *, batch_size: int = 64) -> pd.DataFrame:
    """Score one of PIXEL_DISTANCES on the triplets of a NIGHTS data set; ValueError as in `evaluate`."""
    measure = PIXEL_DISTANCES[choose(name, PIXEL_DISTANCES, "pixel distance")]
    rows, parts = _usable(dataset, pixels), []
    for batch in np.array_split(rows, -(-len(rows) // batch_size)):
        reference, left, right = (pixels[dataset.index[batch, i]].float() / 255 for i in range(3))
        parts.append(torch.stack([measure(reference, side) for side in (left, right)]))  # (2, b)
    return triplet_table(dataset, tuple(torch.cat(parts, 1)), rows)
