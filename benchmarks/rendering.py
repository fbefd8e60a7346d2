"""Time the rendering of the synthetic world: images per second on one core and on all.

python benchmarks/rendering.py [--size 128] [--images 1200]
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from thesis_lib.datasets import rendering, scenes
from thesis_lib.datasets.scenes import Stream


def draw(seed: int, size: int) -> int:
    return rendering.render(scenes.draw_scene(Stream(1, seed)), seed, size).nbytes


def rate(workers: int, images: int, size: int) -> float:
    """Render with a pool of processes that are already running; images per second."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(draw, range(20 * workers), [size] * 20 * workers))  # starts every process
        start = time.perf_counter()
        list(pool.map(draw, range(images), [size] * images, chunksize=20))
        return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=1200)
    options = parser.parse_args()
    one, cores = rate(1, options.images, options.size), os.cpu_count() or 1
    every = rate(cores, options.images, options.size)
    print(f"{options.size} px: {one:.0f} images/s on one core, {every:.0f} on {cores} ({every / one:.2f} times)")


if __name__ == "__main__":
    main()
