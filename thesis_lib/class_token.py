"""The last block for the class token alone: what a metric that reads no other token leaves uncomputed.

After the last mixer nothing joins the tokens any more, so that block's MLP, second norm and residual sums are needed
for one token of N; softmax attention needs one query, too. What is left out is dead compute: the class token is the
same up to rounding, in training too, its gradients included. Of a block's 12 N D^2 + 2 N^2 D multiply-adds this
leaves 2 N D^2 + 10 D^2 + 2 N D.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from thesis_lib import attention, closed_form
from thesis_lib.attention import Cost
from thesis_lib.attention.base import SOFTMAX


def possible(vit: nn.Module) -> bool:
    """Say whether the model ends in a plain timm `Block` behind others; with any mixer, and with an adapter, too."""
    blocks = getattr(vit, "blocks", ())
    return len(blocks) > 1 and type(blocks[-1]) is Block


def applies(vit: nn.Module) -> bool:
    """Say whether the class token may be computed alone now: `possible`, and no hook waits for the rest."""
    return possible(vit) and not any(m._forward_hooks or m._forward_pre_hooks for m in vit.blocks[-1].modules())


def last_class_token(vit: nn.Module, x: Tensor) -> Tensor:
    """Return the class token of the last block before the final norm: normalised images (B, 3, H, W) -> (B, D)."""
    ((patches, prefix),) = vit.forward_intermediates(
        x,
        indices=[len(vit.blocks) - 2],
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    tokens, block = torch.cat([prefix, patches], dim=1), vit.blocks[-1]  # (B, N, D)
    cls = tokens[:, :1] + block.drop_path1(block.ls1(_mix(block.attn, block.norm1(tokens))))  # (B, 1, D)
    return (cls + block.drop_path2(block.ls2(block.mlp(block.norm2(cls)))))[:, 0]


def model_cost(vit: nn.Module, norm: bool = False) -> Cost:
    """Return the closed form of `last_class_token` for one image, with the final norm of that token if `norm`.

    Multiply-adds equal the counted ones; the parameters are all the model's. Counted as `closed_form.model_cost` does.
    ValueError for a model whose last block cannot be cut (`possible`).
    """
    if not possible(vit):
        raise ValueError("the last block is no plain timm Block behind others, so it computes all of its tokens")
    block, grid, prefix = vit.blocks[-1], closed_form.block_grids(vit)[-1], vit.num_prefix_tokens
    tokens, dim, mlp = grid[0] * grid[1] + prefix, vit.embed_dim, closed_form.mlp_cost(block.mlp, 1)
    scales = sum(not isinstance(layer, nn.Identity) for layer in (block.ls1, block.ls2))
    final = isinstance(vit.norm, nn.LayerNorm)
    # Of the other tokens: MLP, second norm, two residual sums, layer scales. The final norm is of one token or of none.
    each = (7 + 2 + scales) * dim + mlp.elementwise
    saved = Cost((tokens - 1) * mlp.macs, (tokens - 1) * each + final * 7 * (tokens - norm) * dim)
    if _one_query(block.attn):
        whole = closed_form.mixer_cost(block.attn, tokens, grid, prefix)
        heads = block.attn.num_heads
        saved += Cost(
            whole.macs - (2 * tokens + 2) * dim**2 - 2 * tokens * dim,
            whole.elementwise - dim - SOFTMAX * heads * tokens,
        )
    total = closed_form.model_cost(vit)
    return Cost(total.macs - saved.macs, total.elementwise - saved.elementwise, total.params)


def _mix(attn: nn.Module, x: Tensor) -> Tensor:
    """Mix tokens (B, N, D) and return what the class token receives, (B, 1, D)."""
    if not _one_query(attn):
        return attn(x)[:, :1]
    weight, bias, inner = attn.qkv.weight, attn.qkv.bias, attn.qkv.out_features // 3
    q = F.linear(x[:, :1], weight[:inner], None if bias is None else bias[:inner])
    k, v = F.linear(x, weight[inner:], None if bias is None else bias[inner:]).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, h, 1 or N, d_h)
    dropout = attn.attn_drop.p if attn.training else 0.0
    q, k, scale = attn.q_norm(q), attn.k_norm(k), attn.head_dim**-0.5
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))


def _one_query(attn: nn.Module) -> bool:
    """Say whether the layer is fused softmax attention whose merged projection can be cut into rows."""
    mha = attention.get("mha")
    fused = type(attn) is mha and attn.implementation == "fused"
    fused |= type(attn) is Attention and getattr(attn, "gate", None) is None
    return fused and type(attn.qkv) is nn.Linear  # an adapter that is not merged yet is no row of the weight
