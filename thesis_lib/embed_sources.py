"""What `thesis_lib.embed` embeds: images of a folder, parquet shards or a csv of pairs, in a fixed order."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd

from thesis_lib.datasets.folders import image_folder
from thesis_lib.datasets.imagenet100 import SPLITS, ImageNet100, Row
from thesis_lib.datasets.pixels import File, Source

CHUNK = 4096  # rows of a csv that are in memory at once


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a source in a fixed order; of a csv also its columns and the pairs (m, 2) as indices."""

    root: Path
    items: Sequence[str | Row]
    columns: tuple[str, str] = ("", "")
    pairs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.items)

    def label(self, i: int) -> str:
        """Name an image wherever its collection lies: its path there, or shard and row."""
        item = self.items[i]
        return item if isinstance(item, str) else f"{item.shard.name}#{item.row}"

    def split(self, i: int) -> str:
        item = self.items[i]
        return "" if isinstance(item, str) else item.shard.name.split("-")[0]

    def source(self, i: int) -> Source:
        item = self.items[i]
        return File(self.root / item) if isinstance(item, str) else item

    def digest(self, rows: range) -> str:
        """Hash labels, sizes and times of some images: it changes when one of them may have changed."""
        sha = blake2b(digest_size=16)
        for i in rows:
            try:
                stamp = tuple(self.source(i).stamp)
            except OSError:
                stamp = ()  # reading it will say what is wrong
            sha.update(f"{self.label(i)} {stamp}\n".encode())
        return sha.hexdigest()

    def pairs_digest(self) -> str:
        """Hash the pairs and the names of their columns."""
        pairs = b"" if self.pairs is None else np.ascontiguousarray(self.pairs).tobytes()
        return blake2b(repr(self.columns).encode() + pairs, digest_size=16).hexdigest()


def listing(source: str | Path, columns: tuple[str, str] = ("a", "b")) -> Listing:
    """List the images of a folder, of parquet shards or of a csv; see `embed_folder` for what it raises."""
    source = Path(source).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}: name a folder of images, one of parquet shards, or a csv")
    if source.is_file():
        return _pairs(source, columns)
    found = [split for split in SPLITS if any(source.glob(f"data/{split}-*.parquet"))]
    if found:
        return Listing(source, [row for split in found for row in ImageNet100(source, split).sources])
    return Listing(source, [path.relative_to(source).as_posix() for path in image_folder(source)])


def _pairs(path: Path, columns: tuple[str, str]) -> Listing:
    """Read a csv in chunks: its distinct images in order of appearance, and its rows as indices of these."""
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path} is no csv; give a folder of images, one of parquet shards, or a .csv of pairs")
    if len(columns) != 2 or columns[0] == columns[1] or "distance" in columns:  # the third one of the distances' file
        raise ValueError(f"columns (--columns) must be two different ones, none called distance; got {columns}")
    try:
        return _read_pairs(path, columns)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable csv file in UTF-8 ({error})") from error


def _read_pairs(path: Path, columns: tuple[str, str]) -> Listing:
    there = list(pd.read_csv(path, nrows=0).columns)
    if not set(columns) <= set(there):
        raise ValueError(f"{path} has the columns {', '.join(there)}: name the two with paths by columns (--columns)")
    places: dict[str, int] = {}
    chunks = [np.empty((0, 2), np.int64)]
    with pd.read_csv(path, usecols=list(columns), dtype=str, keep_default_na=False, chunksize=CHUNK) as frames:
        for frame in frames:
            names = frame[list(columns)].to_numpy()
            unusable = frame.map(lambda name: not name or "\0" in name).any(axis=1)
            if unusable.any():
                raise ValueError(f"{path}: data row {unusable.idxmax() + 1} lacks a path, or has one with a NUL byte")
            chunks.append(np.array([[places.setdefault(name, len(places)) for name in row] for row in names]))
    if not places:
        raise ValueError(f"{path} has no pair")
    return Listing(path.parent, list(places), tuple(columns), np.concatenate(chunks))
