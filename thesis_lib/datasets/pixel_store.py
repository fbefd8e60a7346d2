"""The files behind `thesis_lib.datasets.pixels`: equal records in one flat file, and an SQLite index beside it.

The index maps the digest of an image file's content → record and its crc32, and a path with size and time → digest, so
that an unchanged file is not even opened; files with equal content share a record. Records are only ever appended, and
an index row is committed after its record: whatever a crash leaves behind the last commit is cut off and made again.
"""

import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from thesis_lib.processes import held

# A damaged schema shows as a plain SQLITE_ERROR: no such column.
CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
TABLES = """
CREATE TABLE IF NOT EXISTS records (digest BLOB PRIMARY KEY, row INTEGER NOT NULL UNIQUE, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS files (key TEXT PRIMARY KEY, bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
                                  digest BLOB NOT NULL);
"""


class Record(NamedTuple):
    """Where a content lies in the flat file, and its crc32."""

    digest: bytes
    row: int
    crc: int


class Store:
    """The files of one (size, interpolation): where they are, and how to open them for writing, alone."""

    def __init__(self, folder: Path, size: int, interpolation: str) -> None:
        self.size, self.interpolation, self.record_bytes = size, interpolation, 3 * size * size
        self.data = folder.absolute() / f"{size}px-{interpolation}.uint8"
        self.index = self.data.with_suffix(".sqlite")

    def map(self) -> np.ndarray:
        """Map the records, (rows, 3·S·S) uint8, read-only."""
        rows = self.data.stat().st_size // self.record_bytes
        return np.asarray(np.memmap(self.data, np.uint8, "r", shape=(rows, self.record_bytes)))

    @contextmanager
    def open(self) -> Iterator["Index"]:
        """Lock the store against other processes and load its index; one that is corrupt is started anew.

        RuntimeError where the disk has no room for it.
        """
        self.data.parent.mkdir(parents=True, exist_ok=True)
        with held(self.data.with_suffix(".lock"), f"waiting for another process that fills {self.data}"):
            try:
                index = Index(self)
            except sqlite3.DatabaseError as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none: text that is no text
                if code & 0xFF == sqlite3.SQLITE_FULL:
                    raise RuntimeError(f"no room left for {self.index}: free some and run the same again") from error
                if code & 0xFF not in CORRUPT:
                    raise
                warnings.warn(f"{self.index} is corrupt ({error}): it is made again", RuntimeWarning, stacklevel=4)
                for path in (self.index, self.index.with_suffix(".sqlite-journal"), self.data):
                    path.unlink(missing_ok=True)
                index = Index(self)
            with closing(index.database), index.file:
                yield index


class Index:
    """A store opened for writing; lives only under the store's lock."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.database = sqlite3.connect(store.index)
        try:
            self.database.executescript(TABLES)
            if (verdict := self.database.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(verdict)
            rows = self.database.execute("SELECT digest, row, crc FROM records")
            self.records = {record.digest: record for record in map(Record._make, rows)}
            files = self.database.execute("SELECT key, bytes, mtime_ns, digest FROM files")
            self.files = {key: (size, time, digest) for key, size, time, digest in files}
        except sqlite3.DatabaseError:
            self.database.close()
            raise
        self.file = open(store.data, "r+b" if store.data.exists() else "w+b", buffering=0)
        self._heal()

    def _heal(self) -> None:
        """Make index and data agree: forget records that are not there, cut off those that were never committed."""
        present = os.fstat(self.file.fileno()).st_size // self.store.record_bytes
        if lost := [record.digest for record in self.records.values() if record.row >= present]:
            with self.database:
                self.database.executemany("DELETE FROM records WHERE digest = ?", [(digest,) for digest in lost])
            for digest in lost:
                del self.records[digest]
        self.rows = 1 + max((record.row for record in self.records.values()), default=-1)
        self.cut()

    def record(self, key: str) -> Record | None:
        """Return the record of a path or key as it was when last seen."""
        return self.records.get(self.files.get(key, (0, 0, b""))[2])

    def current(self, key: str, stamp: tuple[int, int]) -> bool:
        """Say whether the record of a key is there, and its file is unchanged since."""
        return self.record(key) is not None and self.files[key][:2] == tuple(stamp)

    def append(self, digest: bytes, pixels: bytes, crc: int) -> None:
        self.write(pixels, self.rows)
        self.records[digest] = Record(digest, self.rows, crc)
        self.rows += 1

    def write(self, pixels: bytes, row: int) -> None:
        self.file.seek(row * self.store.record_bytes)
        view = memoryview(pixels)
        while view:  # an unbuffered write may be a short one; the next then says why
            view = view[self.file.write(view) :]

    def cut(self) -> None:
        """Cut off what was written behind the last whole record."""
        self.file.truncate(self.rows * self.store.record_bytes)

    def commit(self, digests: Iterable[bytes], keys: Iterable[str]) -> None:
        # No fsync of the data: should the machine stop between the two, the crc shows it and the record is made again.
        with self.database:
            records = [self.records[digest] for digest in digests]
            self.database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", records)
            files = [(key, *self.files[key]) for key in keys]
            self.database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", files)
