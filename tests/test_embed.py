"""Collections of images on their way to a parquet file: the same embeddings by every road, and nothing done twice."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from thesis_lib import backbone, embed, embeddings, perceptual
from thesis_lib.datasets import pixels

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
QUIET = {"device": "cpu", "progress": False, "workers": 2}


def small_metric(seed=0, mixer="mha"):
    torch.manual_seed(seed)
    model = backbone.create("demo", mixer, pretrained=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return perceptual.Metric(model).requires_grad_(False)


@pytest.fixture
def metric(monkeypatch):
    monkeypatch.setattr(backbone, "DEMO", SMALL)
    return small_metric()


def picture(seed, size=(20, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def folder(root, n=11):
    for i in range(n):
        path = root / f"{'ab'[i % 2]}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return root


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def one_by_one(metric, paths):
    preprocess = perceptual.preprocess(metric.backbone.patch_embed.img_size)
    return torch.cat([metric.embed(preprocess(Image.open(path))) for path in paths])


def decoded(monkeypatch):
    """Count the images that are decoded, in a list that grows."""
    names, decode = [], embed._decode

    def counting(source, size):
        names.append(Path(source.key).name)
        return decode(source, size)

    monkeypatch.setattr(embed, "_decode", counting)
    return names


# --- what is written


def test_a_folder_becomes_a_table_of_this_model(metric, tmp_path):
    root = folder(tmp_path / "images")
    done = embed.embed_folder(metric, root, tmp_path / "deep" / "out.parquet", part_size=4, batch_size=3, **QUIET)
    assert (done.images, done.skipped, done.distances) == (11, {}, None)
    table = embeddings.read_embeddings(done.path, expect=metric)
    paths = sorted(root.rglob("*.png"))
    assert table.table["path"].tolist() == [path.relative_to(root).as_posix() for path in paths]
    torch.testing.assert_close(table.values, one_by_one(metric, paths), atol=2e-6, rtol=0)
    cached = pixels.cache(paths, 16, folder=tmp_path / "cache", progress=False)
    assert table.table["digest"].tolist() == cached.digests  # of the same content, in the same notation
    assert set(os.listdir(tmp_path / "deep")) - {"out.parquet.lock"} == {"out.parquet"}
    assert perceptual.embed_folder is embed.embed_folder


def test_batches_parts_and_threads_change_nothing(metric, tmp_path):
    root, found = folder(tmp_path / "images"), []
    for k, (batch, part, workers) in enumerate([(64, 256, 1), (2, 3, 4), (5, 11, 2)]):
        options = QUIET | {"batch_size": batch, "part_size": part, "workers": workers}
        done = embed.embed_folder(metric, root, tmp_path / f"{k}.parquet", **options)
        found.append(embeddings.read_embeddings(done.path).values)
    torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=2e-6, rtol=0)


def test_parquet_shards_are_named_by_shard_and_row(metric, tmp_path):
    folder(tmp_path / "images", 5)
    files = sorted((tmp_path / "images").rglob("*.png"))
    (tmp_path / "shards" / "data").mkdir(parents=True)
    (tmp_path / "shards" / "label2text.json").write_text('{"0": "noise"}')
    for split, some in (("train", files[:3]), ("test", files[3:])):
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in some]
        table = pa.table({"image": cells, "label": [0] * len(some), "text": ["noise"] * len(some)})
        pq.write_table(table, tmp_path / "shards" / "data" / f"{split}-00000-of-00001.parquet", row_group_size=2)
    done = embed.embed_folder(metric, tmp_path / "shards", tmp_path / "out.parquet", part_size=2, **QUIET)
    table = embeddings.read_embeddings(done.path)
    assert table.table["split"].tolist() == ["train"] * 3 + ["test"] * 2
    assert table.table["path"].iloc[3] == "test-00000-of-00001.parquet#0"
    torch.testing.assert_close(table.values, one_by_one(metric, files), atol=2e-6, rtol=0)


def pairs_csv(root, monkeypatch):
    """Pairs of a few images: one absolute path, images again and again, and more rows than are read at once."""
    monkeypatch.setattr("thesis_lib.embed_sources.CHUNK", 3)
    monkeypatch.setattr("thesis_lib.embed_parts.CHUNK", 3)
    names = ["images/a/00.png", "images/b/01.png", "images/a/02.png", str(root / "images/b/03.png"), "images/a/04.png"]
    rows = [(0, 1), (0, 2), (3, 0), (4, 4), (2, 1), (1, 3), (0, 4)]
    frame = pd.DataFrame([{"id": i, "first": names[a], "other": names[b]} for i, (a, b) in enumerate(rows)])
    frame.to_csv(root / "pairs.csv", index=False)
    return root / "pairs.csv", frame


def test_a_csv_of_pairs_gets_its_distances_too(metric, tmp_path, monkeypatch):
    folder(tmp_path / "images", 5)
    csv, frame = pairs_csv(tmp_path, monkeypatch)
    names = decoded(monkeypatch)
    options = QUIET | {"columns": ("first", "other"), "part_size": 2}
    done = embed.embed_folder(metric, csv, tmp_path / "out.parquet", **options)
    assert done.images == 5 and sorted(names) == ["00.png", "01.png", "02.png", "03.png", "04.png"]
    distances = pq.read_table(done.distances).to_pandas()
    assert distances[["first", "other"]].equals(frame[["first", "other"]])
    ends = (one_by_one(metric, [tmp_path / name for name in frame[column]]) for column in ("first", "other"))
    expected = perceptual.distance(*(each.double() for each in ends))
    np.testing.assert_allclose(distances["distance"], expected, atol=1e-6)
    assert distances["distance"][3] == pytest.approx(0, abs=1e-12)

    again = embed.embed_folder(metric, csv, tmp_path / "out.parquet", **options)
    assert again == done and len(names) == 5
    whole = done.distances.read_bytes()
    done.distances.unlink()  # they are made again from the embeddings
    again = embed.embed_folder(metric, csv, tmp_path / "out.parquet", **options)
    assert again == done and len(names) == 5 and done.distances.read_bytes() == whole
    assert set(os.listdir(tmp_path)) == {
        "images",
        "pairs.csv",
        "out.parquet",
        "out.distances.parquet",
        "out.parquet.lock",
    }


def test_distances_lie_beside_their_own_embeddings(metric, tmp_path, monkeypatch):
    root = folder(tmp_path / "images", 5)
    csv, _ = pairs_csv(tmp_path, monkeypatch)
    options = QUIET | {"columns": ("first", "other")}
    found = [embed.embed_folder(metric, csv, tmp_path / name, **options) for name in ("q.v1", "q.v2", "q.parquet")]
    assert [done.distances.name for done in found] == [f"q{v}.distances.parquet" for v in (".v1", ".v2", "")]
    (tmp_path / "q.parquet").unlink()
    for source in (root, csv):  # a folder, and other pairs
        with pytest.raises(ValueError, match=r"q\.distances\.parquet is of another run .*delete it"):
            embed.embed_folder(metric, source, tmp_path / "q.parquet", **options | {"columns": ("other", "first")})
    assert not (tmp_path / "q.parquet").exists()
    (tmp_path / "q.distances.parquet").unlink()
    assert embed.embed_folder(metric, root, tmp_path / "q.parquet", **options).distances is None


def test_pairs_with_a_skipped_image_have_no_distance(metric, tmp_path, monkeypatch):
    folder(tmp_path / "images", 5)
    csv, frame = pairs_csv(tmp_path, monkeypatch)
    whole = embed.embed_folder(metric, csv, tmp_path / "whole.parquet", columns=("first", "other"), **QUIET)
    (tmp_path / "images/b/01.png").unlink()
    options = QUIET | {"columns": ("first", "other"), "on_error": "skip", "part_size": 2}
    done = embed.embed_folder(metric, csv, tmp_path / "out.parquet", **options)
    assert done.images == 4 and list(done.skipped) == ["images/b/01.png"]
    expected = pq.read_table(whole.distances).to_pandas()["distance"]
    found = pq.read_table(done.distances).to_pandas()["distance"]
    assert found.isna().tolist() == [True, False, False, False, True, True, False]
    np.testing.assert_allclose(found.dropna(), expected[found.notna()], atol=1e-6)


# --- images that are not whole


def test_a_truncated_image_is_named_and_costs_no_finished_part(metric, tmp_path, monkeypatch):
    root = folder(tmp_path / "images")
    bad = root / "b" / "03.png"
    truncate(bad)
    options = QUIET | {"part_size": 4, "batch_size": 2}
    with pytest.raises(ValueError, match=r"03\.png is not a whole image.*on_error='skip'"):
        embed.embed_folder(metric, root, tmp_path / "out.parquet", **options)
    assert not (tmp_path / "out.parquet").exists()
    picture(3).save(bad)
    names = decoded(monkeypatch)
    done = embed.embed_folder(metric, root, tmp_path / "out.parquet", **options)
    assert done.images == 11 and len(names) == 11 - 4 and "00.png" not in names  # the part a/00 … a/06 was kept


def test_skipped_images_are_counted_and_the_rest_is_as_without_them(metric, tmp_path):
    root = folder(tmp_path / "images")
    paths = sorted(root.rglob("*.png"))
    truncate(paths[0])
    paths[6].write_text("no image")
    done = embed.embed_folder(metric, root, tmp_path / "out.parquet", on_error="skip", part_size=4, **QUIET)
    assert done.images == 9 and list(done.skipped) == ["a/00.png", "b/01.png"]
    assert all("is not a whole image" in reason for reason in done.skipped.values())
    table = embeddings.read_embeddings(done.path)
    usable = [path for i, path in enumerate(paths) if i not in (0, 6)]
    torch.testing.assert_close(table.values, one_by_one(metric, usable), atol=2e-6, rtol=0)
    assert table.table["path"].tolist() == [path.relative_to(root).as_posix() for path in usable]
    assert json.loads(pq.read_schema(done.path).metadata[b"skipped"]) == done.skipped
    again = embed.embed_folder(metric, root, tmp_path / "again.parquet", on_error="skip", part_size=4, **QUIET)
    assert again.path.read_bytes() == done.path.read_bytes()
    assert embed.embed_folder(metric, root, done.path, on_error="skip", part_size=4, **QUIET) == done
    with pytest.raises(ValueError, match=r"out\.parquet lacks 2 images .*00\.png is not .*01\.png .*--on-error"):
        embed.embed_folder(metric, root, done.path, part_size=4, **QUIET)


def test_parts_made_by_skipping_do_not_serve_a_run_that_must_not(metric, tmp_path, monkeypatch):
    root = folder(tmp_path / "images", 6)
    truncate(root / "a" / "00.png")
    with monkeypatch.context() as patch:
        patch.setattr(embed, "join", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed.embed_folder(metric, root, tmp_path / "out.parquet", on_error="skip", **QUIET)
    with pytest.raises(ValueError, match=r"00\.png"):
        embed.embed_folder(metric, root, tmp_path / "out.parquet", **QUIET)
    for path in root.rglob("*.png"):
        truncate(path)
    with pytest.raises(ValueError, match="none of the 6 images"):
        embed.embed_folder(metric, root, tmp_path / "other.parquet", on_error="skip", **QUIET)


# --- interruptions, other runs, memory


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(metric, tmp_path, monkeypatch):
    root = folder(tmp_path / "images", 13)
    options = QUIET | {"part_size": 3, "batch_size": 2}
    whole = embed.embed_folder(metric, root, tmp_path / "whole.parquet", **options)
    calls, own = [], perceptual.embed_pixels

    def stopping(*arguments, **others):
        calls.append(1)
        if len(calls) == 4:  # one for the width, two parts
            raise KeyboardInterrupt
        return own(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(perceptual, "embed_pixels", stopping)
        with pytest.raises(KeyboardInterrupt):
            embed.embed_folder(metric, root, tmp_path / "out.parquet", **options)
    names = decoded(monkeypatch)
    done = embed.embed_folder(metric, root, tmp_path / "out.parquet", **options)
    assert len(names) == 13 - 2 * 3
    assert done.path.read_bytes() == whole.path.read_bytes()


def test_a_damaged_part_is_made_again_or_named(metric, tmp_path, monkeypatch):
    root, out, options = folder(tmp_path / "images", 6), tmp_path / "out.parquet", QUIET | {"part_size": 2}
    with monkeypatch.context() as patch:
        patch.setattr(embed, "join", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed.embed_folder(metric, root, out, **options)
    parts = sorted((tmp_path / "out.parquet.parts").glob("*.parquet"))
    parts[0].write_bytes(b"PAR1")  # its end is gone, which tells what is in it
    names, whole = decoded(monkeypatch), parts[1].read_bytes()
    parts[1].write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(RuntimeError, match=rf"(?s){parts[1].name} is damaged .*: delete it"):
        embed.embed_folder(metric, root, out, **options)
    assert len(names) == 2
    parts[1].unlink()
    assert embed.embed_folder(metric, root, out, **options).images == 6 and len(names) == 4


def test_a_finished_file_is_not_made_again_nor_taken_for_another(metric, tmp_path, monkeypatch):
    root, out = folder(tmp_path / "images", 5), tmp_path / "out.parquet"
    done = embed.embed_folder(metric, root, out, **QUIET)
    names = decoded(monkeypatch)
    assert embed.embed_folder(metric, root, out, **QUIET | {"workers": 1}) == done and not names
    with pytest.raises(ValueError, match=r"another run \(model differ"):
        embed.embed_folder(small_metric(1), root, out, **QUIET)
    with pytest.raises(ValueError, match=r"another run \(dtype differ"):
        embed.embed_folder(metric, root, out, dtype="bfloat16", **QUIET)
    picture(99).save(root / "a" / "99.png")
    with pytest.raises(ValueError, match=r"another run \(images differ"):
        embed.embed_folder(metric, root, out, **QUIET)
    out.write_text("notes")
    with pytest.raises(ValueError, match="no file of this command"):
        embed.embed_folder(metric, root, out, **QUIET)


def test_two_runs_do_not_fill_one_file(metric, tmp_path):
    root, lock = folder(tmp_path / "images", 3), tmp_path / "out.parquet.lock"
    with filelock.FileLock(lock), pytest.raises(RuntimeError, match="another run is filling"):
        embed.embed_folder(metric, root, tmp_path / "out.parquet", **QUIET)
    lock.touch()  # as a run that was killed leaves it
    assert embed.embed_folder(metric, root, tmp_path / "out.parquet", **QUIET).images == 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is open from Linux's /proc")
def test_nothing_of_the_parts_is_open_when_they_are_removed(metric, tmp_path, monkeypatch):
    """NFS and Windows remove no folder in which a file is open or mapped."""
    folder(tmp_path / "images", 5)
    csv, _ = pairs_csv(tmp_path, monkeypatch)
    remove, found = shutil.rmtree, []

    def looking(where, **options):
        descriptors = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        mapped = Path("/proc/self/maps").read_text().splitlines()
        found.append([line for line in [*descriptors, *mapped] if str(where) in line])
        remove(where, **options)

    monkeypatch.setattr(shutil, "rmtree", looking)
    embed.embed_folder(metric, csv, tmp_path / "out.parquet", columns=("first", "other"), **QUIET)
    assert found == [[]]


def test_parts_that_cannot_be_removed_do_not_fail_a_finished_run(metric, tmp_path, monkeypatch):
    root, out = folder(tmp_path / "images", 3), tmp_path / "out.parquet"

    def busy(*arguments, **options):
        raise OSError("Device or resource busy")

    monkeypatch.setattr(os, "rmdir", busy)
    assert embed.embed_folder(metric, root, out, **QUIET).images == 3
    assert embed.embed_folder(metric, root, out, **QUIET).images == 3


def test_a_full_disk_under_the_plan_leaves_no_plan(metric, tmp_path, monkeypatch):
    root, out, write = folder(tmp_path / "images", 3), tmp_path / "out.parquet", Path.write_text

    def full(path, text):
        write(path, "")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(RuntimeError, match="no room left"):
            embed.embed_folder(metric, root, out, **QUIET)
    plan = tmp_path / "out.parquet.parts" / "run.json"
    plan.write_text("")  # as earlier versions left it
    with pytest.raises(ValueError, match=r"run\.json is not whole .* delete .*out\.parquet\.parts"):
        embed.embed_folder(metric, root, out, **QUIET)
    plan.unlink()
    assert embed.embed_folder(metric, root, out, **QUIET).images == 3


def test_no_more_is_decoded_ahead_than_two_batches(metric, tmp_path, monkeypatch):
    root, names, ahead = folder(tmp_path / "images", 40), decoded(monkeypatch), []
    forward = type(metric).embed_unchecked

    def watching(self, x):
        ahead.append(len(names) - 2 * len(ahead))
        return forward(self, x)

    monkeypatch.setattr(perceptual.Metric, "embed_unchecked", watching)
    embed.embed_folder(metric, root, tmp_path / "out.parquet", batch_size=2, part_size=10, **QUIET)
    assert (
        len(ahead) == 21 and max(ahead) <= 2 + 2 * 2 + 2 + 2
    )  # batch in hand (and the first, blank one), ahead, workers


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_error": "ignore"}, ValueError, "on_error"),
        ({"part_size": 0}, ValueError, "at least 1"),
        ({"workers": 0}, ValueError, "at least 1"),
        ({"dtype": "half"}, ValueError, "float32, bfloat16, float16"),
        ({"source": "nowhere"}, FileNotFoundError, "no .*nowhere"),
        ({"source": "notes.txt"}, ValueError, "no csv"),
        ({"source": "pairs.csv"}, ValueError, "columns left, right: name the two .*--columns"),
        ({"source": "pairs.csv", "columns": ("left", "right")}, ValueError, "data row 2 lacks a path"),
        ({"source": "pairs.csv", "columns": ("left", "left")}, ValueError, r"columns \(--columns\) must be two diff"),
        ({"source": "pairs.csv", "columns": ("distance", "left")}, ValueError, "none called distance"),
        ({"source": "none.csv"}, ValueError, "no pair"),
        ({"source": "empty.csv"}, ValueError, r"empty\.csv is not a readable csv file .*No columns"),
        ({"source": "latin.csv"}, ValueError, r"latin\.csv is not a readable csv file in UTF-8"),
        ({"source": "quote.csv"}, ValueError, r"quote\.csv is not a readable csv file .*EOF inside string"),
        ({"source": "nul.csv"}, ValueError, r"nul\.csv: data row 1 .*NUL"),
    ],
)
def test_what_cannot_be_embedded_is_refused(metric, tmp_path, options, error, message):
    folder(tmp_path / "images", 2)
    (tmp_path / "notes.txt").write_text("a,b\n")
    (tmp_path / "none.csv").write_text("a,b\n")
    (tmp_path / "pairs.csv").write_text("left,right\nx.png,y.png\nx.png,\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "latin.csv").write_bytes(b"a,b\ncaf\xe9.png,y.png\n")
    (tmp_path / "quote.csv").write_text('a,b\n"x.png,y.png\n')
    (tmp_path / "nul.csv").write_text("a,b\nx\0.png,y.png\n")
    options = QUIET | options
    with pytest.raises(error, match=message):
        embed.embed_folder(metric, tmp_path / options.pop("source", "images"), tmp_path / "out.parquet", **options)
    assert not (tmp_path / "out.parquet").exists()


def test_a_folder_is_no_file_to_write(metric, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: name a file in it, such as .*embeddings\.parquet"):
        embed.embed_folder(metric, folder(tmp_path / "images", 2), tmp_path, **QUIET)


def test_embeddings_that_are_not_finite_are_refused(metric, tmp_path):
    with torch.no_grad():
        metric.backbone.blocks[-1].mlp.fc2.bias.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"00\.png is not finite"):
        embed.embed_folder(metric, folder(tmp_path / "images", 2), tmp_path / "out.parquet", **QUIET)


# --- the command


def test_two_processes_of_torchrun_embed_as_one(tmp_path):
    """Through the command, from a csv: both processes take parts, and the first writes the distances."""
    folder(tmp_path / "images", 20)
    files = [path.relative_to(tmp_path).as_posix() for path in sorted((tmp_path / "images").rglob("*.png"))]
    pd.DataFrame({"a": files, "b": files[::-1]}).to_csv(tmp_path / "pairs.csv", index=False)
    metric = small_metric(mixer="pool")  # of the demo's size, which the other processes build too
    perceptual.save(metric, tmp_path / "metric")
    one = embed.embed_folder(metric, tmp_path / "pairs.csv", tmp_path / "one.parquet", part_size=4, **QUIET)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        number = port.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={number}"]
    command += ["-m", "thesis_lib.embed", "pairs.csv", "two.parquet", "--metric", "metric", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(embed.__file__).parents[1])}
    ran = subprocess.run(
        [*command, "--part-size", "4"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("20 images embedded in two.parquet") == 1
    found, expected = (embeddings.read_embeddings(tmp_path / f"{n}.parquet") for n in ("two", "one"))
    assert found.table.equals(expected.table) and found.identity == expected.identity
    torch.testing.assert_close(found.values, expected.values, atol=2e-6, rtol=0)
    distances = [pq.read_table(tmp_path / f"{n}.distances.parquet").to_pandas() for n in ("two", "one")]
    pd.testing.assert_frame_equal(*distances, atol=1e-6)
    assert one.distances.name == "one.distances.parquet"


def test_the_command_reports_what_it_skipped_or_ends_with_what_is_wrong(metric, tmp_path, monkeypatch, capsys):
    root = folder(tmp_path / "images", 4)
    truncate(root / "a" / "02.png")
    perceptual.save(metric, tmp_path / "metric")
    call = [str(root), str(tmp_path / "out.parquet"), "--metric", str(tmp_path / "metric"), "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        embed.main(call)
    assert stopped.value.code == 1 and "02.png is not a whole image" in capsys.readouterr().err
    embed.main([*call, "--on-error", "skip"])
    printed = capsys.readouterr().out
    assert "3 images embedded" in printed and "1 images skipped" in printed and "02.png" in printed
