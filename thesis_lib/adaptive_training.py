"""Train and judge models whose tokens halt: as classifiers, and as perceptual metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from thesis_lib import backbone, perceptual
from thesis_lib.adaptive_tokens import AdaptiveViT, Trace, halting_loss
from thesis_lib.augmentation import Augmentation, whole_batches
from thesis_lib.checkpoint import digest
from thesis_lib.datasets.missing import choose
from thesis_lib.statistics import bootstrap_mean
from thesis_lib.token_removal import TokenRemoval, executed_macs
from thesis_lib.trainer import random_state_kept
from thesis_lib.training import Batches, fit, triplet_batches, two_afc

OBJECTIVES = ("distillation", "2afc")


class AdaptiveMetric(perceptual.Metric):
    """A perceptual metric whose embedding is the halting class token; `feature` is "cls" or "cls_norm".

    model: an `AdaptiveViT`, which can be trained, or a `TokenRemoval`, which is fast.
    """

    def __init__(self, model: AdaptiveViT, feature: str = "cls", normalize: bool = True) -> None:
        choose(feature, ("cls", "cls_norm"), "feature of an adaptive metric")
        super().__init__(model, feature, normalize)

    def fast(self) -> "AdaptiveMetric":
        """Return the same metric in its token-removing form; it shares the weights."""
        return AdaptiveMetric(TokenRemoval(self.backbone), self.feature, self.normalize)

    def trace(self, x: Tensor) -> tuple[Tensor, Trace]:
        """Embed images (B, 3, H, W) in [0, 1]: (B, D), and the trace that the halting losses need."""
        self._check(x)
        trace = self.backbone.run((x - self.mean) / self.std)
        return self._read(trace.features), trace

    def embed_unchecked(self, x: Tensor) -> Tensor:
        """Return what `embed` does without looking at the values."""
        return self._read(self.backbone.run((x - self.mean) / self.std).features)

    def _read(self, features: Tensor) -> Tensor:
        return self._centre(features if self.feature == "cls" else self.backbone.vit.norm(features))


def headed(
    name: str,
    classes: int,
    *,
    pretrained: bool | str | Path = True,
    img_size: int | None = None,
    seed: int = 0,
) -> VisionTransformer:
    """Build a backbone as `backbone.create` does, with a new linear head whose random weights come from `seed`."""
    vit = backbone.create(name, pretrained=pretrained, img_size=img_size)
    with random_state_kept(torch.device("cpu")):
        torch.manual_seed(seed)
        vit.reset_classifier(classes)
    return vit


def normalised(model: nn.Module, images: Tensor) -> Tensor:
    """Scale images (B, 3, H, W), bytes or floats in [0, 1], as the weights expect them."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in backbone.normalization(model))
    return ((images if images.is_floating_point() else images.float() / 255) - mean) / std


def train_classifier(
    model: nn.Module,
    pixels: Any,
    labels: np.ndarray,
    val_pixels: Any,
    val_labels: np.ndarray,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float = 1e-4,
    head_lr_scale: float = 1.0,
    weight_decay: float = 0.0,
    drop_path: float = 0.0,
    augmentation: Mapping[str, Any] | None = None,
    repeats: int = 1,
    max_batches: int | None = None,
    **options: Any,
) -> list[dict]:
    """Train a ViT with a head, plain or adaptive, in place; return one log row an epoch, with accuracy on val.

    The loss is the cross-entropy, for an adaptive model plus ponder and distribution loss. The weights of the last
    epoch stay: an early one may be more accurate because its tokens do not halt yet. pixels: uint8 images by row,
    labels: (n,). head_lr_scale: how much faster the head learns. weight_decay: of all but norms, biases, class token
    and positions. drop_path: how often the last block's branches are skipped, the earlier ones' less often, linearly.
    augmentation: what `Augmentation` takes; repeats: of an image in a batch, see `whole_batches`. options: those of
    `training.fit` (schedule, warmup_epochs, ema_decay, checkpoint, ...). An incomplete last batch of an epoch is left
    out. Raises ValueError where there is no whole batch.
    """
    answers, vit = torch.from_numpy(np.asarray(labels, np.int64)), getattr(model, "vit", model)
    head = vit.head
    augment, criterion = Augmentation(head.out_features, **(augmentation or {})), SoftTargetCrossEntropy()
    pick = lambda rows: (pixels[rows], answers[rows])
    batches = whole_batches(len(answers), batch_size, pick, augment, max_batches, repeats)
    for block, rate in zip(vit.blocks, np.linspace(0, drop_path, len(vit.blocks)).tolist(), strict=True):
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = augment(*batch)
        x = normalised(model, images)
        if not isinstance(model, AdaptiveViT):
            return criterion(model(x), targets)
        trace = model.run(x)
        return criterion(model.classify(trace.features), targets) + halting_loss(trace, model.halting)

    def evaluate(model: nn.Module, epoch: int) -> dict[str, float]:
        device = next(model.parameters()).device
        predicted, tokens, _ = predict(model, val_pixels, batch_size=batch_size, device=device)
        return {"accuracy": float((predicted == np.asarray(val_labels)).mean()), "tokens": float(tokens.mean())}

    of_head, groups = {id(p) for p in head.parameters()}, []
    bare = [name for name, p in model.named_parameters() if p is vit.cls_token or p is vit.pos_embed]
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=bare):
        for chosen, scale in ((False, 1.0), (True, head_lr_scale)):
            params = [p for p in group["params"] if (id(p) in of_head) == chosen]
            groups.append(group | {"params": params, "lr_scale": scale})
    config = {"batch_size": batch_size, "augmentation": augmentation or {}, "repeats": repeats, "drop_path": drop_path}
    config["halting"] = str(getattr(model, "halting", None))
    config["data"] = digest([("labels", answers)])
    config["start"] = digest(model.state_dict().items())
    options = {"evaluate": evaluate, "select": None, "config": config, "parameters": groups} | options
    return fit(model, loss, batches, epochs=epochs, lr=lr, weight_decay=weight_decay, **options)


@torch.no_grad()
def predict(
    model: nn.Module,
    pixels: Any,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray, float]:
    """Classify images: classes (n,), tokens that each block computed (n, L), multiply-adds executed for an image.

    An adaptive model runs in its token-removing form. A model without a head gives the largest feature, so that its
    tokens can be counted all the same.
    """
    indices = np.arange(len(pixels)) if indices is None else np.asarray(indices, np.int64)
    adaptive = isinstance(model, AdaptiveViT)
    vit = model.vit if adaptive else model
    full = torch.full((len(vit.blocks), batch_size), vit.patch_embed.num_patches + vit.num_prefix_tokens)
    engine = TokenRemoval(model) if adaptive else model.eval()
    classes, tokens, macs = [], [], 0
    for rows in np.split(indices, range(batch_size, len(indices), batch_size)):
        x = normalised(model, pixels[rows].to(device))
        if adaptive:
            removed = engine.run(x)
            logits, used = engine.classify(removed.features), removed.tokens
        else:
            logits, used = engine(x), full[:, : len(rows)]
        classes.append(logits.argmax(-1).cpu()), tokens.append(used.T)
        macs += executed_macs(vit, used)
    return torch.cat(classes).numpy(), torch.cat(tokens).numpy(), macs / len(indices)


def classification_rows(
    labels: np.ndarray, predicted: np.ndarray, classes: int, *, resamples: int = 10_000, seed: int = 0, **protocol: Any
) -> list[dict]:
    """Return result rows of accuracy, accuracy_macro and f1_macro, with n and 95 % bootstrap interval over images.

    Macro accuracy is the mean recall of the classes that occur; macro F1 leaves out classes that neither occur nor are
    predicted. protocol: the columns that all rows share.
    """
    pairs, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)  # (2, m), (m,)
    true, guess = (np.eye(classes)[column] for column in pairs)  # (m, classes)

    def scores(n: np.ndarray) -> np.ndarray:  # (r, m) -> (3, r)
        occur, chosen, hits = n @ true, n @ guess, n @ (true * guess)
        recall, f1 = (
            np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)
            for a, b in ((hits, occur), (2 * hits, occur + chosen))
        )
        return np.stack([hits.sum(1) / n.sum(1), np.nanmean(recall, 1), np.nanmean(f1, 1)])

    rng, n = np.random.default_rng(seed), int(counts.sum())
    parts = [min(1000, resamples - start) for start in range(0, resamples, 1000)]
    drawn = np.concatenate([scores(rng.multinomial(n, counts / n, size=part)) for part in parts], axis=1)
    rows = []
    for name, value, sample in zip(
        ("accuracy", "accuracy_macro", "f1_macro"), scores(counts[None])[:, 0], drawn, strict=True
    ):
        low, high = np.quantile(sample, [0.025, 0.975])
        rows.append({"metric": name, "value": value, "low": low, "high": high, "unit": "1", "n": n} | protocol)
    return rows


def use_rows(tokens: np.ndarray, count: int, macs: float, **protocol: Any) -> list[dict]:
    """Return rows of what `predict` counted: tokens (share of all), depth, tokens_layer (share, by layer), MACs.

    tokens: (n, L), computed by each block for each image; count: tokens of an image. Intervals are over images.
    """
    share = bootstrap_mean(tokens.mean(1) / count)
    depth = bootstrap_mean(tokens.sum(1) / count)
    rows = [{"metric": "tokens", "unit": "1"} | vars(share), {"metric": "depth", "unit": "1"} | vars(depth)]
    rows.append({"metric": "macs_executed", "value": macs, "unit": "MAC", "n": len(tokens)})
    for layer, mean in enumerate(tokens.mean(0) / count, start=1):
        rows.append({"metric": "tokens_layer", "value": mean, "unit": "1", "n": len(tokens), "layer": layer})
    return [row | protocol for row in rows]


def tune_metric(
    student: AdaptiveMetric,
    pixels: Any,
    val_pixels: Any,
    val: Any,
    *,
    targets: Tensor | None = None,
    train: Any = None,
    objective: str = "distillation",
    epochs: int = 2,
    batch_size: int = 32,
    lr: float = 1e-4,
    margin: float = 0.05,
    max_batches: int | None = None,
    **options: Any,
) -> list[dict]:
    """Train a metric's backbone to halt, in place; return one log row an epoch, with 2AFC on val and token use there.

    objective: "distillation", mean(1 - cos) to `targets` (n, D), the embeddings that a teacher gave to `pixels`; or
    "2afc", the hinge loss on the triplets `train`, whose index points into `pixels`. Ponder and distribution loss are
    added. The weights of the last epoch stay. val: NIGHTS triplets, index into `val_pixels`. options: as in `fit`.
    Raises ValueError where the objective's data is missing or of another length.
    """
    choose(objective, OBJECTIVES, "objective")
    if objective == "distillation" and (targets is None or len(targets) != len(pixels)):
        raise ValueError(f"distillation needs targets, one embedding for each of the {len(pixels)} images")
    if objective == "2afc" and train is None:
        raise ValueError("the objective '2afc' needs train, the triplets whose votes are learnt")

    def batches(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(len(pixels), generator=generator).numpy()
        return Batches(order, batch_size, lambda rows: (pixels[rows], targets[rows]), max_batches)

    def loss(model: AdaptiveMetric, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, wanted = batch
        embedding, trace = model.trace(images.float() / 255)  # (b, D)
        if objective == "distillation":
            task = perceptual.distance(embedding, wanted).mean()
        else:
            reference, left, right = embedding.chunk(3)
            distances = (perceptual.distance(reference, side) for side in (left, right))
            task = perceptual.hinge_loss(*distances, wanted, margin=margin)
        return task + halting_loss(trace, model.backbone.halting)

    def evaluate(model: AdaptiveMetric, epoch: int) -> dict[str, float]:
        score = two_afc(model.fast(), val_pixels, val, batch_size=3 * batch_size)
        device = next(model.parameters()).device
        _, tokens, _ = predict(model.backbone, val_pixels, batch_size=3 * batch_size, device=device)
        return {"2afc": score, "tokens": float(tokens.mean())}

    if objective == "2afc":
        batches = triplet_batches(pixels, train.index, train.right_vote, batch_size, max_batches=max_batches)
    config = {"objective": objective, "batch_size": batch_size, "margin": margin, "feature": student.feature}
    config |= {"halting": str(student.backbone.halting), "start": digest(student.backbone.state_dict().items())}
    votes = lambda: {"index": torch.from_numpy(train.index), "votes": torch.from_numpy(train.right_vote)}
    learnt = {"targets": targets} if objective == "distillation" else votes()
    # Before it the embedding is taken, and processes wait for the gradient of all that is trained.
    student.backbone.vit.norm.requires_grad_(student.feature == "cls_norm")
    options = {"evaluate": evaluate, "select": None, "config": config | {"data": digest(learnt.items())}} | options
    return fit(student, loss, batches, epochs=epochs, lr=lr, **options)
