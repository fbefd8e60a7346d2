"""Time one distillation epoch on cached pixels and embeddings against the bare loop on ready tensors.

    python benchmarks/distillation_epoch.py [--backbone demo] [--mixer pool] [--images 512] [--device cpu]

Four loops over one student and the same batches, in one process, in rotated order: forward and backward of float
tensors that are ready on the device ("bare"), the same with AdamW's step ("bare + step"), that from the pixel cache's
memory map ("from the cache"), and the training epoch of `thesis_lib.distillation.distil` ("distil"), which is expected
to reach at least 0.9 of the bare loop. Medians over the rounds, after one that warms up,
with the notebooks' settings of the allocator.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from PIL import Image

from thesis_lib import backbone, perceptual
from thesis_lib.datasets.pixels import Pixels, cache
from thesis_lib.distillation import distil, trainable_parameters
from thesis_lib.embeddings import Embeddings, identity
from thesis_lib.processes import keep_memory


def write_images(folder: Path, count: int, size: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:05d}.png" for i in range(count)]
    for path in paths:
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size)).save(path, compress_level=1)
    return paths


def loops(
    student: perceptual.Metric, pixels: Pixels, values: torch.Tensor, val: SimpleNamespace, options: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    """Give the loops by name; each returns the seconds of one epoch over all images but the three of `val`."""
    device, size = torch.device(options.device), options.batch_size
    chosen = set(trainable_parameters(student, "mlp_norm"))
    batches = torch.arange(options.images).split(size)
    ready = [((pixels[rows].float() / 255).to(device), values[rows].to(device)) for rows in batches]

    def plain(step: bool, cached: bool) -> float:
        student.to(device).train()
        for name, parameter in student.backbone.named_parameters():
            parameter.requires_grad_(name in chosen)
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-6)
        shuffled = torch.randperm(options.images).split(size)
        start = now(device)
        for rows, (x, target) in zip(shuffled, ready, strict=True):
            if cached:
                x, target = pixels[rows].to(device).float() / 255, values[rows].to(device)
            perceptual.distance(student.embed(x), target).mean().backward()
            if step:
                optimizer.step()
            optimizer.zero_grad()
        return now(device) - start

    split = ["train"] * options.images + ["val"] * 3
    names = [Path(key).name for key in pixels.keys]
    table = pd.DataFrame({"path": names, "digest": pixels.digests, "split": split, "role": "ref"})
    targets = Embeddings(table, values, identity(student))

    def ours() -> float:
        (row,) = distil(
            student, pixels, targets, val, epochs=1, batch_size=size, lr=1e-6, device=device.type, progress=False
        )
        return row["seconds"]

    return {
        "bare": lambda: plain(step=False, cached=False),
        "bare + step": lambda: plain(step=True, cached=False),
        "from the cache": lambda: plain(step=True, cached=True),
        "distil": ours,
    }


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--mixer", default="pool")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_memory()
    student = perceptual.Metric(backbone.create(options.backbone, mixer=options.mixer, pretrained=False))
    size = student.backbone.patch_embed.img_size[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), options.images + 3, 2 * size)
        pixels = cache(paths, size, folder=Path(folder, "cache"), progress=False)
        values = perceptual.embed_pixels(student, pixels, device=options.device, progress=False)
        val = SimpleNamespace(root=Path(folder), paths=paths[-3:], index=np.array([[0, 1, 2]]), right_vote=np.ones(1))
        timed = loops(student, pixels, values, val, options)
        names, seconds = list(timed), {name: [] for name in timed}
        for turn in range(options.rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                taken = timed[name]()
                if turn:
                    seconds[name].append(taken)
    bare = statistics.median(seconds["bare"])
    where = f"{options.device}, {torch.get_num_threads()} threads, {options.rounds} rounds"
    print(f"{options.images} images, {options.backbone} with {options.mixer}, batch {options.batch_size}, {where}")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:15s} {options.images / median:8.1f} image/s   {bare / median:5.3f} of bare")


if __name__ == "__main__":
    main()
