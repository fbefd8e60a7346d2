"""The skeleton that every token mixer fills in."""

import copy
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

KINDS = ("exact", "pooled", "low-rank", "kernel", "sparse", "none")
SOFTMAX = 5  # operations an element: maximum, subtraction, exponential, sum, division


@dataclass(frozen=True)
class Cost:
    """Cost of one mixer on one image.

    macs: multiply-adds of matrix products and convolutions (FLOPs = 2 MACs); biases ride along for free.
    elementwise: every other operation, one each for +, -, x, /, max, sqrt and exp, so 5 for an element of a softmax.
    params: weights and biases of the layer, for linear layers with biases and no q/k norm.
    """

    macs: int = 0
    elementwise: int = 0
    params: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.elementwise + other.elementwise, self.params + other.params)


def suggest(name: object, known: Iterable[str]) -> str:
    """Write ' (did you mean ...?)' for a misspelt name, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known))
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Check an integer option; ValueError names the range."""
    right = isinstance(value, Integral) and not isinstance(value, bool)  # numpy's integers, too
    if not right or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value!r} must be an integer {bounds}")
    return int(value)


def divisor_of_grid(name: str, value: object, grid: tuple[int, int]) -> int:
    """Check a cell size that must divide both sides of the grid; ValueError names the sizes that do."""
    side = math.gcd(*grid)
    possible = [size for size in range(1, side + 1) if side % size == 0]
    if isinstance(value, bool) or value not in possible:
        raise ValueError(f"{name}={value!r} does not divide the {grid[0]}x{grid[1]} grid; possible: {possible}")
    return int(value)


def as_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """View tokens (B, H*W, C) of a row-major grid as an image (B, C, H, W), channels last in memory.

    Its strides say so for a batch of one, too; those of `x.mT` do not, and pooling is then ten times slower on a CPU.
    """
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def pool_cells(x: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """Average tokens (B, H*W, C) of a row-major grid over ratio x ratio cells -> (B, H*W/ratio^2, C)."""
    return F.avg_pool2d(as_image(x, grid), ratio).flatten(2).mT  # on a CPU 10 x faster than .mean of two axes


def averaging_conv(channels: int, ratio: int, like: Tensor, bias: bool) -> nn.Conv2d:
    """Make a patch convolution that starts as the average over ratio x ratio cells, its weights channels-last."""
    conv = nn.utils.skip_init(
        nn.Conv2d, channels, channels, ratio, stride=ratio, bias=bias, device=like.device, dtype=like.dtype
    ).to(memory_format=torch.channels_last)
    with torch.no_grad():
        taps = torch.eye(channels, device=like.device, dtype=like.dtype) / ratio**2
        conv.weight.copy_(taps[:, :, None, None].expand_as(conv.weight))
        if bias:
            conv.bias.zero_()
    return conv


def convolve_cells(conv: nn.Conv2d, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Apply a patch convolution to tokens (B, H*W, C) of a row-major grid as one product -> (B, H*W/ratio^2, C)."""
    ratio = conv.stride[0]
    cells = x.unflatten(1, (grid[0] // ratio, ratio, grid[1] // ratio, ratio)).transpose(2, 3)
    cells = cells.flatten(3).flatten(1, 2)  # (B, H*W/ratio^2, ratio^2 C)
    return F.linear(cells, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)  # a view of channels-last weights


def linear_rows(linear: nn.Linear, start: int, stop: int) -> nn.Linear:
    """Copy some output rows of a linear layer into one of its own (skip_init leaves the random state alone)."""
    weight, bias = linear.weight, linear.bias
    part = nn.utils.skip_init(
        nn.Linear, linear.in_features, stop - start, bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        part.weight.copy_(weight[start:stop])
        if bias is not None:
            part.bias.copy_(bias[start:stop])
    return part.requires_grad_(weight.requires_grad)


class Mixer(nn.Module):
    """A drop-in for timm's `Attention`: tokens (B, N, D) -> (B, N, D), prefix tokens first, then a row-major grid.

    A subclass states its class attributes and fills in `build` (make the modules from a pretrained layer), `mix` (the
    forward pass), `closed_form` (the cost), `attention_map` where one exists, and `check` where options need more than
    `choices`. Linear layers that LoRA adapts are named in `lora_targets` and are always called as modules.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    label: ClassVar[str]
    lora_targets: tuple[str, ...] = ()
    needs_grid: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {}
    choices: ClassVar[Mapping[str, tuple]] = {}

    def __init__(self, attn: nn.Module, grid: tuple[int, int], prefix_tokens: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.grid = (int(grid[0]), int(grid[1]))
        self.prefix_tokens = prefix_tokens
        self.dim = attn.qkv.in_features
        self.num_heads = attn.num_heads
        self.head_dim = self.dim // self.num_heads
        self.options = self.resolve(options, self.num_heads, self.grid)
        self.build(attn)
        self.train(attn.training)

    @classmethod
    def from_attention(cls, /, attn: nn.Module, grid: tuple[int, int], prefix_tokens: int, **options: Any) -> Self:
        """Build the mixer from a pretrained layer, copying every weight that keeps a meaning.

        attn: timm's Attention or an `mha` mixer; q_norm, k_norm, the norm before the projection, dropout, dtype, device
        and training mode are carried over. ValueError for another layer, a gated one, a head width other than dim /
        heads, an unknown or impossible option, or a grid that the options cannot serve.
        """
        if not isinstance(attn, Attention) and getattr(attn, "name", None) != "mha":
            source = type(attn).__name__
            raise ValueError(f"{cls.name} is built from timm's Attention or from an mha mixer, not from {source}")
        if not isinstance(attn.qkv, nn.Linear):
            raise ValueError(f"attn.qkv is a {type(attn.qkv).__name__}: merge adapters into it before swapping")
        if getattr(attn, "gate", None) is not None:
            raise ValueError("gated attention cannot be swapped: the gate has no counterpart in the mixers")
        dim = attn.qkv.in_features
        if attn.qkv.out_features != 3 * dim or attn.proj.out_features != dim or dim % attn.num_heads:
            raise ValueError(
                f"the mixers need head width x heads = {dim} in and out; this layer has {attn.num_heads} heads, "
                f"{attn.qkv.out_features // 3} channels inside and {attn.proj.out_features} out"
            )
        return cls(attn, grid, prefix_tokens, options)

    @classmethod
    def resolve(cls, options: Mapping[str, Any], heads: int, grid: tuple[int, int] | None) -> dict[str, Any]:
        """Fill in the defaults and validate; ValueError names the known options and the possible values."""
        for option in options:
            if option not in cls.defaults:
                known = f"known: {', '.join(cls.defaults)}" if cls.defaults else "it has none"
                raise ValueError(f"{cls.name} has no option {option!r}{suggest(option, cls.defaults)}; {known}")
        resolved = {**cls.defaults, **options}
        for option, possible in cls.choices.items():
            if resolved[option] not in possible:
                names = ", ".join(map(repr, possible))
                raise ValueError(f"{cls.name}: {option}={resolved[option]!r} must be one of {names}")
        return cls.check(resolved, heads, grid)

    @classmethod
    def check(cls, options: dict[str, Any], heads: int, grid: tuple[int, int] | None) -> dict[str, Any]:
        """Validate the options that `choices` cannot and resolve those that depend on the geometry."""
        return options

    @classmethod
    def cost(
        cls,
        /,  # "cls" is also an option of pool
        tokens: int,
        dim: int,
        heads: int,
        *,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 1,
        **options: Any,
    ) -> Cost:
        """Cost of one image in closed form, equal to what is executed (and to FlopCounterMode / 2).

        tokens include the prefix tokens; the grid is square unless given. ValueError where they do not fit together.
        """
        if grid is None and cls.needs_grid:
            side = math.isqrt(max(tokens - prefix_tokens, 0))
            grid = (side, side)
        if grid is not None and grid[0] * grid[1] + prefix_tokens != tokens:
            raise ValueError(
                f"{tokens} tokens are not {prefix_tokens} prefix tokens and a {grid[0]}x{grid[1]} grid; say grid=(H, W)"
            )
        return cls.closed_form(tokens, dim, heads, grid, prefix_tokens, cls.resolve(options, heads, grid))

    @classmethod
    def closed_form(
        cls,
        tokens: int,
        dim: int,
        heads: int,
        grid: tuple[int, int] | None,
        prefix_tokens: int,
        options: dict[str, Any],
    ) -> Cost:
        """Cost for resolved options."""
        raise NotImplementedError

    def build(self, attn: nn.Module) -> None:
        """Make the submodules from the pretrained layer."""

    def mix(self, x: Tensor) -> Tensor:
        """Mix checked tokens (B, N, D) -> (B, N, D)."""
        raise NotImplementedError

    def attention_map(self, x: Tensor) -> Tensor | None:
        """Weights (B, h, N, N) with which output tokens (rows) average input tokens; None where no such map exists."""
        return None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError(f"{self.name} takes neither attn_mask nor is_causal")
        self.check_tokens(x)
        return self.mix(x)

    def check_tokens(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, N, D) with the grid this mixer was built for."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{self.name} expects tokens (batch, tokens, {self.dim}), got {tuple(x.shape)}")
        expected = self.prefix_tokens + self.grid[0] * self.grid[1]
        if self.needs_grid and x.shape[1] != expected:
            raise ValueError(
                f"{self.name} was built for {self.prefix_tokens} + {self.grid[0]}x{self.grid[1]} = {expected} tokens, "
                f"got {x.shape[1]}; build it again for that grid"
            )

    def carry(self, attn: nn.Module, *names: str) -> None:
        """Copy submodules of the pretrained layer under their own names."""
        for name in names:
            self.add_module(name, copy.deepcopy(getattr(attn, name)))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, h * d_h) -> (B, h, N, d_h)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project_heads(self, x: Tensor) -> Tensor:
        """Concatenate heads (B, h, N, d_h) and apply the carried norm, projection and dropout -> (B, N, D)."""
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention by the fused kernel, scaled by the true head width even where channels were added."""
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.head_dim**-0.5)

    def extra_repr(self) -> str:
        geometry = {"grid": self.grid, "prefix_tokens": self.prefix_tokens, "num_heads": self.num_heads}
        return ", ".join(f"{name}={value!r}" for name, value in {**geometry, **self.options}.items())
