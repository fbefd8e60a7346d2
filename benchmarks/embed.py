"""Time `thesis_lib.embed` against what bounds it, and watch its memory over the number of images.

    python benchmarks/embed.py [--counts 1000 4000 16000] [--native 128] [--metric pool] [--threads 1] [--workers 1]
    python benchmarks/embed.py --metric vit_base_patch16_224.dino --native 768 --counts 128 --sample 32 --batch-size 16
    python benchmarks/embed.py --gain [--backbone demo vit_small_patch16_224.dino]

The images are links to a thousand PNG files at most. Every count runs in a process of its own: its peak resident
memory, and the rate of the run beside those of the bare model (images ready in memory) and of bare decoding (same
threads, nothing else), measured in the same process right before and after. Beside them CPU seconds, which a busy
machine hardly changes: those of the run over those of bare model and bare decoding together are its overhead. All run
with the command's settings of the allocator.
By --gain: the class token of the last block alone against the full block, by depth, in CPU seconds, measured in turn.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from thesis_lib import attention, backbone, class_token, closed_form, embed, perceptual
from thesis_lib.datasets.pixels import File
from thesis_lib.processes import keep_memory

DISTINCT = 1000


def write_image(path: Path, seed: int, native: int) -> None:
    """Write noise over smooth colours: a PNG about as hard to decode as a photograph."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((native, native))
    noise = rng.integers(-4, 5, (native, native, 1))
    Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def link(files: list[Path], folder: Path, count: int) -> Path:
    """Make a collection of `count` names for the files."""
    for i in range(count):
        path = folder / f"{i // 1000:04d}" / f"{i:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[i % len(files)], path)
    return folder


def measured(count: int, task: Callable[[], object]) -> tuple[float, float]:
    """Return images/s by the wall clock, and CPU milliseconds an image."""
    start, used = time.perf_counter(), time.process_time()
    task()
    return count / (time.perf_counter() - start), 1e3 * (time.process_time() - used) / count


def peak() -> float:
    """Return the most memory this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def metric_of(name: str) -> perceptual.Metric:
    """Load a metric, or make one of a timm backbone with random weights."""
    if name in attention.MIXERS or Path(name).is_dir():
        return perceptual.load(name)[0]
    return perceptual.Metric(backbone.create(name, pretrained=False)).eval().requires_grad_(False)


def measure(folder: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Embed one collection; images/s, CPU ms an image, and MiB held before and at most."""
    torch.set_num_threads(options.threads)
    metric = metric_of(options.metric)
    size, device = tuple(metric.backbone.patch_embed.img_size), options.device
    ready = torch.randint(0, 256, (options.sample, 3, *size), dtype=torch.uint8)
    count = sum(1 for _ in folder.rglob("*.png"))
    sources = [File(path) for path in sorted((folder / "0000").iterdir())[: options.sample]]
    settings = {"batch_size": options.batch_size, "device": device, "dtype": options.dtype, "progress": False}

    def decode() -> None:
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda source: embed._decode(source, size), sources))

    def bare() -> list[tuple[float, float]]:
        model = measured(len(ready), lambda: perceptual.embed_pixels(metric, ready, **settings))
        return [model, measured(len(sources), decode)]

    bare()
    before, memory = bare(), peak()
    run = measured(count, lambda: embed.embed_folder(metric, folder, out, workers=options.workers, **settings))
    held = peak()
    (model, model_cpu), (decoding, decoding_cpu) = np.mean([before, bare()], axis=0).tolist()
    row = {"count": count, "embed": run[0], "model": model, "decode": decoding, "before": memory, "peak": held}
    return row | {"overhead": run[1] / (model_cpu + decoding_cpu)}


def at_scale(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        (root / "files").mkdir()
        files = [root / "files" / f"{k:04d}.png" for k in range(min(DISTINCT, max(options.counts)))]
        for k, path in enumerate(files):
            write_image(path, k, options.native)
        found = []
        for count in sorted(options.counts):
            folder = link(files, root / str(count), count)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(measure, (folder, root / f"{count}.parquet", options)))
            row = found[-1]
            share = row["embed"] / min(row["model"], row["decode"])
            print(
                f"{count:>7} images: {row['embed']:7.1f} images/s; bare model {row['model']:7.1f}, bare decode "
                f"{row['decode']:7.1f}: {share:.2f} of the slower (aim 0.9), "
                f"{row['overhead']:.2f} of their CPU time together; memory {row['before']:.0f} MiB before, "
                f"{row['peak']:.0f} MiB at most",
                flush=True,
            )
        first, last = found[0], found[-1]
        growth = (last["peak"] - first["peak"]) * 2**10 / max(last["count"] - first["count"], 1)
        print(f"peak memory grows by {growth:.2f} KiB an image from {first['count']} to {last['count']} images")
        print(json.dumps(found))


def gain(options: argparse.Namespace) -> None:
    """Print MACs and CPU time of the short last block beside the full one, for every backbone and mixer."""
    torch.set_num_threads(options.threads)
    for name in options.backbone:
        for mixer in ("mha", "pool"):
            vit = backbone.create(name, mixer, pretrained=False)
            metric = perceptual.Metric(vit).eval().requires_grad_(False)
            x = torch.rand(options.batch_size, 3, *vit.patch_embed.img_size)
            times: dict[bool, list[float]] = {True: [], False: []}
            with torch.inference_mode():
                metric.embed(x)
                for short in [True, False] * options.rounds:
                    with mock.patch.object(class_token, "applies", lambda vit, short=short: short):
                        times[short].append(measured(len(x), lambda metric=metric, x=x: metric.embed(x))[1])
            short, full = (statistics.median(times[key]) for key in (True, False))
            macs = class_token.model_cost(vit).macs / closed_form.model_cost(vit).macs
            print(
                f"{name:<28}{mixer:<6}depth {len(vit.blocks):>2}: MACs {macs:.3f}, CPU time {short / full:.3f} of the "
                f"full block's ({short:.2f} and {full:.2f} ms an image at batch {len(x)})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--native", type=int, default=128, help="side of the image files, pixels")
    parser.add_argument(
        "--metric", default="pool", help="mixer of the demo backbone, folder of a saved metric, or timm's backbone"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=perceptual.DTYPES, default="float32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode")
    parser.add_argument("--sample", type=int, default=512, help="images of the bare measurements")
    parser.add_argument("--folder", help="where to make the images; a temporary folder by default")
    parser.add_argument("--gain", action="store_true", help="measure the last block instead")
    parser.add_argument("--backbone", nargs="+", default=["demo", "vit_small_patch16_224.dino"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    keep_memory()
    gain(options) if options.gain else at_scale(options)


if __name__ == "__main__":
    main()
