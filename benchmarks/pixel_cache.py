"""Time the pixel cache over the number of images: it must scale linearly.

    python benchmarks/pixel_cache.py [--counts 1000 4000 16000] [--native 128] [--size 64] [--workers 2]

PNG images are generated in a temporary folder. Every line is one store made from nothing; the last lines compare the
largest with the smallest, and the cache with a plain PIL loop over the same files.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from thesis_lib.datasets import pixels

BATCH = 64


def write_image(path: Path, seed: int, native: int) -> None:
    """Write noise over smooth colours: a PNG about as hard to decode as a photograph."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((native, native))
    noise = rng.integers(-4, 5, (native, native, 1))
    Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def measure(paths: list[Path], folder: Path, size: int, workers: int | None) -> dict[str, float]:
    """Fill a store and read it back; seconds and bytes per image, and GB/s."""
    start = time.perf_counter()
    pixels.cache(paths, size, folder=folder, workers=workers, progress=False)
    filled = time.perf_counter()
    found = pixels.cache(paths, size, folder=folder, workers=workers, progress=False)
    opened = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(paths))
    seconds = []
    for _ in range(6):  # the first pass checks every record's crc; of the others the fastest counts
        begin = time.perf_counter()
        for k in range(0, len(order), BATCH):
            found[order[k : k + BATCH]]
        seconds.append(time.perf_counter() - begin)
    n, gigabytes = len(paths), len(paths) * 3 * size * size / 1e9
    return {
        "decode images/s": n / (filled - start),
        "open µs/image": (opened - filled) / n * 1e6,
        "disk bytes/image": sum(path.stat().st_size for path in folder.iterdir()) / n,
        "first read GB/s": gigabytes / seconds[0],
        "read GB/s": gigabytes / min(seconds[1:]),
    }


def plain(paths: list[Path], size: int) -> float:
    """Images per second of the loop that a data set without a cache runs for every model."""
    start = time.perf_counter()
    for path in paths:
        pixels.decode(path.read_bytes(), size)
    return len(paths) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--native", type=int, default=128, help="side of the PNG images in pixels")
    parser.add_argument("--size", type=int, default=64, help="side of the cached images in pixels")
    parser.add_argument("--workers", type=int, default=None, help="threads; all cores by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary, "images")
        images.mkdir()
        paths = [images / f"{k:06d}.png" for k in range(max(options.counts))]
        with ThreadPoolExecutor() as pool:
            list(pool.map(write_image, paths, range(len(paths)), [options.native] * len(paths)))
        print(f"PNG {options.native} px, {paths[0].stat().st_size:,} bytes → {options.size} px")
        rows = []
        for count in sorted(options.counts):
            rows.append(measure(paths[:count], Path(temporary, f"cache-{count}"), options.size, options.workers))
            print(f"{count:>7} images: " + ", ".join(f"{name} {value:,.2f}" for name, value in rows[-1].items()))
        smallest, largest = min(options.counts), max(options.counts)
        for name in rows[0]:
            print(f"{name}, {largest} : {smallest} images = {rows[-1][name] / rows[0][name]:.2f} (1 is linear)")
        loop = plain(paths[: min(largest, 1000)], options.size)
        read = rows[-1]["read GB/s"] * 1e9 / (3 * options.size**2)
        print(
            f"a plain PIL loop: {loop:,.0f} images/s; filling the cache is {rows[-1]['decode images/s'] / loop:.2f}×, "
        )
        print(f"reading it {read / loop:,.0f}× as fast")


if __name__ == "__main__":
    main()
