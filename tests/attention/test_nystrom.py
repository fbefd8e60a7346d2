import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from thesis_lib.attention.cells import cell_means, tiling
from thesis_lib.attention.mha import MHA
from thesis_lib.attention.nystrom import Nystrom, iterative_inverse

build = Nystrom.from_attention


def lengths(tokens: int, cells: int) -> list[int]:
    return [tokens // cells] * (cells - tokens % cells) + [tokens // cells + 1] * (tokens % cells)


def membership(grid: tuple[int, int], cells: tuple[int, int], prefix: int) -> torch.Tensor:
    """One row a landmark, one column a token: 1 where the landmark holds the token."""
    rows, columns = (
        torch.block_diag(*(torch.ones(1, n, dtype=torch.float64) for n in lengths(side, count)))
        for side, count in zip(grid, cells, strict=True)
    )
    return torch.block_diag(torch.eye(prefix, dtype=torch.float64), torch.kron(rows, columns))


def smooth_tokens(grid: tuple[int, int], dim: int, seed: int = 3, coarse: int = 4) -> torch.Tensor:
    """A class token and a smooth field of patches with noise, (2, 1 + H*W, dim)."""
    generator = torch.Generator().manual_seed(seed)
    field = F.interpolate(torch.randn(2, dim, coarse, coarse, generator=generator), grid, mode="bicubic")
    patches = field.flatten(2).mT / field.std()
    patches = patches + 0.3 * torch.randn(patches.shape, generator=generator)
    return torch.cat([torch.randn(2, 1, dim, generator=generator), patches], dim=1)


def entropy(weights: torch.Tensor) -> float:
    """Mean entropy of the rows, 1 for uniform attention."""
    return (-torch.xlogy(weights, weights).sum(-1).mean() / torch.tensor(float(weights.shape[-1])).log()).item()


CASES = [  # grid, prefix, options, cells in the layout's own grid
    ((8, 8), 1, {}, (4, 4)),
    ((6, 10), 5, {"landmarks": 8}, (2, 4)),
    ((7, 5), 0, {"landmarks": 6}, (3, 2)),
    ((14, 14), 1, {"landmarks": 64, "layout": "segment"}, (1, 64)),
    ((1, 197), 0, {"landmarks": 16, "layout": "segment"}, (1, 16)),
]


@pytest.mark.parametrize(("grid", "prefix", "options", "cells"), CASES)
def test_equals_the_dense_formula(grid, prefix, options, cells, attention, tokens):
    mixer = build(attention().double(), grid, prefix, **options)
    x = tokens(grid, prefix).double()
    shape = grid if options.get("layout") != "segment" else (1, grid[0] * grid[1])
    means = membership(shape, cells, prefix)
    means /= means.sum(1, keepdim=True)
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        k1, k2, k3 = (mixer.weights(a, b) for a, b in ((q, means @ k), (means @ q, means @ k), (means @ q, k)))
        z = torch.stack([reference_inverse(one, 6) for one in k2.flatten(0, 1)]).view_as(k2)
        assert_close(mixer.attention_map(x), k1 @ z @ k3)
        assert_close(mixer(x), mixer.project_heads(k1 @ z @ k3 @ v))
        assert torch.linalg.matrix_rank(mixer.attention_map(x)).max() <= len(means) < x.shape[1]


def reference_inverse(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    z = matrix.mT / (matrix.sum(0).max() * matrix.sum(1).max())
    for _ in range(steps):
        w = matrix @ z
        z = z @ (13 * eye - w @ (15 * eye - w @ (7 * eye - w))) / 4
    return z


@pytest.mark.parametrize(
    ("grid", "prefix", "options", "cells"), [*CASES[:3], ((6, 10), 1, {"landmarks": 16, "layout": "segment"}, (1, 16))]
)
def test_exact_on_tokens_that_are_constant_in_each_cell(grid, prefix, options, cells, attention, tokens):
    layer = attention().double()
    shape = grid if options.get("layout") != "segment" else (1, grid[0] * grid[1])
    member = membership(shape, cells, prefix)
    x = member.mT @ tokens((1, len(member)), 0).double()
    with torch.no_grad():
        expected = MHA.from_attention(layer, grid, prefix)(x)
        assert_close(build(layer, grid, prefix, iterations=40, **options)(x), expected, rtol=1e-5, atol=1e-6)
        few = build(layer, grid, prefix, iterations=2, **options)(x)
        assert (few - expected).abs().max() > 1e-3  # it is the inverse that makes it exact


@pytest.mark.parametrize("layout", ["grid", "segment"])
def test_a_landmark_at_every_token_is_mha(layout, attention, tokens):
    layer, x = attention().double(), tokens((6, 10)).double()
    mha = MHA.from_attention(layer, (6, 10), 1)
    mixer = build(layer, (6, 10), 1, landmarks=60, layout=layout, iterations=40)
    with torch.no_grad():
        assert torch.equal(mixer(x), mha(x)) and torch.equal(mixer.attention_map(x), mha.attention_map(x))
        mixer.exact = False  # without the short-cut: K Z K = K
        assert_close(mixer.attention_map(x), mha.attention_map(x), rtol=1e-6, atol=1e-8)
        assert_close(mixer(x), mha(x), rtol=1e-6, atol=1e-7)


def test_inverse_converges_with_its_steps(attention, tokens):
    mixer = build(attention().double(), (14, 14), 1)
    q, k, _ = mixer.query_key_value(tokens((14, 14)).double())
    matrix = mixer.weights(mixer.landmarks(q), mixer.landmarks(k))
    assert 1e2 < torch.linalg.cond(matrix).max() < 1e8
    rest = [
        ((matrix @ iterative_inverse(matrix, steps) @ matrix - matrix).norm() / matrix.norm()).item()
        for steps in (2, 6, 12, 40)
    ]
    assert rest == sorted(rest, reverse=True) and 1e-3 < rest[1] < 0.2 and rest[3] < 1e-6
    assert_close(matrix @ iterative_inverse(matrix, 40), torch.eye(50).double().expand_as(matrix), rtol=0, atol=1e-4)


def test_every_image_and_head_starts_for_itself():
    spread = torch.tensor([0.1, 1.0, 5.0])[:, None, None]
    logits = spread * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    matrix = logits.softmax(-1)
    alone = torch.stack([iterative_inverse(one[None], 6)[0] for one in matrix])
    assert_close(iterative_inverse(matrix, 6), alone)


@pytest.mark.parametrize("sharpness", [1.0, 1.4])
@pytest.mark.parametrize(("grid", "layout"), [((14, 14), "grid"), ((14, 14), "segment"), ((8, 8), "grid")])
def test_beats_uniform_attention(grid, layout, sharpness, attention):
    layer, x = attention(96), smooth_tokens(grid, 96)
    with torch.no_grad():
        layer.qkv.weight[: 2 * 96] *= sharpness
        mha = MHA.from_attention(layer, grid, 1)
        assert 0.5 < entropy(mha.attention_map(x)) < 0.9
        values = mha.query_key_value(x)[2]
        uniform = mha.project_heads(values.mean(2, keepdim=True).expand_as(values))
        expected = mha(x)
        assert (build(layer, grid, 1, layout=layout)(x) - expected).norm() < 0.5 * (uniform - expected).norm()


def test_squares_of_the_grid_are_better_landmarks_than_strips(attention):
    layer, x = attention(96), smooth_tokens((14, 14), 96)
    with torch.no_grad():
        expected = MHA.from_attention(layer, (14, 14), 1)(x)
        squares, strips = (
            (build(layer, (14, 14), 1, landmarks=49, layout=layout)(x) - expected).norm()
            for layout in ("grid", "segment")
        )
    assert squares < 0.7 * strips


def transformers_peer(mixer: Nystrom, tokens: int, heads: int) -> nn.Module:
    module = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    config = module.NystromformerConfig(
        hidden_size=24,
        num_attention_heads=heads,
        num_landmarks=mixer.options["landmarks"],
        segment_means_seq_len=tokens,
        conv_kernel_size=mixer.options["conv"] or 65,
        attention_probs_dropout_prob=0.0,
    )
    peer = module.NystromformerSelfAttention(config).eval()
    weights, biases = mixer.qkv.weight.chunk(3), mixer.qkv.bias.chunk(3)
    for linear, weight, bias in zip((peer.query, peer.key, peer.value), weights, biases, strict=True):
        linear.load_state_dict({"weight": weight, "bias": bias})
    if mixer.conv is None:
        peer.conv_kernel_size = None  # its configuration cannot leave the convolution out
    else:
        peer.conv.load_state_dict(mixer.conv.state_dict())
    return peer


@pytest.mark.parametrize("conv", [0, 33])
def test_equals_transformers_with_its_exact_start(conv, attention, tokens):
    mixer = build(attention(), (8, 8), 0, landmarks=16, layout="segment", conv=conv)
    with torch.no_grad():
        if conv:
            nn.init.normal_(mixer.conv.weight, std=0.1)
        peer = transformers_peer(mixer, 64, 3)
        x = tokens(prefix=0)
        published = mixer.proj(peer(x)[0])
        peer.init_option = "exact"  # its configuration cannot choose it
        assert_close(mixer(x), mixer.proj(peer(x)[0]), rtol=1e-5, atol=1e-5)
        assert (mixer(x) - published).abs().max() > 1e-3  # the deliberate difference


def test_published_start_depends_on_the_batch_and_ours_does_not(attention, tokens):
    mixer = build(attention(), (8, 8), 0, landmarks=16, layout="segment")
    peer, x = transformers_peer(mixer, 64, 3), tokens(prefix=0)
    x[1] *= 5
    with torch.no_grad():
        assert (peer(x)[0][0] - peer(x[:1])[0][0]).abs().max() > 1e-3
        assert_close(mixer(x)[0], mixer(x[:1])[0], rtol=1e-5, atol=1e-6)


def package_peer(mixer: Nystrom, heads: int, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The nystrom-attention package with the mixer's weights, each matrix inverted alone."""
    package = pytest.importorskip("nystrom_attention.nystrom_attention")
    together = package.moore_penrose_iter_pinv

    def one_by_one(matrices, iters):
        return torch.stack([together(one[None, None], iters)[0, 0] for one in matrices.flatten(0, 1)]).view_as(matrices)

    monkeypatch.setattr(package, "moore_penrose_iter_pinv", one_by_one)
    sizes = {"dim_head": 24 // heads, "heads": heads, "num_landmarks": mixer.options["landmarks"]}
    conv = mixer.options["conv"]
    peer = package.NystromAttention(24, **sizes, residual=conv > 0, residual_conv_kernel=conv or 33).eval()
    peer.to_qkv.load_state_dict(mixer.qkv.state_dict())
    peer.to_out[0].load_state_dict(mixer.proj.state_dict())
    if conv:
        peer.res_conv.load_state_dict(mixer.conv.state_dict())
    return peer


@pytest.mark.parametrize("conv", [0, 5])
def test_equals_the_package_where_landmarks_divide_the_tokens(conv, attention, tokens, monkeypatch):
    mixer = build(attention(qkv_bias=False), (8, 8), 0, landmarks=16, layout="segment", conv=conv)
    with torch.no_grad():
        if conv:
            nn.init.normal_(mixer.conv.weight, std=0.1)
        peer, x = package_peer(mixer, 3, monkeypatch), tokens(prefix=0)
        assert_close(mixer(x), peer(x), rtol=1e-5, atol=1e-5)
        monkeypatch.undo()
        assert (mixer(x) - peer(x)).abs().max() > 1e-3  # its start is that of the whole batch


def test_padding_of_the_package_is_what_differs_elsewhere(attention, monkeypatch):
    layer, x = attention(qkv_bias=False), smooth_tokens((6, 10), 24)[:, 1:]
    mixer, padded = (build(layer, grid, 0, landmarks=40, layout="segment") for grid in ((6, 10), (8, 10)))
    peer = package_peer(mixer, 3, monkeypatch)
    with torch.no_grad():
        assert_close(peer(x), padded(F.pad(x, (0, 0, 20, 0)))[:, 20:], rtol=1e-5, atol=1e-5)
        expected = MHA.from_attention(layer, (6, 10), 0)(x)
        assert (mixer(x) - expected).norm() < 0.7 * (peer(x) - expected).norm()


def test_convolution_starts_at_zero_and_is_one_kernel_a_head(attention, tokens):
    x = tokens((6, 10))
    plain, mixer = build(attention(), (6, 10), 1), build(attention(), (6, 10), 1, conv=5)
    with torch.no_grad():
        assert torch.equal(mixer(x), plain(x))
        mixer.conv.weight[1, 0, 2] = 1.0  # the second head adds its own values
        values = mixer.query_key_value(x)[2] * torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
        assert_close(mixer.mix_heads(x), plain.mix_heads(x) + values)
    assert mixer.conv.weight.shape == (3, 1, 5, 1)


def test_inverse_runs_in_single_precision_under_autocast(attention, tokens):
    mixer = build(attention(), (8, 8), 1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        q, k, _ = mixer.query_key_value(tokens())
        q, k = mixer.landmarks(q), mixer.landmarks(k)
        inverse = mixer.inverse(q, k)
    assert q.dtype == torch.bfloat16 and inverse.dtype == torch.float32
    with torch.no_grad():
        assert_close(inverse, mixer.inverse(q.float(), k.float()))


def test_runs_on_the_flash_kernel(attention, tokens):
    mixer, x = build(attention(), (8, 8), 1), tokens()
    with torch.no_grad():
        expected = mixer(x)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where inputs do not qualify
            assert_close(mixer(x), expected)


def test_map_times_values_is_the_output(attention, tokens):
    mixer, x = build(attention(qk_norm=True, scale_norm=True), (6, 10), 1, layout="segment"), tokens((6, 10))
    with torch.no_grad():
        values = mixer.query_key_value(x)[2]
        assert_close(mixer.project_heads(mixer.attention_map(x) @ values), mixer(x), rtol=1e-4, atol=1e-5)


def test_gradient_check_of_the_layer(attention, tokens):
    mixer = build(attention(8, 2).double(), (3, 4), 1, landmarks=4, conv=3)
    x = tokens((3, 4), batch=1, dim=8).double().requires_grad_()
    assert torch.autograd.gradcheck(mixer, x)


def test_cost_of_the_published_size():
    tokens, m, dim, heads, steps = 196, 49, 768, 12, 6
    published = (
        4 * tokens * dim**2 + 4 * tokens * m * dim + m**2 * dim + 4 * steps * m**3 * heads + tokens * m**2 * heads
    )
    saved = tokens * m**2 * heads - m**2 * dim  # the product taken from the right
    cost = Nystrom.cost(tokens, dim, heads, prefix_tokens=0)
    assert cost.macs == published - saved and cost.params == 4 * dim**2 + 4 * dim
    assert Nystrom.cost(tokens, dim, heads, prefix_tokens=0, conv=33).params == cost.params + 396
    assert Nystrom.cost(tokens, dim, heads, prefix_tokens=0, landmarks=196) == MHA.cost(tokens, dim, heads)


@pytest.mark.parametrize(
    ("grid", "count", "cells"),
    [((8, 8), 16, (4, 4)), ((14, 14), 64, (8, 8)), ((6, 10), 15, (3, 5)), ((5, 20), 16, (2, 8)), ((4, 4), 11, None)],
)
def test_cells_are_as_square_as_can_be(grid, count, cells):
    assert tiling(count, grid) == cells


def test_means_of_cells_that_do_not_divide():
    x = torch.arange(15.0).reshape(1, 15, 1)  # 3 x 5 -> rows of 1 and 2, columns of 2 and 3
    assert cell_means(x, (3, 5), (2, 2)).flatten().tolist() == [0.5, 3.0, 8.0, 10.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 61}, "landmarks=61 must be an integer from 1 to 60"),
        ({"landmarks": 0}, "from 1 to 60"),
        ({"landmarks": 49}, "landmarks=49 cells do not tile a 6x10 grid .* the nearest that do: 48, 50"),
        ({"iterations": 0}, "iterations=0 must be an integer at least 1"),
        ({"conv": 4}, "conv=4 must be 0 or odd; near: 3, 5"),
        ({"layout": "random"}, "'grid', 'segment'"),
    ],
)
def test_impossible_options(options, message, attention):
    with pytest.raises(ValueError, match=message):
        build(attention(), (6, 10), 1, **options)
