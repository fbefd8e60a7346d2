"""What a fast metric is compared with: DreamSim's ensemble and its single branches, and LPIPS.

DreamSim (Fu et al. 2023, arXiv 2306.09344) reads the class token of DINO's last block before the final norm, and the
projected class token of two CLIP image towers; the ensemble is their concatenation, 768 + 512 + 512 wide. Here these
are timm's ViTs. Their published weights are used where they are present; with random ones a model can be timed.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thesis_lib import backbone, evaluation, weights
from thesis_lib.attention.base import suggest
from thesis_lib.perceptual import distance

RELEASE = "github.com/ssundaram21/dreamsim/releases (v0.2.0-checkpoints)"
ALEXNET = "alexnet-owt-7be5be79.pth"  # in torch.hub's checkpoints, where torchvision puts it
ABSENT = "weights not present"


@dataclass(frozen=True)
class Tower:
    """One branch: timm's architecture, what is read of it ("cls" or "embedding"), and its weight files, best first."""

    architecture: str
    feature: str
    files: tuple[str, ...]


TOWERS = {
    "dino_vitb16": Tower(
        "vit_base_patch16_224.dino",
        "cls",
        ("checkpoints/dino_vitbase16_pretrain.pth", "dino_vitbase16_pretrain.pth", "dino_vitb16_pretrain.pth"),
    ),
    "clip_vitb16": Tower("vit_base_patch16_clip_quickgelu_224", "embedding", ("clip_vitb16_pretrain.pth.tar",)),
    "open_clip_vitb16": Tower("vit_base_patch16_clip_224", "embedding", ("open_clip_vitb16_pretrain.pth.tar",)),
    "clip_vitb32": Tower("vit_base_patch32_clip_quickgelu_224", "embedding", ("clip_vitb32_pretrain.pth.tar",)),
    "open_clip_vitb32": Tower("vit_base_patch32_clip_224", "embedding", ("open_clip_vitb32_pretrain.pth.tar",)),
}
# The package's models: their towers, and the folder of the LoRA adapter that tuned them on NIGHTS.
MODELS = {
    "ensemble": (("dino_vitb16", "clip_vitb16", "open_clip_vitb16"), "ensemble_lora"),
    **{name: ((name,), f"{name}_single_lora") for name in ("dino_vitb16", "clip_vitb32", "open_clip_vitb32")},
}


class Branch(nn.Module):
    """One ViT of DreamSim with its own normalisation: images in [0, 1] -> "cls" (B, D) or "embedding" (B, E).

    As published, every token passes the last block, although no other than the class token is read.
    """

    def __init__(self, vit: nn.Module, feature: str = "cls") -> None:
        super().__init__()
        self.vit, self.feature = vit, feature
        for name, values in zip(("mean", "std"), backbone.normalization(vit), strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        if self.feature == "embedding":
            return self.vit(x)  # final norm of the class token, then the projection
        ((_, prefix),) = self.vit.forward_intermediates(
            x, indices=1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        return prefix[:, 0]


class DreamSim(nn.Module):
    """The `dreamsim` package's metric over branches: concatenated features, centred and normalised, 1 - cosine.

    Called as `perceptual.Metric` is, and accepted where one is embedded or evaluated. `trained` says whether the
    published weights are in it.
    """

    def __init__(self, branches: Sequence[Branch], *, normalize: bool = True, trained: bool = False) -> None:
        super().__init__()
        self.branches, self.normalize, self.trained = nn.ModuleList(branches), normalize, trained
        self.img_size = tuple(branches[0].vit.patch_embed.img_size)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances of image pairs: (B, 3, H, W) twice, floats in [0, 1] -> (B,)."""
        return distance(self.embed(a), self.embed(b))

    def embed(self, x: Tensor) -> Tensor:
        """Return embeddings: (B, 3, H, W) floats in [0, 1] -> (B, sum of the branches' widths)."""
        self._check(x)
        return self.embed_unchecked(x)

    def embed_unchecked(self, x: Tensor) -> Tensor:
        """Return what `embed` does without looking at the values."""
        features = torch.cat([branch(x) for branch in self.branches], dim=-1)
        return F.normalize(features - features.mean(-1, keepdim=True), dim=-1) if self.normalize else features

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1:] != (3, *self.img_size):
            raise ValueError(
                f"Images must have the shape (B, 3, {self.img_size[0]}, {self.img_size[1]}), got {tuple(x.shape)}."
            )


def dreamsim(name: str = "ensemble", folder: str | Path | None = None) -> DreamSim:
    """Build one of the package's models from timm; with the published weights where `folder` has all of them.

    folder: what the package's zip files hold (dino_vitb16_pretrain.pth, clip_vitb16_pretrain.pth.tar, ensemble_lora/,
    ...); the LoRA adapter is merged. Without all of them the weights are random (torch's seed) and `trained` is False.
    Raises ValueError for an unknown name or files that do not fit.
    """
    if name not in MODELS:
        raise ValueError(f"DreamSim has no model {name!r}{suggest(name, MODELS)}; there are {', '.join(MODELS)}")
    towers, adapter = MODELS[name]
    present = not missing_files(name, folder)
    branches = []
    for number, tower in enumerate(towers):
        vit = build_tower(tower, _file(tower, Path(folder)) if present else None)
        if present:
            _merge_adapter(vit, Path(folder) / adapter, number)
        branches.append(Branch(vit, TOWERS[tower].feature))
    return DreamSim(branches, trained=present)


def missing_files(name: str, folder: str | Path | None) -> list[str]:
    """Name the published files of a model that are not below `folder`; all of them for no folder."""
    towers, adapter = MODELS[name]
    needed = {tower: TOWERS[tower].files[-1] for tower in towers} | {adapter: adapter}
    if folder is None:
        return list(needed.values())
    absent = [file for tower, file in needed.items() if tower != adapter and _file(tower, Path(folder)) is None]
    return absent + ([] if (Path(folder) / adapter / "adapter_model.safetensors").is_file() else [adapter])


def build_tower(name: str, path: str | Path | None = None) -> nn.Module:
    """Build a tower's ViT in eval mode, with random weights or those of a file that the package reads.

    The package keeps CLIP in a DINO ViT: `pos_drop` is CLIP's first norm, `proj` (D, E) its projection, and the patch
    embedding has a bias, which adds to the position embedding of every patch. Raises ValueError for another content.
    """
    tower = TOWERS[name]
    clip = tower.feature == "embedding"
    vit = timm.create_model(tower.architecture, num_classes=512 if clip else 0)
    if clip:
        nn.init.normal_(vit.head.weight, std=vit.embed_dim**-0.5)  # timm's starts at 0, which no cosine survives
    if path is None:
        return vit.eval()
    state, origin = weights.read(Path(path))
    if clip:
        absent = [key for key in ("proj", "pos_embed", "patch_embed.proj.bias") if key not in state]
        if absent:
            raise ValueError(f"{path} holds no image tower of DreamSim's CLIP: it lacks {', '.join(absent)}")
        state = {key.replace("pos_drop.", "norm_pre."): value for key, value in state.items()}
        projection = state.pop("proj").float()  # (D, E)
        bias = state.pop("patch_embed.proj.bias")
        position = state["pos_embed"].clone()  # (1, 1 + P, D)
        position[:, 1:] += bias
        zeros = torch.zeros(projection.shape[1])
        state |= {"pos_embed": position, "head.weight": projection.T.contiguous(), "head.bias": zeros}
    return weights.load(vit, {key: value.float() for key, value in state.items()}, origin, path).eval()


def _file(tower: str, folder: Path) -> Path | None:
    return next((folder / file for file in TOWERS[tower].files if (folder / file).is_file()), None)


def _merge_adapter(vit: nn.Module, folder: Path, number: int) -> None:
    """Merge one tower's part of an adapter: the package numbers its towers in the keys."""
    own = f"extractor_list.{number}."
    tensors = load_file(folder / "adapter_model.safetensors")
    with tempfile.TemporaryDirectory() as part:
        save_file({k: v for k, v in tensors.items() if own in k}, Path(part) / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        (Path(part) / "adapter_config.json").write_text(json.dumps(config))
        backbone.merge_dreamsim_adapter(vit, part)


def lpips_distance(device: str = "cpu", *, random: bool = False) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return LPIPS 0.1 on AlexNet (Zhang et al. 2018), (B, 3, H, W) in [0, 1] twice -> (B,); None where it is absent.

    The `lpips` package (extra `peers`) brings the linear layers; AlexNet's file must be in torch.hub's checkpoints, for
    nothing is fetched. random: an AlexNet without trained weights instead, to be timed.
    """
    present = random or (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET).is_file()
    if find_spec("lpips") is None or not present:
        return None
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names torchvision's old way to ask for weights
        model = lpips.LPIPS(net="alex", pnet_rand=random, verbose=False).to(device).eval().requires_grad_(False)
    return lambda a, b: model(a, b, normalize=True).flatten()


def evaluate_pairs(
    function: Callable[[Tensor, Tensor], Tensor],
    dataset: Any,
    pixels: Any,
    *,
    batch_size: int = 64,
    device: str = "cpu",
) -> pd.DataFrame:
    """Score a distance that takes two images, not embeddings, on the triplets of a NIGHTS data set."""
    rows = np.flatnonzero(pixels.usable[dataset.index].all(axis=1))
    parts = []
    for batch in np.array_split(rows, -(-len(rows) // batch_size)):
        reference, left, right = (pixels[dataset.index[batch, i]].to(device).float() / 255 for i in range(3))
        with torch.inference_mode():
            parts.append(torch.stack([function(reference, side) for side in (left, right)]).cpu())  # (2, b)
    return evaluation.triplet_table(dataset, tuple(torch.cat(parts, 1)), rows)


def resize_on_device(images: Tensor, size: int) -> Tensor:
    """Make uint8 images (B, 3, H, W) floats in [0, 1] of size x size, where they are: bicubic, antialiased.

    Decoded images then cross to the device as bytes. Pillow rounds to bytes after the resize; this does not.
    """
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).div_(255).clamp_(0, 1)
