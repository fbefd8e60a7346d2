"""Time a training step of attention transfer against the plain two-network version, and compare their gradients.

    python benchmarks/attention_transfer.py [--backbone demo] [--batch-size 32] [--device cpu]

As published: all layers and no drop path for copy, the first three quarters of the layers and drop path 0.2 for
distillation. Then both of them with half of the layers. --end-layer and --drop-path set both otherwise.

The plain version is what the equations say read literally: the teacher runs through all of its layers and keeps each
layer's logits; a copying student still projects q and k; a distilled one takes softmax and log-softmax of the same
logits; the optimiser holds the whole student and the average the whole pair. Ours is
`thesis_lib.attention_transfer.AttentionTransfer`. A step is forward, backward, AdamW and the exponential average; both
run on the same weights, images and drop-path masks, in one process, in turn. Medians over the rounds, of the times and
of their ratio, after two that warm up, with the notebooks' settings of the allocator. The ratio of the multiply-adds of
forward and backward stands beside. The largest difference of any gradient is in units of the largest gradient.
"""

import argparse
import copy
import statistics
import time

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from thesis_lib import backbone
from thesis_lib.attention_students import create_student
from thesis_lib.attention_transfer import AttentionTransfer
from thesis_lib.processes import keep_memory
from thesis_lib.timing import pinned


class PlainPair(nn.Module):
    """Teacher and student side by side, nothing saved: images (B, 3, H, W) -> logits and the loss of the attention."""

    def __init__(self, teacher: VisionTransformer, student: VisionTransformer, mode: str, layers: int) -> None:
        super().__init__()
        self.teacher, self.student = teacher.requires_grad_(False), student
        self.mode, self.layers = mode, layers

    def forward(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            _, teacher = self.run(self.teacher, x, masks, {})
        given = dict(enumerate(teacher[: self.layers]))
        tokens, student = self.run(self.student, x, masks, given if self.mode == "copy" else {})
        loss = tokens.new_zeros(())
        if self.mode == "distill":
            for i, logits in given.items():
                loss = loss - (logits.softmax(-1) * F.log_softmax(student[i], dim=-1)).sum(-1).mean()
        return self.student.forward_head(self.student.norm(tokens)), loss

    @staticmethod
    def run(model: VisionTransformer, x: Tensor, masks: Tensor | None, given: dict) -> tuple[Tensor, list[Tensor]]:
        tokens, logits = model.norm_pre(model._pos_embed(model.patch_embed(x))), []
        for i, block in enumerate(model.blocks):
            attn = block.attn
            qkv = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            logits.append(given[i] if i in given else q @ k.mT * attn.head_dim**-0.5)
            mixed = attn.proj((logits[-1].softmax(-1) @ v).transpose(1, 2).flatten(2))
            first, second = (1.0, 1.0) if masks is None else masks[i]
            tokens = tokens + first * block.ls1(mixed)
            tokens = tokens + second * block.ls2(block.mlp(block.norm2(tokens)))
        return tokens, logits


def build(name: str, mode: str, end_layer: int, classes: int = 18) -> tuple[PlainPair, AttentionTransfer]:
    """Return both versions with equal weights."""
    teacher = backbone.create(name, pretrained=False)
    student = create_student(name, classes)
    plain = PlainPair(teacher, student, mode, len(student.blocks) + end_layer)
    ours = AttentionTransfer(copy.deepcopy(student), copy.deepcopy(teacher), mode=mode, end_layer=end_layer)
    return plain, ours


def gradients(plain: PlainPair, ours: AttentionTransfer) -> list[tuple[str, Tensor, Tensor]]:
    """Pair the gradients of both students by name; those of rows that ours does not have must be 0 in the plain one."""
    theirs, pairs = {name: p.grad for name, p in plain.student.named_parameters()}, []
    for name, p in ours.student.named_parameters():
        other = theirs.pop(name.replace(".rows.", ".qkv."))
        if other.shape != p.grad.shape:
            unused = len(other) - len(p.grad)
            pairs.append((f"{name}, q and k", other[:unused], torch.zeros_like(other[:unused])))
            other = other[unused:]
        pairs.append((name, other, p.grad))
    assert not theirs
    return pairs


def objective(model: nn.Module, x: Tensor, masks: Tensor | None, labels: Tensor) -> Tensor:
    """Return what a step minimises; ours draws its masks itself."""
    if isinstance(model, PlainPair):
        logits, loss = model(x, None if masks is None else masks.to(x.device))
    else:
        features, loss = model.features(x)
        logits = model.head(features)
    return F.cross_entropy(logits, labels) + 3.0 * loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--end-layer", type=int)
    parser.add_argument("--drop-path", type=float)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_memory()
    device, depth = torch.device(options.device), len(backbone.create(options.backbone, pretrained=False).blocks)
    cases = [
        ("copy", 0, 0.0),
        ("distill", -(depth // 4), 0.2),
        ("copy", -(depth // 2), 0.0),
        ("distill", -(depth // 2), 0.2),
    ]
    if options.end_layer is not None:
        cases = [(mode, options.end_layer, drop_path) for mode, _, drop_path in cases[:2]]
    for mode, end_layer, drop_path in cases:
        drop_path = drop_path if options.drop_path is None else options.drop_path
        torch.manual_seed(0)
        plain, ours = (model.to(device).train() for model in build(options.backbone, mode, end_layer))
        ours.drop_path = drop_path
        size = ours.student.patch_embed.img_size[0]
        images = torch.rand(options.batch_size, 3, size, size, device=device)
        labels = torch.randint(18, (options.batch_size,), device=device)
        masks = ours.draw_masks(len(images)) if drop_path else None
        ours.draw_masks = lambda batch, drawn=masks: drawn

        runs = {}
        for name, model in (("plain", plain), ("ours", ours)):
            x = (images - ours.mean) / ours.std if name == "plain" else images
            trained = [p for p in model.parameters() if p.requires_grad]
            runs[name] = model, x, torch.optim.AdamW(trained, lr=1e-4, fused=True), ModelEmaV3(model), []
        macs = []
        for model, x, *_ in runs.values():
            with pinned("math"), FlopCounterMode(display=False) as counter:  # it does not count every fused kernel
                objective(model, x, masks, labels).backward()
            macs.append(counter.get_total_flops() / 2)
        for turn in range(options.rounds + 2):
            for model, x, optimizer, average, seconds in runs.values():
                start = now(device)
                value = objective(model, x, masks, labels)
                optimizer.zero_grad()
                value.backward()
                if turn:
                    optimizer.step()
                    average.update(model)
                if turn > 1:
                    seconds.append(now(device) - start)
            if turn == 0:  # before any step the weights are equal
                pairs = gradients(plain, ours)
                largest = max(float(a.abs().max()) for _, a, _ in pairs)
                gap = max(float((a - b).abs().max()) for _, a, b in pairs) / largest
        seconds = [run[-1] for run in runs.values()]
        before, after = map(statistics.median, seconds)
        gain = statistics.median(a / b for a, b in zip(*seconds, strict=True))  # within a round: machines drift
        print(
            f"{options.backbone}, {mode}, end_layer {end_layer}, drop path {drop_path:g}, "
            f"batch {options.batch_size}, {device}: "
            f"plain {1e3 * before:.1f} ms, ours {1e3 * after:.1f} ms, {gain:.2f} x "
            f"(multiply-adds {macs[0] / macs[1]:.2f} x); gradients within {gap:.1e}"
        )


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
