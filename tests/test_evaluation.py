from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from thesis_lib import evaluation

PIXELS = partial(evaluation.evaluate_pixels, "colour histogram")


class Triplets:
    """Two triplets over four images: image 1 repeats image 0, image 2 is a shade off, image 3 is its negative."""

    index = np.array([[0, 1, 2], [0, 3, 2]])
    right_vote = np.array([0.0, 1.0], np.float32)
    is_imagenet = np.array([True, False])
    ids = np.array([7, 8])
    table = pd.DataFrame({"split": ["test", "test"]})


class Images:
    usable = np.ones(4, bool)

    def __init__(self):
        image = torch.randint(40, 200, (3, 32, 32), generator=torch.Generator().manual_seed(0))
        self.images = torch.stack([image, image, image + 10, 255 - image]).to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        return self.images[rows]


class Flat(torch.nn.Module):
    """A metric without weights: the picture is its own embedding."""

    def _check(self, x):
        pass

    def embed_unchecked(self, x):
        return x.flatten(1)


@pytest.mark.parametrize("name", evaluation.PIXEL_DISTANCES)
def test_pixel_distances_prefer_the_image_that_is_nearer(name):
    table = evaluation.evaluate_pixels(name, Triplets, Images(), batch_size=1)
    assert table["score"].tolist() == [1.0, 1.0]
    assert table["d_left"][0] == pytest.approx({"PSNR": -np.inf, "SSIM": -1.0}.get(name, 0.0))


def test_evaluate_follows_index_and_leaves_skipped_images_out():
    images = Images()
    table = evaluation.evaluate(Flat(), Triplets, images, progress=False)
    assert table["id"].tolist() == [7, 8]
    assert table["d_left"][0] == pytest.approx(0, abs=1e-6) and table["d_left"][1] > table["d_right"][1]
    images.usable = np.array([True, False, True, True])
    assert evaluation.evaluate(Flat(), Triplets, images, progress=False)["id"].tolist() == [8]


def named(images, *names):
    images.keys = [str(Path(name).absolute()) for name in names]
    return images


class Named(Triplets):
    paths = [Path(name) for name in "abcd"]


@pytest.mark.parametrize("score", [lambda *a: evaluation.evaluate(Flat(), *a, progress=False), PIXELS])
def test_pixels_of_other_images_are_refused(score):
    assert len(score(Named, named(Images(), *"abcd"))) == 2
    few = Images()
    few.images = few.images[:3]
    for data, images in ((Named, named(Images(), *"bacd")), (Named, named(Images(), *"abcde")), (Triplets, few)):
        with pytest.raises(ValueError, match="not those of the data set"):
            score(data, images)
    images = Images()
    images.usable = np.zeros(4, bool)
    with pytest.raises(ValueError, match="every triplet has an image that was skipped"):
        score(Triplets, images)


def test_unknown_pixel_distances_are_answered_with_the_known():
    with pytest.raises(ValueError, match="unknown pixel distance 'psnr'.*PSNR"):
        evaluation.evaluate_pixels("psnr", Triplets, Images())


def test_rows_report_test_whole_and_by_origin_with_n_and_interval():
    table = pd.DataFrame(
        {"split": ["val"] * 2 + ["test"] * 4, "is_imagenet": [True] * 4 + [False] * 2, "score": [1, 0, 1, 1, 0, 1.0]}
    )
    rows = {row["split"]: row for row in evaluation.accuracy_rows(table, mixer="pool")}
    assert {split: (row["value"], row["n"]) for split, row in rows.items()} == {
        "val": (0.5, 2),
        "test": (0.75, 4),
        "test_imagenet": (1.0, 2),
        "test_no_imagenet": (0.5, 2),
    }
    assert all(row["low"] <= row["value"] <= row["high"] and row["mixer"] == "pool" for row in rows.values())
