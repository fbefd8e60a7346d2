"""ImageNet-100 in its published parquet layout, its export, and every way it can be broken."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from thesis_lib.datasets import imagenet100, pixels
from thesis_lib.datasets.imagenet100 import ImageNet100, export, main

TEXTS = ["bonnet, poke bonnet", "green/mamba", "langur"]


def encoded(seed: int, format: str = "JPEG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, format)
    return file.getvalue()


def shard(root, split, number, total, rows, row_group_size=2):
    """Write one shard of (image bytes, label) rows with the published columns, in another order."""
    images = [{"path": f"{k}.jpg", "bytes": data} for k, (data, _) in enumerate(rows)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "text": [TEXTS[label] for _, label in rows],
            "label": pa.array([label for _, label in rows], pa.int64()),
            "image": pa.array(images, struct),
        }
    )
    (root / "data").mkdir(parents=True, exist_ok=True)
    path = root / "data" / f"{split}-{number:05d}-of-{total:05d}.parquet"
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "imagenet-100"
    shard(root, "train", 0, 2, [(encoded(k), k % 2) for k in range(5)])
    shard(root, "train", 1, 2, [(encoded(5, "PNG"), 0), (encoded(6, "WEBP"), 1), (encoded(7, "TIFF"), 2)])
    shard(root, "validation", 0, 1, [(encoded(8), 2)])
    shard(root, "test", 0, 1, [(encoded(9), 1), (encoded(10), 2)])
    (root / "label2text.json").write_text(json.dumps({str(k): text for k, text in enumerate(TEXTS)}))
    return root


def test_rows_labels_and_classes_are_read_by_name(root):
    dataset = ImageNet100(root, "train")
    assert len(dataset) == 8 and dataset.classes == TEXTS
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 2]
    assert dataset.class_counts.tolist() == [4, 3, 1]
    assert ImageNet100(root, "test").class_counts.tolist() == [0, 1, 1]
    picture, label = dataset[7]
    assert (picture.mode, picture.size, label) == ("RGB", (30, 20), 2)


def test_sources_feed_the_pixel_cache(root, tmp_path, monkeypatch):
    dataset = ImageNet100(root, "train")
    found = pixels.cache(dataset.sources, 16, folder=tmp_path / "cache", progress=False, workers=2)
    for k, source in enumerate(dataset.sources):
        assert torch.equal(found[k], torch.from_numpy(pixels.decode(source.read(), 16)))
    assert torch.equal(found[4], torch.from_numpy(pixels.decode(encoded(4), 16)))
    assert found.keys[6] == f"{root / 'data' / 'train-00001-of-00002.parquet'}#1"
    monkeypatch.setattr(imagenet100.Row, "read", lambda self: pytest.fail("read twice"))
    pixels.cache(ImageNet100(root, "train").sources, 16, folder=tmp_path / "cache", progress=False)


def test_a_row_group_is_read_once(root, tmp_path, monkeypatch):
    imagenet100._row_group.cache_clear()
    pixels.cache(ImageNet100(root, "train").sources, 16, folder=tmp_path / "cache", progress=False, workers=1)
    assert imagenet100._row_group.cache_info().misses == 5  # three and two groups of at most two rows


def test_a_replaced_shard_is_read_anew(root):
    before = ImageNet100(root, "validation").sources[0].read()
    shard(root, "validation", 0, 1, [(encoded(80), 2)])
    assert before == encoded(8) and ImageNet100(root, "validation").sources[0].read() == encoded(80)


def test_export_writes_the_original_bytes_under_the_original_names(root, tmp_path):
    out = tmp_path / "images"
    assert export(root, out, progress=False) == 11
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == [
        "test/001_green_mamba/test_000_000000.jpg",
        "test/002_langur/test_000_000001.jpg",
        "train/000_bonnet_poke_bonnet/train_000_000000.jpg",
        "train/000_bonnet_poke_bonnet/train_000_000002.jpg",
        "train/000_bonnet_poke_bonnet/train_000_000004.jpg",
        "train/000_bonnet_poke_bonnet/train_001_000000.png",
        "train/001_green_mamba/train_000_000001.jpg",
        "train/001_green_mamba/train_000_000003.jpg",
        "train/001_green_mamba/train_001_000001.webp",
        "train/002_langur/train_001_000002.jpg",
        "validation/002_langur/validation_000_000000.jpg",
    ]
    assert (out / names[5]).read_bytes() == encoded(5, "PNG")
    with Image.open(out / names[9]) as picture:  # the TIFF
        assert picture.format == "JPEG" and picture.size == (30, 20)


def test_export_goes_on_where_it_stopped(root, tmp_path):
    out = tmp_path / "images"
    assert export(root, out, splits=["train"], limit_per_split=3, progress=False) == 3
    assert export(root, out, splits=["train"], progress=False) == 5
    assert not list(out.rglob("*.part")) and not (out / "test").exists()


def test_export_names_a_row_that_is_no_image(root, tmp_path):
    shard(root, "test", 0, 1, [(b"no image", 1)])
    with pytest.raises(ValueError, match=r"parquet#0 is not an image: no image format that Pillow knows"):
        export(root, tmp_path / "images", splits=["test"], progress=False)


def test_export_by_command_names_classes_by_id(root, tmp_path, capsys):
    main(
        [
            "export",
            str(root),
            str(tmp_path / "out"),
            "--splits",
            "test",
            "--limit-per-split",
            "1",
            "--class-names",
            "id",
        ]
    )
    assert [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.jpg")] == [
        "test/001/test_000_000000.jpg"
    ]
    assert "1 images written" in capsys.readouterr().out


def test_the_command_ends_with_the_error_not_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("ImageNet-100 is not at ")


def test_download_fetches_the_pinned_revision(tmp_path, monkeypatch):
    calls = []
    fake = lambda repository, **options: calls.append((repository, options)) or str(options["local_dir"])  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    main(["download", str(tmp_path), "--splits", "test"])
    ((repository, options),) = calls
    assert repository == "ilee0022/ImageNet100" and options["repo_type"] == "dataset"
    assert options["revision"] == "c55b2f2967c034db17be30f7d430e41c80fd4281"
    assert options["allow_patterns"] == ["label2text.json", "data/test-*.parquet"]


def test_a_missing_root_says_what_where_how_large_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        ImageNet100(tmp_path / "nowhere")
    for part in (
        "17.4 GB",
        "https://huggingface.co/datasets/ilee0022/ImageNet100",
        "`imagenet100_root`",
        "`extra_image_roots`",
        "imagenet100 download",
    ):
        assert part in str(error.value)


def test_a_missing_split_and_a_missing_shard_are_named(root):
    (root / "data" / "test-00000-of-00001.parquet").unlink()
    (root / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no data/test-\*\.parquet"):
        ImageNet100(root, "test")
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 shards of 'train' are absent, first train-00000-of-00002"):
        ImageNet100(root, "train")


def test_shards_of_two_downloads_are_not_read_together(root):
    shard = root / "data" / "train-00000-of-00002.parquet"
    (root / "data" / "train-00000-of-00001.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match=r"'train' shards of several downloads \(of 1, 2\)"):
        ImageNet100(root, "train")


def test_the_other_set_of_that_name_is_recognised(root):
    (root / "label2text.json").unlink()
    with pytest.raises(ValueError, match="no label2text.json: this is not ilee0022/ImageNet100. clane9/imagenet-100"):
        ImageNet100(root, "train")


@pytest.mark.parametrize("keep", [0, 50, 0.5, -4])
def test_a_corrupt_shard_is_named(root, keep):
    path = root / "data" / "test-00000-of-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(RuntimeError, match=r"test-00000-of-00001\.parquet is not a whole parquet file .*delete it"):
        ImageNet100(root, "test")


def test_a_shard_corrupt_among_its_images_stops_even_a_run_that_may_skip(root, tmp_path):
    dataset = ImageNet100(root, "validation")
    path = dataset.shards[0]
    with pq.ParquetFile(path) as file:
        columns = [file.metadata.row_group(0).column(k) for k in range(file.metadata.num_columns)]
    start = next(c.dictionary_page_offset or c.data_page_offset for c in columns if c.path_in_schema == "image.bytes")
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 12] = b"\xff" * 12
    path.write_bytes(damaged)
    with pytest.raises(RuntimeError, match=r"validation-00000-of-00001\.parquet is not a whole parquet file"):
        pixels.cache(
            ImageNet100(root, "validation").sources, 16, folder=tmp_path / "cache", progress=False, on_error="skip"
        )


def test_an_undecodable_image_is_named_by_shard_and_row(root, tmp_path):
    shard(root, "test", 0, 1, [(encoded(9), 1), (encoded(10)[:300], 2), (None, 0)])
    sources = ImageNet100(root, "test").sources
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet#1 is not a whole image"):
        pixels.cache(sources, 16, folder=tmp_path / "cache", progress=False, workers=1)
    found = pixels.cache(sources, 16, folder=tmp_path / "cache", progress=False, on_error="skip")
    assert found.usable.tolist() == [True, False, False] and "#2 has no image bytes" in found.skipped[1]


def test_other_columns_are_named(root):
    table = pa.table({"img": [b"x"], "label": [0]})
    pq.write_table(table, root / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"needs the columns image \(struct of bytes, path\) and label; it has img: binary"
    ):
        ImageNet100(root, "test")


def test_labels_must_have_a_text(root):
    (root / "label2text.json").write_text(json.dumps({"0": "bonnet", "1": "mamba"}))
    with pytest.raises(ValueError, match=r"'test' .* has labels that label2text.json lacks: \[2\]"):
        ImageNet100(root, "test")
    (root / "label2text.json").write_text(json.dumps({"0": "bonnet", "2": "langur"}))
    with pytest.raises(ValueError, match="must name the labels 0 to 1 without a gap"):
        ImageNet100(root, "test")


def test_a_misspelt_split_names_the_near_one(root):
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        ImageNet100(root, "validaton")


def test_an_empty_split_is_refused(root):
    shard(root, "test", 0, 1, [])
    with pytest.raises(ValueError, match="the split 'test' of .* is empty"):
        ImageNet100(root, "test")
