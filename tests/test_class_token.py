"""The class token of the last block, alone and together with all other tokens, which must not differ."""

import copy

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from thesis_lib import attention, backbone, class_token, closed_form, perceptual

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}


def build(mixer="mha", seed=0, **changes):
    """A ViT of random weights, large enough that features differ; with timm's own attention for `mixer` None."""
    torch.manual_seed(seed)
    model = VisionTransformer(**SMALL | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model if mixer is None else backbone.swap(model, mixer)


def images(n=3):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def both(model, monkeypatch, feature="cls", x=None):
    """The embedding by the short way and by the full one."""
    metric, x = perceptual.Metric(model, feature, normalize=False), images() if x is None else x
    assert class_token.applies(model)
    short = metric.embed(x)
    with monkeypatch.context() as patch:
        patch.setattr(class_token, "applies", lambda vit: False)
        return short, metric.embed(x)


@pytest.mark.parametrize("feature", ["cls", "cls_norm"])
@pytest.mark.parametrize("mixer", [None, *attention.MIXERS])
def test_the_class_token_is_the_same_without_the_others(mixer, feature, monkeypatch):
    short, full = both(build(mixer), monkeypatch, feature)
    assert short.shape == (3, 48)
    torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"reg_tokens": 3},
        {"init_values": 0.3},
        {"qk_norm": True, "scale_attn_norm": True, "norm_layer": LayerNorm},
        {"qkv_bias": False},
        {"proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
    ],
    ids=["registers", "layer scale", "norms", "no bias", "dropout"],
)
def test_every_part_of_the_block_is_kept(changes, monkeypatch):
    for mixer in (None, "mha", "pool"):
        short, full = both(build(mixer, **changes), monkeypatch)
        torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", [None, "mha", "pool", "sra", "identity"])
@pytest.mark.parametrize("registers", [0, 2])
def test_closed_form_counts_what_is_executed(mixer, registers):
    model = build(mixer, reg_tokens=registers)
    metric = perceptual.Metric(model)
    metric.forward = metric.embed
    cost, full = class_token.model_cost(model), closed_form.model_cost(model)
    assert closed_form.count_macs(metric, images(1)) == cost.macs < full.macs
    assert cost.params == full.params and cost.elementwise < full.elementwise
    assert class_token.model_cost(model, norm=True).elementwise == cost.elementwise + 7 * 48


def test_of_the_last_blocks_multiply_adds_a_sixth_is_left():
    vit = backbone.create("vit_small_patch16_224.dino", pretrained=False)
    n, d = 197, 384
    left = closed_form.model_cost(vit).macs - (12 * n * d**2 + 2 * n**2 * d) + 2 * n * d**2 + 10 * d**2 + 2 * n * d
    assert class_token.model_cost(vit).macs == left


def test_an_unmerged_adapter_keeps_its_share_and_its_gradients(monkeypatch):
    model = build()
    tuned = backbone.add_lora(model, rank=2).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    short, full = both(tuned, monkeypatch)
    torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-5)
    short.sum().backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize("mixer", [None, "mha", "pool"])
def test_training_computes_the_class_token_alone_with_the_same_gradients(mixer, monkeypatch):
    model = build(mixer, init_values=0.3, drop_path_rate=0.6).train()
    whole = copy.deepcopy(model)
    torch.manual_seed(2)
    short = perceptual.Metric(model).embed(images(8))
    torch.manual_seed(2)  # drop path draws once an image and branch, however many tokens there are
    monkeypatch.setattr(class_token, "applies", lambda vit: False)
    full = perceptual.Metric(whole).embed(images(8))
    torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-5)
    for embedding in (short, full):
        embedding[:, 0].sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("part", ["map", "projection", "MLP"])
def test_dropout_acts_on_the_class_token_alone(part):
    model, x = build("mha", proj_drop_rate=0.5, attn_drop_rate=0.5), images(1).expand(500, -1, -1, -1)
    plain, last = class_token.last_class_token(model, x[:1]), model.blocks[-1]
    if part == "map":
        last.attn.training = True  # of the layer itself: its kernel drops entries of the map
    else:
        (last.attn.proj_drop if part == "projection" else last.mlp).train()
    with torch.no_grad():
        assert ((class_token.last_class_token(model, x) - plain).std(0) > 1e-3).all()


def test_hooks_and_other_features_see_all_tokens():
    model, seen = build(), []
    metric = perceptual.Metric(model)
    with model.blocks[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape)):
        metric.embed(images(2))
    assert seen == [(2, 17, 48)]
    assert class_token.applies(model)
    assert perceptual.Metric(model, "cls_patch").embed(images(2)).shape == (2, 96)


def test_models_that_cannot_be_cut_run_whole():
    shallow = build(depth=1)
    assert not class_token.applies(shallow) and perceptual.Metric(shallow).embed(images(2)).shape == (2, 48)
    with pytest.raises(ValueError, match="last block"):
        class_token.model_cost(shallow)
