"""Ctrl-C in the middle of a notebook, then the same command: the same rows as without it, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import yaml

from thesis_lib import paths

NAME = "02_attention_evaluation-mha"


def command(folder, profile):
    call = [sys.executable, "-m", "thesis_lib.execute", NAME.split("-")[0], "--profile", str(profile)]
    call += ["-p", "attention_module", "mha", "--results", NAME, "--results", f"{NAME}.triplets"]
    environment = os.environ | {"THESIS_DATA": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    return output


def test_interrupted_tuning_gives_the_same_rows(tmp_path):
    from thesis_lib.datasets import synthetic

    content = yaml.safe_load((paths.PROFILES / "smoke.yaml").read_text())
    notebook = content[NAME.split("-")[0]]
    notebook["lora"] |= {"epochs": 3, "max_batches": 4}
    profile = tmp_path / "few.yaml"
    profile.write_text(yaml.safe_dump(content))
    rows = {}
    for name in ("whole", "interrupted"):
        folder = tmp_path / name
        synthetic.write_nights(folder / notebook["dataset_root"], {"train": 70, "val": 24, "test": 24}, workers=1)
        models = folder / "results/few/models"
        process = command(folder, profile)
        if name == "interrupted":
            deadline = time.time() + 400
            while not (models / "mha-lora.checkpoint/state.pt").exists():
                assert process.poll() is None and time.time() < deadline, "no checkpoint was written"
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)
            assert process.returncode == 130
            assert not (folder / f"results/few/{NAME}.parquet").exists()
            process = command(folder, profile)
        finished(process)
        rows[name] = [pd.read_parquet(folder / f"results/few/{NAME}{part}.parquet") for part in ("", ".triplets")]
    for whole, interrupted in zip(*rows.values(), strict=True):
        pd.testing.assert_frame_equal(whole, interrupted, check_exact=True)
