import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from thesis_lib import plots, results
from thesis_lib.items import attention_transfer as items

PROTOCOL = {"dataset": "ImageNet-100", "backbone": "demo", "image_size": 32, "split": "test", "seed": 0}
MAIN = {
    "scratch": 0.10,
    "finetuned": 0.60,
    "copy": 0.35,
    "distill": 0.30,
    "ensemble-logits": 0.62,
    "ensemble-probabilities": 0.61,
}
N = 100


def accuracy(stage, value, part="main", mixer="mha", metric="accuracy", **more):
    ends = {"low": value - 0.08, "high": value + 0.08}
    row = {"metric": metric, "value": value, "unit": "1", "n": N, "stage": stage, "part": part, "mixer": mixer}
    return PROTOCOL | row | ends | more


@pytest.fixture(scope="module")
def written():
    rows = [accuracy(stage, value) for stage, value in MAIN.items()]
    for count, value in ((0, 0.10), (2, 0.18), (4, 0.27), (6, 0.35)):
        rows.append(accuracy("copy", value, "sweep-layers", transferred=count))
    for count, value in ((1, 0.21), (4, 0.35)):
        rows.append(accuracy("copy", value, "sweep-heads", transferred=count))
    rows.append(accuracy("averaged over examples", 0.15, "controls"))
    for mixer, base in (("sra", 0.12), ("performer", 0.11)):
        for stage, gain, gap in (("scratch", 0, 0.8), ("distill", 0.1, 0.1)):
            rows.append(accuracy(stage, base + gain, "mixers", mixer))
            rows.append(PROTOCOL | {"metric": "attention_gap", "value": gap, "unit": "nat", "n": 32, "stage": stage,
                                    "part": "mixers", "mixer": mixer, "split": "validation"})  # fmt: skip
        for i, stage in enumerate(items.OBJECTIVES):
            rows.append(accuracy(stage, base + 0.5 + 0.05 * i, "perceptual", mixer, metric="2afc", dataset="NIGHTS"))
    for stage in ("scratch", "finetuned", "copy", "distill"):
        about = PROTOCOL | {"stage": stage, "part": "main", "mixer": "mha", "split": "train", "n": 1}
        rows.append(about | {"metric": "seconds", "value": 12.345, "unit": "s"})
        rows.append(about | {"metric": "params", "value": 1.02e6 if stage == "copy" else 1.22e6, "unit": "1"})
    results.write(rows, items.NOTEBOOK, profile="transfer-items")
    right = {stage: np.arange(N) < round(N * value) for stage, value in MAIN.items()}
    images = pd.DataFrame(right).rename_axis("id").reset_index().melt("id", var_name="stage", value_name="correct")
    results.write_table(images, f"{items.NOTEBOOK}.images", profile="transfer-items")
    results.write_table(pd.DataFrame({"id": np.arange(9)}), f"{items.NOTEBOOK}.triplets", profile="transfer-items")
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    looks = [
        {"image": i, "png": buffer.getvalue(), "run": run, "layer": layer, "map": rng.random(16).tolist()}
        for i in range(2)
        for run in ("teacher", "distill")
        for layer in range(3)
    ]
    results.write_table(pd.DataFrame(looks), f"{items.NOTEBOOK}.maps", profile="transfer-items")
    plots.set_theme()
    yield items.make("transfer-items")
    plt.close("all")


def test_every_item_has_a_caption_and_latex(written):
    tables, figures, _ = written
    assert set(tables) | set(figures) == set(items.CAPTIONS)
    for name, table in tables.items():
        text = table.latex(name)
        assert text.count(r"\begin{tabular}") == 1 and "nan" not in text.lower()


def test_the_main_table_says_what_the_rows_say(written):
    frame = written[0]["attention_transfer"].frame.set_index("Run")
    assert list(frame.index[:2]) == ["Scratch", "Fine-tuned teacher"]
    assert frame.index[-1] == "Copy, averaged over examples"
    assert frame.loc["Attention copy", "Top-1 (%)"] == 35.0
    assert frame.loc["Attention copy", "95 % CI"] == "[27.0, 43.0]"
    assert frame.loc["Attention copy", "Points"] == 25.0 and frame.loc["Attention copy", "p"] == "< 0.001"
    assert np.isnan(frame.loc["Scratch", "Points"]) and frame.loc["Scratch", "p"] == ""
    assert frame.loc["Attention copy", "Params (M)"] == 1.02 and frame.loc["Scratch", "Time (s)"] == 12.3
    assert np.isnan(frame.loc["Ensemble, mean logits", "Time (s)"])
    assert not set(items.PUBLISHED["Top-1 (%)"]) & set(frame["Top-1 (%)"])  # quoted figures stand apart


def test_mixers_stand_in_display_order_with_their_gaps(written):
    tables, _, found = written
    frame = tables["attention_transfer_mixers"].frame
    assert list(frame["", "Mixer"]) == ["SRA", "Performer"]
    assert list(frame["Attention distillation", "%"]) == [22.0, 21.0]
    assert list(frame["Attention distillation", "gap"]) == [0.1, 0.1]
    judged = tables["attention_transfer_2afc"].frame
    assert list(judged.columns.get_level_values(0).unique()) == ["", "Zero-shot", "Embedding", "Attention", "Both"]
    assert judged["Both", "%"].tolist() == [77.0, 76.0]
    assert found["AttentionSraBothTwoafc"] == "77.0"


def test_numbers(written):
    found = written[2]
    assert found["AttentionCopy"] == "35.0" and found["AttentionCopyInterval"] == "[27.0, 43.0]"
    assert found["AttentionCopyPoints"] == "+25.0" and found["AttentionCopyShare"] == "50"
    low, high = map(float, found["AttentionCopyShareInterval"].strip("[]").split(", "))
    assert 0 < low < 50 < high < 100
    assert found["AttentionTransferN"] == "100" and found["AttentionTransferTriplets"] == "9"
    assert all(name.isalpha() for name in found)


def test_the_figures_show_what_was_measured(written):
    _, figures, _ = written
    left, right = figures["attention_transfer_parts"].axes
    assert left.lines[0].get_xdata().tolist() == [0, 2, 4, 6] and left.lines[0].get_ydata()[-1] == 35.0
    assert right.lines[0].get_xdata().tolist() == [1, 4]
    maps = figures["attention_transfer_maps"]
    assert [ax.get_title(loc="center") for ax in maps.axes[:3]] == ["image", "Teacher", "Attention\ndistillation"]
    assert maps.axes[1].images[1].get_array().shape == (4, 4) and maps.axes[1].images[1].get_array().max() == 1


def test_missing_parts_name_the_notebook():
    rows = pd.DataFrame([accuracy("scratch", 0.1)])
    with pytest.raises(ValueError, match="part 'mixers'.*05_attention_transfer"):
        items.mixers(rows)
