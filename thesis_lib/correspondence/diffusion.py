"""Features of a diffusion model's U-Net: DIFT and its relatives, through diffusers (extra `diffusion`).

A layer is counted as DistillDIFT counts: 0 is the middle block; then, up-block by up-block, each residual layer (after
its attention, where it has one) and the block's upsampler count on from 1. For Stable Diffusion 1 and 2 the output of
up-block 1, DIFT's choice, is layer 8. Keys are "layer@step", and "layer@mean" where steps are averaged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thesis_lib.checkpoint import digest
from thesis_lib.datasets.missing import choose
from thesis_lib.perceptual import DTYPES

PROMPT = "a photo of a {category}"
NOISES = ("add", "invert")


class _Enough(Exception):
    """Ends a U-Net's pass once the last layer asked for was seen."""


def unet_layers(unet: nn.Module) -> list[nn.Module]:
    """Return the modules whose outputs are the layers 0, 1, ... of a UNet2DConditionModel."""
    layers = [unet.mid_block]
    for block in unet.up_blocks:
        attentions = list(getattr(block, "attentions", None) or [])
        layers += attentions or list(block.resnets)
        layers += list(block.upsamplers or [])
    return layers


class DiffusionFeatures(nn.Module):
    """Activations of a U-Net that is asked to denoise an image at chosen time steps; an extractor (see features.py).

    encode(prompts): the keyword arguments that the U-Net takes for these prompts, tensors with a row a prompt.
    ensemble: noises whose activations are averaged (DIFT takes 8). average: also average over the steps.
    noise: "add" noise of each step (DIFT), or "invert" the sampler (DDIM) through `inversion_steps` equal steps and
    read the nearest ones (Hyperfeatures). Every image meets the same noises, so none depends on its batch.
    Raises ValueError for layers or steps that there are not.
    """

    reads_categories = True

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        encode: Callable[[Sequence[str]], dict[str, Any]],
        *,
        layers: Sequence[int] = (8,),
        steps: Sequence[int] = (261,),
        ensemble: int = 1,
        average: bool = False,
        noise: str = "add",
        inversion_steps: int = 50,
        prompt: str = PROMPT,
        size: int = 768,
        seed: int = 0,
        name: str = "",
    ) -> None:
        super().__init__()
        known = unet_layers(unet)
        if wrong := [layer for layer in layers if not 0 <= layer < len(known)]:
            raise ValueError(f"layers {wrong} are not among the U-Net's 0 to {len(known) - 1}")
        trained = scheduler.config.num_train_timesteps
        if wrong := [step for step in steps if not 0 <= step < trained]:
            raise ValueError(f"time steps {wrong} are not among the sampler's 0 to {trained - 1}")
        self.unet, self.vae, self.scheduler, self.encode = unet, vae, scheduler, encode
        self.layers, self.steps = sorted(set(layers)), sorted(set(steps))
        self.ensemble, self.average, self.inversion_steps = ensemble, average, inversion_steps
        self.noise, self.prompt = choose(noise, NOISES, "noise"), prompt
        self.size, self.seed, self.name = size, seed, name
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone(), persistent=False)
        self.eval()

    @property
    def keys(self) -> list[str]:
        steps = [*self.steps, *(["mean"] if self.average else [])]
        return [f"{layer}@{step}" for layer in self.layers for step in steps]

    def describe(self) -> dict[str, Any]:
        weights = digest(
            [*self.unet.state_dict().items(), *((f"vae.{k}", v) for k, v in self.vae.state_dict().items())]
        )
        names = ("name", "layers", "steps", "ensemble", "average", "noise", "inversion_steps", "prompt", "size", "seed")
        return {"kind": "diffusion", "weights": weights} | {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor, categories: Sequence[str] | None = None) -> dict[str, Tensor]:
        prompts = [self.prompt.format(category=c) for c in categories or ["object"] * len(x)]
        condition = self.encode(prompts)
        latents = self._latents(x)
        run = self._added if self.noise == "add" else self._inverted
        maps = run(latents, condition)
        if self.average:
            for layer in self.layers:
                maps[f"{layer}@mean"] = torch.stack([maps[f"{layer}@{step}"] for step in self.steps]).mean(0)
        return {key: maps[key] for key in self.keys}

    def _latents(self, x: Tensor) -> Tensor:
        posterior = self.vae.encode((2 * x - 1).to(self.vae.dtype)).latent_dist
        draw = posterior.mean + posterior.std * self._noise(posterior.mean, -1)
        return draw * self.vae.config.scaling_factor

    def _noise(self, like: Tensor, number: int) -> Tensor:
        """Draw a noise for every image the same: (1, C, h, w)."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 1 + number)
        return torch.randn((1, *like.shape[1:]), generator=generator).to(like)

    def _added(self, latents: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
        maps = {}
        for step in self.steps:
            found = []
            for number in range(self.ensemble):
                alpha = self.alphas[step].to(latents)
                noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * self._noise(latents, number)
                found.append(self._activations(noisy, step, condition)[0])
            maps |= {f"{n}@{step}": torch.stack([one[n] for one in found]).mean(0) for n in self.layers}
        return maps

    def _inverted(self, latents: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
        """Run DDIM (Song et al. 2021) backwards from the image, reading the activations on the way."""
        ratio = len(self.alphas) // self.inversion_steps
        times = [i * ratio for i in range(self.inversion_steps)]
        nearest = {min(times, key=lambda t, step=step: abs(t - step)): step for step in reversed(self.steps)}
        if len(nearest) < len(self.steps):
            raise ValueError(f"{self.inversion_steps} inversion steps are too few to tell the steps {self.steps} apart")
        maps, z = {}, latents
        for t, following in zip(times, [*times[1:], None], strict=True):
            seen, noise = self._activations(z, t, condition, whole=following is not None)
            if t in nearest:
                maps |= {f"{n}@{nearest[t]}": seen[n] for n in self.layers}
            if following is None or len(maps) == len(self.layers) * len(self.steps):
                return maps
            now, then = (self.alphas[i].to(z) for i in (t, following))
            if self.scheduler.config.prediction_type == "v_prediction":
                noise = now.sqrt() * noise + (1 - now).sqrt() * z
            clean = (z - (1 - now).sqrt() * noise) / now.sqrt()
            z = then.sqrt() * clean + (1 - then).sqrt() * noise
        return maps

    def _activations(
        self, noisy: Tensor, step: int, condition: dict[str, Any], *, whole: bool = False
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Return the layers' outputs and, if the pass is to be whole, the U-Net's prediction."""
        seen: dict[int, Tensor] = {}
        modules, last = unet_layers(self.unet), self.layers[-1]

        def keep(number: int) -> Callable:
            def hook(_module: nn.Module, _inputs: tuple, output: Any) -> None:
                seen[number] = output if isinstance(output, Tensor) else output[0]
                if number == last and not whole:
                    raise _Enough

            return hook

        hooks = [modules[number].register_forward_hook(keep(number)) for number in self.layers]
        prediction = None
        try:
            t = torch.full((len(noisy),), step, device=noisy.device)
            prediction = self.unet(noisy, t, return_dict=False, **condition)[0]
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen, prediction


def load_diffusion(source: str, *, device: str = "cpu", dtype: str = "float32", **options: Any) -> DiffusionFeatures:
    """Load a Stable Diffusion (1, 2, XL or Turbo) pipeline from a folder or the local hub cache, frozen.

    Raises FileNotFoundError that names the weights, ModuleNotFoundError without diffusers.
    """
    try:
        from diffusers import DiffusionPipeline
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Stable Diffusion needs the extra `diffusion`: pip install diffusers") from error
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"the weights of {source} (several GB) are not present. Published at huggingface.co/{source}: fetch them "
            f"by `huggingface-cli download {source}`, or name a folder that holds them"
        ) from error
    pipeline = pipeline.to(device, DTYPES[dtype])
    for part in (pipeline.unet, pipeline.vae):
        part.requires_grad_(False).eval()
    parts = (pipeline.unet, pipeline.vae, pipeline.scheduler, prompt_encoder(pipeline))
    return DiffusionFeatures(*parts, name=source, **options).to(device)


def prompt_encoder(pipeline: Any) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Return `encode` of a pipeline: each prompt's embedding is made once and kept."""
    known: dict[str, tuple] = {}

    def one(prompt: str) -> tuple:
        options = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        with torch.no_grad():
            made = pipeline.encode_prompt(prompt, **options)
        return (made[0], made[2]) if len(made) == 4 else (made[0],)  # XL's has a pooled embedding, too

    def encode(prompts: Sequence[str]) -> dict[str, Any]:
        for prompt in dict.fromkeys(prompts):
            if prompt not in known:
                known[prompt] = one(prompt)
        columns = [torch.cat(parts) for parts in zip(*(known[prompt] for prompt in prompts), strict=True)]
        condition = {"encoder_hidden_states": columns[0]}
        if len(columns) == 2:
            side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
            times = columns[1].new_tensor([side, side, 0, 0, side, side]).expand(len(prompts), -1)
            condition["added_cond_kwargs"] = {"text_embeds": columns[1], "time_ids": times}
        return condition

    return encode
