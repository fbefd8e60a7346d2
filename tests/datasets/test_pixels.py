"""The pixel cache: DreamSim's geometry, nothing decoded twice, nothing corrupt ever used."""

import errno
import io
import os
import pickle
import resource
import sqlite3
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, Resize

from thesis_lib import paths
from thesis_lib.datasets import pixel_store, pixels
from thesis_lib.datasets.folders import image_folder

SIZE = 16
RECORD = 3 * SIZE * SIZE


def image(seed: int, size=(40, 24), mode="RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    picture = Image.fromarray(values)  # RGBA
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


@pytest.fixture
def tree(tmp_path):
    """Twelve PNG files, and the cache's arguments."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(12):
        image(seed).save(folder / f"{seed:02d}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def cache(tmp_path):
    def call(sources, size=SIZE, **options):
        return pixels.cache(sources, size, **{"folder": tmp_path / "cache", "progress": False, "workers": 2} | options)

    return call


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images decoded since."""
    names, decode = [], pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda *arguments: names.append(arguments[3]) or decode(*arguments))
    return names


def expected(path, size=SIZE, interpolation=InterpolationMode.BICUBIC) -> torch.Tensor:
    with Image.open(path) as opened:
        resized = Resize((size, size), interpolation)(opened.convert("RGB"))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_geometry_is_dreamsims(tmp_path, cache, mode, interpolation):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image(3, size=(50, 31), mode=mode).save(path)
    found = cache([path], interpolation=interpolation)[0]
    assert found.dtype == torch.uint8 and found.shape == (3, SIZE, SIZE)
    assert torch.equal(found, expected(path, interpolation=InterpolationMode(interpolation)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_of_16_bit_grey_the_upper_byte_is_taken(tmp_path, cache, suffix):
    grey = np.random.default_rng(0).integers(0, 65536, (31, 50), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"deep.{suffix}")
    Image.fromarray((grey // 256).astype(np.uint8)).save(tmp_path / "grey.png")
    found = cache([tmp_path / f"deep.{suffix}", tmp_path / "grey.png"])
    assert torch.equal(found[0], found[1]) and len(found[0].unique()) > 10


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_grey_whose_white_nobody_knows_is_named_or_skipped(tmp_path, cache, tree, dtype, mode):
    path = tmp_path / "depth.tif"
    Image.fromarray(np.arange(1000).reshape(20, 50).astype(dtype)).save(path)
    with pytest.raises(ValueError, match=rf"depth\.tif has the mode {mode}.*on_error='skip'"):
        cache([path])
    found = cache([tree[0], path], on_error="skip")
    assert found.usable.tolist() == [True, False] and f"the mode {mode}" in found.skipped[0]


@pytest.mark.parametrize(
    "indices", [[3, 0, 3], np.array([11, -1]), torch.tensor([5, 2]), slice(2, 9, 3), np.arange(12) % 2 == 0, []]
)
def test_indexing_follows_the_order_asked_for(tree, cache, indices):
    found = cache(tree)
    positions = np.arange(12)[indices]
    batch = found[indices]
    assert batch.shape == (len(positions), 3, SIZE, SIZE) and len(found) == 12
    for k, position in enumerate(positions):
        assert torch.equal(batch[k], expected(tree[position]))


def test_an_index_beyond_the_end_is_refused(tree, cache):
    with pytest.raises(IndexError):
        cache(tree)[[12]]


def test_a_second_call_opens_no_file(tree, cache, decoded, monkeypatch):
    cache(tree[:8])
    assert sorted(decoded) == [str(path) for path in tree[:8]]
    monkeypatch.setattr(pixels.File, "read", lambda self: pytest.fail(f"read {self.key}"))
    assert torch.equal(cache(tree[7::-1])[0], expected(tree[7]))
    assert len(decoded) == 8


def test_equal_content_is_stored_and_decoded_once(tree, cache, decoded, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(tree[4].read_bytes())
    found = cache([*tree, tree[4]])
    more = cache([copy])
    assert len(decoded) == 12
    assert (tmp_path / "cache" / f"{SIZE}px-bicubic.uint8").stat().st_size == 12 * RECORD
    assert torch.equal(more[0], found[4]) and torch.equal(found[12], found[4])
    assert more.digests[0] == found.digests[4] and len(set(found.digests)) == 12


def test_a_changed_file_is_decoded_again(tree, cache):
    before = cache(tree)
    image(99).save(tree[0])
    after = cache(tree)
    assert torch.equal(after[0], expected(tree[0])) and not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])


def test_sizes_and_interpolations_do_not_mix(tree, cache):
    assert torch.equal(cache(tree, 8)[2], expected(tree[2], 8))
    assert torch.equal(cache(tree, 8, interpolation="nearest")[2], expected(tree[2], 8, InterpolationMode.NEAREST))
    assert torch.equal(cache(tree, 8)[2], expected(tree[2], 8))


def test_the_default_folder_is_the_projects_cache(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "elsewhere")
    pixels.cache(tree[:1], SIZE, progress=False)
    assert (tmp_path / "elsewhere" / "pixels" / f"{SIZE}px-bicubic.uint8").stat().st_size == RECORD


def test_a_truncated_image_is_named_and_stops_the_run_but_loses_nothing(tree, cache, decoded):
    tree[9].write_bytes(tree[9].read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"09\.png is not a whole image: .*on_error='skip'"):
        cache(tree, workers=1)
    image(9).save(tree[9])
    decoded.clear()
    cache(tree)
    assert not {str(path) for path in tree[:9]} & set(decoded)


def test_skipped_images_are_counted_named_and_never_read(tree, cache):
    tree[3].write_bytes(tree[3].read_bytes()[:100])
    tree[5].write_bytes(b"not an image")
    tree[8].unlink()
    found = cache(tree, on_error="skip")
    assert len(found) == 12 and np.flatnonzero(~found.usable).tolist() == [3, 5, 8]
    assert [message.split(" ")[0] for message in found.skipped] == [str(tree[k]) for k in (3, 5, 8)]
    assert torch.equal(found[[4, 6]], torch.stack([expected(tree[4]), expected(tree[6])]))
    with pytest.raises(IndexError, match=r"05\.png was skipped"):
        found[[4, 5]]
    image(3).save(tree[3])
    assert np.flatnonzero(~cache(tree, on_error="skip").usable).tolist() == [5, 8]


def dds(flags: int) -> bytes:
    """The header of a DDS file, whose pixel format no decoder knows."""
    numbers = [124, 0x1007, 16, 16, *[0] * 14, 32, flags, *[0] * 11]
    return b"DDS " + np.array(numbers, "<u4").tobytes() + bytes(1024)


def spider() -> bytes:
    """A SPIDER file that claims to be part of a stack which is not there."""
    header = np.zeros(32, ">f4")
    header[[0, 1, 4, 11, 12, 21, 22, 26]] = [1, 32, 1, 32, 1, 128, 128, 1]
    return header.tobytes() + bytes(4096)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (spider(), "'SpiderImageFile' object has no attribute 'stkoffset'"),
        (dds(8192), "Unknown pixel format flags 8192"),  # NotImplementedError, as RuntimeErrors are
        (b"no image", "no image format that Pillow knows"),  # Pillow would name the buffer's place in memory
    ],
)
def test_whatever_pillow_says_of_an_image_it_is_named_in_the_same_words(data, reason):
    with pytest.raises(ValueError) as error:
        pixels.read_rgb(data, "1.jpg")
    assert str(error.value) == f"1.jpg is not a whole image: {reason}"


def test_an_image_that_went_bad_is_not_served_from_its_old_record(tree, cache):
    cache(tree)
    tree[2].write_bytes(b"overwritten")
    assert not cache(tree, on_error="skip").usable[2]


def test_an_interrupted_run_goes_on(tree, cache, decoded, monkeypatch):
    monkeypatch.setattr(pixels, "COMMIT_EVERY", 4)
    append, calls = pixel_store.Index.append, []

    def interrupted(self, *arguments):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(append(self, *arguments))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pixel_store.Index, "append", interrupted)
        cache(tree, workers=1)
    decoded.clear()
    found = cache(tree)
    assert sorted(decoded) == [str(path) for path in tree[6:]]  # all six that were written are kept
    assert torch.equal(found[:], torch.stack([expected(path) for path in tree]))


def test_a_killed_run_goes_on(tree, cache, decoded, tmp_path):
    """A hard kill between a write and its commit leaves records that the index does not know."""
    script = f"""
import os
from thesis_lib.datasets import pixel_store, pixels
pixels.COMMIT_EVERY, commit, done = 5, pixel_store.Index.commit, []
def dying(self, digests, keys):
    if done: os._exit(9)
    done.append(commit(self, digests, keys))
pixel_store.Index.commit = dying
pixels.cache({[str(path) for path in tree]!r}, {SIZE}, folder={str(tmp_path / "cache")!r}, workers=1, progress=False)
"""
    data = tmp_path / "cache" / f"{SIZE}px-bicubic.uint8"
    assert subprocess.run([sys.executable, "-c", script], cwd=paths.ROOT, timeout=60).returncode == 9
    assert data.stat().st_size == 10 * RECORD
    with data.open("ab") as file:
        file.write(b"half a record")
    found = cache(tree)
    assert sorted(decoded) == [str(path) for path in tree[5:]] and data.stat().st_size == 12 * RECORD
    assert torch.equal(found[:], torch.stack([expected(path) for path in tree]))


def test_lost_records_are_made_again(tree, cache, decoded, tmp_path):
    cache(tree, workers=1)
    os.truncate(tmp_path / "cache" / f"{SIZE}px-bicubic.uint8", 7 * RECORD + 5)
    decoded.clear()
    found = cache(tree)
    assert sorted(decoded) == [str(path) for path in tree[7:]]
    assert torch.equal(found[:], torch.stack([expected(path) for path in tree]))


def corrupt(data, row):
    with data.open("r+b") as file:
        file.seek(row * RECORD + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def test_a_flipped_bit_is_found_and_mended_from_the_source(tree, cache, tmp_path):
    cache(tree, workers=1)
    corrupt(tmp_path / "cache" / f"{SIZE}px-bicubic.uint8", 6)
    found = cache(tree)
    found[:6]
    with pytest.warns(RuntimeWarning, match=r"06\.png in .* is corrupt; it is made again"):
        assert torch.equal(found[5:8], torch.stack([expected(path) for path in tree[5:8]]))
    assert torch.equal(cache(tree)[6], expected(tree[6]))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(lambda path: path.unlink(), "source cannot be read"), (lambda path: image(77).save(path), "has changed since")],
)
def test_a_flipped_bit_without_its_source_is_refused(tree, cache, tmp_path, spoil, reason):
    found = cache(tree, workers=1)
    corrupt(tmp_path / "cache" / f"{SIZE}px-bicubic.uint8", 6)
    spoil(tree[6])
    with pytest.raises(RuntimeError, match=rf"06\.png in .* is corrupt, and its .*{reason}"):
        found[[6]]
    assert torch.equal(found[[5]][0], expected(tree[5]))


@pytest.mark.parametrize("damage", [b"no database at all" * 99, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_corrupt_index_is_made_again(tree, cache, decoded, tmp_path, damage):
    cache(tree)
    (tmp_path / "cache" / f"{SIZE}px-bicubic.sqlite").write_bytes(damage)
    decoded.clear()
    with pytest.warns(RuntimeWarning, match="sqlite is corrupt"):
        found = cache(tree)
    assert len(decoded) == 12 and torch.equal(found[3], expected(tree[3]))


def test_no_damage_to_its_files_ever_changes_a_pixel(tree, cache, tmp_path):
    wanted = cache(tree)[:]
    files = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    random = np.random.default_rng(0)
    for trial in range(20):
        for k, (path, whole) in enumerate(files.items()):
            damaged = np.frombuffer(whole, np.uint8).copy()
            if trial % 2 == k:
                damaged[random.integers(len(damaged), size=8)] ^= np.uint8(1) << random.integers(8, dtype=np.uint8)
            path.write_bytes(damaged.tobytes()[: random.integers(len(whole)) if trial % 5 == k else None])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert torch.equal(cache(tree)[:], wanted)


def test_a_full_disk_is_one_clear_error_and_keeps_what_is_finished(tree, cache, decoded):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = 64
    cache(tree[:1], large)  # so that the index has its pages
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 3 * large * large + 100, limit[1]))
    try:
        with pytest.raises(RuntimeError, match=r"no room left for .*: 8 of 12 images are finished and kept; free"):
            cache(tree, large, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    decoded.clear()
    found = cache(tree, large)
    assert sorted(decoded) == [str(path) for path in tree[8:]]
    assert torch.equal(found[:], torch.stack([expected(path, large) for path in tree]))


def test_a_full_disk_under_the_index_loses_no_record_that_was_committed(tree, cache, decoded, monkeypatch):
    cache(tree[:4])

    def full(self, digests, keys):
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no room left"):
        patch.setattr(pixel_store.Index, "commit", full)
        cache(tree)
    decoded.clear()
    assert torch.equal(cache(tree)[:], torch.stack([expected(path) for path in tree]))
    assert sorted(decoded) == [str(path) for path in tree[4:]]


def test_a_disk_without_room_for_the_index_is_said_to_be_full(tree, cache, monkeypatch):
    def full(self, store):
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    monkeypatch.setattr(pixel_store.Index, "__init__", full)
    with pytest.raises(RuntimeError, match="no room left for .*sqlite"):
        cache(tree)


def test_other_input_output_errors_are_not_called_a_full_disk(tree, cache, monkeypatch):
    def broken(self, *arguments):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(pixel_store.Index, "append", broken)
    with pytest.raises(OSError, match="input/output error"):
        cache(tree)


def test_callers_at_once_share_the_work(tree, cache, decoded):
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache(tree))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(decoded) == 12 and len(found) == 3
    assert all(torch.equal(other[:], found[0][:]) for other in found)


def test_a_source_need_not_be_a_file(cache):
    class Memory:
        key, stamp = "memory#0", (1, 2)

        def read(self):
            file = io.BytesIO()
            image(5).save(file, "PNG")
            return file.getvalue()

    assert torch.equal(cache([Memory()])[0], torch.from_numpy(pixels.decode(Memory().read(), SIZE)))


def test_pixels_travel_to_worker_processes_without_their_data(tree, cache):
    found = cache(tree)
    found[:]
    packed = pickle.dumps(found)
    assert len(packed) < 12 * RECORD and torch.equal(pickle.loads(packed)[[7]], found[[7]])


def test_crc_is_recorded_for_every_record(tree, cache, tmp_path):
    found = cache(tree)
    with sqlite3.connect(tmp_path / "cache" / f"{SIZE}px-bicubic.sqlite") as database:
        rows = {digest.hex(): crc for digest, crc in database.execute("SELECT digest, crc FROM records")}
    database.close()
    assert rows == {digest: zlib.crc32(found[k].numpy().tobytes()) for k, digest in enumerate(found.digests)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "bicubc"}, "did you mean 'bicubic'"),
        ({"on_error": "skp"}, "did you mean 'skip'"),
        ({"size": 0}, "size must be a positive"),
    ],
)
def test_wrong_options_are_refused(tree, cache, options, message):
    with pytest.raises(ValueError, match=message):
        cache(tree, **options)


def test_no_images_are_refused(cache):
    with pytest.raises(ValueError, match="the list is empty"):
        cache([])


def test_image_folder_lists_images_at_any_depth_in_order(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a/x/3.webp", "notes.txt", ".hidden/4.png", "b/.5.png"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "set" / "b" / "loop").symlink_to(tmp_path / "set")
    found = [str(path.relative_to(tmp_path / "set")) for path in image_folder(tmp_path / "set")]
    assert found == ["a/x/3.webp", "b/1.png", "b/2.JPG"]


def test_image_folder_lists_a_folder_once_whatever_links_to_it(tmp_path):
    (tmp_path / "set" / "real").mkdir(parents=True)
    (tmp_path / "set" / "real" / "1.png").touch()
    for link in ("a", "z"):
        (tmp_path / "set" / link).symlink_to(tmp_path / "set" / "real")
    assert image_folder(tmp_path / "set") == [tmp_path / "set" / "real" / "1.png"]
    (tmp_path / "links").mkdir()
    for link in ("a", "z"):
        (tmp_path / "links" / link).symlink_to(tmp_path / "set" / "real")
    assert [path.name for path in image_folder(tmp_path / "links")] == ["1.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file name is Unicode")
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"caf\xe9/1.png"])
def test_image_folder_refuses_names_that_no_table_can_hold(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "wb").close()
    with pytest.raises(ValueError, match=r"the name 'caf\\udce9(\.png)?' in .* is no UTF-8"):
        image_folder(tmp_path)


def test_image_folder_refuses_a_folder_inside_that_it_cannot_read(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "1.png").touch()
    scan = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="locked"):
        image_folder(tmp_path)


def test_image_folder_refuses_a_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image folder at .*nowhere"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image under"):
        image_folder(tmp_path)
