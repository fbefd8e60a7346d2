import inspect
import json
import math
import shutil
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from thesis_lib import backbone, distillation, perceptual, proposed
from thesis_lib.datasets.nights import NIGHTS
from thesis_lib.datasets.pixels import cache
from thesis_lib.distillation import distil, trainable_parameters
from thesis_lib.embeddings import (
    Embeddings,
    identity,
    image_table,
    read_embeddings,
    training_rows,
    write_embeddings,
)
from thesis_lib.layer_plan import Plan
from thesis_lib.training import two_afc

FAST = {"device": "cpu", "progress": False}
SPLITS = ["train"] * 8 + ["val"] * 4 + ["test"] * 2


def metric(seed=0, feature="cls", normalize=True, width=24, mixer=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=24, patch_size=8, embed_dim=width, depth=2, num_heads=2, num_classes=0, global_pool="token"
        )
        for parameter in model.parameters():  # position and class token start so small that images look alike
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.recipe = {"name": "tiny", "img_size": 24, "mixer": "mha", "layers": None, "mixer_options": {}}
    model = backbone.swap(model, mixer) if mixer else model
    return perceptual.Metric(model.eval(), feature=feature, normalize=normalize)


def picture(path, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((24, 24), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """NIGHTS in small, an image folder with splits, and one without that holds a copy of a test image."""
    root, generator = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    rows = []
    for i, split in enumerate(SPLITS):
        names = [f"ref/000/{i:03d}.png", f"distort/000/{i:03d}_0.png", f"distort/000/{i:03d}_1.png"]
        for name in names:
            picture(root / "nights" / name, generator)
        rows.append([i, 1 - i % 2, i % 2, 6, *names, split, i % 3 == 0])
    columns = ["id", "left_vote", "right_vote", "votes", "ref_path", "left_path", "right_path", "split", "is_imagenet"]
    pd.DataFrame(rows, columns=columns).to_csv(root / "nights" / "data.csv", index=False)
    for name in ("train/a/1.png", "train/b/2.png", "validation/a/3.png", "test/a/4.png"):
        picture(root / "divided" / name, generator)
    picture(root / "plain" / "5.png", generator)
    (root / "plain" / "copy.png").write_bytes((root / "nights" / "ref/000/013.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def prepared(world):
    nights = [NIGHTS(world / "nights", split) for split in ("train", "val", "test")]
    table = image_table(nights, [world / "divided", world / "plain"])
    pixels = cache(table["source"], 24, folder=world / "cache", workers=1, progress=False)
    path = write_embeddings(metric(), pixels, table, world / "teacher.parquet", progress=False)
    return SimpleNamespace(table=table, pixels=pixels, path=path, val=nights[1], targets=read_embeddings(path))


def test_the_table_lists_every_image_once_with_its_split_and_role(world):
    table = image_table([NIGHTS(world / "nights", "all")], [world / "divided", world / "plain"])
    assert list(table.columns) == ["path", "split", "role", "source"]
    assert table["path"].is_unique and len(table) == 3 * len(SPLITS) + 4
    assert table.groupby("split").size().to_dict() == {"train": 3 * 8 + 4, "val": 12, "test": 6}
    assert table.groupby("role").size().to_dict() == {"ref": 14, "left": 14, "right": 14, "extra": 4}
    extra = table[table["role"] == "extra"]
    assert extra["path"].tolist() == [
        "extra/0_divided/train/a/1.png",
        "extra/0_divided/train/b/2.png",
        "extra/1_plain/5.png",
        "extra/1_plain/copy.png",
    ]
    left = table.set_index("path").loc["distort/000/009_0.png"]
    assert (
        left["split"] == "val" and left["role"] == "left" and left["source"] == world / "nights/distort/000/009_0.png"
    )


def test_an_image_of_two_splits_counts_as_held_out(world, tmp_path):
    frame = pd.read_csv(world / "nights" / "data.csv")
    frame.loc[frame["id"] == 13, "ref_path"] = "ref/000/000.png"  # of the first train triplet
    for folder in ("ref", "distort"):
        (tmp_path / folder).symlink_to(world / "nights" / folder)
    frame.to_csv(tmp_path / "data.csv", index=False)
    nights = SimpleNamespace(
        table=frame,
        root=tmp_path,
        paths=[tmp_path / name for name in frame[["ref_path", "left_path", "right_path"]].to_numpy().ravel()],
        index=np.arange(42).reshape(14, 3),
    )
    table = image_table([nights])
    assert len(table) == 41 and table.set_index("path").loc["ref/000/000.png", "split"] == "test"


def test_only_the_train_shards_of_imagenet100_are_listed(world, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "label2text.json").write_text(json.dumps({"0": "cat"}))
    image = {"bytes": (world / "plain" / "5.png").read_bytes(), "path": None}
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        shard = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table({"image": [image] * count, "label": [0] * count, "text": ["cat"] * count}), shard)
    table = image_table([], [tmp_path])
    assert table["path"].tolist() == [f"extra/0_{tmp_path.name}/train-00000-of-00001.parquet#{i}" for i in range(3)]
    assert set(table["split"]) == {"train"}
    assert len(cache(table["source"], 24, folder=tmp_path / "cache", workers=1, progress=False)) == 3


def test_the_table_written_is_the_table_read(prepared):
    read = read_embeddings(prepared.path, expect=metric())
    expected = perceptual.embed_pixels(metric(), prepared.pixels, progress=False)
    torch.testing.assert_close(read.values, expected)
    assert read.values.dtype == torch.float32 and len(read) == len(prepared.table)
    assert read.table[["path", "split", "role"]].equals(prepared.table[["path", "split", "role"]].astype(str))
    assert read.table["digest"].tolist() == prepared.pixels.digests
    assert read.identity == identity(metric()) and read.identity["recipe"]["name"] == "tiny"
    assert list(pq.read_schema(prepared.path).names) == ["path", "digest", "split", "role", "embedding"]
    assert pq.read_schema(prepared.path).field("embedding").type == pa.list_(pa.float32(), 24)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "weights"),
        ({"feature": "cls_norm"}, "feature 'cls', not 'cls_norm'"),
        ({"normalize": False}, "normalize True, not False"),
        ({"width": 32}, "weights"),
        ({"mixer": "pool"}, "recipe"),
    ],
)
def test_embeddings_of_another_model_are_refused(prepared, other, named):
    with pytest.raises(ValueError, match=named):
        read_embeddings(prepared.path, expect=metric(**other))


def test_bad_tables_are_refused(prepared, tmp_path):
    whole = pq.read_table(prepared.path)
    with pytest.raises(FileNotFoundError, match="notebook 04"):
        read_embeddings(tmp_path / "none.parquet")
    (tmp_path / "cut.parquet").write_bytes(prepared.path.read_bytes()[:-200])
    with pytest.raises(RuntimeError, match="corrupt .* delete it"):
        read_embeddings(tmp_path / "cut.parquet")
    pq.write_table(whole.drop_columns(["role"]), tmp_path / "column.parquet")
    with pytest.raises(ValueError, match="lacks role"):
        read_embeddings(tmp_path / "column.parquet")
    pq.write_table(whole.replace_schema_metadata({}), tmp_path / "anonymous.parquet")
    with pytest.raises(ValueError, match="identity of its model"):
        read_embeddings(tmp_path / "anonymous.parquet")
    values = prepared.targets.values.numpy().copy()
    values[3, 2] = math.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 24)
    pq.write_table(whole.set_column(4, "embedding", column), tmp_path / "nan.parquet")
    with pytest.raises(ValueError, match=f"1 of the {len(whole)} .* not finite, first {prepared.table['path'][3]}"):
        read_embeddings(tmp_path / "nan.parquet")


def test_known_embeddings_are_reused_and_equal_files_embedded_once(prepared, world, tmp_path, monkeypatch):
    embedded = []

    def counting(metric, pixels, *, indices, **options):
        embedded.append(len(indices))
        return embed(metric, pixels, indices=indices, **options)

    embed = perceptual.embed_pixels
    monkeypatch.setattr(perceptual, "embed_pixels", counting)
    path = tmp_path / "table.parquet"
    nights = image_table([NIGHTS(world / "nights", "val")])
    few = cache(nights["source"], 24, folder=world / "cache", workers=1, progress=False)
    write_embeddings(metric(), few, nights, path, progress=False)
    write_embeddings(metric(), prepared.pixels, prepared.table, path, progress=False)
    write_embeddings(metric(), prepared.pixels, prepared.table, path, progress=False)
    distinct = len(set(prepared.pixels.digests))
    assert distinct == len(prepared.table) - 1  # copy.png
    assert embedded == [12, distinct - 12]
    torch.testing.assert_close(read_embeddings(path).values, prepared.targets.values)
    path.write_bytes(b"no parquet")
    write_embeddings(metric(), prepared.pixels, prepared.table, path, progress=False, rebuild=True)
    write_embeddings(metric(seed=1), prepared.pixels, prepared.table, path, progress=False, rebuild=True)
    assert embedded[2:] == [distinct, distinct]
    assert {file.name for file in tmp_path.iterdir()} <= {path.name, path.name + ".lock"}
    with pytest.raises(ValueError, match="12 rows, the pixels 46 images"):
        write_embeddings(metric(), prepared.pixels, nights, path, progress=False)


def test_fewer_images_neither_shrink_the_file_nor_are_more_than_these_read(prepared, world, tmp_path):
    path = tmp_path / "table.parquet"
    shutil.copy(prepared.path, path)
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    few = image_table([NIGHTS(world / "nights", split, max_samples=2) for split in ("train", "val")])[::-1]
    pixels = cache(few["source"], 24, folder=world / "cache", workers=1, progress=False)
    write_embeddings(metric(), pixels, few, path, progress=False)
    assert path.read_bytes() == before and path.stat().st_mtime_ns == stamp

    own = read_embeddings(path, expect=metric()).of(few, pixels)
    assert own.table["path"].tolist() == few["path"].tolist() and own.table["digest"].tolist() == pixels.digests
    place = pd.Series(range(len(prepared.table)), prepared.table["path"])
    assert torch.equal(own.values, prepared.targets.values[place[few["path"]].tolist()])

    relabelled = few.assign(split="val")
    write_embeddings(metric(), pixels, relabelled, path, progress=False)
    whole = read_embeddings(path)
    assert len(whole) == len(prepared.targets) and set(whole.table["split"][: len(few)]) == {"val"}
    assert torch.equal(whole.of(prepared.table, prepared.pixels).values, prepared.targets.values)
    with pytest.raises(ValueError, match="34 of the 46 images are not embedded, first"):
        own.of(prepared.table, prepared.pixels)


def test_other_pictures_under_the_same_names_stay_apart(prepared, world, tmp_path):
    root, path = shutil.copytree(world / "nights", tmp_path / "nights"), tmp_path / "table.parquet"
    shutil.copy(prepared.path, path)
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        picture(file, np.random.default_rng(100 + i))
    table = image_table([NIGHTS(root, "all")])
    pixels = cache(table["source"], 24, folder=tmp_path / "cache", workers=1, progress=False)
    write_embeddings(metric(), pixels, table, path, progress=False)
    both = read_embeddings(path)
    assert len(both) == len(prepared.table) + 42
    torch.testing.assert_close(both.of(table, pixels).values, perceptual.embed_pixels(metric(), pixels, progress=False))
    assert torch.equal(both.of(prepared.table, prepared.pixels).values, prepared.targets.values)


def test_a_file_of_another_model_is_refused_unless_it_may_be_rebuilt(prepared, tmp_path):
    path = tmp_path / "theirs.parquet"
    shutil.copy(prepared.path, path)
    before, other = path.read_bytes(), metric(seed=1)
    ours, theirs = identity(other)["weights"], identity(metric())["weights"]
    with pytest.raises(ValueError, match=f"another model .*weights '{theirs}', not '{ours}'.*name another file"):
        write_embeddings(other, prepared.pixels, prepared.table, path, progress=False)
    assert path.read_bytes() == before
    path.write_bytes(b"my notes")
    with pytest.raises(RuntimeError, match="corrupt"):
        write_embeddings(other, prepared.pixels, prepared.table, path, progress=False)
    assert path.read_bytes() == b"my notes"


def test_of_two_runs_at_a_time_one_embeds(prepared, tmp_path, monkeypatch, capsys):
    """As the students of notebook 04, side by side: whoever comes second waits, and finds all done."""
    embedded, started, embed = [], threading.Event(), perceptual.embed_pixels

    def slow(*parts, indices, **options):
        embedded.append(len(indices))
        started.set()
        time.sleep(1.5)  # the other has said that it waits
        return embed(*parts, indices=indices, **options)

    monkeypatch.setattr(perceptual, "embed_pixels", slow)
    write = partial(write_embeddings, metric(), prepared.pixels, prepared.table, tmp_path / "t.parquet", progress=False)
    first = threading.Thread(target=write)
    first.start()
    started.wait()
    write()
    first.join()
    assert len(embedded) == 1 and "waiting for another run" in capsys.readouterr().out


def test_skipped_images_are_left_out(world, tmp_path):
    root = shutil.copytree(world / "nights", tmp_path / "nights")
    broken = root / "distort/000/009_0.png"  # of the second val triplet
    broken.write_bytes(broken.read_bytes()[:60])
    train, val = NIGHTS(root, "train"), NIGHTS(root, "val")
    options = {"folder": tmp_path / "cache", "on_error": "skip", "workers": 1, "progress": False}
    table = image_table([train, val])
    pixels = cache(table["source"], 24, **options)
    path = write_embeddings(metric(), pixels, table, tmp_path / "teacher.parquet", progress=False)
    targets = read_embeddings(path)
    assert set(table["path"]) - set(targets.table["path"]) == {"distort/000/009_0.png"} and len(targets) == 35
    student = metric(seed=1)
    (row,) = distil(student, pixels, targets, val, epochs=1, batch_size=8, **FAST)
    whole = SimpleNamespace(index=val.index[[0, 2, 3]], right_vote=val.right_vote[[0, 2, 3]])
    assert row["2afc"] == two_afc(student, cache(val.paths, 24, **options), whole)
    val.paths[2] = root / "unknown.png"
    with pytest.raises(ValueError, match="1 of the 12 images of val are not in the targets, first unknown.png"):
        distil(metric(seed=1), pixels, targets, val, epochs=1, **FAST)


class Spy:
    """Pixels that note which digests are asked for while the student trains."""

    def __init__(self, pixels, student):
        self.pixels, self.student, self.learnt = pixels, student, []
        self.keys, self.digests, self.usable = pixels.keys, pixels.digests, pixels.usable

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, indices):
        if self.student.training:
            self.learnt += [self.digests[i] for i in np.asarray(indices)]
        return self.pixels[indices]


def test_held_out_images_are_never_learnt_from(prepared):
    student = metric(seed=1)
    spy = Spy(prepared.pixels, student)
    values = prepared.targets.values.clone()
    table = prepared.targets.table
    values[np.flatnonzero(table["split"] == "test")] = math.nan  # would show in the loss
    distil(
        student, spy, Embeddings(table, values, prepared.targets.identity), prepared.val, epochs=2, batch_size=8, **FAST
    )
    train = table[(table["split"] == "train") & (table["path"] != "extra/1_plain/copy.png")]
    assert sorted(spy.learnt) == sorted(2 * train["digest"].tolist())
    assert not set(spy.learnt) & set(table.loc[table["split"] != "train", "digest"])
    assert training_rows(table).tolist() == train.index.tolist()


def test_trainable_parameters(prepared):
    blocks = {f"blocks.{i}.{part}.{kind}" for i in range(2) for kind in ("weight", "bias")
              for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    assert set(trainable_parameters(metric(), "mlp_norm")) == blocks
    assert set(trainable_parameters(metric(feature="cls_norm"), "mlp_norm")) == blocks | {"norm.weight", "norm.bias"}
    every = {name for name, _ in metric().backbone.named_parameters()}
    assert set(trainable_parameters(metric(), "all")) == every - {"norm.weight", "norm.bias"}
    assert set(trainable_parameters(metric(feature="cls_norm"), "all")) == every
    with pytest.raises(ValueError, match="did you mean mlp_norm"):
        trainable_parameters(metric(), "mlp-norm")


@pytest.mark.parametrize("feature", ["cls", "cls_norm", "cls_patch"])
@pytest.mark.parametrize("trainable", ["mlp_norm", "all"])
def test_all_that_is_trainable_and_nothing_else_is_trained(prepared, tmp_path, trainable, feature):
    student = metric(seed=1, feature=feature, mixer="pool")
    width = 48 if feature == "cls_patch" else 24
    values = torch.randn(len(prepared.targets), width, generator=torch.Generator().manual_seed(0))
    targets = Embeddings(prepared.targets.table, values, prepared.targets.identity)
    start = {name: p.detach().clone() for name, p in student.backbone.named_parameters()}
    distil(student, prepared.pixels, targets, prepared.val, epochs=1, batch_size=8, trainable=trainable, **FAST)
    changed = {name for name, p in student.backbone.named_parameters() if not torch.equal(p, start[name])}
    assert changed == set(trainable_parameters(student, trainable))
    assert all(p.requires_grad for p in student.parameters())


def test_a_student_learns_its_teacher_and_the_best_2afc_is_kept(prepared):
    student = metric(mixer="pool")
    rows = distil(
        student,
        prepared.pixels,
        prepared.targets,
        prepared.val,
        epochs=5,
        batch_size=8,
        lr=2e-3,
        eval_2afc_every=2,
        **FAST,
    )
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert ["2afc" in row for row in rows] == [False, True, False, True, True]
    assert all(row["val_loss"] == pytest.approx(1 - row["val_cosine"]) for row in rows)
    best = max((row for row in rows if "2afc" in row), key=lambda row: row["2afc"])
    embeddings = perceptual.embed_pixels(student, prepared.pixels, progress=False)
    index = np.array([[prepared.table["path"].tolist().index(f"ref/000/{i:03d}.png")] for i in range(8, 12)])
    index = np.concatenate([index, index + 4, index + 8], axis=1)  # val's rows: four ref, four left, four right
    score = perceptual.two_afc_score(*perceptual.triplet_distances(embeddings, index), prepared.val.right_vote)
    assert score == best["2afc"]
    held = np.flatnonzero(prepared.table["split"] == "val")
    cosine = torch.cosine_similarity(embeddings[held], prepared.targets.values[held]).mean().item()
    assert cosine == pytest.approx(best["val_cosine"], abs=1e-6)


def test_plans_distilled_side_by_side_are_those_one_by_one_and_are_kept(prepared, two_threads, tmp_path, monkeypatch):
    plans = [Plan(("mha", "pool")), Plan(("identity", "mha"))]
    common = (prepared.pixels, prepared.targets, prepared.val)
    options = {"epochs": 1, "batch_size": 8, "device": "cpu"}
    together = proposed.distil_plans(metric(), plans, *common, folder=tmp_path, **options)
    torch.set_num_threads(1)
    for plan, found in zip(plans, together, strict=True):
        student = proposed.planned(metric(), plan)
        distil(student, *common, trainable="all", progress=False, **options)
        assert not found.training and not any(p.requires_grad for p in found.parameters())
        assert torch.equal(found.embed(torch.ones(2, 3, 24, 24)), student.eval().embed(torch.ones(2, 3, 24, 24)))
        weights = found.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in student.state_dict().items())
    monkeypatch.setattr(distillation, "_loss", lambda dim: lambda *_: pytest.fail("learnt"))  # no batch is learnt again
    kept = proposed.distil_plans(metric(), plans, *common, folder=tmp_path, **options)
    for found, again in zip(together, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters(), strict=True))
    with pytest.raises(pytest.fail.Exception, match="learnt"):
        proposed.distil_plans(metric(), plans, *common, folder=tmp_path, resume=False, **options)


def test_interrupted_distillation_goes_on_to_the_same_weights(prepared, tmp_path, monkeypatch):
    options = {"epochs": 3, "batch_size": 8, "lr": 1e-3, "schedule": "cosine", "warmup_epochs": 1, **FAST}
    data = (prepared.pixels, prepared.targets, prepared.val)
    whole, broken = metric(mixer="pool"), metric(mixer="pool")
    rows = distil(whole, *data, **options)

    class Interrupted(Exception):
        pass

    embed, calls = perceptual.Metric.embed, []

    def interrupted(self, x):
        calls.append(1)
        if len(calls) == 6:
            raise Interrupted
        return embed(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(perceptual.Metric, "embed", interrupted)
        with pytest.raises(Interrupted):
            distil(broken, *data, checkpoint=tmp_path, **options)
    resumed = metric(mixer="pool")
    again = distil(resumed, *data, checkpoint=tmp_path, **options)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    other = Embeddings(prepared.targets.table, prepared.targets.values * 2, prepared.targets.identity)
    with pytest.raises(ValueError, match="task.targets"):
        distil(metric(mixer="pool"), prepared.pixels, other, prepared.val, checkpoint=tmp_path, **options)
    with pytest.raises(ValueError, match="model.recipe backbone.mixer: pool there, mha here"):
        distil(metric(), *data, checkpoint=tmp_path, **options)


def test_targets_that_do_not_fit_are_refused(prepared, world):
    data = (prepared.pixels, prepared.targets, prepared.val)
    with pytest.raises(ValueError, match="32 dimensions, the teacher's 24"):
        distil(metric(width=32), *data, epochs=1, **FAST)
    with pytest.raises(ValueError, match="normalize=True, the student False"):
        distil(metric(normalize=False), *data, epochs=1, **FAST)
    few = cache(prepared.val.paths, 24, folder=world / "cache", workers=1, progress=False)
    with pytest.raises(ValueError, match="not among the pixels"):
        distil(metric(), few, prepared.targets, prepared.val, epochs=1, **FAST)
    held_out = prepared.targets.table.assign(split="val")
    with pytest.raises(ValueError, match='no row of the split "train"'):
        targets = Embeddings(held_out, prepared.targets.values, prepared.targets.identity)
        distil(metric(), prepared.pixels, targets, prepared.val, epochs=1, **FAST)


def test_defaults_are_the_originals():
    defaults = {k: p.default for k, p in inspect.signature(distillation.distil).parameters.items()}
    assert (defaults["epochs"], defaults["batch_size"], defaults["lr"], defaults["trainable"]) == (
        5,
        32,
        1e-4,
        "mlp_norm",
    )
