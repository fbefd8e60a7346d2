"""Linformer: keys and values are compressed over the tokens to a fixed number of rows (arXiv 2006.04768, section 4)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, Mixer, integer, linear_rows


class Linformer(Mixer):
    """softmax(Q (E K)^T / sqrt(d_h)) (F V) with learned E and F of shape (rank, N), the parameter `compression`.

    rank: rows of E and F, from prefix tokens + 1 to N; default the prefix tokens and a quarter of the patches. Every
    prefix token has a row of its own, the other rows start as means over the cells of a partition of the grid. So the
    layer starts as average-pooled `sra` where the rank is prefix + P / ratio^2, and as MHA at rank N (E = F = I).
    sharing: the paper's "headwise" (one E and one F for all heads), "key-value" (E is F as well), or "none".
    proportional: add the log of its cell's size to the logits of a key, through constant channels as `sra` does.

    E (x W + 1 b^T) = (E x) W + (E 1) b^T, so the tokens are compressed before W_k and W_v: k d^2 for N d^2 MACs. With
    E_h of its own each head would need its own E_h x, which pays at the smallest ranks only: "none" projects first.
    A query/key norm acts on the compressed keys. E and F belong to their grid: another image size needs another mixer,
    which `backbone.create(img_size=...)` builds from the pretrained layer.

    Departures from the published codes: a bias on q, k and v (the pretrained ones), W_k and W_v stay two layers under
    key-value sharing, the logits of keys carry the size of their cell, E and F start as means rather than at random
    (which loses what the pretrained layer does), and other token counts are refused rather than served by a slice.
    """

    name = "linformer"
    kind = "low-rank"
    label = "Linformer"
    lora_targets = ("q", "k", "v")
    defaults = {"rank": None, "sharing": "headwise", "proportional": True}
    choices = {"sharing": ("headwise", "key-value", "none"), "proportional": (True, False)}

    def build(self, attn: nn.Module) -> None:
        self.q, self.k, self.v = (linear_rows(attn.qkv, i * self.dim, (i + 1) * self.dim) for i in range(3))
        self.carry(attn, "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
        self.rank = self.options["rank"] = checked_rank(self.options["rank"], self.grid, self.prefix_tokens)
        cells, weight = cell_of_token(self.grid, self.prefix_tokens, self.rank), attn.qkv.weight
        sizes = cells.bincount().double()
        means = F.one_hot(cells, self.rank).T / sizes[:, None]  # (rank, N), rows sum to 1
        copies = {"headwise": (2,), "key-value": (1,), "none": (2, self.num_heads)}[self.options["sharing"]]
        self.compression = nn.Parameter(means.to(weight).repeat(*copies, 1, 1))  # [0] is E, [-1] is F
        self.bias_channels = bias_channels(self.head_dim, sizes, self.options)
        bias = sizes.log() * math.sqrt(self.head_dim) / max(self.bias_channels, 1)
        self.register_buffer("key_bias", bias[:, None].to(weight), persistent=False)  # (rank, 1)

    def compressed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E K and F V, (B, h, rank, d_h) each."""
        if self.options["sharing"] == "none":
            k, v = self.split_heads(self.k(x)), self.split_heads(self.v(x))
            k, v = (torch.einsum("hrn,bhnd->bhrd", e, y) for e, y in zip(self.compression, (k, v), strict=True))
            return k, v
        # E and F in one product; bmm, as the backward pass of a 2-D times a 3-D tensor takes 1.7 times as long
        rows = torch.bmm(self.compression.flatten(0, 1).expand(x.shape[0], -1, -1), x)
        rows = rows.unflatten(1, (-1, self.rank)).unbind(1)  # 1 or 2 of (B, rank, D)
        k = project(self.k, rows[0], self.compression[0])
        v = project(self.v, rows[-1], self.compression[-1])
        return self.split_heads(k), self.split_heads(v)

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, h, N, d_h), keys and values (B, h, rank, d_h), with the bias channels where there are any."""
        q = self.q_norm(self.split_heads(self.q(x)))
        k, v = self.compressed(x)
        k = self.k_norm(k)
        if not self.bias_channels:
            return q, k, v
        q, k = F.pad(q, (0, self.bias_channels), value=1.0), F.pad(k, (0, self.bias_channels))
        k[..., self.head_dim :] = self.key_bias
        return q, k, F.pad(v, (0, self.bias_channels))  # the flash kernels want one width for q, k and v

    def mix(self, x: Tensor) -> Tensor:
        return self.project_heads(self.attend(*self.query_key_value(x))[..., : self.head_dim])

    def attention_map(self, x: Tensor) -> Tensor:
        """softmax(Q (E K)^T / sqrt(d_h)) F, which multiplies the values; a trained F may make entries negative."""
        self.check_tokens(x)
        q, k, _ = self.query_key_value(x)
        return torch.softmax(q * self.head_dim**-0.5 @ k.mT, dim=-1) @ self.compression[-1]

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        rank = checked_rank(options["rank"], grid, prefix_tokens)
        sizes = cell_of_token(grid, prefix_tokens, rank).bincount()
        width = dim + heads * bias_channels(dim // heads, sizes, options)
        per_head, matrices = options["sharing"] == "none", 1 if options["sharing"] == "key-value" else 2
        projected = tokens if per_head else rank  # rows that W_k and W_v see
        # without heads of their own: row sums of E and F and what they do to the biases
        bias = 0 if per_head else matrices * rank * tokens + 4 * rank * dim
        return Cost(
            macs=2 * (tokens + projected) * dim**2 + matrices * rank * tokens * dim + 2 * tokens * rank * width,
            elementwise=tokens * dim + SOFTMAX * heads * tokens * rank + bias,
            params=4 * dim**2 + 4 * dim + matrices * (heads if per_head else 1) * rank * tokens,
        )


def checked_rank(rank: int | None, grid: tuple[int, int], prefix_tokens: int) -> int:
    """Fill in the default and validate; ValueError names the range of the ranks that work."""
    patches = grid[0] * grid[1]
    if rank is None:
        return prefix_tokens + -(-patches // 4)
    return integer("rank", rank, prefix_tokens + 1, prefix_tokens + patches)


def cell_of_token(grid: tuple[int, int], prefix_tokens: int, rank: int) -> Tensor:
    """Row of E that averages each token, (N,): prefix tokens first, then rectangles of about one size.

    The grid is cut into bands of rows and each band into columns, in the grid's own proportions: where cells of
    ratio x ratio patches fit, these are they.
    """
    (height, width), cells = grid, rank - prefix_tokens
    bands = round(math.sqrt(cells * height / width))
    bands = max(-(-cells // width), min(bands, height, cells))
    band = torch.arange(height, device="cpu") * bands // height  # of each row
    first = -(-torch.arange(bands + 1, device="cpu") * cells // bands)  # cell of each band; the higher bands have more
    column = torch.arange(width, device="cpu") * first.diff()[band, None] // width  # (H, W), counted in the band
    patches = prefix_tokens + first[band, None] + column
    return torch.cat([torch.arange(prefix_tokens, device="cpu"), patches.flatten()])


def bias_channels(head_dim: int, sizes: Tensor, options: dict) -> int:
    """Channels that carry the bias, up to the next multiple of 8; none where every key has the same bias."""
    return 8 - head_dim % 8 if options["proportional"] and sizes.min() < sizes.max() else 0


def project(linear: nn.Module, rows: Tensor, matrix: Tensor) -> Tensor:
    """matrix @ linear(x) from rows = matrix @ x: the bias times the row sums of the matrix."""
    y = linear(rows)
    if linear.bias is None:
        return y
    return y + ((matrix.sum(-1, keepdim=True) - 1) * linear.bias).to(y.dtype)
