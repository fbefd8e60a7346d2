import pytest
import timm
import torch

from thesis_lib import perceptual
from thesis_lib.correspondence import systems
from thesis_lib.correspondence.features import PixelFeatures, ViTFeatures
from thesis_lib.correspondence.systems import SYSTEMS, Part, build, get, is_present, missing


def test_every_published_system_has_a_row():
    named = " ".join(SYSTEMS)
    for part in ("DINO ViT", "DINOv2", "CLIP", "MAE", "SD 1.5", "SD 2.1", "SDXL", "SDXL-Turbo", "Hyperfeatures",
                 "Prompt optimisation", "SD + DINO", "SDXL-Turbo + DINOv2", "DIFT"):  # fmt: skip
        assert part in named, part
    assert get("DIFT (SD 2.1)").parts[0].key == "8@261" and get("DIFT (SD 2.1)").parts[0].options["ensemble"] == 8
    assert len(systems.HYPER_STEPS) == 11 and len(systems.HYPER_LAYERS) == 12
    with pytest.raises(ValueError, match="did you mean"):
        get("SDXL-Trubo")


def test_absent_weights_are_seen_without_the_network():
    absent = missing(SYSTEMS)
    assert "position" not in absent and "DIFT (SD 2.1)" in absent and absent["SD + DINO"]
    with pytest.raises(FileNotFoundError, match="not present: fetch them once"):
        build(get("DIFT (SD 2.1)").parts[0])


def test_a_named_file_counts_as_present(tmp_path):
    part = get("DIFT (SD 2.1)").parts[0]
    assert not is_present(part) and is_present(part, {part.model: tmp_path})


@pytest.mark.parametrize("name", ["position", "colour"])
def test_pixel_systems_are_built(name):
    part = get(name).parts[0]
    extractor = build(part)
    assert isinstance(extractor, PixelFeatures) and part.key in extractor.keys


def test_a_backbone_with_a_mixer_and_a_saved_metric_are_built(tmp_path):
    options = {"mixer": "pool", "mixer_options": {"kernel": 5}, "pretrained": False, "layers": [5]}
    extractor = build(Part("vit", "demo", "5", 64, options))
    assert isinstance(extractor, ViTFeatures) and not extractor.training
    assert extractor.backbone.blocks[0].attn.options["kernel"] == 5
    perceptual.save(perceptual.Metric(extractor.backbone), tmp_path / "m")
    again = build(Part("metric", str(tmp_path / "m"), "5", 64, {"layers": [5]}))
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again(x)["5"], extractor(x)["5"])
    assert not is_present(Part("metric", str(tmp_path / "x"), "5"))


def test_every_vit_of_the_table_is_a_timm_model_of_that_size_and_depth():
    parts = {
        (part.model, part.size): part for system in SYSTEMS.values() for part in system.parts if part.kind == "vit"
    }
    for part in parts.values():
        with torch.device("meta"):
            model = timm.create_model(part.model, num_classes=0)
        assert part.size % model.patch_embed.patch_size[0] == 0
        assert all(layer < len(model.blocks) for layer in part.options["layers"])
