import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from thesis_lib import backbone
from thesis_lib.correspondence import features as fm
from thesis_lib.correspondence.features import PixelFeatures, ViTFeatures, extract


def test_vit_maps_are_the_blocks_tokens_and_projections(vit):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    extractor = ViTFeatures(vit, (-1, 2), ("token", "query", "key", "value"))
    maps = extractor(x)
    assert list(maps) == extractor.keys == [f"{n}{f}" for n in (2, 5) for f in ("", ".query", ".key", ".value")]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbone.normalization(vit))
    tokens = vit._pos_embed(vit.patch_embed((x - mean) / std))
    for block in vit.blocks[:2]:
        tokens = block(tokens)
    q, k, v = vit.blocks[2].attn.qkv(vit.blocks[2].norm1(tokens)).chunk(3, dim=-1)
    for name, part in (("query", q), ("key", k), ("value", v)):
        torch.testing.assert_close(maps[f"2.{name}"], part[:, 1:].mT.reshape(2, 128, 8, 8))
    torch.testing.assert_close(maps["2"], vit.blocks[2](tokens)[:, 1:].mT.reshape(2, 128, 8, 8))
    assert not vit.blocks[2].attn._forward_pre_hooks


def test_any_mixer_gives_tokens_but_not_every_facet():
    pool = backbone.create("demo", "pool", pretrained=False)
    assert ViTFeatures(pool)(torch.rand(1, 3, 64, 64))["5"].shape == (1, 128, 8, 8)
    with pytest.raises(ValueError, match="mixer 'pool' makes no key of every token"):
        ViTFeatures(pool, facets=("key",))


def test_wrong_layers_and_facets_are_named(vit):
    with pytest.raises(ValueError, match=r"layers \[6\] are not among the model's 6 blocks"):
        ViTFeatures(vit, (0, 6))
    with pytest.raises(ValueError, match="did you mean query"):
        ViTFeatures(vit, facets=("qeury",))


def test_extraction_is_frozen_evaluated_and_half(vit):
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    extractor = ViTFeatures(vit)
    found = extract(extractor, images)["5"]
    assert found.dtype == torch.float16 and not found.requires_grad
    alone = extract(extractor, images[1:2])["5"]
    torch.testing.assert_close(found[1:2], alone, atol=2e-3, rtol=2e-3)
    half = extract(extractor, images, dtype="bfloat16")["5"]
    assert F.cosine_similarity(half.float(), found.float()).mean() > 0.99 and not torch.equal(half, found)
    with pytest.raises(RuntimeError, match="training mode"):
        extract(extractor.train(), images)
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, 64, 64\)"):
        extract(extractor.eval(), images[..., :32])
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        extract(extractor, images, dtype="float61")
    with torch.no_grad():
        vit.blocks[5].mlp.fc2.bias.fill_(1e6)
    with pytest.raises(RuntimeError, match="not finite in float16"):
        extract(extractor, images)


def test_position_is_most_similar_to_itself_and_colour_is_the_mean():
    x = torch.rand(1, 3, 64, 64)
    place = PixelFeatures("position", grid=8)(x)["position"][0].flatten(1)
    similarity = F.normalize(place, dim=0).mT @ F.normalize(place, dim=0)
    assert similarity.argmax(1).tolist() == list(range(64))
    colour = PixelFeatures("colour", grid=8)(x)["colour"]
    torch.testing.assert_close(colour[0, :, 0, 1], x[0, :, :8, 8:16].mean((1, 2)) - 0.5)


def test_padded_squares_keep_shape_and_map_points_both_ways(tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[10, 40] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    square = fm.read_image(tmp_path / "a.png", 120, "pad").float().sum(0)
    row, column = divmod(int(square.argmax()), 120)
    point = torch.tensor([[40.5, 10.5]])
    there = fm.to_frame(point, (60, 30), 120)
    assert there.tolist() == [[81.0, 51.0]] and abs(row - 51) <= 1 and abs(column - 81) <= 1
    assert square[:29].sum() == 0 and torch.equal(fm.from_frame(there, (60, 30), 120), point)
    assert fm.read_image(tmp_path / "a.png", 32).shape == (3, 32, 32)


def test_combination_weighs_normalised_sources_equally():
    a, b = torch.randn(4, 6, 6) * 100, torch.randn(8, 3, 3) * 0.01
    both = fm.combine([a, b])
    assert both.shape == (12, 6, 6)
    torch.testing.assert_close(both[:4].norm(dim=0), torch.ones(6, 6))
    torch.testing.assert_close(both[4:].norm(dim=0), torch.ones(6, 6))
    assert torch.equal(fm.combine([a]), a)
    torch.testing.assert_close(fm.combine([a, b], [2.0, 0.5])[4:].norm(dim=0), torch.full((6, 6), 0.5))


def test_co_pca_keeps_what_varies_over_both_images():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn((2, 2, 5, 5), generator=generator)
    mixing = torch.randn((16, 2), generator=generator)
    source, target = (torch.einsum("cd,dhw->chw", mixing, s) + 7 for s in signal)
    a, b = fm.co_pca(source, target, 2)
    assert a.shape == b.shape == (2, 5, 5)
    for pick in ((a, source), (b, target)):  # two components hold all distances
        flat = [m.flatten(1).mT for m in pick]
        torch.testing.assert_close(torch.cdist(flat[0], flat[0]), torch.cdist(flat[1], flat[1]), atol=1e-3, rtol=1e-3)


def test_foreground_is_the_side_away_from_the_border():
    maps = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0)) * 0.05
    maps[:, 0] -= 1
    maps[:, 0, 3:7, 3:7] += 2
    for sign in (1, -1):
        found = fm.foreground(maps * sign)
        assert found[:, 3:7, 3:7].all() and not found[:, :2].any()
