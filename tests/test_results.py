import json

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
    assert by_hand["production"] is False and by_hand["notebook"] is None
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
    assert {"notebook": "02_study.ipynb", "production": True}.items() <= results.provenance(path).items()


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
