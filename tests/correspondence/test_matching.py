import numpy as np
import pytest
import torch
import torch.nn.functional as F

from thesis_lib.correspondence import matching
from thesis_lib.correspondence.matching import READOUTS, match, sample, similarity_map, upsampled_norm


def naive(source, target, points, source_size, target_size, readout="argmax", beta=50.0, window=125):
    """The published evaluation: upsample both feature maps to the images, normalise every pixel, compare."""
    up = [F.interpolate(f[None], size[::-1], mode="bilinear", align_corners=False)[0]
          for f, size in ((source, source_size), (target, target_size))]  # fmt: skip
    source, target = (F.normalize(f, dim=0) for f in up)
    found = []
    for x, y in points.round().long().tolist():
        column, row = min(max(x, 0), source_size[0] - 1), min(max(y, 0), source_size[1] - 1)
        similarity = torch.einsum("c,chw->hw", source[:, row, column], target)
        best = divmod(int(similarity.argmax()), target_size[0])
        if readout == "argmax":
            found.append((best[1], best[0]))
            continue
        weight = torch.exp(beta * similarity)
        if readout == "window":
            near = torch.zeros_like(weight)
            half = window // 2
            near[max(best[0] - half, 0) : best[0] + half + 1, max(best[1] - half, 0) : best[1] + half + 1] = 1
            weight = weight * near
        weight = weight / weight.sum()
        rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in target_size[::-1]), indexing="ij")
        found.append(((weight * columns).sum().item(), (weight * rows).sum().item()))
    return torch.tensor(found, dtype=torch.float32)


@pytest.mark.parametrize("readout", ["argmax", "soft", "window"])
@pytest.mark.parametrize("sizes", [((40, 30), (33, 47)), ((8, 8), (8, 8)), ((5, 7), (6, 4))])
def test_matches_are_those_of_the_naive_loop(readout, sizes):
    generator = torch.Generator().manual_seed(1)
    double = {"generator": generator, "dtype": torch.float64}  # two pixels may be equally similar in float32
    source, target = torch.randn((12, 7, 6), **double), torch.randn((12, 8, 8), **double)
    points = torch.rand((9, 2), generator=generator) * torch.tensor(sizes[0]) * 1.1 - 0.5
    options = {"readout": readout, "beta": 10.0, "window": 9}
    ours = match(source, target, points, *sizes, **options)
    torch.testing.assert_close(ours, naive(source, target, points, *sizes, **options), atol=2e-3, rtol=1e-4)


def test_the_norm_is_that_of_upsampled_features():
    features = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0)) + 1
    up = F.interpolate(features[None], (31, 44), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(upsampled_norm(features, (44, 31)), up.norm(dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sample(features, torch.tensor([[43.0, 0.0], [7.0, 30.0]]), (44, 31)),
                               torch.stack([up[:, 0, 43], up[:, 30, 7]]))  # fmt: skip


def test_memory_is_bounded_and_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    source, target = torch.randn(2, 6, 9, 9, generator=generator)
    points, size = torch.rand(20, 2, generator=generator) * 60, (60, 60)
    whole = match(source, target, points, size, size)
    largest = []
    plain = matching._upsample
    monkeypatch.setattr(matching, "BLOCK", 2 * 60 * 60)
    monkeypatch.setattr(matching, "_upsample", lambda maps, s: largest.append(len(maps)) or plain(maps, s))
    assert torch.equal(match(source, target, points, size, size), whole)
    assert max(largest) == 2 and len(largest) == 10


@pytest.mark.parametrize("readout", READOUTS)
def test_a_planted_permutation_is_found(readout):
    h, w, cell = 6, 8, 5
    generator = torch.Generator().manual_seed(3)
    codes = F.one_hot(torch.arange(h * w)).float().mT
    order = torch.randperm(h * w, generator=generator)
    source, target = codes.view(-1, h, w), codes[:, order].view(-1, h, w)
    size = (w * cell, h * cell)
    points = matching.cell_centres((h, w), size) - 0.5  # pixel indices
    moved = torch.empty_like(points)
    moved[order] = points.clone()  # the code that stood at order[i] now stands at i
    found = match(source, target, points, size, size, readout=readout, beta=2000.0, window=5)
    assert ((found - moved).abs() <= cell / 2).all()  # at the border, half a cell looks alike


def test_soft_argmax_leaks_nothing_into_its_window():
    target = torch.zeros(2, 1, 40)
    target[0] = 1
    target[1, 0] = torch.linspace(0, 1.5, 40)  # many mediocre pixels on one side
    source = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 1, 40)
    size = (40, 1)
    found = match(source, target, torch.tensor([[0.0, 0.0]]), size, size, readout="window", window=3, beta=1.0)
    assert found[0, 0] < 1.1


def test_similarity_map_is_highest_at_the_match():
    generator = torch.Generator().manual_seed(4)
    source, target = torch.randn(2, 6, 5, 5, generator=generator)
    point = torch.tensor([11.0, 20.0])
    heat = similarity_map(source, target, point, (30, 30), (24, 36))
    row, column = divmod(int(heat.argmax()), 24)
    assert match(source, target, point[None], (30, 30), (24, 36)).tolist() == [[column, row]]
    assert heat.shape == (36, 24) and heat.max() <= 1 + 1e-5


def test_no_points_and_wrong_input():
    features = torch.randn(3, 4, 4)
    assert match(features, features, torch.empty(0, 2), (8, 8), (8, 8)).shape == (0, 2)
    with pytest.raises(ValueError, match="did you mean argmax"):
        match(features, features, torch.zeros(1, 2), (8, 8), (8, 8), readout="argmx")
    with pytest.raises(ValueError, match="one C"):
        match(features, torch.randn(2, 4, 4), torch.zeros(1, 2), (8, 8), (8, 8))
    with pytest.raises(ValueError, match="not finite"):
        match(features, features * np.nan, torch.zeros(1, 2), (8, 8), (8, 8))
