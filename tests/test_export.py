"""Exported metrics against the eager one, at batch sizes other than the one they were traced with."""

import sys

import numpy as np
import pytest
import torch

from thesis_lib import attention, backbone, export, perceptual, token_merging

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def small_demo(monkeypatch):
    monkeypatch.setattr(backbone, "DEMO", SMALL)


def build(mixer="pool", feature="cls"):
    torch.manual_seed(0)
    model = backbone.create("demo", mixer, pretrained=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return perceptual.Metric(model, feature).eval().requires_grad_(False)


def images(n):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("mixer", attention.MIXERS)
def test_every_mixer_is_traced_once_for_all_batches(mixer):
    metric = build(mixer)
    run = export.program(metric).module()
    for n in (1, 2, 5):
        torch.testing.assert_close(run(images(n)), metric.embed(images(n)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("feature", ["cls", "cls_patch"])
def test_the_file_of_torch_export_runs_alone(feature, tmp_path):
    metric = build("mha", feature)
    expected = metric.embed(images(3))
    path = export.save_program(metric, tmp_path / "deep" / "embed.pt2")
    torch.testing.assert_close(export.load(path)(images(3)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mixer", ["mha", "pool"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnxruntime_agrees(mixer, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    metric = build(mixer)
    path = export.save_onnx(metric, tmp_path / "embed.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["embed.onnx"]  # weights inside
    run = export.load(path)
    for n in (1, 2, 5):
        torch.testing.assert_close(run(images(n)), metric.embed(images(n)), atol=1e-4, rtol=0)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape[1:] == [3, 16, 16] and isinstance(session.get_inputs()[0].shape[0], str)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_rows_state_size_time_and_agreement(tmp_path):
    rows = export.compare(build(), tmp_path, batch_sizes=(1, 3), rounds=2, runs=3, warmup=1)
    by = {(row["runtime"], row["metric"], row.get("batch")): row for row in rows}
    for name in ("eager", "torch.export"):
        assert by[name, "latency", 3]["n"] == 6 and by[name, "latency", 3]["value"] > 0
        latency, throughput = by[name, "latency", 3]["samples"], by[name, "throughput", 3]["samples"]
        np.testing.assert_allclose(np.array(latency) * np.array(throughput), 3e3)
        assert by[name, "max_difference", 1]["value"] < 1e-5
    weights = sum(parameter.numel() for parameter in build().backbone.parameters()) * 4 / 1e6
    assert by["eager", "file_size", None]["value"] == pytest.approx(weights)
    size = by["torch.export", "file_size", None]["value"]
    assert size == (tmp_path / "embed.pt2").stat().st_size / 1e6 > weights
    assert {row["mixer"] for row in rows} == {"pool"} and {row["image_size"] for row in rows} == {16}


def test_without_onnx_its_row_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnx") else sys)
    rows = export.compare(build(), tmp_path, batch_sizes=(1,), rounds=1, runs=1, warmup=0)
    (row,) = [row for row in rows if row["runtime"] == "onnx"]
    assert row["value"] is None and row["note"] == "not installed: onnx, onnxscript, onnxruntime"
    with pytest.raises(ModuleNotFoundError, match="pip install onnx"):
        export.save_onnx(build(), tmp_path / "embed.onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_onnx_cannot_say_is_a_row_with_a_note(tmp_path):
    pytest.importorskip("onnxscript")
    metric = build("mha")
    token_merging.merge_tokens(metric.backbone, 1)  # it sorts, stably
    rows = export.compare(metric, tmp_path, batch_sizes=(1,), rounds=1, runs=1, warmup=0)
    (row,) = [row for row in rows if row["runtime"] == "onnx"]
    assert row["value"] is None and "ONNX" in row["note"]
    assert {row["runtime"] for row in rows if row["metric"] == "latency"} == {"eager", "torch.export"}


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no exported metric"):
        export.load(tmp_path / "embed.pt2")
    (tmp_path / "embed.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="neither"):
        export.load(tmp_path / "embed.bin")
    (tmp_path / "embed.pt2").write_bytes(b"junk")
    with pytest.raises(ValueError, match="embed.pt2 is not an exported metric") as caught:
        export.load(tmp_path / "embed.pt2")
    assert "\n" not in str(caught.value)
    pytest.importorskip("onnxruntime")
    (tmp_path / "embed.onnx").write_bytes(b"junk")
    with pytest.raises(ValueError, match="embed.onnx is not an exported metric"):
        export.load(tmp_path / "embed.onnx")
