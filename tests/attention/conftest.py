from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn


def pretrained_layer(dim: int = 24, heads: int = 3, seed: int = 0, **options) -> Attention:
    """A layer as sharp as a trained one: on unit-variance tokens its attention is neither uniform nor one-hot."""
    generator = torch.Generator().manual_seed(seed)
    layer = Attention(dim, heads, **{"qkv_bias": True, "norm_layer": nn.LayerNorm, **options}).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            spread = dim**-0.5 if name.endswith("weight") else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + ("norm" in name))
    return layer


@pytest.fixture
def attention() -> Callable[..., Attention]:
    return pretrained_layer


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """Unit-variance tokens (batch, prefix + H*W, dim)."""

    def draw(
        grid: tuple[int, int] = (8, 8), prefix: int = 1, batch: int = 2, dim: int = 24, seed: int = 1
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, prefix + grid[0] * grid[1], dim, generator=generator)

    return draw
