"""What is trained for correspondence: an extractor's one map, with or without an upsampler, fully or by LoRA."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from thesis_lib import backbone as backbones
from thesis_lib.attention import suggest
from thesis_lib.checkpoint import digest
from thesis_lib.correspondence.diffusion import DiffusionFeatures
from thesis_lib.correspondence.features import ViTFeatures
from thesis_lib.correspondence.hyperfeatures import Hyperfeatures

TUNINGS = ("full", "lora", "upsampler")
UNET_TARGETS = ["to_q", "to_k", "to_v"]


class Upsampler(nn.Module):
    """Make a map (B, C, h, w) `factor` times as fine: bilinear upsampling plus what two transposed convolutions learn.

    The last convolution starts at zero, so that training starts from plain upsampling.
    """

    def __init__(self, channels: int, factor: int = 4) -> None:
        super().__init__()
        if factor < 2 or factor % 2:
            raise ValueError(f"the upsampler's factor must be an even number from 2 on, not {factor}")
        self.factor, rest = factor, factor // 2
        self.first = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.last = nn.ConvTranspose2d(channels, channels, rest + 2, stride=rest, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        plain = F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)
        return plain + self.last(F.gelu(self.first(x)))


class Student(nn.Module):
    """One map of an extractor, refined by an upsampler where there is one; itself an extractor, of key "student"."""

    keys = ["student"]

    def __init__(self, extractor: nn.Module, key: str | None = None, upsampler: nn.Module | None = None) -> None:
        super().__init__()
        key = key or extractor.keys[-1]
        if key not in extractor.keys:
            raise ValueError(
                f"the extractor makes {', '.join(extractor.keys)}, not {key!r}{suggest(key, extractor.keys)}"
            )
        self.extractor, self.key, self.upsampler, self.size = extractor, key, upsampler, extractor.size
        self.reads_categories = getattr(extractor, "reads_categories", False)

    def describe(self) -> dict[str, Any]:
        upsampler = None if self.upsampler is None else digest(self.upsampler.state_dict().items())
        return {"kind": "student", "of": self.extractor.describe(), "key": self.key, "upsampler": upsampler}

    def forward(self, x: Tensor, categories: Sequence[str] | None = None) -> dict[str, Tensor]:
        found = self.extractor(x, categories)[self.key].float()
        return {"student": found if self.upsampler is None else self.upsampler(found)}


def tune(
    student: Student,
    how: str,
    *,
    layers: Sequence[int] | None = None,
    rank: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.05,
    factor: int = 4,
) -> Student:
    """Choose what training changes, in place: "full" (all that the map depends on), "lora", or a new "upsampler" alone.

    layers: blocks of a ViT that LoRA adapts (negative from the end), all by default. A U-Net's adapters are in its
    attention's queries, keys and values. Raises ValueError for another way or a layer that there is not.
    """
    if how not in TUNINGS:
        raise ValueError(f"unknown tuning {how!r}{suggest(how, TUNINGS)}; known: {', '.join(TUNINGS)}")
    student.requires_grad_(False)
    extractor = student.extractor
    if how == "upsampler":
        blank = torch.zeros(1, 3, student.size, student.size, device=_device(student))
        with torch.no_grad():
            channels = extractor(blank, None)[student.key].shape[1]
        student.upsampler = Upsampler(channels, factor).to(_device(student))
    elif how == "full":
        for part in _core(extractor):
            part.requires_grad_(True)
    elif isinstance(extractor, ViTFeatures):
        _lora(extractor, layers, rank, alpha, dropout)
    elif isinstance(extractor, DiffusionFeatures):
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=UNET_TARGETS)
        inject_adapter_in_model(config, extractor.unet)
    else:
        raise ValueError(f"there are no projections for LoRA in {type(extractor).__name__}: tune it in full")
    trained = [p for p in student.parameters() if p.requires_grad]
    blank = torch.zeros(1, 3, student.size, student.size, device=_device(student))
    with torch.enable_grad():
        total = student.eval()(blank)["student"].sum()
    for parameter, slope in zip(trained, torch.autograd.grad(total, trained, allow_unused=True), strict=True):
        parameter.requires_grad_(slope is not None)  # what comes after the map would stop distributed training
    return student


def _core(extractor: nn.Module) -> list[nn.Module | nn.Parameter]:
    """Return what full tuning trains: a ViT, a U-Net, or the aggregator of Hyperfeatures."""
    if isinstance(extractor, Hyperfeatures):
        return [extractor.bottlenecks, extractor.mixing]
    return [extractor.backbone if isinstance(extractor, ViTFeatures) else extractor.unet]


def _lora(extractor: ViTFeatures, layers: Sequence[int] | None, rank: int, alpha: float, dropout: float) -> None:
    depth = len(extractor.backbone.blocks)
    chosen = range(depth) if layers is None else layers
    if wrong := [layer for layer in chosen if not -depth <= layer < depth]:
        raise ValueError(f"layers {wrong} are not among the model's {depth} blocks")
    inside = {f"blocks.{layer % depth}." for layer in chosen}
    backbones.add_lora(extractor.backbone, rank=rank, alpha=alpha, dropout=dropout)  # in place
    for name, parameter in extractor.backbone.named_parameters():
        if parameter.requires_grad:  # an adapter that is not trained adds nothing: its B stays zero
            parameter.requires_grad_(any(part in f"{name}" for part in inside))


def merge(student: Student) -> Student:
    """Merge LoRA adapters into the weights, in place; a student without any comes back as it is."""
    for module in list(student.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "get_base_layer") and hasattr(child, "merge"):
                child.merge()
                setattr(module, name, child.get_base_layer())
    return student.requires_grad_(False).eval()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
