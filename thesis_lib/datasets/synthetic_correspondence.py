"""Write the synthetic world as SPair-71k is published, with key-points that are true by construction.

A picture is about one thing of a category, its kind; in half of them things of other kinds stand around or touch it.
Key-points are places of its anatomy (eye, flanks, limb tips). One is visible if it lies within the picture and nothing
that was painted later covers it. Two more splits part what matching can rest on: in "moved" the same thing has moved
and turned, so that where a part was says nothing; in "layout" a thing of another kind stands in its very place, so
that where a part was says all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from thesis_lib.datasets import rendering, scenes, synthetic
from thesis_lib.datasets.scenes import KINDS, Scene, Stream, Thing
from thesis_lib.processes import side_by_side

FRAME = 160  # pixels a scene is rendered at, before it is cropped
CROPS = ((112, 84), (84, 112), (104, 104), (128, 96))  # widths and heights
KEYPOINTS = {  # by id: (name, distance from the centre in radii, degrees from the heading; None: of a limb)
    "0": ("eye", 1.20, 0),
    "1": ("head", 0.95, 0),
    "2": ("neck", 0.55, 0),
    "3": ("left flank", 0.55, -90),
    "4": ("right flank", 0.55, 90),
    "5": ("rear", 0.55, 180),
    "6": ("tail", 1.40, 180),
    "7": ("left limb", 1.40, None),
    "8": ("right limb", 1.40, None),
    "9": ("nose", 1.39, 0),
}
LIMBS = {0: {}, 1: {"6": 180}, 2: {"7": 235, "8": 125}, 3: {"6": 180, "7": 250, "8": 110}}  # as rendering.LIMB_ANGLES
TOUCHING = [(a, b) for a in range(9) for b in range(9) if abs(a // 3 - b // 3) + abs(a % 3 - b % 3) == 1]
COMMON = 3  # key-points that a pair must share
SPLITS = ("trn", "val", "test")
CONDITIONS = ("moved", "layout")
POSES = ("Right", "Frontal", "Left", "Rear")  # of headings 0, 90, 180, 270 (y points down)


@dataclass(frozen=True, eq=False)
class Picture:
    """A rendered crop: its pixels, the main thing's visible key-points, mask and box, and what hides others."""

    pixels: np.ndarray  # (H, W, 3) uint8
    points: dict[str, tuple[float, float]]
    mask: np.ndarray  # (H, W) bool
    box: tuple[int, int, int, int]
    heading: float
    truncated: bool
    occluded: bool


def anatomy(thing: Thing, at: rendering.Placement) -> dict[str, tuple[float, float]]:
    """Return where each key-point that a thing has lies in the scene, in half image widths, seen or not."""
    points = {}
    for key, (_, distance, turn) in KEYPOINTS.items():
        angle = LIMBS[thing.limbs].get(key) if key in ("6", "7", "8") else turn
        if angle is not None:
            x, y = rendering.direction(at.heading + angle)
            points[key] = at.x + distance * at.radius * x, at.y + distance * at.radius * y
    return points


def covers(thing: Thing, at: rendering.Placement, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Say which places, in half image widths, a thing's body, head and limbs cover."""
    u, v = (x - at.x) / at.radius, (y - at.y) / at.radius
    ahead = rendering.direction(at.heading)
    distance = np.minimum(
        rendering.body(u, v, KINDS[thing.kind], at.spin), np.hypot(u - 1.02 * ahead[0], v - 1.02 * ahead[1]) - 0.40
    )
    for angle in rendering.LIMB_ANGLES[thing.limbs]:
        distance = np.minimum(distance, rendering.limb(u, v, rendering.direction(at.heading + angle)))
    return distance < 0


def photograph(scene: Scene, main: int, view: int, crop: tuple[int, int, int, int]) -> Picture:
    """Render a view of a scene and crop it to (left, top, width, height), in pixels of the whole frame."""
    left, top, width, height = crop
    placements = rendering.place(scene, view)
    axis = (np.arange(FRAME) + 0.5) * (2 / FRAME) - 1
    x, y = axis[None, left : left + width], axis[top : top + height, None]
    mask = covers(scene.things[main], placements[main], x, y)
    later = list(zip(scene.things, placements, strict=True))[main + 1 :]
    points, hidden, cut = {}, 0, 0
    for key, (px, py) in anatomy(scene.things[main], placements[main]).items():
        column, row = (px + 1) * FRAME / 2 - 0.5 - left, (py + 1) * FRAME / 2 - 0.5 - top
        if not (0 <= column <= width - 1 and 0 <= row <= height - 1):
            cut += 1
        elif any(covers(*other, np.array(px), np.array(py)) for other in later):
            hidden += 1
        else:
            points[key] = column, row
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
    pixels = rendering.render(scene, view, FRAME)[top : top + height, left : left + width]
    heading = placements[main].heading % 360
    return Picture(pixels, points, mask, tuple(map(int, box)), heading, cut > 0, hidden > 0)


def draw(stream: Stream, kind: int, *, crowded: bool, limbs: int | None = None) -> tuple[Scene, int]:
    """Draw a scene about a thing of `kind`, and its place in it; if `crowded`, others stand apart or half over it."""
    others = [k for k in range(len(KINDS)) if k != kind]
    cells = stream.choice(TOUCHING if stream.chance(0.4) else scenes.LAYOUTS) if crowded else (4,)
    main = stream.below(len(cells))
    things = []
    for i, cell in enumerate(cells):
        thing = scenes.draw_thing(stream, cell=cell)
        thing = replace(thing, kind=kind if i == main else stream.choice(others))
        things.append(replace(thing, limbs=limbs) if limbs is not None and i == main else thing)
    return Scene(tuple(things), gaze=0), main


def draw_crop(stream: Stream, at: rendering.Placement) -> tuple[int, int, int, int]:
    """Draw a window (left, top, width, height) of the frame that shows a thing, not always whole or in the middle."""
    sides = stream.choice(CROPS)
    corner = []
    for centre, side in zip((at.x, at.y), sides, strict=True):
        place = (centre + 1) * FRAME / 2 + stream.uniform(-0.25, 0.25) * side - side / 2
        corner.append(round(min(max(place, 0), FRAME - side)))
    return *corner, *sides


def draw_picture(key: Sequence[int], kind: int, *, crowded: bool) -> Picture:
    """Draw a picture with at least COMMON visible key-points."""
    stream = Stream(*key)
    while True:
        scene, main = draw(stream, kind, crowded=crowded)
        view = stream.below(2**31)
        picture = photograph(scene, main, view, draw_crop(stream, rendering.place(scene, view)[main]))
        if len(picture.points) >= COMMON:
            return picture


def draw_couple(key: Sequence[int], kind: int, condition: str) -> tuple[Picture, Picture]:
    """Draw a source and a target of "moved" or "layout" that share at least COMMON key-points."""
    stream = Stream(*key)
    while True:
        scene, main = draw(stream, kind, crowded=True)
        view = stream.below(2**31)
        crop = draw_crop(stream, rendering.place(scene, view)[main])
        if condition == "moved":
            layout = stream.choice(scenes.LAYOUTS)[: len(scene.things)]
            turned = [replace(t, cell=c, heading=(t.heading + 45 * (2 + stream.below(5))) % 360)
                      for t, c in zip(scene.things, layout, strict=True)]  # fmt: skip
            other, seen = Scene(tuple(turned), 0), stream.below(2**31)
            where = draw_crop(stream, rendering.place(other, seen)[main])
        else:
            changed = [replace(t, kind=(t.kind + 1 + stream.below(5)) % 6, hue=stream.below(scenes.HUES),
                               texture=stream.below(3)) for t in scene.things]  # fmt: skip
            other, seen, where = Scene(tuple(changed), 0), _alike(scene, main, view, stream), crop
        couple = photograph(scene, main, view, crop), photograph(other, main, seen, where)
        if len(couple[0].points.keys() & couple[1].points.keys()) >= COMMON:
            return couple


def _alike(scene: Scene, main: int, view: int, stream: Stream) -> int:
    """Find another view (background, light) in which the main thing lies as nearly as possible where it lay."""
    lies = rendering.place(scene, view)[main]
    views = [stream.below(2**31) for _ in range(200)]

    def apart(other: int) -> float:
        at = rendering.place(scene, other)[main]
        turn = abs((at.heading - lies.heading + 180) % 360 - 180) / 180 * np.pi * lies.radius
        return abs(at.x - lies.x) + abs(at.y - lies.y) + abs(at.radius - lies.radius) + turn

    return min(views, key=apart)


# --------------------------------------------------------------------------------------------------- SPair-71k


def pair_entry(number: int, names: Sequence[str], category: str, pair: Sequence[Picture]) -> dict:
    """Describe a pair as the published PairAnnotation does."""
    common = sorted(pair[0].points.keys() & pair[1].points.keys())
    turn = abs((pair[0].heading - pair[1].heading + 180) % 360 - 180)
    areas = [picture.mask.mean() for picture in pair]
    ratio = max(areas) / min(areas)
    flags = {key: 2 * getattr(pair[1], key) + getattr(pair[0], key) for key in ("truncated", "occluded")}
    entry = {"pair_id": number, "category": category, "mirror": 0, "kps_ids": common}
    for side, name, picture in zip(("src", "trg"), names, pair, strict=True):
        height, width = picture.mask.shape
        entry |= {
            f"{side}_imname": name,
            f"{side}_imsize": [width, height, 3],
            f"{side}_bndbox": list(picture.box),
            f"{side}_kps": [[round(value) for value in picture.points[key]] for key in common],
            f"{side}_pose": POSES[round(picture.heading / 90) % 4],
        }
    entry["viewpoint_variation"] = int(turn > 45) + int(turn > 112.5)
    entry["scale_variation"] = int(ratio > 1.5) + int(ratio > 3)
    return entry | {"truncation": flags["truncated"], "occlusion": flags["occluded"]}


def image_entry(name: str, category: str, picture: Picture) -> dict:
    """Describe an image as the published ImageAnnotation does."""
    height, width = picture.mask.shape
    points = {key: [round(v) for v in picture.points[key]] if key in picture.points else None for key in KEYPOINTS}
    where = {"image_width": width, "image_height": height, "image_depth": 3, "bndbox": list(picture.box)}
    flags = {"truncated": int(picture.truncated), "occluded": int(picture.occluded), "difficult": 0}
    named = {"filename": name, "src_database": "synthetic world", "src_annotation": "", "src_image": "", "kps": points}
    pose = {"pose": POSES[round(picture.heading / 90) % 4], "azimuth_id": round(picture.heading / 45) % 8}
    return named | where | flags | pose | {"category": category}


def _save(folder: Path, category: str, name: str, picture: Picture) -> None:
    trees = {"JPEGImages": f"{name}.jpg", "Segmentation": f"{name}.png", "ImageAnnotation": f"{name}.json"}
    paths = {tree: folder / tree / category / file for tree, file in trees.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.pixels).save(paths["JPEGImages"], quality=95)
    Image.fromarray(picture.mask.astype(np.uint8) * 255).save(paths["Segmentation"])
    entry = image_entry(f"{name}.jpg", category, picture)
    paths["ImageAnnotation"].write_text(json.dumps(entry))


def _category(item: tuple[int, int], folder: Path, seed: int, images: Mapping[str, int], pairs: Mapping[str, int]):
    """Write the images and pair files of one kind and split; return the pairs' names."""
    split, kind = item
    split_name, category = (*SPLITS, *CONDITIONS)[split], KINDS[kind]
    stream, count = Stream(seed, 200, split, kind), _share(pairs[split_name], kind)
    if split_name in CONDITIONS:
        couples = [draw_couple((seed, 201, split, kind, i), kind, split_name) for i in range(count)]
        pictures = [picture for couple in couples for picture in couple]
        chosen = [(2 * i, 2 * i + 1) for i in range(count)]
        category = category if split_name == "moved" else "mixed"
    else:
        number = images[split_name]
        pictures = [draw_picture((seed, 202, split, kind, i), kind, crowded=i % 2 == 1) for i in range(number)]
        shared = [(a, b) for a, b in combinations(range(number), 2) if _common(pictures[a], pictures[b]) >= COMMON]
        order = np.argsort(stream.uniforms(len(shared)), kind="stable")[:count]
        chosen = [shared[i] if stream.chance(0.5) else shared[i][::-1] for i in order]
    names = [f"{split_name}_{KINDS[kind]}_{i:04d}" for i in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        _save(folder, category, name, picture)
    (folder / "PairAnnotation" / split_name).mkdir(parents=True, exist_ok=True)
    listed = []
    for i, (a, b) in enumerate(chosen):
        number = 1000 * kind + i
        listed.append(f"{number:06d}-{names[a]}-{names[b]}:{category}")
        entry = pair_entry(number, (f"{names[a]}.jpg", f"{names[b]}.jpg"), category, (pictures[a], pictures[b]))
        path = folder / "PairAnnotation" / split_name / f"{listed[-1]}.json"
        path.write_text(json.dumps({"filename": listed[-1]} | entry))
    return split_name, listed


def _common(a: Picture, b: Picture) -> int:
    return len(a.points.keys() & b.points.keys())


def _share(total: int, kind: int) -> int:
    return total // len(KINDS) + (kind < total % len(KINDS))


def write_spair(
    root: str | Path,
    pairs: Mapping[str, int],
    *,
    images: Mapping[str, int] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Write pairs of "trn", "val", "test", "moved" and "layout" in the layout of SPair-71k.

    images: pictures of each kind in a split, by default just enough for its pairs; a split of fewer pairs than asked
    for, because too few share key-points, is a ValueError. No picture is in two splits.
    """
    enough = {name: int(np.ceil(np.sqrt(3 * count / len(KINDS)))) + 3 for name, count in pairs.items()}
    images = enough | dict(images or {})
    names = (*SPLITS, *CONDITIONS)

    def write(folder: Path) -> None:
        items = [(names.index(name), kind) for name in pairs for kind in range(len(KINDS))]
        work = partial(_category, folder=folder, seed=seed, images=images, pairs=dict(pairs))
        written = list(side_by_side(work, items, workers=workers, total=len(items), label="pairs"))
        (folder / "Layout" / "large").mkdir(parents=True)
        for name, count in pairs.items():
            listed = [pair for split, part in written if split == name for pair in part]
            if len(listed) < count:
                raise ValueError(f"{name}: only {len(listed)} of {count} pairs: allow more than {images[name]} images")
            (folder / "Layout" / "large" / f"{name}.txt").write_text("\n".join(listed) + "\n")

    recipe = {"format": "SPair-71k", "pairs": dict(pairs), "images": images, "seed": seed, "world": scenes.VERSION}
    return synthetic.once(Path(root), recipe, write)
