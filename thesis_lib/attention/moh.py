"""Mixture of heads: each token keeps the heads that a router picks for it (MoH, arXiv 2410.11842, section 3.2)."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, integer
from thesis_lib.attention.mha import MHA


class MoH(MHA):
    """MHA whose heads are weighted per token: the first `shared` ones always on, of the others the best ones.

    active: heads on per token, shared ones included; default shared + a quarter of the heads, rounded up.
    shared: heads always on; default half of them, fewer where that leaves none of the active heads to the router (so
    1 + 1 of 3 heads, 3 + 2 of 6, 6 + 3 of 12).
    router: "learned" scales heads by softmax scores of a bias-free linear layer, normalised as in the published code so
    that the mean weight is 1. It starts at zero: all weights are 1, ties go to the lower head, and with every head
    active the layer is MHA bit for bit. "norm" has no parameters and no scaling: the heads with the longest query
    vectors are on (the router of MoH-LLaMA3), per token, so an image never depends on its batch.

    `balance_loss` holds the load-balance term of the last forward in training mode (None otherwise); its balanced value
    is the number of routed heads that are on, and the paper weighs it by 0.01. Every head is computed and then
    weighted, so the MACs are those of MHA plus the router.
    """

    name = "moh"
    kind = "sparse"
    label = "MoH"
    lora_targets = ("qkv", "router")
    defaults = {"active": None, "shared": None, "router": "learned"}
    choices = {"router": ("learned", "norm")}

    @classmethod
    def check(cls, options, heads, grid):
        shared, active = options["shared"], options["active"]
        if shared is None:
            most = heads if active is None else integer("active", active, 1, heads)
            shared = min(heads // 2, most - 1)
        shared = integer("shared", shared, 0, heads - 1)
        if active is None:
            active = min(heads, shared + -(-heads // 4))
        return {**options, "shared": shared, "active": integer("active", active, shared + 1, heads)}

    def build(self, attn: nn.Module) -> None:
        super().build(attn)
        self.shared = self.options["shared"]
        self.on = self.options["active"] - self.shared
        self.balance_loss: Tensor | None = None
        if self.options["router"] == "norm":
            self.lora_targets = ("qkv",)
            return
        weight = attn.qkv.weight
        rows = sum(router_rows(self.num_heads, self.shared))
        self.router = nn.utils.skip_init(
            nn.Linear, self.dim, rows, bias=False, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.router.weight)

    def train(self, mode: bool = True) -> Self:
        self.balance_loss = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance_loss": None}  # a tensor with a graph can be neither copied nor pickled

    def mix_heads(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x)
        gates, balance_loss = self.gates(x, q)  # (B, N, h)
        if self.training:
            self.balance_loss = balance_loss
        return self.attend(q, k, v) * gates.mT.unsqueeze(-1)

    def gates(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight of each head for each token, (B, N, h), scored in fp32; load-balance term of a learned router."""
        if self.options["router"] == "norm":
            lengths = q[:, self.shared :].float().square().sum(-1).mT  # (B, N, h - shared)
            mask = top_mask(lengths, self.on)
            return torch.cat([mask.new_ones(*mask.shape[:-1], self.shared), mask], dim=-1).to(q.dtype), None
        rows = router_rows(self.num_heads, self.shared)
        routed, balance, shared = self.router(x).float().split(rows, dim=-1)
        mask = top_mask(routed, self.on)
        # published as softmax, mask, renormalise: the same as a softmax over the chosen heads alone
        gates = routed.masked_fill(mask == 0, -torch.inf).softmax(-1) * self.on
        load = routed.softmax(-1).mean(dim=(0, 1)) * mask.mean(dim=(0, 1))
        balance_loss = load.sum() * routed.shape[-1]
        if self.shared:
            always = shared.softmax(-1) * self.shared if self.shared > 1 else torch.ones_like(gates[..., :1])
            always_share, routed_share = (2 * balance.softmax(-1)).unsqueeze(-2).unbind(-1)  # (B, N, 1) each
            gates = torch.cat([always_share * always, routed_share * gates], dim=-1)
        return gates.to(q.dtype), balance_loss

    def attention_map(self, x: Tensor) -> Tensor:
        """MHA's map of each head times the weight of that head for the token: rows sum to the weight."""
        self.check_tokens(x)
        q, k, _ = self.query_key_value(x)
        return self.weights(q, k) * self.gates(x, q)[0].mT.unsqueeze(-1)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        shared = options["shared"]
        routed, balance, weights = router_rows(heads, shared)
        if options["router"] == "norm":
            extra = Cost(elementwise=tokens * (2 * routed * dim // heads + dim))  # squares and sums, masking
        else:
            rows = routed + balance + weights
            extra = Cost(
                macs=tokens * dim * rows,
                elementwise=tokens * (SOFTMAX * rows + (2 if shared else 1) * heads + dim),  # softmax, scale, weight
                params=dim * rows,
            )
        return super().closed_form(tokens, dim, heads, grid, prefix_tokens, options) + extra


def router_rows(heads: int, shared: int) -> list[int]:
    """Scores of the router for routed heads, shared against routed, shared heads; a softmax of one score needs none."""
    return [heads - shared, 2 if shared else 0, shared if shared > 1 else 0]


def top_mask(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest scores of the last axis, else 0; ties go to the lower index on every device."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores).scatter(-1, order[..., :k], 1.0)
