"""A timm Vision Transformer with any mixer in any of its blocks, and the weights it starts from.

model = create("vit_base_patch16_224.dino", mixer="sra", layers=[0, 1, 2], ratio=2)
"""

import difflib
import json
import operator
import re
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from thesis_lib import attention, paths, weights
from thesis_lib.layer_plan import check_untouched

DEMO = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
DEMO_FILE = "demo_backbone.safetensors"


def create(
    name: str,
    mixer: str = "mha",
    layers: Iterable[int] | None = None,
    pretrained: bool | str | Path = True,
    img_size: int | tuple[int, int] | None = None,
    *,
    adapter: str | Path | None = None,
    **mixer_options,
) -> VisionTransformer:
    """Build a ViT on the CPU in float32 and eval mode, with `mixer` in place of its attention.

    The order is fixed: weights at their own size, DreamSim adapter, position embedding resampled to `img_size`, mixers.
    name: "demo" or a timm VisionTransformer such as "vit_base_patch16_224.dino".
    layers: blocks that get the mixer (negative counts from the end); None for all. The others keep attention.
    pretrained: True (the shipped demo weights, or timm's hub), False (random, from torch's seed) or a weight file, one
    that `load_weights` reads.
    adapter: folder of a DreamSim LoRA adapter, merged before the mixers are put in.
    `model.recipe` holds name, img_size, mixer, layers and resolved mixer_options as plain JSON types.
    Raises ValueError for a wrong name, size, layer, option or file content, FileNotFoundError for missing weights.
    """
    attention.get(mixer)  # a typo is reported before any weights are read
    if not isinstance(pretrained, bool | str | Path):
        raise ValueError(f"pretrained must be True, False or a weight file, not {pretrained!r}.")
    path = None if isinstance(pretrained, bool) else Path(pretrained)
    if name == "demo" and pretrained is True:
        path = paths.WEIGHTS / DEMO_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"The weights of the demo backbone are missing: {path}. They are committed with the repository; "
                "`python -m thesis_lib.demo_backbone` trains them again; pretrained=False starts from random weights."
            )
    state, origin = ({}, None) if path is None else weights.read(path)
    model = _architecture(name, hub=pretrained is True and path is None)
    if origin:
        _resize(model, origin["img_size"])
    if origin and origin["mixer"] != "mha":  # the file holds mixers, so they must be there before it can be loaded
        if adapter is not None:
            raise ValueError(f"{path} holds {origin['mixer']!r} mixers; a DreamSim adapter merges into attention only.")
        _resize(model, img_size)
        weights.load(swap(model, mixer, layers, **mixer_options), state, origin, path)
        return model.eval()
    if path is not None:
        weights.load(model, state, origin, path)
    if adapter is not None:
        merge_dreamsim_adapter(model, adapter)
    _resize(model, img_size)
    return swap(model, mixer, layers, **mixer_options).eval()


def swap(model: VisionTransformer, mixer: str, layers: Iterable[int] | None = None, **options) -> VisionTransformer:
    """Replace the attention of the chosen blocks in place, reusing its weights, and return the model.

    Raises ValueError for a model with a plan or merged tokens, and for a block that was swapped before: what its
    attention's projections held is gone.
    """
    check_untouched(model)
    kind, chosen = attention.get(mixer), _layers(model, layers)
    for i, block in enumerate(model.blocks):
        if not _is_mha(getattr(block, "attn", None)):
            what = getattr(getattr(block, "attn", None), "name", type(block).__name__)
            raise ValueError(f"Block {i} has {what!r} instead of attention; swap a model whose blocks all have 'mha'.")
    geometry = (tuple(model.patch_embed.grid_size), model.num_prefix_tokens)
    mha = attention.get("mha")
    mixers = [
        kind.from_attention(block.attn, *geometry, **options)
        if i in chosen
        else block.attn
        if type(block.attn) is mha
        else mha.from_attention(block.attn, *geometry)
        for i, block in enumerate(model.blocks)
    ]
    for block, new in zip(model.blocks, mixers, strict=True):  # only after every one could be built
        block.attn = new
    if hasattr(model, "recipe"):
        some = None if len(chosen) == len(model.blocks) else chosen
        resolved = json.loads(json.dumps(mixers[chosen[0]].options))
        model.recipe |= {"mixer": mixer, "layers": some, "mixer_options": resolved}
    return model


def load_weights(model: VisionTransformer, path: str | Path) -> VisionTransformer:
    """Load a weight file of exactly this model's size and mixers, in place, and return the model.

    path: safetensors, DINO's backbone .pth, a full DINO checkpoint (the teacher where there is one), or a dictionary
    with "state_dict" or "model"; `module.` and `backbone.` prefixes and, for a headless model, `head.*` are dropped.
    Raises FileNotFoundError, or ValueError that names the differing keys and shapes, before anything is changed.
    """
    state, origin = weights.read(Path(path))
    return weights.load(model, state, origin, path)


def save_weights(model: VisionTransformer, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write safetensors whose metadata holds the recipe, so that no other mixer or size loads it by mistake."""
    if hasattr(model, "merge_and_unload"):
        raise ValueError("The model still carries a LoRA adapter; call merge_lora first.")
    if not hasattr(model, "recipe"):
        raise ValueError("The model has no recipe to build it again from, as those of backbone.create have.")
    weights.update_recipe(model)
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "recipe": json.dumps(model.recipe)}
    return paths.write_whole(path, lambda part: save_file(state, part, metadata=metadata))


def merge_dreamsim_adapter(model: VisionTransformer, folder: str | Path) -> VisionTransformer:
    """Add alpha/r * B @ A to every qkv weight in place; merge before `swap`.

    folder: adapter_config.json and adapter_model.safetensors as peft writes them for a single-branch DreamSim
    (keys ...blocks.{i}.attn.qkv.lora_{A,B}.weight; A (r, D), B (3D, r)), see DreamSim, Fu et al. 2023.
    Raises ValueError for mixers other than attention and for missing, foreign, all-zero, misshapen or not finite ones.
    """
    folder = Path(folder).expanduser()
    for needed in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(
                f"{folder} has no {needed}. A DreamSim adapter is a folder such as dino_vitb16_single_lora, published "
                "in the zip files of github.com/ssundaram21/dreamsim/releases (v0.2.0-checkpoints)."
            )
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, scale = int(config["r"]), config["lora_alpha"] / config["r"]
        tensors = load_file(folder / "adapter_model.safetensors")
    except (ValueError, KeyError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a readable LoRA adapter: {error!r}") from error
    if config.get("use_rslora") or config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{folder} is not a plain LoRA adapter (rsLoRA, DoRA or per-layer ranks are not supported).")

    swapped = [i for i, block in enumerate(model.blocks) if not _is_mha(block.attn)]
    if swapped:
        raise ValueError(f"Blocks {swapped} are already swapped; merge the adapter first: create(..., adapter=folder).")
    found, foreign = {}, []
    for key, tensor in tensors.items():
        match = re.search(r"(?:^|\.)model\.blocks\.(\d+)\.attn\.qkv\.lora_([AB])\.weight$", key)
        where = (int(match[1]), match[2]) if match else None
        if where is None or where in found or where[0] >= len(model.blocks):
            foreign.append(key)
        found[where] = tensor
    missing = [f"blocks.{i}.attn.qkv.lora_{m}" for i in range(len(model.blocks)) for m in "AB" if (i, m) not in found]
    if missing or foreign:
        raise ValueError(f"{folder} does not fit this model: {weights.differences(missing, foreign, [])}")

    projections = [block.attn.qkv.weight for block in model.blocks]
    for i, weight in enumerate(projections):
        shapes = tuple(found[i, "A"].shape), tuple(found[i, "B"].shape)
        expected = (rank, weight.shape[1]), (weight.shape[0], rank)
        if shapes != expected:
            raise ValueError(f"{folder}: lora_A, lora_B of block {i} have shapes {shapes}, expected {expected}.")
    if not all(tensor.isfinite().all() for tensor in found.values()):
        raise ValueError(f"{folder}: a matrix holds values that are not finite.")
    if not all(found[i, "B"].any() for i in range(len(projections))):
        raise ValueError(f"{folder}: a lora_B is all zero, so the adapter was never trained or was read wrongly.")
    with torch.no_grad():
        for i, weight in enumerate(projections):
            weight += (scale * (found[i, "B"].float() @ found[i, "A"].float())).to(weight)
    return model


def add_lora(model: VisionTransformer, *, rank: int = 16, alpha: float = 32, dropout: float = 0.2) -> nn.Module:
    """Wrap the model in peft's LoRA, in place; only the adapter stays trainable.

    Each block is adapted in its mixer's `lora_targets`, or in mlp.fc1 and mlp.fc2 where the mixer has no projections.
    Defaults are DreamSim's single-branch recipe; a ViT-B with attention has 589,824 trainable parameters.
    """
    from peft import LoraConfig, get_peft_model  # only tuning needs peft; a saved metric loads without it

    targets = []
    for i, block in enumerate(model.blocks):
        names = getattr(block.attn, "lora_targets", ("qkv",))
        targets += [f"blocks.{i}.attn.{n}" for n in names] or [f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc2"]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=targets)
    return get_peft_model(model, config)


def merge_lora(model: nn.Module) -> VisionTransformer:
    """Merge what `add_lora` added into the weights and return the plain ViT, every parameter trainable again."""
    if not hasattr(model, "merge_and_unload"):
        raise ValueError("The model carries no LoRA adapter; merge_lora undoes add_lora.")
    return model.merge_and_unload().requires_grad_(True)


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the per-channel (mean, std) in [0, 1] units that the weights were trained with."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(config.get("std", IMAGENET_DEFAULT_STD))


def _architecture(name: str, *, hub: bool) -> VisionTransformer:
    listed = [
        timm.list_models(module=module, include_tags=tags)
        for module in ("vision_transformer", "deit")
        for tags in (True, False)
    ]
    known = [model for models in listed for model in models if "distilled" not in model] + ["demo"]
    if name not in known:
        near = difflib.get_close_matches(str(name), known) or ["demo", "vit_base_patch16_224.dino"]
        other = str(name).partition(".")[0] in timm.list_models()
        what = (
            f"timm's {name!r} is no plain VisionTransformer"
            if other
            else f"There is no timm VisionTransformer {name!r}"
        )
        raise ValueError(f"{what}; near ones: {', '.join(near)}.")
    if name == "demo":
        model = VisionTransformer(**DEMO, num_classes=0, global_pool="token")
    elif hub:
        model = _from_hub(name)
    else:
        model = timm.create_model(name, num_classes=0)
    size = _json_size(model.patch_embed.img_size)
    model.recipe = {"name": name, "img_size": size, "mixer": "mha", "layers": None, "mixer_options": {}}
    return model


def _from_hub(name: str) -> VisionTransformer:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # hub, network and file errors share no narrower class
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        config = model.pretrained_cfg
        published = [f"huggingface.co/{config['hf_hub_id']}"] if config.get("hf_hub_id") else []
        published += [config["url"]] if config.get("url") else []
        megabytes = sum(p.numel() for p in model.parameters()) * 4 / 1e6
        raise FileNotFoundError(
            f"The pretrained weights of {name} (about {megabytes:.0f} MB) are neither cached nor could they be fetched "
            f"({type(error).__name__}). Published at: {' or '.join(published) or 'nowhere that timm knows'}. "
            "Pass pretrained=<path of a downloaded file>, or pretrained=False for random weights."
        ) from error


def _json_size(size: Iterable[int]) -> int | list[int]:
    height, width = size
    return height if height == width else [height, width]


def _resize(model: VisionTransformer, img_size: int | Iterable[int] | None) -> None:
    """Set the input size in place; timm resamples the position embedding (bicubic, antialiased)."""
    if img_size is None:
        return
    try:
        size = tuple(map(operator.index, img_size if isinstance(img_size, Iterable) else (img_size, img_size)))
    except TypeError as error:
        raise ValueError(f"img_size {img_size!r} must be an integer, or height and width.") from error
    patch = model.patch_embed.patch_size
    if len(size) != 2:
        raise ValueError(f"img_size {img_size} must be an integer, or height and width.")
    if any(s < p or s % p for s, p in zip(size, patch, strict=True)):
        near = [sorted({max(s // p, 1) * p, max(s // p + 1, 1) * p}) for s, p in zip(size, patch, strict=True)]
        raise ValueError(f"img_size {img_size} is not a multiple of the patch size {patch}; near sizes: {near}.")
    with torch.no_grad():
        model.set_input_size(img_size=size)
    model.recipe["img_size"] = _json_size(size)


def _layers(model: VisionTransformer, layers: Iterable[int] | None) -> list[int]:
    depth = len(model.blocks)
    if layers is None:
        return list(range(depth))
    given = list(layers) if isinstance(layers, Iterable) else []
    right = [i for i in given if isinstance(i, Integral) and not isinstance(i, bool) and -depth <= i < depth]
    chosen = sorted({int(i) % depth for i in right})
    if not given or len(chosen) != len(given):
        shown = given or layers
        raise ValueError(f"layers={shown}: give distinct integers from {-depth} to {depth - 1}, or None for all.")
    return chosen


def _is_mha(module: nn.Module | None) -> bool:
    return type(module) in (Attention, attention.get("mha"))  # not isinstance: a mixer may inherit from either
