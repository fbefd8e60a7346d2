"""The frozen side of attention transfer: what a pretrained ViT's attention does, at no more than it costs to know.

"On the Surprising Effectiveness of Attention Transfer for Vision Transformers" (arXiv 2411.09702) lets a student that
starts from random weights use, or learn, the attention of a pretrained teacher, and nothing else of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from thesis_lib import backbone as backbones
from thesis_lib.attention.base import suggest
from thesis_lib.attention.mha import MHA

TENSORS = {"map": "qk", "q": "q", "k": "k", "v": "v"}  # what is transferred, and the projections that it takes
AVERAGES = ("heads", "queries")


def transferred_layers(depth: int, *, end_layer: int = 0, layers: Sequence[int] | None = None) -> list[int]:
    """Return the blocks that are transferred: the first depth + end_layer ones, or those of `layers`, in order.

    end_layer: 0 or negative (arXiv 2411.09702's option: -6 of 24 blocks leaves the first 18). layers: distinct indices,
    negative ones count from the end. (The released code never passes its option on and always leaves out three.)
    Raises ValueError for what is out of range, and for both at once.
    """
    if layers is None:
        if not -depth <= end_layer <= 0:
            raise ValueError(f"end_layer={end_layer} must be from {-depth} to 0: depth + end_layer blocks are taken")
        return list(range(depth + end_layer))
    if end_layer:
        raise ValueError(f"give layers={list(layers)} or end_layer={end_layer}, not both")
    return _indices("layers", layers, depth)


def transferred_heads(heads: int, chosen: Sequence[int] | int | None) -> list[int]:
    """Return the heads that are transferred: all for None, the first n for an integer, else those named, in order."""
    if chosen is None:
        return list(range(heads))
    if isinstance(chosen, int):
        if not 1 <= chosen <= heads:
            raise ValueError(f"heads={chosen} must be from 1 to {heads}")
        return list(range(chosen))
    if not chosen:
        raise ValueError("heads=[] leaves nothing to transfer; leave out the layers instead: layers=[]")
    return _indices("heads", chosen, heads)


def _indices(name: str, chosen: Sequence[int], count: int) -> list[int]:
    found = sorted({i % count for i in chosen if -count <= i < count})
    if len(found) != len(list(chosen)):
        raise ValueError(f"{name}={list(chosen)}: give distinct integers from {-count} to {count - 1}")
    return found


def check_blocks(model: nn.Module, who: str) -> None:
    """Raise ValueError unless `model` is a timm ViT of plain pre-norm blocks that keeps all of its tokens."""
    if not isinstance(model, VisionTransformer) or not all(type(block) is Block for block in model.blocks):
        raise ValueError(f"the {who} must be a timm VisionTransformer of plain blocks, not {type(model).__name__}")
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(f"the {who} drops patches, so its tokens are not those of the other")


def first_tokens(model: VisionTransformer, x: Tensor) -> Tensor:
    """Return what the first block gets: normalised images (B, 3, H, W) -> tokens (B, N, D)."""
    return model.norm_pre(model._pos_embed(model.patch_embed(x)))


def add_branch(x: Tensor, mask: Tensor | None, branch: Callable[..., Tensor], *beside: Tensor) -> Tensor:
    """Add a residual branch, `branch(x, *beside)`, to x (B, N, D), times its drop-path factors where there are any.

    mask: (B, 1, 1) on the CPU. Images that drop the branch (factor 0) are not computed.
    """
    kept = None if mask is None else mask.flatten().nonzero().flatten()
    if kept is None:
        return x + branch(x, *beside)
    if len(kept) in (0, len(x)):  # of no image at all there would be no gradient, which averaging over processes needs
        return x + branch(x, *beside) * mask.to(x.device)
    factor, kept = mask[kept].to(x.device), kept.to(x.device)
    # Not x[kept], whose gradient a CPU adds up number by number.
    added = branch(*(part.index_select(0, kept) for part in (x, *beside))) * factor
    return x.index_add(0, kept, added.to(x.dtype))


def mix(block: Block, x: Tensor, *given: Tensor) -> Tensor:
    """Return a block's attention branch of x (B, N, D), without drop path; given: what its attention copies."""
    return block.ls1(block.attn(block.norm1(x), *given))


def project(block: Block, _: Tensor, mixed: Tensor) -> Tensor:
    """Return the attention branch of what heads mixed, (B, h, N, d_h), or of tokens (B, N, D) that are projected."""
    return block.ls1(block.attn.project_heads(mixed) if mixed.ndim == 4 else mixed)


def feed_forward(block: Block, x: Tensor) -> Tensor:
    """Return a block's MLP branch of x (B, N, D), without drop path."""
    return block.ls2(block.mlp(block.norm2(x)))


def reads(model: VisionTransformer) -> str:
    """Say what the head reads of the last block: its class "token", the "mean" of its patches, or "all" tokens.

    "mean" where that mean may be taken before the block's last projection: no norm and no dropout lies between.
    """
    if model.attn_pool is not None or model.pool_include_prefix:
        return "all"
    mlp, plain = model.blocks[-1].mlp, isinstance(model.norm, nn.Identity)
    plain &= type(mlp) is Mlp and type(mlp.fc2) is nn.Linear and not mlp.drop2.p
    return {"token": "token", "avg": "mean" if plain else "all"}.get(model.global_pool, "all")


def mean_feed_forward(block: Block, _: Tensor, patches: Tensor) -> Tensor:
    """Return the mean over patches (B, N, D) of the MLP branch, (B, 1, D): the last projection of their mean."""
    mlp = block.mlp
    hidden = mlp.norm(mlp.drop1(mlp.act(mlp.fc1(block.norm2(patches)))))  # (B, N, 4 D)
    return block.ls2(mlp.fc2(hidden.mean(1, keepdim=True)))


def take_rows(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """Copy some output rows of a linear layer into one of its own."""
    part = nn.utils.skip_init(
        nn.Linear, linear.in_features, len(rows), bias=linear.bias is not None, device=linear.weight.device
    ).to(linear.weight.dtype)
    with torch.no_grad():
        part.weight.copy_(linear.weight[rows])
        if linear.bias is not None:
            part.bias.copy_(linear.bias[rows])
    return part


def head_rows(attn: MHA, heads: Mapping[str, Sequence[int]]) -> Tensor:
    """Give the rows of `attn.qkv` that compute these heads of "q", "k" and "v", in that order."""
    first = [("qkv".index(part) * attn.num_heads + head) * attn.head_dim for part in "qkv" for head in heads[part]]
    return (torch.tensor(first, dtype=torch.long)[:, None] + torch.arange(attn.head_dim)).flatten()


class Teacher(nn.Module):
    """A frozen ViT with MHA that runs to the last of `layers` and there computes only what is asked for.

    tensor: "map", softmax(q k^T / sqrt(d_h)), class token included, (B, h, N, N); or "q", "k", "v" of each head, not
    scaled, (B, h, N, d_h). heads: which of them. average: a control, for maps: the mean over "heads" or over "queries"
    stands in for each of them; `fix_maps` gives that over examples.
    The maps are in memory anyway, so one product of queries and keys gives both what is transferred and the teacher's
    own next tokens. The backbone is frozen in place. Copies of a student share it: copying gives the teacher itself.
    Raises ValueError for a backbone without plain blocks or with another mixer than MHA.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        layers: Sequence[int] | None = None,
        *,
        tensor: str = "map",
        heads: Sequence[int] | int | None = None,
        average: str | None = None,
    ) -> None:
        super().__init__()
        check_blocks(backbone, "teacher")
        if not all(type(block.attn) is MHA for block in backbone.blocks):
            backbones.swap(backbone, "mha")  # refuses any mixer that is not attention
        if tensor not in TENSORS:
            raise ValueError(f"tensor {tensor!r} is not one of {', '.join(TENSORS)}{suggest(tensor, TENSORS)}")
        if average is not None and (average not in AVERAGES or tensor != "map"):
            raise ValueError(f"average={average!r} must be None or, for maps, one of {', '.join(AVERAGES)}")
        self.backbone = backbone.requires_grad_(False)
        self.tensor, self.average = tensor, average
        attn = backbone.blocks[0].attn
        self.depth, self.num_heads, self.head_dim = len(backbone.blocks), attn.num_heads, attn.head_dim
        self.layers = transferred_layers(self.depth, layers=range(self.depth) if layers is None else layers)
        self.heads = transferred_heads(self.num_heads, heads)
        if not self.layers:
            raise ValueError("a teacher of no layers has nothing to give")
        needed = {part: self.heads if part in TENSORS[tensor] else [] for part in "qkv"}
        last = backbone.blocks[self.layers[-1]].attn
        self.last = take_rows(last.qkv, head_rows(last, needed)).requires_grad_(False)
        self.register_buffer("fixed", None)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)  # it is never trained, and its drop path is its student's

    def __deepcopy__(self, memo: dict) -> "Teacher":
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, masks: Tensor | None = None) -> dict[int, Tensor]:
        """Give what is transferred by layer: normalised images (B, 3, H, W) -> {layer: (B, |heads|, N, N or d_h)}.

        masks: (depth, 2, B, 1, 1) on the CPU, the factors of both residual branches of each block.
        """
        if self.fixed is not None:
            return dict(zip(self.layers, self.fixed.unsqueeze(1).expand(-1, len(x), -1, -1, -1), strict=True))
        tokens, taken = first_tokens(self.backbone, x), {}
        for i, block in enumerate(self.backbone.blocks):
            first, second = (None, None) if masks is None else masks[i]
            if i not in self.layers:
                tokens = add_branch(tokens, first, partial(mix, block))
            else:
                attn, normed = block.attn, block.norm1(tokens)
                if i == self.layers[-1]:
                    taken[i] = self._last(attn, normed)
                    return taken
                q, k, v = attn.query_key_value(normed)
                if self.tensor == "map":
                    maps = attn.weights(q, k)
                    taken[i], mixed = self._averaged(self._of_heads(maps)), maps @ v
                else:
                    taken[i], mixed = self._of_heads({"q": q, "k": k, "v": v}[self.tensor]), attn.attend(q, k, v)
                tokens = add_branch(tokens, first, partial(project, block), mixed)
            tokens = add_branch(tokens, second, partial(feed_forward, block))
        raise AssertionError("the last layer was never reached")

    def _last(self, attn: MHA, normed: Tensor) -> Tensor:
        parts = self.last(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, |parts| |heads|, N, d_h)
        if self.tensor == "map":
            q, k = parts.chunk(2, dim=1)
            return self._averaged(attn.weights(attn.q_norm(q), attn.k_norm(k)))
        norm: dict[str, Callable] = {"q": attn.q_norm, "k": attn.k_norm}
        return norm.get(self.tensor, lambda v: v)(parts)

    def _of_heads(self, x: Tensor) -> Tensor:
        return x if len(self.heads) == self.num_heads else x[:, self.heads]

    def _averaged(self, maps: Tensor) -> Tensor:
        if self.average is None:
            return maps
        return maps.mean(1 if self.average == "heads" else 2, keepdim=True).expand_as(maps)

    def fix_maps(self, batches: Iterable[Tensor]) -> "Teacher":
        """Replace each map by its mean over batches of normalised images: the control of averaging over examples.

        What is given no longer depends on the image, and the teacher does not run any more.
        """
        if self.tensor != "map":
            raise ValueError(f"only maps are averaged over examples, not {self.tensor!r}")
        self.fixed, total, count = None, 0, 0
        for x in batches:
            total = total + torch.stack([maps.sum(0) for maps in self(x).values()])
            count += len(x)
        self.fixed = total / count  # (|layers|, |heads|, N, N)
        return self


def cross_entropy(log_map: Tensor, target: Tensor) -> Tensor:
    """Return the mean over batch, heads and rows of -sum_j target_j log_map_j; both (B, h, N, n).

    The least it can be is the mean entropy of the target's rows: what it exceeds that by is the KL divergence.
    """
    return -(target * log_map).sum(-1).mean()


def entropy(target: Tensor) -> Tensor:
    """Return the mean entropy of the rows of a target (B, h, N, n), nats: the least that `cross_entropy` can be."""
    return torch.special.entr(target).sum(-1).mean()


def on_key_set(maps: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Put a mixer's map and the attention it should have on the mixer's own keys: log rows and target, (B, h, N, N).

    maps: what `Mixer.attention_map` gives; rows are normalised. Keys without weight are not the mixer's to attend to
    (outside a window; the few that an approximate inverse makes negative), and the target is renormalised over the
    others. Where a mixer pools keys and its map spreads their weight, the cross-entropy of the two is, but for a
    constant, that to the attention summed over each pooled key.
    """
    tiny = torch.finfo(maps.dtype).tiny
    target = target * (maps > 0)
    target = target / target.sum(-1, keepdim=True).clamp(min=tiny)
    maps = maps.clamp(min=0)
    normal = maps / maps.sum(-1, keepdim=True).clamp(min=tiny)
    return normal.clamp(min=tiny).log(), target
