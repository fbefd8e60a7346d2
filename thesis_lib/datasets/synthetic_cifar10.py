"""Write pictures of two things, classified by their two colours, as CIFAR-10 and ImageNet-100 are published."""

import hashlib
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from thesis_lib.datasets import cifar10, rendering, scenes
from thesis_lib.datasets.scenes import Scene, Stream
from thesis_lib.datasets.synthetic import once

SIZE = 32
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # scenes.HUES of them
LABEL_NAMES = tuple(" and ".join(pair) for pair in combinations([c for c in COLOURS if c != "cyan"], 2))  # ten
LARGE_NAMES = tuple(" and ".join(pair) for pair in combinations(COLOURS, 2))  # fifteen
PLACES = ((3, 5), (1, 7), (0, 8), (2, 6))  # cells that lie opposite each other
IMAGENET = pa.schema(
    {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64(), "text": pa.string()}
)


def draw(
    seed: int, split: int, index: int, *, names: Sequence[str] = LABEL_NAMES, size: int = SIZE
) -> tuple[np.ndarray, int]:
    """Draw one picture (size, size, 3) uint8 and its label; of len(names) pictures each class has one."""
    classes = len(names)
    label = (7 * index + index // classes) % classes
    stream = Stream(seed, 200 + split, index)
    cells, swapped = stream.choice(PLACES), stream.chance(0.5)
    things = (scenes.draw_thing(stream, cell=cell) for cell in cells)
    hues = [COLOURS.index(colour) for colour in names[label].split(" and ")][:: -1 if swapped else 1]
    scene = Scene(
        tuple(scenes.replace(thing, hue=hue, large=True) for thing, hue in zip(things, hues, strict=True)), gaze=0
    )
    return rendering.render(scene, stream.below(2**31), size), label


def write_cifar10(root: Path, counts: Mapping[str, int], *, seed: int = 0) -> Path:
    """Write `counts` pictures of "train", in five batches, and "test": cifar-10-batches-py/ as published, and MD5SUMS.

    Kinds, limbs, headings, textures and places of the things, background and light vary within a class: no part of the
    picture tells it alone. Raises ValueError for fewer than five training pictures or none to test, FileExistsError as
    the other writers do.
    """
    if counts.get("train", 0) < 5 or counts.get("test", 0) < 1:
        raise ValueError(f"five batches need counts of train of at least 5, and test of at least 1; got {dict(counts)}")

    def write(folder: Path) -> None:
        folder = folder / cifar10.FOLDER
        folder.mkdir()
        train, test = np.array_split(np.arange(counts["train"]), 5), np.arange(counts["test"])
        files = [(f"data_batch_{i + 1}", f"training batch {i + 1} of 5", 0, part) for i, part in enumerate(train)]
        for name, title, split, part in [*files, ("test_batch", "testing batch 1 of 1", 1, test)]:
            drawn = [draw(seed, split, int(index)) for index in tqdm(part, desc=name, leave=False)]
            content = {
                "batch_label": title,
                "labels": [label for _, label in drawn],
                "data": np.stack([picture.transpose(2, 0, 1).reshape(-1) for picture, _ in drawn]),  # (n, 3072)
                "filenames": [
                    f"{LABEL_NAMES[label]}_{index:06d}.png".replace(" ", "_")
                    for index, (_, label) in zip(part, drawn, strict=True)
                ],
            }
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        meta = {"num_cases_per_batch": len(train[0]), "label_names": list(LABEL_NAMES), "num_vis": 3072}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
        sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in cifar10.MD5]
        (folder / cifar10.SUMS).write_text("".join(sums))

    recipe = {"format": "CIFAR-10", "counts": dict(counts), "seed": seed, "size": SIZE, "world": scenes.VERSION}
    return once(Path(root), recipe, write)


def write_imagenet100(root: Path, counts: Mapping[str, int], *, seed: int = 0, size: int = 96) -> Path:
    """Write such pictures in six colours, fifteen classes, as ImageNet-100 is published: a parquet shard a split.

    Raises FileExistsError as the other writers do.
    """

    def write(folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / "label2text.json").write_text(json.dumps(dict(enumerate(LARGE_NAMES)), indent=1) + "\n")
        for split, (name, count) in enumerate(counts.items(), start=2):
            rows = []
            for index in tqdm(range(count), desc=name, leave=False):
                picture, label = draw(seed, split, index, names=LARGE_NAMES, size=size)
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "JPEG", quality=95)
                image = {"bytes": file.getvalue(), "path": f"{index:08d}.jpg"}
                rows.append({"image": image, "label": label, "text": LARGE_NAMES[label]})
            pq.write_table(pa.Table.from_pylist(rows, IMAGENET), folder / "data" / f"{name}-00000-of-00001.parquet")

    recipe = {"format": "ImageNet-100 of pairs", "counts": dict(counts), "seed": seed, "size": size}
    return once(Path(root), recipe | {"world": scenes.VERSION}, write)
