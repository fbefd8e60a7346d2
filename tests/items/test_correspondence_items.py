"""Tables and figures of the correspondence study from rows made up here."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from thesis_lib import results
from thesis_lib.items import correspondence as items

MODELS = {  # model: (stage, mixer, PCK on test, moved, layout)
    "position": ("system", None, 0.02, 0.01, 0.95),
    "DIFT (SD 2.1)": ("system", None, None, None, None),
    "mha, zero-shot": ("zero-shot", "mha", 0.11, 0.2, 0.3),
    "pool, zero-shot": ("zero-shot", "pool", 0.05, 0.1, 0.2),
    "pool, distilled": ("distilled", "pool", 0.06, 0.12, 0.22),
    "teacher": ("teacher", None, 0.3, 0.4, 0.5),
    "supervised": ("trained", "mha", 0.28, 0.38, 0.48),
}


def made_rows() -> pd.DataFrame:
    shared = {
        "metric": "pck",
        "unit": "1",
        "n": 50,
        "dataset": "SPair-71k",
        "profile": "t",
        "points": 300,
        "skipped": 2,
    }
    rows = []
    for model, (stage, mixer, *values) in MODELS.items():
        for split, value in zip(("test", "moved", "layout"), values, strict=True):
            one = shared | {"model": model, "stage": stage, "mixer": mixer, "split": split}
            if value is None:
                rows.append(one | {"value": None, "note": "weights not present"})
                break
            for alpha in (0.05, 0.1):
                for evaluator in ("DIFT per point", "DIFT per image"):
                    ends = {"value": value * alpha * 10, "low": value * alpha * 9, "high": value * alpha * 11}
                    rows.append(one | ends | {"alpha": alpha, "evaluator": evaluator, "group": "all", "level": "all"})
            if split == "test":
                levels = [("viewpoint", "0"), ("viewpoint", "2"), ("scale", "1"), ("category", "star")]
                rows += [one | {"value": value, "alpha": 0.1, "evaluator": "DIFT per point", "group": g, "level": v}
                         for g, v in levels]  # fmt: skip
    evaluator = shared | {
        "model": "demo",
        "stage": "evaluator",
        "split": "test",
        "mixer": "mha",
        "alpha": 0.1,
        "group": "all",
    }
    for name, readout, value in (("SD+DINO", "patch", 0.1), ("DIFT per point", "soft", 0.2)):
        ends = {"value": value, "low": value, "high": value}
        rows.append(evaluator | ends | {"evaluator": name, "readout": readout, "level": "all"})
    for layer in (0, 1):
        for column in ("token", "key"):
            sweep = {"stage": "sweep", "split": "val", "layer": layer, "column": column, "value": 0.1 + layer / 10}
            rows.append(shared | sweep | {"model": "demo"})
    for epoch, value in ((1, 0.2), (2, 0.3), (3, 0.25)):
        rows.append(
            shared | {"metric": "val pck", "model": "supervised", "stage": "trained", "epoch": epoch, "value": value}
        )
    return pd.DataFrame(rows)


def made_points() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = []
    for model in MODELS:
        if MODELS[model][2] is not None:
            one = pd.DataFrame({"distance": rng.uniform(0, 40, 60), "box": 50.0, "category": ["star", "disc"] * 30})
            parts.append(one.assign(model=model, dataset="SPair-71k", split="test"))
    return pd.concat(parts, ignore_index=True)


def made_gallery() -> pd.DataFrame:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "grey").save(buffer, "PNG")
    arrays = {"heat": np.zeros((30, 40), np.float16), "source_components": np.ones((3, 4, 4), np.float16)}
    arrays["target_components"] = arrays["source_components"]
    packed = {name: a.tobytes() for name, a in arrays.items()} | {
        f"{n}_shape": list(a.shape) for n, a in arrays.items()
    }
    rows = []
    for pair in (0, 1):
        for model in ("mha, zero-shot", "teacher"):
            for i in range(3):
                row = {"pair": pair, "category": "star", "model": model, "keypoint": str(i), "source_x": 5.0 * i}
                row |= {"source_y": 4.0, "x": 6.0, "y": 7.0, "true_x": 9.0, "true_y": 7.0, "distance": 3.0, "box": 20.0}
                first = i == 0 and model == "mha, zero-shot"
                pictures = {"source": buffer.getvalue(), "target": buffer.getvalue()} | packed
                rows.append(row | (pictures if first else {}))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("thesis_lib.paths.RESULTS", tmp_path_factory.mktemp("results"))
    results.write(made_rows(), items.NOTEBOOK, profile="t")
    results.write_table(made_points(), f"{items.NOTEBOOK}.points", profile="t")
    results.write_table(made_gallery(), f"{items.NOTEBOOK}.gallery", profile="t")
    yield items.make("t")
    patch.undo()
    plt.close("all")


def test_every_item_has_a_caption(made):
    tables, figures, _ = made
    assert tables.keys() | figures.keys() == items.CAPTIONS.keys()


def test_absent_systems_are_marked_and_have_no_number(made):
    frame = made[0]["correspondence_systems"].frame.set_index(("", "System"))
    assert frame.loc["DIFT (SD 2.1)", ("", "Weights")] == "no"
    assert np.isnan(frame.loc["DIFT (SD 2.1)", ("PCK@0.1", "%")]) and frame.loc["position", ("PCK@0.1", "%")] == 2.0
    assert frame.loc["position", ("PCK@0.1", "95 % CI")] == "[1.8, 2.2]"
    assert "weights not present" in made[0]["correspondence_systems"].latex("test")


def test_mixers_stand_in_order_with_their_stages(made):
    frame = made[0]["correspondence_mixers"].frame
    assert list(zip(frame["", "Mixer"], frame["", "Stage"], strict=True)) == [
        ("MHA", "zero-shot"), ("Pool", "zero-shot"), ("Pool", "distilled from one token")
    ]  # fmt: skip
    assert frame["Moved", "%"].tolist() == [20.0, 10.0, 12.0]


def test_training_names_the_epoch_that_was_kept(made):
    frame = made[0]["correspondence_training"].frame.set_index(("", "Model"))
    assert frame.loc["supervised", ("", "Epoch")] == "2 of 3" and frame.loc["teacher", ("", "Epoch")] == ""


def test_quoted_numbers_stand_alone(made):
    quoted = made[0]["correspondence_published"]
    assert "not measured here" in quoted.note and 59.8 in quoted.frame["PCK@0.1 (%)"].tolist()
    assert not any("59.8" in table.latex("x") for name, table in made[0].items() if name != "correspondence_published")


def test_factors_and_evaluators(made):
    factors = made[0]["correspondence_factors"].frame
    assert factors["Factor"].tolist() == ["Viewpoint", "Viewpoint", "Scale"] and factors["Pairs"].tolist() == [50] * 3
    assert made[0]["correspondence_evaluators"].frame["Read-out"].tolist() == ["patch centre", "soft-argmax"]


def test_numbers_are_macros_of_what_was_measured(made):
    found = made[2]
    assert found["PckPairs"] == "50" and found["PckMovedPoolDistilled"] == "12.0 %"
    assert all(name.isalpha() for name in found) and not any("Dift" in name for name in found)


def test_failures_are_ordered_and_figures_have_axes(made):
    for name, figure in made[1].items():
        assert figure.axes, name
    labels = [t.get_text() for t in made[1]["correspondence_failures"].axes[0].get_yticklabels()]
    missed = made_points().assign(missed=lambda t: t["distance"] > 5)
    part = missed[missed["model"].isin(["mha, zero-shot", "teacher"])].groupby("category")["missed"].mean()
    assert labels == list(part.sort_values(ascending=False).index)


def test_without_rows_the_notebook_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("thesis_lib.paths.RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="notebooks/08_semantic_correspondence.ipynb makes it"):
        items.make("t")
    with pytest.raises(ValueError, match="run notebook 08"):
        items.scores(made_rows(), split="none")


def test_long_names_of_students_are_short_in_figures():
    run = "supervised-vit_base_patch14_reg4_dinov2.lvd142m-upsampler-cross_entropy"
    assert items._short(run) == "supervised-ViT-B/14-upsampler-CE"
    assert [items._short(name) for name in ("mha, zero-shot", "sra, lora", "teacher")] == ["MHA", "SRA LoRA", "teacher"]
