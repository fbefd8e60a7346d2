import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from thesis_lib.correspondence import cache, pck
from thesis_lib.correspondence.cache import features
from thesis_lib.correspondence.evaluate import FeatureMatcher, evaluate, sweep
from thesis_lib.correspondence.features import ViTFeatures


@pytest.fixture
def counted(vit):
    """An extractor that counts the images it sees."""
    extractor = ViTFeatures(vit, (3, 5))
    extractor.seen = 0
    extractor.register_forward_pre_hook(lambda m, inputs: setattr(m, "seen", m.seen + len(inputs[0])))
    return extractor


def read(extractor, pairs, folder, **options):
    with features(extractor, pairs.images, folder=folder, batch_size=2, progress=False, **options) as maps:
        return evaluate(FeatureMatcher(pairs, [(maps, "5")])), [maps.map(i, "3") for i in range(len(maps))]


def test_cached_and_uncached_matches_are_identical(counted, pairs, tmp_path):
    fresh, _ = read(counted, pairs, tmp_path / "f", use_cache=False)
    assert not (tmp_path / "f").exists()
    first, maps = read(counted, pairs, tmp_path / "f")
    again, stored = read(counted, pairs, tmp_path / "f")
    assert counted.seen == 12 and fresh.equals(first) and first.equals(again)
    assert all(torch.equal(a, b) for a, b in zip(maps, stored, strict=True)) and maps[0].dtype == torch.float32


def test_reset_makes_them_again(counted, pairs, tmp_path):
    read(counted, pairs, tmp_path)
    read(counted, pairs, tmp_path, reset_cache=True)
    assert counted.seen == 12


def test_a_changed_setting_never_reads_stale_features(counted, vit, pairs, tmp_path):
    _, before = read(counted, pairs, tmp_path / "f")
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight.add_(0.1)
    _, after = read(counted, pairs, tmp_path / "f")
    assert counted.seen == 12 and not torch.equal(before[0], after[0])
    read(counted, pairs, tmp_path / "f", dtype="bfloat16")
    read(counted, pairs, tmp_path / "f", geometry="pad")
    assert counted.seen == 24 and len(list((tmp_path / "f").iterdir())) == 4


def test_a_changed_image_is_read_again_and_equal_names_do_not_collide(counted, pairs, tmp_path):
    read(counted, pairs, tmp_path / "f")
    pairs.images[0].write_bytes(pairs.images[1].read_bytes())
    _, maps = read(counted, pairs, tmp_path / "f")
    assert counted.seen == 6 and torch.equal(maps[0], maps[1])  # by content: nothing new to see


def test_an_interrupted_run_goes_on_from_its_shards(counted, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 2)
    plain, calls = cache.extract, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(cache, "extract", failing)
    with pytest.raises(KeyboardInterrupt):
        read(counted, pairs, tmp_path)
    read(counted, pairs, tmp_path)
    assert counted.seen == 6  # four before, two after


def test_a_full_disk_is_one_clear_error(counted, pairs, tmp_path, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", full)
        with pytest.raises(RuntimeError, match="cannot write features to .*No space left.*what was finished is kept"):
            read(counted, pairs, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    read(counted, pairs, tmp_path)


def test_a_finished_store_is_read_where_nothing_can_be_written(counted, pairs, tmp_path, monkeypatch):
    read(counted, pairs, tmp_path)

    def refuse(path, write):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(cache.paths, "write_whole", refuse)
    read(counted, pairs, tmp_path)
    assert counted.seen == 6


def test_a_damaged_shard_is_named(counted, pairs, tmp_path):
    read(counted, pairs, tmp_path)
    shard = next(tmp_path.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:7])
    with pytest.raises(RuntimeError, match="damaged.*delete it"):
        read(counted, pairs, tmp_path)


def test_prompts_are_part_of_the_key_where_they_are_read(counted, pairs, tmp_path):
    read(counted, pairs, tmp_path, categories=["a"] * 6)
    read(counted, pairs, tmp_path, categories=["b"] * 6)
    assert counted.seen == 6
    counted.reads_categories = True
    read(counted, pairs, tmp_path, categories=["b"] * 6)
    assert counted.seen == 12


def test_one_pass_scores_every_layer(counted, pairs, tmp_path):
    with features(counted, pairs.images, folder=tmp_path, progress=False) as maps:
        rows = sweep(pairs, maps)
        with pytest.raises(ValueError, match="no features '4', only 3, 5"):
            maps.map(0, "4")
    assert counted.seen == 6 and [(r["layer"], r["column"], r["n"]) for r in rows] == [(3, "token", 5), (5, "token", 5)]


def test_combined_sources_and_padded_frames(counted, pairs, tmp_path):
    with features(counted, pairs.images, folder=tmp_path, geometry="pad", progress=False) as maps:
        sources = [(maps, "3"), (maps, "5")]
        matcher = FeatureMatcher(pairs, sources, protocol=pck.preset("SD+DINO"), co_pca=(8, None), weights=(0.5, 1.0))
        table = evaluate(matcher, chosen=[1, 3])
        assert matcher.maps(pairs.pairs[0])[0].shape == (8 + 128, 8, 8)
    assert set(table["pair"]) == {1, 3} and np.isfinite(table["distance"]).all()
    with pytest.raises(ValueError, match="features of 6 images, but 5"):
        FeatureMatcher(type(pairs)(**vars(pairs) | {"images": pairs.images[:5]}), sources)


def test_identical_images_match_themselves(counted, pairs, tmp_path):
    """In a padded frame and in a squashed one a point of the same image is found where it is, within a cell."""
    pair = pairs.pairs[0]
    same = type(pair)(**vars(pair) | {"target": 0, "target_points": pair.source_points})
    own = type(pairs)(**vars(pairs) | {"pairs": [same]})
    for geometry, readout, cell in (("squash", "argmax", 1.0), ("pad", "patch", 40 / 8)):
        with features(counted, own.images, folder=tmp_path, geometry=geometry, progress=False) as maps:
            protocol = pck.Protocol(readout=readout, geometry=geometry)
            assert evaluate(FeatureMatcher(own, [(maps, "3")], protocol=protocol))["distance"].max() <= cell
