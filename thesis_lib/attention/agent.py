"""Agent attention: pooled queries stand between queries and keys (arXiv 2312.08874, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, as_image, integer
from thesis_lib.attention.cells import cell_count, cell_means, tiling
from thesis_lib.attention.mha import MHA

BLOCK = 7  # side of the coarse map that a bias is enlarged from


class Agent(MHA):
    """softmax(Q A^T / sqrt(d_h) + B2) softmax(A K^T / sqrt(d_h) + B1) V + DWConv(V), agents A = mean queries of cells.

    Prefix tokens are queries and keys but no part of an agent, as in the published DeiT.
    agents: how many cells tile the grid; default half its rows and columns, at most 8 of each (49 on 14 x 14).
    bias: learn B1 and B2, zero at the start. They enter as attn_mask, which keeps the flash kernel away.
    conv: odd side of the depthwise convolution of the patches' values, zero at the start; the paper's is 3. 0: none.

    Departures from the published code: cells may differ in size by one where it pools over overlapping windows, and
    bias and convolution are off unless asked for, and start at zero: a swap changes one thing.
    """

    name = "agent"
    kind = "low-rank"
    label = "Agent"
    needs_grid = True
    defaults = {"agents": None, "bias": False, "conv": 0}
    choices = {"bias": (False, True)}

    @classmethod
    def check(cls, options, heads, grid):
        conv = integer("conv", options["conv"], 0)
        if conv and conv % 2 == 0:
            raise ValueError(f"conv={conv} must be 0 or odd; near: {conv - 1}, {conv + 1}")
        return {**options, "agents": cell_count("agents", options["agents"], grid), "conv": conv}

    def build(self, attn: nn.Module) -> None:
        super().build(attn)
        agents, conv = self.options["agents"], self.options["conv"]
        where = {"device": attn.qkv.weight.device, "dtype": attn.qkv.weight.dtype}
        self.cells = tiling(agents, self.grid)
        self.key_bias = self.query_bias = self.conv = None
        if self.options["bias"]:
            self.key_bias, self.query_bias = (
                AgentBias(self.num_heads, agents, self.grid, self.prefix_tokens, where) for _ in range(2)
            )
        if conv:
            shape = {"kernel_size": conv, "padding": conv // 2, "groups": self.dim}
            self.conv = nn.utils.skip_init(nn.Conv2d, self.dim, self.dim, **shape, **where)
            for parameter in self.conv.parameters():
                nn.init.zeros_(parameter)

    def agents(self, q: Tensor) -> Tensor:
        """Queries (B, h, N, d_h) -> agents (B, h, n, d_h)."""
        patches = q[:, :, self.prefix_tokens :].transpose(1, 2).flatten(2)
        return self.split_heads(cell_means(patches, self.grid, self.cells))

    def biases(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """B1 (h, n, N) of agents to keys and B2 (h, N, n) of queries to agents."""
        if self.key_bias is None:
            return None, None
        return self.key_bias(), self.query_bias().mT

    def attend_with(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return self.attend(q, k, v)
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype), dropout_p=dropout)

    def mix_heads(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x)
        agents = self.agents(q)
        key_bias, query_bias = self.biases()
        y = self.attend_with(q, agents, self.attend_with(agents, k, v, key_bias), query_bias)
        return y if self.conv is None else y + self.local(v)

    def local(self, v: Tensor) -> Tensor:
        """Convolve the values of the patches, (B, h, N, d_h); prefix tokens get nothing."""
        image = as_image(v[:, :, self.prefix_tokens :].transpose(1, 2).flatten(2), self.grid)  # (B, D, H, W)
        return F.pad(self.split_heads(self.conv(image).flatten(2).mT), (0, 0, self.prefix_tokens, 0))

    def attention_map(self, x: Tensor) -> Tensor:
        """The product of the two softmaxes, of which every row sums to 1; without the convolution."""
        self.check_tokens(x)
        q, k, _ = self.query_key_value(x)
        agents = self.agents(q)
        scale = self.head_dim**-0.5
        to_agents, to_keys = q * scale @ agents.mT, agents * scale @ k.mT
        if self.key_bias is not None:
            key_bias, query_bias = self.biases()
            to_agents, to_keys = to_agents + query_bias, to_keys + key_bias
        return to_agents.softmax(-1) @ to_keys.softmax(-1)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        agents, conv, patches = options["agents"], options["conv"], tokens - prefix_tokens
        entries = heads * agents * tokens  # of each of the two maps
        bias = options["bias"]
        biases = 2 * heads * agents * (BLOCK**2 + sum(grid) + prefix_tokens)
        return Cost(
            macs=4 * tokens * dim**2 + 4 * tokens * agents * dim + conv**2 * patches * dim,
            # means, scaling, softmaxes, the sum with the convolution; making a bias (interpolation is 7, sums 2)
            elementwise=(patches + tokens + agents) * dim
            + 2 * SOFTMAX * entries
            + bool(conv) * patches * dim
            + bias * 2 * entries * 10,
            params=4 * dim**2 + 4 * dim + bias * biases + bool(conv) * (conv**2 + 1) * dim,
        )


class AgentBias(nn.Module):
    """Bias (h, n, N) between agents and tokens: a coarse map enlarged to the grid, plus one a row and one a column.

    Prefix tokens have a bias of their own. Everything starts at zero (arXiv 2312.08874, section 3.2, "agent bias").
    """

    def __init__(self, heads: int, agents: int, grid: tuple[int, int], prefix_tokens: int, where: dict) -> None:
        super().__init__()
        self.grid = grid
        self.block = nn.Parameter(torch.zeros(heads, agents, BLOCK, BLOCK, **where))
        self.row = nn.Parameter(torch.zeros(heads, agents, grid[0], 1, **where))
        self.column = nn.Parameter(torch.zeros(heads, agents, 1, grid[1], **where))
        self.prefix = nn.Parameter(torch.zeros(heads, agents, prefix_tokens, **where))

    def forward(self) -> Tensor:
        patches = F.interpolate(self.block, self.grid, mode="bilinear") + self.row + self.column  # (h, n, H, W)
        return torch.cat([self.prefix, patches.flatten(2)], dim=-1)
