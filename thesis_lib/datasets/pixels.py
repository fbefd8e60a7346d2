"""Images decoded and resized once, kept in `pixel_store`'s files, read back from a memory map."""

import errno
import io
import os
import sqlite3
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from thesis_lib import paths
from thesis_lib.datasets.missing import choose
from thesis_lib.datasets.pixel_store import Index, Record, Store

COMMIT_EVERY = 256
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What Pillow's decoders raise at damaged files: RuntimeError those of AVIF and DDS, AttributeError that of SPIDER.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, AttributeError, Image.DecompressionBombError)


class Source(Protocol):
    """An image that is no file of its own: `key` names it, `stamp` (bytes, mtime_ns) changes when its content may."""

    key: str
    stamp: tuple[int, int]

    def read(self) -> bytes: ...


class File:
    """An image file as a `Source`."""

    def __init__(self, path: str | Path) -> None:
        self.key = os.path.abspath(path)

    @property
    def stamp(self) -> tuple[int, int]:
        status = os.stat(self.key)
        return status.st_size, status.st_mtime_ns

    def read(self) -> bytes:
        return Path(self.key).read_bytes()


def read_rgb(data: bytes, name: object) -> Image.Image:
    """Decode an image file's bytes to RGB as `rgb` does; a ValueError names what cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UNREADABLE as error:
        raise ValueError(f"{name} is not a whole image: {why(error)}") from error
    return rgb(image, name)


def why(error: Exception) -> object:
    """Say why bytes are no image: always in the same words, while Pillow's name a place in memory."""
    return "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error


def rgb(image: Image.Image, name: object = "") -> Image.Image:
    """Convert to RGB as DreamSim does; of 16-bit grey, which Pillow would clip to white, take the upper byte.

    Raises ValueError, naming image and mode, for 32-bit and float images, whose white no file tells, and for LAB.
    """
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"{name or 'the image'} has the mode {image.mode}, which is no RGB: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode(data: bytes, size: int, interpolation: str = "bicubic", name: object = "the image") -> np.ndarray:
    """Decode, squash to `size` × `size` without cropping, return (3, size, size) uint8: DreamSim's geometry."""
    image = read_rgb(data, name).resize((size, size), Image.Resampling[interpolation.upper()])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (3, S, S)


def cache(
    sources: Iterable[str | Path | Source],
    size: int,
    *,
    interpolation: str = "bicubic",
    folder: str | Path | None = None,
    workers: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> "Pixels":
    """Decode the images that the cache lacks, on all cores, and return all of them as `Pixels`.

    Safe to interrupt and to run again, and from several processes at once: the later ones wait. An image that cannot
    be decoded is a ValueError that names it; with on_error="skip" it is listed in `Pixels.skipped` instead. A full disk
    is a RuntimeError and loses no finished image.
    """
    choose(on_error, ("raise", "skip"), "on_error")
    choose(interpolation, [method.name.lower() for method in Image.Resampling], "interpolation")
    if size < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size}")
    sources = [File(source) if isinstance(source, str | Path) else source for source in sources]
    if not sources:
        raise ValueError("no images to cache: the list is empty")
    store = Store(Path(folder or paths.CACHE / "pixels"), size, interpolation)
    with store.open() as index:
        distinct = {source.key: source for source in sources}
        pending = [source for source in distinct.values() if not _is_current(index, source)]
        bar = tqdm(
            desc=f"decoding at {size} px",
            total=len(distinct),
            initial=len(distinct) - len(pending),
            unit="image",
            disable=not (progress and pending),
        )
        with bar:
            skipped = _fill(index, pending, workers or os.cpu_count() or 1, on_error, bar)
        records = [None if source.key in skipped else index.record(source.key) for source in sources]
    return Pixels(store, sources, records, skipped)


class Pixels:
    """Decoded images by position: `pixels[indices]` is a uint8 tensor (b, 3, S, S), an int gives (3, S, S).

    Positions are those of the images asked for. `keys` and `digests` name every image and its content. Where an image
    was skipped `usable` (n,) bool is False and the digest ""; `skipped` lists these with the reason. Every record's crc
    is checked when it is first read; a corrupt one is made again from its source, or refused with a RuntimeError.
    """

    def __init__(
        self, store: Store, sources: Sequence[Source], records: Sequence[Record | None], skipped: dict[str, str]
    ) -> None:
        self._store, self._sources = store, sources
        self._rows = np.array([record.row if record else -1 for record in records], np.int64)
        self._crcs = np.array([record.crc if record else 0 for record in records], np.int64)
        self._checked = np.zeros(len(sources), bool)
        self._positions = np.arange(len(sources))
        self._map = None
        self.size = store.size
        self.keys = [source.key for source in sources]
        self.digests = [record.digest.hex() if record else "" for record in records]
        self.usable = self._rows >= 0
        self.skipped = list(skipped.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: int | slice | Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        positions = self._positions[indices.cpu().numpy() if isinstance(indices, torch.Tensor) else indices]
        flat = positions.reshape(-1)
        if not self.usable[flat].all():
            first = flat[~self.usable[flat]][0]
            raise IndexError(f"{self.keys[first]} was skipped: it has no pixels; choose positions by `usable`")
        images = self._records()[self._rows[flat]]  # (b, 3·S·S)
        for k in np.flatnonzero(~self._checked[flat]).tolist():
            if zlib.crc32(images[k]) != self._crcs[flat[k]]:
                images[k] = np.frombuffer(self._repair(flat[k]), np.uint8)
        self._checked[flat] = True
        return torch.from_numpy(images).view(*positions.shape, 3, self.size, self.size)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_map": None}  # a worker process maps the file itself

    def _records(self) -> np.ndarray:
        if self._map is None:
            self._map = self._store.map()
        return self._map

    def _repair(self, position: int) -> bytes:
        """Make a corrupt record again from its source, write it back and return it."""
        source, digest, row = self._sources[position], bytes.fromhex(self.digests[position]), int(self._rows[position])
        refusal = f"the record of {source.key} in {self._store.data} is corrupt"
        try:
            data = source.read()
        except OSError as error:
            raise RuntimeError(f"{refusal}, and its source cannot be read: {error}") from error
        if content_digest(data) != digest:
            raise RuntimeError(f"{refusal}, and its source has changed since: cache these images again")
        warnings.warn(f"{refusal}; it is made again from its source", RuntimeWarning, stacklevel=4)
        pixels = decode(data, self.size, self._store.interpolation, source.key).tobytes()
        with self._store.open() as index:
            index.write(pixels, row)
            index.records[digest] = Record(digest, row, zlib.crc32(pixels))
            index.commit([digest], [])
        self._crcs[self._rows == row] = zlib.crc32(pixels)
        return pixels


def content_digest(data: bytes) -> bytes:
    """Return the fingerprint of a file's bytes by which caches know an image again."""
    return blake2b(data, digest_size=16).digest()


def _is_current(index: Index, source: Source) -> bool:
    try:
        return index.current(source.key, source.stamp)
    except OSError:
        return False  # reading it will say what is wrong with the file


def _fill(index: Index, pending: list[Source], workers: int, on_error: str, bar: tqdm) -> dict[str, str]:
    """Decode into the index's store; return what was skipped: key → reason."""
    store, skipped, digests, keys = index.store, {}, [], []
    done = bar.n  # a bar that is not shown does not count

    def work(source: Source) -> tuple[tuple[int, int], bytes, bytes | None]:
        try:
            stamp, data = tuple(source.stamp), source.read()
        except OSError as error:
            raise ValueError(f"{source.key} cannot be read: {error.strerror or error}") from error
        digest = content_digest(data)
        if digest in index.records:
            return stamp, digest, None
        return stamp, digest, decode(data, store.size, store.interpolation, source.key).tobytes()

    # Pillow decodes and resizes outside the interpreter's lock: threads use all cores, and nothing is pickled.
    with ThreadPoolExecutor(workers) as pool:
        try:
            for source, future in ahead(pool, work, pending, depth=4 * workers):
                try:
                    stamp, digest, pixels = future.result()
                except ValueError as error:
                    if on_error == "raise":
                        raise ValueError(f"{error}; replace it, or go on without it by on_error='skip'") from error
                    skipped[source.key] = str(error)
                else:
                    if digest not in index.records:
                        index.append(digest, pixels, zlib.crc32(pixels))
                        digests.append(digest)
                    index.files[source.key] = (*stamp, digest)
                    keys.append(source.key)
                    if len(keys) >= COMMIT_EVERY:
                        index.commit(digests, keys)
                        digests, keys = [], []
                done += 1
                bar.update()
            index.commit(digests, keys)
        except BaseException as error:  # Ctrl-C, a bad image, a full disk: keep what is finished
            pool.shutdown(wait=False, cancel_futures=True)
            index.cut()
            full = _is_full(error)
            try:
                index.commit(digests, keys)
            except sqlite3.OperationalError as again:
                full |= _is_full(again)
            if not full:
                raise
            need = (bar.total - done) * store.record_bytes / 2**20
            raise RuntimeError(
                f"no room left for {store.data}: {done} of {bar.total} images are finished and kept; free "
                f"{need:,.0f} MiB there, then run the same again"
            ) from error
    return skipped


def _is_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in NO_ROOM


def ahead(
    pool: ThreadPoolExecutor, work: Callable, items: Iterable[Source], depth: int
) -> Iterator[tuple[Source, Future]]:
    """Yield items in order with their futures, at most `depth` of them under way: memory stays flat."""
    queue: deque = deque()
    for item in items:
        queue.append((item, pool.submit(work, item)))
        if len(queue) >= depth:
            yield queue.popleft()
    yield from queue
