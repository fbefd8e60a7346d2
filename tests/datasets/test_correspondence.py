import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from thesis_lib.datasets import correspondence, correspondence_download, rendering, scenes
from thesis_lib.datasets import synthetic_correspondence as world
from thesis_lib.datasets.correspondence import cub200, load, pf_willow, spair71k
from thesis_lib.datasets.pairs import subset
from thesis_lib.datasets.scenes import Scene, Stream, Thing
from thesis_lib.datasets.synthetic_willow_cub import write_cub, write_willow


def picture(path: Path, size: tuple[int, int] = (50, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)


def entry(**changes) -> dict:
    """A pair file as published, of two 50 x 40 pictures of cats."""
    points = {"src_kps": [[3, 4], [20, 10]], "trg_kps": [[5, 6], [30, 39]], "kps_ids": ["0", "7"]}
    names = {"pair_id": 1, "category": "cat", "src_imname": "2008_1.jpg", "trg_imname": "2008_2.jpg", "mirror": 0}
    sizes = {"src_imsize": [50, 40, 3], "trg_imsize": [50, 40, 3]}
    boxes = {"src_bndbox": [0, 0, 30, 30], "trg_bndbox": [5, 6, 45, 39]}
    factors = {"viewpoint_variation": 2, "scale_variation": 1, "truncation": 3, "occlusion": 0}
    poses = {"src_pose": "Left", "trg_pose": "Rear"}
    return names | sizes | boxes | points | factors | poses | changes


@pytest.fixture
def spair(tmp_path) -> Path:
    """A tree of one good pair; `add` puts another beside it."""
    for name in ("2008_1", "2008_2"):
        picture(tmp_path / "JPEGImages" / "cat" / f"{name}.jpg")
    (tmp_path / "Layout" / "large").mkdir(parents=True)
    (tmp_path / "PairAnnotation" / "test").mkdir(parents=True)
    add(tmp_path, "000001-2008_1-2008_2:cat", json.dumps(entry()))
    return tmp_path


def add(root: Path, name: str, text: str | None) -> None:
    if text is not None:
        (root / "PairAnnotation" / "test" / f"{name}.json").write_text(text)
    with (root / "Layout" / "large" / "test.txt").open("a") as file:
        file.write(name + "\n")


def test_spair_reads_the_published_tree(spair):
    pairs = spair71k(spair)
    (pair,) = pairs.pairs
    assert [path.name for path in pairs.images] == ["2008_1.jpg", "2008_2.jpg"] and pairs.sizes.tolist() == [
        [50, 40]
    ] * 2
    assert (pair.category, pair.source, pair.target, pair.keypoints) == ("cat", 0, 1, ("0", "7"))
    assert pair.source_points.dtype == np.float32 and pair.target_points.tolist() == [[5, 6], [30, 39]]
    assert pair.target_box.tolist() == [5, 6, 45, 39]
    assert pair.factors == {"viewpoint": 2, "scale": 1, "truncation": 3, "occlusion": 0}
    assert pairs.categories == ["cat", "cat"] and pairs.skipped == {}


BAD = {
    "a missing image": (json.dumps(entry(trg_imname="2008_9.jpg")), "2008_9.jpg is missing"),
    "an image outside": (json.dumps(entry(trg_imname="../../../x.jpg")), "leaves the data set's root"),
    "no JSON": ('{"pair_id": 1,', "is no JSON"),
    "no file": (None, "is missing"),
    "a missing key": (json.dumps({"category": "cat"}), "KeyError"),
    "a point outside": (json.dumps(entry(src_kps=[[3, 4], [51, 10]])), "1 key-points lie outside"),
    "a negative point": (json.dumps(entry(trg_kps=[[-1, -1], [5, 6]])), "1 key-points lie outside"),
    "no visible point": (json.dumps(entry(src_kps=[], trg_kps=[], kps_ids=[])), "no key-point is visible"),
    "uneven points": (json.dumps(entry(src_kps=[[3, 4]])), "2 key-points are named"),
    "another size": (json.dumps(entry(src_imsize=[40, 50, 3])), "measures"),
    "an empty box": (json.dumps(entry(trg_bndbox=[5, 6, 5, 39])), "is empty"),
    "an endless box": (json.dumps(entry(trg_bndbox=[5, 6, float("inf"), 39])), "is empty or endless"),
    "a mirrored pair": (json.dumps(entry(mirror=1)), "mirrored"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_pair_is_named_and_counted(spair, what):
    text, reason = BAD[what]
    add(spair, "000002-bad:cat", text)
    with pytest.raises(ValueError, match="1 pairs of SPair-71k test are unusable .000002-bad:cat: ") as caught:
        spair71k(spair)
    assert reason in str(caught.value)
    pairs = spair71k(spair, on_error="skip")
    assert len(pairs) == 1 and list(pairs.skipped) == ["000002-bad:cat"] and reason in pairs.skipped["000002-bad:cat"]


def test_a_broken_image_is_named(spair):
    (spair / "JPEGImages" / "cat" / "2008_2.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="2008_2.jpg is not an image"):
        spair71k(spair)
    with pytest.raises(ValueError, match="no usable pair"):
        spair71k(spair, on_error="skip")


def test_a_missing_set_says_what_size_and_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)70,958 pairs.*postech.*_download SPair-71k.*08's `datasets`"):
        load("SPair-71k", tmp_path)
    with pytest.raises(FileNotFoundError, match="test_pairs_pf.csv"):
        load("PF-WILLOW", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'CUB-200-2011'"):
        load("CUB-200", tmp_path)


def test_a_misspelt_split_is_answered(spair):
    with pytest.raises(ValueError, match="did you mean 'test'"):
        spair71k(spair, "tst")


def test_subsets_are_nested_and_deterministic():
    assert (
        subset(50, 5) == subset(50, 5) and set(subset(50, 5)) < set(subset(50, 20)) and subset(5, None) == [*range(5)]
    )
    with pytest.raises(ValueError, match="at least 1"):
        subset(5, 0)


def willow_row(a: str, b: str, first: np.ndarray, second: np.ndarray) -> list:
    return [a, b, *first[:, 0], *first[:, 1], *second[:, 0], *second[:, 1]]


@pytest.mark.parametrize("renamed", [False, True])
def test_willow_boxes_leave_padded_points_out(tmp_path, renamed):
    names = [f"PF-dataset/car(G)/{n}.png" for n in "ab"]
    for name in names:
        picture(tmp_path / (name.removeprefix("PF-dataset/") if renamed else name))
    points = np.stack([np.arange(10) * 4.0, np.arange(10) * 3.5 + 0.25], axis=1)
    padded = points.copy()
    padded[7:] = -1
    rows = [willow_row(*names, points, points + 1), willow_row(*names, padded, padded)]
    pd.DataFrame(rows).to_csv(tmp_path / "test_pairs_pf.csv", index=False)
    whole, part = pf_willow(tmp_path).pairs
    assert whole.category == "car" and whole.target_box.tolist() == [1, 1.25, 37, 32.75]
    assert part.keypoints == tuple("0123456") and part.target_box.tolist() == [0, 0.25, 24, 21.25]


@pytest.mark.parametrize("content", [b"", b'a,b\n"1,2\n', b"caf\xe9,b\n"])
def test_a_list_of_willow_that_is_no_csv_is_named(tmp_path, content):
    (tmp_path / "test_pairs_pf.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_pairs_pf\.csv is not a readable csv"):
        pf_willow(tmp_path)


def test_cub_pairs_are_those_of_a_class_and_split(tmp_path):
    files = {
        "images.txt": "1 001.A/x.jpg\n2 001.A/y.jpg\n3 002.B/z.jpg\n4 001.A/t.jpg\n5 002.B/w.jpg\n",
        "classes.txt": "1 001.A\n2 002.B\n",
        "image_class_labels.txt": "1 1\n2 1\n3 2\n4 1\n5 2\n",
        "train_test_split.txt": "1 0\n2 0\n3 0\n4 1\n5 0\n",
        "bounding_boxes.txt": "\n".join(f"{i} 2.0 3.0 20.5 30.0" for i in range(1, 6)) + "\n",
        "parts/part_locs.txt": "\n".join(
            f"{i} {p} {p + 0.25} {p + i + 300 / 512} {int(not (i == 5 and p < 3 or i == 3 and p == 3))}"
            for i in range(1, 6) for p in range(1, 4)
        ) + "\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for line in files["images.txt"].splitlines():
        picture(tmp_path / "images" / line.split()[1])
    pairs = cub200(tmp_path)
    (pair,) = pairs.pairs
    assert pair.category == "A" and [p.stem for p in pairs.images] == ["x", "y"]
    assert pair.target_box.tolist() == [2, 3, 22.5, 33] and pair.keypoints == ("1", "2", "3")
    assert pair.source_points[0].tolist() == [1.25, 2 + 300 / 512]  # float32 keeps what float16 would round
    assert list(pairs.skipped.values()) == ["no part is visible in both images"]  # counted, not an error
    with pytest.raises(ValueError, match="no usable pair"):
        cub200(tmp_path, "train")
    for name, text in {
        "bounding_boxes.txt": "1 2.0 3.0 20.5 30.0\n",
        "classes.txt": "2 002.B\n",
        "images.txt": "\n".join(f"{i} 001.A/x.jpg" for i in range(1, 6)),
        "image_class_labels.txt": files["image_class_labels.txt"] + "1 1\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="no whole copy of CUB-200-2011.*(lacks|twice|several)"):
            cub200(tmp_path, on_error="skip")
        (tmp_path / name).write_text(files[name])
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ValueError, match="no whole copy of CUB-200-2011.*classes.txt"):
        cub200(tmp_path)


def test_archives_that_leave_their_folder_are_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("../evil", "x")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.add(tmp_path / "x", "../evil")
    (tmp_path / "in").mkdir()
    for name in ("a.zip", "a.tar"):
        with pytest.raises(ValueError, match="is refused"):
            correspondence_download.unpack(tmp_path / name, tmp_path / "in")
    assert not (tmp_path / "evil").exists()


def test_download_fetches_every_file_and_unpacks(tmp_path, monkeypatch):
    fetched = []

    def retrieve(url, checksum, fname, path, progressbar):
        fetched.append((url, checksum))
        with tarfile.open(path / fname, "w:gz") as file:
            file.add(__file__, "CUB_200_2011/images.txt")
        return path / fname

    monkeypatch.setattr(correspondence_download.pooch, "retrieve", retrieve)
    root = correspondence_download.download("CUB-200-2011", tmp_path)
    assert (root / "images.txt").is_file() and fetched[0][1].startswith("md5:")
    (root / "images.txt").unlink()
    (root / "notes.txt").write_text("mine")
    correspondence_download.download("CUB-200-2011", tmp_path)
    assert {path.name for path in root.iterdir()} == {"images.txt", "notes.txt"}


def packed(path: Path, files: dict[str, bytes]) -> Path:
    """Make a .zip or .tar.gz; random bytes fill more than one of its blocks."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


NOISE = np.random.default_rng(0).bytes(300_000)
PAGE = b"<html>moved</html>"


def holed(data: bytes) -> bytes:
    return data[:99] + bytes(99) + data[198:]


@pytest.mark.parametrize(
    ("name", "folder", "damage", "message", "kept"),
    [
        ("SPair-71k.tar.gz", "SPair-71k", lambda data: PAGE, "not a whole archive", set()),
        ("SPair-71k.tar.gz", "SPair-71k", lambda data: data[:400_000], "not a whole archive", set()),
        (
            "SPair-71k.tar.gz",
            "SPair-71k",
            holed,
            "not a whole archive",
            set(),
        ),
        ("SPair-71k.tar.gz", "other", lambda data: data, "holds no folder SPair-71k", {"other", "a", "b"}),
        ("PF-dataset.zip", "PF-dataset", lambda data: data[:-20], "not a whole archive", set()),
        ("PF-dataset.zip", "PF-dataset", holed, "not a whole archive", set()),
        (
            "test_pairs_pf.csv",
            "PF-dataset",
            lambda data: PAGE,
            "a web page",
            {"PF-dataset.zip", "PF-dataset", "a", "b"},
        ),
    ],
)
def test_a_file_that_is_not_whole_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, name, folder, damage, message, kept
):
    def retrieve(url, checksum, fname, path, progressbar):
        whole = packed(path / fname, {f"{folder}/{n}": NOISE for n in ("a", "b")})
        if fname == name:
            whole.write_bytes(damage(whole.read_bytes()))
        return whole

    monkeypatch.setattr(correspondence_download.pooch, "retrieve", retrieve)
    with pytest.raises(SystemExit) as ended:
        correspondence_download.main(["SPair-71k" if "SPair" in name else "PF-WILLOW", str(tmp_path / "sets")])
    assert ended.value.code == 1
    assert re.search(rf"/{name} is not what was published .*{message}.*: delete it, ", capsys.readouterr().err)
    assert {path.name for path in (tmp_path / "sets").rglob("*")} - {"PF-WILLOW"} == kept | {name}


def test_what_cannot_be_fetched_ends_the_command_with_one_message(tmp_path, monkeypatch, capsys):
    def retrieve(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(correspondence_download.pooch, "retrieve", retrieve)
    with pytest.raises(SystemExit) as ended:
        correspondence_download.main(["SPair-71k", str(tmp_path)])
    assert ended.value.code == 1
    assert re.fullmatch(r"SPair-71k could not be fetched from https://\S+: no network\n", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------- the synthetic world


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    counts = {"trn": 8, "test": 6, "moved": 6, "layout": 6}
    return world.write_spair(tmp_path_factory.mktemp("world") / "SPair-71k", counts, workers=1)


def test_the_tree_is_read_whole_and_its_splits_share_no_picture(tree):
    splits = {name: spair71k(tree, name) for name in ("trn", "test", "moved", "layout")}
    assert {name: len(pairs) for name, pairs in splits.items()} == {"trn": 8, "test": 6, "moved": 6, "layout": 6}
    digests = [path.read_bytes() for pairs in splits.values() for path in pairs.images]
    assert len(set(digests)) == len(digests)
    assert all(len(pair.keypoints) >= world.COMMON for pairs in splits.values() for pair in pairs.pairs)
    annotated = json.loads(next((tree / "ImageAnnotation").rglob("*.json")).read_text())
    assert {"filename", "kps", "bndbox", "pose", "azimuth_id", "truncated", "occluded", "image_width"} <= set(annotated)
    assert world.write_spair(tree, {"trn": 8, "test": 6, "moved": 6, "layout": 6}, workers=1) == tree  # done already


def test_moved_and_layout_part_where_from_what(tree):
    apart = {}
    for name in ("moved", "layout"):
        pairs = spair71k(tree, name).pairs
        box = [(p.target_box[2:] - p.target_box[:2]).max() for p in pairs]
        moves = [np.hypot(*(p.source_points - p.target_points).T) / b for p, b in zip(pairs, box, strict=True)]
        apart[name] = np.concatenate(moves)
    assert np.median(apart["moved"]) > 0.3 and np.median(apart["layout"]) < 0.1
    assert {pair.category for pair in spair71k(tree, "layout").pairs} == {"mixed"}


def test_key_points_lie_where_the_renderer_paints_them():
    thing = Thing(kind=0, cell=4, heading=90, limbs=2, hue=0, texture=0, large=True)
    picture = world.photograph(Scene((thing,), gaze=0), 0, 5, (0, 0, 160, 160))
    pixel = lambda key: picture.pixels[round(picture.points[key][1]), round(picture.points[key][0])].astype(int)
    assert pixel("0").max() < 40 and pixel("4").max() > 60  # the eye is black, the flank coloured
    x = {key: picture.points[key][0] for key in ("3", "4", "7", "8")}
    y = {key: picture.points[key][1] for key in ("0", "5")}
    assert y["0"] > y["5"] and x["3"] > x["4"] and x["7"] > x["8"]  # it faces the viewer: its left is on the right
    assert set(picture.points) == {"0", "1", "2", "3", "4", "5", "7", "8", "9"}  # two limbs and no tail
    assert picture.mask[round(picture.points["3"][1]), round(picture.points["3"][0])]
    left, top, right, bottom = picture.box
    assert picture.mask[top:bottom, left:right].sum() == picture.mask.sum()


def test_what_is_covered_or_cut_off_is_not_visible():
    below = Thing(kind=0, cell=4, heading=0, limbs=3, hue=0, texture=0, large=True)
    above = scenes.replace(below, heading=180, kind=1)
    view = 3
    seen = world.photograph(Scene((below, above), gaze=0), 0, view, (0, 0, 160, 160))
    top = world.photograph(Scene((below, above), gaze=0), 1, view, (0, 0, 160, 160))
    assert seen.occluded and not top.occluded and len(seen.points) < len(top.points) == 10
    cut = world.photograph(Scene((below, above), gaze=0), 1, view, (80, 0, 80, 160))
    assert cut.truncated and all(0 <= x < 80 for x, _ in cut.points.values()) and len(cut.points) < 10


def test_limbs_are_those_of_the_renderer():
    for count, angles in rendering.LIMB_ANGLES.items():
        assert sorted(world.LIMBS[count].values()) == sorted(angles)


def test_pairs_carry_viewpoint_and_scale_variation():
    small, large = (world.draw_picture((1, 2, i), 0, crowded=crowded) for i, crowded in ((0, True), (3, False)))
    names = ("a.jpg", "b.jpg")
    turned = world.Picture(**vars(small) | {"heading": (small.heading + 180) % 360})
    shrunk = world.Picture(**vars(small) | {"mask": small.mask & (np.arange(small.mask.shape[1]) % 4 == 0)})
    assert world.pair_entry(0, names, "disc", (small, small))["viewpoint_variation"] == 0
    assert world.pair_entry(0, names, "disc", (small, turned))["viewpoint_variation"] == 2
    assert world.pair_entry(0, names, "disc", (small, small))["scale_variation"] == 0
    assert world.pair_entry(0, names, "disc", (small, shrunk))["scale_variation"] == 2
    assert large.points


def test_willow_and_cub_trees_are_read(tmp_path):
    willow = pf_willow(write_willow(tmp_path / "w", 9, images=3, workers=1))
    assert len(willow) == 9 and all(len(pair.keypoints) == 10 for pair in willow.pairs)
    cub = cub200(write_cub(tmp_path / "c", images=6, workers=1))
    assert len(cub) + len(cub.skipped) == 6 * 3  # three test pictures a class make three pairs
    assert {pair.category for pair in cub.pairs} <= {kind.capitalize() for kind in scenes.KINDS}
    with pytest.raises(ValueError, match="from 1 to 18 pairs"):
        write_willow(tmp_path / "x", 19, images=3)


def test_too_few_pictures_are_reported(tmp_path):
    with pytest.raises(ValueError, match="allow more than 2 images"):
        world.write_spair(tmp_path / "s", {"test": 60}, images={"test": 2}, workers=1)


def test_stream_keys_of_the_splits_differ():
    assert Stream(0, 202, 0, 0, 0).below(2**31) != Stream(0, 202, 2, 0, 0).below(2**31)
    assert correspondence.DATASETS.keys() == correspondence_download.SOURCES.keys()
