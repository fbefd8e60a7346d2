"""Attention transfer (arXiv 2411.09702): a student from random weights copies, or learns, a frozen teacher's attention.

Copy: in the transferred layers the student's tokens are mixed by the teacher's maps, softmax(q k^T / sqrt(d_h)) head by
head and class token included, so the teacher runs at inference too and the student needs no q and k there. Distil: the
student mixes by its own maps and learns from the loss

    sum over layers of the mean over batch, heads and rows of -sum_j T_j log S_j         (T teacher, S student)

added to the task's; then it stands alone. copy_q, copy_k, copy_v and distill_q, distill_k, distill_v do the same with
one of the projections (distilled by the mean squared error).
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from thesis_lib import backbone as backbones
from thesis_lib.attention.base import suggest
from thesis_lib.attention.mha import MHA
from thesis_lib.attention_teacher import (
    TENSORS,
    Teacher,
    add_branch,
    check_blocks,
    cross_entropy,
    entropy,
    feed_forward,
    first_tokens,
    head_rows,
    mean_feed_forward,
    mix,
    on_key_set,
    project,
    reads,
    take_rows,
    transferred_layers,
)

MODES = ("none", "copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v")


class CopiedAttention(nn.Module):
    """An attention layer some of whose heads get their map, or their q, k or v, from a teacher.

    Only what is not given is computed: with all heads' maps given there are no queries and no keys, and no parameters
    of them.
    """

    def __init__(self, attn: MHA, tensor: str, heads: Sequence[int]) -> None:
        super().__init__()
        everything = list(range(attn.num_heads))
        own = [head for head in everything if head not in heads]
        computed = {part: own if part in TENSORS[tensor] else everything for part in "qkv"}
        self.tensor, self.heads, self.own, self.head_dim = tensor, list(heads), own, attn.head_dim
        self.num_heads, self.counts = attn.num_heads, [len(computed[part]) for part in "qkv"]
        self.order = [(self.heads + own).index(head) for head in everything]
        self.rows = take_rows(attn.qkv, head_rows(attn, computed))
        names = [name for name, part in (("q_norm", "q"), ("k_norm", "k")) if computed[part]]
        for name in (*names, "norm", "proj", "proj_drop"):
            self.add_module(name, copy.deepcopy(getattr(attn, name)))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """Mix tokens (B, N, D) -> (B, N, D); given: (B, |heads|, N, N or d_h)."""
        parts = self.rows(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, computed heads, N, d_h)
        q, k, v = parts.split(self.counts, dim=1)
        q = self.q_norm(q) if self.counts[0] else q
        k = self.k_norm(k) if self.counts[1] else k
        if self.tensor == "map":
            mixed = given @ (v[:, self.heads] if self.own else v)
            if self.own:
                mixed = self._in_order(mixed, attend(q, k, v[:, self.own]))
        else:
            q, k, v = (
                self._in_order(given.to(own.dtype), own) if name == self.tensor else own
                for name, own in zip("qkv", (q, k, v), strict=True)
            )
            mixed = attend(q, k, v)
        return self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).flatten(2))))

    def _in_order(self, given: Tensor, own: Tensor) -> Tensor:
        return torch.cat([given, own], dim=1)[:, self.order] if self.own else given


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, h, N, d_h) by the fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


class MatchedAttention(torch.autograd.Function):
    """softmax(scale q k^T) v and the cross-entropy of that map to a target: (B, h, N, d_h), and a scalar.

    qkv: (3, B, h, N, d_h), in one piece of memory. target: (B, h, N, N), rows that sum to 1. counts: (h, 1), 1 for a
    head that is matched, 0 for one that is not, whose target is 0.
    By the scores, the derivative of the cross-entropy is the map less the target: what autograd would keep and pass
    over several times, log-softmax, exponential and their product with the target, need not be in memory. The three
    gradients are written where the projection wants them, in one piece.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, scale: float, target: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.flatten(1, 2)  # (B h, N, d_h)
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale).float().view(target.shape)
        maps = scores.softmax(-1)
        total = scores.amax(-1) - maps.amax(-1).log()  # log-sum-exp, (B, h, N): the largest entry of a map is not 0
        rows = counts.sum() * target.shape[0] * target.shape[2]
        loss = ((counts * total).sum() - torch.dot(target.float().flatten(), scores.flatten())) / rows
        mixed = (maps.to(v.dtype).flatten(0, 1) @ v).view(qkv.shape[1:])
        ctx.scale = scale
        ctx.save_for_backward(qkv, target, maps, mixed, (counts / rows).unsqueeze(-1))
        return mixed, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, mixed_grad: Tensor, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, target, maps, mixed, shares = ctx.saved_tensors
        each = loss_grad * shares  # (h, 1, 1)
        inner = (mixed_grad * mixed).sum(-1, keepdim=True, dtype=torch.float)  # (B, h, N, 1)
        mixed_grad = mixed_grad.flatten(0, 1).contiguous()
        (q, k, v), grads = qkv.flatten(1, 2), torch.empty_like(qkv)
        by_q, by_k, by_v = grads.flatten(1, 2)
        by_scores = (mixed_grad @ v.mT).float().view(target.shape)
        by_scores.sub_(inner - each).mul_(maps).addcmul_(target.float(), each, value=-1)
        by_scores = by_scores.to(q.dtype).flatten(0, 1)
        torch.baddbmm(by_q, by_scores, k, beta=0, alpha=ctx.scale, out=by_q)
        torch.baddbmm(by_k, by_scores.mT, q, beta=0, alpha=ctx.scale, out=by_k)
        torch.bmm(maps.to(v.dtype).flatten(0, 1).mT, mixed_grad, out=by_v)
        return grads, None, None, None


class AttentionTransfer(nn.Module):
    """A student, and what it takes from a frozen teacher: images (B, 3, H, W) in [0, 1] -> logits (B, classes).

    mode: one of MODES; "none" needs no teacher and trains the student alone. end_layer or layers: which blocks (see
    `transferred_layers`); heads: which heads, None for all. average: a control, see `Teacher`.
    drop_path: stochastic depth, rates rising linearly from 0; student and teacher drop the same branches of the same
    images, so the teacher is noisy too while training, as published. The student is changed in place.

    A student layer with another mixer than MHA is distilled on its own key set, through `Mixer.attention_map`.
    The teacher is no submodule: optimiser, averages, checkpoints and `state_dict` hold the student alone.
    Raises ValueError for an unknown mode, a teacher of another depth, number of heads or grid, a student with a drop
    path of its own or attention dropout, and a mixer whose map cannot be copied or has nothing to learn.
    """

    excess = False  # True: maps are compared by their divergence, the cross-entropy less its least value

    def __init__(
        self,
        student: VisionTransformer,
        teacher: VisionTransformer | None = None,
        *,
        mode: str = "distill",
        end_layer: int = 0,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | int | None = None,
        average: str | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}{suggest(mode, MODES)}; known: {', '.join(MODES)}")
        check_blocks(student, "student")
        if all(type(block.attn) is Attention for block in student.blocks):
            backbones.swap(student, "mha")
        if not all(isinstance(block.drop_path1, nn.Identity) for block in student.blocks):
            raise ValueError("the student has a drop path of its own: build it without, and give drop_path here")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path} must be a rate from 0 to below 1")
        kind, _, tensor = mode.partition("_")
        self.mode, self.drop_path, self.copies, self.tensor = mode, drop_path, kind == "copy", tensor or "map"
        depth = len(student.blocks)
        chosen = [] if mode == "none" else transferred_layers(depth, end_layer=end_layer, layers=layers)
        self.options = {"mode": mode, "layers": chosen, "heads": None, "average": average, "drop_path": drop_path}
        self.__dict__["teacher"] = None  # past nn.Module's register
        if chosen:
            if teacher is None:
                raise ValueError(f"mode {mode!r} needs a teacher")
            give = Teacher(teacher, chosen, tensor=self.tensor, heads=heads, average=average)
            self.__dict__["teacher"] = give
            self.options["heads"] = give.heads
            self._check_teacher(student, give)
            for i in chosen:
                attn = student.blocks[i].attn
                if getattr(getattr(attn, "attn_drop", None), "p", 0):
                    raise ValueError(f"block {i} of the student has attention dropout: build it without")
                if self.copies:
                    student.blocks[i].attn = CopiedAttention(attn, self.tensor, give.heads)
        self.student, self.reads = student, reads(student)
        mean, std = backbones.normalization(student if teacher is None else teacher)
        like = next(student.parameters())
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, like.new_tensor(value).view(1, 3, 1, 1), persistent=False)

    def _check_teacher(self, student: VisionTransformer, teacher: Teacher) -> None:
        what = "patches", "prefix tokens", "heads", "blocks"
        sizes = [
            (tuple(vit.patch_embed.grid_size), vit.num_prefix_tokens, vit.blocks[0].attn.num_heads, len(vit.blocks))
            for vit in (student, teacher.backbone)
        ]
        if sizes[0] != sizes[1]:
            both = ", ".join(f"{a} and {b} {name}" for name, a, b in zip(what, *sizes, strict=True) if a != b)
            raise ValueError(f"student and teacher differ: {both}")
        for i in teacher.layers:
            attn = student.blocks[i].attn
            if type(attn) is MHA:
                if self.tensor != "map" and attn.head_dim != teacher.head_dim:
                    widths = f"{attn.head_dim}, teacher {teacher.head_dim}"
                    raise ValueError(f"{self.mode} needs heads of one width: {widths}")
                continue
            name = getattr(attn, "name", type(attn).__name__)
            if self.mode != "distill":
                raise ValueError(f"block {i} of the student has {name!r}: {self.mode} needs MHA, distill does not")
            count = student.patch_embed.num_patches + student.num_prefix_tokens
            maps = attn.attention_map(next(student.parameters()).new_zeros(1, count, student.embed_dim))
            if maps is None or not maps.requires_grad or maps.shape[1] != teacher.num_heads:
                raise ValueError(
                    f"{name!r} (block {i}) has no attention map of {teacher.num_heads} heads with parameters to learn"
                )

    def _apply(self, fn: Any, recurse: bool = True) -> "AttentionTransfer":
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # follows its student to a device
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)[0])

    def head(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes) for what `features` returns."""
        student = self.student
        if self.reads == "mean":
            return student.head(student.head_drop(student.fc_norm(features[:, 0])))
        return student.forward_head(student.norm(features))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return what the head reads of the last block and, where attention is distilled in training, its loss, else 0.

        That is the class token or the mean of the patches, (B, 1, D), before the final norm; all tokens (B, N, D) where
        the pooling needs them. The last MLP, after which nothing joins the tokens, is computed for no more than that.
        """
        x = (images - self.mean) / self.std
        masks = self.draw_masks(len(x)) if self.training and self.drop_path else None
        wanted = self.teacher is not None and (self.copies or self.training)
        given = self.teacher(x, masks) if wanted else {}
        tokens, loss = first_tokens(self.student, x), 0.0
        for i, block in enumerate(self.student.blocks):
            first, second = (None, None) if masks is None else masks[i]
            if i in given and not self.copies:
                own, term = self._matched(block.attn, block.norm1(tokens), given[i])
                loss = loss + term
                tokens = add_branch(tokens, first, partial(project, block), own)
            else:
                copied = [given[i]] if i in given else []
                tokens = add_branch(tokens, first, partial(mix, block), *copied)
            if block is self.student.blocks[-1] and self.reads == "mean":
                patches = tokens[:, self.student.num_prefix_tokens :]
                mean = patches.mean(1, keepdim=True)
                return add_branch(mean, second, partial(mean_feed_forward, block), patches), loss
            if block is self.student.blocks[-1] and self.reads == "token":
                tokens = tokens[:, :1]
            tokens = add_branch(tokens, second, partial(feed_forward, block))
        return tokens, loss

    def draw_masks(self, batch: int) -> Tensor:
        """Draw the factors of both branches of each block and image: (depth, 2, B, 1, 1), floor(keep + U) / keep.

        They stay on the CPU, where it costs no wait to see which images are left out.
        """
        depth = len(self.student.blocks)
        keep = 1 - torch.linspace(0, self.drop_path, depth).view(-1, 1, 1, 1, 1)
        return torch.floor(keep + torch.rand(depth, 2, batch, 1, 1)) / keep

    def _matched(self, attn: nn.Module, normed: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix tokens as `attn` does; return what `project` takes, and how far its attention is from the target."""
        give = self.teacher
        whole = len(give.heads) == give.num_heads
        if type(attn) is not MHA:
            maps = attn.attention_map(normed)
            maps, target = on_key_set(maps if whole else maps[:, give.heads], target)
            mixed, loss = attn(normed), cross_entropy(maps, target)
        else:
            if self.tensor != "map":
                q, k, v = attn.query_key_value(normed)
                own = {"q": q, "k": k, "v": v}[self.tensor]
                own = own if whole else own[:, give.heads]
                return attn.attend(q, k, v), F.mse_loss(own, target.to(own.dtype))
            counts = target.new_ones(give.num_heads, 1)
            if not whole:
                counts = torch.zeros_like(counts).index_fill_(0, counts.new_tensor(give.heads, dtype=torch.long), 1)
                every = target.new_zeros(*normed.shape[:1], give.num_heads, *target.shape[2:])
                every[:, give.heads] = target
            qkv, scale = attn.stacked(normed), attn.head_dim**-0.5
            mixed, loss = MatchedAttention.apply(qkv, scale, target if whole else every, counts)
        return mixed, loss - entropy(target) if self.excess else loss
