"""ImageNet-100 as published at huggingface.co/datasets/ilee0022/ImageNet100, read from its parquet shards directly.

On disk: `label2text.json` ({"0": "text", ...}) and `data/{split}-XXXXX-of-YYYYY.parquet` with the columns `image`
(struct of bytes and path), `label` (int64) and `text`.

    python -m thesis_lib.datasets.imagenet100 download ROOT          fetches the pinned revision
    python -m thesis_lib.datasets.imagenet100 export ROOT OUT        writes folders of image files
"""

import argparse
import io
import json
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from thesis_lib.datasets.missing import choose, missing
from thesis_lib.datasets.pixels import UNREADABLE, read_rgb, why

REPOSITORY = "ilee0022/ImageNet100"
REVISION = "c55b2f2967c034db17be30f7d430e41c80fd4281"
SPLITS = ("train", "validation", "test")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
COMMAND = "python -m thesis_lib.datasets.imagenet100"
_READING = threading.Lock()


@dataclass(frozen=True)
class Row:
    """The image of one row of a shard, read when asked for: a `pixels.Source`.

    A row costs its whole row group, of which the last two are kept: read rows in order.
    """

    shard: Path
    stamp: tuple[int, int]
    row: int
    group: int
    row_in_group: int

    @property
    def key(self) -> str:
        return f"{self.shard}#{self.row}"

    def read(self) -> bytes:
        """Return the image file's bytes; raises RuntimeError for a corrupt shard, ValueError for an empty cell."""
        with _READING:  # the threads of `pixels.cache` want the same group at once: one reads it
            column = _row_group(self.shard, self.stamp, self.group)
        data = column[self.row_in_group].as_py()
        if not data:
            raise ValueError(f"{self.key} has no image bytes")
        return data


class ImageNet100:
    """Read one split: `sources` are its images for `pixels.cache`, `labels` (n,) int64, `classes` the label texts.

    `class_counts` (classes,) int64; `dataset[i]` is a PIL RGB image and its label; `shards` are the files. Raises
    FileNotFoundError for a missing set or shard, ValueError for another set, RuntimeError for a corrupt shard.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        choose(split, SPLITS, "ImageNet-100 split")
        self.root, self.split = Path(root).expanduser().absolute(), split
        self.classes = _classes(self.root)
        self.shards = _shards(self.root, split)
        self.sources: list[Row] = []
        labels = []
        for shard in self.shards:
            rows, column = _scan(shard)
            self.sources += rows
            labels.append(column)
        self.labels = np.concatenate(labels)  # (n,)
        if len(self.labels) == 0:
            raise ValueError(f"the split {split!r} of {self.root} is empty: its {len(self.shards)} shards have no row")
        strange = set(np.unique(self.labels).tolist()) - set(range(len(self.classes)))
        if strange:
            raise ValueError(
                f"the split {split!r} of {self.root} has labels that label2text.json lacks: {sorted(strange)[:5]}"
            )
        self.class_counts = np.bincount(self.labels, minlength=len(self.classes))  # (classes,)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return read_rgb(self.sources[i].read(), self.sources[i].key), int(self.labels[i])


def download(root: str | Path, splits: Iterable[str] = SPLITS) -> Path:
    """Fetch the pinned revision from the hub into `root`; files that are there already are kept."""
    import huggingface_hub

    shards = [f"data/{choose(split, SPLITS, 'ImageNet-100 split')}-*.parquet" for split in splits]
    folder = huggingface_hub.snapshot_download(
        REPOSITORY, repo_type="dataset", revision=REVISION, local_dir=root, allow_patterns=["label2text.json", *shards]
    )
    return Path(folder)


def export(
    root: str | Path,
    out: str | Path,
    *,
    splits: Iterable[str] = SPLITS,
    limit_per_split: int | None = None,
    class_names: str = "text",
    progress: bool = True,
) -> int:
    """Write `{split}/{label:03d}_{text}/{split}_{shard:03d}_{row:06d}.{ext}`; return how many files were written anew.

    Bytes are written as they are; formats other than JPEG, PNG, WebP and BMP are re-encoded as JPEG, quality 95. A file
    appears whole or not at all, and one that is there is not written again, so an interrupted export goes on.
    """
    choose(class_names, ("text", "id"), "class_names")
    if limit_per_split is not None and limit_per_split < 1:
        raise ValueError(f"limit_per_split must be at least 1, or None for all rows; got {limit_per_split}")
    written = 0
    for split in splits:
        dataset = ImageNet100(root, split)
        number = {shard: k for k, shard in enumerate(dataset.shards)}
        texts = [re.sub(r"\W+", "_", text).strip("_")[:80] for text in dataset.classes]
        names = [f"{label:03d}_{text}" if class_names == "text" else f"{label:03d}" for label, text in enumerate(texts)]
        rows = list(zip(dataset.sources, dataset.labels, strict=True))[:limit_per_split]
        for source, label in tqdm(rows, desc=f"exporting {split}", unit="image", disable=not progress):
            data, extension = _encoded(source.read(), source.key)
            name = f"{split}_{number[source.shard]:03d}_{source.row:06d}.{extension}"
            path = Path(out, split, names[label], name)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(data)
            os.replace(part, path)
            written += 1
    return written


def _classes(root: Path) -> list[str]:
    """Read label2text.json: one text a label, 0 to n - 1."""
    path = root / "label2text.json"
    if not path.is_file():
        if any(root.glob("data/*.parquet")):
            raise ValueError(
                f"{root} has parquet shards but no label2text.json: this is not {REPOSITORY}. clane9/imagenet-100, for "
                f"one, is another set: other label order, no test split. Fetch the right one: {COMMAND} download {root}"
            )
        raise _missing(root, "it has no label2text.json" if root.is_dir() else "there is no such folder")
    try:
        texts = {int(label): str(text) for label, text in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not a table {{"0": "text", ...}}: {error}') from error
    if sorted(texts) != list(range(len(texts))):
        raise ValueError(f"{path} must name the labels 0 to {len(texts) - 1} without a gap; it names {sorted(texts)}")
    return [texts[label] for label in range(len(texts))]


def _shards(root: Path, split: str) -> list[Path]:
    """List the shards of a split; every one that the names promise must be there."""
    shards = sorted((root / "data").glob(f"{split}-*.parquet"))
    if not shards:
        raise _missing(root, f"it has no data/{split}-*.parquet")
    totals = {int(match[1]) for path in shards if (match := re.search(r"-of-(\d+)\.parquet$", path.name))}
    if len(totals) > 1:
        raise ValueError(
            f"{root / 'data'} holds {split!r} shards of several downloads (of {', '.join(map(str, sorted(totals)))}): "
            "keep those of one"
        )
    promised = {f"{split}-{k:05d}-of-{max(totals):05d}.parquet" for k in range(max(totals))} if totals else set()
    absent = sorted(promised - {path.name for path in shards})
    if absent:
        raise _missing(root, f"{len(absent)} of the {len(promised)} shards of {split!r} are absent, first {absent[0]}")
    return shards


def _scan(shard: Path) -> tuple[list[Row], np.ndarray]:
    """Return a shard's rows and their labels (n,) int64, without reading an image."""
    status = shard.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    try:
        with pq.ParquetFile(shard) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image = schema.field("image").type if "image" in schema.names else None
            fields = {field.name for field in image} if image is not None and pa.types.is_struct(image) else set()
            if "bytes" not in fields or "label" not in schema.names:
                raise ValueError(
                    f"{shard} needs the columns image (struct of bytes, path) and label; it has "
                    + ", ".join(f"{field.name}: {field.type}" for field in schema)
                )
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            column = file.read(columns=["label"])["label"]
    except (pa.ArrowInvalid, OSError) as error:
        raise _corrupt(shard, error) from error
    if column.null_count or not pa.types.is_integer(column.type):
        raise ValueError(f"{shard} has labels that are no integers ({column.type}, {column.null_count} of them null)")
    places = ((group, k) for group, size in enumerate(sizes) for k in range(size))
    return [Row(shard, stamp, row, *place) for row, place in enumerate(places)], column.to_numpy().astype(np.int64)


@lru_cache(maxsize=2)
def _row_group(shard: Path, stamp: tuple[int, int], group: int) -> pa.ChunkedArray:
    """Read the image bytes of one row group; by `stamp` a file that was replaced is not taken for the old one."""
    try:
        with pq.ParquetFile(shard) as file:
            table = file.read_row_group(group, columns=["image.bytes"])
    except (pa.ArrowInvalid, OSError) as error:
        raise _corrupt(shard, error) from error
    return table["image"].combine_chunks().field("bytes")


def _encoded(data: bytes, name: str) -> tuple[bytes, str]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            extension = EXTENSIONS.get(image.format)
    except UNREADABLE as error:
        raise ValueError(f"{name} is not an image: {why(error)}") from error
    if extension:
        return data, extension
    file = io.BytesIO()
    read_rgb(data, name).save(file, "JPEG", quality=95)
    return file.getvalue(), "jpg"


def _corrupt(shard: Path, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"{shard} is not a whole parquet file ({error}): delete it, then fetch it again by: {COMMAND} download "
        f"{shard.parent.parent}"
    )


def _missing(root: Path, found: str) -> FileNotFoundError:
    return missing(
        root,
        found,
        name="ImageNet-100",
        contents="135,000 images of 100 classes in parquet shards: train 117,000, validation 13,000, test 5,000",
        size="17.4 GB",
        published=f"https://huggingface.co/datasets/{REPOSITORY} at {REVISION}; fetch it by: {COMMAND} download {root}",
        parameter="`imagenet100_root` (04 and 10: `extra_image_roots`; 07: `root` in `datasets`)",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Fetch ImageNet-100, or write it as image folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("download", help="fetch the pinned revision from the Hugging Face hub (17.4 GB)")
    write = commands.add_parser("export", help="write image folders {split}/{label}_{text}/*.jpg")
    for command in (fetch, write):
        command.add_argument("root", type=Path, help="folder with label2text.json and data/")
        command.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    write.add_argument("out", type=Path, help="folder to write to")
    write.add_argument("--limit-per-split", type=int, help="write only the first rows of every split")
    write.add_argument("--class-names", choices=("text", "id"), default="text")
    options = parser.parse_args(arguments)
    try:
        if options.command == "download":
            print(f"ImageNet-100 is at {download(options.root, options.splits)}")
        else:
            limit = options.limit_per_split
            count = export(
                options.root, options.out, splits=options.splits, limit_per_split=limit, class_names=options.class_names
            )
            print(f"{count} images written to {options.out}")
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
