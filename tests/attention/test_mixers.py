"""The properties that every mixer has, for every option, grid and number of prefix tokens."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib.attention import KINDS, MIXERS, Cost, Mixer, get
from thesis_lib.attention.identity import Identity

OPTIONS = {
    "mha": [{}, {"implementation": "naive"}],
    "sra": [{}, {"pooling": "conv"}, {"proportional": False}, {"ratio": 1}, {"ratio": 1, "pooling": "conv"}],
    "pool": [{}, {"kernel": 5}, {"cls": "mean"}, {"cls": "none"}],
    "moh": [{}, {"active": 3}, {"shared": 0, "active": 2}, {"shared": 2, "active": 3}, {"router": "norm"}],
    "soft": [{}, {"landmarks": "conv"}, {"ratio": 1, "iterations": 3}, {"ridge": 0.1}],
}
CASES = [(name, options) for name in MIXERS for options in OPTIONS.get(name, [{}])]
GRIDS = [(8, 8), (14, 14), (6, 10)]
MIXES = {  # whether the class token reaches the patches, and they it
    "pool": lambda options: (False, options.get("cls") != "none"),
    "identity": lambda options: (False, False),
}

every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]
)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")


def assert_batch_independent(mixer: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        together = mixer(x)
        for i in range(len(x)):
            assert_close(together[i : i + 1], mixer(x[i : i + 1]), rtol=1e-4, atol=1e-5)


@every_grid
@every_case
def test_shape_batch_independence_and_determinism(name, options, grid, attention, tokens):
    mixer = get(name).from_attention(attention(), grid, 1, **options)
    assert not any(module.training for module in mixer.modules())
    x = tokens(grid, batch=3)
    x[1] *= 5  # a neighbour of another scale
    with torch.no_grad():
        y = mixer(x, attn_mask=None, is_causal=False)
        assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
        assert torch.equal(y, mixer(x))
    assert_batch_independent(mixer, x)


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
    x = tokens().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mixer(x)
    y.float().square().mean().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or key.endswith("bias"), key  # a bias that shifts queries and keys alike has none
    assert x.grad.isfinite().all() and x.grad.any()


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
    assert weights.shape[0] == 2 and weights.shape[1] in (1, 3) and weights.shape[2:] == (61, 61)
    assert (weights >= 0).all()
    if name != "moh":  # there a row sums to the weight of its head
        assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


@pytest.mark.parametrize("name", MIXERS)
def test_compiles_in_one_graph(name, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), 1)
    x = tokens()
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(mixer, backend="eager", fullgraph=True)(x), mixer(x))


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


def test_parameter_names_that_saved_weights_rely_on(attention):
    layers = {
        "mha": ["qkv", "proj"],
        "sra": ["q", "kv", "reduction", "proj"],
        "pool": [],
        "moh": ["qkv", "router", "proj"],
        "soft": ["q", "v", "reduction", "proj"],
        "identity": [],
    }
    for name, expected in layers.items():
        options = {"sra": {"pooling": "conv"}, "soft": {"landmarks": "conv"}}.get(name, {})
        state = get(name).from_attention(attention(), (8, 8), 1, **options).state_dict()
        assert sorted({key.split(".")[0] for key in state}) == sorted(expected)


@pytest.mark.parametrize("name", ["mha", "sra", "moh"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_softmax_mixers_run_on_the_flash_kernel(name, prefix, attention, tokens):
    mixer = get(name).from_attention(attention(), (8, 8), prefix)
    x = tokens(prefix=prefix)
    with torch.no_grad():
        expected = mixer(x)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where inputs do not qualify
            assert_close(mixer(x), expected)


@pytest.mark.parametrize("name", MIXERS)
def test_registry(name):
    mixer = get(name)
    assert issubclass(mixer, Mixer) and mixer.name == name and mixer.kind in KINDS and mixer.label
    assert mixer.__doc__ and set(mixer.choices) <= set(mixer.defaults)


def test_registry_holds_the_mixers_by_kind():
    assert set(MIXERS) >= {"mha", "sra", "pool", "moh", "soft", "identity"}
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
