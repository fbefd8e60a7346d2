"""Closed forms against torch's counter and the published sizes of DINO's models."""

import pytest
import timm
import torch

from thesis_lib import attention, backbone, closed_form

TINY = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)


def tiny(mixer="mha", layers=None, img_size=32, **changes):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=img_size, **(TINY | changes)).eval()
    return backbone.swap(model, mixer, layers=layers)


@pytest.mark.parametrize("mixer", attention.MIXERS)
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"img_size": 64},
        {"img_size": (32, 64)},
        {"patch_size": 16, "img_size": 64},
        {"layers": [0, 2]},
        {"layers": [1]},
        {"mlp_ratio": 2, "num_heads": 6},
        {"num_classes": 10},
        {"init_values": 1e-5},
    ],
    ids=str,
)
def test_closed_form_equals_the_count(mixer, geometry):
    model = tiny(mixer, **geometry)
    cost = closed_form.model_cost(model)
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    assert closed_form.count_macs(model, x) == cost.macs
    assert closed_form.parameters(model) == cost.params
    assert closed_form.count_macs(model, x.repeat(2, 1, 1, 1)) == 2 * cost.macs


@pytest.mark.parametrize(
    "name, macs, params",
    [("vit_base_patch16_224.dino", 17.563e9, 85_798_656), ("vit_small_patch16_224.dino", 4.5985e9, 21_665_664)],
)
def test_published_costs_of_dino(name, macs, params):
    with torch.device("meta"):
        cost = closed_form.model_cost(timm.create_model(name, num_classes=0))
    assert cost.macs == pytest.approx(macs, rel=1e-4)
    assert cost.params == params


def test_timms_own_attention_counts_as_mha():
    plain = timm.models.VisionTransformer(img_size=32, **TINY).eval()
    assert closed_form.model_cost(plain) == closed_form.model_cost(tiny("mha"))
    assert closed_form.count_macs(plain, torch.randn(1, 3, 32, 32)) == closed_form.model_cost(plain).macs


def test_saving_ranges():
    assert closed_form.saving_ranges("mha", 64, 4) == []
    assert closed_form.saving_ranges("pool", 64, 4) == [(5, None)]  # a 3x3 window needs a 2x2 grid
    ((_, last),) = closed_form.saving_ranges("soft", 768, 12)  # at most 64 landmarks, however many tokens
    assert last is None
    kinds = attention.get("soft"), attention.get("mha")
    ((first, last),) = closed_form.saving_ranges("soft", 768, 12, ratio=2)  # saves a projection, then pays for m^3
    costs = {
        side: [kind.cost(side**2 + 1, 768, 12, **own).macs for kind, own in zip(kinds, ({"ratio": 2}, {}), strict=True)]
        for side in range(2, 64, 2)
    }
    saving = [side**2 + 1 for side, (soft, mha) in costs.items() if soft < mha]
    assert (first, last) == (saving[0], saving[-1]) and 197 in saving


def test_activated_macs_count_only_the_heads_that_are_on():
    plain, gated = tiny(), tiny("moh")
    assert closed_form.activated_macs(plain) == closed_form.model_cost(plain).macs
    off = closed_form.model_cost(gated).macs - closed_form.activated_macs(gated)
    dim, tokens, layers = 48, 17, 3
    assert off == layers * (2 * tokens * dim * 16 + 2 * tokens**2 * 16)  # q, proj, q k^T, weights v of 1 of 3 heads
