"""CIFAR-10 (Krizhevsky 2009) from the published python batches: checked by md5, unpickled without running anything.

On disk: `cifar-10-batches-py/` with `data_batch_1` to `data_batch_5`, `test_batch` and `batches.meta`, pickles of
dictionaries with `data` (n, 3072) uint8, red, green and blue planes row by row, and `labels`. A set of one's own in
this format brings its sums along in a file `MD5SUMS`, as md5sum writes it, in place of the published ones.

    python -m thesis_lib.datasets.cifar10 download ROOT
"""

import argparse
import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thesis_lib.datasets.missing import choose, missing

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER, SUMS = "cifar-10-batches-py", "MD5SUMS"
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
SPLITS = {"train": [name for name in MD5 if name.startswith("data_batch")], "test": ["test_batch"]}
COMMAND = "python -m thesis_lib.datasets.cifar10"
SIZE = 32
# All that a pickled array of numbers needs, under numpy's older and newer module names.
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class CIFAR10:
    """Read one split: `images` (n, 3, 32, 32) uint8 tensor, `labels` (n,) int64, `classes` the label names.

    `class_counts` (classes,) int64. root: the folder that holds `cifar-10-batches-py`, or that folder itself.
    Raises FileNotFoundError for a missing set or batch, RuntimeError for a file whose md5 differs, ValueError for a
    pickle that holds anything but arrays and plain values, for arrays of another shape and for labels without a name.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        choose(split, SPLITS, "CIFAR-10 split")
        root = Path(root).expanduser().absolute()
        self.root, self.split = (root / FOLDER if (root / FOLDER).is_dir() else root), split
        names = [*SPLITS[split], "batches.meta"]
        absent = [name for name in names if not (self.root / name).is_file()]
        if absent:
            found = f"there is no {', '.join(absent)}" if self.root.is_dir() else "there is no such folder"
            raise _missing(root, found)
        sums = _sums(self.root)
        contents = {name: _unpickle(self.root / name, sums) for name in names}
        self.classes = tuple(
            str(name) for name in _field(contents["batches.meta"], "label_names", self.root / names[-1])
        )
        parts = [_batch(contents[name], self.root / name, len(self.classes)) for name in SPLITS[split]]
        images = np.concatenate([data for data, _ in parts]).reshape(-1, 3, SIZE, SIZE)
        self.images = torch.from_numpy(images)
        self.labels = np.concatenate([labels for _, labels in parts])
        if not len(self.labels):
            raise ValueError(f"the split {split!r} of {self.root} is empty")
        self.class_counts = np.bincount(self.labels, minlength=len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)


def download(root: str | Path) -> Path:
    """Fetch the published archive (170 MB, md5 checked) and unpack it into `root`; what is there already is kept.

    Raises RuntimeError where it could not be fetched or is not what was published.
    """
    import pooch

    root = Path(root).expanduser()
    if all((root / FOLDER / name).is_file() for name in MD5):
        return root / FOLDER
    try:
        archive = pooch.retrieve(URL, f"md5:{ARCHIVE_MD5}", fname=Path(URL).name, path=root, progressbar=True)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a wrong md5 is pooch's ValueError
        raise RuntimeError(f"CIFAR-10 could not be fetched from {URL}: {error}") from error
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")  # refuses paths and links that leave `root`
    return root / FOLDER


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    if not path.is_file():
        return MD5
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise ValueError(f"{path} must hold an md5 and a file name a line, as md5sum writes them")
    return {name.strip().lstrip("*"): digest.lower() for digest, name in lines}


def _unpickle(path: Path, sums: dict[str, str]) -> dict[str, Any]:
    """Check a file's md5, then read its dictionary; keys written by Python 2 as bytes come back as text."""
    content = path.read_bytes()
    digest, expected = hashlib.md5(content, usedforsecurity=False).hexdigest(), sums.get(path.name)
    if digest != expected:
        known = f"expected {expected}" if expected else f"{SUMS} does not name it"
        raise RuntimeError(
            f"{path} has the md5 {digest}, {known}: it is damaged or of another set. Delete it, then fetch it again: "
            f"{COMMAND} download {path.parent.parent}"
        )
    try:
        found = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path} is no pickle of arrays and plain values only: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a dictionary")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}


def _field(content: dict[str, Any], name: str, path: Path) -> Any:
    if name not in content:
        raise ValueError(f"{path} has no entry {name!r}; it has {', '.join(map(str, content))}")
    return content[name]


def _batch(content: dict[str, Any], path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    data, labels = np.asarray(_field(content, "data", path)), np.asarray(_field(content, "labels", path))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIZE**2:
        raise ValueError(f"{path}: data must be uint8 (n, {3 * SIZE**2}), not {data.dtype} {data.shape}")
    if labels.shape != data.shape[:1] or (len(labels) and labels.dtype.kind not in "iu"):
        raise ValueError(f"{path} has {len(data)} images, and labels of shape {labels.shape} and type {labels.dtype}")
    labels = labels.astype(np.int64)
    strange = sorted(set(labels[(labels < 0) | (labels >= classes)].tolist()))
    if strange:
        raise ValueError(f"{path} has labels that batches.meta does not name: {strange[:5]}")
    return data, labels


def _missing(root: Path, found: str) -> FileNotFoundError:
    return missing(
        root,
        found,
        name="CIFAR-10",
        contents="60,000 images of 32x32 pixels in 10 classes as python batches: train 50,000, test 10,000",
        size="170 MB",
        published=f"{URL} (md5 {ARCHIVE_MD5}); fetch it by: {COMMAND} download {root}",
        parameter="`root` of CIFAR-10 in 07's `datasets`",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Fetch CIFAR-10.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("download", help="fetch the published python batches (170 MB)")
    fetch.add_argument("root", type=Path, help="folder to unpack into")
    options = parser.parse_args(arguments)
    try:
        print(f"CIFAR-10 is at {download(options.root)}")
    except (OSError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
