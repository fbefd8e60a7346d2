import pandas as pd
import pytest
import torch
from proposed_models import images, untrained_teacher
from torch.testing import assert_close

from thesis_lib import adaptive_speed, perceptual, proposed_speed
from thesis_lib.closed_form import count_macs
from thesis_lib.layer_plan import DROP, KEEP, Plan
from thesis_lib.perceptual import Metric
from thesis_lib.proposed import planned


@pytest.fixture
def teacher() -> Metric:
    return untrained_teacher()


class Bytes:
    def __getitem__(self, rows):
        return (images(12) * 255).byte()[torch.as_tensor(rows)]


def test_other_number_formats_keep_the_interface(teacher):
    half = proposed_speed.in_format(teacher, "bfloat16")
    assert proposed_speed.in_format(teacher, "float32") is teacher and not half.training
    assert half.embed(images()).dtype == torch.float32 and next(teacher.parameters()).dtype == torch.float32
    assert (half.embed(images()) - teacher.embed(images())).abs().max() < 0.05
    pixels = Bytes()
    found = perceptual.embed_pixels(half, pixels, indices=[3, 1], progress=False)
    assert_close(found, half.embed(pixels[[3, 1]].float() / 255))
    with pytest.raises(ValueError, match="shape"):
        half.embed(images(1, 32))


def test_each_step_costs_less_and_the_last_is_the_plan():
    torch.manual_seed(0)
    plan = Plan(("mha", "pool", "drop", "mha", "drop", "mha"), merge=1)
    made = proposed_speed.steps("demo", plan)
    assert list(made) == ["whole", "mixers", "depth", "halved grid", "class token only"]
    macs = [count_macs(model.embed_unchecked, images(1)) for model in made.values()]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == len(macs)
    assert_close(made["halved grid"].embed(images()), made["class token only"].embed(images()), atol=1e-5, rtol=1e-4)
    assert list(proposed_speed.steps("demo", Plan((KEEP,) * 3))) == ["whole", "class token only"]


def test_a_deeper_model_merges_as_many_tokens_over_more_blocks():
    made = proposed_speed.steps("demo", Plan((KEEP,) * 3), merging=[0, 0.125, 0.25])
    assert list(made)[:2] == ["whole", "merged tokens"]
    assert made["merged tokens"].branches[0].vit.recipe["token_merging"]["r"] == [0, 0, 4, 4, 8, 8]  # of 64 patches
    for metric in made.values():
        assert torch.isfinite(metric.embed(images())).all()


def test_the_yardstick_is_of_the_images_device(teacher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = set()
    monkeypatch.setattr(
        adaptive_speed, "around", lambda run, device, repeats=3: found.add(torch.device(device).type) or (run(), 1e-3)
    )
    models, pictures = {("teacher", "float32"): teacher}, {"teacher": (images(2) * 255).byte()}
    proposed_speed.speed_rows(models, pictures, "teacher", rounds=1)
    assert found == {"cpu"}


def test_speed_rows_compare_each_model_with_the_reference(teacher):
    small = planned(teacher, Plan((KEEP, *(DROP,) * 4, KEEP)))
    pictures = {name: (images(4) * 255).byte() for name in ("teacher", "small")}
    models = {
        (name, dtype): proposed_speed.in_format(model, dtype)
        for name, model in (("teacher", teacher), ("small", small))
        for dtype in ("float32", "bfloat16")
    }
    rows = proposed_speed.speed_rows(models, pictures, "teacher", rounds=3, device="cpu")
    frame = pd.DataFrame(rows).set_index(["metric", "model", "dtype"]).sort_index()
    assert len(frame) == 8 and (frame.loc[("speedup", "teacher"), "value"] == 1).all()
    assert (frame["batch"] == 4).all() and (frame["device"] == "cpu").all()
    assert (frame["low"] <= frame["value"]).all() and set(frame.loc["batch_time", "unit"]) == {"ms"}
