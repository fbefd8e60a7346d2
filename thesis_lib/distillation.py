"""Embedding distillation: a student backbone learns the embeddings that a teacher gave to the same images, once.

Only rows of the split "train" are learnt from, and none whose image another split has as well.
"""

import os
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thesis_lib import perceptual
from thesis_lib.attention.moh import balance_loss
from thesis_lib.checkpoint import digest
from thesis_lib.embeddings import Embeddings, image_label, training_rows
from thesis_lib.training import BALANCE, Batches, fit

TRAINABLE = ("mlp_norm", "all")


def trainable_parameters(student: nn.Module, trainable: str) -> list[str]:
    """Name the backbone's parameters that distillation trains.

    "mlp_norm": the MLP and both norms of every block; "all": every parameter. The final norm is one of them only where
    the embedding is taken after it (feature "cls_norm").
    """
    if trainable not in TRAINABLE:
        near = get_close_matches(str(trainable), TRAINABLE) or TRAINABLE
        raise ValueError(f"trainable must be one of {', '.join(TRAINABLE)}, not {trainable!r}; did you mean {near[0]}?")
    final = ("norm.", "fc_norm.")
    names = []
    for name, _ in student.backbone.named_parameters():
        inside = name.split(".")[2:3] if name.startswith("blocks.") else []
        if name.startswith(final):
            names += [name] if student.feature == "cls_norm" else []
        elif trainable == "all" or inside in (["mlp"], ["norm1"], ["norm2"]):
            names.append(name)
    return names


def distil(
    student: nn.Module,
    pixels: Any,
    targets: Embeddings,
    val: Any,
    *,
    epochs: int = 5,
    batch_size: int = 32,
    lr: float = 1e-4,
    trainable: str = "mlp_norm",
    eval_2afc_every: int = 1,
    max_batches: int | None = None,
    **options: Any,
) -> list[dict]:
    """Train `student`, in place, to embed as the teacher did: loss mean(1 - cos), AdamW; return one log row an epoch.

    pixels: has every image of `targets`, found by digest. val: NIGHTS triplets whose images are in `targets`.
    options: those of `training.fit` (weight_decay, schedule, checkpoint, resume, seed, device, mixed_precision, ...).
    Each row has val_loss and val_cosine over the images of `val` and, every `eval_2afc_every` epochs and after the
    last, 2afc; the student ends with the weights of the best 2afc.
    ValueError: the targets are not for these pixels, this val or this student.
    """
    rows = _rows_of_pixels(pixels, targets.table["digest"])
    index, votes = _val_triplets(val, targets.table, pixels)  # (n, 3) rows of targets, (n,)
    learnt = training_rows(targets.table)
    if not len(learnt):
        raise ValueError('the targets have no row of the split "train"')
    if student.normalize != targets.identity["normalize"]:
        theirs = targets.identity["normalize"]
        raise ValueError(f"the targets have normalize={theirs}, the student {student.normalize}: make them agree")
    needed, inverse = np.unique(index, return_inverse=True)

    def gather(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return pixels[rows[chosen]], targets.values[chosen]

    def batches(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(len(learnt), generator=generator).numpy()
        return Batches(learnt[order], batch_size, gather, max_batches)

    def evaluate(model: nn.Module, epoch: int) -> dict[str, float | None]:
        where = next(model.parameters()).device
        embeddings = perceptual.embed_pixels(
            model, pixels, indices=rows[needed], batch_size=batch_size, device=where, progress=False
        )
        cosine = float(F.cosine_similarity(embeddings, targets.values[needed], dim=1).mean())
        values: dict[str, float | None] = {"val_loss": 1.0 - cosine, "val_cosine": cosine, "2afc": None}
        if epoch % eval_2afc_every == 0 or epoch == epochs:
            d_left, d_right = perceptual.triplet_distances(embeddings, inverse.reshape(index.shape))
            values["2afc"] = perceptual.two_afc_score(d_left, d_right, votes)
        return values

    config = {
        "batch_size": batch_size,
        "eval_2afc_every": eval_2afc_every,
        "feature": student.feature,
        "normalize": student.normalize,
    }
    data = {"values": targets.values, "learnt": torch.from_numpy(learnt), "val": torch.from_numpy(index)}
    config["targets"] = digest(data.items())
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    chosen = set(trainable_parameters(student, trainable))
    try:
        for name, parameter in student.backbone.named_parameters():
            parameter.requires_grad_(name in chosen)
        return fit(
            student,
            _loss(targets.values.shape[1]),
            batches,
            epochs=epochs,
            lr=lr,
            evaluate=evaluate,
            config=config,
            **options,
        )
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(flags[name])


def _loss(dim: int) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, target = batch  # (b, 3, S, S) uint8, (b, D)
        embedding = model.embed(images.float() / 255)  # (b, D)
        if embedding.shape[1] != dim:
            raise ValueError(f"the student's embeddings have {embedding.shape[1]} dimensions, the teacher's {dim}")
        return perceptual.distance(embedding, target).mean() + BALANCE * balance_loss(model)

    return loss


def _rows_of_pixels(pixels: Any, digests: pd.Series) -> np.ndarray:
    place = {key: i for i, key in enumerate(pixels.digests) if key}
    absent = [key for key in digests if key not in place]
    if absent:
        raise ValueError(
            f"{len(absent)} of the {len(digests)} embedded images are not among the pixels: embed them again"
        )
    return np.array([place[key] for key in digests], np.int64)


def _val_triplets(val: Any, table: pd.DataFrame, pixels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Point val's triplets into the rows of `table`; those with an image that `pixels` skipped are left out."""
    place = {path: i for i, path in enumerate(table["path"])}
    skipped = {key for key, usable in zip(pixels.keys, pixels.usable, strict=True) if not usable}
    labels = [image_label(val, path) for path in val.paths]
    absent = [
        label
        for label, path in zip(labels, val.paths, strict=True)
        if label not in place and os.path.abspath(path) not in skipped
    ]
    if absent:
        raise ValueError(f"{len(absent)} of the {len(labels)} images of val are not in the targets, first {absent[0]}")
    index = np.array([place.get(label, -1) for label in labels], np.int64)[val.index]  # (n, 3)
    whole = (index >= 0).all(axis=1)
    if not whole.any():
        raise ValueError("val has no triplet whose three images could be read")
    return index[whole], np.asarray(val.right_vote)[whole]
