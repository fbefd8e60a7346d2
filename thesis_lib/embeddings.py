"""Tables of a teacher's embeddings: which images are in them, who made them, and which rows may be learnt from.

A table is parquet with path, digest, split, role and embedding, and carries the identity of the model that made it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from thesis_lib import paths, perceptual
from thesis_lib.checkpoint import digest
from thesis_lib.datasets.folders import image_folder
from thesis_lib.datasets.imagenet100 import ImageNet100
from thesis_lib.processes import held

COLUMNS = ["path", "digest", "split", "role"]
HELD_OUT = ("val", "validation", "test")


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

    def of(self, table: pd.DataFrame, pixels: Any) -> "Embeddings":
        """Return exactly the images of `table`, its rows in the order of `pixels`; leave out skipped images.

        ValueError: one is not embedded.
        """
        rows = _listed(table, pixels)
        place = {key: i for i, key in enumerate(self.table["digest"])}
        absent = rows.loc[~rows["digest"].isin(place), "path"]
        if len(absent):
            first = f"first {absent.iloc[0]}: run notebook 04 with the same data sets and at least as many samples"
            raise ValueError(f"{len(absent)} of the {len(rows)} images are not embedded, {first}")
        return Embeddings(rows, self.values[[place[key] for key in rows["digest"]]], self.identity)


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
    rebuild: bool = False,
) -> Path:
    """Embed the images of `table`, its rows in the order of `pixels`, into a parquet file; leave out skipped images.

    What an earlier file at `path` holds is reused and kept: `Embeddings.of` picks what one needs. rebuild: make a file
    of another model, or one that is not whole, anew; else it raises what `read_embeddings` does. Of several runs at a
    time one embeds, and the others wait for it. RuntimeError: the file cannot be written.
    """
    path, rows, model = Path(path), _listed(table, pixels), identity(metric)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        alone = held(path.with_name(path.name + ".lock"), f"waiting for another run that writes {path}")
    except OSError as error:
        raise RuntimeError(f"cannot write the embeddings to {path}: {error}") from error
    with alone:
        before = _before(path, model, rebuild)
        if set(_tuples(rows)) <= set(_tuples(before.table)):
            return path
        known = dict(zip(before.table["digest"], before.values.numpy(), strict=True))
        fresh = {key: i for i, key in enumerate(pixels.digests) if key and key not in known}  # equal files once
        if fresh:
            indices = np.fromiter(fresh.values(), np.int64)
            options = {"batch_size": batch_size, "device": device, "dtype": dtype, "progress": progress}
            values = perceptual.embed_pixels(metric, pixels, indices=indices, **options)
            known |= dict(zip(fresh, values.numpy(), strict=True))
        rows = pd.concat([rows, before.table]).drop_duplicates(["path", "digest"])  # split and role as they are now
        _replace(path, rows, np.stack([known[key] for key in rows["digest"]]).astype(np.float32), model)
    return path


def _listed(table: pd.DataFrame, pixels: Any) -> pd.DataFrame:
    """Return the columns to write of the images that are usable."""
    if len(table) != len(pixels):
        raise ValueError(f"the table has {len(table)} rows, the pixels {len(pixels)} images: cache those of this table")
    rows = table.assign(digest=np.asarray(pixels.digests))
    return rows.loc[pixels.usable, COLUMNS].astype(str).reset_index(drop=True)


def _tuples(rows: pd.DataFrame) -> Iterable[tuple]:
    return rows.itertuples(index=False, name=None)


def _before(path: Path, model: dict, rebuild: bool) -> Embeddings:
    """Read what is there; nothing where there is no file, or one to be made anew."""
    if path.exists():
        try:
            return read_embeddings(path, expect=model)
        except (ValueError, RuntimeError):
            if not rebuild:
                raise
    return Embeddings(pd.DataFrame(columns=COLUMNS, dtype=str), torch.empty(0, 0), model)


def _replace(path: Path, rows: pd.DataFrame, values: np.ndarray, model: dict) -> None:
    columns = [pa.array(rows[name].astype(str), pa.string()) for name in COLUMNS]
    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]))
    whole = pa.table(columns, names=[*COLUMNS, "embedding"], metadata={"model": json.dumps(model)})
    try:
        paths.write_whole(path, lambda part: pq.write_table(whole, part))
    except OSError as error:
        raise RuntimeError(f"cannot write the embeddings to {path}: {error}") from error


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
            fix = "name another file, or delete this one and run again"
            raise ValueError(f"the embeddings in {path} are of another model ({what}): {fix}")
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
