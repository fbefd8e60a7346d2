"""The matching widget without a browser: what its controls show."""

import re

import pytest
import torch

from thesis_lib import backbone, paths
from thesis_lib.correspondence.explorer import MatchExplorer
from thesis_lib.datasets import synthetic_correspondence as world
from thesis_lib.perceptual import Metric, save


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    world.write_spair(folder / "raw" / "synthetic" / "demo" / "spair71k", {"test": 3}, workers=1)
    torch.manual_seed(0)
    save(Metric(backbone.create("demo", "pool", pretrained=False)), folder / "results" / "demo" / "models" / "student")
    return folder


@pytest.fixture
def explorer(data, monkeypatch):
    monkeypatch.setattr(paths, "DATA", data)
    monkeypatch.setattr(paths, "RESULTS", data / "results")
    torch.manual_seed(0)
    return MatchExplorer("demo", mixers=["mha", "pool"], pretrained=False)


def test_models_are_the_mixers_and_what_was_saved(explorer):
    assert list(explorer.parts) == ["MHA", "Pool", "student"]
    assert all(f"match of {name}" in explorer.found.value for name in explorer.parts)
    explorer.shown.value = ["Pool"]
    assert "match of Pool" in explorer.found.value and "match of MHA" not in explorer.found.value


def test_a_click_moves_the_match(explorer):
    assert re.search(r"<img onclick=\"[^\"]*match-point input[^\"]*\" alt='source'", explorer.source.value)
    before = explorer.source.value, explorer.found.value
    explorer.point.value = "0.3, 0.2"
    assert explorer.source.value != before[0] and explorer.found.value != before[1]


def test_the_point_is_in_shares_of_the_longer_side(explorer):
    pair = explorer.pairs.pairs[0]
    x, y = (float(v) for v in pair.source_points[0])
    longer = max(explorer.pairs.sizes[pair.source])
    explorer.point.value = f"{(x + 0.5) / longer}, {(y + 0.5) / longer}"
    assert explorer.place() == pytest.approx((x, y), abs=1e-3)
    assert "pixels from the truth" in explorer.found.value


def test_identical_pictures_match_at_the_point(explorer):
    pair = explorer.pairs.pairs[0]
    object.__setattr__(pair, "target", pair.source)
    point = (40.0, 30.0)
    found, heat = explorer.find("MHA", point)
    assert abs(found[0] - 40) <= 1 and abs(found[1] - 30) <= 1
    assert heat.shape == tuple(explorer.pairs.sizes[pair.source][::-1])


@pytest.mark.parametrize("text", ["", "x, y", "0.5", "1.2, 0.5", "0.5, -0.1"])
def test_a_point_that_is_none_is_answered(explorer, text):
    explorer.point.value = text
    assert "two shares of its longer side" in explorer.found.value


def test_other_pairs_and_similarity_redraw(explorer):
    for control, value in ((explorer.index, 2), (explorer.heat, True)):
        before = explorer.found.value
        control.value = value
        assert explorer.found.value != before


def test_without_pairs_it_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="SPair-71k is not at"):
        MatchExplorer("demo", root=tmp_path)
