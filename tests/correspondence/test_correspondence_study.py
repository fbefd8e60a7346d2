import numpy as np
import pandas as pd
import pytest
import torch

from thesis_lib.correspondence import pck, report
from thesis_lib.correspondence.features import ViTFeatures
from thesis_lib.correspondence.study import Study, load_student, save_student, settings
from thesis_lib.correspondence.systems import Part, System, get

RECIPE = {"name": "run", "size": 64, "layer": 4, "epochs": 1, "batch_size": 2, "max_batches": 1, "lr": 1e-4}


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(folder=tmp_path / "features", batch_size=2)


@pytest.fixture(autouse=True)
def random_backbone(monkeypatch, tmp_path):
    """The demo backbone with random weights: nothing here depends on what it was trained for."""
    from thesis_lib import backbone, paths

    plain = backbone.create
    monkeypatch.setattr(backbone, "create", lambda *a, **o: plain(*a, **o | {"pretrained": False}))
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    torch.manual_seed(0)


def test_a_system_is_scored_on_several_sets(study, pairs):
    found = study.score(get("position"), {"a": pairs, "b": pairs})
    assert found["a"].equals(found["b"]) and len(found["a"]) == 20
    both = System((get("position").parts[0], Part("vit", "demo", "4", 64, {"layers": [4]})), weights=(1.0, 0.5))
    assert len(study.score(both, {"a": pairs})["a"]) == 20


def test_parts_that_differ_in_their_map_alone_share_an_extractor(study):
    parts = [Part("vit", "demo", key, 64, {"layers": [3, 4]}) for key in ("3", "4")]
    first, second = study.extractors(System(tuple(parts)))
    assert first is second


def test_reset_empties_a_store_once(study, pairs, vit):
    study.reset_cache = True
    extractor, seen = ViTFeatures(vit), []
    extractor.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    for _ in range(2):
        study.score_maps([extractor], ["5"], pairs)
    assert sum(seen) == 6


@pytest.mark.parametrize("pairing", ["points", "weak", "retrieval"])
def test_recipes_train_resume_and_reload(study, pairs, tmp_path, pairing):
    maps = torch.randn(6, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    teacher = None if pairing == "points" else lambda place: maps[place]
    recipe = RECIPE | {"pairs": pairing, "mixer": "pool", "tune": "full"}
    options = {"val": pairs, "teacher": teacher, "folder": tmp_path / "runs", "progress": False}
    student, log = study.train(recipe, pairs, **options)
    again, same = study.train(recipe, pairs, **options)
    assert log == same and log[0]["pck"] >= 0  # nothing was trained again
    torch.testing.assert_close(student.state_dict(), again.state_dict())
    save_student(student, tmp_path / "s")
    other = load_student(study.student(settings(recipe)), tmp_path / "s")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(other(x)["student"], student(x)["student"])
    with pytest.raises(ValueError, match="another recipe"):
        load_student(study.student(settings(recipe | {"mixer": "mha"})), tmp_path / "s")


def test_wrong_recipes_are_named(study, pairs, tmp_path):
    with pytest.raises(ValueError, match="no setting 'sampleing' .did you mean sampling"):
        settings({"name": "x", "sampleing": "grid"})
    with pytest.raises(ValueError, match="needs a name"):
        settings({"tune": "full"})
    with pytest.raises(ValueError, match="pairs 'weak' need a teacher"):
        study.train(RECIPE | {"pairs": "weak"}, pairs, val=pairs, folder=tmp_path)


def test_a_teacher_combines_runs_and_models(study, pairs):
    student = study.student(settings(RECIPE))
    parts = [{"run": "run"}, {"model": "demo", "size": 128}, {"model": "demo", "size": 64, "layer": 1}]
    extractors, keys = study.sources(parts, {"run": student}, layer=4)
    assert keys == ["student", "4", "1"] and extractors[1].size == 128
    with study.teacher(extractors, keys, pairs) as teacher:
        assert teacher(2).shape == (3 * 128, 16, 16)
    told = study.identity(extractors, keys)
    assert study.identity(extractors, keys) == told != study.identity(extractors, keys[::-1])
    with torch.no_grad():
        next(student.parameters()).add_(0.1)
    assert study.identity(extractors, keys) != told  # a teacher that was trained again is another
    extractors, keys = study.sources("position", {}, layer=4)
    assert keys == ["position"]


def test_rows_cover_models_absences_and_logs(study, pairs):
    tests = {("SPair-71k", "test"): pairs, ("PF-WILLOW", "test"): pairs}
    points = {"position": study.score(get("position"), tests)}
    rows = report.model_rows(points, {"position": {"stage": "system"}}, tests, alphas=(0.1,), seed=0)
    frame = pd.DataFrame(rows)
    assert set(frame["dataset"]) == {"SPair-71k", "PF-WILLOW"} and (frame["skipped"] == 1).all()
    assert set(frame.query("dataset == 'SPair-71k'")["group"]) == {"all", "category", "keypoint", *pck.FACTORS}
    assert set(frame.query("dataset == 'PF-WILLOW'")["group"]) == {"all"}
    (absent,) = report.absent_rows({"DIFT (SD 2.1)": "sd"}, pairs, seed=0)
    assert absent["value"] is None and absent["note"] == "weights not present" and absent["n"] == 5
    log = report.log_rows({"run": [{"epoch": 1, "loss": 2.0, "pck": 0.5}]}, pairs, pairs, seed=0)
    assert [(r["metric"], r["value"], r["epoch"]) for r in log] == [("loss", 2.0, 1), ("val pck", 0.5, 1)]
    (data, _) = report.data_rows(tests)
    assert (data["value"], data["n"], data["skipped"]) == (5, 6, 1)  # what was skipped is in n
    assert len(report.point_tables(points)) == 40


def test_the_gallery_holds_pictures_and_maps_once_a_pair(study, pairs, vit):
    tests = {("SPair-71k", "test"): pairs}
    table = study.score(get("colour"), tests)["SPair-71k", "test"]
    with study.features(ViTFeatures(vit), pairs) as maps:
        found = report.gallery(pairs, {"a": table, "b": table}, [1, 3], maps, "5")
    assert len(found) == 2 * 2 * 4 and found["heat"].notna().sum() == 2
    first = found.iloc[0]
    heat = np.frombuffer(first["heat"], np.float16).reshape(first["heat_shape"])
    assert heat.shape == (30, 40) and first["source"] == pairs.images[1].read_bytes()
    components = np.frombuffer(first["source_components"], np.float16)
    assert components.size == 3 * 64 and 0 <= components.min() and components.max() <= 1


def test_weights_that_training_needs_are_asked_for_before_it():
    study = Study(weights={"SD 2.1": "folder"})
    here = [{"model": "demo"}, {"name": "a", "model": ["vit_small_patch16_224.dino"]}]
    study.require(here, [{"run": "supervised"}])
    for recipes, teacher in (([{"model": ["demo", "SDXL-Turbo"]}], []), (here, "SDXL-Turbo")):
        with pytest.raises(FileNotFoundError, match="train with SDXL-Turbo, whose weights are not here"):
            study.require(recipes, teacher)
