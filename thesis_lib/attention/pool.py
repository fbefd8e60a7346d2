"""Average pooling as token mixer (PoolFormer, arXiv 2111.11418, section 3.1): no parameters, no multiply-adds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from thesis_lib.attention.base import Cost, Mixer, as_image


class Pool(Mixer):
    """Mean of the kernel x kernel neighbours minus the token itself, since the block adds the token back.

    Neighbours outside the grid do not count, so a constant grid gives 0. Nothing of the pretrained layer is kept.
    cls: what prefix tokens, which have no neighbours, receive: "mean_difference" the mean of the patches minus
    themselves (PoolFormer's rule with the whole grid as neighbourhood), "mean" the mean alone, "none" nothing (for an
    embedding that averages patches). Patches never see prefix tokens; swapping all but the last blocks leaves those as
    attention, which joins the two (PoolFormer's hybrid).
    """

    name = "pool"
    kind = "pooled"
    label = "Pool"
    defaults = {"kernel": 3, "cls": "mean_difference"}
    choices = {"cls": ("mean_difference", "mean", "none")}

    @classmethod
    def check(cls, options, heads, grid):
        kernel, possible = options["kernel"], list(range(3, 2 * min(grid), 2))
        if not possible:
            raise ValueError(
                f"pool averages neighbours, of which a {grid[0]}x{grid[1]} grid has too few: take images of at least 2 "
                "patches a side"
            )
        if kernel not in possible:
            raise ValueError(f"kernel={kernel!r} does not fit a {grid[0]}x{grid[1]} grid; possible: {possible}")
        return {**options, "kernel": int(kernel)}

    def neighbour_mean(self, patches: Tensor) -> Tensor:
        """Mean of the valid neighbours of each patch, (B, P, C) -> (B, P, C)."""
        kernel = self.options["kernel"]
        image = as_image(patches, self.grid)  # (B, C, H, W)
        pooled = F.avg_pool2d(image, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
        return pooled.flatten(2).mT

    def mix(self, x: Tensor) -> Tensor:
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        delta = self.neighbour_mean(patches) - patches
        if not self.prefix_tokens:
            return delta
        mean = patches.mean(dim=1, keepdim=True).expand_as(prefix)
        received = {"mean_difference": mean - prefix, "mean": mean, "none": prefix * 0}[self.options["cls"]]
        return torch.cat([received, delta], dim=1)

    def attention_map(self, x: Tensor) -> Tensor:
        """The averaging matrix (B, 1, N, N), the same for every image; the output is its product with x, minus x."""
        self.check_tokens(x)
        prefix, patches = self.prefix_tokens, x.shape[1] - self.prefix_tokens
        matrix = x.new_zeros(x.shape[1], x.shape[1])
        matrix[prefix:, prefix:] = self.neighbour_mean(torch.eye(patches, device=x.device, dtype=x.dtype)[None])[0]
        if self.options["cls"] == "none":
            matrix[:prefix, :prefix] = torch.eye(prefix)
        else:
            matrix[:prefix, prefix:] = 1 / patches
        return matrix.expand(x.shape[0], 1, -1, -1)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        kernel, patches = options["kernel"], tokens - prefix_tokens
        missing = kernel // 2 * (kernel // 2 + 1)  # neighbours that the two borders of an axis cut off
        neighbours = (kernel * grid[0] - missing) * (kernel * grid[1] - missing)
        operations = neighbours + patches  # additions and the division of each mean, the subtraction
        if prefix_tokens and options["cls"] != "none":
            operations += patches + (prefix_tokens if options["cls"] == "mean_difference" else 0)
        return Cost(elementwise=operations * dim)
