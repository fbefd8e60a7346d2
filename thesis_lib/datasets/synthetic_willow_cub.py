"""Write the pictures of synthetic_correspondence.py as PF-WILLOW and CUB-200-2011 are published."""

from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from thesis_lib.datasets import scenes, synthetic
from thesis_lib.datasets.scenes import KINDS, Stream
from thesis_lib.datasets.synthetic_correspondence import FRAME, KEYPOINTS, Picture, draw, draw_picture, photograph
from thesis_lib.processes import side_by_side

WHOLE = (0, 0, FRAME, FRAME)


def draw_whole(key: tuple[int, ...], kind: int) -> Picture:
    """Draw a picture of one thing, whole and with all limbs, so that every key-point is seen."""
    stream = Stream(*key)
    while True:
        scene, main = draw(stream, kind, crowded=False, limbs=3)
        picture = photograph(scene, main, stream.below(2**31), WHOLE)
        if len(picture.points) == len(KEYPOINTS):
            return picture


def _willow_image(item: tuple[int, int], folder: Path, seed: int) -> tuple[str, dict]:
    kind, index = item
    picture = draw_whole((seed, 210, kind, index), kind)
    name = f"PF-dataset/{KINDS[kind]}(S)/{KINDS[kind]}_{index:04d}.png"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.pixels).save(folder / name)
    return name, picture.points


def write_willow(root: str | Path, pairs: int, *, images: int = 10, seed: int = 0, workers: int | None = None) -> Path:
    """Write PF-dataset/ and test_pairs_pf.csv; `images` pictures of every kind, all ten points in each."""
    most = len(KINDS) * images * (images - 1) // 2
    if not 1 <= pairs <= most:
        raise ValueError(f"{images} images of each kind make from 1 to {most} pairs, not {pairs}: ask for more images")

    def write(folder: Path) -> None:
        items = [(kind, index) for kind in range(len(KINDS)) for index in range(images)]
        work = partial(_willow_image, folder=folder, seed=seed)
        found = list(side_by_side(work, items, workers=workers, chunksize=4, total=len(items), label="images"))
        kinds = [found[i : i + images] for i in range(0, len(found), images)]
        couples = [couple for kind in kinds for couple in combinations(kind, 2)]
        order = np.argsort(Stream(seed, 211).uniforms(len(couples)), kind="stable")[:pairs]
        rows = []
        for i in sorted(order):
            (source, source_points), (target, target_points) = couples[i]
            values = [[points[key][axis] for key in KEYPOINTS] for points in (source_points, target_points)
                      for axis in (0, 1)]  # fmt: skip
            rows.append([source, target, *np.round(np.concatenate(values), 3)])
        columns = ["imageA", "imageB", *(f"{axis}{side}{i}" for side in "AB" for axis in "XY" for i in range(1, 11))]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "test_pairs_pf.csv", index=False)

    recipe = {"format": "PF-WILLOW", "pairs": pairs, "images": images, "seed": seed, "world": scenes.VERSION}
    return synthetic.once(Path(root), recipe, write)


def _cub_image(item: tuple[int, int], folder: Path, seed: int) -> Picture:
    kind, index = item
    picture = draw_picture((seed, 220, kind, index), kind, crowded=index % 2 == 1)
    path = folder / _cub_name(kind, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.pixels).save(path, quality=95)
    return picture


def _cub_name(kind: int, index: int) -> str:
    title = KINDS[kind].capitalize()
    return f"images/{kind + 1:03d}.{title}/{title}_{index:04d}.jpg"


def write_cub(root: str | Path, *, images: int = 12, seed: int = 0, workers: int | None = None) -> Path:
    """Write images.txt, classes.txt, labels, split, boxes and parts/; half of a class's `images` are for training."""

    def write(folder: Path) -> None:
        items = [(kind, index) for kind in range(len(KINDS)) for index in range(images)]
        work = partial(_cub_image, folder=folder, seed=seed)
        pictures = list(side_by_side(work, items, workers=workers, chunksize=4, total=len(items), label="images"))
        lines = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
        parts = []
        for number, ((kind, index), picture) in enumerate(zip(items, pictures, strict=True), 1):
            left, top, right, bottom = picture.box
            lines["images"].append(f"{number} {_cub_name(kind, index).removeprefix('images/')}")
            lines["image_class_labels"].append(f"{number} {kind + 1}")
            lines["train_test_split"].append(f"{number} {int(index < images // 2)}")
            lines["bounding_boxes"].append(f"{number} {left:.1f} {top:.1f} {right - left:.1f} {bottom - top:.1f}")
            for part, key in enumerate(KEYPOINTS, 1):
                x, y = picture.points.get(key, (0.0, 0.0))
                parts.append(f"{number} {part} {x:.1f} {y:.1f} {int(key in picture.points)}")
        lines["classes"] = [f"{kind + 1} {kind + 1:03d}.{name.capitalize()}" for kind, name in enumerate(KINDS)]
        (folder / "parts").mkdir()
        lines["parts/parts"] = [f"{part} {name}" for part, (name, _, _) in enumerate(KEYPOINTS.values(), 1)]
        lines["parts/part_locs"] = parts
        for name, content in lines.items():
            (folder / f"{name}.txt").write_text("\n".join(content) + "\n")

    recipe = {"format": "CUB-200-2011", "images": images, "seed": seed, "world": scenes.VERSION}
    return synthetic.once(Path(root), recipe, write)
