"""What a layer does to its tokens: the effective token-mixing matrix of every mixer, by probing with unit values."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from thesis_lib.attention import Mixer

PARTS = {"qkv": 3, "kv": 2, "v": 1}  # projections that yield values: the last of so many equal parts of what they give
AT_ONCE = 64  # probes in one forward pass


@torch.no_grad()
def mixing_matrix(mixer: Mixer, x: Tensor) -> Tensor:
    """Return M (B, heads or 1, N, N) for tokens x (B, N, D): output token i gets M[i, j] times the value of token j.

    Probed are the values, while queries, keys, landmarks, routers and gates stay those of x: their projection is made
    to return 1 for token j and 0 elsewhere, and what the heads then hold, before the layer's norm and last projection,
    is column j. So M is what is executed, with negative entries, rows that do not sum to 1, gates and convolutions,
    where `attention_map` may clamp and normalise. The layer must be in evaluation mode, or dropout is probed too.

    A head mixes its channels alike, so each of them probes a token of its own; not so in layers with a convolution,
    where all channels of a head are 1 and their mean is read. The bias of a convolution moves no token: left out.
    pool and identity have no values and are linear: the tokens themselves are probed, and M x is the output.
    sra and linformer project tokens that are pooled already, so theirs is `attention_map`.
    ValueError for tokens that the mixer does not take.
    """
    mixer.check_tokens(x)
    projections = value_projections(mixer)
    if not projections:
        matrix = probe(mixer, x[0], 1, mixer.dim)
        return matrix.expand(len(x), -1, -1, -1)
    tokens, width = [], []
    with ExitStack() as hooks:
        layer, _ = projections[0]
        hooks.enter_context(layer.register_forward_hook(lambda _, __, y: tokens.append(y.shape[1])))
        hooks.enter_context(mixer.norm.register_forward_pre_hook(lambda _, inputs: width.append(inputs[0].shape[-1])))
        mixer(x[:1])
    if tokens[0] != x.shape[1]:
        return mixer.attention_map(x)
    alone = any(isinstance(module, nn.Conv2d) for module in mixer.modules())
    heads = width[0] // mixer.head_dim  # fewer than mixer.num_heads where moh has dropped some
    matrices = [
        probe(lambda units, image=image: hold(mixer, projections, image, units), image, heads, mixer.head_dim, alone)
        for image in x
    ]
    return torch.stack(matrices)


def value_projections(mixer: Mixer) -> list[tuple[nn.Module, int]]:
    """List the layers that yield values and the first channel of each that is one."""
    for name, parts in PARTS.items():
        layer = getattr(mixer, name, None)
        if isinstance(layer, nn.ModuleList):
            return [(part, 0) for part in layer[len(layer) - len(layer) // parts :]]
        if layer is not None:
            return [(layer, layer.out_features - layer.out_features // parts)]
    return []


def hold(mixer: Mixer, projections: list[tuple[nn.Module, int]], image: Tensor, units: Tensor) -> Tensor:
    """Give what the heads hold, (p, N, h * d_h), for the tokens of one image (N, D) and values put in their place."""
    held: list[Tensor] = []
    with ExitStack() as hooks:
        for (layer, first), values in zip(projections, units.chunk(len(projections), dim=-1), strict=True):
            hooks.enter_context(
                layer.register_forward_hook(
                    lambda _, __, y, first=first, values=values: torch.cat([y[..., :first], values], dim=-1)
                )
            )
        hooks.enter_context(mixer.norm.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0])))
        mixer(image.expand(len(units), -1, -1))
    return held[0]


def probe(respond: Callable[[Tensor], Tensor], like: Tensor, heads: int, head_dim: int, alone: bool = False) -> Tensor:
    """Read the matrix (heads, N, N) off the responses to unit tokens (p, N, heads * head_dim), N those of `like`.

    alone: one token a probe, 1 in all channels; otherwise a head's channels hold a token each.
    """
    tokens, group = like.shape[0], 1 if alone else head_dim
    probes = -(-tokens // group)
    units = torch.eye(probes * group, tokens, device=like.device, dtype=like.dtype)
    units = units.view(probes, group, tokens).mT  # (p, N, group)
    units = units.expand(-1, -1, heads * head_dim) if alone else units.repeat(1, 1, heads)
    nothing = respond(torch.zeros_like(units[:1]))
    columns = []
    for some in units.split(AT_ONCE):
        part = (respond(some) - nothing).unflatten(-1, (heads, head_dim))
        columns.append(part.mean(-1, keepdim=True) if alone else part)
    return torch.cat(columns).permute(2, 1, 0, 3).flatten(2)[..., :tokens]  # (p, N, h, group) -> (h, N, N)
