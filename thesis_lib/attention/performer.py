"""Performer: softmax attention estimated with positive orthogonal random features (FAVOR+, arXiv 2009.14794)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thesis_lib.attention.base import SOFTMAX, Cost, integer
from thesis_lib.attention.mha import MHA
from thesis_lib.attention.soft import precise, without_autocast


class Performer(MHA):
    """phi(Q) phi(K)^T V, rows normalised, phi(x)_m = exp(w_m x - |x|^2 / 2) and x scaled by d_h^-1/4 (section 2.3).

    features: number m of random directions w; default d_h ln(d_h), at least d_h.
    scaling: length of the directions, orthogonal in blocks of d_h: "sqrt" all sqrt(d_h), the smaller error; "chi" that
    of Gaussian vectors, which makes the kernel estimate unbiased.
    seed: draws the directions, which are the persistent buffer `directions` (m, d_h), the same for all heads and, with
    one seed, for all layers. Nothing changes them but `redraw` and loading a state dict.

    With t_mj = w_m k_j - |k_j|^2 / 2 and c_m = logsumexp_j t_mj the estimate is a product of two softmaxes,
    softmax_m(q_i w_m + c_m) softmax_j(t_mj): the directions attend to the keys and the tokens to the directions. Rows
    sum to 1, with no normaliser to multiply out (N m h MACs) and, however long q and k, no denominator that vanishes.
    The products are taken in the cheaper order, which for N below 2 d_h m / (d_h + m) is the N x N one. In the other,
    the tokens' softmax, with c_m added to its scores, runs on the fused kernel where no gradient is wanted.

    The error falls as m^-1/2 for short queries and keys only. Where they are long (independent numbers of unit variance
    at d_h = 64 are long enough) a thousand features do worse than the plain mean of the values: such a layer must be
    trained after the swap.

    Departures from the published codes: no eps (their 1e-6 to 1e-4 added to each feature keeps the denominator from 0
    and, where norms are large, returns the mean of the values in place of the estimate, without gradient), the sign
    fix that makes the directions of a QR decomposition uniform, directions of length sqrt(d_h) ("sqrt": less error, a
    small bias) where the published default draws lengths ("chi": none), no redrawing on its own, everything between the
    projections in fp32 (float64 stays), autocast or not, and no dropout on a map that is never made.
    """

    name = "performer"
    kind = "kernel"
    label = "Performer"
    defaults = {"features": None, "scaling": "sqrt", "seed": 0}
    choices = {"scaling": ("chi", "sqrt")}

    @classmethod
    def check(cls, options, heads, grid):
        if options["features"] is not None:
            integer("features", options["features"], 1)
        return {**options, "seed": integer("seed", options["seed"], 0)}

    def build(self, attn: nn.Module) -> None:
        super().build(attn)
        self.options["features"] = feature_count(self.options["features"], self.head_dim)
        weight = attn.qkv.weight
        full = torch.promote_types(weight.dtype, torch.float32)  # a layer in half precision keeps exact directions
        self.register_buffer("directions", self.draw().to(weight.device, full))

    def draw(self) -> Tensor:
        """Directions (m, d_h) of the options' seed, in float64 on the CPU."""
        return orthogonal_directions(
            self.options["features"], self.head_dim, self.options["seed"], self.options["scaling"]
        )

    def redraw(self, seed: int) -> None:
        """Draw other directions, in place."""
        self.options["seed"] = integer("seed", seed, 0)
        self.directions.copy_(self.draw())

    def scaled(self, heads: torch.Size) -> Tensor:
        """Directions for queries and keys that are not scaled themselves, repeated: (B, h, m, d_h)."""
        return (precise(self.directions) * self.head_dim**-0.25).expand(*heads, -1, -1)

    def directions_to_keys(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp(t_mj - max_j t_mj) (B, h, m, N), its sums over the keys (B, h, m, 1), and c_m (B, h, 1, m).

        Dividing by the sums is cheaper once the exponentials have met the values.
        """
        heads = k.shape[:2]
        directions, k = self.scaled(heads).flatten(0, 1), precise(k).flatten(0, 1)  # (B h, m, d_h), (B h, N, d_h)
        norms = k.square().sum(-1).unsqueeze(1) * (-0.5 * self.head_dim**-0.5)  # (B h, 1, N)
        keys = torch.baddbmm(norms, directions, k.mT)  # t_mj
        largest = keys.detach().amax(-1, keepdim=True)
        keys = keys.sub_(largest).exp_()
        sums = keys.sum(-1, keepdim=True)
        found = keys, sums, (largest + sums.log()).mT
        return tuple(part.unflatten(0, heads) for part in found)

    def tokens_to_directions(self, q: Tensor, c: Tensor) -> Tensor:
        """softmax_m(q_i w_m + c_m), (B, h, N, m)."""
        heads, q = q.shape[:2], precise(q).flatten(0, 1)
        directions = self.scaled(heads).flatten(0, 1)
        return torch.baddbmm(c.flatten(0, 1), q, directions.mT).softmax(-1).unflatten(0, heads)

    def mix_heads(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x)
        with without_autocast(x):
            keys, sums, c = self.directions_to_keys(k)
            if quadratic(x.shape[1], self.head_dim, self.options["features"]):
                y = self.tokens_to_directions(q, c) @ (keys / sums) @ precise(v)
            elif c.requires_grad:  # the fused kernels have no gradient for what is added to the scores
                y = self.tokens_to_directions(q, c) @ (keys @ precise(v) / sums)
            else:
                values = keys @ precise(v) / sums  # (B, h, m, d_h)
                directions = self.scaled(q.shape[:2])
                y = F.scaled_dot_product_attention(precise(q), directions, values, attn_mask=c, scale=1.0)
        return y.to(v.dtype)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The estimate of softmax(q k^T / sqrt(d_h)), (B, h, N, N)."""
        with without_autocast(q):
            keys, sums, c = self.directions_to_keys(k)
            return (self.tokens_to_directions(q, c) @ (keys / sums)).to(q.dtype)

    @classmethod
    def closed_form(cls, tokens, dim, heads, grid, prefix_tokens, options) -> Cost:
        m = feature_count(options["features"], dim // heads)
        entries = heads * tokens * m
        if square := quadratic(tokens, dim // heads, m):
            core = 2 * tokens * m * dim + entries * tokens + tokens**2 * dim
        else:
            core = 4 * tokens * m * dim
        return Cost(
            macs=4 * tokens * dim**2 + core,
            # norms of the keys; two softmaxes and the subtraction of the norms; division, of the keys or the values;
            # scale of the directions, c_m
            elementwise=2 * tokens * dim
            + 2 * SOFTMAX * entries
            + (entries if square else m * dim)
            + m * (dim // heads + 2 * heads),
            params=4 * dim**2 + 4 * dim,
        )


def feature_count(features: int | None, head_dim: int) -> int:
    """Fill in the default, which grows with the head width as the variance of the estimate asks for."""
    return max(head_dim, int(head_dim * math.log(head_dim))) if features is None else features


def quadratic(tokens: int, head_dim: int, features: int) -> bool:
    """Whether phi(Q) phi(K)^T first takes fewer MACs than phi(K)^T V first."""
    return tokens * (features + head_dim) < 2 * features * head_dim


def orthogonal_directions(features: int, head_dim: int, seed: int, scaling: str) -> Tensor:
    """Draw directions (m, d_h) in float64, orthogonal in blocks of d_h and uniform on the sphere, on the CPU.

    The Q of a QR decomposition of Gaussian numbers is uniform once the signs of R's diagonal are made positive
    (Mezzadri, arXiv math-ph/0609050); the decomposition is then unique, so the draw is the same with every LAPACK.
    """
    draw = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64, "device": "cpu"}
    q, r = torch.linalg.qr(torch.randn(-(-features // head_dim), head_dim, head_dim, **draw))
    rows = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT.flatten(0, 1)[:features]
    if scaling == "chi":
        return rows * torch.randn(features, head_dim, **draw).norm(dim=1, keepdim=True)
    return rows * math.sqrt(head_dim)
