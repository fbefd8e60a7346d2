import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from thesis_lib.attention.agent import Agent
from thesis_lib.attention.mha import MHA

build = Agent.from_attention


def randomised(mixer: Agent) -> Agent:
    """Give the biases and the convolution, which start at zero, something to do."""
    generator = torch.Generator().manual_seed(2)
    added = [module for module in (mixer.key_bias, mixer.query_bias, mixer.conv) if module is not None]
    with torch.no_grad():
        for parameter in (parameter for module in added for parameter in module.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_equals_the_dense_formula(prefix, attention, tokens):
    layer, x = attention().double(), tokens((6, 10), prefix).double()
    mixer = randomised(build(layer, (6, 10), prefix, bias=True, conv=3))
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        agents = torch.stack(
            [
                q[:, :, [prefix + 10 * (2 * row + i) + 2 * column + j for i in (0, 1) for j in (0, 1)]].mean(2)
                for row in range(3)
                for column in range(5)
            ],
            dim=2,
        )
        b1, b2 = mixer.biases()
        assert b1.shape == (3, 15, 60 + prefix) and b2.shape == (3, 60 + prefix, 15)
        to_keys = (agents @ k.mT / 8**0.5 + b1).softmax(-1)
        to_agents = (q @ agents.mT / 8**0.5 + b2).softmax(-1)
        y = to_agents @ to_keys @ v
        image = v[:, :, prefix:].transpose(2, 3).reshape(2, 24, 6, 10)
        local = F.conv2d(image, mixer.conv.weight, mixer.conv.bias, padding=1, groups=24)
        y[:, :, prefix:] += local.reshape(2, 3, 8, 60).transpose(2, 3)
        assert_close(mixer(x), mixer.project_heads(y))
        assert_close(mixer.attention_map(x), to_agents @ to_keys)


def test_an_agent_a_query_is_the_product_of_two_attentions(attention, tokens):
    mixer, x = build(attention(qk_norm=True), (6, 10), 0, agents=60), tokens((6, 10), 0)
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        expected = mixer.project_heads(mixer.weights(q, q) @ mixer.weights(q, k) @ v)
        assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


def test_bias_and_convolution_start_at_zero(attention, tokens):
    x = tokens((6, 10))
    with torch.no_grad():
        plain = build(attention(), (6, 10), 1)(x)
        assert_close(build(attention(), (6, 10), 1, bias=True, conv=3)(x), plain, rtol=1e-5, atol=1e-6)
        for options in ({"bias": True}, {"conv": 3}):
            assert (randomised(build(attention(), (6, 10), 1, **options))(x) - plain).abs().max() > 1e-2


def test_bias_is_laid_out_over_the_grid(attention):
    mixer = build(attention(), (6, 10), 1, bias=True)
    with torch.no_grad():
        mixer.key_bias.row[0, 4, 2] = 1.0
        mixer.key_bias.column[0, 4, 0, 7] = 2.0
        mixer.key_bias.prefix[0, 4, 0] = 5.0
        mixer.key_bias.block[1, 4] = 3.0
        bias = mixer.biases()[0]
    patches = bias[0, 4, 1:].view(6, 10)
    assert bias[0, 4, 0] == 5 and patches[2, 7] == 3 and patches[2, 0] == 1 and patches[0, 7] == 2
    assert patches[0, 0] == 0 and not bias[0, 3].any() and not mixer.biases()[1].any()
    assert_close(bias[1, 4], torch.tensor([0.0] + 60 * [3.0]))


def test_prefix_tokens_are_keys_and_queries_but_no_agents(attention, tokens):
    mixer, x = build(attention(), (8, 8), 1), tokens()
    other = x.clone()
    other[:, 0] += 1
    with torch.no_grad():
        assert torch.equal(*(mixer.agents(mixer.query_key_value(part)[0]) for part in (x, other)))
        assert (mixer(x) - mixer(other)).abs().amax(dim=(0, 2)).min() > 1e-4  # as a key it reaches every token


def test_rank_is_the_number_of_agents(attention, tokens):
    mixer, x = build(attention().double(), (8, 8), 1), tokens().double()
    with torch.no_grad():
        weights, values = mixer.attention_map(x), mixer.query_key_value(x)[2]
        assert torch.linalg.matrix_rank(weights).tolist() == [[16] * 3] * 2
        assert_close(mixer.project_heads(weights @ values), mixer(x))


@pytest.mark.parametrize("sharpness", [1.0, 1.4])
def test_nearer_to_mha_than_uniform_attention(sharpness, attention):
    generator = torch.Generator().manual_seed(3)
    field = F.interpolate(torch.randn(2, 96, 4, 4, generator=generator), (14, 14), mode="bicubic").flatten(2).mT
    patches = field / field.std() + 0.3 * torch.randn(field.shape, generator=generator)
    x = torch.cat([torch.randn(2, 1, 96, generator=generator), patches], dim=1)
    layer = attention(96)
    with torch.no_grad():
        layer.qkv.weight[: 2 * 96] *= sharpness
        mha = MHA.from_attention(layer, (14, 14), 1)
        weights, values = mha.attention_map(x), mha.query_key_value(x)[2]
        entropy = -torch.xlogy(weights, weights).sum(-1).mean() / torch.tensor(197.0).log()
        assert 0.5 < entropy < 0.9
        uniform = mha.project_heads(values.mean(2, keepdim=True).expand_as(values))
        assert (build(layer, (14, 14), 1)(x) - mha(x)).norm() < 0.7 * (uniform - mha(x)).norm()


@pytest.mark.parametrize("prefix", [0, 1])
def test_runs_on_the_flash_kernel_without_a_bias(prefix, attention, tokens):
    mixer, x = build(attention(), (8, 8), prefix, conv=3), tokens(prefix=prefix)
    with torch.no_grad():
        expected = mixer(x)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where inputs do not qualify
            assert_close(mixer(x), expected)


def test_every_part_is_trained(attention, tokens):
    mixer = build(attention(), (8, 8), 1, bias=True, conv=3).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(tokens())
    y.float().square().mean().backward()
    added = [module for module in (mixer.key_bias, mixer.query_bias, mixer.conv) if isinstance(module, nn.Module)]
    assert len(added) == 3
    for module in added:
        assert all(parameter.grad.any() and parameter.grad.isfinite().all() for parameter in module.parameters())


def test_cost_of_the_published_size():
    plain, full = Agent.cost(197, 384, 6), Agent.cost(197, 384, 6, bias=True, conv=3)
    assert plain.macs == 4 * 197 * 384**2 + 4 * 197 * 49 * 384 and full.macs - plain.macs == 9 * 196 * 384
    assert plain.params == MHA.cost(197, 384, 6).params
    # two maps of a 7 x 7 block, a row, a column and the class token for each head and agent, and the convolution
    assert full.params - plain.params == 2 * 6 * 49 * (49 + 14 + 14 + 1) + 10 * 384


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": 61}, "agents=61 must be an integer from 1 to 60"),
        ({"agents": 49}, "agents=49 cells do not tile a 6x10 grid .* the nearest that do: 48, 50"),
        ({"conv": 2}, "conv=2 must be 0 or odd; near: 1, 3"),
        ({"conv": -1}, "conv=-1 must be an integer at least 0"),
        ({"bias": "both"}, "bias='both' must be one of False, True"),
    ],
)
def test_impossible_options(options, message, attention):
    with pytest.raises(ValueError, match=message):
        build(attention(), (6, 10), 1, **options)
