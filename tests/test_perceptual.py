"""The perceptual metric against DreamSim's published definitions, written out here as slow loops."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision import transforms

from thesis_lib import backbone, paths, perceptual

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def small_demo(monkeypatch, tmp_path):
    """Shrink the demo backbone and give it random weights of a known seed, large enough that features differ."""
    monkeypatch.setattr(backbone, "DEMO", SMALL)
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path)
    torch.manual_seed(0)
    model = backbone.create("demo", pretrained=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    backbone.save_weights(model, tmp_path / backbone.DEMO_FILE)


@pytest.fixture
def model():
    return backbone.create("demo")


def images(n, seed=0, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Pixels:
    """What embed_pixels asks of the cache; remembers what was read."""

    def __init__(self, n, size=32):
        self.array = np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
        self.read = []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, indices):
        self.read.append(len(indices))
        return torch.from_numpy(self.array[indices])


# --- scores and loss ------------------------------------------------------------------------------------------------


def slow_2afc(d_left, d_right, votes):
    """DreamSim's score, triplet by triplet."""
    total = 0.0
    for left, right, vote in zip(d_left, d_right, votes, strict=True):
        if left < right:
            total += 1 - vote
        elif right < left:
            total += vote
        else:
            total += 0.5
    return total / len(votes)


def test_2afc_equals_dreamsims_loop_with_soft_votes_and_ties():
    rng = np.random.default_rng(0)
    d_left, d_right = rng.integers(0, 6, (2, 500)) / 5  # a sixth are ties
    votes = rng.integers(0, 6, 500) / 5
    scores = perceptual.two_afc_scores(d_left, d_right, votes)
    assert scores.shape == (500,) and scores.dtype == torch.float64
    expected = slow_2afc(d_left, d_right, votes)
    assert perceptual.two_afc_score(d_left, d_right, votes) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(scores[d_left == d_right], 0.5)


def test_2afc_with_hard_votes_is_the_accuracy():
    d_left, d_right = torch.tensor([0.1, 0.3, 0.2, 0.2]), torch.tensor([0.2, 0.1, 0.4, 0.2])
    votes = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert perceptual.two_afc_scores(d_left, d_right, votes).tolist() == [1, 0, 0, 0.5]
    assert perceptual.two_afc_score(-d_left, -d_right, votes) == 1 - perceptual.two_afc_score(d_left, d_right, votes)


def test_2afc_accepts_unbounded_distances():
    inf = math.inf  # minus PSNR of two equal images
    assert perceptual.two_afc_scores([-inf, -30.0], [-20.0, -inf], [0.0, 0.0]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, math.nan, 0.2], [math.nan, math.nan, 0.1], [0.0, 1.0, 1.0]), "2 of 3 triplets have a NaN distance"),
        (([0.1, 0.2], [0.1, 0.2], [0.0, 1.5]), "share of votes"),
        (([0.1, 0.2], [0.1, 0.2], [0.0, math.nan]), "share of votes"),
        (([0.1, 0.2], [0.1, 0.2], [[0.0], [1.0]]), r"\(2,\), \(2,\), \(2, 1\)"),
        (([0.1], [0.1, 0.2], [0.0, 1.0]), "same triplets"),
        (([], [], []), "no triplets"),
    ],
)
def test_bad_triplets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        perceptual.two_afc_score(*arguments)


def test_hinge_loss_equals_dreamsims_loop_and_its_gradient_orders_the_pair():
    generator = torch.Generator().manual_seed(0)
    d_left, d_right = torch.rand(2, 200, generator=generator) * 0.2
    votes = torch.randint(0, 3, (200,), generator=generator) / 2  # 0, 0.5, 1
    total = 0.0
    for left, right, vote in zip(d_left.tolist(), d_right.tolist(), votes.tolist(), strict=True):
        sign = 1 if vote > 0.5 else -1  # one half is left
        total += max(0.0, 0.05 - (left - right) * sign)
    assert perceptual.hinge_loss(d_left, d_right, votes).item() == pytest.approx(total / 200, rel=1e-5)

    left = torch.tensor([0.30], requires_grad=True)
    perceptual.hinge_loss(left, torch.tensor([0.31]), torch.tensor([1.0])).backward()
    assert left.grad.item() == -1  # right won, so the left image is pushed away
    pair = torch.tensor([0.40]), torch.tensor([0.30]), torch.tensor([1.0])
    assert perceptual.hinge_loss(*pair) == 0
    assert perceptual.hinge_loss(*pair, margin=0.25).item() == pytest.approx(0.15)


def test_hinge_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        perceptual.hinge_loss(torch.rand(3), torch.rand(3), torch.ones(3, 1))


def test_triplet_distances_equal_pairwise_ones_whatever_the_chunk():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(20, 7, generator=generator)
    index = torch.randint(0, 20, (33, 3), generator=generator)
    d_left, d_right = perceptual.triplet_distances(embeddings, index.numpy(), chunk=10)
    for i, (ref, left, right) in enumerate(index.tolist()):
        for d, other in ((d_left, left), (d_right, right)):
            a, b = embeddings[ref].double(), embeddings[other].double()
            assert d[i].item() == pytest.approx(1 - (a @ b / a.norm() / b.norm()).item(), abs=1e-12)
    assert d_left.dtype == torch.float64


def test_equal_candidates_are_an_exact_tie():
    embeddings = torch.randn(3, 768)
    embeddings[2] = embeddings[1]
    d_left, d_right = perceptual.triplet_distances(embeddings, [[0, 1, 2]])
    assert perceptual.two_afc_score(d_left, d_right, [1.0]) == 0.5


@pytest.mark.parametrize("index", [[[0, 1, 3]], [[-1, 0, 1]], [[0, 1]], [[0.0, 1.0, 2.0]]])
def test_an_index_that_misses_the_embeddings_is_refused(index):
    with pytest.raises(ValueError, match="index"):
        perceptual.triplet_distances(torch.randn(3, 4), index)


def test_columns_of_a_filtered_table_are_scored():
    table = pd.DataFrame({"left": [9, 1.0, 3.0], "right": [9, 2.0, 1.0], "vote": [9, 0.0, 1.0]})[1:]
    assert perceptual.two_afc_score(table["left"], table["right"], table["vote"]) == 0.5 * (1 + 1)


# --- the metric -----------------------------------------------------------------------------------------------------


def slow_embedding(model, image, feature, normalize):
    """DreamSim's embedding of one image: a hook on the last block, then each token by itself."""
    caught = []
    hook = model.blocks[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    final = model.forward_features(((image - mean[:, None, None]) / std[:, None, None])[None])[0]
    hook.remove()
    tokens = final if feature == "cls_norm" else caught[0][0]

    def centred(token):
        if not normalize:
            return token
        token = token - token.mean()
        return token / token.norm()

    cls = centred(tokens[0])
    if feature != "cls_patch":
        return cls
    return torch.cat([cls, torch.stack([centred(t) for t in tokens[1:]]).mean(dim=0)])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature", perceptual.FEATURES)
def test_embedding_is_dreamsims(model, feature, normalize):
    metric, x = perceptual.Metric(model, feature, normalize), images(3)
    expected = torch.stack([slow_embedding(model, image, feature, normalize) for image in x])
    torch.testing.assert_close(metric.embed(x), expected, atol=1e-5, rtol=1e-4)
    assert metric.embed(x).shape == (3, 96 if feature == "cls_patch" else 48)


def test_default_is_the_class_token_before_the_norm_centred(model):
    x = images(2)
    default = perceptual.Metric(model).embed(x)
    assert torch.equal(default, perceptual.Metric(model, "cls", True).embed(x))
    assert not torch.allclose(default, perceptual.Metric(model, "cls_norm").embed(x), atol=1e-2)
    torch.testing.assert_close(default.mean(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(default.norm(dim=1), torch.ones(2))


def test_register_tokens_are_not_patches():
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL, num_classes=0, reg_tokens=3).eval()
    hidden = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    embedding = perceptual.Metric(model, "cls_patch", normalize=False).embed(images(1))
    assert hidden[0].shape == (1, 1 + 3 + 16, 48)
    torch.testing.assert_close(embedding, torch.cat([hidden[0][:, 0], hidden[0][:, 4:].mean(dim=1)], dim=1))


def test_distance_of_normalised_embeddings_is_one_minus_the_correlation(model):
    metric, raw = perceptual.Metric(model), perceptual.Metric(model, normalize=False)
    a, b = images(4), images(4, seed=1)
    expected = [1 - np.corrcoef(u, v)[0, 1] for u, v in zip(raw.embed(a).detach(), raw.embed(b).detach(), strict=True)]
    np.testing.assert_allclose(metric(a, b).detach(), expected, atol=1e-5)
    assert metric(a, b).shape == (4,) and torch.equal(metric(a, b), metric(b, a))
    torch.testing.assert_close(metric(a, a), torch.zeros(4), atol=1e-6, rtol=0)


def test_a_pairs_distance_does_not_depend_on_the_batch(model):
    metric, a, b = perceptual.Metric(model), images(5), images(5, seed=1)
    together = metric(a, b)
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_images_of_any_float_type_are_taken_in_pairs(model):
    metric, a, b = perceptual.Metric(model), images(2), images(2, seed=1)
    for dtype in (torch.float64, torch.float16):
        torch.testing.assert_close(metric(a.to(dtype), b.to(dtype)), metric(a, b), atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        metric(a[:1], b)


def test_images_get_gradients(model):
    metric, a = perceptual.Metric(model.requires_grad_(False)), images(2).requires_grad_()
    metric(a, images(2, seed=1)).sum().backward()
    assert a.grad.abs().sum() > 0


def test_metric_keeps_the_mode_its_backbone_is_in(model):
    assert not perceptual.Metric(model).training
    assert perceptual.Metric(model.train()).training and model.training


def test_metric_works_on_a_backbone_that_is_being_tuned(model):
    before = perceptual.Metric(model).embed(images(2))
    tuned = perceptual.Metric(backbone.add_lora(model, rank=2))
    torch.testing.assert_close(tuned.eval().embed(images(2)), before)
    tuned.embed(images(2)).sum().backward()
    assert any(p.grad is not None for n, p in tuned.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(3, 32, 32), r"\(B, 3, 32, 32\), got \(3, 32, 32\)"),
        (torch.rand(1, 1, 32, 32), "got"),
        (torch.rand(1, 3, 32, 40), r"got \(1, 3, 32, 40\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "divide bytes by 255"),
        (torch.rand(1, 3, 32, 32) * 255, r"\[0, 1\]"),
        (torch.rand(1, 3, 32, 32) * 4 - 2, "applies mean and std itself"),
        (torch.full((1, 3, 32, 32), math.nan), "nan"),
    ],
)
def test_images_that_are_not_rgb_in_0_1_are_refused(model, x, message):
    with pytest.raises(ValueError, match=message):
        perceptual.Metric(model).embed(x)


def test_impossible_metrics_are_refused(model):
    with pytest.raises(ValueError, match="cls, cls_norm, cls_patch"):
        perceptual.Metric(model, "CLS")
    with pytest.raises(ValueError, match="'false' is neither"):
        perceptual.Metric(model, normalize="false")
    model.has_class_token = False
    with pytest.raises(ValueError, match="no class token"):
        perceptual.Metric(model)


# --- preprocessing, saving, loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_preprocess_is_dreamsims_squash(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    bicubic = transforms.InterpolationMode.BICUBIC
    published = transforms.Compose([transforms.Resize((32, 32), interpolation=bicubic), transforms.ToTensor()])
    ours = pickle.loads(pickle.dumps(perceptual.preprocess(32)))(image)  # data loaders send it to other processes
    assert torch.equal(ours, published(image.convert("RGB"))[None])
    assert perceptual.preprocess((16, 24))(image).shape == (1, 3, 16, 24)


def test_preprocess_keeps_the_upper_byte_of_16_bits_and_refuses_what_has_no_white(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65536, (50, 80), dtype=np.uint16)
    eight = Image.fromarray((grey // 256).astype(np.uint8))
    preprocess = perceptual.preprocess(32)
    assert torch.equal(preprocess(Image.fromarray(grey)), preprocess(eight))
    Image.fromarray(grey.astype(np.float32) / 65535).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match=r"depth\.tif has the mode F"), Image.open(tmp_path / "depth.tif") as image:
        preprocess(image)


def test_load_by_name_gives_a_frozen_metric_with_that_mixer():
    metric, preprocess = perceptual.load("pool")
    x = preprocess(Image.new("RGB", (100, 60), "teal"))
    assert metric.embed(x).shape == (1, 48) and not metric.training
    assert {block.attn.name for block in metric.backbone.blocks} == {"pool"}
    assert not any(p.requires_grad for p in metric.parameters())


def test_saved_metric_comes_back_bit_for_bit_in_a_process_without_peft(tmp_path, model):
    tuned = backbone.add_lora(backbone.create("demo", "sra", layers=[1], img_size=64, ratio=4), rank=2)
    metric = perceptual.Metric(backbone.merge_lora(tuned), "cls_patch", normalize=False).eval()
    folder = perceptual.save(metric, tmp_path / "deep" / "metric")
    assert sorted(p.name for p in folder.iterdir()) == ["metric.json", "model.safetensors"]
    torch.save(images(2, size=64), tmp_path / "images.pt")
    program = f"""
import sys
sys.modules["peft"] = None
import torch
from thesis_lib import backbone, perceptual
backbone.DEMO = {SMALL}
metric, preprocess = perceptual.load({str(folder)!r})
assert metric.backbone.recipe == {metric.backbone.recipe}, metric.backbone.recipe
assert preprocess.keywords["size"] == (64, 64)
torch.save(metric.embed(torch.load({str(tmp_path / "images.pt")!r})), {str(tmp_path / "embeddings.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "embeddings.pt"), metric.embed(images(2, size=64)).detach())


def test_saving_an_unmerged_adapter_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="merge_lora"):
        perceptual.save(perceptual.Metric(backbone.add_lora(model)), tmp_path / "metric")


def test_a_metric_of_a_plain_timm_vit_is_not_saved_in_part(tmp_path):
    with pytest.raises(ValueError, match="no recipe"):
        perceptual.save(perceptual.Metric(VisionTransformer(**SMALL, num_classes=0)), tmp_path / "metric")
    assert not (tmp_path / "metric").exists()


def test_a_tilde_is_the_home_folder(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert perceptual.save(perceptual.Metric(model), "~/metric") == tmp_path / "metric"
    perceptual.load("~/metric")
    path = backbone.save_weights(model, "~/deep/weights.safetensors")
    assert path == tmp_path / "deep" / "weights.safetensors"
    backbone.load_weights(
        backbone.create("demo", pretrained="~/deep/weights.safetensors"), "~/deep/weights.safetensors"
    )


@pytest.mark.parametrize("missing", ["metric.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused(tmp_path, model, missing):
    folder = perceptual.save(perceptual.Metric(model), tmp_path / "metric")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        perceptual.load(folder)


def rewrite(folder, **changes):
    file = folder / "metric.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_recipe(folder, **changes):
    rewrite(folder, recipe=json.loads((folder / "metric.json").read_text())["recipe"] | changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "metric.json").write_text('{"recipe": '), "metric.json is corrupt"),
        (lambda f: rewrite(f, recipe={"name": "demo"}), "corrupt.*mixer"),
        (lambda f: rewrite(f, feature="token"), "feature 'token'"),
        (lambda f: rewrite(f, normalize="false"), "metric.json.*'false' is neither"),
        (lambda f: change_recipe(f, img_size="64"), "metric.json.*img_size '64'"),
        (lambda f: change_recipe(f, img_size=[64, None]), "metric.json.*img_size"),
        (lambda f: change_recipe(f, layers=3), "metric.json.*layers=3"),
        (lambda f: change_recipe(f, mixer=["pool"]), "metric.json is corrupt"),
        (lambda f: change_recipe(f, mixer_options={"ratio": 2}), "metric.json.*no option 'ratio'"),
        (lambda f: change_recipe(f, name=3), "metric.json.*VisionTransformer 3"),
        (lambda f: change_recipe(f, plan={"x": 1}), "metric.json is corrupt"),
        (lambda f: change_recipe(f, token_merging={"r": "many"}), "metric.json is corrupt"),
        (lambda f: rewrite(f, recipe=backbone.create("demo", "sra").recipe), "mixer 'mha' .model: 'sra'"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "corrupt"),
    ],
)
def test_a_corrupt_folder_is_refused(tmp_path, model, spoil, message):
    folder = perceptual.save(perceptual.Metric(model), tmp_path / "metric")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        perceptual.load(folder)


def test_a_metric_is_whole_while_it_is_saved_again(tmp_path, model, monkeypatch):
    metric, write = perceptual.Metric(model), Path.write_text
    folder, seen = perceptual.save(metric, tmp_path / "metric"), []

    def slowly(path, text):
        write(path, text[:20])
        seen.append(perceptual.load(folder))  # as another rank would
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", slowly)
    perceptual.save(metric, folder)
    assert len(seen) == 1 and sorted(path.name for path in folder.iterdir()) == ["metric.json", "model.safetensors"]


def test_load_of_nothing_names_the_near_mixers_or_the_folder(tmp_path):
    with pytest.raises(ValueError, match="moh.*, nor is there a folder of that name"):
        perceptual.load("mho")
    with pytest.raises(FileNotFoundError, match="no saved metric at .*nowhere"):
        perceptual.load(tmp_path / "nowhere")


# --- embedding a cache ----------------------------------------------------------------------------------------------


def test_embedded_pixels_are_those_of_embed_in_order_whatever_the_batch(model):
    metric, pixels = perceptual.Metric(model), Pixels(11)
    whole = perceptual.embed_pixels(metric, pixels, progress=False)
    torch.testing.assert_close(whole, metric.embed(torch.from_numpy(pixels.array) / 255), atol=1e-6, rtol=1e-6)
    for batch_size in (1, 3, 11):
        by_batch = perceptual.embed_pixels(metric, pixels, batch_size=batch_size, progress=False)
        torch.testing.assert_close(by_batch, whole, atol=2e-6, rtol=0)
    pixels.read.clear()
    some = perceptual.embed_pixels(metric, pixels, indices=[7, 2, 7], batch_size=2, progress=False)
    torch.testing.assert_close(some, whole[[7, 2, 7]], atol=2e-6, rtol=0)
    assert pixels.read == [2, 1]


def test_pageable_memory_is_not_copied_behind_the_programs_back(model):
    """On mps such a copy may read memory that is in use for something else by then."""
    asked = []

    class Watched(torch.Tensor):
        def to(self, *arguments, **options):
            asked.append(options.get("non_blocking", False))
            return super().to(*arguments, **options)

    class Watching(Pixels):
        def __getitem__(self, indices):
            return super().__getitem__(indices).as_subclass(Watched)

    perceptual.embed_pixels(perceptual.Metric(model), Watching(2), progress=False)
    assert asked[:1] == [False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_changes_little_and_returns_float32(model, dtype):
    metric, pixels = perceptual.Metric(model), Pixels(4)
    exact = perceptual.embed_pixels(metric, pixels, progress=False)
    half = perceptual.embed_pixels(metric, pixels, dtype=dtype, progress=False)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert perceptual.distance(half, exact).max() < 1e-2


def test_embedding_leaves_mode_and_autograd_as_they_were(model):
    tuned = backbone.add_lora(model, dropout=0.9)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zero at first, when dropout would go unseen
    metric = perceptual.Metric(tuned).train()
    embeddings = perceptual.embed_pixels(metric, Pixels(2), progress=False)
    assert metric.training and not embeddings.requires_grad
    assert torch.equal(embeddings, perceptual.embed_pixels(metric, Pixels(2), progress=False))  # no dropout meanwhile
    (embeddings * torch.ones(48, requires_grad=True)).sum().backward()  # an inference tensor would refuse


def test_pixels_that_cannot_be_embedded_are_refused(model):
    metric = perceptual.Metric(model)
    for arguments, message in [
        ({"dtype": "half"}, "float32, bfloat16, float16"),
        ({"batch_size": 0}, "at least 1"),
        ({"indices": []}, "no images"),
        ({"indices": [True, False]}, "must be integers, got bool"),
        ({"indices": [0.9]}, "must be integers, got float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            perceptual.embed_pixels(metric, Pixels(2), progress=False, **arguments)
    with pytest.raises(ValueError, match=r"got \(2, 3, 40, 40\)"):
        perceptual.embed_pixels(metric, Pixels(2, size=40), progress=False)
    for wrong in (images(2), images(2).byte().int(), images(2).byte().numpy()):
        with pytest.raises(ValueError, match="tensors of bytes"):
            perceptual.embed_pixels(metric, wrong, progress=False)


def test_a_saved_metric_merges_the_tokens_it_merged(tmp_path):
    from thesis_lib.token_merging import merge_tokens

    metric = perceptual.Metric(merge_tokens(backbone.create("demo"), 4)).eval()
    loaded, _ = perceptual.load(perceptual.save(metric, tmp_path / "merged"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = perceptual.Metric(backbone.create("demo")).eval()
    with torch.no_grad():
        assert torch.equal(loaded.embed(x), metric.embed(x)) and not torch.allclose(metric.embed(x), plain.embed(x))
