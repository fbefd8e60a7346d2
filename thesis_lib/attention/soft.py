"""Softmax-free attention with a Gaussian kernel and Nystrom landmarks (SOFT, arXiv 2110.11945, section 3)."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib.attention.base import (
    Cost,
    Mixer,
    as_image,
    averaging_conv,
    divisor_of_grid,
    integer,
    linear_rows,
    pool_cells,
)
from thesis_lib.attention.cells import cell_count, cell_means, tiling


class SOFT(Mixer):
    """K1 (K2 + ridge I)^-1 K1^T V with K1 = k(Q, L), K2 = k(L, L), k(a, b) = exp(-|a - b|^2 / (2 sqrt(d_h))).

    Queries are keys; the key weights of the pretrained layer are not used, and rows are not normalised.
    ratio: landmarks L are the queries of ratio x ratio cells of the grid; 1 makes every token a landmark. Default: half
    the grid's rows and columns of cells, at most 8 of each, whether or not they divide it, so that the cost is linear
    in the tokens (the published 224 px models have 7 x 7 landmarks in each of these stages); 2 for "conv".
    landmarks: "avg" averages the cell, "conv" convolves it (heads share the kernel, which starts as the average).
    Prefix tokens are landmarks of their own: a token far from every landmark neither sends nor receives anything, and
    nothing holds the class token near a mean of patches. (The published models have no class token in these layers.)
    ridge: added to the diagonal of K2; 0 with ratio 1 is full Gaussian attention.
    iterations: Newton steps V <- 2V - V P V for the inverse of P, each image and head with its own start.

    Departures from the published code: no layer norm and GELU on the landmarks and no depthwise convolution on V (a
    swap changes one thing), the product taken from the right (m^2 d for N m^2 h MACs), and everything between the
    projections in fp32 (float64 stays), autocast or not: bf16 distances leave 0.4 to 2.7 on a diagonal of ones.
    """

    name = "soft"
    kind = "kernel"
    label = "SOFT"
    lora_targets = ("q", "v")
    defaults = {"ratio": None, "landmarks": "avg", "ridge": 0.01, "iterations": 20}
    choices = {"landmarks": ("avg", "conv")}

    @classmethod
    def check(cls, options, heads, grid):
        ridge = options["ridge"]
        if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge={ridge!r} must be a number that is not negative")
        ratio = 2 if options["ratio"] is None and options["landmarks"] == "conv" else options["ratio"]
        ratio = None if ratio is None else divisor_of_grid("ratio", ratio, grid)
        iterations = integer("iterations", options["iterations"], 1)
        return {**options, "ratio": ratio, "ridge": float(ridge), "iterations": iterations}

    def build(self, attn: nn.Module) -> None:
        self.q = linear_rows(attn.qkv, 0, self.dim)
        self.v = linear_rows(attn.qkv, 2 * self.dim, 3 * self.dim)
        self.carry(attn, "q_norm", "norm", "proj", "proj_drop")
        self.ratio = self.options["ratio"]
        self.cells = tiling(cell_count("landmarks", None, self.grid), self.grid) if self.ratio is None else None
        self.reduction = None
        if self.ratio != 1 and self.options["landmarks"] == "conv":
            self.reduction = averaging_conv(self.head_dim, self.ratio, attn.qkv.weight, bias=False)

    def landmarks(self, q: Tensor) -> Tensor:
        """Queries (B, h, N, d_h) -> landmarks (B, h, m, d_h)."""
        if self.ratio == 1:
            return q
        prefix, patches = q[:, :, : self.prefix_tokens], q[:, :, self.prefix_tokens :]
        if self.reduction is None:
            x = patches.transpose(1, 2).flatten(2)
            means = cell_means(x, self.grid, self.cells) if self.cells else pool_cells(x, self.grid, self.ratio)
            cells = self.split_heads(means)
        else:
            image = as_image(patches.flatten(0, 1), self.grid)  # (B h, d_h, H, W)
            cells = self.reduction(image).flatten(2).mT.unflatten(0, q.shape[:2])
        return torch.cat([prefix, cells], dim=2)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K1 (B, h, N, m) and (K2 + ridge I)^-1 (B, h, m, m) in fp32 or float64."""
        q = self.q_norm(self.split_heads(self.q(x)))
        landmarks = self.landmarks(q)
        with without_autocast(x):
            scale = self.head_dim**-0.25
            q, landmarks = precise(q) * scale, precise(landmarks) * scale
            k2 = gaussian(landmarks, landmarks)
            regular = k2 + self.options["ridge"] * torch.eye(k2.shape[-1], device=k2.device, dtype=k2.dtype)
            return gaussian(q, landmarks), newton_inverse(regular, self.options["iterations"])

    def mix(self, x: Tensor) -> Tensor:
        k1, inverse = self.kernels(x)
        v = self.split_heads(self.v(x))
        with without_autocast(x):
            y = k1 @ (inverse @ (k1.mT @ precise(v)))
        return self.project_heads(y.to(v.dtype))

    def attention_map(self, x: Tensor) -> Tensor:
        """The approximated kernel, negative entries dropped, rows divided by their sums (the mixer does neither).

        A token whose kernel reaches no landmark has a row of zeros.
        """
        self.check_tokens(x)
        k1, inverse = self.kernels(x)
        with without_autocast(x):
            kernel = (k1 @ inverse @ k1.mT).clamp(min=0)
        return (kernel / kernel.sum(-1, keepdim=True).clamp(min=torch.finfo(kernel.dtype).tiny)).to(x.dtype)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        ratio, patches, head_dim = options["ratio"], tokens - prefix_tokens, dim // heads
        m = prefix_tokens + (cell_count("landmarks", None, grid) if ratio is None else patches // ratio**2)
        conv = ratio != 1 and options["landmarks"] == "conv"
        inverse = options["iterations"] * heads * m**2
        entries = heads * (tokens * m + m**2)
        return Cost(
            macs=3 * tokens * dim**2
            + conv * patches * head_dim * dim
            + 3 * tokens * m * dim
            + 2 * m**2 * dim
            + 2 * m * inverse,
            # scaling, norms, averages; five operations a kernel entry (two additions, clamp, exponential, threshold);
            # start value (row sums and scaling) and steps of the inverse
            elementwise=3 * (tokens + m) * dim
            + (ratio != 1 and not conv) * patches * dim
            + 5 * entries
            + 2 * heads * m**2
            + 2 * inverse,
            params=3 * (dim**2 + dim) + (ratio**2 * head_dim**2 if conv else 0),
        )


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Suspend autocast on the device of x (meta tensors have none)."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def precise(x: Tensor) -> Tensor:
    """Lift half precision to fp32; leave fp32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2), (..., n, m).

    Rounding cannot lift an entry above 1. One below eps^2, lost beside the ones of the diagonal, is set to 0: products
    of such entries are denormal numbers, which made a CPU up to 7 times slower.
    """
    half = torch.mul(a, a).sum(-1, keepdim=True) / 2 + torch.mul(b, b).sum(-1, keepdim=True).mT / 2
    kernel = torch.exp((a @ b.mT - half).clamp(max=0))
    return F.threshold(kernel, torch.finfo(kernel.dtype).eps ** 2, 0.0)


def newton_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Invert symmetric positive definite matrices (..., m, m) by Newton's iteration, each from its own start.

    The start is P times 1.8 / (largest row sum)^2, below the bound 2 / (largest eigenvalue)^2. An eigenvalue l needs
    about 2 log2(l_max / l) steps; smaller ones stay damped. The gradient is that of an inverse, -V^T G V^T, at the
    cost of one step: it is what the last step gives when the others are left out of the graph.
    """
    flat = matrix.flatten(end_dim=-3)
    fixed = flat.detach()
    inverse = fixed * (1.8 / fixed.sum(-1).amax(-1).square())[:, None, None]
    for _ in range(iterations - 1):
        inverse = torch.baddbmm(inverse, inverse @ fixed, inverse, beta=2, alpha=-1)
    return torch.baddbmm(inverse, inverse @ flat, inverse, beta=2, alpha=-1).view_as(matrix)
