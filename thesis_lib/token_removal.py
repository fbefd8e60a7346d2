"""Adaptive tokens that run faster: A-ViT's halting by taking tokens out instead of masking them.

The kept tokens of a batch lie in one matrix, image after image, so that norms, projections and MLPs compute nothing
else. Attention takes images of similar length together, in padded buckets. An image whose class token halts is done.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from thesis_lib.adaptive_tokens import AdaptiveViT, Halting
from thesis_lib.closed_form import mlp_cost

STEP = 16


@dataclass(frozen=True)
class Removed:
    """What the engine gives: features (B, D) before the final norm, and tokens (L, B), how many each block computed."""

    features: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Bucket:
    """Images that attention takes together: rows start to stop of the padded matrix are `images` x `length` tokens."""

    start: int
    stop: int
    images: int
    length: int
    hidden: Tensor | None  # (images, 1, 1, length), -inf on padding; None where there is none


def buckets_of(lengths: np.ndarray, step: int, count: int) -> list[tuple[int, int, int]]:
    """Part descending lengths into (first image, last + 1, padded length): up to a multiple of `step`, at most `count`.

    Kernels are quickest at multiples of their vectors: 48 tokens take less time than 41.
    """
    padded = np.minimum(-(-lengths // step) * step, count)
    starts = np.flatnonzero(np.diff(padded, prepend=-1))
    return [(int(i), int(j), int(padded[i])) for i, j in pairwise([*starts, len(lengths)])]


class Layout:
    """Where the tokens of each image lie, and in which buckets attention takes them.

    lengths: (images,), descending. gather: (P,), the row of each padded position; back: (T,), the padded position of
    each row; both None where nothing is padded.
    """

    def __init__(self, lengths: np.ndarray, step: int, count: int, device: torch.device) -> None:
        self.lengths = lengths
        self.first = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)  # the rows of the class tokens
        self.buckets, valid, stop = [], [], 0
        for i, j, length in buckets_of(lengths, step, count):
            inside = np.arange(length) < lengths[i:j, None]  # (images, length)
            start, stop = stop, stop + inside.size
            hidden = None
            if not inside.all():
                hidden = torch.from_numpy(np.where(inside, 0, -np.inf).astype(np.float32))[:, None, None].to(device)
            self.buckets.append(Bucket(start, stop, j - i, length, hidden))
            valid.append(inside.ravel())
        valid = np.concatenate(valid)
        self.gather = self.back = None
        if not valid.all():
            self.gather = torch.from_numpy(np.where(valid, np.cumsum(valid) - 1, 0)).to(device)
            self.back = torch.from_numpy(np.flatnonzero(valid)).to(device)


class TokenRemoval(AdaptiveViT):
    """The model in its fast form: the same weights and constants, the same results, without gradients.

    Results equal the masked form's to rounding; a token whose summed scores lie within rounding of 1 - eps may halt a
    layer earlier or later. Dropout does not apply.
    step: attention pads the tokens of an image to a multiple of it and takes equal ones together; 1 pads nothing.
    Raises ValueError for a model without halting constants, and a step below 1.
    """

    def __init__(self, model: AdaptiveViT, step: int = STEP) -> None:
        super(AdaptiveViT, self).__init__()
        if not isinstance(model, AdaptiveViT):
            raise ValueError(f"tokens of a {type(model).__name__} do not halt: AdaptiveViT(vit, preset('paper')) does")
        self.vit, self.step = model.vit, step
        self._model = [model]  # in a list, so that its parameters are not registered twice
        if step < 1:
            raise ValueError(f"step={step} must be at least 1")
        self.eval()

    @property
    def halting(self) -> Halting:
        """The constants of the model it was made from, which may be changed there."""
        return self._model[0].halting

    @torch.no_grad()
    def run(self, images: Tensor) -> Removed:
        x = self.embed(images)  # (B, K, D)
        batch, count, dim = x.shape
        depth, step = len(self.vit.blocks), self.step
        features, tokens = x.new_zeros(batch, dim), np.zeros((depth, batch), np.int64)
        if batch == 0:
            return Removed(features, torch.from_numpy(tokens))
        x, total = x.reshape(-1, dim), torch.zeros(batch * count, device=x.device)  # (T, D), (T,)
        owner, image = np.arange(batch), torch.arange(batch, device=x.device)  # of each image left
        layout = Layout(np.full(batch, count), step, count, x.device)
        for layer, block in enumerate(self.vit.blocks):
            tokens[layer, owner] = layout.lengths
            x = _packed_block(block, x, layout)
            score = self.halting.score(x)  # (T,)
            halts = total + score >= 1 - self.halting.eps
            ends = halts[layout.first] | (layer == depth - 1)  # of the class tokens, (images,)
            weight = torch.where(ends, 1 - total[layout.first], score[layout.first])
            features[image] += weight[:, None].to(x.dtype) * x[layout.first]
            if layer == depth - 1:
                break
            total += score
            keep = ~(halts.cpu().numpy() | np.repeat(ends.cpu().numpy(), layout.lengths))
            kept = np.add.reduceat(keep.astype(np.int64), np.cumsum(layout.lengths) - layout.lengths)  # (images,)
            if keep.all():
                continue
            ranked = np.argsort(-kept, kind="stable")  # the longest first, so that the finished ones come last
            order, place = ranked[: np.count_nonzero(kept)], np.argsort(ranked)
            if len(order) == 0:
                break
            rows = np.flatnonzero(keep)
            rows = rows[np.argsort(np.repeat(place, layout.lengths)[rows], kind="stable")]
            rows, chosen = (torch.from_numpy(index).to(x.device) for index in (rows, order))
            x, total = x.index_select(0, rows), total[rows]
            owner, image = owner[order], image[chosen]
            layout = Layout(kept[order], step, count, x.device)
        return Removed(features, torch.from_numpy(tokens))


def _packed_block(block: Block, x: Tensor, layout: Layout) -> Tensor:
    """Run one block on the rows (T, D) of a layout."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x))  # (T, 3D)
    qkv = qkv if layout.gather is None else qkv.index_select(0, layout.gather)  # (P, 3D)
    mixed = qkv.new_empty(len(qkv), x.shape[1])  # (P, D)
    for bucket in layout.buckets:
        part = qkv[bucket.start : bucket.stop].view(bucket.images, bucket.length, 3, attn.num_heads, attn.head_dim)
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)  # (b, h, n, d_h)
        hidden = None if bucket.hidden is None else bucket.hidden.to(q.dtype)
        out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, hidden, scale=attn.head_dim**-0.5)
        place = mixed[bucket.start : bucket.stop].view(bucket.images, bucket.length, attn.num_heads, attn.head_dim)
        place.copy_(out.transpose(1, 2))
    mixed = mixed if layout.back is None else mixed.index_select(0, layout.back)  # (T, D)
    x = x + block.ls1(attn.proj(attn.norm(mixed)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def executed_macs(vit: VisionTransformer, tokens: Tensor, *, step: int = STEP) -> int:
    """Return the multiply-adds that the engine executes for one batch, in closed form, from its tokens (L, B).

    Patch embedding, per token 4d² + 2d·hidden, per bucket of b images padded to n tokens 2bn²d, and the head: equal to
    what FlopCounterMode counts, padding included. step as in `TokenRemoval`; with 1, tokens alone.
    """
    dim, embed = vit.embed_dim, vit.patch_embed
    count = embed.num_patches + vit.num_prefix_tokens
    macs = tokens.shape[1] * (embed.num_patches * embed.proj.weight[0].numel() * dim + vit.num_classes * dim)
    for block, counts in zip(vit.blocks, tokens.numpy(), strict=True):
        lengths = np.sort(counts[counts > 0])[::-1]
        macs += int(lengths.sum()) * (4 * dim**2 + mlp_cost(block.mlp, 1).macs)
        for i, j, length in buckets_of(lengths, step, count):
            macs += (j - i) * 2 * length**2 * dim
    return macs


def dense_macs(vit: VisionTransformer) -> int:
    """Return the multiply-adds of one image when no token halts."""
    count = vit.patch_embed.num_patches + vit.num_prefix_tokens
    return executed_macs(vit, torch.full((len(vit.blocks), 1), count))
