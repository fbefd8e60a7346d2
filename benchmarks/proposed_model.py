"""Time DreamSim's ensemble beside the proposed model, in turn, on the same pictures and in the same number format.

    python benchmarks/proposed_model.py [--model FOLDER | --plan M--/M-M] [--backbones ...] [--sizes 224] [--batch 1 16]
                                  [--dtype float32 bfloat16] [--device cuda] [--compile] [--native 768]

--model: a folder that `perceptual.save` wrote, timed as it is, at its own image size. --plan: a recipe, one letter a
block (M MHA, S SRA, P Pool, I Identity, - dropped, / grid halved from here), put into each of --backbones at each of
--sizes with random weights; its length need not be the backbone's depth. The default is the folder that notebook 10
saved in the demo, and its recipe. From bytes on the device to embeddings; with --native the pictures have that size,
and the resize on the device is timed too. The `dreamsim` package's own code is timed beside it where it is installed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from thesis_lib import backbone, comparators, paths, perceptual, proposed_speed
from thesis_lib.adaptive_speed import interleaved, passes
from thesis_lib.layer_plan import Plan, apply_plan

LETTERS = {"M": "mha", "S": "sra", "P": "pool", "I": "identity", "-": "drop"}
SAVED = paths.RESULTS / "demo" / "models" / "proposed"


def read_plan(text: str) -> Plan:
    """Read a plan as `Plan.label` writes it."""
    if unknown := set(text) - {*LETTERS, "/"}:
        raise ValueError(f"--plan {text}: {', '.join(sorted(unknown))} is none of {', '.join(LETTERS)} and /")
    halved = text.find("/")
    return Plan(tuple(LETTERS[letter] for letter in text.replace("/", "")), halved if halved >= 0 else None)


def recipe(vit: nn.Module) -> Plan:
    """Return the plan of a saved backbone, which has the same mixer everywhere if it has none."""
    known = vit.recipe
    return Plan(**known["plan"]) if "plan" in known else Plan((known["mixer"],) * len(vit.blocks))


def package_ensemble(device: str) -> nn.Module | None:
    """Build the package's own model with random weights; None where it is not installed."""
    try:
        from dreamsim.feature_extraction import vision_transformer as own
        from dreamsim.feature_extraction.extractor import ViTExtractor
        from dreamsim.model import PerceptualModel, dreamsim_args
    except ImportError:
        return None

    def create_model(name: str, folder: str) -> object:
        vit = own.vit_base(patch_size=16)
        if "clip" not in name:
            return vit
        vit.pos_drop = nn.LayerNorm(vit.embed_dim)
        return vit, torch.randn(vit.embed_dim, 512) / 28

    with mock.patch.object(ViTExtractor, "create_model", create_model):
        settings = dreamsim_args["model_config"]["ensemble"]
        return PerceptualModel(**settings, normalize_embeds=True, device=device).eval().requires_grad_(False)


def ready(embed: Callable[[Tensor], Tensor], size: int, native: int | None) -> Callable[[Tensor], Tensor]:
    """From bytes to embeddings, with the resize on the device where the pictures come at another size."""
    if native:
        return lambda x: embed(comparators.resize_on_device(x, size))
    return lambda x: embed(x.float() / 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAVED)
    parser.add_argument("--plan", help="the recipe for the backbones; default: that of --model")
    parser.add_argument("--backbones", nargs="*", default=["vit_small_patch16_224.dino", "vit_base_patch16_224.dino"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=perceptual.DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--native", type=int, help="side of the pictures before the resize on the device, pixels")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models: dict[str, tuple[nn.Module, int]] = {}
    try:
        plan = read_plan(options.plan) if options.plan else None
    except ValueError as error:
        parser.error(str(error))
    if options.model.is_dir():
        metric, _ = perceptual.load(options.model)
        plan = plan or recipe(metric.backbone)
        models["saved"] = (metric, metric.backbone.patch_embed.img_size[0])
    if plan is None:
        parser.error(f"there is no saved model {options.model}: run notebook 10, or give --plan")
    for name in options.backbones:
        for size in options.sizes:
            vit = backbone.create(name, pretrained=False, img_size=size)
            vit = apply_plan(vit, **plan.stretched(len(vit.blocks)).described())
            models[f"{name} {size} px"] = (perceptual.Metric(vit).eval().requires_grad_(False), size)
    ensemble = comparators.dreamsim()
    print(f"recipe {plan.label}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in options.dtype:
        for batch in options.batch:
            compare(ensemble, models, batch, dtype, options)


def compare(ensemble: nn.Module, models: dict, batch: int, dtype: str, options: argparse.Namespace) -> None:
    """Print the time of an image of each model, and the median over the rounds of the ensemble's time over it."""
    every = {"DreamSim's ensemble": (ensemble, 224)} | models
    tasks: dict[str, Callable[[], object]] = {}

    def add(name: str, embed: Callable[[Tensor], Tensor], size: int) -> None:
        side = options.native or size
        picture = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=options.device)
        tasks.update(passes({name: ready(embed, size, options.native)}, picture))

    for name, (model, size) in every.items():
        embed = proposed_speed.in_format(model.to(options.device), dtype).embed_unchecked
        add(name, torch.compile(embed) if options.compile else embed, size)
    package = package_ensemble(options.device)
    if package is not None and batch > 1:  # it drops the axis of a batch of one
        package = package.to(perceptual.DTYPES[dtype])
        add("the package's own code", lambda x: package.embed(x.to(perceptual.DTYPES[dtype])), 224)
    times = interleaved(tasks, rounds=options.rounds, seconds=300, device=options.device)
    print(f"\n{dtype}, batch {batch}{', compiled' if options.compile else ''}")
    for name, spent in times.items():
        ratio = times["DreamSim's ensemble"] / spent
        low, high = np.quantile(ratio, [0.25, 0.75])
        print(
            f"{name:<36}{1e3 * np.median(spent) / batch:10.3f} ms an image {np.median(ratio):9.2f}x "
            f"(middle half {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
