"""What a student is trained on: positions of the source, and how its similarities should lie over the target.

Positions are (x, y) in [0, 1] of an image. Similarities are cosines, (B, n, M): n source positions by the M cells of
the target's grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from thesis_lib.attention import suggest
from thesis_lib.correspondence.features import foreground

SAMPLINGS = ("full", "grid", "random", "foreground", "ground_truth")


def positions(
    sampling: str, maps: Tensor, points: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose positions (B, n, 2) of the source images and their weights (B, n), which are 0 for padding.

    maps: the teacher's (or the student's own) maps (B, C, h, w) of the sources, whose foreground counts; points: the
    true key-points (B, P, 2), NaN where a pair has fewer. "full" takes every cell's centre, "grid" about `count` on an
    even grid, "random" `count` anywhere, "foreground" `count` in cells of the foreground (anywhere, for a picture
    without one), "ground_truth" the key-points.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown sampling {sampling!r}{suggest(sampling, SAMPLINGS)}; known: {', '.join(SAMPLINGS)}")
    b, _, h, w = maps.shape
    if sampling == "ground_truth":
        there = ~points.isnan().any(-1)
        return points.nan_to_num(0.5), there.float()
    if sampling in ("full", "grid"):
        rows, columns = (h, w) if sampling == "full" else (max(1, round(count**0.5)),) * 2
        chosen = centres(rows, columns, maps.device).expand(b, -1, -1)
    else:
        jitter = torch.rand((b, count, 2), generator=generator).to(maps.device)
        if sampling == "random":
            chosen = jitter
        else:
            inside = foreground(maps).flatten(1).float()  # (B, h*w)
            inside = torch.where(inside.any(1, keepdim=True), inside, 1.0).cpu()
            cell = torch.multinomial(inside, count, replacement=True, generator=generator).to(maps.device)
            corner = torch.stack([cell % w, cell // w], dim=-1)  # (B, n, 2)
            chosen = (corner + jitter) / torch.tensor([w, h], device=maps.device)
    return chosen, torch.ones(chosen.shape[:2], device=maps.device)


def centres(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the centres of a grid's cells, row by row: (rows * columns, 2)."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (rows, columns))
    return torch.cartesian_prod(y, x).flip(1)


def similarities(source: Tensor, target: Tensor, at: Tensor) -> Tensor:
    """Return the cosines of the source's features at positions (B, n, 2) with all cells of the target: (B, n, M)."""
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    queries = F.grid_sample(source, 2 * at[:, None].to(source) - 1, **options)[:, :, 0]  # (B, C, n)
    return F.normalize(queries, dim=1).mT @ F.normalize(target.flatten(2), dim=1)


def to_grid(values: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample similarities (B, n, M) over a grid to those over another one, for teacher and student to agree."""
    if grid == new:
        return values
    maps = values.unflatten(2, grid)  # (B, n, h, w)
    return F.interpolate(maps, new, mode="bilinear", align_corners=False, antialias=True).flatten(2)


def softmax_cross_entropy(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 0.01) -> Tensor:
    """Return the cross-entropy of the student's distribution over the target with the teacher's, a weighted mean.

    That is -sum_j T_ij log P_ij with T, P = softmax over j of similarity / temperature: DistillDIFT's (Fundel et al.
    2025) as it is meant. Equal similarities give the teacher's entropy and no gradient.
    """
    teacher, student = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    return _mean(-(teacher * student).sum(-1), weights)


def released_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 0.01) -> Tensor:
    """Return what DistillDIFT's released code computes instead: the softmax taken twice, over the wrong axis.

    nn.CrossEntropyLoss reads (B, n, M) as n classes, so it normalises probabilities over source positions. Kept to
    show the difference; nothing is trained on it.
    """
    teacher, student = ((s / temperature).softmax(-1) for s in (teacher, student))
    return F.cross_entropy(student, teacher)


def map_mse(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean squared difference of whole similarity maps."""
    return _mean((student - teacher).square().mean(-1), weights)


def point_cross_entropy(
    student: Tensor,
    grid: tuple[int, int],
    truth: Tensor,
    weights: Tensor,
    *,
    temperature: float = 0.01,
    blur: float = 0.7,
) -> Tensor:
    """Return the cross-entropy of the softmax over the target with a Gaussian around the true points (B, n, 2).

    blur: its standard deviation in cells; at 0 the true point's own cell is the target.
    """
    size = torch.tensor([grid[1], grid[0]], device=student.device)
    apart = (truth[:, :, None].to(student) - centres(*grid, student.device)) * size  # (B, n, M, 2) in cells
    squares = apart.square().sum(-1)
    if blur:
        wanted = (-squares / (2 * blur**2)).softmax(-1)
    else:
        wanted = F.one_hot(squares.argmin(-1), squares.shape[-1]).to(student)
    return _mean(-(wanted * (student / temperature).log_softmax(-1)).sum(-1), weights)


def point_mse(
    student: Tensor, grid: tuple[int, int], truth: Tensor, weights: Tensor, *, temperature: float = 0.01
) -> Tensor:
    """Return the weighted mean squared distance of the soft-argmax to the true points, in shares of the image."""
    found = (student / temperature).softmax(-1) @ centres(*grid, student.device)  # (B, n, 2)
    return _mean((found - truth.to(student)).square().sum(-1), weights)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1)
