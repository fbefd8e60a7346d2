"""The ViT of the image classification study, built from a dictionary, with any mixer in all of its layers.

    model = ViTForImageClassification({"attention_type": "linformer", "linformer_k": 16})
    logits = model(images)  # (B, 3, 32, 32) floats in [0, 1] -> (B, 10)
    logits, attention_maps = model(images, output_attentions=True)  # one (B, h, N, N), or None, for each layer

The keys are those of the published comparison, the network is timm's: what differs from that code is a final LayerNorm
(2 d parameters more) and the exact GELU.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor, nn

from thesis_lib import attention, backbone, paths, weights
from thesis_lib.attention.base import integer, suggest

DEFAULTS = {
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
    "num_classes": 10,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "attention_type": "standard",
    "mixer_options": {},
    "linformer_k": None,
    "performer_features": None,
    "nystrom_landmarks": None,
}
SIZES = ("image_size", "patch_size", "num_channels", "num_classes", "hidden_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "intermediate_size")
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
# "standard" computes head by head what "faster", earlier called "full", computes in one product: all are MHA.
ALIASES = {"standard": "mha", "faster": "mha", "full": "mha", "nystromformer": "nystrom"}
OPTION_KEYS = {
    "linformer_k": ("linformer", "rank"),
    "performer_features": ("performer", "features"),
    "nystrom_landmarks": ("nystrom", "landmarks"),
}


def resolve(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fill in the defaults; ValueError names an unknown key's near ones, or the value that cannot work."""
    given = dict(config or {})
    for key in given:
        if key not in DEFAULTS:
            raise ValueError(f"unknown key {key!r}{suggest(key, DEFAULTS)}; known: {', '.join(DEFAULTS)}")
    found = DEFAULTS | given
    for key in SIZES:
        integer(key, found[key], 1)
    for key in RATES:
        if not 0 <= found[key] < 1:
            raise ValueError(f"{key}={found[key]!r} must lie in [0, 1)")
    for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
        if found[whole] % found[part]:
            raise ValueError(f"{part}={found[part]} does not divide {whole}={found[whole]}")
    mixer_of(found)
    return found


def mixer_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the registered name of a configuration's mixer and its options; ValueError names the near names."""
    kind = config["attention_type"]
    name = ALIASES.get(kind, kind)
    if name not in attention.MIXERS:
        known = [*ALIASES, *attention.MIXERS]
        raise ValueError(f"unknown attention_type {kind!r}{suggest(kind, known)}; known: {', '.join(known)}")
    own = {option: config[key] for key, (mixer, option) in OPTION_KEYS.items() if mixer == name}
    return name, {option: value for option, value in own.items() if value is not None} | dict(config["mixer_options"])


class ViTForImageClassification(nn.Module):
    """A ViT with a class token and a linear head on it; `config` holds every key, resolved.

    Weights start from torch's random state. Raises ValueError for a configuration that cannot work.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = found = resolve(config)
        self.vit = VisionTransformer(
            img_size=found["image_size"],
            patch_size=found["patch_size"],
            in_chans=found["num_channels"],
            num_classes=found["num_classes"],
            embed_dim=found["hidden_size"],
            depth=found["num_hidden_layers"],
            num_heads=found["num_attention_heads"],
            mlp_ratio=(found["intermediate_size"] + 0.5) / found["hidden_size"],  # timm truncates the product
            qkv_bias=found["qkv_bias"],
            pos_drop_rate=found["hidden_dropout_prob"],
            proj_drop_rate=found["hidden_dropout_prob"],
            attn_drop_rate=found["attention_probs_dropout_prob"],
            drop_path_rate=found["drop_path_rate"],
        )
        self.mixer, options = mixer_of(found)
        backbone.swap(self.vit, self.mixer, **options)

    def forward(self, images: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, tuple]:
        """Classify images (B, C, S, S), floats in [0, 1]: logits (B, classes), or with maps (logits, attention_maps).

        attention_maps: for each layer the weights (B, h, N, N) with which output tokens average input tokens, class
        token first; None where the mixer has no such weights. Raises ValueError for images of another shape or type.
        """
        expected = (self.config["num_channels"], self.config["image_size"], self.config["image_size"])
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"images must be floats in [0, 1] of shape (B, {', '.join(map(str, expected))}), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if not output_attentions:
            return self.vit(2 * images - 1)
        maps: list[Tensor | None] = []

        def record(mixer: attention.Mixer, inputs: tuple[Tensor, ...]) -> None:
            maps.append(mixer.attention_map(inputs[0]))

        hooks = [block.attn.register_forward_pre_hook(record) for block in self.vit.blocks]
        try:
            return self.vit(2 * images - 1), tuple(maps)
        finally:
            for hook in hooks:
                hook.remove()


def save(model: ViTForImageClassification, folder: str | Path) -> Path:
    """Write model.safetensors and config.json beside it, each whole or not at all, and return the folder."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    text = json.dumps(model.config, indent=1) + "\n"
    paths.write_whole(folder / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    paths.write_whole(folder / "config.json", lambda part: part.write_text(text, encoding="utf-8"))
    return folder


def load(folder: str | Path) -> ViTForImageClassification:
    """Rebuild what `save` wrote, in eval mode on the CPU.

    Raises FileNotFoundError for missing files, ValueError for corrupt ones and weights of another configuration.
    """
    folder = Path(folder).expanduser()
    for needed in ("config.json", "model.safetensors"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"{folder} has no {needed}; thesis_lib.classifier.save writes both files it needs")
    try:
        with torch.random.fork_rng(devices=[]):
            model = ViTForImageClassification(_config(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no model: {error}") from error
    state, _ = weights.read(folder / "model.safetensors")
    if what := weights.mismatch(model.state_dict(), state):
        raise ValueError(f"{folder}: the weights are not of the model that config.json describes: {what}")
    model.load_state_dict(state)
    return model.eval()


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("it holds no dictionary")
    return config


def refuse_other(config: Mapping[str, Any], folder: str | Path) -> None:
    """Raise ValueError if the folder holds a model of another configuration, naming the keys that differ."""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        return
    try:
        there, here = _config(folder), json.loads(json.dumps(config))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is corrupt: {error}") from error
    differ = [key for key in here if there.get(key) != here[key]]
    if differ:
        shown = "; ".join(f"{key}: {there.get(key)} there, {here[key]} here" for key in differ)
        raise ValueError(
            f"{folder} holds another model ({shown}): pass resume=False to start anew, or name another folder"
        )
