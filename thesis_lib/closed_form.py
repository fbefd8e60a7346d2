"""What a model must compute: multiply-adds and parameters in closed form, and counted, which must agree."""

import itertools
from operator import itemgetter

import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib import attention
from thesis_lib.attention import Cost


def mixer_cost(attn: nn.Module, tokens: int, grid: tuple[int, int], prefix_tokens: int) -> Cost:
    """Return the closed form of one attention layer; timm's own `Attention` counts as MHA."""
    if isinstance(attn, attention.Mixer):
        return attn.closed_form(tokens, attn.dim, attn.num_heads, grid, prefix_tokens, attn.options)
    return attention.get("mha").cost(
        tokens, attn.head_dim * attn.num_heads, attn.num_heads, grid=grid, prefix_tokens=prefix_tokens
    )


def mlp_cost(mlp: nn.Module, tokens: int) -> Cost:
    """Return the closed form of a block's MLP; of a gated one the first layer is twice as wide as the second reads."""
    dim, rows, hidden = mlp.fc1.in_features, mlp.fc1.out_features, mlp.fc2.in_features
    gate = hidden * (rows > hidden)
    return Cost(tokens * dim * (rows + hidden), tokens * (5 * hidden + gate), dim * (rows + hidden) + rows + dim)


def block_grids(model: VisionTransformer) -> list[tuple[int, int]]:
    """Return the grid of patches that each block computes, halved from a `layer_plan.CoarserBlock` on."""
    grid, found = tuple(model.patch_embed.grid_size), []
    for block in model.blocks:
        grid = (grid[0] // 2, grid[1] // 2) if hasattr(block, "halving") else grid
        found.append(grid)
    return found


def model_cost(model: VisionTransformer) -> Cost:
    """Add up the closed forms of a timm ViT for one image: patch embedding, mixers, MLPs, norms, tokens.

    MACs: P·3p²·d + Σ layers (mixer + 2·N·d·hidden), N tokens of which P are patches; hidden = 4d gives the usual 8Nd².
    Elementwise operations, counted as in `Cost`: 7 an element of a LayerNorm, 5 of a GELU, 1 of a residual sum.
    """
    patches, prefix, dim = model.patch_embed.num_patches, model.num_prefix_tokens, model.embed_dim
    project, places = model.patch_embed.proj, 0 if model.pos_embed is None else model.pos_embed.numel()
    tokens, kernel = patches + prefix, project.weight[0].numel()
    bias = 0 if project.bias is None else dim
    total = Cost(patches * kernel * dim, tokens * dim, kernel * dim + bias + prefix * dim + places)
    if isinstance(model.norm_pre, nn.LayerNorm):
        total += Cost(0, 7 * tokens * dim, 2 * dim)
    for block, grid in zip(model.blocks, block_grids(model), strict=True):
        if hasattr(block, "halving"):
            total += Cost(0, (tokens - prefix) * dim)
            tokens = prefix + grid[0] * grid[1]
        norm, residual = Cost(0, 7 * tokens * dim, 2 * dim), Cost(0, 2 * tokens * dim, 0)
        scale = [Cost(0, tokens * dim, dim) for layer in (block.ls1, block.ls2) if not isinstance(layer, nn.Identity)]
        mixer = mixer_cost(block.attn, tokens, grid, prefix)
        total = sum([norm, mixer, residual, norm, mlp_cost(block.mlp, tokens), *scale], start=total)
    if isinstance(model.norm, nn.LayerNorm):
        total += Cost(0, 7 * tokens * dim, 2 * dim)
    if isinstance(model.head, nn.Linear):
        classes = model.head.out_features
        total += Cost(dim * classes, 0, (dim + 1) * classes)
    return total


def activated_macs(model: VisionTransformer) -> int:
    """Multiply-adds of one image if heads that a router turns off cost nothing; without such heads those executed.

    A reading aid beside `model_cost`: MoH's published code, as ours, executes every head (arXiv 2410.11842, section 3).
    """
    macs, prefix = model_cost(model).macs, model.num_prefix_tokens
    for block, grid in zip(model.blocks, block_grids(model), strict=True):
        if hasattr(block.attn, "activated_macs"):
            tokens = prefix + grid[0] * grid[1]
            macs += block.attn.activated_macs(tokens) - mixer_cost(block.attn, tokens, grid, prefix).macs
    return macs


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Count the multiply-adds of `model(x)` with torch's FlopCounterMode, 2 FLOPs a multiply-add.

    The fused attention kernels are pinned off: torch before 2.15 counts 0 for them on a CPU (pytorch#195460).
    """
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    """Count the parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def saving_ranges(
    mixer: str, dim: int, heads: int, *, prefix_tokens: int = 1, max_side: int = 128, **options
) -> list[tuple[int, int | None]]:
    """Return the ranges of token counts (first, last) in which a layer of `mixer` needs fewer MACs than MHA.

    Square grids up to max_side² patches are tried; those that the mixer cannot serve are passed over. The first of a
    range is a crossing point N*; last is None where the mixer still saves on the largest grid.
    """
    kind, mha, served = attention.get(mixer), attention.get("mha"), []
    for side in range(1, max_side + 1):
        tokens, geometry = side * side + prefix_tokens, {"grid": (side, side), "prefix_tokens": prefix_tokens}
        try:
            macs = kind.cost(tokens, dim, heads, **geometry, **options).macs
        except ValueError:
            continue
        served.append((tokens, macs < mha.cost(tokens, dim, heads, **geometry).macs))
    runs = [[tokens for tokens, _ in run] for saves, run in itertools.groupby(served, itemgetter(1)) if saves]
    return [(run[0], None if run[-1] == served[-1][0] else run[-1]) for run in runs]
