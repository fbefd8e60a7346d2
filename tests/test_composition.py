"""What a mixer, a plan, token merging and dropped heads do to one another, and to a file that is saved."""

import pytest
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

from thesis_lib import backbone, class_token, closed_form, efficiency, perceptual, token_merging
from thesis_lib.layer_plan import apply_plan
from thesis_lib.token_merging import merge_tokens

MHA = ["mha"] * 6


def demo(**options):
    return backbone.create("demo", pretrained=False, **options)


@pytest.mark.parametrize("change", [lambda m: merge_tokens(m, 8), lambda m: apply_plan(m, MHA, merge=3)])
def test_a_changed_model_gets_no_mixer_and_no_second_plan(change):
    for again in (lambda m: backbone.swap(m, "performer"), lambda m: apply_plan(m, MHA)):
        model = change(demo())
        before = {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match="put mixers or a plan into a new one, merge last"):
            again(model)
        assert before == {name: id(module) for name, module in model.named_modules()}
    model = change(demo())
    del model.recipe  # a timm model of somebody else's: the blocks themselves say it
    with pytest.raises(ValueError, match="merge last"):
        backbone.swap(model, "pool")


def test_tokens_may_be_merged_twice_and_after_a_plan():
    model = merge_tokens(apply_plan(demo(), ["mha", "drop", *MHA[2:]]), 4)
    assert len(model.blocks) == 5 and merge_tokens(model, 2).recipe["token_merging"]["r"] == [2] * 5


@pytest.mark.parametrize("plan", [(MHA, 3), (["mha"] * 3 + ["nystrom"] * 3, None)])
def test_weights_of_a_plan_are_not_those_of_the_plain_model(plan, tmp_path):
    path = backbone.save_weights(apply_plan(demo(), *plan), tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match="weights of another model: plan"):
        backbone.create("demo", pretrained=path)
    with pytest.raises(ValueError, match="weights of another model: plan"):
        backbone.load_weights(apply_plan(demo(), MHA, 2), path)
    backbone.load_weights(apply_plan(demo(), *plan), path)


@pytest.mark.parametrize("merge", [None, 1, 3, 4])
@pytest.mark.parametrize("actions", [MHA, ["mha", "sra", "drop", "pool", "moh", "mha"]])
def test_costs_of_a_plan_are_those_of_the_grid_that_each_block_has(actions, merge):
    model = apply_plan(demo(), actions, merge).eval()
    rows = {row["metric"]: row["value"] for row in efficiency.exact_rows(model)}
    assert rows["macs"] == rows["macs_counted"] and rows["params"] == closed_form.parameters(model)
    metric, x = perceptual.Metric(model).eval(), torch.rand(1, 3, 64, 64)
    assert rows["macs_cls"] == closed_form.count_macs(metric.embed_unchecked, x)
    if merge:
        whole = apply_plan(demo(), actions).eval()
        assert rows["elementwise"] < closed_form.model_cost(whole).elementwise


@pytest.mark.parametrize("options", [{"mlp_layer": SwiGLUPacked}, {"pre_norm": True}, {"pos_embed": "none"}])
def test_costs_of_gated_mlps_and_other_stems(options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    model, x = VisionTransformer(**sizes, **options).eval(), torch.rand(1, 3, 32, 32)
    cost = closed_form.model_cost(model)
    assert (cost.macs, cost.params) == (closed_form.count_macs(model, x), closed_form.parameters(model))
    metric = perceptual.Metric(model).eval()
    assert class_token.model_cost(model).macs == closed_form.count_macs(metric.embed_unchecked, x)
    merged = merge_tokens(model, 2)
    assert token_merging.model_cost(merged).macs == closed_form.count_macs(merged, x)


def test_dropped_heads_are_saved_and_come_back(tmp_path):
    model = demo(mixer="moh", layers=[1, 4])
    for i in (1, 4):
        model.blocks[i].attn.drop_heads([3])
    metric = perceptual.Metric(model).eval()
    perceptual.save(metric, tmp_path)
    loaded, _ = perceptual.load(tmp_path)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loaded.embed(x), metric.embed(x))
    uneven = demo(mixer="moh", layers=[1, 4])
    uneven.blocks[4].attn.drop_heads([3])
    with pytest.raises(ValueError, match="differ from block to block"):
        perceptual.save(perceptual.Metric(uneven), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_backbone_in_another_format_makes_a_metric(dtype):
    model, x = demo(), torch.rand(2, 3, 64, 64)
    expected = perceptual.Metric(model).eval().embed(x)
    found = perceptual.Metric(model.to(dtype)).eval().embed(x)
    assert found.dtype == dtype and torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.999
