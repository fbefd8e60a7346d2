import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from thesis_lib import results
from thesis_lib.items import proposed as items
from thesis_lib.items import proposed_figures as figures
from thesis_lib.latex import interval

WHERE = {"backbone": "demo", "image_size": 64, "device": "cpu", "seed": 0, "threads": 2, "dataset": "NIGHTS"}
PLANS = {"M-M-MM": (0.9, 3.0), "M-/M--M": (0.885, 1.5), "--P-M-": (0.7, 1.0)}
CHOSEN = "M-/M--M"
VITS = ("vit_small_patch16_224.dino", "vit_base_patch16_224.dino")


def row(metric, value, **columns):
    ends = {"low": value - 0.05, "high": value + 0.05} if metric in ("2afc", "share_of_teacher") else {}
    return WHERE | {"metric": metric, "value": value, "unit": "1", "n": 200, "dtype": "float32"} | ends | columns


@pytest.fixture
def rows():
    found = [row("within", 0.02, stage="rule")]
    for layer in range(6):
        for action in ("pool", "identity", "drop", *(["halve"] if 0 < layer < 5 else [])):
            found.append(row("embedding_distance", 0.1 * (layer + 1), layer=layer, action=action, stage="sensitivity"))
            found.append(row("2afc_loss", 0.01 * layer - 0.02, layer=layer, action=action, stage="sensitivity"))
    for stage in ("front", "budget"):
        for plan, (_, spent) in PLANS.items():
            found.append(row("predicted_time", spent, model=plan, stage=stage, unit="ms"))
            found.append(row("predicted_loss", 2 / spent, model=plan, stage=stage))
    candidates = {"teacher": (0.9, 6.0), "pool-distilled": (0.78, 4.5), "ToMe": (0.86, 5.0)} | PLANS
    for model, (score, spent) in candidates.items():
        for dtype, factor in (("float32", 1.0), ("bfloat16", 1.3)):
            own = {"model": model, "dtype": dtype, "stage": "candidates"}
            found.append(row("2afc", score, split="val", **own))
            found.append(row("batch_time", 64 * spent * factor, batch=64, **own))
            taken = (model, dtype) == (CHOSEN, "float32")
            found += [row(metric, 1e7 * spent, chosen=taken, **own) for metric in ("macs", "params")]
    for model, score in (("proposed", 0.89), ("teacher", 0.91)):
        found.append(row("2afc", score, model=model, split="test", stage="test"))
        found.append(row("2afc", score - 0.3, model=model, split="test_imagenet", stage="test"))
    for metric, value in (("share_of_teacher", 0.978), ("difference", -0.02), ("p_value", 0.0004)):
        found.append(row(metric, value, model="proposed", split="test", stage="test"))
    found.append(absent())
    own = {"ensemble": 400.0, "proposed": 0.8, "teacher": 3.0, "PSNR": 0.2, "LPIPS": 30.0}
    for model, spent in own.items():
        for dtype in ("float32", "bfloat16") if model in ("ensemble", "proposed", "teacher") else ("float32",):
            where = {"model": model, "dtype": dtype, "stage": "own scale", "batch": 4}
            found += [row("batch_time", 4 * spent, **where), row("speedup", 400 / spent, **where)]
        if model in ("ensemble", "proposed", "teacher"):
            found += [row(m, 1e8 * spent, model=model, stage="own scale") for m in ("macs", "params")]
    ladder = [
        "ensemble",
        "one branch",
        *(f"{VITS[0]}: {s}" for s in ("whole", "depth", "halved grid", "class token only")),
    ]
    for i, model in enumerate([*ladder, f"{VITS[1]}: class token only"]):
        found += [row(m, 1e9 / (i + 1), model=model, stage="steps") for m in ("macs", "params")]
        for dtype in ("float32", "bfloat16"):
            where = {"model": model, "dtype": dtype, "stage": "steps", "batch": 4}
            found += [
                row("speedup", (1.0, 3.0, 11.0, 20.0, 33.3, 36.6, 12.0)[i], **where),
                row("batch_time", 9.0, **where),
            ]
    return pd.DataFrame(found).assign(plan=CHOSEN)


def absent():
    where = {
        "metric": "2afc",
        "value": None,
        "unit": "1",
        "n": 0,
        "split": "test",
        "stage": "field",
        "dtype": "float32",
    }
    return WHERE | where | {"model": "ensemble", "note": "weights not present"}


@pytest.fixture
def pixels():
    return pd.DataFrame([row("2afc", 0.59, backbone="PSNR", split="test", stage="pixels")])


def test_the_candidates_are_compared_and_one_is_marked(rows):
    frame = items.candidates(rows).frame
    assert frame[" ", "Chosen"].tolist().count("proposed") == 1 and len(frame) == 12
    taken = frame[frame[" ", "Chosen"] == "proposed"].iloc[0]
    assert taken["", "Candidate"] == CHOSEN and taken["", "Format"] == "fp32"
    assert taken["Cost", "ms"] == pytest.approx(1.5) and taken["Cost", "× teacher"] == pytest.approx(4)
    assert taken["Cost", "MMAC"] == pytest.approx(15) and taken["2AFC on val", "%"] == pytest.approx(88.5)
    assert "Pool, all layers" in frame["", "Candidate"].tolist()
    items.candidates(rows).latex("a test")


def test_the_field_has_measured_scores_where_there_are_any_and_says_what_is_absent(rows, pixels):
    table = items.field(rows, pixels)
    frame = table.frame.set_index(("", "Model"))
    assert frame.loc["Proposed", ("2AFC on test", "%")] == pytest.approx(89)
    assert frame.loc["PSNR", ("2AFC on test", "%")] == pytest.approx(59)
    assert pd.isna(frame.loc["DreamSim, ensemble", ("2AFC on test", "%")])
    assert frame.loc["Proposed", ("× ensemble", "fp32")] == pytest.approx(500)
    assert frame.loc["Recipe, ViT-S/16", ("× ensemble", "fp32")] == pytest.approx(36.6)
    assert pd.isna(frame.loc["Recipe, ViT-S/16", ("2AFC on test", "%")])
    assert frame.loc["Recipe, ViT-B/16", ("× ensemble", "bf16")] == pytest.approx(12)
    assert pd.isna(frame.loc["PSNR", ("× ensemble", "bf16")])
    assert "Weights not present, so no accuracy: DreamSim, ensemble." in table.note and "n = 200" in table.note
    table.latex("a test")


def test_published_numbers_are_quoted_in_a_table_of_their_own():
    table = items.published()
    assert table.frame.set_index("Metric").loc["DreamSim, ensemble", "Test, %"] == 96.2
    assert table.frame["Source"].str.len().min() > 3 and "NIGHTS" in table.note


def test_numbers_are_the_test_splits_and_the_last_steps(rows):
    found = items.numbers(rows)
    assert found["ProposedAccuracy"] == "89.0 [84.0, 94.0]" and found["ProposedTeacherAccuracy"].startswith("91.0")
    assert found["ProposedShare"].startswith("97.8 [") and found["ProposedPValue"] == "< 0.001"
    assert found["ProposedFieldSpeedupVitSOneSixFpThreeTwo"] == "36.6" and found["ProposedPlan"] == CHOSEN
    assert found["ProposedFieldSpeedupVitBOneSixBfOneSix"] == "12.0" and found["ProposedOwnSpeedupFpThreeTwo"] == "500"
    assert found["ProposedSpeedup"] == "36.6" and found["ProposedBlocks"] == "3 of 6"
    steps = rows.query("stage == 'steps' and metric == 'speedup' and dtype == 'float32'")
    row = steps[steps["value"].round(1) == 36.6].iloc[0]
    assert found["ProposedSpeedupInterval"] == interval(row["low"], row["high"], digits=None)
    assert all(name.isalpha() for name in found)


def test_a_share_that_cannot_be_had_is_called_undefined(rows):
    own = rows["metric"] == "share_of_teacher"
    rows.loc[own, ["value", "low", "high"]] = float("nan")
    assert own.any() and items.numbers(rows)["ProposedShare"] == "undefined"


def test_figures_show_what_the_rows_say(rows):
    left, right = figures.sensitivity(rows).axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["Pool", "Identity", "Dropped", "Grid halved"]
    assert [text.get_text() for text in right.texts][:6] == ["−2", "−1", "0", "1", "2", "3"]
    predicted, measured = figures.front(rows).axes
    assert len(predicted.lines[1].get_xdata()) == len(PLANS)
    line = next(line for line in measured.lines if len(set(line.get_ydata())) == 1 and len(line.get_ydata()) == 2)
    assert line.get_ydata()[0] == pytest.approx(88)
    rings = [line for line in measured.lines if line.get_markersize() == 11]
    assert len(rings) == 1 and rings[0].get_xydata().tolist() == [[1.5, 88.5]]
    names = {text.get_text() for text in measured.texts}
    assert names >= {"Teacher", "Pool, all layers", "tokens merged"} and not any("distilled" in name for name in names)
    ax = figures.steps(rows)
    assert [tick.get_text() for tick in ax.get_yticklabels()][2:4] == ["ViT-S/16", "+ fewer blocks"]
    assert ax.texts[5].get_text() == "37×"
    plt.close("all")


def test_everything_is_made_from_the_written_rows(rows, pixels):
    results.write(rows, items.NOTEBOOK, profile="proposed-items")
    tables, drawn, numbers = items.make("proposed-items")  # without notebook 01
    results.write(pixels, "01_data_preparation", profile="proposed-items")
    tables, drawn, numbers = items.make("proposed-items")
    assert set(tables) | set(drawn) == set(items.CAPTIONS) and not set(tables) & set(drawn)
    assert tables["proposed_model"].frame["2AFC on test", "%"].notna().sum() == 3
    plt.close("all")


def test_without_rows_the_notebook_is_named():
    with pytest.raises(ValueError, match="run notebook 10_proposed_model first"):
        items.candidates(pd.DataFrame({"stage": []}))


def test_nothing_here_imports_torch():
    code = "import sys; import thesis_lib.items.proposed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
