"""The properties that every mixer has, for every option, grid and number of prefix tokens."""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib.attention import KINDS, MIXERS, Cost, Mixer, get
from thesis_lib.attention.identity import Identity

OPTIONS = {
    "mha": [{}, {"implementation": "naive"}, {"implementation": "separate"}, {"implementation": "per-head"}],
    "sra": [
        {},
        {"pooling": "conv"},
        {"pooling": "pvt"},
        {"proportional": False},
        {"ratio": 1},
        {"ratio": 1, "pooling": "conv"},
    ],
    "pool": [{}, {"kernel": 5}, {"cls": "mean"}, {"cls": "none"}],
    "moh": [
        {},
        {"active": 3},
        {"shared": 0, "active": 2},
        {"shared": 2, "active": 3},
        {"router": "norm"},
        {"shared": 0, "active": 2, "dropped": [1]},
    ],
    "soft": [{}, {"landmarks": "conv"}, {"ratio": 1, "iterations": 3}, {"ridge": 0.1}],
    "linformer": [{}, {"rank": 16}, {"sharing": "key-value"}, {"sharing": "none"}, {"proportional": False}],
    "performer": [{}, {"features": 64, "scaling": "chi"}, {"seed": 3}],
    "nystrom": [{}, {"landmarks": 10, "layout": "segment"}, {"landmarks": 12}, {"iterations": 12}, {"conv": 3}],
    "agent": [{}, {"agents": 6}, {"bias": True}, {"conv": 3}],
    "hybrid": [
        {},
        {"combine": "split"},
        {"window": 5, "dilations": [1, 3]},
        {"dilations": [1], "linear": False},
        {"dilations": []},
    ],
}
CASES = [(name, options) for name in MIXERS for options in OPTIONS.get(name, [{}])]
GRIDS = [((8, 8), 1), ((14, 14), 0), ((6, 10), 5)]  # and prefix tokens
MIXES = {  # whether the class token reaches the patches, and they it
    "pool": lambda options: (False, options.get("cls") != "none"),
    "identity": lambda options: (False, False),
}
IMPOSSIBLE = {  # on 8x8 patches and a class token, with 3 heads: an option and what the error offers instead
    "mha": [({"implementation": "flash"}, "'fused', 'naive'")],
    "sra": [({"ratio": 3}, r"possible: \[1, 2, 4, 8\]"), ({"pooling": "max"}, "'avg', 'conv'")],
    "pool": [({"kernel": 4}, r"possible: \[3, 5, 7, 9, 11, 13, 15\]"), ({"cls": "max"}, "'mean', 'none'")],
    "moh": [
        ({"active": 4}, "from 1 to 3"),
        ({"shared": 3}, "from 0 to 2"),
        ({"active": 2, "shared": 2}, "from 3 to 3"),
    ],
    "soft": [({"ratio": 3}, r"possible: \[1, 2, 4, 8\]"), ({"iterations": 0}, "at least 1")],
    "linformer": [({"rank": 66}, "from 2 to 65"), ({"rank": 1}, "from 2 to 65"), ({"sharing": "layer"}, "'headwise'")],
    "performer": [({"features": 0}, "at least 1"), ({"scaling": "none"}, "'chi', 'sqrt'")],
    "nystrom": [({"landmarks": 65}, "from 1 to 64"), ({"landmarks": 37}, "that do: 36, 40"), ({"conv": 4}, "3, 5")],
    "agent": [({"agents": 65}, "from 1 to 64"), ({"agents": 37}, "that do: 36, 40"), ({"conv": 4}, "3, 5")],
    "hybrid": [
        ({"dilations": [1, 2, 3], "combine": "split"}, "1 to 3"),
        ({"dilations": [], "linear": False}, "at least 1"),
        ({"dilations": [5]}, "at most 4"),
        ({"window": 1}, "at least 2"),
    ],
    "identity": [({"ratio": 2}, "it has none")],
}
# Layers that stand in for softmax attention with all tokens. The others do not: pool and identity mix by position
# alone, soft has another kernel (Gaussian, rows not normalised).
APPROXIMATIONS = ["sra", "moh", "linformer", "performer", "nystrom", "agent", "hybrid"]
FLASH = ["mha", "sra", "moh", "linformer", "performer", "nystrom", "agent", "hybrid"]

every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]
)
every_grid = pytest.mark.parametrize(
    ("grid", "prefix"), GRIDS, ids=[f"{prefix}+{grid[0]}x{grid[1]}" for grid, prefix in GRIDS]
)


def assert_batch_independent(mixer: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        together = mixer(x)
        for i in range(len(x)):
            assert_close(together[i : i + 1], mixer(x[i : i + 1]), rtol=1e-5, atol=1e-6)


@every_grid
@every_case
def test_shape_batch_independence_and_determinism(name, options, grid, prefix, attention, tokens):
    mixer = get(name).from_attention(attention(), grid, prefix, **options)
    assert not any(module.training for module in mixer.modules())
    x = tokens(grid, prefix, batch=3)
    x[1] *= 5  # a neighbour of another scale
    with torch.no_grad():
        y = mixer(x, attn_mask=None, is_causal=False)
        assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
        assert torch.equal(y, mixer(x))
    assert_batch_independent(mixer.double(), x.double())  # in fp32 large tokens differ by rounding


def test_the_batch_check_sees_a_batch_dependent_mixer(attention, tokens):
    class Dependent(Identity):
        def mix(self, x):
            return x - x.mean(dim=0)

    with pytest.raises(AssertionError):
        assert_batch_independent(Dependent.from_attention(attention(), (8, 8), 1), tokens())


@every_case
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("grid", "dim", "heads"), [((8, 8), 24, 3), ((14, 14), 48, 6), ((6, 10), 60, 3)])
def test_cost_is_what_is_counted(name, options, prefix, grid, dim, heads, attention, tokens):
    mixer = get(name).from_attention(attention(dim, heads), grid, prefix, **options)
    x = tokens(grid, prefix, batch=1, dim=dim)
    cost = get(name).cost(x.shape[1], dim, heads, grid=grid, prefix_tokens=prefix, **options)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(x)
    assert counter.get_total_flops() == 2 * cost.macs
    assert sum(parameter.numel() for parameter in mixer.parameters()) == cost.params
    assert isinstance(cost.elementwise, int) and (cost.elementwise > 0) == (name != "identity")
    if prefix == 1:
        on_meta = get(name).from_attention(attention(dim, heads).to("meta"), grid, prefix, **options)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            on_meta(x.to("meta"))
        assert counter.get_total_flops() == 2 * cost.macs


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_for_any_scale(name, options, dtype, attention, tokens):
    mixer = get(name).from_attention(attention().to(dtype), (8, 8), 1, **options)
    for scale in (0.1, 1, 5, 30):
        x = (tokens() * scale).to(dtype)
        with torch.no_grad():
            y = mixer(x)
        assert y.dtype == dtype and y.isfinite().all(), scale


@every_case
def test_half_precision_stays_near_single(name, options, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options)
    x = tokens()
    with torch.no_grad():
        expected = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = mixer(x).float()
    # a bf16 rounding may move a token over a routing boundary, hence the mean
    assert (y - expected).abs().mean() < 0.04 * expected.abs().mean()


@every_case
def test_nan_is_not_hidden_and_stays_in_its_image(name, options, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options)
    for position in (0, 20):
        for value in (torch.nan, torch.inf):
            x = tokens()
            x[0, position, 3] = value
            with torch.no_grad():
                y = x + mixer(x)  # as the block does: a mixer may give a token what does not depend on it
            assert not y[0, position].isfinite().all()
            assert y[1].isfinite().all()


@every_case
def test_who_influences_whom(name, options, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options)
    x = tokens(batch=1).requires_grad_()
    y = mixer(x)
    from_cls = torch.autograd.grad(y[0, 1:].square().sum(), x, retain_graph=True, allow_unused=True)[0][0, 0]
    from_patches = torch.autograd.grad(y[0, 0].square().sum(), x, allow_unused=True)[0][0, 1:]
    cls_reaches, patches_reach = MIXES.get(name, lambda options: (True, True))(options)
    assert bool(from_cls.any()) == cls_reaches
    assert bool(from_patches.any()) == patches_reach


@every_case
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients(name, options, autocast, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options).train()
    for scale in (0.1, 30, 1):
        mixer.zero_grad()
        x = (scale * tokens()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = mixer(x)
        y.float().square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters()), scale
        assert x.grad.isfinite().all() and x.grad.any(), scale
    for key, parameter in mixer.named_parameters():
        assert parameter.grad.any() or key.endswith("bias"), key  # a bias that shifts queries and keys alike has none


@every_case
def test_state_dict_copy_and_representation(name, options, attention, tokens):
    build = get(name).from_attention
    mixer, other = build(attention(), (8, 8), 1, **options), build(attention(seed=5), (8, 8), 1, **options)
    x = tokens()
    mixer.train()(x).sum()  # a forward pass in training must leave nothing that cannot be copied
    twin = copy.deepcopy(mixer).eval()
    other.load_state_dict(mixer.eval().state_dict(), strict=True)
    with torch.no_grad():
        expected = mixer(x)
        assert torch.equal(other(x), expected) and torch.equal(twin(x), expected)
        for parameter in twin.parameters():
            parameter.add_(1.0)
        assert torch.equal(mixer(x), expected)
    for option, value in mixer.options.items():
        assert f"{option}={value!r}" in repr(mixer)


@every_case
def test_resolved_options_build_the_same_mixer(name, options, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options)
    again = get(name).from_attention(attention(), [8, 8], 1, **mixer.options)
    assert again.options == mixer.options and again.grid == mixer.grid
    x = tokens()
    assert torch.equal(mixer(x), again(x))
    assert Cost() + get(name).cost(65, 24, 3, **options) == get(name).cost(65, 24, 3, **mixer.options)


@every_case
def test_building_leaves_layer_and_random_state_alone(name, options, attention, tokens):
    layer = attention().requires_grad_(False).double().train()
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    mixer = get(name).from_attention(layer, (8, 8), 1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert mixer.training and mixer(tokens().double()).dtype == torch.float64
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(3.0)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, parameter in mixer.named_parameters():
        assert not (parameter.requires_grad and key.split(".")[0] in ("q", "kv", "v", "qkv", "proj")), key


@every_case
def test_lora_targets_are_linear_layers_called_as_modules(name, options, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options)
    called = []
    for target in mixer.lora_targets:
        module = mixer.get_submodule(target)
        assert isinstance(module, nn.Linear)
        module.register_forward_hook(lambda *_, target=target: called.append(target))
    mixer(tokens())
    assert sorted(called) == sorted(mixer.lora_targets)


@every_case
def test_attention_map(name, options, attention, tokens):
    mixer = get(name).from_attention(attention(), (6, 10), 1, **options)
    x = tokens((6, 10))
    with torch.no_grad():
        weights = mixer.attention_map(x)
    assert weights.shape[0] == 2 and 1 <= weights.shape[1] <= 3 and weights.shape[2:] == (61, 61)
    assert weights.isfinite().all() and weights.dtype == x.dtype
    if name != "nystrom":  # its rows are those of an average only as far as its inverse is one
        assert (weights >= 0).all()
        if name != "moh":  # there a row sums to the weight of its head
            assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


@every_case
def test_refuses_masks_and_other_shapes(name, options, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options)
    x = tokens()
    with pytest.raises(ValueError, match="attn_mask"):
        mixer(x, attn_mask=torch.zeros(65, 65))
    with pytest.raises(ValueError, match="is_causal"):
        mixer(x, is_causal=True)
    for wrong in (x[..., :-1], x[0]):
        with pytest.raises(ValueError, match="expects tokens"):
            mixer(wrong)
    longer = tokens((8, 9))
    if mixer.needs_grid:
        with pytest.raises(ValueError, match=r"8x8 = 65 tokens, got 73"):
            mixer(longer)
        with pytest.raises(ValueError, match=r"grid=\(H, W\)"):
            type(mixer).cost(73, 24, 3, **options)
    else:
        assert mixer(longer).shape == longer.shape
        assert type(mixer).cost(73, 24, 3, **options).macs >= type(mixer).cost(65, 24, 3, **options).macs


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("prefix", [0, 1])
def test_softmax_mixers_run_on_the_flash_kernel(name, prefix, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), prefix)
    x = tokens(prefix=prefix)
    with torch.no_grad():
        expected = mixer(x)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where inputs do not qualify
            assert_close(mixer(x), expected)


class Poolings(TorchDispatchMode):
    """Notes of every average pooling whether torch takes its input for channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.avg_pool2d:  # its output has the layout it takes its input for
            self.channels_last.append(out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous())
        return out


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_pooled_as_they_lie(name, options, batch, attention, tokens):
    """In channels-first order pooling is ten times slower on a CPU, which torch fell back to for a batch of one."""
    mixer = get(name).from_attention(attention(), (8, 8), 1, **options)
    with torch.no_grad(), Poolings() as seen:
        mixer(tokens(batch=batch))
    assert all(seen.channels_last) and (seen.channels_last or name != "pool")


@functools.cache
def layer_of_entropy(
    attention: Callable[..., Attention], target: float, smooth: bool
) -> tuple[Attention, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer whose queries and keys are scaled until the mean entropy of its attention is `target` of the maximum.

    Returns it with the tokens (independent ones, or a smooth field with noise, as images are smooth), what MHA makes of
    them, and what uniform attention does.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 65, 24, generator=generator)
    if smooth:
        field = nn.functional.interpolate(torch.randn(4, 24, 4, 4, generator=generator), (8, 8), mode="bicubic")
        x[:, 1:] = 0.3 * x[:, 1:] + (field / field.std()).flatten(2).mT
    low, high = 0.01, 30.0
    with torch.no_grad():
        for _ in range(20):  # bisection: entropy falls as logits grow
            scale = (low * high) ** 0.5
            layer = attention()
            for parameter in (layer.qkv.weight, layer.qkv.bias):
                parameter[:48] *= scale**0.5
            mha = get("mha").from_attention(layer, (8, 8), 1)
            entropy = torch.special.entr(mha.attention_map(x)).sum(-1).mean().item() / math.log(65)
            low, high = (scale, high) if entropy > target else (low, scale)
        assert abs(entropy - target) < 0.01
        values = mha.query_key_value(x)[2]
        return layer, x, mha(x), mha.project_heads(values.mean(2, keepdim=True).expand_as(values))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("entropy", [0.55, 0.7, 0.85])
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_nearer_to_attention_than_the_mean_of_the_values(name, entropy, smooth, attention):
    """performer: 64 features on heads of 8 channels, whose queries are short; on wide heads it does not hold."""
    layer, x, exact, uniform = layer_of_entropy(attention, entropy, smooth)
    options = {"features": 64} if name == "performer" else {}
    with torch.no_grad():
        y = get(name).from_attention(layer, (8, 8), 1, **options)(x)
    assert (y - exact).norm() < 0.99 * (uniform - exact).norm()


@pytest.mark.parametrize(
    ("name", "options", "offered"), [(name, *case) for name, cases in IMPOSSIBLE.items() for case in cases]
)
def test_what_cannot_work_names_what_can(name, options, offered, attention):
    with pytest.raises(ValueError, match=offered):
        get(name).from_attention(attention(), (8, 8), 1, **options)


@pytest.mark.parametrize("name", MIXERS)
def test_registry(name):
    mixer = get(name)
    assert issubclass(mixer, Mixer) and mixer.name == name and mixer.kind in KINDS and mixer.label
    assert mixer.__doc__ and set(mixer.choices) <= set(mixer.defaults)


def test_registry_holds_the_mixers_by_kind():
    assert set(MIXERS) == set(IMPOSSIBLE)
    order = [KINDS.index(mixer.kind) for mixer in MIXERS.values()]
    assert order == sorted(order)
    with pytest.raises(ValueError, match=r"'sofd' \(did you mean soft\?\); known: mha"):
        get("sofd")


def test_unknown_options_are_named(attention):
    with pytest.raises(ValueError, match=r"no option 'raito' \(did you mean ratio\?\); known: ratio, pooling"):
        get("sra").from_attention(attention(), (8, 8), 1, raito=4)
    with pytest.raises(ValueError, match="it has none"):
        get("identity").cost(65, 24, 3, ratio=2)
    with pytest.raises(ValueError, match="pooling='max' must be one of 'avg', 'conv'"):
        get("sra").cost(65, 24, 3, pooling="max")


def test_layers_that_cannot_be_swapped(attention):
    with pytest.raises(ValueError, match="gate"):
        get("sra").from_attention(attention(gated=True), (8, 8), 1)
    with pytest.raises(ValueError, match="head width x heads = 24"):
        get("mha").from_attention(attention(attn_head_dim=16), (8, 8), 1)
    with pytest.raises(ValueError, match="not from Linear"):
        get("mha").from_attention(nn.Linear(3, 3), (8, 8), 1)
    with pytest.raises(ValueError, match="not from SRA"):
        get("mha").from_attention(get("sra").from_attention(attention(), (8, 8), 1), (8, 8), 1)
    adapted = attention()
    adapted.qkv = nn.Sequential(adapted.qkv)
    with pytest.raises(ValueError, match="merge adapters"):
        get("mha").from_attention(adapted, (8, 8), 1)


def test_an_mha_mixer_is_as_good_a_source_as_timm(attention, tokens):
    mha = get("mha").from_attention(attention(), (8, 8), 1, implementation="naive")
    for name in MIXERS:
        from_mixer, from_timm = (get(name).from_attention(source, (8, 8), 1) for source in (mha, attention()))
        assert torch.equal(from_mixer(tokens()), from_timm(tokens()))
