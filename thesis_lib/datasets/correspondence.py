"""Read image pairs with matching key-points from the published trees of SPair-71k, PF-WILLOW and CUB-200-2011."""

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from thesis_lib.datasets.correspondence_download import not_there
from thesis_lib.datasets.missing import choose
from thesis_lib.datasets.pairs import Collector, Pair, Pairs, subset

FACTORS = {  # our names: the columns of a pair file of SPair-71k
    "viewpoint": "viewpoint_variation",
    "scale": "scale_variation",
    "truncation": "truncation",
    "occlusion": "occlusion",
}
IMAGE_KEYS = ("src_imname", "trg_imname")
WILLOW_LISTS = ("test_pairs_pf.csv", "test_pairs.csv")
PADDING = -1  # of a point that a PF-WILLOW row does not have


def spair71k(
    root: str | Path,
    split: str = "test",
    *,
    layout: str = "large",
    max_samples: int | None = None,
    on_error: str = "raise",
) -> Pairs:
    """Read SPair-71k (Min et al. 2019): the pairs listed in Layout/<layout>/<split>.txt.

    Raises FileNotFoundError for a missing set, ValueError for unusable pairs; on_error="skip" counts them instead.
    """
    root = _root(root, "SPair-71k", "PairAnnotation")
    splits = sorted(path.stem for path in (root / "Layout" / layout).glob("*.txt"))
    choose(split, splits, f"split of {root / 'Layout' / layout}")
    listed = list(dict.fromkeys((root / "Layout" / layout / f"{split}.txt").read_text("utf-8-sig").split()))
    collector = Collector("SPair-71k", split, root, on_error)

    def read(name: str) -> Pair:
        path = root / "PairAnnotation" / split / f"{name}.json"
        try:
            entry = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        try:
            if entry["mirror"]:
                raise ValueError(f"{path} asks for a mirrored image, which the published set never does")
            places = [collector.image(f"JPEGImages/{entry['category']}/{entry[key]}") for key in IMAGE_KEYS]
            for place, key in zip(places, ("src_imsize", "trg_imsize"), strict=True):
                if tuple(entry[key][:2]) != collector.sizes[place]:
                    raise ValueError(f"{key} is {entry[key]}, but the image measures {collector.sizes[place]}")
            points = [np.array(entry[key], np.float32).reshape(-1, 2) for key in ("src_kps", "trg_kps")]
            box = np.array(entry["trg_bndbox"], np.float32).reshape(4)
            factors = {ours: int(entry[theirs]) for ours, theirs in FACTORS.items()}
            return Pair(name, entry["category"], *places, tuple(entry["kps_ids"]), *points, box, factors)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no pair of SPair-71k: {error!r}") from error

    collector.collect([listed[i] for i in subset(len(listed), max_samples)], read)
    return collector.finish()


def pf_willow(
    root: str | Path, split: str = "test", *, max_samples: int | None = None, on_error: str = "raise"
) -> Pairs:
    """Read PF-WILLOW (Ham et al. 2016); its one split is "test", and a box is that of the points.

    Points padded with -1 are left out before the box is taken: with them the threshold would be too generous.
    """
    choose(split, ("test",), "PF-WILLOW split")
    root = Path(root).expanduser()
    lists = [root / folder / name for folder in ("", "PF-dataset") for name in WILLOW_LISTS]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise not_there(root, "PF-WILLOW", f"there is no {WILLOW_LISTS[0]}")
    try:
        table = pd.read_csv(found)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{found} is not a readable csv file ({error}); delete it and fetch it again") from error
    if table.shape[1] < 42:
        raise ValueError(f"{found} has {table.shape[1]} columns; two paths and four times ten coordinates make 42")
    renamed = not (root / "PF-dataset").is_dir()  # some copies hold the folder's content under another name
    collector = Collector("PF-WILLOW", split, root, on_error)

    def read(name: str) -> Pair:
        row = table.iloc[int(name)]
        paths = [re.sub(r"^PF-dataset/", "", path) if renamed else path for path in map(str, row.iloc[:2])]
        places = [collector.image(path) for path in paths]
        x = pd.to_numeric(row.iloc[2:42], errors="coerce").to_numpy(np.float32).reshape(2, 2, 10)  # image, axis, point
        points = x.transpose(0, 2, 1)  # (2, 10, 2)
        there = (points != PADDING).all(axis=(0, 2))
        source, target = points[:, there]
        box = np.concatenate([target.min(0), target.max(0)]) if len(target) else np.zeros(4, np.float32)
        category = re.sub(r"\(.*", "", PurePosixPath(paths[0]).parent.name)
        names = tuple(str(i) for i in np.flatnonzero(there))
        return Pair(name, category, *places, names, source, target, box, {})

    collector.collect([str(i) for i in subset(len(table), max_samples)], read)
    return collector.finish()


def cub200(root: str | Path, split: str = "test", *, max_samples: int | None = None, on_error: str = "raise") -> Pairs:
    """Read CUB-200-2011 (Wah et al. 2011) as pairs: all images of a class with each other, their common visible parts.

    A pair without a common part is not an error here, for nobody published it: it is left out and counted.
    """
    choose(split, ("train", "test"), "CUB-200-2011 split")
    root = _root(root, "CUB-200-2011", "images.txt")
    try:
        images = _columns(root / "images.txt").set_index(0)[1]
        labels = _columns(root / "image_class_labels.txt").set_index(0)[1]
        names = _columns(root / "classes.txt").set_index(0)[1].str.replace(r"^\d+\.", "", regex=True)
        inside = _columns(root / "train_test_split.txt").set_index(0)[1].astype(int) == int(split == "train")
        boxes = _columns(root / "bounding_boxes.txt").set_index(0).astype(np.float32)
        parts = _columns(root / "parts" / "part_locs.txt").astype({4: int})
        if any(table.index.has_duplicates for table in (images, labels, names, boxes)):
            raise ValueError("an id stands twice in one of its lists")
        chosen = labels[inside.reindex(labels.index)].groupby(labels, sort=True).groups
        wanted = labels.index[inside.reindex(labels.index)]
        if not (wanted.isin(images.index) & wanted.isin(boxes.index) & labels[wanted].isin(names.index)).all():
            raise ValueError("images.txt, bounding_boxes.txt or classes.txt lacks an image or a class")
        if images[wanted].duplicated().any():
            raise ValueError("images.txt names one file for several ids")
        couples = [couple for members in chosen.values() for couple in combinations(members, 2)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{root} is no whole copy of CUB-200-2011: {error!r}") from error
    visible = {image: part[part[4] == 1].set_index(1)[[2, 3]] for image, part in parts.groupby(0)}
    collector = Collector("CUB-200-2011", split, root, on_error)
    names_of = {f"{images.get(a, a)} {images.get(b, b)}": (a, b) for a, b in couples}
    listed = list(names_of)
    asked = [listed[i] for i in subset(len(couples), max_samples)]
    nothing = pd.DataFrame(columns=[2, 3])
    common = {n: [visible.get(i, nothing) for i in names_of[n]] for n in asked}
    bare = {n for n, (a, b) in common.items() if a.index.intersection(b.index).empty}
    collector.skipped |= dict.fromkeys(bare, "no part is visible in both images")

    def read(name: str) -> Pair:
        a, b = names_of[name]
        places = [collector.image(f"images/{images.get(i)}") for i in (a, b)]
        shared = common[name][0].index.intersection(common[name][1].index)
        points = [part.loc[shared].to_numpy(np.float32) for part in common[name]]
        x, y, width, height = boxes.loc[b].to_numpy(np.float32)
        box = np.array([x, y, x + width, y + height], np.float32)
        return Pair(name, names[labels[a]], *places, tuple(map(str, shared)), *points, box, {})

    collector.collect([name for name in asked if name not in bare], read)
    return collector.finish()


DATASETS: dict[str, Callable[..., Pairs]] = {"SPair-71k": spair71k, "PF-WILLOW": pf_willow, "CUB-200-2011": cub200}


def load(dataset: str, root: str | Path, split: str = "test", **options: object) -> Pairs:
    """Read a set by its name; ValueError names the near ones."""
    return DATASETS[choose(dataset, DATASETS, "correspondence data set")](root, split, **options)


def _columns(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    return pd.read_csv(path, sep=r"\s+", header=None)


def _root(root: str | Path, dataset: str, needed: str) -> Path:
    root = Path(root).expanduser()
    if not (root / needed).exists():
        raise not_there(root, dataset, f"there is no {needed}" if root.is_dir() else "there is no such folder")
    return root
