"""No token mixing at all: the floor that a mixer has to beat (IdentityFormer, arXiv 2210.13452, section 3)."""

import torch
from torch import Tensor

from thesis_lib.attention.base import Cost, Mixer


class Identity(Mixer):
    """Return the tokens as they come; the block then adds the normalised tokens to their residual."""

    name = "identity"
    kind = "none"
    label = "Identity"
    needs_grid = False

    def mix(self, x: Tensor) -> Tensor:
        return x

    def attention_map(self, x: Tensor) -> Tensor:
        self.check_tokens(x)
        return torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], 1, -1, -1)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        return Cost()
