import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thesis_lib import paths, results

ROW = {"metric": "2afc", "value": 0.9, "unit": "1", "n": 100}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.delenv("THESIS_RUN", raising=False)
    return tmp_path / "demo"


def test_rows_come_back_with_every_protocol_column_and_their_own(folder):
    path = results.write([ROW | {"mixer": "mha", "seed": 3, "epoch": 2}], "02_study-mha", profile="demo")
    assert path == folder / "02_study-mha.parquet"
    row = results.read("02_study-mha", profile="demo").iloc[0]
    assert {
        "value": 0.9,
        "n": 100,
        "mixer": "mha",
        "seed": 3,
        "epoch": 2,
        "profile": "demo",
    }.items() <= row.to_dict().items()
    assert list(row.index[: len(results.COLUMNS)]) == list(results.COLUMNS)
    assert pd.isna(row["dataset"]) and pd.isna(row["low"])
    assert [p.name for p in folder.iterdir()] == ["02_study-mha.parquet"]  # no temporary file is left


def test_column_types_do_not_depend_on_which_are_null(folder):
    results.write([ROW], "01_a", profile="demo")
    results.write([ROW | {"mixer": "mha", "image_size": 64, "low": 0.8, "note": "x"}], "01_b", profile="demo")
    first, second = (pq.read_schema(folder / f"{name}.parquet") for name in ("01_a", "01_b"))
    assert all(first.field(c).type == second.field(c).type == kind for c, kind in results.COLUMNS.items())
    both = results.read("01_*", profile="demo")
    assert both["image_size"].tolist()[1] == 64 and pd.isna(both["image_size"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "note"),
        ({"value": None}, "note"),
        ({"unit": None}, "empty required column"),
        ({"n": np.nan}, "empty required column"),
        ({"value": "high"}, "'value' is not all double"),
        ({"n": 1.5}, "'n' is not all int64"),
        ({"profile": "thesis"}, "cannot be written as 'demo'"),
    ],
)
def test_rows_that_say_too_little_are_refused(folder, change, message):
    with pytest.raises(ValueError, match=message):
        results.write([ROW, ROW | change], "02_study", profile="demo")
    assert not folder.exists()


def test_no_rows_missing_columns_and_odd_names_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        results.write([], "02_study", profile="demo")
    with pytest.raises(ValueError, match="missing: unit, n"):
        results.write([{"metric": "2afc", "value": 1.0}], "02_study", profile="demo")
    with pytest.raises(ValueError, match="name"):
        results.write([ROW], "../02_study", profile="demo")


def test_a_missing_value_with_a_note_is_kept():
    results.write([ROW | {"value": None, "n": 0, "note": "out of memory"}], "03_cost", profile="demo")
    row = results.read("03_cost", profile="demo").iloc[0]
    assert pd.isna(row["value"]) and row["note"] == "out of memory"


def test_a_glob_joins_runs_and_leaves_tables_of_triplets_out():
    for mixer in ("mha", "pool"):
        results.write([ROW | {"mixer": mixer}], f"02_study-{mixer}", profile="demo")
        results.write_table(pd.DataFrame({"id": [1, 2]}), f"02_study-{mixer}.triplets", profile="demo")
    assert results.read("02_study-*", profile="demo")["mixer"].tolist() == ["mha", "pool"]
    assert results.read("02_study-*.triplets", profile="demo")["id"].tolist() == [1, 2, 1, 2]


def test_a_missing_result_names_its_notebook_and_the_near_ones():
    results.write([ROW], "02_study-pool", profile="demo")
    with pytest.raises(FileNotFoundError, match=r"there is 02_study-pool.*02_study\.ipynb.*--profile demo"):
        results.read("02_study-poool", profile="demo")


@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_file_is_refused_and_named(folder, size):
    path = results.write([ROW], "02_study", profile="demo")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RuntimeError, match=r"02_study\.parquet is damaged.*delete it"):
        results.read("02_study", profile="demo")


def test_provenance_says_who_made_it(monkeypatch, folder):
    by_hand = results.provenance(results.write([ROW], "02_study", profile="demo"))
    assert by_hand["production"] is False and by_hand["notebook"] is None and by_hand["synthetic"] is None
    assert by_hand["hardware"]["cores"] >= 1 and by_hand["versions"]["numpy"] == np.__version__
    assert {"revision", "dirty", "time"} <= by_hand.keys()
    run = {
        "notebook": "02_study.ipynb",
        "parameters": {"seed": 1},
        "production": True,
        "staging": str(folder / "aside"),
    }
    monkeypatch.setenv("THESIS_RUN", json.dumps(run))
    path = results.write([ROW], "02_study", profile="demo")
    assert path == folder / "aside" / "02_study.parquet"
    assert {"notebook": "02_study.ipynb", "production": True, "synthetic": []}.items() <= results.provenance(
        path
    ).items()


def git(folder, *words):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_revision_is_this_checkouts_or_none(monkeypatch, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    monkeypatch.setattr(paths, "ROOT", tmp_path / "link")
    clean = results._revision()
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "inner" / "file").write_text("changed")
    assert results._revision() == clean | {"dirty": True}
    monkeypatch.setattr(paths, "ROOT", tmp_path / "inner")  # unpacked in a repository of something else
    assert results._revision() == {"revision": None, "dirty": None}
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert results._revision() == {"revision": None, "dirty": None}


@pytest.fixture
def stamped(tmp_path, monkeypatch):
    """Three data sets, of which two are synthetic, and a broken stamp."""
    monkeypatch.setattr(paths, "DATA", tmp_path)
    stamps = {"a": '{"format": "NIGHTS"}', "b": '{"format": "CIFAR-10"}', "real": None, "bad": "[1", "odd": "[]"}
    for name, stamp in stamps.items():
        (tmp_path / "raw" / name).mkdir(parents=True)
        if stamp:
            (tmp_path / "raw" / name / "synthetic.json").write_text(stamp)
    return tmp_path / "raw"


def test_parameters_tell_which_data_sets_are_synthetic(stamped):
    nested = {"dataset_root": "raw/a", "datasets": {"CIFAR-10": {"root": str(stamped / "b"), "runs": [{"x": None}, 3]}}}
    assert results.stand_ins(nested) == ["CIFAR-10", "NIGHTS"]
    odd = ["raw/bad", "raw/odd", "raw/none", "x" * 5000, "a\0b", "\ud800", "", "~", "/", True]
    assert results.stand_ins({"root": "raw/real", "odd": odd}) == []
    assert results.stand_ins(None) is None


def test_origins_name_every_revision_what_was_made_by_hand_and_what_is_synthetic(stamped, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "MEASURED", tmp_path / "measured")

    def make(name, revision, run, dirty=False, folder=None):
        with monkeypatch.context() as patch:
            patch.setattr(results, "_machine", lambda: {"revision": revision, "dirty": dirty})
            patch.setenv("THESIS_RUN", json.dumps(run))
            results.write([ROW], name, profile="demo", folder=folder)

    make("02_study-mha", "a" * 40, {"parameters": {"root": "raw/a"}, "production": True})
    make("09_thesis_figures", "f" * 40, {"parameters": {}, "production": True})
    alone = results.origins("demo")
    assert alone["text"] == "rows measured at revision aaaaaaaaaa" and alone["synthetic"] == ["NIGHTS"]
    make("02_study-pool", "b" * 40, {"parameters": {"roots": ["raw/a", "raw/b"]}, "production": True}, dirty=None)
    make("02_study-sra", "b" * 40, {"parameters": {"lr": 1}, "production": False}, dirty=True)
    make("03_cost", None, {}, dirty=None)
    make("efficiency-gpu", "c" * 40, {"parameters": {}, "production": True}, folder=paths.MEASURED)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "demo" / "04_other.parquet")
    found = results.origins("demo")
    assert found["revisions"] == ["aaaaaaaaaa", "bbbbbbbbbb", "bbbbbbbbbb+", "cccccccccc", "unknown"]
    assert found["by_hand"] == ["02_study-sra", "03_cost", "04_other"]
    assert found["synthetic"] == ["CIFAR-10", "NIGHTS"]
    assert "at revisions aaaaaaaaaa, bbbbbbbbbb," in found["text"] and found["text"].endswith("03_cost, 04_other")


def test_a_running_notebook_reads_what_it_has_written_before_what_was_there(monkeypatch, folder):
    results.write([ROW | {"value": 0.1}], "02_study", profile="demo")
    monkeypatch.setenv("THESIS_RUN", json.dumps({"staging": str(folder / "aside")}))
    assert results.read("02_study", profile="demo")["value"].item() == 0.1
    results.write([ROW | {"value": 0.2}], "02_study", profile="demo")
    assert results.read("02_*", profile="demo")["value"].tolist() == [0.2]


def test_a_file_of_another_maker_has_no_provenance(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no provenance"):
        results.provenance(tmp_path / "other.parquet")
