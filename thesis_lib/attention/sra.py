"""Spatial-reduction attention: full-resolution queries, pooled keys and values (PVT, arXiv 2102.12122, section 3.3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib.attention.base import (
    SOFTMAX,
    Cost,
    Mixer,
    averaging_conv,
    convolve_cells,
    divisor_of_grid,
    linear_rows,
    pool_cells,
)


class SRA(Mixer):
    """Attention to one key per ratio x ratio cell of the grid; prefix tokens stay keys of their own.

    ratio: cell side, a divisor of both grid sides; 1 is MHA.
    pooling: "avg" averages the tokens of a cell before the key/value projection (the same as after it, both being
    linear, for 1/ratio^2 of its MACs); "conv" is PVT's strided convolution, here starting as that average and without
    PVT's layer norm, so that both start from the same function; "pvt" has the norm too, which makes it the published
    layer and moves its start away from the pretrained one (pooled tokens get unit variance).
    proportional: add log(ratio^2) to the logits of pooled keys, which makes the mixer exact on inputs that are constant
    in each cell (ToMe's proportional attention, arXiv 2210.09461). The bias enters as product of constant channels
    appended to q and k, not as attn_mask, so that the flash kernel still applies.
    """

    name = "sra"
    kind = "pooled"
    label = "SRA"
    lora_targets = ("q", "kv")
    defaults = {"ratio": 2, "pooling": "avg", "proportional": True}
    choices = {"pooling": ("avg", "conv", "pvt"), "proportional": (True, False)}

    @classmethod
    def check(cls, options, heads, grid):
        return {**options, "ratio": divisor_of_grid("ratio", options["ratio"], grid)}

    def build(self, attn: nn.Module) -> None:
        self.q = linear_rows(attn.qkv, 0, self.dim)
        self.kv = linear_rows(attn.qkv, self.dim, 3 * self.dim)
        self.carry(attn, "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
        self.ratio = self.options["ratio"]
        self.reduction = None
        self.reduction_norm = nn.Identity()
        weight = attn.qkv.weight
        if self.ratio > 1 and self.options["pooling"] != "avg":
            self.reduction = averaging_conv(self.dim, self.ratio, weight, bias=True)
            if self.options["pooling"] == "pvt":
                self.reduction_norm = nn.LayerNorm(self.dim, device=weight.device, dtype=weight.dtype)
        self.bias_channels = bias_channels(self.head_dim, self.ratio, self.prefix_tokens, self.options)

    def reduce(self, x: Tensor) -> Tensor:
        """Pool the patches: (B, N, D) -> (B, prefix + P / ratio^2, D)."""
        if self.ratio == 1:
            return x
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        if self.reduction is None:
            pooled = pool_cells(patches, self.grid, self.ratio)
        else:
            pooled = self.reduction_norm(convolve_cells(self.reduction, patches, self.grid))
        return torch.cat([prefix, pooled], dim=1)

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, h, N, d_h), keys and values (B, h, n, d_h), with the bias channels where there are any."""
        q = self.q_norm(self.split_heads(self.q(x)))
        k, v = self.kv(self.reduce(x)).chunk(2, dim=-1)
        k, v = self.k_norm(self.split_heads(k)), self.split_heads(v)
        if not self.bias_channels:
            return q, k, v
        value = 2 * math.log(self.ratio) * math.sqrt(self.head_dim) / self.bias_channels
        q = F.pad(q, (0, self.bias_channels), value=1.0)
        k = F.pad(k, (0, self.bias_channels))
        k[..., self.prefix_tokens :, self.head_dim :] = value
        return q, k, F.pad(v, (0, self.bias_channels))  # the flash kernels want one width for q, k and v

    def mix(self, x: Tensor) -> Tensor:
        return self.project_heads(self.attend(*self.query_key_value(x))[..., : self.head_dim])

    def attention_map(self, x: Tensor) -> Tensor:
        """MHA's map with the mass of a pooled key spread evenly over its cell (as the average or untrained conv do)."""
        self.check_tokens(x)
        q, k, _ = self.query_key_value(x)
        weights = torch.softmax(q * self.head_dim**-0.5 @ k.mT, dim=-1)  # (B, h, N, n)
        prefix, pooled = weights.split([self.prefix_tokens, weights.shape[-1] - self.prefix_tokens], dim=-1)
        cells = pooled.unflatten(-1, (self.grid[0] // self.ratio, -1)) / self.ratio**2
        patches = cells.repeat_interleave(self.ratio, dim=-1).repeat_interleave(self.ratio, dim=-2)
        return torch.cat([prefix, patches.flatten(-2)], dim=-1)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        ratio, patches = options["ratio"], tokens - prefix_tokens
        keys = prefix_tokens + patches // ratio**2
        conv = ratio > 1 and options["pooling"] != "avg"
        norm = ratio > 1 and options["pooling"] == "pvt"
        width = dim + heads * bias_channels(dim // heads, ratio, prefix_tokens, options)
        return Cost(
            macs=(2 * tokens + 2 * keys) * dim**2 + 2 * tokens * keys * width + conv * patches * dim**2,
            # scale, softmax, averages, layer norm
            elementwise=tokens * dim
            + SOFTMAX * heads * tokens * keys
            + (ratio > 1 and not conv) * patches * dim
            + norm * 7 * (keys - prefix_tokens) * dim,
            params=4 * dim**2 + 4 * dim + conv * (ratio**2 * dim**2 + dim) + norm * 2 * dim,
        )


def bias_channels(head_dim: int, ratio: int, prefix_tokens: int, options: dict) -> int:
    """Channels that carry the bias, up to the next multiple of 8; none where every key has the same bias."""
    if ratio == 1 or prefix_tokens == 0 or not options["proportional"]:
        return 0
    return 8 - head_dim % 8
