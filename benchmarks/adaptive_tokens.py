"""Time adaptive tokens in three forms, in turn: dense ViT, masked halting, and halting that removes tokens.

    python benchmarks/adaptive_tokens.py [--backbone deit_small_patch16_224] [--batch 32] [--shares 0.9 0.65 0.5 0.35]

What counts for time is how many tokens are left in which layer, not what the weights know: random weights do (the
demo backbone's own, where they are there), with each position's first channel moved so that tokens halt at different
layers, and differently from image to image. beta is then set so that the wanted share of tokens is computed.
"""

import argparse
from copy import deepcopy

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib import backbone
from thesis_lib.adaptive_speed import ENGINES, beta_for_tokens, engines, interleaved, tokens_kept
from thesis_lib.adaptive_tokens import AdaptiveViT, preset
from thesis_lib.token_removal import STEP, TokenRemoval, dense_macs, executed_macs


def varied(vit: nn.Module, seed: int = 0) -> nn.Module:
    """Let the first channel of each patch start at another value, that of the class token low: it halts late."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prefix = vit.num_prefix_tokens
        offsets = torch.randn(vit.pos_embed.shape[1] - prefix, generator=generator)
        vit.pos_embed[0, prefix:, 0] += offsets
        vit.pos_embed[0, :prefix, 0] -= 4
        vit.patch_embed.proj.weight[0] *= 4  # what a patch shows moves its channel, too
    return vit.eval()


def smooth_images(batch: int, size: int, seed: int = 1) -> Tensor:
    """Draw images (batch, 3, size, size) of coarse random colours, normalised."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="demo", help="demo, or any timm ViT, such as deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.65, 0.5, 0.35], help="of tokens computed")
    parser.add_argument("--step", type=int, default=STEP, help="attention pads to multiples of it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of one share")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vit = backbone.create("demo") if options.backbone == "demo" else timm.create_model(options.backbone)
    dense = varied(vit).to(options.device)
    model = AdaptiveViT(deepcopy(dense), preset("paper", gamma=3.0))
    images = smooth_images(options.batch, vit.patch_embed.img_size[0]).to(options.device)
    where = f"{options.threads} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{options.backbone}, batch {options.batch}, {where}; milliseconds a batch, medians of runs in turn")
    print(f"{'tokens':>7} {'dense':>9} {'masked':>9} {'removing':>9} {'x dense':>8} {'x masked':>9} {'ideal':>6}")
    for share in options.shares:
        model.halting = preset("paper", gamma=3.0, beta=beta_for_tokens(model, images[:8], share))
        report(dense, model, images, options)


def report(dense: nn.Module, model: AdaptiveViT, images: Tensor, options: argparse.Namespace) -> None:
    """Print one line; the ratios are medians over rounds, in which the forms run one after the other."""
    tasks = engines(dense, model, images)
    engine = TokenRemoval(model, options.step)
    tasks["removing"] = torch.inference_mode()(lambda: engine(images))
    with torch.inference_mode():
        removed, trace = engine.run(images), model.run(images)
    same = torch.equal(removed.tokens, trace.tokens.cpu())
    differ = (removed.features - trace.features).abs().max().item()
    assert not same or differ < 1e-4, f"masking and removing differ by {differ}"
    times = interleaved(tasks, rounds=options.rounds, seconds=options.seconds, device=options.device)
    milliseconds = [1e3 * np.median(times[name]) for name in ENGINES]
    ratios = [np.median(times[name] / times["removing"]) for name in ENGINES[:2]]
    ideal = len(images) * dense_macs(model.vit) / executed_macs(model.vit, removed.tokens, step=1)
    note = f"outputs differ by {differ:.0e}" if same else f"a token halts at the limit, outputs differ by {differ:.0e}"
    print(
        f"{tokens_kept(model, images):7.1%} "
        + " ".join(f"{value:9.1f}" for value in milliseconds)
        + f" {ratios[0]:7.2f}x {ratios[1]:8.2f}x {ideal:5.2f}x  {note}",
        flush=True,
    )


if __name__ == "__main__":
    main()
