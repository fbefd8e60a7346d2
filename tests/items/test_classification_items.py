"""Tables, figures and answers of the classification study from made-up rows of known values."""

import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from thesis_lib import plots, results
from thesis_lib.items import classification as items
from thesis_lib.items.classification_answers import answers

SKILL = {"mha": 0.8, "pool": 0.5, "performer": 0.9, "hybrid": 0.7}
LATENCY = {"mha": 4.0, "pool": 2.0, "performer": 3.0, "hybrid": 9.0}
N = 400


def study(mixers=tuple(SKILL)):
    """Rows and single images of two data sets, two runs each, as notebook 07 writes them."""
    rng, rows, images = np.random.default_rng(0), [], []
    for dataset in ("CIFAR-10", "ImageNet-100"):
        ease = rng.random(N)
        for mixer in mixers:
            common = {"dataset": dataset, "mixer": mixer, "device": "cpu", "unit": "1", "n": N}
            for seed in (0, 1):
                run = common | {"seed": seed, "stage": "run"}
                right = ease < SKILL[mixer] + 0.05 * (seed - 0.5)
                columns = {"image": np.arange(N), "label": np.arange(N) % 10, "top1": right}
                images.append(pd.DataFrame(columns).assign(dataset=dataset, mixer=mixer, seed=seed))
                rows.append(run | {"metric": "top1", "split": "test", "value": right.mean(), "epoch": None})
                for metric, split in (("loss", "train"), ("loss", "val"), ("top1", "val")):
                    rows += [run | {"metric": metric, "split": split, "value": 0.3 * e, "epoch": e} for e in (1, 2)]
                rows += [run | {"metric": "training_throughput", "value": 1000 / LATENCY[mixer]}]
                rows += [run | {"metric": "seconds_per_epoch", "value": LATENCY[mixer]}]
            for metric in ("top1", "top5", "macro_f1"):
                value = SKILL[mixer] + (0.1 if metric == "top5" else 0)
                score = {"metric": metric, "value": value, "low": value - 0.04, "high": value + 0.04, "runs": 2}
                rows.append(common | score | {"stage": "mean", "split": "test"})
            cost = {"params": 119_194, "macs": 9e6 * LATENCY[mixer], "weights_size": 0.48, "training_memory": 54.0}
            cost |= {"throughput": 800.0, "latency": LATENCY[mixer], "peak_memory": 0.15}
            about = {"seed": 0, "stage": "run", "mean": LATENCY[mixer] + 0.1, "std": 0.25, "batch": 64}
            rows += [common | about | {"metric": metric, "value": value} for metric, value in cost.items()]
            for layer in (1, 2):
                looks = {"attention_distance": LATENCY[mixer], "attention_entropy": 0.9 - 0.1 * LATENCY[mixer]}
                looks |= {} if mixer == "pool" else {"head_similarity": 0.1 * LATENCY[mixer]}
                pattern = common | {"stage": "patterns", "seed": 0, "layer": layer}
                rows += [pattern | {"metric": metric, "value": value} for metric, value in looks.items()]
    for mixer in mixers:
        for tokens in (64, 1024):
            growth = (tokens / 64) ** (2 if mixer == "mha" else 1)
            for metric in ("macs", "latency", "peak_memory"):
                one = {"metric": metric, "value": LATENCY[mixer] * growth, "unit": "1", "n": 3, "mixer": mixer}
                rows.append(one | {"stage": "scaling", "tokens": tokens})
    return pd.DataFrame(rows), pd.concat(images, ignore_index=True)


def pictures():
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    lines = [
        {"dataset": "CIFAR-10", "mixer": mixer, "image": i, "label": "red and blue", "picture": file.getvalue(),
         "layer": layer, "head": head, "weights": [float(layer), 1.0, 2.0, float(head)]}
        for mixer in SKILL for i in (0, 1) for layer in (0, 1, 2) for head in ((0,) if layer == 0 else (0, 1, 2))
    ]  # fmt: skip
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.paths, "RESULTS", tmp_path_factory.mktemp("results"))
        rows, images = study()
        results.write(rows, items.NOTEBOOK, profile="made-up")
        results.write_table(images, f"{items.NOTEBOOK}.images", profile="made-up")
        results.write_table(pictures(), f"{items.NOTEBOOK}.maps", profile="made-up")
        samples = pictures()[["dataset", "label", "picture"]].head(12)
        results.write_table(samples, f"{items.NOTEBOOK}.samples", profile="made-up")
        plots.set_theme()
        yield "made-up"


@pytest.fixture(scope="module")
def made(profile):
    yield items.make(profile)
    plt.close("all")


def test_make_gives_every_captioned_item(made):
    tables, figures, numbers = made
    assert set(tables) | set(figures) == set(items.CAPTIONS)
    for stem, table in tables.items():
        text = table.latex("notebook 07")
        assert text.count(r"\\") > 8 and "nan" not in text.lower(), stem
    for stem, figure in figures.items():
        figure.draw_without_rendering()
        assert figure.get_figwidth() <= plots.TEXTWIDTH and figure.get_figheight() < 8, stem
    assert numbers["ClassificationCifarOneZeroPerformer"] == "90.0 %"
    assert numbers["ClassificationImagenetOneZeroZeroMhaInterval"] == "[76.0, 84.0]"
    assert numbers["ClassificationCifarOneZeroN"] == str(N)


def test_the_accuracy_table_compares_on_the_same_images(made):
    frame = made[0]["classification_accuracy"].frame
    assert frame["", "Mixer"].tolist() == ["MHA", "Pool", "Performer", "Hybrid"] * 2
    _, images = study()
    top1 = images[images["dataset"] == "CIFAR-10"].groupby("mixer")["top1"].mean()
    gap = frame["Against MHA", "pts"]
    assert np.isnan(gap[0]) and gap[1] == pytest.approx(100 * (top1["pool"] - top1["mha"]), abs=0.05)
    assert frame["Against MHA", "p"][1] == "< 0.001" and frame["Top-1", "95 % CI"][0] == "[76.0, 84.0]"
    low, high = map(float, frame["Top-1", "runs"][0].split("–"))
    assert low < 100 * top1["mha"] < high


def test_the_cost_table_shows_units_people_read(made):
    frame = made[0]["classification_costs"].frame
    assert frame["Params", "k"][0] == 119 and frame["MAC", "M"][1] == 18 and frame["Training", "images/s"][1] == 500
    assert frame["Latency (ms)", "mean ± std"][0] == "4.10 ± 0.25"


def test_figures_show_what_the_rows_say(profile):
    rows = results.read(items.NOTEBOOK, profile=profile)
    memory = items.scaling(rows).axes[1].lines[0]
    assert memory.get_xdata().tolist() == [64, 1024] and memory.get_ydata()[1] == 4 * 256
    curve = items.curves(rows).axes[1].lines[0]
    assert curve.get_ydata().tolist() == [30, 60]
    gallery = items.attention_gallery(pictures())
    titles = [ax.get_title(loc="center") for ax in gallery.axes[:4]]
    assert titles == ["picture", "layer 1", "layer 2", "rollout"] and len(gallery.axes) == 16
    assert gallery.axes[2].images[0].get_array().tolist() == [[2, 1], [2, 0]]
    heads = items.head_gallery(pictures(), "mha")
    assert len(heads.axes) == 4 and heads.axes[3].images[0].get_array().tolist() == [[2, 1], [2, 2]]


def test_the_five_answers_name_what_the_rows_show():
    text = answers(*study())
    first, second, third, fourth, fifth = text.split("\n\n")
    assert "Best is Performer with 90.0 % [86.0, 94.0], worst Pool" in first and "chance is 10 %" in first
    assert "at least 36 points above it" in first and "Pool trains fastest, at 2.0 times MHA's images" in first
    assert "From 64 to 1024 patches latency grows 260-fold for MHA and 16-fold" in second
    assert "Pool takes 0.031 of MHA's time" in second and "faster than MHA: Pool, Performer" in second
    assert (
        "Pool looks least far (2.0" in third
        and "Hybrid farthest (9.0)" in third
        and "MHA: 4.0, 0.50 and 0.40." in third
    )
    assert "worse against Performer (−22.5 points [" in fourth
    assert "Performer answers soonest: 3.00 ms" in fifth


def test_what_is_missing_is_said():
    rows, images = study(("mha", "pool"))
    assert "Not asked" in answers(rows, images)
    with pytest.raises(ValueError, match="no run of mha on CIFAR-10 to compare with"):
        items.against(images[images["mixer"] != "mha"], "CIFAR-10", "pool")
    with pytest.raises(ValueError, match="run notebook 07_image_classification first"):
        items.scores(rows[rows["stage"] != "mean"])


def test_no_torch_is_needed():
    code = "import sys; import thesis_lib.items.classification_answers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
