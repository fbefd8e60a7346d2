"""Perceptual similarity as DreamSim defines it: embedding, distance, 2AFC score, hinge loss, and the metric itself.

metric, preprocess = load("mha")  # or a folder that `save` wrote
metric(preprocess(one), preprocess(other))  # PIL images -> (1,), lower is more alike
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from thesis_lib import attention, backbone, class_token, paths
from thesis_lib.attention.base import suggest
from thesis_lib.backbone import normalization
from thesis_lib.datasets.pixels import rgb
from thesis_lib.layer_plan import apply_plan
from thesis_lib.token_merging import merge_tokens

FEATURES = ("cls", "cls_norm", "cls_patch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cosine similarity along the last dimension, in [0, 2] to rounding."""
    return 1 - F.cosine_similarity(a, b, dim=-1)


def two_afc_scores(d_left: ArrayLike, d_right: ArrayLike, right_vote: ArrayLike) -> Tensor:
    """Score each triplet by the share of people who agree with the smaller distance, float64 (n,).

    right_vote: share of votes for the right image, in [0, 1]. Equal distances score one half (LPIPS, Zhang et al. 2018;
    DreamSim, Fu et al. 2023). Raises ValueError for different shapes, NaN distances and votes outside [0, 1].
    """
    d_left, d_right, vote = _triplets(d_left, d_right, right_vote)
    bad = int((d_left.isnan() | d_right.isnan()).sum())
    if bad:
        raise ValueError(f"{bad} of {len(vote)} triplets have a NaN distance.")
    vote = vote.double()
    if not bool(((vote >= 0) & (vote <= 1)).all()):
        raise ValueError("right_vote must be the share of votes for the right image, in [0, 1].")
    credit = torch.where(d_left < d_right, 1 - vote, vote)
    return torch.where(d_left == d_right, 0.5, credit)


def two_afc_score(d_left: ArrayLike, d_right: ArrayLike, right_vote: ArrayLike) -> float:
    """Return the mean of `two_afc_scores`, in [0, 1]. Raises ValueError for no triplets."""
    scores = two_afc_scores(d_left, d_right, right_vote)
    if len(scores) == 0:
        raise ValueError("There are no triplets to score.")
    return scores.mean().item()


def hinge_loss(d_left: Tensor, d_right: Tensor, right_vote: Tensor, margin: float = 0.05) -> Tensor:
    """Return the mean of max(0, margin - y (d_left - d_right)), y = +1 where the right image won the vote, else -1.

    A vote of one half counts as left (DreamSim, Fu et al. 2023, section 4.2); votes are shares, which is not checked in
    every step. Raises ValueError for different shapes.
    """
    d_left, d_right, vote = _triplets(d_left, d_right, right_vote)
    sign = 2 * vote.round() - 1  # rounds 0.5 to 0
    return (margin - sign * (d_left - d_right)).clamp(min=0).mean()


def triplet_distances(embeddings: Tensor, index: ArrayLike, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Return float64 (d_left, d_right), each (n,), for triplets that index into embeddings.

    embeddings: (m, D). index: integers (n, 3), the rows of reference, left and right.
    Raises ValueError for an index of another shape or out of range.
    """
    index = torch.as_tensor(index)
    if index.ndim != 2 or index.shape[1] != 3 or index.is_floating_point():
        raise ValueError(f"index must be integers of shape (n, 3), got {index.dtype} {tuple(index.shape)}.")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(embeddings):
        raise ValueError(f"index runs from {index.min()} to {index.max()}, but there are {len(embeddings)} embeddings.")
    parts = [torch.empty(0, 2, dtype=torch.float64, device=embeddings.device)]
    for rows in index.split(chunk):
        ref, left, right = embeddings[rows].double().unbind(1)  # (c, 3, D)
        parts.append(torch.stack([distance(ref, left), distance(ref, right)], dim=1))
    d_left, d_right = torch.cat(parts).unbind(1)
    return d_left, d_right


class Metric(nn.Module):
    """A backbone as a perceptual metric, called as the `dreamsim` package's model is.

    feature: "cls" (class token of the last block before the final norm, DreamSim's), "cls_norm" (after it) or
    "cls_patch" (class token and mean patch token, both before the norm, 2D wide).
    normalize: subtract an embedding's mean, then divide by its norm (DreamSim 0.2), which makes the cosine a
    correlation; for "cls_patch" every token is normalised before the patch mean is taken.
    The metric takes over the backbone's device and training mode.
    """

    def __init__(self, backbone: nn.Module, feature: str = "cls", normalize: bool = True):
        super().__init__()
        if feature not in FEATURES:
            raise ValueError(f"feature {feature!r} is not one of {', '.join(FEATURES)}.")
        if not getattr(backbone, "has_class_token", False):
            raise ValueError("The backbone has no class token, which every feature needs.")
        if normalize not in (True, False):
            raise ValueError(f"normalize {normalize!r} is neither True nor False.")
        self.backbone, self.feature, self.normalize = backbone, feature, normalize
        like = next(backbone.parameters())
        mean, std = (like.new_tensor(v).view(1, 3, 1, 1) for v in normalization(backbone))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.train(backbone.training)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances of image pairs: (B, 3, H, W) twice, floats in [0, 1] -> (B,)."""
        a, b = self.embed(a), self.embed(b)
        if len(a) != len(b):
            raise ValueError(f"Pairs need as many images on either side, got {len(a)} and {len(b)}; expand the fewer.")
        return distance(a, b)

    def embed(self, x: Tensor) -> Tensor:
        """Return embeddings: (B, 3, H, W) floats in [0, 1] -> (B, D). Raises ValueError for other input."""
        self._check(x)
        return self.embed_unchecked(x)

    def embed_unchecked(self, x: Tensor) -> Tensor:
        """Return what `embed` does without looking at the values, which on a GPU would be waited for."""
        x = ((x - self.mean) / self.std).to(self.mean.dtype)  # the weights' own
        if self.feature != "cls_patch" and class_token.applies(self.backbone):
            cls = class_token.last_class_token(self.backbone, x)  # (B, D), without the last block's other tokens
            return self._centre(self.backbone.norm(cls) if self.feature == "cls_norm" else cls)
        ((patches, prefix),) = self.backbone.forward_intermediates(
            x,
            indices=1,  # the last block
            return_prefix_tokens=True,
            norm=self.feature == "cls_norm",
            output_fmt="NLC",
            intermediates_only=True,
        )
        cls = self._centre(prefix[:, 0])  # (B, D); registers, if any, are left out
        if self.feature != "cls_patch":
            return cls
        return torch.cat([cls, self._centre(patches).mean(dim=1)], dim=-1)  # (B, 2D)

    def _centre(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens - tokens.mean(dim=-1, keepdim=True), dim=-1) if self.normalize else tokens

    def _check(self, x: Tensor) -> None:
        size = tuple(self.backbone.patch_embed.img_size)
        if not isinstance(x, Tensor):
            raise ValueError(f"Images must be a tensor, got {type(x).__name__}; `preprocess` makes one of a PIL image.")
        if x.ndim != 4 or x.shape[1:] != (3, *size):
            raise ValueError(f"Images must have the shape (B, 3, {size[0]}, {size[1]}), got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"Images must be floats in [0, 1], got {x.dtype}; divide bytes by 255.")
        if x.numel() and not torch.compiler.is_compiling():
            low, high = (v.item() for v in x.detach().aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails
                raise ValueError(
                    f"Images must lie in [0, 1], got [{low:.3g}, {high:.3g}]; the metric applies mean and std itself."
                )


def preprocess(img_size: int | tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """Return DreamSim's preprocessing: a PIL image is made RGB and squashed (bicubic) to (1, 3, H, W) in [0, 1].

    What it returns takes 16-bit grey, too, and raises ValueError for other modes above 8 bits (`datasets.pixels.rgb`).
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return partial(_preprocess, size=(width, height))


def _preprocess(image: Image.Image, size: tuple[int, int]) -> Tensor:
    pixels = np.array(rgb(image, getattr(image, "filename", "")).resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def load(
    name_or_path: str | Path, *, device: str | torch.device = "cpu"
) -> tuple[Metric, Callable[[Image.Image], Tensor]]:
    """Return (metric, preprocess), frozen and in eval mode: `metric(preprocess(a), preprocess(b))`.

    name_or_path: a mixer's name for the demo backbone with that mixer, or a folder that `save` wrote.
    Raises ValueError for an unknown name or a folder whose content does not fit, FileNotFoundError for missing files.
    """
    folder = Path(name_or_path).expanduser()
    if str(name_or_path) in attention.MIXERS:
        metric = Metric(backbone.create("demo", mixer=str(name_or_path)))
    elif folder.is_dir():
        metric = _load_folder(folder)
    elif folder.name == str(name_or_path):
        near, known = suggest(folder.name, attention.MIXERS), ", ".join(attention.MIXERS)
        raise ValueError(f"unknown mixer {folder.name!r}{near}, nor is there a folder of that name; known: {known}")
    else:
        raise FileNotFoundError(f"There is no saved metric at {folder}; notebook 02 saves models/teacher, for mha.")
    size = tuple(metric.backbone.patch_embed.img_size)
    return metric.eval().requires_grad_(False).to(device), preprocess(size)


def save(metric: Metric, folder: str | Path) -> Path:
    """Write model.safetensors and metric.json, enough to rebuild the metric anywhere. Merge LoRA first.

    Raises ValueError, before anything is written, for a backbone that `backbone.create` has not made.
    """
    folder = Path(folder).expanduser()
    backbone.save_weights(metric.backbone, folder / "model.safetensors")
    description = {
        "recipe": metric.backbone.recipe,
        "feature": metric.feature,
        "normalize": metric.normalize,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    text = json.dumps(description, indent=1) + "\n"
    paths.write_whole(folder / "metric.json", lambda part: part.write_text(text))
    return folder


def _load_folder(folder: Path) -> Metric:
    for needed in ("metric.json", "model.safetensors"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"{folder} has no {needed}; thesis_lib.perceptual.save writes both it needs.")
    try:
        description = json.loads((folder / "metric.json").read_text())
        recipe = description["recipe"]
        arguments = {k: recipe[k] for k in ("name", "mixer", "layers", "img_size")} | recipe["mixer_options"]
        model = backbone.create(**arguments, pretrained=False)
        if "plan" in recipe:
            apply_plan(model, **recipe["plan"])
        if "token_merging" in recipe:
            merge_tokens(model, **recipe["token_merging"])
        metric = Metric(model, **{k: description[k] for k in ("feature", "normalize")})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'metric.json'} is corrupt: {error!r}.") from error
    backbone.load_weights(model, folder / "model.safetensors")
    return metric


def embed_pixels(
    metric: Metric,
    pixels: Any,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    progress: bool = True,
) -> Tensor:
    """Embed images in batches: float32 (n, D) on the CPU, in the order of `indices` (all when None).

    pixels: has a length, and pixels[indices] is uint8 (b, 3, H, W). dtype: float32, or bfloat16, float16 by autocast.
    The metric moves to the device and is in eval mode meanwhile; the result does not depend on batch_size.
    Raises ValueError for no images, another size or type, indices that are no integers, a wrong dtype or batch size.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    device, was_training = torch.device(device), metric.training
    order = np.arange(len(pixels)) if indices is None else np.asarray(indices)
    if len(order) == 0:
        raise ValueError("There are no images to embed.")
    if order.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got {order.dtype}.")
    metric.to(device).eval()
    parts = []
    autocast = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
    try:
        with torch.inference_mode(), autocast, tqdm(total=len(order), unit="image", disable=not progress) as bar:
            for batch in torch.from_numpy(order.astype(np.int64)).split(batch_size):
                images = pixels[batch.numpy()]
                if images.dtype != torch.uint8:
                    raise ValueError(f"pixels must be tensors of bytes (uint8), got {images.dtype}.")
                cuda = device.type == "cuda"  # elsewhere nothing is pinned, and mps would read memory already reused
                x = (images.pin_memory() if cuda else images).to(device, non_blocking=cuda).float() / 255
                if not parts:
                    metric._check(x)  # bytes cannot leave the range later on, and no later batch waits for the GPU
                parts.append(metric.embed_unchecked(x).float())
                bar.update(len(batch))
    finally:
        metric.train(was_training)
    return torch.cat(parts).cpu()  # outside inference mode, so that a student can be trained on it


def __getattr__(name: str) -> Any:
    if name == "embed_folder":  # thesis_lib.embed builds on this module, so it is imported when asked for
        from thesis_lib.embed import embed_folder

        return embed_folder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _triplets(*columns: ArrayLike) -> list[Tensor]:
    tensors = [c if isinstance(c, Tensor) else torch.from_numpy(np.array(c)) for c in columns]
    if any(t.ndim != 1 or t.shape != tensors[0].shape for t in tensors):
        raise ValueError(f"Expected vectors over the same triplets, got shapes {[tuple(t.shape) for t in tensors]}.")
    return tensors
