import pytest
import torch
from timm.models.metaformer import Pooling
from torch.testing import assert_close

from thesis_lib.attention.pool import Pool


def images(x: torch.Tensor, grid: tuple[int, int], prefix: int = 1) -> torch.Tensor:
    return x[:, prefix:].mT.unflatten(-1, grid)


def test_equals_poolformer_of_transformers_and_timm(attention, tokens):
    poolformer = pytest.importorskip("transformers.models.poolformer.modeling_poolformer")
    for kernel in (3, 5):
        x = tokens((6, 10))
        y = Pool.from_attention(attention(), (6, 10), 1, kernel=kernel)(x)
        peer = poolformer.PoolFormerPooling(kernel)
        assert_close(images(y, (6, 10)), peer(images(x, (6, 10))))
        assert_close(images(y, (6, 10)), Pooling(kernel)(images(x, (6, 10))))


@pytest.mark.parametrize("kernel", [3, 5, 11])
def test_constant_grid_gives_zero(kernel, attention, tokens):
    mixer = Pool.from_attention(attention(), (6, 10), 1, kernel=kernel)
    x = torch.full_like(tokens((6, 10)), 3.0)
    assert mixer(x).abs().max() < 1e-6
    with_padding = torch.nn.functional.avg_pool2d(images(x, (6, 10)), 3, 1, 1) - 3
    assert with_padding.abs().max() > 1.6  # what counting the padding would give


def test_rotation_and_flip_but_no_permutation(attention, tokens):
    grid = (8, 8)
    mixer, x = Pool.from_attention(attention(), grid, 1), tokens(grid)

    def move(x, transform):
        return torch.cat([x[:, :1], transform(images(x, grid)).flatten(2).mT], dim=1)

    for transform in (lambda x: x.rot90(1, (2, 3)), lambda x: x.flip(3), lambda x: x.transpose(2, 3)):
        assert_close(mixer(move(x, transform)), move(mixer(x), transform))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffle(image):
        return image.flatten(2)[..., order].unflatten(-1, grid)

    assert not torch.allclose(mixer(move(x, shuffle)), move(mixer(x), shuffle), atol=0.1)


def test_linear_and_equal_to_its_matrix(attention, tokens):
    x, z = tokens((6, 10), 2), tokens((6, 10), 2, seed=9)
    for cls in ("mean_difference", "mean", "none"):
        mixer = Pool.from_attention(attention(), (6, 10), 2, cls=cls)
        assert_close(mixer(2 * x - z), 2 * mixer(x) - mixer(z), rtol=1e-4, atol=1e-5)
        averaged = mixer.attention_map(x)[:, 0] @ x
        assert_close(mixer(x)[:, 2:], (averaged - x)[:, 2:])
        prefix = averaged[:, :2] if cls == "mean" else (averaged - x)[:, :2]
        assert_close(mixer(x)[:, :2], prefix)


def test_what_the_class_token_receives(attention, tokens):
    x = tokens()
    mean = x[:, 1:].mean(1)
    expected = {"mean_difference": mean - x[:, 0], "mean": mean, "none": torch.zeros_like(mean)}
    for cls, value in expected.items():
        assert_close(Pool.from_attention(attention(), (8, 8), 1, cls=cls)(x)[:, 0], value)


def test_operations_are_those_of_the_matrix(attention, tokens):
    for kernel in (3, 5, 11):
        mixer = Pool.from_attention(attention(), (6, 10), 0, kernel=kernel)
        neighbours = mixer.attention_map(tokens((6, 10), 0))[0, 0].count_nonzero().item()
        assert Pool.cost(60, 24, 3, grid=(6, 10), prefix_tokens=0, kernel=kernel).elementwise == 24 * (neighbours + 60)


@pytest.mark.parametrize("kernel", [1, 2, 13, "3"])
def test_a_kernel_that_does_not_fit(kernel, attention):
    with pytest.raises(ValueError, match=r"6x10 grid; possible: \[3, 5, 7, 9, 11\]"):
        Pool.from_attention(attention(), (6, 10), 1, kernel=kernel)


@pytest.mark.parametrize("grid", [(1, 1), (1, 8)])
def test_a_grid_without_neighbours_is_named(grid, attention):
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]} grid has too few: take images of at least 2 patches"):
        Pool.from_attention(attention(), grid, 1)
