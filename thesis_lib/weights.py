"""Read weight files of every kind a ViT comes in, and put them into a model or say why they do not fit."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

LAYOUT = ("img_size", "mixer", "layers", "mixer_options")  # what a weight file must share with its model


def read(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Return a file's state dictionary and, from our own files, the recipe it was saved with.

    Raises FileNotFoundError, and ValueError for a corrupt file or one without a state dictionary of dense tensors.
    """
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file {path}.")
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                recipe = json.loads((file.metadata() or {}).get("recipe", "null"))
                content = {k: file.get_tensor(k) for k in file.keys()}
            origin = None if recipe is None else {k: recipe[k] for k in LAYOUT} | {"plan": recipe.get("plan")}
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is corrupt or not a weight file: {error!r}") from error
    else:
        content, origin = _unpickle(path), None
    for wrapper in ("teacher", "student", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not all(isinstance(k, str) and _dense(v) for k, v in content.items()):
        raise ValueError(f"{path} holds no state dictionary of dense tensors.")
    state = {re.sub(r"^(module\.)?(backbone\.)?", "", k): v for k, v in content.items()}
    if len(state) < len(content):
        raise ValueError(f"{path} holds several models: without module. and backbone. some of its keys are the same.")
    return state, origin


def is_safetensors(path: Path) -> bool:
    """Tell from its first bytes, not its name, whether a file is safetensors: eight of a length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _unpickle(path: Path) -> Any:
    """Return what `torch.save` wrote, if it holds no more than tensors and plain values; else ValueError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # full DINO checkpoints carry their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file torch raises what happens to fail, and advises to run its code
        why = "holds more than tensors, which is not loaded (save model.state_dict()), or the download is damaged"
        why = why if path.stat().st_size else "the file is empty"
        raise ValueError(f"{path} is corrupt or not a weight file: {why}.") from error


def _dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


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
        pairs = {k: (origin[k], recipe.get(k)) for k in (*keys, "plan")}  # halving adds no weight that would tell
        different = [f"{k} {its!r} (model: {own!r})" for k, (its, own) in pairs.items() if its != own]
        if different:
            raise ValueError(f"{path} holds weights of another model: {', '.join(different)}.")
    if what := mismatch(own, state):
        raise ValueError(f"{path} holds weights of another size, depth, mixer or kind: {what}")
    model.load_state_dict(state)
    return model


def mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Say in one line how a state dictionary differs from the model's own: in keys, shapes or kind; "" if it fits.

    Where the model has floats, other numbers and values that are not finite do not fit.
    """
    missing, foreign = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} (model: {tuple(own[k].shape)})"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    unfit = [k for k in own if k in state and own[k].is_floating_point() and not _finite_floats(state[k])]
    return differences(missing, foreign, shapes, unfit) if missing or foreign or shapes or unfit else ""


def _finite_floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def differences(
    missing: list[str], foreign: list[str], shapes: list[str], unfit: Sequence[str] = (), first: int = 3
) -> str:
    """Say in one line which keys are missing, unexpected, of another shape or no finite floats."""
    kinds = {"missing": missing, "unexpected": foreign, "of another shape": shapes, "not of finite floats": unfit}
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:first])}{', ...' if len(keys) > first else ''})"
        for what, keys in kinds.items()
        if keys
    ]
    return "; ".join(parts) + "."


def update_recipe(model: VisionTransformer) -> None:
    """Put into the recipe what was changed on the mixers since (`drop_heads`); ValueError where it differs by block."""
    layers = [] if "plan" in model.recipe else model.recipe["layers"] or range(len(model.blocks))
    found = [json.loads(json.dumps(getattr(model.blocks[i].attn, "options", {}))) for i in layers]
    if any(options != found[0] for options in found):
        raise ValueError(
            "The mixers' options differ from block to block, which a recipe cannot say: change all blocks alike "
            f"(they are {found})."
        )
    if found and found[0]:
        model.recipe["mixer_options"] = found[0]
