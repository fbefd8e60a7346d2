"""NIGHTS: image triplets with human two-alternative forced choices (Fu et al., DreamSim, NeurIPS 2023).

On disk, as published: `ref/XXX/YYY.png`, `distort/XXX/YYY_0.png` (left), `distort/XXX/YYY_1.png` (right), `data.csv`.
"""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd
from PIL import Image

from thesis_lib.datasets.missing import choose, missing
from thesis_lib.datasets.pixels import read_rgb

OWN_SPLITS = ("train", "val", "test")  # as the csv names them
SPLITS = (*OWN_SPLITS, "test_imagenet", "test_no_imagenet", "all")
IMAGES = ["ref_path", "left_path", "right_path"]
COLUMNS = ["id", "left_vote", "right_vote", "votes", *IMAGES, "split", "is_imagenet"]
TRUTH = {"TRUE": True, "1": True, "1.0": True, "FALSE": False, "0": False, "0.0": False}


class NIGHTS:
    """Read the triplets of one split with at least `min_votes` agreeing votes.

    `paths` are the distinct images, `index` (n, 3) int64 points into them in the order reference, left, right,
    `right_vote` (n,) float32 is the share of votes for the right image, `is_imagenet` (n,) bool, `ids` (n,), `table`
    the rows of data.csv. `dataset[i]` is DreamSim's sample: three PIL images, right_vote, id.

    `max_samples` keeps a fixed random subset in which votes and is_imagenet are balanced as in the split; a smaller one
    lies within a larger one, and the order of the file is kept.

    Raises FileNotFoundError for a missing set or missing images, ValueError for a csv that cannot be what it claims.
    """

    def __init__(
        self, root: str | Path, split: str = "test", min_votes: int = 6, max_samples: int | None = None
    ) -> None:
        choose(split, SPLITS, "NIGHTS split")
        if max_samples is not None and not (isinstance(max_samples, int | np.integer) and max_samples >= 1):
            raise ValueError(f"max_samples must be a whole number from 1, or None for all; got {max_samples!r}")
        self.root = Path(root).expanduser()
        self.split = split
        self.csv = self.root / "data.csv"
        table = self._select(self._read(), min_votes)
        self._check_votes(table)
        self.table = (table if max_samples is None else _subset(table, max_samples)).reset_index(drop=True)
        self._check_paths()
        codes, names = pd.factorize(self.table[IMAGES].map(os.path.normpath).to_numpy().ravel())
        self.paths = [self.root / name for name in names]
        self._check_images()
        self.index = codes.reshape(-1, 3).astype(np.int64)  # (n, 3)
        self.right_vote = self.table["right_vote"].to_numpy(np.float32)  # (n,)
        self.is_imagenet = self.table["is_imagenet"].to_numpy(bool)  # (n,)
        self.ids = self.table["id"].to_numpy()  # (n,)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image, Image.Image, float, object]:
        images = [read_rgb(path.read_bytes(), path) for path in (self.paths[k] for k in self.index[i])]
        return (*images, float(self.right_vote[i]), self.ids[i])

    def _read(self) -> pd.DataFrame:
        if not self.csv.is_file():
            raise self._missing()
        try:
            table = pd.read_csv(self.csv, dtype={"is_imagenet": str}, encoding="utf-8-sig")
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.csv} is not a readable csv file ({error}); fetch it again") from error
        absent = [name for name in COLUMNS if name not in table.columns]
        if absent:
            found = ", ".join(map(str, table.columns))
            raise ValueError(f"{self.csv} has no column {', '.join(absent)}; it has {found}")
        for name in ("left_vote", "right_vote", "votes"):
            numbers = pd.to_numeric(table[name], errors="coerce")
            self._refuse(table, numbers.isna(), f"no number in the column {name}")
            table[name] = numbers
        for name in (*IMAGES, "split"):
            self._refuse(table, ~table[name].map(lambda cell: isinstance(cell, str)), f"no text in the column {name}")
        table["split"] = table["split"].str.strip()
        self._refuse(table, ~table["split"].isin(OWN_SPLITS), f"a split that is none of {', '.join(OWN_SPLITS)}")
        self._refuse(table, table["id"].isna(), "no id")
        self._refuse(table, table["id"].duplicated(), "the id of a row above")
        truth = table["is_imagenet"].str.strip().str.upper().map(TRUTH)
        self._refuse(table, truth.isna(), "an is_imagenet that is none of TRUE, FALSE, 1, 0")
        return table.assign(is_imagenet=truth.astype(bool))

    def _select(self, table: pd.DataFrame, min_votes: int) -> pd.DataFrame:
        if self.split == "all":
            rows = table
        else:
            rows = table[table["split"] == self.split.split("_")[0]]
            if self.split != "test" and self.split.startswith("test"):
                rows = rows[rows["is_imagenet"] == (self.split == "test_imagenet")]
        kept = rows[rows["votes"] >= min_votes]
        if kept.empty:
            raise ValueError(
                f"the split {self.split!r} of {self.csv} is empty: {len(rows)} of its {len(table)} rows belong to the "
                f"split, and none has at least {min_votes} votes"
            )
        return kept

    def _check_votes(self, table: pd.DataFrame) -> None:
        left, right = table["left_vote"], table["right_vote"]
        wrong = ((left + right - 1).abs() > 1e-6) | (left < 0) | (right < 0)
        self._refuse(table, wrong, "votes that are not shares: left_vote + right_vote must be 1")

    def _check_paths(self) -> None:
        for column in IMAGES:
            outside = self.table[column].map(_leaves)
            self._refuse(self.table, outside, f"a {column} that leaves the data set's root")

    def _check_images(self) -> None:
        """Look every image up in its folder's listing: one call a folder is quick on network disks, too."""
        root, listing = self.root.resolve(), {}
        for folder in {path.parent for path in self.paths}:
            if folder.is_dir():
                inside = folder.resolve().is_relative_to(root)
                with os.scandir(folder) as entries:
                    listing[folder] = {entry.name: inside and not entry.is_symlink() for entry in entries}
        missing = []
        for path in self.paths:
            safe = listing.get(path.parent, {}).get(path.name)
            if safe is None or (not safe and not path.exists()):
                missing.append(path)
            elif not safe and not path.resolve().is_relative_to(root):
                raise ValueError(
                    f"{path} is a link that leaves the data set's root (to {path.resolve()}); point `dataset_root` to "
                    "the folder that really holds the images"
                )
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self.paths)} images of the NIGHTS split {self.split!r} are missing, first "
                f"{missing[0]}; fetch the rest of the set, or point `dataset_root` to a whole copy"
            )

    def _refuse(self, table: pd.DataFrame, wrong: pd.Series, what: str) -> None:
        if wrong.any():
            first = table[wrong].iloc[0]
            raise ValueError(f"{self.csv}: {wrong.sum()} rows with {what}; first: {first[COLUMNS].to_dict()}")

    def _missing(self) -> FileNotFoundError:
        found = "there is no such folder"
        if (self.root / "nights" / "data.csv").is_file():
            found = f"the set is one folder deeper, at {self.root / 'nights'}"
        elif (self.root / "ref").is_dir():
            found = "the images are there, but data.csv is not (the download in 200 parts lacks it)"
        elif self.root.is_dir():
            found = "the folder has no data.csv"
        return missing(
            self.root,
            found,
            name="NIGHTS",
            contents="20,019 triplets of images with human votes: data.csv, ref/, distort/",
            size="58 GB unzipped",
            published="https://data.csail.mit.edu/nights/nights.zip (Fu et al., DreamSim, 2023)",
        )


def _leaves(name: str) -> bool:
    """Say whether a path of the csv, relative to the root, points out of it."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor != ""
    return absolute or PurePosixPath(os.path.normpath(name)).parts[:1] == ("..",)


def _subset(table: pd.DataFrame, size: int) -> pd.DataFrame:
    """Take `size` rows at random, the same ones every time, stratified by vote and is_imagenet."""
    shuffled = table.iloc[np.random.default_rng(0).permutation(len(table))]
    strata = shuffled.groupby([shuffled["right_vote"] >= 0.5, shuffled["is_imagenet"]])["id"]
    # Each stratum's rows spread evenly over (0, 1): the rows before any point hold every stratum in proportion.
    place = (strata.cumcount() + 0.5) / strata.transform("size")
    return shuffled.loc[place.sort_values(kind="stable").index[:size]].sort_index()
