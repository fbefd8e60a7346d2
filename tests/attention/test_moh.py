import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib.attention.mha import MHA
from thesis_lib.attention.moh import MoH, balance_loss


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


def avoiding(mixer: MoH, *heads: int) -> MoH:
    """Make a router that never picks some heads: of queries without length, or by a score far below the others'."""
    with torch.no_grad():
        for head in heads:
            if mixer.options["router"] == "norm":
                mixer.qkv.weight[8 * head : 8 * head + 8] = 0
                mixer.qkv.bias[8 * head : 8 * head + 8] = 0
            else:
                mixer.router.weight[head - mixer.shared, 0] = -1e4
    return mixer


def ahead(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens[..., :1].abs() + 0.1, tokens[..., 1:]], dim=-1)


@pytest.mark.parametrize("router", ["learned", "norm"])
def test_dropping_heads_that_are_never_on_changes_nothing(router, attention, tokens):
    x = ahead(tokens(dim=48))
    mixer = MoH.from_attention(attention(48, 6), (8, 8), 1, shared=1, active=3, router=router)
    mixer = avoiding(mixer if router == "norm" else trained(mixer), 2, 5)
    with torch.no_grad():
        expected, usage, whole = mixer(x), mixer.usage(x), mixer.attention_map(x)
        assert (usage == 0).nonzero().flatten().tolist() == [2, 5] and usage[0] == 1
        assert_close(usage.sum(), torch.tensor(3.0))
        mixer.drop_heads([5])
        mixer.drop_heads([2])
        assert mixer.options["dropped"] == [2, 5] and mixer.heads_left == 4
        assert (mixer.qkv.weight.shape, mixer.proj.weight.shape) == ((96, 48), (48, 32))
        assert_close(mixer(x), expected, rtol=1e-5, atol=1e-6)
        assert_close(mixer.usage(x), usage[[0, 1, 3, 4]])
        assert_close(mixer.attention_map(x), whole[:, [0, 1, 3, 4]])


@pytest.mark.parametrize("router", ["learned", "norm"])
def test_dropping_at_build_is_masking_the_values(router, attention, tokens):
    options, layer, x = {"shared": 2, "active": 4, "router": router}, attention(48, 6), ahead(tokens(dim=48))
    built = MoH.from_attention(layer, (8, 8), 1, dropped=(4, 3), **options)
    full = avoiding(MoH.from_attention(layer, (8, 8), 1, **options), 3, 4)
    with torch.no_grad():
        assert_close(built(x), full(x), rtol=1e-5, atol=1e-6)
        assert (built(x) - MoH.from_attention(layer, (8, 8), 1, **options)(x)).abs().max() > 1e-2
    other = MoH.from_attention(attention(48, 6, seed=9), (8, 8), 1, **built.options)
    other.load_state_dict(built.state_dict(), strict=True)
    assert torch.equal(other(x), built(x))
    assert copy.deepcopy(built)(x).equal(built(x))
    assert "dropped" not in MoH.from_attention(layer, (8, 8), 1, **options).options  # as in files of older versions


@pytest.mark.parametrize("options", [{}, {"router": "norm"}, {"shared": 0, "active": 2}, {"shared": 3, "active": 5}])
def test_executed_and_activated_multiply_adds(options, attention, tokens):
    x = tokens(batch=1, dim=48)
    for dropped in ([], [5], [4, 5]) if options.get("active") != 5 else ([], [5]):
        mixer = MoH.from_attention(attention(48, 6), (8, 8), 1, dropped=dropped, **options)
        executed = MoH.cost(65, 48, 6, dropped=dropped, **options)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(x)
        assert counter.get_total_flops() == 2 * executed.macs
        assert sum(parameter.numel() for parameter in mixer.parameters()) == executed.params
        on = gates(mixer, x).count_nonzero().item() * 8  # channels of the heads that are on, over all tokens
        left = 48 - 8 * len(dropped)
        queries = 65 * left if options.get("router") == "norm" else on
        router = 0 if options.get("router") == "norm" else mixer.router.weight.shape[0]
        expected = 48 * (queries + 2 * 65 * left + on) + 2 * 65 * on + 65 * 48 * router
        assert mixer.activated_macs(65) == expected <= executed.macs
        assert dropped or expected < executed.macs
    everything = MoH.from_attention(attention(48, 6), (8, 8), 1, shared=0, active=6, router="norm")
    assert everything.activated_macs(65) == MHA.cost(65, 48, 6).macs


@pytest.mark.parametrize(
    ("options", "heads", "message"),
    [
        ({}, [0], "dropped=0 must be an integer from 2 to 5"),
        ({}, [6], "dropped=6 must be an integer from 2 to 5"),
        ({}, [2, 3, 4], "active=4 must be an integer from 3 to 3"),
        ({"qk_norm": True, "scale_norm": True}, [5], "scale_norm"),
    ],
)
def test_heads_that_cannot_be_dropped(options, heads, message, attention):
    mixer = MoH.from_attention(attention(48, 6, **options), (8, 8), 1, shared=2, active=4)
    with pytest.raises(ValueError, match=message):
        mixer.drop_heads(heads)
    assert mixer.heads_left == 6 and mixer.qkv.out_features == 144
    with pytest.raises(ValueError, match="leaves none of 6 heads"):
        MoH.cost(65, 48, 6, dropped=[0, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="list of distinct heads"):
        MoH.cost(65, 48, 6, dropped=[5, 5])


def test_heads_are_dropped_after_adapters_are_merged(attention):
    mixer = MoH.from_attention(attention(48, 6), (8, 8), 1)
    mixer.qkv = torch.nn.Sequential(mixer.qkv)
    with pytest.raises(ValueError, match="merge adapters"):
        mixer.drop_heads([5])


def test_balance_loss_of_a_model(attention, tokens):
    build = MoH.from_attention
    layers = [trained(build(attention(24, 6), (8, 8), 1, shared=2, active=4)) for _ in range(2)]
    model = torch.nn.Sequential(*layers, build(attention(), (8, 8), 1, router="norm"))
    assert balance_loss(model.eval()) == 0.0
    model.train()(tokens())
    assert_close(balance_loss(model), (layers[0].balance_loss + layers[1].balance_loss) / 2)
    balance_loss(model).backward()
    assert all(layer.router.weight.grad.any() for layer in layers)


def test_balance_loss_is_the_published_term(attention, tokens):
    mixer, x = trained(MoH.from_attention(attention(24, 6), (8, 8), 1, shared=2, active=4)).train(), tokens()
    mixer(x)
    score = (x @ mixer.router.weight[:4].T).softmax(-1).flatten(0, 1)  # (tokens, routed heads)
    chosen = torch.zeros_like(score).scatter(-1, score.topk(2).indices, 1.0)
    assert_close(mixer.balance_loss, (score.mean(0) * chosen.mean(0)).mean() * 4**2)


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
