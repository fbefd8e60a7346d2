"""Measures that measure what they say, of any mode; a grid that resumes; crossings of known curves."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import nn

from thesis_lib import backbone, class_token, closed_form, efficiency, efficiency_grid, timing
from thesis_lib.rounds import pool_rounds, usual_yardsticks

TINY = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)
EXACT = {"macs", "macs_counted", "macs_activated", "macs_cls", "elementwise", "params", "bytes", "launches"}
SPLIT = {"share_matmul", "share_elementwise", "share_copy", "share_launches"}
REFUSED = {"macs", "params", "latency", "throughput", "peak_memory"}


def tiny(mixer="mha", layers=None, img_size=32, **changes):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=img_size, **(TINY | changes)).eval()
    return backbone.swap(model, mixer, layers=layers)


class Sleeper(nn.Module):
    """A model that takes 2 ms an image and holds 1 MiB an image at its peak."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(2**20)), 0

    def forward(self, x):
        self.calls += 1
        torch.empty(len(x) * 2**17).fill_(1.0)  # half a MiB an image, released at once
        time.sleep(0.002 * len(x))
        return torch.empty(len(x) * 2**18)


def test_timing_and_its_statistics():
    model, x = Sleeper(), torch.randn(4, 3, 8, 8)
    row = efficiency.latency(model, x, runs=7, warmup=3)
    assert model.calls == 10 and row["n"] == 7
    assert 8 <= row["p5"] <= row["low"] <= row["value"] <= row["high"] <= row["p95"]
    assert efficiency.throughput(model, x, runs=5, warmup=0)["value"] <= 500
    assert len(efficiency.time_forward(model, x, runs=1000, warmup=9, seconds=0.0)) == 3


def test_interval_of_the_median_narrows_and_survives_one_sample():
    noise = np.random.default_rng(0).normal(10, 1, 400)
    few, many = efficiency.median_row("latency", noise[:20]), efficiency.median_row("latency", noise)
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert many["low"] < 10 < many["high"]
    assert efficiency.median_row("latency", [3.0])["low"] == 3.0


def test_peak_memory_counts_activations_only():
    one, kernel = efficiency.peak_memory(Sleeper(), torch.randn(1, 3, 8, 8))
    four, _ = efficiency.peak_memory(Sleeper(), torch.randn(4, 3, 8, 8))
    assert (one["value"], four["value"], kernel) == (1.0, 4.0, None)  # not the 4 MiB of weights, not the released 0.5
    x = torch.randn(2, 3, 64, 64)
    held, kernel = efficiency.peak_memory(tiny("mha", img_size=64), x)
    assert kernel == "flash"
    assert held["value"] == pytest.approx(2 * 65 * 48 * 4 * 12 / 2**20, rel=0.2)  # x, its sum, 4d before and after GELU
    with timing.pinned("math"):
        assert efficiency.peak_memory(tiny("mha", img_size=64), x)[1] == "math"


def test_time_split_sums_to_one_and_knows_products_from_copies():
    shares = {row["metric"]: row["value"] for row in timing.time_split(tiny(img_size=64), torch.randn(2, 3, 64, 64))}
    assert set(shares) == SPLIT and sum(shares.values()) == pytest.approx(1.0)
    x = torch.randn(1000, 1000)  # what else a profiled pass does is little beside it, on a busy machine, too
    assert timing.time_split(lambda x: x @ x, x)[0]["value"] > 0.5  # matmul
    copies = {row["metric"]: row["value"] for row in timing.time_split(lambda x: x.mT.contiguous(), x)}
    assert copies["share_copy"] > 0.5 and copies["share_matmul"] == 0.0


def test_a_training_step_trains_and_holds_more_than_a_pass():
    model, x = tiny(), torch.randn(4, 3, 32, 32)
    inference, before = efficiency.peak_memory(model, x)[0], model.blocks[0].mlp.fc1.weight.detach().clone()
    step, memory = timing.training_rows(model, x, runs=2, warmup=1)
    assert (step["metric"], step["unit"], step["n"]) == ("training_step", "ms", 2)
    assert memory["metric"] == "training_memory" and memory["value"] > 2 * inference["value"]
    assert not torch.equal(before, model.blocks[0].mlp.fc1.weight)
    assert all(p.grad is None for p in model.parameters())


def test_measure_gives_every_row_of_the_protocol():
    rows = efficiency.measure("demo", "pool", 32, batch_sizes=[2, 1], train_batch=3, runs=2, warmup=1)
    found = {(row["metric"], row.get("batch")) for row in rows}
    assert found == {
        *((metric, None) for metric in EXACT),
        ("latency", 1),
        ("latency_cls", 1),
        ("training_step", 3),
        ("training_memory", 3),
        *((metric, 1) for metric in SPLIT),
        *((metric, batch) for metric in ("throughput", "peak_memory") for batch in (1, 2)),
    }
    assert {row["tokens"] for row in rows} == {17} and {row["threads"] for row in rows} == {torch.get_num_threads()}
    assert {(row["mode"], row["sdpa_pinned"]) for row in rows} == {("eager", None)}
    memory = {row["batch"]: row["value"] for row in rows if row["metric"] == "peak_memory"}
    assert memory[2] == pytest.approx(2 * memory[1], rel=0.1)
    value = {row["metric"]: row["value"] for row in rows}
    assert (
        value["macs_cls"] == class_token.model_cost(backbone.create("demo", "pool", img_size=32)).macs < value["macs"]
    )


def test_a_later_round_measures_times_alone():
    rows = efficiency.measure("demo", "pool", 32, complete=False, train_batch=2, runs=2, warmup=0)
    assert {row["metric"] for row in rows} == {"latency", "latency_cls", "throughput"}


def test_the_batch_doubles_while_the_throughput_rises(monkeypatch):
    speed = {1: 10.0, 2: 20.0, 4: 30.0, 8: 30.5, 16: 99.0}
    monkeypatch.setattr(efficiency, "time_beside", lambda model, x, **_: (np.full(3, len(x) / speed[len(x)]), {}))
    rows = efficiency.measure("demo", "mha", 32, best_batch=True, complete=False)
    assert [row["batch"] for row in rows if row["metric"] == "throughput"] == [1, 2, 4, 8]  # 8 gains less than 3 %


def test_compiled_and_pinned_models_are_named_and_recorded(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: model(x))  # the compiler itself takes a minute
    rows = efficiency.measure("demo", "mha", 32, mode="compiled", sdpa="math", runs=2, warmup=0)
    assert {(row["mode"], row["sdpa_pinned"]) for row in rows} == {("compiled", "math")}
    assert {row["sdpa"] for row in rows if row["metric"] == "latency"} == {"math"}
    assert {"compile_time", "latency", "throughput"} <= {row["metric"] for row in rows}

    def refuse(model, **_):
        def call(x):
            raise NotImplementedError("no such graph\nmore of it")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    rows = efficiency.measure("demo", "mha", 32, mode="compiled", runs=2, warmup=0)
    refused = {row["metric"]: row["note"] for row in rows if row["value"] is None}
    assert refused == dict.fromkeys(("latency", "throughput", "peak_memory"), "torch.compile refused: no such graph")


def test_a_kernel_that_cannot_run_is_a_row():
    rows = efficiency.measure("demo", "mha", 32, sdpa="cudnn", runs=2, warmup=0)
    notes = {row["note"] for row in rows if row["metric"] == "latency"}
    assert notes and all(notes), notes


def test_what_cannot_be_measured_is_a_row_with_a_note(monkeypatch):
    rows = efficiency.measure("demo", "mha", 60)  # 8 does not divide 60
    assert {row["metric"] for row in rows} == REFUSED
    assert all(row["value"] is None and "60" in row["note"] for row in rows)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(efficiency, "time_beside", full)
    monkeypatch.setattr(efficiency, "training_rows", full)
    rows = efficiency.measure("demo", "mha", 32, batch_sizes=[1, 2], train_batch=4)
    assert [(row["metric"], row["batch"], row["note"]) for row in rows if row["value"] is None] == [
        *((metric, 1, "out of memory") for metric in ("latency", "throughput", "peak_memory")),
        *((metric, 4, "out of memory") for metric in ("training_step", "training_memory")),
    ]

    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(efficiency, "time_beside", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        efficiency.measure("demo", "mha", 32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mixer": "pol"},
        {"name": "vit_smal_patch16_224"},
        {"dtype": "float31"},
        {"mode": "jit"},
        {"sdpa": "fash"},
        {"device": "gpu"},
    ],
    ids=str,
)
def test_misspelt_names_are_errors_not_rows(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        efficiency.measure(**({"name": "demo"} | wrong))


def test_energy_is_the_counters_difference_over_images(monkeypatch):
    used = iter([5_000, 8_000])  # mJ
    nvml = types.SimpleNamespace(NVMLError=KeyError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda name: name)
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(used)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    about = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.01))
    (row,) = timing.energy(lambda x: x, torch.zeros(2, 3), seconds=0.001)
    assert (row["metric"], row["value"], row["unit"], row["n"]) == ("energy", 1.5, "J", 1)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert timing.energy(lambda x: x, torch.zeros(2, 3)) == []


def test_rounds_rotate_and_pool():
    assert ["".join(order) for order in efficiency.rotated("abc", 4)] == ["abc", "bca", "cab", "abc"]
    common = {"backbone": "demo", "mixer": "mha", "image_size": 64, "tokens": 65, "dtype": "float32", "device": "cpu"}
    rounds = [common | {"batch": 1} | efficiency.median_row("latency", times) for times in ([10, 11], [11, 12, 12])]
    rounds[0]["sdpa"] = "flash"  # told by the first round alone
    rounds += 2 * [common | {"metric": "macs", "value": 7, "unit": "MAC", "n": 1}]
    rounds.append(common | {"batch": 1, "mode": "compiled"} | efficiency.median_row("latency", [9.0]))
    table = pool_rounds(rounds)
    plain = table[table["mode"].isna()].set_index("metric")
    assert (plain.value["latency"], plain.n["latency"], plain.value["macs"], len(plain)) == (11.0, 5, 7, 2)
    assert plain.sdpa["latency"] == "flash" and len(table) == 3


def timed(mixer, samples, beside, threads=1, metric="latency"):
    common = {"mixer": mixer, "device": "cpu", "threads": threads, "beside": beside}
    return common | efficiency.median_row(metric, samples)


def test_times_are_brought_to_the_moments_that_are_usual():
    """The machine is twice as slow beside some passes, half as slow beside others."""
    rounds = [timed("mha", [10.0, 20.0], [1.0, 2.0]), timed("mha", [20.0, 10.0, 5.0], [2.0, 1.0, 0.5])]
    rounds.append(timed("sra", [40.0, 40.0], [2.0, 2.0]))
    rounds.append(timed("sra", [100.0, 50.0, 100.0], [1.0, 2.0, 1.0], metric="throughput"))
    rounds.append(timed("pool", [7.0, 14.0, 7.0], [9.0, 18.0, 9.0], threads=2))  # another yardstick
    assert usual_yardsticks(rounds) == {("cpu", 1): 1.5, ("cpu", 2): 9.0}
    table = pool_rounds(rounds).set_index(["mixer", "metric"])
    assert table["value"].to_dict() == {
        ("mha", "latency"): 15.0,
        ("sra", "latency"): 30.0,
        ("sra", "throughput"): pytest.approx(100 / 1.5),
        ("pool", "latency"): 7.0,
    }
    assert table["yardstick"].to_list() == [1.5, 1.5, 1.5, 9.0] and table["rounds"].to_list() == [2, 1, 1, 1]
    assert table.n["mha", "latency"] == 5 and "beside" not in table
    assert (table["low"] == table["value"]).all() and (table["high"] == table["value"]).all()  # nothing else differs
    quick = pool_rounds(rounds, {("cpu", 1): 0.75}).set_index(["mixer", "metric"])  # beside rows of a quicker hour
    assert quick.value["mha", "latency"] == 7.5 and quick.value["pool", "latency"] == 7.0


def test_the_yardstick_is_timed_beside_every_pass():
    rows = efficiency.measure("demo", "mha", 32, runs=2, warmup=0, train_batch=2)
    beside = {row["metric"]: row["beside"] for row in rows if "samples" in row}
    assert beside.keys() == {"latency", "latency_cls", "throughput", "training_step"}
    assert all(len(row["samples"]) == len(row["beside"]) for row in rows if "samples" in row)
    assert all(0 < value < 1000 for values in beside.values() for value in values)


def test_one_configuration_from_the_command_line(tmp_path):
    words = "--mixer mha --image-size 32 --runs 2 --warmup 1 --threads 1 --layers 0 --train-batch 1 --sdpa math"
    command = [sys.executable, "-m", "thesis_lib.efficiency", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = json.loads(done.stdout)
    expected = EXACT | SPLIT | {"latency", "latency_cls", "throughput", "peak_memory"}
    assert {row["metric"] for row in rows} == expected | {"training_step", "training_memory"}
    assert all(row["threads"] == 1 and row["sdpa_pinned"] == "math" and "samples" not in row for row in rows)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mixer pol", "error: unknown mixer 'pol' (did you mean pool?)"),
        ("--backbone vit_smal", "'vit_smal'; near ones"),
        ("--dtype float31", "error: unknown dtype 'float31'"),
        ("--device gpu", "error: no device 'gpu' here"),
        ("--output nowhere/rows.json", "error: [Errno 2] No such file or directory: 'nowhere/rows.json'"),
        ("--output .", "error: [Errno 21] Is a directory"),
        ("--batch 1 0", "argument --batch: 0 is no whole number of at least 1"),
        ("--runs 0", "argument --runs: 0 is no whole number of at least 1"),
        ("--threads two", "argument --threads: two is no whole number of at least 1"),
    ],
)
def test_what_cannot_be_measured_as_asked_ends_the_command_before_it_starts(
    monkeypatch, tmp_path, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(efficiency, "exact_rows", lambda *_, **__: pytest.fail("it measured"))
    with pytest.raises(SystemExit) as ended:
        efficiency.main(words.split())
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in last


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_its_own_and_one_that_dies(monkeypatch):
    rows = efficiency.measure_apart("demo", "mha", 32, batch_sizes=[1], runs=2, warmup=0)
    assert {row["metric"] for row in rows} >= EXACT and all(row["n"] for row in rows)
    monkeypatch.setattr(efficiency, "measure", die)
    rows = efficiency.measure_apart("demo", "mha", 32, dtype="float32")
    assert {row["metric"] for row in rows} == REFUSED
    assert all(row["value"] is None and "died" in row["note"] and row["dtype"] == "float32" for row in rows)


def fake(name, mixer, image_size, **settings):
    """Rows of a visit whose time is known: one a mixer, its samples those of the round."""
    where = {"backbone": name, "mixer": mixer, "image_size": image_size, "tokens": (image_size // 8) ** 2 + 1}
    where |= {
        "dtype": settings["dtype"],
        "device": settings["device"],
        "mode": "eager",
        "sdpa_pinned": None,
        "note": None,
    }
    where |= {"batch": 1}
    return [where | efficiency.median_row("latency", [1.0, 2.0])]


def test_an_interrupted_grid_goes_on_and_equals_an_uninterrupted_one(monkeypatch, tmp_path):
    settings = {"dtype": "float32", "device": "cpu", "mixer_options": {"sra": {"ratio": 4}}}
    visits = efficiency_grid.plan({"demo": [64, 128]}, ["mha", "sra"], rounds=2, **settings)
    assert [(v["mixer"], v["round"], v["complete"]) for v in visits[::2]] == [
        *[("mha", 0, True)] * 2,
        *[("sra", 1, False)] * 2,
    ]
    assert {v["mixer"]: v["options"] for v in visits} == {"mha": {}, "sra": {"ratio": 4}}
    seen = []

    def interrupted(name, mixer, image_size, **settings):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append((mixer, image_size))
        return fake(name, mixer, image_size, **settings)

    monkeypatch.setattr(efficiency_grid, "measure_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        efficiency_grid.run(visits, tmp_path / "grid")
    assert len(list((tmp_path / "grid").glob("*.json"))) == 3

    def counted(name, mixer, image_size, **settings):
        seen.append((mixer, image_size))
        return fake(name, mixer, image_size, **settings)

    monkeypatch.setattr(efficiency_grid, "measure_apart", counted)
    resumed = efficiency_grid.run(visits, tmp_path / "grid")
    assert len(seen) == len(visits)  # none of the three was measured again
    whole = efficiency_grid.run(visits, tmp_path / "other")
    pd.testing.assert_frame_equal(resumed, whole)
    assert len(whole) == 4 and set(whole["n"]) == {4}  # two rounds of two samples each
    seen.clear()
    changed = [visit | {"seed": 1} if visit["mixer"] == "sra" else visit for visit in visits]
    efficiency_grid.run(changed, tmp_path / "grid")
    assert {mixer for mixer, _ in seen} == {"sra"} and len(seen) == 4
    efficiency_grid.clear(tmp_path / "grid")
    assert not (tmp_path / "grid").exists()


def test_two_grids_are_brought_to_the_moments_of_the_first(monkeypatch, tmp_path):
    visits = efficiency_grid.plan({"demo": [64]}, ["mha", "sra"], dtype="float32", device="cpu")
    monkeypatch.setattr(efficiency_grid, "measure_apart", lambda name, mixer, *_, **__: [timed(mixer, [10.0], [1.0])])
    table = efficiency_grid.run(visits, tmp_path / "quick")
    assert efficiency_grid.usual_yardstick(table) == 1e-3  # seconds
    with pytest.raises(ValueError, match="nothing was timed"):
        efficiency_grid.usual_yardstick(table.drop(columns="yardstick"))
    monkeypatch.setattr(efficiency_grid, "measure_apart", lambda name, mixer, *_, **__: [timed(mixer, [30.0], [2.0])])
    assert set(efficiency_grid.run(visits, tmp_path / "slow")["value"]) == {30.0}
    later = efficiency_grid.run(visits, tmp_path / "slow", like=table)
    assert set(later["value"]) == {15.0} and set(later["yardstick"]) == {1.0}


def test_a_fingerprint_knows_settings_machine_and_code(monkeypatch):
    visit = {"name": "demo", "mixer": "mha", "seed": 0}
    before = efficiency_grid.fingerprint(visit)
    assert (
        before
        == efficiency_grid.fingerprint(dict(reversed(visit.items())))
        != efficiency_grid.fingerprint(visit | {"seed": 1})
    )
    machine = efficiency_grid._machine()
    monkeypatch.setattr(efficiency_grid, "_machine", lambda: [*machine[:-1], "other code"])
    assert efficiency_grid.fingerprint(visit) != before


TOKENS = (65, 257, 1025)


def test_crossings_of_known_curves():
    n = np.array(TOKENS, float)
    gains = np.stack([(n / 400) ** 0.7, (n / 30) ** 0.5, (n / 5000) ** 0.5], axis=1)
    found = efficiency_grid.crossing(TOKENS, gains)
    assert found[0] == pytest.approx(400.0)  # exact for a power of N
    assert found[1] == pytest.approx(65.0) and np.isinf(found[2])  # wins from the first on; never


def times(mixer, curve, spread=0.02):
    rng = np.random.default_rng(len(mixer))
    rows = []
    for n in TOKENS:
        row = efficiency.median_row("latency", curve(n) * (1 + spread * rng.standard_normal(30)))
        rows.append(row | {"mixer": mixer, "tokens": n, "backbone": "demo", "dtype": "float32", "device": "cpu"})
    return rows


def test_measured_crossings_have_intervals_and_say_when_there_is_none():
    rows = times("mha", lambda n: n**1.5) + times("sra", lambda n: 20.0 * n)  # equal at 400
    rows += times("soft", lambda n: 90.0 * n) + times("pool", lambda n: 0.5 * n)
    found = {row["mixer"]: row for row in efficiency_grid.timed_crossings(pd.DataFrame(rows), "measured")}
    assert set(found) == {"sra", "soft", "pool"} and found["sra"]["stage"] == "measured"
    assert found["sra"]["low"] < 400 < found["sra"]["high"] and found["sra"]["value"] == pytest.approx(400, rel=0.1)
    assert found["soft"]["value"] is None and "1025" in found["soft"]["note"] and found["soft"]["low"] is None
    assert found["pool"]["value"] == pytest.approx(65.0) and "65" in found["pool"]["note"]
    exact = pd.DataFrame(rows).drop(columns=["samples", "low", "high"])
    (sra,) = [row for row in efficiency_grid.timed_crossings(exact, "predicted") if row["mixer"] == "sra"]
    assert "low" not in sra and sra["value"] == pytest.approx(found["sra"]["value"])


def test_analytic_crossings_are_those_of_the_closed_forms():
    rows = {
        row["mixer"]: row for row in efficiency_grid.analytic_crossings(["demo"], ["mha", "pool", "soft"], max_side=40)
    }
    assert set(rows) == {"pool", "soft"} and rows["pool"]["value"] == 5 and rows["pool"]["until"] is None
    (few, *_, many), row = closed_form.saving_ranges("soft", 128, 4, max_side=40), rows["soft"]
    assert few == (2, 65) and many == (row["value"], None) and row["until"] is None  # for good from there on
    (short,) = efficiency_grid.analytic_crossings(["demo"], ["soft"], max_side=12)
    assert (short["value"], short["until"]) == few


def test_predictions_stand_beside_what_was_measured():
    from test_cost_model import flat

    sizes = {"demo": [32, 60]}  # 60 is not served
    found = efficiency_grid.predictions(sizes, ["mha", "pool"], flat(), batch_sizes=[1, 4])
    assert set(found["image_size"]) == {32} and len(found) == 4
    terms = found[["matmul", "elementwise", "copy", "launches"]]
    assert np.allclose(terms.sum(axis=1), found["value"]) and (terms > 0).all(axis=None)
    rows = pd.DataFrame(fake("demo", "mha", 32, dtype="float32", device="cpu"))
    rows = pd.concat([rows, rows.assign(metric="throughput", value=50.0, batch=4)], ignore_index=True)
    rows = pd.concat([rows, rows.tail(1).assign(metric="macs", value=1e6, batch=np.nan)], ignore_index=True)
    both = efficiency_grid.beside_measured(found, rows).set_index(["mixer", "batch"])["measured"]
    assert both["mha", 4] == pytest.approx(80.0) and both.isna().sum() == 3
    reached = efficiency_grid.utilisation(rows, {"float32": flat(rate=1e9, overhead=0)}).set_index("metric")["value"]
    assert reached["achieved"] == pytest.approx(2 * 50 * 1e6) and reached["ceiling_share"] == pytest.approx(0.05)
