"""Find a point of one image in another by its features, at the images' own resolution and in bounded memory.

Cosine similarity between bilinearly upsampled features needs no upsampled features: upsampling is linear, so a
similarity map is the upsampled map of inner products over the upsampled features' norm, and that norm follows from the
inner products of neighbouring cells. Cost and memory are those of one map a point, not of C channels.

Features are (C, h, w) of a whole image of size (W, H); points are (x, y) in its pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from thesis_lib.attention import suggest

READOUTS = ("argmax", "soft", "window", "patch")
BLOCK = 1 << 22  # similarities held at a time: 16 MB


def match(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    *,
    readout: str = "argmax",
    beta: float = 50.0,
    window: int = 125,
) -> Tensor:
    """Return where each of `points` (P, 2) of the source lies in the target: (P, 2) float32.

    readout: "argmax", the most similar pixel; "soft", the mean of all pixels weighted by softmax(beta * similarity);
    "window", the same over the window x window pixels around the argmax (nothing leaks in from outside it); "patch",
    the centre of the most similar cell, the source point taken as its cell (SD+DINO, Zhang et al. 2023).
    Raises ValueError for features of different widths, no or non-finite features, or an unknown read-out.
    """
    _check(source, target, points, readout)
    if readout == "patch":
        cells = _cells(points, source.shape[1:], source_size)
        queries = F.normalize(source.flatten(1).mT[cells], dim=1)  # (P, C)
        best = (queries @ F.normalize(target.flatten(1), dim=0)).argmax(1)  # (P,)
        return cell_centres(target.shape[1:], target_size).to(best.device)[best]
    queries = F.normalize(sample(source, points.round(), source_size), dim=1)  # (P, C)
    norm = upsampled_norm(target, target_size)  # (H, W)
    found = [torch.empty(0, 2, device=target.device)]
    for part in queries.split(max(1, BLOCK // norm.numel())):
        maps = _upsample(torch.einsum("pc,chw->phw", part, target), target_size) / norm  # (p, H, W)
        found.append(_read(maps, readout, beta, window))
    return torch.cat(found)


def similarity_map(
    source: Tensor, target: Tensor, point: Tensor, source_size: tuple[int, int], target_size: tuple[int, int]
) -> Tensor:
    """Return one point's (2,) cosine similarity with every pixel of the target: (H, W)."""
    query = F.normalize(sample(source, point[None].round(), source_size), dim=1)
    inner = torch.einsum("pc,chw->phw", query, target)
    return (_upsample(inner, target_size) / upsampled_norm(target, target_size))[0]


def sample(features: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Read upsampled features at points (P, 2) in pixels, those outside clamped to the border: (P, C)."""
    width, height = size
    extent = features.new_tensor([width, height])
    grid = (points.to(features).clamp(min=0).minimum(extent - 1) + 0.5) / extent * 2 - 1
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    return F.grid_sample(features[None], grid[None, None], **options)[0, :, 0].mT


def cell_centres(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the centres of a (h, w) grid's cells in an image of size (W, H), row by row: (h * w, 2)."""
    (h, w), (width, height) = grid, size
    y, x = torch.meshgrid((torch.arange(h) + 0.5) * height / h, (torch.arange(w) + 0.5) * width / w, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def upsampled_norm(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the norm of bilinearly upsampled features at every pixel, (H, W), without upsampling them.

    A pixel's feature is a sum of four cells, weighted by a product of weights along y and along x. Its square is made
    of the inner products of each cell with itself, with the next one along y, along x, and along both diagonals.
    """
    width, height = size
    f = F.pad(features[None], (0, 1, 0, 1), mode="replicate")[0]  # (C, h+1, w+1): the border's taps fall together
    own, down, right = (f * f).sum(0), (f[:, :-1] * f[:, 1:]).sum(0), (f[:, :, :-1] * f[:, :, 1:]).sum(0)
    both = (f[:, :-1, :-1] * f[:, 1:, 1:] + f[:, :-1, 1:] * f[:, 1:, :-1]).sum(0) / 2
    (y, yy), (x, xx) = (_taps(n, m, f) for n, m in zip(features.shape[1:], (height, width), strict=True))
    squares = (y @ own + yy @ down) @ x.mT + (y @ right + yy @ both) @ xx.mT
    return squares.clamp(min=torch.finfo(f.dtype).tiny).sqrt()


def _taps(cells: int, pixels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squares of each pixel's weights (pixels, cells + 1) and twice their products (pixels, cells).

    Weights of `F.interpolate`: half-pixel centres, clamped at the border; the last cell stands there twice.
    """
    at = ((torch.arange(pixels, device=like.device, dtype=like.dtype) + 0.5) * (cells / pixels) - 0.5).clamp(min=0)
    first = at.floor().long().clamp(max=cells - 1)[:, None]
    share = at[:, None] - first  # of the next cell
    weight = like.new_zeros(pixels, cells + 1).scatter_(1, first, 1 - share).scatter_(1, first + 1, share)
    return weight.square(), 2 * weight[:, :-1] * weight[:, 1:]


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[:, None], size[::-1], mode="bilinear", align_corners=False)[:, 0]


def _read(maps: Tensor, readout: str, beta: float, window: int) -> Tensor:
    height, width = maps.shape[1:]
    best = maps.flatten(1).argmax(1)
    row, column = best // width, best % width
    if readout == "argmax":
        return torch.stack([column, row], dim=1).float()
    y, x = (torch.arange(n, device=maps.device, dtype=maps.dtype) for n in (height, width))
    if readout == "window":
        near_y, near_x = ((axis - at[:, None]).abs() <= window // 2 for axis, at in ((y, row), (x, column)))
        maps = maps.masked_fill(~(near_y[:, :, None] & near_x[:, None, :]), -torch.inf)
    weight = (beta * maps).flatten(1).softmax(1).view_as(maps)  # (p, H, W)
    return torch.stack([weight.sum(1) @ x, weight.sum(2) @ y], dim=1).float()


def _cells(points: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    (h, w), (width, height) = grid, size
    column = (points[:, 0] * w / width).long().clamp(0, w - 1)
    row = (points[:, 1] * h / height).long().clamp(0, h - 1)
    return row * w + column


def _check(source: Tensor, target: Tensor, points: Tensor, readout: str) -> None:
    if readout not in READOUTS:
        raise ValueError(f"unknown read-out {readout!r}{suggest(readout, READOUTS)}; known: {', '.join(READOUTS)}")
    if source.ndim != 3 or target.ndim != 3 or source.shape[0] != target.shape[0]:
        raise ValueError(f"features must be (C, h, w) with one C, got {tuple(source.shape)} and {tuple(target.shape)}")
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be (P, 2), got {tuple(points.shape)}")
    if not (source.isfinite().all() and target.isfinite().all()):
        raise ValueError("the features are not finite: extract them again in float32")
