import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from thesis_lib.datasets import rendering, scenes, synthetic
from thesis_lib.datasets.folders import image_folder
from thesis_lib.datasets.imagenet100 import ImageNet100
from thesis_lib.datasets.nights import NIGHTS
from thesis_lib.datasets.scenes import Stream


@pytest.fixture(scope="module")
def nights_root(tmp_path_factory):
    counts = {"train": 8, "val": 4, "test": 12}
    return synthetic.write_nights(tmp_path_factory.mktemp("world") / "nights", counts, seed=3, workers=1)


def test_rendering_is_the_same_bytes_everywhere():
    """The digest was taken once; it changes only with scenes.VERSION (2 changed votes alone)."""
    pictures = [rendering.render(scenes.draw_scene(Stream(1, i)), i, 64).tobytes() for i in range(8)]
    assert (scenes.VERSION, hashlib.sha256(b"".join(pictures)).hexdigest()[:16]) == (2, "399b19f63bca75a8")


def test_views_change_the_picture_but_not_the_judgement():
    scene = scenes.draw_scene(Stream(2, 0))
    first, second = (rendering.render(scene, view, 64).astype(float) for view in (0, 1))
    assert np.abs(first - second).mean() > 10
    assert scenes.dissimilarity(scene, scene) == 0


@pytest.mark.parametrize(
    "name, value", [("kind", 1), ("limbs", 3), ("hue", 3), ("texture", 2), ("large", True), ("heading", 180)]
)
def test_each_factor_shows_in_the_picture_and_weighs_in_the_judgement(name, value):
    blank = scenes.Thing(kind=0, cell=4, heading=0, limbs=0, hue=0, texture=0, large=False)
    scene, edited = (scenes.Scene((thing,), gaze=0) for thing in (blank, scenes.replace(blank, **{name: value})))
    apart = np.abs(rendering.render(scene, 0, 64).astype(int) - rendering.render(edited, 0, 64)).max(-1)
    assert (apart > 30).sum() > 20  # pixels that tell, at the size the demo backbone sees
    assert scenes.dissimilarity(scene, edited) == pytest.approx(scenes.THING_WEIGHTS[name])


def test_dissimilarity_matches_things_whatever_their_order():
    a, b = (scenes.draw_scene(Stream(4, i)) for i in range(2))
    shuffled = scenes.Scene(b.things[::-1], b.gaze)
    assert scenes.dissimilarity(a, b) == pytest.approx(scenes.dissimilarity(a, shuffled))
    assert scenes.dissimilarity(a, b) == pytest.approx(scenes.dissimilarity(b, a))


def test_relations_weigh_beyond_the_things():
    scene = scenes.draw_scene(Stream(5, 0))
    other = scenes.Scene(scene.things, (scene.gaze + 1) % len(scenes.GAZES))
    assert scenes.dissimilarity(scene, other) == pytest.approx(scenes.SCENE_WEIGHTS["gaze"])


def test_inward_things_look_at_each_other():
    for i in range(40):
        scene = scenes.draw_scene(Stream(6, i))
        if scenes.GAZES[scene.gaze] == "inward":
            centres = np.array([scenes.centre(thing.cell) for thing in scene.things])
            towards = centres.mean(0) - centres
            angles = np.deg2rad([thing.heading for thing in scene.things])
            assert (
                (np.cos(angles) * towards[:, 0] + np.sin(angles) * towards[:, 1]) >= 0.99 * np.hypot(*towards.T) - 1e-9
            ).all()


def test_votes_follow_the_dissimilarity_and_are_balanced():
    triplets = [synthetic.draw_triplet(0, 2, i) for i in range(300)]
    assert sum(t.right_vote for t in triplets) == 150
    margins = [scenes.dissimilarity(t.reference, t.left) - scenes.dissimilarity(t.reference, t.right) for t in triplets]
    agree = [(margin > 0) == bool(t.right_vote) for margin, t in zip(margins, triplets, strict=True)]
    assert np.mean(agree) > 0.96
    assert all(synthetic.MIN_VOTES_KEPT <= t.votes <= synthetic.MAX_VOTES for t in triplets)
    assert 0.02 < np.mean([t.votes < 6 for t in triplets]) < 0.2


def test_splits_and_seeds_share_no_triplet():
    drawn = {synthetic.draw_triplet(seed, split, i).views for seed in (0, 1) for split in range(3) for i in range(20)}
    assert len(drawn) == 120


def test_nights_tree_is_read_by_the_real_loader(nights_root):
    table = pd.read_csv(nights_root / "data.csv")
    assert (
        list(table.columns[:9])
        == "id left_vote right_vote votes ref_path left_path right_path split is_imagenet".split()
    )
    row = table.iloc[5]
    assert row.ref_path == "ref/000/005.png" and row.right_path == "distort/000/005_1.png"
    test = NIGHTS(nights_root, "test", min_votes=0)
    assert len(test) == 12 and len(test.paths) == 36
    first = test[0]
    assert first[0].size == (synthetic.SIZE, synthetic.SIZE)
    triplet = synthetic.draw_triplet(3, 2, 0)
    assert first[3] == triplet.right_vote
    assert np.array_equal(np.asarray(first[0]), rendering.render(triplet.reference, triplet.views[0], synthetic.SIZE))


def test_tree_is_written_once_and_never_over_another(nights_root, tmp_path):
    counts = {"train": 8, "val": 4, "test": 12}
    before = (nights_root / "data.csv").stat().st_mtime_ns
    assert synthetic.write_nights(nights_root, counts, seed=3) == nights_root
    assert (nights_root / "data.csv").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="not made by this recipe"):
        synthetic.write_nights(nights_root, counts, seed=4)


def test_a_tree_is_written_by_one_of_two_that_ask_at_once(tmp_path):
    begun, written = threading.Barrier(2), []

    def write(part):
        written.append(part)
        time.sleep(0.3)
        (part / "a.png").touch()

    def ask():
        begun.wait()
        return synthetic.once(tmp_path / "set", {"seed": 1}, write)

    with ThreadPoolExecutor(2) as pool:
        assert {future.result() for future in [pool.submit(ask), pool.submit(ask)]} == {tmp_path / "set"}
    assert len(written) == 1 and (tmp_path / "set" / "a.png").exists()


def test_imagenet100_shards_are_read_by_the_real_loader(tmp_path):
    root = synthetic.write_imagenet100(tmp_path / "in100", {"train": 30, "test": 6}, shard_rows=20, workers=1)
    assert sorted(p.name for p in (root / "data").iterdir())[1] == "train-00000-of-00002.parquet"
    data = ImageNet100(root, "train")
    assert len(data.sources) == 30
    names = json.loads((root / "label2text.json").read_text())
    assert names["4"] == "striped bean" and len(names) == len(synthetic.OBJECT_CLASSES)


def test_scenes_are_a_folder_of_images_that_no_triplet_shows(tmp_path):
    root = synthetic.write_scenes(tmp_path / "scenes", 5, seed=3, workers=1)
    found = image_folder(root)
    assert [path.relative_to(root).as_posix() for path in found] == [f"000/{i:03d}.jpg" for i in range(5)]
    stream = Stream(3, 200, 4)
    expected = rendering.render(scenes.draw_scene(stream), stream.below(2**31), synthetic.SIZE)
    with Image.open(found[4]) as image:
        assert np.abs(np.asarray(image).astype(int) - expected).mean() < 3  # a JPEG
    triplets = [synthetic.draw_triplet(3, split, i) for split in range(3) for i in range(20)]
    shown = {scene for triplet in triplets for scene in (triplet.reference, triplet.left, triplet.right)}
    assert not shown & {scenes.draw_scene(Stream(3, 200, i)) for i in range(20)}


def test_things_stay_where_place_says():
    """Paint a scene twice, with and without a thing: the pixels that change lie around its placement."""
    scene = scenes.draw_scene(Stream(9, 1))
    whole = rendering.render(scene, 7, 128).astype(int)
    fewer = scenes.Scene(scene.things[:2], scene.gaze)
    changed = np.argwhere(np.abs(whole - rendering.render(fewer, 7, 128)).sum(-1) > 60)
    at = rendering.place(scene, 7)[2]
    middle = (changed.mean(0)[::-1] + 0.5) / 64 - 1
    assert np.hypot(*(middle - (at.x, at.y))) < at.radius


def test_pictures_are_written_lossless(nights_root):
    with Image.open(nights_root / "ref/000/000.png") as image:
        assert image.format == "PNG"
