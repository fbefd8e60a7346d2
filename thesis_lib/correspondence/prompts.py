"""Correspondence by prompt optimisation (Hedlin et al., NeurIPS 2023): the slow reference.

For every source point, a prompt embedding is optimised until a U-Net's cross-attention, for its first token, peaks at
the point; the same embedding's attention in the target peaks at the match. Layers count the cross-attentions of the
U-Net's up-blocks from 0.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib.correspondence.diffusion import DiffusionFeatures
from thesis_lib.correspondence.features import read_image
from thesis_lib.datasets.pairs import Pair, Pairs

TOKEN = 0  # whose attention is steered


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    """Return the cross-attention modules of the up-blocks, in the order they run."""
    blocks = [a for up in unet.up_blocks for a in getattr(up, "attentions", None) or []]
    return [layer.attn2 for attention in blocks for layer in attention.transformer_blocks]


def attention_maps(
    unet: nn.Module, noisy: Tensor, step: int, prompt: Tensor, layers: Sequence[int], side: int
) -> Tensor:
    """Return the attention of TOKEN, averaged over heads and layers, at a common resolution: (B, side, side).

    noisy: latents (B, c, h, w); prompt: embedding (1, tokens, D), through which gradients flow.
    """
    found = []

    def hook(module: nn.Module, inputs: tuple, options: dict) -> None:
        hidden, context = inputs[0], options["encoder_hidden_states"]
        scores = module.get_attention_scores(
            module.head_to_batch_dim(module.to_q(hidden)), module.head_to_batch_dim(module.to_k(context))
        )  # (B * heads, cells, tokens)
        weights = scores[..., TOKEN].unflatten(0, (len(hidden), -1)).mean(1)  # (B, cells)
        h = round((weights.shape[1] * noisy.shape[2] / noisy.shape[3]) ** 0.5)
        grid = weights.unflatten(1, (h, -1))[:, None].float()
        found.append(F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)[:, 0])

    modules = cross_attentions(unet)
    hooks = [modules[layer].register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        t = torch.full((len(noisy),), step, device=noisy.device)
        unet(noisy, t, encoder_hidden_states=prompt.expand(len(noisy), -1, -1))
    finally:
        for handle in hooks:
            handle.remove()
    return torch.stack(found).mean(0)


class PromptMatcher:
    """Matches pairs by prompt optimisation, called as `evaluate.FeatureMatcher` is. Defaults are the authors' settings.

    model: a DiffusionFeatures, of which U-Net, VAE and noise are used. step: the eighth-last of a 50-step sampler.
    rounds: independent optimisations of `steps` steps whose maps are averaged; crops: crops of the target, each of the
    share `crop` of a side, likewise. sigma: of the peak, in pixels of the model's square.
    Everything is drawn from `seed`, so that a pair's result does not depend on the pairs before it.
    """

    def __init__(
        self,
        pairs: Pairs,
        model: DiffusionFeatures,
        *,
        layers: Sequence[int] = (5, 6, 7, 8),
        step: int = 141,
        steps: int = 129,
        lr: float = 2.3755632081200314e-3,
        sigma: float = 27.97853316316864,
        crop: float = 0.9316549294381423,
        rounds: int = 5,
        crops: int = 20,
        tokens: int = 77,
        seed: int = 0,
    ) -> None:
        known = len(cross_attentions(model.unet))
        if wrong := [layer for layer in layers if not 0 <= layer < known]:
            raise ValueError(f"layers {wrong} are not among the U-Net's {known} cross-attentions of up-blocks")
        self.pairs, self.model, self.layers, self.step = pairs, model, list(layers), step
        self.steps, self.lr, self.sigma, self.crop = steps, lr, sigma, crop
        self.rounds, self.crops, self.tokens, self.seed = rounds, crops, tokens, seed

    def __call__(self, pair: Pair) -> np.ndarray:
        source, target = (self._image(place) for place in (pair.source, pair.target))
        scale = self.model.size / self.pairs.sizes.astype(np.float32)  # (n, 2)
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for point in torch.from_numpy(pair.source_points * scale[pair.source]):
            total = torch.zeros(self.model.size, self.model.size)
            for _ in range(self.rounds):
                prompt = self.optimise(source, point, generator)
                total += self.attend(target, prompt, generator)
            best = int(total.argmax())
            found.append((best % self.model.size, best // self.model.size))
        return np.array(found, np.float32) / scale[pair.target]

    def optimise(self, image: Tensor, point: Tensor, generator: torch.Generator) -> Tensor:
        """Return the embedding (1, tokens, D) whose attention peaks at a point (2,) of an image (1, 3, S, S)."""
        width = self.model.unet.config.cross_attention_dim
        prompt = torch.randn((1, self.tokens, width), generator=generator).to(image).requires_grad_()
        optimizer = torch.optim.Adam([prompt], lr=self.lr)
        axis = torch.arange(self.model.size, device=image.device)
        squares = (axis[None, :] - float(point[0])) ** 2 + (axis[:, None] - float(point[1])) ** 2
        peak = torch.exp(-squares / (2 * self.sigma**2))[None]  # (1, S, S)
        for _ in range(self.steps):
            box = self._box(generator)
            found = self._maps(image, prompt, box)
            loss = F.mse_loss(found / found.amax().clamp(min=1e-12), self._cut(peak, box))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return prompt.detach()

    @torch.no_grad()
    def attend(self, image: Tensor, prompt: Tensor, generator: torch.Generator) -> Tensor:
        """Return an embedding's mean attention over random crops of an image: (S, S)."""
        total, seen = (torch.zeros(self.model.size, self.model.size) for _ in range(2))
        for _ in range(self.crops):
            left, top, side = self._box(generator)
            here = slice(top, top + side), slice(left, left + side)
            maps = self._maps(image, prompt, (left, top, side))
            total[here] += F.interpolate(maps[None], (side, side), mode="bilinear", align_corners=False)[0, 0].cpu()
            seen[here] += 1
        return total / seen.clamp(min=1)

    def _maps(self, image: Tensor, prompt: Tensor, box: tuple[int, int, int]) -> Tensor:
        with torch.no_grad():
            latents = self.model._latents(self._cut(image[0], box)[None])
            alpha = self.model.alphas[self.step].to(latents)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * self.model._noise(latents, 0)
        return attention_maps(self.model.unet, noisy, self.step, prompt, self.layers, self.model.size)

    def _box(self, generator: torch.Generator) -> tuple[int, int, int]:
        side = max(1, round(self.crop * self.model.size))
        left, top = torch.randint(self.model.size - side + 1, (2,), generator=generator).tolist()
        return left, top, side

    def _cut(self, maps: Tensor, box: tuple[int, int, int]) -> Tensor:
        """Crop maps (C, S, S) and bring the crop back to S."""
        left, top, side = box
        part = maps[None, :, top : top + side, left : left + side]
        return F.interpolate(part, (self.model.size,) * 2, mode="bilinear", align_corners=False)[0]

    def _image(self, place: int) -> Tensor:
        device = next(self.model.parameters()).device
        return read_image(self.pairs.images[place], self.model.size)[None].to(device).float() / 255
