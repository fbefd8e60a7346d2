"""Which blocks of a ViT keep attention, get another mixer or go, and where its grid of patches is halved.

A plan speaks of the whole model's blocks; `apply_plan` makes the smaller model out of it, `Plan.stretched` carries it
over to a model of another depth.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from thesis_lib import attention
from thesis_lib.attention.base import pool_cells, suggest

DROP, KEEP = "drop", "mha"


def _abbreviations() -> dict[str, str]:
    """Give each mixer the shortest beginning of its name that none before it has: M, P, S, ..., Pe, So, Mo."""
    short: dict[str, str] = {}
    for name in (KEEP, *attention.MIXERS):
        beginnings = (name[:n].capitalize() for n in range(1, len(name) + 1))
        short.setdefault(name, next((b for b in beginnings if b not in short.values()), name))
    return short


ABBREVIATIONS = _abbreviations()


@dataclass(frozen=True)
class Plan:
    """One action a block (a mixer's name or "drop"); `merge`: the block that gets 2 x 2 patches averaged to one.

    Raises ValueError for an unknown action, for fewer than two blocks that stay, and unless `merge` is a block that
    stays and is not the last of them.
    """

    actions: tuple[str, ...]
    merge: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))  # JSON has lists only
        known = (*attention.MIXERS, DROP)
        for action in self.actions:
            if action not in known:
                raise ValueError(f"there is no action {action!r}{suggest(action, known)}; there are {', '.join(known)}")
        if len(self.kept) < 2:
            raise ValueError(f"at least two blocks must stay, not those of {self.actions}")
        if self.merge is not None and self.merge not in self.kept[:-1]:
            raise ValueError(f"merge={self.merge} must be a block that stays and is not the last: {self.kept[:-1]}")

    @property
    def kept(self) -> list[int]:
        """The blocks that stay."""
        return [i for i, action in enumerate(self.actions) if action != DROP]

    @property
    def label(self) -> str:
        """What a reader sees, of no two plans the same: `ABBREVIATIONS` by block, "-" for none, "/" at the halving."""
        letters = ["-" if action == DROP else ABBREVIATIONS[action] for action in self.actions]
        if self.merge is not None:
            letters.insert(self.merge, "/")
        return "".join(letters)

    def stretched(self, depth: int) -> "Plan":
        """Return the plan for a model of another depth: every block does what the one at its place does."""
        own = len(self.actions)
        merge = None if self.merge is None else math.ceil(self.merge * depth / own)
        return Plan(tuple(self.actions[i * own // depth] for i in range(depth)), merge)

    def described(self) -> dict[str, Any]:
        """Return plain JSON types, the arguments of `apply_plan`."""
        return asdict(self) | {"actions": list(self.actions)}


class Halving(nn.Module):
    """Average each 2 x 2 patches of a row-major grid behind prefix tokens: (B, p + P, D) -> (B, p + P / 4, D)."""

    def __init__(self, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.prefix], pool_cells(x[:, self.prefix :], self.grid, 2)], dim=1)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, prefix={self.prefix}"


class CoarserBlock(Block):
    """timm's `Block`, sharing its parts, behind a `Halving`. Made by `apply_plan`."""

    def __init__(self, block: Block, grid: tuple[int, int], prefix: int) -> None:
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.halving = Halving(grid, prefix)
        self.train(block.training)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(self.halving(x), **options)


def check_untouched(model: VisionTransformer) -> None:
    """Raise ValueError for a model whose blocks a plan or token merging has changed already."""
    done = {"plan", "token_merging"} & set(getattr(model, "recipe", {}))
    if done or any(hasattr(block, "halving") or hasattr(block, "trace") for block in model.blocks):
        raise ValueError(
            "a plan or token merging has changed this model's blocks: put mixers or a plan into a new one, merge last"
        )


def apply_plan(model: VisionTransformer, actions: Sequence[str], merge: int | None = None) -> VisionTransformer:
    """Put a plan into a timm ViT with attention in all blocks, in place, and return it; weights that stay are reused.

    The mixers have their default options. `model.recipe`, where there is one, says the plan.
    Raises ValueError for a plan of another depth, a model with other mixers, or with a plan or merged tokens before,
    and a grid that cannot be halved.
    """
    check_untouched(model)
    plan, grid, prefix = Plan(tuple(actions), merge), tuple(model.patch_embed.grid_size), model.num_prefix_tokens
    if len(plan.actions) != len(model.blocks):
        raise ValueError(f"the plan is for {len(plan.actions)} blocks, the model has {len(model.blocks)}")
    if merge is not None and any(side % 2 for side in grid):
        raise ValueError(f"merge={merge}: the grid of {grid[0]}x{grid[1]} patches cannot be halved")
    small, blocks = (grid[0] // 2, grid[1] // 2), []
    for i in plan.kept:
        kind, place = attention.get(plan.actions[i]), grid if merge is None or i < merge else small
        blocks.append((model.blocks[i], kind.from_attention(model.blocks[i].attn, place, prefix)))
    for block, mixer in blocks:  # only after every one could be built
        block.attn = mixer
    first = None if merge is None else plan.kept.index(merge)
    model.blocks = nn.Sequential(
        *(CoarserBlock(block, grid, prefix) if i == first else block for i, (block, _) in enumerate(blocks))
    )
    if hasattr(model, "recipe"):
        model.recipe["plan"] = plan.described()
    return model


def plan_of(model: VisionTransformer) -> tuple[Plan, list[float]]:
    """Return the plan that a model's recipe says, and the share of its patches that each block merges, if any does."""
    recipe = model.recipe
    plan = Plan(**recipe["plan"]) if "plan" in recipe else Plan((recipe["mixer"],) * len(model.blocks))
    return plan, [r / model.patch_embed.num_patches for r in recipe.get("token_merging", {"r": []})["r"]]
