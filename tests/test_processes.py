import ctypes
import multiprocessing
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from thesis_lib.attention_study import Study
from thesis_lib.processes import KEEP_MEMORY, apart, keep_memory, side_by_side
from thesis_lib.trainer import train_each


def fail_or_sleep(seconds: float) -> float:
    if not seconds:
        raise ValueError("a run failed")
    time.sleep(seconds)
    return seconds


def test_every_call_apart_has_a_process_of_its_own():
    numbers = {apart(os.getpid) for _ in range(2)}
    assert len(numbers) == 2 and os.getpid() not in numbers


def test_a_process_that_dies_is_told():
    with pytest.raises(BrokenProcessPool):
        apart(os._exit, 1)


def new_pages(keep: bool) -> int:
    """Count the pages that the kernel zeroes for a tensor of 64 MiB that was there before."""
    import resource  # not on Windows

    if keep:
        keep_memory()
        assert KEEP_MEMORY.items() <= os.environ.items()
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not glibc, reason="other C libraries have other allocators")
def test_freed_memory_is_kept_for_the_next_tensors():
    assert 2 * apart(new_pages, True) < apart(new_pages, False)  # 0 and 16,384 here; fewer where pages are huge


def test_side_by_side_keeps_the_order():
    assert list(side_by_side(fail_or_sleep, [0.4, 0.01, 0.2, 0.02], workers=2)) == [0.4, 0.01, 0.2, 0.02]


def test_an_error_in_one_stops_the_others_and_nothing_else():
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600.0,), daemon=True)
    bystander.start()
    with pytest.raises(ValueError, match="a run failed"):
        list(side_by_side(fail_or_sleep, [0.0, 3600.0], workers=2))  # unstopped, the second outlasts the suite's limit
    assert multiprocessing.active_children() == [bystander]
    bystander.terminate()
    bystander.join()


def whereabouts(_: str) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def test_on_a_cpu_trainings_go_to_processes_of_one_thread(two_threads, monkeypatch):
    def found(device: str | None = "cpu", runs: str = "abc") -> set[tuple[int, int]]:
        return set(train_each(whereabouts, list(runs), device=device))

    apart = found()
    assert os.getpid() not in {pid for pid, _ in apart} and {threads for _, threads in apart} == {1}
    assert found(runs="a") == found(device="cuda") == {(os.getpid(), 2)}  # nothing to share; a GPU is one
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert found() == {(os.getpid(), 2)}
    torch.set_num_threads(1)
    assert found() == {(os.getpid(), 1)}


def study(folder) -> Study:
    generator = torch.Generator().manual_seed(0)
    sets = {"train": 16, "validation": 8, "test": 8}
    data = {
        name: (
            torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator),
            torch.arange(n).remainder(3).numpy(),
        )
        for name, n in sets.items()
    }
    return Study("demo", True, 16, data, 3, 8, folder, {"device": "cpu", "seed": 1})


def test_runs_side_by_side_are_the_runs_one_by_one(tmp_path, two_threads, capfd):
    recipe = {"epochs": 1, "blr": 1e-2, "warmup_epochs": 0.5}
    runs = {"copy": {"recipe": recipe | {"mode": "copy"}}, "sra": {"recipe": recipe, "mixer": "sra", "ratio": 2}}
    together = study(tmp_path / "together").run_all(runs)
    assert "training" not in capfd.readouterr().err  # no bars of several processes in one place
    torch.set_num_threads(1)
    single = study(tmp_path / "single").run_all(runs)
    assert list(together) == list(single) == list(runs)
    for name in runs:
        assert torch.equal(together[name].scores, single[name].scores)
        assert [row["loss"] for row in together[name].log] == [row["loss"] for row in single[name].log]
        weights, others = (found[name].model.state_dict() for found in (together, single))
        assert all(torch.equal(weights[key], others[key]) for key in others)
    again = study(tmp_path / "together").run_all(runs)  # from the checkpoints
    assert all(torch.equal(again[name].scores, together[name].scores) for name in runs)
