import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from thesis_lib import results
from thesis_lib.items import adaptive_tokens as items

WHERE = {"backbone": "demo", "image_size": 64, "device": "cpu", "dtype": "float32", "seed": 0, "threads": 2}
TOKENS = {"baseline": 1.0, "adaptive": 0.62, "finetuned": 0.58}
TIMES = {"dense": 60.0, "masked": 72.0, "removing": 40.0}


def row(metric, value, **columns):
    ends = {"low": value - 0.05, "high": value + 0.05} if metric in ("accuracy", "2afc") else {}
    return WHERE | {"metric": metric, "value": value, "unit": "1", "n": 150} | ends | columns


@pytest.fixture
def rows():
    found = []
    for i, (model, share) in enumerate(TOKENS.items()):
        common = {"model": model, "split": "test", "stage": "classifier", "dataset": "ImageNet-100"}
        for metric, value in (("accuracy", 0.6 + 0.05 * i), ("accuracy_macro", 0.58), ("f1_macro", 0.57)):
            found.append(row(metric, value, **common) | {"low": value - 0.06, "high": value + 0.06})
        found += [row("tokens", share, **common), row("depth", 6 * share, **common)]
        found.append(row("macs_executed", 84.7e6 * share, **common))
        found += [row("tokens_layer", share ** (layer / 3), layer=layer, **common) for layer in range(1, 7)]
        for batch in () if model == "baseline" else (1, 32):
            for engine, time in TIMES.items():
                columns = {"engine": engine, "batch": batch, "model": model, "stage": "classifier"}
                found.append(row("batch_time", time * batch / 32 + i * (engine == "removing"), **columns))
    for share in (0.4, 0.65, 0.9):
        for engine, lost in (("dense", 0.9), ("masked", 1.1), ("ideal", 1.0)):
            value = lost / share
            found.append(
                row("speedup", value, share=share, engine=engine, batch=32) | {"low": value - 0.1, "high": value + 0.1}
            )
    for mixer, stage, value in (("adaptive", "distilled", 0.88), ("tome", "zero-shot", 0.86)):
        found.append(row("2afc", value, mixer=mixer, stage=stage, split="test", feature="cls", normalize=True))
        found.append(row("macs", 50e6, mixer=mixer))
    found += [row("batch_time", 40.0, mixer=m, stage="metric", batch=32) for m in ("mha", "pool", "tome", "adaptive")]
    found.append(row("tokens", 0.6, model="metric", split="test"))
    return pd.DataFrame(found)


@pytest.fixture
def others():
    found = [row("macs", 84.7e6, mixer="mha"), row("macs", 60e6, mixer="pool")]
    for mixer, stage, value in (("mha", "zero-shot", 0.87), ("mha", "lora", 0.9), ("mha", "teacher-lora", 0.95)):
        found.append(row("2afc", value, mixer=mixer, stage=stage, split="test", feature="cls", normalize=True))
    found.append(row("2afc", 0.99, mixer="mha", stage="lora", split="test", feature="cls_norm", normalize=True))
    found.append(row("2afc", 0.7, mixer="pool", stage="distilled", split="test", feature="cls", normalize=True))
    found.append(row("2afc", 0.7, mixer="sra", stage="lora", split="test", feature="cls", normalize=True))
    return pd.DataFrame(found)


@pytest.fixture
def images():
    rng, records = np.random.default_rng(0), []
    for index, (true, predicted) in {22: ("plain disc", "plain disc"), 109: ("striped star", "dotted star")}.items():
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        depth = rng.integers(1, 7, 64).tolist()
        records.append(
            {"index": index, "picture": buffer.getvalue(), "true": true, "predicted": predicted, "depth": depth}
        )
    return pd.DataFrame(records).assign(rows=8, columns=8, cls_depth=6, layers=6)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_the_models_table(rows):
    table = items.models(rows)
    frame = table.frame
    assert frame["", "Model"].tolist() == ["ViT", "A-ViT", "Tuned"]
    assert frame["Accuracy", "%"].tolist() == pytest.approx([60, 65, 70])
    assert frame["Accuracy", "95 % CI"][0] == "[54.0, 66.0]"
    assert frame["Tokens", "%"].tolist() == pytest.approx([100, 62, 58])
    assert frame["Cost", "ms"].tolist() == pytest.approx([60 / 32, 41 / 32, 42 / 32])  # dense, removing, removing
    assert frame["Cost", "MMAC"][2] == pytest.approx(84.7 * 0.58)
    assert "n = 150" in table.note and "tabular" in table.latex("test")


def test_the_engines_table(rows):
    table = items.engines(rows)
    frame = table.frame
    assert frame["Batch"].tolist() == ["1"] * 3 + ["32"] * 3
    last = frame[(frame["Batch"] == "32") & (frame["Form"] == "removing tokens")].iloc[0]
    assert last["× dense"] == pytest.approx(60 / 42) and last["× masked"] == pytest.approx(72 / 42)
    assert last["images/s"] == pytest.approx(32e3 / 42)
    assert "58 % of tokens" in table.note and "tabular" in table.latex("test")


def test_the_metric_table_takes_each_at_its_last_stage(rows, others):
    frame = items.metrics(pd.concat([rows, others], ignore_index=True)).frame
    assert frame["", "Model"].tolist() == ["MHA", "Pool", "Adaptive tokens", "Token merging"]  # SRA was not timed
    assert frame["", "Stage"].tolist() == ["LoRA-tuned", "Distilled", "Distilled", "Zero-shot"]
    assert frame["2AFC", "%"].tolist() == pytest.approx([90, 70, 88, 86])
    assert frame["Cost", "MMAC"].tolist() == pytest.approx([84.7, 60, 50, 50])
    assert len(items.metrics(rows).frame) == 2  # the mixers' notebooks have not run


def test_the_speedup_figure(rows):
    ax = items.speedup(rows)
    assert len(ax.lines) == 4 and {text.get_text() for text in ax.texts} == {
        "ideal",
        "over dense ViT",
        "over masked",
    }
    ideal = next(line for line in ax.lines if line.get_linestyle() == "--")
    assert sorted(ideal.get_xdata()) == pytest.approx([40, 65, 90])


def test_the_layers_figure(rows):
    ax = items.layers(rows)
    assert {text.get_text() for text in ax.texts} == set(items.MODELS.values())
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([100] * 6)


def test_the_gallery_has_one_row_an_image(images):
    figure = items.gallery(images)
    axes = figure.axes[:-1]  # the last is the colour bar
    assert len(axes) == 10
    kept = np.kron(np.reshape(images["depth"][0], (8, 8)), np.ones((8, 8))) == 6
    assert (axes[3].images[0].get_array() == kept).all()
    masked = axes[4].images[0].get_array()
    assert (masked[~kept] == 235).all() and (masked[kept] == axes[0].images[0].get_array()[kept]).all()
    assert [axes[i].get_ylabel() for i in (0, 5)] == ["plain disc\n✓ plain disc", "striped star\n✗ dotted star"]


def test_make_reads_what_the_notebook_wrote(rows, others, images, tmp_path, monkeypatch):
    monkeypatch.setattr(results.paths, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="06_adaptive_tokens"):
        items.make("demo")
    results.write(rows, items.NOTEBOOK, profile="demo")
    results.write_table(images, f"{items.NOTEBOOK}.images", profile="demo")
    results.write(others, "02_attention_evaluation-mha", profile="demo")
    tables, figures, numbers = items.make("demo")
    assert set(tables) | set(figures) == set(items.CAPTIONS)
    assert len(tables["adaptive_metric"].frame) == 4
    assert numbers["AdaptiveSpeedupDense"] == "1.43" and numbers["AdaptiveFinetunedTokens"] == "58"
    assert numbers["AdaptiveTwoafc"].startswith("88.0 [83.0")


def test_missing_rows_name_the_notebook(rows):
    with pytest.raises(ValueError, match="06_adaptive_tokens"):
        items.speedup(rows[rows["metric"] != "speedup"])


def test_torch_is_not_imported():
    code = "import sys, thesis_lib.items.adaptive_tokens; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
