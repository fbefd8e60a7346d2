import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch.testing import assert_close

from thesis_lib import backbone, closed_form
from thesis_lib.perceptual import Metric
from thesis_lib.token_merging import match, merge, merge_tokens, merged_groups, model_cost, token_counts

TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0, qkv_bias=True)
PREFIXES = {0: {"class_token": False, "global_pool": "avg", "fc_norm": False}, 1: {}, 5: {"reg_tokens": 4}}


def vit(**changes) -> VisionTransformer:
    """A small ViT whose attention is neither uniform nor one-hot."""
    torch.manual_seed(0)
    model = VisionTransformer(**(TINY | changes)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=0.3)
    return model


def images(batch: int = 2, size: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def one_token_at_a_time(model: VisionTransformer, image: torch.Tensor, schedule: list[int]):
    """The method on lists, from the paper's words: tokens (n, D) before the final norm, and the members of each."""
    prefix = model.num_prefix_tokens
    x = list(model._pos_embed(model.patch_embed(image[None]))[0])
    members = [[i] for i in range(len(x))]
    for block, r in zip(model.blocks, schedule, strict=True):
        n, attn = len(x), block.attn
        qkv = attn.qkv(block.norm1(torch.stack(x))).view(n, 3, attn.num_heads, attn.head_dim)
        q, k, v = (qkv[:, i].transpose(0, 1) for i in range(3))  # (h, n, d_h)
        size = torch.tensor([float(len(group)) for group in members])
        weights = (q @ k.mT / attn.head_dim**0.5 + size.log()).softmax(-1)
        mixed = attn.proj((weights @ v).transpose(0, 1).flatten(1))
        x = [token + delta for token, delta in zip(x, mixed, strict=True)]
        keys, pairs = k.mean(0), []
        evens, others = range(prefix + prefix % 2, n, 2), range(prefix + 1 - prefix % 2, n, 2)
        for i in evens:
            nearest = [torch.cosine_similarity(keys[i], keys[j], dim=0).item() for j in others]
            pairs.append((max(nearest), i, others[nearest.index(max(nearest))]))
        sources = {i: j for _, i, j in sorted(pairs, key=lambda pair: -pair[0])[:r]}
        sums = [token * len(group) for token, group in zip(x, members, strict=True)]
        members = [list(group) for group in members]
        for i, j in sources.items():
            sums[j] = sums[j] + x[i] * len(members[i])
        for i, j in sources.items():
            members[j] = members[j] + members[i]
        order = [*range(prefix), *(i for i in evens if i not in sources), *others] if r else range(n)
        members = [members[i] for i in order]
        x = [sums[i] / len(group) for i, group in zip(order, members, strict=True)]
        x = [token + block.mlp(block.norm2(token)) for token in x]
    return torch.stack(x), members


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("schedule", [[3, 3, 3], [8, 0, 2], [0, 5, 0]])
def test_equals_the_method_on_lists(prefix, schedule):
    model, x = vit(**PREFIXES[prefix]), images()
    with torch.no_grad():
        expected = [one_token_at_a_time(model, image, schedule) for image in x]
        y = merge_tokens(model, schedule, unmerge=False).forward_features(x)
        groups = merged_groups(model)
        for i, (tokens, members) in enumerate(expected):
            assert_close(y[i], model.norm(tokens), rtol=1e-5, atol=1e-5)
            assert [sorted(group) for group in members] == [
                (groups[i] == token).nonzero()[:, 0].tolist() for token in range(len(members))
            ]


def test_a_merge_by_hand():
    angles = torch.tensor([0.0, 40.0, 45.0, 90.0, 80.0, 0.0, 10.0]).deg2rad()  # a class token, then three pairs
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None]
    chosen, targets = match(keys, 2, 1)
    # 45 is 5 from 40, 80 is 10 from 90, 10 is 10 from 0 and comes later
    assert chosen.tolist() == [[0, 1]] and targets.tolist() == [[0, 1]]
    x = torch.arange(7.0)[None, :, None]
    sizes = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    y, joined, moved = merge(x, sizes, chosen, targets, 1)
    assert y.flatten().tolist() == [0.0, 6.0, (3 * 1 + 2) / 4, (3 + 4) / 2, 5.0]
    assert joined.tolist() == [[1.0, 2.0, 4.0, 2.0, 1.0]] and moved.tolist() == [[0, 2, 2, 3, 3, 4, 1]]


def test_several_tokens_may_join_one():
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2], [-1.0, 0.0]])[None, None]
    chosen, targets = match(keys[:, :, [0, 3, 2, 5, 4, 1]], 3, 0)
    assert sorted(chosen[0].tolist()) == [0, 1, 2] and len(targets.unique()) == 1
    y, joined, _ = merge(torch.eye(6)[None], None, chosen, targets, 0)
    assert sorted(joined[0].tolist()) == [1.0, 1.0, 4.0] and (y * joined[..., None]).sum() == 6


@pytest.mark.parametrize("prefix", PREFIXES)
def test_sizes_and_weighted_sums_are_kept_and_prefix_tokens_stay(prefix):
    generator = torch.Generator().manual_seed(0)
    x, keys = torch.randn(3, prefix + 17, 8, generator=generator).double(), torch.randn(3, 2, prefix + 17, 4)
    sizes, groups = None, torch.arange(prefix + 17).repeat(3, 1)
    for r in (8, 4, 2):
        chosen, targets = match(keys[:, :, : x.shape[1]], r, prefix)
        before = x if sizes is None else x * sizes[..., None]
        x, sizes, moved = merge(x, sizes, chosen, targets, prefix)
        groups = moved.gather(1, groups)
        assert_close((x * sizes[..., None]).sum(1), before.sum(1))
        assert torch.equal(sizes.sum(1), torch.full((3,), prefix + 17.0).double())
        counts = torch.stack([row.bincount(minlength=x.shape[1]) for row in groups])
        assert torch.equal(sizes, counts.double())
    assert x.shape[1] == prefix + 3
    assert (sizes[:, :prefix] == 1).all() and torch.equal(groups[:, :prefix], torch.arange(prefix).repeat(3, 1))


def test_merging_equal_tokens_changes_nothing():
    model, x = vit(pos_embed="none"), images()
    patches = x.unflatten(-1, (4, 8)).transpose(2, 3)  # (B, 3, 4, 32, 8)
    pairs = patches[:, :, [0, 0, 2, 2]].transpose(2, 3).flatten(-2)  # neighbours in a row are alike
    with torch.no_grad():
        expected = model.forward_features(pairs)
        y = merge_tokens(model, [8, 0, 0]).forward_features(pairs)
        assert torch.equal(merged_groups(model)[0].bincount(), torch.tensor([1] + 8 * [2]))
    assert_close(y, expected, rtol=1e-4, atol=1e-5)  # as proportional attention promises


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["timm", "ours"])
def test_nothing_merged_is_the_plain_model_bit_for_bit(prefix, kind):
    model, x = vit(**PREFIXES[prefix]), images()
    with torch.no_grad():
        expected = model(x)
        if kind == "ours":
            backbone.swap(model, "mha")
        assert torch.equal(merge_tokens(model, 0)(x), expected)
        assert not torch.equal(merge_tokens(model, [0, 2, 2])(x), expected)
        assert torch.equal(merge_tokens(model, 0)(x), expected)
    with pytest.raises(RuntimeError, match="no tokens were merged"):
        merged_groups(model)


def test_images_do_not_depend_on_their_batch_and_passes_repeat():
    model, x = merge_tokens(vit(), 4), images(3)
    x[1] *= 5
    with torch.no_grad():
        together = model(x)
        assert torch.equal(model(x), together)
        for i in range(3):
            assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
        x[1, 0, 0, 0] = torch.nan
        spoilt = model(x)
    assert spoilt[1].isnan().any() and spoilt[[0, 2]].isfinite().all()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        (0, {}),
        (3, {}),
        ([8, 0, 2], {"img_size": (32, 56), "init_values": 1e-5}),
        ([0, 0, 8], {"num_heads": 6}),
        ([1, 7, 4], {"num_heads": 6, "num_classes": 10}),
    ],
    ids=str,
)
def test_closed_form_equals_the_count(prefix, schedule, changes):
    model = merge_tokens(vit(**(PREFIXES[prefix] | changes)), schedule)
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    cost = model_cost(model)
    assert closed_form.count_macs(model, x) == cost.macs
    assert closed_form.count_macs(model, x.repeat(2, 1, 1, 1)) == 2 * cost.macs
    assert closed_form.parameters(model) == cost.params
    plain = closed_form.model_cost(vit(**(PREFIXES[prefix] | changes)))
    if schedule == 0:
        assert cost == plain
    elif schedule != [0, 0, 8]:  # there too little is left to be saved
        assert cost.macs < plain.macs and cost.elementwise < plain.elementwise


def test_published_cost():
    with torch.device("meta"):
        model = merge_tokens(timm.create_model("vit_small_patch16_224", num_classes=1000), 8)
    assert token_counts(model) == [197 - 8 * i for i in range(13)]
    assert model_cost(model).macs == pytest.approx(3.43e9, rel=3e-3)  # WhatTransformerToFavor's data, ToMe r8


def test_token_counts_are_those_that_blocks_see():
    model = merge_tokens(vit(), [5, 0, 3], unmerge=False)
    seen = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        left = model.forward_features(images()).shape[1]
    assert [*seen, left] == token_counts(model) == [17, 12, 12, 9]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_unmerged_features_weigh_tokens_by_size(prefix):
    model, x = vit(**PREFIXES[prefix]), images()
    with torch.no_grad():
        tokens = merge_tokens(model, 4, unmerge=False).forward_features(x)
        groups = merged_groups(model)
        sizes = model.blocks[-1].trace.sizes[-1]
        features = merge_tokens(model, 4).forward_features(x)
        assert features.shape == (2, prefix + 16, 48)
        for image in range(2):
            assert_close(features[image], tokens[image, groups[image]])
        pooled = model.pool(features, "avg")
        weighted = (tokens * sizes[..., None])[:, prefix:].sum(1) / sizes[:, prefix:].sum(1, keepdim=True)
        assert_close(pooled, weighted)
        image_like = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
        assert image_like.shape == (2, 48, 4, 4)


@pytest.mark.parametrize("feature", ["cls", "cls_norm", "cls_patch"])
def test_in_the_metric(feature):
    x = images().sigmoid()
    plain, merged = (Metric(vit(), feature), Metric(merge_tokens(vit(), 3), feature))
    short = Metric(merge_tokens(vit(), 3, unmerge=False), feature)
    with torch.no_grad():
        expected, y = plain.embed(x), merged.embed(x)
        assert y.shape == expected.shape
        assert 0 < (1 - torch.cosine_similarity(y, expected)).max() < 0.3
        assert torch.equal(short.embed(x)[:, :48], y[:, :48])  # the class token is the same
    merge_tokens(merged.backbone, 0)
    with torch.no_grad():
        # the metric of the plain model computes its last block for the class token alone: equal up to rounding
        assert_close(merged.embed(x), expected, rtol=1e-5, atol=1e-5)


def test_trains_copies_and_keeps_its_names():
    model, x = vit(init_values=0.1, drop_path_rate=0.1), images()
    state = copy.deepcopy(model.state_dict())
    merge_tokens(model.train(), 3)
    assert all(block.training for block in model.blocks)
    model(x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.any()
    twin = merge_tokens(vit(init_values=0.1), 3)
    twin.load_state_dict(state, strict=True)
    copied = copy.deepcopy(model.eval())
    with torch.inference_mode():
        assert torch.equal(twin(x), model(x)) and torch.equal(copied(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), twin(x))


def test_checkpointed_gradients_are_the_same():
    gradients = []
    for checkpointing in (False, True):
        model = merge_tokens(vit(), 3).train()
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_number_formats(dtype):
    model, x = merge_tokens(vit(), 4), images()
    with torch.no_grad():
        expected = model(x)
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and y.isfinite().all()
    if dtype == torch.float64:
        assert_close(y.float(), expected, rtol=1e-4, atol=1e-5)


def test_compiles_in_one_graph():
    model, x = merge_tokens(vit(depth=2), 4), images()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(x), expected)
        assert_close(compiled(images(seed=2)), model(images(seed=2)))


def test_the_recipe_says_what_is_merged():
    model = backbone.create("demo", pretrained=False)
    before = dict(model.recipe)
    assert merge_tokens(model, 8).recipe == before | {"token_merging": {"r": [8] * 6, "unmerge": True}}
    assert merge_tokens(model, 0).recipe == before


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (9, r"r=9 .* block 0 gets 16 patches and can merge 0 to 8 of them; possible for every block: 0 to 4"),
        (5, r"r=5 .* block 2 gets 6 patches and can merge 0 to 3 of them; possible for every block: 0 to 4"),
        ([8, 5, 0], r"block 1 gets 8 patches and can merge 0 to 4 of them$"),
        ([1, 1], r"r=\[1, 1\] has 2 entries for 3 blocks"),
        (-1, "r=-1 must be an integer at least 0"),
        (2.5, "r=2.5 must be an integer"),
        ([1, True, 1], "r=True must be an integer"),
    ],
)
def test_an_r_that_cannot_be(r, message):
    with pytest.raises(ValueError, match=message):
        merge_tokens(vit(), r)


def test_models_that_cannot_merge():
    with pytest.raises(ValueError, match="block 1 is a Block with 'pool' as its mixer"):
        merge_tokens(backbone.swap(vit(), "pool", layers=[1]), 2)
    with pytest.raises(ValueError, match="block 0 is a ParallelScalingBlock"):
        merge_tokens(VisionTransformer(**TINY, block_fn=ParallelScalingBlock), 2)
    naive = backbone.swap(vit(), "mha", implementation="naive")
    with pytest.raises(ValueError, match="fused attention only"):
        merge_tokens(naive, 2)
    model = vit(dynamic_img_size=True)
    with pytest.raises(ValueError, match="r=8 of 4 patches cannot be merged; possible: 0 to 2"):
        merge_tokens(model, [8, 0, 0])(images(size=16))
    with pytest.raises(ValueError, match="neither attn_mask nor is_causal"):
        merge_tokens(vit(), 2).forward_features(images(), is_causal=True)
