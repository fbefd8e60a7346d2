"""Multi-head self-attention (Vaswani et al. 2017, section 3.2), the baseline that every other mixer is measured by."""

import torch
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, Mixer


class MHA(Mixer):
    """softmax(Q K^T / sqrt(d_h)) V per head, with timm's parameter names, so that its checkpoints load as they are.

    implementation: "fused" runs PyTorch's scaled_dot_product_attention, "naive" writes the N x N map to memory
    (the same MACs; what fusion saves is traffic).
    """

    name = "mha"
    kind = "exact"
    label = "MHA"
    lora_targets = ("qkv",)
    needs_grid = False
    defaults = {"implementation": "fused"}
    choices = {"implementation": ("fused", "naive")}

    def build(self, attn: nn.Module) -> None:
        self.carry(attn, "qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens to normalised queries, normalised keys and values, each (B, h, N, d_h)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, h, d_h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def mix_heads(self, x: Tensor) -> Tensor:
        """Attention output of every head, (B, h, N, d_h)."""
        q, k, v = self.query_key_value(x)
        if self.options.get("implementation") == "naive":
            return self.attn_drop(self.weights(q, k)) @ v
        return self.attend(q, k, v)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d_h)), (B, h, N, N)."""
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
