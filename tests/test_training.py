import copy
import inspect
import math
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thesis_lib import backbone as backbones
from thesis_lib import checkpoint, perceptual, trainer, training
from thesis_lib.training import Batches, fit, learning_rate, lora_tune, triplet_batches, two_afc

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(32, 1, generator=torch.Generator().manual_seed(2))
FAST = {"device": "cpu", "progress": False}


def network(seed=0, dropout=0.3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.Dropout(dropout), nn.ReLU(), nn.Linear(12, 1))


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def epochs_of(size):
    def batches(epoch, generator):
        return Batches(torch.randperm(len(X), generator=generator).numpy(), size, lambda rows: (X[rows], Y[rows]))

    return batches


def score(model, epoch):
    return {"2afc": -squares(model, (X, Y)).item()}


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_s")} for row in rows]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Interrupting:
    """The loss, until it is asked for the n-th time."""

    def __init__(self, n):
        self.n = n

    def __call__(self, model, batch):
        self.n -= 1
        if self.n == 0:
            raise KeyboardInterrupt
        return squares(model, batch)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.0), (1, 0.2), (2, 0.4), (4, 0.1 + 0.3 * 0.5 * (1 + math.sqrt(0.5))), (6, 0.25), (10, 0.1)],
)
def test_warm_up_then_cosine(epoch, expected):
    options = {"epochs": 10, "lr": 0.4, "warmup_epochs": 2, "min_lr": 0.1}
    assert learning_rate(epoch, schedule="cosine", **options) == pytest.approx(expected)
    assert learning_rate(epoch, schedule="constant", **options) == pytest.approx(min(0.2 * epoch, 0.4))


def test_rows_log_the_schedule_and_the_weighted_mean_loss():
    seen = []

    def loss(model, batch):
        value = squares(model, batch)
        seen.append((value.item(), len(batch[0])))
        return value

    rows = fit(
        network(), loss, epochs_of(12), epochs=2, lr=0.01, schedule="cosine", warmup_epochs=1, select=None, **FAST
    )
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * 2 / 3, 0.01 * 0.5 * (1 + math.cos(math.pi * 2 / 3))])
    assert [size for _, size in seen] == [12, 12, 8] * 2
    assert rows[1]["loss"] == pytest.approx(sum(v * n for v, n in seen[3:]) / 32, rel=1e-12)
    assert all(row["seconds"] > 0 and row["images_per_s"] == pytest.approx(32 / row["seconds"]) for row in rows)


RECIPE = {"epochs": 4, "lr": 0.02, "schedule": "cosine", "warmup_epochs": 1, "weight_decay": 0.1, "grad_clip": 1.0}


@pytest.mark.parametrize("ema_decay", [None, 0.8])
@pytest.mark.parametrize("interrupted_at", [2, 11, 13])  # in epochs of 4 batches: the first, within one, at its start
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, interrupted_at, ema_decay):
    recipe = RECIPE | FAST | {"evaluate": score, "ema_decay": ema_decay}
    whole, resumed = network(), network()
    expected = fit(whole, squares, epochs_of(8), **recipe)
    with pytest.raises(KeyboardInterrupt):
        fit(resumed, Interrupting(interrupted_at), epochs_of(8), checkpoint=tmp_path / "run", **recipe)
    torch.rand(7), np.random.rand(3), random.random()  # noqa: NPY002  the new process starts from other random states
    if interrupted_at < 4:
        resumed = network()  # nothing was stored: a new process starts from the same initial weights
    rows = fit(resumed, squares, epochs_of(8), checkpoint=tmp_path / "run", **recipe)
    assert without_times(rows) == without_times(expected)
    assert same_weights(whole, resumed)
    again = network(seed=5)
    assert fit(again, squares, epochs_of(8), checkpoint=tmp_path / "run", **recipe) == rows  # finished: read back
    assert same_weights(whole, again)


def test_what_cannot_go_on_keeps_the_best_weights_alone(tmp_path):
    states = {}
    for schedule in ("constant", "cosine"):
        options = {"lr": 0.02, "evaluate": score, "ema_decay": 0.5, "checkpoint": tmp_path / schedule, **FAST}
        fit(network(), squares, epochs_of(8), epochs=3, schedule=schedule, **options)
        states[schedule] = torch.load(tmp_path / schedule / "state.pt", weights_only=True)
    assert {"last", "average", "best"} == states["constant"]["files"].keys() and "optimizer" in states["constant"]
    assert {"best"} == states["cosine"]["files"].keys() and "optimizer" not in states["cosine"]
    assert len(list((tmp_path / "cosine").glob("*.safetensors"))) == 1


def test_the_seed_decides_the_order_and_the_dropout():
    def trained(seed):
        model = network()
        fit(model, squares, epochs_of(8), epochs=1, lr=0.01, seed=seed, **FAST)
        return model

    assert same_weights(trained(1), trained(1))
    assert not same_weights(trained(1), trained(2))


def test_global_random_states_stay_as_they_were():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def seed():
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    fit(network(), squares, epochs_of(8), epochs=1, lr=0.01, **FAST)
    assert draw() == expected


def test_more_epochs_go_on_from_a_finished_constant_run(tmp_path):
    options = {"lr": 0.01, "evaluate": score, "checkpoint": tmp_path, **FAST}
    whole, extended = network(), network()
    expected = fit(whole, squares, epochs_of(8), epochs=3, lr=0.01, evaluate=score, **FAST)
    fit(extended, squares, epochs_of(8), epochs=1, **options)
    assert without_times(fit(extended, squares, epochs_of(8), epochs=3, **options)) == without_times(expected)
    assert same_weights(whole, extended)
    with pytest.raises(ValueError, match=f"holds 3 epochs, more than the 2 .*delete {tmp_path}/state.pt to train anew"):
        fit(network(), squares, epochs_of(8), epochs=2, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_batch_and_checkpoint_named(tmp_path, value):
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        return squares(model, batch) * (value if calls == 4 + 3 else 1.0)

    model = network()
    with pytest.raises(RuntimeError, match=rf"{value} in epoch 2, batch 2 .*of epoch 1, is {tmp_path}"):
        fit(model, loss, epochs_of(8), epochs=3, lr=0.01, checkpoint=tmp_path, **FAST)
    assert all(p.isfinite().all() for p in model.parameters())
    one = network()
    fit(one, squares, epochs_of(8), epochs=1, lr=0.01, **FAST)
    kept = network(seed=9)
    fit(kept, squares, epochs_of(8), epochs=1, lr=0.01, checkpoint=tmp_path, **FAST)
    assert same_weights(one, kept)


def test_weights_that_are_not_finite_are_never_stored(tmp_path):
    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def loss(model, batch):
        return Exploding.apply(squares(model, batch))

    with pytest.raises(RuntimeError, match="weights are not finite after epoch 1; no checkpoint was written"):
        fit(network(), loss, epochs_of(32), epochs=1, lr=0.01, checkpoint=tmp_path, **FAST)
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, "lr: 0.01 there, 0.5 here"),
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"config": {"margin": 0.2}}, "task.margin: 0.05 there, 0.2 here"),
        ({"ema_decay": 0.9}, "ema_decay: None there, 0.9 here"),
        ({"batches": epochs_of(4)}, "steps: 4 there, 8 here"),
        ({"model": nn.Linear(6, 1)}, r"model.trained.0.weight: \[12, 6\] there, None here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    base = {"model": network(), "loss": squares, "batches": epochs_of(8), "epochs": 1, "lr": 0.01}
    base |= {"config": {"margin": 0.05}, "checkpoint": tmp_path, "select": None, **FAST}
    fit(**base)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=named):
        fit(**base | change)
    with pytest.raises(ValueError, match=f"; delete {tmp_path}/state.pt to train anew"):
        fit(**base | change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(fit(**base | change, resume=False)) == 1


def test_a_checkpoint_over_other_frozen_weights_is_refused(tmp_path):
    def half_frozen(seed):
        model = network(seed)
        model[0].requires_grad_(False)
        return model

    options = {"epochs": 1, "lr": 0.01, "checkpoint": tmp_path, **FAST}
    fit(half_frozen(0), squares, epochs_of(8), **options)
    with pytest.raises(ValueError, match="model.frozen"):
        fit(half_frozen(1), squares, epochs_of(8), **options)


def test_resume_modes(tmp_path):
    options = {"epochs": 1, "lr": 0.01, "checkpoint": tmp_path / "run", **FAST}
    with pytest.raises(FileNotFoundError, match="no checkpoint to go on from"):
        fit(network(), squares, epochs_of(8), resume="must", **options)
    rows = fit(network(), squares, epochs_of(8), resume="allow", **options)
    assert fit(network(), squares, epochs_of(8), resume="must", **options) == rows
    assert fit(network(), squares, epochs_of(8), resume=False, **options) != rows  # trained again: other times
    with pytest.raises(ValueError, match="resume must be"):
        fit(network(), squares, epochs_of(8), resume="yes", **options)


def test_what_other_code_finished_is_kept_aside_and_trained_anew(tmp_path, monkeypatch):
    options = {"epochs": 2, "lr": 0.01, "checkpoint": tmp_path / "run", **FAST}
    rows = fit(network(), squares, epochs_of(8), **options)
    old = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "run.old").mkdir()  # of an older code still: replaced
    (tmp_path / "run.old" / "older").touch()
    monkeypatch.setattr(checkpoint, "CODE", "corrected")
    with pytest.raises(ValueError, match="more than the 1 asked for"):  # what is asked must make sense first
        fit(network(), squares, epochs_of(8), **options | {"epochs": 1})
    with pytest.warns(RuntimeWarning, match="code changed since .*training goes on after epoch 2"):
        assert fit(network(), squares, epochs_of(8), resume="must", **options) == rows
    with pytest.warns(RuntimeWarning, match=f"code changed since .*moved to {tmp_path}/run.old, .* anew") as told:
        again = fit(network(), squares, epochs_of(8), **options)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert again != rows and without_times(again) == without_times(rows)  # trained again: other times
    assert {path.name: path.read_bytes() for path in (tmp_path / "run.old").iterdir()} == old
    assert fit(network(), squares, epochs_of(8), **options) == again  # it is of this code now


@pytest.mark.parametrize("written_by", ["other code", "code that did not say"])
def test_what_other_code_began_goes_on(tmp_path, monkeypatch, written_by):
    options = {"lr": 0.01, "checkpoint": tmp_path / "run", **FAST}
    whole, resumed = network(), network()
    expected = fit(whole, squares, epochs_of(8), epochs=3, lr=0.01, **FAST)
    with pytest.raises(KeyboardInterrupt):
        fit(resumed, Interrupting(6), epochs_of(8), epochs=2, **options)
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    if written_by == "other code":
        state["code"] = "other"
    else:
        del state["code"]
    torch.save(state, tmp_path / "run/state.pt")
    with pytest.warns(RuntimeWarning, match="code changed since .*training goes on after epoch 1"):
        fit(resumed, squares, epochs_of(8), epochs=2, **options)
    monkeypatch.setattr(checkpoint, "CODE", "a third")
    with pytest.warns(RuntimeWarning, match="goes on after epoch 2"):  # more epochs than it holds: not finished
        rows = fit(resumed, squares, epochs_of(8), epochs=3, **options)
    assert without_times(rows) == without_times(expected) and same_weights(whole, resumed)
    assert not (tmp_path / "run.old").exists()


def test_a_run_that_stopped_early_had_finished(tmp_path, monkeypatch):
    def worse(model, epoch):
        return {"2afc": -float(epoch)}

    options = {"epochs": 9, "lr": 0.01, "evaluate": worse, "patience": 2, "checkpoint": tmp_path / "run", **FAST}
    rows = fit(network(), squares, epochs_of(8), **options)
    assert len(rows) == 3 and fit(network(), squares, epochs_of(8), **options) == rows
    monkeypatch.setattr(checkpoint, "CODE", "corrected")
    with pytest.warns(RuntimeWarning, match="run.old, and training starts anew"):
        assert len(fit(network(), squares, epochs_of(8), **options)) == 3


def test_every_module_that_trains_decides_what_the_code_is():
    found = {pattern: set(checkpoint.PACKAGE.glob(f"{pattern}.py")) for pattern in checkpoint.TRAINED_BY}
    assert all(found.values()), found  # a module that was renamed
    trains = {path for path in checkpoint.PACKAGE.rglob("*.py") if re.search(r"\bfit\(\n", path.read_text())}
    assert len(trains) > 5 and not trains - set.union(*found.values())


@pytest.mark.parametrize("file", ["state.pt", "*.safetensors"])
def test_a_corrupt_checkpoint_is_refused(tmp_path, file):
    options = {"epochs": 1, "lr": 0.01, "checkpoint": tmp_path, **FAST}
    fit(network(), squares, epochs_of(8), **options)
    (path,) = tmp_path.glob(file)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RuntimeError, match=f"cannot be read .* delete {tmp_path}/state.pt to train anew"):
        fit(network(), squares, epochs_of(8), **options)


@pytest.mark.parametrize("failing", ["safetensors", "state.pt"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_keeps_the_checkpoint_before(tmp_path, monkeypatch, failing, error):
    options = {"lr": 0.01, "checkpoint": tmp_path, **FAST}
    fit(network(), squares, epochs_of(8), epochs=1, **options)
    replace = os.replace

    def full(source, target):
        if str(target).endswith(failing):
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RuntimeError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            fit(network(), squares, epochs_of(8), epochs=2, **options)
    if isinstance(error, OSError):
        assert "epoch 2" in str(caught.value) and "No space left" in str(caught.value)
        assert "the one before it is kept" in str(caught.value)
    whole, resumed = network(), network(seed=4)
    fit(whole, squares, epochs_of(8), epochs=2, lr=0.01, **FAST)
    assert len(fit(resumed, squares, epochs_of(8), epochs=2, **options)) == 2
    assert same_weights(whole, resumed)
    assert len(list(tmp_path.iterdir())) == 2  # state.pt and one weight file: nothing is left behind


def test_the_first_best_epoch_is_kept(tmp_path):
    values = iter([math.nan, 0.8, None, 0.8, math.nan, 0.7])
    snapshots = []

    def evaluate(model, epoch):
        snapshots.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"2afc": next(values), "val_loss": 1.0}

    model = network()
    rows = fit(model, squares, epochs_of(8), epochs=6, lr=0.01, evaluate=evaluate, checkpoint=tmp_path, **FAST)
    assert "2afc" not in rows[2] and rows[2]["val_loss"] == 1.0 and rows[3]["2afc"] == 0.8
    assert all(torch.equal(value, snapshots[1][name]) for name, value in model.state_dict().items())
    assert not model.training
    again = network(seed=3)
    fit(again, squares, epochs_of(8), epochs=6, lr=0.01, evaluate=evaluate, checkpoint=tmp_path, **FAST)
    assert same_weights(model, again)


def test_evaluation_every_n_epochs_and_after_the_last():
    rows = fit(network(), squares, epochs_of(32), epochs=5, lr=0.01, evaluate=score, eval_every=2, **FAST)
    assert ["2afc" in row for row in rows] == [False, True, False, True, True]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_models_are_judged_in_the_precision_they_are_trained_in(precision):
    def evaluate(model, epoch):
        return {"2afc": float(torch.is_autocast_enabled("cpu"))}

    options = {"epochs": 1, "lr": 0.01, "evaluate": evaluate, "mixed_precision": precision, **FAST}
    assert fit(network(), squares, epochs_of(8), **options)[0]["2afc"] == (precision == "bf16")


def test_a_misspelt_select_stops_at_the_first_evaluation():
    with pytest.raises(ValueError, match="evaluate gives 2afc, not 'accuracy'"):
        fit(network(), squares, epochs_of(32), epochs=2, lr=0.01, evaluate=score, select="accuracy", **FAST)


def test_averaged_weights_are_those_computed_by_hand():
    before = []

    def loss(model, batch):
        before.append([p.detach().clone() for p in model.parameters()])
        return squares(model, batch)

    options = {"epochs": 2, "lr": 0.05, **FAST}
    plain, averaged = network(dropout=0.0), network(dropout=0.0)
    fit(plain, squares, epochs_of(16), **options)
    with pytest.warns(RuntimeWarning, match="ema_decay=0.7 is too high for this run: 24% of the average after 4 steps"):
        fit(averaged, loss, epochs_of(16), ema_decay=0.7, **options)
    weights = [*before, [p.detach() for p in plain.parameters()]]  # w0 ... w4
    for i, parameter in enumerate(averaged.parameters()):
        expected = weights[0][i]
        for step in weights[1:]:
            expected = 0.7 * expected + 0.3 * step[i]
        torch.testing.assert_close(parameter.detach(), expected)


def test_the_average_of_a_long_run_is_taken_without_a_word_and_no_gradient_stays(recwarn):
    model = network(dropout=0.0)
    fit(model, squares, epochs_of(16), ema_decay=0.4, epochs=2, lr=0.05, **FAST)
    assert not recwarn.list and all(p.grad is None for p in model.parameters())


def test_only_what_requires_a_gradient_is_trained_and_groups_scale_the_rate():
    model = network(dropout=0.0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].bias.requires_grad_(False)
    groups = [{"params": [model[0].weight]}, {"params": [model[3].weight, model[3].bias], "lr_scale": 0.25}]
    fit(model, squares, epochs_of(32), epochs=1, lr=0.01, parameters=groups, **FAST)
    assert torch.equal(model[0].bias, start["0.bias"]) and model[0].bias.grad is None
    moved = (model[0].weight - start["0.weight"]).abs()
    moved = moved[moved > 0]  # Adam's first step is the learning rate wherever there is a gradient
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close((model[3].bias - start["3.bias"]).abs(), torch.tensor([0.0025]), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fit(network().requires_grad_(False), squares, epochs_of(32), epochs=1, lr=0.01, **FAST)


def test_a_gpu_named_by_its_number_is_the_one_taken(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(ValueError, match="there is only 'cpu'"):  # Accelerate takes the current one, were there any
        fit(network(), squares, epochs_of(16), **FAST | {"device": "cuda:1"}, epochs=1, lr=0.1)
    assert chosen == [torch.device("cuda:1")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a GPU of its own, so say 'cuda'"):
        fit(network(), squares, epochs_of(16), **FAST | {"device": "cuda:1"}, epochs=1, lr=0.1)


def test_precision_and_device_are_those_of_each_call():
    types = []

    def loss(model, batch):
        types.append(model(batch[0]).dtype)
        return squares(model, batch)

    for precision in ("no", "bf16", "no"):
        fit(network(), loss, epochs_of(32), epochs=1, lr=0.01, mixed_precision=precision, **FAST)
    assert types == [torch.float32, torch.bfloat16, torch.float32]
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="'cuda' was asked for"):
            fit(network(), squares, epochs_of(32), epochs=1, lr=0.01, device="cuda", progress=False)
    fit(network(), squares, epochs_of(32), epochs=1, lr=0.01, **FAST)


def test_a_data_loader_serves_as_batches():
    model, other = network(), network()

    def loader(epoch, generator):
        return DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=generator)

    fit(model, squares, loader, epochs=2, lr=0.01, **FAST)
    fit(other, squares, lambda epoch, generator: list(loader(epoch, generator)), epochs=2, lr=0.01, **FAST)
    assert same_weights(model, other)


@pytest.mark.parametrize("wrong", [{"schedule": "cosin"}, {"epochs": 0}, {"warmup_epochs": 9}, {"eval_every": 0}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match="cosine|epochs"):
        fit(network(), squares, epochs_of(8), **{"epochs": 2, "lr": 0.01} | wrong, **FAST)


def test_each_process_takes_its_share_of_the_batches():
    batches = list("abcdefg")
    assert list(trainer.share(batches, 1, 3)) == [(1, "b"), (4, "e")]
    assert list(trainer.share(SimpleIterable(batches), 1, 3)) == [(1, "b"), (4, "e")]
    assert [name for _, name in trainer.share(batches, 0, 1)] == batches


class SimpleIterable:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


TWO_PROCESSES = """
import os, sys, torch, warnings
sys.path[:0] = [{root!r}, {tests!r}]
from test_training import epochs_of, network, score, squares, without_times
from thesis_lib import checkpoint
from thesis_lib.training import fit
fit(network(), squares, epochs_of(8), epochs=1, lr=0.01, device="cpu", mixed_precision="bf16", progress=False)
model = network(dropout=0.0)
options = dict(epochs=1, lr=0.01, evaluate=score, checkpoint={folder!r}, device="cpu", progress=False)
rows = fit(model, squares, epochs_of(3), **options)
checkpoint.CODE = "corrected"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    again = fit(network(dropout=0.0), squares, epochs_of(3), **options)
assert again != rows and without_times(again) == without_times(rows)  # both trained anew
assert sum("code changed" in str(w.message) for w in told) == (os.environ["RANK"] == "0")
if os.environ["RANK"] == "1":  # the process that neither evaluated nor wrote
    torch.save((rows, model.state_dict()), {out!r})
"""


def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path):
    script, out = tmp_path / "train.py", tmp_path / "out.pt"
    here = Path(__file__).resolve()
    script.write_text(
        TWO_PROCESSES.format(
            root=str(here.parents[1]), tests=str(here.parent), folder=str(tmp_path / "run"), out=str(out)
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", str(script)],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "run.old/state.pt").exists() and (tmp_path / "run/state.pt").exists()
    rows, state = torch.load(out, weights_only=True)
    one = network(dropout=0.0)
    alone = lambda e, g: list(epochs_of(6)(e, g))[:5]  # noqa: E731  10 of 11 batches of 3: the odd one is left out
    (expected,) = fit(one, squares, alone, epochs=1, lr=0.01, evaluate=score, **FAST)
    assert {key: rows[0][key] for key in ("loss", "2afc", "lr")} == pytest.approx(
        {key: expected[key] for key in ("loss", "2afc", "lr")}, rel=1e-5
    )
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-7)


# --- triplets


class FakePixels:
    def __init__(self, images):
        self.images, self.usable, self.requests = images, np.ones(len(images), bool), []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        self.requests.append(np.asarray(indices))
        return self.images[torch.as_tensor(np.asarray(indices))]


def tiny_vit(seed=0, patch_size=8):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=16,
            patch_size=patch_size,
            embed_dim=24,
            depth=2,
            num_heads=2,
            num_classes=0,
            global_pool="token",
        )
    model.recipe = {"name": "tiny", "img_size": 16, "mixer": "mha", "layers": None, "mixer_options": {}}
    return model.eval()


@pytest.fixture(scope="module")
def triplets():
    """Twenty triplets: the voted image is the reference with more red, the other one the reference with more blue."""
    reference = torch.randint(0, 190, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    near, far = (reference + 60 * torch.eye(3, dtype=torch.long)[channel].view(3, 1, 1) for channel in (0, 2))
    votes = (torch.arange(20) % 2).float()
    right = torch.where(votes.view(-1, 1, 1, 1) == 1, near, far)
    left = torch.where(votes.view(-1, 1, 1, 1) == 1, far, near)
    pixels = FakePixels(torch.cat([reference, left, right]).to(torch.uint8))
    index = np.arange(60).reshape(3, 20).T
    return pixels, SimpleNamespace(index=index, right_vote=votes.numpy())


def test_triplet_batches_hold_references_then_left_then_right(triplets):
    pixels, data = triplets
    batches = triplet_batches(pixels, data.index, data.right_vote, 8)

    def epoch(number):
        return list(batches(number, torch.Generator().manual_seed(number)))

    assert [len(votes) for _, votes in epoch(1)] == [8, 8, 4]
    images, votes = epoch(1)[0]
    assert images.shape == (24, 3, 16, 16) and images.dtype == torch.uint8
    rows = [int((pixels.images == image).flatten(1).all(1).nonzero()) for image in images]
    assert rows[8:16] == [row + 20 for row in rows[:8]] and rows[16:] == [row + 40 for row in rows[:8]]
    assert votes.tolist() == [row % 2 for row in rows[:8]]
    assert torch.equal(epoch(2)[0][1], epoch(2)[0][1]) and not torch.equal(epoch(1)[0][0], epoch(2)[0][0])
    assert len(triplet_batches(pixels, data.index, data.right_vote, 8, max_batches=2)(1, torch.Generator())) == 2
    with pytest.raises(ValueError, match="batch_size"):
        triplet_batches(pixels, data.index, data.right_vote, 0)(1, torch.Generator())


def test_triplets_with_a_skipped_image_are_left_out(triplets):
    pixels, data = triplets
    holed = FakePixels(pixels.images)
    holed.usable[[3, 25]] = False  # reference of triplet 3, left of triplet 5
    batches = triplet_batches(holed, data.index, data.right_vote, 32)
    ((images, votes),) = list(batches(1, torch.Generator().manual_seed(0)))
    assert len(images) == 3 * 18 and len(votes) == 18
    asked = set(np.concatenate(holed.requests).tolist())
    assert asked == set(range(60)) - {3, 23, 43, 5, 25, 45}
    metric = perceptual.Metric(tiny_vit())
    whole = [i for i in range(20) if i not in (3, 5)]
    part = SimpleNamespace(index=data.index[whole], right_vote=data.right_vote[whole])
    assert two_afc(metric, holed, data) == two_afc(metric, pixels, part)


def test_lora_tuning_learns_and_returns_a_plain_backbone(triplets, tmp_path):
    pixels, data = triplets
    backbone = tiny_vit()
    start = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    options = {"epochs": 4, "batch_size": 8, "lr": 3e-3, "rank": 4, **FAST}
    tuned, rows = lora_tune(backbone, pixels, data, data, checkpoint=tmp_path, **options)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert (
        type(tuned) is VisionTransformer and set(tuned.state_dict()) == set(start) and tuned.recipe == backbone.recipe
    )
    assert all(torch.equal(tensor, start[name]) for name, tensor in backbone.state_dict().items())
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed == {f"blocks.{i}.attn.qkv.weight" for i in range(2)}
    assert two_afc(perceptual.Metric(tuned), pixels, data) == max(row["2afc"] for row in rows)
    again, same = lora_tune(backbone, pixels, data, data, checkpoint=tmp_path, resume="must", **options)
    assert same == rows and same_weights(again, tuned)
    with pytest.raises(ValueError, match="task.margin: 0.05 there, 0.1 here"):
        lora_tune(backbone, pixels, data, data, checkpoint=tmp_path, margin=0.1, **options)


def test_a_tuning_of_another_mixer_or_other_options_is_refused(triplets, tmp_path):
    """A pool's kernel makes no parameters, and an Identity has those of a Pool: shapes cannot tell them apart."""
    pixels, data = triplets
    options = {"epochs": 1, "batch_size": 8, "checkpoint": tmp_path, **FAST}

    def tune(mixer, **mixer_options):
        lora_tune(backbones.swap(tiny_vit(patch_size=4), mixer, **mixer_options), pixels, data, data, **options)

    tune("pool", kernel=3)
    with pytest.raises(ValueError, match=r"\(model.recipe \S+.mixer_options.kernel: 3 there, 5 here\)"):
        tune("pool", kernel=5)
    with pytest.raises(ValueError, match="mixer: pool there, identity here"):
        tune("identity")


def test_a_tuning_on_other_pictures_is_refused(triplets, tmp_path):
    """The index and the votes of two worlds may be the same, and so the names of their files."""
    pixels, data = triplets
    one, other = copy.copy(pixels), copy.copy(pixels)
    one.digests, other.digests = ["a"] * 60, ["a"] * 59 + ["b"]
    options = {"epochs": 1, "batch_size": 8, "checkpoint": tmp_path, **FAST}
    lora_tune(tiny_vit(), one, data, data, **options)
    with pytest.raises(ValueError, match=r"task.images"):
        lora_tune(tiny_vit(), other, data, data, **options)


def test_interrupted_lora_tuning_goes_on_to_the_same_weights(triplets, tmp_path, monkeypatch):
    pixels, data = triplets
    options = {"epochs": 2, "batch_size": 8, "seed": 7, **FAST}
    whole, rows = lora_tune(tiny_vit(), pixels, data, data, **options)
    calls, hinge = [], perceptual.hinge_loss

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return hinge(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(perceptual, "hinge_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lora_tune(tiny_vit(), pixels, data, data, checkpoint=tmp_path, **options)
    torch.rand(5)
    resumed, again = lora_tune(tiny_vit(), pixels, data, data, checkpoint=tmp_path, **options)
    assert without_times(again) == without_times(rows)
    assert same_weights(whole, resumed)


def test_dreamsims_recipe_is_the_default():
    defaults = {name: p.default for name, p in inspect.signature(training.lora_tune).parameters.items()}
    recipe = {"epochs": 8, "batch_size": 32, "lr": 3e-4, "rank": 16, "alpha": 32, "dropout": 0.2, "margin": 0.05}
    assert {name: defaults[name] for name in recipe} == recipe


def test_another_runs_values_are_told_briefly(tmp_path):
    checkpoint.Checkpoint(tmp_path, {"images": ["0" * 32] * 1000, "lr": 0.1}).save({"epoch": 1}, {})
    with pytest.raises(ValueError, match=r"\[\.\.\.\] there, 7 here; lr: 0.1 there, 0.2 here\)") as caught:
        checkpoint.Checkpoint(tmp_path, {"images": 7, "lr": 0.2}).load()
    assert len(str(caught.value)) < 400 + 2 * len(str(tmp_path))
