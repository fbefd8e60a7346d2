import importlib.util
import json
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from thesis_lib import comparators, perceptual
from thesis_lib.comparators import MODELS, TOWERS, Branch, DreamSim, build_tower, dreamsim, missing_files

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=name) for name in ("dreamsim", "lpips")
}
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def shrunk(monkeypatch):
    """timm's architectures at a size for tests; everything else about them stays."""
    create = comparators.timm.create_model
    monkeypatch.setattr(comparators.timm, "create_model", lambda name, **options: create(name, **options, **SMALL))


def images(count: int, size: int = 224, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def peer_tower(name: str):
    """The package's own ViT with random weights, CLIP's the way its loaders make it, and the file they read."""
    from dreamsim.feature_extraction.load_clip_as_dino import QuickGELU
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    shape = {"patch_size": int(name[-2:]), "mlp_ratio": 4, "qkv_bias": True} | SMALL
    vit = VisionTransformer(norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6), **shape).eval()
    if TOWERS[name].feature == "embedding":
        vit.pos_drop = torch.nn.LayerNorm(vit.embed_dim)
        for module in vit.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        for block in vit.blocks if name.startswith("clip") else ():
            block.mlp.act = QuickGELU()
    with torch.no_grad():
        for parameter in vit.parameters():  # also biases and norms, which start at 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit, torch.randn(vit.embed_dim, 512) / 7


def write_weights(folder, name: str, *, adapted: bool = True) -> None:
    """The files of one of the package's models, with random weights, and adapters for all its towers in one file."""
    towers, adapter = MODELS[name]
    tensors = {}
    for number, tower in enumerate(towers):
        vit, projection = peer_tower(tower)
        state = vit.state_dict()
        if TOWERS[tower].feature == "embedding":
            torch.save({"state_dict": state | {"proj": projection}}, folder / TOWERS[tower].files[-1])
        else:
            torch.save(
                {"student": {}, "teacher": {f"backbone.{k}": v for k, v in state.items()}},
                folder / TOWERS[tower].files[-1],
            )
        for i in range(SMALL["depth"]):
            key = f"base_model.model.extractor_list.{number}.model.blocks.{i}.attn.qkv.lora_"
            tensors |= {f"{key}A.weight": torch.randn(4, 48) / 5, f"{key}B.weight": torch.randn(144, 4) / 5}
    if adapted:
        (folder / adapter).mkdir()
        save_file(tensors, folder / adapter / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 2,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": ["qkv"],
        }
        (folder / adapter / "adapter_config.json").write_text(json.dumps(config))


@needs["dreamsim"]
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ensemble", "dino_vitb16", "clip_vitb32", "open_clip_vitb32"])
def test_distances_equal_the_packages_on_shared_weights(shrunk, tmp_path, name):
    torch.manual_seed(3)
    write_weights(tmp_path, name)
    ours = dreamsim(name, tmp_path)
    assert ours.trained

    from dreamsim.model import PerceptualModel, dreamsim_args
    from peft import LoraConfig, PeftModel, get_peft_model

    def create_model(tower, load_dir):
        shape = peer_tower(tower)[0]
        state = torch.load(tmp_path / TOWERS[tower].files[-1], weights_only=True)
        if tower.startswith("dino"):
            shape.load_state_dict({k.removeprefix("backbone."): v for k, v in state["teacher"].items()})
            return shape
        projection = state["state_dict"].pop("proj")
        shape.load_state_dict(state["state_dict"])
        return shape, projection

    with (
        mock.patch("dreamsim.model.ViTExtractor.create_model", create_model),
        mock.patch.object(PerceptualModel, "_extract_cls", last_class_token),
    ):
        peer = PerceptualModel(**dreamsim_args["model_config"][name], normalize_embeds=True, device="cpu")
    folder = tmp_path / MODELS[name][1]
    config = LoraConfig(**json.loads((folder / "adapter_config.json").read_text()))
    peer = PeftModel.from_pretrained(get_peft_model(peer, config).base_model.model, folder).eval()
    a, b = images(3), images(3, seed=1)
    with torch.no_grad():
        assert_close(ours(a, b), peer(a, b), atol=1e-5, rtol=0)
    widths = [512 if TOWERS[tower].feature == "embedding" else 48 for tower in MODELS[name][0]]
    assert ours.embed(a).shape == (3, sum(widths))


def last_class_token(self, img, extractor_index=0):
    """The package reads block 11 of twelve; of the small ViTs of these tests it is the last."""
    depth = len(self.extractor_list[extractor_index].model.blocks)
    return self.extractor_list[extractor_index].extract_descriptors(img, depth - 1)[:, :, :, 0, :]


def test_an_adapter_changes_every_tower(shrunk, tmp_path):
    torch.manual_seed(0)
    write_weights(tmp_path, "ensemble")
    tuned = dreamsim("ensemble", tmp_path)
    for branch, tower in zip(tuned.branches, MODELS["ensemble"][0], strict=True):
        plain = build_tower(tower, tmp_path / TOWERS[tower].files[-1])
        assert not torch.equal(plain.blocks[1].attn.qkv.weight, branch.vit.blocks[1].attn.qkv.weight)
        assert torch.equal(plain.blocks[1].mlp.fc1.weight, branch.vit.blocks[1].mlp.fc1.weight)


def test_absent_weights_are_named_and_leave_a_model_for_timing(shrunk, tmp_path):
    torch.manual_seed(0)
    assert missing_files("ensemble", None) == missing_files("ensemble", tmp_path)
    write_weights(tmp_path, "ensemble", adapted=False)
    assert missing_files("ensemble", tmp_path) == ["ensemble_lora"]
    model = dreamsim("ensemble", tmp_path)
    assert not model.trained and not any(p.requires_grad for p in model.parameters())
    first, second = model.embed(images(2))
    assert first.shape == (48 + 512 + 512,) and (first - second).abs().max() > 1e-4
    assert abs(first.mean()) < 1e-6 and abs(first.norm() - 1) < 1e-5


def test_wrong_names_files_and_images_are_refused(shrunk, tmp_path):
    with pytest.raises(ValueError, match="did you mean ensemble"):
        dreamsim("ensembel")
    torch.save({"state_dict": peer_tower_state()}, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match="lacks proj"):
        build_tower("clip_vitb16", tmp_path / "clip.pth")
    with pytest.raises(ValueError, match="shape"):
        dreamsim("dino_vitb16").embed(images(1, 64))


def peer_tower_state() -> dict:
    return build_tower("dino_vitb16").state_dict()


class Triplets:
    """Three images a triplet, the left one like the reference, the right one not; the last triplet has a lost image."""

    index = np.array([[0, 1, 2], [3, 4, 5], [0, 4, 6]])
    right_vote = np.array([0.0, 0.0, 1.0])
    ids = np.arange(3)
    is_imagenet = np.array([True, False, True])

    def __init__(self):
        import pandas as pd

        self.table = pd.DataFrame({"split": ["val"] * 3})


class Bytes:
    usable = np.array([True] * 6 + [False])

    def __init__(self, size: int = 64):
        base = (images(7, size) * 255).byte()
        base[1], base[4] = base[0], base[3]
        self.values = base

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        return self.values[torch.as_tensor(rows)]


@needs["lpips"]
def test_lpips_without_its_weights_is_none_and_with_random_ones_a_distance(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert comparators.lpips_distance() is None
    torch.manual_seed(0)
    distance = comparators.lpips_distance(random=True)
    found = comparators.evaluate_pairs(distance, Triplets(), Bytes(), batch_size=2)
    assert found["id"].tolist() == [0, 1] and found["d_left"].abs().max() < 1e-6
    assert (found["d_right"] > 1e-3).all() and found["score"].tolist() == [1, 1]
    assert distance(*images(4, 64).chunk(2)).shape == (2,)


def test_pairs_are_scored_in_the_order_of_the_triplets():
    found = comparators.evaluate_pairs(lambda a, b: (a - b).abs().mean((1, 2, 3)), Triplets(), Bytes(), batch_size=1)
    pixels = Bytes().values.float() / 255
    assert_close(
        torch.tensor(found["d_right"]),
        torch.stack([(pixels[0] - pixels[2]), (pixels[3] - pixels[5])]).abs().mean((1, 2, 3)).double(),
    )
    assert found["d_left"].tolist() == [0, 0]


def test_a_branch_reads_the_class_token_before_the_final_norm():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, num_classes=0, **SMALL).eval()
    x = images(2, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed((x - mean) / std)))
    assert_close(Branch(vit)(x), vit.blocks(tokens)[:, 0], atol=1e-5, rtol=1e-5)
    metric = perceptual.Metric(vit)
    assert_close(DreamSim([Branch(vit)]).embed(x), metric.embed(x), atol=1e-5, rtol=1e-4)


def test_resizing_on_the_device_is_near_pillows():
    from PIL import Image

    y, x = np.mgrid[:96, :96] / 96
    picture = np.stack([255 * x, 255 * y, 127 + 100 * np.sin(9 * x * y)], -1).astype(np.uint8)
    expected = perceptual.preprocess(32)(Image.fromarray(picture))
    found = comparators.resize_on_device(torch.from_numpy(picture).permute(2, 0, 1)[None], 32)
    assert found.shape == expected.shape and (found - expected).abs().max() < 0.02
