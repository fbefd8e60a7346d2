"""Train the demo backbone: a small ViT that learns to name the factors of the synthetic world.

    python -m thesis_lib.demo_backbone      about an hour on two cores; resumes; writes data/weights/ and data/measured/

The class token names what stands in each cell of the layout and how the things relate; each patch token names what
covers it, which makes the class token learn several times sooner. No triplet and no vote is seen: 2AFC is zero-shot.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from thesis_lib import backbone as backbones
from thesis_lib import paths, perceptual, results
from thesis_lib.datasets import rendering, scenes, synthetic
from thesis_lib.datasets.scenes import Stream
from thesis_lib.processes import side_by_side
from thesis_lib.training import Batches, fit

POOL_KEY = 11  # the seed's first word: keeps these scenes apart from every data set's
CLASSES = {
    "kind": len(scenes.KINDS) + 1,
    "limbs": scenes.LIMBS,
    "hue": scenes.HUES,
    "texture": len(scenes.TEXTURES),
    "large": 2,
}
WEIGHTS = {"kind": 1.0, "limbs": 0.5, "hue": 0.5, "texture": 0.5, "large": 0.3}
PER_TOKEN = sum(CLASSES.values()) + 2  # and the heading's cosine and sine
FIELDS = ("x", "y", "radius", "cell_x", "cell_y", "cos", "sin", "kind", "limbs", "hue", "texture", "large")


def describe(scene: scenes.Scene, view: int) -> np.ndarray:
    """Return the factors of each thing of a view as numbers: (things, len(FIELDS)) float32."""
    rows = []
    for thing, at in zip(scene.things, rendering.place(scene, view), strict=True):
        angle = np.deg2rad(thing.heading)
        factors = thing.kind, thing.limbs, thing.hue, thing.texture, thing.large
        rows.append(
            (at.x, at.y, at.radius, thing.cell % 3 - 1, thing.cell // 3 - 1, np.cos(angle), np.sin(angle), *factors)
        )
    return np.array(rows, np.float32)


def _pool_item(index: int, size: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    stream = Stream(POOL_KEY, index)
    scene, view = scenes.draw_scene(stream), stream.below(2**31)
    return rendering.render(scene, view, size), describe(scene, view), (scene.gaze, scene.pairing)


def _pool_chunk(arguments: tuple[range, int]) -> tuple[np.ndarray, ...]:
    return tuple(np.stack(column) for column in zip(*(_pool_item(i, arguments[1]) for i in arguments[0]), strict=True))


def make_pool(folder: Path, count: int, size: int, *, workers: int | None = None) -> dict[str, np.ndarray]:
    """Render the training pictures once; return images (count, size, size, 3), things and relations, memory-mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("images", "things", "relations")
    files = {name: folder / f"{name}_{count}_{size}.npy" for name in names}
    if not all(file.exists() for file in files.values()):
        chunks = [(range(i, min(i + 500, count)), size) for i in range(0, count, 500)]
        shapes = ((count, size, size, 3), np.uint8), ((count, 3, len(FIELDS)), np.float32), ((count, 2), np.int64)
        parts = {name: file.with_suffix(".part") for name, file in files.items()}
        arrays = [
            np.lib.format.open_memmap(parts[n], "w+", dtype, shape)
            for n, (shape, dtype) in zip(names, shapes, strict=True)
        ]
        rendered = side_by_side(_pool_chunk, chunks, workers=workers, total=len(chunks), label="pool")
        for (rows, _), chunk in zip(chunks, rendered, strict=True):
            for array, values in zip(arrays, chunk, strict=True):
                array[rows.start : rows.stop] = values
        for array in arrays:
            array.flush()
        for name in names:
            parts[name].replace(files[name])
    return {name: np.load(file, mmap_mode="r") for name, file in files.items()}


def turn(
    images: torch.Tensor, things: torch.Tensor, quarter_turns: int, mirrored: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one of the square's eight symmetries to pictures (B, 3, S, S) and to their things (B, T, FIELDS)."""
    images, things = images.rot90(quarter_turns, (2, 3)), things.clone()
    for first in (0, 3, 5):  # the (x, y) pairs of FIELDS: where it lies, its cell, where it heads
        x, y = things[..., first], things[..., first + 1]
        for _ in range(quarter_turns % 4):
            x, y = y, -x
        things[..., first], things[..., first + 1] = (-x if mirrored else x), y
    return images.flip(3) if mirrored else images, things


class Naming(nn.Module):
    """A ViT and linear heads that name the factors from its class token and from its patch tokens."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.cells = nn.Linear(backbone.embed_dim, scenes.CELLS * PER_TOKEN)
        self.patches = nn.Linear(backbone.embed_dim, PER_TOKEN)
        self.relations = nn.Linear(backbone.embed_dim, len(scenes.GAZES) + len(scenes.PAIRINGS))
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in backbones.normalization(backbone))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.backbone.forward_features((images - self.mean) / self.std)  # (B, 1 + P, D)
        cells = self.cells(tokens[:, 0]).unflatten(1, (scenes.CELLS, PER_TOKEN))
        return cells, self.patches(tokens[:, 1:]), self.relations(tokens[:, 0])


def _naming_loss(logits: torch.Tensor, things: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Score tokens (B, K, PER_TOKEN) that name thing `owner` (B, K), -1 where there is none."""
    taken = owner >= 0
    told = things.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, things.shape[-1]))  # (B, K, FIELDS)
    parts = dict(zip(CLASSES, logits[..., :-2].split(list(CLASSES.values()), -1), strict=True))
    kind = torch.where(taken, told[..., FIELDS.index("kind")].long() + 1, 0)
    loss = WEIGHTS["kind"] * F.cross_entropy(parts["kind"].flatten(0, 1), kind.flatten())
    for name in ("limbs", "hue", "texture", "large"):
        loss = loss + WEIGHTS[name] * F.cross_entropy(parts[name][taken], told[..., FIELDS.index(name)][taken].long())
    heading = told[..., FIELDS.index("cos") : FIELDS.index("sin") + 1]
    return loss + 2.0 * F.mse_loss(logits[..., -2:][taken], heading[taken])


def naming_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the loss of naming cells, patches, relations; batch: images (B, 3, S, S) in [0, 1], things, relations."""
    images, things, relations = batch
    cells, patches, scene = model(images)
    side = round(patches.shape[1] ** 0.5)
    row = torch.arange(scenes.CELLS) // 3 - 1
    column = torch.arange(scenes.CELLS) % 3 - 1
    in_cell = (things[:, None, :, 3] == column[:, None]) & (things[:, None, :, 4] == row[:, None])  # (B, 9, T)
    axis = (torch.arange(side) + 0.5) * (2 / side) - 1
    dx = things[:, None, :, 0] - axis.repeat(side)[:, None]  # (B, P, T)
    dy = things[:, None, :, 1] - axis.repeat_interleave(side)[:, None]
    distance = (dx.square() + dy.square()).sqrt() / things[:, None, :, 2]
    nearest, owner = distance.min(-1)
    loss = _naming_loss(cells, things, torch.where(in_cell.any(-1), in_cell.float().argmax(-1), -1))
    loss = loss + 0.5 * _naming_loss(patches, things, torch.where(nearest < 1.0, owner, -1))
    gazes = len(scenes.GAZES)
    loss = loss + 0.5 * F.cross_entropy(scene[:, :gazes], relations[:, 0])
    return loss + 0.3 * F.cross_entropy(scene[:, gazes:], relations[:, 1])


class Calibration:
    """Triplets of the world, seen by no training, that tell how far the class token's cosine is from the judge."""

    def __init__(self, count: int, size: int, *, seed: int):
        triplets = [synthetic.draw_triplet(seed, 1, i) for i in range(count)]
        triplets = [triplet for triplet in triplets if triplet.votes >= 6]
        pictured = [pair for t in triplets for pair in zip((t.reference, t.left, t.right), t.views, strict=True)]
        pixels = np.stack([rendering.render(scene, view, size) for scene, view in pictured])
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        self.index = np.arange(len(pictured)).reshape(-1, 3)
        self.right_vote = torch.tensor([triplet.right_vote for triplet in triplets])

    def two_afc(self, backbone: nn.Module) -> float:
        embeddings = perceptual.embed_pixels(perceptual.Metric(backbone), self.pixels, progress=False)
        return perceptual.two_afc_score(*perceptual.triplet_distances(embeddings, self.index), self.right_vote)


def train(
    *, count: int, epochs: int, batch_size: int, lr: float, seed: int, cache: Path, triplets: int = 450
) -> tuple[nn.Module, list[dict]]:
    """Train from random weights, `epochs` passes over `count` pictures; return the backbone and a log row an epoch."""
    torch.manual_seed(seed)
    model = Naming(backbones.create("demo", pretrained=False))
    size = model.backbone.recipe["img_size"]
    pool = make_pool(cache, count, size)
    calibration = Calibration(triplets, size, seed=5)

    def gather(rows: np.ndarray, symmetries: np.ndarray) -> tuple[torch.Tensor, ...]:
        rows = np.sort(rows)  # the order within a batch says nothing; the memory map likes it sorted
        images, things, relations = (torch.from_numpy(pool[name][rows]) for name in ("images", "things", "relations"))
        quarter_turns, mirrored = divmod(int(symmetries[rows[0]]), 2)
        return *turn(images.permute(0, 3, 1, 2).float() / 255, things, quarter_turns, bool(mirrored)), relations

    def batches(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(count, generator=generator).numpy()
        symmetries = torch.randint(8, (count,), generator=generator).numpy()  # one a batch: that of its first picture
        return Batches(order, batch_size, functools.partial(gather, symmetries=symmetries))

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    rows = fit(
        model,
        naming_loss,
        batches,
        epochs=epochs,
        lr=lr,
        betas=(0.9, 0.98),
        schedule="cosine",
        warmup_epochs=0.3,
        grad_clip=1.0,
        parameters=[{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        evaluate=lambda trained, epoch: {
            "2afc": calibration.two_afc(trained.backbone),
            "triplets": len(calibration.index),
        },
        select=None,
        checkpoint=cache / "checkpoint",
        config={"count": count, "batch_size": batch_size, "world": scenes.VERSION},
        seed=seed,
    )
    return model.backbone, rows


def record(rows: list[dict], *, seed: int, batch_size: int, count: int) -> Path:
    """Write the log of a training as rows below data/measured."""
    kept = {
        "loss": ("1", "train", count),
        "2afc": ("1", "calibration", None),
        "images_per_s": ("image/s", "train", count),
    }
    protocol = {"dataset": "synthetic world", "backbone": "demo", "mixer": "mha", "stage": "pretraining"}
    protocol |= {"image_size": 64, "dtype": "float32", "device": "cpu", "batch": batch_size, "seed": seed}
    long = [
        {
            "metric": name,
            "value": row[name],
            "unit": unit,
            "split": split,
            "n": n or row["triplets"],
            "epoch": row["epoch"],
        }
        | protocol
        for row in rows
        for name, (unit, split, n) in kept.items()
    ]
    return results.write(long, "demo_backbone", profile="demo", folder=paths.MEASURED)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo backbone again.")
    parser.add_argument("--count", type=int, default=60_000, help="pictures in the pool")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.0e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=paths.WEIGHTS / backbones.DEMO_FILE)
    options = vars(parser.parse_args())
    output = options.pop("output")
    backbone, rows = train(**options, cache=paths.CACHE / "demo_backbone")
    output.parent.mkdir(parents=True, exist_ok=True)
    backbones.save_weights(backbone, output, torch.float16)
    record(rows, seed=options["seed"], batch_size=options["batch_size"], count=options["count"])
    seen = options["count"] * options["epochs"]
    print(f"{output}: 2AFC {rows[-1]['2afc']:.3f} on the calibration triplets after {seen:,} pictures")


if __name__ == "__main__":
    main()
