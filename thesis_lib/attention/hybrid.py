"""Local, dilated and linear global attention side by side, after ACC-ViT (arXiv 2406.08859, section 3)."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, integer
from thesis_lib.attention.mha import MHA
from thesis_lib.attention.soft import precise, without_autocast

FEATURES = 5  # operations an element: scale, clamp, exponential, maximum, sum


class Hybrid(MHA):
    """Branches of windowed softmax attention, one for each dilation, and one of linear attention to all tokens.

    window: largest side of a window. The side is the largest divisor of the axis from window / 2 up to window, so that
    windows tile the grid and need no mask (7 at 14 x 14, 4 at 8 x 8); where there is none, windows as equal as possible
    reach over the grid, and the keys out there are masked with -inf.
    dilations: a window of dilation r holds every r-th token of an area r times as wide; all r^2 offsets are served.
    linear: whether there is a branch with features ELU + 1 (arXiv 2006.16236) of d_h^(1/4) q and d_h^(1/4) k, which
    gives its kernel the slope of softmax to first order.
    combine: "sum" puts every head through each branch and adds up the branches, weighted for each patch by softmax(W x)
    as in ACC-ViT; "split" shares out the heads, the first branches taking the remainder, and weighs the b branches by
    b softmax(W x), so that they cost as much as one. W starts at 0: a mean of the branches, or heads as they are. The
    mean starts nearer to the pretrained layer, the errors of the branches being different, hence the default.
    Prefix tokens attend to every token by exact softmax in all heads and are keys in every window.

    Departures from ACC-ViT: no relative position bias and no convolutions, so that one window over the whole grid is
    exactly MHA. Attention dropout leaves out the linear branch, which holds no weights to drop.
    """

    name = "hybrid"
    kind = "sparse"
    label = "Hybrid"
    lora_targets = ("qkv", "gate")
    needs_grid = True
    defaults = {"window": 7, "dilations": (1, 2), "linear": True, "combine": "sum"}
    choices = {"linear": (True, False), "combine": ("sum", "split")}

    @classmethod
    def check(cls, options, heads, grid):
        dilations, linear = options["dilations"], bool(options["linear"])
        if not isinstance(dilations, list | tuple) or len(set(dilations)) != len(dilations):
            raise ValueError(f"dilations={dilations!r} must be a list of distinct integers")
        dilations, widest = [integer("dilations", r, 1) for r in dilations], max(1, min(grid) // 2)
        if any(r > widest for r in dilations):
            raise ValueError(
                f"dilations={dilations}: on the {grid[0]}x{grid[1]} grid a dilation is at most {widest}; leave out the "
                f"wider ones: dilations={[r for r in dilations if r <= widest]}"
            )
        branches, most = len(dilations) + linear, heads if options["combine"] == "split" else None
        if branches < 1 or (most and branches > most):
            bounds = f"{heads} heads can be split over 1 to {heads}" if most else "there must be at least 1"
            raise ValueError(f"dilations={dilations!r} and linear={linear} are {branches} branches; {bounds}")
        window = integer("window", options["window"], 2)
        return {**options, "window": window, "dilations": dilations, "linear": linear}

    def build(self, attn: nn.Module) -> None:
        super().build(attn)
        self.windows = [Windows.fit(self.grid, r, self.options["window"]) for r in self.options["dilations"]]
        self.shares = head_shares(self.num_heads, self.options)
        self.split = self.options["combine"] == "split"
        self.gate = None
        if len(self.shares) == 1:
            self.lora_targets = ("qkv",)
            return
        weight = attn.qkv.weight
        self.gate = nn.utils.skip_init(
            nn.Linear, self.dim, len(self.shares), bias=False, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.gate.weight)

    def mix_heads(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x)
        prefix = self.prefix_tokens
        branches = self.by_branch(q[:, :, prefix:], k, v)
        outputs = [self.attend_windows(windows, *part) for windows, part in zip(self.windows, branches, strict=False)]
        if self.options["linear"]:
            outputs.append(linear_attention(*branches[-1]))
        y = self.combine(outputs, x)  # (B, h, P, d_h)
        return torch.cat([self.attend(q[:, :, :prefix], k, v), y], dim=2) if prefix else y

    def by_branch(self, *parts: Tensor) -> list[tuple[Tensor, ...]]:
        """Give each branch its heads of tensors (B, h, ...)."""
        if not self.split:
            return [parts] * len(self.shares)
        return list(zip(*(part.split(self.shares, dim=1) for part in parts), strict=True))

    def gates(self, x: Tensor) -> list[Tensor]:
        """Weight of each branch for each patch, (B, 1, P, 1) each, 1 in sum, or as many as there are if heads split."""
        weights = precise(self.gate(x[:, self.prefix_tokens :])).softmax(-1)  # (B, P, b)
        if self.split:
            weights = weights * len(self.shares)
        return list(weights.mT[..., None].split(1, dim=1))

    def combine(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        """Weigh the outputs of the branches (B, share, P, ...) and put them together, (B, h, P, ...)."""
        if self.gate is None:
            return outputs[0]
        gates = [gate.to(outputs[0].dtype) for gate in self.gates(x)]
        if self.split:
            return torch.cat([y * gate for y, gate in zip(outputs, gates, strict=True)], dim=1)
        total = outputs[0] * gates[0]
        for y, gate in zip(outputs[1:], gates[1:], strict=True):
            total = torch.addcmul(total, y, gate)
        return total

    def attend_windows(self, windows: "Windows", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention in each window, (B, h, P, d_h); windows are more heads to the kernel."""
        heads, prefix = q.shape[1], self.prefix_tokens

        def keys(part: Tensor) -> Tensor:
            inside = windows.split(part[:, :, prefix:])
            before = part[:, :, None, :prefix].expand(-1, -1, inside.shape[2], -1, -1)
            return torch.cat([before, inside], dim=3).flatten(1, 2)

        mask = windows.mask(prefix, q.device).repeat(1, heads, 1, 1) if windows.padded else None
        dropout = self.attn_drop.p if self.training else 0.0
        q = windows.split(q).flatten(1, 2)  # (B, h * windows, side * side, d_h)
        y = F.scaled_dot_product_attention(
            q, keys(k), keys(v), attn_mask=mask, dropout_p=dropout, scale=self.head_dim**-0.5
        )
        return windows.merge(y.unflatten(1, (heads, -1)))

    def attention_map(self, x: Tensor) -> Tensor:
        """Weights of each head, its branches added up as in the output; if heads split, before the branch's weight."""
        self.check_tokens(x)
        prefix = self.prefix_tokens
        q, k, _ = self.query_key_value(x)
        branches, maps = self.by_branch(q[:, :, prefix:], k), []
        for windows, (q_part, k_part) in zip(self.windows, branches, strict=False):
            number = windows.numbers(x.device)
            unseen = F.pad(number[:, None] != number, (prefix, 0))
            logits = q_part * self.head_dim**-0.5 @ k_part.mT
            maps.append(logits.masked_fill(unseen, -torch.inf).softmax(-1))
        if self.options["linear"]:
            maps.append(linear_attention(*branches[-1], torch.eye(x.shape[1], device=x.device, dtype=x.dtype)))
        patches = torch.cat(maps, dim=1) if self.split else self.combine(maps, x)
        return torch.cat([self.weights(q[:, :, :prefix], k), patches], dim=2)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        shares, head_dim, patches = head_shares(heads, options), dim // heads, tokens - prefix_tokens
        prefix_rows = prefix_tokens * tokens
        cost = Cost(
            macs=4 * tokens * dim**2 + 2 * prefix_rows * dim,
            elementwise=prefix_tokens * dim + SOFTMAX * heads * prefix_rows,  # scale, softmax
            params=4 * dim**2 + 4 * dim,
        )
        for r, share in zip(options["dilations"], shares, strict=False):
            windows = Windows.fit(grid, r, options["window"])
            rows = windows.number * windows.side[0] * windows.side[1]
            entries = rows * (prefix_tokens + windows.side[0] * windows.side[1])
            softmax = rows * head_dim + (SOFTMAX + windows.padded) * entries  # scale, mask, softmax
            cost += Cost(2 * entries * share * head_dim, share * softmax)
        if options["linear"]:
            width = shares[-1] * head_dim
            operations = FEATURES * (tokens + patches) + tokens + patches  # sum over the keys, division
            cost += Cost((tokens + patches) * head_dim * width + patches * width, operations * width)
        if (b := len(shares)) > 1:
            weighing = b + dim if options["combine"] == "split" else 2 * b * dim
            cost += Cost(patches * dim * b, patches * (SOFTMAX * b + weighing), dim * b)
        return cost


@dataclass(frozen=True)
class Windows:
    """A partition of a grid: on each axis `dilation` interleaved phases, each cut into `count` windows of `side`."""

    grid: tuple[int, int]
    dilation: int
    count: tuple[int, int]
    side: tuple[int, int]

    @classmethod
    def fit(cls, grid: tuple[int, int], dilation: int, window: int) -> Self:
        """Choose sides of at most `window` that tile the phases, or else pad them least."""
        phases = [-(-length // dilation) for length in grid]
        side = tuple(window_side(length, window) for length in phases)
        return cls(grid, dilation, tuple(-(-length // s) for length, s in zip(phases, side, strict=True)), side)

    @property
    def number(self) -> int:
        """How many windows there are."""
        return self.dilation**2 * self.count[0] * self.count[1]

    @property
    def missing(self) -> tuple[int, int]:
        """Rows and columns that windows reach over the grid."""
        return tuple(
            self.dilation * count * side - length
            for count, side, length in zip(self.count, self.side, self.grid, strict=True)
        )

    @property
    def padded(self) -> bool:
        """Whether some window is not full."""
        return any(self.missing)

    def split(self, x: Tensor) -> Tensor:
        """(B, h, P, C) -> (B, h, windows, side * side, C), zeros where a window reaches over the grid."""
        image = x.unflatten(2, self.grid)
        if self.padded:
            rows, columns = self.missing
            image = F.pad(image, (0, 0, 0, columns, 0, rows))
        r, (n, m), (s, t) = self.dilation, self.count, self.side
        cells = image.unflatten(3, (m, t, r)).unflatten(2, (n, s, r))  # (B, h, n, s, r, m, t, r, C)
        return cells.permute(0, 1, 2, 4, 5, 7, 3, 6, 8).flatten(6, 7).flatten(2, 5)

    def merge(self, x: Tensor) -> Tensor:
        """Undo `split`: (B, h, windows, side * side, C) -> (B, h, P, C)."""
        r, (n, m) = self.dilation, self.count
        cells = x.unflatten(3, self.side).unflatten(2, (n, r, m, r))  # (B, h, n, r, m, r, s, t, C)
        image = cells.permute(0, 1, 2, 6, 3, 4, 7, 5, 8).flatten(5, 7).flatten(2, 4)
        return image[:, :, : self.grid[0], : self.grid[1]].flatten(2, 3)

    def mask(self, prefix: int, device: torch.device) -> Tensor:
        """True at the keys that are tokens, (1, windows, 1, prefix + side * side); a void window keeps all its keys."""
        inside = torch.ones(1, 1, self.grid[0] * self.grid[1], 1, device=device)
        valid = F.pad(self.split(inside), (0, 0, prefix, 0), value=1.0)[:, 0].mT > 0
        return valid | ~valid.any(-1, keepdim=True)

    def numbers(self, device: torch.device) -> Tensor:
        """Number of the window that each token is in, (P,)."""
        rows, columns = (
            torch.arange(length, device=device) // self.dilation // side * self.dilation
            + torch.arange(length, device=device) % self.dilation
            for length, side in zip(self.grid, self.side, strict=True)
        )
        return (rows[:, None] * (self.dilation * self.count[1]) + columns).flatten()


def window_side(length: int, most: int) -> int:
    """Return the side of windows along an axis: its largest divisor in [most / 2, most], else the most equal cut."""
    if length <= most:
        return length
    exact = [side for side in range(-(-most // 2), most + 1) if length % side == 0]
    return exact[-1] if exact else -(-length // -(-length // most))


def head_shares(heads: int, options: dict) -> list[int]:
    """Heads of each branch, windows first."""
    branches = len(options["dilations"]) + options["linear"]
    if options["combine"] == "sum":
        return [heads] * branches
    return [heads // branches + (i < heads % branches) for i in range(branches)]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of phi(q) phi(k)^T, divided by their sums, times v: (B, h, n, C), computed in fp32, autocast or not.

    K^T V comes before Q: N d_h^2 multiply-adds a head where Q K^T before V takes N^2 d_h.
    """
    with without_autocast(q):
        rows, columns = features(q), features(k)
        y = rows @ (columns.mT @ precise(v)) / (rows @ columns.sum(dim=-2, keepdim=True).mT)
    return y.to(v.dtype)


def features(x: Tensor) -> Tensor:
    """phi(x) = ELU(d_h^(1/4) x) + 1, held above e^-30 so that no row of zeros is divided by its sum."""
    x = precise(x) * x.shape[-1] ** 0.25
    return x.clamp(-30, 0).exp() + F.relu(x)
