"""The thesis profile itself, on small trees in the published formats and random weights: the real path is tested."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from thesis_lib import paths
from thesis_lib.datasets import synthetic
from thesis_lib.datasets import synthetic_studies as studies

TINY, DINOV2 = "deit_tiny_patch16_224.fb_in1k", "vit_small_patch14_reg4_dinov2.lvd142m"
DINO = "vit_base_patch16_224.dino"
SMALL = {  # what a few samples on a CPU need to differ; all else is the thesis'
    "01_data_preparation": {"max_samples": 2, "gallery": 2},
    "02_attention_evaluation": {"device": "cpu", "batch_size": 8, "max_samples": 2},
    "03_efficiency_analysis": {
        "device": "cpu",
        "backbones": [DINO],
        "mixers": ["mha", "pool"],
        "image_sizes": {DINO: [224]},
        "batch_sizes": [1],
        "dtypes": ["float32"],
        "latency_runs": 3,
        "warmup_batches": 1,
        "rounds": 1,
        "variants": [],
        "train_batch": 0,
        "best_batch": False,
        "ceiling_time": 0.001,
        "predicted_sizes": {DINO: [224]},
    },
    "04_distillation": {
        "device": "cpu",
        "mixed_precision": "no",
        "batch_size": 4,
        "epochs": 1,
        "eval_2afc_every": 1,
        "max_samples": 2,
    },
    "05_attention_transfer": {
        "device": "cpu",
        "mixed_precision": "no",
        "backbone": TINY,
        "backbone_weights": "tiny.safetensors",
        "batch_size": 2,
        "max_batches": 1,
        "max_samples": 2,
        "sweep": {"layers": [6], "heads": [2]},
        "controls": ["queries"],
        "mixers": ["sra"],
    },
    "06_adaptive_tokens": {
        "device": "cpu",
        "backbone": TINY,
        "backbone_weights": "tiny.safetensors",
        "epochs": {"baseline": 1, "adaptive": 1, "finetuned": 1},
        "max_batches": 1,
        "max_samples": 2,
        "mixers": ["pool"],
        "batch_sizes": [1, 2],
        "shares": [0.7],
        "rounds": 1,
        "image_indices": [0, 1],
    },
    "07_image_classification": {
        "device": "cpu",
        "max_samples": 8,
        "scaling_sizes": [32],
        "latency_runs": 3,
        "time_limit": 0.1,
    },
    "08_semantic_correspondence": {
        "device": "cpu",
        "backbone": DINOV2,
        "img_size": 70,
        "batch_size": 4,
        "weights": {DINOV2: "dinov2.safetensors", DINO: "dino_vitbase16_pretrain.pth"},
        "mixers": ["mha", "pool"],
        "layers": [5, 11],
        "sweep_system": "",
        "max_samples": {"trn": 4, "val": 2, "test": 2},
        "teacher_parts": [{"model": DINOV2, "size": 98, "layer": 11}, {"run": "supervised"}],
        "window": 31,
        "shown": 2,
    },
    "10_proposed_model": {
        "device": "cpu",
        "dtypes": ["float32"],
        "students": ["pool"],
        "mixers": ["pool"],
        "halved_mixers": [],
        "budgets": [0.5],
        "halved_budgets": [0.5],
        "batch_size": 2,
        "rounds": 1,
        "field": {"backbones": ["vit_small_patch16_224.dino"], "images": 2, "rounds": 1},
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
    model = timm.create_model(DINO, num_classes=0)
    torch.save(model.state_dict(), folder / "dino_vitbase16_pretrain.pth")
    for name, file in ((TINY, "tiny.safetensors"), (DINOV2, "dinov2.safetensors")):
        save_file(timm.create_model(name).state_dict(), folder / file)
    sets = {"cifar10": {"train": 100, "test": 20}, "spair71k": {"trn": 12, "val": 6, "test": 12}}
    sets |= {"pf_willow": {"pairs": 9, "images": 3}, "cub200": {"images": 4}}
    studies.write(folder / "raw", sets, workers=1)
    for made, wanted in (("spair71k", "SPair-71k"), ("pf_willow", "PF-WILLOW"), ("cub200", "CUB_200_2011")):
        (folder / "raw" / made).rename(folder / "raw" / wanted)
    yield folder
    shutil.rmtree(folder)  # gigabytes of ViT-B checkpoints, which pytest would keep


def shrink(profile):
    """Set what SMALL says, and what lies deeper: sizes, never a choice of method."""
    for notebook, values in SMALL.items():
        profile[notebook] |= values
        if notebook in ("01_data_preparation", "02_attention_evaluation", "04_distillation"):
            profile[notebook]["backbone_weights"] = "dino_vitbase16_pretrain.pth"
    few = {"epochs": 1, "batch_size": 2}
    profile["02_attention_evaluation"]["lora"] |= few | {"max_batches": 1}
    transfer, adaptive = profile["05_attention_transfer"], profile["06_adaptive_tokens"]
    for recipe in transfer["recipes"].values():
        recipe |= {"epochs": 1, "warmup_epochs": 0, "min_lr": 0.0}
    transfer["perceptual"] |= few | {"weights": "dino_vitbase16_pretrain.pth"}
    adaptive["train"] |= {"batch_size": 2, "warmup_epochs": 0, "mixed_precision": "no"}
    adaptive["metric"] |= few | {"mixed_precision": "no"}
    classification, correspondence = profile["07_image_classification"], profile["08_semantic_correspondence"]
    classification["training"] |= {"warmup_epochs": 0, "mixed_precision": "no"}
    for given in classification["datasets"].values():
        given |= {"runs": 1, "mixers": ["standard", "hybrid"]}
        given["training"] = {"epochs": 1, "max_batches": 1, "batch_size": 4}
    few |= {"max_batches": 1, "mixed_precision": "no"}
    profile["10_proposed_model"]["train"] |= few
    supervised, _, sampling, _ = correspondence["runs"]  # the second is SDXL's
    correspondence["runs"] = [
        supervised | few | {"model": DINOV2, "tune": "lora", "loss": "mse"},
        sampling | few | {"sampling": "grid", "loss": "cross_entropy"},
    ]


@pytest.mark.timeout(2700)  # every notebook on ViT-B: minutes, and three times that where others share the cores
def test_thesis_profile_runs_through_on_small_published_trees(data, tmp_path):
    profile = yaml.safe_load((paths.PROFILES / "thesis.yaml").read_text())
    shrink(profile)
    profile["variants"] = {name: axes for name, axes in profile["variants"].items() if name not in VARIANTS} | VARIANTS
    profile["jobs"] = {"threads": 1}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(profile))

    call = [sys.executable, "-m", "thesis_lib.pipeline", "--profile", str(path), "--cores", "1"]  # others run the tests
    environment = os.environ | {"THESIS_DATA": str(data), "THESIS_FIGURES": str(tmp_path / "figures")}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    results = data / "results/small"
    expected = [notebook.stem for notebook in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")]
    made = {file.stem.split("-")[0].split(".")[0] for file in results.glob("*.parquet")}
    assert made == set(expected)
    description = json.loads((results / "models/pool-distilled/metric.json").read_text())
    assert (description["recipe"]["name"], description["recipe"]["mixer"]) == (DINO, "pool")
    rows = pd.read_parquet(results / "08_semantic_correspondence.parquet")
    compared = rows[rows["mixer"].notna() & rows["stage"].isin(["zero-shot", "lora", "distilled"])]
    assert set(compared["stage"]) == {"zero-shot", "lora", "distilled"}
    assert set(zip(compared["backbone"], compared["image_size"], strict=True)) == {(DINO, 224)}
    assert set(rows.loc[rows["stage"] == "sweep", "backbone"]) == {DINO, DINOV2}
    assert (tmp_path / "figures/small/tables/mixer_comparison.tex").is_file()
    if shutil.which("pdflatex"):  # names of the timm kind stand in its notes
        shutil.copy(paths.ROOT / "figures" / "thesis_preview.tex", tmp_path / "figures")
        call = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", r"\def\profile{small}\input{thesis_preview}"]
        log = subprocess.run(call, cwd=tmp_path / "figures", capture_output=True, text=True, errors="replace")
        assert log.returncode == 0, log.stdout[-2000:]
