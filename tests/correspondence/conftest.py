"""Small pair sets and models that the correspondence tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from thesis_lib import backbone
from thesis_lib.datasets.pairs import Pair, Pairs


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return backbone.create("demo", pretrained=False).requires_grad_(False)


@pytest.fixture
def pairs(tmp_path) -> Pairs:
    """Six noise pictures of 40 x 30; five pairs of two categories with four points each."""
    rng, images = np.random.default_rng(0), []
    for i in range(6):
        images.append(Path(tmp_path / f"{i}.png"))
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((40, 30), Image.Resampling.BICUBIC).save(images[-1])
    made = []
    for i in range(5):
        points = rng.uniform(2, 28, (2, 4, 2)).astype(np.float32)
        box = np.array([0, 0, 20, 30], np.float32)
        factors = {"viewpoint": i % 3, "scale": i % 2, "truncation": 0, "occlusion": 0}
        made.append(Pair(f"p{i}", "ab"[i % 2], i, i + 1, ("0", "1", "2", "5"), *points, box, factors))
    return Pairs("SPair-71k", "test", images, np.array([[40, 30]] * 6), made, {"broken": "its image is missing"})
