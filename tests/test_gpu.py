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
    for name in ("SLURM_JOB_ID", "LOCAL_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with gpu.one() as held:
                assert held is None and gpu.visible() == ["5", "7"]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_none(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu.visible() == []
    with gpu.one() as held:
        assert held is None
