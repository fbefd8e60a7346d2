"""Batches of labelled images, and their augmentation as a whole on the device they are on, as timm composes it.

Random erasing, mixup and cutmix are timm's; crop and flip draw for each image. RandAugment (Cubuk et al. 2020) is drawn
as timm does it, but once for `GROUP` images, and its operations are torchvision's, which transform tensors.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from thesis_lib.attention.soft import without_autocast
from thesis_lib.training import Batches

GROUP = 8  # images that share one RandAugment draw
BINS = 31  # torchvision's magnitudes; timm counts from 0 to 10
FILL = [124, 116, 104]  # where an operation leaves nothing: ImageNet's mean


class Augmentation:
    """Turn a batch of bytes into what the model learns from: images in [0, 1] and soft targets.

    crop_scale: share of the area that a random crop keeps, aspect ratio from 3/4 to 4/3, bilinear; None: the whole.
    flip: probability of mirroring. rand_augment: timm's string, such as "rand-m9-mstd0.5-inc1", with "n3" for three
    operations, "p0.8" for how often each is applied (a half); None: none. random_erasing: probability; the rectangle is
    filled with noise, `noise` times the standard normal, which the model should see normalised. mixup, cutmix: alpha of
    the beta distribution, 0 for none; with both each batch takes one, at evens. smoothing: of the targets.
    Raises ValueError for a string that is no RandAugment policy and for rates out of range.
    """

    def __init__(
        self,
        classes: int,
        *,
        crop_scale: tuple[float, float] | None = None,
        flip: float = 0.5,
        rand_augment: str | None = None,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.1,
        noise: float = 0.25,
    ) -> None:
        rates = {"flip": flip, "random_erasing": random_erasing, "smoothing": smoothing}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}={rate} must lie in [0, 1]")
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={crop_scale} must be two shares of the area, the smaller first, or None")
        if min(mixup, cutmix) < 0:
            raise ValueError(f"mixup={mixup} and cutmix={cutmix} must not be negative")
        self.classes, self.crop_scale, self.flip, self.smoothing = classes, crop_scale, flip, smoothing
        self.random_erasing, self.noise, self.policy = random_erasing, noise, parse_policy(rand_augment)
        mixing = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": smoothing, "num_classes": classes}
        self.mix = Mixup(**mixing) if mixup or cutmix else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augment images (B, 3, S, S) uint8 with labels (B,): floats in [0, 1], noise apart, and targets (B, classes).

        What is random comes from the global states of torch, numpy and random. With mixup or cutmix B must be even.
        """
        with without_autocast(images):  # in half precision the places to sample are off by parts of a pixel
            x = images.float() / 255
            if self.crop_scale:
                x = resized_crop(x, self.crop_scale)
            if self.flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < self.flip, x.flip(3), x)
            if self.policy:
                parts = (255 * x).round().to(torch.uint8).split(GROUP)
                x = torch.cat([self._rand_augment(part) for part in parts]).float() / 255
            if self.random_erasing:
                erase = RandomErasing(self.random_erasing, mode="pixel", device=x.device)
                x = erase((x - 0.5) / self.noise) * self.noise + 0.5  # timm's noise is standard normal
            if self.mix is not None:
                return self.mix(x, labels)
            return x, mixup_target(labels, self.classes, smoothing=self.smoothing)

    def _rand_augment(self, images: Tensor) -> Tensor:
        for _ in range(int(self.policy["n"])):
            if random.random() < self.policy["p"]:
                level = min(max(random.gauss(self.policy["m"], self.policy["mstd"]), 0.0), 10.0)
                one = {"num_ops": 1, "magnitude": round(level / 10 * (BINS - 1)), "num_magnitude_bins": BINS}
                images = v2.RandAugment(**one, interpolation=v2.InterpolationMode.BILINEAR, fill=FILL)(images)
        return images


def whole_batches(
    count: int,
    batch_size: int,
    gather: Callable[[np.ndarray], Any],
    augment: Augmentation,
    max_batches: int | None,
    repeats: int = 1,
) -> Callable[[int, torch.Generator], Batches]:
    """Make `fit`'s `batches`: rows of `count`, shuffled anew each epoch; an incomplete last batch is left out.

    repeats: how often an image comes, each time augmented anew, before the next one does; an epoch is as long as
    without, so it sees a part of the images (repeated augmentation, Hoffer et al. 2020, as DeiT samples it).
    ValueError: there is no whole batch, or mixup or cutmix would have to pair an odd number of images.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    if count < batch_size:
        raise ValueError(f"{count} images do not fill one batch of {batch_size}: lower batch_size")
    if batch_size % 2 and augment.mix is not None:
        raise ValueError(f"mixup and cutmix pair the images of a batch: batch_size={batch_size} must be even")

    def batches(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(count, generator=generator).repeat_interleave(repeats)
        order = order[: count // batch_size * batch_size]
        return Batches(order.numpy(), batch_size, gather, max_batches)

    return batches


def parse_policy(policy: str | None) -> dict[str, float] | None:
    """Read timm's RandAugment string: m (magnitude, 0 to 10), its noise mstd, n operations, p (of each), inc (on)."""
    if policy is None:
        return None
    head, *parts = policy.split("-")
    found = {"m": 9.0, "n": 2.0, "p": 0.5, "mstd": 0.5, "inc": 1.0}
    for part in parts:
        match = re.fullmatch(r"(m|n|p|mstd|inc)(\d+\.?\d*)", part)
        if not match:
            raise ValueError(f"rand_augment={policy!r}: {part!r} is none of m, n, p, mstd and inc with a number")
        found[match[1]] = float(match[2])
    if head != "rand" or not 0 <= found["m"] <= 10 or found["inc"] != 1:
        raise ValueError(f'rand_augment={policy!r} must be like "rand-m9-mstd0.5-inc1", with m from 0 to 10')
    return found


def resized_crop(x: Tensor, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Tensor:
    """Crop each image (B, C, H, W) by itself and resize it to its own size, bilinear, in one sampling of the batch.

    scale: share of the area; ratio: of width to height, drawn on a logarithmic scale as torchvision does.
    """
    area, shape, across, down = torch.rand(4, len(x), device=x.device)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    zero = torch.zeros_like(width)
    rows = [width, zero, (2 * across - 1) * (1 - width), zero, height, (2 * down - 1) * (1 - height)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
