import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from halting_models import halting_vit
from PIL import Image

from thesis_lib.adaptive_tokens import AdaptiveViT, Halting
from thesis_lib.adaptive_training import normalised
from thesis_lib.explorer import SIDE
from thesis_lib.halting_explorer import depth_overlay, halting_slider, halting_table

PIXELS = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLASSES = [f"class {i}" for i in range(7)]
LABELS = [0, 1, 2, 3, 4]


@pytest.fixture
def model():
    return AdaptiveViT(halting_vit(), Halting(0.5, -1.0))


def test_one_row_an_image(model):
    table = halting_table(model, PIXELS, LABELS, CLASSES, [3, 0])
    assert table["index"].tolist() == [3, 0] and table["true"].tolist() == ["class 3", "class 0"]
    trace = model.run(normalised(model, PIXELS[[3, 0]]))
    assert table["depth"].tolist() == trace.depth[:, 1:].tolist()
    assert table["cls_depth"].tolist() == trace.depth[:, 0].tolist()
    expected = [CLASSES[i] for i in model.classify(trace.features).argmax(-1)]
    assert table["predicted"].tolist() == expected
    picture = np.asarray(Image.open(io.BytesIO(table["picture"][0])))
    assert (picture == PIXELS[3].permute(1, 2, 0).numpy()).all()
    assert (table["rows"] * table["columns"] == 16).all() and (table["layers"] == 5).all()


@pytest.mark.parametrize("wrong", [5, -1, 109])
def test_an_index_outside_the_set(model, wrong):
    with pytest.raises(ValueError, match=rf"\[{wrong}\] are outside the set, which has images 0 to 4"):
        halting_table(model, PIXELS, LABELS, CLASSES, [0, wrong])


@pytest.mark.parametrize(("constant", "fewer"), [("beta", 9.0), ("eps", 0.95)])
def test_the_slider_moves_the_constant_and_leaves_the_model_alone(model, constant, fewer):
    before = model.halting
    box = halting_slider(model, PIXELS, labels=LABELS, classes=CLASSES, constant=constant)
    (image, value), shown = box.children[0].children, box.children[1]
    assert value.value == getattr(before, constant) and "class 0, taken for" in shown.value
    first = shown.value
    value.value = fewer
    assert model.halting == before and shown.value != first
    share = [int(text.split(" % of the tokens")[0].rsplit(">", 1)[1]) for text in (first, shown.value)]
    assert share[1] < share[0]
    model.halting = replace(before, **{constant: fewer})
    tokens = model.run(normalised(model, PIXELS[:1])).tokens
    assert share[1] == round(100 * tokens.float().mean().item() / 17)
    image.value = 4
    assert "class 4, taken for" in shown.value


def test_a_slider_without_names_and_of_another_constant(model):
    assert "the image" in halting_slider(model, PIXELS).children[1].value
    with pytest.raises(ValueError, match="did you mean beta"):
        halting_slider(model, PIXELS, constant="bet")


def test_the_overlay_keeps_one_scale():
    picture = Image.new("RGB", (32, 32), (128, 128, 128))
    early, late = (np.asarray(depth_overlay(picture, np.full((4, 4), depth), 5)).mean() for depth in (1, 5))
    assert early < late
    mixed = np.full((4, 4), 1)
    mixed[0, 0] = 5
    image = np.asarray(depth_overlay(picture, mixed, 5))
    assert image.shape == (SIDE, SIDE, 3) and image[: SIDE // 4, : SIDE // 4].mean() == pytest.approx(late, abs=1)
