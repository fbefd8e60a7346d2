import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib.attention.hybrid import Hybrid, Windows, linear_attention, window_side
from thesis_lib.attention.mha import MHA

GRIDS = [(8, 8), (14, 14), (6, 10), (7, 9), (13, 11), (5, 16)]
OPTIONS = [
    {},
    {"combine": "split"},
    {"linear": False},
    {"linear": False, "combine": "split"},
    {"dilations": [], "linear": True},
    {"dilations": [1]},
    {"dilations": [2], "window": 3, "combine": "split"},
]


def axis_window(i: int, length: int, dilation: int, window: int) -> tuple[int, int]:
    """Phase and number of the window that position i of an axis is in, counted token by token."""
    phase = list(range(i % dilation, length, dilation))
    side = window_side(-(-length // dilation), window)
    return i % dilation, phase.index(i) // side


def receptive_set(grid: tuple[int, int], dilation: int, window: int, prefix: int) -> torch.Tensor:
    """Which tokens (columns) a token (row) attends to, (N, N)."""
    places = [
        tuple(axis_window(i, length, dilation, window) for i, length in zip(place, grid, strict=True))
        for place in ((row, column) for row in range(grid[0]) for column in range(grid[1]))
    ]
    seen = torch.ones(prefix + len(places), prefix + len(places), dtype=torch.bool)
    seen[prefix:, prefix:] = torch.tensor([[a == b for b in places] for a in places])
    return seen


@pytest.mark.parametrize("layer", [{}, {"qk_norm": True}, {"scale_norm": True}, {"qkv_bias": False}], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_one_window_over_the_grid_is_mha(prefix, layer, attention, tokens):
    x = tokens((6, 10), prefix)
    mixer = Hybrid.from_attention(attention(**layer), (6, 10), prefix, window=10, dilations=[1], linear=False)
    assert mixer.gate is None and mixer.lora_targets == ("qkv",)
    with torch.no_grad():
        expected = MHA.from_attention(attention(**layer), (6, 10), prefix)(x)
        assert_close(mixer(x), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_windows_hold_every_token_once_and_give_it_back(dilation, grid):
    windows = Windows.fit(grid, dilation, 7)
    place = torch.arange(1.0, 1 + grid[0] * grid[1]).view(1, 1, -1, 1)
    cut = windows.split(place)
    assert cut.shape == (1, 1, windows.number, math.prod(windows.side), 1)
    assert sorted(cut[cut > 0].tolist()) == place.flatten().tolist()
    assert torch.equal(windows.merge(cut), place)
    x = torch.randn(2, 3, grid[0] * grid[1], 5)
    assert torch.equal(windows.merge(windows.split(x)), x)
    assert windows.padded == bool((cut == 0).any()) == bool(~windows.mask(0, torch.device("cpu")).all())
    number = windows.numbers(torch.device("cpu"))
    inside = cut[0, 0, :, :, 0].long()
    for i, window in enumerate(inside):
        assert (number[window[window > 0] - 1] == i).all()


@pytest.mark.parametrize(
    ("grid", "dilations", "side"),
    [
        ((14, 14), (1, 2), 7),
        ((28, 28), (1, 2, 4), 7),
        ((8, 8), (1, 2), 4),
        ((32, 32), (1, 2, 4), 4),
        ((24, 24), (2,), 6),
    ],
)
def test_grids_of_the_study_are_tiled_without_a_mask(grid, dilations, side):
    for dilation in dilations:
        windows = Windows.fit(grid, dilation, 7)
        assert windows.side == (side, side) and not windows.padded
        assert windows.number * side**2 == grid[0] * grid[1]


def test_no_padding_means_no_mask(attention, tokens, monkeypatch):
    masks, attend = [], nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    Hybrid.from_attention(attention(), (14, 14), 1)(tokens((14, 14)))
    assert masks == [None] * 3  # two branches of windows, and the class token
    Hybrid.from_attention(attention(), (13, 13), 1)(tokens((13, 13)))
    assert sum(mask is not None for mask in masks) == 2


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_are_masked_dense_attention(grid, prefix, attention, tokens):
    x, dilations = 3 * tokens(grid, prefix), [1, 2]
    build, layer = Hybrid.from_attention, attention()
    summed, split = (build(layer, grid, prefix, linear=False, combine=combine) for combine in ("sum", "split"))
    assert split.shares == [2, 1] and summed.shares == [3, 3]
    seen = [receptive_set(grid, dilation, 7, prefix) for dilation in dilations]
    assert not any(mask.all() for mask in seen)
    with torch.no_grad():
        qkv = summed.query_key_value(x)
        local, dilated = (nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask) for mask in seen)
        assert_close(summed.mix_heads(x), (local + dilated) / 2, rtol=1e-4, atol=1e-5)
        expected = torch.cat([local[:, :2], dilated[:, 2:]], dim=1)
        assert_close(split.mix_heads(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_linear_branch_is_its_dense_kernel(prefix, attention, tokens):
    x = tokens((6, 10), prefix)
    mixer = Hybrid.from_attention(attention(), (6, 10), prefix, dilations=[], linear=True)
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        kernel = (nn.functional.elu(8**0.25 * q) + 1) @ (nn.functional.elu(8**0.25 * k) + 1).mT
        expected = kernel / kernel.sum(-1, keepdim=True) @ v
        assert_close(mixer.mix_heads(x)[:, :, prefix:], expected[:, :, prefix:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_neither_vanish_nor_overflow(dtype, scale):
    q, k = (scale * torch.randn(2, 3, 60, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    v = torch.ones(2, 3, 60, 8).to(dtype)
    for shift in (0, -3 * scale, -200):  # the last leaves no feature that float32 could hold
        y = linear_attention((q + shift).to(dtype), (k + shift).to(dtype), v)
        assert y.dtype == dtype
        assert_close(y, v, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.float16):
        assert_close(linear_attention(q, k, v), v, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("combine", ["sum", "split"])
def test_prefix_tokens_attend_to_everything_exactly(combine, attention, tokens):
    x = tokens((7, 9), 2)
    hybrid = Hybrid.from_attention(attention(), (7, 9), 2, combine=combine)
    with torch.no_grad():
        hybrid.gate.weight.copy_(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)))
        expected = MHA.from_attention(attention(), (7, 9), 2)(x)
        assert_close(hybrid(x)[:, :2], expected[:, :2], rtol=1e-5, atol=2e-6)
        assert (hybrid(x) - expected)[:, 2:].abs().max() > 1e-2


def test_gates_start_uniform_and_weigh_branches(attention, tokens):
    x, layer = tokens(), attention()
    alone = [{"dilations": [1], "linear": False}, {"dilations": [2], "linear": False}, {"dilations": []}]
    with torch.no_grad():
        branches = [Hybrid.from_attention(layer, (8, 8), 1, **options).mix_heads(x) for options in alone]
        prefix = branches[0][:, :, :1]
        for combine, total in (("sum", 1.0), ("split", 3.0)):
            mixer = Hybrid.from_attention(layer, (8, 8), 1, combine=combine)
            assert all(torch.equal(gate, torch.full((2, 1, 64, 1), total / 3)) for gate in mixer.gates(x))
            for weight in (0.0, 1.0):
                nn.init.normal_(mixer.gate.weight, std=weight, generator=torch.Generator().manual_seed(0))
                gates = (x[:, 1:] @ mixer.gate.weight.T).softmax(-1).mT[:, :, None, :, None] * total
                weighed = [y[:, :, 1:] * gates[:, i] for i, y in enumerate(branches)]
                if combine == "sum":
                    patches = sum(weighed)
                else:
                    patches = torch.cat([y[:, [head]] for head, y in enumerate(weighed)], dim=1)
                assert_close(mixer.mix_heads(x), torch.cat([prefix, patches], dim=2), rtol=1e-4, atol=1e-5)
            assert gates.std() > 0.1
    assert Hybrid.from_attention(attention(48, 8), (8, 8), 1, combine="split").shares == [3, 3, 2]


def test_turned_and_mirrored_images_give_turned_and_mirrored_tokens(attention, tokens):
    mixer, x = Hybrid.from_attention(attention(), (8, 8), 1), tokens()

    def move(x, transform):
        image = transform(x[:, 1:].mT.unflatten(-1, (8, 8)))
        return torch.cat([x[:, :1], image.flatten(2).mT], dim=1)

    with torch.no_grad():
        for transform in (lambda x: x.rot90(1, (2, 3)), lambda x: x.flip(3), lambda x: x.transpose(2, 3)):
            assert_close(mixer(move(x, transform)), move(mixer(x), transform), rtol=1e-4, atol=1e-5)
        rolled = move(mixer(x), lambda x: x.roll(1, 3))
        assert (mixer(move(x, lambda x: x.roll(1, 3))) - rolled).abs().max() > 1e-2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", [(6, 10), (7, 9)], ids=str)
def test_map_times_values_is_the_output(grid, options, attention, tokens):
    mixer, x = Hybrid.from_attention(attention(), grid, 1, **options), tokens(grid)
    with torch.no_grad():
        values, weights = mixer.query_key_value(x)[2], mixer.attention_map(x)
        assert_close(mixer.project_heads(weights @ values), mixer(x), rtol=1e-4, atol=1e-5)
        if mixer.gate is not None and not mixer.split:  # the map holds the gates too
            nn.init.normal_(mixer.gate.weight, generator=torch.Generator().manual_seed(0))
            weights = mixer.attention_map(x)
            assert_close(mixer.project_heads(weights @ values), mixer(x), rtol=1e-4, atol=1e-5)
        assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [*GRIDS, (4, 4), (17, 23)], ids=str)
def test_cost_of_any_grid_and_option_is_what_is_counted(grid, prefix, attention, tokens):
    x = tokens(grid, prefix, batch=1)
    for options in [*OPTIONS, {"window": 2}, {"window": 3, "dilations": [2, 1]}, {"window": 40}]:
        mixer = Hybrid.from_attention(attention(), grid, prefix, **options)
        cost = Hybrid.cost(x.shape[1], 24, 3, grid=grid, prefix_tokens=prefix, **options)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert mixer(x).isfinite().all()
        assert counter.get_total_flops() == 2 * cost.macs, options
        assert sum(parameter.numel() for parameter in mixer.parameters()) == cost.params


def test_cost_of_windows_of_seven():
    tokens, dim, heads = 197, 768, 12
    rest = 4 * tokens * dim**2 + 2 * tokens * dim  # projections, class token
    branch, linear = 2 * 196 * 50 * dim, (tokens + 196) * 64 * dim + 196 * dim
    for combine, share in (("sum", 1), ("split", 3)):
        macs = Hybrid.cost(tokens, dim, heads, combine=combine).macs
        assert macs == rest + (2 * branch + linear) // share + 3 * 196 * dim
    assert Hybrid.cost(tokens, dim, heads, linear=False).macs == rest + 2 * branch + 2 * 196 * dim


def test_gradients_through_masked_windows(attention, tokens):
    mixer = Hybrid.from_attention(attention(6, 3).double(), (5, 5), 0, dilations=[2, 1], window=4)
    assert mixer.windows[0].padded and mixer.windows[1].padded
    x = tokens((5, 5), 0, batch=1, dim=6).double().requires_grad_()
    assert torch.autograd.gradcheck(mixer, x, atol=1e-5)


def test_nearer_to_mha_than_uniform_attention_on_images(attention, tokens):
    """Neighbours are alike, as in images: what a window sees stands for the rest."""
    coarse = tokens((4, 4), 0)
    smooth = nn.functional.interpolate(coarse.mT.unflatten(-1, (4, 4)), size=(14, 14), mode="bicubic").flatten(2).mT
    x = 1.5 * torch.cat([tokens((1, 1), 0, seed=3), smooth + 0.3 * tokens((14, 14), 0, seed=4)], dim=1)
    with torch.no_grad():
        mha, mixer = (kind.from_attention(attention(), (14, 14), 1) for kind in (MHA, Hybrid))
        split = Hybrid.from_attention(attention(), (14, 14), 1, combine="split")
        entropy = torch.special.entr(mha.attention_map(x)).sum(-1).mean() / math.log(197)
        assert 0.5 < entropy < 0.9
        values = mha.query_key_value(x)[2]
        uniform = mha.project_heads(values.mean(2, keepdim=True).expand_as(values))
        error, of_split, of_uniform = ((y - mha(x)).norm() for y in (mixer(x), split(x), uniform))
        assert error < 0.8 * of_uniform and error < of_split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window=1 must be an integer at least 2"),
        ({"dilations": [5]}, r"dilations=\[5\]: on the 8x8 grid a dilation is at most 4"),
        ({"dilations": [0]}, "dilations=0 must be an integer at least 1"),
        ({"dilations": [1, 1]}, "distinct integers"),
        ({"dilations": 2}, "dilations=2 must be a list"),
        ({"dilations": [], "linear": False}, "0 branches; there must be at least 1"),
        ({"dilations": [1, 2, 4], "combine": "split"}, "4 branches; 3 heads can be split over 1 to 3"),
        ({"combine": "mean"}, "'sum', 'split'"),
        ({"linear": "yes"}, "linear='yes' must be one of True, False"),
    ],
)
def test_impossible_options(options, message, attention):
    with pytest.raises(ValueError, match=message):
        Hybrid.from_attention(attention(), (8, 8), 1, **options)


def test_a_grid_too_small_for_the_default_dilations_is_named_with_those_that_fit(attention):
    with pytest.raises(ValueError, match=r"3x3 grid a dilation is at most 1; .*dilations=\[1\]"):
        Hybrid.from_attention(attention(), (3, 3), 1)
    assert Hybrid.from_attention(attention(), (3, 3), 1, dilations=[1]).options["dilations"] == [1]
