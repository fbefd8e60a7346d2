"""Write the synthetic world (scenes.py) in the published formats of the real data sets.

The trees written here are read by the same loaders as the real ones: no code path is demo-only.
"""

import io
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from thesis_lib.datasets import rendering, scenes
from thesis_lib.datasets.scenes import Scene, Stream
from thesis_lib.processes import held, side_by_side

NIGHTS_SPLITS = ("train", "val", "test")
TEMPERATURE = 0.4  # of a voter: how small a difference in dissimilarity is a coin's toss
MAX_VOTES = 10
MIN_VOTES_KEPT = 4  # the published csv keeps rows of fewer than 6 unanimous votes too
IMAGENET_KINDS = ("disc", "clover", "star")  # the categories that play ImageNet's part in is_imagenet
SIZE = 128


@dataclass(frozen=True)
class Triplet:
    reference: Scene
    left: Scene
    right: Scene
    views: tuple[int, int, int]
    right_vote: int
    votes: int

    @property
    def category(self) -> str:
        """Name the kind that the reference shows most (the first of equals)."""
        kinds = [thing.kind for thing in self.reference.things]
        return scenes.KINDS[max(kinds, key=kinds.count)]


def draw_triplet(seed: int, split: int, index: int) -> Triplet:
    """Draw a triplet and its votes; of triplets 2k and 2k+1 one goes left, one right.

    Voters toss a coin whose bias is the logistic function of the difference in dissimilarity; they are asked until
    one dissents or MAX_VOTES agree, and triplets of fewer than MIN_VOTES_KEPT unanimous votes are drawn again.
    """
    right = Stream(seed, split, index // 2, 0).below(2) ^ (index % 2)
    stream = Stream(seed, split, index, 1)
    while True:
        reference = scenes.draw_scene(stream)
        a, b = scenes.edit_scene(reference, stream), scenes.edit_scene(reference, stream)
        margin = scenes.dissimilarity(reference, b) - scenes.dissimilarity(reference, a)
        prefer_a = 1 / (1 + math.exp(-max(-50.0, min(50.0, margin / TEMPERATURE))))
        ballots = [stream.chance(prefer_a) for _ in range(MAX_VOTES)]
        votes = next((i for i, ballot in enumerate(ballots) if ballot != ballots[0]), MAX_VOTES)
        if votes >= MIN_VOTES_KEPT:
            winner, loser = (a, b) if ballots[0] else (b, a)
            views = tuple(stream.below(2**31) for _ in range(3))
            left, right_scene = (loser, winner) if right else (winner, loser)
            return Triplet(reference, left, right_scene, views, right, votes)


def _encode(scene: Scene, view: int, size: int, image_format: str) -> bytes:
    buffer = io.BytesIO()
    options = {"compress_level": 1} if image_format == "PNG" else {"quality": 95}
    Image.fromarray(rendering.render(scene, view, size)).save(buffer, image_format, **options)
    return buffer.getvalue()


def once(root: Path, recipe: Mapping, write: Callable[[Path], None]) -> Path:
    """Write a tree beside its place and move it there whole; do nothing where the same recipe is finished already.

    Raises FileExistsError where `root` holds anything else: nothing is ever overwritten.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with held(root.with_name(f".{root.name}.lock"), f"waiting for another process that writes {root}"):
        return _once(root, json.loads(json.dumps(recipe)), write)


def _once(root: Path, recipe: Mapping, write: Callable[[Path], None]) -> Path:
    stamp = "synthetic.json"
    if root.exists():
        if (root / stamp).is_file() and json.loads((root / stamp).read_text()) == recipe:
            return root
        raise FileExistsError(
            f"{root} exists and was not made by this recipe: remove it, or choose another dataset_root"
        )
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    (part / stamp).write_text(json.dumps(recipe, indent=1) + "\n")
    part.replace(root)
    return root


def _write_triplet(row: tuple[int, int, int], folder: Path, seed: int, size: int) -> dict:
    identifier, split, index = row
    triplet = draw_triplet(seed, split, index)
    high, low = divmod(identifier, 1000)
    names = (
        f"ref/{high:03d}/{low:03d}.png",
        f"distort/{high:03d}/{low:03d}_0.png",
        f"distort/{high:03d}/{low:03d}_1.png",
    )
    pictured = zip((triplet.reference, triplet.left, triplet.right), triplet.views, names, strict=True)
    for scene, view, name in pictured:
        (folder / name).write_bytes(_encode(scene, view, size, "PNG"))
    return {
        "id": identifier,
        "left_vote": 1 - triplet.right_vote,
        "right_vote": triplet.right_vote,
        "votes": triplet.votes,
        "ref_path": names[0],
        "left_path": names[1],
        "right_path": names[2],
        "split": NIGHTS_SPLITS[split],
        "is_imagenet": triplet.category in IMAGENET_KINDS,
        "prompt": f"An image of a {triplet.category}",
    }


def write_nights(
    root: Path, counts: Mapping[str, int], *, seed: int = 0, size: int = SIZE, workers: int | None = None
) -> Path:
    """Write triplets and votes in the layout of NIGHTS: data.csv, ref/XXX/YYY.png, distort/XXX/YYY_{0,1}.png.

    `counts` gives the rows of each split, before any filter on votes.
    """

    def write(folder: Path) -> None:
        splits = [(split, index) for split, name in enumerate(NIGHTS_SPLITS) for index in range(counts.get(name, 0))]
        rows = [(identifier, *row) for identifier, row in enumerate(splits)]
        for kind, high in product(("ref", "distort"), range(-(-len(rows) // 1000))):
            (folder / kind / f"{high:03d}").mkdir(parents=True)
        work = partial(_write_triplet, folder=folder, seed=seed, size=size)
        shown = {"total": len(rows), "label": "triplets"}
        table = pd.DataFrame(side_by_side(work, rows, workers=workers, chunksize=16, **shown))
        table.to_csv(folder / "data.csv", index=False)

    recipe = {"format": "NIGHTS", "counts": dict(counts), "seed": seed, "size": size, "world": scenes.VERSION}
    return once(Path(root), recipe, write)


OBJECT_CLASSES = tuple(product(range(len(scenes.KINDS)), range(len(scenes.TEXTURES))))
ADJECTIVES = {"plain": "plain", "stripes": "striped", "dots": "dotted"}


def _draw_object(item: tuple[int, int], seed: int, size: int) -> dict:
    split, index = item
    stream = Stream(seed, 100 + split, index)
    label = stream.below(len(OBJECT_CLASSES))
    thing = scenes.draw_thing(stream, cell=4)
    kind, texture = OBJECT_CLASSES[label]
    scene = Scene((scenes.replace(thing, kind=kind, texture=texture),), gaze=0)
    picture = {"bytes": _encode(scene, stream.below(2**31), size, "JPEG"), "path": f"{index:08d}.jpg"}
    return {"image": picture, "label": label, "text": class_name(label)}


def class_name(label: int) -> str:
    """Name an object class, such as 'striped star'."""
    kind, texture = OBJECT_CLASSES[label]
    return f"{ADJECTIVES[scenes.TEXTURES[texture]]} {scenes.KINDS[kind]}"


def write_imagenet100(
    root: Path,
    counts: Mapping[str, int],
    *,
    seed: int = 0,
    size: int = SIZE,
    shard_rows: int = 1000,
    workers: int | None = None,
) -> Path:
    """Write pictures of single things as ImageNet-100 is published: data/{split}-*.parquet, label2text.json."""

    def write(folder: Path) -> None:
        (folder / "data").mkdir()
        names = {str(label): class_name(label) for label in range(len(OBJECT_CLASSES))}
        (folder / "label2text.json").write_text(json.dumps(names, indent=1) + "\n")
        schema = pa.schema(
            {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64(), "text": pa.string()}
        )
        for split, (name, count) in enumerate(counts.items()):
            items = [(split, index) for index in range(count)]
            work = partial(_draw_object, seed=seed, size=size)
            rows = list(side_by_side(work, items, workers=workers, chunksize=16, total=count, label=name))
            shards = np.array_split(np.arange(count), -(-count // shard_rows))
            for i, shard in enumerate(shards):
                table = pa.Table.from_pylist([rows[j] for j in shard], schema)
                pq.write_table(table, folder / "data" / f"{name}-{i:05d}-of-{len(shards):05d}.parquet")

    recipe = {"format": "ImageNet-100", "counts": dict(counts), "seed": seed, "size": size, "world": scenes.VERSION}
    return once(Path(root), recipe, write)


def _write_scene(index: int, folder: Path, seed: int, size: int) -> None:
    stream = Stream(seed, 200, index)
    picture = _encode(scenes.draw_scene(stream), stream.below(2**31), size, "JPEG")
    (folder / f"{index // 1000:03d}" / f"{index % 1000:03d}.jpg").write_bytes(picture)


def write_scenes(root: Path, images: int, *, seed: int = 0, size: int = SIZE, workers: int | None = None) -> Path:
    """Write pictures that nobody voted on, of scenes as the triplets show, as a folder of images: XXX/YYY.jpg."""

    def write(folder: Path) -> None:
        for high in range(-(-images // 1000)):
            (folder / f"{high:03d}").mkdir()
        work = partial(_write_scene, folder=folder, seed=seed, size=size)
        list(side_by_side(work, range(images), workers=workers, chunksize=16, total=images, label="scenes"))

    recipe = {"format": "image folder", "images": images, "seed": seed, "size": size, "world": scenes.VERSION}
    return once(Path(root), recipe, write)
