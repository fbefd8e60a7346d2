"""Embed image collections of any size: decoded while the model computes, in flat memory, by any number of processes.

    python -m thesis_lib.embed SOURCE OUT.parquet --metric pool
    torchrun --nproc-per-node=8 -m thesis_lib.embed SOURCE OUT.parquet --metric FOLDER --device cuda --dtype bfloat16

SOURCE is a folder of images, ImageNet-100 in parquet shards (`datasets.imagenet100`), or a csv of pairs. OUT is a table
that `embeddings.read_embeddings` reads; of a csv OUT.distances.parquet is written, too, again if it is gone. Images are
embedded in parts, kept in OUT.parquet.parts until all are there: an interrupted run goes on behind the last finished
part of each process. OUT.parquet.lock, which keeps two runs apart, stays and does no harm.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from thesis_lib import perceptual
from thesis_lib.datasets.missing import choose
from thesis_lib.datasets.pixels import NO_ROOM, Source, ahead, content_digest, read_rgb
from thesis_lib.embed_parts import SKIP, Embedded, Parts, finished, join
from thesis_lib.embed_sources import Listing, listing
from thesis_lib.embeddings import COLUMNS, identity
from thesis_lib.processes import keep_memory
from thesis_lib.trainer import accelerator_on, free

COMMAND = "python -m thesis_lib.embed"


def embed_folder(
    metric: perceptual.Metric,
    source: str | Path,
    out: str | Path,
    *,
    columns: tuple[str, str] = ("a", "b"),
    batch_size: int = 64,
    device: str | None = None,
    dtype: str = "float32",
    workers: int | None = None,
    part_size: int = 256,
    on_error: str = "raise",
    progress: bool = True,
) -> Embedded:
    """Embed a folder of images, parquet shards or a csv of pairs into the parquet file `out`; see the module.

    columns: two of the csv, each a path, absolute or from the csv's folder; every distinct image is embedded once.
    workers: threads that decode, all cores by default. part_size: images that an interruption can cost each process.
    A run goes on from the parts of an earlier one with the same source, model, dtype and part_size; the bytes are then
    those of an uninterrupted run with the same batch_size. Under torchrun every process embeds its share of the parts.
    An image that cannot be decoded is a ValueError that names it; with on_error="skip" it is left out and listed, and
    the distances of its pairs are null. Raises FileNotFoundError for a missing source, ValueError for a wrong option,
    csv or file name, an `out` or distances of another run and an `out` that lacks images though on_error="raise",
    RuntimeError for a full disk, a corrupt shard or part or embeddings that are not finite.
    """
    choose(on_error, ("raise", "skip"), "on_error")
    if part_size < 1 or (workers is not None and workers < 1):
        raise ValueError(f"part_size (--part-size) {part_size} and workers (--workers) {workers} must be at least 1")
    out, images = Path(out).expanduser(), listing(source, columns)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file in it, such as {out / 'embeddings.parquet'}")
    accelerator = accelerator_on(device, "no")
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    options = {"batch_size": batch_size, "device": accelerator.device, "dtype": dtype, "progress": False}
    try:
        blank = torch.zeros(1, 3, *metric.backbone.patch_embed.img_size, dtype=torch.uint8)
        width = perceptual.embed_pixels(metric, blank, **options).shape[1]  # wrong options end here
        run = {"model": identity(metric), "dtype": dtype, "part_size": part_size, "width": width}
        whole = run | {"images": images.digest(range(len(images))), "pairs": images.pairs_digest()}
        if done := finished(out, whole, images, on_error):
            return done
        parts = Parts(out, run, images)
        with ExitStack() as stack:
            if main:
                stack.enter_context(parts.claimed())
            accelerator.wait_for_everyone()
            own = [k for k in range(rank, parts.count, world) if not parts.has(k, on_error)]
            workers = workers or max(1, (os.cpu_count() or 1) // world)
            bar = tqdm(
                desc="embedding", total=sum(len(parts.rows(k)) for k in own), unit="image", disable=not progress or rank
            )
            with bar:
                _fill(metric, images, parts, own, workers, on_error, bar, options)
            accelerator.wait_for_everyone()
            if main:
                join(images, parts, out, whole)
            accelerator.wait_for_everyone()
        return finished(out, whole, images, on_error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RuntimeError(
            f"no room left for {out}: free some and run the same again; finished parts are kept"
        ) from error
    finally:
        free(accelerator)


class _Decoded:
    """The images of one part, which `perceptual.embed_pixels` takes batch by batch from those decoded ahead."""

    def __init__(self, stream: Iterator[tuple[Source, Future]], count: int, on_error: str, bar: tqdm) -> None:
        self.stream, self.count, self.on_error, self.bar = stream, count, on_error, bar
        self.digests: list[str] = []
        self.reasons: list[str] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        decoded = [next(self.stream)[1].result() for _ in indices]
        for digest, reason, _ in decoded:
            if reason and self.on_error == "raise":
                raise ValueError(f"{reason}; replace it, or go on without it by {SKIP}")
            self.digests.append(digest)
            self.reasons.append(reason)
        self.bar.update(len(decoded))
        return torch.from_numpy(np.stack([pixels for *_, pixels in decoded]))  # (b, 3, H, W)


def _decode(source: Source, size: tuple[int, int]) -> tuple[str, str, np.ndarray]:
    """Return digest, reason and pixels (3, H, W) uint8 of an image; if it is unusable, "", why, and black."""
    try:
        data = source.read()
        image = read_rgb(data, source.key).resize(size[::-1], Image.Resampling.BICUBIC)
    except (OSError, ValueError) as error:
        what = f"{source.key} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        return "", what, np.zeros((3, *size), np.uint8)
    return content_digest(data).hex(), "", np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _fill(
    metric: perceptual.Metric,
    images: Listing,
    parts: Parts,
    own: list[int],
    workers: int,
    on_error: str,
    bar: tqdm,
    options: dict,
) -> None:
    """Embed and write the parts `own`; decoding runs ahead by two batches, writing behind by one part."""
    size = tuple(metric.backbone.patch_embed.img_size)
    digests = {k: images.digest(parts.rows(k)) for k in own}  # before they are read
    sources = (images.source(i) for k in own for i in parts.rows(k))
    pool = ThreadPoolExecutor(workers)  # Pillow decodes outside the interpreter's lock
    with ThreadPoolExecutor(1) as writer:  # whatever ends the run, the last finished part is written first
        written: Future | None = None
        try:
            stream = ahead(pool, lambda source: _decode(source, size), sources, 2 * options["batch_size"] + workers)
            for k in own:
                rows, part = parts.rows(k), _Decoded(stream, len(parts.rows(k)), on_error, bar)
                values = perceptual.embed_pixels(metric, part, **options).numpy()  # (p, D)
                for i in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
                    raise RuntimeError(f"the embedding of {images.label(rows[i])} is not finite: embed in float32")
                if written:
                    written.result()
                written = writer.submit(parts.write, k, _table(images, rows, part, values, digests[k]))
            if written:
                written.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _table(images: Listing, rows: range, part: _Decoded, values: np.ndarray, digest: str) -> pa.Table:
    usable = [i for i, reason in enumerate(part.reasons) if not reason]
    columns = {
        "path": [images.label(rows[i]) for i in usable],
        "digest": [part.digests[i] for i in usable],
        "split": [images.split(rows[i]) for i in usable],
        "role": ["image"] * len(usable),
    }
    arrays = [pa.array(columns[name], pa.string()) for name in COLUMNS]
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values[usable].reshape(-1)), values.shape[1]))
    skipped = {str(rows[i]): reason for i, reason in enumerate(part.reasons) if reason}
    metadata = {"skipped": json.dumps(skipped), "images": digest}
    return pa.table(arrays, names=[*COLUMNS, "embedding"], metadata=metadata)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of images, folder of parquet shards, or csv of pairs")
    parser.add_argument("out", type=Path, help="parquet file to write")
    parser.add_argument("--metric", default="mha", help="mixer of the demo backbone, or folder of a saved metric")
    parser.add_argument("--columns", nargs=2, default=("a", "b"), help="columns of the csv that hold the paths")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--dtype", choices=perceptual.DTYPES, default="float32")
    parser.add_argument("--workers", type=int, help="threads that decode; by default all cores")
    parser.add_argument("--part-size", type=int, default=256, help="images that an interruption can cost a process")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="at an image that is not whole")
    options = vars(parser.parse_args(arguments))
    try:
        metric, _ = perceptual.load(options.pop("metric"))
        done = embed_folder(metric, columns=tuple(options.pop("columns")), **options)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; finished parts are kept: run the same again\n")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{done.images} images embedded in {done.path}")
        if done.distances:
            print(f"distances of the pairs in {done.distances}")
        if done.skipped:
            print(f"{len(done.skipped)} images skipped:", *done.skipped.values(), sep="\n  ")


if __name__ == "__main__":
    keep_memory()
    main()
