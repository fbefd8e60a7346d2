"""Nystrom approximation of softmax attention by landmarks (Nystromformer, arXiv 2102.03902, section 3).

What differs from transformers' NystromformerSelfAttention and from the nystrom-attention package, and why:

* The iteration for the inverse starts from each matrix's own column sums. Both take the largest sum of the whole batch,
  so that an image's output depends on its neighbours (Nystromformer issues 3 and 6).
* Segments may differ in length by one. The package pads with zero tokens, which take part in its softmax where no mask
  is given; transformers needs a token count that the landmarks divide.
* All landmarks means all tokens, and then plain attention. In transformers it is the configured segment length, not the
  tokens at hand, that turns the approximation off.
* Prefix tokens are landmarks of their own; there they share a segment with patches.
* Products are taken from the right, K1 (Z (K3 V)), for m^2 d MACs where (K1 Z) (K3 V) takes N m^2 h. Both outer factors
  are then attentions, K3 V of landmarks to tokens and K1 (...) of tokens to landmarks, and run on the fused kernel.
* No convolution over the values unless asked for: a swap changes one thing.

Scaling q by d_h^-1/2, as the package does, or q and k by d_h^-1/4 each, as transformers does, is the same.
"""

import math

import torch
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, integer
from thesis_lib.attention.cells import cell_count, cell_means, tiling
from thesis_lib.attention.mha import MHA
from thesis_lib.attention.soft import precise, without_autocast


class Nystrom(MHA):
    """K1 Z K3 V with K1 = softmax(Q L_k^T), K3 = softmax(L_q K^T), Z about the inverse of K2 = softmax(L_q L_k^T).

    Landmarks L_q and L_k are the prefix tokens and means of queries and keys over cells of patches. On inputs that are
    constant in each cell, and with Z converged, the mixer is exact.
    landmarks: how many cells; default half the grid's rows and columns, at most 8 of each. All patches is MHA.
    layout: "grid" tiles the grid with cells as square as can be, "segment" cuts the row-major sequence of patches.
    iterations: steps for Z (section 3.2), each image and head with its own start, in fp32 (float64 stays), autocast or
    not. Six do not converge; they damp what the landmarks hardly resolve, and more of them can be worse.
    conv: odd length of a depthwise convolution of the values over the tokens, one kernel a head, zero at the start and
    added to the output; 0 leaves it out. The published length is 33 or 65.
    """

    name = "nystrom"
    kind = "low-rank"
    label = "Nyströmformer"
    needs_grid = True
    defaults = {"landmarks": None, "layout": "grid", "iterations": 6, "conv": 0}
    choices = {"layout": ("grid", "segment")}

    @classmethod
    def check(cls, options, heads, grid):
        cells = cell_count("landmarks", options["landmarks"], grid, tiled=options["layout"] == "grid")
        iterations, conv = integer("iterations", options["iterations"], 1), integer("conv", options["conv"], 0)
        if conv and conv % 2 == 0:
            raise ValueError(f"conv={conv} must be 0 or odd; near: {conv - 1}, {conv + 1}")
        return {**options, "landmarks": cells, "iterations": iterations, "conv": conv}

    def build(self, attn: nn.Module) -> None:
        super().build(attn)
        self.exact = self.options["landmarks"] == math.prod(self.grid)
        self.shape = self.grid if self.options["layout"] == "grid" else (1, math.prod(self.grid))
        self.cells = tiling(self.options["landmarks"], self.shape)
        self.conv = None
        if length := self.options["conv"]:
            weight, heads = attn.qkv.weight, self.num_heads
            where = {"groups": heads, "bias": False, "device": weight.device, "dtype": weight.dtype}
            self.conv = nn.utils.skip_init(nn.Conv2d, heads, heads, (length, 1), padding=(length // 2, 0), **where)
            nn.init.zeros_(self.conv.weight)

    def landmarks(self, x: Tensor) -> Tensor:
        """Queries or keys (B, h, N, d_h) -> landmarks (B, h, m, d_h)."""
        prefix, patches = x[:, :, : self.prefix_tokens], x[:, :, self.prefix_tokens :]
        means = cell_means(patches.transpose(1, 2).flatten(2), self.shape, self.cells)
        return torch.cat([prefix, self.split_heads(means)], dim=2)

    def inverse(self, q_landmarks: Tensor, k_landmarks: Tensor) -> Tensor:
        """Z (B, h, m, m) in fp32 or float64."""
        with without_autocast(q_landmarks):
            return iterative_inverse(
                self.weights(precise(q_landmarks), precise(k_landmarks)), self.options["iterations"]
            )

    def mix_heads(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x)
        if self.exact:
            y = self.attend(q, k, v)
        else:
            q_landmarks, k_landmarks = self.landmarks(q), self.landmarks(k)
            gathered = precise(self.attend(q_landmarks, k, v))  # (B, h, m, d_h)
            with without_autocast(x):
                values = self.inverse(q_landmarks, k_landmarks) @ gathered
            y = self.attend(q, k_landmarks, values.to(v.dtype))
        return y if self.conv is None else y + self.conv(v)

    def attention_map(self, x: Tensor) -> Tensor:
        """K1 Z K3: rows sum to 1 and entries are positive only as far as Z is an inverse; without the convolution."""
        self.check_tokens(x)
        q, k, _ = self.query_key_value(x)
        if self.exact:
            return self.weights(q, k)
        q_landmarks, k_landmarks = self.landmarks(q), self.landmarks(k)
        k1, k3 = precise(self.weights(q, k_landmarks)), precise(self.weights(q_landmarks, k))
        with without_autocast(x):
            return (k1 @ self.inverse(q_landmarks, k_landmarks) @ k3).to(x.dtype)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        conv, steps = options["conv"], options["iterations"]
        value_path = Cost(conv * tokens * dim, (conv > 0) * tokens * dim, conv * heads)
        if options["landmarks"] == tokens - prefix_tokens:
            return super().closed_form(tokens, dim, heads, grid, prefix_tokens, options) + value_path
        m = prefix_tokens + options["landmarks"]
        return value_path + Cost(
            macs=4 * tokens * dim**2 + 4 * tokens * m * dim + 2 * m**2 * dim + 4 * steps * m**3 * heads,
            # means, scalings, softmaxes; start (two sums, scaling) and steps (three scaled sums) of the inverse
            elementwise=2 * (tokens - prefix_tokens) * dim
            + (tokens + 2 * m) * dim
            + SOFTMAX * heads * (2 * tokens * m + m**2)
            + (3 + 7 * steps) * heads * m**2,
            params=4 * dim**2 + 4 * dim,
        )


def iterative_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Approach the Moore-Penrose inverse of matrices (..., m, m) with positive entries, each from its own start.

    Z0 = K^T / (largest column sum x largest row sum); Z <- Z (13 I - W (15 I - W (7 I - W))) / 4, W = K Z
    (arXiv 2102.03902, equation 11), with the additions inside the products.
    """
    flat = matrix.flatten(end_dim=-3)
    inverse = flat.mT / (flat.sum(-2).amax(-1) * flat.sum(-1).amax(-1))[:, None, None]
    for _ in range(iterations):
        product = flat @ inverse
        step = torch.baddbmm(product, product, product, beta=7, alpha=-1)
        step = torch.baddbmm(product, product, step, beta=15, alpha=-1)
        inverse = torch.baddbmm(inverse, inverse, step, beta=13 / 4, alpha=-1 / 4)
    return inverse.view_as(matrix)
