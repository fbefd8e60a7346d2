"""What three studies do with batches of labelled images before they learn from them."""

import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from thesis_lib.augmentation import Augmentation, parse_policy, resized_crop, whole_batches

PLAIN = {"flip": 0.0, "smoothing": 0.0}


def ramp(n=64):
    """Images whose first channel is the column and second the row, in [0, 1]."""
    line = (torch.arange(32) + 0.5) / 32
    return torch.stack([line.expand(32, 32), line[:, None].expand(32, 32), torch.zeros(32, 32)]).repeat(n, 1, 1, 1)


def test_crops_lie_within_the_image_and_keep_the_share_asked_for():
    torch.manual_seed(0)
    x = resized_crop(ramp(), (0.3, 0.5))
    width, height = ((x[:, i].amax((1, 2)) - x[:, i].amin((1, 2))) * 32 / 31 for i in (0, 1))
    share = width * height
    assert 0.29 < share.min() and share.max() < 0.51 and share.std() > 0.02
    assert 0.7 < (width / height).min() < 1 < (width / height).max() < 1.4
    corners = x[:, 0].amin((1, 2))
    assert corners.min() > 0 and len(corners.unique()) > 60  # each image has its own
    assert_close(resized_crop(ramp(4), (1.0, 1.0), (1.0, 1.0)), ramp(4))


def test_mirroring_is_drawn_for_each_image():
    x = (255 * ramp(64)).round().to(torch.uint8)
    whole = Augmentation(3, **PLAIN | {"flip": 1.0})(x, torch.zeros(64, dtype=torch.long))[0]
    assert_close(whole, x.flip(3) / 255)
    torch.manual_seed(0)
    some = Augmentation(3, **PLAIN | {"flip": 0.5})(x, torch.zeros(64, dtype=torch.long))[0]
    mirrored = (some[:, 0, 0, 0] > 0.5).sum()
    assert 20 < mirrored < 44 and Augmentation(3, **PLAIN)(x, torch.zeros(64, dtype=torch.long))[0].equal(x / 255)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_targets(kind):
    np.random.seed(1)  # noqa: NPY002  timm draws from the global state
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    images = (labels * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    shares = []
    for _ in range(5):
        x, target = Augmentation(2, **PLAIN, **{kind: 1.0})(images, labels)
        assert_close(target.sum(1), torch.ones(6))
        assert_close(x.mean((1, 2, 3)), target[:, 1], atol=1e-3, rtol=0)
        shares.append(target[0, 1])  # the first is mixed with the last, of the other class
    assert len({round(float(share), 3) for share in shares}) == 5 and 0.05 < np.mean(shares) < 0.95


def test_smoothing_shares_out_the_target_and_erasing_hides_a_rectangle():
    images, labels = torch.full((32, 3, 32, 32), 128, dtype=torch.uint8), torch.arange(32) % 4
    x, target = Augmentation(4, **PLAIN | {"smoothing": 0.2})(images, labels)
    assert_close(target[1], torch.tensor([0.05, 0.85, 0.05, 0.05]))
    random.seed(0)
    x, _ = Augmentation(4, **PLAIN, random_erasing=0.5)(images, labels)
    changed = (x != 128 / 255).any(1).float().mean((1, 2))
    assert 8 <= (changed > 0).sum() <= 24 and changed.max() < 0.4 and (x - 0.5).abs().max() > 0.6


def test_rand_augment_is_batched_and_drawn_from_the_global_states():
    images = (255 * ramp(40)).to(torch.uint8)
    augment = Augmentation(3, **PLAIN, rand_augment="rand-m9-n3-mstd0.5-inc1")
    outputs = []
    for seed in (0, 0, 1):
        random.seed(seed)
        torch.manual_seed(seed)
        outputs.append(augment(images, torch.zeros(40, dtype=torch.long))[0])
    assert outputs[0].shape == images.shape and 0 <= outputs[0].min() and outputs[0].max() <= 1
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert (outputs[0] != images / 255).flatten(1).any(1).float().mean() > 0.5
    never = Augmentation(3, **PLAIN, rand_augment="rand-m9-p0")(images, torch.zeros(40, dtype=torch.long))[0]
    assert torch.equal(never, images / 255)
    assert parse_policy("rand-m7-n3") == {"m": 7.0, "n": 3.0, "p": 0.5, "mstd": 0.5, "inc": 1.0}


def test_rand_augment_sees_what_is_cropped_and_mirrored(monkeypatch):
    seen = []
    monkeypatch.setattr(Augmentation, "_rand_augment", lambda self, images: seen.append(images) or images)
    images = (255 * ramp(20)).to(torch.uint8)
    Augmentation(3, flip=1.0, rand_augment="rand-m9")(images, torch.zeros(20, dtype=torch.long))
    assert torch.equal(torch.cat(seen), images.flip(3)) and [len(part) for part in seen] == [8, 8, 4]


def test_half_precision_moves_no_crop():
    images, labels = (255 * ramp(8)).to(torch.uint8), torch.zeros(8, dtype=torch.long)
    crops = []
    for precise in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            crops.append(Augmentation(3, flip=0.0, crop_scale=(0.3, 0.5))(images, labels)[0])
    assert torch.equal(*crops)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rand_augment": "rand-m9-x1"}, "'x1' is none of m, n, p, mstd and inc"),
        ({"rand_augment": "augmix-m3"}, "must be like"),
        ({"rand_augment": "rand-m12"}, "m from 0 to 10"),
        ({"flip": 1.5}, r"flip=1.5 must lie in \[0, 1\]"),
        ({"crop_scale": (0.9, 0.5)}, "the smaller first"),
        ({"mixup": -1}, "must not be negative"),
    ],
)
def test_an_augmentation_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(3, **options)


def test_batches_are_whole_and_each_epoch_has_its_own_order():
    make = whole_batches(11, 4, list, Augmentation(3), None)
    first, again, second = (list(make(1, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1))
    assert [len(batch) for batch in first] == [4, 4] and len(set(first[0] + first[1])) == 8
    assert first == again != second
    assert len(whole_batches(11, 4, list, Augmentation(3), 1)(1, torch.Generator())) == 1
    thrice = sum(whole_batches(11, 4, list, Augmentation(3), None, 3)(1, torch.Generator()), [])
    assert thrice[::3] == list(dict.fromkeys(thrice)) and len(thrice) == 8 and thrice[0:3] == [thrice[0]] * 3
    with pytest.raises(ValueError, match="repeats=0"):
        whole_batches(11, 4, list, Augmentation(3), None, 0)
    whole_batches(11, 3, list, Augmentation(3), None)
    with pytest.raises(ValueError, match="batch_size=3 must be even"):
        whole_batches(11, 3, list, Augmentation(3, cutmix=1.0), None)
    with pytest.raises(ValueError, match="3 images do not fill one batch of 4"):
        whole_batches(3, 4, list, Augmentation(3), None)
