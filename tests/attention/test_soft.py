import pytest
import torch
from torch.testing import assert_close

from thesis_lib.attention.soft import SOFT, gaussian, newton_inverse


def residual(matrix: torch.Tensor, iterations: int) -> float:
    """|| P V - I || / sqrt(m)."""
    size = matrix.shape[-1]
    return ((matrix @ newton_inverse(matrix, iterations) - torch.eye(size)).norm(dim=(-2, -1)) / size**0.5).max().item()


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_landmarks_at_every_token_give_the_full_gaussian(prefix, attention, tokens):
    x = tokens((6, 10), prefix).double()
    layer = attention().double()

    def error(**options):
        mixer = SOFT.from_attention(layer, (6, 10), prefix, **options)
        with torch.no_grad():
            q, v = (mixer.split_heads(part(x)) for part in (mixer.q, mixer.v))
            kernel = torch.exp(-torch.cdist(q, q).square() / (2 * mixer.head_dim**0.5))
            expected = mixer.project_heads(kernel @ v)
            return ((mixer(x) - expected).norm() / expected.norm()).item()

    assert error(ratio=1, ridge=0.0, iterations=60) < 1e-6
    assert error(ratio=1, ridge=0.01, iterations=60) > 1e-3  # the ridge is a real approximation
    assert error(ratio=2, ridge=0.0, iterations=60) > 1e-2


def test_equals_the_published_formula(attention, tokens):
    """Landmarks, iteration and order of products as published, one head at a time; 64 tokens, no class token."""
    x, layer = tokens(prefix=0).double(), attention().double()
    mixer = SOFT.from_attention(layer, (8, 8), 0, landmarks="conv", iterations=40)
    with torch.no_grad():
        torch.nn.init.normal_(mixer.reduction.weight, std=0.2, generator=torch.Generator().manual_seed(0))
        heads = []
        for head in range(3):
            rows = slice(8 * head, 8 * head + 8)
            q = torch.nn.functional.linear(x, layer.qkv.weight[:24][rows], layer.qkv.bias[:24][rows])
            v = torch.nn.functional.linear(x, layer.qkv.weight[48:][rows], layer.qkv.bias[48:][rows])
            landmarks = mixer.reduction(q.mT.unflatten(-1, (8, 8))).flatten(2).mT
            q, landmarks = q / 8**0.25, landmarks / 8**0.25
            k1, k2 = (torch.exp(-torch.cdist(a, landmarks).square() / 2) for a in (q, landmarks))
            p = k2 + 0.01 * torch.eye(16)
            inverse = 0.9 * 2 / k2.sum(-1).amax(-1).square()[:, None, None] * p
            for _ in range(40):
                inverse = 2 * inverse - inverse @ p @ inverse
            heads.append((k1 @ inverse) @ (k1.mT @ v))
        expected = layer.proj(torch.cat(heads, dim=-1))
        assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)
        uniform = layer.proj(mixer.v(x).mean(1, keepdim=True).expand_as(x))
        assert (uniform - expected).norm() > 0.5 * expected.norm()


def test_newton_converges_for_separate_landmarks():
    points = torch.randn(4, 49, 32, generator=torch.Generator().manual_seed(0))
    matrix = gaussian(points, points) + 0.01 * torch.eye(49)
    assert residual(matrix, 8) < 1e-3
    assert_close(newton_inverse(matrix, 20), torch.linalg.inv(matrix), rtol=1e-3, atol=1e-4)


def test_newton_needs_its_steps_for_similar_landmarks():
    points = 0.1 * torch.randn(4, 49, 32, generator=torch.Generator().manual_seed(0))
    matrix = gaussian(points, points) + 0.01 * torch.eye(49)
    assert torch.linalg.cond(matrix).min() > 1e3
    assert residual(matrix, 6) > 0.9  # six steps invert next to nothing
    assert residual(matrix, 40) < 1e-2


def test_gradient_is_that_of_an_inverse():
    points = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = (gaussian(points, points) + 0.01 * torch.eye(9)).requires_grad_()
    weight = torch.randn(3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((newton_inverse(matrix, 40) * weight).sum(), matrix)[0]
    exact = torch.autograd.grad((torch.linalg.inv(matrix) * weight).sum(), matrix)[0]
    assert_close(ours, exact)


def test_gradient_check_of_the_layer(attention, tokens):
    layer = attention(8, 2).double()
    mixer = SOFT.from_attention(layer, (2, 4), 1, iterations=40)
    x = tokens((2, 4), batch=1, dim=8).double().requires_grad_()
    assert torch.autograd.gradcheck(mixer, x, atol=1e-5)


def test_every_image_and_head_starts_for_itself():
    spread = torch.tensor([0.05, 1.0, 5.0])[:, None, None]
    points = spread * torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    matrix = gaussian(points, points) + 0.01 * torch.eye(16)
    alone = torch.stack([newton_inverse(one[None], 12)[0] for one in matrix])
    assert_close(newton_inverse(matrix, 12), alone)


def test_kernel_of_large_values_keeps_its_diagonal():
    points = 30 * torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    kernel = gaussian(points, points)
    assert kernel.max() <= 1.0
    assert_close(kernel, torch.eye(20).expand(2, -1, -1), atol=0.02, rtol=0)


def test_no_denormal_entries():
    points = 4 * torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    kernel = gaussian(points, points)
    tiny = torch.finfo(torch.float32).tiny
    assert (torch.exp(-torch.cdist(points, points).square() / 2).clamp(min=0) < tiny).any()
    assert ((kernel == 0) | (kernel > tiny**0.5)).all()
    assert gaussian(points * torch.nan, points).isnan().all()


def test_inverse_runs_in_single_precision_under_autocast(attention, tokens):
    mixer = SOFT.from_attention(attention(), (8, 8), 1)
    with torch.autocast("cpu", torch.bfloat16):
        k1, inverse = mixer.kernels(tokens())
    assert k1.dtype == inverse.dtype == torch.float32
    # the class token is a landmark of its own: bf16 distances would miss 1 by up to a factor
    assert_close(k1[:, :, 0, 0], torch.ones(2, 3), atol=1e-4, rtol=0)


def test_convolved_landmarks_start_as_averages(attention, tokens):
    average, conv = (SOFT.from_attention(attention(), (6, 10), 1, landmarks=kind) for kind in ("avg", "conv"))
    with torch.no_grad():
        assert_close(conv(tokens((6, 10))), average(tokens((6, 10))), rtol=1e-3, atol=1e-4)


def test_map_is_the_gaussian_where_landmarks_are_tokens(attention, tokens):
    x = tokens((6, 10)).double()
    mixer = SOFT.from_attention(attention().double(), (6, 10), 1, ratio=1, ridge=0.0, iterations=60)
    with torch.no_grad():
        q = mixer.split_heads(mixer.q(x))
        kernel = torch.exp(-torch.cdist(q, q).square() / (2 * mixer.head_dim**0.5))
        assert_close(mixer.attention_map(x), kernel / kernel.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_cost_of_the_published_size():
    published = SOFT.cost(196, 768, 12, prefix_tokens=0).macs  # 49 landmarks, no class token
    linear = 3 * 196 * 768**2
    assert published - linear == 3 * 196 * 49 * 768 + 2 * 49**2 * 768 + 2 * 20 * 49**3 * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 3}, r"possible: \[1, 2, 4, 8\]"),
        ({"ridge": -0.1}, "ridge=-0.1 must be a number that is not negative"),
        ({"ridge": float("nan")}, "ridge=nan"),
        ({"iterations": 0}, "iterations=0 must be an integer at least 1"),
        ({"landmarks": "random"}, "'avg', 'conv'"),
    ],
)
def test_impossible_options(options, message, attention):
    with pytest.raises(ValueError, match=message):
        SOFT.from_attention(attention(), (8, 8), 1, **options)


@pytest.mark.parametrize(
    ("grid", "count"), [((8, 8), 16), ((14, 14), 49), ((24, 24), 64), ((37, 37), 64), ((48, 48), 64), ((3, 5), 6)]
)
def test_the_default_number_of_landmarks_does_not_grow_with_the_grid(grid, count, attention, tokens):
    mixer = SOFT.from_attention(attention(), grid, 1)
    landmarks = mixer.landmarks(mixer.split_heads(mixer.q(tokens(grid))))
    assert landmarks.shape[2] == 1 + count


def test_the_default_is_ratio_2_where_that_leaves_at_most_8_cells_a_side(attention, tokens):
    x, layer = tokens((8, 16)), attention()
    default, halved = (SOFT.from_attention(layer, (8, 16), 1, **options) for options in ({}, {"ratio": 2}))
    assert_close(default(x), halved(x))
    assert SOFT.cost(129, 24, 3, grid=(8, 16)) == SOFT.cost(129, 24, 3, grid=(8, 16), ratio=2)
