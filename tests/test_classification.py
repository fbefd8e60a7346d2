"""The classification study: its model, training, scores, costs and patterns."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_f1_score

from thesis_lib import attention_patterns as patterns
from thesis_lib import classification, classification_costs, efficiency, paths
from thesis_lib.attention import MIXERS
from thesis_lib.attention.identity import Identity
from thesis_lib.classification import Images, accuracy_rows, held_out, macro_f1, open_splits, run, score, train
from thesis_lib.classifier import ViTForImageClassification, load, refuse_other, resolve, save
from thesis_lib.closed_form import count_macs, model_cost
from thesis_lib.datasets import synthetic
from thesis_lib.datasets.synthetic_cifar10 import write_cifar10

TINY = {"patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
STUDY = {"image_size": 160, "patch_size": 8, "hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3,
         "intermediate_size": 768}  # fmt: skip
RECIPE = {"batch_size": 8, "lr": 3e-3, "device": "cpu", "progress": False}
PLAIN = {"crop_scale": None, "flip": 0.0, "smoothing": 0.0}


def build(seed=0, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(TINY | config).eval()


def coloured(n, seed=0, classes=("red", "green", "blue")):
    """Noise in which one channel is brighter: the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = np.arange(n) % len(classes)
    pixels = torch.randint(0, 120, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), torch.from_numpy(labels)] += 100
    return Images(pixels, np.arange(n), labels, classes)


# --- model


def parameters(**config):
    with torch.device("meta"):
        return sum(p.numel() for p in ViTForImageClassification(config).parameters())


def test_parameter_counts_are_the_published_ones_and_a_final_norm():
    assert parameters(**STUDY) == 3_675_082 + 2 * 192
    stored = {32: 3_880_394, 64: 4_085_706, 128: 4_496_330, 256: 5_317_578}
    assert {k: parameters(**STUDY, attention_type="linformer", linformer_k=k) - 2 * 192 for k in stored} == stored
    assert parameters() == 119_098 + 2 * 48


@pytest.mark.parametrize("mixer", MIXERS)
def test_counted_and_closed_form_cost_agree(mixer):
    model = build(attention_type=mixer, num_classes=7)
    cost = model_cost(model.vit)
    assert cost.macs == count_macs(model, torch.rand(1, 3, 32, 32))
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_names_of_the_study_reach_mixers_and_their_options():
    names = {"standard": "mha", "faster": "mha", "full": "mha", "nystromformer": "nystrom", "performer": "performer"}
    assert {kind: build(attention_type=kind).mixer for kind in names} == names
    for kind, key, option in (
        ("linformer", "linformer_k", "rank"),
        ("performer", "performer_features", "features"),
        ("nystromformer", "nystrom_landmarks", "landmarks"),
    ):
        model = build(attention_type=kind, **{key: 4, "linformer_k": 4})
        assert {block.attn.options[option] for block in model.vit.blocks} == {4}
    assert build(attention_type="sra", mixer_options={"ratio": 4}).vit.blocks[1].attn.options["ratio"] == 4
    model = build(intermediate_size=41, drop_path_rate=0.2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3)
    assert model.vit.blocks[0].mlp.fc1.out_features == 41 and model.vit.blocks[1].drop_path1.drop_prob == pytest.approx(
        0.2
    )
    assert model.vit.blocks[0].attn.attn_drop.p == 0.3 and model.vit.pos_drop.p == 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 48}, r"unknown key 'hiden_size' \(did you mean hidden_size"),
        ({"attention_type": "linfomer"}, "did you mean linformer"),
        ({"patch_size": 5}, "patch_size=5 does not divide image_size=32"),
        ({"num_attention_heads": 5}, "does not divide hidden_size"),
        ({"num_classes": 0}, "num_classes=0 must be an integer at least 1"),
        ({"drop_path_rate": 1.5}, r"must lie in \[0, 1\)"),
        ({"attention_type": "linformer", "linformer_k": 99}, "99"),
        ({"mixer_options": {"rate": 3}}, "no option 'rate'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)


def test_attention_maps_are_those_of_the_layers_and_change_nothing():
    model, x = build(attention_type="standard"), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, maps = model(x, output_attentions=True)
        assert torch.equal(logits, model(x)) and len(maps) == 2 and maps[0].shape == (2, 3, 17, 17)
        vit = model.vit
        tokens = vit._pos_embed(vit.patch_embed(2 * x - 1))
        first = vit.blocks[0].attn.attention_map(vit.blocks[0].norm1(tokens))
        assert_close(maps[0], first)
        tokens = vit.blocks[0](tokens)
        assert_close(maps[1], vit.blocks[1].attn.attention_map(vit.blocks[1].norm1(tokens)))
    assert not vit.blocks[0].attn._forward_pre_hooks


@pytest.mark.parametrize(
    "x", [torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.rand(3, 32)]
)
def test_images_of_another_kind_are_refused(x):
    with pytest.raises(ValueError, match=r"floats in \[0, 1\] of shape \(B, 3, 32, 32\)"):
        build()(x)


def test_a_saved_model_comes_back_with_its_configuration(tmp_path):
    model, x = build(attention_type="performer", performer_features=8), torch.rand(2, 3, 32, 32)
    state = torch.get_rng_state()
    again = load(save(model, tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), state) and again.config == model.config and not again.training
    assert torch.equal(again(x), model(x)) and {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    (tmp_path / "run" / "config.json").write_text(json.dumps(model.config | {"num_classes": 3}))
    with pytest.raises(ValueError, match="not of the model that config.json describes"):
        load(tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="model.safetensors is corrupt"):
        load(tmp_path / "run")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load(tmp_path / "run")


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"hidden_dropout_prob": "a"}', '{"mixer_options": [1]}'])
def test_a_configuration_that_is_none_is_refused_by_name(tmp_path, text):
    save(build(), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json describes no model"):
        load(tmp_path / "run")
    if not text.startswith('{"'):
        with pytest.raises(ValueError, match="config.json is corrupt"):
            refuse_other({}, tmp_path / "run")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = build()
    torch.nn.init.constant_(model.vit.cls_token, torch.nan)
    with pytest.raises(ValueError, match="1 not of finite floats .vit.cls_token"):
        load(save(model, tmp_path / "run"))


def test_a_classifier_lies_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save(build(), "~/run") == tmp_path / "run" and load("~/run")
    with pytest.raises(ValueError, match="another model"):
        refuse_other({"num_classes": 3}, "~/run")


# --- data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_cifar10(root / "cifar10", {"train": 40, "test": 10})
    synthetic.write_imagenet100(root / "in100", {"train": 12, "validation": 4, "test": 6}, size=32, workers=1)
    return root


def test_val_is_a_stratified_part_of_the_training_images(world):
    labels = np.repeat([0, 1, 2], [50, 30, 4])
    held = held_out(labels, 0.1, 0)
    assert np.bincount(labels[held]).tolist() == [5, 3, 1]
    assert (held == held_out(labels, 0.1, 0)).all() and (held != held_out(labels, 0.1, 1)).any()
    splits = open_splits("CIFAR-10", world / "cifar10", 32, val_share=0.25)
    rows = np.concatenate([splits["train"].rows, splits["val"].rows])
    assert sorted(rows) == list(range(40)) and len(splits["val"]) == 10 and len(splits["test"]) == 10
    assert splits["val"].pixels is splits["train"].pixels and splits["test"].pixels is not splits["train"].pixels
    images, labels = splits["val"][np.array([2, 0])]
    assert torch.equal(images[1], splits["train"].pixels[splits["val"].rows[0]]) and labels.dtype == torch.int64
    assert len(open_splits("CIFAR-10", world / "cifar10", 32, max_samples=7)["train"]) == 7


def test_imagenet100_keeps_its_published_validation_split(world):
    splits = open_splits("ImageNet-100", world / "in100", 16)
    assert {split: len(part) for split, part in splits.items()} == {"train": 12, "val": 4, "test": 6}
    images, labels = splits["train"][np.arange(3)]
    assert images.shape == (3, 3, 16, 16) and splits["test"].classes[4] == "striped bean"
    source = classification.ImageNet100(world / "in100", "test")
    assert (splits["test"].labels == source.labels).all()
    identity = classification._identity
    assert identity(splits["train"]) == identity(open_splits("ImageNet-100", world / "in100", 16)["train"])
    assert identity(splits["train"]) != identity(
        open_splits("ImageNet-100", world / "in100", 16, max_samples=5)["train"]
    )


def test_wrong_data_settings_are_refused(world):
    with pytest.raises(ValueError, match="did you mean 'CIFAR-10'"):
        open_splits("CIFAR10", world / "cifar10", 32)
    with pytest.raises(ValueError, match="CIFAR-10 has 32 px"):
        open_splits("CIFAR-10", world / "cifar10", 64)
    with pytest.raises(ValueError, match="between 0 and 1"):
        open_splits("CIFAR-10", world / "cifar10", 32, val_share=0)


# --- training


class Counting:
    """Pixels that count what is read."""

    def __init__(self, pixels):
        self.pixels, self.read = pixels, 0

    def __getitem__(self, rows):
        self.read += len(rows)
        return self.pixels[rows]


def test_a_run_learns_is_chosen_on_val_and_reads_test_once(tmp_path):
    test = coloured(30, seed=2)
    counting = Counting(test.pixels)
    splits = {
        "train": coloured(48),
        "val": coloured(12, seed=1),
        "test": Images(counting, *list(vars(test).values())[1:]),
    }
    recipe = RECIPE | {"epochs": 4, "augmentation": {"mixup": 0.2}, "ema_decay": 0.5}
    state = torch.get_rng_state()
    model, log, table = run(TINY | {"attention_type": "pool"}, splits, tmp_path, seed=3, **recipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert counting.read == len(table) == 30 and table["top1"].mean() > 0.8 and log[-1]["loss"] < log[0]["loss"]
    assert score(model, splits["val"])["top1"].mean() == max(row["val_top1"] for row in log)
    again = load(tmp_path)
    assert again.config["num_classes"] == 3 and score(again, test).equals(table)
    rows = classification.log_rows(log, splits, mixer="pool")
    losses = [row["value"] for row in rows if row["metric"] == "loss" and row["split"] == "train"]
    assert losses == [row["loss"] for row in log]
    assert {row["metric"]: row["value"] for row in rows if "epoch" not in row}["epochs"] == 4
    _, same, _ = run(TINY | {"attention_type": "pool"}, splits, tmp_path, seed=3, **recipe)  # from the checkpoint
    assert same == log


def test_going_on_with_another_configuration_is_refused_and_names_the_key(tmp_path):
    splits = {"train": coloured(16), "val": coloured(6, seed=1), "test": coloured(6, seed=2)}
    run(TINY, splits, tmp_path, epochs=1, **RECIPE)
    with pytest.raises(ValueError, match="hidden_size: 24 there, 48 here"):
        run(TINY | {"hidden_size": 48}, splits, tmp_path, epochs=1, **RECIPE)
    with pytest.raises(ValueError, match="attention_type: standard there, pool here"):
        run(TINY | {"attention_type": "pool"}, splits, tmp_path, epochs=1, **RECIPE)
    for key, changed in {
        "task.augmentation.mixup: None there, 0.5 here": {"augmentation": {"mixup": 0.5}},
        "task.batch_size: 8 there, 4 here": {"batch_size": 4},
    }.items():
        with pytest.raises(ValueError, match=key):
            run(TINY, splits, tmp_path, epochs=1, **RECIPE | changed)
    with pytest.raises(ValueError, match="task.val"):
        run(TINY, splits | {"val": coloured(6, seed=5)}, tmp_path, epochs=1, **RECIPE)
    run(TINY | {"hidden_size": 48}, splits, tmp_path, epochs=1, resume=False, **RECIPE)
    assert load(tmp_path).config["hidden_size"] == 48


def test_training_stops_when_val_gains_no_more(tmp_path):
    options = RECIPE | {"lr": 1e-12, "epochs": 6, "augmentation": PLAIN}
    log = train(build(num_classes=3), coloured(16), coloured(6, seed=1), patience=2, **options)
    assert len(log) == 3  # the first is the best, two more bring nothing
    half = train(build(num_classes=3), coloured(16), coloured(6, seed=1), checkpoint=tmp_path, patience=2, **options)
    assert len(train(build(num_classes=3), coloured(16), coloured(6, seed=1), checkpoint=tmp_path, patience=2,
                     **options)) == len(half)  # fmt: skip


def test_norms_biases_and_positions_are_not_decayed_and_the_last_batch_is_whole():
    model = build(num_classes=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = RECIPE | {"lr": 1e-9, "weight_decay": 1e8, "epochs": 1, "augmentation": PLAIN, "ema_decay": None}
    (row,) = train(model, coloured(21), coloured(6, seed=1), **options)
    kept = {name for name, p in model.named_parameters() if (p - before[name]).abs().max() < 1e-4}
    decayed = {name for name, p in before.items() if p.ndim > 1 and "embed" not in name and "token" not in name}
    assert kept == set(before) - decayed - {"vit.patch_embed.proj.weight"}
    assert row["images_per_s"] * row["seconds"] == pytest.approx(16)
    with pytest.raises(ValueError, match="do not fill one batch of 64"):
        train(model, coloured(21), coloured(6), **options | {"batch_size": 64})
    with pytest.raises(ValueError, match="3 classes, the model 10"):
        train(build(), coloured(21), coloured(6), **options)


def test_two_processes_through_the_notebook_train_as_one_with_twice_the_batch(world, tmp_path):
    """Twenty steps under torchrun; both processes read, train, score and write for themselves."""
    given = {"root": str(world / "cifar10"), "model": {"image_size": 32, "patch_size": 8}, "mixers": ["standard"]}
    recipe = {"epochs": 20, "lr": 3.0e-3, "schedule": "constant", "warmup_epochs": 0.0}
    training = recipe | {"batch_size": 8, "max_batches": 2}
    sizes = {key: TINY[key] for key in TINY if key != "patch_size"}
    section = {"datasets": {"CIFAR-10": given | {"runs": 1, "training": training}}, "model": sizes}
    section |= {"scaling_sizes": [32], "augmentation": PLAIN, "latency_runs": 1, "time_limit": 0.01}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"07_image_classification": section}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "thesis_lib.execute"]
    notebook = str(paths.NOTEBOOKS / "07_image_classification.ipynb")
    subprocess.run(
        [sys.executable, "-m", *torchrun, notebook, "--profile", str(tmp_path / "two.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "THESIS_DATA": str(tmp_path / "data")},
        cwd=paths.ROOT,
        check=True,
        timeout=600,
    )
    rows = pq.read_table(tmp_path / "data" / "results" / "two" / "07_image_classification.parquet").to_pandas()
    two = rows.query("metric == 'loss' and split == 'train'").sort_values("epoch")["value"].to_numpy(float)
    splits = open_splits("CIFAR-10", world / "cifar10", 32)
    one = run(TINY, splits, tmp_path / "one", augmentation=PLAIN, max_batches=1, **RECIPE | recipe | {"batch_size": 16})
    losses = [row["loss"] for row in one[1]]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(two, losses, atol=1e-4, rtol=0)


# --- scores and costs


def test_scores_of_single_images(tmp_path):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([3.0, 2, 1, 0, -1, -2]))

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    data = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), np.arange(4), np.array([0, 1, 4, 5]), tuple("abcdef"))
    table = score(Fixed(), data, batch_size=3)
    assert table["top1"].tolist() == [True, False, False, False] and table["top5"].tolist() == [True, True, True, False]
    assert table["predicted"].tolist() == [0] * 4 and table["image"].tolist() == [0, 1, 2, 3]
    expected = torch.nn.functional.cross_entropy(Fixed().logits.expand(4, -1), torch.tensor([0, 1, 4, 5]))
    assert table["loss"].mean() == pytest.approx(expected.item())


def test_macro_f1_is_the_mean_of_the_classes_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    predicted = np.where(rng.random((2, 400)) < 0.7, labels, rng.integers(0, 4, (2, 400)))
    value, low, high = macro_f1(labels, predicted)
    theirs = [multiclass_f1_score(torch.tensor(p), torch.tensor(labels), 4, average="macro").item() for p in predicted]
    assert value == pytest.approx(np.mean(theirs), abs=1e-6)
    spread = 1.96 * np.sqrt(0.775 * 0.225 / 400)
    assert value - low == pytest.approx(spread, rel=0.35) and high - value == pytest.approx(spread, rel=0.35)
    assert macro_f1(labels, labels[None])[:2] == (1.0, 1.0)


def test_runs_are_averaged_image_by_image():
    def table(seed, predicted):
        label = np.array([0, 1, 0, 1])
        frame = {"image": np.arange(4), "label": label, "predicted": predicted, "top1": label == predicted}
        return pd.DataFrame(frame | {"top5": True, "seed": seed})

    both = pd.concat([table(0, np.array([0, 1, 1, 1])), table(1, np.array([0, 0, 1, 1]))])
    rows = {row["metric"]: row for row in accuracy_rows(both, mixer="mha", split="test")}
    assert rows["top1"]["value"] == 0.625 and rows["top1"]["n"] == 4 and rows["top1"]["runs"] == 2
    assert rows["top5"]["value"] == rows["top5"]["low"] == 1 and rows["macro_f1"]["mixer"] == "mha"
    assert rows["top1"]["low"] < 0.625 < rows["top1"]["high"]
    one = {row["metric"]: row for row in accuracy_rows(both[both["seed"] == 0])}
    assert one["top1"]["value"] == 0.75 and one["top1"]["runs"] == 1


def test_costs_of_a_model(tmp_path):
    model = build(attention_type="linformer")
    rows = {row["metric"]: row for row in classification_costs.cost_rows(model, batch_size=4, runs=5, seconds=1)}
    assert rows["macs"]["value"] == rows["macs_counted"]["value"] > 0
    assert rows["params"]["value"] == sum(p.numel() for p in model.parameters())
    size = (save(model, tmp_path) / "model.safetensors").stat().st_size / 1e6
    assert rows["weights_size"]["value"] == pytest.approx(size, abs=0.01)
    weights = 4 * rows["params"]["value"] / 2**20
    assert rows["training_memory"]["value"] > 3 * weights > rows["peak_memory"]["value"]  # gradients, both moments
    more = {row["metric"]: row for row in classification_costs.cost_rows(model, batch_size=32, runs=3, seconds=1)}
    assert more["training_memory"]["value"] > rows["training_memory"]["value"]
    assert "latency" not in rows
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_latencies_of_several_models_are_taken_in_turn(monkeypatch):
    seen = []

    def interleaved(tasks, **limits):
        seen.append(limits)
        assert tasks["a"]().shape == (1, 10) and tasks["b"]().shape == (1, 7)
        return {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([0.5, 0.5, 0.5])}

    monkeypatch.setattr(classification_costs, "interleaved", interleaved)
    models = {"a": build().train(), "b": build(num_classes=7)}
    rows = classification_costs.latency_rows(models, runs=3, seconds=0.5)
    assert seen == [{"rounds": 3, "seconds": 1.0, "device": "cpu"}] and models["a"].training
    assert (rows["a"]["value"], rows["a"]["mean"], rows["a"]["unit"], rows["a"]["n"]) == (2000.0, 2000.0, "ms", 3)
    assert rows["a"]["std"] == pytest.approx(816.5, abs=0.1) and rows["b"]["std"] == 0 and "samples" not in rows["b"]
    assert rows["a"]["metric"] == "latency" and rows["a"]["batch"] == 1


def test_scaling_tells_what_a_mixer_cannot_serve():
    mixers = {"mha": {}, "linformer": {"attention_type": "linformer", "linformer_k": 20}}
    rows = classification_costs.scaling_rows(resolve(TINY), mixers, [32, 64], runs=2, seconds=0.1)
    table = pd.DataFrame(rows).set_index(["mixer", "tokens", "metric"])
    assert table.loc[("mha", 16, "macs"), "value"] < table.loc[("mha", 64, "macs"), "value"] / 4
    assert table.loc[("linformer", 64, "latency"), "value"] > 0 and table.loc[("mha", 64, "peak_memory"), "n"] == 1
    untimed = classification_costs.scaling_rows(resolve(TINY), {"mha": {}}, [32], timed=())
    assert [row["metric"] for row in untimed] == ["macs"] and untimed[0]["value"] == table.loc[
        ("mha", 16, "macs"), "value"
    ]
    refused = table.loc[("linformer", 16, "latency")]
    assert pd.isna(refused["value"]) and "20" in refused["note"]


def test_a_moment_in_which_the_machine_stalls_does_not_decide_a_latency(monkeypatch):
    readings = iter([(0.9, 80.0), (0.010, 1.0), (0.011, 1.0)])  # seconds, and what the yardstick took, ms

    def stalled(*_, **__):
        spent, beside = next(readings)
        return np.array([spent] * 3), {"beside": [beside] * 3}

    monkeypatch.setattr(efficiency, "time_beside", stalled)
    rows = classification_costs.scaling_rows(resolve(TINY), {"mha": {}}, [32], rounds=3)
    found = next(row for row in rows if row["metric"] == "latency")
    assert (found["n"], found["batch"], found["tokens"]) == (9, 1, 16)
    assert found["value"] == pytest.approx(11.0) and found["p95"] == pytest.approx(11.25)  # 900 / 80 ms
    assert found["mean"] == pytest.approx(32.25 / 3) and not any("samples" in row for row in rows)


# --- patterns


def test_distance_entropy_and_similarity_of_known_maps():
    same, all_ = torch.eye(5), torch.full((5, 5), 0.2)
    maps = torch.stack([same, all_, -2 * all_, torch.zeros(5, 5)])[None]  # (1, 4, 5, 5), a 2 x 2 grid and a class token
    mean = (0 + 1 + 1 + 2**0.5) / 4
    assert_close(patterns.mean_distance(maps, (2, 2)), torch.tensor([[0, mean, mean, torch.nan]]), equal_nan=True)
    assert_close(patterns.entropy(maps), torch.tensor([[0, 1, 1, torch.nan]]), equal_nan=True)
    assert_close(patterns.head_similarity(maps[:, 1:2].repeat(1, 2, 1, 1)), torch.ones(1))
    assert_close(patterns.head_similarity(torch.stack([same, all_ * (1 - same)])[None]), torch.zeros(1))
    assert patterns.head_similarity(maps[:, :1]).isnan()


def test_rollout_follows_the_residual_stream():
    same, shift = torch.eye(3)[None, None], torch.eye(3).roll(1, 1)[None, None]
    assert_close(patterns.rollout([same, same])[0], torch.eye(3))
    expected = (torch.eye(3) + shift[0, 0]) / 2
    assert_close(patterns.rollout([shift])[0], expected)
    other = torch.full((1, 2, 3, 3), 1 / 3)
    assert_close(patterns.rollout([shift, other])[0], (torch.eye(3) + 1 / 3) / 2 @ expected)


def test_a_mixer_without_a_map_shows_its_effective_matrix(monkeypatch):
    monkeypatch.setattr(Identity, "attention_map", lambda self, x: None)
    maps = patterns.maps_by_layer(build(attention_type="identity"), torch.rand(2, 3, 32, 32))
    assert [tuple(layer.shape) for layer in maps] == [(2, 1, 17, 17)] * 2
    assert_close(maps[0], maps[0] * torch.eye(17))


def test_patterns_and_pictures_become_rows():
    model, data = build(num_classes=3), coloured(5)
    rows = pd.DataFrame(patterns.pattern_rows(model, data, count=4, mixer="mha"))
    assert set(rows["metric"]) == {"attention_distance", "attention_entropy", "head_similarity"}
    assert (rows["n"] == 4).all() and sorted(rows["layer"].unique()) == [1, 2] and (rows["mixer"] == "mha").all()
    assert (rows["low"] <= rows["value"]).all() and (rows["value"] <= rows["high"]).all()
    table = patterns.map_table(model, data, [1, 4], mixer="mha")
    assert len(table) == 2 * (1 + 2 * (1 + 3)) and set(table["label"]) == {"green"}
    assert table["picture"].iloc[0].startswith(b"\x89PNG") and table["weights"].map(len).eq(16).all()
    maps = patterns.maps_by_layer(model, data[np.array([4])][0].float() / 255)
    line = table.query("image == 4 and layer == 2 and head == 3").iloc[0]
    assert line["weights"] == pytest.approx(maps[1][0, 2, 0, 1:].tolist(), abs=1e-6)
