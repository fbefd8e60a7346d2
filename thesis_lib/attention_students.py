"""Students of attention transfer: built from random weights or from a checkpoint's encoder, written and read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from thesis_lib import attention, paths, weights
from thesis_lib import backbone as backbones
from thesis_lib.attention_teacher import check_blocks
from thesis_lib.attention_transfer import AttentionTransfer

METADATA = "attention_transfer"
READOUT = ("norm.", "fc_norm.", "head.")


def create_student(
    name: str,
    num_classes: int,
    *,
    img_size: int | None = None,
    mixer: str = "mha",
    global_pool: str = "avg",
    seed: int = 0,
    architecture: dict[str, Any] | None = None,
    **mixer_options: Any,
) -> VisionTransformer:
    """Build a classifier with random weights and the architecture of backbone `name`, on the CPU.

    global_pool: "avg" (mean of the patches, then norm and head: the paper's default) or "token". architecture: what
    differs from `name` (embed_dim, depth, ...); number of tokens and of heads must be those of the teacher. A teacher's
    own parts (registers, LayerScale) are the student's too, without which some teachers do not transfer.
    """
    arguments: dict[str, Any] = {"num_classes": num_classes, "global_pool": global_pool, **(architecture or {})}
    arguments |= {} if img_size is None else {"img_size": img_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "demo":
            model = VisionTransformer(**backbones.DEMO | arguments)
        else:
            model = timm.create_model(name, pretrained=False, **arguments)
        check_blocks(model, "student")
        backbones.swap(model, mixer, **mixer_options)
    model.description = {"name": name, "mixer": mixer, **arguments, **mixer_options}
    return model


def load_encoder(model: VisionTransformer, state: Mapping[str, Tensor], source: str) -> VisionTransformer:
    """Load patch embedding, tokens and blocks in place from a state dictionary named as MAE's or timm's, return it.

    Final norms and head stay the model's own, as in fine-tuning MAE (He et al. 2022); a position embedding of another
    grid is resampled (bicubic). Raises ValueError that names missing, unexpected and misshapen keys, before anything
    is changed. source: what the error calls it.
    """
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(READOUT)}
    encoder = {key: value for key, value in state.items() if not key.startswith(READOUT)}
    position = encoder.get("pos_embed")
    if position is not None and position.ndim == 3 and position.shape[1:] != own["pos_embed"].shape[1:]:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        encoder["pos_embed"] = resample_abs_pos_embed(position, model.patch_embed.grid_size, num_prefix_tokens=prefix)
    if what := weights.mismatch(own, encoder):
        raise ValueError(f"{source} is no encoder of this model: {what}")
    model.load_state_dict(encoder, strict=False)
    return model


def export(model: AttentionTransfer, path: str | Path) -> Path:
    """Write the student as safetensors, without what it never computes, and how to build it again in the metadata.

    Raises ValueError for a student that `create_student` did not build, and for fixed maps, a control of one run.
    """
    if not hasattr(model.student, "description"):
        raise ValueError("only students of create_student say how they are built again")
    if model.copies and model.teacher is not None and model.teacher.fixed is not None:
        raise ValueError("maps averaged over examples are a control of one run: they are not exported")
    state = {name: value.detach().cpu().contiguous() for name, value in model.student.state_dict().items()}
    pixels = {name: getattr(model, name).flatten().tolist() for name in ("mean", "std")}
    about = {"student": model.student.description, "options": model.options, "pixels": pixels}
    metadata = {"format": "pt", METADATA: json.dumps(about)}
    return paths.write_whole(path, lambda part: save_file(state, part, metadata=metadata))


def load(path: str | Path, teacher: VisionTransformer | None = None) -> AttentionTransfer:
    """Read what `export` wrote, in eval mode; a student that copies needs its teacher again.

    Raises FileNotFoundError, and ValueError for a file of another maker or a teacher that does not fit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no student {path}: attention_students.export writes it")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} was not written by attention_students.export: {error!r}") from error
    arguments, options = dict(about["student"]), dict(about["options"])
    own = {name: arguments.pop(name) for name in attention.get(arguments["mixer"]).defaults if name in arguments}
    known = {name: arguments.pop(name) for name in ("name", "num_classes", "mixer", "global_pool")}
    size = arguments.pop("img_size", None)
    student = create_student(**known, img_size=size, architecture=arguments, **own)
    if not options["mode"].startswith("copy"):
        options |= {"mode": "none", "layers": None, "heads": None, "average": None}  # it stands alone
    model = AttentionTransfer(student, teacher, **options)
    model.student.load_state_dict(state)
    for name, values in about["pixels"].items():
        getattr(model, name).copy_(torch.tensor(values).view(1, 3, 1, 1))
    return model.eval()
