"""Token merging: every block joins its most similar tokens (ToMe, arXiv 2210.09461, section 3). Needs no training.

Between attention and MLP a block pairs the patches at even positions with their nearest ones at odd positions, by the
cosine of their keys averaged over heads, and joins the r best pairs to means weighted by how many patches a token
stands for. Attention adds the logarithm of that number to a key's logits: a token counts as often as it has patches.

Departures from the published code: an r that cannot be is an error instead of the largest that can; register tokens are
never merged either; ties go to the earlier token, and sums are matrix products instead of atomic additions, so that a
GPU repeats itself; and after the last block every patch gets back the token that it went into (see `merge_tokens`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from thesis_lib import attention, closed_form
from thesis_lib.attention import Cost
from thesis_lib.attention.base import integer
from thesis_lib.attention.soft import precise, without_autocast

PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


@dataclass
class Trace:
    """What the last forward pass merged, by block: sizes (B, n) of the tokens it gave, and where each token went.

    groups (B, N): for every token that entered the first block, the one given that it is a part of. None: none merged.
    """

    sizes: list[Tensor | None]
    groups: list[Tensor | None]


def merge_tokens(model: VisionTransformer, r: int | Sequence[int], *, unmerge: bool = True) -> VisionTransformer:
    """Let every block of a timm ViT merge r tokens, in place, and return the model; r = 0 gives it its function back.

    r: tokens fewer after each block, or one number a block. At most half of the patches that a block gets can go.
    unmerge: copy each token, after the last block, to the places of the patches that are in it. Features then keep
    their shape and grid, and a mean over patches weighs tokens by their size. The class token is the same without.
    Parameters keep their names. Calling it again replaces r; `model.recipe`, where there is one, says what is set.
    Raises ValueError for blocks other than timm's `Block`, mixers other than fused MHA, and (naming what can be) for r.
    """
    prefix, grid = model.num_prefix_tokens, tuple(model.patch_embed.grid_size)
    schedule = _schedule(r, len(model.blocks), grid[0] * grid[1])
    mha = attention.get("mha")
    for i, block in enumerate(model.blocks):
        mixer = getattr(block, "attn", None)
        what = getattr(mixer, "name", type(mixer).__name__)
        fused = type(mixer) is Attention or (type(mixer) is mha and mixer.options["implementation"] == "fused")
        if type(block) not in (Block, MergingBlock) or not fused:
            raise ValueError(
                f"block {i} is a {type(block).__name__} with {what!r} as its mixer; "
                "tokens can be merged in timm's Block with fused attention only"
            )
    mixers = [
        block.attn if type(block.attn) is mha else mha.from_attention(block.attn, grid, prefix)
        for block in model.blocks
    ]
    trace = Trace([None] * len(schedule), [None] * len(schedule))
    for i, (block, mixer, count) in enumerate(zip(model.blocks, mixers, schedule, strict=True)):
        last = unmerge and i == len(schedule) - 1
        block.attn = mixer
        model.blocks[i] = MergingBlock(block, i, count, prefix, trace, unmerge=last)
    if hasattr(model, "recipe"):
        model.recipe.pop("token_merging", None)
        model.recipe |= {"token_merging": {"r": schedule, "unmerge": unmerge}} if any(schedule) else {}
    return model


def merged_groups(model: VisionTransformer, block: int = -1) -> Tensor:
    """Return which token of those a block gave each of the model's tokens is a part of, (B, N), in the last forward.

    Raises RuntimeError where nothing was merged up to that block or the model has not run.
    """
    trace = getattr(model.blocks[block], "trace", None)
    groups = trace.groups[block] if trace else None
    if groups is None:
        raise RuntimeError("no tokens were merged up to this block: call merge_tokens with r > 0, then run the model")
    return groups


def token_counts(model: VisionTransformer) -> list[int]:
    """Return how many tokens enter each block, and how many leave the last one before they are unmerged."""
    counts = [model.num_prefix_tokens + model.patch_embed.num_patches]
    for block in model.blocks:
        counts.append(counts[-1] - getattr(block, "r", 0))
    return counts


def model_cost(model: VisionTransformer) -> Cost:
    """Add up the closed forms for one image as `closed_form.model_cost` does, with the tokens that each block has left.

    Matching a x b tokens takes a b d_h multiply-adds, merging r of them b r d.
    """
    grid, prefix, dim = tuple(model.patch_embed.grid_size), model.num_prefix_tokens, model.embed_dim
    counts = token_counts(model)
    total, full = closed_form.model_cost(model), counts[0]
    for block, before, after in zip(model.blocks, counts, counts[1:], strict=False):
        mlp, r, heads = closed_form.mlp_cost(block.mlp, 1), before - after, block.attn.num_heads
        whole, left = (closed_form.mixer_cost(block.attn, tokens, grid, prefix) for tokens in (full, before))
        early, late = (8 + (not isinstance(scale, nn.Identity)) for scale in (block.ls1, block.ls2))  # norm, residual
        total += Cost(
            macs=left.macs - whole.macs - (full - after) * mlp.macs,
            elementwise=left.elementwise
            - whole.elementwise
            - early * (full - before) * dim
            - (full - after) * (late * dim + mlp.elementwise),
        )
        total += Cost(elementwise=(before < full) * before * (1 + heads * before))  # logarithms, added to the logits
        if r:
            even, odd = (len(range(before)[part]) for part in _halves(prefix))
            total += Cost(
                macs=even * odd * dim // heads + odd * r * dim,
                # mean and norm of keys, maximum; weights of the sources and of the tokens they join
                elementwise=before * (dim + 3 * dim // heads) + even * odd + 2 * odd * (r + dim),
            )
    if not getattr(model.blocks[-1], "unmerge", True) and isinstance(model.norm, nn.LayerNorm):
        total += Cost(elementwise=-7 * (full - counts[-1]) * dim)
    return total


class MergingBlock(nn.Module):
    """timm's `Block`, sharing its parts, with merging between attention and MLP. Made by `merge_tokens`."""

    def __init__(self, block: nn.Module, index: int, r: int, prefix: int, trace: Trace, *, unmerge: bool) -> None:
        super().__init__()
        for name in PARTS:
            self.add_module(name, getattr(block, name))
        self.index, self.r, self.prefix, self.trace, self.unmerge = index, r, prefix, trace, unmerge
        self.train(block.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("a block that merges tokens takes neither attn_mask nor is_causal")
        sizes, groups = (part[self.index - 1] if self.index else None for part in (self.trace.sizes, self.trace.groups))
        y = self.norm1(x)
        if self.r == 0 and sizes is None:
            mixed, keys = self.attn(y), None
        else:
            q, keys, v = self.attn.query_key_value(y)
            mixed = self.attn.project_heads(self.attend(q, keys, v, sizes))
        x = x + self.drop_path1(self.ls1(mixed))
        if self.r:
            chosen, targets = match(keys, self.r, self.prefix)
            x, sizes, moved = merge(x, sizes, chosen, targets, self.prefix)
            groups = moved if groups is None else moved.gather(1, groups)
        self.trace.sizes[self.index], self.trace.groups[self.index] = sizes, groups
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if self.unmerge and groups is not None:
            x = x.gather(1, groups[..., None].expand(-1, -1, x.shape[-1]))
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sizes: Tensor | None) -> Tensor:
        """Attention of every head, (B, h, n, d_h), to keys that count as often as their size says."""
        if sizes is None:
            return self.attn.attend(q, k, v)
        dropout = self.attn.attn_drop.p if self.training else 0.0
        bias = sizes.log()[:, None, None].to(q.dtype)  # (B, 1, 1, n)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)

    def extra_repr(self) -> str:
        return f"r={self.r}, unmerge={self.unmerge}"


@torch.no_grad()
def match(keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Choose r tokens at even positions and the token at an odd position that each joins, (B, r) and (B, r).

    keys: (B, h, n, d_h). Both are indices within their half; the first `prefix` tokens are in neither.
    Raises ValueError for an r that is more than half of the other tokens.
    """
    patches = keys.shape[2] - prefix
    if r > patches // 2:
        raise ValueError(f"r={r} of {patches} patches cannot be merged; possible: 0 to {patches // 2}")
    with without_autocast(keys):
        direction = F.normalize(precise(keys).mean(1), dim=-1)  # (B, n, d_h)
        even, odd = (direction[:, half] for half in _halves(prefix))
        best, partner = (even @ odd.mT).max(dim=-1)  # (B, a)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    return chosen, partner.gather(1, chosen)


def merge(
    x: Tensor, sizes: Tensor | None, chosen: Tensor, targets: Tensor, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Join the chosen even tokens to their targets: tokens (B, n - r, D), sizes (B, n - r), new places (B, n).

    The order is prefix tokens, even tokens that stay, odd tokens. x: (B, n, D); sizes: (B, n), None where all are 1.
    """
    batch, n, dim = x.shape
    if sizes is None:
        sizes = precise(x.new_ones(batch, n))
    even, odd = (torch.arange(n, device=x.device)[half] for half in _halves(prefix))
    stays = torch.ones(batch, len(even), device=x.device, dtype=torch.bool).scatter(1, chosen, False)
    rest = stays.long().argsort(dim=1, descending=True, stable=True)[:, : len(even) - chosen.shape[1]]  # in order
    first = prefix + rest.shape[1]  # the place of the first odd token
    moved = torch.arange(n, device=x.device).repeat(batch, 1)  # (B, n)
    moved[:, odd] = first + torch.arange(len(odd), device=x.device)
    moved[:, even] = (prefix + stays.cumsum(1) - 1).scatter(1, chosen, first + targets)
    joined = sizes.new_zeros(batch, first + len(odd)).scatter_add(1, moved, sizes)  # whole numbers: exact in any order
    with without_autocast(x):
        source = precise(x).gather(1, even[chosen][..., None].expand(-1, -1, dim))  # (B, r, D)
        total = joined[:, first:, None]  # (B, b, 1)
        weights = F.one_hot(targets, len(odd)).mT * sizes.gather(1, even[chosen])[:, None] / total  # (B, b, r)
        means = torch.baddbmm(precise(x[:, odd]) * (sizes[:, odd, None] / total), weights.to(source.dtype), source)
    kept = x.gather(1, even[rest][..., None].expand(-1, -1, dim))
    return torch.cat([x[:, :prefix], kept, means.to(x.dtype)], dim=1), joined, moved


def _halves(prefix: int) -> tuple[slice, slice]:
    """Tokens at even and at odd positions, those before `prefix` left out."""
    return slice(prefix + prefix % 2, None, 2), slice(prefix + (prefix + 1) % 2, None, 2)


def _schedule(r: int | Sequence[int], depth: int, patches: int) -> list[int]:
    constant = not isinstance(r, Sequence)
    schedule = [integer("r", each, 0) for each in ([r] * depth if constant else r)]
    if len(schedule) != depth:
        raise ValueError(f"r={schedule} has {len(schedule)} entries for {depth} blocks; give one each, or an integer")
    block = _impossible(schedule, patches)
    if block is not None:
        left = patches - sum(schedule[:block])
        hint = f": block {block} gets {left} patches and can merge 0 to {left // 2} of them"
        if constant:
            most = max(n for n in range(r) if _impossible([n] * depth, patches) is None)
            hint += f"; possible for every block: 0 to {most}"
        raise ValueError(f"r={r} merges too many tokens{hint}")
    return schedule


def _impossible(schedule: Sequence[int], patches: int) -> int | None:
    """Return the first block that would have to merge more than half of its patches."""
    for block, count in enumerate(schedule):
        if count > patches // 2:
            return block
        patches -= count
    return None
