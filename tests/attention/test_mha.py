import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib.attention.mha import MHA

IMPLEMENTATIONS = MHA.choices["implementation"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layer", [{}, {"qk_norm": True}, {"scale_norm": True}, {"qkv_bias": False}], ids=str)
def test_equals_timm(implementation, layer, attention, tokens):
    source = attention(**layer)
    mixer = MHA.from_attention(source, (8, 8), 1, implementation=implementation)
    with torch.no_grad():
        assert_close(mixer(tokens()), source(tokens()), rtol=1e-5, atol=1e-6)
    if implementation in ("fused", "naive"):
        assert mixer.state_dict().keys() == source.state_dict().keys()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layer", [{}, {"qk_norm": True}], ids=str)
def test_stacked_projections_are_the_three_in_one_piece_of_memory(implementation, layer, attention, tokens):
    mixer = MHA.from_attention(attention(**layer), (8, 8), 1, implementation=implementation)
    with torch.no_grad():
        stacked = mixer.stacked(tokens())
        assert torch.equal(stacked, torch.stack(mixer.query_key_value(tokens()))) and stacked.is_contiguous()


def test_separate_projections_are_the_rows_of_the_merged_one(attention, tokens):
    layer, x = attention(64, 4), tokens(dim=64)
    build = {kind: MHA.from_attention(layer, (8, 8), 1, implementation=kind) for kind in IMPLEMENTATIONS}
    with torch.no_grad():
        expected = build["naive"](x)
        for kind, count in (("separate", 3), ("per-head", 12)):
            assert len(build[kind].qkv) == count
            assert torch.equal(torch.cat([part.weight for part in build[kind].qkv]), layer.qkv.weight)
            assert torch.equal(torch.cat([part.bias for part in build[kind].qkv]), layer.qkv.bias)
            assert_close(build[kind](x), expected, rtol=1e-5, atol=1e-6)
            assert_close(build[kind].attention_map(x), build["naive"].attention_map(x))


def test_the_controls_cost_the_same_and_launch_more(attention, tokens):
    x, calls = tokens(), {}
    for kind in IMPLEMENTATIONS:
        mixer = MHA.from_attention(attention(), (8, 8), 1, implementation=kind)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(x)
        assert counter.get_total_flops() == 2 * len(x) * MHA.cost(65, 24, 3, implementation=kind).macs
        assert sum(parameter.numel() for parameter in mixer.parameters()) == MHA.cost(65, 24, 3).params
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
            mixer(x)
        calls[kind] = sum(event.count for event in record.key_averages() if event.key == "aten::linear")
    assert calls == {"fused": 2, "naive": 2, "separate": 4, "per-head": 10}


def test_a_default_checkpoint_is_timms(attention, tokens):
    state = attention(seed=3).state_dict()
    mixer = MHA.from_attention(attention(), (8, 8), 1)
    mixer.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert_close(mixer(tokens()), attention(seed=3)(tokens()), rtol=1e-5, atol=1e-6)


def test_dropout_is_carried(attention, tokens):
    source = attention(attn_drop=0.5, proj_drop=0.5).train()
    for implementation in IMPLEMENTATIONS:
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
