"""Multi-head self-attention (Vaswani et al. 2017, section 3.2), the baseline that every other mixer is measured by."""

import torch
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, Mixer, linear_rows


class MHA(Mixer):
    """softmax(Q K^T / sqrt(d_h)) V per head, with timm's parameter names, so that its checkpoints load as they are.

    implementation: "fused" runs PyTorch's scaled_dot_product_attention; the others are controls of the same MACs and
    parameters. "naive" writes the N x N map to memory (what fusion saves is traffic). "separate" also projects Q, K and
    V by three linear layers, "per-head" by three for each head, one head after the other: 3 h launches for one. Their
    layers hold rows of the merged one and are named qkv.0, qkv.1, ... in its order (Q, K, V, each by head).
    """

    name = "mha"
    kind = "exact"
    label = "MHA"
    lora_targets = ("qkv",)
    needs_grid = False
    defaults = {"implementation": "fused"}
    choices = {"implementation": ("fused", "naive", "separate", "per-head")}

    def build(self, attn: nn.Module) -> None:
        self.implementation = self.options.get("implementation", "fused")  # subclasses have no such option
        self.carry(attn, "qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
        parts = {"separate": 3, "per-head": 3 * self.num_heads}.get(self.implementation)
        if parts:
            rows = 3 * self.dim // parts
            self.qkv = nn.ModuleList(linear_rows(attn.qkv, i * rows, (i + 1) * rows) for i in range(parts))
            self.lora_targets = tuple(f"qkv.{i}" for i in range(parts))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens to normalised queries, normalised keys and values, each (B, h, N, d_h)."""
        if self.implementation == "separate":
            q, k, v = (self.split_heads(layer(x)) for layer in self.qkv)
        elif self.implementation == "per-head":
            q, k, v = torch.stack([layer(x) for layer in self.qkv], dim=1).chunk(3, dim=1)
        else:
            qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))  # (B, N, 3, h, d_h)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def stacked(self, x: Tensor) -> Tensor:
        """Project tokens to what `query_key_value` gives, (3, B, h, N, d_h) in one piece of memory."""
        if isinstance(self.qkv, nn.Linear) and isinstance(self.q_norm, nn.Identity):
            qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
            return qkv.permute(2, 0, 3, 1, 4).contiguous()  # no unbinding, whose backward would copy once more
        return torch.stack(self.query_key_value(x))

    def mix_heads(self, x: Tensor) -> Tensor:
        """Attention output of every head, (B, h, N, d_h)."""
        if self.implementation == "per-head":
            layers, h = list(self.qkv), self.num_heads
            heads = zip(layers[:h], layers[h : 2 * h], layers[2 * h :], strict=True)
            return torch.stack(
                [self.attend_naively(self.q_norm(q(x)), self.k_norm(k(x)), v(x)) for q, k, v in heads], dim=1
            )
        attend = self.attend if self.implementation == "fused" else self.attend_naively
        return attend(*self.query_key_value(x))

    def attend_naively(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention with its map in memory, (..., N, d_h)."""
        return self.attn_drop(self.weights(q, k)) @ v

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d_h)), (..., N, N)."""
        return torch.softmax(q * self.head_dim**-0.5 @ k.mT, dim=-1)

    def mix(self, x: Tensor) -> Tensor:
        return self.project_heads(self.mix_heads(x))

    def attention_map(self, x: Tensor) -> Tensor:
        self.check_tokens(x)
        q, k, _ = self.query_key_value(x)
        return self.weights(q, k)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        return Cost(
            macs=4 * tokens * dim**2 + 2 * tokens**2 * dim,
            elementwise=tokens * dim + SOFTMAX * heads * tokens**2,  # scale, softmax
            params=4 * dim**2 + 4 * dim,
        )
