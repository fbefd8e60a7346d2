"""Time a 2AFC evaluation against what bounds it and against the `dreamsim` package, in the same run.

    python benchmarks/evaluation.py [--triplets 32] [--native 768] [--backbone vit_small_patch16_224.dino] [--rounds 3]

Triplets of the synthetic world are written as 768 px PNG files, as NIGHTS has them. Random weights do: the package's
model class gets a DINO ViT of its own code, and ours loads that very state, so that the distances must agree. Both run
with the notebooks' settings of the allocator.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from thesis_lib import backbone, evaluation, perceptual
from thesis_lib.datasets import pixels, synthetic
from thesis_lib.datasets.nights import NIGHTS
from thesis_lib.processes import keep_memory

DINO = {
    "vit_small_patch16_224.dino": ("dino_vits16", "vit_small"),
    "vit_base_patch16_224.dino": ("dino_vitb16", "vit_base"),
}
Distances = tuple[torch.Tensor, torch.Tensor]  # left, right, each (n,)


def interleaved(rounds: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Run the tasks in turn, `rounds` times, and return the median seconds of each."""
    seconds = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def bare(model: nn.Module, ready: torch.Tensor, batch_size: int, dtype: str) -> None:
    """Run the model over tensors that are decoded, scaled and normalised already."""
    with torch.inference_mode(), torch.autocast("cpu", perceptual.DTYPES[dtype], enabled=dtype != "float32"):
        for x in ready.split(batch_size):
            model(x)


def peer_model(name: str, file: Path) -> nn.Module:
    """Build the package's `PerceptualModel` around random weights and save these for ours."""
    from dreamsim import PerceptualModel
    from dreamsim.feature_extraction import vision_transformer
    from dreamsim.feature_extraction.extractor import ViTExtractor

    model_type, architecture = DINO[name]
    vit = getattr(vision_transformer, architecture)(patch_size=16)
    torch.save(vit.state_dict(), file)
    with mock.patch.object(ViTExtractor, "create_model", return_value=vit):  # it would fetch published weights
        return PerceptualModel(model_type, baseline=True, normalize_embeds=True, device="cpu").eval()


def load_plainly(paths: list[Path], size: int) -> torch.Tensor:
    """Decode and resize one image after the other, as a loader without workers does."""
    ready = [Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for path in paths]
    return torch.from_numpy(np.stack(ready)).permute(0, 3, 1, 2).float() / 255  # (b, 3, S, S)


def peer_distances(model: nn.Module, dataset: NIGHTS, size: int, batch_size: int = 16) -> Distances:
    """Evaluate as published scripts do: load each triplet, call the model once for left and once for right."""
    both = []
    with torch.inference_mode():
        for rows in torch.from_numpy(dataset.index).split(batch_size):
            ref, left, right = (load_plainly([dataset.paths[i] for i in column], size) for column in rows.T)
            both.append(torch.stack([model(ref, left), model(ref, right)]))
    return tuple(torch.cat(both, dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", type=int, default=32)
    parser.add_argument("--native", type=int, default=768, help="side of the image files, pixels")
    parser.add_argument("--backbone", default="vit_small_patch16_224.dino", choices=DINO)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=perceptual.DTYPES, help="of ours; the peer runs float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Print the ratios; whatever is measured on both sides is measured in turn."""
    root = synthetic.write_nights(folder / "nights", {"test": 2 * options.triplets}, size=options.native)
    dataset = NIGHTS(root, "test", max_samples=options.triplets)
    try:
        peer = peer_model(options.backbone, folder / "weights.pth")
        weights = folder / "weights.pth"
    except ImportError:
        peer, weights = None, False
    model = backbone.create(options.backbone, pretrained=weights)
    metric = perceptual.Metric(model).eval()
    size, n = model.patch_embed.img_size[0], len(dataset.paths)
    print(
        f"{len(dataset)} triplets, {n} images of {options.native} px, {options.backbone} at {size} px, "
        f"{torch.get_num_threads()} threads, ours in {options.dtype}"
    )

    settings = {"batch_size": options.batch_size, "dtype": options.dtype, "progress": False}

    def ours(cache: Path) -> Distances:
        ready = pixels.cache(dataset.paths, size, folder=cache, progress=False)
        table = evaluation.evaluate(metric, dataset, ready, **settings)
        return tuple(torch.tensor(table[side].tolist()) for side in ("d_left", "d_right"))

    cached, fresh = folder / "cache", (folder / f"fresh{i}" for i in range(options.rounds))
    distances = ours(cached)
    found = pixels.cache(dataset.paths, size, folder=cached, progress=False)
    normalised = (found[range(n)].float() / 255 - metric.mean) / metric.std
    seconds = interleaved(
        options.rounds,
        ours=lambda: ours(cached),
        bare=lambda: bare(model, normalised, options.batch_size, options.dtype),
    )
    print(f"bare model on ready tensors   {n / seconds['bare']:8.1f} image/s")
    print(
        f"evaluation from the cache     {n / seconds['ours']:8.1f} image/s   "
        f"{seconds['bare'] / seconds['ours']:.2f} of the bare model (aim 0.9)"
    )
    if peer is None:
        print("the `dreamsim` package is not installed: pip install dreamsim for the comparison")
        return
    worst = max((a - b).abs().max().item() for a, b in zip(distances, peer_distances(peer, dataset, size), strict=True))
    assert worst < (1e-4 if options.dtype == "float32" else 3e-2), f"the distances differ by {worst}"
    seconds = interleaved(
        options.rounds,
        peer=lambda: peer_distances(peer, dataset, size),
        first=lambda: ours(next(fresh)),
        second=lambda: ours(cached),
        peer_data=lambda: [load_plainly([dataset.paths[i]], size) for i in dataset.index.ravel()],
        our_data=lambda: pixels.cache(dataset.paths, size, folder=cached, progress=False)[range(n)],
    )
    rate = {name: len(dataset) / time for name, time in seconds.items()}
    print(f"dreamsim's class, plain PIL   {rate['peer']:8.2f} triplet/s (its distances and ours agree to {worst:.0e})")
    print(f"ours, first mixer             {rate['first']:8.2f} triplet/s {rate['first'] / rate['peer']:6.2f}x (aim 2)")
    print(f"ours, from the second on      {rate['second']:8.2f} triplet/s {rate['second'] / rate['peer']:6.2f}x")
    print(f"their data side               {rate['peer_data']:8.2f} triplet/s")
    print(
        f"ours, from the second on      {rate['our_data']:8.2f} triplet/s "
        f"{rate['our_data'] / rate['peer_data']:6.1f}x (aim 5)"
    )


if __name__ == "__main__":
    main()
