"""Mixture of heads: each token keeps the heads that a router picks for it (MoH, arXiv 2410.11842, section 3.2)."""

from collections.abc import Iterable
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

    dropped: routed heads removed for good, as by `drop_heads`; the router chooses among the rest. Where there are none,
    `options` has no such key, so that files written before it existed still fit.

    `balance_loss` holds the load-balance term of the last forward in training mode (None otherwise); its balanced value
    is the number of routed heads that are on, and the paper weighs it by 0.01 (`balance_loss(model)` averages layers).

    Executed and activated multiply-adds differ. Every head is computed for every token and then weighted, as in the
    published code, and `cost` counts that: MHA plus the router. `activated_macs` counts heads that are on, and no time
    follows from it. Time is saved where a head is off in the whole layer (`usage`) and dropped: its channels are gone.
    """

    name = "moh"
    kind = "sparse"
    label = "MoH"
    lora_targets = ("qkv", "router")
    defaults = {"active": None, "shared": None, "router": "learned", "dropped": ()}
    choices = {"router": ("learned", "norm")}

    @classmethod
    def check(cls, options, heads, grid):
        shared, active, dropped = options["shared"], options["active"], options["dropped"]
        if not isinstance(dropped, list | tuple) or len(set(dropped)) != len(dropped):
            raise ValueError(f"dropped={dropped!r} must be a list of distinct heads")
        left = heads - len(dropped)
        if left < 1:
            raise ValueError(f"dropped={dropped!r} leaves none of {heads} heads")
        if shared is None:
            most = left if active is None else integer("active", active, 1, left)
            shared = min(heads // 2, most - 1)
        shared = integer("shared", shared, 0, left - 1)
        if active is None:
            active = min(left, shared + -(-heads // 4))
        active = integer("active", active, shared + 1, left)
        dropped = sorted(integer("dropped", head, shared, heads - 1) for head in dropped)
        resolved = {"active": active, "shared": shared, "router": options["router"]}
        return {**resolved, "dropped": dropped} if dropped else resolved

    def build(self, attn: nn.Module) -> None:
        super().build(attn)
        self.shared = self.options["shared"]
        self.on = self.options["active"] - self.shared
        self.balance_loss: Tensor | None = None
        if self.options["router"] == "norm":
            self.lora_targets = ("qkv",)
        else:
            weight, rows = attn.qkv.weight, sum(router_rows(self.num_heads, self.shared))
            self.router = nn.utils.skip_init(
                nn.Linear, self.dim, rows, bias=False, device=weight.device, dtype=weight.dtype
            )
            nn.init.zeros_(self.router.weight)
        if dropped := self.options.pop("dropped", None):
            self.drop_heads(dropped)

    @property
    def heads_left(self) -> int:
        """Heads that are not dropped."""
        return self.num_heads - len(self.options.get("dropped", ()))

    def drop_heads(self, heads: Iterable[int]) -> None:
        """Remove routed heads in place: their rows of qkv and router and their columns of proj.

        heads: their numbers in the pretrained layer. Where the router never chose them the output stays what it was.
        Raises ValueError for shared heads, fewer left than are on, unmerged adapters, and a norm over all heads.
        """
        before = set(self.options.get("dropped", []))
        options = self.check({**self.options, "dropped": sorted(before | set(heads))}, self.num_heads, self.grid)
        if not isinstance(self.norm, nn.Identity):
            raise ValueError("heads cannot be dropped before a norm over all heads (scale_norm)")
        if not isinstance(self.qkv, nn.Linear):
            raise ValueError(f"qkv is a {type(self.qkv).__name__}: merge adapters into it before dropping heads")
        now = [head for head in range(self.num_heads) if head not in before]
        kept = torch.tensor([i for i, head in enumerate(now) if head not in options.get("dropped", [])])
        rows = torch.arange(self.qkv.out_features).view(3, len(now), -1)  # of Q, K and V of each head
        self.qkv, self.proj = take(self.qkv, rows[:, kept].flatten()), take(self.proj, rows[0, kept].flatten(), dim=1)
        if self.options["router"] == "learned":
            others = torch.arange(len(now) - self.shared, self.router.out_features)
            self.router = take(self.router, torch.cat([kept[self.shared :] - self.shared, others]))
        self.options = options

    @torch.no_grad()
    def usage(self, x: Tensor) -> Tensor:
        """Share of the tokens (B, N, D) for which each head left is on, (h,); heads that stay at 0 can be dropped."""
        self.check_tokens(x)
        return (self.gates(x, self.query_key_value(x)[0])[0] != 0).float().mean(dim=(0, 1))

    def activated_macs(self, tokens: int) -> int:
        """Multiply-adds of one image if heads that are off cost nothing: a reading aid, not what is executed.

        Keys and values are needed for all heads, other tokens using them, and queries too where their norms are ranked.
        """
        left = self.heads_left
        projected = 2 * left + (left if self.options["router"] == "norm" else self.options["active"])
        router = 0 if self.options["router"] == "norm" else sum(router_rows(left, self.shared))
        on = self.options["active"] * self.head_dim
        linear = projected * self.head_dim + on + router
        return tokens * self.dim * linear + 2 * tokens**2 * on

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
        rows = router_rows(self.heads_left, self.shared)
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
        shared, left = options["shared"], heads - len(options.get("dropped", ()))
        width = left * dim // heads  # channels of the heads left
        rows = sum(router_rows(left, shared))
        if options["router"] == "norm":
            extra = Cost(elementwise=tokens * (2 * (left - shared) * dim // heads + width))  # squares and sums, masking
        else:
            extra = Cost(
                macs=tokens * dim * rows,
                elementwise=tokens * (SOFTMAX * rows + (2 if shared else 1) * left + width),  # softmax, scale, weight
                params=dim * rows,
            )
        heads_left = Cost(
            macs=4 * tokens * dim * width + 2 * tokens**2 * width,
            elementwise=tokens * width + SOFTMAX * left * tokens**2,
            params=4 * dim * width + 3 * width + dim,
        )
        return heads_left + extra


def router_rows(heads: int, shared: int) -> list[int]:
    """Scores of the router for routed heads, shared against routed, shared heads; a softmax of one score needs none."""
    return [heads - shared, 2 if shared else 0, shared if shared > 1 else 0]


def top_mask(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest scores of the last axis, else 0; ties go to the lower index on every device."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores).scatter(-1, order[..., :k], 1.0)


def take(linear: nn.Linear, index: Tensor, dim: int = 0) -> nn.Linear:
    """Copy some output rows (dim 0) or input columns (dim 1) of a linear layer into one of its own."""
    weight = linear.weight.detach().index_select(dim, index.to(linear.weight.device))
    state, bias = {"weight": weight}, linear.bias
    if bias is not None:
        state["bias"] = bias.detach() if dim else bias.detach()[index]
    part = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    part.load_state_dict(state)
    return part.requires_grad_(linear.weight.requires_grad)


def balance_loss(model: nn.Module) -> Tensor | float:
    """Average the load-balance terms that a forward pass in training mode left in a model's layers; 0 without any."""
    terms = [m.balance_loss for m in model.modules() if isinstance(m, MoH) and m.balance_loss is not None]
    return sum(terms) / len(terms) if terms else 0.0
