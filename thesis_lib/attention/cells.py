"""Cells: a grid of patches cut into a number of rows and columns that need not divide it, and means over them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thesis_lib.attention.base import as_image, integer


def cell_count(name: str, value: object, grid: tuple[int, int], *, tiled: bool = True) -> int:
    """Check a number of cells; None is half the grid's rows and columns, at most 8 of each.

    Raises ValueError that names the range, or the nearest numbers that tile the grid.
    """
    if value is None:
        return math.prod(min(8, -(-side // 2)) for side in grid)
    patches = math.prod(grid)
    count = integer(name, value, 1, patches)
    if tiled and tiling(count, grid) is None:
        below = next(n for n in range(count, 0, -1) if tiling(n, grid))
        above = next(n for n in range(count, patches + 1) if tiling(n, grid))
        raise ValueError(
            f"{name}={count} cells do not tile a {grid[0]}x{grid[1]} grid in rows and columns; "
            f"the nearest that do: {below}, {above}"
        )
    return count


def tiling(count: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Return the rows and columns of `count` cells, those that make cells most square; None where none fit."""
    height, width = grid
    fits = [(n, count // n) for n in range(1, height + 1) if count % n == 0 and count // n <= width]
    return min(fits, key=lambda cells: abs(math.log(height * cells[1] / (width * cells[0]))), default=None)


def cell_means(x: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Average tokens (B, H*W, C) of a row-major grid over cells -> (B, rows * columns, C).

    Where the cells do not divide a side, those at its end are longer by one.
    """
    image = as_image(x, grid)  # (B, C, H, W)
    (heights, widths) = (runs(side, count) for side, count in zip(grid, cells, strict=True))
    bands = []
    for band, height in zip(image.split([tokens for tokens, _ in heights], dim=-2), heights, strict=True):
        blocks = zip(band.split([tokens for tokens, _ in widths], dim=-1), widths, strict=True)
        bands.append(torch.cat([F.avg_pool2d(block, (height[1], width[1])) for block, width in blocks], dim=-1))
    return torch.cat(bands, dim=-2).flatten(2).mT


def runs(tokens: int, cells: int) -> Sequence[tuple[int, int]]:
    """Cut tokens into cells of two lengths at most: (tokens in all, tokens a cell) of each length."""
    short, longer = divmod(tokens, cells)
    parts = [((cells - longer) * short, short), (longer * (short + 1), short + 1)]
    return [part for part in parts if part[0]]
