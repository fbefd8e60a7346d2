"""The thesis profile itself, on small trees in the published formats and random weights: the real path is tested."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import yaml

from thesis_lib import paths
from thesis_lib.datasets import synthetic

SMALL = {  # what a few samples on a CPU need to differ; all else is the thesis'
    "01_data_preparation": {"max_samples": 2, "gallery": 2},
    "02_attention_evaluation": {"device": "cpu", "batch_size": 8, "max_samples": 2},
    "03_efficiency_analysis": {
        "device": "cpu",
        "backbones": ["vit_base_patch16_224.dino"],
        "mixers": ["mha", "pool"],
        "image_sizes": {"vit_base_patch16_224.dino": [224]},
        "batch_sizes": [1],
        "dtypes": ["float32"],
        "latency_runs": 3,
        "warmup_batches": 1,
        "rounds": 1,
    },
    "04_distillation": {
        "device": "cpu",
        "mixed_precision": "no",
        "batch_size": 4,
        "epochs": 1,
        "eval_2afc_every": 1,
        "max_samples": 2,
    },
}
VARIANTS = {
    "02_attention_evaluation": {"attention_module": ["mha", "pool"]},
    "04_distillation": {"attention_module": ["pool"]},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Put small sets where the profile looks for the real ones, and DINO's weight file with random values."""
    folder = tmp_path_factory.mktemp("data")
    synthetic.write_nights(folder / "raw/nights", {"train": 3, "val": 3, "test": 4}, seed=1, size=256, workers=1)
    synthetic.write_imagenet100(folder / "raw/imagenet100", {"train": 4, "validation": 2, "test": 2}, workers=1)
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224.dino", num_classes=0)
    torch.save(model.state_dict(), folder / "dino_vitbase16_pretrain.pth")
    return folder


def test_thesis_profile_runs_through_on_small_published_trees(data, tmp_path):
    profile = yaml.safe_load((paths.PROFILES / "thesis.yaml").read_text())
    for notebook, values in SMALL.items():
        profile[notebook] |= values
        if notebook != "03_efficiency_analysis":
            profile[notebook]["backbone_weights"] = "dino_vitbase16_pretrain.pth"
    profile["02_attention_evaluation"]["lora"] |= {"epochs": 1, "batch_size": 2, "max_batches": 1}
    profile["variants"] = {name: axes for name, axes in profile["variants"].items() if name not in VARIANTS} | VARIANTS
    profile["jobs"] = {"threads": 2}
    path = tmp_path / "thesis.yaml"
    path.write_text(yaml.safe_dump(profile))

    call = [sys.executable, "-m", "thesis_lib.pipeline", "--profile", str(path)]
    environment = os.environ | {"THESIS_DATA": str(data), "THESIS_FIGURES": str(tmp_path / "figures")}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    results = data / "results/thesis"
    expected = [notebook.stem for notebook in paths.NOTEBOOKS.glob("0[1-9]_*.ipynb")]
    made = {file.stem.split("-")[0].split(".")[0] for file in results.glob("*.parquet")}
    assert made == set(expected)
    description = json.loads((results / "models/pool-distilled/metric.json").read_text())
    assert (description["recipe"]["name"], description["recipe"]["mixer"]) == ("vit_base_patch16_224.dino", "pool")
    assert (tmp_path / "figures/thesis/tables/mixer_comparison.tex").is_file()
