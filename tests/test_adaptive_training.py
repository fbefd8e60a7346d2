from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from halting_models import VARIED, halting_vit
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from thesis_lib import backbone, perceptual
from thesis_lib.adaptive_tokens import AdaptiveViT, Halting, preset
from thesis_lib.adaptive_training import (
    AdaptiveMetric,
    classification_rows,
    headed,
    normalised,
    predict,
    train_classifier,
    tune_metric,
    use_rows,
)
from thesis_lib.token_removal import TokenRemoval, dense_macs, executed_macs

FAST = {"device": "cpu", "progress": False}


class Pixels:
    """Random images that are red or blue, as `pixels.cache` would give them."""

    def __init__(self, n, size=32, seed=0):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 2, n)
        values = rng.integers(0, 120, (n, 3, size, size))
        for image, label in zip(values, self.labels, strict=True):
            image[2 * label] += 130
        self.values, self.usable = torch.from_numpy(values.astype(np.uint8)), np.ones(n, bool)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        return self.values[rows]


def triplets(pixels, n=24, seed=0):
    """The candidate of the reference's own kind wins."""
    rng = np.random.default_rng(seed)
    index, votes = [], []
    for _ in range(n):
        reference = rng.integers(len(pixels))
        same, other = (
            rng.choice(np.flatnonzero((pixels.labels == pixels.labels[reference]) == kind)) for kind in (1, 0)
        )
        right = rng.integers(2)
        index.append([reference, *((other, same) if right else (same, other))])
        votes.append(float(right))
    return SimpleNamespace(index=np.array(index), right_vote=np.array(votes, np.float32))


def test_scores_are_those_of_torchmetrics():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    predicted = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 5, 300))
    rows = {row["metric"]: row for row in classification_rows(labels, predicted, 5, split="test")}
    a, b = torch.from_numpy(predicted), torch.from_numpy(labels)
    expected = {
        "accuracy": multiclass_accuracy(a, b, 5, average="micro"),
        "accuracy_macro": multiclass_accuracy(a, b, 5, average="macro"),
        "f1_macro": multiclass_f1_score(a, b, 5, average="macro"),
    }
    for name, value in expected.items():
        assert rows[name]["value"] == pytest.approx(value.item(), abs=1e-6)
        assert rows[name]["low"] < rows[name]["value"] < rows[name]["high"]
        assert rows[name]["n"] == 300 and rows[name]["split"] == "test"
    spread = (rows["accuracy"]["high"] - rows["accuracy"]["low"]) / 2
    share = rows["accuracy"]["value"]
    assert spread == pytest.approx(1.96 * np.sqrt(share * (1 - share) / 300), rel=0.06)


def test_classes_that_do_not_occur():
    rows = classification_rows(np.array([0, 0, 1]), np.array([0, 1, 1]), 4, resamples=50)
    accuracy, macro, f1 = (row["value"] for row in rows)
    assert (accuracy, macro, f1) == pytest.approx((2 / 3, (0.5 + 1) / 2, (2 / 3 + 2 / 3) / 2))
    rows = classification_rows(np.array([0, 0]), np.array([0, 3]), 4, resamples=50)
    assert [row["value"] for row in rows] == pytest.approx([0.5, 0.5, (2 / 3 + 0) / 2])


def test_predict_runs_the_fast_form_and_counts_it():
    model, pixels = AdaptiveViT(halting_vit(), VARIED), Pixels(10)
    classes, tokens, macs = predict(model, pixels, batch_size=4)
    x = normalised(model, pixels[np.arange(10)])
    trace = model.run(x)
    assert (classes == model(x).argmax(-1).numpy()).all()
    assert (tokens == trace.tokens.T.numpy()).all() and tokens.shape == (10, 5)
    parts = [executed_macs(model.vit, trace.tokens[:, rows]) for rows in (slice(0, 4), slice(4, 8), slice(8, 10))]
    assert macs == sum(parts) / 10
    classes, tokens, macs = predict(halting_vit(), pixels, indices=[3, 1], batch_size=4)
    assert tokens.tolist() == [[17] * 5] * 2 and macs == dense_macs(halting_vit()) and len(classes) == 2


def test_use_rows():
    tokens = np.array([[10, 5], [10, 0]])
    rows = use_rows(tokens, 10, 1e6, model="a")
    found = {row["metric"]: row["value"] for row in rows if row["metric"] != "tokens_layer"}
    assert found == {"tokens": pytest.approx(0.625), "depth": pytest.approx(1.25), "macs_executed": 1e6}
    assert [(row["layer"], row["value"]) for row in rows if row["metric"] == "tokens_layer"] == [(1, 1.0), (2, 0.25)]
    assert all(row["model"] == "a" and row["n"] == 2 for row in rows)


@pytest.mark.parametrize("augmentation", [{"flip": 0.0, "smoothing": 0.0}, {"mixup": 0.2}])
def test_training_teaches_the_task_and_the_halting(augmentation):
    torch.manual_seed(0)
    vit = backbone.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=2)
    pixels, val = Pixels(96), Pixels(32, seed=1)
    data = (pixels, pixels.labels, val, val.labels)
    model = AdaptiveViT(vit, preset("paper", gamma=5.0, beta=-5.0, target_depth=2.0))
    log = train_classifier(model, *data, epochs=6, batch_size=16, lr=3e-3, augmentation=augmentation, **FAST)
    assert log[-1]["accuracy"] > 0.85
    assert log[-1]["tokens"] < 0.8 * 17 and not model.training
    again = predict(model, val)
    assert log[-1]["tokens"] == pytest.approx(again[1].mean())  # the last epoch's weights stay


def test_a_plain_vit_is_trained_by_the_same_call():
    pixels = Pixels(32)
    data = (pixels, pixels.labels, pixels, pixels.labels)
    (row,) = train_classifier(halting_vit(), *data, epochs=1, lr=1e-3, max_batches=1, **FAST)
    assert row["tokens"] == 17 and np.isfinite(row["loss"])
    with pytest.raises(ValueError, match="flip=2 must lie"):
        train_classifier(halting_vit(), *data, epochs=1, augmentation={"flip": 2}, **FAST)


def test_what_is_decayed_and_which_branches_training_skips(monkeypatch):
    pixels, seen = Pixels(16), {}
    monkeypatch.setattr("thesis_lib.adaptive_training.fit", lambda model, *args, **options: seen.update(options))
    data = (pixels, pixels.labels, pixels, pixels.labels)
    model = AdaptiveViT(halting_vit(), VARIED)
    train_classifier(model, *data, epochs=1, batch_size=8, weight_decay=0.05, drop_path=0.2, head_lr_scale=10.0, **FAST)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in seen["parameters"] for p in g["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in seen["parameters"])
    for name, p in model.named_parameters():
        decayed = p.ndim > 1 and name not in ("vit.pos_embed", "vit.cls_token")
        assert found[name] == (0.05 * decayed, 10.0 if "head" in name else 1.0), name
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.vit.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.2, 5)) and rates[0] == 0
    x = normalised(model, pixels[np.arange(4)])
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_heads_come_from_the_seed_alone():
    a, b, c = (headed("demo", 4, seed=seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("feature", ["cls", "cls_norm"])
def test_the_metric_that_never_halts_is_the_plain_metric(feature):
    vit = backbone.create("demo")
    plain = perceptual.Metric(deepcopy(vit), feature)
    metric = AdaptiveMetric(AdaptiveViT(vit, Halting(0.0, -200.0)), feature)
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert_close(metric.embed(x), plain.embed(x), rtol=0, atol=1e-5)
        assert_close(metric.fast().embed(x), plain.embed(x), rtol=0, atol=1e-5)
        embedding, trace = metric.trace(x)
        assert_close(embedding, metric.embed(x))
        assert (trace.depth == 6).all()
    assert isinstance(metric.fast().backbone, TokenRemoval)
    with pytest.raises(ValueError, match="cls_patch"):
        AdaptiveMetric(metric.backbone, "cls_patch")


@pytest.mark.parametrize("objective", ["distillation", "2afc"])
def test_tuning_a_metric_to_halt(objective):
    torch.manual_seed(0)
    pixels, val_pixels = Pixels(64), Pixels(24, seed=1)
    start = backbone.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0, global_pool="token"
    )
    teacher = perceptual.Metric(deepcopy(start)).eval()
    metric = AdaptiveMetric(AdaptiveViT(start, preset("paper", beta=-5.0, target_depth=2.0)))
    targets = perceptual.embed_pixels(teacher, pixels, progress=False)
    goal = {"targets": targets} if objective == "distillation" else {"train": triplets(pixels)}
    log = tune_metric(
        metric,
        pixels,
        val_pixels,
        triplets(val_pixels),
        objective=objective,
        epochs=4,
        batch_size=8,
        lr=3e-3,
        **goal,
        **FAST,
    )
    assert log[-1]["tokens"] < 0.85 * 17 and 0 <= log[-1]["2afc"] <= 1
    if objective == "2afc":
        assert log[-1]["2afc"] > 0.8


def test_a_metric_needs_its_objectives_data():
    metric, pixels = AdaptiveMetric(AdaptiveViT(backbone.create("demo"))), Pixels(4, 64)
    for options, message in (
        ({"objective": "distillation"}, "targets"),
        ({"objective": "distillation", "targets": torch.zeros(3, 128)}, "4 images"),
        ({"objective": "2afc"}, "train"),
        ({"objective": "2acf"}, "did you mean '2afc'"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_metric(metric, pixels, pixels, triplets(pixels), epochs=1, **options, **FAST)
