"""Adaptive tokens: the halting of A-ViT (Yin et al., CVPR 2022) on a timm ViT, in the masked form that can be trained.

Every token sums up, layer by layer, a halting score read from its own first channel; once the sum reaches 1 - eps the
token is masked. The result is the class token averaged over the layers it lived in, weighted by its scores.
`token_removal.py` computes the same from fewer and fewer tokens.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from thesis_lib import backbone, paths, weights
from thesis_lib.attention.base import suggest

MASKED = -1000.0  # added to a masked key's logit: exp(-1000) is 0 in every number format


@dataclass(frozen=True)
class Halting:
    """The constants of halting; none is learnt, so they are stored with the weights.

    A token's score after a block is sigmoid(gamma * first channel + beta). alpha_ponder and alpha_distr weigh the two
    losses, target_depth is where the distribution loss wants the scores. peer_compat takes that loss as the released
    code computes it (see `distribution_loss`).
    Raises ValueError for eps outside (0, 1) and for values without a meaning.
    """

    gamma: float = 5.0
    beta: float = -10.0
    eps: float = 0.01
    alpha_ponder: float = 5e-4
    alpha_distr: float = 0.1
    target_depth: float = 8.0
    peer_compat: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps} must lie between 0 and 1: a token halts once its scores sum to 1 - eps")
        for name in ("gamma", "alpha_ponder", "alpha_distr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number that is not negative")
        if not math.isfinite(self.beta) or not 0 < self.target_depth < math.inf:
            raise ValueError(f"beta={self.beta} must be finite and target_depth={self.target_depth} above 0")

    def score(self, x: Tensor) -> Tensor:
        """Score tokens (..., D) by their first channel: float32 (...), in (0, 1)."""
        return torch.sigmoid(self.gamma * x[..., 0].float() + self.beta)


# The paper's set (as its re-implementation has it), the commands of the released README, and its argparse defaults.
PRESETS = {
    "paper": Halting(),
    "command-tiny": Halting(10.0, -30.0, 0.01, 5e-4, 1e-3),
    "command-small": Halting(10.0, -75.0, 0.01, 5e-4, 1e-3),
    "defaults": Halting(100.0, -3.0, 0.01, 1e-3, 0.01),
}


def preset(name: str = "paper", **changes: float) -> Halting:
    """Return a published set of constants, some of them changed; ValueError names the near ones of a typo."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{suggest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    known = [field.name for field in fields(Halting)]
    for change in changes:
        if change not in known:
            raise ValueError(f"halting has no constant {change!r}{suggest(change, known)}; known: {', '.join(known)}")
    return Halting(**asdict(PRESETS[name]) | changes)


@dataclass(frozen=True)
class Trace:
    """What a forward pass in masked form gives for B images, K tokens and L layers.

    features: (B, D), the weighted class token before the final norm. scores: (L, B, K), the gate after every block,
    also of masked tokens. alive: (L, B, K) bool, which tokens a block still saw. weights: (L, B, K), how much a
    block's output counts; a token's weights sum to 1. remainder: (B, K), the weight of the block where a token halted.
    """

    features: Tensor
    scores: Tensor
    alive: Tensor
    weights: Tensor
    remainder: Tensor

    @property
    def depth(self) -> Tensor:
        """Blocks each token passed, (B, K), from 1 to L."""
        return self.alive.sum(0)

    @property
    def rho(self) -> Tensor:
        """The ponder cost of each token, depth + remainder, (B, K)."""
        return self.depth + self.remainder

    @property
    def tokens(self) -> Tensor:
        """Tokens each block needs to get at the features, (L, B): none of an image whose class token has halted."""
        return self.alive.sum(2) * self.alive[:, :, 0]


class AdaptiveViT(nn.Module):
    """A timm ViT whose tokens halt, in masked form: every block computes all tokens, halted ones are hidden.

    vit: a VisionTransformer of plain blocks with softmax attention that classifies by its class token, or has no head;
    it is changed in place (its attention becomes the `mha` mixer, with the same weights).
    Raises ValueError for any other model.
    """

    def __init__(self, vit: VisionTransformer, halting: Halting = PRESETS["paper"]) -> None:
        super().__init__()
        other = [type(block).__name__ for block in getattr(vit, "blocks", []) if type(block) is not Block]
        if type(vit) is not VisionTransformer or other:
            what = f"blocks of {other[0]}" if other else type(vit).__name__
            raise ValueError(f"adaptive tokens need timm's VisionTransformer of plain blocks, not {what}")
        if not vit.has_class_token or vit.global_pool != "token":
            raise ValueError(f"adaptive tokens read the class token; this model pools by {vit.global_pool!r}")
        self.vit, self.halting = backbone.swap(vit, "mha"), halting
        self.train(vit.training)

    # What `perceptual.Metric` asks of a backbone.
    has_class_token = True

    @property
    def patch_embed(self) -> nn.Module:
        return self.vit.patch_embed

    @property
    def pretrained_cfg(self) -> dict:
        return getattr(self.vit, "pretrained_cfg", None) or {}

    def embed(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W) into the tokens (B, K, D) that the first block gets."""
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    def classify(self, features: Tensor) -> Tensor:
        """Apply the final norm and the head: (B, D) -> (B, classes)."""
        vit = self.vit
        return vit.head(vit.head_drop(vit.fc_norm(vit.norm(features))))

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images: (B, 3, H, W) -> (B, classes)."""
        return self.classify(self.run(images).features)

    def run(self, images: Tensor) -> Trace:
        """Pass normalised images (B, 3, H, W) through all blocks, halted tokens masked.

        A-ViT, algorithm 1, where as in its released code a token is counted once, in the layer in which it halts.
        """
        x = self.embed(images)  # (B, K, D)
        alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        total, features = torch.zeros(x.shape[:2], device=x.device), x.new_zeros(x.shape[0], x.shape[2])
        remainder, scores, lived, weighed = total, [], [], []
        for layer, block in enumerate(self.vit.blocks, start=1):
            x = _masked_block(block, x, alive)
            score = self.halting.score(x)  # (B, K)
            last = layer == len(self.vit.blocks)
            halts = alive & ((total + score >= 1 - self.halting.eps) | last)
            weight = torch.where(halts, 1 - total, torch.where(alive, score, 0.0))
            features = features + weight[:, :1].to(x.dtype) * x[:, 0]
            remainder = torch.where(halts, weight, remainder)
            scores.append(score), lived.append(alive), weighed.append(weight)
            total, alive = total + score, alive & ~halts
        return Trace(features, torch.stack(scores), torch.stack(lived), torch.stack(weighed), remainder)


def _masked_block(block: Block, x: Tensor, alive: Tensor) -> Tensor:
    """Run one block on (B, K, D); tokens that are not alive (B, K) are zeroed and no query sees them."""
    keep = alive[..., None].to(x.dtype)  # (B, K, 1)
    x, attn = x * keep, block.attn
    q, k, v = attn.query_key_value(block.norm1(x) * keep)  # (B, h, K, d_h)
    hidden = ((1 - keep) * MASKED).mT[:, None].to(q.dtype)  # (B, 1, 1, K)
    dropout = attn.attn_drop.p if attn.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, hidden, dropout_p=dropout, scale=attn.head_dim**-0.5)
    x = x + block.drop_path1(block.ls1(attn.project_heads(mixed)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x * keep) * keep)))


def ponder_loss(trace: Trace) -> Tensor:
    """Return the mean of rho over images and tokens (A-ViT, section 3.1)."""
    return trace.rho.mean()


def target_distribution(layers: int, target_depth: float, *, peer_compat: bool = False) -> Tensor:
    """Return the wished-for halting distribution over layers, float64 (L,): a normal density around target_depth.

    Layers count from 1 and the values sum to 1. The released code counts from 0 and scales so that the values *before*
    target_depth sum to 0.98, which makes the whole no distribution.
    """
    offset = torch.arange(layers, dtype=torch.float64) - target_depth + (not peer_compat)
    if not peer_compat:
        return torch.softmax(-0.5 * offset**2, 0)
    density = torch.exp(-0.5 * offset**2)
    return 0.98 * density / density[: int(target_depth)].sum()


def distribution_loss(trace: Trace, halting: Halting) -> Tensor:
    """Return KL(H || T), H the mean score of each layer over all images and tokens, normalised (A-ViT, section 3.2).

    A halted token scores 0. With halting.peer_compat, what the released code computes: the first image is left out
    (meant was the class token), masked tokens keep their score, H is clamped to [0.01, 0.99], the divergence is the
    other way round and divided by the layers, and negative values count as 0; ValueError for a batch of one.
    """
    layers = len(trace.scores)
    target = target_distribution(layers, halting.target_depth, peer_compat=halting.peer_compat)
    if not halting.peer_compat:
        mean = (trace.scores * trace.alive).mean((1, 2)).clamp(min=1e-8)  # (L,)
        share = mean / mean.sum()
        return (share * (share.log() - target.log().to(share))).sum()
    if trace.scores.shape[1] < 2:
        raise ValueError("peer_compat leaves out the first image of a batch, so a batch needs at least two")
    mean = trace.scores[:, 1:].mean((1, 2))
    share, target = (mean / mean.sum()).clamp(0.01, 0.99), target.to(mean)
    return (torch.xlogy(target, target) - target * share.log()).mean().clamp(min=0)


def halting_loss(trace: Trace, halting: Halting) -> Tensor:
    """Return what halting adds to the task's loss: alpha_ponder * ponder + alpha_distr * distribution."""
    loss = halting.alpha_ponder * ponder_loss(trace)
    return loss + halting.alpha_distr * distribution_loss(trace, halting) if halting.alpha_distr else loss


def save(model: AdaptiveViT, path: str | Path) -> Path:
    """Write safetensors with the vit's own parameter names, its architecture and the halting constants inside."""
    vit, path = model.vit, Path(path).expanduser()
    size = vit.patch_embed.img_size
    name = vit.recipe["name"] if hasattr(vit, "recipe") else model.pretrained_cfg.get("architecture")
    if name is None:
        raise ValueError("only models of timm's registry, or made by thesis_lib.backbone.create, can be built again")
    recipe = {"name": name, "img_size": list(size), "num_classes": vit.num_classes}
    recipe |= {"mixer": "mha", "layers": None, "mixer_options": {}}
    state = {key: value.detach().cpu().contiguous() for key, value in vit.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "recipe": json.dumps(recipe), "halting": json.dumps(asdict(model.halting))}
    return paths.write_whole(path, lambda part: save_file(state, part, metadata=metadata))


def load(path: str | Path) -> AdaptiveViT:
    """Rebuild what `save` wrote, on the CPU in eval mode.

    Raises FileNotFoundError, and ValueError for a corrupt file or one without halting constants.
    """
    path = Path(path).expanduser()
    state, _ = weights.read(path)
    metadata = {}
    if weights.is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    if "halting" not in metadata:
        raise ValueError(
            f"{path} holds no halting constants, so its tokens cannot halt as they were trained to: it is not a file "
            "of adaptive_tokens.save. To start from its weights: AdaptiveViT(vit, preset('paper')), vit loaded from it"
        )
    try:
        recipe, halting = json.loads(metadata["recipe"]), Halting(**json.loads(metadata["halting"]))
        model = AdaptiveViT(_architecture(recipe["name"], recipe["img_size"], recipe["num_classes"]), halting)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: its recipe or its halting constants are corrupt: {error!r}") from error
    weights.load(model.vit, state, None, path)
    return model.eval()


def _architecture(name: str, img_size: list[int], num_classes: int) -> VisionTransformer:
    if name == "demo":
        vit = backbone.create("demo", pretrained=False, img_size=img_size)
        vit.reset_classifier(num_classes)
        return vit
    if name.partition(".")[0] not in timm.list_models():  # timm would ask the hub for a name such as hf-hub:x/y
        raise ValueError(f"timm has no model {name!r}")
    return timm.create_model(name, img_size=img_size, num_classes=num_classes)
