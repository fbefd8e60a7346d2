"""Image pairs with matching key-points, whatever published tree they come from, and what is wrong with the others.

Points are (x, y) and boxes (x1, y1, x2, y2), float32, in pixels of the image as it lies on disk.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from thesis_lib.datasets.missing import choose
from thesis_lib.datasets.pixels import UNREADABLE

SUBSET_SEED = 42  # DistillDIFT's


@dataclass(frozen=True, eq=False)
class Pair:
    """A source and a target image (indices into `Pairs.images`) and their common points, (P, 2) float32 each."""

    name: str
    category: str
    source: int
    target: int
    keypoints: tuple[str, ...]
    source_points: np.ndarray
    target_points: np.ndarray
    target_box: np.ndarray
    factors: dict[str, int]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a split; `sizes` (n, 2) holds widths and heights, `skipped` why a pair is not among them."""

    dataset: str
    split: str
    images: list[Path]
    sizes: np.ndarray
    pairs: list[Pair]
    skipped: dict[str, str]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def categories(self) -> list[str]:
        """Name the category of each image, of its first pair: what a prompt says is in it."""
        first: dict[int, str] = {}
        for pair in self.pairs:
            first.setdefault(pair.source, pair.category)
            first.setdefault(pair.target, pair.category)
        return [first.get(i, "object") for i in range(len(self.images))]


class Collector:
    """Takes pairs one by one and keeps what is wrong with the others."""

    def __init__(self, dataset: str, split: str, root: Path, on_error: str) -> None:
        choose(on_error, ("raise", "skip"), "on_error")
        self.dataset, self.split, self.root, self.on_error = dataset, split, root, on_error
        self.places: dict[Path, int] = {}
        self.sizes: list[tuple[int, int]] = []
        self.pairs: list[Pair] = []
        self.skipped: dict[str, str] = {}
        self.wrong: list[str] = []

    def image(self, name: str) -> int:
        """Return the index of an image by its path below the root; ValueError if it is not there or is none."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"the image {name} leaves the data set's root")
        path = self.root / name
        if path not in self.places:
            try:
                with Image.open(path) as image:
                    size = image.size
            except FileNotFoundError as error:
                raise ValueError(f"the image {path} is missing") from error
            except UNREADABLE as error:
                raise ValueError(f"{path} is not an image: {error}") from error
            self.places[path] = len(self.sizes)
            self.sizes.append(size)
        return self.places[path]

    def collect(self, names: Iterable[str], read: Callable[[str], Pair]) -> None:
        for name in names:
            try:
                self.pairs.append(self._check(read(name)))
            except ValueError as error:
                self.skipped[name] = str(error)
                self.wrong.append(name)

    def _check(self, pair: Pair) -> Pair:
        for points, place in ((pair.source_points, pair.source), (pair.target_points, pair.target)):
            if points.shape != (len(pair.keypoints), 2):
                raise ValueError(f"{len(pair.keypoints)} key-points are named, but points have shape {points.shape}")
            outside = ~((points >= 0) & (points <= self.sizes[place])).all(axis=1)  # written so that NaN is outside
            if outside.any():
                first = points[outside][0].tolist()
                raise ValueError(f"{outside.sum()} key-points lie outside the image, the first at {first}")
        if not len(pair.keypoints):
            raise ValueError("no key-point is visible in both images")
        if not (np.isfinite(pair.target_box).all() and (pair.target_box[2:] > pair.target_box[:2]).all()):
            raise ValueError(f"the target's box {pair.target_box.tolist()} is empty or endless")
        return pair

    def finish(self) -> Pairs:
        if self.wrong and self.on_error == "raise":
            shown = "; ".join(f"{name}: {self.skipped[name]}" for name in self.wrong[:3])
            raise ValueError(
                f"{len(self.wrong)} pairs of {self.dataset} {self.split} are unusable ({shown}); mend them, or go on "
                "without them by on_error='skip': they are counted beside every result"
            )
        if not self.pairs:
            raise ValueError(f"{self.dataset} has no usable pair in split {self.split!r}")
        sizes = np.array(self.sizes, np.int64).reshape(-1, 2)
        return Pairs(self.dataset, self.split, list(self.places), sizes, self.pairs, self.skipped)


def subset(count: int, size: int | None) -> list[int]:
    """Choose `size` of `count` rows at random, in order, always the same ones; a smaller choice is within a larger."""
    if size is not None and size < 1:
        raise ValueError(f"max_samples must be at least 1, or None for all pairs; got {size}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SUBSET_SEED))
    return sorted(order[: count if size is None else size].tolist())
