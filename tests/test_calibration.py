"""The synthetic world is calibrated as NIGHTS is, measured on the committed weights."""

import numpy as np
import pytest
import torch

from thesis_lib import backbone, evaluation, perceptual
from thesis_lib.datasets import pixels, synthetic
from thesis_lib.datasets.nights import NIGHTS
from thesis_lib.statistics import paired_difference
from thesis_lib.training import lora_tune


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Write triplets of a seed that neither the demo nor the backbone's training uses."""
    folder = tmp_path_factory.mktemp("world")
    synthetic.write_nights(folder / "nights", {"train": 1500, "val": 150, "test": 1200}, seed=77)
    splits = {name: NIGHTS(folder / "nights", name) for name in ("train", "val", "test")}
    cached = {
        size: {name: pixels.cache(split.paths, size, folder=folder, progress=False) for name, split in splits.items()}
        for size in (64, synthetic.SIZE)
    }
    return splits, cached


def score(model, world):
    splits, cached = world
    return evaluation.evaluate(perceptual.Metric(model), splits["test"], cached[64]["test"], progress=False)["score"]


@pytest.mark.parametrize("name", evaluation.PIXEL_DISTANCES)
def test_pixels_alone_do_not_solve_the_task(name, world):
    splits, cached = world
    assert evaluation.evaluate_pixels(name, splits["test"], cached[synthetic.SIZE]["test"])["score"].mean() <= 0.65


def test_an_untrained_backbone_does_not_solve_the_task(world):
    torch.manual_seed(0)
    assert score(backbone.create("demo", pretrained=False), world).mean() <= 0.65


def test_the_demo_backbone_solves_it_zero_shot_and_better_after_lora(world):
    splits, cached = world
    model = backbone.create("demo")
    zero_shot = score(model, world)
    assert zero_shot.mean() >= 0.85
    train, val = (cached[64][name] for name in ("train", "val"))
    recipe = {"epochs": 1, "batch_size": 16, "progress": False}
    tuned, _ = lora_tune(model, train, splits["train"], splits["val"], val_pixels=val, **recipe)
    lora = score(tuned, world)
    assert lora.mean() >= 0.9
    assert paired_difference(lora.to_numpy(), zero_shot.to_numpy()).difference > -0.005


def test_relations_between_distant_parts_matter(world):
    """Without any mixing of tokens the class token sees nothing: all scores tie or fall to chance."""
    assert abs(score(backbone.create("demo", mixer="identity"), world).mean() - 0.5) < 0.06


def test_weights_are_small_and_hold_the_demo_backbone():
    from thesis_lib import paths

    file = paths.WEIGHTS / backbone.DEMO_FILE
    assert file.stat().st_size <= 8 * 2**20
    assert np.isfinite(sum(float(p.detach().abs().sum()) for p in backbone.create("demo").parameters()))
