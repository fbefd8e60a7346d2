import functools
import math
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib import backbone
from thesis_lib.attention.mha import MHA
from thesis_lib.attention.performer import Performer, orthogonal_directions, quadratic
from thesis_lib.datasets.rendering import render
from thesis_lib.datasets.scenes import Stream, draw_scene


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def published(q: Tensor, k: Tensor, v: Tensor, directions: Tensor, eps: float = 0.0) -> Tensor:
    """FAVOR+ as in the paper, with the stabilisers and eps of the published codes."""
    scale = q.shape[-1] ** -0.25
    q, k = q * scale, k * scale
    on_q, on_k = q @ directions.mT, k @ directions.mT
    phi_q = torch.exp(on_q - q.square().sum(-1, keepdim=True) / 2 - on_q.amax(-1, keepdim=True)) + eps
    phi_k = torch.exp(on_k - k.square().sum(-1, keepdim=True) / 2 - on_k.amax((-1, -2), keepdim=True)) + eps
    return phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2).unsqueeze(-1))


def errors(spread: float, features: list[int], attention, head_dim: int = 64, **options) -> tuple[list[float], float]:
    """Relative errors on independent q, k, v, and that of the mean of the values."""
    q, k, v = normal(3, 4, 1, 196, head_dim).unbind()
    q, k = spread * q, spread * k
    exact = torch.softmax(q @ k.mT / math.sqrt(head_dim), dim=-1) @ v
    layers = [Performer.from_attention(attention(head_dim, 1), (14, 14), 0, features=m, **options) for m in features]
    error = [((layer.weights(q, k) @ v - exact).norm() / exact.norm()).item() for layer in layers]
    return error, ((v.mean(-2, keepdim=True) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("scaling", ["chi", "sqrt"])
@pytest.mark.parametrize(
    ("grid", "dim", "heads", "features", "order"),
    [((6, 10), 24, 3, None, "linear"), ((6, 10), 24, 3, 100, "linear"), ((3, 4), 64, 2, 40, "quadratic")],
)
def test_equals_the_published_formula_in_both_orders(grid, dim, heads, features, order, scaling, attention, tokens):
    layer, x = attention(dim, heads).double(), tokens(grid, dim=dim).double()
    mixer = Performer.from_attention(layer, grid, 1, features=features, scaling=scaling)
    assert quadratic(x.shape[1], mixer.head_dim, mixer.options["features"]) == (order == "quadratic")
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        expected = published(q, k, v, mixer.directions)
        assert_close(mixer(x), mixer.project_heads(expected))
        assert_close(mixer.attention_map(x) @ v, expected)


def test_the_order_is_the_cheaper_one(attention, tokens):
    def linear(n: int, dim: int, m: int) -> int:
        return 4 * n * dim**2 + 4 * n * m * dim

    for grid, features, same in (((14, 14), 266, True), ((8, 8), 266, False), ((8, 8), 64, True), ((8, 8), 32, True)):
        n = grid[0] * grid[1] + 1
        cost = Performer.cost(n, 128, 2, grid=grid, features=features).macs
        assert cost <= linear(n, 128, features) and (cost == linear(n, 128, features)) == same
        mixer = Performer.from_attention(attention(128, 2), grid, 1, features=features)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(tokens(grid, batch=1, dim=128))
        assert counter.get_total_flops() == 2 * cost


def test_gradients_are_those_of_the_published_formula(attention, tokens):
    x = tokens((4, 4)).double().requires_grad_()
    mixer = Performer.from_attention(attention().double(), (4, 4), 1)
    ours = torch.autograd.grad(mixer(x).square().sum(), x)[0]
    y = mixer.project_heads(published(*mixer.query_key_value(x), mixer.directions))
    assert_close(ours, torch.autograd.grad(y.square().sum(), x)[0])


def test_long_queries_and_keys_neither_vanish_nor_overflow(attention, tokens):
    mixer, x = Performer.from_attention(attention(), (8, 8), 1), 30 * tokens()
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        assert published(q, k, v, mixer.directions).isnan().any()
        weights = mixer.attention_map(x)
        assert_close(weights.sum(-1), torch.ones(2, 3, 65))
        expected = published(q.double(), k.double(), v.double(), mixer.directions.double())
        fine = expected.isfinite()
        assert fine.any() and not fine.all()  # not even float64 holds the published features
        assert mixer(x).isfinite().all()
    assert torch.autograd.grad(mixer(x.requires_grad_()).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("scaling", ["chi", "sqrt"])
def test_blocks_of_directions_are_orthogonal(scaling):
    directions = orthogonal_directions(40, 16, 0, scaling)
    assert directions.shape == (40, 16)
    unit = directions / directions.norm(dim=1, keepdim=True)
    for block in unit.split(16):
        assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64))
    lengths = directions.norm(dim=1)
    if scaling == "sqrt":
        assert_close(lengths, torch.full_like(lengths, 4.0))
    else:
        assert lengths.std() > 0.3 and len(lengths.unique()) == 40
        many = orthogonal_directions(4096, 16, 1, "chi").norm(dim=1)
        assert many.square().mean().item() == pytest.approx(16, rel=0.02)


def test_directions_are_uniform_thanks_to_the_sign_fix():
    draws = torch.stack([orthogonal_directions(8, 8, seed, "sqrt") for seed in range(400)])
    assert 0.4 < (draws[:, 0, 0] < 0).double().mean() < 0.6  # QR alone: always the same sign
    assert draws.mean(0).abs().max() < 0.2  # standard error 0.05
    assert_close(draws.square().mean(0), torch.ones(8, 8, dtype=torch.float64), rtol=0, atol=0.3)


def test_kernel_estimate_is_unbiased_with_chi_lengths_only():
    q, k = 0.6 * normal(2, 5, 4, dtype=torch.float64)
    exact = torch.exp(q @ k.T)

    def estimates(scaling):
        directions = torch.stack([orthogonal_directions(4, 4, seed, scaling) for seed in range(2500)])
        phi_q, phi_k = (torch.exp(a @ directions.mT - a.square().sum(-1, keepdim=True) / 2) for a in (q, k))
        kernel = phi_q @ phi_k.mT / 4  # (draws, 5, 5)
        return (kernel.mean(0) - exact) / (kernel.std(0) / 2500**0.5)

    assert estimates("chi").abs().max() < 4
    assert estimates("sqrt").abs().max() > 10


def test_error_falls_with_the_root_of_the_features_for_short_keys_only(attention):
    features = [256, 1024, 4096]
    short, uniform = errors(0.3, features, attention, scaling="chi")
    slope = math.log(short[-1] / short[0]) / math.log(features[-1] / features[0])
    assert -0.6 < slope < -0.4
    assert short[0] < uniform
    long, _ = errors(1.0, features, attention, scaling="chi")
    assert math.log(long[-1] / long[0]) / math.log(features[-1] / features[0]) > -0.3


def test_equal_lengths_have_the_smaller_error(attention):
    for spread in (0.3, 0.5, 0.8):
        (regular,), _ = errors(spread, [266], attention, scaling="sqrt")
        (chi,), _ = errors(spread, [266], attention, scaling="chi")
        assert regular < chi


def test_beats_uniform_attention_where_keys_are_short_and_loses_where_they_are_long(attention):
    """At d_h = 8 attention can be selective with short keys; at d_h = 64 or with longer keys it cannot be followed."""
    q, k = 1.2 * normal(2, 4, 1, 196, 8)
    weights = torch.softmax(q @ k.mT / math.sqrt(8), dim=-1)
    entropy = -(weights * weights.log()).sum(-1).mean() / math.log(196)
    assert 0.5 < entropy < 0.9
    (near,), uniform = errors(1.2, [64], attention, head_dim=8)
    assert near < 0.9 * uniform
    for spread, head_dim, features in ((2.0, 8, 64), (1.0, 64, 266), (1.0, 64, 1024), (1.5, 64, 266)):
        (far,), uniform = errors(spread, [features], attention, head_dim=head_dim)
        assert far > uniform, (spread, head_dim)


def test_beats_uniform_attention_in_every_layer_of_the_demo_backbone():
    model, seen = backbone.create("demo"), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda layer, inputs: seen.append((layer, inputs[0])))
    images = np.stack([render(draw_scene(Stream(3, i)), 0, 64) for i in range(4)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(part)[:, None, None] for part in backbone.normalization(model))
    with torch.no_grad():
        model((pixels - mean) / std)
        for layer, x in seen:
            exact, values = layer.mix_heads(x), layer.query_key_value(x)[2]
            error = (Performer.from_attention(layer, (8, 8), 1).mix_heads(x) - exact).norm()
            assert error < 0.9 * (values.mean(-2, keepdim=True) - exact).norm()


def test_any_order_and_number_of_tokens(attention, tokens):
    mixer, x = Performer.from_attention(attention(), (8, 8), 1), tokens((5, 7), 3)
    order = torch.randperm(38, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(mixer(x)[:, order], mixer(x[:, order]), rtol=1e-5, atol=1e-6)


def test_directions_change_on_request_only(attention, tokens):
    mixer, x = Performer.from_attention(attention(), (8, 8), 1), tokens()
    before, first = mixer.directions.clone(), mixer(x)
    for _ in range(3):
        mixer.train()(x).sum().backward()
    assert torch.equal(mixer.directions, before) and torch.equal(mixer.eval()(x), first)
    state = torch.get_rng_state()
    mixer.redraw(9)
    assert torch.equal(torch.get_rng_state(), state)
    assert mixer.options["seed"] == 9 and not torch.equal(mixer(x), first)
    assert torch.equal(mixer(x), Performer.from_attention(attention(), (8, 8), 1, seed=9)(x))
    other = Performer.from_attention(attention(), (8, 8), 1, seed=4)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x), mixer(x))
    mixer.redraw(0)
    assert torch.equal(mixer(x), first)


def test_features_are_single_precision_under_autocast_and_in_half(attention, tokens, monkeypatch):
    mixer, seen = Performer.from_attention(attention(), (8, 8), 1), {}

    def spied(owner, name):
        function = getattr(owner, name)

        def spy(*args, **kwargs):
            found = function(*args, **kwargs)
            parts = [*args, *kwargs.values(), *(found if isinstance(found, tuple) else [found])]
            seen.setdefault(name, []).append([part.dtype for part in parts if isinstance(part, torch.Tensor)])
            return found

        monkeypatch.setattr(owner, name, spy)

    spied(mixer, "directions_to_keys")
    spied(mixer, "tokens_to_directions")
    spied(torch.nn.functional, "scaled_dot_product_attention")
    half, single = torch.bfloat16, torch.float32
    with torch.autocast("cpu", half):
        with torch.no_grad():
            mixer(tokens())
        assert seen == {
            "directions_to_keys": [[half, *3 * [single]]],  # keys; exponentials, sums, c
            "scaled_dot_product_attention": [5 * [single]],  # queries, directions, values, c; the result
        }
        mixer(tokens())
        mixer.attention_map(tokens())
    assert seen["tokens_to_directions"] == 2 * [[half, single, single]]  # queries, c; the softmax
    half = Performer.from_attention(attention().half(), (8, 8), 1)
    assert half.directions.dtype == torch.float32 and torch.equal(half.directions, mixer.directions)


@pytest.mark.parametrize(("head_dim", "features"), [(64, 266), (32, 110), (8, 16), (2, 2), (1, 1)])
def test_default_number_of_features(head_dim, features, attention):
    mixer = Performer.from_attention(attention(2 * head_dim, 2), (8, 8), 1)
    assert mixer.options["features"] == features and mixer.directions.shape == (features, head_dim)


def test_cost_of_the_published_size():
    cost, mha = Performer.cost(197, 768, 12), MHA.cost(197, 768, 12)
    normaliser = 197 * 266 * 12
    assert round((cost.macs - 4 * 197 * 768**2 + normaliser) / 1e6, 1) == 161.6
    assert cost.params == mha.params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features=0 must be an integer at least 1"),
        ({"features": 8.0}, "features=8.0"),
        ({"seed": -1}, "seed=-1 must be an integer at least 0"),
        ({"scaling": "qr"}, "'chi', 'sqrt'"),
        ({"eps": 1e-4}, "no option 'eps'"),
    ],
)
def test_impossible_options(options, message, attention):
    with pytest.raises(ValueError, match=message):
        Performer.from_attention(attention(), (8, 8), 1, **options)
    with pytest.raises(ValueError, match="seed"):
        Performer.from_attention(attention(), (8, 8), 1).redraw(-3)


@pytest.fixture
def peer() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports modules that are deprecated
        return pytest.importorskip("performer_pytorch.performer_pytorch")


def test_equals_performer_pytorch(peer, attention, tokens, monkeypatch):
    mixer, x = Performer.from_attention(attention(), (8, 8), 1, features=40, scaling="chi"), tokens()
    kernel = peer.FastAttention(8, nb_features=40)
    kernel.projection_matrix.copy_(mixer.directions)
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        blurred = kernel(q, k, v)
        assert_close(blurred, published(q, k, v, mixer.directions, eps=1e-4), rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(peer, "softmax_kernel", functools.partial(peer.softmax_kernel, eps=0.0))
        assert_close(mixer.mix_heads(x), kernel(q, k, v), rtol=1e-5, atol=1e-5)
        assert (blurred - kernel(q, k, v)).abs().max() > 1e-3


def test_the_published_eps_turns_long_keys_into_the_mean_of_the_values(peer, attention):
    mixer = Performer.from_attention(attention(64, 1), (14, 14), 0, scaling="chi")
    kernel = peer.FastAttention(64, nb_features=266)
    kernel.projection_matrix.copy_(mixer.directions)
    q, k, v = normal(3, 2, 1, 196, 64).unbind()
    mean = v.mean(-2, keepdim=True).expand_as(v)
    assert_close(kernel(2 * q, 2 * k, v), mean, rtol=0, atol=1e-3)
    assert (mixer.weights(2 * q, 2 * k) @ v - mean).norm() > mean.norm()
