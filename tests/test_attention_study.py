import numpy as np
import pytest
import torch
from PIL import Image

from thesis_lib import attention_study
from thesis_lib.attention_study import Study, readable

RECIPE = {"epochs": 1, "blr": 1e-2, "warmup_epochs": 0.5, "ema_decay": 0.9}
OPTIONS = {"device": "cpu", "seed": 1, "progress": False}


@pytest.fixture
def files(tmp_path):
    """Ten pictures, of which two are cut off."""
    rng, paths = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(10)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    for i in (2, 9):
        paths[i].write_bytes(paths[i].read_bytes()[:60])
    return paths


def test_images_that_cannot_be_read_are_left_out_with_their_labels(files, tmp_path):
    with pytest.raises(ValueError, match=r"2\.png is not a whole image"):
        readable(files, 16)
    labels = np.arange(10) % 3
    images, rows = readable(files, 16, on_error="skip")
    assert rows.tolist() == [0, 1, 3, 4, 5, 6, 7, 8] and images.usable.all() and len(images) == 8
    assert images.keys == [str(files[i]) for i in rows]
    assert readable(files[3:9], 16)[1].tolist() == list(range(6))
    data = dict.fromkeys(("train", "validation", "test"), (images, labels[rows]))
    study = Study("demo", True, 16, data, 3, 4, tmp_path / "runs", OPTIONS)
    found = study.run("averaged", RECIPE | {"mode": "copy", "average": "examples"})
    assert found.scores.shape == (8, 3)
    assert study.row(found.scores)["n"] == 8


def test_a_finished_run_leaves_nothing_on_the_device(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    data = dict.fromkeys(("train", "validation", "test"), (images, np.arange(8) % 3))
    study = Study("demo", True, 16, data, 3, 4, tmp_path, OPTIONS)
    moved, events = torch.nn.Module.cpu, []
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda model: events.append(type(model).__name__) or moved(model))
    predict = attention_study.predict
    monkeypatch.setattr(attention_study, "predict", lambda *a, **k: events.append("predict") or predict(*a, **k))
    first = study.run("copy", RECIPE | {"mode": "copy"})
    second = study.run("distill", RECIPE | {"mode": "distill"})
    assert events == ["predict", "AttentionTransfer"] * 2
    for model in (first.model, second.model):
        assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
        assert model.teacher.backbone is study.teacher
    dropped = study.run("copy", RECIPE | {"mode": "copy"}, keep=False)  # from its checkpoint
    assert dropped.model is None and torch.equal(dropped.scores, first.scores)


def test_the_average_spans_as_many_images_whatever_the_batch(tmp_path, monkeypatch):
    data = dict.fromkeys(("train", "validation", "test"), (torch.zeros(8, 3, 16, 16, dtype=torch.uint8), np.arange(8)))
    seen = []
    monkeypatch.setattr(attention_study, "train_classifier", lambda *a, **k: seen.append(k["ema_decay"]) or [])
    for batch in (4, 8):
        Study("demo", True, 16, data, 8, batch, tmp_path, OPTIONS).run("scratch", RECIPE)
    assert seen == pytest.approx([0.9 ** (4 / 256), 0.9 ** (8 / 256)])
