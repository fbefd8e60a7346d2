"""The finished parts of `thesis_lib.embed`, and how they are joined: an interruption never leaves half a part."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from thesis_lib import paths, perceptual
from thesis_lib.embed_sources import CHUNK, Listing

SKIP = "on_error='skip' (--on-error skip)"


@dataclass(frozen=True)
class Embedded:
    """What a run wrote: `path`, how many `images` are in it, why others were `skipped`, and the pairs' `distances`."""

    path: Path
    images: int
    skipped: dict[str, str]
    distances: Path | None


class Parts:
    """The folder of finished parts, one parquet file each, written whole or not at all, and the run they belong to."""

    def __init__(self, out: Path, run: dict, images: Listing) -> None:
        self.folder, self.run, self.images = out.with_name(out.name + ".parts"), run, images
        self.count = -(-len(images) // run["part_size"])

    def path(self, k: int) -> Path:
        return self.folder / f"{k:08d}.parquet"

    def rows(self, k: int) -> range:
        return range(k * self.run["part_size"], min((k + 1) * self.run["part_size"], len(self.images)))

    def skipped(self, k: int) -> dict[str, str]:
        """Return image number → reason for the images that a finished part lacks."""
        return json.loads(pq.read_schema(self.path(k)).metadata[b"skipped"])

    def has(self, k: int, on_error: str) -> bool:
        """Say whether a part is there, of images that are unchanged, and lacks none that this run must not skip."""
        try:
            found = pq.read_schema(self.path(k)).metadata[b"images"].decode()
        except (pa.ArrowInvalid, OSError):  # not there, or damaged: it is made again
            return False
        return found == self.images.digest(self.rows(k)) and (on_error == "skip" or not self.skipped(k))

    def read(self, k: int) -> pa.Table:
        try:
            return pq.read_table(self.path(k))
        except (pa.ArrowInvalid, OSError) as error:
            raise RuntimeError(f"{self.path(k)} is damaged ({error}): delete it and run the same again") from error

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder or check that its parts are of this run, and lock it against other runs until the end.

        The lock lies beside the folder, which NFS and Windows cannot remove while a file in it is open. What is locked
        is the open file: one that an earlier run left there locks nobody out.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock, plan = filelock.FileLock(self.folder.with_suffix(".lock")), self.folder / "run.json"
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RuntimeError(f"another run is filling {self.folder}: wait for it, or name another file") from error
        try:
            self.folder.mkdir(exist_ok=True)
            if not plan.exists():
                paths.write_whole(plan, lambda part: part.write_text(json.dumps(self.run)))
            _same(_read(plan), self.run, self.folder)
            yield
        finally:
            lock.release()

    def write(self, k: int, table: pa.Table) -> None:
        temporary = self.path(k).with_suffix(".tmp")
        with open(temporary, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path(k))


def _read(plan: Path) -> dict:
    try:
        return json.loads(plan.read_text())
    except ValueError as error:
        raise ValueError(f"{plan} is not whole and does not say whose parts are there: delete {plan.parent}") from error


def join(images: Listing, parts: Parts, out: Path, run: dict) -> None:
    """Write `out`, after the distances, from the parts, a few at a time, and remove these."""
    lacking = {int(i): reason for k in range(parts.count) for i, reason in parts.skipped(k).items()}
    if len(lacking) == len(images):
        raise ValueError(f"none of the {len(lacking)} images can be read, the first: {lacking[0]}")
    skipped = {images.label(i): reason for i, reason in lacking.items()}
    entries = {"model": run["model"], "run": run, "skipped": skipped}
    metadata = {key: json.dumps(value) for key, value in entries.items()}
    schema = pq.read_schema(parts.path(0)).with_metadata(metadata)
    joined = parts.folder / "out.tmp"
    at_once = max(1, CHUNK // parts.run["part_size"])
    with pq.ParquetWriter(joined, schema) as writer:
        for first in range(0, parts.count, at_once):
            some = [parts.read(k) for k in range(first, min(first + at_once, parts.count))]
            table = pa.concat_tables([each.replace_schema_metadata(metadata) for each in some]).combine_chunks()
            if len(table):
                writer.write_table(table)
    if images.pairs is not None:
        _measure(images, joined, _distances(out))
    os.replace(joined, out)
    shutil.rmtree(parts.folder, ignore_errors=True)  # `out` is in place: what is left of the parts does no harm


def _measure(images: Listing, embedded: Path, out: Path) -> None:
    """Write the distances of the pairs to `out` from the embeddings in a parquet file, mapped: memory stays flat."""
    with pq.ParquetFile(embedded) as file, tempfile.TemporaryFile(dir=out.parent) as raw:
        schema = file.schema_arrow
        for batch in file.iter_batches(CHUNK, columns=["embedding"]):
            raw.write(batch["embedding"].flatten().to_numpy())
        raw.flush()
        skipped = json.loads(schema.metadata[b"skipped"])
        usable = np.array([images.label(i) not in skipped for i in range(len(images))])
        shape = (file.metadata.num_rows, schema.field("embedding").type.list_size)
        vectors = np.memmap(raw, np.float32, "r", shape=shape)
        paths.write_whole(out, partial(_write_distances, images, usable, vectors, schema.metadata))
        del vectors  # what is still mapped cannot be removed everywhere


def _write_distances(images: Listing, usable: np.ndarray, vectors: np.ndarray, metadata: dict, path: Path) -> None:
    """Write the csv's two columns and the distance of each pair, null where an image was skipped."""
    a, b = images.columns
    schema = pa.schema([(a, pa.string()), (b, pa.string()), ("distance", pa.float64())], metadata)
    position = np.maximum(np.cumsum(usable) - 1, 0)  # row of an image among the usable ones
    with pq.ParquetWriter(path, schema) as writer:
        for pairs in np.array_split(images.pairs, range(CHUNK, len(images.pairs), CHUNK)):
            left, right = (torch.from_numpy(vectors[position[column]]).double() for column in pairs.T)
            distances = pa.array(perceptual.distance(left, right).numpy(), mask=~usable[pairs].all(axis=1))
            names = [pa.array([images.label(i) for i in column], pa.string()) for column in pairs.T]
            writer.write_table(pa.table([*names, distances], schema=schema))


def _distances(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".parquet") + ".distances.parquet")


def finished(out: Path, run: dict, images: Listing, on_error: str) -> Embedded | None:
    """Describe a finished file, its distances made again if they are gone; None if there is none.

    Raises ValueError if it or its distances are of another run, or if it lacks images and this run must not skip any.
    """
    distances = _distances(out)
    if distances.exists():  # also without `out`: they would be overwritten, or taken for those of this run
        _skipped(distances, run)
    if not out.exists():
        return None
    skipped = _skipped(out, run)
    if skipped and on_error == "raise":
        some = "; ".join(list(skipped.values())[:3])
        raise ValueError(
            f"{out} lacks {len(skipped)} images that were skipped ({some}): replace them, delete it and run the same "
            f"again, or go on without them by {SKIP}"
        )
    if images.pairs is not None and not distances.exists():
        _measure(images, out, distances)
    return Embedded(out, pq.read_metadata(out).num_rows, skipped, None if images.pairs is None else distances)


def _skipped(path: Path, run: dict) -> dict[str, str]:
    """Return what the run that made a file skipped; ValueError if it was another run."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        found, skipped = json.loads(metadata[b"run"]), json.loads(metadata[b"skipped"])
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"{path} is there and no file of this command: delete it, or name another") from error
    _same(found, run, path)
    return skipped


def _same(found: dict, run: dict, where: Path) -> None:
    differing = [key for key in run if found.get(key) != run[key]]
    if differing:
        what = ", ".join(differing)
        raise ValueError(f"{where} is of another run ({what} differ): delete it, or name another file")
