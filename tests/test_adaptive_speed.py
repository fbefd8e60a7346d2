import itertools

import numpy as np
import pytest
import torch
from halting_models import VARIED, halting_vit, images

from thesis_lib import adaptive_speed
from thesis_lib.adaptive_speed import beta_for_tokens, engine_rows, engines, interleaved, speedup_rows, time_rows
from thesis_lib.adaptive_tokens import AdaptiveViT, Halting
from thesis_lib.token_removal import TokenRemoval


@pytest.mark.parametrize("share", [0.4, 0.65, 0.9])
def test_beta_for_tokens(share):
    model = AdaptiveViT(halting_vit(cls=-8.0), Halting(1.0, -1.0))
    beta = beta_for_tokens(model, images(16), share)
    assert model.halting == Halting(1.0, -1.0)
    model.halting = Halting(1.0, beta)
    used = TokenRemoval(model).run(images(16)).tokens.float().mean().item() / 17
    assert used == pytest.approx(share, abs=0.03)
    for impossible in (0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            beta_for_tokens(model, images(2), impossible)


def test_tasks_take_turns():
    order = []
    tasks = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(tasks, rounds=4, device="cpu")
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(values) == 4 for values in times.values())
    assert all(len(values) == 3 for values in interleaved(tasks, rounds=9, seconds=0, device="cpu").values())


def test_what_slows_a_run_and_the_yardstick_alike_changes_no_time(monkeypatch):
    """The machine is up to four times slower in turn; of a run 2 s, 30 s, of the yardstick 1 s are its own."""
    slow, now, repeated = itertools.cycle([1.0, 4.0, 2.0, 1.0, 2.0]), [1.0], {}
    clock = [0.0]

    def machine(run, device, repeats=3):
        now[0] = next(slow)
        spent = run()
        repeated.setdefault(spent / now[0], []).append(repeats)
        return spent, now[0]

    monkeypatch.setattr(adaptive_speed, "around", machine)
    monkeypatch.setattr(adaptive_speed.time, "perf_counter", lambda: clock[0])
    tasks = {own: lambda own=own: clock.__setitem__(0, clock[0] + own * now[0]) for own in (2.0, 30.0, 50.0)}
    times = interleaved(tasks, rounds=5, seconds=1e9, device="cpu")
    assert {own: set(values) for own, values in times.items()} == {2.0: {4.0}, 30.0: {60.0}, 50.0: {100.0}}
    assert repeated == {2.0: [3] * 6, 30.0: [3] * 6, 50.0: [3] + 5 * [5]}  # a tenth of the run


def test_the_yardstick_is_of_the_tasks_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail(f"{device} was waited for"))
    found = set()
    monkeypatch.setattr(
        adaptive_speed, "around", lambda run, device, repeats=3: found.add(str(device)) or (run(), 1e-3)
    )
    interleaved({"a": lambda: None}, rounds=1, device="cpu")
    model, x = AdaptiveViT(halting_vit(), VARIED), images(2)
    engine_rows(halting_vit(), {"a": model}, x, batch_sizes=[2], rounds=1)
    speedup_rows(halting_vit(), model, x, shares=[0.7], rounds=1)
    assert found == {"cpu"}


def test_models_follow_the_images_to_their_device():
    dense, model = halting_vit(), AdaptiveViT(halting_vit(), VARIED)
    found = engines(dense, model, images(2).to("meta"))["dense"]()
    assert found.shape == (2, 7) and found.device.type == "meta"
    assert {p.device.type for part in (dense, model) for p in part.parameters()} == {"meta"}


def test_engines_compute_what_they_are_named_for():
    model = AdaptiveViT(halting_vit(cls=-8.0), VARIED)
    outputs = {name: run() for name, run in engines(halting_vit(cls=-8.0), model, images(4)).items()}
    assert torch.allclose(outputs["masked"], outputs["removing"], atol=1e-5)
    assert not torch.allclose(outputs["dense"], outputs["masked"], atol=1e-2)


def test_rows_of_times():
    (row,) = time_rows({"pool": np.array([0.001, 0.002, 0.003])}, batch=4, column="mixer", seed=0)
    assert row["value"] == pytest.approx(2.0) and row["unit"] == "ms" and row["n"] == 3
    assert row["mixer"] == "pool" and row["batch"] == 4 and row["seed"] == 0
    assert row["low"] <= row["value"] <= row["high"]


def test_engine_rows_at_several_batch_sizes():
    models = {"a": AdaptiveViT(halting_vit(), VARIED), "b": AdaptiveViT(halting_vit(1), VARIED)}
    rows = engine_rows(halting_vit(), models, images(4), batch_sizes=[1, 4], rounds=3, seconds=1)
    assert [(row["batch"], row["model"], row["engine"]) for row in rows] == [
        (batch, model, name) for batch in (1, 4) for model in "ab" for name in ("dense", "masked", "removing")
    ]
    assert rows[0]["value"] == rows[3]["value"]  # the plain ViT runs once
    assert len({row["value"] for row in rows[:6]}) == 5
    with pytest.raises(ValueError, match="a batch of 9"):
        engine_rows(halting_vit(), models, images(4), batch_sizes=[9])


def test_speedup_rows():
    model = AdaptiveViT(halting_vit(cls=-8.0), Halting(1.0, -1.0))
    rows = speedup_rows(halting_vit(), model, images(8), shares=[0.5, 0.8], rounds=3, seconds=1)
    assert [row["engine"] for row in rows] == ["dense", "masked", "ideal"] * 2
    assert model.halting == Halting(1.0, -1.0)
    ideal = {round(row["share"], 1): row["value"] for row in rows if row["engine"] == "ideal"}
    assert list(ideal) == [0.5, 0.8] and ideal[0.5] > 1.8 and 1.2 < ideal[0.8] < 1.35
    assert rows[0]["beta"] > rows[3]["beta"]  # a higher beta halts earlier
