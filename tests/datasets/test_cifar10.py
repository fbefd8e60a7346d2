"""CIFAR-10 in its published python batches, the synthetic world in the same format, and every way it can be broken."""

import hashlib
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest

from thesis_lib.datasets import cifar10, rendering, synthetic_cifar10
from thesis_lib.datasets.cifar10 import CIFAR10, FOLDER, MD5, SUMS, download, main
from thesis_lib.datasets.imagenet100 import ImageNet100
from thesis_lib.datasets.synthetic_cifar10 import LABEL_NAMES, LARGE_NAMES, draw, write_cifar10, write_imagenet100

COUNTS = {"train": 23, "test": 10}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("world") / "cifar10", COUNTS, seed=3)


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "cifar10")


def put(root, name, content, *, protocol=2):
    """Replace one file, and its sum."""
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol)
    (root / FOLDER / name).write_bytes(data)
    sums = dict(line.split()[::-1] for line in (root / FOLDER / SUMS).read_text().splitlines())
    sums[name] = hashlib.md5(data).hexdigest()
    (root / FOLDER / SUMS).write_text("".join(f"{digest}  {key}\n" for key, digest in sums.items()))


def batch(n=4, **changes):
    return {"data": np.zeros((n, 3072), np.uint8), "labels": [0] * n, "batch_label": "b"} | changes


def test_pictures_and_labels_come_back_as_drawn(written):
    train, test = CIFAR10(written, "train"), CIFAR10(written / FOLDER, "test")
    assert train.images.shape == (23, 3, 32, 32) and len(test) == 10
    for split, data, index in ((0, train, 0), (0, train, 22), (1, test, 7)):
        picture, label = draw(3, split, index)
        assert np.array_equal(data.images[index].permute(1, 2, 0).numpy(), picture) and data.labels[index] == label
    assert train.classes == LABEL_NAMES and len(set(LABEL_NAMES)) == 10 and train.labels.dtype == np.int64
    assert test.class_counts.tolist() == [1] * 10 and train.class_counts.sum() == 23


def test_batches_look_as_published(written):
    folder = written / FOLDER
    assert {path.name for path in folder.iterdir()} == {*MD5, SUMS}
    content = pickle.loads((folder / "data_batch_1").read_bytes(), encoding="latin1")
    assert set(content) == {"batch_label", "labels", "data", "filenames"} and content["data"].shape == (5, 3072)
    assert content["batch_label"] == "training batch 1 of 5" and isinstance(content["labels"], list)
    red = content["data"][0, :1024].reshape(32, 32)
    assert np.array_equal(red, draw(3, 0, 0)[0][..., 0])
    assert pickle.loads((folder / "batches.meta").read_bytes())["label_names"] == list(LABEL_NAMES)


def test_the_colours_of_both_things_are_the_class(monkeypatch):
    seen = []
    monkeypatch.setattr(rendering, "render", lambda scene, view, size: seen.append(scene) or np.zeros(0))
    for index in range(60):
        _, label = draw(0, 0, index)
        hues = {thing.hue for thing in seen[-1].things}
        assert hues == {synthetic_cifar10.COLOURS.index(name) for name in LABEL_NAMES[label].split(" and ")}
    places = {tuple(thing.cell for thing in scene.things) for scene in seen}
    assert places == set(synthetic_cifar10.PLACES)
    assert len({scene.things[0].hue for scene in seen[::10]}) > 1  # either colour may come first


def test_it_is_written_once_and_splits_differ(written):
    before = (written / FOLDER / "test_batch").stat().st_mtime_ns
    assert write_cifar10(written, COUNTS, seed=3) == written
    assert (written / FOLDER / "test_batch").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="not made by this recipe"):
        write_cifar10(written, COUNTS, seed=4)
    with pytest.raises(ValueError, match="at least 5"):
        write_cifar10(written.parent / "other", {"train": 4, "test": 1})
    assert not np.array_equal(draw(3, 0, 0)[0], draw(3, 1, 0)[0])


def test_the_same_scenes_are_written_as_imagenet100(tmp_path):
    root = write_imagenet100(tmp_path / "in100", {"train": 15, "validation": 3, "test": 30}, size=48)
    train, test = ImageNet100(root, "train"), ImageNet100(root, "test")
    assert train.classes == list(LARGE_NAMES) and len(train.classes) == 15 and train.class_counts.tolist() == [1] * 15
    picture, label = draw(0, 4, 20, names=LARGE_NAMES, size=48)
    assert test[20][1] == label and np.abs(np.asarray(test[20][0]).astype(int) - picture).mean() < 4  # JPEG
    assert write_imagenet100(root, {"train": 15, "validation": 3, "test": 30}, size=48) == root


class Python2Pickler(pickle._Pickler):
    """Write text and bytes as Python 2's str, and numpy's function under its old name, as in the published files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)

    def save_global(self, value, name=None):
        module = "numpy.core.multiarray" if value.__name__ == "_reconstruct" else value.__module__
        self.write(b"c" + module.encode() + b"\n" + value.__name__.encode() + b"\n")

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[type] = dispatch[type(draw)] = save_global


def test_what_python_2_wrote_is_read(root, tmp_path):
    expected = CIFAR10(root, "train")
    for name in [*cifar10.SPLITS["train"], "batches.meta"]:
        content = pickle.loads((root / FOLDER / name).read_bytes())
        with open(tmp_path / "old", "wb") as file:
            Python2Pickler(file, 2).dump(content)
        old = (tmp_path / "old").read_bytes()
        assert b"_codecs" not in old
        put(root, name, old)
    read = CIFAR10(root, "train")
    assert np.array_equal(read.images, expected.images) and read.classes == expected.classes
    put(root, "data_batch_1", {key.encode(): value for key, value in batch().items()}, protocol=4)
    assert len(CIFAR10(root, "train")) == 22


def test_a_wrong_md5_is_refused_before_unpickling(root, monkeypatch):
    path = root / FOLDER / "data_batch_1"
    path.write_bytes(path.read_bytes() + b" ")
    monkeypatch.setattr(cifar10, "_Unpickler", None)
    with pytest.raises(
        RuntimeError, match=r"data_batch_1 has the md5 [0-9a-f]{32}, expected [0-9a-f]{32}.*fetch it again"
    ):
        CIFAR10(root)


def test_published_sums_hold_where_no_others_are_given(root):
    (root / FOLDER / SUMS).unlink()
    with pytest.raises(RuntimeError, match=f"expected {MD5['data_batch_1']}"):
        CIFAR10(root)
    (root / FOLDER / SUMS).write_text("0" * 32 + "  test_batch\n")
    with pytest.raises(RuntimeError, match="MD5SUMS does not name it"):
        CIFAR10(root)
    (root / FOLDER / SUMS).write_text("0" * 32 + "\n")
    with pytest.raises(ValueError, match="MD5SUMS must hold an md5 and a file name a line"):
        CIFAR10(root)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_something_is_refused(root, tmp_path, protocol):
    put(root, "test_batch", batch(extra=Evil(str(tmp_path / "written"))), protocol=protocol)
    with pytest.raises(
        ValueError, match=r"test_batch is no pickle of arrays and plain values only: it asks for \w+\.open"
    ):
        CIFAR10(root, "test")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02nonsense", "no pickle of arrays"),
        ([1, 2], "holds a list, not a dictionary"),
        ({"labels": [0]}, "no entry 'data'; it has labels"),
        (batch(data=np.zeros((4, 3072))), r"uint8 \(n, 3072\), not float64"),
        (batch(data=np.zeros((4, 3000), np.uint8)), r"not uint8 \(4, 3000\)"),
        (batch(labels=[0, 1]), "4 images, and labels of shape"),
        (batch(labels=["cat"] * 4), "labels of shape"),
        (batch(labels=[0, 1, 10, -1]), r"does not name: \[-1, 10\]"),
    ],
)
def test_a_broken_batch_is_refused(root, content, message):
    put(root, "test_batch", content)
    with pytest.raises(ValueError, match=message):
        CIFAR10(root, "test")


def test_an_empty_split_is_refused(root):
    put(root, "test_batch", batch(0), protocol=4)
    with pytest.raises(ValueError, match="'test' of .* is empty"):
        CIFAR10(root, "test")


def test_a_missing_set_or_batch_says_what_and_where(root, tmp_path):
    (root / FOLDER / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="(?s)no data_batch_4.*170 MB.*toronto.*download.*in 07's `datasets`"):
        CIFAR10(root)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CIFAR10(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        CIFAR10(root, "trian")


def archive(folder, members):
    path = folder / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for source, name in members:
            tar.add(source, name)
    return path


def test_download_unpacks_what_was_published_once(written, tmp_path, monkeypatch, capsys):
    import pooch

    path, asked = archive(tmp_path, [(written / FOLDER, FOLDER)]), []
    monkeypatch.setattr(pooch, "retrieve", lambda *args, **options: asked.append((args, options)) or str(path))
    main(["download", str(tmp_path / "root")])
    assert "CIFAR-10 is at" in capsys.readouterr().out and len(CIFAR10(tmp_path / "root")) == 23
    assert asked[0][0] == (cifar10.URL, f"md5:{cifar10.ARCHIVE_MD5}") and asked[0][1]["progressbar"]
    download(tmp_path / "root")
    assert len(asked) == 1


def test_download_refuses_a_wrong_archive_and_one_that_leaves_its_folder(written, tmp_path, monkeypatch, capsys):
    import pooch

    path = archive(tmp_path, [(written / FOLDER / "test_batch", "../escaped")])
    monkeypatch.setattr(pooch, "retrieve", lambda *args, **options: str(path))
    with pytest.raises(tarfile.OutsideDestinationError):
        download(tmp_path / "root")
    assert not (tmp_path / "escaped").exists()

    def wrong(*args, **options):
        raise ValueError("MD5 hash of downloaded file does not match")

    monkeypatch.setattr(pooch, "retrieve", wrong)
    with pytest.raises(SystemExit):
        main(["download", str(tmp_path / "root")])
    assert "could not be fetched" in capsys.readouterr().err
