"""A tiny ViT whose tokens halt at different layers, and halting written down token by token."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from thesis_lib.adaptive_tokens import Halting

VARIED = Halting(0.5, -1.0)  # at these, the tokens of `halting_vit` halt in every layer but the first


def halting_vit(seed: int = 0, cls: float = 0.0, **options) -> VisionTransformer:
    """Random weights as sharp as trained ones; `cls` moves the class token's first channel, hence when it halts."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 4, "num_classes": 7}
    vit = VisionTransformer(**shape | options).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            spread = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
        vit.cls_token[0, 0, 0] += cls
    return vit


def images(n: int, size: int = 32, seed: int = 1) -> Tensor:
    """Normalised images, (n, 3, size, size), each of its own contrast."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(n, 1, 1, 1, generator=generator) + 0.5
    return contrast * torch.randn(n, 3, size, size, generator=generator)


@torch.no_grad()
def reference(vit: VisionTransformer, halting: Halting, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classify one image (1, 3, H, W) with a plain ViT and a loop over tokens that takes the halted ones out.

    Returns logits, and depth and rho of each token, 0 for those that outlived the class token.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    left, total = list(range(x.shape[1])), [0.0] * x.shape[1]
    out, depth, rho = torch.zeros(1, x.shape[2]), torch.zeros(len(total)), torch.zeros(len(total))
    for layer, block in enumerate(vit.blocks, start=1):
        x = block(x)
        stay = []
        for place, token in enumerate(left):
            score = halting.score(x[0, place]).item()
            ends = total[token] + score >= 1 - halting.eps or layer == len(vit.blocks)
            weight = 1 - total[token] if ends else score
            if token == 0:
                out += weight * x[:, place]
            total[token] += score
            if ends:
                depth[token], rho[token] = layer, layer + weight
            else:
                stay.append(place)
        if 0 not in [left[place] for place in stay]:
            break
        x, left = x[:, stay], [left[place] for place in stay]
    return vit.head(vit.fc_norm(vit.norm(out))), depth, rho
