import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from thesis_lib.attention.base import convolve_cells
from thesis_lib.attention.mha import MHA
from thesis_lib.attention.sra import SRA


def block_constant(x: torch.Tensor, grid: tuple[int, int], ratio: int, prefix: int) -> torch.Tensor:
    """Repeat the first token of each ratio x ratio cell over the cell."""
    rows = torch.arange(grid[0]) // ratio * ratio
    columns = torch.arange(grid[1]) // ratio * ratio
    index = prefix + (rows[:, None] * grid[1] + columns).flatten()
    return torch.cat([x[:, :prefix], x[:, index]], dim=1)


@pytest.mark.parametrize("pooling", ["avg", "conv"])
@pytest.mark.parametrize(
    ("grid", "ratio", "prefix"), [((8, 8), 2, 1), ((8, 8), 4, 5), ((6, 10), 2, 1), ((14, 14), 7, 1)]
)
def test_exact_on_block_constant_tokens_with_the_bias_only(grid, ratio, prefix, pooling, attention, tokens):
    x = block_constant(tokens(grid, prefix), grid, ratio, prefix)
    layer = attention()
    with torch.no_grad():
        expected = MHA.from_attention(layer, grid, prefix)(x)
        build = SRA.from_attention
        exact = build(layer, grid, prefix, ratio=ratio, pooling=pooling)(x)
        biased = build(layer, grid, prefix, ratio=ratio, pooling=pooling, proportional=False)(x)
    assert_close(exact, expected, rtol=1e-5, atol=2e-6)
    assert (biased - expected).abs().max() > 1e-3


@pytest.mark.parametrize("head_dim", [8, 20])
def test_the_channels_equal_an_additive_mask(head_dim, attention, tokens):
    mixer = SRA.from_attention(attention(3 * head_dim), (8, 8), 1)
    x = tokens(dim=3 * head_dim)
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        q, k, v = (part[..., :head_dim] for part in (q, k, v))
        mask = torch.tensor([0.0] + [torch.tensor(4.0).log()] * 16).expand(65, -1)
        expected = mixer.project_heads(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        assert_close(mixer(x), expected, rtol=1e-5, atol=2e-6)


def test_ratio_one_is_mha(attention, tokens):
    for pooling in ("avg", "conv", "pvt"):
        mixer = SRA.from_attention(attention(qk_norm=True, scale_norm=True), (8, 8), 1, ratio=1, pooling=pooling)
        expected = MHA.from_attention(attention(qk_norm=True, scale_norm=True), (8, 8), 1)(tokens())
        assert_close(mixer(tokens()), expected, rtol=1e-5, atol=1e-6)
        assert mixer.reduction is None


def test_pooling_before_the_projection_is_pooling_after_it(attention, tokens):
    mixer, x = SRA.from_attention(attention(), (6, 10), 0), tokens((6, 10), 0)
    with torch.no_grad():
        before = mixer.kv(mixer.reduce(x))
        after = nn.functional.avg_pool2d(mixer.kv(x).mT.unflatten(-1, (6, 10)), 2).flatten(2).mT
        conv = SRA.from_attention(attention(), (6, 10), 0, pooling="conv")
        assert_close(before, after)
        assert_close(conv.kv(conv.reduce(x)), after)


def test_map_times_full_resolution_values_is_the_output(attention, tokens):
    mixer, mha = (kind.from_attention(attention(), (6, 10), 1) for kind in (SRA, MHA))
    x = tokens((6, 10))
    with torch.no_grad():
        values = mha.query_key_value(x)[2]
        assert_close(mixer.project_heads(mixer.attention_map(x) @ values), mixer(x))


def test_nearer_to_mha_than_uniform_attention(attention, tokens):
    x = block_constant(tokens(), (8, 8), 2, 1) + 0.3 * tokens(seed=7)
    with torch.no_grad():
        mha, mixer = (kind.from_attention(attention(), (8, 8), 1) for kind in (MHA, SRA))
        values = mha.query_key_value(x)[2]
        uniform = mha.project_heads(values.mean(2, keepdim=True).expand_as(values))
        assert (mixer(x) - mha(x)).norm() < 0.5 * (uniform - mha(x)).norm()


@pytest.mark.parametrize(
    ("grid", "ratio", "possible"), [((14, 14), 4, "1, 2, 7, 14"), ((6, 10), 3, "1, 2"), ((8, 8), 0, "1, 2, 4, 8")]
)
def test_a_ratio_that_does_not_divide_names_those_that_do(grid, ratio, possible, attention):
    with pytest.raises(ValueError, match=rf"ratio={ratio} .*{grid[0]}x{grid[1]} grid; possible: \[{possible}\]"):
        SRA.from_attention(attention(), grid, 1, ratio=ratio)
    with pytest.raises(ValueError, match="possible"):
        SRA.cost(1 + grid[0] * grid[1], 24, 3, grid=grid, ratio=ratio)


def test_cost_of_the_published_size():
    assert round(SRA.cost(197, 768, 12, pooling="conv", proportional=False).macs / 1e6, 1) == 422.1
    extra = SRA.cost(197, 768, 12, pooling="conv").params - MHA.cost(197, 768, 12).params
    assert extra == 2_361_600 - 2 * 768  # PVT's count less its layer norm


@pytest.mark.parametrize(("grid", "heads", "ratio"), [((6, 10), 3, 2), ((14, 14), 4, 7), ((8, 8), 3, 8)])
def test_equals_transformers_pvt_self_attention(grid, heads, ratio, attention, tokens):
    pvt = pytest.importorskip("transformers.models.pvt.modeling_pvt")
    config = pvt.PvtConfig(qkv_bias=True, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5)
    peer = pvt.PvtEfficientSelfAttention(config, 24, heads, sequences_reduction_ratio=ratio).eval()
    build, layer = SRA.from_attention, attention(24, heads)
    mixer, conv = (build(layer, grid, 0, ratio=ratio, pooling=pooling) for pooling in ("pvt", "conv"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        nn.init.normal_(mixer.reduction.weight, std=(24 * ratio**2) ** -0.5, generator=generator)
        for parameter in (mixer.reduction.bias, *mixer.reduction_norm.parameters()):
            nn.init.normal_(parameter, generator=generator)
        conv.reduction.load_state_dict(mixer.reduction.state_dict())
        key, value = mixer.kv.weight.chunk(2), mixer.kv.bias.chunk(2)
        for linear, weight, bias in (
            (peer.query, mixer.q.weight, mixer.q.bias),
            (peer.key, key[0], value[0]),
            (peer.value, key[1], value[1]),
        ):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        peer.sequence_reduction.load_state_dict(mixer.reduction.state_dict())
        peer.layer_norm.load_state_dict(mixer.reduction_norm.state_dict())
        x = tokens(grid, 0)
        expected = mixer.proj(peer(x, *grid)[0])
        assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)
        assert (conv(x) - expected).abs().max() > 1e-2
        peer.layer_norm = nn.Identity()  # the deliberate difference of "conv"
        assert_close(conv(x), mixer.proj(peer(x, *grid)[0]), rtol=1e-5, atol=1e-5)


def test_the_published_layer_has_its_norm_where_it_reduces(attention, tokens):
    mixer = SRA.from_attention(attention(), (8, 8), 1, pooling="pvt", proportional=False)
    with torch.no_grad():
        pooled = mixer.reduce(tokens())[:, 1:]
        assert_close(pooled.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
        assert_close(pooled.var(-1, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)
    extra = SRA.cost(197, 768, 12, pooling="pvt").params - MHA.cost(197, 768, 12).params
    assert extra == 2_361_600
    assert isinstance(SRA.from_attention(attention(), (8, 8), 1, ratio=1, pooling="pvt").reduction_norm, nn.Identity)


def test_the_patch_convolution_is_one_product_without_a_copy_of_its_weights(attention, tokens):
    mixer = copy.deepcopy(SRA.from_attention(attention(), (6, 10), 1, pooling="conv"))
    conv = mixer.reduction
    state = {name: torch.randn_like(value).contiguous() for name, value in conv.state_dict().items()}
    conv.load_state_dict(state)
    assert conv.weight.permute(0, 2, 3, 1).flatten(1).data_ptr() == conv.weight.data_ptr()
    patches = tokens((6, 10), 0)
    expected = conv(patches.mT.unflatten(-1, (6, 10))).flatten(2).mT
    assert_close(convolve_cells(conv, patches, (6, 10)), expected, rtol=1e-5, atol=1e-5)
