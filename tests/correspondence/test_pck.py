import numpy as np
import pandas as pd
import pytest

from thesis_lib.correspondence import pck
from thesis_lib.correspondence.pck import PRESETS, Protocol, pck_rows, point_table, preset


@pytest.fixture
def table() -> pd.DataFrame:
    """Pair 0 of category a: 3 points, boxes of 50, an image of 100; pair 1 of b: one point, box 20, image 200."""
    rows = [(0, "a", 5.0, 50, 100), (0, "a", 5.1, 50, 100), (0, "a", 10.0, 50, 100), (1, "b", 4.0, 20, 200)]
    frame = pd.DataFrame(rows, columns=["pair", "category", "distance", "box", "image"])
    return frame.assign(keypoint=["0", "1", "2", "0"], viewpoint=[0.0, 0, 0, 2])


@pytest.mark.parametrize(
    "protocol, alpha, expected",
    [
        (Protocol(), 0.1, 1 / 4),  # 5.0 <= 0.1 * 50 counts
        (Protocol(inclusive=False), 0.1, 0 / 4),
        (Protocol(), 0.2, 4 / 4),
        (Protocol(inclusive=False), 0.2, 2 / 4),
        (Protocol(base="image"), 0.1, 4 / 4),
        (Protocol(base="image", inclusive=False), 0.1, 3 / 4),
        (Protocol(average="image"), 0.1, (1 / 3 + 0) / 2),  # per image is not per point
        (Protocol(average="category"), 0.1, (1 / 3 + 0) / 2),
        (Protocol(inclusive=False, average="category"), 0.2, (2 / 3 + 0) / 2),
    ],
)
def test_hand_counted(table, protocol, alpha, expected):
    found = pck.pck(table, alpha, protocol)
    assert found.value == pytest.approx(expected) and found.n == 2
    assert found.low <= found.value <= found.high


def test_presets_are_the_published_evaluators(table):
    assert {name: round(pck.pck(table, 0.1, protocol).value, 4) for name, protocol in PRESETS.items()} == {
        "DistillDIFT box": 0.25,
        "DistillDIFT image": 1.0,
        "DIFT per point": 0.25,
        "DIFT per image": 0.1667,
        "SD+DINO": 0.0,
    }
    with pytest.raises(ValueError, match="did you mean SD\\+DINO"):
        preset("SD+DIN")
    with pytest.raises(ValueError, match="did you mean category"):
        Protocol(average="categry")


def test_dift_inner_loop_agrees():
    """DIFT divides by the threshold where others multiply: the same points are correct."""
    rng = np.random.default_rng(0)
    distance, box = rng.uniform(0, 60, 500), rng.integers(20, 400, 500).astype(float)
    table = pd.DataFrame({"distance": distance, "box": box, "pair": 0, "category": "a"})
    assert pck.correct(table, 0.1, PRESETS["DIFT per point"]).tolist() == (distance / box <= 0.1).tolist()


def test_the_interval_draws_pairs_not_points():
    """Ten pairs of a hundred equal points are ten observations: the interval is as wide as ten coins'."""
    hits = np.repeat(np.arange(10) % 2, 100)
    table = pd.DataFrame({"pair": np.repeat(np.arange(10), 100), "category": "a", "distance": 10.0 * hits, "box": 50.0})
    found = pck.pck(table, 0.1)
    assert found.value == 0.5 and found.n == 10
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 10), rel=0.1)


def test_point_table_and_rows(pairs):
    shift = {"p0": 0.0, "p1": 2.0}
    table = point_table(pairs, lambda pair: pair.target_points + [shift.get(pair.name, 4.0), 0])
    assert len(table) == 20 and set(table["pair"]) == set(range(5))
    np.testing.assert_allclose(table["distance"], [0] * 4 + [2] * 4 + [4] * 12, atol=1e-5)
    assert (table["box"] == 30).all() and (table["image"] == 40).all()  # longer sides
    options = {"alphas": (0.1,), "evaluators": ("DIFT per point",)}
    rows = pck_rows(table, **options, by=("category", "viewpoint", "keypoint"), dataset="SPair-71k")
    assert rows[0]["value"] == pytest.approx(8 / 20) and rows[0]["n"] == 5 and rows[0]["points"] == 20
    levels = {(row["group"], row["level"]): row["value"] for row in rows}
    assert levels["category", "a"] == pytest.approx(4 / 12) and levels["viewpoint", "1"] == pytest.approx(0.5)
    assert levels["keypoint", "b 5"] == pytest.approx(0.5)
    assert all(row["dataset"] == "SPair-71k" for row in rows)


def test_bad_predictions_and_empty_tables_are_refused(pairs, table):
    with pytest.raises(ValueError, match="p0: 4 finite points"):
        point_table(pairs, lambda pair: pair.target_points[:2])
    with pytest.raises(ValueError, match="p0: 4 finite points"):
        point_table(pairs, lambda pair: pair.target_points * np.nan)
    with pytest.raises(ValueError, match="no key-point to score"):
        pck.pck(table.iloc[:0])
    with pytest.raises(ValueError, match="alpha must be positive"):
        pck.pck(table, 0)
