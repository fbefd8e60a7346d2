"""The finished parts of `thesis_lib.embed`, and how they are joined: an interruption never leaves half a part."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from thesis_lib import paths, perceptual
from thesis_lib.embed_sources import CHUNK, Listing


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
        if not self.path(k).exists():
            return False
        found = pq.read_schema(self.path(k)).metadata[b"images"].decode()
        return found == self.images.digest(self.rows(k)) and (on_error == "skip" or not self.skipped(k))

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
    joined, raw = parts.folder / "out.tmp", parts.folder / "values.tmp"
    at_once = max(1, CHUNK // parts.run["part_size"])
    with pq.ParquetWriter(joined, schema) as writer, open(raw, "wb") as values:
        for first in range(0, parts.count, at_once):
            some = [pq.read_table(parts.path(k)) for k in range(first, min(first + at_once, parts.count))]
            table = pa.concat_tables([each.replace_schema_metadata(metadata) for each in some]).combine_chunks()
            if len(table):
                writer.write_table(table)
            if images.pairs is not None:
                values.write(table["embedding"].combine_chunks().flatten().to_numpy())
    if images.pairs is not None:
        usable = ~np.isin(np.arange(len(images)), list(lacking))
        vectors = np.memmap(raw, np.float32, "r", shape=(int(usable.sum()), parts.run["width"]))
        _write_distances(images, usable, vectors, parts.folder / "distances.tmp", metadata)
        del vectors  # what is still mapped cannot be removed everywhere
        os.replace(parts.folder / "distances.tmp", _distances(out))
    os.replace(joined, out)
    shutil.rmtree(parts.folder, ignore_errors=True)  # `out` is in place: what is left of the parts does no harm


def _write_distances(images: Listing, usable: np.ndarray, vectors: np.ndarray, path: Path, metadata: dict) -> None:
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
    return out.with_name(f"{out.stem}.distances.parquet")


def finished(out: Path, run: dict) -> Embedded:
    """Describe a finished file; ValueError if it is of another run."""
    try:
        metadata = pq.read_schema(out).metadata or {}
        found, skipped = json.loads(metadata[b"run"]), json.loads(metadata[b"skipped"])
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"{out} is there and no file of this command: delete it, or name another") from error
    _same(found, run, out)
    distances = _distances(out)
    return Embedded(out, pq.read_metadata(out).num_rows, skipped, distances if distances.exists() else None)


def _same(found: dict, run: dict, where: Path) -> None:
    differing = [key for key in run if found.get(key) != run[key]]
    if differing:
        what = ", ".join(differing)
        raise ValueError(f"{where} is of another run ({what} differ): delete it, or name another file")
