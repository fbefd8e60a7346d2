import functools
import os
import subprocess
import sys

import pytest

from thesis_lib import gpu


@pytest.fixture(autouse=True)
def two(monkeypatch, tmp_path):
    """Make two GPUs visible, and lock them in a folder of this test's own."""
    for name in ("SLURM_JOB_ID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    monkeypatch.setattr(gpu.tempfile, "gettempdir", lambda: str(tmp_path))


HOLD = """
import tempfile; tempfile.gettempdir = lambda: {folder!r}
from thesis_lib import gpu
with gpu.one() as held: print(held, flush=True); input()
"""


def test_each_run_gets_a_gpu_of_its_own_and_sees_no_other(tmp_path):
    call = [sys.executable, "-c", HOLD.format(folder=str(tmp_path))]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline().strip() == "5"
        with gpu.one() as held:
            assert held == "7" and gpu.visible() == ["7"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5, 7"
        other.communicate("\n", timeout=20)
    with gpu.one() as held:
        assert held == "5"


def test_slurm_and_torchrun_have_chosen_already(monkeypatch):
    for name, devices in (("SLURM_JOB_ID", "5"), ("LOCAL_RANK", "5,7")):
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", devices)
            patch.setenv(name, "1")
            with gpu.one() as held:
                assert held is None and gpu.visible() == devices.split(",")


def test_in_an_allocation_of_several_gpus_each_run_gets_its_own(monkeypatch):
    allocation = functools.partial(monkeypatch.setenv, "SLURM_JOB_ID")
    allocation("1")
    with gpu.one() as held:
        assert held == "5"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
        with gpu.one() as second:
            assert second == "7"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
        allocation("2")  # on another node, whose 5 is another GPU
        with gpu.one() as elsewhere:
            assert elsewhere == "5"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_none(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu.visible() == []
    with gpu.one() as held:
        assert held is None


def test_under_torchrun_cuda_is_the_process_own_gpu(monkeypatch):
    assert gpu.own("cuda") == "cuda" and gpu.own("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert gpu.own("cuda") == "cuda:3" and gpu.own("cpu") == "cpu"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_device_that_torch_has_is_not_absent(device):
    assert gpu.absent(device) is None


def test_a_hidden_gpu_is_absent(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA" in gpu.absent("cuda") or "NVIDIA" in gpu.absent("cuda")
