import pytest
import torch
from torch.testing import assert_close

from thesis_lib.attention.mha import MHA
from thesis_lib.attention.moh import MoH


def gates(mixer: MoH, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return mixer.gates(x, mixer.query_key_value(x)[0])[0]


def trained(mixer: MoH) -> MoH:
    torch.nn.init.normal_(mixer.router.weight, generator=torch.Generator().manual_seed(0))
    return mixer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12])
def test_all_heads_active_is_mha_bit_for_bit(heads, dtype, attention, tokens):
    layer, x = attention(24, heads).to(dtype), tokens().to(dtype)
    expected = MHA.from_attention(layer, (8, 8), 1)(x)
    for shared in {0, heads // 2, heads - 1}:
        for router in ("learned", "norm"):
            mixer = MoH.from_attention(layer, (8, 8), 1, active=heads, shared=shared, router=router)
            assert torch.equal(mixer(x), expected)
    if heads > 2:  # and with fewer it is not
        assert not torch.equal(MoH.from_attention(layer, (8, 8), 1)(x), expected)


@pytest.mark.parametrize(("heads", "shared", "active"), [(3, 1, 2), (6, 3, 5), (12, 6, 9)])
def test_defaults(heads, shared, active, attention):
    options = MoH.from_attention(attention(24, heads), (8, 8), 1).options
    assert (options["shared"], options["active"]) == (shared, active)


@pytest.mark.parametrize("router", ["learned", "norm"])
@pytest.mark.parametrize(("shared", "active"), [(0, 1), (1, 3), (3, 5), (2, 6)])
def test_exactly_the_active_heads_are_on(router, shared, active, attention, tokens):
    mixer = MoH.from_attention(attention(24, 6), (8, 8), 1, shared=shared, active=active, router=router)
    zero = gates(mixer, tokens())
    assert (zero.count_nonzero(-1) == active).all() and (zero[..., :shared] != 0).all()
    assert set(zero.unique().tolist()) <= {0.0, 1.0}
    if router == "norm":
        return
    weights = gates(trained(mixer), tokens())
    assert (weights.count_nonzero(-1) == active).all() and (weights[..., :shared] > 0).all()
    assert len(weights[..., shared:].argmax(-1).unique()) > 1  # tokens choose differently


def test_weights_are_the_published_formula(attention, tokens):
    shared, active, x = 3, 5, tokens()
    mixer = trained(MoH.from_attention(attention(24, 6), (8, 8), 1, shared=shared, active=active))
    routed, balance, always = (x @ mixer.router.weight.T).split([3, 2, 3], dim=-1)
    score = routed.softmax(-1)
    kept = torch.where(score >= score.sort(-1).values[..., [1]], score, 0.0)
    a = 2 * balance.softmax(-1)
    expected = torch.cat([a[..., :1] * always.softmax(-1) * 3, a[..., 1:] * kept / kept.sum(-1, keepdim=True) * 2], -1)
    assert_close(gates(mixer, x), expected)
    assert_close(expected.sum(-1), 3 * a[..., 0] + 2 * a[..., 1])


def test_norm_router_keeps_the_longest_queries(attention, tokens):
    mixer, x = MoH.from_attention(attention(24, 6), (8, 8), 1, shared=2, active=4, router="norm"), tokens()
    lengths = mixer.query_key_value(x)[0].norm(dim=-1).mT[..., 2:]
    weights = gates(mixer, x)[..., 2:].bool()
    assert (lengths.masked_fill(~weights, torch.inf).amin(-1) >= lengths.masked_fill(weights, 0).amax(-1)).all()


def test_balance_loss(attention, tokens):
    mixer = MoH.from_attention(attention(24, 6), (8, 8), 1, shared=2, active=4)
    mixer(tokens())
    assert mixer.balance_loss is None
    mixer.train()(tokens())
    assert_close(mixer.balance_loss, torch.tensor(2.0))  # uniform scores: as many as are on
    trained(mixer)(tokens())
    assert mixer.balance_loss > 2.0
    mixer.balance_loss.backward()
    assert mixer.router.weight.grad[:4].any() and not mixer.router.weight.grad[4:].any()
    assert mixer.eval().balance_loss is None
    plain = MoH.from_attention(attention(24, 6), (8, 8), 1, router="norm").train()
    plain(tokens())
    assert plain.balance_loss is None and plain.lora_targets == ("qkv",)


def test_heads_that_are_off_do_not_matter(attention, tokens):
    layer, x = attention(24, 6), tokens()
    expected = MoH.from_attention(layer, (8, 8), 1, shared=2, active=4)(x)
    with torch.no_grad():
        layer.qkv.weight[64:72] += 1.0  # values of head 4, which is off while the router is zero
        assert torch.equal(MoH.from_attention(layer, (8, 8), 1, shared=2, active=4)(x), expected)
        layer.qkv.weight[60:64] += 1.0  # values of head 3, which is on
        assert not torch.equal(MoH.from_attention(layer, (8, 8), 1, shared=2, active=4)(x), expected)


def test_map_times_values_is_the_output(attention, tokens):
    mixer, x = trained(MoH.from_attention(attention(), (8, 8), 1)), tokens()
    with torch.no_grad():
        values = mixer.query_key_value(x)[2]
        assert_close(mixer.project_heads(mixer.attention_map(x) @ values), mixer(x))
        assert_close(mixer.attention_map(x).sum(-1).mT, gates(mixer, x))


def test_cost_of_the_published_size():
    extra = MoH.cost(197, 768, 12).params - MHA.cost(197, 768, 12).params
    assert extra == 10_752
    assert MoH.cost(197, 768, 12, router="norm").macs == MHA.cost(197, 768, 12).macs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": 3}, "shared=3 must be an integer from 0 to 2"),
        ({"shared": 1, "active": 1}, "active=1 must be an integer from 2 to 3"),
        ({"active": 4}, "active=4 must be an integer from 1 to 3"),
        ({"active": 0}, "active=0 must be an integer from 1 to 3"),
        ({"active": 2.5}, "active=2.5 must be an integer"),
        ({"router": "random"}, "'learned', 'norm'"),
    ],
)
def test_impossible_heads(options, message, attention):
    with pytest.raises(ValueError, match=message):
        MoH.from_attention(attention(), (8, 8), 1, **options)
