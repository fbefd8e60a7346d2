"""Embedding distillation: a student backbone learns the embeddings that a teacher gave to the same images, once.

The teacher's embeddings are a parquet table (path, digest, split, role, embedding) that carries the identity of the
model that made it. Only rows of the split "train" are learnt from, and none whose image another split has as well.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thesis_lib import perceptual
from thesis_lib.checkpoint import digest
from thesis_lib.datasets.folders import image_folder
from thesis_lib.datasets.imagenet100 import ImageNet100
from thesis_lib.training import Batches, fit

COLUMNS = ["path", "digest", "split", "role"]
HELD_OUT = ("val", "validation", "test")
TRAINABLE = ("mlp_norm", "all")


def image_table(nights: Iterable, extra_image_roots: Iterable[str | Path] = ()) -> pd.DataFrame:
    """List the images to embed: columns path (location-independent), split, role and source (for `pixels.cache`).

    nights: NIGHTS data sets, of one split each or of all; an image that is in more than one split counts as held out.
    extra_image_roots: image folders (of a root with `train` beside `val`, `validation` or `test`: its `train` alone) or
    ImageNet-100 in parquet shards (its train shards alone); their role is "extra", their split "train".
    """
    rows = []
    for dataset in nights:
        splits = dataset.table["split"].to_numpy()
        for column, role in enumerate(("ref", "left", "right")):
            for i, split in zip(dataset.index[:, column], splits, strict=True):
                source = dataset.paths[i]
                rows.append((image_label(dataset, source), split, role, source))
    for number, root in enumerate(map(Path, extra_image_roots)):
        prefix = f"extra/{number}_{root.name}"
        if list(root.glob("data/*.parquet")):
            found = [(f"{source.shard.name}#{source.row}", source) for source in ImageNet100(root, "train").sources]
        else:
            divided = (root / "train").is_dir() and any((root / name).is_dir() for name in HELD_OUT)
            images = image_folder(root / "train" if divided else root)
            found = [(path.relative_to(root).as_posix(), path) for path in images]
        rows += [(f"{prefix}/{name}", "train", "extra", source) for name, source in found]
    table = pd.DataFrame(rows, columns=["path", "split", "role", "source"])
    held_out_first = table["split"].eq("train").sort_values(kind="stable").index
    return table.loc[held_out_first].drop_duplicates("path").sort_index().reset_index(drop=True)


def image_label(dataset: Any, path: Path) -> str:
    """Name an image of NIGHTS in the table: its path below the data set's root."""
    return path.relative_to(dataset.root).as_posix()


def identity(metric: nn.Module) -> dict:
    """Say which model makes an embedding: recipe, feature, normalisation, and the SHA-256 of the weights."""
    weights = digest(metric.backbone.state_dict().items())
    described = {"recipe": metric.backbone.recipe, "feature": metric.feature, "normalize": metric.normalize}
    return json.loads(json.dumps(described | {"weights": weights}))


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A teacher's embeddings: `table` (path, digest, split, role), `values` (n, D) float32, `identity` of the model."""

    table: pd.DataFrame
    values: Tensor
    identity: dict

    def __len__(self) -> int:
        return len(self.table)


def write_embeddings(
    metric: nn.Module,
    pixels: Any,
    table: pd.DataFrame,
    path: str | Path,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    progress: bool = True,
) -> Path:
    """Embed the images of `table`, its rows in the order of `pixels`, into a parquet file; leave out skipped images.

    What an earlier file at `path` holds of the same model is reused. RuntimeError: the file cannot be written.
    """
    path = Path(path)
    if len(table) != len(pixels):
        raise ValueError(f"the table has {len(table)} rows, the pixels {len(pixels)} images: cache those of this table")
    digests, model = np.asarray(pixels.digests), identity(metric)
    known: dict[str, np.ndarray] = {}
    if path.exists():
        try:
            before = read_embeddings(path, expect=model)
            known = dict(zip(before.table["digest"], before.values.numpy(), strict=True))
        except (ValueError, RuntimeError):  # of another model, or not whole: made anew
            pass
    fresh = {key: i for i, key in enumerate(digests) if pixels.usable[i] and key not in known}  # equal files once
    if fresh:
        values = perceptual.embed_pixels(
            metric,
            pixels,
            indices=np.fromiter(fresh.values(), np.int64),
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=progress,
        )
        known |= dict(zip(fresh, values.numpy(), strict=True))
    rows = table.assign(digest=digests)[pixels.usable]
    values = np.stack([known[key] for key in rows["digest"]]).astype(np.float32)  # (n, D)
    columns = [pa.array(rows[name].astype(str), pa.string()) for name in COLUMNS]
    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]))
    whole = pa.table(columns, names=[*COLUMNS, "embedding"], metadata={"model": json.dumps(model)})
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(whole, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise RuntimeError(f"cannot write the embeddings to {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_embeddings(path: str | Path, *, expect: nn.Module | dict | None = None) -> Embeddings:
    """Read a table that `write_embeddings` made.

    expect: the metric, or its `identity`, that must have made it. FileNotFoundError: there is none. RuntimeError: the
    file is corrupt. ValueError: it is of another model, lacks a column, or holds embeddings that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no embedding table {path}: notebook 04 makes it, by write_embeddings")
    try:
        whole = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RuntimeError(f"the embedding table {path} is corrupt ({error}): delete it and run again") from error
    absent = [name for name in [*COLUMNS, "embedding"] if name not in whole.column_names]
    if absent or b"model" not in (whole.schema.metadata or {}):
        raise ValueError(f"{path} is no embedding table: it lacks {', '.join(absent) or 'the identity of its model'}")
    found = json.loads(whole.schema.metadata[b"model"])
    if expect is not None:
        wanted = identity(expect) if isinstance(expect, nn.Module) else expect
        differing = [
            f"{key} {found.get(key)!r}, not {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
        ]
        if differing:
            what = "; ".join(differing)
            raise ValueError(f"the embeddings in {path} are of another model ({what}): delete the file and run again")
    values = whole["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(whole), -1)
    table = whole.select(COLUMNS).to_pandas()
    wrong = ~np.isfinite(values).all(axis=1)
    if wrong.any():
        first = f"first {table['path'][wrong].iloc[0]}: delete the file and run again, in float32"
        raise ValueError(f"{wrong.sum()} of the {len(wrong)} embeddings in {path} are not finite, {first}")
    return Embeddings(table, torch.from_numpy(values.copy()), found)


def training_rows(table: pd.DataFrame) -> np.ndarray:
    """Give the positions of the rows to learn from: split "train", and no image that a held-out row has, too."""
    held_out = set(table.loc[table["split"] != "train", "digest"])
    return np.flatnonzero((table["split"] == "train") & ~table["digest"].isin(held_out))


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
        "student": identity(student) | {"weights": ""},
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
        return perceptual.distance(embedding, target).mean()

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
