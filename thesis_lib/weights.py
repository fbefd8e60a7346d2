"""Read weight files of every kind a ViT comes in, and put them into a model or say why they do not fit."""

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

LAYOUT = ("img_size", "mixer", "layers", "mixer_options")  # what a weight file must share with its model


def read(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Return a file's state dictionary and, from our own files, the recipe it was saved with.

    Raises FileNotFoundError, and ValueError for a corrupt file or one without a state dictionary of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file {path}.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                recipe = json.loads((file.metadata() or {}).get("recipe", "null"))
                content = {k: file.get_tensor(k) for k in file.keys()}
            origin = recipe and {k: recipe[k] for k in LAYOUT}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # full DINO checkpoints carry their arguments
                content, origin = torch.load(path, map_location="cpu", weights_only=True), None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is corrupt or not a weight file: {error}") from error
    for wrapper in ("teacher", "student", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dictionary of tensors.")
    return {re.sub(r"^(module\.)?(backbone\.)?", "", k): v for k, v in content.items()}, origin


def load(
    model: VisionTransformer, state: dict[str, Tensor], origin: dict | None, path: str | Path
) -> VisionTransformer:
    """Put a state dictionary from `read` into the model, in place, and return it; `path` is named in errors.

    Raises ValueError that names the differing keys, shapes or recipe, before anything is changed.
    """
    own = model.state_dict()
    if not any(k.startswith("head.") for k in own):
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    recipe = getattr(model, "recipe", None)
    if origin and recipe:
        keys = LAYOUT[:1] if origin["mixer"] == recipe["mixer"] == "mha" else LAYOUT  # MHA's options change no weight
        different = [f"{k} {origin[k]!r} (model: {recipe[k]!r})" for k in keys if origin[k] != recipe[k]]
        if different:
            raise ValueError(f"{path} holds weights of another model: {', '.join(different)}.")
    if what := mismatch(own, state):
        raise ValueError(f"{path} holds weights of another size, depth or mixer: {what}")
    model.load_state_dict(state)
    return model


def mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Say in one line how a state dictionary differs from the model's own in keys and shapes; "" if it fits."""
    missing, foreign = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} (model: {tuple(own[k].shape)})"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    return differences(missing, foreign, shapes) if missing or foreign or shapes else ""


def differences(missing: list[str], foreign: list[str], shapes: list[str], first: int = 3) -> str:
    """Say in one line which keys are missing, unexpected or of another shape."""
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:first])}{', ...' if len(keys) > first else ''})"
        for what, keys in (("missing", missing), ("unexpected", foreign), ("of another shape", shapes))
        if keys
    ]
    return "; ".join(parts) + "."
