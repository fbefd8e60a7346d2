"""The runs of notebook 05: every student learns from the same images in the same order, beside the same teacher."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from thesis_lib import backbone as backbones
from thesis_lib import gpu
from thesis_lib.attention.base import suggest
from thesis_lib.attention_students import create_student, load_encoder
from thesis_lib.attention_training import accuracy_row, predict, train_classifier
from thesis_lib.attention_transfer import AttentionTransfer
from thesis_lib.datasets import pixels
from thesis_lib.trainer import train_each

TRANSFER = ("mode", "end_layer", "layers", "heads", "average", "drop_path")
TRAINING = ("epochs", "min_lr", "warmup_epochs", "layer_decay", "beta2", "weight_decay", "ema_decay", "atd_weight")
RECIPE = (*TRANSFER, *TRAINING, "blr", "min_blr", "augmentation", "init")


@dataclass(frozen=True)
class Outcome:
    """One finished run: the model, its log (a row an epoch), and its scores of the test images (n, classes).

    model: on the CPU; None where `run` was told not to keep it.
    """

    model: AttentionTransfer | None
    log: list[dict]
    scores: Tensor

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluation left out."""
        return sum(row["seconds"] for row in self.log)


@dataclass(frozen=True)
class Study:
    """What all runs share. A recipe is a dictionary with any of the names in RECIPE.

    data: (pixels, labels) of "train", "validation" and "test". folder: where each run has its checkpoint.
    blr: the rate per 256 images of a step, as the published recipes give it: lr = blr * batch * processes / 256.
    min_blr: where the schedule ends, per 256 images likewise; min_lr: the same as it is. ema_decay: per 256 images, so
    that as many are averaged over whatever the batch.
    init: start from the teacher's encoder instead of random weights (fine-tuning).
    average: "heads", "queries", or "examples" (maps averaged over the training images, a copy's control).
    options: those of `training.fit` (device, mixed_precision, resume, seed, ...) and max_batches.
    """

    backbone: str
    pretrained: bool | str | Path
    img_size: int
    data: Mapping[str, tuple[Any, np.ndarray]]
    classes: int
    batch_size: int
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def teacher(self) -> VisionTransformer:
        """Build the pretrained teacher, which all runs share."""
        return backbones.create(self.backbone, pretrained=self.pretrained, img_size=self.img_size)

    def run(
        self, name: str, recipe: Mapping[str, Any], *, mixer: str = "mha", keep: bool = True, **mixer_options: Any
    ) -> Outcome:
        """Train one student from the study's seed, or take up its checkpoint, and score the test images once.

        keep: hold on to the model, in the CPU's memory.
        Raises ValueError for a name that no recipe has.
        """
        for key in recipe:
            if key not in RECIPE:
                raise ValueError(f"a recipe has no {key!r}{suggest(key, RECIPE)}; it has {', '.join(RECIPE)}")
        seed, device = self.options.get("seed", 0), self.options.get("device")
        size = {"img_size": self.img_size, "seed": seed}
        student = create_student(self.backbone, self.classes, mixer=mixer, **size, **mixer_options)
        mode, teacher = recipe.get("mode", "none"), None
        if mode != "none" or recipe.get("init"):
            teacher = self.teacher
        if recipe.get("init"):
            load_encoder(student, teacher.state_dict(), self.backbone)
        transfer = {key: recipe[key] for key in TRANSFER if key in recipe}
        examples = transfer.get("average") == "examples"
        model = AttentionTransfer(
            student, teacher, **transfer | ({"average": None} if examples else {}) | {"mode": mode}
        )
        if device:
            model.to(gpu.own(device))
        if examples:
            model.teacher.fix_maps(self._normalised(model))
        scale = self.batch_size * int(os.environ.get("WORLD_SIZE", "1")) / 256
        training = {key: recipe[key] for key in TRAINING if key in recipe}
        if recipe.get("ema_decay"):
            training["ema_decay"] = recipe["ema_decay"] ** scale
        if "min_blr" in recipe:
            training["min_lr"] = recipe["min_blr"] * scale
        log = train_classifier(
            model,
            *self.data["train"],
            self.data["validation"],
            batch_size=self.batch_size,
            lr=recipe["blr"] * scale,
            schedule="cosine",
            augmentation=recipe.get("augmentation"),
            checkpoint=self.folder / f"{name}.checkpoint",
            **training,
            **self.options,
        )
        scores = predict(model, self.data["test"][0], batch_size=self.batch_size, device=device)
        model.zero_grad()
        model.cpu()  # the shared teacher, too
        return Outcome(model if keep else None, log, scores)

    def run_all(self, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Outcome]:
        """Do several runs, given by name with the other arguments of `run`; on a CPU side by side (`train_each`)."""
        quiet = replace(self, options={**self.options, "progress": False})
        longest_first = sorted(runs, key=lambda name: -_effort(runs[name]["recipe"]))  # so that all end together
        calls = [(quiet, name, runs[name]) for name in longest_first]
        found = train_each(_run, calls, device=self.options.get("device"))
        done = dict(zip(longest_first, found, strict=True))
        return {name: done[name] for name in runs}

    def row(self, scores: Tensor, **protocol: Any) -> dict:
        """Return the test accuracy of scores (n, classes) as a result row."""
        return accuracy_row(scores, self.data["test"][1], split="test", image_size=self.img_size, **protocol)

    def _normalised(self, model: AttentionTransfer) -> Iterable[Tensor]:
        images = self.data["train"][0]
        for rows in torch.arange(len(images)).split(self.batch_size):
            yield (images[rows.numpy()].to(model.mean.device).float() / 255 - model.mean) / model.std


def readable(sources: Sequence, size: int, *, on_error: str = "raise") -> tuple[pixels.Pixels, np.ndarray]:
    """Cache images; return those that could be read, and their positions among the sources, (n,)."""
    cached = pixels.cache(sources, size, on_error=on_error)
    rows = np.flatnonzero(cached.usable)
    return (pixels.cache([sources[i] for i in rows], size) if cached.skipped else cached), rows


def _effort(recipe: Mapping[str, Any]) -> float:
    # A distilled epoch runs the teacher as well and matches maps.
    return recipe.get("epochs", 1) * (1.5 if recipe.get("mode", "none").startswith("distill") else 1.0)


def _run(call: tuple[Study, str, Mapping[str, Any]]) -> Outcome:
    study, name, given = call
    return study.run(name, **given)


@torch.no_grad()
def class_token_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Return where the class token looks, by block, mean over heads: (B, depth, patches); rows sum to less than 1.

    model: a student that does not copy, or a backbone of mixers with a map; images are what it takes.
    """
    backbone = getattr(model, "student", model)
    found: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda attn, inputs: found.append(attn.attention_map(inputs[0])))
        for block in backbone.blocks
    ]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([maps.mean(1)[:, 0, backbone.num_prefix_tokens :] for maps in found], dim=1)
