import pytest
import torch
from torch.testing import assert_close

from thesis_lib.attention.mha import MHA


@pytest.mark.parametrize("implementation", ["fused", "naive"])
@pytest.mark.parametrize("layer", [{}, {"qk_norm": True}, {"scale_norm": True}, {"qkv_bias": False}], ids=str)
def test_equals_timm(implementation, layer, attention, tokens):
    source = attention(**layer)
    mixer = MHA.from_attention(source, (8, 8), 1, implementation=implementation)
    with torch.no_grad():
        assert_close(mixer(tokens()), source(tokens()), rtol=1e-5, atol=1e-6)
    assert mixer.state_dict().keys() == source.state_dict().keys()


def test_dropout_is_carried(attention, tokens):
    source = attention(attn_drop=0.5, proj_drop=0.5).train()
    for implementation in ("fused", "naive"):
        mixer = MHA.from_attention(source, (8, 8), 1, implementation=implementation)
        assert not torch.equal(mixer(tokens()), mixer(tokens()))
        mixer.eval()
        assert_close(mixer(tokens()), source.eval()(tokens()))
        source.train()


def test_map_times_values_is_the_output(attention, tokens):
    mixer = MHA.from_attention(attention(), (8, 8), 1)
    x = tokens()
    with torch.no_grad():
        values = mixer.query_key_value(x)[2]
        assert_close(mixer.project_heads(mixer.attention_map(x) @ values), mixer(x))
        entropy = torch.special.entr(mixer.attention_map(x)).sum(-1).mean() / torch.tensor(65.0).log()
    assert 0.5 < entropy < 0.99  # the fixture is no uniform attention


def test_permutation_equivariance(attention, tokens):
    mixer, order = MHA.from_attention(attention(), (8, 8), 1), torch.randperm(65)
    with torch.no_grad():
        assert_close(mixer(tokens()[:, order]), mixer(tokens())[:, order])


def test_cost_of_the_published_sizes():
    small, base = MHA.cost(197, 384, 6), MHA.cost(197, 768, 12)
    assert (small.params, base.params) == (591_360, 2_362_368)
    assert round(base.macs / 1e6, 1) == 524.4
